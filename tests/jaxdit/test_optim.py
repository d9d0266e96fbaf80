import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdit import optim


def test_schedule_by_hand():
    schedule = optim.learning_rate(peak=3e-4, end=1e-6, warmup=10, total=110)
    np.testing.assert_allclose(schedule(0), 3e-5, rtol=1e-5)  # update 1 moves
    np.testing.assert_allclose(schedule(9), 3e-4, rtol=1e-5)  # update 10
    np.testing.assert_allclose(schedule(59), (3e-4 + 1e-6) / 2, rtol=1e-4)  # half of the cosine
    np.testing.assert_allclose(schedule(109), 1e-6, rtol=1e-3)
    rates = [float(schedule(i)) for i in range(110)]
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


def test_warmup_defaults_and_refusal():
    assert optim.warmup_updates(None, 1_000_000) == 5_000
    assert optim.warmup_updates(None, 2_000) == 200
    assert optim.warmup_updates(0, 50) == 0
    with pytest.raises(ValueError, match=r"warmup_steps=30 .*total_steps=200.* at most 20"):
        optim.warmup_updates(30, 200)


def test_weight_decay_touches_kernels_alone():
    params = {
        "blocks": {
            "mlp": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
            "norm": {"scale": jnp.ones((2, 3))},
        },
        "null_text": jnp.ones(4),
    }
    options = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.5, "clip_norm": 1.0}
    optimizer = optim.make_optimizer(lambda _: 0.1, **options)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(changes["blocks"]["mlp"]["kernel"], -0.05)
    for untouched in (changes["blocks"]["mlp"]["bias"], changes["blocks"]["norm"]["scale"], changes["null_text"]):
        np.testing.assert_array_equal(untouched, 0)


def test_updates_agree_with_pytorch_adamw_and_clipping():
    rng = np.random.default_rng(0)
    start = rng.standard_normal((4, 5)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.03)
    options = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.03, "clip_norm": 1.0}
    optimizer = optim.make_optimizer(lambda _: 1e-2, **options)
    ours = {"kernel": jnp.asarray(start)}
    state = optimizer.init(ours)
    for scale in (0.1, 10.0, 1.0):  # below and above the clip
        gradient = (scale * rng.standard_normal((4, 5))).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        reference.step()
        changes, state = optimizer.update({"kernel": jnp.asarray(gradient)}, state, ours)
        ours = {"kernel": ours["kernel"] + changes["kernel"]}
        np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), atol=2e-6)


def test_ema_ramp_forgets_the_start_and_keeps_float32():
    decays = np.array([float(optim.ema_decay(jnp.float32(n), 0.9999)) for n in range(1, 101)])
    np.testing.assert_allclose(decays[0], 2 / 11, rtol=1e-6)
    assert np.prod(decays) < 1e-6 < 0.99 < 0.9999**100
    assert optim.ema_decay(jnp.float32(1e6), 0.9999) == np.float32(0.9999)
    ema = {"w": jnp.float32(1.0)}
    for _ in range(1000):
        ema = optim.update_ema(ema, {"w": jnp.float32(1.01)}, 0.9999)
    np.testing.assert_allclose(ema["w"], 1.00095, atol=1e-5)


MUON = {"name": "muon", "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.03, "clip_norm": 1.0}


def stacks():
    """Parameters with kernels inside and outside of the blocks, and gradients of them."""
    rng = np.random.default_rng(0)

    def draw():
        kernels = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 16, 48), (3, 32, 16))]
        return {
            "blocks": {
                "wide": {"kernel": kernels[0], "bias": rng.standard_normal((3, 48)).astype(np.float32)},
                "tall": {"kernel": kernels[1]},
            },
            "patch_out": {"kernel": rng.standard_normal((16, 4)).astype(np.float32)},
        }

    return draw(), [draw() for _ in range(30)]


def test_muon_agrees_with_pytorchs_on_each_layers_kernels():
    """PyTorch's takes its products in bfloat16 and corrects no bias, so the first updates differ by some percent."""
    ours, gradients = stacks()
    optimizer = optim.make_optimizer(lambda _: 1e-2, **MUON | {"clip_norm": 1e9})
    state, change = optimizer.init(ours), jax.jit(optimizer.update)
    parameters = {
        name: [torch.nn.Parameter(torch.tensor(layer)) for layer in ours["blocks"][name]["kernel"]]
        for name in ("wide", "tall")
    }
    theirs = torch.optim.Muon(
        [*parameters["wide"], *parameters["tall"]],
        lr=1e-2,
        weight_decay=0.03,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    for number, gradient in enumerate(gradients):
        before = {name: [layer.detach().clone() for layer in layers] for name, layers in parameters.items()}
        for name, layers in parameters.items():
            for layer, values in zip(layers, gradient["blocks"][name]["kernel"]):
                layer.grad = torch.tensor(values)
        theirs.step()
        changes, state = change(gradient, state, ours)
        for name, layers in parameters.items():
            moved = np.stack([(after.detach() - start).numpy() for after, start in zip(layers, before[name])])
            error = np.linalg.norm(changes["blocks"][name]["kernel"] - moved) / np.linalg.norm(moved)
            assert error < (0.15 if number < 10 else 0.05), (name, number, error)
        ours = jax.tree.map(np.add, ours, changes)


def test_muon_leaves_what_is_no_kernel_of_a_block_to_adamw():
    params, gradients = stacks()
    changes = {}
    for name in ("adamw", "muon"):
        optimizer = optim.make_optimizer(lambda _: 1e-2, **MUON | {"name": name})
        state = optimizer.init(params)
        for gradient in gradients[:3]:
            changes[name], state = optimizer.update(gradient, state, params)
    one, other = changes["adamw"], changes["muon"]
    np.testing.assert_array_equal(one["patch_out"]["kernel"], other["patch_out"]["kernel"])
    np.testing.assert_array_equal(one["blocks"]["wide"]["bias"], other["blocks"]["wide"]["bias"])
    for kernel in ("wide", "tall"):
        size = np.sqrt(np.mean(np.square(other["blocks"][kernel]["kernel"])))
        assert abs(size - 0.2e-2) < 0.1 * 0.2e-2  # 0.2 of the learning rate, as AdamW's changes have in training
        assert not np.allclose(one["blocks"][kernel]["kernel"], other["blocks"][kernel]["kernel"], rtol=0.1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_voided_update_moves_no_bit_and_no_count(name):
    params, gradients = stacks()
    optimizer = optim.make_optimizer(
        optim.learning_rate(peak=1e-2, end=0.0, warmup=2, total=9), **MUON | {"name": name}
    )
    _, state = optimizer.update(gradients[0], optimizer.init(params), params)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    changes, after = jax.jit(optimizer.update)(broken, state, params, moves=False)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(changes))
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)
    following = [optimizer.update(gradients[1], kept, params) for kept in (state, after)]
    for one, other in zip(*map(jax.tree.leaves, following), strict=True):
        np.testing.assert_array_equal(one, other)


def test_adamw_takes_its_eps():
    optimizer = optim.make_optimizer(lambda _: 0.1, b1=0.9, b2=0.95, eps=3.0, weight_decay=0.0, clip_norm=9.0)
    params = {"kernel": jnp.ones(1)}
    changes, _ = optimizer.update({"kernel": jnp.ones(1)}, optimizer.init(params), params)
    np.testing.assert_allclose(changes["kernel"], -0.1 / (1 + 3), rtol=1e-5)
