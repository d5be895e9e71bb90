"""Which rate a search ends with, what it leaves, and what its address knows.

The searches run on the smallest run of small.py; what a family's settings make of them is held
against the addresses and the plan.
"""

import gc
import json
import math
import shutil
import signal
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fakes import FakeRecorder, FolderParts, small_task, train_io

from pipeline.errors import Interrupted, MissingArtifact, PipelineError
from pipeline.families.ffn_moe import cost, lr_search
from pipeline.families.ffn_moe.joint.cost import joint_cost
from pipeline.families.ffn_moe.rates import trained_by
from pipeline.families.ffn_moe.stages import SEARCHES, STAGES
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run.dry_run import figures
from pipeline.run.job import run_job
from pipeline.run.stages import RUN, Addresses, label
from pipeline.store.artifacts import Store
from pipeline.store.history import read
from pipeline.train import lr_search as lr_searching
from pipeline.train.loop import fit
from pipeline.train.lr_search import FOUND, MOST_RATES, Search, rate_of, rung_of, search
from tests import small


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    # In a process of all these tests it takes longer than anything else here
    monkeypatch.setattr(lr_searching, "gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole small run with every dense baseline."""
    return small.trained(tmp_path_factory.mktemp("run") / "run")


def judged(loss_at, middle, notes=None, before=-math.inf):
    """Return what a search finds where a rate's validation loss is loss_at(rate), and `before` at
    the start: then nothing is gained, and no rates are alike."""
    losses = [before]

    def task(rate):
        made = small_task(steps=2, noisy=False, lr=rate, warmup_steps=0, keep="last")
        object.__setattr__(made, "validate", lambda: losses.pop() if losses else loss_at(rate))
        return made

    recorder = FakeRecorder()
    io = train_io("/nowhere")
    found, metrics = search(Search(task, middle, 2), io, lambda *_: recorder)
    if notes is not None:
        notes += recorder.notes
    return found, metrics


def test_rates_are_a_ladder_of_numbers_that_people_write():
    rates = [rate_of(rung) for rung in range(-9, -2)]
    assert rates == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert [rate_of(rung_of(rate)) for rate in rates] == rates


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (3e-4, [1e-4, 3e-4, 1e-3]),
        # Best at an end: one rung more, until the best has one on either side
        (1e-3, [1e-4, 3e-4, 1e-3, 3e-3]),
        (1e-2, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),
        (3e-5, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]),
    ],
)
def test_the_lowest_validation_loss_wins_and_a_best_at_an_end_extends(best, tried):
    found, metrics = judged(lambda rate: abs(math.log(rate / best)), 3e-4)
    assert (found.lr, [each.lr for each in found.tried]) == (best, tried)
    assert metrics["tokens"] == len(tried) * 2 * 8 * 4  # steps, rows, tokens of each


def test_of_rates_that_gain_alike_the_lowest_is_taken():
    losses = {1e-4: 3.0, 3e-4: 2.18, 1e-3: 2.0}  # from 3: gains of 0, .82 and 1
    found, _ = judged(lambda rate: losses.get(rate, 3.0), 3e-4, before=3.0)
    assert found.lr == 3e-4 and len(found.tried) == 3
    losses[3e-4] = 2.22
    found, _ = judged(lambda rate: losses.get(rate, 3.0), 3e-4, before=3.0)
    assert found.lr == 1e-3 and len(found.tried) == 4


def test_a_ladder_ends_somewhere():
    found, _ = judged(lambda rate: -rate, 3e-4)
    assert len(found.tried) == MOST_RATES and found.lr == found.tried[-1].lr


def test_a_rate_that_diverges_loses():
    notes = []
    found, _ = judged(lambda rate: math.nan if rate > 2e-4 else rate, 3e-4, notes)
    assert found.lr < 2e-4
    assert {each.lr for each in found.tried if each.valid_nats is None} == {3e-4, 1e-3}
    assert len([note for note in notes if "not finite" in note]) == 2


def test_rates_that_all_diverge_are_an_error_that_names_the_setting():
    with pytest.raises(
        PipelineError, match=r"at any rate from 1e-06 to 0.001; set trunk.lr to a l"
    ):
        judged(lambda _rate: math.inf, 3e-4)


