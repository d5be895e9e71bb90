"""The real `modal` command on a loopback server of a test's own.

Linux only; LOOPBACK_ISOLATION=plain in the environment runs the tests in that mode.
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="the loopback server starts containers as Linux does"
)


def heavy_modules() -> list[str]:
    """Return the modules of the requirements that a machine which only types commands needs not
    have."""
    names = {}
    for file in ("requirements", "requirements-modal"):
        text = (ROOT / f"{file}.txt").read_text("utf-8")
        found = re.findall(r"^([A-Za-z][\w.-]*)", text, re.MULTILINE)
        names[file] = {name.lower().replace("_", "-") for name in found}
    light = names["requirements-modal"]
    heavy = []
    for module, packages in packages_distributions().items():
        owners = {package.lower().replace("_", "-") for package in packages}
        if owners & names["requirements"] and not owners & light:
            heavy.append(module)
    return sorted(heavy)


class Client:
    """The `modal` command, led to a loopback server by its environment."""

    def __init__(self, folder: Path, cwd: Path, env: dict[str, str]) -> None:
        self.state, self.cwd, self.env = folder / "state", cwd, env

    def start(self, *args: str) -> subprocess.Popen:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            ["modal", *args],
            cwd=self.cwd,
            env=self.env,
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def __call__(self, *args: str, code: int = 0, **env: str) -> str:
        """Run a command, which has to end with that code; return what it printed."""
        command = ["modal", *args]
        done = subprocess.run(
            command, cwd=self.cwd, env=self.env | env, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def volume(self, name: str) -> Path:
        """Return where a volume's committed files are."""
        return self.state / "volumes" / f"{name}.v2"

    def preempt(self, function: str, grace_s: float) -> bool:
        """Take a container of a function away; return whether one was at work."""
        url = f"{self.env['LOOPBACK_HTTP']}/preempt?function={function}&grace={grace_s}"
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="POST")).close()  # noqa: S310
        except urllib.error.HTTPError as refused:
            refused.close()
            return False
        return True

    def recorded(self, function: str) -> list[dict]:
        """Return the definitions that the server was given for a function, first choice first."""
        raw = json.loads((self.state / "functions" / f"{function}.json").read_text("utf-8"))
        return [ranked["function"] for ranked in raw["ranked_functions"]]


@contextmanager
def rehearsal(folder: Path, cwd: Path = ROOT, *options: str, **env: str) -> Iterator[Client]:
    """Serve below folder while the block runs."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | env
    command = [
        sys.executable,
        "-m",
        "tests.loopback_modal",
        "--state",
        str(folder / "state"),
        *options,
    ]
    command += [
        "--env-file",
        str(folder / "env"),
        "--isolation",
        os.environ.get("LOOPBACK_ISOLATION", "auto"),
    ]
    server = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL)
    try:
        while not (folder / "env").exists():
            assert server.poll() is None, "the loopback server did not start"
            time.sleep(0.05)
        shown = re.findall(r"export (\w+)=(.*)", (folder / "env").read_text("utf-8"))
        yield Client(folder, cwd, variables | dict(shown))
    finally:
        server.terminate()
        server.wait(20)
