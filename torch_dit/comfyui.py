"""Nodes for ComfyUI around the pipeline of an exported model; this file is the __init__.py of a custom node's folder.

The model lies beside it in model/, in the layout of diffusers, with its own code in model/torch_dit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
if str(HERE / "model") not in sys.path:
    sys.path.append(str(HERE / "model"))

from torch_dit.pipeline import JaxditPipeline  # noqa: E402


class Load:
    """The model of a folder, on the card where there is one."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("JAXDIT",), "load", "jaxdit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"folder": ("STRING", {"default": str(HERE / "model")})}}

    def load(self, folder: str) -> tuple[JaxditPipeline]:
        pipeline = JaxditPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return (pipeline.to("cuda" if torch.cuda.is_available() else "cpu"),)


class Conditions:
    """A sentence and up to two reference pictures; mix is the second one's share."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("JAXDIT_CONDITIONS",), "collect", "jaxdit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.05})
        return {
            "required": {"prompt": ("STRING", {"default": "", "multiline": True})},
            "optional": {"reference": ("IMAGE",), "second_reference": ("IMAGE",), "mix": share},
        }

    def collect(
        self, prompt: str, reference: Any = None, second_reference: Any = None, mix: float = 0.5
    ) -> tuple[dict[str, Any]]:
        given = [
            (image, weight) for image, weight in ((reference, 1 - mix), (second_reference, mix)) if image is not None
        ]
        pictures = [(image[0] * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy() for image, _ in given]
        weights = [weight for _, weight in given] if len(given) == 2 else None
        return ({"prompt": prompt, "reference": pictures or None, "reference_weights": weights},)


class Sample:
    """Latents as ComfyUI's VAE Decode takes them: raw, neither scaled nor shifted. 0 leaves a number to the model."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "sample", "jaxdit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = ("INT", {"default": 0, "min": 0, "max": 8192, "step": 16})
        weight = ("FLOAT", {"default": 0.0, "min": 0.0, "max": 30.0, "step": 0.1})
        return {
            "required": {
                "model": ("JAXDIT",),
                "conditions": ("JAXDIT_CONDITIONS",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "width": side,
                "height": side,
                "guidance_text": weight,
                "guidance_vision": weight,
            }
        }

    def sample(
        self, model, conditions, seed, batch_size, steps, width, height, guidance_text, guidance_vision
    ) -> tuple[dict[str, torch.Tensor]]:
        latents = model(
            **conditions,
            num_images_per_prompt=batch_size,
            generator=[torch.Generator("cpu").manual_seed(seed + k) for k in range(batch_size)],
            num_inference_steps=steps or None,
            width=width or None,
            height=height or None,
            guidance_text=guidance_text or None,
            guidance_vision=guidance_vision or None,
            output_type="latent",
        ).images
        return ({"samples": latents.cpu()},)


class Decode:
    """Pictures out of latents, by the VAE that the model was trained with."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "decode", "jaxdit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("JAXDIT",), "latent": ("LATENT",)}}

    def decode(self, model: JaxditPipeline, latent: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.from_numpy(model.decode(latent["samples"])).float() / 255,)


# The loader's name holds that of its folder: several exported models stand beside each other.
_LOAD = f"JaxditLoad {HERE.name}"
NODE_CLASS_MAPPINGS = {_LOAD: Load, "JaxditConditions": Conditions, "JaxditSample": Sample, "JaxditDecode": Decode}
NODE_DISPLAY_NAME_MAPPINGS = {
    _LOAD: f"Load {HERE.name} (jaxdit)",
    "JaxditConditions": "Conditions (jaxdit)",
    "JaxditSample": "Sample (jaxdit)",
    "JaxditDecode": "Decode (jaxdit)",
}
