"""What HTTP makes of the pieces of texts, over an engine without a model: the official client, the
usual requests of chat programs, every field of OpenAI's, streams, and clients that leave."""

import asyncio
import json
import threading
import time

import httpx
import openai
import pytest
from fake_engine import ADDRESS, SAID, TEMPLATE, FakeEngine, routed_by_request, served
from fastapi.testclient import TestClient
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from test_serve import asked, refused, running, wait_for
from transformers import AutoTokenizer

from pipeline.serve.generation import Overloaded
from pipeline.serve.limits import RequestLimits
from pipeline.serve.prompts import TextPrompts
from pipeline.serve.service import Service
from pipeline.serve.streaming import event as as_event

MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine():
    """What all ask."""
    return FakeEngine()


@pytest.fixture(scope="module")
def http(engine, tmp_path_factory):
    """A client of the application, over a socket."""
    with running(served(tmp_path_factory.mktemp("fake"), engine, new_tokens=64)) as client:
        yield client


@pytest.fixture(scope="module")
def client(http):
    """The official client of it."""
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="x", max_retries=0, timeout=30)


@pytest.fixture(autouse=True)
def fresh(engine):
    """No text asked for yet."""
    engine.asked.clear()
    engine.fails = None


def last(engine):
    """Return the text that was asked for last."""
    return engine.asked[-1][0]


def events(answer: httpx.Response) -> list:
    """Return the events of a stream, which has to end as OpenAI's do."""
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    *told, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in told]


# What asks for nothing that is not done, of every field of OpenAI's requests.
NEUTRAL_BOTH = {
    "model": "fake",
    "frequency_penalty": 0,
    "logit_bias": {},
    "max_tokens": 4,
    "n": 1,
    "presence_penalty": 0.0,
    "seed": 0,
    "stop": [],
    "stream_options": None,
    "temperature": 1,
    "top_p": 1,
    "user": "someone",
}
NEUTRAL = {
    "completions": NEUTRAL_BOTH
    | {"prompt": "hi", "best_of": 1, "echo": False, "logprobs": None, "suffix": None},
    "chat/completions": NEUTRAL_BOTH
    | {
        "messages": MESSAGES,
        "audio": None,
        "function_call": "auto",
        "functions": [],
        "logprobs": False,
        "max_completion_tokens": 4,
        "metadata": {"title": "x"},
        "modalities": ["text"],
        "moderation": None,
        "parallel_tool_calls": True,
        "prediction": None,
        "prompt_cache_key": "a",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "reasoning_effort": "none",
        "response_format": {"type": "text"},
        "safety_identifier": "a",
        "service_tier": "auto",
        "store": False,
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "verbosity": "medium",
        "web_search_options": None,
    },
}
# What is not done, with the field that has to be named.
REFUSED = {
    "completions": {"best_of": 2, "echo": True, "suffix": "x"},
    "chat/completions": {
        "audio": {"voice": "x", "format": "wav"},
        "function_call": {"name": "f"},
        "functions": [{"name": "f"}],
        "modalities": ["text", "audio"],
        "moderation": {"model": "m"},
        "prediction": {"type": "content", "content": "x"},
        "reasoning_effort": "high",
        "response_format": {"type": "json_object"},
        "service_tier": "flex",
        "store": True,
        "tool_choice": "required",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "verbosity": "low",
        "web_search_options": {},
    },
}
# Of the last, an empty object asks for a search; none of the others does for anything.
REFUSED["chat/completions"]["web_search_options"] = {"search_context_size": "low"}
SCHEMAS = {
    "completions": completion_create_params.CompletionCreateParamsBase,
    "chat/completions": chat_params.CompletionCreateParamsBase,
}


@pytest.mark.parametrize("path", SCHEMAS)
def test_what_asks_for_nothing_is_taken_whichever_field_it_is(http, path):
    neutral = NEUTRAL[path]
    # A newer client's fields are to be thought about.
    assert neutral.keys() == SCHEMAS[path].__annotations__.keys()
    answer = http.post(f"/v1/{path}", json=neutral | {"stream": False})
    assert answer.status_code == 200, answer.text
    absent = dict.fromkeys(neutral, None) | {
        key: neutral[key] for key in ("prompt", "messages") if key in neutral
    }
    assert http.post(f"/v1/{path}", json=absent).status_code == 200


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, fields in REFUSED.items() for field in fields]
)
def test_what_is_not_done_is_refused_by_the_field_s_name(http, path, field):
    body = NEUTRAL[path] | {field: REFUSED[path][field]}
    refused(http.post(f"/v1/{path}", json=body), 400, f"{field}: not supported", field)


