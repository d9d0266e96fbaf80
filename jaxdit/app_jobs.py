"""What the page in the browser draws: orders come in, one is drawn at a time, and the pictures stay in a gallery.

Nothing here knows of the web. A page hands in an `Order`, gets a `Job`, and looks at it whenever it likes; one thread draws.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from encode.records import InputError
from jaxdit import album, app_files, checkpoint, render, sampler, trained, wishes
from jaxdit.cache import Cache

LETTERS = 2_000  # of a prompt
PICTURES = 36  # of one order
STEPS = 200
WAITING = 20  # orders
SHARE = 0.2  # of the time that early views may take


@dataclass(frozen=True)
class Order:
    """What one press of the button asks for; several weights, seeds or checkpoints are drawn side by side.

    Attributes:
      prompt: "" is no sentence.
      references: names that `Files.take_in` gave, at most two.
      mix: share of the first of two, 0 to 1.
      size: WIDTHxHEIGHT, one of the data set's buckets; "": the fullest.
      text, vision: guidance weights; several make a grid.
      seed, count: seeds seed, seed + 1, ...
      steps, solver: of the path.
      at: saved steps of the run; empty: the one loaded at the start.
      raw: the raw weights instead of the averaged ones.
    """

    prompt: str = ""
    references: tuple[str, ...] = ()
    mix: float = 0.5
    size: str = ""
    text: tuple[float, ...] = (1.0,)
    vision: tuple[float, ...] = (1.0,)
    seed: int = 0
    count: int = 1
    steps: int = 24
    solver: str = "adams"
    at: tuple[int, ...] = ()
    raw: bool = False


@dataclass(eq=False)
class Job:
    """An order under way. The thread that draws writes it, pages read it.

    Attributes:
      rows, columns: what stands beside and above the pictures; "" where there is nothing to tell.
      names: [row][column] of files in the gallery, None before they are there.
      views: [row][column] small JPEGs of what the pictures seem to become.
      phase: what is being done, in words.
      done: 0 to 1.
      problems: sentences.
      ended: nothing will change any more.
      changes: counts changes of names and views.
    """

    order: Order
    wishes: list[wishes.Wish]
    places: list[list[int]]  # [row][column] -> place among the wishes of a checkpoint; with several of them see `cells`
    rows: list[str]
    columns: list[str]
    names: list[list[str | None]] = field(default_factory=list)
    views: list[list[bytes | None]] = field(default_factory=list)
    phase: str = ""
    done: float = 0.0
    problems: list[str] = field(default_factory=list)
    ended: bool = False
    changes: int = 0
    cancelled: bool = False

    def __post_init__(self):
        self.names = [[None] * len(self.columns) for _ in self.rows]
        self.views = [[None] * len(self.columns) for _ in self.rows]

    def cells(self, number: int, place: int) -> list[tuple[int, int]]:
        """Where a wish of the order's checkpoint `number` stands: a column a checkpoint where there are several."""
        if len(self.order.at) > 1:
            return [(place, number)]
        return [(r, c) for r, line in enumerate(self.places) for c, k in enumerate(line) if k == place]


class Stopped(Exception):
    """The order is no longer wanted."""


