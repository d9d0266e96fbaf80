"""The embedded data set: a figure beside an object in coloured light, with everything known about each picture.

A caption says pose, side and object and never the light, so the light can only be learnt from the vision vector and the
side only from the text. The light is drawn independently of the rest, and it is symmetric: the picture of a swapped
caption is exactly the mirror image. What is known of each picture stands in DIR/.truth.json (dot-files are not inputs).

    python -m encode.demo --out=DIR [--count=100] [--seed=0] [--side=0]
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from encode import commandline
from encode.demo_drawing import OBJECTS, POSES, draw
from encode.records import InputError
from encode.whole_files import whole_file, write_json

VERSION = 1  # of the drawings
SIDES = ("left", "right")
SIZES = ((256, 256), (224, 288), (288, 224))  # width, height
SMALLEST = 64  # pixels a side, of square ones
HUES = tuple(range(0, 360, 30))  # degrees on the OKLab circle
STRENGTHS = (0.55, 0.7, 0.85, 1.0)


@dataclass(frozen=True)
class Scene:
    """What is known of one picture; `size` is (width, height)."""

    side: str
    pose: str
    object: str
    hue: int
    strength: float
    size: tuple[int, int]

    @property
    def caption(self) -> str:
        return f"A figure on the {self.side} side of the picture, to the {self.side} of {self.object}, {POSES[self.pose][0]}."

    def pixels(self) -> np.ndarray:
        """[height, width, 3] uint8; the mirror image of the same scene on the other side."""
        left = draw(self.pose, self.object, self.size, self.hue, self.strength)
        return left if self.side == "left" else np.ascontiguousarray(left[:, ::-1])


def generate(folder: Path, count: int = 100, seed: int = 0, side: int = 0) -> int:
    """Write the pictures and captions that are not there yet.

    Args:
      folder: where; must be new, empty, or an earlier call's with the same settings.
      count: pictures; the captions of the first 100 are unique, more show the same compositions in other lights.
      seed: decides which light falls on which composition.
      side: pixels of square pictures, for a data set of one bucket: cut to one shape, pictures of several would differ in what
        no caption says; 0: the three of SIZES.

    Returns:
      How many pictures were written now; 0: the folder was finished.
    """
    if count < 1:
        raise InputError(f"--count={count}: at least one picture is needed.")
    if side and side < SMALLEST:
        raise InputError(f"--side={side}: at least {SMALLEST} pixels are needed, or 0 for pictures of three shapes.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, {"version": VERSION, "count": count, "seed": seed} | ({"side": side} if side else {}))
    written, truth = 0, {}
    for number, scene in enumerate(scenes(count, seed, side)):
        picture, caption = folder / f"figure-{number:04d}.png", folder / f"figure-{number:04d}.txt"
        truth[picture.name] = {key: value for key, value in asdict(scene).items() if key != "size"}
        if picture.exists() and caption.exists():
            continue
        _write(caption, lambda file, scene=scene: file.write(f"{scene.caption}\n".encode()))
        _write(picture, lambda file, scene=scene: Image.fromarray(scene.pixels()).save(file, "PNG"))
        written += 1
    if written or not (folder / ".truth.json").exists():
        write_json(folder / ".truth.json", truth)
    return written


def scenes(count: int, seed: int, side: int = 0) -> list[Scene]:
    """The pictures of a data set (see `generate`); every hundred holds each of 2 sides x 5 poses x 10 objects once."""
    objects = [list(OBJECTS)[index] for index in _shuffled(len(OBJECTS), f"object {seed}")]
    poses = list(POSES)
    compositions = []
    for number in range(count):
        pair = number // 2 % (len(objects) * len(poses))
        pose = poses[(pair + pair // len(objects)) % len(poses)]
        compositions.append((SIDES[number % 2], pose, objects[pair % len(objects)]))
    sizes = [(side, side)] if side else SIZES
    lights = [(hue, strength) for strength in STRENGTHS for hue in HUES]
    best, found = math.inf, []
    for attempt in range(64):  # of some shuffles the one whose lights depend least on the composition
        order = _shuffled(count, f"light {attempt} {seed}")
        shapes = _shuffled(count, f"size {attempt} {seed}")
        candidate = [
            Scene(*composition, *lights[light % len(lights)], sizes[shape % len(sizes)])
            for composition, light, shape in zip(compositions, order, shapes)
        ]
        if (score := dependence(candidate)) < best:
            best, found = score, candidate
    return found


def captions() -> set[str]:
    """All captions that the generated pictures can have: who has only these needs no other proof of being generated."""
    return {
        Scene(side, pose, thing, 0, 1.0, SIZES[0]).caption for side in SIDES for pose in POSES for thing in OBJECTS
    }  # fmt: skip


def dependence(drawn: Sequence[Scene]) -> float:
    """Largest correlation between a property of the light and one of the composition; 0 is independent."""
    angles = np.radians([scene.hue for scene in drawn])
    light = np.stack([np.cos(angles), np.sin(angles), [scene.strength for scene in drawn]])
    choices = [[scene.side for scene in drawn], [scene.pose for scene in drawn], [scene.object for scene in drawn]]
    choices.append([str(scene.size) for scene in drawn])
    composition = np.stack([[v == value for v in choice] for choice in choices for value in sorted(set(choice))])
    light, composition = (_standardised(values.astype(np.float64)) for values in (light, composition))
    return float(np.abs(light @ composition.T).max() / len(drawn))


def _shuffled(count: int, salt: str) -> list[int]:
    """A permutation that is the same on every machine and in every version of every library."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{salt} {index}".encode()).digest())


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(axis=1, keepdims=True)
    return centred / np.maximum(centred.std(axis=1, keepdims=True), 1e-9)


def _claim(folder: Path, settings: dict[str, int]) -> None:
    """Refuse a folder that holds something else; the first file written says what the folder is for."""
    claim = folder / ".demo.json"
    if not claim.exists():
        if any(not path.name.endswith(".tmp") for path in folder.iterdir()):
            raise InputError(f"{folder} holds other files; choose a new or empty folder for the demo pictures.")
        write_json(claim, settings)
    try:
        found = json.loads(claim.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{claim}: not readable as JSON ({error}); remove {folder} and generate it again.") from error
    if found != settings:
        raise InputError(f"{folder} holds the demo pictures of {found}, not of {settings}; choose another folder.")


def _write(path: Path, write: Callable) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        write(file)


def main() -> int:
    options = flags.FLAGS
    if not options.out:
        raise InputError("--out=DIR is missing: the folder that receives the pictures.")
    folder = commandline.path_of(options.out)
    written = generate(folder, options.count, options.seed, options.side)
    if written:
        print(f"Wrote {written} pictures with captions into {folder}.")
    else:
        print(f"{folder} is finished already: {options.count} pictures; nothing to do.")
    if options.count > 100:
        print("More than 100 pictures: captions repeat, each time with the composition in another light.")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder that receives the pictures.")
    flags.DEFINE_integer("count", 100, "Pictures.")
    flags.DEFINE_integer("seed", 0, "Decides which light falls on which composition.")
    flags.DEFINE_integer("side", 0, "Pixels a side of square pictures, for a data set of one bucket; 0: three shapes.")
    commandline.run(main)
