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
