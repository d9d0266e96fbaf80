"""The plan of an encode run: which picture goes into which bucket and shard, and what may not change afterwards.

Made once from headers and captions, stored in OUT/plan.json, and compared whenever a run goes on: another configuration,
other encoders or other photographs are refused by name instead of being mixed into what is there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encode import buckets, images, mirrored, prepare
from encode.progress import Progress
from encode.records import InputError, bucket_name
from encode.source import Collection, Item, Problem
from encode.workers import Workers

log = logging.getLogger(__name__)
HEADERS = 32  # headers that a worker reads at a time
Sizes = dict[str, tuple[int, int]]


class Stopped(Exception):
    """A stop was asked for; what is finished is on disk (exit code 3)."""


class WorkFailed(RuntimeError):
    """The work stopped at something that is not the input's fault; the message says where (exit code 1)."""


def make_plan(config: Any, collection: Collection, workers: Workers, stop: Callable[[], bool] = lambda: False) -> dict:
    """Sizes -> buckets -> shards; the same for the same photographs and configuration."""
    cells = buckets.cells_across(config.resolutions)
    sizes, width, unfit = _measure(config, collection.items, None, workers, stop)
    shapes = _shapes(config, cells, sizes)
    members, more = _assign(config, cells, shapes, sizes)
    shards = _shards(members, {}, config.shard_size)
    if not shards:
        refused = [*collection.problems, *unfit, *more]
        first = min(refused, key=lambda row: row.file)
        raise InputError(
            f"{config.images}: every input was refused ({len(refused)} of {len(refused)}), the first one {first.file}: "
            f"{first.reason}."
        )
    _refuse_empty_resolutions(config, cells, members)
    return {
        "cells": cells,
        "vision_width": width or 0,
        "shapes": [list(shape) for shape in shapes],
        "shards": shards,
        "unfit": [asdict(row) for row in unfit + more],
    } | _inputs(config, collection.items)


def grow(config: Any, plan: Mapping, new: Sequence[Item], workers: Workers, stop: Callable[[], bool]) -> dict:
    """What changes in a plan for photographs that came later: shards of their own in the buckets that there are."""
    cells, width = plan["cells"], plan["vision_width"] if config.vision.precomputed else None
    sizes, _, unfit = _measure(config, new, width, workers, stop)
    members, more = _assign(config, cells, [tuple(shape) for shape in plan["shapes"]], sizes)
    begun = Counter(tuple(shard["bucket"]) for shard in plan["shards"])
    shards = _shards(members, begun, config.shard_size)
    log.info("%d pictures are new: %d shards are added to the %d that there are.", len(new), len(shards), begun.total())
    inputs, names = _inputs(config, new), {item.id for item in new}
    return {
        # What is tried again has its place in the new shards alone.
        "shards": [shard | {"items": [e for e in shard["items"] if e[0] not in names]} for shard in plan["shards"]]
        + shards,
        "unfit": [row for row in plan["unfit"] if row["file"] not in names] + [asdict(row) for row in unfit + more],
        "inputs": plan["inputs"] | inputs["inputs"],
        "bytes": plan["bytes"] | inputs["bytes"],
        # What is tried again is tried once more only when it is another file than now.
        "again": plan.get("again", {}) | {item.id: _stamp(item) for item in new if item.id in plan["inputs"]},
        "unflipped": sorted({*plan["unflipped"]} - names | {*inputs["unflipped"]}),
        "flips": {name: flip for name, flip in plan["flips"].items() if name not in names} | inputs["flips"],
    }


