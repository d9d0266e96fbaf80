"""What the run says: metrics.jsonl, TensorBoard events, and the progress line."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class Metrics:
    """Writer of WORKDIR/metrics.jsonl and of the TensorBoard events beside it.

    Args:
      workdir: the working folder.
      step: the step that the run starts from; later lines, left by a run that was killed, are removed so that every step
        stands once.
    """

    def __init__(self, workdir: Path, step: int):
        self.path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read(workdir) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.path)
        self._file = open(self.path, "a")  # noqa: SIM115 held open for the length of the run
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it has "step", the rest are numbers or null."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl in order of step; a line cut by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Clock:
    """Rate and share of time spent waiting for data, over the last steps of this leg of the run."""

    def __init__(self, window: int = 50):
        self._wait, self._images, self._said = 0.0, 0, time.monotonic()
        self._ticks = deque([(time.monotonic(), 0.0, 0)], maxlen=window + 1)

    def waited(self, seconds: float) -> None:
        self._wait += seconds

    def trained(self, images: int) -> None:
        self._images += images
        self._ticks.append((time.monotonic(), self._wait, self._images))

    def said(self) -> None:
        """A progress line has been printed."""
        self._said = time.monotonic()

    def silent_for(self) -> float:
        """Seconds since the last progress line."""
        return time.monotonic() - self._said

    def skip(self, seconds: float) -> None:
        """Leave out time that was not training: compiling, saving."""
        self._ticks = deque(((at + seconds, *rest) for at, *rest in self._ticks), maxlen=self._ticks.maxlen)

    def look(self) -> dict[str, float]:
        """images_per_second and data_wait_fraction over the window; None before there is a step to judge by."""
        if len(self._ticks) < 6:
            return {"images_per_second": None, "data_wait_fraction": None}
        (start, wait, images), (end, all_wait, all_images) = self._ticks[0], self._ticks[-1]
        passed = max(end - start, 1e-9)
        return {
            "images_per_second": (all_images - images) / passed,
            "data_wait_fraction": min((all_wait - wait) / passed, 1.0),
        }


def duration(seconds: float) -> str:
    """1 d 02 h, 3 h 05 min, 4 min 10 s or 12 s."""
    seconds = round(seconds)
    for unit, name, small, small_name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{seconds // unit} {name} {seconds % unit // small:02d} {small_name}"
    return f"{seconds} s"


def progress_line(row: dict[str, Any], total_steps: int, batch_size: int) -> str:
    """One line that says where the run stands; the time left is at the rate of this leg."""
    rate = row["images_per_second"]
    speed = "rate not known yet"
    if rate:
        left = duration((total_steps - row["step"]) * batch_size / rate)
        speed = f"{rate:.1f} images/s  waiting for data {row['data_wait_fraction']:.0%}  left {left}"
    held_out = f"  held-out loss {row['held_out_loss']:.4f}" if row.get("held_out_loss") is not None else ""
    return (
        f"step {row['step']:,}/{total_steps:,}  loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3g}  "
        f"lr {row['learning_rate']:.2e}{held_out}  {speed}"
    )
