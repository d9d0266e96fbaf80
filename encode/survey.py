"""Reading a finished data set for a choice among its images: every record once, only small descriptions kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encode import records, selection, stats
from encode.plan import Stopped
from encode.progress import Progress

TOGETHER = 16  # records in memory at a time


@dataclass(frozen=True)
class Image:
    """A chosen image: its place in the data set, and of its record what is told about it."""

    bucket: str
    row: int
    id: str
    caption: str
    pixel_hash: str
    padded: bool


def describe_all(root: Path, dataset: Mapping[str, Any], stop: Callable[[], bool]):
    """Look at every record once.

    Returns:
      selection.Candidates, and the place (bucket, row) of each.
    """
    std = np.maximum(np.asarray(dataset["latent_std"], np.float32), stats.FLOOR)
    width, count = len(std), dataset["count"]
    lights = np.zeros((count, width), np.float32)
    compositions = np.zeros((count, selection.GRID**2 * width), np.float16)  # 0.2 GB for 100,000 images
    ids, hashes, words, sides, places = [], [], [], [], []
    progress = Progress("images looked at", count, count)
    for bucket in sorted(dataset["buckets"]):
        for row, record in enumerate(every(root, dataset, bucket, stop)):
            place = len(ids)
            lights[place], compositions[place] = selection.describe(record["latent"], record["mask"], std)
            caption = record["caption"].decode()
            ids.append(record["id"].decode())
            hashes.append(record["pixel_hash"])
            words.append(hashlib.sha256(" ".join(caption.casefold().split()).encode()).digest()[:16])
            sides.append(selection.side(caption, record["caption_flip"].decode()))
            places.append((bucket, row))
            progress.step(1)
    return selection.Candidates(ids, hashes, words, sides, lights, compositions), places


def every(root: Path, dataset: Mapping[str, Any], bucket: str, stop: Callable[[], bool]) -> Iterator[Mapping[str, Any]]:
    """Every record of a bucket, a few at a time."""
    records.read_bucket_index(root, dataset, bucket)  # as many as dataset.json says, or refused
    source, first = records.open_bucket(root, bucket), 0
    for shard in range(dataset["buckets"][bucket]["shards"]):
        end = first + len(records.read_index(root, bucket, shard))
        while first < end:
            if stop():
                raise Stopped
            rows = list(range(first, min(first + TOGETHER, end)))
            try:
                found = source.__getitems__(rows)
            except Exception as error:
                path = records.shard_path(root, bucket, shard)
                raise records.DatasetError(f"{path}: a record cannot be read ({error}); encode it again.") from error
            yield from found
            first += len(rows)


def read(root: Path, places: Iterable[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The records at some places (bucket, row), one at a time, as `records.write_shard` takes them."""
    opened: dict[str, Any] = {}
    for bucket, row in places:
        if bucket not in opened:
            opened[bucket] = records.open_bucket(root, bucket)
        record = opened[bucket][row]
        yield record | {name: record[name].decode() for name in records.STRINGS}


def images(root: Path, places: Sequence[tuple[str, int]]) -> list[Image]:
    """What is told about the images at some places."""
    found = []
    for (bucket, row), record in zip(places, read(root, places)):
        padded = bool(record["mask"].size and not record["mask"].all())
        found.append(Image(bucket, row, record["id"], record["caption"], record["pixel_hash"], padded))
    return found
