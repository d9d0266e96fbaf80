"""Odd photographs through the whole of encode with the demo encoders: what is stored is the picture that was meant."""

import json

import numpy as np
import pytest
import skimage
from PIL import Image

from encode import demo_encoders, main, pipeline, records
from tests.encode import fakes


def _encode(images, out, **changes):
    config = fakes.config(images, out, **({"shard_size": 100, "max_distortion": 1.5} | changes))
    summary = pipeline.run(config, main.load(config))
    refused = [json.loads(line) for line in (out / "quarantine.jsonl").read_text("utf-8").splitlines()]
    root = out / str(config.resolutions[0])
    found = {}
    for bucket in records.load_dataset(root)["buckets"]:
        found |= {record["id"].decode(): record | {"bucket": bucket} for record in records.open_bucket(root, bucket)}
    return summary, refused, found


def _decoded(record, field="latent"):
    return demo_encoders.DemoVAE().decode(record[field].astype(np.float32)[None])[0].astype(float)


def _caption(images, *names, text="a picture"):
    for name in names:
        (images / name).with_suffix(".txt").write_text(text)


def test_colours_keep_their_order_from_file_to_latent_and_back(tmp_path):
    Image.new("RGB", (128, 128), (220, 30, 30)).save(tmp_path / "red.png")
    Image.fromarray(skimage.data.camera()).save(tmp_path / "grey.png")
    _caption(tmp_path, "red.png", "grey.png")
    _, _, found = _encode(tmp_path, tmp_path / "out")
    for field in ("latent", "latent_flip"):
        red = _decoded(found["red.png"], field).mean((0, 1))
        assert np.abs(red - (220, 30, 30)).max() < 6
        grey = _decoded(found["grey.png"], field)
        assert np.abs(grey - grey.mean(-1, keepdims=True)).max() < 6


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_photograph_is_stored_as_its_upright_copy(tmp_path, orientation):
    upright = Image.fromarray(skimage.data.astronaut()).crop((0, 0, 300, 400))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[
        orientation
    ]  # Image.Transpose that brings it into the stored form
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(Image.Transpose(undo)).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    _caption(tmp_path, "turned.png", "upright.png")
    _, _, found = _encode(tmp_path, tmp_path / "out")
    width, height = map(int, found["turned.png"]["bucket"].split("x"))
    assert height > width
    for field in ("bucket", "latent", "latent_flip", "vision", "vision_flip", "pixel_hash"):
        assert np.array_equal(found["turned.png"][field], found["upright.png"][field])


def test_truncated_files_among_twenty_good_ones_are_two_lines(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    for number in range(20):
        Image.fromarray(pixels // (1 + number % 3)).save(tmp_path / f"{number}.jpg")
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:10_000])
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[: (tmp_path / "b.png").stat().st_size // 2])
    _caption(tmp_path, *(path.name for path in [*tmp_path.glob("*.jpg"), *tmp_path.glob("*.png")]))
    summary, refused, found = _encode(tmp_path, tmp_path / "out")
    assert (summary.encoded, summary.refused, len(found)) == (20, 2, 20)
    assert [(row["file"], row["stage"]) for row in refused] == [("a.jpg", "decode"), ("b.png", "decode")]
    assert all("truncated" in row["reason"] for row in refused)


def test_very_large_pictures_are_encoded_or_named_and_the_others_written(tmp_path):
    Image.new("L", (12_000, 9_000), 90).save(tmp_path / "large.png")
    Image.new("L", (20_000, 10_000), 90).save(tmp_path / "larger.png")
    for number in range(10):
        Image.new("RGB", (128, 96), (number, 0, 0)).save(tmp_path / f"{number}.png")
    _caption(tmp_path, *(path.name for path in tmp_path.glob("*.png")))
    summary, refused, found = _encode(tmp_path, tmp_path / "out", max_pixels=120_000_000)
    assert summary.encoded == 11
    assert [row["file"] for row in refused] == ["larger.png"]
    assert "too many pixels: 20000 x 10000" in refused[0]["reason"]
    assert np.abs(_decoded(found["large.png"]) - 90).max() < 4


def test_a_picture_that_takes_more_memory_than_allowed_is_named(tmp_path):
    Image.new("RGB", (8_000, 6_000), "red").save(tmp_path / "large.png")
    Image.new("RGB", (128, 96), "red").save(tmp_path / "small.png")
    _caption(tmp_path, "large.png", "small.png")
    summary, refused, _ = _encode(tmp_path, tmp_path / "out", decode_memory=100)
    assert summary.encoded == 1
    assert refused[0]["file"] == "large.png"
    assert refused[0]["reason"].startswith("takes more than config.decode_memory=100 MiB")


@pytest.mark.parametrize("pad", [False, True])
def test_extreme_shapes_are_in_every_field_or_in_none(tmp_path, pad):
    for name, size in {"wide": (6000, 500), "tall": (300, 4000), "plain": (640, 480)}.items():
        Image.new("RGB", size, (200, 120, 60)).save(tmp_path / f"{name}.png")
    _caption(tmp_path, "wide.png", "tall.png", "plain.png")
    summary, refused, found = _encode(tmp_path, tmp_path / "out", pad=pad)
    assert {row["stage"] for row in refused} == (set() if pad else {"aspect ratio"})
    assert summary.encoded == len(found) == (3 if pad else 1)
    for record in found.values():
        assert len(record["text"]) and record["vision"].size and record["latent"].size
        inside = (
            record["mask"].repeat(8, 0).repeat(8, 1) if record["mask"].size else np.ones(_decoded(record).shape[:2])
        )
        assert np.abs(_decoded(record)[inside == 1] - (200, 120, 60)).mean() < 12


def test_a_coloured_frame_survives_on_all_four_sides(tmp_path):
    pixels = np.full((1300, 1000, 3), 128, np.uint8)
    pixels[:24], pixels[-24:], pixels[:, :24], pixels[:, -24:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "framed.png")
    _caption(tmp_path, "framed.png")
    _, _, found = _encode(tmp_path, tmp_path / "out", resolutions=(512,))
    decoded = _decoded(found["framed.png"])
    middle_row, middle_column = decoded.shape[0] // 2, decoded.shape[1] // 2
    for place, colour in (
        ((2, middle_column), (255, 0, 0)),
        ((-3, middle_column), (0, 255, 0)),
        ((middle_row, 2), (0, 0, 255)),
        ((middle_row, -3), (255, 255, 0)),
    ):
        assert np.abs(decoded[place] - colour).max() < 80
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "largest stretch" in page
