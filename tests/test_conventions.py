"""Rows written for other models and by other tools: their marks, their lists and their gaps never
become what is learned, and what is strange about nearly all rows is said."""

import json
import math
import random
from decimal import Decimal

import pytest
from PIL import Image
from small_tasks import Source, entry, jsonl, picture, prepared, simple, write_rows
from spent import is_done_in

from pipeline.data.tasks.as_trained import told
from pipeline.data.tasks.markup import StrangePlaceholder, special_token, without_placeholders
from pipeline.data.tasks.right_answers import chosen, listed
from pipeline.data.tasks.templates import as_text
from pipeline.errors import DataError
from pipeline.families.adapters.sections import AdapterExpertConfig

# As model cards and conversion scripts write them, some with a number.
PLACEHOLDERS = [
    "<image>",
    "<image_{n}>",
    "<image {n}>",
    "<image{n}>",
    "<|image_{n}|>",
    "<|image|>",
    "<img>",
    "<img>pictures/{n}.jpg</img>",
    "Picture {n}: <img>pictures/{n}.jpg</img>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>",
    "<im_start><im_patch><im_patch><im_end>",
    "[IMG][IMG][IMG_BREAK][IMG][IMG_END]",
    "[image]",
    "<ImageHere>",
    "<image_placeholder>",
    "<start_of_image>",
    "<__media__>",
    "<IMG_CONTEXT><IMG_CONTEXT>",
    "<image/>",
    "<img src='{n}.png' alt='a cup'>",
    "<fake_token_around_image><image><fake_token_around_image>",
]
TEXTS = ["what is it?", "How many dots?\nAnswer with a number.", "Wo ist 3 < 4?", "读出文字。"]


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path / "data")


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_a_placeholder_at_either_end_says_nothing(placeholder):
    draw = random.Random(placeholder)
    for pictures in (1, 2, 3):
        for text in TEXTS:
            marks = [placeholder.format(n=n + 1) for n in range(pictures)]
            gap = draw.choice(["", " ", "\n"])
            run = gap.join(marks)
            if "[IMG]" in run or "IMG_CONTEXT" in run:
                run = "\n-\n".join(marks) if pictures > 1 else run  # side by side they are one
            if pictures > 1 and "\n-\n" in run:
                continue
            asked = draw.choice([f"{run}{gap}{text}", f"{text}\n{run}"])
            assert without_placeholders(asked, pictures) == (text, pictures), asked


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_one_inside_a_text_is_named_and_one_too_many_is_refused(placeholder):
    first, second = placeholder.format(n=1), placeholder.format(n=2)
    asked = f"Is {first} older than {second}?"
    assert without_placeholders(asked, 2)[0] == "Is image 1 older than image 2?"
    assert without_placeholders(f"Is {first} old?", 1)[0] == "Is the image old?"
    assert without_placeholders(f"Is this {first} old?", 1)[0] == "Is this image old?"
    for pictures in (0, 1):
        with pytest.raises(StrangePlaceholder, match=r"placeholder 2, and the row has"):
            without_placeholders(asked, pictures)


@pytest.mark.parametrize("unit", ["<image1>", "the <image1>", "this  <image1>x"])
def test_many_placeholders_take_as_long_as_their_text(unit):
    # 2.6 s where all the text before each of them was looked through for it
    assert is_done_in(0.5, lambda: without_placeholders(unit * 4000, 1))


def test_numbers_say_which_picture_is_meant():
    assert without_placeholders("<image_2> before <image_1>?", 2)[0] == "image 2 before image 1?"
    assert without_placeholders("Was <image_0> before <image_1>?", 2)[0] == (
        "Was image 1 before image 2?"
    )


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d",
        "see ![image](a.png)",
        "x <| f |> g",
        "the [1] image of <em>",
        "say <s>no</s> again",
        "<svg><image href='a.png'/></svg>",
        "Assistant: yes, and no",
        "images",
        "|box_start|",
        "<table><tr><td>1</td></tr></table>",
    ],
)
def test_what_only_looks_like_a_mark_stays(text):
    assert without_placeholders(text, 1) == (text, 0)
    assert special_token(text, is_answer=True) is None