def test_an_editor_at_the_end_of_a_file_has_no_suffix(http):
    body = {"prompt": "def f(", "suffix": "", "stop": ["\n\n"], "max_tokens": 8}
    assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("chosen", "listed"), [("tool_choice", "tools"), ("function_call", "functions")]
)
def test_tools_that_are_not_to_be_called_ask_for_nothing(http, chosen, listed):
    """As the Vercel AI SDK, LangChain and pydantic-ai send them for the answer after the calls."""
    there = {"messages": MESSAGES, listed: REFUSED["chat/completions"][listed]}
    assert http.post(CHAT, json=there | {chosen: "none"}).status_code == 200
    for other in ("auto", None):
        refused(http.post(CHAT, json=there | {chosen: other}), 400, f"{listed}: not", listed)


WRONG = [
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream alone"),
    (
        {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]},
        "messages",
        "refusal is not supported yet",
    ),
    ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"n": 17}, "n", "at most 16"),
    ({"n": 0}, "n", "at least 1"),
    ({"max_tokens": 0}, "max_tokens", "at least 1, or -1 for as many as there is room for"),
    ({"max_tokens": -2}, "max_tokens", "at least -1"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "tokens' numbers"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "at most 100"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "no token 99999"),
    ({"presence_penalty": 2.5}, "presence_penalty", "at most 2"),
    ({"min_p": 1.5}, "min_p", "at most 1"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
    ({"continue_final_message": True}, "continue_final_message", "must be false"),
    ({"add_generation_prompt": False}, "continue_final_message", "must be true"),
    (
        {"continue_final_message": True, "add_generation_prompt": False},
        "continue_final_message",
        "must be the assistant's",
    ),
    ({"guided_json": {}}, "guided_json", "no such field"),
    ({"": 1}, '""', '"": no such field'),
]


@pytest.mark.parametrize(("more", "param", "said"), WRONG)
def test_a_wrong_value_is_told_with_its_field(http, more, param, said):
    refused(http.post(CHAT, json={"messages": MESSAGES} | more), 400, said, param)


def test_what_is_asked_for_reaches_the_engine(http, engine):
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
    }
    more = {"seed": 2**63 - 1, "stop": "x", "logit_bias": {"7": -100, "8": 1.5}, "n": 2}
    body = {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6} | asked | more
    assert http.post(CHAT, json=body).status_code == 200
    first, second = (generation.sampling for generation, _ in engine.asked)
    assert {name: getattr(first, name) for name in asked} == asked
    assert first.logit_bias == {7: -100, 8: 1.5}
    assert (first.stop, first.max_tokens, first.logprobs) == (("x",), 6, None)
    # The same seed twice would be the same text twice.
    assert (first.seed, second.seed) == (2**63 - 1, -(2**63))
    assert http.post(CHAT, json={"messages": MESSAGES, "top_k": -1}).status_code == 200
    plain = last(engine).sampling
    assert (plain.temperature, plain.top_k, plain.seed) == (1.0, 0, None)
    # As much as there is room for, under the server's own limit.
    assert plain.max_tokens == 64
    assert http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 4096}).status_code == 200
    assert last(engine).sampling.max_tokens == 64
    for name in ("max_tokens", "max_completion_tokens"):
        assert http.post(CHAT, json={"messages": MESSAGES, name: -1}).status_code == 200
        assert last(engine).sampling.max_tokens == 64


def test_one_client_s_texts_are_one_client_s(http, engine):
    http.post(CHAT, json={"messages": MESSAGES, "n": 2})
    assert {client for _, client in engine.asked} == {"127.0.0.1"}


def test_one_client_s_requests_hold_up_no_other_s():
    """Of those whose pictures wait for memory, say, there are more than threads."""
    service = Service(FakeEngine(), None, RequestLimits())
    release = threading.Event()

    async def ask() -> str:
        held = []
        for _ in range(60):
            held.append(asyncio.create_task(service.run(release.wait, "messages", "ann")))
        try:
            return await asyncio.wait_for(service.run(lambda: "bob's", "prompt", "bob"), 20)
        finally:
            release.set()
            assert await asyncio.gather(*held) == [True] * 60

    assert asyncio.run(ask()) == "bob's"
    assert not service.prepared and not service._turns


