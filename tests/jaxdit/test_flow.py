import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine

from jaxdit import flow


def keys(count, step=0):
    return flow.sample_keys(0, step, 0, count)


def test_interpolation_and_shift_agree_with_diffusers():
    import torch

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    sigmas = flow.shift_timesteps(jnp.linspace(1, 0.1, 10), 3.0)
    np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1].numpy(), atol=1e-6)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 10, 4, 4, 3)).astype(np.float32)
    theirs = scheduler.scale_noise(torch.tensor(x0), scheduler.timesteps, torch.tensor(noise)).numpy()
    np.testing.assert_allclose(flow.interpolate(x0, noise, sigmas), theirs, atol=1e-5)


def test_the_target_is_the_derivative_of_the_path():
    rng = np.random.default_rng(1)
    x0, noise = rng.standard_normal((2, 3, 2, 2, 1))
    t, h = np.array([0.2, 0.5, 0.8]), 1e-3
    difference = (flow.interpolate(x0, noise, t + h) - flow.interpolate(x0, noise, t - h)) / (2 * h)
    np.testing.assert_allclose(flow.velocity_target(x0, noise), difference, atol=1e-3)


@pytest.mark.parametrize(("mean", "shift"), [(0.0, 1.0), (1.0, 1.0), (0.0, 3.0)])
def test_timesteps_have_the_logit_normal_distribution(mean, shift):
    t = np.asarray(flow.draw_timesteps(keys(100_000), mean=mean, std=1.0, shift=shift))
    reference = 1 / (1 + np.exp(-np.random.default_rng(0).normal(mean, 1, 1_000_000)))
    reference = shift * reference / (1 + (shift - 1) * reference)
    assert ((t > 0) & (t < 1)).all()
    np.testing.assert_allclose(np.quantile(t, [0.1, 0.5, 0.9]), np.quantile(reference, [0.1, 0.5, 0.9]), atol=0.01)
    if mean == 0 and shift == 1:
        assert abs(t.mean() - 0.5) < 0.005
    else:
        assert t.mean() > 0.65  # towards noise, not towards data


def test_dropout_is_one_categorical_draw():
    text, vision = map(np.asarray, flow.draw_dropout(keys(100_000), both=0.1, text=0.15, vision=0.05))
    shares = [(text & vision).mean(), (text & ~vision).mean(), (~text & vision).mean(), (~text & ~vision).mean()]
    np.testing.assert_allclose(shares, [0.1, 0.15, 0.05, 0.7], atol=0.005)


