"""A domain comes, goes, or is replaced: the run's file is changed, what that takes is made, and the
figures before and after stand side by side.

Invariant: nothing is written before the changed file describes a whole run that can start here; a
file that was changed by somebody else meanwhile is left alone.
"""

import hashlib
import os
import shlex
import stat
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import unified_diff
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import report
from ..config.domain_wish import DomainWish
from ..config.run import RunConfig
from ..config.stated import FileChange, stated
from ..errors import ConfigError, DamagedArtifact, DataError, JobsFailed, StoreError
from ..families.load import PATHS, change_domains, checked, load
from ..report.format import count
from ..report.narrow import plain_console, print_table
from ..store.artifacts import Manifest, Store
from ..store.in_use import RUNS
from ..store.reading import read_bytes
from ..store.removed import told_removed
from ..store.roots import Root, root_path
from . import next_step
from .backend import Local, printed_progress, run_stage
from .domain_words import wish_of
from .dry_run import DONE, Entry, duration, plan, refuse, times
from .identity import begin, not_there
from .leftovers import anything_at
from .predecessor import note_gone, predecessors, reported
from .reach import as_given, root_of, working
from .stages import RUN, Addresses, is_report, label

FORMER = ".former"  # behind a file's name: what it was, where somebody asks for it
# A run keeps what it has made; what it is called, `runs` says
STAYS = ", until the run that made it is removed (`python -m pipeline rm RUN`)"
CONTEXT = 1  # lines that a difference shows around what has changed
# of a difference, by the first sign of a line
STYLES = {"+": "green", "-": "red", "@": "dim"}


@dataclass(frozen=True)
class DomainChange:
    """A run as it is, and as it is to be."""

    path: Path
    wish: DomainWish
    before: RunConfig
    after: RunConfig
    files: tuple[FileChange, ...]
    told: tuple[str, ...]  # what a person should know

    def taken_back(self) -> tuple[FileChange, ...]:
        """Return what makes the files what they were."""
        return tuple(FileChange(each.path, each.after, each.before) for each in self.files)


def changed(path: Path, wish: DomainWish) -> DomainChange:
    """Return what a wish makes of a run, nothing written yet. Raises ConfigError for a wish that
    cannot be granted, or whose outcome is no run."""
    before = load(path)
    own = stated(path, PATHS)
    told = change_domains(before, wish, own)
    after = checked(own.resolved(), path)
    files = own.changes()
    for change in files:
        _refuse_unwritable(change.path)
    return DomainChange(path, wish, before, after, tuple(files), tuple(told))


def _refuse_unwritable(path: Path) -> None:
    target = path.resolve()
    # It is replaced, so its folder has to be written as well
    if not (os.access(target, os.W_OK) and os.access(target.parent, os.W_OK)):
        raise ConfigError(f"{path} cannot be written; give this user the right to, and its folder")


def write(files: tuple[FileChange, ...], keep_former: bool) -> None:
    """Put what is to be in the place of what was, each file whole or not at all. Raises ConfigError
    where a file is no longer what was read or cannot be written, with none of them changed."""
    with _alone_with(files):
        _write_all(files, keep_former)


@contextmanager
def _alone_with(files: tuple[FileChange, ...]) -> Iterator[None]:
    """Have others of these commands wait: of two that have read the same, one may write."""
    with ExitStack() as held:
        for path in sorted({change.path.resolve() for change in files}):
            # Not beside the file, where people would find it, nor on it, as it is replaced
            name = hashlib.sha256(str(path).encode()).hexdigest()[:12]
            lock = FileLock(Path(tempfile.gettempdir()) / f"moleforge-{name}.lock")
            # One of another user may not be ours to take
            with suppress(OSError):
                held.enter_context(lock)
        yield


def _write_all(files: tuple[FileChange, ...], keep_former: bool) -> None:
    for change in files:
        try:
            if change.path.read_bytes() != change.before.encode():
                raise ConfigError(f"{change.path} was changed meanwhile, and stays as it is")
        except OSError as error:
            raise ConfigError(f"{change.path} cannot be read: {error.strerror}") from None
    written: list[FileChange] = []
    try:
        for change in files:
            written.append(change)
            _write_one(change, keep_former)
    except BaseException:
        # Half of a change describes no run, and no command could go on from it
        for change in written:
            with suppress(ConfigError):
                _write_one(FileChange(change.path, change.after, change.before), False)
        raise


def _write_one(change: FileChange, keep_former: bool) -> None:
    target = change.path.resolve()
    try:
        if keep_former:
            _write(target.with_name(target.name + FORMER), change.before, target)
        _write(target, change.after, target)
    except OSError as error:
        raise ConfigError(f"{change.path} cannot be written: {error.strerror}") from None


