"""What each training of an ffn_moe run moves, reads and leaves behind.

B sequences, T tokens, E experts, L layers, D model width.
"""

import contextlib
import errno
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import FolderParts, Killed, dying, elsewhere, train_io, unreadable
from torch import nn

from pipeline import hardware
from pipeline.errors import DataError, MismatchError
from pipeline.families import family, stage_function
from pipeline.families.ffn_moe import parts as ffn_parts
from pipeline.families.ffn_moe import train as ffn_moe
from pipeline.families.ffn_moe.parts import shards_of
from pipeline.families.ffn_moe.sections import RouterConfig
from pipeline.families.ffn_moe.stack import assemble
from pipeline.families.load import RUN_CONFIGS
from pipeline.model.router import gate_name
from pipeline.model.router_init import FeatureStatistics
from pipeline.run.advice import CommandLine, sentence
from pipeline.train import loop
from tests import small
from tests.test_trunk import whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole small run with every dense baseline."""
    return small.trained(tmp_path_factory.mktemp("run") / "run")


def ids_of(task) -> torch.Tensor:
    """Return a batch of a task."""
    return task.batch(0, 2)


@pytest.mark.parametrize("coordinate", [True, False])
@pytest.mark.parametrize("init", ["trunk", "fresh"])
def test_an_expert_trains_every_tensor_of_its_own_and_nothing_else(trained, init, coordinate):
    cfg = small.config(expert__init=init, expert__coordinate=coordinate)
    before = {p: p.read_bytes() for p in trained.root.rglob("*.safetensors")}
    found = small.train(cfg, FolderParts(cfg, trained.root), "train_experts", "beta")
    task, stored = found.task, set(found.folder.iterdir())
    extra = {"row", "bias"} if coordinate else set()
    assert set(task.parameters) == extra | {
        f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(2) for p in ("gate", "up", "down")
    }
    after = trained.tensors("train_experts", "expert.safetensors", "beta")
    dummy = trained.tensors("train_shared", "dummy.safetensors")
    assert after.keys() == dummy.keys() and not any(torch.equal(after[n], dummy[n]) for n in dummy)
    assert found.metrics["parameters"] == sum(p.numel() for p in task.parameters.values())
    changed = {p for p, b in before.items() if p.exists() and p.read_bytes() != b}
    assert changed <= stored  # the trunk's bytes are as they were
    (found.folder / "gate.safetensors").unlink(missing_ok=True)
    small.train(trained.cfg, trained, "train_experts", "beta")


def test_frozen_parameters_get_no_gradient(trained):
    for stage, item in (("train_experts", "alpha"), ("train_router", None), ("train_dense", "ffn")):
        task = small.MAKERS[stage](trained.cfg, trained, *([item] if item else []))
        cells = dict(
            zip(
                task.loss.__code__.co_freevars,
                (c.cell_contents for c in task.loss.__closure__),
                strict=True,
            )
        )
        inner = cells.get("task", task).loss
        inside = dict(
            zip(
                inner.__code__.co_freevars,
                (c.cell_contents for c in inner.__closure__),
                strict=True,
            )
        )
        everything = [*inside["trunk"].parameters(), *inside["ffn"].parameters()]
        task.before_step(0)
        task.loss(ids_of(task)).backward()
        own = {id(p) for p in task.parameters.values()}
        assert all(
            (p.grad is not None and p.grad.any()) if id(p) in own else p.grad is None
            for p in everything
        )
        assert all(p.requires_grad == (id(p) in own) for p in everything)


def test_a_fresh_expert_starts_at_random_and_a_copy_from_the_dummy(trained):
    dummy = trained.tensors("train_shared", "dummy.safetensors")
    for init in ("trunk", "fresh"):
        task = ffn_moe.expert(small.config(expert__init=init), trained, "alpha")
        equal = [torch.equal(p, dummy[n]) for n, p in task.parameters.items()]
        assert all(equal) if init == "trunk" else not any(equal)
    again = ffn_moe.expert(small.config(expert__init="fresh"), trained, "alpha").parameters
    other = ffn_moe.expert(small.config(expert__init="fresh"), trained, "beta").parameters
    assert all(torch.equal(p, task.parameters[n]) for n, p in again.items())
    assert not any(torch.equal(p, other[n]) for n, p in again.items())


def test_a_coordinated_expert_starts_at_its_domain_less_the_mixture(trained, monkeypatch):
    cfg = small.config(expert__coordinate=True, expert__coordinate_bias=-0.25, expert__z_weight=0.0)
    task = ffn_moe.expert(cfg, trained, "alpha")
    assert task.parameters["bias"].tolist() == [-0.25, -0.25]
    trunk, dummy = ffn_parts.stored_trunk(cfg, trained)
    rows = ffn_parts.training_rows(
        cfg, shards_of(trained, trained.cfg.partition.names), "statistics alpha", ("alpha",)
    )
    own = ffn_parts.feature_statistics(
        cfg, trunk, dummy, rows, cfg.expert.statistics_tokens
    ).mean_LD
    mixed = FeatureStatistics.from_tensors(
        trained.tensors("train_shared", "statistics.safetensors")
    ).mean_LD
    torch.testing.assert_close(
        task.parameters["row"].detach(), F.normalize(own - mixed, dim=-1).float()
    )
    pairs, real = [], ffn_moe.CoordinatedExpert
    monkeypatch.setattr(
        ffn_moe, "CoordinatedExpert", lambda *parts: pairs.append(real(*parts)) or pairs[0]
    )
    heavy = ffn_moe.expert(
        small.config(expert__coordinate=True, expert__coordinate_bias=-0.25, expert__z_weight=2.0),
        trained,
        "alpha",
    )
    assert heavy.loss(ids_of(heavy)).item() == pytest.approx(task.loss(ids_of(task)).item())
    difference = (heavy.penalty() - task.penalty()).item()
    assert (
        difference == pytest.approx(2 * np.mean([z.item() for z in pairs[0].z.values()]), rel=1e-4)
        and difference > 1
    )


def test_statistics_are_of_the_experts_own_text_only(trained):
    cfg = small.config(expert__statistics_tokens=160, partition__overlap=0.9)
    task = ffn_moe.expert(cfg, trained, "alpha")
    found = FeatureStatistics.from_tensors(task.export(0)["statistics.safetensors"])
    assert found.tokens == 160
    shards = shards_of(trained, trained.cfg.partition.names)
    own = ffn_parts.training_rows(cfg, shards, "statistics alpha", ("alpha",))
    seen = own.rows(0, 20)
    trunk, dummy = ffn_parts.stored_trunk(cfg, trained)  # the expert has not moved: it is the dummy
    sums = FeatureStatistics.empty(2, 16)
    with torch.no_grad():
        trunk.hidden(torch.from_numpy(seen)[:, :-1], sums.observe(dummy))
    torch.testing.assert_close(found.gram_LDD.double(), sums.gram_LDD, rtol=1e-4, atol=1e-4)


def _statistics(trained, name: str, path: str) -> FeatureStatistics:
    """Return what an expert that is trained already leaves for the gates, summed along a path."""
    cfg = small.config(expert__statistics_path=path)
    task = ffn_moe.expert(cfg, trained, name)
    stored = trained.tensors("train_experts", "expert.safetensors", name)
    for tensor, parameter in task.parameters.items():
        parameter.data.copy_(stored[tensor])
    exported = task.export(0)
    assert all(torch.equal(exported["expert.safetensors"][n], stored[n]) for n in stored)
    return FeatureStatistics.from_tensors(exported["statistics.safetensors"])


def test_text_that_came_along_the_base_is_told_from_general_text_by_what_it_says(trained):
    cfg = small.config(trunk__anchor="keep")
    general = ffn_parts.stored_statistics(cfg, trained, anchor=True)[0]
    lead_LE = {}
    for path in ("own", "base"):
        classes = [_statistics(trained, name, path) for name in cfg.experts]
        gates = ffn_parts.gates_from(cfg, [general, *classes], "ridge")
        # A domain's text as it comes where the base ran below
        text_LED = torch.stack(
            [_statistics(trained, n, "base").mean_LD.float() for n in cfg.experts], 1
        )
        score_LEE = torch.einsum("ldi,lei->lde", text_LED, gates)
        lead_LE[path] = score_LEE[:, :, 1:].diagonal(dim1=1, dim2=2) - score_LEE[:, :, 0]
    # Below the first network both are the same; above, what ran is no longer taken for the domain
    assert torch.equal(lead_LE["own"][0], lead_LE["base"][0])
    assert (lead_LE["base"][1] > 2.5).all() and lead_LE["own"][1].min() < 0.5


def share_of(cfg, trained, item: str, monkeypatch) -> float:
    """Return the share of an expert's rows that come from the general mixture."""
    captured = {}
    real = ffn_moe.training_rows

    def spy(cfg, shards, purpose, domains, **how):
        captured[purpose] = real(cfg, shards, purpose, domains, **how)
        return captured[purpose]

    for module in (ffn_moe, ffn_parts):
        monkeypatch.setattr(module, "training_rows", spy)
    ffn_moe.expert(cfg, trained, item)
    rows = captured[f"expert {item}"]
    return float(rows._general(np.arange(1000))[1].mean())


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.75])
def test_overlap_is_the_share_of_general_rows(trained, overlap, monkeypatch):
    assert (
        share_of(small.config(partition__overlap=overlap), trained, "alpha", monkeypatch) == overlap
    )


