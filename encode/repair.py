"""Writing the damaged files of a data set anew: shards from the photographs, everything else from sound shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from encode import dataset_check, pipeline, prepare, records, shard_check, stats
from encode.expected import Data, Shard
from encode.shard_check import Found
from encode.whole_files import whole_file, write_json


class Changed(ValueError):
    """Photographs are no longer what was encoded, so a shard made from them would be another one."""


def encode_again(
    context: pipeline.Context,
    data: Data,
    shard: Shard,
    found: Found,
    shard_damaged: bool,
    part_damaged: bool,
    step: Callable[[int], None],
) -> list[str]:
    """Encode the pictures of one shard again and write what is damaged of it: the shard with its index, the part, or both.

    The statistics of other resolutions stay those of their own records, which are not written anew.

    Returns:
      names of the files written.

    Raises:
      Changed: a photograph or caption is not what was encoded; nothing was written.
    """
    part, _ = dataset_check.read_part(shard)
    part = None if part_damaged else part
    known = {row[0]: row[1] for row in part["records"]} if part else {}
    beside = {} if part else _beside(data, shard, found, shard_damaged)
    for other in beside.values():
        known |= dict(zip(other.ids, other.hashes()))
    sizes = [data.resolution] if part else list(context.config.resolutions)
    made = _encode(context, shard, sizes, step)
    fresh = made.part
    _refuse_changed(data, fresh, known, whole=part is not None)
    values = {size: stats.merge(made.sums[size]) for size in sizes if made.sums[size]}
    values |= {size: other.sums for size, other in beside.items() if other.sums}
    totals = {str(size): values[size].to_json() for size in context.config.resolutions if size in values}
    new = part | {"stats": part["stats"] | totals} if part else fresh | {"stats": totals}
    written = []
    if new != part:
        write_json(shard.part, new)
        written.append(data.name(shard.part))
    if shard_damaged:
        spec = data.spec(shard.bucket)
        records.write_shard(data.root, shard.bucket, shard.number, made.rows[data.resolution], spec)
        written.append(data.name(data.path(shard)))
    return written


def _beside(data: Data, shard: Shard, found: Found, shard_damaged: bool) -> dict[int, Found]:
    """The sound shards of the same job, by resolution; a part must say what they hold."""
    beside = {} if shard_damaged else {data.resolution: found}
    number = data.shards.index(shard)
    for size in data.config["resolutions"]:
        if size != data.resolution:
            other = data.at(size)
            place = other.shards[number]
            read = shard_check.look(
                other.path(place), other.latent(place.bucket), data.rules, lambda: False, lambda _: None
            )
            if not read.problems:
                beside[size] = read
    return beside


def _encode(
    context: pipeline.Context, shard: Shard, sizes: Sequence[int], step: Callable[[int], None]
) -> pipeline.Encoded:
    """A shard's pictures, encoded at some resolutions."""
    batch_size, made = context.config.batch_size, pipeline.Encoded.nothing(context.config.resolutions)
    tasks = (context.task(shard.job, entry) for entry in shard.job.entries)
    tasks = (replace(task, targets={s: t for s, t in task.targets.items() if s in sizes}) for task in tasks)
    read = context.workers.map(prepare.prepare, tasks, 2 * batch_size + 2 * context.workers.count)
    with contextlib.closing(read):
        for number, planned, batch in pipeline.batches(context, shard.job, read, made.part):
            pipeline.encode_batch(context, shard.job, number, batch, made)
            step(planned)
    return made


def _refuse_changed(data: Data, fresh: Mapping[str, Any], known: Mapping[str, str], whole: bool) -> None:
    """Compare pixels with those that were encoded; `whole`: all of them are known."""
    seen = {row[0]: row[1] for row in fresh["records"]}
    reasons = {row["file"]: row["reason"] for row in fresh["quarantine"]}
    changed = [name for name in known if seen.get(name) != known[name]]
    changed += [name for name in seen if whole and name not in known]
    if changed:
        reason = reasons.get(changed[0], "other pixels")
        raise Changed(
            f"{len(changed)} photographs are no longer what was encoded, the first: {changed[0]} ({reason}); put them back, or "
            "encode into a new folder"
        )


def write_index(data: Data, shard: Shard, found: Found) -> str:
    """The index of a sound shard; returns its name."""
    path = records.index_path(data.root, shard.bucket, shard.number)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, found.rows, allow_pickle=False)
    return data.name(path)


def write_dataset(data: Data, found: Mapping[Shard, Found]) -> str:
    """dataset.json of sound shards; returns its name."""
    path = data.root / "dataset.json"
    value = dict(data.base) | dict(data.own or {}) | dataset_check.wanted(data, found, {}, {})
    names = [name for name in dataset_check.ORDER if name in value]
    names += [name for name in value if name not in names]
    write_json(path, {name: value[name] for name in names})
    return data.name(path)
