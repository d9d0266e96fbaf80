"""The left/right swap: sides are swapped, other senses kept, doubts never flipped, and twice is nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.captions import Sense, senses, swap

SWAPPED = [
    ("a toy to the left of a cat", "a toy to the right of a cat"),
    ("LEFT", "RIGHT"),
    ("Left-hand", "Right-hand"),
    ("left-handed", "right-handed"),
    ("left's", "right's"),
    ("left/right", "right/left"),
    ("left,right", "right,left"),
    ("top-left", "top-right"),
    ("bottom right", "bottom left"),
    ("the leftmost tree, walking leftwards", "the rightmost tree, walking rightwards"),
    ("A man on the left, facing right.", "A man on the right, facing left."),
    ("Left: a cat. Right: a dog", "Right: a cat. Left: a dog"),
    ("her left hand on her hip, a dog at her right", "her right hand on her hip, a dog at her left"),
    ("his right front paw", "his left front paw"),
    ("from left to right", "from right to left"),
    ("in the lower left corner", "in the lower right corner"),
    ("the man’s left", "the man’s right"),
    ("two women (left) and a child (right)", "two women (right) and a child (left)"),
    ("to the far left is a tree", "to the far right is a tree"),
    ("a dog on the left and cake left on a plate", "a dog on the right and cake left on a plate"),
    ("a cat left of a dog, right behind a fence", "a cat right of a dog, right behind a fence"),
]
KEPT = [
    "A piece of cake left on a plate",
    "Cat sitting right next to keyboard on laptop",
    "panels arranged at right angles",
    "waits for the right moment",
    "a car that crashed right through the wall",
    "a bright copyright, upright, with cleft leftovers and human rights",
    "he left the room",
    "what is left of the castle",
    "bags left behind",
    "looking right at the camera",
    "a right-angled bracket",
    "the right side up cake",
    "a dog",
    "",
]
DOUBTFUL = [
    "two slices left",
    'a sign that says "TURN LEFT"',
    "on the right track",
    "the right person",
    "a plate left in the picture",
    "LeFt",
    "a clock running counter-clockwise",
    "ein Hund auf der linken Seite",
    "猫在左边",
]


@pytest.mark.parametrize(("caption", "expected"), SWAPPED)
def test_sides_are_swapped_with_their_case(caption, expected):
    assert swap(caption) == expected
    assert swap(expected) == caption


@pytest.mark.parametrize("caption", KEPT)
def test_other_senses_stay(caption):
    assert swap(caption) == caption


@pytest.mark.parametrize("caption", DOUBTFUL)
def test_a_doubt_forbids_the_flip(caption):
    assert swap(caption) is None


LINE = (
    "left right Left RIGHT left-hand leftmost top-left right's the a his on to at in from of and or , . : ( ) / - \" side "
    "hand corner cat plate next behind angles is was has turns facing looking top bottom front man's what up through ' left, | \n"
)
WORDS = [*LINE.split(" "), "to the left", "on the right of the"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12), st.sampled_from([" ", " ", ""]))
def test_twice_is_nothing(words, joint):
    caption = joint.join(words)
    swapped = swap(caption)
    assert swapped is None or swap(swapped) == caption


@given(st.text(max_size=60))
def test_any_text_keeps_everything_but_its_sides(caption):
    swapped = swap(caption)
    assert swapped is None or swapped == caption or Sense.SIDE in [sense for _, sense in senses(caption)]
