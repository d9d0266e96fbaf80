"""Every bit depth and colour mode, against what NumPy makes of the same numbers."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from encode import colour, headers, images
from tests.encode import fuzz

LIMIT = 10_000_000
HEIGHT, WIDTH = 24, 40


def _decode(path, data=None):
    if data is not None:
        path.write_bytes(data)
    found = images.decode(path, LIMIT)
    assert images.size(path, LIMIT) == found.shape[1::-1]
    assert found.dtype == np.uint8
    return found.astype(int)


def _near(found, wanted, tolerance=1):
    wanted = np.broadcast_to(np.asarray(wanted, float), found.shape)
    worst = np.abs(found - wanted).max()
    assert worst <= tolerance, worst


def _numbers(channels, top, seed=0):
    """Random whole numbers that reach both ends."""
    values = np.random.default_rng(seed).integers(0, top + 1, (HEIGHT, WIDTH, channels))
    values[0, 0], values[0, 1] = 0, top
    return values


def _on_white(unit, alpha):
    """Colours and alpha in 0..1 -> 0..255 on white."""
    return 255 * (unit * alpha + 1 - alpha)


def _png(kind, depth, values, chunks=(), interlaced=False):
    """A PNG written by hand: colour type, bit depth, [height, width, channels] numbers."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def rows(part):
        if depth == 16:
            lines = [row.astype(">u2").tobytes() for row in part]
        else:
            bits = (part[..., None] >> np.arange(depth)[::-1]) & 1
            lines = [np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in bits]
        return b"".join(b"\0" + line for line in lines)

    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [values[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [values]
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, kind, 0, 0, int(interlaced))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(rows(part) for part in parts)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(*c) for c in chunks) + pixels + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    "kind, depth", [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (4, 8), (4, 16), (6, 8), (6, 16)]
)
def test_png_of_every_kind_and_depth(tmp_path, kind, depth, interlaced):
    channels, top = {0: 1, 2: 3, 4: 2, 6: 4}[kind], 2**depth - 1
    values = _numbers(channels, top)
    unit, alpha = values / top, np.ones((HEIGHT, WIDTH, 1))
    if kind >= 4:
        unit, alpha = unit[..., :-1], unit[..., -1:]
    found = _decode(tmp_path / "a.png", _png(kind, depth, values, interlaced=interlaced))
    _near(found, _on_white(unit, alpha), 3 if kind >= 4 and depth == 16 else 1)
    if kind == 2 and depth == 8:
        assert (found == values).all()


