"""What is exported computes what the run computes: in transformers' own classes, and in llama.cpp.

B sequences, T tokens, V vocabulary.
"""

import json
import math
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import xllamacpp
from conftest import documents
from fakes import FolderParts
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data.text.tokenizer import Tokenizer, train
from pipeline.errors import ConfigError
from pipeline.families import ExportWish
from pipeline.families.ffn_moe.bundle import bundle as bundle_of_run
from pipeline.families.ffn_moe.export.cost import STOCK_BYTES
from pipeline.families.ffn_moe.export.formats import check, export
from pipeline.families.ffn_moe.parts import stored_experts, stored_trunk
from pipeline.families.ffn_moe.stack import assemble
from pipeline.families.ffn_moe.stock import run_tokenizer
from pipeline.model.experts import from_tensors
from pipeline.model.low_rank import average
from pipeline.protocols import quiet
from pipeline.store import bundle
from pipeline.store.artifacts import load_tensors
from tests import small
from tests.cards import example_of, printed
from tests.held import held_bytes
from tests.small_reports import language_report, quality_row
from tests.test_trunk import whole
from tests.written import planned, weight_bytes

TEXTS = [text for domain in ("sea", "shop", "hall") for text in documents(domain, 20)]
DOMAINS = {3: small.DOMAINS, 5: ("a", "b", "c", "d", "e")}
EXACT = 1e-5
RELATIVE = 1e-3  # of perplexity, against llama.cpp


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE as a run trains one."""
    return train(300, TEXTS)


def made(root: Path, tokenizer: Tokenizer, kind: str, tied: bool, experts: int = 3, **given):
    """Return configuration and parts of a whole run with a tokenizer that texts can be put to,
    on a trunk of one kind: new (qwen3) or from a checkpoint."""
    changes = {"trunk__tie_embeddings": tied, "partition__domains": DOMAINS[experts]}
    changes |= {"trunk__context_tokens": 48}
    if kind != "qwen3":
        sizes = {"tie_word_embeddings": tied, "vocab_size": tokenizer.vocab_size}
        model = whole(kind, max_position_embeddings=64, **sizes)
        # A trunk of 0 steps is a pin of these files, in the dtype that they have
        model.to(given.pop("stored", torch.float32)).save_pretrained(root / "checkpoint")
        tokenizer.save(root / "checkpoint")
        changes |= {
            "trunk__init": str(root / "checkpoint"),
            "tokenizer__pretrained": str(root / "checkpoint"),
        }
    cfg = small.config(**changes, **given)
    parts = FolderParts(cfg, root / "run")
    small.write_shards(parts.root, cfg.partition.names, vocab_size=tokenizer.vocab_size)
    tokenizer.save(parts.folder("tokenizer"))
    small.train(cfg, parts, "train_shared")
    for name in cfg.experts:
        small.train(cfg, parts, "train_experts", name)
    small.train(cfg, parts, "train_router")
    return cfg, parts


def exported(cfg, parts, folder: Path, **wish) -> Path:
    """Return a folder with an export, of as many bytes as a plan says."""
    folder.mkdir()
    export(cfg, parts, ExportWish(**wish), folder, quiet)
    bundle.verify(folder)
    found = planned(cfg, ExportWish(**wish), run_tokenizer(parts).vocab_size)
    assert weight_bytes(folder) == pytest.approx(found.written_bytes, rel=0.05)
    return folder


def logits_of(trunk, ffn, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return logits_BTV of our own network."""
    with torch.no_grad():
        return trunk.hidden(ids_BT, ffn) @ trunk.head.T.float()


def ours(cfg, parts, which: str):
    """Return trunk and network of what was exported."""
    trunk, dummy = stored_trunk(cfg, parts)
    experts = dict(stored_experts(cfg, parts, dummy))
    if which == "dense":
        return trunk, average([experts[name] for name in cfg.experts])
    if which == "stack":
        stack = assemble(cfg, parts)
        return stack.trunk, stack.mixture
    return trunk, dummy if which == "anchor" else experts[which]


