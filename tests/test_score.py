"""Models measured by themselves: what stock classes and the report score of the same documents, and
which documents these are."""

import math

import numpy as np
import pytest
import torch
from fakes import FolderParts
from transformers import AutoModelForCausalLM

from pipeline.config.run import source_key
from pipeline.families.ffn_moe import evaluate
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.parts import shards_of
from pipeline.families.ffn_moe.score import _print_of, first_documents, score
from pipeline.metrics.language import Documents
from pipeline.protocols import quiet
from pipeline.run.stages import Addresses
from tests import small

OF_ADAPTERS = {"steps": 0, "top_k": 1, "prompt_tokens": 4}
ALL = {"evaluate__tokens_per_domain": 10**6}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A whole run with a dense baseline and both joint models."""
    cfg = small.config(
        dense__baselines=("path",), joint__models=("dense", "moe"), joint__layers=(1,), **ALL
    )
    return small.run(cfg, tmp_path_factory.mktemp("score") / "run")


def scored(parts, folder, item, **changes):
    cfg = FfnMoeConfig.model_validate(parts.cfg.model_dump() | changes)
    folder.mkdir()
    return score(cfg, FolderParts(cfg, parts.root, parts.metrics), folder, quiet, item)


@pytest.mark.parametrize("item", ["dense", "moe"])
def test_a_joint_model_scores_what_the_stock_class_does(parts, tmp_path, item):
    model = AutoModelForCausalLM.from_pretrained(parts.folder("train_joint", item)).eval()
    shards = shards_of(parts, small.DOMAINS)
    found = scored(parts, tmp_path / "out", f"joint_{item}")
    for domain in small.DOMAINS:
        stream = torch.from_numpy(shards.stream("test", domain).astype(np.int64))
        starts, sizes = shards.documents("test", domain)
        nats = 0.0
        for begin in range(0, len(stream) - 1, small.CONTEXT):
            ids = stream[begin : begin + small.CONTEXT + 1]
            with torch.no_grad():
                logits = model(ids[None, :-1]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            # What leads a document is given
            given = torch.isin(torch.arange(begin + 1, begin + len(ids)), torch.tensor(starts))
            nats += losses[~given].sum().item()
        expected = nats / sizes.sum() / math.log(2)
        assert found["bits_per_byte_by_domain"][domain] == pytest.approx(expected, rel=1e-5)
    mean = np.mean(list(found["bits_per_byte_by_domain"].values()))
    assert found["bits_per_byte"] == pytest.approx(mean)
    assert found["documents"] == 3 * 8


def test_every_model_scores_what_the_report_says_of_it(parts, tmp_path):
    report = evaluate.tables(parts.cfg, parts, quiet)
    rows = {row.name: row.bits_per_byte for row in report.quality}
    names = {"joint_moe": "joint moe top-1", "joint_dense": "joint dense"}
    names["dense_path"] = "dense path"
    names["stack"] = next(row.name for row in report.quality if row.is_stack)
    assert set(names) == set(parts.cfg.scored)
    for item, name in names.items():
        found = scored(parts, tmp_path / item, item)
        assert found["bits_per_byte_by_domain"] == pytest.approx(rows[name], rel=1e-6)


def test_documents_are_counted_in_bytes_and_known_whatever_their_tokens_are(parts, tmp_path):
    shards = shards_of(parts, small.DOMAINS)
    starts, sizes = shards.documents("test", "alpha")
    few = first_documents(shards, "alpha", int(sizes[:3].sum()))
    assert (few.bytes_n.tolist(), few.starts_n.tolist()) == (
        sizes[:3].tolist(),
        starts[:4].tolist(),
    )
    assert len(first_documents(shards, "alpha", int(sizes[:3].sum()) - 1).bytes_n) == 2
    # At least one, however large it is
    assert len(first_documents(shards, "alpha", 1).bytes_n) == 1
    other = Documents("alpha", 2 * few.starts_n, few.bytes_n, lead=2)
    assert _print_of({"alpha": few}) == _print_of({"alpha": other})
    assert _print_of({"alpha": few}) != _print_of({"beta": few})
    whole = scored(parts, tmp_path / "whole", "stack")
    part = scored(parts, tmp_path / "part", "stack", score={"bytes_per_domain": 100})
    assert part["documents"] < whole["documents"] and part["text"] != whole["text"]


def test_a_model_is_measured_by_what_it_is_made_of_alone(parts):
    cfg = parts.cfg
    texts = [("preprocess", domain) for domain in small.DOMAINS]
    assert cfg.needs("score", "joint_moe") == [*texts, ("train_joint", "moe")]
    assert cfg.needs("score", "dense_path") == [*texts, ("train_dense", "path")]
    of_stack = [stage for stage, _ in cfg.needs("score", "stack")]
    trainings = ["train_shared", *["train_experts"] * 3, "train_router"]
    assert of_stack == [*["preprocess"] * 3, *trainings]
    assert small.config(expert__form="adapter", router=OF_ADAPTERS).scored == ()


def test_measuring_moves_no_other_address(parts):
    before = Addresses(parts.cfg)
    after = Addresses(
        FfnMoeConfig.model_validate(parts.cfg.model_dump() | {"score": {"bytes_per_domain": 9}})
    )
    for stage in parts.cfg.stages:
        for item in parts.cfg.items(stage):
            is_same = before.of(stage, item) == after.of(stage, item)
            assert is_same == (stage != "score"), source_key(stage, item)
