"""How ffn_moe's trainings run: in bf16 over a mapped trunk, and by the means that are chosen for
them.

Nothing here needs a processor with bf16: without one the same arithmetic is slower.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import FolderParts, Killed, dying, equal, train_io, values

from pipeline.families.ffn_moe import cost
from pipeline.families.ffn_moe import parts as ffn_parts
from pipeline.families.ffn_moe import train as ffn_moe
from pipeline.store.artifacts import load_tensors
from pipeline.train.loop import fit
from pipeline.train.memory_plan import FAST_TOKENS
from tests import small

STAGES = (
    "train_shared",
    "train_experts alpha",
    "train_router",
    "train_dense total",
    "train_dense ffn",
)
needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="reads the process's map of its memory"
)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """One whole small run in bf16."""
    cfg = small.config(dtype="bf16", dense__baselines=("total", "ffn"))
    return small.run(cfg, tmp_path_factory.mktemp("bf16") / "run")


def made(parts, stage: str):
    """Return the task of a stage and its item."""
    name, _, item = stage.partition(" ")
    return small.MAKERS[name](parts.cfg, parts, *([item] if item else []))


def mapped(tensor: torch.Tensor) -> str:
    """Return the file in which a tensor lies, empty when it lies in none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, *rest = line.split(maxsplit=5)
        first, last = (int(place, 16) for place in places.split("-"))
        if first <= tensor.data_ptr() < last:
            return rest[-1] if rest[-1].startswith("/") else ""
    return ""


def test_what_a_bf16_run_leaves_is_fp32_and_finer_than_bf16(rounded):
    files = [p for p in rounded.root.rglob("*.safetensors") if p.name != ffn_parts.FROZEN]
    assert len(files) >= 3 + 2 * 3 + 1 + 2
    fine = set()
    for path in files:
        for name, tensor in load_tensors(path).items():
            assert tensor.dtype in (torch.float32, torch.float64, torch.int64), (path, name)
            if tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float()):
                fine.add(path)
    assert fine == set(files)


def test_the_frozen_trunk_is_the_trunk_rounded(rounded, tmp_path):
    frozen = load_tensors(rounded.root / "train_shared" / ffn_parts.FROZEN)
    exact = load_tensors(rounded.root / "train_shared" / "trunk.safetensors")
    assert equal(frozen, {n: t.bfloat16() for n, t in exact.items()})
    cfg = small.config(trunk__steps=1)
    parts = FolderParts(cfg, tmp_path)
    small.write_shards(tmp_path)
    assert not (small.train(cfg, parts, "train_shared").folder / ffn_parts.FROZEN).exists()


@needs_linux
def test_trainings_map_the_trunk_and_share_its_pages(rounded):
    own = str(rounded.root / "train_shared")
    trunk, dummy = ffn_parts.training_trunk(rounded.cfg, rounded)
    assert {mapped(p) for p in trunk.parameters()} == {f"{own}/{ffn_parts.FROZEN}"}
    assert {mapped(p) for p in dummy.parameters()} == {f"{own}/dummy.safetensors"}
    exact, _ = ffn_parts.stored_trunk(rounded.cfg, rounded)
    assert {mapped(p) for p in exact.parameters()} == {f"{own}/trunk.safetensors"}
    experts = list(ffn_parts.stored_experts(rounded.cfg, rounded))
    for name, expert in experts:
        assert {mapped(p) for p in expert.parameters()} == {
            f"{rounded.root}/train_experts-{name}/expert.safetensors"
        }
    assert not any(p.requires_grad for p in (*trunk.parameters(), *dummy.parameters()))
    assert mapped(torch.ones(3)) == ""


def test_an_artifact_without_the_frozen_trunk_trains_the_same(rounded, monkeypatch, tmp_path):
    ends = {}
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(FolderParts, "manifest", lambda *_: SimpleNamespace(files={}))
        task = made(rounded, "train_experts alpha")
        fit(task, train_io(tmp_path / name))
        ends[name] = values(task)
    assert equal(ends["with"], ends["without"])


