"""Which picture goes where, as the plan and the finished data set say it: named buckets, padding, small pictures."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from configs import encode_demo, encode_flux
from encode import buckets, captions, pipeline, plan, prepare, records
from encode import images as resizing
from encode.records import InputError
from encode.source import Item
from encode.workers import Workers
from tests.encode import fakes


def _save(folder, **sizes):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} on the left")
    return folder


def _run(images, out, encoders=None, **changes):
    return pipeline.run(fakes.config(images, out, **changes), encoders or fakes.encoders())


def _refused(out):
    return {row["file"]: row for row in map(json.loads, (out / "quarantine.jsonl").read_text("utf-8").splitlines())}


def _records(root):
    dataset = records.load_dataset(root)
    found = [record for bucket in dataset["buckets"] for record in records.open_bucket(root, bucket)]
    return {record["id"].decode(): record for record in found}


@pytest.mark.parametrize("what", ["resize", "captions"])
def test_other_rules_are_another_version_of_the_program_not_a_field_to_set_back(tmp_path, monkeypatch, what):
    images = _save(tmp_path / "in", a=(200, 200))
    if what == "resize":
        monkeypatch.setattr(resizing, "RESIZE_RULE", "by hand")
    else:
        monkeypatch.setattr(captions, "RULES", 10**6)
    _run(images, tmp_path / "out")
    monkeypatch.undo()
    _save(images, b=(200, 200))
    if what == "captions":  # newer ones, of which nothing says what they decided
        written = json.loads((tmp_path / "out" / "plan.json").read_text("utf-8"))
        written.pop("flips")
        written["schema"] = 1
        (tmp_path / "out" / "plan.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"begun by another version of this program.*: rules\..* was .*What is encoded stays"
    ) as refused:
        _run(images, tmp_path / "out")
    assert "Set it back" not in str(refused.value)
    with pytest.raises(InputError, match=r"another configuration: .*Set it back"):
        _run(images, tmp_path / "out", seed=7)


def test_named_buckets_are_the_only_ones(tmp_path):
    images = _save(tmp_path / "in", a=(200, 200), b=(300, 200), c=(200, 280))
    _run(images, tmp_path / "out", buckets=((320, 192), (256, 256)), resolutions=(128, 256), max_distortion=9.0)
    assert sorted(records.load_dataset(tmp_path / "out" / "128")["buckets"]) == ["128x128", "160x96"]
    assert sorted(records.load_dataset(tmp_path / "out" / "256")["buckets"]) == ["256x256", "320x192"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([(100, 128)], "multiples of 64"),
        ([(1024,)], "pair"),
        ([(64, 64)], "area"),
        ([(1024, 1024), (768, 768)], "has the shape of 1024x1024"),
        (["ab"], "pair"),
        ([7], "pair"),
    ],
)
def test_named_buckets_off_the_grid_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        buckets.forced(sizes, 16, 1024)


def test_a_picture_of_another_shape_is_padded_where_that_is_wanted(tmp_path):
    images = _save(tmp_path / "in", a=(256, 256), b=(250, 256), long=(900, 90))
    changes = {"resolutions": (128, 256), "buckets": ((256, 256),), "max_distortion": 1.2}
    encoders = fakes.encoders()
    assert _run(images, tmp_path / "out", encoders, pad=True, **changes).encoded == 3
    for size in (128, 256):
        found = _records(tmp_path / "out" / str(size))
        assert found["a.png"]["mask"].shape == found["b.png"]["mask"].shape == (0, 0)
        mask = found["long.png"]["mask"]
        assert mask.shape == (size // 8, size // 8)
        assert 0 < mask.mean() < 0.3 and mask.any(0).all()
        whole = np.asarray(Image.open(images / "long.png"))
        canvas, _ = prepare.padded(whole, size, size, "long.png")
        expected = fakes.Vae().encode(canvas[None])[0]
        np.testing.assert_allclose(found["long.png"]["latent"].astype(np.float32), expected, atol=0.01)
        mirrored = fakes.Vae().encode(canvas[None, :, ::-1])[0]
        np.testing.assert_allclose(found["long.png"]["latent_flip"].astype(np.float32), mirrored, atol=0.01)
        dataset = records.load_dataset(tmp_path / "out" / str(size))
        index = records.read_bucket_index(tmp_path / "out" / str(size), dataset, f"{size}x{size}")
        assert sorted(index["flags"]) == [1, 1, 3]
        latents = [record[name] for record in found.values() for name in ("latent", "latent_flip")]
        masks = [found[key]["mask"] for key in found for _ in range(2)]
        masks = [mask if mask.size else np.ones((size // 8, size // 8)) for mask in masks]
        masks = [mask[:, ::-1] if place % 2 else mask for place, mask in enumerate(masks)]
        values = np.concatenate([latent[mask == 1].astype(np.float64) for latent, mask in zip(latents, masks)])
        np.testing.assert_allclose(dataset["latent_mean"], values.mean(0), rtol=1e-9)
        assert dataset["latent_count"] == len(values)


@pytest.mark.parametrize("pad", [False, True])
def test_panoramas_that_are_not_stretched_cost_the_others_no_bucket(tmp_path, pad):
    usual = {f"a{number}": (300 + 40 * number, 300) for number in range(9)}
    alone, out = _save(tmp_path / "alone", **usual), tmp_path / "out"
    changes = {"max_distortion": 1.25, "max_buckets": 4, "pad": pad, "resolutions": (256,)}
    _run(alone, tmp_path / "expected", **changes)
    images = _save(tmp_path / "in", **usual, **{f"long{number}": (1200, 60 + number) for number in range(12)})
    _run(images, out, **changes)
    wanted, found = (records.load_dataset(folder / "256")["buckets"] for folder in (tmp_path / "expected", out))
    assert set(found) == set(wanted) and len(found) == 4
    assert len(_refused(out)) == (0 if pad else 12)


def test_without_padding_it_is_refused_by_name(tmp_path):
    images = _save(tmp_path / "in", a=(256, 256), long=(900, 90))
    assert _run(images, tmp_path / "out", buckets=((128, 128),), max_distortion=1.2).encoded == 1
    row = _refused(tmp_path / "out")["long.png"]
    assert row["stage"] == "aspect ratio"
    assert "900:90 is 10.00 times off" in row["reason"] and "config.max_distortion is 1.2" in row["reason"]


def test_a_picture_is_written_only_where_it_need_not_be_enlarged_too_far(tmp_path):
    images = _save(tmp_path / "in", big=(300, 300), middle=(200, 200), small=(110, 110), tiny=(40, 40))
    summary = _run(images, tmp_path / "out", resolutions=(128, 256), max_upscale=1.3, shard_size=1)
    assert (summary.encoded, summary.refused) == (3, 1)
    assert set(_records(tmp_path / "out" / "128")) == {"big.png", "middle.png", "small.png"}
    assert set(_records(tmp_path / "out" / "256")) == {"big.png", "middle.png"}
    row = _refused(tmp_path / "out")["tiny.png"]
    assert row["stage"] == "too small"
    assert row["reason"] == "too small: 40 x 40 pixels for its bucket 128x128, config.max_upscale is 1.3"
    for size, count in ((128, 3), (256, 2)):
        dataset = records.load_dataset(tmp_path / "out" / str(size))
        assert dataset["count"] == count == sum(value["count"] for value in dataset["buckets"].values())
        assert len(records.open_bucket(tmp_path / "out" / str(size), f"{size}x{size}")) == count


def test_a_resolution_that_no_picture_reaches_is_refused_by_name(tmp_path):
    images = _save(tmp_path / "in", a=(120, 120))
    with pytest.raises(InputError, match=r"no picture is large enough for 512 .*max_upscale is 1\.5"):
        _run(images, tmp_path / "out", resolutions=(128, 512), max_upscale=1.5)


def test_an_image_can_be_kept_from_flipping(tmp_path):
    images = _save(tmp_path / "in", a=(128, 128), b=(128, 128))
    (images / "a.txt").unlink()
    (images / "a.json").write_text(json.dumps({"caption": "a on the left", "flip": False}))
    _run(images, tmp_path / "out")
    found = _records(tmp_path / "out" / "128")
    assert found["a.png"]["caption_flip"] == b"" and found["a.png"]["text_flip"].shape[0] == 0
    assert found["b.png"]["caption_flip"] == b"b on the right"


def test_only_the_pictures_asked_for(tmp_path):
    images = _save(tmp_path / "in", a=(128, 128), b=(128, 128), c=(128, 128))
    config = fakes.config(images, tmp_path / "out")
    pipeline.run(config, fakes.encoders(), only=frozenset({"a.png", "c.png"}))
    assert set(_records(tmp_path / "out" / "128")) == {"a.png", "c.png"}


def test_a_header_that_kills_its_process_costs_that_picture_only(tmp_path, monkeypatch):
    images = _save(tmp_path / "in", **{f"p{number}": (96, 96) for number in range(40)})
    with Workers(2, 5, 512) as workers:
        real = workers.map

        def deadly(function, work, depth):
            for value, found in real(function, work, depth):
                paths = [path.name for path in value[0]] if function is prepare.sizes else []
                yield value, prepare.images.ImageProblem("the decoder died of it") if "p7.png" in paths else found

        monkeypatch.setattr(workers, "map", deadly)
        _, plan, jobs = pipeline.begin(
            fakes.config(images, tmp_path / "out"), fakes.encoders(), workers, lambda: False, keep=False
        )
    assert [row["file"] for row in plan["quarantine"]] == ["p7.png"]
    assert sum(len(job.entries) for job in jobs) == 39
    assert not (tmp_path / "out").exists()


def test_only_a_larger_limit_than_the_last_brings_a_picture_back_and_none_that_is_encoded(tmp_path):
    config = fakes.config(tmp_path, tmp_path)
    limit = config.decode_seconds
    (tmp_path / "a.png").write_bytes(b"a")
    item = Item("a.png", tmp_path / "a.png", ("a",))
    stored = {"written": 0, "unfit": [], "bytes": {"a.png": 1}, "again": {"a.png": plan._stamp(item)}}

    def again(*reasons, encoded=()):
        """Whether it is tried again after these refusals, which stand in parts whose names are in another order."""
        parts = [
            {"written": place, "records": [], "quarantine": [{"file": "a.png", "reason": reason}]}
            for place, reason in enumerate(reasons)
        ]
        parts.append({"written": 9, "records": [[name] for name in encoded], "quarantine": []})
        return plan.retried(config, stored, parts[::-1], SimpleNamespace(items=[item]))

    slow = "took more than config.decode_seconds={}".format
    assert again(slow(limit - 1)) == again(slow(limit + 1), slow(limit - 1)) == {"a.png"}
    assert again(slow(limit)) == again(slow(limit - 1), encoded=["a.png"]) == set()
    # Tried under the larger limit it was refused for another reason: the older words count no more, or it would be tried forever.
    assert again(slow(limit - 1), "damaged: x") == again("cannot be read: x", "damaged: x") == set()


def test_photographs_of_another_folder_are_refused_and_nothing_is_changed(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 5), tmp_path / "out"
    _run(images, out)
    before = (out / "plan.json").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    for path in images.iterdir():
        shutil.copy(path, other / f"x{path.name}")
    with pytest.raises(InputError, match=r"none of the 5 pictures that .* was begun with is in it, but others are"):
        _run(other, out)
    assert (out / "plan.json").read_bytes() == before
    for path in images.glob("*.txt"):
        path.rename(tmp_path / f"away-{path.name}")
    shutil.copy(other / "x000.png", images / "new.png")
    (images / "new.txt").write_text("a new picture")
    assert _run(images, out).encoded == 6  # those that lost their captions are there all the same
    (tmp_path / "away-000.txt").rename(images / "000.txt")
    shutil.copy(images / "000.png", other / "000.png")
    shutil.copy(images / "000.txt", other / "000.txt")
    assert _run(other, out).encoded == 11  # some left, some came: that is a folder that grows


def test_a_file_is_as_new_as_the_moment_it_was_put_in_its_place(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    written = (tmp_path / "a.png").stat().st_ctime_ns
    os.utime(tmp_path / "a.png", (1_000, 1_000))  # as a copy that keeps the time
    item = Item("a.png", tmp_path / "a.png", ("a",))
    assert plan._stamp(item)[0] == 1 and plan._stamp(item)[1] >= written


def test_statistics_of_a_tall_picture_that_stands_aside_take_its_mirror_image_from_the_other_side(tmp_path):
    images = _save(tmp_path / "in", a=(256, 256), tall=(90, 900))
    _run(images, tmp_path / "out", pad=True, resolutions=(128,), buckets=((128, 128),), max_distortion=1.2)
    found = _records(tmp_path / "out" / "128")
    mask = found["tall.png"]["mask"]
    assert (mask != mask[:, ::-1]).any()
    values = [found["tall.png"]["latent"][mask == 1], found["tall.png"]["latent_flip"][mask[:, ::-1] == 1]]
    values += [found["a.png"][name].reshape(-1, values[0].shape[-1]) for name in ("latent", "latent_flip")]
    mean = np.concatenate(values).astype(np.float64).mean(0)
    np.testing.assert_allclose(records.load_dataset(tmp_path / "out" / "128")["latent_mean"], mean, rtol=1e-9)


def test_the_full_configuration_has_every_field_of_the_demo_s():
    assert set(encode_flux.get_config()) - set(encode_demo.get_config()) == {"device"}
    assert set(encode_demo.get_config()) <= set(encode_flux.get_config())