def _write(path: Path, text: str, like: Path) -> None:
    """Write a whole file or none, with the rights of another."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), stat.S_IMODE(like.stat().st_mode))
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def show(change: DomainChange, store: Store, console: Console) -> list[Entry]:
    """Print what a change writes and what it makes; return the jobs that are to be done. Raises
    CannotStart."""
    for file in change.files:
        _show_difference(file, console)
    tell(change, console)
    entries = plan(change.after, store)
    refuse(change.after, store, entries)
    wanted = [entry for entry in entries if entry.state not in DONE]
    if not wanted:
        console.print("nothing is to be made: all of it is in the store", highlight=False)
        return []
    seconds = times(change.after, store, wanted)
    table = Table(title="to be made", title_justify="left", title_style="bold")
    table.add_column("job", style="cyan", overflow="fold")
    table.add_column("state")
    for name in ("tokens", "time"):
        table.add_column(name, justify="right")
    for entry in wanted:
        table.add_row(entry.name, entry.state, *_expected(entry, seconds.get(entry.address)))
    print_table(console, table)
    for why in dict.fromkeys(entry.why for entry in wanted if entry.why):
        console.print(why, highlight=False, markup=False, soft_wrap=True)
    kept = len(entries) - len(wanted)
    console.print(
        f"{kept} of {len(entries)} jobs stay as they are; to train: about "
        f"{duration(sum(seconds.values()))}",
        highlight=False,
        soft_wrap=True,
    )
    return wanted


def tell(change: DomainChange, console: Console) -> None:
    """Print what a person should know of a change."""
    for sentence in change.told:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _expected(entry: Entry, seconds: float | None) -> tuple[str, str]:
    if entry.job is None:
        return "", ""
    tokens = "after preprocess" if entry.job.tokens is None else f"{entry.job.tokens:,}"
    return tokens, "?" if seconds is None else duration(seconds)


def _show_difference(file: FileChange, console: Console) -> None:
    lines = unified_diff(
        file.before.splitlines(),
        file.after.splitlines(),
        str(file.path),
        f"{file.path}, changed",
        lineterm="",
        n=CONTEXT,
    )
    for line in lines:
        console.print(Text(line, style=STYLES.get(line[:1], "")), soft_wrap=True)


@dataclass
class Made:
    """What was made of a change."""

    jobs: list[Manifest] = field(default_factory=list)  # that were not in the store

    @property
    def seconds(self) -> float:
        """Time of all of them, one after another."""
        return sum(job.made["seconds"] for job in self.jobs)

    @property
    def tokens(self) -> int:
        """Tokens that were trained on."""
        spent = [job.metrics.get("tokens") for job in self.jobs]
        # preprocess has them by split and domain, and trains on none
        return sum(tokens for tokens in spent if isinstance(tokens, int))


def make(change: DomainChange, wanted: list[Entry], local: Local) -> Made:
    """Make all of a run that is not there. Raises what its stages raise."""
    new = {entry.address for entry in wanted}
    made = Made()
    for stage in RUN:
        if change.after.items(stage):
            for manifest in run_stage(stage, change.after, local):
                if manifest.address in new:
                    made.jobs.append(manifest)
    return made


def compare(
    change: DomainChange, made: Made, former: Path | None, store: Store, console: Console
) -> None:
    """Print the figures of the report before beside those after, and what the change cost."""
    after = report_of(change.after, store)
    if after is not None:
        before = _read(former) if former else None
        if before is None:
            console.print("no report of the run as it was is in the store", highlight=False)
        report.show_changes(before, report.read(read_bytes(after)), console)
        pages = {"before": former, "after": after}
        for name, path in pages.items():
            if path is not None:
                page = path.with_name("report.html")
                console.print(f"{name}: {page}", highlight=False, soft_wrap=True)
    jobs = [label(job.stage, job.item) for job in made.jobs]
    console.print(
        f"made: {', '.join(jobs) or 'nothing'}; {duration(made.seconds)}, "
        f"{count(made.tokens)} training tokens",
        highlight=False,
        soft_wrap=True,
    )


def report_of(cfg: RunConfig, store: Store) -> Path | None:
    """Return where the report of a run is; None where it is not in the store."""
    addresses = Addresses(cfg)
    for stage in RUN:
        for _, _, address in addresses.jobs(stage) if is_report(stage) else ():
            if store.has(address):
                return store.folder(address) / "report.json"
    return None


def former_report(change: DomainChange, store: Store) -> Path | None:
    """Return where the report of a run as it was is; where its text has changed since, the last
    one that the same file has led to."""
    found = report_of(change.before, store)
    if found is not None:
        return found
    roots = predecessors(store, change.before.name, as_given(change.path))
    address = reported(roots, store)
    return store.folder(address) / "report.json" if address else None


def _read(path: Path) -> report.Report | None:
    """Return a former report; None where it can no longer be read: it is only compared with."""
    try:
        return report.read(read_bytes(path))
    except (StoreError, DamagedArtifact):
        return None


def come_and_go(args: Namespace, console: Console) -> None:
    """Carry out a command about a domain: tell what it takes, ask, write it, make it, compare.

    From the moment that the files say what is wanted, `args.again` is what makes the rest;
    `args.next` is what to type when it is done. Raises PipelineError.
    """
    change = changed(args.config, wish_of(args))
    shown = shlex.quote(str(args.config))
    if args.modal:
        for file in change.files:
            _show_difference(file, console)
        tell(change, console)
        if _agreed(args):
            write(change.files, args.keep_former)
            made_by = f"modal run modal_app.py::run_all --config {shown}"
            console.print(f"made on Modal by: {made_by}", highlight=False, soft_wrap=True)
        else:
            args.next = next_step.same(args, "plan")
        return
    store = Store(args.store).open()
    change = _looked_at(change, store, args.frozen)
    former = former_report(change, store)
    wanted = show(change, store, console)
    # What a plan asks no server for
    lacking = not_there(change.before, change.after, store)
    if lacking:
        raise DataError(f"{'; '.join(lacking)}, so nothing was changed; correct what was named")
    if (change.files or wanted) and not _agreed(args):
        console.print("nothing was changed", highlight=False)
        args.next = next_step.same(args, "plan")
        return
    root = root_of(change.after, args.config)
    is_new = not root_path(store, root.id).exists()
    with working(store, change.after, args.config):
        try:
            write(change.files, args.keep_former)
        except ConfigError:
            if is_new:
                _forget(root, change, store)
            raise
        args.again = f"python -m pipeline run --config {shown}"
        gone = None
        if change.wish.what == "remove":
            gone = note_gone(change.wish.name, change.before, change.after, change.path, store)
        try:
            made = make(change, wanted, Local(store, parallel=args.parallel))
        except JobsFailed as error:
            if _is_refused(change.wish, error):
                _take_back(change, args, console)
                if is_new and args.again is None:
                    _forget(root, change, store)
            raise
    compare(change, made, former, store, console)
    if gone is not None:
        text = f"{told_removed(gone, store)}{STAYS if gone.addresses else ''}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    args.next = next_step.page(args, change.after.name)


def _forget(root: Root, change: DomainChange, store: Store) -> None:
    """Take away the root of a run that is not to be, where nothing was made of it alone: it would
    be the latest of its name, which `watch` and others go by."""
    own = set(root.addresses) - set(root_of(change.before, change.path).addresses)
    with suppress(OSError), store.lock(RUNS):
        if not any(anything_at(store, address) for address in own):
            root_path(store, root.id).unlink(missing_ok=True)


def _take_back(change: DomainChange, args: Namespace, console: Console) -> None:
    """Make the files what they were, as what was named is to be mended and the same command typed
    again. One that somebody has changed meanwhile stays, which is told: why the job failed is what
    a person has to read."""
    try:
        write(change.taken_back(), keep_former=False)
    except ConfigError as error:
        text = f"{error}: {change.wish.name} is still in it"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    args.again = None
    console.print(f"{args.config} is what it was", highlight=False, markup=False, soft_wrap=True)


def _is_refused(wish: DomainWish, error: JobsFailed) -> bool:
    """Whether nothing failed but the reading of the text, or the taking in of the finished expert,
    that was named."""
    stages = ("preprocess", "train_experts") if wish.expert else ("preprocess",)
    return error.stage in stages and [*error.failed] == [wish.name]


def _looked_at(change: DomainChange, store: Store, frozen: bool) -> DomainChange:
    """Return a change with what its runs read outside the store looked at."""
    progress = printed_progress(plain_console(stderr=True))
    # As it was when it was made, whatever has become of its data since
    before, _ = begin(change.before, store, progress, frozen=True)
    after, notes = begin(change.after, store, progress, frozen=frozen, makes=True)
    for note in notes:
        progress(note, None)
    return replace(change, before=before, after=after)


def _agreed(args: Namespace) -> bool:
    """Whether a person agrees, who is only asked where there is one."""
    if args.yes or not sys.stdin.isatty():
        return True
    answer = plain_console(stderr=True).input("go on? [y/N] ", markup=False)
    return answer.strip().lower() in ("y", "yes")
