"""Walk a folder of captioned photographs: pictures with their captions on one side, problems by name on the other.

Reads names and captions only, never a pixel, and never writes. The result is sorted by id, so it is the same on every
machine and in every locale. Every file is accounted for: an item, its captions and vectors, a problem, or counted among
the others.
"""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encode.folder import METADATA, VECTORS, Found, Problem, look, suffix_of
from encode.records import InputError
from encode.sidecars import CAPTION_BYTES, Unusable, captions_of, may_flip, read_record, read_rows, read_text, shown

__all__ = ["METADATA", "Collection", "Item", "Problem", "walk"]

log = logging.getLogger(__name__)
KEYS, KEY = 8, 40  # keys of a JSON that are told, and letters of each
NO_CAPTION = "no caption: expected a row in metadata.jsonl, NAME.json or NAME.txt"
NO_PICTURE = "a caption without its picture: none of this name beside it"
_NOTES = (
    "license licence copying copyright notice changelog credits attribution authors notes todo index list files urls classes "
    "labels tags captions prompts description info about"
)
NOTES = frozenset(_NOTES.split())  # text files that are no captions although they lie beside some


@dataclass(frozen=True)
class Item:
    """One picture with its captions.

    Attributes:
      id: path relative to the image folder, with forward slashes.
      path: where to read it.
      captions: one or more, stripped, none empty.
      vision: file with a precomputed vision vector (.npy, or .json with the key dino), if there is one.
      vision_flip: the same of the mirrored picture.
      flip: whether it may be mirrored; "flip": false in its NAME.json or metadata row says no.
      mirror: what its mirror image is called, of a planned picture; None: it is never mirrored.
    """

    id: str
    path: Path
    captions: tuple[str, ...]
    vision: Path | None = None
    vision_flip: Path | None = None
    flip: bool = True
    mirror: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The picture and its vectors."""
        return tuple(path for path in (self.path, self.vision, self.vision_flip) if path is not None)

    def caption(self, seed: int) -> str:
        """The caption that this data set uses: one of several, chosen by (seed, id)."""
        digest = hashlib.sha256(f"{seed}:{self.id}".encode()).digest()
        return self.captions[int.from_bytes(digest[:8], "big") % len(self.captions)]


@dataclass(frozen=True)
class Collection:
    """What a folder holds: items sorted by id, problems sorted by file, and how many other files by suffix ("": none)."""

    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    others: Mapping[str, int] = field(default_factory=dict)


def must_exist(images: str | Path) -> Path:
    """The folder of photographs; InputError where it is none."""
    images = Path(images)
    if not images.is_dir():
        what = "is no folder" if images.exists() else "the folder does not exist"
        raise InputError(f"{images}: {what}; set config.images to the folder of your photographs.")
    return images


def walk(images: Path, out: Path | None = None) -> Collection:
    """Find every picture under a folder and its captions.

    Args:
      images: the folder.
      out: our own output folder; nothing in it is an input.

    Raises:
      InputError: no such folder, an empty one, pictures without any caption, or nothing usable.
    """
    images = must_exist(images)
    found = look(images, Path(out) if out else None)
    rows = _metadata(found)
    items, used = [], set()
    for number, file in enumerate(found.pictures):
        found.tell("of %d pictures have been looked up for captions", number, len(found.pictures))
        used.update(found.beside(file))
        try:
            items.append(_item(found, file, rows.get(file, [])))
        except Unusable as problem:
            found.refuse(file, "caption", str(problem))
    for file in found.refused:
        used.update(found.beside(file))
    _unused(found, used)
    if found.overruled:
        words = "%d pictures have another caption in NAME.txt than in their row of %s, which counts (the first: %s)."
        log.warning(words, len(found.overruled), METADATA, found.overruled[0])
    if not items:
        _explain_nothing(found)
    by_file = sorted(found.problems, key=lambda problem: (problem.file, problem.stage, problem.reason))
    return Collection(
        tuple(sorted(items, key=lambda item: item.id)), tuple(by_file), dict(sorted(found.others.items()))
    )


Row = tuple[str, int, Mapping[str, Any]]  # metadata file, line, row


def _metadata(found: Found) -> dict[str, list[Row]]:
    """{picture: its rows} of every metadata.jsonl; rows that name no picture are problems."""
    exact, forms = set(found.pictures), {}
    for file in found.pictures:
        forms.setdefault(unicodedata.normalize("NFC", file), []).append(file)
    rows: dict[str, list] = {}
    loose: dict[str, list] = {}
    for source in found.metadata:
        try:
            for number, row in read_rows(found.path(source)):
                found.tell("rows of captions read", number)
                line = f"{source}:{number}"
                if isinstance(row, str):
                    found.refuse(line, "caption", row)
                    continue
                try:
                    names = [_relative(found.images, source, spelling) for spelling in _spellings(row["file_name"])]
                except Unusable as problem:
                    found.refuse(line, "caption", str(problem))
                    continue
                name = next((name for name in names if name in exact), None)
                if name is not None:
                    rows.setdefault(name, []).append((source, number, row))
                matches = [match for name in names for match in forms.get(unicodedata.normalize("NFC", name), [])]
                for match in matches:
                    loose.setdefault(match, []).append((source, number, row))
                if not matches:
                    reason = f"names {shown(row['file_name'])[:200]}, which is not among the pictures"
                    found.refuse(line, "caption", reason)
        except Unusable as problem:
            found.refuse(source, "caption", str(problem))
    return loose | rows


def _spellings(name: str) -> list[str]:
    return [name, name.replace("\\", "/")] if "\\" in name else [name]


def _relative(images: Path, source: str, name: str) -> str:
    """A row's file_name as an id; it may not lead out of the image folder."""
    if name.startswith("/"):
        whole = os.path.normpath(name)
        roots = os.path.normpath(images.absolute()), os.path.realpath(images)  # as it is named, and what a link means
        relative = next((whole[len(root) + 1 :] for root in roots if whole.startswith(root + "/")), None)
    else:
        relative = None if "\0" in name else os.path.normpath(os.path.join(os.path.dirname(source), name))
    if relative is None or relative == ".." or relative.startswith("../"):
        raise Unusable(f"names {shown(name)[:200]}, which is not among the pictures: it lies outside the folder")
    return relative


