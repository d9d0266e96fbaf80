"""Drawings of the embedded data set, pure: a figure in a pose, an object beside it, a room, and a light over all of it.

The scene is drawn as grey reflectances, oversampled; the light multiplies them, so the composition shows in the edges
and the light in the colours. Everything about the light is symmetric between left and right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

OVERSAMPLING = 4
WALL, FLOOR, SKIRTING = 205, 132, 232  # reflectances, as grey levels
DARK, BODY, SKIN, MIDDLE, PALE = 26, 46, 236, 92, 246


def draw(pose: str, thing: str, size: tuple[int, int], hue: float, strength: float) -> np.ndarray:
    """Draw a scene with the figure on the left; its mirror image has the figure on the right, in the same light.

    Args:
      pose: one of POSES.
      thing: one of OBJECTS.
      size: (width, height) in pixels.
      hue: of the light, in degrees on the OKLab circle.
      strength: of the light; 1 is full.

    Returns:
      [height, width, 3] uint8 pixels.
    """
    reflectance = _reflectance(pose, thing, size)
    height, width = reflectance.shape
    down, across = np.mgrid[0:height, 0:width]
    distance = np.hypot((across - (width - 1) / 2) / height, (down / height - 0.34) * 1.15)
    glow = np.exp(-((distance / 0.62) ** 2))
    tint = oklch_to_srgb(0.79, 0.13, hue)
    light = strength * (0.72 + 0.52 * glow)
    pixels = reflectance[..., None] * light[..., None] * tint
    pixels += (0.07 * strength * glow)[..., None] * tint  # haze, so that the dark figure is lit as well
    return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def oklch_to_srgb(lightness: float, chroma: float, hue: float) -> np.ndarray:
    """[3] sRGB in [0, 1] of a colour of Ottosson's OKLab (2020), hue in degrees."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    l, m, s = (
        (lightness + x * a + y * b) ** 3
        for x, y in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
    )
    linear = np.clip(
        [
            4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
            -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
            -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
        ],
        0,
        1,
    )
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


