"""Damaged pictures of every format that is read, thrown at encode.images: python -m tests.encode.fuzz --count=N --seed=S.

Small real files are cut, flipped, spliced, and their chunks and length fields edited. For each, `size` and `decode` must
give pixels of the size announced, or raise ImageProblem; running out of memory is allowed. The work is done in a child
process with a limit on memory and on the time of one file, so that a crash or a hang names its input, which is kept.
"""

from __future__ import annotations

import argparse
import base64
import collections
import dataclasses
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from encode import images

MAX_PIXELS = 4_000_000
SECONDS = 20  # for one file; a sound one takes milliseconds
MEMORY = 3 << 30
CLAIMS = (0, 1, 2, 15, 16, 255, 256, 2000, 32767, 32768, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def picture(width: int = 40, height: int = 24) -> np.ndarray:
    """[height, width, 3] uint8: two ramps and a little noise."""
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    ramp = np.stack(np.meshgrid(np.linspace(0, 210, width), np.linspace(0, 210, height)), -1)
    return (np.concatenate([ramp, ramp[..., :1]], -1) + noise).astype(np.uint8)


def seeds() -> dict[str, bytes]:
    """Small sound files by name; the suffix is the format's own."""
    rgb = Image.fromarray(picture())
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
    unit = Image.fromarray(picture()[..., 0].astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    found: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, kind: str | None = None, **options) -> None:
        buffer = io.BytesIO()
        buffer.name = name
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()

    frames = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    add("plain.jpg", rgb)
    add("progressive.jpg", rgb, progressive=True, exif=exif, icc_profile=profile)
    add("grey.jpg", rgb.convert("L"))
    add("cmyk.jpg", rgb.convert("CMYK"))
    add("two.mpo", rgb, "MPO", **frames)
    add("plain.png", rgb, exif=exif, icc_profile=profile)
    add("alpha.png", rgba)
    add("palette.png", rgb.quantize(16), transparency=3)
    add("wide.png", Image.fromarray(picture()[..., 0].astype(np.uint16) * 257))
    add("moving.png", rgb, **frames)
    add("lossy.webp", rgb, exif=exif)
    add("lossless.webp", rgba, lossless=True)
    add("moving.webp", rgb, **frames)
    add("plain.gif", rgb.quantize(32))
    add("moving.gif", rgb, **frames)
    for compression in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        add(f"{compression}.tif", rgb, compression=compression, exif=exif)
    add("lab.tif", ImageCms.profileToProfile(rgb, profile_of("sRGB"), profile_of("LAB"), outputMode="LAB"))
    add("fax.tif", rgb.convert("1"), compression="group4")
    add("float.tif", unit)
    add("alpha.tif", rgba, compression="tiff_lzw")
    add("plain.bmp", rgb)
    add("palette.bmp", rgb.quantize(16))
    add("plain.dib", rgb)
    add("plain.avif", rgb, exif=exif)
    add("moving.avif", rgb, **frames)
    add("alpha.avif", rgba)
    add("plain.heic", rgb, "HEIF", exif=exif.tobytes())
    add("alpha.heic", rgba, "HEIF")
    add("plain.jxl", rgb, lossless=True)
    add("lossy.jxl", rgba, use_container=True, exif=exif.tobytes())
    add("plain.jp2", rgb)
    add("stream.j2k", rgba, irreversible=True)
    for name, mode in (("a.ppm", "RGB"), ("a.pgm", "L"), ("a.pbm", "1")):
        add(name, rgb.convert(mode))
    add("a.pfm", unit)
    found["text.ppm"] = b"P3\n16 16\n255\n" + b" ".join(str(v).encode() for v in picture(16, 16).ravel())
    add("a.qoi", rgba)
    add("a.ico", rgba.resize((48, 48)), sizes=[(48, 48), (16, 16)])
    add("dib.ico", rgba.resize((32, 32)), sizes=[(32, 32)], bitmap_format="bmp")
    found["a.cur"] = cursor(found["dib.ico"])
    add("icon.png", rgba.resize((128, 128)))
    icon = found.pop("icon.png")
    found["a.icns"] = b"icns" + struct.pack(">I4sI", 16 + len(icon), b"ic07", 8 + len(icon)) + icon
    add("a.dds", rgba)
    add("dxt.dds", rgba.resize((40, 24)), pixel_format="DXT5")
    add("a.blp", rgb.quantize(16), blp_version="BLP1")
    add("a.tga", rgba)
    add("rle.tga", rgb, compression="tga_rle")
    add("a.pcx", rgb)
    found["a.dcx"] = struct.pack("<3I", 0x3ADE68B1, 12, 0) + found["a.pcx"]
    add("a.im", rgb)
    add("a.msp", rgb.convert("1"))
    add("a.sgi", rgb)
    add("a.spi", unit, "SPIDER")
    add("a.xbm", rgb.convert("1"))
    found |= {name: make() for name, make in _BY_HAND.items()}
    return found


def profile_of(space: str):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space))


