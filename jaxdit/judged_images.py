"""Images of a data set as they are judged, by the gate and by the evaluation: which ones, decoded, and comparable."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from encode.records import InputError
from encode.whole_files import whole_file
from jaxdit import data, judge, quality, trained
from jaxdit.metrics import duration

KEPT = 256  # pixels of a side, about, of what is kept of a picture
SAY = 15.0  # seconds between two lines
READ = 64  # records at a time


@dataclass(frozen=True)
class Known:
    """Real images: vectors [n, views, width] and thumbnails [n, views, 8 x 8 x channels], and pixel hashes, in files; places.

    The second view, where there is one, is the mirror image.
    """

    vectors: np.ndarray
    latents: np.ndarray
    hashes: np.ndarray
    places: list[tuple[str, int]]


def spread(rows: Mapping[str, np.ndarray], count: int) -> list[tuple[str, int]]:
    """(bucket, row) of at most `count` images, spread evenly over those given as {bucket: rows}."""
    places = [(name, int(row)) for name in sorted(rows) for row in rows[name]]
    step = max(len(places) / count, 1)
    return [places[int(k * step)] for k in range(min(count, len(places)))]


def gather(
    dataset: data.Dataset, run: trained.Trained, vae: Any, places: Sequence[tuple[str, int]]
) -> list[judge.Example]:
    """The images at these places, decoded from their latents.

    Pictures of several buckets are compared at the shape of the fullest one.
    """
    shape = common_shape(run)
    examples = []
    for name, row in places:
        record = dataset.records(name, [row])[0]
        latents = np.stack([record["latent"], record["latent_flip"]]).astype(np.float32)
        pixels = vae.decode(latents)
        examples.append(judge.Example(record, name, *pixels, compared(latents[:1], run, shape)[0]))
    return examples


def common_shape(run: trained.Trained) -> tuple[int, int]:
    """(height, width) of the fullest bucket's latents."""
    buckets = run.dataset["buckets"]
    return tuple(buckets[max(buckets, key=lambda name: buckets[name]["count"])]["latent"][:2])


def compared(latents: np.ndarray, run: trained.Trained, shape: tuple[int, int]) -> np.ndarray:
    """[n, height, width, channels] raw latents, normalised and resized to `shape`."""
    return np.asarray(
        jax.image.resize(data.normalized(latents, run.dataset), (len(latents), *shape, latents.shape[-1]), "linear")
    )


def padding(record: Mapping[str, Any], shape: Sequence[int]) -> np.ndarray:
    """[h, w] bool: where the picture was padded; nothing was learnt there, and nothing is compared."""
    mask = record["mask"]
    return mask == 0 if mask.size else np.zeros(shape[:2], bool)


def open_data(config: Mapping[str, Any], described: Mapping[str, Any], path: str | Path | None) -> data.Dataset:
    """The images to judge on, those at `path` or those of the training, split and normalised as the model knows them.

    Args:
      config, described: the run's configuration and its copy of dataset.json; data that have grown since have other statistics.
      path: OUT/RES; None: that of the training.
    """
    options = config["data"]
    where = path or options["path"]
    if not path and not Path(where).expanduser().is_dir():
        raise InputError(
            f"{where}: the data set of the training is not there; say where it lies now with --data=OUT/RES."
        )
    dataset = data.Dataset(
        where, holdout_fraction=options["holdout_fraction"], normalize_vision=options["normalize_vision"]
    )
    own = described.get("own", described)  # of data that have grown
    if path and (dataset.info["count"], dataset.info["latent_mean"]) != (described["count"], own["latent_mean"]):
        logging.warning(
            "%s is not the data set of the training as it is known (%d images here, %d there): what was not learnt cannot be "
            "remembered.", dataset.path, dataset.info["count"], described["count"],
        )  # fmt: skip
    dataset.describe(dataset.info | {name: described[name] for name in ("latent_mean", "latent_std")})
    return dataset


