"""Toy pictures drawn with Pillow: seven tasks that a random vision-language model of 0.7 M
parameters can learn.

Invariant: a drawing is a function of (kind, seed, split, index, size) alone, so more training
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


@dataclass(frozen=True)
class SyntheticWordings:
    """Ways to ask: those seen in training, those held out for the routing set."""

    seen: tuple[str, ...]
    held: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """One toy task."""

    drawer: Callable[[random.Random, int], tuple[Image.Image, str]]
    prompts: SyntheticWordings
    answers: tuple[str, ...]  # every one there is
    ocr: bool = False
    about: str = ""  # what its expert does, for the router's description


def draw(kind: str, rng: random.Random, size: int = SIZE_PX) -> tuple[Image.Image, str]:
    """Return an RGB picture of size x size px and its answer. Raises DataError for an unknown kind."""
    return _kind(kind).drawer(rng, size)


def rows(kind: str, seed: int, counts: Mapping[str, int], size: int = SIZE_PX) -> Iterator[dict]:
    """Yield {id, image, prompt, answer, split, boxes}, for each split as many as counts says.

    The prompt is one of the kind's seen wordings; boxes are in pixels. Raises DataError for an
    unknown kind.
    """
    prompts = _kind(kind).prompts.seen
    for split, count in counts.items():
        for index in range(count):
            rng = random.Random(f"{kind}:{seed}:{split}:{index}")
            image, answer = draw(kind, rng, size)
            row = {
                "id": f"{kind}-{seed}-{split}-{index}",
                "image": image,
                "prompt": rng.choice(prompts),
            }
            yield row | {"answer": answer, "split": split, "boxes": _boxes(kind, answer, size)}


def corpus() -> list[str]:
    """Return every prompt and answer there is, for a tokenizer that knows their words."""
    wordings = [NEUTRAL, *(kind.prompts for kind in KINDS.values())]
    prompts = [text for wording in wordings for text in (*wording.seen, *wording.held)]
    answers = [answer for kind in KINDS.values() for answer in kind.answers]
    return prompts + answers * 5  # often enough to become whole tokens


def _kind(name: str) -> Kind:
    try:
        return KINDS[name]
    except KeyError:
        raise DataError(
            f"there is no synthetic kind {name!r}; dataset.synthetic.kind is one of {', '.join(KINDS)}"
        ) from None


def _boxes(kind: str, answer: str, size: int) -> list[dict]:
    if kind != "locate":
        return []
    corners = [int(n) * size / UNITS for n in answer.strip("[]").split(",")]
    return [{"bbox": corners, "label": "square"}]


def _paper(rng: random.Random, size: int, low: int, high: int) -> Image.Image:
    """Return a grey sheet with grain, so that no two pictures are equal."""
    grain = np.random.default_rng(rng.getrandbits(32)).integers(-8, 9, (size, size, 3))
    return Image.fromarray((rng.randint(low, high) + grain).clip(0, 255).astype(np.uint8))


def _light(rng: random.Random, size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = _paper(rng, size, 150, 255)
    return sheet, ImageDraw.Draw(sheet)


def _dark(rng: random.Random, size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = _paper(rng, size, 20, 70)
    return sheet, ImageDraw.Draw(sheet)


def _near(rng: random.Random, color: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(max(0, min(255, part + rng.randint(-20, 20))) for part in color)


def _color(rng: random.Random, size: int) -> tuple[Image.Image, str]:
    sheet, pen = _light(rng, size)
    name = rng.choice(list(COLORS))
    radius = rng.randint(size // 6, size // 3)
    x, y = rng.randint(radius, size - radius), rng.randint(radius, size - radius)
    fill = rng.choice((pen.ellipse, pen.rectangle))
    fill([x - radius, y - radius, x + radius, y + radius], fill=_near(rng, COLORS[name]))
    return sheet, name


def _digits(rng: random.Random, size: int) -> tuple[Image.Image, str]:
    sheet, pen = _light(rng, size)
    digit, font = str(rng.randrange(10)), ImageFont.load_default(size=int(size * 0.8))
    left, top, right, bottom = pen.textbbox((0, 0), digit, font=font)
    shake = size // 32
    x = (size - right - left) // 2 + rng.randint(-shake, shake)
    y = (size - bottom - top) // 2 + rng.randint(-shake, shake)
    pen.text((x, y), digit, font=font, fill=(rng.randint(0, 60),) * 3)
    return sheet, digit


def _count(rng: random.Random, size: int) -> tuple[Image.Image, str]:
    sheet, pen = _light(rng, size)
    number, cell = rng.randint(1, _MOST_DOTS), size // 3
    radius = cell // 3
    for place in rng.sample(range(9), number):
        x = place % 3 * cell + cell // 2 + rng.randint(-2, 2)
        y = place // 3 * cell + cell // 2 + rng.randint(-2, 2)
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(20, 20, 20))
    return sheet, _dots(number)


def _dots(number: int) -> str:
    return f"{number} dots" if number > 1 else "1 dot"


def _locate(rng: random.Random, size: int) -> tuple[Image.Image, str]:
    sheet, pen = _light(rng, size)
    column, row, half = rng.randrange(2), rng.randrange(2), size // 2
    edge = size // 16
    corners = [
        column * half + edge,
        row * half + edge,
        (column + 1) * half - edge,
        (row + 1) * half - edge,
    ]
    pen.rectangle(corners, fill=(rng.randint(0, 90),) * 3)
    return sheet, _quadrant(column, row)


def _quadrant(column: int, row: int) -> str:
    half = UNITS // 2
    return f"[{column * half},{row * half},{(column + 1) * half},{(row + 1) * half}]"


def _shape(rng: random.Random, size: int) -> tuple[Image.Image, str]:
    sheet, pen = _dark(rng, size)
    name, radius = rng.choice(SHAPES), rng.randint(size // 4, size * 3 // 8)
    shake = size // 16
    x, y = (size // 2 + rng.randint(-shake, shake) for _ in range(2))
    ink, width = (rng.randint(220, 255),) * 3, size // 16
    around = [x - radius, y - radius, x + radius, y + radius]
    match name:
        case "circle":
            pen.ellipse(around, outline=ink, width=width)
        case "square":
            pen.rectangle(around, outline=ink, width=width)
        case "triangle":
            corners = [
                (x, y - radius),
                (x + radius, y + radius),
                (x - radius, y + radius),
                (x, y - radius),
            ]
            pen.line(corners, fill=ink, width=width, joint="curve")
        case "cross":
            pen.line([(x, y - radius), (x, y + radius)], fill=ink, width=width)
            pen.line([(x - radius, y), (x + radius, y)], fill=ink, width=width)
    return sheet, name


def _compare(rng: random.Random, size: int) -> tuple[Image.Image, str]:
    sheet, pen = _light(rng, size)
    short = rng.randint(size // 8, size // 2)
    tall = rng.randint(short + size // 5, size - size // 8)
    side, third = rng.randrange(2), size // 3
    heights = (tall, short) if side == 0 else (short, tall)
    for column, height in enumerate(heights):
        x, ink = size // 4 + column * size // 2, _near(rng, (220, 120, 200))
        pen.rectangle([x - third // 2, size - height, x + third // 2, size], fill=ink)
    return sheet, SIDES[side]


def _pattern(rng: random.Random, size: int) -> tuple[Image.Image, str]:
    sheet = _paper(rng, size, 20, 70)
    name, pitch = rng.choice(PATTERNS), rng.randint(size // 8, size // 5)
    phase = rng.randrange(pitch)
    y_HW, x_HW = np.mgrid[:size, :size] + phase
    on_HW = {
        "rows": y_HW // pitch % 2,
        "columns": x_HW // pitch % 2,
        "slanted": (x_HW + y_HW) // pitch % 2,
        "checked": (x_HW // pitch + y_HW // pitch) % 2,
    }[name]
    mask = Image.fromarray((on_HW * 255).astype(np.uint8))
    sheet.paste(_near(rng, (230, 230, 230)), (0, 0, size, size), mask)
    return sheet, name


NEUTRAL = SyntheticWordings(
    seen=("What do you see?", "Look at the image and answer.", "What is in the image?"),
    held=("What do you see in the image?", "Answer for the image."),
)
KINDS = {
    "color": Kind(
        _color,
        SyntheticWordings(
            (
                "What color is the shape?",
                "Name the color of the object.",
                "Which color do you see?",
            ),
            ("Tell me the color of the shape.", "What is the color of the object?"),
        ),
        tuple(COLORS),
        about="names the color of a shape",
    ),
    "digits": Kind(
        _digits,
        SyntheticWordings(
            ("Read the digit.", "What does the image say?", "Transcribe the text in the image."),
            ("Read what the image says.", "Which digit is in the text?"),
        ),
        tuple("0123456789"),
        ocr=True,
        about="reads a printed digit",
    ),
    "count": Kind(
        _count,
        SyntheticWordings(
            ("How many dots are there?", "Count the dots.", "Give the number of dots."),
            ("Give the count of the dots.", "How many dots do you see?"),
        ),
        tuple(_dots(number) for number in range(1, _MOST_DOTS + 1)),
        about="counts dots",
    ),
    "locate": Kind(
        _locate,
        SyntheticWordings(
            ("Find the square.", "Where is the square?", "Locate the square."),
            ("Where do you see the square?", "Give the place of the square."),
        ),
        tuple(_quadrant(column, row) for row in range(2) for column in range(2)),
        about="gives the box of a square, in thousandths of the image",
    ),
    "shape": Kind(
        _shape,
        SyntheticWordings(
            ("What outline is drawn?", "Name the outline.", "Which figure is drawn in white?"),
            ("Tell me the name of the outline.", "What figure is the outline?"),
        ),
        SHAPES,
        about="names the outline that is drawn",
    ),
    "compare": Kind(
        _compare,
        SyntheticWordings(
            ("Which bar is taller?", "Compare the two bars.", "On which side is the taller bar?"),
            ("Tell me which bar is taller.", "Is the left or the right bar taller?"),
        ),
        SIDES,
        about="says which of two bars is taller",
    ),
    "pattern": Kind(
        _pattern,
        SyntheticWordings(
            ("What pattern is this?", "Name the pattern.", "How do the stripes run?"),
            ("Tell me the pattern.", "Which way do the stripes run?"),
        ),
        PATTERNS,
        about="names the pattern of stripes",
    ),
}
