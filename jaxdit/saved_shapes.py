"""Whether a saved step is of this model: Orbax restores another depth without a word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from encode.records import InputError
from jaxdit.orbax_log import first_line


def check(folder: Path, target: Any, *, whole: bool = True) -> None:
    """Refuse a checkpoint whose arrays differ from `target`'s.

    Args:
      folder: of one item of one step.
      target: tree of arrays or shapes.
      whole: the folder is to hold nothing else; False: only the first names of target's paths are looked at.

    Raises:
      InputError: names the first differing array and both shapes.
    """
    try:
        saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    except Exception as error:
        logging.warning("%s: its description cannot be read (%s).", folder, first_line(error))
        return
    saved = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    wanted = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
    parts = {name[0] for name in wanted}
    for name in sorted(saved.keys() - wanted.keys()):
        if whole or name[0] in parts:
            raise InputError(
                f"{folder}: the array {'.'.join(name)} is one too many; this checkpoint is of another model."
            )
    for name, leaf in wanted.items():
        if name not in saved:
            raise InputError(f"{folder}: the array {'.'.join(name)} is missing; this checkpoint is of another model.")
        if tuple(saved[name].shape) != tuple(leaf.shape) or np.dtype(saved[name].dtype) != np.dtype(leaf.dtype):
            raise InputError(
                f"{folder}: {'.'.join(name)} has shape {list(saved[name].shape)} ({saved[name].dtype}), the configuration "
                f"asks for {list(leaf.shape)} ({np.dtype(leaf.dtype)}); use the configuration that the run began with."
            )


def _names(path) -> tuple[str, ...]:
    """A tree path as plain names, alike for dicts, tuples and named tuples."""
    return tuple(str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path)
