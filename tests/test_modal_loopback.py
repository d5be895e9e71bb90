"""The commands a user types, through the real client and the real container entrypoint, against the
loopback server.

One run is carried through all stages, with what happens to runs: a closed laptop, preemptions, an
expert that fails. Everything it makes is compared with a local run of the same configuration, byte
for byte.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import make_all
from fakes import contents
from rehearsal import LINUX, ROOT, rehearsal
from yaml_text import yaml_text

from pipeline.families import PackWish
from pipeline.families.ffn_moe.packing import pack
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import stages
from pipeline.run.context import StoredParts
from pipeline.run.job import run_job
from pipeline.store.artifacts import Store
from pipeline.store.costs import readable_costs

EXPERTS = ("headers", "manual")
BROKEN = "manual"  # the expert that fails until its cause is gone
FIT = {
    "batch_sequences": 4,
    "warmup_steps": 2,
    "eval_every_steps": 20,
    "eval_tokens": 256,
    "lr": 3e-3,
}
TINY = {
    "name": "tiny",
    "dtype": "fp32",
    "data": {"source": "installed", "megabytes_per_domain": 3},
    "partition": {"domains": list(EXPERTS), "min_tokens": 100},
    "tokenizer": {"vocab_size": 300, "sample_megabytes": 0.1},
    "trunk": FIT
    | {"steps": 400, "layers": 2, "d_model": 16, "heads": 2, "d_ff": 32, "context_tokens": 16},
    "expert": FIT | {"steps": 10, "statistics_tokens": 512},
    "router": FIT | {"steps": 6, "top_k": 1},
    "dense": {"baselines": []},
    "evaluate": {"tokens_per_domain": 256, "bootstrap": 10},
    "runtime": {"threads": 1, "save_every_s": 0.01, "log_every_steps": 5},
    "modal": {
        "preprocess_jobs": 3,
        "endpoint_secret": "moleforge-endpoint",
        "train_experts": {"gpu": ["H100", "A100-80GB:2"], "timeout_s": 7200, "retries": 2},
    },
}

pytestmark = LINUX


@pytest.fixture(scope="module")
def modal(tmp_path_factory):
    """The client, with a server that lives as long as this module's tests."""
    folder = tmp_path_factory.mktemp("modal")
    (folder / "tiny.yaml").write_text(yaml_text(TINY))
    with rehearsal(
        folder, ROOT, "--max-tasks", "2", MOLEFORGE_VOLUME_PATH=str(folder / "store")
    ) as client:
        client("secret", "create", "moleforge-endpoint", "MOLEFORGE_API_KEY=open-sesame")
        yield Rehearsed(client, folder / "tiny.yaml")


class Rehearsed:
    """The client with what this module's tests ask of it."""

    def __init__(self, client, config: Path) -> None:
        self.client, self.config, self.volume = client, config, client.volume("moleforge")

    def __call__(self, *args: str, **options) -> str:
        """Run a command."""
        return self.client(*args, **options)

    def run(self, name: str, *options: str, override: str = "", code: int = 0) -> str:
        """Run an entrypoint of the app with the tiny configuration."""
        extra = ("--override", override) if override else ()
        return self.client(
            "run",
            f"modal_app.py::{name}",
            "--config",
            str(self.config),
            *options,
            *extra,
            code=code,
        )


@pytest.fixture(scope="module")
def local(tmp_path_factory, modal):
    """A local run of the same configuration."""
    store = tmp_path_factory.mktemp("local") / "store"
    make_all(modal.config, store)
    return store


def made(store: Path, stage: str) -> dict[str, str]:
    """Return what the artifacts of a stage hold."""
    return {name: digest for name, digest in contents(store).items() if name.startswith(stage)}


