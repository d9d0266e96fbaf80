"""Walk a folder of captioned photographs: pictures with their captions on one side, problems by name on the other.

Reads names and captions only, never a pixel, and never writes. The result is sorted by id, so it is the same on every
machine. A picture is known by its suffix or, failing that, by its first bytes; what the bytes really hold is decided
when it is decoded (images.py).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encode.records import InputError

PICTURES = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "gif",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "avif",
        "heic",
        "heif",
        "jp2",
        "j2k",
        "jpx",
        "jxl",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "mpo",
        "apng",
    ]
)
SIDECARS = frozenset(
    [
        "txt",
        "json",
        "jsonl",
        "npy",
        "npz",
        "csv",
        "tsv",
        "md",
        "html",
        "htm",
        "xml",
        "yaml",
        "yml",
        "log",
        "py",
        "db",
        "ini",
        "zip",
    ]
)
LITTER = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db"})
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*", b"BM")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Problem:
    """One input that is not encoded: its name, the stage that refused it ("caption", "decode", ...) and why."""

    file: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Item:
    """One picture with its captions.

    Attributes:
      id: path relative to the image folder, with forward slashes.
      path: where to read it.
      captions: one or more, stripped, none empty.
      vision: file with a precomputed vision vector (.npy, or .json with the key dino), if there is one.
      vision_flip: the same of the mirrored picture.
    """

    id: str
    path: Path
    captions: tuple[str, ...]
    vision: Path | None = None
    vision_flip: Path | None = None

    def caption(self, seed: int) -> str:
        """The caption that this data set uses: one of several, chosen by (seed, id)."""
        digest = hashlib.sha256(f"{seed}:{self.id}".encode()).digest()
        return self.captions[int.from_bytes(digest[:8], "big") % len(self.captions)]


@dataclass(frozen=True)
class Collection:
    """What a folder holds: items sorted by id, problems sorted by file."""

    items: tuple[Item, ...]
    problems: tuple[Problem, ...]


@dataclass
class _Folder:
    """The file names of one directory."""

    names: set[str] = field(default_factory=set)
    by_form: dict[str, str] = field(default_factory=dict)  # composed name -> name on disk

    def find(self, name: str) -> str | None:
        """The file of that name, whether it is written composed or decomposed."""
        return name if name in self.names else self.by_form.get(unicodedata.normalize("NFC", name))


def walk(images: Path, out: Path | None = None) -> Collection:
    """Find every picture under a folder and its captions.

    Args:
      images: the folder.
      out: our own output folder; nothing in it is an input.

    Raises:
      InputError: no such folder, an empty one, pictures without any caption, or nothing usable.
    """
    images = Path(images)
    if not images.is_dir():
        raise InputError(f"{images}: the folder does not exist; set config.images to the folder of your photographs.")
    files, problems = _list(images, Path(out).resolve() if out else None)
    pictures = [file for file in files if _is_picture(images / file)]
    if not pictures and not problems:
        raise InputError(f"{images}: the folder is empty: it holds no picture; set config.images to another one.")
    metadata, metadata_problems = _metadata(images, files, pictures)
    problems += metadata_problems
    items, missing = [], []
    folders = _folders(files)
    for file in pictures:
        found = _captions(images, file, folders[os.path.dirname(file)], metadata.get(file))
        if isinstance(found, Item):
            items.append(found)
        else:
            missing += [found] if found.reason == NO_CAPTION else []
            problems.append(found)
    if not items:
        _explain_nothing(images, pictures, missing, problems)
    by_file = sorted(problems, key=lambda problem: (problem.file, problem.stage, problem.reason))
    return Collection(tuple(sorted(items, key=lambda item: item.id)), tuple(by_file))


NO_CAPTION = "no caption: expected a row in metadata.jsonl, NAME.json or NAME.txt"


def _explain_nothing(images: Path, pictures: list[str], missing: list[Problem], problems: list[Problem]) -> None:
    if pictures and len(missing) == len(pictures):
        raise InputError(
            f"{images}: {len(pictures)} pictures but no captions at all; put them into metadata.jsonl (file_name, text), "
            "NAME.json or NAME.txt beside each picture."
        )
    first = problems[0]
    raise InputError(
        f"{images}: every input was refused ({len(problems)} of {len(problems)}), the first one {first.file}: "
        f"{first.reason}."
    )


def _list(root: Path, out: Path | None) -> tuple[list[str], list[Problem]]:
    """Relative paths of all files, sorted; linked folders are followed once."""
    files: list[str] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        folder = root / relative
        real = os.path.realpath(folder)
        if real in seen or (out is not None and Path(real) == out):
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            problems.append(Problem(relative or ".", "name", f"the folder cannot be read ({error.strerror})"))
            continue
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith(".") or entry.name.lower() in LITTER or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                pending.append(name)
            elif _id(name) is None:
                shown = os.fsencode(name).decode("utf-8", "backslashreplace")
                problems.append(Problem(shown, "name", "the file name is not UTF-8; rename it"))
            elif entry.is_file() or not os.path.exists(entry.path):  # a link to nothing is named later
                files.append(name)
    return sorted(files), problems


def _id(name: str) -> str | None:
    """The name as UTF-8 text whatever the machine's locale, or None."""
    try:
        return os.fsencode(name).decode("utf-8")
    except UnicodeError:
        return None


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lstrip(".").lower()


