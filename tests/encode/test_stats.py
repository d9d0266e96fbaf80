"""Statistics per channel: right, and the same bits in any order."""

import ml_dtypes
import numpy as np
import pytest

from encode import stats


def _latents(count=7):
    rng = np.random.default_rng(0)
    return [(rng.normal(3, 2, (8, 6, 5)) * [1, 10, 0.01, 1, 1]).astype(ml_dtypes.bfloat16) for _ in range(count)]


def test_mean_and_deviation_are_numpys():
    latents = _latents()
    every = np.stack(latents).astype(np.float64).reshape(-1, 5)
    mean, std, flat = stats.mean_and_std(stats.merge(stats.partial(latent) for latent in latents))
    np.testing.assert_allclose(mean, every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, every.std(0), rtol=1e-9)
    assert flat == []


def test_the_order_does_not_change_a_bit():
    parts = [stats.partial(latent) for latent in _latents(50)]
    shuffled = [parts[place] for place in np.random.default_rng(1).permutation(50)]
    assert stats.merge(parts) == stats.merge(shuffled)


def test_the_grouping_does_not_change_a_bit():
    parts = [stats.partial(latent) for latent in _latents(50)]
    for shards in (1, 3, 7):
        assert stats.merge(stats.merge(parts[shard::shards]) for shard in range(shards)) == stats.merge(parts)


def test_a_part_survives_json_exactly():
    part = stats.partial(_latents(1)[0])
    assert stats.Partial.from_json(part.to_json()) == part


def test_only_the_picture_counts():
    latent = np.ones((4, 4, 2), np.float32)
    latent[:, 2:] = 100
    mask = np.zeros((4, 4), np.uint8)
    mask[:, :2] = 1
    part = stats.partial(latent, mask)
    assert part.count == 8
    assert part.total == (8, 8)
    assert stats.partial(latent, np.zeros((0, 0), np.uint8)).count == 16


def test_a_deviation_is_never_zero():
    mean, std, flat = stats.mean_and_std(stats.partial(np.full((4, 4, 2), 0.1, np.float32)))
    assert std == [stats.FLOOR] * 2
    assert flat == [0, 1]
    assert mean == pytest.approx([0.1, 0.1])


def test_no_latents_are_an_error():
    with pytest.raises(ValueError, match="no latents"):
        stats.merge([])
    with pytest.raises(ValueError, match="not finite"):
        stats.mean_and_std(stats.partial(np.full((2, 2, 1), np.nan)))


def test_rounding_makes_no_deviation_of_a_constant_impossible():
    for value in np.random.default_rng(0).normal(size=50).astype(np.float32):
        assert stats.mean_and_std(stats.partial(np.full((9, 11, 1), value)))[1] == [stats.FLOOR]


def test_a_channel_that_hardly_changes_is_named_as_one_that_never_does():
    latent = np.stack([np.tile([-5e-5, 5e-5], (4, 2)), np.tile([-1.0, 1.0], (4, 2))], -1)
    _, std, flat = stats.mean_and_std(stats.partial(latent))
    assert flat == [0] and std == [stats.FLOOR, 1.0]


def test_a_mask_that_covers_nothing_is_told():
    with pytest.raises(ValueError, match="cover no picture"):
        stats.mean_and_std(stats.partial(np.ones((4, 4, 2)), np.zeros((4, 4), np.uint8)))
