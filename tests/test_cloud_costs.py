"""What runs on Modal cost: prices, what is estimated of all that is paid for, what was spent, and
the limits on both."""

import argparse
import io
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import small_histories as small
from conftest import tiny_config
from pydantic import ValidationError
from rich.console import Console
from test_cloud_client import far
from test_cloud_leases import FakeTable

from pipeline import cloud
from pipeline.cloud.estimate import ASSUMED_S, CONDUCTOR, STARTUP_S, total
from pipeline.cloud.meters import at_work, lives, meter_key, metered, process_age_s
from pipeline.cloud.prices import Prices, is_kind
from pipeline.cloud.running_costs import storage_told
from pipeline.config.machines import EndpointConfig, MachineConfig, TrainerConfig
from pipeline.errors import ConfigError, DamagedArtifact
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import load
from pipeline.run import stages
from pipeline.run.history.command import history
from pipeline.run.show_runs import show_runs
from pipeline.store.artifacts import Store
from pipeline.store.costs import (
    CONDUCTING,
    PLANNING,
    Costs,
    Spent,
    by_prices,
    costs_path,
    read_costs,
    write_costs,
)

ROOT = Path(__file__).parent.parent
PRICES = cloud.Prices.load(ROOT / "config/prices.yaml")
CORE, GIB_S = 0.0000131, 0.00000222
L40S = 0.000542


def wide() -> Console:
    return Console(file=io.StringIO(), width=1_000)


# ---- prices


def test_regions_and_what_may_not_be_preempted_are_dearer():
    machine = MachineConfig(gpu=("H100",), cpu=2, memory_mb=1024)
    host, gpu = 2 * CORE + GIB_S, 0.001097
    assert PRICES.usd_per_s(machine) == pytest.approx(host + gpu)
    for regions, factor in ((["us"], 1.5), (["us-west"], 1.75), (["us-west", "eu"], 1.5)):
        assert PRICES.usd_per_s(machine, regions) == pytest.approx(factor * (host + gpu))
    # Modal has no GPUs that are not preempted
    dear = PRICES.usd_per_s(machine, ["jp"], nonpreemptible=True)
    assert dear == pytest.approx(1.75 * (3 * host + gpu))


def test_every_price_says_when_it_was_checked_and_where_it_is_from():
    for part in (PRICES, PRICES.surcharges, PRICES.storage):
        assert re.fullmatch(r"2026-\d\d-\d\d", part.checked)
        assert part.source.startswith("https://modal.com/")
    assert PRICES.gpus["B300"].checked == "2026-07-18"
    told = (
        "prices of 2026-10-04 (surcharges 2026-06-27), config/prices.yaml, from modal.com/pricing"
    )
    assert PRICES.told() == told
    found = PRICES.told([MachineConfig(gpu=("B300:2", "H100"))])
    assert "(surcharges 2026-06-27, B300 2026-07-18)" in found


@pytest.mark.parametrize("gpu", ["B300", "b300:8", "B200+", "B200+:2", "A10:4", "rtx-pro-6000"])
def test_gpus_as_modal_documents_them(gpu):
    cfg = FfnMoeConfig(modal={"train_shared": {"gpu": gpu}})
    cloud.check(cfg, PRICES, "/store")
    assert PRICES.has_bf16(cfg.modal.train_shared)


def test_a_gpu_that_wants_another_cuda_than_is_locked_is_told():
    locked = cloud.locked_cuda((ROOT / "requirements.lock").read_text("utf-8"))
    assert re.fullmatch(r"\d+\.\d+", locked)
    machines = {"modal.evaluate.gpu": MachineConfig(gpu=("H100", "b300:2"))}
    [note] = PRICES.cuda_notes(machines, "13.0")
    assert "modal.evaluate.gpu: b300:2 is a GPU that wants CUDA 13.1" in note
    assert "the locked torch brings 13.0" in note
    for enough in ("13.1", "14.0", ""):
        assert list(PRICES.cuda_notes(machines, enough)) == []
    modal = FfnMoeConfig(modal={"endpoint": {"gpu": "B200+"}}).modal
    costs, note = cloud.deployment_told(modal, PRICES, "13.0")
    assert costs == cloud.endpoint_told(modal, PRICES)
    assert "modal.endpoint.gpu: B200+ may be a B300, which wants CUDA 13.1" in note
    again = modal.model_copy(
        update={"reevaluate": "0 6 * * 1", "evaluate": machines["modal.evaluate.gpu"]}
    )
    assert len(list(cloud.deployment_told(again, PRICES, "13.0"))) == 3


def test_either_of_two_kinds_is_billed_as_the_cheaper_one():
    either, other = (MachineConfig(gpu=(kind,)) for kind in ("B200+", "B300"))
    assert PRICES.usd_per_s(either) == PRICES.usd_per_s(MachineConfig(gpu=("B200",)))
    assert PRICES.usd_per_s(other) > PRICES.usd_per_s(either)


