"""Where models run, and the proof that a device computes what the CPU does: it stops a run before anything wrong is given out."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from encode import devices, encoders, pipeline, torch_encoders
from encode.records import InputError
from tests.encode import fakes, tiny_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "vae": tiny_models.save_vae(root / "vae"),
        "text": tiny_models.save_t5(root / "t5"),
        "vision": tiny_models.save_dinov3(root / "dinov3"),
        "convnext": tiny_models.save_dinov3_convnext(root / "convnext"),
    }


def _vision(folder, dtype):
    return torch_encoders.DINOv3Vision(str(folder), dtype=dtype, area=96 * 96)


LOADERS = {
    "vae": lambda folder, dtype: torch_encoders.FluxVAE(str(folder), dtype=dtype),
    "text": lambda folder, dtype: torch_encoders.T5Text(str(folder), dtype=dtype, max_tokens=64),
    "vision": _vision,
    "convnext": _vision,
}
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
FEED = {
    "vae": lambda encoder: encoder.encode(PICTURE[None]),
    "text": lambda encoder: encoder.encode(["a cat"]),
    "vision": lambda encoder: encoder.encode([PICTURE]),
    "convnext": lambda encoder: encoder.encode([PICTURE]),
}


@pytest.fixture
def doubted(folders, monkeypatch):
    """Loads an encoder on a CPU that is believed no more than a GPU."""
    monkeypatch.setattr(devices, "REFERENCE", ())
    return lambda kind, dtype="float32": LOADERS[kind](folders[kind], dtype)


# Which device


def _available(monkeypatch, **counts):
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda kind=kind: counts.get(kind, 0) > 0)
        monkeypatch.setattr(getattr(torch, kind), "device_count", lambda kind=kind: counts.get(kind, 0))


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    _available(monkeypatch, cuda=1, mps=1)
    assert devices.choose("auto") == torch.device("cuda")
    _available(monkeypatch, mps=1)
    assert devices.choose("auto") == torch.device("mps")
    _available(monkeypatch)
    assert devices.choose("auto") == devices.choose("cpu") == torch.device("cpu")


def test_a_device_is_taken_by_name_or_refused_in_a_sentence(monkeypatch):
    _available(monkeypatch, cuda=2)
    assert devices.choose("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"config.device=cuda:2: there are 2, counted from cuda:0"):
        devices.choose("cuda:2")
    with pytest.raises(InputError, match=r"config.device=mps: this PyTorch .* sees no such device; choose auto or cpu"):
        devices.choose("mps")
    with pytest.raises(InputError, match="'gpu': unknown; the choices are auto, cpu, cuda"):
        devices.choose("gpu")
    with pytest.raises(InputError, match="sees no such device"):
        devices.choose("meta")


def test_where_the_models_run_is_said_in_one_line(folders, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    config = ConfigDict({"device": "cpu"})
    config.vae = {"name": "flux", "path": str(folders["vae"]), "dtype": "bfloat16"}
    config.text = {"name": "t5", "path": str(folders["text"]), "dtype": "bfloat16", "max_tokens": 64}
    config.vision = {"name": "dinov3", "path": str(folders["vision"]), "area": 9216, "precomputed": False}
    assert len(encoders.load_all(config)) == 3
    assert "VAE and T5 run on the CPU, bfloat16; DINOv3 runs on the CPU, float32." in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    card = devices.describe(torch.device("cuda"))
    models = [type("Encoder", (), {"runs": (model, card, "bfloat16")}) for model in ("VAE", "T5", "DINOv3")]
    assert encoders.running(models) == "VAE, T5 and DINOv3 run on NVIDIA GeForce RTX 4090 (cuda), bfloat16."


def test_demo_encoders_say_nothing_and_need_no_torch(caplog):
    caplog.set_level(logging.INFO)
    demo = {"name": "demo", "max_tokens": 8, "area": 4096, "precomputed": True}
    found = encoders.load_all(ConfigDict({"vae": demo, "text": demo, "vision": demo}))
    assert found[2] is None and not caplog.text


def test_a_device_that_does_not_compute_in_the_dtype_is_refused(monkeypatch):
    def refuse(*args, **options):
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(
        InputError, match=r"does not compute in bfloat16 \(BFloat16 is not.*float32, or config.device to cpu"
    ):
        devices._refuse_dtype(torch.bfloat16, torch.device("mps"))


# The proof


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_good_device_proves_itself_at_once_and_every_thousand_inputs(kind, dtype, doubted, monkeypatch):
    encoder = doubted(kind, dtype)
    proofs = []
    monkeypatch.setattr(encoder, "prove", lambda whole=encoder.prove: proofs.append(1) or whole())
    for _ in range(3):
        FEED[kind](encoder)
    assert len(proofs) == 1
    encoder._until_proof = 1
    FEED[kind](encoder)
    assert len(proofs) == 2 and encoder._until_proof == devices.PROVE_EVERY


@pytest.mark.parametrize("kind", LOADERS)
def test_nothing_is_given_out_by_a_device_that_is_wrong_from_the_start(kind, doubted):
    encoder = doubted(kind)
    with torch.no_grad():
        for parameter in encoder._module.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    with pytest.raises(devices.EncoderFailed, match=r"is off by \d+%, 20% is the limit, compared with the CPU"):
        FEED[kind](encoder)


def test_a_vae_that_goes_bad_after_eighty_pictures_is_found_before_its_batch_is_given_out(doubted, monkeypatch):
    """torch.compile of a VAE encoder has done so under ROCm."""
    vae, count, given = doubted("vae"), 0, 0
    whole = vae._module.encoder.forward
    monkeypatch.setattr(devices, "PROVE_EVERY", 40)

    def forward(values):
        nonlocal count
        count += len(values)
        return whole(values) if count < 80 else whole(values.flip(3))

    monkeypatch.setattr(vae._module.encoder, "forward", forward)
    with pytest.raises(devices.EncoderFailed, match="VAE on the CPU: the code is off by"):
        for _ in range(40):
            given += len(vae.encode(np.stack([PICTURE] * 4)))
    assert 30 < given < 80 + 40


def test_a_run_stops_at_a_bad_device_with_nothing_of_the_shard_written(doubted, monkeypatch, tmp_path):
    found = pipeline.Encoders(doubted("vae"), doubted("text"), doubted("vision"))
    calls, whole = [], found.vae._module.encoder.forward
    monkeypatch.setattr(devices, "PROVE_EVERY", 8)  # the shards have two pictures, each encoded with its mirror image

    def forward(values):
        calls.append(1)
        return whole(values if len(calls) < 6 else values.flip(3))

    monkeypatch.setattr(found.vae._module.encoder, "forward", forward)
    config = fakes.config(fakes.photographs(tmp_path / "in", 12), tmp_path / "out")
    with pytest.raises(pipeline.WorkFailed, match="EncoderFailed: VAE on the CPU: the code is off by"):
        pipeline.run(config, found)
    assert len(list((tmp_path / "out").rglob("*.array_record*"))) == 1  # calls 1 to 5: one shard, and three proofs
    assert not list((tmp_path / "out").rglob("dataset.json"))


def test_a_decoder_alone_that_is_wrong_shows_in_the_round_trip(doubted, monkeypatch):
    vae = doubted("vae")
    whole = vae._module.decoder.forward
    monkeypatch.setattr(vae._module.decoder, "forward", lambda values, *rest: whole(values, *rest).flip(2))
    with pytest.raises(devices.EncoderFailed, match="the round trip is off by"):
        vae.encode(PICTURE[None])


WRONG = {
    "zeros": (torch.zeros_like, "attention is zero everywhere"),
    "saturated": (lambda values: torch.full_like(values, 512.0), "attention is off by"),  # pytorch/pytorch#189849
    "twice as large": (lambda values: 2 * values, "attention is off by 100%"),
    "not a number": (lambda values: values * torch.nan, "attention is not finite"),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("kind", ["vae", "text", "vision"])
def test_attention_is_held_to_the_plain_formula(kind, how, doubted, monkeypatch):
    spoil, words = WRONG[how]
    encoder = doubted(kind, "bfloat16")
    whole = torch.nn.functional.scaled_dot_product_attention
    shape = encoder.attention
    wanted = [2, shape.heads, shape.tokens, shape.size]

    def attention(query, *rest, **options):  # wrong at the shape of the proof alone, so that only the proof can see it
        result = whole(query, *rest, **options)
        return spoil(result) if list(query.shape) == wanted else result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with pytest.raises(devices.EncoderFailed, match=words):
        FEED[kind](encoder)


def test_the_shapes_of_attention_are_the_models_own(folders):
    shapes = {kind: LOADERS[kind](folders[kind], "float32").attention for kind in LOADERS}
    assert shapes["vae"] == devices.Attention(1, 16, 4096)
    assert shapes["text"] == devices.Attention(4, 8, 64, bias=True)
    assert shapes["vision"] == devices.Attention(4, 12, 36 + 5) and shapes["convnext"] is None


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("value, words", [(0.0, "zero everywhere"), (float("nan"), "not finite")])
def test_a_result_of_zeros_or_no_number_stops_at_once_on_any_device(kind, value, words, folders):
    encoder = LOADERS[kind](folders[kind], "float32")
    with torch.no_grad():
        for parameter in encoder._module.parameters():
            parameter.fill_(value)
    with pytest.raises(devices.EncoderFailed, match=f"a result is {words}"):
        FEED[kind](encoder)


def test_the_cpu_is_the_reference_and_proves_nothing(folders):
    assert LOADERS["text"](folders["text"], "bfloat16")._expected is None


def test_memory_in_the_order_of_channels_changes_no_latent(folders):
    """What cuDNN's convolutions want; this machine has none, so the module is only asked on the CPU."""
    vae = LOADERS["vae"](folders["vae"], "float32")
    before = vae.encode(PICTURE[None])
    vae._module = vae._module.to(memory_format=torch.channels_last)
    assert np.allclose(vae.encode(PICTURE[None]), before, atol=1e-5)


