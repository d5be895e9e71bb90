"""The files of the page at /: how they are sent, that containers have them, and their colours."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from modal.mount import _MountedPythonModule
from pages import FakeServer

import modal_app
from pipeline.report.style import DARK, LIGHT
from pipeline.serve.app import Access, closed
from pipeline.serve.keys import Keys

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "pipeline/serve/page"


def test_every_file_is_sent_with_its_kind_and_a_policy_that_allows_no_other_server():
    client = TestClient(FakeServer().app)
    for path in PAGE.iterdir():
        place = "" if path.name == "index.html" else f"page/{path.name}"
        answer = client.get(f"/{place}")
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        tag = {"If-None-Match": answer.headers["etag"]}
        assert client.get(f"/{place}", headers=tag).status_code == 304
        assert client.head(f"/{place}").headers["content-length"] == str(len(answer.content))
        assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", answer.content)
    for name in ("../playground.py", "%2e%2e/playground.py", "nothing.js", ""):
        assert client.get(f"/page/{name}").status_code == 404


def test_the_page_is_there_before_the_bundle_and_without_a_key():
    app = closed(Access(keys=Keys("secret")))
    client = TestClient(app, base_url="http://127.0.0.1")
    assert client.get("/").status_code == client.get("/page/app.js").status_code == 200
    assert client.get("/v1/models").status_code == 401
    asked = client.get("/v1/models", headers={"Authorization": "Bearer secret"})
    # what the page goes by, to ask again by itself
    assert asked.status_code == 503 and asked.json()["error"]["code"] == "loading"
    assert asked.headers["retry-after"].isdecimal()
    # of a page of another site it is no part
    frame = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/page/app.js", headers=frame).status_code == 403


def test_containers_on_modal_have_all_pages():
    mounted = _MountedPythonModule("pipeline", "/root", modal_app.LEFT_OUT)
    carried = {path for path, _ in mounted.get_files_to_upload()}
    wanted = set()
    for path in (ROOT / "pipeline").rglob("*"):
        if path.is_file() and path.parent.name != "__pycache__" and path.name != "LICENSE":
            wanted.add(path)
    assert wanted > set(PAGE.iterdir())
    assert carried == wanted and len(wanted) > 100


def _page_colours(which):
    """Return the experts' colours as the style sheet has them; which: 0 light, 1 dark."""
    text = (PAGE / "style.css").read_text()
    pairs = re.findall(r"--c\d:light-dark\((#\w+),(#\w+)\)", text)
    return [pair[which] for pair in pairs]


def _share_of_colour():
    text = (PAGE / "style.css").read_text()
    return float(re.search(r"\.token\.at\{.*?(\d+)%", text)[1]) / 100


def _rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_the_page_has_the_report_s_colours():
    text = (PAGE / "style.css").read_text()
    found = dict(re.findall(r"--(\w+):light-dark\((#\w+,#\w+)\)", text))
    assert len(found) == 17
    for name, pair in found.items():
        assert pair == f"{LIGHT[name]},{DARK[name]}"


# Machado, Oliveira and Fernandes 2009, table 1, severity 1: no red, no green, no blue cones.
SEEN = [
    np.eye(3),
    [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
]
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _contrast(one, other):
    low, high = sorted(XYZ[1] @ _linear(each) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


def _linear(rgb):
    value = np.array(rgb) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _lab(linear):
    value = XYZ @ np.clip(linear, 0, 1) / XYZ.sum(1)
    x, y, z = np.where(value > 0.008856, np.cbrt(value), 7.787 * value + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("which", [0, 1])
def test_experts_are_told_apart_whatever_cones_a_reader_has(which):
    colours = [_linear(_rgb(each)) for each in _page_colours(which)]
    assert len(colours) == 8
    for matrix in SEEN:
        seen = [_lab(np.array(matrix) @ each) for each in colours]
        nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
        # a difference of 2 is just seen where colours touch
        assert nearest > 20
    ink, paper = (_rgb((LIGHT, DARK)[which][name]) for name in ("ink", "paper"))
    for colour in map(_rgb, _page_colours(which)):
        assert _contrast(colour, paper) > 3
        # of a token that is pointed at, as the style sheet mixes it
        share = _share_of_colour()
        behind = [share * a + (1 - share) * b for a, b in zip(colour, paper, strict=True)]
        assert _contrast(ink, behind) > 4.5
