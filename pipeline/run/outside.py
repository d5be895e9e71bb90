"""What lies outside the store and has changed since something was made of it.

An address holds settings and no file's content, so an edited file alone makes nothing again: who
edits one is told.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..config.run import RunConfig
from ..store.artifacts import Store

# Of a folder or a glob: a look at a million pictures would cost more than it tells.
MOST_FILES = 10_000


def changed_since(cfg: RunConfig, store: Store, stage: str, item: str | None, address: str) -> str:
    """Return a sentence about files that a job has read and that are newer than its artifact; ""
    where there are none. What cannot be looked at says nothing."""
    manifest = store.folder(address) / "manifest.json"
    try:
        made_ns = manifest.stat().st_mtime_ns
    except OSError:
        return ""
    newer = []
    for setting, path in cfg.read_outside(stage, item):
        for file in islice(_files(path), MOST_FILES):
            if _mtime_ns(file) > made_ns:
                newer.append((setting, file))
    if not newer:
        return ""
    setting, file = newer[0]
    more = f" and {len(newer) - 1} more" if len(newer) > 1 else ""
    return (
        f"{setting}: {file}{more} changed after {address} was made, which stands, as its address "
        f"holds settings and no file's content; to have it read, move it to a path that "
        f"{setting} does not name yet, and name that"
    )


def _files(path: str) -> Iterator[Path]:
    """Yield the files on this machine that a path means: itself, a folder's or a glob's."""
    if "://" in path:
        return
    here = Path(path)
    if here.is_file():
        yield here
        return
    folder, pattern = (here, "**") if here.is_dir() else _parted(here)
    # At the end it means files too where data are read; Path takes it for folders alone
    if pattern.endswith("**"):
        pattern += "/*"
    for found in folder.glob(pattern):
        if found.is_file():
            yield found


def _parted(path: Path) -> tuple[Path, str]:
    """Return the folder above the first part that is a pattern, and the rest."""
    for at, part in enumerate(path.parts):
        if set("*?[") & set(part):
            return Path(*path.parts[:at]), "/".join(path.parts[at:])
    return path.parent, path.name


def _mtime_ns(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