def test_advice_names_the_rate_that_a_baseline_has(tmp_path):
    given = small.config(dense__lr=0.5)
    named = [given.rate_setting("train_dense", item) for item in ("total", "scratch")]
    assert named == ["dense.lr", "trunk.lr"]
    assert small.config().rate_setting("train_dense", "total") == "expert.lr"
    place = train_io(tmp_path, rate="dense.lr")
    with pytest.raises(PipelineError, match="Try a lower dense.lr, a longer trunk.warmup"):
        fit(replace(small_task(), validate=lambda: math.nan), place)


def test_a_real_divergence_loses_too():
    """With weights that become infinite on the way, and no loss planted."""
    tasks = []

    def task(rate):
        planted = 1e38 if rate > 5e-3 else rate
        made = small_task(
            steps=6, noisy=False, lr=planted, warmup_steps=0, clip_norm=0, keep="last"
        )
        tasks.append(weakref.ref(made.parameters["first"]))
        return made

    found, _ = search(Search(task, 3e-3, 6), train_io("/nowhere"), lambda *_: FakeRecorder())
    assert found.tried[-1].valid_nats is None and found.lr < found.tried[-1].lr
    gc.collect()
    assert not any(ref() is not None for ref in tasks)  # one after another, and none is kept


def test_a_search_that_is_stopped_ends_and_leaves_no_checkpoint(tmp_path):
    def task(rate):
        made = small_task(steps=2, noisy=False, lr=rate, warmup_steps=0, keep="last")
        object.__setattr__(made, "before_step", lambda _step: signal.raise_signal(signal.SIGINT))
        return made

    with pytest.raises(Interrupted, match="stopped at step 1 of 2"):
        search(Search(task, 1e-3, 2), train_io(tmp_path), lambda *_: FakeRecorder())
    assert not list(tmp_path.iterdir())


AUTO = dict.fromkeys(("trunk__lr", "expert__lr", "router__lr", "joint__lr"), "auto")
BOTH = {"joint__models": ("dense", "moe")}


def searched(parts, cfg, stage, *item):
    """Return what a family's search finds, and the tasks it made."""
    wanted = getattr(lr_search, stage)(cfg, parts, *item)
    tasks = []

    def task(rate):
        tasks.append(wanted.task(rate))
        return tasks[-1]

    io = train_io("/nowhere")
    found, _ = search(Search(task, wanted.middle, wanted.steps), io, lambda *_: FakeRecorder())
    return found, tasks


# What the settings of an expert's form ask for beside it
FORMS = {
    "full": {},
    "low_rank": {"expert__rank": 2},
    "adapter": {"expert__rank": 8, "router": {"steps": 0, "top_k": 1, "prompt_tokens": 4}},
}
# A search, its job, and a training that it is for
OF = [
    ("lr_shared", (), "train_shared", ()),
    ("lr_experts", (), "train_experts", ("beta",)),
    ("lr_router", (), "train_router", ()),
    ("lr_dense", ("all",), "train_dense", ("path",)),
    ("lr_dense", ("ffn",), "train_dense", ("ffn",)),
    ("lr_joint", ("moe",), "train_joint", ("moe",)),
]


@pytest.mark.parametrize(("stage", "item", "training", "of"), OF)
def test_a_search_is_its_training_in_small(trained, stage, item, training, of):
    found, tasks = searched(trained, small.config(**AUTO, **BOTH), stage, *item)
    assert found.lr in [task.options.lr for task in tasks]
    whole = small.MAKERS[training](small.config(**BOTH), trained, *of)
    # One more is judged before any step
    assert len(tasks) - 1 == len(found.tried) >= 3
    for task in tasks:
        assert task.parameters.keys() == whole.parameters.keys()
        assert task.memory_plan == whole.memory_plan
        assert task.steps == found.steps <= whole.steps


@pytest.mark.parametrize(
    ("form", "middle"), [("full", 3e-4), ("low_rank", 3e-3), ("adapter", 3e-3)]
)
def test_a_search_has_the_form_of_the_experts(trained, form, middle):
    cfg = small.config(expert__lr="auto", expert__form=form, **FORMS[form])
    wanted = lr_search.lr_experts(cfg, trained)
    assert wanted.middle == middle
    task = wanted.task(0.125)
    assert any("lora_A" in name for name in task.parameters) == (form != "full")
    assert task.options.lr == 0.125 and task.steps == wanted.steps
    assert cost.cost(cfg, "lr_experts", None, None, bf16=False).parameters == sum(
        parameter.numel() for parameter in task.parameters.values()
    )


