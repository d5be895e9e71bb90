"""Pictures against numpy, zlib and the EXIF table, and against everything that a hostile file can
be."""

import hashlib
import io
import os
import struct
import zlib
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.data.images import images
from pipeline.data.images.images import BadImage, open_checked, resized
from pipeline.errors import DataError


def grain(width, height, seed=0):
    """Return random RGB pixels (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_header(width, height):
    """Return a PNG that only claims a size: a few bytes."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


# what must be done to the stored rows and columns to see the picture upright: EXIF 2.3, tag 0x0112
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_comes_out_upright(orientation):
    stored, exif = grain(7, 4), Image.Exif()
    exif[0x0112] = orientation
    found = open_checked(encoded(Image.fromarray(stored), exif=exif))
    np.testing.assert_array_equal(np.asarray(found), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_what_is_cut_from_an_upright_picture_is_not_turned_again(tmp_path, form, orientation):
    """As the regions of a photo that a phone took: each goes through the same checks."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = open_checked(encoded(Image.fromarray(grain(70, 40)), form, exif=exif))
    cut = whole.crop((5, 5, 35, 15))
    stored = images.store(cut, tmp_path, 1, 10_000)
    with Image.open(tmp_path / stored.name) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(cut))


def test_a_file_has_the_same_bytes_whatever_its_source_said_beside_the_pixels(tmp_path):
    plain = Image.fromarray(grain(40, 40))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = []
    for i, more in enumerate(({}, {"icc_profile": profile}, {"dpi": (300, 300)})):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        stored = images.store(encoded(plain, **more), folder, 1, 10_000)
        files.append((folder / stored.name).read_bytes())
    assert len(set(files)) == 1


def test_a_name_in_another_case_is_told_and_a_folder_is_listed_once(tmp_path, monkeypatch):
    for i in range(30):
        Image.fromarray(grain(4, 4)).save(tmp_path / f"Scan{i}.PNG")
    listed = []
    monkeypatch.setattr(
        images.os, "scandir", lambda path, scandir=os.scandir: listed.append(path) or scandir(path)
    )
    for i in range(30):
        with pytest.raises(BadImage, match=f"scan{i}.png does not exist, Scan{i}.PNG does: upper"):
            open_checked(f"scan{i}.png", tmp_path)
    with pytest.raises(BadImage, match="other/a.png does not exist$"):
        open_checked("other/a.png", tmp_path)
    assert listed.count(tmp_path) == 1


def test_accents_written_otherwise_are_told_and_a_name_is_not_its_own_other_spelling(tmp_path):
    """As a Mac writes them; of a link that leads nowhere it was said that its name is in capitals
    elsewhere."""
    Image.fromarray(grain(4, 4)).save(tmp_path / normalize("NFD", "caf\u00e9.png"))
    with pytest.raises(BadImage, match="does not exist; a name that looks the same does"):
        open_checked("caf\u00e9.png", tmp_path)
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "folder.png").mkdir()
    for name, fault in (("gone.png", "does not exist"), ("folder.png", "is not a file")):
        with pytest.raises(BadImage, match=f"{name} {fault}$"):
            open_checked(name, tmp_path)


def test_a_picture_that_is_there_is_not_encoded_again(tmp_path, monkeypatch):
    """As in rows that hold their picture's bytes, one for each question about it."""
    data = encoded(Image.fromarray(grain(40, 40)))
    first = images.store(data, tmp_path, 1, 10_000)
    monkeypatch.setattr(images, "png", lambda image: pytest.fail("encoded again"))
    assert images.store(data, tmp_path, 1, 10_000) == first


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (9, 9, 9, 0), (255, 255, 255)),  # nothing is seen of it: white
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 0x8000, (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb_as_it_is_seen(mode, pixel, expected):
    found = open_checked(encoded(Image.new(mode, (3, 2), pixel), "PNG"))
    assert found.mode == "RGB" and found.size == (3, 2) and found.getpixel((1, 1)) == expected


def test_a_transparent_palette_is_seen_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    found = open_checked(encoded(image, transparency=0))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_one_picture_in_four_formats_has_one_digest_and_another_size_has_not():
    pixels = grain(6, 5)
    image = Image.fromarray(pixels)
    found = {
        images.digest(open_checked(encoded(image, form))) for form in ("PNG", "BMP", "TIFF", "PPM")
    }
    assert found == {hashlib.sha256(b"RGB 6x5\n" + pixels.tobytes()).hexdigest()}
    assert (
        images.digest(Image.fromarray(pixels.reshape(6, 5, 3))) not in found
    )  # the same bytes, turned


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_torn_file_is_refused_wherever_it_is_torn(form):
    whole = encoded(Image.fromarray(grain(40, 30)), form)
    assert open_checked(whole).size == (40, 30)
    for end in [0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) * 9 // 10]:
        with pytest.raises(DataError, match="corrupt picture|no whole") as caught:
            open_checked(whole[:end])
        assert caught.value.reason == "corrupt picture"


def test_changed_bytes_of_a_png_are_noticed():
    whole = bytearray(encoded(Image.fromarray(grain(40, 30))))
    for place in range(50, len(whole) - 12, 301):
        changed = whole.copy()
        changed[place] ^= 0x40
        with pytest.raises(BadImage):
            open_checked(bytes(changed))


@pytest.mark.parametrize(
    "content", [b"", b"hello, not a picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_what_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "some.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"some\.png is no whole PNG, JPEG"):
        open_checked(path)


# over our own limit; over the one that Pillow warns at; over the one that it raises at
@pytest.mark.parametrize("side", [8_100, 10_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(BadImage, match="at most 64000000 square px are decoded. Make it") as caught:
        open_checked(png_header(side, side))
    assert caught.value.reason == "too large a picture"


def test_the_limit_is_the_callers():
    data = encoded(Image.new("RGB", (20, 10)))
    assert open_checked(data, max_pixels=200).size == (20, 10)
    with pytest.raises(BadImage, match="says it has 20 x 10 px; at most 199"):
        open_checked(data, max_pixels=199)


@pytest.fixture
def shelf(tmp_path):
    """A root with one picture in it, and one beside it."""
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(root / "below" / "in.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    (root / "leads_out.png").symlink_to(tmp_path / "out.png")
    (root / "leads_in.png").symlink_to(root / "below" / "in.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize("name", ["below/in.png", "leads_in.png", "below/../below/in.png"])
def test_paths_inside_their_root_are_opened(shelf, name):
    assert open_checked(name, shelf).size == (4, 4)
    assert open_checked(str(shelf / name), shelf).size == (4, 4)


@pytest.mark.parametrize(
    "name", ["../out.png", "below/../../out.png", "leads_out.png", "/etc/hostname"]
)
def test_paths_that_leave_their_root_are_refused(shelf, name):
    with pytest.raises(BadImage, match="leads out of the folder") as caught:
        open_checked(name, shelf)
    assert caught.value.reason == "path outside its root"


@pytest.mark.parametrize(
    "name", ["none.png", "below", "pipe.png", "loop.png", "nul\0.png", "x" * 300, ""]
)
def test_what_cannot_be_read_is_a_missing_picture_and_never_waited_for(shelf, name):
    with pytest.raises(BadImage) as caught:
        open_checked(name, shelf)
    assert caught.value.reason == "missing picture"


def test_a_huge_file_is_not_read(shelf, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 20)
    with pytest.raises(BadImage, match="at most 20 are read"):
        open_checked("below/in.png", shelf)


SIZES = [
    (64, 64),
    (100, 30),
    (1, 150),
    (3000, 2000),
    (4001, 37),
    (33, 31),
    (9999, 101),
    (2, 2),
    (640, 480),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [(4096, 16384), (65_536, 1_048_576), (50_000, 50_000)])
def test_the_area_is_within_its_limits_and_the_aspect_kept(size, limits):
    image = Image.new("RGB", size)
    found = resized(image, *limits)
    within = limits[0] <= size[0] * size[1] <= limits[1]
    assert (found is image) == within
    least, most = limits
    # sides are whole numbers, so the area may miss equal limits by one row and one column
    assert least - (sum(found.size) if least == most else 0) <= found.width * found.height <= most
    wanted = size[0] / size[1]
    assert found.width / found.height == pytest.approx(wanted, rel=1.5 / min(found.size))


def test_what_the_models_processor_does_afterwards_is_a_rounding():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for size in SIZES:
        found = resized(Image.new("RGB", size), 65_536, 1_048_576)
        high, wide = smart_resize(found.height, found.width, 32, 65_536, 1_048_576)
        assert (
            abs(wide - found.width) <= 32 + found.width // 16 and abs(high - found.height) <= 32
        ), size


@pytest.mark.parametrize("size", [(4001, 20), (1, 250), (30_000, 140)])
def test_a_picture_too_thin_for_the_model_is_refused(size):
    with pytest.raises(BadImage, match="no side may be over 200 times the other") as caught:
        resized(Image.new("RGB", size), 4096, 1_048_576)
    assert caught.value.reason == "too long and thin"


def test_a_jpeg_that_needs_no_change_is_stored_byte_for_byte(tmp_path):
    data = encoded(Image.fromarray(grain(80, 60)), "JPEG")
    stored = images.store(data, tmp_path, 1024, 10_000)
    assert (tmp_path / stored.name).read_bytes() == data and stored.name.endswith(".jpg")
    assert (stored.width_px, stored.height_px, stored.resized) == (80, 60, False)
    assert stored.name == f"{stored.digest[:16]}.jpg"


def test_a_turned_or_large_jpeg_is_stored_upright_and_fitted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = images.store(
        encoded(Image.fromarray(grain(80, 60)), "JPEG", exif=exif), tmp_path, 1024, 10_000
    )
    assert turned.name.endswith(".png") and (turned.width_px, turned.height_px) == (60, 80)
    with Image.open(tmp_path / turned.name) as image:
        assert image.size == (60, 80) and not image.getexif()
    large = images.store(encoded(Image.fromarray(grain(80, 60)), "JPEG"), tmp_path, 1024, 1200)
    with Image.open(tmp_path / large.name) as image:
        assert (
            image.size == (40, 30)
            and large.resized
            and (large.width_px, large.height_px) == (80, 60)
        )


def test_storing_twice_writes_the_same_one_file(tmp_path):
    image = Image.fromarray(grain(50, 50))
    first = images.store(encoded(image), tmp_path, 1024, 10_000)
    content = (tmp_path / first.name).read_bytes()
    second = images.store(encoded(image, "BMP"), tmp_path, 1024, 10_000)
    assert first == second and [file.name for file in tmp_path.iterdir()] == [first.name]
    assert (tmp_path / first.name).read_bytes() == content == images.png(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
def test_a_decoded_picture_is_stored_as_its_file_would_be(tmp_path, mode):
    pixels = Image.fromarray(grain(50, 40))
    image = pixels.convert(mode) if mode != "I;16" else pixels.convert("I").convert(mode)
    if mode == "RGBA":
        image.putalpha(100)
    form = "TIFF" if mode == "CMYK" else "PNG"
    stored = [
        images.store(each, tmp_path / name, 1024, 1200)
        for name, each in stores(tmp_path, image, form)
    ]
    assert stored[0] == stored[1] and stored[0].resized
    assert (tmp_path / "a" / stored[0].name).read_bytes() == (
        tmp_path / "b" / stored[0].name
    ).read_bytes()


def stores(folder, image, form):
    for name, each in (("a", encoded(image, form)), ("b", image)):
        (folder / name).mkdir()
        yield name, each


def test_a_decoded_picture_is_turned_and_checked_and_left_as_it_was(tmp_path):
    image = Image.open(io.BytesIO(encoded(Image.fromarray(grain(7, 4)), "JPEG", exif=turned())))
    found = open_checked(image)
    assert found.size == (4, 7) and found is not image and image.size == (7, 4)
    with pytest.raises(BadImage, match="7 x 4 px; at most 20 square px") as caught:
        open_checked(image, max_pixels=20)
    assert caught.value.reason == "too large a picture"


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
