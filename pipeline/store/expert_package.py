"""A trained expert as a package: a folder with its tensors, its statistics and a sealed
description, that anyone may have made.

Invariant: nothing is read before its size is known and allowed, nothing is copied that is not named
with its sha256 in the sealed description, and nothing but tensors and that description is opened.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, Protocol, cast

from pydantic import Field

from .artifacts import flush, sha256, write_text
from .foreign import ForeignFile, check_name
from .reading import as_kind, sealed, unsealed
from .room import writing
from .tensor_header import Wanted, check_tensors
from .upload import open_url, without_password

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FORMAT = 1
ABOUT = "expert.json"
EXPERT = "expert.safetensors"
STATISTICS = "statistics.safetensors"
FILES = {ABOUT, EXPERT, STATISTICS}
ABOUT_BYTES = 1 << 20
BLOCK_BYTES = 4 << 20
# Filesystems that cannot say what lies in a folder
UNLISTED = {"http", "https"}
# What strangers wrote is printed and put into reports: no word of theirs but these
Sum = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Tokens = Annotated[int, Field(ge=0, le=10**15)]


@dataclass(frozen=True)
class PackedFile:
    """A file of a package as it was packed."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sum


@dataclass(frozen=True)
class Noise:
    """What was added to statistics, and what it promises of each document."""

    epsilon: float
    delta: float
    clip: float  # most length of a layer's mean input, in lengths that the trunk's text has


@dataclass(frozen=True)
class ExpertFacts:
    """What expert.json says."""

    name: str
    form: Literal["full", "low_rank"]
    rank: int  # 0: full
    scale: float  # of a low-rank product
    layers: tuple[int, ...]
    trunk: Sum  # fingerprints, see families/ffn_moe/fingerprint.py
    tokenizer: Sum
    dtype: Literal["fp32", "bf16"]  # of the arithmetic it was trained in
    context_tokens: int
    tokens: Tokens  # it was trained on
    statistics_path: Literal["own", "base"]
    noise: Noise | None = None
    licence: str = ""
    description: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, PackedFile] = field(default_factory=dict)
    format: int = FORMAT


class _Place(Protocol):
    def sizes(self) -> dict[str, int] | None:
        """Bytes by name of everything there; None where that cannot be listed."""

    def size(self, name: str) -> int:
        """Bytes of one file. Raises OSError."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """One file, for reading."""


@dataclass(frozen=True)
class Package:
    """A package that was looked at: its description is whole, its files have the sizes it says."""

    place: _Place
    facts: ExpertFacts
    about: bytes  # of expert.json, which holds the sums of the others

    def take(self, name: str, wanted: Wanted, target: Path) -> None:
        """Copy a file of the tensors that are wanted, no byte more than it was said to have.

        Raises ForeignFile for a header of other tensors, before anything is copied, and for what is
        not what was packed; DiskFull, OSError.
        """
        with self.place.open(name) as file:
            check_tensors(file, name, self.facts.files[name].bytes, wanted)
        self._copy(name, target)
        # Again, of the bytes that stay: those out there may be others by now
        with target.open("rb") as file:
            check_tensors(file, name, self.facts.files[name].bytes, wanted)

    def _copy(self, name: str, target: Path) -> None:
        packed = self.facts.files[name]
        digest = hashlib.sha256()
        left = packed.bytes
        with self.place.open(name) as source, writing(target), target.open("wb") as copy:
            while left and (block := source.read(min(left, BLOCK_BYTES))):
                copy.write(block)
                digest.update(block)
                left -= len(block)
        if left or digest.hexdigest() != packed.sha256:
            raise ForeignFile(f"{name} is not what was packed (sha256 differs); copy it again")
        flush(target)


def open_package(source: str, most_bytes: int) -> Package:
    """Look at a package in a folder or at an fsspec URL: what lies there, how large it is, and its
    description.

    Raises ForeignFile for what is no package or over most_bytes; StoreError, OSError.
    """
    place = _place(source)
    sizes = place.sizes()
    if sizes is not None:
        _check_names(sizes)
    data = _described(place)
    try:
        values = unsealed(data, indent=1)
    except ValueError as error:
        raise ForeignFile(f"{ABOUT} is not what was written: {error}; copy it again") from None
    facts = _facts(values)
    if sizes is None:
        # A server need not say how much it has; no more than was said is read in any case
        sizes = {name: place.size(name) or said.bytes for name, said in facts.files.items()}
    _check_sizes(facts, sizes, most_bytes)
    return Package(place, facts, data)


def package_print(source: str) -> str:
    """Return the sha256 of a package's expert.json, which holds those of its other files; "" where
    it cannot be read, which whoever opens the package says. A URL is asked once in a process."""
    return _remote_print(source) if "://" in source else _print(source)


def _print(source: str) -> str:
    try:
        return hashlib.sha256(_described(_place(source))).hexdigest()
    except Exception:  # a filesystem raises what it likes
        return ""


_remote_print = cache(_print)


def write_package(folder: Path, facts: ExpertFacts) -> None:
    """Seal an expert's files in a folder, which holds them and nothing else: expert.json is written
    last. `files` of facts are found here. Raises DiskFull."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = PackedFile(path.stat().st_size, sha256(path))
    values = asdict(facts) | {"files": {name: asdict(each) for name, each in files.items()}}
    write_text(folder / ABOUT, sealed(values, indent=1))


