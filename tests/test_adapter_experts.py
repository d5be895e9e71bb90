"""Adapters as experts of a language model: PEFT's own, one for a whole text, chosen by its first
tokens.

B texts, T tokens, V vocabulary, S layers that are read, D model width.
"""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from fakes import Killed, dying, train_io
from peft import PeftModel
from pydantic import ValidationError
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from pipeline.config.base import merge
from pipeline.errors import ConfigError, DamagedArtifact, MismatchError
from pipeline.families import ExportWish
from pipeline.families.adapters import peft_io
from pipeline.families.ffn_moe import family
from pipeline.families.ffn_moe.adapter.evaluate import stack_row, tables
from pipeline.families.ffn_moe.adapter.model import stored_adapters
from pipeline.families.ffn_moe.adapter.router import SETTINGS, TextRouter, general_domains
from pipeline.families.ffn_moe.adapter.stack import assemble
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.export.adapters import _where as layers_told
from pipeline.families.ffn_moe.parts import shards_of, stored_trunk, token_loss
from pipeline.families.ffn_moe.sections import BASE
from pipeline.model.language_model import filled, first_tokens, pieces
from pipeline.model.request_router import RequestRouter, fit_threshold
from pipeline.protocols import quiet
from pipeline.report import routing, show
from pipeline.report.format import share
from pipeline.run.dry_run import figures
from pipeline.serve.adapters import AdapterEngine, SteadyAdapters
from pipeline.serve.generation import Sampling
from pipeline.store.artifacts import load_tensors, sha256
from pipeline.train.loop import fit
from pipeline.train.lr_search import FOUND
from tests import small
from tests.small import stock
from tests.test_pins import saved

# peft asks transformers in a way that it is leaving
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TAUGHT = ("alpha", "beta")
PROMPT = 4
ADAPTER = {
    "expert": {"form": "adapter", "rank": 4, "alpha": 8.0, "domains": TAUGHT, "lr": 3e-2},
    "dense": {"baselines": ("path",)},
}


def config(**router) -> FfnMoeConfig:
    """Return a small run of adapters on two of three domains."""
    raw = merge(small.SETTINGS, ADAPTER) | {"router": {"prompt_tokens": PROMPT} | router}
    return FfnMoeConfig.model_validate(raw)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole small run of adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small.MAKERS, "train_experts", family.expert)
        cfg = config()
        parts = small.FolderParts(cfg, tmp_path_factory.mktemp("run"))
        small.write_shards(parts.root, cfg.partition.names)
        small.train(cfg, parts, "train_shared")
        parts.tasks = {}
        for name in TAUGHT:
            parts.tasks[name] = small.train(cfg, parts, "train_experts", name).task
        folder = parts.new("train_router")
        parts.metrics["train_router", None] = family.router(cfg, parts).write(folder)
        small.train(cfg, parts, "train_dense", "path")
        yield parts


@pytest.fixture(scope="module")
def stack(run):
    """Its stack."""
    return assemble(run.cfg, run)


