"""What stands beside pictures under the name of a text: formats of boxes are read as boxes, files
of other kinds are refused, and a text is a text."""

import json
import random

import pytest
from small_tasks import entry, picture, prepared

from pipeline.data.sources import SkippedRow, sidecars
from pipeline.errors import DataError

SIZE = (200, 120)
WORDS = ["SHOP", "No 3", "TOTAL, 9.00", '"Tea"', "12", "קפה", "3,50 EUR"]
KINDS = ["car", "small-vehicle", "cup"]


def written(draw, form):
    """Return a file of a format of boxes, and its boxes as [x0, y0, x1, y1] with text or label."""
    lines, boxes = [], []
    for row in range(draw.randrange(1, 5)):
        x0, y0 = draw.randrange(0, 60), 25 * row
        x1, y1 = x0 + draw.randrange(20, 100), y0 + 20
        said = draw.choice(KINDS if form in ("dota", "yolo") else WORDS)
        corners = [x0, y0, x1, y0, x1, y1, x0, y1]
        if form == "icdar2015":
            line = ",".join(map(str, [*corners, said]))
        elif form == "with blanks":
            line = ", ".join(map(str, [*corners, said]))
        elif form == "icdar2013":
            said = said if not said[0].isdigit() else "Ltd"
            line = f'{x0}, {y0}, {x1}, {y1}, "{said}"'.replace('""', '"')
            said = said.strip('"')
        elif form == "icdar2013 train":
            said = said.strip('"')
            line = f'{x0} {y0} {x1} {y1} "{said}"'
        elif form == "dota":
            line = " ".join(map(str, [*map(float, corners), said, 0]))
        else:
            middle = [(x0 + x1) / 2 / SIZE[0], (y0 + y1) / 2 / SIZE[1]]
            size = [(x1 - x0) / SIZE[0], (y1 - y0) / SIZE[1]]
            sure = [0.93] if form == "yolo with confidence" else []
            said = draw.choice(KINDS)
            line = " ".join(map(str, [KINDS.index(said), *middle, *size, *sure]))
        lines.append(line)
        boxes.append(([x0, y0, x1, y1], said))
    return draw.choice(["\n", "\r\n"]).join(lines) + draw.choice(["", "\n"]), boxes


FORMS = ["icdar2015", "with blanks", "icdar2013", "icdar2013 train", "dota", "yolo"]


@pytest.mark.parametrize("form", [*FORMS, "yolo with confidence"])
@pytest.mark.parametrize("ocr", [True, False])
def test_formats_of_boxes_become_boxes(tmp_path, form, ocr):
    draw = random.Random(form)
    folder = tmp_path / "data"
    folder.mkdir()
    wanted = {}
    for i in range(12):
        picture(i, SIZE).save(folder / f"{i}.jpg")
        text, wanted[f"{i}.jpg"] = written(draw, form)
        (folder / f"{i}.txt").write_text(text, encoding="utf-8-sig" if i % 2 else "utf-8")
    data = {"source": "folder", "path": str(folder), "ocr": ocr, "class_names": KINDS}
    if "yolo" in form:
        data["box_units"] = "fractions"
    reads = ocr and form not in ("dota", "yolo", "yolo with confidence")
    task = entry(data, prompt="Read.", answer="{text}" if reads else "{boxes_json}")
    _, found, _ = prepared(tmp_path, task)
    for name, boxes in wanted.items():
        answer = found[name].answer
        if reads:
            assert answer == "\n".join(said for _, said in boxes)
            continue
        assert [box["label"] for box in json.loads(answer)] == [said for _, said in boxes]
        for box, (corners, _) in zip(json.loads(answer), boxes, strict=True):
            scale = [1000 / SIZE[0], 1000 / SIZE[1]] * 2
            expected = [round(c * s) for c, s in zip(corners, scale, strict=True)]
            assert max(abs(a - b) for a, b in zip(box["bbox_2d"], expected, strict=True)) <= 1


@pytest.mark.parametrize(
    "text",
    [
        "SHOP\nTOTAL 9.00",
        "12, 10, 120",
        "1 2 3 4\n5 6 7 8",
        "3",
        "At 10, 20, 30 and 40 the bell rang",
        '{"total": "9.00", "date": "2020-01-02"}',
        "<table><tr><td>1</td></tr></table>",
        "1,000,000\n2,000,000",
        "10, 20, 30, 40",
    ],
)
def test_a_text_is_an_answer(text):
    assert sidecars.columns("x.txt", text) == {"answer": text}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('<?xml version="1.0"?><annotation/>', "XML"),
        ("<annotation><object/></annotation>", "XML"),
        ('<!DOCTYPE html><div class="ocr_page">x</div>', "hOCR"),
        ("{\\rtf1 a}", "rich text"),
        ("level\tpage_num\tblock_num\ttext\n1\t1\t0\tx", "Tesseract"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS"),
        ("\x89PNG\x00\x00", "no text"),
        ("1,1,2,1,2,2,1,2,a\n" * 9 + "SHOP", "'SHOP' is not written as its other 9 lines"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(text, said):
    found = sidecars.columns("x.txt", text)
    assert isinstance(found, SkippedRow) and said in found.detail and "x.txt" in found.detail


def test_fractions_have_to_be_declared(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(6):
        picture(i, SIZE).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    task = entry({"source": "folder", "path": str(folder)}, prompt="Find.", answer="{boxes_json}")
    with pytest.raises(DataError, match="box_units to fractions"):
        prepared(tmp_path, task)


def test_numbers_alone_are_said_to_look_like_coordinates(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(12):
        picture(i, SIZE).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{i} 20 30 40\n{i} 21 31 41\n")
    report = prepared(tmp_path, entry({"source": "folder", "path": str(folder)}, prompt="Read."))[2]
    assert any("numbers alone" in warning for warning in report["warnings"])
