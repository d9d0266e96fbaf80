"""The left/right swap of a caption, pure: what the picture's mirror image would be called.

In running captions a third of the lefts and rights are no sides ("cake left on a plate", "right next to"). Each one is
judged from the words around it: a side (swapped), another sense (kept), or in doubt, and then the sample must not be
flipped: better no flip than a wrong caption. A swap counts only if the swapped caption is judged the same way, word for
word, so swap(swap(x)) == x wherever there is a swap.
"""

from __future__ import annotations

import re
from enum import Enum

RULES = 1  # version of the rules below, part of the data set's fingerprint


class Sense(Enum):
    SIDE = "side"
    OTHER = "other"
    DOUBT = "doubt"


def swap(caption: str) -> str | None:
    """The caption of the mirrored picture; the caption itself where it names no side; None: must not be flipped."""
    words = _words(caption)
    senses = _senses(words)
    if Sense.DOUBT in senses.values() or _ASYMMETRIC.search(caption):
        return None
    if Sense.SIDE not in senses.values():
        return caption
    swapped = "".join(
        _OPPOSITE_OF[match.group(1)] + match.group()[match.end(1) - match.start() :]
        if senses.get(index) is Sense.SIDE and (match := _OCCURRENCE.fullmatch(word))
        else word
        for index, word in enumerate(words)
    )
    return swapped if _senses(_words(swapped)) == senses else None


def senses(caption: str) -> list[tuple[str, Sense]]:
    """Every left and right of a caption with its sense, in order; for reports and tests."""
    words = _words(caption)
    return [(words[index], sense) for index, sense in _senses(words).items()]


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\s+|\d+|.", re.DOTALL)
_OCCURRENCE = re.compile(r"(left|right)((?:most|wards?|hand|handed|hander|handers|side|y)?)(['’]s)?", re.IGNORECASE)
_OPPOSITE_OF = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}
# A side in another language, or a word whose mirror image is another word that is not left or right.
_ASYMMETRIC = re.compile(
    r"左|右|왼쪽|오른쪽|слев|справ|левы|правы|\b(?:(?:counter-?|anti-?)?clockwise|starboard|gauche|izquierd[ao]|derech[ao]|"
    r"esquerd[ao]|direit[ao]|sinistr[ao]|linken|linke[rs]?|rechten?|rechts)\b",
    re.IGNORECASE,
)

_OWNERS = _set("the his her its their my your our a this that each one both either")
_PLACES = _set(
    "top bottom upper lower far mid middle center centre front back rear near nearest immediate extreme outer inner stage "
    "house screen camera frame image picture viewer hind very direct"
)
_AFTER_PLACE = _set("top bottom upper lower center centre middle foreground background")
_BEFORE = _set("on to at from toward towards in into off along")
_SURE_BEFORE = _set("on to from toward towards off")
_MOTIONS = _set(
    "facing faces face faced looking looks look looked turning turned turns turn pointing points point pointed heading "
    "headed heads head moving moves move moved walking walks walk running runs run leaning leans lean leant tilting tilted "
    "tilts bending bends bent swinging flying flies sailing sails driving drives going goes traveling travelling travels "
    "veering veers curving curves gazing gazes gaze glancing glances staring stares angled shifted rotated slightly"
)
_PARTS = _set(
    "side sides hand hands arm arms leg legs foot feet eye eyes ear ears shoulder corner corners edge half third quarter "
    "wing wheel lane border part portion section wall bank panel hemisphere knee cheek thigh wrist ankle paw paws hoof "
    "horn elbow hip breast chest page profile margin door window end foreground background quadrant column sleeve pocket "
    "shoe boot glove sock thumb finger claw fin headlight tower turn eyebrow nostril temple forearm bicep palm fist heel "
    "toe hindleg foreleg forepaw flank tusk antler mirror image frame handside area facing"
)
_BETWEEN = _set("front back rear hind upper lower top bottom outer inner hand side index middle ring little big")
_FOLLOW = _set(
    "of and or is are was were in with while on at as by has have holds shows stands sits stand sit lies appears can there "
    "where who which that beside behind near under above below from has wears walks looks faces but also then to we you"
)
_RIGHT_NOUNS = _set(
    "angle angles angled triangle triangles moment time place size answer choice amount whale whales way kind thing things "
    "conditions mood tool tools word words reason balance fit idea mix attitude people"
)
_CORRECT = _set("track path note course road day people person man woman foot one level scale")
_LEFT_HELPERS = _set(
    "has have had having was were is are be been being gets got get getting just recently already never who they he she it "
    "we i people someone everyone everybody nobody accidentally carelessly what's that's remains"
)
_LEFT_ON = _set(
    "on in at by under behind out over alone open unattended outside inside empty abandoned unfinished untouched unused "
    "uneaten hanging beside near against the a an his her their its some after from for"
)
_LEFT_ON_HELPED = _LEFT_ON | _set("with without standing sitting lying to it them him me us my no only half")
_VERY = _set(
    "next beside behind above below under underneath beneath across before after away now here there through up down out "
    "off into onto over against around along outside inside between near when as past alongside among"
)
_RIGHT_PHRASES = {
    "in": (("front",), ("the", "middle"), ("the", "center"), ("the", "centre"), ("the", "heart"), ("the", "midst")),
    "on": (("top",), ("time",), ("cue",), ("the", "edge"), ("the", "spot"), ("the", "money")),
    "at": (("home",), ("the", "edge"), ("the", "camera"), ("the", "viewer"), ("the", "end"), ("the", "start"),
           ("the", "entrance"), ("you",), ("me",), ("us",)),
    "to": (("the", "edge"), ("the", "top"), ("the", "end")),
}  # fmt: skip
_PAUSE = _set(". , ; : ! ? ) ] — – …") | {""}


