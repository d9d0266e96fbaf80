"""The exam that a checkpoint sits: pictures drawn with the captions of held-out images, and every number about them.

What does not depend on the weights is prepared once: the images, their stored vectors, those of the training images with
their latents made small (in files, so that a million of them need no memory), and what real images score by the same measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdit import conditions, data, drawing, heldout, judge, judged_images, mesh, quality, trained
from jaxdit.wishes import Wish

JUDGED = 100  # images of the swap test, as in the gate
PROMPTS, SEEDS = 16, 4  # sentences whose pictures must differ, and how many of each
REFERENCE = 5_000  # real images that the samples are compared with, at most
PAIRS, FEW = 6, 4  # pictures beside their nearest training images, and beside the image of their caption


@dataclass
class Exam:
    """Everything that is the same for all checkpoints.

    Attributes:
      dataset: the data.
      held_out: False where none of the images is held out, and the training images stand in for them.
      prompts: of the n images: id, caption, text, vision, bucket, pixel_hash, mask, latent (only where masked).
      pixels: [n] what the decoder makes of them, small.
      judged: the places of the images of the swap test.
      examples, asked: of `judge`; asked is None and `why` says why where nothing can be exchanged.
      reference, training: the real images that samples are compared with, and those that could be copied.
      usual: what real images score.
      near: {"vectors" or "latents": distances of the n images to their nearest training images}.
      vae, vision, clip: the models; vision and clip may be None.
    """

    dataset: data.Dataset
    held_out: bool
    prompts: list[dict[str, Any]]
    pixels: list[np.ndarray]
    judged: np.ndarray
    examples: list[judge.Example]
    asked: judge.Questions | None
    why: str
    reference: judged_images.Known
    training: judged_images.Known
    usual: dict[str, Any]
    near: dict[str, np.ndarray]
    vae: Any
    vision: Any
    clip: Any


@dataclass
class Seen:
    """Drawn pictures: small pixels, the encoder's vectors [n, width] or None, thumbnails of their latents, latents of some."""

    pixels: list[np.ndarray]
    vectors: np.ndarray | None
    thumbnails: np.ndarray
    latents: np.ndarray


def prepare(
    run: trained.Trained, dataset: data.Dataset, folder: Path, *, images: int, vae: Any, vision: Any, clip: Any
) -> Exam:
    """What all checkpoints of a run are asked.

    Args:
      run: the run's description; its weights are not used.
      dataset: OUT/RES, with the run's share of held-out images.
      folder: where files of the training images' vectors are kept.
      images: how many held-out captions are drawn, at most.
      vae, vision, clip: the models; vision and clip may be None.
    """
    held_out = any(map(len, dataset.held_out.values()))
    rows = dataset.held_out if held_out else dataset.train
    mirrored = run.config.get("flow", {}).get("flip", 0) > 0
    training = judged_images.know(dataset, run, dataset.train, folder / "training", 1 + mirrored, "training")
    reference = (
        judged_images.know(dataset, run, dataset.held_out, folder / "held_out", 1, "held-out") if held_out else training
    )
    places = judged_images.spread(rows, images)
    prompts, pixels, small = [], [], []
    for bucket, row in places:
        record = dataset.records(bucket, [row])[0]
        names = ("text", "vision", "mask", *(["latent"] if record["mask"].size else []))
        words = {name: record[name].decode() for name in ("id", "caption")}
        copies = {name: np.array(record[name]) for name in names}  # the record's own are views of all of it
        prompts.append(words | copies | {"bucket": bucket, "pixel_hash": record["pixel_hash"]})
        latent = record["latent"].astype(np.float32)[None]
        pixels.append(judged_images.small(judged_images.whole(vae.decode(latent)[0], record)))
        small.append(quality.thumbnails(data.normalized(latent, run.dataset))[0])
    judged = np.unique(np.linspace(0, len(prompts) - 1, min(JUDGED, len(prompts))).round().astype(int))
    examples = judged_images.gather(dataset, run, vae, [places[i] for i in judged])
    for example in examples:
        mask = example.record["mask"]
        example.pixels = judged_images.small(judged_images.whole(example.pixels, example.record))
        example.flipped = judged_images.small(judged_images.whole(example.flipped, {"mask": mask[:, ::-1]}))
    asked, why = _questions(examples)
    own = None
    if not held_out:
        own = [np.flatnonzero(training.hashes == prompt["pixel_hash"]) for prompt in prompts]
    vectors = np.stack([prompt["vision"] for prompt in prompts])
    near = {
        "latents": quality.nearest(np.stack(small), training.latents, own)[0],
        "vectors": quality.nearest(vectors, training.vectors, own)[0],
    }
    found = Exam(
        dataset, held_out, prompts, pixels, judged, examples, asked, why, reference, training, {}, near, vae, vision, clip
    )  # fmt: skip
    found.usual = _usual(found)
    return found


