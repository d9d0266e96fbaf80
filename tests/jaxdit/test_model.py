from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdit import flow, layers, model, optim, trained, update

SETTINGS = {
    "layers": 2,
    "width": 32,
    "heads": 2,
    "patch": 2,
    "channels": 4,
    "text_width": 12,
    "vision_width": 6,
    "dtype": "float32",
    "remat": "none",
    "scan_unroll": 1,
    "attention": "xla",
}


def inputs(batch=3, height=8, width=12, tokens=7, seed=0):
    rng = np.random.default_rng(seed)
    conditions = {
        "text": rng.standard_normal((batch, tokens, 12)).astype(np.float32),
        "text_length": rng.integers(2, tokens + 1, batch).astype(np.int32),
        "vision": rng.standard_normal((batch, 6)).astype(np.float32),
    }
    x = rng.standard_normal((batch, height, width, 4)).astype(np.float32)
    t = rng.uniform(0.05, 0.95, batch).astype(np.float32)
    return (
        jnp.asarray(x),
        jnp.asarray(t),
        jax.tree.map(jnp.asarray, conditions),
        jnp.zeros(batch, bool),
        jnp.zeros(batch, bool),
    )


def trained_like(seed=0, **changes):
    """A model whose zero-initialised layers are filled, so that every path speaks."""
    graph, shapes = model.abstract(SETTINGS | changes)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        scale = np.sqrt(1 / leaf.shape[-2]) if path[-1].key == "kernel" else 0.3
        return jnp.asarray((path[-1].key == "scale") + scale * rng.standard_normal(leaf.shape), jnp.float32)

    return graph, jax.tree_util.tree_map_with_path(fill, shapes)


