"""What was taken out of a run: a sealed note for each expert that is gone, so that a person can
show what left, when, and by which configuration.

Invariant: a note is written once and names what there was; whether its files are still in the store
is for those who remove files to say.
"""

import hashlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import StoreError
from .artifacts import Store, now, write_text
from .reading import as_kind, damaged, read_bytes, reading, sealed, unsealed

FOLDER = "removed"


@dataclass(frozen=True)
class Removed:
    """An expert that was taken out of a run."""

    domain: str
    run: str  # name of the run
    file: str  # the configuration that it was taken out of
    at: str  # ISO 8601
    # what was made of it alone, as far as it was in the store or was begun
    addresses: tuple[str, ...]


def note_removed(
    store: Store, domain: str, run: str, file: str, addresses: tuple[str, ...]
) -> Removed:
    """Write down that a domain was taken out. Raises DiskFull, OSError."""
    found = Removed(domain, run, file, now(), addresses)
    folder = store.root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    text = sealed(asdict(found))
    # A run beside this one may lose a domain of that name in the same second
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    # Signs of a time that no file system takes
    name = f"{found.at}-{domain}-{digest}".replace(":", "")
    write_text(folder / f"{name}.json", text)
    store.publish()
    return found


def removed(store: Store) -> tuple[list[Removed], list[str]]:
    """Return what was taken out of the runs of a store, the first one first, and what is wrong with
    notes that cannot be read: nobody needs one to go on. Raises UnreadableFile."""
    folder = store.root / FOLDER
    found = []
    wrong = []
    with reading(folder), suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            if path.suffix != ".json":
                continue
            try:
                found.append(_read(path))
            except StoreError as error:
                wrong.append(str(error))
    return found, wrong


def _read(path: Path) -> Removed:
    data = read_bytes(path)
    try:
        return as_kind(Removed, unsealed(data))
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"is torn or its bytes have changed ({error})") from None


def told_removed(gone: Removed, store: Store) -> str:
    """Return a sentence about an expert that was taken out."""
    there = []
    for address in gone.addresses:
        # Checkpoints have learned from its text too
        if store.folder(address).exists() or store.resume(address).exists():
            there.append(address)
    files = f"; still in {store.root}: {', '.join(there)}" if there else ""
    return f"removed: {gone.domain} at {gone.at} from {gone.run} ({gone.file}){files}"
