"""Buckets: on the grid, near the area, the best set, one choice for all resolutions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode import buckets


@pytest.mark.parametrize(
    ("resolutions", "grid"),
    [((1024,), 64), ((512,), 32), ((256,), 16), ((128,), 16), ((256, 512, 1024), 64), ((128, 256), 32), ((384,), 32)],
)
def test_the_grid_scales_with_the_resolution(resolutions, grid):
    assert max(resolutions) // buckets.cells_across(resolutions) == grid


@pytest.mark.parametrize("resolutions", [(256, 512, 1024), (128, 1024), (384, 512), (192,), (320, 640)])
def test_every_side_is_whole_patches_and_the_aspect_the_same_everywhere(resolutions):
    cells = buckets.cells_across(resolutions)
    for shape in buckets.candidates(cells):
        sizes = [buckets.pixels(shape, cells, resolution) for resolution in resolutions]
        assert all(side % 16 == 0 for size in sizes for side in size)
        assert len({width / height for width, height in sizes}) == 1
        assert all(abs(width * height / r**2 - 1) <= 0.1 for (width, height), r in zip(sizes, resolutions))


@pytest.mark.parametrize("resolutions", [(100,), (16,), (256, 272)])
def test_resolutions_off_the_grid_are_refused(resolutions):
    with pytest.raises(ValueError, match="resolution"):
        buckets.cells_across(resolutions)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.3, 3.3), min_size=1, max_size=8), st.integers(1, 3))
def test_the_choice_is_the_best_of_all_sets(aspects, most):
    shapes = buckets.candidates(8)

    def cost(chosen):
        return sum(math.log(buckets.assign(aspect, chosen)[1]) for aspect in aspects)

    best = min(cost(chosen) for count in range(1, most + 1) for chosen in itertools.combinations(shapes, count))
    found = buckets.choose(aspects, most, 8)
    assert len(found) <= most
    assert cost(found) == pytest.approx(best, abs=1e-8)


def test_no_bucket_is_chosen_that_nothing_needs():
    assert buckets.choose([1.0] * 50, 8, 16) == [(16, 16)]
    assert buckets.choose([], 8, 16) == []
    shapes = buckets.choose([1.0] * 50 + [1.5] * 50 + [2 / 3] * 50, 8, 16)
    assert len(shapes) == 3


def test_distortion_is_the_ratio_of_the_aspects():
    assert buckets.assign(1.0, [(16, 16)]) == ((16, 16), 1.0)
    shape, distortion = buckets.assign(1.2, [(16, 16), (8, 32)])
    assert shape == (16, 16)
    assert distortion == pytest.approx(1.2)
    assert buckets.assign(1 / 1.2, [(16, 16)])[1] == pytest.approx(1.2)


def test_a_hundred_thousand_pictures_are_quick_and_well_served():
    rng = np.random.default_rng(0)
    aspects = rng.choice([3 / 2, 2 / 3, 4 / 3, 3 / 4, 1, 16 / 9], 100_000) * np.exp(rng.normal(0, 0.02, 100_000))
    shapes = buckets.choose(aspects, 12, 16)
    assert np.mean([buckets.assign(aspect, shapes)[1] for aspect in aspects[:2000]]) < 1.03


def test_the_least_resolution_is_64_and_three_cells_are_no_grid():
    assert buckets.cells_across((64,)) == 4
    with pytest.raises(ValueError, match="share no grid"):
        buckets.cells_across((96, 144))  # 32 and 48 pixels: three cells


@pytest.mark.parametrize("cells", [11, 13, 15, 16])
def test_no_bucket_is_narrower_than_one_to_four(cells):
    assert all(1 / 4 <= columns / rows <= 4 for columns, rows in buckets.candidates(cells))


def test_named_buckets_are_of_about_the_area_and_no_two_of_one_shape():
    with pytest.raises(ValueError, match="the area is not near that of 1024x1024"):
        buckets.forced([(2048, 2048)], 16, 1024)
    with pytest.raises(ValueError, match="960x576 has the shape of 1280x768"):
        buckets.forced([(1280, 768), (960, 576)], 16, 1024)
    assert buckets.forced([(1280, 768), (768, 1280)], 16, 1024) == [(12, 20), (20, 12)]  # on their sides they differ
