"""Which images of a data set the nano run gets, pure: compositions far apart, in light that is alike.

Light is the mean of a latent over all positions: a VAE's latent is local, so its average carries exposure and tint and no
arrangement. Composition is what is left of it, on an 8 x 8 grid. k-centre greedy (Gonzalez 1985) over the composition,
limited to the band of images whose light is nearest the set's median. Measured on 600 demo pictures, the 60% nearest by the
vision vector instead spread more in their mean colour (OKLab): 0.092 against 0.089; and DINOv3's vector is of the content.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encode import captions
from encode.records import InputError

GRID = 8
BAND = 0.6  # share of the pictures, those nearest the median light, that is chosen from
# Of all images that are at least this share of the farthest one's distance away, the one nearest the median light is taken.
# At 30 of 600 demo pictures the light then spreads 0.071 (mean OKLab) instead of 0.087, 29 instead of 28 of their named
# compositions are there, and the covering radius, at most 2 / SLACK times the best possible one, grows by 8%.
SLACK = 0.75
ENOUGH = 10  # images for each coefficient of light, or what light explains of the composition is not told from chance
SIDES = ("left", "right", "")


@dataclass(frozen=True)
class Candidates:
    """What the choice knows of n images.

    Attributes:
      ids, hashes, captions: names, pixel hashes, captions (or digests of them) without case.
      sides: "left" or "right", what a caption that can be swapped names first; "" for any other.
      lights: [n, channels] float32.
      compositions: [n, GRID * GRID * channels] float16.
    """

    ids: Sequence[str]
    hashes: Sequence[bytes]
    captions: Sequence[bytes]
    sides: Sequence[str]
    lights: np.ndarray
    compositions: np.ndarray


@dataclass(frozen=True)
class Selection:
    """The choice.

    Attributes:
      chosen: places among the candidates, in the order of the choice.
      gaps: distance of each to the nearest one chosen before it; infinite for the first.
      light: [n] distance of every candidate from the median light.
      limit: of the band.
      share: of the pictures within the band.
      widened: beyond BAND, because too few in it have pixels and a caption of their own.
      radius: the largest distance of an image within the band to the nearest chosen one.
      left_out: how many images were left out, by reason.
    """

    chosen: tuple[int, ...]
    gaps: tuple[float, ...]
    light: np.ndarray
    limit: float
    share: float
    widened: bool
    radius: float
    left_out: dict[str, int]


def describe(latent: np.ndarray, mask: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Light and composition of one image.

    Args:
      latent: [height, width, channels] as stored.
      mask: [height, width], 1 where there is picture (a rectangle), or [0, 0]: everywhere.
      std: [channels] of the data set.

    Returns:
      [channels] float32 and [GRID * GRID * channels] float16.
    """
    values = np.asarray(latent).astype(np.float32)
    if np.size(mask):
        rows, columns = (np.flatnonzero(np.asarray(mask).any(axis)) for axis in (1, 0))
        values = values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    light = values.mean((0, 1))
    down, across = _pooling(values.shape[0]), _pooling(values.shape[1])
    grid = np.einsum("ih,hwc,jw->ijc", down, (values - light) / std, across, optimize=True)
    return light, grid.ravel().astype(np.float16)


def side(caption: str, caption_flip: str) -> str:
    """What a caption that can be swapped names first, "left" or "right"; "" where it names no side, or not for sure."""
    if not caption_flip or caption_flip == caption:
        return ""
    named = [word.lower() for word, sense in captions.senses(caption) if sense is captions.Sense.SIDE]
    return next((name for name in ("left", "right") if named and named[0].startswith(name)), "")


def choose(found: Candidates, count: int) -> Selection:
    """Exactly `count` images: no two with the same pixels or caption, half of the sides left and half right.

    Images whose caption names a side are taken before any other is, as many as are in the band; of images with the same
    pixels or caption the one nearest the median light counts. Ties go to the smaller id, so the order of the candidates
    does not matter.

    Raises:
      InputError: there are fewer; the message says why.
    """
    light = standardised(found.lights)
    distance = np.linalg.norm(light, axis=1)
    order = sorted(range(len(found.ids)), key=lambda i: (distance[i], found.ids[i]))
    pictures, usable = _distinct(found, order)
    left_out = {
        "exact duplicates": len(order) - len(pictures),
        "captions that another image has": len(pictures) - len(usable),
    }
    if len(usable) < count:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        raise InputError(
            f"{count} images are wanted, but only {len(usable)} of {len(order)} can be used: {reasons}. Ask for fewer, or "
            "give each image a caption of its own."
        )
    last = max(math.ceil(BAND * len(pictures)) - 1, 0)
    widened = bool(distance[usable[count - 1]] > distance[pictures[last]])
    limit = max(distance[pictures[last]], distance[usable[count - 1]])
    band = np.array(sorted((i for i in usable if distance[i] <= limit), key=lambda i: found.ids[i]))
    left_out["light outside the band"] = len(usable) - len(band)
    points = without_light(found.compositions[band], light[band])
    groups = np.array([SIDES.index(found.sides[i]) for i in band])
    places, gaps, radius = k_centre(points, distance[band], groups, _shares(np.bincount(groups, minlength=3), count))
    share = sum(distance[i] <= limit for i in pictures) / len(pictures)
    chosen = tuple(int(i) for i in band[places])
    return Selection(chosen, tuple(gaps), distance, float(limit), share, widened, radius, left_out)


