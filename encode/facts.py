"""What the page about a data set has to say, as numbers: pure functions from the plan, the parts and the records.

Nothing here reads a file or writes HTML. Whatever is drawn at random is drawn by a hash of (seed, name), so the same data
set gives the same choice.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from encode import buckets, captions, source
from encode.progress import kind_of

DOTS = 2000  # at most so many different sizes are drawn; more are rounded to a grid first
SPREAD = 4.5  # deviations on each side that a histogram of latents shows
BINS = 54

SWAPPED, KEPT, DOUBT = "sides swapped", "left or right in another sense: kept", "in doubt, or lettering: never flipped"
OFF, PLAIN = "switched off by you", "no left or right"


@dataclass(frozen=True)
class Picture:
    """One encoded picture: its upright size, its bucket in cells, by what factor one side is stretched (1 is none)."""

    name: str
    size: tuple[int, int]
    shape: tuple[int, int]
    stretch: float
    padded: bool
    pixel_hash: str
    tokens: int
    resolutions: tuple[int, ...]


@dataclass(frozen=True)
class Account:
    """Where every file went: files = encoded + refused + others. `lines` of caption lists that no picture used."""

    encoded: int
    refused: int
    others: int
    lines: int

    @property
    def files(self) -> int:
        return self.encoded + self.refused + self.others


def pictures(jobs: Sequence, parts: Sequence[Mapping], max_distortion: float) -> list[Picture]:
    """All pictures in the order of the shards. One further from its bucket than max_distortion was padded, not stretched."""
    found = []
    for job, part in zip(jobs, parts):
        sizes = {name: (width, height) for name, width, height in job.entries}
        for name, pixel_hash, tokens, _, resolutions in part["records"]:
            off = buckets.assign(sizes[name][0] / sizes[name][1], [job.shape])[1]
            padded = off > max_distortion
            stretch = 1.0 if padded else off
            row = (name, sizes[name], job.shape, stretch, padded, pixel_hash, tokens, tuple(resolutions))
            found.append(Picture(*row))
    return found


def account(encoded: Iterable[str], refused: Sequence[source.Problem], others: Mapping[str, int]) -> Account:
    """Counts of files; a file with several problems counts once, a line of a caption list is no file."""
    encoded = set(encoded)
    wanting = {row.file for row in refused} - encoded
    lines = {name for name in wanting if is_line(name)}
    return Account(len(encoded), len(wanting - lines), sum(others.values()), len(lines))


def is_line(name: str) -> bool:
    """Whether what was refused is a caption list or a line of one, not a picture."""
    return re.fullmatch(rf"{re.escape(source.METADATA)}(:\d+)?", name.rsplit("/", 1)[-1]) is not None


def is_text(name: str) -> bool:
    """Whether what was refused is a caption or a vector, of which no picture can be shown."""
    return is_line(name) or name.rsplit(".", 1)[-1].lower() in ("txt", "json", "jsonl", "npy")


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 95% quantile, largest."""
    return tuple(float(value) for value in np.quantile(np.asarray(values, np.float64), (0.5, 0.95, 1.0)))


def drawn(names: Iterable[str], seed: int, count: int, salt: str) -> list[str]:
    """At most `count` of the names, chosen and ordered by a hash of (salt, seed, name)."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}:{seed}:{name}".encode()).digest())[:count]


def duplicates(found: Iterable[Picture]) -> list[list[str]]:
    """Groups of two or more names whose pixels are the same."""
    groups: dict[str, list[str]] = defaultdict(list)
    for picture in found:
        groups[picture.pixel_hash].append(picture.name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def swap_decisions(
    texts: Mapping[str, str], flips: Mapping[str, str | None], off: Iterable[str]
) -> dict[str, list[str]]:
    """{decision: names}: what was decided about the mirror image of each picture.

    Args:
      texts: {name: caption}.
      flips: of the plan (`mirrored`).
      off: names whose flip the user switched off.
    """
    kinds: dict[str, list[str]] = {kind: [] for kind in (SWAPPED, KEPT, PLAIN, DOUBT, OFF)}
    off = set(off)
    for name, text in texts.items():
        swapped = flips.get(name, text)
        if name in off:
            kinds[OFF].append(name)
        elif swapped is None:
            kinds[DOUBT].append(name)
        elif swapped != text:
            kinds[SWAPPED].append(name)
        else:
            kinds[KEPT if captions.senses(text) else PLAIN].append(name)
    return kinds


def dots(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(width, height, how many), at most DOTS, the most frequent first.

    Where there are more different sizes than that, the most frequent of a neighbourhood stands for it; neighbourhoods are
    the cells of a grid that is even in the logarithm.
    """
    exact, step = Counter(sizes), 1 / 64
    counts = exact
    while len(counts) > DOTS:
        counts, stands = Counter(), {}
        # Of equal counts any, not the least size.
        for size, count in sorted(exact.items(), key=lambda pair: (-pair[1], hash(pair[0]))):
            cell = tuple(round(math.log2(side) / step) for side in size)
            counts[stands.setdefault(cell, size)] += count
        step *= 2
    return sorted(((*size, count) for size, count in counts.items()), key=lambda dot: (-dot[2], dot[:2]))


def classes(values: Sequence[float], low: float, high: float, count: int) -> np.ndarray:
    """[count] how many values lie in each of equally wide classes from low to high."""
    return np.histogram(np.asarray(values, np.float64), count, (low, high))[0]


def token_classes(lengths: Sequence[int]) -> tuple[np.ndarray, int]:
    """Counts of lengths in classes 1..w, w+1..2w, ... and w, the fewest tokens a class that need at most 48 classes."""
    width = max(1, math.ceil(max(lengths) / 48))
    return np.bincount((np.asarray(lengths) - 1) // width), width


@dataclass(frozen=True)
class Latents:
    """Histograms of one resolution's latents.

    Attributes:
      counts: [channels, BINS] in equal classes from mean - SPREAD std to mean + SPREAD std.
      beyond: [channels] values more than three deviations from the mean.
      total: values a channel.
      pictures: latents looked at.
    """

    counts: np.ndarray
    beyond: np.ndarray
    total: int
    pictures: int


def latents(rows: Iterable[Mapping[str, Any]], mean: Sequence[float], std: Sequence[float]) -> Latents:
    """Histograms of the latents of some records, padding left out."""
    channels = range(len(mean))
    counts = np.zeros((len(mean), BINS), np.int64)
    beyond = np.zeros(len(mean), np.int64)
    total = seen = 0
    for record in rows:
        values = np.asarray(record["latent"]).astype(np.float64)
        mask = np.asarray(record["mask"])
        flat = values[mask == 1] if mask.size else values.reshape(-1, values.shape[-1])
        total, seen = total + len(flat), seen + 1
        for channel in channels:
            low, high = mean[channel] - SPREAD * std[channel], mean[channel] + SPREAD * std[channel]
            counts[channel] += np.histogram(flat[:, channel], BINS, (low, high))[0]
            beyond[channel] += (np.abs(flat[:, channel] - mean[channel]) > 3 * std[channel]).sum()
    return Latents(counts, beyond, total, seen)


def reasons(refused: Sequence[source.Problem]) -> list[tuple[str, str, list[source.Problem]]]:
    """(stage, kind of reason, its rows), the most frequent first; what differs from file to file is not the kind."""
    groups: dict[tuple[str, str], list[source.Problem]] = defaultdict(list)
    for row in refused:
        groups[row.stage, kind_of(row.reason)].append(row)
    order = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    return [(*key, rows) for key, rows in order]
