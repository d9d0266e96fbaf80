"""What the page about a data set reads back from the finished shards: pictures decoded again, histograms of the latents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from encode import charts, facts, images, records
from encode.page import changes, fold, many, number, own, percent, picture, text

SAMPLES, OPEN = 20, 6  # pictures decoded back; those shown before one unfolds the rest
THUMBNAIL = 256  # pixels of a sample
LATENTS = 300  # records that the histograms are drawn from, a resolution


def samples(context: Any, jobs: Sequence, parts: Sequence[Mapping], resolution: int) -> str:
    """Pictures drawn by (seed, id), decoded from the smallest resolution."""
    places = _places(context, jobs, parts, resolution)
    names = facts.drawn(places, context.config.seed, SAMPLES, "sample")
    originals = context.thumbnails([context.items[name].path for name in names], THUMBNAIL)
    cards = []
    for name, original, record in zip(names, originals, _records(context, places, names, resolution)):
        latents = np.stack([record["latent"], record["latent_flip"]]).astype(np.float32)
        decoded, mirrored = context.encoders.vae.decode(latents)
        caption, flip = (_string(record[field]) for field in ("caption", "caption_flip"))
        mask = np.asarray(record["mask"])
        pair = (decoded, mirrored if flip else None)
        shown = [None if value is None else images.thumbnail(_unpadded(value, mask), THUMBNAIL) for value in pair]
        cards.append(_sample(name, original, shown, caption, flip))
    first = f'<div class="samples">{"".join(cards[:OPEN])}</div>'
    rest = f'<div class="samples">{"".join(cards[OPEN:])}</div>'
    return first + (fold(f"{len(cards) - OPEN} more", rest) if len(cards) > OPEN else "")


def channels(context: Any, jobs: Sequence, parts: Sequence[Mapping], datasets: Mapping) -> str:
    """Small histograms of every channel at every resolution, the largest first."""
    blocks = []
    for size in sorted(datasets, reverse=True):
        mean, std = datasets[size]["latent_mean"], datasets[size]["latent_std"]
        places = _places(context, jobs, parts, size)
        names = facts.drawn(places, context.config.seed, LATENTS, "latent")
        found = facts.latents(_records(context, places, names, size), mean, std)
        cells = "".join(
            f"<figure>{charts.channel(found.counts[channel], found.total, facts.SPREAD)}<figcaption><b>{channel}</b> "
            f'<span class="tabular">{centre:+.3f} ± {deviation:.3f}<br>{percent(found.beyond[channel] / found.total)} '
            "beyond 3σ</span></figcaption></figure>"
            for channel, (centre, deviation) in enumerate(zip(mean, std))
        )
        words = (
            f"Drawn from {number(found.total)} values a channel, of {many(found.pictures, 'latent')}; mean and deviation are "
            f"of all {number(datasets[size]['latent_count'])}, mirror images included."
        )
        blocks.append((size, f'<p class="soft">{words}</p><div class="channels">{cells}</div>'))
    first = f"<h3>At {blocks[0][0]}</h3>{blocks[0][1]}"
    return first + "".join(fold(f"At {size}", block) for size, block in blocks[1:])


class ShardDamaged(Exception):
    """A record of a finished shard cannot be read."""


def _places(context: Any, jobs: Sequence, parts: Sequence[Mapping], resolution: int) -> dict[str, tuple[str, int]]:
    """{picture: (bucket, its place among the bucket's records)} at one resolution."""
    places: dict[str, tuple[str, int]] = {}
    counted: Counter = Counter()
    for job, part in zip(jobs, parts):
        bucket = context.bucket(job.shape, resolution)
        for row in part["records"]:
            if resolution in row[4]:
                places[row[0]] = (bucket, counted[bucket])
                counted[bucket] += 1
    return places


def _records(context: Any, places: Mapping[str, tuple[str, int]], names: Sequence[str], resolution: int) -> Iterator:
    opened = {bucket: records.open_bucket(context.root(resolution), bucket) for bucket, _ in map(places.get, names)}
    for name in names:
        bucket, place = places[name]
        try:
            record = opened[bucket][place]
        except RuntimeError as error:  # as ArrayRecord says it
            raise ShardDamaged(str(error)) from error
        yield record


def _unpadded(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if not mask.size:
        return pixels
    rows, columns = (np.flatnonzero(mask.max(axis)) for axis in (1, 0))
    return pixels[8 * rows[0] : 8 * rows[-1] + 8, 8 * columns[0] : 8 * columns[-1] + 8]


def _string(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _sample(name: str, original: bytes | None, shown: Sequence[bytes | None], caption: str, flip: str) -> str:
    plain, changed = changes(caption, flip) if flip else (text(caption), "")
    mirror = picture(shown[1]) if flip else '<span class="none">never<br>flipped</span>'
    three = "".join(
        f"<figure><figcaption>{words}</figcaption>{inner}</figure>"
        for words, inner in (("original", picture(original)), ("decoded", picture(shown[0])), ("mirrored", mirror))
    )
    second = f"<p><bdi>{changed}</bdi></p>" if flip and flip != caption else ""
    same = '<p class="soft">Mirrored, the caption is the same.</p>' if flip == caption else ""
    return (
        f'<div class="sample"><div class="three">{three}</div><p><bdi>{plain}</bdi></p>{second}{same}'
        f'<div class="name">{own(name)}</div></div>'
    )
