"""Lines of every script in the order they are read, against python-bidi, which says where each word
of a line is seen."""

import random
from itertools import pairwise

import pytest
from bidi.algorithm import get_display

from pipeline.data.images import boxes, writing
from pipeline.data.images.boxes import Box

HEBREW = ["שלום", "לכם", "חברים", "בית", "ספר", "גדול", "מים"]
ARABIC = ["مرحبا", "بكم", "في", "المدرسة", "الكبيرة", "ماء"]
LATIN = ["Shop", "Ltd", "total", "Émile", "city"]
NUMBERS = ["12", "3,50", "2024", "7"]


def seen(words, to_the_left):
    """Return the numbers of words as a line shows them, from left to right."""
    stand_ins = []
    for word in words:
        kinds = {-1: "\u05d0", 0: "0", 1: "a"}
        stand_ins.append(kinds[writing._direction(word)])
    # Each place has a letter of its own, of the same kind: the algorithm knows kinds alone.
    used = {"\u05d0": 0, "0": 0, "a": 0}
    letters = []
    for kind in stand_ins:
        letters.append(chr(ord(kind) + used[kind]))
        used[kind] += 1
    shown = get_display(" ".join(letters), base_dir="R" if to_the_left else "L")
    return [letters.index(letter) for letter in shown.split()]


def placed(draw, words, to_the_left, top=0):
    """Return boxes of words where a line shows them."""
    found = []
    at = draw.randrange(20)
    for number in seen(words, to_the_left):
        width = 10 * len(words[number])
        shift = draw.uniform(-2, 2)
        found.append(Box(at, top + shift, at + width, top + 20 + shift, text=words[number]))
        at += width + draw.randrange(4, 12)
    draw.shuffle(found)
    return found


@pytest.mark.parametrize("letters", [HEBREW, ARABIC], ids=["Hebrew", "Arabic"])
@pytest.mark.parametrize("others", [[], LATIN, NUMBERS, LATIN + NUMBERS])
def test_a_line_of_a_page_from_right_to_left_shows_what_was_read(letters, others):
    draw = random.Random(len(others))
    for _ in range(60):
        words = draw.sample(letters, 4) + draw.sample(others, min(len(others), 3))
        draw.shuffle(words)
        page = placed(draw, letters, True, top=200)
        first, *_ = boxes.transcript(placed(draw, words, True) + page).split("\n")
        read = first.split()
        assert sorted(read) == sorted(words)
        if not set(words) & set(NUMBERS):
            assert read == words
        # Where numbers are, two orders may be seen alike: what was read is seen as the line is.
        line = [words[number] for number in seen(words, True)]
        assert [read[number] for number in seen(read, True)] == line


@pytest.mark.parametrize("seed", range(3))
def test_words_from_right_to_left_inside_a_page_that_is_not(seed):
    draw = random.Random(seed)
    for _ in range(60):
        words = draw.sample(LATIN, 4) + draw.sample(HEBREW, 2)
        draw.shuffle(words)
        page = placed(draw, LATIN * 3, False, top=200)
        first, *_ = boxes.transcript(placed(draw, words, False) + page).split("\n")
        assert first.split() == words


def test_a_line_without_letters_runs_as_its_page():
    page = placed(random.Random(0), HEBREW, True, top=100)
    line = [Box(10, 0, 30, 20, text="34"), Box(60, 0, 80, 20, text="12")]
    assert boxes.transcript(line + page).startswith("12 34\n")
    assert boxes.transcript(line) == "34 12"


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["今天", "天气", "很好。"], "今天天气很好。"),
        (["彼は", "「はい」", "と", "言った"], "彼は「はい」と言った"),
        (["ﾃｽﾄ", "ﾃﾞｽ"], "ﾃｽﾄﾃﾞｽ"),
        (["แมว", "อยู่", "บน", "เสื่อ"], "แมวอยู่บนเสื่อ"),
        (["ខ្ញុំ", "ស្រឡាញ់"], "ខ្ញុំស្រឡាញ់"),
        (["မြန်မာ", "စာ"], "မြန်မာစာ"),
        (["오늘", "날씨가", "좋다"], "오늘 날씨가 좋다"),
        (["नमस्ते", "दुनिया"], "नमस्ते दुनिया"),
        (["今天", "iPhone", "12", "很好"], "今天 iPhone 12 很好"),
        (["ok", "🙂", "🙂"], "ok 🙂 🙂"),
    ],
)
def test_scripts_without_blanks_are_joined_without_and_others_with(words, joined):
    found = []
    at = 0
    for word in words:
        found.append(Box(at, 0, at + 20 * len(word), 20, text=word))
        at += 20 * len(word) + 4
    assert boxes.transcript(found) == joined
    assert boxes.transcript(reversed(found)) == joined


def test_a_gap_as_wide_as_a_character_stays_a_blank():
    found = [Box(0, 0, 60, 20, text="商品"), Box(200, 0, 260, 20, text="三元")]
    assert boxes.transcript(found) == "商品 三元"


def test_regions_are_cut_in_reading_order():
    line = placed(random.Random(1), HEBREW, True)
    (as_read,) = boxes.lines(line)
    assert [box.text for box in as_read] == HEBREW
    assert all(before.x0_px > after.x0_px for before, after in pairwise(as_read))
