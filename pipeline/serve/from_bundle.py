"""A bundle opened to be asked over HTTP: its engine, how requests become prompts, its limits."""

from pathlib import Path

import torch

from ..config.serving import ServeConfig
from ..errors import DamagedArtifact, PipelineError
from ..hardware import bound_kernel_caches
from ..store.bundle import about, identity
from .chat_engine import ChatEngine
from .engines import engine_of
from .fetching import Fetcher
from .limits import RequestLimits, capacity_of
from .prompts import TaskPrompts, TextPrompts
from .service import Service


def open_service(
    folder: Path, wanted: ServeConfig | None = None, image_hosts: tuple[str, ...] = ()
) -> Service:
    """Open a bundle, whose requests' pictures may be at those hosts, or * at any of the open
    network's. Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for one that
    cannot be served, ConfigError for one that is not run in the dtype that is wanted."""
    bound_kernel_caches()
    wanted = wanted or ServeConfig()
    limits = RequestLimits.of(str(about(folder).get("serves")), wanted)
    try:
        engine = engine_of(folder, capacity_of(wanted), wanted.dtype)
        if isinstance(engine, ChatEngine):
            engine.room.fetcher = Fetcher(image_hosts)
            return Service(engine, TaskPrompts(engine), limits, identity(folder))
        return Service(engine, TextPrompts(engine, folder), limits, identity(folder))
    # What the memory has no room for is no fault of a file.
    except (PipelineError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise what they like at files of others
        reason = " ".join(str(error).split())
        raise DamagedArtifact(
            f"{folder} cannot be opened: {type(error).__name__}: {reason}"
        ) from error
