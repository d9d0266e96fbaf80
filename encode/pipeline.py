"""plan -> encode shard k -> finish: from a folder of photographs to one data set a resolution.

A shard is the unit of work, of resume and of distribution. The plan (OUT/plan.json) fixes which picture goes into which
shard; a shard is finished when its index file stands at every resolution; everything known about a finished shard that the
end needs (sums for the statistics, pictures refused, lengths) lies beside the plan in OUT/parts. Killed anywhere and
started again, a run writes the bytes that an undisturbed one writes, and leaves finished shards alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from encode import buckets, captions, images, records, report, stats
from encode import plan as plan_rules
from encode.leg import DISK_FULL, Progress, disk_full, say_problems
from encode.plan import Stopped
from encode.records import InputError
from encode.source import Collection, Item, Problem, walk

log = logging.getLogger(__name__)


class WorkFailed(RuntimeError):
    """The work stopped at something that is not the input's fault; the message says where (exit code 1)."""


@dataclass(frozen=True)
class Encoders:
    """The three models; vision is None where every picture brings a precomputed vector."""

    vae: Any
    text: Any
    vision: Any | None


@dataclass(frozen=True)
class Job:
    """One shard: a bucket's shape in cells, the shard's number in its bucket, and (id, width, height) of its pictures."""

    shape: tuple[int, int]
    number: int
    entries: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Prepared:
    """A decoded picture: its hash, its pixels at each resolution, and the whole of it for the vision model."""

    pixel_hash: str
    pixels: Mapping[int, np.ndarray]
    whole: np.ndarray | None
    vectors: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True)
class Context:
    """What all shards of one run share."""

    config: Any
    out: Path
    encoders: Encoders
    items: Mapping[str, Item]
    cells: int
    vision_width: int
    stop: Callable[[], bool]

    def bucket(self, shape: Sequence[int], resolution: int) -> str:
        return records.bucket_name(*buckets.pixels(tuple(shape), self.cells, resolution))

    def spec(self, shape: Sequence[int], resolution: int):
        width, height = buckets.pixels(tuple(shape), self.cells, resolution)
        latent = [height // 8, width // 8, self.encoders.vae.channels]
        return records.features(latent, self.encoders.text.width, self.vision_width)

    def root(self, resolution: int) -> Path:
        return self.out / str(resolution)

    def part(self, job: Job) -> Path:
        return self.out / "parts" / f"{self.bucket(job.shape, max(self.config.resolutions))}-{job.number:05d}.json"

    def missing(self, job: Job) -> list[int]:
        """Resolutions at which the shard is not written yet."""
        names = [(size, self.bucket(job.shape, size)) for size in self.config.resolutions]
        return [size for size, name in names if not records.index_path(self.root(size), name, job.number).exists()]


@dataclass(frozen=True)
class Summary:
    """What a run has to say at its end."""

    encoded: int
    refused: int
    report: Path
    roots: tuple[Path, ...]
    rate: float  # pictures a second of this leg; 0 where nothing was left to do


def run(config: Any, encoders: Encoders, stop: Callable[[], bool] = lambda: False) -> Summary:
    """Encode config.images into config.out, going on where an earlier run stopped.

    Args:
      config: the configuration of configs/encode_*.py.
      encoders: the loaded models.
      stop: asked between batches; true ends the run with `Stopped`.

    Raises:
      InputError: the folder, the configuration or an earlier output does not allow it.
      WorkFailed: an encoder failed or the disk is full; finished shards stay.
      Stopped: as asked.
    """
    folder, out = Path(config.images).expanduser(), Path(config.out).expanduser()
    if folder.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"config.out={out} holds the photographs themselves; choose a folder of its own for the output."
        )
    try:
        with records.only_one(out):
            return _run(config, folder, out, encoders, stop)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise WorkFailed(disk_full(out)) from error


