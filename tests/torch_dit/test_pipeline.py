"""The pipeline around small models of the real classes, against encode's encoders and jaxdit's sampler."""

import json
from functools import partial
from types import SimpleNamespace

import exported_run
import jax
import numpy as np
import pytest
import skimage.data
import torch
from flax import nnx
from PIL import Image, ImageCms

from encode import encoders as ours
from encode import images
from encode.records import InputError
from jaxdit import export, sampler, trained
from tests.encode import tiny_models
from tests.encode.test_images_modes import grey_profile
from torch_dit import encoders
from torch_dit.pipeline import JaxditPipeline

PROMPT = "A cat sits right next to the window."
LIMIT = 12
LOAD = {"vae": ours.load_vae, "text": ours.load_text, "vision": ours.load_vision}
OPTIONS = {"width": 64, "height": 48, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "vae": tiny_models.save_vae(root / "flux" / "vae").parent,
        "text": tiny_models.save_t5(root / "t5"),
        "vision": tiny_models.save_dinov3(root / "dinov3"),
    }


@pytest.fixture(scope="module")
def sections(folders):
    return {
        "vae": {"name": "flux", "path": str(folders["vae"]), "dtype": "float32"},
        "text": {"name": "t5", "path": str(folders["text"]), "dtype": "float32", "max_tokens": LIMIT},
        "vision": {
            "name": "dinov3",
            "path": str(folders["vision"]),
            "dtype": "float32",
            "area": 96 * 96,
            "precomputed": False,
        },
    }


@pytest.fixture(scope="module")
def loaded(sections):
    return {kind: LOAD[kind](section, "cpu") for kind, section in sections.items()}


