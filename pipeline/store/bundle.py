"""A bundle: one self-contained folder that stock tools load, written from parts of the store,
checked, and uploaded.

Invariant: SHA256SUMS is written last, here and at an upload's target, and names every other file; a
folder without it is no bundle. Tensors are never held: weights are hard-linked, or copied a block
at a time behind a rewritten header.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import DamagedArtifact, DiskFull, MissingArtifact, NewerStore, StoreError
from ..protocols import Progress
from .artifacts import NO_ROOM, sha256, write_text

FORMAT = 1  # of experts.json; raised when an older program could not serve the bundle
SUMS, ABOUT, INDEX = "SHA256SUMS", "experts.json", "model.safetensors.index.json"
BLOCK_BYTES = 4 << 20
HEADER_BYTES = 100_000_000  # what safetensors itself takes for a header at most
FOLDERS = {
    "file",
    "local",
    "sftp",
    "ssh",
    "smb",
    "ftp",
}  # filesystems where a folder must exist before its files
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\\\n]+)")


@dataclass(frozen=True)
class BundleFile:
    """A file of the bundle that comes from the store; rename gives its tensors other names, None
    leaves it as it is."""

    name: str  # a path with / below the bundle's folder
    source: Path
    sha256: str  # of the source, from its manifest
    rename: Callable[[str], str] | None = None


def write(
    folder: Path, pieces: Iterable[BundleFile], texts: Mapping[str, str | dict], progress: Progress
) -> dict:
    """Fill an empty folder with pieces, texts (a dict becomes JSON), the index over its own weights
    and SHA256SUMS.

    Weights in folders of the bundle are complete in themselves: no index names them. Returns files,
    bytes and parameters. Raises DamagedArtifact when a source is not what its manifest says.
    """
    pieces, sums = list(pieces), {}
    for done, piece in enumerate(pieces):
        progress(f"bundling {len(pieces)} files", done / len(pieces))
        sums[piece.name] = _place(piece, folder / piece.name)
    weights = [p.name for p in pieces if p.name.endswith(".safetensors")]
    index, parameters = _index(folder, [name for name in weights if "/" not in name])
    parameters += sum(_index(folder, [name])[1] for name in weights if "/" in name)
    for name, content in {**texts, **({INDEX: index} if index["weight_map"] else {})}.items():
        write_text(
            folder / name,
            content if isinstance(content, str) else json.dumps(content, indent=1) + "\n",
        )
        sums[name] = sha256(folder / name)
    write_text(
        folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    )
    size = sum((folder / name).stat().st_size for name in sums)
    return {"files": len(sums) + 1, "bytes": size, "parameters": parameters}


def about(folder: Path) -> dict:
    """Return experts.json: family, run, top_k, and the address and file of every part.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, or NewerStore.
    """
    read_sums(folder)
    try:
        found = json.loads((folder / ABOUT).read_text("utf-8"))
        version = int(found["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(f"{folder / ABOUT} cannot be read: {error}; {_AGAIN}") from None
    if version > FORMAT:
        raise NewerStore(
            f"{folder} has bundle format {version}, this version reads up to {FORMAT}: update MoleForge"
        )
    return found


def read_sums(folder: Path) -> dict[str, str]:
    """Return {file name: sha256} of a bundle. Raises MissingArtifact when there is no SHA256SUMS,
    DamagedArtifact."""
    try:
        return _parsed((folder / SUMS).read_text("utf-8"), str(folder / SUMS))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingArtifact(
            f"{folder} is not a bundle: it has no {SUMS}. Make one with `python -m pipeline deploy --config FILE`, "
            "or name the folder it was copied to"
        ) from None


def verify(folder: Path, progress: Progress | None = None) -> None:
    """Compare every file of a bundle with SHA256SUMS. Raises DamagedArtifact, or MissingArtifact
    when it is none."""
    sums = read_sums(folder)
    for done, (name, digest) in enumerate(sums.items()):
        if progress:
            progress(f"checking {len(sums)} files", done / len(sums))
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise DamagedArtifact(
                f"{folder / name} cannot be read: {error.strerror}; {_AGAIN}"
            ) from None
        if found != digest:
            raise DamagedArtifact(
                f"{folder / name} is not what was bundled (sha256 differs); {_AGAIN}"
            )


def upload(folder: Path, url: str, progress: Progress) -> None:
    """Copy a bundle to a folder or fsspec URL; every file is read back and compared, SHA256SUMS
    goes last.

    What is there already is not sent again; files of an earlier bundle that this one has not are
    removed. Raises StoreError when the target cannot be used or gives back other bytes than were
    sent.
    """
    verify(folder)
    fs, root = _opened(url)
    sums = read_sums(folder)
    with _reaching(url):
        _clear(fs, root, folder)
    for done, (name, digest) in enumerate([*sums.items(), (SUMS, sha256(folder / SUMS))]):
        progress(f"uploading {len(sums) + 1} files to {_shown(url)}", done / (len(sums) + 1))
        with _reaching(f"{url}/{name}"):
            _put(fs, folder / name, f"{root}/{name}", digest)
    progress(f"uploaded {len(sums) + 1} files to {_shown(url)}, each read back and compared", None)


_AGAIN = "remove the bundle's folder and run `python -m pipeline deploy` again, or copy it again"


def _place(piece: BundleFile, target: Path) -> str:
    """Bring a piece to its place; return the sha256 of what is there now."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if piece.rename:
        found, placed = _renamed(piece.source, target, piece.rename)
    else:
        if target.suffix == ".safetensors":
            _link(piece.source, target)
        else:  # people edit these, and must not edit the store
            shutil.copyfile(piece.source, target)
        found = placed = sha256(target)
    if found != piece.sha256:
        raise DamagedArtifact(
            f"{piece.source} is not what was written (sha256 differs); remove {piece.source.parent} and run the "
            "command that made it again"
        )
    return placed


