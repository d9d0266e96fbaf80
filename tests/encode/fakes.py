"""Three small encoders without weights, for tests of the pipeline: deterministic, and the same alone or in a batch."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from configs import encode_demo
from encode import pipeline
from encode.prepare import Resizing

TIMED = ("speed.jsonl", "progress.json", "report.html")


class Vae:
    """Four channels: mean red, green and blue of each 8 x 8 block, and a constant."""

    channels = 4
    fingerprint = {"id": "fake-vae", "weights": "0"}  # noqa: RUF012

    def __init__(self, pause: float = 0.0, fail_at: int | None = None):
        self.pause, self.fail_at, self.seen, self.calls = pause, fail_at, [], 0

    def encode(self, pixels):
        assert pixels.dtype == np.uint8 and pixels.ndim == 4
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the device was lost")
        time.sleep(self.pause)
        self.seen.append(pixels)
        b, h, w, c = pixels.shape
        means = pixels.reshape(b, h // 8, 8, w // 8, 8, c).mean((2, 4), dtype=np.float64) / 127.5 - 1
        return np.concatenate([means, np.full((*means.shape[:3], 1), 0.5)], -1).astype(np.float32)

    def decode(self, latents):
        small = np.clip((latents[..., :3] + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
        return small.repeat(8, 1).repeat(8, 2)


class Text:
    """One token a word: its bytes' mean and its place."""

    width, max_tokens = 3, 8
    fingerprint = {"id": "fake-text", "max_tokens": 8}  # noqa: RUF012

    def encode(self, texts):
        return [self._one(text.split()[: self.max_tokens]) for text in texts]

    def _one(self, words):
        rows = [[sum(word.encode()) / 100, len(word), place] for place, word in enumerate(words)]
        return np.array(rows, np.float32)

    def count_tokens(self, text):
        return len(text.split())

    def unknown(self, text):
        return sum(not word.isascii() for word in text.split()) / len(text.split())


class Vision:
    """Mean colour, and how much brighter the left half is."""

    width = 4
    fingerprint = {"id": "fake-vision"}  # noqa: RUF012
    resizing = Resizing(64 * 64, 2, Image.Resampling.BOX)

    def encode_resized(self, pictures):
        return np.stack([self._one(picture.astype(np.float64)) for picture in pictures]).astype(np.float32)

    def _one(self, picture):
        half = picture.shape[1] // 2
        return np.append(picture.mean((0, 1)), picture[:, :half].mean() - picture[:, half:].mean())


def encoders(**vae) -> pipeline.Encoders:
    return pipeline.Encoders(Vae(**vae), Text(), Vision())


def photographs(folder: Path, count: int = 10) -> Path:
    """Small pictures of several shapes with captions, the file's number in the colour."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = ((96, 64), (64, 96), (80, 80))
    for number in range(count):
        pixels = np.full((*shapes[number % 3], 3), (20 * number % 256, 250 - 17 * number % 250, 90), np.uint8)
        pixels[:, : pixels.shape[1] // 2] //= 2
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        side = ("left", "right")[number % 2]
        (folder / f"{number:03d}.txt").write_text(f"picture {number}, dark on the {side}", encoding="utf-8")
    return folder


def config(images: Path, out: Path, **changes):
    """The demo configuration, small shards."""
    found = encode_demo.get_config()
    found.update(
        {"images": str(images), "out": str(out), "shard_size": 2, "batch_size": 2, "max_upscale": 9.0, **changes}
    )
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, but those that say how long it took; a running process may change it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # renamed since it was listed
            if path.is_file() and path.name not in TIMED:
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


if __name__ == "__main__":
    # python -m tests.encode.fakes IMAGES OUT: a run in a process of its own, slowed to be killed
    pipeline.run(config(Path(sys.argv[1]), Path(sys.argv[2])), encoders(pause=float(os.environ.get("FAKE_PAUSE", "0"))))
