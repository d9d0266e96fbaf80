"""Small pictures first, or large ones alone: the loss on photographs that training never saw, for the same operations.

.venv/bin/python -m bench.stages [--shares=0,0.25,0.5,0.75] [--sizes=64,128] [--rates=5e-3] [--steps=800]
                              [--seeds=0]

Trains the small model of bench.gate_power on 540 of 600 generated photographs, 32 at a time: a share of the operations of --steps
steps on large ones goes into small ones, and a second stage begins from its average, as configs/full.py climbs. The other 60
photographs judge, in the large size and with the same noise each time; the shift of the timesteps is 3 there, and less in
proportion to the side for small ones. Goes on where it stopped: a row of the result is one training in one or two stages. Writes
bench/results/stages-SIZES-DEVICE.json.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags

from bench import device, gate_power, optimizers
from encode import commandline
from jaxdit import data, estimate, trained

SHIFT = 3.0  # of the large size
FIRST_RATE = 5e-3  # the best of bench.optimizers, for the first stage; --rates are those of the second


def operations(config: Any) -> float:
    """Of one step, by our count."""
    dataset = data.Dataset(config.data.path, text_lengths=config.data.text_lengths)
    settings = trained.model_settings(config.model, dataset.info["widths"])
    (bucket,) = dataset.info["buckets"].values()
    return optimizers.BATCH * estimate.training_flops(settings, bucket["latent"], max(dataset.text_lengths))


def staged(
    large: Path, sizes: list[int], folder: Path, share: float, rate: float, seed: int, steps: int
) -> dict[str, Any]:
    """One training, the last of its stages judged."""
    row: dict[str, Any] = {"share of the operations in small ones": share, "rate of the last stage": rate}
    row |= {"seed": seed, "steps": []}
    budget = steps * operations(gate_power.configured(large, steps=1))
    before = ""
    for size, part, peak in zip(sizes, (share, 1 - share), (FIRST_RATE, rate)):
        if part:
            config = gate_power.configured(large.parent / str(size), steps=1, seed=seed)
            count = round(part * budget / operations(config))
            config.train.update(total_steps=count, init_from=before)
            config.optim.update(peak_learning_rate=peak, warmup_steps=min(100, count // 10))
            config.flow.shift = SHIFT * size / sizes[-1]
            config.checkpoint.every = count
            before = str(folder / str(size))
            found = optimizers.trained(config, Path(before))
            row["steps"].append(count)
    return row | {"samples": optimizers.BATCH * sum(row["steps"])} | found


def main() -> int:
    options = flags.FLAGS
    processor = device.processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    sizes = [int(size) for size in options.sizes]
    path = device.path("-".join(["stages", *options.sizes]), processor)
    known = {"device": processor, "sizes": sizes, "steps": options.steps, "batch": optimizers.BATCH}
    known |= {"size": gate_power.SIZE}
    result = device.begun(path, "stages", known, trainings=[])
    done = {tuple(row.values())[:3] for row in result["trainings"]}
    wanted = itertools.product(map(int, options.seeds), map(float, options.shares), map(float, options.rates))
    with tempfile.TemporaryDirectory() as folder:
        large = gate_power.photographs(Path(folder), count=600, sizes=sizes)
        for seed, share, rate in wanted:
            if (share or rate == FIRST_RATE) and (share, rate, seed) not in done:
                row = staged(large, sizes, Path(folder) / f"{share} {rate} {seed}", share, rate, seed, options.steps)
                result["trainings"].append(row)
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_list("shares", ["0", "0.25", "0.5", "0.75"], "Of the operations, in the small size.")
    flags.DEFINE_list("rates", ["5e-3"], "Learning rates of the last stage, at the peak.")
    flags.DEFINE_list("sizes", ["64", "128"], "Pixels a side, the small ones' first.")
    flags.DEFINE_list("seeds", ["0"], "Of the trainings.")
    flags.DEFINE_integer("steps", 800, "What large ones alone would have.")
    commandline.run(main)
