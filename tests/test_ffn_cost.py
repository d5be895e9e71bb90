"""Budgets of an ffn_moe run: what each job promises to spend is what its training does, and its
address holds it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

from pipeline.config.base import Section, is_hashed
from pipeline.errors import BudgetError
from pipeline.families.ffn_moe import cost as ffn_cost
from pipeline.families.ffn_moe import pass_memory, passes, train
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.parts import shards_of
from pipeline.families.ffn_moe.stages import BASELINE_READS, STAGES
from pipeline.model import chunks
from pipeline.model.loss import MAX_BF16_SUMS
from pipeline.model.router_init import FeatureStatistics, ridge
from pipeline.train.flops import Shape
from pipeline.train.memory_plan import LOW_MMAP_THRESHOLD_BYTES, MemoryPlan
from tests import small
from tests.held import held_bytes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole small run with every dense baseline."""
    return small.trained(tmp_path_factory.mktemp("run") / "run")


def test_dense_baselines_see_the_tokens_they_promise(trained):
    cfg = trained.cfg
    tokens = {n: m["tokens"] for n, m in trained.metrics.items()}
    experts = [tokens["train_experts", n] for n in cfg.experts]
    total = sum(experts) + tokens["train_router", None]
    promised = {
        "total": total,
        "ffn": total,
        "path": max(experts),
        "wide": total + tokens["train_shared", None],
        "scratch": total + tokens["train_shared", None],
    }
    assert {item: tokens["train_dense", item] for item in promised} == promised


@pytest.mark.parametrize("batch", [3, 5])
def test_budgets_given_in_epochs_are_what_the_trainings_do(trained, batch):
    changes = {f"{s}__epochs": e for s, e in (("trunk", 1.3), ("expert", 0.7), ("router", 0.4))}
    cfg = small.config(**changes, expert__batch_sequences=batch, partition__overlap=0.0)
    shards = shards_of(trained, trained.cfg.partition.names)
    budgets = {d: shards.tokens("train", d) for d in shards.domains}
    done = {}
    for stage, item in [
        ("train_shared", None),
        *(("train_experts", n) for n in cfg.experts),
        ("train_router", None),
    ]:
        task = small.MAKERS[stage](cfg, trained, *([item] if item else []))
        done[stage, item] = task.steps * task.options.batch_sequences * task.tokens_per_row
        assert ffn_cost.stage_tokens(cfg, stage, item, budgets) == done[stage, item], (stage, item)
    total = sum(done.values()) - done["train_shared", None]
    for item, promised in {"total": total, "scratch": total + done["train_shared", None]}.items():
        task = train.dense(cfg, trained, item)
        seen = task.steps * task.options.batch_sequences * task.tokens_per_row
        assert promised <= seen < promised + task.options.batch_sequences * task.tokens_per_row


def test_dense_baselines_train_what_they_say(trained):
    trunk = trained.tensors("train_shared", "trunk.safetensors")
    for item in ("total", "path", "ffn"):
        model = trained.tensors("train_dense", "model.safetensors", item)
        moved = {n for n in trunk if not torch.equal(model[n], trunk[n])}
        assert moved == (set() if item == "ffn" else set(trunk))
    wide = trained.tensors("train_dense", "model.safetensors", "wide")
    assert wide["model.layers.0.mlp.up_proj.weight"].shape == (48, 16)
    scratch = trained.tensors("train_dense", "model.safetensors", "scratch")
    assert scratch["model.layers.0.mlp.up_proj.weight"].shape == (24, 16)


def test_no_import_changes_what_others_spend_at_the_same_address():
    tokens = dict.fromkeys(small.DOMAINS, 500)
    searched = {"expert__lr": "auto", "router__steps": 0, "router__top_k": 1}
    own = small.config(**searched)
    imported = small.config(**searched, expert__imported=dict.fromkeys(small.DOMAINS, "packed"))
    jobs = [("train_dense", "total"), ("train_dense", "path"), ("lr_experts", None)]
    for stage, item in jobs:
        assert imported.read_settings(stage, item) == own.read_settings(stage, item)
        spent = [ffn_cost.stage_tokens(cfg, stage, item, tokens) for cfg in (own, imported)]
        assert spent[0] == spent[1] > 0, (stage, item)


