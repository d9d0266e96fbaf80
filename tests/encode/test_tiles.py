"""Decoding in tiles: for pictures that are large, or where the device runs out of memory."""

import weakref

import numpy as np
import pytest
import torch

from encode import encoders, torch_encoders
from tests.encode import tiny_models


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tiny_models.save_vae(tmp_path_factory.mktemp("models") / "vae")
    return encoders.load_vae({"name": "flux", "path": str(folder), "dtype": "float32"}, "cpu")


@pytest.fixture
def latents():
    return np.random.default_rng(0).standard_normal((2, 16, 12, 16)).astype(np.float32)


@pytest.fixture
def decoded(vae, monkeypatch):
    """The shapes that the module is asked to decode, tiles of 64 pixels."""
    shapes, decoder = [], vae._module.decoder.forward
    monkeypatch.setattr(torch_encoders, "TILE", 64)
    monkeypatch.setattr(
        vae._module.decoder, "forward", lambda z, *rest: (shapes.append(tuple(z.shape)), decoder(z, *rest))[1]
    )
    return shapes


def test_tiles_give_about_the_same_picture_one_at_a_time(vae, latents, decoded):
    whole = vae.decode(latents)
    assert decoded == [(2, 16, 16, 12)]
    tiled = vae.decode(latents, tiled=True)
    assert tiled.shape == whole.shape == (2, 128, 96, 3)
    assert len(decoded) == 1 + 2 * 3 * 2 and all(n == 1 and max(h, w) <= 8 for n, _, h, w in decoded[1:])
    # Norms see a tile alone, so it is not quite the same; a tile in a wrong place would be another picture.
    apart, moved = (np.abs(a.astype(int) - b).mean() for a, b in ((tiled, whole), (np.roll(whole, 32, axis=1), whole)))
    assert 0 < apart < moved / 2


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # of CUDA, of other devices
def test_a_large_picture_and_a_full_memory_mean_tiles(vae, latents, decoded, monkeypatch, kind):
    monkeypatch.setattr(torch_encoders, "WHOLE_PIXELS", 128 * 96 - 1)
    tiled = vae.decode(latents)
    assert len(decoded) == 12
    monkeypatch.undo()
    decode = vae._decode

    class Activations:
        """What a failed attempt leaves on the card while its frames are alive."""

    held = weakref.WeakSet()

    def small_card(part):
        if not vae._module.use_tiling:
            activations = Activations()
            held.add(activations)
            raise kind("CUDA out of memory.")
        assert not held
        return decode(part)

    monkeypatch.setattr(torch_encoders, "TILE", 64)
    monkeypatch.setattr(vae, "_decode", small_card)
    np.testing.assert_array_equal(vae.decode(latents), tiled)
    with pytest.raises(kind):
        vae.decode(latents, tiled=False)


def test_encoding_is_never_tiled(vae, latents, monkeypatch):
    pixels = np.random.default_rng(1).integers(0, 255, (1, 128, 96, 3), np.uint8)
    before = vae.encode(pixels)
    monkeypatch.setattr(torch_encoders, "TILE", 64)
    vae.decode(latents, tiled=True)
    np.testing.assert_array_equal(vae.encode(pixels), before)
