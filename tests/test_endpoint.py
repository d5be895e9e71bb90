"""Who gets an endpoint on Modal, and with which key: every order of `::deploy` and `modal deploy`,
every process, every command."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import MALFORMED, StubbedVolume
from pydantic import ValidationError
from test_cloud_leases import FakeTable

from pipeline import cloud
from pipeline.cloud import notes
from pipeline.cloud.endpoint import pinned, roll_back, served_addresses, shown_versions
from pipeline.cloud.leases import Leases
from pipeline.config.machines import EndpointConfig, ModalConfig
from pipeline.errors import ConfigError, DamagedArtifact, MissingArtifact, StoreError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.run.advice import sentence
from pipeline.serve.generation import Capacity
from pipeline.store.artifacts import Manifest, Store, inventory

ROOT = Path(__file__).parent.parent
WAYS = {
    "key": {"endpoint_secret": "my-key"},
    "other": {"endpoint_secret": "other-key"},
    "public": {"endpoint_public": True},
    "proxy": {"endpoint_proxy_auth": True},
    "unsaid": {},
}
MACHINES = (
    EndpointConfig(),
    EndpointConfig(gpu=("L40S",), idle_s=11, max_containers=7, timeout_s=99, max_inputs=40),
)
BUNDLE = cloud.JobResult("deploy", None, "deploy-1", "found")
# What modal_app makes of a command line: its classes, its secrets, how its endpoint is entered
LOOK = """
import importlib, json, sys
import modal
note = NOTE
modal.Volume.read_file = lambda self, path: [
    json.dumps(note if path == "served.json" else {}).encode()
]
modal.Secret.hydrate = lambda self: self
for words in json.loads(sys.argv[1]):
    sys.argv = words
    sys.modules.pop("modal_app", None)
    app = importlib.import_module("modal_app")
    print(json.dumps([hasattr(app, "Endpoint"), sorted(app.app.registered_classes),
                      app.WIRING.secrets, app.WIRING.entered, app.WIRING.bundle]))
