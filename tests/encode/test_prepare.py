"""What a worker makes of one file: sizes, padding with its mask, the vision model's view, precomputed vectors."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encode import buckets, images, prepare
from encode.demo_encoders import DemoVision

WHOLE = prepare.Resizing(64 * 64, 16, Image.Resampling.BILINEAR)


def _task(path, **changes):
    with Image.open(path) as image:
        size = image.size
    fields = {
        "id": path.name, "path": path, "size": size, "targets": {128: (128, 128)}, "pad": False,
        "max_pixels": 10**7, "whole": WHOLE, "vectors": None, "vector_width": 0,
    }  # fmt: skip
    return prepare.Task(**(fields | changes))


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_every_resolution_gets_the_whole_picture_at_its_size(photograph):
    found = prepare.prepare(_task(photograph, targets={128: (192, 96), 256: (384, 192)}))
    whole = np.asarray(Image.open(photograph))
    for resolution, size in ((128, (192, 96)), (256, (384, 192))):
        assert np.array_equal(found.pixels[resolution], images.resize(whole, *size))
        assert found.masks[resolution].shape == (0, 0)
    assert found.whole.shape[0] * 2 == found.whole.shape[1]
    assert found.pixel_hash == images.pixel_hash(whole)
    assert found.vectors is None


def test_a_file_changed_since_the_plan_is_refused(photograph):
    with pytest.raises(images.ImageProblem, match="changed since the plan"):
        prepare.prepare(_task(photograph, size=(300, 151)))


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 900), st.integers(16, 900), st.integers(4, 24), st.integers(4, 24))
def test_padding_keeps_the_shape_in_whole_patches_inside_the_bucket(width, height, columns, rows):
    bucket = columns * 16, rows * 16
    inner = buckets.inside((width, height), bucket)
    assert all(side % 16 == 0 and 16 <= side <= most for side, most in zip(inner, bucket))
    scale = min(bucket[0] / width, bucket[1] / height)
    assert all(abs(side - max(16, own * scale)) <= 8.001 for side, own in zip(inner, (width, height)))
    assert bucket[0] == inner[0] or bucket[1] == inner[1]


def test_padding_is_noise_around_the_picture_and_the_mask_says_where():
    picture = np.full((40, 400, 3), (200, 30, 90), np.uint8)
    canvas, mask = prepare.padded(picture, 256, 128, "a.png")
    assert canvas.shape == (128, 256, 3) and mask.shape == (16, 32)
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
    inside = mask.repeat(8, 0).repeat(8, 1).astype(bool)
    assert (canvas[inside] == (200, 30, 90)).all()
    noise = canvas[~inside].astype(float)
    assert abs(noise.mean() - 127.5) < 2 and abs(noise.std() - 73.9) < 2
    assert inside.any(1).sum() == 32  # 25.6 rows, rounded up to two patches
    top = np.flatnonzero(inside.any(1))[0]
    assert top % 16 == 0 and abs(top - 48) <= 16
    again, _ = prepare.padded(picture, 256, 128, "a.png")
    other, _ = prepare.padded(picture, 256, 128, "b.png")
    assert np.array_equal(canvas, again) and not np.array_equal(canvas, other)


@pytest.mark.parametrize("size", [(300, 300), (200, 600), (900, 90), (20, 20), (4000, 3000)])
def test_the_vision_models_view_has_the_area_and_whole_patches(size):
    width, height = WHOLE.size(*size)
    assert width % 16 == height % 16 == 0
    assert 0.6 < width * height / WHOLE.area < 1.7
    assert abs(np.log((width / height) / (size[0] / size[1]))) < 0.45
    assert pickle.loads(pickle.dumps(WHOLE)) == WHOLE
    square = DemoVision(64 * 64).resizing  # that goes to the worker processes as well
    assert pickle.loads(pickle.dumps(square)) == square
    assert square.size(*size) == square(np.zeros((*size[::-1], 3), np.uint8)).shape[:2] == (64, 64)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.dino.npy", np.ones(4, np.float32), None),
        ("a.dino.npy", np.ones((2, 2), np.float32), "finite numbers is wanted, found shape [2, 2]"),
        ("a.dino.npy", np.array([1, np.nan, 3, 4], np.float32), "finite"),
        ("a.dino.npy", np.ones(3, np.float32), "3 numbers found, 4 in the first"),
        ("a.dino.npy", np.array([object()]), "no vector can be read"),
        ("a.dino.npy", b"nothing", "no vector can be read"),
        ("a.json", {"dino": [1, 2, 3, 4]}, None),
        ("a.json", {"dino": "abc"}, "no vector can be read"),
        ("a.json", {"other": 1}, "no vector can be read"),
        ("a.json", b"{", "no vector can be read"),
    ],
)
def test_precomputed_vectors_are_read_or_refused_by_name(tmp_path, photograph, name, content, reason):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    task = _task(photograph, whole=None, vectors=(path, None), vector_width=4)
    if reason is None:
        found = prepare.prepare(task)
        assert found.whole is None and found.vectors[0].shape == (4,)
        assert found.vectors[0] is found.vectors[1]
        return
    with pytest.raises(prepare.VectorProblem) as caught:
        prepare.prepare(task)
    assert str(caught.value).startswith(name) and reason in str(caught.value)