def test_the_official_client_gets_answers_and_streams(client):
    done = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert done.choices[0].message.content == SAID
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *told, end = list(stream)
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in told) == SAID
    assert [each.choices[0].finish_reason for each in told[-2:]] == [None, "stop"]
    assert end.choices == [] and end.usage == done.usage
    assert {each.usage for each in told} == {None}
    text = client.completions.create(model="fake", prompt="hi", max_tokens=60)
    assert text.choices[0].text == SAID
    stream = client.completions.create(model="fake", prompt="hi", max_tokens=60, stream=True)
    assert "".join(each.choices[0].text for each in stream) == SAID


@pytest.mark.parametrize(
    ("path", "asked_for"), [("/v1/completions", {"prompt": "hi"}), (CHAT, {"messages": MESSAGES})]
)
def test_load_tools_are_told_the_usage_with_every_event_and_have_texts_of_one_length(
    http, engine, path, asked_for
):
    """As guidellm and vLLM's own send it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = asked_for | {"stream": True, "stream_options": options, "max_tokens": 4}
    told = events(http.post(path, json=body | {"ignore_eos": True}))
    assert last(engine).sampling.past_end
    counts = [each["usage"]["completion_tokens"] for each in told]
    assert counts == sorted(counts) and counts[-1] == 4
    assert {each["usage"]["prompt_tokens"] for each in told} == {last(engine).prompt_tokens}
    assert {
        each["usage"]
        for each in events(
            http.post(path, json=body | {"stream_options": {"continuous_usage_stats": True}})
        )
        if "usage" in each
    } == set()


def test_the_client_s_own_stream_helper_and_parsing_work(client):
    with client.chat.completions.stream(model="fake", messages=MESSAGES) as stream:
        told = [event for event in stream if event.type == "content.delta"]
        assert "".join(event.delta for event in told) == SAID
        assert stream.get_final_completion().choices[0].message.content == SAID


def test_an_event_is_one_line_to_every_client():
    told = {"text": "a\u2028b\u2029c\x85d\x0b\x1ee\r\n\U0001f41f"}
    content = as_event(told)
    answer = httpx.Response(200, content=content)
    line, end = answer.iter_lines()
    assert (json.loads(line.removeprefix("data: ")), end) == (told, "")
    assert content.endswith('\U0001f41f"}\n\n'.encode())


def test_several_texts_are_told_side_by_side(http, client):
    done = client.completions.create(model="fake", prompt=["hi", "ho"], n=2, max_tokens=3)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.usage.completion_tokens == 12 and done.usage.prompt_tokens < 12
    body = {"prompt": ["hi", "ho"], "n": 2, "max_tokens": 3, "stream": True}
    found = dict.fromkeys(range(4), "")
    for event in events(http.post("/v1/completions", json=body)):
        (choice,) = event["choices"]
        found[choice["index"]] += choice["text"]
    assert set(found.values()) == {done.choices[0].text}
    body = {"prompt": ["x"] * 9, "n": 2}
    refused(http.post("/v1/completions", json=body), 400, "18 texts", "prompt")


def test_a_prompt_may_be_tokens(http, engine):
    ids = engine.encode("hello there")
    for prompt, wanted in ((ids, [ids]), ([ids, ids[:1]], [ids, ids[:1]])):
        engine.asked.clear()
        assert http.post("/v1/completions", json={"prompt": prompt}).status_code == 200
        assert [list(each.prompt.ids) for each, _ in engine.asked] == wanted
    for wrong in ([], [[]], [1, "x"], [True], [1.5], 7, {"a": 1}):
        answer = http.post("/v1/completions", json={"prompt": wrong})
        refused(answer, 400, "must be a text, or a list of texts", "prompt")
    answer = http.post("/v1/completions", json={"prompt": [9999]})
    refused(answer, 400, "there is no token 9999", "prompt")


def test_probabilities_have_both_of_openai_s_forms(client, engine):
    done = client.chat.completions.create(
        model="fake", messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=4
    )
    content = done.choices[0].logprobs.content
    assert "".join(each.token for each in content) == done.choices[0].message.content
    assert b"".join(map(bytes, [each.bytes for each in content])).decode() in SAID
    # JSON has no word for what is impossible.
    assert [each.logprob for each in content[0].top_logprobs] == [-0.5, -9999.0]
    text = client.completions.create(model="fake", prompt="hi", logprobs=1, max_tokens=4)
    found = text.choices[0].logprobs
    assert "".join(found.tokens) == text.choices[0].text
    assert found.token_logprobs == [-0.5] * 4
    assert found.top_logprobs[0] == {found.tokens[0]: -0.5}
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert text.choices[0].text[offset:].startswith(token)
    plain = client.chat.completions.create(model="fake", messages=MESSAGES, logprobs=True)
    assert plain.choices[0].logprobs.content[0].top_logprobs == []
    assert last(engine).sampling.logprobs == 0


def test_a_stream_has_the_probabilities_and_experts_of_an_answer(http):
    for path, wanted in (
        ("/v1/completions", {"prompt": "hi", "logprobs": 1}),
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}),
    ):
        body = wanted | {"return_experts": True, "max_tokens": 5}
        whole = http.post(path, json=body).json()["choices"][0]
        tokens = []
        told = []
        for event in events(http.post(path, json=body | {"stream": True})):
            choice = event["choices"][0]
            tokens += choice.get("experts", {}).get("tokens", [])
            told.append(choice)
        assert tokens == whole["experts"]["tokens"]
        assert told[-1]["experts"]["experts"] == whole["experts"]["experts"]
        joined = {}
        for part in (each["logprobs"] for each in told if each["logprobs"]):
            for name, value in part.items():
                joined[name] = joined.get(name, []) + (value or [])
        assert joined == {name: value or [] for name, value in whole["logprobs"].items()}
        assert tokens[0].keys() == {"id", "text", "experts", "weights", "top"}
        assert tokens[0]["top"] == "sea"


def test_a_stop_string_ends_it(http):
    answer = http.post(CHAT, json={"messages": MESSAGES, "stop": ["reef"]}).json()
    assert answer["choices"][0]["message"]["content"] == "The tide leaves the "
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_who_is_named_reads(client, engine):
    for model, reader in {"fake": None, "expert:sea": "sea", "base": "base"}.items():
        done = client.chat.completions.create(model=model, messages=MESSAGES)
        assert (done.model, last(engine).prompt.reader) == (model, reader)
        assert done.model_extra.get("expert") == reader
    for model in ("sea", "expert:base", "expert:", "gpt-4", "expert:poet"):
        with pytest.raises(openai.NotFoundError, match="there are fake, expert:sea") as error:
            client.chat.completions.create(model=model, messages=MESSAGES)
        assert (error.value.param, error.value.code) == ("model", "model_not_found")


def test_the_models_are_the_stack_its_experts_and_the_base(client, http):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["fake", "expert:sea", "expert:shop", "base"]
    assert listed["expert:sea"].model_extra["parent"] == "fake"
    assert listed["expert:sea"].model_extra["domain"] == "ocean"
    assert listed["fake"].model_extra["experts"] == ["sea", "shop"]
    for name, model in listed.items():
        assert client.models.retrieve(name) == model
    refused(http.get("/v1/models/x"), 404, "is not served", "model", "model_not_found")


def test_a_chat_is_what_transformers_makes_of_it(http, engine, tmp_path):
    """The trunk's own template, by the class that any user of the bundle would open."""
    served(tmp_path, engine)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi, you"},
        {"role": "user", "content": "there\n and then?"},
    ]
    http.post(CHAT, json={"messages": turns})
    wanted = stock.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(last(engine).prompt.ids) == wanted
    # The newer name of a system message, and a text in parts.
    turns[0]["role"] = "developer"
    turns[1]["content"] = [{"type": "text", "text": "hello"}]
    http.post(CHAT, json={"messages": turns})
    assert list(last(engine).prompt.ids) == wanted