def test_dense_lr_is_for_the_baselines_that_continue():
    cfg = small.config(dense__lr=0.125)
    tokens = dict.fromkeys(small.DOMAINS, 500)
    lrs = {
        i: ffn_cost.dense_options(cfg, i, tokens).lr
        for i in ("total", "path", "ffn", "wide", "scratch")
    }
    assert lrs == {
        "total": 0.125,
        "path": 0.125,
        "ffn": 0.125,
        "wide": cfg.trunk.lr,
        "scratch": cfg.trunk.lr,
    }
    assert ffn_cost.dense_options(small.config(expert__lr=0.5), "total", tokens).lr == 0.5


# What names domains: an address holds which ones come of it, and what was made for each
DOMAINS_HELD = {
    "partition.by",
    "partition.count",
    "partition.domains",
    "trunk.domains",
    "expert.domains",
    "expert.imported",
    "dense.domains",
}


class _Watched:
    """Notes every setting that is read."""

    def __init__(self, monkeypatch):
        self.read, outer = set(), self
        names = {"trunk", "expert", "router", "dense", "partition", "data", "tokenizer", "evaluate"}

        def getattribute(section, name):
            kind = type(section).__name__.removesuffix("Config").lower()
            if kind in names and name in type(section).model_fields:
                outer.read.add(f"{kind}.{name}")
            return super(Section, section).__getattribute__(name)

        monkeypatch.setattr(Section, "__getattribute__", getattribute, raising=False)


def _held(stage: str, item: str | None) -> set[str]:
    """Return the sections and fields in a stage's address, those of its inputs included."""
    row = STAGES[stage]
    out = set(row.reads) | set(BASELINE_READS[item] if stage == "train_dense" else ())
    for need in row.needs:
        out |= _held(need, None if need != "train_dense" else "total")
    return out


def _in_address(name: str, held: set[str]) -> bool:
    section, _, field_name = name.partition(".")
    kind = FfnMoeConfig.model_fields[section].annotation
    return name in held or (section in held and is_hashed(kind.model_fields[field_name]))


@pytest.mark.parametrize(
    ("stage", "item"),
    [
        ("train_shared", None),
        ("train_experts", "alpha"),
        ("train_router", None),
        *(("train_dense", i) for i in ("total", "path", "ffn", "wide", "scratch")),
    ],
)
def test_a_stage_reads_no_setting_that_its_address_does_not_hold(trained, stage, item, monkeypatch):
    cfg = small.config(expert__coordinate=stage == "train_experts", router__balance="aux")
    watched = _Watched(monkeypatch)
    task = small.MAKERS[stage](cfg, trained, *([item] if item else []))
    task.before_step(0)
    task.loss(task.batch(0, 2))
    task.after_step()
    task.validate()
    task.export(1)
    assert len(watched.read) > 5
    outside = {name for name in watched.read if not _in_address(name, _held(stage, item))}
    outside -= DOMAINS_HELD
    # Read, but no byte of a result depends on it: test_settings.py trains with and without
    assert not {name for name in outside if name.rpartition(".")[2] != "checkpointing"}


LARGE = {"layers": 4, "d_model": 512, "heads": 8, "d_ff": 1365, "context_tokens": 512}


