"""The encoders that a model was trained with: found by what the pipeline's configuration says of them, and used.

A section of that configuration is what dataset.json says of the encoder, with its fingerprint: {"name": "flux", "t5",
"dinov3" or "demo", "path": a folder or the id of a Hugging Face repository, "dtype", "fingerprint": {"weights": SHA-256,
...}}. Only safetensors are read, and other weights than those of the training are refused. Nothing here needs JAX or jaxdit.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

COMPONENTS = {"vae": ("vae",), "text": ("text_encoder", "tokenizer"), "vision": ("image_encoder",)}
INSIDE = {"vae": "vae", "text": "text_encoder_2", "vision": ""}  # where larger repositories keep them
STEMS = {"vae": "diffusion_pytorch_model", "text": "model", "vision": "model"}
TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")


def load(kind: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """The components of one kind of encoder from the folder or repository that the section names.

    Args:
      kind: "vae", "text" or "vision".
      section: of the pipeline's configuration.

    Returns:
      {component of the pipeline: module or tokenizer}; {} for the demo encoders, which have none, and where no path is known.

    Raises:
      ValueError: no such model there, or its weights are not those that the model was trained with.
    """
    if section["name"] == "demo" or not section.get("path"):
        return {}
    import diffusers
    import transformers

    folder = _find(kind, section["path"])
    _compare(kind, section, _weight_files(kind, folder), "weights")
    if kind == "vae":
        return {"vae": diffusers.AutoencoderKL.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)}
    if kind == "vision":
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        model = transformers.DINOv3ViTModel if model_type == "dinov3_vit" else transformers.DINOv3ConvNextModel
        return {"image_encoder": model.from_pretrained(folder, use_safetensors=True)}
    places = [folder, *([folder.parent / "tokenizer_2"] if folder.name == "text_encoder_2" else [])]
    files = [place / name for place in places for name in TOKENIZER[:2] if (place / name).is_file()]
    if not files:
        raise ValueError(f"{folder}: neither tokenizer.json nor spiece.model is there; download the tokenizer as well.")
    _compare(kind, section, files[:1], "tokenizer")
    return {
        "text_encoder": transformers.T5EncoderModel.from_pretrained(folder, use_safetensors=True),
        "tokenizer": transformers.T5Tokenizer.from_pretrained(files[0].parent, local_files_only=True),
    }


def dtype(section: Mapping[str, Any]) -> torch.dtype:
    """In which an encoder of this section encoded the training data, and so encodes now."""
    return getattr(torch, section.get("dtype", "float32"))


def encode_text(
    section: Mapping[str, Any], tokenizer: Any, model: Any, prompts: Sequence[str], device: torch.device
) -> list[Tensor]:
    """One [tokens, width] float32 a sentence, cut after max_tokens, rounded to bfloat16 as the training data are."""
    if section["name"] == "demo":
        from torch_dit import demo_encoders  # beside this file in an exported folder whose model needs it

        found = [torch.from_numpy(tokens) for tokens in demo_encoders.DemoText(section["max_tokens"]).encode(prompts)]
    else:
        if model is None:
            raise ValueError("this pipeline has no text encoder; give one, or draw without a prompt.")
        found = []
        for prompt in prompts:
            ids = tokenizer(prompt, truncation=True, max_length=section["max_tokens"], return_tensors="pt").input_ids
            states = model(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device))
            found.append(states.last_hidden_state[0])
    return [tokens.to(device, torch.bfloat16).float() for tokens in found]


def encode_vision(section: Mapping[str, Any], model: Any, picture: Any, device: torch.device) -> Tensor:
    """[width] float32, raw, of a picture: a PIL image or a [height, width, 3] uint8 array; a vector stays what it is."""
    if isinstance(picture, Tensor) or (isinstance(picture, np.ndarray) and picture.ndim == 1):
        return torch.as_tensor(picture, dtype=torch.float32).cpu()
    image = upright(picture) if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if section["name"] == "demo":
        from torch_dit import demo_encoders

        return torch.from_numpy(demo_encoders.DemoVision(section["area"]).encode([np.asarray(image)])[0])
    settings = section["fingerprint"].get("preprocessing")
    if model is None or settings is None:
        raise ValueError(
            "this pipeline has no image encoder of which it knows how to use it; give a vector, not a picture."
        )
    step = getattr(model.config, "patch_size", None) or 32  # ConvNeXt has no patches, but halves its sides five times
    scale = (section["area"] / (image.height * image.width)) ** 0.5
    size = [max(1, round(side * scale / step)) * step for side in image.size]
    pixels = np.asarray(image.resize(size, settings["resample"]), np.float32) * settings["rescale_factor"]
    values = (pixels - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    values = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None].to(device, model.dtype)
    return model(pixel_values=values).pooler_output[0].float().cpu()


def decode(section: Mapping[str, Any], vae: Any, latents: Tensor) -> np.ndarray:
    """[b, channels, h, w] raw latents on the device that computes -> [b, 8h, 8w, 3] uint8 sRGB."""
    if section["name"] == "demo":
        from torch_dit import demo_encoders

        return demo_encoders.DemoVAE().decode(latents.permute(0, 2, 3, 1).float().cpu().numpy())
    if vae is None:
        raise ValueError('this pipeline has no VAE; give one, or ask for output_type="latent".')
    values = torch.cat([vae.decode(one[None].to(vae.dtype)).sample for one in latents])
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def upright(image: Image.Image) -> Image.Image:
    """8-bit sRGB, turned as its EXIF says, on white.

    Raises:
      ValueError: grey in floating point, whose white nobody knows.
    """
    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("a picture of floating-point grey: save it as PNG first.")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clamp
        image = Image.fromarray(np.round(np.asarray(image, np.float64).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    if profile:
        try:
            given, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, given, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):  # a broken profile counts as sRGB, as in the training data
            pass
    return image.convert("RGB")


def _find(kind: str, path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        import huggingface_hub

        names = [f"{STEMS[kind]}*.safetensors*", "config.json", "preprocessor_config.json", *TOKENIZER]
        inside = [f"{INSIDE[kind]}/{name}" for name in names if INSIDE[kind]]
        tokenizer = [f"tokenizer_2/{name}" for name in TOKENIZER if kind == "text"]
        try:
            folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=[*names, *inside, *tokenizer]))
        except Exception as error:
            raise ValueError(
                f"{path}: no such folder, and no such repository can be had ({type(error).__name__}); the model was trained "
                f"with the {kind} encoder of this name: fetch it, and put its path into model_index.json (encoders.{kind}.path)."
            ) from error
    for place in (folder, folder / INSIDE[kind]):
        if (place / "config.json").is_file():
            return place
    raise ValueError(f"{folder}: config.json is missing, so the {kind} encoder is not there.")


def _weight_files(kind: str, folder: Path) -> list[Path]:
    whole, index = (folder / f"{STEMS[kind]}{end}" for end in (".safetensors", ".safetensors.index.json"))
    files = [whole] if whole.is_file() else []
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files += [folder / Path(name).name for name in sorted(set(named.values()))]
    if not files:
        raise ValueError(f"{folder}: {whole.name} is missing; download it.")
    return files


def _compare(kind: str, section: Mapping[str, Any], files: Sequence[Path], name: str) -> None:
    """Refuse other files than those of the training, where their SHA-256 is known (it is not of precomputed vectors)."""
    wanted = section["fingerprint"].get(name)
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    if wanted not in (None, digest.hexdigest()):
        raise ValueError(
            f"{files[0].parent}: the {name} of the {kind} encoder are not those that the model was trained with (SHA-256 "
            f"{digest.hexdigest()[:16]}, wanted {wanted[:16]}); bring those, or every picture is wrong."
        )
