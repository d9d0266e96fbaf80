"""What is judged on: the data of the training, or others of their kind, and told where they are others."""

import errno
import os
from types import SimpleNamespace

import make_data
import pytest
from tiny_run import tiny

from encode import records
from encode.records import InputError
from jaxdit import data, judged_images


def test_data_that_were_not_trained_on_are_told(tmp_path, caplog):
    for name, seed in (("own", 0), ("other", 1)):
        make_data.dataset(tmp_path / name, {"64x64": 4}, seed=seed)
    config = tiny(tmp_path / "own").to_dict()
    info, other = (records.load_dataset(tmp_path / name) for name in ("own", "other"))
    grown = other | {"own": {name: info[name] for name in ("latent_mean", "latent_std")}}
    for described in (info, grown):
        judged_images.open_data(config, described, tmp_path / "own")
        assert "is not the data set of the training" not in caplog.text
    found = judged_images.open_data(config, info, tmp_path / "other")
    assert "other is not the data set of the training as it is known (4 images here, 4 there)" in caplog.text
    assert found.info["latent_mean"] == info["latent_mean"]  # normalised as the model knows it
    with pytest.raises(InputError, match="say where it lies now with --data"):
        judged_images.open_data(tiny(tmp_path / "nowhere").to_dict(), info, None)


def test_a_disk_without_room_is_an_error_before_anything_is_read(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # a memory map would kill the process instead

    monkeypatch.setattr(os, "posix_fallocate", full)
    dataset = SimpleNamespace(info={"widths": {"vision": 4, "latent": 4}}, records=None)
    with pytest.raises(OSError, match="No space") as caught:
        judged_images.know(dataset, None, {"64x64": [0, 1]}, tmp_path / "known" / "training", 1, "training")
    assert caught.value.filename.endswith(".npy") and not list((tmp_path / "known").iterdir())


def test_data_of_another_kind_are_refused(tmp_path):
    make_data.dataset(tmp_path / "data", {"64x64": 4, "48x80": 4})
    dataset = data.Dataset(tmp_path / "data")
    buckets = dataset.info["buckets"]
    judged_images.refuse_other_data(tmp_path, SimpleNamespace(dataset=dataset.info), dataset)
    for changed, words in (
        ({"fingerprint": {"vae": "another"}}, "was encoded in another way"),
        ({"buckets": {"64x64": buckets["64x64"]}}, r"has a bucket 48x80 that the data of .* have not \(64x64\)"),
        ({"buckets": buckets | {"64x64": buckets["64x64"] | {"latent": [9, 9, 16]}}}, "has a bucket 64x64"),
    ):
        with pytest.raises(InputError, match=words):
            judged_images.refuse_other_data(tmp_path, SimpleNamespace(dataset=dataset.info | changed), dataset)
