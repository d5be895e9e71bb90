"""Pictures decoded at a reduced size: nearly what the whole gives, and in no more memory than was
said."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import reduced
from pipeline.data.images.formats import open_lazily, register_heic
from pipeline.data.images.images import BadImage, decoding_bytes, open_checked, resized
from pipeline.serve.pictures import DECODING_BYTES

ROOT = Path(__file__).parent.parent
AREA = 4096
SIDE = 700


def scene(mode):
    """Return a picture of soft shapes with an edge, in a mode."""
    y_HW, x_HW = np.mgrid[:SIDE, :SIDE] / SIDE
    bands = [np.sin(6 * x_HW + i) * np.cos(5 * y_HW) * 100 + 128 for i in range(3)]
    bands[0][:, : SIDE // 3] = 30
    values = np.stack(bands, -1).astype(np.uint8)
    image = Image.fromarray(values)
    if mode == "RGBA":
        image.putalpha(Image.fromarray((x_HW * 255).astype(np.uint8)))
    elif mode == "I;16":
        image = Image.fromarray((bands[1] * 200).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    return image


def packed(image, kind, **options):
    held = io.BytesIO()
    if kind == "HEIF":
        register_heic()
    image.save(held, kind, **options)
    return held.getvalue()


KINDS = [
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "L", {}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "1", {}),
    ("PNG", "I;16", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("GIF", "P", {}),
    ("TIFF", "RGBA", {}),
    ("BMP", "RGB", {}),
    ("PPM", "RGB", {}),
    ("AVIF", "RGB", {}),
    ("HEIF", "RGB", {}),
]


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
def test_a_reduced_picture_is_nearly_the_whole_one_resized(kind, mode, options):
    data = packed(scene(mode), kind, **options)
    whole = resized(open_checked(data), 16, AREA)
    found = open_checked(data, area_px=AREA)
    assert found.mode == "RGB"
    assert mode == "I;16" or found.width < SIDE / 2
    assert found.width * found.height >= reduced.KEPT**2 * AREA
    found = resized(found, 16, AREA)
    assert found.size == whole.size
    off_HWC = np.abs(np.asarray(found, float) - np.asarray(whole, float))
    # of 255; at edges a point may be off by more
    assert off_HWC.mean() < (6 if mode == "1" else 1.5)


def test_what_is_not_far_larger_stays_as_it_is():
    image = scene("RGB").resize((200, 200))
    for kind in ("JPEG", "PNG"):
        data = packed(image, kind)
        found = open_checked(data, area_px=200 * 200 // 5)
        assert np.array_equal(found, open_checked(data))


def test_a_turned_or_hidden_picture_is_seen_as_it_is_meant():
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = packed(scene("RGB").resize((900, 600)), "JPEG", exif=exif)
    assert open_checked(tall, area_px=AREA).height > open_checked(tall, area_px=AREA).width
    hidden = Image.new("RGB", (SIDE, SIDE), (1, 2, 3))
    shown = open_checked(packed(hidden, "PNG", transparency=(1, 2, 3)), area_px=AREA)
    assert shown.getcolors() == [(shown.width * shown.height, (255, 255, 255))]


def test_a_header_alone_says_what_decoding_takes():
    small = decoding_bytes(packed(scene("RGB"), "JPEG"), AREA)
    scans = decoding_bytes(packed(scene("RGB"), "JPEG", progressive=True), AREA)
    # two bytes of each coefficient
    assert scans - small == 2 * 3 * SIDE * SIDE
    png = decoding_bytes(packed(scene("RGB"), "PNG"), AREA)
    assert small < png / 3
    cut = packed(scene("RGB"), "PNG")[:100]
    assert decoding_bytes(cut, AREA) == png
    with pytest.raises(BadImage, match="no whole"):
        decoding_bytes(b"\x89PNG", AREA)


def test_a_tile_larger_than_its_picture_is_counted():
    # a deflated one of this size comes in 764 KB, and was 772 MiB beside a picture of 64 px
    side = 1 << 14
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 9}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    data = head + b"".join(entries) + bytes(4)
    assert decoding_bytes(data, AREA) > DECODING_BYTES


def test_a_jpeg_of_very_many_scans_is_refused_by_its_markers():
    data = packed(scene("RGB"), "JPEG", progressive=True)
    with open_lazily(data) as image, pytest.raises(reduced.TooManyScans):
        reduced.bytes_needed(image, data + b"\xff\xda" * 200, AREA)
    with pytest.raises(BadImage, match="scans; save it once more"):
        decoding_bytes(data + b"\xff\xda" * 200, AREA)


MEASURE = """
import sys
from pathlib import Path
from pipeline.data.images import images
def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    said = images.decoding_bytes(data, 10_000)
    Path("/proc/self/clear_refs").write_text("5")
    before = most()
    images.resized(images.open_checked(data, area_px=10_000), 16, 10_000)
    print(most() - before, said)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoding_takes_no_more_than_was_said(tmp_path):
    paths = []
    for number, (kind, mode, options) in enumerate(KINDS):
        image = scene(mode).resize((1800, 1800)) if mode != "I;16" else scene(mode)
        path = tmp_path / str(number)
        path.write_bytes(packed(image, kind, **options))
        paths.append(path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for (kind, mode, _), line in zip(KINDS, done.stdout.splitlines(), strict=True):
        took, said = map(int, line.split())
        # what a library sets up once is of no picture
        assert took < said + (6 << 20), (kind, mode, took, said)
