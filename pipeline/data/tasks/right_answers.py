"""Lists of right answers: which of them is learned, and which others count as right.

As in VQA (ten people's answers), DocVQA and Donut's sets (every spelling), SQuAD ({"text": [...]}).
"""

from collections import Counter
from collections.abc import Mapping

from ..sources.columns import is_blank, is_missing
from .templates import as_text

# Under what an answer stands where a list holds objects.
_UNDER = ("answer", "text", "value", "raw_answer")


def listed(value: object, numbers: bool = False) -> list[str]:
    """Return the right answers that a column lists, each as a text; nothing for a column that is
    none of those lists.

    `numbers` says that a list of numbers is one of right answers too; elsewhere it is a box or a
    row of a table.
    """
    if isinstance(value, Mapping):
        # SQuAD's: one object of lists.
        texts = value.get("text")
        value = texts if isinstance(texts, list | tuple) else None
    if not isinstance(value, list | tuple):
        return []
    answers = []
    for item in value:
        if isinstance(item, Mapping):
            item = next((item[key] for key in _UNDER if key in item), item)
        if is_missing(item):
            continue
        is_number = isinstance(item, int | float) and not isinstance(item, bool)
        if not isinstance(item, str) and not (is_number and numbers):
            return []
        answers.append(as_text(item).strip())
    return [answer for answer in answers if answer]


def is_empty(value: object) -> bool:
    """Whether a value is a list of answers with none in it, at any depth."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return is_blank(value)


def chosen(answers: list[str]) -> str:
    """Return the answer that most people gave, of equally many the first."""
    counts = Counter(answers)
    return max(counts, key=counts.__getitem__)
