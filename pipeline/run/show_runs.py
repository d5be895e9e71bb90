"""Which runs a store knows: what each is called, when it was begun last, what it takes, where its
report is."""

from collections import Counter
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..report.narrow import print_table
from ..store.artifacts import Store
from ..store.removed import removed
from ..store.roots import Root
from .dry_run import told_removed
from .leftovers import BY_ADDRESS, size_of
from .prune import opened, said
from .reach import Reach
from .remove_run import described
from .stages import STAGES, is_report

COLUMNS = ("run", "begun", "family", "MB", "MB of it alone", "configuration", "report")


def show_runs(store: Store, console: Console) -> None:
    """Print the runs that have left a root in a store, the latest first. Raises StoreError where
    there is no store."""
    reach = Reach(opened(store), {})
    say = said(console)
    taken_out, wrong = removed(store)
    for why in (*reach.unknown.values(), *wrong):
        say(why)
    for gone in taken_out:
        say(told_removed(gone, store))
    if not reach.roots:
        say(f"no run has left a root in {store.root}")
        return
    reached: Counter[str] = Counter()
    for root in reach.roots.values():
        reached.update(root.addresses)

    @cache
    def size(address: str) -> int:
        return _size(store, address)

    table = Table(title=f"runs in {store.root}", title_justify="left", title_style="bold")
    for name in COLUMNS:
        numbers = name.startswith("MB")
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    latest = sorted(reach.roots, key=lambda run: reach.roots[run].at, reverse=True)
    for run in latest:
        root = reach.roots[run]
        whole = sum(map(size, root.addresses))
        alone = sum(size(address) for address in root.addresses if reached[address] == 1)
        table.add_row(
            run,
            root.at,
            root.family,
            f"{whole / 1e6:.1f}",
            f"{alone / 1e6:.1f}",
            described(root),
            "being removed" if root.removed else _report(store, root),
        )
    print_table(console, table)


def _size(store: Store, address: str) -> int:
    """Return the bytes of all that a store has at an address."""
    places = [store.root / kind / address for kind in BY_ADDRESS]
    places.append(store.history(address))
    counted: set[tuple[int, int]] = set()
    return sum(size_of(place, counted) for place in places)


def _report(store: Store, root: Root) -> str:
    """Return where a run's report is; of two, as of two kinds of arithmetic, the later one."""
    found: list[tuple[int, Path]] = []
    for address in root.addresses:
        stage = address.split("-")[0]
        page = store.folder(address) / "report.html"
        if stage in STAGES and is_report(stage) and page.exists():
            found.append((page.stat().st_mtime_ns, page))
    return str(max(found)[1]) if found else "none yet"
