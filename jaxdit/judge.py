"""The gate's checks as functions of pictures: what is asked of the model, what is measured, and what must be reached.

Every share counts ratios below 1: distance to what was wanted over the distance to what must not come. On the generated
photographs, whose captions are unique and whose light no caption names, the shares decide. A person's own photographs lie
nearer to each other: there an exchange passes when the 95% interval of its effect excludes zero and the effect is larger
than that of shuffled controls. A model that answers every exchange with the same mean picture moves towards any goal far
away, and an interval alone takes that for an effect: light is measured against pictures drawn with a third image's vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdit import likeness

GENERATED, OWN = "generated photographs", "own photographs"
# The thresholds, all of them; they are part of the record. At most: memory_margin; at least: the others.
THRESHOLDS = {
    "memory_latent": 0.95,
    "memory_ssim": 0.95,
    "memory_margin": 0.5,
    "text_only_latent": 0.80,
    "text_only_ssim": 0.80,
    "vision_composition": 0.80,
    "vision_light": 0.80,
    "vision_encoder": 0.80,
    "text_composition": 0.80,
}
AT_MOST = ("memory_margin",)
MEMORY = tuple(name for name in THRESHOLDS if name.startswith(("memory", "text_only")))
EFFECTS = ("light_by_vector", "encoder_by_vector", "composition_kept", "composition_by_caption")
WORDS = {
    "memory_latent": "caption and vector: its own image is the nearest of all, in latents",
    "memory_ssim": "caption and vector: its own image is the nearest of all, in SSIM",
    "memory_margin": "caption and vector: distance to its own over that to the next, median",
    "text_only_latent": "caption alone: its own composition is the nearest of all, in latents without their light",
    "text_only_ssim": "caption alone: its own composition is the nearest of all, in SSIM without light",
    "vision_composition": "another image's vector: the composition stays the caption's",
    "vision_light": "another image's vector: light and colour become that image's",
    "vision_encoder": "another image's vector: the vision encoder sees that image's vector",
    "text_composition": "exchanged caption: the composition follows it",
    "light_by_vector": "how far light moves to that of the exchanged vector's image",
    "encoder_by_vector": "how far the encoder's view moves to the exchanged vector",
    "composition_kept": "how far composition stays the caption's with another vector (0: half the way to that image)",
    "composition_by_caption": "how far composition moves to that of the exchanged caption",
    "conditioning": "projections of the conditions that have not moved, or have no gradient",
}
# Share of the way: a model trained with shuffled vectors moved by 0.007, with an interval above 0.
SMALLEST_EFFECT = 0.1
FEWEST = 10  # images, or pairs, that a share is worth something of
FEWEST_SIDES = 20  # captions that name a side; with fewer, whole captions are exchanged
NOTICEABLE = 0.02  # difference of light that a person sees, in OKLab (Ottosson 2020)


@dataclass
class Example:
    """One image of the gate: its record, and as the decoder gives them back its pixels and those of its mirror image.

    pixels, flipped: [height, width, 3] uint8. latent: [h, w, channels] float32 normalised, of the same shape for all.
    """

    record: Mapping[str, Any]
    bucket: str
    pixels: np.ndarray
    flipped: np.ndarray
    latent: np.ndarray


@dataclass
class Drawn:
    """What the model drew for each example: pixels, latents as in `Example`, and the vision encoder's vectors or None."""

    pixels: list[np.ndarray]
    latents: np.ndarray
    vectors: np.ndarray | None = None


@dataclass(frozen=True)
class Questions:
    """What is asked of the model beside an image's own caption and vector.

    Attributes:
      pairs: [n] whose vector an image gets instead of its own, far away in light; judged on the images in `lit`.
      thirds: [n] whose vector it gets in the control.
      exchanged: [n] captions (token sequences) that an image gets instead of its own; judged on the images in `said`.
      goals: [n] the pictures whose composition the exchanged captions ask for.
      partners: [n] whose caption it is; -1: its own with left and right exchanged.
      by: the exchange in words.
      lit, said: places of the images that are judged.
    """

    pairs: np.ndarray
    thirds: np.ndarray
    lit: np.ndarray
    exchanged: list[np.ndarray]
    goals: list[np.ndarray]
    partners: np.ndarray
    said: np.ndarray
    by: str


