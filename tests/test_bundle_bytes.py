"""Two runs of a configuration give bundles of the same bytes, but for the file that tells of the
run: here one in this process, and one on what looks like another day and machine."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import lora_small
import pytest
from conftest import make_all, tiny_config
from rich.console import Console

from pipeline import report
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run.job import run_job
from pipeline.store import bundle
from pipeline.store.artifacts import Store
from pipeline.store.upload import upload

ROOT = Path(__file__).parent.parent
OTHER = {"PYTHONHASHSEED": "4711", "TZ": "Pacific/Apia", "LC_ALL": "C", "COLUMNS": "40"}
# A processor of another name, a clock a year on that runs at another pace
ELSEWHERE = """
import os, sys, time
from pathlib import Path

began, wall = time.monotonic(), time.time
real = time.monotonic
time.monotonic = lambda: began + 7 * (real() - began)
time.time = lambda: wall() + 4e7
gmtime = time.gmtime
time.gmtime = lambda *at: gmtime(*(at or (time.time(),)))
sys.path[:0] = ["tests"]
os.umask(0o077)

from pipeline import hardware
from test_bundle_bytes import deployed

hardware.cpu_name = lambda: "another processor"
# of another rate, which takes a fifth of a second to measure, and of a disk that is not waited for
hardware._best_rate = lambda *_: 2e9
os.fsync = lambda _handle: None
for config, store in zip(sys.argv[1::2], sys.argv[2::2]):
    deployed(Path(config), Path(store))
"""


def deployed(path, store_path):
    """Do every stage of a configuration, deploy among them; return the bundle."""
    make_all(path, store_path)
    store = Store(store_path).open()
    nowhere = Console(file=io.StringIO())
    made = run_job("deploy", load(path), store, progress=quiet, console=nowhere)
    return store.folder(made.address)


QUICK = {"steps": 6, "warmup_steps": 2, "eval_every_steps": 3, "eval_tokens": 96}


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """By family: the bundles of two runs."""
    root = tmp_path_factory.mktemp("twice")
    fits = {"trunk": QUICK, "expert": QUICK, "router": QUICK, "dense": {"baselines": []}}
    text = tiny_config(root / "text", **fits, runtime={"log_every_steps": 2})
    vlm = root / "vlm.yaml"
    vlm.write_text(json.dumps(lora_small.SETTINGS))
    first = {"ffn_moe": deployed(text, root / "one"), "lora_vlm": deployed(vlm, root / "vlm")}
    again = {"ffn_moe": (text, root / "a" / "text"), "lora_vlm": (vlm, root / "b" / "c")}
    arguments = [str(path) for pair in again.values() for path in pair]
    env = os.environ | OTHER | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], cwd=ROOT, env=env, check=True)
    out = {}
    for family, folder in first.items():
        out[family] = (folder, again[family][1] / "artifacts" / folder.name)
    return out


def of(folder):
    """Return the bytes of a bundle's files by name, less what the store keeps beside them."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in bundle.OF_STORE:
            found[name] = path.read_bytes()
    return found


FAMILIES = ("ffn_moe", "lora_vlm")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_but_one_has_the_same_bytes(twice, family):
    one, other = map(of, twice[family])
    assert one.keys() == other.keys()
    assert len(one) > 12
    differ = {name for name in one if one[name] != other[name]}
    assert differ == {"made.json"}
    assert one["SHA256SUMS"].count(b"\n") == len(one) - 2


@pytest.mark.parametrize("family", FAMILIES)
def test_times_and_machine_are_in_that_file_and_each_text_names_it(twice, family):
    one, other = (json.loads(of(folder)["made.json"]) for folder in twice[family])
    assert other["machine"]["cpu"] == "another processor" != one["machine"]["cpu"]
    assert one["bundled"][:4] < other["bundled"][:4]
    assert one["evaluated"][:4] < other["evaluated"][:4]
    assert [job["job"] for job in one["speed"]] == [job["job"] for job in other["speed"]]
    assert len(one["speed"]) >= 3
    # a job this small may not need more memory than is there when it begins
    assert all(job["tokens_per_s"] and job["peak_mb"] is not None for job in one["speed"])
    texts = of(twice[family][0])
    for name in ("README.md", "report.html", "report.json"):
        assert b"made.json" in texts[name], name
    held = report.read(texts["report.json"])
    assert not held.speed
    assert held.machine is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_curves_that_no_clock_moves_stay_on_the_page(twice, family):
    page = of(twice[family][0])["report.html"].decode()
    assert "learning rate" in page
    assert "gradient norm" in page
    for gone in ("throughput", "resident, MB", "tokens per second", "peak memory"):
        assert gone not in page


@pytest.mark.parametrize("family", FAMILIES)
def test_an_upload_takes_it_along_and_sends_a_later_one_over_it(twice, family, tmp_path):
    for folder in twice[family]:
        upload(folder, str(tmp_path / "there"), quiet)
        assert of(tmp_path / "there") == of(folder)
        bundle.verify(tmp_path / "there")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bundle_without_it_is_whole(twice, family, tmp_path):
    upload(twice[family][0], str(tmp_path / "there"), quiet)
    (tmp_path / "there" / "made.json").unlink()
    bundle.verify(tmp_path / "there")
    upload(tmp_path / "there", str(tmp_path / "further"), quiet)
    assert of(tmp_path / "further") == of(tmp_path / "there")
