"""The one screen that a run begins with: what will be trained on what, will it fit, and what is odd about it."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from jaxdit import checkpoint, estimate, mesh, metrics, model, optim

ENOUGH_SAMPLES = 100_000_000  # models trained at home that draw well have seen 100 to 200 million; a million is mud
CPU = 1e11  # operations a second of a few cores
SLOW = 60 * CPU  # operations of a step that takes a minute there
SHOWN = 8  # buckets named one by one


def announce(
    config: Any,
    dataset: Any,
    settings: Mapping[str, Any],
    shapes: Any,
    origin: Mapping[str, Any],
    workdir: Path,
    devices: jax.sharding.Mesh,
) -> None:
    """Say what is about to happen, in the log."""
    written = sum(path.stat().st_size for path in (workdir / "checkpoints").rglob("*") if path.is_file())
    room = shutil.disk_usage(workdir).free + written
    for line in describe(config, dataset, settings, shapes, origin, device_memory(), room):
        logging.info(line)
    if devices.size > 1:
        logging.info("Devices    %s.", mesh.describe(devices))
    if whole := mesh.undivided(devices, shapes):
        logging.info(
            "Every device holds %s whole, because fsdp=%d does not divide their rows.",
            ", ".join(whole), devices.shape["fsdp"],
        )  # fmt: skip
    file = flags.FLAGS["config"].config_filename if "config" in flags.FLAGS and flags.FLAGS.is_parsed() else ""
    odd = warnings(config, dataset, settings, shapes, origin, device_memory(), room)
    for line in [*another_resolution(file, dataset.info["resolution"]), *odd]:
        logging.warning(line)


def describe(config, dataset, settings, shapes, origin, memory: int, room: int) -> list[str]:
    """The lines of the screen; memory is the device's, room what the disk has for checkpoints, in bytes."""
    train, updates = config.train, config.train.total_steps
    counts = {name: len(rows) for name, rows in dataset.train.items() if len(rows)}
    images, held_out = sum(counts.values()), sum(map(len, dataset.held_out.values()))
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {count:,}" for name, count in ordered[:SHOWN])
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    small = [name for name, count in counts.items() if count < train.micro_batch]
    samples = updates * train.batch_size
    decay = min(config.optim.ema_decay, (1 + updates) / (10 + updates))
    lines = [f"{section:<10} {_fields(config[section])}" for section in config if len(config[section])]
    lines += [
        f"Model      {model.count_parameters(shapes):,} parameters: {settings['layers']} layers of {settings['width']}, "
        f"{settings['heads']} heads, patch {settings['patch']}; {settings['dtype']} on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, {estimate.in_words(settings, config.model)}.",
        f"Data       {images:,} images to train on in {len(counts)} buckets ({named}{more}); {held_out:,} held out; text "
        f"padded to {', '.join(map(str, dataset.text_lengths))} tokens. {dataset.path}",
        f"An epoch   {images:,} samples, {images / train.batch_size:,.1f} steps; each image is seen "
        f"{samples / images:,.1f} times, mirrored in {config.flow.flip:.0%} of them where its caption allows."
        + (f" Buckets smaller than a micro-batch repeat within one: {', '.join(small)}." if small else ""),
        f"Run        {updates:,} steps of {train.batch_size} images ({train.batch_size // train.micro_batch} micro-batches "
        f"of {train.micro_batch}), {samples:,} samples; learning rate {config.optim.peak_learning_rate:g} after "
        f"{optim.warmup_updates(config.optim.warmup_steps, updates)} steps of warm-up, to {config.optim.end_learning_rate:g}; "
        f"seed {train.seed}.",
        f"Average    the decay of the averaged weights (EMA) rises to {decay:.5f} at the end: they average over about the last "
        f"{1 / (1 - decay):,.0f} updates.",
        f"Saved      every {config.checkpoint.minutes:g} minutes and {config.checkpoint.every:,} steps; "
        + (
            f"judged on {min(held_out, train.eval_images):,} held-out images every {train.eval_every:,} steps."
            if train.eval_every
            else "no held-out evaluation."
        ),
        memory_line(config, dataset, settings, shapes, memory),
        f"Disk       {disk(config, shapes) / 1e9:,.1f} GB of checkpoints at the most: {config.checkpoint.keep} to go on from, "
        f"{checkpoint.HALF_DAYS} to go back to, one being written, and averaged weights; {room / 1e9:,.1f} GB can be used.",
    ]
    for name, words in (("init_from", "Weights"), ("restore", "Goes back")):
        if name in origin:
            kind = f", {origin[name]['weights']} weights" if name == "init_from" else ""
            lines.append(f"{words:<10} from step {origin[name]['step']:,} of {origin[name]['workdir']}{kind}.")
    if "gate" in origin:
        lines.append(f"Gate       {origin['gate']['verdict']}.")
    return lines


def _fields(section: Any) -> str:
    return ", ".join(f"{name} {value if value not in ('', (), None) else '-'}" for name, value in section.items())


