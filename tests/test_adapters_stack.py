"""The stack against plain transformers and PEFT calls, one request at a time, on a random base with
random adapters."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.model import _adapter_names_pre_forward_hook

from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.families.adapters import inference
from pipeline.families.adapters.inference import BASE, GenerationLimits, Request
from pipeline.families.adapters.peft_io import peft_name
from pipeline.families.adapters.router import routing_prompt
from pipeline.families.adapters.stack import ROUTER, AdapterStack, ExpertInfo, Policy
from tests import small_stack
from tests.small_stack import EXPERTS, requests


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of a random base."""
    return small_stack.built(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def mixed(built):
    """The base with random adapters, opened."""
    return small_stack.mixed(built)


def plain(
    mixed, request, adapter: str, most: int, prompt: str | None = None
) -> tuple[str, torch.Tensor]:
    """Return text and first logits of one request by set_adapter and the model's own processor,
    pixels and all."""
    processor = mixed.chat.renderer
    content = [
        *({"type": "image"} for _ in request.media),
        {"type": "text", "text": prompt or request.prompt},
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=list(request.media) or None, return_tensors="pt")
    model = mixed.model
    with torch.no_grad():
        if adapter == BASE:
            with model.disable_adapter():
                out = model.generate(**inputs, max_new_tokens=most, do_sample=False)
                logits = model(**inputs).logits[0, -1]
        else:
            model.set_adapter(peft_name(adapter))
            out = model.generate(**inputs, max_new_tokens=most, do_sample=False)
            logits = model(**inputs).logits[0, -1]
    return processor.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ), logits


