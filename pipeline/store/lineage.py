"""Which results were made on what the store holds now, told by manifests alone.

A part that was made again has the same address and other bytes. Whatever was made on the former
one, directly or over others, is stale: whole, but no result of what is there now.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import StaleArtifact
from .artifacts import Manifest, Store


@dataclass(frozen=True)
class Change:
    """An input that is not the one that an artifact was made on."""

    reader: str  # the artifact that was made on it
    source: str
    recorded: str  # digest of what it was made on
    found: str  # digest of what is there now

    def told_of(self, address: str = "") -> str:
        """Return this as a sentence, about an artifact where it is told of one."""
        who = "it" if self.reader == address else self.reader
        digests = f"digest {self.recorded[:12]}, found {self.found[:12]}"
        text = f"{who} was made on another {self.source} than the one there ({digests})"
        return f"{address} is stale: {text}" if address else text


class Lineage:
    """What is stale in a store, each manifest read once: made after a refresh, not kept over the
    next.

    `read` is where manifests come from, the store unless somebody has read them already. An input
    that is not in the store tells nothing, so it makes nothing stale.
    """

    def __init__(self, store: Store, read: Callable[[str], Manifest] | None = None) -> None:
        self.store = store
        self._read = read or store.manifest
        self._known: dict[str, Change | None] = {}
        self._absent: dict[str, str] = {}

    def change(self, address: str) -> Change | None:
        """Return what makes an artifact stale, the first of it; None when it is current or absent.

        Raises DamagedArtifact for a manifest that cannot be read.
        """
        if address not in self._known:
            # Asked for below again only by manifests that name each other, which none of ours do
            self._known[address] = None
            self._known[address] = self._found(address)
        return self._known[address]

    def _found(self, address: str) -> Change | None:
        if not self.store.has(address):
            return None
        inputs = self._read(address).inputs
        change = self.differing(address, inputs)
        if change:
            return change
        for source in inputs:
            earlier = self.change(source)
            if earlier:
                return earlier
        return None

    def differing(self, reader: str, inputs: Mapping[str, str]) -> Change | None:
        """Return the first of a reader's inputs, address -> digest, that is another one now."""
        for source, recorded in inputs.items():
            if not self.store.has(source):
                continue
            found = self._read(source).digest
            if found != recorded:
                return Change(reader, source, recorded, found)
        return None

    def absent(self, address: str) -> str:
        """Return what an artifact was made on, directly or over others, and is not in the store,
        "" when all of it is: once that is made again it shows whether the artifact is current."""
        if address not in self._absent:
            self._absent[address] = ""
            self._absent[address] = self._first_absent(address)
        return self._absent[address]

    def _first_absent(self, address: str) -> str:
        if not self.store.has(address):
            return address
        found = map(self.absent, self._read(address).inputs)
        return next(filter(None, found), "")

    def is_current(self, address: str) -> bool:
        """Whether an artifact is there and was made on what is there. Raises DamagedArtifact."""
        return self.store.has(address) and self.change(address) is None

    def check(self, *addresses: str) -> None:
        """Raise StaleArtifact when one of some artifacts is stale, with the stages that make all of
        them current; or DamagedArtifact."""
        stale = [address for address in addresses if self.change(address)]
        if not stale:
            return
        stages: dict[str, None] = {}
        for address in stale:
            stages |= dict.fromkeys(self._stages(address, set()))
        raise StaleArtifact(self.told(stale[0]), address=stale[0], stages=tuple(stages))

    def told(self, address: str) -> str:
        """Return why an artifact is stale, as a sentence; "" when it is not."""
        change = self.change(address)
        return change.told_of(address) if change else ""

    def _stages(self, address: str, seen: set[str]) -> Iterator[str]:
        """Yield the stages of a stale artifact and of the stale ones that it was made on, first
        what others read."""
        seen.add(address)
        manifest = self._read(address)
        for source in manifest.inputs:
            if source not in seen and self.change(source):
                yield from self._stages(source, seen)
        yield manifest.stage
