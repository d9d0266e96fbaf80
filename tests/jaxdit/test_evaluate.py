"""The evaluation of a real small run, by the real command."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import make_data
import numpy as np
import pytest
from tiny_run import tiny

from bench import gate_power
from encode import encoders
from encode.records import InputError
from encode.whole_files import write_json
from jaxdit import checkpoint, data, evaluate, exam, judge, judged_images, model, quality, quality_page, train, trained

ROOT = Path(__file__).parents[2]


def call(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jaxdit.evaluate", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A model of 200 steps on 24 of 40 generated photographs; untrained weights stand as step 1."""
    folder = tmp_path_factory.mktemp("quality")
    path = gate_power.photographs(folder, count=40)
    config = gate_power.configured(path, steps=200, layers=2, width=64, heads=2)
    config.data.holdout_fraction = 0.4
    config.sample.steps = 4
    train.train(config, folder / "run")
    checkpoint.save_weights(folder / "run", 1, untrained(config, data.Dataset(path).info))
    return folder / "run"


def untrained(config, described):
    """Weights at random, the last layer too: as a run begins with it, it is zero, and all that comes is the noise."""
    initial = model.initial_parameters(trained.model_settings(config.model, described["widths"]), 0)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32), initial)


@pytest.fixture(scope="module")
def judged(workdir):
    done = call(f"--workdir={workdir}", "--images=12")
    assert done.returncode == 0, done.stderr
    return done, evaluate.read(workdir / "evaluation" / "evaluation.jsonl")


def test_every_saved_step_has_a_row_and_the_trained_ones_are_better(judged, workdir):
    done, rows = judged
    assert [row["step"] for row in rows] == checkpoint.saved_steps(workdir) == [1, 200]
    first, last = rows
    for name in ("own", "alone"):
        assert last[name]["frechet"] < 0.7 * first[name]["frechet"]
        assert last[name]["kernel"] < first[name]["kernel"]
    assert last["own"]["frechet"] < last["alone"]["frechet"]  # the vector says what light there is
    assert last["loss"]["held_out/text_vision"] < 0.9 * first["loss"]["held_out/text_vision"]
    heard = [row["exchange"]["effects"]["light_by_vector"]["value"]["mean"] for row in rows]
    assert abs(heard[0]) < 0.1 < heard[1] - heard[0]
    assert last["held_out"] and last["images"] == 12 and last["usual"]["training"]["frechet"] < 10
    assert "Step 200 (averaged weights, 12 pictures" in done.stdout
    assert "few: the Fréchet distance is too high" in done.stdout


def test_the_page_shows_curves_pairs_and_what_must_be_known(judged, workdir):
    _, rows = judged
    page = (workdir / "evaluation" / "evaluation.html").read_text()
    for part in (
        "Through the training",
        "Fréchet distance",
        "nearest training image",
        "the held-out image",
        "Step 1<",
    ):
        assert part in page
    assert page.count("<img") == sum(len(strip["pictures"]) for row in rows for strip in row["strips"])
    assert "http" not in page.replace("http-equiv", "")
    for row in rows:  # other pictures, of a call that asks otherwise, do not take their place
        folders = {name.rsplit("/", 1)[0] for strip in row["strips"] for _, name in strip["pictures"]}
        assert folders == {f"pictures/averaged-{row['step']}-{row['asked']}"}


def test_a_second_call_does_only_what_is_missing_and_other_captions_are_asked_anew(
    judged, workdir, tmp_path, monkeypatch
):
    file = workdir / "evaluation" / "evaluation.jsonl"
    before = file.read_text()
    out = tmp_path / "out"
    shutil.copytree(workdir / "evaluation", out)
    lines = before.splitlines()
    (out / "evaluation.jsonl").write_text(f"{lines[0]}\n{lines[1][:200]}")  # the last one was cut off
    for name in ("known-places", "known-0123456789ab"):
        (out / name).mkdir()
    asked = []
    with mock.patch.object(exam, "sit", wraps=exam.sit) as sit:
        rows, problems = evaluate.evaluate(workdir, out, images=12)
        asked = [given.args[1].step for given in sit.call_args_list]
    assert asked == [200] and not problems
    old = json.loads(lines[1])
    assert rows[1] | {"seconds": 0} == old | {"seconds": 0}  # the same numbers
    assert (out / "known-places").is_dir() and not (out / "known-0123456789ab").exists()  # ours is of other data
    with mock.patch.object(exam, "sit", side_effect=AssertionError("nothing is missing")):
        assert evaluate.evaluate(workdir, out, images=12)[0] == rows

    given = judged_images.open_data

    def mended(*arguments):
        dataset = given(*arguments)
        dataset.info["mended_from"] = ["0" * 64]
        return dataset

    monkeypatch.setattr(judged_images, "open_data", mended)
    with mock.patch.object(exam, "sit", side_effect=ArithmeticError("asked")), pytest.raises(ArithmeticError):
        evaluate.evaluate(workdir, out, images=12)