# As Qwen3's, Llama 3's and those that mark what an assistant says.
READS = (
    "{%- if not date_string is defined -%}{%- set date_string = 'May' -%}{%- endif -%}"
    "{%- if tools -%}{{ bos_token }}{%- endif -%}{{ date_string }}{%- for turn in messages -%}"
    "{%- generation -%}{{ turn.content }}{%- endgeneration -%}{%- endfor -%}"
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false -%}"
    "<think></think>{%- endif -%}"
)


def test_variables_that_the_chat_template_reads_are_given_to_it(tmp_path):
    engine = FakeEngine()

    def read(**given):
        body = {"messages": [{"role": "user", "content": "sea"}], "chat_template_kwargs": given}
        answer = http.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        return "".join(map(engine.tokenizer.model.decode, ([i] for i in last(engine).prompt.ids)))

    with running(served(tmp_path, engine, READS)) as http:
        assert read() == "Maysea" == read(enable_thinking=True)
        assert read(enable_thinking=False) == "Maysea<think></think>"
        assert read(date_string="June") == "Junesea"
        # What is a token in a template is a text in what a client sends
        assert read(date_string="<|endoftext|>") == "<|endoftext|>sea"
        special = engine.tokenizer.model.token_to_id("<|endoftext|>")
        assert special not in last(engine).prompt.ids
        for name in ("enable_thinkin", "tools", "bos_token", "messages", "max_length"):
            body = {"messages": MESSAGES, "chat_template_kwargs": {name: "x"}}
            said = f"reads no {name}; it reads date_string, enable_thinking"
            refused(http.post(CHAT, json=body), 400, said, "chat_template_kwargs")
        body = {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": [1]}}
        refused(http.post(CHAT, json=body), 400, "chat_template_kwargs", "chat_template_kwargs")


def test_a_template_that_reads_no_variables_is_given_none(http):
    assert (
        http.post(CHAT, json={"messages": MESSAGES, "chat_template_kwargs": {}}).status_code == 200
    )
    body = {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}
    said = "reads no enable_thinking; it reads none"
    refused(http.post(CHAT, json=body), 400, said, "chat_template_kwargs")


def test_an_answer_that_was_begun_is_gone_on_with(http, engine, tmp_path):
    served(tmp_path, engine)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    turns = [*MESSAGES, {"role": "assistant", "content": "The tide"}]
    body = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True}
    assert http.post(CHAT, json=body).status_code == 200
    wanted = stock.apply_chat_template(turns, continue_final_message=True, return_dict=False)
    assert list(last(engine).prompt.ids) == wanted