@pytest.mark.parametrize(
    ("asked", "found", "same"),
    [
        ("L4", "NVIDIA L40S", False),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("A10:2", "NVIDIA A10G", True),
        ("a100-80gb", "NVIDIA A100-SXM4-80GB", True),
        ("H100!", "NVIDIA H100 80GB HBM3", True),
        ("B200+", "NVIDIA B200", True),
        ("T4", "Tesla T4", True),
        ("RTX-PRO-6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition", True),
    ],
)
def test_a_gpu_is_known_by_its_name(asked, found, same):
    assert is_kind(asked, found) == same


def test_a_region_that_there_is_not_is_refused():
    cfg = FfnMoeConfig(modal={"regions": ["us", "moon"], "endpoint": {"regions": "mars"}})
    with pytest.raises(ConfigError) as refused:
        cloud.check(cfg, PRICES, "/store")
    first, second = str(refused.value).splitlines()[1:]
    assert "modal.regions: no such region moon; there are us, eu," in first
    assert "modal.endpoint.regions: no such region mars" in second


# ---- what stands


def test_an_endpoint_is_priced_by_the_hour_idle_or_not():
    machine = {"gpu": "L40S", "cpu": 2, "memory_mb": 1024, "idle_s": 360}
    hour = 3600 * (L40S + 2 * CORE + GIB_S)
    told = cloud.endpoint_told(FfnMoeConfig(modal={"endpoint": machine}).modal, PRICES)
    assert f"${hour:.2f} an hour for each container" in told
    assert f"360 s beyond its last request (${hour / 10:.2f}); nothing without requests" in told
    kept = machine | {"min_containers": 2, "max_containers": 5, "buffer_containers": 1}
    modal = FfnMoeConfig(modal={"regions": "eu", "endpoint": kept}).modal
    told = cloud.endpoint_told(modal, PRICES)
    assert f"${3 * hour:.2f} an hour without requests" in told
    assert f"${3 * hour * 720:,.2f} in 30 days" in told
    assert f"at most ${7.5 * hour:.2f} an hour for 5 at once, 1 of them ready" in told


def test_an_endpoint_above_its_limit_is_refused():
    modal = {"endpoint": {"gpu": "H100", "max_containers": 4}, "max_endpoint_usd_per_hour": 20}
    cloud.check(FfnMoeConfig(modal=modal), PRICES, "/store")
    modal["max_endpoint_usd_per_hour"] = 16
    with pytest.raises(ConfigError, match=r"4 containers at once cost \$17\.06 an hour, above"):
        cloud.check(FfnMoeConfig(modal=modal), PRICES, "/store")
    # What no price is known of is told as that
    modal["endpoint"]["gpu"] = "K80"
    with pytest.raises(ConfigError, match="no such GPU K80"):
        cloud.check(FfnMoeConfig(modal=modal), PRICES, "/store")


def test_no_more_containers_are_kept_than_there_may_be():
    with pytest.raises(ValidationError, match="at most max_containers, 1"):
        EndpointConfig(min_containers=2)


def test_storage_is_priced_by_the_month():
    assert "1,024 GiB of a workspace are free" in storage_told(0, PRICES)
    assert "at most $9.00 a month" in storage_told(100 * 1024**3, PRICES)


# ---- what is estimated


def estimated(tmp_path, wanted=(*stages.RUN, "deploy"), *overrides):
    """Return (configuration, its jobs) on an empty volume."""
    cfg = load(tiny_config(tmp_path / "tiny"), overrides)
    return cfg, cloud.estimate(cfg, wanted, Store(tmp_path / "none"), PRICES)


def test_everything_that_is_to_be_made_has_a_price(tmp_path):
    cfg, lines = estimated(tmp_path)
    assert all(line.usd > 0 for line in lines)
    by_stage = {line.stage: line for line in lines}
    for stage in ("tokenizer", "preprocess", "deploy"):
        line = by_stage[stage]
        assert line.assumed and line.seconds == ASSUMED_S
        assert line.usd == pytest.approx(ASSUMED_S * PRICES.usd_per_s(cfg.machine(stage)))
    assert not by_stage["evaluate"].assumed and by_stage["evaluate"].seconds > STARTUP_S
    cfg, dearer = estimated(tmp_path, (*stages.RUN, "deploy"), "modal.regions=[us-east]")
    for line, other in zip(lines, dearer, strict=True):
        assert other.usd == pytest.approx(1.75 * line.usd)


