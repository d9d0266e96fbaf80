"""Mean and standard deviation per latent channel, in float64, exact in whatever order the parts are merged.

Every shard keeps its own sums, so a resumed run never reads a shard again. Sums of parts are taken with math.fsum, which
rounds once, so the order in which shards were encoded does not change a bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

FLOOR = 1e-4  # a channel that never changes would be divided by zero


@dataclass(frozen=True)
class Partial:
    """Sums over the picture positions of some latents: how many, and per channel the sum and the sum of squares."""

    count: int
    total: tuple[float, ...]
    square: tuple[float, ...]

    def to_json(self) -> dict:
        return {"count": self.count, "total": list(self.total), "square": list(self.square)}

    @staticmethod
    def from_json(value: dict) -> Partial:
        return Partial(value["count"], tuple(value["total"]), tuple(value["square"]))


def partial(latent: np.ndarray, mask: np.ndarray | None = None) -> Partial:
    """Sums of one latent.

    Args:
      latent: [height, width, channels] as stored, any float dtype.
      mask: [height, width], 1 where there is picture; None or empty: everywhere.
    """
    values = np.asarray(latent).astype(np.float64)
    rows = values.reshape(-1, values.shape[-1]) if mask is None or not np.size(mask) else values[np.asarray(mask) == 1]
    return Partial(len(rows), tuple(rows.sum(0).tolist()), tuple((rows * rows).sum(0).tolist()))


def merge(parts: Iterable[Partial]) -> Partial:
    """The sums over all parts; their order does not matter."""
    parts = list(parts)
    if not parts:
        raise ValueError("statistics of no latents at all")
    columns = range(len(parts[0].total))
    return Partial(
        sum(part.count for part in parts),
        tuple(math.fsum(part.total[column] for part in parts) for column in columns),
        tuple(math.fsum(part.square[column] for part in parts) for column in columns),
    )


def mean_and_std(sums: Partial) -> tuple[list[float], list[float], list[int]]:
    """Mean, standard deviation (population) and the channels whose deviation was raised to FLOOR.

    Raises:
      ValueError: the sums cover no position, or are not finite.
    """
    if not sums.count or not np.isfinite([*sums.total, *sums.square]).all():
        raise ValueError("the latents cover no picture, or are not finite; statistics are impossible")
    mean = [total / sums.count for total in sums.total]
    variance = [square / sums.count - centre * centre for square, centre in zip(sums.square, mean)]
    std = [math.sqrt(max(value, 0.0)) for value in variance]
    flat = flat_channels(std)
    return mean, [max(value, FLOOR) for value in std], flat


def flat_channels(std: Sequence[float]) -> list[int]:
    return [channel for channel, value in enumerate(std) if value < FLOOR]