def test_the_encoders_module_is_not_loaded_with_the_demo_ones():
    """PyTorch takes seconds; other tests of this process may have loaded it."""
    code = "import sys; import encode.encoders; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_selftest_reports_what_it_found_and_refuses_where_there_is_no_gpu(doubted, monkeypatch, capsys):
    from encode import selftest

    found = selftest.judge(doubted("vision", "bfloat16"), lambda: [PICTURE] * 2, "pictures", rounds=3)
    assert found.startswith("DINOv3: 3 rounds agree with the CPU (largest error: attention 0.")
    monkeypatch.setattr(selftest.flags, "FLAGS", selftest.SimpleNamespace(device="cpu", dtype="bfloat16", rounds=2))
    monkeypatch.setattr(selftest, "vae", lambda *_: doubted("vae"))
    monkeypatch.setattr(selftest, "text", lambda *_: _zeroed(doubted("text")))
    monkeypatch.setattr(selftest, "vision", lambda *_: doubted("vision"))
    monkeypatch.setattr(selftest, "_pictures", lambda: np.stack([PICTURE] * 2))
    assert selftest.main() == 1
    said = capsys.readouterr()
    assert said.out.count("agree with the CPU (") == 2 and "must not encode" in said.out
    assert "T5 on the CPU: the code of a caption is zero everywhere" in said.err
    monkeypatch.setattr(devices, "REFERENCE", ("cpu",))
    assert selftest.main() == 2 and "no GPU is seen" in capsys.readouterr().err


def test_selftest_has_models_of_the_real_shapes(monkeypatch):
    from encode import selftest

    text = selftest.text(torch.float32, torch.device("cpu"))
    assert text.encode(["a cat"])[0].shape == (6, 1024) and text.attention.heads == 16


def _zeroed(encoder):
    with torch.no_grad():
        for parameter in encoder._module.parameters():
            parameter.zero_()
    return encoder
