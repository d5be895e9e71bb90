"""The examples of docs/serving.md, carried out as they stand but for the address."""

import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from fake_engine import FakeEngine, served
from test_serve import running

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/serving.md").read_text("utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def examples(language: str) -> list[str]:
    """Return the page's examples in a language."""
    return [text for found, text in FENCED.findall(PAGE) if found == language]


class DemoEngine(FakeEngine):
    """One with the names of the demo."""

    name = "demo"
    experts = ("python", "manual", "licences")
    speakers = (*experts, "base")
    readers = (*experts, "base")
    about: ClassVar = {"experts": [{"name": name} for name in experts]}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the server is that the page asks."""
    with running(served(tmp_path_factory.mktemp("demo"), DemoEngine())) as client:
        yield f"http://localhost:{client.base_url.port}"


def done(command: list[str], address: str, cwd: Path) -> str:
    """Return what a command prints, which has to succeed."""
    command = [word.replace("http://localhost:8000", address) for word in command]
    finished = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_curl_gets_an_answer(address, tmp_path):
    (command,) = examples("sh")
    answer = done(["sh", "-c", command], address, tmp_path)
    assert '"content":"The tide leaves' in answer


def test_the_official_client_streams_with_who_spoke(address, tmp_path):
    program, _ = examples("python")
    told = done([sys.executable, "-c", program], address, tmp_path)
    assert "['demo', 'expert:python', 'expert:manual', 'expert:licences', 'base']" in told
    assert "The <python> tide <python> leaves <python>" in told.replace("  ", " ")
