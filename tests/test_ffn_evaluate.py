"""The report's rows against stock transformers, and against each other."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models
from transformers import AutoModelForCausalLM

from pipeline.data.text import tokenizer
from pipeline.families.ffn_moe.evaluate import tables
from pipeline.families.ffn_moe.networks import soup
from pipeline.families.ffn_moe.parts import mixture_of, shards_of, token_loss
from pipeline.families.ffn_moe.speakers import spans
from pipeline.families.load import load
from pipeline.model.experts import clone
from pipeline.model.low_rank import LowRankExpert
from pipeline.model.router import UniformMixture
from pipeline.model.trunk import build
from pipeline.protocols import quiet
from pipeline.run.context import StoredParts
from pipeline.store.artifacts import Store
from tests import small
from tests.held import held_bytes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole small run with every dense baseline."""
    return small.trained(tmp_path_factory.mktemp("run") / "run")


def test_the_report_measures_what_the_settings_say(trained):
    cfg = small.config(dense__baselines=("total", "path", "ffn", "wide", "scratch"))
    report = tables(cfg, trained, quiet)
    rows = {row.name: row for row in report.quality}
    for item in cfg.dense.baselines:
        assert f"dense {item}" in rows
    stack = report.stack
    assert rows["dense wide"].active_parameters == stack.active_parameters
    assert (
        rows["oracle expert"].oracle_gain == pytest.approx(1.0)
        and rows["trunk + dummy"].oracle_gain == 0
    )
    assert [row.top_k for row in report.active] == [1, 2, 3]
    assert report.active[1].mean == pytest.approx(stack.mean, abs=1e-9)
    assert (
        stack.train_tokens == rows["dense total"].train_tokens == rows["dense scratch"].train_tokens
    )
    shares = report.routing.share
    assert all(sum(s) == pytest.approx(1) for s in shares.values()) and set(shares) == set(
        small.DOMAINS
    )


def test_an_experts_row_in_the_report_is_its_loss_in_a_plain_transformers_model(trained):
    """Bits per byte of one expert from AutoModel, whole held-out rows, windows as the report cuts
    them."""
    from transformers import AutoConfig

    report = tables(small.config(), trained, quiet)
    settings = json.loads((trained.folder("train_shared") / "trunk.json").read_text())
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings), dtype=torch.float32
    ).eval()
    tensors = {
        **trained.tensors("train_shared", "trunk.safetensors"),
        **trained.tensors("train_experts", "expert.safetensors", "beta"),
    }
    model.load_state_dict(tensors, strict=False)
    shards = shards_of(trained, trained.cfg.partition.names)
    starts, sizes = shards.documents("test", "gamma")
    starts = starts[: np.searchsorted(starts, 200, side="right")]
    stream = shards.stream("test", "gamma")[: starts[-1]].astype(np.int64)
    nats = 0.0
    for at in range(0, len(stream) - 1, small.CONTEXT):
        window = torch.from_numpy(stream[at : at + small.CONTEXT + 1])[None]
        with torch.no_grad():
            each = F.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:], reduction="none")
        nats += each[window[0, 1:] != shards.end_id].sum().item()
    wanted = nats / sizes[: len(starts) - 1].sum() / np.log(2)
    row = next(row for row in report.quality if row.name == "beta")
    assert row.bits_per_byte["gamma"] == pytest.approx(wanted, rel=1e-5)


def test_texts_go_on_as_stock_transformers_generates_them(finished):
    """The base's and the dense baseline's texts, from generate of plain models with their
    tensors."""
    from transformers import AutoConfig

    path, store = finished
    # both within the context, beyond which generate would look further back
    cfg = load(path, ("evaluate.continuation_tokens=12",))
    parts = StoredParts(cfg, Store(store).open())
    report = tables(cfg, parts, quiet)
    assert [text.domain for text in report.continuations] == list(report.domains)
    settings = json.loads((parts.folder("train_shared") / "trunk.json").read_text())
    words = tokenizer.load(parts.folder("tokenizer"))
    models = {
        "trunk + dummy": {
            **parts.tensors("train_shared", "trunk.safetensors"),
            **parts.tensors("train_shared", "dummy.safetensors"),
        },
        "dense total": parts.tensors("train_dense", "model.safetensors", "total"),
    }
    for name, tensors in models.items():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**settings), dtype=torch.float32
        ).eval()
        model.load_state_dict(tensors, strict=False)
        model.generation_config.pad_token_id = words.end_id
        for text in report.continuations:
            texts = dict(text.written)
            assert set(texts) == {*models, report.stack.name}
            (prompt,) = words.encode([text.prompt])
            ids = torch.tensor([[*words.lead, *prompt.ids]])
            out = model.generate(ids, max_new_tokens=12, do_sample=False)
            written = out[0, ids.shape[1] :].tolist()
            if words.end_id in written:
                written = written[: written.index(words.end_id)]
            assert words.model.decode(written) == texts[name]
            assert len(prompt.ids) == cfg.trunk.context_tokens // 2


