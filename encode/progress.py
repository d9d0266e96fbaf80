"""What surrounds one leg of an encode run: the word about a full disk, the progress line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from encode.page import many
from encode.whole_files import write_json

log = logging.getLogger(__name__)
SHOWN = 5  # reasons in a line
SAY_EVERY = 10.0  # seconds between progress lines


def disk_full(out: Path) -> str:
    disk = out.resolve()
    while not os.path.ismount(disk):
        disk = disk.parent
    free = shutil.disk_usage(disk).free / 2**20
    return (
        f"the disk {disk}, which holds {out}, took no more data ({free:,.0f} MiB free); finished shards are safe. Make room "
        "and run the same command again: it goes on where it stopped."
    )


def out_of_memory(error: Exception) -> bool:
    """MemoryError, torch.OutOfMemoryError, or the RuntimeError that some drivers raise instead."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def say_problems(when: str, rows: Sequence[Mapping[str, str]]) -> None:
    """One line however many there are."""
    if rows:
        kinds = Counter(kind_of(row["reason"]) for row in rows).most_common(SHOWN)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        others = len(rows) - sum(count for _, count in kinds)
        listed += f" and {others} for other reasons" if others else ""
        log.warning("%s refused %s and named in quarantine.jsonl: %s.", many(len(rows), "input"), when, listed)


def kind_of(reason: str) -> str:
    """A reason without what differs from file to file."""
    reason = bare(reason)
    if re.match(r"names .*, which is not among", reason, re.DOTALL):
        return "names a file that is not among the pictures"
    reason = re.split(r"[:(]| -?\d", reason, maxsplit=1)[0].strip(" ,")
    return re.sub(r"^\d+ ", "", reason) or "other"


def bare(reason: str) -> str:
    """A reason without the name of the caption file that it begins with."""
    return re.sub(r"^[^:]*\.(?:txt|json|jsonl|npy): ", "", reason)


def say_need(out: Path, need: int) -> None:
    """Before the work: how much it will write, and whether the disk has it."""
    if not need:
        return
    free = shutil.disk_usage(out).free
    log.info("About %s will be written; %s are free on the disk of %s.", amount(need), amount(free), out)
    if need > free:
        log.warning(
            "That is not enough: the run will stop after about %d%%, keep what it has, and go on once there is room.",
            100 * free // need,
        )


class Progress:
    """A line now and then: how many of how many, how fast in this leg, how long still; the same in OUT/progress.json.

    Args:
      what: is being done.
      total: pictures in all.
      todo: of them in this leg.
      out: folder for progress.json; None writes none.
    """

    def __init__(self, what: str, total: int, todo: int, out: Path | None = None):
        self.what, self.total, self.todo, self.out = what, total, todo, out
        self.done, self.refused, self.waited = 0, 0, 0.0
        self._shard = 0.0, 0  # waited and refused in the shard at hand
        self.started = self.said = time.monotonic()
        self.ended: float | None = None

    def step(self, count: int, waited: float = 0.0, refused: int = 0) -> None:
        """A batch is done.

        Args:
          count: its pictures.
          waited: seconds that the encoders waited since `next_shard`.
          refused: pictures refused since then.
        """
        self.done += count
        self._shard = waited, refused
        now = time.monotonic()
        if self.done == self.todo:
            self.ended = now
        if now - self.said >= SAY_EVERY or self.done == self.todo:
            self.said = now
            at, left = self.total - self.todo + self.done, (self.todo - self.done) / max(self.rate(), 1e-9)
            share = (self.waited + waited) / max(now - self.started, 1e-9)
            words = (
                f"; waited {share:.1%} of the time for pictures; {self.refused + refused} refused" if self.out else ""
            )
            log.info(
                "%d of %d %s, %.1f a second, %s left%s.", at, self.total, self.what, self.rate(), span(left), words
            )
            self._write(self.what, at, left, share, self.refused + refused)

    def next_shard(self) -> None:
        waited, refused = self._shard
        self.waited, self.refused, self._shard = self.waited + waited, self.refused + refused, (0.0, 0)

    def end(self, refused: int) -> None:
        self._write("done", self.total, 0.0, None, refused)

    def rate(self) -> float:
        """Pictures a second, from the start to the last picture."""
        return self.done / max((self.ended or time.monotonic()) - self.started, 1e-9) if self.done else 0.0

    def _write(self, stage: str, done: int, left: float, share: float | None, refused: int) -> None:
        if self.out is None:
            return
        found = {
            "stage": stage,
            "done": done,
            "total": self.total,
            "pictures_per_second": round(self.rate(), 3),
            "seconds_left": round(left, 1),
            "waited_fraction": None if share is None else round(share, 4),
            "refused": refused,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(self.out / "progress.json", found)


class Speed:
    """How fast a shard went, and how long the encoders waited for pictures; OUT/speed.jsonl has a line a shard."""

    def __init__(self):
        self.started, self.waited = time.monotonic(), 0.0

    def waiting(self, pictures: Iterable) -> Iterator:
        """The same pictures, the time until each one counted as waiting."""
        pictures = iter(pictures)
        while True:
            asked = time.monotonic()
            try:
                picture = next(pictures)
            except StopIteration:
                return
            finally:
                self.waited += time.monotonic() - asked
            yield picture

    def write(self, out: Path, pictures: int) -> None:
        seconds = time.monotonic() - self.started
        row = {"pictures": pictures, "seconds": round(seconds, 3), "waited": round(self.waited, 3)}
        with open(out / "speed.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @staticmethod
    def read(out: Path) -> list[dict[str, float]]:
        found = []
        with contextlib.suppress(FileNotFoundError), open(out / "speed.jsonl", encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError):  # a line cut by a crash
                    found.append(json.loads(line))
        return found


def span(seconds: float) -> str:
    """A time as a person says it: 40 s, 12 min, 5.2 h, 3.1 days."""
    for unit, length in (("days", 86400), ("h", 3600)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def amount(count: float) -> str:
    """Bytes as a person says them."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1024:,.0f} KiB"