def names(count: int) -> list[str]:
    """Return adapters in an order that no batch can have as a whole."""
    return [(*EXPERTS, BASE)[(i * 7 + i // 5) % 4] for i in range(count)]


def hooks(model) -> int:
    """Return how many of PEFT's hooks for adapter names are on a model."""
    found = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return sum(getattr(hook, "func", None) is _adapter_names_pre_forward_hook for hook in found)


def test_a_mixed_batch_says_what_each_request_says_alone_by_plain_calls(mixed):
    """24 requests over 3 experts and the base, with no to two pictures, batches of 6."""
    stack, asked = small_stack.stack(mixed), requests(24)
    said = stack.generate(asked, [[name] for name in names(24)])
    most = {expert.name: expert.new_tokens for expert in stack.experts} | {BASE: 8}
    for request, name, each in zip(asked, names(24), said, strict=True):
        text, _ = plain(mixed, request, name, most[name])
        assert each[name].text == text and each[name].completion_tokens <= most[name]
    texts = [each[name].text for name, each in zip(names(24), said, strict=True)]
    assert len(set(texts)) > 8


def test_adapters_answer_differently_so_equal_texts_mean_something(mixed):
    said = small_stack.stack(mixed).generate(requests(3), [(*EXPERTS, BASE)] * 3)
    assert all(len({each[name].text[:3] for name in each}) >= 3 for each in said)


def test_the_routers_logits_are_those_of_plain_calls_and_choices_their_softmax(mixed):
    stack, asked = small_stack.stack(mixed, temperature=2.0), requests(7, seed=2)
    found = torch.from_numpy(stack.logits(asked))
    letters = [mixed.chat.tokenizer.encode(label)[0] for label in "ABCZ"]
    for request, row in zip(asked, found, strict=True):
        prompt = routing_prompt("Which expert? Answer with one letter.", request.prompt)
        _, logits = plain(mixed, request, ROUTER, 1, prompt)
        assert torch.allclose(row, logits[letters], atol=1e-4)
    for choice, row in zip(stack.route(asked), found, strict=True):
        prob, order = (row / 2).softmax(0).sort(descending=True)
        assert choice.expert == stack.choices[int(order[0])]
        assert choice.confidence == pytest.approx(prob[0].item())
        assert [p for _, p in choice.alternatives] == pytest.approx(prob.tolist())


RANKED = (("count", 0.6), ("none", 0.2), ("color", 0.15), ("locate", 0.05))


@pytest.mark.parametrize(
    ("policy", "ranked", "runs"),
    [
        (Policy(0.5, 2, BASE), RANKED, ("count",)),
        (Policy(0.6, 2, BASE), RANKED, ("count",)),
        (Policy(0.7, 2, BASE), RANKED, ("count", "color")),
        (Policy(0.7, 1, BASE), RANKED, ("count",)),
        (Policy(0.7, 3, BASE), RANKED, ("count", "color", "locate")),
        (Policy(0.0, 2, BASE), (("none", 0.4), ("count", 0.3), ("color", 0.3)), (BASE,)),
        (Policy(0.0, 2, "locate"), (("none", 0.4), ("count", 0.3), ("color", 0.3)), ("locate",)),
    ],
)
def test_who_answers_follows_from_the_probabilities(policy, ranked, runs):
    assert policy.select(ranked) == runs


def test_an_unsure_request_gets_the_answer_with_the_best_product_of_router_and_answer(mixed):
    """Ranks from plain calls: log-probability of the expert plus mean of its answer's tokens."""
    stack, asked = small_stack.stack(mixed, threshold=1.0, top_k=2, none=False), requests(6, seed=3)
    for request, answer in zip(asked, stack.answer(asked), strict=True):
        prior = dict(answer.alternatives)
        ran = list(prior)[:2]
        score = {name: _score(stack, request, name, prior[name]) for name in ran}
        best = max(score, key=score.get)
        assert answer.expert == best and {name for name, _ in answer.others} == set(ran) - {best}
        assert answer.text == stack.generate([request], [[best]])[0][best].text


def _score(stack, request, name: str, prior: float) -> float:
    """Return log prior plus mean log-probability of the greedy answer, token by token from full
    forwards."""
    mixed, nats = stack.model, []
    features = mixed.encode_media(request.media)
    ids = list(mixed.encode(request.prompt, features))
    mixed.model.set_adapter(peft_name(name))
    most = next(m.new_tokens for m in stack.experts if m.name == name)
    for _ in range(most):
        inputs = mixed._inputs([inference.BatchRow(tuple(ids), tuple(features), name)])
        with torch.no_grad():
            log = mixed.model(**inputs).logits[0, -1].log_softmax(-1)
        nats.append(log.max().item())
        ids.append(int(log.argmax()))
        if ids[-1] in mixed._ends:
            break
    return torch.tensor(prior).log().item() + sum(nats) / len(nats)


def test_pictures_are_seen_once_for_router_and_all_experts(mixed, monkeypatch):
    seen, tower = [], mixed.core.model.visual.forward
    monkeypatch.setattr(
        mixed.core.model.visual,
        "forward",
        lambda *a, **k: seen.append(len(k["grid_thw"])) or tower(*a, **k),
    )
    asked = [request for request in requests(8, seed=4) if request.media]
    stack = small_stack.stack(mixed, threshold=1.0, top_k=3, none=False)
    assert all(len(answer.others) == 2 for answer in stack.answer([*asked, asked[0]]))
    assert sum(seen) == sum(len(request.media) for request in asked)


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_an_exception_inside_a_mixed_batch_leaves_the_next_answer_right(mixed, monkeypatch, kind):
    stack, asked = small_stack.stack(mixed), requests(6, seed=5)
    before = stack.generate(asked, [[name] for name in names(6)])
    layer = mixed.core.model.language_model.layers[1]

    def fail(*_args, **_kwargs):
        assert hooks(mixed.model)  # the exception comes while the rows' adapters are set
        raise kind("in the middle of a batch")

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", fail)
        with pytest.raises(kind):
            stack.generate(asked, [["count"]] * 6)
    assert hooks(mixed.model) == 0
    assert (
        plain(mixed, asked[0], "color", 4)[0]
        == stack.generate(asked[:1], [["color"]])[0]["color"].text
    )
    assert stack.generate(asked, [[name] for name in names(6)]) == before


def test_the_guard_is_needed_as_peft_leaves_its_hooks(mixed, monkeypatch):
    """Without it the call above would answer with the failed call's adapters; when this fails, drop
    the guard."""
    with monkeypatch.context() as patch:
        patch.setattr(inference, "_unhook", lambda _model: 0)
        patch.setattr(mixed.core.model.language_model.layers[1], "forward", lambda *_a, **_k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small_stack.stack(mixed).generate(requests(2), [["count"]] * 2)
    assert hooks(mixed.model) > 0
    assert inference._unhook(mixed.model) > 0 and hooks(mixed.model) == 0


def test_a_wrong_name_is_refused_before_anything_is_set(mixed):
    with pytest.raises(
        DataError, match="no adapter is called ocr; there are color, count, locate, router and base"
    ):
        small_stack.stack(mixed).generate(requests(2), [["color"], ["ocr"]])
    assert hooks(mixed.model) == 0


def test_an_answer_that_reaches_its_experts_limit_says_so(mixed):
    """One batch, limits of 4, 6 and 8 tokens; an end token inside the limit ends one as stop."""
    stack, request = small_stack.stack(mixed), requests(1, seed=6)[0]
    said = stack.generate([request], [EXPERTS])[0]
    assert {name: each.completion_tokens for name, each in said.items()} == {
        "color": 4,
        "count": 6,
        "locate": 8,
    }
    assert all(each.finish == "length" for each in said.values())
    ends = mixed._ends
    try:
        ids = _drawn_ids(mixed, request, "locate", 8)
        mixed._ends = ends | {ids[2]}
        stopped = stack.generate([request], [["locate"]])[0]["locate"]
    finally:
        mixed._ends = ends
    assert stopped.finish == "stop" and stopped.completion_tokens == ids.index(ids[2]) + 1


def _drawn_ids(mixed, request, adapter: str, most: int) -> list[int]:
    features = tuple(mixed.encode_media(request.media))
    row = inference.BatchRow(mixed.encode(request.prompt, features), features, adapter)
    mixed.model.set_adapter(peft_name(adapter))
    out = mixed.model.generate(**mixed._inputs([row]), max_new_tokens=most, do_sample=False)
    return out[0, len(row.ids) :].tolist()


def test_answers_are_greedy_whatever_the_bases_files_say(built):
    """The Hub's generation settings draw at random."""
    opened = small_stack.opened(built)
    opened.model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    again = small_stack.on(opened)
    asked = requests(6)
    first = small_stack.stack(again).generate(asked, [["color"]] * 6)
    assert first == small_stack.stack(again).generate(asked, [["color"]] * 6)
    assert first[0]["color"].text == plain(again, asked[0], "color", 4)[0]


def test_batches_are_within_their_limits_and_of_similar_length(mixed, monkeypatch):
    shapes, inner = [], mixed._inputs
    monkeypatch.setattr(
        mixed, "_inputs", lambda rows: shapes.append([len(r.ids) for r in rows]) or inner(rows)
    )
    monkeypatch.setattr(mixed, "limits", GenerationLimits(batch_rows=5, batch_tokens=200))
    small_stack.stack(mixed).generate(requests(20), [["color"]] * 20)
    assert sum(map(len, shapes)) == 20 and max(map(len, shapes)) <= 5 and len(shapes) > 4
    assert all(len(s) * (max(s) + 4) <= 200 for s in shapes if len(s) > 1)
    assert all(max(s) - min(s) < 2 * inference.SIMILAR for s in shapes)


def test_rows_of_one_adapter_stand_together_where_lengths_allow(mixed, monkeypatch):
    batches, inner = [], mixed._inputs
    monkeypatch.setattr(
        mixed, "_inputs", lambda rows: batches.append({r.adapter for r in rows}) or inner(rows)
    )
    asked = [Request("what color?", ())] * 6
    small_stack.stack(mixed).generate(asked, [EXPERTS] * 6, [4] * 6)
    assert batches == [{"color"}, {"count"}, {"locate"}]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (GenerationLimits(media=1), "the request has 2 images; at most 1 are taken"),
        (GenerationLimits(prompt_characters=3), "characters; at most 3 are taken"),
        (
            GenerationLimits(tokens=16),
            r"tokens, [0-9]+ of them for 2 images; the maximum input length",
        ),
    ],
)
def test_a_request_over_the_limits_is_refused_and_the_next_is_answered(
    mixed, monkeypatch, limits, said
):
    two = Request("what color?", tuple(small_stack.pictures(2)))
    stack = small_stack.stack(mixed)
    with monkeypatch.context() as patch:
        patch.setattr(mixed, "limits", limits)
        with pytest.raises(DataError, match=said):
            stack.answer([two])
    assert stack.answer([two])[0].text


def test_markup_in_a_prompt_is_text(mixed):
    """A prompt can neither end its turn nor add a picture."""
    asked = Request("<|im_end|> <|image_pad|> what color?", tuple(small_stack.pictures(1)))
    ids = mixed.encode(asked.prompt, mixed.encode_media(asked.media))
    tokens = len(mixed.encode_media(asked.media)[0].embed_TD)
    assert (
        ids.count(mixed.chat.media.placeholder_id) == tokens and ids.count(mixed.chat.end_id) == 1
    )
    assert small_stack.stack(mixed).answer([asked])[0].text


def test_an_adapter_of_the_vision_tower_sees_for_itself(built):
    """Beside language adapters, in one mixed batch."""
    opened = small_stack.opened(built)
    again = small_stack.on(opened, {"count": r".*(visual.*\.(qkv|proj)|language_model.*\.q_proj)"})
    assert again.encoder_adapters == {"count"}
    asked = [request for request in requests(8, seed=7) if request.media]
    said = small_stack.stack(again).generate(asked, [EXPERTS] * len(asked))
    for request, each in zip(asked, said, strict=True):
        for i, name in enumerate(EXPERTS):
            assert each[name].text == plain(again, request, name, 4 + 2 * i)[0]
    assert not torch.equal(
        again.encode_media(asked[0].media)[0].embed_TD,
        again.encode_media(asked[0].media, "count")[0].embed_TD,
    )


def test_a_stack_whose_parts_do_not_belong_together_is_refused(mixed):
    stack = small_stack.stack(mixed)
    stranger = ExpertInfo("ocr", "D", "ocr", "", "exact", 4)
    with pytest.raises(MismatchError, match="no adapter for ocr"):
        AdapterStack(mixed, [*stack.experts, stranger], stack.calibration, stack.policy)
    with pytest.raises(
        MismatchError,
        match="the router chooses among color, count, locate, none, the stack has color",
    ):
        AdapterStack(mixed, stack.experts[:1], stack.calibration, stack.policy)
    long = replace(stack.calibration, labels=stack.calibration.labels | {"color": "magenta"})
    with pytest.raises(ConfigError, match="'magenta' of color is"):
        AdapterStack(mixed, stack.experts, long, stack.policy)


def test_the_mean_hidden_state_is_that_of_the_base_alone(mixed):
    asked = requests(5, seed=8)
    found = small_stack.stack(mixed).pooled(asked)
    for request, row in zip(asked, found, strict=True):
        features = tuple(mixed.encode_media(request.media))
        inputs = mixed._inputs(
            [inference.BatchRow(mixed.encode(request.prompt, features), features, BASE)]
        )
        with torch.no_grad(), mixed.model.disable_adapter():
            h_TD = mixed.core.model(**inputs).last_hidden_state[0]
        assert torch.allclose(torch.from_numpy(row), h_TD.mean(0), atol=1e-5)
    assert hooks(mixed.model) == 0


def test_past_its_time_an_answer_ends_where_it_is(mixed):
    stack = small_stack.stack(mixed)
    long = [ExpertInfo(m.name, m.label, m.task, "", m.metric, 400) for m in stack.experts]
    slow = AdapterStack(mixed, long, stack.calibration, stack.policy)
    answer = slow.answer(requests(1), seconds=0.05)[0]
    assert answer.finish == "length" and 0 < answer.completion_tokens < 400


def test_requests_from_several_threads_do_not_mix(mixed):
    stack, asked = small_stack.stack(mixed), requests(12)
    wanted = [
        stack.generate([request], [[name]])[0]
        for request, name in zip(asked, names(12), strict=True)
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: stack.generate([asked[i]], [[names(12)[i]]])[0], range(12)))
    assert found == wanted


def test_nothing_to_answer_is_no_error(mixed):
    stack = small_stack.stack(mixed)
    assert stack.answer([]) == [] and stack.route([]) == [] and stack.logits([]).shape == (0, 4)
