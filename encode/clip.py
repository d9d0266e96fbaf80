"""CLIP score (Hessel et al. 2021): how well pictures fit their captions, by a CLIP model that lies in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encode import devices, weights
from encode.records import InputError

CLIP = weights.Wanted(
    "clip", "CLIP with its processor (openai/clip-vit-large-patch14)", "model_type", ("clip",), "model"
)
BATCH = 32


class CLIPScore:
    """A CLIP model with its own tokenizer and image processor; safetensors alone are read, and nothing is fetched.

    Args:
      path: a folder as transformers saves it.
      device: "auto" or PyTorch's name of one.

    Raises:
      InputError: there is no such model in the folder.
    """

    def __init__(self, path: str | Path, device: str = "auto"):
        import transformers

        if not Path(path).is_dir():
            raise InputError(f"--clip={path}: no such folder; a folder with {CLIP.what} is wanted.")
        try:
            folder, _ = weights.find(CLIP, str(path))
            self.hash = weights.weights_hash(CLIP, folder)
            module = weights.load(CLIP, folder, transformers.CLIPModel)
        except InputError as error:
            raise InputError(str(error).replace("clip.path", "--clip")) from error
        try:
            self._processor = transformers.CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"--clip={folder}: its tokenizer or preprocessor_config.json is missing or damaged; "
                f"{weights.found(folder)}; download the whole folder."
            ) from error
        self._device = devices.choose(device)
        self._module: Any = torch.nn.Module.to(module.eval().requires_grad_(False), self._device)
        self.most_tokens = module.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def score(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        """[n] cosines of [height, width, 3] uint8 pictures and captions, cut where CLIP takes no more tokens."""
        found = []
        for start in range(0, len(pictures), BATCH):
            pixels = self._processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")
            words = self._tokenizer(
                list(captions[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=self.most_tokens,
                return_tensors="pt",
            )
            answer = self._module(
                input_ids=words["input_ids"].to(self._device),
                attention_mask=words["attention_mask"].to(self._device),
                pixel_values=pixels["pixel_values"].to(self._device),
            )
            found.append((answer.image_embeds * answer.text_embeds).sum(-1).float().cpu().numpy())
        return np.concatenate(found)
