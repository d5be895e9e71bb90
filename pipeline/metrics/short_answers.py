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

from . import number_words

# Of quotes and of Markdown around an answer, and of marks that end one.
_AROUND = "\"'`*“”‘’«»„ "
_ENDS = ".,;:!?。！？،؟… "

# An article leads a word: the a of `vitamin a` and the A of `B, A` do not.
_ARTICLE = re.compile(r"\b(?:[Tt]he|THE|[Aa]n|AN|a|(?<![^\s])A)\s+(?=\w\w)")

# Brackets around an answer, or behind the letter of a choice; (x) of f(x) is neither.
_IN_BRACKETS = re.compile(r"[(\[](?P<inner>[^()\[\]]+)[)\]]|(?P<before>[^()\[\]]+)[)\]]")

# What looks the same, or is what a keyboard has for it: typographic quotes and dashes, wide forms
# of Latin text in Chinese and Japanese.
_ALIKE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
_ALIKE |= str.maketrans("‘’ʼ“”‐‑–—\u3000", "'''\"\"---- ")

_MINUS = ("-", "−")

# Groups of three behind a comma, an apostrophe or a narrow blank, of two as in India; with groups
# behind periods, a comma is what a point is elsewhere. A lone period is always a decimal point.
_BLANKS = "\u00a0\u2009\u202f"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<!\w)[-−+])?
    (?:
        (?P<european>\d{{1,3}}(?:\.\d{{3}})+,\d+(?!\d) | \d{{1,3}}(?:\.\d{{3}}){{2,}}(?![\d.]) )
      | (?P<grouped>\d{{1,3}}(?:[,'’{_BLANKS}]\d{{2,3}})*[,'’{_BLANKS}]\d{{3}}(?!\d)(?:\.\d+)?)
      | (?P<comma>\d+,\d{{1,2}}(?![\d,]))
      | (?P<plain>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,2}}(?!\w))?)
    )
    """,
    re.VERBOSE,
)
# Also one with a whole number in front, as in 2 1/2; a date has a second stroke.
_FRACTION = re.compile(
    r"(?<![\d/.,])(?:(?P<whole>\d+)\s+)?(?P<part>\d+)\s?[/⁄]\s?(?P<of>0*[1-9]\d*)(?![\d/.,]*\d|/)"
)
_SCALE = re.compile(rf"\s+(?P<scale>{'|'.join(number_words.SCALES)})s?\b", re.IGNORECASE)

# A number with what it counts, in one word or sign.
_CURRENCIES = "$€£¥₹₩"
_WITH_UNIT = re.compile(
    rf"(?P<before>[{_CURRENCIES}])?\s?(?P<number>[^\s%‰°]*?\d)\s?"
    rf"(?P<unit>[%‰{_CURRENCIES}]|°?[^\W\d_]*)"
)
# Groups of three behind plain blanks, which between other words part two numbers.
_IN_BLANKS = re.compile(r"[-−+]?\d{1,3}(?: \d{3})+(?:[.,]\d+)?")

_SEPARATORS = re.compile(rf"[,'’{_BLANKS}]")


def number(text: str) -> Decimal | None:
    """Return the first number of a text; where it has no digits, that of its first number word.
    None where it has neither."""
    text = _fractions_apart(text).strip()
    if _IN_BLANKS.fullmatch(text):
        text = text.replace(" ", "")
    found = _NUMBER.search(text)
    if found is None:
        words = number_words.NUMBER.search(text)
        return None if words is None else number_words.value(words[0])
    fraction = _FRACTION.match(text, found.start("plain")) if found["plain"] else None
    if fraction is not None:
        parts = Decimal(fraction["part"]) / Decimal(fraction["of"])
        value = Decimal(fraction["whole"] or 0) + parts
        return value.copy_negate() if found["sign"] in _MINUS else value
    scale = _SCALE.match(text, found.end())
    # Nothing is multiplied without need: arithmetic on decimals rounds to 28 digits.
    if scale is None:
        return _value(found)
    return _value(found) * number_words.SCALES[scale["scale"].lower()]


def _fractions_apart(text: str) -> str:
    """Return a text with the signs of fractions, as ½, written in digits."""
    out = []
    for sign in text:
        parts = unicodedata.normalize("NFKC", sign)
        out.append(f" {parts}" if "⁄" in parts and sign != parts else sign)
    return "".join(out)


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
    return value.copy_negate() if found["sign"] in _MINUS else value


def normalized(text: str) -> str:
    """Return what of a short answer is compared: without case, surplus blanks, quotes around it,
    marks at its end and articles; a number by its value."""
    text = unicodedata.normalize("NFC", text).translate(_ALIKE)
    text = " ".join(text.split())
    bare = _stripped(text)
    bracketed = _IN_BRACKETS.fullmatch(bare)
    if bracketed is not None:
        bare = _stripped(bracketed["inner"] or bracketed["before"])
    # An answer that is nothing but marks (a smiley, a question mark) is what it is.
    bare = bare or text
    whole = _whole_number(bare)
    if whole is not None:
        return whole
    return _ARTICLE.sub("", bare).casefold()


def _stripped(text: str) -> str:
    return text.lstrip(_AROUND).rstrip(_AROUND + _ENDS)


def _whole_number(text: str) -> str | None:
    """Return a number that is the whole of a text, with its unit, in one spelling; None where the
    text is more."""
    if number_words.NUMBER.fullmatch(text) and text.casefold() != "none":
        return _spelled(number_words.value(text))
    if _IN_BLANKS.fullmatch(text):
        text = text.replace(" ", "")
    counted = _WITH_UNIT.fullmatch(text)
    digits = counted["number"] if counted else text
    found = _NUMBER.fullmatch(digits)
    # 007 is a name and no number.
    if found is None or re.match(r"[-−+]?0\d", digits):
        return None
    unit = "" if counted is None else f"{counted['before'] or ''}{counted['unit']}"
    return f"{_spelled(_value(found))} {unit.casefold()}".strip()


def _spelled(value: Decimal) -> str:
    # Digit by digit, as arithmetic on decimals rounds to 28 of them.
    digits = f"{value:f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return "0" if digits == "-0" else digits
