"""What each picture's mirror image is called: decided once, when it is planned, and kept in plan.json.

The rules of captions.py get better with versions of this program; what is encoded, and what a stop or a damage leaves to encode,
stays what it was decided to be.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from encode import buckets, captions, records
from encode.progress import Progress
from encode.records import UNREADABLE, InputError

log = logging.getLogger(__name__)
FIELDS = ("id", "caption", "caption_flip")
MANY = 10_000  # captions: seconds, of which a line is said
Flips = dict[str, str | None]  # of the pictures whose mirror image is not called the same; None: never mirrored


def kept(plan: Mapping[str, Any]) -> bool:
    """Whether a plan holds the decisions; one that an older program has written since keeps some that are of the past."""
    return plan.get("schema") == records.PLAN and isinstance(plan.get("flips"), dict)


def decide(texts: Mapping[str, str]) -> Flips:
    """By today's rules; texts are captions by id."""
    if len(texts) >= MANY:
        log.info("Judging left and right in %d captions, which takes up to half a minute for 100,000.", len(texts))
    return {name: flip for name, text in texts.items() if (flip := captions.swap(text)) != text}


def taken_up(
    config: Any, out: Path, plan: Mapping[str, Any], parts: Sequence[Mapping], going_on: Callable[[], None]
) -> Flips:
    """The decisions of a plan of before they were kept: as the records say, by today's rules where nothing is encoded.

    Args:
      config: of the run.
      out: config.out.
      plan: as it is stored, with older rules, or new, in the place of one that was lost.
      parts: of finished shards.
      going_on: called between records; raises where a stop was asked for.

    Raises:
      InputError: a record that there must be cannot be read at any resolution.
    """
    if not config.flip:
        return {}
    places = _written(config, out, plan)
    inputs, found = plan["inputs"], _as_encoded(places, going_on)
    begun = {name for names, _ in places for name in names}
    unknown = (
        {row[0] for part in parts for row in part["records"]}
        & begun
        & inputs.keys() - found.keys() - {*plan["unflipped"]}
    )
    if unknown:
        raise InputError(
            f"{out} was begun when the rules for left and right in captions were older, and the records of {len(unknown)} "
            f"pictures, the first {min(unknown)}, which say how theirs were mirrored, cannot be read at any resolution. Check "
            "out the version of this program that it was begun with, and mend them there (encode.doctor --repair); nothing "
            "was changed."
        )
    for name in plan["unflipped"]:  # switched off by hand
        found.pop(name, None)
    told = {name: flip or None for name, (caption, flip) in found.items() if caption == inputs.get(name)}
    flips = {name: told[name] if name in told else captions.swap(text) for name, text in inputs.items()}
    return {name: flip for name, flip in flips.items() if flip != inputs[name]}


def _written(config: Any, out: Path, plan: Mapping[str, Any]) -> list[tuple[set[str], list[Path]]]:
    """(pictures, files) of the shards that an index calls finished; what has none is written anew, whatever it says."""
    places = []
    for shard in plan["shards"]:
        shape = tuple(shard["bucket"])
        named = [
            (size, records.bucket_name(*buckets.pixels(shape, plan["cells"], size))) for size in config.resolutions
        ]
        roots = [(out / str(size), name, shard["shard"]) for size, name in sorted(named)]
        if paths := [records.shard_path(*one) for one in roots if records.index_path(*one).exists()]:
            places.append(({entry[0] for entry in shard["items"]}, paths))
    return places


def _as_encoded(places: Sequence[tuple[set[str], list[Path]]], going_on) -> dict[str, tuple[str, str]]:
    """The caption and the mirrored one of every record that can be read, by id; "" where there is none."""
    count = sum(len(names) for names, _ in places)
    if count:
        log.info("Reading from %d records how their captions were mirrored.", count)
    progress, found = Progress("records read", count, count), {}
    for names, paths in places:
        here: dict[str, tuple[str, str]] = {}
        for path in paths:
            if not names <= here.keys():
                here |= _captions_in(path, going_on)
        found |= here
        progress.step(len(names))
    return found


def _captions_in(path: Path, going_on) -> dict[str, tuple[str, str]]:
    """Of the records of one shard, as far as they can be read."""
    found = {}
    try:
        reader = ArrayRecordReader(str(path))
        places = range(reader.num_records())
    except UNREADABLE:
        return {}
    for place in places:
        going_on()
        try:
            values = tf_example_pb2.Example.FromString(reader.read([place])[0]).features.feature
            fields = [(*values[name].bytes_list.value, b"")[0].decode("utf-8") for name in FIELDS]
        except Exception:  # damaged; protobuf's own DecodeError derives from Exception alone
            continue
        found[fields[0]] = fields[1], fields[2]
    with contextlib.suppress(*UNREADABLE):
        reader.close()
    return found
