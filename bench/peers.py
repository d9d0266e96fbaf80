"""The training step that PyTorch's users write, of our architecture and of diffusers' PixArt: the peers of bench/train_step.py.

Rectified flow with the same draws, dropout and mask as ours; gradients summed over micro-batches, clip, fused AdamW with decay on
matrices alone, average of the weights by foreach. float32 on the CPU; on a GPU autocast to bfloat16, as ours computes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel

from torch_dit import DiT

DROPS = (0.1, 0.1, 0.1)  # both, text, vision


class PixArt(torch.nn.Module):
    """diffusers' PixArtTransformer2DModel with our call: no vision vector, no norm of queries and keys, learned nothing."""

    def __init__(self, *, layers: int, width: int, heads: int, patch: int, side: int, channels: int, text_width: int):
        super().__init__()
        self.null_text = torch.nn.Parameter(torch.randn(text_width))
        self.model = PixArtTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, num_layers=layers, in_channels=channels,
            out_channels=channels, patch_size=patch, sample_size=side, cross_attention_dim=width,
            caption_channels=text_width, use_additional_conditions=False, interpolation_scale=1,
        )  # fmt: skip

    def forward(self, x, t, text, text_length, vision, drop_text, drop_vision):
        text = torch.where(drop_text[:, None, None], self.null_text, text)
        valid = torch.arange(text.shape[1], device=text.device) < torch.where(drop_text, 1, text_length)[:, None]
        return self.model(
            x, encoder_hidden_states=text, timestep=1000 * t, encoder_attention_mask=valid.to(x.dtype),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip


def build(name: str, options: Mapping[str, Any], widths: Mapping[str, int], side: int) -> torch.nn.Module:
    """The module of a side: "pixart" in its name means diffusers' model, else ours."""
    shape = {part: options[part] for part in ("layers", "width", "heads", "patch")}
    if "pixart" in name:
        return PixArt(**shape, side=side, channels=widths["latent"], text_width=widths["text"])
    return DiT(**shape, channels=widths["latent"], text_width=widths["text"], vision_width=widths["vision"])


def prepare(
    name: str,
    options: Mapping[str, Any],
    optim: Mapping[str, Any],
    widths: Mapping[str, int],
    batch: Mapping[str, np.ndarray],
    accumulation: int,
) -> tuple[Callable[[int], None], dict[str, Any]]:
    """(run so many updates and wait, what is known of the side).

    Args:
      name: of the side; with "compile" in it the model goes through torch.compile.
      options, optim: sections of a configuration.
      widths: latent, text, vision.
      batch: as `jaxdit.measure.noise` makes it, latents channels last.
      accumulation: micro-batches an update, the same batch each time.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        # The cap of bench/train_step.py: JAX reads the variable by itself.
        torch.cuda.set_per_process_memory_fraction(float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "1")))
    torch.manual_seed(0)
    model = build(name, options, widths, batch["latent"].shape[1]).to(device).train()
    forward = torch.compile(model) if "compile" in name else model
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": optim["weight_decay"]},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, optim["peak_learning_rate"], (optim["b1"], optim["b2"]), optim["eps"], fused=True)
    latent = torch.tensor(batch["latent"]).permute(0, 3, 1, 2).contiguous().to(device)
    text, length, vision = (
        torch.tensor(np.asarray(batch[part], kind)).to(device)
        for part, kind in (("text", np.float32), ("text_length", np.int64), ("vision", np.float32))
    )
    count = len(latent)

    def losses() -> torch.Tensor:
        t = torch.sigmoid(torch.randn(count, device=device))
        u = torch.rand(count, device=device)
        both, only_text, only_vision = DROPS
        drop_text = u < both + only_text
        drop_vision = (u < both) | ((u >= both + only_text) & (u < both + only_text + only_vision))
        noise, time = torch.randn_like(latent), t[:, None, None, None]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            found = forward((1 - time) * latent + time * noise, t, text, length, vision, drop_text, drop_vision)
        return (found.float() - (noise - latent)).square().mean((1, 2, 3))

    def update() -> torch.Tensor:
        for _ in range(accumulation):
            loss = losses().sum() / (count * accumulation)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, optim["clip_norm"], foreach=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - optim["ema_decay"])
        return loss

    def run(updates: int) -> None:
        for _ in range(updates):
            loss = update()
        if not loss.isfinite():  # waits for the device
            raise FloatingPointError(f"{name}: the loss is {loss.item()}")

    began = time.perf_counter()
    run(1)
    return run, {
        "seconds of the first update": round(time.perf_counter() - began, 2),
        "parameters": sum(weight.numel() for weight in weights),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "",
        "products": "bfloat16 by autocast" if device == "cuda" else "float32",
    }


def peak_bytes() -> int | None:
    """Of the GPU's memory since the process began; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
