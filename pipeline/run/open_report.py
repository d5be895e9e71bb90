"""The newest report of a store, or of one run, shown where it is and opened in a browser."""

import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ..errors import ConfigError
from ..report.schema.experiments import FOLDER
from ..store.artifacts import Store
from ..store.roots import Root
from .find import found, runs_called, taken_for_experiments
from .stages import STAGES, is_report

PAGE = "report.html"


def newest_report(store: Store, words: Sequence[str]) -> Path:
    """Return the newest page of a run, of an experiments file by its name, or of all. Raises
    ConfigError where there is none, and what `found` does."""
    if words:
        if together := _together(store, words):
            return together
        pages: list[Path] = []
        for root in runs_called(store, words[0]) if len(words) == 1 else ():
            pages += _pages_of(store, root)
        # Only now: of a run that has a report nothing else is meant
        pages = pages or list(_pages(store, [each.address for each in found(store, words)]))
    else:
        pages = list(_pages(store, store.addresses()))
        pages += (store.root / FOLDER).glob(f"*/{PAGE}")
    if not pages:
        of = f" of {'/'.join(words)}" if words else ""
        raise ConfigError(f"no report{of} is in {store.root} yet; `evaluate` makes one")
    return max(pages, key=lambda page: page.stat().st_mtime_ns)


def _together(store: Store, words: Sequence[str]) -> Path | None:
    """Return the page of an experiments file that is named, and nothing of it; None for others."""
    if len(words) != 1:
        return None
    page = store.root / FOLDER / words[0] / PAGE
    return page if page.is_file() else None


def report_of_run(store: Store, root: Root) -> Path | None:
    """Return where a run's report is, of several the newest, or that of the experiments that it is
    a trial of; None where it has none yet."""
    return max(_pages_of(store, root), key=lambda page: page.stat().st_mtime_ns, default=None)


def _pages_of(store: Store, root: Root) -> Iterator[Path]:
    if not root.experiments:
        yield from _pages(store, root.addresses)
    elif page := _together(store, [root.experiments]):
        yield page


def _pages(store: Store, addresses: Sequence[str]) -> Iterator[Path]:
    for address in addresses:
        stage = address.split("-")[0]
        page = store.folder(address) / PAGE
        if stage in STAGES and is_report(stage) and page.is_file():
            yield page


def open_report(words: Sequence[str], store: Store, console: Console, in_browser: bool) -> None:
    """Print where the newest report is, and open it when asked to. Raises what `newest_report`
    does."""
    store.open(create=False)
    page = newest_report(store, words)
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    if _together(store, words):
        for root in runs_called(store, words[0])[:1]:
            text = taken_for_experiments(words[0], root.id)
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    if in_browser and not webbrowser.open(page.resolve().as_uri()):
        text = "no browser can be started here: copy that file to where there is one"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