def test_of_several_gpus_the_dearest_outcome_is_the_cost_and_the_slowest_the_time(tmp_path):
    steps = "trunk.steps=10000000000"

    def line_on(gpus):
        _, [line] = estimated(tmp_path, ("train_shared",), steps, f"modal.train_shared.gpu={gpus}")
        return line

    slow, fast = line_on("[T4]"), line_on("[H100]")
    # The T4 has a seventh of the price and 124 times the time
    assert slow.usd > 2 * fast.usd
    for gpus in ("[H100, T4]", "[T4, H100]"):
        either = line_on(gpus)
        assert (either.seconds, either.usd) == (slow.seconds, slow.usd)
    # One that is slower and comes to less decides the time alone
    dear, cheap = line_on("[RTX-PRO-6000]"), line_on("[L40S]")
    either = line_on("[RTX-PRO-6000, L40S]")
    assert dear.usd > cheap.usd and dear.seconds < cheap.seconds
    assert (either.seconds, either.usd) == (cheap.seconds, dear.usd)


def test_what_hands_out_jobs_is_paid_for_while_they_last(tmp_path):
    cfg, lines = estimated(tmp_path)
    found = total(cfg, lines, PRICES, True)
    assert found.seconds == pytest.approx(sum(line.seconds for line in lines))
    assert found.jobs_usd == pytest.approx(sum(line.usd for line in lines))
    three = 3 * (0.5 * CORE + GIB_S)
    assert found.conducting_usd == pytest.approx((STARTUP_S + found.seconds) * three)
    # The limit is on both together
    limit = found.jobs_usd + found.conducting_usd / 2
    limited, lines = estimated(tmp_path, (*stages.RUN, "deploy"), f"modal.max_cost_usd={limit}")
    with pytest.raises(ConfigError, match=rf"at \${found.usd:.2f}, above modal.max_cost_usd"):
        cloud.refuse_above(limited, lines, PRICES, True)
    more = limited.modal.model_copy(update={"max_cost_usd": found.usd + 0.01})
    cloud.refuse_above(limited.model_copy(update={"modal": more}), lines, PRICES, True)


def test_a_container_that_plans_is_in_the_estimate_in_the_limit_and_in_what_was_spent(tmp_path):
    usd = 100 * 3 * (0.5 * CORE + GIB_S)
    cfg, lines = estimated(tmp_path)
    found = total(cfg, lines, PRICES, True)
    limit = f"modal.max_cost_usd={found.usd + usd / 2}"
    limited, lines = estimated(tmp_path, (*stages.RUN, "deploy"), limit)
    cloud.refuse_above(limited, lines, PRICES, True)
    with pytest.raises(ConfigError, match="above modal.max_cost_usd"):
        cloud.refuse_above(limited, lines, PRICES, True, planning_s=100.0)
    told = cloud.expected(cfg, lines, PRICES, True, planning_s=100.0)
    store = Store(tmp_path / "store").open()
    # All attempts have the plan of one container
    for _ in range(2):
        ledger = cloud.Ledger(store, FakeTable(), "run-1", told)
        with ledger.kept("modal run x", [cfg]):
            pass
    rows = {row.stage: row for row in read_costs(ledger.path).rows}
    assert (rows[PLANNING].containers, rows[PLANNING].seconds) == (1, 100.0)
    assert rows[PLANNING].usd == pytest.approx(usd) and CONDUCTING in rows
    assert len(read_costs(ledger.path).rows) == 2


def test_what_others_took_is_the_measure_of_what_has_no_operations(finished, tmp_path):
    path, root = finished
    store = Store(root)
    cfg = load(path, ("tokenizer.sample_megabytes=0.05",))
    mirror = cloud.mirror(load(path), tmp_path / "near", *far(root))
    made = store.manifest(stages.address(load(path), "tokenizer")).made["seconds"]
    [line] = cloud.estimate(cfg, ("tokenizer",), mirror, PRICES)
    assert line.state == "to do" and not line.assumed
    assert line.seconds == pytest.approx(STARTUP_S + made)
    # Containers that were paid for tell it better than the job does
    paid = Spent("tokenizer", (stages.address(load(path), "tokenizer"),), 2, 500.0, 0.1, None)
    write_costs(mirror.root / "costs/2026-a.json", Costs("", (), "", "", "", (paid,)))
    [line] = cloud.estimate(cfg, ("tokenizer",), mirror, PRICES)
    assert line.seconds == 500.0
    # But not those that came to nothing
    costs = Costs("", (), "", "", "", (replace(paid, made=False),))
    write_costs(mirror.root / "costs/2026-a.json", costs)
    [line] = cloud.estimate(cfg, ("tokenizer",), mirror, PRICES)
    assert line.seconds == pytest.approx(STARTUP_S + made)