def test_who_speaks_is_whom_the_gates_of_stock_transformers_choose(finished, bundled):
    """Of held-out texts by who reads each token, of the stack's own by who chose it."""
    path, store = finished
    cfg = load(path, ("evaluate.continuation_tokens=12", "evaluate.rivals=few"))
    parts = StoredParts(cfg, Store(store).open())
    report = tables(cfg, parts, quiet)
    model = AutoModelForCausalLM.from_pretrained(bundled[2], dtype=torch.float32).eval()
    shards = shards_of(parts, cfg.partition.names)
    lead = len(shards.lead)
    assert [each.domain for each in report.samples] == [d for d in shards.domains for _ in range(2)]
    for number, sample in enumerate(report.samples):
        starts, _ = shards.documents("test", sample.domain)
        stream = shards.stream("test", sample.domain).astype(np.int64)
        at = number % 2
        ids = torch.from_numpy(stream[starts[at] : starts[at + 1]][: cfg.trunk.context_tokens])
        said = chosen(model, ids, report.experts)[lead:]
        assert by_token(sample.spans) == said
        assert sample.goes_on == (starts[at + 1] - starts[at] > len(ids))
    words = tokenizer.load(parts.folder("tokenizer"))
    for text in report.continuations:
        written = dict(text.written)[report.stack.name]
        assert "".join(span.text for span in text.spans) == written
        prompt, own = words.encode([text.prompt, written])
        ids = torch.tensor([*words.lead, *prompt.ids, *own.ids])
        # a token is chosen where the one before it is read
        said = chosen(model, ids, report.experts)[lead + len(prompt.ids) - 1 : -1]
        assert by_token(text.spans) == said


def by_token(spans) -> list[str]:
    """Return the speaker of each token."""
    return [span.speaker for span in spans for _ in range(span.tokens)]


def chosen(model, ids, names) -> list[str]:
    """Return by token of a text the expert with the most weight over all layers of a stock
    model."""
    heard = []
    hooks = [
        module.register_forward_hook(lambda _gate, _inputs, out: heard.append(out))
        for name, module in model.named_modules()
        if name.endswith(".mlp.gate")
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    total_TE = torch.zeros(len(ids), len(names), dtype=torch.float64)
    for _, weight_TK, index_TK in heard:
        total_TE.scatter_add_(1, index_TK, weight_TK.double())
    return [names[number] for number in total_TE.argmax(1)]


def test_no_text_is_shown_where_none_is_asked_for(trained):
    report = tables(small.config(), trained, quiet)
    assert report.continuations == () and report.samples == ()


def test_a_character_of_two_speakers_is_the_last_ones_and_nothing_is_lost():
    words = tokenizer.train(270, ["a text"])
    (found,) = words.encode(["ab é 読 \n c"])
    for turn in (1, 2, 3):
        speakers = [f"s{i // turn % 2}" for i in range(len(found.ids))]
        told = spans(words, found.ids, speakers)
        assert "".join(span.text for span in told) == "ab é 読 \n c"
        assert by_token(told) == speakers
        assert "\ufffd" not in repr(told)


def test_a_text_that_goes_on_keeps_the_space_that_a_decoder_drops_in_front():
    words = ["▁the", "▁reef", "▁was", "ful"]
    model = Model(models.WordLevel({word: at for at, word in enumerate(words)}, words[0]))
    model.decoder = decoders.Metaspace()
    spaced = tokenizer.Tokenizer(model, words[0], {}, (), frozenset())
    assert spaced.decode([2, 1, 3], [0, 1]) == " was reefful"
    assert spaced.decode([2, 1, 3]) == "was reefful"
    told = spans(spaced, [2, 1, 3], ["a", "b", "a"], [0, 1])
    assert [span.text for span in told] == [" was", " reef", "ful"]


def test_few_rivals_leave_the_other_rows_and_their_figures_as_they_are(trained):
    whole = tables(small.config(), trained, quiet)
    few = tables(small.config(evaluate__rivals="few"), trained, quiet)
    kept = {row.name: row for row in whole.quality}
    names = [row.name for row in few.quality]
    assert few.quality == tuple(kept[name] for name in names)
    assert few.stack == whole.stack and few.opt_out == whole.opt_out
    # what is left out are ways to join the experts, none of them dense or an expert
    for name in kept.keys() - names:
        assert kept[name].kind in ("merge", "router")
    assert len(kept) - len(names) >= 5
    assert whole.active and not few.active


LAYERS, WIDTH, INNER = 8, 64, 192


def _experts(form: str, count: int):
    """Return a frozen random trunk, its dummy and so many experts on it, and one's bytes in
    fp32."""
    trunk, dummy = build(
        {
            "model_type": "qwen3",
            "vocab_size": 64,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": INNER,
        }
    )
    trunk.requires_grad_(False)
    dummy.requires_grad_(False)
    made = [LowRankExpert(dummy, 64, 1.0) if form == "low_rank" else clone(dummy)]
    made += [copy.deepcopy(made[0], {id(dummy): dummy}) for _ in range(count - 1)]
    one = sum(parameter.nbytes for parameter in made[0].parameters())
    return trunk, dummy, [expert.requires_grad_(False).eval() for expert in made], one


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_no_row_holds_more_than_two_experts_beyond_the_mapped_files(form, count, bf16):
    """Nor anything once its pass is over; least of all a copy of every expert in another dtype."""
    trunk, dummy, experts, one = _experts(form, count)
    weight_LED = torch.randn(LAYERS, count, WIDTH)
    rows = {
        "stack": mixture_of(experts, weight_LED, 2),
        "opt-out": mixture_of(experts[1:], weight_LED[:, 1:], 2),
        "soup": soup(experts),
        "uniform": UniformMixture(experts),
    }
    ids_BT = torch.randint(64, (1, 5))

    def run(ffn):
        token_loss(trunk, ffn, ids_BT, bf16)

    run(dummy)  # what only a first pass makes
    base = held_bytes(lambda: run(dummy))
    for name, ffn in rows.items():
        # Its first pass: a copy that is kept is made in that
        held = held_bytes(lambda ffn=ffn: run(ffn))
        assert max(held) - max(base) < 2 * one and held[-1] == 0, name
