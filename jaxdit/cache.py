"""What went through an encoder, kept on the disk, so that the next call loads none: ~/.cache/jaxdit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from encode import commandline

ROOM = 2 * 10**9  # bytes: a thousand of the longest sentences of T5-Large
DAY = 86_400.0  # seconds after which a file that was never finished is nobody's


class Cache:
    """Encoded arrays on disk, a file a content; one that cannot be read is made again, one that cannot be written is not.

    Files appear whole and are removed whole, so that any number of processes may use one folder.

    Args:
      folder: made where it is missing; None keeps nothing.
      room: bytes that it may take; beyond, what was not used for longest goes first.
    """

    def __init__(self, folder: Path | None, room: int = ROOM):
        self.folder, self.room, self._silent = folder, room, folder is None
        self._taken: int | None = None  # bytes, as far as this process knows

    def key(self, *parts: Any) -> str:
        """The name of what is a function of `parts` (JSON-able)."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get(self, key: str, *names: str) -> dict[str, np.ndarray] | None:
        """The arrays of these names that were kept, or None where one is not there or cannot be read."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = {name: stored[name] for name in names}
            with contextlib.suppress(OSError):  # of somebody else, or just removed: it is read all the same
                os.utime(path)
            return found
        except Exception:  # a flipped bit may be an unknown compression, a password, a name that is not there
            return None

    def put(self, key: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Keep the arrays, and give them back."""
        if self.folder is not None:
            try:
                self._write(self.folder / f"{key}.npz", arrays)
            except OSError as error:
                if not self._silent:
                    logging.warning(
                        "%s: encoded sentences and pictures are not kept (%s).", self.folder, error.strerror
                    )
                self._silent = True
        return arrays

    def _write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, **arrays)
                file.flush()
                size = file.tell()
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
        self._taken = self._taken + size if self._taken is not None else self._files()[0]
        if self._taken > self.room:
            self._make_room()

    def _files(self) -> tuple[int, list[tuple[float, int, Path]]]:
        """(bytes of all, [(last use, bytes, path)])."""
        found = []
        for path in [*self.folder.glob("*.npz"), *self.folder.glob("*.tmp")]:
            with contextlib.suppress(OSError):  # another process was here first
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sum(size for _, size, _ in found), found

    def _make_room(self) -> None:
        """Remove what was not used for longest until a tenth of the room is free, so that this is seldom done."""
        taken, files = self._files()
        for used, size, path in sorted(files):
            in_hand = path.suffix == ".tmp" and time.time() - used < DAY
            if taken > 0.9 * self.room and not in_hand:
                path.unlink(missing_ok=True)
                taken -= size
        self._taken = taken


def cache_folder(asked: str | None) -> Path | None:
    """Where conditions are kept: what --cache says ("" is nowhere), else $XDG_CACHE_HOME/jaxdit or ~/.cache/jaxdit."""
    if asked is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdit"
    return commandline.path_of(asked) if asked else None