@pytest.mark.parametrize(("stage", "item", "training", "of"), OF)
def test_a_training_goes_by_what_its_search_found(trained, tmp_path, stage, item, training, of):
    root = tmp_path / "run"
    shutil.copytree(trained.root, root)
    parts = FolderParts(trained.cfg, root)
    cfg = small.config(**AUTO, **BOTH, dense__baselines=("path", "ffn", "wide"))
    with pytest.raises(MissingArtifact, match=stage):
        small.MAKERS[training](cfg, parts, *of)
    (parts.new(stage, *item) / FOUND).write_text(
        '{"lr": 0.0625, "steps": 1, "before_nats": 3, "tried": []}'
    )
    assert small.MAKERS[training](cfg, parts, *of).options.lr == 0.0625
    if stage == "lr_shared":  # baselines from zero train as the trunk does
        assert small.MAKERS["train_dense"](cfg, parts, "wide").options.lr == 0.0625


def test_nobody_searches_for_what_is_not_trained(trained):
    cfg = small.config(router__lr="auto", router__steps=0)
    assert not cfg.items("lr_router")
    assert small.MAKERS["train_router"](cfg, trained).steps == 0


def test_the_experts_are_searched_on_all_domains_alike(trained):
    cfg = small.config(**AUTO, expert__domains=("beta", "alpha"), partition__overlap=0.0)
    task = lr_search.lr_experts(cfg, trained).task(1e-3)
    ids = task.batch(0, 24)[:, :-1].flatten().tolist()
    # Four of five tokens are of the own part of the vocabulary
    parts = [sum(1 + 15 * i <= each < 16 + 15 * i for each in ids) for i in range(3)]
    assert min(parts) > len(ids) / 5


def addresses(**changes):
    """Return the address of every job of a run, by its label."""
    cfg = small.config(**changes)
    found = {}
    for stage in RUN:
        for stage_of, item, address in Addresses(cfg).jobs(stage):
            found[label(stage_of, item)] = address
    return found


def moved(before, after):
    """Return the jobs of both whose address is another."""
    return {name for name in before.keys() & after.keys() if before[name] != after[name]}


def test_addresses_know_a_search_only_where_there_is_one():
    assert not any(name.startswith("lr_") for name in addresses(dense__baselines=("total",)))
    auto = addresses(expert__lr="auto")
    assert [name for name in auto if name.startswith("lr_")] == ["lr_experts"]
    assert not moved(addresses(), addresses(lr_search__share=0.5))
    assert moved(auto, addresses(expert__lr="auto", lr_search__share=0.5)) >= {
        "lr_experts",
        "train_experts alpha",
    }
    # What is searched for one kind of training is nobody else's
    assert "train_shared" not in moved(addresses(), auto)
    assert "train_shared" in moved(addresses(), addresses(trunk__lr="auto"))


def test_an_expert_more_leaves_the_search_and_the_others():
    few = addresses(expert__lr="auto", expert__domains=("alpha", "beta"))
    more = addresses(expert__lr="auto", expert__domains=("alpha", "beta", "gamma"))
    assert moved(few, more) == {"train_router", "evaluate"}


def test_a_baseline_more_leaves_the_search_and_the_others():
    few = addresses(expert__lr="auto", dense__baselines=("total",))
    more = addresses(expert__lr="auto", dense__baselines=("total", "path", "ffn", "scratch"))
    assert more.keys() - few.keys() == {
        *("lr_dense ffn", "train_dense path", "train_dense ffn", "train_dense scratch")
    }
    assert moved(few, more) == {"evaluate"}
    own = addresses(expert__lr="auto", dense__baselines=("total",), dense__lr=1e-3)
    assert "lr_dense all" not in own and "lr_experts" in own


def test_each_joint_model_has_a_search_of_its_own_that_no_other_one_moves():
    auto = {"joint__lr": "auto", **BOTH}
    both = addresses(**auto)
    assert {"lr_joint dense", "lr_joint moe"} <= both.keys()
    assert moved(both, addresses(**auto, joint__top_k=2)) == {
        *("lr_joint moe", "train_joint moe", "evaluate")
    }
    assert moved(both, addresses(**auto, lr_search__share=0.5)) == {
        *("lr_joint dense", "lr_joint moe", "train_joint dense", "train_joint moe", "evaluate")
    }
    # Where the rate is a number there is no search, and no address has moved by there being any
    given = addresses(**BOTH)
    assert not any(name.startswith("lr_") for name in given)


