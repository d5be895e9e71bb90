"""A text on its way to a terminal, a file or another program: in colours, plain, or as lines of
JSON."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..engine import top_name
from ..generation import Finish, Generation, Piece, Token
from ..told import DIGITS
from .speaking import legend, print_runs, printable, shares, styles, who_answers


class Drawing(ABC):
    """Shows texts, one after another."""

    def __init__(self, speakers: Sequence[str]):
        self.speakers = tuple(speakers)
        self.tokens: list[Token] = []  # of the text that is shown now
        self.text = ""
        self.finish: Finish | None = None
        self.reader = ""

    def begin(self, reader: str, heading: bool) -> None:
        """Begin with another text, of a reader; with a heading, where several are compared."""
        self.tokens = []
        self.text = ""
        self.finish = None
        self.reader = reader
        if heading:
            self.head(reader)

    def add(self, piece: Piece) -> None:
        """Show a piece at once."""
        self.text += piece.text
        self.finish = piece.finish
        if piece.token is not None:
            self.tokens.append(piece.token)
        self.draw(piece)

    @abstractmethod
    def head(self, reader: str) -> None:
        """Say whose text follows."""

    @abstractmethod
    def draw(self, piece: Piece) -> None:
        """Show a piece."""

    @abstractmethod
    def break_off(self) -> None:
        """Leave a text that something went wrong with, or nobody waits for."""

    @abstractmethod
    def end(self, generation: Generation, seed: int | None) -> None:
        """End a text, whole or given up; `seed` is what it was drawn with."""


class Coloured(Drawing):
    """Each token in the colour of the expert with the most weight, and a legend at the end."""

    def __init__(self, console: Console, speakers: Sequence[str], experts: bool):
        super().__init__(speakers)
        self.console = console
        self.experts = experts
        self.colours = styles(speakers)

    def head(self, reader: str) -> None:
        """Say whose text follows."""
        self.console.out(f"\n{reader}", style="bold", highlight=False)

    def draw(self, piece: Piece) -> None:
        """Show a piece in its expert's colour."""
        style = None
        if piece.token is not None:
            # of a dense model nobody's, in the terminal's own colour as the base's
            style = self.colours.get(top_name(piece.token, self.speakers) or "") or None
        shown = printable(piece.text, self.console.encoding)
        if shown:
            self.console.out(shown, style=style, end="", highlight=False)
            self.console.file.flush()

    def break_off(self) -> None:
        """End the line."""
        if self.text and not self.text.endswith("\n"):
            self.console.out("")

    def end(self, generation: Generation, seed: int | None) -> None:
        """End the line, and say which colour is whose."""
        if not self.text.endswith("\n"):
            self.console.out("")
        if shares(self.tokens, self.speakers):
            self.console.print(legend(self.tokens, self.speakers, self.console.encoding))
        told = [who_answers(generation), "" if seed is None else f"seed {seed}"]
        if any(told):
            line = "; ".join(filter(None, told))
            self.console.out(printable(line, self.console.encoding), style="dim", highlight=False)
        if self.experts:
            print_runs(self.console, self.tokens, self.speakers)


class Plain(Drawing):
    """The text alone; with `experts`, tables behind it."""

    def __init__(self, console: Console, speakers: Sequence[str], experts: bool):
        super().__init__(speakers)
        self.console = console
        self.experts = experts

    def head(self, reader: str) -> None:
        """Say whose text follows."""
        self._write(f"== {reader} ==\n")

    def draw(self, piece: Piece) -> None:
        """Write a piece."""
        self._write(piece.text)

    def break_off(self) -> None:
        """End the line."""
        if self.text and not self.text.endswith("\n"):
            self._write("\n")

    def end(self, generation: Generation, seed: int | None) -> None:
        """End the line; say who spoke, where that was asked for."""
        if not self.text.endswith("\n"):
            self._write("\n")
        if not self.experts:
            return
        told = [who_answers(generation), "" if seed is None else f"seed {seed}"]
        for line in filter(None, told):
            self._write(f"{line}\n")
        print_runs(self.console, self.tokens, self.speakers)

    def _write(self, text: str) -> None:
        encoding = self.console.encoding
        # A terminal without colours is one all the same; a file has the text as it is
        if self.console.is_terminal:
            text = printable(text, encoding)
        _write(self.console, text.encode(encoding, "replace").decode(encoding))


class TokenLines(Drawing):
    """A line of JSON for each token, and one for the end of each text."""

    def __init__(self, console: Console, speakers: Sequence[str]):
        super().__init__(speakers)
        self.console = console

    def head(self, reader: str) -> None:
        """Say nothing: each line names the reader."""

    def draw(self, piece: Piece) -> None:
        """Write a token with its experts, by layer."""
        token = piece.token
        if token is None:
            return
        names = [[self.speakers[number] for number in layer] for layer in token.experts]
        weights = []
        for layer in token.weights:
            weights.append([round(weight, DIGITS) for weight in layer])
        line = {
            "reader": self.reader,
            "text": piece.text,
            "id": token.id,
            "expert": top_name(token, self.speakers),
            "experts": names,
            "weights": weights,
        }
        self._write(line)

    def break_off(self) -> None:
        """Write nothing: a text without its last line is not whole."""

    def end(self, generation: Generation, seed: int | None) -> None:
        """Write how the text ended and who spoke how much of it."""
        line: dict[str, Any] = {
            "reader": self.reader,
            "finish": self.finish,
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "seed": seed,
            "shares": self._shares(),
        }
        choice = generation.choice
        if choice is not None:
            line["choice"] = {
                "expert": choice.expert,
                "confidence": round(choice.confidence, DIGITS),
                "answered_by": generation.reader,
            }
        self._write(line)

    def _shares(self) -> dict[str, dict[str, float]]:
        out = {}
        for name, of_tokens, weight in shares(self.tokens, self.speakers):
            out[name] = {"share": round(of_tokens, DIGITS), "weight": round(weight, DIGITS)}
        return out

    def _write(self, line: dict[str, Any]) -> None:
        # In ASCII, which any locale can write
        _write(self.console, f"{json.dumps(line)}\n")


def drawing(console: Console, speakers: Sequence[str], experts: bool, as_json: bool) -> Drawing:
    """Return how texts are shown on a console: in colours where it has any."""
    if as_json:
        return TokenLines(console, speakers)
    # NO_COLOR, or TERM=dumb
    if console.is_terminal and not console.no_color and console.color_system:
        return Coloured(console, speakers, experts)
    return Plain(console, speakers, experts)


def _write(console: Console, text: str) -> None:
    """Write text at once, past what rich makes of it. Raises SystemExit where nobody reads any
    more, as rich does."""
    try:
        console.file.write(text)
        console.file.flush()
    except BrokenPipeError:
        console.on_broken_pipe()
