"""plan -> encode shard k -> finish: from a folder of photographs to one data set a resolution.

A shard is the unit of work, of resume and of distribution. The plan (OUT/plan.json) fixes which picture goes into which
shard; a shard is finished when its index file stands at every resolution; everything known about a finished shard that the
end needs (sums for the statistics, pictures refused, lengths) lies beside the plan in OUT/parts. Killed anywhere and
started again, a run writes the bytes that an undisturbed one writes, and leaves finished shards alone. Pictures are read
ahead by worker processes through all shards that are left, so that the encoders do not wait.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from encode import buckets, captions, images, prepare, records, stats
from encode import plan as plan_rules
from encode.finish import finish
from encode.leg import DISK_FULL, Progress, Speed, disk_full, say_problems
from encode.plan import Stopped
from encode.records import InputError
from encode.source import Collection, Item, Problem, walk
from encode.workers import Workers

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
class Context:
    """What all shards of one run share."""

    config: Any
    folder: Path
    out: Path
    encoders: Encoders
    workers: Workers
    items: Mapping[str, Item]
    others: Mapping[str, int]
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

    def task(self, job: Job, entry: tuple[str, int, int]) -> prepare.Task:
        """What a worker has to know to read one picture."""
        item, config = self.items[entry[0]], self.config
        targets, pad = plan_rules.targets(config, self.cells, job.shape, entry[1:])
        precomputed = config.vision.precomputed
        return prepare.Task(
            item.id,
            item.path,
            entry[1:],
            targets,
            pad,
            config.max_pixels,
            whole=None if precomputed else self.encoders.vision.resizing,
            vectors=(item.vision, item.vision_flip) if precomputed else None,
            vector_width=self.vision_width,
        )

    def thumbnails(self, paths: Sequence[Path], side: int) -> list[bytes | None]:
        """Small JPEGs of the upright pictures, for a page; None for those that cannot be decoded."""
        work = [(path, self.config.max_pixels, side) for path in paths]
        found = (result for _, result in self.workers.map(prepare.thumbnail, work, 2 * self.workers.count))
        return [None if isinstance(result, images.ImageProblem) else result for result in found]

    @property
    def legs(self) -> list[dict[str, float]]:
        """How fast each shard went: pictures, seconds, and the seconds that the encoders waited for pictures."""
        return Speed.read(self.out)

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


def run(
    config: Any, encoders: Encoders, stop: Callable[[], bool] = lambda: False, only: frozenset | None = None
) -> Summary:
    """Encode config.images into config.out, going on where an earlier run stopped.

    Args:
      config: the configuration of configs/encode_*.py.
      encoders: the loaded models.
      stop: asked between batches; true ends the run with `Stopped`.
      only: ids of the pictures to take; None takes all. The same at every run into one config.out.

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
        with (
            records.only_one(out),
            Workers(config.decode_workers, config.decode_seconds, config.decode_memory) as workers,
        ):
            return _run(config, out, encoders, workers, stop, only)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise WorkFailed(disk_full(out)) from error


def begin(
    config: Any, encoders: Encoders, workers: Workers, stop, only=None, keep=True
) -> tuple[Context, dict, list[Job]]:
    """Scan the photographs and plan the work, or take up the plan that OUT holds; with `keep`, a new plan is stored."""
    folder, out = Path(config.images).expanduser(), Path(config.out).expanduser()
    collection = walk(folder, out)
    if only is not None:
        collection = Collection(tuple(item for item in collection.items if item.id in only), (), {})
    plan = _plan(config, folder, out, collection, encoders, workers, stop, keep)
    items = {item.id: item for item in collection.items}
    others, cells, width = plan["others"], plan["cells"], plan["vision_width"]
    context = Context(config, folder, out, encoders, workers, items, others, cells, width, stop)
    return (
        context,
        plan,
        [Job(tuple(job["bucket"]), job["shard"], tuple(map(tuple, job["items"]))) for job in plan["shards"]],
    )


def _run(config: Any, out: Path, encoders: Encoders, workers: Workers, stop, only) -> Summary:
    context, plan, jobs = begin(config, encoders, workers, stop, only)
    say_problems("before encoding", plan["quarantine"])
    largest, pictures = max(config.resolutions), Counter()
    for job in jobs:
        pictures[context.bucket(job.shape, largest)] += len(job.entries)
    listed = ", ".join(f"{name} ({count})" for name, count in pictures.items())
    log.info("%d buckets at %d, with their pictures: %s.", len(pictures), largest, listed)
    todo = [job for job in jobs if context.missing(job) or not context.part(job).exists()]
    progress = Progress("pictures", sum(len(job.entries) for job in jobs), sum(len(job.entries) for job in todo))
    tasks = (context.task(job, entry) for job in todo for entry in job.entries)
    read = workers.map(prepare.prepare, tasks, 2 * config.batch_size + 2 * workers.count)
    with contextlib.closing(read):
        for job in todo:
            _encode_shard(context, job, read, progress)
    parts = [json.loads(context.part(job).read_text(encoding="utf-8")) for job in jobs]
    broken = [row for part in parts for row in part["quarantine"]]
    say_problems("while encoding", broken)
    refused = [Problem(**row) for row in plan["quarantine"] + broken]
    finished = all((context.root(size) / "dataset.json").exists() for size in config.resolutions)
    if todo or not finished or not (out / "report.html").exists():
        finish(context, plan, jobs, parts, sorted(refused, key=lambda row: (row.file, row.stage, row.reason)))
    encoded = sum(len(part["records"]) for part in parts)
    roots = tuple(context.root(size) for size in config.resolutions)
    return Summary(encoded, len(refused), out / "report.html", roots, progress.rate())


