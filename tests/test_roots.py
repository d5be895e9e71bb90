"""Roots: that runs leave them, that nothing which any of them reaches is ever listed, whatever
became of configurations, and that what one run alone has made goes when it is asked for."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import Killed
from test_backend import PATIENCE_S, store_with, typed
from test_prune import hold, tree, write

from pipeline.errors import DamagedArtifact, DiskFull, StoreError
from pipeline.families.load import load, parse
from pipeline.run import leftovers as leftovers_module
from pipeline.run import stages
from pipeline.run.leftovers import ORPHANS, leftovers
from pipeline.run.reach import Reach, _addresses, root_of, working
from pipeline.store import in_use
from pipeline.store.artifacts import Store
from pipeline.store.reading import sealed, unsealed
from pipeline.store.removed import note_removed, removed
from pipeline.store.roots import Root, leave, read_root, root_path

ROOT = Path(__file__).parents[1]
SWEEP = "router.steps=0"


@pytest.fixture
def kept(finished, store_path):
    """Configuration, a copy of the finished store, and the root of the run that made it."""
    shutil.copytree(finished[1], store_path)
    root = root_of(load(finished[0]), finished[0])
    store = Store(store_path)
    leave(store, root)
    return finished[0], store, root


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in a folder that has no configurations."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def roots(store):
    return sorted(path.stem for path in store.root.glob("roots/*.json"))


def files(store):
    """Return the files of a store but locks, which come and go."""
    found = {}
    for name, held in tree(store.root).items():
        if held is not None and not name.startswith("locks"):
            found[name] = held
    return found


def test_whoever_makes_something_leaves_a_root_and_renews_it(finished, store_path, capfd, tmp_path):
    path = finished[0]
    store = store_with(
        store_path, finished, "tokenizer", "preprocess", "train_shared", "train_experts"
    )
    typed(capfd, 0, "plan", "--config", path, "--store", store.root)
    assert not roots(store)
    typed(capfd, 0, "train_shared", "--config", path, "--store", store.root)
    (run,) = roots(store)
    root = read_root(root_path(store, run))
    cfg = load(path)
    assert (root.name, root.family, root.id, root.file) == ("tiny", "ffn_moe", run, str(path))
    assert set(root.addresses) == set(stages.Addresses(cfg).reachable())
    nowhere = {"deploy": {"upload", "keep"}}
    settings = stages.Addresses(cfg).cfg.model_dump(mode="json", exclude=nowhere)
    assert root.settings == settings and not root.overrides
    leave(store, replace(root, at="1999-01-01T00:00:00Z", removed=True))
    again = ["--config", path, "--store", store.root]
    typed(capfd, 0, "preprocess", *again)
    assert roots(store) == [run]
    renewed = read_root(root_path(store, run))
    assert renewed.at > root.at[:4] and not renewed.removed
    typed(capfd, 0, "train_shared", *again, "--override", SWEEP)
    other = read_root(root_path(store, (set(roots(store)) - {run}).pop()))
    assert other.overrides == (SWEEP,) and other.name == "tiny"
    assert set(other.addresses) & set(root.addresses)
    # what is carried out otherwise is the same run
    typed(capfd, 0, "train_shared", *again, "--override", "runtime.save_every_s=9")
    assert len(roots(store)) == 2
    export = ["export", "--format", "adapters", "--to", tmp_path / "x"]
    typed(capfd, 2, *export, *again, "--override", "seed=3")
    assert len(roots(store)) == 3
    left = files(store)
    typed(capfd, 0, "prune", "--yes", "--orphans", "--config", "config/tiny_vlm.yaml", *again[2:])
    assert files(store) == left


@pytest.mark.parametrize(
    "form", [("demo_from_zero",), ("demo", "expert.form=adapter"), ("tiny_vlm",)]
)
def test_a_root_says_all_that_either_family_may_make_on_any_machine(form):
    name, *overrides = form
    cfg = load(ROOT / f"config/{name}.yaml", (*overrides, "dtype=auto"))
    root = root_of(cfg)
    assert _addresses(root) == set(root.addresses)
    for dtype in stages.DTYPES:
        of_machine = cfg.model_copy(update={"dtype": dtype})
        for stage in stages.STAGES:
            assert {address for _, _, address in stages.jobs(of_machine, stage)} <= set(
                root.addresses
            )


def test_a_path_is_kept_as_it_was_given_and_from_here_on(elsewhere, tiny):
    cfg = load(tiny)
    assert root_of(cfg, tiny).file == "tiny/tiny.yaml"
    assert root_of(cfg, "../x/tiny.yaml").file == "../x/tiny.yaml"
    assert root_of(cfg, "/elsewhere/tiny.yaml").file == "/elsewhere/tiny.yaml"
    assert root_of(cfg, tiny).id == root_of(cfg, "other.yaml").id


def test_how_a_run_is_measured_is_no_part_of_what_it_is_called(tiny):
    root = root_of(load(tiny))
    other = root_of(load(tiny, ("score.bytes_per_domain=9",)))
    assert other.addresses != root.addresses and other.id == root.id
    # as who knew no such stage has called it
    made = tuple(address for address in root.addresses if not address.startswith("score-"))
    assert made != root.addresses and replace(root, addresses=made).id == root.id


@pytest.mark.parametrize("became", ["renamed", "deleted", "edited", "broken"])
def test_whatever_becomes_of_a_configuration_its_results_stay(kept, elsewhere, capfd, became):
    path, store, root = kept
    mine = shutil.copytree(path.parent, elsewhere / "mine") / "tiny.yaml"
    leave(store, replace(root_of(load(mine), mine), at=root.at))
    if became == "renamed":
        mine.rename(mine.with_name("other.yaml"))
    elif became == "deleted":
        shutil.rmtree(mine.parent)
    else:
        mine.write_text(mine.read_text() + "\nseed: 5\n" if became == "edited" else "{")
    left = files(store)
    # an empty config/, and no --config: roots are enough
    for more in ((), ("--yes", "--orphans")):
        assert "nothing to prune" in typed(capfd, 0, "prune", "--store", store.root, *more)
    assert files(store) == left


def test_what_a_root_says_stays_whatever_its_settings_come_to_now(kept, elsewhere, capfd):
    """As when what a run read was edited since, or another version names things otherwise."""
    path, store, root = kept
    former = "tokenizer-0123456789ab"
    shutil.copytree(store.folder(stages.address(load(path), "tokenizer")), store.folder(former))
    root_path(store, root.id).unlink()
    other = replace(root, addresses=(former,))
    leave(store, other)
    # both: what it says, and what the same settings lead to
    told = typed(capfd, 0, "prune", "--orphans", "--store", store.root)
    assert "nothing to prune" in told
    # of the second another may be the maker
    told = typed(capfd, 0, "rm", other.id, "--yes", "--store", store.root)
    assert former in told and "2 removed" in told and len(list(store.root.glob("artifacts/*"))) > 5


def test_what_was_made_of_a_file_stays_when_the_file_is_edited(elsewhere, tiny, capfd):
    store = Store(elsewhere / "store").open()
    before = root_of(load(tiny), tiny)
    leave(store, before)
    made = stages.address(load(tiny), "preprocess", "sea")
    write(store.folder(made) / "manifest.json")
    data = tiny.with_name("sea.jsonl")
    data.write_text(data.read_text() + '{"text": "one more document of the sea"}\n')
    # the same configuration, and it leads elsewhere now
    after = root_of(load(tiny), tiny)
    assert made not in after.addresses and before.id != after.id
    assert _addresses(before) == set(before.addresses), "its settings say what it had read"
    leave(store, after)
    listed = ["prune", "--orphans", "--yes", "--config", tiny, "--store", store.root]
    assert "nothing to prune" in typed(capfd, 0, *listed)
    told = typed(capfd, 0, "rm", before.id, "--yes", "--config", tiny, "--store", store.root)
    assert made in told and not store.folder(made).exists() and roots(store) == [after.id]


def test_two_stores_know_nothing_of_each_other(kept, elsewhere, capfd):
    _, store, root = kept
    other = Store(shutil.copytree(store.root, elsewhere / "other"))
    typed(capfd, 0, "rm", root.id, "--yes", "--store", other.root)
    assert not roots(other) and not list(other.root.glob("artifacts/*"))
    assert roots(store) == [root.id]
    assert "nothing to prune" in typed(capfd, 0, "prune", "--orphans", "--store", store.root)
    # a root that was put into another store keeps there what is there of it
    orphan = Store(elsewhere / "orphan").open()
    shutil.copytree(store.root / "artifacts", orphan.root / "artifacts")
    (orphan.root / "roots").mkdir()
    shutil.copy(root_path(store, root.id), orphan.root / "roots" / "copied by hand.json")
    assert "nothing to prune" in typed(capfd, 0, "prune", "--orphans", "--store", orphan.root)


def changed(path, **values):
    """Write a root again with other values, and sealed as it was."""
    path.write_text(sealed(unsealed(path.read_bytes(), 1) | values, 1))


NOT_UNDERSTOOD = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256))),
    "one bit": lambda path: path.write_bytes(path.read_bytes().replace(b"sea", b"see", 1)),
    "a list": lambda path: path.write_text("[]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "of tomorrow": lambda path: changed(path, version=2, addresses="elsewhere"),
    "without addresses": lambda path: changed(path, addresses=None),
    "a version that is none": lambda path: changed(path, version="1"),
    "of a family of tomorrow": lambda path: changed(path, family="mamba_moe"),
}


@pytest.mark.parametrize("how", NOT_UNDERSTOOD)
def test_beside_a_root_that_is_not_understood_everything_is_kept(kept, elsewhere, capfd, how):
    path, store, root = kept
    other = root_of(load(path, (SWEEP,)), path)
    leave(store, other)
    strange = root_path(store, root.id)
    # one that somebody has begun to remove beside it stays known as that
    half_gone = replace(root_of(load(path, ("seed=9",))), removed=True)
    leave(store, half_gone)
    NOT_UNDERSTOOD[how](strange)
    # what is left half done goes all the same
    part = write(store.folder(next(iter(other.addresses))) / "x.part")
    left = files(store)
    told = typed(capfd, 0, "prune", "--yes", "--orphans", "--store", store.root)
    assert f"{strange}" in told and "what every run has made is kept" in told
    assert files(store) == {name: left[name] for name in left if not name.endswith("x.part")}
    assert not part.exists()
    for name in (root.id, other.id):
        told = typed(capfd, 2, "rm", name, "--yes", "--store", store.root)
        assert str(strange) in told
    assert str(strange) in typed(capfd, 0, "runs", "--store", store.root)
    assert files(store).keys() == left.keys() - {part.relative_to(store.root).as_posix()}
    # the next run writes its own anew, unless it is one of tomorrow, which it does not know
    if how not in ("a folder", "of tomorrow"):
        leave(store, root)
        assert not Reach(store, {}).unknown


def test_where_a_bundle_goes_makes_no_other_run(finished):
    path = finished[0]
    target = "deploy.upload=s3://bucket/x"
    root = root_of(load(path, (target,)), path, (target,))
    plain = load(path)
    assert parse(root.settings).deploy == plain.deploy
    assert root.addresses == root_of(plain).addresses
    # what it holds does
    held = root_of(load(path, ("deploy.dense=total",)))
    assert parse(held.settings).deploy.dense == "total"
    (own,) = set(held.addresses) - set(root.addresses)
    assert own == stages.address(load(path, ("deploy.dense=total",)), "deploy")


def test_a_torn_note_of_what_was_taken_out_hides_no_run(kept, elsewhere, capfd):
    path, store, root = kept
    torn = write(store.root / "removed/torn.json")
    told = typed(capfd, 0, "runs", "--store", store.root)
    assert f"{torn} is torn" in told and root.name in told
    assert f"{torn} is torn" in typed(capfd, 0, "plan", "--config", path, "--store", store.root)


def test_two_runs_that_lose_a_domain_of_one_name_in_one_second_leave_two_notes(tmp_path):
    store = Store(tmp_path)
    for run in ("one", "other"):
        note_removed(store, "law", run, f"{run}.yaml", ())
    assert {note.run for note in removed(store)[0]} == {"one", "other"}


def test_a_root_that_may_not_be_read_keeps_everything(kept, monkeypatch):
    _, store, root = kept
    read_bytes = Path.read_bytes

    def refused(path):
        if path.parent.name == "roots":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    reach = Reach(store, {})
    assert "Permission denied" in reach.unknown[root_path(store, root.id)]
    assert not list(leftovers(store, reach, damaged=True, say=print))
    monkeypatch.setattr("os.scandir", lambda path: refused(Path(path) / "x"))
    with pytest.raises(StoreError, match="Permission denied"):
        Reach(store, {})


def test_rm_takes_what_no_other_run_reaches_and_says_for_whom_the_rest_stays(
    kept, elsewhere, capfd
):
    path, store, root = kept
    other = root_of(load(path, (SWEEP,)), path, (SWEEP,))
    leave(store, other)
    write(store.resume(stages.address(load(path), "train_router")) / "a" / "state.json")
    rm = ["rm", "--store", store.root]
    told = typed(capfd, 2, *rm, "tiny", "--yes")
    assert "2 runs" in told and root.id in told and f"--override {SWEEP}" in told
    assert "there is no run small" in typed(capfd, 2, *rm, "small")
    own = set(root.addresses) - set(other.addresses)
    left = files(store)
    told = typed(capfd, 0, *rm, root.id)
    assert files(store) == left and f"as others reach them: {other.id}" in told
    listed = {address for address in root.addresses if f"/{address} " in told}
    assert listed == {address for address in own if store.has(address)}
    assert "removed from" in typed(capfd, 0, *rm, root.id, "--yes")
    rest = files(store)
    assert rest == {
        name: held
        for name, held in left.items()
        if not any(address in name for address in (*own, root.id))
    }
    assert roots(store) == [other.id]
    typed(capfd, 0, *rm, "tiny", "--yes")
    assert not list(store.root.glob("*/*-*")), "with the last run that reaches it all goes"


def test_configurations_keep_what_a_run_shares_with_them_and_not_the_run_itself(kept, capfd):
    path, store, root = kept
    same = ["--config", path]
    another = shutil.copytree(path.parent, store.root.parent / "another") / "tiny.yaml"
    another.write_text(path.read_text().replace("name: tiny", "name: another"))
    rm = ["rm", "tiny", "--store", store.root]
    everything = typed(capfd, 0, *rm, *same)
    assert "are kept" not in everything
    assert sum(f"/{address} " in everything for address in root.addresses) > 5
    another.write_text(another.read_text().replace("../", f"{path.parent}/"))
    told = typed(capfd, 0, *rm, *same, path, "--override", SWEEP)
    assert f"as others reach them: {path}" in told and "train_shared-" not in told


def test_what_is_served_or_made_is_not_removed(kept, elsewhere, capfd):
    path, store, root = kept
    bundle = stages.address(load(path), "deploy")
    left = files(store)
    write(in_use.note_path(store, "run-333333333333"), sealed({"addresses": [bundle]}))
    holder = hold(store, ["run-333333333333"])
    try:
        told = typed(capfd, 2, "rm", "tiny", "--yes", "--store", store.root)
        assert f"{root.id} is in use" in told and bundle in told
    finally:
        holder.communicate(timeout=PATIENCE_S)
    in_use.note_path(store, "run-333333333333").unlink()
    assert files(store) == left


def removals(store, monkeypatch, then):
    """Call `then` with the number of each removal before it is done."""
    count = 0
    inner = leftovers_module.remove

    def remove(*args):
        nonlocal count
        then(count)
        count += 1
        inner(*args)

    monkeypatch.setattr("pipeline.run.prune.remove", remove)


def test_a_removal_killed_at_any_moment_is_gone_on_with(finished, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = finished[0]
    root = root_of(load(path), path)
    other = root_of(load(path, (SWEEP,)), path)
    draw = random.Random(4)
    for at in draw.sample(range(12), 4):
        store = Store(shutil.copytree(finished[1], tmp_path / f"store-{at}"))
        leave(store, root)
        leave(store, other)
        before = files(store)

        def killed(number, at=at):
            if number == at:
                raise Killed

        own = ["--store", store.root, "--yes"]
        with monkeypatch.context() as patch:
            removals(store, patch, killed)
            try:
                typed(capfd, 0, "rm", root.id, *own)
            except Killed:
                assert "being removed" in typed(capfd, 0, "runs", "--store", store.root)
        # its configuration, which says the same, keeps nothing of what is being removed
        typed(capfd, 0, "prune", "--config", path, *own)
        assert roots(store) == [other.id]
        shared = set(other.addresses)
        wanted = {n for n in before if not any(a in n for a in (*root.addresses, root.id))}
        wanted |= {n for n in before if any(a in n for a in shared)}
        assert files(store).keys() == wanted


def test_a_full_disk_is_no_reason_not_to_make_room(kept, elsewhere, capfd, monkeypatch):
    _, store, _ = kept

    def full(path, _root):
        raise DiskFull(f"no room to write {path}", path=path)

    monkeypatch.setattr("pipeline.run.remove_run.write_root", full)
    assert "removed from" in typed(capfd, 0, "rm", "tiny", "--yes", "--store", store.root)
    assert not roots(store) and not list(store.root.glob("artifacts/*"))


def test_two_who_remove_the_same_run_are_no_accident(kept, elsewhere, capfd, monkeypatch):
    _, store, root = kept

    def lock(*args):
        # the other one was a moment faster
        root_path(store, root.id).unlink(missing_ok=True)
        return inner(*args)

    inner = Store.lock
    monkeypatch.setattr(Store, "lock", lock)
    told = typed(capfd, 2, "rm", "tiny", "--yes", "--store", store.root)
    assert f"{root.id} is gone" in told


def test_a_run_that_begins_while_it_is_removed_keeps_the_rest(kept, elsewhere, capfd, monkeypatch):
    path, store, root = kept
    held = []

    def begun(number):
        if number == 2:
            # begun and ended: nothing but its root says that the rest is needed
            with working(store, load(path), path):
                held.append(files(store))

    removals(store, monkeypatch, begun)
    told = typed(capfd, 0, "rm", "tiny", "--yes", "--store", store.root)
    assert "a run has just begun to use it" in told and "2 removed" in told
    assert files(store).keys() == {name for name in held[0] if not name.startswith("runs")}
    assert not read_root(root_path(store, root.id)).removed


def test_what_was_made_before_there_were_roots_is_for_orphans_alone(finished, store_path, capfd):
    shutil.copytree(finished[1], store_path)
    other = ["prune", "--config", "config/tiny_vlm.yaml", "--store", store_path, "--yes"]
    left = files(Store(store_path))
    told = typed(capfd, 0, *other)
    assert "orphans:" in told and "--orphans --yes" in told and "0 removed" in told
    assert files(Store(store_path)) == left
    typed(capfd, 0, *other, "--orphans")
    assert not list(store_path.glob("artifacts/*"))


def test_a_store_without_roots_and_a_folder_without_configurations_is_refused(
    finished, store_path, elsewhere, capfd
):
    shutil.copytree(finished[1], store_path)
    told = typed(capfd, 2, "prune", "--orphans", "--yes", "--store", store_path)
    assert "no run has left a root" in told
    assert "no run has left a root" in typed(capfd, 0, "runs", "--store", store_path)


def test_nothing_that_any_root_reaches_is_ever_listed(tmp_path, tiny):
    """Stores, runs and removals drawn at random, against sets of addresses."""
    draw = random.Random(9)
    every = [f"train_experts-{draw.randrange(9)}-{draw.randrange(16**12):012x}" for _ in range(16)]
    settings = load(tiny).model_dump(mode="json")
    for trial in range(15):
        store = Store(tmp_path / str(trial)).open()
        there = draw.sample(every, draw.randrange(1, 16))
        for address in there:
            place = draw.choice((store.folder, store.resume))(address)
            write(place / ("manifest.json" if place == store.folder(address) else "x.json"))
        reached: dict[str, set[str]] = {}
        for number in range(draw.randrange(5)):
            addresses = tuple(draw.sample(every, draw.randrange(1, 9)))
            root = Root(f"r{number}", "ffn_moe", "now", "", (), addresses, settings)
            root = replace(root, removed=draw.random() < 0.3)
            leave(store, root)
            if not root.removed:
                reached[root.id] = set(addresses)
        removing = draw.sample(sorted(reached), draw.randrange(len(reached) + 1))
        reach = Reach(store, {}, removing)
        needed = set().union(*(reached[run] for run in reached.keys() - set(removing)), set())
        found = list(leftovers(store, reach, damaged=True, say=print))
        listed = {leftover.path.name for leftover in found}
        assert not listed & needed
        assert listed & set(every) == set(there) - needed
        ours = set().union(*(set(root.addresses) for root in reach.roots.values()), set())
        orphans = {leftover.path.name for leftover in found if leftover.group == ORPHANS}
        assert orphans == set(there) - ours


def test_a_damaged_note_of_a_run_in_progress_stops_rm(kept, elsewhere):
    _, store, _ = kept
    write(in_use.note_path(store, "run-333333333333"), "{")
    holder = hold(store, ["run-333333333333"])
    try:
        with pytest.raises(DamagedArtifact, match="nobody knows"):
            in_use.addresses(store)
    finally:
        holder.communicate(timeout=PATIENCE_S)


def test_runs_are_listed_with_what_each_takes_and_where_its_report_is(kept, elsewhere, capfd):
    path, store, root = kept
    other = replace(root_of(load(path, (SWEEP,)), "b.yaml", (SWEEP,)), at="2020-01-01T00:00:00Z")
    leave(store, other)
    told = typed(capfd, 0, "runs", "--store", store.root)
    assert told.index(root.id) < told.index(other.id) and f"b.yaml --override {SWEEP}" in told
    report = store.folder(stages.address(load(path), "evaluate")) / "report.html"
    assert str(report) in told and "none yet" in told and root.at in told
    sizes = {}
    for name, held in files(store).items():
        address = Path(name).parts[1] if name.startswith("artifacts") else Path(name).stem
        sizes[address] = sizes.get(address, 0) + len(held)
    total = sum(sizes.get(address, 0) for address in root.addresses)
    alone = sum(sizes.get(address, 0) for address in set(root.addresses) - set(other.addresses))
    assert f"{total / 1e6:.1f} │ {alone / 1e6:.1f}" in told