def wait_for(true, seconds: float = 300.0) -> None:
    """Wait until something has come true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def prepared(modal):
    """What preprocess printed; one domain's container was taken away, and then the one that had
    handed them out."""
    command = modal.client.start("run", "modal_app.py::preprocess", "--config", str(modal.config))
    try:
        wait_for(lambda: modal.client.preempt("preprocess_job", 0))
        wait_for(lambda: modal.client.preempt("orchestrate", 0))
    finally:
        said, _ = command.communicate(timeout=300)
    assert command.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def trunk(modal, prepared):
    """How often the trunk's container was taken away while it trained, its laptop closed at the
    start."""
    address = stages.address(load(modal.config), "train_shared")
    command = modal.client.start(
        "run", "--detach", "modal_app.py::train_shared", "--config", str(modal.config)
    )
    saved = modal.volume / "resume" / address
    try:
        wait_for(saved.exists)
        os.killpg(
            command.pid, signal.SIGINT
        )  # the laptop closes; nothing here waits for it to have closed
        preempted = _preempted(modal, saved, modal.volume / "artifacts" / address / "manifest.json")
    finally:
        os.killpg(command.pid, signal.SIGINT)
        command.communicate()
    return preempted


def _preempted(modal, saved: Path, whole: Path) -> list[bool]:
    """Take the trunk's container away five times, each after a checkpoint of its own; return which
    ones were there."""
    draw, preempted = random.Random(0), []
    for grace_s in (0, 20, 0, 0, 20):
        before = {path: path.read_text() for path in saved.glob("*/state.json")}
        wait_for(lambda before=before: whole.exists() or _moved(saved, before))
        time.sleep(draw.uniform(0, 0.2))
        taken = modal.client.preempt("train_shared_job", grace_s)
        while not (
            taken or whole.exists()
        ):  # a killed container's last commit may land before the next one is there
            time.sleep(0.05)
            taken = modal.client.preempt("train_shared_job", grace_s)
        preempted.append(taken)
    wait_for(lambda: _is_whole(whole))
    return preempted


def _is_whole(manifest: Path) -> bool:
    """Whether a container's last commit has arrived: who looks into the volume from outside may see
    the manifest before the files that it lists."""
    try:
        files = json.loads(manifest.read_text())["files"]
        return all(
            (manifest.parent / name).stat().st_size == files[name]["bytes"] for name in files
        )
    except (OSError, ValueError):
        return False


def _moved(saved: Path, before: dict[Path, str]) -> bool:
    """Whether a container has published a checkpoint since."""
    try:
        return {path: path.read_text() for path in saved.glob("*/state.json")} != before
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def experts(modal, trunk):
    """What train_experts printed while one of them could not write, and when it could."""
    cause = f"history/{stages.address(load(modal.config), 'train_experts', BROKEN)}.jsonl"
    (modal.config.parent / "empty").write_text("")
    modal("volume", "put", "moleforge", str(modal.config.parent / "empty"), f"{cause}/in-the-way")
    broken = modal.run("train_experts", code=1)
    modal("volume", "rm", "-r", "moleforge", cause)
    return broken, modal.run("train_experts")


@pytest.fixture(scope="module")
def whole(modal, experts):
    """What run_all printed, which had the router and the report to make."""
    return modal.run("run_all")


def test_domains_in_containers_one_of_them_taken_away_are_those_of_a_local_run(
    modal, prepared, local
):
    assert "plan of tiny on Modal" in prepared
    assert "tokens" in prepared
    assert made(modal.volume, "tokenizer") == made(local, "tokenizer") != {}
    assert made(modal.volume, "preprocess") == made(local, "preprocess") != {}


def test_a_closed_laptop_and_five_preemptions_change_nothing(modal, trunk, local):
    assert trunk == [True] * 5
    assert made(modal.volume, "train_shared") == made(local, "train_shared") != {}


def test_one_expert_fails_and_the_others_are_kept(modal, experts):
    broken, again = experts
    assert "1 of 2 jobs of train_experts are finished and kept" in broken
    assert re.search(
        rf"train_experts {BROKEN}: history .* cannot be written: Is a directory", broken
    )
    assert "run again: modal run modal_app.py::train_experts --config" in broken
    assert [name for name in EXPERTS if f"train_experts {name}: made" in again] == [BROKEN]
    assert again.count("found") == 1


def test_experts_side_by_side_are_those_of_a_local_run(modal, experts, local):
    assert made(modal.volume, "train_experts") == made(local, "train_experts") != {}


def test_experts_one_after_another_are_too(modal, experts, local, tmp_path):
    settings = ("expert.steps=7",)
    command = ("run", "modal_app.py::train_experts", "--config", str(modal.config), "--override")
    # Somebody else asks for the same meanwhile
    other = modal.client.start(*command, *settings)
    text = modal.run("train_experts", "--sequential", override=" ".join(settings))
    said, _ = other.communicate(timeout=300)
    assert other.returncode == 0, said
    assert (text + said).count(": made") == 2
    shutil.copytree(local, tmp_path / "store")
    cfg, store = load(modal.config, settings), Store(tmp_path / "store")
    for item in cfg.experts:
        run_job("train_experts", cfg, store, item, progress=lambda _text, _share: None)
        name = f"{stages.address(cfg, 'train_experts', item)}/expert.safetensors"
        assert contents(store.root)[name] == contents(modal.volume)[name]


CLAIMED = """
import json, modal, sys
claims = modal.Dict.from_name("moleforge-claims")
for address in sys.argv[2:]:
    lease = {"token": "x", "by": "another run", "since": "today", "until": float(sys.argv[1])}
    claims.put(f"{address}/0", json.dumps(lease))
