"""The numbers of the page about a data set are NumPy's and the records'; its drawings put them where they belong."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from encode import charts, facts, mirrored
from encode.source import Problem


def test_a_file_with_two_problems_counts_once_and_a_line_is_no_file():
    rows = [
        Problem(name, "caption", "x") for name in ("a.png", "a.png", "sub/metadata.jsonl:7", "metadata.jsonl", "b.png")
    ]
    found = facts.account(["b.png", "c.png"], rows, {"mov": 3, "": 1})
    assert (found.files, found.encoded, found.refused, found.others, found.lines) == (7, 2, 1, 4, 2)


def test_reasons_are_grouped_by_what_they_have_in_common():
    rows = [
        Problem("a.png", "caption", "x: y.txt: the caption is empty"),
        Problem("b.png", "caption", "deep/b.txt: the caption is empty"),
        Problem("c.png", "caption", "c.txt: not UTF-8 (byte 3)"),
        Problem("d.png", "caption", "d.txt: not UTF-8 (byte 40)"),
        Problem("e.png", "decode", "truncated: 13 bytes missing"),
        Problem("f.png", "decode", "truncated: 14 bytes missing"),
        Problem("g.png", "aspect ratio", "aspect ratio 640:40 is 4.00 times off the nearest bucket, 1.5"),
        Problem("m:1", "caption", "names a: b.png, which is not among the pictures"),
    ]
    found = {(stage, kind): len(group) for stage, kind, group in facts.reasons(rows[1:])}
    assert found == {
        ("caption", "not UTF-8"): 2,
        ("decode", "truncated"): 2,
        ("caption", "the caption is empty"): 1,
        ("aspect ratio", "aspect ratio"): 1,
        ("caption", "names a file that is not among the pictures"): 1,
    }
    assert sum(len(group) for _, _, group in facts.reasons(rows)) == len(rows)


def test_a_padded_picture_is_not_counted_as_stretched():
    jobs = [SimpleNamespace(shape=(8, 8), entries=(("a", 110, 100), ("b", 300, 100), ("refused", 1, 1)))]
    parts = [{"records": [["a", "0", 3, 3, [128, 256]], ["b", "1", 4, 0, [128]]]}]
    a, b = facts.pictures(jobs, parts, 1.5)
    assert (a.stretch, a.padded, a.resolutions) == (pytest.approx(1.1), False, (128, 256))
    assert (b.stretch, b.padded, b.resolutions) == (1.0, True, (128,))


def test_quantiles_are_numpys():
    values = np.random.default_rng(0).gamma(2, size=999)
    assert facts.spread(values) == pytest.approx((np.median(values), np.quantile(values, 0.95), values.max()))


@pytest.mark.parametrize("longest", [1, 48, 49, 512])
def test_token_classes_hold_every_caption_once(longest):
    lengths = [*np.random.default_rng(longest).integers(1, longest + 1, 500).tolist(), longest]
    counts, width = facts.token_classes(lengths)
    assert len(counts) <= 48
    assert counts.sum() == 501
    assert counts[0] == sum(length <= width for length in lengths)


def test_swap_decisions_tell_the_switched_off_from_the_doubtful():
    texts = {"a": "on the left", "b": "cake left on a plate", "c": "a cat", "d": '"turn left"', "e": "on the right"}
    kinds = facts.swap_decisions(texts, mirrored.decide(texts), ["e"])
    assert kinds == {facts.SWAPPED: ["a"], facts.KEPT: ["b"], facts.PLAIN: ["c"], facts.DOUBT: ["d"], facts.OFF: ["e"]}


def test_three_deviations_are_three():
    latent = np.array([2.9, -2.9, 3.1, -3.1, -5.0, 0.0]).reshape(2, 3, 1) * 2 + 7
    found = facts.latents([{"latent": latent, "mask": np.zeros((0, 0))}], [7.0], [2.0])
    assert (found.beyond[0], found.counts.sum(), found.total) == (3, 5, 6)


def test_histograms_leave_padding_out():
    latent = np.zeros((2, 2, 1))
    latent[0] = 1
    rows = [{"latent": latent, "mask": np.array([[1, 1], [0, 0]], np.uint8)}]
    found = facts.latents(rows, [1.0], [0.1])
    assert (found.total, found.counts.sum()) == (2, 2)
    rows = [{"latent": latent, "mask": np.zeros((0, 0), np.uint8)}]
    found = facts.latents(rows, [1.0], [0.1])
    assert (found.total, found.counts.sum(), found.beyond[0]) == (4, 2, 2)


def test_the_sizes_are_drawn_where_they_belong():
    dots = facts.dots([(512, 512)] * 3 + [(1024, 256)])
    assert dots == [(512, 512, 3), (1024, 256, 1)]
    drawn = charts.plane(dots, [("512 x 512", 1.0)], [512], 1.5)
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', drawn)
    (x1, y1, r1), (x2, y2, r2) = (map(float, circle) for circle in circles)
    assert x2 - x1 == pytest.approx(y2 - y1, abs=0.2)  # twice as wide, half as high: as far to the right as down
    assert x2 > x1
    assert r1 / r2 == pytest.approx(math.sqrt(3), rel=0.02)  # the area is the count
    (ax, ay, bx, by) = map(float, re.search(r'x1="(\S+)" y1="(\S+)" x2="(\S+)" y2="(\S+)" class="ray"', drawn).groups())
    assert (
        abs((bx - ax) * (ay - y1) - (ax - x1) * (by - ay)) / math.hypot(bx - ax, by - ay) < 0.3
    )  # the square is on its ray
    (ax, ay, bx, by) = map(
        float, re.search(r'x1="(\S+)" y1="(\S+)" x2="(\S+)" y2="(\S+)" class="area"', drawn).groups()
    )
    for x, y in ((x1, y1), (x2, y2)):  # both have the area of 512 x 512
        assert abs((bx - ax) * (ay - y) - (ax - x) * (by - ay)) / math.hypot(bx - ax, by - ay) < 0.3


def test_many_sizes_are_rounded_and_none_is_lost():
    rng = np.random.default_rng(1)
    sizes = [tuple(size) for size in rng.integers(200, 6000, (20_000, 2)).tolist()]
    dots = facts.dots(sizes)
    assert len(dots) <= facts.DOTS
    assert sum(count for _, _, count in dots) == 20_000
