"""What a pretrained trunk's own files rule out, told before anything is paid for."""

from pathlib import Path
from typing import Any

from ...errors import ConfigError, MismatchError
from ...model.trunk import check_kind
from ...store.model_files import FindModel, check_config, check_weights
from .bundle import stock_settings
from .config import FfnMoeConfig


def preflight(cfg: FfnMoeConfig, find: FindModel) -> list[str]:
    """Return what a person should know of trunk.init before a run of it, as far as it is seen from
    here.

    Raises ConfigError for what no stage could train.
    """
    name = cfg.trunk.init
    if name is None:
        return []
    folder = find("trunk.init", name, cfg.trunk.revision)
    if folder is None:
        return []
    settings = _settings(name, folder)
    most = settings["max_position_embeddings"]
    if cfg.trunk.context_tokens > most:
        raise ConfigError(
            f"trunk.context_tokens: {cfg.trunk.context_tokens} tokens, and {name} has positions "
            f"for {most} (max_position_embeddings in its config.json); set it to {most} or less"
        )
    # A bundle is asked for by name after everything was trained: too late to hear this first
    try:
        stock_settings(settings, len(cfg.experts), cfg.router.top_k)
    except MismatchError as error:
        return [f"trunk.init: {error}"]
    return []


def _settings(name: str, folder: Path) -> dict[str, Any]:
    """Return a trunk's settings with all defaults. Raises ConfigError."""
    from transformers import AutoConfig

    try:
        stated = check_config(folder)
        check_kind(stated)
        # Of the Hub's models, and of those elsewhere, only the settings are here
        if folder == Path(name).expanduser():
            check_weights(folder)
        return AutoConfig.for_model(**stated).to_dict()
    except Exception as error:  # a library raises what it likes at settings of another version
        reason = " ".join(str(error).split())
        raise ConfigError(f"trunk.init: {name} cannot be a trunk: {reason}") from error
