"""Numbers in, HTML out: the curves of the page about a run, pure and without a script.

A month has 40,000 rows: a curve is drawn from at most COLUMNS places, each with the least, the greatest and the mean of what
lies there, so that no spike is lost. The drawing stretches to its frame, the words beside it do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxdit.page import escape

COLUMNS = 460  # places along a curve, about a pixel each
WIDTH, HEIGHT = 1000, 300  # units of a drawing
FEW = 60  # a curve of fewer values is not smoothed; one of up to half as many has dots
COLOURS = "abcdefg"


@dataclass(frozen=True)
class Line:
    """A curve: values [rows] float64 (NaN: unknown) at the chart's steps, how it is called, and how it looks."""

    name: str
    values: np.ndarray
    colour: str = "a"
    dash: bool = False
    band: bool = False  # show least and greatest behind the mean


@dataclass(frozen=True)
class Thinned:
    """What is drawn of a curve: per place its step, least, greatest and mean value, [places] float64 each."""

    step: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray


def thin(steps: np.ndarray, values: np.ndarray, log: bool = False, columns: int = COLUMNS) -> Thinned:
    """A curve with at most `columns` places over its own range, none of its extremes lost.

    Args:
      steps: [rows] ascending.
      values: [rows] float64; what is not finite (or not above 0 where log) is left out.
      log: the mean is that of the logarithm.
      columns: the most places.
    """
    kept = np.isfinite(values) & ((values > 0) if log else True)
    step, value = steps[kept], values[kept]
    if len(step) == 0:
        return Thinned(step, value, value, value)
    if len(step) <= columns:
        starts = np.arange(len(step))
    else:
        place = np.floor((step - step[0]) / max(step[-1] - step[0], 1) * (columns - 1e-6)).astype(int)
        starts = np.flatnonzero(np.diff(place, prepend=-1))
    count = np.diff(starts, append=len(step))
    shown = np.log10(value) if log else value
    mean = np.add.reduceat(shown, starts) / count
    return Thinned(
        np.add.reduceat(step, starts) / count,
        np.minimum.reduceat(value, starts),
        np.maximum.reduceat(value, starts),
        10**mean if log else mean,
    )


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` (odd) values, fewer at the ends."""
    if width < 3 or len(values) < 3:
        return values
    half = min(width, len(values)) // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(np.minimum(place, len(values) - 1 - place), half)  # symmetric, so that a slope stays a slope
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def newest_value(line: Line) -> float:
    """What a curve says now: its last value, or the mean of the last 50 where single ones say little."""
    known = line.values[np.isfinite(line.values)][-50:]
    return float(known.mean() if line.band else known[-1])


def chart(
    title: str,
    steps: np.ndarray,
    lines: Sequence[Line],
    *,
    log: bool = False,
    zero: bool = False,
    percent: bool = False,
    marks: np.ndarray | None = None,
    note: str = "",
    small: bool = False,
) -> str:
    """Curves over the steps of a run in one frame; "" where there is not one value.

    Args:
      title: above it, with the newest value beside it where there is one curve.
      steps: [rows] float64 ascending.
      lines: what is drawn; those without a value are left out.
      log: logarithmic axis.
      zero: the axis begins at zero.
      percent: the values are shares.
      marks: [n] steps marked below in the colour of trouble.
      note: a sentence below.
      small: one of many, with hardly an axis.
    """
    found = [(line, thin(steps, line.values, log)) for line in lines]
    found = [(line, thinned) for line, thinned in found if len(thinned.step)]
    if not found:
        return ""
    left, right = 0.0, float(steps[-1])
    low, high = _limits(found, log, zero)
    number = _percent if percent else _number

    def across(step):
        return (step - left) / max(right - left, 1) * WIDTH

    def down(value):
        value, a, b = (np.log10(v) if log else v for v in (value, low, high))
        return np.clip((1 - (value - a) / (b - a)) * HEIGHT, -20, HEIGHT + 20)

    parts, words = [], []
    for value in _log_ticks(low, high) if log else _ticks(low, high, 2 if small else 4):
        y = float(down(np.float64(value)))
        parts.append(f'<path class="grid" d="M0 {y:.1f}H{WIDTH}"/>')
        words.append(f'<i style="top:{100 * y / HEIGHT:.2f}%">{number(value)}</i>')
    if not small:
        words += _steps_below(left, right)
    for line, thinned in found:
        parts.append(_draw(line, thinned, across, down, log))
    if marks is not None and len(marks):
        places = np.unique(np.round(across(np.asarray(marks, np.float64))).astype(int)).tolist()
        parts.append(f'<path class="rug" d="{"".join(f"M{x} {HEIGHT}v-14" for x in places)}"/>')
    newest = [(line, newest_value(line)) for line, _ in found]
    now = number(newest[0][1]) if len(found) == 1 or small else ""
    aside = " ".join(filter(None, (note, _beyond(found, steps, low, high, number))))
    label = escape(f"{title}: " + ", ".join(f"{line.name or 'now'} {number(value)}" for line, value in newest))
    below = f'<p class="aside">{escape(aside)}</p>' if aside and not small else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<span class="now">{now}</span></figcaption><div class="plot">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{label}">{"".join(parts)}'
        f"</svg>{''.join(words)}</div>{_legend(newest, number) if len(found) > 1 and not small else ''}"
        f"{below}</figure>"
    )


def grid(*drawn: str) -> str:
    """Charts side by side where there is room; those that were left out are ""."""
    return f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""


def stretches(spans: Sequence[tuple[float, float, str]], end: float) -> str:
    """A band of coloured stretches over the steps of a run.

    Args:
      spans: (first step, last step, class of its colour).
      end: the last step of the run.
    """
    pieces = "".join(
        f'<rect class="{kind}" x="{WIDTH * a / end:.2f}" width="{max(WIDTH * (b - a) / end, 1.5):.2f}" height="10"/>'
        for a, b, kind in spans
    )
    frame = f'viewBox="0 0 {WIDTH} 10" preserveAspectRatio="none" aria-hidden="true"'
    return f'<div class="times"><svg {frame}>{pieces}</svg></div>'


def _draw(line: Line, thinned: Thinned, across, down, log: bool) -> str:
    """The band, the line (broken where values are missing for long) and, where they are few, the dots."""
    x = across(thinned.step)
    many = len(x) > FEW
    mean = np.log10(thinned.mean) if log else thinned.mean
    if many and line.band:  # a place of a long run is a mean already
        mean = smooth(mean, 3 if len(line.values) > 10 * COLUMNS else 2 * (len(x) // 60) + 1)
    middle = down(10**mean if log else mean)
    drawn = ""
    gap = np.diff(x)
    breaks = np.flatnonzero(gap > max(4 * np.median(gap), 0.025 * WIDTH)) + 1 if len(gap) else np.array([], int)
    places = np.split(np.arange(len(x)), breaks)
    if line.band and len(x) > 2:
        top, bottom = down(thinned.high), down(thinned.low)
        for k in places:
            there, back = _points(x[k], top[k]), _points(x[k][::-1], bottom[k][::-1])
            drawn += f'<path class="band c{line.colour}" d="M{there}L{back}z"/>'
    kind = f"c{line.colour}{' dash' if line.dash else ''}"
    path = "".join("M" + _points(x[k], middle[k]) for k in places if len(k) > 1)
    drawn += f'<path class="{kind}" d="{path}"/>' if path else ""
    single = np.arange(len(x)) if len(x) <= FEW // 2 else np.array([k[0] for k in places if len(k) == 1], int)
    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x[single], middle[single]))
    return drawn + (f'<path class="dots c{line.colour}" d="{dots}"/>' if dots else "")


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist()))


def _limits(found: Sequence[tuple[Line, Thinned]], log: bool, zero: bool) -> tuple[float, float]:
    """The frame's range: everything, but for the rare extreme that would flatten the rest (its value is told instead)."""
    low = min(float(np.quantile(thinned.low, 0.01)) for _, thinned in found)
    high = max(float(np.quantile(thinned.high, 0.985 if len(thinned.high) > FEW else 1.0)) for _, thinned in found)
    least = min(float(thinned.low.min()) for _, thinned in found)
    most = max(float(thinned.high.max()) for _, thinned in found)
    if log:
        low = least if low < 30 * least else low
        high = most if most < 30 * high else high
        spread = max(math.log10(high / low), 0.1)
        return low / 10 ** (0.06 * spread), high * 10 ** (0.06 * spread)
    low = least if low - least < 0.5 * (high - low) else low
    high = most if most - high < 0.5 * (high - low) else high
    low = min(low, 0.0) if zero else low
    spread = max(high - low, 1e-3 * abs(high)) or 0.01
    return (low if zero else low - 0.06 * spread), high + 0.06 * spread


def _beyond(found, steps: np.ndarray, low: float, high: float, number) -> str:
    """What the frame cuts off, in words."""
    words = []
    for line, thinned in found:
        name = f"{line.name}: " if len(found) > 1 else ""
        for worst, outside, kind in (
            (np.nanargmax(thinned.high), thinned.high.max() > high, "highest"),
            (np.nanargmin(thinned.low), thinned.low.min() < low, "lowest"),
        ):
            if outside and thinned.step[worst] > 0.03 * steps[-1]:  # that a run began high goes without saying
                value = (thinned.high if kind == "highest" else thinned.low)[worst]
                at = steps[np.flatnonzero(line.values == value)[0]]
                words.append(f"{name}{kind} {number(value)} at step {int(at):,}")
    return ("Beyond the frame: " + "; ".join(words) + ".") if words else ""


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers inside a range, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (m * step) <= count + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, first + 2 * count + 2) if k * step <= high + 1e-9 * step]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**e for e in decades for m in parts if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 6)]
    return ticks if len(ticks) > 1 else _ticks(low, high, 3)


def _steps_below(left: float, right: float) -> list[str]:
    """Round steps under the frame; the last step itself at its right end."""
    words = []
    for value in _ticks(left, max(right, 1), 4):
        place = 100 * (value - left) / max(right - left, 1)
        if place < 84:
            words.append(f'<u{" class=first" if place < 1 else ""} style="left:{place:.2f}%">{_count(value)}</u>')
    return [*words, f'<u class="last" style="left:100%">{int(right):,}</u>']


def _count(value: float) -> str:
    """150,000 -> 150k, as an axis has it."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def _legend(newest: Sequence[tuple[Line, float]], number) -> str:
    parts = []
    for line, value in newest:
        kind = f"c{line.colour}{' dash' if line.dash else ''}"
        sign = f'<svg viewBox="0 0 20 8" aria-hidden="true"><path class="{kind}" d="M1 4H19"/></svg>'
        parts.append(f"<span>{sign}{escape(line.name)} <b>{number(value)}</b></span>")
    return f'<div class="legend">{"".join(parts)}</div>'
