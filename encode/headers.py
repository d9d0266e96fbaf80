"""What must be known of a file before a decoder is let near it: sizes, orientation, raw data in a TIFF's clothes.

Pillow's plugins for WebP and JPEG XL allocate or decode when they open, and Pillow decodes a whole PNG to find the EXIF
block behind its pixels. Functions here read a few bytes instead; ValueError means that the header makes no sense.
Sources: RFC 9649 (WebP), ISO/IEC 18181-1 annex D (JPEG XL), PNG third edition, TIFF 6.0, DNG 1.7.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

MEGABYTE = 1 << 20
UNKNOWN, ADOBE_RGB = (2, 2), 256  # of `colour_code`; H.273 ends at 255


def webp_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) of the canvas from the first 30 bytes; None where the decoder must tell."""
    kind, body = head[12:16], head[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", body[6:10])
    return width & 0x3FFF, height & 0x3FFF


@dataclass(frozen=True)
class JxlHeader:
    """What the head of a JPEG XL codestream says; the size is the stored one, before orientation."""

    width: int
    height: int
    orientation: int
    animated: bool
    premultiplied: bool


class _Bits:
    """The fields of a JPEG XL header, lowest bit first."""

    def __init__(self, data: bytes):
        self.value, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        if count > self.left:
            raise ValueError("the header ends early")
        field = self.value & ((1 << count) - 1)
        self.value >>= count
        self.left -= count
        return field

    def pick(self, *ways: tuple[int, int]) -> int:
        """One of four (offset, bits), chosen by two bits."""
        offset, count = ways[self.take(2)]
        return offset + self.take(count)


_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def jxl_header(path: Path) -> JxlHeader:
    bits = _Bits(_jxl_codestream(path))
    width, height = _jxl_size(bits)
    orientation, animated, premultiplied = 1, False, False
    if bits.take(1):  # all default
        return JxlHeader(width, height, orientation, animated, premultiplied)
    if bits.take(1):
        orientation = 1 + bits.take(3)
        if bits.take(1):
            _jxl_size(bits)
        if bits.take(1):
            raise ValueError("it has a preview")  # nobody writes them
        animated = bool(bits.take(1))
        if animated:
            bits.pick((100, 0), (1000, 0), (1, 10), (1, 30))
            bits.pick((1, 0), (1001, 0), (1, 8), (1, 10))
            bits.pick((0, 0), (0, 3), (0, 16), (0, 32))
            bits.take(1)
    _jxl_depth(bits)
    bits.take(1)
    for _ in range(bits.pick((0, 0), (1, 0), (2, 4), (1, 12))):
        if bits.take(1):
            continue  # plain alpha
        kind = bits.pick((0, 0), (1, 0), (2, 4), (18, 6))
        _jxl_depth(bits)
        bits.pick((0, 0), (3, 0), (4, 0), (1, 3))
        bits.take(8 * bits.pick((0, 0), (0, 4), (16, 5), (48, 10)))
        if kind == 0:
            premultiplied = bool(bits.take(1))
        elif kind in (2, 5):
            break  # a spot colour or filter array: what follows tells nothing that is needed here
    return JxlHeader(width, height, orientation, animated, premultiplied)


def _jxl_size(bits: _Bits) -> tuple[int, int]:
    small = bits.take(1)

    def side() -> int:
        return 8 * (1 + bits.take(5)) if small else bits.pick((1, 9), (1, 13), (1, 18), (1, 30))

    height = side()
    ratio = bits.take(3)
    if ratio == 0:
        return side(), height
    numerator, denominator = _RATIOS[ratio - 1]
    return height * numerator // denominator, height


def _jxl_depth(bits: _Bits) -> None:
    if bits.take(1):
        bits.pick((32, 0), (16, 0), (24, 0), (1, 6))
        bits.take(4)
    else:
        bits.pick((8, 0), (10, 0), (12, 0), (1, 6))


def _jxl_codestream(path: Path) -> bytes:
    """The first bytes of the codestream behind its two-byte signature, from a bare file or from its boxes."""
    wanted, found = 2048, b""
    with open(path, "rb") as file:
        if file.read(2) == b"\xff\x0a":
            return file.read(wanted)
        file.seek(0)
        while len(found) < wanted and len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            left = length - 8
            if length == 1:
                left = int.from_bytes(file.read(8), "big") - 16
            elif length == 0:
                left = 1 << 62
            if left < 0:
                break
            after = file.tell() + left
            if kind == b"jxlp":
                file.read(4)
            if kind in (b"jxlc", b"jxlp"):
                found += file.read(min(wanted, max(0, after - file.tell())))
            if after >= 1 << 62:
                break
            file.seek(after)
    if not found.startswith(b"\xff\x0a"):
        raise ValueError("it holds no codestream")
    return found[2:]


def png_metadata(path: Path) -> tuple[bytes, bytes]:
    """(EXIF block, XMP packet) of a PNG, each empty where there is none, without decoding a pixel."""
    exif = xmp = b""
    with open(path, "rb") as file:
        for kind, length in png_chunks(file):
            if kind == b"eXIf" and length < MEGABYTE:
                exif = file.read(length)
            elif kind in (b"tEXt", b"zTXt", b"iTXt") and length < 16 * MEGABYTE:
                keyword, text = _png_text(kind, file.read(length))
                if keyword == b"XML:com.adobe.xmp":
                    xmp = xmp or text
                elif keyword.lower() in (b"raw profile type exif", b"raw profile type app1"):
                    raw = _raw_profile(text)
                    if raw.startswith(b"http://ns.adobe.com/xap/"):
                        xmp = xmp or raw
                    else:
                        exif = exif or raw
                elif keyword.lower() == b"raw profile type xmp":
                    xmp = xmp or _raw_profile(text)
    return exif, xmp


def colour_code(image: Image.Image, path: Path) -> tuple[int, int]:
    """(primaries, transfer) by the numbers of ITU-T H.273, where a file tells its colours so; 2 is unknown.

    By the nclx of HEIC and AVIF, which an ICC profile overrules, and the cICP of PNG, which overrules that. A camera's JPEG
    in Adobe RGB says it by EXIF alone (DCF 2.0, "R03"): ADOBE_RGB, which is no number of theirs.
    """
    if image.format == "PNG":
        with open(path, "rb") as file:
            for kind, length in png_chunks(file):
                if kind == b"cICP" and length == 4:
                    primaries, transfer = file.read(2)
                    return primaries, transfer
                if kind == b"IDAT":
                    break
    if image.info.get("icc_profile"):
        return UNKNOWN
    if image.format == "HEIF":
        told = image.info.get("nclx_profile") or {}
        return told.get("color_primaries", 2), told.get("transfer_characteristics", 2)
    if image.format == "AVIF":
        with open(path, "rb") as file:
            head = file.read(MEGABYTE)
        at = head.find(b"colrnclx") + 8
        return struct.unpack(">HH", head[at : at + 4]) if 8 <= at <= len(head) - 4 else UNKNOWN
    if image.format in ("JPEG", "MPO") and _interoperability(image) == "R03":
        return ADOBE_RGB, 2
    return UNKNOWN


def _interoperability(image: Image.Image) -> str | None:
    try:
        return image.getexif().get_ifd(0xA005).get(1)
    except MemoryError:
        raise
    except Exception:  # broken EXIF counts as none
        return None


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(kind, length) of every chunk, the file standing at its data."""
    at = 8
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        yield kind, length
        at += 12 + length


def _png_text(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    keyword, _, rest = data.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]
    if packed:
        try:
            rest = zlib.decompressobj().decompress(rest, 16 * MEGABYTE)
        except zlib.error:
            rest = b""
    return keyword, rest


def _raw_profile(text: bytes) -> bytes:
    """The bytes in ImageMagick's text form: a name, a length, hexadecimal lines."""
    try:
        return bytes.fromhex(b"".join(text.strip().split(b"\n")[2:]).decode("ascii"))
    except ValueError:
        return b""


_RAW_TAGS = {50706, 50752}  # DNGVersion, Canon's slices
# Sony, packed, Samsung, Nikon, lossy DNG, Kodak, Pentax.
_RAW_COMPRESSIONS = {32767, 32769, 32770, 34713, 34892, 65000, 65535}
_RAW_LIGHT = {32803, 34892}  # colour filter array, linear raw


def tiff_is_raw(path: Path) -> bool:
    """Whether a TIFF holds the data of a sensor, its first page being only a preview."""
    with open(path, "rb") as file:
        order = "<" if file.read(2) == b"II" else ">"
        if file.read(2) not in (b"*\0", b"\0*"):
            return False
        pending, seen = [integer(file, order)], set()
        while pending and len(seen) < 24:
            at = pending.pop(0)
            if at in seen or at < 8:
                continue
            seen.add(at)
            tags, following = tiff_directory(file, order, at)
            if (
                _RAW_TAGS & tags.keys()
                or _RAW_COMPRESSIONS & set(tags.get(259, ()))
                or _RAW_LIGHT & set(tags.get(262, ()))
            ):
                return True
            pending += [*tags.get(330, ()), following]
    return False


def integer(file: BinaryIO, order: str) -> int:
    data = file.read(4)
    return struct.unpack(order + "I", data)[0] if len(data) == 4 else 0


def tiff_directory(file: BinaryIO, order: str, at: int) -> tuple[dict[int, tuple[int, ...]], int]:
    """Values of the tags that matter (whole numbers only) and where the next directory is."""
    file.seek(at)
    data = file.read(2)
    count = struct.unpack(order + "H", data)[0] if len(data) == 2 else 0
    entries = io.BytesIO(file.read(12 * count))
    following = integer(file, order)
    tags: dict[int, tuple[int, ...]] = {}
    while len(entry := entries.read(12)) == 12:
        tag, kind, number = struct.unpack(order + "HHI", entry[:8])
        if tag not in {258, 259, 262, 330, 339, *_RAW_TAGS}:
            continue
        letter = {3: "H", 4: "I", 13: "I"}.get(kind)
        if letter is None:
            tags[tag] = ()
            continue
        number = min(number, 8)
        width = struct.calcsize(order + letter * number)
        values = entry[8 : 8 + width]
        if width > 4:
            file.seek(struct.unpack(order + "I", entry[8:])[0])
            values = file.read(width)
        tags[tag] = struct.unpack(order + letter * number, values) if len(values) == width else ()
    return tags, following


def embedded_sizes(path: Path) -> list[tuple[int, int]]:
    """(width, height) of every PNG and JPEG 2000 inside an icon file; its own directory need not agree with them."""
    with open(path, "rb") as file:
        data = file.read(64 * MEGABYTE)
    sizes, at = [], -1
    while (at := data.find(b"IHDR", at + 1)) >= 0:
        if data[at - 12 : at - 4] == b"\x89PNG\r\n\x1a\n" and at + 12 <= len(data):
            sizes.append(struct.unpack_from(">II", data, at + 4))
    while (at := data.find(b"\xff\x4f\xff\x51", at + 1)) >= 0:
        if at + 24 <= len(data):
            right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
            sizes.append((right - left, bottom - top))
    return sizes
