"""A trained model out of a working folder: its weights, its data set's description, and pictures drawn from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from encode.records import InputError
from jaxdit import checkpoint, data, mesh, model, sampler

DESCRIPTIONS = ("config.json", "dataset.json")


@dataclass(frozen=True)
class Trained:
    """A model out of a working folder, ready to be sampled; config and dataset are the folder's JSON."""

    config: Mapping[str, Any]
    dataset: Mapping[str, Any]
    graph: Any
    params: Any
    step: int


def load(workdir: str | Path, *, step: int | None = None, raw: bool = False) -> Trained:
    """The weights of a working folder: the EMA (or the raw parameters) of the newest step (or of `step`).

    Raises:
      InputError: not a working folder, nothing saved yet, or no such step.
    """
    workdir = Path(workdir)
    for name in DESCRIPTIONS:
        if not (workdir / name).exists():
            raise InputError(
                f"{workdir}: {name} is missing, so this is not a working folder; train with --workdir first."
            )
    try:
        config, dataset = (json.loads((workdir / name).read_text(encoding="utf-8")) for name in DESCRIPTIONS)
    except ValueError as error:
        raise InputError(f"{workdir}: config.json or dataset.json cannot be read as JSON ({error}).") from error
    graph, shapes = model.abstract(model_settings(config["model"], dataset["widths"]))
    step, params = checkpoint.restore_weights(workdir, shapes, step=step, raw=raw)
    return Trained(config, dataset, graph, params, step)


def generate(
    trained: Trained,
    conditions: Mapping[str, np.ndarray],
    latent_shape: Sequence[int],
    positions: Sequence[int],
    *,
    seed: int,
    steps: int,
    shift: float,
    text: float,
    vision: float,
) -> np.ndarray:
    """Sample latents.

    Args:
      trained: the model.
      conditions: text [batch, tokens, width], text_length [batch], vision [batch, width] (scaled as in training), and
        drop_text, drop_vision [batch] where a sample has no such condition.
      latent_shape: [height, width, channels].
      positions: [batch] numbers that, with the seed, decide each picture's noise.
      seed, steps, shift, text, vision: as in `sampler`.

    Returns:
      [batch, height, width, channels] float32 raw latents, for the image decoder.
    """
    latents = _sample(
        trained.params,
        jax.tree.map(np.asarray, dict(conditions)),
        np.asarray(positions, np.int32),
        graph=trained.graph,
        shape=tuple(latent_shape),
        seed=seed,
        steps=steps,
        shift=shift,
        text=text,
        vision=vision,
    )
    return data.denormalize(np.asarray(latents), trained.dataset)


@partial(jax.jit, static_argnames=("graph", "shape", "seed", "steps", "shift", "text", "vision"))
def _sample(params, conditions, positions, *, graph, shape, seed, **options):
    noise = sampler.initial_noise(seed, positions, shape)
    return sampler.sample(nnx.merge(graph, params), noise, conditions, **options)


def conditions_of(texts: Sequence[np.ndarray | None], visions: Sequence[np.ndarray | None], trained: Trained) -> dict:
    """Conditions of a batch from token sequences [tokens, width] and raw vision vectors [width]; None: no such condition."""
    widths = trained.dataset["widths"]
    whole = [np.zeros((1, widths["text"]), np.float32) if text is None else text.astype(np.float32) for text in texts]
    lengths = np.array([len(text) for text in whole], np.int32)
    padded = -(-max(lengths.max(), trained.dataset["text_longest"]) // data.TEXT_MULTIPLE) * data.TEXT_MULTIPLE
    raw = np.stack([np.zeros(widths["vision"], np.float32) if vision is None else vision for vision in visions])
    return {
        "text": data.pad_text(whole, int(padded)),
        "text_length": lengths,
        "vision": data.scale_vision(raw, trained.config["data"]["normalize_vision"]),
        "drop_text": np.array([text is None for text in texts]),
        "drop_vision": np.array([vision is None for vision in visions]),
    }


def model_settings(options: Any, widths: Mapping[str, int]) -> dict[str, Any]:
    """What model.DiT takes, from a configuration's "model" section and a data set's widths."""
    dtype = mesh.compute_dtype(options["dtype"])
    return {
        **{name: options[name] for name in ("layers", "width", "heads", "patch", "remat", "scan_unroll")},
        "dtype": dtype,
        "attention": mesh.attention_implementation(options["width"] // options["heads"], dtype),
        "channels": widths["latent"],
        "text_width": widths["text"],
        "vision_width": widths["vision"],
    }
