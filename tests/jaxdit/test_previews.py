import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import make_data
import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from encode import demo_encoders, encoders, whole_files
from encode.records import InputError
from encode.whole_files import write_json
from jaxdit import data, decode_previews, drawing, model, preview_set, previews, trained

ROOT = Path(__file__).parents[2]
COUNTS = {"64x64": 9, "48x80": 6, "32x32": 3, "80x48": 2}


def encode(root, counts=COUNTS, **options):
    """A data set of random records whose widths are those of the demo encoders, which it names."""
    make_data.dataset(root, counts, text=128, vision=16, **options)
    info = json.loads((root / "dataset.json").read_text())
    info["encoders"] = {
        "vae": {"name": "demo"},
        "text": {"name": "demo", "max_tokens": 12},
        "vision": {"name": "demo", "area": 4096},
    }
    info["fingerprint"] = {
        "vae": demo_encoders.DemoVAE().fingerprint,
        "text": demo_encoders.DemoText(12).fingerprint,
        "vision": demo_encoders.DemoVision(4096).fingerprint,
    }
    write_json(root / "dataset.json", info)
    return data.Dataset(root)


def configure(**changes):
    config = quickstart.get_config()
    config.model.update(layers=1, width=32, heads=2)
    config.train.update(seed=5, micro_batch=6)
    config.sample.update({"steps": 2, "previews": 8, "prompts": (), "references": ()} | changes)
    return config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("data") / "64")


@pytest.fixture(scope="module")
def weights(dataset):
    """(graph, averaged weights, raw weights), all random, so that every condition reaches the picture."""
    settings = trained.model_settings(configure().model, dataset.info["widths"])
    graph, _ = model.abstract(settings)

    @jax.jit
    def moved(seed):
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        params = model.initial_parameters(settings, 0)
        return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), params)

    return graph, moved(1), moved(2)


@pytest.fixture
def begin(dataset, weights, tmp_path):
    """Start, or start again, a run's previews in one working folder; what is still open at the end is closed."""
    begun = []

    def start(dataset=dataset, **changes):
        (tmp_path / "run").mkdir(exist_ok=True)
        if not (tmp_path / "run" / "dataset.json").exists():
            write_json(tmp_path / "run" / "dataset.json", dataset.info)
        begun.append(previews.Previews(tmp_path / "run", dataset, configure(**changes), weights[0]))
        return begun[-1]

    yield start
    for run in begun:
        run.close(0)


@pytest.fixture(scope="module")
def drawn(dataset, weights, tmp_path_factory):
    """(working folder, pictures by name) of one draw."""
    workdir = tmp_path_factory.mktemp("drawn")
    write_json(workdir / "dataset.json", dataset.info)
    run = previews.Previews(workdir, dataset, configure(), weights[0])
    run.draw(7, weights[1])
    run.close(60)
    [(step, pictures)] = run.finished()
    assert step == 7 and run.finished() == []
    return workdir, pictures


def rows_of(workdir):
    return json.loads((workdir / "previews" / "previews.json").read_text())


