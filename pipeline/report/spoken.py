"""Texts in the colours of who speaks them: what is drawn, and with which classes of the style
sheet."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .format import share
from .language import continuations
from .schema.language import Continuation, LanguageReport, Span

PLAIN = "plain"  # how the key of whoever has no colour looks
COLOURS = 8  # of the style sheet, c0 to c7
# Of further experts in the same colours
LINES = ("", "dotted", "double")


@dataclass(frozen=True)
class Said:
    """A piece of a text, and who speaks it; no look: in the colour of the page."""

    text: str
    speaker: str = ""
    look: str = ""


@dataclass(frozen=True)
class SpeakerShare:
    """A speaker, how its pieces look, and its share of a text's tokens where one is told."""

    name: str
    look: str
    share: str = ""


@dataclass(frozen=True)
class Passage:
    """A text, and how much of it each speaker has."""

    said: tuple[Said, ...]
    goes_on: bool
    speakers: tuple[SpeakerShare, ...]


@dataclass(frozen=True)
class WrittenPassage:
    """What one writer wrote after a beginning."""

    writer: str
    said: tuple[Said, ...]
    speakers: tuple[SpeakerShare, ...] = ()
    main: bool = False


@dataclass(frozen=True)
class Beginning:
    """A beginning of a text, and everything that was written after it."""

    domain: str
    prompt: str
    written: tuple[WrittenPassage, ...]


def looks(report: LanguageReport) -> dict[str, str]:
    """Return the classes of each expert, in the stack's order; whoever is none of them, the base,
    has the page's colour."""
    out = {}
    for number, name in enumerate(report.experts):
        line = LINES[number // COLOURS % len(LINES)]
        out[name] = f"c{number % COLOURS} {line}".rstrip()
    return out


def speakers(report: LanguageReport) -> tuple[SpeakerShare, ...]:
    """Return who speaks in any text of a report, in the stack's order, the base last."""
    heard: set[str] = set()
    for sample in report.samples:
        heard |= {span.speaker for span in sample.spans}
    for text in report.continuations:
        heard |= {span.speaker for span in text.spans}
    return _in_order(looks(report), heard)


def samples(report: LanguageReport) -> dict[str, list[Passage]]:
    """Return by domain held-out texts with who read each token."""
    colours = looks(report)
    out: dict[str, list[Passage]] = {}
    for sample in report.samples:
        said = _said(sample.spans, colours)
        passage = Passage(said, sample.goes_on, _shares(sample.spans, colours))
        out.setdefault(sample.domain, []).append(passage)
    return out


def beginnings(report: LanguageReport) -> list[Beginning]:
    """Return the beginnings of held-out texts, with how the text and the networks go on."""
    return [_beginning(report, text) for text in report.continuations]


def continuations_reading(report: LanguageReport) -> str:
    """Return how to read `beginnings`."""
    reading = continuations(report).reading
    coloured = any(text.spans for text in report.continuations)
    return f"{reading} The stack's are coloured by who chose each token." if coloured else reading


def _beginning(report: LanguageReport, text: Continuation) -> Beginning:
    stack = report.stack
    colours = looks(report)
    written = [WrittenPassage("as it was written", (Said(text.held_out),))]
    for each in text.written:
        main = stack is not None and each.row == stack.name
        if main and text.spans:
            said = _said(text.spans, colours)
            shares = _shares(text.spans, colours)
            written.append(WrittenPassage(each.row, said, shares, main))
        else:
            written.append(WrittenPassage(each.row, (Said(each.text),), main=main))
    return Beginning(text.domain, text.prompt, tuple(written))


def _said(spans: Iterable[Span], colours: dict[str, str]) -> tuple[Said, ...]:
    return tuple(Said(each.text, each.speaker, colours.get(each.speaker, "")) for each in spans)


def _shares(spans: Sequence[Span], colours: dict[str, str]) -> tuple[SpeakerShare, ...]:
    """Return the speakers of a text with their shares of its tokens, the greatest first."""
    tokens: dict[str, int] = {}
    for span in spans:
        tokens[span.speaker] = tokens.get(span.speaker, 0) + span.tokens
    total = sum(tokens.values())
    out = []
    for speaker in _in_order(colours, tokens):
        part = share(tokens[speaker.name] / total) if total else ""
        out.append(SpeakerShare(speaker.name, speaker.look, part))
    # stable: of equal ones the first in the stack
    return tuple(sorted(out, key=lambda each: -tokens[each.name]))


def _in_order(colours: dict[str, str], names: Iterable[str]) -> tuple[SpeakerShare, ...]:
    found = list(names)
    known = [name for name in colours if name in found]
    # by name, as a set has no order
    others = sorted(name for name in found if name not in colours)
    return tuple(SpeakerShare(name, colours.get(name, PLAIN)) for name in (*known, *others))
