"""Sampling: Euler steps of dx/dt = v from noise (t = 1) to data (t = 0), guided by two conditions.

v = v(0,0) + w_vision [v(0,vision) - v(0,0)] + w_text [v(text,vision) - v(0,vision)]: classifier-free guidance (Ho and
Salimans 2022) over two conditions, as Brooks et al. 2023 ("InstructPix2Pix", eq. 3) order them. Evaluations whose weight
is zero are not made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np


def time_grid(steps: int, shift: float) -> np.ndarray:
    """[steps + 1] float32 from 1 to 0, uniform and then shifted as in `flow.shift_timesteps`.

    The sigmas of diffusers' FlowMatchEulerDiscreteScheduler(shift=shift) after set_timesteps(sigmas=linspace(1, 1/steps,
    steps)).
    """
    t = np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).astype(np.float32)


def guidance_terms(text: float, vision: float) -> list[tuple[float, bool, bool]]:
    """The evaluations that guidance needs.

    Args:
      text: w_text.
      vision: w_vision.

    Returns:
      [(weight, drop_text, drop_vision)], one to three entries whose weights sum to 1.
    """
    terms = [(1 - vision, True, True), (vision - text, True, False), (text, False, False)]
    return [term for term in terms if term[0] != 0]


def initial_noise(seed: int, positions: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """[batch, *shape] standard normal; each picture's noise depends on (seed, its position) alone, not on its batch."""
    key = jax.random.key(seed)
    return jax.vmap(lambda position: jax.random.normal(jax.random.fold_in(key, position), shape))(positions)


def guided_velocity(
    model: Callable[..., jax.Array],
    x: jax.Array,
    t: jax.Array,
    conditions: Mapping[str, jax.Array],
    *,
    text: float,
    vision: float,
) -> jax.Array:
    """Guided velocity, its one to three evaluations made as one batch.

    Args:
      model: (x, t, conditions, drop_text, drop_vision) -> velocity.
      x: [batch, height, width, channels].
      t: [] in [0, 1].
      conditions: arrays with leading axis batch, handed to the model; "drop_text" and "drop_vision" ([batch] bool), where
        present, mark samples that have no such condition at all.
      text, vision: guidance weights.

    Returns:
      [batch, height, width, channels] float32.
    """
    terms = guidance_terms(text, vision)
    batch = x.shape[0]

    def repeated(value):
        return jnp.concatenate([value] * len(terms))

    absent = jnp.zeros((batch,), bool)
    drop_text = jnp.concatenate([jnp.full((batch,), drop) for _, drop, _ in terms])
    drop_vision = jnp.concatenate([jnp.full((batch,), drop) for _, _, drop in terms])
    velocity = model(
        repeated(x),
        jnp.full((batch * len(terms),), t),
        {name: repeated(value) for name, value in conditions.items()},
        drop_text | repeated(conditions.get("drop_text", absent)),
        drop_vision | repeated(conditions.get("drop_vision", absent)),
    ).astype(jnp.float32)
    parts = jnp.split(velocity, len(terms))
    return sum(weight * part for (weight, _, _), part in zip(terms, parts))


def sample(
    model: Callable[..., jax.Array],
    noise: jax.Array,
    conditions: Mapping[str, jax.Array],
    *,
    steps: int,
    shift: float,
    text: float,
    vision: float,
) -> jax.Array:
    """Integrate from noise to data with Euler steps.

    Args:
      model, conditions, text, vision: as in `guided_velocity`.
      noise: [batch, height, width, channels] float32, the point at t = 1.
      steps: number of Euler steps.
      shift: of the time grid.

    Returns:
      [batch, height, width, channels] float32 normalised latents.
    """
    times = jnp.asarray(time_grid(steps, shift))

    def euler(x, interval):
        t, t_next = interval
        velocity = guided_velocity(model, x, t, conditions, text=text, vision=vision)
        return x + (t_next - t) * velocity, None

    return jax.lax.scan(euler, noise, (times[:-1], times[1:]))[0]
