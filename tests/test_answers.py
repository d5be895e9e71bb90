"""Metrics of answers against numbers worked out by hand, slow definitions, and whatever a model may
say."""

import random
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.answers import (
    METRICS,
    boxes,
    characters,
    count,
    edit_distance,
    exact,
    iou,
    judge,
    mean,
    overlap,
    read_boxes,
)


def test_edit_distance_is_its_recursive_definition():
    draw = random.Random(0)

    @cache
    def wanted(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(
            wanted(a[1:], b) + 1, wanted(a, b[1:]) + 1, wanted(a[1:], b[1:]) + (a[0] != b[0])
        )

    for _ in range(200):
        a, b = ("".join(draw.choices("abc", k=draw.randrange(7))) for _ in range(2))
        assert edit_distance(a, b) == wanted(a, b)


def test_character_errors_are_relative_to_what_was_wanted():
    assert characters("hallo welt", "hello world") == {
        "score": pytest.approx(1 - 4 / 11),
        "character error rate": pytest.approx(4 / 11),
        "exact match": 0.0,
    }
    assert characters(" A7 ", "A7")["score"] == 1.0
    long = characters("x" * 50, "ab")
    assert long["score"] == 0.0 and long["character error rate"] == 25.0


def test_exact_match_forgives_blanks_and_nothing_else():
    assert exact(" red \n", "red")["score"] == 1 and exact("Red", "red")["score"] == 0
    assert exact("", "red")["score"] == 0


@pytest.mark.parametrize(
    ("found", "score", "off"),
    [
        ("3", 1, 0),
        ("There are 3 dots.", 1, 0),
        ("4", 0, 1),
        ("-3", 0, 6),
        ("three", 0, None),
        ("", 0, None),
    ],
)
def test_a_count_is_the_first_number(found, score, off):
    figures = count(found, "3")
    assert (figures["score"], figures["absolute error"]) == (score, off)
    assert figures["readable"] == (off is not None)


def test_overlap_of_boxes_by_hand():
    assert iou(("", (0, 0, 10, 10)), ("", (0, 0, 10, 10))) == 1
    assert iou(("", (0, 0, 10, 10)), ("", (5, 0, 15, 10))) == pytest.approx(50 / 150)
    assert iou(("", (0, 0, 10, 10)), ("", (20, 20, 30, 30))) == 0
    assert iou(("cat", (0, 0, 10, 10)), ("dog", (0, 0, 10, 10))) == 0
    assert iou(("cat", (0, 0, 10, 10)), ("", (0, 0, 10, 10))) == 1
    assert iou(("", (5, 5, 5, 5)), ("", (5, 5, 5, 5))) == 0


@pytest.mark.parametrize(
    "text",
    [
        "[0,0,500,500]",
        '[{"bbox_2d": [0, 0, 500, 500], "label": "square"}]',
        '{"bbox_2d": [0, 0, 500, 500]}',
        "[[0,0,500,500]]",
        '```json\n[{"bbox_2d": [0,0,500,500], "label": "square"}]\n```',
    ],
)
def test_every_way_to_write_a_box_is_read(text):
    assert boxes(text, "[0,0,500,500]") == {"score": 1.0, "mean IoU": 1.0, "readable": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "[0,0,500]",
        "[0,0,500,1001]",
        "[-1,0,5,5]",
        '["a",0,1,2]',
        "[true,0,1,2]",
        "5",
        '{"box": []}',
        "[0,0,500,500",
        "[[0,0,1,1], 3]",
        "NaN",
        "[NaN,0,1,1]",
        "[" * 100_000,
    ],
)
def test_what_is_no_box_is_wrong_and_no_error(text):
    assert read_boxes(text) is None
    assert boxes(text, "[0,0,500,500]") == {"score": 0.0, "mean IoU": 0.0, "readable": 0.0}


def test_several_boxes_are_matched_one_to_one():
    wanted = "[[0,0,100,100],[500,500,600,600]]"
    assert boxes(wanted, wanted)["score"] == 1
    assert boxes("[[500,500,600,600],[0,0,100,100]]", wanted)["score"] == 1
    twice = boxes("[[0,0,100,100],[0,0,100,100]]", wanted)
    assert twice["score"] == pytest.approx(0.5) and twice["mean IoU"] == pytest.approx(0.5)
    assert boxes("[[0,0,100,100]]", wanted)["score"] == pytest.approx(2 / 3)
    assert boxes("[]", "[]")["score"] == 1 and boxes("[]", wanted)["score"] == 0


def test_a_box_half_off_does_not_count():
    assert boxes("[0,0,100,49]", "[0,0,100,100]")["score"] == 0
    assert boxes("[0,0,100,51]", "[0,0,100,100]")["score"] == 1


def test_captions_by_hand():
    """The example of the ROUGE paper (Lin 2004): 'police kill the gunman' against 'police killed
    the gunman'."""
    figures = overlap("Police kill the gunman", "police killed the gunman")
    assert figures["score"] == pytest.approx(0.75)
    turned = overlap("the gunman kill police", "police killed the gunman")
    assert turned["score"] == pytest.approx(0.5) and turned["word F1"] == pytest.approx(0.75)
    assert overlap("", "a dog")["score"] == 0 and overlap("", "")["score"] == 1


def test_captions_of_every_script_are_words():
    """The usual ROUGE tokenizer keeps a to z alone, and would find nothing in these."""
    assert overlap("кошка на ковре", "кошка на ковре")["score"] == 1
    assert overlap("ein Hund läuft", "ein Hund schläft")["score"] == pytest.approx(2 / 3)
    assert overlap("猫 が 寝る", "犬 が 寝る")["word F1"] == pytest.approx(2 / 3)


def test_a_page_of_characters_is_compared_at_once():
    """Time grew with the product of the lengths: a pair of 4,000 characters took seconds."""
    draw = random.Random(0)
    a, b = ("".join(draw.choices("abcdefgh ", k=40_000)) for _ in range(2))
    started = time.process_time()
    assert 0 < characters(a, b)["character error rate"] < 1
    assert time.process_time() - started < 5


def test_the_best_of_several_right_answers_counts():
    assert judge("exact", "two", ["2", "two"])["score"] == 1
    assert judge("caption", "a dog", ["a cat on a mat", "a dog"])["score"] == 1
    assert judge("cer", "ab", ["xy", "abc"])["character error rate"] == pytest.approx(1 / 3)


def test_means_leave_out_what_is_not_there():
    judged = [{"score": 1.0, "absolute error": None}, {"score": 0.0, "absolute error": 2.0}]
    assert (
        mean(judged, "score") == 0.5
        and mean(judged, "absolute error") == 2.0
        and mean(judged, "other") is None
    )


@given(
    metric=st.sampled_from(sorted(METRICS)),
    found=st.text(max_size=40),
    wanted=st.text(min_size=1, max_size=20),
)
def test_whatever_is_said_has_a_score_between_0_and_1(metric, found, wanted):
    wanted = {"count": "3", "iou": "[0,0,1,1]"}.get(metric, wanted)
    assert 0 <= judge(metric, found, [wanted])["score"] <= 1
    assert judge(metric, wanted, [wanted])["score"] == 1 or not wanted.split()
