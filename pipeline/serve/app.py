"""The HTTP face of a bundle: the application, and completions in OpenAI's format with the experts of every token.

Invariant: what is served follows from what the bundle says that it serves. The model itself runs one request at a
time, in a thread; the rest wait, up to a limit.
"""

import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException

from .. import __version__
from ..bundle import about
from ..errors import ConfigError, PipelineError
from .chat import ChatService
from .engine import Engine, Sampling, Token, share, strongest
from .protocol import (
    Body,
    Limits,
    Refused,
    Service,
    check_key,
    described,
    failed,
    no_such_address,
    only,
    read,
    refused,
)

STOPS, STOP_CHARACTERS = 4, 200
DIGITS = 4  # of a weight


_Off, _One, _Zero, _None = only(False), only(1), only(0), only(None)
_Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]


class CompletionBody(Body):
    """What /v1/completions takes."""

    model: str | None = Field(None, description="Name of the model; none: the one that is served")
    prompt: str = Field(description="Text to go on with; an empty one starts a new text")
    max_tokens: int = Field(16, ge=1, description="Tokens to draw at most")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of the probability that tokens are drawn from")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Same seed and request, same text")
    stop: _Stop | Annotated[list[_Stop], Field(max_length=STOPS)] | None = Field(
        None, description="Strings that end the text and are not part of it"
    )
    return_experts: bool = Field(False, description="Also tell which experts spoke each token")
    user: str | None = Field(None, description="Taken and not used")
    stream: _Off = False
    echo: _Off = False
    n: _One = 1
    best_of: _One = 1
    presence_penalty: _Zero = 0
    frequency_penalty: _Zero = 0
    logprobs: _None = None
    suffix: _None = None
    logit_bias: _None = None
    stream_options: _None = None

    def sampling(self, seconds: float) -> Sampling:
        """Return the part that is about drawing tokens."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.seed, stop, seconds)


class RouteBody(Body):
    """What /v1/route takes."""

    model: str | None = Field(None, description="Name of the model; none: the one that is served")
    text: str = Field(min_length=1, description="Text whose tokens are to be routed")


def create(folder: Path, key: str | None = None, limits: Limits | None = None) -> FastAPI:
    """Open a bundle and return the application that serves it; with a key, /v1 needs it as a bearer token.

    Raises MissingArtifact, DamagedArtifact, NewerStore or MismatchError for a bundle that cannot be served, and
    ConfigError for an empty key.
    """
    if key == "":
        raise ConfigError("the API key is empty, which would let everybody in; set one, or none at all")
    service = SERVICES[about(Path(folder)).get("serves", "completions")](Path(folder), limits)
    app = FastAPI(title="MoleForge", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    guarded = [Depends(partial(check_key, key))]

    @app.get("/healthz")
    async def healthz() -> dict:
        return {"status": "ok", "model": service.engine.name, "experts": list(service.engine.experts)}

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name}", dependencies=guarded)
    async def model(name: str) -> dict:
        service.check_model(name)
        return service.model()

    service.add_to(app, guarded)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, no_such_address)
    app.add_exception_handler(Exception, failed)
    return app


class CompletionService(Service):
    """Texts that go on, each token with its experts."""

    known = "GET /healthz, GET /v1/models, POST /v1/completions, POST /v1/route"

    def __init__(self, folder: Path, limits: Limits | None):
        super().__init__(Engine(folder), limits or Limits())

    def add_to(self, app: FastAPI, guarded: list) -> None:
        """Give an application the endpoints of this service."""

        @app.post("/v1/completions", dependencies=guarded, openapi_extra=described(CompletionBody))
        async def completions(request: Request) -> dict:
            return await self.complete(await read(request, CompletionBody, self.limits.body_bytes))

        @app.post("/v1/route", dependencies=guarded, openapi_extra=described(RouteBody))
        async def route(request: Request) -> dict:
            return await self.route(await read(request, RouteBody, self.limits.body_bytes))

    def model(self) -> dict:
        """Return what /v1/models says of the bundle."""
        e = self.engine
        return {
            "id": e.name, "object": "model", "created": e.made_at, "owned_by": "moleforge",
            "experts": list(e.experts), "top_k": e.about["top_k"], "context_tokens": e.context_tokens,
        }  # fmt: skip

    async def complete(self, body: CompletionBody) -> dict:
        """Return a text that goes on. Raises Refused."""
        self.check_model(body.model)
        if body.max_tokens > self.limits.new_tokens:
            raise Refused(400, f"max_tokens: at most {self.limits.new_tokens} here (found {body.max_tokens})",
                          "max_tokens")  # fmt: skip
        ids = await self.run(lambda: self._encoded(body.prompt, "prompt", body.max_tokens))
        done = await self.run(lambda: self.engine.complete(ids, body.sampling(self.limits.seconds)))
        choice = {"index": 0, "text": done.text, "logprobs": None, "finish_reason": done.finish}
        usage = {"prompt_tokens": len(ids), "completion_tokens": done.drawn, "total_tokens": len(ids) + done.drawn}
        experts = {"experts": self._told(done.tokens)} if body.return_experts else {}
        return {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": self.engine.name, "choices": [choice], "usage": usage, **experts,
        }  # fmt: skip

    async def route(self, body: RouteBody) -> dict:
        """Return a text's tokens with the experts that read them. Raises Refused."""
        self.check_model(body.model)
        ids = await self.run(lambda: self._encoded(body.text, "text", 0))
        tokens = await self.run(lambda: self.engine.route(ids))
        return {"object": "route", "model": self.engine.name, **self._told(tokens)}

    def _encoded(self, text: str, param: str, new_tokens: int) -> list[int]:
        ids, room = self.engine.encode(text), self.engine.context_tokens
        if len(ids) + new_tokens > room:
            wanted = f" and {new_tokens} are to be drawn" if new_tokens else ""
            raise Refused(
                400, f"{param}: {len(ids)} tokens{wanted}, but this model's context is {room} tokens; "
                f"shorten {param}{' or lower max_tokens' if new_tokens else ''}", param, "context_length_exceeded",
            )  # fmt: skip
        return ids

    def _told(self, tokens: list[Token]) -> dict:
        """Return tokens with their experts, and each expert's share."""
        names = self.engine.experts
        shares = [{k: round(v, DIGITS) for k, v in each.items()} for each in share(tokens, len(names))]
        return {
            "experts": [{"name": name, **each} for name, each in zip(names, shares, strict=True)],
            "tokens": [
                asdict(t) | {"top": names[strongest(t)], "weights": [[round(w, DIGITS) for w in k] for k in t.weights]}
                for t in tokens
            ],
        }


SERVICES = {"completions": CompletionService, "chat": ChatService}  # what a bundle says that it serves


def listen(app: FastAPI, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted; port 0 takes a free one. Raises PipelineError when the address cannot be had."""
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
        say(f"serving {app.state.service.engine.name} at http://{shown}:{server.getsockname()[1]}; Ctrl-C stops")
        uvicorn.Server(uvicorn.Config(app, log_level="info")).run(sockets=[server])