class Llama:
    """llama.cpp with one model loaded."""

    def __init__(self, file: Path):
        given = xllamacpp.CommonParams()
        given.model.path = str(file)
        given.n_ctx = 256
        given.n_parallel = 1
        given.cpuparams.n_threads = 1
        given.warmup = given.fit_params = False
        given.verbosity = -1
        # its caches round to fp16 otherwise
        given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(given)

    def ask(self, path: str, **body) -> dict:
        """Return the answer to a request."""
        return httpx.post(self.server.listening_address + path, json=body).json()

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, with what is put in front of it."""
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

    def nats(self, ids: list[int]) -> list[float]:
        """Return what each token after the first costs."""
        out = []
        for at in range(1, len(ids)):
            # the bias makes it take the token; what it tells is the model's own
            found = self.ask(
                "/completion",
                prompt=ids[:at],
                n_predict=1,
                n_probs=1,
                temperature=0,
                logit_bias=[[ids[at], 1e9]],
                return_tokens=True,
            )
            assert found["tokens"] == [ids[at]]
            out.append(-found["completion_probabilities"][0]["logprob"])
        return out

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Return what the model goes on with."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True}
        return self.ask("/completion", **body, ignore_eos=True)["tokens"]


def perplexity(nats) -> float:
    """Return the perplexity of tokens."""
    return math.exp(sum(nats) / len(nats))


def same_in_llama(file: Path, folder: Path, text: str) -> None:
    """Compare a GGUF file with the same model in transformers."""
    llama = Llama(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text).input_ids
    assert llama.ids(text) == ids
    ids = ids[:20]
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0]
        wanted = model.generate(
            torch.tensor([ids[:8]]), min_new_tokens=8, max_new_tokens=8, do_sample=False
        )
    nats_T = -logits_TV.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    found = perplexity(llama.nats(ids))
    assert found == pytest.approx(perplexity(nats_T.tolist()), rel=RELATIVE)
    assert llama.greedy(ids[:8], 8) == wanted[0, 8:].tolist()


LOW_RANK = {"expert__form": "low_rank", "expert__rank": 3, "expert__lr": 0.1}
PINNED = {"trunk__steps": 0, "stored": torch.bfloat16}
CASES = {
    "qwen3, tied, low rank, last layer": (
        "qwen3",
        True,
        3,
        LOW_RANK | {"expert__layers": "last:1", "trunk__anchor": "keep"},
    ),
    "qwen3, untied, five, anchor, wide heads": (
        "qwen3",
        False,
        5,
        {"trunk__anchor": "keep", "trunk__head_dim": 12},
    ),
    "llama, untied, five, low rank, pinned bf16": (
        "llama",
        False,
        5,
        LOW_RANK | {"expert__alpha": 5.0} | PINNED,
    ),
    "mistral, tied, first layer": (
        "mistral",
        True,
        3,
        {"router__top_k": 1, "expert__layers": [0], "expert__lr": 0.1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_format_computes_what_the_run_computes(case, tokenizer, tmp_path):
    kind, tied, experts, changes = CASES[case]
    cfg, parts = made(tmp_path, tokenizer, kind, tied, experts, **changes)
    first = cfg.experts[0]
    wishes = {
        first: {"format": "expert", "expert": first},
        "anchor": {"format": "expert", "expert": "anchor"},
        "dense": {"format": "dense"},
        "stack": {"format": "hf", "dtype": "fp32"},
    }
    in_gguf = {
        first: {"expert": first},
        "anchor": {"expert": "anchor"},
        "dense": {"dense": True},
        "stack": {},
    }
    if case != next(iter(CASES)):
        # The rest is alike, and each is written twice
        del wishes["anchor"], wishes["dense"]
    # llama.cpp would compute in bf16 with what is stored so
    exact = {"dtype": "fp32"}
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 16))
    found = []
    for which, wish in wishes.items():
        folder = exported(cfg, parts, tmp_path / f"stock-{which}", **wish | exact)
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
        with torch.no_grad():
            logits_BTV = model.eval()(ids_BT).logits
        wanted = logits_of(*ours(cfg, parts, which), ids_BT)
        torch.testing.assert_close(logits_BTV, wanted, rtol=0, atol=EXACT)
        assert wanted.std() > 0.1
        if which == "stack" and cfg.expert.layers == "last:1":
            assert model.config.mlp_only_layers == [0], "and no copies of the base's network"
        for other in found:
            assert (wanted - other).abs().max() > 100 * EXACT, "each network is another"
        found.append(wanted)
        gguf = exported(
            cfg, parts, tmp_path / f"gguf-{which}", format="gguf", **in_gguf[which], **exact
        )
        (file,) = gguf.glob("*.gguf")
        same_in_llama(file, folder, TEXTS[0])


@pytest.fixture(scope="module")
def small_run(tokenizer, tmp_path_factory):
    """(configuration, parts) of a run with a report; read it, never change it."""
    root = tmp_path_factory.mktemp("run")
    cfg, parts = made(root, tokenizer, "qwen3", True, trunk__d_model=32, trunk__d_ff=32)
    parts.new("evaluate")
    rows = [quality_row("alpha", "expert", 2.0), quality_row("weight soup", "merge", 1.5)]
    report = language_report(quality=rows)
    (parts.path("evaluate") / "report.json").write_text(report.to_json())
    return cfg, parts


def test_the_example_of_a_bundles_card_runs_as_it_stands(small_run, tmp_path):
    cfg, parts = small_run
    (tmp_path / "bundle").mkdir()
    bundle_of_run(cfg, parts, tmp_path / "bundle", quiet)
    text = printed(tmp_path / "bundle")
    assert text.startswith("Once upon a time") and len(text) > 30
    assert example_of(tmp_path / "bundle") == example_of(
        exported(cfg, parts, tmp_path / "dense", format="dense")
    )


def test_the_example_of_a_gguf_files_card_runs_as_it_stands(small_run, tmp_path, monkeypatch):
    def on_one_thread(made=xllamacpp.CommonParams):
        # Threads that outnumber the free cores wait for each other for seconds
        settings = made()
        settings.cpuparams.n_threads, settings.verbosity = 1, -1
        return settings

    monkeypatch.setattr(xllamacpp, "CommonParams", on_one_thread)
    folder = exported(*small_run, tmp_path / "gguf", format="gguf", dtype="q8_0")
    text = printed(folder)
    card = (folder / "README.md").read_text()
    assert len(text) > 10
    assert "A mixture of 3 experts, 2 of them active per token, as a GGUF file of q8_0" in card


def test_a_card_says_where_it_is_from_and_how_good_the_row_is(small_run, tmp_path):
    cfg, parts = small_run
    folder = exported(cfg, parts, tmp_path / "one", format="expert", expert="alpha")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert "`Qwen3ForCausalLM` in float32" in card.text
    address = parts.manifest("train_experts", "alpha").address
    assert f"| expert alpha | `{address}` |" in card.text
    assert "What this is, is the row alpha." in card.text and "2.000" in card.text


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_low_rank_experts_are_adapters_that_peft_puts_on_the_trunk(tokenizer, tmp_path):
    changes = LOW_RANK | {"expert__layers": "last:1", "expert__alpha": 5.0}
    cfg, parts = made(tmp_path, tokenizer, "llama", False, **changes)
    folder = exported(cfg, parts, tmp_path / "out", format="adapters")
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 16))
    for name in cfg.experts:
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, folder / "adapters" / name)
        with torch.no_grad():
            found = model.eval()(ids_BT).logits
        wanted = logits_of(*ours(cfg, parts, name), ids_BT)
        torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)
        assert (wanted - logits_of(*ours(cfg, parts, "anchor"), ids_BT)).abs().max() > 0.01
    assert printed(folder).startswith("Once upon a time")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_full_experts_are_compressed_to_the_nearest_adapters_of_a_rank(tokenizer, tmp_path):
    """Against numpy's singular values, and what PEFT computes against the merged matrices."""
    changes = {"expert__layers": "last:1", "expert__lr": 0.1, "trunk__anchor": "keep"}
    cfg, parts = made(tmp_path, tokenizer, "llama", True, **changes, **PINNED)
    said = []
    (tmp_path / "out").mkdir()
    wish = ExportWish("adapters", expert="beta", rank=2)
    export(cfg, parts, wish, tmp_path / "out", lambda text, _share: said.append(text))
    bundle.verify(tmp_path / "out")
    told_bytes = planned(cfg, wish, tokenizer.vocab_size).written_bytes
    assert weight_bytes(tmp_path / "out") == pytest.approx(told_bytes, rel=0.05)
    assert [path.name for path in (tmp_path / "out" / "adapters").iterdir()] == ["beta"]
    trunk, dummy = stored_trunk(cfg, parts)
    stored = parts.tensors("train_experts", "expert.safetensors", "beta")
    nearest, kept, whole_change = {}, 0.0, 0.0
    for name, tensor in stored.items():
        start = dummy.named()[name].detach().float()
        u, s, v = np.linalg.svd((tensor - start).numpy(), full_matrices=False)
        nearest[name] = start + torch.from_numpy(u[:, :2] * s[:2] @ v[:2])
        kept, whole_change = kept + (s[:2] ** 2).sum(), whole_change + (s**2).sum()
    assert 0.1 < kept / whole_change < 0.99
    told = f"Rank 2 keeps {kept / whole_change:.0%} of the squared change that the expert beta"
    assert any(text.startswith(told) for text in said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert told in card and "1 expert as PEFT adapters of rank 2" in card
    # the base as its own files have it, and not in the fp32 that its norms are computed in
    written, pinned = (
        load_tensors(tmp_path / folder / "model.safetensors")
        for folder in ("out/base", "checkpoint")
    )
    assert written.keys() == pinned.keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, pinned[name]) for name, tensor in written.items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "beta")
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 16))
    with torch.no_grad():
        found = model.eval()(ids_BT).logits
    expert = from_tensors(dummy, nearest, [1])
    torch.testing.assert_close(found, logits_of(trunk, expert, ids_BT), rtol=0, atol=EXACT)
    full = ours(cfg, parts, "beta")
    assert (found - logits_of(*full, ids_BT)).abs().max() > 10 * EXACT
    with pytest.raises(ConfigError, match="--rank 99: .* have a rank of [0-9]+ at most"):
        export(cfg, parts, ExportWish("adapters", rank=99), tmp_path, quiet)


