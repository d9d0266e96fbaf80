"""The left/right swap of a caption, pure: what the picture's mirror image would be called.

In running captions a third of the lefts and rights are no sides ("cake left on a plate", "right next to"). Each one is
judged from the words around it: a side (swapped), another sense (kept), or in doubt, and then the sample must not be
flipped: better no flip than a wrong caption. A swap counts only if the swapped caption is judged the same way, word for
word, so swap(swap(x)) == x wherever there is a swap.

Some pictures must not be mirrored whatever the caption says of sides: lettering.py. The hand-labelled truth is
tests/encode/swap_table.txt; the words are in swap_words.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from encode import swap_words as W
from encode.lettering import obstacle
from encode.swap_words import OCCURRENCE, SIDE, split

RULES = 6  # version of the rules below, part of the data set's fingerprint


class Sense(Enum):
    SIDE = "side"
    OTHER = "other"
    DOUBT = "doubt"


def swap(caption: str) -> str | None:
    """The caption of the mirrored picture; the caption itself where it names no side; None: must not be flipped."""
    if obstacle(caption) is not None:
        return None
    if not SIDE.search(caption.lower()):
        return caption
    words = split(caption)
    senses = _senses(words)
    if Sense.DOUBT in senses.values():
        return None
    if Sense.SIDE not in senses.values():
        return caption
    swapped = "".join(
        _OPPOSITE_OF[match.group(1)] + match.group()[match.end(1) - match.start() :]
        if senses.get(index) is Sense.SIDE and (match := OCCURRENCE.fullmatch(word))
        else word
        for index, word in enumerate(words)
    )
    return swapped if _senses(split(swapped)) == senses else None


def doubt(caption: str) -> str:
    """Why a caption for which `swap` gives None must not be flipped: the words that are in the way."""
    found = obstacle(caption)
    if found is not None:
        return found
    doubtful = [word for word, sense in senses(caption) if sense is Sense.DOUBT]
    return doubtful[0] if doubtful else "the swapped caption would be read otherwise"


def senses(caption: str) -> list[tuple[str, Sense]]:
    """Every left and right of a caption with its sense, in order; for reports and tests."""
    words = split(caption)
    return [(words[index], sense) for index, sense in _senses(words).items()]


_OPPOSITE_OF = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}
_SIDES = ("left", "right")


# The sense of one left or right.


@dataclass(frozen=True)
class _Around:
    """One occurrence: the word in lower case and the lower-case words and signs around it, "" beyond the ends."""

    word: str
    before: list[str]  # five, the nearest last
    after: list[str]  # seven, the nearest first
    glued: tuple[bool, bool]  # no space before, none after
    contrast: bool  # the caption holds both a left and a right


def _senses(words: list[str]) -> dict[int, Sense]:
    """Sense of each occurrence by its index among the words."""
    solid = [index for index, word in enumerate(words) if not word.isspace()]
    lower = [words[index].lower().replace("’", "'") for index in solid]
    political = bool(W.POLITICS.intersection(lower))
    contrast = "left" in lower and "right" in lower
    found = {}
    for place, index in enumerate(solid):
        match = OCCURRENCE.fullmatch(words[index]) if words[index][0] in "lLrR" else None
        if match is None:
            continue
        before = [*[""] * 5, *lower[max(0, place - 5) : place]][-5:]
        after = [*lower[place + 1 : place + 8], *[""] * 7][:7]
        glued = place > 0 and solid[place - 1] == index - 1, place + 1 < len(solid) and solid[place + 1] == index + 1
        around = _Around(match.group(1).lower(), before, after, glued, contrast)
        odd = match.group(1) not in _OPPOSITE_OF or match.group(2).lower() == "y"  # LeFt; Lefty, which may be a name
        town = words[index].istitle() and words[solid[min(place + 1, len(solid) - 1)]] == "Bank"  # of Paris
        if odd or town or (political and _politics(around)):
            found[index] = Sense.DOUBT
        else:
            found[index] = Sense.SIDE if match.group(2) or match.group(3) else _judge(around)
    return found


def _politics(around: _Around) -> bool:
    """Where politics is spoken of: the far right, of the left, the left wing."""
    near = around.before[-1] if around.before[-1] != "-" else around.before[-2]
    of_the = around.before[-2:] == ["of", "the"] and around.after[0] in W.PAUSE
    return near in W.POLITICAL or near in W.POLITICS or of_the or "wing" in around.after[:2]


def _judge(around: _Around) -> Sense:
    """From the surest sign to the weakest."""
    for rule in (_idiom, _hyphenated, _coordinated, _named_part, _owned, _appositive, _direction):
        sense = rule(around)
        if sense is not None:
            return sense
    if around.before[-1] in W.PICTURES and around.before[-2] in W.PAUSE:
        return Sense.DOUBT  # Frame left a woman sits by the window
    return _left(around) if around.word == "left" else _right(around)


def _idiom(around: _Around) -> Sense | None:
    """Senses that a side's sure signs would drown: right angles, right of way, right-hand man, left half full."""
    before, after = around.before, around.after
    words = [word for word in after if word != "-"] if around.glued[1] else after
    if words[:2] in (["hand", "man"], ["hand", "woman"]):
        return Sense.OTHER if around.word == "right" else Sense.DOUBT
    if words[:2] in (["turn", "of"], ["and", "proper"], ["and", "wrong"]) or (
        words[0] == "of" and before[-1] in W.CLAIMS
    ):
        return Sense.DOUBT
    if "wrong" in before or "wrong" in after or (words[0] == "foot" and not W.STARTING.isdisjoint(before)):
        return Sense.DOUBT
    if words[:2] == ["side", "of"] and not W.WAKING.isdisjoint(words):
        return Sense.DOUBT
    if (words[0] == "leaning" and words[1] in W.LEANERS) or (words[0] == "hands" and before[-2:] == ["in", "the"]):
        return Sense.DOUBT
    if words[0] == "feet" and before[-1] == "two":
        return Sense.OTHER if around.word == "left" else Sense.DOUBT
    if words[:2] == ["side", "of"] and not W.CLOTHS.isdisjoint(words[2:6]):
        return Sense.OTHER if around.word == "right" else Sense.DOUBT
    if words[0] == "half" and (words[1] in W.HALVES or words[1:3] == ["-", "eaten"]):
        return Sense.OTHER if around.word == "left" else Sense.DOUBT
    if after[0] in W.FIELDS and after[1].removesuffix("'s") not in W.PARTS:
        return Sense.DOUBT
    if around.word == "left":
        return Sense.OTHER if words[0] in W.LEFT_NOUNS else None
    if words[0] in W.RIGHT_NOUNS or words[:2] in (["side", "up"], ["side", "out"]):
        return Sense.OTHER
    if words[0] == "of" and (words[1] in W.RIGHT_OF or words[1:3] == ["first", "refusal"]):
        return Sense.OTHER
    judged = before[-1] == "own" or (before[-1] == "just" and words[0] == "for")
    return Sense.OTHER if judged or (words[0] == "to" and words[1] in W.RIGHT_TO) else None


