"""Bundles side by side at one target, and the pointer that says which of them is current.

    TARGET/deploy-0123456789ab-89abcdef/     a bundle, its address and what its SHA256SUMS hash to
    TARGET/deploy-0123456789ab-89abcdef.json what and when it is, written once it is whole
    TARGET/latest.json                       the same of the current one, written last

Invariant: what the pointer names is whole. A folder is named by its content, so nobody writes other
bytes into one that somebody reads; nothing is removed that the pointer names.
"""

import contextlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..credentials import masked
from ..errors import DamagedArtifact, MissingArtifact, NewerStore, StoreError
from ..protocols import Progress
from .artifacts import sha256, write_text
from .bundle import SUMS, TEXT_BYTES, parse_sums, read_sums
from .reading import as_kind, parse_object, reading
from .room import PART
from .upload import (
    digest_of,
    has_folders,
    has_no_bucket,
    is_local,
    is_s3,
    move,
    open_url,
    translate_errors,
    upload,
)

if TYPE_CHECKING:
    from s3fs import S3FileSystem

POINTER = "latest.json"
GOING = ".going"  # beside a version that is being removed, so that a killed removal is ended
# Of the pointer and of what is said of each version; raised when they come to say something else.
FORMAT = 1
SETTING = "deploy.upload"
# A folder that is not whole and got no file for so long is nobody's work any more.
ABANDONED_S = 7 * 86_400
ATTEMPTS = 3
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Version:
    """A bundle at a target."""

    format: int
    name: str  # of its folder
    address: str
    sums: str  # sha256 of its SHA256SUMS
    at: str  # when it became whole there; of the pointer: when it was moved

    def check(self) -> None:
        """Raise ValueError when it names no folder beside itself."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name of a folder")


class Versions:
    """The versions at one folder or fsspec URL. Its methods raise StoreError."""

    def __init__(self, url: str, setting: str = SETTING) -> None:
        self.url = url
        self.shown = masked(url)
        self._setting = setting
        self._fs, self._root = open_url(url, setting)

    def current(self) -> Version | None:
        """Return what the pointer names, None where there is no pointer."""
        with translate_errors(self.url, self._setting):
            return self._read(POINTER)

    def known(self) -> list[Version]:
        """Return the versions that are whole, in the order in which they became so."""
        found = []
        with translate_errors(self.url, self._setting):
            names = self._names()
            for name in names:
                # Files of others may lie beside
                if f"{name}.json" not in names:
                    continue
                version = self._read(f"{name}.json")
                if version is not None and version.name == name:
                    found.append(version)
        return sorted(found, key=lambda version: (version.at, version.name))

    def publish(self, folder: Path, address: str, keep: int, progress: Progress) -> Version:
        """Bring a bundle there beside those that are there, move the pointer to it, and remove all
        but `keep` of those that were there before and what was left half done. Raises
        StoreError."""
        self._check_place()
        sums = sha256(folder / SUMS)
        version = Version(FORMAT, f"{address}-{sums[:8]}", address, sums, _now())
        if is_s3(self._fs):
            self._end_idle_uploads()
        with translate_errors(self.url, self._setting):
            self._unmark(version.name)
        for _ in range(ATTEMPTS):
            upload(folder, f"{self.url.rstrip('/')}/{version.name}", progress, self._setting)
            with translate_errors(self.url, self._setting):
                self._write(f"{version.name}.json", version)
                self._write(POINTER, version)
                # Another may just have been removing it, as the oldest of all
                if self._is_whole(version, read_sums(folder)):
                    break
        else:
            raise StoreError(
                f"{self._setting}: {self.shown}/{version.name} loses files while they are sent: "
                "somebody else removes them; run the same command again when that has ended"
            )
        self._remove_older(keep, progress)
        progress(f"{self.shown}/{POINTER} names {version.name}", None)
        return version

    def roll_back(self, to: str | None, progress: Progress) -> Version:
        """Move the pointer to a version, by its name or the start of it, or to the one before the
        current one; return it. Raises StoreError when it is not whole."""
        current = self.current()
        version = chosen(self.known(), current.name if current else None, to, self.shown)
        before = current
        with translate_errors(self.url, self._setting):
            if not self._is_whole(version):
                raise StoreError(
                    f"{self.shown}/{version.name} is not whole any more: name another version"
                )
            self._write(POINTER, Version(**asdict(version) | {"at": _now()}))
            # Whoever removes it takes this away first and looks at the pointer then
            if self._read(f"{version.name}.json") is None:
                if before is not None:
                    self._write(POINTER, before)
                raise StoreError(
                    f"{self.shown}/{version.name} is just being removed: name another version"
                )
        progress(f"{self.shown}/{POINTER} names {version.name}", None)
        return version

    def _check_place(self) -> None:
        """Raise StoreError for a target that is itself a bundle, as earlier versions made it."""
        with translate_errors(self.url, self._setting):
            if self._fs.exists(f"{self._root}/{SUMS}"):
                raise StoreError(
                    f"{self._setting}: {self.shown} is itself a bundle, and versions of bundles "
                    "lie in a folder of their own each: name another place, or move that bundle "
                    "away"
                )

    def _names(self) -> list[str]:
        """Return what lies right below the target."""
        try:
            paths = self._fs.ls(self._root, detail=False)
        except FileNotFoundError as error:
            if is_s3(self._fs) and has_no_bucket(error):
                raise
            return []
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths})

    def _read(self, name: str) -> Version | None:
        try:
            content = self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return parsed(content, f"{self.shown}/{name}")

    def _write(self, name: str, version: Version) -> None:
        """Write a file whole or not at all, as far as the place can."""
        text = written(version)
        path = f"{self._root}/{name}"
        if is_local(self._fs):
            write_text(Path(path), text)
        elif has_folders(self._fs):
            part = f"{path}{PART}"
            self._fs.pipe_file(part, text.encode())
            move(self._fs, part, path)
        else:
            # Stores of objects know no half of one
            self._fs.pipe_file(path, text.encode())

    def _is_whole(self, version: Version, sums: dict[str, str] | None = None) -> bool:
        """Whether all that a version's list names is there, and the list is the one it was."""
        folder = f"{self._root}/{version.name}"
        try:
            if digest_of(self._fs, f"{folder}/{SUMS}") != version.sums:
                return False
            if sums is None:
                sums = parse_sums(self._fs.cat_file(f"{folder}/{SUMS}").decode())
        except FileNotFoundError:
            return False
        there = {path.rpartition(f"{version.name}/")[2] for path in self._fs.find(folder)}
        return sums is not None and sums.keys() <= there

    def _end_idle_uploads(self) -> None:
        """Throw away what killed uploads of other versions have left."""
        from .s3 import S3Files

        # Who may not list may send all the same, and is told so by the upload
        with contextlib.suppress(OSError):
            S3Files(cast("S3FileSystem", self._fs), self._root, self._setting).end_idle()

    def _remove_older(self, keep: int, progress: Progress) -> None:
        """Remove all but the newest versions and those that the pointer names, and folders that
        were begun long ago and never ended."""
        known = self.known()
        # The one that was just brought is not among those before it
        for version in known[: -keep - 1]:
            with translate_errors(f"{self.url}/{version.name}", self._setting):
                if self._remove(version):
                    progress(
                        f"{self.shown}/{version.name} is removed, as deploy.keep is {keep}", None
                    )
        whole = {version.name for version in known}
        with translate_errors(self.url, self._setting):
            names = self._names()
            for name in names:
                begun = f"{name}{GOING}" in names
                if name not in whole and (begun or self._is_abandoned(name)):
                    self._remove_files(name)
                    self._unmark(name)
                    progress(f"{self.shown}/{name} was not whole, and is removed", None)

    def _remove(self, version: Version) -> bool:
        """Remove a version unless the pointer names it, also when it comes to do so meanwhile."""
        if self._is_current(version.name):
            return False
        note = f"{version.name}.json"
        self._fs.pipe_file(f"{self._root}/{version.name}{GOING}", b"")
        # Whoever removes the same may be there first
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{note}")
        # Whoever moves the pointer to it looks for the note after that
        gone = self._remove_files(version.name)
        if not gone:
            self._write(note, version)
        self._unmark(version.name)
        return gone

    def _unmark(self, name: str) -> None:
        mark = f"{self._root}/{name}{GOING}"
        # Asked first, as who may remove nothing may bring a bundle all the same
        if self._fs.exists(mark):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(mark)

    def _is_current(self, name: str) -> bool:
        pointer = self._read(POINTER)
        return pointer is not None and pointer.name == name

    def _remove_files(self, name: str) -> bool:
        """Remove a folder's files, the list of sums first, until the pointer names it after all;
        return whether all are gone."""
        folder = f"{self._root}/{name}"
        paths = self._fs.find(folder)
        for path in sorted(paths, key=lambda path: not path.endswith(f"/{SUMS}")):
            if self._is_current(name):
                return False
            # Another may be removing the same
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)
        if has_folders(self._fs):
            with contextlib.suppress(OSError):
                self._fs.rm(folder, recursive=True)
        return True

    def _is_abandoned(self, name: str) -> bool:
        """Whether a folder is a version's by its name, and has got no file for a long time, by the
        clock of the place itself."""
        if not re.fullmatch(r"deploy-[0-9a-f]{12}-[0-9a-f]{8}", name):
            return False
        try:
            now = self._fs.modified(f"{self._root}/{POINTER}")
            paths = self._fs.find(f"{self._root}/{name}")
            latest = max(self._fs.modified(path) for path in paths)
        # A place that tells no times, or one where somebody is at work
        except (NotImplementedError, OSError, ValueError, KeyError):
            return False
        return (now - latest).total_seconds() > ABANDONED_S


