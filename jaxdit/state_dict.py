"""The parameters under the names that `torch_dit.DiT` has for them, and back: NumPy arrays both ways.

The tree is a nested dict of arrays. It differs from PyTorch's state_dict in three ways and no other: a layer's `kernel` is
[inputs, outputs] and PyTorch's `weight` its transpose, a norm's `scale` is a `weight`, and the leaves under `blocks` have a
leading axis of layers where the state_dict has `blocks.0`, `blocks.1`, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]


def to_state_dict(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A tree of parameters, as `jaxdit.model.initial_parameters` returns and a checkpoint holds, as a state_dict.

    Args:
      tree: nested dict of arrays.

    Returns:
      Arrays by the names of `DiT.state_dict()`, contiguous copies, in the arrays' dtype (float32).
    """
    state = {}
    for path, array in _flatten(tree):
        leaf = "weight" if path[-1] in ("kernel", "scale") else path[-1]
        named = {(*path[:-1], leaf): np.asarray(array)}
        if path[0] == "blocks":
            named = {("blocks", str(k), *path[1:-1], leaf): layer for k, layer in enumerate(np.asarray(array))}
        for name, one in named.items():
            state[".".join(name)] = np.array(one.T if path[-1] == "kernel" else one, order="C")
    return state


def to_tree(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The tree of parameters out of a state_dict, or of gradients by the parameters' names: undoes `to_state_dict`.

    Args:
      state: arrays by the names of `DiT.state_dict()`, in any order.

    Returns:
      Nested dict of arrays, copies, in the given dtype.

    Raises:
      ValueError: a layer is missing from `blocks`, or the layers of one array differ in shape.
    """
    whole: dict[Path, np.ndarray] = {}
    layers: dict[Path, dict[int, np.ndarray]] = {}
    for name, array in state.items():
        path, layer = _place(name, array)
        array = np.array(array.T if path[-1] == "kernel" else array, order="C")
        if layer is None:
            whole[path] = array
        else:
            layers.setdefault(path, {})[layer] = array
    count = max((len(found) for found in layers.values()), default=0)
    for path, found in layers.items():
        if missing := set(range(count)) - found.keys():
            raise ValueError(f"layer {min(missing)} of {'/'.join(path)} is missing")
        if len(shapes := {array.shape for array in found.values()}) > 1:
            raise ValueError(f"the layers of {'/'.join(path)} have the shapes {sorted(shapes)}")
        whole[path] = np.stack([found[k] for k in range(count)])
    tree: dict[str, Any] = {}
    for path, array in whole.items():
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = array
    return tree


def check(tree: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Refuse a tree that is not of the model whose tree of shapes (`jaxdit.model.abstract`) is given.

    Raises:
      ValueError: a leaf is missing, unknown, or of another shape or dtype; all of them are named.
    """
    given, wanted = dict(_flatten(tree)), dict(_flatten(shapes))
    problems = [f"{'/'.join(path)} is missing" for path in wanted if path not in given]
    problems += [f"{'/'.join(path)} is unknown to the model" for path in given if path not in wanted]
    for path in wanted.keys() & given.keys():
        ours, theirs = wanted[path], given[path]
        if tuple(theirs.shape) != tuple(ours.shape) or theirs.dtype != ours.dtype:
            problems.append(
                f"{'/'.join(path)} has shape {list(theirs.shape)} ({theirs.dtype}), the model needs {list(ours.shape)} "
                f"({np.dtype(ours.dtype)})"
            )
    if problems:
        raise ValueError("; ".join(sorted(problems)))


def _place(name: str, array: np.ndarray) -> tuple[Path, int | None]:
    """Where a parameter stands in the tree, and its layer: ("blocks", "mlp_in", "kernel"), 3 for blocks.3.mlp_in.weight."""
    numbered = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    parts = (f"blocks.{numbered[2]}" if numbered else name).split(".")
    if parts[-1] == "weight":
        parts[-1] = "kernel" if array.ndim == 2 else "scale"
    return tuple(parts), int(numbered[1]) if numbered else None


def _flatten(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value
