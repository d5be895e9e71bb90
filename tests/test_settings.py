"""Every setting of every section does something: changing it changes what a stage leaves behind.

EFFECTS lists all of them, and a setting that is not listed fails. A stage's product is compared
byte for byte with that of the same configuration before the change; the same configuration twice
gives the same product.
"""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeRecorder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.config.base import Section, is_hidden
from pipeline.config.run import RunConfig
from pipeline.data.text import tokenizer as tokenizers
from pipeline.errors import PipelineError
from pipeline.families.ffn_moe import cost, evaluate, score
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.protocols import quiet
from pipeline.train import loop
from tests import (
    small,
    test_adapter_experts,
    test_dense_beside,
    test_expert_package,
    test_foreign_adapters,
    test_foreign_tokenizers,
    test_lr_search,
    test_serve_limits,
    test_wiring,
)
from tests.small_text import prepared
from tests.test_trunk import whole

LABELS = ("a", "b")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole small run, and beside it a checkpoint, a tokenizer and documents."""
    root = tmp_path_factory.mktemp("settings")
    parts = small.run(
        small.config(expert__coordinate=True, dense__baselines=("path",), joint__models=("moe",)),
        root / "run",
    )
    tokenizers.train(270, ["a text that goes on"]).save(root / "run" / "tokenizer")
    whole(vocab_size=small.VOCAB).save_pretrained(root / "checkpoint")
    _write_tokenizer(root / "tokenizer")
    for name in ("documents", "others"):
        _write_documents(root / f"{name}.jsonl", seed=len(name))
    for label in LABELS:
        paragraphs = [" ".join(f"{label}{i * k % 97}" for k in range(60)) for i in range(200)]
        (root / f"{label}.txt").write_text("\n\n".join(paragraphs))
    return parts


def _write_tokenizer(folder) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[])
    )
    model.pre_tokenizer, model.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>").save_pretrained(folder)


def _write_documents(path, seed: int) -> None:
    """Write documents of two labels under two names for each field, some short, one too long, two
    unreadable."""
    draw, lines = np.random.default_rng(seed), []
    for i in range(160):
        label = LABELS[i % 2]
        words = draw.choice([f"{label}{w}" for w in range(40)], int(draw.integers(3, 60)))
        text = " ".join(words) + ("" if i % 40 else " long" * 400)
        split = ("train", "valid", "test")[min(2, max(0, i - 140) // 10)]
        row = {
            "text": text,
            "body": text[::-1],
            "domain": label,
            "topic": LABELS[i % 4 // 2],
            "split": split,
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join([*lines, "{torn", "{torn too"]) + "\n")


FILES = {"paths": ["documents.jsonl"]}
TEXTS = [{"paths": [f"{label}.txt"], "domain": label} for label in LABELS]
PREPARED = {
    "data": {"source": "files", "files": [FILES], "max_document_bytes": 1500},
    "partition": {"domains": LABELS, "min_tokens": 50},
    "tokenizer": {"vocab_size": 300, "sample_megabytes": 1.0},
    "dense": {"baselines": ()},
}
CLUSTERS = {"partition__by": "clusters", "partition__count": 2}


def resolved(trained, changes: dict) -> dict:
    """Return changes with names of files made paths below the fixture's folder."""
    beside = trained.root.parent

    def walk(value):
        if isinstance(value, str) and (beside / value).exists() and value:
            return str(beside / value)
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        return [walk(v) for v in value] if isinstance(value, list) else value

    return {k: walk(v) for k, v in changes.items()}


def product(trained, stage: str, changes: dict, folder) -> str:
    """Return what a stage leaves behind: a digest of every byte, or the text of its error."""
    base = PREPARED if stage == "preprocess" else {}
    cfg = small.config(**resolved(trained, base | changes))
    folder.mkdir()
    try:
        return PRODUCTS.get(stage.split()[0], _trained)(cfg, trained, stage, folder)
    except PipelineError as error:
        return f"{type(error).__name__}: {error}"


