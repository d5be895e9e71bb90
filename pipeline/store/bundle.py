"""A bundle: one self-contained folder that stock tools load, written from parts of the store and
checked.

Invariant: SHA256SUMS is written last, and names every other file but made.json; a folder without
it is no bundle. Tensors are never held: weights are copied a block at a time, some behind a
rewritten header. No file of a bundle is a file of the store.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedArtifact, MissingArtifact, NewerStore
from ..protocols import Progress
from .artifacts import sha256, write_text
from .foreign import ForeignFile, check_name, files_in, read_object
from .reading import reading
from .room import writing
from .streamed import Streamed, write_tensors

# Of experts.json, at most; raised when an older program could not serve the bundle.
FORMAT = 4  # with a dense model beside the stack
UNMERGED_FORMAT = 3  # with low-rank experts as they were trained
# Of a bundle that holds nothing which a version before would refuse.
EARLIER_FORMAT = 2
# Folder of a dense model beside the stack, a checkpoint by itself, and what it is asked for by.
DENSE = "dense"
SUMS = "SHA256SUMS"
ABOUT = "experts.json"
INDEX = "model.safetensors.index.json"
METADATA = "__metadata__"  # the one entry of a safetensors header that is no tensor
BLOCK_BYTES = 4 << 20
FICLONE = 0x40049409  # of Linux's ioctl: share the blocks of another file
# Of a list of sums, and of what is said of a bundle: people's own are of some kilobytes.
TEXT_BYTES = 16 << 20
# What the store keeps beside a bundle; a copy of it has neither.
OF_STORE = {"run.json", "manifest.json"}
# What differs from run to run, beside the sums and in none of them; nothing that serves reads it.
MADE = "made.json"
# What no library reads: people put a licence or notes beside a bundle.
NOTES = {"", ".md", ".txt"}
NO_NOTES = {"merges.txt", "vocab.txt"}  # parts of a tokenizer
# What safetensors itself takes for a header at most.
HEADER_BYTES = 100_000_000
# At the start of the name of a bundle's folder, in the store and where versions lie.
_ADDRESS = re.compile(r"deploy-[0-9a-f]{12}\b")
# As sha256sum writes it. It puts a backslash before names that it had to change: we have none.
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\\\n]+)")


@dataclass(frozen=True)
class BundleFile:
    """A file of the bundle that comes from the store; rename gives its tensors other names, None
    leaves it as it is."""

    name: str  # a path with / below the bundle's folder
    source: Path
    sha256: str  # of the source, from its manifest
    rename: Callable[[str], str] | None = None


@dataclass(frozen=True)
class MadeFile:
    """A file of weights that is made of the store's tensors, one after another, as no file there
    holds them so."""

    name: str  # a path with / below the bundle's folder
    tensors: Mapping[str, Streamed]


def write(
    folder: Path,
    files: Iterable[BundleFile | MadeFile],
    texts: Mapping[str, str | dict[str, Any]],
    progress: Progress,
) -> dict[str, int]:
    """Fill an empty folder with files of the store, texts (a dict becomes JSON), the index over its
    own weights and SHA256SUMS.

    Weights in folders of the bundle are complete in themselves: no index names them. Returns files,
    bytes and parameters. Raises DamagedArtifact when a source is not what its manifest says.
    """
    files = list(files)
    sums = {}
    for done, file in enumerate(files):
        progress(f"bundling {len(files)} files", done / len(files))
        if isinstance(file, MadeFile):
            sums[file.name] = write_tensors(folder / file.name, file.tensors, progress)
        else:
            sums[file.name] = _place(file, folder / file.name)

    weights = [file.name for file in files if file.name.endswith(".safetensors")]
    index, parameters = _index(folder, [name for name in weights if "/" not in name])
    for name in weights:
        if "/" in name:
            parameters += _index(folder, [name])[1]
    texts = dict(texts)
    if index["weight_map"]:
        texts[INDEX] = index
    for name, content in texts.items():
        if not isinstance(content, str):
            content = json.dumps(content, indent=1) + "\n"
        write_text(folder / name, content)
        if name != MADE:
            sums[name] = sha256(folder / name)

    write_sums(folder, sums)
    size = sum((folder / name).stat().st_size for name in sums)
    files_beside = 1 + (MADE in texts)
    return {"files": len(sums) + files_beside, "bytes": size, "parameters": parameters}


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS of {file name: sha256}: last, as it is what makes the folder a bundle."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    write_text(folder / SUMS, "".join(lines))


def about(folder: Path) -> dict[str, Any]:
    """Return experts.json: family, run, top_k, and the address and file of every part.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, or NewerStore.
    """
    read_sums(folder)
    try:
        with reading(folder / ABOUT):
            found = read_object(folder, ABOUT, TEXT_BYTES)
        version = int(found["format"])
        if version < 1:
            raise ValueError(f"format is {version}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(f"{folder / ABOUT} cannot be read: {error}", folder) from None
    if version > FORMAT:
        raise NewerStore(
            f"{folder} has bundle format {version}, this version reads up to {FORMAT}: "
            "update MoleForge"
        )
    return found


def identity(folder: Path) -> dict[str, str]:
    """Return which bundle lies in a folder, as whoever asks a server is told: its address, "" where
    the folder's name says none, and the sha256 of its list of sums. Raises OSError."""
    found = _ADDRESS.match(folder.name)
    return {"address": found[0] if found else "", "sha256": sha256(folder / SUMS)}


