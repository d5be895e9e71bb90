"""What an answer is worth beside the right one: one metric per kind of task.

Every score lies in 0..1 and higher is better, so that tasks can stand in one table; a metric's
other figures say more in their own units. What cannot be read as the task wants it is wrong, never
an error.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence

HALF = 0.5  # IoU from which a box counts as found
_FENCE = re.compile(r"^```[a-z]*\s*|\s*```$")
_WORD = re.compile(r"\w+")
_WHOLE = re.compile(r"-?\d+")


def judge(metric: str, found: str, wanted: Sequence[str]) -> dict[str, float | None]:
    """Return the figures of one answer by a metric's name; `score` is the one that tables compare,
    in 0..1.

    wanted holds every answer that would be right; the best match counts.
    """
    each = [METRICS[metric](found, text) for text in wanted]
    return max(each, key=lambda figures: figures["score"])


def exact(found: str, wanted: str) -> dict[str, float]:
    """Return whether two texts are the same up to blanks."""
    return {"score": float(found.split() == wanted.split())}


def characters(found: str, wanted: str) -> dict[str, float]:
    """Return the character error rate (edits over the wanted length) and 1 less it as score, never
    below 0."""
    rate = distance(found.strip(), wanted.strip()) / max(1, len(wanted.strip()))
    return {
        "score": max(0.0, 1.0 - rate),
        "character error rate": rate,
        "exact match": float(rate == 0),
    }


def distance(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and substitutions that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def count(found: str, wanted: str) -> dict[str, float | None]:
    """Return whether the first whole number of a text is right, and how far it is off (None without
    a number)."""
    said, right = _WHOLE.search(found), _WHOLE.search(wanted)
    off = abs(int(said[0]) - int(right[0])) if said and right else None
    return {
        "score": float(off == 0),
        "absolute error": off if off is None else float(off),
        "readable": float(bool(said)),
    }


def boxes(found: str, wanted: str) -> dict[str, float]:
    """Return the F1 of boxes found at IoU 0.5, and the mean IoU of wanted boxes; what is no box in
    JSON is wrong."""
    said, right = read_boxes(found), read_boxes(wanted) or []
    if said is None:
        return {"score": 0.0, "mean IoU": 0.0, "readable": 0.0}
    if not right and not said:
        return {"score": 1.0, "mean IoU": 1.0, "readable": 1.0}
    pairs = sorted(
        ((iou(a, b), i, j) for i, a in enumerate(said) for j, b in enumerate(right)), reverse=True
    )
    used_i, used_j, matched = set(), set(), []
    for overlap, i, j in pairs:
        if i not in used_i and j not in used_j and overlap > 0:
            used_i.add(i)
            used_j.add(j)
            matched.append(overlap)
    score = 2 * sum(overlap >= HALF for overlap in matched) / (len(said) + len(right))
    return {"score": score, "mean IoU": sum(matched) / max(1, len(right)), "readable": 1.0}


def read_boxes(text: str) -> list[tuple[str, tuple[float, ...]]] | None:
    """Return (label, corners) of the boxes of a JSON text in 0..1000; None where it holds anything
    else.

    Takes [x1, y1, x2, y2], a list of those, and {"bbox_2d": [...], "label": ...} alone or in a
    list.
    """
    try:
        given = json.loads(_FENCE.sub("", text.strip()))
    except (ValueError, RecursionError):
        return None
    if isinstance(given, Mapping) or (
        isinstance(given, list) and given and not isinstance(given[0], list | Mapping)
    ):
        given = [given]
    if not isinstance(given, list):
        return None
    out = [_box(entry) for entry in given]
    return None if None in out else out


def _box(entry) -> tuple[str, tuple[float, ...]] | None:
    label = str(entry.get("label", "")) if isinstance(entry, Mapping) else ""
    corners = entry.get("bbox_2d") if isinstance(entry, Mapping) else entry
    if not isinstance(corners, list) or len(corners) != 4:
        return None
    if not all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1000 for x in corners
    ):
        return None
    return label, tuple(map(float, corners))


def iou(one: tuple[str, tuple[float, ...]], other: tuple[str, tuple[float, ...]]) -> float:
    """Return intersection over union of two labelled boxes; 0 where both have labels and these
    differ."""
    (label, a), (wanted, b) = one, other
    if label and wanted and label != wanted:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0.0, width) * max(0.0, height)
    both = _area(a) + _area(b) - inside
    return inside / both if both > 0 else 0.0


def _area(box: tuple[float, ...]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def overlap(found: str, wanted: str) -> dict[str, float]:
    """Return the F1 of the longest common word sequence (as ROUGE-L), and of the words without
    their order."""
    said, right = _WORD.findall(found.lower()), _WORD.findall(wanted.lower())
    return {
        "score": _f1(_common(said, right), said, right),
        "word F1": _f1(_shared(said, right), said, right),
    }


def _common(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _shared(a: list[str], b: list[str]) -> int:
    return sum(min(a.count(word), b.count(word)) for word in set(a))


def _f1(both: int, a: list[str], b: list[str]) -> float:
    return 2 * both / (len(a) + len(b)) if a or b else 1.0


METRICS: dict[str, Callable[[str, str], dict]] = {
    "exact": exact,
    "cer": characters,
    "iou": boxes,
    "count": count,
    "caption": overlap,
}


def mean(judged: Sequence[Mapping[str, float | None]], figure: str) -> float | None:
    """Return the mean of a figure over the answers that have it; None where none has."""
    values = [x for x in (j.get(figure) for j in judged) if x is not None and math.isfinite(x)]
    return sum(values) / len(values) if values else None