"""


def claim(modal, until: float, addresses: list[str]) -> None:
    """Have another run do these jobs until then; 0: it gives them back."""
    command = [sys.executable, "-c", CLAIMED, str(until), *addresses]
    subprocess.run(command, env=modal.client.env, check=True)


def test_an_attempt_that_comes_to_its_limit_is_followed_by_one_that_goes_on(modal, experts):
    settings = "expert.steps=8"
    cfg = load(modal.config, (settings,))
    addresses = [stages.address(cfg, "train_experts", item) for item in EXPERTS]
    # As long as somebody else has them it waits, longer than it may
    claim(modal, time.time() + 600, addresses)
    tasks = modal.client.state / "tasks"
    before = len(list(tasks.iterdir()))
    command = ("run", "modal_app.py::train_experts", "--config", str(modal.config), "--override")
    limited = modal.client.start(*command, f"{settings} modal.attempt_s=15")
    try:
        wait_for(lambda: len(list(tasks.iterdir())) >= before + 2)
        claim(modal, 0, addresses)
    finally:
        said, _ = limited.communicate(timeout=300)
    assert limited.returncode == 0, said
    assert said.count(": made") == len(EXPERTS)
    last = readable_costs(Store(modal.volume))[-1]
    attempts = {row.stage: row.containers for row in last.rows}["conducting"]
    assert attempts >= 2


def test_the_whole_run_is_that_of_a_local_run(modal, whole, local):
    assert "oracle expert" in whole  # the report's tables
    assert contents(local).items() <= contents(modal.volume).items()
    report = f"artifacts/{stages.address(load(modal.config), 'evaluate')}/report.json"
    ours, theirs = (json.loads((root / report).read_text()) for root in (modal.volume, local))
    assert ours["quality"] == theirs["quality"]


def test_what_was_spent_is_on_the_volume_beside_what_was_estimated(modal, whole):
    assert re.search(r"it cost \$\d+\.\d\d of an estimated \$\d", whole)
    rows = {}
    for costs in readable_costs(Store(modal.volume)):
        assert costs.ended
        for row in costs.rows:
            assert row.usd > 0 and row.estimated_usd > 0 and row.seconds > 0
            rows.setdefault(row.stage, []).append(row)
    # Those that were taken away are paid for too, and what handed out the jobs
    assert rows["train_shared"][0].containers > 1
    assert rows["conducting"][0].containers == 2
    assert [row.made for row in rows["train_experts"]].count(False) == 1
    for stage in ("preprocess", "train_experts", "evaluate"):
        for row in rows[stage]:
            assert row.addresses[0].startswith(stage)
    listed = re.sub(r"\s+", " ", modal("run", "modal_app.py::runs"))
    assert "US$" in listed and re.search(r"the volume holds \d\.\d\d GB, at most", listed)


def test_an_expert_from_elsewhere_is_taken_from_the_volume(modal, experts, local, tmp_path):
    """One that was trained on another store, packed there, and put beside the run's results."""
    parts = StoredParts(load(modal.config), Store(local), quiet)
    package = tmp_path / "package"
    package.mkdir()
    pack(parts.cfg, parts, BROKEN, PackWish(), package)
    modal("volume", "put", "moleforge", str(package), "/inputs/")
    there = modal.config.parent / "store/inputs/package"
    told = modal.run("train_experts", override=f"expert.imported.guest={there} router.steps=0")
    assert "train_experts guest: made" in told and told.count("found") == 2
    (guest,) = modal.volume.glob("artifacts/train_experts-guest-*")
    for name in ("expert.safetensors", "expert.json"):
        assert (guest / name).read_bytes() == (package / name).read_bytes()


