"""How good drawn pictures are as numbers: pure functions of vectors, one row a picture, in NumPy and SciPy alone.

Frechet and kernel distance compare two sets as wholes, precision and its sisters by neighbourhoods; `nearest` and `closeness`
tell pictures that were learnt by heart. All of them take any encoder's vectors: those of the libraries come with their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import linalg
from scipy.spatial import distance

FEWEST = 12  # vectors that two sets can be compared of
SIDE = 8  # of a latent whose neighbours are looked for
PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS = 3, 5  # as in the papers
NEAREST = 50  # neighbours that say how far apart pictures usually are (Carlini et al. 2023, sec. 4.2)
COPY = 0.5  # of the usual closeness of real images: below is a copy
MANY_MORE = 0.05  # copies beyond those among real images from which on a model is said to copy
CHUNK = 4096  # training images compared at a time
SIZES, DRAWS = (0.5, 0.6, 0.75, 1.0), 3  # of the subsets by which the Frechet distance is followed to infinity


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance (squared) between the normal distributions of two sets of vectors (Heusel et al. 2017, eq. 6).

    The trace of the root of S1 S2 is the sum of the singular values of A B', where S1 = A'A and S2 = B'B: no root of a matrix
    is taken, so nothing has to be added to one that is nearly singular, as that of few vectors is.

    Args:
      one, other: [n, width] and [m, width] float, two rows at least.
    """
    one, other = (np.asarray(values, np.float64) for values in (one, other))
    roots = []
    for values in (one, other):
        centred = (values - values.mean(0)) / np.sqrt(len(values) - 1)
        roots.append(linalg.qr(centred, mode="r", check_finite=False)[0][: min(values.shape)])
    traces = sum((root**2).sum() for root in roots)
    apart = ((one.mean(0) - other.mean(0)) ** 2).sum()
    return float(max(apart + traces - 2 * linalg.svdvals(roots[0] @ roots[1].T, check_finite=False).sum(), 0.0))


def frechet_limit(one: np.ndarray, other: np.ndarray) -> float | None:
    """The Frechet distance without the bias of few vectors: what a line through 1/n meets at 0 (Chong and Forsyth 2020).

    The same at every call. None with fewer than 4 x width vectors: the smallest subset then has fewer than 2 x width, and the
    bias no longer goes with 1/n.
    """
    count, rng = min(len(one), len(other)), np.random.default_rng(0)
    if count < 4 * one.shape[1]:
        return None
    sizes, found = [], []
    for share in SIZES:
        size = round(share * count)
        for _ in range(1 if size == count else DRAWS):
            parts = [values[rng.choice(len(values), size, replace=False)] for values in (one, other)]
            sizes.append(1 / size)
            found.append(frechet(*parts))
    return float(np.polyfit(sizes, found, 1)[1])


