"""Any picture file -> upright 8-bit sRGB pixels, or a named reason why not.

The content decides the format. A damaged file is refused, never half decoded, and an image object that raised is not
used again. The plan reads headers only (`size`); the pixels are decoded once, in the pass that encodes them. What is read
and what becomes of it stands in docs/inputs.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
import os
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pillow_heif
import pillow_jxl
from PIL import Image, ImageOps

from encode import colour, damage, formats, headers, quirks

SMALLEST = 16  # pixels: less than one patch of the model
ORIENTATION = 0x0112
RESIZE_RULE = "upright, sRGB, alpha on white; stretched to the bucket (Pillow's Lanczos, reducing gap 3), no crop"

Image.init()  # all plugins now: opening in several threads would race to register them
pillow_heif.register_heif_opener()
pillow_jxl.JpegXLImagePlugin.DECODE_THREADS = 0  # the pictures are spread over the cores, not one picture's rows
Image.MAX_IMAGE_PIXELS = None  # our own limit, config.max_pixels, is checked from the header, before a byte is decoded
for _module in (r"PIL\.", r"pillow_heif", r"pillow_jxl", r"encode\.(images|colour)"):
    warnings.filterwarnings("ignore", module=_module)  # a picture is used or quarantined; a warning is neither
logging.getLogger("PIL").setLevel(logging.CRITICAL)
for _library in Path(Image.__file__).parent.parent.glob("pillow.libs/libtiff*"):  # in Pillow's wheels for Linux
    ctypes.CDLL(str(_library)).TIFFSetErrorHandler(None)  # it would print to stderr what Pillow raises anyway


class ImageProblem(ValueError):
    """Why a picture cannot be used; the message is the reason in the quarantine list."""

    unread = "cannot be read: "  # begins a reason that says nothing of the picture: the disk gave no bytes


def size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the upright picture, from the header.

    Raises:
      ImageProblem: not a picture, too many pixels, or too small.
    """
    path = Path(path)
    with _Refusing(path) as refusing:
        kind = refusing.kind = _kind(path)
        if kind == "JXL":  # the plugin decodes when it opens
            return _jxl_size(path, max_pixels)[0]
        with _open(path, kind, max_pixels) as image:
            return _upright_size(image, path)


def decode(path: Path, max_pixels: int) -> np.ndarray:
    """[height, width, 3] uint8 upright sRGB pixels; of a JPEG in full, for a reduced decode would not equal its copies'.

    Raises:
      ImageProblem: with the reason, for instance that the file is truncated.
    """
    path = Path(path)
    with _Refusing(path) as refusing:
        kind = refusing.kind = _kind(path)
        with _open(path, kind, max_pixels) as image:
            return np.asarray(_upright(image, path))


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8: the whole picture, stretched; one that has this size already is returned bit for bit."""
    # Over sRGB values: linear light moves photographs by less than rounding. Far reductions average boxes of pixels
    # first, 2 to 5 times as fast for 1.5 dB of 58 (bench/encode_input.py).
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0))


def pixel_hash(pixels: np.ndarray) -> str:
    """32 hexadecimal characters of the SHA-256 of the size and the upright pixels."""
    digest = hashlib.sha256(f"{pixels.shape[1]}x{pixels.shape[0]}:".encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()[:32]


def mirrored(pixels: np.ndarray) -> np.ndarray:
    """The picture seen in a mirror; the last axis is colour, the one before it runs from left to right."""
    return np.ascontiguousarray(pixels[..., ::-1, :])


def thumbnail(pixels: np.ndarray, side: int) -> bytes:
    """A small JPEG for a page, its longer side at most `side` pixels."""
    return _jpeg(ImageOps.contain(Image.fromarray(pixels), (side, side)))


def thumbnail_of(path: Path, max_pixels: int, side: int) -> bytes:
    """A small JPEG of a file's upright picture, its longer side at most `side`; quicker than decoding in full.

    Raises:
      ImageProblem: as decode.
    """
    path = Path(path)
    with _Refusing(path) as refusing:
        kind = refusing.kind = _kind(path)
        with _open(path, kind, max_pixels) as image:
            return _jpeg(ImageOps.contain(_upright(image, path, side), (side, side)))


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


class _Refusing:
    """Whatever a decoder raises over foreign bytes becomes an ImageProblem with a name."""

    def __init__(self, path: Path):
        self.path, self.kind = path, "file"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, (ImageProblem, MemoryError)):
            return
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # how decoders in Rust give up
            raise ImageProblem(self._reason(error)) from error

    def _reason(self, error: BaseException) -> str:
        text = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")[:200]
        if isinstance(error, (colour.NoRange, quirks.Unusable)):
            return text
        if isinstance(error, OSError) and error.errno is not None:
            return f"{ImageProblem.unread if error.errno in damage.OF_THE_DISK else 'damaged: '}{error.strerror}"
        if isinstance(error, Image.UnidentifiedImageError):
            text = f"begins like {self.kind}, but its header cannot be used"
        elif self.kind == "JXL":
            text = "the JPEG XL decoder gave up"  # it has only one message, and that advises to build it anew
        if isinstance(error, (EOFError, struct.error)) or any(word in text.lower() for word in _CUT):
            return f"truncated: {text or type(error).__name__}"
        if damage.is_cut(self.path, self.kind):
            return f"truncated: {text}"
        rare = damage.rare_kind(self.path, self.kind)
        if rare:
            return f"{rare}, which is not read: save it as PNG or 8-bit TIFF first"
        if isinstance(error, Image.UnidentifiedImageError):
            return f"damaged, or of a kind that is not read: {text}"
        if self.kind == "JXL":
            return f"damaged or truncated: {text}"
        return f"damaged: {type(error).__name__}: {text}"


_CUT = ("truncated", "unexpected end", "end of file", "premature", "not enough", "not large enough")


def _kind(path: Path) -> str:
    """Pillow's name of the format: by the first bytes; by the suffix only where a format has no signature."""
    with open(path, "rb") as file:
        head = file.read(formats.HEAD)
    if not head:
        raise ImageProblem("the file is empty")
    suffix = os.path.splitext(path)[1].lstrip(".").lower()
    reason = formats.refused(head, suffix)
    if reason:
        raise ImageProblem(reason)
    kind = formats.signature(head) or formats.WEAK.get(suffix)
    if kind is None:
        raise ImageProblem("not a picture in a format that can be read")
    if kind == "TIFF" and headers.tiff_is_raw(path):
        raise ImageProblem(formats.RAW_REASON)
    return kind