SPECIAL = [
    "<phrase>a cup</phrase><object><patch_index_0001></object>",
    "<bbox>1 2 3 4</bbox>",
    "It is [SEG].",
    "<extra_id_0> cup",
    "<0x0A>",
    "cup <EOS>",
    "<video> of a cup",
    "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>",
    "<ref>the cup</ref><box>(100,200),(300,400)</box>",
    "<ref>cup</ref><box>[[100, 200, 300, 400]]</box>",
    "<loc0123><loc0456><loc0789><loc1000> cup",
    "cup<loc_12><loc_45><loc_78><loc_99>",
    "<|ref|>cup<|/ref|><|det|>[[100, 200, 300, 400]]<|/det|>",
    "<|begin_of_box|>4<|end_of_box|>",
    "<grounding>a cup<patch_index_0044><patch_index_0863>",
    '<point x="10.5" y="20" alt="cup">cup</point>',
    "<s_menu><s_nm>tea</s_nm></s_menu>",
    "4<|im_end|>",
    "4</s>",
    "<s> 4",
    "[INST] what? [/INST] 4",
    "<start_of_turn>model\n4<end_of_turn>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>4",
    "4<eos>",
    "it is [MASK]",
]


def test_special_tokens_of_other_formats_are_refused_or_declared_text(tmp_path, source):
    marked = {}
    for number, answer in enumerate([*SPECIAL, "<image>", "<image_1> is older"]):
        marked[f"r{2 * number}"] = answer
    rows = simple(2 * len(marked))
    for row in rows[::2]:
        row["answer"] = marked[row["id"]]
    data = jsonl(source(rows), max_bad_share=0.6)
    _, found, report = prepared(tmp_path, entry(data))
    assert not found.keys() & marked.keys() and len(found) == len(marked)
    assert report["dropped"] == {"special token": len(marked)}
    assert all("dataset.markup" in example for example in report["examples"]["special token"])
    kept = prepared(tmp_path, entry(data | {"markup": "text"}), "text")[1]
    assert {name: kept[name].answer for name in marked} == marked


def test_special_tokens_are_refused_in_prompts_as_in_answers(tmp_path, source):
    rows = simple(2 * len(SPECIAL))
    for row, mark in zip(rows[::2], SPECIAL, strict=True):
        row["prompt"] = f"{mark} what?" if "</s>" not in mark and "<s>" not in mark else mark
    data = jsonl(source(rows), max_bad_share=0.6)
    _, _, report = prepared(tmp_path, entry(data))
    assert report["dropped"] == {"special token": len(SPECIAL)}


NOTHING = [float("nan"), float("inf"), None]


@pytest.mark.parametrize("seed", range(3))
def test_what_tables_have_where_nothing_was_is_no_answer(tmp_path, source, seed):
    """pandas writes NaN, which JSON of Python reads back as a number."""
    draw = random.Random(seed)
    rows = simple(40)
    gaps = draw.sample(range(40), 12)
    for i in gaps:
        rows[i]["answer" if draw.random() < 0.5 else "prompt"] = draw.choice(NOTHING)
    data = jsonl(source(rows), max_bad_share=0.5)
    _, found, report = prepared(tmp_path, entry(data))
    assert sum(report["dropped"].values()) == 12 and len(found) == 28
    assert set(report["dropped"]) <= {"no field answer", "no field prompt"}


@pytest.mark.parametrize("gap", NOTHING, ids=str)
def test_a_gap_in_a_table_is_no_name_of_a_row_or_a_group(tmp_path, source, gap):
    """Rows without a group are no group of their own, which one split would get whole."""
    rows = [row | {"id": gap, "group": gap, "split": gap} for row in simple(40)]
    metrics, found, _ = prepared(tmp_path, entry(jsonl(source(rows))))
    assert metrics["groups"] == 40
    assert set(found) == {f"look-{i}" for i in range(40)}


@pytest.mark.parametrize("gap", NOTHING, ids=str)
def test_a_gap_for_an_answer_leaves_it_to_the_texts_of_boxes(tmp_path, source, gap):
    box = {"bbox": [4, 4, 30, 20], "text": "total"}
    rows = [row | {"answer": gap, "boxes": [box]} for row in simple(40)]
    _, found, _ = prepared(tmp_path, entry(jsonl(source(rows), ocr=True)))
    assert {row.answer for row in found.values()} == {"total"}


def test_values_of_tables_are_written_as_text():
    assert as_text({"a": math.nan, "b": [1, None]}) == '{"a": null, "b": [1, null]}'
    assert as_text(b"ja") == "ja" and as_text(True) == "true"
    assert as_text([Decimal("1.5")]) == '["1.5"]'