def _words(caption: str) -> list[str]:
    return _WORD.findall(caption)


def _senses(words: list[str]) -> dict[int, Sense]:
    """Sense of each occurrence by its index among the words."""
    solid = [index for index, word in enumerate(words) if not word.isspace()]
    lower = [words[index].lower().replace("’", "'") for index in solid]
    found, quoted = {}, False
    for place, index in enumerate(solid):
        if words[index] in '"“”„«»':
            quoted = not quoted
        match = _OCCURRENCE.fullmatch(words[index])
        if match is None:
            continue
        glued = place > 0 and solid[place - 1] == index - 1, place + 1 < len(solid) and solid[place + 1] == index + 1
        if match.group(1) not in _OPPOSITE_OF or quoted:  # odd capitals; or writing within the picture
            found[index] = Sense.DOUBT
        else:
            found[index] = _judge(lower, place, match.group(1).lower(), bool(match.group(2) or match.group(3)), glued)
    return found


def _judge(words: list[str], place: int, word: str, compound: bool, glued: tuple[bool, bool]) -> Sense:
    """Sense of the word at `place` among the lower-case words and signs of its caption."""
    before = [*["", "", ""], *words[max(0, place - 3) : place]][-3:]
    after = [*words[place + 1 : place + 5], *[""] * 4][:4]
    if compound:
        return Sense.SIDE
    hyphen = _hyphenated(word, before, after, glued)
    if hyphen is not None:
        return hyphen
    if _coordinated(before, after):
        return Sense.SIDE
    if word == "right" and (after[0] in _RIGHT_NOUNS or after[:2] in (["side", "up"], ["side", "out"])):
        return Sense.OTHER
    if _named_part(after):
        return Sense.SIDE
    owned = _owned(word, before, after)
    if owned is not None:
        return owned
    return _left(before, after) if word == "left" else _right(before, after)


def _hyphenated(word: str, before: list[str], after: list[str], glued: tuple[bool, bool]) -> Sense | None:
    """Compounds: top-left, left-facing, left/right, left-over; None where there is no hyphen."""
    if glued[1] and after[0] in "-/‑" and after[0]:
        if word == "right" and after[1] in _RIGHT_NOUNS:
            return Sense.OTHER
        sides = _set("most handed hander ward wards sided eyed left right to")
        if after[1] in (_PARTS - {"wing"}) | _AFTER_PLACE | _MOTIONS | sides:
            return Sense.SIDE
        if word == "left" and after[1] in ("over", "overs", "behind"):
            return Sense.OTHER
        return Sense.DOUBT
    if glued[0] and before[2] in "-/‑" and before[2]:
        return Sense.SIDE if before[1] in _PLACES | _AFTER_PLACE | _set("left right to half side") else Sense.DOUBT
    return None


