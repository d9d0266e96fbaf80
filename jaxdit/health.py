"""What the curves say about a run: rows of metrics.jsonl in, one verdict and one line of plain words out.

Everything is judged against the run's own past (median and spread of the logarithm over a trailing window), never against a
limit of ours: an absolute one on the gradient norm has frozen runs for good (Kai-46/minFM#4), and a run whose usual norm is
1,000 is sound. The one fixed reference is the flow's: predicting nothing costs the mean square of the target. Nothing is
remembered between calls: that a verdict does not flap is read off the rows too (`hold`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np

from jaxdit.history import RECENT, SETTLED, History, error, median, noise, present, spread

KEPT = 0.7  # a trouble that was there in full stays until it has shrunk to this share
CONDITIONS = ("time", "vision", "text", "null_vision", "null_text", "modulation", "cross_attention")
Found = tuple[str, int] | None  # what is seen, in words, and the step it began at


@dataclass(frozen=True)
class Verdict:
    """A name of VERDICTS, one line for the log, the step the trouble began at (None: there is none), and the level."""

    name: str
    words: str
    since: int | None
    level: str  # "good", "watch" or "act"


def judge(
    rows: Sequence[Mapping[str, Any]],
    *,
    saved: Sequence[int] = (),
    averages: Sequence[int] = (),
    window: int = 200,
    spike: float = 8.0,
    patience: int = 8,
) -> Verdict:
    """The most serious thing that the rows say.

    Args:
      rows: of metrics.jsonl, oldest first, the last one is now; the newest 2,000 are looked at. Any value may be null or
        missing.
      saved: the steps that can be gone back to; the advice names the newest one before the trouble began.
      averages: the steps whose averaged weights are kept, which a new run can begin with where none of saved is left.
      window: how many rows are "the past", at least 24. 200: many enough that the chance of the drawn timesteps averages
        out, few enough to follow the slow fall of a sound norm.
      spike: how many spreads (1.48 median absolute deviations of the logarithm) above the past a norm is a spike. 8: sound
        norms have hairs of 5 to 6. Kept between factors of 4 (below, nothing is harmed) and 50 (above, something is).
      patience: rows, at least 4, that a trouble lasts before it is more than a spike; it is seen after 3/4 of them.

    Returns:
      A Verdict; the same rows give the same one.

    Raises:
      ValueError: an option is out of range.
    """
    if window < 24 or patience < 4 or not spike > 0:
        raise ValueError(
            f"health.window={window}, health.spike={spike}, health.patience={patience}: at least 24, above 0 and at least 4."
        )
    past = History(rows, window=window, spike=spike, patience=patience)
    for name, (level, check, advice) in TROUBLES.items():
        if (found := hold(check, past)) is not None:
            words, since = found
            return Verdict(name, f"{words}. {advice.format(back=_back(saved, averages, since))}", since, level)
    if math.isnan(past.usual[0]):
        words = f"{len(past.step)} logged row{'s' * (len(past.step) > 1)} so far: too few to know what is usual. Nothing to do."
        return Verdict("young", words, None, "good")
    seen = f"loss {exp(past.now):.3g}, gradient norm {exp(median(past.norm[-RECENT:])):.3g}"
    if (jumps := hold(_jumps, past)) is not None:
        words = f"{seen}; the norm jumps by a factor of {exp(jumps):.2g} from row to row but its level does not rise"
        return Verdict("hairy", f"{words}, usual for small batches. Nothing to do.", None, "good")
    return Verdict("sound", f"{seen}: like its own past. Nothing to do.", None, "good")


def hold(check: Callable[[History, float], Any], past: History) -> Any:
    """What the check finds, if it is there in full, or was so some rows ago and has not clearly shrunk since."""
    weak = check(past, KEPT)
    if weak is None or check(past, 1.0) is not None:
        return weak
    return weak if any(check(past.before(lag), 1.0) is not None for lag in past.lags) else None


def _back(saved: Sequence[int], averages: Sequence[int], since: int) -> str:
    if step := max((step for step in saved if step < since), default=0):
        return f"go back: a new folder with --config.train.restore=WORKDIR@{step}"
    if step := max((step for step in averages if step < since), default=0):
        return (
            f"begin a new folder with the averaged weights from before it, --config.train.init_from=WORKDIR@{step}: no whole "
            "checkpoint from then is left"
        )
    return "start again: no checkpoint from before it is left"


# The checks: (rows, margin) -> what is seen. A margin below 1 asks for less, and is what a trouble is kept by.


def _voided(p: History, margin: float) -> Found:
    for rows in (3, RECENT, p.window):
        count, span, since = _void_count(p, rows)
        if count >= 3 and (rows == 3 or count > 0.03 * margin * span):
            return f"{count:,} of the last {span:,} updates were not finite and moved nothing", since
    return None


def _one_voided(p: History, margin: float) -> Found:
    count, _, since = _void_count(p, RECENT)
    return (
        (f"{count} update{'s' * (count > 1)} from step {since:,} not finite, and moved nothing", since)
        if count
        else None
    )


def _void_count(p: History, rows: int) -> tuple[int, int, int]:
    """(voided updates, all updates, step of the first voided one) over the newest rows; each voided update has a row."""
    bad = np.flatnonzero(~p.moved[-rows:])
    if not len(bad):
        return 0, 1, 0
    steps = [int(row["step"]) for row in p.every[-rows:]]
    return len(bad), steps[-1] - steps[0] + 1, steps[bad[0]]


def _data_changed(p: History, margin: float) -> Found:
    recent = p.last(p.patience, "target_rms")[0]
    if len(p.first_targets) < 12 or len(p.step) < 24 or not (recent > 0).all():
        return None
    usual, now = median(p.first_targets), log(median(recent))
    limit = margin * max(log(1.25), 6 * spread(p.first_targets))
    if abs(now - usual) <= limit:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        since = p.onset(np.abs(np.log(p.last(3 * p.window, "target_rms")[0]) - usual) > limit / 2)
    return f"the targets are of another size since step {since:,}: {exp(now):.3g}, at first {exp(usual):.3g}", since


def _diverged(p: History, margin: float) -> Found:
    if not len(p.step) or p.step[-1] < SETTLED:
        return None
    for now, uncertain in _levels(p):
        if now > (limit := p.start + max(log(1 + 0.25 * margin), 5 * margin * uncertain)):
            since = p.onset(p.loss[-3 * p.window :] > limit)
            return f"loss {exp(now):.3g} is worse than predicting nothing ({exp(p.start):.3g})", since
    level = median(_velocity(p, p.patience))
    if level > 1 + 0.5 * margin:
        since = p.onset(_velocity(p, 3 * p.window) > 1 + 0.25 * margin)
        return f"the predicted velocity is {level:.2g} times as large as the target", since
    return None


def _levels(p: History) -> list[tuple[float, float]]:
    """(log loss, standard error) of the newest rows: of few, which tell it at once where the loss is quiet, and of more."""
    return [
        (median(p.loss[-rows:]), error(p.loss[-p.window :], rows))
        for rows in (p.patience, p.window // 8, p.window // 2)
        if 2 * rows <= len(p.loss)
    ]


def _velocity(p: History, rows: int) -> np.ndarray:
    """[up to rows] root mean square of the predicted velocity over that of the target, NaN where not known."""
    predicted, target = p.last(rows, "velocity_rms", "target_rms")
    with np.errstate(divide="ignore", invalid="ignore"):
        return predicted / target


def _collapsed(p: History, margin: float) -> Found:
    recent = _velocity(p, p.patience)
    if len(recent) < p.patience or not (recent < 0.1 / margin).mean() > 0.75:
        return None
    ratio = _velocity(p, 3 * p.window)
    if (ratio > 0.3).sum() < p.patience:  # it has never been large: it is only beginning
        return None
    return f"the predicted velocity has shrunk to {median(recent):.2g} of the target: nothing is drawn", p.onset(
        ratio < 0.3
    )


def _back_at_start(p: History, margin: float) -> Found:
    best, step, error_of_best = p.best
    if not best < p.start + log(0.75):
        return None
    for now, uncertain in _levels(p)[:2]:
        if now > p.start + log(1 - 0.07 / margin) and now - best > 8 * margin * math.hypot(error_of_best, uncertain):
            since = max(p.onset(p.loss[-3 * p.window :] > (p.start + best) / 2), step + 1)
            return (
                f"loss {exp(now):.3g} is where it was at the start, after {exp(best):.3g} around step {step:,}",
                since,
            )
    return None


def _unstable(p: History, margin: float) -> Found:
    usual, wide = p.usual
    if math.isnan(usual):
        return None
    recent, limit = p.norm[-p.patience :], usual + margin * max(log(2.5), 3 * wide)
    shift = median(recent) - usual
    # While the model discovers something the norm rises as the loss falls, and in the warm-up zero-initialised layers
    # open: no trouble unless it is huge.
    falling = p.now < median(p.loss[-p.patience - RECENT : -p.patience]) + log(0.9)
    if (recent > limit).mean() >= 0.75 and (not (falling or p.warming) or shift > margin * log(10)):
        since = p.onset(p.norm[-p.window :] > limit)
        words = f"gradient norm {exp(usual + shift):.3g}, {exp(shift):.3g} times the usual, stays since step"
        return f"{words} {since:,}", since
    norm, steps = p.norm[-p.window :], p.step[-p.window :]
    centre = median(norm)
    spikes = np.flatnonzero(norm > centre + _limit(p, spread(norm)))
    many = len(spikes) >= 6 * margin and len(spikes) > 0.025 * margin * len(norm)
    huge = (norm > centre + log(50)).sum() >= 3
    if (many or huge) and spikes[-1] >= len(norm) - p.window // 4:
        words = f"{len(spikes)} spikes of the gradient norm in {steps[-1] - steps[0]:,} steps, up to"
        return f"{words} {exp(norm.max() - centre):.3g} times the usual {exp(centre):.3g}", int(steps[spikes[0]])
    return None


def _limit(p: History, wide: float) -> float:
    """How far above the usual, in the logarithm, a norm is a spike."""
    return min(max(p.spike * wide, log(4)), log(50))


def _lost_ground(p: History, margin: float) -> Found:
    best, step, error_of_best = p.best
    for now, uncertain in _levels(p):
        limit = margin * max(log(1.1), 8 * math.hypot(error_of_best, uncertain))
        if now - best > limit:
            since = max(p.onset(p.loss[-3 * p.window :] > best + limit / 2), step + 1)
            return f"loss {exp(now):.3g} since step {since:,}, after {exp(best):.3g} around step {step:,}", since
    return None


def _dying(p: History, margin: float) -> Found:
    usual, wide = p.usual
    if math.isnan(usual):
        return None
    settled = np.searchsorted(p.step, SETTLED)
    early = slice(settled, settled + (len(p.step) - settled) // 4)
    recent, was, cost = median(p.norm[-p.patience :]), usual, median(p.usual_part(p.loss))
    if usual - recent <= margin * max(log(10), 6 * wide):  # no sudden fall; a slow one, over the whole view?
        was, cost = median(p.norm[early]), median(p.loss[early])
        if early.stop - early.start < 12 or was - recent <= margin * log(30):
            return None
    if p.now < cost + log(0.7):  # the loss went down with it: learnt, not dead
        return None
    since = p.onset(p.norm[-3 * p.window :] < (was + recent) / 2)
    return (
        f"gradient norm {exp(recent):.3g} goes towards zero, it was {exp(was):.3g}, and the loss does not fall",
        since,
    )


def _not_learning(p: History, margin: float) -> Found:
    if len(p.step) < 48 or p.step[-1] < 500 or not min(p.best[0], p.now) > p.start + log(1 - 0.03 / margin):
        return None
    if p.warming and p.step[-1] < 2_000:
        return None
    return f"after {p.step[-1]:,} steps the loss is {exp(p.now):.3g}, as at the start", int(p.step[0])


def _condition_ignored(p: History, margin: float) -> Found:
    for name in CONDITIONS:
        # A small batch may drop no condition at all, and the null tokens rest; thirty times in a row it does not.
        rows = 30 if name.startswith("null") else 4
        if len(p.step) < rows or p.step[-rows] < SETTLED:
            continue
        gradient, movement, rate = p.last(rows, f"grad/{name}", f"move/{name}", "learning_rate")
        # Adam moves by the rate, whatever the gradient: a hundred-thousandth of that is none, also where the rate ends at 0.
        still = gradient <= 1e-9 * np.exp(p.norm[-rows:]), movement <= 1e-5 * np.nan_to_num(rate)
        for zero, words in zip(still, ("gradient", "movement")):
            if zero.mean() >= margin:
                return f"the {words} of the projection {name} has been zero in {zero.sum()} rows", int(p.step[-rows])
    return None


def _memorising(p: History, margin: float) -> Found:
    step, held_out, training, _ = p.evaluations[:, np.isfinite(p.evaluations[2])]
    if len(step) < 5:
        return None
    k = int(held_out.argmin())
    risen = held_out[-3:] / held_out[k] - 1
    if k > len(step) - 4 or risen.min() <= 0.01 * margin or risen[-1] < risen[0] * margin:
        return None
    if training[-1] > training[k] * 1.005 or held_out[-1] - training[-1] <= held_out[k] - training[k]:
        return None  # both rise: that is another trouble
    words = f"held-out loss {held_out[-1]:.4g}, {held_out[k]:.4g} at step {int(step[k]):,}"
    return f"{words}, while that of training images went from {training[k]:.4g} to {training[-1]:.4g}", int(step[k]) + 1


def _average_behind(p: History, margin: float) -> Found:
    step, average, _, raw = p.evaluations[:, np.isfinite(p.evaluations[3])]
    if len(step) < 6:
        return None
    behind = average[-4:] / raw[-4:] - 1
    distance = present(p.last(p.window, "ema_distance")[0])
    shrinking = len(distance) >= 24 and median(distance[-p.patience :]) < 0.9 * median(distance[: len(distance) // 2])
    if behind.min() <= 0.05 * margin or behind[-1] < 0.8 * behind[0] or shrinking:
        return None
    return f"held-out loss of the average {behind[-1]:.0%} above that of the raw weights, and not catching up", int(
        step[-4]
    )


def _uneven(p: History, margin: float) -> Found:
    rows = min(p.window // 2, len(p.loss) // 3)
    if rows < 16:
        return None
    mean = median(p.loss[-rows:])
    before = median(p.loss[-2 * rows : -rows])
    with np.errstate(divide="ignore", invalid="ignore"):
        bins = np.log(p.last(2 * rows, *(f"loss_t/{k}" for k in range(10))))
    for k, values in enumerate(bins):
        old, new = present(values[:rows]), present(values[rows:])
        if min(len(old), len(new)) < 16:
            continue
        level, where = median(new), f"loss of t in [{k / 10:g}, {(k + 1) / 10:g})"
        rise = level - median(old) - max(mean - before, 0.0)
        if rise > margin * max(log(1.2), 6 * math.hypot(error(old, len(old)), error(new, len(new)))):
            words = f"{where} has risen from {exp(median(old)):.3g} to {exp(level):.3g}, the mean went from {exp(before):.3g}"
            return f"{words} to {exp(mean):.3g}", int(p.step[-rows])
        # Of a bin that lags behind, a seventh of what the mean has gained; of one that is only slower, more.
        least = max(log(1 - 0.1 / margin), log(1 - 0.15 / margin * -math.expm1(mean - p.start)))
        if p.step[-1] >= 500 and mean < p.start + log(0.65) and level - 2 * error(new, len(new)) > p.start + least:
            return f"{where} is still {exp(level):.3g}, as at the start, the mean {exp(mean):.3g}", int(p.step[0])
    return None


def _spike(p: History, margin: float) -> Found:
    usual, wide = p.usual
    recent = np.where(p.step[-RECENT:] >= SETTLED, p.norm[-RECENT:], -math.inf)
    at = int(recent.argmax()) if len(recent) else 0
    # Nearly no margin: a spike is spoken of for RECENT rows, not for as long as there are hairs.
    if not len(recent) or not recent[at] > usual + _limit(p, wide) * (0.9 + 0.1 * (margin == 1)):
        return None
    returned = "; it has come back" if recent[-1] < usual + _limit(p, wide) / 2 else ""
    step, times = int(p.step[-RECENT:][at]), exp(recent[at] - usual)
    return f"gradient norm {exp(recent[at]):.3g} at step {step:,}, {times:.3g} times the usual{returned}", step


def _jumps(p: History, margin: float) -> float | None:
    """How far the log norm jumps from row to row, where that is far."""
    size = noise(p.norm[-p.window :]) if len(p.norm) >= 48 else 0.0
    return size if size > 0.4 * margin else None


LESS = "optim.peak_learning_rate to"
# name: level, check, advice; the worst first
TROUBLES: dict[str, tuple[str, Callable[[History, float], Found], str]] = {
    "voided": ("act", _voided, "Look at the data of those steps. Lower " + LESS + " a half and {back}."),
    "data changed": ("act", _data_changed, "Look at the data and its statistics, then {back}."),
    "diverged": ("act", _diverged, "Stop. Lower " + LESS + " a third and {back}."),
    "collapsed": ("act", _collapsed, "Stop. Lower " + LESS + " a third and {back}."),
    "back at the start": (
        "act",
        _back_at_start,
        "The weights are lost, by a bad resume or too high a rate. Stop and {back}.",
    ),
    "unstable": ("act", _unstable, "It seldom mends itself. Lower " + LESS + " a half and {back}."),
    "lost ground": ("act", _lost_ground, "If it does not fall again, lower " + LESS + " a half and {back}."),
    "dying": ("act", _dying, "Layers are dead or saturated. Lower " + LESS + " a half and {back}."),
    "not learning": (
        "act",
        _not_learning,
        "Look at optim.peak_learning_rate (far too low or too high) and at the data.",
    ),
    "condition ignored": ("act", _condition_ignored, "The model cannot hear it: look at the data and at flow.drop_*."),
    "memorising": (
        "act",
        _memorising,
        "It learns the images by heart: stop, use an average from before, or add images.",
    ),
    "average behind": (
        "watch",
        _average_behind,
        "Lower optim.ema_decay (0.999); sample with the raw weights meanwhile.",
    ),
    "uneven": ("watch", _uneven, "Draw such t more often: flow.mean, flow.std, flow.shift."),
    "one voided": ("watch", _one_voided, "Harmless while it is seldom; if it comes again, look at the data."),
    "spike": ("watch", _spike, "One that comes back is harmless. If the norm stays up, {back}."),
}
VERDICTS = {name: level for name, (level, _, _) in TROUBLES.items()} | dict.fromkeys(
    ("young", "hairy", "sound"), "good"
)
