"""Devices: how batches and parameters lie on them, and which attention kernel they run.

One mesh with the axes data and fsdp. Batches are divided over both; parameters, moments, averages and accumulators are cut
over fsdp by RULES and repeated over data (Rajbhandari et al. 2020, "ZeRO", stage 3). Each device runs the program of one
device on its rows (jax.shard_map): a cut parameter is gathered where the model reads it, so within the scan a layer at a time,
and its gradient is scattered back. Sums over data wait for the end of an update, however many micro-batches it has.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from encode.records import InputError

AXES = ("data", "fsdp")
# How an array is cut, by the first pattern that fits its path; the same for a parameter and all that is kept of it. Never over
# the layers, so that one layer can be gathered alone; over rows, which lie one after the other. What the last rule leaves
# whole is a thousandth of the model.
RULES = (
    ("*blocks/*/kernel", PartitionSpec(None, "fsdp")),  # [layers, in, out]
    ("*/kernel", PartitionSpec("fsdp")),  # [in, out]
    ("*", PartitionSpec()),
)


def keep_programs() -> None:
    """Keep compiled programs in ~/.cache/jaxdit/compiled, unless JAX was told where: the next call does not compile again."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/jaxdit/compiled").expanduser()))


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices on the axes data and fsdp.

    Args:
      data: groups of devices that hold a whole model each; -1: as many as fsdp leaves.
      fsdp: devices that one model is cut over; -1: as many as data leaves.
      devices: which; None: all of all processes.

    Raises:
      InputError: the two do not make up the devices.
    """
    devices = jax.devices() if devices is None else devices
    # Auto, because jax.make_mesh makes Explicit axes unless told otherwise.
    return jax.make_mesh(sizes(data, fsdp, len(devices)), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
    """Of the axes of `make_mesh` for `count` devices, with the same arguments and errors."""
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        known = max(sizes)
        sizes = [count // known if size == -1 and known > 0 else size for size in sizes]
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        raise InputError(
            f"mesh.data={data} and mesh.fsdp={fsdp} do not make up {count} devices: their product must be {count}, and one of "
            "them may be -1 for the rest."
        )
    return sizes[0], sizes[1]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shardings(mesh: Mesh, tree: Any) -> Any:
    """How each array of a tree lies on the devices by RULES: parameters, or a whole training state."""
    return jax.tree.map(partial(NamedSharding, mesh), _specs(mesh, tree), is_leaf=_is_spec)


def placed(mesh: Mesh, tree: Any) -> Any:
    """A tree's shapes, each with its sharding: what `checkpoint` restores into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(mesh, tree),
    )


def on_one(mesh: Mesh, params: Any) -> Any:
    """Parameters whole on this process's first device, to sample from; all processes call it. On one device they are there."""
    if mesh.size == 1:
        return params
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(params)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def describe(mesh: Mesh, like: str = "16 x cpu") -> str:
    """Such as "16 x NVIDIA H100 (data 2 x fsdp 8) in 2 processes": what the rounding of sums depends on.

    Where `like` was written before November 2026 the kind is not told: "1 device", "16 devices (data ...".
    """
    words = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    if not re.match(r"\d+ x ", like):
        words = f"{mesh.size} device{'s' * (mesh.size > 1)}"
    if mesh.size > 1:
        words += f" ({' x '.join(f'{name} {size}' for name, size in mesh.shape.items())})"
    return words + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")


def refuse_lost_card(before: str) -> None:
    """Where a checkpoint was saved on cards and JAX now finds only the CPU: a month would become years.

    Args:
      before: of `describe`, when it was saved.

    Raises:
      InputError: unless JAX_PLATFORMS asks for the CPU.
    """
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"
    if jax.default_backend() == "cpu" and not asked and re.match(r"\d+ x (?!cpu)", before):
        raise InputError(
            f"the run was saved on {before}, and JAX finds only this machine's CPU: is the driver loaded (nvidia-smi), and JAX "
            "for CUDA installed? JAX_PLATFORMS=cpu before the command goes on here all the same."
        )


