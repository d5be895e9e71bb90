"""Finished work in one directory that several processes or machines may share.

An artifact is a folder whose manifest.json is written last: with a manifest it is whole, without
one it is absent. One writer per address; nothing is edited once its manifest exists.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import (
    DiskFull,
    MissingArtifact,
    StoreError,
    UnreadableFile,
)
from ..protocols import Progress, quiet
from . import manifest as manifests
from .hashed import Hashed
from .manifest import Manifest
from .mark import FORMAT, MARK, check_format, read_format
from .reading import (
    absence,
    check_folder,
    damaged,
    exists,
    reading,
    sealed,
)
from .room import PART, no_room, writing

if TYPE_CHECKING:
    import torch

STORE_VARIABLE = "MOLEFORGE_STORE"
DEFAULT_STORE = "store"
# Files up to this are hashed by every job that opens their artifact, larger ones once on a machine.
SMALL_BYTES = 16_000_000
# What an artifact that is made again is called meanwhile, below the folder of its checkpoints.
FORMER = "former"
FOLDERS = ("artifacts", "resume", "jobs", "history", "locks", "runs", "roots", "removed")
# Of these it takes seconds to read one through, and a job says what it is doing.
TOLD_BYTES = 1_000_000_000


def _nothing() -> None: ...


def _nothing_of(_address: str) -> None: ...


def default_root() -> Path:
    """Where results are kept unless a command says otherwise."""
    return Path(os.environ.get(STORE_VARIABLE) or DEFAULT_STORE)


@dataclass(frozen=True)
class Store:
    """A directory and callables that make it shared (Modal volumes); here they do nothing."""

    root: Path
    publish: Callable[[], None] = _nothing  # let other machines see our writes
    refresh: Callable[[], None] = _nothing  # see theirs; no file may be open
    # raise LeaseLost where another machine may be at the job of an address by now
    confirm: Callable[[str], None] = _nothing_of

    @property
    def is_published(self) -> bool:
        """Whether it is one of many machines, which live for a job each and have views of their
        own."""
        return self.publish is not _nothing

    def folder(self, address: str) -> Path:
        """Where an artifact is or will be."""
        return self.root / "artifacts" / address

    def resume(self, address: str) -> Path:
        """Where the checkpoints of a run in progress are."""
        return self.root / "resume" / address

    def history(self, address: str) -> Path:
        """The history file of the job that makes an address; one writer."""
        return self.root / "history" / f"{address}.jsonl"

    def open(self, create: bool = True) -> "Store":
        """Check who wrote the store and create it if need be; returns itself.

        Raises OldStore, NewerStore, DamagedArtifact, UnreadableFile, DiskFull or StoreError.
        """
        mark = self.root / MARK
        try:
            if self.root.is_symlink():
                check_folder(self.root)
            if create and not exists(mark):
                self.root.mkdir(parents=True, exist_ok=True)
                with self.lock("store"):
                    # Asked again under the lock, as two commands may be the first at once
                    if not exists(mark):
                        write_text(mark, sealed({"format": FORMAT}))
        except DiskFull as error:
            error.in_store = True
            raise
        except OSError as error:
            full = no_room(error, self.root)
            if full:
                full.in_store = True
                raise full from None
            raise StoreError(
                f"{self.root} cannot be used as a store: {error}", root=self.root
            ) from None
        if create or self._is_there(mark):
            check_format(read_format(self.root), self.root)
        for name in FOLDERS:
            check_folder(self.root / name)
        return self

    def has(self, address: str) -> bool:
        """Whether the artifact is whole, as far as its manifest is there.

        Raises StoreError when something else lies in its place, UnreadableFile when the system does
        not say: what may not be seen must not be made again over itself.
        """
        return self._is_there(self.folder(address) / manifests.NAME)

    def _is_there(self, path: Path) -> bool:
        """Whether anything lies at a path of the store. Raises StoreError or UnreadableFile."""
        try:
            if exists(path):
                return True
        except NotADirectoryError:
            pass
        # Rarely asked: on the way there is nothing, or a link to nothing, or a file
        above = [folder for folder in path.parents if folder.is_relative_to(self.root)]
        for folder in reversed(above):
            check_folder(folder)
        return False

    def manifest(self, address: str) -> Manifest:
        """Read a manifest. Raises DamagedArtifact or UnreadableFile."""
        return manifests.read(self.folder(address))

    def require(self, address: str, known: Manifest | None = None) -> Manifest:
        """Return the manifest of an artifact whose files are all there, by their sizes; `known` is
        the manifest where it was read already.

        Raises MissingArtifact, DamagedArtifact, UnreadableFile or StoreError.
        """
        if not self.has(address):
            # Names of stages have no hyphen, those of items may
            stage = address.split("-")[0]
            raise MissingArtifact(
                f"{address} is not in {self.root}", address=address, stages=(stage,)
            )
        manifest = known or self.manifest(address)
        for name, entry in manifest.files.items():
            path = self.folder(address) / name
            try:
                with reading(path):
                    found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                raise damaged(path, absence(path)) from None
            if found.st_size != entry["bytes"] or not stat.S_ISREG(found.st_mode):
                raise damaged(path, f"has {found.st_size} bytes, not {entry['bytes']}")
        return manifest

    def begin(self, address: str) -> Path:
        """Return the artifact's folder, emptied of what a killed writer left.

        A whole artifact that is made again waits beside the checkpoints until the new one is whole.
        Raises StoreError.
        """
        folder = self.folder(address)
        # before anything is moved: what a job leaves on its way goes there
        check_folder(self.resume(address))
        if self.has(address):
            former = self.resume(address) / FORMER
            if former.exists():
                shutil.rmtree(former)
            former.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(former)
        elif folder.is_symlink():
            raise StoreError(
                f"{folder} is a link to what is no artifact, and nothing is removed through a "
                "link: remove the link"
            )
        check_folder(folder)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def finish(self, manifest: Manifest) -> Manifest:
        """Flush every file, write the manifest last, publish, and drop the checkpoints. Raises
        LeaseLost."""
        # Two manifests of one address would each say what the other one's files need not be
        self.confirm(manifest.address)
        folder = self.folder(manifest.address)
        for name in manifest.files:
            flush(folder / name)
        flush(folder)
        write_text(folder / manifests.NAME, manifest.text())
        self.publish()
        # after it is published: until others see the artifact, the checkpoints are all that they
        # could go on from
        shutil.rmtree(self.resume(manifest.address), ignore_errors=True)
        return manifest

    def publish_checkpoint(self, address: str) -> None:
        """Let other machines see a checkpoint, from which one may go on. Raises LeaseLost where it
        may be at that by now."""
        self.publish()
        self.confirm(address)

    def addresses(self) -> list[str]:
        """Every address with a folder, whole or not. Raises StoreError or UnreadableFile."""
        folder = self.root / "artifacts"
        if not self._is_there(folder):
            return []
        check_folder(folder)
        with reading(folder):
            return sorted(path.name for path in folder.iterdir() if path.is_dir())

    @contextlib.contextmanager
    def lock(self, address: str, waiting: Callable[[], None] = _nothing) -> Iterator[None]:
        """Hold the address's lock; calls `waiting` once when another process has it, then waits.

        The system lets go of the lock when its holder dies, however it dies.
        """
        from filelock import FileLock, Timeout

        path = self.root / "locks" / f"{address}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


class Reader:
    """What one job reads of a store: each manifest is read once and each file hashed once.

    It is made after the store's refresh and thrown away with the job: what it remembers would be
    wrong after another refresh. Of tensors it keeps nothing, so that they are freed with their
    user.
    """

    def __init__(self, store: Store, progress: Progress = quiet) -> None:
        self.store = store
        self._progress = progress
        self._manifests: dict[str, Manifest] = {}
        self._whole: set[str] = set()
        self._right: set[tuple[str, str]] = set()
        self._sums: dict[Path, str] = {}
        self._hashed: Hashed | None = None
        if not store.is_published:
            self._hashed = Hashed(store.root, lambda: store.lock("hashed"), write_text)

    def manifest(self, address: str) -> Manifest:
        """Return an artifact's manifest. Raises MissingArtifact, DamagedArtifact, UnreadableFile or
        StoreError."""
        if address not in self._whole:
            known = self._manifests.get(address)
            self._manifests[address] = self.store.require(address, known)
            self._whole.add(address)
        return self._manifests[address]

    def recorded(self, address: str) -> Manifest:
        """Return a manifest without a look at the files. Raises DamagedArtifact or
        UnreadableFile."""
        if address not in self._manifests:
            self._manifests[address] = self.store.manifest(address)
        return self._manifests[address]

    def folder(self, address: str) -> Path:
        """Return an artifact's folder after a check of its files' sha256, of those over SMALL_BYTES
        once on a machine. Raises what `manifest` does."""
        for name in self.manifest(address).files:
            self._check(address, name)
        return self.store.folder(address)

    def tensors(self, address: str, name: str) -> "dict[str, torch.Tensor]":
        """Load a safetensors file after a check of its sha256, as `folder` does. Raises what
        `manifest` does."""
        self._check(address, name)
        return load_tensors(self.store.folder(address) / name)

    def file_sum(self, path: Path, expected: str = "") -> str:
        """Return the sha256 of a file outside the store. One that this machine has found to be what
        is expected, and that is unchanged since, is not read again.

        Raises OSError when it is not there, UnreadableFile.
        """
        if path not in self._sums:
            remembered = self._hashed
            if remembered and expected and remembered.holds(path, expected):
                self._sums[path] = expected
            else:
                self._sums[path] = self._read_through(path)
        return self._sums[path]

    def _read_through(self, path: Path) -> str:
        """Hash a file outside the store, and remember what it was found to be."""
        with reading(path):
            before = path.stat()
            self._tell(path, before.st_size)
            found = sha256(path)
        if self._hashed:
            self._hashed.note(path, before, found)
        return found

    def _tell(self, path: Path, size: int) -> None:
        if size > TOLD_BYTES:
            self._progress(f"checking {path} ({size / 1e9:.1f} GB)", None)

    def _check(self, address: str, name: str) -> None:
        if (address, name) in self._right:
            return
        path = self.store.folder(address) / name
        entry = self.manifest(address).files[name]
        remembered = self._hashed if entry["bytes"] > SMALL_BYTES else None
        if not (remembered and remembered.holds(path, entry["sha256"])):
            self._hash(path, entry, remembered)
        self._right.add((address, name))

    def _hash(self, path: Path, entry: dict, remembered: Hashed | None) -> None:
        """Compare a file with its sum. Raises DamagedArtifact or UnreadableFile."""
        self._tell(path, entry["bytes"])
        try:
            with reading(path):
                before = path.stat()
                found = sha256(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise damaged(path, absence(path)) from None
        if found != entry["sha256"]:
            raise damaged(path, "is not what was written (sha256 differs)")
        if remembered:
            remembered.note(path, before, found)


def inventory(folder: Path) -> dict[str, dict]:
    """Return {relative path: {"sha256", "bytes"}} of every file below an artifact's folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            name = path.relative_to(folder).as_posix()
            files[name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    return files


def sha256(path: Path) -> str:
    """Return a file's sha256 in hex, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file and its folder's entry to disk. Raises DiskFull."""
    # a file whose entry is lost in a power cut is as good as never written
    for target in (path, path.parent):
        handle = os.open(target, os.O_RDONLY)
        try:
            # some systems find out only now that there is no room
            with writing(path):
                os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: part file, flush, rename, flush of the folder. Raises
    DiskFull."""
    part = path.with_name(path.name + PART)
    with writing(path):
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        flush(path)


def save_tensors(path: Path, tensors: "dict[str, torch.Tensor]") -> None:
    """Write a safetensors file. Raises DiskFull."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with writing(path):
        # transformers before 5 insists on the format
        save_file(plain, path, metadata={"format": "pt"})
        set_mode(path)


def set_mode(path: Path) -> None:
    """Give a file of safetensors, which lets nobody but this user read what it writes, the mode
    that new files get here."""
    # the umask can only be read by setting it, and that for all threads: ask a new file
    probe = path.with_name(f"{path.name}.mode.part")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    path.chmod(mode)


def load_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """Read a safetensors file. Raises DamagedArtifact or UnreadableFile."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # First: whatever the system refuses, safetensors says that there is no such file
        with reading(path), path.open("rb") as file:
            file.read(1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise damaged(path, absence(path)) from None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) or "os error" in str(error):
            raise UnreadableFile(f"{path} cannot be read: {error}", path=path) from None
        raise damaged(path, f"cannot be read: {error}") from None


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
