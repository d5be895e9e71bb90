"""Checkpoints of the same job under other settings.

An address is of one set of values: a training of which a setting was changed begins at step 0 at
another address, and what was done under the former value waits where it was. Each training notes
the settings that it began with, so that whoever changes one is told.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from ..config.base import DURATIONS, merge
from ..config.run import RunConfig
from ..errors import ConfigError
from ..families.load import parse
from ..store import in_use
from ..store.artifacts import Store, write_text
from ..store.reading import reading, sealed, unsealed
from .stages import Addresses, label

NOTE = "settings.json"
UNSET = "unset"
IDENTITY = "identity"  # of the note beside the settings: what was read outside the store
# More is no setting that somebody has changed but another run.
MOST_CHANGES = 3
# Of one job that are looked at: on Modal each costs requests.
MOST_FORMER = 8

Setting = tuple[str, ...]  # of a setting: loras, defaults, lr


def kept_settings(cfg: RunConfig) -> dict[str, Any]:
    """Return the resolved configuration less what no result depends on, so equal runs leave equal
    bytes."""
    left_out = {"runtime", "modal", "deploy", "name", "identity"}
    return cfg.model_dump(mode="json", exclude=left_out)


def note_settings(store: Store, address: str, cfg: RunConfig) -> None:
    """Write down beside a job's checkpoints what it began with."""
    folder = store.resume(address)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NOTE, sealed(kept_settings(cfg) | {IDENTITY: cfg.identity}))


def same_job(address: str, names: list[str]) -> list[str]:
    """Return those of the names of checkpoints' folders that are of the same job under other
    settings, a few of them."""
    job, _, _ = address.rpartition("-")
    pattern = re.compile(rf"{re.escape(job)}-[0-9a-f]{{12}}")
    found = [name for name in sorted(names) if name != address and pattern.fullmatch(name)]
    return found[:MOST_FORMER]


def former_checkpoint(addresses: Addresses, stage: str, item: str | None, store: Store) -> str:
    """Return a sentence about the checkpoint of this job that differs in the fewest settings, of
    those with the most steps; "" when there is none that no run in progress needs, or this job has
    one itself. Raises UnreadableFile, DamagedArtifact."""
    own = addresses.of(stage, item)
    if store.has(own) or saved_step(store, own):
        return ""
    best: tuple[int, int, str] | None = None
    # A run in progress goes on from its own by itself, as trials of experiments do side by side
    used = in_use.addresses(store)
    for address in same_job(own, [name for name in _begun(store) if name not in used]):
        step = saved_step(store, address)
        changes = _changes(addresses, (stage, item), store, address) if step else {}
        if not changes:
            continue
        was = ", ".join(f"{name} {value}" for name, (value, _) in changes.items())
        now = ", ".join(str(value) for _, value in changes.values())
        text = (
            f"{label(stage, item)}: a checkpoint at step {step} exists under {was} (here {now}); "
            "set that to go on from it, as this one begins at step 0"
        )
        best = min(filter(None, (best, (len(changes), -step, text))))
    return best[2] if best else ""


def _begun(store: Store) -> list[str]:
    """Return the names of all checkpoints' folders. Raises UnreadableFile."""
    folder = store.root / "resume"
    try:
        with reading(folder):
            return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def saved_step(store: Store, address: str) -> int:
    """Return the last step that a job's checkpoints have; 0 without one that can be read."""
    return max((step for step, _ in saved(store, address)), default=0)


def saved(store: Store, address: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the step of each checkpoint of a job, and the digests of what it was trained on; 0 for
    one that cannot be read, or that another job wrote."""
    for path in store.resume(address).glob("?/state.json"):
        try:
            run = unsealed(path.read_bytes())["run"]
            own = run.get("address") in (None, "", address)
            yield (int(run["step"]), dict(run.get("inputs", {}))) if own else (0, {})
        except (OSError, ValueError, KeyError, TypeError):
            yield 0, {}


def _changes(
    addresses: Addresses, job: tuple[str, str | None], store: Store, address: str
) -> dict[str, tuple[Any, Any]]:
    """Return {setting: (value there, value here)} of what makes another address of this one; {}
    when that is too much, or cannot be told."""
    try:
        there = unsealed((store.resume(address) / NOTE).read_bytes())
    except (OSError, ValueError):
        return {}
    read_there = {IDENTITY: there.pop(IDENTITY, None)}
    if read_there[IDENTITY] is None:
        # Of a version that did not look: to ask for its address would read all data for nothing
        return {}
    here = kept_settings(addresses.cfg)
    own = addresses.of(*job)
    read_here = {IDENTITY: addresses.cfg.identity}
    if _address(there | read_there, job) != address:
        return {}
    if _address(there | read_here, job) != address:
        # Of other data: no setting goes on from it, and what has changed of them is told anyway
        return {}
    ours = dict(_leaves(here))
    theirs = dict(_leaves(there))
    changes = {}
    for path in {**theirs, **ours}:
        was = theirs.get(path, UNSET)
        now = ours.get(path, UNSET)
        if was == now or (path[-1] in DURATIONS and was is None):
            # Tokens in the place of steps: it needs no telling that there were none
            continue
        # Of each setting alone: whether it matters to this job
        if now == UNSET:
            moves = _address(merge(here, _nested(path, was)) | read_here, job) != own
        else:
            moves = _address(merge(there, _nested(path, now)) | read_here, job) != address
        if moves:
            changes[".".join(path)] = (was, now)
        if len(changes) > MOST_CHANGES:
            return {}
    return changes


def _address(raw: dict[str, Any], job: tuple[str, str | None]) -> str | None:
    try:
        return Addresses(parse(raw)).of(*job)
    except (ConfigError, ValidationError, KeyError, TypeError):
        return None


def _leaves(raw: Mapping[str, Any], above: Setting = ()) -> Iterator[tuple[Setting, Any]]:
    """Yield every setting with its value; entries that have names stand under them."""
    for key, value in raw.items():
        path = (*above, key)
        if isinstance(value, list) and value and all(_named(each) for each in value):
            value = {each["name"]: each for each in value}
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _named(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)


def _nested(path: Setting, value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value
