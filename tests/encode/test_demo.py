"""The embedded data set: what its pictures promise to whoever trains on them."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from encode import captions, demo, demo_encoders, images, source
from encode.demo_encoders import oklab
from encode.records import InputError

SCENES = demo.scenes(100, 0)


def test_hundred_captions_are_unique_and_cover_every_composition_once():
    assert len({scene.caption for scene in SCENES}) == 100
    assert len({(scene.side, scene.pose, scene.object) for scene in SCENES}) == 100


def test_captions_say_side_pose_and_object_and_never_the_light():
    light = {"light", "dark", "bright", "dim", "red", "orange", "yellow", "green", "blue", "purple", "pink", "glow"}
    for scene in SCENES:
        words = scene.caption.lower().strip(".").replace(",", "").split()
        assert scene.side in words and scene.object in scene.caption
        assert not set(words) & light
        other = dataclasses.replace(scene, hue=scene.hue + 30, strength=0.5)
        assert other.caption == scene.caption


@pytest.mark.parametrize("number", [0, 7, 33, 58])
def test_mirror_image_is_the_picture_of_the_swapped_caption(number):
    scene = SCENES[number]
    other = dataclasses.replace(scene, side={"left": "right", "right": "left"}[scene.side])
    assert captions.swap(scene.caption) == other.caption != scene.caption
    assert np.array_equal(images.mirrored(scene.pixels()), other.pixels())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_light_is_independent_of_the_composition(seed):
    drawn = demo.scenes(100, seed)
    assert demo.dependence(drawn) < 0.25
    assert len({(scene.hue, scene.strength) for scene in drawn}) == len(demo.HUES) * len(demo.STRENGTHS)
    worst = [dataclasses.replace(scene, strength=1.0 if scene.side == "left" else 0.5) for scene in drawn]
    assert demo.dependence(worst) > 0.99


def test_light_shows_in_the_mean_colour():
    scene = SCENES[0]
    for hue in demo.HUES:
        pixels = dataclasses.replace(scene, hue=hue, strength=1.0).pixels()
        _, a, b = oklab(pixels.reshape(-1, 3)).mean(axis=0)
        apart = (np.degrees(np.arctan2(b, a)) - hue + 180) % 360 - 180
        assert abs(apart) < 5
    levels = [dataclasses.replace(scene, strength=value).pixels().mean() for value in demo.STRENGTHS]
    assert np.all(np.diff(levels) > 10)


def test_compositions_differ_at_the_size_of_training():
    """Any two pictures of one light differ by more than the image code loses (about 31 dB)."""
    small = {}
    for scene in SCENES:
        white = dataclasses.replace(scene, hue=0, strength=1.0, size=(256, 256))
        small[scene.caption] = images.resize(white.pixels(), 128, 128).astype(np.float64).ravel()
    rows = np.stack(list(small.values()))
    squares = (rows**2).sum(axis=1)
    mse = (squares[:, None] + squares[None] - 2 * rows @ rows.T) / rows.shape[1] + np.eye(100) * 1e9
    assert 10 * np.log10(255**2 / mse.min()) < 25


def test_folder_is_what_a_user_would_have(tmp_path):
    assert demo.generate(tmp_path / "demo", 12, 3) == 12
    collection = source.walk(tmp_path / "demo")
    assert len(collection.items) == 12 and not collection.problems
    truth = json.loads((tmp_path / "demo" / ".truth.json").read_text())
    sizes = set()
    for item, scene in zip(collection.items, demo.scenes(12, 3)):
        assert item.captions == (scene.caption,)
        assert truth[item.id] == {name: getattr(scene, name) for name in ("side", "pose", "object", "hue", "strength")}
        pixels = images.decode(item.path, 10**6)
        assert np.array_equal(pixels, scene.pixels())
        sizes.add(pixels.shape[1::-1])
    assert sizes == set(demo.SIZES)


def test_pictures_for_one_bucket_are_square_and_otherwise_the_same_scenes(tmp_path):
    assert demo.generate(tmp_path / "demo", 4, side=96) == 4 and demo.generate(tmp_path / "demo", 4, side=96) == 0
    for path in sorted((tmp_path / "demo").glob("*.png")):
        with Image.open(path) as picture:
            assert picture.size == (96, 96)
    shown = [(scene.caption, scene.hue, scene.strength) for scene in demo.scenes(100, 0, 96)]
    assert len(set(shown)) == 100 and demo.dependence(demo.scenes(100, 0, 96)) < 0.3
    with pytest.raises(InputError, match="choose another folder"):
        demo.generate(tmp_path / "demo", 4)
    with pytest.raises(InputError, match="--side=12: at least 64 pixels"):
        demo.generate(tmp_path / "small", 4, side=12)
    assert not (tmp_path / "small").exists()


def test_second_run_does_nothing_and_says_so(tmp_path):
    command = [sys.executable, "-m", "encode.demo", f"--out={tmp_path / 'demo'}", "--count=4"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").iterdir()}
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Wrote 4 pictures" in first.stdout and "nothing to do" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").iterdir()} == before
    other = subprocess.run([*command, "--seed=1"], capture_output=True, text=True)
    assert other.returncode == 2 and "choose another folder" in other.stderr


def test_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    demo.generate(tmp_path / "whole", 6, 0)
    demo.generate(tmp_path / "cut", 6, 0)
    (tmp_path / "cut" / ".truth.json").unlink()
    (tmp_path / "cut" / "figure-0003.png").unlink()
    (tmp_path / "cut" / ".figure-0003.png.tmp").write_bytes(b"half")
    assert demo.generate(tmp_path / "cut", 6, 0) == 1
    read = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}  # noqa: E731
    assert read(tmp_path / "cut") == read(tmp_path / "whole")


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "mine.png")
    with pytest.raises(InputError, match="other files"):
        demo.generate(tmp_path, 4, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_more_than_a_hundred_show_the_same_compositions_in_other_lights():
    many = demo.scenes(250, 0)
    assert len({scene.caption for scene in many}) == 100
    lights = {}
    for scene in many:
        lights.setdefault(scene.caption, set()).add((scene.hue, scene.strength))
    assert sum(len(seen) > 1 for seen in lights.values()) > 90


def test_the_vectors_second_number_is_the_deviation_of_the_lightness():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # lightness 0 and 1: its mean is 0.5, its deviation too
    vector = demo_encoders.DemoVision(64).encode([pixels])[0]
    np.testing.assert_allclose(vector[:2], [0, (0.5 - 0.18) / 0.08], atol=1e-5)