def _run(config: Any, folder: Path, out: Path, encoders: Encoders, stop: Callable[[], bool]) -> Summary:
    collection = walk(folder, out)
    plan = _plan(config, folder, out, collection, encoders, stop)
    say_problems("before encoding", plan["quarantine"])
    items = {item.id: item for item in collection.items}
    width = plan["vision_width"]
    context = Context(config, out, encoders, items, plan["cells"], width, stop)
    jobs = [Job(tuple(job["bucket"]), job["shard"], tuple(map(tuple, job["items"]))) for job in plan["shards"]]
    todo = [job for job in jobs if context.missing(job) or not context.part(job).exists()]
    progress = Progress(sum(len(job.entries) for job in jobs), sum(len(job.entries) for job in todo))
    for job in todo:
        _encode_shard(context, job, progress)
    parts = [json.loads(context.part(job).read_text(encoding="utf-8")) for job in jobs]
    broken = [row for part in parts for row in part["quarantine"]]
    say_problems("while encoding", broken)
    refused = [Problem(**row) for row in plan["quarantine"] + broken]
    finished = all((context.root(size) / "dataset.json").exists() for size in config.resolutions)
    if todo or not finished or not (out / "report.html").exists():
        _finish(context, plan, jobs, parts, sorted(refused, key=lambda row: (row.file, row.stage, row.reason)))
    encoded = sum(len(part["records"]) for part in parts)
    roots = tuple(context.root(size) for size in config.resolutions)
    return Summary(encoded, len(refused), out / "report.html", roots, progress.rate())


def _plan(config, folder: Path, out: Path, collection: Collection, encoders: Encoders, stop) -> dict[str, Any]:
    """The stored plan, if it is of this configuration and these photographs; else a new one."""
    wanted = json.loads(json.dumps(plan_rules.fingerprint(config, encoders)))
    inputs = {item.id: item.caption(config.seed) for item in collection.items}
    path = out / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan.get("schema") != records.SCHEMA:
            raise InputError(
                f"{path}: schema version {plan.get('schema')} found, this program writes version {records.SCHEMA}; "
                "encode into a new folder."
            )
        plan_rules.refuse_difference(out, plan["fingerprint"], wanted)
        plan_rules.refuse_growth(folder, out, plan["inputs"], inputs)
        return plan
    (out / "parts").mkdir(exist_ok=True)
    plan = {"schema": records.SCHEMA, "fingerprint": wanted} | plan_rules.make_plan(config, collection, stop)
    plan["vision_width"] = plan["vision_width"] or encoders.vision.width
    plan["inputs"] = inputs
    records.write_json(path, plan)
    return plan


