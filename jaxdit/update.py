"""One optimizer update as pure functions: gradients summed over micro-batches, then AdamW and the average (EMA).

Micro-batches of one update may come from different buckets; sums over samples, divided once at the end, make the gradient
the exact mean over all of them. An update that is not finite moves nothing but the counts of voided ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxdit import flow, model, optim

# The parts through which a condition acts, by the path of their parameters: what health watches.
CONDITIONING = {
    "time": (("time_in",), ("time_out",)),
    "vision": (("vision_in",), ("vision_out",)),
    "text": (("text_in",), ("text_norm",)),
    "null_vision": (("null_vision",),),
    "null_text": (("null_text",),),
    "modulation": (("blocks", "modulation"), ("final_modulation",)),
    "cross_attention": (("blocks", "cross_attention"),),
}
SUMS = ("loss", "velocity", "target")


def new_state(settings, optimizer, seed):
    """The state of a run before its first update; see `state_of`."""
    return state_of(optimizer, model.initial_parameters(settings, seed))


def state_of(optimizer, params):
    """params, ema (a copy: an alias could not be donated), opt_state, and the counts of updates."""
    zero = jnp.zeros((), jnp.int32)
    return {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
        "updates": zero,
        "voided": jnp.copy(zero),
        "voided_in_row": jnp.copy(zero),
    }


def new_total(params, *, separate: bool = False, dtype: str = "float32"):
    """Accumulators of one update, float32: a bfloat16 sum would lose the small gradients.

    Args:
      params: the parameters, or their shapes where nothing is separate.
      separate: whether each layer has sums of its own (`model.separated`). The kernels lie beside them then in the dtype of the
        products, cast once for all micro-batches.
      dtype: of the products.
    """
    gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    cast = {"kernels": model.kernels(model.separated(params), dtype)} if separate and dtype != "float32" else {}
    return (
        cast
        | {
            "gradients": model.separated(gradients) if separate else gradients,
            "loss_by_t": jnp.zeros(flow.TENTHS, jnp.float32),
            "count_by_t": jnp.zeros(flow.TENTHS, jnp.float32),
        }
        | {name: jnp.zeros((), jnp.float32) for name in SUMS}
    )


def accumulate_gradients(graph, options, seed, params, total, batch, where):
    """Add one micro-batch's sums of losses and gradients to `total`.

    The backward pass adds each layer's gradients where they belong as it goes (jax.vjp's `with_refs`): no copy of the
    parameters' size lies beside `total`, and none is written, zeroed and added afterwards.

    Args:
      graph: definition of the model.
      options: of the flow: mean, std, shift, drop_both, drop_text, drop_vision, direction.
      seed: train.seed.
      params: the parameters.
      total: from `new_total`.
      batch: of `data.training_batches`, arrays alone.
      where: [2] int32, the step and the position of the micro-batch's first sample within the update.
    """
    names = ("mean", "std", "shift", "drop_both", "drop_text", "drop_vision")
    keys = flow.sample_keys(seed, where[0], where[1], batch["latent"].shape[0])

    if model.is_separated(total["gradients"]):
        params = model.separated(params)

    def summed_loss(params):
        if "kernels" in total:
            params = model.with_kernels(params, total["kernels"])
        found = flow.losses(nnx.merge(graph, params), batch, keys, **{name: options[name] for name in names})
        weight = options.get("direction", 0.0)
        return (found["loss"] + weight * found["direction"] if weight else found["loss"]).sum(), found

    loss, backward, found = jax.vjp(summed_loss, params, has_aux=True)
    gradients = jax.tree.map(jax.new_ref, total["gradients"])
    backward.with_refs(gradients)(jnp.ones_like(loss))
    by_t, counts = flow.sum_by_timestep(found["loss"], found["t"])
    return (
        total
        | {
            "gradients": jax.tree.map(jax.ref.freeze, gradients),
            "loss_by_t": total["loss_by_t"] + by_t,
            "count_by_t": total["count_by_t"] + counts,
        }
        | {name: total[name] + found[name].sum() for name in SUMS}
    )


def apply_update(optimizer, schedule, maximum_decay, batch_size, state, total):
    """One update from the mean over all samples; where anything is not finite, nothing moves but the counts of voided.

    Returns:
      (new state, row): row holds the numbers of metrics.jsonl that the device knows, [] or (loss_t) [10].
    """
    gradients = jax.tree.map(lambda leaf: leaf / batch_size, model.stacked(total["gradients"]))
    loss, norm = total["loss"] / batch_size, optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    changes, opt_state = optimizer.update(gradients, state["opt_state"], state["params"], moves=finite)
    params = optax.apply_updates(state["params"], changes)
    applied = finite.astype(jnp.int32)
    updates = state["updates"] + applied
    decay = jnp.where(finite, optim.ema_decay(updates, maximum_decay), 1.0)
    new = {
        "params": params,
        "ema": optim.update_ema(state["ema"], params, decay),
        "opt_state": opt_state,
        "updates": updates,
        "voided": state["voided"] + 1 - applied,
        "voided_in_row": (state["voided_in_row"] + 1) * (1 - applied),
    }
    row = {name: new[name] for name in ("updates", "voided", "voided_in_row")} | {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": schedule(state["updates"]),
        "velocity_rms": jnp.sqrt(total["velocity"] / batch_size),
        "target_rms": jnp.sqrt(total["target"] / batch_size),
        "loss_t": total["loss_by_t"] / total["count_by_t"],  # 0 / 0 where no sample fell
        "ema_distance": _distance(new["ema"], new["params"]),
    }
    for name, paths in CONDITIONING.items():
        row[f"grad/{name}"] = norm_of(gradients, paths)
        size = jnp.maximum(norm_of(params, paths), 1e-12)  # what begins at zero has moved by its whole size
        row[f"move/{name}"] = norm_of(changes, paths) / size
    return new, row


def _distance(ema, params):
    """|ema - params| / |params|."""
    return optax.global_norm(jax.tree.map(jnp.subtract, ema, params)) / optax.global_norm(params)


def norm_of(tree, paths):
    """The norm of the sub-trees of a nested dict at the given paths (of CONDITIONING)."""
    found = []
    for path in paths:
        part = tree
        for name in path:
            part = part[name]
        found.append(part)
    return optax.global_norm(found)