def _questions(examples: Sequence[judge.Example]) -> tuple[judge.Questions | None, str]:
    if len(examples) < judge.FEWEST:
        return None, f"{len(examples)} images are too few to exchange captions and vectors; {judge.FEWEST} are needed."
    asked = judge.questions(examples)
    why = judge.cannot(examples, asked)
    return (None, why) if why else (asked, "")


def _usual(exam: Exam) -> dict[str, Any]:
    """What real images score: two halves of them, as many training images as there are samples, pairs, CLIP."""
    real, found = real_vectors(exam), {}
    if len(real) >= quality.FEWEST:
        found["halves"] = quality.compare(real[::2], real[1::2])
        found["apart"] = quality.apart(real)
    if exam.held_out and min(len(real), len(exam.training.places), len(exam.prompts)) >= quality.FEWEST:
        found["training"] = quality.compare(real, _some(exam.training.vectors[:, 0], len(exam.prompts)))
    if exam.clip is not None:
        found["clip"] = float(exam.clip.score(exam.pixels, [prompt["caption"] for prompt in exam.prompts]).mean())
    return found


def real_vectors(exam: Exam) -> np.ndarray:
    """[n, width] stored vectors of the real images, at most 5,000 of them spread evenly."""
    return _some(exam.reference.vectors[:, 0], REFERENCE)


