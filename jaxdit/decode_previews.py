"""python -m jaxdit.decode_previews --workdir=DIR: the trainer's child, which decodes previews where no GPU is seen.

The trainer leaves latents in WORKDIR/previews/STEP; this makes pictures of all that wait, and ends. It knows nothing of
JAX, holds a lock so that two never work in one folder, and may be killed at any moment: latents are removed only when all
their pictures are there. With --encode it turns a person's own sentences and references into conditions instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from encode import commandline
from encode.records import InputError, read_json
from encode.whole_files import whole_file

LATENTS, ENCODED = "latents.npz", ".encoded.npz.tmp"
ROOT = Path(__file__).resolve().parents[1]
MAX_PIXELS = 500_000_000  # of a reference, as in conditions.py


def command(workdir: Path) -> list[str]:
    """What starts this child."""
    return [sys.executable, "-m", "jaxdit.decode_previews", f"--workdir={workdir}"]


def without_gpu() -> dict[str, str]:
    """Its environment: it finds this code wherever the trainer was started, and no card."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def last_line(words: str) -> str:
    """Its reason for failing, out of what it wrote to the standard error stream."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else ""


def waiting(folder: Path) -> list[int]:
    """The steps of WORKDIR/previews whose latents have no pictures yet, ascending."""
    return sorted(int(path.parent.name) for path in folder.glob(f"*/{LATENTS}") if path.parent.name.isdigit())


def decode(workdir: Path) -> None:
    """Make the pictures of all latents that wait, those included that come while this runs.

    Raises:
      InputError: the image decoder cannot be loaded here.
      RuntimeError: latents could not be decoded; they stay, and the others are done.
    """
    from encode import encoders

    folder = workdir / "previews"
    with _alone(folder):
        for left in folder.glob("*/.*.png.tmp"):
            left.unlink(missing_ok=True)
        # float32, since bfloat16 convolutions are quick on some processors alone (twice as quick with AVX-512 for bfloat16).
        vae = encoders.load_vae({**_encoders(workdir)["vae"], "dtype": "float32"}, "cpu")
        words = _words(folder)
        failed: dict[int, str] = {}
        while steps := [step for step in waiting(folder) if step not in failed]:
            for step in steps:
                try:
                    _decode_step(vae, folder / str(step), words)
                except Exception as error:  # a full disk, damaged latents, no memory: the other steps may be well
                    failed[step] = f"step {step}: {str(error) or type(error).__name__}"
    if failed:
        raise RuntimeError("; ".join(failed.values()))


def _decode_step(vae: Any, folder: Path, words: Mapping[str, Mapping[str, str]]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = folder / LATENTS
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as latents:
        for name, latent in latents.items():
            info = PngInfo()
            for key, value in {"step": folder.name, **words.get(name, {})}.items():
                info.add_itxt(key, value)
            with whole_file(folder / f"{name}.png") as temporary:
                Image.fromarray(vae.decode(latent[None])[0]).save(temporary, "PNG", pnginfo=info)
        # A run that came past this step again may have left new latents meanwhile: then those still wait.
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            path.unlink()


def encode(workdir: Path, prompts: list[str], references: list[str]) -> None:
    """Encode sentences and pictures as the data set was, into WORKDIR/previews/.encoded.npz.tmp.

    Writes text_K [tokens, width] float32 of prompt K, vision_K [width] float32 of reference K, and cut: the prompts that
    are longer than the encoder takes.

    Raises:
      InputError: a reference cannot be read, or an encoder is missing or not the data set's; the message names it.
    """
    from encode import encoders, images

    sections, stored = _encoders(workdir), _description(workdir)["fingerprint"]
    pictures = []
    for reference in references:
        try:
            pictures.append(images.decode(commandline.path_of(reference), MAX_PIXELS))
        except (images.ImageProblem, OSError) as error:
            raise InputError(f"sample.references: {reference}: {error}.") from error
    found, cut, other = {}, [], "bring that one, or leave sample.prompts and sample.references empty"
    if prompts:
        text = encoders.load_text(sections["text"], "cpu")
        encoders.refuse_another("text", text, stored, other)
        found |= {f"text_{number}": tokens for number, tokens in enumerate(text.encode(prompts))}
        cut = [number for number, prompt in enumerate(prompts) if text.count_tokens(prompt) > text.max_tokens]
    if pictures:
        vision = encoders.load_vision(sections["vision"], "cpu")
        encoders.refuse_another("vision", vision, stored, other)
        found |= {f"vision_{number}": vision.encode([pixels])[0] for number, pixels in enumerate(pictures)}
    with open(workdir / "previews" / ENCODED, "wb") as file:
        np.savez(file, cut=np.array(cut, np.int32), **found)


def _description(workdir: Path) -> dict[str, Any]:
    return read_json(workdir / "dataset.json", "restore it from the data set, OUT/RES/dataset.json")


def _encoders(workdir: Path) -> Mapping[str, Any]:
    return _description(workdir)["encoders"]


def _words(folder: Path) -> dict[str, dict[str, str]]:
    """What each picture shows, by its name, for the PNG files."""
    path = folder / "previews.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {row["name"]: {key: row[key] for key in ("prompt", "reference", "note")} for row in rows}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for the folder's lock: the child of a trainer that was killed finishes first."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    workdir = commandline.path_of(flags.FLAGS.workdir)
    if not (workdir / "previews").is_dir():
        raise InputError(f"{workdir}: no folder previews is there, so nothing waits to be decoded.")
    if flags.FLAGS.encode:
        encode(workdir, **json.load(sys.stdin))
    else:
        os.nice(19)  # training and its reading threads come first
        try:
            decode(workdir)
        except RuntimeError as error:
            return commandline.fail(str(error))
    return 0


if __name__ == "__main__":
    from absl import flags

    flags.DEFINE_string("workdir", None, "Working folder of a training run.", required=True)
    flags.DEFINE_bool("encode", False, "Encode the sentences and references that come as JSON on the standard input.")
    commandline.run(main)
