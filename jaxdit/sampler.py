"""Sampling: dx/dt = v from noise (t = 1) to data (t = 0), guided by two conditions.

v = v(0,0) + w_vision [v(0,vision) - v(0,0)] + w_text [v(text,vision) - v(0,vision)]: classifier-free guidance (Ho and
Salimans 2022) over two conditions, as Brooks et al. 2023 ("InstructPix2Pix", eq. 3) order them. Evaluations whose weight
is zero are not made. A solver is a table, one row an evaluation of the model, so that every solver is the same loop, and
what changes between pictures (weights, times, noise) is an argument of one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

SOLVERS = ("euler", "heun", "adams")
TERMS = ((True, True), (True, False), (False, False))  # (drop_text, drop_vision) of the evaluations guidance combines
CONDITIONAL = (2,)  # the one evaluation where nothing is guided


def time_grid(steps: int, shift: float, start: float = 1.0) -> np.ndarray:
    """[steps + 1] float32 from `start` to 0, uniform and then shifted as in `flow.shift_timesteps`.

    From 1 they are the sigmas of diffusers' FlowMatchEulerDiscreteScheduler(shift=shift) after
    set_timesteps(sigmas=linspace(1, 1/steps, steps)).
    """
    first = start / (shift - (shift - 1) * start)  # what the shift brings to `start`
    t = first * np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).astype(np.float32)


def solver_table(solver: str, times: np.ndarray) -> np.ndarray:
    """The evaluations that a solver makes on a grid of times.

    Args:
      solver: "euler"; "heun", two evaluations a step but for the last (the trapezoidal rule; Karras et al. 2022, alg. 1);
        "adams", one a step (Adams-Bashforth of second order on an uneven grid; its first step is Euler's).
      times: [steps + 1], falling to 0.

    Returns:
      [evaluations, 4] float32 rows (t, now, before, advance) for `sample`: evaluated at t, v moves the point on to
      base + now v + before v_before; where advance is 1 that is the next base.
    """
    times = np.asarray(times, np.float64)
    h = np.diff(times)
    if solver == "euler":
        rows = [(t, step, 0.0, 1) for t, step in zip(times, h)]
    elif solver == "heun":
        pairs = [[(t, step, 0.0, 0), (t + step, step / 2, step / 2, 1)] for t, step in zip(times[:-2], h)]
        rows = [*(row for pair in pairs for row in pair), (times[-2], h[-1], 0.0, 1)]
    elif solver == "adams":
        # After a step of no length, which float32 makes of the steepest grids, there is nothing to extrapolate from.
        half = np.concatenate([[0.0], np.divide(h[1:] ** 2, 2 * h[:-1], out=np.zeros_like(h[1:]), where=h[:-1] != 0)])
        rows = [(t, step + part, -part, 1) for t, step, part in zip(times, h, half)]
    else:
        raise ValueError(f"solver={solver}: the choices are {', '.join(SOLVERS)}")
    return np.array(rows, np.float32)


def guidance_weights(text: float | Sequence[float], vision: float | Sequence[float]) -> np.ndarray:
    """[3, batch] float32, the weights of `TERMS`, which sum to 1; text and vision are w_text and w_vision, [] or [batch]."""
    text, vision = np.broadcast_arrays(np.atleast_1d(text), np.atleast_1d(vision))
    return np.stack([1 - vision, vision - text, text]).astype(np.float32)


def needed_terms(weights: np.ndarray) -> tuple[int, ...]:
    """Which of the `TERMS` any sample of a [3, batch] array of weights needs, one to three places."""
    return tuple(int(place) for place in np.flatnonzero(np.any(weights != 0, axis=1)))


def initial_noise(seeds: jax.Array, positions: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """[batch, *shape] standard normal; each picture's depends on its own seed and position alone, not on its batch."""

    def one(seed, position):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), position), shape)

    return jax.vmap(one)(seeds, positions)


def guided_velocity(
    model: Callable[..., jax.Array],
    x: jax.Array,
    t: jax.Array,
    conditions: Mapping[str, jax.Array],
    *,
    terms: tuple[int, ...],
    weights: jax.Array,
    together: bool = True,
) -> jax.Array:
    """Guided velocity, its one to three evaluations made as one batch.

    Args:
      model: (x, t, conditions, drop_text, drop_vision) -> velocity.
      x: [batch, height, width, channels].
      t: [] in [0, 1].
      conditions: arrays with leading axis batch, handed to the model; "drop_text" and "drop_vision" ([batch] bool), where
        present, mark samples that have no such condition at all.
      terms: places in `TERMS` of the evaluations to make.
      weights: [3, batch], from `guidance_weights`.
      together: False makes the evaluations one after the other: a third of the memory.

    Returns:
      [batch, height, width, channels] float32.
    """
    if not together:
        parts = [guided_velocity(model, x, t, conditions, terms=(place,), weights=weights) for place in terms]
        return sum(parts)
    batch, absent = x.shape[0], jnp.zeros((x.shape[0],), bool)

    def repeated(value):
        # Copies of one sample stand side by side, so that a batch divided over devices stays where it is.
        return jnp.repeat(value, len(terms), axis=0)

    drop_text, drop_vision = (jnp.tile(jnp.array(drops), batch) for drops in zip(*(TERMS[place] for place in terms)))
    velocity = model(
        repeated(x),
        jnp.full((batch * len(terms),), t),
        {name: repeated(value) for name, value in conditions.items()},
        drop_text | repeated(conditions.get("drop_text", absent)),
        drop_vision | repeated(conditions.get("drop_vision", absent)),
    ).astype(jnp.float32)
    used = weights[jnp.array(terms)].T
    return jnp.einsum("bjhwc,bj->bhwc", velocity.reshape(batch, len(terms), *x.shape[1:]), used, precision="highest")


def start(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `advance` carries from row to row, before the first: of x, the point at the table's first t."""
    x = x.astype(jnp.float32)
    return x, x, jnp.zeros_like(x)


def advance(
    model: Callable[..., jax.Array],
    carry: tuple[jax.Array, jax.Array, jax.Array],
    conditions: Mapping[str, jax.Array],
    *,
    table: jax.Array,
    terms: tuple[int, ...],
    weights: jax.Array,
    interval: jax.Array | None = None,
    together: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Integrate towards the data, one evaluation a row of the table.

    Args:
      model, conditions, terms, weights, together: as in `guided_velocity`.
      carry: (base, point, last velocity), [batch, height, width, channels] float32 each, from `start` or from rows before.
      table: [evaluations, 4], all rows of a `solver_table` or the next few.
      interval: [2] (low, high): guide where low <= t <= high alone, and make one evaluation elsewhere (Kynkaanniemi et al.
        2024, "Applying Guidance in a Limited Interval"); None: everywhere.

    Returns:
      The carry after these rows; after the last row its point is the normalised latents.
    """

    def velocity(point, t):
        def guided(point):
            return guided_velocity(model, point, t, conditions, terms=terms, weights=weights, together=together)

        def plain(point):
            return guided_velocity(model, point, t, conditions, terms=CONDITIONAL, weights=jnp.ones_like(weights))

        if interval is None or terms == CONDITIONAL:
            return guided(point)
        return jax.lax.cond((interval[0] <= t) & (t <= interval[1]), guided, plain, point)

    def evaluate(carry, row):
        base, point, before = carry
        t, now, earlier, advance = row
        v = velocity(point, t)
        point = base + now * v + earlier * before
        return (jnp.where(advance > 0, point, base), point, v), None

    return jax.lax.scan(evaluate, carry, table)[0]