def _item(found: Found, file: str, rows: list[Row]) -> Item:
    """The captions of a picture from its metadata rows, else NAME.json, else NAME.txt.

    Raises:
      Unusable: it has none.
    """
    stem = os.path.splitext(file)[0]
    json_file, text_file = found.find(stem, ".json"), found.find(stem, ".txt")
    said = [row for row in rows if "text" in row[2] or "caption" in row[2]]
    record: Mapping[str, Any] = {}
    if json_file is not None:
        try:
            record = read_record(found.path(json_file))
        except Unusable as problem:
            if (not said and text_file is None) or _names_flip(found.path(json_file)):
                raise Unusable(f"{json_file}: {problem}") from problem
    if said:
        captions = _from_rows(found, said)
        if text_file is not None and not _says_the_same(found.path(text_file), captions):
            found.overruled.append(file)
    elif "caption" in record or "text" in record:
        captions = _named(json_file, captions_of, record.get("caption", record.get("text")))
    elif text_file is not None:
        captions = _named(text_file, lambda path: captions_of(read_text(path, CAPTION_BYTES)), found.path(text_file))
    elif json_file is not None:
        there = ", ".join(repr(key)[:KEY] for key in list(record)[:KEYS]) or "nothing"
        there += f" and {len(record) - KEYS} more" if len(record) > KEYS else ""
        raise Unusable(f'{json_file}: no caption: neither the key "caption" nor "text" is in it, but {there}')
    else:
        raise Unusable(NO_CAPTION)
    flips = [
        _named(json_file, may_flip, record),
        *(_named(source, may_flip, row, number) for source, number, row in rows),
    ]
    vectors = [found.find(stem, suffix) for suffix in VECTORS]
    if vectors[0] is None and "dino" in record:
        vectors[0] = json_file
    vision, vision_flip = (None if name is None else found.path(name) for name in vectors)
    return Item(file, found.path(file), captions, vision, vision_flip, all(flips))


def _names_flip(path: Path) -> bool:
    """Whether a file that is no JSON has the word in it: to overlook that "flip": false would mirror the picture."""
    try:
        return b"flip" in path.read_bytes().replace(b"\0", b"")
    except OSError:
        return False


def _says_the_same(path: Path, captions: tuple[str, ...]) -> bool:
    try:
        return set(captions_of(read_text(path, CAPTION_BYTES))) <= set(captions)
    except Unusable:
        return True


def _named(origin: str | None, function: Any, value: Any, line: int = 0) -> Any:
    """function(value); its complaint names the file, and the line in it."""
    try:
        return function(value)
    except Unusable as problem:
        raise Unusable(f"{origin}: {problem}" + (f" (line {line})" if line else "")) from problem


def _from_rows(found: Found, said: list[Row]) -> tuple[str, ...]:
    """Several rows for one picture are several captions; a bad one costs only itself."""
    captions: list[str] = []
    bad: list[tuple[str, int, str]] = []
    for source, number, row in said:
        try:
            captions += captions_of(row.get("text", row.get("caption")))
        except Unusable as problem:
            bad.append((source, number, str(problem)))
    if not captions:
        source, number, reason = bad[0]
        raise Unusable(f"{source}: {reason} (line {number})")
    found.problems += [Problem(f"{source}:{number}", "caption", reason) for source, number, reason in bad]
    return tuple(dict.fromkeys(captions))


def _unused(found: Found, used: set[str]) -> None:
    """Caption files without a picture: a problem where captions of that kind lie beside pictures, else just other files."""
    places = {(os.path.dirname(file), suffix_of(file)) for file in used}
    for file in found.captions:
        if file in used:
            continue
        stem = os.path.splitext(os.path.basename(file))[0].casefold()
        suffix = suffix_of(file)
        caption = suffix in ("txt", "json") and (os.path.dirname(file), suffix) in places
        if caption and stem not in NOTES and not stem.startswith("readme"):
            found.refuse(file, "caption", NO_PICTURE)
        else:
            found.others[suffix] += 1


def _explain_nothing(found: Found) -> None:
    missing = [problem for problem in found.problems if problem.reason == NO_CAPTION]
    if found.pictures and len(missing) == len(found.pictures):
        for problem in found.problems:
            if problem.file.rpartition(":")[0] in found.metadata:
                raise InputError(
                    f"{found.images}: {len(missing)} pictures, and no row of a {METADATA} is of one of them; the first, "
                    f"{problem.file}, {problem.reason}. file_name is the path from the folder of its {METADATA}."
                )
        raise InputError(
            f"{found.images}: {len(missing)} pictures but no captions at all; put them into metadata.jsonl (file_name, text), "
            "NAME.json or NAME.txt beside each picture."
        )
    if found.problems:
        first, count = found.problems[0], len(found.problems)
        raise InputError(
            f"{found.images}: every input was refused ({count} of {count}), the first one {first.file}: {first.reason}."
        )
    if found.others:
        kinds = ", ".join(
            f"{count} .{suffix}" if suffix else f"{count} without suffix" for suffix, count in found.others.items()
        )
        raise InputError(
            f"{found.images}: none of its files is a picture ({kinds}); set config.images to another folder."
        )
    raise InputError(f"{found.images}: the folder is empty: it holds no picture; set config.images to another one.")
