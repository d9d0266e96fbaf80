"""python -m jaxdit.plan --config=configs/full.py:1024 --memory_gb=24 [--device="RTX 4090"] [--watts=450] [--measure]

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from absl import flags

from encode import commandline, records
from encode.records import InputError
from jaxdit import data, estimate, measure, mesh, model, startup, trained, workdir
from jaxdit.measure import Bucket, Measured

IMAGES = 100_000  # the collection that the plan is made for; a third in each of three shapes
SHAPES = ((1024, 1024), (832, 1216), (1216, 832))
TEXT_TOKENS = 128  # a caption of three sentences, rounded up to 64
WIDTHS = {"latent": 16, "text": 1024, "vision": 1024}  # Flux's VAE, T5-Large, DINOv3 ViT-L
CARD = "NVIDIA GeForce RTX 4090"
POOL = 0.9  # of the card's memory is XLA's
WATTS = 450.0  # a 4090's limit


@dataclass(frozen=True)
class Stage:
    """One run of a configuration file: its name FILE:ARG, its configuration, resolution, data and where they are from."""

    name: str
    config: Any
    resolution: int
    buckets: Sequence[Bucket]
    widths: Mapping[str, int]
    source: str


@dataclass(frozen=True)
class Device:
    """What is planned for: JAX's name of it, bytes to use, peak operations a second of all, how many, whether at hand."""

    kind: str
    memory: float
    peak: float | None
    count: int
    at_hand: bool


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


def settings_for(stage: Stage, device: Device) -> dict[str, Any]:
    """What model.DiT takes: on the device at hand what a run would take, elsewhere bfloat16 and cuDNN on any card."""
    settings = trained.model_settings(stage.config.model, stage.widths)
    if device.at_hand:
        return settings
    options, card = stage.config.model, device.kind.lower() != "cpu"
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if card else "float32"
    attention = "cudnn" if card and dtype == "bfloat16" else "xla"
    return settings | {"dtype": dtype, "attention": attention} | trained.unrolled(options, on_card=card)


def screen(
    stages: Sequence[Stage], given: Stage, device: Device, watts: float, measured: Mapping[str, Measured]
) -> str:
    """All that is known, on one screen; measured by the names of the given stage's buckets, empty without --measure."""
    settings = settings_for(given, device)
    count = model.count_parameters(model.abstract(settings)[1])
    return "\n".join(
        [
            *_heading(given, settings, count, device, measured),
            "",
            *_buckets(given, settings, count, device, measured),
            "",
            *_memory(given, settings, count, device, measured),
            "",
            *_stages(stages, given, settings, device, watts, measured),
        ]
    )


def _heading(given, settings, count, device, measured) -> list[str]:
    pictures = sum(bucket.images for bucket in given.buckets)
    speed, assumed = "peak not known", ""
    known = "speed is measured where it says so; every other number of memory and time is an estimate."
    if device.peak:
        speed = f"{device.peak / 1e12:.1f} TFLOP/s at its peak in {settings['dtype']}"
        assumed = f", of which {estimate.UTILISATION:.0%} are assumed, counting what remat repeats"
    elif not measured:
        assumed = ": no estimate of time, take --measure or name a card with --device"
    if not measured:
        known = "nothing was measured; every number of memory, speed and time is an estimate."
    return [
        f"{given.name}: {known}",
        *(startup.another_resolution(given.name, given.resolution) if given.config.data.path else ()),
        f"Model   {count:,} parameters: {settings['layers']} x {settings['width']}, {settings['heads']} heads, patch "
        f"{settings['patch']}; {settings['dtype']}, attention {settings['attention']}, remat {settings['remat']}",
        f"Data    {pictures:,} images ({given.source}); text {settings['text_width']} wide, vision {settings['vision_width']}",
        f"Device  {device.kind}{'' if device.at_hand else ' (not looked for)'}: {device.memory / 1e9:.1f} GB to use; "
        f"{speed}{'' if measured else assumed}",
    ]


