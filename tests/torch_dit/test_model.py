"""The PyTorch model as a person without JAX meets it."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxdit import model, state_dict
from torch_dit import DiT

SIZES = {"layers": 3, "width": 32, "heads": 2, "patch": 2, "channels": 4, "text_width": 12, "vision_width": 6}


@pytest.fixture(scope="module")
def tree():
    _, shapes = model.abstract(
        SIZES | {"dtype": "float32", "remat": "none", "scan_unroll": 1, "attention": "xla"}
    )  # fmt: skip
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def inputs(seed=0):
    torch.manual_seed(seed)
    return {
        "x": torch.randn(3, 4, 8, 12),
        "t": torch.rand(3),
        "text": torch.randn(3, 5, 12),
        "text_length": torch.tensor([5, 1, 3]),
        "vision": torch.randn(3, 6),
    }


def test_weights_go_through_safetensors(tree, tmp_path):
    network = DiT(**SIZES)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict.to_state_dict(tree).items()})
    save_file(network.state_dict(), tmp_path / "dit.safetensors")
    other = DiT(**SIZES)
    other.load_state_dict(load_file(tmp_path / "dit.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs()), network(**inputs()), rtol=0, atol=0)


def test_a_new_model_starts_as_jaxdits_does():
    torch.manual_seed(0)
    network = DiT(**SIZES)
    with torch.no_grad():
        assert (network(**inputs()) == 0).all()
    settings = SIZES | {"dtype": "float32", "remat": "none", "scan_unroll": 1, "attention": "xla"}
    ours = jax.jit(lambda: model.initial_parameters(settings, 0))()
    theirs = state_dict.to_tree({name: value.numpy() for name, value in network.state_dict().items()})
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)):
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        if "null" in name:
            assert 0.3 < other.std() < 2, name
        elif leaf.std() == 0:
            np.testing.assert_array_equal(leaf, other, err_msg=name)
        else:  # uniform up to the same bound
            np.testing.assert_allclose(np.abs(other).max(), np.abs(leaf).max(), rtol=0.02, err_msg=name)


def test_padding_has_exactly_no_influence_and_dropping_is_by_sample(tree):
    network = DiT(**SIZES)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict.to_state_dict(tree).items()})
    given = inputs()
    poisoned = given | {"text": given["text"].clone()}
    for row, length in zip(poisoned["text"], given["text_length"]):
        row[length:] = 1e4
    other = given | {"text": given["text"] + 1, "vision": given["vision"] - 1}
    nobody, first = torch.tensor([False] * 3), torch.tensor([True, False, False])
    with torch.no_grad():
        plain = network(**given)
        torch.testing.assert_close(network(**poisoned), plain, rtol=0, atol=0)
        torch.testing.assert_close(network(**given, drop_text=nobody, drop_vision=nobody), plain, rtol=0, atol=0)
        dropped = [network(**which, drop_text=first, drop_vision=first) for which in (given, other)]
    torch.testing.assert_close(dropped[0][0], dropped[1][0], rtol=0, atol=0)
    assert (dropped[0][0] - plain[0]).abs().max() > 1e-3 < (dropped[0][1:] - dropped[1][1:]).abs().max()


def test_bfloat16_by_autocast_follows_float32(tree):
    network = DiT(**SIZES)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict.to_state_dict(tree).items()})
    with torch.no_grad():
        want = network(**inputs())
        with torch.autocast("cpu", torch.bfloat16):
            got = network(**inputs())
        whole = network.bfloat16()(**{
            name: value.bfloat16() if value.is_floating_point() and name != "t" else value
            for name, value in inputs().items()
        })  # fmt: skip
    assert got.dtype == torch.float32 and whole.dtype == torch.bfloat16
    for half in (got, whole):
        assert (half - want).norm() / want.norm() < 3e-2


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width=30 does not divide into heads=4"):
        DiT(**SIZES | {"width": 30, "heads": 4})
