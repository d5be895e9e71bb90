"""The training loop on a network of three tensors: what it computes, what it keeps, where it
stops."""

import itertools
import math
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from fakes import Killed, dying, equal, in_bf16, small_task, train_io, values
from torch import nn

from pipeline.config.fit import FitConfig
from pipeline.errors import Interrupted, NotFiniteError, PipelineError
from pipeline.train.loop import fit, lr_at
from pipeline.train.optimizer import AdamW


def trained(folder, task=None, **options):
    task = task or small_task(**options)
    metrics = fit(task, train_io(folder))
    return values(task), metrics


def test_micro_batches_leave_the_result_alone(tmp_path):
    whole, _ = trained(tmp_path / "whole", noisy=False)
    for size in (1, 3, 4):
        parts, _ = trained(tmp_path / str(size), noisy=False, micro_batch_sequences=size)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=0)


def test_one_step_is_torch_s_own_adamw(tmp_path):
    task = small_task(
        steps=1, noisy=False, clip_norm=0, warmup_steps=0, weight_decay=0.3, keep="last"
    )
    start = values(task)
    ours, _ = trained(tmp_path, task)
    theirs = small_task(noisy=False)
    assert equal(values(theirs), start)
    theirs.loss(theirs.batch(0, 8)).backward()
    groups = [
        {"params": [theirs.parameters["first"], theirs.parameters["second"]], "weight_decay": 0.3},
        {"params": [theirs.parameters["bias"]], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)).step()
    for name, value in values(theirs).items():
        torch.testing.assert_close(ours[name], value, atol=1e-7, rtol=0)


def test_weight_decay_is_for_matrices(tmp_path):
    plain, _ = trained(tmp_path / "plain", steps=1, weight_decay=0.0, noisy=False)
    heavy, _ = trained(tmp_path / "heavy", steps=1, weight_decay=0.9, noisy=False)
    assert torch.equal(plain["bias"], heavy["bias"])
    assert not torch.equal(plain["first"], heavy["first"]) and not torch.equal(
        plain["second"], heavy["second"]
    )


def test_gradients_are_clipped_and_the_norm_before_is_recorded(tmp_path):
    seen = []

    def run(folder, clip_norm):
        task = small_task(steps=3, noisy=False, clip_norm=clip_norm)
        big = replace(
            task, loss=lambda rows: task.loss(rows) * 1000, after_step=lambda: seen.append(1) or {}
        )
        here = train_io(folder)
        fit(big, here)
        return [row["grad_norm"] for row in here.recorder.rows if "grad_norm" in row]

    task = small_task(noisy=False)
    (task.loss(task.batch(0, 8)) * 1000).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in task.parameters.values()))
    assert run(tmp_path / "a", 0.5)[0] == pytest.approx(norm, rel=1e-5)
    assert len(seen) == 3


def test_clipping_bounds_the_step(tmp_path, monkeypatch):
    norms = []
    step = AdamW.step

    def watched(self, scale=1.0):
        norms.append(self.norm() * scale)
        return step(self, scale)

    monkeypatch.setattr(AdamW, "step", watched)
    trained(tmp_path / "on", steps=4, clip_norm=1e-3)
    assert max(norms) <= 1e-3 * 1.0001
    norms.clear()
    trained(tmp_path / "off", steps=4, clip_norm=0)
    assert max(norms) > 1e-2


