"""Pictures from anywhere: opened with suspicion, turned upright, hashed, fitted to a pixel area,
stored.

Invariant: what leaves here is a whole, upright RGB picture within the limits it was asked for; the
digest is of its pixels and size, so one picture in two files or two formats (both lossless) has one
digest.
"""

import hashlib
import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TypeVar
from unicodedata import normalize
from urllib.parse import unquote

from PIL import Image, ImageStat, UnidentifiedImageError

from ...store.room import writing
from ..drop_stats import Dropped
from . import frames, reduced, tones
from .formats import (
    FORMATS,
    is_heic,
    name_of_other,
    open_lazily,
    without_addresses,
    without_long_texts,
)
from .near_duplicates import look

T = TypeVar("T")

ImageSource = Path | str | bytes | Image.Image  # a path, a file's bytes, or decoded already

# A small file can say that it holds a huge picture: this many pixels are 192 MB as RGB.
MAX_DECODED_PX = 64_000_000
MAX_FILE_BYTES = 256 << 20

# Qwen3-VL's processor refuses a picture with a side over 200 times the other.
MAX_ASPECT = 200

# Of a digest, in a file's name: 64 bits, so a million pictures collide with odds of 3 in 10^8.
DIGEST_CHARS = 16

# Of a folder, looked through for a name that is spelled otherwise.
_MOST_NAMES = 1 << 17

_ORIENTATION = 0x0112  # the EXIF tag

# What makes a picture upright, by the tag's value; 1 and what no camera writes make nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What a file with several pictures is called where they are counted.
SEVERAL = "several pictures in a file"

# open_checked has its own limit and words; without this a refused picture also prints Pillow's.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Of EXIF data one tag is read, and what else is wrong with them is nobody's concern.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class BadImage(Dropped):
    """A picture that cannot be used."""


@dataclass(frozen=True)
class StoredImage:
    """A picture as it lies in a folder."""

    name: str  # of the file
    digest: str  # of the upright original's pixels, hex
    width_px: int  # of the upright original
    height_px: int
    resized: bool
    tones: int  # levels between the darkest and the lightest point, of the colour with most
    look: bytes = b""  # what near duplicates have in common; empty where nobody asked


def open_checked(
    source: ImageSource,
    root: Path | None = None,
    max_pixels: int = MAX_DECODED_PX,
    first_frame: bool = False,
    area_px: int | None = None,
) -> Image.Image:
    """Return the picture of a path (inside root, when given) or bytes: whole, upright, RGB,
    transparency over white. With first_frame, a file of several pictures gives its first; with
    area_px, a picture that is far larger is made smaller as it is decoded.

    Raises BadImage, a DataError, for what is missing, corrupt, too large, of another format, or
    outside root.
    """
    named = source
    if root and isinstance(source, Path | str):
        named = Path(root, source)
    name = _name_of(named)
    image, _ = _decoded(_content(source, root, name), name, max_pixels, first_frame, area_px)
    return image


def claimed_size(data: bytes, max_pixels: int = MAX_DECODED_PX) -> tuple[int, int]:
    """Return the width and height in px that a file's header says; nothing is decoded. Raises
    BadImage."""
    return _of_header(data, max_pixels, lambda image: image.size)


def decoding_bytes(data: bytes, area_px: int, max_pixels: int = MAX_DECODED_PX) -> int:
    """Return how much memory a file takes to decode for an area, by what its header says; nothing
    is decoded. Raises BadImage."""
    return _of_header(data, max_pixels, lambda image: reduced.bytes_needed(image, data, area_px))


def _of_header(data: bytes, max_pixels: int, tell: Callable[[Image.Image], T]) -> T:
    """Return what `tell` makes of a picture of which the header was read. Raises BadImage."""
    name = _name_of(data)

    def read(content: bytes) -> T:
        with open_lazily(content) as image:
            _check_size(image.size, name, max_pixels)
            return tell(image)

    with _faults(name, max_pixels, data):
        return _despite_texts(read, data)