def warnings(config, dataset, settings, shapes, origin, memory: int, room: int) -> list[str]:
    """What is possible but odd, each with its arithmetic."""
    found = []
    total = largest(config, dataset, settings, shapes)
    if total > memory:
        found.append(
            f"Memory: by the estimate {total / 1e9:.1f} GB are needed and the device has {memory / 1e9:.1f} GB. Take "
            "--config.model.remat=block or a smaller train.micro_batch; python -m jaxdit.plan names the largest."
        )
    if disk(config, shapes) > room:
        found.append(
            f"Disk: the checkpoints of the whole run take {disk(config, shapes) / 1e9:,.1f} GB, and {room / 1e9:,.1f} GB can be "
            "used; make room before they do, or take a larger checkpoint.every."
        )
    step = config.train.batch_size * estimate.training_flops(settings, _widest(dataset), max(dataset.text_lengths))
    if jax.default_backend() == "cpu" and step > SLOW:
        each, whole = (metrics.duration(count * step / CPU) for count in (1, config.train.total_steps))
        found.append(
            f"No card is used: a step is {step / 1e12:,.0f} TFLOP, {each} where a CPU does {CPU / 1e12:g} a second, and the run "
            f"{whole}. This configuration is for a GPU."
        )
    samples = config.train.total_steps * config.train.batch_size
    if dataset.info["resolution"] >= 1024 and not origin.keys() & {"init_from", "restore"} and samples < ENOUGH_SAMPLES:
        images = sum(map(len, dataset.train.values()))
        found.append(
            f"{dataset.info['resolution']} from the first step: {config.train.total_steps:,} steps x "
            f"{config.train.batch_size} = {samples / 1e6:.1f} million samples, {samples / images:,.0f} passes over {images:,} "
            f"images; models trained from nothing that draw well have seen {ENOUGH_SAMPLES / 1e6:.0f} million and more. At 256 "
            "a sample costs about a twentieth: begin with full.py:256, then :512 and :1024 with train.init_from."
        )
    return found


def another_resolution(file: str, resolution: int) -> list[str]:
    """A warning where FILE:ARG names a stage of another resolution than the data's; its numbers were chosen for its own."""
    stage = file.partition(":")[2]
    if not stage.isdigit() or int(stage) == resolution:
        return []
    return [
        f"{file} is the stage for {stage}, and config.data.path is a data set of {resolution}: micro-batch, steps, shift and "
        "learning rate are those of the stage. Take the data set, or the stage, of the other."
    ]


def remaining(config: Any, step: int, rate: float) -> str:
    """The time that is left, now that it has been measured; rate in images a second."""
    seconds = (config.train.total_steps - step) * config.train.batch_size / rate
    end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + seconds))
    energy = seconds / 3600 * config.metrics.watts / 1000
    return (
        f"Measured: {rate:.1f} images/s. The run ends in {metrics.duration(seconds)} ({end}), after about {energy:,.1f} kWh at "
        f"metrics.watts={config.metrics.watts:g}."
    )


def disk(config: Any, shapes: Any) -> int:
    """Bytes that the checkpoints take at the most: state and average of those to go on from, averages alone of the rest."""
    every, total = config.checkpoint.every, config.train.total_steps
    parameters = 4 * model.count_parameters(shapes)
    snapshots = min(checkpoint.SNAPSHOTS, total // every) + total // math.lcm(every, checkpoint.LONG_INTERVAL)
    return parameters * (4 * (config.checkpoint.keep + 1 + checkpoint.HALF_DAYS) + snapshots)


def memory_line(config, dataset, settings, shapes, memory: int) -> str:
    parts = worst(config, dataset, settings, shapes)
    words = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"Memory     {sum(parts.values()) / 1e9:.2f} GB of {memory / 1e9:.1f} by estimate ({words} GB)."


def largest(config, dataset, settings, shapes) -> int:
    return sum(worst(config, dataset, settings, shapes).values())


def worst(config, dataset, settings, shapes) -> dict[str, int]:
    """The estimate of `estimate.memory` for the bucket that needs most, on one device."""
    tokens = max(dataset.text_lengths)
    shape = _widest(dataset)
    micro_batch = config.train.micro_batch // jax.device_count()
    _, fsdp = mesh.sizes(config.mesh.data, config.mesh.fsdp, jax.device_count())
    parameters = mesh.held(shapes, fsdp)
    how = {"remat": settings["remat"], "optimizer": config.optim.name}
    return estimate.memory(settings, parameters, micro_batch, shape, tokens, **how)


def _widest(dataset) -> list[int]:
    """[height, width, channels] of the largest latent."""
    return max((info["latent"] for info in dataset.info["buckets"].values()), key=lambda latent: np.prod(latent))


def device_memory() -> int:
    """Bytes that this process may use on one device: the card's pool, or the machine's memory."""
    statistics = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
