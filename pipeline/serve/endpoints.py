"""All that is asked of a bundle under /v1, and the description of it."""

from fastapi import FastAPI

from .chat import add_chat
from .completions import add_completions
from .interface import describe
from .models import add_models
from .routes import add_route
from .service import Service


def add_endpoints(app: FastAPI, service: Service, *, wants_key: bool) -> None:
    """Give an application all endpoints of a bundle; `wants_key` is told of those under /v1."""
    add_models(app, service)
    add_completions(app, service)
    add_chat(app, service)
    add_route(app, service)
    describe(app, wants_key=wants_key)