"""


def config(**modal) -> FfnMoeConfig:
    """Return a run with those settings of Modal."""
    return FfnMoeConfig(modal=ModalConfig(**modal))


def noted(folder: Path, cfg: FfnMoeConfig) -> bytes:
    """Return the note that `::deploy` leaves with that configuration."""
    cloud.serve_next([BUNDLE], cfg, folder, lambda: None)
    return (folder / cloud.SERVED).read_bytes()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("way", WAYS)
def test_a_plain_deployment_is_what_the_bundle_s_configuration_said(tmp_path, way, machine):
    content = noted(tmp_path, config(**WAYS[way], endpoint=machine))
    if way == "unsaid":
        with pytest.raises(ConfigError) as refused:
            cloud.deployed(FfnMoeConfig(), {}, content)
        for said in ("modal.endpoint_secret=NAME", "modal.endpoint_public=true"):
            assert said in str(refused.value)
        return
    settled = cloud.deployed(FfnMoeConfig(), {}, content).modal
    assert settled == ModalConfig(**WAYS[way], endpoint=machine)


@pytest.mark.parametrize(("before", "given"), [*itertools.product([*WAYS, "old", "none"], WAYS)])
def test_a_named_configuration_never_drops_a_key(tmp_path, before, given):
    content = None
    if before == "old":
        content = json.dumps({"address": "deploy-1"}).encode()
    elif before != "none":
        content = noted(tmp_path, config(**WAYS[before], endpoint=MACHINES[1]))
    cfg = config(**WAYS[given], endpoint=EndpointConfig(idle_s=77))
    wanted = WAYS[given]
    if given != "public":
        # A key and tokens may be wanted together
        wanted = WAYS.get(before, {}) | wanted
    kept = before in ("key", "other", "proxy") and given == "public"
    if kept or not wanted:
        with pytest.raises(ConfigError, match=r"endpoint_secret=NAME.*endpoint_public=true"):
            cloud.deployed(cfg, {"MOLEFORGE_CONFIG": "mine.yaml"}, content)
        return
    settled = cloud.deployed(cfg, {"MOLEFORGE_CONFIG": "mine.yaml"}, content).modal
    if given in ("key", "other", "proxy"):
        wanted.pop("endpoint_public", None)
    assert settled == ModalConfig(**wanted, endpoint=EndpointConfig(idle_s=77))


@pytest.mark.parametrize("content", [*MALFORMED, b"{}", b'{"address": 1}'])
def test_a_note_that_says_nothing_is_refused(content):
    with pytest.raises(DamagedArtifact) as damaged:
        cloud.deployed(FfnMoeConfig(), {}, content)
    edge = cloud.ModalEdge(Path("/store"))
    assert "run `modal run modal_app.py::deploy` again" in sentence(damaged.value, edge)


@pytest.mark.parametrize(
    ("key", "entered", "way"),
    [*itertools.product([None, "", "k"], ["", "key", "public", "proxy"], WAYS)],
)
def test_a_process_without_a_key_serves_only_what_is_public(tmp_path, key, entered, way):
    noted(tmp_path, config(**WAYS[way]))
    # Made again after the deployment, to be served with a key: not by the one that has none
    open_asked = entered == "public" and way in ("public", "unsaid")
    with_tokens = entered == "proxy" and way not in ("key", "other")
    if key or open_asked or with_tokens:
        assert cloud.served(tmp_path, key, entered).name == "deploy-1"
    else:
        with pytest.raises(ConfigError, match="key|KEY|proxy tokens"):
            cloud.served(tmp_path, key, entered)


def bundle_at(root: Path, address: str, sums: str) -> None:
    """Put a whole bundle on a volume, as far as its address and its list of sums go."""
    store = Store(root).open()
    folder = store.begin(address)
    (folder / "SHA256SUMS").write_text(sums)
    store.finish(Manifest(address, "deploy", None, {}, inventory(folder)))


def settle(root: Path, *addresses: str, keep: int = 2) -> None:
    """Do what `::deploy` does at its end, for one bundle after another."""
    cfg = FfnMoeConfig(deploy={"keep": keep}, modal={"endpoint_secret": "my-key"})
    for address in addresses:
        result = cloud.JobResult("deploy", None, address, "made")
        cloud.serve_next([result], cfg, root, lambda: None)


def test_the_containers_of_a_deployment_serve_the_bundle_that_it_was_made_with(tmp_path):
    first, second = "deploy-aaaaaaaaaaaa", "deploy-bbbbbbbbbbbb"
    for address in (first, second):
        bundle_at(tmp_path, address, address)
    settle(tmp_path, first)
    pin = pinned((tmp_path / cloud.SERVED).read_bytes())
    settle(tmp_path, second)
    # What comes later is another deployment's
    assert cloud.served(tmp_path, "k", "key", pin).name == first
    assert cloud.served(tmp_path, "k", "key").name == second
    assert pinned(None) == ""
    folder = tmp_path / "artifacts" / first
    (folder / "SHA256SUMS").write_text("made again")
    with pytest.raises(ConfigError, match="was made again.*type `modal deploy modal_app.py`"):
        cloud.served(tmp_path, "k", "key", pin)
    shutil.rmtree(folder)
    with pytest.raises(MissingArtifact):
        cloud.served(tmp_path, "k", "key", pin)


def test_a_rollback_leads_to_what_was_served_before_and_keeps_the_key(tmp_path):
    addresses = [f"deploy-{letter * 12}" for letter in "abcde"]
    for address in addresses:
        bundle_at(tmp_path, address, address)
    settle(tmp_path, *addresses)
    # One that is found again is the newest
    settle(tmp_path, addresses[3])
    kept = [addresses[2], addresses[4], addresses[3]]
    assert [each.name for each in shown_versions(tmp_path)[0]] == kept
    assert set(served_addresses(tmp_path)) == set(kept)
    roll_back(tmp_path, None, lambda: None)
    assert shown_versions(tmp_path)[1] == addresses[4]
    roll_back(tmp_path, None, lambda: None)
    assert cloud.served(tmp_path, "k", "key").name == addresses[2]
    with pytest.raises(StoreError, match="there is no version before"):
        roll_back(tmp_path, None, lambda: None)
    roll_back(tmp_path, addresses[3][:8], lambda: None)
    note = json.loads((tmp_path / cloud.SERVED).read_text())
    assert note["address"] == addresses[3] and note["endpoint"]["secret"] == "my-key"
    # A note of before knows one bundle
    (tmp_path / cloud.SERVED).write_text(json.dumps({"address": addresses[0]}))
    settle(tmp_path, addresses[1])
    roll_back(tmp_path, None, lambda: None)
    assert cloud.served(tmp_path, "k", "key").name == addresses[0]


def test_of_two_bundles_that_are_noted_at_once_none_is_lost(tmp_path):
    volume, table, both = StubbedVolume(tmp_path), FakeTable(), threading.Barrier(2)
    addresses = {f"deploy-{letter * 12}" for letter in "ab"}

    def note(address, view):
        def refresh():
            view.reload()
            # Long enough for the other one to read the same
            time.sleep(0.05)

        store = Store(view.path, publish=view.commit, refresh=refresh)
        result = cloud.JobResult("deploy", None, address, "made")
        both.wait()
        leases = Leases(table, address)
        cloud.note_bundle([result], config(), store, leases, lambda _s: time.sleep(0.005))

    threads = []
    for address in addresses:
        threads.append(threading.Thread(target=note, args=(address, volume.view())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.address for each in shown_versions(volume.path)[0]} == addresses
    # What comes to no bundle waits for nobody and notes nothing
    failed = cloud.JobResult("deploy", None, "deploy-1", "failed", "why")
    cloud.note_bundle([failed], config(), Store(tmp_path / "none"), None)
    assert not (tmp_path / "none").exists()


def of_format(number: int | str, content: bytes, **more) -> bytes:
    """Return a note with what a later format may say beside, in all of its sections."""
    said = json.loads(content) | {"colour": "red", **more} | {"format": number}
    for section in ("endpoint", "machine"):
        if section in said:
            said[section] |= {"colour": "red"}
    return json.dumps(said).encode()


def test_notes_are_read_by_the_code_before_and_after_the_one_that_wrote_them(tmp_path):
    first, second = "deploy-aaaaaaaaaaaa", "deploy-bbbbbbbbbbbb"
    for address in (first, second):
        bundle_at(tmp_path, address, address)
    settle(tmp_path, first, second)
    note = tmp_path / cloud.SERVED
    written = note.read_bytes()
    # What was deployed before notes had formats refuses any other field
    said = json.loads(written)
    assert set(said) == {"address", "sums", "endpoint", "versions"}
    assert set(said["endpoint"]) == {"secret", "public", "proxy_auth", "machine", "serve"}
    assert pinned(written).startswith(second)
    # Deployed by today's code, while tomorrow's has made the next bundle
    note.write_bytes(of_format(notes.FORMAT + 1, written))
    assert cloud.served(tmp_path, "k", "key").name == second
    assert cloud.deployed(FfnMoeConfig(), {}, note.read_bytes()).modal.endpoint_secret == "my-key"
    roll_back(tmp_path, None, lambda: None)
    assert cloud.served(tmp_path, "k", "key").name == first
    # As today's code writes notes, which therefore knows all of it
    assert set(json.loads(note.read_text())) == set(said)
    for wrong in (of_format(notes.FORMAT, written), of_format("2", written)):
        with pytest.raises(DamagedArtifact, match="does not say what to serve"):
            pinned(wrong)


def test_a_note_of_when_to_measure_again_is_read_by_the_code_before_it(tmp_path):
    cfg = config(reevaluate="0 6 * * 1", regions=["eu"])
    cloud.note_reevaluation([BUNDLE], cfg, tmp_path, lambda: None)
    written = (tmp_path / cloud.REEVALUATED).read_bytes()
    assert "format" not in json.loads(written)
    later = of_format(notes.FORMAT + 1, written, colours=["red"])
    for content in (written, later):
        assert cloud.reevaluated_as(ModalConfig(), content).regions == ("eu",)
    with pytest.raises(DamagedArtifact, match="does not say when to measure again"):
        cloud.reevaluated_as(ModalConfig(), of_format(notes.FORMAT, written))


def test_a_note_of_a_later_format_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(notes, "FORMAT", 2)
    content = noted(tmp_path, config(endpoint_public=True))
    assert json.loads(content)["format"] == 2
    assert pinned(content) == "deploy-1"
    monkeypatch.undo()
    assert pinned(content) == "deploy-1"


def test_no_container_gets_more_than_its_server_takes():
    endpoint, capacity = EndpointConfig(), Capacity()
    assert endpoint.target_inputs == capacity.rows
    assert endpoint.max_inputs <= capacity.rows + capacity.waiting
    with pytest.raises(ValidationError, match="no container gets more than max_inputs, 4"):
        EndpointConfig(target_inputs=5, max_inputs=4)


@pytest.mark.parametrize("way", ["key", "proxy"])
def test_open_and_closed_at_once_is_refused(way):
    cfg = config(**WAYS[way], endpoint_public=True)
    with pytest.raises(ConfigError, match="set only one of them"):
        cloud.check(cfg, cloud.Prices.load(ROOT / "config/prices.yaml"), "/store")


def test_an_endpoint_is_where_its_run_is_or_where_it_says(tmp_path):
    for own, wanted in ((), ("eu",)), (("jp",), ("jp",)):
        content = noted(tmp_path, config(regions="eu", endpoint={"regions": own}))
        how = json.loads(content)["endpoint"]
        assert tuple(how["machine"]["regions"]) == wanted


def look(note: dict, commands: list[list[str]], **variables: str) -> list[list]:
    """Return what modal_app makes of each command line, in a process of its own."""
    code = LOOK.replace("NOTE", repr(note))
    environ = {key: value for key, value in os.environ.items() if key != "MOLEFORGE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=ROOT,
        env=environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


MAKES = [
    ["modal", "deploy", "modal_app.py"],
    ["modal", "serve", "modal_app.py"],
    ["/usr/bin/modal", "deploy", "--name", "run", "modal_app.py"],
    ["/site-packages/modal/__main__.py", "deploy", "modal_app.py"],
]
MAKES_NONE = [
    ["modal", "run", "-d", "modal_app.py::deploy", "--config", "config/demo_from_zero.yaml"],
    ["modal", "run", "modal_app.py::run_all", "--override", "name=deploy"],
    ["modal", "shell", "modal_app.py::orchestrate"],
    ["modal", "deploy", "modal_app.py", "--help"],
    ["pytest", "deploy", "modal_app.py"],
    ["modal"],
]


@pytest.mark.parametrize("command", MAKES + MAKES_NONE, ids=" ".join)
def test_which_commands_make_an_endpoint(command):
    assert cloud.deploys(command) == (command in MAKES)


def test_only_a_deployment_declares_it():
    how = {"secret": "my-key", "public": False, "machine": {"idle_s": 11}}
    made = look({"address": "deploy-1", "endpoint": how}, [MAKES[0], MAKES_NONE[0]])
    assert made[0] == [True, ["Endpoint"], {"endpoint": "my-key"}, "key", "deploy-1"]
    assert made[1] == [False, [], {}, "", ""]