def _buckets(given, settings, count, device, measured) -> list[str]:
    choices = estimate.choices(settings)
    header = ["bucket", "images", "tokens", "text", "TFLOP/image", "images/s", "samples/day", "passes/day"]
    header += [f"largest micro-batch: {choices[0]}", choices[1]] + (["MFU", "GB compiled"] if measured else [])
    rows, pictures = [], sum(bucket.images for bucket in given.buckets)
    for bucket in given.buckets:
        flops = estimate.training_flops(settings, bucket.latent, bucket.text)
        found = measured.get(bucket.name)
        rate = found.rate or None if found else _rate(given.config, settings, bucket, device)
        most = [_largest(given.config, settings, count, device, bucket, remat) for remat in choices]
        row = [bucket.name, f"{bucket.images:,}", f"{estimate.tokens(settings, bucket.latent):,}", f"{bucket.text:,}"]
        row += [f"{flops / 1e12:.3g}", *_speed(rate, pictures), *map(str, most)]
        if found:
            row += [f"{rate * flops / device.peak:.0%}" if rate and device.peak else "-"]
            row += [found.problem or f"{found.memory / 1e9:.2f}"]
        rows.append(row)
    kind = "images/s measured, the rest an estimate" if measured else "estimate"
    title = f"Buckets ({kind}; TFLOP of forward and backward; passes over all {pictures:,} images)"
    return [title, *table(header, rows)]


def _speed(rate: float | None, pictures: int) -> list[str]:
    """images/s, samples a day and passes a day; dashes where the rate is not known."""
    if not rate:
        return ["-"] * 3
    return [f"{rate:.3g}", f"{rate * 86_400:,.0f}", f"{rate * 86_400 / pictures:.3g}"]


def _memory(given, settings, count, device, measured) -> list[str]:
    largest = max(given.buckets, key=lambda bucket: math.prod(bucket.latent))
    train, rows, most, header = given.config.train, [], [], []
    for remat in estimate.choices(settings):
        each, how = train.micro_batch // device.count, {"remat": remat, "optimizer": given.config.optim.name}
        parts = estimate.memory(settings, count, each, largest.latent, largest.text, **how)
        header = ["remat", *parts, "total", ""]
        mine = ", as configured" if remat == settings["remat"] else ""
        rows.append([remat, *map(_gigabytes, parts.values()), *_verdict(sum(parts.values()), device, mine)])
        fits = min(_largest(given.config, settings, count, device, bucket, remat) for bucket in given.buckets)
        most.append(max((n for n in range(1, fits + 1) if train.batch_size % n == 0), default=0))
    if largest.name in measured and measured[largest.name].memory:
        blank = [""] * (len(header) - 3)
        rows.append(["compiled", *blank, *_verdict(measured[largest.name].memory, device, ", as configured")])
    return [
        f"Memory (estimate, GB of {device.memory / 1e9:.1f}, with {train.micro_batch} images of {largest.name} at a time)",
        *table(header, rows),
        f"  train.micro_batch that fits every bucket and divides train.batch_size={train.batch_size}: at most {most[0]} with "
        f"remat {rows[0][0]}, {most[1]} with block (estimate).",
    ]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size > 5e6 else f"{size / 1e9:.1g}"


def _verdict(total: int, device: Device, more: str) -> list[str]:
    return [_gigabytes(total), ("fits" if total <= device.memory else "does not fit") + more]


def _largest(config, settings, count, device, bucket, remat) -> int:
    how = {"remat": remat, "optimizer": config.optim.name}
    each = estimate.largest_micro_batch(settings, count, device.memory, bucket.latent, bucket.text, **how)
    return each * device.count  # a micro-batch is divided over the devices


def _stages(stages, given, settings, device, watts, measured) -> list[str]:
    """Days and energy of each run, its buckets weighted by their images."""
    share = _measured_share(given, settings, measured)
    rows, all_samples, all_days = [], 0, 0.0
    for stage in stages:
        config, pictures = stage.config, sum(bucket.images for bucket in stage.buckets)
        samples, seconds = config.train.total_steps * config.train.batch_size, 0.0
        for bucket in stage.buckets:
            hardware = _hardware(config, settings, bucket)
            found = measured.get(bucket.name) if stage is given else None
            reached = share / hardware if share else _rate(config, settings, bucket, device)
            rate = found.rate if found and found.rate else reached
            seconds += bucket.images / pictures / rate if rate else math.nan
        days = samples * seconds / 86_400
        all_samples, all_days = all_samples + samples, all_days + days
        how = "measured" if stage is given and share else "estimate from that speed" if share else "estimate"
        row = [stage.name, f"{config.train.total_steps:,}", f"{samples:,}", f"{samples / pictures:.3g}"]
        rows.append([*row, *(_span(seconds, days, watts)), how])
    if len(rows) > 1:
        rows.append(["all", "", f"{all_samples:,}", "", "", *_span(math.nan, all_days, watts)[1:], ""])
    header = ["stage", "steps", "samples", "passes", "images/s", "days", f"kWh at {watts:g} W", ""]
    return [
        "Stages (estimate unless it says measured; evaluation, previews and saving come on top)",
        *table(header, rows),
    ]