def start_ids(described: Mapping[str, Any]) -> list[int]:
    """Return the tokens that lead a text, from what a bundle says of itself."""
    # Of format 1 there was one
    return described["start_ids"] if "start_ids" in described else [described["start_id"]]


def read_sums(folder: Path) -> dict[str, str]:
    """Return {file name: sha256} of a bundle. Raises MissingArtifact when there is no SHA256SUMS,
    DamagedArtifact."""
    try:
        with reading(folder / SUMS), (folder / SUMS).open(encoding="utf-8") as file:
            text = file.read(TEXT_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingArtifact(
            f"{folder} is not a bundle, as it has no {SUMS}; name the folder that one was copied "
            "to, or make one",
            stages=("deploy",),
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(f"{folder / SUMS} cannot be read: {error}", folder) from None
    sums = parse_sums(text)
    if sums is None:
        raise _damaged(f"{folder / SUMS} is not a list of sha256 sums", folder)
    return sums


def listed(folder: Path) -> dict[str, str]:
    """Return {file name: sha256} of a bundle that holds these files alone, none of them a link, a
    program or a pickle.

    Raises MissingArtifact when it is none, DamagedArtifact.
    """
    sums = read_sums(folder)
    try:
        with reading(folder):
            found = files_in(folder)
        for name in sorted(found | sums.keys()):
            check_name(name)
    except (ForeignFile, OSError) as error:
        raise _damaged(f"{folder}: {error}", folder) from None
    for name in sorted(found - sums.keys() - {SUMS, MADE} - OF_STORE):
        if Path(name).suffix not in NOTES or Path(name).name in NO_NOTES:
            # libraries read what they find, whoever put it there
            raise _damaged(f"{folder / name} is not in {SUMS}, so nobody answers for it", folder)
    return sums


def verify(folder: Path, progress: Progress | None = None) -> None:
    """Compare every file of a bundle with SHA256SUMS. Raises DamagedArtifact, also for a file that
    is not listed, or MissingArtifact when it is none."""
    sums = listed(folder)
    for done, (name, digest) in enumerate(sums.items()):
        if progress:
            progress(f"checking {len(sums)} files", done / len(sums))
        try:
            with reading(folder / name):
                found = sha256(folder / name)
        except OSError as error:
            raise _damaged(f"{folder / name} cannot be read: {error.strerror}", folder) from None
        if found != digest:
            raise _damaged(f"{folder / name} is not what was bundled (sha256 differs)", folder)


def _damaged(text: str, folder: Path) -> DamagedArtifact:
    """Return the error about a bundle, which its stage makes again."""
    # it may have been torn on its way here from a machine where it is whole
    return DamagedArtifact(text, remove=folder, stage="deploy", remedy="copy it again")


def _place(file: BundleFile, target: Path) -> str:
    """Bring a file to its place; return the sha256 of what is there now."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.rename:
            found, placed = _copy_renamed(file.source, target, file.rename)
        else:
            _copy(file.source, target)
            found = placed = sha256(target)
    _check_digest(file, found)
    return placed


def check_source(file: BundleFile) -> None:
    """Raise DamagedArtifact when a file of the store is not what its manifest says."""
    _check_digest(file, sha256(file.source))


def _check_digest(file: BundleFile, found: str) -> None:
    if found != file.sha256:
        raise DamagedArtifact(
            f"{file.source} is not what was written (sha256 differs)", remove=file.source.parent
        )


def _copy(source: Path, target: Path) -> None:
    """Copy a file, its blocks shared where the disk can do that until either is written to.

    Never a second name of the same file: who saves into a bundle would write into the store.
    """
    with source.open("rb") as old, target.open("wb") as new:
        # Most disks cannot, no two disks can together, and Windows has no such module
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            return
        shutil.copyfileobj(old, new, BLOCK_BYTES)


def _copy_renamed(source: Path, target: Path, rename: Callable[[str], str]) -> tuple[str, str]:
    """Copy a safetensors file with other tensor names; return the sha256 of the source and of the
    copy."""
    read = hashlib.sha256()
    written = hashlib.sha256()
    with source.open("rb") as old, target.open("wb") as new:
        raw, entries = _read_header(old, source)
        read.update(raw)
        renamed = {}
        for name, entry in entries.items():
            renamed[name if name == METADATA else rename(name)] = entry
        header = _pack_header(renamed)
        new.write(header)
        written.update(header)
        # offsets count from the end of the header, so the payload stays as it is
        while block := old.read(BLOCK_BYTES):
            new.write(block)
            read.update(block)
            written.update(block)
    return read.hexdigest(), written.hexdigest()


def _read_header(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read the start of a safetensors file up to its payload; return it raw and parsed."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    try:
        # another file's first bytes may be a length of terabytes, which must not be read
        if len(length) < 8 or size > HEADER_BYTES:
            raise ValueError("it is too short, or no safetensors file")
        text = file.read(size)
        return length + text, dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedArtifact(f"{path} has no safetensors header: {error}") from None


def _pack_header(entries: dict[str, Any]) -> bytes:
    """Return a safetensors header, padded so that the payload stays aligned to eight bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(folder: Path, names: list[str]) -> tuple[dict[str, Any], int]:
    """Return which shard holds which tensor, as transformers reads it, and how many parameters
    there are."""
    shard_of: dict[str, str] = {}
    size = 0
    parameters = 0
    for name in names:
        with (folder / name).open("rb") as file:
            _, entries = _read_header(file, folder / name)
        for tensor, entry in entries.items():
            if tensor == METADATA:
                continue
            twice = f"{tensor} is in {shard_of.get(tensor)} and in {name}"
            # A mistake of a family's, not of a user's
            assert tensor not in shard_of, twice  # noqa: S101
            shard_of[tensor] = name
            start, end = entry["data_offsets"]
            size += end - start
            parameters += prod(entry["shape"])
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(shard_of.items())),
    }
    return index, parameters


def parse_sums(text: str) -> dict[str, str] | None:
    """Return {file name: sha256} of a list as sha256sum writes it, None of what is no such list."""
    sums = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if not match or not _inside(match[2]):
            return None
        sums[match[2]] = match[1]
    return sums or None


def _inside(name: str) -> bool:
    """Whether a name leads nowhere but below the folder that lists it."""
    # a colon names a drive on Windows
    return all(part not in ("", ".", "..") and ":" not in part for part in name.split("/"))
