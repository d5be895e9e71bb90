"""The HTTP application over a bundle: which service it has, and how it listens.

Invariant: what is served follows from what the bundle says that it serves.
"""

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fastapi import Depends, FastAPI

from .. import __version__
from ..errors import ConfigError, DamagedArtifact, PipelineError
from ..store.bundle import about
from .chat import ChatService
from .completions import CompletionService
from .keys import check_key
from .limits import RequestLimits
from .protocol import Service
from .refusals import add_error_handlers

BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
# By what a bundle says that it serves.
SERVICES: dict[str, type[Service]] = {
    "completions": CompletionService,
    "chat": ChatService,
}


def create(folder: Path, key: str | None = None, limits: RequestLimits | None = None) -> FastAPI:
    """Open a bundle and return the application that serves it; with a key, /v1 needs it as a bearer
    token.

    Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for a bundle that cannot be
    served, and ConfigError for an empty key.
    """
    if key == "":
        raise ConfigError(
            "the API key is empty, which would let everybody in; set one, or none at all"
        )
    folder = Path(folder)
    # Bundles that do not say it are of completions, as all were before there were others.
    serves = about(folder).get("serves", "completions")
    if not isinstance(serves, str) or serves not in SERVICES:
        raise DamagedArtifact(f"{folder} serves {serves!r}, which is no service here")
    try:
        service = SERVICES[serves](folder, limits)
    # What the memory has no room for is no fault of a file.
    except (PipelineError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise what they like at files of others
        reason = " ".join(str(error).split())
        raise DamagedArtifact(
            f"{folder} cannot be opened: {type(error).__name__}: {reason}"
        ) from error
    # No pages of documentation: they would load scripts from elsewhere into the reader's browser.
    app = FastAPI(title="MoleForge", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    guarded = [Depends(partial(check_key, key))]

    # Without the key, as probes of load balancers have none.
    @app.get("/healthz")
    async def healthz() -> dict:
        return {
            "status": "ok",
            "model": service.engine.name,
            "experts": list(service.engine.experts),
        }

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name}", dependencies=guarded)
    async def model(name: str) -> dict:
        service.check_model(name)
        return service.model()

    service.add_to(app, guarded)
    add_error_handlers(app)
    return app


def listen(app: FastAPI, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until interrupted; port 0 takes a free one. Raises PipelineError when the address
    cannot be had."""
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Bound here and not by uvicorn: it would end the process over an address in use, and with
    # port 0 the address would be known to its log alone.
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        # Before the address is told: whoever reads it may ask at once.
        server.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        server.close()
        raise PipelineError(
            f"cannot listen on {host} port {port}: {error}; "
            "choose another with --host or --port (0: any free port)"
        ) from None
    with server:
        name = app.state.service.engine.name
        shown = f"[{host}]" if ":" in host else host
        bound_port = server.getsockname()[1]
        announce(f"serving {name} at http://{shown}:{bound_port}; Ctrl-C stops")
        config = uvicorn.Config(app, log_level="info")
        uvicorn.Server(config).run(sockets=[server])