@pytest.mark.parametrize(
    ("search", "item", "section"), [("lr_router", None, "router"), ("lr_joint", "moe", "joint")]
)
def test_the_temperature_falls_in_a_search_as_it_does_in_its_training(search, item, section):
    ramp = {"start": 3.0, "end": 1.0, "epochs": 2.0}
    whole_steps, epoch_steps = 400, 100.0  # so that it falls in the first half
    settings = {f"{section}__steps": whole_steps, f"{section}__temperature": ramp}
    cfg = small.config(**AUTO, **BOTH | settings, lr_search__steps=40)
    opts, _ = cost.search_settings(cfg, search, item, dict.fromkeys(small.DOMAINS, 500))
    whole = getattr(cfg, section).temperature
    assert opts.steps == 40
    for step in (0, 10, 20, 39):
        expected = whole.at(10 * step, whole_steps, epoch_steps)
        assert opts.temperature.at(step, opts.steps, epoch_steps) == pytest.approx(expected)
    # one of all steps has no epochs to be scaled
    assert whole.model_copy(update={"epochs": None}).in_small(0.1).epochs is None


@pytest.mark.parametrize(
    ("search", "item", "training"),
    [("lr_router", None, "train_router"), ("lr_joint", "moe", "train_joint moe")],
)
def test_a_search_whose_temperature_stood_still_is_another(search, item, training, monkeypatch):
    now = addresses(**AUTO, **BOTH)
    monkeypatch.setitem(STAGES, search, replace(STAGES[search], version=1))
    before = addresses(**AUTO, **BOTH)
    assert {label(search, item), training} <= moved(before, now)


@pytest.mark.parametrize("stage", SEARCHES.values())
def test_a_search_is_planned_at_a_share_of_its_trainings(stage):
    cfg = small.config(
        **AUTO,
        **BOTH,
        joint__steps=400,
        trunk__steps=400,
        expert__steps=400,
        router__steps=400,
        lr_search__share=0.1,
    )
    costs = joint_cost if stage == "lr_joint" else cost.cost
    item = {"lr_dense": "all", "lr_joint": "moe"}.get(stage)
    found = costs(cfg, stage, item, dict.fromkeys(small.DOMAINS, 500), bf16=False)
    of = small.DOMAINS if stage in ("lr_experts", "lr_dense") else (item,)
    training = "train_experts" if stage == "lr_dense" else trained_by(stage)
    whole = [costs(cfg, training, each, {}, bf16=False) for each in of]
    assert found.tokens / sum(each.tokens for each in whole) == pytest.approx(0.1, rel=0.05)
    assert found.summary.endswith("; 4 rates")
    if stage != "lr_dense":
        assert whole[0].summary.endswith(f"; lr from {stage}")


def test_steps_of_each_rate_can_be_given(trained):
    cfg = small.config(**AUTO, lr_search__steps=2, expert__warmup_steps=2)
    wanted = lr_search.lr_experts(cfg, trained)
    task = wanted.task(1e-3)
    assert (wanted.steps, task.steps) == (2, 2)
    assert task.options.warmup_steps == 1  # half of a training's four steps, as there


def test_a_run_finds_a_rate_trains_with_it_and_leaves_equal_bytes(finished, tmp_path):
    path, store_path = finished
    cfg = load(path, ("expert.lr=auto",))
    shutil.copytree(store_path, tmp_path / "store")
    store = Store(tmp_path / "store")
    told = []

    def progress(text, share):
        told.append((text, share))

    made = run_job("lr_experts", cfg, store, progress=progress)
    file = store.folder(made.address) / FOUND
    first = file.read_bytes()
    assert made.metrics["lr"] == json.loads(first)["lr"]
    # What came out is one line of rates, without the numbers that plans are made with
    tried = json.loads(first)["tried"]
    each = ", ".join(f"{one['lr']:g} {one['valid_nats']:.3f}" for one in tried)
    assert figures(made.metrics) == f"lr {made.metrics['lr']:g}; valid nats by rate: {each}"
    assert "0.1 diverged" in figures({"lr": 0.03, "losses": {"0.03": 2.0, "0.1": None}})
    # Every rate is told of, and how far the search is
    assert told[0] == ("lr_experts: rate 0.0001, 1 of 3", 0.0)
    assert max(share for _, share in told if share is not None) == 1
    shutil.rmtree(file.parent)
    run_job("lr_experts", cfg, store, progress=quiet)
    assert file.read_bytes() == first
    expert = run_job("train_experts", cfg, store, "sea", progress=quiet)
    assert made.address in expert.inputs
    rows = read(store.history(expert.address)).rows
    assert max(row.get("lr", 0) for row in rows) == pytest.approx(made.metrics["lr"], rel=0.2)
