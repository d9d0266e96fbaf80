"""The page in the browser: one `AppPage` a person who looks at it. All it knows of drawing is `app_jobs.Jobs`.

Whatever people write reaches the page as text or as an attribute, never as HTML. A timer looks at the job and shows what is new.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import run, ui

from encode.records import InputError
from jaxdit import app_files, app_jobs, sampler, wishes
from jaxdit.page import jpeg

SHOWN = 24  # pictures of the gallery, and as many more at each wish
TICK = 0.25  # seconds
ASPECTS = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (21, 9))
KNOWN = (  # what the dialog tells of a picture: setting, words
    ("size", "size"), ("seed", "seed"), ("guidance_text", "prompt's weight"), ("guidance_vision", "reference's weight"),
    ("mix", "mix"), ("steps", "steps"), ("solver", "solver"), ("step", "checkpoint"), ("weights", "weights"),
    ("reference_hash", "reference"),
)  # fmt: skip
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#2f7585"/>'
    '<path d="M6 23l7-9 5 6 3-4 5 7z" fill="#fbfaf8"/><circle cx="22" cy="10" r="3" fill="#f6e3c4"/></svg>'
)
NOTHING = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
STYLE = Path(__file__).with_suffix(".css")


class AppPage:
    """One person's page: what they have set, the job they wait for, and the gallery."""

    def __init__(self, at: app_jobs.Jobs):
        self.jobs, self.job, self.changes = at, None, 0
        self.references: list[str] = []
        self.shown, self.seen = SHOWN, None
        ui.add_css(STYLE)
        ui.colors(primary="#2f7585", negative="#b4552d")
        with ui.element("header").classes("top"):
            ui.label("jaxdit").classes("name").props("role=heading aria-level=1")
            self.runs = ui.label().classes("soft")
        with ui.element("main").classes("page"):
            with ui.element("div").classes("controls"):
                self._controls()
            with ui.element("div").classes("stack"):
                self._result()
                self._show_gallery()
        with ui.dialog() as self.dialog, ui.card().classes("large"):
            self.large = ui.element("div").classes("both")
        ui.timer(TICK, self._tick)
        ui.context.client.on_delete(self._leave)

    # What can be set.

    def _controls(self) -> None:
        sample, usual = self.jobs.config["sample"], "{}x{}".format(*self.jobs.shapes.usual())
        self.prompt = ui.textarea("Prompt", placeholder="What the picture shows; empty draws without a sentence")
        self.prompt.props(f"outlined autogrow maxlength={app_jobs.LETTERS}").on("keydown.ctrl.enter", self._draw)
        self.pinned = ui.element("div").classes("references")
        self.drop = ui.upload(
            label="Drop a reference, or choose one", auto_upload=True, on_upload=self._bring,
            max_file_size=app_files.UPLOAD_BYTES,
            on_rejected=lambda: self._refuse(f"That file is too large: at most {app_files.UPLOAD_BYTES / 2**20:.0f} MiB."),
        ).classes("drop").props("flat")  # fmt: skip
        self.drop.on("failed", lambda: self._refuse("The file did not arrive; it may be too large."))
        self.mix = self._slider("Mix of the two references", 0, 1, 0.05, 0.5, lambda v: f"{v:.0%} : {1 - v:.0%}")
        self.size = ui.select({name: _shape(name) for name in self.jobs.shapes.buckets}, label="Shape", value=usual)
        self.size.props("outlined dense options-dense").classes("w-full")
        self.text = self._slider("Weight of the prompt", 0, 10, 0.1, sample["text_guidance"], "{:.1f}".format)
        self.vision = self._slider("Weight of the reference", 0, 10, 0.1, sample["vision_guidance"], "{:.1f}".format)
        most = max(100, sample["steps"])
        self.steps = self._slider("Steps", 1, min(most, app_jobs.STEPS), 1, sample["steps"], "{:.0f}".format)
        with ui.element("div").classes("line"):
            self.seed = ui.number("Seed", value=0, min=0, max=wishes.LARGEST_SEED, precision=0).props("outlined dense")
            self.seed.classes("grow")
            dice = ui.button(icon="casino", on_click=lambda: self.seed.set_value(random.randrange(2**31)))
            dice.props('flat round dense aria-label="Another seed"')
            self.count = ui.select({n: str(n) for n in range(1, 9)}, label="Pictures", value=1).props("outlined dense")
            self.count.classes("grow")
        ways = {"one": "One setting", "weights": "Weights", "time": "Checkpoints"}
        self.compare = ui.toggle(ways, value="one").props(
            'spread no-caps unelevated toggle-color=primary aria-label="Compare"'
        )
        for one in (self.count, self.text.box, self.vision.box):
            one.bind_visibility_from(self.compare, "value", lambda way: way != "weights")
        with ui.element("div").classes("stack").bind_visibility_from(self.compare, "value", value="weights"):
            self.texts = ui.input("Weights of the prompt", value="1, 1.5, 3").props("outlined dense")
            self.visions = ui.input("Weights of the reference", value="1, 1.5, 2.5").props("outlined dense")
        self.at = ui.select(self._steps(), label="Checkpoints", multiple=True, value=self._spread())
        self.at.props("outlined dense use-chips").bind_visibility_from(self.compare, "value", value="time")
        with (
            ui.expansion("Checkpoint and solver").props("dense dense-toggle").classes("w-full"),
            ui.element("div").classes("stack"),
        ):
            steps = self._steps()
            self.step = ui.select(
                steps, label="Checkpoint", value=max(steps, default=None), on_change=self._say_what_runs
            )
            self.step.props("outlined dense")
            self.raw = ui.switch("Raw weights instead of the averaged ones", on_change=self._choose_steps)
            self.solver = ui.select(list(sampler.SOLVERS), label="Solver", value="adams").props("outlined dense")
        self.button = ui.button("Draw", on_click=self._draw).classes("draw").props("unelevated")
        self.stop = ui.button("Stop", on_click=lambda: self.job and self.jobs.cancel(self.job)).props("outline")
        self.stop.classes("draw").set_visibility(False)
        self._pin()
        self._say_what_runs()

    def _say_what_runs(self) -> None:
        kind = "raw" if self.raw.value else "averaged"
        at = f"step {self.step.value:,}, {kind} weights" if self.step.value else f"no {kind} weights"
        self.runs.text = f"{self.jobs.workdir.resolve().name} · {at} · {self.jobs.about()}"

    def _slider(
        self, words: str, low: float, high: float, step: float, value: float, told: Callable[[float], str]
    ) -> Any:
        with ui.element("div").classes("slider") as box:
            ui.label(words)
            label = ui.label().classes("value")
            slider = ui.slider(min=low, max=high, step=step, value=value).props(f'aria-label="{words}"')
            label.bind_text_from(slider, "value", told)
        slider.box = box
        return slider

    def _steps(self) -> dict[int, str]:
        return {step: f"step {step:,}" for step in self.jobs.steps(bool(getattr(self, "raw", None) and self.raw.value))}

    def _spread(self) -> list[int]:
        """Up to five checkpoints, evenly over the run."""
        saved = list(self._steps())
        few = min(5, len(saved))
        return [saved[round(k * (len(saved) - 1) / max(few - 1, 1))] for k in range(few)]

    def _choose_steps(self) -> None:
        steps = self._steps()
        self.step.set_options(steps, value=self.step.value if self.step.value in steps else max(steps, default=None))
        self.at.set_options(steps, value=[step for step in self.at.value if step in steps] or self._spread())
        self._say_what_runs()

    async def _bring(self, event: Any) -> None:
        name = None
        try:
            name = await run.io_bound(self.jobs.files.take_in, event.file.name, await event.file.read())
        except InputError as error:
            self._refuse(f"{event.file.name}: {error}")
        except Exception as error:  # the processes that read pictures do not come up, a disk is gone
            self._refuse(f"{event.file.name}: {error}")
        if name:  # none where the server ends meanwhile
            self._pin([*[kept for kept in self.references if kept != name], name][-2:])
        self.drop.reset()

    def _pin(self, references: Sequence[str] | None = None) -> None:
        """Show the references that are taken."""
        self.references = list(self.references if references is None else references)
        self.pinned.clear()
        with self.pinned:
            for number, name in enumerate(self.references, 1):
                with ui.element("div"):
                    image = ui.element("img")
                    image.props["src"], image.props["alt"] = f"/reference/{quote(name)}", f"Reference {number}"
                    remove = ui.button(
                        icon="close", on_click=lambda name=name: self._pin([k for k in self.references if k != name])
                    )
                    remove.props(f'round dense size=xs color=grey-9 aria-label="Remove reference {number}"')
        self.pinned.set_visibility(bool(self.references))
        self.mix.box.set_visibility(len(self.references) == 2)

    def _refuse(self, sentence: str) -> None:
        self.drop.reset()
        ui.notify(sentence, type="negative", position="top", timeout=8000, close_button="OK", multi_line=True)

    # Drawing.

    def _order(self) -> app_jobs.Order:
        way, steps = self.compare.value, sorted(self.at.value or [])
        if way == "time" and len(steps) < 2:
            raise InputError("Choose at least two checkpoints to compare.")
        if way != "time" and self.step.value is None:
            raise InputError(f"This run keeps no {'raw' if self.raw.value else 'averaged'} weights.")
        return app_jobs.Order(
            prompt=self.prompt.value or "",
            references=tuple(self.references),
            mix=self.mix.value,
            size=self.size.value,
            text=_weights(self.texts) if way == "weights" else (float(self.text.value),),
            vision=_weights(self.visions) if way == "weights" else (float(self.vision.value),),
            seed=_whole(self.seed),
            count=1 if way == "weights" else self.count.value,
            steps=int(self.steps.value),
            solver=self.solver.value,
            at=tuple(steps) if way == "time" else (self.step.value,),
            raw=self.raw.value,
        )

    def _draw(self) -> None:
        if self.job is not None and not self.job.ended:
            return
        try:
            self.job = self.jobs.take_order(self._order())
        except InputError as error:
            self._tell([str(error)])
            self._choose_steps()  # a training that goes on saves steps and gives some up
            return
        self._tell([])
        self.changes = 0
        self.button.disable()
        self.stop.set_visibility(True)
        self.bar.set_visibility(True)
        self._lay_out(self.job)
        self._tick()

    def _tick(self) -> None:
        """Show what is new."""
        job = self.job
        if job is not None and self.stop.visible:
            ended, ahead = job.ended, self.jobs.ahead(job)
            people = f"{ahead} drawing is before yours" if ahead == 1 else f"{ahead} drawings are before yours"
            self.status.text = f"Waiting: {people}." if ahead else job.phase
            self.bar.value = job.done
            if job.changes != self.changes or ended:
                self.changes = job.changes
                self._show(job, last=ended)
            if ended:
                self._tell(job.problems)
                self.button.enable()
                for element in (self.stop, self.bar):
                    element.set_visibility(False)
        state = self.jobs.files.stamp()
        if state != self.seen:
            self.seen = state
            self._fill_gallery()

    def _result(self) -> None:
        self.status = ui.label().classes("soft").props("role=status")
        self.bar = ui.linear_progress(0, show_value=False, size="4px").props("rounded instant-feedback")
        self.bar.set_visibility(False)
        self.problems = ui.element("div").classes("stack").props("role=alert")
        self.result = ui.element("div").classes("result")
        with self.result:
            ui.label("Write a prompt and press Draw. Ctrl+Enter does too.").classes("empty")

    def _tell(self, problems: Sequence[str]) -> None:
        self.problems.clear()
        with self.problems:
            for problem in problems:
                ui.label(problem).classes("problem")

    def _lay_out(self, job: app_jobs.Job) -> None:
        """A place for each picture, with what stands beside and above them."""
        self.result.clear()
        width, height = job.wishes[0].size
        sides, heads = any(job.rows), any(job.columns)
        widest = min(max(width, 448), 640) if len(job.columns) == 1 else min(max(width, 220), 512)
        column = f"minmax(0,{widest}px)"
        self.result.style(f"grid-template-columns:{'auto ' if sides else ''}repeat({len(job.columns)},{column})")
        self.images = []
        with self.result:
            if heads:
                for words in ([""] if sides else []) + job.columns:
                    ui.label(words).classes("head")
            for row, words in enumerate(job.rows):
                if sides:
                    ui.label(words).classes("side")
                self.images.append([])
                for column in range(len(job.columns)):
                    image = ui.element("img").classes("picture wait").style(f"aspect-ratio:{width}/{height}")
                    image.props["src"], image.props["alt"] = NOTHING, "Not drawn yet"
                    _when_chosen(image, lambda row=row, column=column, job=job: self._open(job.names[row][column]))
                    self.images[-1].append(image)

    def _show(self, job: app_jobs.Job, last: bool = False) -> None:
        for images, names, views in zip(self.images, job.names, job.views):
            for image, name, view in zip(images, names, views):
                if name is not None:
                    address, words = self.jobs.files.address("picture", name), job.order.prompt
                    _set(image, src=address, alt=words or "A picture without a prompt", role="button")
                    image.classes(remove="wait soon")
                elif last:
                    _set(image, alt="Not drawn")
                    image.classes(remove="wait soon")
                elif view is not None:
                    _set(image, src=jpeg(view), alt="Being drawn")
                    image.classes(remove="wait", add="soon")

    def _leave(self) -> None:
        if self.job is not None:
            self.jobs.cancel(self.job)

    # The gallery.

    def _show_gallery(self) -> None:
        with ui.element("section").classes("stack shelf"):
            with ui.element("div").classes("line"):
                ui.label("Gallery").classes("title").props("role=heading aria-level=2")
                ui.label(str(self.jobs.gallery)).classes("soft words grow")
            self.gallery = ui.element("div").classes("gallery")
            self.more = ui.button("Show more", on_click=self._show_more).props("flat").classes("self-start")

    def _show_more(self) -> None:
        self.shown += SHOWN
        self._fill_gallery()

    def _fill_gallery(self) -> None:
        names = self.jobs.files.names(self.shown + 1)
        self.more.set_visibility(len(names) > self.shown)
        self.gallery.clear()
        with self.gallery:
            for name in names[: self.shown]:
                image = ui.element("img").classes("picture")
                prompt = self.jobs.files.settings(name).get("prompt") or "without a prompt"
                _set(image, src=self.jobs.files.address("small", name), alt=prompt, title=prompt)
                _set(image, role="button", loading="lazy")
                _when_chosen(image, lambda name=name: self._open(name))
            if not names:
                ui.label("What you draw is kept here, with its settings.").classes("soft").style("grid-column:1/-1")

    def _open(self, name: str | None) -> None:
        """A picture at its own size, what made it, and what can be done with it."""
        if name is None or not (said := self.jobs.files.settings(name)):
            return
        self.large.clear()
        with self.large:
            address = self.jobs.files.address("picture", name)
            _set(ui.element("img").classes("picture"), src=address, alt=said.get("prompt") or name)
            with ui.element("div").classes("stack"):
                ui.label(said.get("prompt") or "Without a prompt").classes("words")
                with ui.element("div").classes("said"):
                    for key, words in KNOWN:
                        if said.get(key):
                            ui.label(words)
                            ui.label(said[key]).classes("words")
                if said.get("command"):
                    ui.label(said["command"]).classes("command")
                with ui.element("div").classes("line flex-wrap"):
                    download = ui.button("Download PNG", icon="download").props("unelevated")
                    _set(download, href=f"{address}&download=1", download=name)
                    ui.button("Use these settings", on_click=lambda: self._use(name)).props("outline")
                    ui.button(icon="close", on_click=self.dialog.close).props("flat dense round aria-label=Close")
        self.dialog.open()

    def _use(self, name: str) -> None:
        order, notes = self.jobs.order_of(name)
        self.prompt.value, self.size.value = order.prompt, order.size or self.size.value
        self.text.value, self.vision.value, self.mix.value = order.text[0], order.vision[0], order.mix
        self.steps.value, self.seed.value, self.count.value = order.steps, order.seed, 1
        self.solver.value, self.compare.value, self.raw.value = order.solver, "one", order.raw
        self._choose_steps()
        self.step.value = order.at[0]
        self._pin(order.references)
        self._tell(notes)
        self.dialog.close()


