"""The record contract: what is written comes back, what does not fit is refused, nothing is half published."""

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from encode import records
from encode.whole_files import write_json

ROOT = Path(__file__).resolve().parents[2]
SPEC = records.features([4, 6, 2], 3, 5)


def _record(number=0, **changes):
    rng = np.random.default_rng(number)
    draw = lambda *shape: rng.normal(size=shape).astype(ml_dtypes.bfloat16)  # noqa: E731
    record = {
        "id": f"ordner/Dalí {number}.png",
        "caption": "猫 on the left",
        "caption_flip": "猫 on the right",
        "latent": draw(4, 6, 2),
        "latent_flip": draw(4, 6, 2),
        "text": draw(3, 3),
        "text_flip": draw(4, 3),
        "vision": rng.normal(size=5).astype(np.float32),
        "vision_flip": rng.normal(size=5).astype(np.float32),
        "mask": np.zeros((0, 0), np.uint8),
        "pixel_hash": f"{number:032x}",
    }
    return record | changes


def _write(root, shards):
    for number, shard in enumerate(shards):
        records.write_shard(root, "48x32", number, shard, SPEC)
    records.finish_bucket(root, "48x32", SPEC)


def test_every_field_comes_back_bit_for_bit(tmp_path):
    mask = np.ones((4, 6), np.uint8)
    written = [
        _record(0),
        _record(1, mask=mask),
        _record(2, text_flip=np.zeros((0, 3), ml_dtypes.bfloat16), caption_flip=""),
    ]
    _write(tmp_path, [written[:2], written[2:]])
    found = list(records.open_bucket(tmp_path, "48x32"))
    assert len(found) == 3
    for want, got in zip(written, found):
        for name in records.STRINGS:
            assert got[name].decode() == want[name]
        for name in records.ARRAYS:
            assert got[name].dtype == want[name].dtype
            assert got[name].shape == want[name].shape
            assert got[name].tobytes() == want[name].tobytes()


def test_the_index_tells_lengths_and_flags(tmp_path):
    masked = _record(1, mask=np.ones((4, 6), np.uint8))
    silent = _record(2, text_flip=np.zeros((0, 3), ml_dtypes.bfloat16), caption_flip="")
    _write(tmp_path, [[_record(0), masked], [silent]])
    rows = records.read_bucket_index(tmp_path, {"buckets": {"48x32": {"shards": 2, "count": 3}}}, "48x32")
    assert rows["text_length"].tolist() == [3, 3, 3]
    assert rows["text_flip_length"].tolist() == [4, 4, 3]
    assert rows["flags"].tolist() == [records.CAN_FLIP, records.CAN_FLIP | records.HAS_MASK, 0]
    assert [value.decode() for value in rows["pixel_hash"]] == [f"{number:032x}" for number in range(3)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"latent": np.zeros((4, 4, 2), ml_dtypes.bfloat16)},
        {"latent": np.zeros((4, 6, 2), np.float32)},
        {"text": np.zeros((3, 4), ml_dtypes.bfloat16)},
        {"vision": np.zeros((6,), np.float32)},
    ],
)
def test_what_does_not_fit_is_refused_with_the_samples_name(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"ordner/Dalí 0\.png"):
        records.write_shard(tmp_path, "48x32", 0, [_record(**wrong)], SPEC)
    assert not records.index_path(tmp_path, "48x32", 0).exists()


def test_an_empty_shard_is_read_as_nothing(tmp_path):
    _write(tmp_path, [[_record(0)], [], [_record(1)]])
    assert [record["id"].decode()[-5:] for record in records.open_bucket(tmp_path, "48x32")] == ["0.png", "1.png"]


def test_bytes_are_the_same_in_every_process(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; import test_records as t\n"
        "t.records.write_shard(Path(sys.argv[1]), '48x32', 0, [t._record(n) for n in range(3)], t.SPEC)"
    )
    seen = set()
    for run in range(3):
        here = Path(__file__).parent
        subprocess.run([sys.executable, "-c", code, tmp_path / str(run), here], cwd=ROOT, check=True)
        shard = records.shard_path(tmp_path / str(run), "48x32", 0)
        seen.add(hashlib.sha256(shard.read_bytes()).hexdigest())
    assert len(seen) == 1


