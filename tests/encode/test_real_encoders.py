"""The real encoders with small models of the same classes, against PyTorch called directly."""

import json
import logging
from pathlib import Path

import diffusers
import numpy as np
import pytest
import sentencepiece
import skimage.data
import torch
import transformers
from safetensors.torch import load_file, save_file

from encode import encoders, images, torch_encoders
from encode.records import InputError
from tests.encode import tiny_models

LONG = " ".join(tiny_models.CORPUS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "vae": tiny_models.save_vae(root / "flux" / "vae").parent,
        "text": tiny_models.save_t5(root / "t5"),
        "vision": tiny_models.save_dinov3(root / "dinov3"),
    }


@pytest.fixture(scope="module")
def vae(folders):
    return encoders.load_vae({"name": "flux", "path": str(folders["vae"]), "dtype": "float32"})


@pytest.fixture(scope="module")
def text(folders):
    return _text(folders["text"])


@pytest.fixture(scope="module")
def vision(folders):
    return encoders.load_vision({"name": "dinov3", "path": str(folders["vision"]), "area": 96 * 96})


def _text(folder, **changes):
    return encoders.load_text({"name": "t5", "path": str(folder), "dtype": "float32", "max_tokens": 64} | changes)


def _cosine(one, other):
    return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))


def _photograph(height, width):
    return images.resize(skimage.data.coffee(), width, height)


# VAE


def test_vae_gives_the_raw_posterior_mean_of_pixels_in_minus_one_to_one(folders, vae):
    pixels = _photograph(64, 48)[None]
    model = diffusers.AutoencoderKL.from_pretrained(folders["vae"] / "vae").eval()
    values = torch.tensor(pixels / 255.0 * 2 - 1, dtype=torch.float32).movedim(3, 1)
    with torch.no_grad():
        moments = model.encoder(values)  # mean and logarithm of the variance, stacked
        back = model.decoder(moments[:, :16])
    latents = vae.encode(pixels)
    assert latents.shape == (1, 8, 6, 16) and latents.dtype == np.float32 and vae.channels == 16
    assert np.allclose(latents, moments[:, :16].movedim(1, 3), atol=1e-4)
    wanted = ((back.movedim(1, 3).numpy() + 1) / 2 * 255).clip(0, 255)
    decoded = vae.decode(latents)
    assert decoded.shape == pixels.shape and decoded.dtype == np.uint8
    assert np.abs(decoded - wanted).max() < 0.51  # rounding


def test_vae_hears_the_order_of_the_colours(vae):
    red = np.broadcast_to(np.array([220, 30, 30], np.uint8), (1, 32, 32, 3))
    assert np.abs(vae.encode(red) - vae.encode(red[..., ::-1])).mean() > 0.02


def test_vae_result_does_not_depend_on_the_batch(vae, monkeypatch):
    pixels = np.stack([np.roll(_photograph(64, 48), 7 * shift, axis=1) for shift in range(5)])
    whole = vae.encode(pixels)
    single = np.concatenate([vae.encode(picture[None]) for picture in pixels])
    monkeypatch.setattr(torch_encoders, "VAE_PIXELS", 2 * 64 * 48)
    assert np.abs(whole - single).max() < 1e-4 and np.abs(vae.encode(pixels) - single).max() < 1e-4
    assert np.abs(whole[0] - whole[1]).max() > 0.01
    assert np.abs(vae.decode(whole).astype(int) - vae.decode(whole[:1])).max(axis=(1, 2, 3))[0] <= 1


def test_vae_in_bfloat16_is_close(folders, vae):
    half = encoders.load_vae({"name": "flux", "path": str(folders["vae"] / "vae"), "dtype": "bfloat16"})
    pixels = _photograph(64, 64)[None]
    assert _cosine(half.encode(pixels).ravel(), vae.encode(pixels).ravel()) > 0.999
    assert half.fingerprint["weights"] == vae.fingerprint["weights"] and half.fingerprint != vae.fingerprint


def test_vae_of_another_kind_is_refused(tmp_path):
    small = tiny_models.save_vae(tmp_path / "small", latent_channels=4)
    with pytest.raises(InputError, match=r"latent_channels=4.*Flux's VAE has 16"):
        torch_encoders.FluxVAE(str(small), dtype="float32")
    with pytest.raises(ValueError, match="60x64"):
        torch_encoders.FluxVAE.encode(None, np.zeros((1, 64, 60, 3), np.uint8))


# Text