@pytest.fixture(scope="module")
def workdir(sections, loaded, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    exported_run.make_data.dataset(
        root / "64", {"64x48": 4}, text=tiny_models.TEXT_WIDTH, vision=tiny_models.VISION_WIDTH
    )
    dataset = json.loads((root / "64" / "dataset.json").read_text())
    dataset["encoders"] = sections
    dataset["fingerprint"] = {kind: json.loads(json.dumps(encoder.fingerprint)) for kind, encoder in loaded.items()}
    return exported_run.make(root / "run", dataset)


@pytest.fixture(scope="module")
def by_reference(workdir):
    export.export(workdir, workdir.parent / "referring")
    return JaxditPipeline.from_pretrained(workdir.parent / "referring")


@pytest.fixture(scope="module")
def copied(workdir):
    export.export(workdir, workdir.parent / "copied", copy=True)
    return workdir.parent / "copied"


def drawn(workdir, loaded, texts, visions, noise, *, text, vision):
    """What jaxdit draws from the same noise: [b, h, w, 3] uint8."""
    run = trained.load(workdir)
    tokens = [None if one is None else one.astype(exported_run.make_data.BF16).astype(np.float32) for one in texts]
    given = trained.conditions_of(tokens, visions, run)

    @jax.jit
    def sample(x, given):
        weights = sampler.guidance_weights(text, vision).repeat(len(texts), 1)
        table = sampler.solver_table("euler", sampler.time_grid(3, run.config["sample"]["shift"]))
        terms = sampler.needed_terms(weights)
        model, weights = nnx.merge(run.graph, run.params), jax.numpy.asarray(weights)
        options = {"table": jax.numpy.asarray(table), "terms": terms, "weights": weights}
        return sampler.advance(model, sampler.start(x), given, **options)[1]

    latents = np.asarray(sample(noise.permute(0, 2, 3, 1).numpy(), given))
    latents = latents * np.float32(run.dataset["latent_std"]) + np.float32(run.dataset["latent_mean"])
    return loaded["vae"].decode(latents)


def test_pictures_are_jaxdits_with_every_kind_of_guidance_and_of_absence(workdir, loaded, by_reference):
    picture, other = skimage.data.coffee()[:, :500], skimage.data.astronaut()[:200]
    tokens, vectors = loaded["text"].encode([PROMPT])[0], loaded["vision"].encode([picture, other])
    noise = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    draw = partial(by_reference, latents=noise, output_type="np", **OPTIONS)
    given = partial(drawn, workdir, loaded, noise=noise)
    mixed = 0.75 * vectors[0] + 0.25 * vectors[1]
    reference = Image.fromarray(picture)
    evaluations = []
    by_reference.transformer.register_forward_hook(lambda module, inputs, out: evaluations.append(len(out)))
    cases = [
        (draw([PROMPT, ""], [reference, other], [3, 1], guidance_text=3.0, guidance_vision=1.5), 6,
         given([tokens, None], [mixed, mixed], text=3.0, vision=1.5)),
        (draw([PROMPT, PROMPT], reference, guidance_text=2.5, guidance_vision=1.0), 4,
         given([tokens] * 2, [vectors[0]] * 2, text=2.5, vision=1.0)),
        (draw(PROMPT, guidance_text=2.5, num_images_per_prompt=2), 4, given([tokens] * 2, [None] * 2, text=2.5, vision=1.0)),
        (draw("", vectors[0], guidance_vision=2.0, num_images_per_prompt=2), 4,
         given([None] * 2, [vectors[0]] * 2, text=2.0, vision=2.0)),
        (draw(["", ""]), 2, given([None] * 2, [None] * 2, text=1.0, vision=1.0)),
    ]  # fmt: skip
    pictures = [np.round(255 * result.images).astype(int) for result, _, _ in cases]
    for found, (_, count, wanted), made in zip(pictures, cases, evaluations[::3], strict=True):
        assert found.shape == (2, 48, 64, 3) and found.std() > 5
        assert np.abs(found - wanted).max() <= 1
        assert made == count
    assert all(np.abs(one - two).max() > 10 for k, one in enumerate(pictures) for two in pictures[:k])


def test_encoders_taken_along_draw_the_same_and_import_again(workdir, by_reference, copied, tmp_path):
    pipeline = JaxditPipeline.from_pretrained(copied)
    assert all(pipeline.config.encoders[kind]["path"] == "" for kind in ("vae", "text", "vision"))
    options = dict(OPTIONS, output_type="np", reference=skimage.data.coffee())
    one, two = (
        pipe(PROMPT, generator=torch.Generator().manual_seed(1), **options).images for pipe in (by_reference, pipeline)
    )
    np.testing.assert_array_equal(one, two)
    export.take_in(copied, tmp_path / "new")
    dataset = trained.describe(tmp_path / "new")[1]
    for kind, load in LOAD.items():
        assert load(dataset["encoders"][kind], "cpu").fingerprint == dataset["fingerprint"][kind]


def test_a_pipeline_that_is_saved_and_loaded_by_diffusers_draws_the_same(by_reference, tmp_path):
    by_reference.save_pretrained(tmp_path)
    again = JaxditPipeline.from_pretrained(tmp_path)
    one, two = (
        pipeline(PROMPT, generator=torch.Generator().manual_seed(1), output_type="latent", **OPTIONS).images
        for pipeline in (by_reference, again)
    )
    assert torch.equal(one, two)


def test_a_picture_depends_on_its_own_generator_alone(by_reference):
    seeds = [torch.Generator().manual_seed(k) for k in (3, 4)]
    draw = partial(by_reference, PROMPT, output_type="latent", **OPTIONS)
    both = draw(num_images_per_prompt=2, generator=seeds).images
    alone = draw(generator=torch.Generator().manual_seed(4)).images
    assert (both[1] - alone[0]).abs().max() < 1e-4 < (both[0] - alone[0]).abs().max()


def test_another_encoder_than_that_of_the_training_is_refused(workdir, folders, copied, tmp_path):
    section = json.loads((workdir.parent / "referring" / "model_index.json").read_text())["encoders"]
    other = tiny_models.save_vae(tmp_path / "vae", scaling_factor=1.0)
    (other / "diffusion_pytorch_model.safetensors").write_bytes(
        (folders["vision"] / "model.safetensors").read_bytes()
    )  # fmt: skip
    with pytest.raises(ValueError, match="weights of the vae encoder are not those that the model was trained with"):
        encoders.load("vae", section["vae"] | {"path": str(other)})
    with pytest.raises(ValueError, match=r"config\.json is missing, so the vae encoder is not there"):
        encoders.load("vae", section["vae"] | {"path": str(folders["text"].parent)})
    with pytest.raises(ValueError, match="tokenizer of the text encoder are not those"):
        encoders.load("text", section["text"] | {"fingerprint": {"tokenizer": "0" * 64}})
    dataset = json.loads((workdir / "dataset.json").read_text())
    dataset["fingerprint"]["vae"]["weights"] = "0" * 64
    other = exported_run.make(tmp_path / "run", dataset)
    with pytest.raises(InputError, match="not the weights that the data set was encoded with"):
        export.export(other, tmp_path / "out", copy=True)
    assert not (tmp_path / "out").exists()


def test_precomputed_vectors_take_vectors_alone(workdir, tmp_path):
    dataset = json.loads((workdir / "dataset.json").read_text())
    dataset["fingerprint"]["vision"] = {"id": "precomputed"}
    export.export(exported_run.make(tmp_path / "run", dataset), tmp_path / "out")
    pipeline = JaxditPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.image_encoder is None
    pipeline("", np.ones(tiny_models.VISION_WIDTH), output_type="latent", **OPTIONS)
    with pytest.raises(ValueError, match="no image encoder of which it knows how to use it; give a vector"):
        pipeline("", skimage.data.coffee(), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 70}, "70x48: both sides must be multiples of 16"),
        ({"reference": [np.ones(48), np.ones(48)], "reference_weights": [1.0]}, "one a reference"),
        ({"reference": np.ones(47)}, r"shape \(47,\); the model takes 48"),
        ({"latents": torch.zeros(1, 16, 8, 6)}, r"\(1, 16, 6, 8\) is wanted"),
    ],
)
def test_what_cannot_be_is_refused(by_reference, options, words):
    with pytest.raises(ValueError, match=words):
        by_reference(PROMPT, **OPTIONS | options)


