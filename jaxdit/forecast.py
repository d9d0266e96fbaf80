"""The plan on one screen: what fits, how fast it goes, days and energy; `python -m jaxdit.plan` prints it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdit import estimate, mesh, model, startup, trained
from jaxdit.measure import Bucket, Measured


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
    """What is planned for: JAX's name of one, bytes to use on each, peak operations a second of all, how many and of how many
    each holds its part of one model, whether at hand."""

    kind: str
    memory: float
    peak: float | None
    count: int
    fsdp: int
    at_hand: bool


def settings_for(stage: Stage, device: Device) -> dict[str, Any]:
    """What model.DiT takes: on the device at hand what a run would take, elsewhere bfloat16 and cuDNN on any card."""
    settings = trained.model_settings(stage.config.model, stage.widths, device.fsdp)
    if device.at_hand:
        return settings
    options, card = stage.config.model, device.kind.lower() != "cpu"
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if card else "float32"
    attention = "cudnn" if card and dtype == "bfloat16" else "xla"
    return (
        settings | {"dtype": dtype, "attention": attention} | trained.unrolled(options, on_card=card, fsdp=device.fsdp)
    )


def screen(
    stages: Sequence[Stage], given: Stage, device: Device, watts: float, measured: Mapping[str, Measured]
) -> str:
    """All that is known, on one screen; measured by the names of the given stage's buckets, empty without --measure."""
    settings = settings_for(given, device)
    shapes = model.abstract(settings)[1]
    count, held = model.count_parameters(shapes), mesh.held(shapes, device.fsdp)
    return "\n".join(
        [
            *_heading(given, settings, count, device, measured),
            "",
            *_buckets(given, settings, held, device, measured),
            "",
            *_memory(given, settings, held, device, measured),
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
        share = estimate.utilisation(device.kind)
        how = "assumed" if share == estimate.UTILISATION else "taken, as an H100 was measured to reach"
        assumed = f", of which {share:.0%} are {how}, counting what remat repeats"
    elif not measured:
        assumed = ": no estimate of time, take --measure or name a card with --device"
    if not measured:
        known = "nothing was measured; every number of memory, speed and time is an estimate."
    many = f"{device.count} x " if device.count > 1 else ""
    if many and not measured:
        assumed += "; the network is not counted"
    return [
        f"{given.name}: {known}",
        *(startup.another_resolution(given.name, given.resolution) if given.config.data.path else ()),
        f"Model   {count:,} parameters: {settings['layers']} x {settings['width']}, {settings['heads']} heads, patch "
        f"{settings['patch']}; {settings['dtype']}, {estimate.in_words(settings, given.config.model)}",
        f"Data    {pictures:,} images ({given.source}); text {settings['text_width']} wide, vision {settings['vision_width']}",
        f"Device  {many}{device.kind}{'' if device.at_hand else ' (not looked for)'}: {device.memory / 1e9:.1f} GB to use; "
        f"{speed}{'' if measured else assumed}",
    ]


def _buckets(given, settings, held, device, measured) -> list[str]:
    choices = estimate.choices(settings)
    header = ["bucket", "images", "tokens", "text", "TFLOP/image", "images/s", "samples/day", "passes/day"]
    header += [f"largest micro-batch: {choices[0]}", choices[1]] + (["MFU", "GB compiled"] if measured else [])
    rows, pictures = [], sum(bucket.images for bucket in given.buckets)
    for bucket in given.buckets:
        flops = estimate.training_flops(settings, bucket.latent, bucket.text)
        found = measured.get(bucket.name)
        rate = found.rate or None if found else _rate(given.config, settings, bucket, device)
        most = [_largest(given.config, settings, held, device, bucket, remat) for remat in choices]
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


def _memory(given, settings, held, device, measured) -> list[str]:
    largest = max(given.buckets, key=lambda bucket: math.prod(bucket.latent))
    train, rows, most, header = given.config.train, [], [], []
    for remat in estimate.choices(settings):
        each, how = train.micro_batch // device.count, {"remat": remat, "optimizer": given.config.optim.name}
        parts = estimate.memory(settings, held, each, largest.latent, largest.text, **how)
        header = ["remat", *parts, "total", ""]
        mine = ", as configured" if remat == settings["remat"] else ""
        rows.append([remat, *map(_gigabytes, parts.values()), *_verdict(sum(parts.values()), device, mine)])
        fits = min(_largest(given.config, settings, held, device, bucket, remat) for bucket in given.buckets)
        most.append(
            max((n for n in range(device.count, fits + 1, device.count) if train.batch_size % n == 0), default=0)
        )
    if largest.name in measured and measured[largest.name].memory:
        blank = [""] * (len(header) - 3)
        rows.append(["compiled", *blank, *_verdict(measured[largest.name].memory, device, ", as configured")])
    return [
        f"Memory (estimate, GB of {device.memory / 1e9:.1f}, with {train.micro_batch} images of {largest.name} at a time)",
        *table(header, rows),
        f"  train.micro_batch that fits every bucket and divides train.batch_size={train.batch_size}: at most {most[0]} with "
        f"remat {rows[0][0]}, {most[1]} with block (estimate)."
        + ("" if any(most) else " So this model does not fit: a larger card, or fewer layers, a smaller width."),
    ]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size > 5e6 else f"{size / 1e9:.1g}"


def _verdict(total: int, device: Device, more: str) -> list[str]:
    return [_gigabytes(total), ("fits" if total <= device.memory else "does not fit") + more]


def _largest(config, settings, held, device, bucket, remat) -> int:
    how = {"remat": remat, "optimizer": config.optim.name}
    each = estimate.largest_micro_batch(settings, held, device.memory, bucket.latent, bucket.text, **how)
    return each * device.count  # a micro-batch is divided over the devices


def _stages(stages, given, settings, device, watts, measured) -> list[str]:
    """Days and energy of each run, its buckets weighted by their images."""
    share = _measured_share(given, settings, device, measured)
    rows, all_samples, all_days = [], 0, 0.0
    for stage in stages:
        config, pictures = stage.config, sum(bucket.images for bucket in stage.buckets)
        samples, seconds = config.train.total_steps * config.train.batch_size, 0.0
        for bucket in stage.buckets:
            hardware = _hardware(config, settings, bucket, device)
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


def _hardware(config, settings, bucket, device) -> float:
    """Operations an image, of all devices together: each group that holds a model makes the update anew."""
    update = estimate.update_flops(settings, config.optim.name) / config.train.batch_size
    update *= device.count // device.fsdp
    return estimate.hardware_flops(settings, bucket.latent, bucket.text, remat=settings["remat"]) + update


def _rate(config, settings, bucket, device) -> float | None:
    if not device.peak:
        return None
    return estimate.images_per_second(
        _hardware(config, settings, bucket, device), device.peak, estimate.utilisation(device.kind)
    )


def _measured_share(given, settings, device, measured) -> float | None:
    """Operations a second that the measured buckets reached together; other shapes are taken to reach the same."""
    good = [bucket for bucket in given.buckets if bucket.name in measured and measured[bucket.name].rate]
    seconds = sum(bucket.images / measured[bucket.name].rate for bucket in good)
    done = sum(bucket.images * _hardware(given.config, settings, bucket, device) for bucket in good)
    return done / seconds if good else None


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
