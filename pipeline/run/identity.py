"""What a run reads outside its store, looked at once: by its content, which addresses hold.

A command looks before anything starts and puts what it found into the configuration, as `dtype:
auto` is settled; whoever is given that configuration, a process or a container, goes by the same
look. Which jobs read what is the family's affair (`look` of its configuration).
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress

from ..config.run import JobKey, RunConfig, source_key
from ..errors import DataError, DiskFull, StoreError
from ..protocols import Looked, Progress, quiet
from ..store import sources
from ..store.artifacts import Store
from ..store.looking import FOLDER, ODD, UNREACHABLE, FileSums, Looking
from ..store.sources import When
from .changes import changes

# What goes on with what stands, as people are told who did not mean to change anything
FROZEN = "--frozen goes on with what was read then"
# What this process has looked at, by its print: for who tells of it later
_seen: dict[str, Looked] = {}
# Why jobs could do nothing with it, by their recipes: of nothing that was seen there is no print
_lacks: dict[str, str] = {}


def identified(cfg: RunConfig) -> RunConfig:
    """Return a run that says what it reads outside its store: as it was said already, else as it is
    now."""
    if cfg.identity is not None:
        return cfg
    return with_prints(cfg, _prints(look_at(cfg)))


def begin(
    cfg: RunConfig,
    store: Store,
    progress: Progress = quiet,
    *,
    frozen: bool = False,
    makes: bool = False,
) -> tuple[RunConfig, list[str]]:
    """Return the run that a command is about, looked at by its edge, and what to tell of that.

    `frozen`: what was made already is taken for what was read then, whatever has changed since;
    `makes`: the look is written down, for the jobs that are held against it.
    """
    prints: dict[JobKey, str] = {}
    if frozen:
        prints = recorded(cfg, store, "made")
    looked = look_at(cfg, store, progress, leave_out=prints, fetches=makes)
    for job, found in looked.items():
        was = sources.print_of(store, "made", recipe(cfg, *job), cfg.name)
        # Without its server nobody can say that it has changed, nor read it
        if was and any(each.sum == UNREACHABLE for each in found.seen):
            prints[job] = was
    notes = list(_frozen_notes(prints, looked, frozen))
    prints = _prints(looked) | prints
    if makes:
        with suppress(OSError, DiskFull):
            for job, found in looked.items():
                # Nobody goes by a look at what could not be reached
                if found.print == prints[job]:
                    sources.keep(store, "looked", recipe(cfg, *job), found, cfg.name)
    return with_prints(cfg, prints), notes


def _frozen_notes(
    prints: Collection[JobKey], looked: Collection[JobKey], frozen: bool
) -> Iterator[str]:
    if frozen and prints:
        yield f"frozen: what {_named(prints)} read before is gone on with, and not looked at"
    elif prints:
        yield (
            f"a server cannot be asked for what {_named(prints)} read, so what was read before is "
            "gone on with"
        )
    if frozen and looked:
        yield f"not made yet under these settings, so looked at now: what {_named(looked)} read"


def _named(jobs: Collection[JobKey]) -> str:
    names = [stage if item is None else f"{stage} {item}" for stage, item in sorted(jobs, key=str)]
    return ", ".join(names)


def look_at(
    cfg: RunConfig,
    store: Store | None = None,
    progress: Progress = quiet,
    leave_out: Collection[JobKey] = (),
    fetches: bool = False,
) -> dict[JobKey, Looked]:
    """Return what each job of a run reads outside the store as it is now. With a store its list of
    sums is used, so that what is unchanged is not read again."""
    eye, sums = _eye(store, progress, fetches)
    found = {}
    for stage, item in _jobs(cfg):
        if (stage, item) in leave_out:
            continue
        looked = cfg.look(stage, item, eye)
        if looked is not None:
            _lacks[recipe(cfg, stage, item)] = looked.lacks
        # What the settings pin themselves, as a Hub's commit does, leaves nothing to be seen
        if looked is not None and looked.seen:
            found[stage, item] = looked
            _seen[looked.print] = looked
    sums.save()
    return found


def eye_of(store: Store, progress: Progress) -> Looking:
    """Return what a job looks with at what its command has looked at."""
    eye, _ = _eye(store, progress, fetches=True)
    return eye


def _eye(
    store: Store | None, progress: Progress, fetches: bool = False
) -> tuple[Looking, FileSums]:
    if store is None:
        sums = FileSums(None, progress)
        return Looking(sums, progress, fetches=fetches), sums
    sums = FileSums(store.root, progress, by_ctime=not store.is_published)
    folder = None
    # A plan makes no store, and leaves nothing in a folder that is none
    if (store.root / "store.json").exists():
        # Nor in one of another format, which whoever opens it is told
        with suppress(StoreError):
            folder = store.open(create=False).root / FOLDER
    return Looking(sums, progress, folder, fetches), sums


def recorded(cfg: RunConfig, store: Store, when: When) -> dict[JobKey, str]:
    """Return the prints that a store has of a run's jobs, as that run has read."""
    found = {}
    for job in _jobs(cfg):
        known = sources.print_of(store, when, recipe(cfg, *job), cfg.name)
        if known:
            found[job] = known
    return found


