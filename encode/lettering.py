"""Captions whose picture must not be mirrored whatever they say of sides, pure.

Lettering (a sign that says "STOP", the word LOVE, the number 7), the time on a clock, a map: their mirror image would teach
mirrored letters. And sides in words that captions.py does not swap: clockwise, starboard, L to R, other languages.
A sign or a clock that is only mentioned does not count.
"""

from __future__ import annotations

import re
import unicodedata

from encode import languages
from encode import swap_words as W
from encode.swap_words import OCCURRENCE, SIDE, split

_QUOTES = re.compile(r"(?<!\d)\"|[“”„«»「」『』《》〈〉‹›‚]|(?<!\w)['‘](?=\w)[^'’\n]{2,60}['’](?!\w)")
_QUOTED = re.compile(r"[\"“”„«「『《〈‹‚][^\"“”„»」』》〉›\n]{1,60}[\"“”»」』》〉›‘]")
_INITIALS = re.compile(
    r"[(\[][LR]\.?[)\]]|\b[LR]\.? ?(?:to|and|->|=>|[-–—/&→⟶➔]) ?[LR]\b|^\s*[LR]\s*:|"
    r"\b[LR]\.?[ -](?:hand|side|corner|arm|leg|foot|eye|ear)\b|\b(?:upper|lower|top|bottom)-[LR]\b",
    re.IGNORECASE,
)
# Words that hold a left or right and name none; any other such word ("topleft", "rightside", a typing error) is in doubt.
_HARMLESS = re.compile(
    r"\w*bright\w*|copyright\w*|upright\w*|\w*fright\w*|\w*wright\w*|(?:out|down|forth|birth|al|a)right\w*|sprightl\w+|"
    r"righteous\w*|rightful\w*|rightly|rightness|rights|cleft\w*|leftovers?"
)
_ELSEWHERE = re.compile(  # sides of a dial; Dutch and German compounds
    r"\b(?:\d{1,2}|one|two|three|four|five|seven|eight|nine|ten|eleven) ?o['’]?clock\b|\b(?:linker|rechter)[a-zß-ü]+\b",
    re.IGNORECASE,
)
_PAINTED = re.compile(  # a sign STOP; FedEx painted on it
    r"\b[Ss]igns?(?: \w+){0,2} [A-Z]{2,}\b|"
    r"\b[A-Z]\w+ (?:painted|printed|stamped|engraved|embroidered|stencill?ed|emblazoned) (?:on|across|along|in|over)\b"
)
_CLOSED = W.TURNING | W.TYPOS | W.LETTERING


def obstacle(caption: str) -> str | None:
    """What of a caption forbids the mirror image: lettering, times, maps, sides in other words; None if nothing does."""
    if not caption.isascii():
        caption = unicodedata.normalize("NFC", caption)
        if len(SIDE.findall(languages.plain(caption).lower())) != len(SIDE.findall(caption.lower())):
            return "a left or right in wide letters or with invisible signs"
    if foreign := languages.found(caption):
        return foreign
    for pattern in (_ELSEWHERE, _PAINTED, _QUOTES):
        if found := pattern.search(caption):
            whole = _QUOTED.match(caption, found.start()) if pattern is _QUOTES else None
            return (whole or found).group()
    solid = [word for word in split(caption) if not word.isspace()]
    lower = [word.lower().replace("’", "'") for word in solid]
    known = set(lower)
    closed = known & _CLOSED
    if known & W.CLOCKS and (known & W.TELLING or re.search(r"\d:\d\d", caption)):
        closed |= known & W.CLOCKS
    holding = {word for word in known if SIDE.search(word)}
    closed |= {
        word for word in holding if not (OCCURRENCE.fullmatch(word) or _HARMLESS.fullmatch(word.removesuffix("'s")))
    }
    if closed:
        return min(closed)
    if ("l" in known or "r" in known) and (found := _INITIALS.search(caption)):
        return found.group()
    shown = (place for place, word in enumerate(lower) if word in _SHOWN and _shown(solid, lower, place))
    place = next(shown, None)
    return None if place is None else " ".join(solid[place : place + 2])


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
        ends = (
            before[-1:] == ["to"] and after[0] in W.PAUSE and W.LISTING & set(before[-2:-1])
        )  # a boat listing to port
        return after[0] in W.SHIPS or (after[0] == "-" and after[1] in W.SHIPS) or bool(ends)
    if word == "music":
        return before[-1:] == ["sheet"]
    if after[0] in W.READERS and not W.CARRIERS & set(before[-1:]):
        return False
    return before[-1:] == ["that"] or bool(W.CARRIERS & set(before))
