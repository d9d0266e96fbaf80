"""What decoders leave undone, format by format: polarity, alpha that means nothing, keys, colours told by a number alone."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from encode import headers

WITHOUT_PICTURE = (
    "a Photoshop file without its composite: save it again with 'Maximize Compatibility', or export it as PNG or TIFF"
)
_VERSION_INFO = 1057  # of Photoshop's resources


class Unusable(ValueError):
    """The picture is not in the file; the message says what is to be done."""


def mended(image: Image.Image, path: Path) -> Image.Image:
    """The picture with CMYK of the right polarity, without alpha that means nothing, not multiplied by alpha.

    Raises:
      Unusable: a Photoshop file has a blank page in its place.
    """
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        mended = ImageChops.invert(image)  # Pillow takes every CMYK for Adobe's, which is stored inverted
    elif image.format == "TGA" and image.mode in ("RGBA", "LA") and not _tga_has_alpha(path):
        mended = image.convert(image.mode[:-1])
    elif image.format == "PSD" and _psd_is_blank(image):
        raise Unusable(WITHOUT_PICTURE)
    elif image.format == "PSD" and image.mode == "RGBA" and not _psd_has_alpha(path):
        mended = image.convert("RGB")
    elif image.format == "JXL" and image.mode == "RGBA" and headers.jxl_header(path).premultiplied:
        mended = Image.frombytes("RGBa", image.size, image.tobytes())
    else:
        return image
    mended.info = dict(image.info)
    return mended


def _tga_has_alpha(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(18)[17] & 15 > 0


def _psd_is_blank(image: Image.Image) -> bool:
    return any(number == _VERSION_INFO and data[4:5] == b"\0" for number, _, data in image.resources)


def _psd_has_alpha(path: Path) -> bool:
    """Whether the fourth channel is transparency, which a negative number of layers says, and not a saved selection."""
    with open(path, "rb") as file:
        file.seek(26)
        for _ in ("colours", "resources"):
            file.seek(int.from_bytes(file.read(4), "big"), 1)
        section = int.from_bytes(file.read(4), "big")
        return section > 6 and struct.unpack(">ih", file.read(6))[1] < 0


def exact_key(image: Image.Image, path: Path) -> Image.Image | None:
    """Alpha of a PNG with 16 bits a colour and a transparent one, which Pillow can no longer tell from its neighbours."""
    key = image.info.get("transparency")
    rawmode = image.tile[0].args if image.format == "PNG" and image.tile else None
    if rawmode in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[rawmode]  # Pillow stretches the pixels, not the key
    if rawmode != "RGB;16B" or not isinstance(key, tuple):
        return None
    alpha = np.zeros(image.size[::-1], np.uint8)
    for rawmode, shift in (("RGB;16B", 8), ("RGB;16L", 0)):  # the high bytes, then the low ones
        with Image.open(path, formats=("PNG",)) as again:
            again.tile = [tile._replace(args=rawmode) for tile in again.tile]
            half = np.asarray(again)
            for channel in range(3):
                alpha[half[..., channel] != (key[channel] >> shift & 255)] = 255
    return Image.fromarray(alpha)
