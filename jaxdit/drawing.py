"""Many wishes through the model: those of one shape in batches that fit, whatever the memory turns out to hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxdit import sampler, trained
from jaxdit.wishes import Wish

# Image tokens that one device is given at once, those of guidance's other conditions included. On two cores the nano model moves
# 1.60, 1.67, 1.63 and 1.48 pictures of 256 pixels by a guided step in a second of processor time with 768, 1,536, 2,304 and
# 6,144 tokens: a processor gains nothing from more, and takes 20 KB a token (the full model 55 to 130), at 1024 pixels ten times
# that for attention's scores; too much is not refused there, it ends the process. The number for a card is chosen, not
# measured: a model as wide as ours is at its peak with some thousand rows a product, and where it does not fit, halves are tried.
TOKENS = {"cpu": 2048, "gpu": 32768}


def guidance(text: float, vision: float, texts: Sequence, visions: Sequence) -> tuple[float, float]:
    """The two weights, made equal or one where a condition is absent everywhere: the same velocity from fewer evaluations."""
    if all(vision_vector is None for vision_vector in visions):
        vision = 1.0
    if all(tokens is None for tokens in texts):
        text = vision
    return text, vision


def draw(
    run: trained.Trained,
    asked: Sequence[Wish],
    given: Sequence[Any],
    options: Mapping[str, Any],
    most: int,
    watch: Callable[[list[int], int, int, Callable[[], np.ndarray]], None] | None = None,
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Latents of all wishes, those of one shape and one kind of guidance in batches that fit.

    Args:
      run: the model.
      asked, given: the wishes and their conditions (`conditions.Given`).
      options: steps, shift, solver, interval of all of them.
      most: pictures in a batch; 0: what fills the device.
      watch: as `trained.generate`'s, with the batch's places in `asked` before the others.

    Yields:
      A batch's [(place in `asked`, raw latent)].

    Raises:
      MemoryError: not even one picture fits, one condition at a time.
    """
    patch, devices = run.config["model"]["patch"], jax.device_count()
    room = TOKENS.get(jax.default_backend(), TOKENS["gpu"])
    weights = [guidance(w.text, w.vision, [g.text], [g.vision]) for w, g in zip(asked, given)]
    for ((width, height), terms, start), places in _alike(asked, given, weights).items():
        tokens = (width // 8 // patch) * (height // 8 // patch)
        together, size = tokens * len(terms) <= room, 0
        fitting = most or max(1, room // (tokens * (len(terms) if together else 1))) * devices
        while places:
            size = size or math.ceil(len(places) / math.ceil(len(places) / fitting))  # equal parts: one program
            part = places[:size]
            how = {"strength": start or 1.0, "together": together, "watch": watch and partial(watch, part), **options}
            try:
                latents = _latents(run, asked, given, weights, part + part[:1] * (size - len(part)), how)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                if size > 1:
                    fitting = (size + 1) // 2
                    print(f"Out of memory with {size} pictures of {width}x{height} at once; {fitting} are tried.")
                    size = 0
                elif together and len(terms) > 1:
                    together = False
                    print(f"Out of memory; the {len(terms)} conditions of guidance are evaluated one after the other.")
                else:
                    raise MemoryError(
                        f"one picture of {width}x{height} does not fit into the device's memory"
                    ) from error
                continue
            places = places[size:]
            yield list(zip(part, latents))


def _alike(asked, given, weights) -> dict[Any, list[int]]:
    """{(size, conditions to evaluate, strength of a start): places}: what can go through one program."""
    groups: dict[Any, list[int]] = {}
    for place, (wish, found) in enumerate(zip(asked, given)):
        terms = sampler.needed_terms(sampler.guidance_weights(*weights[place]))
        start = wish.strength if found.init is not None else None
        groups.setdefault((wish.size, terms, start), []).append(place)
    return groups


def _latents(run: trained.Trained, asked, given, weights, rows: Sequence[int], how: Mapping[str, Any]) -> np.ndarray:
    """Raw latents of the wishes at `rows`, all of one shape."""
    width, height = asked[rows[0]].size
    init = None if given[rows[0]].init is None else np.stack([given[k].init for k in rows])
    return trained.generate(
        run,
        trained.conditions_of([given[k].text for k in rows], [given[k].vision for k in rows], run),
        (height // 8, width // 8, run.dataset["widths"]["latent"]),
        [0] * len(rows),
        seed=[asked[k].seed for k in rows],
        text=[weights[k][0] for k in rows],
        vision=[weights[k][1] for k in rows],
        init=init,
        **how,
    )
