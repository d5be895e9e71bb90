"""Large files are hashed once on a machine: what is remembered is of the very file that was hashed,
and nothing else is believed."""

import errno
import mmap
import multiprocessing
import os
import platform
import random
import re
import shutil
import time

import pytest
from fakes import flip
from test_damage import copied, whole  # noqa: F401 (fixtures)

from benchmarks import hash_artifacts
from pipeline.errors import DamagedArtifact
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.job import run_job
from pipeline.store import artifacts, hashed
from pipeline.store.artifacts import Manifest, Reader, Store, inventory

HERE = "preprocess-0123456789ab"
NAMES = ("train/sea.bin", "train/hall.bin")


@pytest.fixture
def large(monkeypatch):
    """Every file counts as large, and as one that nobody is writing to any more."""
    monkeypatch.setattr(artifacts, "SMALL_BYTES", 0)
    monkeypatch.setattr(hashed, "SETTLED_NS", -(10**12))


@pytest.fixture
def hashes(monkeypatch):
    """The names of what is hashed, in order."""
    seen = []
    real = artifacts.sha256

    def counted(path):
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(artifacts, "sha256", counted)
    return seen


def made(root, **options):
    """Return a store with an artifact of two shards."""
    store = Store(root, **options).open()
    folder = store.begin(HERE)
    (folder / "train").mkdir()
    for name in NAMES:
        (folder / name).write_bytes(random.Random(name).randbytes(4096))
    store.finish(Manifest(HERE, "preprocess", None, {}, inventory(folder)))
    return store


@pytest.mark.usefixtures("large")
def test_a_second_job_hashes_nothing_and_opens_the_same(store_path, hashes):
    store = made(store_path)
    hashes.clear()
    Reader(store).folder(HERE)
    assert sorted(hashes) == ["hall.bin", "sea.bin"]
    hashes.clear()
    for _ in range(3):
        Reader(store).folder(HERE)
    assert hashes == []


def flipped(path):
    flip(path)