def test_a_disk_that_swallows_bytes_publishes_nothing(tmp_path, monkeypatch):
    class Lossy:
        def __init__(self, path, options):
            self.path = path

        def write(self, example):
            pass

        def close(self):
            Path(self.path).write_bytes(b"")

    monkeypatch.setattr(records, "ArrayRecordWriter", Lossy)
    with pytest.raises(OSError, match="disk full"):
        records.write_shard(tmp_path, "48x32", 0, [_record()], SPEC)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_sync_a_folder_will_do_and_a_failing_one_not(tmp_path, monkeypatch, answer):
    sync = os.fsync

    def of_files_alone(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(answer, os.strerror(answer))
        sync(number)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with contextlib.nullcontext() if answer == errno.EINVAL else pytest.raises(OSError, match="Input/output"):
        write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_the_index_is_published_after_its_shard(tmp_path, monkeypatch):
    order = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (order.append(Path(target).name), real(source, target)))
    records.write_shard(tmp_path, "48x32", 0, [_record()], SPEC)
    assert order == ["latents-train.array_record-00000", "index-48x32-00000.npy"]


def test_a_data_set_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(records.DatasetError, match="no such folder"):
        records.load_dataset(tmp_path / "gone")
    (tmp_path / "128").mkdir()
    with pytest.raises(records.DatasetError, match="this is no data set"):
        records.load_dataset(tmp_path / "128")
    (tmp_path / "plan.json").touch()
    with pytest.raises(records.DatasetError, match="not finished"):
        records.load_dataset(tmp_path / "128")
    (tmp_path / "128" / "dataset.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(records.DatasetError, match="name one of them: 128"):
        records.load_dataset(tmp_path)
    with pytest.raises(records.DatasetError, match="version 99 found, this program reads version 1"):
        records.load_dataset(tmp_path / "128")
    (tmp_path / "128" / "dataset.json").write_text("{")
    with pytest.raises(records.DatasetError, match="not readable"):
        records.load_dataset(tmp_path / "128")


def test_a_damaged_index_is_named(tmp_path):
    _write(tmp_path, [[_record()]])
    path = records.index_path(tmp_path, "48x32", 0)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(records.DatasetError, match=r"index-48x32-00000\.npy"):
        records.read_index(tmp_path, "48x32", 0)


def test_bytes_are_on_the_disk_before_they_get_their_name_and_the_name_after(tmp_path, monkeypatch):
    told, sync, replace = [], os.fsync, os.replace
    name_of = lambda number: Path(os.readlink(f"/proc/self/fd/{number}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda number: (told.append(name_of(number)), sync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (told.append(f"-> {Path(new).name}"), replace(old, new)))
    write_json(tmp_path / "x.json", {"a": 1})
    assert told == [".x.json.tmp", "-> x.json", tmp_path.name]


def test_a_disk_that_changes_bytes_publishes_nothing(tmp_path, monkeypatch):
    real = records.ArrayRecordWriter

    class Garbling:
        def __init__(self, path, options):
            self.writer, self.close = (writer := real(path, options)), writer.close

        def write(self, example):
            self.writer.write(example[:-1] + bytes([example[-1] ^ 1]))

    monkeypatch.setattr(records, "ArrayRecordWriter", Garbling)
    with pytest.raises(OSError, match="does not read back as written"):
        records.write_shard(tmp_path, "48x32", 0, [_record()], SPEC)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_caption_that_names_no_side_may_be_flipped():
    no_text = np.zeros((0, 3), _record()["text"].dtype)
    (row,) = records.index_rows([_record(caption="a dog", caption_flip="a dog", text_flip=no_text)])
    assert row["flags"] == records.CAN_FLIP and row["text_flip_length"] == 3
