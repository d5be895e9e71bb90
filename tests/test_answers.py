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
    UnreadableReference,
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
    unreadable,
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


def test_exact_match_forgives_how_a_short_answer_is_dressed_and_nothing_else():
    assert exact(" red \n", "red")["score"] == 1 and exact("", "red")["score"] == 0
    draw = random.Random(0)
    answers = [
        "yes",
        "New York",
        "1,200",
        "3.5",
        "B",
        "Straße",
        "das Haus",
        "U.S. dollars",
        "3 km/h",
    ]
    dressings = (
        str.upper,
        str.title,
        "{}.".format,
        "{}!".format,
        " {}\n".format,
        '"{}"'.format,
        "**{}**".format,
        "“{}”.".format,
        "{}。".format,
    )
    for _ in range(300):
        wanted, other = draw.sample(answers, 2)
        said = wanted
        for dress in draw.sample(dressings, 2):
            said = dress(said)
        assert exact(said, wanted)["score"] == 1, (said, wanted)
        assert exact(said, other)["score"] == 0, (said, other)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *[("the cat", "cat"), ("A cat", "a cat."), ("an apple", "Apple"), ("two", "2")],
        *[("1,200", "1200"), ("1200.0", "1,200"), ("3.50", "3.5"), ("1'000'000", "1000000")],
    ],
)
def test_articles_and_spellings_of_one_number_make_no_difference(a, b):
    assert exact(a, b)["score"] == exact(b, a)["score"] == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *[("A", "B"), ("A", "the"), ("vitamin a", "vitamin"), ("option A", "option")],
        *[("35", "3.5"), ("-3", "3"), ("007", "7"), ("?", "!"), ("not red", "red"), ("1,2", "12")],
        ("1" * 40, "1" * 39 + "2"),
    ],
)
def test_different_answers_stay_different(a, b):
    assert exact(a, b)["score"] == exact(b, a)["score"] == 0


def test_numbers_are_read_as_they_are_written_elsewhere():
    """Python's own formatting groups digits; the marks of other countries take its places."""
    draw = random.Random(0)
    marks = [(",", "."), ("'", "."), ("’", "."), ("\u202f", "."), ("\u00a0", "."), ("", ".")]
    for _ in range(500):
        value = draw.choice(
            [draw.randrange(10**9), round(draw.uniform(0, 10**7), draw.choice([1, 2]))]
        )
        group, point = draw.choice(marks)
        said = f"{value:,}".translate({ord(","): group, ord("."): point})
        sentence = draw.choice(["{}", "There are {} of them.", "It costs ${}.", "{}, I think"])
        assert count(sentence.format(said), f"{value}")["score"] == 1, said
        assert count(sentence.format(said), f"{value + 1}")["absolute error"] == pytest.approx(1)
        if value >= 10**6 or (value >= 1000 and value != int(value)):
            german = f"{value:,}".translate({ord(","): ".", ord("."): ","})
            assert count(german, f"{value}")["score"] == 1, german


@pytest.mark.parametrize(
    ("found", "score", "off"),
    [
        ("3", 1, 0),
        ("There are 3 dots.", 1, 0),
        ("4", 0, 1),
        ("-3", 0, 6),
        ("three", 1, 0),
        ("I see Three of them", 1, 0),
        ("one of them, 3 in all", 1, 0),
        ("none", 0, 3),
        ("3.5", 0, 0.5),
        ("3.0", 1, 0),
        ("1,200", 0, 1197),
        ("several", 0, None),
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
    assert overlap("猫が寝る", "犬が寝る")["word F1"] == pytest.approx(3 / 4)
    assert 0 < overlap("แมวอยู่บนเสื่อ", "แมวอยู่บนเตียง")["score"] < 1


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
    readable = {"count": "3", "iou": "[0,0,1,1]"}
    if unreadable(metric, wanted):
        with pytest.raises(UnreadableReference):
            judge(metric, found, [wanted])
        # beside one that can be read, it changes nothing
        also = readable.get(metric, "a word")
        assert judge(metric, found, [wanted, also]) == judge(metric, found, [also])
        return
    assert 0 <= judge(metric, found, [wanted])["score"] <= 1
    assert judge(metric, wanted, [wanted])["score"] == 1 or not wanted.split()


def test_numbers_in_words_are_those_of_another_reader():
    """Whisper's normalizer reads English numbers, too."""
    from transformers.models.whisper.english_normalizer import EnglishNumberNormalizer

    draw = random.Random(0)
    reader = EnglishNumberNormalizer()
    ones = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    teens = [
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
    ]
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

    def below_1000():
        small = draw.choice([draw.choice(teens), f"{draw.choice(tens)} {draw.choice(ones)}"])
        small = draw.choice([small, draw.choice(ones), draw.choice(tens)])
        joined = draw.choice([" ", " and "])
        hundreds = f"{draw.choice(ones)} hundred"
        return draw.choice([small, hundreds, f"{hundreds}{joined}{small}"])

    for _ in range(300):
        groups = [f"{below_1000()} {scale}" for scale in ("million", "thousand")]
        words = " ".join([*draw.sample(groups, draw.randrange(2)), below_1000()])
        # It leaves this one as it is.
        wanted = "1" if words == "one" else reader(words)
        said = draw.choice(["{}", "There are {} of them.", "about {}"]).format(words)
        assert count(said, wanted)["score"] == 1, (words, wanted)
        assert exact(words.title().replace("And", "and"), wanted)["score"] == 1, words
        assert count(said, f"{int(wanted) + 1}")["absolute error"] == 1


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        *[("a dozen", "12"), ("two dozen eggs", "24"), ("2 million", "2000000"), ("1/2", "0.5")],
        *[("½", "0.5"), ("2½", "2.5"), ("2 1/2 cups", "2.5"), ("-1/4", "-0.25"), ("+3", "3")],
        *[("1e3", "1000"), ("2.5E-1", "0.25"), ("10 000", "10000"), ("forty", "40")],
        ("1" * 40, "1" * 40),
    ],
)
def test_a_count_is_the_whole_number_and_not_its_beginning(said, wanted):
    assert count(said, wanted)["score"] == 1 and count(wanted, said)["score"] == 1


