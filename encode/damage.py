"""What is wrong with a file, where its decoder passes over it in silence or only says that it gave up.

libjpeg paints grey where pixels are missing, and Pillow does not look at the checksums of a PNG's pixels. A truncated file
is told from other damage by its own lengths, and a sound file of a rare kind from a damaged one by its header.
"""

from __future__ import annotations

import errno
import io
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from encode import headers

STRIP = 256  # rows
OF_THE_DISK = {getattr(errno, name) for name in (
    "EACCES", "EBUSY", "EHOSTDOWN", "EHOSTUNREACH", "EIO", "EMFILE", "ENFILE", "ENODEV", "ENOENT", "ENOTCONN", "EPERM", "ESTALE",
    "ETIMEDOUT",
) if hasattr(errno, name)}  # fmt: skip


def passed_over(image: Image.Image, path: Path) -> str | None:
    """What a decoder has passed over in silence in a picture that it has loaded, or None."""
    if image.format == "PNG" and not png_is_sound(path):
        return "the checksum of the pixels is wrong"
    if image.format in ("JPEG", "MPO"):
        data = path.read_bytes()
        try:
            filled = jpeg_with_filling(data)
        except ValueError as error:
            return str(error)
        if not _same_pixels(data, filled, bool(image.info.get("progressive"))):
            return "the pixels end before the picture does"
    return None


def _same_pixels(data: bytes, other: bytes, progressive: bool) -> bool:
    """Whether two JPEGs decode to the same pixels; of one that is not progressive an eighth of the size will tell."""
    with _open(data, progressive) as one, _open(other, progressive) as two:
        rows = range(0, one.height, STRIP)
        boxes = ((0, top, one.width, min(top + STRIP, one.height)) for top in rows)
        return one.size == two.size and all(one.crop(box).tobytes() == two.crop(box).tobytes() for box in boxes)


def _open(data: bytes, whole: bool) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    if not whole:
        image.draft("L", (1, 1))
    return image


def png_is_sound(path: Path) -> bool:
    """Whether the checksum of every pixel chunk holds; Pillow looks at those of all other chunks."""
    with open(path, "rb") as file:
        for kind, length in headers.png_chunks(file):
            if kind != b"IDAT":
                continue
            checksum, left = zlib.crc32(kind), length
            while left and (part := file.read(min(left, headers.MEGABYTE))):
                checksum = zlib.crc32(part, checksum)
                left -= len(part)
            stored = file.read(4)
            if len(stored) == 4 and int.from_bytes(stored, "big") != checksum:
                return False
    return True


_AFTER_A_SCAN = frozenset([0xC4, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)])
_ARITHMETIC = frozenset([0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF])  # such a decoder takes zeros for granted behind the end
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_FILLING = bytes(range(1, 255))  # no backslash among the first 32, which go through re.sub


def jpeg_with_filling(data: bytes) -> bytes:
    """A JPEG with meaningless bytes behind every scan and interval: they change nothing, unless pixels were missing there.

    Raises:
      ValueError: foreign markers stand among the pixels, or intervals are missing.
    """
    parts, done, at = [], 0, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        code = data[at + 1]
        if code == 0xD9 or code in _ARITHMETIC:
            break
        if code == 0xFF or code == 0x01 or 0xD0 <= code <= 0xD7:
            at += 1 if code == 0xFF else 2
            continue
        after = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if code != 0xDA:
            at = after
            continue
        marker = _MARKER.search(data, after)
        if marker is None:  # the end mark that `is_cut` found lies elsewhere; a disk has given zeros for the rest
            raise ValueError("its end is missing")
        if marker[1][0] not in _AFTER_A_SCAN:
            raise ValueError("something else stands among the pixels")
        restarts = (found[1][0] for found in _RESTART.finditer(data, after, marker.start()))
        if any(code != 0xD0 + number % 8 for number, code in enumerate(restarts)):
            raise ValueError("pixels are missing in the middle")
        at = marker.start()
        parts += [data[done:after], _RESTART.sub(_FILLING[:32] + rb"\g<0>", data[after:at]), _FILLING]
        done = at
    return b"".join([*parts, data[done:]])


def is_cut(path: Path, kind: str) -> bool:
    """Whether a file's own lengths, or its missing end mark, say that bytes are missing at its end."""
    total = path.stat().st_size
    with open(path, "rb") as file:
        if kind == "WEBP":
            return 8 + int.from_bytes(file.read(8)[4:], "little") > total
        if kind == "PNG":
            ends = [file.tell() + length + 4 for _, length in headers.png_chunks(file)]
            return not ends or ends[-1] + 12 > total
        if kind == "JPEG" or (kind == "JPEG2000" and file.read(2) == b"\xff\x4f"):
            file.seek(max(0, total - headers.MEGABYTE))
            return b"\xff\xd9" not in file.read()
        if kind in ("AVIF", "HEIF", "JXL", "JPEG2000"):
            return _last_box_ends(file, total) > total
        if kind == "TIFF":
            order = "<" if file.read(4)[:2] == b"II" else ">"
            at = headers.integer(file, order)
            file.seek(at)
            count = file.read(2)
            return len(count) < 2 or at + 2 + 12 * struct.unpack(order + "H", count)[0] > total
    return False


def _last_box_ends(file: BinaryIO, total: int) -> int:
    """Where the last of a file's boxes ends by its own account; 0 where it does not begin with a box."""
    at = 0
    while at + 8 <= total:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length < 8 or not (kind.isascii() and kind.decode().isprintable()):
            break
        at += length
    return at


_RARE_JPEG = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "lossless",
    0xCB: "lossless",
    0xF7: "JPEG-LS",
}
_FORMATS = {1: "whole", 2: "signed", 3: "floating-point", 6: "complex"}


def rare_kind(path: Path, kind: str) -> str | None:
    """What makes a JPEG or TIFF one that is not read although it may be sound."""
    with open(path, "rb") as file:
        if kind == "JPEG":
            return _rare_jpeg(file)
        if kind != "TIFF":
            return None
        order = "<" if file.read(4)[:2] == b"II" else ">"
        tags, _ = headers.tiff_directory(file, order, headers.integer(file, order))
        bits = tags.get(258, (1,))
        if not tags or not bits or bits in ((1,), (8,), (8, 8, 8)):
            return None
        form = _FORMATS.get((tags.get(339) or (1,))[0], "unknown")
        return (
            f"a TIFF of {' + '.join(map(str, bits))} bits ({form} numbers, photometric {(tags.get(262) or ('?',))[0]})"
        )


def _rare_jpeg(file: BinaryIO) -> str | None:
    at = 2
    while True:
        file.seek(at)
        segment = file.read(5)
        if len(segment) < 5 or segment[0] != 0xFF or segment[1] == 0xDA:
            return None
        code, length, depth = struct.unpack(">xBHB", segment)
        if code in _RARE_JPEG:
            return f"a JPEG of a rare kind ({_RARE_JPEG[code]})"
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            return None if depth == 8 else f"a JPEG of a rare kind ({depth} bits a colour)"
        at += 2 + length
