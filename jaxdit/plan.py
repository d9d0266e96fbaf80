"""python -m jaxdit.plan --config=configs/full.py:1024 --memory_gb=24 [--device="RTX 4090"] [--cards=1] [--watts=450] [--measure]

Will it fit, and how long will it take? Everything is arithmetic for a card that need not be there, and called an estimate;
with --measure twenty real updates a bucket run on the device at hand instead. No data set is needed: where config.data.path
names one, its buckets, widths and counts are used.
"""

from __future__ import annotations

import os

# Read when JAX starts: XLA would take 75% of a card and waste 6 GB of 24.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

import difflib
import importlib.util
import math
import re
from dataclasses import replace
from typing import Any

import jax
from absl import flags

from encode import commandline, records
from encode.records import InputError
from jaxdit import data, estimate, forecast, measure, mesh, optim, startup, workdir
from jaxdit.forecast import Device, Stage
from jaxdit.measure import Bucket

IMAGES = 100_000  # the collection that the plan is made for; a third in each of three shapes
SHAPES = ((1024, 1024), (832, 1216), (1216, 832))
TEXT_TOKENS = 128  # a caption of three sentences, rounded up to 64
WIDTHS = {"latent": 16, "text": 1024, "vision": 1024}  # Flux's VAE, T5-Large, DINOv3 ViT-L
CARD = "NVIDIA GeForce RTX 4090"
POOL = 0.9  # of the card's memory is XLA's
WATTS = 450.0  # a 4090's limit


def read_stages(config: Any, name: str, resolution: int | None) -> list[Stage]:
    """The runs of a configuration file in order of resolution; the one that was asked for carries its overrides.

    Args:
      config: as given, overrides included; its model is that of every stage.
      name: FILE or FILE:ARG.
      resolution: of the pictures; None: the data set's, else what ARG says, else the file's largest stage, else 512.

    Raises:
      DatasetError: config.data.path names no finished data set.
    """
    file, _, argument = name.partition(":")
    stages = sorted(filter(str.isdigit, getattr(_module(file), "STAGES", {})), key=int)
    if config.data.path:
        given = _from_data(config, name)
        if resolution not in (None, given.resolution):
            raise InputError(
                f"--resolution={resolution}: {config.data.path} is a data set of {given.resolution}; leave one of them out."
            )
    else:
        assumed = int(argument) if argument.isdigit() else int(stages[-1]) if stages else 512
        given = _assumed(config, name, resolution or assumed)
    found = [given]
    for stage in stages if argument in stages else ():
        if stage != argument:
            other = _module(file).get_config(stage)
            other.model, other.optim.name = config.model, config.optim.name
            found.append(_scaled(given, other, f"{file}:{stage}", int(stage)))
    return sorted(found, key=lambda stage: stage.resolution)


