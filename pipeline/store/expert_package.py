"""A trained expert as a package: a folder with its tensors, its statistics and a sealed
description, that anyone may have made.

Invariant: nothing is read before its size is known and allowed, nothing is copied that is not named
with its sha256 in the sealed description, and nothing but tensors and that description is opened.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .artifacts import sha256, write_text
from .foreign import ForeignFile, check_name
from .package_place import ExpertSource, PackagePlace, place_of, read_start, take_tensors
from .reading import as_kind, sealed, unsealed
from .saved_adapter import SETTINGS, SavedAdapter, open_saved
from .tensor_header import Wanted, found_tensors

FORMAT = 1
ABOUT = "expert.json"
EXPERT = "expert.safetensors"
STATISTICS = "statistics.safetensors"
FILES = {ABOUT, EXPERT, STATISTICS}
ABOUT_BYTES = 1 << 20
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
    form: Literal["full", "low_rank", "adapter"]
    rank: int  # 0: full
    scale: float  # of a low-rank product
    layers: tuple[int, ...]
    # Fingerprints, see families/ffn_moe/fingerprint.py; of a base with its own tokenizer both are
    # the digest of its pin
    trunk: Sum
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


@dataclass(frozen=True)
class Package:
    """A package that was looked at: its description is whole, its files have the sizes it says."""

    place: PackagePlace
    facts: ExpertFacts
    about: bytes  # of expert.json, which holds the sums of the others

    def tensors(self, name: str) -> Wanted:
        """Return the dtype and the shape of each tensor of a file, as its header says. Raises
        ForeignFile, OSError."""
        with self.place.open(name) as file:
            return found_tensors(file, name, self.facts.files[name].bytes)

    def take(self, name: str, wanted: Wanted, target: Path) -> None:
        """Copy a file of the tensors that are wanted, no byte more than it was said to have.

        Raises ForeignFile for a header of other tensors, before anything is copied, and for what is
        not what was packed; DiskFull, OSError.
        """
        packed = self.facts.files[name]
        take_tensors(self.place, name, packed.bytes, wanted, target, packed.sha256)


def open_package(source: ExpertSource) -> Package:
    """Look at a package in a folder or at an fsspec URL: what lies there, how large it is, and its
    description.

    Raises ForeignFile for what is no package or too large; StoreError, OSError.
    """
    place = place_of(source.source, source.setting)
    sizes = place.sizes()
    if sizes is not None:
        _check_names(sizes)
    data = read_start(place, ABOUT, ABOUT_BYTES)
    try:
        values = unsealed(data, indent=1)
    except ValueError as error:
        raise ForeignFile(f"{ABOUT} is not what was written: {error}; copy it again") from None
    facts = _facts(values)
    if sizes is None:
        # A server need not say how much it has; no more than was said is read in any case
        sizes = {name: place.size(name) or said.bytes for name, said in facts.files.items()}
    _check_sizes(facts, sizes, source)
    return Package(place, facts, data)


def open_expert(source: ExpertSource) -> Package | SavedAdapter:
    """Look at a package, or at an adapter as PEFT saves it. Raises ForeignFile for what is neither;
    StoreError, OSError."""
    place = place_of(source.source, source.setting)
    if place.has(ABOUT):
        return open_package(source)
    if place.has(SETTINGS):
        return open_saved(source)
    raise ForeignFile(
        f"there is neither {ABOUT}, of a package, nor {SETTINGS}, which PEFT's save_pretrained "
        "writes; name the folder of one"
    )


def package_print(source: str) -> str:
    """Return the sha256 of a package's expert.json, which holds those of its other files; "" where
    it cannot be read, which whoever opens the package says. A URL is asked once in a process."""
    return _remote_print(source) if "://" in source else _print(source)


def _print(source: str) -> str:
    try:
        data = read_start(place_of(source, ExpertSource.setting), ABOUT, ABOUT_BYTES)
        return hashlib.sha256(data).hexdigest()
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


def _check_names(sizes: Mapping[str, int]) -> None:
    """Raise ForeignFile for what is no part of a package, or a package that is not whole."""
    if ABOUT not in sizes and SETTINGS in sizes:
        raise ForeignFile(
            f"{SETTINGS} says that this is an adapter as PEFT saves it, which stands among "
            "adapters alone (expert.form: adapter, and lora_vlm)"
        )
    for name in sorted(sizes.keys() - FILES):
        check_name(name)
        raise ForeignFile(f"{name} is no file of a package; remove it")
    for name in (ABOUT, EXPERT):
        if name not in sizes:
            raise ForeignFile(f"{name} is not there; name the folder of a packed expert")


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


def _check_sizes(facts: ExpertFacts, sizes: Mapping[str, int], source: ExpertSource) -> None:
    """Raise ForeignFile for files that are others than the description names, or too large."""
    named = {name: packed.bytes for name, packed in facts.files.items()}
    if EXPERT not in named or not named.keys() < FILES:
        raise ForeignFile(f"{ABOUT} names other files than a package has")
    for name in sorted(named.keys() | sizes.keys() - {ABOUT}):
        if sizes.get(name) != named.get(name):
            found, said = sizes.get(name, 0), named.get(name, 0)
            raise ForeignFile(f"{name} has {found:,} bytes, and {ABOUT} says {said:,}")
    source.check_bytes(sum(named.values()), f"{EXPERT} and what is beside it have")