def resized(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """Return the picture with its area within [min_pixels, max_pixels], aspect kept up to rounding.

    Raises BadImage when one side is over 200 times the other.
    """
    width, height = _fitted_size(image.width, image.height, min_pixels, max_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(
            "too long and thin",
            f"a picture of {image.width} x {image.height} px is {width} x {height} in "
            f"[{min_pixels}, {max_pixels}] square px; no side may be over {MAX_ASPECT} "
            "times the other, so cut it into parts",
        )
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def digest(image: Image.Image) -> str:
    """Return the sha256 of an RGB picture's size and pixels, hex."""
    # With the size: pictures of 2 x 8 and 4 x 4 px may have the same bytes.
    size = f"{image.mode} {image.width}x{image.height}\n"
    hasher = hashlib.sha256(size.encode())
    hasher.update(image.tobytes())
    return hasher.hexdigest()


def store(
    source: ImageSource,
    folder: Path,
    min_pixels: int,
    max_pixels: int,
    root: Path | None = None,
    max_decoded: int = MAX_DECODED_PX,
    first_frame: bool = False,
    with_look: bool = False,
) -> StoredImage:
    """Write a picture, fitted to an area, into folder under its digest; safe among processes.

    A PNG, or the original bytes of a JPEG that needs no change. Raises BadImage.
    """
    # No more of a path than the source says: the report of a task is the same on any machine.
    name = _name_of(source)
    data = _content(source, root, name)
    image, as_is = _decoded(data, name, max_decoded, first_frame)
    try:
        fitted = resized(image, min_pixels, max_pixels)
    except BadImage as error:
        raise BadImage(error.reason, f"{name}: {error}") from None

    found = digest(image)
    # Encoded once more, a JPEG loses quality; as a PNG it takes several times the room.
    kept = data if as_is and fitted is image and isinstance(data, bytes) else None
    suffix = ".png" if kept is None else ".jpg"
    file = folder / f"{found[:DIGEST_CHARS]}{suffix}"
    # Whoever else writes the same picture writes the same bytes; encoding takes longest of all.
    if not file.exists():
        _write(file, png(fitted) if kept is None else kept)
    return StoredImage(
        name=file.name,
        digest=found,
        width_px=image.width,
        height_px=image.height,
        resized=fitted is not image,
        tones=max(high - low for low, high in ImageStat.Stat(fitted).extrema),
        look=look(fitted) if with_look else b"",
    )


def png(image: Image.Image) -> bytes:
    """Return the picture as PNG: the same bytes for the same pixels."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=3)
    return out.getvalue()


def _name_of(source: ImageSource) -> str:
    """Return what messages call a picture."""
    if isinstance(source, Image.Image):
        return f"a picture of {source.width} x {source.height} px"
    if isinstance(source, bytes):
        return f"a picture of {len(source)} bytes"
    return str(source)


def _content(source: ImageSource, root: Path | None, name: str) -> bytes | Image.Image:
    if isinstance(source, bytes | Image.Image):
        return source
    try:
        path = Path(source)
        if root is not None:
            path = _inside(source, Path(root).resolve(), name)
        # A pipe or a device would block or never end.
        if not path.is_file():
            fault = "is not a file" if path.exists() else "does not exist"
            raise BadImage("missing picture", f"{name} {fault}{_meant(source, root)}")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadImage(
                "too large a picture",
                f"{name} has {size} bytes; at most {MAX_FILE_BYTES} are read. Make it smaller",
            )
        return path.read_bytes()
    # ValueError for a NUL in the name, RuntimeError for a loop of links.
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadImage("missing picture", f"{name!r} cannot be read: {why}") from None


def _meant(path: Path | str, root: Path | None) -> str:
    """Return what to say where a path's file is there under a path that is spelled otherwise."""
    if root is None:
        return ""
    root = root.resolve()
    given = str(path).strip()
    plain = unquote(given.partition("?")[0]).replace("\\", "/")
    parts = [part for part in plain.split("/") if part]
    # Whole first, then without the folders of the machine that it was written on.
    for start in range(len(parts)):
        rest = "/".join(parts[start:])
        there = (root / rest).resolve()
        if rest != given and there.is_relative_to(root) and there.is_file():
            return f", {rest} does: write paths as they are from image_root on, with / in them"
    if "\\" in given:
        return "; folders are parted by / here, and paths start at image_root"
    other = _spellings(root / "/".join(parts[:-1])).get(_folded(parts[-1])) if parts else None
    if other is None:
        return ""
    if other == parts[-1]:
        # A link that leads nowhere, or a folder, has the name itself.
        blanks = str(path) != given
        return f", {other} does: blanks before or behind are part of a name" if blanks else ""
    if normalize("NFC", other) == normalize("NFC", parts[-1]):
        return (
            "; a name that looks the same does, whose accents are written otherwise, as a Mac "
            "writes them: rename the file, or write its name into the row anew"
        )
    return f", {other} does: upper and lower case are different names"


def _folded(name: str) -> str:
    """Return what names have in common that differ in case, or in how their accents are written."""
    return normalize("NFC", name).lower()


@lru_cache(1)
def _spellings(folder: Path) -> dict[str, str]:
    """Return a folder's names by what they have in common with others; of a very large one,
    some."""
    # Remembered: where one picture is missing, many are, and a folder may have a million.
    try:
        with os.scandir(folder) as entries:
            return {_folded(entry.name): entry.name for entry in islice(entries, _MOST_NAMES)}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _inside(path: Path | str, root: Path, name: str) -> Path:
    """Return where a path below root lies, links followed. Raises BadImage when that is outside
    root."""
    found = (root / path).resolve()
    if not found.is_relative_to(root):
        raise BadImage(
            "path outside its root",
            f"{name} leads out of the folder that image paths start at; move the picture "
            "there, or set image_root",
        )
    return found


def _decoded(
    data: bytes | Image.Image,
    name: str,
    max_pixels: int,
    first_frame: bool,
    area_px: int | None = None,
) -> tuple[Image.Image, bool]:
    """Return the upright RGB picture, and whether data is a JPEG that already says just that."""
    if isinstance(data, Image.Image):
        with _faults(name, max_pixels):
            _check_size(data.size, name, max_pixels)
            return _upright(data), False

    def read(content: bytes) -> tuple[Image.Image, bool]:
        # verify() finds damage that load() forgives, and leaves nothing to read: so open it twice.
        with open_lazily(content) as first:
            # The header alone is read so far, which says the size before anything is decoded.
            _check_size(first.size, name, max_pixels)
            first.verify()
        with open_lazily(content) as every:
            if not first_frame and frames.has_several(every):
                raise BadImage(
                    SEVERAL,
                    f"{name} has several frames or pages; save the one that is meant by itself",
                )
        with open_lazily(content) as image:
            if area_px is not None:
                reduced.draft(image, area_px)
                return _upright(reduced.reduced(image, area_px)), False
            image.load()
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            return _upright(image), plain and _turn(image) is None

    with _faults(name, max_pixels, data):
        return _despite_texts(read, data)


def _despite_texts(read: Callable[[bytes], T], data: bytes) -> T:
    """Return what read makes of a file's bytes, without the texts in it if they are too long."""
    try:
        return read(data)
    except ValueError:
        shorter = without_long_texts(data)
        if len(shorter) == len(data):
            raise
        return read(shorter)


@contextmanager
def _faults(name: str, max_pixels: int, data: bytes = b"") -> Iterator[None]:
    """Turn whatever a decoder raises about a picture, or a file's bytes, into a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except reduced.TooManyScans as error:
        raise BadImage("too large a picture", f"{name}: {error}; save it once more") from None
    except tones.UnknownTones as error:
        raise BadImage("unread tones", f"{name}: {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # What follows names Pillow's own limit, and guesses at an attack.
        told, _, _ = str(error).partition(" exceeds limit")
        raise BadImage(
            "too large a picture",
            f"{name}: {told}; at most {max_pixels} square px are decoded. Make it smaller",
        ) from None
    # Decoders raise what they like on damaged data: struct.error, SyntaxError, EOFError and more.
    except Exception as error:
        raise _undecodable(name, data, error) from None


def _undecodable(name: str, data: bytes, error: Exception) -> BadImage:
    """Return what to say of a file that no decoder takes."""
    formats = ", ".join(FORMATS)
    # The text of this one names an object of ours and nothing of the picture.
    if isinstance(error, UnidentifiedImageError):
        what = "its first bytes are of none of them"
    else:
        what = f"{type(error).__name__}: {without_addresses(str(error)).strip()}".rstrip(": ")
    if is_heic(data):
        return BadImage(
            "unread format",
            f"{name} is a HEIC picture that libheif cannot decode ({what}); save it as JPEG or PNG",
        )
    other = name_of_other(data)
    if other is not None:
        return BadImage("unread format", f"{name} is no whole {formats} picture: it is {other}")
    if not data.strip(b"\0"):
        what = "it is empty" if not data else "it is nothing but zeros"
    return BadImage("corrupt picture", f"{name} is no whole {formats} picture: {what}")


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage(
            "too large a picture",
            f"{name} says it has {width} x {height} px; at most {max_pixels} square px are "
            "decoded. Make it smaller",
        )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes a picture upright, if anything."""
    # Only this one tag is asked for: cameras and editors leave other ones broken, and the picture
    # is whole all the same.
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a block that is no EXIF at all raises what it likes
        return None


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy of a picture, turned as its EXIF data say, as RGB, transparency over white."""
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    # convert("L") would cut sixteen bits off at 255 instead of scaling them.
    if image.mode in tones.DEEP:
        image = tones.eight_bits(image)
    # convert("RGB") would show the colours that lie hidden under full transparency.
    if image.has_transparency_data:
        over = image.convert("RGBA")
        paper = Image.new("RGBA", over.size, "white")
        image = Image.alpha_composite(paper, over)
    out = image.copy() if image.mode == "RGB" else image.convert("RGB")
    # What the file said beside its pixels goes along to every crop: an orientation would turn it
    # once more, a profile would be written into its PNG.
    out.info = {}
    return out


def _fitted_size(width: int, height: int, least: int, most: int) -> tuple[int, int]:
    """Return width and height in px of the same shape, with an area in [least, most] px."""
    area = width * height
    if area < least:
        scale = math.sqrt(least / area)
        wide = math.ceil(width * scale)
        high = math.ceil(height * scale)
        # Rounding up may go past the upper limit where the two lie close together.
        if wide * high <= most:
            return wide, high
    elif area <= most:
        return width, height
    wanted = min(most, max(area, least))
    scale = math.sqrt(wanted / area)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _write(file: Path, content: bytes) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    with writing(file):
        part.write_bytes(content)
        part.replace(file)
