"""gate.html: the verdict, every check beside what it needed, and the pictures that decided it, worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encode.page import fold
from encode.whole_files import write_text
from jaxdit import judge, likeness, page

OVERVIEW, SHOWN = 6, 4  # images of all checks together, and of each


def write(
    out: Path,
    result: Mapping[str, Any],
    examples: Sequence[judge.Example] = (),
    asked: judge.Questions | None = None,
    drawn: Mapping[str, judge.Drawn] | None = None,
    ratios: Mapping[str, np.ndarray] | None = None,
    nexts: Mapping[str, np.ndarray] | None = None,
) -> None:
    """OUT/gate.html of what gate.json holds; without pictures where nothing could be drawn."""
    body = head(result)
    if drawn is not None:
        body += table(result) + overview(examples, asked, drawn) + strips(examples, asked, drawn, ratios, nexts)
    body += fold("How it was judged", _how(result))
    write_text(out / "gate.html", page.page("The gate", body))


def head(result: Mapping[str, Any]) -> str:
    """The verdict in words, what went wrong, and what to do."""
    words = f"{reached(result)}, {result['images']} {result['rule']}."
    if "averaged" in result:
        numbers = result["averaged"]
        words += (
            f" From caption and vector the images come back at {numbers['psnr']:.1f} dB (raw weights "
            f"{result['raw']['psnr']:.1f} dB); "
            f"the most alike other image is {numbers['psnr_next']:.1f} dB away. Text: {result['exchange']}."
        )
    lines = [f"<p class='verdict {result['verdict']}'>{result['verdict']}</p><p>{page.escape(words)}</p>"]
    if "reason" in result:
        lines.append(f"<p>{page.escape(result['reason'])}</p>")
    if result.get("copies"):
        lines.append(
            f"<p>{result['copies']} images are exact copies of others: each counts as the other. Choose "
            "images without copies.</p>"
        )
    if result["advice"]:
        lines.append("<ul>" + "".join(f"<li>{page.escape(line)}</li>" for line in result["advice"]) + "</ul>")
    return "".join(lines)


def reached(result: Mapping[str, Any]) -> str:
    """Which step was judged, and whether the training had ended."""
    step, total = result["step"], result["total_steps"]
    return f"Step {step:,}" + (f" of {total:,} (the training has not ended)" if step < total else "")


def table(result: Mapping[str, Any]) -> str:
    """Every check; then the sizes of both effects."""
    rows = [
        [
            judge.WORDS[name],
            _whole(check["value"]),
            check["needed"],
            _whole(result["raw_checks"][name]["value"]),
            "pass" if check["passed"] else "FAIL",
        ]
        for name, check in result["checks"].items()
    ]
    effects = [
        [
            judge.WORDS[name],
            *(_whole(result[weights]["effects"].get(name)) for weights in ("averaged", "raw")),
            "not drawn" if effect["control"] is None else f"{effect['control']:.2f}",
        ]
        for name, effect in result["averaged"]["effects"].items()
    ]
    leaks = {name: round(value, 2) + 0.0 for name, value in result["averaged"]["leaks"].items()}  # no -0%
    note = (
        "<p>0 is nothing and 1 is all of the way; in brackets the 95% interval of the mean. What should "
        "stay: an exchanged vector takes the "
        f"composition {leaks['composition_by_vector']:.0%} of the way along, and an exchanged caption changes the light by "
        f"{leaks['light_by_caption']:.0%} of what a vector does.</p>"
    )
    return (
        page.table(["check", "averaged weights", "needed", "raw weights", "verdict"], rows)
        + page.table(["size of the effect", "averaged weights", "raw weights", "shuffled controls stay below"], effects)
        + note
    )


def overview(examples: Sequence[judge.Example], asked: judge.Questions, drawn: Mapping[str, judge.Drawn]) -> str:
    """A few images, spread evenly, and everything that was drawn of each."""
    places = sorted({round(k * (len(examples) - 1) / (OVERVIEW - 1)) for k in range(OVERVIEW)})
    rows = [
        page.strip(
            examples[i].record["caption"].decode(),
            [
                ("the image", examples[i].pixels),
                ("caption and vector", drawn["own"].pixels[i]),
                ("caption alone", drawn["text_only"].pixels[i]),
                ("another image", examples[asked.pairs[i]].pixels),
                ("caption in its light", drawn["vision"].pixels[i]),
                ("exchanged caption", drawn["text"].pixels[i]),
            ],
        )
        for i in places
    ]
    return f"<h3>A few images, and all that was drawn</h3>{''.join(rows)}"


def strips(examples, asked, drawn, ratios, nexts) -> str:
    """For each check the pictures that decided it, worst first."""
    parts = []
    for name in judge.THRESHOLDS:
        if name not in ratios:
            continue
        values = ratios[name]
        order = [int(i) for i in np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable") if not np.isnan(values[i])]
        missed = sum(values[i] >= 1 for i in order)
        rows = [_strip(name, i, examples, asked, drawn, values, nexts) for i in order[:SHOWN]]
        title = f"{judge.WORDS[name]}: {len(order) - missed} of {len(order)}; the worst first"
        parts.append(fold(title, "".join(rows)) if not missed else f"<h3>{page.escape(title)}</h3>{''.join(rows)}")
    return "".join(parts)


def _strip(name, i, examples, asked, drawn, values, nexts) -> str:
    example, pair = examples[i], examples[asked.pairs[i]]
    if name.startswith(("memory", "text_only")):
        pixels = drawn["own" if name.startswith("memory") else "text_only"].pixels[i]
        following = examples[nexts[name][i]].pixels
        pictures = [
            ("the image", example.pixels),
            (f"drawn{_decibels(pixels, example.pixels)}", pixels),
            (f"the next{_decibels(following, example.pixels)}", following),
        ]
    elif name.startswith("vision"):
        pictures = [
            ("the caption's image", example.pixels),
            ("drawn with its own vector", drawn["own"].pixels[i]),
            ("the vector's image", pair.pixels),
            ("drawn with that vector", drawn["vision"].pixels[i]),
        ]  # fmt: skip
    else:
        pictures = [
            ("the image", example.pixels),
            ("drawn with its own caption", drawn["own"].pixels[i]),
            ("asked for", asked.goals[i]),
            ("drawn with that caption", drawn["text"].pixels[i]),
        ]
    words = f"{example.record['id'].decode()}: {example.record['caption'].decode()} (ratio {values[i]:.2f})"
    return page.strip(words, pictures)


def _decibels(pixels: np.ndarray, image: np.ndarray) -> str:
    """PSNR to the image, in words; nothing between shapes."""
    return f": {likeness.psnr(pixels, image):.1f} dB" if pixels.shape == image.shape else ""


def shown(value: Any) -> str:
    """A check's value in words."""
    if value is None:
        return "did not run"
    if isinstance(value, Mapping):
        return f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return f"{value:.3f}"


def _whole(value: Any) -> str:
    """The same, not to be broken into lines."""
    return shown(value).replace(" ", "\u00a0") if isinstance(value, Mapping) else shown(value)


def _how(result: Mapping[str, Any]) -> str:
    names = (
        "command",
        "sampling",
        "data",
        "data_fingerprint",
        "model",
        "model_code",
        "weights",
        "versions",
        "device",
        "seconds",
    )
    return page.table(["", ""], [[name, result[name]] for name in names if name in result])
