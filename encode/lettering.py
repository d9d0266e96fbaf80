"""Captions whose picture must not be mirrored whatever they say of sides, pure.

Lettering (a sign that says "STOP", the word LOVE, the number 7), the time on a clock, a map: their mirror image would teach
mirrored letters. And sides in words that captions.py does not swap: clockwise, starboard, L to R, other languages.
A sign or a clock that is only mentioned does not count.
"""

from __future__ import annotations

import re
import unicodedata

from encode import swap_words as W
from encode.swap_words import OCCURRENCE, SIDE, split

_QUOTES = re.compile(r"(?<!\d)\"|[“”„«»]|(?<!\w)['‘](?=\w)[^'’\n]{2,60}['’](?!\w)")
_INITIALS = re.compile(r"[(\[][LR]\.?[)\]]|\b[LR]\.? ?(?:to|and|[-–/&]) ?[LR]\b|^\s*[LR]\s*:", re.IGNORECASE)
_RUN_TOGETHER = re.compile(
    r"(?:on|to|at|in|of|by|from)?(?:the|its|his|her)?(?:left|right)(?:side|hand|of|and|corner|most|is|the|with|in|on)*"
)
_OTHER_SCRIPTS = re.compile(
    r"左|右|왼|오른|лев|прав|αριστερ|δεξι|يسار|يمين|שמאל|ימין|बाए|बाईं|दाए|दाईं|ซ้าย|ขวา", re.IGNORECASE
)
_CLOSED = W.TURNING | W.FOREIGN | W.TYPOS | W.LETTERING
_QUOTING = frozenset("\"'‘“”„«»")


def unmirrored(caption: str) -> bool:
    """Lettering, times, maps; sides that are named in other ways than by left and right."""
    if not caption.isascii():
        caption = unicodedata.normalize("NFC", caption)
        if _OTHER_SCRIPTS.search(caption):
            return True
    solid = [word for word in split(caption) if not word.isspace()]
    lower = [word.lower().replace("’", "'") for word in solid]
    known = set(lower)
    if not known.isdisjoint(_CLOSED) or ("links" in known and known & W.GERMANIC):
        return True
    if not _QUOTING.isdisjoint(caption) and _QUOTES.search(caption):
        return True
    if ("l" in known or "r" in known) and _INITIALS.search(caption):
        return True
    if known & W.CLOCKS and (known & W.TELLING or re.search(r"\d:\d\d", caption)):
        return True
    if any(_RUN_TOGETHER.fullmatch(word) and not OCCURRENCE.fullmatch(word) for word in known if SIDE.search(word)):
        return True
    return not known.isdisjoint(_SHOWN) and any(
        _shown(solid, lower, place) for place, word in enumerate(lower) if word in _SHOWN
    )


_SHOWN = W.SAYING | {"number", "numbers", "letter", "port", "music"}


def _shown(solid: list[str], lower: list[str], place: int) -> bool:
    """Whether the word at `place` tells of lettering: a sign reading STOP, the number 7, the letter A; the port side."""
    word, after = lower[place], [*lower[place + 1 : place + 3], "", ""]
    before = lower[max(0, place - 5) : place]
    if word in ("number", "numbers"):
        return after[0].isdigit() or after[0] in W.NUMBERS or (word == "numbers" and after[0] != "of")
    if word == "letter":
        return len(after[0]) == 1 and solid[place + 1].isupper()
    if word == "port":
        return after[0] == "side" or after[:2] == ["-", "side"]
    if word == "music":
        return before[-1:] == ["sheet"]
    if after[0] in W.READERS and not W.CARRIERS & set(before[-1:]):
        return False
    return before[-1:] == ["that"] or bool(W.CARRIERS & set(before))
