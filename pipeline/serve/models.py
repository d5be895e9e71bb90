"""GET /v1/models: whom a request can name: the stack, each of its experts, the base, and a dense
model."""

from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from .answers import ModelCard, ModelList
from .generation import DENSE_READER
from .interface import described
from .service import EXPERT, Service

# What of a bundle a request depends on.
_OF_STACK = ("top_k", "form", "rank", "limits")
# What of an expert's entry in a bundle a person may want to read.
_OF_EXPERT = ("label", "domain", "task", "description")


class ModelCards:
    """What is told of each model, of the stack with some facts of its bundle's."""

    def __init__(self, service: Service):
        self.service = service
        about = service.engine.about
        self._entries = {each["name"]: each for each in about["experts"]}
        self._stack = {key: about[key] for key in _OF_STACK if key in about}
        base = about.get("base")
        if isinstance(base, Mapping):
            self._stack["base"] = base.get("model")
        dense = about.get("dense")
        self._dense = {"baseline": dense["name"]} if isinstance(dense, Mapping) else {}

    def all(self) -> ModelList:
        """Return what is told of each, the stack first."""
        cards = [self.card(name) for name in self.service.models]
        return {"object": "list", "data": cards}

    def card(self, name: str) -> ModelCard:
        """Return what is told of one, by the name that a request has for it."""
        stack = self.service.engine.name
        card: ModelCard = {
            "id": name,
            "object": "model",
            "created": self.service.engine.made_at,
            "owned_by": "moleforge",
            "context_tokens": self.service.context_tokens,
            # the same, as vLLM calls it
            "max_model_len": self.service.context_tokens,
        }
        if name == stack:
            card["experts"] = list(self.service.engine.experts)
            if self.service.bundle:
                card["bundle"] = dict(self.service.bundle)
            return _with(card, self._stack)
        card["parent"] = stack
        if name == DENSE_READER:
            return _with(card, self._dense)
        entry = self._entries.get(name.removeprefix(EXPERT), {})
        told = {key: entry[key] for key in _OF_EXPERT if entry.get(key)}
        return _with(card, told)


def _with(card: ModelCard, facts: Mapping[str, Any]) -> ModelCard:
    # Of a bundle, which says what it likes; the fields are chosen by name.
    return cast(ModelCard, {**card, **facts})


def add_models(app: FastAPI, service: Service) -> None:
    """Give an application /v1/models."""
    cards = ModelCards(service)

    @app.get("/v1/models", **described(app, "List the models", answer=ModelList))
    async def models() -> Response:
        return JSONResponse(cards.all())

    @app.get(
        "/v1/models/{model}",
        **described(app, "Tell of one model", answer=ModelCard, path={"model": "Its name"}),
    )
    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        service.reader(name)
        return JSONResponse(cards.card(name))
