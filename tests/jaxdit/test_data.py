import errno
import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import make_data
import numpy as np
import pytest
from PIL import Image

from encode import records
from encode.whole_files import write_json
from jaxdit import data, order

ROOT = Path(__file__).parents[2]
COUNTS = {"64x64": 11, "48x80": 7, "80x48": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "64"
    return root, make_data.dataset(root, COUNTS)


def batches(root, count, skip=0, state=None, flip=0.5, **options):
    iterator = data.training_batches(data.Dataset(root, **options), seed=1, micro_batch=4, flip=flip)
    try:
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        got = [next(iterator) for _ in range(skip + count)]
        return got[skip:], iterator.get_state()
    finally:
        iterator.close()


def ids(batch):
    return batch["bucket"], tuple(batch["rows"])


@pytest.mark.parametrize("stop", [0, 1, 5, 7, 20, 37])
def test_restored_position_gives_the_same_batches(written, stop):
    root, _ = written
    _, state = batches(root, stop)
    ours, _ = batches(root, 20, state=state)
    want, _ = batches(root, 20, skip=stop)
    for a, b in zip(ours, want):
        assert ids(a) == ids(b)
        for name in ("latent", "text", "vision", "text_length"):
            np.testing.assert_array_equal(a[name], b[name])


def test_every_epoch_of_a_bucket_has_each_image_once(written):
    root, _ = written
    seen = {}
    for batch in batches(root, 200)[0]:
        seen.setdefault(batch["bucket"], []).extend(batch["rows"])
    for name, rows in seen.items():
        for start in range(0, len(rows) - COUNTS[name] + 1, COUNTS[name]):
            assert sorted(rows[start : start + COUNTS[name]]) == list(range(COUNTS[name]))
    assert set(seen) == set(COUNTS)  # the bucket of two is drawn though a micro-batch is four
    shares = {name: len(rows) / 800 for name, rows in seen.items()}
    for name, share in shares.items():
        assert abs(share - COUNTS[name] / 20) < 0.12


def test_order_does_not_depend_on_the_flips(written):
    root, _ = written
    with_flips, without = batches(root, 30, flip=0.5)[0], batches(root, 30, flip=0.0)[0]
    assert [ids(batch) for batch in with_flips] == [ids(batch) for batch in without]


def test_a_flip_takes_latent_text_and_vision_together(written):
    root, wanted = written
    dataset = data.Dataset(root)
    mean, std = np.array(dataset.info["latent_mean"]), np.array(dataset.info["latent_std"])
    flipped = 0
    for batch in batches(root, 50)[0]:
        for i, row in enumerate(batch["rows"]):
            record = wanted[batch["bucket"]][row]
            raw = batch["latent"][i] * std + mean
            end = "" if np.allclose(raw, record["latent"].astype(np.float32), atol=1e-3) else "_flip"
            flipped += end == "_flip"
            np.testing.assert_allclose(raw, record["latent" + end].astype(np.float32), atol=1e-3)
            np.testing.assert_array_equal(batch["vision"][i], record["vision" + end])
            length = batch["text_length"][i]
            np.testing.assert_array_equal(batch["text"][i][:length], record["text" + end])
            assert not batch["text"][i][length:].astype(np.float32).any()
    assert 70 < flipped < 130


def test_a_sample_that_must_not_be_flipped_never_is(tmp_path):
    written = make_data.dataset(tmp_path / "64", {"64x64": 5}, flip=False)
    for batch in batches(tmp_path / "64", 10, flip=1.0)[0]:
        for row, vision in zip(batch["rows"], batch["vision"]):
            np.testing.assert_array_equal(vision, written["64x64"][row]["vision"])


def test_latents_are_normalised_once(written):
    root, _ = written
    dataset = data.Dataset(root)
    rows = {name: np.arange(count) for name, count in COUNTS.items()}
    both = [
        dataset.read(name, rows[name], np.full(len(rows[name]), flip))["latent"] for name in rows for flip in (0, 1)
    ]
    flat = np.concatenate([latent.reshape(-1, 16) for latent in both])
    np.testing.assert_allclose(flat.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(flat.std(0), 1, atol=0.02)
    raw = data.denormalize(both[0], dataset.info)
    assert abs(raw.mean() - 3) < 0.2 and abs(raw.std() - 2) < 0.2  # what make_data wrote


def test_latents_are_normalised_by_one_division_each(written):
    root, wanted = written
    dataset = data.Dataset(root)
    rows, flips = np.array([6, 0, 3]), np.array([True, False, False])
    found = dataset.read("48x80", rows, flips)["latent"]
    raw = [wanted["48x80"][row]["latent_flip" if flip else "latent"] for row, flip in zip(rows, flips)]
    mean, std = (np.array(dataset.info[name], np.float32) for name in ("latent_mean", "latent_std"))
    np.testing.assert_array_equal(found, (np.stack(raw).astype(np.float32) - mean) / std)  # to the bit
    assert found.dtype == np.float32


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 1.0])
def test_an_image_is_held_out_by_the_hash_of_its_pixels(fraction):
    hashes = np.array([f"{number:032x}".encode() for number in range(3_000)], "S32")
    found = data.held_out(hashes, fraction)
    want = [int(hashlib.sha256(one).hexdigest()[:13], 16) / 16**13 < fraction for one in hashes.tolist()]
    np.testing.assert_array_equal(found, want)
    assert abs(found.mean() - fraction) < 0.03


