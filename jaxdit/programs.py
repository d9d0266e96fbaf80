"""What a training compiles, as its loop runs it and as jaxdit.plan measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxdit import heldout, mesh, model, optim, trained, update


@dataclass(frozen=True)
class Programs:
    """One `accumulate` a bucket and length of text, one `judge` a bucket, one `change`.

    Attributes:
      settings, graph, shapes: of the model, from `trained.model_settings` and `model.abstract`.
      fresh: () -> a new state, as `update.new_state`; this and the next are not compiled, but called within a jit.
      state_of: (params) -> the state that begins with them, as `update.state_of`.
      zeros, accumulate, change, judge: from `mesh.compiled`.
    """

    settings: Mapping[str, Any]
    graph: Any
    shapes: Any
    fresh: Callable
    state_of: Callable
    zeros: Callable
    accumulate: Callable
    change: Callable
    judge: Callable


def of(config: Any, widths: Mapping[str, int], devices: jax.sharding.Mesh) -> Programs:
    """The programs of a configuration on these devices; nothing is compiled before it is called.

    Args:
      config: of a training.
      widths: of the conditions and the latent, from dataset.json.
      devices: from `mesh.make_mesh`.
    """
    settings = trained.model_settings(config.model, widths, devices.shape["fsdp"])
    graph, shapes = model.abstract(settings)
    schedule = optim.learning_rate(
        peak=config.optim.peak_learning_rate,
        end=config.optim.end_learning_rate,
        warmup=optim.warmup_updates(config.optim.warmup_steps, config.train.total_steps),
        total=config.train.total_steps,
    )
    optimizer = optim.of_config(config.optim, schedule)
    flow_options, seed = dict(config.flow), config.train.seed
    gathering_graph = mesh.gathering(devices, graph, shapes)
    fresh = partial(update.new_state, settings, optimizer, seed)
    compiled = mesh.compiled(
        devices,
        jax.eval_shape(fresh),
        new_total=partial(update.new_total, separate=trained.separate(settings), dtype=settings["dtype"]),
        accumulate=partial(update.accumulate_gradients, gathering_graph, flow_options, seed),
        change=partial(update.apply_update, optimizer, schedule, config.optim.ema_decay, config.train.batch_size),
        judge=partial(heldout.losses, gathering_graph, flow_options),
    )
    return Programs(settings, graph, shapes, fresh, partial(update.state_of, optimizer), *compiled)
