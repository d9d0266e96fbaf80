import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from jaxdit import report, train, validate

ROOT = Path(__file__).parents[2]
COUNT = 24


def encode(photographs, out):
    command = [
        sys.executable, "-m", "encode.main", "--config=configs/encode_demo.py", f"--config.images={photographs}",
        f"--config.out={out}", "--config.resolutions=(64,)", "--config.max_buckets=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "64"


def trained_on(path, workdir, steps):
    config = quickstart.get_config()
    config.data.path = str(path)
    config.model.update(layers=3, width=96, heads=3)
    config.optim.warmup_steps = min(50, steps // 10)
    config.train.update(total_steps=steps, log_every=100)
    config.checkpoint.every = steps
    assert train.train(config, workdir) == "done"
    return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo pictures encoded twice: as they are, and with the captions shuffled among them."""
    root = tmp_path_factory.mktemp("gate")
    subprocess.run(
        [sys.executable, "-m", "encode.demo", f"--out={root / 'right'}", f"--count={COUNT}"], cwd=ROOT, check=True
    )
    (root / "shuffled").mkdir()
    order = np.random.default_rng(0).permutation(COUNT)
    for number, other in enumerate(order):
        name = f"figure-{number:04d}"
        (root / "shuffled" / f"{name}.png").write_bytes((root / "right" / f"{name}.png").read_bytes())
        caption = (root / "right" / f"figure-{other:04d}.txt").read_text()
        (root / "shuffled" / f"{name}.txt").write_text(caption)
    for kind in ("right", "shuffled"):
        encode(root / kind, root / f"encoded-{kind}")
    return root


@pytest.fixture(scope="module")
def passed(folder):
    workdir = trained_on(folder / "encoded-right" / "64", folder / "run", 900)
    return workdir, validate.gate(workdir, workdir / "gate")


def test_a_trained_model_passes(passed):
    workdir, result = passed
    assert result["verdict"] == "pass", result["averaged"]
    assert result == json.loads((workdir / "gate" / "gate.json").read_text())
    page = (workdir / "gate" / "gate.html").read_text()
    assert page.count("<img") == 7 * validate.SHOWN and "http" not in page.replace("http-equiv", "")


def test_the_same_numbers_come_twice(passed):
    workdir, result = passed
    again = validate.gate(workdir, workdir / "again")
    assert again["averaged"] == result["averaged"] and again["raw"] == result["raw"]


def test_a_model_trained_with_shuffled_captions_fails(folder):
    workdir = trained_on(folder / "encoded-shuffled" / "64", folder / "shuffled-run", 900)
    result = validate.gate(workdir, workdir / "gate", folder / "encoded-right" / "64")
    assert result["verdict"] == "fail"
    assert {"memory_text_only", "vision_composition"} & set(result["failed"])
    assert result["averaged"]["memory_text_only"] < 0.5


def test_an_untrained_model_fails_and_the_command_says_so(folder):
    workdir = trained_on(folder / "encoded-right" / "64", folder / "untrained", 10)
    done = subprocess.run(
        [sys.executable, "-m", "jaxdit.validate", f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "The gate: fail" in done.stdout
    assert json.loads((workdir / "gate" / "gate.json").read_text())["verdict"] == "fail"


def test_nothing_to_judge_is_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxdit.validate", f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "config.json is missing" in done.stderr and "Traceback" not in done.stderr


def examples(count=30):
    """Examples whose composition and light are known: a bright square at a place, in a colour."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(count):
        pixels = np.full((64, 64, 3), 40, np.uint8)
        row, column = divmod(n, 6)
        pixels[4 + 12 * row : 14 + 12 * row, 4 + 5 * column : 12 + 5 * column] = 200
        tint = rng.uniform(0.3, 1, 3)
        pixels = (pixels * tint).astype(np.uint8)
        record = {"text": np.full((2, 3), n, np.float32), "text_flip": np.full((2, 3), 100 + n, np.float32),
                  "vision": np.full(3, n, np.float32)}  # fmt: skip
        made.append(validate.Example(record, "64x64", pixels, pixels[:, ::-1]))
    return made


def draw_like(made, *, ignore=None):
    """What a perfect model would draw, or one that ignores a condition."""

    def draw(texts, visions):
        pictures = []
        for i, (text, vision) in enumerate(zip(texts, visions)):
            n, flipped = int(text[0, 0]) % 100, text[0, 0] >= 100
            light = made[i if vision is None else int(vision[0])]
            if ignore == "text":
                n, flipped = i * 7 % len(made), False
            shape = (made[n].flipped if flipped else made[n].pixels).astype(float)
            if ignore == "vision":
                light = made[n]
            elif ignore == "text" and vision is not None:
                shape = light.pixels.astype(float)
            grey = shape.max(-1, keepdims=True)
            pictures.append(np.clip(grey * light.pixels.mean((0, 1)) / grey.mean(), 0, 255).astype(np.uint8))
        return pictures

    return draw


def verdict(checks):
    return {name for name, threshold in validate.THRESHOLDS.items() if checks[name] < threshold}


def test_a_perfect_painter_passes_and_a_deaf_or_a_blind_one_fails():
    made = examples()
    assert verdict(validate.run_checks(made, draw_like(made))[0]) == set()
    assert verdict(validate.run_checks(made, draw_like(made, ignore="vision"))[0]) == {"vision_light"}
    deaf = verdict(validate.run_checks(made, draw_like(made, ignore="text"))[0])
    assert {"memory_text_only", "vision_composition", "text"} <= deaf


def test_without_sides_whole_captions_are_exchanged():
    made = examples()
    for example in made:
        example.record["text_flip"] = np.zeros((0, 3), np.float32)
    checks, _ = validate.run_checks(made, draw_like(made))
    assert "whole captions exchanged" in checks["text_by"] and checks["text"] == 1.0


def test_composition_ignores_the_light_and_light_the_composition():
    picture = np.asarray(Image.effect_noise((64, 64), 90).convert("RGB").resize((8, 8)).resize((64, 64)))
    tinted = (picture * [0.9, 0.6, 0.4]).astype(np.uint8)
    same = np.dot(validate.composition(picture), validate.composition(tinted)) / 1024
    mirrored = np.dot(validate.composition(picture), validate.composition(picture[:, ::-1])) / 1024
    assert same > 0.98 and mirrored < 0.6
    np.testing.assert_allclose(validate.light(picture), validate.light(picture[:, ::-1]), atol=1e-6)
    assert np.linalg.norm(validate.light(picture) - validate.light(tinted)) > 0.05


def test_too_few_images_cannot_be_judged(folder, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    for suffix in ("png", "txt"):
        (one / f"a.{suffix}").write_bytes((folder / "right" / f"figure-0000.{suffix}").read_bytes())
    workdir = trained_on(encode(one, tmp_path / "encoded"), tmp_path / "run", 10)
    done = subprocess.run(
        [sys.executable, "-m", "jaxdit.validate", f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "needs at least 2" in done.stdout
    assert json.loads((workdir / "gate" / "gate.json").read_text())["verdict"] == "incomplete"
    assert "incomplete" in report.write(workdir).read_text()


def test_the_page_of_a_run_shows_everything_and_escapes(passed, tmp_path):
    workdir, _ = passed
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "samples.json").write_text(
        json.dumps([{"file": "a.png", "prompt": "<img src=x> & 'q'", "reference": ""}])
    )
    page = report.write(workdir, samples=tmp_path).read_text()
    for part in ("The gate", "Loss", "Samples", "Configuration", "&lt;img src=x&gt; &amp;", "<svg"):
        assert part in page