def questions(examples: Sequence[Example]) -> Questions:
    """The exchanges that these images allow; `cannot` says where they are too few."""
    lights = np.stack([likeness.light(example.pixels) for example in examples])
    captions = _groups([example.record["caption"] for example in examples])
    vectors = np.stack([example.record["vision"] for example in examples])
    # Not by `likeness.distances`, which rounds what is equal to more than that where vectors are long.
    same = np.stack([np.abs(vectors - vector).max(1) <= 1e-6 for vector in vectors])
    pairs = likeness.far_apart(lights, same)
    taken = np.zeros((len(examples),) * 2, bool)
    taken[np.arange(len(examples)), pairs] = True
    nothing = np.random.default_rng(0).normal(size=(len(examples), 1))
    thirds = likeness.far_apart(nothing, taken)  # far in nothing: shuffled
    lit = np.flatnonzero(
        (np.linalg.norm(lights - lights[pairs], axis=1) >= NOTICEABLE)
        & (np.abs(vectors - vectors[pairs]).max(1) > 1e-6)
    )  # fmt: skip
    sided = np.array([len(example.record["text_flip"]) > 0 for example in examples])
    if sided.sum() >= min(FEWEST_SIDES, len(examples)):
        partners, said = np.full(len(examples), -1), np.flatnonzero(sided)
        exchanged = [
            example.record["text_flip"] if has else example.record["text"] for example, has in zip(examples, sided)
        ]
        goals = [example.flipped for example in examples]
        by = f"left and right exchanged in {len(said)} captions"
    else:
        compositions = np.stack([likeness.composition(example.pixels) for example in examples])
        partners = likeness.far_apart(compositions, captions[:, None] == captions)
        said = np.flatnonzero(captions != captions[partners])
        exchanged = [examples[k].record["text"] for k in partners]
        goals = [examples[k].pixels for k in partners]
        by = (
            f"whole captions exchanged between {len(said)} images, because only {sided.sum()} captions name a side that can be "
            "exchanged"
        )
    return Questions(pairs, thirds, lit, exchanged, goals, partners, said, by)


def cannot(examples: Sequence[Example], asked: Questions | None) -> str:
    """Why these images cannot be judged, as a sentence; "" where they can."""
    if len(examples) < FEWEST or asked is None:
        return f"there are {len(examples)} images to train on; the gate needs at least {FEWEST}, better 100."
    if len(asked.lit) < FEWEST:
        return (
            f"only {len(asked.lit)} images have a partner in clearly different light with another vector, and {FEWEST} are "
            "needed: whether the model hears the vector cannot be seen. Choose images of different light (encode.subset does)."
        )
    if len(asked.said) < FEWEST:
        return (
            f"only {len(asked.said)} images have a caption to exchange, and {FEWEST} are needed: whether the model hears the "
            "caption cannot be seen. Choose images with different captions (encode.subset does)."
        )
    return ""


