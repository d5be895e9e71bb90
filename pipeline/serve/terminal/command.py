"""The commands that have a bundle speak, from the folder on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import interrupts
from ...config.serving import Dtype
from ...report.narrow import output, plain_console
from .bundle import STACK, opened
from .conversation import chat, typed
from .drawing import drawing
from .one_text import Asked, generate

ASK = "> "  # before what is typed
GiveUp = Callable[[], None]


def generate_from(
    folder: Path,
    text: str,
    sampling: Mapping[str, Any],
    give_up: GiveUp,
    *,
    readers: Sequence[str],
    pictures: Sequence[Path],
    dtype: Dtype,
    experts: bool,
    as_json: bool,
) -> None:
    """Show what follows a text. Raises as `opened`, and DataError; KeyboardInterrupt where it is
    stopped."""
    with opened(folder, sampling, dtype) as bundle, interrupts.raised_once(give_up):
        drawn = drawing(output(), bundle.engine.speakers, experts, as_json)
        generate(bundle, Asked(text, pictures, readers or (STACK,)), drawn)


def chat_with(
    folder: Path,
    sampling: Mapping[str, Any],
    give_up: GiveUp,
    *,
    reader: str | None,
    pictures: Sequence[Path],
    dtype: Dtype,
    experts: bool,
) -> None:
    """Talk until there is nothing more to say. Raises as `generate_from`."""
    beside = plain_console(stderr=True, soft_wrap=True)

    def say(line: str) -> None:
        beside.print(line, style="dim", highlight=False, markup=False)

    with opened(folder, sampling, dtype) as bundle, interrupts.raised_once(give_up):
        drawn = drawing(output(), bundle.engine.speakers, experts, as_json=False)
        lines = typed(ASK)
        chat(bundle, drawn, lines, say, reader=reader or STACK, pictures=pictures)
