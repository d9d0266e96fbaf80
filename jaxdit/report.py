"""WORKDIR/report.html: one page about a run, without any network: where it stands, curves, pictures, health, cost.

python -m jaxdit.report --workdir=DIR [--samples=DIR] [--encoded=OUT/report.html] [--out=PAGE]

Rewritten at each checkpoint (`update`). What cannot be read is left out, and the page says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from encode.page import fold, tiles
from encode.page import table as rich_table
from encode.records import InputError
from encode.whole_files import write_text
from jaxdit import health, report_pictures
from jaxdit.charts import COLOURS, Line, chart, grid, stretches
from jaxdit.facts import Facts, look
from jaxdit.metrics import date, duration
from jaxdit.page import amount, escape, page, section, size, table

CHANGES = 24  # rows of a table of what changed
CALM = {"young": "Too few rows to know what is usual.", "hairy": "Usual for small batches: nothing to do."}


def update(workdir: str | Path) -> Path | None:
    """Rewrite WORKDIR/report.html; whatever fails is logged and not raised: no run ends for its page."""
    try:
        return write(workdir)
    except Exception as error:
        logging.warning("%s/report.html could not be written (%s: %s).", workdir, type(error).__name__, error)
        return None


def write(
    workdir: str | Path,
    *,
    samples: str | Path | None = None,
    encoded: str | Path | None = None,
    out: str | Path | None = None,
) -> Path:
    """Write the page of a run, whole or not at all.

    Args:
      workdir: the working folder; what it holds decides what the page shows.
      samples: a folder that jaxdit.sample wrote.
      encoded: the report.html of the encoded data.
      out: the page; by default WORKDIR/report.html.

    Returns:
      The page's path.

    Raises:
      InputError: workdir or samples is no such folder.
      OSError: the page cannot be written.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise InputError(
            f"{workdir}: config.json is missing, so this is not a working folder; train with --workdir first."
        )
    if samples is not None and not (Path(samples) / "samples.json").exists():
        raise InputError(f"{samples}: samples.json is missing, so this is no folder that jaxdit.sample wrote.")
    out = Path(out or workdir / "report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, build(workdir, samples, encoded, out.parent), shared=True)  # a training may be writing it as well
    return out


def build(workdir: Path, samples: str | Path | None, encoded: str | Path | None, beside: Path) -> str:
    """The page as text; beside is the folder it will stand in."""
    run = look(workdir)
    parts: list[tuple[str, Callable[[], str]]] = [
        ("Samples", lambda: section("Samples", report_pictures.samples(samples))),
        ("Loss", lambda: section("Loss", losses(run), LOSS_NOTE)),
        ("Previews", lambda: section("Previews", report_pictures.previews(workdir, beside), PREVIEWS_NOTE)),
        ("Health", lambda: section("Health", history(run), HEALTH_NOTE)),
        ("Loss by timestep", lambda: section("Loss by timestep", timesteps(run), TIMESTEPS_NOTE)),
        ("Pace", lambda: section("Pace", pace(run), PACE_NOTE)),
        ("Conditions", lambda: section("Inside the model", insides(run), INSIDE_NOTE)),
        ("Cost", lambda: section("Cost", cost(run), cost_note(run), wide=False)),
        ("Checkpoints", lambda: section("Checkpoints", checkpoints(run), wide=False)),
        ("The gate", lambda: section("The gate", report_pictures.gate(workdir, beside))),
        ("The encoded data", lambda: section("The encoded data", report_pictures.encoded(encoded))),
        ("Changes", lambda: section("Changed since the start", changes(run), wide=False)),
        ("Configuration", lambda: section("Configuration", configuration(run), wide=False)),
    ]
    body = "".join(_safely(name, make) for name, make in parts)
    title = (
        f"{min(100 * run.step // run.total, 100)}% of {workdir.resolve().name}" if run.total else workdir.resolve().name
    )
    return page(title, body, _safely("The head", lambda: head(run)))


def _safely(name: str, make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:  # a strange file must not cost the page, still less the run
        logging.warning("The report cannot show %s (%s: %s).", name, type(error).__name__, error)
        return section(name, f"<p class='faint'>It cannot be shown: {escape(error)}</p>")


def head(run: Facts) -> str:
    """Where the run stands in a sentence, its health in another, the numbers below."""
    if not run.step:
        return f"{_over(run)}<h1>Nothing has been trained yet.</h1>{_problems(run)}"
    passes = f", {amount(run.passes)} passes over the data" if run.passes else ""
    seen = f"{amount(run.samples)} samples seen{passes}"
    if run.done:
        title, lead = f"Done: all {run.total:,} steps, {seen}.", ""
    else:
        title = f"Step {run.step:,}{f' of {run.total:,}' if run.total else ''}: {seen}."
        lead = _end(run)
    bar = (
        f'<div class="progress"><i style="width:{min(100 * run.step / run.total, 100):.2f}%"></i></div>'
        if run.total
        else ""
    )
    level, words = run.verdict.level, run.verdict.words
    verdict = (
        f'<div class="health"><span class="tag {level}">{escape(run.verdict.name)}</span><p>{escape(words)}</p></div>'
        if run.verdict.name
        else ""
    )
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"{_over(run)}<h1>{escape(title)}</h1>{bar}{lead}{verdict}{_problems(run)}{_tiles(run)}"


def _over(run: Facts) -> str:
    return f'<p class="over">{escape(run.workdir.resolve())} · {escape(date(run.now, run.now))}</p>'


def _problems(run: Facts) -> str:
    return "".join(f'<p class="faint">{escape(words)}</p>' for words in run.problems)


def _end(run: Facts) -> str:
    """When it ends at the present rate; for a run that has gone quiet, how to go on."""
    if run.left is None:
        words = "Its rate is not known yet."
    elif run.stale:
        words = f"{duration(run.left)} of training are left at its last rate of {run.rate:,.3g} images a second."
    else:
        end = date(run.as_of + timedelta(seconds=run.left), run.now) if run.left < 1e9 else "in many years"
        words = f"At {run.rate:,.3g} images a second, all pauses counted, it ends {end}, in {duration(run.left)}."
    if run.stale:
        again = f" The same command goes on from step {run.resumable[-1]:,}." if run.resumable else ""
        words += f" Its newest row is of {date(run.as_of, run.now)}: if it is not running, it was stopped.{again}"
    return words


def _tiles(run: Facts) -> str:
    rows = [
        (amount(run.samples), "samples seen"),
        (amount(run.passes), f"passes over {run.images:,} images") if run.passes else None,
        (duration(run.seconds), "of training") if run.seconds else None,
        (_energy(run, run.seconds), f"at {run.watts:,.0f} W, an estimate") if run.seconds and run.watts else None,
        (f"{run.rate:,.3g}", "images a second, pauses included") if run.rate else None,
        (f"{run.loss:.4f}", "loss, of late") if run.loss is not None else None,
        (f"{run.held_out:.4f}", "held-out loss") if run.held_out is not None else None,
        (f"{run.voided:,}", "update voided" if run.voided == 1 else "updates voided"),
    ]
    return tiles(row for row in rows if row)


def losses(run: Facts) -> str:
    c, steps = run.columns, run.columns["step"]
    voided = run.voided_steps
    marked = "Marked below: updates that were not finite and moved nothing." if len(voided) else ""
    held_out, training = _held_out(run), c["eval/training/ema/text_vision"]
    gap = [(a, b) for a, b in zip(held_out, training) if np.isfinite(a) and np.isfinite(b)]
    words = ""
    if gap:
        apart = gap[-1][0] - gap[-1][1]
        side = "above" if apart >= 0 else "below"
        words = (
            f"Held-out images lie {abs(apart):.4f} ({abs(apart) / max(gap[-1][1], 1e-9):.1%}) {side} training images."
        )
    return grid(
        chart("Loss", steps, [Line("loss", c["loss"], band=True)], marks=voided, note=marked),
        chart(
            "Held-out loss",
            steps,
            [
                Line("held-out, averaged weights", held_out, "a"),
                Line("held-out, raw weights", c["eval/held_out/raw/text_vision"], "b"),
                Line("training images, averaged", training, "c", dash=True),
            ],
            note=words,
        ),
        chart(
            "Held-out loss by condition",
            steps,
            [
                Line(words, c[f"eval/held_out/ema/{name}"], colour)
                for name, words, colour in (
                    ("none", "neither", "g"),
                    ("text", "text alone", "d"),
                    ("vision", "reference alone", "b"),
                    ("text_vision", "text and reference", "a"),
                )
            ],
        ),
        chart("Gradient norm", steps, [Line("norm", c["grad_norm"], band=True)], log=True, marks=voided, note=marked),
    )


def _held_out(run: Facts) -> np.ndarray:
    ours = run.columns["eval/held_out/ema/text_vision"]
    return ours if np.isfinite(ours).any() else run.columns["held_out_loss"]


def timesteps(run: Facts) -> str:
    c, drawn = run.columns, []
    for k in range(10):
        lines = [
            Line("training", c[f"loss_t/{k}"], "a", band=True),
            Line("held-out", c[f"eval/held_out/ema/t{k}"], "b"),
        ]
        drawn.append(chart(f"{k / 10:.1f} to {(k + 1) / 10:.1f}", c["step"], lines, small=True))
    return f'<div class="bins">{"".join(drawn)}</div>' if any(drawn) else ""


def pace(run: Facts) -> str:
    c, steps = run.columns, run.columns["step"]
    return grid(
        chart("Learning rate", steps, [Line("rate", c["learning_rate"], "b")], zero=True),
        chart("Images a second", steps, [Line("rate", c["images_per_second"], "b", band=True)], zero=True),
        _share("Time spent waiting for data", steps, c["data_wait_fraction"]),
        _share("Use of the device (MFU)", steps, c["mfu"]),
    )


def _share(title: str, steps: np.ndarray, values: np.ndarray) -> str:
    return chart(title, steps, [Line("share", values, "b", band=True)], zero=True, percent=True)


def insides(run: Facts) -> str:
    c, steps = run.columns, run.columns["step"]

    def each(kind: str) -> list[Line]:
        return [Line(name.replace("_", " "), c[f"{kind}/{name}"], x) for name, x in zip(health.CONDITIONS, COLOURS)]

    return grid(
        chart("Gradient of the conditioning", steps, each("grad"), log=True),
        chart("Movement of the conditioning", steps, each("move"), log=True),
        chart(
            "Size of the velocity",
            steps,
            [Line("predicted", c["velocity_rms"], "a"), Line("target", c["target_rms"], "g", dash=True)],
        ),
        chart("Distance of the average from the weights", steps, [Line("share", c["ema_distance"], "b")], log=True, percent=True),
    )  # fmt: skip


def history(run: Facts) -> str:
    """When the verdict changed."""
    found = run.columns.texts.get("health", [])
    if not found:
        return ""
    ends = [step for step, _ in found[1:]] + [run.step]
    rows = []
    for (step, name), end in reversed(list(zip(found, ends))[-CHANGES:]):
        level = health.VERDICTS.get(name, "unknown")
        advice = health.TROUBLES[name][2] if name in health.TROUBLES else CALM.get(name, "")
        words = advice.format(back="go back to a step before it")
        lasted = f"{end - step:,} steps" if end > step else "just now"
        rows.append([f"{step:,}", f'<span class="tag {escape(level)}">{escape(name)}</span>', lasted, escape(words)])
    left = len(found) - len(rows)
    more = f'<p class="faint">And {left:,} changes before these, in metrics.jsonl.</p>' if left > 0 else ""
    band = stretches(run.spans(health.VERDICTS), run.step)
    return band + rich_table(["from step", "verdict", "for", "what to do"], rows, (0, 2), "prose") + more


def cost(run: Facts) -> str:
    """What the run has cost and will cost."""
    if not run.seconds:
        return ""
    rows = [("so far", run.seconds, run.samples)]
    if run.left is not None and not run.done:
        everything = run.total * run.batch
        rows += [("to the end", run.left, everything - run.samples), ("altogether", run.seconds + run.left, everything)]
    lines = [
        [name, _hours(seconds), amount(seen), _energy(run, seconds) if run.watts else "unknown"]
        for name, seconds, seen in rows
    ]
    return table(["", "time", "samples", "energy"], lines, (1, 2, 3))


def cost_note(run: Facts) -> str:
    if not run.watts:
        return "Energy is not known: metrics.watts is not set."
    words = f"Energy is an estimate: hours times metrics.watts, {run.watts:,.0f} W. Nothing was measured."
    return words if run.done else f"{words} What is to come is at the present rate."


def checkpoints(run: Facts) -> str:
    if not run.saved:
        return "<p>None is saved yet.</p>"
    rows = [
        [f"{one.step:,}", f"{'to go on, ' if one.resumable else ''}to sample", size(one.bytes), date(one.at, run.now)]
        for one in reversed(run.saved[-CHANGES:])
    ]
    words = (
        "<p class='faint'>To sample: <code>python -m jaxdit.sample --workdir=DIR --step=N --out=PICTURES</code>. "
        "To go on from an earlier one, in a new folder: <code>--config.train.restore=DIR@N</code>.</p>"
    )
    return table(["step", "good for", "size", "saved"], rows, (0, 2)) + words


def changes(run: Facts) -> str:
    """What was changed from one start to the next, newest first."""
    rows = []
    for entry in reversed(run.changes[-CHANGES:]):
        at = entry.get("time")
        when = date(datetime.fromtimestamp(at), run.now) if isinstance(at, int | float) else ""
        rows.append([when, entry.get("field", ""), json.dumps(entry.get("from")), json.dumps(entry.get("to"))])
    return table(["when", "field", "from", "to"], rows) if rows else ""


def configuration(run: Facts) -> str:
    rows = []
    if run.dataset:
        buckets = len(run.dataset.get("buckets", ()))
        rows.append(
            [
                "Data",
                f"{run.dataset.get('count', 0):,} images in {buckets} buckets, {run.config.get('data', {}).get('path')}",
            ]
        )
    gate = run.origin.get("gate")
    if isinstance(gate, dict):
        rows.append(
            ["Gate", f"{gate.get('verdict')}{f', step {step:,}' if isinstance(step := gate.get('step'), int) else ''}"]
        )
    for name, words in (("init_from", "Weights from"), ("restore", "Gone back to")):
        if isinstance(origin := run.origin.get(name), dict):
            rows.append([words, f"{origin.get('workdir')}, step {origin.get('step')}"])
    text = (run.workdir / "config.json").read_text(encoding="utf-8", errors="replace")
    lines = "\n".join(escape(line) for line in text.splitlines())
    return (table(["", ""], rows) if rows else "") + fold("config.json", f"<pre>{lines}</pre>")  # fmt: skip


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else duration(seconds)


def _energy(run: Facts, seconds: float) -> str:
    kwh = seconds / 3.6e6 * run.watts
    return f"{kwh:,.0f} kWh" if kwh >= 10 else f"{kwh:.2g} kWh" if kwh >= 0.1 else f"{1000 * kwh:.2g} Wh"


LOSS_NOTE = (
    "Faint: the least and the greatest; the line is the mean. The held-out loss is taken with fixed noise and timesteps, so that "
    "its points can be compared."
)
PREVIEWS_NOTE = (
    "The same sentences and references, drawn from the averaged weights with the same noise at each step: what differs is what "
    "the model has learnt since."
)
HEALTH_NOTE = "What the curves said, judged against the run's own past, and when that changed."
TIMESTEPS_NOTE = (
    "0 is the picture, 1 is noise; each frame has its own scale. Orange: training. Blue: held-out images, given text and "
    "reference."
)
PACE_NOTE = "Images a second leave out compiling, evaluating and saving; the end above counts them."
INSIDE_NOTE = (
    "A condition whose gradient or movement goes to zero is no longer heard. The predicted velocity should be a little smaller "
    "than its target."
)


def main() -> int:
    values = flags.FLAGS
    print(write(values.workdir, samples=values.samples, encoded=values.encoded, out=values.out))
    return 0


if __name__ == "__main__":
    from absl import flags

    from encode import commandline

    flags.DEFINE_string("workdir", None, "Working folder of a training run.", required=True)
    flags.DEFINE_string("samples", None, "Folder that jaxdit.sample wrote.")
    flags.DEFINE_string("encoded", None, "report.html of the encoded data.")
    flags.DEFINE_string("out", None, "The page; by default WORKDIR/report.html.")
    commandline.run(main)
