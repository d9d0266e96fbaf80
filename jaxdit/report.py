"""WORKDIR/report.html: one page about a run, without any network: curves, the gate, pictures, configuration.

python -m jaxdit.report --workdir=DIR [--samples=DIR] [--encoded=OUT/report.html] [--out=PAGE]
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encode.records import InputError
from jaxdit import metrics

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --faint: #667085; --paper: #fbfaf8; --card: #fff; --line: #e4e1da;
  --accent: #b4552d; --good: #2f7d4f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e6df; --faint: #9aa0ab; --paper: #15171c; --card: #1d2027;
  --line: #30343d; --accent: #e08a5f; --good: #6fc28f; --bad: #ff8a80; } }
* { box-sizing: border-box } body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.5rem 5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif } h1 { font-size: 2rem; margin: 0 0 .2rem } h2 { margin: 3rem 0 .8rem;
  font-size: 1.3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem } p { max-width: 46rem } .faint { color:
  var(--faint) } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums } th, td { text-align:
  left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line) } th { color: var(--faint); font-weight: 500 }
.verdict { display: inline-block; padding: .3rem 1rem; border-radius: 2rem; color: #fff; font-weight: 600; background:
  var(--bad) } .verdict.pass { background: var(--good) } .strip { margin: 1.2rem 0; } .strip > div { display: flex; gap: .6rem;
  flex-wrap: wrap } figure { margin: 0; width: 9.6rem } figure img { width: 100%; border-radius: .4rem; display: block }
figcaption { font-size: .8rem; color: var(--faint); line-height: 1.3; padding-top: .25rem } .cards { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) } .cards figure { width: auto } .charts { display: grid; gap:
  1.2rem; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)) } svg { width: 100%; background: var(--card); border: 1px
  solid var(--line); border-radius: .5rem } svg text { fill: var(--faint); font-size: 11px } svg .raw { stroke: var(--accent);
  opacity: .28 } svg .smooth { stroke: var(--accent); stroke-width: 2 } svg .grid { stroke: var(--line) } iframe { width: 100%;
  height: 46rem; border: 1px solid var(--line); border-radius: .5rem } pre { background: var(--card); border: 1px solid
  var(--line); border-radius: .5rem; padding: 1rem; overflow-x: auto; font-size: .85rem }
"""


def escape(words: Any) -> str:
    """Text made safe for a page."""
    return html.escape(str(words))


def page(title: str, body: str) -> str:
    """A whole HTML page."""
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{lines}</table>"


def picture(pixels: np.ndarray | bytes) -> str:
    """A data URI of a [height, width, 3] uint8 picture, or of the bytes of a PNG file."""
    from PIL import Image

    if not isinstance(pixels, bytes):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        pixels = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(pixels).decode()


def figure(pixels: np.ndarray | bytes, caption: str) -> str:
    return f"<figure><img alt='' src='{picture(pixels)}'><figcaption>{escape(caption)}</figcaption></figure>"


def strip(title: str, pictures: Sequence[tuple[str, np.ndarray]]) -> str:
    """A row of captioned pictures under a title."""
    row = "".join(figure(pixels, words) for words, pixels in pictures)
    return f"<div class='strip'><p>{escape(title)}</p><div>{row}</div></div>"


