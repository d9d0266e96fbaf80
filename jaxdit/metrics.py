"""What the run says: metrics.jsonl, TensorBoard, Weights & Biases where asked for, and the progress line."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from encode.whole_files import publish
from jaxdit import trackers

DATED = 3 * 3600.0  # a run that ends later than this is told the day and the hour
CHUNK, NEWEST = 1000, 2000  # rows turned into columns at a time; rows kept whole for health to judge


class Metrics:
    """Writer of WORKDIR/metrics.jsonl, of the TensorBoard events beside it, and of a Weights & Biases run.

    Args:
      workdir: the working folder.
      step: the step that the run starts from; later rows, left by a run that was killed, are removed so that every step
        stands once.
      wandb: project of Weights & Biases ("project" or "entity/project"); None or "": none.
      name: what the run is called there.
      config: the configuration as a dict, shown there.

    Attributes:
      last: the newest row that was kept, or None.
      seconds: wall time of all legs before this one, that of removed rows included: it was paid for.

    Raises:
      InputError: wandb is asked for and not installed; nothing was changed.
    """

    def __init__(
        self,
        workdir: str | Path,
        step: int,
        *,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        workdir = Path(workdir)
        if wandb:
            trackers.wandb_library(wandb)  # what is missing is said before anything is touched
        workdir.mkdir(parents=True, exist_ok=True)
        self._web = trackers.WandB(workdir, wandb, config) if wandb else None
        self.path = workdir / "metrics.jsonl"
        self.last, self.seconds = _remove_after(self.path, step)
        self._step = self.last["step"] if self.last else -1
        self._words = {key: value for key, value in (self.last or {}).items() if isinstance(value, str)}
        self._unwritten, self._complained = b"", False
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 held open for the length of the run
        self._board = trackers.TensorBoard(workdir, step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
          row: "step" (above that of the row before), and by name numbers, arrays of one number, None or strings. What is
            not finite becomes null: JSON has no NaN. Strings go to metrics.jsonl; where one has changed, to TensorBoard.
        """
        values = {name: _plain(value) for name, value in row.items()}
        step = values["step"]
        if step <= self._step:
            logging.warning("metrics.jsonl has step %d already; step %d is not written again.", self._step, step)
            return
        self._step = step
        self._unwritten += json.dumps(values).encode() + b"\n"
        self._append()
        numbers = {}
        for name, value in values.items():
            if isinstance(value, str):
                if self._words.get(name) != value:
                    self._board.words(step, name, value)
                self._words[name] = value
            elif value is not None and name != "step":
                numbers[name] = value
        self._board.numbers(step, numbers)
        if self._web is not None:
            self._web.row(values)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Show pictures of a step, {name: [height, width, 3] uint8}, in TensorBoard (and Weights & Biases)."""
        self._board.pictures(step, pictures)
        if self._web is not None:
            self._web.pictures(step, pictures)

    def sync(self) -> None:
        """Put the rows on the disk. Called before a checkpoint is saved: a power cut then loses no row before its step."""
        self._append()
        self._board.sync(self._step)
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        self.sync()
        self._file.close()
        self._board.close()
        if self._web is not None:
            self._web.close()

    def _append(self) -> None:
        """Write what is not written yet. On a full disk it waits in memory, and goes on in the middle of the line it was at."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._complained = False
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            logging.warning("%s cannot be written (%s); its rows wait in memory until it can.", self.path, error)
        self._complained = True


