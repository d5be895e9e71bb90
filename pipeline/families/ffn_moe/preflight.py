"""What a pretrained trunk's own files rule out, told before anything is paid for."""

from pathlib import Path
from typing import Any

from ...config.base import PACKAGE
from ...data.text.pretrained_tokenizer import vocab_size_here
from ...errors import ConfigError, MismatchError
from ...model.trunk import whole_settings
from ...store.model_files import FindModel
from ...store.model_sources import ModelSource, told_absent
from .bundle import stock_settings
from .config import FfnMoeConfig
from .pretrained import check_vocabulary, stated_settings
from .sections import ADAPTER


def preflight(cfg: FfnMoeConfig, find: FindModel) -> list[str]:
    """Return what a person should know of trunk.init before a run of it, as far as it is seen from
    here.

    Raises ConfigError for what no stage could train, MismatchError for a larger tokenizer, and
    DataError for a torn one.
    """
    name = cfg.trunk.init
    if name is None:
        return []
    place = find("trunk.init", name, cfg.trunk.revision)
    if place is None:
        return told_absent("trunk.init", name)
    settings = _settings(name, place)
    most = settings["max_position_embeddings"]
    if cfg.trunk.context_tokens > most:
        raise ConfigError(
            f"trunk.context_tokens: {cfg.trunk.context_tokens} tokens, and {name} has positions "
            f"for {most} (max_position_embeddings in its config.json); set it to {most} or less"
        )
    vocab_size = vocab_size_here(cfg)
    if vocab_size is not None:
        # Otherwise told once all text is in tokens
        check_vocabulary(cfg, vocab_size, settings["vocab_size"])
    try:
        layers = cfg.expert.in_layers(settings["num_hidden_layers"])
    except ValueError as error:
        raise ConfigError(f"expert.layers: {error} ({name})") from None
    if cfg.expert.form == ADAPTER:
        # These are bundled beside the model as it is, whatever it has
        return []
    # A bundle is asked for by name after everything was trained: too late to hear this first
    try:
        stock_settings(settings, len(cfg.experts), cfg.router.top_k, layers)
    except MismatchError as error:
        return [f"trunk.init: {error}"]
    return []


def _settings(name: str, place: Path) -> dict[str, Any]:
    """Return a trunk's settings with all defaults. Raises ConfigError."""
    try:
        # Of the Hub's models, and of those elsewhere, only the settings are here
        own = name.startswith(PACKAGE) or place == Path(name).expanduser()
        stated = stated_settings(ModelSource(place), weights=own)
        return whole_settings(stated)
    except Exception as error:  # a library raises what it likes at settings of another version
        reason = " ".join(str(error).split())
        raise ConfigError(f"trunk.init: {name} cannot be a trunk: {reason}") from error
