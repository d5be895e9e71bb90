"""Experiments on Modal: priced before they start, and conducted with containers as functions of
this process."""

from pathlib import Path

import pytest
from test_experiments import lasting, written

from pipeline import cloud
from pipeline.cloud.experiments import FarStore, conducted, planned
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.run.experiments.reading import base_of, read_experiments
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
        "space": {"joint.steps": {"low": 6, "high": 12, "whole": True}},
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
    """Return containers that do jobs here; those of the stages in lost are lost at the end."""

    def containers(stage, inputs):
        for items, raw in inputs:
            done = cloud.work(stage, raw, items, volume, lambda: None, lambda: None)
            yield TimeoutError("gone") if stage in lost else done

    return containers


def nobody(*_):
    pytest.fail("handed out a job")


def test_every_job_is_priced_once_and_a_search_as_often_as_it_tries(volume):
    sweep, lines = planned(on_modal(volume), PRICES, far(volume), print)
    stages = [line.stage for line in lines]
    assert (stages.count("tokenizer"), stages.count("train_joint")) == (1, 2)
    assert set(sweep.identities) == {"dense seed 0", "moe seed 0"}
    assert sweep.experiments.settings.base["dtype"] == "fp32"
    limited = on_modal(volume, "base.modal.max_cost_usd=0.0001", searches=SEARCHED)
    _, more = planned(limited, PRICES, far(volume), print)
    # The dearer end of what it may choose, as often as it tries one
    added = more[len(lines) :]
    assert len(added) == 5 and {line.tokens for line in added} == {12 * 8 * 32}
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
    sweep, _ = planned(on_modal(volume), PRICES, far(volume), print)
    # One that is lost after it has published has done its job
    containers = in_this_process(volume, lost=("train_joint",))
    first = conducted(sweep, Store(volume), containers, "modal run", False)
    assert [run.state for each in first.trials for run in each.runs] == ["done", "done"]
    assert (volume / "experiments/tried/experiment_results.json").exists()
    assert (volume / "experiments/tried/dense/seed-0/model.safetensors").exists()
    again = conducted(sweep, Store(volume), nobody, "modal run", False)
    assert lasting(again) == lasting(first)
    # What is there costs nothing more
    _, lines = planned(on_modal(volume), PRICES, far(volume), print)
    assert {line.state for line in lines} == {"done"}


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
