"""encode.subset: exactly as many as asked for, told apart by composition, alike in light, and whatever happens the same."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from configs import encode_demo
from encode import contact_sheet, demo, pipeline, records, selection, stats, subset, survey, whole_files, writing
from encode import main as encode_main
from encode.demo_encoders import DemoVAE, oklab
from encode.records import InputError
from encode.whole_files import write_json

ROOT = Path(__file__).resolve().parents[2]
PICTURES, CHOSEN = 200, 30


def _encode(images, out):
    config = encode_demo.get_config()
    config.update({"images": str(images), "out": str(out), "shard_size": 40, "batch_size": 20})
    pipeline.run(config, encode_main.load(config))
    return out / str(config.resolutions[0])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    demo.generate(folder, PICTURES)
    return folder


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    return _encode(images, tmp_path_factory.mktemp("encoded"))


@pytest.fixture(scope="module")
def chosen(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("subset") / "out"
    subset.subset(subset.Call(data, out, CHOSEN))
    return out


@pytest.fixture(scope="module")
def few(images, tmp_path_factory):
    """Twelve pictures with captions of their own, encoded."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(images.glob("figure-000*")) + sorted(images.glob("figure-0010*")):
        shutil.copy(path, folder)
    return folder, _encode(folder, tmp_path_factory.mktemp("few-encoded"))


def _note(out):
    return json.loads((out / "subset.json").read_text("utf-8"))


def _records(root):
    dataset = records.load_dataset(root)
    return {record["id"].decode(): record for name in dataset["buckets"] for record in records.open_bucket(root, name)}


def _raw(root):
    """{id: bytes of the record as stored}."""
    found = {}
    for bucket in records.load_dataset(root)["buckets"]:
        ids = [record["id"].decode() for record in records.open_bucket(root, bucket)]
        raw = []
        for path in sorted(records.bucket_folder(root, bucket).glob("*array_record-*")):
            reader = ArrayRecordReader(str(path))
            raw += reader.read_all()
            reader.close()
        found |= dict(zip(ids, raw, strict=True))
    return found


def _tree(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".subset" not in path.parts)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    note = json.loads(found.pop("subset.json")) if "subset.json" in found else {}
    note.pop("command", None)  # it names the folder
    return found | {"subset.json": note}


def _command(*arguments):
    return [sys.executable, "-m", "encode.subset", *map(str, arguments)]


def _call(*arguments):
    return subprocess.run(_command(*arguments), capture_output=True, text=True, cwd=ROOT)


def _candidates(count, sides=None, seed=0, channels=2):
    rng = np.random.default_rng(seed)
    return selection.Candidates(
        ids=[f"{number:03d}" for number in range(count)],
        hashes=[b"hash %d" % number for number in range(count)],
        captions=[b"caption %d" % number for number in range(count)],
        sides=sides or [("left", "right")[number % 2] for number in range(count)],
        lights=rng.standard_normal((count, channels)).astype(np.float32),
        compositions=rng.standard_normal((count, selection.GRID**2 * channels)).astype(np.float16),
    )


def test_exactly_as_many_as_asked_for_each_with_pixels_and_a_caption_of_its_own(chosen):
    found, note = _records(chosen / "128"), _note(chosen)
    assert len(found) == records.load_dataset(chosen / "128")["count"] == CHOSEN
    assert sorted(found) == sorted(row["id"] for row in note["images"])
    assert [row["number"] for row in note["images"]] == list(range(1, CHOSEN + 1))
    assert len({record["pixel_hash"] for record in found.values()}) == CHOSEN
    assert len({record["caption"].decode().casefold() for record in found.values()}) == CHOSEN


