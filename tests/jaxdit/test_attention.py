from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdit import attention


def tokens(n, m, dtype="float32", heads=3):
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (2, size, heads, 8)).astype(dtype) * factor
        for key, size, factor in zip(keys, (n, m, m, n), (3, 3, 1, 1))
    ]


def both_passes(attend, q, k, v, gradient):
    out, back = jax.vjp(attend, q, k, v)
    return [out, *back(gradient)]


@pytest.mark.parametrize("at_once", [1, 2**18, 4 * 6 * 7])  # one head, all, four and the last two
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_values_and_gradients_are_those_of_plain_attention(monkeypatch, at_once, masked, dtype):
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", at_once)
    lengths = jnp.array([7, 3]) if masked else None

    def plain(q, k, v):
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        if masked:
            scores = jnp.where(jnp.arange(7) < lengths[:, None, None, None], scores, -jnp.inf)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), v)

    def ours(q, k, v):
        return attention.attend(q, k, v, lengths, "xla")

    with jax.enable_x64(True):
        given = tokens(6, 7, dtype)
        found = jax.jit(lambda *given: both_passes(ours, *given))(*given)
        exact = both_passes(plain, *(part.astype(jnp.float64) for part in given))
        for got, want in zip(found, exact, strict=True):
            assert got.dtype == dtype
            error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
            assert error < (1e-12 if dtype == "float64" else 2e-2)


def test_xla_leaves_the_products_of_heads_to_all_cores():
    """Without the flag that jaxdit/__init__.py sets, a library takes them that keeps one core busy."""
    q, k, _, _ = tokens(256, 256)
    program = jax.jit(lambda q, k: jnp.einsum("bnhd,bmhd->bhnm", q, k)).lower(q, k).compile().as_text()
    assert "dot(" in program and "ynn_fusion" not in program


def test_large_scores_do_not_overflow():
    q, k, v, gradient = tokens(5, 7)
    for part in both_passes(lambda q, k, v: attention.attend(q, k, v, None, "xla"), 1e3 * q, 1e3 * k, v, gradient):
        assert jnp.isfinite(part).all()


@pytest.mark.parametrize(("n", "m", "masked"), [(13, 13, False), (6, 7, True), (7, 6, True), (6, 6, False)])
def test_a_token_that_makes_a_length_even_changes_nothing(n, m, masked):
    q, k, v, gradient = tokens(n, m)
    lengths = jnp.array([m, 3]) if masked else None

    def attend(q, k, v, even):
        rest = attention.even_lengths(q, k, v, lengths) if even else (q, k, v, lengths)
        assert not even or (rest[0].shape[1] % 2 == rest[1].shape[1] % 2 == rest[2].shape[1] % 2 == 0)
        return jax.nn.dot_product_attention(*rest[:3], key_value_seq_lengths=rest[3])[:, :n]

    with_one, without = (both_passes(partial(attend, even=even), q, k, v, gradient) for even in (True, False))
    for ours, theirs in zip(with_one, without, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_with_one_key_alone_nothing_reaches_queries_and_keys_in_bfloat16_either():
    """There the gradient is a difference of two equal sums, which only float32 tells from rounding."""
    q, k, v, gradient = tokens(6, 1, "bfloat16")
    _, to_q, to_k, _ = both_passes(lambda q, k, v: attention.attend(q, k, v, None, "xla"), q, k, v, gradient)
    assert max(jnp.abs(to_q).max(), jnp.abs(to_k).max()) < 1e-4
