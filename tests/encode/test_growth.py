"""A data set that grows: new photographs get shards of their own, and what is finished is left alone."""

import errno
import io
import json
import os
import struct

import numpy as np
import pytest
from PIL import Image

from encode import captions, doctor, pipeline, plan, progress, records, report, stats
from encode.records import InputError
from tests.encode import fakes

RESOLUTIONS = (128, 256)


def _run(images, out, encoders=None, stop=lambda: False, **changes):
    config = fakes.config(images, out, **({"resolutions": RESOLUTIONS} | changes))
    return pipeline.run(config, encoders or fakes.encoders(), stop)


def _add(images, first, count):
    """Pictures first .. first + count, as fakes.photographs would have made them."""
    extra = fakes.photographs(images.parent / f"extra{first}", first + count)
    for number in range(first, first + count):
        for suffix in ("png", "txt"):
            (extra / f"{number:03d}.{suffix}").rename(images / f"{number:03d}.{suffix}")


def _records(out, size):
    dataset = records.load_dataset(out / str(size))
    return {
        record["id"].decode(): record
        for bucket in dataset["buckets"]
        for record in records.open_bucket(out / str(size), bucket)
    }


def _times(out):
    return {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if "array_record" in path.name or "index" in path.name
    }


def _full_disk(*sizes):
    """records.write_shard where the disk takes nothing more of these resolutions."""
    write = records.write_shard

    def full(root, *rest):
        if root.name in sizes:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(root, *rest)

    return full


def test_new_photographs_alone_are_encoded_and_counted_in(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 10), tmp_path / "out"
    _run(images, out)
    before, old = _times(out), json.loads((out / "128" / "dataset.json").read_text())
    _add(images, 10, 5)
    encoders = fakes.encoders()
    summary = _run(images, out, encoders)
    assert summary.encoded == 15
    assert sum(len(batch) for batch in encoders.vae.seen) == 5 * 2 * 2  # two resolutions, mirrored too
    assert before.items() <= _times(out).items()
    for size in RESOLUTIONS:
        dataset = records.load_dataset(out / str(size))
        found = _records(out, size)
        assert dataset["count"] == len(found) == 15
        parts = [stats.partial(record[name]) for record in found.values() for name in ("latent", "latent_flip")]
        assert dataset["latent_mean"] == stats.mean_and_std(stats.merge(parts))[0]
        assert dataset["latent_count"] == stats.merge(parts).count
    assert records.load_dataset(out / "128")["latent_mean"] != old["latent_mean"]
    before = fakes.tree(out)
    assert _run(images, out).encoded == 15
    assert fakes.tree(out) == before