class _Pen:
    """Draws in a frame of its own: the origin on the floor, x to the side that the figure faces, y up, in body heights."""

    def __init__(self, draw: ImageDraw.ImageDraw, origin: tuple[float, float], scale: float):
        self.draw, self.origin, self.scale = draw, origin, scale

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.origin[0] + x * self.scale, self.origin[1] - y * self.scale

    def shape(self, tone: int, *points: tuple[float, float]) -> None:
        self.draw.polygon([self.at(*point) for point in points], fill=tone)

    def box(self, tone: int, x0: float, y0: float, x1: float, y1: float) -> None:
        self.shape(tone, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def oval(self, tone: int, x: float, y: float, rx: float, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        self.draw.ellipse([*self.at(x - rx, y + ry), *self.at(x + rx, y - ry)], fill=tone)

    def limb(self, tone: int, width: float, *points: tuple[float, float]) -> None:
        for start, end in pairwise(points):
            self.draw.line([self.at(*start), self.at(*end)], fill=tone, width=round(width * self.scale))
        for point in points:
            self.oval(tone, *point, width / 2)


def _reflectance(pose: str, thing: str, size: tuple[int, int]) -> np.ndarray:
    """[height, width] in [0, 1]: the scene under white light, the figure on the left."""
    width, height = size
    w, h = width * OVERSAMPLING, height * OVERSAMPLING
    image = Image.new("L", (w, h), WALL)
    canvas = ImageDraw.Draw(image)
    horizon = round(0.8 * h)
    canvas.rectangle([0, horizon, w, h], fill=FLOOR)
    canvas.rectangle([0, horizon - round(0.022 * h), w, horizon], fill=SKIRTING)
    scale = min(0.8 * h, 0.86 * w)
    ground, figure_x, object_x = 0.92 * h, 0.29 * w, 0.73 * w
    shadow = Image.new("L", (width, height), 0)
    under = ImageDraw.Draw(shadow)
    for x, reach in ((figure_x, 0.24), (object_x, 0.27)):
        pen = _Pen(under, (x / OVERSAMPLING, ground / OVERSAMPLING), scale / OVERSAMPLING)
        pen.oval(150, 0, 0.0, reach, 0.035)
    shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(height / 60)), np.float64) / 255
    shade = Image.fromarray(np.round(255 * (1 - shadow)).astype(np.uint8)).resize((w, h), Image.Resampling.BILINEAR)
    image = Image.fromarray((np.asarray(image, np.float64) * np.asarray(shade, np.float64) / 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    OBJECTS[thing](_Pen(canvas, (object_x, ground - 0.01 * h), scale))
    _figure(_Pen(canvas, (figure_x, ground), scale), POSES[pose][1])
    small = image.resize(size, Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255


@dataclass(frozen=True)
class _Body:
    """Joints of a figure; each limb runs from the trunk outwards, the far one is drawn first."""

    hip: tuple[float, float]
    neck: tuple[float, float]
    head: tuple[float, float]
    legs: tuple[Sequence[tuple[float, float]], Sequence[tuple[float, float]]]
    arms: tuple[Sequence[tuple[float, float]], Sequence[tuple[float, float]]]


def _figure(pen: _Pen, body: _Body) -> None:
    pen.limb(DARK, 0.082, body.neck, *body.arms[0])
    pen.limb(DARK, 0.115, body.hip, *body.legs[0])
    pen.limb(BODY, 0.115, body.hip, *body.legs[1])
    middle = tuple((a + b) / 2 for a, b in zip(body.hip, body.neck))
    pen.limb(BODY, 0.2, body.hip, middle)
    pen.limb(BODY, 0.185, middle, body.neck)
    x, y = body.head
    along = np.subtract(body.head, body.neck)
    up = along / np.hypot(*along)
    face = np.array([up[1], -up[0]])
    pen.shape(
        SKIN,
        *(tuple(body.head + p) for p in (face * 0.13 - up * 0.02, face * 0.06 + up * 0.035, face * 0.06 - up * 0.04)),
    )
    pen.oval(SKIN, x, y, 0.093)
    for lift in (0.025, 0.05):  # a cap
        pen.limb(
            DARK,
            0.06,
            tuple(body.head + up * lift - face * 0.06),
            tuple(body.head + up * (lift + 0.012) + face * 0.055),
        )
    pen.limb(DARK, 0.028, tuple(body.head + up * 0.03), tuple(body.head + up * 0.024 + face * 0.135))
    throat = np.asarray(body.neck) + up * 0.038
    pen.limb(PALE, 0.05, tuple(throat - face * 0.055), tuple(throat + face * 0.055))
    pen.limb(
        PALE,
        0.046,
        tuple(throat - face * 0.05),
        tuple(throat - face * 0.115 - up * 0.075),
        tuple(throat - face * 0.12 - up * 0.16),
    )
    pen.limb(BODY, 0.082, body.neck, *body.arms[1])
    for arm in body.arms:
        pen.oval(SKIN, *arm[-1], 0.046)


_STANDING = (((-0.05, 0.24), (-0.055, 0.04)), ((0.05, 0.24), (0.06, 0.04)))
POSES: dict[str, tuple[str, _Body]] = {
    "raised arms": (
        "raises both arms",
        _Body(
            (0, 0.45), (0, 0.7), (0.005, 0.855), _STANDING,
            (((-0.14, 0.82), (-0.19, 1.0)), ((0.15, 0.82), (0.2, 1.0))),
        ),
    ),
    "bow": (
        "bows low",
        _Body(
            (-0.1, 0.47), (0.14, 0.58), (0.275, 0.55), (((-0.11, 0.25), (-0.12, 0.04)), ((-0.04, 0.25), (-0.02, 0.04))),
            (((0.1, 0.42), (0.13, 0.27)), ((0.18, 0.42), (0.22, 0.27))),
        ),
    ),
    "kneeling": (
        "kneels down",
        _Body(
            (-0.07, 0.29), (-0.02, 0.56), (0.0, 0.715), (((-0.02, 0.06), (-0.23, 0.045)), ((0.15, 0.3), (0.16, 0.04))),
            (((0.06, 0.42), (0.2, 0.44)), ((0.08, 0.4), (0.22, 0.4))),
        ),
    ),
    "pointing": (
        "points ahead",
        _Body(
            (0, 0.45), (0, 0.73), (0.01, 0.885), _STANDING,
            (((-0.1, 0.58), (-0.11, 0.42)), ((0.16, 0.74), (0.33, 0.77))),
        ),
    ),
    "striding": (
        "takes a long stride",
        _Body(
            (-0.02, 0.44), (0.03, 0.72), (0.055, 0.872), (((-0.12, 0.25), (-0.25, 0.07)), ((0.13, 0.26), (0.23, 0.04))),
            (((0.16, 0.6), (0.23, 0.5)), ((-0.11, 0.6), (-0.2, 0.5))),
        ),
    ),
}  # fmt: skip


def _lamp(pen: _Pen) -> None:
    pen.box(MIDDLE, -0.018, 0, 0.018, 0.66)
    pen.oval(MIDDLE, 0, 0.015, 0.14, 0.03)
    pen.oval(PALE, 0, 0.72, 0.19)


def _tree(pen: _Pen) -> None:
    pen.box(DARK, -0.035, 0, 0.035, 0.25)
    for tone, low, high, half in (
        (MIDDLE, 0.16, 0.58, 0.25),
        (MIDDLE + 22, 0.38, 0.78, 0.2),
        (MIDDLE + 44, 0.6, 0.98, 0.15),
    ):
        pen.shape(tone, (-half, low), (half, low), (0, high))


def _house(pen: _Pen) -> None:
    pen.box(PALE, -0.2, 0, 0.2, 0.42)
    pen.shape(DARK, (-0.26, 0.41), (0.26, 0.41), (0, 0.7))
    pen.box(MIDDLE, -0.13, 0, -0.01, 0.27)
    pen.box(MIDDLE, 0.06, 0.18, 0.15, 0.3)


def _ball(pen: _Pen) -> None:
    pen.oval(PALE, 0, 0.23, 0.23)
    pen.oval(MIDDLE, 0, 0.23, 0.1, 0.23)
    pen.oval(PALE, 0, 0.23, 0.042, 0.23)


def _chair(pen: _Pen) -> None:
    for x in (-0.15, 0.15):
        pen.box(DARK, x - 0.022, 0, x + 0.022, 0.3)
    pen.box(DARK, 0.13, 0.3, 0.175, 0.72)
    pen.box(MIDDLE, -0.19, 0.28, 0.19, 0.34)
    pen.box(MIDDLE, 0.12, 0.5, 0.185, 0.74)


def _arch(pen: _Pen) -> None:
    pen.box(PALE, -0.23, 0, 0.23, 0.52)
    pen.oval(PALE, 0, 0.52, 0.23)
    pen.box(MIDDLE - 20, -0.12, 0, 0.12, 0.5)
    pen.oval(MIDDLE - 20, 0, 0.5, 0.12)


def _vase(pen: _Pen) -> None:
    pen.oval(MIDDLE, 0, 0.22, 0.17, 0.22)
    pen.shape(MIDDLE, (-0.06, 0.36), (0.06, 0.36), (0.05, 0.56), (0.1, 0.6), (-0.1, 0.6), (-0.05, 0.56))
    pen.box(PALE, -0.155, 0.19, 0.155, 0.25)


def _ladder(pen: _Pen) -> None:
    for foot in (-0.2, 0.2):
        pen.limb(DARK, 0.042, (foot, 0.02), (foot * 0.25, 0.88))
    for step in range(5):
        y = 0.14 + 0.16 * step
        half = 0.2 - 0.15 * y / 0.86
        pen.limb(PALE, 0.046, (-half, y), (half, y))


def _tower(pen: _Pen) -> None:
    pen.shape(MIDDLE, (-0.16, 0), (0.16, 0), (0.12, 0.72), (-0.12, 0.72))
    pen.box(MIDDLE, -0.17, 0.68, 0.17, 0.78)
    for x in (-0.17, -0.045, 0.08):
        pen.box(MIDDLE, x, 0.77, x + 0.09, 0.86)
    for y in (0.22, 0.48):
        pen.box(PALE, -0.035, y, 0.035, y + 0.12)


def _cactus(pen: _Pen) -> None:
    pen.limb(MIDDLE + 12, 0.13, (0, 0.05), (0, 0.76))
    pen.limb(MIDDLE + 12, 0.09, (0, 0.28), (-0.19, 0.3), (-0.19, 0.52))
    pen.limb(MIDDLE + 12, 0.09, (0, 0.42), (0.18, 0.44), (0.18, 0.64))
    pen.shape(DARK, (-0.15, 0.15), (0.15, 0.15), (0.11, 0), (-0.11, 0))


OBJECTS: dict[str, Callable[[_Pen], None]] = {
    "a round lamp": _lamp,
    "a tall tree": _tree,
    "a small house": _house,
    "a striped ball": _ball,
    "a wooden chair": _chair,
    "a stone arch": _arch,
    "a grey vase": _vase,
    "an open ladder": _ladder,
    "a castle tower": _tower,
    "a potted cactus": _cactus,
}
