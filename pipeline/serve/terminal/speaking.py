"""Who speaks, for a terminal: the colours of experts, a legend, runs of tokens, and plain words
where there are no colours."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...report.format import share
from ...report.narrow import print_table
from ..engine import expert_shares, top_name
from ..generation import BASE_READER, Generation, Token

# A terminal has its own shades of them, for light and dark
COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_magenta")
# Of further experts in the same colours
MARKS = ("", "underline", "bold", "bold underline")
KEY = "■"
LINE_BREAK = "⏎"
NOBODY = "no expert"  # of a dense model
KEPT = "\n\t"  # of control characters


@dataclass(frozen=True)
class Run:
    """Tokens of a text, one after another, with one expert that has the most weight in each."""

    expert: str
    tokens: int
    text: str


def styles(speakers: Sequence[str]) -> dict[str, str]:
    """Return rich's style of each speaker; the base has the terminal's own colour."""
    out = {}
    for number, name in enumerate(speakers):
        mark = MARKS[number // len(COLOURS) % len(MARKS)]
        colour = COLOURS[number % len(COLOURS)]
        out[name] = "" if name == BASE_READER else f"{mark} {colour}".strip()
    return out


def printable(text: str, encoding: str) -> str:
    """Return text without what a terminal takes for a command, in what the encoding can say."""
    kept = []
    for character in text:
        unsafe = unicodedata.category(character) in ("Cc", "Cs") and character not in KEPT
        kept.append("?" if unsafe else character)
    return "".join(kept).encode(encoding, "replace").decode(encoding)


def runs(tokens: Iterable[Token], speakers: Sequence[str]) -> list[Run]:
    """Return a text's tokens as runs of one expert."""
    out: list[Run] = []
    for token in tokens:
        expert = top_name(token, speakers) or NOBODY
        if out and out[-1].expert == expert:
            last = out.pop()
            out.append(Run(expert, last.tokens + 1, last.text + token.text))
        else:
            out.append(Run(expert, 1, token.text))
    return out


def shares(tokens: Sequence[Token], speakers: Sequence[str]) -> list[tuple[str, float, float]]:
    """Return who speaks, with its share of all assignments and its mean weight, the greatest
    first; whoever has none is left out."""
    found = expert_shares(tokens, len(speakers))
    named = []
    for name, each in zip(speakers, found, strict=True):
        if each["share"]:
            named.append((name, each["share"], each["weight"]))
    # stable: of equal ones the first in the stack
    return sorted(named, key=lambda each: -each[2])


def legend(tokens: Sequence[Token], speakers: Sequence[str], encoding: str) -> Text:
    """Return a line that says which colour is whose, and each one's part of the text by weight."""
    colours = styles(speakers)
    out = Text()
    for name, _, weight in shares(tokens, speakers):
        if out:
            out.append("  ")
        out.append(printable(KEY, encoding), style=colours[name])
        out.append(f" {printable(name, encoding)} {share(weight)}")
    return out


def who_answers(generation: Generation) -> str:
    """Return in words whom a router chose for the whole text; empty where it chose by token, or
    somebody was named."""
    choice = generation.choice
    if choice is None or generation.prompt.reader is not None:
        return ""
    others = []
    for name, probability in choice.alternatives[1:3]:
        others.append(f"{name} {share(probability)}")
    beside = f"; then {', '.join(others)}" if others else ""
    reader = generation.reader or choice.expert
    sure = f"{share(choice.confidence)} sure of {choice.expert}"
    return f"{reader} answers; the router is {sure}{beside}"


def print_runs(console: Console, tokens: Sequence[Token], speakers: Sequence[str]) -> None:
    """Print who spoke which part of a text, and each one's share, as two tables."""
    encoding = console.encoding
    spoken = Table(title="who spoke", title_justify="left")
    spoken.add_column("expert", overflow="fold")
    spoken.add_column("tokens", justify="right")
    spoken.add_column("text", overflow="fold")
    for run in runs(tokens, speakers):
        shown = printable(run.text, encoding).replace("\n", printable(LINE_BREAK, encoding))
        # Text, as brackets in it are no markup
        spoken.add_row(Text(printable(run.expert, encoding)), str(run.tokens), Text(shown))
    parts = Table(title="shares", title_justify="left")
    parts.add_column("expert", overflow="fold")
    parts.add_column("of tokens and layers", justify="right")
    parts.add_column("by weight", justify="right")
    for name, of_tokens, of_weight in shares(tokens, speakers):
        row = (share(of_tokens, 1), share(of_weight, 1))
        parts.add_row(Text(printable(name, encoding)), *row)
    for table in (spoken, parts):
        print_table(console, table)