def test_the_trunks_domains_and_mixture_decide_what_it_reads(trained, monkeypatch):
    seen = []
    real = ffn_moe.training_rows

    def spy(*given, **how):
        seen.append((*given[2:], how))
        return real(*given, **how)

    for module in (ffn_moe, ffn_parts):
        monkeypatch.setattr(module, "training_rows", spy)
    ffn_moe.shared(small.config(trunk__domains=("gamma", "alpha"), trunk__mixture="equal"), trained)
    ffn_moe.expert(small.config(trunk__domains=("gamma", "alpha")), trained, "beta")
    assert seen[0][1:] == (("gamma", "alpha"), {"how": "equal"})
    # of one domain it is all the same
    general = {"how": "equal", "general": ("gamma", "alpha"), "general_share": 0.1}
    assert seen[1][1:] == (("beta",), general)


def test_experts_follow_expert_domains_in_order(trained):
    cfg = small.config(expert__domains=("gamma", "alpha"))
    stack = assemble(cfg, _with_router(cfg, trained))
    assert stack.names == ("gamma", "alpha")
    gamma = trained.tensors("train_experts", "expert.safetensors", "gamma")
    assert all(torch.equal(p, gamma[n]) for n, p in stack.mixture.experts[0].named().items())


class _Replaced:
    """Parts with some files replaced."""

    def __init__(self, parts, files):
        self.parts, self.files, self.cfg, self.root = parts, files, parts.cfg, parts.root
        self.folder, self.manifest = parts.folder, parts.manifest

    def tensors(self, stage, name, item=None):
        return self.files.get((stage, item)) or self.parts.tensors(stage, name, item)


