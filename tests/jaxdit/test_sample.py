import functools
import json
import logging
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs import quickstart
from encode import commandline
from encode.records import InputError
from encode.whole_files import write_json
from jaxdit import album, checkpoint, data, drawing, model, sample, trained

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
    params = jax.jit(functools.partial(model.initial_parameters, settings, 0))()
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), params)
    saver = checkpoint.Checkpoints(run, every=1, keep=1)
    saver.save(3, {"params": jax.tree.map(jnp.zeros_like, params)}, params, {})
    saver.wait()
    saver.close()
    return run


@pytest.fixture(scope="module")
def load():
    return functools.cache(trained.load)


@pytest.fixture
def quick(monkeypatch):
    """Pictures of the right shape without a model, each a function of its seed."""

    def generate(run, conditions, shape, positions, *, seed, **options):
        return np.stack([np.random.default_rng(number).standard_normal(shape).astype(np.float32) for number in seed])

    monkeypatch.setattr(trained, "generate", generate)


@pytest.fixture
def command(workdir, load, tmp_path, monkeypatch, capsys):
    """The command, in this process: (exit code, what it says). Its flags are its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trained, "load", load)

    def call(*arguments, out=tmp_path / "out", steps=2, folder=workdir):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        for name in ("string", "multi_string", "list", "integer", "float", "bool", "enum"):
            define = getattr(real, f"DEFINE_{name}")
            monkeypatch.setattr(flags, f"DEFINE_{name}", functools.partial(define, flag_values=values))
        sample.define_flags()
        try:
            values(["sample", f"--workdir={folder}", f"--out={out}", f"--steps={steps}", *arguments])
            code = sample.main()
        except InputError as error:
            code = commandline.fail(str(error), 2)
        said = capsys.readouterr()
        return code, said.out + said.err

    real = SimpleNamespace(**vars(flags))
    return call


@pytest.fixture
def photographs(workdir):
    return sorted((workdir.parent / "photographs").glob("*.png"))


def rows(out):
    return json.loads((out / "samples.json").read_text())


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_the_command_line_ends_with_its_exit_codes(workdir, tmp_path):
    def call(*arguments):
        words = [sys.executable, "-m", "jaxdit.sample", f"--workdir={workdir}", f"--out={tmp_path}", "--steps=1"]
        return subprocess.run([*words, "--cache=", *arguments], cwd=ROOT, capture_output=True, text=True)

    done = call('--prompt=<b> & "q" 猫', "--size=64x96")
    assert done.returncode == 0, done.stderr
    assert [row["prompt"] for row in rows(tmp_path)] == ['<b> & "q" 猫']
    done = call("--prompt=a", "--solver=rk4")
    assert done.returncode == 2 and "solver" in done.stderr and "Traceback" not in done.stderr


def test_prompts_with_one_reference_for_all_give_pictures_of_the_asked_size(command, quick, photographs, tmp_path):
    code, said = command("--prompt=a figure", '--prompt=<b> & "q" 猫', f"--reference={photographs[0]}", "--size=64x96")
    assert code == 0, said
    found = rows(tmp_path / "out")
    assert [row["prompt"] for row in found] == ["a figure", '<b> & "q" 猫']
    assert [row["file"] for row in found] == ["a-figure-s0.png", "b-q-猫-s0.png"]
    for row in found:
        with Image.open(tmp_path / "out" / row["file"]) as picture:
            assert picture.size == (64, 96) and picture.text["prompt"] == row["prompt"]
            assert picture.text["reference"] == str(photographs[0])
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 2 * 200 and sheet.height > 96


def test_without_a_prompt_training_captions_are_drawn(command, monkeypatch, photographs, tmp_path):
    code, said = command()
    assert code == 0, said
    found = rows(tmp_path / "out")
    assert len(found) == 6 and all("figure" in row["prompt"] for row in found)
    assert all(re.fullmatch(r"id:.*\.png", row["reference"]) and not row["reference_hash"] for row in found)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert "-m jaxdit.sample" in sheet.text["command"]
    # The command of a picture means the data set's image, whatever file of that name lies in the folder.
    shutil.copy(photographs[0], tmp_path / found[0]["reference"].removeprefix("id:"))
    monkeypatch.chdir(tmp_path)
    with Image.open(tmp_path / "out" / found[0]["file"]) as picture:
        words = shlex.split(picture.text["command"])[3:]
    wanted = [word for word in words if not word.startswith(("--workdir", "--out"))]
    assert command(*wanted, out=tmp_path / "again")[0] == 0
    np.testing.assert_array_equal(
        pixels(tmp_path / "again" / found[0]["file"]), pixels(tmp_path / "out" / found[0]["file"])
    )


def test_names_that_are_not_utf8_are_drawn_from_and_told(command, quick, monkeypatch, photographs, tmp_path):
    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.png")
    shutil.copy(photographs[0], odd)
    monkeypatch.setattr(sys, "argv", ["sample", f"--reference={odd}"])
    code, said = command("--prompt=a", "--prompt=b", f"--reference={odd}")
    assert code == 0, said
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert "caf\ufffd.png" in sheet.text["command"]


def test_an_unreadable_reference_is_named_and_the_others_are_drawn(command, quick, photographs, tmp_path):
    (tmp_path / "bad.png").write_bytes(photographs[0].read_bytes()[:2000])
    np.save(tmp_path / "short.npy", np.zeros(7))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    names = (photographs[0], tmp_path / "bad.png", tmp_path / "short.npy", tmp_path / "object.npy", "nobody.png")
    code, said = command(*(f"--reference={name}" for name in names))
    assert code == 1 and len(rows(tmp_path / "out")) == 1
    assert all(f"--reference={name}: " in said for name in names[1:]) and f"{photographs[0]}: cannot" not in said
    assert "[7] of float64; the model takes a vector of 16 numbers" in said and "without pickle" in said


def test_a_picture_that_failed_is_nowhere_said_to_be_there(command, quick, photographs, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"none")
    names = [tmp_path / "bad.png", tmp_path / "bad.png", photographs[0]]  # the same wish twice
    code, said = command(
        *(f"--reference={name}" for name in names),
        "--prompt=a",
        "--prompt=a",
        "--prompt=b",
        f"--init={tmp_path}/no.png",
    )
    assert code == 1 and f"--init={tmp_path}/no.png: cannot be read" in said and "there already" not in said
    assert not list((tmp_path / "out").glob("*.png")) and not (tmp_path / "out" / "samples.json").exists()
    code, said = command(*(f"--reference={name}" for name in names), "--prompt=a", "--prompt=a", "--prompt=b")
    assert code == 1 and said.count("bad.png") == 1 and [row["prompt"] for row in rows(tmp_path / "out")] == ["b"]
    code, said = command(f"--init={tmp_path}/no.png")
    assert code == 1 and f"Error: --init={tmp_path}/no.png: cannot be read" in said


def test_each_condition_may_be_absent_and_unguided_nothing_is_evaluated_twice(
    command, monkeypatch, photographs, tmp_path
):
    """SMP-05."""
    terms, draw = [], trained._sample
    monkeypatch.setattr(
        trained, "_sample", lambda *a, **options: (terms.append(options["terms"]), draw(*a, **options))[1]
    )
    (tmp_path / "list.jsonl").write_text(
        "".join(json.dumps(fields) + "\n" for fields in (
            {"prompt": "a", "reference": str(photographs[0])}, {"prompt": "b"}, {"reference": str(photographs[0])}, {}
        ))
    )  # fmt: skip
    for weight, wanted in (("1", {(2,)}), ("2", {(0, 2), (1, 2), (2,)})):
        terms.clear()
        code, said = command(
            f"--prompts={tmp_path / 'list.jsonl'}", f"--guidance_text={weight}", f"--guidance_vision={weight}",
            out=tmp_path / weight,
        )  # fmt: skip
        assert code == 0, said
        found = rows(tmp_path / weight)
        assert len(found) == 4 and set(terms) == wanted
        assert len({pixels(tmp_path / weight / row["file"]).tobytes() for row in found}) == 4


def test_a_size_on_the_grid_is_drawn_as_asked(command, quick, tmp_path):
    """SMP-08."""
    assert command("--prompt=a", "--size=832x1216")[0] == 0
    assert pixels(tmp_path / "out" / "a-s0.png").shape == (1216, 832, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=a", "--size=700x1000"], "the nearest size is 704x992"),
        (["--prompt=a", "--size=64"], "size='64' is not WIDTHxHEIGHT"),
        (["--prompt=a", "--size=64x64", "--aspect=1:1"], "one of them is enough"),
        (["--prompt=a", "--prompt=b", "--prompt=c", "--reference=x", "--reference=y"], "3 prompts and 2 references"),
        (["--prompt=a", "--reference=x", "--mix=1,2"], "a mix is of two"),
        (["--prompt=a", "--step=7"], "step 7"),
        (["--prompt=a", "--steps=0"], "at least one step"),
        (["--prompt=a", "--guidance_text=1,2"], "add --grid"),
        (["--prompt=a", "--guidance_text=much"], "numbers with commas"),
        (["--prompt=a", "--guidance_interval=0.8,0.2"], "LOW <= HIGH"),
        (["--prompt=a", "--guidance_text=nan"], "--guidance_text=nan: numbers are wanted"),
        (["--prompt=a", "--guidance_vision=inf"], "--guidance_vision=inf: numbers are wanted"),
        (["--prompt=a", "--shift=nan"], "--shift=nan"),
        (["--prompt=a", "--strength=0.5"], "needs a picture to start from"),
        (["--prompt=a", "--init=x.png", "--strength=0"], "strength=0: from above 0"),
        (["--prompt=a", "--init=x.png", "--strength=1.5"], "strength=1.5"),
        (["--prompt=a", "--seed=-1"], "seeds go from 0"),
        (["--prompt=a", "--count=0"], "count=0"),
        (["--prompts=nowhere.txt"], "nowhere.txt"),
        (["--prompts=nowhere.txt", "--reference=x", "--mix=0.5,0.5"], "name the mix in the list"),
    ],
)
def test_wrong_calls_are_one_sentence_and_exit_code_2(command, tmp_path, arguments, words):
    code, said = command(*arguments)
    assert code == 2 and words in said and said.count("Error") == 1
    assert not list((tmp_path / "out").glob("*.png"))


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def spoilt(config, section, name, value):
    return config | {section: config[section] | {name: value}}


def remove(run, name):
    for path in run.glob(name):
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (lambda run: remove(run, "checkpoints/*/ema"), [], r"its averaged weights .* \(--raw\): 3"),
        (lambda run: remove(run, "checkpoints/*/state"), ["--raw"], r"its raw weights .* \(without --raw\): 3"),
        (lambda run: remove(run, "checkpoints/*"), [], "no checkpoint has been saved yet"),
        (lambda run: (run / "config.json").unlink(), [], "config.json is missing, so this is not a working folder"),
        (lambda run: (run / "dataset.json").write_text('{"a'), [], "cannot be read as JSON"),
        (lambda run: rewrite(run / "config.json", lambda old: {}), [], "config.json: 'data' is missing"),
        *(
            (lambda run, new=new: rewrite(run / "config.json", lambda old: spoilt(old, *new)), [], words)
            for new, words in (
                (("model", "layers", "1"), r'config\.json: model\.layers is "1", .* writes a whole number'),
                (("model", "width", None), r"config\.json: model\.width is null"),
                (("model", "remat", True), r"config\.json: model\.remat is true, .* a word; put back"),
                (("sample", "shift", "3"), r'config\.json: sample\.shift is "3", .* writes a number'),
            )
        ),
        (
            lambda run: rewrite(run / "config.json", lambda old: old | {"model": old["model"] | {"layers": 2}}),
            [],
            r"has shape \[1, .*asks for \[2, .*use the configuration that the run began with",
        ),
    ],
)
def test_a_working_folder_that_cannot_be_drawn_from_is_one_sentence(
    command, workdir, tmp_path, spoil, arguments, words
):
    shutil.copytree(workdir, tmp_path / "run")
    spoil(tmp_path / "run")
    code, said = command("--prompt=a", *arguments, folder=tmp_path / "run")
    assert code == 2 and re.search(words, said) and said.count("\n") == 1, said
    assert not list((tmp_path / "out").glob("*.png"))


def test_of_a_step_that_is_half_written_the_one_before_is_drawn_and_said(command, quick, workdir, tmp_path, caplog):
    shutil.copytree(workdir, tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved / "3", saved / "9.orbax-checkpoint-tmp")
    with caplog.at_level(logging.WARNING):
        assert command("--prompt=a", folder=tmp_path / "run")[0] == 0
    assert "step 9 are not complete" in caplog.text and "step 3 is taken" in caplog.text
    assert [row["step"] for row in rows(tmp_path / "out")] == ["3"]


def test_a_folder_that_cannot_be_written_to_is_named(command, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        code, said = command("--prompt=a", out=out)
        assert code == 2 and f"Error: --out={out}: this folder cannot be made or written to (" in said


def test_a_full_disk_keeps_what_is_made_and_the_same_command_draws_the_rest(command, quick, tmp_path):
    (tmp_path / "list.jsonl").write_text(
        '{"prompt": "small", "size": "16x16"}\n{"prompt": "large", "size": "256x256"}\n'
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a disk with that much room
        code, said = command(f"--prompts={tmp_path / 'list.jsonl'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and "File too large; 1 of 2 pictures are there, and the same command draws the rest" in said
    assert said.count("Error") == 1 and "Traceback" not in said
    assert [row["prompt"] for row in rows(tmp_path / "out")] == ["small"]
    assert not list((tmp_path / "out").glob(".*.tmp"))
    code, said = command(f"--prompts={tmp_path / 'list.jsonl'}")
    assert code == 0 and "1 of 2 pictures are there already" in said and len(rows(tmp_path / "out")) == 2


def test_a_picture_says_the_command_that_draws_it_again(command, photographs, tmp_path):
    code, said = command(
        "--prompt=it's \"here\"", f"--reference={photographs[0]}", f"--reference={photographs[1]}", "--mix=3,1",
        f"--init={photographs[2]}", "--strength=0.7", "--seed=9", "--solver=heun", "--guidance_text=2.3", "--shift=1.7",
        "--guidance_interval=0.1,0.9", "--raw",
    )  # fmt: skip
    assert code == 0, said
    (row,) = rows(tmp_path / "out")
    with Image.open(tmp_path / "out" / row["file"]) as picture:
        text = dict(picture.text)
    assert text["mix"] == "0.75,0.25" and text["weights"] == "raw" and len(text["config"]) == 16
    words = shlex.split(text["command"])[3:]
    code, said = command(
        *(word for word in words if not word.startswith(("--workdir", "--out"))), out=tmp_path / "again"
    )
    assert code == 0, said
    assert rows(tmp_path / "again") == [row]
    np.testing.assert_array_equal(pixels(tmp_path / "again" / row["file"]), pixels(tmp_path / "out" / row["file"]))


def test_run_again_nothing_is_drawn_or_overwritten(command, quick, monkeypatch, tmp_path):
    out = tmp_path / "out"
    assert command("--prompt=a cat", "--count=2")[0] == 0
    before = {path.name: path.read_bytes() for path in out.glob("a-cat*.png")}
    assert set(before) == {"a-cat-s0.png", "a-cat-s1.png"}
    with monkeypatch.context() as patch:
        patch.setattr(trained, "generate", None)
        code, said = command("--prompt=a cat", "--count=2")
    assert code == 0 and "2 of 2 pictures are there already" in said
    assert command("--prompt=a cat", "--guidance_text=7")[0] == 0  # another picture of the same name
    assert [row["file"] for row in rows(out)] == ["a-cat-s0-2.png"]
    assert {name: (out / name).read_bytes() for name in before} == before
    (out / "a-dog-s0.png").write_bytes(b"somebody's own")
    assert command("--prompt=a dog")[0] == 0
    assert (out / "a-dog-s0.png").read_bytes() == b"somebody's own" and (out / "a-dog-s0-2.png").exists()


def test_the_same_seed_and_prompt_give_the_same_picture_in_any_company(command, tmp_path):
    (tmp_path / "list.jsonl").write_text(
        '{"prompt": "a cat", "seed": 5}\n\n{"prompt": "a dog", "count": 3, "scales": [1, 1]}\n{"prompt": "a cat", "seed": 6}\n'
    )
    code, said = command(f"--prompts={tmp_path / 'list.jsonl'}", "--batch=2")
    assert code == 0 and "5 of 5 pictures" not in said, said
    assert command("--prompt=a cat", "--seed=6", out=tmp_path / "alone")[0] == 0
    assert (
        command("--prompt=a dog", "--seed=1", "--guidance_text=1", "--guidance_vision=1", out=tmp_path / "alone")[0]
        == 0
    )
    for name in ("a-cat-s6.png", "a-dog-s1.png"):  # each the second of its batch
        assert np.abs(pixels(tmp_path / "alone" / name) - pixels(tmp_path / "out" / name)).max() <= 1
    apart = pixels(tmp_path / "out" / "a-cat-s5.png") - pixels(tmp_path / "out" / "a-cat-s6.png")
    assert np.abs(apart).max() > 20


def test_the_same_picture_on_eight_devices(command, workdir, tmp_path):
    lines = [{"prompt": f"picture {number}"} for number in range(3)] + [{"prompt": "alone", "size": "64x64"}]
    for name, wanted in (("one", [*lines, {"prompt": "its company", "size": "64x64"}]), ("eight", lines)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in wanted))
    assert command(f"--prompts={tmp_path / 'one.jsonl'}")[0] == 0
    words = [sys.executable, "-m", "jaxdit.sample", f"--workdir={workdir}", f"--out={tmp_path / 'eight'}", "--steps=2"]
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
    words += ["--cache=", f"--prompts={tmp_path / 'eight.jsonl'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "eight")) == 4
    for row in rows(tmp_path / "eight"):
        apart = pixels(tmp_path / "eight" / row["file"]) - pixels(tmp_path / "out" / row["file"])
        assert np.abs(apart).max() <= 1


def test_a_grid_is_compiled_once_a_kind_of_guidance_and_shows_each_cell(command, photographs, tmp_path):
    trained._sample.clear_cache()
    arguments = ["--prompt=a cat", f"--reference={photographs[0]}", "--grid", "--guidance_vision=1.5,2,3"]
    code, said = command(*arguments, "--guidance_text=4,5,6,7", "--batch=4")
    assert code == 0, said
    assert (
        trained._sample._cache_size() == 1 and len(rows(tmp_path / "out")) == 12
    )  # weights are arguments, not constants
    trained._sample.clear_cache()
    code, said = command(*arguments, "--guidance_text=4,5", "--batch=4", "--seed=3", "--shift=1.25")
    assert code == 0 and trained._sample._cache_size() == 1  # nor are seed and shift; six cells in two batches of three
    found = pixels(tmp_path / "out" / "grid-a-cat-s0.png")
    for number, row in enumerate(rows(tmp_path / "out")):
        assert row["file"] == f"a-cat-s3-text{4 + number // 3}-vision{(1.5, 2, 3)[number % 3]:g}.png"
    cell = pixels(tmp_path / "out" / "a-cat-s0-text5-vision2.png")
    height, width = cell.shape[:2]
    places = [
        (y, x) for y in range(found.shape[0] - height) for x in range(found.shape[1] - width)
        if (found[y, x : x + 4] == cell[0, :4]).all() and (found[y : y + height, x : x + width] == cell).all()
    ]  # fmt: skip
    assert len(places) == 1 and places[0][0] > height and places[0][1] > width
    with Image.open(tmp_path / "out" / "grid-a-cat-s3.png") as grid:
        assert "-m jaxdit.sample" in grid.text["command"]


def test_out_of_memory_means_smaller_batches_and_then_one_condition_at_a_time(
    command, quick, monkeypatch, photographs, tmp_path
):
    sizes, generate = [], trained.generate

    def small_card(*arguments, together, **options):
        count = len(arguments[3])
        sizes.append((count, together))
        if count > 1 or together:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")
        return generate(*arguments, **options)

    arguments = ["--prompt=a cat", "--count=5", f"--reference={photographs[0]}"]
    assert command(*arguments)[0] == 0
    monkeypatch.setattr(trained, "generate", small_card)
    code, said = command(*arguments, out=tmp_path / "small")
    assert code == 0, said
    assert sizes == [(5, True), (3, True), (2, True), (1, True), *[(1, False)] * 5]
    for row in rows(tmp_path / "small"):
        assert np.abs(pixels(tmp_path / "small" / row["file"]) - pixels(tmp_path / "out" / row["file"])).max() <= 1


def test_a_picture_larger_than_a_batch_has_its_conditions_evaluated_one_after_the_other(
    command, quick, monkeypatch, photographs
):
    calls, generate = [], trained.generate

    def seen(*arguments, together, **options):
        calls.append((len(arguments[3]), together))
        return generate(*arguments, **options)

    monkeypatch.setattr(trained, "generate", seen)
    arguments = ["--prompt=a cat", "--count=3", f"--reference={photographs[0]}", "--size=64x64"]
    for room, wanted in (
        (100, [(2, True)] * 2),
        (40, [(2, False)] * 2),
        (10, [(1, False)] * 3),
    ):  # of 16 tokens, three times
        calls.clear()
        monkeypatch.setattr(drawing, "TOKENS", {"cpu": room, "gpu": room})
        assert command(*arguments, f"--seed={room}")[0] == 0 and calls == wanted


def test_ctrl_c_keeps_what_is_made_and_the_same_command_draws_the_rest(command, quick, monkeypatch, tmp_path):
    calls, generate = [], trained.generate

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(trained, "generate", interrupted)
    code, said = command("--prompt=a cat", "--count=6", "--batch=2")
    assert code == 3 and "4 of 6 pictures" in said
    assert [row["file"] for row in rows(tmp_path / "out")] == [f"a-cat-s{seed}.png" for seed in range(4)]
    code, said = command("--prompt=a cat", "--count=6", "--batch=2")
    assert code == 0 and "4 of 6 pictures are there already" in said and len(rows(tmp_path / "out")) == 6
    assert not list((tmp_path / "out").glob(".*.tmp"))


@pytest.mark.parametrize("where", ["trained.load", "conditions.encode"])
def test_ctrl_c_before_the_first_picture_is_a_stop_too(command, monkeypatch, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    module, name = where.split(".")
    monkeypatch.setattr(getattr(sample, module), name, interrupted)
    code, said = command("--prompt=a cat")
    assert code == 3 and "the same command draws" in said and "Traceback" not in said


def test_sigterm_stops_like_ctrl_c(workdir, tmp_path):
    words = [
        sys.executable,
        "-m",
        "jaxdit.sample",
        f"--workdir={workdir}",
        f"--out={tmp_path}",
        "--cache=",
        "--steps=1",
    ]
    process = subprocess.Popen(
        [*words, "--prompt=a cat", "--count=10000", "--batch=1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob("a-cat*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    made = sorted(path.name for path in tmp_path.glob("a-cat*.png"))
    assert process.returncode == 3, said
    assert f"Stopped: {len(made)} of 10000 pictures are in {tmp_path}; the same command draws the rest." in said
    assert sorted(row["file"] for row in rows(tmp_path)) == made and not list(tmp_path.glob(".*.tmp"))


def test_init_stays_the_nearer_the_smaller_its_strength(command, photographs, tmp_path):
    errors = []
    with Image.open(photographs[0]) as picture:
        aspect = picture.width / picture.height
    for strength in (0.02, 0.5, 1):
        out = tmp_path / str(strength)
        code, said = command("--prompt=a cat", f"--init={photographs[0]}", f"--strength={strength}", out=out)
        assert code == 0, said
        found = pixels(out / "a-cat-s0.png")
        assert found.shape[1] / found.shape[0] == pytest.approx(aspect, abs=0.3)
        with Image.open(photographs[0]) as picture:
            wanted = np.asarray(picture.convert("RGB").resize(found.shape[1::-1])).astype(int)
        errors.append(np.abs(found - wanted).mean())
    assert errors[0] < 12 and errors[0] < errors[1] / 2 < errors[2] / 2
    assert command("--prompt=a cat", out=tmp_path / "free")[0] == 0  # strength 1 leaves nothing of the picture
    if pixels(tmp_path / "free" / "a-cat-s0.png").shape == found.shape:
        assert np.abs(pixels(tmp_path / "free" / "a-cat-s0.png") - found).max() <= 1


def test_a_training_that_goes_on_or_data_that_move_draw_nothing_anew(workdir, tmp_path):
    for name in album.FILES:
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    before = album.config_hash(tmp_path)
    rewrite(tmp_path / "config.json", lambda config: spoilt(config, "train", "total_steps", 10**6))
    rewrite(tmp_path / "config.json", lambda config: spoilt(config, "data", "path", "elsewhere"))
    assert album.config_hash(tmp_path) == before
    for section, name in (("model", "width"), ("train", "seed"), ("optim", "peak_learning_rate")):
        rewrite(tmp_path / "config.json", lambda config: spoilt(config, section, name, 7))  # noqa: B023
        assert album.config_hash(tmp_path) != before
        before = album.config_hash(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("sheet.png", b"a photograph"), ("samples.json", b'{"mine": 1}')])
def test_a_list_or_sheet_of_somebody_elses_is_not_replaced(command, tmp_path, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    code, said = command("--prompt=a cat", "--count=2")
    assert code == 2 and f"{name} there is not of jaxdit.sample" in said
    assert (tmp_path / "out" / name).read_bytes() == content


def test_a_list_in_utf_16_is_refused_before_anything_is_drawn(command, tmp_path):
    (tmp_path / "list.txt").write_text("one boat\ntwo boats\n", encoding="utf-16")
    code, said = command(f"--prompts={tmp_path / 'list.txt'}")
    assert code == 2 and "save it as UTF-8" in said and not list((tmp_path / "out").glob("*.png"))


def test_one_reference_is_for_all_prompts_those_of_a_list_too(command, quick, photographs, tmp_path):
    (tmp_path / "list.JSONL").write_text('{"prompt": "a castle", "seed": 3}\n')
    reference = photographs[0]
    assert command("--prompt=a boat", f"--prompts={tmp_path / 'list.JSONL'}", f"--reference={reference}")[0] == 0
    found = [(row["prompt"], row["seed"], row["reference"]) for row in rows(tmp_path / "out")]
    assert found == [("a boat", "0", str(reference)), ("a castle", "3", str(reference))]


def test_an_empty_prompt_is_free_of_text_and_a_list_keeps_its_good_lines(command, quick, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\xff\xfe bad\n\n  a dog  \n")
    code, said = command("--prompt=", f"--prompts={tmp_path / 'list.txt'}")
    assert code == 1 and "list.txt:2: this line is not UTF-8" in said
    assert [row["prompt"] for row in rows(tmp_path / "out")] == ["", "a cat", "a dog"]
    assert rows(tmp_path / "out")[0]["file"] == "without-words-s0.png"


def test_what_is_not_finite_is_named_and_not_saved(command, quick, monkeypatch, tmp_path):
    generate = trained.generate

    def broken(*arguments, seed, **options):
        latents = generate(*arguments, seed=seed, **options)
        return np.where(np.array(seed)[:, None, None, None] == 1, np.nan, latents)

    monkeypatch.setattr(trained, "generate", broken)
    code, said = command("--prompt=a cat", "--count=3")
    assert code == 1 and "a-cat-s1.png" in said and len(rows(tmp_path / "out")) == 2


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
        weights = drawing.guidance(2.0, 1.5, [text], [vision])
        given = trained.conditions_of([text], [vision], run)
        return trained.generate(
            run, given, (8, 8, 16), [0], seed=0, steps=2, shift=1.0, text=weights[0], vision=weights[1]
        )

    four = [draw(texts[0], visions[0]), draw(texts[0], None), draw(None, visions[0]), draw(None, None)]
    for i in range(4):
        for j in range(i):
            assert np.abs(four[i] - four[j]).max() > 1e-3


def test_guidance_needs_no_evaluation_for_what_is_absent():
    assert drawing.guidance(3.0, 1.5, ["t"], [None]) == (3.0, 1.0)  # two evaluations
    assert drawing.guidance(3.0, 1.5, [None], ["v"]) == (1.5, 1.5)  # two
    assert drawing.guidance(3.0, 1.5, [None], [None]) == (1.0, 1.0)  # one
    assert drawing.guidance(3.0, 1.5, ["t"], ["v"]) == (3.0, 1.5)  # three


def test_latents_come_back_in_the_scale_of_the_data(workdir):
    run = trained.load(workdir)
    mean, std = np.array(run.dataset["latent_mean"]), np.array(run.dataset["latent_std"])
    np.testing.assert_allclose(data.denormalize(np.zeros((1, 2, 2, 16)), run.dataset)[0, 0, 0], mean, rtol=1e-5)
    np.testing.assert_allclose(data.denormalize(np.ones((1, 2, 2, 16)), run.dataset)[0, 0, 0], mean + std, rtol=1e-5)


def test_only_a_working_folder_with_weights_is_loaded(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        trained.load(tmp_path)
