"""Norms, residual sums and heads of a layer in one pass over memory each: kernels for a GPU (Pallas, by Triton).

What lies between a layer's matrix products waits for memory, and of each such piece XLA makes several kernels: what is known of a
row, what follows from it, sums over all rows for the parameters. Here an array is read once and written once, which spares the
full model a sixth of all that a step moves on an H100, and a quarter on a 4090 (bench/traffic.py). The formulas are those of
layers.py and `model.rotate`, which run everywhere else; tests compare both. As in Hsu et al. 2024 ("Liger Kernel"), where norm
and residual sum are one as well.

A program works on one row (a token), or on ROWS of them where sums over rows are wanted: those of its own, which XLA adds up.
Sums are float32. Triton's arrays have sides that are powers of two, so what lies beyond a side is masked. JAX 0.11 announces
that Pallas will lose Triton one day; until then this compiles, and works as before, with 0.10.2 and 0.11.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxdit.layers import EPSILON, ROW

RESIDUAL = "residual"  # the sum that a norm is given, which its backward pass wants again
ROWS = 16
WARPS = 4
SHIFT, SCALE, SUM, GATE = range(4)  # of a norm's sums over rows
HALVES = (0, 1)  # of a head, which are turned against each other


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def norm_product(x, added, bias, gate, scale, shift, kernel, centred: bool):
    """A residual sum, and its norm times a kernel.

    Args:
      x: [b, n, d].
      added, bias: [b, n, d] and [d] that are added to it; None: nothing is.
      gate: [b, d] that they are multiplied with before; None: they are not.
      scale, shift: [b, d] float32; the norm is multiplied with the one, and the other added.
      kernel: [d, e] of x's dtype.
      centred: layer norm; False: by the root mean square.

    Returns:
      ([b, n, d] the sum, [b, n, e] the product), of x's dtype.
    """
    total, normed, _, _ = _norm(x, added, bias, gate, scale, shift, centred)
    return total, normed @ kernel


def _norm_product_forward(x, added, bias, gate, scale, shift, kernel, centred):
    total, normed, mean, factor = _norm(x, added, bias, gate, scale, shift, centred)
    if added is not None:
        total = checkpoint_name(total, RESIDUAL)
    mean, factor = checkpoint_name(mean, ROW), checkpoint_name(factor, ROW)
    kept = total, mean, factor, scale, shift, None if gate is None else added, bias, gate
    return (total, normed @ kernel), (kept, kernel)


def _norm_product_backward(centred, kept, gradients):
    norm, kernel = kept
    *_, bias, gate = norm
    to_total, to_product = gradients
    to_x, to_added, normed, sums = _norm_backward(*norm, to_total, to_product @ kernel.T, centred)
    to_kernel = normed.reshape(-1, normed.shape[-1]).T @ to_product.reshape(-1, to_product.shape[-1])
    to_bias = to_gate = None
    if bias is not None:
        to_bias = (sums[:, SUM] if gate is None else sums[:, SUM] * gate).sum(0).astype(bias.dtype)
    if gate is not None:
        to_gate = sums[:, GATE].astype(gate.dtype)
    return to_x, to_added, to_bias, to_gate, sums[:, SCALE], sums[:, SHIFT], to_kernel


norm_product.defvjp(_norm_product_forward, _norm_product_backward)


def _norm(x, added, bias, gate, scale, shift, centred):
    """(the sum, or x where nothing is added; its norm, scaled and shifted; mean and factor of each row [b, n] float32)."""
    b, n, width = x.shape
    whole, row = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((b, n), jnp.float32)
    found = _run(
        partial(_norm_kernel, width=width, centred=centred),
        (b, n),
        (x, added, bias, gate, scale, shift),
        (None if added is None else whole, whole, row, row),
    )
    return (x, *found[1:]) if added is None else found


def _norm_kernel(x, added, bias, gate, scale, shift, total, normed, mean_of, factor_of, *, width, centred):
    sample, row = pl.program_id(0), pl.program_id(1)
    channels, inside = _along(width)
    wide = _read(x, (sample, row, channels), inside)
    if added is not None:
        more = _read(added, (sample, row, channels), inside) + _read(bias, (channels,), inside)
        wide += more if gate is None else more * _read(gate, (sample, channels), inside)
        wide = wide.astype(total.dtype).astype(jnp.float32)  # as the backward pass will see it
        _write(total, (sample, row, channels), wide, inside)
    mean = wide.sum() / width if centred else 0.0
    centre = jnp.where(inside, wide - mean, 0.0)
    factor = jax.lax.rsqrt((centre * centre).sum() / width + EPSILON)
    scaled = centre * factor * _read(scale, (sample, channels), inside) + _read(shift, (sample, channels), inside)
    _write(normed, (sample, row, channels), scaled, inside)
    mean_of[sample, row] = mean
    factor_of[sample, row] = factor


def _norm_backward(total, mean, factor, scale, shift, added, bias, gate, to_total, to_normed, centred):
    """(gradients of x and of what was added, the norm again, sums over rows [b, 2 to 4, d] float32)."""
    b, n, width = total.shape
    whole, chunks = jax.ShapeDtypeStruct(total.shape, total.dtype), pl.cdiv(n, ROWS)
    count = 2 + (bias is not None) + (gate is not None)
    to_x, to_added, normed, sums = _run(
        partial(_norm_backward_kernel, rows=n, width=width, centred=centred),
        (b, chunks),
        (total, mean, factor, scale, shift, added, bias, gate, to_total, to_normed),
        (whole, None if gate is None else whole, whole, jax.ShapeDtypeStruct((b, chunks, count, width), jnp.float32)),
    )
    if gate is None and bias is not None:
        to_added = to_x
    return to_x, to_added, normed, sums.sum(1)


def _norm_backward_kernel(
    total, mean_of, factor_of, scale, shift, added, bias, gate, to_total, to_normed,
    to_x, to_added, normed, sums, *, rows, width, centred,
):  # fmt: skip
    sample, chunk = pl.program_id(0), pl.program_id(1)
    channels, inside = _along(width)
    scales, shifts = (_read(part, (sample, channels), inside) for part in (scale, shift))
    if gate is not None:
        gates, biases = _read(gate, (sample, channels), inside), _read(bias, (channels,), inside)

    def one(number, found):
        row = chunk * ROWS + number
        there, place = inside & (row < rows), (sample, row, channels)
        mean, factor = (_read(part, (sample, row), row < rows) for part in (mean_of, factor_of))
        gradient = _read(to_normed, place, there)
        normal = jnp.where(inside, (_read(total, place, there) - mean) * factor, 0.0)
        scaled = gradient * scales
        level = scaled.sum() / width if centred else 0.0
        slope = (scaled * normal).sum() / width
        whole = _read(to_total, place, there) + factor * (scaled - level - normal * slope)
        _write(to_x, place, whole, there)
        _write(normed, place, normal * scales + shifts, there)
        more = [gradient, gradient * normal]
        if bias is not None:
            more.append(jnp.where(there, whole, 0.0))
        if gate is not None:
            _write(to_added, place, gates * whole, there)
            more.append(jnp.where(there, whole * (_read(added, place, there) + biases), 0.0))
        return tuple(map(jnp.add, found, more))

    nothing = jnp.zeros(inside.shape, jnp.float32)
    for number, found in enumerate(jax.lax.fori_loop(0, ROWS, one, (nothing,) * sums.shape[2])):
        _write(sums, (sample, chunk, number, channels), found, inside)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def split_heads(x, bias, scales, angles, heads: int):
    """Heads out of a product: bias added, the first parts normed head by head and turned.

    Args:
      x: [b, n, parts * d], as queries, keys and values one after the other.
      bias: [parts * d].
      scales: [normed, head_size], of the norm by the root mean square of each of the first parts.
      angles: [n, head_size / 2] by which the normed parts are turned (`model.rotate`), and which get no gradient;
        None: they are not turned.
      heads: of each part.

    Returns:
      The parts [b, n, heads, head_size], of x's dtype.
    """
    x, bias, scales = _in_halves(x, bias, scales, heads)
    b, n, parts, _, _, half = x.shape
    found = _run(
        _heads_kernel,
        (b, n),
        (x, bias, scales, *_turns(angles)),
        (jax.ShapeDtypeStruct((b, n, heads, 2, half), x.dtype),) * parts,
    )
    return tuple(part.reshape(b, n, heads, 2 * half) for part in found)


def _split_heads_backward(heads, kept, gradients):
    x, bias, scales, angles = kept
    apart, biases, both = _in_halves(x, bias, scales, heads)
    (b, n, parts, _, _, half), chunks = apart.shape, pl.cdiv(x.shape[1], ROWS)
    to_x, to_bias, to_scales = _run(
        partial(_heads_backward_kernel, rows=n),
        (b, chunks),
        (apart, biases, both, *_turns(angles), *(part.reshape(b, n, heads, 2, half) for part in gradients)),
        (
            jax.ShapeDtypeStruct(apart.shape, x.dtype),
            jax.ShapeDtypeStruct((b, chunks, parts, heads, 2, half), jnp.float32),
            jax.ShapeDtypeStruct((b, chunks, len(both), heads, 2, half), jnp.float32),
        ),
    )
    to_bias = to_bias.sum((0, 1)).reshape(bias.shape).astype(bias.dtype)
    to_scales = to_scales.sum((0, 1, 3)).reshape(scales.shape).astype(scales.dtype)
    return to_x.reshape(x.shape), to_bias, to_scales, None if angles is None else jnp.zeros_like(angles)


def _split_heads_forward(x, bias, scales, angles, heads):
    return split_heads(x, bias, scales, angles, heads), (x, bias, scales, angles)


split_heads.defvjp(_split_heads_forward, _split_heads_backward)


def _in_halves(x, bias, scales, heads):
    """(x [b, n, parts, heads, 2, half], bias [parts, heads, 2, half], scales [normed, 2, half])."""
    shape = -1, heads, 2, scales.shape[-1] // 2
    return x.reshape(*x.shape[:2], *shape), bias.reshape(shape), scales.reshape(-1, 2, shape[-1])


def _turns(angles):
    return (None, None) if angles is None else (jnp.cos(angles), jnp.sin(angles))


def _heads_kernel(x, bias, scales, cos, sin, *results):
    sample, row = pl.program_id(0), pl.program_id(1)
    (heads, all_heads), (half, whole_half) = _along(bias.shape[1]), _along(bias.shape[3])
    inside = all_heads[:, None] & whole_half[None]
    for part, result in enumerate(results):
        given = _with_bias(x, bias, (sample, row), part, (heads, half), inside)
        if part < scales.shape[0]:
            factor = _head_factor(given, 2 * bias.shape[3])
            given = [
                value * factor * _read(scales, (part, side, half), whole_half)[None]
                for side, value in zip(HALVES, given)
            ]
            if cos is not None:
                c, s = (_read(table, (row, half), whole_half)[None] for table in (cos, sin))
                given = [given[0] * c - given[1] * s, given[1] * c + given[0] * s]
        for side, value in zip(HALVES, given):
            _write(result, (sample, row, heads, side, half), value, inside)


def _with_bias(x, bias, place, part, within, inside):
    heads, half = within
    return [
        _read(x, (*place, part, heads, side, half), inside) + _read(bias, (part, heads, side, half), inside)
        for side in HALVES
    ]


def _head_factor(halves, size):
    """One over the root mean square of each head, [heads, 1]."""
    return jax.lax.rsqrt((halves[0] * halves[0] + halves[1] * halves[1]).sum(1, keepdims=True) / size + EPSILON)


def _heads_backward_kernel(x, bias, scales, cos, sin, *others, rows):
    *gradients, to_x, to_bias, to_scales = others
    sample, chunk = pl.program_id(0), pl.program_id(1)
    (heads, all_heads), (half, whole_half) = _along(bias.shape[1]), _along(bias.shape[3])
    inside = all_heads[:, None] & whole_half[None]
    nothing = jnp.zeros(inside.shape, jnp.float32)
    for part, gradient in enumerate(gradients):
        normed = part < scales.shape[0]

        def one(number, found, part=part, gradient=gradient, normed=normed):
            row = chunk * ROWS + number
            there = inside & (row < rows)
            to_given = [_read(gradient, (sample, row, heads, side, half), there) for side in HALVES]
            of_scales = []
            if normed:
                if cos is not None:
                    c, s = (_read(table, (row, half), whole_half & (row < rows))[None] for table in (cos, sin))
                    to_given = [to_given[0] * c + to_given[1] * s, to_given[1] * c - to_given[0] * s]
                given = _with_bias(x, bias, (sample, row), part, (heads, half), there)
                factor = _head_factor(given, 2 * bias.shape[3])
                normal = [value * factor for value in given]
                of_scales = [value * each for value, each in zip(to_given, normal)]
                scaled = [
                    value * _read(scales, (part, side, half), whole_half)[None] for side, value in zip(HALVES, to_given)
                ]
                slope = (scaled[0] * normal[0] + scaled[1] * normal[1]).sum(1, keepdims=True) / (2 * bias.shape[3])
                to_given = [factor * (value - each * slope) for value, each in zip(scaled, normal)]
            for side, value in zip(HALVES, to_given):
                _write(to_x, (sample, row, part, heads, side, half), value, there)
            return tuple(map(jnp.add, found, (*to_given, *of_scales)))

        found = jax.lax.fori_loop(0, ROWS, one, (nothing,) * (4 if normed else 2))
        for side in HALVES:
            _write(to_bias, (sample, chunk, part, heads, side, half), found[side], inside)
            if normed:
                _write(to_scales, (sample, chunk, part, heads, side, half), found[2 + side], inside)


def _run(kernel: Callable[..., None], grid: tuple[int, ...], given: Sequence[Any], results: Sequence[Any]):
    """What the kernel writes; where `given` or `results` (shapes) have None, the kernel has None and so has the answer."""
    there = [value is not None for value in (*given, *results)]

    def with_none(*refs):
        left = iter(refs)
        kernel(*(next(left) if present else None for present in there))

    called = pl.pallas_call(
        with_none,
        grid=grid,
        out_shape=[shape for shape in results if shape is not None],
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=jax.default_backend() == "cpu",  # for tests: in Python
    )
    # Within jit a kernel whose results nobody wants is dropped; as it is JAX keeps it, and what it is given (jax 0.10.2).
    found = iter(jax.jit(called)(*(value for value in given if value is not None)))
    return tuple(None if shape is None else next(found) for shape in results)


def _along(size: int):
    """(a slice of a power of two, which of it lies within size)."""
    whole = pl.next_power_of_2(size)
    return pl.ds(0, whole), jnp.arange(whole) < size


def _read(ref, place, inside):
    return triton.load(_at(ref, place), mask=inside, other=0.0).astype(jnp.float32)


def _write(ref, place, value, inside):
    triton.store(_at(ref, place), value.astype(ref.dtype), mask=inside)


def _at(ref, place):
    return ref.at[tuple(jnp.int32(part) if isinstance(part, int) else part for part in place)]
