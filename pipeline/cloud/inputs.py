"""What a run reads beside its store: whether it is on the volume, asked by names from the laptop,
and the packages that containers need for it."""

import importlib.metadata
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ..config.base import PACKAGE
from ..config.run import RunConfig
from ..errors import ConfigError, DataError
from .containers import UNNAMED
from .far import Names


def not_on_volume(
    cfg: RunConfig, stage: str, item: str | None, mount: str, names: Names
) -> DataError | None:
    """Return the error for what a job reads from the volume and is not on it, which is at `mount`
    there; None where all of it is, or lies elsewhere."""
    lacking = []
    for setting, path in cfg.read_outside(stage, item):
        place = PurePosixPath(path)
        if "://" in path or not place.is_relative_to(mount):
            continue
        if not any(_found(PurePosixPath(), place.relative_to(mount).parts, names)):
            lacking.append(f"{setting}: {path}")
    if not lacking:
        return None
    volume = cfg.modal.volume or UNNAMED
    return DataError(
        f"not on the volume: {', '.join(lacking)}; put it there with "
        f"`modal volume put {volume} LOCAL /inputs/` and write {mount}/inputs/..."
    )


def packages(cfg: RunConfig) -> list[str]:
    """Return the packages that carry a model of this run, each with the version that is installed
    here, so that every container has the model that was looked at. Raises ConfigError."""
    found = {}
    for setting, path in cfg.paths():
        if not path.startswith(PACKAGE):
            continue
        name, _, _ = path.removeprefix(PACKAGE).partition("/")
        try:
            found[name] = importlib.metadata.version(name)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            raise ConfigError(
                f"{setting}: the package {name} is not installed here, where its version is read "
                f"for the containers; `pip install --no-deps {name}` brings it"
            ) from None
    return [f"{name}=={version}" for name, version in found.items()]


def _found(folder: PurePosixPath, parts: tuple[str, ...], names: Names) -> Iterator[PurePosixPath]:
    """Yield what a path, or the pattern of one, means below a folder."""
    if not parts:
        yield folder
        return
    first, *rest = parts
    # Any number of folders, which is not worth a request each: that there is something has to do
    if first == "**":
        rest = []
    for name in names(folder.as_posix()):
        # What has the very name is meant, whatever its brackets would mean in a pattern
        if name == first or first == "**" or fnmatchcase(name, first):
            yield from _found(folder / name, tuple(rest), names)