def _encode_shard(context: Context, job: Job, progress: Progress) -> None:
    """Decode, encode and write one shard at every resolution; nothing is published before all of it is encoded."""
    config, missing = context.config, context.missing(job)
    part: dict[str, Any] = {"quarantine": [], "truncated": [], "records": [], "stats": {}}
    rows: dict[int, list] = {size: [] for size in config.resolutions}
    sums: dict[int, list[stats.Partial]] = {size: [] for size in config.resolutions}
    batch: list[tuple[Item, Prepared]] = []
    with ThreadPoolExecutor(config.decode_threads) as pool:
        decoded = plan_rules.ahead(
            pool, lambda entry: _prepare(context, job, entry), job.entries, config.decode_threads + 2
        )
        for place, (entry, found) in enumerate(decoded, 1):
            if context.stop():
                raise Stopped
            if isinstance(found, Problem):
                part["quarantine"].append(asdict(found))
            else:
                batch.append((context.items[entry[0]], found))
            # Batches are counted in planned pictures, not in good ones: a refused one moves no other.
            if place % config.batch_size == 0 or place == len(job.entries):
                _encode_batch(context, job, (place - 1) // config.batch_size, batch, rows, sums, part)
                batch = []
                progress.step((place - 1) % config.batch_size + 1)
    part["stats"] = {size: stats.merge(sums[size]).to_json() for size in config.resolutions if sums[size]}
    records.write_json(context.part(job), part)
    for size in missing:
        name = context.bucket(job.shape, size)
        records.write_shard(context.root(size), name, job.number, rows[size], context.spec(job.shape, size))


def _prepare(context: Context, job: Job, entry: tuple[str, int, int]) -> Prepared | Problem:
    item, config = context.items[entry[0]], context.config
    try:
        whole = images.decode(item.path, config.max_pixels)
        if whole.shape[1::-1] != entry[1:]:
            raise images.ImageProblem("the file has changed since the plan was made")
        sizes = {size: buckets.pixels(job.shape, context.cells, size) for size in config.resolutions}
        pixels = {size: images.resize(whole, *target) for size, target in sizes.items()}
        if not config.vision.precomputed:
            return Prepared(images.pixel_hash(whole), pixels, whole, None)
        vector = plan_rules.read_vector(item.vision, context.vision_width)
        flipped = vector if item.vision_flip is None else plan_rules.read_vector(item.vision_flip, context.vision_width)
        return Prepared(images.pixel_hash(whole), pixels, None, (vector, flipped))
    except images.ImageProblem as problem:
        return Problem(item.id, "decode", str(problem))
    except InputError as problem:
        return Problem(item.id, "vision", str(problem))


def _encode_batch(context: Context, job: Job, number: int, batch, rows, sums, part) -> None:
    """Append the records of one batch, at each resolution, to rows; their sums to sums; what the end needs to part."""
    if not batch:
        return
    config, encoders = context.config, context.encoders
    bucket = context.bucket(job.shape, max(config.resolutions))
    where = f"bucket {bucket}, shard {job.number}, batch {number} ({batch[0][0].id} to {batch[-1][0].id})"
    plain = [item.caption(config.seed) for item, _ in batch]
    flips = [captions.swap(text) if config.flip else None for text in plain]
    others = sorted({flip for flip, text in zip(flips, plain) if flip and flip != text})
    with _blaming("text encoder", where):
        tokens = [_bfloat16(value) for value in encoders.text.encode([*plain, *others])]
        part["truncated"] += [
            item.id
            for (item, _), text in zip(batch, plain)
            if encoders.text.count_tokens(text) > encoders.text.max_tokens
        ]
    flip_tokens = dict(zip(others, tokens[len(plain) :]))
    with _blaming("vision encoder", where):
        vectors, vectors_flip = _vectors(context, [prepared for _, prepared in batch])
    for size in config.resolutions:
        pixels = np.stack([prepared.pixels[size] for _, prepared in batch])
        with _blaming(f"VAE at {size}", where):
            latents = _bfloat16(encoders.vae.encode(pixels))
            mirrored = _bfloat16(encoders.vae.encode(images.mirrored(pixels))) if config.flip else latents
        for place, (item, prepared) in enumerate(batch):
            flip = flips[place]
            record = {
                "id": item.id,
                "caption": plain[place],
                "caption_flip": flip or "",
                "latent": latents[place],
                "latent_flip": mirrored[place],
                "text": tokens[place],
                "text_flip": flip_tokens.get(flip, tokens[place][:0]),
                "vision": vectors[place],
                "vision_flip": vectors_flip[place],
                "mask": np.zeros((0, 0), np.uint8),
                "pixel_hash": prepared.pixel_hash,
            }
            rows[size].append(record)
            sums[size] += [stats.partial(record[name]) for name in (("latent", "latent_flip") if flip else ("latent",))]
    for place, (item, prepared) in enumerate(batch):
        part["records"].append(
            [item.id, prepared.pixel_hash, len(tokens[place]), len(flip_tokens.get(flips[place], ()))]
        )


def _vectors(context: Context, batch: Sequence[Prepared]) -> tuple[np.ndarray, np.ndarray]:
    """[batch, width] float32 vision vectors of the pictures and of their mirror images."""
    if context.config.vision.precomputed:
        return tuple(np.stack([prepared.vectors[side] for prepared in batch]) for side in (0, 1))
    plain = _finite(context.encoders.vision.encode([prepared.whole for prepared in batch]))
    if not context.config.flip:
        return plain, plain
    return plain, _finite(context.encoders.vision.encode([images.mirrored(prepared.whole) for prepared in batch]))


def _finite(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("the result is empty or not finite")
    return values


def _bfloat16(values: Any) -> np.ndarray:
    return _finite(values).astype(ml_dtypes.bfloat16)


def _finish(context: Context, plan, jobs: Sequence[Job], parts: Sequence[Mapping], refused: Sequence[Problem]) -> None:
    """quarantine.jsonl, the buckets' TFDS metadata, the report, and dataset.json of each resolution, last."""
    config, out = context.config, context.out
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in refused)
    temporary = out / ".quarantine.jsonl.tmp"
    temporary.write_text(lines, encoding="utf-8")
    records.publish(temporary, out / "quarantine.jsonl")
    if not any(part["records"] for part in parts):
        raise InputError(f"{config.images}: every input was refused; {out / 'quarantine.jsonl'} says why.")
    datasets = {size: _dataset(context, plan, jobs, parts, size) for size in config.resolutions}
    for size in config.resolutions:
        for shape in sorted({job.shape for job in jobs}):
            records.finish_bucket(context.root(size), context.bucket(shape, size), context.spec(shape, size))
    page = report.build(context, plan, jobs, parts, refused, datasets)
    (out / ".report.html.tmp").write_text(page, encoding="utf-8")
    records.publish(out / ".report.html.tmp", out / "report.html")
    for size in config.resolutions:
        records.write_json(context.root(size) / "dataset.json", datasets[size])


def _dataset(context: Context, plan, jobs, parts, resolution: int) -> dict[str, Any]:
    """The content of dataset.json."""
    config, rows = context.config, [row for part in parts for row in part["records"]]
    found = stats.merge([stats.Partial.from_json(part["stats"][str(resolution)]) for part in parts if part["stats"]])
    mean, std, flat = stats.mean_and_std(found)
    if flat:
        log.warning("Latent channels %s never change; their deviation is set to %g.", flat, stats.FLOOR)
    shapes: dict[tuple, dict] = {}
    for job, part in zip(jobs, parts):
        width, height = buckets.pixels(job.shape, context.cells, resolution)
        latent = [height // 8, width // 8, context.encoders.vae.channels]
        bucket = shapes.setdefault(job.shape, {"count": 0, "shards": 0, "latent": latent})
        bucket["count"] += len(part["records"])
        bucket["shards"] += 1
    widths = {
        "latent": context.encoders.vae.channels,
        "text": context.encoders.text.width,
        "vision": context.vision_width,
    }
    fields = {name: {"shape": [], "dtype": "str"} for name in records.STRINGS}
    for name in records.ARRAYS:
        kind = name.removesuffix("_flip")
        shape = {"latent": [None, None], "text": [None], "vision": [], "mask": [None, None]}[kind]
        dtype = {"latent": "bfloat16", "text": "bfloat16", "vision": "float32", "mask": "uint8"}[kind]
        fields[name] = {"shape": shape + ([widths[kind]] if kind in widths else []), "dtype": dtype}
    settings = config.to_dict()
    for name in ("vae", "text", "vision"):  # the data set is sampled from another folder than it was made in
        settings[name]["path"] = settings[name]["path"] and os.path.abspath(os.path.expanduser(settings[name]["path"]))
    return {
        "schema": records.SCHEMA,
        "resolution": resolution,
        "count": len(rows),
        "fields": fields,
        "fingerprint": plan["fingerprint"]["encoders"] | plan["fingerprint"]["rules"],
        "encoders": {name: settings[name] for name in ("vae", "text", "vision")},
        "latent_mean": mean,
        "latent_std": std,
        "latent_count": found.count,
        "latent_statistics": "over latent, and over latent_flip where the sample may be flipped",
        "buckets": {context.bucket(shape, resolution): value for shape, value in shapes.items() if value["count"]},
        "widths": widths,
        "text_longest": max(max(row[2], row[3]) for row in rows),
        "duplicates": sum(count - 1 for count in Counter(row[1] for row in rows).values()),
        "config": {name: value for name, value in settings.items() if name != "out"},
    }


@contextlib.contextmanager
def _blaming(what: str, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WorkFailed(
            f"{where}: the {what} failed: {type(error).__name__}: {error}. Nothing of this shard was written; run the same "
            "command again to go on there, with a smaller config.batch_size if memory ran out."
        ) from error
