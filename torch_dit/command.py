"""python pipeline.py --prompt="a red boat on the left" [--reference=evening.jpg] --out=PICTURES

Pictures from the model in this folder, drawn by torch_dit/pipeline.py: PyTorch, diffusers and transformers, no JAX.
Several --reference are mixed by --weights. Run python pipeline.py --help for the rest.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError

from torch_dit.encoders import upright
from torch_dit.pipeline import JaxditPipeline

FILES = ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json")
FILES += ("transformer/diffusion_pytorch_model.safetensors",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="", help="what the picture shows; none draws without a sentence")
    parser.add_argument("--reference", action="append", default=[], help="a picture whose feeling is wanted")
    parser.add_argument("--weights", type=float, nargs="*", help="of several references")
    parser.add_argument("--out", default="pictures", help="folder for the pictures")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance_text", type=float)
    parser.add_argument("--guidance_vision", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next is seed + 1")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    try:
        width, height = map(int, given.size.split("x")) if given.size else (None, None)
    except ValueError:
        parser.error(f"--size={given.size}: WIDTHxHEIGHT in pixels is wanted, as in 512x512")
    for name, least in (("count", 1), ("steps", 1), ("seed", 0)):
        if (value := getattr(given, name)) is not None and value < least:
            parser.error(f"--{name}={value}: at least {least} is wanted")
    for name in ("guidance_text", "guidance_vision"):
        if (value := getattr(given, name)) is not None and not math.isfinite(value):
            parser.error(f"--{name}={value}: a number is wanted")
    if width is not None and min(width, height) < 1:
        parser.error(f"--size={given.size}: sides above 0 are wanted")
    here, out = Path(__file__).resolve().parent, Path(given.out)
    for name in FILES:
        if not (here / name).is_file():
            parser.error(f"{here / name} is missing; copy or export the folder again")
    try:
        references = [upright(Image.open(path)) for path in given.reference]
    except UnidentifiedImageError as error:
        parser.error(f"--reference: {error}; of HEIC, AVIF and JPEG XL make a JPEG or PNG first")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        parser.error(f"--reference: {error}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out={out}: this folder cannot be made ({error.strerror})")
    try:
        pipeline = JaxditPipeline.from_pretrained(here).to(given.device)
        seeds = range(given.seed, given.seed + given.count)
        images = pipeline(
            given.prompt,
            reference=references or None,
            reference_weights=given.weights,
            width=width,
            height=height,
            num_inference_steps=given.steps,
            guidance_text=given.guidance_text,
            guidance_vision=given.guidance_vision,
            num_images_per_prompt=given.count,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
    except (ValueError, AssertionError, OSError, SafetensorError) as error:  # PyTorch asserts that there is a card
        parser.error(str(error))
    for seed, image in zip(seeds, images):
        path = next(path for path in _names(out, seed) if not path.exists())
        words = PngInfo()
        command = shlex.join(["python", *sys.argv])
        for name, value in {"prompt": given.prompt, "seed": str(seed), "command": command}.items():
            # A file's name may be any bytes.
            words.add_itxt(name, value.encode("utf-8", "surrogateescape").decode(errors="replace"))
        image.save(path, pnginfo=words)
        print(path)


def _names(out: Path, seed: int) -> Iterator[Path]:
    """0.png, 0-2.png, ...: no picture takes the place of another."""
    yield out / f"{seed}.png"
    for number in itertools.count(2):
        yield out / f"{seed}-{number}.png"


if __name__ == "__main__":
    main()
