"""Every command that the READMEs show is carried out: as it stands there where that takes seconds,
else with fewer steps; those of the pipeline in this process and their jobs in others, those of
Modal by the real client on the loopback."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.run.domain_words import ABOUT
from tests.rehearsal import LINUX, rehearsal

ROOT = Path(__file__).parent.parent
OF_DOMAINS = [[name] for name in ABOUT]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
STARTS = ("python -m pipeline", "python routing-generator", "python scripts", "modal ", "make ")
# Without these a run takes minutes or the network; nothing else of a command is changed.
SHORT_TEXT = [
    *("data.source=installed", "data.hub=[]", "data.megabytes_per_domain=0.1"),
    *("partition.domains=[python,manual]", "partition.count=2", "partition.min_tokens=100"),
    # a small trunk of its own in place of the model that the demo starts from
    "trunk.init=null",
    *("trunk.tokens=2000", "expert.tokens=1000", "router.tokens=1000", "trunk.layers=2"),
    *("trunk.d_model=32", "trunk.heads=2", "trunk.d_ff=64", "trunk.context_tokens=64"),
    *("dense.baselines=[]", "evaluate.bootstrap=10", "evaluate.tokens_per_domain=512"),
    *("expert.statistics_tokens=512", "tokenizer.vocab_size=512", "runtime.threads=1"),
]
SHORT_PICTURES = [
    *("loras.defaults.steps=2", "loras.router.steps=2", "loras.defaults.eval_every_steps=0"),
    *("evaluate.smoke=true", "evaluate.smoke_rows=4", "evaluate.bootstrap=10"),
    *("dataset.per_expert={train: 8, valid: 4, test: 2}", "dataset.short=accept"),
    "runtime.threads=1",
    *(f"loras.experts.{name}.overrides.steps=2" for name in ("color", "ocr")),
    *(
        f"loras.experts.{name}.dataset.synthetic={{train: 20, valid: 8, test: 8}}"
        for name in ("color", "ocr", "count", "detect")
    ),
]
# What takes a person's own data or the network, and the first thing that it then asks for
NEEDS_MORE = {
    "config/dataset.yaml": "must be the folder of train.jsonl",
    "config/qwen3vl.yaml": "/store/inputs/caption",
}
# The two whole targets: one is this suite, the other is the run that is shortened here.
WHOLE = {"make demo", "make test"}


def _commands(document: str) -> list[str]:
    found = []
    for language, block in FENCED.findall((ROOT / document).read_text("utf-8")):
        if language:
            continue
        # A backslash continues a command on the next line.
        lines = block.replace("\\\n", " ").splitlines()
        found += [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    kept = [command for command in found if command.startswith(STARTS)]
    # These change their configuration: test_domain_docs.py has one for them
    return [command for command in kept if command.split()[3:4] not in OF_DOMAINS]


README = _commands("README.md")
LOCAL = [command for command in README if command.startswith("python")]
MODAL = [command for command in README if "modal" in command]
ROUTING = _commands("routing-generator/README.md")


def _shortened(command: str) -> list[str]:
    """Return a command's words with fewer steps for what it trains or plans."""
    words = shlex.split(command)
    runs = "prune" not in words and {"pipeline", "modal"} & set(words)
    if not runs or "--config" not in words:
        return words
    # a plan is as quick as it stands, where the model is not the demo's
    if "plan" in words and "config/demo.yaml" not in words:
        return words
    settings = SHORT_PICTURES if "vlm" in words[words.index("--config") + 1] else SHORT_TEXT
    if words[0] == "modal":
        return _with_one_override(words, settings)
    for setting in settings:
        words += ["--override", setting]
    return words


def _with_few_pictures(folder: Path) -> Path:
    """Return a folder with config/ in it as it is shipped, but for a tenth of the synthetic
    pictures, and of the routing set that is made of them."""
    shutil.copytree(ROOT / "config", folder / "config")
    for name in ("tiny_loras.json", "tiny_dataset.yaml"):
        path = folder / "config" / name
        text, found = re.subn(r"(\b(?:train|valid|test)\W+)(\d+)", _tenth, path.read_text("utf-8"))
        assert found >= 6
        path.write_text(text, "utf-8")
    return folder


def _tenth(number: re.Match) -> str:
    return f"{number[1]}{int(number[2]) // 10}"


def _with_one_override(words: list[str], settings: list[str]) -> list[str]:
    """Return a command of Modal's with settings put before those it has: its client passes on one
    --override alone."""
    if "--override" not in words:
        return [*words, "--override", " ".join(settings)]
    at = words.index("--override") + 1
    return [*words[:at], " ".join([*settings, words[at]]), *words[at + 1 :]]


