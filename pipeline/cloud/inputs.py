"""Whether what a run reads beside its store is on the volume: asked by names, from the laptop."""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ..config.run import RunConfig
from ..errors import DataError

Names = Callable[[str], Iterable[str]]  # a folder of the volume -> the names in it


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
    return DataError(
        f"not on the volume: {', '.join(lacking)}; put it there with "
        f"`modal volume put moleforge LOCAL /inputs/` and write {mount}/inputs/..."
    )


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
