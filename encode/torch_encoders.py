"""The real encoders: Flux's VAE, T5 and DINOv3, from local folders or the Hugging Face hub (weights.py).

Each runs on one device in one dtype, and on anything but the CPU proves itself first (devices.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encode import weights
from encode.devices import Attention, DeviceEncoder, choose
from encode.prepare import Resizing
from encode.progress import out_of_memory
from encode.records import InputError

VAE_PIXELS = 4 * 1024 * 1024  # in one go; more are taken in parts
WHOLE_PIXELS = 2 * 1024 * 1024  # of one picture: a larger one is decoded in tiles
TILE = 512  # pixels; neighbours overlap by a quarter
TEXT_TOKENS = 4096  # in one go, padding included: 8 captions of 512 tokens, or 100 of 40
SAMPLE_CAPTION = "A red kite above the sea on the left, and two people who watch it from the beach on a windy day."
VAE = weights.Wanted(
    "vae",
    "Flux's VAE (subfolder vae of FLUX.1-dev or FLUX.1-schnell)",
    "_class_name",
    ("AutoencoderKL",),
    "diffusion_pytorch_model",
    inside="vae",
)
TOKENIZER = ("tokenizer.json", "spiece.model")  # either will do
TEXT = weights.Wanted(
    "text",
    "T5 (google-t5/t5-large; or subfolder text_encoder_2 of FLUX.1, with tokenizer_2 beside it)",
    "model_type",
    ("t5",),
    "model",
    inside="text_encoder_2",
    files=tuple(
        f"{folder}{name}"
        for folder in ("", "tokenizer_2/")
        for name in (*TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")
    ),
)
VISION = weights.Wanted(
    "vision",
    "DINOv3, ViT or ConvNeXt (facebook/dinov3-vitl16-pretrain-lvd1689m)",
    "model_type",
    ("dinov3_vit", "dinov3_convnext"),
    "model",
    files=("preprocessor_config.json",),
)


class FluxVAE(DeviceEncoder):
    """Flux's autoencoder: the posterior mean, neither scaled nor shifted."""

    model = "VAE"

    def __init__(self, path: str, *, dtype: str, device: str = "auto"):
        import diffusers

        dtype, device = _dtype("vae", dtype), choose(device)
        folder, config = weights.find(VAE, path)
        widths = config.get("block_out_channels", ())
        if config.get("latent_channels") != 16 or len(widths) != 4:
            side = 2 ** max(len(widths) - 1, 0)
            raise InputError(
                f"vae.path={folder}: config.json has latent_channels={config.get('latent_channels')} and a side divided by "
                f"{side}; Flux's VAE has 16, and 8."
            )
        digest = weights.weights_hash(VAE, folder)
        module = weights.load(VAE, folder, diffusers.AutoencoderKL, low_cpu_mem_usage=False)
        self.channels = 16
        self.attention = Attention(heads=1, size=widths[-1], tokens=(512 // 8) ** 2)  # of a picture of 512 pixels
        self.fingerprint = {
            "id": "flux-vae",
            "weights": digest,
            "dtype": str(dtype).removeprefix("torch."),
            "pixels": "RGB / 127.5 - 1",
            "latent": "posterior mean, raw",
        }
        self._start(module, dtype, device)
        if device.type == "cuda" and torch.version.hip is None:
            self._module.to(memory_format=torch.channels_last)  # what cuDNN's convolutions want

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """[b, h, w, 3] uint8 sRGB -> [b, h/8, w/8, 16] float32."""
        _, height, width, _ = pixels.shape
        if height % 8 or width % 8:
            raise ValueError(f"pixels are {width}x{height}; both sides must be multiples of 8")
        latents = self._in_parts(self._encode, pixels, height * width)
        self._proven(latents)
        return latents

    def decode(self, latents: np.ndarray, *, tiled: bool | None = None) -> np.ndarray:
        """Latents to pixels.

        Args:
          latents: [b, h, w, 16] float32, raw.
          tiled: in blended tiles, one picture at a time, which needs little memory whatever its size and is not quite the
            same; None: where a picture is large, or the device runs out of memory.

        Returns:
          [b, 8h, 8w, 3] uint8 sRGB.
        """
        area = 64 * latents.shape[1] * latents.shape[2]
        values = None
        try:
            values = self._decode_all(latents, area, area > WHOLE_PIXELS if tiled is None else tiled)
        except Exception as error:
            if tiled is not None or not out_of_memory(error):
                raise
        if values is None:  # not within the except, where what failed still holds its memory
            torch.cuda.empty_cache()
            values = self._decode_all(latents, area, True)
        self._proven(values)
        return np.clip(np.round((values + 1) * 127.5), 0, 255).astype(np.uint8)

    def _decode_all(self, latents: np.ndarray, area: int, tiled: bool) -> np.ndarray:
        if not tiled:
            return self._in_parts(self._decode, latents, area)
        self._module.enable_tiling()
        self._module.tile_sample_min_size, self._module.tile_latent_min_size = TILE, TILE // 8
        try:
            return self._in_parts(self._decode, latents, VAE_PIXELS)
        finally:
            self._module.disable_tiling()  # it would hold for encoding too

    def _encode(self, pixels: np.ndarray) -> torch.Tensor:
        values = self._upload(pixels).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        return self._module.encode(values.to(self._dtype)).latent_dist.mean

    def _decode(self, latents: np.ndarray) -> torch.Tensor:
        values = self._upload(np.asarray(latents, np.float32)).permute(0, 3, 1, 2)
        return self._module.decode(values.to(self._dtype)).sample

    @torch.inference_mode()
    def _in_parts(self, run: Callable[[np.ndarray], torch.Tensor], values: np.ndarray, area: int) -> np.ndarray:
        """All parts are on their way before the first result is waited for."""
        size = max(1, VAE_PIXELS // area)
        parts = [run(values[start : start + size]) for start in range(0, len(values), size)]
        return np.concatenate([part.permute(0, 2, 3, 1).float().cpu().numpy() for part in parts])

    def _probe(self) -> dict[str, np.ndarray]:
        latents = self._in_parts(self._encode, _sample_picture(256, 256)[None], 256 * 256)
        return {"the code": latents, "the round trip": self._in_parts(self._decode, latents, 256 * 256)}


class T5Text(DeviceEncoder):
    """T5's encoder: the last hidden state of a caption's own tokens; padding is masked and cut away."""

    model = "T5"

    def __init__(self, path: str, *, dtype: str, max_tokens: int, device: str = "auto"):
        import transformers

        dtype, device = _dtype("text", dtype), choose(device)
        if max_tokens < 1:
            raise InputError(f"text.max_tokens={max_tokens}: at least 1 is needed.")
        folder, config = weights.find(TEXT, path)
        beside = folder.parent / "tokenizer_2"  # Flux keeps it there
        places = [folder, *([beside] if folder.name == "text_encoder_2" and beside.is_dir() else [])]
        files = [place / name for place in places for name in TOKENIZER if (place / name).is_file()]
        if not files:
            raise InputError(
                f"text.path={folder}: neither tokenizer.json nor spiece.model is there; {weights.found(folder)}; download "
                "the tokenizer's files into the same folder."
            )
        digest = weights.weights_hash(TEXT, folder)
        self._tokenizer = transformers.T5Tokenizer.from_pretrained(files[0].parent, local_files_only=True)
        if len(self._tokenizer) > config["vocab_size"]:
            raise InputError(
                f"text.path={folder}: the tokenizer has {len(self._tokenizer)} tokens, the model {config['vocab_size']}; "
                "they do not belong together."
            )
        module = weights.load(TEXT, folder, transformers.T5EncoderModel)
        self.width = config["d_model"]
        self.max_tokens = max_tokens
        self.attention = Attention(config["num_heads"], config["d_kv"], min(max_tokens, 512), bias=True)
        self.fingerprint = {
            "id": "t5",
            "weights": digest,
            "tokenizer": weights.sha256(files[:1]),
            "dtype": str(dtype).removeprefix("torch."),
            "max_tokens": max_tokens,
            "tokens": "last hidden state, valid tokens only",
        }
        self._start(module, dtype, device)

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """One [tokens, width] float32 a caption, end token included, cut after max_tokens."""
        states = self._encode(captions)
        self._proven(states)
        return states

    def count_tokens(self, caption: str) -> int:
        return len(self._tokenizer(caption, verbose=False).input_ids)

    def unknown(self, caption: str) -> float:
        """T5's words are English, French, German and Romanian: signs of other scripts are all one token (Raffel et al. 2020)."""
        ids = self._tokenizer(caption, verbose=False, add_special_tokens=False).input_ids
        return ids.count(self._tokenizer.unk_token_id) / max(len(ids), 1)

    @torch.inference_mode()
    def _encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        tokens = [
            self._tokenizer(caption, truncation=True, max_length=self.max_tokens).input_ids for caption in captions
        ]
        found: list[Any] = [None] * len(tokens)
        for part in _alike([len(ids) for ids in tokens]):
            lengths = np.array([len(tokens[index]) for index in part])
            ids = np.full((len(part), lengths.max()), self._tokenizer.pad_token_id, np.int64)
            for row, index in zip(ids, part):
                row[: len(tokens[index])] = tokens[index]
            mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
            states = self._module(input_ids=self._upload(ids), attention_mask=self._upload(mask)).last_hidden_state
            for index, length, state in zip(part, lengths, states.float().cpu().numpy()):
                found[index] = state[:length].copy()
        return found

    def _probe(self) -> dict[str, np.ndarray]:
        return {"the code of a caption": np.concatenate(self._encode([SAMPLE_CAPTION, "A cat."]))}


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Places of sequences put together by length, so that little is padded, at most TEXT_TOKENS with the padding."""
    parts: list[list[int]] = [[]]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if parts[-1] and lengths[parts[-1][0]] * (len(parts[-1]) + 1) > TEXT_TOKENS:
            parts.append([])
        parts[-1].append(place)
    return [part for part in parts if part]


class DINOv3Vision(DeviceEncoder):
    """DINOv3's pooled output, raw, of the whole picture at about config.vision.area pixels."""

    model = "DINOv3"

    def __init__(self, path: str, *, dtype: str, area: int, device: str = "auto"):
        import transformers

        dtype, device = _dtype("vision", dtype), choose(device)
        folder, config = weights.find(VISION, path)
        self._settings = _preprocessing(folder)
        digest = weights.weights_hash(VISION, folder)
        if config["model_type"] == "dinov3_vit":
            kind, patch, self.width = transformers.DINOv3ViTModel, config["patch_size"], config["hidden_size"]
        else:  # ConvNeXt has no patches, but halves its sides five times
            kind, patch, self.width = transformers.DINOv3ConvNextModel, 32, config["hidden_sizes"][-1]
        if area < patch**2:
            raise InputError(f"vision.area={area}: at least one patch of {patch**2} pixels is needed.")
        module = weights.load(VISION, folder, kind)
        if kind is transformers.DINOv3ViTModel:
            heads = config["num_attention_heads"]
            self.attention = Attention(heads, self.width // heads, min(4096, area // patch**2 + 5))  # registers, CLS
        self.resizing = Resizing(area, patch, self._settings["resample"])
        self.fingerprint = {
            "id": "dinov3",
            "weights": digest,
            "dtype": str(dtype).removeprefix("torch."),
            "area": area,
            "preprocessing": self._settings,
            "vector": "pooled output, raw",
        }
        self._start(module, dtype, device)

    def encode(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """[height, width, 3] uint8 sRGB pictures of any sizes, upright -> [n, width] float32."""
        return self.encode_resized([self.resizing(pixels) for pixels in pictures])

    def encode_resized(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The same of pictures that went through `resizing` already."""
        vectors = self._encode(pictures)
        self._proven(vectors)
        return vectors

    @torch.inference_mode()
    def _encode(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        prepared = [self.preprocess(pixels) for pixels in pictures]
        found = np.empty((len(pictures), self.width), np.float32)
        for shape in sorted({values.shape for values in prepared}):
            part = [index for index, values in enumerate(prepared) if values.shape == shape]
            values = self._upload(np.stack([prepared[index] for index in part]))
            found[part] = self._module(pixel_values=values.to(self._dtype)).pooler_output.float().cpu().numpy()
        return found

    def preprocess(self, pixels: np.ndarray) -> np.ndarray:
        """[height, width, 3] uint8, resized -> [3, height, width] float32: rescaled and normalised."""
        values = pixels.astype(np.float32) * self._settings["rescale_factor"] - np.float32(self._settings["image_mean"])
        return (values / np.float32(self._settings["image_std"])).transpose(2, 0, 1)

    def _probe(self) -> dict[str, np.ndarray]:
        pictures = [self.resizing(_sample_picture(*size)) for size in ((256, 256), (192, 320))]
        return {"the vector of a picture": self._encode(pictures)}


def _dtype(kind: str, name: str) -> torch.dtype:
    if name == "float16":
        raise InputError(
            f"{kind}.dtype=float16 is refused: its largest number is 65,504, which T5's activations exceed, so captions "
            "become NaN or quietly wrong; choose bfloat16 or float32."
        )
    if name not in ("float32", "bfloat16"):
        raise InputError(f"{kind}.dtype={name!r}: unknown; the choices are float32 and bfloat16.")
    return getattr(torch, name)


def _preprocessing(folder: Path) -> dict[str, Any]:
    """What preprocessor_config.json says of the pixels; a field that is missing there is an error, not a guess."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(
            f"vision.path={folder}: preprocessor_config.json is missing, which holds the mean and deviation of the pixels; "
            f"{weights.found(folder)}; download it from the model's page."
        )
    stored = weights.read_json("vision", path)
    if missing := [name for name in ("image_mean", "image_std", "rescale_factor") if not stored.get(name)]:
        raise InputError(f"vision.path: {path} has no {', '.join(missing)}; download it from the model's page.")
    settings = {name: [float(value) for value in stored[name]] for name in ("image_mean", "image_std")}
    return settings | {"rescale_factor": float(stored["rescale_factor"]), "resample": int(stored.get("resample", 2))}


def _sample_picture(height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: smooth waves of three colours, for the proof."""
    y, x = np.mgrid[0:height, 0:width] / 64
    return np.stack([127 + 120 * np.sin(a * x + b * y) for a, b in ((2, 1), (-1, 3), (4, 2))], axis=-1).astype(np.uint8)
