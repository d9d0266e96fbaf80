"""python -m jaxdit.sample --workdir=DIR --prompt="..." [--reference=picture.png] --out=DIR

Pictures from the averaged weights (EMA) of a working folder: what a sentence says, in the feeling of a reference picture.
Several --prompt make several pictures; one --reference serves all of them, or give one a prompt; --prompts=FILE reads them
from a list. Without any, eight captions of the training data are drawn, each in the light of another of its pictures.
Every PNG holds the settings that made it and the command that makes it again.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's encoders need room on the same card

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from encode import commandline
from encode.records import InputError, only_one
from encode.whole_files import write_json
from jaxdit import album, conditions, data, render, sampler, sheet, trained, wishes
from jaxdit.cache import Cache, cache_folder
from jaxdit.metrics import duration
from jaxdit.wishes import Wish

GRID_TEXT, GRID_VISION = (1.0, 1.5, 3.0, 5.0), (1.0, 1.5, 2.5)
FEW = 20  # pictures that are named one by one


def from_training_data(path: str, count: int) -> tuple[list[dict[str, str]], dict[tuple[str, str], np.ndarray]]:
    """Captions spread over the data set, each with another picture as its reference: (fields of wishes, their arrays)."""
    try:
        dataset = data.Dataset(path)
    except InputError as error:
        raise InputError(
            f"{error} Without --prompt, captions of the training data are drawn; give --prompt."
        ) from error
    places = [(name, row) for name in dataset.buckets for row in range(len(dataset.index[name]))]
    count = min(count, len(places))
    chosen = [places[round(k * (len(places) - 1) / max(count - 1, 1))] for k in range(count)]
    own = [dataset.records(name, [row])[0] for name, row in chosen]
    others = own[len(own) // 2 :] + own[: len(own) // 2]
    fields, known = [], {}
    for record, other in zip(own, others):
        prompt, reference = record["caption"].decode(), wishes.ID + other["id"].decode()
        fields.append({"prompt": prompt, "reference": reference})
        known["text", prompt] = np.asarray(record["text"], np.float32)
        known["vision", reference] = np.asarray(other["vision"], np.float32)
    return fields, known


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Working folder of a training run.", required=True)
    flags.DEFINE_string("out", None, "Folder for the pictures.", required=True)
    flags.DEFINE_multi_string("prompt", [], "What the picture shows; may be given several times; empty: no sentence.")
    flags.DEFINE_string("prompts", None, "File of prompts, one a line; NAME.jsonl: an object a line (see the README).")
    flags.DEFINE_multi_string(
        "reference",
        [],
        "A picture whose feeling is wanted: one for all, or one a prompt. Or a vector (.npy), or the id of an image of the "
        "data set (id:NAME where a file has that name too).",
    )
    flags.DEFINE_list("mix", None, "Weights of two references that are mixed, as in 0.7,0.3.")
    flags.DEFINE_string("size", None, "WIDTHxHEIGHT in pixels; by default that of the fullest bucket.")
    flags.DEFINE_string("aspect", None, "WIDTH:HEIGHT; the nearest bucket of the data set is drawn.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_integer("count", 1, "Pictures of each prompt, with the seeds seed, seed + 1, ...")
    flags.DEFINE_string("init", None, "A picture to start from.")
    flags.DEFINE_float("strength", None, f"How much of it is drawn anew, 0 to 1; by default {wishes.STRENGTH}.")
    flags.DEFINE_integer("step", None, "Which saved step; by default the newest.")
    flags.DEFINE_bool("raw", False, "The raw weights instead of the averaged ones.")
    flags.DEFINE_integer("steps", None, "Steps of the solver; by default the configuration's sample.steps.")
    flags.DEFINE_enum("solver", "adams", sampler.SOLVERS, "How a step is taken; heun evaluates the model twice a step.")
    flags.DEFINE_float("shift", None, "Of the steps towards noise; by default sample.shift.")
    flags.DEFINE_list("guidance_text", None, "Weight of the sentence; by default sample.text_guidance.")
    flags.DEFINE_list("guidance_vision", None, "Weight of the reference; by default sample.vision_guidance.")
    flags.DEFINE_list(
        "guidance_interval", None, "LOW,HIGH in t (1 is noise): guide there alone; by default everywhere."
    )
    flags.DEFINE_bool(
        "grid", False, "Every weight of --guidance_text=A,B,... (rows) with every one of --guidance_vision."
    )
    flags.DEFINE_integer("batch", 0, "Pictures drawn at once; 0: what fills the device.")
    flags.DEFINE_string(
        "cache", None, "Folder of encoded sentences and pictures; empty: none. By default ~/.cache/jaxdit."
    )


def main() -> int:
    given = flags.FLAGS
    workdir, out = commandline.path_of(given.workdir), commandline.path_of(given.out)
    try:
        return _run(workdir, out)
    except KeyboardInterrupt:
        print("Stopped before the first picture; the same command draws them all.")
        return commandline.STOPPED


def _run(workdir: Path, out: Path) -> int:
    given = flags.FLAGS
    config, dataset = trained.describe(workdir)
    shapes = wishes.Shapes(8 * config["model"]["patch"], {k: v["count"] for k, v in dataset["buckets"].items()})
    options = _options(config["sample"])
    asked, grids, known, problems = _asked(config, shapes)
    run = trained.load(workdir, step=given.step, raw=given.raw)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_one(out))
        except OSError as error:
            raise InputError(f"--out={out}: this folder cannot be made or written to ({error.strerror}).") from error
        album.refuse_others(out)
        return _Session(render.Renderer(run, workdir, out, options, raw=given.raw)).make(asked, grids, known, problems)


class _Session:
    """One call: what is there already stays, the rest is drawn, and what is made is kept whatever ends the call."""

    def __init__(self, at: render.Renderer):
        self.renderer, self.out, self.album = at, at.out, at.album

    def make(self, asked, grids, known, problems) -> int:
        in_grid = frozenset(place for lines in grids for line in lines for place in line)
        plan = self.renderer.plan(asked, in_grid)
        asked, names, settings = plan.asked, plan.names, plan.settings
        if there := self.renderer.there(plan):
            print(
                f"{len(there)} of {len(asked)} pictures are there already with the same settings; they stay as they are."
            )
        problems, stopped = list(problems), False
        try:
            for problem in self._draw(plan, known):
                problems.append(problem)
        except KeyboardInterrupt:
            stopped = True
        made = self.renderer.there(plan)
        try:
            self._list(made, names, settings)
            self._sheet([place for place in made if place not in in_grid], names, asked)
            for lines in grids:
                self._grid(lines, made, names, asked, settings)
        except OSError as error:
            problems.append(f"{self.out}: {error.strerror or error}")
        code = commandline.fail("; ".join(dict.fromkeys(problems)) + ".") if problems else 0
        if stopped:
            print(f"Stopped: {len(made)} of {len(asked)} pictures are in {self.out}; the same command draws the rest.")
            return commandline.STOPPED
        return code

    def _draw(self, plan: render.Plan, known) -> Iterator[str]:
        """Draw and save, and say so; what went wrong, as it is met."""
        from encode import encoders

        vae = encoders.load_vae(self.renderer.run.dataset["encoders"]["vae"])
        cache = Cache(cache_folder(flags.FLAGS.cache))
        progress = _Progress(0)
        for kind, value in self.renderer.draw(plan, vae, cache, known=known, most=flags.FLAGS.batch):
            if kind == "problem":
                yield value
            elif kind == "note":
                print(value)
            elif kind == "work":
                progress = _Progress(value)
            elif kind == "picture":
                progress.picture(self.out / plan.names[value], plan.asked[value])
            elif kind == "batch":
                with contextlib.suppress(OSError):  # a disk that is full says so again at the end
                    self._list(self.renderer.there(plan), plan.names, plan.settings)
                progress.batch(value)
                commandline.go_on()

    def _list(self, made: Sequence[int], names: Sequence[str], settings: Sequence[Mapping[str, str]]) -> None:
        """samples.json: the pictures of this call."""
        rows = {names[place]: {"file": names[place], **settings[place]} for place in made}
        if rows:
            write_json(self.out / "samples.json", list(rows.values()))

    def _sheet(self, made: Sequence[int], names: Sequence[str], asked: Sequence[Wish]) -> None:
        """sheet.png: all pictures of this call but a grid's, small."""
        shown = {names[place]: asked[place] for place in made}
        if len(shown) > 1:
            pictures = [sheet.thumbnail(self.album.pixels(name)) for name in shown]
            self.album.save(
                "sheet.png", sheet.contact_sheet(pictures, [_words(wish) for wish in shown.values()]), _call()
            )
            print(f"{self.out / 'sheet.png'}: all {len(shown)} of them.")

    def _grid(self, places, made, names, asked, settings) -> None:
        """The table of one prompt, where all of its cells are there."""
        cells = [place for line in places for place in line]
        if not set(cells).issubset(made):
            return
        first = asked[cells[0]]
        texts, visions = ([getattr(asked[k], name) for k in line] for name, line in (
            ("text", [line[0] for line in places]), ("vision", places[0])
        ))  # fmt: skip
        words = settings[cells[0]] | {"guidance_text": album.numbers(texts), "guidance_vision": album.numbers(visions)}
        name, there = self.album.place(f"grid-{album.stem_of(first)}", words)
        if not there:
            pixels = [
                [sheet.thumbnail(self.album.pixels(names[place]), sheet.LARGEST_CELL) for place in line]
                for line in places
            ]
            labels = [f"text {album.numbers([w])}" for w in texts], [f"vision {album.numbers([w])}" for w in visions]
            self.album.save(name, sheet.grid(pixels, *labels, _words(first)), words | _call())
        print(f"{self.out / name}: {len(texts)} weights of the text by {len(visions)} of the vision vector.")


