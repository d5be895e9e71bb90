"""The crop generator against pages whose text and places are known, and its output against
preprocess."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from pipeline.config.task_data import ImageLimitsConfig
from pipeline.data.images import contact_sheet, images, text_regions
from pipeline.data.tasks import prepare
from pipeline.families.adapters.sections import AdapterExpertConfig
from scripts.generate_ocr_crops import main

SCRIPT = Path(__file__).parent.parent / "scripts" / "generate_ocr_crops.py"
WORDS = [
    "TOTAL  12.00",
    "Receipt number 42",
    "thank you",
    "apples and pears",
    "cash",
    "change given",
    "open until ten",
]


def page(number, ink=20, ground=235, size=(420, 360)):
    """Return (image, [{bbox, text}]) of five printed lines and a ruled line."""
    rng = np.random.default_rng(number)
    noise = rng.normal(ground, 3, (size[1], size[0])).clip(0, 255).astype(np.uint8)
    image, boxes = Image.fromarray(noise).convert("RGB"), []
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=22)
    for i in range(5):
        text, x, y = f"{WORDS[(number + i) % len(WORDS)]} {i}", 15 + 20 * (i % 3), 20 + 60 * i
        pen.text((x, y), text, font=font, fill=(ink,) * 3)
        boxes.append({"bbox": list(pen.textbbox((x, y), text, font=font)), "text": text})
    pen.line([(5, 330), (size[0] - 5, 330)], fill=(ink,) * 3, width=2)
    return image, boxes


@pytest.fixture
def pages(tmp_path):
    """JSON lines of nine pages with boxes, two questions about each."""
    (tmp_path / "pages/img").mkdir(parents=True)
    rows = []
    for i in range(9):
        image, boxes = page(i)
        image.save(tmp_path / f"pages/img/{i}.png")
        rows.append(
            {
                "id": f"p{i}-total",
                "image": f"img/{i}.png",
                "prompt": "total?",
                "answer": "12.00",
                "boxes": [],
            }
        )
        rows.append(
            {"id": f"p{i}", "image": f"img/{i}.png", "boxes": boxes, "width": 420, "height": 360}
        )
    path = tmp_path / "pages/rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def crops(folder, name="crops.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def run(*words):
    return main([str(word) for word in words])


def test_given_boxes_become_crops_with_their_transcripts(tmp_path, pages, capsys):
    assert run(pages, tmp_path / "out", "--padding", 0) == 0
    rows = crops(tmp_path / "out")
    assert len(rows) == 45 and "45 crops of 9 images" in capsys.readouterr().out
    _, boxes = page(3)
    (row,) = [row for row in rows if row["id"] == "p3/2"]
    assert row["answer"] == boxes[2]["text"] and row["from"]["image"] == "img/3.png"
    x0, y0, x1, y1 = boxes[2]["bbox"]
    expected = np.asarray(page(3)[0])[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / row["image"])), expected)
    assert (row["height"], row["width"]) == expected.shape[:2]


def test_preprocess_reads_what_comes_out_and_keeps_a_page_in_one_split(tmp_path, pages):
    run(pages, tmp_path / "out", "--size", 32)
    data = {"source": "jsonl", "path": str(tmp_path / "out/crops.jsonl"), "ocr": True}
    # The same words on two pages look alike, and join their pages.
    data["near_duplicates"] = "off"
    task = AdapterExpertConfig(name="ocr", label="A", dataset=data, metric="cer")
    metrics = prepare.prepare(
        task, ImageLimitsConfig(min_pixels=4096, max_pixels=65_536), 0, tmp_path / "rows"
    )
    assert (
        sum(metrics["rows"].values()) == 45 and metrics["groups"] == 9 and metrics["dropped"] == {}
    )
    splits = {}
    for split in ("train", "valid", "test"):
        for row in prepare.TaskRows(tmp_path / "rows").rows(split):
            assert splits.setdefault(row.id.split("/")[0], split) == split


def test_lines_are_joined_to_blocks_of_the_wanted_size(tmp_path, pages):
    run(pages, tmp_path / "out", "--lines", 2, "--size", 40)
    rows = [row for row in crops(tmp_path / "out") if row["id"].startswith("p0/")]
    _, boxes = page(0)
    text = [" ".join(box["text"].split()) for box in boxes]
    assert [row["answer"] for row in rows] == [
        f"{text[0]}\n{text[1]}",
        f"{text[2]}\n{text[3]}",
        text[4],
    ]
    assert [row["height"] for row in rows] == [80, 80, 40]


def test_padding_is_a_share_of_a_line_and_ends_at_the_edge(tmp_path, pages):
    for padding in (0, 0.5):
        run(pages, tmp_path / f"{padding}", "--padding", padding)
    for bare, padded in zip(crops(tmp_path / "0"), crops(tmp_path / "0.5"), strict=True):
        x0, y0, x1, y1 = bare["from"]["bbox"]
        around = 0.5 * (y1 - y0)
        assert padded["height"] == pytest.approx(bare["height"] + 2 * around, abs=2)
        assert padded["width"] == pytest.approx(min(420, x1 + around) - max(0, x0 - around), abs=2)


def test_count_takes_those_with_most_text_in_reading_order(tmp_path, pages):
    run(pages, tmp_path / "most", "--count", 2)
    run(pages, tmp_path / "all")
    for i in range(9):
        every = [row["answer"] for row in crops(tmp_path / "all") if row["id"].startswith(f"p{i}/")]
        taken = [
            row["answer"] for row in crops(tmp_path / "most") if row["id"].startswith(f"p{i}/")
        ]
        assert sorted(map(len, taken)) == sorted(map(len, every))[-2:] and taken == [
            a for a in every if a in taken
        ]


def test_a_random_choice_is_the_seeds(tmp_path, pages):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(pages, tmp_path / name, "--count", 2, "--pick", "random", "--seed", seed)
    chosen = {name: [row["answer"] for row in crops(tmp_path / name)] for name in "abc"}
    assert chosen["a"] == chosen["b"] != chosen["c"]


def test_length_and_height_filter_and_say_what_they_dropped(tmp_path, pages):
    run(pages, tmp_path / "out", "--min-chars", 12, "--max-chars", 16)
    assert all(12 <= len(row["answer"]) <= 16 for row in crops(tmp_path / "out"))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (
        report["dropped"]["wrong length"] == 45 - report["crops"]
        and report["examples"]["wrong length"]
    )
    assert run(pages, tmp_path / "high", "--min-height", 100) == 2


def test_the_number_of_workers_changes_nothing(tmp_path, pages):
    for name, workers in (("one", 1), ("two", 2)):
        command = [
            sys.executable,
            SCRIPT,
            pages,
            tmp_path / name,
            "--by",
            "detector",
            "--workers",
            str(workers),
        ]
        subprocess.run(
            [*map(str, command), "--contact-sheet", str(tmp_path / f"{name}.png")], check=True
        )
    files = {
        p.relative_to(tmp_path / "one"): p.read_bytes() for p in (tmp_path / "one").rglob("*.*")
    }
    assert (
        len(files) > 40
        and (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    )
    assert files == {
        p.relative_to(tmp_path / "two"): p.read_bytes() for p in (tmp_path / "two").rglob("*.*")
    }


@pytest.mark.parametrize(("ink", "ground"), [(20, 235), (235, 30), (120, 190)])
@pytest.mark.parametrize("scale", [1, 4])
def test_the_detector_finds_every_line_and_nothing_else(ink, ground, scale):
    image, boxes = page(1, ink, ground)
    image = image.resize((image.width * scale, image.height * scale))
    found = [each.box for each in text_regions.find(image)]
    for box in boxes:
        x0, y0, x1, y1 = (scale * n for n in box["bbox"])
        over = [f for f in found if f.y0_px < (y0 + y1) / 2 < f.y1_px]
        covered = sum(min(f.x1_px, x1) - max(f.x0_px, x0) for f in over)
        assert covered > 0.9 * (x1 - x0), box
        assert all(f.height_px < 1.4 * (y1 - y0) for f in over)
    assert all(
        any(f.y1_px > scale * b["bbox"][1] and f.y0_px < scale * b["bbox"][3] for b in boxes)
        for f in found
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_detector_finds_no_text_where_there_is_none(seed):
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        (400, 300), Image.Resampling.BICUBIC
    )
    grain = Image.fromarray(rng.normal(128, 4, (300, 400)).clip(0, 255).astype(np.uint8))
    assert text_regions.find(smooth) == [] and text_regions.find(grain) == []
    assert (
        text_regions.find(Image.new("RGB", (300, 200), "white"))
        == []
        == text_regions.find(Image.new("RGB", (1, 1)))
    )


def test_detected_regions_take_the_text_of_boxes_inside_and_others_wait_for_a_hand(tmp_path, pages):
    run(pages, tmp_path / "out", "--by", "detector")
    _, boxes = page(2)
    found = [row["answer"] for row in crops(tmp_path / "out") if row["id"].startswith("p2/")]
    assert found == [" ".join(box["text"].split()) for box in boxes]
    run(pages.parent / "img", tmp_path / "bare", "--by", "detector")
    rows = crops(tmp_path / "bare", "untranscribed.jsonl")
    assert (
        len(rows) >= 45
        and not crops(tmp_path / "bare")
        and all(row["answer"] == "" for row in rows)
    )
    assert {row["group"] for row in rows} == {
        f"sha256:{images.digest(page(i)[0])}" for i in range(9)
    }


def test_a_folder_tells_of_what_it_cannot_read_and_passes_over_what_programs_left(tmp_path, pages):
    """A PDF among them was left out without a word, a Mac's ._ files were torn pictures."""
    folder = pages.parent / "img"
    (folder / "._0.png").write_bytes(b"of a Mac")
    (folder / "scan.pdf").write_bytes(b"%PDF-1.7")
    (folder / "0.psd").write_bytes(b"8BPS")
    assert run(folder, tmp_path / "out", "--by", "detector", "--max-bad-share", 0.5) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["images"] == 10 and report["dropped"] == {"unread format": 1}
    assert "scan.pdf" in str(report["examples"])


