"""Models by their Hugging Face id: from a cache without a network, and every way in which they cannot be had."""

import errno
import fnmatch
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors

from encode import encoders, torch_encoders, weights
from encode.records import InputError
from tests.encode import tiny_models

REVISION = "0123456789abcdef0123456789abcdef01234567"
IDS = {
    "vae": "black-forest-labs/FLUX.1-schnell",
    "text": "google-t5/t5-large",
    "vision": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}
SECTIONS = {
    "vae": {"name": "flux", "dtype": "float32"},
    "text": {"name": "t5", "dtype": "float32", "max_tokens": 64},
    "vision": {"name": "dinov3", "area": 96 * 96},
}
LOAD = {"vae": encoders.load_vae, "text": encoders.load_text, "vision": encoders.load_vision}
WANTED = {"vae": torch_encoders.VAE, "text": torch_encoders.TEXT, "vision": torch_encoders.VISION}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache as `hf download` leaves it: snapshots full of links into blobs."""
    root = tmp_path_factory.mktemp("hub")
    for kind, save in (
        ("vae", tiny_models.save_vae),
        ("text", tiny_models.save_t5),
        ("vision", tiny_models.save_dinov3),
    ):
        save(_snapshot(root, IDS[kind]) / ("vae" if kind == "vae" else ""))
    for number, path in enumerate([path for path in root.rglob("*") if path.is_file() and path.parent.name != "refs"]):
        blob = root / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(blob)
    return root


def _snapshot(root, name):
    folder = root / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "snapshots").mkdir()
    return folder / "snapshots" / REVISION


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        assert options.get("local_files_only"), "the network is asked although the cache has all"
        return real(*args, **options)

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize("kind", IDS)
def test_models_come_from_the_cache_without_a_word_to_the_network(kind, cache, no_network, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    by_name = LOAD[kind](SECTIONS[kind] | {"path": IDS[kind]})
    folder = cache / f"models--{IDS[kind].replace('/', '--')}" / "snapshots" / REVISION
    by_folder = LOAD[kind](SECTIONS[kind] | {"path": str(folder)})
    assert by_name.fingerprint == by_folder.fingerprint
    assert by_name.model in encoders.running([by_name]) and encoders.running([by_name]).endswith("on the CPU, float32.")


def test_what_is_fetched_is_what_is_read():
    flux = """vae/config.json vae/diffusion_pytorch_model.safetensors text_encoder_2/config.json tokenizer_2/spiece.model
        text_encoder_2/model-00001-of-00002.safetensors text_encoder_2/model.safetensors.index.json model_index.json
        flux1-schnell.safetensors ae.safetensors text_encoder/model.safetensors transformer/config.json README.md
        transformer/diffusion_pytorch_model-00001-of-00003.safetensors tokenizer/vocab.json"""
    t5 = """config.json model.safetensors pytorch_model.bin tf_model.h5 flax_model.msgpack rust_model.ot spiece.model
        tokenizer.json generation_config.json onnx/model.onnx README.md"""
    picked = lambda kind, names: {  # noqa: E731
        name for name in names.split() if any(fnmatch.fnmatch(name, pattern) for pattern in WANTED[kind].patterns)
    }
    assert picked("vae", flux) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert picked("text", flux) == {
        name for name in flux.split() if name.startswith(("text_encoder_2/", "tokenizer_2/"))
    }
    assert picked("text", t5) == {"config.json", "model.safetensors", "spiece.model", "tokenizer.json"}


def _hub(monkeypatch, tmp_path, answer, size=5_000_000, fetch=None):
    """A hub whose cache is empty and which answers to a download with an exception, or with a folder."""
    calls = []

    def snapshot_download(name, *, allow_patterns, local_files_only=False, dry_run=False):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not there")
        calls.append(dry_run)
        if isinstance(answer, Exception):
            raise answer
        if dry_run:
            return [huggingface_hub.DryRunFileInfo(REVISION, size, "config.json", "", False, True)]
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return calls


def _response(status):
    import httpx2  # what huggingface_hub itself asks with

    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


def _dry(cause):
    error = errors.DryRunError("Dry run cannot be performed")
    error.__cause__ = cause
    return error


REFUSALS = {
    "gated, no login": (
        lambda: errors.GatedRepoError("401", response=_response(401)),
        r"asks for consent first: accept the terms at https://\S+/facebook/x, then run `hf auth login`",
    ),
    "gated, asked for": (
        lambda: _dry(errors.GatedRepoError("403", response=_response(403))),
        r"consent first.*hf auth login",
    ),
    "no such repository": (
        lambda: _dry(errors.RepositoryNotFoundError("404", response=_response(404))),
        r"no such repository is at https://\S+/facebook/x .*wanted is DINOv3",
    ),
    "not cached, offline": (
        lambda: errors.LocalEntryNotFoundError("Cannot find\nmore"),
        r"cannot be reached .*Cannot find\)",
    ),
    "half cached": (
        lambda: errors.IncompleteSnapshotError("1 file is missing", snapshot_path="/x"),
        "cannot be reached",
    ),
    "no network": (lambda: _dry(ConnectionRefusedError("refused")), r"cannot be reached .*hf download facebook/x"),
    "disk full": (
        lambda: OSError(errno.ENOSPC, "No space left on device"),
        r"the disk of \S+cache is full \(No space.*make room, or set HF_HOME",
    ),
    "hub down": (
        lambda: errors.HfHubHTTPError("503", response=_response(503)),
        "answers with status 503; try again later",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_model_that_cannot_be_had_is_one_sentence_that_says_what_to_do(case, monkeypatch, tmp_path):
    make, words = REFUSALS[case]
    _hub(monkeypatch, tmp_path, make())
    with pytest.raises(InputError, match=words) as caught:
        weights.find(WANTED["vision"], "facebook/x")
    text = str(caught.value)
    assert text.startswith("vision.path=facebook/x: ") and "\n" not in text and text.endswith(".")


def test_offline_by_choice_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        weights.find(WANTED["text"], "google-t5/t5-large")


def test_download_is_announced_with_its_size_and_checked(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    calls = _hub(monkeypatch, tmp_path, tiny_models.save_dinov3(tmp_path / "there"))
    folder, config = weights.find(WANTED["vision"], "facebook/x")
    assert config["model_type"] == "dinov3_vit" and folder == tmp_path / "there" and calls == [True, False]
    assert f"vision.path=facebook/x: downloading 5 MB from {constants.ENDPOINT} into {tmp_path}" in caplog.text
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # as google/t5-v1_1-large has been published
    with pytest.raises(InputError, match=r"this repository has no model\.safetensors"):
        weights.find(WANTED["vision"], "facebook/x")


def test_download_that_cannot_fit_is_refused_before_it_begins(monkeypatch, tmp_path):
    calls = _hub(monkeypatch, tmp_path, tmp_path, size=10**18)
    with pytest.raises(InputError, match=r"is full \(1,000,000,000,000 MB are needed, .* MB are free\)"):
        weights.find(WANTED["vision"], "facebook/x")
    assert calls == [True]


def test_half_a_snapshot_in_the_cache_is_completed_from_the_network(cache, monkeypatch, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text("{}")
    whole = tiny_models.save_dinov3(tmp_path / "whole")
    answers = iter([half, None, whole])

    def snapshot_download(name, dry_run=False, **options):
        return [] if (answer := next(answers)) is None else str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert weights.find(WANTED["vision"], "facebook/x")[0] == whole


def test_no_network_is_told_within_seconds(tmp_path):
    """Really: nothing listens at port 9."""
    code = "from encode import encoders; encoders.load_vision({'name': 'dinov3', 'path': 'facebook/x', 'area': 9216})"
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - began < 40  # most of it imports PyTorch
    assert "InputError: vision.path=facebook/x: no folder of this name is here" in done.stderr
    assert "http://127.0.0.1:9 cannot be reached (ConnectError" in done.stderr


@pytest.mark.parametrize("path", ["a/b/c", "./a/b", "/a/b", "~/a", "a", "a/../b", "a/-b"])
def test_what_can_be_no_id_is_never_asked_for(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(InputError, match="no such folder"):
        weights.find(WANTED["text"], path)


def test_sharded_weights_are_hashed_whole_and_may_not_lack_a_part(tmp_path):
    tiny = tiny_models.save_dinov3(tmp_path / "tiny")
    whole = encoders.load_vision(SECTIONS["vision"] | {"path": str(tiny)})
    import transformers

    transformers.DINOv3ViTModel.from_pretrained(tiny).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    (tmp_path / "parts" / "preprocessor_config.json").write_bytes((tiny / "preprocessor_config.json").read_bytes())
    parts = encoders.load_vision(SECTIONS["vision"] | {"path": str(tmp_path / "parts")})
    shards = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) > 1 and parts.fingerprint["weights"] != whole.fingerprint["weights"]
    picture = np.full((96, 96, 3), 90, np.uint8)
    assert np.allclose(parts.encode([picture]), whole.encode([picture]), atol=1e-6)
    shards[0].unlink()
    with pytest.raises(InputError, match=f"{shards[0].name} is missing; download it again"):
        encoders.load_vision(SECTIONS["vision"] | {"path": str(tmp_path / "parts")})


def test_parts_of_weights_are_hashed_in_the_order_of_their_names(tmp_path):
    names = [f"model-{number:05d}-of-00009.safetensors" for number in range(1, 10)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    parts = {f"layer {number}": name for number, name in enumerate(reversed(names))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    wanted = hashlib.sha256("".join(names).encode()).hexdigest()
    text = weights.Wanted("text", "T5", "model_type", ("t5",), "model")
    assert weights.weights_hash(text, tmp_path) == wanted
