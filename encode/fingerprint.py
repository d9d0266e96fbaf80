"""Everything that decides what the records of a data set hold, stored in its plan and compared whenever a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encode import captions, images, mirrored
from encode.records import PRECOMPUTED, InputError

# May change while a run goes on: they decide how fast it is, and which files fail, but not what a record holds.
FREE = ("images", "out", "batch_size", "vae.path", "text.path", "vision.path")
FREE += (
    "decode_workers",
    "decode_seconds",
    "decode_memory",
    "device",
    "engine",
    "accept_captions",
    "ray.actors",
    "ray.gpus",
    "ray.cpus",
)
SWAP = "left/right swap, version"


def of(config: Any, encoders: Any) -> dict[str, Any]:
    """That of a run with these encoders."""
    vision = PRECOMPUTED if encoders.vision is None else encoders.vision.fingerprint
    return {
        "config": {name: value for name, value in _flat(config.to_dict()).items() if name not in FREE},
        "encoders": {"vae": encoders.vae.fingerprint, "text": encoders.text.fingerprint, "vision": vision},
        "rules": rules(),
    }


def rules() -> dict[str, str]:
    """Of this program: how pictures are resized and captions are mirrored."""
    return {"resize": images.RESIZE_RULE, "captions": f"{SWAP} {captions.RULES}"}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, Mapping) else {f"{prefix}{name}": inner}
    return flat


def refuse_difference(out: Path, plan: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """InputError where records of two kinds would lie beside each other.

    Other rules for captions are no other kind where the plan holds what was decided by them, or its records do, being older.
    """
    stored = plan["fingerprint"]
    if mirrored.kept(plan) or 0 < _swap_version(stored) < _swap_version(wanted):
        stored = stored | {"rules": stored["rules"] | {"captions": wanted["rules"]["captions"]}}
    if listed := differences(stored, wanted):
        if stored.get("rules") != wanted.get("rules") and not differences(
            stored | {"rules": {}}, wanted | {"rules": {}}
        ):
            raise InputError(
                f"{out} was begun by another version of this program, whose records are not of one kind with today's: {listed}. "
                "What is encoded stays; to go on with it or add to it, check out that version, or choose a new config.out."
            )
        raise InputError(
            f"{out} was begun with another configuration: {listed}. Set it back, or choose a new folder "
            "(config.out, the quickstart's --out)."
        )


def _swap_version(stored: Mapping[str, Any]) -> int:
    """Of the rules for captions; 0 where it cannot be told."""
    name, _, version = str(stored.get("rules", {}).get("captions", "")).rpartition(" ")
    return int(version) if name == SWAP and version.isdecimal() else 0


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where two fingerprints differ, the first five fields; empty if they are the same."""
    old, new = (_flat(side) for side in (stored, wanted))
    differing = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in differing[:5])
