"""Files that appear whole or not at all: after a crash, a kill, a full disk the name holds all its bytes, or what it held."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_writer = ""


def name_writer(name: str) -> None:
    """Where several machines write into one folder, each process has temporary files of its own name.

    Two that write the same shard (one was given up for lost, and is not) then publish the same bytes, one after the other.
    """
    global _writer
    _writer = f".{name}"


@contextlib.contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path to write to beside `path`, which gets that name when the block ends; after an exception nothing is left of it.

    Args:
      path: what is to be written; an OSError that names no file, or the temporary one, names this.
      shared: whether another process may be writing it at the same time: the last that ends has its way.
    """
    temporary = path.with_name(f".{path.name}{f'.{os.getpid()}' if shared else _writer}.tmp")
    try:
        yield temporary
        publish(temporary, path)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
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


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """A text file, in UTF-8; shared as in `whole_file`."""
    with whole_file(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """A JSON file for people to read as well."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
