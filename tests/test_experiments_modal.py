"""Experiments on Modal: priced before they start, and conducted with containers as functions of
this process."""

import io
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import Killed
from rich.console import Console
from test_cloud_leases import FakeTable
from test_experiments import lasting, written
from test_modal_looks import edited

from pipeline import cloud
from pipeline.cloud.experiments import conducted, planned
from pipeline.cloud.far import FarStore
from pipeline.cloud.leases import Leases
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.run.experiments.reading import base_of, read_experiments
from pipeline.run.experiments.trials import listed_trials
from pipeline.store.artifacts import Store

PRICES = cloud.Prices.load(Path(__file__).parent.parent / "config/prices.yaml")
FEW = {
    "trials": {"dense": {"makes": "joint dense"}, "moe": {"makes": "joint moe"}},
    "grids": {},
    "searches": {},
}
SEARCHED = {
    "find": {
        "makes": "joint moe",
        "space": {
            "joint.steps": {"low": 6, "high": 12, "whole": True},
            "joint.batch_sequences": {"choices": [8, 2]},
        },
        "trials": 5,
    }
}


@pytest.fixture
def volume(tmp_path):
    """A folder that stands for the volume, with the text of a tiny run on it."""
    written(tmp_path / "volume", **FEW)
    return tmp_path / "volume"


def on_modal(volume, *overrides, **sections):
    return read_experiments(written(volume, **FEW | sections), overrides)


def far(volume):
    """Return the volume as a laptop sees it."""

    def names(place):
        folder = volume / place
        return [each.name for each in folder.iterdir()] if folder.exists() else []

    def read(place):
        return (volume / place).read_bytes() if (volume / place).is_file() else None

    mirror = volume.parent / f"mirror{len(list(volume.parent.iterdir()))}"
    mirror.mkdir()
    return FarStore.asked_once(names, read, str(volume), mirror)


def in_this_process(volume, lost=()):
    """Return what does jobs here; those of the stages in lost are lost at the end."""

    def hand_out(jobs):
        for job in jobs:
            raw = job.addresses.cfg.model_dump(mode="json")
            given = (job.stage, raw, [job.item], volume)
            done = cloud.work(*given, lambda: None, lambda: None)
            yield [job], TimeoutError("gone") if job.stage in lost else done

    return hand_out


def nobody(*_):
    pytest.fail("handed out a job")


def test_every_job_is_priced_once_and_a_search_as_often_as_it_tries(volume):
    sweep, lines = planned(on_modal(volume), PRICES, far(volume), print)
    stages = [line.stage for line in lines]
    assert (stages.count("tokenizer"), stages.count("train_joint")) == (1, 2)
    assert set(sweep.identities) == {"dense seed 0", "moe seed 0"}
    assert sweep.experiments.settings.base["dtype"] == "fp32"
    limited = on_modal(volume, "base.modal.max_cost_usd=0.0001", searches=SEARCHED)
    said = []
    _, more = planned(limited, PRICES, far(volume), said.append)
    # Of each setting its dearest value, whichever end that is, as often as it tries one
    added = more[len(lines) :]
    trained = [line for line in added if line.trains]
    assert len(trained) == 5 and {line.tokens for line in trained} == {12 * 8 * 32}
    # and each is measured
    assert [line.stage for line in added if not line.trains] == ["score"] * 5
    each = sum(line.usd for line in added) / 5
    assert f"each is counted at ${each:.2f}, the dearest at the ends of its space" in said[-1]
    with pytest.raises(ConfigError, match="above modal.max_cost_usd 0.00"):
        cloud.refuse_above(base_of(limited), more, PRICES, False)


def test_the_text_alone_costs_nothing_and_has_epochs_priced(volume):
    in_epochs = on_modal(volume, "base.joint.epochs=1", "base.modal.max_cost_usd=100")
    cfg = base_of(in_epochs)
    _, lines = planned(in_epochs, PRICES, far(volume), print)
    with pytest.raises(ConfigError, match="cannot be priced before the tokens are counted"):
        cloud.refuse_above(cfg, lines, PRICES, False)
    sweep, lines = planned(in_epochs, PRICES, far(volume), print, text_only=True)
    assert {line.stage for line in lines} == {"tokenizer", "preprocess"}
    cloud.refuse_above(cfg, lines, PRICES, False)
    made = conducted(sweep, Store(volume), in_this_process(volume), "modal run", False)
    assert [run.state for each in made.trials for run in each.runs] == ["missing", "missing"]
    _, lines = planned(in_epochs, PRICES, far(volume), print)
    cloud.refuse_above(cfg, lines, PRICES, False)
    assert sum(line.usd for line in lines if line.trains) > 0