def texts(count=12, tokens=small.CONTEXT + 1, seed=0) -> torch.Tensor:
    """Return ids_BT."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, small.VOCAB, (count, tokens), generator=draw)


def test_an_adapter_loads_in_stock_peft_on_the_stock_model(run, stack):
    ids_BT = texts()
    with torch.no_grad():
        plain_BTV = stock(run)(ids_BT).logits
        own_BTV = stack.model.hidden(ids_BT) @ stack.model.head.T
        torch.testing.assert_close(own_BTV, plain_BTV, rtol=0, atol=1e-5)
        for name in TAUGHT:
            folder = run.folder("train_experts", name) / "adapter"
            wanted_BTV = PeftModel.from_pretrained(stock(run), folder).eval()(ids_BT).logits
            own_BTV = stack.model.under(name).hidden(ids_BT) @ stack.model.head.T
            torch.testing.assert_close(own_BTV, wanted_BTV, rtol=0, atol=1e-5)
            assert (wanted_BTV - plain_BTV).abs().max() > 1e-2


def test_training_computes_what_pefts_own_forward_does(run):
    task = run.tasks["alpha"]
    ids_BT = task.batch(0, 4)
    folder = run.folder("train_experts", "alpha") / "adapter"
    model = PeftModel.from_pretrained(stock(run), folder, is_trainable=True)
    given_BT, next_BT = ids_BT[:, :-1], ids_BT[:, 1:].contiguous()
    wanted = model(input_ids=given_BT, labels=given_BT, shift_labels=next_BT).loss
    wanted.backward()
    for parameter in task.parameters.values():
        parameter.grad = None
        parameter.requires_grad_(True)
    found = task.loss(ids_BT)
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = 0
    for name, parameter in task.parameters.items():
        name = name.replace(f".{peft_io.peft_name('alpha')}.", ".default.")
        torch.testing.assert_close(parameter.grad, own[name], atol=1e-5, rtol=0)
        grads += bool(parameter.grad.any())
    assert grads == len(task.parameters) == 2 * 7 * 2


def test_only_the_adapter_moves(run):
    task = family.expert(run.cfg, run, "alpha")
    network = task.loss.__closure__
    inside = dict(zip(task.loss.__code__.co_freevars, network, strict=True))
    trunk = inside["trunk"].cell_contents
    own = {id(parameter) for parameter in task.parameters.values()}
    task.loss(task.batch(0, 2)).backward()
    for parameter in trunk.network.parameters():
        assert parameter.requires_grad == (id(parameter) in own)
        assert (parameter.grad is None) == (id(parameter) not in own)


@pytest.mark.parametrize("step", [1, 3])
def test_an_adapter_goes_on_after_a_kill_bit_for_bit(run, step, tmp_path):
    with pytest.raises(Killed):
        fit(dying(family.expert(run.cfg, run, "beta"), step), train_io(tmp_path))
    again = family.expert(run.cfg, run, "beta")
    fit(again, train_io(tmp_path))
    kept = again.export(0)[peft_io.TENSORS]
    stored = run.tensors("train_experts", peft_io.TENSORS, "beta")
    assert kept.keys() == stored.keys()
    assert all(torch.equal(kept[name], stored[name]) for name in stored)


def test_no_later_token_changes_a_choice(run, stack):
    ids_BT = texts(64)
    before_B = stack.choose(ids_BT)
    later_BT = ids_BT.clone()
    later_BT[:, PROMPT:] = texts(64, seed=1)[:, PROMPT:]
    assert torch.equal(stack.choose(later_BT), before_B)
    # and the first tokens do: every choice is made of some text
    assert len(before_B.unique()) > 1
    nats_BT = stack.token_loss(ids_BT)
    for at in range(1, ids_BT.shape[1] - 1):
        changed_BT = ids_BT.clone()
        changed_BT[:, at + 1 :] = texts(64, seed=2)[:, at + 1 :]
        same_BT = stack.token_loss(changed_BT)[:, :at]
        torch.testing.assert_close(same_BT, nats_BT[:, :at], rtol=0, atol=1e-5)


def test_the_first_tokens_are_the_bases_and_the_rest_the_chosen_ones(run, stack):
    ids_BT = texts(32)
    index_B = stack.choose(ids_BT)
    found_BT = stack.token_loss(ids_BT)
    for row, number in enumerate(index_B.tolist()):
        one_BT = ids_BT[row : row + 1]
        base_BT = token_loss(stack.model, filled, one_BT, False)
        own_BT = token_loss(stack.reader(number), filled, one_BT, False)
        wanted_T = torch.cat([base_BT[0, : PROMPT - 1], own_BT[0, PROMPT - 1 :]])
        torch.testing.assert_close(found_BT[row], wanted_T, rtol=0, atol=1e-5)
        assert stack.choice(one_BT[0].tolist()).name == stack.names[number]


def test_the_base_reads_what_no_expert_is_sure_of(run, stack):
    ids_BT = texts(32)
    sure = replace(stack.text_router.router, threshold=1.0)
    strict = replace(stack, text_router=replace(stack.text_router, router=sure))
    assert strict.choose(ids_BT).unique().tolist() == [len(TAUGHT)]
    base_BT = token_loss(stack.model, filled, ids_BT, False)
    torch.testing.assert_close(strict.token_loss(ids_BT), base_BT, rtol=0, atol=1e-6)
    p_BC = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.45, 0.4, 0.15]])
    router = RequestRouter(torch.zeros(1, 3, 2), 2, threshold=0.5)
    assert router.decide(p_BC).tolist() == [0, 2, 2]
    assert replace(router, threshold=0.0).decide(p_BC).tolist() == [0, 2, 0]
    assert router.decide(p_BC[:, :2]).tolist() == [0, 2, 2]


def test_the_threshold_is_that_with_the_least_loss():
    # two texts are their expert's own and gain from it, the least sure one loses
    p_BC = torch.tensor([[0.92, 0.08], [0.9, 0.1], [0.65, 0.35]], dtype=torch.float64)
    loss_BE = torch.tensor([[1.0, 9, 3], [1, 9, 3], [5, 9, 3]], dtype=torch.float64)
    router = RequestRouter(torch.zeros(1, 2, 2), 2)
    assert fit_threshold(router, p_BC, loss_BE) == 0.7
    loss_BE[2, 0] = 1
    assert fit_threshold(router, p_BC, loss_BE) == 0.0


def test_first_tokens_and_pieces_are_means_without_the_first_token():
    x_BTSD = torch.arange(2 * 9 * 1 * 3, dtype=torch.float32).view(2, 9, 1, 3)
    torch.testing.assert_close(first_tokens(x_BTSD, 4), x_BTSD[:, 1:4].mean(1))
    torch.testing.assert_close(first_tokens(x_BTSD[:, :1], 4), x_BTSD[:, 0])
    wanted = torch.stack([x_BTSD[b, at : at + 4].mean(0) for b in (0, 1) for at in (1, 5)])
    torch.testing.assert_close(pieces(x_BTSD, 4), wanted)
    assert len(pieces(x_BTSD, 16)) == 2


@pytest.fixture(scope="module")
def report(run):
    """The run's report."""
    return tables(run.cfg, run, quiet)


