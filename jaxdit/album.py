"""A folder of drawn pictures: PNG files that hold the settings that made them, under names that are never taken twice.

A name says the prompt and the seed. Where a file of that name stands already, its settings decide: the same ones are the
picture that is wanted, other ones get a name of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encode import commandline
from encode.records import InputError
from encode.whole_files import whole_file
from jaxdit.wishes import ID, Wish

LONGEST = 48  # signs of a prompt in a file's name
FILES = ("config.json", "dataset.json")  # what a working folder says of its model


class Album:
    """The pictures of one folder, by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._planned: dict[str, Mapping[str, str]] = {}

    def place(self, stem: str, settings: Mapping[str, str]) -> tuple[str, bool]:
        """(name of the file, whether it is there or planned already with these very settings)."""
        for number in itertools.count(1):
            name = f"{stem}{'' if number == 1 else f'-{number}'}.png"
            known = self._planned[name] if name in self._planned else read_settings(self.folder / name)
            if known is None or all(known.get(key) == value for key, value in settings.items()):
                self._planned[name] = settings
                return name, known is not None
        raise AssertionError

    def save(self, name: str, picture: Any, settings: Mapping[str, str]) -> None:
        """Write a picture ([height, width, 3] uint8, or a Pillow image) whole or not at all."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, value in settings.items():
            info.add_itxt(key, value)
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        with whole_file(self.folder / name) as temporary:
            image.save(temporary, "PNG", pnginfo=info)

    def pixels(self, name: str) -> np.ndarray:
        """[height, width, 3] uint8."""
        from PIL import Image

        with Image.open(self.folder / name) as image:
            return np.asarray(image.convert("RGB"))


def read_settings(path: Path) -> dict[str, str] | None:
    """What a PNG says of how it was made; {} where it says nothing or is no PNG, None where there is no file."""
    from PIL import Image

    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            image.load()  # text may stand behind the pixels; a file that is cut says nothing
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except Exception:  # Pillow raises many things
        return {}


def config_hash(workdir: Path) -> str:
    """16 hexadecimal characters of what a training is, and its data: of all that decides the weights of a step.

    Not where the data lie, how long the training is to go on, or how it is watched, which change.
    """
    config, dataset = (json.loads((workdir / name).read_text(encoding="utf-8")) for name in FILES)
    origin = workdir / "origin.json"
    decides = [
        {section: config[section] for section in ("model", "flow", "optim")},
        {name: config["train"].get(name) for name in ("seed", "batch_size", "init_from", "init_weights", "restore")},
        {name: config["data"].get(name) for name in ("normalize_vision", "holdout_fraction")},
        {name: dataset.get(name) for name in ("fingerprint", "latent_mean", "latent_std", "widths", "text_longest")},
        origin.read_text(encoding="utf-8") if origin.exists() else "",
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def refuse_others(out: Path) -> None:
    """Pictures find names of their own; the list and the sheet have one each, and replace nobody else's.

    Raises:
      InputError: names what is in the way.
    """
    try:
        rows = json.loads((out / "samples.json").read_text(encoding="utf-8"))
        ours = isinstance(rows, list) and all(isinstance(row, dict) and "file" in row for row in rows)
    except (OSError, ValueError):
        ours = False
    for name in ("samples.json", "sheet.png"):
        if not ours and (out / name).exists():
            raise InputError(
                f"--out={out}: {name} there is not of jaxdit.sample, and would be replaced; name another folder."
            )


def settings_of(wish: Wish, hashes: Mapping[str, str], common: Mapping[str, str]) -> dict[str, str]:
    """Everything that decides a picture, as the words that its file holds.

    Args:
      wish: what is drawn.
      hashes: of the files that it names, from `conditions.identify`.
      common: what all pictures share: steps, solver, shift, guidance_interval, step, weights, config.
    """
    own = {
        "prompt": wish.prompt,
        "reference": " + ".join(map(plain, wish.references)),
        "reference_hash": " + ".join(hashes.get(name, "") for name in wish.references),
        "mix": numbers(wish.mix),
        "seed": str(wish.seed),
        "size": f"{wish.size[0]}x{wish.size[1]}",
        "guidance_text": numbers([wish.text]),
        "guidance_vision": numbers([wish.vision]),
        "init": plain(wish.init),
        "init_hash": hashes.get(wish.init, ""),
        "strength": numbers([wish.strength]) if wish.init else "",
    }
    return own | dict(common)


def command_of(wish: Wish, workdir: Path, settings: Mapping[str, str]) -> str:
    """The command that draws the picture again, into the folder "again"."""
    flags = {"workdir": str(workdir.resolve()), "out": "again", "step": settings["step"]}
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += ["--raw"] if settings["weights"] == "raw" else []
    words += [f"--prompt={wish.prompt}"] if wish.prompt or not wish.references else []
    words += [f"--reference={plain(name)}" for name in wish.references]
    names = ("mix", "seed", "size", "steps", "solver", "shift", "guidance_text", "guidance_vision", "guidance_interval",
             "init", "strength")  # fmt: skip
    words += [f"--{name}={settings[name]}" for name in names if settings[name]]
    return commandline.command("jaxdit.sample", words)


def stem_of(wish: Wish) -> str:
    """The beginning of the file's name: the prompt's first words, else the name of a reference or of init, and the seed."""
    words = _slug(wish.prompt) or _slug(
        " ".join(Path(name.removeprefix(ID)).stem for name in wish.references or (wish.init,))
    )
    return f"{words or 'without-words'}-s{wish.seed}"


def numbers(values: Sequence[float]) -> str:
    """As a flag takes them, so that reading them gives the same numbers."""
    return ",".join(repr(float(value)).removesuffix(".0") for value in values)


def plain(name: str) -> str:
    """A file's name, which may be any bytes, as words that a PNG and JSON hold."""
    return os.fsencode(name).decode(errors="replace")


def _slug(words: str) -> str:
    """Letters and digits of any script, cut behind a whole word; a name of a file is at most 255 bytes, a letter up to four."""
    whole = re.sub(r"[\W_]+", "-", plain(words).lower()).strip("-")
    return whole if len(whole) <= LONGEST else whole[:LONGEST].rpartition("-")[0] or whole[:LONGEST]
