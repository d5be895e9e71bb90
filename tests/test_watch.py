"""`watch`: how far jobs are and how long they will take, here and on a volume, and that it ends."""

import io
from contextlib import contextmanager
from dataclasses import replace

import pytest
import small
import small_histories as made
from rich.console import Console

from pipeline.__main__ import main
from pipeline.cloud import watching as far_watching
from pipeline.cloud.far import on_volume
from pipeline.errors import ConfigError
from pipeline.run.history import positions, watching
from pipeline.run.history.positions import look
from pipeline.run.identity import with_prints
from pipeline.run.stages import Addresses
from pipeline.store import in_use
from pipeline.store.artifacts import write_text
from pipeline.store.reading import sealed
from pipeline.store.roots import Root, leave

NOW = made.TIME + 45


@pytest.fixture(scope="module")
def cfg():
    """A run that says what it reads, so that nothing is looked at."""
    return with_prints(small.config(), {})


@pytest.fixture
def begun(tmp_path, cfg):
    """A store and the root of a run in it: one expert is done, one half trained, one to do."""
    store = made.new_store(tmp_path / "store")
    addresses = Addresses(cfg)
    done, half, _ = (addresses.of("train_experts", domain) for domain in small.DOMAINS)
    made.write_history(store, done, made.rows())
    made.write_artifact(store, done, "train_experts", "alpha", {"steps": 60})
    made.write_history(store, half, made.rows(steps=40), steps=100)
    everything = tuple(sorted(set(addresses.reachable())))
    settings = addresses.cfg.model_dump(mode="json")
    root = Root("small", cfg.family, "2026-11-27T08:00:00Z", "small.yaml", (), everything, settings)
    leave(store, root)
    return store, root


@contextmanager
def working(store, root):
    """Have a run in progress, as far as others see."""
    with in_use.using(store, root.addresses):
        yield


def seen(store, root, usual=(), now_s=NOW):
    """Return a look and its positions by their names."""
    found = look(store, root, dict(usual), now_s)
    return found, {each.name: each for each in found.positions}


def test_each_job_has_its_position_and_the_rest_takes_as_long_as_its_siblings(begun):
    store, root = begun
    with working(store, root):
        found, of = seen(store, root)
    assert found.in_progress and not found.is_over and found.done == 1
    assert of["train_experts alpha"].state == positions.DONE
    assert of["train_experts alpha"].taken_s == 61.5
    half = of["train_experts beta"]
    assert (half.state, half.step, half.steps) == (positions.RUNNING, 40, 100)
    # a row takes ten seconds a ten steps, the last one was written at 41 s, four ago
    assert half.left_s == pytest.approx(60 * 31 / 30 - 4)
    assert half.valid_nats < half.curve[0] and half.nats == half.curve[-1]
    # as long as the median of the other two
    whole_s = 100 * 31 / 30
    assert of["train_experts gamma"].state == positions.TO_DO
    assert of["train_experts gamma"].left_s == pytest.approx((61.5 + whole_s) / 2)
    assert found.left_s == pytest.approx(half.left_s + of["train_experts gamma"].left_s)
    assert "evaluate" in found.unknown and "train_experts gamma" not in found.unknown


def test_what_runs_took_before_tells_what_this_one_cannot(begun):
    store, root = begun
    usual = dict.fromkeys(("tokenizer", "preprocess", "train_shared", "train_router"), 5.0)
    found, of = seen(store, root, usual | {"evaluate": 7.0, "train_experts": 1.0})
    assert of["evaluate"].left_s == 7.0
    # its own siblings know better
    assert of["train_experts gamma"].left_s > 60
    assert not found.unknown


def test_a_run_that_was_killed_has_stopped_and_one_that_says_nothing_is_quiet(begun):
    store, root = begun
    found, of = seen(store, root)
    assert of["train_experts beta"].state == positions.STOPPED
    assert not found.in_progress and found.is_over
    with working(store, root):
        _, of = seen(store, root, now_s=NOW + 3_600)
    assert of["train_experts beta"].state == positions.QUIET


