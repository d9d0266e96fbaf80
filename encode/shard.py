"""One shard, the unit of work: decode, encode and write its records at every resolution.

Nothing of a shard is published before all of it is encoded. What a shard holds depends on the plan, the photographs and the
encoders alone, so it has the same bytes whichever process encodes it, in whatever order.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from encode import buckets, images, prepare, records, stats
from encode import plan as plan_rules
from encode.plan import Stopped, WorkFailed
from encode.progress import Progress, Speed, out_of_memory
from encode.records import InputError
from encode.source import Item, Problem
from encode.whole_files import write_json
from encode.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoders:
    """The three models; vision is None where every picture brings a precomputed vector."""

    vae: Any
    text: Any
    vision: Any | None

    def prove(self) -> None:
        """Each model on a GPU once more against the CPU: after a batch that it may have got wrong, before it is stored."""
        for model in (self.vae, self.text, self.vision):
            if hasattr(model, "prove"):  # the demo encoders have no device
                model.prove()


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
    fits: dict[str, int] = field(default_factory=dict)  # inputs that an encoder takes at a time, where memory was short

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

    def index(self, job: Job, resolution: int | None = None) -> Path:
        """The shard's index, whose presence says that it is written; by default at the largest resolution."""
        size = resolution or max(self.config.resolutions)
        return records.index_path(self.root(size), self.bucket(job.shape, size), job.number)

    def missing(self, job: Job) -> list[int]:
        """Resolutions at which the shard is not written yet."""
        return [size for size in self.config.resolutions if not self.index(job, size).exists()]


@dataclass
class Encoded:
    """What became of some pictures.

    Attributes:
      rows, sums: {resolution: records}, {resolution: sums of batches}.
      part: what the end of the run needs of them: those that were refused, those whose captions were cut, ids and hashes.
    """

    rows: dict[int, list[dict[str, Any]]]
    sums: dict[int, list[stats.Partial]]
    part: dict[str, Any]

    @classmethod
    def nothing(cls, resolutions: Sequence[int]) -> Encoded:
        rows, sums = ({size: [] for size in resolutions} for _ in range(2))
        return cls(rows, sums, {"quarantine": [], "truncated": [], "records": []})


def batches(
    context: Context, job: Job, read: Iterator, part: dict[str, Any]
) -> Iterator[tuple[int, int, list[tuple[Item, prepare.Prepared]]]]:
    """(number, pictures planned in it, those that can be encoded) of each batch; the others go to the part's quarantine.

    Batches are counted in planned pictures, not in good ones: a refused one moves no other.

    Args:
      read: (Task, Prepared or ImageProblem) of the shard's pictures, in order.

    Raises:
      Stopped: as asked.
    """
    size, batch = context.config.batch_size, []
    for place, (task, found) in enumerate(read, 1):
        if context.stop():
            raise Stopped
        if isinstance(found, images.ImageProblem):
            stage = "vision" if isinstance(found, prepare.VectorProblem) else "decode"
            part["quarantine"].append(asdict(Problem(task.id, stage, str(found))))
        else:
            batch.append((context.items[task.id], found))
        if place % size == 0 or place == len(job.entries):
            yield (place - 1) // size, (place - 1) % size + 1, batch
            batch = []


def encode_shard(context: Context, job: Job, read: Iterator, progress: Progress) -> None:
    """Encode and write one shard at every resolution; nothing is published before all of it is encoded.

    Args:
      context: what all shards share.
      job: the shard.
      read: (Task, Prepared or ImageProblem) of its pictures and of those after them, in order.
      progress: told of every batch.
    """
    config, missing, speed = context.config, context.missing(job), Speed()
    made = Encoded.nothing(config.resolutions)
    part = made.part
    for number, planned, batch in batches(context, job, speed.waiting(islice(read, len(job.entries))), part):
        encode_batch(context, job, number, batch, made)
        progress.step(planned, speed.waited, len(part["quarantine"]))
    with _blaming(
        "proof of the device",
        f"bucket {context.bucket(job.shape, max(config.resolutions))}, shard {job.number}, before it is written",
    ):
        context.encoders.prove()
    part["stats"] = {size: stats.merge(sums).to_json() for size, sums in made.sums.items() if sums}
    if len(missing) < len(config.resolutions) and not _is_as_written(context.part(job), part):
        missing = list(config.resolutions)  # pictures have changed since a stop between two of them
        for size in missing:
            context.index(job, size).unlink(missing_ok=True)
    write_json(context.part(job), part)
    for size in missing:
        name = context.bucket(job.shape, size)
        records.write_shard(context.root(size), name, job.number, made.rows[size], context.spec(job.shape, size))
    speed.write(context.out, len(job.entries))


