"""Numbers in, SVG out: the drawings of the page about a data set, pure and without a script.

Colours are classes of the page's style, so every drawing is light or dark with it. Coordinates are rounded to a tenth: a
page about a hundred thousand pictures stays small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from encode.page import many, percent, text

WIDTH = 460  # units of a chart; a telephone shows it at three quarters of its natural size


def strip(parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar cut into parts: (name, count or share, colour class)."""
    total, place, pieces = sum(count for _, count, _ in parts) or 1, 0.0, []
    for _, count, kind in parts:
        width = 100 * count / total
        pieces.append(f'<rect x="{place:.2f}" width="{width:.2f}" height="8" class="{kind}"/>' if count else "")
        place += width
    words = text(", ".join(f"{_amount(count)} {name}" for name, count, _ in parts))
    frame = f'viewBox="0 0 100 8" preserveAspectRatio="none" class="strip" role="img" aria-label="{words}"'
    return f"<svg {frame}>{''.join(pieces)}</svg>"


def legend(parts: Sequence[tuple[str, float, str]]) -> str:
    """What the colours of a strip stand for."""
    names = (f'<span><i class="{kind}"></i><b>{_amount(count)}</b> {text(name)}</span>' for name, count, kind in parts)
    return f'<div class="legend">{"".join(names)}</div>'


def _amount(count: float) -> str:
    return f"{count:,}" if isinstance(count, int) else percent(count)


def bar(share: float, kind: str = "bar") -> str:
    """A horizontal bar for a cell of a table; the smallest count is still seen."""
    width = max(100 * share, 0.7) if share else 0
    return (
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width:.2f}" height="8" class="{kind}"/></svg>'
    )


def shape(size: tuple[float, float]) -> str:
    """A rectangle of the same shape."""
    return f'<svg viewBox="0 0 84 84" class="icon" aria-hidden="true">{_centred(size, "its")}</svg>'


def overlay(size: tuple[float, float], bucket: tuple[float, float]) -> str:
    """A picture's own shape over its bucket's, of equal areas."""
    return f'<svg viewBox="0 0 84 84" class="icon" aria-hidden="true">{_centred(bucket, "its")}{_centred(size, "own")}</svg>'


def _centred(size: tuple[float, float], kind: str) -> str:
    ratio = math.sqrt(size[0] / size[1])
    width, height = (min(42 * side, 82) for side in (ratio, 1 / ratio))
    return (
        f'<rect x="{42 - width / 2:.1f}" y="{42 - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" '
        f'class="{kind}"/>'
    )


def columns(
    counts: Sequence[int],
    edges: tuple[float, float],
    unit: str,
    marks: Sequence[tuple[float, str]] = (),
    titles: Sequence[str] = (),
    suffix: str = "",
) -> str:
    """A histogram with an axis below it.

    Args:
      counts: heights, one a class.
      edges: value at the left and the right end of the axis.
      unit: what the counts count, for a reader who cannot see the drawing.
      marks: (value, words) drawn as lines from top to bottom, each with its words on a line of its own.
      titles: a note on each column.
      suffix: follows the numbers of the axis.
    """
    top, height = 16 * len(marks) + 6, 110
    low, high = edges
    step = WIDTH / max(len(counts), 1)
    most = max(counts, default=0) or 1
    parts = []
    for place, count in enumerate(counts):
        if count:
            tall = max(height * int(count) / most, 1.2)
            note = f"<title>{text(titles[place])}</title>" if titles else ""
            parts.append(
                f'<rect x="{place * step + 0.5:.1f}" y="{top + height - tall:.1f}" width="{max(step - 1, 0.6):.1f}" '
                f'height="{tall:.1f}" class="bar">{note}</rect>'
            )
    for row, (value, words) in enumerate(marks):
        x, y = WIDTH * min(max((value - low) / (high - low), 0), 1), 11 + 16 * row
        beside, anchor = (x - 5, "end") if x > WIDTH * 0.62 else (x + 5, "start")
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9}" y2="{top + height}" class="mark"/>'
            f'<text x="{beside:.1f}" y="{y}" text-anchor="{anchor}" class="rust-text">{text(words)}</text>'
        )
    base = top + height
    parts.append(f'<line x1="0" x2="{WIDTH}" y1="{base}" y2="{base}" class="axis"/>')
    for value in _ticks(low, high):
        x = WIDTH * (value - low) / (high - low)
        anchor = "start" if x < 12 else "end" if x > WIDTH - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">{value:g}{text(suffix)}</text>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {base + 22}" class="chart" role="img" aria-label="{text(many(int(sum(counts)), unit))}">'
        f"{''.join(parts)}</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 10) + 0.0 for place in range(first, math.floor(high / step + 1e-9) + 1)]


