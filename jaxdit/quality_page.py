"""evaluation.html and the lines on the screen: the numbers of each judged step beside what real images score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encode.page import fold
from encode.whole_files import write_text
from jaxdit import charts, judge, page, quality

HOW = ("own", "alone")
NAMES = {"own": "caption and vector", "alone": "caption alone"}
MEASURES = {
    "frechet": "Fréchet distance",
    "frechet_limit": "Fréchet distance, extrapolated to infinitely many",
    "kernel": "kernel distance",
    "precision": "precision: drawn pictures that could be real",
    "recall": "recall: real images that could be drawn",
    "density": "density: in how many real neighbourhoods a picture lies",
    "coverage": "coverage: real neighbourhoods with a picture in them",
}
LOSSES = {"text_vision": "caption and vector", "text": "caption", "vision": "vector", "none": "neither"}


def write(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """OUT/evaluation.html of rows of one kind, ascending; pictures are read from OUT."""
    newest = rows[-1]
    title = f"Quality in numbers: step {newest['step']:,}, {newest['weights']} weights"
    body = "<ul>" + "".join(f"<li>{page.escape(line)}</li>" for line in findings(newest)) + "</ul>"
    body += page.section("The numbers", _table(newest), _note(newest))
    if len(rows) > 1:
        body += page.section("Through the training", _curves(rows), "Dashed: what real images score.")
    body += page.section("Pictures", _strips(out, newest["strips"]))
    for row in reversed(rows[:-1]):
        body += fold(f"Step {row['step']:,}", _table(row) + _strips(out, row["strips"]))
    body += fold("How it was judged", page.table(["", ""], [[name, newest[name]] for name in _HOW_IT_WAS]))
    write_text(out / "evaluation.html", page.page(title, body))


_HOW_IT_WAS = ("sampling", "data", "device", "images", "real_images", "training_images", "width", "seconds")


def real(row: Mapping[str, Any]) -> str:
    return "held-out images" if row["held_out"] else "training images (none is held out)"


def findings(row: Mapping[str, Any]) -> list[str]:
    """What a person has to know of one step, as sentences."""
    found = []
    if not row["held_out"]:
        found.append(
            "No image of this run is held out: the samples are compared with the training images themselves, and a model that "
            "knows nothing but those looks perfect."
        )
    if row["own"] is None:
        found.append(
            "Nothing is said in vectors: "
            + (
                "they were precomputed, and nobody knows by which model."
                if "vectors" not in row["memory"]["own"]
                else f"there are too few images ({quality.FEWEST} are needed, and as many pictures, which data.holdout_fraction "
                "of a new run can hold out)."
            )
        )
    else:
        found += _bias(row)
    for name in HOW:
        for space, memory in row["memory"][name].items():
            if memory["memorised"]:
                found.append(
                    f"Learnt by heart: {memory['copies']:.0%} of the pictures drawn from {NAMES[name]} are copies of a training "
                    f"image by their {space}; of the {real(row)}, {memory['copies_real']:.0%} are as near to another one."
                )
    exchange = row["exchange"]
    if "reason" in exchange:
        found.append(f"Nothing could be exchanged: {exchange['reason']}")
    for name, check in exchange.get("effects", {}).items():
        if not check["passed"]:
            found.append(f"Too weak: {judge.WORDS[name]}: {_value(check['value'])}, needed {check['needed']}.")
    return found


def _bias(row: Mapping[str, Any]) -> list[str]:
    count, width, halves = min(row["images"], row["real_images"]), row["width"], row["usual"].get("halves")
    if count >= 2 * width or halves is None:
        return []
    return [
        f"{count} vectors of {width} numbers are few: the Fréchet distance is too high then. Two halves of the {real(row)} are "
        f"{_number(halves['frechet'])} apart, which should be 0; compare steps with each other, and with the training images."
    ]


def lines(row: Mapping[str, Any]) -> list[str]:
    """One step on the screen."""
    head = f"Step {row['step']:,} ({row['weights']} weights, {row['images']} pictures, {row['seconds']:.0f} s):"
    told = []
    for name in HOW:
        if row[name] is not None:
            words = ", ".join(
                f"{measure} {_number(row[name][measure])}"
                for measure in ("frechet", "kernel", "precision", "recall", "coverage")
            )
            told.append(f"  {NAMES[name]}: {words}")
    for name, numbers in row["usual"].items():
        if isinstance(numbers, Mapping):
            words = ", ".join(
                f"{m} {_number(numbers[m])}" for m in ("frechet", "kernel", "precision", "recall", "coverage")
            )
            told.append(f"  {_USUAL[name]}: {words}")
    return [head, *told, *(f"  {line}" for line in findings(row))]


_USUAL = {"halves": "two halves of the real images", "training": "as many training images"}


def _table(row: Mapping[str, Any]) -> str:
    usual = row["usual"]
    others = [name for name in ("training", "halves") if name in usual]
    head = ["", *(NAMES[name] for name in HOW), *(_USUAL[name] for name in others)]
    body = []
    if row["own"] is not None:
        for measure, words in MEASURES.items():
            cells = [row[name][measure] for name in HOW] + [usual[name][measure] for name in others]
            if any(cell is not None for cell in cells):
                body.append([words, *map(_number, cells)])
    if "clip" in row:
        body.append(["CLIP score", *(_number(row["clip"][name]) for name in HOW), *([""] * len(others))])
        body.append([f"CLIP score of the {real(row)}", _number(usual["clip"]), *([""] * (1 + len(others)))])
    shown = page.table(head, body, range(1, len(head))) if body else ""
    spaces = [
        [
            f"{NAMES[name]}, by {space}",
            *(_number(memory[key]) for key in ("nearer", "copies", "copies_real", "closest")),
        ]
        for name in HOW
        for space, memory in row["memory"][name].items()
    ]
    shown += "<h3>Nearest training images</h3>" + page.table(
        ["", "nearer than real ones", "copies", "copies among real ones", "closest"], spaces, range(1, 5)
    )
    shown += "<h3>What the captions and vectors do</h3>" + _heard(row)
    splits = [split for split in ("held_out", "training") if any(name.startswith(f"{split}/") for name in row["loss"])]
    losses = [
        [words, *(_number(row["loss"].get(f"{split}/{name}")) for split in splits)] for name, words in LOSSES.items()
    ]
    head = ["loss, given", *(f"{split.replace('_', '-')} images" for split in splits)]
    return shown + "<h3>Loss</h3>" + page.table(head, losses, range(1, len(head)))


def _heard(row: Mapping[str, Any]) -> str:
    body = [
        [judge.WORDS[name], _value(check["value"]), check["needed"], "yes" if check["passed"] else "NO"]
        for name, check in row["exchange"].get("effects", {}).items()
    ]
    shown = page.table([row["exchange"].get("by", ""), "", "needed", "heard"], body) if body else ""
    if row["diversity"] is not None:
        between = {
            "pictures of one caption": row["diversity"]["one_prompt"],
            "pictures of different captions": row["diversity"]["all_prompts"],
            real(row): row["usual"].get("apart"),
        }
        shown += page.table(
            ["mean distance between the vectors of", ""], ([k, _number(v)] for k, v in between.items()), (1,)
        )
    return shown


def _note(row: Mapping[str, Any]) -> str:
    return (
        f"{row['images']} pictures, drawn with captions of {page.escape(real(row))}, by the vision encoder's vectors. Smaller "
        "distances are better; shares go to 1. What as many training images score, a model that knows the caption alone can "
        "hardly surpass (given the vectors themselves it can); two halves of the real images show what the numbers are worth. A "
        "copy is twice as near to a training image, for how far away the fifty following ones are, as a real image usually is."
    )


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = np.array([row["step"] for row in rows], np.float64)

    def values(*path: str) -> np.ndarray:
        found = []
        for row in rows:
            value: Any = row
            for part in path:
                value = value.get(part) if isinstance(value, Mapping) else None
            found.append(np.nan if value is None else float(value))
        return np.array(found)

    def beside(title: str, drawn: list[charts.Line], usual: charts.Line, **how: bool) -> str:
        """The model's curves, and dashed what real images score, which alone would be taken for the model's."""
        known = any(np.isfinite(line.values).any() for line in drawn)
        return charts.chart(title, steps, [*drawn, usual], **how) if known else ""

    usual = "training" if "training" in rows[-1]["usual"] else "halves"
    parts = []
    for name, words in MEASURES.items():
        drawn = [charts.Line(NAMES[way], values(way, name), colour) for way, colour in zip(HOW, "ab")]
        real = charts.Line(_USUAL[usual], values("usual", usual, name), "c", dash=True)
        parts.append(beside(words.split(":")[0].capitalize(), drawn, real, log=name == "frechet"))
    for title, key in (
        ("Nearer to a training image than real ones", "nearer"),
        ("Copies of training images", "copies"),
    ):
        drawn = [
            charts.Line(f"{NAMES[name]}, {space}", values("memory", name, space, key), "abcd"[2 * k + j])
            for k, name in enumerate(HOW)
            for j, space in enumerate(("vectors", "latents"))
        ]
        parts.append(charts.chart(title, steps, drawn, zero=True, percent=True))
    moved = [
        charts.Line(judge.WORDS[name].split(" (")[0], values("exchange", "effects", name, "value", "mean"), "abcd"[k])
        for k, name in enumerate(judge.EFFECTS)
    ]
    parts.append(charts.chart("How far an exchange moves", steps, moved))
    apart = [
        charts.Line("one caption", values("diversity", "one_prompt"), "a"),
        charts.Line("different captions", values("diversity", "all_prompts"), "b"),
    ]
    real = charts.Line("real images", values("usual", "apart"), "c", dash=True)
    parts.append(beside("Distance between pictures", apart, real, zero=True))
    split = "held_out" if rows[-1]["held_out"] else "training"
    losses = [
        charts.Line(words, values("loss", f"{split}/{name}"), "abcd"[k])
        for k, (name, words) in enumerate(LOSSES.items())
    ]
    parts.append(charts.chart(f"Loss of {split.replace('_', '-')} images, given", steps, losses))
    clip = [charts.Line(NAMES[name], values("clip", name), colour) for name, colour in zip(HOW, "ab")]
    parts.append(beside("CLIP score", clip, charts.Line("real images", values("usual", "clip"), "c", dash=True)))
    return charts.grid(*parts)


def _strips(out: Path, strips: Sequence[Mapping[str, Any]]) -> str:
    """The pictures of one step, as they lie in OUT; one that was removed is left out."""
    shown = ""
    for strip in strips:
        files = [(words, out / name) for words, name in strip["pictures"]]
        row = "".join(
            f'<figure><img alt="" src="{page.jpeg(file.read_bytes())}"><figcaption>{page.escape(words)}</figcaption></figure>'
            for words, file in files
            if file.exists()
        )
        shown += f'<div class="strip"><p>{page.escape(strip["words"])}</p><div>{row}</div></div>'
    return shown


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


def _value(value: Any) -> str:
    return "not drawn" if value is None else f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
