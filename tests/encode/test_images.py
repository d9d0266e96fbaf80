"""Any file to upright sRGB pixels, or a named reason."""

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, ImageCms

from encode import images
from tests.encode import fuzz

LIMIT = 10_000_000


def _noise(width=300, height=200):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_truncated_files_are_refused_by_name(tmp_path):
    """Every format, cut in half; what has two pictures or an empty end is cut within its first picture."""
    for name, data in fuzz.seeds().items():
        part = len(data) // (4 if name.startswith(("moving", "two")) else 2)
        (tmp_path / name).write_bytes(data[:part])
        reason = "animated" if name == "moving.jxl" else "truncated"
        with pytest.raises(images.ImageProblem, match=reason):
            images.decode(tmp_path / name, LIMIT)


def test_a_photograph_cut_anywhere_is_truncated(tmp_path):
    for name, options in (("a.jpg", {"quality": 95}), ("b.png", {}), ("c.webp", {}), ("d.avif", {}), ("e.heic", {})):
        Image.fromarray(_noise()).save(tmp_path / name, **options, **({"format": "HEIF"} if name == "e.heic" else {}))
        data = (tmp_path / name).read_bytes()
        for share in (0.2, 0.5, 0.9, 0.99):
            (tmp_path / name).write_bytes(data[: int(len(data) * share)])
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


def _damaged(data, way, at):
    return {
        "hole": data[:at] + data[at + 900 :],
        "ones": data[:at] + b"\xff" * 300 + data[at + 300 :],
        "marker": data[:at] + b"\xff\xc1" + data[at + 2 :],
    }[way]


@pytest.mark.parametrize("way", ["hole", "ones", "marker"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}])
def test_a_jpeg_that_lacks_pixels_is_refused_though_its_decoder_paints_them_grey(tmp_path, options, way):
    photograph = Image.fromarray(skimage.data.astronaut())
    photograph.save(tmp_path / "a.jpg", quality=90, **options)
    data = (tmp_path / "a.jpg").read_bytes()
    assert np.abs(images.decode(tmp_path / "a.jpg", LIMIT).astype(int) - skimage.data.astronaut()).mean() < 5
    places = range(3000, len(data) - 3000, len(data) // 12)
    refused = 0
    for at in places:
        (tmp_path / "a.jpg").write_bytes(_damaged(data, way, at))
        try:
            images.decode(tmp_path / "a.jpg", LIMIT)
        except images.ImageProblem as problem:
            assert str(problem).startswith(("damaged: ", "truncated: "))
            refused += 1
    # A hole can happen to end where another code begins; then nothing in the file tells.
    assert refused >= len(places) * (0.6 if way == "hole" else 0.9)


def test_what_cameras_append_to_a_jpeg_does_no_harm(tmp_path):
    photograph = Image.fromarray(skimage.data.astronaut())
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}, {"optimize": True, "subsampling": 2}):
        photograph.save(tmp_path / "a.jpg", **options)
        data = (tmp_path / "a.jpg").read_bytes()
        whole = images.decode(tmp_path / "a.jpg", LIMIT)
        for tail in (b"\0" * 999, b"\xff\xff\x00\xc1", data, b"ftypmp42 a short film"):
            (tmp_path / "a.jpg").write_bytes(data + tail)
            assert np.array_equal(images.decode(tmp_path / "a.jpg", LIMIT), whole)
        (tmp_path / "a.jpg").write_bytes(data[:-2] + b"\xff" * 5 + data[-2:])  # filling before a marker is allowed
        assert np.array_equal(images.decode(tmp_path / "a.jpg", LIMIT), whole)