_HYPHENED = (W.PARTS - {"wing", "wings"}) | W.AFTER_PLACE | W.MOTIONS | W.HYPHENED
_PLACED = W.PARTS | W.AFTER_PLACE | W.FOLLOW | W.THINGS | W.BETWEEN


def _hyphenated(around: _Around) -> Sense | None:
    """Compounds: top-left, left-facing, left/right, left-over; None where there is no hyphen."""
    before, after = around.before, around.after
    if around.glued[1] and after[0] in ("-", "/", "‑", "–"):
        if after[1] in _HYPHENED:
            return Sense.SIDE
        if around.word == "left" and after[1] in ("over", "overs", "behind"):
            return Sense.OTHER
        return None if after[0] == "–" else Sense.DOUBT
    if around.glued[0] and before[-1] in ("-", "/", "‑"):
        if before[-2] in W.POLITICAL and not _settled(after, _PLACED):
            return Sense.DOUBT  # far-right extremists
        known = W.PLACES | W.AFTER_PLACE | W.VIEWS | {"left", "right", "to", "half", "side"}
        return Sense.SIDE if before[-2] in known else Sense.DOUBT
    return None


def _settled(after: list[str], known: frozenset[str]) -> bool:
    return after[0] in W.PAUSE or after[0] in known or after[0] == "-"