def _with_router(cfg, parts):
    """Return parts whose router is that of cfg, untrained."""
    return _Replaced(
        parts, {("train_router", None): ffn_moe.router(cfg, parts).export(0)["router.safetensors"]}
    )


def test_an_anchor_is_expert_0_when_kept(trained):
    cfg = small.config(trunk__anchor="keep")
    stack = assemble(cfg, _with_router(cfg, trained))
    assert stack.names == ("anchor", "alpha", "beta", "gamma") and not any(
        p.requires_grad for p in stack.mixture.parameters()
    )
    dummy = trained.tensors("train_shared", "dummy.safetensors")
    assert all(torch.equal(p, dummy[n]) for n, p in stack.mixture.experts[0].named().items())


def test_a_router_of_another_number_of_experts_is_refused(trained):
    with pytest.raises(MismatchError, match="3 rows for 2 experts") as error:
        assemble(small.config(expert__domains=("alpha", "beta")), trained)
    # What to type is the edge's to say, from the stage
    told = sentence(error.value, CommandLine())
    assert told.endswith("for 2 experts: run `python -m pipeline train_router` again")


@pytest.mark.parametrize(
    ("path", "taught", "left"),
    [
        ("base", ("alpha", "gamma"), ("beta",)),
        ("base", ("gamma",), ("alpha", "beta")),
        ("base", small.DOMAINS, small.DOMAINS),  # nothing would be left
        ("own", ("alpha", "gamma"), small.DOMAINS),
    ],
)
def test_the_anchors_class_is_general_text_that_no_expert_has(trained, path, taught, left):
    cfg = small.config(expert__statistics_path=path, expert__domains=taught, trunk__anchor="keep")
    found = ffn_parts.stored_statistics(cfg, trained, anchor=True)
    trunk, dummy = ffn_parts.stored_trunk(cfg, trained)
    shards = shards_of(trained, trained.cfg.partition.names)
    rows = ffn_parts.training_rows(cfg, shards, "statistics", small.DOMAINS, how="equal")
    count = min(cfg.trunk.statistics_tokens, rows.tokens()) // small.CONTEXT
    numbers = [g for g in range(count) if small.DOMAINS[g % 3] in left]
    ids_BT = torch.from_numpy(np.concatenate([rows.rows(g, 1) for g in numbers]))
    sums = FeatureStatistics.empty(2, 16)
    with torch.no_grad():
        trunk.hidden(ids_BT[:, :-1], sums.observe(dummy))
    assert found[0].tokens == sums.tokens and len(found) == 1 + len(taught)
    torch.testing.assert_close(found[0].mean_LD, sums.mean_LD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anchor", ["keep", "discard"])
def test_rows_of_coordinated_experts_become_the_gate(trained, anchor):
    cfg = small.config(expert__coordinate=True, router__init="rows", trunk__anchor=anchor)
    rows = {n: torch.randn(2, 16) for n in cfg.experts}
    parts, real = _Replaced(trained, {}), trained.tensors
    parts.tensors = lambda stage, name, item=None: (
        {"row": rows[item]} if "gate" in name else real(stage, name, item)
    )
    weight_LED = ffn_parts.initial_gates(cfg, parts, "rows")
    wanted = [torch.zeros(2, 16)] * (anchor == "keep") + [rows[n] for n in cfg.experts]
    assert torch.equal(weight_LED, torch.stack(wanted, 1))


# Every start that settings allow, less the one that coordinated experts bring
STARTS = sorted(set(get_args(RouterConfig.model_fields["init"].annotation)) - {"rows"})


@pytest.mark.parametrize("init", STARTS)
def test_zero_steps_assemble_the_stack_without_training(trained, init):
    cfg = small.config(
        router__init=init, router__steps=0, router__temperature={"start": 2.0, "end": 1.0}
    )
    found = small.train(cfg, trained, "train_router")
    wanted = ffn_parts.initial_gates(cfg, trained, init)
    stored = trained.tensors("train_router", "router.safetensors")
    for i in range(2):
        if init != "random":  # drawn after other draws
            torch.testing.assert_close(stored[gate_name(i)], wanted[i] / 2.0)
        assert stored[gate_name(i)].any() == (init != "uniform")
    assert found.metrics["steps"] == 0
    stack = assemble(cfg, trained)
    judged = (
        torch.cat(
            [
                stack.token_loss(ids).flatten()
                for ids in ffn_moe.held_out_batches(
                    cfg, shards_of(trained, trained.cfg.partition.names), cfg.router, cfg.experts, 4
                )
            ]
        )
        .mean()
        .item()
    )
    assert found.metrics["valid_nats"] == pytest.approx(
        judged, abs=1e-5
    )  # what is measured is what is exported
    small.train(trained.cfg, trained, "train_router")


def test_the_validation_loss_of_a_trained_router_is_that_of_the_assembled_stack(trained):
    cfg = small.config(
        router__temperature={"start": 5.0, "end": 2.0},
        router__keep="best",
        router__eval_every_steps=1,
    )
    found = small.train(cfg, trained, "train_router")
    stack = assemble(cfg, trained)
    held_out = ffn_moe.held_out_batches(
        cfg, shards_of(trained, trained.cfg.partition.names), cfg.router, cfg.experts, 4
    )
    judged = torch.cat([stack.token_loss(ids).flatten() for ids in held_out]).mean().item()
    assert found.metrics["valid_nats"] == pytest.approx(judged, abs=1e-5)
    small.train(trained.cfg, trained, "train_router")


@pytest.mark.parametrize(
    ("epochs", "wanted"), [(None, [4.0, 3.0, 2.0, 1.0]), (0.5, [4.0, 2.5, 1.0, 1.0]), (100.0, None)]
)
def test_temperature_is_linear_then_constant(epochs, wanted):
    cfg = small.config(router__temperature={"start": 4.0, "end": 1.0, "epochs": epochs})
    ramp = cfg.router.temperature
    found = [ramp.at(step, steps=4, epoch_steps=4.0) for step in range(4)]
    assert found == pytest.approx(wanted or [4 - 3 * s / 400 for s in range(4)])


def test_balance_and_z_loss_are_in_the_routers_loss(trained):
    losses = {}
    changes = {
        "none": {"z_weight": 0.0},
        "aux": {"z_weight": 0.0, "balance": "aux", "balance_weight": 3.0},
        "z": {"z_weight": 2.0},
    }
    for name, change in changes.items():
        task = ffn_moe.router(small.config(router=change), trained)
        task.before_step(0)
        losses[name] = (task.loss(ids_of(task)) + task.penalty()).item()
        numbers = task.after_step()
    assert losses["aux"] - losses["none"] == pytest.approx(3 * numbers["balance"], rel=1e-4)
    assert losses["z"] - losses["none"] == pytest.approx(2 * numbers["z"], rel=1e-4)
    assert (
        sum(numbers["load"]) == pytest.approx(1, abs=1e-3)
        and 0 < numbers["entropy"] <= np.log(3) + 1e-6
    )


@pytest.mark.parametrize(
    ("flags", "auto"),
    [({"avx512_bf16"}, True), ({"amx_bf16"}, True), ({"bf16"}, True), ({"avx2", "avx512f"}, False)],
)
def test_auto_is_bf16_where_the_processor_has_it(monkeypatch, flags, auto):
    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: frozenset(flags))
    assert [hardware.uses_bf16(d) for d in ("auto", "bf16", "fp32")] == [
        auto,
        True,
        False,
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dtype_is_the_arithmetic_and_never_the_storage(trained, dtype):
    cfg = small.config(dtype=dtype)
    task, seen = ffn_moe.expert(cfg, trained, "alpha"), []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(out.dtype) if isinstance(module, nn.Linear) else None
    )
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(hook.remove)
        task.loss(ids_of(task)).backward()
    assert set(seen) == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in task.parameters.values())
    assert task.bf16 == (dtype == "bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "item"),
    [
        ("train_shared", ()),
        ("train_experts", ("beta",)),
        ("train_router", ()),
        ("train_dense", ("ffn",)),
    ],
)
def test_a_checkpoint_that_cannot_be_read_stays_and_is_gone_on_from(
    trained, tmp_path, monkeypatch, stage, item, dtype
):
    cfg = small.config(dtype=dtype, dense__baselines=("ffn",))
    parts = FolderParts(cfg, trained.root)
    make = small.MAKERS[stage]
    with pytest.raises(Killed):
        loop.fit(dying(make(cfg, parts, *item), 2), train_io(tmp_path))
    assert unreadable(tmp_path, make(cfg, parts, *item), monkeypatch, errno.EIO) > 8
    task, here = elsewhere(make(cfg, parts, *item)), train_io(tmp_path)
    loop.fit(task, here)
    assert here.recorder.starts == [2]


