"""Synthetic pictures: seven toy tasks that a random vision-language model of 0.7 M parameters can
learn.

Invariant: a picture is a function of (kind, seed, split, index, size) alone, so more training
pictures leave the test pictures as they are; every kind looks unlike the others, and no answer of
one kind is an answer of another. Legend: H height and W width of a picture, px.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...errors import DataError
from ..images.boxes import UNITS

SIZE_PX = 64
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 180, 50),
    "blue": (40, 60, 220),
    "yellow": (230, 210, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
PATTERNS = ("rows", "columns", "slanted", "checked")
SIDES = ("left", "right")
_MOST_DOTS = 4

Rgb = tuple[int, int, int]
Drawing = tuple[Image.Image, str]  # and its answer


@dataclass(frozen=True)
class SyntheticWordings:
    """Ways to ask: those seen in training, those held out for the routing set."""

    seen: tuple[str, ...]
    held: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """One toy task."""

    draw: Callable[[random.Random, int], Drawing]
    prompts: SyntheticWordings
    answers: tuple[str, ...]  # every one there is
    ocr: bool = False
    about: str = ""  # what its expert does, for the router's description


def draw(kind: str, rng: random.Random, size_px: int = SIZE_PX) -> Drawing:
    """Return an RGB picture of size_px x size_px and its answer. Raises DataError for an unknown
    kind."""
    return _kind(kind).draw(rng, size_px)


def rows(
    kind: str,
    seed: int,
    counts: Mapping[str, int],
    size_px: int = SIZE_PX,
) -> Iterator[dict]:
    """Yield {id, image, prompt, answer, split, boxes}, for each split as many as counts says.

    The prompt is one of the kind's seen wordings; boxes are in pixels. Raises DataError for an
    unknown kind.
    """
    prompts = _kind(kind).prompts.seen
    for split, count in counts.items():
        for index in range(count):
            # A generator for each picture: one that ran through all of them would make every
            # later picture another when a split grows.
            rng = random.Random(f"{kind}:{seed}:{split}:{index}")
            image, answer = draw(kind, rng, size_px)
            yield {
                "id": f"{kind}-{seed}-{split}-{index}",
                "image": image,
                "prompt": rng.choice(prompts),
                "answer": answer,
                "split": split,
                "boxes": _boxes(kind, answer, size_px),
            }


def corpus() -> list[str]:
    """Return every prompt and answer there is, for a tokenizer that knows their words."""
    prompts: list[str] = []
    answers: list[str] = []
    for wordings in (NEUTRAL, *(kind.prompts for kind in KINDS.values())):
        prompts += wordings.seen
        prompts += wordings.held
    for kind in KINDS.values():
        answers += kind.answers
    # Often enough that byte pairs of an answer are merged until it is a token by itself.
    return prompts + answers * 5


def _kind(name: str) -> Kind:
    try:
        return KINDS[name]
    except KeyError:
        raise DataError(
            f"there is no synthetic kind {name!r}; dataset.synthetic.kind is one of "
            f"{', '.join(KINDS)}"
        ) from None


def _boxes(kind: str, answer: str, size_px: int) -> list[dict]:
    if kind != "locate":
        return []
    corners = []
    for number in answer.strip("[]").split(","):
        corners.append(int(number) * size_px / UNITS)
    return [{"bbox": corners, "label": "square"}]


def _light(rng: random.Random, size_px: int) -> Image.Image:
    return _paper(rng, size_px, 150, 255)


def _dark(rng: random.Random, size_px: int) -> Image.Image:
    return _paper(rng, size_px, 20, 70)


def _paper(rng: random.Random, size_px: int, darkest: int, lightest: int) -> Image.Image:
    """Return a grey sheet with grain, so that no two pictures are equal."""
    # numpy's generator has a seed from ours, so that a picture depends on one number.
    grain_rng = np.random.default_rng(rng.getrandbits(32))
    grain_HW3 = grain_rng.integers(-8, 9, (size_px, size_px, 3))
    grey = rng.randint(darkest, lightest)
    return Image.fromarray((grey + grain_HW3).clip(0, 255).astype(np.uint8))


def _near(rng: random.Random, color: Rgb) -> Rgb:
    """Return a colour like this one: a model should learn the name and not a number."""
    red, green, blue = (max(0, min(255, part + rng.randint(-20, 20))) for part in color)
    return red, green, blue


def _grey(rng: random.Random, darkest: int, lightest: int) -> Rgb:
    level = rng.randint(darkest, lightest)
    return level, level, level


def _square(x: int, y: int, radius: int) -> list[int]:
    """Return left, top, right and bottom of a square around a point, as Pillow takes them."""
    return [x - radius, y - radius, x + radius, y + radius]


# In each of these the order of the calls of rng is part of the data: another order makes other
# pictures of the same seed.


def _color(rng: random.Random, size_px: int) -> Drawing:
    sheet = _light(rng, size_px)
    pen = ImageDraw.Draw(sheet)
    name = rng.choice(list(COLORS))
    radius = rng.randint(size_px // 6, size_px // 3)
    x = rng.randint(radius, size_px - radius)
    y = rng.randint(radius, size_px - radius)
    # Round or square by chance, so that the outline says nothing of the colour.
    paint = rng.choice((pen.ellipse, pen.rectangle))
    paint(_square(x, y, radius), fill=_near(rng, COLORS[name]))
    return sheet, name


def _digits(rng: random.Random, size_px: int) -> Drawing:
    sheet = _light(rng, size_px)
    pen = ImageDraw.Draw(sheet)
    digit = str(rng.randrange(10))
    font = ImageFont.load_default(size=int(size_px * 0.8))
    # A font's box does not start at its origin, so both of its edges enter the middle.
    left, top, right, bottom = pen.textbbox((0, 0), digit, font=font)
    shake = size_px // 32
    x = (size_px - right - left) // 2 + rng.randint(-shake, shake)
    y = (size_px - bottom - top) // 2 + rng.randint(-shake, shake)
    pen.text((x, y), digit, font=font, fill=_grey(rng, 0, 60))
    return sheet, digit


def _count(rng: random.Random, size_px: int) -> Drawing:
    sheet = _light(rng, size_px)
    pen = ImageDraw.Draw(sheet)
    number = rng.randint(1, _MOST_DOTS)
    cell = size_px // 3
    radius = cell // 3
    # One dot to a cell of three by three: dots that touch could not be counted.
    for place in rng.sample(range(9), number):
        row, column = divmod(place, 3)
        x = column * cell + cell // 2 + rng.randint(-2, 2)
        y = row * cell + cell // 2 + rng.randint(-2, 2)
        pen.ellipse(_square(x, y, radius), fill=(20, 20, 20))
    return sheet, _dots(number)


def _dots(number: int) -> str:
    # With the word: a bare number would also be an answer of `digits`.
    return f"{number} dots" if number > 1 else "1 dot"


def _locate(rng: random.Random, size_px: int) -> Drawing:
    sheet = _light(rng, size_px)
    pen = ImageDraw.Draw(sheet)
    column = rng.randrange(2)
    row = rng.randrange(2)
    half = size_px // 2
    edge = size_px // 16
    left = column * half + edge
    top = row * half + edge
    right = (column + 1) * half - edge
    bottom = (row + 1) * half - edge
    pen.rectangle([left, top, right, bottom], fill=_grey(rng, 0, 90))
    return sheet, _quadrant(column, row)


def _quadrant(column: int, row: int) -> str:
    """Return the answer of `locate`: the quarter of the picture, one of four texts that a small
    model can learn by heart."""
    half = UNITS // 2
    left = column * half
    top = row * half
    return f"[{left},{top},{left + half},{top + half}]"


def _shape(rng: random.Random, size_px: int) -> Drawing:
    sheet = _dark(rng, size_px)
    pen = ImageDraw.Draw(sheet)
    name = rng.choice(SHAPES)
    radius = rng.randint(size_px // 4, size_px * 3 // 8)
    shake = size_px // 16
    x = size_px // 2 + rng.randint(-shake, shake)
    y = size_px // 2 + rng.randint(-shake, shake)
    ink = _grey(rng, 220, 255)
    width = size_px // 16
    match name:
        case "circle":
            pen.ellipse(_square(x, y, radius), outline=ink, width=width)
        case "square":
            pen.rectangle(_square(x, y, radius), outline=ink, width=width)
        case "triangle":
            tip = (x, y - radius)
            right = (x + radius, y + radius)
            left = (x - radius, y + radius)
            pen.line([tip, right, left, tip], fill=ink, width=width, joint="curve")
        case "cross":
            pen.line([(x, y - radius), (x, y + radius)], fill=ink, width=width)
            pen.line([(x - radius, y), (x + radius, y)], fill=ink, width=width)
    return sheet, name


def _compare(rng: random.Random, size_px: int) -> Drawing:
    sheet = _light(rng, size_px)
    pen = ImageDraw.Draw(sheet)
    short = rng.randint(size_px // 8, size_px // 2)
    # A fifth of the picture apart at least: what is asked is which side, not how sharp the eye is.
    tall = rng.randint(short + size_px // 5, size_px - size_px // 8)
    side = rng.randrange(2)
    half_width = size_px // 3 // 2
    heights = (tall, short) if side == 0 else (short, tall)
    for column, height in enumerate(heights):
        x = size_px // 4 + column * size_px // 2
        corners = [x - half_width, size_px - height, x + half_width, size_px]
        pen.rectangle(corners, fill=_near(rng, (220, 120, 200)))
    return sheet, SIDES[side]


def _pattern(rng: random.Random, size_px: int) -> Drawing:
    sheet = _dark(rng, size_px)
    name = rng.choice(PATTERNS)
    pitch = rng.randint(size_px // 8, size_px // 5)
    phase = rng.randrange(pitch)
    y_HW, x_HW = np.mgrid[:size_px, :size_px] + phase
    match name:
        case "rows":
            stripe_HW = y_HW // pitch
        case "columns":
            stripe_HW = x_HW // pitch
        case "slanted":
            stripe_HW = (x_HW + y_HW) // pitch
        case _:
            stripe_HW = x_HW // pitch + y_HW // pitch
    on_HW = stripe_HW % 2
    mask = Image.fromarray((on_HW * 255).astype(np.uint8))
    sheet.paste(_near(rng, (230, 230, 230)), (0, 0, size_px, size_px), mask)
    return sheet, name


NEUTRAL = SyntheticWordings(
    seen=("What do you see?", "Look at the image and answer.", "What is in the image?"),
    held=("What do you see in the image?", "Answer for the image."),
)
# What teaches an expert is apart from what tests the router: `held` is asked in test_held alone.
KINDS = {
    "color": Kind(
        draw=_color,
        prompts=SyntheticWordings(
            seen=(
                "What color is the shape?",
                "Name the color of the object.",
                "Which color do you see?",
            ),
            held=(
                "Tell me the color of the shape.",
                "What is the color of the object?",
            ),
        ),
        answers=tuple(COLORS),
        about="names the color of a shape",
    ),
    "digits": Kind(
        draw=_digits,
        prompts=SyntheticWordings(
            seen=(
                "Read the digit.",
                "What does the image say?",
                "Transcribe the text in the image.",
            ),
            held=(
                "Read what the image says.",
                "Which digit is in the text?",
            ),
        ),
        answers=tuple("0123456789"),
        ocr=True,
        about="reads a printed digit",
    ),
    "count": Kind(
        draw=_count,
        prompts=SyntheticWordings(
            seen=(
                "How many dots are there?",
                "Count the dots.",
                "Give the number of dots.",
            ),
            held=(
                "Give the count of the dots.",
                "How many dots do you see?",
            ),
        ),
        answers=tuple(_dots(number) for number in range(1, _MOST_DOTS + 1)),
        about="counts dots",
    ),
    "locate": Kind(
        draw=_locate,
        prompts=SyntheticWordings(
            seen=(
                "Find the square.",
                "Where is the square?",
                "Locate the square.",
            ),
            held=(
                "Where do you see the square?",
                "Give the place of the square.",
            ),
        ),
        answers=tuple(_quadrant(column, row) for row in range(2) for column in range(2)),
        about="gives the box of a square, in thousandths of the image",
    ),
    "shape": Kind(
        draw=_shape,
        prompts=SyntheticWordings(
            seen=(
                "What outline is drawn?",
                "Name the outline.",
                "Which figure is drawn in white?",
            ),
            held=(
                "Tell me the name of the outline.",
                "What figure is the outline?",
            ),
        ),
        answers=SHAPES,
        about="names the outline that is drawn",
    ),
    "compare": Kind(
        draw=_compare,
        prompts=SyntheticWordings(
            seen=(
                "Which bar is taller?",
                "Compare the two bars.",
                "On which side is the taller bar?",
            ),
            held=(
                "Tell me which bar is taller.",
                "Is the left or the right bar taller?",
            ),
        ),
        answers=SIDES,
        about="says which of two bars is taller",
    ),
    "pattern": Kind(
        draw=_pattern,
        prompts=SyntheticWordings(
            seen=(
                "What pattern is this?",
                "Name the pattern.",
                "How do the stripes run?",
            ),
            held=(
                "Tell me the pattern.",
                "Which way do the stripes run?",
            ),
        ),
        answers=PATTERNS,
        about="names the pattern of stripes",
    ),
}