def recipe(cfg: RunConfig, stage: str, item: str | None) -> str:
    """Return the name of a job under its settings, whatever it reads and whatever its arithmetic,
    of which data know nothing."""
    read = cfg.model_copy(update={"dtype": "fp32"}).read_settings(stage, item)
    text = json.dumps([stage, item, cfg.stages[stage].version, read], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return "-".join(filter(None, (stage, item, digest)))


def recipes(cfg: RunConfig) -> dict[str, JobKey]:
    """Return all jobs of a run by their names under its settings."""
    return {recipe(cfg, *job): job for job in _jobs(cfg)}


def check_unchanged(cfg: RunConfig, store: Store, stage: str, item: str | None) -> None:
    """Raise DataError when what a job reads outside the store is no longer what its command has
    looked at."""
    eye, _ = _eye(store, quiet)
    for job in ((stage, item), *cfg.reads_through(stage, item)):
        wanted = (cfg.identity or {}).get(source_key(*job))
        if wanted is None:
            continue
        found = cfg.look(*job, eye)
        if found is None or found.print != wanted:
            told = changes(_details(store, wanted), found)
            again = "do it again"
            if sources.print_of(store, "made", recipe(cfg, *job), cfg.name) == wanted:
                # Read once, and what was made of it has gone: no look brings that back
                again += ", without --frozen, as what was made of it is not in the store"
            raise DataError(f"{told} since it was looked at, before this began; {again}")


def changed(cfg: RunConfig, store: Store, address: Callable[[str, str | None], str]) -> list[str]:
    """Return what has changed of what a run reads since its results were made, in sentences;
    `address` says where a job's result is."""
    told = []
    for job in _jobs(cfg):
        clause = since_made(cfg, store, *job)
        # What is there was made of what is read: another run's files were read last
        if clause and not store.has(address(*job)):
            told.append(f"{clause}; {FROZEN}")
    return list(dict.fromkeys(told))


def lacking(cfg: RunConfig, stage: str, item: str | None) -> DataError | None:
    """Return the error for a job that could do nothing with what this process has looked at."""
    lacks = _lacks.get(recipe(cfg, stage, item))
    return DataError(lacks) if lacks else None


def not_there(before: RunConfig, after: RunConfig, store: Store) -> list[str]:
    """Return in clauses what a run reads that another one does not, and that is not there or cannot
    be read; both have been looked at."""
    known = set((before.identity or {}).values())
    told = []
    for job in _jobs(after):
        print_ = (after.identity or {}).get(source_key(*job))
        found = _details(store, print_) if print_ and print_ not in known else None
        for each in found.seen if found else ():
            if each.sum in ODD:
                told.append(f"{each.setting}: {each.name} {ODD[each.sum]}")
        lacks = lacking(after, *job)
        if lacks and not lacking(before, *job):
            told.append(str(lacks))
    return list(dict.fromkeys(told))


def note_made(cfg: RunConfig, store: Store, stage: str, item: str | None) -> None:
    """Write down what the result of a job, which is there, was made of."""
    print_ = (cfg.identity or {}).get(source_key(stage, item))
    if print_ is None:
        return
    name = recipe(cfg, stage, item)
    with suppress(OSError, DiskFull):
        if not sources.is_kept(store, "made", name, print_, cfg.name):
            found = _details(store, print_) or Looked(print_, ())
            sources.keep(store, "made", name, found, cfg.name)


def since_made(cfg: RunConfig, store: Store, stage: str, item: str | None) -> str:
    """Return a clause about what has changed of what a job reads since its result was made; ""
    where nothing has, or there is none."""
    now = (cfg.identity or {}).get(source_key(stage, item))
    was = sources.print_of(store, "made", recipe(cfg, stage, item), cfg.name)
    if not now or not was or now == was:
        return ""
    return f"{changes(_details(store, was), _details(store, now))} since it was read last"


def _details(store: Store, print_: str) -> Looked | None:
    return _seen.get(print_) or sources.looked_at(store, print_)


def _prints(looked: Mapping[JobKey, Looked]) -> dict[JobKey, str]:
    return {job: found.print for job, found in looked.items()}


def with_prints(cfg: RunConfig, prints: Mapping[JobKey, str]) -> RunConfig:
    """Return a run that goes by prints that are known."""
    identity = {source_key(*job): print_ for job, print_ in prints.items()}
    return cfg.model_copy(update={"identity": identity})


def _jobs(cfg: RunConfig) -> Iterator[JobKey]:
    for stage in cfg.stages:
        for item in cfg.items(stage):
            yield stage, item