@pytest.mark.parametrize("kind, depth", [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)])
def test_the_transparent_colour_of_a_png_is_matched_in_full_depth(tmp_path, kind, depth):
    channels, top = (1, 3)[kind == 2], 2**depth - 1
    values = _numbers(channels, top)
    key = [top // 3, min(1, top), top // 2][:channels]
    values[:, ::2] = key
    values[:, 1::4] = [key[0] ^ 1, *key[1:]]  # differs in the lowest bit only
    found = _decode(tmp_path / "a.png", _png(kind, depth, values, [(b"tRNS", struct.pack(f">{channels}H", *key))]))
    clear = (values == key).all(-1, keepdims=True)
    assert 0 < clear.sum() < clear.size
    _near(found, np.where(clear, 255, 255 * values / top))


def test_a_palette_with_partial_alpha(tmp_path):
    palette, alpha = _numbers(3, 255)[0, :16], np.arange(16) * 17
    values = np.random.default_rng(1).integers(0, 16, (HEIGHT, WIDTH, 1))
    chunks = [(b"PLTE", palette.astype(np.uint8).tobytes()), (b"tRNS", bytes(alpha[:9].tolist()))]
    alpha[9:] = 255
    wanted = _on_white(palette[values[..., 0]] / 255, alpha[values] / 255)
    _near(_decode(tmp_path / "a.png", _png(3, 4, values, chunks)), wanted)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_grey_tiff_with_white_or_black_as_zero(tmp_path, dtype, photometric, order):
    if dtype == "uint16" and photometric == "miniswhite" and order == ">":
        pytest.skip("Pillow does not open it")
    top = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    values = (_numbers(1, 65535)[..., 0] / 65535 * top).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric, byteorder=order)
    unit = values.astype(float) / top
    _near(_decode(tmp_path / "a.tif"), 255 * (unit if photometric == "minisblack" else 1 - unit)[..., None])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("alpha", [None, "unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("dtype, top", [("uint8", 255), ("uint16", 65535)])
def test_colour_tiff_with_alpha_of_each_kind(tmp_path, dtype, top, alpha, order):
    values = _numbers(4 if alpha else 3, top)
    if alpha == "assocalpha":
        values[..., :3] = values[..., :3] * values[..., 3:] // top  # no colour is above its alpha
    extra = [alpha] if alpha else None
    tifffile.imwrite(tmp_path / "a.tif", values.astype(dtype), photometric="rgb", extrasamples=extra, byteorder=order)
    unit = values[..., :3] / top
    wanted = 255 * unit
    if alpha == "unassalpha":
        wanted = _on_white(unit, values[..., 3:] / top)
    elif alpha == "assocalpha":
        wanted = 255 * (unit + 1 - values[..., 3:] / top)
    _near(_decode(tmp_path / "a.tif"), wanted, 2 if dtype == "uint8" else 3)


@pytest.mark.parametrize("kind", ["assocalpha", "unassalpha"])
def test_grey_tiff_with_alpha(tmp_path, kind):
    values = _numbers(2, 255)
    values[..., 0] = values[..., 0] * values[..., 1] // 255
    tifffile.imwrite(tmp_path / "a.tif", values.astype(np.uint8), photometric="minisblack", extrasamples=[kind])
    grey, alpha = values[..., :1] / 255, values[..., 1:] / 255
    _near(_decode(tmp_path / "a.tif"), 255 * (grey + 1 - alpha) if kind == "assocalpha" else _on_white(grey, alpha), 2)


def test_planes_one_after_the_other(tmp_path):
    values = _numbers(3, 255).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    assert (_decode(tmp_path / "a.tif") == values).all()


@pytest.mark.parametrize("dtype, top", [("uint8", 255), ("uint16", 65535)])
def test_cmyk_tiff(tmp_path, dtype, top):
    values = _numbers(4, top)
    tifffile.imwrite(tmp_path / "a.tif", values.astype(dtype), photometric="separated")
    unit = values / top
    _near(_decode(tmp_path / "a.tif"), 255 * (1 - unit[..., :3]) * (1 - unit[..., 3:]), 2)


def test_twelve_bit_grey_tiff(tmp_path):
    values = _numbers(1, 4095)[..., 0]
    bits = (values[..., None] >> np.arange(12)[::-1]) & 1
    strip = np.packbits(bits.astype(np.uint8)).tobytes()
    tags = [(256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1)]
    tags += [(278, 3, HEIGHT), (279, 4, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    _near(_decode(tmp_path / "a.tif", head.ljust(200, b"\0") + strip), values[..., None] * 255 / 4095)


@pytest.mark.parametrize(
    "dtype, top, white",
    [
        ("uint32", 2**32 - 1, 2**32 - 1),
        ("uint32", 60000, 65535),
        ("uint32", 200, 255),
        ("uint32", 1, 1),
        ("int32", 2**31 - 1, 2**32 - 1),
        ("int32", 50000, 65535),
        ("int16", 32767, 32767),
        ("float32", 200, 255),
        ("float32", 0.9, 1),
    ],
)
def test_numbers_without_a_declared_white_take_the_least_usual_one(tmp_path, dtype, top, white):
    values = (_numbers(1, 2**31)[..., 0] / 2**31 * top).astype(dtype)
    if dtype == "float32" and top > 1:
        values = np.round(values)
    tifffile.imwrite(tmp_path / "a.tif", values)
    _near(_decode(tmp_path / "a.tif"), values.astype(float)[..., None] * 255 / white)


@pytest.mark.parametrize(
    "values, reason",
    [
        (np.float32([-0.5, 1]), "floating-point pixels from -0.5 to 1 "),
        (np.float32([0, 3.5]), "floating-point pixels from 0 to 3.5 "),
        (np.float32([0, np.nan]), "not finite"),
        (np.float32([0, np.inf]), "not finite"),
        (np.int32([-7, 9]), "integer pixels from -7 to 9 "),
        (np.int16([-7, 9]), "integer pixels from -7 to 9 "),
    ],
)
def test_numbers_that_could_mean_any_brightness_are_refused_with_their_range(tmp_path, values, reason):
    tifffile.imwrite(tmp_path / "a.tif", np.tile(values, (32, 16)))
    with pytest.raises(images.ImageProblem, match=reason):
        images.decode(tmp_path / "a.tif", LIMIT)


@pytest.mark.parametrize("largest", [255, 1023, 65535])
def test_portable_maps_count_from_their_largest_value(tmp_path, largest):
    values = _numbers(1, largest)[..., 0]
    raw = values.astype(">u2" if largest > 255 else "u1").tobytes()
    found = _decode(tmp_path / "a.pgm", f"P5\n# a comment\n{WIDTH} {HEIGHT}\n{largest}\n".encode() + raw)
    _near(found, values[..., None] * 255 / largest)


def _display(light):
    """Linear light 0..1 -> 0..255 of sRGB."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_sixteen_bits_in_jpeg_2000_and_linear_light_in_jpeg_xl(tmp_path):
    values = _numbers(1, 65535)[..., 0].astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.jp2")
    _near(_decode(tmp_path / "a.jp2"), values[..., None] / 257)
    Image.fromarray(values).save(tmp_path / "a.jxl", lossless=True)  # the plugin declares 16 bits to be linear light
    assert b"Lin" in Image.open(tmp_path / "a.jxl").info["icc_profile"].replace(b"\0", b"")
    bright = values > 2000
    _near(_decode(tmp_path / "a.jxl")[bright], _display(values[bright] / 65535)[..., None], 2)


def _without_adobe(data):
    """A JPEG without its Adobe marker."""
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def test_cmyk_jpeg_with_and_without_adobes_inversion(tmp_path):
    ink = np.zeros((32, 32, 4), np.uint8)
    ink[:16], ink[16:] = (10, 220, 200, 20), (200, 30, 0, 60)
    wanted = 255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)
    buffer = io.BytesIO()
    Image.fromarray(ink, "CMYK").save(buffer, "JPEG", quality=100)  # Pillow writes it inverted, with the marker
    assert b"Adobe" in buffer.getvalue()
    _near(_decode(tmp_path / "a.jpg", buffer.getvalue()), wanted, 5)
    buffer = io.BytesIO()
    Image.fromarray(255 - ink, "CMYK").save(buffer, "JPEG", quality=100)  # so that the stored numbers are ink
    plain = _without_adobe(buffer.getvalue())
    assert b"Adobe" not in plain
    _near(_decode(tmp_path / "b.jpg", plain), wanted, 5)


def test_luminance_and_chroma(tmp_path):
    pixels = _numbers(3, 255)
    pixels = np.stack([pixels[..., 0]] * 3, -1) // 2 + 60  # away from the edges of the colour space
    Image.fromarray(pixels.astype(np.uint8)).convert("YCbCr").save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "YCbCr"
    _near(_decode(tmp_path / "a.tif"), pixels, 3)


def _from_lab(light, a, b):
    """CIE L*a*b* under D50 -> 0..255 sRGB: the formulas of CIE 15 and IEC 61966-2-1."""
    f = (light + 16) / 116 + np.stack([a / 500, 0 * a, -b / 200], -1).transpose(2, 0, 1)
    ratio = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    to_d50 = [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    linear = (ratio.transpose(1, 2, 0) * [0.9642, 1, 0.8249]) @ np.linalg.inv(np.array(to_d50)).T
    assert linear.min() > 0 and linear.max() < 1, "outside sRGB: nothing can be expected"
    return _display(linear)


def test_lab_of_tiff_and_photoshop(tmp_path):
    a, b = np.round(np.stack(np.meshgrid(np.linspace(-15, 15, WIDTH), np.linspace(-20, 15, HEIGHT))))
    light = np.round(np.linspace(110, 210, HEIGHT))[:, None] + 0 * a
    wanted = _from_lab(light / 2.55, a, b)
    signed = np.stack([light, a % 256, b % 256], -1).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", signed, photometric="cielab")
    shifted = np.stack([light, a + 128, b + 128]).astype(np.uint8)
    for found in (_decode(tmp_path / "a.tif"), _decode(tmp_path / "a.psd", fuzz.psd(shifted, 9))):
        _near(found, wanted, 3)


@pytest.mark.parametrize("mode", [1, 3, 4])
def test_photoshop(tmp_path, mode):
    planes = _numbers({1: 1, 3: 3, 4: 4}[mode], 255)
    wanted = planes[..., :3] * planes[..., 3:] / 255 if mode == 4 else planes  # ink is stored inverted
    _near(_decode(tmp_path / "a.psd", fuzz.psd(planes.astype(np.uint8).transpose(2, 0, 1), mode)), wanted, 2)


LOSSLESS = {
    "a.png": {},
    "a.webp": {"lossless": True, "exact": True},
    "a.tif": {"compression": "tiff_lzw"},
    "a.tga": {},
    "b.tga": {"compression": "tga_rle"},
    "a.dds": {},
    "a.qoi": {},
    "a.jp2": {},
    "a.jxl": {"lossless": True},
    "a.sgi": {},
    "a.im": {},
}
LOSSY = {
    "a.avif": {"quality": 95},
    "a.heic": {"format": "HEIF", "quality": 95},
    "b.webp": {"quality": 95},
    "b.jxl": {"quality": 95},
}


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_alpha_in_every_format_that_carries_it(tmp_path, name):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (200, 100, 50), np.linspace(0, 255, 32).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / name, **(LOSSLESS | LOSSY)[name])
    wanted = _on_white(pixels[..., :3] / 255, pixels[..., 3:] / 255)
    _near(_decode(tmp_path / name), wanted, 1 if name in LOSSLESS else 12)


@pytest.mark.parametrize("name", [name for name in LOSSLESS if name != "a.qoi"] + ["a.bmp", "a.pcx", "a.ppm", "a.gif"])
def test_opaque_colours_come_out_bit_for_bit(tmp_path, name):
    pixels = (
        _numbers(3, 255).astype(np.uint8) if name != "a.gif" else np.tile(np.uint8([9, 99, 199]), (HEIGHT, WIDTH, 1))
    )
    Image.fromarray(pixels).save(tmp_path / name, **LOSSLESS.get(name, {}))
    assert (_decode(tmp_path / name) == pixels).all()


def test_icons_give_their_largest_picture(tmp_path):
    big = Image.new("RGBA", (64, 64), (200, 100, 50, 128))
    for kind in ("png", "bmp"):
        big.save(tmp_path / "a.ico", sizes=[(16, 16), (64, 64), (32, 32)], bitmap_format=kind)
        found = _decode(tmp_path / "a.ico")
        assert found.shape == (64, 64, 3)
        _near(found, _on_white(np.array([200, 100, 50]) / 255, 128 / 255))
    icon = io.BytesIO()
    big.resize((128, 128)).save(icon, "PNG")
    body = b"ic07" + struct.pack(">I", 8 + len(icon.getvalue())) + icon.getvalue()
    found = _decode(tmp_path / "a.icns", b"icns" + struct.pack(">I", 8 + len(body)) + body)
    _near(found, _on_white(np.array([200, 100, 50]) / 255, 128 / 255))


def test_an_icon_that_hides_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    small = io.BytesIO()
    Image.new("RGB", (32, 32)).save(small, "ICO", sizes=[(32, 32)])
    data = small.getvalue()
    at = data.index(b"IHDR") + 4
    head = struct.pack(">II", 9000, 9000) + data[at + 8 : at + 13]  # and no pixels that could fill it
    huge = data[:at] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + data[at + 17 :]
    with pytest.raises(images.ImageProblem, match="too many pixels: 9000 x 9000"):
        _decode(tmp_path / "a.ico", huge)


def test_a_targa_that_declares_no_alpha_has_none(tmp_path):
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 32, 32, 32, 0x20)
    found = _decode(tmp_path / "a.tga", head + bytes([50, 100, 200, 0]) * 1024)
    assert (found == (200, 100, 50)).all()


def test_premultiplied_jpeg_xl_is_told_from_its_header(tmp_path):
    # [..., :20] clear, the rest (100, 50, 25) already multiplied by 128/255; written with libjxl 0.10
    (tmp_path / "a.jxl").write_bytes(PREMULTIPLIED)
    assert headers.jxl_header(tmp_path / "a.jxl").premultiplied
    found = _decode(tmp_path / "a.jxl")
    assert (found[:, :20] == 255).all()
    _near(found[:, 20:], np.array([100, 50, 25]) + 127)


def _icc(space, tags):
    """A small profile of our own: colour space, {tag: data}."""
    entries, body, at = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        entries += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind, connection = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    head = bytearray(128)
    struct.pack_into(">I4sI4s4s4s", head, 0, at + len(body), b"lcms", 0x02400000, kind, space, connection)
    head[36:40] = b"acsp"
    struct.pack_into(">iii", head, 68, 63190, 65536, 54061)
    return bytes(head) + struct.pack(">I", len(tags)) + entries + body


def grey_profile(gamma):
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"g\0" + bytes(78)
    return _icc(
        b"GRAY", {b"desc": text, b"wtpt": white, b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, gamma * 256)}
    )


def _linear_colours():
    """The primaries of sRGB, but linear light."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"l\0" + bytes(78)}
    for name in (b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ"):
        at = struct.unpack_from(">I", srgb, srgb.index(name, 128) + 4)[0]
        tags[name] = srgb[at : at + 20]
    tags |= {name: b"curv" + bytes(4) + struct.pack(">IH", 1, 256) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return _icc(b"RGB ", tags)


def _cmyk_profile():
    """Cyan ink prints red, whatever the other inks do; no ink prints white."""
    identity = bytes(range(256))
    table = bytes(v for corner in range(16) for v in ((136, 208, 195) if corner & 8 else (255, 128, 128)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"c\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    return _icc(b"CMYK", {b"desc": text, b"wtpt": white, b"A2B0": lut + identity * 4 + table + identity * 3})


def _exchanged():
    """sRGB with the primaries of red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    one, two = (profile.index(tag, 128) for tag in (b"rXYZ", b"gXYZ"))
    profile[one + 4 : one + 12], profile[two + 4 : two + 12] = profile[two + 4 : two + 12], profile[one + 4 : one + 12]
    return bytes(profile)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif", "a.heic"])
def test_the_profile_is_applied_wherever_it_stands(tmp_path, name):
    options = {"format": "HEIF"} if name == "a.heic" else {}
    Image.new("RGB", (32, 32), (220, 30, 30)).save(tmp_path / name, icc_profile=_exchanged(), quality=95, **options)
    _near(_decode(tmp_path / name), (30, 220, 30), 12)


def test_profiles_of_grey_ink_and_photoshop(tmp_path):
    linear = _display(np.float64(0.2))
    for mode in ("L", "LA"):
        Image.new("L", (32, 32), 51).convert(mode).save(tmp_path / "a.png", icc_profile=grey_profile(1))
        _near(_decode(tmp_path / "a.png"), linear, 1)
    wide = np.full((32, 32), 13107, np.uint16)
    Image.fromarray(wide).save(tmp_path / "b.png", icc_profile=grey_profile(1))
    _near(_decode(tmp_path / "b.png"), linear, 1)
    ink = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    for name in ("a.jpg", "c.tif"):
        ink.save(tmp_path / name, icc_profile=_cmyk_profile())
        red, green, blue = _decode(tmp_path / name)[5, 5]
        assert red > 100 and green < 20 and blue < 30, name
    planes = np.zeros((4, 32, 32), np.uint8)
    planes[1:] = 255
    red, green, blue = _decode(tmp_path / "a.psd", fuzz.psd(planes, 4, _cmyk_profile()))[5, 5]
    assert red > 100 and green < 20 and blue < 30
    Image.new("L", (32, 32), 51).save(tmp_path / "d.png", icc_profile=_linear_colours())  # of colour, on a grey picture
    _near(_decode(tmp_path / "d.png"), linear, 2)
    Image.fromarray(wide).save(tmp_path / "e.png", icc_profile=_linear_colours())
    _near(_decode(tmp_path / "e.png"), linear, 2)


def test_a_profile_that_cannot_be_used_counts_as_srgb(tmp_path):
    pixels = _numbers(3, 255).astype(np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"", b"broken", srgb[:200], srgb[:128] + b"\xff" * 400, _cmyk_profile(), grey_profile(2), srgb):
        Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
        assert (_decode(tmp_path / "a.png") == pixels).all()


def test_a_profile_that_is_srgb_but_for_rounding_changes_nothing(tmp_path):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = struct.unpack_from(">I", profile, profile.index(b"rXYZ", 128) + 4)[0] + 8
    struct.pack_into(">i", profile, at, struct.unpack_from(">i", profile, at)[0] + 60)
    pixels = _numbers(3, 255).astype(np.uint8)
    ends = ImageCms.ImageCmsProfile(io.BytesIO(bytes(profile))), ImageCms.createProfile("sRGB")
    assert np.any(np.asarray(ImageCms.profileToProfile(Image.fromarray(pixels), *ends, outputMode="RGB")) != pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=bytes(profile))
    assert (_decode(tmp_path / "a.png") == pixels).all()


def test_large_pictures_are_worked_on_in_strips_that_meet(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (3 * colour.STRIP + 7, 16)).astype(np.uint32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    _near(_decode(tmp_path / "a.tif"), values[..., None] / 257)


PREMULTIPLIED = base64.b64decode("/woFCBgAJQgQEACAAEsoNCa+RkJBAJQZJ8Y4kxcQAUDRcwcBaa5UsJ5LJ8M0")


def _told(kind, primaries, curve):
    """A picture whose colours are told by numbers, as phones and screens write them."""
    if kind == "PNG":
        return _png(2, 8, fuzz.picture(), [(b"cICP", bytes([primaries, curve, 0, 1]))])
    buffer = io.BytesIO()
    Image.fromarray(fuzz.picture()).save(buffer, kind, quality=100)
    data = buffer.getvalue()
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, curve) + data[at + 4 :]


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "PNG"])
def test_hdr_and_linear_light_are_refused(tmp_path, kind):
    for curve, refused in ((13, ""), (1, ""), (8, "linear light"), (16, "HDR"), (18, "HDR")):
        (tmp_path / "a").write_bytes(_told(kind, 1, curve))
        if refused:
            for read in (images.size, images.decode):
                with pytest.raises(images.ImageProblem, match=refused):
                    read(tmp_path / "a", LIMIT)
        else:
            assert _decode(tmp_path / "a").size


def _linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encoded(values):
    values = np.clip(values, 0, 1)
    return 255 * np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)


P3_TO_SRGB = [[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09827]]  # both of white D65
ADOBE_TO_SRGB = [[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04294, 1.04294]]


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "PNG"])
def test_display_p3_that_is_told_by_a_number_becomes_srgb(tmp_path, kind):
    (tmp_path / "plain").write_bytes(_told(kind, 1, 13))
    (tmp_path / "wide").write_bytes(_told(kind, 12, 13))
    plain = _decode(tmp_path / "plain") / 255
    wanted = _encoded(_linear(plain) @ np.transpose(P3_TO_SRGB))
    assert np.abs(wanted - 255 * plain).max() > 10
    _near(_decode(tmp_path / "wide"), wanted, 2.5)


def test_a_camera_s_mark_of_adobe_rgb_counts(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 65535
    exif.get_ifd(0x8769)[0xA005] = {1: "R03", 2: b"0100"}
    picture = Image.fromarray(fuzz.picture())
    picture.save(tmp_path / "plain.jpg", quality=100, subsampling=0)
    picture.save(tmp_path / "adobe.jpg", quality=100, subsampling=0, exif=exif)
    plain = _decode(tmp_path / "plain.jpg") / 255
    wanted = _encoded(plain ** (563 / 256) @ np.transpose(ADOBE_TO_SRGB))
    assert np.abs(wanted - 255 * plain).max() > 10
    _near(_decode(tmp_path / "adobe.jpg"), wanted, 2.5)
    exif.get_ifd(0x8769)[0xA005] = {1: "R98"}
    picture.save(tmp_path / "adobe.jpg", quality=100, subsampling=0, exif=exif)
    _near(_decode(tmp_path / "adobe.jpg"), 255 * plain, 0)


def test_a_selection_saved_with_a_photoshop_file_is_no_transparency(tmp_path):
    planes = np.concatenate([fuzz.picture(), np.zeros((24, 40, 1), np.uint8)], -1).transpose(2, 0, 1)
    _near(_decode(tmp_path / "a.psd", fuzz.psd(planes, 3)), fuzz.picture())
    layers = struct.pack(">IIh", 8, 4, -1) + bytes(2)
    data = fuzz.psd(planes, 3)
    at = 26 + 4 + 4  # behind the header, no colours, no resources
    assert (_decode(tmp_path / "a.psd", data[:at] + layers + data[at + 4 :]) == 255).all()


def test_a_photoshop_file_without_its_composite_is_refused(tmp_path):
    data = fuzz.psd(fuzz.picture().transpose(2, 0, 1), 3)
    for merged in (1, 0):
        resource = b"8BIM" + struct.pack(">HHI", 1057, 0, 6) + struct.pack(">IBB", 1, merged, 0)
        path = tmp_path / "a.psd"
        path.write_bytes(data[:30] + struct.pack(">I", len(resource)) + resource + data[34:])
        if merged:
            _near(_decode(path), fuzz.picture())
        else:
            with pytest.raises(images.ImageProblem, match="a Photoshop file without its composite"):
                images.decode(path, LIMIT)


@pytest.mark.parametrize(
    "values, photometric, reason",
    [
        (
            np.zeros((24, 40, 3), np.float32),
            "rgb",
            r"a TIFF of 32 \+ 32 \+ 32 bits \(floating-point numbers, photometric 2\)",
        ),
        (np.zeros((24, 40), np.float64), "minisblack", r"a TIFF of 64 bits \(floating-point"),
        (np.zeros((24, 40, 3), np.uint32), "rgb", r"a TIFF of 32 \+ 32 \+ 32 bits \(whole"),
    ],
)
def test_a_tiff_of_a_kind_that_pillow_lacks_is_not_called_damaged(tmp_path, values, photometric, reason):
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric)
    with pytest.raises(images.ImageProblem, match=f"^{reason}.*, which is not read"):
        images.decode(tmp_path / "a.tif", LIMIT)


def test_a_jpeg_of_a_rare_kind_is_not_called_damaged(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(fuzz.picture()).save(buffer, "JPEG")
    data = buffer.getvalue()
    at = data.index(b"\xff\xc0")
    for edited, reason in (
        (data[: at + 4] + b"\x0c" + data[at + 5 :], "12 bits a colour"),
        (data[: at + 1] + b"\xc3" + data[at + 2 :], "lossless"),
    ):
        (tmp_path / "a.jpg").write_bytes(edited)
        with pytest.raises(images.ImageProblem, match=f"^a JPEG of a rare kind .{reason}"):
            images.decode(tmp_path / "a.jpg", LIMIT)


def test_the_number_of_a_png_s_colours_overrules_its_profile(tmp_path):
    srgb = zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    wide = zlib.compress(colour.profile(12))
    found = {}
    for name, primaries, profile in (("told", 12, srgb), ("plain", 1, wide), ("wide", 0, wide)):
        chunks = [(b"cICP", bytes([primaries, 13, 0, 1]))] if primaries else []
        data = _png(2, 8, fuzz.picture(), [*chunks, (b"iCCP", b"p\0\0" + profile)])
        found[name] = _decode(tmp_path / "a.png", data)
    _near(found["told"], found["wide"], 0)
    _near(found["plain"], fuzz.picture(), 0)
    assert np.abs(found["told"] - found["plain"]).max() > 10


def test_a_profile_with_another_curve_is_not_taken_for_srgb(tmp_path, monkeypatch):
    primaries = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)  # sRGB's own
    monkeypatch.setitem(colour.PROFILES, 99, (primaries, 2.2))
    profile = colour.profile.__wrapped__(99)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 16, np.uint8)).save(tmp_path / "a.png", icc_profile=profile)
    light = (16 / 255) ** 2.2
    _near(_decode(tmp_path / "a.png"), 255 * 12.92 * light)  # 7.4: half as bright
    assert 4 < np.abs(_decode(tmp_path / "a.png") - 16).min() < 20


def test_fractions_beyond_one_are_no_numbers_of_eight_bits(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.linspace(0, 1.5, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH))
    with pytest.raises(images.ImageProblem, match=r"floating-point pixels from 0 to 1\.5 have no known range"):
        images.decode(tmp_path / "a.tif", LIMIT)