def kernel_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / width + 1)^3 (Binkowski et al. 2018), of all vectors.

    About 0 for two sets of one distribution, and below it half of the time, however few they are.

    Args:
      one, other: [n, width] and [m, width] float, two rows at least.
    """
    one, other = (np.asarray(values, np.float64) for values in (one, other))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = []
    for values in (one, other):
        pairs = kernel(values, values)
        within.append((pairs.sum() - np.trace(pairs)) / (len(values) * (len(values) - 1)))
    return float(sum(within) - 2 * kernel(one, other).mean())


def neighbourhoods(real: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A picture's neighbourhood reaches to its third (for density and coverage its fifth) neighbour among its own. Precision: the
    share of drawn pictures within that of a real one; recall: the other way round. Density: of how many real ones, over those
    wanted, so that outliers count little; coverage: the share of real ones with a drawn picture in theirs. Reach depends on
    how many there are: of the larger set, rows spread evenly are taken.

    Args:
      real, drawn: [n, width] and [m, width] float, more than five rows each.
    """
    count = min(len(real), len(drawn))
    real, drawn = (values[np.arange(count) * len(values) // count].astype(np.float64) for values in (real, drawn))
    across = distance.cdist(real, drawn)
    reach = {
        name: np.sort(distance.cdist(values, values), axis=1) for name, values in (("real", real), ("drawn", drawn))
    }
    near, wide = reach["real"][:, PRECISION_NEIGHBOURS], reach["real"][:, COVERAGE_NEIGHBOURS]
    inside = across <= wide[:, None]
    return {
        "precision": float((across <= near[:, None]).any(0).mean()),
        "recall": float((across <= reach["drawn"][:, PRECISION_NEIGHBOURS]).any(1).mean()),
        "density": float(inside.sum(0).mean() / COVERAGE_NEIGHBOURS),
        "coverage": float(inside.any(1).mean()),
    }


def compare(real: np.ndarray, drawn: np.ndarray) -> dict[str, float | None]:
    """Every measure of this room that takes two sets."""
    return {
        "frechet": frechet(real, drawn),
        "frechet_limit": frechet_limit(real, drawn),
        "kernel": kernel_distance(real, drawn),
        **neighbourhoods(real, drawn),
    }


def apart(vectors: np.ndarray) -> float:
    """Mean distance between two different rows of [n, width]; nan of fewer than two."""
    if len(vectors) < 2:
        return float("nan")
    return float(distance.pdist(np.asarray(vectors, np.float64)).mean())


def nearest(
    queries: np.ndarray, keys: np.ndarray, own: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest training images of each picture, by at most 4,096 of them at a time.

    Args:
      queries: [n, width].
      keys: [images, views, width], read a piece at a time (a file will do); an image is as near as the nearest of its views.
      own: for each query the places among the keys that do not count: its own image and copies of it.

    Returns:
      ([n, k] distances ascending, [n, k] places), k = 51 or as many as there are; infinite where fewer count.
    """
    queries = np.asarray(queries, np.float64)
    squares = (queries**2).sum(1)[:, None]
    found, places = np.empty((len(queries), 0)), np.empty((len(queries), 0), int)
    for start, part in _parts(keys):
        flat = part.reshape(-1, part.shape[-1])
        between = squares + (flat**2).sum(1) - 2 * queries @ flat.T
        between = between.reshape(len(queries), *part.shape[:2]).min(2)
        for row, mine in zip(between, own or ()):
            row[mine[(start <= mine) & (mine < start + len(part))] - start] = np.inf
        found = np.concatenate([found, between], axis=1)
        here = np.broadcast_to(np.arange(start, start + len(part)), between.shape)
        places = np.concatenate([places, here], axis=1)
        order = np.argsort(found, axis=1, kind="stable")[:, : NEAREST + 1]
        found, places = (np.take_along_axis(values, order, 1) for values in (found, places))
    return np.sqrt(np.maximum(found, 0)), places


def _parts(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(keys), CHUNK):
        yield start, np.asarray(keys[start : start + CHUNK], np.float64)


def closeness(distances: np.ndarray) -> np.ndarray:
    """[n] distance to the nearest over the mean of that to the following ones: 0 is a copy, about 1 has no nearest.

    A plain distance would call a blurred picture near to everything.

    Args:
      distances: [n, k] of `nearest`.
    """
    others = np.where(np.isfinite(distances), distances, np.nan)[:, 1:]
    if not np.isfinite(others).any(1).all():
        return np.ones(len(distances))
    return distances[:, 0] / np.maximum(np.nanmean(others, axis=1), 1e-12)


def memory(drawn: np.ndarray, real: np.ndarray) -> dict[str, float | bool]:
    """What the nearest training images of drawn pictures say, beside those of real ones that were not trained on.

    Args:
      drawn, real: [n, k] distances of `nearest`; picture i was drawn for image i.

    Returns:
      nearer: the share of drawn pictures nearer to a training image than the real one is: 0.5 where they are alike.
      copies, copies_real: the shares with a `closeness` below half of the median of real ones, which bursts of nearly equal
      photographs do not move; closest: the least `closeness` of a drawn picture; memorised: clearly more copies than among
      real ones.
    """
    ours, theirs = closeness(drawn), closeness(real)
    line = COPY * np.median(theirs)
    copies, usual = float((ours < line).mean()), float((theirs < line).mean())
    both = (copies + usual) / 2  # the error of both shares: of few real pictures often none is a copy
    beyond = copies - usual > max(MANY_MORE, 2 * np.sqrt(both * (1 - both) * 2 / len(theirs)))
    return {
        "nearer": float((drawn[:, 0] < real[:, 0]).mean()),
        "copies": copies,
        "copies_real": usual,
        "closest": float(np.min(ours)),
        "memorised": bool(beyond),
    }


def thumbnails(latents: np.ndarray) -> np.ndarray:
    """[n, 8 x 8 x channels] float32 means over the cells of an 8 x 8 grid of [n, height, width, channels]."""
    down, across = (_cells(size) for size in latents.shape[1:3])
    small = np.einsum("ah,nhwc,bw->nabc", down, latents.astype(np.float32), across, optimize=True)
    return small.reshape(len(latents), -1)


def _cells(size: int) -> np.ndarray:
    """[8, size] float32: which share of each of 8 equal cells each of `size` values takes."""
    edges = np.arange(SIDE + 1)[:, None] * size / SIDE
    place = np.arange(size)
    overlap = np.minimum(edges[1:], place + 1) - np.maximum(edges[:-1], place)
    return (np.maximum(overlap, 0) * SIDE / size).astype(np.float32)
