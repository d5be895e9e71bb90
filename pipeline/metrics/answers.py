"""What an answer is worth beside the right one: one metric per kind of task.

Every score lies in 0..1 and higher is better, so that tasks can stand in one table; a metric's
other figures say more in their own units. What is said and cannot be read as the task wants it is
wrong, never an error. What is wanted and cannot be read has no score at all: nothing that is said
could be right.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from unicodedata import category

from rapidfuzz.distance import LCSseq, Levenshtein

from .short_answers import normalized, number

FOUND_IOU = 0.5  # from which a box counts as found
LARGEST_COORDINATE = 1000  # boxes are given in thousandths of the picture's sides
_FENCE = re.compile(r"^```[a-z]*\s*|\s*```$")
# Scripts that put no blanks between words are compared by their characters: Thai to Burmese, kana,
# the ideographs of China and Japan.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Vowel signs and accents belong to their word, and are no \w to Python.
_SIGNS = "".join(re.escape(c) for c in map(chr, range(0x300, 0x3100)) if category(c)[0] == "M")
_WORD = re.compile(
    rf"[{_UNSPACED}\U00020000-\U0003ffff]|(?:(?![{_UNSPACED}])\w)(?:(?![{_UNSPACED}])[\w{_SIGNS}])*"
)

Figures = dict[str, float | None]  # by name; `score` is always there
Box = tuple[str, tuple[float, ...]]  # label (empty: none given) and x1, y1, x2, y2
Metric = Callable[[str, str], Figures]  # of what was said and what was wanted


def judge(metric: str, found: str, wanted: Sequence[str]) -> Figures:
    """Return the figures of one answer by a metric's name; `score` is the one that tables compare,
    in 0..1.

    wanted holds every answer that would be right; the best match counts. Raises UnreadableReference
    where the metric can read none of them.
    """
    compare = METRICS[metric]
    each = [compare(found, text) for text in wanted if unreadable(metric, text) is None]
    if not each:
        raise UnreadableReference(f"{metric} can read none of {list(wanted)}")
    return max(each, key=_score)


class UnreadableReference(ValueError):
    """A right answer that its metric cannot read, so that no answer has a score beside it."""


def unreadable(metric: str, wanted: str) -> str | None:
    """Return what a metric misses in a right answer, in words; None where it can be judged by."""
    if metric == "iou" and not _can_be_found(read_boxes(wanted)):
        return f"no boxes with an area as JSON in 0..{LARGEST_COORDINATE}"
    if metric == "count" and number(wanted) is None:
        return "no number"
    # Nothing said would be right beside them.
    if metric == "caption" and _WORD.search(wanted) is None:
        return "no word"
    if metric in ("cer", "exact") and not wanted.strip():
        return "no text"
    return None


def _can_be_found(wanted: Sequence[Box] | None) -> bool:
    if wanted is None:
        return False
    # Nothing overlaps a box without an area, or one whose corners are the other way round.
    return all(_area(corners) > 0 for _, corners in wanted)


def _score(figures: Figures) -> float:
    return figures["score"] or 0.0


def exact(found: str, wanted: str) -> Figures:
    """Return whether two texts are the same short answer, as `short_answers.normalized` has it."""
    same = normalized(found) == normalized(wanted)
    return {"score": float(same)}


def characters(found: str, wanted: str) -> Figures:
    """Return the character error rate (edits over the wanted length) and 1 less it as score, never
    below 0."""
    # An accent may be a character of its own, and looks the same.
    found = unicodedata.normalize("NFC", found.strip())
    wanted = unicodedata.normalize("NFC", wanted.strip())
    # Nothing may be wanted: then every character that was said is an error
    length = max(1, len(wanted))
    rate = edit_distance(found, wanted) / length
    return {
        "score": max(0.0, 1.0 - rate),
        "character error rate": rate,
        "exact match": float(rate == 0),
    }


def edit_distance(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and substitutions that make b of a (Levenshtein)."""
    return Levenshtein.distance(a, b)


def count(found: str, wanted: str) -> Figures:
    """Return whether the first number of a text is right, and how far it is off (None without a
    number)."""
    said = number(found)
    right = number(wanted)
    if said is None or right is None:
        return {
            "score": 0.0,
            "absolute error": None,
            "readable": float(said is not None),
        }
    return {
        "score": float(said == right),
        "absolute error": abs(float(said) - float(right)),
        "readable": 1.0,
    }