def test_light_varies_less_and_compositions_repeat_less_than_in_random_draws(chosen, images, data):
    truth = json.loads((images / ".truth.json").read_text())
    light = {path.name: oklab(np.asarray(Image.open(path))).mean((0, 1)) for path in images.glob("*.png")}
    names = sorted(light)
    rng = np.random.default_rng(0)
    draws = [rng.choice(names, CHOSEN, replace=False) for _ in range(100)]

    def spread(chosen_names):
        return float(np.sqrt(np.var([light[name] for name in chosen_names], axis=0).sum()))

    def compositions(chosen_names):
        return len({tuple(truth[name][key] for key in ("pose", "side", "object")) for name in chosen_names})

    ours = [row["id"] for row in _note(chosen)["images"]]
    assert spread(ours) < 0.8 * np.mean([spread(draw) for draw in draws])
    assert spread(ours) < min(spread(draw) for draw in draws)
    assert compositions(ours) == CHOSEN > np.mean([compositions(draw) for draw in draws]) + 1
    assert len({(truth[name]["pose"], truth[name]["side"]) for name in ours}) == 10
    strengths = [[truth[name]["strength"] for name in some] for some in (ours, names)]
    assert np.std(strengths[0]) < 0.6 * np.std(strengths[1])

    # Where no caption repeats, it is the composition alone that tells pictures apart.
    found, _ = survey.describe_all(data, records.load_dataset(data), lambda: False)
    alone = dataclasses.replace(found, captions=[name.encode() for name in found.ids])
    ours = [found.ids[i] for i in selection.choose(alone, CHOSEN).chosen]
    assert compositions(ours) > np.mean([compositions(draw) for draw in draws])
    assert spread(ours) < 0.85 * np.mean([spread(draw) for draw in draws])


def test_light_is_within_the_middle_sixty_percent(chosen, data):
    note = _note(chosen)
    found, _ = survey.describe_all(data, records.load_dataset(data), lambda: False)
    distance = dict(zip(found.ids, np.linalg.norm(selection.standardised(found.lights), axis=1)))
    limit = np.quantile([distance[row] for row in distance], 0.62)  # exact copies count once
    assert not note["light"]["widened"]
    assert all(distance[row["id"]] <= limit for row in note["images"])
    assert max(row["light_distance"] for row in note["images"]) <= note["light"]["largest_distance"]
    assert note["light"]["spread_of_chosen"] < note["light"]["spread_of_all"]


def test_the_band_is_widened_no_further_than_needed_and_it_is_said():
    choice = selection.choose(_candidates(20), 15)
    assert len(choice.chosen) == 15
    assert choice.widened and choice.share == 0.75
    assert not selection.choose(_candidates(20), 12).widened


def test_sides_come_first_and_in_equal_numbers():
    sides = ["left"] * 40 + ["right"] * 30 + [""] * 30
    for count, wanted in ((20, {"left": 10, "right": 10}), (21, {"left": 11, "right": 10})):
        choice = selection.choose(_candidates(100, sides), count)
        named = [sides[i] for i in choice.chosen]
        assert {side: named.count(side) for side in wanted} == wanted
    scarce = ["left"] * 2 + ["right"] * 4 + [""] * 94
    found = _candidates(100, scarce)
    found.lights[:6] = np.median(found.lights, axis=0)
    assert [scarce[i] for i in selection.choose(found, 5).chosen].count("left") == 2
    assert {i for i in selection.choose(found, 30).chosen if i < 6} == set(range(6))
    assert len(selection.choose(found, 30).chosen) == 30


def test_of_copies_and_repeated_captions_the_one_nearest_the_median_light_counts():
    found = _candidates(40)
    found.hashes[1] = found.hashes[0]
    found.captions[3] = found.captions[2]
    choice = selection.choose(found, 38)
    assert choice.left_out["exact duplicates"] == choice.left_out["captions that another image has"] == 1
    for pair in ((0, 1), (2, 3)):
        nearer = min(pair, key=lambda i: choice.light[i])
        assert [i for i in choice.chosen if i in pair] == [nearer]
    with pytest.raises(InputError, match=r"39 images are wanted, but only 38 of 40 .* 1 exact duplicates, 1 captions"):
        selection.choose(found, 39)