def test_a_sweep_in_containers_leaves_its_results_on_the_volume(volume):
    sweep, lines = planned(on_modal(volume), PRICES, far(volume), print)
    # One that is lost after it has published has done its job
    containers = in_this_process(volume, lost=("train_joint",))
    ledger = cloud.Ledger(Store(volume), FakeTable(), "run", cloud.Expected(PRICES))
    price = cloud.pricing(ledger, Store(volume))
    killed = []

    def once_killed(jobs):
        """Have the one that conducts end in each stage once, when all jobs are done."""
        came = list(containers(jobs))
        if jobs[0].stage not in killed:
            killed.append(jobs[0].stage)
            raise Killed
        return came

    first = None
    while first is None:
        with suppress(Killed):
            first = conducted(sweep, Store(volume), once_killed, "modal run", False, price=price)
    assert killed == ["tokenizer", "preprocess", "train_joint", "score"]
    assert [run.state for each in first.trials for run in each.runs] == ["done", "done"]
    assert (volume / "experiments/tried/experiment_results.json").exists()
    assert (volume / "experiments/tried/dense/seed-0/model.safetensors").exists()
    # Each by its own settings, before any of it began: as the laptop does, which knew no look yet
    assert sorted(ledger.expected.usd.values()) == sorted(line.usd for line in lines)
    for trial in listed_trials(on_modal(volume)):
        cfg, _ = cloud.as_recorded(trial.cfg, far(volume).names, far(volume).read)
        looked = replace(trial, cfg=cfg)
        assert all(map(ledger.expected.knows, looked.measured.values()))
    paid_for = []
    again = conducted(sweep, Store(volume), nobody, "modal run", False, catch_up=paid_for.append)
    assert lasting(again) == lasting(first) and len(paid_for) == len(FEW["trials"])
    # What is there costs nothing more
    _, lines = planned(on_modal(volume), PRICES, far(volume), print)
    assert {line.state for line in lines} == {"done"}


def test_of_two_who_type_a_sweep_at_once_each_job_is_paid_once(volume):
    sweep, _ = planned(on_modal(volume), PRICES, far(volume), print)
    table, handed = FakeTable(), []
    first = Leases(table, "one")
    containers = in_this_process(volume)
    waited = []

    def by_two(jobs):
        handed.extend(job.stage for job in jobs)
        return containers(jobs)

    # The other one is at a training, and has it done while this one waits
    shared = []

    def by_one(jobs):
        if jobs[0].stage == "train_joint":
            shared.append(jobs[0])
            assert first.claim(jobs[0].address) is None
            return iter(())
        return containers(jobs)

    def wait(_seconds):
        waited.append(1)
        list(containers(shared))
        first.give_back([shared[0].address])

    conducted(sweep, Store(volume), by_one, "modal run", False, "one")
    leases = Leases(table, "two")
    made = conducted(sweep, Store(volume), by_two, "modal run", False, "two", leases, wait)
    assert [run.state for each in made.trials for run in each.runs] == ["done", "done"]
    assert handed == ["train_joint", "score", "score"] and len(waited) == 1


def test_all_attempts_at_a_sweep_go_by_what_the_first_one_saw(volume):
    sweep, _ = planned(on_modal(volume), PRICES, far(volume), print)
    table, handed = FakeTable(), []

    def killed(jobs):
        handed.append([job.address for job in jobs])
        raise Killed

    def attempt(run):
        given = (sweep, Store(volume), killed, "modal run", False, run)
        with pytest.raises(Killed):
            conducted(*given, Leases(table, run, run))
        return handed[-1]

    first = attempt("one")
    text = next(path for path in sorted(volume.rglob("*.jsonl")))
    edited(text)
    assert attempt("one") == first != []
    assert attempt("two") != first


def test_a_container_plans_a_sweep_as_a_laptop_would(volume):
    limited = on_modal(volume, "base.modal.max_cost_usd=0.0001")
    cfg = base_of(limited)
    wish = cloud.FarSweep.of(limited, False)
    console = Console(width=10_000, file=io.StringIO(), record=True)
    with pytest.raises(ConfigError) as refused:
        cloud.planned_sweep(wish, cfg, PRICES, far(volume), console)
    raw = cfg.model_dump(mode="json")
    there = cloud.planned_sweep_there(wish, raw, PRICES, volume, cloud.not_paid_for)
    assert (there.printed, there.wrong) == (console.export_text(), str(refused.value))
    free = cloud.FarSweep.of(on_modal(volume), False)
    raw = base_of(free.experiments).model_dump(mode="json")
    there = cloud.planned_sweep_there(free, raw, PRICES, volume)
    assert not there.wrong and there.sweep.identities
    assert there.sweep == planned(free.experiments, PRICES, far(volume), print)[0]


def test_other_text_than_was_priced_starts_nothing_under_a_limit(volume):
    limited = on_modal(volume, "base.modal.max_cost_usd=100")
    sweep, _ = planned(limited, PRICES, far(volume), print)
    sweep.identities["moe seed 0"]["tokenizer/"] = "another"
    with pytest.raises(DataError, match="moe seed 0 reads has changed since it was looked at last"):
        conducted(sweep, Store(volume), nobody, "modal run", False)


def test_what_no_container_can_do_is_told_before_anything_starts(volume):
    place = FarStore.asked_once(lambda _: [], lambda _: None, "/store", volume.parent)
    with pytest.raises(PipelineError, match="is on this machine, where Modal does not see it"):
        planned(on_modal(volume), PRICES, place, print)
