"""Any picture file -> upright 8-bit sRGB pixels, or a named reason why not.

The content decides the format. A damaged file is refused, never half decoded, and an image object that raised is not
used again. The plan reads headers only (`size`); the pixels are decoded once, in the pass that encodes them.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")  # JPEG covers MPO
SMALLEST = 16  # pixels: less than one patch of the model
ORIENTATION = 0x0112
RESIZE_RULE = "upright, sRGB, alpha on white; stretched to the bucket with Pillow's Lanczos filter, no crop"
_SRGB = ImageCms.createProfile("sRGB")
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # grey of 16 bits; Pillow widens some to 32

Image.init()  # all plugins now: opening in several threads would race to register them
Image.MAX_IMAGE_PIXELS = None  # our own limit, config.max_pixels, is checked from the header, before a byte is decoded
warnings.filterwarnings("ignore", module=r"PIL\.")  # a picture is used or quarantined; a warning is neither


class ImageProblem(ValueError):
    """Why a picture cannot be used; the message is the reason in the quarantine list."""


def size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the upright picture, from the header.

    Raises:
      ImageProblem: not a picture, too many pixels, or too small.
    """
    with _Refusing(), _open(path, max_pixels) as image:
        turned = image.format != "TIFF" and _orientation(image, path) >= 5  # Pillow has turned a TIFF already
        return image.size[::-1] if turned else image.size


def decode(path: Path, max_pixels: int) -> np.ndarray:
    """[height, width, 3] uint8 upright sRGB pixels.

    Raises:
      ImageProblem: with the reason, for instance that the file is truncated.
    """
    with _Refusing(), _open(path, max_pixels) as image:
        image.load()
        orientation = 1 if image.format == "TIFF" else _orientation(image, path)
        upright = _to_srgb(image)
        if orientation in _TURNS:
            upright = upright.transpose(_TURNS[orientation])
        return np.asarray(upright)


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8: the whole picture, stretched; one that has this size already is returned bit for bit."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def pixel_hash(pixels: np.ndarray) -> str:
    """32 hexadecimal characters of the SHA-256 of the size and the upright pixels."""
    digest = hashlib.sha256(f"{pixels.shape[1]}x{pixels.shape[0]}:".encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()[:32]


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Refusing:
    """Whatever a decoder raises over foreign bytes becomes an ImageProblem with a name."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, (ImageProblem, MemoryError)) or not isinstance(error, Exception):
            return
        text = str(error).strip().rstrip(".")
        if isinstance(error, Image.UnidentifiedImageError):
            raise ImageProblem("not a picture in a format that can be read") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageProblem(f"cannot be read: {error.strerror}") from error
        cut = ("truncated", "unexpected end", "broken data stream", "premature", "not enough")
        if isinstance(error, (EOFError, struct.error)) or any(word in text.lower() for word in cut):
            raise ImageProblem(f"truncated: {text or type(error).__name__}") from error
        raise ImageProblem(f"damaged: {type(error).__name__}: {text}") from error


def _open(path: Path, max_pixels: int) -> Image.Image:
    if os.path.getsize(path) == 0:
        raise ImageProblem("the file is empty")
    image = Image.open(path, formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ImageProblem(f"too many pixels: {width} x {height}, config.max_pixels is {max_pixels}")
    if min(width, height) < SMALLEST:
        image.close()
        raise ImageProblem(f"too small: {width} x {height} pixels, the least is {SMALLEST} a side")
    return image


def _orientation(image: Image.Image, path: Path) -> int:
    """EXIF orientation 1 to 8; a broken EXIF block counts as none."""
    if image.format == "PNG" and not _png_may_have_exif(path):
        return 1  # asking Pillow would decode the whole picture, to look for EXIF behind it
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (OSError, EOFError):
        raise  # a PNG whose pixels are damaged: getexif had to decode them
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _png_may_have_exif(path: Path) -> bool:
    """True where a PNG holds EXIF, XMP or text chunks, found by stepping over the chunks without reading them."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            if kind == b"IEND":
                return False
            file.seek(length + 4, io.SEEK_CUR)
    return False


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB image from a loaded one of any mode: 16-bit grey scaled, profile applied, alpha composited on white."""
    transparency = image.info.get("transparency")
    profile = image.info.get("icc_profile")
    if image.mode in _WIDE:
        wide = np.asarray(image).astype(np.float64)
        grey = np.clip(np.round(wide * (255 / 65535)), 0, 255).astype(np.uint8)
        if isinstance(transparency, int):
            alpha = Image.fromarray(np.where(wide == transparency, 0, 255).astype(np.uint8))
            return _on_white(_apply_profile(Image.fromarray(grey), profile), alpha)
        return _apply_profile(Image.fromarray(grey), profile)
    if image.mode == "F":
        raise ImageProblem("floating-point pixels have no known range")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("RGBa", "La", "PA") or transparency is not None:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    if image.mode in ("RGBA", "LA"):
        colours = image.convert("RGB" if image.mode == "RGBA" else "L")
        return _on_white(_apply_profile(colours, profile), image.getchannel("A"))
    return _apply_profile(image, profile)


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a broken profile, or one of another colour space than the pixels, counts as sRGB
    return image.convert("RGB")


def _on_white(colours: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)


def mirrored(pixels: np.ndarray) -> np.ndarray:
    """The picture seen in a mirror; the last axis is colour, the one before it runs from left to right."""
    return np.ascontiguousarray(pixels[..., ::-1, :])


def thumbnail(pixels: np.ndarray, side: int) -> bytes:
    """A small JPEG for a page, its longer side at most `side` pixels."""
    image = ImageOps.contain(Image.fromarray(pixels), (side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
