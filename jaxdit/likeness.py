"""How alike pictures are in composition and in light, apart from what the model was trained with, and how sure a mean is.

Composition is what stands where: luminance and its edges, freed of brightness and contrast. Light is the mean and the spread
of each channel of OKLab, which know no place. Latents are taken apart in the same way: the mean and deviation of a channel
over the picture are its style, the rest its content (Huang and Belongie 2017, "AdaIN").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIDE = 32  # of a picture whose composition is compared
SSIM_SIDE = 64
RESAMPLES, CONTROLS = 2_000, 500
FLOOR = 0.05  # of the median distance between two goals: nearer ones would divide by nothing


def composition(pixels: np.ndarray) -> np.ndarray:
    """[2048] standardised luminance at 32 x 32, and its standardised edges, of a [height, width, 3] uint8 picture."""
    from skimage.filters import sobel

    grey = _grey(pixels, SIDE)
    return np.concatenate([_standardised(grey).ravel(), _standardised(sobel(grey)).ravel()])


def light(pixels: np.ndarray) -> np.ndarray:
    """[6] means and standard deviations of lightness, green-red and blue-yellow of a [height, width, 3] uint8 picture."""
    from encode.demo_encoders import oklab

    colours = oklab(pixels.reshape(-1, 3))
    return np.concatenate([colours.mean(0), colours.std(0)])


def structure(pixels: np.ndarray, *, light: bool) -> np.ndarray:
    """[64, 64] luminance in [0, 1] for `ssim`; without light all pictures have the same brightness and contrast."""
    grey = _grey(pixels, SSIM_SIDE)
    return grey if light else np.clip(0.5 + 0.2 * _standardised(grey), 0, 1)


def ssim(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[keys] structural similarity (Wang et al. 2004, windows of 7) of a [64, 64] picture to [keys, 64, 64]."""
    from skimage.metrics import structural_similarity

    _, maps = structural_similarity(
        np.broadcast_to(query, keys.shape), keys, channel_axis=0, data_range=1.0, full=True
    )  # fmt: skip
    return maps[:, 3:-3, 3:-3].mean((1, 2))


def content(latent: np.ndarray) -> np.ndarray:
    """[height, width, channels] latent without the mean and deviation of each channel over the picture."""
    return (latent - latent.mean((0, 1))) / np.maximum(latent.std((0, 1)), 1e-3)


def distances(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[queries, keys] Euclidean distances between rows."""
    queries, keys = (values.reshape(len(values), -1).astype(np.float64) for values in (queries, keys))
    squares = (queries**2).sum(1)[:, None] + (keys**2).sum(1) - 2 * queries @ keys.T
    return np.sqrt(np.maximum(squares, 0))


def to_own(distance: np.ndarray, groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How much nearer what was drawn for an image is to it than to any other.

    Args:
      distance: [n, n], of what was drawn for each image to every image.
      groups: [n]; images of one group cannot be told apart by what was asked for (exact copies; equal captions).

    Returns:
      ([n] distance to one's own over the distance to the next: below 1, one's own is the nearest of all; [n] the next's place).
    """
    groups = np.asarray(groups)
    same = groups[:, None] == groups
    other = np.where(same, np.inf, distance)
    return np.where(same, distance, np.inf).min(1) / np.maximum(other.min(1), 1e-9), other.argmin(1)


def ratio(drawn: np.ndarray, wanted: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n] distance of each row of `drawn` to that of `wanted` over that to `other`: below 1 is nearer to the wanted one."""
    far = np.linalg.norm(drawn - other, axis=1)
    return np.linalg.norm(drawn - wanted, axis=1) / np.maximum(far, 1e-9)


def moved(before: np.ndarray, after: np.ndarray, start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """[n] how much of the way from start to goal lies between before and after: 0 nothing, 1 all of it."""
    way = goal - start
    length = (way**2).sum(1)
    return ((after - before) * way).sum(1) / np.maximum(length, FLOOR * np.median(length) + 1e-12)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95% interval by the percentile bootstrap (Efron 1979), the same at every call.

    Of ten values that of the bootstrap alone holds nine means in ten: it takes the spread that was found for the true one. So
    it is widened as Student's t asks for (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", sec. 4).
    """
    from scipy import stats

    mean, count = float(np.mean(values)), len(values)
    wider = stats.t.ppf(0.975, max(count - 1, 1)) / stats.norm.ppf(0.975) * (count / max(count - 1, 1)) ** 0.5
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval  # fmt: skip
    return mean, mean + wider * float(found.low - mean), mean + wider * float(found.high - mean)


def control(before: np.ndarray, after: np.ndarray, start: np.ndarray, goal: np.ndarray) -> float:
    """What 95 of 100 shuffled controls stay below: the mean of `moved` where each picture's goal is another one's."""
    rng = np.random.default_rng(0)
    means = [moved(before, after, start, goal[rng.permutation(len(goal))]).mean() for _ in range(CONTROLS)]
    return float(np.quantile(means, 0.95))


def far_apart(features: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """[n] partner of each row, every row once, so that the partners are as far apart as they can be together.

    Args:
      features: [n, width].
      forbidden: [n, n] bool, pairs not to be made; the diagonal need not be set.
    """
    from scipy.optimize import linear_sum_assignment

    gain = distances(features, features)
    gain[forbidden | np.eye(len(gain), dtype=bool)] = -1e6
    return linear_sum_assignment(gain, maximize=True)[1]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, in dB; 100 where they are equal."""
    return float(-10 * np.log10(np.mean((a.astype(np.float32) - b) ** 2) / 255**2 + 1e-10))


def _grey(pixels: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    small = Image.fromarray(pixels).convert("L").resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 4e-3)
