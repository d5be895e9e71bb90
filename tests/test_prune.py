"""What prune lists and removes: plants of every kind, runs in progress, links, stores that cannot
be written. Nothing that a configuration or a run needs may go; what runs are kept by is in
test_roots.py."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_config
from fakes import contents, traces
from test_backend import PATIENCE_S, command, ended, store_with, typed, until

from pipeline.data.text import records
from pipeline.families.load import load
from pipeline.run import stages
from pipeline.run.reach import root_of
from pipeline.store import in_use
from pipeline.store.artifacts import Store
from pipeline.store.reading import sealed
from pipeline.store.roots import leave

GONE = "train_shared-0123456789ab"


@pytest.fixture
def copied(finished, store_path):
    """Configuration and a copy of the finished store, to be changed."""
    shutil.copytree(finished[1], store_path)
    return finished[0], Store(store_path)


def pruned(capfd, path, store, *more, code=0):
    return typed(capfd, code, "prune", "--config", path, "--store", store.root, *more)


def tree(folder):
    """Return every path below a folder, links as links, with what files hold."""
    found = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[path.relative_to(folder).as_posix()] = path.read_bytes() if plain else None
    return found


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def plants(store, whole, outside):
    """Yield (what is planted, how) for every kind of thing that may go, orphans among them;
    `whole`: an address that is finished and reachable."""
    root = store.root
    for address in (GONE, "train_experts-a-b.c-fedcba987654", "evaluate-aaaaaaaaaaaa"):
        yield root / "artifacts" / address, lambda at: write(at / "deep" / "x.bin")
        yield root / "resume" / address, lambda at: write(at / "a" / "state.json")
        yield root / "jobs" / address, lambda at: write(at / "scan" / "manifest.json")
        yield root / "history" / f"{address}.jsonl", write
        yield root / "locks" / f"{address}.lock", write
    yield root / "resume" / whole, lambda at: write(at / "b" / "state.safetensors")
    yield root / "jobs" / whole, lambda at: write(at / "0" / "train.bin")
    yield root / "artifacts" / whole / "trunk.json.part", write
    yield root / "artifacts" / whole / ".tmpAb12Cd", write
    yield root / "history" / f"{whole}.jsonl.part", write
    yield root / "store.json.part", write
    yield root / "roots" / "tiny-0123456789ab.json.part", write
    yield root / "sources" / "0f.json.part", write
    yield root / "runs" / "run-0123456789ab.json", lambda at: write(at, "[]")
    yield root / "locks" / "run-ba9876543210.lock", write
    # links go, what they lead to stays
    yield root / "artifacts" / "deploy-bbbbbbbbbbbb", lambda at: at.symlink_to(outside)
    yield root / "resume" / "deploy-cccccccccccc", lambda at: at.symlink_to(outside / "nowhere")
    yield root / "artifacts" / whole / "y.part", lambda at: at.symlink_to(outside)


def test_every_plant_goes_and_nothing_else(copied, tmp_path, capfd):
    path, store = copied
    outside = tmp_path / "outside"
    write(outside / "precious.safetensors")
    (store.root / "runs").mkdir()
    whole = stages.address(load(path), "train_shared")
    # the lock that every run leaves
    write(store.root / "locks" / "runs.lock", "")
    before = tree(store.root)
    draw = random.Random(5)
    ways = list(plants(store, whole, outside))
    for count in (1, 5, len(ways)):
        chosen = draw.sample(ways, count)
        for place, plant in chosen:
            place.parent.mkdir(exist_ok=True)
            plant(place)
        planted = tree(store.root)
        told = pruned(capfd, path, store)
        for place, _ in chosen:
            # of one run or address its lock goes with the rest, and need not be named
            assert str(place) in told or place.parent.name == "locks", place
        assert {name: planted[name] for name in planted} == {
            name: held for name, held in tree(store.root).items() if name in planted
        }, "listed only"
        told = pruned(capfd, path, store, "--yes", "--orphans")
        assert "removed from" in told
        left = {name: held for name, held in tree(store.root).items() if held is not None}
        assert left == {name: held for name, held in before.items() if held is not None}
        assert not any(os.path.lexists(place) for place, _ in chosen)
        assert tree(outside) == {"precious.safetensors": b"x"}
    assert "nothing to prune" in pruned(capfd, path, store)


def test_what_was_made_here_by_nobody_stays(copied, tmp_path, capfd):
    path, store = copied
    cfg = load(path)
    other = tmp_path / "elsewhere"
    write(other / GONE / "x.bin")
    write(store.root / "artifacts" / "my notes" / "x.md")
    write(store.root / "artifacts" / ".DS_Store")
    write(store.root / "wandb" / "run" / "x.part")
    shutil.rmtree(store.folder(stages.address(cfg, "train_shared")))
    # a run that was interrupted: a slot with a torn file, and one that was set aside
    slot = store.resume(stages.address(cfg, "train_shared"))
    write(slot / "a" / "state.json")
    write(slot / "b" / "state.safetensors.part")
    aside = write(slot / "b.damaged-20260101T000000Z" / "state.json").parent
    (store.root / "jobs").symlink_to(other)
    told = pruned(capfd, path, store, "--yes")
    assert "2 names" in told and "jobs is a link" in told and f"{aside} was found damaged" in told
    assert (slot / "a" / "state.json").exists() and not (slot / "b/state.safetensors.part").exists()
    assert (store.root / "wandb" / "run" / "x.part").exists() and (other / GONE / "x.bin").exists()
    assert store.history(slot.name).exists(), "curves of a training that goes on"
    assert aside.exists()
    pruned(capfd, path, store, "--yes", "--damaged")
    assert not aside.exists() and (slot / "a" / "state.json").exists()
    assert (store.root / "artifacts" / "my notes" / "x.md").exists()


def test_a_damaged_artifact_keeps_its_checkpoints_and_stops_nothing(copied, capfd):
    path, store = copied
    here = stages.address(load(path), "train_shared")
    slot = write(store.resume(here) / "a" / "state.json")
    write(store.root / "artifacts" / GONE / "x.bin")
    (store.folder(here) / "trunk.json").write_text("")
    pruned(capfd, path, store, "--yes")
    (store.folder(here) / "manifest.json").write_text("{")
    pruned(capfd, path, store, "--yes")
    assert slot.exists() and not (store.root / "artifacts" / GONE).exists()


def test_it_says_what_it_read_and_refuses_to_read_nothing(copied, tmp_path, capfd, monkeypatch):
    path, store = copied
    before = traces(store.root)
    monkeypatch.chdir(tmp_path)
    assert "there is no configuration in" in typed(
        capfd, 2, "prune", "--yes", "--store", store.root
    )
    assert traces(store.root) == before
    second = shutil.copytree(path.parent, tmp_path / "config") / "tiny.yaml"
    second.write_text(second.read_text() + "\nseed: 5\n")
    assert str(second) in typed(capfd, 0, "prune", "--store", store.root)
    for cfg in (load(second), load(second, ("trunk.steps=0",))):
        write(store.folder(stages.address(cfg, "train_shared")) / "manifest.json")
    both = ["prune", "--config", path, "--config", second, "--store", store.root]
    for more in ((), ("trunk.steps=0",)):
        told = typed(capfd, 0, *both, *(f"--override={each}" for each in more))
        assert f"configurations read, 2, whose results are kept: {path} {second}" in told
        other = () if more else ("trunk.steps=0",)
        assert stages.address(load(second, more), "train_shared") not in told
        assert f"{stages.address(load(second, other), 'train_shared')} no run and no" in told
    assert "preprocess-" not in typed(capfd, 0, *both)


@pytest.mark.parametrize("what", ["nothing", "folder", "file"])
def test_where_no_store_is_none_is_made(finished, tmp_path, capfd, what):
    place = tmp_path / "misspelt"
    if what == "folder":
        write(place / "artifacts" / GONE / "x.bin")
    elif what == "file":
        write(place)
    before = tree(tmp_path)
    told = pruned(capfd, finished[0], Store(place), "--yes", code=2)
    assert f"there is no store in {place}" in told and "--store" in told
    assert tree(tmp_path) == before


def hold(store, names):
    """Start a process that holds locks; return it when it has them."""
    code = (
        "import sys; from pathlib import Path; from contextlib import ExitStack\n"
        "from pipeline.store.artifacts import Store\n"
        "held = ExitStack()\n"
        "for name in sys.argv[2:]: held.enter_context(Store(Path(sys.argv[1])).lock(name))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(store.root), *names]
    holder = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_what_is_in_use_is_left_and_named_without_waiting(copied, capfd):
    path, store = copied
    used = "train_router-222222222222"
    places = [store.folder(GONE), store.resume(GONE), store.folder(used)]
    for place in places:
        write(place / "x.bin")
    write(in_use.note_path(store, "run-333333333333"), sealed({"addresses": [used]}))
    holder = hold(store, [GONE, "run-333333333333"])
    try:
        for more in ((), ("--yes", "--orphans")):
            told = pruned(capfd, path, store, *more)
            for place in places:
                assert f"{place} in use by a run in progress, left alone" in told
        assert all(place.exists() for place in places)
    finally:
        holder.communicate(timeout=PATIENCE_S)
    told = pruned(capfd, path, store, "--yes", "--orphans")
    assert not any(place.exists() for place in places)
    assert not in_use.note_path(store, "run-333333333333").exists()


def test_what_was_noted_of_documents_goes_with_the_last_run_that_reads_them(
    tmp_path, capfd, monkeypatch
):
    path, store = tiny_config(tmp_path / "tiny"), Store(tmp_path / "store")
    # Nothing that this process has read for another test
    monkeypatch.setattr(records, "_own", [])
    config = ("--config", path, "--store", store.root)
    typed(capfd, 0, "tokenizer", *config)
    folder = store.root / "sources/text"
    kept = [*folder.glob("*.json"), *folder.glob("*.rows")]
    assert len(kept) >= 2
    stray = [write(folder / f"{'a' * 64}{end}", '{"of": "b"}') for end in (".json", ".rows")]
    unsaid = write(folder / f"{'c' * 64}.json", "{}")
    for each in folder.iterdir():
        os.utime(each, (1, 1))
    # whoever has just written one is about to read it
    young = write(folder / f"{'d' * 64}.json", '{"of": "b"}')
    told = pruned(capfd, path, store, "--yes")
    assert all(f"{each} of documents that no run reads, removed" in told for each in stray)
    assert not any(each.exists() for each in stray)
    assert all(each.exists() for each in (*kept, unsaid, young))
    pruned(capfd, path, store, "--yes", "--orphans")
    assert not unsaid.exists() and all(each.exists() for each in (*kept, young))
    others = ("--config", "config/tiny_vlm.yaml", "--store", store.root)
    typed(capfd, 0, "rm", "tiny", "--yes", *others)
    assert [each.name for each in sorted(folder.iterdir())] == [young.name]


def test_a_run_of_another_configuration_goes_on_beside_it(finished, store_path, capfd):
    """The race: prune removes all that it may, again and again, while a run whose configuration it
    does not know makes and reads artifacts."""
    store = store_with(
        store_path, finished, "tokenizer", "preprocess", "train_shared", "train_experts"
    )
    cfg = load(finished[0])
    ours = [stages.address(cfg, name) for name in ("tokenizer", "train_shared")]
    unknown = ["--yes", "--config", "config/tiny_vlm.yaml", "--store", store_path]
    process = command(finished[0], store_path)
    # a moment after its note
    until(lambda: list(store.root.glob("roots/*.json")) or process.poll() is not None)
    rounds = 0
    # until what comes before the report begins: then there is time for a whole look
    while process.poll() is None and not list(store.root.glob("artifacts/train_dense-path-*")):
        told = typed(capfd, 0, "prune", "--orphans", *unknown)
        assert not any(address in told for address in ours)
        assert "is in use: a run in progress needs" in typed(capfd, 2, "rm", "tiny", *unknown)
        rounds += 1
        # it is to make something between two looks
        time.sleep(0.1)
    assert rounds > 3
    ended(process, 0)
    # what it made stays as long as nobody asks for the run to go
    assert "nothing to prune" in typed(capfd, 0, "prune", "--orphans", *unknown)
    assert contents(store_path) == contents(finished[1])
    typed(capfd, 0, "rm", "tiny", *unknown)
    folders = {"artifacts", "resume", "jobs", "history", "locks", "runs", "roots", "sources"}
    files = {"store.json", *(f"locks/{name}.lock" for name in ("store", "runs", "removed"))}
    # sums of files are nobody's: whoever looks next goes on with them
    looks = {"sources/looked", "sources/made", "sources/seen", "sources/sums.txt"}
    left = {path for path in tree(store_path) if not path.startswith("sources/text")}
    assert left <= folders | files | looks


def test_a_store_that_cannot_be_written_is_listed_and_said_so(finished, tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "none", disk]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a file system needs root and a system that allows it")
    try:
        store = store_with(disk / "store", finished, "tokenizer", "preprocess")
        write(store.folder(GONE) / "x.bin")
        write(store.root / "locks" / f"{GONE}.lock")
        leave(store, root_of(load(finished[0])))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert f"{store.folder(GONE)} unfinished" in pruned(capfd, finished[0], store)
        told = pruned(capfd, finished[0], store, "--yes", code=2)
        assert "Read-only file system" in told and "right to write" in told
        # on it a command that finds all of it there leaves no root, and does its work
        for code, *words in ((2, "rm", "tiny", "--yes"), (0, "runs"), (0, "rm", "tiny")):
            told = typed(capfd, code, *words, "--store", store.root)
            assert ("right to write" in told) == bool(code)
        again = ["--config", finished[0], "--override", "evaluate.bootstrap=30"]
        assert "preprocess" in typed(capfd, 0, "preprocess", *again, "--store", store.root)
    finally:
        subprocess.run(["umount", disk], check=True)