def standardised(lights: np.ndarray) -> np.ndarray:
    """[n, channels] distances from the median in deviations, both robust; a channel that hardly ever differs is left out."""
    away = lights.astype(np.float64) - np.median(lights, axis=0)
    deviation = 1.4826 * np.median(np.abs(away), axis=0)
    return np.where(deviation > 1e-9, away / np.maximum(deviation, 1e-9), 0.0)


def without_light(compositions: np.ndarray, light: np.ndarray) -> np.ndarray:
    """[n, dims] float32: what a linear regression on the light does not explain of the compositions.

    Lamp and exposure reach into the arrangement (a brighter wall has a stronger gradient). With this 77% of the demo
    pictures have one of the same pose, side and object as their nearest neighbour, without it 40%.
    """
    points = compositions.astype(np.float32)
    if len(points) < ENOUGH * (light.shape[1] + 1):
        return points
    known = np.column_stack([np.ones(len(light)), light])
    weights = np.linalg.pinv(known).astype(np.float32) @ points
    for start in range(0, len(points), 4096):  # in place: of 100,000 images the points alone are 0.4 GB
        points[start : start + 4096] -= known[start : start + 4096].astype(np.float32) @ weights
    return points


def k_centre(
    points: np.ndarray, light: np.ndarray, groups: np.ndarray, shares: Sequence[int]
) -> tuple[list[int], list[float], float]:
    """Greedy k-centre from the most central point on: each next one is far from all before it (see SLACK).

    Args:
      points: [n, dims] float32.
      light: [n] distances from the median light.
      groups: [n] of 0, 1, 2.
      shares: how many to take of each group; the first two fill up before the third begins.

    Returns:
      The chosen rows, the distance of each to the nearest one before it (the first: infinite), the covering radius.
    """
    room, free = list(shares), np.ones(len(points), bool)
    norms = np.einsum("nd,nd->n", points, points)

    def distances(point: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(norms - 2 * (points @ point) + point @ point, 0))

    nearest, central = np.full(len(points), np.inf), distances(points.mean(0))
    chosen, gaps = [], []
    for _ in range(sum(shares)):
        now = (0, 1) if room[0] + room[1] else (2,)
        allowed = np.flatnonzero(free & np.isin(groups, [group for group in now if room[group]]))
        if chosen:
            far = allowed[nearest[allowed] >= SLACK * nearest[allowed].max()]
            place = int(far[light[far].argmin()])
        else:
            place = int(allowed[central[allowed].argmin()])
        chosen.append(place)
        gaps.append(float(nearest[place]))
        free[place] = False
        room[groups[place]] -= 1
        nearest = np.minimum(nearest, distances(points[place]))
        nearest[place] = 0
    return chosen, gaps, float(nearest.max())


def _pooling(size: int) -> np.ndarray:
    """[GRID, size] float32: averages over GRID equal parts of an axis, cut through a position where need be."""
    edges = np.arange(GRID + 1) * size / GRID
    places = np.arange(size)
    overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    weights = np.maximum(overlap, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _distinct(found: Candidates, order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Images with pixels of their own, and of these the ones with a caption of their own; the first in order counts."""
    pixels, words, pictures, usable = set(), set(), [], []
    for i in order:
        if found.hashes[i] in pixels:
            continue
        pixels.add(found.hashes[i])
        pictures.append(i)
        if found.captions[i] not in words:
            words.add(found.captions[i])
            usable.append(i)
    return pictures, usable


def _shares(there: np.ndarray, count: int) -> list[int]:
    """How many of (left, right, no side): sides first, the two as equal as can be."""
    sided = min(count, int(there[0] + there[1]))
    left = min(max((sided + 1) // 2, sided - int(there[1])), int(there[0]))
    return [left, sided - left, count - sided]