def _coordinated(around: _Around) -> Sense | None:
    """left and right, left to right, left, centre, right: the other side stands next to it."""
    joints = ("and", "or", "to", ",", "&", "-", "–", "—", "/", "|", "then")
    pieces = (*joints, "the", "centre", "center", "middle")
    for words, ahead in ((around.after, True), (around.before[::-1], False)):
        reach = next((place for place, word in enumerate(words) if word not in pieces), len(words))
        if reach == 0 or reach == len(words) or words[reach] not in _SIDES or words[reach] == around.word:
            continue
        if words[0] not in joints and not (words[0] == "the" and not ahead and words[1] in joints):
            continue
        last = (words[reach + 1 : reach + 2] if ahead else around.after[:1]) or [""]  # what follows the pair
        if last[0] == "?" or ("," in words[:reach] and last[0] in W.VERY | W.RIGHT_NOUNS):
            continue  # a dog left, right next to the door
        if ahead and words[reach - 1] == "the" and last[0] in W.CORRECT | W.RIGHT_NOUNS:
            continue  # turned left and the right way round
        return Sense.SIDE
    return None


def _named_part(around: _Around) -> Sense | None:
    """left hand, right front paw, left side of, the lower left jar."""
    before, after = around.before, around.after
    part = after[0].removesuffix("'s")
    if part in W.PARTS and after[1] == "for" and before[-1] in ("the", "a") and before[-2] not in W.BEFORE:
        return Sense.DOUBT  # the right lens for portraits
    owned = before[-1] in W.OWNERS or before[-1].endswith(("'s", "s'"))
    if around.word == "left" and part in W.PARTS and not owned:
        limb = before[-1] in W.HAVING and part in W.LIMBS
        if after[1] in W.TRACES or (before[-1] in W.LEAVERS and not limb):
            return Sense.DOUBT  # a dog left paw prints; someone left door open
    if part in W.PARTS or (part in ("fork", "exit") and before[-2] in ("take", "takes", "taking", "took")):
        return Sense.SIDE
    if after[0] in W.BETWEEN and after[1].removesuffix("'s") in W.PARTS:
        return Sense.SIDE
    if after[0] in W.AFTER_PLACE and after[1] in W.PAUSE | {"corner", "of", "part", "side"}:
        return Sense.SIDE
    if part in W.THINGS and before[-1] in W.PLACES:
        return Sense.SIDE
    if before[-2] in W.BEFORE:
        return None
    settled = _settled(after[1:], W.FOLLOW - {"to"}) or after[1].endswith("ed") or after[1] == "half"
    if part in W.THINGS and before[-1] in W.OWNERS and settled:
        its = before[-1] in ("his", "her", "its", "their") and part == "one"
        subject = before[-2] in W.PAUSE | {"and", "while", "but", "behind", "beside"}
        return Sense.SIDE if its or (subject and (part != "one" or around.contrast)) else Sense.DOUBT
    return None


