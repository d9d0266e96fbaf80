"""A data set against itself: which of its files is wrong where records, indexes, parts, plan and dataset.json disagree.

The plan says which pictures belong into a shard, the part beside it what became of them at every resolution, the records are
what training reads, and everything else can be computed from those. So a shard is blamed where it contradicts the plan or
its part; an index, the metadata of TFDS and dataset.json where they contradict sound shards.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encode import records, stats
from encode.expected import Data, Shard, read_json
from encode.shard_check import Found

METADATA = ("features.json", "dataset_info.json")
# dataset.json's keys as encode writes them
ORDER = (
    "schema",
    "resolution",
    "count",
    "fields",
    "fingerprint",
    "encoders",
    "latent_mean",
    "latent_std",
    "latent_count",
)
ORDER += ("latent_statistics", "buckets", "widths", "mended_from", "text_longest", "duplicates", "config")


@dataclass(frozen=True)
class Damage:
    """One damaged file.

    Attributes:
      file: which, relative to OUT.
      what: is wrong with it.
      mend: "shard", "part", "index", "metadata", "dataset" or "remove": what repairs it; "" nothing does.
      shard: that it belongs to, or None.
      bucket: whose metadata it is.
    """

    file: str
    what: str
    mend: str
    shard: Shard | None = None
    bucket: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def read_part(shard: Shard) -> tuple[dict | None, str]:
    """The part of a shard's job, or None and what is wrong with it."""
    if shard.job is None:
        return None, ""
    if not shard.part.exists():
        return None, "it is missing"
    part = read_json(shard.part)
    try:
        rows, refused = part["records"], {row["file"] for row in part["quarantine"]}
        kept = [name for name, _, _ in shard.job.entries if name not in refused]
        if [row[0] for row in rows] != kept:
            return None, "it is not about the pictures that are planned for this shard"
        for _, pixel_hash, text, flip, sizes in rows:
            if not (re.fullmatch("[0-9a-f]{32}", pixel_hash) and text > 0 and flip >= 0 and sizes):
                return None, "a row of its records is not sound"
        if {str(size) for row in rows for size in row[4]} != set(part["stats"]) or not isinstance(
            part["truncated"], list
        ):
            return None, "it has not the statistics of the resolutions of its pictures"
        for value in part["stats"].values():
            stats.mean_and_std(stats.Partial.from_json(value))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None, "it is not readable"
    return part, ""


def rows_at(part: Mapping[str, Any], resolution: int) -> list[list]:
    return [row for row in part["records"] if resolution in row[4]]


def judge(data: Data, found: Mapping[Shard, Found]) -> list[Damage]:
    """Everything that is wrong, given what reading the shards has shown."""
    parts, damages, contradicting, bad = {}, [], [], {}
    for shard in data.shards:
        parts[shard], problem = read_part(shard)
        if problem:
            damages.append(Damage(data.name(shard.part), problem, "part", shard))
        if problems := found[shard].problems + _misplaced(shard, found[shard], parts[shard], data.resolution):
            bad[shard] = problems
        elif parts[shard] and _part_sums(parts[shard], data.resolution) != found[shard].sums:
            contradicting.append(shard)
    if data.plan is None:
        _blame_repeated(data, found, bad)
    # Sums that differ: the part is wrong if dataset.json agrees with all of the records, else the shard is.
    agrees = not bad and _agrees(data, _statistics([found[shard].sums for shard in data.shards]))
    for shard in contradicting:
        if agrees:
            damages.append(Damage(data.name(shard.part), "its statistics are not those of the records", "part", shard))
            parts[shard] = None
        else:
            bad[shard] = ["the sums of its latents are not those that its part keeps"]
    for shard, problems in bad.items():
        more = f"{len(problems)} things are wrong, the first: " if len(problems) > 1 else ""
        damages.append(Damage(data.name(data.path(shard)), more + problems[0], "shard", shard))
    damages += [
        Damage(data.name(records.index_path(data.root, shard.bucket, shard.number)), problem, "index", shard)
        for shard in data.shards
        if shard not in bad and (problem := _index_problem(data, shard, found[shard]))
    ]
    damages += strays(data)
    unsound = {damage.shard.bucket for damage in damages if damage.mend in ("shard", "index")}
    for bucket in data.buckets():
        damages += _metadata_problems(data, bucket, judged=bucket not in unsound)
    if data.unread:
        damages.append(Damage(data.name(data.root / "dataset.json"), data.unread, "dataset"))
    elif problem := _dataset_problem(data, wanted(data, found, parts, bad)):
        damages.append(Damage(data.name(data.root / "dataset.json"), problem, "dataset"))
    return damages


