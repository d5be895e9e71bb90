"""What a lora_vlm job is predicted to spend, against the models that are built and the published
sizes."""

import json

import lora_small
import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pipeline.families.adapters import peft_io
from pipeline.families.adapters.cost import KERNEL_BYTES, memory_plan
from pipeline.families.lora_vlm import base as lora_base
from pipeline.families.lora_vlm import cost, family
from pipeline.families.lora_vlm.config import VlmAdapterConfig, VlmBaseConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MADE = {("preprocess", "color"): {"rows": {"train": 320, "valid": 8, "test": 8}}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return lora_small.prepared(tmp_path_factory.mktemp("cost"))


def test_sizes_count_the_parameters_of_the_model_up_to_its_vectors(parts):
    model = lora_base.open_base(parts.folder("train_shared"), parts.cfg.loras.base).model
    sizes = cost.VlmSizes.of_config(model.config.to_dict())
    matrices = {
        n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "pos_embed" not in n
    }
    assert sizes.parameters == sum(matrices.values())
    assert sizes.body_parameters == sum(
        n for name, n in matrices.items() if "language_model.layers" in name
    )
    assert sizes.encoder_parameters == sum(n for name, n in matrices.items() if "visual" in name)
    assert cost.sizes_of(parts.cfg.loras.base).body_parameters == sizes.body_parameters
    options = parts.cfg.loras.options("color")
    own = peft_io.adapter_parameters(peft_io.add(model, "color", options), "color")
    assert sizes.adapter_parameters(options) == sum(p.numel() for p in own.values())


def test_the_published_2b_model_has_its_published_parameters():
    sizes = cost.PUBLISHED["Qwen/Qwen3-VL-2B-Instruct"]
    assert sizes.parameters == pytest.approx(2_127_532_032, rel=0.003)
    assert sizes.body_parameters == pytest.approx(1_409_000_000, rel=0.001)
    assert sizes.encoder_parameters == pytest.approx(407_000_000, rel=0.01)
    assert sizes.adapter_parameters(VlmAdapterConfig(r=16, steps=1)) == pytest.approx(
        17_400_000, rel=0.005
    )


@pytest.mark.parametrize("name", ["Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"])
def test_the_other_published_sizes_make_models_of_their_names_size(name):
    billions = {"4B": 4.44, "8B": 8.77}[name.split("-")[2]]
    assert cost.PUBLISHED[name].parameters == pytest.approx(billions * 1e9, rel=0.01)


def test_sizes_are_read_from_a_folder_the_cache_or_the_name(parts, monkeypatch):
    folder = parts.folder("train_shared") / "base"
    built = cost.sizes_of(VlmBaseConfig(model=str(folder), dtype="float32"))
    assert built.d == 64 and built.vision_d == 32
    named = VlmBaseConfig(model="Qwen/Qwen3-VL-2B-Instruct", revision=COMMIT)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_a, **_k: None)
    assert cost.sizes_of(named).d == 2048
    assert cost.sizes_of(VlmBaseConfig(model="someone/else", revision=COMMIT)) is None
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_a, **_k: str(folder / "config.json")
    )
    assert cost.sizes_of(named) == built


def test_a_folder_without_settings_has_no_price_and_the_plan_goes_on(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}}))
    cfg = lora_small.config()
    base = VlmBaseConfig(model=str(tmp_path), dtype="float32")
    cfg = cfg.model_copy(update={"loras": cfg.loras.model_copy(update={"base": base})})
    assert family.cost(cfg, "train_experts", "color", {}, False) is None


def test_jobs_cost_what_their_steps_and_rows_say(parts):
    cfg = parts.cfg
    assert family.cost(cfg, "train_shared", None, {}, False) is None
    job = family.cost(cfg, "train_experts", "color", {}, False)
    assert (
        job.tokens == 6 * 4 * cost.row_tokens(cfg, "color")
        and job.flops > job.tokens * job.parameters
    )
    defaults = cfg.loras.defaults.model_copy(update={"steps": None, "epochs": 3})
    by_epochs = cfg.model_copy(
        update={"loras": cfg.loras.model_copy(update={"defaults": defaults})}
    )
    assert family.cost(by_epochs, "train_experts", "color", {}, False).tokens is None
    told = family.cost(by_epochs, "train_experts", "color", MADE, False)
    assert told.tokens == 3 * 320 * cost.row_tokens(cfg, "color")
    assert family.cost(cfg, "train_router", None, {}, False).tokens > 0


def test_checkpointing_and_smaller_micro_batches_are_predicted_to_save(parts):
    cfg = lora_small.config(loras__defaults__batch_sequences=64)
    options, sizes = cfg.loras.options("color"), cost.sizes_of(cfg.loras.base)
    plans = [
        memory_plan(cfg, options.model_copy(update=u), sizes, 68, 68, "x")
        for u in (
            {},
            {"checkpointing": True},
            {"checkpointing": True, "micro_batch_sequences": 2},
        )
    ]
    peaks = [sizes.peak_bytes(cfg.loras.base, options, plan, 68) for plan in plans]
    assert peaks[0] > peaks[1] > peaks[2] > KERNEL_BYTES


def test_the_published_shapes_are_the_librarys_own_layout():
    """A 2B model without weights, from the sizes alone."""
    s = cost.PUBLISHED["Qwen/Qwen3-VL-2B-Instruct"]
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": s.vocab_size,
            "hidden_size": s.d,
            "intermediate_size": s.d_ff,
            "num_hidden_layers": s.layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": s.vision_layers,
            "hidden_size": s.vision_d,
            "intermediate_size": s.vision_d_ff,
            "num_heads": 16,
            "out_hidden_size": s.d,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == 2_127_532_032
    assert cost.VlmSizes.of_config(config.to_dict()) == s