def _link(source: Path, target: Path) -> None:
    """Give the file a second name, or copy it where the disk has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _renamed(source: Path, target: Path, rename: Callable[[str], str]) -> tuple[str, str]:
    """Copy a safetensors file with other tensor names; return the sha256 of the source and of the
    copy."""
    read, written = hashlib.sha256(), hashlib.sha256()
    with source.open("rb") as old, target.open("wb") as new:
        raw, entries = _header(old, source)
        read.update(raw)
        head = _packed(
            {name if name == "__metadata__" else rename(name): e for name, e in entries.items()}
        )
        new.write(head)
        written.update(head)
        while block := old.read(BLOCK_BYTES):
            new.write(block)
            read.update(block)
            written.update(block)
    return read.hexdigest(), written.hexdigest()


def _header(file: BinaryIO, path: Path) -> tuple[bytes, dict]:
    """Read the start of a safetensors file up to its payload; return it raw and parsed."""
    start = file.read(8)
    size = int.from_bytes(start, "little")
    try:
        if len(start) < 8 or size > HEADER_BYTES:
            raise ValueError("it is too short, or no safetensors file")
        text = file.read(size)
        return start + text, dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DamagedArtifact(f"{path} has no safetensors header: {error}") from None


def _packed(entries: dict) -> bytes:
    """Return a safetensors header, padded so that the payload stays aligned to eight bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(folder: Path, names: list[str]) -> tuple[dict, int]:
    """Return which shard holds which tensor, as transformers reads it, and how many parameters
    there are."""
    where, size, parameters = {}, 0, 0
    for name in names:
        with (folder / name).open("rb") as file:
            _, entries = _header(file, folder / name)
        for tensor, entry in entries.items():
            if tensor == "__metadata__":
                continue
            assert tensor not in where, f"{tensor} is in {where.get(tensor)} and in {name}"  # noqa: S101
            where[tensor] = name
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
            parameters += _product(entry["shape"])
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}, parameters


def _product(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _parsed(text: str, where: str) -> dict[str, str]:
    found = [_LINE.fullmatch(line) for line in text.splitlines()]
    if not found or None in found or not all(_inside(match[2]) for match in found):
        raise DamagedArtifact(f"{where} is not a list of sha256 sums; {_AGAIN}")
    return {match[2]: match[1] for match in found}


def _inside(name: str) -> bool:
    """Whether a name leads nowhere but below the folder that lists it."""
    return all(part not in ("", ".", "..") and ":" not in part for part in name.split("/"))


def _opened(url: str):
    """Return the filesystem and the path of a URL without listings of its own keeping, which may be
    stale."""
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise StoreError(
            f"deploy.upload: {_shown(url)} needs a package that is not installed: {error}"
        ) from None
    except ValueError as error:
        raise StoreError(
            f"deploy.upload: {_shown(url)} is no folder and no URL that fsspec knows ({error}); write a folder, "
            "s3://bucket/path or another fsspec URL"
        ) from None
    return fs, root.rstrip("/")


def _clear(fs, root: str, folder: Path) -> None:
    """Make an earlier bundle at the target incomplete before it is changed, and remove what the new
    one has not."""
    if _has_folders(fs):
        fs.makedirs(root, exist_ok=True)
    there = f"{root}/{SUMS}"
    if not fs.exists(there) or _digest(fs, there) == sha256(folder / SUMS):
        return
    with contextlib.suppress(DamagedArtifact, UnicodeDecodeError):  # a torn list names nothing
        for name in _parsed(fs.cat_file(there).decode(), there).keys() - read_sums(folder).keys():
            if fs.exists(f"{root}/{name}"):
                fs.rm_file(f"{root}/{name}")
    fs.rm_file(there)


def _has_folders(fs) -> bool:
    return bool(FOLDERS & set([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol))


def _put(fs, source: Path, target: str, digest: str) -> None:
    """Send a file unless it is there already. Raises StoreError when other bytes come back."""
    if fs.exists(target) and _digest(fs, target) == digest:
        return
    if _has_folders(fs):
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    fs.put_file(str(source), target)
    found = _digest(fs, target)
    if found != digest:
        raise StoreError(
            f"deploy.upload: {target} came back with other bytes than were sent (sha256 {found[:12]}, sent "
            f"{digest[:12]}): the copy is torn. Run the same command again; it sends what is missing or different"
        )


def _digest(fs, path: str) -> str:
    with fs.open(path, "rb", block_size=BLOCK_BYTES) as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn whatever a filesystem raises into a StoreError that names the URL."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # each filesystem raises what it likes
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise DiskFull(f"deploy.upload: no room at {_shown(url)}: {error}") from None
        raise StoreError(
            f"deploy.upload: {_shown(url)} cannot be written or read back: {type(error).__name__}: {error}. Check the "
            "URL, its credentials and the network, then run the same command again; nothing is sent twice"
        ) from None


def _shown(url: str) -> str:
    """Return a URL without the password it may hold."""
    return re.sub(r"//[^/@]*@", "//***@", url)
