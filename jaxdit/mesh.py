"""Devices: how batches and parameters lie on them, and which attention kernel they run."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def keep_programs() -> None:
    """Keep compiled programs in ~/.cache/jaxdit/compiled, unless JAX was told where: the next call does not compile again."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/jaxdit/compiled").expanduser()))


def make_mesh() -> jax.sharding.Mesh:
    """All devices on one axis "data": every device holds the parameters and takes its share of a micro-batch."""
    # Auto, because jax.make_mesh makes Explicit axes unless told otherwise.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def compute_dtype(wanted: str) -> str:
    """The dtype of products: "auto" means bfloat16 on a GPU and float32 on the CPU, where bfloat16 gains nothing.

    Raises:
      ValueError: float16, whose range a diffusion transformer's activations leave, or an unknown name.
    """
    if wanted == "float16":
        raise ValueError(
            "model.dtype=float16 is refused: its largest number is 65,504, attention logits and T5 tokens exceed it, and "
            "the run ends in NaN; use bfloat16 (GPU) or float32."
        )
    if wanted not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"model.dtype={wanted}: choose auto, bfloat16 or float32.")
    if wanted == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return wanted


def attention_implementation(head_size: int, dtype: str) -> str:
    """ "cudnn" where a tiny forward and backward pass proves that it works, else "xla"; says which and why, once."""
    if jax.default_backend() != "gpu":
        return "xla"
    try:
        q = jnp.ones((1, 64, 2, head_size), dtype)
        lengths = jnp.array([3], jnp.int32)

        def probe(q):
            out = jax.nn.dot_product_attention(q, q, q, key_value_seq_lengths=lengths, implementation="cudnn")
            return out.astype(jnp.float32).sum()

        jax.block_until_ready(jax.jit(jax.grad(probe))(q))
    except Exception as error:  # each cuDNN build refuses in its own way
        logging.info("Attention runs on XLA, because cuDNN refuses here: %s", str(error).splitlines()[0])
        return "xla"
    logging.info("Attention runs on cuDNN.")
    return "cudnn"
