"""What must be there of a data set OUT/RES, as OUT/plan.json and dataset.json say: shards, widths, and rules for records.

Written so that one wrong file does not condemn the others: what several files say is taken from most of them, and a
dataset.json that is lost is taken up from the other resolutions' ones.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from encode import buckets, captions, mirrored, records
from encode.pipeline import Job
from encode.records import InputError
from encode.shard_check import Rules


@dataclass(frozen=True)
class Shard:
    """A shard that there must be; its job is known where there is a plan."""

    bucket: str
    number: int
    job: Job | None = None
    part: Path | None = None


@dataclass(frozen=True)
class Data:
    """A data set OUT/RES as its plan and dataset.json promise it.

    Attributes:
      own: dataset.json; None where it is missing or cannot be read, `unread` then says why.
      config: of the run that made it, without config.out; from its own dataset.json, else from another resolution's.
      base: what a dataset.json that must be written anew is made from.
      widths: of latent, text and vision.
    """

    root: Path
    out: Path
    resolution: int
    plan: Mapping[str, Any] | None
    own: Mapping[str, Any] | None
    unread: str
    config: Mapping[str, Any]
    base: Mapping[str, Any]
    widths: Mapping[str, int]
    shards: tuple[Shard, ...]
    rules: Rules

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.out))

    def path(self, shard: Shard) -> Path:
        return records.shard_path(self.root, shard.bucket, shard.number)

    def latent(self, bucket: str) -> list[int]:
        width, height = map(int, bucket.split("x"))
        return [height // 8, width // 8, self.widths["latent"]]

    def spec(self, bucket: str):
        return records.features(self.latent(bucket), self.widths["text"], self.widths["vision"])

    def buckets(self) -> list[str]:
        return list(dict.fromkeys(shard.bucket for shard in self.shards))

    def at(self, resolution: int) -> Data:
        """The same data set at another resolution, as far as its shards are concerned."""
        changed = [replace(shard, bucket=_bucket(self.plan, shard.job, resolution)) for shard in self.shards]
        return replace(self, root=self.out / str(resolution), resolution=resolution, shards=tuple(changed))


def load(root: Path) -> Data:
    """What a data set says of itself.

    Raises:
      InputError: it says too little to be judged.
    """
    root = root.absolute()
    if (root / "checkpoints").is_dir() and (root / "config.json").exists():
        raise InputError(
            f"{root}: this is the working folder of a training, whose data.path names its data set; give that."
        )
    out, plan, own, unread = root.parent, None, None, ""
    if (out / "plan.json").exists():
        plan = read_json(out / "plan.json")
        if (
            not isinstance(plan, dict)
            or plan.get("schema") not in (records.SCHEMA, records.PLAN)
            or not plan.get("shards")
        ):
            raise InputError(f"{out / 'plan.json'}: not readable as a plan; nothing can be judged without it.")
    if (root / "dataset.json").exists():
        own = read_json(root / "dataset.json")
        own, unread = (own, "") if isinstance(own, dict) else (None, "it is not readable as JSON")
    else:
        unread = "it is missing, so this data set is not finished"
    others = [found for path in sorted(out.glob("*/dataset.json")) if isinstance(found := read_json(path), dict)]
    known = [found for found in [own, *others] if found] if plan else [own or {}]
    configs = [found["config"] for found in known if _usable(found.get("config"))]
    base = {name: value for found in reversed(known) for name, value in found.items()}
    if not configs:
        records.load_dataset(root)  # says what is wrong with it
        raise InputError(
            f"{root / 'dataset.json'} does not hold the configuration any more; run encode.main again with the same "
            "configuration to rewrite it."
        )
    config = json.loads(json.dumps(configs[0]))
    for name, value in plan["fingerprint"]["config"].items() if plan else ():
        *sections, last = name.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    said = (own or {}).get("resolution")
    resolution = int(root.name) if root.name.isdigit() and (plan or not isinstance(said, int)) else said
    if plan and resolution not in config["resolutions"]:
        raise InputError(f"{root}: {out / 'plan.json'} knows the resolutions {config['resolutions']} only.")
    shards = _shards(plan, resolution, max(config["resolutions"]) if plan else 0, out, own)
    widths = _widths(root, known, shards)
    if plan:
        widths["vision"] = plan["vision_width"]
    rules = _rules(plan, own, config, widths)
    return Data(root, out, resolution, plan, own, unread, config, base, widths, shards, rules)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _usable(config: Any) -> bool:
    sections = ("vae", "text", "vision")
    return (
        isinstance(config, dict) and all(isinstance(config.get(name), dict) for name in sections) and "images" in config
    )


def _bucket(plan: Mapping[str, Any], job: Job, resolution: int) -> str:
    return records.bucket_name(*buckets.pixels(job.shape, plan["cells"], resolution))


def _shards(plan, resolution: int, largest: int, out: Path, own) -> tuple[Shard, ...]:
    if not plan:
        try:
            return tuple(Shard(name, n) for name, info in own["buckets"].items() for n in range(info["shards"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{out}: dataset.json says nothing of its buckets, and there is no plan.json.") from error
    found = []
    for row in plan["shards"]:
        job = Job(tuple(row["bucket"]), row["shard"], tuple(map(tuple, row["items"])))
        part = out / "parts" / f"{_bucket(plan, job, largest)}-{job.number:05d}.json"
        found.append(Shard(_bucket(plan, job, resolution), job.number, job, part))
    return tuple(found)


def _widths(root: Path, datasets: Sequence[Mapping], shards: Sequence[Shard]) -> dict[str, int]:
    """Widths of the fields, as most of the files say: one wrong number must not condemn every record."""
    said: dict[str, Counter] = {name: Counter() for name in ("latent", "text", "vision")}
    for name, votes in said.items():
        for dataset in datasets:
            with contextlib.suppress(KeyError, TypeError):
                votes[dataset["widths"][name]] += 1
            with contextlib.suppress(KeyError, TypeError, IndexError):
                votes[dataset["fields"][name]["shape"][-1]] += 1
        for bucket in {shard.bucket for shard in shards}:
            with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
                features = read_json(records.bucket_folder(root, bucket) / "features.json")["featuresDict"]["features"]
                votes[json.loads(features[name]["jsonFeature"]["json"])["shape"][-1]] += 1
        if not votes:
            raise InputError(f"{root}: nothing says how wide a record's {name} is; encode the photographs again.")
    return {name: votes.most_common(1)[0][0] for name, votes in said.items()}


def _rules(plan, own, config: Mapping[str, Any], widths: Mapping[str, int]) -> Rules:
    fingerprint = plan["fingerprint"]["rules"] if plan else (own or {}).get("fingerprint", {})
    return Rules(
        widths["text"],
        widths["vision"],
        flip=config.get("flip", True),
        swap=str(fingerprint.get("captions", "")).endswith(f"version {captions.RULES}"),
        own_vectors=bool(config["vision"].get("precomputed")),
        inputs=plan["inputs"] if plan else None,
        unflipped=frozenset(plan["unflipped"]) if plan and "unflipped" in plan else None,
        flips=plan["flips"] if plan and mirrored.kept(plan) else None,
    )