def _misplaced(shard: Shard, found: Found, part: Mapping | None, resolution: int) -> list[str]:
    """How the records that can be read differ from what the plan and the part say of them."""
    if shard.job is None:
        return []
    planned = [row[0] for row in rows_at(part, resolution)] if part else [entry[0] for entry in shard.job.entries]
    if part and not found.problems and len(found.ids) != len(planned):
        return [f"{len(found.ids)} records found, {len(planned)} are planned"]
    places = {name: place for place, name in enumerate(planned)}
    order = [places.get(name, -1) for name in found.ids]
    for name, place, before in zip(found.ids, order, [-1, *order]):
        if place <= before:
            return [f"{name} is not where the plan has it" if place >= 0 else f"{name} belongs into another shard"]
    known = {row[0]: row for row in part["records"]} if part else {}
    for name, pixel_hash, lengths in zip(found.ids, found.hashes(), found.lengths):
        if name in known and known[name][1] != pixel_hash:
            return [f"{name}: pixel_hash is {pixel_hash}, its part says {known[name][1]}"]
        if name in known and tuple(known[name][2:4]) != lengths:
            return [f"{name}: text and text_flip have {lengths} tokens, its part says {tuple(known[name][2:4])}"]
    return []


def _blame_repeated(data: Data, found: Mapping[Shard, Found], bad: dict[Shard, list[str]]) -> None:
    seen: set[str] = set()
    for shard in data.shards:
        for name in found[shard].ids:
            if name in seen:
                bad.setdefault(shard, []).append(f"{name} is in the data set twice")
            seen.add(name)


def _part_sums(part: Mapping[str, Any], resolution: int) -> stats.Partial | None:
    value = part["stats"].get(str(resolution))
    return stats.Partial.from_json(value) if value else None


def _index_problem(data: Data, shard: Shard, found: Found) -> str:
    try:
        rows = records.read_index(data.root, shard.bucket, shard.number)
    except records.DatasetError:
        exists = records.index_path(data.root, shard.bucket, shard.number).exists()
        return "it cannot be read" if exists else "it is missing"
    if len(rows) != len(found.rows):
        return f"it has {len(rows)} rows, the shard {len(found.rows)} records"
    differing = np.flatnonzero(rows != found.rows)
    return f"row {differing[0]} ({found.ids[differing[0]]}) is not what the record says" if len(differing) else ""


def strays(data: Data) -> list[Damage]:
    """Shards and indexes that nothing promises, and files that a crash left behind."""
    promised = {data.path(shard) for shard in data.shards}
    promised |= {records.index_path(data.root, shard.bucket, shard.number) for shard in data.shards}
    patterns = (f"*x*/{records.VERSION}/latents-{records.SPLIT}.array_record-*", "index-*.npy")
    odd = [path for pattern in patterns for path in sorted(data.root.glob(pattern)) if path not in promised]
    damages = [Damage(data.name(path), "neither the plan nor dataset.json knows it", "remove") for path in odd]
    folders = [data.root, *(records.bucket_folder(data.root, bucket) for bucket in data.buckets())]
    folders += [data.out, data.out / "parts"] if data.plan else []
    left = [path for folder in folders for path in sorted(folder.glob(".*.tmp"))]
    return damages + [Damage(data.name(path), "a file that an interrupted run left behind", "remove") for path in left]


def write_metadata(data: Data, bucket: str, root: Path) -> None:
    """features.json and dataset_info.json of a bucket below `root`: the data set's own, or another folder to compare."""
    if root != data.root:
        records.bucket_folder(root, bucket).mkdir(parents=True)
        for shard in (shard for shard in data.shards if shard.bucket == bucket):
            records.shard_path(root, bucket, shard.number).symlink_to(data.path(shard))
            index = records.index_path(data.root, bucket, shard.number)
            records.index_path(root, bucket, shard.number).symlink_to(index)
    records.finish_bucket(root, bucket, data.spec(bucket))