def _plan(config, folder: Path, out: Path, collection: Collection, encoders, workers, stop, keep) -> dict[str, Any]:
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
    plan = {"schema": records.SCHEMA, "fingerprint": wanted} | plan_rules.make_plan(config, collection, workers, stop)
    plan["vision_width"] = plan["vision_width"] or encoders.vision.width
    plan["inputs"] = inputs
    if keep:
        (out / "parts").mkdir(exist_ok=True)
        records.write_json(path, plan)
    return plan


def _encode_shard(context: Context, job: Job, read: Iterator, progress: Progress) -> None:
    """Encode and write one shard at every resolution; nothing is published before all of it is encoded.

    Args:
      context: what all shards share.
      job: the shard.
      read: (Task, Prepared or ImageProblem) of its pictures and of those after them, in order.
      progress: told of every batch.
    """
    config, missing, speed = context.config, context.missing(job), Speed()
    part: dict[str, Any] = {"quarantine": [], "truncated": [], "records": [], "stats": {}}
    rows: dict[int, list] = {size: [] for size in config.resolutions}
    sums: dict[int, list[stats.Partial]] = {size: [] for size in config.resolutions}
    batch: list[tuple[Item, prepare.Prepared]] = []
    for place, (task, found) in enumerate(speed.waiting(islice(read, len(job.entries))), 1):
        if context.stop():
            raise Stopped
        if isinstance(found, images.ImageProblem):
            stage = "vision" if isinstance(found, prepare.VectorProblem) else "decode"
            part["quarantine"].append(asdict(Problem(task.id, stage, str(found))))
        else:
            batch.append((context.items[task.id], found))
        # Batches are counted in planned pictures, not in good ones: a refused one moves no other.
        if place % config.batch_size == 0 or place == len(job.entries):
            encode_batch(context, job, (place - 1) // config.batch_size, batch, rows, sums, part)
            batch = []
            progress.step((place - 1) % config.batch_size + 1)
    part["stats"] = {size: stats.merge(sums[size]).to_json() for size in config.resolutions if sums[size]}
    records.write_json(context.part(job), part)
    for size in missing:
        name = context.bucket(job.shape, size)
        records.write_shard(context.root(size), name, job.number, rows[size], context.spec(job.shape, size))
    speed.write(context.out, len(job.entries))


def encode_batch(context: Context, job: Job, number: int, batch, rows, sums, part) -> None:
    """Append the records of one batch, at each resolution, to rows; their sums to sums; what the end needs to part."""
    if not batch:
        return
    config, encoders = context.config, context.encoders
    bucket = context.bucket(job.shape, max(config.resolutions))
    where = f"bucket {bucket}, shard {job.number}, batch {number} ({batch[0][0].id} to {batch[-1][0].id})"
    plain = [item.caption(config.seed) for item, _ in batch]
    flips = [captions.swap(text) if config.flip and item.flip else None for text, (item, _) in zip(plain, batch)]
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
        here = [place for place, (_, prepared) in enumerate(batch) if size in prepared.pixels]
        if not here:
            continue
        pixels = np.stack([batch[place][1].pixels[size] for place in here])
        with _blaming(f"VAE at {size}", where):
            latents = _bfloat16(encoders.vae.encode(pixels))
            mirrored = _bfloat16(encoders.vae.encode(images.mirrored(pixels))) if config.flip else latents
        for place, latent, latent_flip in zip(here, latents, mirrored):
            (item, prepared), flip = batch[place], flips[place]
            record = {
                "id": item.id,
                "caption": plain[place],
                "caption_flip": flip or "",
                "latent": latent,
                "latent_flip": latent_flip,
                "text": tokens[place],
                "text_flip": flip_tokens.get(flip, tokens[place][:0]),
                "vision": vectors[place],
                "vision_flip": vectors_flip[place],
                "mask": prepared.masks[size],
                "pixel_hash": prepared.pixel_hash,
            }
            rows[size].append(record)
            mask = prepared.masks[size]
            sums[size].append(stats.partial(latent, mask))
            sums[size] += [stats.partial(latent_flip, mask[:, ::-1])] if flip else []
    for place, (item, prepared) in enumerate(batch):
        lengths = len(tokens[place]), len(flip_tokens.get(flips[place], ()))
        part["records"].append([item.id, prepared.pixel_hash, *lengths, sorted(prepared.pixels)])


def _vectors(context: Context, batch: Sequence[prepare.Prepared]) -> tuple[np.ndarray, np.ndarray]:
    """[batch, width] float32 vision vectors of the pictures and of their mirror images."""
    if context.config.vision.precomputed:
        return tuple(np.stack([prepared.vectors[side] for prepared in batch]) for side in (0, 1))
    encode, whole = context.encoders.vision.encode_resized, [prepared.whole for prepared in batch]
    plain = _finite(encode(whole))
    return plain, _finite(encode([images.mirrored(pixels) for pixels in whole])) if context.config.flip else plain


def _finite(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("the result is empty or not finite")
    return values


def _bfloat16(values: Any) -> np.ndarray:
    return _finite(values).astype(ml_dtypes.bfloat16)


@contextlib.contextmanager
def _blaming(what: str, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WorkFailed(
            f"{where}: the {what} failed: {type(error).__name__}: {error}. Nothing of this shard was written; run the same "
            "command again to go on there, with a smaller config.batch_size if memory ran out."
        ) from error
