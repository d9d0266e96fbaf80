import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from jaxdit import sampler


def draw(model, noise, conditions, *, solver="euler", steps, shift=1.0, text=1.0, vision=1.0, start=1.0, **options):
    """All rows of a solver, with everything that is made on the host."""
    weights = np.broadcast_to(sampler.guidance_weights(text, vision), (3, len(noise)))
    table = sampler.solver_table(solver, sampler.time_grid(steps, shift, start))
    terms = sampler.needed_terms(weights)
    options |= {"table": jnp.asarray(table), "terms": terms, "weights": jnp.asarray(weights)}
    return sampler.advance(model, sampler.start(jnp.asarray(noise)), conditions, **options)[1]


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
    ours = draw(lambda x, t, *_: velocity(x, t[:, None, None, None]), noise, {}, steps=steps, shift=shift)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


@pytest.mark.parametrize("solver", sampler.SOLVERS)
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_true_velocity_leads_back_to_the_data(steps, solver):
    x0, noise = np.random.default_rng(1).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    got = draw(lambda x, *_: jnp.asarray(noise - x0), noise, {}, steps=steps, solver=solver)
    np.testing.assert_allclose(got, x0, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("adams", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_halving_the_steps_cuts_the_error_by_the_order(solver, order, shift):
    """dx/dt = -x cos(5 t), whose path is known; an uneven grid, so that Adams' coefficients are looked at."""
    noise = np.full((1, 1, 1, 1), 2.0, np.float32)
    exact = 2.0 * np.exp(np.sin(5.0) / 5)

    def error(steps):
        model = lambda x, t, *_: -x * jnp.cos(5 * t)[:, None, None, None]  # noqa: E731
        return abs(float(draw(model, noise, {}, steps=steps, solver=solver, shift=shift)[0, 0, 0, 0]) - exact)

    assert (error(80) / error(160) > 2.9) == (order == 2) and error(80) / error(160) > 1.6


def test_adams_is_exact_for_a_velocity_linear_in_time_whatever_the_grid():
    times = sampler.time_grid(6, 5.0)
    found = draw(lambda x, t, *_: jnp.broadcast_to(t[:, None, None, None], x.shape), np.zeros((1, 1, 1, 1), np.float32), {},
                 steps=6, shift=5.0, solver="adams")  # fmt: skip
    first = times[0] * (times[1] - times[0])  # Euler's, as there is nothing before it
    np.testing.assert_allclose(found[0, 0, 0, 0], first - times[1] ** 2 / 2, rtol=1e-5)


@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_a_grid_too_steep_for_float32_is_still_walked_to_its_end(solver):
    times = sampler.time_grid(1000, 1e6)
    assert (np.diff(times) == 0).any()
    table = sampler.solver_table(solver, times)
    assert np.isfinite(table).all() and table[table[:, 3] == 1, 1:3].sum() == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 6), ("heun", 11), ("adams", 6)])
def test_a_solver_makes_the_evaluations_it_says_and_never_one_at_the_end(solver, evaluations):
    table = sampler.solver_table(solver, sampler.time_grid(6, 3.0))
    assert len(table) == evaluations and table[0, 0] == 1 and (table[:, 0] > 0).all()


def test_a_start_within_is_met_exactly_whatever_the_shift():
    for shift in (1.0, 3.0):
        times = sampler.time_grid(5, shift, 0.6)
        assert times[0] == pytest.approx(0.6) and times[-1] == 0 and (np.diff(times) < 0).all()
    np.testing.assert_allclose(sampler.time_grid(5, 3.0, 0.75)[1:], sampler.time_grid(10, 3.0)[6:], atol=1e-6)


def numbered(counted):
    """A model that returns 1, 10, 100 for no condition, vision alone, both; counts the samples it is given."""

    def model(x, t, conditions, drop_text, drop_vision):
        counted.append(len(x))
        assert all(len(value) == len(x) for value in conditions.values())
        value = jnp.where(drop_vision, jnp.where(drop_text, 1.0, jnp.nan), jnp.where(drop_text, 10.0, 100.0))
        return jnp.broadcast_to(value[:, None, None, None], x.shape)

    return model


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("text", "vision", "want", "evaluations"),
    [(1, 1, 100, 1), (0, 0, 1, 1), (3, 2, 1 + 2 * 9 + 3 * 90, 3), (3, 1, 10 + 3 * 90, 2), (2, 2, 1 + 2 * 99, 2)],
)
def test_guidance_by_hand_with_no_needless_evaluation(text, vision, want, evaluations, together):
    counted = []
    weights = sampler.guidance_weights([text] * 2, vision)
    got = sampler.guided_velocity(
        numbered(counted), jnp.zeros((2, 2, 2, 1)), 0.5, {"text": jnp.zeros((2, 3))},
        terms=sampler.needed_terms(weights), weights=jnp.asarray(weights), together=together,
    )  # fmt: skip
    np.testing.assert_allclose(got, want)
    assert counted == ([2 * evaluations] if together else [2] * evaluations)
    assert len(sampler.needed_terms(sampler.guidance_weights(text, vision))) == evaluations


