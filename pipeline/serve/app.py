"""The HTTP face of a bundle: completions in OpenAI's format, and which expert took which token.

Invariant: whatever a client sends, it gets JSON back, and an error in OpenAI's form with the status that says whose
fault it is. The model itself runs one request at a time, in a thread; the rest wait, up to a limit.
"""

import hmac
import json
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from ..errors import ConfigError, PipelineError
from .engine import Engine, Sampling, Token, share, strongest

STOPS, STOP_CHARACTERS = 4, 200
DIGITS = 4  # of a weight


@dataclass(frozen=True)
class Limits:
    """What a request may ask for; above it, it is refused with 4xx, or 503 when too many wait."""

    body_bytes: int = 1 << 20
    new_tokens: int = 1024
    waiting: int = 32  # fewer than starlette has threads, which is 40
    seconds: float = 120.0  # then a completion ends where it is


class Refused(Exception):
    """A request that is answered with an error; raised anywhere below an endpoint."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers


def _only(value) -> Any:
    """Return the type of a field of OpenAI's that has one value here, so that a client learns what is not done."""

    def check(given):
        if given != value:
            raise ValueError(f"not supported yet; leave it out or set it to {json.dumps(value)}")
        return value

    return Annotated[Any, AfterValidator(check)]


_Off, _One, _Zero, _None = _only(False), _only(1), _only(0), _only(None)
_Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]


class Body(BaseModel):
    """A request: JSON types are taken at their word, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given):
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


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
    service = _Service(Engine(Path(folder)), limits or Limits())
    app = FastAPI(title="MoleForge", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    guarded = [Depends(partial(_check_key, key))]

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

    @app.post("/v1/completions", dependencies=guarded, openapi_extra=_described(CompletionBody))
    async def completions(request: Request) -> dict:
        return await service.complete(await _read(request, CompletionBody, service.limits.body_bytes))

    @app.post("/v1/route", dependencies=guarded, openapi_extra=_described(RouteBody))
    async def route(request: Request) -> dict:
        return await service.route(await _read(request, RouteBody, service.limits.body_bytes))

    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _no_such_address)
    app.add_exception_handler(Exception, _failed)
    return app


class _Service:
    """What the endpoints do, less HTTP."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits, self.inside = engine, limits, 0

    def model(self) -> dict:
        e = self.engine
        return {
            "id": e.name, "object": "model", "created": e.made_at, "owned_by": "moleforge",
            "experts": list(e.experts), "top_k": e.about["top_k"], "context_tokens": e.context_tokens,
        }  # fmt: skip

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.engine.name):
            raise Refused(404, f"the model {name!r} is not served here; {self.engine.name!r} is", "model",
                          "model_not_found")  # fmt: skip

    async def complete(self, body: CompletionBody) -> dict:
        self.check_model(body.model)
        if body.max_tokens > self.limits.new_tokens:
            raise Refused(400, f"max_tokens: at most {self.limits.new_tokens} here (found {body.max_tokens})",
                          "max_tokens")  # fmt: skip
        ids = await self._run(lambda: self._encoded(body.prompt, "prompt", body.max_tokens))
        done = await self._run(lambda: self.engine.complete(ids, body.sampling(self.limits.seconds)))
        choice = {"index": 0, "text": done.text, "logprobs": None, "finish_reason": done.finish}
        usage = {"prompt_tokens": len(ids), "completion_tokens": done.drawn, "total_tokens": len(ids) + done.drawn}
        experts = {"experts": self._told(done.tokens)} if body.return_experts else {}
        return {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": self.engine.name, "choices": [choice], "usage": usage, **experts,
        }  # fmt: skip

    async def route(self, body: RouteBody) -> dict:
        self.check_model(body.model)
        ids = await self._run(lambda: self._encoded(body.text, "text", 0))
        tokens = await self._run(lambda: self.engine.route(ids))
        return {"object": "route", "model": self.engine.name, **self._told(tokens)}

    async def _run(self, work: Callable):
        """Run work in a thread; refuse it while too many requests wait already."""
        if self.inside > self.limits.waiting:
            raise Refused(503, f"{self.inside} requests are waiting already; try again in a moment", None,
                          "overloaded", **{"Retry-After": "1"})  # fmt: skip
        self.inside += 1
        try:
            return await run_in_threadpool(work)
        finally:
            self.inside -= 1

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


def _check_key(key: str | None, request: Request) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if key is None or (
        scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    ):
        return
    said = "is not the one this server was started with" if given else "is missing: send Authorization: Bearer KEY"
    raise Refused(401, f"the API key {said}", None, "invalid_api_key", **{"WWW-Authenticate": "Bearer"})


async def _read(request: Request, kind: type[Body], limit_bytes: int):
    """Return a request's body, checked; stop reading once it is too long."""
    body = bytearray()
    try:
        async for block in request.stream():
            body += block
            if len(body) > limit_bytes:
                raise Refused(413, f"the request is over {limit_bytes:,} bytes", None, "too_large", Connection="close")
    except ClientDisconnect:
        raise Refused(400, "the client left before the request was whole") from None
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _wrong(error.errors(include_url=False)) from None


def _wrong(problems: list[dict]) -> Refused:
    """Return the refusal that names every wrong field."""
    texts, names = [], []
    for problem in problems:
        name = str(problem["loc"][0]) if problem["loc"] else ""
        text = problem["msg"].removeprefix("Value error, ")
        text = "no such field" if problem["type"] == "extra_forbidden" else text[:1].lower() + text[1:]
        texts.append(f"{name}: {text}" if name else f"the request is not a JSON object: {text}")
        names.append(name or None)
    return Refused(400, "; ".join(dict.fromkeys(texts)), names[0])


def _described(kind: type[Body]) -> dict:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _error(status: int, message: str, param: str | None = None, code: str | None = None, headers=None) -> JSONResponse:
    kinds = {401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


async def _refused(_request: Request, refused: Refused) -> JSONResponse:
    return _error(refused.status, refused.message, refused.param, refused.code, refused.headers)


async def _no_such_address(request: Request, error: HTTPException) -> JSONResponse:
    known = "GET /healthz, GET /v1/models, POST /v1/completions, POST /v1/route"
    return _error(error.status_code, f"{request.method} {request.url.path} is not served here; {known} are",
                  headers=error.headers)  # fmt: skip


async def _failed(_request: Request, _cause: Exception) -> JSONResponse:
    return _error(500, "the server failed at this request; its log tells more")


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