def test_learning_rate_warms_up_and_falls():
    opts = FitConfig(steps=110, lr=1.0, warmup_steps=10, min_lr_share=0.1)
    assert [lr_at(s, 110, opts) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert lr_at(10, 110, opts) == pytest.approx(1.0)
    assert lr_at(60, 110, opts) == pytest.approx(0.55)
    assert lr_at(110, 110, opts) == pytest.approx(0.1)
    assert lr_at(50, 110, opts.model_copy(update={"schedule": "constant"})) == 1.0
    assert lr_at(0, 1, FitConfig(steps=1, lr=1.0, warmup_steps=0)) == 1.0


@pytest.mark.parametrize("steps", [1, 2, 7, 19, 20, 21, 50])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_peak_is_reached_however_long_the_warm_up(steps, schedule):
    for warmup in (0, 1, 5, 20, 500):
        opts = FitConfig(steps=steps, lr=3e-3, warmup_steps=warmup, schedule=schedule)
        rates = [lr_at(step, steps, opts) for step in range(steps)]
        assert max(rates) == pytest.approx(3e-3)
        assert rates == sorted(rates) or rates.index(max(rates)) <= warmup


@pytest.mark.parametrize(("warmup", "told"), [(6, False), (7, True), (500, True)])
def test_a_warm_up_longer_than_the_training_is_told(tmp_path, warmup, told):
    here = train_io(tmp_path)
    fit(small_task(steps=6, warmup_steps=warmup), here)
    assert any("warmup_steps" in note for note in here.recorder.notes) == told


def test_learning_rate_of_every_step_reaches_the_optimizer(tmp_path):
    task, here = small_task(steps=6), train_io(tmp_path)
    fit(task, here)
    rows = [row for row in here.recorder.rows if "lr" in row]
    assert [row["lr"] for row in rows] == [lr_at(s, 6, task.options) for s in range(6)]


def script(task, losses):
    """Return task with a validation that reports losses in turn and keeps the parameters of each
    time."""
    turns, seen = iter(losses), []

    def validate():
        seen.append(values(task))
        return next(turns)

    return replace(task, validate=validate), seen


def test_early_stopping_stops_and_keeps_the_best(tmp_path):
    task, seen = script(
        small_task(steps=50, eval_every_steps=2, patience=2), [3.0, 1.0, 2.0, 2.5, 0.1]
    )
    got, metrics = trained(tmp_path, task)
    assert (
        metrics["steps"],
        metrics["planned_steps"],
        metrics["kept_step"],
        metrics["valid_nats"],
    ) == (8, 50, 4, 1.0)
    assert equal(got, seen[1]) and not equal(got, seen[3])


def test_keep_last_keeps_the_last(tmp_path):
    task, seen = script(small_task(steps=6, eval_every_steps=2, keep="last"), [3.0, 1.0, 2.0])
    got, metrics = trained(tmp_path, task)
    assert (metrics["kept_step"], metrics["valid_nats"]) == (6, 2.0)
    assert equal(got, seen[2])


def told(task, losses, first, dies_at=None):
    """Return task with the validation loss of its step out of losses, one every 3 steps; begins at
    first."""
    now = [first]

    def before_step(at):
        now[0] = at + 1
        if at == dies_at:
            raise Killed

    return replace(task, before_step=before_step, validate=lambda: losses[now[0] // 3 - 1])


@pytest.mark.parametrize(
    "losses", [[3.0, 1.0, 2.0, 1.5], [0.5, 1.0, 2.0, 1.5], [4.0, 3.0, 2.0, 1.0]]
)
def test_best_state_survives_a_kill_at_every_step(tmp_path, losses):
    task, _ = script(small_task(steps=12), losses)
    whole, wanted = trained(tmp_path / "whole", task)
    for step in range(1, 12):
        here = tmp_path / str(step)
        with pytest.raises(Killed):
            fit(told(small_task(steps=12), losses, 0, dies_at=step), train_io(here))
        resumed = told(small_task(steps=12), losses, step)
        metrics = fit(resumed, train_io(here))
        assert equal(values(resumed), whole), step
        assert metrics["kept_step"] == wanted["kept_step"]


@pytest.mark.parametrize("micro", [None, 3])
def test_resumed_is_undisturbed_bit_for_bit_at_every_step(tmp_path, micro):
    whole, wanted = trained(tmp_path / "whole", micro_batch_sequences=micro)
    for step in range(1, 10):
        here = tmp_path / str(step)
        with pytest.raises(Killed):
            fit(dying(small_task(micro_batch_sequences=micro), step), train_io(here))
        task = small_task(micro_batch_sequences=micro)
        torch.manual_seed(99)  # a generator that was not restored would show
        with torch.no_grad():
            task.parameters["first"].fill_(7.0)  # so would a parameter
        again = train_io(here)
        metrics = fit(task, again)
        assert again.recorder.starts == [step]
        assert equal(values(task), whole), step
        assert metrics["train_nats"] == wanted["train_nats"]
        assert metrics["valid_nats"] == wanted["valid_nats"]


def test_killed_at_every_step_in_turn(tmp_path):
    whole, _ = trained(tmp_path / "whole")
    for step in range(1, 10):
        with pytest.raises(Killed):
            fit(dying(small_task(), step), train_io(tmp_path / "one"))
    got, _ = trained(tmp_path / "one")
    assert equal(got, whole)


def test_a_finished_run_goes_straight_to_its_end(tmp_path):
    whole, first = trained(tmp_path)
    task = replace(small_task(), loss=None, validate=lambda: pytest.fail("evaluated again"))
    metrics = fit(task, train_io(tmp_path))
    assert equal(values(task), whole) and metrics["steps"] == first["steps"]


def test_other_state_of_a_task_is_restored(tmp_path):
    def counting(task):
        return replace(task, after_step=lambda: task.state["seen"].add_(1) and {})

    with pytest.raises(Killed):
        fit(dying(counting(small_task()), 6), train_io(tmp_path))
    task = counting(small_task())
    fit(task, train_io(tmp_path))
    assert task.state["seen"].item() == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_rest_is_the_same(tmp_path, number):
    whole, _ = trained(tmp_path / "whole")
    before = signal.getsignal(number)

    def ask(at):
        if at == 4:
            os.kill(os.getpid(), number)

    here = train_io(tmp_path / "asked", save_every_s=1e9)
    with pytest.raises(Interrupted, match=r"train_shared: stopped and saved at step 5 of 10"):
        fit(replace(small_task(), before_step=ask), here)
    assert signal.getsignal(number) is before
    task, again = small_task(), train_io(tmp_path / "asked")
    fit(task, again)
    assert again.recorder.starts == [5] and equal(values(task), whole)


@pytest.mark.parametrize(
    ("saves", "told"),
    [(1e-9, r"last good checkpoint is step 4 in"), (1e9, "no checkpoint was saved")],
)
def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path, saves, told):
    task = small_task()

    def poisoned(at, count):
        x_BD, wanted_B1 = task.batch(at, count)
        return (x_BD * math.nan if at == 4 * 8 else x_BD), wanted_B1

    with pytest.raises(NotFiniteError, match=r"loss at step 4 is nan") as error:
        fit(replace(task, batch=poisoned), train_io(tmp_path, save_every_s=saves))
    assert re.search(told, str(error.value))
    for word in ("train_shared", "trunk.lr", "trunk.warmup_steps", "trunk.clip_norm"):
        assert word in str(error.value)
    assert all(torch.isfinite(p).all() for p in task.parameters.values())


def test_infinite_gradients_stop_before_they_are_applied(tmp_path):
    task = small_task(steps=3)
    with pytest.raises(NotFiniteError, match=r"step 0 is .*gradient norm inf"):
        fit(
            replace(task, loss=lambda rows: (task.loss(rows) * 1e30) * 1e30 / 1e38),
            train_io(tmp_path),
        )


def test_a_validation_loss_that_is_not_finite_stops(tmp_path):
    with pytest.raises(NotFiniteError, match="validation loss at step 3 is nan"):
        fit(replace(small_task(), validate=lambda: math.nan), train_io(tmp_path))


def test_parameters_that_do_not_move_are_a_fault(tmp_path):
    task = small_task(weight_decay=0.0)
    idle = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(
        PipelineError,
        match=r"1 of 4 tensors did not change in 10 steps, first idle; raise trunk.lr",
    ):
        fit(replace(task, parameters=task.parameters | {"idle": idle}), train_io(tmp_path))


def test_parameters_without_gradients_are_a_fault(tmp_path):
    task = small_task()
    task.parameters["bias"].requires_grad_(False)
    with pytest.raises(PipelineError, match="no parameters to train"):
        fit(task, train_io(tmp_path / "a"))
    with pytest.raises(PipelineError, match="no parameters to train"):
        fit(replace(task, parameters={}), train_io(tmp_path / "b"))


def test_no_steps_is_no_training(tmp_path):
    task = small_task(steps=0)
    start = values(task)
    metrics = fit(task, train_io(tmp_path))
    assert metrics["steps"] == 0 and metrics["train_nats"] is None and metrics["valid_nats"] > 0
    assert equal(values(task), start)


def test_rows_tell_where_the_time_went(tmp_path):
    here = train_io(tmp_path, log_every_steps=2)
    metrics = fit(small_task(), here)
    rows = [row for row in here.recorder.rows if "train_nats" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert here.recorder.taken == [1, 3, 5, 7, 9]
    for row in rows:
        assert {
            "data_s",
            "forward_s",
            "backward_s",
            "optimizer_s",
            "tokens_per_s",
            "rss_mb",
            "lr",
        } <= row.keys()
        assert min(row[k] for k in ("data_s", "forward_s", "backward_s", "optimizer_s")) > 0
        assert row["tokens"] == row["step"] * 8 * 4
    assert [row["step"] for row in here.recorder.rows if "valid_nats" in row] == [3, 6, 9, 10]
    phases = ("start", "data", "forward", "backward", "optimizer", "evaluate", "save")
    parts = sum(metrics[f"{phase}_s"] for phase in phases)
    assert metrics["seconds"] == pytest.approx(parts) and metrics["tokens"] == 10 * 8 * 4


@pytest.mark.parametrize("step", range(1, 10))
def test_rates_and_peaks_of_a_killed_run_cover_all_attempts(tmp_path, monkeypatch, step):
    ticks = itertools.count()
    monkeypatch.setattr("pipeline.train.loop.time.perf_counter", lambda: float(next(ticks)))
    spent = itertools.count(step=3)
    monkeypatch.setattr("pipeline.train.loop.time.process_time", lambda: float(next(spent)))
    # rows come seldom and checkpoints after every step: most kills fall between a row and the next
    first = train_io(tmp_path, log_every_steps=4)
    first.peak.carry(3 * 10**15, 4 * 10**15)
    with pytest.raises(Killed):
        fit(dying(small_task(), step), first)
    metrics = fit(small_task(), train_io(tmp_path, log_every_steps=4))
    # each phase of a step ends with one look at the clock, and ten steps are in the result
    phases = [metrics[f"{phase}_s"] for phase in ("data", "forward", "backward", "optimizer")]
    assert phases == [10, 10, 10, 10]
    assert metrics["cpu_s"] == dict.fromkeys(("data", "forward", "backward", "optimizer"), 30)
    assert metrics["tokens_per_s"] == 10 * 8 * 4 / 40
    # of the last attempt alone
    assert metrics["first_step_s"] == 4
    assert (metrics["peak_mb"], metrics["host_peak_mb"]) == (3e9, 4e9)


@pytest.mark.parametrize("micro", [None, 3])
def test_a_bf16_training_ends_in_fp32_near_the_fp32_one(tmp_path, micro):
    start = values(small_task())
    plain, wanted = trained(tmp_path / "plain", noisy=False, micro_batch_sequences=micro)
    task = in_bf16(small_task(noisy=False, micro_batch_sequences=micro))
    rounded, metrics = trained(tmp_path / "bf16", task)
    for name, value in rounded.items():
        assert value.dtype == torch.float32 and task.parameters[name].grad is None
        assert 0 < (value - plain[name]).norm() < 0.05 * (plain[name] - start[name]).norm()
    assert metrics["valid_nats"] == pytest.approx(wanted["valid_nats"], rel=0.02)


def test_a_parameter_that_moves_by_less_than_bf16_holds_has_moved(tmp_path):
    task = in_bf16(small_task(steps=2, noisy=False, lr=1e-6, weight_decay=0.0))
    start = values(task)
    trained(tmp_path, task)
    for name, value in values(task).items():
        assert 0 < (value - start[name]).abs().max() < 1e-5


def test_the_means_and_the_peak_are_in_the_metrics(tmp_path):
    _, metrics = trained(tmp_path, micro_batch_sequences=3)
    assert (
        metrics["memory_plan"]["micro_batch_sequences"] == 3
        and metrics["memory_plan"]["moments"] == "fp32"
    )
    assert {"peak_mb", "host_peak_mb", "mapped_mb", "mapped_share_mb"} <= metrics.keys()


def test_a_penalty_moves_the_parameters_and_stays_out_of_the_recorded_loss(tmp_path):
    plain, without = trained(tmp_path / "plain", steps=1, noisy=False)
    task = small_task(steps=1, noisy=False)
    pulled = replace(task, penalty=lambda: 100 * task.parameters["first"].square().sum())
    moved, with_penalty = trained(tmp_path / "pulled", pulled)
    assert with_penalty["train_nats"] == pytest.approx(without["train_nats"], rel=1e-6)
    assert not torch.equal(moved["first"], plain["first"])