def test_text_is_the_last_hidden_state_of_the_own_tokens(folders, text):
    (tokens,) = text.encode([LONG])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folders["text"] / "spiece.model"))
    ids = [*pieces.encode(LONG)[:63], 1]  # cut to 64 with the end token
    model = transformers.T5ForConditionalGeneration.from_pretrained(folders["text"]).eval()
    with torch.no_grad():
        wanted = model.encoder(torch.tensor([ids])).last_hidden_state[0].numpy()
    assert tokens.shape == (64, tiny_models.TEXT_WIDTH) and tokens.dtype == np.float32
    assert np.allclose(tokens, wanted, atol=1e-4)
    assert text.count_tokens(LONG) == len(pieces.encode(LONG)) + 1 > text.max_tokens == 64


def test_text_does_not_see_the_padding(text):
    captions = ["a cat", LONG, "", tiny_models.CORPUS[1], "a dog"]
    together = text.encode(captions)
    for caption, tokens in zip(captions, together):
        (alone,) = text.encode([caption])
        assert alone.shape == tokens.shape and len(alone) == min(64, text.count_tokens(caption)) >= 1
        assert np.allclose(alone, tokens, atol=1e-4)
        assert alone.std() > 0.01


def test_text_of_many_captions_comes_in_their_order(text):
    captions = [f"{caption} {number}" for number in range(9) for caption in tiny_models.CORPUS]
    for caption, tokens in list(zip(captions, text.encode(captions)))[::5]:
        assert np.allclose(text.encode([caption])[0], tokens, atol=1e-4)


def test_text_in_float16_is_refused_with_the_reason(folders):
    with pytest.raises(InputError, match=r"float16 is refused.*65,504.*bfloat16"):
        _text(folders["text"], dtype="float16")
    with pytest.raises(InputError, match="'int8'"):
        _text(folders["text"], dtype="int8")


def test_text_in_bfloat16_is_close(folders, text):
    half = _text(folders["text"], dtype="bfloat16")
    for one, other in zip(half.encode(tiny_models.CORPUS), text.encode(tiny_models.CORPUS)):
        assert np.isfinite(one).all() and _cosine(one, other).min() > 0.99


def test_text_never_hears_its_neighbours_in_a_batch(folders):
    half, long = _text(folders["text"], dtype="bfloat16"), tiny_models.CORPUS
    for encoder, closeness in ((half, 0.999), (_text(folders["text"]), 1 - 1e-6)):
        one, other = encoder.encode(["a cat", long[0]]), encoder.encode(["a cat", long[0][::-1]])
        assert np.array_equal(one[0], other[0])  # bit for bit, so that no word of the longer caption leaks
        (alone,) = encoder.encode(["a cat"])
        assert alone.shape == one[0].shape and _cosine(alone, one[0]).min() > closeness


def test_text_is_batched_by_length_within_a_limit_of_tokens(text, monkeypatch):
    seen, whole = [], text._module.forward
    monkeypatch.setattr(torch_encoders, "TEXT_TOKENS", 100)
    monkeypatch.setattr(
        text._module, "forward", lambda **given: seen.append(given["input_ids"].shape) or whole(**given)
    )
    captions = ["a cat", LONG, *["a dog"] * 20, tiny_models.CORPUS[1]]
    states = text.encode(captions)
    assert sum(rows for rows, _ in seen) == len(captions)
    assert all(rows == 1 or rows * longest <= 100 for rows, longest in seen)
    assert sum(rows * longest for rows, longest in seen) < 1.3 * sum(map(len, states))  # padded to the longest: 7 times
    assert text.encode([]) == []


