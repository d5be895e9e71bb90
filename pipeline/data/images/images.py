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
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ...errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_DECODED_PX = 64_000_000  # 192 MB as RGB
MAX_FILE_BYTES = 256 << 20
MAX_ASPECT = 200  # Qwen3-VL's processor refuses more
_ORIENTATION = 0x0112  # the EXIF tag
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
Picture = Path | str | bytes | Image.Image  # a path, the bytes of a file, or decoded already

# open_checked has its own limit and words; without this a refused picture also prints Pillow's
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadPicture(DataError):
    """A picture that cannot be used; reason is the kind of fault, for counting."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Stored:
    """A picture as it lies in a folder."""

    name: str  # of the file
    digest: str  # of the upright original's pixels, hex
    width_px: int  # of the upright original
    height_px: int
    resized: bool
    file_bytes: int


def open_checked(
    source: Picture, root: Path | None = None, max_pixels: int = MAX_DECODED_PX
) -> Image.Image:
    """Return the picture of a path (inside root, when given) or bytes: whole, upright, RGB,
    transparency over white.

    Raises BadPicture, a DataError, for what is missing, corrupt, too large, of another format, or
    outside root.
    """
    name = _named(Path(root, source) if root and isinstance(source, Path | str) else source)
    return _decoded(_content(source, root, name), name, max_pixels)[0]


def resized(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """Return the picture with its area within [min_pixels, max_pixels], aspect kept up to rounding.

    Raises BadPicture when one side is over 200 times the other.
    """
    width, height = _fitted(*image.size, min_pixels, max_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadPicture(
            "too long and thin",
            f"a picture of {image.width} x {image.height} px is {width} x {height} in [{min_pixels}, {max_pixels}] "
            f"square px; no side may be over {MAX_ASPECT} times the other, so cut it into parts",
        )
    return (
        image
        if (width, height) == image.size
        else image.resize((width, height), Image.Resampling.LANCZOS)
    )


def digest(image: Image.Image) -> str:
    """Return the sha256 of an RGB picture's size and pixels, hex."""
    hasher = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    hasher.update(image.tobytes())
    return hasher.hexdigest()


def store(
    source: Picture,
    folder: Path,
    min_pixels: int,
    max_pixels: int,
    root: Path | None = None,
    max_decoded: int = MAX_DECODED_PX,
) -> Stored:
    """Write a picture, fitted to an area, into folder under its digest; safe among processes.
    Raises BadPicture.

    A PNG, or the original bytes of a JPEG that needs no change.
    """
    name = _named(
        source
    )  # no more of a path than the source says: the report of a task is the same on any machine
    data = _content(source, root, name)
    image, as_is = _decoded(data, name, max_decoded)
    try:
        fitted = resized(image, min_pixels, max_pixels)
    except BadPicture as error:
        raise BadPicture(error.reason, f"{name}: {error}") from None
    found = digest(image)
    kept = as_is and fitted is image
    content = data if kept else png(fitted)
    file = folder / f"{found[:16]}{'.jpg' if kept else '.png'}"
    _write_once(file, content)
    return Stored(file.name, found, *image.size, fitted is not image, len(content))


def png(image: Image.Image) -> bytes:
    """Return the picture as PNG: the same bytes for the same pixels."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=3)
    return out.getvalue()


def _named(source: Picture) -> str:
    """Return what messages call a picture."""
    if isinstance(source, Image.Image):
        return f"a picture of {source.width} x {source.height} px"
    return f"a picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _content(source: Picture, root: Path | None, name: str) -> bytes | Image.Image:
    if isinstance(source, bytes | Image.Image):
        return source
    try:
        path = Path(source) if root is None else _inside(source, Path(root).resolve(), name)
        if not path.is_file():  # a pipe or a device would block or never end
            raise BadPicture(
                "missing picture",
                f"{name} {'is not a file' if path.exists() else 'does not exist'}",
            )
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadPicture(
                "too large a picture",
                f"{name} has {size} bytes; at most {MAX_FILE_BYTES} are read. Make it smaller",
            )
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        why = getattr(error, "strerror", None) or error
        raise BadPicture("missing picture", f"{name!r} cannot be read: {why}") from None


def _inside(path: Path | str, root: Path, name: str) -> Path:
    """Return where a path below root lies, links followed. Raises BadPicture when that is outside
    root."""
    found = (root / path).resolve()
    if not found.is_relative_to(root):
        raise BadPicture(
            "path outside its root",
            f"{name} leads out of the folder that image paths start at; move the picture "
            "there, or set image_root",
        )
    return found


def _decoded(data: bytes | Image.Image, name: str, max_pixels: int) -> tuple[Image.Image, bool]:
    """Return the upright RGB picture, and whether data is a JPEG that already says just that."""
    try:
        if isinstance(data, Image.Image):
            _check_size(data.size, name, max_pixels)
            return _upright(data), False
        with Image.open(io.BytesIO(data), formats=FORMATS) as first:
            _check_size(first.size, name, max_pixels)
            first.verify()
        with Image.open(
            io.BytesIO(data), formats=FORMATS
        ) as image:  # verify() leaves nothing to read
            image.load()
            as_is = image.format == "JPEG" and image.mode in ("RGB", "L") and not _is_turned(image)
            return _upright(image), as_is
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        told = str(error).partition(",")[0]  # what follows guesses at an attack
        raise BadPicture(
            "too large a picture",
            f"{name}: {told}; at most {max_pixels} square px are decoded. Make it smaller",
        ) from None
    except Exception as error:  # decoders raise what they like on damaged data
        what = str(error) or type(error).__name__
        raise BadPicture(
            "corrupt picture",
            f"{name} is no whole {', '.join(FORMATS)} picture: {type(error).__name__}: {what}",
        ) from None


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise BadPicture(
            "too large a picture",
            f"{name} says it has {size[0]} x {size[1]} px; at most {max_pixels} square px are decoded. Make it smaller",
        )


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION, 1) != 1


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy of a picture, turned as its EXIF data say, as RGB."""
    return _rgb(ImageOps.exif_transpose(image) if _is_turned(image) else image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:  # convert() would cut off instead of scale
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _fitted(width: int, height: int, least: int, most: int) -> tuple[int, int]:
    area = width * height
    if area < least:
        scale = math.sqrt(least / area)
        wide, high = math.ceil(width * scale), math.ceil(height * scale)
        if wide * high <= most:  # limits may lie too close for that
            return wide, high
    elif area <= most:
        return width, height
    scale = math.sqrt(min(most, max(area, least)) / area)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _write_once(file: Path, content: bytes) -> None:
    """Write unless it is there; another process that writes the same picture writes the same bytes."""
    if file.exists():
        return
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    part.write_bytes(content)
    part.replace(file)
