"""The real encoders: Flux's VAE, T5 and DINOv3, from local folders as published on Hugging Face.

Only safetensors are read and no code of a model folder is run; a folder that would load in part is refused. A model that
runs on a GPU first gives the answers that it gave on the CPU in float32 (some ROCm builds have returned zeros from
attention and corrupt pictures after the first hundreds), and again once in a thousand inputs. Nothing is compiled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encode.prepare import Resizing
from encode.records import InputError

VAE_PIXELS = 4 * 1024 * 1024  # in one go; more are taken in parts
TEXT_BATCH = 16
PROVE_EVERY = 1000
LEAST_COSINE = 0.98  # bfloat16 keeps it above 0.999; a kernel that is wrong is far below
SAMPLE_CAPTION = "A red kite above the sea on the left, and two people who watch it from the beach on a windy day."


class EncoderFailed(RuntimeError):
    """The device gives other answers than the CPU: nothing that it says may be stored."""


class _Encoder:
    """A module on its device in its dtype, and the proof that it computes there what it computes on the CPU.

    Subclasses define `_probe`: a fixed input through the module -> a float array.
    """

    def _start(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # ROCm calls itself cuda as well
        self._module, self._dtype = module.eval().requires_grad_(False), torch.float32
        self._expected = self._probe() if self._device.type != "cpu" else None
        self._module, self._dtype = module.to(self._device, dtype), dtype
        self._until_proof = 0

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(values), device=self._module.device)

    def _prove(self, inputs: int) -> None:
        """Every so many inputs, compare the probe with what the CPU gave."""
        if self._expected is None:
            return
        if self._until_proof <= 0:
            self._until_proof = PROVE_EVERY
            cosine = _cosine(self._probe(), self._expected)
            if not cosine >= LEAST_COSINE:
                raise EncoderFailed(
                    f"{type(self).__name__} on {self._device} disagrees with the CPU (cosine {cosine:.3f}, at least "
                    f"{LEAST_COSINE} is wanted): the driver or the build of PyTorch is at fault; run without the GPU "
                    "(HIP_VISIBLE_DEVICES=-1 or CUDA_VISIBLE_DEVICES=-1), or change the build."
                )
        self._until_proof -= inputs

    def _probe(self) -> np.ndarray:
        raise NotImplementedError


class FluxVAE(_Encoder):
    """Flux's autoencoder: the posterior mean, neither scaled nor shifted."""

    def __init__(self, path: str, *, dtype: str):
        import diffusers

        dtype = _dtype("vae", dtype)
        what = "Flux's VAE (subfolder vae of FLUX.1-dev or FLUX.1-schnell)"
        folder, config = _folder("vae", path, what, "vae", "_class_name", "AutoencoderKL")
        levels = len(config.get("block_out_channels", ()))
        if config.get("latent_channels") != 16 or levels != 4:
            found = f"latent_channels={config.get('latent_channels')} and a side divided by {2 ** max(levels - 1, 0)}"
            raise InputError(f"vae.path={folder}: config.json has {found}; Flux's VAE has 16, and 8.")
        weights = _weights_hash("vae", folder, "diffusion_pytorch_model")
        module = _load("vae", folder, diffusers.AutoencoderKL, low_cpu_mem_usage=False)
        self.channels = 16
        self.fingerprint = {
            "id": "flux-vae",
            "weights": weights,
            "dtype": str(dtype).removeprefix("torch."),
            "pixels": "RGB / 127.5 - 1",
            "latent": "posterior mean, raw",
        }
        self._start(module, dtype)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """[b, h, w, 3] uint8 sRGB -> [b, h/8, w/8, 16] float32."""
        _, height, width, _ = pixels.shape
        if height % 8 or width % 8:
            raise ValueError(f"pixels are {width}x{height}; both sides must be multiples of 8")
        self._prove(len(pixels))
        return self._in_parts(self._encode, pixels, height * width)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """[b, h, w, 16] float32 raw latents -> [b, 8h, 8w, 3] uint8 sRGB."""
        self._prove(len(latents))
        values = self._in_parts(self._decode, latents, 64 * latents.shape[1] * latents.shape[2])
        return np.clip(np.round((values + 1) * 127.5), 0, 255).astype(np.uint8)

    def _encode(self, pixels: np.ndarray) -> torch.Tensor:
        values = self._tensor(pixels).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        return self._module.encode(values.to(self._dtype)).latent_dist.mean

    def _decode(self, latents: np.ndarray) -> torch.Tensor:
        values = self._tensor(np.asarray(latents, np.float32)).permute(0, 3, 1, 2)
        return self._module.decode(values.to(self._dtype)).sample

    @torch.inference_mode()
    def _in_parts(self, run: Callable[[np.ndarray], torch.Tensor], values: np.ndarray, area: int) -> np.ndarray:
        size = max(1, VAE_PIXELS // area)
        parts = [run(values[start : start + size]) for start in range(0, len(values), size)]
        return np.concatenate([part.permute(0, 2, 3, 1).float().cpu().numpy() for part in parts])

    def _probe(self) -> np.ndarray:
        latents = self._in_parts(self._encode, _sample_picture(256, 256)[None], 256 * 256)
        return np.concatenate([latents.ravel(), self._in_parts(self._decode, latents, 256 * 256).ravel()])


class T5Text(_Encoder):
    """T5's encoder: the last hidden state of a caption's own tokens; padding is masked and cut away."""

    def __init__(self, path: str, *, dtype: str, max_tokens: int):
        import transformers

        dtype = _dtype("text", dtype)
        if max_tokens < 1:
            raise InputError(f"text.max_tokens={max_tokens}: at least 1 is needed.")
        folder, config = _folder("text", path, "T5 (google-t5/t5-large)", "", "model_type", "t5")
        files = [folder / name for name in ("tokenizer.json", "spiece.model") if (folder / name).is_file()]
        if not files:
            raise InputError(
                f"text.path={folder}: neither tokenizer.json nor spiece.model is there; {_found(folder)}; download the "
                "tokenizer's files into the same folder."
            )
        weights = _weights_hash("text", folder, "model")
        self._tokenizer = transformers.T5Tokenizer.from_pretrained(folder, local_files_only=True)
        if len(self._tokenizer) > config["vocab_size"]:
            raise InputError(
                f"text.path={folder}: the tokenizer has {len(self._tokenizer)} tokens, the model {config['vocab_size']}; "
                "they do not belong together."
            )
        module = _load("text", folder, transformers.T5EncoderModel)
        self.width = config["d_model"]
        self.max_tokens = max_tokens
        self.fingerprint = {
            "id": "t5",
            "weights": weights,
            "tokenizer": _sha256(files[:1]),
            "dtype": str(dtype).removeprefix("torch."),
            "max_tokens": max_tokens,
            "tokens": "last hidden state, valid tokens only",
        }
        self._start(module, dtype)

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """One [tokens, width] float32 a caption, end token included, cut after max_tokens."""
        self._prove(len(captions))
        return self._encode(captions)

    def count_tokens(self, caption: str) -> int:
        return len(self._tokenizer(caption, verbose=False).input_ids)

    @torch.inference_mode()
    def _encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        tokens = [
            self._tokenizer(caption, truncation=True, max_length=self.max_tokens).input_ids for caption in captions
        ]
        by_length = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))  # little padding
        found: list[Any] = [None] * len(tokens)
        for start in range(0, len(tokens), TEXT_BATCH):
            part = by_length[start : start + TEXT_BATCH]
            lengths = np.array([len(tokens[index]) for index in part])
            ids = np.full((len(part), lengths.max()), self._tokenizer.pad_token_id, np.int64)
            for row, index in zip(ids, part):
                row[: len(tokens[index])] = tokens[index]
            mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
            states = self._module(input_ids=self._tensor(ids), attention_mask=self._tensor(mask)).last_hidden_state
            for index, length, state in zip(part, lengths, states.float().cpu().numpy()):
                found[index] = state[:length].copy()
        return found

    def _probe(self) -> np.ndarray:
        return np.concatenate(self._encode([SAMPLE_CAPTION, "A cat."])).ravel()


