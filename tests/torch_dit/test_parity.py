"""jaxdit's model against torch_dit, which was written apart from it: outputs, losses and the gradient of every leaf."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxdit import flow, model, state_dict
from torch_dit import DiT

SIZES = {"layers": 2, "width": 32, "heads": 2, "patch": 2, "channels": 4, "text_width": 12, "vision_width": 6}
RUN = {"remat": "none", "scan_unroll": 1, "attention": "xla"}
# Relative to the largest number of an array; measured 5e-6 and 4e-14. The angles of the time embedding reach 1,000
# radians, where float32 leaves 3e-5 of them to rounding: the first layer over them is given more (measured 2e-5).
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}
MORE = {"['time_in']['kernel']": 5}


def random_parameters(dtype, seed=0):
    """Parameters of a trained model's kind: nothing is zero, so that every leaf matters."""
    _, shapes = model.abstract(SIZES | RUN | {"dtype": "float32"})
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        scale = np.sqrt(1 / leaf.shape[-2]) if path[-1].key == "kernel" else 0.3
        return ((path[-1].key == "scale") + scale * rng.standard_normal(leaf.shape)).astype(np.float32).astype(dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def make_batch(dtype, seed=1):
    """Six samples that are not square, of unequal texts, with padding, each in its way without conditions."""
    rng = np.random.default_rng(seed)
    batch, height, width, tokens = 6, 8, 12, 7
    mask = np.ones((batch, height, width), bool)
    mask[1, :, 9:] = mask[4, 5:] = False
    return {
        "x0": rng.standard_normal((batch, height, width, SIZES["channels"])).astype(dtype),
        "noise": rng.standard_normal((batch, height, width, SIZES["channels"])).astype(dtype),
        "t": np.array([0.0, 0.03, 0.4, 0.7, 0.95, 1.0], dtype),
        "text": rng.standard_normal((batch, tokens, SIZES["text_width"])).astype(dtype),
        "text_length": np.array([7, 1, 4, 6, 3, 2], np.int32),
        "vision": rng.standard_normal((batch, SIZES["vision_width"])).astype(dtype),
        "drop_text": np.array([False, False, True, False, True, False]),
        "drop_vision": np.array([False, False, False, True, True, False]),
        "mask": mask,
    }


def jax_loss(graph, batch):
    """Function of the parameters: (mean loss, velocity). float64 skips flow.mean_square, which sums in float32."""

    def loss(params):
        x = flow.interpolate(batch["x0"], batch["noise"], batch["t"])
        v = nnx.merge(graph, params)(x, batch["t"], batch, batch["drop_text"], batch["drop_vision"])
        target = flow.velocity_target(batch["x0"], batch["noise"])
        if v.dtype == jnp.float32:
            return flow.mean_square(v - target, batch["mask"]).mean(), v
        error = jnp.square(v - target).mean(-1) * batch["mask"]
        return (error.sum((1, 2)) / batch["mask"].sum((1, 2))).mean(), v

    return loss


@cache
def compiled(dtype):
    """Function of the parameters: ((loss, velocity), gradients) of jaxdit for `make_batch`, in NumPy."""
    graph, _ = model.abstract(SIZES | RUN | {"dtype": dtype})
    run = jax.jit(jax.value_and_grad(jax_loss(graph, make_batch(dtype)), has_aux=True))

    def call(params):
        with jax.enable_x64(dtype == "float64"):
            return jax.device_get(run(params))

    return call


def run_jax(dtype, params):
    (loss, v), gradients = compiled(dtype)(params)
    return SimpleNamespace(loss=loss, v=v, gradients=gradients)


def run_torch(dtype, params, batch):
    network = DiT(**SIZES).to(getattr(torch, dtype))
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict.to_state_dict(params).items()})
    b = {name: torch.from_numpy(value) for name, value in batch.items()}
    x0, noise = (b[name].permute(0, 3, 1, 2) for name in ("x0", "noise"))
    t = b["t"][:, None, None, None]
    x = (1 - t) * x0 + t * noise
    v = network(x, b["t"], b["text"], b["text_length"], b["vision"], b["drop_text"], b["drop_vision"])
    losses = [((v - noise + x0)[i] ** 2)[:, b["mask"][i]].mean() for i in range(len(x))]
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = state_dict.to_tree({name: value.grad.numpy() for name, value in network.named_parameters()})
    return SimpleNamespace(loss=loss.item(), v=v.detach().permute(0, 2, 3, 1).numpy(), gradients=gradients)


@cache
def both(dtype):
    params = random_parameters(dtype)
    return run_jax(dtype, params), run_torch(dtype, params, make_batch(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_velocity_and_loss_agree(dtype):
    ours, theirs = both(dtype)
    assert ours.v.dtype == theirs.v.dtype == dtype
    np.testing.assert_allclose(ours.v, theirs.v, rtol=0, atol=TOLERANCE[dtype] * np.abs(theirs.v).max())
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_agree_leaf_by_leaf(dtype):
    ours, theirs = both(dtype)
    assert jax.tree.structure(ours.gradients) == jax.tree.structure(theirs.gradients)
    leaves = jax.tree_util.tree_leaves_with_path(ours.gradients)
    for (path, gradient), other in zip(leaves, jax.tree.leaves(theirs.gradients)):
        name, largest = jax.tree_util.keystr(path), np.abs(other).max()
        assert largest > 0, f"no gradient reaches {name}"
        allowed = TOLERANCE[dtype] * MORE.get(name, 1) * largest
        np.testing.assert_allclose(gradient, other, rtol=0, atol=allowed, err_msg=name)


def test_gradients_are_those_of_finite_differences():
    params, run = random_parameters("float64"), compiled("float64")
    ours, _ = both("float64")
    rng = np.random.default_rng(2)
    leaves, structure = jax.tree.flatten(params)
    step = 1e-5
    for i, (path, gradient) in enumerate(jax.tree_util.tree_leaves_with_path(ours.gradients)):
        direction = rng.standard_normal(gradient.shape)
        direction *= step / np.linalg.norm(direction)
        ahead, behind = (
            run(structure.unflatten([*leaves[:i], leaves[i] + sign * direction, *leaves[i + 1 :]]))[0][0]
            for sign in (1, -1)
        )
        error = (ahead - behind) / 2 - (gradient * direction).sum()
        assert abs(error) < 1e-6 * step * np.linalg.norm(gradient), jax.tree_util.keystr(path)


def test_loss_of_a_new_model_is_two_for_latents_of_unit_variance():
    settings = SIZES | RUN | {"dtype": "float32"}
    graph, _ = model.abstract(settings)
    params = jax.jit(lambda: model.initial_parameters(settings, 0))()
    rng = np.random.default_rng(3)
    batch = {
        "latent": rng.standard_normal((256, 8, 8, 4)).astype(np.float32),
        "text": rng.standard_normal((256, 3, 12)).astype(np.float32),
        "text_length": np.full(256, 3, np.int32),
        "vision": rng.standard_normal((256, 6)).astype(np.float32),
    }
    options = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}
    losses = jax.jit(
        lambda params, batch: flow.losses(nnx.merge(graph, params), batch, flow.sample_keys(0, 0, 0, 256), **options)
    )(params, batch)
    assert abs(float(losses["loss"].mean()) - 2) < 0.05