def boxes(found: str, wanted: str) -> Figures:
    """Return the F1 of boxes found at IoU 0.5, and the mean IoU of wanted boxes; what is no box in
    JSON is wrong."""
    said = read_boxes(found)
    right = read_boxes(wanted) or []
    if said is None:
        return {"score": 0.0, "mean IoU": 0.0, "readable": 0.0}
    if not right and not said:
        return {"score": 1.0, "mean IoU": 1.0, "readable": 1.0}
    matched = _matched(said, right)
    hits = sum(overlap >= FOUND_IOU for overlap in matched)
    total = len(said) + len(right)
    wanted_boxes = max(1, len(right))
    return {
        "score": 2 * hits / total,
        "mean IoU": sum(matched) / wanted_boxes,
        "readable": 1.0,
    }


def _matched(said: Sequence[Box], right: Sequence[Box]) -> list[float]:
    """Return the IoU of each pair, matched one to one, the closest first."""
    pairs = []
    for i, one in enumerate(said):
        for j, other in enumerate(right):
            overlap = iou(one, other)
            pairs.append((overlap, i, j))
    used_said: set[int] = set()
    used_right: set[int] = set()
    matched = []
    # Greedy, as in detection benchmarks: a box said twice finds its partner taken the second time
    for overlap, i, j in sorted(pairs, reverse=True):
        if i in used_said or j in used_right:
            continue
        if overlap > 0:
            used_said.add(i)
            used_right.add(j)
            matched.append(overlap)
    return matched


def read_boxes(text: str) -> list[Box] | None:
    """Return (label, corners) of the boxes of a JSON text in 0..1000; None where it holds anything
    else.

    Takes [x1, y1, x2, y2], a list of those, and {"bbox_2d": [...], "label": ...} alone or in a
    list.
    """
    bare = _FENCE.sub("", text.strip())
    try:
        given = json.loads(bare)
    except (ValueError, RecursionError):  # the latter for a text of nothing but brackets
        return None
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list):
        return None
    if given and not isinstance(given[0], list | Mapping):
        given = [given]  # the four corners of one box
    out = []
    for entry in given:
        box = _box(entry)
        if box is None:
            return None
        out.append(box)
    return out


def _box(entry: object) -> Box | None:
    label = ""
    corners = entry
    if isinstance(entry, Mapping):
        given = entry.get("label")
        label = "" if given is None else normalized(str(given))
        corners = entry.get("bbox_2d")
    if not isinstance(corners, list) or len(corners) != 4:
        return None
    if not all(map(_is_coordinate, corners)):
        return None
    return label, tuple(map(float, corners))


def _is_coordinate(x: object) -> bool:
    # JSON's true is an int to Python, and its NaN passes no comparison
    if isinstance(x, bool) or not isinstance(x, int | float):
        return False
    return 0 <= x <= LARGEST_COORDINATE


def iou(one: Box, other: Box) -> float:
    """Return intersection over union of two labelled boxes; 0 where both have labels and these
    differ."""
    label, a = one
    wanted, b = other
    if label and wanted and label != wanted:
        return 0.0
    left = max(a[0], b[0])
    top = max(a[1], b[1])
    right = min(a[2], b[2])
    bottom = min(a[3], b[3])
    intersection = _area((left, top, right, bottom))
    union = _area(a) + _area(b) - intersection
    return intersection / union if union > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    # Boxes that do not meet intersect in one of negative width or height
    left, top, right, bottom = box
    width = max(0.0, right - left)
    height = max(0.0, bottom - top)
    return width * height


def overlap(found: str, wanted: str) -> Figures:
    """Return the F1 of the longest common word sequence (ROUGE-L of Lin 2004), and of the words
    without their order (ROUGE-1)."""
    # Not rouge-score's own tokenizer: it keeps a-z and 0-9 only, and no word of other scripts
    said = _words(found)
    right = _words(wanted)
    in_order = LCSseq.similarity(said, right)
    shared = Counter(said) & Counter(right)
    return {
        "score": _f1(in_order, said, right),
        "word F1": _f1(shared.total(), said, right),
    }


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def _f1(common: int, a: Sequence[str], b: Sequence[str]) -> float:
    total = len(a) + len(b)
    # Nothing said where nothing is wanted is right
    return 2 * common / total if total else 1.0


METRICS: dict[str, Metric] = {
    "exact": exact,
    "cer": characters,
    "iou": boxes,
    "count": count,
    "caption": overlap,
}


def mean(judged: Sequence[Mapping[str, float | None]], figure: str) -> float | None:
    """Return the mean of a figure over the answers that have it; None where none has."""
    values = []
    for figures in judged:
        value = figures.get(figure)
        if value is not None and math.isfinite(value):
            values.append(value)
    return sum(values) / len(values) if values else None
