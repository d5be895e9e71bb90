"""A disk that fills up at any writer is told as one, costs nothing that is finished, and the same
command goes on when there is room."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None,
    reason="the calls of every library are only seen below them, which takes a C compiler",
)
KINDS = ("text", "pictures")
# What a library or SQLite writes under names of their own, crops in a folder for the time being,
# and notes of looks, which may be lost: what is written next says it
FOREIGN = (".tmp??????", ".mode.part", "/.routing-*/", "/base/", "/crops.part", "/sources/")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """By kind of data: what each command said each time that its disk filled up."""
    root = tmp_path_factory.mktemp("full")
    library = root / "full_disk.so"
    source = HERE / "full_disk.c"
    build = [COMPILER, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(build, check=True)
    paths = f"{HERE.parent}{os.pathsep}{HERE}"
    env = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": paths}
    call = [sys.executable, HERE / "filling.py", root]
    subprocess.run(call, env=env, check=True, cwd=root)
    return {kind: json.loads((root / kind / "told.json").read_text()) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_no_room_to_write_a_file_wherever_it_fills_up(told, kind):
    filled = [each for each in told[kind] if each["at"]]
    reached = [each for each in filled if each["filled"]]
    assert len(reached) > 0.9 * len(filled) > 90
    for each in reached:
        text = " ".join(each["said"].split())
        where = (each["command"], each["at"], text)
        assert not each["trace"], where
        assert "no room to write " in text, where
        assert f"no room to write {each['folder']}" in text, where
        assert "run the same command again" in text, where
        call, _, path = each["at"].partition(" ")
        if call in ("open", "write") and not any(word in path for word in FOREIGN):
            found = re.search(r"no room to write (.*?) \(", text)[1]
            # one that several may write at once has a part with a name of its own
            wanted = re.sub(r"(\.\*)?\.part$", "", path).replace(".png.*", ".png")
            spool = path.endswith("/rows.part")
            assert spool or fnmatch(found, each["folder"] + wanted), where


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_finished_is_lost_and_no_half_passes_for_whole(told, kind):
    for each in told[kind]:
        if each["at"]:
            assert each["torn"] == [], each
            assert each["kept"], each


@pytest.mark.parametrize("kind", KINDS)
def test_with_room_the_same_command_goes_on_to_the_same_bytes(told, kind):
    ended = [each for each in told[kind] if not each["at"]]
    assert len(ended) >= 8
    for each in ended:
        assert each["same"], each
        assert each["parts"] == [], each


def test_every_kind_of_writer_was_tried(told):
    calls = Counter()
    names = set()
    for each in told["text"] + told["pictures"]:
        if each["at"]:
            calls[each["at"].split()[0]] += 1
            names.add(each["at"].rpartition("/")[2])
    assert calls.keys() >= {"open", "write", "fsync", "mkdir", "rename", "copy"}
    wanted = {"rows.sqlite", "*.png", "*.idx", "tokenizer.json", "model.safetensors", "report.html"}
    assert {name for name in wanted if any(name in each for each in names)} == wanted


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_what_is_shown_where_there_is_no_room_is_told(tmp_path):
    (tmp_path / "store.json").write_text(json.dumps({"format": 2}))
    words = [sys.executable, "-m", "pipeline", "runs", "--store", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            words, cwd=HERE.parent, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output: No space left on device\n",
    )