def refuse_other_data(workdir: str | Path, run: trained.Trained, dataset: data.Dataset) -> None:
    """Raise InputError where the model was not trained on data of this kind."""
    if dataset.info["fingerprint"] != run.dataset["fingerprint"]:
        raise InputError(
            f"{dataset.path} was encoded in another way than the data of {workdir}; judge on data of its kind."
        )
    shapes = {name: info["latent"] for name, info in run.dataset["buckets"].items()}
    for name, info in dataset.info["buckets"].items():
        if shapes.get(name) != info["latent"]:
            raise InputError(
                f"{dataset.path} has a bucket {name} that the data of {workdir} have not ({', '.join(shapes)}); judge on data "
                "of the same resolution."
            )


def load_vision(dataset: data.Dataset) -> Any:
    """The vision encoder of the data set; None where its vectors were given, and nobody knows by which encoder."""
    from encode import encoders

    section = dataset.info["encoders"]["vision"]
    if section.get("precomputed"):
        logging.info("The vectors of %s were precomputed: the vision encoder's own view is not judged.", dataset.path)
        return None
    return encoders.load_vision(section)


def whole(pixels: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """A decoded picture without what it was padded with: the vision encoder never saw that."""
    mask = record["mask"]
    if not mask.size:
        return pixels
    (top, bottom), (left, right) = ((8 * k.min(), 8 * k.max() + 8) for k in np.nonzero(mask))
    return pixels[top:bottom, left:right]


def small(pixels: np.ndarray) -> np.ndarray:
    factor = max(pixels.shape[:2]) // KEPT
    return np.asarray(Image.fromarray(pixels).reduce(factor)) if factor > 1 else pixels


def know(dataset, run, rows, file: Path, views: int, words: str) -> Known:
    """Read once, and kept beside `file`; the mirror image is the second view."""
    places = [(name, int(row)) for name in sorted(rows) for row in rows[name]]
    shapes = {
        "vectors": (len(places), views, dataset.info["widths"]["vision"]),
        "latents": (len(places), views, quality.SIDE**2 * dataset.info["widths"]["latent"]),
        "hashes": (len(places),),
    }
    files = {name: file.with_name(f"{file.name}_{name}.npy") for name in shapes}
    if not all(path.exists() for path in files.values()):
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            kept = {
                name: np.lib.format.open_memmap(
                    stack.enter_context(whole_file(path)), "w+", "S32" if name == "hashes" else np.float32, shapes[name]
                )
                for name, path in files.items()
            }
            for part in kept.values():  # a memory map that meets a full disk kills the process
                with open(part.filename, "rb+") as whole:
                    os.posix_fallocate(whole.fileno(), 0, os.fstat(whole.fileno()).st_size)
            _fill(kept, dataset, run, places, views, words)
            for part in kept.values():
                part.flush()
    arrays = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in files.items()}
    if any(arrays[name].shape != shape for name, shape in shapes.items()):
        raise InputError(f"{file.parent}: its arrays belong to other data; remove this folder.")
    return Known(**arrays, places=places)


def _fill(kept, dataset, run, places, views, words):
    began = said = time.monotonic()
    for start in range(0, len(places), READ):
        part = places[start : start + READ]
        for bucket in sorted({name for name, _ in part}):
            members = [k for k, (name, _) in enumerate(part) if name == bucket]
            records, at = dataset.records(bucket, [part[k][1] for k in members]), [start + k for k in members]
            kept["hashes"][at] = [record["pixel_hash"] for record in records]
            for view, end in enumerate(("", "_flip")[:views]):
                latents = np.stack([record["latent" + end] for record in records]).astype(np.float32)
                kept["latents"][at, view] = quality.thumbnails(data.normalized(latents, run.dataset))
                kept["vectors"][at, view] = np.stack([record["vision" + end] for record in records])
        done = start + len(part)
        if (now := time.monotonic()) - said > SAY:
            said, rate = now, done / (now - began)
            left = duration((len(places) - done) / rate)
            print(f"{done:,} of {len(places):,} {words} images read, {rate:.3g} a second, {left} left.", flush=True)