def cursor(icon: bytes) -> bytes:
    return icon[:2] + b"\2\0" + icon[4:]


def psd(planes: np.ndarray, mode: int, profile: bytes = b"") -> bytes:
    """A flat Photoshop file of [channels, height, width] uint8 in colour mode `mode`."""
    channels, height, width = planes.shape
    resources = b""
    if profile:
        resources = b"8BIM" + struct.pack(">HHI", 1039, 0, len(profile)) + profile + b"\0" * (len(profile) % 2)
    head = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", channels, height, width, 8, mode)
    return head + bytes(4) + struct.pack(">I", len(resources)) + resources + bytes(4) + b"\0\0" + planes.tobytes()


def _sun() -> bytes:
    pixels = picture()[..., ::-1]
    return struct.pack(">8I", 0x59A66A95, 40, 24, 24, pixels.size, 1, 0, 0) + pixels.tobytes()


def _fits() -> bytes:
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                   40", "NAXIS2  =                   24", "END"]
    head = "".join(card.ljust(80) for card in cards).encode()
    data = picture()[..., 0].tobytes()
    return head.ljust(2880) + data.ljust(2880, b"\0")


def _fli() -> bytes:
    palette = bytes([1, 0, 0, 0]) + bytes(range(256)) * 3
    palette = struct.pack("<IH", len(palette) + 6, 4) + palette
    copy = struct.pack("<IH", 40 * 24 + 6, 16) + picture()[..., 0].tobytes()
    frame = struct.pack("<IHH8x", len(palette) + len(copy) + 16, 0xF1FA, 2) + palette + copy
    head = struct.pack("<IHHHHHHI", 128 + len(frame), 0xAF12, 1, 40, 24, 8, 3, 70)
    return head.ljust(128, b"\0") + frame


def _ftex() -> bytes:
    data = picture(32, 32).tobytes()
    head = b"FTEX" + struct.pack("<8i", 1, 32, 32, 1, 1, 1, 32, len(data))
    return head + data


def _gbr() -> bytes:
    name = b"brush\0"
    return struct.pack(">5I", 28 + len(name), 2, 40, 24, 1) + b"GIMP" + struct.pack(">I", 25) + name + bytes(960)


def _pixar() -> bytes:
    head = bytearray(1024)
    head[:4] = b"\200\350\0\0"
    struct.pack_into("<HH", head, 416, 24, 40)
    struct.pack_into("<HH", head, 424, 14, 2)
    return bytes(head) + picture().tobytes()


def _xpm() -> bytes:
    rows = "".join(f'"{"ab" * 20}",\n' for _ in range(24))
    head = '/* XPM */\nstatic char *a[] = {\n"40 24 2 1",\n"a c #ff0000",\n"b c #0000ff",\n'
    return (head + rows.rstrip(",\n") + "\n};\n").encode()


# Red, then blue, 40 x 24; written with libjxl 0.10.
_MOVING_JXL = "/woFiKAJAMQECAQBAGQASxiLFQDUGWMwJi8QAQAg9QRAIIF/P7s5GggEBQBEAEsYixWAXfj/AhEAMKODCvsD"
_BY_HAND = {
    "rgb.psd": lambda: psd(picture().transpose(2, 0, 1), 3),
    "cmyk.psd": lambda: psd(np.concatenate([picture(), picture()[..., :1]], -1).transpose(2, 0, 1), 4),
    "a.ras": _sun,
    "a.fits": _fits,
    "a.fli": _fli,
    "a.ftu": _ftex,
    "a.gbr": _gbr,
    "a.pxr": _pixar,
    "a.xpm": _xpm,
    "moving.jxl": lambda: base64.b64decode(
        "/woFiKAJAMQECAQBAGQASxiLFQDUGWMwJi8QAQAg9QRAIIF/P7s5GggEBQBEAEsYixWAXfj/AhEAMKODCvsD"
    ),
}


