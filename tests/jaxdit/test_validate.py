import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from bench import gate_power
from configs import quickstart
from encode import encoders
from jaxdit import data, judge, model, report, train, trained, validate

ROOT = Path(__file__).parents[2]
SMALL = {"layers": 3, "width": 96, "heads": 3}
pytestmark = pytest.mark.usefixtures("often_run")


def judged(path, workdir, fault="", steps=900):
    return gate_power.judged(path, workdir, steps=steps, fault=fault, **SMALL)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jaxdit.validate", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def photographs(once):
    """24 of the generated photographs, encoded at 64 x 64."""
    folder = once("gate-photographs", lambda folder: gate_power.photographs(folder, count=24))
    return folder / "encoded" / "64"


@pytest.fixture(scope="module")
def passed(once, photographs, often_run):
    """(workdir, gate.json) of a model that was trained well."""
    workdir = once("gate-passed", lambda folder: judged(photographs, folder / "run")) / "run"
    return workdir, json.loads((workdir / "gate" / "gate.json").read_text())


def test_a_trained_model_passes_and_the_record_holds_everything(passed):
    _, result = passed
    assert result["verdict"] == "pass", (result["failed"], result["averaged"])
    assert result["rule"] == judge.GENERATED and result["thresholds"] == judge.THRESHOLDS | {"smallest_effect": 0.1}
    assert set(result["checks"]) == {*judge.THRESHOLDS, "light_by_vector", "composition_by_caption", "conditioning"}
    assert result["weights"]["averaged"] != result["weights"]["raw"]
    assert len(result["examples"]) == 24
    for place, example in enumerate(result["examples"]):
        assert example["noise"] == place and example["vector_of"] != example["id"]
        assert set(example["ratios"]) == set(judge.THRESHOLDS) - {"memory_margin"}
    share = np.mean([example["ratios"]["text_only_ssim"] < 1 for example in result["examples"]])
    assert share == pytest.approx(result["averaged"]["text_only_ssim"], abs=1e-3)


def test_the_page_shows_what_decided_worst_first(passed):
    workdir, result = passed
    page = (workdir / "gate" / "gate.html").read_text()
    assert page.count("<img") == 6 * 6 + 4 * (4 * 3 + 4 * 4) and "http" not in page.replace("http-equiv", "")
    ratios = sorted((e["ratios"]["vision_light"] for e in result["examples"]), reverse=True)
    start = page.index(judge.WORDS["vision_light"].replace("'", "&#x27;"), page.index("of 24; the worst first"))
    places = [page.index(f"(ratio {ratio:.2f})", start) for ratio in ratios[:4]]
    assert places == sorted(places)


def test_the_same_numbers_come_twice(passed):
    workdir, result = passed
    again = validate.gate(workdir, workdir / "again")
    for name in ("checks", "raw_checks", "averaged", "raw", "examples", "weights", "data_fingerprint"):
        assert again[name] == result[name], name


