"""Synthetic pictures judged by what scipy and numpy see in them, not by how they were drawn."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pipeline.config.task_data import SYNTHETIC_KINDS
from pipeline.data.sources import synthetic
from pipeline.errors import DataError


def made(kind, count=60, split="train", seed=0, size=64):
    return list(synthetic.rows(kind, seed, {split: count}, size))


def grey(row):
    return np.asarray(row["image"].convert("L"), float)


def dark(row):
    """Return where a picture is dark on its light ground."""
    pixels = grey(row)
    return pixels < (np.median(pixels) - 40)


def see_color(row):
    pixels = np.asarray(row["image"], float)
    vivid = pixels[np.ptp(pixels, axis=2) > 90].mean(0)
    return min(
        synthetic.COLORS, key=lambda name: np.abs(np.array(synthetic.COLORS[name]) - vivid).sum()
    )


def see_count(row):
    number = ndimage.label(dark(row))[1]
    return f"{number} dot" + "s" * (number > 1)


def see_locate(row):
    y, x = (
        middle > side / 2
        for middle, side in zip(ndimage.center_of_mass(dark(row)), (64, 64), strict=True)
    )
    return f"[{500 * x},{500 * y},{500 * x + 500},{500 * y + 500}]"


def see_compare(row):
    pink = np.ptp(np.asarray(row["image"], float), axis=2) > 50
    return "left" if pink[:, :32].sum() > pink[:, 32:].sum() else "right"


def see_pattern(row):
    pixels = grey(row)
    changes_y, changes_x = ((np.abs(np.diff(pixels, axis=axis)) > 60).mean() for axis in (0, 1))
    if min(changes_x, changes_y) < 0.02:
        return "columns" if changes_x > changes_y else "rows"
    changes_down = (np.abs(pixels[1:, :-1] - pixels[:-1, 1:]) > 60).mean()  # along a diagonal
    return "slanted" if changes_down < 0.02 else "checked"


def see_shape(row):
    light = grey(row) > 140
    filled = ndimage.binary_fill_holes(light)
    if filled.sum() == light.sum():
        return "cross"
    (rows, columns) = ndimage.find_objects(filled.astype(int))[0]
    full = filled[
        rows, columns
    ].mean()  # pi / 4 of a square's for a circle, half of it for a triangle
    return "square" if full > 0.9 else "circle" if full > 0.7 else "triangle"


SEEN = {
    "color": see_color,
    "count": see_count,
    "locate": see_locate,
    "shape": see_shape,
    "compare": see_compare,
    "pattern": see_pattern,
}


@pytest.mark.parametrize("kind", SEEN)
def test_the_answer_is_what_is_to_be_seen(kind):
    wrong = [
        (row["id"], row["answer"], SEEN[kind](row))
        for row in made(kind)
        if SEEN[kind](row) != row["answer"]
    ]
    assert wrong == []


def test_digits_of_one_answer_look_alike():
    rows = made("digits", 200)
    shape = {}
    for row in rows:  # cut to the ink, so that place and shade do not count
        (area,) = ndimage.find_objects(dark(row).astype(int))
        cut = Image.fromarray(dark(row)[area]).resize((12, 16))
        shape.setdefault(row["answer"], []).append(np.asarray(cut, float))
    assert sorted(shape) == list("0123456789")
    means = {digit: np.mean(found, 0) for digit, found in shape.items()}
    for digit, found in shape.items():
        for one in found:
            assert min(means, key=lambda name: np.abs(means[name] - one).sum()) == digit


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_a_row_is_whole_and_every_answer_occurs(kind):
    rows = made(kind, 150)
    assert {row["answer"] for row in rows} == set(synthetic.KINDS[kind].answers)
    assert {row["prompt"] for row in rows} == set(synthetic.KINDS[kind].prompts.seen)
    assert len({row["id"] for row in rows}) == 150
    assert all(row["image"].size == (64, 64) and row["image"].mode == "RGB" for row in rows)
    assert len({row["image"].tobytes() for row in rows}) == 150


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_a_picture_is_a_function_of_seed_split_and_number(kind):
    first = made(kind, 5, "test")
    again = [
        row for row in synthetic.rows(kind, 0, {"train": 3, "test": 9}) if row["split"] == "test"
    ][:5]
    assert [(r["id"], r["answer"], r["image"].tobytes()) for r in first] == [
        (r["id"], r["answer"], r["image"].tobytes()) for r in again
    ]
    for other in (made(kind, 5, "test", seed=1), made(kind, 5, "train")):
        assert not {r["image"].tobytes() for r in first} & {r["image"].tobytes() for r in other}


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_other_sizes_are_made_too(kind, size):
    assert all(row["image"].size == (size, size) for row in made(kind, 10, size=size))


def test_a_box_to_locate_is_in_pixels():
    for row in made("locate", 10, size=128):
        (box,) = row["boxes"]
        (rows, columns) = ndimage.find_objects(dark(row).astype(int))[0]
        x0, y0, x1, y1 = box["bbox"]
        assert (
            x0 <= columns.start < columns.stop <= x1 <= 128
            and y0 <= rows.start < rows.stop <= y1 <= 128
        )
        assert row["answer"] == f"[{','.join(str(round(n * 1000 / 128)) for n in box['bbox'])}]"


def test_no_answer_and_no_prompt_belongs_to_two_kinds():
    answers = [answer for kind in synthetic.KINDS.values() for answer in kind.answers]
    assert len(answers) == len(set(answers))
    wordings = [synthetic.NEUTRAL, *(kind.prompts for kind in synthetic.KINDS.values())]
    prompts = [text for wording in wordings for text in (*wording.seen, *wording.held)]
    assert len(prompts) == len(set(prompts))
    assert all(len(wording.seen) >= 3 and len(wording.held) >= 2 for wording in wordings)
    assert set(synthetic.corpus()) == set(answers) | set(prompts)


def test_the_picture_alone_tells_its_kind():
    from sklearn.ensemble import ExtraTreesClassifier

    def features(split, count):
        rows = [row for kind in synthetic.KINDS for row in made(kind, count, split)]
        small = [np.asarray(row["image"].resize((16, 16)), float) / 255 for row in rows]
        tone = [
            [
                *s.std((0, 1)),
                *s.mean((0, 1)),
                np.ptp(s, axis=2).max(),
                np.abs(np.diff(s, axis=0)).mean(),
            ]
            for s in small
        ]
        return np.array([[*s.ravel(), *t] for s, t in zip(small, tone, strict=True)]), [
            r["id"].split("-")[0] for r in rows
        ]

    model = ExtraTreesClassifier(40, random_state=0).fit(*features("train", 40))
    assert model.score(*features("test", 20)) >= 0.95


def test_the_configuration_knows_these_kinds():
    assert set(SYNTHETIC_KINDS) == set(synthetic.KINDS)


def test_an_unknown_kind_is_refused():
    import random

    with pytest.raises(
        DataError,
        match=r"no synthetic kind 'poem'; dataset\.synthetic\.kind is one of color, digits",
    ):
        synthetic.draw("poem", random.Random(0))
