"""Words in a picture: a font that has their letters, and lines that fit a width."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable

from PIL import ImageFont

LINES = 3
# Asked for by name in the system's folders, where Pillow's own font (ASCII, a few signs) lacks a letter.
INSTALLED = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "Arial.ttf",
    "arial.ttf",
    "msyh.ttc",
)


def font(size: int, words: Iterable[str]) -> ImageFont.FreeTypeFont:
    """The first font with all letters of the words: Pillow's own, else one that the system has; the widest where none has all."""
    letters = {letter for text in words for letter in text if not letter.isspace()}
    return min(_fonts(size), key=lambda found: sum(_missing(found, letter) for letter in letters))


@functools.cache
def _fonts(size):
    found = [ImageFont.load_default(size)]
    for name in INSTALLED:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return found


@functools.cache
def _missing(font, letter):
    """Whether the letter would be drawn as the box of what is no character."""
    return bytes(font.getmask(letter)) == bytes(font.getmask("\uffff"))


def lines(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in at most three lines no wider than so many pixels, with an ellipsis where it is cut."""
    found, rest = [], " ".join(text.split())
    while rest and len(found) < LINES:
        longest = range(1, min(len(rest), int(width)) + 1)
        end = max(bisect.bisect_right(longest, width, key=lambda end: font.getlength(rest[:end])), 1)
        if end < len(rest) and len(found) == LINES - 1:
            return [*found, rest[: max(end - 1, 1)].rstrip() + "…"]
        cut = rest.rfind(" ", 0, end + 1) if end < len(rest) else end
        cut = cut if cut > 0 else end
        found.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return found