def test_a_plan_tells_all_of_it(tmp_path):
    cfg, lines = estimated(tmp_path)
    console = wide()
    cloud.show_estimate(cfg, lines, PRICES, False, console)
    text = console.file.getvalue()
    assert "nobody has timed a job of tokenizer, preprocess, deploy yet: 10 min are assumed" in text
    found = total(cfg, lines, PRICES, False)
    assert (
        f"${found.usd:.2f}, ${found.conducting_usd:.2f} of it for what hands out the jobs" in text
    )
    assert "on the volume: at least 0.00 GB, at most $0.00 a month" in text
    assert "endpoint: $0.32 an hour for each container" in text
    assert f"with {PRICES.told()}" in text


def test_a_plan_names_gpus_that_have_less_memory_than_is_predicted(tmp_path):
    cfg, lines = estimated(tmp_path)

    def told(gpus: tuple[str, ...], *peaks_gb: float, state="to do") -> str:
        machine = TrainerConfig(gpu=gpus)
        jobs = [
            replace(line, stage="train_experts", machine=machine, peak_bytes=int(gb * 1e9))
            for line, gb in zip(lines, peaks_gb, strict=False)
        ]
        console = wide()
        done = [replace(job, state=state) for job in jobs]
        cloud.show_estimate(cfg, done, PRICES, False, console)
        return console.file.getvalue()

    assert (
        "train_experts: up to 31,000 MB are predicted, more than L4 (24 GB) has: smaller pieces "
        "run at once there, which may not be enough; name larger ones in modal.train_experts.gpu"
    ) in told(("H100", "L4:2"), 25, 31)
    assert "are predicted, more" not in told(("H100", "L4"), 23.9)
    assert "are predicted, more" not in told(("B300",), 1000)  # the table does not say
    assert "more than H100 (80 GB)" in told(("B300", "H100"), 81)
    assert "are predicted, more" not in told(("L4",), 31, state="done")
    assert "are predicted, more" not in told((), 31)


def test_what_is_measured_again_is_priced_where_no_price_table_is(finished):
    cfg = load(finished[0], ("modal.reevaluate=0 6 * * 1", "modal.max_cost_usd=5"))
    wired = cloud.Wiring.settled(cfg, b'{"address": "deploy-1"}', True, PRICES)
    told = cloud.Wiring.told(wired.variables)
    assert told == wired and Prices.told_by(told.prices) == PRICES
    again = cfg.model_copy(update={"name": "another-day"})
    found = cloud.priced_again(again, finished[1], told.prices)
    assert found.limit_usd == 5
    usd = STARTUP_S * PRICES.usd_per_s(cfg.modal.evaluate)
    assert usd < found.of(stages.address(again, "evaluate")) < 2 * usd
    modal = cfg.modal.model_copy(update={"max_cost_usd": 0.01})
    with pytest.raises(ConfigError, match="above modal.max_cost_usd 0.01"):
        cloud.priced_again(again.model_copy(update={"modal": modal}), finished[1], told.prices)


# ---- what was spent


