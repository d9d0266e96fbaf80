"""Any file to upright sRGB pixels, or a named reason."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from encode import images

LIMIT = 10_000_000


def _corner(width=40, height=24):
    """A grey picture with a red top-left corner."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[:8, :12] = (255, 0, 0)
    return pixels


def _noise(width=300, height=200):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_once_and_known_from_the_header(tmp_path, orientation, suffix):
    upright = Image.fromarray(_corner())
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(images._TURNS[undo]) if undo in images._TURNS else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
    assert images.size(path, LIMIT) == (40, 24)
    found = images.decode(path, LIMIT)
    assert found.shape == (24, 40, 3)
    assert np.abs(found[2:6, 2:10].astype(int) - (255, 0, 0)).max() < 30
    assert np.abs(found[12:, 16:].astype(int) - 128).max() < 30


def test_truncated_files_are_refused_by_name(tmp_path):
    Image.fromarray(_noise()).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(_noise()).save(tmp_path / "b.png")
    for name in ("a.jpg", "b.png"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(images.ImageProblem, match="truncated"):
            images.decode(tmp_path / name, LIMIT)


def test_other_damage_has_a_reason(tmp_path):
    Image.fromarray(_noise()).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[5000:5100] = bytes(100)
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").write_text("not a picture")
    for name, reason in (
        ("a.png", "damaged|truncated"),
        ("b.png", "empty"),
        ("c.png", "not a picture"),
        ("d.png", "No such"),
    ):
        with pytest.raises(images.ImageProblem, match=reason):
            images.decode(tmp_path / name, LIMIT)


def test_too_many_pixels_is_known_before_a_byte_is_decoded(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"no pixels here"))
    for read in (images.size, images.decode):
        with pytest.raises(images.ImageProblem, match="too many pixels: 20000 x 10000"):
            read(tmp_path / "a.png", 120_000_000)


def test_a_large_picture_within_the_limit_is_no_warning_even_as_error(tmp_path):
    Image.new("L", (12000, 9000)).save(tmp_path / "a.png")
    code = f"from encode import images; print(images.size({str(tmp_path / 'a.png')!r}, 120_000_000))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(12000, 9000)", done.stderr


def test_tiny_pictures_are_refused(tmp_path):
    for side in (1, 4, 10):
        Image.new("RGB", (side, side)).save(tmp_path / "a.png")
        with pytest.raises(images.ImageProblem, match="too small"):
            images.size(tmp_path / "a.png", LIMIT)


def _half_clear(mode):
    """The left half transparent, the right half opaque black (or blue)."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    image.paste((10, 20, 30, 0), (0, 0, 16, 32))
    return image.convert(mode) if mode != "RGBA" else image


def _save_alpha(kind, path):
    if kind in ("RGBA", "LA"):
        _half_clear(kind).save(path)
    elif kind in ("P tRNS", "gif"):
        image = Image.new("P", (32, 32), 1)
        image.putpalette([200, 0, 0, 0, 0, 0])
        image.paste(0, (0, 0, 16, 32))
        image.save(
            path, transparency=0 if kind == "gif" else b"\x00\xff", **({"format": "GIF"} if kind == "gif" else {})
        )
    elif kind == "16-bit tRNS":
        wide = np.zeros((32, 32), np.uint16)
        wide[:, :16] = 1000
        buffer = io.BytesIO()
        Image.fromarray(wide).save(buffer, "PNG")
        data = buffer.getvalue()
        body = b"tRNS" + struct.pack(">H", 1000)
        path.write_bytes(data[:33] + struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body)) + data[33:])
    elif kind == "1-bit tRNS":
        image = Image.new("1", (32, 32), 0)
        image.paste(1, (0, 0, 16, 32))
        image.save(path, transparency=1)
    else:
        image = Image.new(kind.split()[0], (32, 32), 0)
        clear = {"RGB tRNS": (9, 9, 9), "L tRNS": 9}[kind]
        image.paste(clear, (0, 0, 16, 32))
        image.save(path, transparency=clear)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P tRNS", "gif", "RGB tRNS", "L tRNS", "16-bit tRNS", "1-bit tRNS"])
def test_alpha_in_every_form_is_composited_on_white(tmp_path, kind):
    path = tmp_path / "a.png"
    _save_alpha(kind, path)
    found = images.decode(path, LIMIT)
    assert (found[:, :16] == 255).all()
    assert (found[:, 16:] == 0).all()


def test_sixteen_bit_grey_is_scaled_not_clamped(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        found = images.decode(tmp_path / name, LIMIT)
        assert np.abs(found[..., 0] - ramp / 257).max() <= 0.51
        assert (found[..., 0] == found[..., 2]).all()


def test_an_embedded_profile_is_converted_and_a_broken_one_ignored(tmp_path):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = (profile.index(tag, 128) for tag in (b"rXYZ", b"gXYZ"))
    swapped = bytearray(profile)  # red and green primaries exchanged
    swapped[red + 4 : red + 12], swapped[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    for mode, name in (("RGB", "a.png"), ("RGBA", "b.png")):
        picture = Image.new("RGB", (32, 32), (220, 30, 30)).convert(mode)
        picture.save(tmp_path / name, icc_profile=bytes(swapped))
        pixel = images.decode(tmp_path / name, LIMIT)[5, 5].astype(int)
        assert np.abs(pixel - (30, 220, 30)).max() <= 2
        picture.save(tmp_path / name, icc_profile=b"broken")
        assert images.decode(tmp_path / name, LIMIT)[5, 5].tolist() == [220, 30, 30]


def test_grey_and_cmyk_become_three_channels(tmp_path):
    Image.new("L", (32, 32), 77).save(tmp_path / "a.png")
    assert (images.decode(tmp_path / "a.png", LIMIT) == 77).all()
    Image.new("RGB", (32, 32), (220, 30, 30)).convert("CMYK").save(tmp_path / "b.jpg", quality=100)
    assert np.abs(images.decode(tmp_path / "b.jpg", LIMIT).astype(int) - (220, 30, 30)).max() < 6


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        found = images.decode(tmp_path / f"a.{suffix}", LIMIT)[0, 0].astype(int)
        assert found[0] - found[2] > 200


def test_a_picture_of_its_buckets_size_goes_through_bit_for_bit(tmp_path):
    pixels = _noise(832, 1216)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(images.resize(images.decode(tmp_path / "a.png", LIMIT), 832, 1216), pixels)


def test_nothing_is_cropped():
    pixels = np.full((1300, 1000, 3), 128, np.uint8)
    pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    found = images.resize(pixels, 448, 576).astype(int)
    for place, colour in (
        ((0, 200), (255, 0, 0)),
        ((-1, 200), (0, 255, 0)),
        ((300, 0), (0, 0, 255)),
        ((300, -1), (255, 255, 0)),
    ):
        assert np.abs(found[place] - colour).max() < 40


def test_the_hash_tells_pixels_and_size_apart():
    pixels = _noise(20, 30)
    assert images.pixel_hash(pixels) == images.pixel_hash(pixels.copy())
    assert len(images.pixel_hash(pixels)) == 32
    assert images.pixel_hash(pixels) != images.pixel_hash(pixels.reshape(20, 30, 3))
    assert images.pixel_hash(pixels) != images.pixel_hash(images.mirrored(pixels))


def test_mirrored_twice_is_the_picture():
    pixels = _noise(20, 30)
    assert np.array_equal(images.mirrored(images.mirrored(pixels)), pixels)
    assert np.array_equal(images.mirrored(pixels)[:, 0], pixels[:, -1])
    assert np.array_equal(images.mirrored(pixels[None])[0], images.mirrored(pixels))
