"""Rectified flow: timesteps, the straight path, its velocity, the loss, and which conditions are dropped.

x_t = (1 - t) x0 + t noise and v = noise - x0 (Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022), with t drawn
as in Esser et al. 2024, "Scaling Rectified Flow Transformers", sections 3.1 and 5.3.2. t is the sigma of diffusers'
FlowMatchEulerDiscreteScheduler. Every draw is a function of one key a sample, so it does not depend on how samples are
cut into micro-batches or spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

TENTHS = 10  # bins of t in which losses are reported
NEGLIGIBLE = 1e-4  # squared size of a prediction, beside its target's, that has no direction yet


def sample_keys(seed: int, step: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """One random key a sample.

    Args:
      seed: train.seed.
      step: [] integer, the attempted update.
      first: [] integer, position of the first sample within the update.
      count: number of samples.

    Returns:
      [count] typed keys; equal (seed, step, position) give equal keys.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(first + jnp.arange(count))


def shift_timesteps(t: jax.Array, shift: float) -> jax.Array:
    """t <- shift t / (1 + (shift - 1) t): towards noise for shift > 1 (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def draw_timesteps(keys: jax.Array, *, mean: float, std: float, shift: float) -> jax.Array:
    """[batch] t = shifted sigmoid(mean + std N(0, 1)), float32 in (0, 1); keys is [batch]."""
    normal = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
    return shift_timesteps(jax.nn.sigmoid(mean + std * normal), shift)


def quantile_timesteps(shares: jax.Array, *, mean: float, std: float, shift: float) -> jax.Array:
    """[batch] the t below which `draw_timesteps` falls in these shares of its draws; shares is [batch] in (0, 1)."""
    return shift_timesteps(jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(shares)), shift)


def draw_dropout(keys: jax.Array, *, both: float, text: float, vision: float) -> tuple[jax.Array, jax.Array]:
    """Which conditions each sample loses, by ONE categorical draw.

    Args:
      keys: [batch].
      both: share of the samples that lose both conditions.
      text: share that loses only the text.
      vision: share that loses only the vision vector.

    Returns:
      (drop_text, drop_vision), each [batch] bool.
    """
    u = jax.vmap(lambda key: jax.random.uniform(key, ()))(keys)
    drop_text = u < both + text
    drop_vision = (u < both) | ((u >= both + text) & (u < both + text + vision))
    return drop_text, drop_vision


def interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Point on the straight path from data to noise.

    Args:
      x0: [batch, height, width, channels] normalised latents.
      noise: same shape, standard normal.
      t: [batch] in [0, 1]; 0 is data, 1 is noise.

    Returns:
      [batch, height, width, channels] x_t = (1 - t) x0 + t noise  (Liu et al. 2022, eq. 1).
    """
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * noise


def velocity_target(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """dx_t/dt = noise - x0, what the model learns."""
    return noise - x0


def mean_square(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of the squares of each sample, in float32 because a bfloat16 sum over a latent keeps two digits.

    Args:
      values: [batch, height, width, channels].
      mask: [batch, height, width], 1 where the latent is picture and 0 where it is padding; None: all picture.

    Returns:
      [batch] float32.
    """
    squares = jnp.square(values.astype(jnp.float32)).mean(-1)
    if mask is None:
        return squares.mean((1, 2))
    mask = mask.astype(jnp.float32)
    return (squares * mask).sum((1, 2)) / jnp.maximum(mask.sum((1, 2)), 1)


def direction_error(predicted: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """1 - the cosine between two velocities, each a whole picture (Yao et al. 2024, "FasterDiT").

    Args:
      predicted, target: [batch, height, width, channels] float32.
      mask: as of `mean_square`.

    Returns:
      [batch] float32 in [0, 2]; 1 where nothing is predicted, as a new model does, whose gradient is finite.
    """
    if mask is not None:
        predicted, target = (values * mask[..., None] for values in (predicted, target))
    dot, ours, theirs = ((a * b).sum((1, 2, 3)) for a, b in ((predicted, target), (predicted,) * 2, (target,) * 2))
    return 1 - dot * jax.lax.rsqrt((ours + NEGLIGIBLE * theirs) * theirs)


def losses(
    model: Callable[..., jax.Array],
    batch: Mapping[str, jax.Array],
    keys: jax.Array,
    *,
    mean: float,
    std: float,
    shift: float,
    drop_both: float | jax.Array,
    drop_text: float | jax.Array,
    drop_vision: float | jax.Array,
    shares: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Training loss of each sample, and what tells where a loss comes from.

    Args:
      model: (x_t, t, batch, drop_text, drop_vision) -> predicted velocity, as `model.DiT`.
      batch: latent [batch, height, width, channels] float32 normalised, the conditions, and mask where a bucket has one.
      keys: [batch], from `sample_keys`.
      mean, std, shift: of the timesteps.
      drop_both, drop_text, drop_vision: shares of the samples, see `draw_dropout`.
      shares: of `quantile_timesteps`, in place of a draw.

    Returns:
      [batch] float32 each: "loss", a mean square; "direction", of `direction_error`; "t"; "velocity" and "target", mean squares
      of the predicted and of the true velocity.
    """
    x0, mask = batch["latent"], batch.get("mask")
    time_keys, drop_keys, noise_keys = (jax.vmap(jax.random.fold_in, (0, None))(keys, purpose) for purpose in range(3))
    draw, draws = (draw_timesteps, time_keys) if shares is None else (quantile_timesteps, shares)
    t = draw(draws, mean=mean, std=std, shift=shift)
    without_text, without_vision = draw_dropout(drop_keys, both=drop_both, text=drop_text, vision=drop_vision)
    noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(noise_keys)
    target = velocity_target(x0, noise)
    predicted = model(interpolate(x0, noise, t), t, batch, without_text, without_vision).astype(jnp.float32)
    return {
        "loss": mean_square(predicted - target, mask),
        "direction": direction_error(predicted, target, mask),
        "t": t,
        "velocity": mean_square(jax.lax.stop_gradient(predicted), mask),
        "target": mean_square(target, mask),
    }


def sum_by_timestep(values: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums and counts of [batch] values by tenths of t: two [10] float32 arrays."""
    tenth = jax.nn.one_hot(jnp.minimum((t * TENTHS).astype(jnp.int32), TENTHS - 1), TENTHS)
    return (values[:, None] * tenth).sum(0), tenth.sum(0)
