"""Two runs that want the same: each job has one who does it, whoever claims at once, dies or comes
back."""

import shutil
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from pipeline import cloud
from pipeline.cloud.calls import is_handed_out
from pipeline.cloud.leases import LASTS_S, Leases
from pipeline.errors import ConfigError
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store

# What containers are given of the leases of a run
RUN = {"by": "one", "token": "run", "held": {}}


class FakeTable:
    """What containers share, with the promise that Modal makes: a new key is put once."""

    def __init__(self):
        self.entries, self._lock = {}, threading.Lock()

    def get(self, key, default=None):
        return self.entries.get(key, default)

    def put(self, key, value, *, skip_if_exists=False):
        with self._lock:
            if skip_if_exists and key in self.entries:
                return False
            self.entries[key] = value
            return True


class Clock:
    """A time that tests move."""

    def __init__(self):
        self.at = 1000.0

    def __call__(self):
        return self.at


@pytest.fixture
def pair():
    """(table, clock, leases of one run, leases of another)."""
    table, clock = FakeTable(), Clock()
    return table, clock, Leases(table, "one", clock=clock), Leases(table, "two", clock=clock)


def test_a_job_is_one_run_s_until_it_gives_it_back(pair):
    _, _, one, two = pair
    assert one.claim("a") is None
    assert two.claim("a").by == "one"
    assert two.claim("b") is None
    one.give_back(["a", "b"])
    assert two.claim("a") is None
    assert one.claim("b").by == "two"


def test_the_lease_of_who_died_ends_and_one_that_is_renewed_does_not(pair):
    _, clock, one, two = pair
    one.claim("a")
    clock.at += LASTS_S - 1
    assert two.claim("a").by == "one"
    one.renew()
    clock.at += LASTS_S - 1
    assert two.claim("a").by == "one"
    clock.at += 2
    assert two.claim("a") is None
    # Who was taken for dead takes nothing away when it is there again
    one.renew()
    assert one.told()["held"] == {}
    assert one.claim("a").by == "two"
    one.give_back(["a"])
    assert Leases(one.table, "three", clock=clock).claim("a").by == "two"


def test_another_attempt_of_a_run_has_its_leases(pair):
    table, clock, one, two = pair
    one.claim("a")
    again = Leases(table, "one", one.token, clock=clock)
    assert again.claim("a") is None and again.told() == one.told()
    again.give_back(["a"])
    assert two.claim("a") is None


def test_the_containers_of_a_run_renew_what_they_do_when_it_has_died(pair):
    table, clock, one, two = pair
    one.claim("a")
    one.claim("b")
    theirs = Leases.of(table, one.told(), ["a", "elsewhere"])
    theirs._clock = clock
    assert theirs.told()["held"] == {"a": 0}
    clock.at += LASTS_S - 1
    theirs.renew()
    clock.at += 2
    assert two.claim("a").by == "one"
    assert two.claim("b") is None


def test_a_container_that_began_late_renews_what_another_attempt_has_claimed_anew(pair):
    table, clock, one, two = pair
    one.claim("a")
    # Its job waits for a machine while the first attempt is lost
    late = Leases.of(table, one.told(), ["a"])
    late._clock = clock
    clock.at += LASTS_S + 1
    assert Leases(table, "one", one.token, clock=clock).claim("a") is None
    clock.at += LASTS_S - 1
    late.renew()
    assert late.told()["held"] == {"a": 1}
    clock.at += 2
    assert two.claim("a").by == "one"
    # Another run's is another run's
    clock.at += LASTS_S
    assert two.claim("a") is None
    late.renew()
    assert late.told()["held"] == {} and one.claim("a").by == "two"


