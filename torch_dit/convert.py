"""Weights between jaxdit's tree of parameters and the state_dict of `torch_dit.DiT`, leaf by leaf, both ways.

The tree is a nested dict of NumPy arrays. It differs from the state_dict in three ways and no other: a layer's `kernel` is
[inputs, outputs] and PyTorch's `weight` its transpose, a norm's `scale` is a `weight`, and the leaves under `blocks` have a
leading axis of layers where the state_dict has `blocks.0`, `blocks.1`, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Path = tuple[str, ...]


def to_state_dict(tree: Mapping[str, Any], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of `model` out of a tree of parameters, for `model.load_state_dict`.

    Args:
      tree: nested dict of arrays, as `jaxdit.model.initial_parameters` returns and a checkpoint holds.
      model: the DiT they are for; only names and shapes are looked at, so it may be on the meta device.

    Returns:
      Tensors by the names of `model.state_dict()`, copies, in the arrays' dtype (float32).

    Raises:
      ValueError: a leaf is missing, unknown or of another shape; all of them are named.
    """
    given = dict(_flatten(tree))
    targets = {name: (*_leaf(name, tensor), tensor.shape) for name, tensor in model.state_dict().items()}
    wanted: dict[Path, tuple[int, ...]] = {}
    for path, layer, shape in targets.values():
        shape = tuple(reversed(shape)) if path[-1] == "kernel" else tuple(shape)
        wanted[path] = shape if layer is None else (layer + 1, *shape)  # the last layer's number decides
    _compare({path: array.shape for path, array in given.items()}, wanted)
    state = {}
    for name, (path, layer, _) in targets.items():
        array = given[path] if layer is None else given[path][layer]
        state[name] = torch.from_numpy(np.array(array.T if path[-1] == "kernel" else array, order="C"))
    return state


def to_tree(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The tree of parameters out of a state_dict, or of gradients by the parameters' names: undoes `to_state_dict`.

    Args:
      state: float32 or float64 tensors by the names of `DiT.state_dict()`, the layers of `blocks` in their order.

    Returns:
      Nested dict of NumPy arrays, copies, in the tensors' dtype.
    """
    layers: dict[Path, list[np.ndarray]] = {}
    stacked = set()
    for name, tensor in state.items():
        path, layer = _leaf(name, tensor)
        array = tensor.detach().cpu().numpy()
        found = layers.setdefault(path, [])
        if layer is not None:
            stacked.add(path)
            if layer != len(found):
                raise ValueError(f"{name} stands where layer {len(found)} of {'/'.join(path)} is due.")
        found.append(array.T if path[-1] == "kernel" else array)
    tree: dict[str, Any] = {}
    for path, arrays in layers.items():
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = np.stack(arrays) if path in stacked else np.array(arrays[0], order="C")
    return tree


def _leaf(name: str, tensor: torch.Tensor) -> tuple[Path, int | None]:
    """Where a parameter stands in the tree, and its layer: ("blocks", "mlp_in", "kernel"), 3 for blocks.3.mlp_in.weight."""
    parts = name.split(".")
    layer = int(parts.pop(1)) if parts[0] == "blocks" else None
    if parts[-1] == "weight":
        parts[-1] = "kernel" if tensor.ndim == 2 else "scale"
    return tuple(parts), layer


def _flatten(tree: Mapping[str, Any], path: Path = ()):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), np.asarray(value)


def _compare(given: Mapping[Path, tuple[int, ...]], wanted: Mapping[Path, tuple[int, ...]]) -> None:
    problems = [f"{'/'.join(path)} is missing" for path in wanted if path not in given]
    problems += [f"{'/'.join(path)} is unknown to the model" for path in given if path not in wanted]
    problems += [
        f"{'/'.join(path)} has shape {given[path]}, the model needs {shape}"
        for path, shape in wanted.items()
        if path in given and given[path] != shape
    ]
    if problems:
        raise ValueError("These parameters are not those of this model: " + "; ".join(problems) + ".")
