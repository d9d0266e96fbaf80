import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from encode.records import InputError, write_json
from jaxdit import checkpoint, data, model, sample, trained

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A working folder with random weights at step 3, over two encoded demo pictures."""
    root = tmp_path_factory.mktemp("sample")
    for command in (
        ["encode.demo", f"--out={root / 'photographs'}", "--count=6"],
        ["encode.main", f"--config.images={root / 'photographs'}", f"--config.out={root / 'out'}",
         "--config.resolutions=(64,)"],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    config = quickstart.get_config()
    config.data.path = str(root / "out" / "64")
    config.model.update(layers=1, width=32, heads=2)
    run = root / "run"
    run.mkdir()
    dataset = json.loads((root / "out" / "64" / "dataset.json").read_text())
    write_json(run / "config.json", json.loads(config.to_json_best_effort()))
    write_json(run / "dataset.json", dataset)
    settings = trained.model_settings(config.model, dataset["widths"])
    params = jax.jit(partial(model.initial_parameters, settings, 0))()
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), params)
    saver = checkpoint.Checkpoints(run, every=1, keep=1)
    saver.save(3, {"params": jax.tree.map(jnp.zeros_like, params)}, params, {})
    saver.wait()
    saver.close()
    return run


def call(workdir, out, *arguments):
    command = [sys.executable, "-m", "jaxdit.sample", f"--workdir={workdir}", f"--out={out}", "--steps=2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_prompts_with_one_reference_for_all_give_pictures_of_the_asked_size(workdir, tmp_path):
    reference = next((workdir.parent / "photographs").glob("*.png"))
    done = call(workdir, tmp_path, "--prompt=a figure on the left", "--prompt=<b> & \"q\" 猫", f"--reference={reference}",
                "--width=64", "--height=96")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "samples.json").read_text())
    assert [row["prompt"] for row in rows] == ["a figure on the left", '<b> & "q" 猫']
    for row in rows:
        with Image.open(tmp_path / row["file"]) as picture:
            assert picture.size == (64, 96) and picture.text["prompt"] == row["prompt"]


def test_without_a_prompt_training_captions_are_drawn(workdir, tmp_path):
    done = call(workdir, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "samples.json").read_text())
    assert len(rows) == 6 and all("figure" in row["prompt"] and row["reference"].endswith(".png") for row in rows)


def test_an_unreadable_reference_is_named_and_the_others_are_drawn(workdir, tmp_path):
    good = next((workdir.parent / "photographs").glob("*.png"))
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:2000])
    done = call(workdir, tmp_path / "out", f"--reference={good}", f"--reference={tmp_path / 'bad.png'}")
    assert done.returncode == 2 and "bad.png" in done.stderr and "Traceback" not in done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=a", "--width=700", "--height=1000"], "the nearest size is 704x992"),
        (["--prompt=a", "--prompt=b", "--prompt=c", "--reference=x", "--reference=y"], "3 prompts and 2 references"),
        (["--prompt=a", "--step=7"], "step 7 wanted, found steps 3"),
    ],
)
def test_wrong_calls_are_one_sentence_and_exit_code_2(workdir, tmp_path, arguments, words):
    done = call(workdir, tmp_path, *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def conditions(run, count):
    rng = np.random.default_rng(1)
    texts = [rng.standard_normal((3 + n, 128)).astype(np.float32) for n in range(count)]
    visions = list(rng.standard_normal((count, 16)).astype(np.float32))
    return texts, visions


def test_a_picture_alone_equals_the_same_in_a_batch(workdir):
    run = trained.load(workdir)
    texts, visions = conditions(run, 3)
    options = {"seed": 4, "steps": 3, "shift": 1.0, "text": 2.0, "vision": 1.5}
    together = trained.generate(run, trained.conditions_of(texts, visions, run), (8, 8, 16), [0, 1, 2], **options)
    alone = trained.generate(run, trained.conditions_of(texts[1:2], visions[1:2], run), (8, 8, 16), [1], **options)
    np.testing.assert_allclose(alone[0], together[1], atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_conditions_reach_the_picture_and_absent_ones_do_not(workdir):
    run = trained.load(workdir)
    texts, visions = conditions(run, 1)

    def draw(text, vision):
        weights = sample.guidance(2.0, 1.5, [text], [vision])
        given = trained.conditions_of([text], [vision], run)
        return trained.generate(
            run, given, (8, 8, 16), [0], seed=0, steps=2, shift=1.0, text=weights[0], vision=weights[1]
        )

    four = [draw(texts[0], visions[0]), draw(texts[0], None), draw(None, visions[0]), draw(None, None)]
    for i in range(4):
        for j in range(i):
            assert np.abs(four[i] - four[j]).max() > 1e-3


def test_guidance_needs_no_evaluation_for_what_is_absent():
    assert sample.guidance(3.0, 1.5, ["t"], [None]) == (3.0, 1.0)  # two evaluations
    assert sample.guidance(3.0, 1.5, [None], ["v"]) == (1.5, 1.5)  # two
    assert sample.guidance(3.0, 1.5, [None], [None]) == (1.0, 1.0)  # one
    assert sample.guidance(3.0, 1.5, ["t"], ["v"]) == (3.0, 1.5)  # three


def test_latents_come_back_in_the_scale_of_the_data(workdir):
    run = trained.load(workdir)
    mean, std = np.array(run.dataset["latent_mean"]), np.array(run.dataset["latent_std"])
    np.testing.assert_allclose(data.denormalize(np.zeros((1, 2, 2, 16)), run.dataset)[0, 0, 0], mean, rtol=1e-5)
    np.testing.assert_allclose(data.denormalize(np.ones((1, 2, 2, 16)), run.dataset)[0, 0, 0], mean + std, rtol=1e-5)


def test_only_a_working_folder_with_weights_is_loaded(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        trained.load(tmp_path)
