import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import cdist
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from jaxdit import likeness

seeds = st.integers(0, 2**32 - 1)


def picture(seed=0, side=64):
    """A smooth random picture [side, side, 3] uint8, as photographs are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def test_composition_ignores_the_light_and_light_the_composition():
    grey = np.asarray(Image.fromarray(picture()).convert("L").convert("RGB"))
    tinted = (grey * [0.9, 0.6, 0.4]).astype(np.uint8)
    own = likeness.composition(grey)
    apart = np.linalg.norm(own - likeness.composition(picture(1)))
    assert np.linalg.norm(own - likeness.composition(tinted)) < 0.1 * apart
    assert np.linalg.norm(own - likeness.composition(grey[:, ::-1])) > 0.5 * apart
    np.testing.assert_allclose(likeness.light(grey), likeness.light(grey[:, ::-1]), atol=1e-9)
    assert np.linalg.norm(likeness.light(grey) - likeness.light(tinted)) > 0.05


def test_edges_tell_apart_what_luminance_alone_does_not():
    flat = np.full((64, 64, 3), 128, np.uint8)
    ramp, step = flat.copy(), flat.copy()
    ramp[:, :] = np.linspace(60, 200, 64)[None, :, None].astype(np.uint8)
    step[:, :32], step[:, 32:] = 60, 200
    parts = [np.split(likeness.composition(p), 2) for p in (ramp, step)]
    luminance, edges = (np.linalg.norm(a - b) for a, b in zip(*parts))
    assert edges > 1.5 * luminance


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_content_has_no_channel_means_or_deviations(seed):
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(6, 5, 4))
    other = latent * rng.uniform(0.5, 2, 4) + rng.normal(size=4)
    np.testing.assert_allclose(likeness.content(latent), likeness.content(other), atol=1e-6)


def test_ssim_is_that_of_scikit_image_for_each_key():
    grey = np.stack([likeness.structure(picture(seed), light=True) for seed in range(4)])
    expected = [structural_similarity(grey[0], key, data_range=1.0) for key in grey]
    np.testing.assert_allclose(likeness.ssim(grey[0], grey), expected, rtol=1e-6)
    assert likeness.ssim(grey[0], grey).argmax() == 0


def test_structure_without_light_is_that_of_a_darker_picture():
    pixels = picture()
    darker = (pixels * 0.6 + 20).astype(np.uint8)
    with_light, without = (
        [likeness.structure(p, light=light) for p in (pixels, darker)] for light in (True, False)
    )  # fmt: skip
    assert np.abs(without[0] - without[1]).mean() < 0.01 < 0.05 < np.abs(with_light[0] - with_light[1]).mean()


def test_distances_and_psnr_agree_with_other_libraries():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3, 2)), rng.normal(size=(4, 3, 2))
    np.testing.assert_allclose(likeness.distances(a, b), cdist(a.reshape(5, -1), b.reshape(4, -1)), atol=1e-9)
    assert likeness.psnr(picture(0), picture(1)) == pytest.approx(
        peak_signal_noise_ratio(picture(0), picture(1)), abs=1e-3
    )


def test_one_s_own_is_compared_with_the_nearest_of_another_group():
    distance = np.array([[1.0, 0.5, 4.0], [3.0, 3.0, 2.0], [9.0, 5.0, 1.0]])
    ratio, following = likeness.to_own(distance, [0, 0, 1])
    np.testing.assert_allclose(ratio, [0.5 / 4, 3 / 2, 1 / 5])  # images 0 and 1 are copies: either counts
    np.testing.assert_array_equal(following, [2, 2, 1])
    np.testing.assert_allclose(likeness.to_own(distance, [0, 1, 2])[0], [2, 3 / 2, 1 / 5])


@given(seeds, st.floats(-1, 2))
@settings(max_examples=20, deadline=None)
def test_moved_is_the_share_of_the_way(seed, share):
    rng = np.random.default_rng(seed)
    start, way, before, sideways = rng.normal(size=(4, 8, 5))
    way *= rng.uniform(1, 2, (8, 1)) / np.sqrt((way**2).sum(1))[:, None]  # far shorter ones count as longer, see below
    goal = start + way
    sideways -= ((sideways * way).sum(1) / (way**2).sum(1))[:, None] * way
    np.testing.assert_allclose(likeness.moved(before, before + share * way + sideways, start, goal), share, atol=1e-6)


def test_moved_does_not_divide_by_a_way_of_no_length():
    start = np.zeros((5, 2))
    goal = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [1e-9, 0]])
    assert np.abs(likeness.moved(start, start + 0.5, start, goal)).max() < 1


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(0.3, 1, 400)
    mean, low, high = likeness.interval(values)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 / 20, mean + 1.96 / 20), abs=0.02)
    assert likeness.interval(values) == (mean, low, high)  # the same at every call


def test_a_move_to_each_one_s_own_goal_is_beyond_the_controls_and_one_to_the_middle_is_not():
    rng = np.random.default_rng(0)
    start, goal = rng.normal(size=(2, 40, 6))
    assert likeness.moved(start, goal, start, goal).mean() == pytest.approx(1)
    assert likeness.control(start, goal, start, goal) < 0.75
    middle = np.broadcast_to((start.mean(0) + goal.mean(0)) / 2, start.shape)
    assert likeness.interval(likeness.moved(start, middle, start, goal))[1] > 0.2  # the interval alone is deceived
    assert likeness.moved(start, middle, start, goal).mean() < likeness.control(start, middle, start, goal)


@given(seeds, st.integers(3, 30))
@settings(max_examples=20, deadline=None)
def test_partners_are_far_apart_and_each_is_taken_once(seed, count):
    features = np.random.default_rng(seed).normal(size=(count, 3))
    partner = likeness.far_apart(features, np.zeros((count, count), bool))
    assert sorted(partner) == list(range(count)) and (partner != np.arange(count)).all()
    turned = np.roll(np.arange(count), 1)
    apart = np.linalg.norm(features - features[partner], axis=1).sum()
    assert apart >= np.linalg.norm(features - features[turned], axis=1).sum() - 1e-9


def test_forbidden_partners_are_not_taken():
    features = np.arange(6.0)[:, None]
    groups = np.array([0, 0, 1, 1, 2, 2])
    partner = likeness.far_apart(features, groups[:, None] == groups)
    assert (groups[partner] != groups).all()


def test_light_knows_the_contrast_and_the_mean_of_each_channel():
    from encode.demo_encoders import oklab

    flat, wide = np.full((8, 8, 3), 128, np.uint8), np.full((8, 8, 3), 128, np.uint8)
    wide[::2], wide[1::2] = 90, 166
    assert likeness.light(flat)[3:].max() < 1e-6 < 0.05 < likeness.light(wide)[3]
    colours = oklab(picture().reshape(-1, 3))
    np.testing.assert_allclose(likeness.light(picture()), [*colours.mean(0), *colours.std(0)])


def test_what_is_all_of_one_value_is_compared_without_a_division_by_nothing():
    flat = np.full((64, 64, 3), 128, np.uint8)
    with np.errstate(all="raise"):
        assert not likeness.content(np.full((4, 4, 2), 0.5)).any()
        assert not likeness.composition(flat).any()
        assert likeness.to_own(np.zeros((2, 2)), [0, 1])[0].max() == 0
        assert likeness.ratio(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3))).max() == 0
        assert likeness.psnr(flat, flat) == pytest.approx(100)
        assert not likeness.moved(np.ones((2, 3)), np.zeros((2, 3)), np.ones((2, 3)), np.ones((2, 3))).any()


def test_near_rows_of_half_precision_have_a_distance_and_equal_ones_none():
    rows = (1000 + np.arange(40.0)[:, None] * [0.0, 1.0, 2.0]).astype(np.float16)
    found = likeness.distances(rows, rows)
    np.testing.assert_allclose(found, cdist(rows.astype(float), rows.astype(float)), atol=1e-3)
    noise = np.random.default_rng(0).normal(size=(200, 64))
    assert np.isfinite(likeness.distances(noise, noise)).all()


def test_the_ratio_is_that_of_the_ways_from_what_was_drawn():
    drawn, wanted, other = np.array([[0.0, 0], [0, 0]]), np.array([[3.0, 4], [1, 0]]), np.array([[0, 10.0], [-2, 0]])
    np.testing.assert_allclose(likeness.ratio(drawn, wanted, other), [5 / 10, 1 / 2])


def test_the_interval_holds_95_and_the_control_is_above_95_of_a_hundred():
    values = np.random.default_rng(1).normal(0.3, 1, 400)
    _, low, high = likeness.interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)  # of 90%: 1.645
    few = np.random.default_rng(2).normal(size=10)
    _, low, high = likeness.interval(few)
    assert (high - low) / 2 == pytest.approx(2.262 * few.std(ddof=1) / 10**0.5, rel=0.06)  # Student's, not 1.96
    rng = np.random.default_rng(0)
    start, goal = rng.normal(size=(2, 40, 6))
    shuffled = [likeness.moved(start, goal, start, goal[rng.permutation(40)]).mean() for _ in range(2000)]
    share = np.mean(np.array(shuffled) < likeness.control(start, goal, start, goal))
    assert 0.92 < share < 0.98


def test_a_forbidden_pair_is_worse_than_any_other_way_out():
    features = np.array([[0.0], [0.1], [100.0], [100.1]])
    forbidden = np.zeros((4, 4), bool)
    for one, other in ((0, 2), (0, 3), (1, 3)):  # 1 and 2 alone are far apart, which would leave 0 and 3 to themselves
        forbidden[one, other] = forbidden[other, one] = True
    assert likeness.far_apart(features, forbidden).tolist() == [1, 0, 3, 2]


def test_luminance_is_between_0_and_1_with_light_and_without():
    step = np.zeros((64, 64, 3), np.uint8)
    step[:4, :4] = 255
    for light in (True, False):
        found = likeness.structure(step, light=light)
        assert found.min() >= 0 and found.max() == 1