class _Progress:
    """What is said while pictures are made: each of a few, or a line a batch of many."""

    def __init__(self, total: int):
        self.total, self.done, self.said = total, 0, 0
        self._first: tuple[float, int] | None = None  # when the first batch was there, compilation and all

    def picture(self, path: Path, wish: Wish) -> None:
        if self.total <= FEW:
            words = " ".join(_words(wish).split())
            print(f"{path}: {words if len(words) <= 100 else words[:96] + ' ...'}")

    def batch(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self._first is None:
            self._first = now, self.done
        elif self.done < self.total or self.total > FEW:
            rate = (self.done - self._first[1]) / max(now - self._first[0], 1e-9)
            left = f", {duration((self.total - self.done) / rate)} left" if self.done < self.total else ""
            print(f"{self.done} of {self.total} pictures, {rate:.3g} a second{left}.", flush=True)


def _options(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """steps, shift, solver and interval of `trained.generate`, from the flags."""
    given = flags.FLAGS
    steps = defaults["steps"] if given.steps is None else given.steps
    shift = defaults["shift"] if given.shift is None else given.shift
    if steps < 1:
        raise InputError(f"--steps={steps}: at least one step is needed.")
    if not 0 < shift < math.inf:
        raise InputError(f"--shift={shift:g}: a number above 0 is wanted; 1 leaves the steps even.")
    if given.batch < 0:
        raise InputError(f"--batch={given.batch}: a number of pictures is wanted, or 0 for what fills the device.")
    interval = _floats("guidance_interval")
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1):
        raise InputError(f"--guidance_interval={album.numbers(interval)}: LOW,HIGH is wanted, 0 <= LOW <= HIGH <= 1.")
    return {"steps": steps, "shift": shift, "solver": given.solver, "interval": interval and tuple(interval)}


def _asked(config: Mapping[str, Any], shapes: wishes.Shapes):
    """(wishes, grids, known arrays, problems) of the flags; a grid is rows of places among the wishes."""
    given, known, problems = flags.FLAGS, {}, []
    texts, visions = _floats("guidance_text"), _floats("guidance_vision")
    if not given.grid and max(len(texts or ()), len(visions or ())) > 1:
        raise InputError("--guidance_text or --guidance_vision has several weights; add --grid to draw all of them.")
    texts, visions = texts or [config["sample"]["text_guidance"]], visions or [config["sample"]["vision_guidance"]]
    names = ("size", "aspect", "seed", "count", "init", "strength")
    defaults = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    defaults["scales"] = [texts[0], visions[0]]
    if given.size and given.aspect:
        raise InputError("--size and --aspect are both given; one of them is enough.")
    lines = []
    if given.prompt or (given.reference and not given.prompts):
        lines += wishes.pair_up(given.prompt, given.reference, _floats("mix"))
    if given.prompts:
        if len(given.reference) > 1 and not given.prompt:
            raise InputError("--prompts with several --reference: name them in the list (NAME.jsonl).")
        if given.mix and not given.prompt:
            raise InputError("--prompts with --mix: name the mix in the list (NAME.jsonl).")
        read, problems = wishes.read_list(commandline.path_of(given.prompts))
        own = {"reference": given.reference[0]} if len(given.reference) == 1 else {}
        lines += [(where, own | fields) for where, fields in read]
    elif not lines:
        if given.init:
            lines = [("--init", {"prompt": ""})]
        else:
            few, known = from_training_data(config["data"]["path"], 1 if given.grid else 8)
            lines = [("training data", fields) for fields in few]
    asked = []
    for where, fields in lines:
        asked += wishes.wish(fields, defaults | _size_of_init(fields, defaults, shapes), shapes, where)
    if not asked:
        raise InputError(f"--prompts={given.prompts}: no prompt is in it." + "".join(f" {why}." for why in problems))
    if not given.grid:
        return asked, [], known, problems
    return (
        *wishes.grids(asked, _floats("guidance_text") or GRID_TEXT, _floats("guidance_vision") or GRID_VISION),
        known,
        problems,
    )


def _size_of_init(fields: Mapping[str, Any], defaults: Mapping[str, Any], shapes: wishes.Shapes) -> dict[str, Any]:
    """The bucket nearest to the picture to start from, where no size is asked for."""
    from encode import images

    init = fields.get("init") or defaults.get("init")
    if not isinstance(init, str) or not init or {"size", "aspect"} & ({*fields, *defaults}):
        return {}
    try:
        width, height = images.size(commandline.path_of(init), conditions.MAX_PIXELS)
    except (images.ImageProblem, OSError):
        return {}  # told when it is to be encoded
    return {"init_size": shapes.nearest(width / height)}


def _floats(name: str) -> list[float] | None:
    words = getattr(flags.FLAGS, name)
    if words is None:
        return None
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise InputError(f"--{name}={','.join(words)}: numbers with commas between them are wanted.") from error
    if not values or not all(map(math.isfinite, values)):
        raise InputError(f"--{name}={','.join(words)}: numbers are wanted.")
    return values


def _call() -> dict[str, str]:
    """What a sheet's or a grid's file says of itself: the command that this call is."""
    return {"command": commandline.command("jaxdit.sample", map(album.plain, sys.argv[1:]))}


def _words(wish: Wish) -> str:
    return wish.prompt or album.plain(" + ".join(wish.references) or wish.init) or "neither sentence nor reference"


if __name__ == "__main__":
    define_flags()
    commandline.run(main, interrupted=True)
