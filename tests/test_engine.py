"""Behind the endpoint: drawing, stopping, the experts of every token, and bundles that must not be
opened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fakes import flip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipeline.errors import DamagedArtifact, MismatchError, MissingArtifact
from pipeline.serve.app import create
from pipeline.serve.engine import CompletionEngine, expert_shares, names, top_expert
from pipeline.serve.generation import Prompt, Sampling, Token
from pipeline.serve.networks import UnmergedMixture
from pipeline.serve.text_stream import HELD_TOKENS, TextStream
from pipeline.store.artifacts import sha256
from tests import small
from tests.test_bundle import bundle_of
from tests.test_parity import made
from tests.test_serve import slowed

PROMPT = "3: tide reef"


@pytest.fixture(scope="module")
def engine(bundled):
    """The finished run's bundle, open."""
    torch.set_num_threads(1)
    return CompletionEngine(bundled[2])


def test_all_tokens_can_be_drawn_not_the_fifty_of_transformers(engine):
    ids = engine.encode("")
    drawn = {t.id for s in range(20) for t in engine.complete(ids, Sampling(1, 2.0, seed=s)).tokens}
    with torch.no_grad():
        likely = engine.model(input_ids=torch.tensor([ids])).logits[0, -1].topk(50).indices
    assert drawn - set(likely.tolist())


def test_the_end_token_ends_a_text(engine, monkeypatch):
    ids = engine.encode(PROMPT)
    free = engine.complete(ids, Sampling(6, 0.0))
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [999, free.tokens[2].id])
    at = [t.id for t in free.tokens].index(free.tokens[2].id)
    done = engine.complete(ids, Sampling(6, 0.0))
    assert (done.finish, done.completion_tokens, len(done.tokens)) == ("stop", at + 1, at)
    assert done.text == "".join(t.text for t in free.tokens[:at])


def test_time_ends_a_text_where_it_is_or_says_that_it_was_not_begun(engine):
    with pytest.raises(TimeoutError, match="before it was its turn"):
        engine.complete(engine.encode(""), Sampling(20, 0.0, seconds=0.0))
    with slowed(engine.model.base_model, 0.1):
        done = engine.complete(engine.encode(""), Sampling(20, 0.0, seconds=0.45))
    assert 1 <= done.completion_tokens < 6 and done.finish == "length"


def test_a_tokens_experts_are_those_that_spoke_it(engine):
    """A drawn token was chosen where the one before it was read, whatever the cache did since."""
    ids = engine.encode(PROMPT)
    done = engine.complete(ids, Sampling(8, 0.0))
    read = engine.trace([*ids, *(t.id for t in done.tokens)])
    places = read[len(ids) - 2 : len(ids) - 2 + 8]
    assert [t.experts for t in done.tokens] == [t.experts for t in places]
    for spoke, place in zip(done.tokens, places, strict=True):
        torch.testing.assert_close(
            torch.tensor(spoke.weights), torch.tensor(place.weights), rtol=0, atol=1e-4
        )


def test_shares_and_the_top_expert_by_hand():
    tokens = [
        Token(1, "a", [[0, 1], [2, 0]], [[0.9, 0.1], [0.6, 0.4]]),
        Token(2, "b", [[1, 2], [1, 0]], [[0.5, 0.5], [1.0, 0.0]]),
    ]
    assert [s["share"] for s in expert_shares(tokens, 4)] == [3 / 8, 3 / 8, 2 / 8, 0]
    assert [s["weight"] for s in expert_shares(tokens, 4)] == pytest.approx(
        [1.3 / 4, 1.6 / 4, 1.1 / 4, 0]
    )
    assert [top_expert(t) for t in tokens] == [0, 1]
    # a dense model's
    nobodys = [Token(3, "c", [], [])]
    assert top_expert(nobodys[0]) is None
    assert expert_shares(nobodys, 2) == expert_shares([], 2)
    assert expert_shares([], 2) == [{"share": 0.0, "weight": 0.0}] * 2


def shares(engine, ids: list[int]) -> list[str]:
    """Return each token's share of a text."""
    stream = TextStream(engine._decode)
    texts = [text for token in ids for text in stream.add(token)]
    return texts + stream.end()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_token_texts_of_any_text_are_that_text(text, engine):
    ids = engine.tokenizer.encode([text])[0].ids
    assert "".join(shares(engine, ids)) == text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ids=st.lists(st.integers(1, 299), max_size=HELD_TOKENS - 1))