def test_results_are_fetched_with_the_client(modal, whole, tmp_path):
    address = stages.address(load(modal.config), "train_router")
    assert address in modal("volume", "ls", "moleforge", "artifacts")
    modal(
        "volume",
        "get",
        "moleforge",
        f"artifacts/{address}/router.safetensors",
        str(tmp_path / "router"),
    )
    assert (tmp_path / "router").read_bytes() == (
        modal.volume / f"artifacts/{address}/router.safetensors"
    ).read_bytes()


def test_what_each_function_was_created_with(modal, prepared):
    first, second = modal.client.recorded("train_experts_job")
    assert [f["resources"]["gpu_config"] for f in (first, second)] == [
        {"gpu_type": "H100", "count": 1},
        {"gpu_type": "A100-80GB", "count": 2},
    ]
    assert (first["timeout_secs"], first["retry_policy"]["retries"]) == (7200, 2)
    place = modal.client.env["MOLEFORGE_VOLUME_PATH"]
    for stage in stages.STAGES:
        function = modal.client.recorded(f"{stage}_job")[0]
        assert function["single_use_containers"]
        assert [mount["mount_path"] for mount in function["volume_mounts"]] == [place]
        assert len(function["secret_ids"]) == 1  # the variables of its own
    conductor = modal.client.recorded("orchestrate")[0]
    assert conductor["scheduler_placement"]["nonpreemptible"]
    assert "gpu_config" not in conductor["resources"] or not conductor["resources"]["gpu_config"]


def test_a_run_makes_no_endpoint_and_a_deployment_none_that_is_open_unasked(modal, prepared):
    functions = modal.client.state / "functions"
    assert (functions / "orchestrate.json").exists()
    assert not list(functions.glob("Endpoint*"))
    # The bundle is not made yet, so no note says how it is to be served
    text = re.sub(r"\s+", " ", modal("deploy", "modal_app.py", code=1))
    assert "modal.endpoint_secret=NAME" in text and "modal.endpoint_public=true" in text
    assert "Traceback" not in text
    assert not list(functions.glob("Endpoint*"))


def test_the_image_is_built_from_the_lock_alone(modal, prepared):
    recipes = [path.read_text() for path in (modal.client.state / "images").glob("*.txt")]
    installs = [recipe for recipe in recipes if "uv pip install" in recipe]
    assert all("--require-hashes" in each and "requirements.lock" in each for each in installs)
    assert installs
    assert not any("pipeline" in recipe for recipe in recipes)