def expected(dataset, graph, params, rows, config):
    """The same pictures by the way of jaxdit.sample: one at a time, conditions from the records."""
    found = [(name, record) for name in dataset.buckets for record in dataset.records(name, range(COUNTS[name]))]
    captions = {record["caption"].decode() + name: record for name, record in found}
    vectors = {record["id"].decode(): record["vision"] for _, record in found}
    run = trained.Trained(config, dataset.info, graph, params, 0)
    for k, row in enumerate(rows):
        names = [name for name in COUNTS if f" {name}/" in row["note"].split(" with ")[0]]
        assert len(names) == 1
        text = captions[row["prompt"] + names[0]]["text"] if row["prompt"] else None
        vision = vectors[row["reference"]] if row["reference"] else None
        width, height = map(int, names[0].split("x"))
        w_text, w_vision = drawing.guidance(
            config.sample.text_guidance, config.sample.vision_guidance, [text], [vision]
        )
        latent = trained.generate(
            run, trained.conditions_of([text], [vision], run), (height // 8, width // 8, 16), [k], seed=config.train.seed,
            steps=config.sample.steps, shift=config.sample.shift, text=w_text, vision=w_vision,
        )  # fmt: skip
        yield row["name"], demo_encoders.DemoVAE().decode(latent)[0]


def difference(ours, theirs):
    return max(np.abs(ours[name].astype(int) - theirs[name]).max() for name in theirs)


def test_pictures_are_those_that_sampling_from_the_average_gives(drawn, dataset, weights):
    graph, ema, raw = weights
    workdir, pictures = drawn
    theirs = dict(expected(dataset, graph, ema, rows_of(workdir), configure()))
    assert pictures.keys() == theirs.keys() and len(theirs) == 8
    assert difference(pictures, theirs) <= 1
    assert difference(pictures, dict(expected(dataset, graph, raw, rows_of(workdir), configure()))) > 20


def test_pictures_lie_in_the_folder_with_what_they_show_and_nothing_else_does(drawn):
    workdir, pictures = drawn
    rows = rows_of(workdir)
    assert all(set(row) == {"name", "prompt", "reference", "note"} for row in rows)
    assert sorted(path.name for path in (workdir / "previews" / "7").iterdir()) == [f"{k:02d}.png" for k in range(8)]
    for row in rows:
        with Image.open(workdir / "previews" / "7" / f"{row['name']}.png") as image:
            assert (image.text["prompt"], image.text["note"], image.text["step"]) == (row["prompt"], row["note"], "7")
            np.testing.assert_array_equal(np.asarray(image), pictures[row["name"]])


def test_the_default_set_is_spread_over_buckets_images_and_conditions(dataset, tmp_path):
    fixed = preview_set.choose(tmp_path, dataset, configure())
    assert set(fixed.buckets) == {"64x64", "48x80", "32x32"}  # the three fullest, by their sizes
    assert [fixed.buckets.count(name) for name in ("64x64", "48x80", "32x32")] == [4, 3, 1]
    without_text, without_vision = fixed.conditions["drop_text"], fixed.conditions["drop_vision"]
    assert without_text.sum() == without_vision.sum() == 1 and not (without_text & without_vision).any()
    own = [f"image {row['reference']} with its own" in row["note"] for row in fixed.pictures]
    assert sum(own) == 3 and sum("with the vector of" in row["note"] for row in fixed.pictures) == 3
    names = [re.findall(r"image (\S+)", row["note"]) for row in fixed.pictures]
    assert all(len(set(two)) == 2 and two[1] == row["reference"] for two, row in zip(names, fixed.pictures) if two[1:])
    shown = [(row["prompt"], bucket) for row, bucket in zip(fixed.pictures, fixed.buckets) if row["prompt"]]
    assert len(set(shown)) == 7
    assert len({row["reference"] for row in fixed.pictures if row["reference"]}) >= 5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 40])
def test_any_number_of_pictures_can_be_asked_for(dataset, tmp_path, count):
    fixed = preview_set.choose(tmp_path, dataset, configure(previews=count))
    assert len(fixed.pictures) == min(count, 18)
    assert fixed.conditions["drop_text"].any() == (count >= 4)


def test_held_out_images_are_shown_before_training_images(dataset, tmp_path):
    apart = data.Dataset(dataset.path, holdout_fraction=0.3)
    held = {record["id"].decode() for name in apart.buckets for record in apart.records(name, apart.held_out[name])}
    assert 4 <= len(held) < 8
    rows = preview_set.choose(tmp_path, apart, configure(previews=4)).pictures
    assert {row["reference"] for row in rows if row["reference"]} <= held
    assert all("held-out image" in row["note"] and "training" not in row["note"] for row in rows)
    rows = preview_set.choose(tmp_path, apart, configure(previews=12)).pictures
    assert any("training image" in row["note"] for row in rows)


def kept(run):
    return [(run.folder / name).read_bytes() for name in ("previews.json", "conditions.npz")]


def test_a_run_keeps_its_set_whatever_becomes_of_data_and_configuration(begin, dataset, tmp_path, caplog):
    first = begin()
    before = kept(first)
    grown = encode(tmp_path / "64", {name: count + 5 for name, count in COUNTS.items()} | {"64x96": 2}, seed=1)
    grown.describe(grown.info | {name: dataset.info[name] for name in ("latent_mean", "latent_std")})
    grown.records = None  # not looked into
    again = begin(grown)
    assert kept(again) == before and not caplog.records
    for name, values in first._fixed.conditions.items():
        np.testing.assert_array_equal(again._fixed.conditions[name], values)
    asked = begin(prompts=("a red kite",))
    assert kept(asked) == before and "have changed since this run began" in caplog.text
    caplog.clear()
    begin(text_guidance=9.0)
    assert "sample.text_guidance=1.5," in caplog.text and "sample.text_guidance=9," in caplog.text


def test_a_folder_begun_anew_with_other_data_does_not_keep_the_set(begin, tmp_path):
    before = kept(begin())
    assert kept(begin(encode(tmp_path / "64", seed=1))) != before


