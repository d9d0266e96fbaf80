"""The embedded encoders: deterministic, without weights to download, in the same three protocols as the real ones.

Notable: the image code is a block DCT whose coefficients are mixed by an orthonormal Hadamard matrix, so that each channel
holds low and high frequencies and normalising a channel does not blow the edges up; the words of a caption are random
signs from a hash, mixed with their neighbours, so that order matters; the vector of a picture has no place in it, only
colour and light, so it is the same for the mirror image. This file needs nothing else of ours: jaxdit.export ships it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

BLOCK = 8
# Coefficients kept of a block, (row, column) frequencies: luma 12 and chroma 2 + 2 reach 31.3 dB on the demo pictures at
# 128 x 128, against 30.9 with 10 and 3 + 3, and 30.1 with 8 and 4 + 4; photographs agree.
LUMA = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2), (0, 3), (3, 0), (1, 3))
CHROMA = ((0, 0), (0, 1))
KEPT = tuple((plane, *place) for plane, places in enumerate((LUMA, CHROMA, CHROMA)) for place in places)
# Rec. 601, as in JPEG; rows are Y, Cb, Cr.
TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
TEXT_WIDTH = 128
NEIGHBOURS = (0.8, 0.4, 0.4, 0.2)  # of the word, the one before, the one after, the place; squares add up to 1
VISION_WIDTH = 16
HUE_BINS = 6


class DemoVAE:
    """A picture as 16 mixed low-frequency DCT coefficients of each 8 x 8 block."""

    channels = len(KEPT)

    def __init__(self):
        self.fingerprint = {
            "id": "demo-dct",
            "version": 1,
            "pixels": "[-1, 1], YCbCr, 8x8 DCT, 16 coefficients, Hadamard",
        }

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """[b, h, w, 3] uint8 -> [b, h/8, w/8, 16] float32; h and w are multiples of 8."""
        b, height, width, _ = pixels.shape
        if height % BLOCK or width % BLOCK:
            raise ValueError(f"pixels are {width}x{height}; both sides must be multiples of {BLOCK}")
        planes = (pixels.astype(np.float32) / 127.5 - 1) @ TO_YCC.T
        blocks = planes.reshape(b, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3)
        return np.einsum("bhywxp,yxpc->bhwc", blocks, _BASIS, optimize=True).astype(np.float32)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """[b, h, w, 16] float32 -> [b, 8h, 8w, 3] uint8."""
        b, h, w, _ = latents.shape
        blocks = np.einsum("bhwc,yxpc->bhywxp", np.asarray(latents, np.float32), _BASIS, optimize=True)
        pixels = blocks.reshape(b, h * BLOCK, w * BLOCK, 3) @ np.linalg.inv(TO_YCC).T
        return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


class DemoText:
    """A caption as one vector a word or sign, each with a share of its neighbours and its place, and one for the end."""

    width = TEXT_WIDTH

    def __init__(self, max_tokens: int):
        if max_tokens < 1:
            raise ValueError(f"text.max_tokens={max_tokens}: at least 1 is needed")
        self.max_tokens = max_tokens
        self.fingerprint = {"id": "demo-words", "version": 1, "width": self.width, "max_tokens": max_tokens}

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """One [tokens, 128] float32 a caption, with at least the end token, cut after max_tokens."""
        return [self._encode(caption) for caption in captions]

    def count_tokens(self, caption: str) -> int:
        return len(_words(caption)) + 1

    def unknown(self, caption: str) -> float:
        return 0.0

    def _encode(self, caption: str) -> np.ndarray:
        words = ["", *_words(caption)[: self.max_tokens - 1], _END, ""]
        vectors = np.stack([_signs(word) if word else np.zeros(TEXT_WIDTH, np.float32) for word in words])
        places = np.stack([_signs(f"place {index}") for index in range(len(words) - 2)])
        own, before, after, place = NEIGHBOURS
        # Rolled, so that the word before and the word after are told apart.
        mixed = (
            own * vectors[1:-1] + before * np.roll(vectors[:-2], 1, axis=1) + after * np.roll(vectors[2:], -1, axis=1)
        )
        return (mixed + place * places).astype(np.float32)


class DemoVision:
    """A picture as statistics of its colour and light in OKLab; nothing in them says where."""

    width = VISION_WIDTH

    def __init__(self, area: int):
        side = max(8, round(area**0.5))
        self.resizing = Square(side)
        self.fingerprint = {"id": "demo-light", "version": 1, "width": self.width, "side": side}

    def encode(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """[height, width, 3] uint8 pictures of any sizes -> [n, 16] float32."""
        return self.encode_resized([self.resizing(pixels) for pixels in pictures])

    def encode_resized(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The same of pictures that went through `resizing` already."""
        return np.stack([self._encode(pixels) for pixels in pictures])

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        colours = oklab(pixels.reshape(-1, 3))
        lightness, chroma = colours[:, 0], np.hypot(colours[:, 1], colours[:, 2])
        hue = np.arctan2(colours[:, 2], colours[:, 1]) * (HUE_BINS / (2 * np.pi))
        centres = np.arange(HUE_BINS)[:, None]
        apart = np.abs((hue - centres + HUE_BINS / 2) % HUE_BINS - HUE_BINS / 2)
        shares = (np.maximum(1 - apart, 0) * chroma).mean(axis=1) / (chroma.mean() + 0.01)  # about 0 for a grey picture
        values = [
            (lightness.mean() - 0.5) / 0.2,
            (lightness.std() - 0.18) / 0.08,
            *((np.quantile(lightness, (0.1, 0.5, 0.9)) - (0.25, 0.5, 0.75)) / 0.2),
            *(colours[:, 1:].mean(axis=0) / 0.05),
            *(colours[:, 1:].std(axis=0) / 0.03 - 1),
            (chroma.mean() - 0.06) / 0.04,
            *((shares - 1 / HUE_BINS) / 0.25),
        ]
        return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Square:
    """How DemoVision sees the whole picture, whatever its shape: encode.prepare.Resizing, but to a square."""

    side: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        del width, height
        return self.side, self.side

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """[height, width, 3] uint8 of any size -> [side, side, 3] uint8."""
        return np.asarray(Image.fromarray(pixels).resize((self.side, self.side), Image.Resampling.BOX))


def oklab(pixels: np.ndarray) -> np.ndarray:
    """[n, 3] uint8 sRGB -> [n, 3] float64 OKLab (Ottosson 2020): lightness in [0, 1], green-red, blue-yellow."""
    encoded = pixels / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_END = "</s>"


def _words(caption: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFC", caption).lower())


def _signs(word: str) -> np.ndarray:
    """[128] of -1 and 1 from the hash of a word: the same on every machine, two words nearly orthogonal."""
    digest = hashlib.sha256(word.encode()).digest()[: TEXT_WIDTH // 8]
    return np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32) * 2 - 1


def _basis() -> np.ndarray:
    """[8, 8, 3, 16]: what each channel measures in a block of the three planes; orthonormal over (y, x, plane)."""
    frequency, place = np.mgrid[0:BLOCK, 0:BLOCK]
    cosines = np.cos(np.pi * frequency * (2 * place + 1) / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    cosines[0] /= np.sqrt(2)
    basis = np.zeros((BLOCK, BLOCK, 3, len(KEPT)))
    for channel, (plane, row, column) in enumerate(KEPT):
        basis[:, :, plane, channel] = np.outer(cosines[row], cosines[column])
    hadamard = np.ones((1, 1))
    while len(hadamard) < len(KEPT):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return (basis @ hadamard / np.sqrt(len(KEPT))).astype(np.float32)


_BASIS = _basis()
