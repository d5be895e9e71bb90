"""What is handed through the layers, as the layers see it; whoever makes such a thing need not know
this module."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, and with the share of it that is done where that is known."""

    def __call__(self, text: str, share: float | None, /) -> None: ...


def quiet(_text: str, _share: float | None, /) -> None:
    """Tell nobody."""