def test_an_export_holds_what_is_planned(tokenizer, tmp_path):
    """Of a model whose networks' matrices are the largest that it has; what is mapped counts."""
    sizes = {"trunk__d_model": 32, "trunk__d_ff": 2048}
    cfg, parts = made(tmp_path, tokenizer, "qwen3", True, **sizes, **LOW_RANK)
    one = {"format": "expert", "expert": "alpha"}
    for number, given in enumerate((one, {"format": "dense", "dtype": "bf16"})):
        (tmp_path / f"out{number}").mkdir()
        args = (cfg, parts, ExportWish(**given), tmp_path / f"out{number}", quiet)
        held = max(held_bytes(lambda args=args: export(*args)))
        found = planned(cfg, ExportWish(**given), tokenizer.vocab_size)
        # less than a matrix away
        assert held == pytest.approx(found.peak_bytes - STOCK_BYTES, rel=0.04)


DTYPES = {"fp32": (torch.float32, 0), "bf16": (torch.bfloat16, 1e-2), "fp16": (torch.float16, 1e-3)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_once_to_what_is_asked_for(small_run, tmp_path, dtype):
    cfg, parts = small_run
    wanted, error = DTYPES[dtype]
    folder = exported(cfg, parts, tmp_path / "one", format="dense", dtype=dtype)
    trunk, ffn = ours(cfg, parts, "dense")
    stored = load_file(folder / "model.safetensors")
    for name, parameter in {**trunk.named(), **ffn.named()}.items():
        torch.testing.assert_close(stored.pop(name), parameter.to(wanted), rtol=0, atol=1e-7)
    assert not stored
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(wanted)[6:]
    gguf = exported(cfg, parts, tmp_path / "gguf", format="gguf", dense=True, dtype=dtype)
    (file,) = gguf.glob("*.gguf")
    found = perplexity(Llama(file).nats(list(range(1, 12))))
    with torch.no_grad():
        ids_BT = torch.tensor([list(range(1, 12))])
        nats = -logits_of(trunk, ffn, ids_BT)[0].log_softmax(-1)[range(10), ids_BT[0, 1:]]
    assert found == pytest.approx(perplexity(nats.tolist()), rel=error or RELATIVE)


REFUSED = {
    "no expert": ({"format": "expert"}, "--format expert: name one with --expert"),
    "unknown": ({"format": "expert", "expert": "omega"}, "there is no such expert"),
    "both": ({"format": "gguf", "expert": "alpha", "dense": True}, "give one"),
    "not for hf": ({"format": "hf", "expert": "alpha"}, "--expert is for --format expert or gguf"),
    "8 bits": ({"format": "dense", "dtype": "q8_0"}, "--dtype q8_0 is for --format gguf"),
    "whole networks": ({"format": "adapters"}, "whole networks and no low-rank ones.*compress"),
    "unknown to compress": (
        {"format": "adapters", "rank": 2, "expert": "anchor"},
        "--expert anchor: there is no such expert; there are alpha, beta, gamma",
    ),
}


@pytest.mark.parametrize(("wish", "said"), REFUSED.values(), ids=REFUSED)
def test_what_no_run_has_is_refused_before_anything_is_read(wish, said):
    with pytest.raises(ConfigError, match=said):
        check(small.config(), ExportWish(**wish))


@pytest.mark.parametrize("form", ["low_rank", "adapter"])
def test_experts_of_a_rank_are_not_compressed(form):
    adapter = {"router": {"steps": 0, "top_k": 1, "prompt_tokens": 4}} if form == "adapter" else {}
    cfg = small.config(expert__form=form, **adapter)
    with pytest.raises(ConfigError, match="are of rank 16 as they are.*--format adapters"):
        check(cfg, ExportWish("adapters", rank=2))
