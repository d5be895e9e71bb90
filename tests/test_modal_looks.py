"""Which data a run on Modal goes by: one container looks, all go by that look, and the laptop by
what was looked at last."""

import os

import pytest
from fakes import StubbedVolume
from small_sources import text_run
from test_cloud_client import PRICES, far
from test_cloud_leases import FakeTable

from pipeline import cloud
from pipeline.errors import DataError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import load, parse
from pipeline.run import stages
from pipeline.store.artifacts import Store


def edited(file):
    """Write something else, at another time: on a volume nothing else tells."""
    file.write_text(file.read_text().replace("the ", "thy ", 1))
    when = file.stat().st_mtime_ns + 1
    os.utime(file, ns=(when, when))


class Looked:
    """A run whose data lie where its containers see them, on a volume of this test's own."""

    def __init__(self, folder):
        self.volume = StubbedVolume(folder / "volume")
        self.path = text_run(folder / "run")
        self.file = folder / "run/sea/1.jsonl"
        self.cfg = load(self.path)

    def laptop(self, cfg=None, **how):
        """Return what a laptop goes by, and what it says."""
        return cloud.as_recorded(cfg or self.cfg, *far(self.volume.path), **how)

    def conductor(self, cfg, frozen=False):
        """Return the run that whoever hands out jobs goes by."""
        view = self.volume.view()
        store = Store(view.path, publish=view.commit, refresh=view.reload)
        return cloud.looked_at(parse(cfg.model_dump(mode="json")), store, frozen)

    def work(self, cfg):
        """Make tokenizer and domains in containers of their own; return how the first ended."""
        raw = cfg.model_dump(mode="json")
        results = []
        for stage in ("tokenizer", "preprocess"):
            view = self.volume.view()
            items = list(cfg.items(stage))
            results += cloud.work(stage, raw, items, view.path, view.commit, view.reload)
        assert len({result.state for result in results}) == 1
        return results[0]


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    return Looked(tmp_path)


def test_the_laptop_looks_at_nothing_and_says_what_is_not_known(run, tmp_path, monkeypatch):
    there = run.conductor(run.laptop()[0])

    def look(*_args):
        raise AssertionError("a laptop does not see the volume")

    monkeypatch.setattr(FfnMoeConfig, "look", look)
    here, notes = run.laptop()
    assert here.identity == there.identity != {} and notes == []
    other, notes = run.laptop(load(run.path, ("data.valid_share=0.2",)))
    assert other.identity == {} and "what tokenizer, preprocess sea, " in notes[0]
    mirror = cloud.mirror(here, tmp_path / "mirror", *far(run.volume.path))
    [job] = cloud.estimate(here, ("tokenizer",), mirror, PRICES)
    assert (job.address, job.state) == (stages.address(there, "tokenizer"), "to do")


def test_containers_make_what_was_looked_at_or_nothing(run, tmp_path):
    cfg = run.conductor(run.laptop()[0])
    edited(run.file)
    late = run.work(cfg)
    assert late.state == "failed" and "1.jsonl changed since it was looked at" in late.error
    again = run.conductor(run.laptop()[0])
    made = run.work(again)
    # whatever becomes of the data while others are still to begin
    edited(run.file)
    assert run.work(again).address == made.address == stages.address(again, "tokenizer")
    assert late.address == stages.address(cfg, "tokenizer") != made.address
    # another look, under --frozen, goes on with what was made
    assert run.conductor(run.laptop()[0]).identity != again.identity
    frozen, notes = run.laptop(frozen=True)
    assert frozen.identity == again.identity == run.conductor(frozen, frozen=True).identity
    assert notes == []
    # what the laptop plans with is newer than what stands, and it says so
    here, _ = run.laptop()
    mirror = cloud.mirror(here, tmp_path / "mirror", *far(run.volume.path))
    [job] = cloud.estimate(here, ("tokenizer",), mirror, PRICES)
    assert job.state == "to do" and "1.jsonl changed since it was read last" in job.why


def test_all_attempts_of_a_run_go_by_what_the_first_one_saw(run):
    table = FakeTable()
    limited = run.cfg.model_copy(
        update={"modal": run.cfg.modal.model_copy(update={"max_cost_usd": 5.0})}
    )

    def attempt(called):
        view = run.volume.view()
        store = Store(view.path, publish=view.commit, refresh=view.reload)
        return cloud.looked_at_once(limited, store, False, table, called)

    first = attempt("run-1")
    # A day later
    edited(run.file)
    assert attempt("run-1") == first
    assert attempt("run-2").identity != first.identity


def test_under_a_limit_on_the_cost_nothing_begins_that_was_not_planned_for(run):
    limited = run.cfg.model_copy(
        update={"modal": run.cfg.modal.model_copy(update={"max_cost_usd": 5.0})}
    )
    # what nobody knew was counted as to be done
    first = run.conductor(run.laptop(limited)[0])
    edited(run.file)
    with pytest.raises(
        DataError, match=r"what .*tokenizer.* reads has changed since it was looked at"
    ):
        run.conductor(run.laptop(limited)[0])
    second, _ = run.laptop(limited)
    assert run.conductor(second).identity == second.identity != first.identity
    edited(run.file)
    assert run.conductor(run.laptop()[0]).identity != second.identity


def test_a_domain_without_a_document_is_told_before_a_container_is_paid_for(run):
    for file in run.file.parent.iterdir():
        file.write_text("")
    cfg = run.conductor(run.laptop()[0])

    def nobody(*_):
        pytest.fail("handed out a job")

    told = []
    wanted = ("tokenizer", "preprocess")
    results = cloud.orchestrate(cfg, wanted, Store(run.volume.path), nobody, "again", told.append)
    assert [(each.stage, each.state) for each in results] == [("tokenizer", "failed")]
    assert "preprocess sea: no usable document in data.files" in results[0].error
    assert told == [results[0].error]
