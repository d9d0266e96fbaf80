"""The embedded encoders: their protocols, and the properties that training relies on."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.fft
import skimage.data

from encode import demo, encoders, images

VAE = encoders.load_vae({"name": "demo", "path": "", "dtype": "float32"})
TEXT = encoders.load_text({"name": "demo", "max_tokens": 64})
VISION = encoders.load_vision({"name": "demo", "area": 128 * 128})
CAPTION = "A figure on the left side of the picture, to the left of a tall tree, bows low."


def _psnr(one, other):
    return 10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2))


def _demo_pictures(count=20):
    for scene in demo.scenes(100, 0)[:count]:
        width, height = (side // 2 for side in scene.size)
        yield images.resize(scene.pixels(), width, height)


def _photograph(name):
    pixels = getattr(skimage.data, name)()
    return np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels


def test_vae_gives_back_the_demo_pictures_above_30_decibels():
    values = [_psnr(pixels, VAE.decode(VAE.encode(pixels[None]))[0]) for pixels in _demo_pictures()]
    assert np.mean(values) > 30 and min(values) > 26  # 31.3 over all hundred, the worst 26.5


@pytest.mark.parametrize(
    "name, least",
    [("astronaut", 22.5), ("chelsea", 29.5), ("coffee", 25), ("rocket", 30), ("camera", 25.5)],
)
def test_vae_gives_back_photographs_recognisably(name, least):
    pixels = images.resize(_photograph(name), 128, 128)
    assert _psnr(pixels, VAE.decode(VAE.encode(pixels[None]))[0]) > least


def test_vae_code_has_sixteen_channels_of_like_size_and_is_a_function_of_one_picture():
    pictures = [pixels for pixels in _demo_pictures() if pixels.shape == (144, 112, 3)]
    codes = VAE.encode(np.stack(pictures))
    assert codes.shape == (len(pictures), 18, 14, 16) and codes.dtype == np.float32 and VAE.channels == 16
    deviations = codes.std(axis=(0, 1, 2))
    assert deviations.max() / deviations.min() < 1.6 and 0.3 < deviations.mean() < 2
    for pixels, code in zip(pictures, codes):
        assert np.allclose(VAE.encode(pixels[None])[0], code, atol=1e-5)


def test_vae_decode_inverts_encode_on_what_it_keeps():
    pixels = images.resize(_photograph("coffee"), 64, 64) // 2 + 64  # far from the limits of 8 bits
    codes = VAE.encode(pixels[None])
    again = VAE.encode(VAE.decode(codes))
    assert np.abs(again - codes).max() < 0.02  # 8-bit pixels


def test_vae_coefficients_match_a_discrete_cosine_transform_done_elsewhere():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 8, 8, 3)).astype(np.uint8)
    kept = VAE.encode(pixels)[0, 0, 0]
    luma = (pixels[0] / 127.5 - 1) @ np.array([0.299, 0.587, 0.114])
    assert np.isclose(kept.sum() / 4, scipy.fft.dctn(luma, norm="ortho")[0, 0], atol=1e-4)  # the Hadamard's first row


def test_vae_keeps_red_red_and_grey_grey():
    red = np.broadcast_to(np.array([220, 30, 30], np.uint8), (1, 64, 64, 3))
    back = VAE.decode(VAE.encode(red)).mean(axis=(0, 1, 2))
    assert np.allclose(back, [220, 30, 30], atol=1.5)
    grey = VAE.decode(VAE.encode(images.resize(_photograph("camera"), 64, 64)[None])).astype(int)
    assert np.ptp(grey, axis=-1).max() <= 1


def test_vae_refuses_sides_that_are_no_multiples_of_eight():
    with pytest.raises(ValueError, match="60x64"):
        VAE.encode(np.zeros((1, 64, 60, 3), np.uint8))


def test_text_has_one_vector_a_word_and_sign_of_about_unit_size():
    (tokens,) = TEXT.encode([CAPTION])
    assert tokens.shape == (22, TEXT.width) and tokens.dtype == np.float32
    assert TEXT.count_tokens(CAPTION) == 22
    assert 0.8 < tokens.std() < 1.2 and abs(tokens.mean()) < 0.1


def test_text_of_another_word_differs_there_and_next_to_it_only():
    one, other = TEXT.encode([CAPTION, CAPTION.replace("tree", "lamp")])
    changed = np.flatnonzero(np.abs(one - other).max(axis=1) > 1e-6)
    assert changed.tolist() == [15, 16, 17]


def test_text_in_another_order_is_another_sequence():
    plain, swapped = TEXT.encode(["the dog bites the man", "the man bites the dog"])
    assert plain.shape == swapped.shape
    bag = lambda tokens: tokens[np.lexsort(np.round(tokens.T, 3))]  # noqa: E731
    assert np.abs(plain - swapped).max() > 0.5
    assert np.abs(bag(plain) - bag(swapped)).max() > 0.5  # not even the same vectors in another order


def test_text_is_the_same_alone_in_company_and_in_another_process():
    alone = TEXT.encode([CAPTION])[0]
    assert np.array_equal(TEXT.encode(["a cat", CAPTION, ""])[1], alone)
    program = (
        "import sys; from encode import encoders; t = encoders.load_text({'name': 'demo', 'max_tokens': 64});"
        "sys.stdout.buffer.write(t.encode([sys.argv[1]])[0].tobytes());"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, CAPTION], capture_output=True, check=True)
    assert done.stdout == alone.tobytes()


def test_text_is_cut_at_max_tokens_and_never_empty():
    short = encoders.load_text({"name": "demo", "max_tokens": 8})
    (tokens,) = short.encode([CAPTION])
    assert tokens.shape == (8, TEXT.width) and short.count_tokens(CAPTION) == 22
    (end,) = short.encode([""])
    assert end.shape == (1, TEXT.width) and np.abs(end).max() > 0
    with pytest.raises(ValueError, match="max_tokens"):
        encoders.load_text({"name": "demo", "max_tokens": 0})


def test_text_does_not_depend_on_case_or_composition_of_letters():
    one, other = TEXT.encode(["Un café à gauche", "un cafe\u0301 a\u0300 gauche"])
    assert np.array_equal(one, other)


def test_vision_of_the_mirror_image_is_the_same():
    pictures = [*_demo_pictures(6), _photograph("coffee"), _photograph("astronaut")]
    plain = VISION.encode(pictures)
    mirrored = VISION.encode([images.mirrored(pixels) for pixels in pictures])
    assert plain.shape == (8, VISION.width) and plain.dtype == np.float32
    assert np.abs(plain - mirrored).max() < 0.02


def test_vision_does_not_depend_on_the_size():
    for scene in demo.scenes(100, 0)[:10]:
        width, height = scene.size
        pixels = scene.pixels()
        one, other = VISION.encode([pixels, images.resize(pixels, width // 2, height // 2)])
        assert np.abs(one - other).max() < 0.15


def test_vision_tells_the_light_and_little_of_the_composition():
    drawn = demo.scenes(100, 0)
    vectors = VISION.encode([scene.pixels() for scene in drawn])
    assert 0.3 < vectors.std(axis=0).mean() < 2 and np.abs(vectors).max() < 6
    inputs = np.c_[vectors, np.ones(100)]
    angles = np.radians([scene.hue for scene in drawn])
    light = np.c_[np.cos(angles), np.sin(angles), [scene.strength for scene in drawn]]
    rest = light - inputs @ np.linalg.lstsq(inputs, light, rcond=None)[0]
    assert (rest.std(axis=0) / light.std(axis=0)).max() < 0.2
    by_side = [vectors[[scene.side == side for scene in drawn]].mean(axis=0) for side in demo.SIDES]
    assert np.abs(by_side[0] - by_side[1]).max() < 0.4 * vectors.std(axis=0).max()


@pytest.mark.parametrize("load", [encoders.load_vae, encoders.load_text, encoders.load_vision])
def test_unknown_name_is_refused_with_the_choices(load):
    with pytest.raises(ValueError, match=r"'sd15'.*demo"):
        load({"name": "sd15"})


@pytest.mark.parametrize("encoder", [VAE, TEXT, VISION])
def test_fingerprint_survives_json(encoder):
    assert json.loads(json.dumps(encoder.fingerprint)) == encoder.fingerprint and encoder.fingerprint["id"]
