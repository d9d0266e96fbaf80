import gc
import json
import os
import resource
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import make_data
import numpy as np
import pytest
from PIL import Image

from encode import demo_encoders, encoders, records
from encode.records import InputError, load_dataset
from jaxdit import conditions, data, wishes
from jaxdit.cache import DAY, Cache, cache_folder

SHAPES = wishes.Shapes(16, {"32x48": 1})


@pytest.fixture
def counted(monkeypatch):
    """What each demo encoder was asked for: {"text": [...], "vision": [...]}; and whether any still lives."""
    asked, alive = {"text": [], "vision": []}, []
    for kind, name in (("text", "load_text"), ("vision", "load_vision")):
        load = getattr(encoders, name)

        def loaded(section, *rest, load=load, kind=kind):
            encoder = load(section, *rest)
            encode = encoder.encode
            encoder.encode = lambda values: (asked[kind].extend(values), encode(values))[1]
            alive.append(weakref.ref(encoder))
            return encoder

        monkeypatch.setattr(encoders, name, loaded)
    return asked, alive


@pytest.fixture
def told(tmp_path):
    """dataset.json of a data set that the demo encoders made, and the config that points at it."""
    text, vision, vae = demo_encoders.DemoText(6), demo_encoders.DemoVision(64), demo_encoders.DemoVAE()
    dataset = {
        "encoders": {
            "vae": {"name": "demo"},
            "text": {"name": "demo", "max_tokens": 6},
            "vision": {"name": "demo", "area": 64, "precomputed": False},
        },
        "fingerprint": {"text": text.fingerprint, "vision": vision.fingerprint, "vae": vae.fingerprint},
        "widths": {"text": text.width, "vision": vision.width, "latent": 16},
    }
    return {"data": {"path": str(tmp_path / "nowhere")}}, json.loads(json.dumps(dataset))


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(255 - pixels).save(tmp_path / "b.png")
    return tmp_path / "a.png", tmp_path / "b.png"


def encode(told, fields, cache, known=()):
    made = [w for line in fields for w in wishes.wish(line, {"scales": [1, 1]}, SHAPES, "list:1")]
    asked = [conditions.spelled(wish) for wish in made]
    return conditions.encode(
        asked, *told, hashes=conditions.identify(asked), cache=Cache(cache), vae=demo_encoders.DemoVAE(),
        known=dict(known),
    )  # fmt: skip