def test_the_reports_rows_are_what_the_stack_computes(run, stack, report):
    rows = {row.name: row for row in report.quality}
    assert list(rows) == [
        BASE,
        *TAUGHT,
        "dense path",
        "random adapter for each text",
        "centroid from 4 tokens",
        "ridge from 4 tokens, never the base",
        "posterior ensemble",
        stack_row(run.cfg),
        "oracle expert",
    ]
    assert [row.name for row in report.quality if row.is_stack] == [stack_row(run.cfg)]
    adapter = sum(p.numel() for p in run.tasks["alpha"].parameters.values())
    sizes = [(run.path("train_experts", name) / peft_io.TENSORS).stat().st_size for name in TAUGHT]
    assert report.model.expert_bytes == max(sizes)
    base = rows[BASE]
    assert rows["alpha"].active_parameters - base.active_parameters == adapter
    assert rows[stack_row(run.cfg)].total_parameters - base.total_parameters == 2 * adapter
    # the base is trunk and dummy, as any run of FFN experts has them
    trunk, dummy = stored_trunk(run.cfg, run)
    shards = shards_of(run, run.cfg.partition.names)
    for domain in shards.domains:
        starts_n, bytes_n = shards.documents("test", domain)
        stream = torch.from_numpy(shards.stream("test", domain).astype(np.int64))
        nats = {}
        for name, model in ((BASE, None), *((name, name) for name in TAUGHT)):
            nats[name] = _stream_nats(stack.model.under(model), stream, small.CONTEXT)
        torch.testing.assert_close(nats[BASE], _stream_nats(trunk, stream, small.CONTEXT, dummy))
        total = 0.0
        chosen = [0, 0, 0]
        for start, end in pairwise(starts_n):
            number = stack.choose(stream[None, start:end]).item()
            chosen[number] += 1
            split = min(end, start + PROMPT)
            own = nats[BASE] if number == len(TAUGHT) else nats[TAUGHT[number]]
            total += nats[BASE][start + 1 : split].sum() + own[split:end].sum()
        found = rows[stack_row(run.cfg)].bits_per_byte[domain]
        assert found == pytest.approx(total.item() / bytes_n.sum() / np.log(2), rel=1e-4)
        assert report.text_routing.texts[domain] == tuple(chosen)


