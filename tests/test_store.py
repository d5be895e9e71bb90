"""The store's promises: whole or absent, one writer, damage named with the way out."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from fakes import flip, told

from pipeline.errors import (
    DamagedArtifact,
    DiskFull,
    MissingArtifact,
    NewerStore,
    OldStore,
    StoreError,
)
from pipeline.store.artifacts import (
    Manifest,
    Reader,
    Store,
    inventory,
    save_tensors,
)
from pipeline.store.mark import FORMAT, parse_format
from pipeline.store.room import translate_disk_errors

HERE = "train_shared-0123456789ab"


@pytest.fixture
def store(store_path):
    return Store(store_path).open()


@pytest.fixture
def made(store):
    """A store with one artifact of two files."""
    return finish(store)


def finish(store, value=1.0):
    folder = store.begin(HERE)
    save_tensors(folder / "trunk.safetensors", {"w": torch.full((8, 8), value)})
    (folder / "trunk.json").write_text("{}")
    store.finish(Manifest(HERE, "train_shared", None, {}, inventory(folder)))
    return store


def test_an_artifact_without_manifest_is_absent(store):
    folder = store.begin(HERE)
    (folder / "trunk.json").write_text("{}")
    assert not store.has(HERE) and store.addresses() == [HERE]
    with pytest.raises(MissingArtifact) as error:
        store.require(HERE)
    assert "run `python -m pipeline train_shared`" in told(error.value)


def test_a_finished_artifact_comes_back(made):
    assert made.has(HERE)
    assert torch.equal(Reader(made).tensors(HERE, "trunk.safetensors")["w"], torch.ones(8, 8))
    assert sorted(made.require(HERE).files) == ["trunk.json", "trunk.safetensors"]


def test_begin_empties_what_a_killed_writer_left(store):
    (store.begin(HERE) / "half.safetensors").write_bytes(b"x")
    assert list(store.begin(HERE).iterdir()) == []


def test_the_manifest_comes_last_after_everything_is_flushed(store, monkeypatch):
    flushed = []
    fsync = os.fsync

    def watched(handle):
        flushed.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    finish(store)
    last = flushed.index("manifest.json.part")
    assert {"trunk.safetensors", "trunk.json", HERE, "artifacts"} <= set(flushed[:last])
    assert HERE in flushed[last:]


def test_finishing_publishes_and_then_drops_the_checkpoints(store_path):
    seen = []
    store = Store(
        store_path, publish=lambda: seen.append((store.has(HERE), store.resume(HERE).exists()))
    ).open()
    store.resume(HERE).mkdir(parents=True)
    finish(store)
    assert seen == [(True, True)] and not store.resume(HERE).exists()


def test_digest_is_of_contents_only(store):
    one = finish(store).manifest(HERE)
    again = Manifest(
        HERE, "train_shared", None, {"other": "1"}, one.files, {"loss": 3}, {"at": "now"}
    )
    elsewhere = Manifest(
        HERE, "train_shared", None, {}, one.files | {"run.json": {"sha256": "0", "bytes": 1}}
    )
    assert one.digest == again.digest == elsewhere.digest
    assert (
        one.digest
        != Manifest(HERE, "x", None, {}, one.files | {"more": {"sha256": "0", "bytes": 1}}).digest
    )
    assert one.bytes == sum(
        p.stat().st_size for p in store.folder(HERE).iterdir() if p.name != "manifest.json"
    )


def way_out(store):
    return f"remove {store.folder(HERE)} and run `python -m pipeline train_shared` again"


def test_a_flipped_bit_is_named(made):
    path = made.folder(HERE) / "trunk.safetensors"
    flip(path, -5)
    with pytest.raises(DamagedArtifact) as error:
        Reader(made).tensors(HERE, "trunk.safetensors")
    assert str(path) in str(error.value) and "sha256" in str(error.value)
    assert way_out(made) in told(error.value)


@pytest.mark.parametrize("how", ["truncated", "gone", "longer"])
def test_a_file_of_another_size_is_named(made, how):
    path = made.folder(HERE) / "trunk.json"
    {
        "truncated": lambda: path.write_text(""),
        "gone": path.unlink,
        "longer": lambda: path.write_text("{} "),
    }[how]()
    with pytest.raises(DamagedArtifact) as error:
        made.require(HERE)
    assert str(path) in str(error.value) and way_out(made) in told(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"address": 1}', "null", "\x00\x01"])
def test_a_garbage_manifest_is_named(made, text):
    path = made.folder(HERE) / "manifest.json"
    path.write_text(text)
    with pytest.raises(DamagedArtifact) as error:
        made.require(HERE)
    assert str(path) in str(error.value) and way_out(made) in told(error.value)


def test_a_newer_store_is_refused(store_path):
    store_path.mkdir()
    (store_path / "store.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(NewerStore) as error:
        Store(store_path).open()
    assert f"format {FORMAT + 1}, this version reads up to {FORMAT}" in str(error.value)
    assert "update MoleForge, or choose another directory with --store" in told(error.value)


def test_an_older_store_is_refused_by_name_and_keeps_what_is_in_it(store_path):
    store_path.mkdir()
    (store_path / "store.json").write_text(json.dumps({"format": 1}))
    (store_path / "artifacts").mkdir()
    with pytest.raises(OldStore) as error:
        Store(store_path).open()
    text = told(error.value)
    assert text.startswith(f"{store_path} has store format 1, this version reads {FORMAT}: ")
    assert "stays as it is" in text and text.endswith("choose another directory with --store")
    assert [path.name for path in sorted(store_path.iterdir())] == ["artifacts", "store.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "new"}', '{"format": null}'])
def test_a_garbage_mark_is_refused(store_path, text):
    store_path.mkdir()
    (store_path / "store.json").write_text(text)
    with pytest.raises(StoreError) as error:
        Store(store_path).open()
    assert re.search(r"cannot be used as a store.*--store", told(error.value))


def test_a_path_that_is_a_file_is_refused(store_path):
    store_path.write_text("mine")
    with pytest.raises(StoreError) as error:
        Store(store_path).open()
    assert re.search(r"cannot be used as a store.*--store", told(error.value))
    with pytest.raises(StoreError, match="cannot be used as a store"):
        Store(store_path / "below").open()
    assert store_path.read_text() == "mine"


def test_opening_twice_changes_nothing(store):
    mark = store.root / "store.json"
    before = mark.stat().st_mtime_ns
    store.open()
    assert mark.stat().st_mtime_ns == before


def test_many_first_openings_at_once(store_path):
    errors = []

    def first():
        try:
            Store(store_path).open()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=first) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert parse_format((store_path / "store.json").read_bytes()) == FORMAT


def hold(root, held):
    with Store(root).lock(HERE):
        held.set()
        time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_holder(store, number):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold, args=(store.root, held))
    holder.start()
    assert held.wait(60)
    waited = []

    def waiting():
        waited.append(True)
        os.kill(holder.pid, number)

    with store.lock(HERE, waiting):
        assert waited == [True]
    holder.join()


def test_a_stale_lock_file_does_not_block(store):
    path = store.root / "locks" / f"{HERE}.lock"
    path.parent.mkdir(exist_ok=True)
    path.write_text("4711")
    with store.lock(HERE, lambda: pytest.fail("waited for nobody")):
        pass


def test_no_room_is_told_apart_from_other_errors(store):
    folder = store.resume(HERE)
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(DiskFull) as full, translate_disk_errors(folder):
            raise OSError(number, os.strerror(number))
        wanted = r"MB free\). What was finished is kept.*prune.*--store"
        assert re.search(wanted, told(full.value))
    with pytest.raises(OSError, match="Input/output") as error, translate_disk_errors(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(error.value, StoreError)


def test_not_allowed_inside_the_store_only(store, tmp_path):
    folder = store.folder(HERE)
    with pytest.raises(StoreError) as refused, translate_disk_errors(folder):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder / "trunk.json"))
    wanted = r"Read-only file system; give this user the right.*--store"
    assert re.search(wanted, told(refused.value))
    with pytest.raises(PermissionError), translate_disk_errors(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "corpus.txt"))


def test_a_small_file_with_a_flipped_bit_is_found_when_its_artifact_is_opened(finished, tmp_path):
    _, source = finished
    shutil.copytree(source, tmp_path / "store")
    store = Store(tmp_path / "store")
    address = next(a for a in store.addresses() if a.startswith("preprocess"))
    assert Reader(store).folder(address) == store.folder(address)
    path = next(store.folder(address).rglob("*.bin"))
    flip(path)
    with pytest.raises(DamagedArtifact, match=rf"{path.name} is not what was written"):
        Reader(store).folder(address)
