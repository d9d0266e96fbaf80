"""Encode a folder of captioned photographs into one data set a resolution.

    python -m encode.main --config=configs/encode_demo.py --config.images=DIR --config.out=DIR [--dry_run]

With --dry_run nothing is written: it says what would be encoded, how long it would take and how much disk it needs.
Run again with the same configuration after any interruption: it goes on where it stopped.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import encode_demo
from encode import commandline
from encode.records import InputError

log = logging.getLogger(__name__)


def main(config: Any, dry_run: bool = False) -> int:
    """Run the whole of it, or say what it would be; returns the exit code."""
    asked = commandline.stop_on_signal()
    check(config)
    from encode import source

    source.must_exist(commandline.path_of(config.images))  # before processes are started in vain
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads and the decoders' do not mix
    from encode import estimate, pipeline  # PyTorch takes seconds to import: not before the call is known to be right

    try:
        encoders = load(config)
    except InputError:  # what the photographs lack is known without a download
        found = source.walk(commandline.path_of(config.images), commandline.path_of(config.out))
        print(f"{len(found.items):,} pictures with captions, {len(found.problems):,} inputs refused so far.")
        raise
    try:
        if dry_run:
            print(estimate.estimate(config, encoders, asked.is_set))
            return 0
        summary = pipeline.run(config, encoders, asked.is_set)
    except pipeline.Stopped:
        return commandline.fail(
            "stopped as asked; finished shards are on disk, the same command goes on from there.", 3
        )
    except pipeline.WorkFailed as error:
        return commandline.fail(str(error), 1)
    speed = f", {summary.rate:.1f} a second" if summary.rate else "; no picture was left to encode"
    copies = f" ({summary.copies} of them exact copies of others)" if summary.copies else ""
    print(f"{summary.encoded} pictures encoded{copies}, {summary.refused} inputs refused{speed}.")
    for root in summary.roots:
        print(f"Data set: {root}")
    if summary.report.exists():
        print(f"Report: {summary.report}")
    return 0


def load(config: Any) -> Any:
    """The encoders that the configuration names."""
    from encode import encoders, pipeline

    try:
        return pipeline.Encoders(*encoders.load_all(config))
    except (ValueError, OSError) as error:
        raise InputError(f"an encoder cannot be loaded: {error}") from error


def stored(config: Mapping[str, Any], **changes: Any) -> ConfigDict:
    """The configuration that dataset.json keeps, with changes; fields that it is too old to have are the demo's."""
    found = encode_demo.get_config().to_dict()
    for name, value in {**config, **changes}.items():
        found[name] = found.get(name, {}) | value if isinstance(value, Mapping) else value
    return ConfigDict(found)


def check(config: Any) -> None:
    """Refuse values that cannot work, by the name of their field.

    Raises:
      InputError: naming the field, its value and what is wanted.
    """
    from encode.buckets import cells_across, forced

    if "images" not in config or "vae" not in config:
        raise InputError(
            "--config names no configuration of encode; take configs/encode_demo.py or configs/encode_flux.py."
        )
    for name in ("images", "out"):
        if not config[name]:
            raise InputError(f"config.{name} is empty; give the folder with --config.{name}=DIR.")
        commandline.check_folder(f"config.{name}", config[name])
    _check_engine(config)
    if not config.resolutions or len(set(config.resolutions)) != len(config.resolutions):
        raise InputError(f"config.resolutions={config.resolutions}: one or more different numbers are wanted.")
    try:
        cells_across(config.resolutions)
    except (ValueError, TypeError) as error:
        raise InputError(f"config.resolutions={config.resolutions}: {error}.") from error
    try:
        forced(config.buckets, cells_across(config.resolutions), max(config.resolutions))
    except (ValueError, TypeError) as error:
        raise InputError(f"config.buckets={config.buckets}: {error}.") from error
    least = {
        "max_buckets": 1,
        "max_pixels": 1,
        "shard_size": 1,
        "batch_size": 1,
        "decode_workers": 0,
        "decode_memory": 64,
    }
    for name, wanted in least.items():
        if config[name] < wanted:
            raise InputError(f"config.{name}={config[name]}: at least {wanted} is wanted.")
    for name in ("decode_seconds", "max_upscale"):
        if not config[name] > 0:
            raise InputError(f"config.{name}={config[name]}: more than 0 is wanted.")
    if config.max_distortion < 1:
        raise InputError(
            f"config.max_distortion={config.max_distortion}: a ratio of 1 (no distortion) or more is wanted."
        )


def _check_engine(config: Any) -> None:
    """A configuration that dataset.json kept names none: it is the local one."""
    engine = config.get("engine", "local")
    if engine not in ("local", "ray"):
        raise InputError(f"config.engine={engine!r}: unknown; the choices are local, ray.")
    if engine == "ray":
        for name in ("actors", "cpus"):
            if config.ray[name] < 0:
                raise InputError(f"config.ray.{name}={config.ray[name]}: at least 0 is wanted.")
        importlib.import_module("encode.ray_engine")  # says what is to be installed if it is not


if __name__ == "__main__":
    flags.DEFINE_bool(
        "dry_run", False, "Say what would be encoded, how long it takes and how much disk; write nothing."
    )
    commandline.run(lambda config: main(config, flags.FLAGS.dry_run), config="configs/encode_demo.py")
