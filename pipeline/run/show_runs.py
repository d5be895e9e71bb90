"""Which runs a store knows: what each is called, when it was begun last, what it takes, where its
report is."""

from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import report
from ..errors import StoreError
from ..report.format import finite
from ..report.narrow import print_table
from ..report.scores import BITS, main_score, scores
from ..store.artifacts import Store
from ..store.costs import by_prices, readable_costs, usd_of_runs
from ..store.reading import read_bytes
from ..store.removed import removed, told_removed
from ..store.roots import MEASURES, Root
from .leftovers import BY_ADDRESS, size_of
from .open_report import report_of_run
from .prune import opened, said
from .reach import Reach
from .remove_run import described

USD = "US$"  # where anything was paid for
COLUMNS = ("run", "begun", "family", "score", "MB", "MB of it alone", "configuration", "report")


def show_runs(store: Store, console: Console) -> Root | None:
    """Print the runs that have left a root in a store, the latest first; return that one, None
    where there is none. Raises StoreError where there is no store."""
    reach = Reach(opened(store), {})
    say = said(console)
    taken_out, wrong = removed(store)
    for why in (*reach.unknown.values(), *wrong):
        say(why)
    for gone in taken_out:
        say(told_removed(gone, store))
    if not reach.roots:
        say(f"no run has left a root in {store.root}")
        return None
    reached: Counter[str] = Counter()
    for root in reach.roots.values():
        reached.update(root.addresses)

    @cache
    def size(address: str) -> int:
        return _size(store, address)

    table = Table(title=f"runs in {store.root}", title_justify="left", title_style="bold")
    paid = usd_of_runs(store, {run: root.addresses for run, root in reach.roots.items()})
    for name in (*COLUMNS, *([USD] if paid else [])):
        numbers = name.startswith("MB") or name == USD
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    latest = sorted(reach.roots, key=lambda run: reach.roots[run].at, reverse=True)
    for run in latest:
        root = reach.roots[run]
        whole = sum(map(size, root.addresses))
        alone = sum(size(address) for address in root.addresses if reached[address] == 1)
        page = report_of_run(store, root)
        table.add_row(
            run,
            root.at,
            root.family,
            _score(store, root, page),
            f"{whole / 1e6:.1f}",
            f"{alone / 1e6:.1f}",
            described(root),
            "being removed" if root.removed else str(page or "none yet"),
            *([f"{paid[run]:,.2f}" if run in paid else ""] if paid else []),
        )
    print_table(console, table)
    when = by_prices(costs.prices for costs in readable_costs(store))
    if paid and when:
        say(f"{USD}: {when}")
    return reach.roots[latest[0]]


def _size(store: Store, address: str) -> int:
    """Return the bytes of all that a store has at an address."""
    places = [store.root / kind / address for kind in BY_ADDRESS]
    places.append(store.history(address))
    counted: set[tuple[int, int]] = set()
    return sum(size_of(place, counted) for place in places)


def _score(store: Store, root: Root, page: Path | None) -> str:
    """Return what a report says of what its run serves, in the figure that runs are compared by, or
    what the model of a trial of experiments was measured to be."""
    if root.experiments:
        return _score_of_trial(store, root)
    if page is None:
        return ""
    try:
        score = main_score(scores(report.read(read_bytes(page.with_name("report.json")))))
    except StoreError:
        # of another version, or damaged, which is for whoever opens it to say
        return ""
    if score is None:
        return ""
    of = "" if score.measure == BITS else f", {score.name.partition(':')[0]}"
    return f"{score.value:.3f} {score.measure}{of}"


def _score_of_trial(store: Store, root: Root) -> str:
    for address in root.makes:
        # One that cannot be read is for whoever opens it to say
        with suppress(StoreError):
            if address.startswith(MEASURES) and store.has(address):
                bits = finite(store.manifest(address).metrics.get("bits_per_byte"))
                return "" if bits is None else f"{bits:.3f} {BITS}"
    return ""