def test_references_are_read_as_the_training_data_were(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    narrow = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))  # of another kind of colour: counts as sRGB
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "profile.png", icc_profile=narrow.tobytes())
    Image.fromarray(pixels[..., :3]).quantize(32).save(tmp_path / "palette.png")
    for kind in ("png", "tif"):
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257 + 100).save(tmp_path / f"deep.{kind}")
    Image.fromarray(pixels, mode="CMYK").save(tmp_path / "print.tif")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey-profile.png", icc_profile=grey_profile(2))
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            found = np.asarray(encoders.upright(image), int)
        assert np.abs(found - images.decode(path, 10**6)).max() <= 1, path.name


def test_references_are_mixed_by_their_shares_whatever_their_sum(by_reference):
    vectors = np.random.default_rng(0).standard_normal((2, tiny_models.VISION_WIDTH)).astype(np.float32)
    kept = by_reference.config.normalize_vision
    try:
        by_reference.register_to_config(normalize_vision=False)
        found = by_reference._vision(list(vectors), [3, 1])
    finally:
        by_reference.register_to_config(normalize_vision=kept)
    np.testing.assert_allclose(found, 0.75 * vectors[0] + 0.25 * vectors[1], rtol=1e-5, atol=1e-6)


def test_prompts_of_other_lengths_leave_each_other_alone_and_copies_stand_side_by_side(by_reference):
    noise = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    draw = partial(by_reference, output_type="latent", guidance_text=3.0, **OPTIONS)
    long, short = (draw(prompt, latents=noise).images for prompt in (PROMPT, "A cat."))
    assert (long - short).abs().max() > 1e-3
    found = draw([PROMPT, "A cat."], latents=noise.repeat(4, 1, 1, 1), num_images_per_prompt=2).images
    torch.testing.assert_close(found, torch.cat([long, long, short, short]), rtol=1e-4, atol=1e-4)


def test_pixels_are_the_vaes_values_by_the_formula():
    values = torch.linspace(-1.2, 1.2, 3 * 64).reshape(1, 3, 8, 8)
    vae = SimpleNamespace(dtype=torch.float32, decode=lambda latents: SimpleNamespace(sample=values))
    found = encoders.decode({"name": "flux"}, vae, torch.zeros(1, 16, 1, 1))
    wanted = np.clip(np.round((values.numpy() + 1) * np.float32(127.5)), 0, 255).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found, wanted.astype(np.uint8))