def _owned(around: _Around) -> Sense | None:
    """What stands before decides: on the left, to its right, the man's left, top left."""
    before, after = list(around.before), around.after
    ends = after[0] in W.PAUSE
    view = before[-1] in W.VIEWS and (ends or after[0] == "of" or before[-2] in W.BEFORE)
    placed = before[-1] in W.PLACES or (view and before[-2] not in W.OWNERS | W.FEW | {"last", "any", "first"})
    if placed:
        before = ["", *before[:-1]]
    owner = before[-1] in W.OWNERS or (
        before[-1].endswith(("'s", "s'")) and before[-1] not in ("that's", "it's", "what's")
    )
    run_together = before[-2].endswith(("ingto", "ingon"))  # standingto the left
    if owner and (run_together or before[-2] in W.BEFORE | {"down", "up"}):
        if after[0] in W.CORRECT or (before[-2] in W.BEFORE - W.SURE_BEFORE):
            # In the bottom right a fox:
            first = placed and before[-3] in W.PAUSE and after[0] in ("a", "an", "the", "two")
            follows = first or ends or after[0] in W.FOLLOW or after[0].endswith(("ing", "ed"))
            return Sense.SIDE if follows else Sense.DOUBT
        fits = after[0].isalpha() and (after[1] == "for" or (before[-3] in W.ARRIVING and after[1] in W.PAUSE))
        return Sense.DOUBT if fits else Sense.SIDE  # got on the right bus
    if owner and after[0] == "of":
        pair = after[1:3] in (["the", "two"], ["the", "three"])
        scene = around.before[-2] in W.PAUSE and not W.SCENES.isdisjoint(after[1:3])
        return Sense.SIDE if placed or pair or scene else Sense.DOUBT
    if owner:
        if before[-2] == "of" and ends and not placed:
            return Sense.DOUBT
        if around.word == "right" and after[1] == "for" and after[0].isalpha():
            return Sense.OTHER
        return Sense.SIDE if ends or after[0] in W.FOLLOW - {"to"} else Sense.DOUBT
    if placed or before[-1] in W.BEFORE:
        beside = {"in", "on", "at", "beside", "behind", "near", "under", "above", "below"}
        if before[-1] == "at" and not placed and after[0] in ("a", "an", "the", "two"):
            return Sense.SIDE
        sure = not placed and (before[-1] == "at" or (before[-1] == "from" and before[-2] in W.ORDINALS))
        if ends or after[0] in W.FOLLOW - beside or (after[0].endswith("ing") and not placed):
            return Sense.SIDE
        return Sense.SIDE if sure and after[0] in beside - {"behind"} else Sense.DOUBT
    return None


def _appositive(around: _Around) -> Sense | None:
    """Set apart by signs: (left), "Left: a cat", "the woman, right, smiles", "man left, woman right"; three-quarter left."""
    before, after = around.before, around.after
    if not after[0] and not before[-1]:
        return Sense.SIDE
    if before[-1] in ("(", "[") and after[0] in W.PAUSE:
        return Sense.SIDE
    if before[-1] in ("", ".") and after[0] == "," and after[1] in W.SPOKEN:
        return Sense.DOUBT  # Right, here is a dog
    if before[-1] in ("", ".", ";", ":") and after[0] in W.PAUSE - {"?", "!"}:
        return Sense.SIDE
    if after[0] == ":" and not before[-1].isalpha():
        return Sense.SIDE
    if before[-1] == "," and before[-2].isalpha() and after[0] in (",", ".", ";", ")", ""):
        return Sense.SIDE
    if before[-3:] == ["three", "-", "quarter"] and after[0] in W.PAUSE:
        return Sense.SIDE
    other = "right" if around.word == "left" else "left"
    plain = W.JUDGED | W.DOING | {"is", "are", "was", "were", "it", "that"}
    if after[0] in (",", ";") and other in after[2:4] and not plain & set(after[1:4]) and before[-1].isalpha():
        behind = after[after.index(other) + 1 :]
        return Sense.SIDE if behind and behind[0] in W.PAUSE - {"?"} and before[-1] not in plain else None
    both = other in after[3:5] or (other in before[:3] and after[0] in before)
    if both and before[-1] in (",", ":", "and") and after[0] in ("in", "with"):  # left in red, right in blue
        return Sense.SIDE
    paired = [place for place in (-3, -4) if before[place] == other and before[place + 1] in (",", ";")]
    if paired and after[0] in W.PAUSE - {"?"} and not plain & set(before[paired[0] :]):
        return Sense.SIDE if before[-1].isalpha() and before[paired[0] - 1] not in plain | W.FEW else None
    return None


