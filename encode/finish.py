"""The end of a run: quarantine.jsonl, unflipped.jsonl, the buckets' metadata, the page, and last dataset.json: it means done."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from encode import buckets, captions, records, report, stats
from encode.readback import ShardDamaged
from encode.records import InputError
from encode.source import Problem
from encode.whole_files import write_json, write_text

log = logging.getLogger(__name__)
EARLIER = "by the rules of when it was encoded"


def finish(context: Any, plan, jobs: Sequence[Any], parts: Sequence[Mapping], refused: Sequence[Problem]) -> None:
    """quarantine.jsonl, the buckets' TFDS metadata, the report, and dataset.json of each resolution, last."""
    config, out = context.config, context.out
    write_text(out / "quarantine.jsonl", _lines(refused))
    if not any(part["records"] for part in parts):
        raise InputError(f"{config.images}: every input was refused; {out / 'quarantine.jsonl'} says why.")
    datasets = {size: _dataset(context, plan, jobs, parts, size) for size in config.resolutions}
    for size in config.resolutions:
        for shape in sorted({job.shape for job in jobs}):
            records.finish_bucket(context.root(size), context.bucket(shape, size), context.spec(shape, size))
    names = [row[0] for part in parts for row in part["records"]]
    write_text(out / "unflipped.jsonl", _unflipped(context, plan, names))
    try:
        page = report.build(context, plan, jobs, parts, refused, datasets)
    except InputError:
        raise
    except ShardDamaged as error:
        log.warning(
            "The page cannot be drawn, as a shard is damaged (%s). The data set is complete: encode.doctor --repair mends the "
            "shard, and the next call draws the page.", error,
        )  # fmt: skip
        (out / "report.html").unlink(missing_ok=True)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # nothing encoded depends on the page
        log.exception("The page cannot be drawn; the data set is complete without it, and the next call tries again.")
        (out / "report.html").unlink(missing_ok=True)
    else:
        write_text(out / "report.html", page)
    for size in config.resolutions:
        write_json(context.root(size) / "dataset.json", datasets[size])


def is_finished(context: Any, jobs: Sequence[Any], refused: Sequence[Problem]) -> bool:
    """Whether an earlier run wrote all of it, for these shards and these refusals."""
    out, config = context.out, context.config
    try:
        counts = [json.loads((context.root(size) / "dataset.json").read_text("utf-8")) for size in config.resolutions]
        listed = (out / "quarantine.jsonl").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    shards = Counter(job.shape for job in jobs)
    known = all(
        info["buckets"].get(context.bucket(shape, size), {}).get("shards", count) == count
        for size, info in zip(config.resolutions, counts)
        for shape, count in shards.items()
    )
    return known and listed == _lines(refused) and (out / "report.html").exists()


def _lines(refused: Sequence[Problem]) -> str:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in refused)


def _unflipped(context: Any, plan: Mapping[str, Any], names: Sequence[str]) -> str:
    """A line for every encoded picture that is never mirrored in training: its caption, and why."""
    switched_off, lines = set(plan["unflipped"]), []
    for name in sorted(names):
        caption = plan["inputs"][name]
        if name in switched_off or not context.config.flip:
            reason = "switched off"
        elif plan["flips"].get(name, caption) is None:
            reason = captions.doubt(caption) if captions.swap(caption) is None else EARLIER
        else:
            continue
        lines.append(json.dumps({"file": name, "caption": caption, "reason": reason}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _dataset(context: Any, plan, jobs, parts, resolution: int) -> dict[str, Any]:
    """The content of dataset.json."""
    config, rows = context.config, [row for part in parts for row in part["records"] if resolution in row[4]]
    if not rows:
        raise InputError(
            f"{config.images}: every picture for resolution {resolution} was refused; {context.out / 'quarantine.jsonl'} says "
            "why. Encode into a new config.out without it."
        )
    sums = [part["stats"].get(str(resolution)) for part in parts]
    found = stats.merge([stats.Partial.from_json(value) for value in sums if value])
    mean, std, flat = stats.mean_and_std(found)
    if flat:
        log.warning("Latent channels %s never change; their deviation is set to %g.", flat, stats.FLOOR)
    shapes: dict[tuple, dict] = {}
    for job, part in zip(jobs, parts):
        width, height = buckets.pixels(job.shape, context.cells, resolution)
        latent = [height // 8, width // 8, context.encoders.vae.channels]
        bucket = shapes.setdefault(job.shape, {"count": 0, "shards": 0, "latent": latent})
        bucket["count"] += sum(resolution in row[4] for row in part["records"])
        bucket["shards"] += 1
    widths = {
        "latent": context.encoders.vae.channels,
        "text": context.encoders.text.width,
        "vision": context.vision_width,
    }
    settings = config.to_dict()
    for name in ("vae", "text", "vision"):  # the data set is sampled from another folder than it was made in
        settings[name]["path"] = settings[name]["path"] and os.path.abspath(os.path.expanduser(settings[name]["path"]))
    return {
        "schema": records.SCHEMA,
        "resolution": resolution,
        "count": len(rows),
        "fields": _fields(widths),
        "fingerprint": plan["fingerprint"]["encoders"] | plan["fingerprint"]["rules"],
        "encoders": {name: settings[name] for name in ("vae", "text", "vision")},
        "latent_mean": mean,
        "latent_std": std,
        "latent_count": found.count,
        "latent_statistics": "over latent, and over latent_flip where the sample may be flipped",
        "buckets": {context.bucket(shape, resolution): value for shape, value in shapes.items() if value["count"]},
        "widths": widths,
        **(
            {"mended_from": plan["mended_from"][str(resolution)]}
            if str(resolution) in plan.get("mended_from", {})
            else {}
        ),
        "text_longest": max(max(row[2], row[3]) for row in rows),
        "duplicates": sum(count - 1 for count in Counter(row[1] for row in rows).values()),
        "config": {
            name: value for name, value in settings.items() if name not in ("out", "engine", "ray", "accept_captions")
        },
    }


def _fields(widths: Mapping[str, int]) -> dict[str, Any]:
    """Shape and dtype of every field of a record."""
    fields: dict[str, Any] = {name: {"shape": [], "dtype": "str"} for name in records.STRINGS}
    for name in records.ARRAYS:
        kind = name.removesuffix("_flip")
        shape = {"latent": [None, None], "text": [None], "vision": [], "mask": [None, None]}[kind]
        dtype = {"latent": "bfloat16", "text": "bfloat16", "vision": "float32", "mask": "uint8"}[kind]
        fields[name] = {"shape": shape + ([widths[kind]] if kind in widths else []), "dtype": dtype}
    return fields