def test_the_choice_does_not_depend_on_the_order_of_the_records():
    found = _candidates(80)
    found.lights[10:20] = found.lights[10]  # ties
    found.compositions[10:20] = found.compositions[10]
    order = np.random.default_rng(1).permutation(80)
    mixed = selection.Candidates(
        *([list(values)[i] for i in order] for values in (found.ids, found.hashes, found.captions, found.sides)),
        found.lights[order],
        found.compositions[order],
    )
    ours = [found.ids[i] for i in selection.choose(found, 25).chosen]
    assert ours == [mixed.ids[i] for i in selection.choose(mixed, 25).chosen]


def test_no_other_choice_covers_much_better():
    for seed in range(20):
        points = np.random.default_rng(seed).standard_normal((10, 2)).astype(np.float32)
        light = np.random.default_rng(seed + 100).random(10)
        chosen_rows, _, radius = selection.k_centre(points, light, np.zeros(10, int), [3, 0, 0])
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
        best = min(distance[:, list(rows)].min(1).max() for rows in itertools.combinations(range(10), 3))
        assert len(set(chosen_rows)) == 3
        assert radius == pytest.approx(distance[:, chosen_rows].min(1).max(), abs=1e-3)
        assert radius <= 2 / selection.SLACK * best + 1e-3