def _preprocessed(cfg, _trained_parts, _stage, folder) -> str:
    prepared(cfg, folder / "out")
    files = sorted(p for p in folder.glob("out/[pt]*/**/*") if p.is_file())
    return _digest([(p.relative_to(folder).as_posix(), p.read_bytes()) for p in files])


def _trained(cfg, parts, stage, folder) -> str:
    name, _, item = stage.partition(" ")
    task = small.MAKERS[name](cfg, parts, *([item] if item else []))
    if task.options.eval_every_steps == 1:
        worse = itertools.count(1.0)
        task = replace(task, validate=lambda: next(worse))
    recorder = FakeRecorder()
    metrics = loop.fit(task, loop.TrainIO(folder, recorder, lambda: None, name, "trunk", 1e9, 1))
    numbers = [
        {k: v for k, v in row.items() if k in ("step", "valid_nats")} for row in recorder.rows
    ]
    files = task.export(metrics["kept_step"])
    tensors = [
        (file, key, _raw(value) if isinstance(value, torch.Tensor) else str(value).encode())
        for file, content in files.items()
        for key, value in content.items()
    ]
    return _digest(
        [str(numbers).encode(), *(b for _, _, b in tensors), str(sorted(files)).encode()]
    )


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def _reported(cfg, parts, _stage, _folder) -> str:
    report = evaluate.tables(cfg, parts, quiet)
    return report.model_dump_json(exclude={"made", "machine", "speed"})


def _digest(content) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _scored(cfg, parts, stage, folder) -> str:
    return _digest(score.score(cfg, parts, folder, quiet, stage.partition(" ")[2]))


PRODUCTS = {"preprocess": _preprocessed, "evaluate": _reported, "score": _scored}
ALPHA = "train_experts alpha"
PATH = "train_dense path"
MOE = "train_joint moe"
WORSE = {"eval_every_steps": 1}  # _trained lets every evaluation be worse than the last


def _fit(section: str, stage: str) -> dict:
    """Return the effects of one training's settings."""
    worse = {f"{section}__{k}": v for k, v in WORSE.items()}
    return {
        f"{section}.{name}": (stage, value, base)
        for name, value, base in (
            ("steps", 3, {}),
            ("epochs", 0.3, {f"{section}__steps": 1}),
            ("tokens", 64, {}),
            ("batch_sequences", 3, {}),
            ("micro_batch_sequences", 1, {}),
            ("moments", "bf16", {}),
            ("gradients", "bf16", {}),
            ("lr", 2e-2, {}),
            ("min_lr_share", 0.9, {}),
            ("warmup_steps", 3, {}),
            ("schedule", "constant", {}),
            ("weight_decay", 0.9, {}),
            ("beta2", 0.5, {}),
            ("clip_norm", 1e-9, {}),
            ("eval_every_steps", 2, {}),
            ("eval_tokens", 48, {}),
            ("patience", 1, worse),
            ("keep", "best", worse),
        )
    }