def mutated(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes, str]:
    """(name, bytes, how) of damaged file `number`: the same for the same arguments."""
    chance = random.Random(f"{seed}:{number}")
    name = sorted(files)[number % len(files)]
    data, ways = bytearray(files[name]), []
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        way = chance.choice(_WAYS)
        ways.append(way.__name__.strip("_"))
        data = bytearray(way(data, chance, files)) or bytearray(b"\0")
    if data[:4] == b"\x89PNG" and chance.random() < 0.8:
        data = bytearray(_png_join(*_png_split(data)))
    return name, bytes(data), "+".join(ways)


def _place(data: bytearray, chance: random.Random, room: int = 1) -> int:
    """An offset, more often near the beginning."""
    end = max(1, len(data) - room + 1)
    return chance.randrange(min(end, chance.choice((32, 64, 256, 1024, end))))


def _flip(data, chance, files):
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        data[_place(data, chance)] ^= 1 << chance.randrange(8)
    return data


def _put(data, chance, files):
    data[_place(data, chance)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
    return data


def _claim(data, chance, files):
    """An impossible or huge number where a size or length may stand."""
    width = chance.choice((2, 4, 4, 8))
    at = _place(data, chance, width)
    number = chance.choice((*CLAIMS, len(data), chance.randrange(1 << 16))) % (1 << 8 * width)
    data[at : at + width] = number.to_bytes(width, chance.choice(("big", "little")))
    return data


def _cut(data, chance, files):
    return data[: chance.randrange(1, len(data) + 1)]


def _hole(data, chance, files):
    at = _place(data, chance)
    return data[:at] + data[at + chance.choice((1, 2, 4, 12, 64, 500)) :]


def _again(data, chance, files):
    at, length = _place(data, chance), chance.choice((1, 2, 4, 12, 64, 500))
    return data[: at + length] + data[at : at + length] * chance.choice((1, 1, 2, 50)) + data[at + length :]


def _noise(data, chance, files):
    at, length = _place(data, chance), chance.choice((4, 16, 64, 500))
    data[at : at + length] = chance.randbytes(min(length, len(data) - at))
    return data


def _splice(data, chance, files):
    other = files[chance.choice(sorted(files))]
    at, there = _place(data, chance), chance.randrange(len(other))
    return data[:at] + other[there : there + chance.choice((8, 64, 1000, len(other)))] + data[at:] * chance.randrange(2)


def _pieces(data, chance, files):
    """Chunks, boxes or segments left out, doubled or exchanged."""
    head, pieces = _split(data)
    if pieces:
        one, two = chance.randrange(len(pieces)), chance.randrange(len(pieces))
        way = chance.randrange(4)
        if way == 0:
            del pieces[one]
        elif way == 1:
            pieces.insert(two, pieces[one])
        elif way == 2:
            pieces[one], pieces[two] = pieces[two], pieces[one]
        else:
            pieces[one] = bytes(_flip(bytearray(pieces[one] or b"\0"), chance, files))
    return head + b"".join(pieces)


_WAYS = (_flip, _flip, _put, _claim, _claim, _cut, _hole, _again, _noise, _splice, _pieces, _pieces)


def _split(data: bytes) -> tuple[bytes, list[bytes]]:
    """What stands before the first piece, and the pieces, each with its own length field."""
    if data[:4] == b"\x89PNG":
        head, pieces = _png_split(data)
        return head, [struct.pack(">I", len(piece) - 4) + piece + bytes(4) for piece in pieces]
    pieces, at = [], 2 if data[:2] == b"\xff\xd8" else 12 if data[:4] == b"RIFF" else 0
    head = bytes(data[:at])
    while at + 8 <= len(data):
        if head == b"\xff\xd8":
            length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            length = len(data) if data[at + 1] == 0xDA else length
        elif head[:4] == b"RIFF":
            length = 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        elif data[4:8] in (b"ftyp", b"JXL ", b"jP  "):
            length = max(8, int.from_bytes(data[at : at + 4], "big"))
        else:
            length = 64
        pieces.append(bytes(data[at : at + length]))
        at += length
    return head, [*pieces, bytes(data[at:])]


def _png_split(data: bytes) -> tuple[bytes, list[bytes]]:
    pieces, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        pieces.append(bytes(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(data[:8]), pieces


def _png_join(head: bytes, pieces: list[bytes]) -> bytes:
    """The chunks with lengths and checksums made good, so that damage reaches the code behind them."""
    chunks = (struct.pack(">I", max(0, len(p) - 4)) + p + struct.pack(">I", zlib.crc32(p)) for p in pieces)
    return head + b"".join(chunks)


def outcome(path: Path) -> str:
    """ "decoded", "refused" or "memory"; anything else tells what went wrong."""
    try:
        size = images.size(path, MAX_PIXELS)
    except images.ImageProblem:
        size = None
    except MemoryError:
        return "memory"
    except BaseException as error:
        return f"size raised {type(error).__name__}: {error}"
    try:
        pixels = images.decode(path, MAX_PIXELS)
    except images.ImageProblem as error:
        return "refused" if 5 < len(str(error)) < 400 else f"a strange reason: {error}"
    except MemoryError:
        return "memory"
    except BaseException as error:
        return f"decode raised {type(error).__name__}: {error}"
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        return f"decode gave {pixels.dtype} {pixels.shape}"
    if size != (pixels.shape[1], pixels.shape[0]):
        return f"size said {size}, decode gave {pixels.shape}"
    return "decoded"


def _child(seed: int, numbers: range) -> None:
    """Report every outcome on a line; the parent sees at which number a crash or a hang ended it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, whatever C code is doing
    files = seeds()
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            name, data, _ = mutated(files, seed, number)
            path = Path(folder, name)
            path.write_bytes(data)
            signal.alarm(SECONDS)
            result = outcome(path)
            signal.alarm(0)
            path.unlink()
            print(json.dumps([number, result]), flush=True)


@dataclasses.dataclass
class Found:
    """What came of a run.

    Attributes:
      counts: how many inputs were decoded, refused, out of memory, and ended their process.
      wrong: (file kept, what happened) of everything that is neither pixels nor a named reason.
      deaths: (file kept, signal) of every input that ended its process: a decoder's own fault, which a worker contains.
    """

    counts: collections.Counter
    wrong: list[tuple[str, str]]
    deaths: list[tuple[str, str]]


CHILD = (sys.executable, "-m", "tests.encode.fuzz")


def run(count: int, seed: int, keep: Path, start: int = 0, child: tuple[str, ...] = CHILD) -> Found:
    """Try `count` damaged files in child processes; those worth a look are kept in a folder."""
    files, found = seeds(), Found(collections.Counter(), [], [])
    keep.mkdir(parents=True, exist_ok=True)
    number, end = start, start + count

    def save(at: int) -> str:
        name, data, how = mutated(files, seed, at)
        path = keep / f"{seed}-{at}-{how}-{name}"
        path.write_bytes(data)
        return str(path)

    while number < end:
        command = [*child, f"--seed={seed}", f"--child={number}:{end}"]
        root = Path(__file__).parents[2]
        with (
            open(keep / "stderr.txt", "ab") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root) as process,
        ):
            for line in process.stdout:
                number, result = json.loads(line)
                if result in ("decoded", "refused", "memory"):
                    found.counts[result] += 1
                else:
                    found.counts["wrong"] += 1
                    found.wrong.append((save(number), result))
                number += 1
        if process.returncode > 0:
            raise RuntimeError(f"the child gave up with exit code {process.returncode}; see {keep / 'stderr.txt'}")
        if process.returncode < 0:
            found.counts["killed its process"] += 1
            found.deaths.append((save(number), signal.Signals(-process.returncode).name))
            number += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir(), f"fuzz-{os.getpid()}"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args.seed, range(*map(int, args.child.split(":"))))
        return 0
    began = time.monotonic()
    found = run(args.count, args.seed, args.keep, args.start)
    for path, what in (*found.wrong, *found.deaths):
        print(f"{what}: {path}")
    print(f"{args.count} files in {time.monotonic() - began:.0f} s: {dict(found.counts)}; kept in {args.keep}")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
