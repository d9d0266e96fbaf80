"""The HTML page about an encoded data set: what went in, what came out, and what it looks like when decoded again.

One file without scripts or network, light or dark as the reader's machine is. All text of the user's is escaped. The same
data set gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from encode import buckets, captions, images, records

SAMPLES = 12
LISTED = 200  # lines of a long list that the page shows; quarantine.jsonl has all
THUMBNAIL = 192  # pixels


def build(
    context: Any, plan: Mapping, jobs: Sequence, parts: Sequence[Mapping], refused: Sequence, datasets: Mapping
) -> str:
    """The page.

    Args:
      context: pipeline.Context.
      plan: content of plan.json.
      jobs: the shards of the plan.
      parts: what each shard left behind, in the order of jobs.
      refused: source.Problem of every input not encoded.
      datasets: {resolution: content of dataset.json}.
    """
    largest = max(datasets)
    rows = [row for part in parts for row in part["records"]]
    sizes = {name: (width, height) for job in jobs for name, width, height in job.entries}
    places = {row[0]: job.shape for job, part in zip(jobs, parts) for row in part["records"]}
    stretch = {name: buckets.assign(sizes[name][0] / sizes[name][1], [shape])[1] for name, shape in places.items()}
    small = [name for name, shape in places.items() if _is_upscaled(sizes[name], context, shape, largest)]
    copies = _duplicates(rows)
    truncated = [name for part in parts for name in part["truncated"]]
    swaps = _swap_decisions([plan["inputs"][row[0]] for row in rows])
    tiles = [
        (len(rows), "pictures encoded"),
        (len(refused), "inputs refused"),
        (len(datasets[largest]["buckets"]), "buckets"),
        (f"{(max(stretch.values()) - 1) * 100:.1f}%", "largest stretch"),
        (len(small), f"smaller than their bucket at {largest}"),
        (len(truncated), "captions cut"),
        (sum(len(group) - 1 for group in copies), "exact duplicates"),
        (len(swaps["in doubt: never flipped"]), "never flipped"),
    ]
    sections = [
        _tiles(tiles),
        _section("What the model will see", _samples(context, jobs, parts, datasets), SAMPLES_NOTE),
        _section("Buckets", _buckets(context, places, stretch, sorted(datasets))),
        _section("Stretch", _bars(_stretch_classes(stretch.values()), "pictures"), STRETCH_NOTE),
        _section(
            "Caption lengths in tokens", _bars(_length_classes(row[2] for row in rows), "captions") + _cut(truncated)
        ),
        _section("Left and right", _swaps(swaps), SWAP_NOTE),
        _section("Latent channels", "".join(_channels(size, datasets[size]) for size in sorted(datasets)), LATENT_NOTE),
        _section("Exact duplicates", _list([" = ".join(group) for group in copies]) if copies else "<p>None.</p>"),
        _section("Refused", _refused(refused)),
        _section("Encoders", _encoders(datasets[largest])),
    ]
    title = f"{len(rows)} pictures at {', '.join(str(size) for size in sorted(datasets))}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{CSS}</style></head><body><main><h1>{title}</h1>{''.join(sections)}</main></body></html>\n"
    )


SAMPLES_NOTE = (
    "The original with its name; its latent decoded again, with the caption; the latent of its mirror image decoded, with "
    "the swapped caption. Drawn at random by config.seed."
)
STRETCH_NOTE = (
    "Nothing is cropped; a picture is stretched to its bucket's shape, one side against the other by this much."
)
SWAP_NOTE = "Half of the samples are shown mirrored in training, with the swapped caption; those in doubt never are."
LATENT_NOTE = "Mean (line) and one standard deviation (bar) of each channel, as stored; training normalises with these."


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{_text(title)}</h2>{f'<p class=note>{_text(note)}</p>' if note else ''}{body}</section>"


def _tiles(tiles: Iterable[tuple[Any, str]]) -> str:
    inner = "".join(f"<div><b>{_text(number)}</b><span>{_text(name)}</span></div>" for number, name in tiles)
    return f'<div class="tiles">{inner}</div>'


def _list(lines: Sequence[str]) -> str:
    more = f"<p class=note>and {len(lines) - LISTED} more</p>" if len(lines) > LISTED else ""
    return "<ul>" + "".join(f"<li><bdi>{_text(line)}</bdi></li>" for line in lines[:LISTED]) + f"</ul>{more}"


def _bars(classes: Sequence[tuple[str, int]], unit: str) -> str:
    """Horizontal bars with their numbers."""
    most = max((count for _, count in classes), default=1) or 1
    rows = [
        f'<tr><th scope="row">{_text(name)}</th><td><svg viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        f'aria-label="{count} {unit}"><rect width="{100 * count / most:.2f}" height="8" class="bar"/></svg></td>'
        f"<td class=number>{count}</td></tr>"
        for name, count in classes
    ]
    return f'<table class="bars">{"".join(rows)}</table>'


def _is_upscaled(size: tuple[int, int], context: Any, shape: tuple[int, int], resolution: int) -> bool:
    width, height = buckets.pixels(shape, context.cells, resolution)
    return size[0] * size[1] < width * height


def _duplicates(rows: Sequence[Sequence]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, pixel_hash, *_ in rows:
        groups[pixel_hash].append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _swap_decisions(texts: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    kinds: dict[str, list[tuple[str, str]]] = {
        "sides swapped": [],
        "left or right in another sense: kept": [],
        "in doubt: never flipped": [],
        "no left or right": [],
    }
    for text in texts:
        swapped = captions.swap(text)
        if swapped is None:
            kinds["in doubt: never flipped"].append((text, ""))
        elif swapped != text:
            kinds["sides swapped"].append((text, swapped))
        elif captions.senses(text):
            kinds["left or right in another sense: kept"].append((text, ""))
        else:
            kinds["no left or right"].append((text, ""))
    return kinds


def _swaps(kinds: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    parts = [_bars([(name, len(found)) for name, found in kinds.items()], "captions")]
    for name, found in list(kinds.items())[:3]:
        if found:
            lines = [f"{old}  →  {new}" if new else old for old, new in sorted(set(found))[:8]]
            parts.append(f"<h3>{_text(name)}</h3>{_list(lines)}")
    return "".join(parts)


def _stretch_classes(values: Iterable[float]) -> list[tuple[str, int]]:
    edges = (0.001, 0.02, 0.05, 0.1, 0.2, math.inf)
    names = ("none", "up to 2%", "up to 5%", "up to 10%", "up to 20%", "more")
    counts = Counter(next(place for place, edge in enumerate(edges) if value - 1 <= edge) for value in values)
    return [(name, counts[place]) for place, name in enumerate(names)]


def _length_classes(lengths: Iterable[int]) -> list[tuple[str, int]]:
    lengths = list(lengths)
    width = max(1, math.ceil(max(lengths) / 12))
    counts = Counter((length - 1) // width for length in lengths)
    first, last = min(counts), max(counts)
    names = [
        f"{place * width + 1}-{(place + 1) * width}" if width > 1 else f"{place + 1}"
        for place in range(first, last + 1)
    ]
    return [(name, counts[place]) for name, place in zip(names, range(first, last + 1))]


def _cut(truncated: Sequence[str]) -> str:
    return (
        f"<h3>Cut to the limit</h3>{_list(truncated)}" if truncated else "<p>No caption was longer than the limit.</p>"
    )


def _buckets(context: Any, places: Mapping[str, Any], stretch: Mapping[str, float], resolutions: Sequence[int]) -> str:
    counts = Counter(places.values())
    worst = {shape: max(stretch[name] for name, place in places.items() if place == shape) for shape in counts}
    most = max(counts.values())
    rows = []
    for shape in sorted(counts, key=lambda shape: shape[0] / shape[1]):
        width, height = 40 * math.sqrt(shape[0] / shape[1]), 40 * math.sqrt(shape[1] / shape[0])
        icon = f'<rect x="{(84 - width) / 2:.1f}" y="{(84 - height) / 2:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2"/>'
        bar = f'<rect width="{100 * counts[shape] / most:.2f}" height="8" class="bar"/>'
        names = ", ".join(context.bucket(shape, size) for size in resolutions)
        rows.append(
            f'<tr><td class="icon"><svg viewBox="0 0 84 84" class="shape">{icon}</svg></td><th scope="row">{names}</th>'
            f'<td><svg viewBox="0 0 100 8" preserveAspectRatio="none">{bar}</svg></td><td class=number>{counts[shape]}</td>'
            f"<td class=number>{(worst[shape] - 1) * 100:.1f}%</td></tr>"
        )
    head = "<tr><td></td><th>width x height</th><th></th><th class=number>pictures</th><th class=number>largest stretch</th></tr>"
    return f'<table class="bars">{head}{"".join(rows)}</table>'


def _channels(resolution: int, dataset: Mapping[str, Any]) -> str:
    mean, std = dataset["latent_mean"], dataset["latent_std"]
    reach = max(abs(centre) + spread for centre, spread in zip(mean, std)) * 1.05
    step = 640 / len(mean)
    marks = []
    for channel, (centre, spread) in enumerate(zip(mean, std)):
        x, scale = channel * step + step * 0.2, 80 / reach
        top, middle, height = 90 - (centre + spread) * scale, 90 - centre * scale, 2 * spread * scale
        marks.append(
            f'<g><title>channel {channel}: mean {centre:.4f}, deviation {spread:.4f}</title><rect x="{x:.1f}" y="{top:.1f}" '
            f'width="{step * 0.6:.1f}" height="{height:.1f}" class="bar"/><line x1="{x:.1f}" x2="{x + step * 0.6:.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}" class="mean"/></g>'
        )
    axis = '<line x1="0" x2="640" y1="90" y2="90" class="axis"/>'
    axis += f'<text x="2" y="12">+{reach:.2f}</text><text x="2" y="178">-{reach:.2f}</text>'
    return f'<h3>{resolution}</h3><svg viewBox="0 0 640 180" class="wide" role="img">{axis}{"".join(marks)}</svg>'


def _samples(context: Any, jobs: Sequence, parts: Sequence[Mapping], datasets: Mapping) -> str:
    """Pictures drawn by (seed, id), decoded from the smallest resolution."""
    resolution, seed = min(datasets), context.config.seed
    where: dict[str, tuple[str, int]] = {}
    counted: Counter = Counter()
    for job, part in zip(jobs, parts):
        name = context.bucket(job.shape, resolution)
        for row in part["records"]:
            where[row[0]] = (name, counted[name])
            counted[name] += 1
    drawn = sorted(where, key=lambda name: hashlib.sha256(f"sample:{seed}:{name}".encode()).digest())[:SAMPLES]
    sources = {name: records.open_bucket(context.root(resolution), name) for name in {where[key][0] for key in drawn}}
    cards = []
    for key in drawn:
        name, place = where[key]
        record = sources[name][place]
        latents = np.stack([record["latent"], record["latent_flip"]]).astype(np.float32)
        decoded, mirrored = context.encoders.vae.decode(latents)
        caption, flip = (_decoded(record[field]) for field in ("caption", "caption_flip"))
        flipped = (
            _figure(mirrored, flip) if flip else '<figure class="none"><figcaption>never flipped</figcaption></figure>'
        )
        original = images.resize(
            images.decode(context.items[key].path, context.config.max_pixels), *decoded.shape[1::-1]
        )
        cards.append(f'<div class="sample">{_figure(original, key)}{_figure(decoded, caption)}{flipped}</div>')
    return f'<div class="samples">{"".join(cards)}</div>'


def _decoded(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _figure(pixels: np.ndarray, caption: str) -> str:
    data = base64.b64encode(images.thumbnail(pixels, THUMBNAIL)).decode()
    words = f"<figcaption><bdi>{_text(caption)}</bdi></figcaption>"
    return f'<figure><img alt="" src="data:image/jpeg;base64,{data}">{words}</figure>'


def _refused(refused: Sequence) -> str:
    if not refused:
        return "<p>Nothing: every picture was encoded.</p>"
    kinds = Counter(f"{row.stage}: {row.reason.split(':')[0]}" for row in refused).most_common(20)
    rows = [
        f"<tr><td><bdi>{_text(row.file)}</bdi></td><td>{_text(row.stage)}</td><td><bdi>{_text(row.reason)}</bdi></td></tr>"
        for row in refused[:LISTED]
    ]
    more = f"<p class=note>and {len(refused) - LISTED} more in quarantine.jsonl</p>" if len(refused) > LISTED else ""
    table = f'<div class="scroll"><table><tr><th>file</th><th>stage</th><th>reason</th></tr>{"".join(rows)}</table></div>{more}'
    return _bars(kinds, "inputs") + table


def _encoders(dataset: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><th scope="row">{_text(part)}</th><td>{_text(value)}</td></tr>'
        for part, value in dataset["fingerprint"].items()
    ]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


CSS = """
:root{color-scheme:light dark;--paper:#fbfaf7;--ink:#23211d;--soft:#6f6a60;--line:#e2ddd2;--card:#fff;--bar:#3f7d8c;
--mean:#c2562d}
@media(prefers-color-scheme:dark){:root{--paper:#171817;--ink:#e9e6df;--soft:#9d978b;--line:#34352f;--card:#20211f;
--bar:#5fa7b6;--mean:#f0936b}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2rem 1.2rem 5rem}h1{font-size:1.9rem;letter-spacing:-.02em;
margin:.5rem 0 1.4rem}
h2{font-size:1.2rem;margin:2.6rem 0 .5rem}h3{font-size:.95rem;color:var(--soft);margin:1.2rem 0 .3rem}
.note{color:var(--soft);margin:.2rem 0 .9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:.7rem}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem .9rem}
.tiles b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}.tiles span{color:var(--soft);
font-size:.82rem;line-height:1.25;display:block}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:1rem}
.sample{display:grid;grid-template-columns:repeat(3,1fr);gap:.6rem;background:var(--card);
border:1px solid var(--line);border-radius:12px;padding:.7rem}
figure{margin:0;min-width:0}img{width:100%;display:block;border-radius:6px}figcaption{font-size:.78rem;
line-height:1.35;color:var(--soft);margin-top:.35rem;overflow-wrap:anywhere}
.none{border:1px dashed var(--line);border-radius:6px;display:grid;place-items:center}
table{border-collapse:collapse;width:100%;font-size:.9rem}th{text-align:left;font-weight:500}
td,th{padding:.28rem .5rem;border-bottom:1px solid var(--line);vertical-align:middle;overflow-wrap:anywhere}
.bars th{width:36%}.bars td svg{width:100%;height:10px;display:block}.number{text-align:right;
font-variant-numeric:tabular-nums;white-space:nowrap;width:6rem}
td.icon{width:56px}.bars svg.shape{width:40px;height:40px}.shape rect{fill:none;stroke:var(--bar);stroke-width:4}
.bar{fill:var(--bar)}.mean{stroke:var(--mean);stroke-width:2.5}.axis{stroke:var(--soft);stroke-width:.7}
svg text{fill:var(--soft);font-size:11px}
.wide{width:100%;height:auto}.scroll{overflow-x:auto;max-height:28rem}ul{padding-left:1.1rem;margin:.3rem 0}
li{margin:.15rem 0;overflow-wrap:anywhere}
"""
