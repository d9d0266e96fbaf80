"""Attention forward and backward at the shapes of our models: cuDNN against ours in JAX and JAX's own, speed and error.

.venv/bin/python -m bench.attention [--tokens=256,1024,4096] [--models=nano,full,full-8] [--seconds=2]

The errors are those of output and gradients against the plain formula in float32, relative to their size; texts are masked by
their lengths, as in training. full-8 is full with 8 heads of 128 in place of 16 of 64: the same operations, of which Hopper's
kernels do more a second (Shah et al. 2024, fig. 5 and 6). Exit code 1: an error is above 2%. Writes
bench/results/attention-DEVICE.json. Without a GPU there is no cuDNN.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bench import device
from encode import commandline
from jaxdit import attention, mesh

TOKENS = flags.DEFINE_list("tokens", ["256", "1024", "4096"], "Image tokens: 256, 512 and 1024 pixels a side.")
SECONDS = flags.DEFINE_float("seconds", 2.0, "Time spent on each measurement.")
HEADS = {"nano": (6, 64), "full": (16, 64), "full-8": (8, 128)}  # how many, and how wide
MODELS = flags.DEFINE_list("models", list(HEADS), "Whose heads.")
KINDS = ("cudnn", "by heads", "xla")  # what the model runs with a card, and without; jax.nn.dot_product_attention's own
LARGEST_ERROR = 0.02  # bfloat16 keeps eight bits: a third of a percent is usual
TEXT, IMAGE_TOKENS = 128, 32_768  # tokens a batch: what a 24 GB card takes at once


def plain(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """softmax(q k^T / sqrt(size)) v in float32, of [batch, tokens, heads, size]."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bnkd,blkd->bknl", q, k, precision="highest") / q.shape[-1] ** 0.5
    if lengths is not None:
        logits = jnp.where(jnp.arange(k.shape[1]) < lengths[:, None, None, None], logits, -jnp.inf)
    return jnp.einsum("bknl,blkd->bnkd", jax.nn.softmax(logits), v, precision="highest")


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a call, after one that compiles."""
    jax.block_until_ready(run())
    times, began = [], time.monotonic()
    while time.monotonic() - began < SECONDS.value or len(times) < 3:
        start = time.monotonic()
        jax.block_until_ready(run())
        times.append(time.monotonic() - start)
    return 1e3 * float(np.median(times))


def measure(implementation: str, q, k, v, lengths) -> dict[str, float]:
    """Time of forward and backward together, operations a second, and the errors of the first sample."""

    def attend(q, k, v, lengths):
        if implementation == "xla":
            return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="xla")
        return attention.attend(q, k, v, lengths, implementation)

    def back(attend, *given):
        return jax.grad(lambda *given: (attend(*given).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))(*given)

    @partial(jax.jit, static_argnums=0)
    def both(attend, q, k, v, lengths):
        return attend(q, k, v, lengths), *back(lambda q, k, v: attend(q, k, v, lengths), q, k, v)

    step = jax.jit(lambda q, k, v: back(lambda q, k, v: attend(q, k, v, lengths), q, k, v))
    few = [*(x[:1] for x in (q, k, v)), None if lengths is None else lengths[:1]]
    found, wanted = both(attend, *few), both(plain, *few)
    time_taken = milliseconds(lambda: step(q, k, v))
    operations = (
        3.5 * 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]
    )  # backward: five products for two
    return {
        "ms": round(time_taken, 3),
        "teraflops": round(operations / time_taken / 1e9, 3),
        "error": _error(found[:1], wanted[:1]),
        "error of the gradients": _error(found[1:], wanted[1:]),
    }


def _error(found, wanted) -> float:
    """The largest of the arrays' distances, relative to the wanted one's size."""
    pairs = [(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)) for a, b in zip(found, wanted)]
    return float(f"{max(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) for a, b in pairs):.2g}")


def main() -> int:
    on_gpu = jax.default_backend() == "gpu"
    dtype = mesh.compute_dtype("auto")
    name = jax.devices()[0].device_kind if on_gpu else device.processor()
    rows = []
    for model in MODELS.value:
        for tokens in map(int, TOKENS.value):
            batch = max(IMAGE_TOKENS // tokens, 1) if on_gpu else 1
            for kind, keys in (("self", tokens), ("cross", TEXT)):
                shapes = [(batch, count, *HEADS[model]) for count in (tokens, keys, keys)]
                q, k, v = (jax.random.normal(jax.random.key(place), shape, dtype) for place, shape in enumerate(shapes))
                lengths = (7 + jnp.arange(batch, dtype=jnp.int32)) % keys + 1 if kind == "cross" else None
                row = {"model": model, "attention": kind, "batch": batch, "tokens": tokens, "keys": keys}
                for implementation in KINDS if on_gpu else KINDS[1:]:
                    try:
                        row[implementation] = measure(implementation, q, k, v, lengths)
                    except Exception as error:  # each cuDNN build refuses in its own way
                        row[implementation] = str(error).splitlines()[0][:200]
                rows.append(row)
                print(row, flush=True)
    device.write("attention", name, {"device": name, "dtype": dtype, "jax": jax.__version__,
                                     "command": " ".join(sys.argv), "rows": rows})  # fmt: skip
    errors = [
        side[name]
        for row in rows
        for side in row.values()
        if isinstance(side, dict)
        for name in side
        if "error" in name
    ]
    if not max(errors) < LARGEST_ERROR:
        print(f"An error of {max(errors):.1%} is above the {LARGEST_ERROR:.0%} that rounding explains.")
        return 1
    return 0


if __name__ == "__main__":
    commandline.run(main)
