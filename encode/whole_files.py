"""Files that appear whole or not at all: after a crash, a kill, a full disk the name holds all its bytes, or what it held."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_writer = ""


def name_writer(name: str) -> None:
    """Where several machines write into one folder, each process has temporary files of its own name.

    Two that write the same shard (one was given up for lost, and is not) then publish the same bytes, one after the other.
    """
    global _writer
    _writer = f".{name}"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to beside `path`, which gets that name when the block ends; after an exception nothing is left of it."""
    temporary = path.with_name(f".{path.name}{_writer}.tmp")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, when all of it is on the disk."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some network and user-space file systems answer
            raise
    finally:
        os.close(folder)


def sweep(folder: Path) -> None:
    """Remove temporary files of processes that ended; only for who holds the folder's lock."""
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """A JSON file for people to read as well."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
