"""What the volume has, shown, drawn and removed, by a container that has it."""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..errors import PipelineError, StoreError
from ..report.narrow import plain_console
from ..run.advice import sentence
from ..run.prune import opened, prune
from ..run.remove_run import remove_runs
from ..run.show_runs import show_runs
from ..run.versions import show_versions
from ..store.artifacts import Store
from ..store.history_db import FILE, SUM
from ..store.roots import root_states
from .containers import ModalEdge
from .endpoint import roll_back, served_addresses, shown_versions
from .far import WIDE
from .meters import process_age_s
from .roots import alone, clear_lapsed

LISTED = 30
LOCKS = "locks"


@dataclass
class Tended:
    """What came of a command, small enough to travel."""

    printed: str = ""
    wrong: str = ""
    next: tuple[str, ...] = ("runs",)  # the command that follows, by its words
    serves: bool = False  # what follows is what serves a bundle
    seconds: float = 0.0  # that its container was paid for
    files: dict[str, bytes] = field(default_factory=dict)  # by their names


def tend(
    command: str,
    names: Sequence[str],
    flags: Mapping[str, int],
    edge: ModalEdge,
    publish: Callable[[], None],
    refresh: Callable[[], None],
    is_alive: Callable[[str, Sequence[str]], bool] | None = None,
) -> Tended:
    """Do `runs`, `history`, `prune`, `rm`, `versions` or `rollback` on a volume. `is_alive` says
    whether anybody is still at a run, by its note's name and its addresses."""
    root = edge.root
    refresh()
    store = Store(root, publish=publish, refresh=refresh)
    printed = io.StringIO()
    console = plain_console(file=printed, width=WIDE)
    tended = Tended()
    try:
        if is_alive is not None:
            clear_lapsed(store, is_alive)
        if command == "runs":
            latest = show_runs(store, console)
            tended.next = ("run_all",) if latest is None else ("history", "--run", latest.id)
        elif command == "history":
            tended.files = _drawn(names, flags["last"], store, console)
        elif command in ("versions", "rollback"):
            if command == "rollback":
                roll_back(root, names[0] if names else None, publish)
            known, current = shown_versions(root)
            show_versions(known, current, "the volume", console)
            tended.serves = len(known) < 2
            tended.next = ("rollback",)
        else:
            with alone(opened(store), bool(flags["yes"])):
                if _remove(command, names, flags, store, console) and not flags["yes"]:
                    tended.next = _once_more(command, names, flags)
    except PipelineError as error:
        tended.wrong = sentence(error, edge)
    tended.printed = printed.getvalue()
    tended.seconds = process_age_s()
    return tended


def _remove(
    command: str, names: Sequence[str], flags: Mapping[str, int], store: Store, console: Console
) -> bool:
    """Return whether something is left that --yes removes."""
    # configurations lie where commands are typed, and what they reach there is told by roots
    if not root_states(store):
        raise StoreError(
            "no run has left a root on the volume, so nothing would be kept: do a command of each "
            "run whose results you want to keep, which makes nothing again that is there"
        )
    # it holds all that it needs, and has no lock here
    others = {"the endpoint": served_addresses(store.root)}
    if command == "rm":
        return remove_runs(names, {}, store, console, remove=bool(flags["yes"]), others=others)
    return prune(
        {},
        store,
        console,
        remove=bool(flags["yes"]),
        damaged=bool(flags["damaged"]),
        orphans=bool(flags["orphans"]),
        others=others,
    )


def _once_more(command: str, names: Sequence[str], flags: Mapping[str, int]) -> tuple[str, ...]:
    """Return the words of the same with --yes."""
    words = [command, *(["--run", " ".join(names)] if names else [])]
    words += [f"--{name}" for name, given in flags.items() if given]
    return (*words, "--yes")


def _drawn(names: Sequence[str], last: int, store: Store, console: Console) -> dict[str, bytes]:
    """Return, by the names of files, the page of runs, pictures of it, and the rows of all that was
    trained in them. Raises ConfigError, UnreadableFile."""
    # Only here, as it brings what draws
    from ..run.history.chosen import runs_of, trainings_of
    from ..run.history.experiments import list_experiments
    from ..run.history.exporting import export
    from ..run.history.lines import known
    from ..run.history.listing import list_runs
    from ..run.history.reporting import report
    from ..store.history_db import history_db

    opened(store)
    with tempfile.TemporaryDirectory() as place:
        beside = _beside(store, Path(place))
        to = Path(place) / "out"
        to.mkdir()

        def say(text: str) -> None:
            console.print(text.replace(f"{to}/", ""), highlight=False, markup=False)

        with history_db(beside) as index:
            everything = known(index, store.root)
            list_runs(everything, LISTED, console)
            list_experiments(everything, LISTED, console)
            drawn = runs_of(names, everything)
            if not names and last:
                drawn = drawn[:last]
            report(drawn, everything, index, beside, to / "history.html", True, say)
            chosen = trainings_of([run.id for run in drawn], everything)
            rows = export(chosen, everything, index, beside, to / "rows.jsonl", "jsonl")
        say(f"{rows:,} rows of {len(chosen):,} trainings: {to / 'rows.jsonl'}")
        return {path.name: path.read_bytes() for path in sorted(to.iterdir())}


def _beside(store: Store, place: Path) -> Store:
    """Return the same store with a database of its own: what SQLite asks of a file system, a volume
    that many have need not do."""
    root = place / "volume"
    root.mkdir()
    for path in store.root.iterdir():
        if path.name not in (FILE, SUM, LOCKS):
            (root / path.name).symlink_to(path)
    return Store(root)