def _remove_after(path: Path, step: int) -> tuple[dict[str, Any] | None, float]:
    """Rewrite metrics.jsonl without damaged lines and without rows after `step`; (newest kept row, most seconds seen)."""
    if not path.exists():
        return None, 0.0
    last, held, seconds, changed, damaged = None, None, 0.0, False, 0
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as out:

        def put(line, row):
            nonlocal last
            last = row
            out.write(line if line.endswith(b"\n") else line + b"\n")

        for line, row in _lines(path):
            if row is not None and isinstance(row.get("seconds"), int | float):
                seconds = max(seconds, float(row["seconds"]))
            if row is None or row["step"] > step:
                changed, damaged = True, damaged + (row is None)
                continue
            changed = changed or not line.endswith(b"\n")
            if held is None or row["step"] > held[1]["step"]:
                if held is not None:
                    put(*held)
                held = line, row
                continue
            changed, damaged = True, damaged + 1
            if last is None or row["step"] > last["step"]:  # the one before is out of order, not this one
                held = line, row
        if held is not None:
            put(*held)
    if changed:
        publish(temporary, path)
    else:
        temporary.unlink()
    if damaged:
        logging.warning("%s: %d damaged lines are left out.", path, damaged)
    return last, seconds


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """(line as it stands, its row); None for a row where a kill or a power cut has left something else."""
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            step = row.get("step") if isinstance(row, dict) else None
            yield line, row if type(step) is int and 0 <= step < 2**53 else None


