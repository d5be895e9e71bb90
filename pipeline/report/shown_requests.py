"""Requests as a report on them shows some: with their pictures, where they went, what was answered.

Pictures are small copies inside the page; the schema takes nothing else for one.
"""

from dataclasses import dataclass

from .format import fixed, share
from .schema.requests import RequestReport, ShownRequest


@dataclass(frozen=True)
class CardLine:
    """A line of a card: what it is, what is told, something smaller beside it, how it stands
    out."""

    name: str
    text: str
    small: str = ""
    tone: str = ""  # good, bad or nothing


@dataclass(frozen=True)
class Card:
    """A request with what was made of it."""

    prompt: str
    pictures: tuple[str, ...]
    lines: tuple[CardLine, ...]
    note: str


@dataclass(frozen=True)
class RequestCards:
    """RequestCards with a heading, and how to read them."""

    title: str
    cards: tuple[Card, ...]
    reading: str


def misrouted(report: RequestReport) -> RequestCards:
    """Return requests that went to another than their own expert."""
    cards = []
    for request in report.misrouted:
        lines = (
            CardLine("belongs to", request.own),
            CardLine("sent to", request.choice, f"{share(request.confidence)} sure", "bad"),
        )
        cards.append(_card(request, lines))
    return RequestCards(
        title="Requests that went elsewhere",
        cards=tuple(cards),
        reading=(
            "Of each set the test requests that the router sent to a wrong expert and was most "
            "sure of."
        ),
    )


def examples(report: RequestReport) -> RequestCards:
    """Return requests with the right answer, and what the stack and others answered."""
    cards = []
    for request in report.examples:
        lines = [CardLine("right", request.right)]
        for given in request.answers:
            name = given.way if given.way == given.by else f"{given.way} ({given.by})"
            lines.append(CardLine(name, given.text, fixed(given.score)))
        cards.append(_card(request, tuple(lines)))
    return RequestCards(
        title="Some answers",
        cards=tuple(cards),
        reading=(
            "The first test requests of each task, chosen by nobody; the number is the answer's "
            "score. To look at, not to judge by."
        ),
    )


def _card(request: ShownRequest, lines: tuple[CardLine, ...]) -> Card:
    return Card(request.prompt, request.pictures, lines, f"{request.own}, {request.set}")