TEN = ["net", "net", "tennis", "Net", "net", "court", "net", "net", "fence", "net"]


@pytest.mark.parametrize("column", ["answer", "answers"])
@pytest.mark.parametrize(
    ("given", "learned"),
    [
        (["Frank X. M.", "F. X. M."], "Frank X. M."),
        (TEN, "net"),
        ([{"answer": each, "answer_confidence": "yes", "answer_id": 1} for each in TEN], "net"),
        ({"text": ["in 1914", "1914"], "answer_start": [3, 6]}, "in 1914"),
        (["", "  ", "four"], "four"),
        ([float("nan"), "four"], "four"),
    ],
)
def test_of_several_right_answers_one_is_learned_and_all_are_right(
    tmp_path, source, column, given, learned
):
    rows = simple(12)
    for row in rows:
        del row["answer"]
        row[column] = given
    more = {"fields": {"answer": "answers"}} if column == "answers" else {}
    for number, fields in enumerate(({}, more)):
        _, found, _ = prepared(tmp_path, entry(jsonl(source(rows), **fields)), f"out{number}")
        assert {row.answer for row in found.values()} == {learned}
        references = found["r3"].extra["answers"]
        assert learned in references and len(references) == len(set(references))


@pytest.mark.parametrize(
    ("value", "numbers", "answers"),
    [
        ([3, 3, 4], True, ["3", "3", "4"]),
        ([10, 20, 30, 40], False, []),
        ([["a", "b"], ["c"]], False, []),
        ([{"bbox_2d": [1, 2, 3, 4]}], False, []),
        ("text", False, []),
        ([True, False], False, []),
    ],
)
def test_boxes_and_tables_are_no_lists_of_right_answers(value, numbers, answers):
    assert listed(value, numbers) == answers
    assert not answers or chosen(answers) == "3"


def task_of(data, metric, answer="{answer}"):
    return AdapterExpertConfig(name="look", label="A", dataset=data, metric=metric, answer=answer)


@pytest.mark.parametrize(
    ("metric", "answer", "wanted"),
    [
        ("iou", '[{"bbox_2d": [1200, 300, 1800, 900], "label": "cup"}]', "0..1000"),
        ("iou", "100, 200, 300, 400", "boxes as JSON"),
        ("iou", "a cup", "boxes as JSON"),
        ("iou", '[{"bbox": [1, 2, 3, 4]}]', "boxes as JSON"),
        ("count", "several", "a number"),
        ("caption", "...", "words"),
    ],
)
def test_an_answer_that_its_metric_cannot_read_is_told_before_anything_is_trained(
    tmp_path, source, metric, answer, wanted
):
    rows = simple(40)
    right = {"iou": "[1, 2, 3, 4]", "count": "3", "caption": "a cup"}[metric]
    for row in rows:
        row["answer"] = right
    rows[0]["answer"] = answer
    _, found, report = prepared(tmp_path, task_of(jsonl(source(rows)), metric))
    assert len(found) == 40 and any("1 of 40 rows have no right" in w for w in report["warnings"])
    for row in rows[:8]:
        row["answer"] = answer
    with pytest.raises(DataError, match=rf"metric: {metric} cannot read .*8 of 40.*{wanted}"):
        prepared(tmp_path, task_of(jsonl(source(rows)), metric), "many")


def strange(tmp_path, source, change, count=20, size=(40, 40), **task):
    rows = simple(count)
    for i, row in enumerate(rows):
        # one stripe of its own: noise of a large picture takes long to pack
        image = Image.linear_gradient("L").convert("RGB").resize(size)
        image.paste((i, 0, 0), (0, 0, size[0], 3))
        image.save(tmp_path / "data" / row["image"])
        row |= change(i)
    # Such stripes are one photo to who looks for near duplicates.
    data = jsonl(source(rows), near_duplicates="off", **task.pop("data", {}))
    return prepared(tmp_path, entry(data, **task))[2]["warnings"]


