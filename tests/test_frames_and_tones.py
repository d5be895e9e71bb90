"""Files with several pictures are not taken for one, and grey of more than eight bits is seen as it
was meant."""

import io
import random

import numpy as np
import pytest
from PIL import Image
from small_tasks import Source, entry, jsonl, picture, prepared, simple

from pipeline.data.images.images import BadImage, open_checked
from pipeline.errors import DataError

ANIMATED = ["GIF", "PNG", "WEBP", "TIFF", "AVIF"]


def several(kind, count=3, **options):
    out = io.BytesIO()
    first, *others = [picture(seed, (64, 48)) for seed in range(count)]
    first.save(out, kind, save_all=True, append_images=others, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ANIMATED)
@pytest.mark.parametrize("count", [2, 5])
def test_an_animation_or_a_document_is_not_its_first_page(kind, count):
    content = several(kind, count)
    with pytest.raises(BadImage, match="several frames or pages") as error:
        open_checked(content)
    assert error.value.reason == "several pictures in a file"
    first = open_checked(content, first_frame=True)
    assert first.size == (64, 48)
    # Lossy formats blur noise, and palettes merge it, to what is still nearer to its own frame.
    own, other = (picture(seed, (64, 48)) for seed in (0, 1))
    assert distance(first, own) < 0.7 * distance(first, other)


def distance(one, another):
    return np.abs(np.asarray(one).astype(int) - np.asarray(another)).mean()


@pytest.mark.parametrize("kind", [*ANIMATED, "JPEG", "BMP", "PPM"])
def test_one_picture_is_one_picture(kind):
    options = {"save_all": True} if kind in ANIMATED else {}
    out = io.BytesIO()
    picture(0).save(out, kind, **options)
    assert open_checked(out.getvalue()).size == (40, 40)


def test_views_and_previews_of_one_moment_are_one_picture():
    assert open_checked(several("MPO")).size == (64, 48)
    held = io.BytesIO()
    page = picture(0, (64, 48))
    smaller = page.resize((16, 12))
    # 254 is TIFF's note that a page is another one made smaller
    smaller.encoderinfo = {"tiffinfo": {254: 1}}
    page.save(held, "TIFF", save_all=True, append_images=[smaller])
    assert open_checked(held.getvalue()).size == (64, 48)
    held = io.BytesIO()
    page.save(held, "TIFF", save_all=True, append_images=[page.resize((16, 12))])
    with pytest.raises(BadImage, match="several"):
        open_checked(held.getvalue())


def test_rows_with_several_frames_are_counted_and_the_setting_is_named(tmp_path):
    source = Source(tmp_path / "data")
    rows = simple(20)
    path = source(rows)
    for i in range(6):
        first, *others = [picture(10 * i + k) for k in range(3)]
        file = tmp_path / "data" / rows[i]["image"]
        first.save(file, "GIF", save_all=True, append_images=others)
    with pytest.raises(DataError, match=r"6 several pictures in a file .*dataset\.frames to first"):
        prepared(tmp_path, entry(jsonl(path)))
    _, found, report = prepared(tmp_path, entry(jsonl(path, frames="first")), "first")
    assert len(found) == 20 and report["dropped"] == {}


def deep(values, kind, mode):
    """Return a file of grey values; every Pillow that writes it is theirs."""
    out = io.BytesIO()
    if mode == "F":
        image = Image.fromarray(values.astype(np.float32), "F")
    elif mode == "I":
        image = Image.fromarray(values.astype(np.int32), "I")
    else:
        image = Image.fromarray(values.astype(np.uint16))
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I")])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_of_any_depth_is_seen_from_black_to_white(kind, mode, bits):
    ramp_HW = np.linspace(0, (1 << bits) - 1, 256).round()[None].repeat(20, 0)
    seen = np.asarray(open_checked(deep(ramp_HW, kind, mode)))[:, :, 0]
    wanted = np.arange(256)[None].repeat(20, 0)
    assert np.abs(seen.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("most", [1.0, 255.0, 4095.0])
def test_fractions_and_floats_are_seen_too(most):
    ramp_HW = np.linspace(0, most, 256)[None].repeat(20, 0)
    seen = np.asarray(open_checked(deep(ramp_HW, "TIFF", "F")))[:, :, 0]
    assert np.abs(seen.astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("seed", range(4))
def test_values_that_are_no_tones_are_refused_in_a_sentence(seed):
    draw = random.Random(seed)
    values_HW = np.full((20, 30), 7.0)
    strange = [-1.0, 70_000.0, float("nan"), float("inf")][seed]
    values_HW[draw.randrange(20), draw.randrange(30)] = strange
    with pytest.raises(BadImage, match="its values reach from .* is read") as error:
        open_checked(deep(values_HW, "TIFF", "F"))
    assert error.value.reason == "unread tones"
