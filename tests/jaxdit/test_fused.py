import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdit import estimate, fused, layers, model, update
from tests.jaxdit.test_model import SETTINGS, inputs, trained_like

OPTIONS = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [None if shape is None else jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def assert_same(ours, plain, arguments):
    """Results, and gradients to all that is given of a sum of them with random weights."""
    found, wanted = ours(*arguments), plain(*arguments)
    weights = drawn(*(part.shape for part in wanted))

    def total(function):
        return lambda *given: sum((part * weight).sum() for part, weight in zip(function(*given), weights, strict=True))

    given = tuple(number for number, argument in enumerate(arguments) if argument is not None)
    found = *found, *jax.grad(total(ours), given)(*arguments)
    wanted = *wanted, *jax.grad(total(plain), given)(*arguments)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize(
    "sizes, centred, given",  # rows and widths that fit, and not
    [
        ((2, 20, 24, 12), True, "gated"),
        ((2, 20, 24, 12), False, "added"),
        ((1, 16, 32, 8), False, "gated"),
        ((2, 7, 16, 40), True, "x"),
    ],
)
def test_a_norm_with_its_residual_sum_and_product_is_that_of_the_formula(sizes, centred, given):
    b, n, d, e = sizes
    shapes = [(b, n, d), (b, n, d), (d,), (b, d), (b, d), (b, d), (d, e)]
    shapes[1:4] = {"x": [None] * 3, "added": [*shapes[1:3], None], "gated": shapes[1:4]}[given]

    def plain(x, added, bias, gate, scale, shift, kernel):
        if added is not None:
            x = x + (1 if gate is None else gate[:, None]) * (added + bias)
        from_mean = x - x.mean(-1, keepdims=True) if centred else x
        normed = from_mean / jnp.sqrt(jnp.square(from_mean).mean(-1, keepdims=True) + 1e-6)
        return x, (normed * scale[:, None] + shift[:, None]) @ kernel

    assert_same(partial(fused.norm_product, centred=centred), plain, drawn(*shapes))


@pytest.mark.parametrize(
    "n, heads, size, parts, normed, turned", [(20, 3, 8, 3, 2, True), (16, 4, 8, 2, 1, False), (7, 2, 24, 1, 1, True)]
)
def test_heads_are_those_of_norm_and_rotation(n, heads, size, parts, normed, turned):
    x, bias, scales, angles = drawn(
        (2, n, parts * heads * size), (parts * heads * size,), (normed, size), (n, size // 2)
    )

    def plain(x, bias, scales):
        found = jnp.split((x + bias).reshape(2, n, parts * heads, size), parts, 2)
        found[:normed] = map(layers.rms_norm, found, scales)
        return [model.rotate(part, angles) if turned and k < normed else part for k, part in enumerate(found)]

    def ours(x, bias, scales):
        return fused.split_heads(x, bias, scales, angles if turned else None, heads)

    assert_same(ours, plain, (x, bias, scales))


def test_a_model_with_fused_kernels_is_the_same_model():
    arguments = inputs()

    def answers(**changes):
        graph, params = trained_like(**changes)
        run = jax.jit(lambda params: jnp.square(nnx.merge(graph, model.separated(params))(*arguments)).mean())
        return jax.value_and_grad(run)(params)

    plain, fast = jax.device_get((answers(), answers(fused=True)))
    for one, other in zip(*map(jax.tree.leaves, (fast, plain)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max())


def test_gradients_in_bfloat16_are_as_near_to_the_true_ones_as_the_plain_model_s():
    arguments = inputs()

    def gradients(**changes):
        graph, params = trained_like(**changes)
        run = jax.jit(lambda params: jnp.square(nnx.merge(graph, model.separated(params))(*arguments)).mean())
        return jax.tree.leaves(jax.device_get(jax.grad(run)(params)))

    true, plain, fast = gradients(), gradients(dtype="bfloat16"), gradients(dtype="bfloat16", fused=True)
    for wanted, theirs, ours in zip(true, plain, fast, strict=True):
        assert ours.dtype == wanted.dtype
        far, ours_far = (np.linalg.norm(found - wanted) for found in (theirs, ours))
        assert ours_far <= 2 * far + 1e-6 * np.linalg.norm(wanted)


def test_kernels_are_fused_in_training_and_nowhere_else():
    graph, params = trained_like(fused=True)
    arguments = inputs()

    def kernels(function, *given):
        return str(jax.make_jaxpr(function)(*given)).count("pallas_call")

    assert not kernels(lambda params: nnx.merge(graph, params)(*arguments), params)
    batch = arguments[2] | {"latent": arguments[0]}
    for separate, wanted in ((True, True), (False, False)):
        total = update.new_total(params, separate=separate)
        step = partial(update.accumulate_gradients, graph, OPTIONS, 0)
        assert bool(kernels(step, params, total, batch, jnp.zeros(2, jnp.int32))) == wanted


@pytest.mark.parametrize("remat, dtype", [("none", "float32"), ("block", "bfloat16")])
def test_the_plan_knows_what_a_layer_with_fused_kernels_keeps(remat, dtype):
    arguments = inputs(batch=5, height=8, width=12, tokens=7)

    def kept(count, **changes):
        graph, shapes = model.abstract(SETTINGS | {"layers": count, "remat": remat, "dtype": dtype} | changes)

        def pull(params):
            return jax.vjp(lambda params: nnx.merge(graph, model.separated(params))(*arguments).sum(), params)[1]

        return sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(pull, shapes))
        )

    def by_hand(**changes):
        settings = SETTINGS | {"remat": remat, "dtype": dtype} | changes
        return estimate.kept_in_layer(settings, 5, (8, 12, 4), 7, remat=remat)

    more = (kept(3, fused=True) - kept(2, fused=True)) - (kept(3) - kept(2))
    assert more == by_hand(fused=True) - by_hand()
