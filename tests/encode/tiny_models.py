"""Small models of the real classes with random weights, saved to disk as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import sentencepiece
import torch
import transformers

CORPUS = """A figure on the left side of the picture, to the left of a tall tree, bows low.
A cat sits right next to the window and looks at two birds on the wire.
Two dogs run along the beach at sunset, far left of an old lighthouse.
The quick brown fox jumps over the lazy dog while it rains in the mountains.
""".splitlines()
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TEXT_WIDTH, VISION_WIDTH = 32, 48


def save_vae(folder: Path, **changes) -> Path:
    """A VAE as in Flux: 16 channels at an eighth, no quantisation layers, scale and shift in its configuration."""
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    _spread(diffusers.AutoencoderKL(**settings | changes)).save_pretrained(folder)
    return folder


def save_t5(folder: Path, **changes) -> Path:
    """A T5 with the decoder's weights in the file as well, and a tokenizer trained on the spot, as spiece.model.

    T5 v1.1 is save_t5(folder, feed_forward_proj="gated-gelu", tie_word_embeddings=False).
    """
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0, "model_max_length": 512}))
    settings = {
        "vocab_size": 128,
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "relu",
    }
    _spread(transformers.T5ForConditionalGeneration(transformers.T5Config(**settings | changes))).save_pretrained(
        folder
    )
    return folder


def save_dinov3(folder: Path) -> Path:
    torch.manual_seed(2)
    config = transformers.DINOv3ViTConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=16,
        image_size=64,
        num_register_tokens=4,
    )
    return _save_vision(transformers.DINOv3ViTModel(config), folder)


def save_dinov3_convnext(folder: Path) -> Path:
    torch.manual_seed(3)
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, VISION_WIDTH], depths=[1, 1, 2, 1])
    return _save_vision(transformers.DINOv3ConvNextModel(config), folder)


def _save_vision(model: torch.nn.Module, folder: Path) -> Path:
    _spread(model).save_pretrained(folder)
    settings = IMAGENET | {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every input shows in the output; fresh ones start near zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()
