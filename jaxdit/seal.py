"""The SHA-256 of every file of a saved step, and when it was saved: checkpoints/N/seal.json.

Orbax reads most flipped bits without a word, and a run would train on with them. The folder's time, too, may be that of a copy.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Collection
from pathlib import Path

from encode.records import InputError, read_json
from encode.whole_files import write_json

NAME = "seal.json"
LANDED = "saved.json"  # of a working folder: the last step that was saved there
LATEST = 1e11  # seconds since 1970, in the year 5138: what says more is damaged


def finish(step: Path) -> None:
    """Say in saved.json that a step is whole, and seal it; what a disk refuses is told, as the step itself stands."""
    try:
        write_json(step.parents[1] / LANDED, {"step": int(step.name)})
        put(step)
    except OSError as error:
        logging.warning("%s has no %s, by which damage would be seen (%s).", step, NAME, error)


def landed(workdir: Path) -> int:
    """The last step that was saved in a working folder; 0 where nothing says so."""
    try:
        return int(read_json(workdir / LANDED, "")["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def put(step: Path) -> None:
    """Seal the folder of a complete step; a second or so for each 2 GB."""
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.name != NAME)
    digests = {path.relative_to(step).as_posix(): sha256(path) for path in files}
    write_json(step / NAME, {"saved": time.time(), "files": digests})


def verify(step: Path, items: Collection[str]) -> None:
    """Compare the files of some of a step's items with its seal; one without a seal is taken as it is.

    Raises:
      ValueError: names the first that is missing or differs.
    """
    files = _read(step).get("files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        if name.split("/")[0] in items:
            path = step / name
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if sha256(path) != digest:
                raise ValueError(f"{name} is not what was saved: its SHA-256 differs")


def saved_at(step: Path) -> float:
    """When a step was saved, in seconds since 1970: by its seal, else by its folder."""
    when = _read(step).get("saved")
    return when if isinstance(when, float) and 0 < when < LATEST else step.stat().st_mtime


def _read(step: Path) -> dict:
    try:
        return read_json(step / NAME, "")
    except (OSError, InputError):  # one that a bad sector took from a sound step must not spoil every later save
        return {}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