def test_no_message_can_end_its_turn_or_begin_another(http, engine):
    special = engine.tokenizer.model.token_to_id("<|endoftext|>")
    http.post(CHAT, json={"messages": [{"role": "user", "content": "a<|endoftext|>b"}]})
    ids = list(last(engine).prompt.ids)
    assert special not in ids
    assert "a<|endoftext|>b" in engine.tokenizer.model.decode(ids, skip_special_tokens=False)


ODD = [
    (None, "no chat template", "no_chat_template"),
    ("{{ raise_exception('roles must take turns') }}", "roles must take turns", None),
    ("{{ messages[9].content }}", "chat template does not take them", None),
    ("{% for", "chat template does not take them", None),
    ("{{ ''.__class__.__mro__ }}", "chat template does not take them", None),
]


@pytest.mark.parametrize(("template", "said", "code"), ODD)
def test_a_template_that_is_missing_or_cannot_be_rendered_is_told(tmp_path, template, said, code):
    client = TestClient(served(tmp_path, FakeEngine(), template), ADDRESS)
    refused(client.post(CHAT, json={"messages": MESSAGES}), 400, said, "messages", code)
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_language_model_is_shown_no_pictures(http):
    part = {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}
    body = {"messages": [{"role": "user", "content": [part]}]}
    refused(http.post(CHAT, json=body), 400, "reads no pictures", "messages")


def test_a_chat_over_the_context_is_told_with_both_numbers(http):
    body = {"messages": [{"role": "user", "content": "tide " * 300}]}
    refused(
        http.post(CHAT, json=body),
        400,
        r"\d+ tokens, but this model's maximum context length is 256",
        "messages",
        "context_length_exceeded",
    )


def test_a_route_is_asked_with_a_text_or_with_messages(http):
    told = http.post("/v1/route", json={"text": "hello"}).json()
    assert [token["top"] for token in told["tokens"]] == ["sea"] * len(told["tokens"])
    chat = http.post("/v1/route", json={"messages": MESSAGES}).json()
    assert len(chat["tokens"]) > len(told["tokens"])
    both = {"text": "a", "messages": MESSAGES}
    refused(http.post("/v1/route", json=both), 400, "not both", "messages")
    refused(http.post("/v1/route", json={}), 400, "give them, or a text", "messages")
    body = {"text": "a", "model": "base"}
    refused(http.post("/v1/route", json=body), 400, "only fake routes", "model")