@pytest.mark.parametrize("split", ["training", "held_out"])
def test_images_to_measure_on_are_spread_evenly_over_all_buckets(written, split):
    root, wanted = written
    dataset = data.Dataset(root, holdout_fraction=0.4)
    chosen = dataset.train if split == "training" else dataset.held_out
    places = [(name, row) for name in dataset.buckets for row in chosen[name]]
    for count in (1, 5, len(places), 100):
        number = min(count, len(places))
        want = [places[k * len(places) // number] for k in range(number)]
        got = []
        for batch, _, real in dataset.fixed_batches(split, 3, count):
            assert len(batch["latent"]) == 3
            got += list(batch["vision"][:real])
        np.testing.assert_array_equal(got, [wanted[name][row]["vision"] for name, row in want])


def test_a_data_set_of_more_shards_than_a_process_may_open_is_read(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 80}, shard=1)
    script = (
        "import resource; from jaxdit import data\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        f"dataset = data.Dataset({str(tmp_path / '64')!r})\n"
        "print(len({record['id'] for row in range(80) for record in dataset.records('64x64', [row])}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["80"], done.stderr


def test_records_come_in_the_order_asked_for_whichever_thread_is_first(written):
    root, wanted = written
    rows = [10, 0, 3, 3, 9, 1]
    found = data.Dataset(root).records("64x64", rows)
    assert [record["id"].decode() for record in found] == [wanted["64x64"][row]["id"] for row in rows]


def test_a_parsed_record_is_what_tfds_reads(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 6}, text=300, vision=1)  # lengths of one to four bytes
    make_data.dataset(tmp_path / "65", {"64x64": 6}, flip=False, mask=np.ones((8, 8), np.uint8))
    for root in (tmp_path / "64", tmp_path / "65"):
        ours, theirs = data.Dataset(root).records("64x64", range(6)), records.open_bucket(root, "64x64")
        for a, b in zip(ours, theirs, strict=True):
            assert set(a) == set(b)
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
                assert type(a[name]) is type(b[name]) and getattr(a[name], "dtype", 0) == getattr(b[name], "dtype", 0)


def test_a_record_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="tag 8"):
        data.parse(b"\x08\x01", {})


def test_held_out_images_never_train_and_do_not_depend_on_the_seed(written):
    root, _ = written
    dataset = data.Dataset(root, holdout_fraction=0.3)
    held = {name: set(rows) for name, rows in dataset.held_out.items()}
    assert 1 <= sum(map(len, held.values())) <= 12
    for seed in (0, 1):
        iterator = data.training_batches(dataset, seed=seed, micro_batch=4, flip=0.5)
        try:
            for _ in range(60):
                batch = next(iterator)
                assert not held[batch["bucket"]] & set(batch["rows"].tolist())
        finally:
            iterator.close()


def test_text_is_padded_to_the_smallest_length_that_holds_the_batch(written):
    root, _ = written
    assert {batch["text"].shape[1] for batch in batches(root, 20)[0]} == {64}
    lengths = Counter(batch["text"].shape[1] for batch in batches(root, 40, text_lengths=(8, 9, 32))[0])
    assert set(lengths) == {8, 9}
    with pytest.raises(records.DatasetError, match="must hold it"):
        data.Dataset(root, text_lengths=(4,))


def test_normalised_vision_has_unit_components(written):
    root, _ = written
    batch = batches(root, 1, normalize_vision=True)[0][0]
    np.testing.assert_allclose(np.linalg.norm(batch["vision"], axis=-1), np.sqrt(6), rtol=1e-5)


