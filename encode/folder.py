"""The files of a folder by kind: pictures, what lies beside them, formats that are not read, anything else.

What is a picture is decided by formats.py: by its suffix or, failing that, by its first bytes. Litter (.DS_Store, Thumbs.db,
@eaDir) and our own outputs, also those of earlier runs, are no inputs and are not counted.
"""

from __future__ import annotations

import logging
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from encode import formats

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
VECTORS = (".dino.npy", ".dino_flip.npy")
BESIDE = frozenset({"txt", "json", "jsonl", "npy"})  # never pictures
LITTER = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db", "ehthumbs_vista.db", "icon\r", "picasa.ini"})
# Of systems and of NAS.
_LITTER = "__macosx @eadir #recycle #snapshot @recycle @recently-snapshot $recycle.bin lost+found"
LITTER_FOLDERS = frozenset([*_LITTER.split(), "system volume information"])
OURS = ({"plan.json", "parts"}, {"quarantine.jsonl", "report.html"}, {"config.json", "checkpoints"})
KNOWN = BESIDE | formats.PICTURES | formats.REFUSED.keys()
BACKUP = re.compile(r"(~|_original|\.(bak|backup|old|orig|tmp|thm))$", re.IGNORECASE)
VIDEOS = frozenset({"mp4", "mov", "m4v", "avi", "3gp"})  # a phone's live photograph is a picture and a film of one name
SAY_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Problem:
    """One input that is not encoded: its name, the stage that refused it ("caption", "decode", ...) and why."""

    file: str
    stage: str
    reason: str


class Found:
    """What the walk has seen so far. Files are known by id; their names on disk differ from it where the locale is not UTF-8."""

    def __init__(self, images: Path):
        self.images = images
        self.names: dict[str, str] = {}  # id -> name on disk
        self.pictures: list[str] = []
        self.refused: list[str] = []  # in a format that is not read
        self.captions: list[str] = []  # .txt, .json, vectors
        self.forms: dict[str, str] = {}  # the same, composed and with the suffix in small letters -> id
        self.metadata: list[str] = []
        self.others: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.overruled: list[str] = []  # pictures whose NAME.txt says something else than their rows
        self.said = time.monotonic()

    def path(self, file: str) -> Path:
        return self.images / self.names[file]

    def refuse(self, file: str, stage: str, reason: str) -> None:
        self.problems.append(Problem(file, stage, reason))

    def find(self, stem: str, suffix: str) -> str | None:
        """The file of that name, whether it is written composed or decomposed, .txt or .TXT."""
        name = stem + suffix
        return name if name in self.names else self.forms.get(_form(name))

    def beside(self, picture: str) -> Iterator[str]:
        """The caption files and vectors that belong to a picture."""
        stem = os.path.splitext(picture)[0]
        return (name for suffix in (".txt", ".json", *VECTORS) if (name := self.find(stem, suffix)) is not None)

    def tell(self, what: str, *numbers: int) -> None:
        """A line at most every ten seconds."""
        if numbers[0] % 256 == 0 and time.monotonic() - self.said >= SAY_EVERY:
            self.said = time.monotonic()
            log.info("%s: %d " + what + ".", self.images, *numbers)


def _form(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem) + suffix.lower()


def look(images: Path, out: Path | None) -> Found:
    """All files of a folder; nothing in `out` is one."""
    found = Found(images)
    _list(found, out)
    _sort_out(found)
    return found


