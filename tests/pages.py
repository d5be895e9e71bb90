"""A server that says what the real one could say, in its form: what tests of the page ask, made
without a model."""

import asyncio
import io
import json

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from pipeline.serve.playground import add_playground, page_files

LAYERS = 3
WORDS = ("The", " tide", " pulls", " the", " net", "\n", "é", " home", ".")
# A name that is markup: whoever made the bundle wrote it.
MARKUP = "<img src=x onerror=alert(1)>"
NAMES = ("sea", "shop", MARKUP)
BOXES = '[{"bbox_2d": [100, 200, 500, 600], "label": "red <b>square</b>"}]'


def token(text: str, place: int) -> dict:
    """Return a token as the server tells it: two experts in each layer, the likelier first."""
    first = place % len(NAMES)
    second = (first + 1) % len(NAMES)
    # in the first layer one expert alone
    experts = [[first], *[[first, second]] * (LAYERS - 1)]
    weights = [[1.0], *[[0.75, 0.25]] * (LAYERS - 1)]
    told = {"id": 100 + place, "text": text, "experts": experts, "weights": weights}
    return {**told, "top": NAMES[first]}


def tokens(texts) -> list[dict]:
    """Return a text's tokens."""
    return [token(text, place) for place, text in enumerate(texts)]


class FakeServer:
    """An application with the page over it; what it was asked, and what became of it."""

    def __init__(self, pictures: bool = False):
        self.pictures = pictures
        self.key: str | None = None
        self.asked: list[tuple[str, dict]] = []
        self.left = 0  # streams whose client left before they were whole
        self.said: list[str] = list(WORDS)
        self.app = FastAPI()
        self._add()
        add_playground(self.app, page_files())

    def models(self) -> list[dict]:
        """Return who can be asked."""
        stack = {"id": "small", "object": "model", "experts": list(NAMES), "context_tokens": 64}
        if self.pictures:
            stack["limits"] = {"images": 1}
        else:
            stack["top_k"] = 2
        names = [f"expert:{name}" for name in NAMES]
        others = [{"id": name, "object": "model"} for name in (*names, "base")]
        return [stack, *others, {"id": "dense", "object": "model", "baseline": "total"}]

    def _add(self) -> None:
        app = self.app

        @app.middleware("http")
        async def keyed(request: Request, go_on):
            # As the real one: the page is everybody's, what it asks is not.
            needs_key = self.key and request.url.path.startswith("/v1/")
            if needs_key and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "the API key is missing", None, "invalid_api_key")
            return await go_on(request)

        @app.get("/v1/models")
        async def models():
            return {"object": "list", "data": self.models()}

        @app.post("/v1/route")
        async def route(request: Request):
            body = await request.json()
            self.asked.append(("route", body))
            if "messages" in body:
                return {"object": "route", "model": "small", **self.choice()}
            return {"object": "route", "model": "small", "tokens": tokens(body["text"].split(" "))}

        @app.post("/v1/{kind:path}")
        async def answer(kind: str, request: Request):
            body = await request.json()
            self.asked.append((kind, body))
            refused = REFUSALS.get(body.get("prompt"))
            if refused:
                return refusal(*refused)
            return StreamingResponse(self.stream(kind, body), media_type="text/event-stream")

    def choice(self) -> dict:
        """Return whom a router chose."""
        alternatives = [{"expert": name, "probability": 0.4} for name in NAMES]
        alternatives[0]["probability"] = 0.2
        return {"expert": "shop", "confidence": 0.4, "alternatives": alternatives}

    async def stream(self, kind: str, body: dict):
        """Yield the events of an answer."""
        common = {"id": "x", "created": 1, "model": body.get("model"), "usage": None}
        whole = False
        try:
            if kind.startswith("chat"):
                delta = {"role": "assistant", "content": ""}
                yield event({**common, "choices": [{"index": 0, "delta": delta}]})
            for place, text in enumerate(self.said):
                await asyncio.sleep(0.005)
                part = {"index": 0, "finish_reason": None, "logprobs": None}
                part |= {"delta": {"content": text}} if kind.startswith("chat") else {"text": text}
                drawn = token(text, place)
                if body.get("model") == "dense":
                    drawn |= {"experts": [], "weights": [], "top": None}
                part["experts"] = {"tokens": [drawn]}
                if place == len(self.said) - 1:
                    part["finish_reason"] = "length"
                told = {**common, "choices": [part]}
                if self.pictures and place == 0:
                    told |= self.choice()
                yield event(told)
            asked = body.get("prompt") or str(body["messages"][-1]["content"])
            if asked in BROKEN:
                message, fault, code = BROKEN[asked]
                error = {"message": message, "type": fault, "param": None, "code": code}
                yield event({"error": error})
            while body.get("prompt") == "for ever":
                await asyncio.sleep(0.005)
                part = {"index": 0, "text": ".", "experts": {"tokens": [token(".", 0)]}}
                yield event({**common, "choices": [part]})
            counted = {"prompt_tokens": 2, "completion_tokens": len(self.said), "total_tokens": 9}
            yield event({**common, "choices": [], "usage": counted})
            yield "data: [DONE]\n\n"
            whole = True
        finally:
            self.left += not whole


REFUSALS = {
    "too long": (400, "prompt: 90 tokens; shorten prompt", "prompt", "context_length_exceeded"),
    "hot": (400, "temperature: must be at most 2", "temperature", None),
    "full": (503, "40 requests are waiting already", None, "overloaded"),
}
# Of streams that end with an error: its message, type and code
BROKEN = {
    "breaks": ("the text failed", "server_error", None),
    "sheds": ("this server is shutting down", "server_error", "stopping"),
}


def refusal(status: int, message: str, param: str | None, code: str | None) -> JSONResponse:
    """Return an error in OpenAI's form."""
    body = {"error": {"message": message, "type": "x", "param": param, "code": code}}
    headers = {"Retry-After": "7"} if status == 503 else None
    return JSONResponse(body, status, headers)


def event(content: dict) -> str:
    """Return an object as a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def picture(size=(80, 40)) -> bytes:
    """Return a red picture's file."""
    held = io.BytesIO()
    Image.new("RGB", size, "red").save(held, "PNG")
    return held.getvalue()
