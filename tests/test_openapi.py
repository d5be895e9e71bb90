"""The interface's own description: a valid document, whole, and what schemathesis makes of it is
never answered otherwise than it says."""

import json
import re

import pytest
from fake_engine import ADDRESS, FakeEngine, routed_by_request, served
from fastapi.testclient import TestClient
from openapi_spec_validator import validate
from pydantic import TypeAdapter
from test_openai_api import CHAT, MESSAGES, events
from test_serve import running

from benchmarks.interface import ask
from pipeline.serve import answers

CALLS = 150


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The application over an engine without a model."""
    return served(tmp_path_factory.mktemp("fake"), FakeEngine())


@pytest.fixture(scope="module")
def document(app):
    """The description of it."""
    return app.openapi()


def test_the_document_is_valid_and_all_it_refers_to_is_there(document):
    validate(document)
    names = set(document["components"]["schemas"])
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert referred <= names
    assert {"ChatBody", "CompletionEvent", "RequestRoute", "ErrorAnswer", "ToldToken"} <= referred


def test_every_answer_is_described(document):
    for path, operations in document["paths"].items():
        if not path.startswith("/v1/"):
            continue
        for operation in operations.values():
            told = operation["responses"]
            assert {"200", "400", "401", "403", "404", "421", "500", "503"} <= told.keys()
            assert ({"408", "413", "415"} <= told.keys()) is ("requestBody" in operation)
            for response in told.values():
                content = response["content"]["application/json"]["schema"]
                assert response["description"] and ("$ref" in content or "anyOf" in content)
    for path in ("/v1/completions", CHAT):
        told = document["paths"][path]["post"]["responses"]["200"]["content"]
        event = told["text/event-stream"]["schema"]["properties"]["data"]
        assert "Event" in event["anyOf"][1]["contentSchema"]["anyOf"][0]["$ref"]


def test_with_keys_it_says_so(tmp_path):
    document = served(tmp_path, FakeEngine(), key="k").openapi()
    validate(document)
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"][CHAT]["post"]["security"] == [{"key": []}]


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_each_event_of_a_stream_is_as_described(tmp_path, path):
    engine = FakeEngine()
    routed_by_request(engine)
    client = TestClient(served(tmp_path, engine), ADDRESS)
    kind = answers.ChatEvent if path == CHAT else answers.CompletionEvent
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    body |= {"stream": True, "return_experts": True, "logprobs": True if path == CHAT else 2}
    for event in events(client.post(path, json=body | {"stream_options": {"include_usage": True}})):
        TypeAdapter(kind).validate_python(event, strict=True)


def test_no_made_up_request_fails_or_is_answered_otherwise(app):
    with running(app) as client:
        found = ask(str(client.base_url).rstrip("/"), CALLS)
    assert found.total() >= CALLS
    assert {status for _, status in found} <= {200, 400, 404}
    # Both what is taken and what is refused has come at each address with a body.
    for path in ("/v1/completions", CHAT, "/v1/route"):
        assert found[f"POST {path}", 200] and found[f"POST {path}", 400]