def _list(found: Found, out: Path | None) -> None:
    """Every file's name but litter; a folder is read once, under its own name rather than a link's."""
    seen = {_identity(out)} if out is not None else set()
    pending, linked = [""], []
    while pending or linked:
        relative = (pending or linked).pop()
        folder = os.path.join(found.images, relative)
        identity = _identity(folder)
        if identity is not None and identity in seen:
            continue
        seen.add(identity)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            found.refuse(_shown_name(relative) or ".", "name", f"the folder cannot be read ({error.strerror})")
            continue
        if relative and _is_ours({entry.name for entry in entries}):
            log.info("%s: an earlier output of this program; left out.", folder)
            continue
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith(".") or entry.name.lower() in LITTER:
                continue
            if _is_folder(entry):
                if entry.name.lower() not in LITTER_FOLDERS:
                    (linked if entry.is_symlink() else pending).append(name)
            elif _id(name) is None:
                found.refuse(_shown_name(name), "name", "the file name is not UTF-8; rename it")
            elif entry.is_symlink() and suffix_of(name) not in KNOWN and _leads_nowhere(entry.path):
                found.refuse(_id(name), "name", "a link that leads to nothing: is the disk of its folder mounted?")
            elif _is_file(entry):
                found.names[_id(name)] = name
            else:
                found.others[suffix_of(_id(name))] += 1  # a pipe, a socket, a device
        found.tell("files found so far", len(found.names) & ~255)


def _identity(folder: str | Path) -> tuple[int, int] | None:
    try:
        state = os.stat(folder)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_file(entry: os.DirEntry) -> bool:
    """A file, or a link to nothing, which is named when it is to be read."""
    try:
        return entry.is_file() or not os.path.exists(entry.path)
    except OSError:
        return True


def _leads_nowhere(link: str) -> bool:
    try:
        os.stat(link)
    except FileNotFoundError:
        return True
    except OSError:  # links in a circle
        pass
    return False


def _is_ours(names: set[str]) -> bool:
    """Whether a folder is an output of encode.main, a data set of it, or a working folder of the training."""
    shards = any(name.startswith("index-") and name.endswith(".npy") for name in names)
    return any(marks <= names for marks in OURS) or (shards and "dataset.json" in names)


def _id(name: str) -> str | None:
    """The name as UTF-8 text whatever the machine's locale, or None."""
    try:
        return os.fsencode(name).decode("utf-8")
    except UnicodeError:
        return None


def _shown_name(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def suffix_of(file: str) -> str:
    return os.path.splitext(file)[1].lstrip(".").lower()


def _sort_out(found: Found) -> None:
    """Each file to its kind."""
    films, odd = [], []
    for number, file in enumerate(sorted(found.names)):
        found.tell("of %d files sorted out", number, len(found.names))
        suffix = suffix_of(file)
        if os.path.basename(file) == METADATA:
            found.metadata.append(file)
        elif suffix in BESIDE:
            found.captions.append(file)
            found.forms.setdefault(_form(file), file)
        elif suffix in formats.PICTURES and suffix not in formats.REFUSED:
            found.pictures.append(file)
        else:
            head = _head(found.path(file))
            if suffix in formats.REFUSED and (reason := formats.refused(head, suffix)):
                films.append(file) if suffix in VIDEOS else found.refused.append(file)
                found.problems += [] if suffix in VIDEOS else [Problem(file, "format", reason)]
            elif formats.looks_like_picture(head):
                odd.append(file)
            else:
                found.others[_kind(file)] += 1
    stems = {os.path.splitext(file)[0] for file in found.pictures}
    named = {*stems, *found.pictures}
    for file in odd:  # by their content pictures too: 1.jpg.bak, 1.jpg~, 1.jpg_original, 1.thm beside 1.jpg
        if BACKUP.search(file) and os.path.splitext(file)[0] in named:
            found.others[_kind(file)] += 1
        else:
            found.pictures.append(file)
    found.pictures.sort()
    for file in films:
        if os.path.splitext(file)[0] in stems:
            found.others[suffix_of(file)] += 1
        else:
            found.refuse(file, "format", formats.REFUSED[suffix_of(file)])


def _kind(file: str) -> str:
    """What a file is counted as: its suffix, if it is one."""
    suffix = suffix_of(file)
    return suffix if suffix.replace("_", "").replace("~", "").isalnum() and len(suffix) < 16 else ""


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(formats.HEAD)
    except OSError:
        return b""
