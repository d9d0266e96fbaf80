"""Captions that were mended after their pictures were encoded: the shards that hold them are encoded again, no others.

Nothing of a shard is taken away before its photographs are known to be what was encoded; its old records stand until the
new ones take their place.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from encode import buckets, records
from encode import plan as plan_rules
from encode.records import InputError
from encode.source import Collection

log = logging.getLogger(__name__)


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
    """What changes in a plan that takes these captions, and the files that say that their shards are finished.

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
    if not config.accept_captions:
        raise InputError(
            f"{what}. Put it back to go on, or encode theirs again with --config.accept_captions=True ({work}); nothing was "
            "changed."
        )
    folder = Path(config.images).expanduser()
    for name in again:
        if plan_rules.size_of(folder / name) != plan["bytes"][name]:
            raise InputError(
                f"{what}, and {name} of the same shards is gone, or another file: put it back, or its record would be lost; "
                "nothing was changed."
            )
    log.warning("%s: they are taken, and encoded again with their shards (%s).", what, work)
    inputs = plan["inputs"] | {item.id: item.caption(config.seed) for item in collection.items if item.id in changing}
    still = {item.id for item in collection.items if item.id in changing and not item.flip}
    done = [out / str(size) / "dataset.json" for size in config.resolutions]
    for shard in shards:
        shape, number = tuple(shard["bucket"]), shard["shard"]
        for size in config.resolutions:
            bucket = records.bucket_name(*buckets.pixels(shape, plan["cells"], size))
            done.append(records.index_path(out / str(size), bucket, number))
    return {"inputs": inputs, "unflipped": sorted({*plan["unflipped"]} - changing | still)}, done