def test_a_container_begins_only_what_no_other_run_has_claimed(pair):
    table, clock, one, two = pair
    one.claim("a")

    def container():
        leases = Leases.of(table, one.told(), ["a"])
        leases._clock = clock
        return leases

    late = container()
    clock.at += LASTS_S + 1
    assert two.claim("a") is None
    assert late.begin("a").by == "two"
    # What that has given back, or let end, is the container's
    two.give_back(["a"])
    assert late.begin("a") is None and two.claim("a").by == "one"
    clock.at += LASTS_S - 1
    late.renew()
    clock.at += 2
    assert two.claim("a").by == "one"
    # Who handed it out gives back what its containers have claimed too
    again = container()
    assert again.begin("a") is None
    one.give_back(["a"])
    assert two.claim("a") is None


def test_of_a_container_and_a_run_that_saw_its_lease_expired_one_gets_the_job():
    for _ in range(20):
        table, clock = FakeTable(), Clock()
        one = Leases(table, "one", clock=clock)
        one.claim("a")
        clock.at += LASTS_S
        start, got = threading.Barrier(2), []

        def container(one=one, start=start, got=got):
            start.wait()
            if one.begin("a") is None:
                got.append("container")

        def other(table=table, clock=clock, start=start, got=got):
            start.wait()
            if Leases(table, "two", clock=clock).claim("a") is None:
                got.append("run")

        threads = [threading.Thread(target=each) for each in (container, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1


@pytest.mark.parametrize("ended", ["never", "expired", "given back", "torn"])
def test_of_those_that_claim_at_once_one_gets_it(ended):
    for _ in range(20):
        table, clock = FakeTable(), Clock()
        before = Leases(table, "before", clock=clock)
        if ended != "never":
            before.claim("a")
            clock.at += 0 if ended != "expired" else LASTS_S + 1
            if ended == "given back":
                before.give_back(["a"])
            if ended == "torn":
                table.entries["a/0"] = "{"
        start, got = threading.Barrier(6), []

        def claim(name, table=table, clock=clock, start=start, got=got):
            leases = Leases(table, name, clock=clock)
            start.wait()
            if leases.claim("a") is None:
                got.append(name)

        threads = [threading.Thread(target=claim, args=(f"run {n}",)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1


def test_a_lease_that_ended_is_taken_anew_and_one_that_was_given_back_is_not(pair):
    table, clock, one, two = pair
    one.claim("a")
    clock.at += LASTS_S
    # Who saw it ended may be claiming it while it is renewed
    before = dict(table.entries)
    one.renew()
    assert {key: table.entries[key] for key in before} == before
    assert not one.is_lost("a") and two.claim("a").by == "one"
    theirs = Leases.of(table, one.told(), ["a"])
    theirs._clock = clock
    one.give_back(["a"])
    theirs.renew()
    assert theirs.is_lost("a") and two.claim("a") is None


def test_a_lease_is_lost_once_it_was_not_renewed_for_as_long_as_it_lasts(pair):
    table, clock, one, two = pair
    one.claim("a")
    reach, table.get = table.get, None
    clock.at += LASTS_S
    with suppress(TypeError):
        one.renew()
    assert not one.is_lost("a") and not one.is_lost("elsewhere")
    clock.at += 1
    assert one.is_lost("a")
    # Nobody has taken it meanwhile
    table.get = reach
    one.renew()
    assert not one.is_lost("a")
    clock.at += LASTS_S
    assert two.claim("a") is None
    one.renew()
    assert one.is_lost("a") and one.claim("a").by == "two"


@pytest.fixture
def begun(bundled, tmp_path):
    """(configuration, store) of a run whose experts are missing, and nothing before them."""
    store = Store(shutil.copytree(bundled[1], tmp_path / "store"))
    return load(bundled[0], ("expert.steps=3",)), store


def orchestrated(cfg, store, leases, hand_out, wait):
    """Do train_experts as a run with those leases; return (results, what it told)."""
    told = []
    results = cloud.orchestrate(
        cfg, ("train_experts",), store, hand_out, "again", told.append, leases, wait
    )
    return results, told


class Left(Exception):
    """Who waits has gone."""


def test_what_one_run_does_another_does_not_begin(begun):
    cfg, store = begun
    table, handed = FakeTable(), []

    def other(jobs):
        handed.extend(("two", job.item) for job in jobs)
        return []

    def leave(_seconds):
        raise Left

    def one(jobs):
        for job in jobs:
            with pytest.raises(Left):
                orchestrated(cfg, store, Leases(table, "two"), other, leave)
            handed.append(("one", job.item))
            made = run_job(job.stage, cfg, store, job.item, progress=quiet)
            yield [job], [cloud.JobResult.of(made, "made")]

    results, told = orchestrated(cfg, store, Leases(table, "one"), one, leave)
    assert handed == [("one", item) for item in cfg.experts]
    assert [result.state for result in results] == ["made"] * len(cfg.experts)
    assert told == [f"train_experts {item}: made" for item in cfg.experts]


def test_a_run_waits_for_another_and_takes_over_what_it_gives_up(begun):
    cfg, store = begun
    table, handed, waited = FakeTable(), [], []
    first = Leases(table, "one")
    addresses = {item: stages.address(cfg, "train_experts", item) for item in cfg.experts}
    done, given_up, *_ = cfg.experts
    for item in (done, given_up):
        assert first.claim(addresses[item]) is None

    def make(jobs):
        for job in jobs:
            handed.append(job.item)
            made = run_job(job.stage, cfg, store, job.item, progress=quiet)
            yield [job], [cloud.JobResult.of(made, "made")]

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 1:
            run_job("train_experts", cfg, store, done, progress=quiet)
        first.give_back([addresses[(done, given_up)[len(waited) - 1]]])

    results, told = orchestrated(cfg, store, Leases(table, "two"), make, wait)
    assert handed == [*cfg.experts[2:], given_up] and waited == [1.0, 2.0]
    assert [result.state for result in results if result.item == done] == ["found"]
    assert not any(result.error for result in results)
    waiting = [text for text in told if "does it since" in text]
    assert [text.partition(":")[0] for text in waiting] == [
        f"train_experts {done}",
        f"train_experts {given_up}",
    ]
    # All is given back
    assert all(Leases(table, "three").claim(each) is None for each in addresses.values())


def test_what_is_made_stays_made_where_the_rest_of_its_stage_is_refused(begun):
    cfg, store = begun
    first = cfg.experts[0]

    def hand_out(jobs):
        made = run_job("train_experts", cfg, store, first, progress=quiet)
        yield jobs[:1], [cloud.JobResult.of(made, "made")]
        raise ConfigError("too dear")

    results, told = orchestrated(cfg, store, Leases(FakeTable(), "one"), hand_out, None)
    assert [result.state for result in results] == ["made"] + ["failed"] * (len(cfg.experts) - 1)
    assert all("too dear" in result.error for result in results[1:])
    assert told[-1] == "train_experts: too dear"


def test_a_run_that_cannot_begin_has_failed_whatever_its_first_stage_is(finished, tmp_path):
    cfg = load(finished[0])
    # A rate that is a number is searched by nobody
    assert not cfg.items("lr_experts")
    for wanted, items in (
        (["lr_experts", "train_experts"], list(cfg.experts)),
        (["lr_experts"], [None]),
    ):
        results = cloud.not_done(cfg, wanted, Store(tmp_path), ConfigError("no such thing"))
        assert [(result.stage, result.item) for result in results] == [
            (wanted[-1], item) for item in items
        ]
        assert all("no such thing" in result.error for result in results)


class FakeCall:
    """A container that was asked for."""

    def __init__(self, number, results):
        self.object_id, self._results = f"fc-{number}", results

    def get(self):
        if isinstance(self._results, Exception):
            raise self._results
        return self._results


@pytest.mark.parametrize("sequential", [False, True])
def test_the_next_attempt_waits_for_what_was_begun_and_begins_the_rest(finished, sequential):
    cfg = load(finished[0])
    table, calls, begun = FakeTable(), {}, []

    def start(jobs):
        if len(begun) == 2:
            raise Left
        items = [job.item for job in jobs]
        begun.append(items)
        results = [cloud.JobResult("train_experts", item, "x", "made") for item in items]
        call = FakeCall(len(calls), results if len(begun) > 1 else ValueError("lost"))
        return calls.setdefault(call.object_id, call)

    def attempt(items):
        addresses = stages.Addresses(cfg)
        jobs = [cloud.FarJob(addresses, "train_experts", item) for item in items]
        out = cloud.by_calls("run", table, sequential, start, calls.__getitem__)
        return [([job.item for job in group], came) for group, came in out(jobs)]

    sea, shop, hall = cfg.experts
    if not sequential:
        # Ended by its limit, when two of three were handed out
        with pytest.raises(Left):
            attempt([sea, shop, hall])
        begun.clear()
        ended = attempt([sea, shop, hall])
        assert begun == [[hall]]
        assert [items for items, _ in ended] == [[sea], [shop], [hall]]
        assert isinstance(ended[0][1], ValueError) and ended[1][1][0].item == shop
        return
    attempt([sea, shop])
    # The first is whole by now, and the container has the second
    ended = attempt([shop])
    assert begun == [[sea, shop]] and [items for items, _ in ended] == [[shop]]


def test_a_job_that_was_begun_and_not_noted_is_done_by_one_call(finished):
    cfg = load(finished[0])
    addresses = stages.Addresses(cfg)
    job = cloud.FarJob(addresses, "train_experts", cfg.experts[0])
    address = job.address
    made = [cloud.JobResult("train_experts", job.item, address, "made")]
    for noted_first in ("container", "conductor"):
        table, calls = FakeTable(), {}

        def start(_jobs, calls=calls, table=table, noted_first=noted_first):
            call = FakeCall(len(calls), made)
            calls[call.object_id] = call
            if len(calls) == 1:
                # Killed between the call and its note
                if noted_first == "container":
                    assert cloud.takes(table, RUN, address, call.object_id)
                raise Left
            return call

        def attempt(table=table, calls=calls, start=start):
            out = cloud.by_calls("run", table, False, start, calls.__getitem__)
            return list(out([job]))

        with pytest.raises(Left):
            attempt()
        assert attempt() == [([job], made)]
        # Where the lost one had begun there is no second; else it finds the job taken, and ends
        assert len(calls) == (1 if noted_first == "container" else 2)
        doing = [call for call in calls if cloud.takes(table, RUN, address, call)]
        assert len(doing) == 1
        # A container that comes back after a preemption has it still
        assert cloud.takes(table, RUN, address, doing[0])


def test_a_queued_container_whose_run_was_taken_for_dead_ends_with_nothing_done(begun):
    cfg, store = begun
    lost, *others = cfg.experts
    address = stages.address(cfg, "train_experts", lost)
    table, clock, calls, trained = FakeTable(), Clock(), {}, []
    one = Leases(table, "one", "run", clock=clock)
    two = Leases(table, "two", clock=clock)

    class Queued(FakeCall):
        """A container that comes up when somebody waits for it."""

        def __init__(self, job, told):
            super().__init__(len(calls), None)
            self.job, self.told = job, told

        def get(self):
            if not cloud.takes(table, self.told, self.job.address, self.object_id):
                return []
            trained.append(self.job.item)
            made = run_job("train_experts", cfg, store, self.job.item, progress=quiet)
            return [cloud.JobResult.of(made, "made")]

    def start(jobs):
        call = Queued(jobs[0], one.told())
        calls[call.object_id] = call
        if len(calls) == len(cfg.experts):
            # For longer than its leases last nobody hears of it, and another run has the first job
            clock.at = time.time()
            assert two.claim(address) is None
        return call

    def wait(_seconds):
        # What has left is handed out anew once the other one has given up
        assert not is_handed_out(table, "run", address)
        assert trained == others
        two.give_back([address])

    hand_out = cloud.by_calls("run", table, False, start, calls.__getitem__)
    results = cloud.orchestrate(
        cfg, ("train_experts",), store, hand_out, "again", lambda _text: None, one, wait
    )
    assert [result.state for result in results] == ["made"] * len(cfg.experts)
    assert trained == [*others, lost] and len(calls) == len(cfg.experts) + 1
    # The container that left does not take it up when it is begun once more
    assert not cloud.takes(table, RUN, address, "fc-0")


def test_a_container_that_is_cut_off_from_the_leases_ends_with_its_next_checkpoint(
    begun, monkeypatch, capsys
):
    cfg, store = begun
    saving = cfg.runtime.model_copy(update={"save_every_s": 1e-9})
    cfg = cfg.model_copy(update={"runtime": saving})
    raw = cfg.model_dump(mode="json")
    addresses = {stages.address(cfg, "train_experts", item): item for item in cfg.experts}
    table, calls, states = FakeTable(), {}, []
    one = Leases(table, "one", "run")

    class Container(FakeCall):
        """One that does its job when somebody waits for it; the first one is soon cut off."""

        def __init__(self, jobs, told):
            super().__init__(len(calls), None)
            self.jobs, self.told, self.first = jobs, told, not calls

        @contextmanager
        def renewing(self, wanted):
            with cloud.at_work(table, self.told, wanted) as is_lost:
                saves = []

                def asked(address):
                    saves.append(address)
                    if self.first and len(saves) == 2:
                        monkeypatch.setattr("pipeline.cloud.leases.LASTS_S", -1.0)
                    return is_lost(address)

                yield asked

        def get(self):
            items = [job.item for job in self.jobs]
            done = cloud.work(
                *("train_experts", raw, items, store.root, lambda: None, lambda: None),
                self.renewing,
                lambda address: cloud.takes(table, self.told, address, self.object_id),
            )
            monkeypatch.undo()
            if self.first:
                first, *_ = addresses
                assert not store.has(first) and done == []
                states.extend(store.resume(first).glob("*/state.json"))
            return done

    def start(jobs):
        call = Container(jobs, one.told())
        return calls.setdefault(call.object_id, call)

    hand_out = cloud.by_calls("run", table, True, start, calls.__getitem__)
    results, _ = orchestrated(cfg, store, one, hand_out, lambda _seconds: None)
    assert [result.state for result in results] == ["made"] * len(cfg.experts)
    # One container for all of them, and one that went on from its checkpoint
    assert len(calls) == 2 and states
    said = capsys.readouterr()
    assert "its lease could not be renewed and another container may be at it" in said.out
    assert "going on" in said.err or "step 1" in said.err
    undisturbed = {}
    for address, item in addresses.items():
        weights = store.folder(address) / "expert.safetensors"
        undisturbed[address] = weights.read_bytes()
        shutil.rmtree(store.folder(address))
        run_job("train_experts", cfg, store, item, progress=quiet)
        assert weights.read_bytes() == undisturbed[address]


def test_a_container_leaves_what_another_call_does(finished, tmp_path):
    cfg, store = load(finished[0]), Store(finished[1])
    taken = stages.address(cfg, "train_experts", cfg.experts[0])

    def takes(address):
        return address != taken

    results = cloud.work(
        *("train_experts", cfg.model_dump(mode="json"), list(cfg.experts[:2]), store.root),
        *(lambda: None, lambda: None),
        takes=takes,
    )
    assert [result.item for result in results] == [cfg.experts[1]]


def test_who_conducts_is_known_to_be_there_until_nobody_has_been_for_long():
    table, clock = FakeTable(), Clock()
    one = Leases(table, "one", "token", clock=clock)

    def alive():
        return cloud.is_alive(table, "token", ["a"], clock)

    # Older runs are in no table
    assert alive()
    with suppress(Left), one.kept(conducts=True):
        assert one.claim("a") is None
        assert alive()
        raise Left
    # Another attempt may come
    assert alive()
    clock.at += LASTS_S - 1
    Leases.of(table, one.told(), ["a"]).table.put("a/0", one._value(LASTS_S))
    clock.at += 2
    # A container is still at work
    assert alive()
    clock.at += LASTS_S
    assert not alive()
    with Leases(table, "one", "token", clock=clock).kept(conducts=True):
        assert alive()
    assert not alive()