def test_each_text_and_picture_is_encoded_once_and_the_encoders_leave(told, picture, tmp_path, counted):
    asked, alive = counted
    fields = [{"prompt": p, "reference": str(r), "init": str(picture[0])} for p in ("a cat", "a dog") for r in picture]
    given, problems = encode(told, [*fields, *fields], tmp_path / "cache")
    assert not problems and sorted(asked["text"]) == ["a cat", "a dog"] and len(asked["vision"]) == 2
    gc.collect()
    assert len(alive) == 2 and all(reference() is None for reference in alive)
    again, _ = encode(told, fields, tmp_path / "cache")
    assert len(alive) == 2, "everything is on the disk: no encoder is loaded"
    for one, other in zip(given, again):
        for name in ("text", "vision", "init"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    text = demo_encoders.DemoText(6).encode(["a cat"])[0]
    np.testing.assert_allclose(given[0].text, text, rtol=2**-8)  # as bfloat16 keeps it in the records
    pixels = np.asarray(Image.open(picture[0]))
    np.testing.assert_array_equal(given[0].vision, demo_encoders.DemoVision(64).encode([pixels])[0])
    small = np.asarray(Image.fromarray(pixels).resize((32, 48), Image.Resampling.LANCZOS, reducing_gap=3.0))
    np.testing.assert_array_equal(given[0].init, demo_encoders.DemoVAE().encode(small[None])[0])


def test_the_cache_knows_another_encoder_and_another_content(told, picture, tmp_path, counted):
    asked, _ = counted
    fields = [{"prompt": "a cat", "reference": str(picture[0])}]
    encode(told, fields, tmp_path / "cache")
    picture[1].replace(picture[0])  # the same name
    encode(told, fields, tmp_path / "cache")
    assert len(asked["vision"]) == 2 and len(asked["text"]) == 1
    told[1]["encoders"]["text"]["max_tokens"] = told[1]["fingerprint"]["text"]["max_tokens"] = 2
    given, _ = encode(told, fields, tmp_path / "cache")
    assert len(asked["text"]) == 2 and given[0].text.shape[0] == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    given, problems = encode(told, fields, tmp_path / "cache")
    assert not problems and len(asked["text"]) == 3 and len(asked["vision"]) == 3


def test_a_cache_that_cannot_be_written_costs_nothing_else(told, picture, tmp_path):
    (tmp_path / "file").write_text("")
    given, problems = encode(told, [{"prompt": "a cat", "reference": str(picture[0])}], tmp_path / "file" / "cache")
    assert not problems and given[0].text is not None


def test_a_prompt_that_is_too_long_is_told_with_what_is_cut(told, tmp_path, capsys):
    fields = [{"prompt": "one two three four five six seven"}, {"prompt": "one two three four five"}]
    for _ in range(2):  # from the cache too
        encode(told, fields, tmp_path / "cache")
        said = capsys.readouterr().out
        assert said.count("cut") == 1 and "6 tokens" in said and "'six seven'" in said


def test_of_a_very_long_prompt_both_ends_of_what_is_cut_are_told(told, capsys):
    words = " ".join(f"word{number}" for number in range(300))
    encode(told, [{"prompt": words}], None)
    (line,) = capsys.readouterr().out.splitlines()
    assert "'word5 word6" in line and "word299'" in line and "2,259 characters" in line and len(line) < 300


def test_a_slow_encoder_is_named_before_it_is_loaded(told, monkeypatch, capsys):
    def slow(section):
        assert capsys.readouterr().out == "Loading the text encoder from /models/t5 ...\n"
        return demo_encoders.DemoText(6)

    monkeypatch.setattr(encoders, "load_text", slow)
    told[1]["encoders"]["text"] |= {"name": "t5", "path": "/models/t5"}
    given, _ = encode(told, [{"prompt": "a cat"}], None)
    assert given[0].text is not None and not capsys.readouterr().out


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_the_cache_stays_within_its_room_and_what_was_used_last_stays(tmp_path):
    kept = np.zeros(1000, np.uint8)
    Cache(tmp_path).put("k0", a=kept)
    one = sizes(tmp_path)["k0.npz"]
    cache, now = Cache(tmp_path, room=10 * one), time.time()
    for number in range(10):
        cache.put(f"k{number}", a=kept)
        os.utime(tmp_path / f"k{number}.npz", (now, now - 100 + number))
    assert len(sizes(tmp_path)) == 10  # full
    assert cache.get("k0", "a") is not None  # used now
    cache.put("new", a=kept)
    assert set(sizes(tmp_path)) == {f"{name}.npz" for name in ("k0", *(f"k{n}" for n in range(3, 10)), "new")}
    another = Cache(tmp_path, room=3 * one)  # a process that begins on a folder that is too large
    another.put("last", a=kept)
    assert len(sizes(tmp_path)) == 2 and another.get("last", "a") is not None


def test_what_a_killed_process_left_in_the_cache_goes_and_what_is_in_hand_stays(tmp_path):
    for name, age in (("old.tmp", 2 * DAY), ("in_hand.tmp", 10)):
        (tmp_path / name).write_bytes(bytes(5_000))
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Cache(tmp_path, room=8_000).put("new", a=np.zeros(1000, np.uint8))
    assert set(sizes(tmp_path)) == {"in_hand.tmp", "new.npz"}


def test_whatever_is_wrong_with_a_kept_file_it_is_made_again(tmp_path):
    cache, kept = Cache(tmp_path), tmp_path / "k.npz"
    cache.put("k", a=np.arange(3))
    whole = kept.read_bytes()
    at = whole.index(b"PK\x01\x02")
    assert cache.get("k", "a") is not None and cache.get("k", "a", "b") is None
    for place in (*range(0, len(whole), 7), at + 8, at + 10):  # one bit says a password, or another compression
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = cache.get("k", "a")
        assert found is None or np.array_equal(found["a"], np.arange(3)), place


def test_many_use_one_cache_at_once(tmp_path):
    def work(seed):
        cache, rng, found = Cache(tmp_path, room=20_000), np.random.default_rng(seed), 0
        for _ in range(150):
            key = int(rng.integers(30))
            stored = cache.get(f"{key}", "a")
            if stored is None:
                stored = cache.put(f"{key}", a=np.full(1000, key, np.uint8))
            else:
                found += 1
            np.testing.assert_array_equal(stored["a"], np.full(1000, key, np.uint8))
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    assert min(found) > 10
    names = sizes(tmp_path)
    assert not any(name.endswith(".tmp") for name in names) and sum(names.values()) < 2 * 20_000


def test_a_full_disk_leaves_nothing_half_written_in_the_cache(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        found = Cache(tmp_path).put("a", a=np.zeros(100_000, np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(found["a"]) == 100_000 and not sizes(tmp_path) and "are not kept (File too large)" in caplog.text


def test_another_encoder_than_the_data_sets_is_refused(told, tmp_path):
    told[1]["fingerprint"]["text"]["version"] = 7
    with pytest.raises(InputError, match=r"text encoder found here .* version is 1, it was 7"):
        encode(told, [{"prompt": "a cat"}], tmp_path / "cache")


def test_mixing_is_between_both_vectors(told, picture, tmp_path):
    names = [str(name) for name in picture]
    lines = [{"reference": name} for name in names] + [{"reference": names, "mix": [3, 1]}]
    (a, b, mixed), _ = encode(told, lines, None)
    np.testing.assert_allclose(mixed.vision, 0.75 * a.vision + 0.25 * b.vision, rtol=1e-6)
    assert mixed.text is None and np.abs(a.vision - b.vision).max() > 0.1


def test_a_vector_of_ones_own_and_what_is_none(told, tmp_path):
    vector = np.arange(16, dtype=np.float64)
    np.save(tmp_path / "good.npy", vector)
    np.save(tmp_path / "row.npy", vector[None])
    np.save(tmp_path / "nan.npy", vector * np.nan)
    np.save(tmp_path / "words.npy", np.array(["a"] * 16))
    whole = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:100])
    (tmp_path / "flipped.npy").write_bytes(whole[:8] + bytes([whole[8] ^ 64]) + whole[9:])
    (tmp_path / "large.npy").write_bytes(whole.replace(b"(16,)", b"(%d,)" % 10**14).replace(10 * b" ", b"", 1))
    np.savez(tmp_path / "archive.npz", x=vector)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    names = ("good", "row", "nan", "words", "cut", "flipped", "large", "archive")
    given, problems = encode(told, [{"reference": str(tmp_path / f"{name}.npy")} for name in names], None)
    for found in given[:2]:
        np.testing.assert_array_equal(found.vision, vector.astype(np.float32))
    assert given[2:] == [None] * 6 and len(problems) == 6
    assert all(problem.startswith(f"list:1: {tmp_path / name}.npy: ") for problem, name in zip(problems, names[2:]))


def test_an_image_of_the_data_set_is_found_by_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    make_data.dataset(folder, {"64x96": 3, "96x64": 5})
    told = {"data": {"path": str(folder)}}, load_dataset(folder)
    source = data.Dataset(folder)
    bucket = source.buckets[-1]
    record = source.records(bucket, [1])[0]
    name = record["id"].decode()
    given, problems = encode(told, [{"reference": name}, {"reference": "nobody.png"}], tmp_path / "cache")
    np.testing.assert_array_equal(given[0].vision, record["vision"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"a file of the same name, and no picture")
    given_by_id, none = encode(told, [{"reference": f"id:{name}"}], tmp_path / "cache")
    np.testing.assert_array_equal(given_by_id[0].vision, record["vision"])
    assert not none
    (tmp_path / name).unlink()
    assert given[1] is None and problems == [
        f"list:1: nobody.png: no such file, and no image of this name in the data set {folder}"
    ]
    read, records = [], data.Dataset.records
    monkeypatch.setattr(data.Dataset, "records", lambda self, b, rows: (read.extend(rows), records(self, b, rows))[1])
    encode(told, [{"reference": name}], tmp_path / "cache")
    assert len(read) == 1  # the table of names is kept
    (tmp_path / "folder").mkdir()
    asked = [{"reference": name.rsplit("/", 1)[-1]}, {"reference": "folder"}]
    _, problems = encode(told, asked, tmp_path / "cache")
    assert problems[0].endswith(f"; is it {name}?") and "folder: that is a folder, and no image of this" in problems[1]
    told[0]["data"]["path"] = str(tmp_path / "gone")
    given, problems = encode(told, [{"reference": name}], tmp_path / "cache")
    assert given == [None] and "cannot be asked" in problems[0]


def test_tokens_are_rounded_as_in_the_records(told, tmp_path):
    given, _ = encode(told, [{"prompt": "a cat"}], None)
    tokens = demo_encoders.DemoText(6).encode(["a cat"])[0]
    exact = tokens.astype(records.DTYPES["bfloat16"]).astype(np.float32)
    np.testing.assert_array_equal(given[0].text, exact)
    assert given[0].text.dtype == np.float32 and (exact != tokens).any()


def test_more_sentences_than_go_at_once_are_all_encoded(told, tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "TEXTS", 2)
    given, problems = encode(told, [{"prompt": f"cat {number}"} for number in range(5)], None)
    assert not problems and len(given) == 5 and all(found.text is not None for found in given)


def test_a_picture_to_start_from_is_kept_for_each_size(told, picture, tmp_path):
    for size in ("32x48", "64x32"):
        (given,), _ = encode(told, [{"prompt": "a", "init": str(picture[0]), "size": size}], tmp_path / "cache")
        width, height = map(int, size.split("x"))
        assert given.init.shape[:2] == (height // 8, width // 8)


def test_vectors_of_an_encoder_that_nobody_knows_are_not_kept(told, picture, tmp_path, counted):
    asked, _ = counted
    told[1]["fingerprint"]["vision"] = records.PRECOMPUTED
    for _ in range(2):
        encode(told, [{"reference": str(picture[0])}], tmp_path / "cache")
    assert len(asked["vision"]) == 2  # another encoder may stand there tomorrow


def test_a_vector_lies_flat_or_in_one_row_and_an_encoder_says_all_of_itself(told, picture, tmp_path):
    np.save(tmp_path / "square.npy", np.zeros((4, 4)))
    given, (problem,) = encode(told, [{"reference": str(tmp_path / "square.npy")}], None)
    assert given == [None] and "an array [4, 4] of float64; the model takes a vector of 16 numbers" in problem
    told[1]["fingerprint"]["vae"].popitem()
    with pytest.raises(InputError, match=r"the vae encoder found here is not the one"):
        encode(told, [{"prompt": "a", "init": str(picture[0])}], None)


def test_what_a_process_writes_adds_up_in_its_cache(tmp_path):
    Cache(tmp_path).put("first", a=np.zeros(1000, np.uint8))
    one = sizes(tmp_path)["first.npz"]
    cache = Cache(tmp_path, room=5 * one)
    for number in range(12):
        cache.put(f"k{number}", a=np.zeros(1000, np.uint8))
    assert sum(sizes(tmp_path).values()) <= 5 * one


def test_names_are_found_behind_the_first_64_of_a_bucket(tmp_path):
    make_data.dataset(tmp_path / "64", {"32x32": 70})
    found = conditions.find_ids(data.Dataset(tmp_path / "64"), Cache(None))
    assert sorted(found.values()) == [("32x32", row) for row in range(70)]


def test_conditions_are_kept_where_the_flag_or_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "jaxdit"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder(None) == tmp_path / "home" / ".cache" / "jaxdit"
    assert cache_folder("") is None and cache_folder(str(tmp_path / "own")) == tmp_path / "own"


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("id:a", "id:b")])
def test_another_picture_to_start_from_is_another_latent_whatever_its_name(told, picture, tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    picture = [path.rename(name) for path, name in zip(picture, names)]
    fields = [{"prompt": "a", "init": str(name)} for name in picture]
    (one, other), problems = encode(told, fields, tmp_path / "cache")
    assert not problems and np.abs(one.init - other.init).max() > 0.1
    picture[1].replace(picture[0])  # the same name
    ((again),), _ = encode(told, fields[:1], tmp_path / "cache")
    np.testing.assert_array_equal(again.init, other.init)


def test_of_two_sizes_with_as_many_pixels_each_has_its_own_latent(told, picture, tmp_path):
    for size, shape in (("32x64", (8, 4)), ("64x32", (4, 8))):
        (given,), _ = encode(told, [{"prompt": "a", "init": str(picture[0]), "size": size}], tmp_path / "cache")
        assert given.init.shape[:2] == shape


def test_what_is_known_is_not_encoded_again(told, tmp_path, counted):
    text, vision = np.ones((2, 3), np.float32), np.ones(16, np.float32)
    known = {("text", "a cat"): text, ("vision", "id:brought.png"): vision}
    (given,), problems = encode(told, [{"prompt": "a cat", "reference": "brought.png"}], tmp_path / "cache", known)
    assert not problems and given.text is text and given.vision is vision
    assert counted == ({"text": [], "vision": []}, [])


def test_a_picture_that_cannot_be_started_from_is_told_once_with_its_field(told, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    given, (problem,) = encode(told, [{"prompt": "a", "init": str(bad), "count": 2}, {"prompt": "b"}], None)
    assert given[:2] == [None, None] and given[2] is not None
    assert problem.startswith(f"list:1: init={bad}: ") and str(bad) not in problem.removeprefix(f"list:1: init={bad}")
    (wish,) = wishes.wish({"prompt": "a", "init": str(bad)}, {"scales": [1, 1]}, SHAPES, "--init")
    _, (problem,) = conditions.encode(
        [wish], *told, hashes={}, cache=Cache(None), vae=demo_encoders.DemoVAE(), known={}
    )
    assert problem.startswith(f"--init={bad}: ")


def test_a_picture_of_too_many_pixels_names_no_field_of_a_configuration(told, picture, monkeypatch):
    monkeypatch.setattr(conditions, "MAX_PIXELS", 100)
    given, (problem,) = encode(told, [{"reference": str(picture[0])}], None)
    assert given == [None] and "60 x 40, the limit is 100" in problem and "config." not in problem


def test_that_nothing_is_kept_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    for name in "ab":
        cache.put(name, a=np.zeros(3))
    assert caplog.text.count("are not kept") == 1


def test_names_are_looked_for_anew_where_another_data_set_lies(tmp_path):
    cache = Cache(tmp_path / "cache")
    make_data.dataset(tmp_path / "64", {"32x32": 3})
    before = conditions.find_ids(data.Dataset(tmp_path / "64"), cache)
    shutil.rmtree(tmp_path / "64")
    make_data.dataset(tmp_path / "64", {"32x48": 5})
    after = conditions.find_ids(data.Dataset(tmp_path / "64"), cache)
    assert {bucket for bucket, _ in before.values()} == {"32x32"}
    assert sorted(after.values()) == [("32x48", row) for row in range(5)]


def test_a_vector_with_one_number_that_is_none_and_one_of_truths_are_refused(told, tmp_path):
    hurt = np.arange(16.0)
    hurt[3] = np.nan
    np.save(tmp_path / "hurt.npy", hurt)
    np.save(tmp_path / "truths.npy", hurt > 3)
    names = [str(tmp_path / f"{name}.npy") for name in ("hurt", "truths")]
    given, problems = encode(told, [{"reference": name} for name in names], None)
    assert given == [None, None]
    assert "not all of its numbers are finite" in problems[0] and "[16] of bool" in problems[1]


def test_a_search_for_names_is_announced_only_where_it_takes_long(tmp_path, capsys):
    make_data.dataset(tmp_path / "64", {"32x32": 3})
    conditions.find_ids(data.Dataset(tmp_path / "64"), Cache(None))
    assert not capsys.readouterr().out
