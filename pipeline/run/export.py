"""What a run left, brought out of its store in one format: written beside its target, checked, and
there whole or not at all.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..config.run import RunConfig
from ..errors import ConfigError, StoreError
from ..families import ExportWish, family
from ..protocols import Progress
from ..store.artifacts import Store
from ..store.beside import folder_beside
from ..store.bundle import SUMS
from ..store.room import writing
from ..store.upload import upload
from .backend import Local, run_stage
from .context import StoredParts
from .dry_run import foretold

SETTING = "--to"


def export(cfg: RunConfig, store: Store, wish: ExportWish, to: str, progress: Progress) -> None:
    """Bring a run's stack, or a part of it, to a folder or fsspec URL.

    Raises ConfigError for what the run has nothing for, MissingArtifact for parts that are not
    made, MismatchError for what the format cannot hold, StoreError for a target that cannot be
    used.
    """
    chosen = family(cfg.family)
    chosen.check_export(cfg, wish)
    local = _local(to)
    if local is not None:
        _check_target(local)
    if wish.format == "hf" and wish.dtype is None:
        _bundle(cfg, store, to, progress)
        return
    told = foretold(cfg, store, wish)
    if told:
        progress(told if local else f"{told}; sending it there takes its own time", None)
    parts = StoredParts(cfg, store, progress)
    # Where it is to end up, as a model may be larger than the room elsewhere
    beside = local.absolute().parent if local else store.root
    with _writing(beside, to), folder_beside(beside, ".export-") as folder:
        chosen.export(cfg, parts, wish, folder, progress)
        if local is not None and not local.exists():
            folder.rename(local)
            progress(f"exported to {local}", None)
        else:
            upload(folder, to, progress, SETTING)


@contextlib.contextmanager
def _writing(beside: Path, to: str) -> Iterator[None]:
    """Have a folder to write in, and say of what its system refuses that it is for the target.

    Raises DiskFull, StoreError.
    """
    try:
        with writing(beside):
            beside.mkdir(parents=True, exist_ok=True)
            yield
    except OSError as error:
        raise StoreError(
            f"{SETTING}: {to} cannot be written ({error.strerror}: {error.filename}); name a "
            "folder that this user may write to"
        ) from None


def _bundle(cfg: RunConfig, store: Store, to: str, progress: Progress) -> None:
    """Bring the bundle to the target, made first where it is not yet."""
    # Asked for here is one target; the other is that of the stage itself
    nowhere = cfg.deploy.model_copy(update={"upload": None})
    own = cfg.model_copy(update={"deploy": nowhere})
    (made,) = run_stage("deploy", own, Local(store, parallel=1))
    upload(store.folder(made.address), to, progress, SETTING)


def _local(to: str) -> Path | None:
    """Return the folder that a target names on this machine, None for another place."""
    if "://" in to:
        return None
    return Path(to).expanduser()


def _check_target(folder: Path) -> None:
    """Raise ConfigError for a folder that holds something else than an export."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / SUMS).is_file()):
        raise ConfigError(f"{SETTING}: {folder} holds something else; name a new or empty folder")
