"""The same photo, compressed or resized anew, is never on both sides of a test; photos that only
resemble each other are left alone."""

import io
import itertools

import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from small_tasks import entry, jsonl, prepared, write_rows

from pipeline.config.task_data import ImageLimitsConfig
from pipeline.data.images import near_duplicates
from pipeline.data.images.near_duplicates import Looks, look, near_hashes
from pipeline.errors import DataError

LIMITS = ImageLimitsConfig(min_pixels=1024, max_pixels=65_536)


def photos():
    """Return parts of three photographs."""
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        whole.append(Image.open(file).convert("RGB"))
    parts = []
    for photo in whole:
        wide, high = photo.width * 2 // 3, photo.height * 2 // 3
        for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
            left, top = x * photo.width // 3, y * photo.height // 3
            parts.append(photo.crop((left, top, left + wide, top + high)))
    return parts


def form(number):
    """Return a page that differs from others of its form in six numbers."""
    page = Image.new("RGB", (600, 800), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=20)
    own = np.random.default_rng(number).integers(0, 10, (6, 8))
    for line in range(24):
        text = "".join(map(str, own[line // 4])) if line % 4 == 0 else "name of a field " * 3
        pen.text((40, 40 + 28 * line), text, font=font, fill="black")
    return page


def again(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return Image.open(out).convert("RGB")


def smaller(image, share):
    size = (round(image.width * share), round(image.height * share))
    return image.resize(size, Image.Resampling.LANCZOS)


COPIES = {
    "JPEG 90": lambda image: again(image, "JPEG", quality=90),
    "JPEG 50": lambda image: again(image, "JPEG", quality=50),
    "WebP": lambda image: again(image, "WEBP", quality=70),
    "three quarters": lambda image: smaller(image, 0.75),
    "half, JPEG": lambda image: again(smaller(image, 0.5), "JPEG", quality=80),
    "larger": lambda image: smaller(image, 1.4),
    "bilinear": lambda image: image.resize((300, 200), Image.Resampling.BILINEAR),
}


@pytest.fixture(scope="module")
def pictures():
    return [*(form(i) for i in range(4)), *photos()]


def pairs(tmp_path, images):
    looks = Looks(tmp_path / "looks")
    for i, image in enumerate(images):
        looks.add(str(i), look(image))
    return {frozenset(map(int, pair)) for pair in looks.pairs()}


@pytest.mark.parametrize("kind", COPIES)
def test_every_copy_is_found_and_nothing_else(tmp_path, pictures, kind):
    copies = [COPIES[kind](image) for image in pictures]
    count = len(pictures)
    assert pairs(tmp_path, pictures + copies) == {frozenset((i, i + count)) for i in range(count)}


FEW = slice(2, 10)  # of the pictures: two forms and six photos


def rows_of(folder, pictures, copy, stated):
    """Write pictures of every split and copies of the first two, which `stated` puts in test."""
    folder.mkdir()
    rows = []
    for i, image in enumerate(pictures[FEW]):
        image.save(folder / f"{i}.png")
        split = ("train", "train", "valid", "test")[i % 4] if stated else None
        rows.append({"id": f"r{i}", "image": f"{i}.png", "prompt": "p", "answer": f"{i}"})
        rows[-1] |= {"split": split}
        if i < 2:
            copy(image).save(folder / f"{i}c.png")
            rows.append(rows[-1] | {"id": f"c{i}", "image": f"{i}c.png"})
            rows[-1] |= {"split": "test" if stated else None}
    return write_rows(folder / "rows.jsonl", rows)


@pytest.mark.parametrize("kind", ["JPEG 50", "half, JPEG"])
def test_copies_are_in_one_split_or_dropped_from_the_laxer_or_told(tmp_path, pictures, kind):
    path = rows_of(tmp_path / "data", pictures, COPIES[kind], stated=True)
    with pytest.raises(
        DataError, match=r"2 picture nearly as in test .*set near_duplicates to keep"
    ):
        prepared(tmp_path, entry(jsonl(path)), "strict", image=LIMITS)
    loose = jsonl(path, max_bad_share=0.3)
    _, found, report = prepared(tmp_path, entry(loose), "drop", image=LIMITS)
    assert report["dropped"] == {"picture nearly as in test": 2} and {"c0", "c1"} <= set(found)
    assert report["examples"]["picture nearly as in test"][0].endswith("nearly that of c0")
    assert report["near_duplicates"]["pairs"] == 2 and not (tmp_path / "drop/looks.part").exists()
    kept = jsonl(path, near_duplicates="keep")
    _, found, report = prepared(tmp_path, entry(kept), "keep", image=LIMITS)
    assert len(found) == 10 and report["near_duplicates"]["examples"] == ["r0 and c0", "r1 and c1"]
    assert any("2 pairs of pictures in two splits" in line for line in report["warnings"])
    unasked = jsonl(path, near_duplicates="off")
    assert len(prepared(tmp_path, entry(unasked), "off", image=LIMITS)[1]) == 10


@pytest.mark.parametrize("seed", range(3))
def test_a_source_without_splits_loses_nothing(tmp_path, pictures, seed):
    path = rows_of(tmp_path / "data", pictures, COPIES["JPEG 50"], stated=False)
    given = jsonl(path, valid_share=0.3, test_share=0.3)
    _, found, report = prepared(tmp_path, entry(given), image=LIMITS, seed=seed)
    assert len(found) == 10 and report["dropped"] == {}
    for i in range(2):
        assert found[f"r{i}"].split == found[f"c{i}"].split


def test_equal_pixels_are_still_no_fault(tmp_path, pictures):
    path = rows_of(tmp_path / "data", pictures, lambda image: image, stated=True)
    _, _, report = prepared(tmp_path, entry(jsonl(path)), image=LIMITS)
    assert report["dropped"] == {"picture also in test": 2} and report["bad"] == 0


@pytest.mark.parametrize("count", [0, 1, 2, 700])
def test_near_hashes_are_those_of_every_pair(count):
    """Against the comparison of all of them with each other."""
    rng = np.random.default_rng(count)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for i in range(count // 2):
        flips = rng.choice(64, rng.integers(0, 9), replace=False)
        hashes[i] = hashes[count - 1 - i] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0)
        )
    wanted = set()
    for i, j in itertools.combinations(range(count), 2):
        if int(hashes[i] ^ hashes[j]).bit_count() <= near_duplicates.MAX_BITS:
            wanted.add((i, j))
    assert {tuple(pair) for pair in near_hashes(hashes).tolist()} == wanted


def test_many_equal_pictures_are_joined_without_every_pair():
    found = near_hashes(np.zeros(5000, np.uint64))
    assert len(found) < 5000 * 20
    reached = {0}
    for i, j in sorted(found.tolist()):
        if i in reached:
            reached.add(j)
    assert len(reached) == 5000