def test_growing_twice_and_killed_in_between_gives_the_same_records(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    _run(images, out)
    _add(images, 6, 4)
    asked = iter([False] * 3)
    with pytest.raises(pipeline.Stopped):
        _run(images, out, stop=lambda: next(asked, True))
    assert records.load_dataset(out / "128")["count"] == 6  # what was finished can still be trained on
    assert len(_records(out, 128)) >= 6
    _add(images, 10, 2)
    _run(images, out)
    whole = tmp_path / "whole"
    _run(images, whole)
    ours, theirs = _records(out, 256), _records(whole, 256)
    assert ours.keys() == theirs.keys() and len(ours) == 12
    for name in ours:
        assert all(np.array_equal(ours[name][field], theirs[name][field]) for field in ours[name])


def test_new_photographs_go_into_the_buckets_that_there_are(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 3), tmp_path / "out"
    _run(images, out)
    buckets = set(records.load_dataset(out / "128")["buckets"])
    for name, size in {"near": (100, 68), "wide": (600, 60)}.items():
        Image.new("RGB", size, "red").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(name)
    assert _run(images, out).encoded == 4
    assert set(records.load_dataset(out / "128")["buckets"]) == buckets
    assert "near.png" in _records(out, 128)
    (row,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert (row["file"], row["stage"]) == ("wide.png", "aspect ratio")


def test_a_photograph_that_got_its_caption_late_leaves_the_quarantine(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 4), tmp_path / "out"
    caption = (images / "002.txt").read_text()
    (images / "002.txt").unlink()
    assert _run(images, out).refused == 1
    (images / "002.txt").write_text(caption)
    summary = _run(images, out)
    assert (summary.encoded, summary.refused) == (4, 0)
    assert (out / "quarantine.jsonl").read_text() == ""


def test_what_left_the_folder_is_named_and_stays(tmp_path, caplog):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    asked = iter([False] * 4)
    with pytest.raises(pipeline.Stopped):
        _run(images, out, stop=lambda: next(asked, True))
    (images / "000.png").unlink()
    (images / "003.txt").unlink()
    summary = _run(images, out)
    assert "2 pictures of" in caplog.text and "the first: 000.png" in caplog.text
    found = _records(out, 128)
    assert "003.png" in found and found["003.png"]["caption"] == b"picture 3, dark on the right"
    assert summary.encoded == len(found)
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    if "000.png" not in found:  # it was not encoded before it left
        assert [(row["file"], row["reason"].split(":")[0]) for row in rows] == [("000.png", "cannot be read")]


class Scarce(fakes.Vae):
    """A VAE whose memory takes so many pictures of a size."""

    def encode(self, pixels):
        if pixels[..., 0].size > 2 * 128 * 128 * 1.3:
            raise RuntimeError("HIP out of memory. Tried to allocate 20.00 GiB")
        return super().encode(pixels)


def test_a_batch_too_large_for_the_memory_is_halved_and_said_once(tmp_path, caplog):
    images = fakes.photographs(tmp_path / "in", 24)
    _run(images, tmp_path / "calm", batch_size=8, shard_size=100, resolutions=(128,))
    encoders = fakes.encoders()
    encoders = pipeline.Encoders(Scarce(), encoders.text, encoders.vision)
    _run(images, tmp_path / "out", encoders, batch_size=8, shard_size=100, resolutions=(128,))
    assert fakes.tree(tmp_path / "out") == fakes.tree(tmp_path / "calm")
    said = [line for line in caplog.messages if "out of memory" in line]
    assert said == [
        "VAE at 128: out of memory with 8 at a time; going on with 4.",
        "VAE at 128: out of memory with 4 at a time; going on with 2.",
    ]


def test_a_single_picture_too_large_for_the_memory_stops_the_run(tmp_path):
    images = fakes.photographs(tmp_path / "in", 2)
    encoders = fakes.encoders()
    with pytest.raises(pipeline.WorkFailed, match=r"VAE at 256 failed: RuntimeError: HIP out of memory"):
        _run(images, tmp_path / "out", pipeline.Encoders(Scarce(), encoders.text, encoders.vision), resolutions=(256,))


def test_progress_is_there_for_scripts(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    (images / "bare.png").write_bytes((images / "000.png").read_bytes())
    _run(images, out)
    found = json.loads((out / "progress.json").read_text())
    assert found["stage"] == "done" and found["done"] == found["total"] == 6
    assert found["refused"] == 1 and found["pictures_per_second"] > 0 and found["seconds_left"] == 0


def test_waiting_and_refusals_add_up_over_the_shards(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    told = progress.Progress("pictures encoded", 8, 8, tmp_path)
    told.refused = 1
    for waited, refused in ((1.0, 0), (3.0, 1)):
        told.step(2, waited, refused)
    told.next_shard()
    told.step(4, 2.0, 1)
    found = json.loads((tmp_path / "progress.json").read_text())
    assert found["refused"] == 3
    assert found["waited_fraction"] == pytest.approx(5.0 / (told.said - told.started), abs=1e-3)
    assert "3 refused" in caplog.messages[-1] and "8 of 8 pictures encoded" in caplog.messages[-1]


def test_the_disk_that_is_needed_is_said_before_and_is_about_what_is_written(tmp_path, caplog):
    caplog.set_level("INFO")
    images, out = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("noise")
    _run(images, out, resolutions=(256,), shard_size=100)
    (line,) = [line for line in caplog.messages if "will be written" in line]
    told = float(line.split()[1]) * 1024
    written = sum(path.stat().st_size for path in out.rglob("latents-*"))
    assert 0.4 < told / written < 1.6  # the small latents of the fake VAE compress well


def test_a_disk_that_is_too_small_is_said_before(tmp_path, caplog, monkeypatch):
    images = fakes.photographs(tmp_path / "in", 4)
    real = progress.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda path: real._replace(free=20_000))
    _run(images, tmp_path / "out")
    assert any("That is not enough: the run will stop after about" in line for line in caplog.messages)


def test_a_clock_that_jumps_refuses_no_picture(tmp_path, monkeypatch):
    from pebble.pool import process

    images = fakes.photographs(tmp_path / "in", 8)
    real, jumps = process.time.time, iter([0.0] * 4 + [7200.0] * 10_000)
    monkeypatch.setattr(process.time, "time", lambda: real() + next(jumps, 7200.0))
    assert _run(images, tmp_path / "out").refused == 0


def test_pictures_refused_for_a_limit_are_tried_again_when_it_is_raised(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 5), tmp_path / "out"
    for name in ("big", "bigger"):
        Image.new("RGB", (7_000, 6_000), "red").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(name)
    changes = {"resolutions": (128,), "shard_size": 4}
    assert (_run(images, out, decode_memory=100, **changes).refused) == 2
    before = _times(out)
    assert _run(images, out, decode_memory=101, **changes).refused == 2  # tried again, in vain
    summary = _run(images, out, decode_memory=4096, **changes)
    assert (summary.encoded, summary.refused) == (7, 0)
    assert before.items() <= _times(out).items()
    assert {"big.png", "bigger.png"} <= set(_records(out, 128)) and len(_records(out, 128)) == 7
    assert (out / "quarantine.jsonl").read_text() == ""
    encoders = fakes.encoders()
    assert _run(images, out, encoders, decode_memory=200, **changes).encoded == 7
    assert encoders.vae.calls == 0


@pytest.mark.parametrize("at", [2, 45])  # while headers are read, while pictures are
def test_a_disk_that_is_gone_for_a_while_refuses_no_picture(tmp_path, monkeypatch, at):
    monkeypatch.setattr(plan, "HEADERS", 1)
    images, away, out, asked = fakes.photographs(tmp_path / "in", 40), tmp_path / "away", tmp_path / "out", []
    changes = {"resolutions": (128,), "shard_size": 4, "batch_size": 1, "decode_workers": 1}

    def unplugged():
        asked.append(True)
        if len(asked) == at:
            images.rename(away)
            images.mkdir()
        return False

    with pytest.raises(pipeline.WorkFailed, match=r"is empty or gone.*the same command goes on"):
        _run(images, out, stop=unplugged, **changes)
    assert (out / "plan.json").exists() == (at == 45)
    images.rmdir()
    away.rename(images)
    summary = _run(images, out, **changes)
    assert (summary.encoded, summary.refused) == (40, 0)


def test_a_folder_that_cannot_be_looked_into_any_more_is_not_called_gone(tmp_path, monkeypatch):
    def forbidden(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    found = iter([("what", plan.images.ImageProblem("cannot be read"))])
    monkeypatch.setattr(plan.os, "scandir", forbidden)
    with pytest.raises(pipeline.WorkFailed, match=r"cannot be looked into any more \(Permission denied\).*goes on"):
        list(plan.present(tmp_path, found))


def test_a_picture_that_could_not_be_read_is_tried_again_when_it_can(tmp_path):
    images, out, away, asked = fakes.photographs(tmp_path / "in", 40), tmp_path / "out", tmp_path / "away.png", []
    changes = {"resolutions": (128,), "shard_size": 40, "batch_size": 1, "decode_workers": 1}

    def lost():
        asked.append(True)
        if len(asked) == 3:
            (images / "039.png").rename(away)
        return False

    assert _run(images, out, stop=lost, **changes).refused == 1
    before = _times(out)
    assert _run(images, out, **changes).refused == 2 and _times(out) == before  # its caption, too, which is alone now
    away.rename(images / "039.png")
    summary = _run(images, out, **changes)
    assert (summary.encoded, summary.refused) == (40, 0) and "039.png" in _records(out, 128)
    (
        records.shard_path(out / "128", "128x128", 0)
    ).unlink()  # it stands in one shard, so encoded again the old one lacks it
    (records.index_path(out / "128", "128x128", 0)).unlink()
    (out / "128" / "dataset.json").unlink()
    assert _run(images, out, **changes).encoded == 40 and len(_records(out, 128)) == 40


def test_a_picture_that_its_decoder_cannot_read_is_refused_once_for_all(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 3), tmp_path / "out"
    (images / "odd.txt").write_text("odd")
    whole = io.BytesIO()
    Image.new("RGB", (300, 300), "red").save(whole, "TIFF")
    tiff = bytearray(whole.getvalue())
    at = (
        tiff.index(struct.pack("<HH", 273, 4))
        if struct.pack("<HH", 273, 4) in tiff
        else tiff.index(struct.pack("<HH", 273, 3))
    )
    tiff[at + 2 : at + 12] = struct.pack(
        "<HIi", 9, 1, -8
    )  # the pixels begin before the file, which seek() calls invalid
    (images / "odd.tif").write_bytes(tiff)
    plans = []
    for _ in range(3):
        assert _run(images, out, resolutions=(128,)).refused == 1
        plans.append((out / "plan.json").read_bytes())
    assert len(set(plans)) == 1
    (row,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert row == {"file": "odd.tif", "stage": "decode", "reason": "damaged: Invalid argument"}


def test_a_picture_put_in_the_place_of_one_that_could_not_be_read_has_the_last_word(tmp_path):
    images, out, asked = fakes.photographs(tmp_path / "in", 40), tmp_path / "out", []
    changes = {"resolutions": (128,), "shard_size": 40, "batch_size": 1, "decode_workers": 1}

    def lost():
        asked.append(True)
        if len(asked) == 3:
            (images / "039.png").unlink()
        return False

    assert _run(images, out, stop=lost, **changes).refused == 1
    (images / "039.png").write_text("no picture")
    for _ in range(2):
        assert _run(images, out, **changes).refused == 1
    (row,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert row["file"] == "039.png" and not row["reason"].startswith("cannot be read")


def test_a_page_that_cannot_be_drawn_keeps_no_data_set_back(tmp_path, monkeypatch, caplog):
    images, out = fakes.photographs(tmp_path / "in", 4), tmp_path / "out"
    _run(images, out)
    _add(images, 4, 2)
    with monkeypatch.context() as patch:
        patch.setattr(report, "build", lambda *_: 1 / 0)
        assert _run(images, out).encoded == 6
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a result is not finite"):

        def fail(*_):
            raise RuntimeError("a result is not finite")  # of a device, whose numbers nobody wants

        patch.setattr(report, "build", fail)
        _run(images, out)
    assert "ZeroDivisionError" in caplog.text and not (out / "report.html").exists()
    assert records.load_dataset(out / "256")["count"] == 6
    assert _run(images, out).encoded == 6 and (out / "report.html").exists()


def test_a_damaged_shard_costs_the_page_alone_and_the_doctor_is_named(tmp_path, caplog):
    images, out = fakes.photographs(tmp_path / "in", 4), tmp_path / "out"
    _run(images, out)
    (out / "256" / "dataset.json").unlink()
    shard = next((out / "256").rglob("*.array_record-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"XXXX" + whole[104:])  # it opens, its records are counted, and cannot be read
    assert _run(images, out).encoded == 4
    assert "a shard is damaged" in caplog.text and "encode.doctor --repair mends" in caplog.text
    assert records.load_dataset(out / "256")["count"] == 4 and not (out / "report.html").exists()
    shard.write_bytes(whole)
    assert _run(images, out).encoded == 4 and (out / "report.html").exists()


def test_a_photograph_replaced_by_another_is_named(tmp_path, caplog):
    images, out = fakes.photographs(tmp_path / "in", 4), tmp_path / "out"
    _run(images, out)
    assert "other files" not in caplog.text
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(images / "002.png")
    _run(images, out)
    assert (
        "1 pictures of" in caplog.text
        and "other files than those that were planned (the first: 002.png)" in caplog.text
    )


@pytest.mark.parametrize("name", ["plan.json", "parts/"])
def test_a_damaged_file_of_ours_is_named_with_what_to_do(tmp_path, name):
    images, out = fakes.photographs(tmp_path / "in", 4), tmp_path / "out"
    _run(images, out)
    before = fakes.tree(out)
    path = out / name if name.endswith("json") else sorted((out / "parts").iterdir())[0]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(records.InputError, match=rf"{path} is damaged .*; remove it and run again"):
        _run(images, out)
    path.unlink()
    _run(images, out)
    assert fakes.tree(out) == before


def test_every_picture_that_is_never_mirrored_is_listed_with_the_words_in_the_way(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 7), tmp_path / "out"
    said = {
        "000": "Number 16 of a series",
        "001": "a cat LeFt of a dog",
        "002": 'a sign that says "STOP"',
        "003": "topleft a dog",
    }
    for name, text in said.items():
        (images / f"{name}.txt").write_text(text)
    (images / "004.txt").unlink()
    (images / "004.json").write_text(json.dumps({"caption": "a dog", "flip": False}))
    _run(images, out)
    rows = [json.loads(line) for line in (out / "unflipped.jsonl").read_text("utf-8").splitlines()]
    reasons = {row["file"]: row["reason"] for row in rows}
    assert reasons == {
        "000.png": "Number 16", "001.png": "LeFt", "002.png": '"STOP"', "003.png": "topleft", "004.png": "switched off",
    }  # fmt: skip
    flips = {name: record["caption_flip"] for name, record in _records(out, 128).items()}
    assert {name for name, flip in flips.items() if not flip} == set(reasons)
    page = (out / "report.html").read_text("utf-8")
    assert '<mark class="doubt">Number 16</mark> of a series' in page


def _refused(out):
    return {row["file"]: row["reason"] for row in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())}


def test_a_refused_picture_that_is_mended_comes_in_and_one_that_is_gone_leaves_the_list(tmp_path, caplog):
    images, out = fakes.photographs(tmp_path / "in", 9), tmp_path / "out"
    changes = {"resolutions": (128,), "max_upscale": 4.0}
    whole = {number: (images / f"{number:03d}.png").read_bytes() for number in (1, 2, 3, 4)}
    (images / "001.png").write_bytes(whole[1][: len(whole[1]) // 2])
    (images / "002.png").write_bytes(b"")
    flipped = bytearray(whole[3])
    flipped[flipped.index(b"IDAT") + 20] ^= 255  # of the same length
    (images / "003.png").write_bytes(flipped)
    for number in (4, 5):
        Image.new("RGB", (8, 8), "red").save(images / f"{number:03d}.png")
    before = _run(images, out, **changes)
    assert before.refused == 5 and set(_refused(out)) == {f"{number:03d}.png" for number in range(1, 6)}
    plans = (out / "plan.json").read_bytes()
    assert _run(images, out, **changes).refused == 5 and (out / "plan.json").read_bytes() == plans
    (images / "002.txt").write_text("another caption")
    assert _run(images, out, **changes).refused == 5  # of what was never encoded a caption may change
    for number, content in whole.items():
        (images / f"{number:03d}.png").write_bytes(content)
    (images / "005.png").unlink()
    (images / "005.txt").unlink()
    caplog.clear()
    assert _run(images, out, **changes).encoded == 8 and _refused(out) == {}
    assert "other files" not in caplog.text
    found = _records(out, 128)
    assert len(found) == 8 and found["002.png"]["caption"] == b"another caption"


def test_a_picture_that_changed_after_it_was_planned_is_tried_again(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    asked = iter([False] * 4)
    with pytest.raises(pipeline.Stopped):
        _run(images, out, stop=lambda: next(asked, True))
    last = sorted(images.glob("*.png"))[-1]
    with Image.open(last) as image:
        image.resize((2 * image.width, 2 * image.height)).save(last)
    assert _run(images, out).refused == 1 and "has changed" in _refused(out)[last.name]
    assert _run(images, out).encoded == 6 and _refused(out) == {}


def test_pictures_that_change_between_two_resolutions_of_a_shard_leave_one_data_set(tmp_path, monkeypatch):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    with monkeypatch.context() as disk, pytest.raises(pipeline.WorkFailed):
        disk.setattr(records, "write_shard", _full_disk("256"))
        _run(images, out, shard_size=100)
    (images / "003.png").unlink()
    with Image.open(images / "005.png") as image:
        Image.new("RGB", image.size, "blue").save(images / "005.png")
    assert _run(images, out, shard_size=100).encoded == 5
    found = [_records(out, size) for size in RESOLUTIONS]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 5
    assert all(found[0][name]["pixel_hash"] == found[1][name]["pixel_hash"] for name in found[0])
    assert records.load_dataset(out / "128")["count"] == 5


def _older(images, out, monkeypatch, **changes):
    """A data set of before the rules for captions changed, and before plans kept what was decided: kept, doubted, swapped."""

    def swap(caption):
        return (caption, None, "mirrored")[int(caption.split()[1].rstrip(",")) % 3]

    with monkeypatch.context() as older:
        older.setattr(captions, "RULES", captions.RULES - 1)
        older.setattr(captions, "swap", swap)
        _run(images, out, **changes)
    _as_before(out)


def _as_before(out):
    """The plan as programs wrote it that kept no decisions."""
    plan = json.loads((out / "plan.json").read_text("utf-8"))
    plan.pop("flips")
    (out / "plan.json").write_text(json.dumps(plan | {"schema": 1}), encoding="utf-8")


def _flips(out, size):
    return {name: record["caption_flip"].decode() for name, record in _records(out, size).items()}


def _examined(out, size, **changes):
    verdict = doctor.examine(doctor.Call(out / str(size), **changes), lambda config: fakes.encoders())
    return verdict.damages, verdict.notes


def test_older_rules_for_captions_keep_no_new_photographs_back_and_what_is_encoded_stays(tmp_path, monkeypatch):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    _older(images, out, monkeypatch)
    before, old = _times(out), json.loads((out / "128" / "dataset.json").read_text())
    _add(images, 6, 6)
    assert _run(images, out).encoded == 12
    assert before.items() <= _times(out).items()
    flips = _flips(out, 128)
    assert [flips[f"{number:03d}.png"] for number in range(3)] == ["picture 0, dark on the left", "", "mirrored"]
    assert flips["006.png"] == "picture 6, dark on the right"
    assert json.loads((out / "128" / "dataset.json").read_text())["fingerprint"] == old["fingerprint"]
    unflipped = [json.loads(line) for line in (out / "unflipped.jsonl").read_text("utf-8").splitlines()]
    assert [(row["file"], row["reason"]) for row in unflipped] == [
        (name, "by the rules of when it was encoded") for name in ("001.png", "004.png")
    ]
    sound = fakes.tree(out)
    assert _examined(out, 256, reencode=100) == ([], [])
    for path in (out / "256").rglob("latents-*"):
        path.write_bytes(path.read_bytes()[:-1000])
    assert _examined(out, 256, reencode=0, repair=True) == ([], [])
    assert fakes.tree(out) == sound


@pytest.mark.parametrize("lost", ["shard", "part", "index", "plan", "part and shard"])
def test_what_is_lost_of_a_data_set_of_older_rules_comes_back_as_it_was(tmp_path, monkeypatch, lost):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    _older(images, out, monkeypatch)
    sound = fakes.tree(out)
    for name in ("plan.json", "unflipped.jsonl"):  # which keep the decisions now, and say what made them
        sound.pop(name)
    if "shard" in lost:
        shard = next((out / "256").rglob("latents-*"))
        shard.write_bytes(shard.read_bytes()[:-1000])
    if "part" in lost:
        next((out / "parts").glob("*.json")).unlink()
    if lost == "index":
        next((out / "256").glob("index-*")).unlink()
    if lost == "plan":
        (out / "plan.json").unlink()
    if lost in ("index", "plan"):
        _run(images, out)
    assert _examined(out, 256, reencode=100, repair=True) == ([], [])
    assert _examined(out, 128, reencode=100) == ([], [])
    _run(images, out)
    assert sound.items() <= fakes.tree(out).items()


def test_a_stop_while_records_are_read_for_what_older_rules_decided_changes_nothing(tmp_path, monkeypatch):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    _older(images, out, monkeypatch)
    before, asked = fakes.tree(out), iter([False] * 3)
    with pytest.raises(pipeline.Stopped):
        _run(images, out, stop=lambda: next(asked, True))
    assert fakes.tree(out) == before


def test_a_set_of_older_rules_that_was_stopped_before_its_first_shard_goes_on(tmp_path, monkeypatch):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"

    with monkeypatch.context() as older:
        older.setattr(records, "write_shard", _full_disk("128", "256"))
        older.setattr(captions, "RULES", captions.RULES - 1)
        with pytest.raises(pipeline.WorkFailed):
            _run(images, out)
    assert list((out / "parts").glob("*.json"))
    _as_before(out)
    assert _run(images, out).encoded == 6
    assert _flips(out, 128)["000.png"] == "picture 0, dark on the right"


def test_a_shard_is_encoded_with_the_captions_of_the_plan(tmp_path, monkeypatch):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    whole = (images / "000.png").read_bytes()
    (images / "000.png").write_bytes(whole[:100])
    _run(images, out)
    (images / "000.png").write_bytes(whole)
    (images / "000.txt").write_text("a cow on the right")  # of what is refused a caption may change
    monkeypatch.setattr(plan, "retried", lambda *_: set())
    for index in out.glob("*/index-*"):
        index.unlink()
    _run(images, out)
    assert _flips(out, 128)["000.png"] == "picture 0, dark on the right"
    assert _records(out, 128)["000.png"]["caption"] == b"picture 0, dark on the left"


def test_records_that_alone_knew_how_older_rules_mirrored_are_not_guessed(tmp_path, monkeypatch):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    _older(images, out, monkeypatch)
    for size in RESOLUTIONS:
        shard = next(path for path in (out / str(size)).rglob("latents-*") if path.parts[-3].endswith(str(size)))
        shard.write_bytes(b"")
    before = fakes.tree(out)
    with pytest.raises(InputError, match=r"how theirs were mirrored, cannot be read.*Check out the version"):
        _run(images, out)
    assert any("cannot be read at any resolution" in note for note in _examined(out, 256, reencode=0, repair=True)[1])
    assert fakes.tree(out) == before


def test_rules_that_change_between_two_resolutions_of_a_shard_leave_one_data_set(tmp_path, monkeypatch):
    images, out = fakes.photographs(tmp_path / "in", 6), tmp_path / "out"
    with monkeypatch.context() as other:
        other.setattr(records, "write_shard", _full_disk("256"))
        other.setattr(captions, "RULES", captions.RULES + 1)  # of tomorrow, or of yesterday
        other.setattr(captions, "swap", lambda caption: caption[::-1])
        with pytest.raises(pipeline.WorkFailed):
            _run(images, out, shard_size=100)
    _run(images, out, shard_size=100)
    assert _flips(out, 128) == _flips(out, 256)
    assert _flips(out, 128)["000.png"] == "tfel eht no krad ,0 erutcip"


def test_a_refused_picture_of_a_wrong_date_is_tried_once_more_and_not_for_ever(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 4), tmp_path / "out"
    whole = (images / "001.png").read_bytes()
    (images / "001.png").write_bytes(whole[: len(whole) // 2])
    os.utime(images / "001.png", (2e9, 2e9))
    plans = []
    for _ in range(4):
        assert _run(images, out).refused == 1
        plans.append((out / "plan.json").read_bytes())
    assert len(set(plans[1:])) == 1
    (images / "001.png").write_bytes(whole)
    assert _run(images, out).encoded == 4 and _refused(out) == {}