def test_jobs_of_settings_that_are_not_understood_are_those_that_left_something(begun):
    store, root = begun
    odd = replace(root, settings={"family": "ffn_moe", "no": "such"})
    found, of = seen(store, odd)
    assert set(of) == {"train_experts alpha", "train_experts beta"}
    assert found.done == 1


def test_it_looks_until_the_run_has_ended_and_tells_how(begun):
    store, root = begun
    console = Console(file=io.StringIO(), width=200)
    waits = []

    def looked():
        return look(store, root, {}, NOW)

    note = in_use.using(store, root.addresses)
    note.__enter__()

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            note.__exit__(None, None, None)

    last = watching.follow(looked, console, 2.0, wait=wait)
    assert waits == [2.0] * 3 and not last.in_progress
    printed = console.file.getvalue()
    assert "40 of 100" in printed and f"1 of {len(last.positions)} jobs done" in printed
    # what has not changed is not printed again
    assert printed.count("train_experts beta") == 2
    assert "goes on from where it stopped" in printed


def test_on_a_terminal_it_is_drawn_over_and_over(begun):
    store, root = begun
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    looks = iter([True, True, False])

    def looked():
        return replace(look(store, root, {}, NOW), in_progress=next(looks))

    watching.follow(looked, console, 2.0, wait=lambda _: None)
    printed = console.file.getvalue()
    # the cursor goes up to the first line of what was drawn
    assert printed.count("\x1b[1A") > 2
    assert "at least" in printed and "█" in printed


def test_the_command_finds_the_run_in_progress_else_the_latest(begun, capsys):
    store, root = begun
    made.leave_run(store, "later", ["train_router-0123456789ab"], "2026-11-28T08:00:00Z")
    options = ["--store", str(store.root), "--once"]
    with working(store, root):
        assert main(["watch", *options]) == 0
    printed = capsys.readouterr().out
    assert "train_experts beta" in printed
    last = printed.splitlines()[-1]
    assert last == f"next: python -m pipeline watch {root.id} --store {store.root}"
    assert main(["watch", *options]) == 0
    assert "later-" in capsys.readouterr().out
    assert main(["watch", "small", *options]) == 0
    printed = capsys.readouterr().out
    assert "train_experts beta" in printed and "goes on from where it stopped" in printed
    older = positions.Position("a", "train_router", None, positions.RUNNING, step=1_070)
    odd = positions.Look("run", (older,), in_progress=True)
    console = Console(file=io.StringIO(), width=120)
    console.print(watching.drawn(odd))
    printed = console.file.getvalue()
    assert "step 1,070" in printed and "time left not known: train_router" in printed
    assert main(["watch", "none", *options]) == 2
    assert "there is no run none" in capsys.readouterr().err


def far_copy(store, tmp_path):
    """Return what is printed of the trials of a volume that has what a store has."""
    far = on_volume(store.root, tmp_path)
    (tmp_path / "copy").mkdir()
    console = Console(file=io.StringIO(), width=200)
    far_watching.watch("tried", True, tmp_path / "copy", far.names, far.read, console)
    return console.file.getvalue()


