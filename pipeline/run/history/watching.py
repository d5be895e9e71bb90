"""`watch`: a run while it goes on, look by look."""

import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from statistics import median

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...errors import ConfigError
from ...report.format import count, figures, seconds
from ...store.artifacts import Store
from ...store.history_db import history_db
from ...store.roots import Root, readable_roots
from ..prune import opened, said
from ..stages import first_few
from .positions import DONE, TO_DO, Look, Position, in_progress, look
from .sparks import spark
from .watched_trials import looks_at, trials_of

BAR = 12
# More jobs than a screen has lines are told by stage
MOST_ROWS = 40
# Where there is no terminal a look is printed when something is done, and so often.
PRINT_EVERY_S = 60.0
# A look at many jobs takes a moment, and a machine that trains has better to do.
MOST_OF_TIME = 0.1
COLUMNS = ("job", "state", "position", "train", "best valid", "curve", "tokens/s", "left")


def watch(name: str | None, store: Store, console: Console, every_s: float, once: bool) -> Look:
    """Follow a run of a store, or all trials of experiments, until it ends; return the last look at
    it. Raises ConfigError, StoreError, UnreadableFile."""
    trials = trials_of(opened(store), name)
    if trials:
        usual = usual_seconds(store, trials[0])
        return follow(looks_at(store, trials, usual, time.time), console, every_s, once)
    root = chosen(store, name)
    usual = usual_seconds(store, root)

    def looked() -> Look:
        return look(store, root, usual, time.time())

    return follow(looked, console, every_s, once)


def chosen(store: Store, name: str | None) -> Root:
    """Return the run that somebody means: of an id or a name, else the one in progress, else the
    one that was begun last. Raises ConfigError, UnreadableFile, DamagedArtifact."""
    roots = sorted(readable_roots(store), key=lambda root: root.at, reverse=True)
    if name:
        for root in roots:
            if name == root.id:
                return root
        named = [root for root in roots if root.name == name]
    else:
        named = [root for root in roots if in_progress(store, root)] or roots
    if named:
        return named[0]
    if not roots:
        raise ConfigError(
            f"no run has left anything in {store.root} yet, so there is none to watch"
        )
    known = first_few([root.id for root in roots])
    raise ConfigError(f"there is no run {name} in {store.root}; the runs in it are {known}")


def usual_seconds(store: Store, root: Root) -> dict[str, float]:
    """Return what a job of each stage usually took in earlier runs of the same name."""
    taken: dict[str, list[float]] = {}
    with history_db(store) as index, closing(_of_name(index, root.name)) as rows:
        for stage, spent in rows:
            taken.setdefault(stage, []).append(spent)
    return {stage: median(found) for stage, found in taken.items()}


def _of_name(index: sqlite3.Connection, name: str) -> sqlite3.Cursor:
    return index.execute(
        "SELECT DISTINCT stage, seconds FROM artifacts JOIN run_addresses USING (address)"
        " JOIN runs ON runs.id = run WHERE name = ? AND seconds IS NOT NULL",
        (name,),
    )


def follow(
    looked: Callable[[], Look],
    console: Console,
    every_s: float,
    once: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> Look:
    """Show look after look until there is nothing more to be seen; return the last one."""
    if once or not console.is_terminal:
        last = _print_looks(looked, console, every_s, once, wait)
    else:
        last = _draw_looks(looked, console, every_s, wait)
    if last.is_over and last.done < len(last.positions):
        said(console)("the command that began it goes on from where it stopped")
    return last


def _draw_looks(
    looked: Callable[[], Look], console: Console, every_s: float, wait: Callable[[float], None]
) -> Look:
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            began_s = time.monotonic()
            seen = looked()
            live.update(drawn(seen), refresh=True)
            if seen.is_over:
                return seen
            took_s = time.monotonic() - began_s
            wait(max(every_s, took_s / MOST_OF_TIME))


def _print_looks(
    looked: Callable[[], Look],
    console: Console,
    every_s: float,
    once: bool,
    wait: Callable[[float], None],
) -> Look:
    printed_s = 0.0
    done = -1
    while True:
        seen = looked()
        due = time.monotonic() - printed_s >= PRINT_EVERY_S
        if once or seen.is_over or due or seen.done != done:
            console.print(drawn(seen))
            printed_s = time.monotonic()
            done = seen.done
        if once or seen.is_over:
            return seen
        wait(every_s)


def drawn(seen: Look) -> Group:
    """Return a look as rich draws it: a line for each job, of very many for each that is at work
    and for each stage, then all of them together."""
    shown = seen.positions
    stages = ""
    if len(shown) > MOST_ROWS:
        shown = tuple(each for each in shown if each.state not in (DONE, TO_DO))
        stages = f"{_by_stage(seen)}\n"
    table = Table(title=seen.run, title_justify="left", title_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name == "left" else "left", overflow="fold")
    for each in shown:
        table.add_row(*_cells(each))
    return Group(table, Text(f"{stages}{overall(seen)}"))


def _by_stage(seen: Look) -> str:
    counted = Counter(each.stage for each in seen.positions)
    done = Counter(each.stage for each in seen.positions if each.state == DONE)
    return ", ".join(f"{stage} {done[stage]:,} of {count:,}" for stage, count in counted.items())


def overall(seen: Look) -> str:
    """Return in a line how far all of a run is, and how long it will take."""
    words = f"{seen.done} of {len(seen.positions)} jobs done"
    if seen.done == len(seen.positions):
        return words
    if not seen.in_progress:
        return f"{words}; the run is not in progress"
    if not seen.unknown:
        return f"{words}, {seconds(seen.left_s)} left"
    unknown = f"not known: {first_few(seen.unknown)}"
    if not seen.left_s:
        return f"{words}, time left {unknown}"
    return f"{words}, at least {seconds(seen.left_s)} left ({unknown})"


def _cells(each: Position) -> tuple[str, ...]:
    bar = ""
    if each.share is not None and each.state != TO_DO:
        full = round(each.share * BAR)
        bar = "█" * full + "░" * (BAR - full)
        if each.steps and each.state != DONE:
            bar += f" {each.step:,} of {each.steps:,}"
        elif each.steps:
            bar += f" {each.steps:,} steps"
    elif each.step:
        # an older history does not say of how many
        bar = f"step {each.step:,}"
    left = seconds(each.left_s)
    if each.state == DONE:
        left = f"took {seconds(each.taken_s)}"
    rest = (spark(each.curve), count(each.tokens_per_s), left)
    return (each.name, each.state, bar, figures(each.nats), figures(each.valid_nats), *rest)
