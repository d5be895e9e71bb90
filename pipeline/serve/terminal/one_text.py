"""`generate`: one prompt and what follows it, from the stack or from several readers, one after
another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..generation import NoSuchReader
from .bundle import STACK, OpenBundle
from .drawing import Drawing


@dataclass(frozen=True)
class Asked:
    """What was typed: a text, pictures, and who reads; several are compared."""

    text: str
    pictures: Sequence[Path] = ()
    readers: Sequence[str] = (STACK,)


def generate(bundle: OpenBundle, asked: Asked, drawn: Drawing) -> None:
    """Show what follows a text as it comes. Raises DataError before anything is shown, for a reader
    that there is not too."""
    compares = len(asked.readers) > 1
    if compares:
        bundle = bundle.seeded()
    for reader in asked.readers:
        check_reader(bundle, reader)
    for reader in asked.readers:
        prompt = bundle.prompt(asked.text, asked.pictures, reader)
        generation = bundle.begin(prompt)
        drawn.begin(reader, compares)
        try:
            for piece in generation.follow():
                drawn.add(piece)
        except BaseException:
            drawn.break_off()
            raise
        drawn.end(generation, bundle.sampling.seed)


def check_reader(bundle: OpenBundle, reader: str) -> None:
    """Raise NoSuchReader for somebody whom the bundle does not hold."""
    if reader not in bundle.readers:
        raise NoSuchReader(reader, bundle.readers)