def _is_picture(path: Path) -> bool:
    suffix = _suffix(path.name)
    if suffix in PICTURES or suffix in SIDECARS:
        return suffix in PICTURES
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif"


def _folders(files: list[str]) -> dict[str, _Folder]:
    folders: dict[str, _Folder] = {}
    for file in files:
        folder, name = os.path.split(file)
        entry = folders.setdefault(folder, _Folder())
        entry.names.add(name)
        entry.by_form.setdefault(unicodedata.normalize("NFC", name), name)
    return folders


def _metadata(
    images: Path, files: list[str], pictures: list[str]
) -> tuple[dict[str, tuple[str, Mapping[str, Any]]], list[Problem]]:
    """Rows of every metadata.jsonl as {picture: (metadata file, row)}, and what was wrong with the rest."""
    exact = set(pictures)
    by_form: dict[str, list[str]] = {}
    for file in pictures:
        by_form.setdefault(unicodedata.normalize("NFC", file), []).append(file)
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
    loose: dict[str, tuple[str, Mapping[str, Any]]] = {}
    problems = []
    for source in (file for file in files if os.path.basename(file) == METADATA):
        text = read_text(images / source)
        if isinstance(text, Problem):
            problems.append(Problem(source, "caption", text.reason))
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            row = _json_object(line)
            if row is None or not isinstance(row.get("file_name"), str):
                problems.append(Problem(f"{source}:{number}", "caption", "not a JSON object with file_name and text"))
                continue
            name = os.path.normpath(os.path.join(os.path.dirname(source), row["file_name"]))
            matches = by_form.get(unicodedata.normalize("NFC", name), [])
            if name in exact:
                rows[name] = (source, row)
            for match in matches:
                loose.setdefault(match, (source, row))
            if not matches:
                reason = f"names {row['file_name']}, which is not among the pictures"
                problems.append(Problem(f"{source}:{number}", "caption", reason))
    return loose | rows, problems


def _json_object(text: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _captions(images: Path, file: str, folder: _Folder, row: tuple[str, Mapping[str, Any]] | None) -> Item | Problem:
    stem, here = os.path.splitext(os.path.basename(file))[0], os.path.dirname(file)

    def beside(suffix: str) -> str | None:
        name = folder.find(stem + suffix)
        return None if name is None else (f"{here}/{name}" if here else name)

    json_file, value, origin = beside(".json"), None, None
    record: Mapping[str, Any] | None = None
    if json_file is not None:
        text = read_text(images / json_file)
        record = None if isinstance(text, Problem) else _json_object(text)
        if record is None and row is None and beside(".txt") is None:
            reason = text.reason if isinstance(text, Problem) else "not a JSON object"
            return Problem(_id(file), "caption", f"{json_file}: {reason}")
    if row is not None:
        origin, value = row[0], row[1].get("text", row[1].get("caption"))
    elif record is not None and ("caption" in record or "text" in record):
        origin, value = json_file, record.get("caption", record.get("text"))
    elif (text_file := beside(".txt")) is not None:
        origin, value = text_file, read_text(images / text_file)
        if isinstance(value, Problem):
            return Problem(_id(file), "caption", f"{text_file}: {value.reason}")
    else:
        return Problem(_id(file), "caption", NO_CAPTION)
    captions = _clean(value)
    if isinstance(captions, str):
        return Problem(_id(file), "caption", f"{origin}: {captions}")
    vector = beside(".dino.npy") or (json_file if record is not None and "dino" in record else None)
    flipped = beside(".dino_flip.npy")
    return Item(
        id=_id(file),
        path=images / file,
        captions=captions,
        vision=None if vector is None else images / vector,
        vision_flip=None if flipped is None else images / flipped,
    )


def _clean(value: Any) -> tuple[str, ...] | str:
    """Stripped captions, or the reason why there is none."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        return "the caption is not text"
    try:
        stripped = tuple(text.strip() for text in values if text.encode("utf-8").strip())
    except UnicodeEncodeError:
        return "the caption holds half a character (a lone surrogate)"
    captions = tuple(text for text in stripped if text)
    return captions or "the caption is empty"


def read_text(path: Path) -> str | Problem:
    """A text file in UTF-8 with or without byte-order mark, or in UTF-16 with one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return Problem(path.name, "caption", f"cannot be read ({error.strerror})")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-16 (byte {error.start})" if utf16 else f"not UTF-8 (byte {error.start})"
        return Problem(path.name, "caption", reason)
    return text.replace("\r\n", "\n").replace("\r", "\n")