def test_keys_do_not_depend_on_how_samples_are_cut():
    whole = jax.random.key_data(flow.sample_keys(3, 7, 0, 16))
    parts = [jax.random.key_data(flow.sample_keys(3, 7, first, 4)) for first in range(0, 16, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    others = [jax.random.key_data(flow.sample_keys(*seed_step, 0, 16)) for seed_step in ((3, 8), (4, 7))]
    assert all((np.asarray(whole) != np.asarray(other)).any() for other in others)


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_masked_error_is_the_error_of_the_picture_alone(seed):
    rng = np.random.default_rng(seed)
    predicted, target = rng.standard_normal((2, 3, 4, 6, 2))
    mask = np.zeros((3, 4, 6), np.uint8)
    for row, width in zip(mask, rng.integers(1, 7, 3)):
        row[:, :width] = 1
    got = flow.mean_square(predicted - target, mask)
    want = [np.mean((p[m == 1] - q[m == 1]) ** 2) for p, q, m in zip(predicted, target, mask)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(
        flow.mean_square(predicted - target), np.mean((predicted - target) ** 2, (1, 2, 3)), rtol=1e-5
    )


def test_the_loss_sees_the_path_the_time_and_the_dropout_of_its_draws():
    """A model that knows x0 predicts (x_t - x0) / t exactly, so the loss is zero only if all formulas agree."""
    rng = np.random.default_rng(2)
    batch = {"latent": jnp.asarray(rng.standard_normal((64, 4, 4, 2)), jnp.float32)}
    seen = {}

    def oracle(x_t, t, conditions, drop_text, drop_vision):
        seen.update(t=t, drop_text=drop_text, drop_vision=drop_vision)
        return (x_t - conditions["latent"]) / t[:, None, None, None]

    options = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.5, "drop_text": 0.0, "drop_vision": 0.0}
    found = flow.losses(oracle, batch, keys(64), **options)
    np.testing.assert_allclose(found["loss"], 0, atol=1e-6)
    np.testing.assert_array_equal(found["t"], seen["t"])
    np.testing.assert_allclose(found["velocity"], found["target"], rtol=1e-4)  # it predicts the true velocity
    assert 10 < seen["drop_text"].sum() < 54
    assert (seen["drop_text"] == seen["drop_vision"]).all()
    assert abs(np.corrcoef(seen["t"], seen["drop_text"])[0, 1]) < 0.4  # separate draws
    zero = flow.losses(lambda x_t, *_: jnp.zeros_like(x_t), batch, keys(64), **options)
    assert 1.5 < zero["loss"].mean() < 2.5 and not zero["velocity"].any()  # E|noise - x0|^2 = 2 a channel


def test_losses_are_summed_in_tenths_of_t():
    t = jnp.array([0.0, 0.05, 0.1, 0.55, 0.999, 1.0])
    sums, counts = flow.sum_by_timestep(jnp.arange(1.0, 7.0), t)
    np.testing.assert_array_equal(counts, [2, 1, 0, 0, 0, 1, 0, 0, 0, 2])
    np.testing.assert_array_equal(sums, [3, 3, 0, 0, 0, 4, 0, 0, 0, 11])


def test_the_loss_of_a_padded_picture_is_that_of_its_picture_alone():
    rng = np.random.default_rng(2)
    mask = np.ones((8, 4, 6), np.uint8)
    mask[:, :, 4:] = 0
    batch = {"latent": jnp.asarray(rng.standard_normal((8, 4, 6, 2)), jnp.float32), "mask": jnp.asarray(mask)}

    def wrong_in_the_padding(x_t, t, conditions, *_):
        right = (x_t - conditions["latent"]) / t[:, None, None, None]
        return jnp.where(conditions["mask"][..., None] == 1, right, 1e3)

    options = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.0, "drop_text": 0.0, "drop_vision": 0.0}
    found = flow.losses(wrong_in_the_padding, batch, keys(8), **options)
    np.testing.assert_allclose(found["loss"], 0, atol=1e-6)
    np.testing.assert_allclose(found["direction"], 0, atol=1e-3)
    np.testing.assert_allclose(found["velocity"], found["target"], rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_the_direction_is_the_cosine_of_whole_pictures_and_padding_has_none(padded):
    rng = np.random.default_rng(3)
    predicted, target = rng.standard_normal((2, 5, 4, 6, 2)).astype(np.float32)
    mask = rng.integers(0, 2, (5, 4, 6)).astype(np.uint8) if padded else None
    inside = np.ones((5, 4, 6), bool) if mask is None else mask == 1
    wanted = [cosine(one[there].ravel(), other[there].ravel()) for one, other, there in zip(predicted, target, inside)]
    np.testing.assert_allclose(flow.direction_error(predicted, target, mask), wanted, atol=1e-4)
    assert np.allclose(flow.direction_error(3 * target, target, mask), 0, atol=1e-4)
    start = jnp.zeros_like(target)  # as a new model predicts
    np.testing.assert_array_equal(flow.direction_error(start, target, mask), 1)
    gradient = jax.grad(lambda x: flow.direction_error(x, target, mask).sum())(start)
    assert np.isfinite(gradient).all() and (np.asarray(gradient) * target)[inside].max() < 0  # towards the target


def test_the_loss_takes_each_option_for_what_it_is_and_noise_of_its_own_draw():
    batch = {"latent": jnp.zeros((2000, 2, 2, 1))}
    seen = {}

    def model(x_t, t, _, drop_text, drop_vision):
        seen.update(noise=x_t / t[:, None, None, None], text=drop_text, vision=drop_vision)
        return x_t

    options = {"mean": 0.5, "std": 0.3, "shift": 1.0, "drop_both": 0.0, "drop_text": 0.3, "drop_vision": 0.1}
    t = np.asarray(flow.losses(model, batch, keys(2000), **options)["t"])
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0.5, 0.3], atol=0.03)
    np.testing.assert_allclose([seen["text"].mean(), seen["vision"].mean()], [0.3, 0.1], atol=0.04)
    related = np.corrcoef([seen["text"], seen["vision"], logit, *np.asarray(seen["noise"]).reshape(2000, 4).T])
    assert abs(related[2, 3:]).max() < 0.1
    assert abs(related[:2, 2:]).max() < 0.1
