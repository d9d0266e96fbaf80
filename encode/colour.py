"""Pixels of any mode that a decoder hands over -> 8-bit sRGB on white.

Colours and transparency are taken apart, the embedded profile is applied to the colours, and both meet again on white.
A profile that is broken, or belongs to another kind of colour than the pixels, counts as sRGB; one that is sRGB but for
rounding changes nothing. Large pictures are worked on in strips: nothing of their size is ever held in more than 32 bits.
"""

from __future__ import annotations

import functools
import io
import struct

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from encode import headers

STRIP = 256  # rows
WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
_SPACE = {"L": "GRAY", "I;16": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339


LINEAR = 8  # a transfer: light itself
HDR = (16, 18)  # transfers, PQ and HLG: light up to 10,000 candela, which no profile here turns into sRGB
PROFILES = {  # of H.273's primaries, adapted to D50, and the exponent where the curve is not sRGB's
    12: (((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)), None),  # Display P3
    headers.ADOBE_RGB: (
        ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
        563 / 256,
    ),
}


class NoRange(ValueError):
    """The pixels are numbers of which nobody has said what black and white are."""


@functools.cache
def profile(primaries: int) -> bytes:
    """An ICC profile: sRGB's with other primaries, and another exponent, in their places."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    colours, exponent = PROFILES[primaries]
    for tag, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colours):
        struct.pack_into(">3i", data, _place(data, tag) + 8, *(round(value * 65536) for value in values))
    if exponent is not None:
        for tag in (b"rTRC", b"gTRC", b"bTRC"):  # parametric, of type 3: (a x + b) ^ g from d on
            numbers = exponent, 1, 0, 0, 0
            struct.pack_into(">5i", data, _place(data, tag) + 12, *(round(value * 65536) for value in numbers))
    return bytes(data)


def _place(data: bytearray, tag: bytes) -> int:
    at = data.index(tag, 128)
    return int.from_bytes(data[at + 4 : at + 8], "big")


def to_srgb(image: Image.Image, alpha: Image.Image | None = None) -> Image.Image:
    """RGB image from a loaded one of any mode.

    Args:
      image: loaded; its info may hold icc_profile and transparency.
      alpha: mode L; where it is already known, it is used instead of what image.info says.

    Raises:
      NoRange: floating-point or 32-bit pixels that fit no known range.
    """
    profile = image.info.get("icc_profile")
    if image.mode in (*WIDE, "I", "F"):
        key = image.info.get("transparency")
        if alpha is None and image.mode in WIDE and isinstance(key, int):
            alpha = Image.fromarray(np.where(np.asarray(image) == key, np.uint8(0), np.uint8(255)))
        colours = _apply_to_wide(_sixteen_bits(image), profile)
    else:
        colours, own = _split(image, alpha is None)
        alpha = own if alpha is None else alpha
        colours = _apply_profile(colours, profile)
    if alpha is None:
        return colours
    white = Image.new("RGB", colours.size, "white")
    white.paste(colours, mask=alpha)
    return white


def _split(image: Image.Image, with_alpha: bool) -> tuple[Image.Image, Image.Image | None]:
    """Colours as L, RGB, CMYK or LAB, and alpha as L."""
    key = image.info.get("transparency") if with_alpha else None
    mode = image.mode
    if mode == "1":
        image, mode = image.convert("L"), "L"
    if mode in ("L", "RGB") and key is not None:
        image = image.convert("LA" if mode == "L" else "RGBA")
    elif mode == "P":
        image = image.convert("RGBA" if with_alpha and image.has_transparency_data else "RGB")
    elif mode in ("PA", "RGBa", "La"):
        image = image.convert("LA" if mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image if image.mode in _SPACE else image.convert("RGB"), None


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    """[height, width] uint16 from grey of more than 8 bits or of floating point: 0 is black, 65535 what `_white` says."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    values = np.asarray(image)
    bits = tags.get(_BITS, (0,))[0]
    if image.mode == "I" and bits == 32 and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)
    if image.mode in WIDE:
        white = 4095 if bits == 12 else 65535
    elif image.mode == "I" and bits == 16:
        white = _white(values, (32767,))
    elif image.mode == "I" and image.format == "PPM":
        white = 65535  # Pillow scales a portable map to 16 bits, whatever it says is its largest value
    else:
        white = _white(values, (1, 255, 65535, 4294967295))
    if white != 65535 or values.dtype != np.uint16:
        scaled = np.empty(values.shape, np.uint16)
        for top in range(0, len(values), STRIP):
            strip = values[top : top + STRIP].astype(np.float64)
            scaled[top : top + STRIP] = np.clip(np.round(strip * (65535 / white)), 0, 65535)
        values = scaled
    if tags.get(_PHOTOMETRIC) == 0:
        values = np.invert(values)  # white is zero; Pillow turns over only pictures of 8 bits and less
    return values