def test_light_is_no_arrangement_and_composition_no_light_no_shape_and_no_padding():
    down, across = np.mgrid[0:1:24j, 0:1:16j]
    latent = np.stack([down, across * 2], -1).astype(np.float32)
    std, nothing = np.array([1.0, 2.0], np.float32), np.zeros((0, 0), np.uint8)
    light, composition = selection.describe(latent, nothing, std)
    np.testing.assert_allclose(light, [0.5, 1.0], atol=1e-6)
    mirrored, other = selection.describe(latent[:, ::-1], nothing, std)
    np.testing.assert_allclose(mirrored, light, atol=1e-6)
    assert np.abs(other - composition).max() > 0.5
    _, brighter = selection.describe(latent + 3, nothing, std)
    np.testing.assert_allclose(brighter, composition, atol=2e-3)
    down, across = np.mgrid[0:1:13j, 0:1:19j]
    _, reshaped = selection.describe(np.stack([down, across * 2], -1), nothing, std)
    np.testing.assert_allclose(reshaped, composition, atol=0.05)
    padded, mask = np.full((30, 16, 2), 9.0, np.float32), np.zeros((30, 16), np.uint8)
    padded[2:26], mask[2:26] = latent, 1
    for ours, theirs in zip(selection.describe(padded, mask, std), (light, composition)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_side_is_what_a_caption_that_can_be_swapped_names_first():
    assert selection.side("A dog to the left of a cat", "A dog to the right of a cat") == "left"
    assert selection.side("On the right a dog, on the left a cat", "On the left a dog, on the right a cat") == "right"
    assert selection.side("cake left on a plate", "cake left on a plate") == ""
    assert selection.side("two left", "") == ""


def test_records_are_copied_byte_for_byte(chosen, data):
    ours, theirs = _raw(chosen / "128"), _raw(data)
    assert len(ours) == CHOSEN
    assert all(ours[name] == theirs[name] for name in ours)


def test_statistics_and_dataset_json_are_those_of_the_chosen(chosen, data):
    ours, theirs = records.load_dataset(chosen / "128"), records.load_dataset(data)
    found = _records(chosen / "128").values()
    values = [np.reshape(r[name], (-1, 16)).astype(np.float64) for r in found for name in ("latent", "latent_flip")]
    flat = np.concatenate(values)
    np.testing.assert_allclose(ours["latent_mean"], flat.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours["latent_std"], flat.std(0), rtol=1e-9)
    assert ours["latent_count"] == len(flat)
    assert ours["text_longest"] == max(len(record["text"]) for record in found)
    assert ours["duplicates"] == 0
    assert sum(info["count"] for info in ours["buckets"].values()) == CHOSEN
    changed = {"count", "latent_mean", "latent_std", "latent_count", "buckets", "text_longest", "duplicates"}
    assert {name for name in theirs if ours[name] != theirs[name]} <= changed
    assert ours.keys() == theirs.keys()


def test_all_images_have_the_statistics_of_the_source(few, tmp_path):
    _, root = few
    subset.subset(subset.Call(root, tmp_path / "out", records.load_dataset(root)["count"]))
    ours, theirs = records.load_dataset(tmp_path / "out" / "128"), records.load_dataset(root)
    for name in ("latent_mean", "latent_std", "latent_count", "text_longest", "count"):
        assert ours[name] == theirs[name]
    assert _note(tmp_path / "out")["light"]["widened"]


def test_statistics_take_only_the_picture_of_a_padded_record():
    latent = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    mask = np.array([[1, 1, 0, 0]] * 3, np.uint8)
    record = {"latent": latent, "latent_flip": latent[:, ::-1], "mask": mask, "caption_flip": "x"}
    plain, flip = stats.of_record(record)
    assert plain == flip == stats.partial(latent[:, :2])
    assert len(stats.of_record(record | {"caption_flip": ""})) == 1


def test_the_trainer_opens_it(chosen):
    code = (
        "import numpy as np; from jaxdit import data\n"
        f"d = data.Dataset({str(chosen / '128')!r})\n"
        "print(sum(len(rows) for rows in d.train.values()))\n"
        "print(next(data.training_batches(d, seed=0, micro_batch=4, flip=0.5))['latent'].shape[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [str(CHOSEN), "16"], done.stderr


def test_the_same_call_gives_the_same_bytes(chosen, data, tmp_path):
    done = _call(f"--data={data}", f"--count={CHOSEN}", f"--out={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert f"{CHOSEN} of {PICTURES} images chosen: 15 captions name the left first, 15 the right" in done.stdout
    assert _tree(tmp_path / "again") == _tree(chosen)


def test_a_finished_call_says_so_and_does_nothing(chosen, data):
    before = {path: path.stat().st_mtime_ns for path in chosen.rglob("*") if path.is_file() and path.name != ".lock"}
    assert "finished already" in subset.subset(subset.Call(data, chosen, CHOSEN))[0]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_crash_at_any_file_loses_nothing(few, tmp_path, monkeypatch):
    _, root = few
    subset.subset(subset.Call(root, tmp_path / "undisturbed", 8))
    publish, crashes = whole_files.publish, 0
    for last in itertools.count():
        done = []

        def crash(temporary, target, last=last, done=done):
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(target)
            publish(temporary, target)

        out = tmp_path / str(last)
        monkeypatch.setattr(whole_files, "publish", crash)
        try:
            subset.subset(subset.Call(root, out, 8))
        except KeyboardInterrupt:
            crashes += 1
            monkeypatch.setattr(whole_files, "publish", publish)
            assert not (out / "subset.json").exists()
            subset.subset(subset.Call(root, out, 8))
        assert _tree(out) == _tree(tmp_path / "undisturbed")
        if len(done) < last:
            break
    assert crashes > 8


def test_killed_and_called_again_gives_the_same_bytes(chosen, data, tmp_path):
    out = tmp_path / "out"
    for seconds in (0.9, 1.2, 1.6):
        process = subprocess.Popen(
            _command(f"--data={data}", f"--count={CHOSEN}", f"--out={out}"), cwd=ROOT, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert _call(f"--data={data}", f"--count={CHOSEN}", f"--out={out}").returncode == 0
    assert _tree(out) == _tree(chosen)


def test_a_stop_is_obeyed_and_the_same_call_goes_on(few, tmp_path):
    _, root = few
    asked = iter([False] * 3)
    with pytest.raises(pipeline.Stopped):
        subset.subset(subset.Call(root, tmp_path / "out", 8), lambda: next(asked, True))
    subset.subset(subset.Call(root, tmp_path / "out", 8))
    assert records.load_dataset(tmp_path / "out" / "128")["count"] == 8


@pytest.mark.parametrize("size", [64, 128])
def test_originals_are_encoded_again_into_one_square_bucket(few, tmp_path, size):
    _, root = few
    said = subset.subset(subset.Call(root, tmp_path / "out", 8, size))
    dataset, note = records.load_dataset(tmp_path / "out" / str(size)), _note(tmp_path / "out")
    assert list(dataset["buckets"]) == [f"{size}x{size}"]
    assert dataset["count"] == dataset["buckets"][f"{size}x{size}"]["count"] == 8
    assert dataset["buckets"][f"{size}x{size}"]["latent"] == [size // 8, size // 8, 16]
    ours, theirs = _records(tmp_path / "out" / str(size)), _records(root)
    assert sorted(ours) == sorted(row["id"] for row in note["images"])
    for name, record in ours.items():
        assert record["caption"] == theirs[name]["caption"]
        assert record["caption_flip"] == theirs[name]["caption_flip"]
        assert record["text"].tobytes() == theirs[name]["text"].tobytes()
        assert record["vision"].tobytes() == theirs[name]["vision"].tobytes()
    shapes = {row["id"]: Image.open(few[0] / row["id"]).size for row in note["images"]}
    assert [row["distortion"] for row in note["images"]] == [
        round(max(w / h, h / w), 4) for w, h in (shapes[row["id"]] for row in note["images"])
    ]
    assert any("stretched by up to 1.29 times, 0 originals are smaller" in line for line in said)
    copied = tmp_path / "copied"
    subset.subset(subset.Call(root, copied, 8))
    assert [row["id"] for row in _note(copied)["images"]] == [row["id"] for row in note["images"]]
    assert "finished already" in subset.subset(subset.Call(root, tmp_path / "out", 8, size))[0]


def test_encoding_again_goes_on_after_a_crash(few, tmp_path, monkeypatch):
    _, root = few
    subset.subset(subset.Call(root, tmp_path / "undisturbed", 8, 64))
    out = tmp_path / "out"

    def crash(*arguments):
        raise KeyboardInterrupt

    for module, name in ((DemoVAE, "encode"), (records, "finish_bucket"), (contact_sheet, "draw")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, crash)
            subset.subset(subset.Call(root, out, 8, 64))
    subset.subset(subset.Call(root, out, 8, 64))
    assert _raw(out / "64") == _raw(tmp_path / "undisturbed" / "64")
    assert _note(out)["images"] == _note(tmp_path / "undisturbed")["images"]


def test_originals_that_are_gone_changed_or_renamed_are_refused_by_name(few, tmp_path):
    folder, root = few
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    call = subset.Call(root, tmp_path / "out", 8, 64, moved)
    victim = sorted(moved.glob("*.png"))[0]
    everything = dataclasses.replace(call, count=records.load_dataset(root)["count"])
    pixels = victim.read_bytes()
    victim.unlink()
    with pytest.raises(
        InputError, match=rf"1 of the \d+ chosen originals cannot be used.*{victim.name}: .*No such file"
    ):
        subset.subset(everything)
    Image.new("RGB", (256, 256), "red").save(victim)
    with pytest.raises(InputError, match=rf"{victim.name}: the picture has changed since it was encoded"):
        subset.subset(everything)
    victim.write_bytes(pixels)
    victim.with_suffix(".txt").write_text("another caption")
    with pytest.raises(pipeline.WorkFailed, match=rf"{victim.name}: picture or caption differ"):
        subset.subset(everything)
    assert not (everything.out / "64" / "dataset.json").exists()
    assert not (everything.out / "subset.json").exists()


def test_a_picture_that_cannot_be_encoded_ends_the_call_by_name(few, tmp_path, monkeypatch):
    _, root = few
    monkeypatch.setattr(subset, "ANY", 1.0)  # no stretch allowed: the plan refuses what is not square
    with pytest.raises(pipeline.WorkFailed, match=r"figure-\d+\.png was chosen but cannot be encoded: .*aspect ratio"):
        subset.subset(subset.Call(root, tmp_path / "out", 11, 128))
    assert not (tmp_path / "out" / "128" / "dataset.json").exists()


def test_the_contact_sheet_is_there_without_originals_and_the_set_is_there_without_a_sheet(few, tmp_path):
    _, root = few
    subset.subset(subset.Call(root, tmp_path / "originals", 8))
    gone = tmp_path / "gone"
    subset.subset(subset.Call(root, tmp_path / "decoded", 8, images=gone))
    pages = [
        np.asarray(Image.open(tmp_path / name / "contact_sheet.png"), np.float32) for name in ("originals", "decoded")
    ]
    assert pages[0].shape == pages[1].shape
    assert 0 < np.abs(pages[0] - pages[1]).mean() < 12  # the same pictures, one of them through the VAE
    assert _note(tmp_path / "decoded")["images"][0]["distortion"] is None
    other = tmp_path / "data" / "128"
    shutil.copytree(root, other)
    dataset = records.load_dataset(other)
    dataset["encoders"]["vae"]["name"] = "unknown"
    write_json(other / "dataset.json", dataset)
    said = subset.subset(subset.Call(other, tmp_path / "none", 8, images=gone))
    assert not any(line.startswith("Contact sheet") for line in said)
    assert records.load_dataset(tmp_path / "none" / "128")["count"] == 8


def test_a_sheet_has_a_place_for_each_picture_and_words_in_any_script():
    picture = np.full((90, 160, 3), 128, np.uint8)
    page = contact_sheet.draw(
        [picture] * 23, ["1. a word"] * 11 + ["2. " + "long " * 90, "", "x" * 500] + ["左のねこ"] * 9
    )
    wide = contact_sheet.SIDE + contact_sheet.MARGIN
    assert page.size == (10 * wide + 8, 3 * (wide + writing.LINES * contact_sheet.LINE + 4) + 8)


def test_wrong_calls_end_with_one_sentence_and_code_2(few, tmp_path):
    folder, root = few
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    unfinished = tmp_path / "unfinished" / "128"
    shutil.copytree(root, unfinished)
    (unfinished / "dataset.json").unlink()
    begun = tmp_path / "begun"
    subset.subset(subset.Call(root, begun, 3))
    held = tmp_path / "held"
    new = tmp_path / "new"
    for words, expected in (
        ([unfinished, 3, new], "not finished"),
        ([tmp_path / "nowhere", 3, new], "no such folder"),
        ([root, 0, new], "--count=0"),
        ([root, 99, new], "holds 11 images"),
        ([root, 3, full], "holds other files (file)"),
        ([root, 3, root / "inside"], "lies inside the data set"),
        ([root, 3, folder / "inside"], "lies inside the photographs"),
        ([root, 4, begun], "was begun with another --count"),
        ([root, 3, begun, "--size=64"], "was begun with another --size"),
        ([root, 3, new, "--size=100"], "--size=100"),
        ([root, 3, new, "--size=64", f"--images={tmp_path / 'gone'}"], "give --images=DIR"),
    ):
        done = _call(f"--data={words[0]}", f"--count={words[1]}", f"--out={words[2]}", *words[3:])
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr and done.stderr.count("Error: ") == 1 and "Traceback" not in done.stderr
    assert not new.exists() and not (root / "inside").exists()
    with records.only_one(held / ".subset"), pytest.raises(InputError, match="another process"):
        subset.subset(subset.Call(root, held, 3))


def test_a_refused_call_may_be_made_again_with_other_numbers(few, tmp_path):
    _, root = few
    other = tmp_path / "128"
    shutil.copytree(root, other)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="only 1 of 11"):
        patch.setattr(selection, "_distinct", lambda found, order: (order[:1], order[:1]))
        subset.subset(subset.Call(other, tmp_path / "out", 8))
    subset.subset(subset.Call(other, tmp_path / "out", 7))
    assert records.load_dataset(tmp_path / "out" / "128")["count"] == 7


def test_damage_in_the_source_is_named(few, tmp_path):
    _, root = few
    other = tmp_path / "128"
    shutil.copytree(root, other)
    shard = sorted(other.rglob("*array_record-00000"))[0]
    data = bytearray(shard.read_bytes())
    data[2000:2064] = bytes(value ^ 255 for value in data[2000:2064])
    shard.write_bytes(data)
    with pytest.raises(records.DatasetError, match="array_record-00000"):
        subset.subset(subset.Call(other, tmp_path / "out", 8))


def test_the_band_is_sixty_of_a_hundred_pictures_whatever_their_captions():
    found = _candidates(20)
    for place in range(8, 20):  # pictures of their own, but with the captions of others
        found.captions[place] = b"again"
    choice = selection.choose(found, 3)
    assert choice.share == 0.6 and choice.limit == sorted(choice.light)[11]


def test_the_light_is_measured_in_robust_deviations_from_the_median():
    rng = np.random.default_rng(0)
    lights = np.stack([rng.normal(3, 2, 4_001), np.full(4_001, 7.0), rng.normal(0, 5, 4_001)], -1)
    lights[:40, 0] = 1e4  # burnt pictures move neither
    lights[40:60, 1] = 8.0  # and a channel that hardly ever differs counts nothing
    with np.errstate(all="raise"):
        found = selection.standardised(lights)
    assert not found[:, 1].any()
    np.testing.assert_allclose(np.median(found, 0), 0, atol=1e-9)
    np.testing.assert_allclose(found[40:, [0, 2]].std(0), 1, atol=0.06)


def test_of_few_pictures_no_light_is_taken_out_of_the_compositions():
    rng = np.random.default_rng(0)
    points, light = rng.normal(size=(29, 6)).astype(np.float16), rng.normal(size=(29, 2))
    np.testing.assert_array_equal(selection.without_light(points, light), points.astype(np.float32))  # 10 for each of 3
    points, light = rng.normal(size=(30, 6)).astype(np.float16), rng.normal(size=(30, 2))
    left = selection.without_light(points, light)
    np.testing.assert_allclose(light.T @ left, 0, atol=1e-3)
    np.testing.assert_allclose(left.sum(0), 0, atol=1e-3)


def test_of_all_that_are_far_enough_the_one_nearest_the_median_light_is_taken():
    points = np.array([[0.0], [10.0], [-8.0], [-7.0], [1.0]], np.float32)  # the mean is -0.8
    light = np.array([0.0, 3.0, 2.0, 1.0, 0.0])
    chosen, gaps, _ = selection.k_centre(points, light, np.zeros(5, int), [2, 0, 0])
    assert chosen == [0, 2] and gaps[1] == 8  # at least 7.5 of 10 away; -7 is too near


def test_of_pictures_with_as_much_light_the_smaller_name_counts():
    found = _candidates(6)
    found.lights[:] = found.lights[0]
    found.captions[:] = [b"same"] * 6
    found.ids[:] = ["f", "e", "d", "c", "b", "a"]
    assert [found.ids[i] for i in selection.choose(found, 1).chosen] == ["a"]


@pytest.mark.parametrize(("size", "wanted"), [((640, 320), 1.0), ((640, 640), 2.0), ((320, 640), 4.0)])
def test_distortion_is_by_what_one_side_is_stretched(size, wanted):
    assert subset._distortion("128x64", [SimpleNamespace(size=size)], False) == wanted
