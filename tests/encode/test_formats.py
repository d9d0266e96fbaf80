"""Which files are pictures, by suffix and by first bytes."""

import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from encode import formats, images
from tests.encode import fuzz

LIMIT = 10_000_000
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF", "PALM"}  # stubs, programs, save only


@pytest.fixture(scope="module")
def seeds():
    return fuzz.seeds()


def test_every_suffix_that_pillow_reads_is_in_one_of_the_tables():
    for suffix, name in Image.registered_extensions().items():
        known = formats.PICTURES | formats.REFUSED.keys()
        if name in NOT_READ:
            assert suffix[1:] not in formats.PICTURES
        elif name in Image.OPEN:
            assert suffix[1:] in known | {"iim"}, suffix
    assert not formats.PICTURES & formats.REFUSED.keys()
    for suffix in (*formats.PICTURES, *formats.REFUSED):
        assert suffix == suffix.lower().strip(". ")
    assert all(len(reason) > 20 for reason in formats.REFUSED.values())


def test_the_tables_import_no_decoder():
    code = "import sys, encode.formats; print(sorted({'PIL', 'numpy', 'pillow_heif'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_strong_signature_is_known_without_a_suffix_and_a_weak_one_only_with_it(tmp_path, seeds):
    nameless = set()
    for name, data in seeds.items():
        suffix = name.rsplit(".")[-1]
        assert suffix in formats.PICTURES
        path = tmp_path / "no suffix"
        path.write_bytes(data)
        if formats.looks_like_picture(data[: formats.HEAD]):
            assert formats.looks_like_picture(data[:64]), name
            nameless.add(suffix)
            if name != "moving.jxl":
                assert np.array_equal(images.decode(path, LIMIT), _named(tmp_path / name, data)), name
        else:
            assert suffix in formats.WEAK, name
            with pytest.raises(images.ImageProblem, match="not a picture in a format that can be read"):
                images.decode(path, LIMIT)
            assert _named(tmp_path / name, data).size
    known = "jpg png webp gif tif bmp avif heic jxl jp2 j2k psd qoi ico icns dds ppm pgm pbm pfm"
    assert nameless >= set(known.split())


def _named(path, data):
    path.write_bytes(data)
    return images.decode(path, LIMIT)


def test_the_content_decides_not_the_suffix(tmp_path, seeds):
    for suffix in ("png", "jpg", "tga", "nef", "svg", "heic", "txt"):
        assert _named(tmp_path / f"a.{suffix}", seeds["plain.jpg"]).shape == (24, 40, 3)


def test_a_jpeg_without_its_head_is_never_read_as_something_else(tmp_path, seeds):
    data = seeds["plain.jpg"]
    for zeros in (3, 18, 64, 300):
        for name in ("a.jpg", "a"):
            (tmp_path / name).write_bytes(bytes(zeros) + data[zeros:])
            with pytest.raises(images.ImageProblem, match="not a picture"):
                images.decode(tmp_path / name, LIMIT)
        assert not formats.looks_like_picture(bytes(zeros) + data[zeros:])


@pytest.mark.parametrize(
    "head, suffix, reason",
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 24\n", "jpg", "drawing"),
        (b"%PDF-1.7\n", "png", "document"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="40">', "png", "drawing"),
        (b'<svg width="40" height="40"></svg>', "svg", "drawing"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "jpg", "camera raw"),
        (b"\0\0\0\x18ftypmp42\0\0\0\1isommp42", "heic", "video"),
        (b"\0\0\0\x14ftypqt  \0\0\2\0qt  ", "jpg", "video"),
        (b"II*\0\x10\0\0\0CR\2\0", "tif", "camera raw"),
        (b"FUJIFILMCCD-RAW 0201", "jpg", "camera raw"),
        (b"IIU\0\x18\0\0\0", "rw2", "camera raw"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "exr", "beyond white"),
        (b"8BPS\0\2" + bytes(30), "psd", "layered"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(30), "fpx", "not read"),
        (b"anything at all, but not a picture", "nef", "camera raw"),
        (b"anything at all, but not a picture", "psb", "layered"),
        (b"\x89HDF\r\n\x1a\n" + bytes(30), "jpg", "not a picture"),
        (b"GRIB" + bytes(30), "jpg", "not a picture"),
        (b"BUFR" + bytes(30), "jpg", "not a picture"),
        (b"\xd7\xcd\xc6\x9a\0\0" + bytes(40), "jpg", "drawing"),
        (b"BMW is a maker of cars, and this is a text", "txt", "not a picture"),
        (b"P5 is a station on the line to the sea, and not a map", "txt", "not a picture"),
    ],
)
def test_what_is_not_read_is_refused_by_what_it_is(tmp_path, head, suffix, reason):
    (tmp_path / f"a.{suffix}").write_bytes(head.ljust(200, b" "))
    for read in (images.size, images.decode):
        with pytest.raises(images.ImageProblem, match=reason):
            read(tmp_path / f"a.{suffix}", LIMIT)
    assert not formats.looks_like_picture(head) or reason == "camera raw"


@pytest.mark.parametrize(
    "brands, kind",
    [
        (b"heic\0\0\0\0mif1heic", "HEIF"),
        (b"heix\0\0\0\0mif1heix", "HEIF"),
        (b"mif1\0\0\0\0mif1heic", "HEIF"),
        (b"msf1\0\0\0\0msf1hevc", "HEIF"),
        (b"avif\0\0\0\0avifmif1", "AVIF"),
        (b"avis\0\0\0\0avifmsf1", "AVIF"),
        (b"mif1\0\0\0\0mif1avif", "AVIF"),
        (b"isom\0\0\0\0isomavc1", None),
    ],
)
def test_the_brands_of_a_container(brands, kind):
    assert formats.signature(b"\0\0\0\x18ftyp" + brands) == kind


def _sensor(tmp_path, **tags):
    """A TIFF as cameras write it: a small preview first, the sensor's data elsewhere."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(fuzz.picture(), photometric="rgb", subfiletype=1, **tags)
    return tmp_path / "a.tif"


@pytest.mark.parametrize("suffix", ["tif", "dng", "jpg"])
def test_camera_raw_is_told_by_its_content(tmp_path, suffix):
    dng = _sensor(tmp_path, extratags=[(50706, 1, 4, (1, 4, 0, 0), True)])
    path = dng.rename(tmp_path / f"b.{suffix}")
    with pytest.raises(images.ImageProblem, match=r"^camera raw: develop it to JPEG, PNG or TIFF first$"):
        images.size(path, LIMIT)


def test_camera_raw_is_told_by_the_pages_below(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(fuzz.picture(), photometric="rgb", subfiletype=1, subifds=1)
        writer.write(np.zeros((48, 80), np.uint16), photometric=32803, extratags=[(33421, 3, 2, (2, 2), True)])
    with pytest.raises(images.ImageProblem, match="camera raw"):
        images.decode(tmp_path / "a.tif", LIMIT)


def test_an_ordinary_tiff_is_no_camera_raw_unless_its_suffix_says_so(tmp_path, seeds):
    data = seeds["None.tif"]
    assert _named(tmp_path / "a.tif", data).size
    (tmp_path / "a.arw").write_bytes(data)
    with pytest.raises(images.ImageProblem, match="camera raw"):
        images.decode(tmp_path / "a.arw", LIMIT)