@pytest.mark.parametrize(
    ("said", "other"),
    [
        *[("Two hundred", "2"), ("1/2", "1"), ("2 million", "2"), ("twenty-one", "20")],
        *[("1/2/2024", "0.5"), ("3/0", "0"), ("10 000", "10"), ("1" * 40, "1" * 39 + "2")],
        *[("tennis", "10"), ("someone", "1"), ("-" + "1" * 40, "-" + "1" * 39 + "2")],
    ],
)
def test_a_part_of_a_number_is_another_one(said, other):
    assert count(said, other)["score"] == 0


@pytest.mark.parametrize(
    "alike",
    [
        *[["(A)", "A", "a)", "[A].", "Ａ"], ["it's", "it’s", "It‘s."], ["a-b", "a–b", "a‐b"]],
        *[["$5.00", "$5", "5 $"], ["5%", "5 %", "5.0%", "５％"], ["$1,000", "$1000", "1'000 $"]],
        *[["1,000 km", "1000km", "1000.0 km"], ["1 000", "1,000", "1e3"], ["+5", "5", "five"]],
    ],
)
def test_one_short_answer_in_other_marks_is_the_same(alike):
    for a in alike:
        for b in alike:
            assert exact(a, b)["score"] == 1, (a, b)


def test_short_answers_in_other_marks_are_not_all_the_same():
    answers = [
        "A",
        "5%",
        "5",
        "$5",
        "€5",
        "5 km",
        "50%",
        "f(x)",
        "f",
        "1/2",
        "12",
        ":)",
        "C++",
        "C",
    ]
    for a in answers:
        for b in answers:
            assert exact(a, b)["score"] == (a == b), (a, b)


@pytest.mark.parametrize(
    "wanted", ["[[5,5,5,9]]", "[[30,40,1,2]]", '[{"bbox_2d": [9,9,9,9], "label": "a"}]']
)
def test_a_box_that_nothing_can_overlap_is_no_right_answer(wanted):
    assert "area" in unreadable("iou", wanted) and unreadable("iou", "[]") is None
    with pytest.raises(UnreadableReference):
        judge("iou", wanted, [wanted])


def test_labels_of_boxes_are_short_answers():
    box = '{"bbox_2d": [1,2,30,40], "label": %s}'
    for label in ('"Cat"', '" cat"', '"the cat"', "null"):
        assert boxes(box % label, box % '"cat"')["score"] == 1
    assert boxes(box % '"dog"', box % '"cat"')["score"] == 0


def test_accents_and_vowel_signs_belong_to_their_letters():
    """To Python's expressions they are no part of a word: words without them were the same."""
    split = "cafe\u0301"
    assert overlap(split, "café")["score"] == characters(split, "café")["score"] == 1
    for one, other in (("नमस्ते", "नमस्त"), ("கண்", "கண"), ("مُدَرِّس", "مدرس"), ("שָׁלוֹם", "שלום")):
        assert overlap(one, one)["score"] == 1 and overlap(one, other)["score"] == 0, one
