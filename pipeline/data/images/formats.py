"""Which picture formats are read, what files of other formats are called, and what stands in the
way of a whole picture without being part of it.

Invariant: nothing here decodes pixels or expands more than _MOST_TEXT_BYTES of metadata.
"""

import io
import re
import zlib
from collections.abc import Iterator
from functools import lru_cache

from PIL import Image

# In Pillow's names. MPO, what phones write for two views, is opened as the JPEG that it starts as.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")

# Of files, as folders of pictures are searched for them.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".avif", ".heic", ".heif"),
)
# Of files that show something and are not read: in a folder of pictures one of them is a row less.
UNREAD_SUFFIXES = (
    *(".svg", ".pdf", ".eps", ".psd", ".jp2", ".j2k", ".jxl", ".ico", ".tga", ".exr", ".hdr"),
    *(".dds", ".qoi", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)

_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_PNG = b"\x89PNG\r\n\x1a\n"

_OURS = re.compile(
    rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP|GIF8|BM|II\*\0|MM\0\*|P[1-6]\s|"
    rb"....ftyp(avi|hei|hev|mif|msf)",
    re.DOTALL,
)

# How files begin that are no picture here, and what to call them.
_OTHERS = (
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (rb"8BPS", "a Photoshop file"),
    # an icon says how many pictures it holds where Targa, which has no magic, has no colour map
    (rb"\0\0[\x01\x02]\0(?!\0\0)", "an icon"),
    (
        rb"\0(\0[\x02\x03\x0a\x0b]\0{5}|\x01[\x01\x09].{4}[\x0f\x10\x18\x20]).{8}"
        rb"[\x01\x08\x0f\x10\x18\x20]",
        "a Targa picture",
    ),
    (rb"icns", "an icon"),
    (rb"\x76\x2f\x31\x01", "an OpenEXR picture"),
    (rb"DDS ", "a DDS texture"),
    (rb"qoif", "a QOI picture"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg", "an SVG drawing"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript document"),
    (rb"\s*<(!DOCTYPE html|html|head)", "a web page, perhaps the error of a download"),
    (rb"\s*<\?xml", "an XML document, perhaps the error of a download"),
    (rb"version https://git-lfs", "a pointer of Git LFS, to be fetched by git lfs pull"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "a gzip file"),
    (rb"\x28\xb5\x2f\xfd", "a zstandard file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb".{128}DICM", "a DICOM picture"),
    (rb"RIFF....AVI |.{4}ftyp(isom|mp4|M4V|qt  )|\x1a\x45\xdf\xa3", "a video"),
)
_HEAD_BYTES = 512

# Pillow gives up on a PNG with a text or a profile longer than this, whatever its pixels are.
_MOST_TEXT_BYTES = 1 << 20
_MOST_TEXTS_BYTES = 32 << 20  # of all texts together, half of what Pillow takes
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9A-Fa-f]+>")


def begins_as_picture(data: bytes) -> bool:
    """Tell whether bytes begin as a file of a format in FORMATS does."""
    return _OURS.match(data) is not None


def name_of_other(data: bytes) -> str | None:
    """Return what a file is that is of no format in FORMATS; None when its first bytes do not
    tell."""
    head = data[:_HEAD_BYTES]
    for start, name in _OTHERS:
        if re.match(start, head, re.DOTALL | re.IGNORECASE):
            return name
    return None


def is_heic(data: bytes) -> bool:
    """Tell whether a file says that it is a HEIC picture, as phones take them."""
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS


@lru_cache(1)
def register_heic() -> None:
    """Teach Pillow to open HEIC pictures."""
    # Only who meets such a picture pays for the import.
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False)


def open_lazily(data: bytes) -> Image.Image:
    """Return the picture of a file's bytes, its header read and no pixel decoded."""
    formats = [form for form in FORMATS if form != "HEIF"]
    if is_heic(data):
        register_heic()
        formats.append("HEIF")
    return Image.open(io.BytesIO(data), formats=formats)


def without_long_texts(data: bytes) -> bytes:
    """Return a PNG without the texts and profiles that are too long for Pillow; others as they
    are."""
    if not data.startswith(_PNG):
        return data
    kept = [_PNG]
    total = 0
    for kind, chunk in _chunks(data):
        if kind in _TEXT_CHUNKS:
            length = _text_bytes(kind, chunk[8:-4])
            if length > _MOST_TEXT_BYTES or total + length > _MOST_TEXTS_BYTES:
                continue
            total += length
        kept.append(chunk)
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, the chunk with its length and checksum) of a PNG, and what is torn as it is."""
    start = len(_PNG)
    while start < len(data):
        head = data[start : start + 8]
        length = int.from_bytes(head[:4], "big")
        end = start + 12 + length
        yield head[4:], data[start:end]
        start = end


def _text_bytes(kind: bytes, content: bytes) -> int:
    """Return how long a chunk's text is once it is unpacked, counted no further than needed."""
    _, _, after_keyword = content.partition(b"\0")
    if kind == b"tEXt":
        return len(content)
    packed = after_keyword[1:]
    if kind == b"iTXt":
        is_packed = after_keyword[:1] == b"\1"
        if not is_packed:
            return len(content)
        # Behind the method come a language and the keyword in it, each with a zero at its end.
        packed = after_keyword[2:].split(b"\0", 2)[-1]
    try:
        text = zlib.decompressobj().decompress(packed, _MOST_TEXT_BYTES + 1)
    except zlib.error:
        return len(content)
    return max(len(content), len(text))


def without_addresses(text: str) -> str:
    """Return a library's message without the objects of this process that it names."""
    return _ADDRESS.sub("the data", text)
