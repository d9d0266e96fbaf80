"""Samples a second of our loader against webdataset and MosaicML streaming: the same samples, the same disk, the same batches.

    .venv/bin/python -m bench.loader [--resolutions=256,512,1024] [--rounds=3]

Records as large as the full model's, of random numbers: two latents, a caption of 128 tokens and for every second image
another for its mirror image. Each reader is a process of its own, goes once through all samples in random order, as its own
manual tells, and makes of them what training takes: flipped by half, normalised to float32, text padded; with the peers in the
process itself and with two worker processes. Cold: the files' pages are dropped with posix_fadvise(DONTNEED) before the
reader starts. Peers come from the environment (requirements-bench.txt). Writes bench/results/loader-RESOLUTIONS-DEVICE.json.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from bench import device
from configs import full
from encode import commandline, records
from encode.whole_files import write_json

TEXT, WIDTH, CHANNELS, SHARD = 128, 1024, 16, 128
COUNTS = {256: 1536, 512: 1024, 1024: 640}
EATEN = {256: 126, 512: 31, 1024: 6}  # images/s of the full model on a 4090 at half of its peak
TIMES, MEMORY = 10, 1e9  # what the loader must reach: so many times that, in so many bytes
PLAIN = "ours uncompressed"  # the same records in shards that are not compressed: what the smaller files cost
SHUFFLE = 1000  # samples in webdataset's buffer, as its manual has it
MODULES = {"ours": "grain", PLAIN: "grain", "webdataset": "webdataset", "mosaicml-streaming": "streaming"}
OLDER = "ours before"
READERS = [
    ("ours", 0),
    (PLAIN, 0),
    ("webdataset", 0),
    ("webdataset", 2),
    ("mosaicml-streaming", 0),
    ("mosaicml-streaming", 2),
]
CPU = "CPU milliseconds a sample"
BF16, MB = ml_dtypes.bfloat16, 1e6


def samples(resolution: int, count: int) -> Iterator[dict]:
    """Records of encode.records with random numbers: bits that compress as those of real latents do."""
    rng, side = np.random.default_rng(resolution), resolution // 8
    pool = rng.standard_normal(1 << 23, np.float32).astype(BF16)

    def some(*shape):
        size = int(np.prod(shape))
        start = int(rng.integers(len(pool) - size))
        return pool[start : start + size].reshape(shape)

    for number in range(count):
        yield {
            "id": f"{number:06d}.jpg",
            "caption": "A dog on the left of the picture looks at two birds. " * 6,
            "caption_flip": "A dog on the right of the picture looks at two birds. " * 6,
            "latent": some(side, side, CHANNELS),
            "latent_flip": some(side, side, CHANNELS),
            "text": some(TEXT, WIDTH),
            "text_flip": some(TEXT if number % 2 else 0, WIDTH),
            "vision": some(WIDTH).astype(np.float32),
            "vision_flip": some(WIDTH).astype(np.float32),
            "mask": np.zeros((0, 0), np.uint8),
            "pixel_hash": f"{rng.integers(2**63):032x}",
        }


def write(root: Path, resolution: int, count: int, formats: list[str]) -> dict[str, float]:
    """Write the same samples in every format into root/FORMAT; returns the mean bytes of a sample, in memory and stored."""
    bucket, side = f"{resolution}x{resolution}", resolution // 8
    spec = records.features((side, side, CHANNELS), WIDTH, WIDTH)
    rows, size, writers = [], 0, [_writer(name, root / name) for name in formats if name[:4] != "ours"]
    for number, sample in enumerate(samples(resolution, count)):
        rows.append(sample)
        plain = {name: sample[name].tobytes() if name in records.ARRAYS else sample[name].encode() for name in sample}
        size += sum(map(len, plain.values()))
        for put, _ in writers:
            put(number, plain)
        if len(rows) == SHARD or number == count - 1:
            records.write_shard(root / "ours", bucket, number // SHARD, rows, spec)
            rows = []
    for _, finish in writers:
        finish()
    records.finish_bucket(root / "ours", bucket, spec)
    facts = {
        "schema": records.SCHEMA, "resolution": resolution, "count": count, "text_longest": TEXT,
        "latent_mean": [0.1] * CHANNELS, "latent_std": [1.5] * CHANNELS,
        "widths": {"latent": CHANNELS, "text": WIDTH, "vision": WIDTH},
        "buckets": {bucket: {"count": count, "shards": -(-count // SHARD), "latent": [side, side, CHANNELS]}},
    }  # fmt: skip
    write_json(root / "ours" / "dataset.json", facts)
    shutil.copytree(root / "ours", root / PLAIN)
    for shard in (root / PLAIN).rglob("*.array_record-*"):
        content = ArrayRecordReader(str(shard)).read_all()
        writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
        for record in content:
            writer.write(record)
        writer.close()
    stored = {name: sum(path.stat().st_size for path in _files(root / name)) / count for name in formats}
    return {"in memory": size / count} | stored


def _writer(name: str, folder: Path) -> tuple[Callable[[int, dict[str, bytes]], None], Callable[[], None]]:
    """(write one sample, finish) of a peer."""
    folder.mkdir()
    if name == "webdataset":
        import webdataset

        tar = webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=SHARD, verbose=0)
        return lambda number, sample: tar.write({"__key__": f"{number:06d}"} | sample), tar.close
    columns = dict.fromkeys((*records.ARRAYS, *records.STRINGS), "bytes")
    mds = _streaming().MDSWriter(out=str(folder), columns=columns)
    return lambda number, sample: mds.write(sample), mds.finish


def _streaming():
    """MosaicML streaming; it imports torchvision for its examples alone, which has no build for CPUs beside PyTorch's."""
    if "streaming" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        import transformers.feature_extraction_utils  # as streaming does; it looks for torchvision itself  # noqa: F401

        names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
        modules = {name: ModuleType(name) for name in names}
        modules["torchvision.datasets"].VisionDataset = object
        modules["torchvision.transforms.functional"].to_tensor = None
        sys.modules.update(modules)
    import streaming

    return streaming


