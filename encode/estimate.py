"""What an encode run would be, before anything is written: pictures, buckets, refusals, disk and time.

Sizes come from all headers, time and bytes from really encoding up to 200 pictures of the fullest bucket, kept elsewhere.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encode import buckets, images, pipeline, prepare, records, shard
from encode import plan as plan_rules
from encode.progress import amount, kind_of, span
from encode.workers import Workers

SAMPLE, PATIENCE = 200, 120.0  # pictures encoded to measure, in so many seconds at most; the first batch warms up
NAMED, EACH = 20, 2  # refused inputs shown; of each reason, where there are more


def estimate(config: Any, encoders: pipeline.Encoders, stop: Callable[[], bool] = lambda: False) -> str:
    """The text that --dry_run prints.

    Raises:
      InputError: as `pipeline.run`.
      WorkFailed: an encoder failed.
      Stopped: as asked.
    """
    with Workers(config.decode_workers, config.decode_seconds, config.decode_memory) as workers:
        context, plan, jobs = pipeline.begin(config, encoders, workers, stop, keep=False)
        mended = set(plan.get("unfinished", ()))  # whose captions are to be taken
        todo = [
            job
            for job in jobs
            if context.missing(job) or not context.part(job).exists() or context.index(job) in mended
        ]
        decoding, encoding, record_bytes = _measure(context, jobs)
    entries = [(job.shape, entry) for job in jobs for entry in job.entries]
    left = sum(len(job.entries) for job in todo)
    written = {size: 0 for size in config.resolutions}
    for shape, (_, width, height) in entries:
        for size in plan_rules.targets(config, context.cells, shape, (width, height))[0]:
            written[size] += 1
    lines = [
        "Dry run: nothing was written; what is damaged inside a picture is found when it is encoded.",
        f"Pictures   {len(entries):,} to encode, {len(plan['quarantine']):,} inputs refused so far"
        + (f"; {len(entries) - left:,} are encoded already" if left < len(entries) else ""),
        *_refused(plan["quarantine"]),
        *_buckets(context, jobs),
        f"Stretch    {_stretch(config, entries)}",
        *_disk(context, written, record_bytes),
        _time(left, decoding, encoding),
    ]
    return "\n".join(lines)


def _measure(context: pipeline.Context, jobs: Sequence[pipeline.Job]) -> tuple[float, float, dict[int, float]]:
    """Seconds a picture of decoding (all workers) and of encoding, and bytes a record at each resolution."""
    config = context.config
    pictures = Counter()
    for job in jobs:
        pictures[job.shape] += len(job.entries)
    fullest = max(pictures, key=lambda shape: (pictures[shape], shape))
    entries = [(job, entry) for job in jobs if job.shape == fullest for entry in job.entries]
    sample = entries[:: max(1, len(entries) // SAMPLE)][:SAMPLE]
    tasks = [context.task(job, entry) for job, entry in sample]
    list(context.workers.map(prepare.prepare, tasks[:1], 1))  # starts the processes
    began = time.monotonic()
    read = list(context.workers.map(prepare.prepare, tasks, len(tasks)))
    decoding = (time.monotonic() - began) / len(tasks)
    good = [(context.items[task.id], found) for task, found in read if not isinstance(found, images.ImageProblem)]
    timed: list[tuple[float, int]] = []
    made = shard.Encoded.nothing(config.resolutions)
    for number, start in enumerate(range(0, len(good), config.batch_size)):
        if number > 1 and sum(seconds for seconds, _ in timed) > PATIENCE:
            break
        batch = good[start : start + config.batch_size]
        began = time.monotonic()
        shard.encode_batch(context, sample[0][0], number, batch, made)
        timed.append((time.monotonic() - began, len(batch)))
    warm = [one for one in timed[1:] if one[1] == config.batch_size] or timed
    encoding = sum(seconds for seconds, _ in warm) / max(1, sum(count for _, count in warm))
    return decoding, encoding, {size: _bytes_a_record(context, fullest, size, rows) for size, rows in made.rows.items()}


def _bytes_a_record(context: pipeline.Context, shape: buckets.Shape, resolution: int, rows: Sequence) -> float:
    """What a record takes in a shard, which is compressed: a shard of the sample is written aside and measured."""
    if not rows:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        bucket = context.bucket(shape, resolution)
        records.write_shard(Path(folder), bucket, 0, rows, context.spec(shape, resolution))
        return records.shard_path(Path(folder), bucket, 0).stat().st_size / len(rows)


def _refused(rows: Sequence[Mapping[str, str]]) -> list[str]:
    kinds = Counter(f"{row['stage']}: {kind_of(row['reason'])}" for row in rows).most_common(8)
    lines = [f"  {count:>8,}  {kind}" for kind, count in kinds]
    others = len(rows) - sum(count for _, count in kinds)
    lines += [f"  {others:>8,}  for other reasons"] if others else []
    of_kind: dict[str, list] = {}
    for row in rows:
        of_kind.setdefault(kind_of(row["reason"]), []).append(row)
    shown = [row for some in of_kind.values() for row in some[:EACH]][:NAMED] if len(rows) > NAMED else rows
    lines += [f"            {_printable(row['file'])}: {_printable(row['reason'])}" for row in shown]
    return lines + ([f"            and {len(rows) - len(shown):,} more"] if len(rows) > len(shown) else [])


def _printable(words: str) -> str:
    """A name may hold a line break or an escape sequence for the terminal."""
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in words)


def _buckets(context: pipeline.Context, jobs: Sequence[pipeline.Job]) -> list[str]:
    pictures = Counter()
    for job in jobs:
        pictures[job.shape] += len(job.entries)
    largest = max(context.config.resolutions)
    shapes = sorted(pictures, key=lambda shape: shape[0] / shape[1])
    return [f"Buckets    {len(shapes)}, at {largest}:"] + [
        f"  {pictures[shape]:>8,}  {context.bucket(shape, largest)}" for shape in shapes
    ]


def _stretch(config: Any, entries: Sequence) -> str:
    stretch = [buckets.assign(width / height, [shape])[1] for shape, (_, width, height) in entries]
    padded = sum(value > config.max_distortion for value in stretch)
    kept = [value for value in stretch if value <= config.max_distortion]
    words = f"{padded:,} padded with noise" if padded else ""
    if kept:
        middle, high, worst = ((value - 1) * 100 for value in (*np.quantile(kept, (0.5, 0.95)), max(kept)))
        numbers = f"{middle:.1f}% in the middle, {high:.1f}% at the 95th of a hundred, {worst:.1f}% at most"
        words = f"{numbers}; {words}" if words else numbers
    return words


def _disk(context: pipeline.Context, written: Mapping[int, int], record_bytes: Mapping[int, float]) -> list[str]:
    need = {size: count * record_bytes[size] for size, count in written.items()}
    folder = context.out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    each = ", ".join(f"{amount(need[size])} at {size} ({written[size]:,} records)" for size in sorted(need))
    line = (
        f"Disk       {amount(sum(need.values()))} in all: {each}; {amount(free)} are free on the disk of {context.out}"
    )
    return [line] + (["           which is not enough."] if sum(need.values()) > free else [])


def _time(left: int, decoding: float, encoding: float) -> str:
    if not left:
        return "Time       everything is encoded already"
    slower = max(decoding, encoding)
    limit = "the encoders" if encoding >= decoding else "reading the pictures"
    return (
        f"Time       about {span(left * slower)} for {left:,} pictures at {1 / slower:.1f} a second, limited by {limit} (reading "
        f"alone {1 / decoding:.1f} a second, encoding alone {1 / encoding:.1f})"
    )
