"""What a run was before it came to be what it is, as far as the roots in its store tell.

A domain that comes or goes gives a run other addresses under the same name and file; the root that
it left as it was stays.
"""

from pathlib import Path

from pydantic import ValidationError

from ..config.run import RunConfig
from ..errors import PipelineError
from ..families.load import parse
from ..store.artifacts import Store
from ..store.removed import Removed, note_removed, removed
from ..store.roots import Root, readable_roots
from .reach import as_given, root_of
from .stages import RUN, STAGES, Addresses, is_report


def predecessors(store: Store, name: str, file: str, but: str = "") -> list[Root]:
    """Return the roots of the runs of that name and configuration, the last one first, less the one
    with the id `but`. Raises UnreadableFile."""
    found = []
    # One that cannot be read has nothing to compare with
    for root in readable_roots(store):
        if (root.name, root.file) == (name, file) and root.id != but:
            found.append(root)
    return found


def reported(roots: list[Root], store: Store) -> str:
    """Return the address of the report of the first of the runs that has one in the store, ""
    where none has."""
    for root in roots:
        for address in root.addresses:
            stage, _, _ = address.partition("-")
            if stage in STAGES and is_report(stage) and store.has(address):
                return address
    return ""


def note_gone(
    domain: str, before: RunConfig, after: RunConfig, file: Path | str, store: Store
) -> Removed:
    """Write down that an expert was taken out of a run, with what was made of it alone. Raises
    DiskFull, OSError."""
    kept = set(Addresses(after).reachable())
    gone = []
    for stage in RUN:
        for _, item, address in Addresses(before).jobs(stage):
            # The text of one that the trunk has learned from stays
            if item == domain and address not in kept and store.has(address):
                gone.append(address)
    return note_removed(store, domain, before.name, as_given(file), tuple(gone))


def note_since(
    cfg: RunConfig, file: Path | str, overrides: tuple[str, ...], store: Store
) -> list[Removed]:
    """Write down which experts the last run of the same name and configuration had that this one
    has no more, however they were taken out. Raises DiskFull, OSError, UnreadableFile."""
    own = root_of(cfg, file, overrides)
    for root in predecessors(store, own.name, own.file, but=own.id):
        if root.overrides == own.overrides:
            return note_all_gone(root, cfg, store)
    return []


def note_all_gone(root: Root, after: RunConfig, store: Store) -> list[Removed]:
    """Write down which experts of a former run another one has no more, once each. Raises DiskFull,
    OSError, UnreadableFile."""
    try:
        before = parse(root.settings)
    except (PipelineError, ValidationError, KeyError, TypeError):
        # Of a version whose settings are none here: what it had is not known
        return []
    known = set()
    for gone in removed(store)[0]:
        if (gone.run, gone.file) == (before.name, root.file) and gone.at >= root.at:
            known.add(gone.domain)
    notes = []
    for domain in before.experts:
        if domain not in after.experts and domain not in known:
            notes.append(note_gone(domain, before, after, root.file, store))
    return notes
