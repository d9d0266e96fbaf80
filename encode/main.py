"""Encode a folder of captioned photographs into one data set a resolution.

    python -m encode.main --config=configs/encode_demo.py --config.images=DIR --config.out=DIR

Run again with the same configuration after any interruption: it goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from encode import commandline
from encode.records import InputError

log = logging.getLogger(__name__)


def main(config: Any) -> int:
    """Run the whole of it; returns the exit code."""
    asked = threading.Event()
    _stop_on_signal(asked)
    check(config)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads and the decoders' do not mix
    from encode import pipeline  # PyTorch takes seconds to import: not before the call is known to be right

    try:
        summary = pipeline.run(config, load(config), asked.is_set)
    except pipeline.Stopped:
        return commandline.fail(
            "stopped as asked; finished shards are on disk, the same command goes on from there.", 3
        )
    except pipeline.WorkFailed as error:
        return commandline.fail(str(error), 1)
    speed = f", {summary.rate:.1f} a second" if summary.rate else "; nothing was left to do"
    print(f"{summary.encoded} pictures encoded, {summary.refused} inputs refused{speed}.")
    for root in summary.roots:
        print(f"Data set: {root}")
    print(f"Report: {summary.report}")
    return 0


def load(config: Any) -> Any:
    """The encoders that the configuration names."""
    from encode import encoders, pipeline

    try:
        return pipeline.Encoders(
            vae=encoders.load_vae(config.vae),
            text=encoders.load_text(config.text),
            vision=None if config.vision.precomputed else encoders.load_vision(config.vision),
        )
    except (ValueError, OSError) as error:
        raise InputError(f"an encoder cannot be loaded: {error}") from error


def check(config: Any) -> None:
    """Refuse values that cannot work, by the name of their field.

    Raises:
      InputError: naming the field, its value and what is wanted.
    """
    from encode.buckets import cells_across

    for name in ("images", "out"):
        if not config[name]:
            raise InputError(f"config.{name} is empty; give the folder with --config.{name}=DIR.")
    if not config.resolutions or len(set(config.resolutions)) != len(config.resolutions):
        raise InputError(f"config.resolutions={config.resolutions}: one or more different numbers are wanted.")
    try:
        cells_across(config.resolutions)
    except (ValueError, TypeError) as error:
        raise InputError(f"config.resolutions={config.resolutions}: {error}.") from error
    for name in ("max_buckets", "max_pixels", "shard_size", "batch_size", "decode_threads"):
        if config[name] < 1:
            raise InputError(f"config.{name}={config[name]}: at least 1 is wanted.")
    if config.max_distortion < 1:
        raise InputError(
            f"config.max_distortion={config.max_distortion}: a ratio of 1 (no distortion) or more is wanted."
        )


def _stop_on_signal(asked: threading.Event) -> None:
    """The first signal asks for a stop between two pictures; a second one stops at once, which loses nothing either."""

    def handle(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


if __name__ == "__main__":
    commandline.run(main, config="configs/encode_demo.py")
