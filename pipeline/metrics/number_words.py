"""Numbers in English words, by their value: one hundred and five, twenty-one, a dozen.

Invariant: words that make no number together are read one by one, so `two three` begins with 2.
"""

import re
from decimal import Decimal

_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen"),
    *("sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
}
_VALUES = {
    **{word: value for value, word in enumerate((*_ONES, *_TEENS), 1)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
    "zero": 0,
    "none": 0,
    "a": 1,
    **SCALES,
}

_BLANK = r"(?:\s+|\s?-\s?)"
_BELOW_100 = (
    rf"(?:(?:{'|'.join(_TENS)})(?:{_BLANK}(?:{'|'.join(_ONES)})\b)?"
    rf"|(?:{'|'.join(reversed((*_ONES, *_TEENS)))})\b)"
)
_BELOW_1000 = (
    rf"(?:(?:(?:a|{_BELOW_100}){_BLANK})?hundred\b(?:{_BLANK}(?:and{_BLANK})?{_BELOW_100})?"
    rf"|(?:(?:a|{_BELOW_100}){_BLANK})?dozen\b|{_BELOW_100})"
)
_GROUP = rf"(?:(?:a|{_BELOW_1000}){_BLANK})?(?:thousand|million|billion)\b"
NUMBER = re.compile(
    rf"\b(?:{_GROUP}(?:,?{_BLANK}{_GROUP})*(?:,?{_BLANK}(?:and{_BLANK})?{_BELOW_1000})?"
    rf"|{_BELOW_1000}|zero|none)\b",
    re.IGNORECASE,
)


def value(text: str) -> Decimal:
    """Return the value of a text that NUMBER matches as a whole."""
    total = 0
    group = 0
    for word in re.findall(r"[a-z]+", text.lower()):
        if word == "and":
            continue
        number = _VALUES[word]
        if number >= SCALES["thousand"]:
            total += max(1, group) * number
            group = 0
        elif word in SCALES:
            group = max(1, group) * number
        else:
            group += number
    return Decimal(total + group)
