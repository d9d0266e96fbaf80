"""Pictures of the page about a run: previews through time, samples, the gate, the page of the encoded data.

A page of a month stays under five megabytes: old previews are shown small. Their small copies are kept in
WORKDIR/previews/.small, so that a checkpoint costs the time of its own pictures only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxdit.page import escape, figure, inside, jpeg, small

SHOWN = 8  # steps of the previews: the first, the newest, and some in between
OLD, NEWEST = 192, 512  # pixels of the longer side
ROWS = 16  # prompts; more would make the page heavy
LARGE = 1_500_000  # bytes of a gate's page, above which it is linked to and not taken in


def previews(workdir: Path, beside: Path) -> str:
    """A row a prompt, a picture a step; the pictures lead to the full ones where the page stands with the run.

    Args:
      workdir: the working folder.
      beside: the folder that the page will stand in.
    """
    folder = workdir / "previews"
    steps = sorted(
        int(child.name)
        for child in (folder.iterdir() if folder.is_dir() else ())
        if child.name.isdecimal() and any(child.glob("*.png"))
    )
    if not steps:
        return ""
    entries = listed(folder, steps)
    columns = evenly(steps, SHOWN)
    shown = entries[:ROWS]
    newest = "".join(_newest(folder, entry, steps[-1], beside) for entry in shown)
    rows = "".join(_row(folder, entry, columns, beside) for entry in shown) if len(columns) > 1 else ""
    left = [f"{len(steps) - len(columns):,} more steps"] if len(steps) > len(columns) else []
    left += [f"{len(entries) - ROWS:,} more prompts"] if len(entries) > ROWS else []
    return (
        f'<h3>Step {steps[-1]:,}</h3><div class="newest">{newest}</div>'
        + (f'<h3>Through time</h3><div style="--steps:{len(columns)}">{rows}</div>' if rows else "")
        + (f'<p class="faint">Not shown: {" and ".join(left)}, in {escape(folder)}.</p>' if left else "")
    )


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of ascending steps, the first and the last among them, the others as even as they can be."""
    if len(steps) <= count:
        return list(steps)
    wanted = [steps[0] + (steps[-1] - steps[0]) * k / (count - 1) for k in range(1, count - 1)]
    return sorted({steps[0], steps[-1], *(min(steps, key=lambda step: abs(step - place)) for place in wanted)})


def listed(folder: Path, steps: Sequence[int]) -> list[dict[str, Any]]:
    """What previews.json says of each picture; without it, the names of the pictures themselves."""
    try:
        found = json.loads((folder / "previews.json").read_text(encoding="utf-8"))
        entries = [entry for entry in found if isinstance(entry, dict) and _plain(entry.get("name"))]
    except (OSError, ValueError, TypeError):
        entries = []
    return entries or [
        {"name": path.stem} for path in sorted((folder / str(steps[-1])).glob("*.png")) if _plain(path.stem)
    ]


def _plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) is not None


def _newest(folder: Path, entry: dict[str, Any], step: int, beside: Path) -> str:
    words = f"<p>{escape(entry['prompt'])}</p>" if entry.get("prompt") else ""
    words += f'<p class="faint">{escape(entry["note"])}</p>' if entry.get("note") else ""
    if entry.get("reference") and str(entry["reference"]) not in str(entry.get("note")):
        words += f'<p class="faint">reference: {escape(entry["reference"])}</p>'
    words = words or f"<p>{escape(entry['name'])}</p>"
    return f"<figure>{_image(folder, entry, step, NEWEST, beside)}{words}</figure>"


def _row(folder: Path, entry: dict[str, Any], steps: Sequence[int], beside: Path) -> str:
    words = escape(entry.get("prompt") or entry.get("note") or entry["name"])
    cells = "".join(
        f"<figure>{_image(folder, entry, step, OLD, beside)}<figcaption>{step:,}</figcaption></figure>"
        for step in steps
    )
    return f'<div class="row"><p>{words}</p>{cells}</div>'


def _image(folder: Path, entry: Mapping[str, Any], step: int, side: int, beside: Path) -> str:
    path = folder / str(step) / f"{entry['name']}.png"
    try:
        if _of_another_set(path, entry):
            return '<span class="none">of another set</span>'
        data = jpeg(_small(folder, path, step, side))
    except Exception as error:  # missing, cut, or no picture at all: Pillow raises many things
        return f'<span class="none">{"not drawn" if isinstance(error, FileNotFoundError) else "damaged"}</span>'
    where = _link(path, beside)
    return f'<a href="{where}"><img alt="" src="{data}"></a>'


def _of_another_set(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the picture was drawn before previews.json was chosen anew, for another sentence or reference."""
    from PIL import Image

    with Image.open(path) as image:
        said = image.info
    return any(said.get(key, entry.get(key)) != entry.get(key) for key in ("prompt", "reference", "note"))


def _link(path: Path, beside: Path) -> str:
    """Where a page that stands in `beside` finds a file; a name may be any bytes."""
    return quote(os.fsencode(os.path.relpath(path.resolve(), beside.resolve())))


def _small(folder: Path, path: Path, step: int, side: int) -> bytes:
    from PIL import Image

    found = path.stat()
    kept = folder / ".small" / f"{step}-{path.stem}-{side}-{found.st_size}-{found.st_mtime_ns}.jpg"
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    with Image.open(path) as image:
        data = small(image, side)
    with contextlib.suppress(OSError):  # a copy that cannot be kept is made again
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_suffix(".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, kept)
    return data


def samples(folder: str | Path | None) -> str:
    """What jaxdit.sample wrote."""
    if folder is None:
        return ""
    figures = []
    for row in json.loads((Path(folder) / "samples.json").read_text(encoding="utf-8")):
        words = row["prompt"] + (f" — in the light of {row['reference']}" if row["reference"] else "")
        figures.append(figure((Path(folder) / row["file"]).read_bytes(), words))
    return f'<div class="cards">{"".join(figures)}</div>' if figures else ""


def gate(workdir: Path, beside: Path) -> str:
    """The gate's own page, taken in where it is small."""
    path = workdir / "gate" / "gate.html"
    if not path.exists():
        return ""
    where = f'<p><a href="{_link(path, beside)}">gate.html</a></p>'
    if path.stat().st_size <= LARGE and (found := inside(path.read_text(encoding="utf-8"))):
        return found
    verdict = json.loads((workdir / "gate" / "gate.json").read_text(encoding="utf-8")).get("verdict", "unknown")
    return f'<p class="verdict {escape(verdict)}">{escape(verdict)}</p>{where}'


def encoded(path: str | Path | None) -> str:
    """The page of the encoded data, as a frame."""
    if path is None or not Path(path).exists():
        return ""
    whole = Path(path).read_text(encoding="utf-8")
    return f'<iframe title="The encoded data" loading="lazy" srcdoc="{escape_markup(whole)}"></iframe>'


def escape_markup(whole: str) -> str:
    """HTML as the value of an attribute."""
    return whole.replace("&", "&amp;").replace('"', "&quot;")