def _some(rows: np.ndarray, count: int) -> np.ndarray:
    count = min(count, len(rows))
    return np.asarray(rows[np.arange(count) * len(rows) // count])


def pictures(exam: Exam) -> int:
    """How many pictures a checkpoint draws."""
    return 2 * len(exam.prompts) + (3 * len(exam.judged) if exam.asked else 0) + len(_repeated(exam))


def _repeated(exam: Exam) -> list[int]:
    """Places of the prompts that are drawn again with other seeds, one entry a picture."""
    count = min(PROMPTS, len(exam.prompts)) if exam.vision is not None else 0
    return [k * len(exam.prompts) // count for k in range(count) for _ in range(SEEDS - 1)]


def sit(exam: Exam, run: trained.Trained, tell: Callable[[int], None]) -> tuple[dict[str, Any], list[tuple[str, list]]]:
    """The numbers of one checkpoint, and rows of captioned pictures: the nearest to training images, then a few of all.

    Args:
      exam: from `prepare`.
      run: the weights.
      tell: called with how many pictures have just been drawn.

    Raises:
      MemoryError: not even one picture fits the device.
    """
    texts = [prompt["text"] for prompt in exam.prompts]
    visions = [prompt["vision"] for prompt in exam.prompts]
    every = list(range(len(texts)))
    seen = {
        "own": draw(exam, run, every, texts, visions, every, tell),
        "alone": draw(exam, run, every, texts, [None] * len(texts), every, tell),
    }
    row: dict[str, Any] = {name: _compared(exam, found) for name, found in seen.items()}
    near = {name: _near(exam, found) for name, found in seen.items()}
    row["memory"] = {
        name: {space: quality.memory(found[0], exam.near[space]) for space, found in spaces.items()}
        for name, spaces in near.items()
    }
    row["diversity"] = _diversity(exam, run, seen["alone"], tell)
    row["exchange"] = _exchange(exam, run, seen, tell)
    row["loss"] = _losses(exam, run)
    if exam.clip is not None:
        captions = [prompt["caption"] for prompt in exam.prompts]
        row["clip"] = {name: float(exam.clip.score(found.pixels, captions).mean()) for name, found in seen.items()}
    return row, [*_pairs(exam, seen, near), *_few(exam, seen)]


def draw(exam: Exam, run: trained.Trained, places, texts, visions, seeds, tell) -> Seen:
    """Pictures for the prompts at `places`, from the given conditions and seeds, as `jaxdit.sample` draws by default."""
    options = run.config["sample"]
    sizes = [tuple(map(int, exam.prompts[place]["bucket"].split("x"))) for place in places]
    weights = (float(options["text_guidance"]), float(options["vision_guidance"]))
    asked = [Wish("", (), (), seed, size, *weights, "", 1.0) for seed, size in zip(seeds, sizes)]
    given = [conditions.Given(text, vision, None) for text, vision in zip(texts, visions)]
    shape = judged_images.common_shape(run)
    judged = {int(place): k for k, place in enumerate(exam.judged)}
    kept = np.zeros((len(judged), *shape, run.dataset["widths"]["latent"]), np.float32)
    pixels: list[Any] = [None] * len(places)
    vectors = small = None
    path = {"steps": options["steps"], "shift": options["shift"], "solver": "adams", "interval": None}
    for batch in drawing.draw(run, asked, given, path, 0):
        latents = np.stack([latent for _, latent in batch])
        for (k, _), latent in zip(batch, latents):
            prompt = exam.prompts[places[k]]
            outside = judged_images.padding(prompt, latent.shape)
            if outside.any():
                latent[outside] = prompt["latent"].astype(np.float32)[outside]
        decoded = [
            judged_images.whole(picture, exam.prompts[places[k]])
            for (k, _), picture in zip(batch, exam.vae.decode(latents))
        ]
        at = [k for k, _ in batch]
        thumbs = quality.thumbnails(data.normalized(latents, run.dataset))
        small = np.zeros((len(places), thumbs.shape[1]), np.float32) if small is None else small
        small[at] = thumbs
        if exam.vision is not None:
            looked = exam.vision.encode(decoded)
            vectors = np.zeros((len(places), looked.shape[1]), np.float32) if vectors is None else vectors
            vectors[at] = looked
        for k, picture, latent in zip(at, decoded, latents):
            pixels[k] = judged_images.small(picture)
            if places[k] in judged:
                kept[judged[places[k]]] = judged_images.compared(latent[None], run, shape)[0]
        tell(len(batch))
    return Seen(pixels, vectors, small, kept)


def _compared(exam: Exam, seen: Seen) -> dict[str, Any] | None:
    real = real_vectors(exam)
    if seen.vectors is None or min(len(real), len(seen.vectors)) < quality.FEWEST:
        return None
    return quality.compare(real, seen.vectors)


def _near(exam: Exam, seen: Seen) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {"latents": quality.nearest(seen.thumbnails, exam.training.latents)}
    if seen.vectors is not None:
        found["vectors"] = quality.nearest(seen.vectors, exam.training.vectors)
    return found


def _diversity(exam: Exam, run: trained.Trained, alone: Seen, tell) -> dict[str, float] | None:
    """How far apart pictures of one sentence with different seeds are, beside different real images."""
    again = _repeated(exam)
    if not again:
        return None
    texts = [exam.prompts[place]["text"] for place in again]
    seeds = [place + len(exam.prompts) * (1 + k % (SEEDS - 1)) for k, place in enumerate(again)]
    more = draw(exam, run, again, texts, [None] * len(again), seeds, tell).vectors
    spread = [
        quality.apart(np.concatenate([alone.vectors[place : place + 1], more[[k for k, p in enumerate(again) if p == place]]]))
        for place in dict.fromkeys(again)
    ]  # fmt: skip
    return {"one_prompt": float(np.mean(spread)), "all_prompts": quality.apart(alone.vectors)}


def _exchange(exam: Exam, run: trained.Trained, seen: Mapping[str, Seen], tell) -> dict[str, Any]:
    """The gate's swap test under the rule for a person's own photographs, on these images."""
    if exam.asked is None:
        return {"reason": exam.why}
    judged, asked = [int(place) for place in exam.judged], exam.asked
    texts = [example.record["text"] for example in exam.examples]
    visions = [example.record["vision"] for example in exam.examples]
    drawn = {}
    for name, found in (("own", seen["own"]), ("text_only", seen["alone"])):
        vectors = None if found.vectors is None else found.vectors[judged]
        drawn[name] = judge.Drawn([found.pixels[i] for i in judged], found.latents, vectors)
    for name, text, vision in (
        ("vision", texts, [visions[i] for i in asked.pairs]),
        ("text", asked.exchanged, visions),
        ("control", texts, [visions[i] for i in asked.thirds]),
    ):
        found = draw(exam, run, judged, text, vision, judged, tell)
        drawn[name] = judge.Drawn(found.pixels, found.latents, found.vectors)
    numbers, _, _ = judge.measure(exam.examples, asked, drawn)
    checks = judge.checks(numbers, None, judge.OWN, encoder=exam.vision is not None)
    return {
        "by": asked.by,
        "effects": {name: checks[name] for name in judge.EFFECTS if name in checks},
        "leaks": numbers["leaks"],
        **{name: numbers[name] for name in ("text_only_latent", "text_only_ssim")},
    }


def _losses(exam: Exam, run: trained.Trained) -> dict[str, float]:
    """{"held_out/text_vision": ...}: the loss of both splits by what the model is given, as the training takes it."""
    flow = run.config["flow"]
    compiled = jax.jit(partial(heldout.losses, run.graph, dict(flow)))
    devices = jax.device_count()
    patch, shapes = run.config["model"]["patch"], [info["latent"] for info in exam.dataset.info["buckets"].values()]
    tokens = max(height * width // patch**2 for height, width, _ in shapes)
    size = max(1, min(64, drawing.TOKENS.get(jax.default_backend(), drawing.TOKENS["gpu"]) // tokens)) * devices
    divided, everywhere = (
        (lambda value: value, lambda value: value)
        if run.devices is None
        else (
            partial(jax.device_put, device=mesh.over_batch(run.devices)),
            partial(jax.device_put, device=mesh.replicated(run.devices)),
        )
    )
    while True:
        try:
            found = heldout.evaluate(
                compiled,
                {"ema": run.params},
                exam.dataset,
                batch_size=size,
                images=len(exam.prompts),
                place=divided,
                everywhere=everywhere,
                stopped=lambda: False,
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if size == devices:
                raise MemoryError("the loss of one image does not fit into the device's memory") from error
            size = max(size // 2 // devices, 1) * devices
            continue
        return {name.removeprefix("eval/").replace("/ema", ""): value for name, value in found.items()}


def _pairs(exam: Exam, seen: Mapping[str, Seen], near) -> list[tuple[str, list]]:
    """The drawn pictures that are nearest to a training image for how far pictures usually are, each with that image."""
    ranked = []
    for name, spaces in near.items():
        distances, places = spaces["latents"]
        ranked += [(value, name, i, int(places[i, 0])) for i, value in enumerate(quality.closeness(distances))]
    rows = []
    for value, name, i, place in sorted(ranked)[:PAIRS]:
        bucket, number = exam.training.places[place]
        record = exam.dataset.records(bucket, [number])[0]
        views = exam.training.latents[place]
        view = int(np.argmin(((views - seen[name].thumbnails[i]) ** 2).sum(1)))
        latent = record[("latent", "latent_flip")[view]].astype(np.float32)
        picture = judged_images.small(exam.vae.decode(latent[None])[0])
        prompt = exam.prompts[i]
        words = f"{value:.2f} of the usual distance from {record['id'].decode()}{', mirrored' if view else ''}"
        rows.append(
            (
                f"{words}; drawn for {prompt['id']}: {prompt['caption']}",
                [(NAMES[name], seen[name].pixels[i]), ("nearest training image", picture), (real_name(exam), exam.pixels[i])],
            )
        )  # fmt: skip
    return rows


def _few(exam: Exam, seen: Mapping[str, Seen]) -> list[tuple[str, list]]:
    """A few pictures, spread evenly, beside the image whose caption they were drawn with."""
    count = min(FEW, len(exam.prompts))
    return [
        (
            exam.prompts[i]["caption"],
            [(real_name(exam), exam.pixels[i]), *((NAMES[name], found.pixels[i]) for name, found in seen.items())],
        )
        for i in (k * len(exam.prompts) // count for k in range(count))
    ]


NAMES = {"own": "caption and vector", "alone": "caption alone"}


def real_name(exam: Exam) -> str:
    return "the held-out image" if exam.held_out else "the training image"
