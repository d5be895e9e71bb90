"""Budgets of an ffn_moe run: what each job promises to spend is what its training does, and its address holds it."""

import pytest
import torch

from pipeline.config.sections import Config, Section
from pipeline.data import Shards
from pipeline.families import ffn_cost, ffn_moe
from pipeline.stages import BASELINE_READS, STAGES
from tests import small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole small run with every dense baseline."""
    with pytest.MonkeyPatch.context() as patch:
        return small.trained(patch, tmp_path_factory.mktemp("run") / "run")


def test_dense_baselines_see_the_tokens_they_promise(trained):
    cfg = trained.cfg
    tokens = {n: m["tokens"] for n, m in trained.metrics.items()}
    experts = [tokens["train_experts", n] for n in cfg.experts]
    total = sum(experts) + tokens["train_router", None]
    promised = {"total": total, "ffn": total, "path": max(experts), "wide": total + tokens["train_shared", None],
                "scratch": total + tokens["train_shared", None]}  # fmt: skip
    assert {item: tokens["train_dense", item] for item in promised} == promised


@pytest.mark.parametrize("batch", [3, 5])
def test_budgets_given_in_epochs_are_what_the_trainings_do(trained, batch):
    changes = {f"{s}__epochs": e for s, e in (("trunk", 1.3), ("expert", 0.7), ("router", 0.4))}
    cfg = small.config(**changes, expert__batch_sequences=batch, partition__overlap=0.0)
    shards = Shards(trained.folder("preprocess"))
    budgets = {d: shards.tokens("train", d) for d in shards.domains}
    done = {}
    for stage, item in [("train_shared", None), *(("train_experts", n) for n in cfg.experts), ("train_router", None)]:
        task = small.MAKERS[stage](cfg, trained, *([item] if item else []))
        done[stage, item] = task.steps * task.options.batch_sequences * task.tokens_per_row
        assert ffn_cost.stage_tokens(cfg, stage, item, budgets) == done[stage, item], (stage, item)
    total = sum(done.values()) - done["train_shared", None]
    for item, promised in {"total": total, "scratch": total + done["train_shared", None]}.items():
        task = ffn_moe.dense(cfg, trained, item)
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


def test_dense_lr_is_for_the_baselines_that_continue():
    cfg = small.config(dense__lr=0.125)
    tokens = dict.fromkeys(small.DOMAINS, 500)
    lrs = {i: ffn_cost.dense_options(cfg, i, tokens).lr for i in ("total", "path", "ffn", "wide", "scratch")}
    assert lrs == {"total": 0.125, "path": 0.125, "ffn": 0.125, "wide": cfg.trunk.lr, "scratch": cfg.trunk.lr}
    assert ffn_cost.dense_options(small.config(expert__lr=0.5), "total", tokens).lr == 0.5


class _Watched:
    """Notes every setting that is read."""

    def __init__(self, monkeypatch):
        self.read, outer = set(), self
        names = {"trunk", "expert", "router", "dense", "partition", "data", "tokenizer", "evaluate"}

        def getattribute(section, name):
            kind = type(section).__name__.lower()
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
    if "train_experts" in row.needs:
        out.add("expert.domains")  # by the addresses of the experts
    return out


def _in_address(name: str, held: set[str]) -> bool:
    section, _, field_name = name.partition(".")
    kind = Config.model_fields[section].annotation
    later = (kind.model_fields[field_name].json_schema_extra or {}).get("later")
    return name in held or (section in held and not later)


@pytest.mark.parametrize(
    ("stage", "item"),
    [("train_shared", None), ("train_experts", "alpha"), ("train_router", None),
     *(("train_dense", i) for i in ("total", "path", "ffn", "wide", "scratch"))],
)  # fmt: skip
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
    assert not {name for name in watched.read if not _in_address(name, _held(stage, item))}
