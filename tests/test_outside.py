"""Who edits a file after something was made of it is told: by the plan and by the command, of
either family, for files, folders and globs."""

import os
import random
from pathlib import Path

import pytest
from conftest import tiny_config

from pipeline.config.run import RunConfig
from pipeline.families.load import RUN_CONFIGS, load
from pipeline.run.backend import Local, run_stage
from pipeline.run.outside import changed_since
from pipeline.run.stages import Addresses
from pipeline.store.artifacts import Store

CHANGES = {
    "longer": lambda file: file.write_bytes(file.read_bytes() * 2),
    "edited in place": lambda file: file.write_bytes(file.read_bytes()[::-1]),
    "replaced": lambda file: _replaced(file),
}


def _replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)


class Reads:
    """A configuration of which a job reads what is named, whatever the family."""

    def __init__(self, *paths: str) -> None:
        self.paths = paths

    def read_outside(self, _stage, _item):
        """Yield each path with a setting's name."""
        return (("data.files", path) for path in self.paths)


@pytest.fixture
def made(tmp_path):
    """A store with an artifact, and files that are older."""
    store = Store(tmp_path / "store").open()
    texts = tmp_path / "texts [1]"
    (texts / "deep").mkdir(parents=True)
    files = [texts / "a.txt", texts / "b.txt", texts / "deep/c.txt"]
    for file in files:
        file.write_text("some text")
    folder = store.folder("preprocess-0123456789ab")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    later = files[-1].stat().st_mtime_ns + 10**9
    os.utime(folder / "manifest.json", ns=(later, later))
    for file in files:
        os.utime(file, ns=(later - 1, later - 1))
    return store, texts, files


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(3))
def test_a_file_that_is_newer_than_its_artifact_is_named(made, change, seed):
    store, texts, files = made
    literal = str(texts).replace("[", "[[]")
    cfg = Reads(*(f"{literal}/{name}" for name in ("*.txt", "deep/c.txt")))
    assert changed_since(cfg, store, "preprocess", None, "preprocess-0123456789ab") == ""
    file = random.Random(seed).choice(files)
    CHANGES[change](file)
    now = (store.folder("preprocess-0123456789ab") / "manifest.json").stat().st_mtime_ns + 1
    os.utime(file, ns=(now, now))
    ways = (str(texts), f"{literal}/**", f"{literal}/**/*.txt", str(file))
    for each in (cfg, *map(Reads, ways)):
        told = changed_since(each, store, "preprocess", None, "preprocess-0123456789ab")
        assert f"data.files: {file} changed after preprocess-0123456789ab was made" in told


def test_what_is_elsewhere_gone_or_not_made_says_nothing(made):
    store, texts, _ = made
    cfg = Reads("s3://bucket/a.txt", str(texts / "gone.txt"), "relative/*.txt")
    assert changed_since(cfg, store, "preprocess", None, "preprocess-0123456789ab") == ""
    assert changed_since(Reads(str(texts)), store, "preprocess", None, "preprocess-nothing") == ""


def test_every_family_says_what_it_reads():
    for kind in RUN_CONFIGS.values():
        assert kind.read_outside is not RunConfig.read_outside


def test_the_command_says_so(tmp_path, capfd):
    cfg = load(tiny_config(tmp_path / "tiny"))
    store = Store(tmp_path / "store").open()
    run_stage("preprocess", cfg, Local(store))
    capfd.readouterr()
    run_stage("preprocess", cfg, Local(store))
    assert "changed after" not in capfd.readouterr().err
    [file, *_] = sorted((tmp_path / "tiny").glob("*.jsonl"))
    address = Addresses(cfg).of("preprocess", None)
    now = (store.folder(address) / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(file, ns=(now, now))
    run_stage("preprocess", cfg, Local(store))
    assert f"{file} changed after {address} was made" in capfd.readouterr().err
