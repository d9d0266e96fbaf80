"""What grows with what: the data set with its number of records, a training step with tokens, batch, depth and buckets.

    .venv/bin/python -m bench.scaling [--parts=records,step] [--records=1000,10000,100000,1000000]

Records: stand-ins with everything a start reads (index files, dataset.json, shards of as many records); their records are
small, and the shards of a bucket are links to one file. Start, first batch and resume in the middle of a long run are timed in a
process of their own, the smallest time of three. Step: the trainer's functions on a small model, the sizes of one row in turn,
the median of their times. Writes bench/results/scaling-PARTS-DEVICE.json.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from bench import device
from encode import commandline, records
from encode.whole_files import write_json

BUCKETS, SHARD, MICRO_BATCH, PASSES = 10, 1000, 8, 50
WIDTHS = {"latent": 16, "text": 12, "vision": 6}
BASE = {"tokens": 64, "batch": 8, "layers": 4, "buckets": 1}
AXES = {"tokens": (16, 64, 256, 1024), "batch": (1, 8, 16), "layers": (2, 4, 8), "buckets": (1, 2, 4)}
MODEL = {"width": 256, "heads": 4, "patch": 2, "dtype": "float32", "remat": "none", "scan_unroll": 1}
TEXT, TEXT_WIDTH, VISION_WIDTH = 64, 1024, 1024
MB = 1e6


def stand_in(root: Path, count: int) -> None:
    """A data set of `count` records in ten buckets, of which one shard a bucket is written and the rest are links to it."""
    rng, per_bucket = np.random.default_rng(0), count // BUCKETS
    names = [records.bucket_name(64, 64 + 16 * number) for number in range(BUCKETS)]
    for name in names:
        width, height = map(int, name.split("x"))
        spec = records.features((height // 8, width // 8, WIDTHS["latent"]), WIDTHS["text"], WIDTHS["vision"])
        size = min(SHARD, per_bucket)
        rows = [_record(rng, name, number, height // 8, width // 8) for number in range(size)]
        records.write_shard(root, name, 0, rows, spec)
        for shard in range(1, per_bucket // size):
            os.link(records.shard_path(root, name, 0), records.shard_path(root, name, shard))
            shutil.copyfile(records.index_path(root, name, 0), records.index_path(root, name, shard))
        records.finish_bucket(root, name, spec)
    facts = {
        "schema": records.SCHEMA, "resolution": 64, "count": count, "text_longest": 8, "widths": WIDTHS,
        "latent_mean": [0.0] * WIDTHS["latent"], "latent_std": [1.0] * WIDTHS["latent"],
        "buckets": {name: {"count": per_bucket, "shards": per_bucket // size} for name in names},
    }  # fmt: skip
    write_json(root / "dataset.json", facts)


def _record(rng, bucket: str, number: int, height: int, width: int) -> dict:
    latent = rng.standard_normal((height, width, WIDTHS["latent"]), np.float32).astype(ml_dtypes.bfloat16)
    text = rng.standard_normal((8, WIDTHS["text"]), np.float32).astype(ml_dtypes.bfloat16)
    vision = rng.standard_normal(WIDTHS["vision"], np.float32)
    return {
        "id": f"{bucket}/{number}.jpg", "caption": "left", "caption_flip": "right", "pixel_hash": rng.bytes(16).hex(),
        "latent": latent, "latent_flip": latent, "text": text, "text_flip": text, "vision": vision, "vision_flip": vision,
        "mask": np.zeros((0, 0), np.uint8),
    }  # fmt: skip


def start(folder: Path) -> dict[str, float]:
    """What a start and a resume take in this process, which does nothing else."""
    from jaxdit import data, order

    found: dict[str, float] = {"memory before, MB": _resident()}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        found[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    began = time.process_time()
    dataset = data.Dataset(folder, holdout_fraction=0.01)
    found["open, processor s"] = time.process_time() - began
    lap("open, s")
    found["memory of it, MB"] = _resident() - found["memory before, MB"]
    options = {"seed": 0, "micro_batch": MICRO_BATCH, "flip": 0.5}
    clock = time.perf_counter()
    plan = iter(order.Plan(dataset.train, **options))
    next(plan)
    lap("first choice of rows, s")
    batches = data.training_batches(dataset, **options)
    lap("iterator, s")
    next(batches)
    lap("first batch, s")
    batches.close()
    sizes = {name: len(rows) for name, rows in dataset.train.items()}
    position = {
        "micro_batch": PASSES * sum(sizes.values()) // MICRO_BATCH,
        "taken": {name: PASSES * size + size // 2 for name, size in sizes.items()},
    }
    batches = data.training_batches(dataset, **options)
    clock = time.perf_counter()
    batches.set_state(position)
    lap("resume: position set, s")
    next(batches)
    lap("resume: first batch, s")
    found["bytes of the position"] = len(json.dumps(batches.get_state()))
    batches.close()
    clock = time.perf_counter()
    next(dataset.fixed_batches("training", MICRO_BATCH, 64))
    lap("first batch of an evaluation, s")
    rows = {name: dataset.train[name][:: SHARD // 2] for name in dataset.buckets}
    for name, chosen in rows.items():  # every shard
        dataset.records(name, chosen)
    found["open files after all shards"] = len(os.listdir("/proc/self/fd"))
    found["memory at the end, MB"] = _resident()
    return found


def _resident() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / MB


def over_records(counts: list[int]) -> dict:
    """`start` for every number of records, the smallest of three processes each."""
    rows = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "64"
            root.mkdir()
            stand_in(root, count)
            command = [sys.executable, "-m", "bench.scaling", f"--stand_in={root}"]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                for _ in range(3)
            ]
            index = sum(path.stat().st_size for path in root.glob("index-*.npy"))
        least = {key: min(run[key] for run in runs) for key in runs[0]}
        rows[str(count)] = {"index, MB": round(index / MB, 3)} | {key: round(value, 4) for key, value in least.items()}
        print(count, rows[str(count)], flush=True)
    return rows


class Step:
    """The trainer's update of one micro-batch for one size, compiled when it is made; see jaxdit.train."""

    def __init__(self, tokens: int, batch: int, layers: int, buckets: int):
        import jax

        from jaxdit import estimate, model, optim, update

        settings = MODEL | {
            "layers": layers, "channels": WIDTHS["latent"], "text_width": TEXT_WIDTH, "vision_width": VISION_WIDTH,
            "attention": "xla",
        }  # fmt: skip
        graph, shapes = model.abstract(settings)
        schedule = optim.learning_rate(peak=1e-4, end=1e-6, warmup=1, total=100)
        optimizer = optim.make_optimizer(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0)
        flow = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
        self.zeros = jax.jit(partial(update.new_total, shapes))
        self.accumulate = jax.jit(partial(update.accumulate_gradients, graph, flow, 0), donate_argnums=1)
        self.change = jax.jit(partial(update.apply_update, optimizer, schedule, 0.9999, batch), donate_argnums=0)
        self.state = jax.jit(partial(update.new_state, settings, optimizer, 0))()
        side = round(tokens**0.5)
        sides = [(side << k, side >> k) for k in range(4)]
        self.sides = [pair[::turn] for pair in sides for turn in (1, -1)]  # as many tokens each
        self.sides = list(dict.fromkeys(self.sides))[:buckets]
        self.batches = [self._batch(np.random.default_rng(0), batch, 2 * h, 2 * w) for h, w in self.sides]
        self.number, self.compile = 0, []
        for _ in self.batches:
            began = time.perf_counter()
            self()
            self.compile.append(time.perf_counter() - began)
        self.flops = batch * estimate.training_flops(settings, (2 * side, 2 * side, WIDTHS["latent"]), TEXT)

    def _batch(self, rng, size: int, height: int, width: int) -> dict:
        import jax

        return jax.device_put(
            {
                "latent": rng.standard_normal((size, height, width, WIDTHS["latent"]), np.float32),
                "text": rng.standard_normal((size, TEXT, TEXT_WIDTH), np.float32).astype(ml_dtypes.bfloat16),
                "text_length": np.full(size, TEXT, np.int32),
                "vision": rng.standard_normal((size, VISION_WIDTH), np.float32),
            }
        )

    def __call__(self) -> None:
        import jax

        batch = self.batches[self.number % len(self.batches)]
        where = jax.device_put(np.array([self.number, 0], np.int32))
        total = self.accumulate(self.state["params"], self.zeros(), batch, where)
        self.state, _ = self.change(self.state, total)
        jax.block_until_ready(self.state)
        self.number += 1


