"""What surrounds one leg of an encode run: the word about a full disk, the progress line."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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


def say_problems(when: str, rows: Sequence[Mapping[str, str]]) -> None:
    """One line however many there are."""
    if rows:
        kinds = Counter(row["reason"].split(":")[0].split("(")[0].strip() for row in rows).most_common(3)
        listed = ", ".join(f"{count} {reason}" for reason, count in kinds)
        log.warning("%d inputs refused %s and named in quarantine.jsonl: %s.", len(rows), when, listed)


class Progress:
    """A line now and then: how many of how many, how fast in this leg, how long still."""

    def __init__(self, what: str, total: int, todo: int):
        self.what, self.total, self.todo, self.done = what, total, todo, 0
        self.started = self.said = time.monotonic()

    def step(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= SAY_EVERY or self.done == self.todo:
            self.said = now
            left = (self.todo - self.done) / max(self.rate(), 1e-9)
            at = self.total - self.todo + self.done
            log.info("%d of %d %s, %.1f a second, %s left.", at, self.total, self.what, self.rate(), span(left))

    def rate(self) -> float:
        return self.done / max(time.monotonic() - self.started, 1e-9) if self.done else 0.0


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
