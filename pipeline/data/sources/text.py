"""Sources of documents: rows of columns from installed text, files or the Hub, read one block at a
time.

Invariant: a row that cannot be read is a SkippedRow and never stops the stream; a source that
cannot be read is a DataError.
"""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from ...config.text_data import TextRunConfig
from ...protocols import Eye, Seen
from . import Source


def sources(cfg: TextRunConfig) -> Iterator[Source]:
    """Return what data.source gives: one entry for each of its data sets, in a fixed order.

    The module beside this one that has the name of the source reads it.
    """
    return _module(cfg).sources(cfg)


def look(cfg: TextRunConfig) -> None:
    """Raise DataError when what data.source reads on this machine is not there; nothing is read,
    and no network is asked."""
    module = _module(cfg)
    # A source that needs nothing here has nothing to look for
    if hasattr(module, "look"):
        module.look(cfg)


def seen(cfg: TextRunConfig, eye: Eye) -> Iterator[Seen]:
    """Yield what data.source means on this machine or behind a URL, as it is now, where `sources`
    cannot say which files that are."""
    module = _module(cfg)
    if hasattr(module, "seen"):
        yield from module.seen(cfg, eye)


def _module(cfg: TextRunConfig) -> ModuleType:
    # By name: who adds a source need not come here, and only what is read is imported
    return import_module(f".{cfg.data.source}", __package__)