def _direction(around: _Around) -> Sense | None:
    """Where something turns, looks or leans; "left of" a thing."""
    before, after = around.before, around.after
    if before[-1] in W.MOTIONS and (after[0] in W.PAUSE or after[0] in ("and", "while", "with", "or", "of")):
        return Sense.SIDE
    if before[-1] in W.POSED and after[0] in W.PAUSE:
        return Sense.SIDE
    very = any(tuple(after[1 : 1 + len(phrase)]) == phrase for phrase in W.RIGHT_PHRASES.get(after[0], ()))
    if before[-1] in W.BEARINGS and not very:
        if after[0] in W.AFTER_BEARING:
            return Sense.SIDE
        if after[0] == "at" and W.CROSSINGS & set(after[2:4]):
            return Sense.SIDE
    idiom = {"what", "that", "nothing", "little", "much", "all", "remains", "what's", "anything"}
    if after[0] == "of" and not idiom & set(before[-3:]):
        rest = around.word == "left" and before[-1] in W.BEING and W.RESTS & set(before)
        return Sense.DOUBT if rest else Sense.SIDE  # only half is left of the cake
    return None


def _left(around: _Around) -> Sense:
    """The participle or the verb, or a doubt."""
    before, after = around.before, around.after
    if before[-1] in W.MOTIONS:
        return Sense.DOUBT
    if after[:2] == ["in", "the"] and after[2] in W.GROUNDS:
        return Sense.DOUBT
    if before[-1] in W.STANCES or (before[-1] in W.PERSONS and after[0] in W.LEFT_DOING | {"in"}):
        return Sense.DOUBT  # A church stands left by the road; woman left in a red dress
    if before[-1] in W.LEFT_HELPERS and after[0] in W.LEFT_ON_HELPED:
        return Sense.OTHER
    if after[0] in W.PAUSE:
        few = not around.contrast and W.FEW & set(before[1:])
        return Sense.OTHER if few or before[-1] in W.REMAINDERS | W.GOERS else Sense.DOUBT
    if after[0] == "to" and after[1] not in W.OWNERS:
        return Sense.OTHER if after[1] not in W.PAUSE else Sense.DOUBT
    if after[0] == "of" or after[:2] in (["all", "over"], ["all", "around"]):
        return Sense.OTHER
    if before[-1] in W.PAUSE | W.OWNERS:
        return Sense.DOUBT
    if after[0] in W.LEFT_DOING:
        return Sense.DOUBT if around.contrast else Sense.OTHER
    return Sense.OTHER if after[0] in W.LEFT_ON else Sense.DOUBT


def _right(around: _Around) -> Sense:
    """The intensifier ("right next to"), the judgement ("all right"), or a doubt."""
    before, after = around.before, around.after
    if any(tuple(after[1 : 1 + len(phrase)]) == phrase for phrase in W.RIGHT_PHRASES.get(after[0], ())):
        return Sense.OTHER
    if after[0] in W.VERY:
        on = after[0] in ("next", "through", "past") or (after[0] == "around" and after[1] in W.PAUSE | {"and"})
        going = before[-1] in (W.BEARINGS if on else W.MOTIONS) and after[0] not in ("around", "next")
        return Sense.DOUBT if going or (before[-1] in W.MOTIONS and not on) else Sense.OTHER
    if before[-1] in W.RESTING and after[0] == "on":
        return Sense.OTHER
    if before[-1] in W.JUDGED and (after[0] in W.PAUSE or before[-1] in ("miss", "mr")):
        return Sense.OTHER
    if before[-1] == "," and after[0] == "?":
        return Sense.OTHER
    if before[-2] in W.DOING and (after[0] in W.PAUSE or after[:2] == ["the", "first"]):
        return Sense.OTHER
    return Sense.DOUBT
