"""Eight orientations, wherever the tag may stand; size() and decode() agree, and nothing is turned twice."""

import base64
import io
import struct
import tempfile
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from encode import images

LIMIT = 10_000_000
EIGHT = range(1, 9)


def _corner(width=40, height=24):
    """A grey picture with a red top-left corner."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[:8, :12] = (255, 0, 0)
    return pixels


def _stored(orientation):
    """The pixels as a camera that was held so has stored them: turned upright they are `_corner`. By NumPy alone."""
    pixels = _corner()
    undo = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],  # a quarter turn to the left
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[:, ::-1],  # a quarter turn to the right
    }
    return Image.fromarray(np.ascontiguousarray(undo[orientation]))


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _xmp(orientation, form=0):
    body = (
        f'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>',
        f"<rdf:Description><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>",
        f"<rdf:Description tiff:Orientation = '{orientation}'/>",
    )[form]
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>{body}</rdf:RDF></x:xmpmeta>'.encode()


def _save(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_with(image, name, data, behind=False):
    plain = _save(image, "PNG")
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    at = plain.index(b"IEND") - 4 if behind else 33
    return plain[:at] + chunk + plain[at:]


def _raw_profile(exif):
    """How ImageMagick writes EXIF into a text chunk."""
    return b"\nexif\n%8d\n" % len(exif) + exif.hex().encode() + b"\n"


def _jpeg_xmp(image, xmp):
    plain = _save(image, "JPEG", quality=95)
    body = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body + plain[2:]


PLACES = {
    "jpeg exif": lambda o: _save(_stored(o), "JPEG", quality=95, exif=_exif(o)),
    "jpeg xmp": lambda o: _jpeg_xmp(_stored(o), _xmp(o)),
    "jpeg both, EXIF wins": lambda o: _save(_stored(o), "JPEG", quality=95, exif=_exif(o), xmp=_xmp(1 + o % 8)),
    "jpeg broken exif, xmp": lambda o: _save(_stored(o), "JPEG", quality=95, exif=b"Exif\0\0nonsense", xmp=_xmp(o)),
    "mpo exif": lambda o: _save(
        _stored(o), "MPO", quality=95, exif=_exif(o), save_all=True, append_images=[Image.new("RGB", (40, 24))]
    ),
    "png eXIf": lambda o: _png_with(_stored(o), b"eXIf", _exif(o)[6:]),
    "png eXIf behind": lambda o: _png_with(_stored(o), b"eXIf", _exif(o)[6:], behind=True),
    "png tEXt": lambda o: _png_with(_stored(o), b"tEXt", b"Raw profile type exif\0" + _raw_profile(_exif(o))),
    "png zTXt": lambda o: _png_with(
        _stored(o), b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(_raw_profile(_exif(o))), behind=True
    ),
    "png xmp": lambda o: _png_with(_stored(o), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _xmp(o, 1)),
    "png packed xmp": lambda o: _png_with(
        _stored(o), b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(_xmp(o, 2)), behind=True
    ),
    "webp exif": lambda o: _save(_stored(o), "WEBP", lossless=True, exif=_exif(o)),
    "webp xmp": lambda o: _save(_stored(o), "WEBP", lossless=True, xmp=_xmp(o)),
    "tiff tag": lambda o: _save(_stored(o), "TIFF", exif=_exif(o)),
    "tiff tag, packed": lambda o: _save(_stored(o), "TIFF", exif=_exif(o), compression="tiff_lzw"),
    "tiff xmp": lambda o: _save(_stored(o), "TIFF", tiffinfo={700: _xmp(o)}),
    "avif box": lambda o: _save(_stored(o), "AVIF", quality=95, exif=_exif(o)),  # Pillow writes it as irot and imir
    "avif box, xmp": lambda o: _save(_stored(o), "AVIF", quality=95, exif=_exif(o), xmp=_xmp(1 + o % 8)),
    "heic box": lambda o: _save(_stored(o), "HEIF", quality=95, exif=_exif(o)),
    "heic box, xmp": lambda o: _save(_stored(o), "HEIF", quality=95, exif=_exif(o), xmp=_xmp(o)),
    "jxl of a jpeg": lambda o: _jxl_of_a_jpeg(o),
}


def _jxl_of_a_jpeg(orientation):
    """A JPEG repacked without loss, as cjxl does by default."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(PLACES["jpeg exif"](orientation))
        file.flush()
        with Image.open(file.name) as image, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _save(image, "JXL", lossless_jpeg=True, exif=image.info.get("exif"))