def test_the_token_texts_of_any_tokens_are_what_they_say_together(ids, engine):
    texts = shares(engine, ids)
    assert "".join(texts) == engine._decode(ids) and len(texts) == len(ids)


def test_markup_in_a_prompt_is_plain_text(engine):
    assert 0 not in engine.encode("<|endoftext|>")[1:]
    assert engine._decode(engine.encode("<|endoftext|>")[1:]) == "<|endoftext|>"


def test_a_bundle_that_is_damaged_or_none_is_not_served(bundled, tmp_path):
    folder = shutil.copytree(bundled[2], tmp_path / "copy")
    flip(folder / "model-expert-001-shop.safetensors")
    with pytest.raises(DamagedArtifact, match="model-expert-001-shop"):
        CompletionEngine(folder)
    with pytest.raises(MissingArtifact, match="is not a bundle"):
        create(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1},
        {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    ids=str,
)
def test_a_checkpoint_that_computes_something_else_than_its_stack_is_not_served(
    change, bundled, tmp_path
):
    folder = shutil.copytree(bundled[2], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | change
    before = sha256(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config))
    sums = (folder / "SHA256SUMS").read_text().replace(before, sha256(folder / "config.json"))
    (folder / "SHA256SUMS").write_text(sums)
    with pytest.raises(MismatchError, match="gives other logits than its own stack"):
        CompletionEngine(folder)


KINDS = {
    "anchor kept, top-1": ("qwen3", {"trunk__anchor": "keep", "router__top_k": 1}),
    "gates alike": ("qwen3", {"router__init": "uniform", "router__steps": 0}),
    "mixtral": ("llama", {"trunk__anchor": "keep"}),
    "low rank": ("qwen3", {"expert__form": "low_rank"}),
    "low rank, last layer, anchor": (
        "llama",
        {"expert__form": "low_rank", "expert__layers": "last:1", "trunk__anchor": "keep"},
    ),
}


@pytest.mark.parametrize(("kind", "changes"), KINDS.values(), ids=KINDS)
def test_every_kind_of_bundle_opens_and_names_its_experts(kind, changes, tmp_path):
    cfg, parts = made(tmp_path, kind, False, **changes)
    folder = bundle_of(cfg, parts, tmp_path / "bundle")
    engine = CompletionEngine(folder)
    assert isinstance(engine.network, UnmergedMixture) == bool(cfg.expert.delta_rank)
    kept = ("anchor",) if cfg.trunk.anchor == "keep" else ()
    assert engine.experts == (*kept, *small.DOMAINS)
    tokens = engine.trace(engine.encode("w3 w20 w40"))
    assert [t.id for t in tokens] == [3, 20, 40]
    assert all(
        len(k) == cfg.router.top_k and max(k) < len(engine.experts)
        for t in tokens
        for k in t.experts
    )
    assert sum(s["share"] for s in expert_shares(tokens, len(engine.experts))) == pytest.approx(1)
    ids = engine.encode("w3")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out_BT = stock.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    said = [token.id for token in engine.complete(ids, Sampling(4, 0.0)).tokens]
    assert said == [token for token in out_BT[0, len(ids) :].tolist() if token]
    # the base reads where the bundle has it: kept as an expert, or what low-rank ones stand on
    assert ("base" in engine.readers) == bool(kept or cfg.expert.delta_rank)
    for reader in engine.readers:
        assert engine.submit(Prompt(tuple(ids), reader=reader), Sampling(4, 0.0)).wait()


@pytest.mark.parametrize("name", ["", " sea", "a\nb", "\u202eaes", "\x1b[2J", "x" * 201, 7, None])
def test_a_name_that_would_be_shown_as_another_is_refused(name):
    for described in (
        {"run": "r", "experts": [{"name": "sea"}, {"name": name}]},
        {"run": name, "experts": []},
    ):
        with pytest.raises(DamagedArtifact, match="for a name"):
            names(Path("b"), described)


def test_experts_have_names_of_their_own():
    of_run = {"run": "sea", "experts": [{"name": "sea"}, {"name": "Größe (2)"}]}
    assert names(Path("b"), of_run) == ["sea", "sea", "Größe (2)"]
    with pytest.raises(DamagedArtifact, match="two experts of one name"):
        names(Path("b"), {"run": "r", "experts": [{"name": "sea"}, {"name": "sea"}]})
