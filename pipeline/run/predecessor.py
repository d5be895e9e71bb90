"""What a run was before it came to be what it is, as far as the roots in its store tell.

A domain that comes or goes gives a run other addresses under the same name and file; the root that
it left as it was stays.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from ..config.run import RunConfig
from ..store.address import job_of
from ..store.artifacts import Store
from ..store.removed import FOLDER, Removed, note_removed, removed
from ..store.roots import Root, readable_roots
from .leftovers import anything_at
from .reach import as_given, root_of
from .stages import STAGES, Addresses, is_report

EXPERTS = "train_experts"  # the stage whose results can leave a run
OF_DOMAINS = ("preprocess", "lr_experts", EXPERTS)  # those with a job for each domain


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
    """Write down that an expert was taken out of a run, with what was made of it alone, by former
    runs of the same name and configuration too. Raises DiskFull, OSError, UnreadableFile."""
    named = as_given(file)
    had = set(Addresses(before).reachable())
    for root in predecessors(store, before.name, named):
        had.update(root.addresses)
    kept = set(Addresses(after).reachable())
    addresses = _of_domain(domain, had - kept, store)
    return note_removed(store, domain, before.name, named, addresses)


def note_since(
    cfg: RunConfig, file: Path | str, overrides: tuple[str, ...], store: Store
) -> list[Removed]:
    """Write down which experts former runs of the same name and configuration had that this one
    has no more, however they were taken out. Raises DiskFull, OSError, UnreadableFile."""
    own = root_of(cfg, file, overrides)
    return note_all_gone(own, predecessors(store, own.name, own.file, but=own.id), cfg, store)


def note_all_gone(
    own: Root, before: Sequence[Root], after: RunConfig, store: Store
) -> list[Removed]:
    """Write down which experts former runs had, the last one first, that another one has no more,
    each once since a run had it. `own` is the root of that other. Raises DiskFull, OSError,
    UnreadableFile."""
    # Two runs that begin at once would each find that it is not noted
    with store.lock(FOLDER):
        return _note_all(own, before, after, store)


def _note_all(own: Root, before: Sequence[Root], after: RunConfig, store: Store) -> list[Removed]:
    noted: dict[str, str] = {}
    for gone in removed(store)[0]:
        if (gone.run, gone.file) == (own.name, own.file):
            noted[gone.domain] = max(gone.at, noted.get(gone.domain, ""))
    had = {address for root in before for address in root.addresses}
    had -= set(Addresses(after).reachable())
    # What is there is no loss, and of what is not there the last one that had it tells
    seen = set(after.experts)
    notes = []
    for root in before:
        if root.overrides != own.overrides:
            continue
        for domain in _begun(root, seen, store):
            if noted.get(domain, "") < root.at:
                addresses = _of_domain(domain, had, store)
                notes.append(note_removed(store, domain, root.name, root.file, addresses))
            seen.add(domain)
    return notes


def _begun(root: Root, but: Collection[str], store: Store) -> list[str]:
    """Return whose experts a run has or has begun, less those named: one whose text was refused, or
    that was stopped before, has left nothing that could be gone."""
    found: dict[str, None] = {}
    for address in root.addresses:
        stage, item = job_of(address)
        if (
            stage == EXPERTS
            and item is not None
            and item not in but
            and anything_at(store, address)
        ):
            found[item] = None
    return list(found)


def _of_domain(domain: str, had: Collection[str], store: Store) -> tuple[str, ...]:
    """Return what of some addresses is of a domain alone and in the store, also what is begun."""
    found = []
    for address in sorted(had):
        stage, item = job_of(address)
        # A dense model may be called as a domain is
        if stage in OF_DOMAINS and item == domain and anything_at(store, address):
            found.append(address)
    return tuple(found)