# setting: (stage whose product changes, another value, changes that both sides have)
EFFECTS = {
    "name": ("evaluate", "other", {}),
    "seed": ("train_shared", 4, {}),
    "dtype": ("train_shared", "bf16", {}),
    "data.files": ("preprocess", [{"paths": ["others.jsonl"]}], {}),
    "files.paths": ("preprocess", [{"paths": ["documents.jsonl", "others.jsonl"]}], {}),
    "files.domain": ("preprocess", [FILES | {"domain": "a"}], {}),
    "files.format": ("preprocess", [FILES | {"format": "text"}], {}),
    "files.encoding": ("preprocess", [FILES | {"encoding": "utf-16"}], {}),
    "files.documents": (
        "preprocess",
        [entry | {"documents": "file"} for entry in TEXTS],
        {"data__files": TEXTS},
    ),
    "data.text_field": ("preprocess", "body", {}),
    "data.label_field": ("preprocess", "topic", {}),
    "data.split_field": ("preprocess", "split", {}),
    "data.megabytes_per_domain": ("preprocess", 0.005, {}),
    "data.min_document_bytes": ("preprocess", 60, {}),
    "data.max_document_bytes": ("preprocess", 1024, {}),
    "data.paragraph_bytes": ("preprocess", 500, {"data__files": TEXTS}),
    "data.max_bad_share": ("preprocess", 0.001, {}),
    "data.valid_share": ("preprocess", 0.3, {}),
    "data.test_share": ("preprocess", 0.3, {}),
    "data.seed": ("preprocess", 1, {}),
    "partition.by": ("preprocess", "random", {"partition__count": 2}),
    "partition.domains": ("preprocess", ("a",), {"router__top_k": 1}),
    "partition.labels": ("preprocess", {"a": ("b",), "b": ("a",)}, {}),
    "partition.count": ("preprocess", 3, CLUSTERS),
    "partition.difficulty": (
        "preprocess",
        "rarity",
        {"partition__by": "curriculum", "partition__count": 2},
    ),
    "partition.sample_documents": ("preprocess", 10, CLUSTERS),
    "partition.min_tokens": ("preprocess", 10**6, {}),
    "partition.overlap": (ALPHA, 0.9, {}),
    "tokenizer.pretrained": ("preprocess", "tokenizer", {}),
    "tokenizer.vocab_size": ("preprocess", 290, {}),
    "tokenizer.sample_megabytes": ("preprocess", 0.001, {}),
    **_fit("trunk", "train_shared"),
    "trunk.init": ("train_shared", "checkpoint", {"tokenizer__pretrained": "tokenizer"}),
    "trunk.layers": ("train_shared", 3, {}),
    "trunk.d_model": ("train_shared", 24, {}),
    "trunk.heads": ("train_shared", 4, {}),
    "trunk.kv_heads": ("train_shared", 2, {}),
    "trunk.head_dim": ("train_shared", 4, {}),
    "trunk.d_ff": ("train_shared", 16, {}),
    "trunk.context_tokens": ("train_shared", 16, {}),
    "trunk.rope_theta": ("train_shared", 100.0, {}),
    "trunk.tie_embeddings": ("train_shared", False, {}),
    "trunk.domains": ("train_shared", ("alpha",), {}),
    "trunk.mixture": ("train_shared", "equal", {}),
    "trunk.statistics_tokens": ("train_shared", 64, {}),
    "trunk.anchor": ("train_router", "keep", {}),
    **_fit("expert", ALPHA),
    "expert.init": (ALPHA, "fresh", {}),
    "expert.form": (ALPHA, "low_rank", {}),
    "expert.rank": (ALPHA, 3, {"expert__form": "low_rank"}),
    "expert.alpha": (ALPHA, 3.0, {"expert__form": "low_rank"}),
    "expert.layers": (ALPHA, "last:1", {}),
    "expert.coordinate": (ALPHA, True, {}),
    "expert.coordinate_bias": (ALPHA, -2.0, {"expert__coordinate": True}),
    "expert.z_weight": (ALPHA, 1.0, {"expert__coordinate": True}),
    "expert.statistics_tokens": (ALPHA, 64, {}),
    "expert.statistics_path": (ALPHA, "base", {}),
    "expert.domains": ("train_router", ("gamma", "alpha"), {}),
    **_fit("router", "train_router"),
    "router.init": ("train_router", "centroid", {}),
    "router.ridge_lambda": ("train_router", 5.0, {}),
    "router.margin": ("train_router", 1.0, {}),
    "router.top_k": ("train_router", 1, {}),
    "router.temperature": ("train_router", {"start": 3.0}, {}),
    "temperature.start": (
        "train_router",
        {"start": 3.0, "end": 0.5},
        {"router__temperature": {"end": 0.5}},
    ),
    "temperature.end": (
        "train_router",
        {"start": 3.0, "end": 0.5},
        {"router__temperature": {"start": 3.0}},
    ),
    "temperature.epochs": (
        "train_router",
        {"epochs": 0.01},
        {"router__temperature": {"start": 3.0}},
    ),
    "router.balance": ("train_router", "aux", {}),
    "router.balance_weight": ("train_router", 9.0, {"router__balance": "aux"}),
    "router.z_weight": ("train_router", 1.0, {}),
    "router.noise": ("train_router", 1.0, {}),
    "router.capacity_factor": ("train_router", 0.5, {}),
    "dense.baselines": ("evaluate", ("path",), {}),
    "dense.domains": (PATH, ("beta",), {}),
    "dense.lr": (PATH, 0.5, {}),
    **_fit("joint", MOE),
    "joint.models": ("evaluate", ("moe",), {}),
    "joint.domains": (MOE, ("beta",), {}),
    "joint.mixture": (MOE, "equal", {}),
    "joint.layers": (MOE, "all", {}),
    "joint.experts": (MOE, 2, {}),
    "joint.top_k": (MOE, 2, {}),
    "joint.aux_weight": (MOE, 9.0, {}),
    "joint.capacity_factor": (MOE, 0.5, {}),
    "joint.temperature": (MOE, {"start": 3.0}, {}),
    "joint.dropout": (MOE, 0.5, {}),
    "joint.label_smoothing": (MOE, 0.5, {}),
    "score.bytes_per_domain": ("score stack", 60, {}),
    "evaluate.tokens_per_domain": ("evaluate", 64, {}),
    "evaluate.rivals": ("evaluate", "few", {}),
    "evaluate.continuation_tokens": ("evaluate", 4, {"evaluate__samples": 1}),
    "evaluate.samples": ("evaluate", 1, {}),
    "evaluate.min_expert_share": ("evaluate", 1.0, {}),
    "evaluate.gap_share": ("evaluate", 1.0, {"dense__baselines": ("path",)}),
}
# Of an expert alone: no baseline is trained by them
OF_EXPERTS_ALONE = (
    *("init", "form", "rank", "alpha", "layers"),
    *("coordinate", "coordinate_bias", "z_weight", "statistics_tokens", "statistics_path"),
)
BY_NAME = {  # settings whose effect is not in a product: the test that shows it
    "family": "test_the_family_is_looked_up",
    "data.source": "test_source_and_hub_decide_what_is_opened",
    "data.hub": "test_source_and_hub_decide_what_is_opened",
    "hub.dataset": "test_source_and_hub_decide_what_is_opened",
    "hub.subset": "test_source_and_hub_decide_what_is_opened",
    "hub.split": "test_source_and_hub_decide_what_is_opened",
    "hub.revision": "test_source_and_hub_decide_what_is_opened",
    "hub.domain": "test_source_and_hub_decide_what_is_opened",
    "hub.allow_fewer_rows": "test_fewer_rows_are_taken_where_they_are_allowed",
    "tokenizer.revision": "test_revisions_reach_the_hub",
    "tokenizer.max_lost_share": "test_a_lossy_one_is_refused_by_preprocess_or_told_in_its_metrics",
    "trunk.revision": "test_revisions_reach_the_hub",
    "expert.imported": "test_what_was_packed_is_imported_bit_for_bit",
    "expert.imported_text": "test_without_statistics_public_text_is_summed",
    "expert.imported_bytes": "test_a_package_over_the_limit_is_refused_before_it_is_read",
    "expert.imported_slack": "test_an_adapter_of_another_base_is_told_by_text_of_its_domain",
    "router.prompt_tokens": "test_prompt_tokens_and_threshold_reach_the_router",
    "router.threshold": "test_prompt_tokens_and_threshold_reach_the_router",
    "evaluate.batch_sequences": "test_batches_of_the_report_change_their_number_and_no_figure",
    "evaluate.bootstrap": "test_documents_are_resampled_as_often_as_asked",
    "lrsearch.share": "test_a_search_is_planned_at_a_share_of_its_trainings",
    "lrsearch.steps": "test_steps_of_each_rate_can_be_given",
    "deploy.dense": "test_the_dense_model_goes_along_as_a_stock_checkpoint",
    "deploy.upload": "test_a_bundle_is_uploaded_where_it_is_asked_to_go",
    "deploy.keep": "test_a_bundle_is_uploaded_where_it_is_asked_to_go",
    **{
        f"{section}.{name}": "test_means_reach_their_training"
        for section in ("trunk", "expert", "router", "joint")
        for name in ("checkpointing", "fuse_optimizer", "compile")
    },
    "runtime.memory_budget": "test_means_reach_their_training",
    "runtime.threads": "test_threads_reach_the_job",
    "runtime.save_every_s": "test_runtime_reaches_the_training_loop",
    "runtime.log_every_steps": "test_runtime_reaches_the_training_loop",
    "runtime.wandb": "test_runtime_reaches_the_training_loop",
    "runtime.wandb_project": "test_runtime_reaches_the_training_loop",
    "runtime.wandb_group": "test_runtime_reaches_the_training_loop",
    **{f"serve.{name}": "test_limits_reach_the_server" for name in test_serve_limits.OTHERS},
}
SHOWN_IN = (
    test_wiring,
    test_foreign_tokenizers,
    test_adapter_experts,
    test_dense_beside,
    test_lr_search,
    test_expert_package,
    test_foreign_adapters,
    test_serve_limits,
)
# Their effects need Modal's own client: test_modal*.py, test_cloud*.py
ON_MODAL = ("modal", "trainer", "worker", "endpoint")