def numpy_dit(p, x, t, conditions, drop_text, drop_vision, settings=SETTINGS):
    """The DiT written again in NumPy from its formulas, one sample and one layer at a time."""
    f = np.float64
    p = jax.tree.map(lambda leaf: np.asarray(leaf, f), p)
    heads, patch = settings["heads"], settings["patch"]
    d = settings["width"] // heads

    def dense(layer, v):
        return v @ layer["kernel"] + layer["bias"]

    def rms(scale, v):
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * scale

    def norm(v):
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def silu(v):
        return v / (1 + np.exp(-v))

    def gelu(v):
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

    def turn(v, place):  # v [heads, d] at (row, column)
        quarter = d // 4
        out = v.copy()
        for pair in range(d // 2):
            angle = place[pair // quarter] * 100.0 ** (-(pair % quarter) / quarter)
            a, b = v[:, pair], v[:, pair + d // 2]
            out[:, pair] = a * np.cos(angle) - b * np.sin(angle)
            out[:, pair + d // 2] = a * np.sin(angle) + b * np.cos(angle)
        return out

    def where(place, size):
        angles = np.concatenate([place[axis] * 100.0 ** (-np.arange(size // 4) / (size // 4)) for axis in (0, 1)])
        return np.concatenate([np.sin(angles), np.cos(angles)])

    def attend(layer, v, context, places):
        q = dense(layer["query"], v).reshape(len(v), heads, d)
        k, value = np.split(dense(layer["key_value"], context).reshape(len(context), 2 * heads, d), 2, 1)
        q, k = rms(layer["query_norm"]["scale"], q), rms(layer["key_norm"]["scale"], k)
        if places is not None:
            q = np.stack([turn(row, place) for row, place in zip(q, places)])
            k = np.stack([turn(row, place) for row, place in zip(k, places)])
        out = np.zeros((len(v), heads, d))
        for h in range(heads):
            logits = q[:, h] @ k[:, h].T / np.sqrt(d)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[:, h] = weights / weights.sum(-1, keepdims=True) @ value[:, h]
        return dense(layer["out"], out.reshape(len(v), -1))

    results = []
    for i in range(len(x)):
        height, width, _ = x[i].shape
        gh, gw = height // patch, width // patch
        scale = 64 / np.sqrt(gh * gw)
        tokens, places = [], []
        for r in range(gh):
            for c in range(gw):
                tokens.append(np.asarray(x[i], f)[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel())
                places.append(((r - (gh - 1) / 2) * scale, (c - (gw - 1) / 2) * scale))
        frequencies = 10_000.0 ** (-np.arange(128) / 128)
        angles = 1000 * f(t[i]) * frequencies
        time = dense(p["time_out"], silu(dense(p["time_in"], np.concatenate([np.cos(angles), np.sin(angles)]))))
        vision = p["null_vision"] if drop_vision[i] else np.asarray(conditions["vision"][i], f)
        condition = silu(time + dense(p["vision_out"], silu(dense(p["vision_in"], vision))))
        text = np.asarray(conditions["text"][i], f)[: conditions["text_length"][i]]
        text = p["null_text"][None] if drop_text[i] else text
        text = rms(p["text_norm"]["scale"], dense(p["text_in"], text))
        h = dense(p["patch_in"], np.stack(tokens)) + np.stack([where(place, settings["width"]) for place in places])
        for n in range(settings["layers"]):
            block = jax.tree.map(lambda leaf, n=n: leaf[n], p["blocks"])
            s1, c1, g1, s2, c2, g2 = np.split(dense(block["modulation"], condition), 6)
            a = norm(h) * (1 + c1) + s1
            h = h + g1 * attend(block["self_attention"], a, a, places)
            h = h + attend(block["cross_attention"], rms(block["cross_norm"]["scale"], h), text, None)
            a = norm(h) * (1 + c2) + s2
            h = h + g2 * dense(block["mlp_out"], gelu(dense(block["mlp_in"], a)))
        shift, scale_ = np.split(dense(p["final_modulation"], condition), 2)
        h = dense(p["patch_out"], norm(h) * (1 + scale_) + shift)
        out = np.zeros(x[i].shape)
        for n, token in enumerate(h):
            r, c = divmod(n, gw)
            out[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = token.reshape(patch, patch, -1)
        results.append(out)
    return np.stack(results)


def test_the_model_agrees_with_numpy():
    graph, params = trained_like()
    x, t, conditions, _, _ = inputs()
    drop_text, drop_vision = jnp.array([False, True, False]), jnp.array([True, False, False])
    got = jax.jit(nnx.merge(graph, params))(x, t, conditions, drop_text, drop_vision)
    want = numpy_dit(params, np.asarray(x), np.asarray(t), jax.tree.map(np.asarray, conditions), drop_text, drop_vision)
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def _plain_gelu(x):
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _plain_modulate(x, shift, scale):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale[:, None]) + shift[:, None]


def _plain_rms_norm(x, scale):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (layers.gelu, _plain_gelu, [(2, 5, 8)]),
        (partial(layers.modulate, dtype=jnp.float64), _plain_modulate, [(2, 5, 8), (2, 8), (2, 8)]),
        (layers.rms_norm, _plain_rms_norm, [(2, 5, 3, 8), (8,)]),
    ],
)
def test_gradients_that_are_written_out_are_those_of_the_formula(ours, plain, shapes):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        arguments = [jnp.asarray(2 * rng.standard_normal(shape)) for shape in shapes]
        wanted, pull_wanted = jax.vjp(plain, *arguments)
        found, pull_found = jax.vjp(lambda *given: ours(*given), *arguments)
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)
        direction = jnp.asarray(rng.standard_normal(wanted.shape))
        for one, other in zip(pull_found(direction), pull_wanted(direction), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes", [{"remat": "block"}, {"remat": "off"}, {"scan_unroll": 2}])
def test_remat_and_unroll_change_nothing(changes):
    graph, params = trained_like()
    other, _ = trained_like(**changes)
    arguments = inputs()

    def loss(graph):
        return lambda params: jnp.square(nnx.merge(graph, params)(*arguments)).sum()

    found = jax.device_get([jax.jit(jax.grad(loss(g)))(params) for g in (graph, other)])
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(ours).max() + 1e-6)


def test_padding_has_exactly_no_influence():
    graph, params = trained_like()
    x, t, conditions, drop, _ = inputs(tokens=7)
    run = jax.jit(lambda text, x: nnx.merge(graph, params)(x, t, conditions | {"text": text}, drop, drop))
    poisoned = np.array(conditions["text"])
    for row, length in zip(poisoned, conditions["text_length"]):
        row[length:] = 1e4
    np.testing.assert_array_equal(run(conditions["text"], x), run(jnp.asarray(poisoned), x))
    gradient = jax.grad(lambda text: jnp.square(run(text, x)).sum())(conditions["text"])
    for row, length in zip(np.asarray(gradient), conditions["text_length"]):
        assert (row[length:] == 0).all() and (np.abs(row[:length]).max(-1) > 0).all()


def test_dropped_conditions_have_no_influence_and_present_ones_do():
    graph, params = trained_like()
    x, t, conditions, keep, _ = inputs()
    drop = ~keep
    run = jax.jit(lambda c, dt, dv: nnx.merge(graph, params)(x, t, c, dt, dv))
    other = {name: value + 1 if name != "text_length" else value for name, value in conditions.items()}
    np.testing.assert_array_equal(run(conditions, drop, drop), run(other, drop, drop))
    shorter = conditions | {"text_length": jnp.ones_like(conditions["text_length"])}
    np.testing.assert_array_equal(run(conditions, drop, keep), run(shorter, drop, keep))
    for name, (dt, dv) in {"text": (keep, drop), "vision": (drop, keep)}.items():
        changed = run(conditions | {name: other[name]}, dt, dv)
        assert jnp.abs(changed - run(conditions, dt, dv)).max() > 1e-3


def test_a_new_model_predicts_zero_and_every_conditioning_path_learns():
    graph, _ = model.abstract(SETTINGS)
    params = start = jax.jit(partial(model.initial_parameters, SETTINGS, 0))()
    x, t, conditions, drop, _ = inputs(batch=8)
    answer = jax.jit(lambda params: nnx.merge(graph, params)(x, t, conditions, drop, drop))(params)
    np.testing.assert_array_equal(answer, 0)
    options = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
    optimizer = optim.make_optimizer(lambda _: 1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    state = optimizer.init(params)
    batch = conditions | {"latent": x}

    @jax.jit
    def step(params, state, n):
        def loss(params):
            return flow.losses(nnx.merge(graph, params), batch, flow.sample_keys(0, n, 0, 8), **options)["loss"].mean()

        gradients = jax.grad(loss)(params)
        changes, state = optimizer.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, changes), state, gradients

    for n in range(20):
        params, state, gradients = step(params, state, n)
    params, start, gradients = jax.device_get((params, start, gradients))
    for (path, gradient), new, old in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(params), jax.tree.leaves(start)
    ):
        name = jax.tree_util.keystr(path)
        if name.endswith("key_value']['bias']"):  # a bias of all keys cancels in the softmax; the values' half moves
            gradient, new, old = (leaf[:, leaf.shape[-1] // 2 :] for leaf in (gradient, new, old))
        per_layer = gradient if "blocks" in name else gradient[None]
        assert (np.abs(per_layer).reshape(len(per_layer), -1).max(-1) > 0).all(), f"no gradient reaches {name}"
        assert np.abs(new - old).max() > 0, f"{name} has not moved"


def test_a_micro_batch_adds_the_gradients_of_squares_and_of_the_weighted_direction_and_tells_the_squares():
    graph, params = trained_like()
    x, _, conditions, _, _ = inputs(batch=4)
    batch, where = conditions | {"latent": x}, np.array([3, 0], np.int32)
    options = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}

    def added(**more):
        total = update.new_total(params)
        return jax.jit(partial(update.accumulate_gradients, graph, options | more, 0))(params, total, batch, where)

    def wanted(params):
        found = flow.losses(nnx.merge(graph, params), batch, flow.sample_keys(0, 3, 0, 4), **options)
        return (found["loss"] + 0.7 * found["direction"]).sum()

    plain, both = added(), added(direction=0.7)
    assert both["loss"] == pytest.approx(float(plain["loss"]), rel=1e-5)
    gradients = jax.jit(jax.grad(wanted))(params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), both["gradients"], gradients)
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), both["gradients"], plain["gradients"])
    assert max(jax.tree.leaves(changed)) > 1e-3 * largest


@pytest.mark.parametrize("remat", ["none", "block"])
def test_what_runs_on_a_gpu_alone_is_the_same_model(monkeypatch, remat):
    """One product for q, k and v, and the layers without a loop, compiled here."""
    arguments = inputs()
    graph, params = trained_like(remat=remat)

    def answers(lay_out):
        run = jax.jit(lambda params: jnp.square(nnx.merge(graph, lay_out(params))(*arguments)).mean())
        return jax.value_and_grad(run)(params)

    here = answers(lambda params: params)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    there = answers(model.separated)
    for one, other in zip(*map(jax.tree.leaves, jax.device_get((here, there))), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5 * np.abs(one).max())


def test_positions_span_the_same_range_at_every_resolution():
    for grid in (8, 16, 64):
        places = np.asarray(model.positions(grid, grid))
        np.testing.assert_allclose(places.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(np.ptp(places, 0), 64 * (grid - 1) / grid, rtol=1e-5)
    wide = np.asarray(model.positions(4, 16))
    np.testing.assert_allclose(wide[1] - wide[0], [0, 8], atol=1e-5)  # row-major, square steps of 64 / sqrt(64)


def test_attention_logits_stay_bounded_however_large_the_projections():
    graph, params = trained_like()
    big = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 100 if {"query", "key_value"} & {part.key for part in path} else leaf, params
    )
    arguments = inputs()
    out = jax.jit(nnx.merge(graph, big))(*arguments)
    assert jnp.isfinite(out).all()
    attention = model.Attention(
        32, 2, zero=False, dtype=jnp.float32, implementation="xla", rngs=nnx.Rngs(0)
    )  # fmt: skip
    q = (100 * attention.query(jax.random.normal(jax.random.key(0), (3, 5, 32)))).reshape(3, 5, 2, 16)
    q = layers.rms_norm(q, attention.query_norm.scale[...])
    assert (jnp.linalg.norm(q, axis=-1) <= 4 * 1.001).all()  # sqrt(head size) times a gain of 1


def test_patches_are_row_major_with_row_column_channel_inside():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.asarray(model.patchify(jnp.asarray(x), 2))
    np.testing.assert_array_equal(patches[1, 4], x[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(model.unpatchify(jnp.asarray(patches), 4, 6, 2), x)


def test_bfloat16_follows_float32():
    graph, params = trained_like()
    half, _ = trained_like(dtype="bfloat16")
    arguments = inputs()
    want, got = (
        jax.jit(lambda params, graph=graph: nnx.merge(graph, params)(*arguments))(params) for graph in (graph, half)
    )
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 3e-2


def test_accumulated_gradients_equal_those_of_one_batch():
    graph, params = trained_like()
    x, _, conditions, _, _ = inputs(batch=16)
    batch = conditions | {"latent": x}
    options = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
    zeros = update.new_total(params)
    accumulate = jax.jit(partial(update.accumulate_gradients, graph, options, 0))

    def cut(first, count):
        return {name: value[first : first + count] for name, value in batch.items()}

    whole = accumulate(params, zeros, batch, jnp.array([5, 0]))
    total = zeros
    for first in range(0, 16, 4):
        total = accumulate(params, total, cut(first, 4), jnp.array([5, first]))
    for ours, theirs in zip(*map(jax.tree.leaves, jax.device_get((whole, total))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(ours).max() + 1e-6)
    assert jax.tree.leaves(total)[0].dtype == jnp.float32


@pytest.mark.parametrize(("remat", "dtype"), [("none", "float32"), ("block", "float32"), ("none", "bfloat16")])
def test_an_update_with_separate_layers_is_that_with_stacked_ones(remat, dtype):
    graph, params = trained_like(remat=remat, dtype=dtype)
    x, _, conditions, _, _ = inputs(batch=4)
    options = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
    accumulate = jax.jit(partial(update.accumulate_gradients, graph, options, 0))
    optimizer = optim.make_optimizer(lambda _: 1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    found = []
    for separate in (False, True):
        total = update.new_total(params, separate=separate)
        assert model.is_separated(total["gradients"]) == separate
        for first in (0, 4):
            total = accumulate(params, total, conditions | {"latent": x}, jnp.array([5, first]))
        change = jax.jit(partial(update.apply_update, optimizer, lambda _: 1e-3, 0.9999, 8))
        state, row = change(update.state_of(optimizer, params), total)
        found.append((model.stacked(total["gradients"]), state["params"], row["loss"], row["grad_norm"]))
    close = 1e-5 if dtype == "float32" else 3e-2
    for one, other in zip(*map(jax.tree.leaves, jax.device_get(found)), strict=True):
        np.testing.assert_allclose(other, one, rtol=close, atol=close * np.abs(one).max() + 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leading", [(3,), (3, 5)])
@pytest.mark.parametrize("outputs", [3, 6])  # narrower and wider than the input
def test_the_product_and_its_gradients_are_those_of_a_plain_one(dtype, leading, outputs):
    keys = jax.random.split(jax.random.key(0), 4)
    x, kernel, bias, weights = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, [(*leading, 4), (4, outputs), (outputs,), (*leading, outputs)])
    )

    def results(multiply):
        back = jax.grad(lambda *inputs: (multiply(*inputs) * weights).sum().astype(jnp.float32), (0, 1, 2))
        return [multiply(x, kernel, bias), *jax.jit(back)(x, kernel, bias)]

    for ours, theirs in zip(results(layers.product), results(lambda x, kernel, bias: x @ kernel + bias), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ours, theirs = (np.asarray(value, np.float32) for value in (ours, theirs))
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=(1e-6 if dtype == "float32" else 2e-2) * np.abs(theirs).max()
        )


@pytest.mark.parametrize(
    "remat, scan_unroll, on_card, wanted",
    [
        ("none", 0, True, (6, "none", True)),
        ("block", 0, True, (6, "block", True)),
        ("none", 3, True, (3, "none", False)),
        ("none", 3, False, (3, "none", False)),
        ("none", 0, False, (1, "none", False)),
        ("none", 6, False, (6, "off", False)),
        ("block", 6, False, (1, "block", False)),
    ],
)
def test_layers_run_without_a_loop_where_that_is_faster(remat, scan_unroll, on_card, wanted):
    options = {"layers": 6, "remat": remat, "scan_unroll": scan_unroll}
    assert tuple(trained.unrolled(options | {"fused": True}, on_card=on_card).values()) == wanted
    assert not trained.unrolled(options, on_card=on_card)["fused"]  # a configuration from before there was a choice


def test_the_cpu_keeps_what_remat_would_compute_again_where_no_loop_parts_the_passes():
    sizes = {}
    for remat in ("none", "off"):
        settings = SETTINGS | {"remat": remat, "scan_unroll": SETTINGS["layers"]}
        graph, shapes = model.abstract(settings)
        arguments = inputs()

        def loss(params, graph=graph, arguments=arguments):
            return jnp.square(nnx.merge(graph, model.separated(params))(*arguments)).sum()

        sizes[remat] = jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes
    assert sizes["none"] == pytest.approx(sizes["off"], rel=0.2)


def test_a_new_block_changes_nothing_and_its_gates_are_closed():
    params = jax.jit(partial(model.initial_parameters, SETTINGS, 0))()
    blocks = params["blocks"]
    for layer in (
        blocks["modulation"],
        blocks["cross_attention"]["out"],
        params["final_modulation"],
        params["patch_out"],
    ):
        assert not layer["kernel"].any() and not layer["bias"].any()
    for layer in (blocks["mlp_in"], params["text_in"]):  # Xavier: uniform within sqrt(6 / (in + out))
        limit = np.sqrt(6 / sum(layer["kernel"].shape[-2:]))
        assert 0.9 * limit < np.abs(layer["kernel"]).max() <= limit


@pytest.mark.parametrize("name", ["modulate", "rms_norm"])
def test_norms_of_bfloat16_are_taken_in_float32_where_a_gradient_is_asked_for(name):
    rng = np.random.default_rng(0)
    x = jnp.asarray(8 + 0.3 * rng.standard_normal((2, 5, 3, 64)), jnp.bfloat16)
    if name == "modulate":
        x, rest = x[:, :, 0], (jnp.zeros((2, 64)), jnp.zeros((2, 64)))
        norm = lambda x: layers.modulate(x, *rest, jnp.float32)  # noqa: E731
    else:
        norm = lambda x: layers.rms_norm(x, jnp.ones(64))  # noqa: E731
    found, _ = jax.vjp(norm, x)
    wanted = norm(x.astype(jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_numbers_of_a_row_are_what_their_names_say():
    optimizer = optim.make_optimizer(lambda _: 1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0)
    state = update.state_of(optimizer, jax.jit(partial(model.initial_parameters, SETTINGS, 0))())
    total = update.new_total(state["params"])
    rng = np.random.default_rng(0)
    total["gradients"] = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), total["gradients"]
    )
    total |= {"velocity": jnp.float32(36.0), "target": jnp.float32(64.0)}
    total |= {"loss_by_t": jnp.arange(10.0), "count_by_t": jnp.full(10, 2.0)}
    before, grads = jax.device_get((state["params"], total["gradients"]))
    for one, other in zip(*map(jax.tree.leaves, (state["ema"], before)), strict=True):
        np.testing.assert_array_equal(one, other)  # the average begins with the weights themselves
    new, row = jax.device_get(jax.jit(partial(update.apply_update, optimizer, lambda _: 1e-2, 0.9999, 4))(state, total))

    def norm(tree, *names):
        parts = [tree[name] for name in names] if names else [tree]
        return np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(parts)))

    moved = jax.tree.map(np.subtract, new["params"], before)
    assert row["velocity_rms"] == pytest.approx(3) and row["target_rms"] == pytest.approx(4)
    np.testing.assert_allclose(row["loss_t"], np.arange(10) / 2)
    behind = jax.tree.map(np.subtract, new["ema"], new["params"])
    assert row["ema_distance"] == pytest.approx(norm(behind) / norm(new["params"]), rel=1e-4)
    for name, parts in {"text": ("text_in", "text_norm"), "vision": ("vision_in", "vision_out")}.items():
        assert row[f"grad/{name}"] == pytest.approx(norm(grads, *parts) / 4, rel=1e-4)
        assert row[f"move/{name}"] == pytest.approx(norm(moved, *parts) / norm(new["params"], *parts), rel=1e-4)


def test_each_layer_and_each_null_condition_begins_with_draws_of_its_own():
    blocks = (params := jax.jit(partial(model.initial_parameters, SETTINGS, 0))())["blocks"]
    for layer in (blocks["self_attention"]["query"], blocks["mlp_in"], blocks["mlp_out"]):
        assert (layer["kernel"][0] != layer["kernel"][1]).any()
    for name in ("null_text", "null_vision"):
        assert 0.3 < np.std(params[name]) < 3


def test_a_loss_that_is_not_finite_moves_nothing_though_its_gradients_are_finite():
    optimizer = optim.make_optimizer(lambda _: 1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0)
    state = update.state_of(optimizer, jax.jit(partial(model.initial_parameters, SETTINGS, 0))())
    total = update.new_total(state["params"])
    total |= {"gradients": jax.tree.map(jnp.ones_like, state["params"]), "loss": jnp.float32(jnp.inf)}
    new, _ = jax.jit(partial(update.apply_update, optimizer, lambda _: 1e-2, 0.9999, 4))(state, total)
    for name in ("params", "ema", "opt_state", "updates"):
        for one, other in zip(*map(jax.tree.leaves, (state[name], new[name])), strict=True):
            np.testing.assert_array_equal(one, other)
    assert int(new["voided"]) == 1
