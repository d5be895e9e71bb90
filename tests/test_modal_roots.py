"""Roots, removals and runs on a volume whose containers see nothing of each other before a commit
and a reload, and share no locks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import StubbedVolume
from test_prune import write

from pipeline import cloud
from pipeline.cloud import roots as far_roots
from pipeline.cloud import tending
from pipeline.cloud.endpoint import ServedNote
from pipeline.errors import DamagedArtifact, MissingArtifact
from pipeline.families.load import load, parse
from pipeline.run import stages
from pipeline.run.reach import root_of
from pipeline.store import in_use
from pipeline.store.artifacts import Store
from pipeline.store.reading import sealed, unsealed
from pipeline.store.removed import removed
from pipeline.store.roots import leave, read_root, root_path
from pipeline.store.versions import Version

PRICES = Path(__file__).parent.parent / "config/prices.yaml"
COMMAND = 'modal run modal_app.py::run_all --config config/x.yaml --override "seed=3 dtype=fp32"'
LISTED = {"yes": False, "orphans": False, "damaged": False}
REMOVED = LISTED | {"yes": True}


@pytest.fixture
def volume(tmp_path, finished):
    """A volume with the results of a finished run, which left no root there."""
    volume = StubbedVolume(tmp_path)
    view = volume.view()
    shutil.copytree(finished[1], view.path, dirs_exist_ok=True)
    view.commit()
    return volume


def store_of(view):
    return Store(view.path, publish=view.commit, refresh=view.reload)


def tend(volume, command, names=(), flags=LISTED):
    """Do a command in a container of its own."""
    view = volume.view()
    edge = cloud.ModalEdge(view.path)
    done = cloud.tend(command, list(names), flags, edge, view.commit, view.reload)
    return " ".join(done.printed.split()), done.wrong


def artifacts(volume):
    return sorted(path.name for path in (volume.path / "artifacts").iterdir())


def test_who_hands_out_jobs_leaves_a_root_and_is_left_alone(volume, finished):
    cfg = load(finished[0])
    run = root_of(cfg).id
    before = artifacts(volume)
    with cloud.begun(cfg, store_of(volume.view()), COMMAND):
        root = read_root(root_path(Store(volume.path), run))
        assert (root.file, root.overrides) == ("config/x.yaml", ("seed=3", "dtype=fp32"))
        # a job is just writing what a container that looks for half done work takes for left over
        half = write(volume.path / "artifacts" / root.addresses[0] / "x.bin")
        said, wrong = tend(volume, "rm", ["tiny"], REMOVED)
        assert f"{run} is in use" in wrong
        said, wrong = tend(volume, "prune", flags=REMOVED | {"orphans": True})
        assert not wrong and "in use by a run in progress" in said and half.exists()
        shutil.rmtree(half.parent)
    assert artifacts(volume) == before
    assert not list((volume.path / "runs").glob("run-*.json"))
    said, wrong = tend(volume, "runs")
    assert not wrong and run in said and "config/x.yaml --override seed=3" in said
    said, wrong = tend(volume, "rm", ["tiny"])
    assert not wrong and "add --yes" in said and artifacts(volume) == before
    said, wrong = tend(volume, "rm", ["tiny"], REMOVED)
    assert not wrong and not artifacts(volume) and not list((volume.path / "roots").iterdir())
    assert not list((volume.path / "runs").glob(f"{far_roots.MARK}*"))


def test_who_hands_out_less_notes_what_is_gone_and_sets_the_reports_beside_each_other(
    volume, finished, capsys
):
    cfg = load(finished[0])
    gone, stays = cfg.experts[-1], cfg.experts[:-1]
    less = load(finished[0], (f"expert.domains={json.dumps(stays)}",))
    reports = [stages.address(each, "evaluate") for each in (cfg, less)]
    made = [cloud.JobResult("evaluate", None, reports[1], "made")]
    told = []
    # A run beside it, of the same file and overrides of its own, has taken nothing out of it
    beside = f"{COMMAND} --override router.top_k=1"
    for each, command in ((cfg, COMMAND), (less, beside), (less, COMMAND), (less, COMMAND)):
        store = store_of(volume.view())
        with cloud.begun(each, store, command) as before:
            found = cloud.since(before, each, made, store)
        if command == beside:
            assert not removed(store)[0]
        else:
            told.append(found)
    assert [results[0].former for results in told] == ["", reports[0], reports[0]]
    # Once, however often the rest is handed out
    (note,) = removed(Store(volume.path))[0]
    assert (note.domain, note.run, note.file) == (gone, "tiny", "config/x.yaml")
    assert f"train_experts-{gone}" in "".join(note.addresses)
    assert capsys.readouterr().out.count(f"removed: {gone} at ") == 1
    # What was found is compared with nothing, and neither is what has failed
    for other in (replace(made[0], state="found"), replace(made[0], error="no room")):
        assert cloud.since(before, less, [other], store) == [other]


def test_a_run_that_was_lost_keeps_its_results_as_long_as_it_might_have_lasted(volume, finished):
    cfg = load(finished[0])
    # taken away with its container: nobody clears up after it
    lost = cloud.begun(cfg, store_of(volume.view()), COMMAND)
    lost.__enter__()
    (note,) = (volume.path / "runs").glob("run-*.json")
    assert "is in use" in tend(volume, "rm", ["tiny"], REMOVED)[1]
    values = unsealed(note.read_bytes())
    note.write_text(sealed(values | {"until": "2020-01-01T00:00:00Z"}))
    assert not tend(volume, "rm", ["tiny"], REMOVED)[1]
    assert not artifacts(volume)
    # of a run that is gone, which the next look at the volume clears away
    leave(Store(volume.path), root_of(cfg))
    tend(volume, "prune", flags=REMOVED)
    assert not note.exists()


def test_a_run_that_nobody_is_at_any_more_keeps_nothing(volume, finished):
    """Killed, and no attempt follows: its note says that it may last a day."""
    cfg = load(finished[0])
    killed = cloud.begun(cfg, store_of(volume.view()), COMMAND, run="killed", part="of a sweep")
    killed.__enter__()
    asked = []

    def tended(alive):
        def is_alive(run, addresses):
            asked.append((run, sorted(addresses) == sorted(root_of(cfg).addresses)))
            return alive

        view = volume.view()
        edge = cloud.ModalEdge(view.path)
        return cloud.tend("rm", ["tiny"], REMOVED, edge, view.commit, view.reload, is_alive)

    assert "is in use" in tended(True).wrong
    assert not tended(False).wrong
    # Once more when its note is gone
    assert asked == [("killed", True)] * 3
    assert not artifacts(volume) and not list((volume.path / "runs").glob("run-*.json"))


def test_an_attempt_that_begins_while_the_note_of_a_lost_one_goes_is_left_alone(volume, finished):
    cfg = load(finished[0])
    lost = cloud.begun(cfg, store_of(volume.view()), COMMAND, run="killed")
    lost.__enter__()
    alive = iter([False, True])
    attempts = []

    def is_alive(_run, _addresses):
        return next(alive)

    def publish():
        if not attempts:
            # It is published before the removal of the former note is
            attempts.append(cloud.begun(cfg, store_of(volume.view()), COMMAND, run="killed"))
            attempts[0].__enter__()
        view.commit()

    view = volume.view()
    before = artifacts(volume)
    edge = cloud.ModalEdge(view.path)
    done = cloud.tend("rm", ["tiny"], REMOVED, edge, publish, view.reload, is_alive)
    assert "is in use" in done.wrong and artifacts(volume) == before
    attempts[0].__exit__(None, None, None)
    assert not list((volume.path / "runs").glob("run-*.json"))


def test_the_last_attempt_of_a_run_takes_away_what_a_killed_one_has_noted(volume, finished):
    cfg = load(finished[0])
    killed = cloud.begun(cfg, store_of(volume.view()), COMMAND, run="one")
    killed.__enter__()
    with cloud.begun(cfg, store_of(volume.view()), COMMAND, run="other"):
        with cloud.begun(cfg, store_of(volume.view()), COMMAND, run="one"):
            assert len(list((volume.path / "runs").glob("run-*.json"))) == 2
        assert "is in use" in tend(volume, "rm", ["tiny"], REMOVED)[1]
    assert not list((volume.path / "runs").glob("run-*.json"))
    assert not tend(volume, "rm", ["tiny"], REMOVED)[1]


def test_a_run_waits_for_a_removal_and_a_removal_for_nobody(volume, finished):
    cfg = load(finished[0])
    leave(Store(volume.path), root_of(cfg))
    remover = store_of(volume.view())
    waited = []

    def wait(_seconds):
        waited.append(1)
        ending.__exit__(None, None, None)

    ending = far_roots.alone(remover, True)
    ending.__enter__()
    assert "somebody else is removing" in tend(volume, "prune", flags=REMOVED)[1]
    # to look changes nothing, and needs nobody to wait
    assert not tend(volume, "prune")[1]
    with cloud.begun(cfg, store_of(volume.view()), COMMAND, wait=wait):
        assert waited
    # one whose container was lost holds nobody up for good
    lost = f"{far_roots.MARK}0.json"
    mark = write(volume.path / "runs" / lost, sealed({"until": "2020-01-01T00:00:00Z"}))
    assert not tend(volume, "prune", flags=REMOVED)[1]
    assert not mark.exists()


def test_of_two_who_begin_to_remove_at_once_one_gives_way(volume, finished):
    leave(Store(volume.path), root_of(load(finished[0])))
    # Both containers have seen the volume before either has written its mark
    first, second = volume.view(), volume.view()
    looks = iter([lambda: None])
    here, there = cloud.ModalEdge(first.path), cloud.ModalEdge(second.path)
    ended = []

    def look():
        next(looks, second.reload)()

    def publish():
        first.commit()
        if not ended:
            ended.append("begun")
            ended.append(cloud.tend("rm", ["tiny"], REMOVED, there, second.commit, look))

    wrong = cloud.tend("rm", ["tiny"], REMOVED, here, publish, first.reload).wrong
    assert "somebody else is removing" in ended[1].wrong and not wrong
    assert not artifacts(volume)
    assert not list((volume.path / "runs").glob(f"{far_roots.MARK}*"))


def test_a_removal_sees_a_run_that_began_just_before_its_mark(volume, finished, monkeypatch):
    """Its container was started, and has seen the volume, before the run wrote its note."""
    cfg = load(finished[0])
    leave(Store(volume.path), root_of(cfg))
    opened = tending.opened
    running = []

    def begins(store):
        running.append(cloud.begun(cfg, store_of(volume.view()), COMMAND))
        running[0].__enter__()
        return opened(store)

    monkeypatch.setattr(tending, "opened", begins)
    before = artifacts(volume)
    assert "is in use" in tend(volume, "rm", ["tiny"], REMOVED)[1]
    assert artifacts(volume) == before
    running[0].__exit__(None, None, None)


def test_the_bundle_that_is_served_stays_when_its_run_goes(volume, finished):
    root = root_of(load(finished[0]))
    leave(Store(volume.path), root)
    (bundle,) = [address for address in root.addresses if address.startswith("deploy-")]
    write(volume.path / "artifacts" / bundle / "manifest.json")
    # Another is served, and this one is what a rollback leads to
    former = Version(1, bundle, bundle, "", "")
    text = ServedNote(address="deploy-0", versions=(former,)).model_dump_json()
    note = write(volume.path / "served.json", text)
    said, wrong = tend(volume, "rm", ["tiny"], REMOVED)
    assert not wrong and "as others reach them: the endpoint" in said
    assert artifacts(volume) == [bundle]
    leave(Store(volume.path), root_of(load(finished[0], ("seed=4",))))
    assert not tend(volume, "prune", flags=REMOVED | {"orphans": True})[1]
    assert artifacts(volume) == [bundle]
    said, wrong = tend(volume, "versions")
    assert not wrong and bundle in said
    (volume.path / "artifacts" / bundle / "manifest.json").unlink()
    assert f"{bundle} is not in" in tend(volume, "rollback", [bundle])[1]
    # nobody knows what is served
    note.write_text("{")
    assert "does not say what to serve" in tend(volume, "prune", flags=REMOVED)[1]
    note.unlink()
    assert not tend(volume, "prune", flags=REMOVED | {"orphans": True})[1]
    assert not artifacts(volume)


def test_histories_are_drawn_beside_the_volume_and_nothing_is_written_to_it(volume, finished):
    leave(Store(volume.path), root_of(load(finished[0])))
    view = volume.view()
    edge = cloud.ModalEdge(view.path)
    before = sorted(view.path.rglob("*"))
    done = cloud.tend("history", [], {"last": 8}, edge, view.commit, view.reload)
    assert not done.wrong and "tiny" in done.printed
    assert {"history.html", "rows.jsonl"} < set(done.files)
    pictures = [name for name in done.files if name.endswith(".png")]
    assert all(done.files[name].startswith(b"\x89PNG") for name in pictures) and pictures
    rows = [json.loads(line) for line in done.files["rows.jsonl"].splitlines()]
    assert {"train_shared", "train_experts"} <= {row["stage"] for row in rows}
    assert f"{len(rows):,} rows of" in done.printed
    assert sorted(view.path.rglob("*")) == before and view.commits == 0
    absent = cloud.tend("history", ["none"], {"last": 8}, edge, view.commit, view.reload)
    assert "is called none" in absent.wrong


def test_what_is_served_is_measured_again_under_a_name_of_that_day(volume, finished):
    there = ("modal.regions=[eu]", "modal.hub_secret=hub", "modal.bucket=texts/law")
    cfg = load(finished[0], ("modal.reevaluate=0 6 * * 1", "modal.evaluate.gpu=[T4]", *there))
    view = volume.view()
    made = [cloud.JobResult("deploy", None, stages.address(cfg, "deploy"), "made")]
    cloud.note_reevaluation([], cfg, view.path, view.commit)
    assert not (volume.path / cloud.REEVALUATED).exists()
    cloud.note_reevaluation(made, cfg, view.path, view.commit)
    noted = (volume.path / cloud.REEVALUATED).read_bytes()
    bare = load(finished[0]).modal
    assert cloud.reevaluated_as(bare, noted) == cfg.modal
    assert cloud.reevaluated_as(bare, None) == bare
    own = load(finished[0], ("modal.regions=[us]", "modal.bucket=mine")).modal
    kept = cloud.reevaluated_as(own, noted)
    assert (kept.regions, kept.bucket, kept.hub_secret) == (("us",), "mine", "hub")
    older = b'{"cron": "0 6 * * 1", "machine": {"gpu": ["T4"]}}'
    assert cloud.reevaluated_as(bare, older).regions == ()
    with_packages = b'{"cron": "0 6 * * 1", "packages": ["rich==1", "x==2"]}'
    assert cloud.packages_again(bare, with_packages) == ("rich==1", "x==2")
    assert cloud.packages_again(cfg.modal, with_packages) == cloud.packages_again(bare, None) == ()
    with pytest.raises(DamagedArtifact, match="does not say when to measure again"):
        cloud.reevaluated_as(bare, b"{")
    write(volume.path / "served.json", ServedNote(address=made[0].address).model_dump_json())
    with pytest.raises(MissingArtifact, match="no run's root leads to the bundle"):
        cloud.once_more(view.path, view.reload)
    leave(Store(volume.path), root_of(cfg))
    again, former = cloud.once_more(view.path, view.reload)
    assert former == stages.address(cfg, "evaluate")
    addresses = {
        stage: (stages.address(cfg, stage), stages.address(again, stage))
        for stage in ("tokenizer", "train_shared", "train_router", "evaluate")
    }
    other = [stage for stage, (was, now) in addresses.items() if was != now]
    assert other == ["evaluate"] and again.name.startswith("tiny-20")
    longest = load(finished[0], (f"name={'x' * 64}",))
    note = ServedNote(address=stages.address(longest, "deploy"))
    write(volume.path / "served.json", note.model_dump_json())
    leave(Store(volume.path), root_of(longest))
    again, _ = cloud.once_more(view.path, view.reload)
    assert parse(again.model_dump(mode="json")).name.startswith(f"{'x' * 55}-20")


def test_measuring_again_is_priced_where_the_deployment_has_it_done(volume, finished, capsys):
    # By the run's own section it would run elsewhere, on what the deployment's prices do not know
    run = load(finished[0], ("modal.evaluate.gpu=[T4]", "modal.max_cost_usd=5"))
    elsewhere = run.modal.model_copy(update={"regions": ("moon",)})
    run = run.model_copy(update={"modal": elsewhere})
    there = ("modal.reevaluate=0 6 * * 1", "modal.evaluate.gpu=[L4]", "modal.regions=[eu]")
    prices = cloud.Prices.load(PRICES)

    def wired(*more):
        deployed = load(finished[0], (*there, *more))
        settled = cloud.Wiring.settled(deployed, b'{"address": "deploy-1"}', True, prices)
        return cloud.Wiring.told(settled.variables)

    def due(wiring):
        view = volume.view()
        return cloud.due(view.path, view.reload, wiring, cloud.ModalEdge(view.path))

    assert due(wired()) is None
    told = capsys.readouterr().out
    assert told.startswith("nothing is measured again: no run's root leads to the bundle")
    note = ServedNote(address=stages.address(run, "deploy"))
    write(volume.path / "served.json", note.model_dump_json())
    leave(Store(volume.path), root_of(run))
    found = due(wired())
    machine = found.cfg.machine("evaluate")
    assert (machine.gpu, found.cfg.modal.regions) == (("L4",), ("eu",))
    assert (found.expected.regions, found.expected.limit_usd) == (("eu",), 5)
    [line] = cloud.estimate(found.cfg, ("evaluate",), Store(volume.path), prices)
    assert found.expected.of(line.address) == line.usd > 0
    # A limit that the deployment's own configuration has is the one
    assert due(wired("modal.max_cost_usd=0.0001")) is None
    assert capsys.readouterr().out.count("above modal.max_cost_usd 0.00") == 1
    # One that was deployed before says nothing of where it runs
    older = replace(wired(), measures_on="{}")
    assert due(older) is None
    told = capsys.readouterr().out
    assert "do not know where it runs: modal.regions: no such region moon" in told


def test_what_is_listed_is_followed_by_what_removes_it(volume, finished):
    root = root_of(load(finished[0]))
    leave(Store(volume.path), root)

    def following(command, names, flags):
        view = volume.view()
        edge = cloud.ModalEdge(view.path)
        return cloud.tend(command, names, flags, edge, view.commit, view.reload).next

    assert following("runs", [], {}) == ("history", "--run", root.id)
    assert following("rm", ["tiny"], {"yes": 0}) == ("rm", "--run", "tiny", "--yes")
    orphans = LISTED | {"orphans": True}
    assert following("prune", [], orphans) == ("runs",)
    write(volume.path / "artifacts/train_router-0123456789ab/manifest.json")
    assert following("prune", [], orphans) == ("prune", "--orphans", "--yes")
    assert following("rm", ["tiny"], {"yes": 1}) == ("runs",)


def test_on_a_volume_without_roots_nothing_is_removed(volume):
    before = artifacts(volume)
    for command, names in (("prune", ()), ("rm", ["tiny"])):
        wrong = tend(volume, command, names, REMOVED | {"orphans": True})[1]
        assert "no run has left a root on the volume" in wrong
    assert artifacts(volume) == before


def test_a_store_of_another_version_is_left_as_it_is(tmp_path, finished):
    volume = StubbedVolume(tmp_path)
    view = volume.view()
    (view.path / "store.json").write_text('{"format": 1}')
    view.commit()
    with cloud.begun(load(finished[0]), store_of(volume.view()), COMMAND):
        assert [path.name for path in volume.path.iterdir()] == ["store.json"]
    assert "store format 1" in tend(volume, "prune")[1]
    assert in_use.addresses(Store(volume.path)) == set()
