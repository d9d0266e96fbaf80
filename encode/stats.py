"""Mean and standard deviation per latent channel, exact in whatever order and grouping the parts are merged.

Every shard keeps its own sums, so a resumed run never reads a shard again. A latent is summed in float64; the sums of
latents are added as fractions, which never round, so neither the order of the shards nor how many processes shared them
out changes a bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

FLOOR = 1e-4  # a channel that never changes would be divided by zero


@dataclass(frozen=True)
class Partial:
    """Sums over the picture positions of some latents: how many, and per channel the sum and the sum of squares."""

    count: int
    total: tuple[Fraction, ...]
    square: tuple[Fraction, ...]

    def to_json(self) -> dict:
        return {"count": self.count, "total": [*map(str, self.total)], "square": [*map(str, self.square)]}

    @staticmethod
    def from_json(value: dict) -> Partial:
        return Partial(value["count"], tuple(map(Fraction, value["total"])), tuple(map(Fraction, value["square"])))


def partial(latent: np.ndarray, mask: np.ndarray | None = None) -> Partial:
    """Sums of one latent.

    Args:
      latent: [height, width, channels] as stored, any float dtype.
      mask: [height, width], 1 where there is picture; None or empty: everywhere.
    """
    values = np.asarray(latent).astype(np.float64)
    rows = values.reshape(-1, values.shape[-1]) if mask is None or not np.size(mask) else values[np.asarray(mask) == 1]
    total, square = rows.sum(0), (rows * rows).sum(0)
    if not (np.isfinite(total).all() and np.isfinite(square).all()):
        raise ValueError("the latent is not finite")
    return Partial(len(rows), tuple(map(Fraction, total.tolist())), tuple(map(Fraction, square.tolist())))


def of_record(record: Mapping[str, Any]) -> list[Partial]:
    """What one record adds to the statistics: the sums of its latent, and of the mirrored one where it may be mirrored."""
    mask = record["mask"]
    sums = [partial(record["latent"], mask)]
    return [*sums, partial(record["latent_flip"], mask[:, ::-1])] if record["caption_flip"] else sums


def merge(parts: Iterable[Partial]) -> Partial:
    """The sums over all parts; their order does not matter."""
    parts = list(parts)
    if not parts:
        raise ValueError("statistics of no latents at all")
    columns = range(len(parts[0].total))
    return Partial(
        sum(part.count for part in parts),
        tuple(sum(part.total[column] for part in parts) for column in columns),
        tuple(sum(part.square[column] for part in parts) for column in columns),
    )


def mean_and_std(sums: Partial) -> tuple[list[float], list[float], list[int]]:
    """Mean, standard deviation (population) and the channels whose deviation was raised to FLOOR.

    Raises:
      ValueError: the sums cover no position.
    """
    if not sums.count:
        raise ValueError("the latents cover no picture; statistics are impossible")
    mean = [total / sums.count for total in sums.total]
    variance = [square / sums.count - centre * centre for square, centre in zip(sums.square, mean)]
    std = [math.sqrt(max(value, 0)) for value in variance]
    flat = flat_channels(std)
    return [*map(float, mean)], [max(value, FLOOR) for value in std], flat


def flat_channels(std: Sequence[float]) -> list[int]:
    return [channel for channel, value in enumerate(std) if value < FLOOR]