def chosen(known: list[Version], current: str | None, to: str | None, place: str) -> Version:
    """Return the version of that name, or of the only name that begins so, or the one before the
    current one. Raises StoreError."""
    names = ", ".join(version.name for version in known) or "none"
    if to is not None:
        found = [version for version in known if version.name == to]
        found = found or [version for version in known if version.name.startswith(to)]
        if len(found) != 1:
            what = "is no version" if not found else "begins several versions"
            raise StoreError(f"{to} {what} in {place}; there are: {names}")
        return found[0]
    before = []
    for version in known:
        if version.name == current:
            break
        before.append(version)
    else:
        # A pointer to what is not there says nothing of an order
        before = []
    if not before:
        raise StoreError(
            f"there is no version before {current or 'the current one'} in {place}; name one of: "
            f"{names}"
        )
    return before[-1]


def is_served_from(path: Path) -> bool:
    """Whether a path is a bundle, a folder of versions, or its pointer, whatever is in it."""
    return path.is_file() or (path / SUMS).is_file() or (path / POINTER).is_file()


def served_folder(path: Path) -> Path:
    """Return the bundle to serve where a bundle is named, or a folder of versions, or its pointer.

    Raises DamagedArtifact when what the pointer names is not what it was, MissingArtifact when it
    is not there, NewerStore.
    """
    pointer = path if path.name == POINTER else path / POINTER
    # Of a folder that is a bundle itself nobody asks for versions
    if (path / SUMS).is_file() or not pointer.is_file():
        return path
    with reading(pointer), pointer.open("rb") as file:
        version = parsed(file.read(TEXT_BYTES), str(pointer))
    folder = pointer.parent / version.name
    try:
        with reading(folder / SUMS):
            found = sha256(folder / SUMS)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingArtifact(
            f"{pointer} names {version.name}, which is not there; bring it there, or move the "
            "pointer to another version"
        ) from None
    if found != version.sums:
        raise DamagedArtifact(
            f"{folder / SUMS} is not the list that {pointer} names (sha256 differs)",
            remove=folder,
            stage="deploy",
            remedy="copy it again",
        )
    return folder


def parsed(content: bytes, where: str) -> Version:
    """Return what a pointer, or what is said of a version, states. Raises DamagedArtifact,
    NewerStore."""
    try:
        values = parse_object(content)
        found = values.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise NewerStore(
                f"{where} has format {found}, this version reads up to {FORMAT}: update MoleForge"
            )
        version = as_kind(Version, values)
        version.check()
    except ValueError as error:
        raise DamagedArtifact(f"{where} is no pointer to a bundle: {error}") from None
    return version


def written(version: Version) -> str:
    """Return the text of a pointer, or of what is said of a version."""
    return json.dumps(asdict(version), indent=1) + "\n"


def _now() -> str:
    """Return the time with its microseconds, as two may be made in a second and have an order."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
