"""The measures against answers that are known, and against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from jaxdit import quality, quality_page


def cloud(seed, count=400, width=6, scale=1.0, shift=0.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((count, width))


def with_moments(vectors, mean, root):
    """Vectors whose mean and covariance are exactly `mean` and root' root."""
    centred = vectors - vectors.mean(0)
    whitened = centred @ np.linalg.inv(linalg.cholesky(np.cov(centred.T)))
    return whitened @ root + mean


@given(st.integers(0, 2**31), st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_frechet_between_gaussians_of_known_moments(seed, width):
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2 over their axes."""
    rng = np.random.default_rng(seed)
    axes = linalg.qr(rng.standard_normal((width, width)))[0]
    first, second = rng.uniform(0.1, 3, (2, width))
    means = rng.standard_normal((2, width))
    one = with_moments(rng.standard_normal((50, width)), means[0], np.diag(first) @ axes)
    other = with_moments(rng.standard_normal((70, width)), means[1], np.diag(second) @ axes)
    wanted = ((means[0] - means[1]) ** 2).sum() + ((first - second) ** 2).sum()
    assert quality.frechet(one, other) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_frechet_agrees_with_the_root_of_a_matrix():
    """The formula as every library has it, by scipy.linalg.sqrtm, of covariances that do not commute."""
    rng = np.random.default_rng(0)
    one, other = (cloud(k, 100) @ rng.standard_normal((6, 6)) for k in (1, 2))
    first, second = np.cov(one.T), np.cov(other.T)
    root = linalg.sqrtm(first @ second).real
    wanted = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert quality.frechet(one, other) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("count", (3, 5, 40))
def test_the_same_set_twice_is_no_distance_away_even_when_it_is_small(count):
    one = cloud(0, count, 8)
    assert quality.frechet(one, one[::-1]) == pytest.approx(0, abs=1e-9)
    assert quality.frechet(one, one + 1) == pytest.approx(8, rel=1e-9)


def test_the_limit_takes_most_of_the_bias_away():
    """Two sets of one distribution: 0 is right, few vectors say more."""
    plain, limit = [], []
    for seed in range(40):
        one, other = cloud(seed, 200, 20), cloud(seed + 1000, 200, 20)
        plain.append(quality.frechet(one, other))
        limit.append(quality.frechet_limit(one, other))
    assert np.mean(plain) > 0.8
    assert abs(np.mean(limit)) < 0.15 * np.mean(plain)
    assert quality.frechet_limit(cloud(0, 200, 51), cloud(1, 200, 51)) is None


def test_what_real_images_score_is_no_curve_of_the_model():
    loss = {"held_out/text": 1.0}
    rows = [{"step": step, "held_out": True, "usual": {"halves": {"frechet": 2.4}}, "loss": loss} for step in (1, 2)]
    few = quality_page._curves(rows)
    assert "Fréchet" not in few and "Loss of held-out" in few
    drawn = quality_page._curves([row | {"own": {"frechet": 9.0}} for row in rows])
    assert "Fréchet" in drawn and "2.4" in drawn
    assert np.isnan(quality.apart(np.ones((1, 4))))
    memory = {"vectors": {"memorised": False}}
    few = {"held_out": True, "own": None, "memory": {"own": memory, "alone": memory}, "exchange": {}}
    assert "too few images (12 are needed" in " ".join(quality_page.findings(few))


def test_the_kernel_distance_is_that_of_a_loop_over_pairs_and_unbiased():
    one, other = cloud(0, 9, 4), cloud(1, 7, 4, shift=0.5)

    def mean(values, rows, same):
        found = [
            (sum(x * y for x, y in zip(a, b)) / 4 + 1) ** 3
            for i, a in enumerate(values)
            for j, b in enumerate(rows)
            if not same or i != j
        ]
        return sum(found) / len(found)

    wanted = mean(one, one, True) + mean(other, other, True) - 2 * mean(one, other, False)
    assert quality.kernel_distance(one, other) == pytest.approx(wanted, rel=1e-10)
    found = [quality.kernel_distance(cloud(2 * k, 30), cloud(2 * k + 1, 30)) for k in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))
    assert quality.kernel_distance(one, other + 1) > quality.kernel_distance(one, other)


def test_neighbourhoods_are_those_of_a_loop():
    real, drawn = cloud(0, 40, 3), cloud(1, 40, 3, scale=0.7, shift=0.4)

    def length(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b)) ** 0.5

    def reach(points, k):
        return [sorted(length(a, b) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)]

    def share(inner, outer, k):
        reaches = reach(outer, k)
        return np.mean([any(length(a, b) <= r for b, r in zip(outer, reaches)) for a in inner])

    wide = reach(real, 5)
    within = [[length(a, b) <= r for b in drawn] for a, r in zip(real, wide)]
    found = quality.neighbourhoods(real, drawn)
    assert found["precision"] == pytest.approx(share(drawn, real, 3))
    assert found["recall"] == pytest.approx(share(real, drawn, 3))
    assert found["density"] == pytest.approx(np.sum(within) / (5 * 40))
    assert found["coverage"] == pytest.approx(np.mean([any(row) for row in within]))
    assert found["precision"] > 0 and found["recall"] < 1


def test_identical_sets_are_perfect():
    one = cloud(0, 60)
    found = quality.compare(one, one.copy())
    assert found["frechet"] == pytest.approx(0, abs=1e-9) and found["kernel"] < 0
    assert found["precision"] == found["recall"] == found["coverage"] == 1.0 and found["density"] >= 1.0


def test_each_way_to_be_bad_has_its_number():
    real = cloud(0)
    dull = quality.compare(real, cloud(1, scale=0.3))  # always nearly the same
    wild = quality.compare(real, cloud(1, scale=3.0))  # many that are none
    lost = quality.compare(real, cloud(1, shift=20.0))
    sound = quality.compare(real, cloud(1))
    assert sound["precision"] > 0.8 and sound["recall"] > 0.8 and sound["coverage"] > 0.9
    assert dull["precision"] > 0.95 and dull["recall"] < 0.3 and dull["density"] > 1.5
    assert wild["precision"] < 0.4 and wild["recall"] > 0.8
    assert lost["precision"] == lost["recall"] == lost["coverage"] == lost["density"] == 0
    for worse in (dull, wild, lost):
        assert worse["frechet"] > 5 * sound["frechet"] and worse["kernel"] > 5 * abs(sound["kernel"])


def test_the_nearest_are_those_of_a_loop_whatever_the_pieces(monkeypatch):
    queries = cloud(0, 12)
    keys = np.stack([cloud(1, 130), cloud(2, 130)], axis=1)
    own = [np.array([k, k + 1]) for k in range(12)]
    monkeypatch.setattr(quality, "CHUNK", 17)
    distances, places = quality.nearest(queries, keys, own)
    assert distances.shape == places.shape == (12, 51)
    for query, row, at, mine in zip(queries, distances, places, own):
        every = np.array([min(np.linalg.norm(query - view) for view in views) for views in keys])
        every[mine] = np.inf
        np.testing.assert_array_equal(at, np.argsort(every)[:51])
        np.testing.assert_allclose(row, np.sort(every)[:51])


def test_training_images_given_out_as_samples_are_found_and_new_ones_are_not():
    training, real = cloud(0, 600, 30), cloud(1, 100, 30)
    keys = np.stack([training, -training], axis=1)  # mirror images count as well
    held_out, _ = quality.nearest(real, keys)

    def judged(samples):
        return quality.memory(quality.nearest(samples, keys)[0], held_out)

    noise = 0.05 * cloud(2, 100, 30)
    copied, mirrored = judged(training[:100] + noise), judged(noise - training[:100])
    for found in (copied, mirrored):
        assert found["memorised"] and found["copies"] == 1.0 and found["nearer"] == 1.0 and found["closest"] < 0.1
    new = judged(cloud(3, 100, 30))
    assert not new["memorised"] and new["copies"] == 0 and 0.3 < new["nearer"] < 0.7
    some = judged(np.concatenate([cloud(3, 80, 30), training[:20] + noise[:20]]))
    assert some["memorised"] and some["copies"] == pytest.approx(0.2)


def test_a_mean_picture_is_near_to_everything_and_no_copy():
    training, real = cloud(0, 600, 30), cloud(1, 100, 30)
    found = quality.memory(
        quality.nearest(np.zeros((100, 30)), training[:, None])[0], quality.nearest(real, training[:, None])[0]
    )
    assert found["nearer"] == 1.0 and found["copies"] == 0 and not found["memorised"]


def test_copies_that_real_images_have_too_are_nobodys_memory():
    """A burst of nearly equal photographs, some held out and some trained on."""
    training = cloud(0, 600, 30)
    real = np.concatenate([training[:30], cloud(1, 70, 30)]) + 0.01 * cloud(2, 100, 30)
    drawn = np.concatenate([training[30:60], cloud(3, 70, 30)]) + 0.01 * cloud(4, 100, 30)
    found = quality.memory(*(quality.nearest(values, training[:, None])[0] for values in (drawn, real)))
    assert found["copies"] == found["copies_real"] == pytest.approx(0.3) and not found["memorised"]


def test_one_training_image_alone_has_no_usual_distance():
    distances, _ = quality.nearest(cloud(0, 4), cloud(1, 1)[:, None])
    np.testing.assert_array_equal(quality.closeness(distances), 1.0)


@pytest.mark.parametrize("shape", ((8, 8), (16, 24), (9, 13), (4, 6)))
def test_thumbnails_are_means_over_areas(shape):
    latents = np.random.default_rng(0).standard_normal((2, *shape, 3))
    fine = latents.repeat(8, axis=1).repeat(8, axis=2)  # every cell is a whole number of these
    blocks = fine.reshape(2, 8, shape[0], 8, shape[1], 3).mean((2, 4))
    np.testing.assert_allclose(quality.thumbnails(latents), blocks.reshape(2, -1), atol=1e-6)


def test_diversity_is_the_mean_over_pairs():
    one = cloud(0, 5)
    wanted = np.mean([np.linalg.norm(one[i] - one[j]) for i in range(5) for j in range(i)])
    assert quality.apart(one) == pytest.approx(wanted)


def far(*closeness):
    """Distances of pictures that close to their nearest training image."""
    return np.array([[value, 1.0, 1.0] for value in closeness])


def test_three_copies_in_a_hundred_or_what_chance_makes_of_few_are_nobodys_memory():
    assert not quality.memory(far(*[0.1] * 3, *[1.0] * 97), far(*[1.0] * 100))["memorised"]
    assert quality.memory(far(*[0.1] * 8, *[1.0] * 92), far(*[1.0] * 100))["memorised"]
    assert not quality.memory(far(*[0.1] * 5, *[1.0] * 5), far(*[0.1] * 3, *[1.0] * 7))["memorised"]
    assert not quality.memory(far(0.1, *[1.0] * 11), far(*[1.0] * 12))[
        "memorised"
    ]  # none of few real ones is no measure


def test_a_burst_among_the_real_images_does_not_move_the_line_of_a_copy():
    assert quality.memory(far(*[0.4] * 100), far(*[0.01] * 40, *[1.0] * 60))["copies"] == 1.0


def test_precision_reaches_to_the_third_neighbour_and_not_to_the_fifth():
    real, drawn = cloud(0, 40, 3), cloud(1, 40, 3, scale=1.6)
    near = [np.sort(np.linalg.norm(real - one, axis=1))[3] for one in real]
    inside = [np.any(np.linalg.norm(real - one, axis=1) <= near) for one in drawn]
    assert quality.neighbourhoods(real, drawn)["precision"] == pytest.approx(np.mean(inside))
