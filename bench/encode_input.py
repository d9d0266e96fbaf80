"""Reading photographs: how fast one core decodes, turns, converts and resizes them, against what others would use.

    .venv/bin/pip install "pyvips[binary]==3.2.0" opencv-python-headless
    .venv/bin/python -m bench.encode_input [--rounds=5]

Generated JPEGs of 12 megapixels (photographs of scikit-image enlarged, with a sensor's noise, EXIF orientation 6, half of
them with a Display P3 profile as phones write it) are brought to their bucket at 1024 and at 256 by every rival in turn, one
thread, in processor seconds. PSNR is against the whole path in high precision: full decode, Lanczos over floats. A second
table asks whether resizing in linear light would matter. Writes bench/results/encode-input-DEVICE.json.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import skimage
from absl import flags
from PIL import Image, ImageCms, ImageOps

from bench import device
from encode import commandline, images

os.environ["VIPS_CONCURRENCY"] = "1"
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that every rival reads every picture; the fastest counts.")
SIZES = ((896, 1152), (448, 576), (224, 288))  # width, height: the bucket of 3:4 at 1024, 512 and 256


def photographs(folder: Path) -> list[Path]:
    """Four photographs of 4000 x 3000 pixels as a phone stores them."""
    rng, paths = np.random.default_rng(0), []
    for number, name in enumerate(("astronaut", "coffee", "chelsea", "rocket")):
        source = Image.fromarray(getattr(skimage.data, name)())
        side = min(source.width * 3, source.height * 4)
        source = source.crop((0, 0, side // 3, side // 4)).resize((4000, 3000), Image.Resampling.BICUBIC)
        pixels = np.asarray(source).astype(np.float32) + rng.normal(0, 4, (3000, 4000, 3)).astype(np.float32)
        exif = Image.Exif()
        exif[0x0112] = 6
        paths.append(folder / f"{name}.jpg")
        extra = {"icc_profile": _display_p3()} if number % 2 else {}
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(paths[-1], quality=92, exif=exif, **extra)
    return paths


def _display_p3() -> bytes:
    """sRGB's profile with the primaries of Display P3 (D50 adapted, as in Apple's profile)."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for tag, values in primaries.items():
        entry = profile.index(tag, 128)
        offset = int.from_bytes(profile[entry + 4 : entry + 8], "big")
        for place, value in enumerate(values):
            start = offset + 8 + 4 * place
            profile[start : start + 4] = round(value * 65536).to_bytes(4, "big", signed=True)
    return bytes(profile)


def lanczos(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """[height, width, 3] float32: Pillow's Lanczos filter over floats, so without its rounding to 8 bits in between."""
    planes = [Image.fromarray(pixels[..., channel].astype(np.float32)) for channel in range(3)]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS)) for plane in planes], -1)


def _ours(path: Path, size: tuple[int, int]) -> np.ndarray:
    return images.resize(images.decode(path, 10**9), *size)