def test_a_mask_is_carried_and_mirrored(tmp_path):
    mask = np.ones((8, 8), np.uint8)
    mask[:, :3] = 0
    make_data.dataset(tmp_path / "64", {"64x64": 5}, mask=mask)
    dataset = data.Dataset(tmp_path / "64")
    batch = dataset.read("64x64", np.array([0, 1]), np.array([False, True]))
    np.testing.assert_array_equal(batch["mask"], [mask, mask[:, ::-1]])


def test_damage_names_the_shard(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 8})
    shard = records.shard_path(tmp_path / "64", "64x64", 1)
    content = bytearray(shard.read_bytes())
    content[5_000] ^= 255  # one byte within the second record
    shard.write_bytes(content)
    with pytest.raises(records.DatasetError, match="00001"):
        batches(tmp_path / "64", 10)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_disk_that_was_away_is_asked_again_and_its_files_opened_anew(tmp_path, monkeypatch, fails):
    make_data.dataset(tmp_path / "64", {"64x64": 8})
    dataset, parsed, asked = data.Dataset(tmp_path / "64"), data.Dataset._parsed, []
    arguments = "64x64", np.arange(4), np.zeros(4, bool)
    wanted = dataset.read(*arguments)

    def away(self, bucket, rows):
        asked.append(self._sources[bucket])
        if len(asked) <= fails:
            raise OSError(errno.ESTALE, "Stale file handle")
        return parsed(self, bucket, rows)

    monkeypatch.setattr(data.Dataset, "_parsed", away)
    monkeypatch.setattr(data, "AGAIN", (0.0,) * fails)
    found = dataset.read(*arguments)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert len(set(map(id, asked))) == fails + 1


@pytest.mark.parametrize("back", [True, False])
def test_a_data_set_that_is_away_is_waited_for_and_a_damaged_one_is_not(tmp_path, monkeypatch, back):
    make_data.dataset(tmp_path / "64", {"64x64": 8})
    dataset, slept = data.Dataset(tmp_path / "64"), []
    arguments = "64x64", np.arange(4), np.zeros(4, bool)
    wanted, parsed = dataset.read(*arguments), data.Dataset._parsed

    def failing(self, bucket, rows):
        if not (tmp_path / "64" / "dataset.json").exists() or not back:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return parsed(self, bucket, rows)

    def wait(seconds):
        slept.append(seconds)
        if seconds == 300:
            (tmp_path / "away").rename(tmp_path / "64")
        return False

    monkeypatch.setattr(data.Dataset, "_parsed", failing)
    monkeypatch.setattr(data, "AGAIN", (0.1, 60.0, 300.0))
    monkeypatch.setattr(dataset.closing, "wait", wait)
    if back:
        (tmp_path / "64").rename(tmp_path / "away")
        np.testing.assert_array_equal(dataset.read(*arguments)["latent"], wanted["latent"])
        assert slept == [0.1, 60.0, 300.0]
    else:
        with pytest.raises(data.ReadFailed, match=r"array_record-00000.*not connected.*If its disk was away"):
            dataset.read(*arguments)
        assert slept == [0.1]
        (tmp_path / "64").rename(tmp_path / "away")
        monkeypatch.setattr(data, "AGAIN", (0.1,))
        with pytest.raises(data.ReadFailed, match=r"a record of .*64/64x64.*not connected"):
            dataset.read(*arguments)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_shard_that_cannot_be_opened_is_named_before_anything_is_read(tmp_path, damage):
    make_data.dataset(tmp_path / "64", {"64x64": 8, "48x80": 3})
    shard = records.shard_path(tmp_path / "64", "64x64", 1)
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1000])
    else:
        shard.unlink()
    with pytest.raises(records.DatasetError, match=r"64x64.*array_record-00001: cannot be opened, its index .* says 4"):
        data.Dataset(tmp_path / "64")


@pytest.mark.parametrize("what", ["missing", "unfinished", "above", "schema"])
def test_wrong_data_sets_are_refused_with_the_reason(tmp_path, what):
    root = tmp_path / "64"
    make_data.dataset(root, {"64x64": 3})
    expected = {
        "missing": "no such folder",
        "unfinished": "not finished",
        "above": "name one of them: 64",
        "schema": "schema version 99 found, this program reads version 1",
    }[what]
    if what == "unfinished":
        (root / "dataset.json").unlink()
    if what == "schema":
        write_json(root / "dataset.json", json.loads((root / "dataset.json").read_text()) | {"schema": 99})
    path = {"missing": tmp_path / "nothing", "above": tmp_path}.get(what, root)
    with pytest.raises(records.DatasetError, match=expected):
        data.Dataset(path)


