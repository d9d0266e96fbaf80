"""What is to be drawn, as plain data: wishes out of flags, of a list of prompts (one a line), or of JSON lines.

A line of JSON says of one wish what the flags say of all: prompt, reference, mix, seed, size or aspect, scales, count, init,
strength. Whatever is wrong is one sentence that names the flag or the line; nothing here reads a picture.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from encode.records import InputError

FIELDS = ("prompt", "reference", "mix", "seed", "size", "aspect", "scales", "count", "init", "strength")
ID = "id:"  # before the name of an image of the data set, where a file could be meant
STRENGTH = 0.6  # of a picture to start from, where nothing else is said
LARGEST_SEED = 2**32 - 1
CLOSE = 1.05  # an aspect that is met this well needs no word


@dataclass(frozen=True)
class Wish:
    """One picture to draw.

    Attributes:
      prompt: "" is no sentence.
      references: none, one, or two to be mixed: pictures, vectors, or "id:" and the id of an image of the data set.
      mix: their weights, which sum to 1; empty where there are not two.
      seed: decides the noise, whatever else is drawn.
      size: (width, height) in pixels.
      text, vision: guidance weights.
      init: a picture to start from, or "".
      strength: t in (0, 1] at which init enters.
      where: the flag or line that asks for it.
    """

    prompt: str
    references: tuple[str, ...]
    mix: tuple[float, ...]
    seed: int
    size: tuple[int, int]
    text: float
    vision: float
    init: str
    strength: float
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Shapes:
    """The sizes that a model draws: multiples of `unit`, and the buckets (WIDTHxHEIGHT: images) it was trained on."""

    unit: int
    buckets: Mapping[str, int]

    def usual(self) -> tuple[int, int]:
        """The fullest bucket."""
        return _pair(max(self.buckets, key=lambda name: self.buckets[name]))

    def nearest(self, aspect: float) -> tuple[int, int]:
        """The bucket whose width / height is nearest; of equal ones the larger."""
        sizes = map(_pair, self.buckets)
        return min(sizes, key=lambda size: (round(_apart(aspect, size[0] / size[1]), 6), -size[0] * size[1]))

    def parse_size(self, words: str, where: str) -> tuple[int, int]:
        """(width, height) of "WIDTHxHEIGHT".

        Raises:
          InputError: not a size, or not on the grid; names the nearest one.
        """
        if not isinstance(words, str) or not re.fullmatch(r"\d{1,5}x\d{1,5}", words):
            raise InputError(f"{where}: size={words!r} is not WIDTHxHEIGHT in pixels, as in {self._example()}.")
        size = _pair(words)
        near = tuple(max(self.unit, round(side / self.unit) * self.unit) for side in size)
        if near != size:
            raise InputError(
                f"{where}: size={words}: sides must be multiples of {self.unit}; the nearest size is {near[0]}x{near[1]}, the "
                f"nearest shape that the model has seen {self._nearest_seen(size)}."
            )
        return size

    def parse_aspect(self, words: str, where: str) -> tuple[int, int]:
        """(width, height) of the bucket nearest to "3:2"."""
        found = re.fullmatch(r"(\d{1,5}(?:\.\d+)?):(\d{1,5}(?:\.\d+)?)", words) if isinstance(words, str) else None
        if not found or not all(float(side) > 0 for side in found.groups()):
            raise InputError(f"{where}: aspect={words!r} is not WIDTH:HEIGHT, as in 3:2.")
        aspect = float(found[1]) / float(found[2])
        size = self.nearest(aspect)
        if _apart(aspect, size[0] / size[1]) > math.log(CLOSE):
            exact = self._exact(size[0] * size[1], aspect)
            print(
                f"{where}: aspect={words}: {size[0]}x{size[1]} is the nearest shape that the model has seen; "
                f"size={exact[0]}x{exact[1]} would be nearer, and new to it."
            )
        return size

    def _exact(self, area: float, aspect: float) -> tuple[int, int]:
        """The size on the grid nearest to that aspect, of about that area."""
        sides = [side / self.unit for side in (math.sqrt(area * aspect), math.sqrt(area / aspect))]
        near = [[max(1, math.floor(side)), math.ceil(side)] for side in sides]
        width, height = min(
            ((w, h) for w in near[0] for h in near[1]), key=lambda size: _apart(aspect, size[0] / size[1])
        )
        return width * self.unit, height * self.unit

    def _nearest_seen(self, size: tuple[int, int]) -> str:
        return "{}x{}".format(*self.nearest(max(size[0], 1) / max(size[1], 1)))

    def _example(self) -> str:
        width, height = self.usual()
        return f"{width}x{height}"


def read_list(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The lines of a file of prompts: ([(where, fields)], problems).

    A name that ends with .jsonl holds an object a line, any other file a prompt a line; empty lines are left out. A line that
    is not UTF-8 is a problem, and the others stay.

    Raises:
      InputError: the file cannot be read, or a line of JSON is no object of known fields.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise InputError(f"--prompts={path}: {error.strerror}.") from error
    if any(b"\0" in line for line in lines):
        raise InputError(f"--prompts={path}: it is no text in UTF-8 (UTF-16?); save it as UTF-8.")
    found, problems = [], []
    for number, raw in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            line = raw.decode().strip()
        except UnicodeDecodeError:
            problems.append(f"{where}: this line is not UTF-8")
            continue
        if line:
            found.append(
                (where, _object(line, where, path.parent) if path.suffix.lower() == ".jsonl" else {"prompt": line})
            )
    return found, problems


def pair_up(
    prompts: Sequence[str], references: Sequence[str], mix: Sequence[float] | None
) -> list[tuple[str, dict[str, Any]]]:
    """[(where, fields)] of the flags: one reference for all prompts, one a prompt, or with mix two for all.

    Raises:
      InputError: the numbers of both do not fit.
    """
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError(f"--prompt={prompt!a}: this is not UTF-8; set the terminal to UTF-8.")
    if mix is not None:
        if len(references) != 2 or len(mix) != 2:
            raise InputError(
                f"--mix has {len(mix)} weights and --reference is given {len(references)} times; a mix is of two."
            )
        rows = [{"prompt": prompt, "reference": list(references), "mix": list(mix)} for prompt in prompts or [""]]
        return [("--mix", row) for row in rows]
    count = max(len(prompts), len(references))
    if len(references) not in (0, 1, count) or len(prompts) not in (0, count):
        raise InputError(
            f"{len(prompts)} prompts and {len(references)} references: give one reference for all, or one a prompt; two "
            "with --mix=0.7,0.3 are mixed."
        )
    spread = list(references) * (count if len(references) == 1 else 1) or [""] * count
    rows = zip(list(prompts) or [""] * count, spread)
    return [(f"--reference={reference}" if reference else "--prompt", {"prompt": prompt, "reference": reference})
            for prompt, reference in rows]  # fmt: skip


def wish(fields: Mapping[str, Any], defaults: Mapping[str, Any], shapes: Shapes, where: str) -> list[Wish]:
    """The pictures that one line asks for, with seeds seed, seed + 1, ...

    Args:
      fields: of the line; see `FIELDS`.
      defaults: what the flags say of every line, scales among it.
      shapes: what sizes there are.
      where: for messages.

    Raises:
      InputError: a value is of the wrong kind or out of range; the message names the line and the field.
    """
    fields = {name: value for name, value in fields.items() if value is not None}  # null: not given
    given = {**defaults, **fields}
    if "size" in fields and "aspect" in fields:
        raise InputError(f"{where}: size and aspect are both given; one of them is enough.")
    if "size" in fields:
        given.pop("aspect", None)
    elif "aspect" in fields:
        given.pop("size", None)
    if given.get("size"):
        size = shapes.parse_size(given["size"], where)
    elif given.get("aspect"):
        size = shapes.parse_aspect(given["aspect"], where)
    else:
        size = given.get("init_size") or shapes.usual()
    prompt, init = (_words(given.get(name, ""), name, where).strip() for name in ("prompt", "init"))
    references, mix = _references(given.get("reference"), given.get("mix"), where)
    scales = _numbers(given["scales"], "scales", where)
    strength = _number(given.get("strength", STRENGTH if init else 1.0), "strength", where)
    if not 0 < strength <= 1:
        raise InputError(f"{where}: strength={strength:g}: from above 0 (init as it is) to 1 (nothing left of it).")
    if strength < 1 and not init:
        raise InputError(f"{where}: strength={strength:g} needs a picture to start from (init).")
    count, seed = (_whole(given.get(name, first), name, where) for name, first in (("count", 1), ("seed", 0)))
    if count < 1:
        raise InputError(f"{where}: count={count}: at least 1 picture is needed.")
    if not 0 <= seed <= LARGEST_SEED + 1 - count:
        more = f" and {count} pictures go on to {seed + count - 1:,}" if count > 1 else ""
        raise InputError(f"{where}: seed={seed}{more}: seeds go from 0 to {LARGEST_SEED:,}.")
    return [
        Wish(prompt, references, mix, seed + number, size, scales[0], scales[1], init, strength, where)
        for number in range(count)
    ]


def grids(
    asked: Sequence[Wish], texts: Sequence[float], visions: Sequence[float]
) -> tuple[list[Wish], list[list[list[int]]]]:
    """Every weight of the text (rows) with every one of the vision vector, for each wish.

    Weights of a condition that a wish has not change nothing, so one of them, its own, will do.

    Returns:
      (wishes of all cells, a grid a wish: rows of places among them).
    """
    cells, tables = [], []
    for wish in asked:
        rows = texts if wish.prompt else [wish.text]
        columns = visions if wish.references else [wish.vision]
        first, width = len(cells), len(columns)
        cells += [replace(wish, text=text, vision=vision) for text in rows for vision in columns]
        tables.append([list(range(first + k * width, first + (k + 1) * width)) for k in range(len(rows))])
    return cells, tables


def _object(line: str, where: str, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        words = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"{where}: not JSON ({words}).") from error
    if not isinstance(found, dict):
        raise InputError(f'{where}: an object is wanted, as in {{"prompt": "a red kite", "seed": 3}}.')
    for name in found:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise InputError(
                f"{where}: {name!r} is unknown; "
                + (f"the nearest is {near[0]!r}." if near else f"known: {', '.join(FIELDS)}.")
            )
    for name in ("reference", "init"):  # files are looked for beside the list first
        if isinstance(found.get(name), str):
            found[name] = _beside(folder, found[name])
        elif isinstance(found.get(name), list):
            found[name] = [_beside(folder, value) if isinstance(value, str) else value for value in found[name]]
    return found


def _beside(folder: Path, name: str) -> str:
    return str(folder / name) if name and (folder / name).is_file() else name


def _references(value: Any, mix: Any, where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    names = tuple(value) if isinstance(value, list | tuple) else (value,) if value else ()
    names = tuple(_words(name, "reference", where) for name in names)
    if len(names) < 2:
        return names, ()
    if mix is None or len(names) > 2:
        raise InputError(f"{where}: {len(names)} references: two are mixed by mix, two weights as in [0.7, 0.3].")
    weights = _numbers(mix, "mix", where)
    if min(weights) < 0 or sum(weights) <= 0:
        raise InputError(f"{where}: mix={list(weights)}: two weights from 0 up are wanted, not both 0.")
    return names, tuple(weight / sum(weights) for weight in weights)


def _words(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name}={value!r} is not a string.")
    try:  # a file's name may be any bytes, which Python keeps as surrogates; a sentence may not
        value.encode(errors="strict" if name == "prompt" else "surrogateescape")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {name}={value!a} is not Unicode.") from error
    return value


def _whole(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {name}={value!r} is not a whole number.")
    return value


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{where}: {name}={str(value)[:20]} is not a number.")
    return float(value)


def _numbers(value: Any, name: str, where: str) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"{where}: {name}={value!r}: two numbers are wanted, as in [3, 1.5].")
    return tuple(_number(part, name, where) for part in value)


def _pair(words: str) -> tuple[int, int]:
    width, height = words.split("x")
    return int(width), int(height)


def _apart(one: float, other: float) -> float:
    return abs(math.log(one / other))
