"""What the file of a run states itself, to be changed: with the files that it names, and apart from
those that it extends.

Invariant: a change goes to the file that states the setting, or where none does, to the run's own;
what a file extends is others' as well, and stays.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from ..errors import ConfigError
from .edit import NotEditable, edited
from .files import NAMED_FILES, overlay, read, resolve_paths, with_extended
from .paths import Kind, Tree, located, mapped, relative

Place = tuple[str, ...]  # of a setting: partition, domains
PARAPHRASES = ("dataset", "paraphrases")


@dataclass(frozen=True)
class FileChange:
    """One file, as it is and as it is to be."""

    path: Path
    before: str
    after: str


@dataclass
class Stated:
    """The settings that a run's own files state, by place; they are changed here first."""

    path: Path
    paths: Tree
    own: dict  # as the run's file has it, less `extends`, with the names of files that it names
    under: dict  # what it extends
    raw: dict = field(default_factory=dict)  # with what these hold in place of their names
    files: dict[Place, Path] = field(default_factory=dict)  # that are named, by where
    names: dict[Place, str] = field(default_factory=dict)  # of these files, as written

    def read_named(self, place: Place) -> None:
        """Put what a file holds in the place of its name, where it is one. Raises ConfigError."""
        name = _at(self.raw, place)
        if isinstance(name, str):
            self.names[place] = name
            self.files[place] = Path(located(name, "path", self.folder(place)))
            self.put(*place, value=read(self.files[place]))

    def get(self, *place: str) -> Any:
        """Return a setting as the run's own files state it, else as the file that they extend
        does, with paths as they would be written here; None where neither does."""
        own = _at(self.raw, place)
        if own is not None:
            return copy.deepcopy(own)
        found = _at(self.under, place)
        for name in reversed(place):
            found = {name: found}
        return _at(relative(found, self.paths, self.folder(place)), place)

    def entries(self, *place: str) -> list:
        """Return a list of settings as `get` does, empty where it is stated nowhere. Raises
        ConfigError where the file only lays values on the entries of a list that it extends."""
        found = self.get(*place)
        if isinstance(found, dict):
            raise ConfigError(
                f"{self.path}: {'.'.join(place)} lays values on a list of the file that this one "
                "extends, so nothing can come or go there; write the list out"
            )
        return [] if found is None else list(found)

    def states(self, *place: str) -> bool:
        """Whether a setting is stated, here or in what is extended."""
        return self.get(*place) is not None

    def put(self, *place: str, value: Any) -> None:
        """State a setting."""
        inner = self.raw
        for name in place[:-1]:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[place[-1]] = value

    def drop(self, *place: str) -> None:
        """State a setting no longer, nor a mapping that it was all of. Raises ConfigError where the
        file that is extended states it."""
        if _at(self.under, place) is not None and place[:1] not in self.files:
            raise ConfigError(
                f"{self.path}: {'.'.join(place)} is said in the file that this one extends; take "
                "it out there"
            )
        self._forget(place)

    def _forget(self, place: Place) -> None:
        above = _at(self.raw, place[:-1])
        if isinstance(above, dict) and place[-1] in above:
            del above[place[-1]]
            # An empty mapping states nothing, whatever the file that is extended has there
            if not above and place[:-1]:
                self._forget(place[:-1])

    def folder(self, place: Place) -> Path:
        """Return where the relative paths of a setting start: at the file that states it."""
        inside = [held for held in self.files if place[: len(held)] == held]
        return self.files[max(inside, key=len)].parent if inside else self.path.parent

    def typed(self, value: Any, *place: str) -> Any:
        """Return a setting whose paths were typed where the command runs, as the file would state
        it."""
        tree: Any = self.paths
        for name in place:
            tree = tree[name]

        def stated(text: str, kind: Kind) -> str:
            # Who typed a whole path means it
            if text.startswith(("~", "/")) or "://" in text:
                return text
            return relative(located(text, kind, Path.cwd()), kind, self.folder(place))

        return mapped(value, tree, stated)

    def resolved(self) -> dict:
        """Return what the whole describes, as `resolve` has it once the changes are written.

        Raises ConfigError.
        """
        rest = {key: value for key, value in self.raw.items() if (key,) not in self.files}
        out = resolve_paths(rest, self.path.parent, self.paths)
        for key in self.raw:
            if (key,) in self.files:
                folder = self.files[(key,)].parent
                out |= resolve_paths({key: self.raw[key]}, folder, self.paths)
        return overlay(self.under, self.own, {key: out[key] for key in self.raw})

    def changes(self) -> list[FileChange]:
        """Return the files that would not be what they are, the run's own first. Raises
        ConfigError."""
        found = []
        for place, path in {(): self.path, **self.files}.items():
            wanted = copy.deepcopy(_at(self.raw, place))
            for held, name in self.names.items():
                if held[:-1] == place:
                    wanted[held[-1]] = name
            if not place:
                wanted |= {key: value for key, value in read(path).items() if key == "extends"}
            change = _change(path, wanted)
            if change.before != change.after:
                found.append(change)
        return found


def stated(path: Path, paths: Tree) -> Stated:
    """Read what a run's file states and names. Raises ConfigError."""
    own, under = with_extended(path, paths)
    found = Stated(path, paths, own, under, copy.deepcopy(own))
    for key in NAMED_FILES:
        found.read_named((key,))
    found.read_named(PARAPHRASES)
    return found


def _at(raw: Any, place: Sequence[str]) -> Any:
    for name in place:
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw


def _change(path: Path, wanted: dict) -> FileChange:
    """Return a file changed to state what is wanted. Raises ConfigError."""
    # Not as text: ends of lines stay what they are
    try:
        before = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        return FileChange(path, before, edited(before, wanted, path.suffix == ".json"))
    except (NotEditable, YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; change it by hand") from None