def undivided(mesh: Mesh, shapes: Any) -> list[str]:
    """The paths of the parameters that a rule would cut, and whose rows are not a multiple of fsdp: each device holds them."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return [
        _name(path) for path, leaf in leaves if mesh.shape["fsdp"] > 1 and _rule(_name(path)) != _spec(mesh, path, leaf)
    ]


def gathering(mesh: Mesh, graph: Any, shapes: Any) -> Any:
    """The model's definition, in which a parameter that is cut gives itself whole to whoever reads it.

    Args:
      mesh: of `make_mesh`; on one without fsdp the definition is returned as it is.
      graph, shapes: of `model.abstract`.
    """
    if mesh.shape["fsdp"] == 1:
        return graph
    module = nnx.merge(graph, shapes)
    specs = {_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(_specs(mesh, shapes), _is_spec)}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param) and "fsdp" in (spec := specs["/".join(map(str, path))]):
            node.set_metadata(on_get_value=_gather(spec.index("fsdp") - node.get_value().ndim, module.dtype))
    return nnx.split(module)[0]


@functools.cache
def _gather(axis: int, dtype: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """axis from the end, as the scan takes the first one away.

    A kernel is sent in the dtype in which it is multiplied, which halves the bytes and changes no bit; its gradient is summed
    and scattered in float32.
    """

    @jax.custom_vjp
    def whole(value):
        return jax.lax.all_gather(value.astype(dtype), "fsdp", axis=axis % value.ndim, tiled=True)

    def scatter(_, gradient):
        gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
        return (jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis % gradient.ndim, tiled=True),)

    whole.defvjp(lambda value: (whole(value), None), scatter)
    return lambda _, value: whole(value)


def compiled(
    mesh: Mesh, state: Any, *, new_total: Callable, accumulate: Callable, change: Callable, judge: Callable
) -> tuple[Callable, Callable, Callable, Callable]:
    """The functions of the training loop, compiled: one program a shape of their arguments.

    On many devices each makes the sums of an update out of its own rows; they lie behind a leading axis, and nothing is sent
    for them before `change` adds them up.

    Args:
      mesh: of `make_mesh`.
      state: shapes of the training state, `update.new_state`.
      new_total: (params) -> sums, all zero, as `update.new_total`.
      accumulate: (params, total, batch, where) -> total, as `update.accumulate_gradients`, with a graph of `gathering`.
      change: (state, total) -> (state, row), as `update.apply_update`.
      judge: (params, batch, numbers, drops) -> arrays [batch], as `heldout.losses`, with a graph of `gathering`.
    """
    whole = replicated(mesh)
    if mesh.size == 1:
        return (
            jax.jit(new_total, out_shardings=whole),
            jax.jit(accumulate, donate_argnums=1),
            jax.jit(change, donate_argnums=0),
            jax.jit(judge),
        )
    params, total = _specs(mesh, state["params"]), jax.eval_shape(new_total, state["params"])
    total.pop("kernels", None)  # no sums; each micro-batch casts its own here
    rows, everywhere = PartitionSpec(AXES), PartitionSpec()
    # Sums for an array that is cut are complete over fsdp and partial over data; for a whole one they are partial over both.
    parts = jax.tree.map(
        lambda spec: PartitionSpec("data" if "fsdp" in spec else AXES, *spec), _specs(mesh, total), is_leaf=_is_spec
    )
    leading = jax.tree.map(lambda spec: mesh.shape["data"] if spec[0] == "data" else mesh.size, parts, is_leaf=_is_spec)

    def zeros(_):
        return jax.tree.map(lambda leaf, count: jnp.zeros((count, *leaf.shape), leaf.dtype), total, leading)

    def own_sums(params, total, batch, where):
        # Samples of the micro-batch on the devices before this one.
        before = jax.lax.axis_index(AXES) * len(batch["latent"])
        total = accumulate(params, jax.tree.map(lambda leaf: leaf[0], total), batch, where.at[1].add(before))
        return jax.tree.map(lambda leaf: leaf[None], total)

    def add_up(state, total):
        return change(state, jax.tree.map(lambda leaf: leaf.sum(0), total))

    def over(function, inputs, outputs):
        return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    return (
        jax.jit(zeros, out_shardings=jax.tree.map(partial(NamedSharding, mesh), parts, is_leaf=_is_spec)),
        jax.jit(over(own_sums, (params, parts, rows, everywhere), parts), donate_argnums=1),
        jax.jit(add_up, donate_argnums=0, out_shardings=(shardings(mesh, state), whole)),
        jax.jit(over(judge, (params, rows, rows, everywhere), rows), out_shardings=whole),
    )


def _specs(mesh: Mesh, tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(partial(_spec, mesh), tree)


def held(shapes: Any, fsdp: int) -> int:
    """How many scalars of a tree each device holds where one model is cut over fsdp of them."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return sum(leaf.size // (fsdp if _is_cut(fsdp, _rule(_name(path)), leaf) else 1) for path, leaf in leaves)


def _spec(mesh: Mesh, path: Any, leaf: Any) -> PartitionSpec:
    spec = _rule(_name(path))
    return spec if _is_cut(mesh.shape["fsdp"], spec, leaf) else PartitionSpec()


def _is_cut(fsdp: int, spec: PartitionSpec, leaf: Any) -> bool:
    return fsdp > 1 and "fsdp" in spec and leaf.shape[spec.index("fsdp")] % fsdp == 0


def _rule(name: str) -> PartitionSpec:
    return next(spec for pattern, spec in RULES if fnmatch.fnmatchcase(name, pattern))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


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
