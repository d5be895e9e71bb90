"""The HTTP face of a bundle: the application, and completions in OpenAI's format with the experts
of every token.

Invariant: what is served follows from what the bundle says that it serves. The model itself runs
one request at a time, in a thread; the rest wait, up to a limit.
"""

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import ConfigError, PipelineError
from ..store.bundle import about
from .chat import ChatService
from .completions import CompletionService
from .protocol import ApiError, RequestLimits, check_key, failed, no_such_address, refused


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
    service = SERVICES[about(Path(folder)).get("serves", "completions")](Path(folder), limits)
    app = FastAPI(title="MoleForge", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    guarded = [Depends(partial(check_key, key))]

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
    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, no_such_address)
    app.add_exception_handler(Exception, failed)
    return app


SERVICES = {
    "completions": CompletionService,
    "chat": ChatService,
}  # what a bundle says that it serves


def listen(app: FastAPI, host: str, port: int, progress: Callable[[str], None]) -> None:
    """Serve until interrupted; port 0 takes a free one. Raises PipelineError when the address
    cannot be had."""
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except (OSError, OverflowError) as error:
        server.close()
        raise PipelineError(
            f"cannot listen on {host} port {port}: {error}; choose another with --host or --port (0: any free port)"
        ) from None
    with server:
        shown = f"[{host}]" if ":" in host else host
        progress(
            f"serving {app.state.service.engine.name} at http://{shown}:{server.getsockname()[1]}; Ctrl-C stops"
        )
        uvicorn.Server(uvicorn.Config(app, log_level="info")).run(sockets=[server])
