"""encode.doctor: sound data sets are called sound; each damage is found, blamed on its file, and mended to the same bytes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from encode import demo, doctor, pipeline, records, subset
from encode.doctor import Call, examine, sentences
from encode.records import InputError
from tests.encode import fakes

ROOT = Path(__file__).resolve().parents[2]
SIZES = (128, 256)
OLDER = ("decode_workers", "decode_seconds", "decode_memory")  # fields that data sets of earlier versions lack


def _encode(images, out, encoders=None, **changes):
    pipeline.run(fakes.config(images, out, **{"resolutions": SIZES, **changes}), encoders or fakes.encoders())
    return out


def _load(config):
    return fakes.encoders()


def _files(verdict):
    return sorted({damage.file for damage in verdict.damages})


def _check(data, **changes):
    return examine(Call(data, **{"reencode": 0, **changes}), _load)


def _times(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*array_record-*")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return fakes.photographs(tmp_path_factory.mktemp("in"), 16)


@pytest.fixture(scope="module")
def sound(images, tmp_path_factory):
    """Two resolutions of three buckets with three shards each, and one picture that cannot be decoded."""
    (images / "004.png").write_bytes((images / "004.png").read_bytes()[:120])
    return _encode(images, tmp_path_factory.mktemp("sound") / "out")


@pytest.fixture
def out(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "out"))


def _shard(out, number=0, bucket="256x256", size="256"):
    return records.shard_path(out / size, bucket, number)


def _index(out, number=0, bucket="256x256", size="256"):
    return records.index_path(out / size, bucket, number)


def _raw(path):
    reader = ArrayRecordReader(str(path))
    found = list(reader.read_all())
    reader.close()
    return found


def _write(path, raws):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for raw in raws:
        writer.write(raw)
    writer.close()


def _edit(path, place, **values):
    """Give fields of a record other bytes, and write a shard that reads without complaint."""
    raws = _raw(path)
    example = tf_example_pb2.Example.FromString(raws[place])
    for name, change in values.items():
        value = example.features.feature[name].bytes_list.value
        value[0] = change(value[0])
    raws[place] = example.SerializeToString(deterministic=True)
    _write(path, raws)


def _json(path, change):
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


# A sound data set ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_sound_data_set_has_no_damage_and_is_not_written_to(sound, size):
    files = [path for path in sound.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    verdict = examine(Call(sound / str(size), reencode=100), _load)
    assert (verdict.damages, verdict.notes, verdict.records) == ([], [], 15)
    assert list(sentences(Call(sound / str(size)), verdict))[-1].endswith("is sound; there is nothing to do.")
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}


def test_kinds_of_sound_data_sets(tmp_path):
    images = fakes.photographs(tmp_path / "in", 7)
    for number, words in enumerate(("two left", "a dog", "cake left on a plate")):
        (images / f"00{number}.txt").write_text(words)
    Image.new("RGB", (900, 90), "red").save(images / "long.png")
    (images / "long.txt").write_text("a line on the left")
    Image.new("RGB", (60, 60), "blue").save(images / "small.png")
    (images / "small.json").write_text(json.dumps({"caption": "on the left", "flip": False}))
    for name, changes in {
        "pad": {"pad": True, "buckets": ((256, 256),), "max_distortion": 1.3},
        "small": {"max_upscale": 3.3, "shard_size": 1},
        "still": {"flip": False},
    }.items():
        out = _encode(images, tmp_path / name, **changes)
        for size in SIZES:
            verdict = examine(Call(out / str(size), reencode=100), _load)
            assert (verdict.damages, verdict.notes) == ([], []), name
    assert any(len(rows) == 0 for rows in map(np.load, (tmp_path / "small").rglob("index-*.npy")))  # an empty shard


def test_precomputed_vectors_are_the_users_own(tmp_path):
    images = fakes.photographs(tmp_path / "in", 4)
    for path in images.glob("*.png"):
        np.save(path.with_suffix(".dino.npy"), np.zeros(5, np.float32))
    config = fakes.config(images, tmp_path / "out")
    config.vision.precomputed = True
    only = pipeline.Encoders(fakes.Vae(), fakes.Text(), None)
    pipeline.run(config, only)
    verdict = examine(Call(tmp_path / "out" / "128"), lambda config: only)
    assert (verdict.damages, verdict.notes) == ([], [])
    np.save(images / "000.dino.npy", np.ones(5, np.float32))
    verdict = examine(Call(tmp_path / "out" / "128"), lambda config: only)
    assert verdict.damages == []
    assert "000.png (another precomputed vector)" in verdict.notes[0]


# Damage ----------------------------------------------------------------------------------------------------------------


def _flip(*places):
    def damage(out):
        data = bytearray(_shard(out, 1).read_bytes())
        for place in places:
            data[place] ^= 0x10
        _shard(out, 1).write_bytes(data)
        return [_shard(out, 1)]

    return damage


def _truncated(out):
    _shard(out, 1).write_bytes(_shard(out, 1).read_bytes()[:-1000])
    return [_shard(out, 1)]


def _deleted(out):
    _shard(out, 1).unlink()
    return [_shard(out, 1)]


def _replaced(out):
    shutil.copy(_shard(out, 0), _shard(out, 1))
    return [_shard(out, 1)]


def _replaced_with_its_index(out):
    shutil.copy(_shard(out, 0), _shard(out, 1))
    shutil.copy(_index(out, 0), _index(out, 1))
    return [_shard(out, 1)]


def _exchanged(out):
    _write(_shard(out, 0), _raw(_shard(out, 0))[::-1])
    np.save(_index(out, 0), np.load(_index(out, 0))[::-1])
    return [_shard(out, 0)]


def _record_lost(out):
    _write(_shard(out, 0), _raw(_shard(out, 0))[:1])
    np.save(_index(out, 0), np.load(_index(out, 0))[:1])
    return [_shard(out, 0)]


def _bucket_deleted(out):
    folder = _shard(out).parent
    lost = [path for path in folder.iterdir()]
    shutil.rmtree(folder)
    return lost


def _edited(**values):
    def damage(out):
        _edit(_shard(out, 0), 1, **values)
        return [_shard(out, 0)]

    return damage


def _nan(value):
    return b"\xc0\x7f" + value[2:]


EDITS = {
    "NaN": {"latent": _nan},
    "NaN in the mirror": {"latent_flip": _nan},
    "infinite text": {"text": lambda value: b"\x80\x7f" + value[2:]},
    "constant latent": {"latent": lambda value: bytes(len(value))},
    "another latent": {"latent": lambda value: bytes([value[0] ^ 1]) + value[1:]},
    "float32 latent": {"latent": lambda value: value * 2},
    "shorter latent": {"latent_flip": lambda value: value[:-8]},
    "odd bytes": {"text": lambda value: value[:-1]},
    "no text": {"text": lambda value: b""},
    "lost flip text": {"text_flip": lambda value: b""},
    "zero vision": {"vision": lambda value: bytes(len(value))},
    "wide vision": {"vision_flip": lambda value: value + value[:4]},
    "mask of twos": {"mask": lambda value: b"\2" * 32 * 32},
    "mask from nowhere": {"mask": lambda value: b"\0" * 32 * 31 + b"\1" * 32},
    "caption": {"caption": lambda value: value.replace(b"dark", b"pale")},
    "swapped caption": {"caption_flip": lambda value: value.replace(b"right", b"left").replace(b"dark", b"pale")},
    "flip forbidden": {"caption_flip": lambda value: b"", "text_flip": lambda value: b""},
    "hash": {"pixel_hash": lambda value: value[::-1]},
    "hash of other letters": {"pixel_hash": lambda value: b"Z" * 32},
    "id": {"id": lambda value: b"000.png"},
    "not UTF-8": {"caption": lambda value: b"\xff\xfe"},
}


def _index_row(out):
    rows = np.load(_index(out, 1))
    rows["text_length"][0] += 1
    np.save(_index(out, 1), rows)
    return [_index(out, 1)]


def _index_cut(out):
    _index(out, 1).write_bytes(_index(out, 1).read_bytes()[:150])
    return [_index(out, 1)]


def _index_gone(out):
    _index(out, 1).unlink()
    return [_index(out, 1)]


def _part(out, number=1):
    return out / "parts" / f"256x256-{number:05d}.json"


def _part_gone(out, number=1):
    _part(out, number).unlink()
    return [_part(out, number)]


def _part_garbled(out):
    _part(out).write_text(_part(out).read_text()[:300])
    return [_part(out)]


def _part_statistics(out):
    _json(_part(out), lambda part: part["stats"]["256"]["total"].__setitem__(0, "1/3"))
    return [_part(out)]


def _part_rows(out):
    _json(_part(out), lambda part: part["records"].reverse())
    return [_part(out)]


def _dataset(change):
    def damage(out):
        _json(out / "256" / "dataset.json", change)
        return [out / "256" / "dataset.json"]

    return damage


DATASETS = {
    "count": lambda value: value.update(count=99),
    "mean": lambda value: value["latent_mean"].__setitem__(1, 0.25),
    "std": lambda value: value.update(latent_std=value["latent_std"][:2]),
    "schema": lambda value: value.update(schema=7),
    "width": lambda value: value["widths"].update(text=77),
    "bucket lost": lambda value: value["buckets"].pop("256x256"),
    "bucket count": lambda value: value["buckets"]["256x256"].update(count=1),
    "fingerprint": lambda value: value["fingerprint"]["vae"].update(id="another"),
    "config": lambda value: value["config"].update(flip=False),
    "config lost": lambda value: value.pop("config"),
    "field lost": lambda value: value.pop("latent_statistics"),
    "longest": lambda value: value.update(text_longest=3),
    "duplicates": lambda value: value.update(duplicates=1),
}


def _dataset_gone(out):
    (out / "256" / "dataset.json").unlink()
    return [out / "256" / "dataset.json"]


def _dataset_cut(out):
    path = out / "256" / "dataset.json"
    path.write_text(path.read_text()[:500])
    return [path]


def _metadata(name):
    def gone(out):
        (_shard(out).parent / name).unlink()
        return [_shard(out).parent / name]

    return gone


def _metadata_lengths(out):
    path = _shard(out).parent / "dataset_info.json"
    _json(path, lambda value: value["splits"][0]["shardLengths"].reverse())
    return [path]


def _stray(out):
    shutil.copy(_shard(out, 0), _shard(out, 9))
    shutil.copy(_index(out, 0), _index(out, 9))
    left = _shard(out).with_name(".latents-train.array_record-00000.tmp")
    left.write_bytes(b"x")
    return [_shard(out, 9), _index(out, 9), left]


def _many(out):
    return [
        *_edited(latent=_nan)(out),
        *_truncated(out),
        *_index_gone_elsewhere(out),
        *_dataset(DATASETS["mean"])(out),
        *_part_gone(out, 2),
    ]


def _index_gone_elsewhere(out):
    path = sorted((out / "256").glob("index-3*-00000.npy"))[0]
    path.unlink()
    return [path]


DAMAGES = {
    "a byte at 70": _flip(70),
    "a byte in a record": _flip(300),
    "bytes at several places": _flip(90, 400, 700),
    "a byte of the footer": _flip(65600),
    "a byte between the records": _flip(20000),
    "truncated": _truncated,
    "deleted": _deleted,
    "replaced": _replaced,
    "replaced with its index": _replaced_with_its_index,
    "exchanged records": _exchanged,
    "a record lost": _record_lost,
    "a bucket deleted": _bucket_deleted,
    "index row": _index_row,
    "index cut": _index_cut,
    "index gone": _index_gone,
    "part gone": _part_gone,
    "part garbled": _part_garbled,
    "part's statistics": _part_statistics,
    "part's rows": _part_rows,
    "dataset.json gone": _dataset_gone,
    "dataset.json cut": _dataset_cut,
    "features.json gone": _metadata("features.json"),
    "dataset_info.json gone": _metadata("dataset_info.json"),
    "dataset_info.json wrong": _metadata_lengths,
    "stray files": _stray,
    "many at once": _many,
}
DAMAGES |= {f"record: {name}": _edited(**values) for name, values in EDITS.items()}
DAMAGES |= {f"dataset.json: {name}": _dataset(change) for name, change in DATASETS.items()}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_blamed_on_its_file_and_mended_to_the_same_bytes(sound, out, damage):
    times = _times(out)
    hurt = sorted(str(path.relative_to(out)) for path in damage(out))
    verdict = _check(out / "256")
    assert _files(verdict) == hurt
    words = list(sentences(Call(out / "256"), verdict))
    assert "--repair" in words[-1]
    assert len(words) == len(verdict.damages) + 2
    verdict = _check(out / "256", repair=True)
    assert verdict.damages == []
    assert verdict.mended
    ours, theirs = fakes.tree(out), fakes.tree(sound)
    assert [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)] == []
    untouched = {path for path in times if str(path.relative_to(out)) not in hurt}
    assert {path: path.stat().st_mtime_ns for path in untouched} == {path: times[path] for path in untouched}
    assert list(sentences(Call(out / "256"), verdict))[-1].endswith("is sound now; there is nothing to do.")


def test_the_other_resolution_keeps_its_files_and_is_mended_by_itself(sound, out):
    _truncated(out)
    _part_gone(out)
    _edit(_shard(out, 0, "128x128", "128"), 0, latent=_nan)
    before = {path: path.stat().st_mtime_ns for path in (out / "128").rglob("*") if path.is_file()}
    assert _check(out / "256", repair=True).damages == []
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert _files(_check(out / "128")) == ["128/128x128/1.0.0/latents-train.array_record-00000"]
    assert _check(out / "128", repair=True).damages == []
    assert fakes.tree(out) == fakes.tree(sound)


def test_encoders_that_never_give_the_same_twice_leave_every_resolution_consistent(out):
    class Noisy(fakes.Vae):
        def encode(self, pixels):
            noise = np.random.default_rng().normal(
                0, 0.004, (*pixels.shape[:1], *(s // 8 for s in pixels.shape[1:3]), 4)
            )
            return super().encode(pixels) + noise.astype(np.float32)

    def noisy(config):
        return pipeline.Encoders(Noisy(), fakes.Text(), fakes.Vision())

    _truncated(out)
    _part_garbled(out)
    assert examine(Call(out / "256", repair=True), noisy).damages == []
    for size in SIZES:
        assert examine(Call(out / str(size)), noisy).damages == []


def test_records_that_only_their_pictures_can_judge_are_found_by_encoding_again(sound, out):
    for field in ("text", "vision"):
        _edit(_shard(out, 0), 1, **{field: lambda value: value[: len(value) // 2] + value[: len(value) // 2]})
        assert _check(out / "256").damages == []
        verdict = _check(out / "256", reencode=100)
        assert _files(verdict) == ["256/256x256/1.0.0/latents-train.array_record-00000"]
        assert "encoded again" in verdict.damages[0].what and field in verdict.damages[0].what
        assert _check(out / "256", reencode=100, repair=True).damages == []
        assert fakes.tree(out) == fakes.tree(sound)


def test_the_examined_few_are_as_many_as_asked_for_and_drawn_by_the_seed(sound):
    seen = []
    for seed in (0, 0, 1):
        encoders = fakes.encoders()
        examine(Call(sound / "128", reencode=5, seed=seed), lambda config, encoders=encoders: encoders)
        seen.append([pixels.tobytes() for pixels in encoders.vae.seen])
        assert len(encoders.vae.seen) == 10  # and the mirror images
        assert {pixels.shape[1] * pixels.shape[2] for pixels in encoders.vae.seen} <= {128 * 128, 160 * 112}
    assert seen[0] == seen[1] != seen[2]


def test_encoders_that_differ_everywhere_are_not_used_to_repair(sound, out):
    class Broken(fakes.Vae):
        def encode(self, pixels):
            return -super().encode(pixels)

    _truncated(out)
    before = fakes.tree(out)
    verdict = examine(
        Call(out / "256", repair=True), lambda config: pipeline.Encoders(Broken(), fakes.Text(), fakes.Vision())
    )
    assert _files(verdict) == ["256", "256/256x256/1.0.0/latents-train.array_record-00001"]
    assert any("not to be trusted" in note for note in verdict.notes)
    assert fakes.tree(out) == before


# What keeps a repair or a comparison from happening --------------------------------------------------------------------


def test_changed_photographs_are_named_and_are_not_the_shards_fault(images, sound, out, tmp_path):
    other = Path(shutil.copytree(images, tmp_path / "other"))
    name = json.loads(_part(out).read_text())["records"][0][0]
    Image.new("RGB", (80, 80), "white").save(other / name)
    verdict = _check(out / "256", images=other, reencode=100)
    assert verdict.damages == []
    assert "1 of 15 photographs" in verdict.notes[0] and f"{name} (other pixels)" in verdict.notes[0]
    _truncated(out)
    _edit(_shard(out, 0), 0, latent=_nan)
    before = _shard(out, 1).read_bytes()
    verdict = _check(out / "256", images=other, repair=True)
    assert _files(verdict) == ["256/256x256/1.0.0/latents-train.array_record-00001"]
    assert any("cannot be mended" in note and name in note for note in verdict.notes)
    assert _shard(out, 1).read_bytes() == before
    assert "1 damaged file left" in list(sentences(Call(out / "256", repair=True), verdict))[-1]
    (other / name).unlink()
    verdict = _check(out / "256", images=other, repair=True)
    assert any("cannot be mended" in note and name in note for note in verdict.notes)
    assert _check(out / "256", images=images, repair=True).damages == []
    assert fakes.tree(out) == fakes.tree(sound)


def test_photographs_that_came_later_do_not_matter(images, sound, out, tmp_path):
    other = Path(shutil.copytree(images, tmp_path / "other"))
    shutil.copy(other / "000.png", other / "new.png")
    (other / "new.txt").write_text("a new one")
    _truncated(out)
    assert _check(out / "256", images=other, repair=True, reencode=8).damages == []
    assert fakes.tree(out) == fakes.tree(sound)


def test_a_data_set_that_has_grown_is_sound_and_mended_like_another(images, out, tmp_path):
    grown = Path(shutil.copytree(images, tmp_path / "grown"))
    for number in range(3):
        Image.new("RGB", (80, 80), (9 * number, 99, 200)).save(grown / f"new{number}.png")
        (grown / f"new{number}.txt").write_text(f"new on the left {number}")
    _encode(grown, out)
    calm = fakes.tree(out)
    for size in SIZES:
        verdict = _check(out / str(size), reencode=100, images=grown)
        assert (verdict.damages, verdict.notes, verdict.records) == ([], [], 18)
    for path in sorted((out / "256").rglob("latents-*"))[::2]:
        path.write_bytes(path.read_bytes()[:-1000])
    assert _check(out / "256", repair=True).damages == []
    assert fakes.tree(out) == calm


def test_a_data_set_older_than_some_fields_is_mended_too(sound, out):
    for size in SIZES:
        _json(out / str(size) / "dataset.json", lambda value: [value["config"].pop(name) for name in OLDER])
        _json(out / str(size) / "dataset.json", lambda value: value["config"]["vae"].pop("path"))
        _json(out / str(size) / "dataset.json", lambda value: value["encoders"]["vae"].pop("path"))
    _truncated(out)
    verdict = _check(out / "256", repair=True, reencode=8)
    assert (verdict.damages, verdict.notes) == ([], [])
    assert _shard(out, 1).read_bytes() == _shard(sound, 1).read_bytes()


def test_an_unfinished_data_set_is_not_judged(images, tmp_path):
    out = _encode(images, tmp_path / "out", resolutions=(128,))
    (out / "128" / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"not finished; run encode\.main again"):
        _check(out / "128", repair=True)


@pytest.mark.parametrize("what", ["photographs", "encoders", "others"])
def test_what_is_missing_is_said_and_the_rest_is_examined(out, tmp_path, what):
    def load(config):
        if what == "encoders":
            raise InputError("an encoder cannot be loaded: no such file")
        if what == "others":
            found = fakes.encoders()
            found.vae.fingerprint = {"id": "another"}
            return found
        return fakes.encoders()

    folder = tmp_path / "nowhere" if what == "photographs" else None
    reason = {"photographs": "is not there", "encoders": "no such file", "others": "was 'fake-vae', is 'another'"}[what]
    verdict = examine(Call(out / "256", images=folder), load)
    assert verdict.damages == []
    assert len(verdict.notes) == 1 and reason in verdict.notes[0] and "left out" in verdict.notes[0]
    _truncated(out)
    _index_gone_elsewhere(out)
    verdict = examine(Call(out / "256", images=folder, repair=True), load)
    assert _files(verdict) == ["256/256x256/1.0.0/latents-train.array_record-00001"]  # the index needs neither
    assert any("cannot be mended" in note and reason in note for note in verdict.notes)


def test_a_subset_is_examined_but_made_again_instead_of_repaired(sound, tmp_path):
    subset.subset(subset.Call(sound / "256", tmp_path / "nano", 6))
    data = tmp_path / "nano" / "256"
    verdict = _check(data, reencode=8)
    assert verdict.damages == [] and "plan.json is missing" in verdict.notes[0]
    path = next(data.rglob("latents-train.array_record-00000"))
    _edit(path, 0, latent=_nan)
    verdict = _check(data)
    assert str(path.relative_to(tmp_path / "nano")) in _files(verdict)
    assert "make the subset again" in list(sentences(Call(data), verdict))[-1]
    with pytest.raises(InputError, match="making it again"):
        _check(data, repair=True)


@pytest.mark.parametrize("name", ["", "256", "nowhere"])
def test_wrong_calls_are_refused(sound, tmp_path, name):
    target = sound if not name else tmp_path / name
    target.mkdir(exist_ok=True)
    with pytest.raises(InputError):
        _check(target)


def test_a_data_set_that_is_being_written_is_not_judged(out):
    with records.only_one(out), pytest.raises(InputError, match="another process"):
        _check(out / "256")


def test_nothing_is_judged_by_a_plan_that_cannot_be_read(out):
    (out / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan\.json"):
        _check(out / "256")


# The process -----------------------------------------------------------------------------------------------------------


def test_a_repair_killed_anywhere_and_started_again_gives_the_same_bytes(sound, out):
    for number in range(3):
        path = _shard(out, number, "256x256")
        path.write_bytes(path.read_bytes()[:-1000])
    _part_gone(out)
    code = (
        "import sys; from pathlib import Path; from encode import doctor; from tests.encode import fakes\n"
        "doctor.examine(doctor.Call(Path(sys.argv[1]), 0, repair=True), lambda config: fakes.encoders(pause=0.15))"
    )
    command, kills = [sys.executable, "-c", code, out / "256"], 0
    changed = [out / "256", out / "parts"]
    for wait in (1, 3, 0):  # files that may change before the kill; 0: none
        before = [fakes.tree(folder) for folder in changed]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while wait and process.poll() is None:
            now = [fakes.tree(folder) for folder in changed]
            if sum(a.get(name) != b.get(name) for a, b in zip(before, now) for name in a.keys() | b.keys()) >= wait:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert process.returncode == 0 and kills >= 1
    assert fakes.tree(out) == fakes.tree(sound)


def test_the_command_finds_names_and_mends_with_the_demo_encoders(tmp_path):
    demo.generate(tmp_path / "in", 12)
    config = [
        "--config=configs/encode_demo.py",
        f"--config.images={tmp_path / 'in'}",
        f"--config.out={tmp_path / 'out'}",
    ]
    encode = [sys.executable, "-m", "encode.main", *config, "--config.shard_size=4"]
    subprocess.run(encode, cwd=ROOT, check=True, capture_output=True)
    calm, data = fakes.tree(tmp_path / "out"), tmp_path / "out" / "128"

    def call(*options):
        command = [sys.executable, "-m", "encode.doctor", f"--data={data}", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines(), done.stderr

    code, lines, errors = call()
    assert code == 0, errors
    assert lines[-1] == f"{data} is sound; there is nothing to do."
    path = sorted(data.rglob("latents-train*"))[0]
    path.write_bytes(path.read_bytes()[:-1000])
    code, lines, _ = call("--reencode=0")
    assert code == 1
    assert lines[0].startswith(f"{path.relative_to(tmp_path / 'out')}: it cannot be opened")
    assert lines[-1].startswith("1 damaged file: call the same with --repair")
    code, lines, errors = call("--repair")
    assert code == 0, errors
    assert lines[-1] == f"{data} is sound now; there is nothing to do."
    assert fakes.tree(tmp_path / "out") == calm
    data = tmp_path / "nowhere"
    code, _, errors = call()
    assert code == 2 and "no such folder" in errors


def test_a_stop_ends_it_between_two_records(sound):
    with pytest.raises(pipeline.Stopped):
        examine(Call(sound / "256"), _load, stop=lambda: True)


def test_the_speed_of_reading_is_told(sound, caplog):
    caplog.set_level("INFO")
    verdict = _check(sound / "256")
    assert verdict.rate > 0
    assert any("records read" in line and "a second" in line for line in caplog.messages)
    assert doctor.Verdict().damages == []