def _module(file: str):
    spec = importlib.util.spec_from_file_location("planned", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_data(config: Any, name: str) -> Stage:
    path = commandline.path_of(config.data.path)
    dataset = data.Dataset(path, holdout_fraction=config.data.holdout_fraction, text_lengths=config.data.text_lengths)
    buckets = [
        Bucket(bucket, len(rows), tuple(dataset.info["buckets"][bucket]["latent"]), max(dataset.text_lengths))
        for bucket, rows in dataset.train.items()
        if len(rows)
    ]
    return Stage(name, config, dataset.info["resolution"], buckets, dataset.info["widths"], str(path))


def _assumed(config: Any, name: str, resolution: int) -> Stage:
    third, rest = divmod(IMAGES, len(SHAPES))
    text = max(TEXT_TOKENS, *config.data.text_lengths, 0)
    buckets = []
    for number, (width, height) in enumerate(SHAPES):
        latent = (height // 8, width // 8, WIDTHS["latent"])
        buckets.append(Bucket(records.bucket_name(width, height), third + (number < rest), latent, text))
    largest = Stage(name, config, SHAPES[0][0], buckets, WIDTHS, "assumed, as config.data.path is empty")
    return _scaled(largest, config, name, resolution)


def _scaled(stage: Stage, config: Any, name: str, resolution: int) -> Stage:
    """The same pictures at another resolution: a bucket is one shape at all of them."""
    unit = 2  # of a latent's side: bucket sides are multiples of 16 pixels at every resolution
    scale = resolution / stage.resolution
    buckets = []
    for bucket in stage.buckets:
        height, width = (max(unit, round(side * scale / unit) * unit) for side in bucket.latent[:2])
        buckets.append(
            replace(bucket, name=records.bucket_name(8 * width, 8 * height), latent=(height, width, bucket.latent[2]))
        )
    return replace(stage, config=config, name=name, resolution=resolution, buckets=buckets)


def look_at(kind: str, memory_gb: float | None, config: Any, at_hand: bool, count: int = 1) -> Device:
    """The device that is planned for.

    Args:
      kind: JAX's name of a device, not looked at where the one at hand is measured.
      memory_gb: of the card, of which XLA takes nine tenths; None: what a card of that name or the device at hand has, else 24.
      count: how many, where they are not at hand.

    Raises:
      InputError: the configuration's mesh does not make up so many.
    """
    memory = POOL * 1e9 * (memory_gb or estimate.card_gb(kind) or 24)
    if at_hand:
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        memory = POOL * 1e9 * memory_gb if memory_gb else startup.device_memory()
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = mesh.compute_dtype(dtype) if at_hand else "bfloat16"
    _, fsdp = mesh.sizes(config.mesh.data, config.mesh.fsdp, count)
    return Device(kind, memory, estimate.peak_flops(kind, dtype, count), count, fsdp, at_hand)


def define_flags() -> None:
    flags.DEFINE_float(
        "memory_gb", None, "Memory of a card, GB; by default what --device has, with --measure what there is."
    )
    flags.DEFINE_string("device", None, f"The card, as JAX names it; by default {CARD}.")
    flags.DEFINE_integer("cards", None, "How many of them; the configuration's micro-batch is all of theirs together.")
    flags.DEFINE_float(
        "watts", None, "What one draws; by default what --device does, or the configuration's metrics.watts."
    )
    flags.DEFINE_integer("resolution", None, "Of the pictures, where no data set says so.")
    flags.DEFINE_bool("measure", False, "Run twenty real updates a bucket on the device at hand.")


def plan(
    config: Any,
    name: str,
    *,
    memory_gb: float | None = None,
    device: str | None = None,
    cards: int | None = None,
    watts: float | None = None,
    resolution: int | None = None,
    real: bool = False,
) -> str:
    """The screen, for a configuration called `name` (FILE or FILE:ARG); the rest are the command's flags, real is --measure.

    Raises:
      InputError: a flag, the configuration or the data set is wrong.
    """
    if "model" not in config or "data" not in config:
        raise InputError("--config names no configuration of a training run; take configs/full.py:1024.")
    for flag, value in (("memory_gb", memory_gb), ("cards", cards), ("watts", watts), ("resolution", resolution)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{flag}={value:g} must be above 0.")
    if resolution and (resolution < 64 or resolution % 16):
        raise InputError(f"--resolution={resolution} must be a multiple of 16 from 64 up.")
    if real and (device or cards):
        named = f"--device={device}" if device else f"--cards={cards}"
        raise InputError(f"--measure runs on the devices at hand; leave {named} out.")
    if device and device != "cpu" and estimate.peak_flops(device, "bfloat16") is None:
        near = ", ".join(_nearest_cards(device))
        raise InputError(f"--device={device}: no such card is known; the nearest are {near}; --measure runs on any.")
    commandline.check_folder("config.data.path", config.data.path)
    checked = config.copy_and_resolve_references()
    checked.data.path = config.data.path or "assumed"
    workdir.check(checked, jax.device_count() if real else cards or 1)
    try:
        mesh.compute_dtype(config.model.dtype)
        optim.warmup_updates(config.optim.warmup_steps, config.train.total_steps)
    except ValueError as error:
        raise InputError(str(error)) from error
    stages = read_stages(config, name, resolution)
    given = next(stage for stage in stages if stage.name == name)
    watts = watts or (device and estimate.card_watts(device)) or config.get("metrics", {}).get("watts", WATTS)
    watts *= jax.device_count() if real else cards or 1
    found = measure.measure(config, given.buckets, given.widths) if real else {}
    return forecast.screen(stages, given, look_at(device or CARD, memory_gb, config, real, cards or 1), watts, found)


def _nearest_cards(name: str) -> list[str]:
    names = [re.sub(r"\([^)]*\)\??|\[[^]]*\]|\.\*", "", card) for row in estimate.PEAKS for card in row[0].split("|")]
    known = {card.lower(): card for card in names if estimate.peak_flops(card, "bfloat16")}
    return [known[near] for near in difflib.get_close_matches(name.lower(), known, 3, 0.0)]


def main(config: Any) -> int:
    options = flags.FLAGS
    if not options.measure:
        jax.config.update("jax_platforms", "cpu")  # a card that trains is not to be disturbed
    given = {name: getattr(options, name) for name in ("memory_gb", "device", "cards", "watts", "resolution")}
    print(plan(config, options["config"].config_filename, real=options.measure, **given))
    return 0


if __name__ == "__main__":
    define_flags()
    commandline.run(main, config="configs/full.py:1024")
