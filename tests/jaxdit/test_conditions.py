import gc
import json
import weakref

import make_data
import numpy as np
import pytest
from PIL import Image

from encode import demo_encoders, encoders
from encode.records import InputError, load_dataset
from jaxdit import conditions, data, wishes

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
    asked = [w for line in fields for w in wishes.wish(line, {"scales": [1, 1]}, SHAPES, "list:1")]
    return conditions.encode(
        asked, *told, hashes=conditions.identify(asked), cache=conditions.Cache(cache), vae=demo_encoders.DemoVAE(),
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
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:100])
    names = ("good", "row", "nan", "words", "cut")
    given, problems = encode(told, [{"reference": str(tmp_path / f"{name}.npy")} for name in names], None)
    for found in given[:2]:
        np.testing.assert_array_equal(found.vision, vector.astype(np.float32))
    assert given[2:] == [None] * 3 and len(problems) == 3
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
    assert given[1] is None and problems == [
        f"list:1: nobody.png: no such file, and no image of this name in the data set {folder}"
    ]
    read, records = [], data.Dataset.records
    monkeypatch.setattr(data.Dataset, "records", lambda self, b, rows: (read.extend(rows), records(self, b, rows))[1])
    encode(told, [{"reference": name}], tmp_path / "cache")
    assert len(read) == 1  # the table of names is kept
    told[0]["data"]["path"] = str(tmp_path / "gone")
    given, problems = encode(told, [{"reference": name}], tmp_path / "cache")
    assert given == [None] and "cannot be asked" in problems[0]