def test_bad_images_are_counted_and_the_rest_is_cut(tmp_path, pages, capsys):
    rows = [json.loads(line) for line in pages.read_text().splitlines()]
    rows[1] |= {"image": "../../secret.png"}
    rows[3] |= {"boxes": [{"bbox": [5, 5, 1, 1], "text": "x"}]}
    rows[5] |= {"width": 100, "height": 300}
    (pages.parent / "img/3.png").write_bytes(b"torn")
    pages.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(pages, tmp_path / "few") == 2
    assert "3 of 10 images of" in capsys.readouterr().err
    assert run(pages, tmp_path / "out", "--max-bad-share", 0.5) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["boxes"]["dropped"] == {"bad box": 1}
    assert report["dropped"] == {
        "bad box": 1,
        "corrupt picture": 1,
        "no boxes": 1,
        "path outside its root": 1,
    }
    assert (
        len(crops(tmp_path / "out")) == 25
        and "dropped: 1 bad box (rows.jsonl:4" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{torn", "1 not JSON"),
        ("[1]", "an object was wanted"),
        ('{"img": "x"}', "set --image-field"),
        ("", "has no image"),
    ],
)
def test_a_wrong_input_is_an_error_of_one_line(tmp_path, capsys, content, message):
    (tmp_path / "in.jsonl").write_text(content)
    assert run(tmp_path / "in.jsonl", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "bad",
    ["{torn", "[1]", '{"img": "x"}', '{"image": 3}', '{"image": "data:x"}', "\udcff"],
)
def test_one_bad_row_is_counted_and_the_rest_is_cut(tmp_path, pages, bad):
    lines = pages.read_text().splitlines()
    at = len(lines) // 2
    lines[at:at] = [bad]
    pages.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert run(pages, tmp_path / "out", "--max-bad-share", 0.1) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    ((reason, count),) = report["dropped"].items()
    assert count == 1 and report["images"] == 10 and report["crops"] == 45
    assert report["examples"][reason][0].startswith(f"rows.jsonl:{at + 1}: ")