def test_trials_of_experiments_are_followed_as_one(begun, cfg, capsys, monkeypatch, tmp_path):
    store, run = begun
    trials = []
    for seed in (0, 1):
        addresses = Addresses(cfg.model_copy(update={"seed": seed}))
        every = tuple(sorted(set(addresses.reachable())))
        jobs = [("preprocess", "alpha"), ("train_shared", None), ("score", "stack")]
        makes = tuple(addresses.of(*job) for job in jobs)
        settings = addresses.cfg.model_dump(mode="json")
        about = ("tried.parts", cfg.family, f"2026-11-27T09:00:0{seed}Z", "config/tried.yaml")
        trials.append(Root(*about, (), every, settings, makes=makes))
        leave(store, trials[-1])
    shared, trunk, _ = trials[0].makes
    made.write_artifact(store, shared, "preprocess", "alpha")
    made.write_history(store, trunk, made.rows(steps=40), steps=100)
    options = ["--store", str(store.root), "--once"]
    with in_use.using(store, {*trials[0].addresses, *trials[1].addresses}):
        assert main(["watch", *options]) == 0
        printed = capsys.readouterr().out
        far = far_copy(store, tmp_path)
        monkeypatch.setattr(watching, "MOST_ROWS", 2)
        assert main(["watch", "tried", *options]) == 0
        few = capsys.readouterr().out
    # The text of both is one job, and nobody will evaluate them
    assert "1 of 5 jobs done" in printed and "parts seed 1: score stack" in printed
    assert "evaluate" not in printed and printed.count("preprocess alpha") == 1
    assert printed.splitlines()[-1].startswith("next: python -m pipeline watch tried --store")
    assert "preprocess 1 of 1, train_shared 0 of 2, score 0 of 2" in few
    assert "│ parts seed 0: train_shared" in few and "│ parts seed 0: score" not in few
    assert "1 of 5 jobs done" in far and "parts seed 1: score stack" in far
    # By its id a trial is a run
    assert main(["watch", trials[1].id, *options]) == 0
    alone = capsys.readouterr().out
    assert "of 3 jobs done" in alone and "train_experts" not in alone
    assert main(["watch", run.id, *options]) == 0
    assert "train_experts beta" in capsys.readouterr().out


def test_a_run_on_the_volume_is_copied_look_by_look_and_what_is_done_once(begun, tmp_path):
    store, root = begun
    asked = []
    far = on_volume(store.root, tmp_path)

    def read(path):
        asked.append(path)
        return far.read(path)

    # on Modal a note says until when it counts
    note = in_use.note_path(store, in_use.new_name())
    note.parent.mkdir(exist_ok=True)
    text = {"addresses": list(root.addresses), "until": "2999-01-01T00:00:00Z"}
    write_text(note, sealed(text))
    console = Console(file=io.StringIO(), width=200)
    looks = []

    def wait(_):
        looks.append(len(asked))
        if len(looks) == 2:
            note.unlink()

    copy = tmp_path / "copy"
    copy.mkdir()
    last, _ = far_watching.watch("", False, copy, far.names, read, console, wait)
    done, half = (
        each.address for each in last.positions if each.stage == "train_experts" and each.step
    )
    assert asked.count(f"history/{half}.jsonl") == 3
    assert (
        asked.count(f"history/{done}.jsonl") == asked.count(f"artifacts/{done}/manifest.json") == 1
    )
    assert last.done == 1 and not last.in_progress
    assert "40 of 100" in console.file.getvalue()
    with pytest.raises(ConfigError, match="there is no run other"):
        far_watching.watch("other", True, copy, far.names, read, console)


def test_all_runs_that_go_on_have_a_line_each_and_what_is_at_work(begun, tmp_path):
    store, root = begun
    left = {"addresses": list(root.addresses), "until": "2999-01-01T00:00:00Z", "run": "a"}
    note = in_use.note_path(store, in_use.new_name("a"))
    note.parent.mkdir(exist_ok=True)
    write_text(note, sealed(left))
    alive = []
    far = on_volume(store.root, tmp_path)

    def status(folder):
        (tmp_path / folder).mkdir()
        console = Console(file=io.StringIO(), width=200)
        going = far_watching.follow_all(
            tmp_path / folder, far.names, far.read, console, lambda *_: bool(alive)
        )
        return going, console.file.getvalue()

    alive.append(1)
    going, printed = status("there")
    assert going and printed.startswith(f"{root.id}, begun ")
    assert "1 of " in printed and "step 40 of 100" in printed
    alive.clear()
    assert status("gone") == (False, "no run is in progress\n")
    # What waits for a run of that name is told of it once it goes on, and only what is new
    (tmp_path / "copy").mkdir()
    console = Console(file=io.StringIO(), width=200)
    followed = far_watching.Following(
        root.name, tmp_path / "copy", far.names, far.read, lambda *_: bool(alive)
    )
    followed.tell(console)
    assert console.file.getvalue() == ""
    alive.append(1)
    followed.tell(console)
    followed.tell(console)
    assert console.file.getvalue().count("1 of ") == 1
