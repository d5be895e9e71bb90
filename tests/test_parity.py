"""Stock transformers classes load what the store holds and compute the same logits.

Every check writes an ordinary checkpoint folder from the stored files, under Hugging Face names,
and lets from_pretrained read it. L layers, I number of an expert, B sequences, T tokens.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from pipeline.families.ffn_moe import train as ffn_moe
from pipeline.families.ffn_moe.bundle import stock_settings
from pipeline.families.ffn_moe.parts import stored_experts, stored_trunk
from pipeline.families.ffn_moe.stack import assemble
from pipeline.model.trunk import open_dense
from tests import small
from tests.test_trunk import whole

IDS_BT = torch.randint(40, (3, small.CONTEXT), generator=torch.Generator().manual_seed(1))
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def made(tmp_path, kind: str, tied: bool, **changes):
    """Return configuration and parts of a whole run on a trunk of one kind, new (qwen3) or from a
    checkpoint."""
    changes |= {"trunk__tie_embeddings": tied}
    if kind != "qwen3":
        model = whole(kind, tie_word_embeddings=tied, vocab_size=small.VOCAB)
        model.save_pretrained(tmp_path / "checkpoint")
        vocabulary = Tokenizer(
            models.WordLevel({f"w{i}": i for i in range(small.VOCAB)}, unk_token="w0")
        )
        PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="w0").save_pretrained(
            tmp_path / "checkpoint"
        )
        changes |= {
            "trunk__init": str(tmp_path / "checkpoint"),
            "tokenizer__pretrained": str(tmp_path / "checkpoint"),
        }
    cfg = small.config(**changes)
    return cfg, small.run(cfg, tmp_path / "run")


def stock(folder, kind, settings: dict, tensors: dict):
    """Write a checkpoint folder and let a transformers class load it, with nothing missing and
    nothing left over."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": [kind.__name__]}))
    save_file(
        {n: t.detach().clone() for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def settings_of(parts) -> dict:
    """Return the stored Hugging Face config fields."""
    return json.loads((parts.folder("train_shared") / "trunk.json").read_text())


def moe(parts, cfg, folder):
    """Return the stock mixture loaded from the stored files, expert by expert renamed."""
    settings, mixtral = settings_of(parts), settings_of(parts)["model_type"] != "qwen3"
    tensors = dict(parts.tensors("train_shared", "trunk.safetensors"))
    sources = [("train_experts", "expert.safetensors", name) for name in cfg.experts]
    if cfg.trunk.anchor == "keep":
        sources.insert(0, ("train_shared", "dummy.safetensors", None))
    for i, source in enumerate(sources):
        for name, tensor in parts.tensors(*source).items():
            tensors[
                _in_mixtral(name, i) if mixtral else name.replace(".mlp.", f".mlp.experts.{i}.")
            ] = tensor
    for name, tensor in parts.tensors("train_router", "router.safetensors").items():
        tensors[name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name] = tensor
    settings |= {"num_experts_per_tok": cfg.router.top_k}
    if mixtral:
        settings |= {"model_type": "mixtral", "num_local_experts": len(sources)}
        return stock(folder, MixtralForCausalLM, settings, tensors)
    settings |= {
        "model_type": "qwen3_moe",
        "num_experts": len(sources),
        "num_local_experts": len(sources),
        "moe_intermediate_size": settings["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return stock(folder, Qwen3MoeForCausalLM, settings, tensors)


def _in_mixtral(name: str, expert: int) -> str:
    head, _, tail = name.partition(".mlp.")
    projection, _, end = tail.partition(".")
    return f"{head}.block_sparse_moe.experts.{expert}.{MIXTRAL[projection]}.{end}"


def ours(trunk, ffn) -> torch.Tensor:
    """Return logits_BTV."""
    with torch.no_grad():
        return trunk.hidden(IDS_BT, ffn) @ trunk.head.T


def same(model, logits_BTV: torch.Tensor) -> None:
    """Fail unless the stock model computes the same, and not trivially so."""
    with torch.no_grad():
        found = model(IDS_BT).logits
    assert (found - logits_BTV).abs().max() <= 1e-5
    assert logits_BTV.std() > 1e-2


RUNS = {
    "plain": ("qwen3", True, {}),
    "untied": ("qwen3", False, {}),
    "top-1": ("qwen3", True, {"router__top_k": 1}),
    "top-3 of 3": ("qwen3", True, {"router__top_k": 3}),
    "anchor kept": ("qwen3", True, {"trunk__anchor": "keep", "router__top_k": 2}),
    "coordinated, own rows": ("qwen3", True, {"expert__coordinate": True, "router__init": "rows"}),
    "temperature": ("qwen3", True, {"router__temperature": {"start": 3.0, "end": 2.0}}),
    "selection bias": ("qwen3", True, {"router__balance": "bias", "router__balance_weight": 1.0}),
    "head_dim": ("qwen3", True, {"trunk__head_dim": 6, "trunk__rope_theta": 500.0}),
    "llama": ("llama", False, {}),
    "llama, tied": ("llama", True, {"trunk__anchor": "keep"}),
    "mistral": ("mistral", False, {}),
}
DENSE = {"qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM, "mistral": MistralForCausalLM}


@pytest.mark.parametrize("case", RUNS)
def test_trunk_experts_and_stack_are_what_transformers_computes(case, tmp_path):
    kind, tied, changes = RUNS[case]
    cfg, parts = made(tmp_path, kind, tied, **changes)
    trunk, dummy = stored_trunk(cfg, parts)
    assert ("lm_head.weight" in parts.tensors("train_shared", "trunk.safetensors")) is not tied
    tensors = parts.tensors("train_shared", "trunk.safetensors")
    for name, ffn in [("dummy", dummy), *stored_experts(cfg, parts)]:
        own = {n: p.detach() for n, p in ffn.named().items()}
        same(
            stock(tmp_path / name, DENSE[kind], settings_of(parts), tensors | own),
            ours(trunk, ffn),
        )
    stack = assemble(cfg, parts)
    logits = ours(stack.trunk, stack.mixture)
    same(moe(parts, cfg, tmp_path / "moe"), logits)
    assert (logits - ours(trunk, dummy)).abs().max() > 1e-3


WINDOWS = {
    "of no layer": ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    "of all layers": ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    "passed over": ("llama", {}),
    "mistral": ("mistral", {}),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_the_stock_mixture_looks_back_as_far_as_the_trunk(case):
    kind, changes = WINDOWS[case]
    trunk = whole(kind, vocab_size=small.VOCAB, sliding_window=3, **changes)
    stated = stock_settings(trunk.config.to_dict(), 3, 2)
    mixture = AutoModelForCausalLM.from_config(AutoConfig.for_model(**stated)).eval()
    ids_BT = torch.arange(24).repeat(2, 1)
    ids_BT[1, 0] = 40

    def sees_the_beginning(model) -> bool:
        with torch.no_grad():
            one_V, other_V = model(ids_BT).logits[:, -1]
        return bool((one_V - other_V).abs().max() > 1e-6)

    assert sees_the_beginning(mixture) == sees_the_beginning(trunk)
    assert sees_the_beginning(trunk) == (case in ("of no layer", "passed over"))


@pytest.mark.parametrize("item", ["total", "wide", "ffn"])
def test_dense_baselines_are_ordinary_models(item, tmp_path):
    cfg = small.config(dense__baselines=(item,))
    parts = small.run(cfg, tmp_path / "run")
    folder = tmp_path / "run" / f"train_dense-{item}"
    (folder / "config.json").write_text((folder / "trunk.json").read_text())
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.intermediate_size == cfg.trunk.d_ff * (2 if item == "wide" else 1)
    settings = json.loads((folder / "trunk.json").read_text())
    stored = parts.tensors("train_dense", "model.safetensors", item)
    same(model.eval(), ours(*open_dense(settings, stored)))


def test_the_exported_gate_is_that_of_the_last_step_of_training(tmp_path):
    """Temperature, straight from 4 to 2 over two epochs, is in the stored gate; noise and bias are
    not."""
    ramp = {"start": 4.0, "end": 2.0}
    cfg = small.config(router__temperature=ramp)
    parts = small.run(cfg, tmp_path / "run")
    task = ffn_moe.router(cfg, parts)
    found = small.train(cfg, parts, "train_router")
    trained = {n: p.detach() for n, p in found.task.parameters.items()}
    stored = parts.tensors("train_router", "router.safetensors")
    last = [row["temperature"] for row in found.rows if "temperature" in row][-1]
    assert last == pytest.approx(2.0) and task.steps == 4
    for name, gate_ED in trained.items():
        torch.testing.assert_close(stored[name], gate_ED / last)
