"""Whole pictures whatever their files carry beside the pixels, and files that are none told for
what they are; other libraries write them."""

import contextlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.data.images import formats
from pipeline.data.images.images import BadImage, claimed_size, open_checked

SIZE = (48, 32)
LONG = 2 << 20


@pytest.fixture(scope="module")
def scene():
    """Return a picture without sharp edges, which every codec keeps nearly as it is."""
    small = np.random.default_rng(3).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)


def encoded(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def difference(found, wanted):
    return np.abs(np.asarray(found, np.float32) - np.asarray(wanted, np.float32)).mean()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


TEXT = b"x" * LONG
PACKED = zlib.compress(TEXT)
METADATA = {
    "tEXt": chunk(b"tEXt", b"note\0" + TEXT),
    "zTXt": chunk(b"zTXt", b"note\0\0" + PACKED),
    "iTXt plain": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0x-default\0\0" + TEXT),
    "iTXt packed": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0x-default\0xxx\0" + PACKED),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + PACKED),
    "small window": chunk(b"zTXt", b"x\0\0" + zlib.compress(TEXT, wbits=10)),
    "many": chunk(b"zTXt", b"note\0\0" + zlib.compress(b"y" * (900 << 10))) * 80,
}


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("kind", METADATA)
def test_a_png_with_much_metadata_is_the_picture_that_it_holds(scene, kind, place):
    if (kind, place) == ("many", "before"):
        pytest.skip("seconds, for what the other place shows")
    whole = encoded(scene, "PNG", compress_level=0)
    at = whole.index(b"IDAT") - 4 if place == "before" else whole.index(b"IEND") - 4
    data = whole[:at] + METADATA[kind] + whole[at:]
    np.testing.assert_array_equal(open_checked(data), np.asarray(scene))
    assert claimed_size(data) == SIZE


def test_metadata_is_no_way_around_the_checks(scene):
    whole = encoded(scene, "PNG", compress_level=0)
    at = whole.index(b"IDAT") - 4
    torn = whole[:at] + METADATA["zTXt"] + whole[at : len(whole) // 2]
    with pytest.raises(BadImage, match="no whole"):
        open_checked(torn)
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(scene, "PNG", exif=turned.tobytes())
    at = data.index(b"IDAT") - 4
    assert open_checked(data[:at] + METADATA["zTXt"] + data[at:]).size == SIZE[::-1]


def app1(body):
    return b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_exif_block_costs_no_picture(scene):
    """Bytes of a real block are changed, cut and repeated in a thousand ways."""
    jpeg = encoded(scene, "JPEG", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    exif[0x011A] = 72.0
    exif.get_ifd(0x8769)[0x9004] = "2020:01:01 00:00:00"
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    upright = {SIZE, SIZE[::-1]}
    rng = random.Random(0)
    for _ in range(1000):
        broken = bytearray(body)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(len(broken))] = rng.choice((0, 1, 4, 5, 127, 255))
        broken = bytes(broken[: rng.randint(0, len(broken))]) * rng.choice((1, 1, 2))
        assert open_checked(jpeg[:2] + app1(broken) + jpeg[2:]).size in upright


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_photos_of_phones_are_read_and_turned(scene, form):
    formats.register_heic()
    assert difference(open_checked(encoded(scene, form, quality=95)), scene) < 8
    turned = Image.Exif()
    turned[0x0112] = 8
    found = open_checked(encoded(scene, form, quality=95, exif=turned.tobytes()))
    assert difference(found, scene.transpose(Image.Transpose.ROTATE_90)) < 8
    whole = encoded(scene, form)
    assert claimed_size(whole) == SIZE
    for end in (40, len(whole) // 2, len(whole) - 20):
        with pytest.raises(BadImage, match="no whole|cannot decode") as caught:
            open_checked(whole[:end])
        assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("kept", [1.0, 0.8])
def test_a_photo_with_a_second_view_is_its_first(scene, kept):
    """The second view may be torn: nothing is made of it."""
    data = encoded(scene, "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", SIZE)])
    assert difference(open_checked(data[: int(len(data) * kept)]), scene) < 4


@pytest.mark.parametrize("color", [(220, 30, 30), (30, 160, 60), (250, 250, 240)])
@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_keeps_its_colors(form, color):
    plain = Image.new("RGB", SIZE, color)
    found = open_checked(encoded(plain.convert("CMYK"), form))
    assert difference(found, plain) < 4


def others():
    """Return the formats that Pillow writes and we do not read."""
    Image.init()
    same = {"JPEG", "PNG", "MPO", "DIB", "GIF", "JFIF", *formats.FORMATS}
    return sorted(set(Image.SAVE) - same)


def test_targa_which_has_no_magic_is_told_from_an_icon(scene):
    for mode in ("RGB", "RGBA", "L", "P", "1"):
        for packing in (None, "tga_rle"):
            if (mode, packing) == ("1", "tga_rle"):
                continue
            data = encoded(scene.convert(mode), "TGA", compression=packing)
            assert formats.name_of_other(data) == "a Targa picture", (mode, packing)
    icon = encoded(scene, "ICO")
    assert formats.name_of_other(icon) == "an icon"
    # a cursor differs by its kind
    assert formats.name_of_other(icon[:2] + b"\2" + icon[3:]) == "an icon"
    for other in (bytes(64), b"\0\0\1\0" + bytes(60), b"\0" + bytes(range(40))):
        assert formats.name_of_other(other) is None


def test_files_of_every_other_format_are_named_without_addresses(scene):
    named = {}
    written = {}
    for form in others():
        with contextlib.suppress(Exception):  # of one that does not write pictures like this
            written[form] = encoded(scene, form)
    for form, data in written.items():
        with pytest.raises(BadImage) as caught:
            open_checked(data)
        assert " at 0x" not in str(caught.value) and len(str(caught.value)) < 300
        named[form] = caught.value.reason
    assert {named[form] for form in ("JPEG2000", "ICO", "PDF", "ICNS")} == {"unread format"}
    assert len(named) > 8


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
        (b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg></svg>", "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "a gzip file"),
        (b"", "it is empty"),
        (bytes(5000), "nothing but zeros"),
    ],
)
def test_what_a_download_left_instead_of_a_picture_is_said(tmp_path, content, told):
    path = tmp_path / "some.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=rf"some\.jpg is no whole .* {told}"):
        open_checked(path)


def test_a_png_text_is_dropped_only_when_it_is_long(scene):
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "short", zip=True)
    data = encoded(scene, "PNG", pnginfo=info)
    assert formats.without_long_texts(data) == data
    assert formats.without_long_texts(encoded(scene, "JPEG")) == encoded(scene, "JPEG")
