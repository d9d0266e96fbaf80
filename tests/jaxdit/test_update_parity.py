"""Fifty updates against torch.optim.AdamW, clip_grad_norm_ and an average by hand, and the schedule by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdit import model, optim

SETTINGS = {"layers": 2, "width": 16, "heads": 2, "patch": 2, "channels": 2, "text_width": 6, "vision_width": 5}
SETTINGS |= {"dtype": "float32", "remat": "none", "scan_unroll": 1, "attention": "xla"}
PEAK, END, WARMUP, TOTAL = 1e-3, 1e-5, 5, 50
EMA = 0.8  # reached at update 36: both branches of the ramp are run through
OPTIONS = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.03, "clip_norm": 1.0}


def rate_by_hand(update):
    """Learning rate of the update'th update, counted from 1."""
    if update < WARMUP:
        return PEAK * update / WARMUP
    return END + (PEAK - END) * (1 + math.cos(math.pi * (update - WARMUP) / (TOTAL - WARMUP))) / 2


def recorded_gradients(start):
    """Fifty gradients from far below eps to far above the clip; a leaf's own size differs from the others'."""
    rng = np.random.default_rng(0)
    sizes = jax.tree.map(lambda _: 10 ** rng.uniform(-3, 0), start)
    # the first decide with eps and bias correction, then a quiet run with outliers, then a dead one that comes back
    scales = [1e-9, 1e-6, 1e-3, 1e-2] + [3e-2, 1e-2, 5e3, 2e-2, 3e-1] * 8 + [1e-12, 1e-12, 1.0, 1e2, 1e-2, 1e-2]
    for scale in scales:
        yield jax.tree.map(
            lambda leaf, size, scale=scale: (scale * size * rng.standard_normal(leaf.shape)).astype(np.float32),
            start,
            sizes,
        )


def by_path(tree):
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def torch_updates(start, gradients):
    """(parameters, average, norm before the clip) after each update, in PyTorch."""
    parameters = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in by_path(start).items()}
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    kernels = [parameter for name, parameter in parameters.items() if name.endswith("['kernel']")]
    others = [parameter for name, parameter in parameters.items() if not name.endswith("['kernel']")]
    groups = [{"params": kernels, "weight_decay": OPTIONS["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=PEAK, betas=(OPTIONS["b1"], OPTIONS["b2"]), eps=OPTIONS["eps"])
    for update, gradient in enumerate(gradients, 1):
        for name, leaf in by_path(gradient).items():
            parameters[name].grad = torch.tensor(leaf)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIONS["clip_norm"])
        for group in adamw.param_groups:
            group["lr"] = rate_by_hand(update)
        adamw.step()
        decay = min(EMA, (1 + update) / (10 + update))
        for name, parameter in parameters.items():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
        yield parameters, average, float(norm)


def test_fifty_updates_agree_with_pytorch():
    start = jax.tree.map(np.asarray, jax.jit(lambda: model.initial_parameters(SETTINGS, 0))())
    gradients = list(recorded_gradients(start))
    schedule = optim.learning_rate(peak=PEAK, end=END, warmup=WARMUP, total=TOTAL)
    optimizer = optim.make_optimizer(schedule, **OPTIONS)

    @jax.jit
    def step(params, ema, state, gradient, updates):
        changes, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, changes)
        return params, optim.update_ema(ema, params, optim.ema_decay(updates, EMA)), state

    params = ema = start
    state = optimizer.init(start)
    norms = []
    for update, (gradient, (theirs, average, norm)) in enumerate(zip(gradients, torch_updates(start, gradients)), 1):
        params, ema, state = step(params, ema, state, gradient, jnp.int32(update))
        norms.append(norm)
        for ours, other in ((params, theirs), (ema, average)):
            for name, leaf in by_path(ours).items():
                want = other[name].detach().numpy()
                error = np.linalg.norm(leaf - want) / np.linalg.norm(want)
                assert error <= 1e-6, f"{name} after update {update}: {error}"
    assert update == TOTAL and 10 < sum(norm > 1 for norm in norms) < 40  # the clip was active, and was not
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), params, start)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        (1, 3e-4 / 5_000),
        (2_500, 1.5e-4),
        (5_000, 3e-4),
        (5_001, 3e-4),
        (502_500, 1.505e-4),  # half of the cosine: (3e-4 + 1e-6) / 2
        (253_750, 2.5621246e-4),  # a quarter: 1e-6 + 2.99e-4 (1 + cos 45 degrees) / 2
        (751_250, 4.4787536e-5),  # three quarters
        (1_000_000, 1e-6),
        (1_000_001, 1e-6),  # and stays
    ],
)
def test_schedule_of_the_plans_run_by_hand(update, rate):
    total = 1_000_000
    warmup = optim.warmup_updates(None, total)
    schedule = optim.learning_rate(peak=3e-4, end=1e-6, warmup=warmup, total=total)
    np.testing.assert_allclose(schedule(jnp.int32(update - 1)), rate, rtol=2e-6)


def test_schedule_of_the_test_above_by_hand():
    schedule = optim.learning_rate(peak=PEAK, end=END, warmup=WARMUP, total=TOTAL)
    rates = [float(schedule(jnp.int32(update - 1))) for update in range(1, TOTAL + 1)]
    np.testing.assert_allclose(rates, [rate_by_hand(update) for update in range(1, TOTAL + 1)], rtol=2e-6)
    np.testing.assert_allclose(rates[:6], [2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 0.99879 * 1e-3], rtol=1e-5)
