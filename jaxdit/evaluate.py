"""python -m jaxdit.evaluate --workdir=DIR [--steps=N,N] [--images=500]: the quality of a run's pictures in numbers.

Every saved step draws the captions of held-out images, with and without their vectors; `exam.py` says what is measured and
`quality.py` how. OUT/evaluation.jsonl gets each step's row as soon as it is known, the newest step first, and a second call
does what is missing; evaluation.html shows the curves, and the pictures nearest to training images.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's encoders need room on the same card

import hashlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from encode import commandline
from encode.records import InputError, only_one
from encode.whole_files import write_text
from jaxdit import checkpoint, exam, judged_images, mesh, page, quality_page, trained
from jaxdit.metrics import duration

IMAGES = 500
VERSION = 1  # of what is measured: rows of another one are made anew
# Of dataset.json, what its pictures are judged by; "mended_from" tells captions from those before they were mended.
DATA = ("fingerprint", "buckets", "latent_mean", "latent_std", "mended_from")
SAY = 10.0  # seconds between two lines of progress


def evaluate(
    workdir: Path,
    out: Path,
    *,
    data_path: str | None = None,
    steps: str = "all",
    raw: bool = False,
    images: int = IMAGES,
    clip: str | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write what is missing of out/evaluation.jsonl, and out/evaluation.html.

    Args:
      workdir: working folder of a training run.
      out: folder of the numbers; one process at a time.
      data_path: OUT/RES; by default that of the training.
      steps: "all" that are saved, or numbers with commas between them.
      raw: judge the raw weights instead of the averaged ones.
      images: how many held-out captions are drawn, at most.
      clip: folder of a CLIP model, for its score.

    Returns:
      (rows that were asked for, ascending; a sentence for each step that could not be judged).

    Raises:
      InputError: nothing saved, no such step, or data that were encoded in another way.
    """
    from encode import encoders

    config, described = trained.describe(workdir)
    wanted = _steps(workdir, steps, raw)
    dataset = judged_images.open_data(config, described, data_path)
    with only_one(out):
        scorer = _clip(clip)
        data_id = _fingerprint(
            {name: dataset.info[name] for name in DATA if name in dataset.info},
            [config["data"]["holdout_fraction"], config["flow"]["flip"]],
        )
        drawn_by = {name: config["sample"][name] for name in ("steps", "shift", "text_guidance", "vision_guidance")}
        exam_id = _fingerprint(VERSION, data_id, images, drawn_by, getattr(scorer, "hash", None))
        weights = "raw" if raw else "averaged"
        states = {step: _state(workdir, step, raw) for step in wanted}
        rows = read(out / "evaluation.jsonl")
        judged = {
            row["step"]: row
            for row in rows
            if (row["weights"], row["asked"]) == (weights, exam_id) and states.get(row["step"]) == row["checkpoint"]
        }
        missing, problems = [step for step in wanted if step not in judged], []
        if judged and missing:
            print(f"{len(judged)} of {len(wanted)} steps are judged already; they stay as they are.")
        prepared, progress = None, None
        for step in reversed(missing):  # newest first: that is the one people wait for
            began = time.monotonic()
            try:
                run = trained.load(workdir, step=step, raw=raw)
            except InputError as error:
                if step in checkpoint.saved_steps(workdir, "state" if raw else "ema"):
                    problems.append(str(error))  # it is damaged
                else:
                    print(f"Step {step} is not there any more: a training beside this has removed it.")
                continue
            if prepared is None:
                judged_images.refuse_other_data(workdir, run, dataset)
                prepared = exam.prepare(
                    run,
                    dataset,
                    _only(out, f"known-{data_id}"),
                    images=images,
                    vae=encoders.load_vae(dataset.info["encoders"]["vae"]),
                    vision=judged_images.load_vision(dataset),
                    clip=scorer,
                )
                progress = _Progress(exam.pictures(prepared), len(missing))
            progress.step = step
            found, strips = exam.sit(prepared, run, progress.drawn)
            row = {"step": step, "weights": weights, "asked": exam_id, "checkpoint": states[step]}
            row |= _described(prepared, run) | found
            row["strips"] = _save(out, f"{weights}-{step}-{exam_id}", strips)
            row["seconds"] = round(time.monotonic() - began, 1)
            judged[step] = row = _rounded(row)
            rows = [old for old in rows if (old["step"], old["weights"], old["asked"]) != (step, weights, exam_id)]
            rows.append(row)
            _write(out / "evaluation.jsonl", rows)
            quality_page.write(out, [judged[known] for known in sorted(judged)])
            print("\n".join(quality_page.lines(row)), flush=True)
        mine = [judged[step] for step in sorted(judged)]
        if mine:
            quality_page.write(out, mine)
    return mine, problems


def _described(prepared: exam.Exam, run: trained.Trained) -> dict[str, Any]:
    """What a row says of how its checkpoint was judged."""
    return {
        "images": len(prepared.prompts),
        "held_out": prepared.held_out,
        "real_images": len(exam.real_vectors(prepared)),
        "training_images": len(prepared.training.places),
        "width": prepared.dataset.info["widths"]["vision"],
        "sampling": {**run.config["sample"], "solver": "adams"},
        "data": str(prepared.dataset.path),
        "device": jax.devices()[0].device_kind,
        "usual": prepared.usual,
    }