def test_who_was_chosen_for_a_whole_request_is_told(tmp_path):
    engine = FakeEngine()
    routed_by_request(engine)
    client = TestClient(served(tmp_path, engine), ADDRESS)
    answer = client.post(CHAT, json={"messages": MESSAGES}).json()
    assert (answer["expert"], answer["confidence"]) == ("sea", 0.75)
    assert answer["alternatives"][1] == {"expert": "shop", "probability": 0.25}
    assert answer["choices"][0]["others"] == [{"expert": "shop", "content": "no"}]
    told = events(client.post(CHAT, json={"messages": MESSAGES, "stream": True}))
    chosen = [event for event in told if "expert" in event]
    assert [event["confidence"] for event in chosen] == [0.75]
    route = client.post("/v1/route", json={"messages": MESSAGES}).json()
    assert (route["expert"], route["answered_by"]) == ("sea", ["sea"])


def test_what_fails_on_the_way_is_an_event(http, engine, client):
    engine.fails = RuntimeError("secret")
    told = events(http.post(CHAT, json={"messages": MESSAGES, "stream": True}))
    assert told[-1]["error"]["type"] == "server_error" and "secret" not in str(told)
    engine.fails = Overloaded(3, closing=True)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True))


def test_a_request_without_room_is_sent_away_before_its_stream(tmp_path):
    engine = FakeEngine(room=3)
    client = TestClient(served(tmp_path, engine), ADDRESS)
    body = {"messages": MESSAGES, "stream": True, "n": 4}
    answer = client.post(CHAT, json=body)
    refused(answer, 503, "requests are waiting", None, "overloaded")
    assert answer.headers["retry-after"] == "1"
    assert all(generation.finished for generation, _ in engine.asked)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_a_client_that_leaves_gives_its_texts_up(tmp_path, path, stream):
    engine = FakeEngine(step_s=0.02)
    with running(served(tmp_path, engine)) as http:
        wanted = {"prompt": "hi"} if path != CHAT else {"messages": MESSAGES}
        more = {"stream": stream, "n": 2, "max_tokens": 15}
        connection = asked(http, path, wanted | more)
        wait_for(lambda: len(engine.asked) == 2)
        if stream:
            assert b"200 OK" in connection.recv(100)
        connection.close()
        generations = [generation for generation, _ in engine.asked]
        wait_for(lambda: all(each.cancelled for each in generations))
        drawn = [each.completion_tokens for each in generations]
        assert max(drawn) < 14
        time.sleep(0.06)
        assert [each.completion_tokens for each in generations] == drawn


def test_a_stream_that_waits_for_its_turn_ends_with_its_client(tmp_path):
    engine = FakeEngine(step_s=60)
    with running(served(tmp_path, engine)) as http:
        with http.stream("POST", CHAT, json={"messages": MESSAGES, "stream": True}) as answer:
            assert next(answer.iter_lines())
        (generation, _) = engine.asked[0]
        wait_for(lambda: generation.cancelled)


# As Open WebUI and LibreChat send them, in their forms: a chat, its title, a picture, a retry.
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
TURNS = [SYSTEM, *MESSAGES, {"role": "assistant", "content": "Hi."}, *MESSAGES]
USAGE = {"include_usage": True}
OPEN_WEBUI = [
    {"stream": True, "model": "fake", "messages": TURNS},
    {"stream": True, "model": "fake", "messages": MESSAGES, "stream_options": USAGE},
    {
        "stream": True,
        "model": "expert:sea",
        "messages": TURNS,
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 2048,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.0,
        "seed": 42,
        "stop": ["###"],
        "logit_bias": {"5": -100},
    },
    {
        "model": "fake",
        "messages": [{"role": "user", "content": "### Task:\nGenerate a title"}],
        "stream": False,
        "max_completion_tokens": 1000,
    },
]
LIBRE_CHAT = [
    {
        "model": "fake",
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "66f0c1d2",
        "stream": True,
        "messages": TURNS,
    },
    {
        "model": "fake",
        "user": "66f0c1d2",
        "n": 1,
        "stream": True,
        "stream_options": USAGE,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    },
    {
        "model": "fake",
        "temperature": 0.2,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "max_tokens": 16,
        "messages": [{"role": "system", "content": "Write a title"}, *MESSAGES],
    },
]


@pytest.mark.parametrize("body", [*OPEN_WEBUI, *LIBRE_CHAT])
def test_the_usual_requests_of_chat_programs_pass_as_they_are(http, body):
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        told = events(answer)
        assert ("usage" in told[-1]) is ("stream_options" in body)


def test_each_token_is_told_as_it_stands_in_a_text(engine, tmp_path):
    served(tmp_path, engine, TEMPLATE)
    prompts = TextPrompts(engine, tmp_path)
    ids = engine.encode(SAID)
    assert "".join(prompts.token_texts(ids)) == SAID
