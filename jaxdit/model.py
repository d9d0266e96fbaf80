"""The Diffusion Transformer: adaLN-Zero from time and vision, cross-attention to text, 2-D positions.

Peebles and Xie 2023 ("DiT": adaLN-Zero, patches), Chen et al. 2023 ("PixArt-alpha": cross-attention to T5), Esser et al.
2024 (q/k RMSNorm), Su et al. 2021 and Heo et al. 2024 (axial rotary positions). Blocks are stacked and scanned, so that
24 layers compile as fast as one; training on a GPU takes them apart, which is faster there (`separated`). Rotary positions
alone tell a token where the others stand but not where itself stands, and a query to the text not at all; fixed absolute
ones at the input bring the demo data from 16.7 to 26.7 dB after 900 steps (bench/positions.py).
Parameters are float32; products run in `dtype`, norms and softmax in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdit import attention
from jaxdit.fused import RESIDUAL, norm_product, split_heads
from jaxdit.layers import ROW, Dense, gelu, modulate, rms_norm, widen

TIME_FREQUENCIES = 256
POSITION_RANGE = 64.0  # a square picture spans this many units of position at every resolution
POSITION_THETA = 100.0  # the slowest frequency is 1 / 100


def time_embedding(t: jax.Array) -> jax.Array:
    """[b, 256] cosines and sines of 1000 t (Vaswani et al. 2017; frequencies from 1 to 1/10,000)."""
    half = TIME_FREQUENCIES // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    angles = 1000 * widen(t)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def positions(height: int, width: int) -> jax.Array:
    """[height * width, 2] (row, column) of each token, centred, scaled so that sqrt(height * width) spans 64 units."""
    scale = POSITION_RANGE / math.sqrt(height * width)
    rows = (jnp.arange(height) - (height - 1) / 2) * scale
    columns = (jnp.arange(width) - (width - 1) / 2) * scale
    return jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def rotary_angles(height: int, width: int, head_size: int) -> jax.Array:
    """[height * width, head_size / 2] float32: the first half of the pairs turns with the row, the second with the column."""
    pairs = head_size // 4
    frequencies = POSITION_THETA ** (-jnp.arange(pairs) / pairs)
    return (positions(height, width)[:, :, None] * frequencies).reshape(height * width, 2 * pairs)


def position_embedding(height: int, width: int, size: int) -> jax.Array:
    """[height * width, size] float32 sines and cosines of row and column, of the same positions as `rotary_angles`."""
    frequencies = POSITION_THETA ** (-jnp.arange(size // 4) / (size // 4))
    angles = (positions(height, width)[:, :, None] * frequencies).reshape(height * width, -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn each pair (x[i], x[i + half]) of x [b, n, heads, head_size] by its angle; keeps x's dtype."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    return (widen(x) * cos + jnp.roll(widen(x), x.shape[-1] // 2, -1) * sin).astype(x.dtype)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[b, h, w, c] -> [b, h/p * w/p, p * p * c]: patches in row-major order, (row, column, channel) within a patch."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """The inverse of `patchify` for a latent of [height, width]."""
    b = x.shape[0]
    x = x.reshape(b, height // patch, width // patch, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, -1)


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys; keys and values from `context` (x itself, or text)."""

    def __init__(self, width: int, heads: int, *, zero: bool, dtype, implementation: str, rngs: nnx.Rngs):
        self.heads = heads
        self.implementation = implementation
        self.dtype = dtype
        self.query = Dense(width, width, dtype, rngs)
        self.key_value = Dense(width, 2 * width, dtype, rngs)
        self.query_norm = nnx.RMSNorm(width // heads, rngs=rngs)
        self.key_norm = nnx.RMSNorm(width // heads, rngs=rngs)
        self.out = Dense(width, width, dtype, rngs, zero=zero)

    def __call__(self, x, context, *, angles=None, lengths=None):
        """x [b, n, d], context [b, m, d], angles for rotary positions, lengths [b] of the valid context -> [b, n, d]."""
        q, k, v = self._projected(x, context)
        q, k = rms_norm(q, self.query_norm.scale[...]), rms_norm(k, self.key_norm.scale[...])
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (part.astype(self.dtype) for part in (q, k, v))  # cuDNN wants one dtype; softmax is float32 within
        return self.out(attention.attend(q, k, v, lengths, self.implementation).reshape(x.shape))

    def _projected(self, x, context):
        """Queries [b, n, heads, head_size], keys and values [b, m, heads, head_size]."""
        size = x.shape[-1] // self.heads
        if context is x and jax.default_backend() != "cpu":
            # XLA makes this one product on a GPU anyway, but then copies the three gradients together; on the CPU two are faster.
            kernel, bias = self.as_one(self.query, self.key_value)
            return jnp.split((x @ kernel + bias.astype(self.dtype)).reshape(*x.shape[:2], 3 * self.heads, size), 3, 2)
        k, v = jnp.split(self.key_value(context).reshape(*context.shape[:2], 2 * self.heads, size), 2, 2)
        return self.query(x).reshape(*x.shape[:2], self.heads, size), k, v

    def as_one(self, *parts):
        """Kernel, in the dtype of the products, and bias of dense layers side by side."""
        kernels = [part.kernel[...].astype(self.dtype) for part in parts]
        return jnp.concatenate(kernels, -1), jnp.concatenate([part.bias[...] for part in parts], -1)


class Block(nnx.Module):
    """x += gate self_attention(adaLN x); x += cross_attention(norm x, text); x += gate mlp(adaLN x)."""

    def __init__(self, width: int, heads: int, *, dtype, implementation: str, rngs: nnx.Rngs):
        self.dtype = dtype
        self.modulation = Dense(width, 6 * width, dtype, rngs, zero=True)
        self.self_attention = Attention(width, heads, zero=False, dtype=dtype, implementation=implementation, rngs=rngs)
        self.cross_norm = nnx.RMSNorm(width, rngs=rngs)
        self.cross_attention = Attention(width, heads, zero=True, dtype=dtype, implementation=implementation, rngs=rngs)
        self.mlp_in = Dense(width, 4 * width, dtype, rngs)
        self.mlp_out = Dense(4 * width, width, dtype, rngs)

    def __call__(self, x, condition, text, lengths, angles, fused: bool):
        if fused:
            return self._in_few_passes(x, condition, text, lengths, angles)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(condition), 6, -1)
        h = modulate(x, shift1, scale1, self.dtype)
        x = x + gate1[:, None] * self.self_attention(h, h, angles=angles)
        x = x + self.cross_attention(self.cross_norm(x).astype(self.dtype), text, lengths=lengths)
        h = gelu(self.mlp_in(modulate(x, shift2, scale2, self.dtype)))
        return x + gate2[:, None] * self.mlp_out(h)

    def _in_few_passes(self, x, condition, text, lengths, angles):
        """The same by the kernels of fused.py."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(condition), 6, -1)
        own, cross = self.self_attention, self.cross_attention
        kernel, bias = own.as_one(own.query, own.key_value)
        x, h = norm_product(x, None, None, None, 1 + widen(scale1), widen(shift1), kernel, True)
        norms = jnp.stack([own.query_norm.scale[...], own.key_norm.scale[...]])
        q, k, v = split_heads(h, bias, norms, angles, own.heads)
        h = attention.attend(q, k, v, None, own.implementation).reshape(x.shape)

        kernel, bias = own.as_one(own.out)
        scale = jnp.broadcast_to(self.cross_norm.scale[...], shift1.shape)
        into, query_bias = cross.as_one(cross.query)
        x, h = norm_product(x, h @ kernel, bias, gate1, scale, jnp.zeros_like(scale), into, False)
        (q,) = split_heads(h, query_bias, cross.query_norm.scale[...][None], None, cross.heads)
        kernel, bias = cross.as_one(cross.key_value)
        k, v = split_heads(text @ kernel, bias, cross.key_norm.scale[...][None], None, cross.heads)
        h = attention.attend(q, k, v, lengths, cross.implementation).reshape(x.shape)

        kernel, bias = cross.as_one(cross.out)
        into, bias_in = cross.as_one(self.mlp_in)
        x, h = norm_product(x, h @ kernel, bias, None, 1 + widen(scale2), widen(shift2), into, True)
        return x + gate2[:, None] * self.mlp_out(gelu(h + bias_in.astype(self.dtype)))


class DiT(nnx.Module):
    """Velocity of a latent, given time, text tokens and a vision vector.

    Args:
      layers, width, heads: of the transformer; width / heads is a multiple of 8 (of 4 without cuDNN), at most 128.
      patch: side of a patch in latent pixels.
      channels: of the latent.
      text_width, vision_width: of the conditions, from dataset.json.
      dtype: of the products, "bfloat16" or "float32".
      remat: "none" keeps the results of dense layers and of attention for the backward pass and computes norms, rotations
        and activations again; "block" keeps the block's input and attention's results; "off" keeps everything
        (`trained.unrolled` says where).
      scan_unroll: layers a turn of the scan. All of them is for training, which takes them apart (`separated`); whoever does
        not has one a turn then.
      attention: "cudnn" or "xla", see `mesh.attention_implementation`.
      rngs: for the initial parameters; none is kept.
      fused: whether `separated` layers run by the kernels of fused.py.
    """

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        patch: int,
        channels: int,
        text_width: int,
        vision_width: int,
        dtype: str,
        remat: str,
        scan_unroll: int,
        attention: str,
        rngs: nnx.Rngs,
        fused: bool = False,
    ):
        dtype = jnp.dtype(dtype)
        self.dtype, self.patch, self.remat, self.scan_unroll, self.fused = dtype, patch, remat, scan_unroll, fused
        self.head_size = width // heads
        self.patch_in = Dense(patch * patch * channels, width, dtype, rngs)
        self.time_in = Dense(TIME_FREQUENCIES, width, dtype, rngs)
        self.time_out = Dense(width, width, dtype, rngs)
        self.null_vision = nnx.Param(jax.random.normal(rngs.params(), (vision_width,)))
        self.vision_in = Dense(vision_width, width, dtype, rngs)
        self.vision_out = Dense(width, width, dtype, rngs)
        self.null_text = nnx.Param(jax.random.normal(rngs.params(), (text_width,)))
        self.text_in = Dense(text_width, width, dtype, rngs)
        self.text_norm = nnx.RMSNorm(width, rngs=rngs)

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(key):
            return Block(width, heads, dtype=dtype, implementation=attention, rngs=nnx.Rngs(key))

        self.blocks = stack(jax.random.split(rngs.params(), layers))
        self.final_modulation = Dense(width, 2 * width, dtype, rngs, zero=True)
        self.patch_out = Dense(width, patch * patch * channels, dtype, rngs, zero=True)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        conditions: Mapping[str, jax.Array],
        drop_text: jax.Array,
        drop_vision: jax.Array,
    ) -> jax.Array:
        """Predict the velocity.

        Args:
          x: [batch, height, width, channels] x_t, sides divisible by the patch.
          t: [batch] in [0, 1].
          conditions: text [batch, tokens, text_width], text_length [batch] int32 (1 <= length <= tokens), vision [batch,
            vision_width].
          drop_text, drop_vision: [batch] bool, where the learned null condition is used instead.

        Returns:
          [batch, height, width, channels] float32.
        """
        height, width = x.shape[1:3]
        condition = jax.nn.silu(self._condition(t, conditions["vision"], drop_vision))
        text, lengths = self._text(conditions["text"], conditions["text_length"], drop_text)
        grid = height // self.patch, width // self.patch
        angles = rotary_angles(*grid, self.head_size)
        graph, params = nnx.split(self.blocks)
        first = jax.tree.leaves(params, is_leaf=_is_tuple)[0]
        fused = self.fused and _is_tuple(first)

        def layer(h, params):
            return nnx.merge(graph, params)(h, condition, text, lengths, angles, fused)

        h = self.patch_in(patchify(x, self.patch).astype(self.dtype))
        h = h + position_embedding(*grid, h.shape[-1]).astype(self.dtype)
        if self.remat != "off":
            # Where no loop parts the passes, XLA would find what is computed again and keep it instead.
            layer = jax.checkpoint(layer, prevent_cse=_is_tuple(first), policy=partial(_kept, self.remat))
        if _is_tuple(first):
            for number in range(len(first)):
                h = layer(h, _of_layer(params, number, self.dtype))
        else:
            unroll = self.scan_unroll if self.scan_unroll < len(first) else 1
            h, _ = jax.lax.scan(lambda h, params: (layer(h, params), None), h, params, unroll=unroll)
        shift, scale = jnp.split(self.final_modulation(condition), 2, -1)
        h = self.patch_out(modulate(h, shift, scale, self.dtype))
        return widen(unpatchify(h, height, width, self.patch))

    def _condition(self, t, vision, drop_vision):
        """MLP(t) + MLP(vision), [b, d]."""
        time = self.time_out(jax.nn.silu(self.time_in(time_embedding(t).astype(self.dtype))))
        vision = jnp.where(drop_vision[:, None], self.null_vision[...], vision).astype(self.dtype)
        return time + self.vision_out(jax.nn.silu(self.vision_in(vision)))

    def _text(self, text, lengths, drop_text):
        """Text projected to [b, l, d] and its lengths; a dropped sample has one token, the learned null text."""
        text = jnp.where(drop_text[:, None, None], self.null_text[...], widen(text)).astype(self.dtype)
        text = self.text_norm(self.text_in(text)).astype(self.dtype)
        return text, jnp.where(drop_text, 1, lengths)


def separated(params: Any) -> Any:
    """Parameters whose blocks' arrays are tuples, a layer's own in each place: the model runs them one by one, without a scan.

    A scan copies what a turn keeps for the backward pass into arrays of all layers, which are zeroed before, and reads and
    writes each layer's part of the sums of gradients once more than needed.
    """
    return params | {"blocks": jax.tree.map(tuple, params["blocks"])}


def stacked(params: Any) -> Any:
    """The inverse of `separated`; what is stacked stays as it is."""
    blocks = jax.tree.map(
        lambda leaf: jnp.stack(leaf) if _is_tuple(leaf) else leaf, params["blocks"], is_leaf=_is_tuple
    )
    return params | {"blocks": blocks}


def is_separated(params: Any) -> bool:
    """Whether `separated` gave these."""
    return _is_tuple(jax.tree.leaves(params["blocks"], is_leaf=_is_tuple)[0])


def kernels(params: Any, dtype) -> list[jax.Array]:
    """The kernels of `separated` blocks in dtype, one after the other: for `with_kernels`."""
    return [leaf.astype(dtype) for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 2]


def with_kernels(params: Any, kernels: Sequence[jax.Array]) -> Any:
    """`separated` parameters whose blocks' kernels have those of `kernels` in their place; gradients go to the parameters."""
    given = iter(kernels)
    place = lambda leaf: _in_place_of(leaf, next(given)) if leaf.ndim == 2 else leaf  # noqa: E731
    return params | {"blocks": jax.tree.map(place, params["blocks"])}


@jax.custom_vjp
def _in_place_of(param, kernel):
    return kernel


_in_place_of.defvjp(lambda param, kernel: (kernel, None), lambda _, gradient: (widen(gradient), None))


def _is_tuple(leaf) -> bool:
    return isinstance(leaf, tuple)


def _of_layer(params, number, dtype):
    """One layer's parameters of `separated` ones; kernels in dtype: each pass would cast its own behind prevent_cse."""
    own = jax.tree.map(lambda leaf: leaf[number], params, is_leaf=_is_tuple)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim == 2 else leaf, own)


def _kept(remat: str, primitive, *inputs, **parameters) -> bool:
    """Whether the backward pass is given what this operation computes in the forward pass (else it computes it again).

    Results of attention, what norms know of each row and, without remat, results of the dense layers, sums that fused norms are
    given and inputs of attention.
    """
    named = parameters["name"] if primitive.name == "name" else ""
    if attention.is_result(primitive, parameters) or named == ROW:
        return True
    dense = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return remat == "none" and (
        named == RESIDUAL or attention.is_input(primitive, parameters) or dense(primitive, *inputs, **parameters)
    )


def abstract(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """(graph definition, tree of parameter shapes) of DiT(**settings), allocating nothing."""
    graph, params = nnx.split(nnx.eval_shape(lambda: DiT(**settings, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(params)


def initial_parameters(settings: Mapping[str, Any], seed: int) -> Any:
    """Fresh parameters of DiT(**settings), a nested dict of float32 arrays; blocks have a leading axis of layers."""
    return nnx.to_pure_dict(nnx.split(DiT(**settings, rngs=nnx.Rngs(seed)))[1])


def count_parameters(params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