def _pillow_thumbnail(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The usual three lines: turn, thumbnail (which decodes at a reduced scale), RGB; colours as they are."""
    image = Image.open(path)
    image.thumbnail(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB").resize(size, Image.Resampling.LANCZOS))


def _pillow_draft(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Reduced decode to at least twice the target, profile, orientation, Lanczos: what ours would be with DCT scaling."""
    image = Image.open(path)
    image.draft("RGB", (2 * size[1], 2 * size[0]))
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if profile:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def _vips(path: Path, size: tuple[int, int]) -> np.ndarray:
    """pyvips' thumbnail: shrink on load, profile converted, turned."""
    import pyvips

    image = pyvips.Image.thumbnail(str(path), size[0], height=size[1], size="force", output_profile="srgb")
    return image.numpy()[..., :3]


def _opencv(path: Path, size: tuple[int, int]) -> np.ndarray:
    """OpenCV: full decode, turned, area interpolation; profiles are ignored."""
    import cv2

    return cv2.cvtColor(cv2.resize(cv2.imread(str(path)), size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)


RIVALS: dict[str, Callable[[Path, tuple[int, int]], np.ndarray]] = {
    "ours: full decode, Lanczos": _ours,
    "Pillow draft, then ours": _pillow_draft,
    "Pillow thumbnail": _pillow_thumbnail,
    "pyvips thumbnail": _vips,
    "OpenCV imread, INTER_AREA": _opencv,
}


def race(paths: list[Path], size: tuple[int, int], rounds: int) -> dict:
    """Processor seconds a picture of every rival, interleaved, and PSNR against the exact path."""
    exact = {path: np.clip(lanczos(images.decode(path, 10**9), *size), 0, 255) for path in paths}
    plain = [path for number, path in enumerate(paths) if number % 2 == 0]  # without a profile to ignore
    best: dict[str, dict[Path, float]] = {name: {} for name in RIVALS}
    found: dict[str, dict[Path, np.ndarray]] = {name: {} for name in RIVALS}
    missing = set()
    for _ in range(rounds):
        for path in paths:
            for name, read in RIVALS.items():
                if name in missing:
                    continue
                began = time.process_time()
                try:
                    found[name][path] = read(path, size)
                except ImportError as error:
                    print(f"{name} is left out: {error}.")
                    missing.add(name)
                    continue
                seconds = time.process_time() - began
                best[name][path] = min(seconds, best[name].get(path, np.inf))
    return {
        name: {
            "seconds a picture": round(float(np.mean(list(best[name].values()))), 4),
            "pictures a second and core": round(1 / float(np.mean(list(best[name].values()))), 2),
            "PSNR without profile, dB": _decibels([(found[name][path], exact[path]) for path in plain]),
            "PSNR with Display P3, dB": _decibels([(found[name][path], exact[path]) for path in paths[1::2]]),
        }
        for name in RIVALS
        if name not in missing
    }


def _decibels(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """PSNR over all pairs together."""
    errors = [np.mean((one.astype(np.float64) - other) ** 2) for one, other in pairs]
    return round(float(10 * np.log10(255**2 / np.mean(errors))), 1)


def stages(path: Path, rounds: int) -> dict[str, float]:
    """Processor milliseconds of what a worker does to one picture, for the three resolutions and the vision model."""
    whole = images.decode(path, 10**9)
    work = {
        "decode, colour, orientation": lambda: images.decode(path, 10**9),
        "hash of the pixels": lambda: images.pixel_hash(whole),
    } | {f"resize to {w}x{h}": lambda w=w, h=h: images.resize(whole, w, h) for w, h in SIZES}
    found = {}
    for name, call in work.items():
        times = []
        for _ in range(rounds):
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
        found[name] = round(1000 * min(times), 1)
    return found


def light(paths: list[Path]) -> dict[str, dict[str, float]]:
    """Lanczos over sRGB values against Lanczos in linear light: PSNR between them, mean difference in levels."""
    fine = np.zeros((3000, 4000, 3), np.uint8)
    fine[::2, ::2] = 255  # a quarter of white points on black: the worst that light can do
    sky = np.zeros((3000, 4000, 3), np.uint8)
    places = np.random.default_rng(0).integers(0, (3000, 4000), (3000, 2))
    sky[places[:, 0], places[:, 1]] = 255
    pictures = {path.stem: images.decode(path, 10**9) for path in paths} | {"points": fine, "stars": sky}
    found = {}
    for name, pixels in pictures.items():
        size = SIZES[0] if pixels.shape[0] > pixels.shape[1] else SIZES[0][::-1]
        encoded = np.clip(lanczos(pixels, *size), 0, 255)
        linear = _encode(np.clip(lanczos(_decode(pixels), *size), 0, 1))
        found[name] = {
            "PSNR, dB": _decibels([(encoded, linear)]),
            "mean difference, levels": round(float((linear - encoded).mean()), 2),
        }
    return found


def _decode(pixels: np.ndarray) -> np.ndarray:
    values = np.arange(256) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)[pixels]


def _encode(linear: np.ndarray) -> np.ndarray:
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def main() -> int:
    logging.getLogger("pyvips").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder))
        result = {
            "device": f"{device.processor()}, one thread",
            "versions": {"pillow": PIL.__version__, "numpy": np.__version__},
            "command": f"python -m bench.encode_input --rounds={ROUNDS.value}",
            "pictures": "4 JPEGs, 4000 x 3000, quality 92, orientation 6, two of them Display P3",
            "race": {f"to {w}x{h}": race(paths, (w, h), ROUNDS.value) for w, h in (SIZES[0], SIZES[2])},
            "milliseconds of a worker": stages(paths[0], ROUNDS.value),
            "linear light": light(paths),
        }
    device.write("encode-input", device.processor(), result)
    return 0


if __name__ == "__main__":
    commandline.run(main)