@pytest.mark.parametrize("name", ["array.json", "wrapped.json"])
def test_other_files_of_rows_give_the_same_crops(tmp_path, pages, name):
    rows = [json.loads(line) for line in pages.read_text().splitlines()]
    for i, row in enumerate(rows):
        content = (pages.parent / row["image"]).read_bytes()
        if i % 2 and name == "array.json":
            row["boxes"] = json.dumps(row["boxes"])
        elif name == "wrapped.json":
            row["image"] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    whole = {"data": rows} if name == "wrapped.json" else rows
    (pages.parent / name).write_text(json.dumps(whole))
    assert run(pages.parent / name, tmp_path / "out") == run(pages, tmp_path / "same") == 0
    cut = [row["answer"] for row in crops(tmp_path / "out")]
    assert cut == [row["answer"] for row in crops(tmp_path / "same")]


def test_an_output_with_something_in_it_is_left_alone(tmp_path, pages, capsys):
    assert run(pages, pages.parent) == 2 and "is not an empty folder" in capsys.readouterr().err
    assert (
        run(tmp_path / "none.jsonl", tmp_path / "out") == 2
        and "cannot be read" in capsys.readouterr().err
    )


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "Examples:" in told and '"ocr": true' in told
    for option in ("--size", "--padding", "--count", "--lines", "--contact-sheet", "--by"):
        assert told.count(option) >= 1
    with pytest.raises(SystemExit):
        run("a", "b", "--size", "-3")


def test_a_contact_sheet_shows_crops_and_captions(tmp_path, pages):
    run(pages, tmp_path / "out", "--contact-sheet", tmp_path / "sheet.png", "--sheet-crops", 5)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert sheet.shape == (2 * 140, 4 * 320)
    assert (sheet[:110, :320] < 100).sum() > 200 and (sheet[125:140, :320] < 100).sum() > 40
    assert (sheet[145:, 330:] < 255).sum() == 0  # five crops: the second row has one


@pytest.mark.parametrize("text", ["W" * 60, "i" * 200, "short", "WW\nii " * 50])
def test_a_caption_stays_in_its_cell(tmp_path, text):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    sheet = np.asarray(contact_sheet.draw([(tmp_path / "a.png", text, text)] * 2).convert("L"))
    assert (sheet[112:138, 316:320] > 200).all() and (sheet[112:138, 4:300] < 100).any()