class Age:
    """How long a container lives, as a test says."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self):
        return self.seconds


@contextmanager
def container(table, key, seconds, gpu=""):
    with metered(table, key, Age(seconds), lambda: gpu):
        yield


def test_containers_that_are_taken_away_are_paid_for_too():
    table, age = FakeTable(), Age(10.0)

    def taken_away():
        with metered(table, "k", age, lambda: "NVIDIA L4"):
            assert lives(table, "k") == [(10.0, "")]
            age.seconds = 70.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taken_away()
    with container(table, "k", 5.0):
        pass
    assert lives(table, "k") == [(70.0, "NVIDIA L4"), (5.0, "")]
    assert lives(table, "other") == []


def test_while_a_container_works_it_says_how_long_it_lives(monkeypatch):
    monkeypatch.setattr("pipeline.cloud.meters.NOTE_S", 0.005)
    table, age = FakeTable(), Age(1.0)
    with metered(table, "k", age, lambda: None):
        age.seconds = 2.0
        for _ in range(400):
            if lives(table, "k") == [(2.0, "")]:
                break
            time.sleep(0.005)
        assert lives(table, "k") == [(2.0, "")]


def test_what_could_not_be_noted_at_first_is_noted_in_a_place_of_its_own():
    class Late(FakeTable):
        down = True

        def put(self, key, value, *, skip_if_exists=False):
            if self.down:
                self.down = False
                raise ConnectionError("the line is down")
            return super().put(key, value, skip_if_exists=skip_if_exists)

    table = Late()
    # Of the container that was lost before this one
    table.entries["k/container/0"] = '{"seconds": 50.0, "gpu": ""}'
    with container(table, "k", 7.0, "NVIDIA L4"):
        pass
    assert lives(table, "k") == [(50.0, ""), (7.0, "NVIDIA L4")]


def test_the_gpu_is_noted_after_all_that_know_of_none(monkeypatch):
    monkeypatch.setattr("pipeline.cloud.meters.NOTE_S", 0.005)
    under_way = threading.Event()

    class Slow(FakeTable):
        def put(self, key, value, *, skip_if_exists=False):
            if not skip_if_exists and '"gpu": ""' in value:
                under_way.set()
                time.sleep(0.05)
            return super().put(key, value, skip_if_exists=skip_if_exists)

    table = Slow()
    with container(table, "k", 7.0, "NVIDIA L4"):
        assert under_way.wait(10)
    assert lives(table, "k") == [(7.0, "NVIDIA L4")]


def test_who_works_for_weeks_has_what_those_before_have_noted_kept(monkeypatch):
    monkeypatch.setattr("pipeline.cloud.meters.NOTE_S", 0.005)
    kept = threading.Event()

    class Forgetful(FakeTable):
        def get(self, key, default=None):
            if key == "k/container/0":
                kept.set()
            return super().get(key, default)

    table = Forgetful()
    table.entries["k/container/0"] = '{"seconds": 50.0, "gpu": ""}'
    with container(table, "k", 7.0):
        assert kept.wait(10)


class Broken(FakeTable):
    """A table that nobody can write to."""

    def put(self, key, value, *, skip_if_exists=False):
        raise ConnectionError("the line is down")


def test_a_note_that_cannot_be_written_ends_no_job(capsys):
    told = {"by": "x", "token": "run", "held": {}}
    with at_work(Broken(), told, ["tokenizer-0"]):
        pass
    assert "costs were not noted: ConnectionError: the line is down" in capsys.readouterr().out
    # A job that was handed out without a name is paid for by nobody's account
    with at_work(FakeTable(), told | {"token": ""}, ["tokenizer-0"]) as _:
        pass


def test_jobs_that_share_a_container_are_found_by_any_of_them():
    table, told = FakeTable(), {"by": "x", "token": "run", "held": {}}
    with at_work(table, told, ["a", "b", "c"]):
        pass
    for left in (["a", "b", "c"], ["b", "c"], ["c"]):
        [(seconds, _)] = lives(table, meter_key(table, "run", left))
        assert seconds > 0


def test_a_process_knows_its_age():
    assert 0 < process_age_s() < 10**6


def hands(table, run, lost=()):
    """Return what hands out jobs to containers that live 100 s each, and of some jobs two."""
    given = []

    def hand_out(jobs):
        for job in jobs:
            given.append((job.stage, job.item))
            for _ in range(1 + (job.item in lost)):
                with container(table, f"{run}/{job.address}", 100.0, "NVIDIA L40S"):
                    pass
            yield [job], [cloud.JobResult(job.stage, job.item, job.address, "made")]

    return hand_out, given


def jobs_of(cfg, stage, items):
    addresses = stages.Addresses(cfg)
    return [cloud.FarJob(addresses, stage, item) for item in items]


@pytest.fixture
def priced(tmp_path):
    """(configuration, store, what its experts are expected to cost)."""
    cfg = load(tiny_config(tmp_path / "tiny"), ("modal.regions=[eu]",))
    store = Store(tmp_path / "store").open()
    usd = {stages.address(cfg, "train_experts", item): 0.25 for item in cfg.experts}
    usd[stages.address(cfg, "train_router")] = 2.0
    return cfg, store, cloud.Expected(PRICES, usd, 0.5, regions=("eu",))


def test_what_was_spent_is_written_down_beside_what_was_estimated(priced):
    cfg, store, expected = priced
    table, published = FakeTable(), []
    store = Store(store.root, publish=lambda: published.append(1))
    hand_out, _ = hands(table, "run-1", lost=cfg.experts[:1])
    ledger = cloud.Ledger(store, table, "run-1", expected)
    with ledger.kept("modal run x", [cfg]):
        wanted = jobs_of(cfg, "train_experts", cfg.experts)
        done = list(ledger.metered(hand_out, None)(wanted))
        assert [jobs for jobs, _ in done] == [[job] for job in wanted]
        assert read_costs(ledger.path).ended == ""
    assert len(published) == len(cfg.experts) + 2
    costs = read_costs(ledger.path)
    assert costs.ended and costs.command == "modal run x" and costs.prices == PRICES.checked
    first, *others, conducting = costs.rows
    # The L40S that it got, not the dearer A100 that it may get
    machine = TrainerConfig(gpu=("L40S",))
    usd = 100 * PRICES.usd_per_s(machine, ("eu",))
    assert (first.containers, first.seconds, first.estimated_usd) == (2, 200.0, 0.25)
    assert first.usd == pytest.approx(2 * usd)
    assert [row.usd for row in others] == [pytest.approx(usd)] * len(others)
    assert (conducting.stage, conducting.addresses) == (CONDUCTING, ())
    lived = PRICES.usd_per_s(CONDUCTOR, ("eu",), nonpreemptible=True) * conducting.seconds
    assert conducting.usd == pytest.approx(lived) and conducting.estimated_usd == 0.5
    console = wide()
    cloud.show_costs("run-1", *far(store.root), PRICES, console)
    assert f"it cost ${costs.usd:.2f} of an estimated ${costs.estimated_usd:.2f}" in (
        console.file.getvalue()
    )


def test_a_job_whose_data_were_looked_at_since_is_what_it_was_estimated_at(tmp_path):
    cfg, lines = estimated(tmp_path)
    told = cloud.expected(cfg, lines, PRICES, False)
    for line in lines:
        stage, _, _ = line.address.rpartition("-")
        assert told.of(line.address) == told.of(f"{stage}-0123456789ab") == line.usd
    assert told.of("train_experts-nobody-0123456789ab") is None


def test_one_of_many_trials_that_nobody_knows_yet_is_as_dear_as_the_dearest(tmp_path):
    cfg, (line, *_) = estimated(tmp_path, ("train_experts",))
    dear = replace(line, address="train_experts-sea-1", usd=3.0)
    done = replace(line, address="train_experts-sea-2", usd=0.0)
    for lines in ([dear, done], [done, dear]):
        told = cloud.expected(cfg, lines, PRICES, False)
        assert told.of("train_experts-sea-0123456789ab") == 3.0
        assert told.of(done.address) == 0.0


def test_the_next_attempt_goes_on_in_the_same_file(priced):
    cfg, store, expected = priced
    table = FakeTable()
    for item in cfg.experts[:2]:
        hand_out, _ = hands(table, "run-1")
        ledger = cloud.Ledger(store, table, "run-1", expected)
        with ledger.kept("modal run x", [cfg]):
            list(ledger.metered(hand_out, None)(jobs_of(cfg, "train_experts", [item])))
    (path,) = (store.root / "costs").iterdir()
    rows = read_costs(path).rows
    assert [len(row.addresses) for row in rows] == [1, 1, 0]
    assert rows[-1].containers == 2


def test_what_ended_while_nobody_handed_out_jobs_is_paid_for(priced):
    cfg, store, expected = priced
    table = FakeTable()
    one, two, *_ = (stages.address(cfg, "train_experts", item) for item in cfg.experts)
    crashed = cloud.Ledger(store, table, "run-1", expected)
    with crashed.kept("modal run x", [cfg]):
        pass
    # Both in one container, of which the next attempt asks for nothing, or for what is left
    told = {"by": "x", "token": "run-1", "held": {}}
    with at_work(table, told, [one, two]):
        pass
    ledger = cloud.Ledger(store, table, "run-1", expected)
    with ledger.kept("modal run x", [cfg]):
        found = {row.addresses: row for row in read_costs(ledger.path).rows}
        assert set(found) == {(one, two), ()} and found[one, two].usd > 0
        ledger.note("train_experts", [two], cfg.machine("train_experts"), True)
    rows = {row.addresses: row for row in read_costs(ledger.path).rows}
    # What the first one has done is of the same container, and is priced with it
    assert set(rows) == {(one, two), ()}
    assert rows[one, two].seconds == found[one, two].seconds
    assert rows[one, two].estimated_usd == found[one, two].estimated_usd == 0.5
    assert rows[one, two].made
    # One that another run had meanwhile is handed out once more, to a container of its own
    with at_work(table, told, [two]):
        pass
    first_s = rows[one, two].seconds
    ledger.note("train_experts", [two], cfg.machine("train_experts"), True)
    rows = {row.addresses: row for row in read_costs(ledger.path).rows}
    assert rows[one, two].containers == 2 and rows[one, two].seconds > first_s


def test_a_container_that_left_its_job_to_another_run_is_in_no_row(priced):
    cfg, store, expected = priced
    first, second, *_ = jobs_of(cfg, "train_experts", cfg.experts)

    def leaving(jobs):
        yield jobs, [cloud.JobResult(second.stage, second.item, second.address, "made")]
        yield jobs[:1], []

    table = FakeTable()
    ledger = cloud.Ledger(store, table, "run-1", expected)
    hand_out = ledger.metered(leaving, None)
    with ledger.kept("modal run x", [cfg]):
        came = list(hand_out([first, second]))
        assert [jobs for jobs, _ in came] == [[first, second], [first]]
        # Else it would say that its like take no time
        assert [row.addresses for row in ledger.costs.rows] == [(second.address,)]
        # One that was taken away in the middle, and left it when it came back, is paid for
        with container(table, f"run-1/{first.address}", 7.0):
            pass
        list(hand_out([first, second]))
    rows = {row.addresses: row for row in read_costs(ledger.path).rows}
    assert rows[(first.address,)].seconds == 7.0 and not rows[(first.address,)].made


def test_a_stage_that_would_bring_it_above_the_limit_is_not_begun(priced):
    cfg, store, expected = priced
    usd = 100 * PRICES.usd_per_s(TrainerConfig(gpu=("L40S",)), ("eu",)) * len(cfg.experts)
    for limit, begun in ((usd + 2.6, True), (usd + 2.4, False)):
        table, run = FakeTable(), f"run-{limit}"
        told = replace(expected, limit_usd=limit)
        ledger = cloud.Ledger(store, table, run, told)
        hand_out, given = hands(table, run)
        returned = []
        paid = ledger.metered(hand_out, returned.extend)
        with ledger.kept("modal run x", [cfg]):
            list(paid(jobs_of(cfg, "train_experts", cfg.experts)))
            if begun:
                list(paid(jobs_of(cfg, "train_router", [None])))
                continue
            with pytest.raises(
                ConfigError,
                match=rf"has cost \${usd:.2f} so far, and train_router is estimated at \$2.00, "
                rf"above modal.max_cost_usd {limit:.2f} \(prices of 2026-10-04\): raise the",
            ):
                list(paid(jobs_of(cfg, "train_router", [None])))
        assert ("train_router", None) not in given
        # Who types it again does not wait for the leases to end
        assert returned == [stages.address(cfg, "train_router")]


def attempted(priced, limit, paid_usd):
    """Return (ledger of a second attempt, what hands out its jobs, those it has handed out, leases
    that it gave back), of whose experts the first one has begun the first, for so much."""
    cfg, store, expected = priced
    table, told, returned = FakeTable(), replace(expected, limit_usd=limit), []
    with cloud.Ledger(store, table, "run-1", told).kept("modal run x", [cfg]):
        pass
    first = stages.address(cfg, "train_experts", cfg.experts[0])
    table.put(f"run-1/{first}", "fc-1")
    per_s = PRICES.usd_per_s(TrainerConfig(gpu=("L40S",)), ("eu",))
    with container(table, f"run-1/{first}", paid_usd / per_s, "NVIDIA L40S"):
        pass
    hand_out, given = hands(table, "run-1")
    ledger = cloud.Ledger(store, table, "run-1", told)
    return ledger, ledger.metered(hand_out, returned.extend), given, returned


def test_what_an_earlier_attempt_has_begun_counts_once_against_the_limit(priced):
    cfg, experts = priced[0], list(priced[0].experts)
    enough = 0.5 + 0.25 * len(experts) + 0.05
    ledger, hand_out, given, returned = attempted(priced, enough, 0.24)
    with ledger.kept("modal run x", [cfg]):
        assert [row.usd for row in ledger.costs.rows if row.addresses] == [pytest.approx(0.24)]
        list(hand_out(jobs_of(cfg, "train_experts", experts)))
    assert [item for _, item in given] == experts and returned == []


def test_what_an_earlier_attempt_has_begun_is_waited_for_whatever_it_costs(priced):
    cfg, (first, *others) = priced[0], priced[0].experts
    ledger, hand_out, given, returned = attempted(priced, 0.8, 7.0)
    with ledger.kept("modal run x", [cfg]):
        list(hand_out(jobs_of(cfg, "train_experts", [first])))
        assert given == [("train_experts", first)]
        # What nobody has begun is left to others, and what runs is not
        with pytest.raises(ConfigError, match=r"above modal.max_cost_usd 0.80"):
            list(hand_out(jobs_of(cfg, "train_experts", [first, *others])))
    assert returned == [stages.address(cfg, "train_experts", item) for item in others]
    assert len(given) == 1


def test_a_lost_attempt_s_jobs_are_paid_for_also_where_nobody_could_price_them(priced):
    cfg, store, _ = priced
    table, told = FakeTable(), cloud.Expected(PRICES)
    address = stages.address(cfg, "train_experts", cfg.experts[0])
    # A sweep tells its runs one by one
    for runs in ([cfg], []):
        run = f"run-{len(runs)}"
        with cloud.Ledger(store, table, run, told).kept("modal run x", runs):
            pass
        with container(table, f"{run}/{address}", 100.0):
            pass
        ledger = cloud.Ledger(store, table, run, told)
        with ledger.kept("modal run x", runs):
            ledger.catch_up(cfg)
            ledger.catch_up(cfg)
        first, conducting = sorted(read_costs(ledger.path).rows, key=lambda row: row.stage)[::-1]
        assert (first.addresses, first.seconds, conducting.stage) == ((address,), 100.0, CONDUCTING)
        # Still at work, so it says nothing of how long its like take
        assert first.usd > 0 and not first.made


def test_the_jobs_of_a_sweep_are_paid_for_by_their_own_runs(priced):
    cfg, store, expected = priced
    table = FakeTable()
    ledger = cloud.Ledger(store, table, "sweep", expected)
    wanted = jobs_of(cfg, "train_experts", cfg.experts)

    def containers(jobs):
        for job in jobs:
            with container(table, f"sweep/{job.address}", 100.0):
                pass
            yield [job], TimeoutError("gone")

    with ledger.kept("modal run x", []):
        came = list(ledger.metered(containers, list)(wanted))
    assert [job for (job,), _ in came] == wanted
    rows = read_costs(ledger.path).rows
    assert [row.addresses for row in rows[:-1]] == [
        (stages.address(cfg, "train_experts", item),) for item in cfg.experts
    ]
    assert not any(row.made for row in rows[:-1])


# ---- where it is told


@pytest.fixture(scope="module")
def paid(tmp_path_factory):
    """(store, ids of its two runs), whose trunk they share and of which one was paid for twice."""
    store, ids = small.filled(tmp_path_factory.mktemp("paid") / "store")
    trunk, expert = (
        small.address(*job) for job in (("train_shared", None, 1), ("train_experts", "sea", 10))
    )
    together = Spent(
        "train_experts", (expert, small.address("train_experts", "sea", 11)), 1, 50.0, 1.0, None
    )
    conducting = Spent(CONDUCTING, (), 1, 200.0, 0.5, 0.25)
    rows = (Spent("train_shared", (trunk,), 2, 100.0, 4.0, 3.0), together, conducting)
    begun = "2026-11-27T08:00:00Z"
    for name, of in (("a", tuple(ids)), ("b", (ids[0],))):
        checked = {"a": "2026-10-04", "b": "2026-11-01"}[name]
        costs = Costs("modal run", of, begun, begun, checked, rows)
        write_costs(costs_path(store, begun, name), costs)
    return store, ids


def told(store, *words):
    """Return what an action of `history` prints."""
    console = wide()
    args = argparse.Namespace(
        action=words[0],
        last=0,
        what=words[-1],
        runs=list(words[1:]),
        store=store.root,
        to=store.root.parent / "page.html",
        no_png=True,
        config=None,
    )
    history(args, store, console, lambda *_: None)
    return console.file.getvalue()


def test_history_and_runs_tell_what_each_run_has_cost(paid):
    store, ids = paid
    # Of both commands: the trunk, half of what two experts shared, its part of what handed out
    first, second = 2 * (4.0 + 0.5) + 0.25 + 0.5, 2 * (4.0 + 0.5) + 0.25
    text = told(store, "list")
    for usd in (first, second):
        assert re.search(rf"{usd:.2f}\s", text), text
    when = "by prices of 2026-10-04 to 2026-11-01"
    assert f"2 commands on Modal have cost $11.00 {when}" in text
    text = told(store, "show", ids[0])
    assert "train_shared" in text and "6.00" in text and f"{first:.2f}" in text
    assert f"costs {when}" in text
    console = wide()
    show_runs(store, console)
    assert f"{first:.2f}" in console.file.getvalue() and f"{second:.2f}" in console.file.getvalue()
    told(store, "report", *ids)
    page = (store.root.parent / "page.html").read_text("utf-8")
    assert "Costs on Modal" in page and "conducting" in page and f"Told {when}." in page
    assert f"US$: {when}" in console.file.getvalue()
    assert by_prices(["2026-10-04", ""]) == "by prices of 2026-10-04" and by_prices([""]) == ""


def test_costs_that_were_changed_are_told_and_count_for_nothing(paid, tmp_path):
    store = small.new_store(tmp_path / "store")
    path = costs_path(store, "2026", "a")
    write_costs(path, Costs("x", (), "", "", "", (Spent("a", ("b",), 1, 1.0, 1.0, None),)))
    path.write_text(path.read_text().replace('"usd": 1.0', '"usd": 0.0'))
    with pytest.raises(DamagedArtifact, match="its bytes have changed"):
        read_costs(path)
    assert "its bytes have changed" in told(store, "list")


@pytest.mark.parametrize(
    ("argv", "bundle", "wanted"),
    [
        (["modal", "run", "modal_app.py::evaluate"], "", {"run": "mine", "command": "evaluate"}),
        (["modal", "deploy", "modal_app.py"], "deploy-1@0a", {"bundle": "deploy-1"}),
        (["pytest", "x.py::test_a[1]"], "", {}),
    ],
)
def test_apps_carry_tags_that_modal_takes(argv, bundle, wanted):
    from modal._utils.name_utils import check_tag_dict

    found = cloud.tags("mine", argv, bundle)
    assert found == {"program": "moleforge"} | wanted
    check_tag_dict(cloud.tags("x" * 64, argv, bundle))