def _stream_nats(trunk, stream, context, ffn=filled) -> torch.Tensor:
    """Return nats_T of a stream in windows that follow each other."""
    out = torch.zeros(len(stream))
    for at in range(0, len(stream) - 1, context):
        ids_BT = stream[None, at : at + context + 1]
        out[at + 1 : at + context + 1] = token_loss(trunk, ffn, ids_BT, False)[0]
    return out


def test_the_report_tells_where_texts_go(run, report):
    routing = report.text_routing
    assert routing.choices == (*TAUGHT, BASE)
    assert [sum(counts) for counts in routing.texts.values()] == [8, 8, 8]
    assert routing.agreement_by_domain["alpha"] == routing.texts["alpha"][0] / 8
    assert [row.prompt_tokens for row in routing.prompts] == [PROMPT]
    assert routing.prompts[0].base_share == routing.texts["gamma"][2] / 8
    console = Console(record=True, width=200)
    show(report, console)
    printed = console.export_text()
    for counts in routing.texts.values():
        # domain by domain, how many texts each choice has
        row = r"\s+".join(re.escape(str(count)) for count in counts)
        assert re.search(rf"\b{row}\b", printed), counts
    assert share(routing.prompts[0].base_share, 1) in printed
    assert report.matrix.rows == (BASE, *TAUGHT, "stack")
    assert [row.removed for row in report.opt_out] == list(TAUGHT)
    for row in report.opt_out:
        assert row.ratio.keys() == set(small.DOMAINS)
    assert {win.against for win in report.wins} >= {BASE, "dense path"}
    assert [criterion.name for criterion in report.criteria] == ["primary, dense path", "tertiary"]


def test_general_text_is_the_bases_class_and_a_router_without_it_has_none(run, tmp_path):
    assert general_domains(run.cfg) == ("gamma",)
    stored = run.tensors("train_router", "router.safetensors")["weight"]
    assert stored.shape == (1, 3, 16)
    raw = merge(small.SETTINGS, ADAPTER) | {"router": {"prompt_tokens": PROMPT}}
    only = FfnMoeConfig.model_validate(merge(raw, {"trunk": {"domains": TAUGHT}}))
    family.router(only, run).write(tmp_path)
    assert json.loads((tmp_path / SETTINGS).read_text())["base_class"] is False


def test_a_router_without_training_is_told_as_such_when_the_run_is_done(run):
    told = figures(run.metrics["train_router", None])
    assert told.startswith("no training, valid ") and told.endswith("nats")


def test_prompt_tokens_and_threshold_reach_the_router(run, tmp_path):
    cfg = config(prompt_tokens=6, threshold=0.9)
    family.router(cfg, run).write(tmp_path)
    written = json.loads((tmp_path / SETTINGS).read_text())
    assert (written["prompt_tokens"], written["threshold"]) == (6, 0.9)
    kept = json.loads((run.folder("train_router") / SETTINGS).read_text())
    assert kept["prompt_tokens"] == PROMPT and kept["threshold"] != 0.9
    weight_SCD = run.tensors("train_router", "router.safetensors")["weight"]
    ids_BT = texts(64)
    base = stored_adapters(run.cfg, run)
    longer = TextRouter.read(tmp_path / SETTINGS, weight_SCD, TAUGHT)
    assert longer.features(base, ids_BT, False).shape == (64, 1, 16)
    short = replace(longer, prompt_tokens=PROMPT).features(base, ids_BT, False)
    assert not torch.equal(longer.features(base, ids_BT, False), short)


