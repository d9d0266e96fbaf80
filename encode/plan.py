"""The plan of an encode run: which picture goes into which bucket and shard, and what may not change afterwards.

Made once from headers and captions, stored in OUT/plan.json, and compared whenever a run goes on: another configuration,
other encoders or other photographs are refused by name instead of being mixed into what is there.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from encode import buckets, captions, images
from encode.records import InputError
from encode.source import Collection, Item, Problem

FREE = ("images", "out", "batch_size", "decode_threads", "vae.path", "text.path", "vision.path")  # may change on resume


class Stopped(Exception):
    """A stop was asked for; what is finished is on disk (exit code 3)."""


def make_plan(config: Any, collection: Collection, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Sizes -> buckets -> shards; the same for the same photographs and configuration."""
    cells = buckets.cells_across(config.resolutions)
    refused, sizes, width = list(collection.problems), {}, 0
    with ThreadPoolExecutor(config.decode_threads) as pool:
        for item, found in ahead(pool, lambda item: _size(item, config.max_pixels), collection.items, 64):
            if stop():
                raise Stopped
            if isinstance(found, Problem):
                refused.append(found)
            elif config.vision.precomputed and item.vision is None:
                refused.append(
                    Problem(
                        item.id, "vision", "no precomputed vector NAME.dino.npy, but config.vision.precomputed is set"
                    )
                )
            else:
                sizes[item.id] = found
                width = width or (len(read_vector(item.vision)) if config.vision.precomputed else 0)
    shapes = buckets.choose([columns / rows for columns, rows in sizes.values()], config.max_buckets, cells)
    members: dict[tuple[int, int], list] = {shape: [] for shape in shapes}
    for name in sorted(sizes):
        shape, distortion = buckets.assign(sizes[name][0] / sizes[name][1], shapes)
        if distortion > config.max_distortion:
            reason = f"aspect ratio {sizes[name][0]}:{sizes[name][1]} is {distortion:.2f} times off the nearest bucket"
            refused.append(Problem(name, "aspect ratio", f"{reason}, config.max_distortion is {config.max_distortion}"))
        else:
            members[shape].append([name, *sizes[name]])
    shards = [
        {
            "bucket": list(shape),
            "shard": start // config.shard_size,
            "items": entries[start : start + config.shard_size],
        }
        for shape, entries in members.items()
        for start in range(0, len(entries), config.shard_size)
    ]
    if not shards:
        first = min(refused, key=lambda row: row.file)
        raise InputError(
            f"{config.images}: every input was refused ({len(refused)} of {len(refused)}), the first one {first.file}: "
            f"{first.reason}."
        )
    return {"cells": cells, "vision_width": width, "shards": shards, "quarantine": [asdict(row) for row in refused]}


def _size(item: Item, max_pixels: int) -> tuple[int, int] | Problem:
    try:
        return images.size(item.path, max_pixels)
    except images.ImageProblem as problem:
        return Problem(item.id, "decode", str(problem))


def fingerprint(config: Any, encoders: Any) -> dict[str, Any]:
    """Everything that decides what the records hold."""
    vision = {"id": "precomputed"} if encoders.vision is None else encoders.vision.fingerprint
    return {
        "config": {name: value for name, value in _flat(config.to_dict()).items() if name not in FREE},
        "encoders": {"vae": encoders.vae.fingerprint, "text": encoders.text.fingerprint, "vision": vision},
        "rules": {"resize": images.RESIZE_RULE, "captions": f"left/right swap, version {captions.RULES}"},
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, Mapping) else {f"{prefix}{name}": inner}
    return flat


def refuse_difference(out: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    old, new = (_flat(side) for side in (stored, wanted))
    differing = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if differing:
        listed = "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in differing[:5])
        raise InputError(
            f"{out} was begun with another configuration: {listed}. Set it back, or choose a new config.out."
        )


def refuse_growth(folder: Path, out: Path, stored: Mapping[str, str], found: Mapping[str, str]) -> None:
    added, removed = sorted(found.keys() - stored.keys()), sorted(stored.keys() - found.keys())
    changed = sorted(name for name in found.keys() & stored.keys() if found[name] != stored[name])
    if added or removed or changed:
        first = (added or removed or changed)[0]
        raise InputError(
            f"{folder} is not what {out} was begun with: {len(added)} pictures with captions added, {len(removed)} removed, "
            f"{len(changed)} with another caption (the first: {first}). Put it back to go on, or encode all of it into a new "
            "config.out; nothing was changed."
        )


def read_vector(path: Path, width: int | None = None) -> np.ndarray:
    """[width] float32 from NAME.dino.npy, or from the key dino of NAME.json."""
    try:
        value = (
            json.loads(path.read_text("utf-8-sig"))["dino"]
            if path.suffix == ".json"
            else np.load(path, allow_pickle=False)
        )
        vector = np.asarray(value, np.float32)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path.name}: no vector can be read ({error})") from error
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise InputError(f"{path.name}: a vector of finite numbers is wanted, found shape {list(vector.shape)}")
    if width is not None and len(vector) != width:
        raise InputError(f"{path.name}: {len(vector)} numbers found, {width} in the first picture's vector")
    return vector


def ahead(pool: ThreadPoolExecutor, function: Callable, work: Sequence, depth: int) -> Iterator[tuple[Any, Any]]:
    """(input, function(input)) in order, computed up to `depth` inputs ahead."""
    pending: deque = deque()
    try:
        for value in work:
            pending.append((value, pool.submit(function, value)))
            if len(pending) >= depth:
                value, future = pending.popleft()
                yield value, future.result()
        while pending:
            value, future = pending.popleft()
            yield value, future.result()
    finally:
        for _, future in pending:
            future.cancel()
