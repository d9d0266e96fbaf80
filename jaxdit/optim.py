"""The optimizer: AdamW or Muon with clipping, warm-up and cosine, decay on kernels only; and the average of the weights (EMA).

Everything here counts applied updates, never attempted ones: a voided update moves neither the schedule nor the EMA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

MOMENTUM = 0.95  # Muon's (Jordan et al. 2024; as torch.optim.Muon)


def warmup_updates(warmup_steps: int | None, total_steps: int) -> int:
    """Length of the warm-up: warmup_steps, or min(5,000, total // 10) where it is None.

    Raises:
      ValueError: an explicit warm-up over a tenth of the run, or below 0.
    """
    if warmup_steps is None:
        return min(5_000, total_steps // 10)
    if warmup_steps < 0:
        raise ValueError(f"optim.warmup_steps={warmup_steps} must not be below 0; 0 means none.")
    if warmup_steps > total_steps // 10:
        raise ValueError(
            f"optim.warmup_steps={warmup_steps} is more than a tenth of train.total_steps={total_steps}; take at most "
            f"{total_steps // 10}, or leave it out, which is min(5,000, total // 10)."
        )
    return warmup_steps


def learning_rate(*, peak: float, end: float, warmup: int, total: int) -> optax.Schedule:
    """Linear warm-up to peak at update `warmup`, then cosine to end at update `total`; update 1 already moves."""
    cosine = optax.cosine_decay_schedule(peak, max(total - warmup, 1), alpha=end / peak)

    def schedule(updates):
        update = updates + 1
        return jnp.where(update < warmup, peak * update / max(warmup, 1), cosine(jnp.maximum(update - warmup, 0)))

    return schedule


def decay_mask(params: Any) -> Any:
    """True for the leaves named "kernel": by name, because the stacked biases [layers, width] look like matrices."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def of_config(config: Any, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`make_optimizer` by the section optim of a configuration."""
    names = ("name", "b1", "b2", "eps", "weight_decay", "clip_norm")
    return make_optimizer(schedule, **{name: config[name] for name in names})


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str = "adamw",
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformationExtraArgs:
    """Clip by the global norm, then AdamW (Loshchilov and Hutter 2019), or Muon for the blocks' kernels and AdamW for the rest.

    `update` takes one argument more, moves: where it is False the changes are zero and the state stays what it was, bit for bit,
    because moments decay by 1 and take in 0. To choose between old and new moments afterwards would keep both: 1.5 times the
    parameters more in memory (tests/jaxdit/test_estimate.py), and a slower update on the CPU. The gradients are clipped by one
    factor, in the pass that reads them for AdamW: optax.clip_by_global_norm writes a copy of them (0.09 for 0.12 s on two cores).
    """

    def chosen(b1, b2, momentum, moves=True):
        def clip(gradients, _):
            factor = clip_norm / jnp.maximum(optax.global_norm(gradients), clip_norm)
            return _or_zero(moves, jax.tree.map(lambda leaf: leaf * factor, gradients))

        scaled = optax.scale_by_adam(b1, b2, eps)
        if name == "muon":
            scaled = optax.partition({"muon": _muon(momentum), "adamw": scaled}, _names)
        decayed = optax.add_decayed_weights(weight_decay, decay_mask)
        return optax.chain(optax.stateless(clip), optax.chain(scaled, decayed, optax.scale_by_learning_rate(schedule)))

    def update(gradients, state, params, *, moves=True):
        held = chosen(*(jnp.where(moves, beta, 1.0) for beta in (b1, b2, MOMENTUM)), moves)
        changes, new = held.update(gradients, state, params)
        counts_held = jax.tree.map(lambda leaf, old: leaf if leaf.ndim else jnp.where(moves, leaf, old), new, state)
        return _or_zero(moves, changes), counts_held

    return optax.GradientTransformationExtraArgs(chosen(b1, b2, MOMENTUM).init, update)


def _muon(momentum):
    """Muon (Jordan et al. 2024) for kernels [layers, in, out]: each layer's momentum with its singular values near 1.

    Times 0.2 sqrt(max(in, out)), which makes its changes as large as AdamW's (Liu et al. 2025, "Muon is Scalable for LLM
    Training", sec. 2.2): learning rate and decay stay what they are.
    """

    def each(kernels):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), kernels)

    def as_large(kernels, _):
        return jax.tree.map(lambda leaf: 0.2 * max(leaf.shape[1:]) ** 0.5 * leaf, kernels)

    orthogonal = optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=each)
    return optax.chain(orthogonal, optax.stateless(as_large))


def _names(params: Any) -> Any:
    """ "muon" for the kernels of the blocks; what lies outside them is first or last on its way, which is left to AdamW."""

    def one(path, _):
        return "muon" if path[0].key == "blocks" and path[-1].key == "kernel" else "adamw"

    return jax.tree_util.tree_map_with_path(one, params)


def _or_zero(wanted, tree):
    return jax.tree.map(lambda leaf: jnp.where(wanted, leaf, 0), tree)


def ema_decay(updates: jax.Array, maximum: float) -> jax.Array:
    """min(maximum, (1 + updates) / (10 + updates)), where updates counts the one just applied.

    The ramp lets a short run forget its start: a flat 0.9999 leaves 61% of it after 5,000 updates.
    """
    return jnp.minimum(maximum, (1 + updates) / (10 + updates))


def update_ema(ema: Any, params: Any, decay: jax.Array) -> Any:
    """decay * ema + (1 - decay) * params, leaf by leaf, float32; written as a small step, which rounds least."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