def _is_as_written(path: Path, part: dict[str, Any]) -> bool:
    """Whether the file of a shard that has been written in part tells of the same pictures."""
    try:
        return records.read_json(path, "")["records"] == part["records"]
    except (OSError, InputError, KeyError):
        return False


def encode_batch(context: Context, job: Job, number: int, batch: Sequence, made: Encoded) -> None:
    """Add one batch, [(Item, Prepared)], to what was made of those before it."""
    if not batch:
        return
    config, encoders = context.config, context.encoders
    bucket = context.bucket(job.shape, max(config.resolutions))
    where = f"bucket {bucket}, shard {job.number}, batch {number} ({batch[0][0].id} to {batch[-1][0].id})"
    plain = [item.caption(config.seed) for item, _ in batch]
    flips = [item.mirror if config.flip else None for item, _ in batch]
    others = sorted({flip for flip, text in zip(flips, plain) if flip and flip != text})
    with _blaming("text encoder", where):
        tokens = [
            _bfloat16(value) for value in _in_halves(context, "text encoder", encoders.text.encode, [*plain, *others])
        ]
        made.part["truncated"] += [
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
        with _blaming(vae := f"VAE at {size}", where):
            latents = _bfloat16(_in_halves(context, vae, encoders.vae.encode, pixels))
            mirrored = latents
            if config.flip:
                mirrored = _bfloat16(_in_halves(context, vae, encoders.vae.encode, images.mirrored(pixels)))
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
            made.rows[size].append(record)
            made.sums[size] += stats.of_record(record)
    for place, (item, prepared) in enumerate(batch):
        lengths = len(tokens[place]), len(flip_tokens.get(flips[place], ()))
        made.part["records"].append([item.id, prepared.pixel_hash, *lengths, sorted(prepared.pixels)])


def _vectors(context: Context, batch: Sequence[prepare.Prepared]) -> tuple[np.ndarray, np.ndarray]:
    """[batch, width] float32 vision vectors of the pictures and of their mirror images."""
    if context.config.vision.precomputed:
        return tuple(np.stack([prepared.vectors[side] for prepared in batch]) for side in (0, 1))
    encode, whole = context.encoders.vision.encode_resized, [prepared.whole for prepared in batch]
    plain = _finite(_in_halves(context, "vision encoder", encode, whole))
    if not context.config.flip:
        return plain, plain
    return plain, _finite(_in_halves(context, "vision encoder", encode, [images.mirrored(pixels) for pixels in whole]))


def _in_halves(context: Context, what: str, encode: Callable, inputs: Any) -> list:
    """One result an input; a batch for which the memory does not suffice is taken in halves, and later ones as well."""
    most = context.fits.get(what, len(inputs))
    if len(inputs) > most:
        parts = [inputs[start : start + most] for start in range(0, len(inputs), most)]
        return [one for part in parts for one in _in_halves(context, what, encode, part)]
    try:
        return list(encode(inputs))
    except Exception as error:
        if len(inputs) == 1 or not out_of_memory(error):
            raise
    context.fits[what] = len(inputs) // 2
    log.warning("%s: out of memory with %d at a time; going on with %d.", what, len(inputs), len(inputs) // 2)
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _in_halves(context, what, encode, inputs)


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
            "command again to go on there."
        ) from error
