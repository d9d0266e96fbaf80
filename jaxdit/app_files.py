"""What the page in the browser keeps on the disk: pictures that hold their settings, and the references that people bring."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import threading
from pathlib import Path
from urllib.parse import quote

from encode.records import InputError
from encode.whole_files import publish
from jaxdit import album

UPLOAD_BYTES, UPLOAD_PIXELS = 40 * 2**20, 100_000_000
UPLOAD_SECONDS, UPLOAD_MEMORY = 30.0, 4096  # what a decoder may take; MiB
SIDE = 512  # pixels of what is shown small


class Files:
    """A gallery: a folder of PNG files, with the pictures that people bring in its folder references."""

    def __init__(self, folder: Path):
        from encode import images

        self.folder = folder
        self._looking, self._workers = threading.Lock(), None
        self._known: dict[tuple[str, int], dict[str, str]] = {}
        self.look = functools.lru_cache(maxsize=256)(self._look_at)
        self._small = functools.lru_cache(maxsize=256)(lambda path, _: images.thumbnail_of(path, UPLOAD_PIXELS, SIDE))

    def take_in(self, name: str, data: bytes) -> str:
        """Keep a picture that somebody brings, under a name of its content.

        Args:
          name: what they call it; only its suffix counts.
          data: the file.

        Raises:
          InputError: too large, or not a picture that can be used; says why.
        """
        if len(data) > UPLOAD_BYTES:
            raise InputError(too_large(len(data)))
        suffix = Path(name).suffix.lower()
        suffix = suffix if suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) < 7 else ""
        kept = f"{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
        target = self.folder / "references" / kept
        if not target.exists():
            temporary = target.with_name(f".{threading.get_ident()}-{kept}")
            try:
                target.parent.mkdir(exist_ok=True)
                temporary.write_bytes(data)
                self._look(temporary)
                publish(temporary, target)
            except OSError as error:
                raise InputError(f"{target.parent}: {error.strerror or error}.") from error
            finally:
                temporary.unlink(missing_ok=True)
        return kept

    def reference(self, name: str) -> Path:
        """The file of a name that `take_in` gave; raises InputError where there is none."""
        path = self.folder / "references" / name
        if Path(name).name != name or name.startswith(".") or not path.is_file():
            raise InputError("a reference is no longer in the gallery; bring it again.")
        return path

    def reference_of(self, content: str) -> str | None:
        """The name of the reference with that hash."""
        known = (self.folder / "references").glob(f"{content}*") if re.fullmatch("[0-9a-f]{16}", content) else ()
        return next((path.name for path in known), None)

    def _look_at(self, name: str) -> bytes:
        """`look`: a small JPEG of a reference; raises InputError where there is none."""
        return self._look(self.reference(name))

    def _look(self, path: Path) -> bytes:
        """Decoded in a process of its own: foreign bytes may hang a decoder, kill its process or eat the memory."""
        from encode import images, workers

        with self._looking:  # one at a time
            if self._workers is None:
                self._workers = workers.Workers(1, UPLOAD_SECONDS, UPLOAD_MEMORY)
            small = functools.partial(images.thumbnail_of, max_pixels=UPLOAD_PIXELS, side=SIDE)
            ((_, found),) = self._workers.map(small, [path], 1)
        if isinstance(found, images.ImageProblem):
            raise InputError(f"this picture cannot be used: {str(found).replace('config.max_pixels', 'the limit')}.")
        return found

    def names(self, most: int) -> list[str]:
        """The gallery's newest pictures, the newest first; sheets and grids of jaxdit.sample are not among them."""
        found = []
        for path in self.folder.glob("*.png"):
            with contextlib.suppress(OSError):  # removed just now
                found.append((path.stat().st_mtime_ns, path.name))
        ordered = (name for _, name in sorted(found, reverse=True))
        return list(itertools.islice((name for name in ordered if _is_one_picture(self.settings(name))), most))

    def stamp(self) -> int:
        """A number that changes when pictures come or go."""
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:  # the folder was taken away
            return 0

    def path(self, name: str) -> Path | None:
        """The file of a picture of the gallery; None for any other name."""
        path = self.folder / name
        fine = Path(name).name == name and name.endswith(".png") and not name.startswith(".")
        return path if fine and os.path.isfile(path) else None  # Path.is_file raises for a name that no disk could hold

    def address(self, kind: str, name: str) -> str:
        """Of "picture" or "small", another one whenever the file is another one: browsers keep what they have seen."""
        try:
            version = (self.folder / name).stat().st_mtime_ns
        except OSError:  # removed just now
            version = 0
        return f"/{kind}/{quote(name)}?v={version}"

    def settings(self, name: str) -> dict[str, str]:
        """What made a picture, as its file says; {} where it says nothing."""
        path = self.path(name)
        if path is None:
            return {}
        key = name, path.stat().st_mtime_ns
        if key not in self._known:
            self._known[key] = album.read_settings(path) or {}
        return self._known[key]

    def small(self, name: str) -> bytes | None:
        """A small JPEG of a picture of the gallery; None where there is none."""
        path = self.path(name)
        try:
            return None if path is None else self._small(path, path.stat().st_mtime_ns)
        except (ValueError, OSError):  # not a picture after all
            return None

    def close(self) -> None:
        if self._workers is not None:
            self._workers.__exit__(None, None, None)


def _is_one_picture(settings: dict[str, str]) -> bool:
    return "seed" in settings and "," not in settings.get("guidance_text", "") + settings.get("guidance_vision", "")


def too_large(size: float) -> str:
    return f"the file has {size / 2**20:,.0f} MiB; at most {UPLOAD_BYTES / 2**20:.0f} MiB are taken."