def settings(run: type[RunConfig] = FfnMoeConfig) -> set[str]:
    """Return every setting as section.field; fields of Fit under each section that has them,
    sections left out."""
    found, waiting = set(), [("", run)]
    while waiting:
        name, section = waiting.pop()
        for key, field in section.model_fields.items():
            inner = [
                t
                for t in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if _is_section(t)
            ]
            waiting += [(kind.__name__.removesuffix("Config").lower(), kind) for kind in inner]
            if (not inner or name) and not is_hidden(field):
                found.add(f"{name}.{key}" if name else key)
    return found


def _is_section(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def test_every_setting_is_listed_with_its_effect():
    own = {name for name in settings() if name.partition(".")[0] not in ON_MODAL}
    assert own == EFFECTS.keys() | BY_NAME.keys()
    assert not EFFECTS.keys() & BY_NAME.keys()
    shown = {name for home in SHOWN_IN for name in vars(home) if name.startswith("test_")}
    assert set(BY_NAME.values()) <= shown


def test_every_setting_of_modal_is_in_the_tests_of_modal():
    folder = Path(__file__).parent
    files = [*folder.glob("test_modal*.py"), *folder.glob("test_cloud*.py")]
    text = "".join(path.read_text("utf-8") for path in files)
    names = {name.partition(".")[2] for name in settings() if name.partition(".")[0] in ON_MODAL}
    assert not {name for name in names if not re.search(rf"\b{name}\b", text)}


PRODUCED: dict[tuple, str] = {}  # the unchanged side, once per stage and base


def _changes(dotted: str, value) -> dict:
    section, _, name = dotted.rpartition(".")
    prefix = {"files": "data__files", "temperature": "router__temperature"}.get(section)
    return {prefix: value} if prefix else {f"{section}__{name}" if section else name: value}


def unchanged(trained, stage: str, base: dict, folder) -> str:
    """Return the product of a stage before a change; it is made once."""
    key = (stage, repr(base))
    if key not in PRODUCED:
        PRODUCED[key] = product(trained, stage, base, folder / f"unchanged{len(PRODUCED)}")
        assert ": " not in PRODUCED[key][:40] or stage == "evaluate", PRODUCED[key]
    return PRODUCED[key]


@pytest.mark.parametrize("dotted", EFFECTS)
def test_changing_a_setting_changes_the_product(dotted, trained, tmp_path):
    stage, value, base = EFFECTS[dotted]
    changed = product(trained, stage, base | _changes(dotted, value), tmp_path / "changed")
    assert changed != unchanged(trained, stage, base, tmp_path)


@dataclass
class Together:
    """Settings that are changed at once."""

    base: dict  # what both sides have
    changes: dict
    names: list[str]


def together(trained, names, base: dict) -> list[Together]:
    """Return settings in groups of the same base that one configuration may have changed: where
    none of them changes a product, one product says it of all."""
    groups: list[Together] = []
    for dotted in names:
        _, value, own = EFFECTS.get(dotted, (None, True, {}))
        one, change = base | own, _changes(dotted, value)
        fitting = [
            group
            for group in groups
            if group.base == one and _is_run(trained, one | group.changes | change)
        ]
        if not fitting:
            fitting = [Together(one, {}, [])]
            groups += fitting
        fitting[0].changes |= change
        fitting[0].names.append(dotted)
    return groups


def _is_run(trained, changes: dict) -> bool:
    try:
        small.config(**resolved(trained, changes))
    except (ValueError, PipelineError):
        return False
    return True


BASELINES = {"dense__baselines": ("path", "wide")}
FITS = ("expert.", "router.", "dense.")  # a trunk's settings are all in or come by its address


def content_of(trained, stage: str, changes: dict) -> dict:
    """Return what the address of a job holds of a configuration, its inputs' addresses apart."""
    name, _, item = stage.partition(" ")
    return small.config(**resolved(trained, changes)).content(name, item or None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("train_shared", ["trunk.checkpointing"]),
        (ALPHA, ["expert.checkpointing"]),
        (PATH, ["expert.checkpointing", *(f"expert.{name}" for name in OF_EXPERTS_ALONE)]),
        ("train_dense wide", ["trunk.checkpointing"]),
        ("train_joint dense", ["joint.checkpointing"]),
    ],
)
def test_what_cannot_change_a_result_is_not_in_its_address(stage, names, dtype, trained, tmp_path):
    for more in ({}, {f"{names[0].partition('.')[0]}__micro_batch_sequences": 2}):
        base = BASELINES | more | {"dtype": dtype}
        for number, group in enumerate(together(trained, names, base)):
            changed = group.base | group.changes
            held = content_of(trained, stage, changed)
            assert held == content_of(trained, stage, group.base), group.names
            found = product(trained, stage, changed, tmp_path / f"{number}{len(more)}")
            assert found == unchanged(trained, stage, group.base, tmp_path), group.names