BOX = {"bbox": [1, 2, 30, 30]}
STRANGE = {
    "mark in angle brackets": (lambda i: {"answer": f"<tgt_{i}> a cup"}, {}),
    "any label": (lambda i: {"boxes": [BOX]}, {"answer": "{boxes_json}"}),
    "class_names": (lambda i: {"boxes": [BOX | {"label": i % 3}]}, {"answer": "{boxes_json}"}),
    "whole picture": (
        lambda i: {"boxes": [BOX | {"bbox": [0, 0, 40, 40], "label": f"{i}th"}]},
        {"answer": "{boxes_json}"},
    ),
    "placeholders": (lambda i: {"prompt": f"<image>\nwhat {i}?"}, {}),
    "such as nan": (lambda i: {"answer": ["nan", "None", "null", "N/A"][i % 4]}, {}),
    "as Python prints it": (lambda i: {"answer": str(["a", i])}, {}),
    "ends in .0": (lambda i: {"answer": float(i)}, {}),
    "prompt as their answer": (lambda i: {"prompt": f"{i}", "answer": f"{i}"}, {}),
    'the answer "yes"': (lambda i: {"answer": "yes"}, {}),
}


@pytest.mark.parametrize("said", STRANGE)
def test_what_is_strange_and_true_of_nearly_all_rows_is_said(tmp_path, source, said):
    change, task = STRANGE[said]
    (warning,) = [w for w in strange(tmp_path, source, change, **task) if said in w]
    assert warning.startswith("20 of 20 rows ")
    # of every other row it may be right
    half = Source(tmp_path / "half/data")
    rows = [simple(20)[i] | (change(i) if i % 2 else {}) for i in range(20)]
    report = prepared(tmp_path, entry(jsonl(half(rows)), **task), "half-out")[2]
    assert not any(said in warning for warning in report["warnings"])


def test_nothing_is_strange_about_plain_rows(tmp_path, source):
    assert strange(tmp_path, source, lambda i: {"boxes": [BOX | {"label": "cup"}]}) == []


def test_pictures_of_one_tone_or_far_too_small_are_said(tmp_path, source):
    rows = simple(20)
    for i, row in enumerate(rows):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "data" / row["image"])
    data = jsonl(source(rows), near_duplicates="off")
    warnings = prepared(tmp_path, entry(data))[2]["warnings"]
    assert ["one tone" in w for w in warnings].count(True) == 1
    assert ["min_pixels" in w for w in warnings].count(True) == 1


@pytest.mark.parametrize("units", [None, "pixels", "thousandths"])
def test_boxes_of_large_pictures_that_never_pass_a_thousand_have_to_be_declared(
    tmp_path, source, units
):
    """Every one of them could be in pixels, and all of them together are not."""
    draw = random.Random(0)

    def boxed(_):
        x, y = draw.randrange(900), draw.randrange(900)
        return {"boxes": [{"bbox": [x, y, x + 90, y + 80], "label": "cup"}]}

    data = {"box_units": units} if units else {}
    if units:
        strange(tmp_path, source, boxed, 12, (1300, 1280), answer="{boxes_json}", data=data)
        return
    with pytest.raises(DataError, match=r"no box of 12 rows .* set box_units to thousandths"):
        strange(tmp_path, source, boxed, 12, (1300, 1280), answer="{boxes_json}")


def test_three_rows_are_shown_as_they_are_trained_on(tmp_path, source):
    rows = simple(40)
    for row in rows:
        row["prompt"] = f"<image>\n{row['prompt']}"
        row["answer"] = ["one", row["answer"] * 60]
    said = []
    _, found, report = prepared(
        tmp_path, entry(jsonl(source(rows))), progress=lambda text, share: said.append(text)
    )
    shown = report["as_trained"]
    assert len(shown) == 3
    for row in shown:
        kept = found[row["id"]]
        assert kept.split == "train" and kept.answer == row["answer"] == "one"
        assert kept.prompt == row["prompt"] and "<image>" not in row["prompt"]
        with Image.open(tmp_path / "out" / kept.images[0]) as image:
            assert row["pictures"] == ["{} x {}".format(*image.size)]
    assert said[-len(report["warnings"]) - 3 :] == told("look", shown, report["warnings"])
    line = told("look", shown, [])[0]
    assert json.dumps(shown[0]["prompt"]) in line and shown[0]["pictures"][0] in line


def test_what_is_shown_is_one_line_each(tmp_path, source):
    rows = simple(12, answer="a\nb " * 200)
    path = write_rows(tmp_path / "data/rows.jsonl", rows)
    for i, row in enumerate(rows):
        picture(i).save(tmp_path / "data" / row["image"])
    report = prepared(tmp_path, entry(jsonl(path)))[2]
    for line in told("look", report["as_trained"], report["warnings"]):
        assert "\n" not in line and len(line) < 500
