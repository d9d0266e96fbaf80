"""The loss on images that training never sees, and on as many that it does: the same measure, so their gap is memorising.

An image's noise is a function of its id, its t of its rank among the images judged; both splits are given the same t, spread
evenly over those of the training. Were they drawn, two splits that are alike would stand several per cent apart. Each loss is
one image's own: the numbers do not depend on the step, the seed, the size of the batches or the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxdit import flow

# What a sample is given: shares of (drop_both, drop_text, drop_vision).
CONDITIONS = {
    "text_vision": (0.0, 0.0, 0.0),
    "text": (0.0, 0.0, 1.0),
    "vision": (0.0, 1.0, 0.0),
    "none": (1.0, 0.0, 0.0),
}
SPLITS = ("held_out", "training")


def losses(graph: Any, options: Mapping[str, float], params: Any, batch: dict, numbers: jax.Array, drops: jax.Array):
    """[batch] losses and timesteps; numbers is [batch, 3] uint32 of `data.Dataset.fixed_batches`, drops [3] of CONDITIONS."""
    found = flow.losses(
        nnx.merge(graph, params),
        batch,
        jax.random.wrap_key_data(numbers[:, :2]),
        shares=numbers[:, 2].astype(np.float32) * 2.0**-32,
        **{name: options[name] for name in ("mean", "std", "shift")},
        drop_both=drops[0],
        drop_text=drops[1],
        drop_vision=drops[2],
    )
    return found["loss"], found["t"]


def evaluate(
    judge: Callable[..., tuple[jax.Array, jax.Array]],
    weights: Mapping[str, Any],
    dataset: Any,
    *,
    batch_size: int,
    images: int,
    places: np.ndarray | None = None,
    place: Callable[[Any], Any],
    everywhere: Callable[[Any], Any],
    stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """The numbers of one evaluation.

    Args:
      judge: `losses` compiled, with graph and options bound.
      weights: {"ema": parameters, "raw": parameters}.
      dataset: data.Dataset.
      batch_size: images at a time.
      images: at most so many of each split.
      places: the rows of each batch that this process reads; None: all.
      place: puts a batch on the devices, divided; everywhere: the same, whole on each.
      stopped: asked between batches; true ends the evaluation.

    Returns:
      {"eval/SPLIT/WEIGHTS/CONDITIONS": mean loss, "eval/held_out/ema/t0": ...}; None where it was stopped.
    """
    drops = {name: everywhere(np.asarray(shares, np.float32)) for name, shares in CONDITIONS.items()}
    row: dict[str, float] = {}
    for split in SPLITS:
        found: dict[tuple[str, str], list] = {(w, c): [] for w in weights for c in CONDITIONS}
        times = []
        for batch, numbers, count in dataset.fixed_batches(split, batch_size, images, places):
            if stopped():
                return None
            batch, numbers = place(batch), place(numbers)
            for name, conditions in found:
                loss, t = judge(weights[name], batch, numbers, drops[conditions])
                found[name, conditions].append(np.asarray(jax.device_get(loss))[:count].astype(np.float64))
            times.append(np.asarray(jax.device_get(t))[:count])
        if not times:
            continue
        for (name, conditions), parts in found.items():
            row[f"eval/{split}/{name}/{conditions}"] = float(np.concatenate(parts).mean())
        if split == "held_out":
            row |= _by_tenth(np.concatenate(found["ema", "text_vision"]), np.concatenate(times))
    return row


def _by_tenth(values: np.ndarray, t: np.ndarray) -> dict[str, float]:
    tenths = np.minimum((t * flow.TENTHS).astype(int), flow.TENTHS - 1)
    return {f"eval/held_out/ema/t{k}": float(values[tenths == k].mean()) for k in np.unique(tenths)}
