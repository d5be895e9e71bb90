"""Learning rates of adapters that are found: which jobs a run then has, what they leave, who takes
it."""

import io
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from fakes import FakeRecorder, train_io
from rich.console import Console

from pipeline.errors import DataError
from pipeline.families.adapters import rates
from pipeline.families.lora_vlm import family
from pipeline.report import show
from pipeline.report.schema.base import RateSearch, TriedRate
from pipeline.report.schema.requests import RequestReport
from pipeline.run.stages import Addresses
from pipeline.train import lr_search as lr_searching
from pipeline.train.lr_search import FOUND, search
from tests import lora_small

AUTO = {"loras__defaults__lr": "auto", "lr_search__steps": 1}


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch):
    # In a process of all these tests it takes longer than anything else here
    monkeypatch.setattr(lr_searching, "gc", SimpleNamespace(collect=lambda: 0))


def with_rate(name, lr) -> dict:
    """Return the entries of experts with a rate for one of them."""
    entries = []
    for entry in lora_small.SETTINGS["loras"]["experts"]:
        own = {"overrides": {"lr": lr}} if entry["name"] == name else {}
        entries.append(entry | own)
    return {"loras__experts": entries}


def test_each_adapter_whose_rate_is_open_is_searched_by_itself():
    cfg = lora_small.config(**AUTO)
    assert cfg.items("lr_experts") == ("color", "dots") and cfg.items("lr_router") == (None,)
    assert ("lr_experts", "dots") in cfg.needs("train_experts", "dots")
    assert ("lr_experts", "color") not in cfg.needs("train_experts", "dots")
    one = lora_small.config(**with_rate("dots", "auto"))
    assert one.items("lr_experts") == ("dots",) and one.items("lr_router") == ()
    none = lora_small.config(loras__defaults__lr="auto", loras__defaults__steps=0)
    assert none.items("lr_experts") == ()  # Nothing moves


def test_a_search_moves_the_addresses_of_its_own_adapter_alone():
    plain = Addresses(lora_small.config())
    same = Addresses(lora_small.config(lr_search__steps=1))
    own = Addresses(lora_small.config(**with_rate("dots", "auto")))
    other = Addresses(lora_small.config(**with_rate("dots", "auto"), lr_search__steps=1))
    for stage, item in (("train_experts", "color"), ("train_router", None)):
        assert plain.of(stage, item) == same.of(stage, item) == own.of(stage, item)
    found = {each.of("train_experts", "dots") for each in (plain, own, other)}
    assert len(found) == 3


@pytest.mark.parametrize("item", ["dots", None])
def test_what_is_found_is_what_the_training_takes(item, tmp_path):
    parts = lora_small.prepared(tmp_path, **AUTO)
    look = family.lr_expert if item else family.lr_router
    wanted = look(parts.cfg, parts, *([item] if item else []))
    assert wanted.steps == 1 and wanted.middle == rates.MIDDLE
    short = wanted.task(1e-2)
    assert (short.steps, short.options.rate, short.options.keep) == (1, 1e-2, "last")
    found, metrics = search(wanted, train_io(tmp_path / "slots"), lambda *_: FakeRecorder())
    assert found.lr in [each.lr for each in found.tried] and metrics["tokens"] > 0
    stage = "lr_experts" if item else "lr_router"
    (parts.new(stage, item) / FOUND).write_text(json.dumps(asdict(found)))
    made = lora_small.task_of(parts, item or "router")
    assert made.options.rate == found.lr and made.steps == 6


def test_without_rows_to_compare_on_a_rate_is_asked_for():
    made = SimpleNamespace(validate=None)
    with pytest.raises(DataError, match=r"dots.overrides.lr: auto compares rates on validation"):
        rates.search_for(lora_small.config(**AUTO), "dots", lambda _cfg: made)


def test_plan_tells_what_a_search_takes_and_whose_rate_it_finds():
    cfg = lora_small.config(**AUTO)
    made = {("preprocess", "dots"): {"rows": {"train": 24}}}
    searched = family.cost(cfg, "lr_experts", "dots", made, False)
    trained = family.cost(cfg, "train_experts", "dots", made, False)
    assert searched.tokens == 4 * trained.tokens // 6 and "4 rates" in searched.summary
    assert "lr from lr_experts" in trained.summary and searched.flops > 0


def test_a_report_tells_the_rates_that_were_tried():
    tried = (TriedRate(lr=1e-4, nats=2.5), TriedRate(lr=3e-4, nats=None))
    found = RateSearch(job="lr_experts dots", lr=1e-4, steps=6, before_nats=3.0, tried=tried)
    console = Console(width=120, file=io.StringIO())
    show(RequestReport(run="r", family="lora_vlm", rates=(found,)), console)
    text = console.file.getvalue()
    assert "Learning rates that were searched" in text
    assert "lr_experts dots" in text and "diverged" in text