def present(folder: Path, read: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """The same pictures; those of a folder that is gone, as when its disk was unplugged, are not refused for it.

    Raises:
      WorkFailed: a picture is refused, and nothing is left in the folder.
    """
    for what, found in read:
        if isinstance(found, images.ImageProblem) and (problem := _is_gone(folder)):
            raise WorkFailed(
                f"{folder} {problem}, so no picture of it can be read. No picture was refused for it; once it is back the "
                "same command goes on."
            )
        yield what, found


def _is_gone(folder: Path) -> str | None:
    gone = "is empty or gone (is its disk mounted?)"
    try:
        return None if next(os.scandir(folder), None) else gone
    except FileNotFoundError:
        return gone
    except OSError as error:
        return f"cannot be looked into any more ({error.strerror})"


def refusals(plan: Mapping, parts: Sequence[Mapping]) -> dict[str, tuple[str, int]]:
    """{id: (reason, time in nanoseconds)} of the pictures that were refused and never encoded; the last word on each.

    Args:
      plan, parts: as stored, each with "written", the time of its file.
    """
    encoded = {row[0] for part in parts for row in part["records"]}
    said = [(row, part["written"]) for part in parts for row in part["quarantine"]]
    said.sort(key=lambda one: one[1])
    said += [(row, plan["written"]) for row in plan["unfit"]]  # the word on what was tried again
    return {row["file"]: (row["reason"], when) for row, when in said if row["file"] not in encoded}


def retried(config: Any, plan: Mapping, parts: Sequence[Mapping], collection: Collection) -> set[str]:
    """Ids of refused pictures that are worth another try: the file has changed since, could not be read then, or took more
    than config.decode_seconds or decode_memory, which are larger today."""
    refused, again = refusals(plan, parts), set()
    for item in collection.items:
        reason, when = refused.get(item.id, (None, 0))
        if reason is None:
            continue
        limit = re.search(r"config\.(decode_seconds|decode_memory)=([\d.]+)", reason)
        if reason.startswith(images.ImageProblem.unread):
            new = _reads(item, config.vision.precomputed)
        elif limit and float(limit[2]) < config[limit[1]]:
            new = True
        else:
            stamp, before = _stamp(item), plan.get("again", {}).get(item.id)
            new = stamp != before if before else stamp[0] != plan["bytes"][item.id] or stamp[1] > when
        again |= {item.id} if new else set()
    return again


def _stamp(item: Item) -> list[int]:
    """The length of a picture's file, and when the newest of its files was written, or put in its place, in nanoseconds."""
    changed = 0
    for path in item.files:
        with contextlib.suppress(OSError):
            changed = max(changed, path.stat().st_mtime_ns, path.stat().st_ctime_ns)
    return [size_of(item.path), changed]


def _reads(item: Item, vectors: bool) -> bool:
    if vectors and item.vision is None:
        return False
    try:
        for path in item.files if vectors else [item.path]:
            with open(path, "rb") as file:
                while file.read(1 << 22):
                    pass
    except OSError:
        return False
    return True


def _shapes(config: Any, cells: int, sizes: Sizes) -> list[buckets.Shape]:
    """Named, or chosen for the pictures that are stretched: a panorama that is refused or padded costs no bucket."""
    if config.buckets:
        return buckets.forced(config.buckets, cells, max(config.resolutions))
    every = [width / height for width, height in sizes.values()]
    kept, shapes = every, []
    for _ in range(5):
        chosen = buckets.choose(kept, config.max_buckets, cells)
        if chosen == shapes:
            break
        shapes = chosen
        kept = [aspect for aspect in every if buckets.assign(aspect, shapes)[1] <= config.max_distortion] or every
    return shapes


def _inputs(config: Any, items: Sequence[Item]) -> dict:
    """What a plan keeps of its pictures, refused ones included: captions and lengths of the files by id, the ids that
    must not be mirrored, and mirrored captions."""
    texts = {item.id: item.caption(config.seed) for item in items}
    return {
        "inputs": texts,
        "flips": mirrored.decide(texts) if config.flip else {},
        "bytes": {item.id: size_of(item.path) for item in items},
        "unflipped": sorted(item.id for item in items if not item.flip),
    }


def size_of(path: Path) -> int:
    """Bytes of a file; -1 where it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _measure(
    config: Any, items: Sequence[Item], width: int | None, workers: Workers, stop: Callable[[], bool]
) -> tuple[Sizes, int | None, list[Problem]]:
    """Upright sizes by id, the width of precomputed vectors (`width`, or the first one's), and what cannot be used."""
    sizes, refused = {}, []
    read = _scan(items, config.max_pixels, workers, stop)
    for item, found in present(Path(config.images).expanduser(), read):
        problem = Problem(item.id, "decode", str(found)) if isinstance(found, images.ImageProblem) else None
        if problem is None and config.vision.precomputed:
            problem, width = _vector_width(item, width)
        if problem is None:
            sizes[item.id] = found
        else:
            refused.append(problem)
    return sizes, width, refused


def _shards(members: Mapping[buckets.Shape, Sequence], begun: Mapping[buckets.Shape, int], size: int) -> list[dict]:
    """Shards of at most `size` pictures, numbered in each bucket from `begun` on."""
    return [
        {
            "bucket": list(shape),
            "shard": begun.get(shape, 0) + start // size,
            "items": entries[start : start + size],
        }
        for shape, entries in members.items()
        for start in range(0, len(entries), size)
    ]


def _scan(items: Sequence[Item], max_pixels: int, workers: Workers, stop) -> Iterator[tuple[Item, Any]]:
    """Each item with its upright size, or the ImageProblem; a worker that dies of a header costs only that picture."""
    progress = Progress("pictures measured", len(items), len(items))
    chunks = [items[start : start + HEADERS] for start in range(0, len(items), HEADERS)]
    work = [(tuple(item.path for item in chunk), max_pixels) for chunk in chunks]
    for chunk, (asked, found) in zip(chunks, workers.map(prepare.sizes, work, 4 * workers.count)):
        if stop():
            raise Stopped
        if isinstance(found, images.ImageProblem):
            alone = workers.map(prepare.sizes, [((path,), max_pixels) for path in asked[0]], 2 * workers.count)
            found = [one if isinstance(one, images.ImageProblem) else one[0] for _, one in alone]
        yield from zip(chunk, found)
        progress.step(len(chunk))


def _vector_width(item: Item, width: int | None) -> tuple[Problem | None, int | None]:
    """What is wrong with a picture's precomputed vector, and the width that all must have: the first one's."""
    if item.vision is None:
        reason = "no precomputed vector NAME.dino.npy, but config.vision.precomputed is set"
        return Problem(item.id, "vision", reason), width
    if width is not None:
        return None, width
    try:
        return None, len(prepare.read_vector(item.vision))
    except images.ImageProblem as problem:
        return Problem(item.id, "vision", str(problem)), None


def _assign(
    config: Any, cells: int, shapes: Sequence[buckets.Shape], sizes: Sizes
) -> tuple[dict[buckets.Shape, list], list[Problem]]:
    """{bucket: [id, width, height] of its pictures, by id}, and the pictures that fit none."""
    members: dict[buckets.Shape, list] = {shape: [] for shape in shapes}
    refused, small = [], Counter()
    for name in sorted(sizes):
        width, height = sizes[name]
        shape, distortion = buckets.assign(width / height, shapes)
        if distortion > config.max_distortion and not config.pad:
            reason = f"aspect ratio {width}:{height} is {distortion:.2f} times off the nearest bucket"
            refused.append(Problem(name, "aspect ratio", f"{reason}, config.max_distortion is {config.max_distortion}"))
            continue
        wanted, _ = targets(config, cells, shape, (width, height))
        if wanted:
            members[shape].append([name, width, height])
            small.update(set(config.resolutions) - set(wanted))
        else:
            bucket = bucket_name(*buckets.pixels(shape, cells, min(config.resolutions)))
            reason = f"too small: {width} x {height} pixels for its bucket {bucket}"
            refused.append(Problem(name, "too small", f"{reason}, config.max_upscale is {config.max_upscale}"))
    for resolution, count in sorted(small.items()):
        log.info("%d pictures are too small for %d and are left out there.", count, resolution)
    return members, refused


def _refuse_empty_resolutions(config: Any, cells: int, members: Mapping[buckets.Shape, Sequence]) -> None:
    reached = set()
    for shape, entries in members.items():
        for _, width, height in entries:
            reached |= targets(config, cells, shape, (width, height))[0].keys()
    if unreached := sorted(set(config.resolutions) - reached):
        raise InputError(
            f"config.resolutions: no picture is large enough for {unreached[0]} (config.max_upscale is "
            f"{config.max_upscale}); leave it out, or allow more."
        )


def targets(config: Any, cells: int, shape: buckets.Shape, size: tuple[int, int]) -> tuple[dict[int, Any], bool]:
    """Where and how a picture of a bucket is written.

    Returns:
      {resolution: (width, height) of the bucket}, without those that would enlarge the picture beyond config.max_upscale;
      and whether it is padded instead of stretched.
    """
    pad = buckets.assign(size[0] / size[1], [shape])[1] > config.max_distortion
    found = {}
    for resolution in config.resolutions:
        bucket = buckets.pixels(shape, cells, resolution)
        scales = [side / own for side, own in zip(bucket, size)]
        if (min(scales) if pad else max(scales)) <= config.max_upscale:
            found[resolution] = bucket
    return found, pad


def added(
    folder: Path, out: Path, plan: Mapping, collection: Collection, refused: Container[str], again: set[str]
) -> list[Item]:
    """Pictures that the plan does not know yet, and those that are to be tried again.

    What left the folder, or is another file than the one that was planned, is named; its record stays. What was refused has
    none, and may change as it likes.

    Raises:
      InputError: the photographs of another folder.
    """
    stored = plan["inputs"]
    known = [item for item in collection.items if item.id in stored]
    planned = {entry[0] for shard in plan["shards"] for entry in shard["items"] if entry[0] not in refused}
    others = [item.id for item in known if item.id in planned and plan["bytes"][item.id] != size_of(item.path)]
    there = {item.id for item in collection.items}
    apart = planned and not planned & there and there - stored.keys()
    if apart and not any(os.path.lexists(folder / name) for name in planned):  # one without a caption is there as well
        raise InputError(
            f"{folder}: none of the {len(planned)} pictures that {out} was begun with is in it, but others are: the photographs "
            "of another folder? Give them a config.out of their own, or set config.images back; where they were moved or removed "
            "on purpose, leave one of them in its place. Nothing was changed."
        )
    notes = {
        "are no longer in the folder with a caption": sorted(planned - there),
        "are other files than those that were planned": others,
    }
    for what, names in notes.items():
        if names:
            words = "%d pictures of %s %s (the first: %s); what is encoded of them stays as it is."
            log.warning(words, len(names), out, what, names[0])
    if planned - there and there - stored.keys():
        log.warning("Pictures that were only renamed are in it twice from now on; a new config.out has them once.")
    return [item for item in collection.items if item.id not in stored or item.id in again]