def _assert_upright(path):
    assert images.size(path, LIMIT) == (40, 24)
    found = images.decode(path, LIMIT).astype(int)
    assert found.shape == (24, 40, 3)
    assert np.abs(found[2:6, 2:10] - (255, 0, 0)).max() < 30
    assert np.abs(found[12:, :] - 128).max() < 30 and np.abs(found[:, 18:] - 128).max() < 30


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("orientation", EIGHT)
def test_every_orientation_is_applied_once_wherever_it_stands(tmp_path, orientation, place):
    (tmp_path / "a").write_bytes(PLACES[place](orientation))
    _assert_upright(tmp_path / "a")
    with Image.open(io.BytesIO(images.thumbnail_of(tmp_path / "a", LIMIT, 20))) as small:
        assert small.size == (20, 12)
        red, green, _ = small.getpixel((1, 1))
        assert red > green + 60


TURNED_JXL = {  # 40 x 24 stored, a red top-left corner of 12 x 8; the orientation is in the codestream; libjxl 0.10
    number: base64.b64decode(f"/woFi{second}iAggEAQCIAEsYixUA1DcZY4wzd4EQAAQJqAL8Aan7gIT9AICjipQ3vF4=")
    for number, second in zip(range(2, 9), ("AF", "AJ", "AN", "AR", "AV", "AZ", "Ad"))
}


@pytest.mark.parametrize("orientation", TURNED_JXL)
@pytest.mark.parametrize("boxed", [False, True])
def test_jpeg_xl_is_turned_by_its_codestream(tmp_path, orientation, boxed):
    data = TURNED_JXL[orientation]
    if boxed:
        exif = _exif(1 + orientation % 8)[6:]  # counts for nothing
        boxes = (b"ftyp", b"jxl \0\0\0\0jxl "), (b"Exif", bytes(4) + exif), (b"jxlp", bytes(4) + data[:9])
        boxes += ((b"jxlp", b"\x80\0\0\1" + data[9:]),)
        body = b"".join(struct.pack(">I", 8 + len(part)) + name + part for name, part in boxes)
        data = b"\0\0\0\x0cJXL \r\n\x87\n" + body
    (tmp_path / "a.jxl").write_bytes(data)
    wanted = np.array(Image.fromarray(_corner()).transpose(images._TURNS[orientation]))
    assert images.size(tmp_path / "a.jxl", LIMIT) == wanted.shape[1::-1]
    assert np.array_equal(images.decode(tmp_path / "a.jxl", LIMIT), wanted)


@pytest.mark.parametrize("form", [0, 1, 2])
def test_every_way_to_write_xmp(tmp_path, form):
    (tmp_path / "a").write_bytes(_jpeg_xmp(_stored(6), _xmp(6, form)))
    _assert_upright(tmp_path / "a")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_impossible_orientation_counts_as_none(tmp_path, kind, value):
    (tmp_path / "a").write_bytes(_save(_stored(1), kind, exif=_exif(value)))
    _assert_upright(tmp_path / "a")


def test_a_broken_exif_block_counts_as_none(tmp_path):
    good = _exif(6)
    for cut in range(6, len(good), 3):
        for data in (good[:cut], good[:cut] + b"\xff" * 20, b"Exif\0\0" + bytes(30)):
            (tmp_path / "a.jpg").write_bytes(_save(_stored(1), "JPEG", quality=95, exif=data))
            size = images.size(tmp_path / "a.jpg", LIMIT)
            assert images.decode(tmp_path / "a.jpg", LIMIT).shape[1::-1] == size


def test_the_header_of_a_png_with_text_is_read_without_its_pixels(tmp_path):
    """What image generators write; Pillow would decode it all, to look for EXIF behind the pixels."""
    data = _png_with(Image.new("RGB", (64, 64)), b"tEXt", b"parameters\0a boat on a lake")
    at = data.index(b"IDAT")
    (tmp_path / "a.png").write_bytes(data[:at] + b"IDAT" + bytes(10))
    assert images.size(tmp_path / "a.png", LIMIT) == (64, 64)