def _check(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageProblem(f"too many pixels: {width} x {height}, config.max_pixels is {max_pixels}")
    if min(width, height) < SMALLEST:
        raise ImageProblem(f"too small: {width} x {height} pixels, the least is {SMALLEST} a side")


_ICONS = ("ICO", "ICNS", "CUR")  # their directory may lie about the picture inside


def _open(path: Path, kind: str, max_pixels: int) -> Image.Image:
    """The open image, its size within the limits; nothing is decoded yet, but for icons and JPEG XL."""
    _check_before_opening(path, kind, max_pixels)
    image = Image.open(path, formats=(kind,))
    try:
        if kind == "TIFF":
            _seek_whole(image)
        _check(*image.size, max_pixels)
        if kind in _ICONS:
            image.load()
            _check(*image.size, max_pixels)
        primaries, transfer = headers.colour_code(image, path)
        if transfer in colour.HDR:
            raise ImageProblem(formats.HDR_REASON)
        if transfer == colour.LINEAR:
            raise ImageProblem("linear light (transfer 8), which is not read: save it as sRGB first")
        if primaries in colour.PROFILES:
            image.info["icc_profile"] = colour.profile(primaries)
        elif primaries == 1:  # sRGB's own
            image.info.pop("icc_profile", None)
    except BaseException:
        image.close()
        raise
    return image


def _check_before_opening(path: Path, kind: str, max_pixels: int) -> None:
    """The limit, where Pillow would allocate or decode before it tells the size."""
    if kind == "JXL":
        _jxl_size(path, max_pixels)
    elif kind == "WEBP":
        with open(path, "rb") as file:
            claimed = headers.webp_size(file.read(30))
        if claimed:
            _check(*claimed, max_pixels)
    elif kind in _ICONS:
        for width, height in headers.embedded_sizes(path):
            if width * height > max_pixels:
                _check(width, height, max_pixels)


def _jxl_size(path: Path, max_pixels: int) -> tuple[tuple[int, int], headers.JxlHeader]:
    try:
        header = headers.jxl_header(path)
    except ValueError as error:
        raise ImageProblem(f"damaged: begins like a JPEG XL, but {error}") from error
    stored = header.width, header.height
    upright = stored[::-1] if header.orientation >= 5 else stored
    _check(*upright, max_pixels)
    if header.animated:
        raise ImageProblem("an animated JPEG XL, of which only the last frame could be read: save one frame first")
    return upright, header


_REDUCED = 1 | 4  # bits of TIFF's NewSubfileType: a preview, or a mask, of another page
_PAGES = 16


def _seek_whole(image: Image.Image) -> None:
    """Go to a TIFF's first page that is a picture of its own, where a preview or mask stands before it."""
    for page in range(_PAGES):
        try:
            image.seek(page)
        except EOFError:
            break
        if not int(image.tag_v2.get(254, 0)) & _REDUCED:
            return
    image.seek(0)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image, path: Path) -> int:
    """How the loaded pixels are still to be turned, 1 to 8. Broken EXIF counts as none; EXIF comes before XMP.

    Pillow turns a TIFF when it loads it. libheif turns HEIC by the container's own boxes, and its EXIF counts no more.
    Pillow's AVIF plugin puts what the boxes say into the EXIF block that it hands over. libjxl turns by the codestream,
    except where the file is a repacked JPEG.
    """
    if image.format in ("TIFF", "HEIF"):
        return 1
    if image.format == "JXL":
        return headers.jxl_header(path).orientation if image.jpeg else 1
    exif, xmp = image.info.get("exif", b""), image.info.get("xmp", b"")
    if image.format == "PNG":
        exif, xmp = headers.png_metadata(path)
    elif image.format == "AVIF":
        xmp = b""
    return _exif_orientation(exif) or _xmp_orientation(xmp) or 1


