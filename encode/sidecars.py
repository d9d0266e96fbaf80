"""Captions as they lie beside pictures: text files, JSON files, metadata.jsonl. Reads them, and says what is wrong.

Nothing that a file can hold raises anything but Unusable. Nothing is guessed: a text in another encoding than UTF-8 (or
UTF-16 with its mark) is refused, because a caption with a wrong character in it would be trained.
"""

from __future__ import annotations

import codecs
import html
import html.entities
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CAPTION_BYTES = 1 << 20  # more is no caption
JSON_BYTES = 1 << 24  # a vector of numbers may be in it
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_UNSEEN = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"  # marks that str.strip keeps
# As pages on the web write " & <.
_ENTITY = re.compile(r"&(?:#0{0,9}\d{1,7}|#x0{0,9}[0-9a-f]{1,6}|[a-z]\w*);", re.IGNORECASE)
_BLANK = frozenset("\u034f\u115f\u1160\u2800\u3164\uffa0")  # letters and signs that show nothing


class Unusable(ValueError):
    """Why there is no caption; the message is the reason."""


def read_text(path: Path, limit: int | None = None) -> str:
    """A text file in UTF-8 with or without byte-order mark, or in UTF-16 with one; line ends become newlines."""
    return _decode(_read(path, limit)).replace("\r\n", "\n").replace("\r", "\n")


def read_record(path: Path) -> Mapping[str, Any]:
    """NAME.json: one object. Of a key that is there twice the last one counts."""
    return _object(read_text(path, JSON_BYTES), "not a JSON object")


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """(line number, row or what is wrong with it) of each line of a metadata.jsonl that is not blank."""
    data = _read(path, None)
    if data.startswith(_UTF16) or data.startswith(_UTF32):
        lines: list[Any] = _decode(data).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    else:
        lines = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _object(line if isinstance(line, str) else _decode(line), "not a JSON object with file_name and text")
        except Unusable as problem:
            yield number, str(problem)
            continue
        named = isinstance(row.get("file_name"), str)
        yield number, row if named else "not a JSON object with file_name and text"


def captions_of(value: Any) -> tuple[str, ...]:
    """One caption or a list of them -> stripped, each once, none empty, HTML's entities as the signs that they mean.

    Raises:
      Unusable: no caption is left, or one cannot be used.
    """
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise Unusable("the caption is not text")
    values = [_ENTITY.sub(_meant, text) for text in values]
    for text in values:
        if not text.isascii() and not _encodable(text):
            raise Unusable("the caption holds half a character (a lone surrogate)")
        if "\0" in text:
            raise Unusable("the caption holds NUL characters (is it UTF-16 without its mark?); save it as UTF-8")
        if len(text) > CAPTION_BYTES:
            raise Unusable(f"the caption is too long ({len(text):,} characters)")
    stripped = (text.strip().strip(_UNSEEN).strip() for text in values)
    captions = tuple(dict.fromkeys(text for text in stripped if text and (text.isascii() or _shows(text))))
    if not captions:
        raise Unusable("the caption is empty")
    return captions


def _meant(entity: re.Match[str]) -> str:
    if entity[0][1] != "#" and entity[0][1:] not in html.entities.html5:
        return entity[0]
    sign = html.unescape(entity[0])
    return entity[0] if "\ufffd" in sign else sign


def _shows(text: str) -> bool:
    return any(
        unicodedata.category(sign)[0] not in "CZ" and sign not in _BLANK and not "\ufe00" <= sign <= "\ufe0f"
        for sign in text
    )


def may_flip(record: Mapping[str, Any]) -> bool:
    """The key flip: false keeps a picture from being mirrored."""
    value = record.get("flip", True)
    if not isinstance(value, bool):
        raise Unusable(f"flip is neither true nor false: {shown(json.dumps(value))[:40]}")
    return value


def shown(text: str) -> str:
    """A text from outside in one printable line."""
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in safe)


def _read(path: Path, limit: int | None) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from error
    if limit is not None and len(data) > limit:
        raise Unusable(f"too large for a caption (over {limit >> 20} MiB)")
    return data


def _decode(data: bytes) -> str:
    if data.startswith(_UTF32) and not (data.startswith(codecs.BOM_UTF16_LE) and len(data) % 4):
        raise Unusable("UTF-32; save it as UTF-8")
    utf16 = data.startswith(_UTF16)
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"not {'UTF-16' if utf16 else 'UTF-8'} (byte {error.start})") from error


def _object(text: str, reason: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unusable(f"{reason} ({error.msg.lower()}, line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError):
        raise Unusable(reason) from None
    if not isinstance(value, dict):
        raise Unusable(reason)
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
