"""Settings beside each other: the loss on photographs that training never saw, several trainings of each.

.venv/bin/python -m bench.heldout [--settings=squares,direction] [--seeds=3] [--steps=600]

Trains a small model on 540 of 600 generated photographs at 64 pixels, 32 at a time, and judges the averaged weights on the other
60 every hundred steps by the mean square alone, whatever was trained, with the same noise each time (`bench.optimizers`). Goes
on where it stopped: a row of the result is one training. Writes bench/results/heldout-DEVICE.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags

from bench import device, gate_power, optimizers
from encode import commandline

RATE = 5e-3  # at which AdamW learns most there (bench.optimizers)
WIDER = {"model.layers": 4, "model.width": 256}
SETTINGS: dict[str, dict[str, Any]] = {
    "squares": {"flow.direction": 0.0},
    **{f"direction {weight:g}": {"flow.direction": weight} for weight in (1.0, 2.0)},
    # Of a card's attention wide heads take less time for the same operations (bench.attention).
    **{f"{count} heads of {256 // count}": WIDER | {"model.heads": count} for count in (2, 4, 8)},
}


def main() -> int:
    options = flags.FLAGS
    processor = device.processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    path = device.path("heldout", processor)
    known = {"device": processor, "steps": options.steps, "batch": optimizers.BATCH, "rate": RATE}
    result = device.begun(path, "heldout", known | {"size": gate_power.SIZE}, trainings=[])
    done = {(row["setting"], row["seed"]) for row in result["trainings"]}
    wanted = [
        (seed, name)
        for seed in range(options.seeds)
        for name in SETTINGS
        if any(part in name for part in options.settings) and (name, seed) not in done
    ]
    with tempfile.TemporaryDirectory() as folder:
        photographs = gate_power.photographs(Path(folder), count=600) if wanted else None
        for seed, name in wanted:
            config = gate_power.configured(photographs, steps=options.steps, seed=seed)
            config.optim.peak_learning_rate = RATE
            config.update_from_flattened_dict(SETTINGS[name])
            row = {"setting": name, "seed": seed} | optimizers.trained(config, Path(folder) / f"{name} {seed}")
            result["trainings"].append(row)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_list("settings", ["squares", "direction"], "Those whose name holds one of these.")
    flags.DEFINE_integer("seeds", 3, "Trainings of each.")
    flags.DEFINE_integer("steps", 600, "Of each training.")
    commandline.run(main)
