"""Captions that were mended after their pictures were encoded: the shards that hold them are encoded again, no others.

Nothing is begun before the photographs of these shards are known to be what was encoded. From then on they are wanted until
it is done: one that goes away in between is refused by name, as it would be at a first encoding.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from encode import buckets, mirrored, records
from encode import plan as plan_rules
from encode.records import InputError
from encode.source import Collection

log = logging.getLogger(__name__)
STATISTICS = ("latent_mean", "latent_std", "latent_count")


def changed(config: Any, plan: Mapping[str, Any], collection: Collection, refused: Container[str]) -> list[str]:
    """Ids of the pictures that have another caption, or flip, than the plan; what was refused may change as it likes."""
    stored, unflipped = plan["inputs"], set(plan["unflipped"])
    known = [item for item in collection.items if item.id in stored and item.id not in refused]
    return [i.id for i in known if (i.caption(config.seed), i.flip) != (stored[i.id], i.id not in unflipped)]


def accept(
    config: Any,
    out: Path,
    plan: Mapping[str, Any],
    collection: Collection,
    names: Sequence[str],
    refused: Container[str],
) -> tuple[dict[str, Any], list[Path]]:
    """What changes in a plan that takes these captions, and the index files of the shards that hold them.

    Which pictures are mirrored may change with a caption, and so the statistics of the latents: those of before are kept in
    "mended_from", by which a training that was begun with them knows the data set again.

    Args:
      config: config.accept_captions says whether they are wanted.
      out: config.out.
      plan: as it is stored.
      collection: the photographs.
      names: of `changed`.
      refused: ids that have no record.

    Raises:
      InputError: they are not wanted, or a picture of their shards is gone or another file: its record would be lost.
    """
    changing = set(names)
    shards = [shard for shard in plan["shards"] if not changing.isdisjoint(entry[0] for entry in shard["items"])]
    again = [entry[0] for shard in shards for entry in shard["items"] if entry[0] not in refused]
    what = f"{len(names)} pictures have another caption, or flip, than {out} was begun with (the first: {names[0]})"
    work = f"{len(shards)} of {len(plan['shards'])} shards, {len(again)} pictures"
    if not config.get("accept_captions", False):  # a configuration of before has none
        raise InputError(
            f"{what}. Put it back to go on, or encode theirs again with --config.accept_captions=True ({work}); nothing was "
            "changed."
        )
    folder = Path(config.images).expanduser()
    items = {item.id: item for item in collection.items}
    for name in again:
        vector = not config.vision.precomputed or (name in items and items[name].vision is not None)
        if plan_rules.size_of(folder / name) != plan["bytes"][name] or not vector:
            raise InputError(
                f"{what}, and {name} of the same shards is gone, or another file, or has lost its vector: put it back, or its "
                "record would be lost; nothing was changed."
            )
    log.warning("%s. They are taken: the shards that hold them (%s) are to be encoded again.", what, work)
    inputs = plan["inputs"] | {name: items[name].caption(config.seed) for name in names}
    still = {name for name in names if not items[name].flip}
    before, done = dict(plan.get("mended_from", {})), []
    for size in config.resolutions:
        path = out / str(size) / "dataset.json"
        if path.exists():
            info = records.read_json(path, "remove it and run again")
            now = {name: info[name] for name in STATISTICS}
            before[str(size)] = [one for one in before.get(str(size), []) if one != now] + [now]
    for shard in shards:
        shape, number = tuple(shard["bucket"]), shard["shard"]
        for size in config.resolutions:
            bucket = records.bucket_name(*buckets.pixels(shape, plan["cells"], size))
            done.append(records.index_path(out / str(size), bucket, number))
    flips = {name: flip for name, flip in plan["flips"].items() if name not in changing}
    if config.flip:
        flips |= mirrored.decide({name: inputs[name] for name in names})
    unflipped = sorted({*plan["unflipped"]} - changing | still)
    return {"mended_from": before, "inputs": inputs, "unflipped": unflipped, "flips": flips}, done