def test_fused_steps_stay_in_addresses_as_they_forbid_micro_batches(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "FAST_TOKENS", 2 * small.CONTEXT)
    fused = {"trunk__clip_norm": 0.0, "trunk__fuse_optimizer": True}
    plain = {"trunk__clip_norm": 0.0}
    assert product(trained, "train_shared", fused, tmp_path / "1") != product(
        trained, "train_shared", plain, tmp_path / "2"
    )
    assert content_of(trained, "train_shared", fused) != content_of(trained, "train_shared", plain)


@pytest.mark.parametrize("item", ["path", "wide"])
def test_the_address_of_a_baseline_moves_with_what_it_is_trained_by_and_nothing_else(
    item, trained, tmp_path
):
    """Whatever setting of the other trainings is changed: bytes and address move together."""
    stage, moved, changed = f"train_dense {item}", [], set()
    base = BASELINES | {"trunk__steps": 1}
    names = [each for each in EFFECTS if each.startswith(FITS) and each != "dense.baselines"]
    for dotted in names:
        _, value, own = EFFECTS[dotted]
        other = content_of(trained, stage, base | own | _changes(dotted, value))
        if other != content_of(trained, stage, base | own):
            moved.append(dotted)
    groups = together(trained, [each for each in names if each not in moved], base)
    for dotted in moved:
        groups += together(trained, [dotted], base)
    for number, group in enumerate(groups):
        found = product(trained, stage, group.base | group.changes, tmp_path / f"{number}")
        if found != unchanged(trained, stage, group.base, tmp_path):
            changed |= {*group.names}
    assert {*moved} == changed > {"expert.steps", "expert.domains"}


@pytest.mark.parametrize(
    "stage", ["preprocess", "train_shared", ALPHA, "train_router", PATH, "evaluate"]
)
def test_the_same_configuration_gives_the_same_product(stage, trained, tmp_path):
    assert product(trained, stage, {}, tmp_path / "one") == product(
        trained, stage, {}, tmp_path / "two"
    )
