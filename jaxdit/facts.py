"""Where a run stands: the numbers of its page, read out of the working folder. What cannot be read counts as missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxdit import health, metrics, seal

RECENT = 200  # rows that the present rate is taken over
QUIET = 1800.0  # seconds without a row after which a run may have stopped
LARGEST = 1e300  # of a number in a file of the folder: none of ours comes near
LEVELS = ("unknown", "good", "watch", "act")


@dataclass(frozen=True)
class Saved:
    """A checkpoint: what it is good for, its bytes, and when it was finished."""

    step: int
    resumable: bool
    bytes: int
    at: datetime


@dataclass(frozen=True)
class Facts:
    """One working folder at one moment.

    config, dataset, origin: contents of the JSON files, {} where there is none. columns: metrics.jsonl. changes: rows of
    config_history.jsonl. saved: checkpoints, ascending. verdict: of health; its name is "" where nothing is known. problems:
    a sentence for each file that could not be read. as_of: when the newest row was written; now: when this was looked at.
    """

    workdir: Path
    config: Mapping[str, Any]
    dataset: Mapping[str, Any]
    origin: Mapping[str, Any]
    columns: metrics.Columns
    changes: Sequence[Mapping[str, Any]]
    saved: Sequence[Saved]
    verdict: health.Verdict
    problems: Sequence[str]
    as_of: datetime
    now: datetime

    @cached_property
    def step(self) -> int:
        return int(self.columns["step"][-1]) if len(self.columns) else 0

    @cached_property
    def total(self) -> int:
        """All steps of the run; 0 where the configuration does not say."""
        return int(_number(self.config, "train", "total_steps") or 0)

    @cached_property
    def batch(self) -> int:
        return int(_number(self.config, "train", "batch_size") or 0)

    @property
    def done(self) -> bool:
        return 0 < self.total <= self.step

    @cached_property
    def samples(self) -> int:
        return int(self.columns.last("samples_seen") or self.step * self.batch)

    @cached_property
    def images(self) -> int:
        """Images that are trained on, about: the held-out ones are drawn by chance."""
        if passes := self.columns.last("passes"):
            return round(self.samples / passes)
        held_out = _number(self.config, "data", "holdout_fraction") or 0.0
        return round((_number(self.dataset, "count") or 0) * (1 - held_out))

    @property
    def passes(self) -> float:
        return self.samples / self.images if self.images else 0.0

    @cached_property
    def seconds(self) -> float:
        """Wall time of training over all legs; 0 where the rows do not have it."""
        return self.columns.last("seconds") or 0.0

    @property
    def watts(self) -> float:
        return _number(self.config, "metrics", "watts") or 0.0

    @cached_property
    def rate(self) -> float | None:
        """Images a second over the last rows, evaluations and saves counted; without "seconds", as the rows say."""
        rows = np.stack([self.columns[name][-RECENT:] for name in ("step", "seconds", "seconds_before")])
        rows = rows[:, np.isfinite(rows[1])]
        # Between two legs lies what was done and given up again, which was paid for and is no part of the pace.
        steps, seconds, _ = np.diff(rows)[:, np.diff(np.nan_to_num(rows[2])) == 0]
        if seconds.sum() > 0:
            return float(steps.sum() * self.batch / seconds.sum()) or None
        return self.columns.last("images_per_second") or None

    @cached_property
    def left(self) -> float | None:
        """Seconds to the end at the present rate."""
        return max(self.total - self.step, 0) * self.batch / self.rate if self.rate and self.total else None

    @cached_property
    def stale(self) -> bool:
        """No row for long, so that the run may have stopped."""
        seconds = self.columns["seconds"][-RECENT:]
        usual = float(np.nanmedian(np.diff(seconds))) if np.isfinite(np.diff(seconds)).any() else 0.0
        return (self.now - self.as_of).total_seconds() > max(QUIET, 10 * usual)

    @cached_property
    def loss(self) -> float | None:
        known = self.columns["loss"][-50:]
        return float(np.nanmean(known)) if np.isfinite(known).any() else None

    @cached_property
    def held_out(self) -> float | None:
        ours = self.columns.last("eval/held_out/ema/text_vision")
        return self.columns.last("held_out_loss") if ours is None else ours

    @cached_property
    def voided(self) -> int:
        return int(self.columns.last("voided") or 0)

    @cached_property
    def voided_steps(self) -> np.ndarray:
        """Steps of the rows whose update was voided."""
        return self.columns["step"][~np.isfinite(self.columns["loss"]) | (self.columns["voided_in_row"] > 0)]

    @property
    def resumable(self) -> list[int]:
        return [saved.step for saved in self.saved if saved.resumable]

    def spans(self, levels: Mapping[str, str], columns: int = 400) -> list[tuple[float, float, str]]:
        """[(first step, last step, level)] of the verdicts; where several share a place, the most serious is shown."""
        found, end = self.columns.texts.get("health", []), max(self.step, 1)
        worst = np.zeros(columns, int)
        for (step, name), until in zip(found, [step for step, _ in found[1:]] + [end]):
            first = min(step * columns // end, columns - 1)
            place = slice(first, max(-(-until * columns // end), first + 1))
            worst[place] = np.maximum(worst[place], LEVELS.index(levels.get(name, "unknown")))
        starts = np.flatnonzero(np.diff(worst, prepend=-1)).tolist()
        return [
            (a * end / columns, b * end / columns, LEVELS[worst[a]]) for a, b in zip(starts, [*starts[1:], columns])
        ]


def look(workdir: Path) -> Facts:
    """Read a working folder; nothing in it makes this fail."""
    problems: list[str] = []
    config, dataset, origin = (
        read(workdir / name, problems) for name in ("config.json", "dataset.json", "origin.json")
    )
    columns = metrics.columns(workdir)
    saved = _checkpoints(workdir, problems)
    path = workdir / "metrics.jsonl"
    now = datetime.now()
    as_of = datetime.fromtimestamp(path.stat().st_mtime) if path.exists() else now
    return Facts(
        workdir, config, dataset, origin, columns, _lines(workdir / "config_history.jsonl", problems), saved,
        _verdict(columns, config, saved), problems, as_of, now,
    )  # fmt: skip


def _verdict(columns: metrics.Columns, config: Mapping[str, Any], saved: Sequence[Saved]) -> health.Verdict:
    """What the trainer said last, with the words of now where the rows still say the same."""
    said = columns.texts.get("health", [])
    name = said[-1][1] if said else ""
    options = config.get("health")
    steps = {"saved": [one.step for one in saved if one.resumable], "averages": [one.step for one in saved]}
    try:
        now = health.judge(columns.newest, **steps, **(options if isinstance(options, dict) else {}))
        if name in (now.name, ""):
            return now if len(columns) else health.Verdict("", "", None, "good")
    except (TypeError, ValueError, LookupError, ArithmeticError):  # odd rows, or options of another version
        pass
    level, _, advice = health.TROUBLES.get(name, ("", None, ""))
    words = advice.format(back="go back to a step before it") if advice else ""
    return health.Verdict(name, words, said[-1][0] if said else None, level or health.VERDICTS.get(name, "unknown"))


def _checkpoints(workdir: Path, problems: list[str]) -> list[Saved]:
    found = []
    try:
        folder = workdir / "checkpoints"
        for child in folder.iterdir() if folder.is_dir() else ():
            if child.name.isdecimal() and (child / "ema").is_dir():
                resumable = all((child / item).is_dir() for item in ("state", "data"))
                size = sum(file.stat().st_size for file in child.rglob("*") if file.is_file())
                found.append(Saved(int(child.name), resumable, size, datetime.fromtimestamp(seal.saved_at(child))))
    except OSError as error:  # one that is being removed at this moment, too
        problems.append(f"checkpoints cannot be listed ({error}).")
    return sorted(found, key=lambda one: one.step)


def read(path: Path, problems: list[str]) -> Mapping[str, Any]:
    """A JSON object of the working folder; {} where there is none, and a sentence more where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({error}).")
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path, problems: list[str]) -> list[Mapping[str, Any]]:
    rows, damaged = [], 0
    try:
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            rows += [row] if isinstance(row, dict) else []
            damaged += not isinstance(row, dict)
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error}).")
    if damaged:
        problems.append(f"{path.name} has {damaged} lines that cannot be read.")
    return rows


def _number(values: Any, *names: str) -> float | None:
    for name in names:
        values = values.get(name) if isinstance(values, Mapping) else None
    good = isinstance(values, int | float) and not isinstance(values, bool) and abs(values) < LARGEST
    return values if good else None