def _run(words: list[str], cwd: Path, *more: str, code: int = 0) -> str:
    """Run a command of this checkout, which has to end with that code; return what it printed."""
    assert words[0] == "python"
    if words[1].endswith(".py"):
        words[1] = str(ROOT / words[1])
    done = subprocess.run(
        [sys.executable, *words[1:], *more],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def _typed(words: list[str], capfd, *more: str, code: int = 0) -> str:
    """Do a command of the pipeline from this checkout, which has to end with that code; return what
    it printed. In this process, where what it imports, and what its jobs are forked from, is there
    already."""
    assert words[:3] == ["python", "-m", "pipeline"]
    with contextlib.chdir(ROOT):
        status = main([*words[3:], *more])
    said = "".join(capfd.readouterr())
    assert status == code, said
    assert "Traceback" not in said
    return said


def _asked(words: list[str]) -> str | None:
    """Return what a command asks for that is not on this machine; None when it has all."""
    return next((said for name, said in NEEDS_MORE.items() if name in words), None)


def test_every_command_is_among_those_that_are_carried_out():
    assert set(README) == {*LOCAL, *MODAL, *WHOLE}
    assert len(LOCAL) > 8
    assert len(MODAL) > 4
    assert len(ROUTING) > 3


def test_the_commands_on_this_machine_in_the_order_of_the_page(tmp_path, capfd):
    """One store for all, so that each finds what those before it made."""
    store = str(tmp_path / "store")
    small = _with_few_pictures(tmp_path)
    for command in LOCAL:
        words = _shortened(command)
        if "pipeline" not in words:
            more = [] if "--help" in words else ["--output", str(tmp_path / "routing.jsonl")]
            assert _run(words, small, *more)
        elif "serve" in words:
            _serves(words, store)
        elif "deploy" in words:
            copy = tmp_path / "copy"
            _typed(words, capfd, "--store", store, "--override", f"deploy.upload={copy}")
            assert (copy / "latest.json").exists()
        elif "export" in words:
            words[words.index("--to") + 1] = str(tmp_path / "exported")
            _typed(words, capfd, "--store", store)
            assert list((tmp_path / "exported").glob("*.gguf"))
        else:
            wanted = _asked(words)
            code = 0 if wanted is None else 2
            assert (wanted or "") in _typed(words, capfd, "--store", store, code=code)
    stages = {path.name.split("-")[0] for path in (tmp_path / "store/artifacts").iterdir()}
    assert {"train_shared", "train_router", "evaluate", "deploy", "routing"} <= stages


def _serves(words: list[str], store: str) -> None:
    """Check that a server comes up at any free port and ends when it is told to."""
    command = [sys.executable, *words[1:], "--store", store, "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            found = re.search(r"http://[\w.]+:\d+", line)
            if found:
                break
        else:
            raise AssertionError("no address was printed")
        with urllib.request.urlopen(found[0] + "/healthz") as answer:  # noqa: S310
            assert json.load(answer)
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.parametrize("command", ROUTING)
def test_the_commands_of_the_routing_generator(tmp_path, command):
    text = (ROOT / "routing-generator/README.md").read_text("utf-8")
    described = re.search(r"<<'YAML'\n(.*?)^YAML$", text, re.M | re.S)
    assert described is not None
    (tmp_path / "text.yaml").write_text(described[1], "utf-8")
    for name in ("banking", "travel"):
        rows = [json.dumps({"text": f"{name} question {i}"}) for i in range(1300)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), "utf-8")
    words = shlex.split(command.replace("/tmp/set", str(tmp_path / "set")))
    wanted = _asked(words)
    more = ["--output", str(tmp_path / "out/set.jsonl")]
    if wanted is None:
        assert "set.jsonl" in _run(words, _with_few_pictures(tmp_path), *more)
    else:
        assert wanted in _run(words, _with_few_pictures(tmp_path), *more, code=2)


@LINUX
def test_the_commands_of_modal_by_its_own_client(tmp_path):
    with rehearsal(tmp_path) as modal:
        modal("secret", "create", "my-key", "MOLEFORGE_API_KEY=sesame")
        # `make modal-local` starts such a server of its own, for a command that is shown before it
        found = [re.sub(r'^make .*ARGS="(.*)"$', r"\1", command) for command in MODAL]
        assert len(set(found)) == len(found) - 1
        for command in dict.fromkeys(found):
            assert modal(*_shortened(command)[1:])
    assert any(modal.state.rglob("served.json"))
