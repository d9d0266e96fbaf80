"""Which files are pictures: suffixes and first bytes, as tables. No decoder is imported here.

A signature decides over a suffix. Formats that begin with nothing telling (TGA and the like) are tried only where the
suffix names them, so that a damaged JPEG is never read as a TGA full of noise.
"""

from __future__ import annotations

import re

HEAD = 512  # bytes of a file that are enough for every answer below

_BY_FORMAT = {  # Pillow's name of the format: suffixes
    "JPEG": "jpg jpeg jpe jfif mpo",
    "PNG": "png apng",
    "WEBP": "webp",
    "GIF": "gif",
    "TIFF": "tif tiff",
    "BMP": "bmp",
    "AVIF": "avif avifs",
    "HEIF": "heic heif heics heifs hif",
    "JXL": "jxl",
    "JPEG2000": "jp2 j2k j2c jpc jpf jpx",
    "PPM": "ppm pgm pbm pnm pfm",
    "PSD": "psd",
    "QOI": "qoi",
    "ICO": "ico",
    "ICNS": "icns",
    "DDS": "dds",
    "BLP": "blp",
    "FTEX": "ftc ftu",
    "SUN": "ras",
    "DCX": "dcx",
    "FITS": "fit fits",
    "XPM": "xpm",
}
_WEAK = {  # no signature worth the name: the suffix must say so
    "TGA": "tga icb vda vst",
    "DIB": "dib",
    "PCX": "pcx",
    "CUR": "cur",
    "FLI": "fli flc",
    "GBR": "gbr",
    "IM": "im",
    "MSP": "msp",
    "PCD": "pcd",
    "PIXAR": "pxr",
    "SGI": "sgi rgb rgba bw",
    "SPIDER": "spi spider",
    "XBM": "xbm",
}


def _by_suffix(table: dict[str, str]) -> dict[str, str]:
    return {suffix: name for name, suffixes in table.items() for suffix in suffixes.split()}


WEAK = _by_suffix(_WEAK)
PICTURES = frozenset(_by_suffix(_BY_FORMAT)) | frozenset(WEAK)

_RAW = "camera raw: develop it to JPEG, PNG or TIFF first"
_DRAWING = "a drawing of lines, not pixels: export it as PNG first"
_VIDEO = "a video: export single frames first"
_HDR = "light beyond white (HDR): tone-map it to PNG or TIFF first"
_LAYERS = "a layered working file: export it as PNG or TIFF first"
_TEXTURE = "a compressed texture: export it as PNG first"
_RARE = "a format that is not read: save it as PNG or JPEG first"