def ours(folder: Path, resolution: int, batch: int, workers: int) -> Iterator[dict]:
    """What jaxdit.train reads from."""
    from jaxdit import data

    del resolution, workers
    iterator = data.training_batches(data.Dataset(folder), seed=0, micro_batch=batch, flip=0.5)
    try:
        for found in iterator:
            yield found | {"id": [str(row) for row in found["rows"]]}
    finally:
        iterator.close()


def webdataset(folder: Path, resolution: int, batch: int, workers: int) -> Iterator[dict]:
    """Tar files in random order, samples through a shuffle buffer, batches made where the samples are read."""
    import webdataset as wds

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE)
    dataset = dataset.batched(batch, collation_fn=Collate(resolution), partial=False)
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def mosaicml_streaming(folder: Path, resolution: int, batch: int, workers: int) -> Iterator[dict]:
    """MDS shards on the local disk with its standard shuffle, py1e."""
    streaming = _streaming()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=batch, num_workers=workers, collate_fn=Collate(resolution), drop_last=True
    )
    return iter(loader)


class Collate:
    """Samples of bytes to the training batch that Dataset.read makes, as PyTorch's tensors, which workers can hand over."""

    def __init__(self, resolution: int):
        self.shape = (resolution // 8, resolution // 8, CHANNELS)
        self.mean, self.std = np.full(CHANNELS, 0.1, np.float32), np.full(CHANNELS, 1.5, np.float32)
        self.rng = np.random.default_rng(0)

    def __call__(self, found: list[dict]) -> dict:
        import torch

        ends = np.where(self.rng.random(len(found)) < 0.5, "_flip", "")
        latents = [np.frombuffer(one["latent" + end], BF16).reshape(self.shape) for one, end in zip(found, ends)]
        texts = [
            np.frombuffer(one["text" + end] or one["text"], BF16).reshape(-1, WIDTH) for one, end in zip(found, ends)
        ]
        padded = np.zeros((len(texts), TEXT, WIDTH), BF16)
        for row, text in zip(padded, texts):
            row[: len(text)] = text
        latent = (np.stack(latents).astype(np.float32) - self.mean) / self.std
        return {
            "id": [bytes(one["id"]).decode() for one in found],
            "latent": torch.from_numpy(latent),
            "text": torch.from_numpy(padded.view(np.int16)).view(torch.bfloat16),
            "text_length": torch.tensor([len(text) for text in texts], dtype=torch.int32),
            "vision": torch.from_numpy(
                np.stack([np.frombuffer(one["vision" + e], np.float32) for one, e in zip(found, ends)])
            ),
        }


def read(name: str, workers: int, folder: Path, resolution: int, count: int) -> dict:
    """Go once through all samples; the numbers of this process, which does nothing else."""
    batch = micro_batch(resolution, count)
    reader = {"ours": ours, "webdataset": webdataset, "mosaicml-streaming": mosaicml_streaming}[name]
    __import__("jaxdit.data" if name == "ours" else "torch")
    before, began, seen = _status("VmRSS"), time.perf_counter(), []
    batches = reader(folder, resolution, batch, workers)
    for number in range(count // batch):
        found = next(batches)
        if not number:
            first, cpu = time.perf_counter(), _processor_time(os.getpid())
        seen += found["id"]
        del found
    ended, cpu = time.perf_counter(), _processor_time(os.getpid()) - cpu
    del batches
    return {
        "samples a second": (len(seen) - batch) / (ended - first),
        "seconds to the first batch": first - began,
        CPU: 1e3 * cpu / (len(seen) - batch),
        "memory before, MB": before / MB,
        "peak memory of the process, MB": _status("VmHWM") / MB,
        "different samples": len(set(seen)),
    }


def micro_batch(resolution: int, count: int) -> int:
    """Of configs/full.py."""
    return min(full.STAGES.get(str(resolution), (4,))[0], max(1, count // 4))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise ValueError(name)


def drop(folder: Path) -> float:
    """Drop the files' pages from the cache; returns the share of them that stayed nevertheless."""
    stayed = looked = 0
    for path in _files(folder):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        for start in range(0, os.fstat(file).st_size, 1 << 20):
            looked += 1
            with contextlib.suppress(BlockingIOError):  # what is not in the cache is refused
                stayed += os.preadv(file, [bytearray(1)], start, os.RWF_NOWAIT)
        os.close(file)
    return stayed / looked


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def child(name: str, workers: int, folder: Path, resolution: int, count: int, before: str | None) -> dict:
    """`read` in a process of its own; while it runs, the memory of it and its workers is looked at."""
    command = [
        sys.executable, "-m", "bench.loader", f"--read={name.split()[0]}:{workers}", f"--folder={folder}",
        f"--resolutions={resolution}", f"--samples={count}",
    ]  # fmt: skip
    peak, older = 0, before if name == OLDER else None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=older, stdout=subprocess.PIPE, stderr=errors, text=True)
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.25)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{name} ended with {process.returncode}: {errors.read()[-2000:]}")
    return json.loads(process.stdout.read().splitlines()[-1]) | {"peak memory with its workers, MB": peak / MB}


def _family(process: int) -> Iterator[Path]:
    """/proc/PID of a process and all below it."""
    yield Path(f"/proc/{process}")
    for task in Path(f"/proc/{process}/task").iterdir():
        below = []
        with contextlib.suppress(OSError):  # a thread that has just ended
            below = (task / "children").read_text().split()
        for one in map(int, below):
            yield from _family(one)


def _memory(process: int) -> int:
    """Bytes of a process and all below it; pages that several share are counted once (PSS)."""
    try:
        texts = [(folder / "smaps_rollup").read_text() for folder in _family(process)]
        return sum(1024 * int(text.split("Pss:")[1].split()[0]) for text in texts)
    except (OSError, IndexError):  # one has just ended
        return 0


def _processor_time(process: int) -> float:
    """Seconds of a process and all below it."""
    texts = [(folder / "stat").read_text().rpartition(")")[2].split() for folder in _family(process)]
    return sum(int(fields[11]) + int(fields[12]) for fields in texts) / os.sysconf("SC_CLK_TCK")


def race(root: Path, resolution: int, count: int, rounds: int, before: str | None) -> dict:
    """All readers in turn, cold and then warm."""
    there = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    sizes = write(root, resolution, count, there)
    readers = [reader for reader in READERS if reader[0] in there] + ([(OLDER, 0)] if before else [])
    rows: dict = {(reader, cache): [] for reader in readers for cache in ("cold", "warm")}
    for number in range(rounds):
        for name, workers in readers[:: -1 if number % 2 else 1]:
            for cache in ("cold", "warm"):
                samples_at = root / ("ours" if name == OLDER else name)
                stayed = drop(samples_at) if cache == "cold" else 1.0
                load = os.getloadavg()[0]
                row = child(name, workers, samples_at, resolution, count, before)
                rows[(name, workers), cache].append(row | {"share in the cache": stayed, "load before": load})
                print(resolution, name, workers, cache, {k: round(v, 2) for k, v in row.items()}, flush=True)
    sides: dict = {name: "not installed" for name in MODULES if name not in there}
    for ((name, workers), cache), runs in rows.items():
        title = name if name.startswith("ours") else f"{name}, {workers} workers"
        best = max(runs, key=lambda run: run["samples a second"])
        best = {key: round(value, 3) for key, value in best.items()}
        sides.setdefault(title, {})[cache] = best | {
            "MB a second": round(best["samples a second"] * sizes["in memory"] / MB, 1),
            "samples a second, each round": [round(run["samples a second"], 1) for run in runs],
        }
    needed = TIMES * EATEN.get(resolution, 0)
    found = sides["ours"]
    return {
        "samples": count,
        "micro-batch": micro_batch(resolution, count),
        "bytes a sample": {name: round(size) for name, size in sizes.items()},
        "readers": sides,
        "needed, samples a second": needed,
        "cores busy at that rate": round(needed * min(found[cache][CPU] for cache in found) / 1e3, 2),
        "reached warm": found["warm"]["samples a second"] >= needed,
        "reached cold": found["cold"]["samples a second"] >= needed,
        "under 1 GB": max(found[cache]["peak memory of the process, MB"] for cache in found) * MB < MEMORY,
    }


def main() -> int:
    options = flags.FLAGS
    resolutions = [int(resolution) for resolution in options.resolutions]
    if options.read:
        name, workers = options.read.split(":")
        print(json.dumps(read(name, int(workers), Path(options.folder), resolutions[0], options.samples)))
        return 0
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as launch/environment.sh: for every reader
    load, found = os.getloadavg(), {}
    for resolution in resolutions:
        count = options.samples or COUNTS[resolution]
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[str(resolution)] = race(Path(folder), resolution, count, options.rounds, options.before)
    packages = ("grain", "array_record", "numpy", "webdataset", "mosaicml-streaming", "torch")
    result = {
        "device": f"{device.processor()}, {os.cpu_count()} cores",
        "load before (1, 5, 15 minutes)": [round(value, 2) for value in load],
        "load after": [round(value, 2) for value in os.getloadavg()],
        "GLIBC_TUNABLES": os.environ["GLIBC_TUNABLES"],
        "versions": {name: version(name) for name in packages if name in ("numpy", "grain") or _there(name)},
        "command": f"python -m bench.loader --resolutions={','.join(options.resolutions)} --rounds={options.rounds}"
        + (" --before=CHECKOUT" if options.before else ""),
        "cold": "posix_fadvise(DONTNEED) on every file after fsync; what lies below a virtual disk may still remember",
        "resolutions": found,
    }
    device.write("-".join(["loader", *options.resolutions]), device.processor(), result)
    return 0


def _there(package: str) -> bool:
    return importlib.util.find_spec({"mosaicml-streaming": "streaming"}.get(package, package)) is not None


if __name__ == "__main__":
    flags.DEFINE_list("resolutions", ["256", "512", "1024"], "Sides of the pictures.")
    flags.DEFINE_integer("samples", 0, "Samples of each; 0: somewhat less than a gigabyte.")
    flags.DEFINE_integer("rounds", 3, "Times that each reader takes its turn; the best counts.")
    flags.DEFINE_string("folder", None, "Where the samples lie for the time of the race; a temporary folder.")
    flags.DEFINE_string("before", None, "A checkout of older code: its loader takes part beside ours.")
    flags.DEFINE_string("read", None, "Of the process that reads: FORMAT:WORKERS.")
    commandline.run(main)
