"""What a worker process does to one file: decode it, bring it to its bucket's size at each resolution, hash it.

Everything that the encoders need leaves here at its final size, so that a picture of 50 million pixels is nowhere in memory
but in the process that decodes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from encode import buckets, images

Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Resizing:
    """The size at which a vision model sees the whole picture, whatever the bucket.

    Attributes:
      area: pixels, about.
      multiple: every side is a multiple of it (the model's patch).
      resample: Pillow's filter.
    """

    area: int
    multiple: int
    resample: int

    def size(self, width: int, height: int) -> Size:
        scale = (self.area / (height * width)) ** 0.5
        return tuple(max(1, round(side * scale / self.multiple)) * self.multiple for side in (width, height))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """[height, width, 3] uint8 of any size -> [height', width', 3] uint8."""
        return np.asarray(Image.fromarray(pixels).resize(self.size(*pixels.shape[1::-1]), self.resample))


@dataclass(frozen=True)
class Task:
    """One picture of the plan, for a worker.

    Attributes:
      id, path: as in source.Item.
      size: upright size that the plan is made for.
      targets: {resolution: bucket size}, for each resolution at which it is written.
      pad: fit the whole picture into the bucket and fill the rest with noise, instead of stretching it.
      max_pixels: config.max_pixels.
      whole: how the vision model sees it; None where vectors are precomputed.
      vectors: files of the precomputed vector and of its mirror image's, or None.
      vector_width: numbers that a precomputed vector must have.
    """

    id: str
    path: Path
    size: Size
    targets: Mapping[int, Size]
    pad: bool
    max_pixels: int
    whole: Resizing | None
    vectors: tuple[Path | None, Path | None] | None
    vector_width: int


@dataclass(frozen=True)
class Prepared:
    """A picture ready to be encoded.

    Attributes:
      pixel_hash: of the decoded upright pixels.
      pixels: {resolution: [height, width, 3] uint8}.
      masks: {resolution: [height / 8, width / 8] uint8}, 1 is picture; [0, 0] where nothing was padded.
      whole: [height, width, 3] uint8 as the vision model sees it, or None.
      vectors: precomputed vectors of the picture and of its mirror image, or None.
    """

    pixel_hash: str
    pixels: Mapping[int, np.ndarray]
    masks: Mapping[int, np.ndarray]
    whole: np.ndarray | None
    vectors: tuple[np.ndarray, np.ndarray] | None


def prepare(task: Task) -> Prepared:
    """Read one picture.

    Raises:
      ImageProblem: it cannot be decoded, or its vector cannot be used.
    """
    whole = images.decode(task.path, task.max_pixels)
    if whole.shape[1::-1] != task.size:
        raise images.ImageProblem("the file has changed since the plan was made")
    pixels, masks = {}, {}
    for resolution, target in task.targets.items():
        if task.pad:
            pixels[resolution], masks[resolution] = padded(whole, *target, task.id)
        else:
            pixels[resolution], masks[resolution] = images.resize(whole, *target), np.zeros((0, 0), np.uint8)
    vectors = None
    if task.vectors is not None:
        plain, mirrored = task.vectors
        vector = read_vector(plain, task.vector_width)
        vectors = vector, vector if mirrored is None else read_vector(mirrored, task.vector_width)
    seen = None if task.whole is None else task.whole(whole)
    return Prepared(images.pixel_hash(whole), pixels, masks, seen, vectors)


def padded(pixels: np.ndarray, width: int, height: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The whole picture in the middle of its bucket, its shape kept, the rest uniform noise drawn from its name.

    Its sides are rounded to multiples of 16 pixels, so that no latent and no patch is half picture.

    Returns:
      [height, width, 3] uint8 pixels, and the [height / 8, width / 8] uint8 mask, 1 where there is picture.
    """
    inner = buckets.inside(pixels.shape[1::-1], (width, height))
    left, top = ((side - used) // 2 // 16 * 16 for side, used in zip((width, height), inner))
    seed = int.from_bytes(hashlib.sha256(f"padding:{name}".encode()).digest()[:8], "big")
    canvas = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    canvas[top : top + inner[1], left : left + inner[0]] = images.resize(pixels, *inner)
    mask = np.zeros((height // 8, width // 8), np.uint8)
    mask[top // 8 : (top + inner[1]) // 8, left // 8 : (left + inner[0]) // 8] = 1
    return canvas, mask


def sizes(work: tuple[Sequence[Path], int]) -> list[Size | images.ImageProblem]:
    """Upright sizes of some pictures, from their headers; `work` is the paths and config.max_pixels."""
    paths, max_pixels = work
    found: list[Size | images.ImageProblem] = []
    for path in paths:
        try:
            found.append(images.size(path, max_pixels))
        except images.ImageProblem as problem:
            found.append(problem)
    return found


def thumbnail(work: tuple[Path, int, int]) -> bytes:
    """Small JPEG of the upright picture; `work` is the path, config.max_pixels and the longer side."""
    return images.thumbnail_of(*work)


def read_vector(path: Path | None, width: int | None = None) -> np.ndarray:
    """[width] float32 from NAME.dino.npy, or from the key dino of NAME.json.

    Raises:
      ImageProblem: it cannot be read, is not finite, or has another width.
    """
    if path is None:
        raise VectorProblem("the precomputed vector is no longer there")
    try:
        value = (
            json.loads(path.read_text("utf-8-sig"))["dino"]
            if path.suffix == ".json"
            else np.load(path, allow_pickle=False)
        )
        vector = np.asarray(value, np.float32)
    except OSError as error:
        raise VectorProblem(f"{images.ImageProblem.unread}{path.name}: {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, KeyError, RecursionError) as error:
        raise VectorProblem(f"{path.name}: no vector can be read ({error})") from error
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise VectorProblem(f"{path.name}: a vector of finite numbers is wanted, found shape {list(vector.shape)}")
    if width is not None and len(vector) != width:
        raise VectorProblem(f"{path.name}: {len(vector)} numbers found, {width} in the first picture's vector")
    return vector


class VectorProblem(images.ImageProblem):
    """A precomputed vector that cannot be used."""
