"""Attention of all heads, by cuDNN's kernel or by plain products; neither keeps scores for the backward pass.

The scores are computed again there, as in Dao et al. 2022 ("FlashAttention"); the backward pass is given the output and the
logarithm of each row's sum, which remat must keep (`is_result`), or attention runs a third time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT, INPUT = "attention", "attention input"
SCORES_AT_ONCE = {"cpu": 2**19, "gpu": 2**24}  # float32: 2 MB are the cache of two cores; 64 work for a whole card
TURNS_AT_ONCE = {"cpu": 2, "gpu": 1}  # products of this size keep one core busy each


def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, implementation: str) -> jax.Array:
    """softmax(q k^T / sqrt(head_size)) v, the softmax in float32.

    Args:
      q: [b, n, heads, head_size].
      k, v: [b, m, heads, head_size], of q's dtype.
      lengths: [b] int32 of the valid keys, at least 1; None: all.
      implementation: "cudnn", or "xla" for plain products; see `mesh.attention_implementation`.

    Returns:
      [b, n, heads, head_size] of q's dtype.
    """
    if implementation != "cudnn":
        return by_heads(q, k, v, lengths)
    n = q.shape[1]
    if lengths is None:  # an image with itself; to make them again is 4% of all that a step moves
        q, k, v = (checkpoint_name(part, INPUT) for part in (q, k, v))
    q, k, v, lengths = even_lengths(q, k, v, lengths)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")[:, :n]


def is_input(primitive, parameters) -> bool:
    """Whether an operation that a policy of jax.checkpoint is asked about gives cuDNN an image's queries, keys or values."""
    return primitive.name == "name" and parameters["name"] == INPUT


def is_result(primitive, parameters) -> bool:
    """Whether an operation that a policy of jax.checkpoint is asked about gives what attention's backward pass needs."""
    named = primitive.name == "name" and parameters["name"] == KEPT
    return named or primitive.name.startswith("dot_product_attention_fwd")


def even_lengths(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None):
    """q, k, v [b, n, heads, head_size] with one token more where n is odd, and the lengths that leave it out.

    cuDNN's backward pass takes no odd lengths (jax 0.10.2), and 208x304 pixels are 13 x 19 tokens.
    """
    odd_q, odd_k = q.shape[1] % 2, k.shape[1] % 2
    if odd_k and lengths is None:
        lengths = jnp.full(k.shape[:1], k.shape[1], jnp.int32)
    q = jnp.pad(q, ((0, 0), (0, odd_q), (0, 0), (0, 0)))
    k, v = (jnp.pad(part, ((0, 0), (0, odd_k), (0, 0), (0, 0))) for part in (k, v))
    return q, k, v, lengths


@jax.custom_vjp
def by_heads(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """`attend` in JAX alone: whole heads instead of tiles (Dao et al. 2022, "FlashAttention", algorithms 1 and 4).

    On the CPU few heads at a time, so that their scores stay in its cache: forward and backward pass at 1024 tokens take a
    quarter of the time and a tenth of the memory of jax.nn.dot_product_attention.
    """
    return _forward(q, k, v, lengths)[0]


def _forward(q, k, v, lengths):
    def one(q, k, v, length):
        scores = _valid(_float32_product(q, k.T), length, 1)
        top = scores.max(1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(1, keepdims=True)
        return (_float32_product(weights.astype(v.dtype), v) / total).astype(v.dtype), (top + jnp.log(total))[:, 0]

    results = jnp.zeros_like(q), jnp.zeros((len(q), q.shape[2], q.shape[1]), jnp.promote_types(q.dtype, jnp.float32))
    out, logarithm = _over_heads(one, results, q * q.shape[-1] ** -0.5, k, v, lengths)
    out, logarithm = checkpoint_name(out, KEPT), checkpoint_name(logarithm, KEPT)
    return out, (q, k, v, lengths, out, logarithm)


def _backward(kept, gradient):
    q, k, v, lengths, out, logarithm = kept
    scale = q.shape[-1] ** -0.5

    def one(q, k, v, length, gradient, logarithm, dot):  # scores transposed, [m, n]: what most products need
        weights = jnp.exp(_valid(_float32_product(k, q.T), length, 0) - logarithm)
        to_scores = (weights * (_float32_product(v, gradient.T) - dot)).astype(q.dtype)
        to_q = jax.lax.optimization_barrier(k.T @ to_scores).T  # folded into the product it would miss XLA's fast path
        return to_q, to_scores @ q, weights.astype(v.dtype) @ gradient

    dot = (_widen(gradient) * _widen(out)).sum(-1).transpose(0, 2, 1)
    results = tuple(map(jnp.zeros_like, (q, k, v)))
    to_q, to_k, to_v = _over_heads(one, results, q * scale, k, v, lengths, gradient, logarithm, dot)
    return to_q * scale, to_k, to_v, None


by_heads.defvjp(_forward, _backward)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _float32_product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _valid(scores, length, axis):
    """Scores of one head, those of keys (along `axis`) behind the length at minus infinity."""
    if length is None:
        return scores
    return jnp.where(jnp.expand_dims(jnp.arange(scores.shape[axis]) < length, 1 - axis), scores, -1e30)


def _over_heads(function, results, *arrays):
    """function for each head of each sample, only so many at a time that their scores are few.

    They are cut out of the arrays as they lie: to bring the heads of all samples to the front takes longer than a product of
    theirs.

    Args:
      function: of one head, (q [n, head_size], k [m, head_size], ...) -> as many arrays as results.
      results: zeros [b, n, heads, head_size] or [b, heads, n], to be filled in.
      arrays: shaped so too, or [b] or None.
    """
    samples, n, heads, _ = arrays[0].shape
    fit = max(1, SCORES_AT_ONCE[jax.default_backend()] // (n * arrays[1].shape[1]))
    wide = _largest_divisor(heads, fit)
    deep = _largest_divisor(samples, max(1, fit // heads))
    several = jax.vmap(jax.vmap(function, [_heads_axis(x) for x in arrays], tuple(map(_heads_axis, results))))

    def of_heads(x, head, shape):
        """shape of a sample with `head` in place of its heads."""
        return [head if axis == _heads_axis(x) else size for axis, size in enumerate(shape)]

    def turn(number, found):
        sample, head = number // (heads // wide) * deep, number % (heads // wide) * wide

        def start(x):
            return [sample, *of_heads(x, head, [0] * (x.ndim - 1))]

        def part(x):
            return jax.lax.dynamic_slice(x, start(x), [deep, *of_heads(x, wide, x.shape[1:])])

        parts = several(*jax.tree.map(part, arrays))
        return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice(whole, part, start(whole)), found, parts)

    return jax.lax.fori_loop(
        0, (samples // deep) * (heads // wide), turn, results, unroll=TURNS_AT_ONCE[jax.default_backend()]
    )


def _heads_axis(x):
    """Within one sample, [n, heads, head_size] or [heads, n]; None where heads share what there is."""
    return None if x is None or x.ndim == 1 else x.ndim - 3


def _largest_divisor(count, most):
    return max(part for part in range(1, count + 1) if count % part == 0 and part <= most)
