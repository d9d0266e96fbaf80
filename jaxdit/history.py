"""The rows of a run as arrays that can be looked at as they stood some rows ago: what `health` judges by.

Medians throughout: a few outliers, which are what is looked for, must not move what is usual. Only what a check needs is
read from the rows, since reading 2,000 rows of fifty values takes longer than all the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

RECENT = 20  # rows for which a spike is spoken of; the past that it is held against ends before them
SETTLED = 20  # updates before which nothing counts: zero-initialised layers get their gradients one after the other
REACH = 2_000  # rows looked at
FIRST = 50  # rows at the start of the view that say how large the targets are
EVALUATIONS = ("eval/held_out/ema/text_vision", "eval/training/ema/text_vision", "eval/held_out/raw/text_vision")


class History:
    """Rows up to now, or up to `back` rows before now. step, loss and norm are [n], without the voided updates.

    Attributes:
      every: the rows in order, voided ones too; moved [len(every)] says which are not.
      step, loss, norm: steps (int), logarithms of loss and gradient norm (float64, finite).
      window, spike, patience: see `health.judge`.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, window: int, spike: float, patience: int):
        self.window, self.spike, self.patience, self.back = window, spike, patience, 0
        every = rows[-REACH:]
        steps, loss, norm = columns(every, "step", "loss", "grad_norm")
        if not (np.diff(steps, prepend=-1) > 0).all():
            # No step, or a resumed run whose later rows were not removed: then the last word counts.
            known = {step: row for step, row in zip(steps, every) if step >= 0}
            every = [known[step] for step in sorted(known)]
            steps, loss, norm = columns(every, "step", "loss", "grad_norm")
        self.moved = np.isfinite(loss) & np.isfinite(norm)
        if not self.moved.all():  # a voided update has null for its loss; a row that has no loss at all says nothing
            known = self.moved | ["loss" in row for row in every]
            every, steps, loss, norm = (
                [row for row, k in zip(every, known) if k],
                steps[known],
                loss[known],
                norm[known],
            )
            self.moved = self.moved[known]
        self.every = every
        self._rows = every if self.moved.all() else [row for row, moved in zip(every, self.moved) if moved]
        self.step = steps[self.moved].astype(int)
        self.loss = np.log(np.maximum(loss[self.moved], 1e-30))
        self.norm = np.log(np.maximum(norm[self.moved], 1e-30))
        self._read: dict[Any, Any] = {}  # shared by all views

    def before(self, lag: int) -> History:
        """The same, `lag` rows ago."""
        other = object.__new__(History)
        other.window, other.spike, other.patience = self.window, self.spike, self.patience
        other._rows, other._read, other.back = self._rows, self._read, self.back + lag
        rows, every = max(len(self.step) - lag, 0), max(len(self.every) - lag, 0)
        other.step, other.loss, other.norm = self.step[:rows], self.loss[:rows], self.norm[:rows]
        other.every, other.moved = self.every[:every], self.moved[:every]
        return other

    @cached_property
    def lags(self) -> list[int]:
        """How many rows back to look for a trouble that is not there in full now: each of ten, then one in ten up to 200.

        The latter are tied to the steps: a row stays looked at until it is out of reach, and no verdict flickers.
        """
        tied = (
            self.step // max(10 * int(median(np.diff(self.step[-self.window :]))), 1)
            if len(self.step) > 1
            else self.step
        )
        rows = len(self.step) - 1 - np.flatnonzero(np.diff(tied, append=tied[-1:]))
        return [*range(1, min(11, len(self.step))), *(int(lag) for lag in rows[::-1] if 10 < lag <= 200)]

    def last(self, count: int, *names: str) -> np.ndarray:
        """[names, up to count] the newest values of some columns, NaN where there is none."""
        reach = min(count + self.back, len(self._rows))
        known = self._read.get(names)
        if known is None or known.shape[1] < reach:
            known = self._read[names] = columns(self._rows[len(self._rows) - reach :], *names)
        end = max(known.shape[1] - self.back, 0)
        return known[:, max(end - count, 0) : end]

    def usual_part(self, values: np.ndarray) -> np.ndarray:
        """The window of a column before the recent rows; a third of a short run counts as recent."""
        end = len(values) - min(RECENT, len(values) // 3)
        return values[max(end - self.window, 0) : end]

    @cached_property
    def usual(self) -> tuple[float, float]:
        """(median, spread) of the log norm in the past; NaN while that has less than 12 rows."""
        part = self.usual_part(self.norm[np.searchsorted(self.step, SETTLED) :])
        return (median(part), spread(part)) if len(part) >= 12 else (math.nan, math.nan)

    @cached_property
    def now(self) -> float:
        """Log loss over the last `patience` rows; NaN before there are so many."""
        return median(self.loss[-self.patience :]) if len(self.loss) >= self.patience else math.nan

    @cached_property
    def warming(self) -> bool:
        """Whether the learning rate is still rising."""
        rate = present(self.last(self.window, "learning_rate")[0])
        return len(rate) > 1 and rate[0] < rate[-1] == rate.max()

    @cached_property
    def first_targets(self) -> np.ndarray:
        """[up to 50] log root mean square of the targets at the start of the view; those that are known."""
        if "first" not in self._read:
            (values,) = columns(self._rows[:FIRST], "target_rms")
            self._read["first"] = np.log(values[values > 0])
        return self._read["first"]

    @cached_property
    def start(self) -> float:
        """Log loss of predicting nothing: the mean square of the target, or the loss of the first updates; else NaN."""
        known = 2 * self.first_targets if len(self.first_targets) else self.loss[self.step <= 5]
        return median(known) if len(known) else math.nan

    @cached_property
    def best(self) -> tuple[float, int, float]:
        """(lowest log loss of a block of rows before the recent ones, its middle step, standard error of such)."""
        block = min(self.window // 4, max(len(self.loss) // 4, self.patience))
        end = len(self.loss) - max(block // 2, self.patience)
        blocks = end // block
        if blocks < 1:
            return math.nan, 0, math.nan
        medians = np.median(self.loss[end - blocks * block : end].reshape(blocks, block), 1)
        k = int(medians.argmin())
        return (
            float(medians[k]),
            int(self.step[end - (blocks - 1 - k) * block - block // 2]),
            error(self.loss[-self.window :], block),
        )

    @cached_property
    def evaluations(self) -> np.ndarray:
        """[4, count]: step, held-out loss of the average, training loss of the average, held-out loss of the raw weights."""
        if "evaluations" not in self._read:
            rows = [row for row in self.every if EVALUATIONS[0] in row]
            table = columns(rows, "step", *EVALUATIONS)
            self._read["evaluations"] = table[:, np.isfinite(table[1])]
        table = self._read["evaluations"]
        return table[:, table[0] <= (self.step[-1] if len(self.step) else -1)]

    def onset(self, bad: np.ndarray) -> int:
        """The step at which the newest stretch of bad rows began; bad [m] bool stands for the newest m rows, m > 0."""
        steps = self.step[len(self.step) - len(bad) :]
        calm = np.flatnonzero(np.convolve(bad, np.ones(4), "valid") < 2) if len(bad) >= 4 else ()
        first = calm[-1] if len(calm) else 0
        return int(steps[first + bad[first:].argmax()])


def columns(rows: Sequence[Mapping[str, Any]], *names: str) -> np.ndarray:
    """[names, rows] float64; NaN where a value is missing, null or no number."""
    table = np.empty((len(names), len(rows)))
    for k, name in enumerate(names):
        try:  # in C, where no row lacks the name
            values = list(map(itemgetter(name), rows))
        except KeyError:
            values = [row.get(name) for row in rows]
        try:
            table[k] = values
        except (TypeError, ValueError, OverflowError):
            table[k] = [
                value if isinstance(value, float) or (type(value) is int and abs(value) < 2**63) else math.nan
                for value in values
            ]
    return table


def median(values: np.ndarray) -> float:
    """NaN of nothing. np.median takes ten times as long for a hundred values."""
    ordered, n = np.sort(values), len(values)
    return float(ordered[(n - 1) // 2] + ordered[n // 2]) / 2 if n else math.nan


def spread(values: np.ndarray) -> float:
    """1.48 median absolute deviations: the standard deviation of a normal, whatever a few outliers do."""
    return 1.4826 * median(np.abs(values - median(values)))


def noise(values: np.ndarray) -> float:
    """The same from row to row, so that a trend adds nothing; NaN for less than 3 values."""
    return spread(np.diff(values)) / math.sqrt(2) if len(values) > 2 else math.nan


def error(values: np.ndarray, count: int) -> float:
    """Standard error of the median of `count` values that are as noisy as these; larger while these are few."""
    return 1.2533 * noise(values) / math.sqrt(count) * (1 + 8 / max(len(values), 1))


def present(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