def _metadata_problems(data: Data, bucket: str, judged: bool) -> list[Damage]:
    folder, damages = records.bucket_folder(data.root, bucket), []
    with tempfile.TemporaryDirectory() as other:
        if judged:
            write_metadata(data, bucket, Path(other))
        for name in METADATA:
            value, problem = read_json(folder / name), ""
            if value is None:
                problem = "it cannot be read" if (folder / name).exists() else "it is missing"
            elif judged and value != read_json(records.bucket_folder(Path(other), bucket) / name):
                problem = "it does not describe the shards beside it"
            if problem:
                damages.append(Damage(data.name(folder / name), problem, "metadata", bucket=bucket))
    return damages


def wanted(data: Data, found: Mapping[Shard, Found], parts: Mapping[Shard, Any], bad) -> dict[str, Any]:
    """What dataset.json must say, as far as it can be told: of damaged shards, their parts tell it."""
    must = _constant(data)
    if any(parts[shard] is None for shard in bad):
        return must
    count, hashes, longest, sums, infos = 0, Counter(), 0, [], {}
    for shard in data.shards:
        if shard in bad:
            rows = rows_at(parts[shard], data.resolution)
            names, lengths = [row[1] for row in rows], [row[2:4] for row in rows]
            total = _part_sums(parts[shard], data.resolution)
        else:
            names, lengths, total = found[shard].hashes(), found[shard].lengths, found[shard].sums
        info = infos.setdefault(shard.bucket, {"count": 0, "shards": 0, "latent": data.latent(shard.bucket)})
        info["count"] += len(names)
        info["shards"] += 1
        count += len(names)
        hashes.update(names)
        longest = max([longest, *(max(pair) for pair in lengths)])
        sums.append(total)
    must |= {"count": count, "buckets": {name: info for name, info in infos.items() if info["count"]}}
    must |= {"text_longest": longest, "duplicates": count - len(hashes)}
    return must | _statistics(sums)


def _constant(data: Data) -> dict[str, Any]:
    fields: dict[str, Any] = {name: {"shape": [], "dtype": "str"} for name in records.STRINGS}
    for name in records.ARRAYS:
        kind = name.removesuffix("_flip")
        shape = {"latent": [None, None], "text": [None], "vision": [], "mask": [None, None]}[kind]
        dtype = {"vision": "float32", "mask": "uint8"}.get(kind, "bfloat16")
        fields[name] = {"shape": shape + ([data.widths[kind]] if kind in data.widths else []), "dtype": dtype}
    must = {"schema": records.SCHEMA, "resolution": data.resolution, "fields": fields, "widths": dict(data.widths)}
    if data.plan:
        must["fingerprint"] = data.plan["fingerprint"]["encoders"] | data.plan["fingerprint"]["rules"]
        must["encoders"] = {name: data.config[name] for name in ("vae", "text", "vision")}
        must["config"] = data.config
        if str(data.resolution) in data.plan.get("mended_from", {}):
            must["mended_from"] = data.plan["mended_from"][str(data.resolution)]
    return must


def _statistics(sums: Sequence[stats.Partial | None]) -> dict[str, Any]:
    total = stats.merge([one for one in sums if one])
    mean, std, _ = stats.mean_and_std(total)
    return {"latent_mean": mean, "latent_std": std, "latent_count": total.count}


def _agrees(data: Data, must: Mapping[str, Any]) -> bool:
    return data.own is not None and all(data.own.get(name) == value for name, value in must.items())


def _dataset_problem(data: Data, must: Mapping[str, Any]) -> str:
    missing = sorted(set(data.base) - set(data.own))
    wrong = [name for name in must if data.own.get(name) != must[name]]
    if wrong:
        was, should = (json.dumps(side.get(wrong[0]), ensure_ascii=False)[:120] for side in (data.own, must))
        return f"{', '.join(wrong)} wrong: {wrong[0]} is {was}, and should be {should}"
    return f"{', '.join(missing)} missing" if missing else ""
