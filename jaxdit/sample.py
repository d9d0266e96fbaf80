"""python -m jaxdit.sample --workdir=DIR --prompt="..." [--reference=picture.png] --out=DIR

Pictures from the averaged weights (EMA) of a working folder: what a sentence says, in the feeling of a reference picture.
Several --prompt make several pictures; one --reference serves all of them, or give one a prompt. Without a prompt, eight
captions of the training data are drawn, each in the light of another of its pictures.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's encoders need room on the same card

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from encode import commandline
from encode.records import InputError, write_json
from jaxdit import data, trained


def latent_size(width: int, height: int, patch: int) -> tuple[int, int]:
    """(height, width) of the latent of a picture of that size in pixels.

    Raises:
      InputError: a side is not a multiple of 8 x patch; names the nearest size that is.
    """
    unit = 8 * patch
    nearest = [max(unit, round(side / unit) * unit) for side in (width, height)]
    if nearest != [width, height]:
        raise InputError(
            f"--width={width} --height={height}: sides must be multiples of {unit}; the nearest size is "
            f"{nearest[0]}x{nearest[1]}."
        )
    return height // 8, width // 8


def guidance(text: float, vision: float, texts: Sequence, visions: Sequence) -> tuple[float, float]:
    """The two weights, made equal or one where a condition is absent everywhere: the same velocity from fewer evaluations."""
    if all(vision_vector is None for vision_vector in visions):
        vision = 1.0
    if all(tokens is None for tokens in texts):
        text = vision
    return text, vision


def from_training_data(
    run: trained.Trained, count: int
) -> tuple[list[str], list[np.ndarray], list[np.ndarray], list[str]]:
    """Captions spread over the data set, each with the vision vector of another picture: (captions, texts, visions, ids)."""
    dataset = data.Dataset(run.config["data"]["path"])
    places = [(name, row) for name in dataset.buckets for row in range(len(dataset.index[name]))]
    count = min(count, len(places))
    chosen = [places[round(k * (len(places) - 1) / max(count - 1, 1))] for k in range(count)]
    own = [dataset.records(name, [row])[0] for name, row in chosen]
    half = len(own) // 2
    others = own[half:] + own[:half]
    return (
        [record["caption"].decode() for record in own],
        [record["text"] for record in own],
        [record["vision"] for record in others],
        [record["id"].decode() for record in others],
    )


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Working folder of a training run.", required=True)
    flags.DEFINE_string("out", None, "Folder for the pictures.", required=True)
    flags.DEFINE_multi_string("prompt", [], "What the picture shows; may be given several times.")
    flags.DEFINE_multi_string("reference", [], "A picture whose feeling is wanted: one for all, or one a prompt.")
    flags.DEFINE_integer("width", None, "Width in pixels; by default that of the fullest bucket.")
    flags.DEFINE_integer("height", None, "Height in pixels.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_integer("step", None, "Which saved step; by default the newest.")
    flags.DEFINE_integer("steps", None, "Euler steps; by default the configuration's sample.steps.")
    flags.DEFINE_float("text_guidance", None, "Weight of the sentence; by default sample.text_guidance.")
    flags.DEFINE_float("vision_guidance", None, "Weight of the reference; by default sample.vision_guidance.")


def main() -> int:
    if flags.FLAGS.steps is not None and flags.FLAGS.steps < 1:
        raise InputError(f"--steps={flags.FLAGS.steps}: at least one Euler step is needed.")
    run = trained.load(commandline.path_of(flags.FLAGS.workdir), step=flags.FLAGS.step)
    defaults = run.config["sample"]
    bucket = max(run.dataset["buckets"].items(), key=lambda item: item[1]["count"])[0]
    width, height = map(int, bucket.split("x"))
    size = latent_size(flags.FLAGS.width or width, flags.FLAGS.height or height, run.config["model"]["patch"])
    prompts, texts, visions, references, failed = _conditions(run)
    text_weight, vision_weight = guidance(
        defaults["text_guidance"] if flags.FLAGS.text_guidance is None else flags.FLAGS.text_guidance,
        defaults["vision_guidance"] if flags.FLAGS.vision_guidance is None else flags.FLAGS.vision_guidance,
        texts,
        visions,
    )
    from encode import encoders

    vae = encoders.load_vae(run.dataset["encoders"]["vae"])
    out = commandline.path_of(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (prompt, text, vision, reference) in enumerate(zip(prompts, texts, visions, references)):
        latent = trained.generate(
            run,
            trained.conditions_of([text], [vision], run),
            (*size, run.dataset["widths"]["latent"]),
            [number],
            seed=flags.FLAGS.seed,
            steps=flags.FLAGS.steps or defaults["steps"],
            shift=defaults["shift"],
            text=text_weight,
            vision=vision_weight,
        )
        name = f"{number:03d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60] or 'reference'}.png"
        _save(
            vae.decode(latent)[0], out / name, {"prompt": prompt, "reference": reference, "seed": str(flags.FLAGS.seed)}
        )
        rows.append({"file": name, "prompt": prompt, "reference": reference})
        print(f"{out / name}: {prompt or reference or 'neither sentence nor reference'}")
    if rows:
        write_json(out / "samples.json", rows)
    return commandline.fail("; ".join(failed), 2) if failed else 0


def _conditions(run: trained.Trained):
    """(prompts, texts, visions, names of the references, errors): what the flags ask for, encoded as the data set was."""
    if not flags.FLAGS.prompt and not flags.FLAGS.reference:
        prompts, texts, visions, names = from_training_data(run, 8)
        return prompts, texts, visions, names, []
    from encode import encoders, images

    count = max(len(flags.FLAGS.prompt), len(flags.FLAGS.reference), 1)
    given, pictures = len(flags.FLAGS.prompt), len(flags.FLAGS.reference)
    if pictures not in (0, 1, count) or given not in (0, count):
        raise InputError(f"{given} prompts and {pictures} references: give one reference for all, or one a prompt.")
    for prompt in flags.FLAGS.prompt:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError(f"--prompt={prompt!a}: this is not UTF-8; set the terminal to UTF-8.")
    prompts = [prompt.strip() for prompt in flags.FLAGS.prompt] or [""] * count
    references = list(flags.FLAGS.reference) * (count if len(flags.FLAGS.reference) == 1 else 1) or [""] * count
    sections, visions, failed = run.dataset["encoders"], [], []
    encoder = encoders.load_vision(sections["vision"]) if flags.FLAGS.reference else None
    wanted = []
    for prompt, reference in zip(prompts, references):
        try:
            visions.append(encoder.encode([images.decode(Path(reference), 500_000_000)])[0] if reference else None)
            wanted.append((prompt, reference))
        except (images.ImageProblem, OSError) as error:
            failed.append(f"--reference={reference}: {error}")
    text_encoder = encoders.load_text(sections["text"]) if flags.FLAGS.prompt else None
    texts = [text_encoder.encode([prompt])[0] if prompt else None for prompt, _ in wanted]
    return [prompt for prompt, _ in wanted], texts, visions, [reference for _, reference in wanted], failed


def _save(pixels: np.ndarray, path: Path, words: Mapping[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in words.items():
        info.add_itxt(name, value)
    Image.fromarray(pixels).save(path, pnginfo=info)


if __name__ == "__main__":
    define_flags()
    commandline.run(main)