def test_a_tokenizer_larger_than_the_pretrained_trunk_is_a_mismatch(trained, tmp_path):
    whole("llama", vocab_size=30).save_pretrained(tmp_path / "model")
    cfg = small.config(trunk__init=str(tmp_path / "model"), tokenizer__pretrained="other")
    with pytest.raises(
        MismatchError,
        match=r"tokenizer other has 48 entries, trunk .* has 30: name the trunk's own",
    ):
        ffn_moe.shared(cfg, trained)
    cfg = small.config(trunk__init=str(tmp_path / "model"))
    with pytest.raises(MismatchError, match=r"has 30: tokens were added .* Remove those from 30"):
        ffn_moe.shared(cfg, trained)
    cfg = small.config(trunk__init=str(tmp_path / "gone"), tokenizer__pretrained="other")
    with pytest.raises(DataError, match="is no folder here"):
        ffn_moe.shared(cfg, trained)


def test_seeds_are_apart_and_follow_the_configuration():
    cfg = small.config()
    names = [("shared",), ("router",), ("expert", "alpha"), ("expert", "beta"), ("rows", "shared")]
    assert len({cfg.seed_of(*n) for n in names}) == len(names)
    assert small.config(seed=4).seed_of("shared") != cfg.seed_of("shared")


def test_training_twice_gives_the_same_bytes(trained):
    first = {
        p.relative_to(trained.root): p.read_bytes() for p in trained.root.rglob("*.safetensors")
    }
    for stage, item in (("train_shared", None), ("train_experts", "gamma"), ("train_router", None)):
        small.train(trained.cfg, trained, stage, item)
    assert first == {
        p.relative_to(trained.root): p.read_bytes() for p in trained.root.rglob("*.safetensors")
    }


def test_the_family_is_found_by_name():
    module = family("ffn_moe")
    assert module.__name__ == "pipeline.families.ffn_moe.family"
    for name in ("cost", "assemble", "reassemble"):
        assert callable(getattr(module, name))


@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_every_row_of_a_family_names_a_function(name):
    for row in RUN_CONFIGS[name].stages.values():
        assert callable(stage_function(name, row.function))
