"""CLIP's score against the library's own way from pictures and captions to logits, with a tiny model on the disk."""

import json

import numpy as np
import pytest
import torch
import transformers

from encode import clip
from encode.records import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = ["a", "b", "c", "d", "a</w>", "b</w>", "c</w>", "d</w>", "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPConfig(
        text_config=small
        | {
            "vocab_size": len(words),
            "max_position_embeddings": 12,
            "bos_token_id": 8,
            "eos_token_id": 9,
            "pad_token_id": 9,
        },
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(path)
    return path


def made(count=5):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (40 + 8 * k, 64, 3), dtype=np.uint8) for k in range(count)]
    return pictures, ["a b", "c", "d d a c", "b " * 40, ""][:count]


def test_the_score_is_the_cosine_of_the_librarys_logits(folder, monkeypatch):
    pictures, captions = made()
    monkeypatch.setattr(clip, "BATCH", 2)
    found = clip.CLIPScore(folder, "cpu").score(pictures, captions)
    module = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    for picture, caption, value in zip(pictures, captions, found):
        pixels = transformers.CLIPImageProcessorPil.from_pretrained(folder)(images=picture, return_tensors="pt")
        words = tokenizer([caption], truncation=True, max_length=12, return_tensors="pt")
        with torch.inference_mode():
            answer = module(**words, **pixels)
        wanted = answer.logits_per_image.item() / module.logit_scale.exp().item()
        assert value == pytest.approx(wanted, abs=1e-5)
    assert np.ptp(found) > 1e-3


@pytest.mark.parametrize(
    "name, words",
    (
        ("model.safetensors", "model.safetensors is missing"),
        ("config.json", "config.json is missing"),
        ("preprocessor_config.json", "preprocessor_config.json is missing"),
        ("vocab.json", "tokenizer"),
    ),
)
def test_what_is_missing_is_named(folder, tmp_path, name, words):
    for file in folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="--clip") as error:
        clip.CLIPScore(tmp_path, "cpu")
    assert words in str(error.value)


def test_a_name_is_not_fetched():
    with pytest.raises(InputError, match="no such folder"):
        clip.CLIPScore("openai/clip-vit-base-patch32")