def test_text_of_many_captions_takes_no_more_memory(text):
    def encode(count):
        for number in range(0, count, 16):
            text.encode([f"{tiny_models.CORPUS[number % 3]} {number + place}" for place in range(16)])
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = encode(200)
    assert encode(800) < 1.1 * before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_of_version_1_1_is_read_as_well(dtype, tmp_path):
    folder = tiny_models.save_t5(tmp_path / "t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = transformers.T5EncoderModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    encoder = _text(folder, dtype=dtype)
    ids = encoder._tokenizer(LONG, truncation=True, max_length=64, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model(ids).last_hidden_state[0].float().numpy()
    assert np.allclose(encoder.encode([LONG])[0], wanted, atol=1e-5)


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_text_takes_its_embedding_under_either_name(kept, tied, folders, text, tmp_path):
    """Not from lm_head, as huggingface/transformers#48154 had it, and without a complaint about the other name."""
    folder = _copy(folders["text"], tmp_path / "t5", leave_out="model.safetensors")
    stored = load_file(folders["text"] / "model.safetensors")
    changed = {name: values for name, values in stored.items() if "decoder" not in name and name != "shared.weight"}
    changed |= {kept: stored["shared.weight"], "lm_head.weight": torch.full_like(stored["shared.weight"], 7.0)}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    assert np.allclose(_text(folder).encode([LONG])[0], text.encode([LONG])[0], atol=1e-5)


def test_text_is_found_in_a_folder_of_flux(folders, text, tmp_path):
    _copy(folders["text"], tmp_path / "flux" / "text_encoder_2", leave_out="spiece.model")
    (tmp_path / "flux" / "tokenizer_2").mkdir()
    for name in ("spiece.model", "tokenizer_config.json"):
        (tmp_path / "flux" / "tokenizer_2" / name).write_bytes((folders["text"] / name).read_bytes())
    for folder in (tmp_path / "flux", tmp_path / "flux" / "text_encoder_2"):
        found = _text(folder)
        assert found.fingerprint == text.fingerprint
        assert np.array_equal(found.encode([LONG])[0], text.encode([LONG])[0])


def test_text_tokenizer_may_come_as_tokenizer_json(folders, text, tmp_path):
    _copy(folders["text"], tmp_path / "t5", leave_out="spiece.model")
    with pytest.raises(InputError, match=r"neither tokenizer.json nor spiece.model"):
        _text(tmp_path / "t5")
    transformers.T5Tokenizer.from_pretrained(folders["text"]).save_pretrained(tmp_path / "t5")
    assert np.allclose(_text(tmp_path / "t5").encode([LONG])[0], text.encode([LONG])[0])


# Vision


def _processor_pixels(pixels, size, mean, std):
    """What transformers' DINOv3 processor does, in PyTorch: rescale, resize with antialiasing, normalise; no crop."""
    values = torch.from_numpy(pixels.copy()).movedim(2, 0)[None].to(torch.float32) / 255
    values = torch.nn.functional.interpolate(values, size=size, mode="bilinear", antialias=True, align_corners=False)
    return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_vision_sees_what_the_models_own_processor_would_give(folders, vision):
    pixels = skimage.data.coffee()  # 400 x 600
    model = transformers.DINOv3ViTModel.from_pretrained(folders["vision"]).eval()
    mean, std = tiny_models.IMAGENET.values()
    with torch.no_grad():
        pooled = lambda values: model(pixel_values=values).pooler_output[0].numpy()  # noqa: E731
        right = _processor_pixels(pixels, (80, 112), mean, std)
        wanted = pooled(right)
        wrong = [
            pooled(_processor_pixels(pixels, (80, 112), [0.5] * 3, [0.5] * 3)),  # the VAE's [-1, 1]
            pooled(_processor_pixels(pixels, (80, 112), [0.0] * 3, [1 / 255] * 3)),  # 0..255
            pooled(right.flip(1)),  # blue first
        ]
    (vector,) = vision.encode([pixels])
    assert vector.shape == (tiny_models.VISION_WIDTH,) and vector.dtype == np.float32
    assert _cosine(vector, wanted) > 0.999
    assert all(_cosine(vector, other) < 0.999 for other in wrong)
    assert np.abs(vision.preprocess(vision.resizing(pixels)) - right[0].numpy()).max() < 0.02  # a level of 8 bits


def test_vision_may_be_a_convnext(tmp_path):
    folder = tiny_models.save_dinov3_convnext(tmp_path / "convnext")
    vision = encoders.load_vision({"name": "dinov3", "path": str(folder), "area": 96 * 96})
    pixels = skimage.data.coffee()
    right = _processor_pixels(pixels, (64, 128), *tiny_models.IMAGENET.values())  # sides are multiples of 32
    with torch.no_grad():
        wanted = transformers.DINOv3ConvNextModel.from_pretrained(folder).eval()(pixel_values=right).pooler_output[0]
    (vector,) = vision.encode([pixels])
    assert vision.resizing(pixels).shape[:2] == (64, 128) and vision.width == len(vector) == tiny_models.VISION_WIDTH
    assert _cosine(vector, wanted.numpy()) > 0.999
    with pytest.raises(InputError, match="at least one patch of 1024 pixels"):
        torch_encoders.DINOv3Vision(str(folder), dtype="float32", area=100)


def test_vision_takes_the_whole_picture_at_the_area_of_the_configuration(vision):
    for height, width in ((300, 300), (200, 600), (900, 90), (20, 20)):
        shape = vision.preprocess(vision.resizing(np.zeros((height, width, 3), np.uint8))).shape
        assert shape[1] % 16 == 0 and shape[2] % 16 == 0
        assert 0.6 < shape[1] * shape[2] / 96**2 < 1.5
    pixels = _photograph(200, 600)
    edge = pixels.copy()
    edge[:, :40] = 255 - edge[:, :40]  # a centre crop would not see it
    one, other = vision.encode([pixels, edge])
    assert _cosine(one, other) < 0.9999


def test_vision_result_does_not_depend_on_the_company(vision):
    pictures = [_photograph(100, 150), _photograph(150, 100), _photograph(128, 128), _photograph(102, 150)]
    for pixels, vector in zip(pictures, vision.encode(pictures)):
        assert np.allclose(vision.encode([pixels])[0], vector, atol=1e-4)


def test_vision_needs_the_processors_values(folders, tmp_path):
    folder = _copy(folders["vision"], tmp_path / "dinov3", leave_out="preprocessor_config.json")
    load = lambda: torch_encoders.DINOv3Vision(str(folder), dtype="float32", area=96 * 96)  # noqa: E731
    with pytest.raises(InputError, match=r"preprocessor_config.json is missing.*config.json"):
        load()
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "rescale_factor": 1 / 255}))
    with pytest.raises(InputError, match="has no image_std"):
        load()