def peak(plan: MemoryPlan, trains: str = "ffn", bf16: bool = True, experts: int = 4) -> int:
    """Return the predicted peak of a training of some size."""
    cfg = small.config(trunk=LARGE | {"kv_heads": None}, tokenizer__vocab_size=16_384)
    return ffn_cost.peak_bytes(
        Shape.from_config(cfg.trunk, cfg.tokenizer.vocab_size), trains, plan, bf16, experts
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_sequences": 1},
        {"moments": "bf16"},
        {"moments": "int8"},
        {"gradients": "bf16"},
        {"checkpointing": True},
        {"mmap_threshold_bytes": LOW_MMAP_THRESHOLD_BYTES},
        {"chunk_logits": 2**20},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("trains", ["all", "ffn"])
def test_every_means_lowers_the_predicted_peak(trains, changes):
    plain = MemoryPlan(2)
    assert (
        peak(replace(plain, **changes), trains)
        < peak(plain, trains)
        < peak(plain, trains, bf16=False)
    )


@pytest.mark.parametrize(
    ("vocab_size", "width", "layers", "sequences", "measured_mb"),
    [
        (10_000, 256, 6, 8, 761.0),
        (2_000, 256, 6, 8, 767.4),
        (10_000, 256, 6, 4, 494.5),
        (2_000, 256, 6, 4, 479.9),
        (2_000, 256, 3, 8, 384.0),
        (10_000, 128, 6, 8, 379.6),
    ],
)
def test_a_trunk_in_fp32_takes_what_benchmarks_memory_measured(
    vocab_size, width, layers, sequences, measured_mb
):
    shape = Shape(layers, width, width, width, 4 * width, vocab_size, context_tokens=256)
    found = ffn_cost.peak_bytes(shape, "all", MemoryPlan(sequences), bf16=False, experts=2)
    assert found / 1e6 == pytest.approx(measured_mb, rel=0.1)


def test_only_gates_need_more_memory_for_more_experts():
    for trains, grows in (("all", False), ("ffn", False), ("gates", True)):
        assert (
            peak(MemoryPlan(1), trains, experts=64) > peak(MemoryPlan(1), trains, experts=2)
        ) == grows


def test_a_budget_that_a_job_cannot_keep_names_the_job_and_one_that_it_can():
    def cost(budget):
        cfg = small.config(runtime__memory_budget=budget)
        return ffn_cost.cost(cfg, "train_experts", "alpha", None, bf16=True)

    with pytest.raises(
        BudgetError, match="^train_experts-alpha does not fit into runtime.memory_budget 1MB"
    ) as error:
        cost("1MB")
    least = re.search("smallest that works is ([0-9]+)MB", str(error.value))[1]
    assert cost(f"{least}MB").peak_bytes <= int(least) * 10**6 < 300 * 10**6


def _on(monkeypatch, device: str) -> None:
    for module in (ffn_cost, pass_memory):
        monkeypatch.setattr(module, "device", lambda: device)


@pytest.mark.parametrize("trains", ["all", "ffn", "gates"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_only_what_is_asked_for_counts(monkeypatch, trains, checkpointing):
    plans = [
        MemoryPlan(2, checkpointing=checkpointing),
        MemoryPlan(2, checkpointing=checkpointing, budget_bytes=10**9),
    ]
    plans += [
        replace(plan, mmap_threshold_bytes=LOW_MMAP_THRESHOLD_BYTES, trim_each_pass=True)
        for plan in plans
    ]
    here = [peak(plan, trains) for plan in plans]
    _on(monkeypatch, "cuda")
    there = {peak(plan, trains) for plan in plans}
    assert len(there) == 1 and there.pop() + passes.KERNEL_BYTES <= min(here)
    _on(monkeypatch, "cpu")
    assert [peak(plan, trains) for plan in plans] == here


def test_an_anchor_in_the_stack_needs_memory_too():
    sizes = LARGE | {"kv_heads": None}
    jobs = [
        ffn_cost.cost(
            small.config(trunk=sizes | {"anchor": anchor}), "train_router", None, None, bf16=True
        )
        for anchor in ("discard", "keep")
    ]
    assert jobs[1].peak_bytes - jobs[0].peak_bytes == 2 * 4 * 3 * 512 * 1365


def _sums(layers: int, width: int, experts: int) -> list[FeatureStatistics]:
    """Return statistics of experts, as they are mapped."""
    found = []
    for _ in range(experts):
        gram_LDD = 5 * torch.eye(width) + 0.1 * torch.randn(layers, width, width)
        found.append(FeatureStatistics(torch.randn(layers, width).double(), gram_LDD, 10))
    return found


@pytest.mark.parametrize(("layers", "width", "experts"), [(3, 320, 4), (12, 128, 1), (8, 192, 9)])
def test_a_ridge_takes_what_is_planned(layers, width, experts):
    statistics = _sums(layers, width, experts)
    held = held_bytes(lambda: ridge(statistics, 1e-2, 4.0))
    shape = Shape(layers, width, width, width, 4 * width, 100, context_tokens=64)
    planned = passes.ridge_bytes(passes.StackShape(shape, experts, None, None), experts)
    assert planned == pytest.approx(max(held), rel=0.05)
    # whatever the layers and experts: blocks that come and go leave holes in the heap
    assert (np.diff(held, prepend=0) == 8 * width**2).sum() == 2


def _of_1_5_b(folder: Path, **changes):
    """Return a run on a pinned trunk of 1.5 B numbers, four low-rank experts, nothing trained."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    given = {
        "trunk": {"init": str(folder), "tokens": None, "steps": 0, "context_tokens": 64},
        "partition": {"domains": ("bridges", "gardens", "ships", "songs")},
        "expert": {"form": "low_rank", "rank": 64},
        "tokenizer": {"pretrained": "own"},
        "router": {"tokens": None, "steps": 0, "eval_tokens": 256},
    }
    for section, more in changes.items():
        given[section] = given.get(section, {}) | more
    return small.config(**given)


def test_a_mixture_of_deltas_in_bf16_is_planned_as_it_was_measured(tmp_path):
    """94 MB above imports and mapped files, of 1.5 B and rank 64. It took 607 in
    benchmarks/memory_stages.py when a validation kept the cast deltas of each layer."""

    def planned(bf16=True, stage="train_router", **changes):
        found = ffn_cost.cost(_of_1_5_b(tmp_path, **changes), stage, None, None, bf16)
        return (found.peak_bytes - found.mapped_bytes) / 1e6

    # the cast copies: of four experts, whose anchor has none
    copies = 2 * 4 * 28 * 3 * 64 * (1536 + 8960) / 1e6
    one_layer = copies / 28
    assert planned() == pytest.approx(94, rel=0.05)
    assert planned(trunk={"anchor": "keep"}) == pytest.approx(planned(), rel=0.01)
    # The head takes more than a layer with those, but of much text
    assert planned(expert={"rank": 16}) == planned()
    much = {"eval_tokens": 4096, "batch_sequences": 32}
    fewer = planned(router=much) - planned(router=much, expert={"rank": 16})
    assert fewer == pytest.approx(3 / 4 * one_layer, rel=0.01)
    # A training holds them for its backward pass
    steps = {"steps": 2, "batch_sequences": 1}
    fewer = planned(router=steps) - planned(router=steps, expert={"rank": 16})
    assert fewer == pytest.approx(3 / 4 * copies, rel=0.01)
    # Of full experts one matrix is cast at a time, and none is rounded beforehand
    whole = {"form": "full", "rank": None}
    assert planned(expert=whole) - planned(bf16=False, expert=whole) < 2 * 2 * 1536 * 8960 / 1e6
    # A report has one layer's mean of all experts, which is cast too; fp32 casts the bf16 trunk,
    # what a network computes is twice as large and leaves no holes, nor do products any kernels
    much = {"batch_sequences": 64}
    more = planned(stage="evaluate", evaluate=much)
    more -= planned(bf16=False, stage="evaluate", evaluate=much)
    cast = 4 * (chunks.PIECE_NUMBERS + 1536 * 8960) / 1e6
    computed = 2 * 3 * 8960 * 64 * 64 / 1e6
    kernels = passes.kernels_bytes(64 * 64, True) / 1e6
    assert more == pytest.approx(one_layer + kernels - cast - computed, abs=1)


def test_a_pin_is_planned_as_it_was_measured(tmp_path, monkeypatch):
    """benchmarks/memory_stages.py: 810 MB above imports and mapped files, of 1.5 B. Of SmolLM2 as a
    .gguf file 374, as decoding its embedding takes more than all that comes after it."""

    def planned(**changes):
        given = {"eval_tokens": 256, "statistics_tokens": 256} | changes
        cfg = _of_1_5_b(tmp_path, trunk=given)
        found = ffn_cost.cost(cfg, "train_shared", None, None, bf16=True)
        assert found.mapped_bytes > 3.0e9
        return (found.peak_bytes - found.mapped_bytes) / 1e6

    assert planned() == pytest.approx(810, rel=0.02)
    # Of little width it is the head
    smol = Shape(30, 576, 576, 192, 1536, 49_152, context_tokens=64)
    stack = passes.StackShape(smol, 4, None, 2)
    chunk = 85 * 49_152
    head = passes.forward_bytes(stack, 256, True) - passes.HEAP_BYTES
    assert head == chunk * (2 + 4) + 2 * 4 * 256 * 576
    # A pass stands beside sums in fp64, and needs that much text to take more than writing them
    assert planned(statistics_tokens=1024) == planned()
    assert planned(statistics_tokens=8192, context_tokens=512) > 1.2 * planned()
    # Under a budget it has one sequence
    budget = {"runtime": {"memory_budget": "20GB"}}
    text = {"eval_tokens": 256, "statistics_tokens": 8192, "context_tokens": 512}
    cfg = _of_1_5_b(tmp_path, trunk=text, **budget)
    found = ffn_cost.cost(cfg, "train_shared", None, None, bf16=True)
    assert (found.peak_bytes - found.mapped_bytes) / 1e6 == pytest.approx(planned(), rel=0.02)

    cfg = _of_1_5_b(tmp_path, trunk={"eval_tokens": 256, "statistics_tokens": 256})
    assert passes.pin_bytes(cfg, stack, True) / 1e6 < 200
    monkeypatch.setattr(passes, "is_gguf", lambda _cfg: True)
    assert passes.pin_bytes(cfg, stack, True) / 1e6 == pytest.approx(374, rel=0.05)


def test_a_report_is_planned_as_it_was_measured(tmp_path, monkeypatch):
    """269 MB above imports and mapped files in benchmarks/memory_stages.py. With four times as much
    text at a time a network's products, of 73 MB each, are no blocks of the heap, and leave no
    holes there."""
    few = {"rivals": "few", "tokens_per_domain": 64, "samples": 0, "continuation_tokens": 0}

    def planned(**changes):
        cfg = _of_1_5_b(tmp_path, evaluate=few | changes, dense={"baselines": []})
        found = ffn_cost.cost(cfg, "evaluate", None, dict.fromkeys(cfg.partition.names, 5000), True)
        return (found.peak_bytes - found.mapped_bytes) / 1e6

    assert planned() == pytest.approx(269, rel=0.1)
    blocks = {True: 2 * 4096 * 8960, False: 4 * 4096 * 1536}
    assert blocks[True] > passes.MOST_OF_HEAP_BYTES > blocks[False]
    before = planned(batch_sequences=64)
    monkeypatch.setattr(passes, "MOST_OF_HEAP_BYTES", blocks[True])
    assert planned(batch_sequences=64) - before == pytest.approx(3 * blocks[True] / 1e6)


def test_a_report_in_bf16_counts_kernels_and_what_is_cast_of_dense_models(tmp_path):
    """347 MB above imports and mapped files on SmolLM2-135M with a dense model beside three
    experts and 128 kernels, 342 of them planned; 1,365 before its passes left no losses between
    their blocks."""

    def planned(bf16=True, **changes):
        cfg = _of_1_5_b(tmp_path, **changes)
        found = ffn_cost.cost(cfg, "evaluate", None, dict.fromkeys(cfg.partition.names, 5000), bf16)
        return (found.peak_bytes - found.mapped_bytes) / 1e6

    dense = {"dense": {"baselines": ["total"]}}
    cast = passes.cast_bytes(Shape(28, 1536, 1536, 256, 8960, 151_936, context_tokens=64), 2)
    assert planned(**dense) - planned() == pytest.approx(cast / 1e6)
    assert planned(bf16=False, **dense) == planned(bf16=False)
    # every token that is written is another length, and a kernel of each product
    none, one = ({"samples": 1, "continuation_tokens": tokens} for tokens in (0, 1))
    eight = passes.DENSE_PRODUCTS * passes.PRODUCT_BYTES / 1e6
    assert planned(evaluate=one) - planned(evaluate=none) == pytest.approx(eight)
    assert planned(bf16=False, evaluate=one) == planned(bf16=False, evaluate=none)


def test_code_is_mapped_and_so_no_part_of_what_a_job_has_alone(tmp_path, monkeypatch):
    jobs = ("train_shared", "train_router", "evaluate")
    counted = dict.fromkeys(_of_1_5_b(tmp_path).partition.names, 5000)

    def planned():
        found = [ffn_cost.cost(_of_1_5_b(tmp_path), job, None, counted, True) for job in jobs]
        found.append(ffn_cost.cost(_of_1_5_b(tmp_path), "train_experts", "ships", counted, True))
        return np.array([(job.peak_bytes, job.mapped_bytes) for job in found])

    before = planned()
    monkeypatch.setattr(passes, "KERNEL_BYTES", passes.KERNEL_BYTES + 5)
    assert (planned() - before == 5).all()


def test_gates_that_are_made_before_a_pass_count_where_they_take_more(tmp_path, monkeypatch):
    for name in ("forward_bytes", "body_bytes", "from_heap_bytes", "cast_bytes"):
        monkeypatch.setattr(passes, name, lambda *_: 0)
    square = 8 * 1536**2

    def planned(stage, **changes):
        cfg = _of_1_5_b(tmp_path, **changes)
        counted = dict.fromkeys(cfg.partition.names, 5000)
        found = ffn_cost.cost(cfg, stage, None, counted, bf16=False)
        return found.peak_bytes - found.mapped_bytes

    # 48.6 MB were measured, 3 of them what LAPACK keeps
    made = planned("train_router")
    assert made == pytest.approx(48.6e6, rel=0.05)
    assert planned("train_router", router={"init": "centroid"}) == 0
    few = planned("evaluate", evaluate={"rivals": "few"})
    every = planned("evaluate", evaluate={"rivals": "all"})
    # a class more than the stack has, as the anchor is tried too
    assert made < every - few - passes.HEAP_BYTES < 1.1 * made
    # The anchor's statistics are mapped, but where layers without experts lie between
    held = []
    for layers in ([3, 4, 5], [0, 2, 5]):
        changes = {"expert": {"layers": layers}, "trunk": {"anchor": "keep"}}
        held.append(planned("train_router", **changes))
    assert held[1] - held[0] == 3 * square / 2
    # on a GPU gates are made in main memory
    monkeypatch.setattr(passes, "device", lambda: "cuda")
    assert planned("train_router") == 0
    assert planned("evaluate", evaluate={"rivals": "all"}) == few


def test_a_long_pass_through_the_head_needs_its_sum_in_fp32(monkeypatch):
    assert MAX_BF16_SUMS == pass_memory.MAX_BF16_SUMS > 2048 // 256 > 1  # chunks of a pass
    few = [peak(MemoryPlan(4), trains, bf16) for trains in ("all", "ffn") for bf16 in (True, False)]
    monkeypatch.setattr(pass_memory, "MAX_BF16_SUMS", 1)
    many = [
        peak(MemoryPlan(4), trains, bf16) for trains in ("all", "ffn") for bf16 in (True, False)
    ]
    assert [b - a for a, b in zip(few, many, strict=True)] == [4 * 16_384 * 512, 0, 0, 0]


def test_the_plan_of_a_pretrained_trunk_has_that_trunks_sizes(tmp_path):
    def cost(init):
        cfg = small.config(trunk__init=str(init), tokenizer__pretrained="own", dense__baselines=())
        return ffn_cost.cost(cfg, "train_experts", "alpha", None, bf16=True)

    config = Qwen3Config(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    config.save_pretrained(tmp_path / "model")
    assert cost(tmp_path / "model").parameters == 3 * 3 * 64 * 96
    assert cost(tmp_path / "elsewhere") is None


def test_weights_gradients_and_moments_are_counted_to_the_byte(monkeypatch):
    """With a GPU there is no slack, and a row of 8 tokens holds next to nothing."""
    _on(monkeypatch, "cuda")
    cfg = small.config(
        trunk=LARGE | {"kv_heads": None, "context_tokens": 8}, tokenizer__vocab_size=16_384
    )
    shape = Shape.from_config(cfg.trunk, 16_384)
    own, trunk, table = 4 * 3 * 512 * 1365, 4 * 4 * 512 * 512 + 16_384 * 512, 16_384 * 512
    wanted = {
        ("ffn", "fp32", "fp32"): own * (4 + 4 + 8) + 2 * trunk,
        ("ffn", "bf16", "bf16"): own * (4 + 2 + 4) + 2 * trunk,
        ("ffn", "int8", "bf16"): own * (4 + 2 + 2) + 2 * trunk,
        ("gates", "fp32", "fp32"): 2 * (trunk + 5 * own),
        ("all", "fp32", "fp32"): (own + trunk) * (4 + 4 + 8) + 4 * table,
    }
    for (trains, moments, gradients), count in wanted.items():
        plan = MemoryPlan(1, moments=moments, gradients=gradients, chunk_logits=2**20)
        assert ffn_cost.peak_bytes(shape, trains, plan, True, 5) == pytest.approx(
            count, rel=0.03
        ), (trains, moments)


def test_a_pinned_trunk_is_mapped_and_its_passes_cost_time(tmp_path):
    config = Qwen3Config(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    numbers = 3 * (4 * 64 * 64 + 3 * 64 * 96) + 100 * 64

    def cost(stage, item=None, **changes):
        cfg = small.config(
            trunk__init=str(tmp_path),
            trunk__tokens=None,
            trunk__steps=0,
            tokenizer__pretrained="own",
            **changes,
        )
        return ffn_cost.cost(cfg, stage, item, dict.fromkeys(small.DOMAINS, 5000), bf16=True)

    pin = cost("train_shared")
    # In the file's dtype, and once, norms beside it
    weights = pin.mapped_bytes - passes.code_bytes()
    assert (pin.tokens, pin.parameters) == (0, 0) and weights == pytest.approx(
        2 * numbers, rel=0.05
    )
    assert cost("train_experts", "alpha").mapped_bytes == pin.mapped_bytes
    assert cost("train_dense", "total").mapped_bytes == passes.code_bytes()
    more = cost("train_shared", trunk__statistics_tokens=10**6)
    a_token = 2 * 3 * (4 * 64 * 64 + 3 * 64 * 96 + 64**2)
    assert more.flops - pin.flops > 0.9 * a_token * (10**6 - 65_536)
    few, every = (cost("evaluate", evaluate__rivals=rivals) for rivals in ("few", "all"))
    assert 0 < few.flops < every.flops
    assert few.mapped_bytes > pin.mapped_bytes
