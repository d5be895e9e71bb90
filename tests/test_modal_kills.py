"""A run on Modal of which a container, whoever hands out its jobs, or all at once end at moments of
every stage, and whose volume refuses: it ends by itself or with the same command, and leaves the
bytes of a run that nothing happened to.

Processes are played in this one: each has a view of the volume of its own, and one that dies asks
for nothing any more and loses what it has not committed.
"""

import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import lora_small
import pytest
from conftest import tiny_config
from fakes import Killed, StubbedVolume, contents
from test_cloud_leases import FakeTable

from pipeline import cloud
from pipeline.cloud.leases import LASTS_S, Leases
from pipeline.config.base import merge
from pipeline.families.load import load, parse
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store
from pipeline.store.costs import readable_costs

PRICES = cloud.Prices.load(Path(__file__).parent.parent / "config/prices.yaml")
CONDUCTOR, CONTAINER = "conductor", "container"
KILLED, ALL_KILLED, REFUSED = "killed", "all killed", "refused"


@dataclass(frozen=True)
class Fault:
    """What happens to a process as it is about to do something for the nth time."""

    role: str
    what: str
    how: str
    nth: int = 1


def faults(saves: bool) -> list[Fault]:
    """Return what happens in a stage, which saves on its way or not, one after another."""
    found = [
        # It has begun, and asked for nothing
        Fault(CONDUCTOR, "put", KILLED),
        # A container is asked for, and that is noted nowhere
        Fault(CONDUCTOR, "started", KILLED),
        Fault(CONTAINER, "put", KILLED),
        Fault(CONTAINER, "reload", REFUSED),
        Fault(CONTAINER, "commit", REFUSED),
        # As when the laptop goes, without --detach
        Fault(CONTAINER, "commit", ALL_KILLED, 2 if saves else 1),
    ]
    if saves:
        found.append(Fault(CONTAINER, "commit", KILLED))
    return [
        *found,
        # All is committed, and nobody was told
        Fault(CONTAINER, "answer", KILLED),
        # It was told, and has noted nothing of it
        Fault(CONDUCTOR, "came", KILLED),
    ]


class World:
    """A volume, a table, calls, and what is to happen next."""

    def __init__(self, folder, cfg):
        self.volume, self.table, self.cfg = StubbedVolume(folder), FakeTable(), cfg
        self.calls, self.pending, self.late_s, self.runs = {}, [], 0.0, 0
        self.all_dead = False
        self.type_again()

    def type_again(self):
        """Begin another run of the same, as one who types the command again does."""
        self.runs += 1
        self.run, self.all_dead = f"run-{self.runs}", False

    def now(self):
        """Return the time, which goes on by as much as anybody waits for the dead."""
        return time.time() + self.late_s

    def wait(self, _seconds):
        """Wait until leases that nobody renews have ended."""
        self.late_s += LASTS_S + 1

    def attempt(self, stage):
        """Hand out the jobs of a stage, as modal_app.py's orchestrate does."""
        process = Process(self, CONDUCTOR)
        store = Store(process.view.path, publish=process.commit, refresh=process.reload)
        cfg = cloud.looked_at_once(self.cfg, store, False, process, self.run)
        raw = cfg.model_dump(mode="json")
        leases = Leases(process, cfg.name, self.run, clock=self.now)

        def start(jobs):
            call = Call(self, stage, raw, [job.item for job in jobs], leases.told())
            process.asks("started")
            return WaitedFor(process, call)

        def find(called):
            return WaitedFor(process, self.calls[called])

        hand_out = cloud.by_calls(self.run, process, False, start, find)
        ledger = cloud.Ledger(store, process, self.run, cloud.Expected(PRICES))
        hand_out = ledger.metered(hand_out, leases.give_back)
        begun = cloud.begun(cfg, store, "modal run x", run=self.run)
        try:
            with leases.kept(conducts=True), begun, ledger.kept("modal run x", [cfg]):
                given = (cfg, (stage,), store, hand_out, "again", lambda _text: None, leases)
                return cloud.orchestrate(*given, self.wait)
        finally:
            shutil.rmtree(process.view.path)


class Process:
    """Something that Modal runs: what it asks of the volume and of the table, until it dies."""

    def __init__(self, world, role):
        self.world, self.role, self.view = world, role, world.volume.view()
        self.asked, self.dead = Counter(), False

    def asks(self, what):
        """Be about to do something; what is to happen to it then does."""
        if self.dead or self.world.all_dead:
            raise Killed
        self.asked[what] += 1
        if not self.world.pending:
            return
        fault = self.world.pending[0]
        if (fault.role, fault.what) != (self.role, what) or self.asked[what] < fault.nth:
            return
        if fault.how == REFUSED:
            # For good: until the command has ended
            raise RuntimeError(f"{what} was refused")
        self.world.pending.pop(0)
        self.dead, self.world.all_dead = True, fault.how == ALL_KILLED
        raise Killed

    def commit(self):
        """Let others see what was written here."""
        self.asks("commit")
        self.view.commit()

    def reload(self):
        """See what others have committed."""
        self.asks("reload")
        self.view.reload()

    def get(self, key, default=None):
        """Return what stands in the table."""
        self.asks("get")
        return self.world.table.get(key, default)

    def put(self, key, value, *, skip_if_exists=False):
        """Write to the table."""
        self.asks("put")
        return self.world.table.put(key, value, skip_if_exists=skip_if_exists)