def flipped_with_its_times(path):
    """As a copy that was damaged on its way and keeps the times of what it was copied from."""
    state = path.stat()
    flip(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced(path):
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def flipped_through_a_map(path):
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[0] ^= 1


CHANGES = (flipped, flipped_with_its_times, replaced, flipped_through_a_map)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_is_hashed_again(store_path, change):
    store = made(store_path)
    Reader(store).folder(HERE)
    # the clock of a file system ticks every few milliseconds
    time.sleep(0.02)
    for name in NAMES:
        path = store.folder(HERE) / name
        kept = path.read_bytes()
        change(path)
        with pytest.raises(DamagedArtifact, match=f"{name} is not what was written") as damaged:
            Reader(store).folder(HERE)
        assert damaged.value.remove == store.folder(HERE)
        path.write_bytes(kept)
        Reader(store).folder(HERE)


def test_a_file_that_was_just_written_is_not_remembered(store_path, monkeypatch, hashes):
    """Written to again within a tick of the clock it would look the same."""
    monkeypatch.setattr(artifacts, "SMALL_BYTES", 0)
    store = made(store_path)
    Reader(store).folder(HERE)
    hashes.clear()
    Reader(store).folder(HERE)
    assert sorted(hashes) == ["hall.bin", "sea.bin"]
    later = time.time_ns() + 2 * hashed.SETTLED_NS
    monkeypatch.setattr(hashed.time, "time_ns", lambda: later)
    Reader(store).folder(HERE)
    hashes.clear()
    Reader(store).folder(HERE)
    assert hashes == []


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("other", ["host", "boot", "unknown"])
def test_no_machine_believes_another(store_path, monkeypatch, hashes, other):
    store = made(store_path)
    Reader(store).folder(HERE)
    with monkeypatch.context() as elsewhere:
        if other == "host":
            elsewhere.setattr(platform, "node", lambda: "elsewhere")
        else:
            boot = store_path / "boot"
            elsewhere.setattr(hashed, "_BOOT", boot)
            if other == "boot":
                boot.write_text("another\n")
        hashes.clear()
        Reader(store).folder(HERE)
        assert sorted(hashes) == ["hall.bin", "sea.bin"]
        hashes.clear()
        Reader(store).folder(HERE)
        assert len(hashes) == (2 if other == "unknown" else 0)
    hashes.clear()
    Reader(store).folder(HERE)
    # of a host there is one list, whose lines are those of its last start
    assert len(hashes) == (2 if other == "boot" else 0)


@pytest.mark.usefixtures("large")
def test_a_store_that_is_published_remembers_nothing(store_path, hashes):
    """Each of its machines lives for one job, and would leave a list behind."""
    store = made(store_path, publish=lambda: None)
    for _ in range(2):
        hashes.clear()
        Reader(store).folder(HERE)
        assert sorted(hashes) == ["hall.bin", "sea.bin"]
    assert not (store_path / hashed.FOLDER).exists()


def as_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("mine")


def as_folders(folder):
    for path in folder.iterdir():
        path.unlink()
        path.mkdir()


def with_other_bytes(folder):
    for path in folder.iterdir():
        path.write_bytes(b"\xff\x00\n" * 20)


def with_bits_flipped(folder):
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        # one in each line
        for line in range(len(NAMES)):
            data[data.index(b"\n") // 2 + line * len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("how", [as_a_file, as_folders, with_other_bytes, with_bits_flipped])
def test_a_list_that_cannot_be_used_costs_time_alone(store_path, hashes, how):
    store = made(store_path)
    Reader(store).folder(HERE)
    how(store_path / hashed.FOLDER)
    hashes.clear()
    Reader(store).folder(HERE)
    assert sorted(hashes) == ["hall.bin", "sea.bin"]
    flip(store.folder(HERE) / NAMES[0])
    with pytest.raises(DamagedArtifact):
        Reader(store).folder(HERE)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_list_that_cannot_be_written_stops_nobody(store_path, monkeypatch, error):
    store, tries = made(store_path), []

    def refused(*_):
        tries.append(error)
        raise OSError(error, os.strerror(error), str(store_path / hashed.FOLDER))

    monkeypatch.setattr(os, "fsync", refused)
    assert Reader(store).folder(HERE) == store.folder(HERE)
    assert tries


def note_all(root, number):
    artifacts.SMALL_BYTES = 0
    hashed.SETTLED_NS = -(10**12)
    store = Store(root)
    folder = store.folder(HERE)
    for name in sorted(path.name for path in folder.glob("*.bin"))[number::4]:
        reader = Reader(store)
        reader._check(HERE, name)


def test_processes_that_note_at_once_lose_nothing(store_path, monkeypatch, hashes):
    store = Store(store_path).open()
    folder = store.begin(HERE)
    for number in range(40):
        (folder / f"{number}.bin").write_bytes(bytes([number]) * 100)
    store.finish(Manifest(HERE, "preprocess", None, {}, inventory(folder)))
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=note_all, args=(store_path, number)) for number in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
    monkeypatch.setattr(artifacts, "SMALL_BYTES", 0)
    hashes.clear()
    Reader(store).folder(HERE)
    assert hashes == []
    # one list, and no half of another
    (written,) = (store_path / hashed.FOLDER).iterdir()
    assert written.suffix == ".txt"


# What trainings of each family open as a whole.
TRAININGS = [
    ("ffn_moe", "train_shared", None, [("preprocess", "sea")]),
    ("lora_vlm", "train_experts", "color", [("preprocess", "color"), ("train_shared", None)]),
    ("lora_vlm", "train_router", None, [("preprocess", "count"), ("routing", None)]),
]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("family", "stage", "item", "inputs"), TRAININGS)
def test_a_bit_of_any_file_is_found_by_the_training_that_opens_it(
    copied,  # noqa: F811
    family,
    stage,
    item,
    inputs,
):
    """However large: with nothing small, no file is left out."""
    cfg, store = copied(family)
    draw = random.Random(11)
    shutil.rmtree(store.folder(stages.address(cfg, stage, item)))
    for of_input in inputs:
        manifest = store.manifest(stages.address(cfg, *of_input))
        names = [name for name, entry in manifest.files.items() if entry["bytes"]]
        for name in draw.sample(names, min(len(names), 12)):
            path = store.folder(manifest.address) / name
            kept = path.read_bytes()
            flip(path, draw.randrange(len(kept)))
            with pytest.raises(DamagedArtifact) as damaged:
                run_job(stage, cfg, store, item, progress=quiet)
            assert str(damaged.value).startswith(f"{path} is not what was written")
            path.write_bytes(kept)


def test_what_it_costs_is_measured_beside_sha256sum(tmp_path, capsys):
    out = tmp_path / "result.md"
    options = ["--gigabytes", "0.034", "--files", "2", "--rounds", "1", "--out", str(out)]
    assert hash_artifacts.main(options) == 0
    shown = capsys.readouterr().err
    seconds = dict(re.findall(r"round 1: (.+, (?:cold|warm)): ([0-9.]+) s", shown))
    assert len(seconds) == 2 * len(hash_artifacts.WORDS)
    for pages in ("cold", "warm"):
        # nothing is read, so nothing is waited for
        first, second = (float(seconds[f"ours, {name}, {pages}"]) for name in ("first", "second"))
        assert second < first
    text = out.read_text()
    assert all(words in text for words in hash_artifacts.WORDS.values())
    assert "sha256sum (GNU coreutils)" in text and "Python" in text