def _set(element: Any, **props: str) -> None:
    """Attributes whose values may be anybody's words: never through a string that is parsed."""
    for name, value in props.items():
        if element.props.get(name) != value:
            element.props[name] = value


def _when_chosen(image: Any, do: Callable[[], None]) -> None:
    image.props("tabindex=0").on("click", do).on("keydown.enter", do).on("keydown.space.prevent", do)


def _shape(bucket: str) -> str:
    """ "832x1216" -> "about 2:3 · 832 × 1216"."""
    width, height = map(int, bucket.split("x"))
    near = min(ASPECTS, key=lambda pair: abs(math.log(max(width, height) / min(width, height) * pair[1] / pair[0])))
    long, short = near
    exact = max(width, height) * short == min(width, height) * long
    aspect = f"{long}:{short}" if width >= height else f"{short}:{long}"
    return f"{'' if exact else 'about '}{aspect} · {width} × {height}"


def _weights(box: Any) -> tuple[float, ...]:
    """The numbers of "1, 1.5, 3"."""
    try:
        values = tuple(float(word) for word in (box.value or "").replace(";", ",").split(",") if word.strip())
    except ValueError as error:
        raise InputError(f"{box.props['label']}: {box.value!r} is not numbers with commas between them.") from error
    if not values or not all(map(math.isfinite, values)):
        raise InputError(f"{box.props['label']}: numbers are wanted, as in 1, 1.5, 3.")
    return tuple(dict.fromkeys(values))


def _whole(box: Any) -> int:
    if box.value is None or not math.isfinite(box.value) or box.value != int(box.value):
        raise InputError("Seed: a whole number is wanted.")
    return int(box.value)
