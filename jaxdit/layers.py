"""The parts of a layer: dense products, norms, modulation, GELU, with gradients written out where XLA's own are slow.

Parameters are float32; products run in `dtype`, norms in float32. By ours and XLA's own the gradients are the same
(tests/jaxdit/test_model.py compares them in float64).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

EPSILON = 1e-6  # of the norms
ROW = "one number a row"  # what the backward pass is given of a norm: little to keep, a whole array to read for it


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., d] times kernel [d, e] plus bias [e] -> [..., e], for the CPU: the gradients to both as plain 2-D products.

    XLA's own contracts [b, n, d] with [b, n, e] over both leading axes, which its fast matrix product does not take: 110
    against 195 GFLOP/s on two cores; and sums for the bias on one of them. Barriers keep transposes, those of the narrower
    side, from being folded in again.
    """
    return x @ kernel + bias


def _product_forward(x, kernel, bias):
    return x @ kernel + bias, (x, kernel)


def _product_backward(kept, gradient):
    x, kernel = kept
    apart = jax.lax.optimization_barrier
    rows, flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    narrow = rows.shape[1] <= flat.shape[1]
    to_kernel = apart(rows.T) @ flat if narrow else apart(apart(flat.T) @ rows).T
    return gradient @ kernel.T, to_kernel, (jnp.ones((1, len(flat)), flat.dtype) @ flat)[0]


product.defvjp(_product_forward, _product_backward)


class Dense(nnx.Linear):
    """x [..., d] -> x kernel + bias [..., e] in `dtype`; Xavier-uniform or zero kernel, zero bias."""

    def __init__(self, inputs: int, outputs: int, dtype, rngs: nnx.Rngs, *, zero: bool = False):
        kernel = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
        super().__init__(inputs, outputs, dtype=dtype, kernel_init=kernel, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel, bias = (part.astype(self.dtype) for part in (x, self.kernel[...], self.bias[...]))
        return product(x, kernel, bias) if jax.default_backend() == "cpu" else x @ kernel + bias


def widen(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 where it is that: the tests compare in float64, where rounding hides no mistake."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer norm over the last axis without parameters, in float32: bfloat16 variances lose the small channels."""
    x = widen(x)
    mean, factor = _row_statistics(x)
    return (x - mean) * factor


def _row_statistics(x):
    """Mean and one over the standard deviation along the last axis, which stays with size 1."""
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + EPSILON)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """layer_norm(x) (1 + scale) + shift; x is [b, n, d], shift and scale [b, d].

    Its gradients, and those of `gelu` and `rms_norm`, are written out for a GPU, which waits for memory there: barriers behind
    what is one number a row, and what is one number a channel in sums that XLA does not take apart, keep it from writing whole
    arrays in between. With one product for q, k and v they take 8% off the full model's step at 512 on an H100
    (bench/results/profile-full-512-nvidia-h100-80gb-hbm3.json).
    """
    return (layer_norm(x) * (1 + widen(scale[:, None])) + widen(shift[:, None])).astype(dtype)


def _modulate_forward(x, shift, scale, dtype):
    wide = widen(x)
    mean, factor = (checkpoint_name(part, ROW) for part in jax.lax.optimization_barrier(_row_statistics(wide)))
    normed = (wide - mean) * factor
    return (normed * (1 + widen(scale[:, None])) + widen(shift[:, None])).astype(dtype), (x, scale, mean, factor)


def _modulate_backward(_, kept, gradient):
    x, scale, mean, factor = kept
    wide, gradient = widen(x), widen(gradient)
    normed, scaled = (wide - mean) * factor, gradient * (1 + widen(scale[:, None]))
    along = scaled.mean(-1, keepdims=True), (scaled * normed).mean(-1, keepdims=True)
    level, slope = jax.lax.optimization_barrier(along)
    to_x = factor * (scaled - level - normed * slope)
    return to_x.astype(x.dtype), gradient.sum(1).astype(scale.dtype), (gradient * normed).sum(1).astype(scale.dtype)


modulate.defvjp(_modulate_forward, _modulate_backward)


@jax.custom_vjp
def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x [b, n, heads, head_size] over its root mean square along the last axis, times scale [head_size]; float32 (`widen`)."""
    x = widen(x)
    return x * _root_mean_square(x) * scale


def _root_mean_square(x):
    """One over it, along the last axis, which stays with size 1."""
    return jax.lax.optimization_barrier(jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON))


def _rms_norm_forward(x, scale):
    wide = widen(x)
    factor = checkpoint_name(_root_mean_square(wide), ROW)
    return wide * factor * scale, (x, scale, factor)


def _rms_norm_backward(kept, gradient):
    x, scale, factor = kept
    wide = widen(x)
    normed, scaled = wide * factor, gradient * scale
    slope = jax.lax.optimization_barrier((scaled * normed).mean(-1, keepdims=True))
    # Over the tokens first: rows of heads * head_size are summed at the memory's speed, rows of head_size are not.
    to_scale = jax.lax.optimization_barrier((gradient * normed).sum((0, 1)))
    return (factor * (scaled - normed * slope)).astype(x.dtype), to_scale.sum(0)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016), of any shape; keeps x's dtype.

    By sigmoid here and by tanh in the gradient, which are the same: XLA would write one that both share, and read it twice.
    """
    wide = widen(x)
    return (wide * jax.nn.sigmoid(2 * _gelu_inner(wide))).astype(x.dtype)


def _gelu_inner(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _gelu_backward(x, gradient):
    wide = widen(x)
    tanh = jnp.tanh(_gelu_inner(wide))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * wide**2)
    return ((widen(gradient) * (0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh**2) * slope)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