def chart(title: str, steps: Sequence[float], values: Sequence[float], log: bool = False) -> str:
    """A curve as SVG: the values faint, their running mean strong."""
    width, height, left, bottom = 460, 240, 56, 24
    pairs = [(s, v) for s, v in zip(steps, values) if v is not None and (v > 0 or not log)]
    if len(pairs) < 2:
        return ""
    x, y = map(np.array, zip(*pairs))
    shown = np.log10(y) if log else y
    kernel = max(1, len(shown) // 25)
    padded = np.pad(shown, (kernel // 2, kernel - 1 - kernel // 2), mode="edge")
    smooth = np.convolve(padded, np.ones(kernel) / kernel, "valid")
    low, high = np.quantile(shown, 0.005), np.quantile(shown, 0.995)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def line(data, kind):
        px = left + (x - x[0]) / max(x[-1] - x[0], 1) * (width - left - 12)
        py = 30 + (1 - (np.clip(data, low, high) - low) / (high - low)) * (height - 30 - bottom - 8)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py))
        return f"<polyline class='{kind}' fill='none' points='{points}'/>"

    marks = ""
    for part in (0.0, 0.5, 1.0):
        value, place = high - part * (high - low), 30 + part * (height - 30 - bottom - 8)
        words = f"{10**value if log else value:.3g}"
        marks += f"<line class='grid' x1='{left}' x2='{width - 12}' y1='{place}' y2='{place}'/>"
        marks += f"<text x='{left - 6}' y='{place + 4}' text-anchor='end'>{words}</text>"
    return (
        f"<svg viewBox='0 0 {width} {height}' role='img'><text x='{left}' y='18'>{escape(title)}</text>{marks}"
        f"{line(shown, 'raw')}{line(smooth, 'smooth')}<text x='{left}' y='{height - 6}'>step {int(x[0]):,}</text>"
        f"<text x='{width - 12}' y='{height - 6}' text-anchor='end'>{int(x[-1]):,}</text></svg>"
    )


def write(
    workdir: str | Path,
    *,
    samples: str | Path | None = None,
    encoded: str | Path | None = None,
    out: str | Path | None = None,
) -> Path:
    """Write the page of a run.

    Args:
      workdir: the working folder; what it holds decides what the page shows.
      samples: a folder that jaxdit.sample wrote.
      encoded: the report.html of the encoded data.
      out: the page; by default WORKDIR/report.html.

    Returns:
      The page's path.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise InputError(
            f"{workdir}: config.json is missing, so this is not a working folder; train with --workdir first."
        )
    if samples is not None and not (Path(samples) / "samples.json").exists():
        raise InputError(f"{samples}: samples.json is missing, so this is no folder that jaxdit.sample wrote.")
    rows = metrics.read(workdir)
    body = _summary(workdir, rows) + _samples(samples) + _gate(workdir) + _curves(rows) + _encoded(encoded)
    body += "<h2>Configuration</h2><pre>" + escape((workdir / "config.json").read_text(encoding="utf-8")) + "</pre>"
    out = Path(out or workdir / "report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page("A model trained from nothing", body), encoding="utf-8")
    return out


def _summary(workdir: Path, rows: Sequence[dict[str, Any]]) -> str:
    dataset = json.loads((workdir / "dataset.json").read_text(encoding="utf-8"))
    if not rows:
        return "<p>Nothing has been trained yet.</p>"
    last = rows[-1]
    rates = [row["images_per_second"] for row in rows if row.get("images_per_second")]
    return (
        f"<p class='faint'>{dataset['count']} images in {len(dataset['buckets'])} buckets; {last['step']:,} steps, "
        f"{last['samples_seen']:,} samples seen, {last['voided']} steps voided, "
        f"{np.median(rates) if rates else 0:.1f} images a second.</p>"
    )


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    charts = (
        ("loss", "loss", False),
        ("loss of the averaged weights on held-out images", "held_out_loss", False),
        ("gradient norm", "grad_norm", True),
        ("learning rate", "learning_rate", False),
        ("images a second", "images_per_second", False),
    )
    steps = [row["step"] for row in rows]
    drawn = "".join(chart(title, steps, [row.get(name) for row in rows], log) for title, name, log in charts)
    return f"<h2>Training</h2><div class='charts'>{drawn}</div>" if drawn else ""


def _samples(folder: str | Path | None) -> str:
    if folder is None:
        return ""
    figures = []
    for row in json.loads((Path(folder) / "samples.json").read_text(encoding="utf-8")):
        words = row["prompt"] + (f" — in the light of {row['reference']}" if row["reference"] else "")
        figures.append(figure((Path(folder) / row["file"]).read_bytes(), words))
    return f"<h2>Samples</h2><div class='cards'>{''.join(figures)}</div>"


def _gate(workdir: Path) -> str:
    path = workdir / "gate" / "gate.html"
    if not path.exists():
        return ""
    body = re.search(r"<h1>.*?</h1>(.*)</body>", path.read_text(encoding="utf-8"), re.DOTALL)
    return f"<h2>The gate</h2>{body.group(1)}" if body else ""


def _encoded(path: str | Path | None) -> str:
    if path is None or not Path(path).exists():
        return ""
    inside = escape(Path(path).read_text(encoding="utf-8"))
    return f"<h2>The encoded data</h2><iframe title='The encoded data' loading='lazy' srcdoc=\"{inside}\"></iframe>"


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
