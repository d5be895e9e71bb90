"""The pretrained trunk that a run's settings name: found, looked at and opened."""

from pathlib import Path

from ...config.base import is_folder
from ...errors import MismatchError, PipelineError
from ...model.experts import Expert
from ...model.trunk import Trunk, check_kind, pretrained
from ...store.model_files import check_config, check_weights, from_hub
from .config import FfnMoeConfig


def open_pretrained(cfg: FfnMoeConfig) -> tuple[Trunk, Expert]:
    """Return trunk and dummy of trunk.init.

    Raises MismatchError for a model that no trunk can be made of, or that is not complete,
    DataError when the Hub does not give it.
    """
    name = cfg.trunk.init
    if name is None:
        raise ValueError("only settings with trunk.init name a trunk to open")
    try:
        folder = _folder(name, cfg.trunk.revision)
        check_kind(check_config(folder))
        check_weights(folder)
        return pretrained(folder)
    except PipelineError:
        raise
    except Exception as error:  # a library raises what it likes at a file it cannot read
        reason = " ".join(str(error).split())
        raise MismatchError(f"trunk.init: {name} cannot be loaded: {reason}") from error


def _folder(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if is_folder(name):
        raise FileNotFoundError("there is no such folder")
    return from_hub("trunk.init", name, revision)
