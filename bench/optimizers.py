"""AdamW beside Muon: the loss on photographs that training never saw, by samples, each with three learning rates.

.venv/bin/python -m bench.optimizers [--names=adamw,muon] [--rates=2.5e-3,5e-3,1e-2] [--steps=800]

Trains the small model of bench.gate_power on 540 of 600 generated photographs, 32 at a time, and judges the averaged weights on
the other 60 every hundred steps, with the same noise each time. Goes on where it stopped: a row of the result is one training.
Writes bench/results/optimizers-DEVICE.json.
"""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from absl import flags

from bench import device, gate_power
from encode import commandline
from jaxdit import flow, metrics

BATCH, EVERY = 32, 100


def trained(config: Any, workdir: Path) -> dict[str, Any]:
    """Train with a tenth of the images held out: their loss every EVERY steps, at the end by tenths of t; and the speed."""
    config.optim.ema_decay = 0.995  # the average of the last 200 updates
    config.data.holdout_fraction = 0.1
    config.train.update(batch_size=BATCH, micro_batch=BATCH, eval_every=EVERY, eval_images=60, eval_budget=1.0)
    gate_power.to_the_end(config, workdir)
    rows = metrics.read(workdir)
    rates = [
        BATCH * (after["step"] - before["step"]) / (after["seconds"] - before["seconds"])
        for before, after in pairwise(rows[1:])  # the first compiles
    ]
    judged = [row for row in rows if "held_out_loss" in row]
    tenths = [judged[-1].get(f"eval/held_out/ema/t{tenth}") for tenth in range(flow.TENTHS)]
    return {
        "images a second, at best": round(max(rates), 1) if rates else None,  # few steps have no two lines
        "held-out loss": {row["step"]: round(row["held_out_loss"], 5) for row in judged},
        "at the end, by tenths of t": [loss and round(loss, 5) for loss in tenths],
    }


def main() -> int:
    options = flags.FLAGS
    processor = device.processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    path = device.path("optimizers", processor)
    known = {"device": processor, "steps": options.steps, "batch": BATCH, "size": gate_power.SIZE}
    result = device.begun(path, "optimizers", known, trainings=[])
    done = {(row["optimizer"], row["rate"]) for row in result["trainings"]}
    with tempfile.TemporaryDirectory() as folder:
        photographs = gate_power.photographs(Path(folder), count=600)
        for rate in map(float, options.rates):
            for name in options.names:
                if (name, rate) not in done:
                    config = gate_power.configured(photographs, steps=options.steps)
                    config.optim.update(name=name, peak_learning_rate=rate)
                    row = {"optimizer": name, "rate": rate} | trained(config, Path(folder) / f"{name} {rate}")
                    result["trainings"].append(row)
                    path.write_text(json.dumps(result, indent=1) + "\n")
                    print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_list("names", ["adamw", "muon"], "Which.")
    flags.DEFINE_list("rates", ["2.5e-3", "5e-3", "1e-2"], "Learning rates at the peak.")
    flags.DEFINE_integer("steps", 800, "Of each training.")
    commandline.run(main)
