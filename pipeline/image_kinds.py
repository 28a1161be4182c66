"""What a file is by its first bytes, where it is no image that Pillow opens, and what to do about it."""

import threading
from importlib import import_module

from PIL import Image

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"PAR1", "a parquet table; leave out *.parquet, or name its folder as the data"),
    (b"ARROW1", "an arrow table; leave out *.arrow, or name its folder as the data"),
    (b"\x89PNG\n\x1a\n", "a PNG that was copied as text, its line ends changed; copy it again as it is"),
    (b"/9j/", "a JPEG written as base64 text; decode it first"),
    (b"iVBORw0KGgo", "a PNG written as base64 text; decode it first"),
    (b"data:image/", "an image written as base64 text; decode it first"),
    (b"PK\x03\x04", "a zip; unpack it, or name it as the data"),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"\xfd7zXZ\0", "compressed by xz; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"),
    (b"\x93NUMPY", "a NumPy array, not an image; leave out *.npy"),
    (b"\x89HDF\r\n", "an HDF5 file; write its images as files first"),
    (b"%PDF", "a PDF, not an image; leave out *.pdf"),
    (b"8BPS", "a Photoshop file; export it as PNG"),
    (b"%!PS", "PostScript, which is not read; export it as PNG"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image, which is not read; export it as PNG"),
    (b"SQLite format 3", "a SQLite database; leave it out"),
    (b"\x80\x02", "a pickle, which is never opened"),
    (b"\x80\x04", "a pickle, which is never opened"),
    (b"\x1a\x45\xdf\xa3", "a video; extract its frames first"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file; develop it first"),
    (b"IIU\0", "a camera's raw file; develop it first"),
    (b"IIRO", "a camera's raw file; develop it first"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif")
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_PLUG_INS = {"HEIC": ("pillow_heif", "pillow-heif", "HEIF"), "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin", "JXL")}
_LMDB_MAGIC = b"\xde\xc0\xef\xbe"
_UNKNOWN = "not an image of a known kind, or cut off inside its header"
_lock = threading.Lock()
_formats: dict[str, str | None] = {}


def plug_in_kind(data: bytes) -> str | None:
    """HEIC or JPEG XL, which are read by an optional plug-in, or None."""
    if data.startswith(_JPEG_XL):
        return "JPEG XL"
    return "HEIC" if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS else None


def plug_in_format(kind: str) -> str | None:
    """The name under which Pillow opens such files, its plug-in registered; None where the plug-in is not installed."""
    with _lock:
        if kind not in _formats:
            module, _, name = _PLUG_INS[kind]
            try:
                plug_in = import_module(module)
            except ImportError:
                _formats[kind] = None
            else:
                if kind == "HEIC":
                    plug_in.register_heif_opener()
                _formats[kind] = name if name in Image.OPEN else None
        return _formats[kind]


def missing_plug_in(kind: str) -> str:
    """The reason for a file that would need a plug-in."""
    return f"{kind}, which is read where its plug-in is installed: pip install {_PLUG_INS[kind][1]}"


def what_it_is(data: bytes) -> str:
    """What a file is that is no image of a known kind, as far as its first bytes tell."""
    for start, kind in _STARTS:
        if data.startswith(start):
            return f"{_UNKNOWN}: {kind}"
    if data[16:20] == _LMDB_MAGIC:
        return f"{_UNKNOWN}: an LMDB database; write its images as files first"
    if data[4:8] == b"ftyp":
        return f"{_UNKNOWN}: a video; extract its frames first"
    if data[257:262] == b"ustar":
        return f"{_UNKNOWN}: a tar; unpack it, or name it as the data"
    text = _kind_of_text(data[:1024])
    return f"{_UNKNOWN}: {text}" if text else _UNKNOWN


def _kind_of_text(start: bytes) -> str | None:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:5].lower() in (b"<!doc", b"<html"):
        return "a web page, as servers send for a file that is gone; fetch it again"
    if text[:4].lower() == b"<svg" or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing, which is not read; export it as PNG"
    if text.startswith((b"<?xml", b"<annotation")):
        return "XML, as annotations are; leave out *.xml"
    if not text or any(byte < 32 and byte not in b"\t\n\r\f" for byte in text):
        return None
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(text) - 4:
            return None
    if text[:1] in b"{[":
        return "JSON, not an image; leave out *.json"
    return "text, as captions are; leave out *.txt"