def _place(source: str) -> _Place:
    if "://" not in source:
        return _Folder(Path(source))
    fs, root = open_url(source, "expert.imported")
    return _Remote(fs, root, without_password(source))


def _check_names(sizes: Mapping[str, int]) -> None:
    """Raise ForeignFile for what is no part of a package, or a package that is not whole."""
    for name in sorted(sizes.keys() - FILES):
        check_name(name)
        raise ForeignFile(f"{name} is no file of a package; remove it")
    for name in (ABOUT, EXPERT):
        if name not in sizes:
            raise ForeignFile(f"{name} is not there; name the folder of a packed expert")


def _described(place: _Place) -> bytes:
    """Return the bytes of expert.json. Raises ForeignFile when there are too many of them."""
    # One more than may be, so that a long file is known without reading it
    with place.open(ABOUT) as file:
        data = file.read(ABOUT_BYTES + 1)
    if len(data) > ABOUT_BYTES:
        raise ForeignFile(f"{ABOUT} is over {ABOUT_BYTES:,} bytes")
    return data


def _facts(values: Mapping[str, Any]) -> ExpertFacts:
    version = values.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise ForeignFile(
            f"{ABOUT} is of format {version}, and this version reads up to {FORMAT}; update "
            "MoleForge"
        )
    try:
        return as_kind(ExpertFacts, dict(values))
    except ValueError as error:
        said = ascii(str(error)[:120])
        raise ForeignFile(f"{ABOUT} is no description of an expert: {said}") from None


def _check_sizes(facts: ExpertFacts, sizes: Mapping[str, int], most_bytes: int) -> None:
    """Raise ForeignFile for files that are others than the description names, or too large."""
    named = {name: packed.bytes for name, packed in facts.files.items()}
    if EXPERT not in named or not named.keys() < FILES:
        raise ForeignFile(f"{ABOUT} names other files than a package has")
    for name in sorted(named.keys() | sizes.keys() - {ABOUT}):
        if sizes.get(name) != named.get(name):
            found, said = sizes.get(name, 0), named.get(name, 0)
            raise ForeignFile(f"{name} has {found:,} bytes, and {ABOUT} says {said:,}")
    total = sum(named.values())
    if total > most_bytes:
        raise ForeignFile(
            f"{EXPERT} and what is beside it have {total:,} bytes, over "
            f"expert.imported_bytes ({most_bytes:,}); raise that if you trust it"
        )


@dataclass(frozen=True)
class _Folder:
    """A folder of this machine, none of whose files is a link."""

    folder: Path

    def sizes(self) -> dict[str, int]:
        if self.folder.is_file():
            raise ForeignFile(f"{self.folder.name} is a file, and a package is a folder")
        found = {}
        with os.scandir(self.folder) as listing:
            for entry in listing:
                if entry.is_symlink():
                    raise ForeignFile(
                        f"{entry.name} is a link, and nothing in a package may lead elsewhere"
                    )
                if not entry.is_file(follow_symlinks=False):
                    raise ForeignFile(f"{entry.name} is no file, and a package holds files alone")
                found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        path = self.folder / name
        # A look opens what nobody has listed: a pipe would be waited for, a link lead elsewhere
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ForeignFile(f"{name} is no file, and a package holds files alone")
        return path.open("rb")


@dataclass(frozen=True)
class _Remote:
    """A folder at an fsspec URL."""

    fs: "AbstractFileSystem"
    root: str
    shown: str

    def sizes(self) -> dict[str, int] | None:
        protocol = self.fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        if protocols & UNLISTED:
            return None
        found = {}
        for entry in self.fs.ls(self.root, detail=True):
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["type"] != "file" or entry.get("islink"):
                raise ForeignFile(f"{name} is no file, and a package holds files alone")
            found[name] = int(entry["size"])
        return found

    def size(self, name: str) -> int:
        return int(self.fs.info(f"{self.root}/{name}")["size"] or 0)

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        return cast("AbstractContextManager[BinaryIO]", self.fs.open(f"{self.root}/{name}", "rb"))
