"""A page of small pictures with a number and a short caption under each; `look` reads one original in a worker process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from encode import images, writing

SIDE, MARGIN, LINE = 160, 8, 13  # pixels
PAPER, INK = (250, 250, 248), (30, 30, 30)


@dataclass(frozen=True)
class Original:
    """What is known of a decoded picture: its upright size (width, height), its pixel hash, a small copy of it."""

    size: tuple[int, int]
    pixel_hash: str
    small: np.ndarray


def look(task: tuple[Path, int]) -> Original:
    """Read (path, most pixels allowed).

    Raises:
      ImageProblem: it cannot be decoded.
    """
    pixels = images.decode(*task)
    return Original(pixels.shape[1::-1], images.pixel_hash(pixels), small(pixels))


def small(pixels: np.ndarray) -> np.ndarray:
    """[height, width, 3] uint8 of any size, made to fit a place of the sheet."""
    return np.asarray(ImageOps.contain(Image.fromarray(pixels), (SIDE, SIDE)))


def draw(pictures: Sequence[np.ndarray], words: Sequence[str]) -> Image.Image:
    """The page: about twice as high as wide at most, at least ten pictures a row where there are ten.

    Args:
      pictures: small ones.
      words: under each, cut to three lines.
    """
    columns = min(len(pictures), max(10, math.ceil(math.sqrt(len(pictures)))))
    rows = math.ceil(len(pictures) / columns)
    wide, high = SIDE + MARGIN, SIDE + MARGIN + writing.LINES * LINE + 4
    page = Image.new("RGB", (columns * wide + MARGIN, rows * high + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(page), writing.font(11, words)
    for place, (picture, text) in enumerate(zip(pictures, words)):
        left, top = MARGIN + place % columns * wide, MARGIN + place // columns * high
        height, width = picture.shape[:2]
        page.paste(Image.fromarray(picture), (left + (SIDE - width) // 2, top + (SIDE - height) // 2))
        for number, line in enumerate(writing.lines(text, font, SIDE)):
            pen.text((left, top + SIDE + 3 + number * LINE), line, INK, font)
    return page