def _exif_orientation(data: bytes) -> int | None:
    if not data:
        return None
    try:
        exif = Image.Exif()
        exif.load(data)
        orientation = exif.get(ORIENTATION)
    except MemoryError:
        raise
    except Exception:
        return None
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else None


_XMP = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|\s*>)\s*([1-8])\s*[\"'<]")


def _xmp_orientation(data: bytes | str) -> int | None:
    found = _XMP.search(data.encode("utf-8", "replace") if isinstance(data, str) else data or b"")
    return int(found[1]) if found else None


def _upright_size(image: Image.Image, path: Path) -> tuple[int, int]:
    """The size that _upright will give. Called before the pixels are loaded."""
    if image.format == "TIFF":
        # Pillow has turned the size after the tag, but turns the pixels after XMP too where there is no tag.
        tag = image.tag_v2.get(ORIENTATION)
        try:
            turned = tag is None and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        except (SyntaxError, struct.error, ValueError, KeyError, TypeError):
            turned = False
    elif image.format == "JXL":
        turned = bool(image.jpeg) and _orientation(image, path) >= 5
    else:
        turned = _orientation(image, path) >= 5
    return image.size[::-1] if turned else image.size


_PLAIN = ("L", "RGB", "CMYK", "RGBA", "LA")  # can be made small before their colours are converted


def _upright(image: Image.Image, path: Path, side: int | None = None) -> Image.Image:
    """RGB image; with `side`, one that may be smaller than the file's, its longer side still at least that."""
    expected = _upright_size(image, path)
    if side and image.format in ("JPEG", "MPO"):
        image.draft(None, (side, side))
    stored = image.size
    frame = image.tile[0].extents if image.format == "GIF" and image.tile else None
    alpha = quirks.exact_key(image, path)
    image.load()
    orientation = _orientation(image, path)
    if image.size != stored and image.format != "TIFF":
        raise ImageProblem(f"damaged: the header says {stored[0]} x {stored[1]}, the picture is {image.size}")
    silent = damage.passed_over(image, path) if side is None else None
    if silent:
        raise ImageProblem(f"damaged: {silent}")
    pixels = quirks.mended(image, path)
    if side and alpha is None and pixels.mode in _PLAIN and "transparency" not in pixels.info:
        pixels = _reduced(pixels, side)
    upright = colour.to_srgb(pixels, alpha)
    if frame and frame != (0, 0, *upright.size):
        whole = Image.new("RGB", upright.size, "white")  # what the first frame leaves out is transparent
        whole.paste(upright.crop(frame), frame[:2])
        upright = whole
    if orientation in _TURNS:
        upright = upright.transpose(_TURNS[orientation])
    if side is None and upright.size != expected:
        raise ImageProblem(f"damaged: the header says {expected}, the picture is {upright.size}")
    return upright


def _reduced(image: Image.Image, side: int) -> Image.Image:
    factor = max(image.size) // (2 * side)
    return image.reduce(factor) if factor > 1 else image