def over_steps(rounds: int) -> dict:
    """Milliseconds a step along each axis from `BASE`; the sizes of an axis take their turns."""
    found, make = {}, lru_cache(Step)  # the base stands in every row
    for axis, sizes in AXES.items():
        steps = {size: make(**(BASE | {axis: size})) for size in sizes}
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(rounds):
            for size, step in steps.items():
                for _ in step.batches:
                    began = time.perf_counter()
                    step()
                    times[size].append(time.perf_counter() - began)
        found[axis] = {
            str(size): {
                "milliseconds": round(1e3 * statistics.median(times[size]), 2),
                "least": round(1e3 * min(times[size]), 2),
                "GFLOP/s": round(step.flops / statistics.median(times[size]) / 1e9, 1),
                "programs": step.accumulate._cache_size(),
                "seconds to compile": round(sum(step.compile), 1),
            }
            for size, step in steps.items()
        }
        print(axis, found[axis], flush=True)
    return found


def table(rows: dict[str, dict]) -> str:
    """The columns of all rows, aligned."""
    names = list(next(iter(rows.values())))
    lines = [["", *names], *([size, *(f"{row[name]:,}" for name in names)] for size, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def main() -> int:
    options = flags.FLAGS
    if options.stand_in:
        print(json.dumps(start(Path(options.stand_in))))
        return 0
    load, found = os.getloadavg(), {}
    if "records" in options.parts:
        found["records"] = over_records([int(count) for count in options.records])
    if "step" in options.parts:
        found["step"] = over_steps(options.rounds)
    result = {
        "device": f"{device.processor()}, {os.cpu_count()} cores",
        "load before (1, 5, 15 minutes)": [round(value, 2) for value in load],
        "load after": [round(value, 2) for value in os.getloadavg()],
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {name: version(name) for name in ("jax", "grain", "array_record", "numpy")},
        "command": f"python -m bench.scaling --parts={','.join(options.parts)} --records={','.join(options.records)} "
        f"--rounds={options.rounds}",
        "records": f"{BUCKETS} buckets, shards of {SHARD}, micro-batch {MICRO_BATCH}, resumed after {PASSES} passes",
        "step": f"from {BASE}, {MODEL}, text of {TEXT} tokens, AdamW, average and clip included",
        "found": found,
    }
    device.write("-".join(["scaling", *options.parts]), device.processor(), result)
    for rows in [found.get("records"), *found.get("step", {}).values()]:
        print("\n" + table(rows) if rows else "")
    return 0


if __name__ == "__main__":
    flags.DEFINE_list("parts", ["records", "step"], "What is measured.")
    flags.DEFINE_list("records", ["1000", "10000", "100000", "1000000"], "Numbers of records.")
    flags.DEFINE_integer("rounds", 5, "Times of each step; the median counts.")
    flags.DEFINE_string("stand_in", None, "Of the process that opens a data set: its folder.")
    commandline.run(main)