class Call:
    """Jobs that a container was asked for, and another one after it was lost."""

    def __init__(self, world, stage, raw, items, told):
        self.object_id, self.came = f"fc-{len(world.calls)}", None
        self.world, self.stage, self.raw, self.items, self.told = world, stage, raw, items, told
        world.calls[self.object_id] = self

    def get(self):
        """Return what it comes to, however often somebody asks."""
        while self.came is None:
            try:
                self.came = self._once()
            except RuntimeError as error:
                # As after the last try that Modal gives a container
                self.came = error
            except Killed:
                if self.world.all_dead:
                    raise
        if isinstance(self.came, Exception):
            raise self.came
        return self.came

    def _once(self):
        process = Process(self.world, CONTAINER)

        def renewing(addresses):
            return cloud.at_work(process, self.told, addresses)

        def takes(address):
            return cloud.takes(process, self.told, address, self.object_id)

        here = (process.view.path, process.commit, process.reload)
        try:
            came = cloud.work(self.stage, self.raw, self.items, *here, renewing, takes)
            process.asks("answer")
        finally:
            shutil.rmtree(process.view.path)
        return came


@dataclass(frozen=True)
class WaitedFor:
    """A call as whoever hands out jobs sees it."""

    process: Process
    call: Call

    @property
    def object_id(self):
        """What it is found again by."""
        return self.call.object_id

    def get(self):
        """Wait for it."""
        came = self.call.get()
        self.process.asks("came")
        return came


def done_through(world, stage, saves):
    """Do a stage while all of it happens; return how often Modal, and how often a person, began
    what hands out its jobs once more."""
    again = Counter()
    world.pending = faults(saves)
    while True:
        try:
            results = world.attempt(stage)
        except Killed:
            if world.all_dead:
                world.type_again()
                again["typed"] += 1
            else:
                again["by itself"] += 1
            continue
        errors = [result.error for result in results if result.error]
        if not errors and not world.pending:
            return again
        assert errors and all(each.startswith("RuntimeError: ") for each in errors), errors
        # What is refused now was refused to the end
        refused = world.pending.pop(0)
        assert refused.how == REFUSED and f"{refused.what} was refused" in errors[0]
        world.type_again()
        again["typed"] += 1


def small_text(folder):
    """Return the settings of a mixture of feed-forward experts that saves after each step."""
    quick = {"steps": 3, "eval_every_steps": 2, "eval_tokens": 256}
    sections = {
        "trunk": quick,
        "expert": quick | {"statistics_tokens": 64},
        "router": quick,
        "dense": {"baselines": ["total"]},
        "evaluate": {"tokens_per_domain": 128, "bootstrap": 10},
        "runtime": {"save_every_s": 1e-9},
    }
    return load(tiny_config(folder, **sections))


def small_adapters(_folder):
    """Return the settings of a mixture of adapters, likewise."""
    quick = {"steps": 2, "warmup_steps": 1, "eval_every_steps": 1, "eval_tokens": 60}
    changes = {
        "loras": {"defaults": quick},
        "evaluate": {
            "rows_per_task": 8,
            "baseline_rows": 8,
            "consistency_rows": 1,
            "bootstrap": 10,
        },
        "runtime": {"save_every_s": 1e-9},
    }
    return parse(merge(lora_small.SETTINGS, changes))


@pytest.mark.parametrize("settings", [small_text, small_adapters])
def test_whatever_ends_in_a_stage_it_leaves_the_bytes_of_an_undisturbed_run(settings, tmp_path):
    cfg = settings(tmp_path / "data")
    local = Store(tmp_path / "local").open()
    world = World(tmp_path / "far", cfg)
    for stage in (*stages.RUN, "deploy"):
        items = list(cfg.items(stage)) if stage in cfg.stages else []
        if not items:
            continue
        made = [run_job(stage, cfg, local, item, progress=quiet) for item in items]
        again = done_through(world, stage, saves=bool(made[0].metrics.get("steps")))
        # Two refusals and a laptop; twice before a container is noted, and once after it has ended
        assert again == {"typed": 3, "by itself": 3}, stage
    assert contents(world.volume.path) == contents(local.root) != {}
    # Whoever came to an end has said what it cost
    ended = [costs.command for costs in readable_costs(Store(world.volume.path)) if costs.ended]
    assert ended and set(ended) == {"modal run x"}