_RAW_SUFFIXES = """3fr ari arw bay braw cap cr2 cr3 crw dcr dcs dng drf eip erf fff gpr iiq k25 kdc mdc mef mos mrw nef nrw orf
ori pef ptx r3d raf raw rw2 rwl rwz sr2 srf srw x3f"""
RAW = frozenset(_RAW_SUFFIXES.split())
REFUSED = {
    suffix: reason
    for reason, suffixes in (
        (_RAW, _RAW_SUFFIXES),
        (_DRAWING, "svg svgz eps ps ai wmf emf cdr cgm dxf"),
        ("a document: export its pages as pictures first", "pdf djvu djv"),
        (_VIDEO, "mp4 mov m4v avi mkv webm mpg mpeg wmv mts m2ts 3gp flv"),
        (_HDR, "exr hdr rgbe"),
        (_LAYERS, "psb xcf kra ora clip afphoto sketch procreate sai pdn"),
        (_TEXTURE, "ktx ktx2 pvr astc vtf"),
        (_RARE, "jxr wdp hdp jls flif bpg fpx mic dcm dicom pict pct iff lbm wal"),
    )
    for suffix in suffixes.split()
}

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # more than 4 GB
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JXL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"8BPS\0\1", "PSD"),
    (b"qoif", "QOI"),
    (b"icns", "ICNS"),
    (b"DDS \x7c\0\0\0", "DDS"),
    (b"BLP1", "BLP"),
    (b"BLP2", "BLP"),
    (b"FTEX", "FTEX"),
    (b"\x59\xa6\x6a\x95", "SUN"),
    (b"\xb1\x68\xde\x3a", "DCX"),
    (b"SIMPLE  =", "FITS"),
    (b"/* XPM */", "XPM"),
    (b"P7 332", "XVTHUMB"),
)
_REFUSED_SIGNATURES = (
    (0, b"II*\0\x10\0\0\0CR", _RAW),
    (0, b"II\x1a\0\0\0HEAPCCDR", _RAW),
    (0, b"IIRO", _RAW),
    (0, b"IIRS", _RAW),
    (0, b"MMOR", _RAW),
    (0, b"IIU\0", _RAW),
    (0, b"FUJIFILMCCD-RAW", _RAW),
    (0, b"FOVb", _RAW),
    (0, b"\0MRM", _RAW),
    (4, b"ftypcrx ", _RAW),
    (0, b"%!PS", _DRAWING),
    (0, b"\xc5\xd0\xd3\xc6", _DRAWING),
    (0, b"\xd7\xcd\xc6\x9a", _DRAWING),
    (40, b" EMF", _DRAWING),
    (0, b"%PDF", REFUSED["pdf"]),
    (0, b"\x76\x2f\x31\x01", _HDR),
    (0, b"#?RADIANCE", _HDR),
    (0, b"#?RGBE", _HDR),
    (0, b"8BPS\0\2", _LAYERS),
    (0, b"gimp xcf", _LAYERS),
    (0, b"\xabKTX ", _TEXTURE),
    (0, b"\xff\xd8\xff\xf7", _RARE),  # JPEG-LS
    (0, b"II\xbc", _RARE),  # JPEG XR
    (0, b"FLIF", _RARE),
    (0, b"BPG\xfb", _RARE),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _RARE),  # FPX, MIC
    (128, b"DICM", _RARE),
    (0, b"\x1aE\xdf\xa3", _VIDEO),
    (8, b"AVI ", _VIDEO),
)
_HEIC = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"])
_AVIF = frozenset([b"avif", b"avis"])
_CONTAINERS = frozenset([b"mif1", b"msf1", b"miaf"])
_BMP_HEADERS = frozenset([12, 16, 40, 52, 56, 64, 108, 124])
_PORTABLE = re.compile(rb"P(?:[1-6f]|yP|yRGBA|yCMYK|0CMYK)\s(?:\s|#[^\n]*\n)*\d+\s(?:\s|#[^\n]*\n)*\d+\s")
_SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*(?:<!DOCTYPE svg[^>]*>?\s*)?<svg", re.S)


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that begins so is a picture whatever it is called; 64 bytes are nearly always enough, HEAD always."""
    return signature(head) is not None


def signature(head: bytes) -> str | None:
    """Pillow's name of the format that a file's first bytes prove."""
    for prefix, name in _SIGNATURES:
        if head.startswith(prefix):
            return name
    if head[:4] == b"RIFF" and head[8:15] == b"WEBPVP8":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[4:8] == b"ftyp":
        return _base_media(head)
    if head[:4] == b"\0\0\1\0" and len(head) >= 22 and head[4:6] != b"\0\0" and head[9] == 0 and head[10:12] in _PLANES:
        return "ICO"
    return "PPM" if _PORTABLE.match(head[:HEAD]) else None


_PLANES = (b"\0\0", b"\1\0")


def _base_media(head: bytes) -> str | None:
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12]] + [head[at : at + 4] for at in range(16, end - 3, 4)]
    if brands[0] in _HEIC or brands[0] in _AVIF:
        return "HEIF" if brands[0] in _HEIC else "AVIF"
    if brands[0] not in _CONTAINERS:
        return None
    return "AVIF" if _AVIF.intersection(brands) else "HEIF"


def refused(head: bytes, suffix: str) -> str | None:
    """Why a file is not even tried, or None."""
    for offset, magic, reason in _REFUSED_SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return reason
    if head[4:8] == b"ftyp" and _base_media(head) is None:
        return _VIDEO
    if _SVG.match(head):
        return _DRAWING
    known = signature(head)
    if suffix in ("cap", "raw") and head.isascii() and head.decode("ascii").strip().isprintable():
        return None  # a text that happens to be called so
    if suffix in RAW and known in ("TIFF", None):
        return _RAW  # its first page is a small preview
    return REFUSED.get(suffix) if known is None else None


RAW_REASON = _RAW
HDR_REASON = _HDR