@needs_linux
@pytest.mark.parametrize("stage", ["train_experts alpha", "train_dense total", "train_dense ffn"])
def test_what_trains_never_lies_in_an_artifacts_file(rounded, stage):
    before = {p: p.read_bytes() for p in rounded.root.rglob("*.safetensors")}
    task = made(rounded, stage)
    assert {mapped(p) for p in task.parameters.values()} == {""}
    with torch.no_grad():
        for parameter in task.parameters.values():
            parameter.add_(1)
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize("stage", STAGES)
def test_a_bf16_training_computes_in_bf16_but_for_its_gates(rounded, stage, tmp_path):
    task, seen = made(rounded, stage), {}
    gates = set(task.parameters) if stage == "train_router" else set()
    assert task.bf16 and set(task.bf16_params) == task.parameters.keys() - gates
    watched = replace(
        task, before_step=lambda _: seen.update({n: p.dtype for n, p in task.parameters.items()})
    )
    start = values(task)
    fit(replace(watched, after_step=task.after_step), train_io(tmp_path))
    assert seen == {n: torch.float32 if n in gates else torch.bfloat16 for n in task.parameters}
    assert not any(torch.equal(value, start[n]) for n, value in values(task).items())


@pytest.mark.parametrize("stage", STAGES[:4])
def test_a_bf16_training_that_was_killed_ends_the_same_bit_for_bit(rounded, stage, tmp_path):
    whole = made(rounded, stage)
    fit(whole, train_io(tmp_path / "whole"))
    for step in (1, 3):
        folder = tmp_path / str(step)
        with pytest.raises(Killed):
            fit(dying(made(rounded, stage), step), train_io(folder))
        task, here = made(rounded, stage), train_io(folder)
        torch.manual_seed(77)
        fit(task, here)
        assert here.recorder.starts == [step] and equal(values(task), values(whole))


def test_a_bf16_run_ends_near_the_fp32_one(rounded, tmp_path):
    exact = small.config()
    parts = FolderParts(exact, tmp_path)
    small.write_shards(tmp_path)
    small.train(exact, parts, "train_shared")
    small.train(exact, parts, "train_experts", "alpha")
    for job in (("train_shared", None), ("train_experts", "alpha")):
        assert rounded.metrics[job]["valid_nats"] == pytest.approx(
            parts.metrics[job]["valid_nats"], rel=5e-3
        )
        assert rounded.metrics[job]["valid_nats"] != parts.metrics[job]["valid_nats"]