def _coordinated(before: list[str], after: list[str]) -> bool:
    """left and right, left to right, left, right: the other side stands next to it."""
    sides, joints = ("left", "right"), ("and", "or", "to", ",", "&", "-", "/", "then")
    ahead = after[0] in joints and (after[1] in sides or (after[1] == "the" and after[2] in sides))
    behind = before[2] in joints and before[1] in sides
    behind |= before[2] == "the" and before[1] in joints and before[0] in sides
    return ahead or behind


def _named_part(after: list[str]) -> bool:
    """left hand, right front paw, left side of."""
    if after[0].removesuffix("'s") in _PARTS:
        return True
    return (after[0] in _BETWEEN and after[1].removesuffix("'s") in _PARTS) or (
        after[0] in _AFTER_PLACE and after[1] in _PAUSE | {"corner", "of", "part", "side"}
    )


def _owned(word: str, before: list[str], after: list[str]) -> Sense | None:
    """What stands before decides: on the left, to its right, the man's left, top left, turns left, "Left: a cat"."""
    ends = after[0] in _PAUSE
    words = list(before)
    placed = words[2] in _PLACES
    if placed:
        words = ["", *words[:2]]
    owner = words[2] in _OWNERS or (words[2].endswith(("'s", "s'")) and words[2] not in ("that's", "it's", "what's"))
    if owner and words[1] in _BEFORE:
        sure = (
            (words[1] in _SURE_BEFORE and after[0] not in _CORRECT)
            or ends
            or after[0] in _FOLLOW
            or after[0].endswith(("ing", "ed"))
        )
        return Sense.SIDE if sure else Sense.DOUBT
    if owner and (ends or after[0] in _FOLLOW - {"to"}):
        return Sense.SIDE
    if owner:
        return Sense.DOUBT
    if placed or words[2] in _BEFORE:
        if ends or after[0] in _FOLLOW - {"in", "on", "at", "beside", "behind", "near", "under", "above", "below"}:
            return Sense.SIDE
        return Sense.DOUBT
    if before[2] in ("(", "[") and after[0] in _PAUSE and after[0]:
        return Sense.SIDE
    if before[2] in ("", ".", ";") and ends:
        return Sense.SIDE
    if before[2] in _MOTIONS and (ends or after[0] in ("and", "while", "with", "or", "of", "toward", "towards")):
        return Sense.SIDE
    idiom = {"what", "that", "nothing", "little", "much", "all", "remains", "what's", "anything"}
    if after[0] == "of" and not idiom & set(before):
        return Sense.SIDE
    return None


def _left(before: list[str], after: list[str]) -> Sense:
    """The participle or the verb, or a doubt."""
    if before[2] in _MOTIONS:
        return Sense.DOUBT
    if after[:3] in (["in", "the", view] for view in ("image", "picture", "photo", "photograph", "frame", "scene")):
        return Sense.DOUBT
    if before[2] in _LEFT_HELPERS and after[0] in _LEFT_ON_HELPED:
        return Sense.OTHER
    if after[0] == "to" and after[1] not in _OWNERS:
        return Sense.OTHER if after[1] not in _PAUSE else Sense.DOUBT
    if after[0] == "of":
        return Sense.OTHER
    return Sense.OTHER if after[0] in _LEFT_ON and before[2] not in _PAUSE else Sense.DOUBT


def _right(before: list[str], after: list[str]) -> Sense:
    """The intensifier ("right next to"), the judgement ("all right"), or a doubt."""
    if any(tuple(after[1 : 1 + len(phrase)]) == phrase for phrase in _RIGHT_PHRASES.get(after[0], ())):
        return Sense.OTHER
    if after[0] in _VERY:
        return Sense.DOUBT if before[2] in _MOTIONS and after[0] not in ("next", "through") else Sense.OTHER
    if before[2] in ("all", "just", "quite", "not", "that's") and after[0] in _PAUSE:
        return Sense.OTHER
    return Sense.DOUBT
