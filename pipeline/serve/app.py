"""The HTTP application over a bundle: which service it has, who may ask, and what it tells of
itself.

Invariant: what is served follows from what the bundle says that it serves. A request passes, from
the outside in: its address, made plain; the log, which gives it an id and answers for what fails;
whose site it is from; its key; whether there is a model; the size and kind of its body.
"""

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import Scope

from .. import __version__
from ..config.serving import ServeConfig
from .bodies import BodyCheck
from .endpoints import add_endpoints
from .from_bundle import open_service
from .gate import Gate, GateKeeper
from .generation import Generating
from .head import HeadAsGet
from .interface import probe
from .keys import KeyCheck, Keys
from .limits import ConnectionLimits
from .logs import RequestLog, event
from .metrics import Metrics, path_label
from .playground import add_playground, page_files
from .refusals import add_error_handlers
from .same_site import ANY, Hosts, SameSite
from .slashes import PlainAddresses

log = logging.getLogger(__name__)

METRICS = "/metrics"
READY = {200: "It would", 503: "It would not: the status says why"}
FIGURES = {200: "As Prometheus reads them"}
# Without a key, as probes of load balancers have none, and whatever becomes of the bundle.
PROBES = ("/healthz", "/readyz")


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    keys: Keys = field(default_factory=Keys)
    hosts: Hosts = field(default_factory=lambda: Hosts("127.0.0.1"))
    origins: tuple[str, ...] = ()  # of pages that may ask from elsewhere
    # As vLLM has it, whose scrapers bring no key: figures, and nothing of a request.
    open_metrics: bool = True


def behind_a_proxy(key: str | None) -> Access:
    """Return who may ask where another server takes the requests, under names of its own and for
    the open network: whoever has a key, for figures too."""
    return Access(keys=Keys(key), hosts=Hosts("", (ANY,)), open_metrics=False)


def create(
    folder: Path,
    key: str | None = None,
    wanted: ServeConfig | None = None,
    access: Access | None = None,
) -> FastAPI:
    """Open a bundle and return the application that serves it; a key is one more way of giving
    `access` its keys.

    Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for a bundle that cannot be
    served, and ConfigError for an empty key.
    """
    app = closed(access or Access(keys=Keys(key)))
    open_bundle(app, folder, wanted)
    return app


def closed(access: Access, connections: ConnectionLimits | None = None) -> FastAPI:
    """Return an application without a bundle: it says that it is alive and not ready, and has what
    /v1 takes once `open_bundle` has opened one."""
    # No pages of documentation: they would load scripts from elsewhere into the reader's browser.
    app = FastAPI(
        title="MoleForge",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        # Answered without (slashes.py)
        redirect_slashes=False,
    )
    gate = Gate()
    metrics = Metrics()
    app.state.gate = gate
    app.state.wants_key = access.keys.wanted
    app.state.metrics = metrics
    app.state.close = None  # what ends the engine, once there is one
    app.state.connections = connections or ConnectionLimits()
    page = page_files()
    _add_probes(app, gate, metrics)
    add_playground(app, page)
    add_error_handlers(app)

    def told(scope: Scope, status: int, seconds: float) -> None:
        metrics.answered(path_label(scope, lambda: _paths(app)), status, seconds)

    # The page asks for the key, and tells that the bundle is still being opened.
    without_key = (*PROBES, *page)
    always = (*without_key, METRICS)
    open_paths = always if access.open_metrics else without_key
    # the last one is the outermost
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        BodyCheck,
        limit_bytes=lambda: app.state.service.limits.body_bytes if gate.opened else 0,
        limits=app.state.connections,
    )
    app.add_middleware(GateKeeper, gate=gate, always=always)
    app.add_middleware(KeyCheck, keys=access.keys, open_paths=open_paths)
    app.add_middleware(SameSite, hosts=access.hosts, origins=access.origins)
    app.add_middleware(RequestLog, told=told, quiet=frozenset(always))
    # First, as all of these go by the address
    app.add_middleware(PlainAddresses)
    return app


def open_bundle(
    app: FastAPI,
    folder: Path,
    wanted: ServeConfig | None = None,
    image_hosts: tuple[str, ...] = (),
) -> None:
    """Open a bundle and have an application serve it from here on. Raises as `create` does."""
    began = time.monotonic()
    service = open_service(Path(folder), wanted, image_hosts)
    app.state.service = service
    app.state.bundle = service.bundle
    engine = service.engine
    app.state.close = engine.close
    app.state.gate.end_texts = lambda: _end_texts(engine)
    app.state.metrics.follow(engine)
    add_endpoints(app, service, wants_key=app.state.wants_key)
    app.state.gate.is_full = lambda: service.is_full
    app.state.gate.opened = True
    seconds = round(time.monotonic() - began, 2)
    event(log, "ready", model=service.engine.name, seconds=seconds)


def _end_texts(engine: Generating) -> None:
    """Have what an engine says end; not here, as it waits for the pass that is under way."""
    threading.Thread(target=engine.close, args=(0.0,), name="closing", daemon=True).start()


def _paths(app: FastAPI) -> frozenset[str]:
    """Return the addresses that an application has."""
    return frozenset(getattr(route, "path", "") for route in app.routes)


def _add_probes(app: FastAPI, gate: Gate, metrics: Metrics) -> None:
    @app.get("/healthz", **probe("Say that the process answers", {200: "It does"}))
    async def healthz() -> dict:
        """Say that the process answers, whatever it is ready for, and which bundle it has opened:
        of several behind one address all should have the same."""
        bundle = getattr(app.state, "bundle", None)
        return {"status": "ok"} | ({"bundle": bundle} if bundle else {})

    @app.get("/readyz", **probe("Say whether a request would be taken", READY))
    async def readyz() -> JSONResponse:
        """Say whether another request would be taken: 503 while the bundle is opened, while too
        many requests wait, and once the server is told to stop."""
        problem = gate.problem
        return JSONResponse({"status": problem or "ready"}, 503 if problem else 200)

    @app.get(
        METRICS,
        response_class=PlainTextResponse,
        **probe("Tell what is counted", FIGURES, kind="text/plain"),
    )
    async def figures(request: Request) -> Response:
        """Return what is counted, as Prometheus reads it."""
        content, kind = metrics.shown(request.headers.get("accept", ""))
        return Response(content, media_type=kind)