def test_a_gate_beside_an_expert_stays_fp32(rounded):
    cfg = small.config(dtype="bf16", expert__coordinate=True)
    task = ffn_moe.expert(cfg, FolderParts(cfg, rounded.root, rounded.metrics), "alpha")
    assert set(task.parameters) - set(task.bf16_params) == {"row", "bias"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole small run in fp32."""
    return small.trained(tmp_path_factory.mktemp("run") / "run")


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({}, False),
        ({"balance": "bias"}, False),
        ({"balance": "aux"}, True),
        ({"capacity_factor": 1.5}, True),
        ({"noise": 0.1}, True),
    ],
)
def test_gates_keep_their_batch_where_its_pieces_would_count_otherwise(trained, changes, whole):
    cfg = small.config(router=changes | {"batch_sequences": 600}, runtime__memory_budget="8GB")
    task = ffn_moe.router(cfg, trained)
    assert task.memory_plan.whole_batch == whole and not task.memory_plan.checkpointing
    assert task.memory_plan.micro_batch_sequences == (
        600 if whole else FAST_TOKENS // small.CONTEXT
    )
    assert not ffn_moe.expert(cfg, trained, "alpha").memory_plan.whole_batch


def test_a_plan_and_its_training_choose_the_same(trained):
    cfg = small.config(runtime__memory_budget="59MB", expert__batch_sequences=300)
    task = ffn_moe.expert(cfg, trained, "alpha")
    as_trained = cfg.model_copy(
        update={"tokenizer": cfg.tokenizer.model_copy(update={"vocab_size": small.VOCAB})}
    )
    words = cost.cost(as_trained, "train_experts", "alpha", None, bf16=False).summary
    assert task.memory_plan.budget_bytes == 59_000_000 and words == task.memory_plan.summary
    assert (
        task.memory_plan
        != ffn_moe.expert(small.config(expert__batch_sequences=300), trained, "alpha").memory_plan
    )


def gradients(task, pieces: int = 1) -> dict[str, torch.Tensor]:
    """Return the gradients of a batch of 4 rows in so many passes."""
    rows = 4 // pieces
    for at in range(0, 4, rows):
        ((task.loss(task.batch(at, rows)) + task.penalty()) / pieces).backward()
    return {n: p.grad for n, p in task.parameters.items()}


@pytest.mark.parametrize("coordinate", [False, True])
@pytest.mark.parametrize("stage", ["train_shared", "train_experts alpha"])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(trained, stage, coordinate):
    name, _, item = stage.partition(" ")
    found = {}
    for again in (False, True):
        cfg = small.config(
            expert={
                "coordinate": coordinate,
                "init": "fresh",
                "z_weight": 3.0,
                "checkpointing": again,
            },
            trunk__checkpointing=again,
        )
        task = small.MAKERS[name](cfg, trained, *([item] if item else []))
        assert task.memory_plan.checkpointing == again
        found[again] = gradients(task)
    assert all(g.any() for g in found[True].values()) and equal(found[True], found[False])


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own doing
@pytest.mark.parametrize("stage", ["train_shared", "train_experts alpha"])
def test_a_compiled_loss_has_the_same_gradients(trained, stage, monkeypatch):
    """Traced and differentiated as inductor's would be; its own first pass takes a minute
    (docs/decisions.md)."""
    compiling = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(ffn_moe.torch, "compile", compiling)
    name, _, item = stage.partition(" ")
    found = {}
    for compiled in (False, True):
        cfg = small.config(trunk__compile=compiled, expert={"compile": compiled, "init": "fresh"})
        task = small.MAKERS[name](cfg, trained, *([item] if item else []))
        assert task.memory_plan.compile == compiled
        found[compiled] = gradients(task)
    for parameter, plain in found[False].items():
        torch.testing.assert_close(found[True][parameter], plain, rtol=1e-4, atol=1e-6)


def kept_bytes(task) -> int:
    """Return the bytes a forward pass keeps for its backward pass, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(task.batch(0, 4))
    assert loss.requires_grad
    return sum(kept.values())


def test_checkpointing_makes_layers_again(trained):
    sizes = [
        kept_bytes(ffn_moe.expert(small.config(expert__checkpointing=again), trained, "alpha"))
        for again in (0, 1)
    ]
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("stage", ["train_shared", "train_experts alpha", "train_router"])
def test_micro_batches_give_the_same_gradients(trained, stage):
    name, _, item = stage.partition(" ")
    found = []
    for pieces in (1, 2, 4):
        task = small.MAKERS[name](trained.cfg, trained, *([item] if item else []))
        task.before_step(0)
        found.append(gradients(task, pieces))
    for other in found[1:]:
        for key, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][key], rtol=1e-4, atol=1e-6)


def test_a_training_under_a_budget_ends_as_without_one(trained, tmp_path):
    """Another micro-batch, growing from one row: 1e-5 of fp32 sums in another order."""
    ends = []
    for runtime in ({}, {"memory_budget": "8GB"}):
        cfg = small.config(runtime=runtime)
        parts = FolderParts(cfg, trained.root)
        task = ffn_moe.expert(cfg, parts, "alpha")
        fit(task, train_io(tmp_path / str(len(ends))))
        ends.append(values(task))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-5)


@needs_linux
def test_the_gates_training_maps_no_two_experts_at_once(rounded, monkeypatch):
    counts, real = [], ffn_parts.training_expert

    def training_expert(cfg, expert):
        maps = Path("/proc/self/maps").read_text().splitlines()
        counts.append(len({line.split()[-1] for line in maps if "/train_experts-" in line}))
        return real(cfg, expert)

    monkeypatch.setattr(ffn_moe, "training_expert", training_expert)
    trains = ffn_moe.router(rounded.cfg, rounded)
    assert counts == [1, 1, 1]
    # What is validated alone rounds none, and casts to the same
    alone = ffn_moe.router(small.config(dtype="bf16", router__steps=0), rounded)
    assert counts == [1, 1, 1] and alone.validate() == trains.validate()


def test_a_validation_of_gates_draws_and_counts_nothing(trained):
    task = ffn_moe.router(small.config(router={"noise": 1.0, "balance": "bias"}), trained)
    task.before_step(0)
    before = torch.get_rng_state()
    assert task.validate() == task.validate() and torch.equal(torch.get_rng_state(), before)
    task.loss(task.batch(0, 4))
    assert not torch.equal(torch.get_rng_state(), before)  # the gates train again