# Folders of all kinds


def _copy(folder, target, leave_out):
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != leave_out:
            (target / path.name).write_bytes(path.read_bytes())
    return target


LOADERS = {
    "vae": lambda folder: torch_encoders.FluxVAE(str(folder), dtype="float32"),
    "text": lambda folder: torch_encoders.T5Text(str(folder), dtype="float32", max_tokens=64),
    "vision": lambda folder: torch_encoders.DINOv3Vision(str(folder), dtype="float32", area=96 * 96),
}
STEMS = {"vae": "diffusion_pytorch_model", "text": "model", "vision": "model"}


def _model_folder(folders, kind):
    return folders["vae"] / "vae" if kind == "vae" else folders[kind]


@pytest.mark.parametrize("kind", LOADERS)
def test_pickled_weights_are_refused_unopened(kind, folders, tmp_path):
    weights = f"{STEMS[kind]}.safetensors"
    folder = _copy(_model_folder(folders, kind), tmp_path / kind, leave_out=weights)
    (folder / f"{STEMS[kind]}.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InputError, match=rf"only {STEMS[kind]}.bin is there, a pickle.*download {weights}"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", LOADERS)
def test_missing_and_wrong_folders_are_named(kind, folders, tmp_path):
    with pytest.raises(InputError, match=rf"{kind}.path is empty.*--config.{kind}.path"):
        LOADERS[kind]("")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        LOADERS[kind](tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config.json is missing; it is empty"):
        LOADERS[kind](tmp_path)
    other = _model_folder(folders, {"vae": "text", "text": "vision", "vision": "text"}[kind])
    with pytest.raises(InputError, match=r"config.json says .* is wanted"):
        LOADERS[kind](other)


@pytest.mark.parametrize("kind", LOADERS)
def test_weights_that_do_not_fit_are_refused(kind, folders, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    name = f"{STEMS[kind]}.safetensors"
    folder = _copy(_model_folder(folders, kind), tmp_path / kind, leave_out="")
    weights = load_file(folder / name)
    gone = next(key for key in sorted(weights) if key.startswith("layer." if kind == "vision" else "encoder."))
    save_file({key: value for key, value in weights.items() if key != gone}, folder / name, metadata={"format": "pt"})
    with pytest.raises(InputError, match="do not belong together"):
        LOADERS[kind](folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", LOADERS)
def test_fingerprint_knows_the_weights(kind, folders, tmp_path):
    name = f"{STEMS[kind]}.safetensors"
    folder = _copy(_model_folder(folders, kind), tmp_path / kind, leave_out="")
    same = LOADERS[kind](folder).fingerprint
    assert same == LOADERS[kind](_model_folder(folders, kind)).fingerprint == json.loads(json.dumps(same))
    weights = load_file(folder / name)
    key = sorted(weights)[0]
    save_file(weights | {key: weights[key] + 1e-3}, folder / name, metadata={"format": "pt"})
    other = LOADERS[kind](folder).fingerprint
    assert {field for field in same if same[field] != other[field]} == {"weights"}


def test_t5_counts_what_it_has_no_tokens_for(text):
    caption = tiny_models.CORPUS[0]
    assert text.unknown(caption) == 0 and text.unknown("左边有一只红色的猫") >= 0.5
    assert 0 < text.unknown(f"{caption} 猫") < 0.25