def _span(seconds: float, days: float, watts: float) -> list[str]:
    """images/s, days and kWh; dashes where no speed is known."""
    if math.isnan(days):
        return ["-"] * 3
    return ["" if math.isnan(seconds) else f"{1 / seconds:.3g}", f"{days:.3g}", f"{days * 24 * watts / 1000:,.3g}"]


def _hardware(config, settings, bucket) -> float:
    update = estimate.update_flops(settings, config.optim.name) / config.train.batch_size
    return estimate.hardware_flops(settings, bucket.latent, bucket.text, remat=settings["remat"]) + update


def _rate(config, settings, bucket, device) -> float | None:
    return estimate.images_per_second(_hardware(config, settings, bucket), device.peak) if device.peak else None


def _measured_share(given, settings, measured) -> float | None:
    """Operations a second that the measured buckets reached together; other shapes are taken to reach the same."""
    good = [bucket for bucket in given.buckets if bucket.name in measured and measured[bucket.name].rate]
    seconds = sum(bucket.images / measured[bucket.name].rate for bucket in good)
    return sum(bucket.images * _hardware(given.config, settings, bucket) for bucket in good) / seconds if good else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right, a last one without a title to the left."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if column == 0 or not header[column] else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def look_at(kind: str, memory_gb: float | None, config: Any, at_hand: bool) -> Device:
    """The device that is planned for.

    Args:
      kind: JAX's name of a device, not looked at where the one at hand is measured.
      memory_gb: of the card, of which XLA takes nine tenths; None: 24, or what the device at hand has.
    """
    count, memory = 1, POOL * 1e9 * (memory_gb or 24)
    if at_hand:
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        memory = POOL * 1e9 * memory_gb if memory_gb else startup.device_memory()
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = mesh.compute_dtype(dtype) if at_hand else "bfloat16"
    return Device(kind, memory, estimate.peak_flops(kind, dtype, count), count, at_hand)


def define_flags() -> None:
    flags.DEFINE_float("memory_gb", None, "Memory of the card, GB; by default 24, with --measure that of the device.")
    flags.DEFINE_string("device", None, f"The card, as JAX names it; by default {CARD}.")
    flags.DEFINE_float("watts", None, "What it draws; by default the configuration's metrics.watts, or 450.")
    flags.DEFINE_integer("resolution", None, "Of the pictures, where no data set says so.")
    flags.DEFINE_bool("measure", False, "Run twenty real updates a bucket on the device at hand.")


def plan(
    config: Any,
    name: str,
    *,
    memory_gb: float | None = None,
    device: str | None = None,
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
    for flag, value in (("memory_gb", memory_gb), ("watts", watts), ("resolution", resolution)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{flag}={value:g} must be above 0.")
    if real and device:
        raise InputError(f"--measure runs on the device at hand; leave --device={device} out.")
    if device and device != "cpu" and estimate.peak_flops(device, "bfloat16") is None:
        near = ", ".join(_nearest_cards(device))
        raise InputError(f"--device={device}: no such card is known; the nearest are {near}; --measure runs on any.")
    commandline.refuse_url("config.data.path", config.data.path)
    checked = config.copy_and_resolve_references()
    checked.data.path = config.data.path or "assumed"
    workdir.check(checked, jax.device_count() if real else 1)
    try:
        mesh.compute_dtype(config.model.dtype)
    except ValueError as error:
        raise InputError(str(error)) from error
    stages = read_stages(config, name, resolution)
    given = next(stage for stage in stages if stage.name == name)
    watts = watts or config.get("metrics", {}).get("watts", WATTS)
    found = measure.measure(config, given.buckets, given.widths) if real else {}
    return screen(stages, given, look_at(device or CARD, memory_gb, config, real), watts, found)


def _nearest_cards(name: str) -> list[str]:
    names = [re.sub(r"\([^)]*\)\??|\[[^]]*\]|\.\*", "", card) for row in estimate.PEAKS for card in row[0].split("|")]
    known = {card.lower(): card for card in names if estimate.peak_flops(card, "bfloat16")}
    return [known[near] for near in difflib.get_close_matches(name.lower(), known, 3, 0.0)]


def main(config: Any) -> int:
    options = flags.FLAGS
    if not options.measure:
        jax.config.update("jax_platforms", "cpu")  # a card that trains is not to be disturbed
    given = {name: getattr(options, name) for name in ("memory_gb", "device", "watts", "resolution")}
    print(plan(config, options["config"].config_filename, real=options.measure, **given))
    return 0


if __name__ == "__main__":
    define_flags()
    commandline.run(main, config="configs/full.py:1024")
