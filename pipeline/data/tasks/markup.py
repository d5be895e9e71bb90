"""Marks that other formats put into texts: placeholders of pictures, special tokens of chats and of
grounding.

Invariant: a prompt that leaves here has no placeholder. The base's own chat template puts every
picture of a row in front of its text, in order, so one at either end says nothing, and one inside
is named by its number.
"""

import re

# Tokens of which one picture has many, side by side.
_PADS = r"<\|image_pad\|>|<im_patch>|<image_soft_token>|<IMG_CONTEXT>|\[IMG\]|\[IMG_BREAK\]"
# Tokens that stand for a picture each, perhaps with its number.
_ONES = (
    r"<\|?(?:image|img|picture)[ _-]?(?P<number>\d{1,3})?\s?/?\|?>"
    r"|<(?:ImageHere|__media__|__image__)>|<image[_-]placeholder>|<start_of_image>"
    r"|<img\s[^<>]{1,500}>"
    r"|(?<!!)\[(?:image|picture)[ _-]?(?P<listed>\d{1,3})?\]"
)
_PLACEHOLDER = re.compile(
    rf"""
    (?: <\|vision_start\|> | <\|?image_start\|?> | <im_start> | <start_of_image>(?=\s*<image_s)
      | <fake_token_around_image> )?
    (?:
        (?:Picture[ ]\d+:[ ]?)? <img>(?P<path>[^<>\n]{{1,500}})</img>
      | (?P<pads>(?:{_PADS})(?:\s*(?:{_PADS}))*)
      | {_ONES}
    )
    (?: <\|vision_end\|> | <\|?image_end\|?> | <im_end> | <end_of_image> | \[IMG_END\]
      | <fake_token_around_image> )?
    """,
    re.VERBOSE | re.IGNORECASE,
)

_SPECIAL = re.compile(
    r"""
    <\|/?[A-Za-z](?:[A-Za-z0-9_ .-]{0,38}[A-Za-z0-9])?\|>  # of chat templates, of Qwen2-VL's boxes
  | <｜[^｜<>\n]{1,40}｜>                     # of DeepSeek, with wide bars
  | </?(?:ref|box|bbox|quad|poly|det|delim|phrase|grounding)>  # of Qwen-VL, InternVL, Kosmos-2
  | <(?:loc_?|seg|bin_|patch_index_)\d{1,4}>  # of PaliGemma, Florence-2, Kosmos-2
  | <points?\ x\d*="                        # of Molmo
  | </?s_[a-z_]+>|<sep/>                    # of Donut
  | \[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>
  | <(?:bos|eos|cls|sep|pad|unk|mask|BOS|EOS|CLS|SEP|PAD|UNK|MASK)>
  | \[(?:CLS|SEP|PAD|UNK|MASK|SEG)\]
  | <(?:extra_id_|unused|image_newline|end_of_utterance)\d{0,4}>|<0x[0-9A-F]{2}>
  | <(?:video|audio)>                        # nothing of the kind is read
  | \A\s*<s>|</s>\s*\Z                      # elsewhere HTML's for what is struck out
  | \b(?:ASSISTANT|GPT|Assistant):\s*\Z       # a whole chat as one text
    """,
    re.VERBOSE,
)

_DETERMINER = re.compile(r"\b(?:the|this|that|an?|each|following|first|second|third)\s*\Z", re.I)


class StrangePlaceholder(ValueError):
    """A placeholder that no picture of its row answers to; the text says why."""


def special_token(text: str, is_answer: bool) -> str | None:
    """Return the first mark of another format that a text holds, None where it has none; in an
    answer, placeholders of pictures are marks too."""
    found = _SPECIAL.search(text)
    if found is None and is_answer:
        # [image] is Markdown's and anybody's way to say that one is left out.
        # An answer in HTML may have pictures in it.
        marks = (each for each in _PLACEHOLDER.finditer(text) if each[0][0] == "<")
        found = next((each for each in marks if not each[0].startswith("<img ")), None)
    return found[0].strip() if found else None


def placeholders(prompt: str) -> int:
    """Return how many pictures a prompt has placeholders of."""
    return sum(1 for _ in _PLACEHOLDER.finditer(prompt))


def picture_named(prompt: object) -> str | None:
    """Return the path of the first picture that a prompt names in a placeholder, None where it
    names none."""
    if not isinstance(prompt, str):
        return None
    return next((each["path"] for each in _PLACEHOLDER.finditer(prompt) if each["path"]), None)


def without_placeholders(prompt: str, pictures: int) -> tuple[str, int]:
    """Return a prompt without placeholders of its so many pictures, and how many there were. Raises
    StrangePlaceholder for one of a picture that is not there."""
    found = list(_PLACEHOLDER.finditer(prompt))
    if not found:
        return prompt, 0
    numbers = []
    for place, match in enumerate(found, 1):
        said = match["number"] or match["listed"]
        numbers.append(int(said) if said else place)
    # Some count from 0.
    if min(numbers) == 0:
        numbers = [number + 1 for number in numbers]
    if max(numbers) > pictures:
        raise StrangePlaceholder(
            f"{found[numbers.index(max(numbers))][0]!r} is placeholder {max(numbers)}, and the row "
            f"has {pictures or 'no'} picture{'s' * (pictures > 1)}"
        )

    says_nothing = _says_nothing(prompt, found, numbers)
    out = []
    at = 0
    for match, number in zip(found, numbers, strict=True):
        out.append(prompt[at : match.start()])
        if not says_nothing:
            out.append(_name(prompt, match, number, pictures, at))
        at = match.end()
    out.append(prompt[at:])
    return "".join(out).strip(), len(found)


def _says_nothing(prompt: str, found: list[re.Match[str]], numbers: list[int]) -> bool:
    """Tell whether a prompt says the same without its placeholders: they are in the order of the
    pictures, and each stands at an end of the text, or the only one on a line of its own."""
    if numbers != list(range(1, len(found) + 1)):
        return False
    for match in found:
        before = _PLACEHOLDER.sub("", prompt[: match.start()])
        after = _PLACEHOLDER.sub("", prompt[match.end() :])
        leads = not before.strip()
        # Behind a word, it is what a sentence ends with.
        ends = not after.strip() and not before.rstrip(" ")[-1:].isalnum()
        own_line = not before.rpartition("\n")[2].strip() and not after.partition("\n")[0].strip()
        if not (leads or ends or (own_line and len(found) == 1)):
            return False
    return True


def _name(prompt: str, match: re.Match[str], number: int, pictures: int, at: int) -> str:
    """Return the words that stand for a picture inside a text, of which the words before it are
    looked at from a place on."""
    start = match.start()
    name = f"image {number}"
    if pictures == 1:
        name = "image" if _DETERMINER.search(prompt, at, start) else "the image"
    # Written without blanks, it would run into its neighbours.
    head = " " if prompt[max(0, start - 1) : start].isalnum() else ""
    tail = " " if prompt[match.end() : match.end() + 1].isalnum() else ""
    return f"{head}{name}{tail}"