def rows(workdir: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl one by one; a damaged line is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if path.exists():
        yield from (row for _, row in _lines(path) if row is not None)


def read(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl in order of step; a line cut by a kill is left out."""
    return list(rows(workdir))


@dataclass(frozen=True)
class Columns:
    """metrics.jsonl by name, a tenth of the memory of its rows.

    numbers: {name: [rows] float64}, NaN where a row has null or not this name. texts: {name: [(step, value)] where it changed}.
    newest: the last NEWEST rows as they stand.
    """

    numbers: Mapping[str, np.ndarray]
    texts: Mapping[str, list[tuple[int, str]]]
    newest: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.numbers["step"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.numbers.get(name, np.full(len(self), np.nan))

    def last(self, name: str) -> float | None:
        """The newest value that is known."""
        known = self[name][np.isfinite(self[name])]
        return float(known[-1]) if len(known) else None


def columns(workdir: str | Path) -> Columns:
    """WORKDIR/metrics.jsonl as columns; odd values count as missing."""
    parts: dict[str, list[np.ndarray]] = {"step": []}
    texts: dict[str, list[tuple[int, str]]] = {}
    chunk: list[dict[str, Any]] = []
    newest, done = deque(maxlen=NEWEST), 0

    def take() -> None:
        nonlocal done
        for name in {name for row in chunk for name in row} | parts.keys():
            before = parts.setdefault(name, [np.full(done, np.nan)] if done else [])
            values = [row.get(name) for row in chunk]
            try:
                made = np.array(values, np.float64)
                if made.ndim != 1:
                    raise ValueError(f"{name} holds lists")
                before.append(made)
            except (TypeError, ValueError, OverflowError):
                before.append(np.array([_number(value) for value in values]))
                for row in chunk:
                    if isinstance(row.get(name), str):
                        changes = texts.setdefault(name, [])
                        if not changes or changes[-1][1] != row[name]:
                            changes.append((row["step"], row[name]))
        done += len(chunk)
        chunk.clear()

    for row in rows(workdir):
        chunk.append(row)
        newest.append(row)
        if len(chunk) == CHUNK:
            take()
    take()
    return Columns({name: np.concatenate(found) for name, found in parts.items()}, texts, list(newest))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


def _plain(value: Any) -> Any:
    """A number, None or a string, from what a row may hold."""
    if value is None or isinstance(value, str):
        return value
    value = np.asarray(value).item()
    return value if math.isfinite(value) else None


class Clock:
    """Rate, share of time spent waiting for data and use of the device, over the last steps of this leg of the run.

    Args:
      window: updates that a rate is taken over.
      start_seconds: wall time of the legs before this one (Metrics.seconds).
      peak: floating-point operations a second that the devices can do at best; None: not known.
    """

    def __init__(self, window: int = 50, *, start_seconds: float = 0.0, peak: float | None = None):
        self._peak, self._before, self._began = peak, start_seconds, time.monotonic() - start_seconds
        self._wait, self._images, self._flops, self._said = 0.0, 0, 0.0, time.monotonic()
        self._ticks = deque([(time.monotonic(), 0.0, 0, 0.0)], maxlen=window + 1)

    @property
    def seconds(self) -> float:
        """Wall time of all legs of the run so far, with everything that was not training: it is what the run costs."""
        return time.monotonic() - self._began

    def waited(self, seconds: float) -> None:
        self._wait += seconds

    def trained(self, images: int, flops: float = 0.0) -> None:
        """An update is done: its images, and the operations that their forward and backward passes need."""
        self._images += images
        self._flops += flops
        self._ticks.append((time.monotonic(), self._wait, self._images, self._flops))

    def said(self) -> None:
        """A progress line has been printed."""
        self._said = time.monotonic()

    def silent_for(self) -> float:
        """Seconds since the last progress line."""
        return time.monotonic() - self._said

    def skip(self, seconds: float) -> None:
        """Leave out time that was not training: compiling, evaluating, saving."""
        self._ticks = deque(((at + seconds, *rest) for at, *rest in self._ticks), maxlen=self._ticks.maxlen)

    def look(self) -> dict[str, float | None]:
        """images_per_second, data_wait_fraction and mfu over the window, None before there is a step to judge by; seconds,
        and how many of them the legs before this one took."""
        row: dict[str, float | None] = dict.fromkeys(("images_per_second", "data_wait_fraction", "mfu"))
        row["seconds_before"] = self._before
        if len(self._ticks) >= 6:
            (start, wait, images, flops), (end, all_wait, all_images, all_flops) = self._ticks[0], self._ticks[-1]
            passed = max(end - start, 1e-9)
            row["images_per_second"] = (all_images - images) / passed
            row["data_wait_fraction"] = min((all_wait - wait) / passed, 1.0)
            if self._peak and all_flops > flops:
                row["mfu"] = (all_flops - flops) / passed / self._peak
        return row | {"seconds": self.seconds}


def duration(seconds: float) -> str:
    """1 d 02 h, 3 h 05 min, 4 min 10 s or 12 s."""
    seconds = round(seconds)
    for unit, name, small, small_name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{seconds // unit} {name} {seconds % unit // small:02d} {small_name}"
    return f"{seconds} s"


def date(moment: datetime, now: datetime) -> str:
    """Thu 26 Nov 14:10 in local time, with the year where it is another one."""
    year = "" if moment.year == now.year else f" {moment.year}"
    return f"{moment:%a} {moment.day} {moment:%b}{year} {moment:%H:%M}"


def progress_line(row: Mapping[str, Any], total_steps: int, batch_size: int, now: datetime | None = None) -> str:
    """One line that says where the run stands; the time left is at the rate of this leg."""
    rate = row.get("images_per_second")
    speed = "rate not known yet"
    if rate:
        now, seconds = now or datetime.now(), (total_steps - row["step"]) * batch_size / rate
        speed = f"{rate:.1f} images/s  waiting for data {row['data_wait_fraction']:.0%}"
        speed += f"  mfu {row['mfu']:.0%}" if row.get("mfu") is not None else ""
        speed += f"  left {duration(seconds)}"
        if DATED < seconds < 1e9:
            speed += f"  ends {date(now + timedelta(seconds=seconds), now)}"
    loss, norm = (f"{row[name]:{form}}" if row.get(name) is not None else "not finite" for name, form in _SHOWN)
    held_out = f"  held-out loss {row['held_out_loss']:.4f}" if row.get("held_out_loss") is not None else ""
    return (
        f"step {row['step']:,}/{total_steps:,}  loss {loss}  grad norm {norm}  lr {row['learning_rate']:.2e}"
        f"{held_out}  {speed}"
    )


_SHOWN = (("loss", ".4f"), ("grad_norm", ".3g"))
