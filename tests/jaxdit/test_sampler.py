import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from jaxdit import sampler


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_agrees_with_diffusers_step_by_step(shift):
    steps = 8
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    np.testing.assert_allclose(sampler.time_grid(steps, shift), scheduler.sigmas.numpy(), atol=1e-6)
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)

    def velocity(x, t):  # any smooth field that depends on both
        return np.sin(3 * x) * t + x if isinstance(x, np.ndarray) else jnp.sin(3 * x) * t + x

    theirs = torch.tensor(noise)
    for timestep in scheduler.timesteps:
        v = velocity(theirs.numpy(), float(timestep) / 1000)
        theirs = scheduler.step(torch.tensor(v), timestep, theirs).prev_sample
    ours = sampler.sample(
        lambda x, t, *_: velocity(x, t[:, None, None, None]),
        jnp.asarray(noise), {}, steps=steps, shift=shift, text=1.0, vision=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_true_velocity_leads_back_to_the_data(steps):
    x0, noise = np.random.default_rng(1).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    got = sampler.sample(
        lambda x, *_: jnp.asarray(noise - x0), jnp.asarray(noise), {}, steps=steps, shift=1.0, text=1.0, vision=1.0
    )
    np.testing.assert_allclose(got, x0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "vision", "want", "evaluations"),
    [(1, 1, 100, 1), (0, 0, 1, 1), (3, 2, 1 + 2 * 9 + 3 * 90, 3), (3, 1, 10 + 3 * 90, 2), (2, 2, 1 + 2 * 99, 2)],
)
def test_guidance_by_hand_with_no_needless_evaluation(text, vision, want, evaluations):
    counted = []

    def model(x, t, conditions, drop_text, drop_vision):
        counted.append(len(x))
        assert conditions["text"].shape[0] == len(x)
        value = jnp.where(drop_vision, jnp.where(drop_text, 1.0, jnp.nan), jnp.where(drop_text, 10.0, 100.0))
        return jnp.broadcast_to(value[:, None, None, None], x.shape)

    x = jnp.zeros((2, 2, 2, 1))
    got = sampler.guided_velocity(model, x, 0.5, {"text": jnp.zeros((2, 3))}, text=text, vision=vision)
    np.testing.assert_allclose(got, want)
    assert counted == [2 * evaluations]


def test_a_sample_without_a_condition_never_sees_it():
    seen = []

    def model(x, t, conditions, drop_text, drop_vision):
        seen.append((np.asarray(drop_text), np.asarray(drop_vision)))
        return x

    conditions = {"drop_text": jnp.array([False, True]), "drop_vision": jnp.array([True, False])}
    sampler.guided_velocity(model, jnp.zeros((2, 2, 2, 1)), 0.5, conditions, text=1.0, vision=1.0)
    assert seen[0][0].tolist() == [False, True] and seen[0][1].tolist() == [True, False]


def test_noise_depends_on_the_position_not_on_the_batch():
    together = sampler.initial_noise(5, jnp.arange(4), (2, 2, 3))
    alone = sampler.initial_noise(5, jnp.array([2]), (2, 2, 3))
    np.testing.assert_array_equal(together[2:3], alone)
    assert len(np.unique(np.asarray(together).round(5))) > 40
