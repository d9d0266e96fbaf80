"""What surrounds one leg of an encode run: the word about a full disk, the progress line."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
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

    def __init__(self, total: int, todo: int):
        self.total, self.todo, self.done = total, todo, 0
        self.started = self.said = time.monotonic()

    def step(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= SAY_EVERY or self.done == self.todo:
            self.said = now
            left = (self.todo - self.done) / max(self.rate(), 1e-9)
            at = self.total - self.todo + self.done
            log.info("%d of %d pictures, %.1f a second, %.0f s left.", at, self.total, self.rate(), left)

    def rate(self) -> float:
        return self.done / max(time.monotonic() - self.started, 1e-9) if self.done else 0.0