def test_a_damaged_set_is_chosen_anew_and_comes_out_the_same(begin, caplog):
    first = begin()
    before = rows_of(first.folder.parent)
    (first.folder / "conditions.npz").write_bytes(kept(first)[1][:200])
    again = begin()
    assert rows_of(again.folder.parent) == before and len(again._fixed.conditions["vision"]) == 8
    assert "cannot be read" in caplog.text


def test_no_previews_are_made_where_none_are_wanted(begin, weights, tmp_path):
    run = begin(previews=0)
    run.draw(1, weights[1])
    assert run.finished() == [] and not (tmp_path / "run" / "previews").exists()


def test_drawing_changes_nothing_and_gives_the_same_again(begin, weights):
    ema = weights[1]
    before = jax.tree.map(np.array, ema)
    run = begin()
    with jax.transfer_guard("disallow"):  # as the trainer has it
        first, again = (run._sample(3, ema) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    jax.tree.map(np.testing.assert_array_equal, ema, before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(ema))


def test_few_at_a_time_gives_the_same_pictures_with_a_program_a_shape(begin, weights, monkeypatch):
    run, sizes, generate = begin(), [], trained.generate
    monkeypatch.setattr(
        trained, "generate", lambda *given, **options: sizes.append(len(given[3])) or generate(*given, **options)
    )
    together = run._sample(3, weights[1])
    assert max(sizes) == 2  # three evaluations of each are a micro-batch of 6
    run._config.train.micro_batch = 1
    trained._sample.clear_cache()
    alone = run._sample(3, weights[1])
    assert trained._sample._cache_size() == 3 and sizes[-8:] == [1] * 8
    for name in together:
        np.testing.assert_allclose(alone[name], together[name], atol=1e-3)


@pytest.mark.parametrize(("rows", "most"), [(4, 2), (5, 2), (3, 8), (7, 3), (1, 1)])
def test_parts_have_one_size_and_hold_each_row_once(rows, most):
    parts = previews._parts(list(range(rows)), most)
    assert {len(part) for part, _ in parts} == {-(-rows // -(-rows // most))} and len(parts[0][0]) <= most
    assert [row for part, count in parts for row in part[:count]] == list(range(rows))


def test_what_fails_is_said_once_and_never_raised(begin, weights, caplog):
    run = begin()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, weights[1])
    for step in (1, 2):
        run.draw(step, broken)
    assert caplog.text.count("the sampled latents are not finite") == 1
    (run.folder / "3").write_text("in the way")
    run.draw(3, weights[1])
    assert "previews could be drawn" in caplog.text and "step 3" in caplog.text
    run.draw(4, weights[1])
    assert decode_previews.waiting(run.folder) in ([4], [])
    assert not list(run.folder.rglob(".latents*"))


def test_a_decoder_that_is_missing_is_named_at_the_start_and_latents_wait_for_one(
    begin, dataset, weights, tmp_path, caplog
):
    run = begin()
    run.close(0)
    description = json.loads((tmp_path / "run" / "dataset.json").read_text())
    write_json(
        tmp_path / "run" / "dataset.json",
        description | {"encoders": description["encoders"] | {"vae": {"name": "flax", "path": "/nowhere"}}},
    )
    (run.folder / "previews.json").unlink()
    run = begin()
    run._child.wait()
    assert run.finished() == [] and "vae.name='flax': unknown" in caplog.text
    run.draw(2, weights[1])
    run._child.wait()
    assert run.finished() == [] and run._child is None  # no other is tried before there are new pictures
    run.close(60)
    assert decode_previews.waiting(run.folder) == [2] and caplog.text.count("unknown") == 1
    write_json(tmp_path / "run" / "dataset.json", description)
    again = begin()
    again.close(60)
    [(step, pictures)] = again.finished()
    assert step == 2 and len(pictures) == 8


def test_a_child_killed_at_any_moment_leaves_nothing_half_and_the_next_start_goes_on(begin, drawn, weights):
    chance = np.random.default_rng(time.time_ns())
    run = begin()
    for step in range(10, 22):
        run.draw(step, weights[1])
    for _ in range(3):
        time.sleep(chance.uniform(0.8, 1.5))
        if run._child is not None:
            run._child.send_signal(signal.SIGKILL)
            run._child.wait()
        for path in run.folder.glob("*/*.png"):
            with Image.open(path) as image:
                image.load()
        run = begin()
    run.close(60)
    assert decode_previews.waiting(run.folder) == [] and not list(run.folder.rglob("*.tmp"))
    for step in range(10, 22):
        found = previews._read_pictures(run.folder / str(step), rows_of(run.folder.parent))
        assert difference(found, drawn[1]) == 0


def test_the_child_outlives_a_killed_trainer_until_its_work_is_done(begin, dataset, drawn, weights, tmp_path):
    run = begin()
    run.close(0)
    np.savez(tmp_path / "latents.npz", **run._sample(9, weights[1]))
    code = f"""
import os, signal
import numpy as np
from configs import quickstart
from jaxdit import data, previews
config = quickstart.get_config()
config.sample.previews = 8
run = previews.Previews({str(tmp_path / "run")!r}, data.Dataset({str(dataset.path)!r}), config, None)
run._sample = lambda step, ema: dict(np.load({str(tmp_path / "latents.npz")!r}))
run.draw(9, None)
print(run._child.pid, os.getpgid(run._child.pid), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    child, group = map(int, done.stdout.split())
    assert child == group  # Ctrl-C in the trainer's terminal does not reach it
    for _ in range(600):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    assert decode_previews.waiting(run.folder) == []
    assert difference(previews._read_pictures(run.folder / "9", rows_of(run.folder.parent)), drawn[1]) == 0


def test_the_child_sees_no_gpu_and_knows_nothing_of_jax(begin, weights, tmp_path):
    run = begin()
    run.close(0)
    run._write(4, run._sample(4, weights[1]))
    code = (
        "import os, sys; from pathlib import Path; from jaxdit import decode_previews as d; d.decode(Path(sys.argv[1]));"
        "assert os.environ['CUDA_VISIBLE_DEVICES'] == os.environ['HIP_VISIBLE_DEVICES'] == '';"
        "print([name for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=tmp_path, env=decode_previews.without_gpu(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr
    assert (run.folder / "4" / "07.png").exists() and decode_previews.waiting(run.folder) == []


def test_two_children_never_work_in_one_folder_at_once(begin, weights):
    run = begin()
    with decode_previews._alone(run.folder):  # as the child of a trainer that was killed holds it
        run.draw(1, weights[1])
        run.draw(2, weights[1])
        time.sleep(1.5)
        assert run._child.poll() is None and decode_previews.waiting(run.folder) == [1, 2]
    run.close(60)
    assert decode_previews.waiting(run.folder) == [] and [step for step, _ in run.finished()] == [1, 2]


def test_latents_that_come_while_the_step_is_decoded_wait_again(tmp_path):
    path = tmp_path / "5" / decode_previews.LATENTS
    path.parent.mkdir()
    np.savez(path, **{"00": np.zeros((2, 2, 16), np.float32)})

    class Overtaken:
        def decode(self, latents):
            np.savez(path.with_name("new.npz"), **{"00": np.ones((2, 2, 16), np.float32)})
            os.replace(path.with_name("new.npz"), path)
            return np.zeros((1, 16, 16, 3), np.uint8)

    decode_previews._decode_step(Overtaken(), path.parent, {})
    assert decode_previews.waiting(tmp_path) == [5]
    decode_previews._decode_step(demo_encoders.DemoVAE(), path.parent, {})
    assert decode_previews.waiting(tmp_path) == [] and (path.parent / "00.png").exists()


def test_pictures_are_decoded_on_the_processor_in_float32(begin, weights, monkeypatch):
    run, asked = begin(), []
    monkeypatch.setattr(encoders, "load_vae", lambda section, device: asked.append((section["dtype"], device)))
    decode_previews.decode(run.folder.parent)
    assert asked == [("float32", "cpu")]


def test_a_picture_has_its_name_only_when_it_is_whole(begin, weights, monkeypatch):
    run = begin()
    run.close(0)
    run._write(1, run._sample(1, weights[1]))
    with monkeypatch.context() as patch:
        patch.setattr(whole_files, "publish", lambda temporary, target: 1 / 0)
        with pytest.raises(RuntimeError):
            decode_previews.decode(run.folder.parent)
    assert [path.name for path in (run.folder / "1").iterdir() if path.name[0] != "."] == [decode_previews.LATENTS]
    decode_previews.decode(run.folder.parent)
    assert sorted(path.name for path in (run.folder / "1").iterdir()) == [f"{k:02d}.png" for k in range(8)]


def test_damaged_latents_are_named_and_the_other_steps_are_decoded(begin, weights):
    run = begin()
    run.close(0)
    latents = run._sample(1, weights[1])
    for step in (1, 2):
        run._write(step, latents)
    (run.folder / "1" / decode_previews.LATENTS).write_bytes(b"PK nothing")
    with pytest.raises(RuntimeError, match="step 1: "):
        decode_previews.decode(run.folder.parent)
    assert decode_previews.waiting(run.folder) == [1] and (run.folder / "2" / "07.png").exists()


def test_closing_waits_no_longer_than_it_may(begin, weights, caplog):
    caplog.set_level(logging.INFO)
    run = begin()
    with decode_previews._alone(run.folder):
        run.draw(1, weights[1])
        child, began = run._child, time.monotonic()
        run.close(0.3)
        assert time.monotonic() - began < 5 and child.returncode is not None
    assert "(1 to 1) are not decoded yet" in caplog.text and run.finished() == []


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for name, colour in {"warm.png": (200, 120, 60), "cold.jpg": (40, 90, 180)}.items():
        Image.new("RGB", (80, 60), colour).save(root / name)
    (root / "cut.png").write_bytes((root / "warm.png").read_bytes()[:80])
    return root


def test_own_sentences_and_references_are_encoded_as_the_data_set_was(begin, photographs, caplog, monkeypatch):
    monkeypatch.chdir(photographs)
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    run = begin(prompts=(" a red kite ", long), references=("warm.png", str(photographs / "cold.jpg")))
    rows, given = rows_of(run.folder.parent), run._fixed.conditions
    assert [(row["prompt"], row["reference"]) for row in rows] == [
        ("a red kite", "warm.png"), (long, str(photographs / "cold.jpg")),
    ]  # fmt: skip
    for k, prompt in enumerate(("a red kite", long)):
        [tokens] = demo_encoders.DemoText(12).encode([prompt])
        assert given["text_length"][k] == len(tokens)
        np.testing.assert_array_equal(given["text"][k, : len(tokens)], tokens)
    pixels = [np.asarray(Image.open(photographs / name).convert("RGB")) for name in ("warm.png", "cold.jpg")]
    np.testing.assert_array_equal(given["vision"], demo_encoders.DemoVision(4096).encode(pixels))
    assert not given["drop_text"].any() and not given["drop_vision"].any()
    assert "sentence 2 is longer than the text encoder takes" in caplog.text and "sentence 1" not in caplog.text
    assert not list(run.folder.glob(".*.tmp"))


def test_what_is_left_open_comes_from_the_data_set(dataset, begin, photographs, tmp_path):
    rows = rows_of(begin(prompts=("a", "b", "c")).folder.parent)
    assert [row["prompt"] for row in rows] == ["a", "b", "c"] and len({row["reference"] for row in rows}) == 3
    assert all("a sentence of your own with the vector of training image" in row["note"] for row in rows)
    (tmp_path / "run" / "previews" / "previews.json").unlink()
    rows = rows_of(begin(references=(str(photographs / "warm.png"),), previews=5).folder.parent)
    assert len(rows) == 5 and {Path(row["reference"]).name for row in rows} == {"warm.png"}
    assert all("on the left" in row["prompt"] for row in rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"references": ("{}/cut.png",)}, r"sample\.references: .*cut\.png: "),
        ({"references": ("{}/warm.png", "{}/none.png")}, r"none\.png: there is no such file"),
        ({"prompts": ("a", "b\udce9")}, "sentence 2, .*is not UTF-8"),
        ({"prompts": ("a", "  ")}, "sentence 2, '', is empty"),
        ({"prompts": ("a", "b", "c"), "references": ("x", "y")}, "3 sentences and sample.references 2 pictures"),
        ({"prompts": tuple("abcdefghi")}, "sample.previews=8; set --config.sample.previews=9"),
    ],
)
def test_sentences_and_references_that_cannot_be_used_are_named_at_the_start(
    begin, photographs, tmp_path, changes, words
):
    changes = {name: tuple(value.format(photographs) for value in values) for name, values in changes.items()}
    with pytest.raises(InputError, match=words) as caught:
        begin(**changes)
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "run" / "previews" / "previews.json").exists()


def test_another_encoder_than_the_data_sets_is_refused(begin, dataset, tmp_path):
    (tmp_path / "run").mkdir()
    fingerprint = dataset.info["fingerprint"] | {"text": dataset.info["fingerprint"]["text"] | {"version": 2}}
    write_json(tmp_path / "run" / "dataset.json", dataset.info | {"fingerprint": fingerprint})
    with pytest.raises(InputError, match=r"the text encoder found here is not the one .* version is 1, it was 2"):
        begin(prompts=("a",))