def _apply_to_wide(values: np.ndarray, profile: bytes | None) -> Image.Image:
    """RGB image from [height, width] uint16 grey, its profile applied before the bits are fewer."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    table = _apply_profile(Image.fromarray(ramp), profile) if _space(profile) == "GRAY" else None
    if table is None or table.mode != "RGB":
        table = _apply_profile(Image.fromarray(np.round(ramp / 257).astype(np.uint8)), profile)
    table = np.asarray(table).reshape(65536, 3)
    pixels = np.empty((*values.shape, 3), np.uint8)
    for top in range(0, len(values), STRIP):
        pixels[top : top + STRIP] = table[values[top : top + STRIP]]
    return Image.fromarray(pixels)


def _white(values: np.ndarray, steps: tuple[int, ...]) -> int:
    """The least of the usual largest values that no pixel is above.

    Floating-point pixels between 0 and 1 have white 1; beyond that they must be whole numbers, for then they are an
    integer picture in another dress. Anything else could be any brightness, and is refused with the range found.
    """
    low, high, whole, finite = np.inf, -np.inf, True, True
    for top in range(0, len(values), STRIP):
        strip = values[top : top + STRIP]
        low, high = min(low, float(strip.min())), max(high, float(strip.max()))
        if values.dtype.kind == "f":
            finite = finite and bool(np.isfinite(strip).all())
            whole = whole and finite and bool((strip == np.round(strip)).all())
    kind = "floating-point" if values.dtype.kind == "f" else "integer"
    if not finite:
        raise NoRange(f"{kind} pixels that are not finite numbers")
    if low < 0 or high > steps[-1] or (high > 1 and not whole):
        raise NoRange(f"{kind} pixels from {low:g} to {high:g} have no known range; scale them to 0..1 first")
    return next(step for step in steps if high <= step)


def _space(profile: bytes | None) -> str | None:
    """The kind of colour that a profile speaks of: GRAY, RGB, CMYK, Lab; None where it cannot be read."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip() if profile else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB image from L, I;16, RGB, CMYK or LAB."""
    space = _space(profile)
    if image.mode == "L" and space == "RGB":
        image = image.convert("RGB")
    if profile and space == _SPACE[image.mode]:
        try:
            if image.mode == "RGB" and _is_srgb(profile):
                return image
            return _to_srgb(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # counts as sRGB
    if image.mode == "LAB":
        return _to_srgb(image, ImageCms.createProfile("LAB"))
    return image if image.mode == "I;16" else image.convert("RGB")


def _to_srgb(image: Image.Image, source) -> Image.Image:
    fine = ImageCms.Flags.HIGHRESPRECALC  # Lab and CMYK go through a grid, whose usual one is up to 6 steps off
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB", flags=fine)


@functools.lru_cache(maxsize=64)
def _is_srgb(profile: bytes) -> bool:
    """Whether an RGB profile moves no colour by more than two steps of 255, tried on a grid of 17 steps a channel."""
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(17, 17 * 17, 3)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return int(np.abs(np.asarray(_to_srgb(Image.fromarray(grid), source)).astype(int) - grid).max()) <= 2