REFUSED = {
    "expert.coordinate": {"expert": {"coordinate": True}},
    "expert.statistics_path": {"expert": {"statistics_path": "base"}},
    "expert.init": {"expert": {"init": "fresh"}},
    "trunk.anchor": {"trunk": {"anchor": "keep"}},
    "router.steps": {"router": {"steps": 3}},
    "router.top_k": {"router": {"top_k": 2}},
    "router.balance": {"router": {"balance": "aux"}},
    "router.prompt_tokens": {"router": {"prompt_tokens": 99}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_beside_adapters_is_refused_by_name(name):
    raw = merge(small.SETTINGS, ADAPTER) | {"router": {"prompt_tokens": PROMPT}}
    FfnMoeConfig.model_validate(raw)
    with pytest.raises(ValidationError, match=name):
        FfnMoeConfig.model_validate(merge(raw, REFUSED[name]))


def test_a_run_of_adapters_reads_back_as_it_was_dumped():
    cfg = config()
    assert (cfg.router.steps, cfg.router.top_k) == (0, 1)
    assert FfnMoeConfig.model_validate(cfg.model_dump(mode="json")) == cfg


@pytest.fixture(scope="module")
def bundled(run, report, tmp_path_factory):
    """Its bundle."""
    root = run.root
    words = {f"w{i}": i for i in range(small.VOCAB)}
    model = Tokenizer(models.WordLevel(words, unk_token="w1"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(root / "tokenizer" / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0"}
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about))
    run.new("evaluate")
    (root / "evaluate" / "report.json").write_text(report.to_json())
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    folder.mkdir()
    family.bundle(run.cfg, run, folder, quiet)
    return folder


def test_a_bundle_loads_in_stock_tools_and_is_the_stack_again(bundled, run, stack):
    again = family.reassemble(bundled)
    ids_BT = texts(32)
    assert torch.equal(again.choose(ids_BT), stack.choose(ids_BT))
    torch.testing.assert_close(again.token_loss(ids_BT), stack.token_loss(ids_BT))
    base = AutoModelForCausalLM.from_pretrained(bundled)
    adapted = PeftModel.from_pretrained(base, bundled / "adapters" / "beta" / "adapter").eval()
    with torch.no_grad():
        own_BTV = stack.model.under("beta").hidden(ids_BT) @ stack.model.head.T
        torch.testing.assert_close(adapted(ids_BT).logits, own_BTV, rtol=0, atol=1e-5)


def test_the_endpoint_lets_the_chosen_adapter_speak(bundled, stack):
    engine = AdapterEngine(bundled)
    assert engine.experts == (*TAUGHT, BASE)
    readers = set()
    for row in range(12):
        words = " ".join(f"w{token}" for token in texts()[row, :3].tolist())
        ids = engine.encode(words)
        choice = stack.choice(ids)
        readers.add(choice.number)
        assert [token.experts for token in engine.trace(ids)] == [((choice.number,),)] * 3
        done = engine.complete(ids, Sampling(4, 0.0))
        wanted_BT = torch.tensor([ids])
        with torch.no_grad():
            for _ in range(4):
                h_BTD = stack.reader(choice.number).hidden(wanted_BT)
                following = (h_BTD[:, -1] @ stack.model.head.T).argmax(-1, keepdim=True)
                wanted_BT = torch.cat([wanted_BT, following], 1)
        wanted = wanted_BT[0, len(ids) :].tolist()
        if 0 in wanted:
            wanted = wanted[: wanted.index(0)]
        assert [token.id for token in done.tokens] == wanted
        assert all(token.experts == ((choice.number,),) for token in done.tokens)
    assert len(readers) > 1
    steady = AdapterEngine(bundled, dtype="bf16")
    assert isinstance(steady.network, SteadyAdapters)
    assert steady.complete(ids, Sampling(4, 0.0)).completion_tokens == done.completion_tokens


def test_texts_go_on_as_the_base_and_whoever_the_endpoint_chooses_write_them(run, bundled):
    written_tokens = 3  # within the context, beyond which generate would look further back
    asked = {"continuation_tokens": written_tokens, "samples": 2}
    evaluate = run.cfg.evaluate.model_copy(update=asked)
    report = tables(run.cfg.model_copy(update={"evaluate": evaluate}), run, quiet)
    found = report.continuations
    assert [text.domain for text in found] == list(small.DOMAINS)
    # one reader of a whole text
    assert [len(each.spans) for each in report.samples] == [1] * len(report.samples)
    engine = AdapterEngine(bundled)
    model = stock(run)
    model.generation_config.pad_token_id = 0
    for text in found:
        own = dict(text.written)
        assert list(own) == [BASE, "dense path", stack_row(run.cfg)]
        ids = engine.encode(text.prompt)
        served = engine.complete(ids, Sampling(written_tokens, 0.0)).tokens
        out = model.generate(torch.tensor([ids]), max_new_tokens=written_tokens, do_sample=False)
        written = {stack_row(run.cfg): [token.id for token in served]}
        written[BASE] = out[0, len(ids) :].tolist()
        for name, tokens in written.items():
            tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
            assert own[name].split() == [f"w{token}" for token in tokens]
        (reader,) = {token.experts[0][0] for token in engine.trace(ids)}
        assert {span.speaker for span in text.spans} <= {engine.experts[reader]}
    for sample in report.samples:
        ids = engine.encode(sample.spans[0].text)
        assert sample.spans[0].tokens == len(ids) - len(engine.start_ids)
        # the report reads documents in pieces, which the endpoint's context holds one of
        read = engine.trace(ids[: engine.context_tokens])
        assert sample.spans[0].speaker == engine.experts[read[0].experts[0][0]]


def test_the_report_tells_the_rates_that_were_searched_for_adapters(run):
    searched = run.path("lr_experts")
    searched.mkdir(exist_ok=True)
    tried = []
    for lr, nats in ((0.01, 2.5), (0.003, 2.75)):
        tried.append({"lr": lr, "valid_nats": nats, "train_nats": nats})
    told = {"lr": 0.01, "steps": 2, "before_nats": 3.0, "tried": tried}
    (searched / FOUND).write_text(json.dumps(told))
    expert = run.cfg.expert.model_copy(update={"lr": "auto"})
    dense = run.cfg.dense.model_copy(update={"lr": 1e-2})
    cfg = run.cfg.model_copy(update={"expert": expert, "dense": dense})
    (search,) = tables(cfg, run, quiet).rates
    assert search.job == "lr_experts"
    assert (search.lr, search.steps, [each.nats for each in search.tried]) == (0.01, 2, [2.5, 2.75])


def test_adapters_are_exported_as_they_are_and_nothing_else_is(run, bundled, stack, tmp_path):
    wish = ExportWish(format="adapters")
    family.export(run.cfg, run, wish, tmp_path, quiet)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapters" / "alpha").eval()
    ids_BT = texts()
    with torch.no_grad():
        own_BTV = stack.model.under("alpha").hidden(ids_BT) @ stack.model.head.T
        torch.testing.assert_close(adapted(ids_BT).logits, own_BTV, rtol=0, atol=1e-5)
    assert "on all linear layers of" in (tmp_path / "README.md").read_text()
    expert = run.cfg.expert.model_copy(update={"layers": (1,)})
    assert layers_told(run.cfg.model_copy(update={"expert": expert})) == "linear layers"
    with pytest.raises(ConfigError, match="export them with --format adapters"):
        family.check_export(run.cfg, ExportWish(format="hf"))


def test_one_adapter_is_exported_merged_into_the_trunk(run, bundled, stack, tmp_path):
    family.export(run.cfg, run, ExportWish(format="expert", expert="beta"), tmp_path, quiet)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids_BT = texts()
    with torch.no_grad():
        own_BTV = stack.model.under("beta").hidden(ids_BT) @ stack.model.head.T
        base_BTV = stack.model.under(None).hidden(ids_BT) @ stack.model.head.T
        torch.testing.assert_close(merged(ids_BT).logits, own_BTV, rtol=0, atol=1e-5)
    assert (own_BTV - base_BTV).abs().max() > 1e-3


def test_adapters_stand_on_a_pinned_model_in_its_own_dtype(tmp_path, monkeypatch):
    monkeypatch.setitem(small.MAKERS, "train_experts", family.expert)
    source = saved(tmp_path / "model")
    pin = {"init": str(source), "steps": 0}
    raw = merge(small.SETTINGS, ADAPTER) | {"router": {"prompt_tokens": PROMPT}}
    raw = merge(raw, {"trunk": pin, "expert": {"layers": [1], "domains": ["beta"]}})
    cfg = FfnMoeConfig.model_validate(raw)
    parts = small.FolderParts(cfg, tmp_path / "run")
    small.write_shards(parts.root, cfg.partition.names)
    small.train(cfg, parts, "train_shared")
    small.train(cfg, parts, "train_experts", "beta")
    family.router(cfg, parts).write(parts.new("train_router"))
    own = assemble(cfg, parts).model.under("beta")
    assert own.network.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    stored = parts.folder("train_experts", "beta") / "adapter"
    assert all(".layers.1." in name for name in load_tensors(stored / "adapter_model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, stored).eval()
    ids_BT = texts()
    with torch.no_grad():
        own_BTV = own.hidden(ids_BT) @ own.head.float().T
        torch.testing.assert_close(own_BTV, wanted(ids_BT).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", ["router/router.json", "adapters/alpha/adapter.json"])
def test_a_bundle_whose_parts_are_not_of_one_stack_is_not_served(file, bundled, tmp_path):
    folder = shutil.copytree(bundled, tmp_path / "copy")
    before = sha256(folder / file)
    raw = json.loads((folder / file).read_text())
    raw |= {"experts": ["beta", "alpha"]} if "experts" in raw else {"pin": "0" * 64}
    (folder / file).write_text(json.dumps(raw))
    sums = (folder / "SHA256SUMS").read_text().replace(before, sha256(folder / file))
    (folder / "SHA256SUMS").write_text(sums)
    with pytest.raises((DamagedArtifact, MismatchError)):
        AdapterEngine(folder)


def test_the_cards_tables_and_example_are_of_adapters(bundled, report):
    card = (bundled / "README.md").read_text()
    assert '"adapters/alpha/adapter"' in card and "Where texts go" in card
    assert "library_name: peft" in card
    assert [row.name for row in routing.texts(report).rows] == list(small.DOMAINS)
    assert [row.name for row in routing.prompts(report).rows] == [str(PROMPT)]
    page = (bundled / "report.html").read_text()
    assert "Where texts go" in page and "First tokens that choose" in page
    assert "Where tokens go" not in page


def test_an_adapter_takes_less_than_all_and_plan_tells_its_numbers():
    adapter = config()
    found = family.cost(adapter, "train_experts", "alpha", {}, False)
    assert found.parameters == 2 * 4 * (4 * 16 + 2 * 16 + 2 * 8 + 3 * (16 + 24))
    assert family.cost(adapter, "train_router", None, {}, False) is None
    some = config()
    some = some.model_copy(update={"expert": some.expert.model_copy(update={"layers": (1,)})})
    half = family.cost(some, "train_experts", "alpha", {}, False)
    assert half.parameters * 2 == found.parameters