def test_samples_of_one_batch_have_weights_of_their_own():
    weights = sampler.guidance_weights([1, 3, 3], [1, 2, 1])
    got = sampler.guided_velocity(
        numbered([]), jnp.zeros((3, 2, 2, 1)), 0.5, {},
        terms=sampler.needed_terms(weights), weights=jnp.asarray(weights),
    )  # fmt: skip
    np.testing.assert_allclose(got[:, 0, 0, 0], [100, 289, 280])


@pytest.mark.parametrize(("low", "high", "guided"), [(0.0, 1.0, 8), (0.3, 0.8, 4), (2.0, 3.0, 0)])
def test_outside_the_interval_one_evaluation_is_made(low, high, guided):
    counted = []  # when the compiled program runs, not when it is traced

    def model(x, t, conditions, drop_text, drop_vision):
        jax.debug.callback(lambda t: counted.append((float(t[0]), len(t))), t)
        value = jnp.where(drop_vision, 1.0, jnp.where(drop_text, 10.0, 100.0))
        return jnp.broadcast_to(value[:, None, None, None], x.shape)

    got = jax.jit(lambda noise, interval: draw(model, noise, {}, steps=8, text=3.0, vision=2.0, interval=interval))(
        np.zeros((2, 2, 2, 1), np.float32), np.array([low, high], np.float32)
    )
    jax.effects_barrier()
    assert sorted(size for _, size in counted) == [2] * (8 - guided) + [6] * guided
    assert all((size == 6) == (low <= t <= high) for t, size in counted)
    np.testing.assert_allclose(got, -(289 * guided + 100 * (8 - guided)) / 8, rtol=1e-5)


def test_a_sample_without_a_condition_never_sees_it():
    seen = []

    def model(x, t, conditions, drop_text, drop_vision):
        seen.append((np.asarray(drop_text), np.asarray(drop_vision), np.asarray(conditions["vision"])[:, 0]))
        return x

    conditions = {
        "drop_text": jnp.array([False, True]), "drop_vision": jnp.array([True, False]), "vision": jnp.array([[5], [7]])
    }  # fmt: skip
    for text, vision in ((1.0, 1.0), (3.0, 1.0)):
        weights = sampler.guidance_weights([text] * 2, vision)
        sampler.guided_velocity(
            model, jnp.zeros((2, 2, 2, 1)), 0.5, conditions,
            terms=sampler.needed_terms(weights), weights=jnp.asarray(weights),
        )  # fmt: skip
    assert [part.tolist() for part in seen[0]] == [[False, True], [True, False], [5, 7]]
    assert [part.tolist() for part in seen[1]] == [[True, False, True, True], [True, True, False, False], [5, 5, 7, 7]]


def test_noise_depends_on_seed_and_position_not_on_the_batch():
    seeds, positions = np.array([5, 5, 6, 7], np.uint32), np.array([0, 1, 0, 2], np.int32)
    together = sampler.initial_noise(seeds, positions, (2, 2, 3))
    alone = sampler.initial_noise(seeds[2:3], positions[2:3], (2, 2, 3))
    np.testing.assert_array_equal(together[2:3], alone)
    assert len(np.unique(np.asarray(together).round(5))) > 40
    plain = jax.random.normal(jax.random.fold_in(jax.random.key(7), 2), (2, 2, 3))  # what a Python int gives
    np.testing.assert_array_equal(together[3], plain)


def test_an_interval_guides_at_both_of_its_ends():
    def model(x, t, conditions, drop_text, drop_vision):
        return jnp.broadcast_to(jnp.where(drop_text, 0.0, 1.0)[:, None, None, None], x.shape)

    weights = sampler.guidance_weights(3.0, 1.0)
    table = jnp.asarray(sampler.solver_table("euler", sampler.time_grid(8, 1.0)))
    options = {"table": table, "terms": sampler.needed_terms(weights), "weights": jnp.asarray(weights)}
    x, interval = jnp.zeros((1, 2, 2, 1)), jnp.array([0.375, 0.75])
    _, got, _ = sampler.advance(model, sampler.start(x), {}, interval=interval, **options)
    np.testing.assert_allclose(got, -(4 * 3 + 4 * 1) / 8, rtol=1e-6)