def test_a_flipped_bit_among_the_pixels_or_checksums_of_a_png_is_found(tmp_path):
    Image.fromarray(_noise()).save(tmp_path / "a.png", compress_level=0)
    data = (tmp_path / "a.png").read_bytes()
    first = data.index(b"IDAT")
    checksum = first + 4 + int.from_bytes(data[first - 4 : first], "big")
    for at, reason in ((len(data) // 2, "damaged: "), (checksum, "damaged: the checksum of the pixels is wrong")):
        (tmp_path / "a.png").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(images.ImageProblem, match=reason):
            images.decode(tmp_path / "a.png", LIMIT)


def _claim(kind, width, height):
    """A file whose header claims a size, with no pixels behind it."""
    if kind == "png":

        def chunk(name, data):
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"no pixels here")
    if kind == "webp":
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + sides
    if kind == "jxl":  # two bits choose 18 for a side; the ratio is 0
        bits = 0 | 2 << 1 | (height - 1) << 3 | 0 << 21 | 2 << 24 | (width - 1) << 26 | 1 << 44
        return b"\xff\x0a" + bits.to_bytes(8, "little")
    if kind == "gif":
        return (
            b"GIF89a"
            + struct.pack("<HH", width, height)
            + b"\0\0\0,"
            + bytes(4)
            + struct.pack("<HH", width, height)
            + b"\0\x08\0;"
        )
    if kind == "bmp":
        return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    if kind == "ppm":
        return f"P6 {width} {height} 255\n".encode()
    buffer = io.BytesIO()
    name = {"jpg": "JPEG", "heic": "HEIF"}.get(kind, kind.upper())
    Image.new("RGB", (64, 64)).save(buffer, name, **({"compression": "tiff_lzw"} if kind == "tiff" else {}))
    data = buffer.getvalue()
    if kind == "jpg":
        return data.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", height, width), 1)
    if kind == "tiff":
        data = data.replace(struct.pack("<HHII", 256, 3, 1, 64), struct.pack("<HHII", 256, 3, 1, width))
        return data.replace(struct.pack("<HHII", 257, 3, 1, 64), struct.pack("<HHII", 257, 3, 1, height))
    return data.replace(struct.pack(">II", 64, 64), struct.pack(">II", width, height))  # ispe


@pytest.mark.parametrize("kind", ["png", "webp", "jxl", "gif", "bmp", "ppm", "jpg", "tiff", "avif", "heic"])
def test_too_many_pixels_is_known_before_a_byte_is_decoded(tmp_path, kind):
    width, height = (16000, 10000) if kind in ("avif", "webp") else (20000, 10000)
    (tmp_path / f"a.{kind}").write_bytes(_claim(kind, width, height))
    tracemalloc.start()
    for read in (images.size, images.decode):
        with pytest.raises(images.ImageProblem, match=f"too many pixels: {width} x {height}, config.max_pixels is"):
            read(tmp_path / f"a.{kind}", 120_000_000)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_large_picture_within_the_limit_is_no_warning_even_as_error(tmp_path):
    Image.new("L", (12000, 9000), 200).save(tmp_path / "a.png", compress_level=1)
    code = f"""
from pathlib import Path
from encode import images
path = Path({str(tmp_path / "a.png")!r})
print(images.size(path, 120_000_000), images.decode(path, 120_000_000).mean())"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(12000, 9000) 200.0", done.stderr
    assert done.stderr == ""


def test_nothing_that_a_decoder_mutters_reaches_the_console(tmp_path):
    files = fuzz.seeds()
    for number in range(4 * len(files)):
        name, data, _ = fuzz.mutated(files, 5, number)
        (tmp_path / f"{number}-{name}").write_bytes(data)
    code = f"""
from pathlib import Path
from encode import images
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    for read in (images.size, images.decode):
        try:
            read(path, 1_000_000)
        except (images.ImageProblem, MemoryError):
            pass"""
    for flags in (["-W", "error"], ["-W", "always"]):
        done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_decoder_in_rust_that_panics_is_a_reason_and_no_end_of_the_run(tmp_path, monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    def broken(path, formats):
        raise panic("index out of bounds")

    (tmp_path / "a.png").write_bytes(fuzz.seeds()["plain.png"])
    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(images.ImageProblem, match="damaged: PanicException: index out of bounds"):
        images.decode(tmp_path / "a.png", LIMIT)
    monkeypatch.setattr(Image, "open", lambda path, formats: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        images.decode(tmp_path / "a.png", LIMIT)


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


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "avif", "tif", "mpo", "heic"])
def test_an_animation_or_a_pile_of_pages_gives_its_first_picture(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    options = {"format": "HEIF"} if suffix == "heic" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    found = images.decode(tmp_path / f"a.{suffix}", LIMIT)[0, 0].astype(int)
    assert found[0] - found[2] > 200


def test_an_animated_jpeg_xl_is_refused_for_its_decoder_gives_the_last_frame(tmp_path):
    (tmp_path / "a.jxl").write_bytes(fuzz.seeds()["moving.jxl"])
    for read in (images.size, images.decode):
        with pytest.raises(images.ImageProblem, match="animated JPEG XL"):
            read(tmp_path / "a.jxl", LIMIT)


def test_what_a_first_gif_frame_leaves_out_is_white(tmp_path):
    buffer = io.BytesIO()
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([0, 0, 0, 0, 0, 255])
    picture.save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    data[6:10] = struct.pack("<HH", 64, 48)  # the canvas
    at = data.index(b",", 13)
    data[at + 1 : at + 5] = struct.pack("<HH", 8, 4)  # where the frame stands on it
    (tmp_path / "a.gif").write_bytes(data)
    found = images.decode(tmp_path / "a.gif", LIMIT)
    wanted = np.full((48, 64, 3), 255, np.uint8)
    wanted[4:36, 8:40] = (0, 0, 255)
    assert np.array_equal(found, wanted)


def test_a_tiffs_preview_is_passed_over_for_the_picture_itself(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(np.zeros((9, 12, 3), np.uint8), photometric="rgb", subfiletype=1)
        writer.write(np.full((48, 64, 3), 99, np.uint8), photometric="rgb")
    assert images.size(tmp_path / "a.tif", LIMIT) == (64, 48)
    assert (images.decode(tmp_path / "a.tif", LIMIT) == 99).all()
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(np.full((24, 32, 3), 7, np.uint8), photometric="rgb", subfiletype=1)
    assert images.decode(tmp_path / "b.tif", LIMIT).shape == (24, 32, 3)


def test_channels_keep_their_order(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.avif", "a.heic", "a.jxl", "a.tga", "a.jp2", "a.dds"):
        options = {"format": "HEIF"} if name == "a.heic" else {}
        Image.new("RGB", (32, 32), (220, 30, 30)).save(tmp_path / name, **options)
        red, green, blue = images.decode(tmp_path / name, LIMIT).reshape(-1, 3).mean(0)
        assert red - blue > 150 and red - green > 150, name
        grey = np.repeat(skimage.data.camera()[:64, :64, None], 3, -1)
        Image.fromarray(grey).save(tmp_path / name, **options)
        found = images.decode(tmp_path / name, LIMIT).astype(int)
        assert np.ptp(found, axis=-1).max() <= 3, name


def test_what_was_decoded_before_makes_no_difference(tmp_path):
    files = fuzz.seeds()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    names = [name for name in files if name != "moving.jxl"]
    first = {name: images.pixel_hash(images.decode(tmp_path / name, LIMIT)) for name in names}
    for name in reversed(names):
        (tmp_path / "damaged").write_bytes(files[name][: len(files[name]) // 2])
        with pytest.raises(images.ImageProblem):
            images.decode(tmp_path / "damaged", LIMIT)
        assert images.pixel_hash(images.decode(tmp_path / name, LIMIT)) == first[name]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK", "P", "I;16"])
def test_a_thumbnail_of_a_file_is_the_thumbnail_of_its_pixels(tmp_path, mode):
    photograph = Image.fromarray(skimage.data.astronaut()[:400])
    name = "a.jpg" if mode in ("RGB", "CMYK") else "a.png"
    if mode == "I;16":
        photograph = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    elif mode == "RGBA":
        photograph.putalpha(Image.radial_gradient("L").resize(photograph.size))
    else:
        photograph = photograph.convert(mode)
    photograph.save(tmp_path / name)
    found = Image.open(io.BytesIO(images.thumbnail_of(tmp_path / name, LIMIT, 64)))
    wanted = Image.open(io.BytesIO(images.thumbnail(images.decode(tmp_path / name, LIMIT), 64)))
    assert found.format == "JPEG" and found.size == wanted.size == (64, 50)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).mean() < 4


def test_a_thumbnail_refuses_what_decode_refuses(tmp_path):
    for name in ("plain.jpg", "plain.png"):
        (tmp_path / name).write_bytes(fuzz.seeds()[name][:700])
        with pytest.raises(images.ImageProblem, match="truncated"):
            images.thumbnail_of(tmp_path / name, LIMIT, 32)
        with pytest.raises(images.ImageProblem, match="too many pixels"):
            (tmp_path / name).write_bytes(fuzz.seeds()[name])
            images.thumbnail_of(tmp_path / name, 500, 32)


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


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_a_jpeg_whose_rest_is_zeros_is_refused(tmp_path, share):
    """As a broken card or an interrupted copy leaves it: the length is right, the lower part would be grey."""
    path = tmp_path / "a.jpg"
    Image.fromarray(_noise()).save(path, quality=92, comment=b"\xff\xd9")  # an end mark, as that of a small preview is
    images.decode(path, LIMIT)
    content = bytearray(path.read_bytes())
    keep = int(share * len(content))
    content[keep:] = bytes(len(content) - keep)
    path.write_bytes(content)
    with pytest.raises(images.ImageProblem):
        images.decode(path, LIMIT)


def test_a_picture_of_just_as_many_pixels_as_are_allowed_is_taken(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert images.size(tmp_path / "a.png", 1200) == (40, 30)
    assert images.decode(tmp_path / "a.png", 1200).shape == (30, 40, 3)
    with pytest.raises(images.ImageProblem, match=r"too many pixels: 40 x 30, config\.max_pixels is 1199"):
        images.size(tmp_path / "a.png", 1199)


def test_pictures_are_made_smaller_by_lanczos_as_the_data_set_says():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)
    wanted = Image.fromarray(pixels).resize((64, 32), Image.Resampling.LANCZOS, reducing_gap=3.0)
    assert "Lanczos, reducing gap 3" in images.RESIZE_RULE
    np.testing.assert_array_equal(images.resize(pixels, 64, 32), np.asarray(wanted))
