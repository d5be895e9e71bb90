"""The endpoint as the real client deploys it and the real container entrypoint serves it, on the
loopback server: which bundle a deployment serves, and what brings a former one back."""

import json
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import replace
from http.client import HTTPConnection

import pytest
from rehearsal import LINUX, ROOT, rehearsal

from pipeline import cloud
from pipeline.families.load import load
from pipeline.store.artifacts import Store

pytestmark = LINUX
KEY = "open-sesame"


@pytest.fixture(scope="module")
def bundles(bundled, tmp_path_factory):
    """(volume's folder, addresses) of two bundles, the second one to be served."""
    path, store_path, first = bundled
    folder = tmp_path_factory.mktemp("endpoint")
    root = shutil.copytree(store_path, folder / "state/volumes/ours.v2")
    store, addresses = Store(root), (first.name, "deploy-bbbbbbbbbbbb")
    made = store.manifest(first.name)
    shutil.copytree(first, store.begin(addresses[1]), dirs_exist_ok=True)
    store.finish(replace(made, address=addresses[1]))
    cfg = load(path, ("modal.endpoint_secret=my-key",))
    for address in addresses:
        result = cloud.JobResult("deploy", None, address, "found")
        cloud.serve_next([result], cfg, root, lambda: None)
    return folder, addresses


@pytest.fixture(scope="module")
def modal(bundles):
    """The client, with the bundles on its volume."""
    folder = bundles[0]
    place = {"MOLEFORGE_VOLUME_PATH": str(folder / "store")}
    # An app and a volume of one's own, which a plain `modal deploy` is told of by variables
    names = {"MOLEFORGE_APP": "mine", "MOLEFORGE_VOLUME": "ours"}
    with rehearsal(folder, ROOT, "--max-tasks", "2", **place, **names) as client:
        client("secret", "create", "my-key", f"MOLEFORGE_API_KEY={KEY}")
        yield client


def ask(url: str) -> dict:
    """Return the endpoint's answer."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {KEY}"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
        return json.load(answer)


def served_by(url: str) -> str:
    """Return the address of the bundle that a container tells."""
    told = ask(f"{url}/healthz")["bundle"]
    assert ask(f"{url}/v1/models")["data"][0]["bundle"] == told
    return told["address"]


def deployed(text: str) -> str:
    """Return the endpoint's address in what a deployment prints."""
    return re.search(r"Endpoint\.web -> (http://\S+)", text.replace("\n", " "))[1]


@pytest.fixture(scope="module")
def url(modal):
    """The address of the endpoint; until it is deployed, a rollback says what serves a bundle."""
    assert "no endpoint is deployed" in modal("run", "modal_app.py::rollback")
    yield deployed(modal("deploy", "modal_app.py"))
    modal("app", "stop", "-y", "mine")


def chunks(url: str, path: str, body: dict) -> list[bytes]:
    """Return an answer in the pieces in which it was passed on, each of them a chunk of HTTP."""
    line = HTTPConnection(url.removeprefix("http://"), timeout=300)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    line.request("POST", path, json.dumps(body), headers)
    answer = line.getresponse()
    assert answer.status == 200, answer.read()
    found = []
    while size := int(answer.fp.readline(), 16):
        found.append(answer.fp.read(size))
        answer.fp.readline()
    line.close()
    return found


def test_a_stream_is_passed_on_as_it_comes(url):
    asked = {"prompt": "7: lathe gear", "max_tokens": 8, "temperature": 0, "stream": True}
    found = chunks(url, "/v1/completions", asked)
    events = [line for line in b"".join(found).split(b"\n\n") if line]
    assert events[-1] == b"data: [DONE]" and len(events) > 8
    # One that waits for the end would be one piece
    assert len(found) >= 8


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_plain_deployment_wants_the_key_that_was_settled(url, key):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url}/v1/models", headers=headers)  # noqa: S310
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(request, timeout=300)  # noqa: S310
    refused.value.close()
    assert ask(f"{url}/v1/models")["data"]


def test_the_key_is_kept_where_secrets_are_and_nowhere_else(modal, url):
    assert ask(f"{url}/v1/models")["data"]
    holding = set()
    for path in modal.state.rglob("*"):
        if path.is_file() and KEY.encode() in path.read_bytes():
            holding.add(path.name)
    # The server's own: secrets, and the environment that it starts a container in
    assert holding == {"secrets.json", "spec.json"}


def test_a_deployment_serves_one_bundle_and_a_rollback_is_one_command(modal, url, bundles):
    first, second = bundles[1]
    definition = modal.recorded("Endpoint.*")[0]
    assert definition["max_concurrent_inputs"] == 64
    assert definition["target_concurrent_inputs"] == 32
    assert served_by(url) == first
    told = modal("run", "modal_app.py::rollback", "--to", second)
    assert served_by(deployed(told)) == second
    # Those that start now serve what it was deployed with, whatever the note has come to say
    note = modal.volume("ours") / "served.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"address": "deploy-0"}))
    tasks = modal.state / "tasks"
    before = len(list(tasks.iterdir()))
    # Who idles for three seconds ends
    time.sleep(4)
    assert served_by(deployed(told)) == second
    assert len(list(tasks.iterdir())) > before