def test_tensorflow_is_not_needed(written):
    batches(written[0], 1)
    assert "tensorflow" not in sys.modules


def test_buckets_of_a_single_image_are_trained_like_any_other(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 1, "48x80": 1, "80x48": 1, "96x40": 1})
    got, _ = batches(tmp_path / "64", 40)
    assert {batch["bucket"] for batch in got} == {"64x64", "48x80", "80x48", "96x40"}
    assert all(batch["latent"].shape[0] == 4 and set(batch["rows"]) == {0} for batch in got)


def test_a_shard_whose_pictures_are_all_too_small_for_a_resolution_is_passed_over(tmp_path):
    from encode import pipeline
    from tests.encode import fakes

    images = fakes.photographs(tmp_path / "in", 12)
    for number in (3, 6):  # shards hold one picture: these are empty at 128
        Image.open(images / f"{number:03d}.png").resize((40, 60)).save(images / f"{number:03d}.png")
    config = fakes.config(images, tmp_path / "out", resolutions=(64, 128), shard_size=1, max_upscale=2.0)
    pipeline.run(config, fakes.encoders())
    for size, count in ((64, 12), (128, 10)):
        dataset = data.Dataset(tmp_path / "out" / str(size))
        assert sum(len(rows) for rows in dataset.index.values()) == count
        got, _ = batches(tmp_path / "out" / str(size), 60)
        seen = {(batch["bucket"], row) for batch in got for row in batch["rows"]}
        assert len(seen) == count