@pytest.mark.all
def test_a_kill_leaves_whole_rows_and_the_next_call_goes_on(judged, workdir, tmp_path):
    command = [
        sys.executable, "-m", "jaxdit.evaluate", f"--workdir={workdir}", f"--out={tmp_path}", "--images=12",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "evaluation.jsonl"
    until = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = {row["step"]: dict(row, seconds=0) for row in evaluate.read(file)}
    assert there[200] == dict(judged[1][-1], seconds=0)  # the newest is the first to be there
    with mock.patch.object(exam, "sit", wraps=exam.sit) as sit:
        rows, problems = evaluate.evaluate(workdir, tmp_path, images=12)
        assert [row["step"] for row in rows] == [1, 200] and not problems
        assert [given.args[1].step for given in sit.call_args_list] == [step for step in (1,) if step not in there]


@pytest.mark.all
@pytest.mark.parametrize(
    "seconds", [0.5, 2.0, 2.7]
)  # the later ones in the midst of compiling, where JAX does not end well
def test_ctrl_c_ends_with_3(judged, workdir, tmp_path, seconds):
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxdit.evaluate", f"--workdir={workdir}", f"--out={tmp_path}", "--images=12"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / ".lock").exists():
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    words, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and "the same command does the rest" in words.lower() and "Traceback" not in errors


def test_a_step_that_a_training_removes_meanwhile_is_no_fault(judged, workdir, tmp_path, monkeypatch, capsys):
    copy, load = tmp_path / "run", trained.load
    shutil.copytree(workdir, copy)
    file = copy / "evaluation" / "evaluation.jsonl"
    file.write_text(file.read_text().splitlines()[-1] + "\n")  # step 1 is to be judged

    def late(*arguments, **options):
        shutil.rmtree(copy / "checkpoints" / "1")
        return load(*arguments, **options)

    monkeypatch.setattr(trained, "load", late)
    rows, problems = evaluate.evaluate(copy, copy / "evaluation", images=12)
    assert [row["step"] for row in rows] == [200] and problems == []
    assert "Step 1 is not there any more" in capsys.readouterr().out


def test_other_weights_under_the_same_step_are_judged_anew(judged, workdir, tmp_path):
    run = trained.load(workdir, step=200)
    before = evaluate._state(workdir, 200, False)
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    assert evaluate._state(copy, 200, False) == before  # a copy is the same save
    shutil.rmtree(copy / "checkpoints" / "200")
    checkpoint.save_weights(copy, 200, run.params)
    assert evaluate._state(copy, 200, False) != before


def test_training_images_given_out_as_samples_are_named_as_learnt_by_heart(workdir, tmp_path):
    """A model that answers every wish with a training image."""
    run = trained.load(workdir)
    dataset = data.Dataset(run.config["data"]["path"], holdout_fraction=0.4)
    vae = encoders.load_vae(dataset.info["encoders"]["vae"])
    paper = exam.prepare(
        run, dataset, tmp_path, images=12, vae=vae, vision=judged_images.load_vision(dataset), clip=None
    )  # fmt: skip
    (bucket,) = dataset.buckets
    stolen = [row["latent_flip"].astype(np.float32) for row in dataset.records(bucket, dataset.train[bucket])]

    drawn = []
    assert [row for _, row in paper.reference.places] == dataset.held_out[bucket].tolist()

    def steal(run, asked, given, options, most):
        yield [(k, stolen[wish.seed % len(stolen)].copy()) for k, wish in enumerate(asked)]

    with mock.patch.object(exam.drawing, "draw", steal):
        row, strips = exam.sit(paper, run, drawn.append)
    assert sum(drawn) == exam.pictures(paper)
    for name in ("own", "alone"):
        memory = row["memory"][name]["latents"]
        assert memory["memorised"] and memory["copies"] == 1.0 and memory["nearer"] == 1.0 and memory["closest"] < 1e-3
    told = " ".join(
        quality_page.findings(row | {"held_out": True, "images": 12, "real_images": 24, "width": 16, "usual": {}})
    )
    assert "Learnt by heart: 100%" in told and "by their latents" in told
    assert "Too weak: how far light moves" in told  # a thief does not listen
    words, ((_, drawn), (_, nearest), _) = strips[0][0], strips[0][1]
    assert "0.00 of the usual distance" in words and "mirrored" in words
    assert (
        np.abs(drawn.astype(int) - nearest).mean() < 1
    )  # mirrored: the picture that is shown is the view that was met


@pytest.mark.all
def test_without_held_out_images_the_training_images_stand_in_and_it_says_so(tmp_path):
    path, folder = tmp_path / "64", tmp_path / "run"
    make_data.dataset(path, {"64x64": 9, "48x80": 6}, vision=16)
    described = json.loads((path / "dataset.json").read_text())
    described["encoders"]["vision"]["area"] = 4096
    write_json(path / "dataset.json", described)
    config = tiny(path, **{"sample.steps": 2})
    checkpoint.save_weights(folder, 20, untrained(config, described))
    write_json(folder / "config.json", json.loads(config.to_json_best_effort()))
    write_json(folder / "dataset.json", described)
    ((row,), problems) = evaluate.evaluate(folder, tmp_path / "out", images=14)
    assert not problems and not row["held_out"] and "training" not in row["usual"]
    assert "No image of this run is held out" in " ".join(quality_page.findings(row))
    assert row["memory"]["own"]["latents"]["copies_real"] == 0  # an image is not its own neighbour
    assert set(row["loss"]) == {f"training/{name}" for name in ("text_vision", "text", "vision", "none")}


def test_what_cannot_be_judged_is_named(workdir, tmp_path):
    for wrong, words in (
        ({"steps": "7"}, "step 7 is not saved"),
        ({"steps": "a"}, "numbers with commas"),
        ({"clip": "/nowhere"}, "no such folder"),
        ({"data_path": tmp_path}, "dataset.json"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate.evaluate(workdir, tmp_path / "out", **wrong)
    done = call(f"--workdir={workdir}", "--images=0")
    assert done.returncode == 2 and "at least one" in done.stderr and "Traceback" not in done.stderr


def test_padding_is_not_looked_at():
    pixels = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 1:6] = 1
    np.testing.assert_array_equal(judged_images.whole(pixels, {"mask": mask}), pixels[8:24, 8:48])
    np.testing.assert_array_equal(judged_images.whole(pixels, {"mask": mask[:0, :0]}), pixels)


def test_what_is_known_of_training_images_is_read_once_and_exact(workdir, tmp_path):
    run = trained.load(workdir)
    dataset = data.Dataset(run.config["data"]["path"], holdout_fraction=0.4)
    known = judged_images.know(dataset, run, dataset.train, tmp_path / "training", 2, "training")
    (bucket,) = dataset.buckets
    assert [row for _, row in known.places] == dataset.train[bucket].tolist()
    record = dataset.records(bucket, dataset.train[bucket][3:4])[0]
    np.testing.assert_array_equal(known.vectors[3], np.stack([record["vision"], record["vision_flip"]]))
    flipped = data.normalized(record["latent_flip"].astype(np.float32)[None], run.dataset)
    np.testing.assert_array_equal(known.latents[3, 1], quality.thumbnails(flipped)[0])
    assert known.hashes[3] == record["pixel_hash"]
    with mock.patch.object(dataset, "records", side_effect=AssertionError("read again")):
        judged_images.know(dataset, run, dataset.train, tmp_path / "training", 2, "training")


def paper_of(count, **changes):
    """An exam of `count` prompts about vectors at random, whose models are not there."""
    random = np.random.default_rng(0)
    prompts = [
        {"id": f"{k}.png", "caption": f"caption {k}", "text": k, "vision": 100 + k, "bucket": "64x96", "mask": np.zeros((0, 0))}
        for k in range(count)
    ]  # fmt: skip
    known = [
        judged_images.Known(
            random.standard_normal((n, 1, 4)), np.zeros((n, 1, 3)), None, [("64x96", k) for k in range(n)]
        )
        for n in (26, 40)
    ]
    usual = {
        "dataset": None, "held_out": True, "prompts": prompts, "pixels": [f"real {k}" for k in range(count)],
        "judged": np.arange(0, count, 3), "examples": [], "asked": None, "why": "", "reference": known[0], "training": known[1],
        "usual": {}, "near": {}, "vae": None, "vision": object(), "clip": None,
    }  # fmt: skip
    return exam.Exam(**usual | changes)


def test_what_real_images_score_is_of_two_halves_and_of_as_many_training_images():
    np.testing.assert_array_equal(exam._some(np.arange(10), 4), [0, 2, 5, 7])
    np.testing.assert_array_equal(exam._some(np.arange(3), 4), [0, 1, 2])
    paper = paper_of(20)
    real, training = paper.reference.vectors[:, 0], paper.training.vectors[:, 0]
    found = exam._usual(paper)
    assert found["halves"] == quality.compare(real[::2], real[1::2]) and found["apart"] == quality.apart(real)
    assert found["training"] == quality.compare(real, training[::2])
    assert "training" not in exam._usual(paper_of(20, held_out=False))
    few = judged_images.Known(np.zeros((quality.FEWEST - 1, 1, 4)), None, None, [])
    assert exam._usual(paper_of(20, reference=few)) == {}
    some = dataclasses.replace(paper, prompts=paper.prompts[: quality.FEWEST - 1])
    assert exam._usual(some).keys() == {"halves", "apart"}
    assert exam._compared(paper, exam.Seen([], real[: quality.FEWEST], None, None)) is not None
    assert exam._compared(paper, exam.Seen([], real[: quality.FEWEST - 1], None, None)) is None


def test_pictures_are_counted_before_they_are_drawn():
    assert exam._repeated(paper_of(40))[:9] == [0, 0, 0, 2, 2, 2, 5, 5, 5] and len(exam._repeated(paper_of(40))) == 48
    assert exam.pictures(paper_of(12)) == 2 * 12 + 12 * 3
    assert exam.pictures(paper_of(12, asked=object())) == 2 * 12 + 3 * 4 + 12 * 3
    assert exam.pictures(paper_of(12, asked=object(), vision=None)) == 2 * 12 + 3 * 4


def test_pictures_of_one_prompt_have_seeds_of_their_own(monkeypatch):
    paper, random, asked = paper_of(3), np.random.default_rng(1), []
    alone, more = random.standard_normal((3, 4)), random.standard_normal((9, 4))

    def draw(paper, run, places, texts, visions, seeds, tell):
        asked.append((places, texts, visions, seeds))
        return exam.Seen([], more, None, None)

    monkeypatch.setattr(exam, "draw", draw)
    found = exam._diversity(paper, None, exam.Seen([], alone, None, None), None)
    ((places, texts, visions, seeds),) = asked
    assert places == texts == [0, 0, 0, 1, 1, 1, 2, 2, 2] and visions == [None] * 9
    assert seeds == [3, 6, 9, 4, 7, 10, 5, 8, 11]  # 0, 1 and 2 are those of the pictures before
    spread = [quality.apart(np.stack([alone[k], *more[3 * k : 3 * k + 3]])) for k in range(3)]
    assert found == {"one_prompt": pytest.approx(np.mean(spread)), "all_prompts": quality.apart(alone)}


def test_what_is_exchanged_is_given_with_the_seeds_of_the_swap_test(monkeypatch):
    examples = [SimpleNamespace(record={"text": f"text {k}", "vision": k}) for k in range(3)]
    asked = SimpleNamespace(by="side", pairs=[1, 2, 0], thirds=[2, 0, 1], exchanged=["x", "y", "z"])
    paper, given = paper_of(9, examples=examples, asked=asked), []

    def draw(paper, run, places, texts, visions, seeds, tell):
        given.append((places, texts, visions, seeds))
        return exam.Seen([len(given)], None, None, None)

    def measure(examples, asked, drawn):
        assert [drawn[name].pixels for name in ("vision", "text", "control")] == [[1], [2], [3]]
        assert [drawn[name].pixels for name in ("own", "text_only")] == [
            ["own 0", "own 3", "own 6"],
            ["alone 0", "alone 3", "alone 6"],
        ]
        return dict.fromkeys(("leaks", "text_only_latent", "text_only_ssim")), None, None

    monkeypatch.setattr(exam, "draw", draw)
    monkeypatch.setattr(exam.judge, "measure", measure)
    monkeypatch.setattr(exam.judge, "checks", lambda *_, **__: {})
    seen = {name: exam.Seen([f"{name} {k}" for k in range(9)], None, None, None) for name in ("own", "alone")}
    exam._exchange(paper, None, seen, None)
    texts, places = ["text 0", "text 1", "text 2"], [0, 3, 6]
    assert given == [
        (places, texts, [1, 2, 0], places),
        (places, ["x", "y", "z"], [0, 1, 2], places),
        (places, texts, [2, 0, 1], places),
    ]
    few = [None] * (judge.FEWEST - 1)
    assert exam._questions(few) == (None, "9 images are too few to exchange captions and vectors; 10 are needed.")
    monkeypatch.setattr(exam.judge, "questions", lambda examples: asked)
    monkeypatch.setattr(exam.judge, "cannot", lambda examples, asked: "")
    assert exam._questions([*few, None]) == (asked, "")


def test_pictures_are_drawn_as_the_run_samples_and_padding_is_what_it_was(monkeypatch):
    mask = np.zeros((12, 8), np.uint8)
    mask[2:10] = 1
    padded = {"mask": mask, "latent": np.full((12, 8, 16), 7, np.float16)}
    paper, asked, decoded, told = paper_of(2, vision=None, judged=np.array([1])), [], [], []
    paper.prompts[1] |= padded

    def decode(latents):
        decoded.append(latents.copy())
        return np.zeros((len(latents), 96, 64, 3), np.uint8)

    def draw(run, wishes, given, options, most):
        asked.extend([*wishes, *given, options])
        yield [(k, np.ones((12, 8, 16), np.float32)) for k in range(2)]

    monkeypatch.setattr(exam.drawing, "draw", draw)
    paper.vae = SimpleNamespace(decode=decode)
    sample = {"text_guidance": 2.0, "vision_guidance": 1.5, "steps": 7, "shift": 3.0}
    described = {"latent_mean": [0.0] * 16, "latent_std": [1.0] * 16, "widths": {"latent": 16}}
    described["buckets"] = {"64x96": {"count": 2, "latent": [12, 8, 16]}}
    run = SimpleNamespace(config={"sample": sample}, dataset=described)
    seen = exam.draw(paper, run, [0, 1], ["a", "b"], [None, "v"], [5, 6], told.append)
    for wish, seed in zip(asked[:2], (5, 6)):
        assert (wish.text, wish.vision, wish.seed, wish.size) == (2.0, 1.5, seed, (64, 96))
    assert [(given.text, given.vision) for given in asked[2:4]] == [("a", None), ("b", "v")]
    assert asked[4] == {"steps": 7, "shift": 3.0, "solver": "adams", "interval": None} and told == [2]
    assert (
        (decoded[0][0] == 1).all() and (decoded[0][1][mask == 1] == 1).all() and (decoded[0][1][mask == 0] == 7).all()
    )
    assert seen.pixels[0].shape == (96, 64, 3) and seen.pixels[1].shape == (64, 64, 3) and seen.vectors is None
    np.testing.assert_array_equal(seen.latents, decoded[0][1:])  # of the judged alone


def test_a_few_pictures_are_shown_spread_over_all_with_what_they_were_drawn_from():
    seen = {name: SimpleNamespace(pixels=[f"{name} {k}" for k in range(9)]) for name in ("own", "alone")}
    strips = exam._few(paper_of(9), seen)
    assert [caption for caption, _ in strips] == [f"caption {k}" for k in (0, 2, 4, 6)]
    assert strips[1][1] == [
        ("the held-out image", "real 2"), ("caption and vector", "own 2"), ("caption alone", "alone 2")
    ]  # fmt: skip
    assert exam._few(paper_of(9, held_out=False), seen)[0][1][0][0] == "the training image"


def test_the_pictures_nearest_to_training_images_are_shown_first_each_with_its_mirror_image_or_not():
    random = np.random.default_rng(2)
    distances, places = np.sort(random.random((9, 5))), random.integers(40, size=(9, 5))
    asked, paper = [], paper_of(9)

    def records(bucket, rows):
        asked.append((bucket, *rows))
        return [{"id": b"near.png", "latent": np.zeros((4, 4, 16)), "latent_flip": np.ones((4, 4, 16))}]

    paper.dataset = SimpleNamespace(records=records)
    paper.vae = SimpleNamespace(decode=lambda latents: np.full((1, 32, 32, 3), latents.max(), np.uint8))
    paper.training = judged_images.Known(
        None, np.zeros((40, 2, 3)) + np.array([[0.0], [1.0]]), None, paper.training.places
    )
    seen = {"own": SimpleNamespace(pixels=list(range(9)), thumbnails=np.arange(9)[:, None] % 2 * np.ones(3))}
    strips = exam._pairs(paper, seen, {"own": {"latents": (distances, places)}})
    closest = np.argsort(quality.closeness(distances))[: exam.PAIRS]
    assert asked == [("64x96", places[k, 0]) for k in closest] and len(strips) == exam.PAIRS
    for k, (words, (drawn, near, real)) in zip(closest, strips):
        assert words.endswith(f"drawn for {k}.png: caption {k}") and (", mirrored" in words) == bool(k % 2)
        assert drawn == ("caption and vector", k) and real == ("the held-out image", f"real {k}")
        assert near[0] == "nearest training image" and (near[1] == k % 2).all()