@pytest.mark.all
def test_an_untrained_model_fails_and_the_command_says_so(photographs, tmp_path):
    train.train(gate_power.configured(photographs, steps=1, **SMALL), tmp_path / "run")
    done = run(f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1, done.stderr
    assert (
        "The gate: fail. Step 1. Look" in done.stdout
        and "memory_latent: 0." in done.stdout
        and "next to nothing" in done.stdout
    )
    result = json.loads((tmp_path / "run" / "gate" / "gate.json").read_text())
    assert result["verdict"] == "fail" and gate_power.FAULTS["untrained"][2] <= set(result["failed"])


def test_a_model_trained_without_text_fails_where_text_is_asked_for(photographs, tmp_path):
    with mock.patch.object(validate, "gate"):  # the command judges it
        judged(photographs, tmp_path / "run", "text always dropped", steps=150)
    done = run(f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "The gate: fail. Step 150. Look" in done.stdout, done.stderr
    result = json.loads((tmp_path / "run" / "gate" / "gate.json").read_text())
    assert {"text_only_ssim", "text_composition"} <= set(result["failed"])
    assert result["checks"]["conditioning"]["value"] == [
        "null_vision has not moved"
    ]  # never used: text was, as null text
    assert any("null_vision has not moved" in line and "hides the condition" in line for line in result["advice"])


def test_faults_of_the_bench_do_what_they_say(photographs):
    dataset = data.Dataset(photographs)
    arguments = dataset.buckets[0], np.arange(4), np.ones(4, bool)
    sound = dataset.read(*arguments)
    with gate_power.rolled("vision"):
        np.testing.assert_array_equal(dataset.read(*arguments)["vision"][1:], sound["vision"][:-1])
    with gate_power.unswapped():
        wrong = dataset.read(*arguments)
    plain = dataset.read(dataset.buckets[0], np.arange(4), np.zeros(4, bool))
    np.testing.assert_array_equal(wrong["text"], plain["text"])
    np.testing.assert_array_equal(wrong["latent"], sound["latent"])
    assert (dataset.read(*arguments)["text"] != plain["text"]).any()


def test_both_weights_are_read_before_anything_is_drawn(passed, tmp_path, monkeypatch):
    workdir, _ = passed  # a training beside this removes the raw ones
    with mock.patch.object(trained, "load", wraps=trained.load) as load:
        monkeypatch.setattr(validate, "score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            validate.gate(workdir, tmp_path)
    assert [call.kwargs.get("raw", False) for call in load.call_args_list] == [False, True]


def test_a_projection_that_stands_still_is_named(passed, photographs):
    """Weights with one projection put back to where it started."""
    workdir, _ = passed
    run, dataset = trained.load(workdir), data.Dataset(photographs)
    settings = trained.model_settings(run.config["model"], run.dataset["widths"])
    initial = model.initial_parameters(settings, run.config["train"]["seed"])
    params = dict(run.params) | {"vision_in": initial["vision_in"], "vision_out": initial["vision_out"]}
    still = trained.Trained(run.config, run.dataset, run.graph, params, run.step)
    assert validate.dead_projections(run, still, dataset) == [
        [],
        ["vision_in has not moved", "vision_out has not moved"],
    ]
    assert validate.fingerprint(params) != validate.fingerprint(run.params)


def test_padding_is_not_compared(passed, photographs):
    workdir, _ = passed
    run, dataset = trained.load(workdir), data.Dataset(photographs)
    vae = encoders.load_vae(dataset.info["encoders"]["vae"])
    examples = validate.gather(dataset, run, vae)[:2]
    latent = examples[0].record["latent"]
    mask = np.ones(latent.shape[:2], np.uint8)
    mask[:, -2:] = 0
    examples[0].record = {**examples[0].record, "mask": mask}
    drawn = validate.draw_all(run, vae, examples, [None] * 2, [None] * 2)
    wanted = np.stack([example.latent for example in examples])
    np.testing.assert_allclose(drawn.latents[0][:, -2:], wanted[0][:, -2:], atol=1e-5)
    assert np.abs(drawn.latents[0][:, :-2] - wanted[0][:, :-2]).max() > 0.1
    assert np.abs(drawn.latents[1][:, -2:] - wanted[1][:, -2:]).max() > 0.1


def test_nothing_to_judge_is_exit_code_2(tmp_path):
    done = run(f"--workdir={tmp_path}")
    assert done.returncode == 2 and "config.json is missing" in done.stderr and "Traceback" not in done.stderr


def test_a_gate_that_breaks_off_is_exit_code_2_not_a_failed_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validate.flags, "FLAGS", SimpleNamespace(workdir=str(tmp_path), out=None, data=None))
    for what, code in (RuntimeError("RESOURCE_EXHAUSTED"), 2), (KeyboardInterrupt(), 3):
        monkeypatch.setattr(validate, "gate", mock.Mock(side_effect=what))
        assert validate.main() == code
    said = capsys.readouterr()
    assert "of the model that says nothing" in said.err and "RESOURCE_EXHAUSTED" in said.err
    assert said.out == "Stopped.\n"


def test_own_photographs_are_judged_by_effects_beyond_controls(photographs, tmp_path):
    """Captions of one's own: the same pictures, said in other words."""
    pictures = photographs.parents[1] / "photographs"
    own = tmp_path / "own"
    own.mkdir()
    for file in pictures.glob("*.png"):
        (own / file.name).write_bytes(file.read_bytes())
        (own / f"{file.stem}.txt").write_text(file.with_suffix(".txt").read_text().replace("A figure", "Somebody"))
    path = encode(own, tmp_path / "encoded")
    result = judged(path, tmp_path / "run", steps=10)
    assert result["rule"] == judge.OWN and result["verdict"] == "fail"
    assert set(judge.EFFECTS) <= set(result["checks"]) and "vision_light" not in result["checks"]


def encode(pictures, out):
    command = [
        sys.executable, "-m", "encode.main", "--config=configs/encode_demo.py", f"--config.images={pictures}",
        f"--config.out={out}", "--config.resolutions=(64,)", "--config.max_buckets=1",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out / "64"


def test_too_few_images_cannot_be_judged(photographs, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    for suffix in ("png", "txt"):
        (one / f"a.{suffix}").write_bytes(
            (photographs.parents[1] / "photographs" / f"figure-0000.{suffix}").read_bytes()
        )
    config = quickstart.get_config()
    config.data.path = str(encode(one, tmp_path / "encoded"))
    config.model.update(SMALL)
    config.optim.warmup_steps = 1
    config.train.update(total_steps=10)
    train.train(config, tmp_path / "run")
    done = run(f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and "needs at least 10" in done.stdout
    assert json.loads((tmp_path / "run" / "gate" / "gate.json").read_text())["verdict"] == "incomplete"
    assert "incomplete" in report.write(tmp_path / "run").read_text()


def test_the_page_of_a_run_shows_everything_and_escapes(passed, tmp_path):
    workdir, _ = passed
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "samples.json").write_text(
        json.dumps([{"file": "a.png", "prompt": "<img src=x> & 'q'", "reference": ""}])
    )
    page = report.write(workdir, samples=tmp_path).read_text()
    for part in ("The gate", "Loss", "Samples", "Configuration", "&lt;img src=x&gt; &amp;", "<svg", "worst first"):
        assert part in page