def test_ten_million_records_are_shuffled_and_gone_on_with_by_thirteen_bytes_each(monkeypatch):
    """No array of a permutation, no pass over the data: an epoch begins, and a resume goes on, at once."""
    count = 10_000_000
    hashes = np.random.default_rng(0).integers(0, 256, (1000, 32), np.uint8).view("S32")[:, 0]
    shard = np.zeros(1000, records.INDEX_DTYPE)
    shard["pixel_hash"], shard["text_length"], shard["text_flip_length"], shard["flags"] = (
        hashes,
        8,
        8,
        records.CAN_FLIP,
    )
    monkeypatch.setattr(records, "read_index", lambda root, bucket, number: shard)
    tracemalloc.start()
    facts = {"buckets": {"64x64": {"count": count, "shards": count // 1000}}}
    index = records.read_bucket_index(Path("nowhere"), facts, "64x64", data.kept_rows)
    rows = np.arange(count, dtype=np.uint32)
    held = tracemalloc.get_traced_memory()[0]
    assert index.nbytes + rows.nbytes == 13 * count and held <= 16 * count
    plan = order.Plan({"64x64": rows}, seed=3, micro_batch=64, flip=0.5)
    tracemalloc.reset_peak()
    iterator = iter(plan)
    first = [next(iterator)["rows"] for _ in range(3)]
    iterator.set_state({"micro_batch": 10**9, "taken": {"64x64": 64 * 10**9 + 17}})  # six thousand epochs on
    later = next(iterator)["rows"]
    assert tracemalloc.get_traced_memory()[1] - held < 2**20
    tracemalloc.stop()
    assert len(set(np.concatenate(first).tolist())) == 3 * 64 and not set(later.tolist()) & set(first[0].tolist())
    assert 0.4 < np.concatenate([*first, later]).mean() / count < 0.6


def test_any_byte_of_a_pixel_hash_changes_what_is_kept_of_it():
    row = np.zeros(1, records.INDEX_DTYPE)
    row["pixel_hash"] = b"0123456789abcdef0123456789abcdef"
    for place in range(32):
        other = row.copy()
        other["pixel_hash"] = row["pixel_hash"][0][:place] + b"x" + row["pixel_hash"][0][place + 1 :]
        assert data.kept_rows(other) != data.kept_rows(row), place


@pytest.mark.parametrize("few", [0, 2**16])
def test_an_order_of_few_and_of_many_has_each_number_once_and_is_its_seed_s(monkeypatch, few):
    monkeypatch.setattr(order, "FEW", few)

    def numbers(seed, count=40):
        found = order.permutation(count, order.generator(seed))
        return [int(found[place]) for place in range(count)]

    assert sorted(numbers(1)) == list(range(40)) and numbers(1) == numbers(1)
    assert len({tuple(numbers(seed)) for seed in range(20)}) == 20
    firsts = [numbers(seed, 4)[0] for seed in range(200)]
    assert all(20 < firsts.count(number) < 90 for number in range(4))


def test_padded_and_whole_pictures_of_one_bucket_have_each_its_mask(tmp_path):
    mask = np.ones((8, 8), np.uint8)
    mask[:, :3] = 0
    written = make_data.dataset(tmp_path / "64", {"64x64": 4})["64x64"]
    written[1]["mask"] = mask
    info = records.load_dataset(tmp_path / "64")
    spec = records.features(info["buckets"]["64x64"]["latent"], info["widths"]["text"], info["widths"]["vision"])
    for shard in range(info["buckets"]["64x64"]["shards"]):
        rows = records.read_index(tmp_path / "64", "64x64", shard)["pixel_hash"]
        kept = [record for record in written if record["pixel_hash"].encode() in set(rows.tolist())]
        records.write_shard(tmp_path / "64", "64x64", shard, kept, spec)
    batch = data.Dataset(tmp_path / "64").read("64x64", np.array([0, 1]), np.zeros(2, bool))
    np.testing.assert_array_equal(batch["mask"], [np.ones((8, 8)), mask])


def orders(seed, count=60):
    plan = iter(order.Plan({"a": np.arange(10), "b": np.arange(10)}, seed=seed, micro_batch=10, flip=0.5))
    return [next(plan) for _ in range(count)]


def test_each_epoch_seed_and_micro_batch_is_shuffled_and_flipped_anew():
    one, other = orders(1), orders(2)
    epochs = [tuple(taken["rows"]) for taken in one if taken["bucket"] == "a"]
    assert len(set(epochs)) == len(epochs)
    assert {tuple(taken["flips"]) for taken in one} > {tuple(one[0]["flips"])}
    assert [taken["bucket"] for taken in one] != [taken["bucket"] for taken in other]
    firsts = [next(tuple(t["rows"]) for t in found if t["bucket"] == "a") for found in (one, other)]
    assert firsts[0] != firsts[1]


def test_damage_of_the_first_record_of_a_shard_names_that_shard(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 8})
    assert data.Dataset(tmp_path / "64")._shards("64x64", [0, 3, 4, 7]) == [0, 1]
    assert data.Dataset(tmp_path / "64")._shards("64x64", [4]) == [1]


def test_a_text_length_that_just_holds_the_longest_caption_will_do(tmp_path):
    make_data.dataset(tmp_path / "64", {"64x64": 8})
    longest = records.load_dataset(tmp_path / "64")["text_longest"]
    assert data.Dataset(tmp_path / "64", text_lengths=(longest,)).text_lengths == (longest,)


def test_an_image_to_measure_on_has_the_numbers_of_its_own_id_in_every_batch(written):
    root, wanted = written
    names = {row["vision"].tobytes(): row["id"] for rows in wanted.values() for row in rows}
    dataset = data.Dataset(root, holdout_fraction=0.4)
    for split, size in (("training", 3), ("training", 4), ("held_out", 3)):
        for batch, numbers, real in dataset.fixed_batches(split, size, 100):
            for vision, number in zip(batch["vision"][:real], numbers[:real], strict=True):
                digest = hashlib.sha256(names[vision.tobytes()].encode()).digest()
                np.testing.assert_array_equal(number[:2], np.frombuffer(digest[:8], "<u4"))


def test_a_mirrored_picture_whose_caption_names_no_side_keeps_its_text(tmp_path, monkeypatch):
    made = make_data.record
    same = {"caption": "a boat", "caption_flip": "a boat", "text_flip": np.zeros((0, 12), make_data.BF16)}
    monkeypatch.setattr(make_data, "record", lambda *given, **options: made(*given, **options) | same)
    rows = make_data.dataset(tmp_path / "64", {"64x64": 3})["64x64"]
    batch = data.Dataset(tmp_path / "64").read("64x64", np.arange(3), np.ones(3, bool))
    for row, text, length, vision in zip(rows, batch["text"], batch["text_length"], batch["vision"], strict=True):
        np.testing.assert_array_equal(vision, row["vision_flip"])
        np.testing.assert_array_equal(text[:length], row["text"])
