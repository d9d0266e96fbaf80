"""The pipeline with small real encoders: what is written, and that nothing that happens to a run changes it."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from encode import estimate, pipeline, records, stats
from encode.records import InputError
from tests.encode import fakes

ROOT = Path(__file__).resolve().parents[2]


def _records(root):
    dataset = records.load_dataset(root)
    return [record for bucket in dataset["buckets"] for record in records.open_bucket(root, bucket)]


def _caption(record):
    return record["caption"].decode()


def _run(images, out, encoders=None, stop=lambda: False, **changes):
    return pipeline.run(fakes.config(images, out, **changes), encoders or fakes.encoders(), stop)


def _refused(out):
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return fakes.photographs(tmp_path_factory.mktemp("in"))


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    _run(images, out, resolutions=(128, 256))
    return out


def test_every_picture_is_there_at_every_resolution_with_its_own_fields(undisturbed, images):
    for size in (128, 256):
        dataset = records.load_dataset(undisturbed / str(size))
        found = _records(undisturbed / str(size))
        assert dataset["count"] == len(found) == 10
        assert sorted(record["id"].decode() for record in found) == [f"{number:03d}.png" for number in range(10)]
        for bucket, info in dataset["buckets"].items():
            width, height = map(int, bucket.split("x"))
            assert info["latent"] == [height // 8, width // 8, 4]
            rows = records.read_bucket_index(undisturbed / str(size), dataset, bucket)
            for row, record in zip(rows, records.open_bucket(undisturbed / str(size), bucket)):
                assert row["pixel_hash"] == record["pixel_hash"]
                assert record["latent"].shape == record["latent_flip"].shape == tuple(info["latent"])
                assert record["latent"].dtype == ml_dtypes.bfloat16
                assert len(record["text"]) == row["text_length"] == 6
                assert row["flags"] == records.CAN_FLIP


def test_latent_caption_and_vision_belong_together_mirrored_too(undisturbed):
    for record in _records(undisturbed / "128"):
        number = int(_caption(record).split()[1].rstrip(","))
        half = record["latent"].shape[1] // 2
        dark = "left" if number % 2 == 0 else "right"
        assert dark in _caption(record)
        assert ("right" if dark == "left" else "left") in record["caption_flip"].decode()
        expected = (20 * number % 256) / 127.5 - 1
        right = record["latent"][2, half + 2 :, 0].astype(np.float32)
        assert np.abs(right - expected).max() < 0.02
        left = record["latent_flip"][2, : half - 2, 0].astype(np.float32)
        assert np.abs(left - expected).max() < 0.02
        assert record["vision"][3] < 0 < record["vision_flip"][3]
        assert len(record["text_flip"]) == len(record["text"])


def test_captions_without_a_side_are_flipped_with_the_same_text(tmp_path):
    images = fakes.photographs(tmp_path / "in", 3)
    for name, text in {"000": "a dog", "001": "cake left on a plate", "002": "two left"}.items():
        (images / f"{name}.txt").write_text(text)
    _run(images, tmp_path / "out")
    found = {_caption(record): record for record in _records(tmp_path / "out" / "128")}
    for text in ("a dog", "cake left on a plate"):
        assert found[text]["caption_flip"].decode() == text
        assert found[text]["text_flip"].shape == (0, 3)
    assert found["two left"]["caption_flip"] == b""
    assert found["two left"]["text_flip"].shape == (0, 3)


def test_statistics_are_those_of_the_stored_latents(undisturbed):
    found = _records(undisturbed / "256")
    flips = [record["latent_flip"] for record in found if record["caption_flip"]]
    values = np.concatenate([np.reshape(latent, (-1, 4)) for latent in [*(r["latent"] for r in found), *flips]])
    dataset = records.load_dataset(undisturbed / "256")
    np.testing.assert_allclose(dataset["latent_mean"], values.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset["latent_std"][:3], values.astype(np.float64).std(0)[:3], rtol=1e-9)
    assert dataset["latent_std"][3] == stats.FLOOR
    assert dataset["latent_count"] == len(values)


def test_tfds_reads_it_without_tensorflow_or_torch_or_jax(undisturbed):
    code = (
        "import sys; from encode import records; from pathlib import Path\n"
        f"root = Path({str(undisturbed / '128')!r}); data = records.load_dataset(root)\n"
        "n = sum(len(list(records.open_bucket(root, b))) for b in data['buckets'])\n"
        "print(n, [name for name in ('tensorflow', 'torch', 'jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "10 []", done.stderr


def test_a_finished_run_does_nothing_again(undisturbed, images):
    before = {
        path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file() and path.name != ".lock"
    }
    encoders = fakes.encoders()
    summary = _run(images, undisturbed, encoders, resolutions=(128, 256))
    assert encoders.vae.calls == 0
    assert summary.encoded == 10
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_bytes_do_not_depend_on_the_batch_or_the_threads(images, undisturbed, tmp_path):
    _run(images, tmp_path / "out", resolutions=(128, 256), batch_size=1, decode_workers=5)
    ours, theirs = fakes.tree(tmp_path / "out"), fakes.tree(undisturbed)
    assert [name for name in ours if ours[name] != theirs.get(name)] == [
        "128/dataset.json",
        "256/dataset.json",
    ]  # its config


def test_resume_after_sigkill_is_byte_identical_and_leaves_finished_shards_alone(tmp_path):
    images = fakes.photographs(tmp_path / "in", 12)
    _run(images, tmp_path / "calm")
    out, draw, kills = tmp_path / "killed", random.Random(4), 0
    environment = os.environ | {"FAKE_PAUSE": "0.06"}
    while True:
        done = {path: path.stat().st_mtime_ns for path in out.rglob("latents-*") if records.index_path(
            out / "128", path.parent.parent.name, int(path.name[-5:])).exists()}  # fmt: skip
        command = [sys.executable, "-m", "tests.encode.fakes", str(images), str(out)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        try:
            code = process.wait(timeout=draw.uniform(0.3, 1.0) if kills < 7 else 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            code, kills = None, kills + 1
        assert done == {path: path.stat().st_mtime_ns for path in done}
        if code is not None:
            assert code == 0
            break
    assert kills >= 1
    assert fakes.tree(out) == fakes.tree(tmp_path / "calm")


class _Died(BaseException):
    """Stands for a process that ends at once."""


def test_a_death_at_any_published_file_changes_nothing(tmp_path, monkeypatch):
    images = fakes.photographs(tmp_path / "in", 5)
    (images / "003.png").write_bytes((images / "003.png").read_bytes()[:120])
    _run(images, tmp_path / "calm", resolutions=(128, 256))
    real = os.replace
    out, alive = tmp_path / "out", 0
    for _ in range(100):
        countdown = [1 + alive % 7]

        def replace(source, target, countdown=countdown):
            countdown[0] -= 1
            if countdown[0] < 0:
                raise _Died
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            _run(images, out, resolutions=(128, 256))
            break
        except _Died:
            alive += 1
    assert alive >= 4
    assert fakes.tree(out) == fakes.tree(tmp_path / "calm")


def test_damaged_pictures_are_named_and_the_rest_encoded(tmp_path):
    images = fakes.photographs(tmp_path / "in", 9)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "big.jpg", quality=95)
    (images / "big.jpg").write_bytes((images / "big.jpg").read_bytes()[:10_000])
    Image.fromarray(noise).save(images / "half.png")
    (images / "half.png").write_bytes((images / "half.png").read_bytes()[:50_000])
    for name in ("big", "half"):
        (images / f"{name}.txt").write_text("a dog")
    summary = _run(images, tmp_path / "out")
    assert (summary.encoded, summary.refused) == (9, 2)
    assert [(row["file"], row["stage"]) for row in _refused(tmp_path / "out")] == [
        ("big.jpg", "decode"),
        ("half.png", "decode"),
    ]
    assert all("truncated" in row["reason"] for row in _refused(tmp_path / "out"))
    assert len(_records(tmp_path / "out" / "128")) == 9


def test_a_bucket_whose_pictures_are_all_damaged_is_left_out(tmp_path):
    images = fakes.photographs(tmp_path / "in", 3)
    (images / "000.png").write_bytes((images / "000.png").read_bytes()[:120])
    _run(images, tmp_path / "out")
    dataset = records.load_dataset(tmp_path / "out" / "128")
    assert len(dataset["buckets"]) == 2
    assert len(_records(tmp_path / "out" / "128")) == 2


def test_when_every_picture_is_damaged_no_data_set_appears(tmp_path):
    images = fakes.photographs(tmp_path / "in", 2)
    for path in images.glob("*.png"):
        path.write_bytes(path.read_bytes()[:120])
    with pytest.raises(InputError, match="every input was refused"):
        _run(images, tmp_path / "out")
    assert len(_refused(tmp_path / "out")) == 2
    with pytest.raises(records.DatasetError, match="not finished"):
        records.load_dataset(tmp_path / "out" / "128")


def test_extreme_shapes_are_refused_by_name_from_every_field(tmp_path):
    images = fakes.photographs(tmp_path / "in", 6)
    for name, size in {"wide": (600, 50), "tall": (30, 400)}.items():
        Image.new("RGB", size).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text("a line")
    summary = _run(images, tmp_path / "out")
    assert summary.encoded == 6
    assert {row["file"]: row["stage"] for row in _refused(tmp_path / "out")} == {
        "wide.png": "aspect ratio",
        "tall.png": "aspect ratio",
    }


def test_a_picture_of_its_buckets_size_reaches_the_vae_bit_for_bit(tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (112, 144, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "a.png")
    (images / "a.txt").write_text("noise")
    encoders = fakes.encoders()
    _run(images, tmp_path / "out", encoders)
    assert np.array_equal(encoders.vae.seen[0][0], pixels)
    assert np.array_equal(encoders.vae.seen[1][0], pixels[:, ::-1])


def test_another_configuration_is_refused_with_both_values(undisturbed, images):
    before = fakes.tree(undisturbed)
    with pytest.raises(InputError, match=r"config\.seed was 0, is 7"):
        _run(images, undisturbed, resolutions=(128, 256), seed=7)
    with pytest.raises(InputError, match=r"config\.resolutions was \[128, 256\], is \[128\]"):
        _run(images, undisturbed)
    other = fakes.encoders()
    other.vae.fingerprint = {"id": "another-vae", "weights": "0"}
    with pytest.raises(InputError, match=r"encoders\.vae\.id was 'fake-vae', is 'another-vae'"):
        _run(images, undisturbed, other, resolutions=(128, 256))
    assert fakes.tree(undisturbed) == before


def test_another_schema_is_refused_in_one_line(tmp_path):
    images = fakes.photographs(tmp_path / "in", 2)
    _run(images, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan | {"schema": 99}))
    with pytest.raises(
        InputError, match="schema version 99 found, this program writes version 2; go on with the version of it that"
    ):
        _run(images, tmp_path / "out")


def test_another_caption_is_refused_by_name_and_nothing_is_changed(tmp_path):
    images = fakes.photographs(tmp_path / "in", 4)
    _run(images, tmp_path / "out")
    before = fakes.tree(tmp_path / "out")
    (images / "001.txt").write_text("another caption")
    with pytest.raises(InputError, match=r"1 pictures have another caption, or flip, .* \(the first: 001\.png\)"):
        _run(images, tmp_path / "out")
    (images / "001.txt").unlink()
    (images / "001.json").write_text(json.dumps({"caption": "picture 1, dark on the right", "flip": False}))
    with pytest.raises(InputError, match="another caption, or flip"):
        _run(images, tmp_path / "out")
    assert fakes.tree(tmp_path / "out") == before


def test_mended_captions_are_taken_where_asked_and_only_their_shards_are_written_again(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 12), tmp_path / "out"
    changes = {"resolutions": (128, 256), "max_upscale": 4.0, "shard_size": 3}
    _run(images, out, **changes)
    before = fakes.tree(out)
    shards = [[entry[0] for entry in shard["items"]] for shard in json.loads(before["plan.json"])["shards"]]
    first, second, neighbour = next(names for names in shards if len(names) == 3)
    (images / first).with_suffix(".txt").write_text("another caption")
    (images / second).with_suffix(".json").write_text(
        json.dumps({"caption": "picture, dark on the left", "flip": False})
    )
    (images / second).with_suffix(".txt").unlink()
    asks = rf"2 pictures .* --config\.accept_captions=True \(1 of {len(shards)} shards, 3 pictures\)"
    with pytest.raises(InputError, match=asks):
        _run(images, out, **changes)
    moved = (images / neighbour).rename(images / "gone")
    with pytest.raises(InputError, match=f"{neighbour} of the same shards is gone"):
        _run(images, out, accept_captions=True, **changes)
    assert fakes.tree(out) == before  # whatever is refused changes nothing
    moved.rename(images / neighbour)
    asked = iter([False])
    with pytest.raises(pipeline.Stopped):  # stopped in the middle, the same call goes on
        pipeline.run(
            fakes.config(images, out, accept_captions=True, **changes), fakes.encoders(), lambda: next(asked, True)
        )
    assert not (out / "128" / "dataset.json").exists()
    assert _run(images, out, accept_captions=True, **changes).encoded == 12
    assert _run(images, tmp_path / "whole", **changes).encoded == 12
    whole, mended = fakes.tree(tmp_path / "whole"), fakes.tree(out)
    written = {name for name in mended if "array_record" in name or "index-" in name}
    assert all(mended[name] == whole[name] for name in written)
    assert sum(mended[name] != before[name] for name in written) == 4  # a shard and its index, at two resolutions
    assert _run(images, out, **changes).encoded == 12 and fakes.tree(out) == mended  # nothing is asked any more
    info, was = (json.loads(files["128/dataset.json"]) for files in (mended, before))
    assert info["mended_from"] == [{name: was[name] for name in ("latent_mean", "latent_std", "latent_count")}]
    assert info["latent_count"] < was["latent_count"] and "accept_captions" not in info["config"]
    (images / first).with_suffix(".txt").write_text("a third caption")
    words = estimate.estimate(fakes.config(images, out, accept_captions=True, **changes), fakes.encoders())
    assert "12 to encode, 0 inputs refused so far; 9 are encoded already" in words and fakes.tree(out) == mended


def test_output_inside_the_image_folder_is_not_read_back(tmp_path):
    images = fakes.photographs(tmp_path / "in", 4)
    assert _run(images, images / "out").encoded == 4
    assert _run(images, images / "out").encoded == 4
    for parent in (images, tmp_path):
        with pytest.raises(InputError, match="holds the photographs themselves"):
            _run(images, parent)
        assert not (parent / ".lock").exists()
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(InputError, match=r"link is a link to .*unmounted, which is not there; is its disk mounted\?"):
        _run(images, tmp_path / "link")


def test_a_failing_encoder_names_its_batch_and_publishes_nothing(tmp_path):
    images = fakes.photographs(tmp_path / "in", 12)
    with pytest.raises(
        pipeline.WorkFailed, match=r"bucket \d+x\d+, shard 0, batch 1 .*VAE at 128 failed: RuntimeError"
    ):
        _run(images, tmp_path / "out", fakes.encoders(fail_at=3), shard_size=100)
    assert not list((tmp_path / "out").rglob("*array_record*"))
    assert not (tmp_path / "out" / "128" / "dataset.json").exists()
    _run(images, tmp_path / "out", shard_size=100)
    assert len(_records(tmp_path / "out" / "128")) == 12


def test_latents_that_are_not_finite_stop_the_run(tmp_path):
    images = fakes.photographs(tmp_path / "in", 2)
    encoders = fakes.encoders()
    encoders.vae.encode = lambda pixels: np.full((len(pixels), pixels.shape[1] // 8, pixels.shape[2] // 8, 4), np.nan)
    with pytest.raises(pipeline.WorkFailed, match="not finite"):
        _run(images, tmp_path / "out", encoders)


def test_a_stop_keeps_what_is_finished(tmp_path):
    images = fakes.photographs(tmp_path / "in", 8)
    _run(images, tmp_path / "calm")
    asked = iter([False] * 6)
    with pytest.raises(pipeline.Stopped):
        _run(images, tmp_path / "out", stop=lambda: next(asked, True))
    assert list((tmp_path / "out").rglob("latents-*"))
    _run(images, tmp_path / "out")
    assert fakes.tree(tmp_path / "out") == fakes.tree(tmp_path / "calm")


def test_a_full_disk_is_named_and_finished_shards_stay(tmp_path):
    images = fakes.photographs(tmp_path / "in", 12)
    rng = np.random.default_rng(0)
    for number in range(80):  # the last bucket's shard needs more than the 128 KiB of the others
        Image.fromarray(rng.integers(0, 256, (64, 256, 3), dtype=np.uint8)).save(images / f"wide{number}.png")
        (images / f"wide{number}.txt").write_text("a wide picture")
    changes, limit = {"shard_size": 100}, 150_000
    code = (
        "import resource, signal, sys; from pathlib import Path; from encode import pipeline; from tests.encode import fakes\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        f"  pipeline.run(fakes.config(Path(sys.argv[1]), Path(sys.argv[2]), **{changes!r}), fakes.encoders())\n"
        "except pipeline.WorkFailed as error: print(error); sys.exit(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, images, tmp_path / "out"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "the disk /" in done.stdout
    finished = {path: path.read_bytes() for path in (tmp_path / "out").rglob("latents-*")}
    assert finished
    assert not (tmp_path / "out" / "128" / "dataset.json").exists()
    _run(images, tmp_path / "out", **changes)
    assert all(path.read_bytes() == data for path, data in finished.items())
    assert len(_records(tmp_path / "out" / "128")) == 92


def test_a_disk_that_fills_with_the_plan_is_named_too(tmp_path, monkeypatch):
    images = fakes.photographs(tmp_path / "in", 2)

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pipeline, "write_json", full)
    with pytest.raises(pipeline.WorkFailed, match="took no more data"):
        _run(images, tmp_path / "out")


def test_two_runs_at_once_are_refused(tmp_path):
    images = fakes.photographs(tmp_path / "in", 2)
    second = []

    def stop():
        with pytest.raises(InputError, match=r"another process is writing into it"):
            _run(images, tmp_path / "out")
        second.append(True)
        return False

    _run(images, tmp_path / "out", stop=stop)
    assert second


def test_precomputed_vectors_are_used_and_missing_ones_named(tmp_path):
    images = fakes.photographs(tmp_path / "in", 4)
    np.save(images / "000.dino.npy", np.arange(5, dtype=np.float32))
    np.save(images / "000.dino_flip.npy", -np.arange(5, dtype=np.float32))
    (images / "001.json").write_text(json.dumps({"caption": "a dog", "dino": [1, 2, 3, 4, 5]}))
    np.save(images / "002.dino.npy", np.ones(7, np.float32))
    config = fakes.config(images, tmp_path / "out")
    config.vision.precomputed = True
    full = fakes.encoders()
    pipeline.run(config, pipeline.Encoders(full.vae, full.text, None))
    found = {record["id"].decode(): record for record in _records(tmp_path / "out" / "128")}
    assert found["000.png"]["vision"].tolist() == [0, 1, 2, 3, 4]
    assert found["000.png"]["vision_flip"].tolist() == [0, -1, -2, -3, -4]
    assert found["001.png"]["vision_flip"].tolist() == [1, 2, 3, 4, 5]
    reasons = {row["file"]: row["reason"] for row in _refused(tmp_path / "out")}
    assert "7 numbers found, 5 in the first" in reasons["002.png"]
    assert "no precomputed vector" in reasons["003.png"]


def test_duplicates_and_cut_captions_are_counted(tmp_path):
    images = fakes.photographs(tmp_path / "in", 4)
    Image.open(images / "000.png").save(images / "copy.bmp")
    (images / "copy.txt").write_text("one two three four five six seven eight nine ten")
    _run(images, tmp_path / "out")
    dataset = records.load_dataset(tmp_path / "out" / "128")
    assert dataset["duplicates"] == 1
    assert dataset["text_longest"] == 8
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "000.png = copy.bmp" in page
    assert "<h3>Cut to the limit</h3><ul><li><bdi>copy.bmp" in page


def test_without_flips_the_mirror_fields_are_copies(tmp_path):
    images = fakes.photographs(tmp_path / "in", 2)
    encoders = fakes.encoders()
    _run(images, tmp_path / "out", encoders, flip=False)
    for record in _records(tmp_path / "out" / "128"):
        assert record["caption_flip"] == b""
        assert np.array_equal(record["latent"], record["latent_flip"])
        assert np.array_equal(record["vision"], record["vision_flip"])


def test_the_locale_changes_nothing(tmp_path):
    images = fakes.photographs(tmp_path / "in", 1)
    shutil.copy(images / "000.png", images / "café 猫.png")
    (images / "café 猫.txt").write_text("座っている café 猫", encoding="utf-8")
    trees = []
    plain = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for name, settings in {"utf8": {"LC_ALL": "C.UTF-8"}, "ascii": plain}.items():
        command = [sys.executable, "-m", "tests.encode.fakes", images, tmp_path / name]
        subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=True)
        trees.append(fakes.tree(tmp_path / name))
    assert trees[0] == trees[1]


def test_no_file_of_the_user_is_ever_changed(tmp_path):
    images = fakes.photographs(tmp_path / "in", 5)
    (images / "003.png").write_bytes((images / "003.png").read_bytes()[:120])
    Image.new("RGB", (4, 4)).save(images / "tiny.png")
    (images / "tiny.txt").write_text("tiny")
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in images.iterdir()}
    with pytest.raises(pipeline.WorkFailed):
        _run(images, tmp_path / "out", fakes.encoders(fail_at=3))
    _run(images, tmp_path / "out")
    _run(images, tmp_path / "out")
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in images.iterdir()}


def test_progress_counts_what_earlier_legs_did(tmp_path, caplog):
    caplog.set_level("INFO")
    images = fakes.photographs(tmp_path / "in", 8)
    asked = iter([False] * 6)
    with pytest.raises(pipeline.Stopped):
        _run(images, tmp_path / "out", stop=lambda: next(asked, True))
    caplog.clear()
    _run(images, tmp_path / "out")
    assert any("8 of 8 pictures" in line for line in caplog.messages)


def test_a_thousand_bad_inputs_are_one_line(tmp_path, caplog):
    caplog.set_level("INFO")
    images = fakes.photographs(tmp_path / "in", 4)
    for number in range(1000):
        (images / f"bare{number}.png").write_bytes(b"x")
    start = time.monotonic()
    summary = _run(images, tmp_path / "out")
    assert summary.refused == len(_refused(tmp_path / "out")) == 1000
    assert sum("inputs refused" in line for line in caplog.messages) == 1
    assert sum(record.name.startswith("encode") for record in caplog.records) < 20  # others are silenced on the console
    assert time.monotonic() - start < 20


def test_captions_that_the_text_encoder_has_no_words_for_are_named_or_refused(images, tmp_path, caplog):
    """T5 reads a caption in Chinese as one unknown sign: all of them alike, and a month would be trained on that."""
    few = shutil.copytree(images, tmp_path / "few")
    captions = sorted(few.rglob("*.txt"))
    captions[0].write_text("左边有 一只红色的猫", encoding="utf-8")
    with caplog.at_level("WARNING"):
        assert _run(few, tmp_path / "out").encoded == 10
    (said,) = [line for line in caplog.messages if "does not know" in line]
    assert said.startswith("1 of 10 captions looked at hold signs") and "左边有 一只红色的猫" in said
    for file in captions[:6]:
        file.write_text("左边有 一只红色的猫", encoding="utf-8")
    with pytest.raises(InputError, match=r"^6 of 10 captions looked at are in signs .* Translate them"):
        _run(few, tmp_path / "none")
    assert not (tmp_path / "none" / "plan.json").exists()  # so that the captions may be translated


def test_photographs_that_come_later_are_refused_for_their_captions_before_they_are_planned(images, tmp_path):
    few, out = shutil.copytree(images, tmp_path / "few"), tmp_path / "out"
    _run(few, out)
    new = few / "later.png"
    shutil.copy(next(few.rglob("*.png")), new)
    new.with_suffix(".txt").write_text("左边有 一只红色的猫", encoding="utf-8")
    with pytest.raises(InputError, match=r"^1 of 1 captions looked at are in signs .* Translate them"):
        _run(few, out)
    new.with_suffix(".txt").write_text("a red cat stands on the left")
    assert _run(few, out).encoded == 11


def test_a_picture_tried_again_is_not_refused_for_a_caption_that_was_planned(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 5), tmp_path / "out"
    Image.new("RGB", (7_000, 6_000), "red").save(images / "big.png")
    (images / "big.txt").write_text("左边有 一只红色的猫", encoding="utf-8")
    assert _run(images, out, decode_memory=100, resolutions=(128,)).refused == 1
    assert _run(images, out, decode_memory=4096, resolutions=(128,)).encoded == 6


def test_captions_of_what_is_refused_anyway_count_for_nothing(tmp_path):
    images = fakes.photographs(tmp_path / "in", 4)
    for number in range(6):
        (images / f"broken{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        (images / f"broken{number}.txt").write_text("左边有 一只红色的猫", encoding="utf-8")
    found = _run(images, tmp_path / "out")
    assert found.encoded == 4 and found.refused == 6


def test_what_is_left_of_a_stopped_run_is_encoded_whatever_its_captions_are(images, tmp_path):
    few, out = shutil.copytree(images, tmp_path / "few"), tmp_path / "out"
    for file in sorted(few.rglob("*.txt"))[-4:]:
        file.write_text("左边有 一只红色的猫", encoding="utf-8")
    _run(few, out)
    for part in sorted((out / "parts").glob("*.json"))[-1:]:
        part.unlink()  # a shard is encoded again, and it alone
    assert _run(few, out).encoded == 10
