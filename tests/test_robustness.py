"""A stage that ends between any two file operations, by a kill, a power cut or a full disk, and is
run again.

One dead moment is one raised exception after which every further operation on the store raises too,
which leaves the disk as the end of the process would.
"""

import errno
import io
import os
import random
import shutil
import sys
from pathlib import Path

import lora_small
import pytest
from conftest import make_text, tiny_config
from fakes import Killed, contents
from rich.console import Console

from pipeline.config.base import merge
from pipeline.errors import StoreError
from pipeline.families.load import load, parse
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store, inventory

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
NEED_ROOM = {"open", "os.mkdir", "fsync", "tensors"}
QUICK = (
    "trunk.steps=2",
    "expert.steps=2",
    "expert.eval_every_steps=1",
    "expert.statistics_tokens=64",
)


class Disk:
    """Counts operations on a store and lets one of them, and all after it, fail."""

    def __init__(self):
        self.root, self.at, self.how, self.seen, self.flushed = None, None, None, 0, set()

    def watch(self, root, at=None, how="kill"):
        """Begin to count; operation number `at` is the first that does not happen any more."""
        self.root, self.at, self.how, self.seen, self.flushed = str(root), at, how, 0, set()

    def operation(self, event, path):
        """Count an operation that is about to happen."""
        inside = (
            self.root and isinstance(path, str | os.PathLike) and str(path).startswith(self.root)
        )
        if not inside or (self.how == "full" and event not in NEED_ROOM):
            return
        self.seen += 1
        if self.at is None or self.seen <= self.at:
            return
        if self.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        raise Killed

    def audit(self, event, arguments):
        if (event == "open" and arguments[2] & WRITES) or event in CHANGES:
            self.operation(
                event, arguments[1] if event in ("os.rename", "os.link") else arguments[0]
            )

    def cut_power(self, root, before):
        """Lose every byte that was not flushed and was not there before."""
        for path in root.rglob("*"):
            if (
                path.is_file()
                and _mark(path) not in self.flushed
                and not (before / path.relative_to(root)).exists()
            ):
                os.truncate(path, 0)


def _mark(path):
    found = os.stat(path)  # noqa: PTH116
    return found.st_ino, found.st_size, found.st_mtime_ns


@pytest.fixture(scope="module")
def _audited():
    disk = Disk()
    sys.addaudithook(disk.audit)  # cannot be taken away again; without a root it does nothing
    yield disk
    disk.root = None


@pytest.fixture
def disk(_audited, monkeypatch):
    """The disk under every store of this test."""
    import safetensors.torch

    fsync, save_file = os.fsync, safetensors.torch.save_file

    def flush(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        _audited.operation("fsync", path)
        _audited.flushed.add(_mark(handle))

    def save(tensors, path, **about):
        try:
            _audited.operation("tensors", path)
        except Killed:
            save_half(tensors, path, **about)
            raise
        save_file(tensors, path, **about)

    def save_half(tensors, path, **about):
        root, _audited.root = _audited.root, None
        save_file(tensors, path, **about)
        Path(path).rename(Path(path).with_name(".tmpHALF"))
        os.truncate(Path(path).with_name(".tmpHALF"), 100)
        _audited.root = root

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    yield _audited
    _audited.root = None
    assert fsync is not os.fsync


def make(stage, cfg, store_path, item=None):
    """Do one job of a stage, the first unless it is named, as the job's process does it."""
    item = item or cfg.items(stage)[0]
    store, nowhere = Store(store_path).open(), Console(file=io.StringIO())
    return run_job(stage, cfg, store, item, progress=quiet, console=nowhere)


def check_whole_or_absent(store_path, address):
    """Fail when an artifact passes for whole and is not."""
    store = Store(store_path)
    if store.has(address):
        assert inventory(store.folder(address)) == store.manifest(address).files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Configuration, and a store that holds what comes before the stages below."""
    folder = tmp_path_factory.mktemp("prepared")
    cfg = load(tiny_config(folder / "tiny", runtime={"save_every_s": 1e-9}), QUICK)
    make_text(cfg, Store(folder / "store").open())
    make("train_shared", cfg, folder / "store")
    return cfg, folder / "store"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The same of adapters: everything but the trainings."""
    quick = {"steps": 2, "warmup_steps": 1, "eval_every_steps": 1, "eval_tokens": 60}
    changed = {"runtime": {"save_every_s": 1e-9}, "loras": {"defaults": quick}}
    cfg, store_path = parse(merge(lora_small.SETTINGS, changed)), tmp_path_factory.mktemp("lora")
    for stage in ("preprocess", "train_shared", "routing"):
        for item in cfg.items(stage):
            make(stage, cfg, store_path, item)
    return cfg, store_path


def crash_points(disk, stage, prepared, tmp_path, how, ends_with, first=0, stride=2, points=None):
    """End the stage after `first`, `first` + `stride`, ... file operations, or at these shares of
    them in twentieths, and run it again; return how many it has."""
    cfg, given = prepared
    before = tmp_path / "before"
    address = stages.address(cfg, stage, cfg.items(stage)[0])
    shutil.copytree(given, before, ignore=shutil.ignore_patterns(f"{address}*"))
    whole, here = tmp_path / "whole", tmp_path / "one"
    shutil.copytree(before, whole)
    disk.watch(whole, how=how)
    make(stage, cfg, whole)
    wanted, operations, disk.root = contents(whole), disk.seen, None
    chosen = range(first, operations, stride)
    if points:
        chosen = [operations * point // 20 for point in points]
    for n in chosen:
        shutil.copytree(before, here)
        disk.watch(here, n, how)
        with pytest.raises(ends_with):
            make(stage, cfg, here)
        disk.root = None
        if how == "power":
            disk.cut_power(here, before)
        check_whole_or_absent(here, address)
        make(stage, cfg, here)
        assert contents(here) == wanted, f"{how} after operation {n} of {operations}"
        shutil.rmtree(here)
    return operations


@pytest.mark.parametrize(
    ("how", "ends_with", "first"),
    # a full disk at every writer of every stage: test_full_disk.py
    [("kill", Killed, 0), ("power", Killed, 1), ("full", StoreError, 0)],
)
def test_expert_ends_between_any_two_file_operations(
    disk, prepared, tmp_path, how, ends_with, first
):
    assert crash_points(disk, "train_experts", prepared, tmp_path, how, ends_with, first) > 20


@pytest.mark.parametrize(
    ("how", "ends_with"), [("kill", Killed), ("power", Killed), ("full", StoreError)]
)
def test_preprocess_ends_between_any_two_file_operations(disk, prepared, tmp_path, how, ends_with):
    assert crash_points(disk, "preprocess", prepared, tmp_path, how, ends_with, stride=3) > 20


# Of adapters each stage, and a training in either way that it may be lost.
ENDS = [
    ("preprocess", "power", Killed),
    ("train_shared", "full", StoreError),
    ("routing", "kill", Killed),
    ("train_experts", "kill", Killed),
    ("train_router", "power", Killed),
]


@pytest.mark.parametrize(("stage", "how", "ends_with"), ENDS)
def test_a_stage_of_adapters_ends_between_two_file_operations(
    disk, adapters, tmp_path, stage, how, ends_with
):
    points = random.Random(stage).sample(range(1, 20), 3)
    operations = crash_points(disk, stage, adapters, tmp_path, how, ends_with, points=points)
    assert operations > 10
