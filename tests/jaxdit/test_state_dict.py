"""Parameters under PyTorch's names and back, held against the state_dict of torch_dit's model itself."""

import jax
import numpy as np
import pytest

from jaxdit import model, state_dict
from torch_dit import DiT

SIZES = {"layers": 12, "width": 32, "heads": 2, "patch": 2, "channels": 4, "text_width": 12, "vision_width": 6}
RUN = {"dtype": "float32", "remat": "none", "scan_unroll": 1, "attention": "xla"}


@pytest.fixture(scope="module")
def shapes():
    return model.abstract(SIZES | RUN)[1]


@pytest.fixture(scope="module")
def tree(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def test_names_and_shapes_are_those_of_the_torch_model_and_the_way_back_is_bit_identical(tree, shapes):
    state = state_dict.to_state_dict(tree)
    assert {name: array.shape for name, array in state.items()} == {
        name: tuple(value.shape) for name, value in DiT(**SIZES).state_dict().items()
    }
    assert all(array.flags.c_contiguous for array in state.values())
    np.testing.assert_array_equal(state["blocks.2.mlp_in.weight"], tree["blocks"]["mlp_in"]["kernel"][2].T)
    back = state_dict.to_tree(dict(sorted(state.items())))  # as a file may order them: blocks.10 before blocks.2
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    state_dict.check(back, shapes)


def test_converted_weights_share_no_memory_with_what_they_come_from(tree):
    before = tree["null_text"].copy()
    state = state_dict.to_state_dict(tree)
    state["null_text"][:] = 0
    state_dict.to_tree(state)["null_vision"][:] = 0
    np.testing.assert_array_equal(tree["null_text"], before)
    assert np.abs(state["null_vision"]).min() > 0


def without(tree, *path):
    copy = dict(tree)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(copy[path[0]], *path[1:])
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: without(tree, "blocks", "mlp_in", "bias"), "blocks/mlp_in/bias is missing"),
        (lambda tree: without(tree, "text_norm"), "text_norm/scale is missing"),
        (lambda tree: tree | {"time_mid": {"kernel": np.zeros((2, 2))}}, "time_mid/kernel is unknown to the model"),
        (
            lambda tree: tree | {"patch_in": tree["patch_in"] | {"kernel": tree["patch_in"]["kernel"].T}},
            r"patch_in/kernel has shape \[32, 16\] \(float32\), the model needs \[16, 32\] \(float32\)",
        ),
        (
            lambda tree: tree | {"blocks": jax.tree.map(lambda leaf: leaf[:2], tree["blocks"])},
            r"blocks/cross_norm/scale has shape \[2, 32\] \(float32\), the model needs \[12, 32\]",
        ),
        (lambda tree: tree | {"null_text": np.zeros(12)}, r"null_text has shape \[12\] \(float64\)"),
    ],
)
def test_a_tree_of_another_model_is_refused_by_the_leafs_name(tree, shapes, change, words):
    with pytest.raises(ValueError, match=words):
        state_dict.check(change(tree), shapes)


def test_a_layer_that_is_missing_or_of_another_shape_is_named(tree):
    state = state_dict.to_state_dict(tree)
    with pytest.raises(ValueError, match="layer 1 of blocks/mlp_in/bias is missing"):
        state_dict.to_tree({name: array for name, array in state.items() if name != "blocks.1.mlp_in.bias"})
    with pytest.raises(ValueError, match=r"the layers of blocks/mlp_in/bias have the shapes \[\(3,\), \(128,\)\]"):
        state_dict.to_tree(state | {"blocks.1.mlp_in.bias": np.zeros(3, np.float32)})