class DINOv3Vision(_Encoder):
    """DINOv3's pooled output, raw, of the whole picture at about config.vision.area pixels."""

    def __init__(self, path: str, *, dtype: str, area: int):
        import transformers

        dtype = _dtype("vision", dtype)
        what = "DINOv3 (facebook/dinov3-vitl16-pretrain-lvd1689m)"
        folder, config = _folder("vision", path, what, "", "model_type", "dinov3_vit")
        self._settings = _preprocessing(folder)
        weights = _weights_hash("vision", folder, "model")
        module = _load("vision", folder, transformers.DINOv3ViTModel)
        self.width = config["hidden_size"]
        patch = config["patch_size"]
        if area < patch**2:
            raise InputError(f"vision.area={area}: at least one patch of {patch**2} pixels is needed.")
        self.resizing = Resizing(area, patch, self._settings["resample"])
        self.fingerprint = {
            "id": "dinov3",
            "weights": weights,
            "dtype": str(dtype).removeprefix("torch."),
            "area": area,
            "preprocessing": self._settings,
            "vector": "pooled output, raw",
        }
        self._start(module, dtype)

    def encode(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """[height, width, 3] uint8 sRGB pictures of any sizes, upright -> [n, width] float32."""
        return self.encode_resized([self.resizing(pixels) for pixels in pictures])

    def encode_resized(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The same of pictures that went through `resizing` already."""
        self._prove(len(pictures))
        return self._encode(pictures)

    @torch.inference_mode()
    def _encode(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        prepared = [self.preprocess(pixels) for pixels in pictures]
        found = np.empty((len(pictures), self.width), np.float32)
        for shape in sorted({values.shape for values in prepared}):
            part = [index for index, values in enumerate(prepared) if values.shape == shape]
            values = self._tensor(np.stack([prepared[index] for index in part]))
            found[part] = self._module(pixel_values=values.to(self._dtype)).pooler_output.float().cpu().numpy()
        return found

    def preprocess(self, pixels: np.ndarray) -> np.ndarray:
        """[height, width, 3] uint8, resized -> [3, height, width] float32: rescaled and normalised."""
        values = pixels.astype(np.float32) * self._settings["rescale_factor"] - np.float32(self._settings["image_mean"])
        return (values / np.float32(self._settings["image_std"])).transpose(2, 0, 1)

    def _probe(self) -> np.ndarray:
        return self._encode([self.resizing(_sample_picture(*size)) for size in ((256, 256), (192, 320))]).ravel()


def _dtype(kind: str, name: str) -> torch.dtype:
    if name == "float16":
        raise InputError(
            f"{kind}.dtype=float16 is refused: its largest number is 65,504, which T5's activations exceed, so captions "
            "become NaN or quietly wrong; choose bfloat16 or float32."
        )
    if name not in ("float32", "bfloat16"):
        raise InputError(f"{kind}.dtype={name!r}: unknown; the choices are float32 and bfloat16.")
    return getattr(torch, name)


def _folder(kind: str, path: str, what: str, inside: str, key: str, value: str) -> tuple[Path, dict[str, Any]]:
    """The folder that holds config.json, and what it says; `inside` names a subfolder that may hold it."""
    if not path:
        raise InputError(f"{kind}.path is empty; give the folder of {what} with --config.{kind}.path=DIR.")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{kind}.path={folder}: no such folder; give the folder that holds {what}.")
    if inside and not (folder / "config.json").is_file() and (folder / inside / "config.json").is_file():
        folder = folder / inside
    if not (folder / "config.json").is_file():
        raise InputError(f"{kind}.path={folder}: config.json is missing; {_found(folder)}; wanted is {what}.")
    config = _json(kind, folder / "config.json")
    if config.get(key) != value:
        raise InputError(
            f"{kind}.path={folder}: config.json says {key}={config.get(key)!r}, but {value!r} is wanted: {what}."
        )
    return folder, config


def _json(kind: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{kind}.path: {path} is not readable as JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{kind}.path: {path} holds no JSON object; download it again.")
    return value


def _found(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"found there: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "it is empty"


def _weights_hash(kind: str, folder: Path, stem: str) -> str:
    """SHA-256 of the safetensors files that will be loaded, in order of their names."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return _sha256([whole])
    if index.is_file():
        files = [folder / Path(name).name for name in sorted(set(_json(kind, index)["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{kind}.path={folder}: {', '.join(missing)} is missing; download it again.")
        return _sha256(files)
    pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        raise InputError(
            f"{kind}.path={folder}: only {', '.join(sorted(pickled))} is there, a pickle, which can run code when it is "
            f"opened; download {whole.name}, or convert it once where you trust it."
        )
    raise InputError(f"{kind}.path={folder}: {whole.name} is missing; {_found(folder)}.")


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()


def _load(kind: str, folder: Path, model: Any, **options: Any) -> torch.nn.Module:
    """A module with all of its weights in float32, or a refusal: by itself the library fills gaps with random numbers."""
    name = "torch_dtype" if kind == "vae" else "dtype"
    options |= {name: torch.float32, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        module, info = model.from_pretrained(folder, **options)
    except Exception as error:
        raise InputError(f"{kind}.path={folder}: the model cannot be loaded: {error}") from error
    gaps = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if gaps:
        raise InputError(
            f"{kind}.path={folder}: {len(gaps)} weights are missing or have another shape, {gaps[0]} for one; config.json "
            "and the weights do not belong together."
        )
    return module


def _preprocessing(folder: Path) -> dict[str, Any]:
    """What preprocessor_config.json says of the pixels; a field that is missing there is an error, not a guess."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(
            f"vision.path={folder}: preprocessor_config.json is missing, which holds the mean and deviation of the pixels; "
            f"{_found(folder)}; download it from the model's page."
        )
    stored = _json("vision", path)
    if missing := [name for name in ("image_mean", "image_std", "rescale_factor") if not stored.get(name)]:
        raise InputError(f"vision.path: {path} has no {', '.join(missing)}; download it from the model's page.")
    settings = {name: [float(value) for value in stored[name]] for name in ("image_mean", "image_std")}
    return settings | {"rescale_factor": float(stored["rescale_factor"]), "resample": int(stored.get("resample", 2))}


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of two vectors; NaN where one is zero or not finite."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other))) if one.any() and other.any() else np.nan


def _sample_picture(height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: smooth waves of three colours, for the proof."""
    y, x = np.mgrid[0:height, 0:width] / 64
    return np.stack([127 + 120 * np.sin(a * x + b * y) for a, b in ((2, 1), (-1, 3), (4, 2))], axis=-1).astype(np.uint8)
