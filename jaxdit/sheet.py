"""Many pictures as one: a contact sheet with words under each, and a grid of two guidance weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from encode import writing

SIDE, MARGIN, LINE = 256, 8, 15  # pixels
NARROWEST = 200  # pixels of words
LARGEST_CELL = 512
PAPER, INK = (250, 250, 248), (30, 30, 30)


def thumbnail(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """[height, width, 3] uint8, made to fit a square of that side; never enlarged."""
    image = Image.fromarray(pixels)
    return pixels if max(image.size) <= side else np.asarray(ImageOps.contain(image, (side, side)))


def contact_sheet(pictures: Sequence[np.ndarray], words: Sequence[str]) -> Image.Image:
    """A page about as wide as high.

    Args:
      pictures: [height, width, 3] uint8, at most 256 a side.
      words: under each, cut to three lines.
    """
    columns = math.ceil(math.sqrt(len(pictures)))
    side, above = (max(picture.shape[axis] for picture in pictures) for axis in (1, 0))
    side = max(side, NARROWEST)
    wide, high = side + MARGIN, above + MARGIN + writing.LINES * LINE + 4
    page = Image.new("RGB", (columns * wide + MARGIN, math.ceil(len(pictures) / columns) * high + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(page), writing.font(12, words)
    for place, (picture, text) in enumerate(zip(pictures, words)):
        left, top = MARGIN + place % columns * wide, MARGIN + place // columns * high
        height = picture.shape[0]
        page.paste(Image.fromarray(picture), (left, top + above - height))
        for number, line in enumerate(writing.lines(text, font, side)):
            pen.text((left, top + above + 3 + number * LINE), line, INK, font)
    return page


def grid(cells: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[str], title: str) -> Image.Image:
    """A table of pictures, its rows and columns labelled.

    Args:
      cells: a row of [height, width, 3] uint8 pictures of one size for each of `rows`.
      rows, columns: what is written beside and above.
      title: above all, cut to three lines.
    """
    height, width = cells[0][0].shape[:2]
    font = writing.font(14, [title, *rows, *columns])
    left = MARGIN + max(math.ceil(font.getlength(label)) for label in rows) + MARGIN
    column = max(width, *(math.ceil(font.getlength(label)) for label in columns))
    lines = writing.lines(title, font, len(columns) * (column + MARGIN))
    top = MARGIN + len(lines) * 20 + 24
    page = Image.new("RGB", (left + len(columns) * (column + MARGIN), top + len(rows) * (height + MARGIN)), PAPER)
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        pen.text((left, MARGIN + number * 20), line, INK, font)
    for place, label in enumerate(columns):
        pen.text((left + place * (column + MARGIN) + width / 2, top - 8), label, INK, font, anchor="ms")
    for number, (label, line) in enumerate(zip(rows, cells)):
        y = top + number * (height + MARGIN)
        pen.text((left - MARGIN, y + height / 2), label, INK, font, anchor="rm")
        for place, cell in enumerate(line):
            x = left + place * (column + MARGIN)
            page.paste(Image.fromarray(cell), (x, y))
    return page