class Jobs:
    """The model, the gallery and the line of those who wait.

    Args:
      workdir: a working folder.
      gallery: where pictures go; there, and held by nobody else.
      cache: of encoded sentences and pictures.

    Raises:
      InputError: not a working folder, nothing saved yet, or the image decoder is missing.
    """

    def __init__(self, workdir: Path, gallery: Path, cache: Cache):
        from encode import encoders

        self.workdir, self.gallery, self.cache = workdir, gallery, cache
        self.config, self.dataset = trained.describe(workdir)
        counts = {name: bucket["count"] for name, bucket in self.dataset["buckets"].items()}
        self.shapes = wishes.Shapes(8 * self.config["model"]["patch"], counts)
        self.vae = encoders.load_vae(self.dataset["encoders"]["vae"])
        self._run, self._raw = trained.load(workdir), False
        self.step = self._run.step  # what is drawn where nothing else is asked for
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self._run.params))
        self._waiting: list[Job] = []
        self._in_hand: Job | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self.files = app_files.Files(gallery)
        self._view_cost, self._viewed = 0.0, 0.0
        self._thread = threading.Thread(target=self._work, name="app_jobs", daemon=True)
        self._thread.start()

    # What there is to choose from.

    def steps(self, raw: bool = False) -> list[int]:
        """Saved steps, ascending; a run that trains on gets more."""
        return checkpoint.saved_steps(self.workdir, "state" if raw else "ema")

    def about(self) -> str:
        device = jax.devices()[0]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        where = (
            f"the CPU ({cores} cores)" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"
        )
        return f"{self.parameters / 1e6:,.3g} million parameters on {where}"

    # The line.

    def take_order(self, order: Order) -> Job:
        """Put an order at the end of the line.

        Raises:
          InputError: it asks for what cannot be drawn, or too many wait already.
        """
        job = self._job(order)
        with self._changed:
            if self._stopping:
                raise InputError("The page is being closed; start it again.")
            if len(self._waiting) >= WAITING:
                raise InputError(f"{len(self._waiting)} orders are waiting already; try again in a while.")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """How many orders are drawn before this one."""
        with self._changed:
            return self._waiting.index(job) + (self._in_hand is not None) if job in self._waiting else 0

    def cancel(self, job: Job) -> None:
        """Nobody wants it any more; what is drawn stays."""
        with self._changed:
            job.cancelled = True
            if not job.ended:
                job.phase = "Stopping after the evaluation in hand …"
            if job in self._waiting:
                self._waiting.remove(job)
                job.phase, job.ended = "Stopped before it was begun.", True

    def close(self, seconds: float) -> tuple[bool, bool]:
        """End after the evaluation in hand: (whether anything was cut off, whether the thread has ended in time)."""
        with self._changed:
            self._stopping, cut = True, self._in_hand is not None or bool(self._waiting)
            self._changed.notify_all()
        self._thread.join(seconds)
        self.files.close()
        return cut, not self._thread.is_alive()

    def _job(self, order: Order) -> Job:
        where = "the page"
        prompt = "".join(" " if ord(letter) < 32 or 127 <= ord(letter) < 160 else letter for letter in order.prompt)
        prompt = " ".join(prompt.split())
        if len(prompt) > LETTERS:
            raise InputError(f"the prompt has {len(prompt):,} letters; at most {LETTERS:,} are taken.")
        if not 1 <= order.steps <= STEPS:
            raise InputError(f"steps: from 1 to {STEPS} are possible, {order.steps} are asked for.")
        if order.solver not in sampler.SOLVERS:
            raise InputError(f"solver: {order.solver!r} is unknown; there are {', '.join(sampler.SOLVERS)}.")
        if not 0 <= order.mix <= 1:
            raise InputError(f"mix: the first reference's share is from 0 to 1, {order.mix:g} is asked for.")
        saved = self.steps(order.raw)
        if missing := [step for step in order.at if step not in saved]:
            kind = "raw" if order.raw else "averaged"
            raise InputError(
                f"step {missing[0]} has no {kind} weights (any more); there are {', '.join(map(str, saved))}."
            )
        if not order.text or not order.vision or not all(abs(weight) <= 100 for weight in (*order.text, *order.vision)):
            raise InputError("the weights of the prompt and of the reference are numbers from -100 to 100.")
        if len(order.text) * len(order.vision) * order.count * max(len(order.at), 1) > PICTURES:
            raise InputError(f"that would be more than {PICTURES} pictures; ask for fewer at once.")
        fields = {
            "prompt": prompt,
            "seed": order.seed,
            "count": order.count,
            "scales": [order.text[0], order.vision[0]],
        }
        fields |= (
            {"reference": [str(self.files.reference(name).resolve()) for name in order.references]}
            if order.references
            else {}
        )
        fields |= {"mix": [order.mix, 1 - order.mix]} if len(order.references) == 2 else {}
        fields |= {"size": order.size} if order.size else {}
        asked = wishes.wish(fields, {}, self.shapes, where)
        if len(order.at) > 1:
            columns = [f"step {step:,}" for step in order.at]
            return Job(order, asked, [], [f"seed {wish.seed}" for wish in asked] if len(asked) > 1 else [""], columns)
        if len(order.text) * len(order.vision) > 1:
            cells, (places,) = wishes.grids(asked[:1], order.text, order.vision)
            rows = [f"prompt {album.numbers([cells[line[0]].text])}" for line in places]
            return Job(order, cells, places, rows, [f"reference {album.numbers([cells[k].vision])}" for k in places[0]])
        columns = [f"seed {wish.seed}" for wish in asked]
        return Job(order, asked, [list(range(len(asked)))], [""], columns if len(asked) > 1 else [""])

    # Drawing.

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                began = time.monotonic()
                self._draw(job)
                job.phase = f"Done in {time.monotonic() - began:.1f} s" + (", but for this:" if job.problems else ".")
            except Stopped:
                job.phase = "Stopped; what was drawn stays."
            except InputError as error:
                job.phase = "Not drawn."
                job.problems.append(f"{str(error)[:1].upper()}{str(error)[1:]}")
            except Exception as error:  # whatever it is, the next order is drawn
                logging.exception("An order could not be drawn.")
                job.phase = "Not drawn."
                job.problems.append(
                    f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:200]}"
                )
            job.ended = True

    def _next(self) -> Job | None:
        with self._changed:
            self._in_hand = None
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if not self._stopping:
                self._in_hand = self._waiting.pop(0)
            return self._in_hand

    def _draw(self, job: Job) -> None:
        order = job.order
        rounds = order.at or (self.step,)
        options = {
            "steps": order.steps, "shift": self.config["sample"]["shift"], "solver": order.solver, "interval": None
        }  # fmt: skip
        in_grid = frozenset(range(len(job.wishes))) if len(order.text) * len(order.vision) > 1 else frozenset()
        for number, step in enumerate(rounds):
            run = self._load(job, step, order.raw)
            at = render.Renderer(run, self.workdir, self.gallery, options, raw=order.raw)
            self._draw_round(job, at, at.plan(job.wishes, in_grid), number, len(rounds))
        job.done = 1.0

    def _draw_round(self, job: Job, at: render.Renderer, plan: render.Plan, number: int, rounds: int) -> None:
        """The wishes of an order from one checkpoint, the order's `number`-th."""
        for place in at.there(plan):
            self._put(job, number, place, name=plan.names[place])
        todo, finished = max(len(plan.todo), 1), 0

        def watch(part, done, total, view):
            if self._stopping or job.cancelled:
                raise Stopped
            at_once = f", {len(part)} of {todo} pictures at once" if len(part) > 1 else ""
            job.phase = f"Step {done} of {total}{at_once}" + (f", checkpoint {at.run.step:,}" if rounds > 1 else "")
            job.done = (number + (finished + len(part) * done / total) / todo) / rounds
            if done < total:
                self._view(job, number, part, view)

        job.phase = "Reading what is asked for"
        for kind, value in at.draw(plan, self.vae, self.cache, watch=watch):
            if kind == "problem":
                job.problems.append(f"{value[0].upper()}{value[1:]}.")
            elif kind == "note":
                job.problems.append(f"{value}.")
            elif kind == "work":
                job.phase = "Getting ready; the first picture of a shape takes a little longer"
            elif kind == "picture":
                finished += 1
                for place in [place for place, name in enumerate(plan.names) if name == plan.names[value]]:
                    self._put(job, number, place, name=plan.names[value])

    def _load(self, job: Job, step: int, raw: bool) -> trained.Trained:
        if (self._run.step, self._raw) != (step, raw):
            job.phase = f"Loading checkpoint {step:,}"
            self._run = trained.load(self.workdir, step=step, raw=raw)
            self._raw = raw
        return self._run

    def _view(self, job: Job, number: int, part: Sequence[int], view: Any) -> None:
        """Show what the pictures seem to become, where the image decoder is quick enough for it."""
        from encode import images

        began = time.monotonic()
        if began - self._viewed < self._view_cost / SHARE:
            return
        for place, picture in zip(part, self.vae.decode(view())):
            self._put(job, number, place, view=images.thumbnail(picture, app_files.SIDE))
        self._viewed = time.monotonic()
        self._view_cost = self._viewed - began

    def _put(self, job: Job, number: int, place: int, *, name: str | None = None, view: bytes | None = None) -> None:
        for row, column in job.cells(number, place):
            if name is not None:
                job.names[row][column] = name
            job.views[row][column] = view
        job.changes += 1

    def order_of(self, name: str) -> tuple[Order, list[str]]:
        """(the order that draws a picture again, sentences about what cannot be had again)."""
        said, notes = self.files.settings(name), []
        hashes = said["reference_hash"].split(" + ") if said.get("reference_hash") else []
        found = tuple(filter(None, map(self.files.reference_of, filter(None, hashes))))
        if len(found) < len(hashes) or (said.get("reference") and not hashes):
            notes.append(f"The reference ({said.get('reference', 'unknown')}) is not in this gallery.")
        if said.get("init"):
            notes.append("It was begun from a picture, which the page does not do; jaxdit.sample --init does.")
        raw, step = said.get("weights") == "raw", int(_number(said.get("step"), self.step))
        if step not in self.steps(raw):
            newest = max(self.steps(), default=self.step)
            notes.append(f"Its checkpoint, step {step:,}, is no longer there; step {newest:,} is taken.")
            raw, step = False, newest
        mix = _number(said.get("mix", "").split(",")[0], 0.5)
        sample = self.config["sample"]
        size = said.get("size", "")
        if size and size not in self.shapes.buckets:
            notes.append(f"It is of {size}, which is no shape of the data; the page takes its usual one.")
        usual = {"shift": album.numbers([sample["shift"]]), "guidance_interval": ""}
        for name, value in usual.items():
            if said.get(name, value) != value:
                notes.append(
                    f"It was drawn with {name} {said[name]}, as jaxdit.sample --{name} does and the page does not."
                )
        order = Order(
            prompt=said.get("prompt", ""),
            references=found,
            mix=mix if len(found) == 2 else 0.5,
            size=size if size in self.shapes.buckets else "",
            text=(_number(said.get("guidance_text"), sample["text_guidance"]),),
            vision=(_number(said.get("guidance_vision"), sample["vision_guidance"]),),
            seed=int(_number(said.get("seed"), 0)),
            steps=int(_number(said.get("steps"), sample["steps"])),
            solver=said["solver"] if said.get("solver") in sampler.SOLVERS else "adams",
            at=(int(step),),
            raw=raw,
        )  # fmt: skip
        return order, notes


def _number(words: str | None, otherwise: float) -> float:
    try:
        value = float(words)
    except (TypeError, ValueError):
        return otherwise
    return value if math.isfinite(value) else otherwise
