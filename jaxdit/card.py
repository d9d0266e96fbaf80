"""The model card of an exported folder: README.md out of the run's records, with the front matter that Hugging Face's hub reads.

Every number comes from config.json, dataset.json, metrics.jsonl, config_history.jsonl, origin.json, gate/gate.json or the
previews; what none of them says is said to be unknown. The licences of the encoders are named to be checked, not granted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdit import facts, report_pictures
from jaxdit.metrics import duration

FRONT = """---
library_name: diffusers
pipeline_tag: text-to-image
license: unknown
tags:
- text-to-image
- diffusion-transformer
- rectified-flow
- jaxdit
---"""
PICTURES, EVALUATIONS, CHANGES = 8, 12, 20  # shown at most
LICENCES = {
    "flux": "FLUX.1 [schnell] is published under Apache-2.0, FLUX.1 [dev] under a non-commercial licence of its own",
    "t5": "Google's T5 is published under Apache-2.0",
    "dinov3": "DINOv3 is published under a licence of its own (DINOv3 License)",
    "demo": "embedded in jaxdit, without weights",
}
WHAT = {"vae": "image", "text": "text", "vision": "reference"}
EVALUATED = {
    "held-out, averaged weights": "eval/held_out/ema/text_vision",
    "held-out, raw weights": "eval/held_out/raw/text_vision",
    "training images, averaged weights": "eval/training/ema/text_vision",
}


def write(
    workdir: Path, folder: Path, *, title: str, step: int, raw: bool, parameters: int, copied: Sequence[str]
) -> list[str]:
    """README.md and samples/ in an exported folder.

    Args:
      workdir: the working folder that the model comes from.
      folder: the exported folder, being made.
      title: the model's name.
      step, raw: which weights were exported.
      parameters: how many numbers the model has.
      copied: kinds of encoders ("vae", "text", "vision") that the folder holds itself.

    Returns:
      A sentence for each record that could not be read.
    """
    run = facts.look(workdir)
    problems = list(run.problems)
    parts = [
        FRONT,
        f"# {_plain(title)}",
        _pictures(run, folder, step),
        "## Model",
        _table(("", ""), _model(run, step, raw, parameters)),
        "## Data",
        _table(("", ""), _data(run)),
        _table(("bucket", "images"), [(name, f"{info['count']:,}") for name, info in run.dataset["buckets"].items()]),
        "## Training",
        _table(("", ""), _training(run, step)),
        _changes(run),
        "## Held-out loss",
        _held_out(run, step),
        "## Health",
        _health(run, step),
        "## Gate",
        _gate(run, problems),
        "## Encoders",
        _table(("", "model", "weights (SHA-256)", "where", "licence, to be checked"), _encoders(run, copied)),
        "## Use",
        _use(),
    ]
    if problems:
        parts.append("Records that could not be read: " + _plain(" ".join(problems)))
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return problems


def _pictures(run: facts.Facts, folder: Path, step: int) -> str:
    """Copies of the previews nearest before the exported step, each with what it was drawn from."""
    from PIL import Image

    previews = run.workdir / "previews"
    steps = [int(child.name) for child in (previews.iterdir() if previews.is_dir() else ()) if child.name.isdecimal()]
    steps = sorted(one for one in steps if one <= step and any((previews / str(one)).glob("*.png")))
    if not steps:
        return "No sample pictures are recorded."
    rows = []
    for entry in report_pictures.listed(previews, steps)[:PICTURES]:
        source = previews / str(steps[-1]) / f"{entry['name']}.png"
        if source.is_file():
            (folder / "samples").mkdir(exist_ok=True)
            with Image.open(source) as image:  # without the text in the file, which may name other files of its owner
                image.convert("RGB").save(folder / "samples" / source.name)
            words = "; ".join(_plain(entry[name]) for name in ("prompt", "note") if entry.get(name))
            rows.append((f"![](samples/{source.name})", words or _plain(entry["name"])))
    return f"Previews of step {steps[-1]:,}, from the averaged weights:\n\n" + _rich(("", "drawn from"), rows)


def _model(run: facts.Facts, step: int, raw: bool, parameters: int) -> list[tuple[str, str]]:
    model, sample = run.config["model"], run.config["sample"]
    return [
        ("parameters", f"{parameters:,}"),
        ("layers, width, heads, patch", ", ".join(str(model[name]) for name in ("layers", "width", "heads", "patch"))),
        ("weights", f"{'raw' if raw else 'averaged'}, of step {step:,}"),
        ("resolution", f"{run.dataset.get('resolution', 'unknown')}"),
        (
            "sampling in the configuration",
            f"{sample['steps']} steps, shift {sample['shift']}, guidance {sample['text_guidance']} (text), "
            f"{sample['vision_guidance']} (reference)",
        ),
    ]


def _data(run: facts.Facts) -> list[tuple[str, str]]:
    data, held_out = run.dataset, run.config["data"].get("holdout_fraction") or 0.0
    return [
        ("images", f"{data['count']:,}" if "count" in data else "unknown"),
        ("exact duplicates among them", f"{data['duplicates']:,}" if "duplicates" in data else "unknown"),
        ("held out of training", f"{held_out:.1%}"),
        ("longest caption", f"{data['text_longest']:,} tokens"),
        (
            "mirror images with exchanged captions",
            f"{(run.config.get('flow') or {}).get('flip', 0):.0%} of the samples",
        ),
    ]


def _training(run: facts.Facts, step: int) -> list[tuple[str, str]]:
    columns, upto = run.columns, run.columns["step"] <= step
    samples = _last(columns["samples_seen"][upto]) or step * run.batch
    seconds, passes = _last(columns["seconds"][upto]), _last(columns["passes"][upto])
    rows = [
        ("samples seen", f"{samples:,.0f} in {step:,} of {run.total:,} steps of {run.batch:,}"),
        ("passes over the data", f"{passes:,.1f}" if passes else "unknown"),
        ("loss, last logged", f"{loss:.4f}" if (loss := _last(columns["loss"][upto])) else "unknown"),
        ("time", duration(seconds) if seconds else "unknown"),
    ]
    if seconds and run.watts:
        rows.append(
            ("energy", f"{seconds / 3.6e6 * run.watts:.3g} kWh, estimated: time x {run.watts:,.0f} W configured")
        )
    if voided := _last(columns["voided"][upto]):
        rows.append(("updates that were not finite and moved nothing", f"{voided:,.0f}"))
    for name, words in (("init_from", "weights at the start from"), ("restore", "gone back to")):
        if isinstance(origin := run.origin.get(name), Mapping):
            rows.append((words, f"another run, step {origin.get('step')}"))
    optim = run.config.get("optim") or {}
    names = ("name", "peak_learning_rate", "warmup_steps", "weight_decay", "ema_decay")
    rows.append(("optimizer", ", ".join(f"{name}={optim[name]}" for name in names if name in optim) or "unknown"))
    return rows


def _changes(run: facts.Facts) -> str:
    rows = [
        (entry.get("field", ""), json.dumps(entry.get("from")), json.dumps(entry.get("to")))
        for entry in run.changes
        if not any(isinstance(entry.get(side), str) and "/" in entry[side] for side in ("from", "to"))
    ]
    head = f"Changed while it ran ({len(rows)} times):\n\n"
    return head + _table(("field", "from", "to"), rows[-CHANGES:]) if rows else ""


def _held_out(run: facts.Facts, step: int) -> str:
    columns = run.columns
    known = [
        k
        for k in range(len(columns))
        if columns["step"][k] <= step and np.isfinite(columns[EVALUATED[next(iter(EVALUATED))]][k])
    ]
    if not known:
        return "No evaluation on held-out images is recorded."
    rows = [
        (f"{columns['step'][k]:,.0f}", *(f"{columns[name][k]:.4f}" for name in EVALUATED.values()))
        for k in (known[place] for place in report_pictures.evenly(range(len(known)), EVALUATIONS))
    ]
    return _table(("step", *EVALUATED), rows)


def _health(run: facts.Facts, step: int) -> str:
    said = [(at, name) for at, name in run.columns.texts.get("health", []) if at <= step]
    if not said:
        return "No verdict is recorded."
    rows = [(f"{at:,}", name) for at, name in said[-CHANGES:]]
    return f"Verdict at step {step:,}: **{_plain(said[-1][1])}**.\n\n" + _table(("from step", "verdict"), rows)


def _gate(run: facts.Facts, problems: list[str]) -> str:
    gate = facts.read(run.workdir / "gate" / "gate.json", problems)
    if not gate:
        inherited = run.origin.get("gate")
        if not isinstance(inherited, Mapping):
            return "No verdict of the gate is recorded."
        return (
            f"Inherited from a run before: **{_plain(inherited.get('verdict'))}**, at its step {inherited.get('step')}."
        )
    words = f"Verdict at step {gate.get('step')}, on {gate.get('images')} images: **{_plain(gate.get('verdict'))}**."
    checks = gate.get("checks") or {}
    rows = [
        (name, _number(check.get("value")), check.get("needed"), "yes" if check.get("passed") else "no")
        for name, check in checks.items()
    ]
    return words + ("\n\n" + _table(("check", "value", "needed", "passed"), rows) if rows else "")


def _encoders(run: facts.Facts, copied: Sequence[str]) -> list[tuple[str, ...]]:
    rows = []
    for kind, words in WHAT.items():
        section, print_ = run.dataset["encoders"][kind], run.dataset["fingerprint"].get(kind) or {}
        path = str(section.get("path") or "")
        repository = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).expanduser().is_dir()
        name = path if repository else Path(path).name or print_.get("id", section["name"])
        where = (
            "in this folder" if kind in copied or section["name"] == "demo" else "fetched" if repository else "a folder"
        )
        digest = f"{print_['weights'][:16]}..." if "weights" in print_ else "none"
        rows.append((words, name, digest, where, LICENCES.get(section["name"], "unknown")))
    return rows


def _use() -> str:
    return """```
pip install torch diffusers transformers sentencepiece safetensors pillow
python pipeline.py --prompt="..." --reference=picture.jpg --out=PICTURES
```

```python
import sys
sys.path.insert(0, "FOLDER")  # this folder; its code is imported like any other, so trust_remote_code is not needed
from torch_dit.pipeline import JaxditPipeline

pipeline = JaxditPipeline.from_pretrained("FOLDER").to("cuda")
pipeline("...", reference=image).images[0].save("picture.png")
```"""


def _last(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_number(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(words: Any) -> str:
    """Text that Markdown shows letter by letter, on one line."""
    line = " ".join(str(words).split()).translate({ord("<"): "&lt;", ord(">"): "&gt;", ord("&"): "&amp;"})
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", line)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return _rich(head, ([_plain(cell) for cell in row] for row in rows))


def _rich(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
