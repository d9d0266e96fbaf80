"""Aspect-ratio buckets, pure: choosing them from a collection and assigning a picture to one.

A bucket is a shape (columns, rows) counted in cells, so that one choice serves every resolution without rounding:
`cells` cells span a square's side, a cell is resolution / cells pixels (64 at 1024, 32 at 512, 16 at 256 and below), and
every side is a multiple of 16 = 8 (latent) x 2 (patch). Nothing is cropped: a picture is stretched to its bucket, and the
ratio of the two aspect ratios is the distortion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SIDE = 16  # pixels: 8 to a latent, 2 latents to a patch
CELLS = 16  # cells across a square at most: the grid of 64 at 1024
LARGEST_ASPECT = 4.0  # a bucket narrower than 1:4 serves nobody
AREA_TOLERANCE = 0.1

Shape = tuple[int, int]  # columns, rows in cells


def cells_across(resolutions: Sequence[int]) -> int:
    """Cells across a square, the most (up to 16) that give each resolution a cell of whole multiples of 16 pixels.

    Raises:
      ValueError: a resolution is not a multiple of 16, or they share no useful grid.
    """
    for resolution in resolutions:
        if resolution < 4 * SIDE or resolution % SIDE:
            raise ValueError(f"resolution {resolution} is not a multiple of {SIDE} from {4 * SIDE} up")
    shared = math.gcd(*(resolution // SIDE for resolution in resolutions))
    cells = max(count for count in range(1, CELLS + 1) if shared % count == 0)
    if cells < 4:
        raise ValueError(f"resolutions {tuple(resolutions)} share no grid; use ones with a common multiple of 64")
    return cells


def pixels(shape: Shape, cells: int, resolution: int) -> tuple[int, int]:
    """(width, height) in pixels of a bucket at one resolution."""
    return shape[0] * resolution // cells, shape[1] * resolution // cells


def candidates(cells: int) -> list[Shape]:
    """All shapes of about cells^2 area, narrowest first; of equal aspect ratio the one nearest that area."""
    best: dict[float, Shape] = {}
    for columns in range(1, 2 * cells + 1):
        for rows in range(1, 2 * cells + 1):
            aspect, miss = columns / rows, abs(columns * rows / cells**2 - 1)
            if miss > AREA_TOLERANCE or not 1 / LARGEST_ASPECT <= aspect <= LARGEST_ASPECT:
                continue
            known = best.get(aspect)
            if known is None or miss < abs(known[0] * known[1] / cells**2 - 1):
                best[aspect] = (columns, rows)
    return [best[aspect] for aspect in sorted(best)]


def choose(aspects: Sequence[float], max_buckets: int, cells: int) -> list[Shape]:
    """At most max_buckets shapes with the least total distortion, sum of |log aspect - log bucket aspect|.

    Exact: over shapes in order of aspect ratio, the best set ending at a shape extends the best set ending at an earlier
    one, since the pictures between two neighbouring buckets go to the nearer. Of equal results the fewest buckets.

    Args:
      aspects: width / height of every picture.
      max_buckets: the most to choose.
      cells: from `cells_across`.
    """
    shapes = candidates(cells)
    places = np.log([columns / rows for columns, rows in shapes])
    logs = np.sort(np.log(np.asarray(aspects, np.float64)))
    if not len(logs):
        return []
    count = len(shapes)
    below = np.array([np.maximum(place - logs, 0).sum() for place in places])  # cost of all pictures left of the first
    above = np.array([np.maximum(logs - place, 0).sum() for place in places])
    between = np.zeros((count, count))
    for left in range(count):
        for right in range(left + 1, count):
            inside = logs[np.searchsorted(logs, places[left]) : np.searchsorted(logs, places[right])]
            between[left, right] = np.minimum(inside - places[left], places[right] - inside).sum()
    ahead = np.triu(np.ones((count, count), bool), 1)
    cost, chains, best, chosen = below, [[index] for index in range(count)], math.inf, []
    for _ in range(min(max_buckets, count)):
        total = cost + above
        last = int(np.argmin(total))
        if total[last] < best - 1e-9:
            best, chosen = total[last], chains[last]
        options = np.where(ahead, cost[:, None] + between, np.inf)
        previous = np.argmin(options, axis=0)
        chains = [[*chains[previous[index]], index] for index in range(count)]
        cost = options[previous, np.arange(count)]
    return _used([shapes[index] for index in chosen], np.exp(logs))


def forced(sizes: Sequence[tuple[int, int]], cells: int, resolution: int) -> list[Shape]:
    """The shapes of buckets that a person named, as (width, height) in pixels at one resolution.

    Raises:
      ValueError: one is no pair of positive multiples of the grid, its area is far from the resolution's square, or two are
        of one shape.
    """
    grid, shapes = resolution // cells, []
    for size in sizes:
        if not (isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size)):
            raise ValueError(f"{size!r} is not a pair (width, height)")
        if any(side < grid or side % grid for side in size):
            raise ValueError(f"{size[0]}x{size[1]}: both sides must be multiples of {grid}")
        if not 0.25 <= size[0] * size[1] / resolution**2 <= 2:
            raise ValueError(f"{size[0]}x{size[1]}: the area is not near that of {resolution}x{resolution}")
        if other := next((one for one in shapes if one[0] * size[1] == one[1] * size[0]), None):
            raise ValueError(
                f"{size[0]}x{size[1]} has the shape of {other[0] * grid}x{other[1] * grid}; name one of them"
            )
        shapes.append((size[0] // grid, size[1] // grid))
    return sorted(set(shapes), key=lambda shape: (shape[0] / shape[1], shape))


def inside(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) of the picture's own shape within a bucket, in whole patches."""
    scale = min(bucket[0] / size[0], bucket[1] / size[1])
    return tuple(min(most, max(SIDE, round(side * scale / SIDE) * SIDE)) for side, most in zip(size, bucket))


def _used(shapes: list[Shape], aspects: np.ndarray) -> list[Shape]:
    taken = {assign(aspect, shapes)[0] for aspect in np.unique(aspects)}
    return [shape for shape in shapes if shape in taken]


def assign(aspect: float, shapes: Sequence[Shape]) -> tuple[Shape, float]:
    """The bucket nearest in log aspect ratio, and the distortion: by what factor one side is stretched (1 is none)."""
    distances = [abs(math.log(aspect) - math.log(columns / rows)) for columns, rows in shapes]
    nearest = min(range(len(shapes)), key=lambda index: (distances[index], shapes[index]))
    return shapes[nearest], math.exp(distances[nearest])
