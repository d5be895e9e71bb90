"""Short answers as the field's harnesses compare them: what is no part of an answer is taken off,
and numbers are read by their value.

The rules are those of the evaluations of SQuAD (Rajpurkar et al. 2016: case, punctuation, articles)
and VQA (Antol et al. 2015: the same, number words), with what lm-evaluation-harness adds for GSM8K
(thousands separators, a final period), narrowed where they make different answers equal: marks
inside an answer stay, and so does an A that names a choice.
"""

import re
import unicodedata
from decimal import Decimal

# Of quotes and of Markdown around an answer, and of marks that end one.
_AROUND = "\"'`*“”‘’«»„ "
_ENDS = ".,;:!?。！？،؟… "

# An article leads a word: the a of `vitamin a` and the A of `B, A` do not.
_ARTICLE = re.compile(r"\b(?:[Tt]he|THE|[Aa]n|AN|a|(?<![^\s])A)\s+(?=\w\w)")

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_TEENS = ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
_WORDS = (*_ONES, *_TEENS, "nineteen", "twenty")
_NUMBER_WORDS = {word: Decimal(value) for value, word in enumerate(_WORDS)}
_NUMBER_WORD = re.compile(rf"\b({'|'.join(sorted(_WORDS, key=len, reverse=True))}|none)\b", re.I)

# Groups of three behind a comma, an apostrophe or a narrow blank, of two as in India; with groups
# behind periods, a comma is what a point is elsewhere. A lone period is always a decimal point.
_BLANKS = "\u00a0\u2009\u202f"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<!\w)[-−])?
    (?:
        (?P<european>\d{{1,3}}(?:\.\d{{3}})+,\d+(?!\d) | \d{{1,3}}(?:\.\d{{3}}){{2,}}(?![\d.]) )
      | (?P<grouped>\d{{1,3}}(?:[,'’{_BLANKS}]\d{{2,3}})*[,'’{_BLANKS}]\d{{3}}(?!\d)(?:\.\d+)?)
      | (?P<comma>\d+,\d{{1,2}}(?![\d,]))
      | (?P<plain>\d+(?:\.\d+)?|\.\d+)
    )
    """,
    re.VERBOSE,
)
_SEPARATORS = re.compile(rf"[,'’{_BLANKS}]")


def number(text: str) -> Decimal | None:
    """Return the first number of a text; where it has no digits, that of its first number word.
    None where it has neither."""
    found = _NUMBER.search(text)
    if found is not None:
        return _value(found)
    word = _NUMBER_WORD.search(text)
    if word is None:
        return None
    return _NUMBER_WORDS.get(word[1].lower(), Decimal(0))


def _value(found: re.Match[str]) -> Decimal:
    digits = found[0]
    if found["sign"]:
        digits = digits[1:]
    if found["european"]:
        digits = digits.replace(".", "").replace(",", ".")
    elif found["comma"]:
        digits = digits.replace(",", ".")
    else:
        digits = _SEPARATORS.sub("", digits)
    value = Decimal(digits)
    return -value if found["sign"] else value


def normalized(text: str) -> str:
    """Return what of a short answer is compared: without case, surplus blanks, quotes around it,
    marks at its end and articles; a number by its value."""
    text = unicodedata.normalize("NFC", text)
    text = " ".join(text.split())
    bare = text.lstrip(_AROUND).rstrip(_AROUND + _ENDS)
    # An answer that is nothing but marks (a smiley, a question mark) is what it is.
    bare = bare or text
    whole = _whole_number(bare)
    if whole is not None:
        return whole
    return _ARTICLE.sub("", bare).casefold()


def _whole_number(text: str) -> str | None:
    """Return a number that is the whole of a text, in one spelling; None where the text is more."""
    if text.casefold() in _NUMBER_WORDS:
        return _spelled(_NUMBER_WORDS[text.casefold()])
    found = _NUMBER.fullmatch(text)
    # 007 is a name and no number.
    if found is None or re.match(r"[-−]?0\d", text):
        return None
    return _spelled(_value(found))


def _spelled(value: Decimal) -> str:
    # Digit by digit, as arithmetic on decimals rounds to 28 of them.
    digits = f"{value:f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return "0" if digits == "-0" else digits
