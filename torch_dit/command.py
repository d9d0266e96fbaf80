"""python pipeline.py --prompt="a red boat on the left" [--reference=evening.jpg] --out=PICTURES

Pictures from the model in this folder, drawn by torch_dit/pipeline.py: PyTorch, diffusers and transformers, no JAX.
Several --reference are mixed by --weights. Run python pipeline.py --help for the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from torch_dit.pipeline import JaxditPipeline


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
    try:
        references = [Image.open(path) for path in given.reference]
    except (OSError, UnidentifiedImageError) as error:
        parser.error(f"--reference: {error}")
    try:
        pipeline = JaxditPipeline.from_pretrained(Path(__file__).resolve().parent).to(given.device)
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
    except ValueError as error:
        parser.error(str(error))
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images):
        image.save(out / f"{seed}.png")
        print(out / f"{seed}.png")


if __name__ == "__main__":
    main()
