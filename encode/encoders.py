"""VAE, text and vision encoders behind three small protocols; the embedded demo ones need no weights and no PyTorch.

`load_vae`, `load_text` and `load_vision` take a section of the configuration (name, path, dtype, ...) and give an object
with a JSON-able `fingerprint` of everything that decides its output; encoded data carry it. The real models are in
torch_encoders.py, imported only when one is named: PyTorch takes seconds. `device` is config.device; demo ones ignore it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from encode import records
from encode.demo_encoders import DemoText, DemoVAE, DemoVision, Square
from encode.prepare import Resizing
from encode.records import InputError

log = logging.getLogger(__name__)


class VAE(Protocol):
    """Pixels to latents at an eighth of their sides, and back."""

    channels: int
    fingerprint: dict[str, Any]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """[b, h, w, 3] uint8 sRGB -> [b, h/8, w/8, channels] float32: raw, neither scaled nor shifted."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """[b, h, w, channels] float32 raw latents -> [b, 8h, 8w, 3] uint8 sRGB."""


class Text(Protocol):
    """Captions to token sequences."""

    width: int
    max_tokens: int
    fingerprint: dict[str, Any]

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """One [tokens, width] float32 a caption: valid tokens only, at least one, at most max_tokens."""

    def count_tokens(self, caption: str) -> int:
        """Tokens of the whole caption; more than max_tokens means that it is cut."""

    def unknown(self, caption: str) -> float:
        """Share of a caption's tokens that stand for whatever the model has no word for."""


class Vision(Protocol):
    """Whole pictures to one vector each."""

    width: int
    fingerprint: dict[str, Any]
    resizing: Resizing | Square  # the size at which it sees a picture

    def encode(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """[height, width, 3] uint8 sRGB pictures of any sizes, upright -> [n, width] float32, raw."""

    def encode_resized(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The same of pictures that went through `resizing` already."""


def load_all(config: Any) -> tuple[VAE, Text, Vision | None]:
    """The three encoders of a configuration, and one line about where they run; precomputed vectors need no vision."""
    device = config.get("device", "auto")
    vae, text = load_vae(config.vae, device), load_text(config.text, device)
    vision = None if config.vision.precomputed else load_vision(config.vision, device)
    if line := running([vae, text, vision]):
        log.info(line)
    return vae, text, vision


def running(encoders: Sequence[Any]) -> str:
    """Which model runs where and in which dtype, as one sentence; "" where none is a real one."""
    models: dict[str, list[str]] = {}
    for encoder in encoders:
        if where := getattr(encoder, "runs", None):
            model, device, dtype = where
            models.setdefault(f"on {device}, {dtype}", []).append(model)
    words = [
        f"{', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]} run{'' if names[1:] else 's'} {place}"
        for place, names in models.items()
    ]
    return f"{'; '.join(words)}." if words else ""


def load_vae(section: Mapping[str, Any], device: str = "auto") -> VAE:
    """The VAE that a section of the configuration names: "demo", or "flux" with path and dtype."""

    def flux() -> VAE:
        from encode.torch_encoders import FluxVAE

        return FluxVAE(section["path"], dtype=section["dtype"], device=device)

    return _choose("vae", section, {"demo": DemoVAE, "flux": flux})


def load_text(section: Mapping[str, Any], device: str = "auto") -> Text:
    """The text encoder that a section names, with max_tokens: "demo", or "t5" with path and dtype."""

    def t5() -> Text:
        from encode.torch_encoders import T5Text

        return T5Text(section["path"], dtype=section["dtype"], max_tokens=section["max_tokens"], device=device)

    return _choose("text", section, {"demo": lambda: DemoText(section["max_tokens"]), "t5": t5})


def load_vision(section: Mapping[str, Any], device: str = "auto") -> Vision:
    """The vision encoder that a section names, with area: "demo", or "dinov3" with path (and dtype, else float32)."""

    def dinov3() -> Vision:
        from encode.torch_encoders import DINOv3Vision

        dtype = section.get("dtype", "float32")
        return DINOv3Vision(section["path"], dtype=dtype, area=section["area"], device=device)

    return _choose("vision", section, {"demo": lambda: DemoVision(section["area"]), "dinov3": dinov3})


def refuse_another(kind: str, encoder: Any, fingerprints: Mapping[str, Any], advice: str = "bring that one") -> None:
    """InputError where an encoder is not the one of a data set's fingerprints; of vectors that were given nobody knows it."""
    stored, found = fingerprints.get(kind, records.PRECOMPUTED), json.loads(json.dumps(encoder.fingerprint))
    if stored != records.PRECOMPUTED and (differing := [name for name in found if found[name] != stored.get(name)]):
        name = differing[0]
        raise InputError(
            f"the {kind} encoder found here is not the one that the data set was encoded with: {name} is {found[name]}, it was "
            f"{stored.get(name)}; {advice}."
        )


def _choose(kind: str, section: Mapping[str, Any], choices: Mapping[str, Callable[[], Any]]) -> Any:
    if section["name"] not in choices:
        raise InputError(f"{kind}.name={section['name']!r}: unknown; the choices are {', '.join(choices)}.")
    return choices[section["name"]]()