PLOT, LEFT, TOP, RIGHT, BOTTOM = 360, 44, 54, 56, 40  # of the plane of sizes


def plane(
    dots: Sequence[tuple[float, float, int]],
    rays: Sequence[tuple[str, float]],
    areas: Sequence[int],
    largest_stretch: float,
) -> str:
    """Sizes of pictures on two logarithmic axes: an aspect ratio is a diagonal, a resolution's area is the other one.

    Args:
      dots: (width, height, how many) in pixels.
      rays: (name, aspect ratio) of the buckets.
      areas: resolutions; each is drawn where width x height is its square.
      largest_stretch: how far from its ray a bucket takes pictures.
    """
    logs = np.log2([[width, height] for width, height, _ in dots])
    span = max(float(np.ptp(logs, axis=0).max()) + 0.9, 3.0)
    start = (logs.min(0) + logs.max(0)) / 2 - span / 2

    def x(value: float) -> float:
        return (value - start[0]) / span * PLOT

    def y(value: float) -> float:
        return PLOT - (value - start[1]) / span * PLOT

    grid, outside = [], []
    for axis in (0, 1):
        for power in range(math.ceil(start[axis]), math.floor(start[axis] + span) + 1):
            at, words = (x if axis == 0 else y)(power), f"{2**power:g}"
            if axis == 0:
                grid.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{PLOT}" class="grid"/>')
                outside.append(f'<text x="{LEFT + at:.1f}" y="{TOP + PLOT + 16}" text-anchor="middle">{words}</text>')
            else:
                grid.append(f'<line x1="0" x2="{PLOT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
                outside.append(f'<text x="{LEFT - 7}" y="{TOP + at + 4:.1f}" text-anchor="end">{words}</text>')
    inside, labels = _rays(rays, start, span, min(math.log2(largest_stretch), span))
    most = dots[0][2]
    circles = [
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="{max(11 * math.sqrt(count / most), 1.6):.1f}" class="dot"><title>'
        f"{width:.0f} x {height:.0f}: {count:,}</title></circle>"
        for (a, b), (width, height, count) in zip(logs.tolist(), dots)
    ]
    width, height = LEFT + PLOT + RIGHT, TOP + PLOT + BOTTOM
    return (
        f'<svg viewBox="0 0 {width} {height}" class="chart plane" role="img" aria-label="Sizes of the pictures, and the buckets">'
        f'<svg x="{LEFT}" y="{TOP}" width="{PLOT}" height="{PLOT}" viewBox="0 0 {PLOT} {PLOT}">'
        f"{''.join(inside)}{''.join(grid)}{''.join(_areas(areas, start, span))}{''.join(circles)}</svg>"
        f"{''.join(outside)}{''.join(labels)}"
        f'<text x="{LEFT + PLOT}" y="{height - 6}" text-anchor="end">width in pixels</text>'
        f'<text x="0" y="{TOP - 14}">height</text></svg>'
    )


def _rays(rays: Sequence[tuple[str, float]], start: Any, span: float, reach: float) -> tuple[list[str], list[str]]:
    """The buckets as bands with their own shape as a line in the middle, and their names where the lines leave the plot."""
    scale = PLOT / span
    # A ray is y = x + lean, from the corner.
    lean = [float(start[0] - start[1] - math.log2(aspect)) for _, aspect in rays]
    order = sorted(range(len(rays)), key=lambda place: lean[place])
    bands, lines, labels, last = [], [], [], -math.inf
    for rank, place in enumerate(order):
        own = lean[place]
        low = max(own - reach, (own + lean[order[rank - 1]]) / 2) if rank else own - reach
        high = min(own + reach, (own + lean[order[rank + 1]]) / 2) if rank + 1 < len(order) else own + reach
        corners = [(-9, -9 + low), (span + 9, span + 9 + low), (span + 9, span + 9 + high), (-9, -9 + high)]
        points = " ".join(f"{a * scale:.1f},{PLOT - b * scale:.1f}" for a, b in corners)
        bands.append(f'<polygon points="{points}" class="band"/>')
        ends = [(-9, -9 + own), (span + 9, span + 9 + own)]
        (x1, y1), (x2, y2) = ((a * scale, PLOT - b * scale) for a, b in ends)
        lines.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="ray"/>')
        if abs(own) >= span or (own - last) * scale < 18:  # beside the plot, or written over its neighbour
            continue
        last = own
        a, b = (span - own, span) if own > 0 else (span, span + own)
        across, up = LEFT + a * scale + 5, TOP + PLOT - b * scale - 4
        turned = f"translate({across:.1f} {up:.1f}) rotate(-45)"
        labels.append(f'<text transform="{turned}" dominant-baseline="middle">{text(rays[place][0])}</text>')
    return bands + lines, labels


def _areas(areas: Sequence[int], start: Any, span: float) -> list[str]:
    scale, parts = PLOT / span, []
    for side in areas:
        total = 2 * math.log2(side) - float(start[0] + start[1])  # x + y in units from the corner
        if not 0 < total < 2 * span:
            continue
        (x1, y1), (x2, y2) = ((total + 9, -9), (-9, total + 9))
        parts.append(
            f'<line x1="{x1 * scale:.1f}" y1="{PLOT - y1 * scale:.1f}" x2="{x2 * scale:.1f}" y2="{PLOT - y2 * scale:.1f}" '
            'class="area"/>'
        )
        across, up = (4, PLOT - total * scale - 6) if total < span else ((total - span) * scale + 8, 13)
        parts.append(f'<text x="{across:.1f}" y="{max(up, 12):.1f}" class="rust-text">{side}²</text>')
    return parts


def channel(counts: Sequence[int], total: int, spread: float) -> str:
    """One channel's histogram in units of its deviation, the normal curve of its mean and deviation drawn over it.

    Args:
      counts: classes from -spread to +spread deviations around the mean.
      total: values altogether, those outside the drawing too.
      spread: deviations on each side.
    """
    width, height, peak = 150, 62, 44  # the normal curve's top lies at `peak`; what is higher is cut at the frame
    step = width / len(counts)
    density = np.asarray(counts, np.float64) / max(total, 1) / (2 * spread / len(counts))
    tall = np.minimum(density / 0.39894 * peak, height)
    path = f"M0 {height}" + "".join(f"V{height - value:.1f}h{step:.2f}" for value in tall.tolist()) + f"V{height}z"
    places = np.linspace(-spread, spread, 37)
    curve = " ".join(
        f"{(place + spread) / (2 * spread) * width:.1f},{height - peak * math.exp(-place * place / 2):.1f}"
        for place in places.tolist()
    )
    one = width / (2 * spread)
    return (
        f'<svg viewBox="0 0 {width} {height + 1}" aria-hidden="true">'
        f'<rect x="{width / 2 - one:.1f}" width="{2 * one:.1f}" height="{height}" class="within"/>'
        f'<path d="{path}" class="pale"/><line x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}" class="mark"/>'
        f'<polyline points="{curve}" class="normal"/>'
        f'<line x1="0" x2="{width}" y1="{height}.5" y2="{height}.5" class="axis"/></svg>'
    )