def measure(
    examples: Sequence[Example], asked: Questions, drawn: Mapping[str, Drawn]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All numbers of one set of weights.

    Args:
      examples: the n images.
      asked: `questions` of them.
      drawn: "own" (own caption and vector), "text_only", "vision" (the pair's vector), "text" (the exchanged caption), and for
        a person's own photographs "control" (a third image's vector).

    Returns:
      (numbers: shares, memory_margin, psnr, psnr_next, leaks [] each, and effects {name: {mean, low, high, control}};
      ratios: [n] of each share, below 1 passes, nan where an image is not judged;
      nexts: [n] the place of the nearest other image, of each check of memory).
    """
    originals = [example.pixels for example in examples]
    latents = np.stack([example.latent for example in examples])
    copies = _groups([example.record["pixel_hash"] for example in examples])
    captions = _groups([example.record["caption"] for example in examples])
    ratios: dict[str, np.ndarray] = {}
    nexts: dict[str, np.ndarray] = {}

    def memory(name: str, distance: np.ndarray, groups: np.ndarray) -> None:
        ratios[name], nexts[name] = likeness.to_own(distance, groups)

    own, alone = drawn["own"], drawn["text_only"]
    memory("memory_latent", likeness.distances(own.latents, latents), copies)
    memory("memory_ssim", _unlike(own.pixels, originals, light=True), copies)
    memory("text_only_latent", likeness.distances(_content(alone.latents), _content(latents)), captions)
    memory("text_only_ssim", _unlike(alone.pixels, originals, light=False), captions)

    compose, lit = _stack(likeness.composition), _stack(likeness.light)
    forms, lights, pairs = compose(originals), lit(originals), asked.pairs
    goals = compose(asked.goals)
    seen = {name: (compose(drawn[name].pixels), lit(drawn[name].pixels)) for name in ("own", "vision", "text")}
    third = lit(drawn["control"].pixels) if "control" in drawn else None
    ratios["vision_composition"] = likeness.ratio(seen["vision"][0], forms, forms[pairs])
    ratios["vision_light"] = likeness.ratio(seen["vision"][1], lights[pairs], lights)
    ratios["text_composition"] = likeness.ratio(seen["text"][0], goals, forms)
    middle = (forms + forms[pairs]) / 2
    effects = {
        "light_by_vector": _effect(
            asked.lit, seen["own"][1], seen["vision"][1], lights, lights[pairs], third, shuffled=False
        ),
        "composition_kept": _effect(asked.lit, middle, seen["vision"][0], middle, forms),
        "composition_by_caption": _effect(asked.said, seen["own"][0], seen["text"][0], forms, goals),
    }
    if drawn["vision"].vectors is not None:
        vectors = np.stack([example.record["vision"] for example in examples]).astype(np.float64)
        ratios["vision_encoder"] = likeness.ratio(drawn["vision"].vectors, vectors[pairs], vectors)
        third = drawn["control"].vectors if "control" in drawn else None
        effects["encoder_by_vector"] = _effect(
            asked.lit, own.vectors, drawn["vision"].vectors, vectors, vectors[pairs], third, shuffled=False
        )

    for name, values in ratios.items():
        values[np.isnan(values)] = np.inf  # what was drawn is no number: failed, which is not the same as not judged
        if not name.startswith(("memory", "text_only")):
            judged = asked.said if name.startswith("text") else asked.lit
            values[np.setdiff1d(np.arange(len(examples)), judged)] = np.nan
    numbers: dict[str, Any] = {name: _share(values) for name, values in ratios.items()}
    numbers["memory_margin"] = float(np.median(ratios["memory_latent"]))
    numbers["psnr"] = float(np.mean([likeness.psnr(a, b) for a, b in zip(own.pixels, originals)]))
    numbers["psnr_next"] = _psnr_of_the_next(originals, copies)
    numbers["effects"] = effects
    leak = likeness.moved(seen["own"][0], seen["vision"][0], forms, forms[pairs])
    numbers["leaks"] = {
        "composition_by_vector": float(leak[asked.lit].mean()),
        "light_by_caption": float(
            np.linalg.norm(seen["text"][1] - seen["own"][1], axis=1)[asked.said].mean()
            / np.linalg.norm(lights - lights[pairs], axis=1)[asked.lit].mean()
        ),
    }
    return numbers, ratios, nexts


def checks(numbers: Mapping[str, Any], dead: Sequence[str] | None, rule: str, *, encoder: bool) -> dict[str, dict]:
    """Every check that this kind of data is judged by: {name: {value, needed, passed}}; one that did not run has failed.

    Args:
      numbers: of `measure`.
      dead: projections that have not moved or have no gradient; None: not looked at.
      rule: GENERATED or OWN.
      encoder: the vision encoder is known; vectors that a person gave come from nobody knows where.
    """
    found = {}
    for name in MEMORY if rule == OWN else THRESHOLDS:
        value, needed = numbers.get(name), THRESHOLDS[name]
        at_most = name in AT_MOST
        passed = value is not None and bool(value <= needed if at_most else value >= needed)
        found[name] = {"value": value, "needed": f"{'at most' if at_most else 'at least'} {needed:g}", "passed": passed}
    for name in EFFECTS:
        if rule == GENERATED and name not in ("light_by_vector", "composition_by_caption"):
            continue
        effect = numbers.get("effects", {}).get(name)
        needed = f"interval above 0, mean at least {SMALLEST_EFFECT:g}"
        passed = effect is not None and effect["low"] > 0 and effect["mean"] >= SMALLEST_EFFECT
        if rule == OWN:
            beyond = passed and effect["control"] is not None and effect["mean"] > effect["control"]
            passed, needed = beyond, needed + " and above the controls"
        found[name] = {"value": effect, "needed": needed, "passed": bool(passed)}
    if not encoder:
        found = {name: check for name, check in found.items() if name not in ("vision_encoder", "encoder_by_vector")}
    found["conditioning"] = {
        "value": None if dead is None else list(dead), "needed": "none", "passed": dead is not None and not dead,
    }  # fmt: skip
    return found


def _groups(keys: Sequence[Any]) -> np.ndarray:
    return np.unique(
        np.array([key if isinstance(key, bytes) else str(key).encode() for key in keys]), return_inverse=True
    )[1]


def _stack(feature):
    return lambda pictures: np.stack([feature(pixels) for pixels in pictures])


def _content(latents: np.ndarray) -> np.ndarray:
    return np.stack([likeness.content(latent) for latent in latents])


def _unlike(queries: Sequence[np.ndarray], keys: Sequence[np.ndarray], *, light: bool) -> np.ndarray:
    """[queries, keys] 1 - SSIM."""
    wanted = np.stack([likeness.structure(pixels, light=light) for pixels in keys])
    return np.stack([1 - likeness.ssim(likeness.structure(pixels, light=light), wanted) for pixels in queries])


def _share(ratios: np.ndarray) -> float | None:
    judged = ratios[~np.isnan(ratios)]
    return float((judged < 1).mean()) if len(judged) else None


def _effect(judged, before, after, start, goal, third=None, shuffled=True) -> dict[str, float | None]:
    """The mean move with its interval, and what the mean must exceed to be more than that of the controls.

    Controls are the pictures drawn with a third image's vector where they are given; else goals are shuffled among images,
    which says nothing of goals that were chosen far away (shuffled=False).
    """
    before, after, start, goal = (values[judged] for values in (before, after, start, goal))
    moves = likeness.moved(before, after, start, goal)
    mean, low, high = likeness.interval(moves)
    control = likeness.control(before, after, start, goal) if shuffled else None
    if third is not None:
        control = mean - likeness.interval(moves - likeness.moved(before, third[judged], start, goal))[1]
    return {"mean": mean, "low": low, "high": high, "control": control}


def _psnr_of_the_next(originals: Sequence[np.ndarray], copies: np.ndarray) -> float:
    """Mean PSNR that the most alike other image scores, of those of the same shape: what memory must clearly exceed."""
    best = []
    for i, pixels in enumerate(originals):
        others = [
            likeness.psnr(pixels, other)
            for k, other in enumerate(originals)
            if copies[k] != copies[i] and other.shape == pixels.shape
        ]
        if others:
            best.append(max(others))
    return float(np.mean(best)) if best else float("nan")
