"""A trained model out of a working folder: its weights, its data set's description, and pictures drawn from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from encode.records import InputError
from jaxdit import checkpoint, data, flow, mesh, model, sampler

# What a working folder says of its model, and the parts of it that sampling reads.
DESCRIPTIONS = {
    "config.json": ("data", "model", "sample"),
    "dataset.json": ("buckets", "encoders", "fingerprint", "latent_mean", "latent_std", "text_longest", "widths"),
}

NUMBER = (int, float)
# What of config.json is read of a model, and how it is written there.
KINDS = {
    "model": {
        **dict.fromkeys(("layers", "width", "heads", "patch", "scan_unroll"), int),
        **dict.fromkeys(("dtype", "remat"), str),
    },
    "sample": {"steps": int, **dict.fromkeys(("text_guidance", "vision_guidance", "shift"), NUMBER)},
}


@dataclass(frozen=True)
class Trained:
    """A model out of a working folder, ready to be sampled; config and dataset are the folder's JSON.

    Where `devices` (a mesh) is given, params lie on all of them and batches are divided.
    """

    config: Mapping[str, Any]
    dataset: Mapping[str, Any]
    graph: Any
    params: Any
    step: int
    devices: Any = None


def describe(workdir: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, dataset): the two JSON files of a working folder.

    Raises:
      InputError: not a working folder, or a file of it is damaged.
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
    for found, (name, parts) in zip((config, dataset), DESCRIPTIONS.items()):
        if missing := [part for part in parts if part not in found]:
            raise InputError(f"{workdir / name}: {missing[0]!r} is missing, so no training run wrote it like this.")
    for section, kinds in KINDS.items():
        for name, kind in kinds.items():
            value = config[section].get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(
                    f"{workdir / 'config.json'}: {section}.{name} is {json.dumps(value)}, where a training run writes a "
                    f"{'word' if kind is str else 'whole number' if kind is int else 'number'}; put back what the run "
                    "began with."
                )
    return config, dataset


def load(workdir: str | Path, *, step: int | None = None, raw: bool = False) -> Trained:
    """The weights of a working folder: the EMA (or the raw parameters) of the newest step (or of `step`).

    Raises:
      InputError: not a working folder, nothing saved yet, or no such step.
    """
    config, dataset = describe(workdir)
    graph, shapes = model.abstract(model_settings(config["model"], dataset["widths"]))
    step, params = checkpoint.restore_weights(workdir, shapes, step=step, raw=raw)
    devices = mesh.make_mesh() if jax.device_count() > 1 else None
    if devices is not None:
        params = jax.device_put(params, mesh.replicated(devices))
    return Trained(config, dataset, graph, params, step, devices)


def generate(
    trained: Trained,
    conditions: Mapping[str, np.ndarray],
    latent_shape: Sequence[int],
    positions: Sequence[int],
    *,
    seed: int | Sequence[int],
    steps: int,
    shift: float,
    text: float | Sequence[float],
    vision: float | Sequence[float],
    solver: str = "euler",
    interval: tuple[float, float] | None = None,
    init: np.ndarray | None = None,
    strength: float = 1.0,
    together: bool = True,
    watch: Callable[[int, int, Callable[[], np.ndarray]], None] | None = None,
) -> np.ndarray:
    """Sample latents; one program a shape, batch size, number of evaluations and set of guidance terms.

    Args:
      trained: the model.
      conditions: text [batch, tokens, width], text_length [batch], vision [batch, width] (scaled as in training), and
        drop_text, drop_vision [batch] where a sample has no such condition.
      latent_shape: [height, width, channels].
      positions: [batch] numbers that, with the seed, decide each picture's noise.
      seed: one for all, or [batch].
      steps, shift, solver: of the path, see `sampler.time_grid` and `sampler.solver_table`.
      text, vision: guidance weights, for all or [batch].
      interval: (low, high) in t where guidance acts; None: everywhere.
      init: [batch, height, width, channels] raw latents of pictures to start from, mixed with noise at t = strength.
      strength: in (0, 1]; without init it is 1.
      together: False evaluates guidance's conditions one after the other, for want of memory.
      watch: called after each evaluation with how many are done, how many there are, and a function that gives what the
        pictures seem to become, as raw latents. What it raises ends the drawing.

    Returns:
      [batch, height, width, channels] float32 raw latents, for the image decoder.
    """
    count = len(positions)
    weights = np.broadcast_to(sampler.guidance_weights(text, vision), (3, count))
    rows = {
        "conditions": jax.tree.map(np.asarray, dict(conditions)),
        "positions": np.asarray(positions, np.int32),
        "seeds": np.broadcast_to((np.asarray(seed, np.int64) & 0xFFFFFFFF).astype(np.uint32), (count,)),
        "weights": weights.T,
    }
    if init is not None:
        rows["init"] = data.normalized(init, trained.dataset)
    if trained.devices is not None:
        more = -count % trained.devices.size
        rows = jax.tree.map(lambda value: np.concatenate([value, np.repeat(value[:1], more, axis=0)]), rows)
        rows = jax.device_put(rows, mesh.over_batch(trained.devices))
    table = sampler.solver_table(solver, sampler.time_grid(steps, shift, strength if init is not None else 1.0))
    interval = None if interval is None else np.asarray(interval, np.float32)
    fixed = {"graph": trained.graph, "terms": sampler.needed_terms(weights), "together": together}

    def raw(latents):
        return data.denormalize(np.asarray(latents)[:count], trained.dataset)

    if watch is None:
        return raw(
            _sample(trained.params, rows, table, np.float32(strength), interval, shape=tuple(latent_shape), **fixed)
        )
    carry = _begin(rows, np.float32(strength), shape=tuple(latent_shape))
    for done in range(1, len(table) + 1):  # a row a call: one program, however many steps
        carry = jax.block_until_ready(_advance(trained.params, carry, rows, table[done - 1 : done], interval, **fixed))
        left = table[done, 0] if done < len(table) else 0.0
        watch(done, len(table), lambda carry=carry, left=left: raw(carry[1] - left * carry[2]))
    return raw(carry[1])


@partial(jax.jit, static_argnames=("graph", "shape", "terms", "together"))
def _sample(params, rows, table, strength, interval, *, graph, shape, terms, together):
    carry = _begin(rows, strength, shape=shape)
    return _advance(params, carry, rows, table, interval, graph=graph, terms=terms, together=together)[1]


@partial(jax.jit, static_argnames=("shape",))
def _begin(rows, strength, *, shape):
    x = sampler.initial_noise(rows["seeds"], rows["positions"], shape)
    if "init" in rows:
        x = flow.interpolate(rows["init"], x, jnp.broadcast_to(strength, x.shape[:1]))
    return sampler.start(x)


@partial(jax.jit, static_argnames=("graph", "terms", "together"))
def _advance(params, carry, rows, table, interval, *, graph, terms, together):
    return sampler.advance(
        nnx.merge(graph, params),
        carry,
        rows["conditions"],
        table=table,
        terms=terms,
        weights=rows["weights"].T,
        interval=interval,
        together=together,
    )


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


def model_settings(options: Any, widths: Mapping[str, int], fsdp: int = 1) -> dict[str, Any]:
    """What model.DiT takes, from a configuration's "model" section, a data set's widths and how many devices hold one model."""
    dtype = mesh.compute_dtype(options["dtype"])
    return {
        **{name: options[name] for name in ("layers", "width", "heads", "patch")},
        **unrolled(options, on_card=jax.default_backend() == "gpu", fsdp=fsdp),
        "dtype": dtype,
        "attention": mesh.attention_implementation(options["width"] // options["heads"], dtype),
        "channels": widths["latent"],
        "text_width": widths["text"],
        "vision_width": widths["vision"],
    }


def unrolled(options: Any, *, on_card: bool, fsdp: int = 1) -> dict[str, Any]:
    """scan_unroll, layers a turn of the scan, remat and fused, from a configuration's "model" section.

    Where scan_unroll is 0 one turn is all of them on a GPU, else one. On the CPU XLA keeps whatever the backward pass needs
    unless a loop parts the passes. So remat=block has the loop there whatever scan_unroll says, and remat=none is off where one
    turn is all: nano at 256 takes 4 to 12% less time like that, at 512 as long as with the loop, in 2.4 times its memory.
    Where one model is cut over fsdp devices a turn gathers one layer's parameters, never all.
    """
    if fsdp > 1:
        return {"scan_unroll": 1, "remat": options["remat"], "fused": False}
    remat, layers = options["remat"], options["scan_unroll"] or (options["layers"] if on_card else 1)
    if not on_card and layers == options["layers"] > 1:
        layers, remat = (layers, "off") if remat == "none" else (1, remat)
    fused = on_card and layers == options["layers"] > 1 and bool(options.get("fused", False))
    return {"scan_unroll": layers, "remat": remat, "fused": fused}


def separate(settings: Mapping[str, Any]) -> bool:
    """Whether training takes the layers apart (`model.separated`): where one turn of the scan would be all of them."""
    return settings["scan_unroll"] == settings["layers"] > 1
