"""Twenty real updates a bucket: how fast the device at hand is, and what memory its compiled programs ask for.

The functions are those of the training loop, jitted as there; the batches are noise, so no data set is needed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from encode import records
from jaxdit import mesh, programs

UPDATES = 20
PATIENCE, AT_LEAST = 300.0, 3  # seconds, after which so many updates are enough: at 1024 one takes a minute


@dataclass(frozen=True)
class Bucket:
    """A shape of pictures: its name WIDTHxHEIGHT, how many, its latent [height, width, channels], text tokens."""

    name: str
    images: int
    latent: tuple[int, int, int]
    text: int


@dataclass(frozen=True)
class Measured:
    """Of one bucket: images a second, bytes by the compiled programs; or why there is nothing."""

    rate: float = 0.0
    memory: int = 0
    updates: int = 0
    problem: str = ""


def measure(config: Any, buckets: Sequence[Bucket], widths: Mapping[str, int]) -> dict[str, Measured]:
    """Twenty real updates in each bucket, with batches of noise, by the trainer's own compiled functions.

    Returns:
      Of each bucket by name; one that the device's memory does not hold says so, and the next is tried.
    """
    devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
    everywhere, divided = mesh.replicated(devices), mesh.over_batch(devices)
    made = programs.of(config, widths, devices)
    initial = jax.jit(made.fresh, out_shardings=mesh.shardings(devices, jax.eval_shape(made.fresh)))
    found = {}
    for bucket in buckets:
        try:
            batch = jax.device_put(noise(bucket, widths, config.train.micro_batch), divided)
            where = jax.device_put(np.zeros(2, np.int32), everywhere)
            found[bucket.name] = _measure(made, initial, batch, where, config.train)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found[bucket.name] = Measured(problem="out of memory")
    return found


def _measure(made: programs.Programs, initial, batch, where, train) -> Measured:
    state = initial()
    total = made.zeros(state["params"])
    accumulate = made.accumulate.lower(state["params"], total, batch, where).compile()
    change = made.change.lower(state, total).compile()
    updates, began, before = 0, 0.0, None
    while updates < UPDATES + 1 and (updates <= AT_LEAST or time.monotonic() - began < PATIENCE):
        for _ in range(train.batch_size // train.micro_batch):
            total = accumulate(state["params"], total, batch, where)
        state, row = change(state, total)
        total, updates = made.zeros(state["params"]), updates + 1
        if updates == 1:  # not counted: it touches all memory for the first time
            jax.block_until_ready(state)
            began = time.monotonic()
        jax.block_until_ready(before)  # one update late, as in the training loop
        before = row
    jax.block_until_ready(state)
    rate = (updates - 1) * train.batch_size / (time.monotonic() - began)
    state_bytes, parameters, batch_bytes = (_bytes(tree) for tree in (state, state["params"], batch))
    # Beside the arguments of each program: moments and EMA, and the next batch; for the update both batches.
    gradients = _compiled(accumulate) + state_bytes - parameters + batch_bytes
    return Measured(rate, max(gradients, _compiled(change) + 2 * batch_bytes), updates - 1)


def _bytes(tree) -> int:
    """Of one device's share."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _compiled(program) -> int:
    """Bytes that a compiled program needs at its peak, by its own account."""
    sizes = program.memory_analysis()
    return (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )


def noise(bucket: Bucket, widths: Mapping[str, int], count: int) -> dict[str, np.ndarray]:
    """A batch of `count` samples as `data.Dataset.read` gives them, of noise, every caption at its full length."""
    rng = np.random.default_rng(0)
    return {
        "latent": rng.standard_normal((count, *bucket.latent), np.float32),
        "text": rng.standard_normal((count, bucket.text, widths["text"]), np.float32).astype(
            records.DTYPES["bfloat16"]
        ),
        "text_length": np.full(count, bucket.text, np.int32),
        "vision": rng.standard_normal((count, widths["vision"]), np.float32),
    }