def test_what_the_volume_has_comes_to_a_folder_here(modal, whole, tmp_path):
    told = modal.run("history", "--output-dir", str(tmp_path / "out"))
    rows = (tmp_path / "out/rows.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(row)["stage"] for row in rows} >= {"train_shared", "train_experts"}
    page = (tmp_path / "out/history.html").as_uri()
    assert f"next: python3 -m webbrowser {page}" in told
    told = modal.run("evaluate", "--output-dir", str(tmp_path / "out"))
    (report,) = modal.volume.glob("artifacts/evaluate-*/report.json")
    copy = tmp_path / "out" / report.parent.name / "report.json"
    assert copy.read_bytes() == report.read_bytes()
    assert "no run is in progress" in modal.run("status")


@pytest.fixture(scope="module")
def endpoint(modal, whole):
    """The address of the deployed endpoint."""
    modal.run("deploy")
    # What the configuration says of the endpoint stands on the volume, with the bundle
    text = modal("deploy", "modal_app.py")
    yield re.search(r"Endpoint\.web -> (http://\S+)", text.replace("\n", " "))[1]
    modal("app", "stop", "-y", "moleforge")


def ask(url: str, body: dict | None = None, key: str = "open-sesame") -> dict:
    """Return the endpoint's answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:  # noqa: S310
        return json.load(answer)


def test_the_endpoint_writes_and_names_its_experts(endpoint):
    assert ask(f"{endpoint}/readyz") == {"status": "ready"}
    model, *_ = ask(f"{endpoint}/v1/models")["data"]
    assert model["experts"] == list(EXPERTS)
    answer = ask(
        f"{endpoint}/v1/completions", {"prompt": "import os", "max_tokens": 4, "temperature": 0}
    )
    assert answer["usage"]["completion_tokens"] == 4
    route = ask(f"{endpoint}/v1/route", {"text": "import os"})
    assert set(EXPERTS) & set(re.findall(r"\w+", json.dumps(route)))


def test_the_endpoint_wants_its_key(modal, endpoint):
    assert len(modal.client.recorded("Endpoint.*")[0]["secret_ids"]) == 2
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        ask(f"{endpoint}/v1/models", key="wrong")
    refused.value.close()


def test_flags_are_shown_without_a_token(modal):
    env = {name: value for name, value in modal.client.env.items() if not name.startswith("MODAL_")}
    env |= {"MODAL_CONFIG_PATH": modal.client.env["MODAL_CONFIG_PATH"]}
    done = subprocess.run(
        ["modal", "run", "modal_app.py::train_experts", "--help"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        re.search(r"--config TEXT.*", done.stdout)
        and "--sequential / --no-sequential" in done.stdout
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trunk.layerz=3", "trunk.layerz: no such setting"),
        ("modal.train_shared.gpu=[H1OO]", "no such GPU H1OO"),
        ("modal.wandb_secret=absent", "modal secret create absent WANDB_API_KEY=..."),
        ("modal.storage_secret=moleforge-endpoint", "AWS_ACCESS_KEY_ID"),
        ("modal.max_cost_usd=0.01 trunk.steps=30000", "above modal.max_cost_usd 0.01"),
    ],
)
def test_mistakes_end_on_the_laptop(modal, override, said):
    before = (
        len(list((modal.client.state / "tasks").iterdir()))
        if (modal.client.state / "tasks").exists()
        else 0
    )
    text = modal.run("train_shared", override=override, code=1)
    assert said in re.sub(r"\s+", " ", text)
    assert "Traceback" not in text
    assert len(list((modal.client.state / "tasks").glob("*"))) == before


def test_everything_that_was_made_is_some_run_s_and_goes_with_it(modal, whole):
    """Last, as nothing of what this file has made is left after it."""
    runs = sorted(path.stem for path in (modal.volume / "roots").iterdir())
    assert list((modal.volume / "artifacts").iterdir())
    told = modal("run", "modal_app.py::rm", "--run", " ".join(runs), "--yes")
    assert all(f"the root of {run}, removed" in told for run in runs)
    # The endpoint goes on
    served = json.loads((modal.volume / "served.json").read_text())["address"]
    for folder in ("artifacts", "resume", "history", "roots"):
        assert {path.name for path in (modal.volume / folder).glob("*")} <= {served}, folder