def _steps(workdir: Path, words: str, raw: bool) -> list[int]:
    item = "state" if raw else "ema"
    saved = checkpoint.saved_steps(workdir, item)
    if not saved:
        other = " with --raw: only the newest steps keep their raw weights" if raw else ""
        raise InputError(f"{workdir}: no checkpoint has been saved yet{other}; train first, with the same --workdir.")
    if words == "all":
        return saved
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--steps={words}: numbers with commas between them are wanted, or all.")
    asked = sorted({int(part) for part in parts})
    if unknown := [str(step) for step in asked if step not in saved]:
        raise InputError(
            f"--steps={words}: step {', '.join(unknown)} is not saved in {workdir}; saved are {', '.join(map(str, saved))}."
        )
    return asked


def _clip(folder: str | None) -> Any:
    if not folder:
        return None
    from encode.clip import CLIPScore

    return CLIPScore(commandline.path_of(folder))


def _fingerprint(*parts: Any) -> str:
    """12 hexadecimal characters of what numbers depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _state(workdir: Path, step: int, raw: bool) -> str:
    """Which save of this step it is: names (Orbax gives its files random ones) and sizes, without reading gigabytes."""
    folder = workdir / "checkpoints" / str(step) / ("state" if raw else "ema")
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return _fingerprint([(str(path.relative_to(folder)), path.stat().st_size) for path in files])
    except FileNotFoundError:  # a training beside this removes it
        return ""


def _only(out: Path, name: str) -> Path:
    """The folder OUT/name; those of other data, which nobody will ask for again, are removed."""
    for other in out.glob("known-*"):
        if other.name != name and re.fullmatch("known-[0-9a-f]{12}", other.name):
            shutil.rmtree(other, ignore_errors=True)
    return out / name


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of evaluation.jsonl; lines that are damaged are left out, and made anew by the next call."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            _ = row["step"], row["weights"], row["asked"], row["checkpoint"]
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            logging.warning("%s: line %d is damaged; its step is judged again.", path, number)
    return rows


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The whole file or none of it: a kill leaves the rows of before."""
    rows = sorted(rows, key=lambda row: (row["asked"], row["weights"], row["step"]))
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _save(out: Path, name: str, strips: Sequence[tuple[str, list]]) -> list[dict[str, Any]]:
    """Pictures as JPEG files in OUT/pictures/NAME, and what the row says of them."""
    folder = out / "pictures" / name
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (words, pictures) in enumerate(strips):
        names = []
        for place, (caption, pixels) in enumerate(pictures):
            file = folder / f"{number:02d}-{place}.jpg"
            file.write_bytes(page.small(Image.fromarray(pixels), page.SIDE))
            names.append([caption, str(file.relative_to(out))])
        found.append({"words": words, "pictures": names})
    return found


def _rounded(value: Any) -> Any:
    """JSON with five significant digits, what is not finite as null."""
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


class _Progress:
    """A line now and then: which step, how many pictures, how fast, how long for all steps."""

    def __init__(self, each: int, steps: int):
        self.each, self.total, self.done, self.step = each, each * steps, 0, 0
        self._first: tuple[float, int] | None = None  # when the first batch was there, compilation and all
        self._said = time.monotonic()

    def drawn(self, count: int) -> None:
        commandline.go_on()
        self.done += count
        now = time.monotonic()
        if self._first is None:
            self._first = now, self.done
        elif now - self._said > SAY:
            self._said = now
            rate = (self.done - self._first[1]) / (now - self._first[0])
            print(
                f"Step {self.step:,}: {self.done % self.each or self.each:,} of {self.each:,} pictures, {rate:.3g} a second, "
                f"{duration((self.total - self.done) / rate)} left for all.",
                flush=True,
            )


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Working folder of a training run.", required=True)
    flags.DEFINE_string("out", None, "Folder for evaluation.jsonl and .html; by default WORKDIR/evaluation.")
    flags.DEFINE_string("data", None, "Data set OUT/RES; by default that of the training.")
    flags.DEFINE_string("steps", "all", "Saved steps to judge: numbers with commas between them, or all.")
    flags.DEFINE_bool("raw", False, "The raw weights instead of the averaged ones.")
    flags.DEFINE_integer("images", IMAGES, "Held-out captions that are drawn, at most.")
    flags.DEFINE_string("clip", None, "Folder of a CLIP model (safetensors), for its score.")


def _judged(out: Path) -> str:
    path = out / "evaluation.jsonl"
    return f"what was judged before is in {path}." if path.exists() else "no step has been judged to its end."


def main() -> int:
    given = flags.FLAGS
    mesh.keep_programs()
    if given.images < 1:
        raise InputError(f"--images={given.images}: at least one is needed; {IMAGES} tell well.")
    workdir = commandline.path_of(given.workdir)
    out = commandline.path_of(given.out or str(workdir / "evaluation"))
    try:
        rows, problems = evaluate(
            workdir, out, data_path=given.data, steps=given.steps, raw=given.raw, images=given.images, clip=given.clip
        )
    except MemoryError as error:
        return commandline.fail(f"{error}; {_judged(out)}")
    except KeyboardInterrupt:
        print(f"Stopped; {_judged(out)} The same command does the rest.")
        return commandline.STOPPED
    if not rows and not problems:
        return commandline.fail(
            "no step was judged: a training beside this has removed them; give the same command again."
        )
    print(f"Judged: {len(rows)} of the run's checkpoints. Look at {out / 'evaluation.html'}")
    return commandline.fail("; ".join(problems)) if problems else 0


if __name__ == "__main__":
    define_flags()
    commandline.run(main, interrupted=True)
