"""Commands of Modal from what is typed to what comes next, with machines elsewhere that a test
plays."""

import shlex
from pathlib import Path

import pytest
import yaml
from test_cloud_client import far

from pipeline import cloud
from pipeline.errors import ConfigError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import load, parse
from pipeline.report.schema.experiments import ExperimentResults, TrialRun
from tests.small_experiments import summed

ROOT = Path(__file__).parent.parent
PRICES = ROOT / "config/prices.yaml"
APP = "/there/modal_app.py"


class FakeFar:
    """Machines that come to what a test says; what they were asked for is kept."""

    mount = "/store"

    def __init__(self, root: Path, **comes):
        self.names, self.read = far(root)
        self.comes, self.asked, self.copied = comes, [], []
        self.deployed = True

    def begin(self, function, *given):
        self.asked.append((function, *given))
        return self

    def get(self, timeout=None):
        came = self.comes[self.asked[-1][0]]
        if isinstance(came, list) and came and came[0] is TimeoutError:
            raise came.pop(0)
        if isinstance(came, Exception):
            raise came
        return came

    def stored_bytes(self):
        return 5 * 10**9

    def is_alive(self, _run, _addresses):
        return True

    def is_deployed(self):
        return self.deployed

    def deploy(self, environ):
        self.environ = environ
        return 0

    def copy(self, path, folder):
        self.copied.append((path, folder))


def commands(far, *words, environ=(), **modal):
    """Return the commands of an app for what was typed."""
    argv = ["modal", "run", "--env", "dev", *words]
    cfg = cloud.named(FfnMoeConfig(modal=modal), dict(environ))
    return cloud.Commands(far, cfg, PRICES, argv, dict(environ))


def last(capsys) -> list[str]:
    """Return the words of what is to be typed next, which stand in the last line."""
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("next: "), line
    return shlex.split(line)[1:]


def made(*stages):
    return [cloud.JobResult(stage, None, f"{stage}-1", "made") for stage in stages]


@pytest.fixture
def run(finished, tmp_path):
    """(words that name a run's configuration, a far side where nothing is missing)."""
    return ["--config", str(finished[0])], FakeFar(finished[1])


def test_a_stage_ends_with_the_next_one_as_it_was_typed(run, capsys):
    words, there = run
    there.comes["orchestrate"] = made("train_shared")
    typed = [f"{APP}::train_shared", *words, "--override", "seed=0"]
    given = cloud.Given(words[1], "seed=0")
    commands(there, *typed).do(("train_shared",), given)
    modal = ["modal", "run", "--env", "dev"]
    # A rate that is a number is searched by nobody
    following = f"{APP}::train_experts"
    assert last(capsys) == [*modal, following, *words, "--override", "seed=0"]
    function, raw, stages, _, command, frozen, _, _ = there.asked[0]
    assert (function, stages, frozen) == ("orchestrate", ["train_shared"], False)
    assert command == shlex.join(["modal", "run", "--env", "dev", *typed])
    assert parse(raw).name == "tiny"


@pytest.mark.parametrize(
    ("stages", "modal", "following"),
    [
        (("evaluate",), {}, ["deploy", "modal.endpoint_secret=NAME"]),
        (("train_dense", "evaluate"), {"endpoint_secret": "my-key"}, ["deploy"]),
        (("deploy",), {}, []),
    ],
)
def test_a_report_is_followed_by_the_bundle_and_that_by_what_serves_it(stages, modal, following):
    cfg = FfnMoeConfig(modal=modal)
    given = cloud.Given("mine.yaml")
    typed = cloud.Typed(("modal", "run", f"{APP}::x"))
    said = shlex.split(cloud.after_stages(typed, cfg, stages, given, {}))
    if not following:
        assert said == ["modal", "deploy", "modal_app.py"]
        return
    name, *changes = following
    override = ["--override", *changes] if changes else []
    assert said == ["modal", "run", f"{APP}::{name}", "--config", "mine.yaml", *override]


def test_a_deployment_is_told_only_the_names_that_the_environment_has_otherwise():
    section = FfnMoeConfig(modal={"app": "mine", "volume": "ours"}).modal
    environ = {"MOLEFORGE_APP": "mine", "MOLEFORGE_VOLUME": "theirs"}
    assert cloud.deploying(section, environ) == "MOLEFORGE_VOLUME=ours modal deploy modal_app.py"


def test_a_run_that_is_lost_is_told_with_what_finishes_it(run):
    words, there = run
    there.comes["orchestrate"] = cloud.FarError("FunctionTimeoutError: hit its timeout of 86400s")
    typed = commands(there, "modal_app.py::tokenizer", *words)
    with pytest.raises(
        SystemExit, match=r"86400s; what is finished is kept.*: modal run --env dev"
    ):
        typed.do(("tokenizer",), cloud.Given(words[1]))
    there.comes["tend"] = cloud.FarError("ConnectionError: down")
    with pytest.raises(SystemExit, match="down; the same command goes on from there"):
        typed.runs()


def test_who_waits_is_told_how_far_the_run_is(run, capsys, monkeypatch):
    words, there = run
    told = iter(["1 of 9 jobs done", "5 of 9 jobs done"])

    class Followed:
        def __init__(self, run, *_how):
            assert run == "tiny"

        def tell(self, console):
            console.print(next(told))

    monkeypatch.setattr("pipeline.cloud.commands.Following", Followed)
    there.comes["orchestrate"] = [TimeoutError, TimeoutError, *made("tokenizer")]
    commands(there, "modal_app.py::tokenizer", *words).do(("tokenizer",), cloud.Given(words[1]))
    printed = capsys.readouterr().out
    assert printed.index("1 of 9 jobs") < printed.index("5 of 9 jobs") < printed.index("results")


def test_flags_that_stand_for_settings_are_in_the_plan_and_in_what_comes_next(run, capsys):
    words, there = run
    there.comes["orchestrate"] = made("tokenizer")
    short = ["--input", "/store/a/*.jsonl s3://b/c.txt", "--bucket", "texts"]
    command = commands(there, "modal_app.py::tokenizer", *words, *short)
    given = cloud.Given.of([*words, *short])
    folders = {".": ["a"]}
    there.names = lambda folder: folders.get(folder, [])
    with pytest.raises(SystemExit, match=r"not on the volume: .*/store/a/\*.jsonl"):
        command.do(("tokenizer",), given)
    folders["a"] = ["x.jsonl"]
    command.do(("tokenizer",), given)
    cfg = parse(there.asked[0][1])
    assert [each.paths for each in cfg.data.files] == [("/store/a/*.jsonl", "s3://b/c.txt")]
    assert cfg.modal.bucket == "texts"
    # What is kept of the run names its settings, as the flags are the laptop's
    spelled = cloud.Given.of(shlex.split(there.asked[0][4])[2:])
    assert spelled.input == spelled.bucket == ""
    assert load(spelled.path, spelled.changes()).data == cfg.data
    following = last(capsys)
    assert following[4] == "modal_app.py::preprocess"
    assert cloud.Given.of(following).changes() == spelled.changes()


def test_a_checkpoint_takes_the_place_of_the_model_that_was_named():
    path = str(ROOT / "config/qwen3_8b.yaml")
    cfg = load(path, cloud.Given(path, checkpoint="/store/inputs/mine").changes())
    for named in (cfg.trunk.init, cfg.tokenizer.pretrained):
        assert named == "/store/inputs/mine"
    assert cfg.trunk.revision is cfg.tokenizer.revision is None
    # What is written out is meant more than what a flag stands for
    both = cloud.Given(path, "trunk.init=/store/other", checkpoint="/store/inputs/mine")
    assert load(path, both.changes()).trunk.init == "/store/other"
    tasks = str(ROOT / "config/tiny_vlm.yaml")
    other = load(tasks, cloud.Given(tasks, checkpoint="/store/vlm").changes())
    assert (other.loras.base.model, other.loras.base.build) == ("/store/vlm", None)
    with pytest.raises(ConfigError, match="--input: .* says it for each task by itself"):
        cloud.Given(tasks, input="/store/x").changes()


@pytest.mark.parametrize("config", ["demo_from_zero.yaml", "tiny_vlm.yaml"])
def test_a_smoke_test_is_a_report_of_its_own_on_less(config):
    path = str(ROOT / "config" / config)
    full = load(path)
    small = load(path, cloud.Given(path, smoke=True).changes())
    assert small.evaluate != full.evaluate
    same = small.model_copy(update={"evaluate": full.evaluate})
    assert same == full


def test_test_reports_on_what_is_there_and_leads_to_the_whole_report(run, capsys, tmp_path):
    words, there = run
    there.comes["orchestrate"] = made("evaluate")
    command = commands(there, "modal_app.py::test", *words)
    command.test(config=words[1], override="seed=0", output_dir=str(tmp_path / "out"))
    cfg = parse(there.asked[0][1])
    assert there.asked[0][2] == ["evaluate"]
    assert cfg.evaluate.tokens_per_domain == 512 and cfg.modal.missing_baselines == "skip"
    assert there.copied == [("artifacts/evaluate-1", tmp_path / "out")]
    following = last(capsys)
    assert following[4:] == ["modal_app.py::evaluate", *words, "--override", "seed=0"]


@pytest.mark.parametrize(
    ("command", "tended", "following"),
    [
        ("runs", cloud.Tended(next=("history", "--run", "a b")), ["history", "--run", "a b"]),
        ("versions", cloud.Tended(serves=True), None),
        ("prune", cloud.Tended(next=("prune", "--yes")), ["prune", "--yes"]),
    ],
)
def test_what_a_container_has_shown_is_followed_by_what_it_says(
    command, tended, following, tmp_path, capsys
):
    there = FakeFar(tmp_path, tend=tended)
    getattr(commands(there, f"{APP}::{command}", volume="ours"), command)()
    if following is None:
        assert last(capsys)[:1] == ["MOLEFORGE_VOLUME=ours"]
        return
    name, *words = following
    assert last(capsys) == ["modal", "run", "--env", "dev", f"{APP}::{name}", *words]


def test_what_was_done_on_the_volume_is_told_with_what_its_container_cost(tmp_path, capsys):
    there = FakeFar(tmp_path, tend=cloud.Tended(seconds=100.0))
    commands(there, f"{APP}::prune").prune()
    said = capsys.readouterr().out
    assert "the container that did this cost $0.0026 in 100 s (prices of 2026-10-04" in said


def test_a_plan_tells_of_a_gpu_that_wants_another_cuda_where_it_is_used(run, capsys):
    words, there = run
    there.comes["orchestrate"] = made("tokenizer")
    given = cloud.Given(words[1], "modal.train_shared.gpu=B300")
    for stage, times in (("tokenizer", 0), ("train_shared", 1)):
        argv = ["modal", "run", f"{APP}::{stage}", *words]
        cfg = cloud.named(FfnMoeConfig(), {})
        cloud.Commands(there, cfg, PRICES, argv, {}, "13.0").do((stage,), given)
        assert capsys.readouterr().out.count("wants CUDA 13.1 by Modal's guide") == times


def test_a_former_bundle_is_deployed_where_an_endpoint_is(tmp_path, capsys):
    there = FakeFar(tmp_path, tend=cloud.Tended())
    with pytest.raises(SystemExit) as ended:
        commands(there, "modal_app.py::rollback").rollback()
    assert ended.value.code == 0
    there.deployed = False
    commands(there, "modal_app.py::rollback").rollback(to="deploy-1")
    assert there.asked[-1] == ("tend", "rollback", ["deploy-1"], {})
    assert last(capsys) == ["modal", "deploy", "modal_app.py"]


def test_what_a_run_ends_in_is_deployed_as_that_run_says(run):
    words, there = run
    there.comes["orchestrate"] = made("deploy")
    environ = {"MOLEFORGE_CONFIG": "another.yaml", "MODAL_PROFILE": "ours"}
    typed = commands(there, "modal_app.py::run_all", *words, environ=environ)
    given = cloud.Given(words[1], "modal.endpoint_public=true")
    with pytest.raises(SystemExit) as ended:
        typed.do((), given, deploy=True)
    assert ended.value.code == 0
    assert there.environ == {"MODAL_PROFILE": "ours"}
    # A rollback deploys again what a plain `modal deploy` has deployed
    there.comes["tend"] = cloud.Tended()
    with pytest.raises(SystemExit):
        typed.rollback()
    assert there.environ == environ


def test_histories_are_written_where_they_were_asked_for(tmp_path, capsys):
    files = {"history.html": b"<p>", "rows.jsonl": b"{}"}
    there = FakeFar(tmp_path, tend=cloud.Tended("one run\n", files=files))
    command = commands(there, "modal_app.py::history")
    command.history(run="tiny other-*", last=3, output_dir=str(tmp_path / "x y"))
    assert there.asked == [("tend", "history", ["tiny", "other-*"], {"last": 3})]
    assert {path.name: path.read_bytes() for path in (tmp_path / "x y").iterdir()} == files
    page = (tmp_path / "x y/history.html").as_uri()
    assert last(capsys) == ["python3", "-m", "webbrowser", page]


def test_experiments_are_planned_by_a_container_where_there_is_no_torch(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "base.yaml").write_text("name: base\n")
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", "trials": {"a": {"makes": "stack"}}}))
    sweep = cloud.FarSweep("some", str(file), {}, {})
    refused = cloud.FarSweepPlan("the plan\n", "too dear", sweep, None)
    there = FakeFar(tmp_path, plan_sweep=refused)
    monkeypatch.setattr("pipeline.cloud.commands.plans_here", lambda: False)
    command = commands(there, "modal_app.py::experiments", "--config", str(file))
    with pytest.raises(SystemExit, match="error: too dear"):
        command.experiments(config=str(file))
    assert "the plan" in capsys.readouterr().out
    [(function, wish, raw, prices)] = there.asked
    assert function == "plan_sweep" and wish.name == "some"
    assert parse(raw) == command.cfg and prices == cloud.Prices.load(PRICES)
    assert list(wish.experiments.settings.trials) == ["a"]


def test_trials_that_failed_on_modal_are_named_at_the_end(tmp_path, capsys, monkeypatch):
    (tmp_path / "base.yaml").write_text("name: base\n")
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", "trials": {"a": {"makes": "stack"}}}))
    run = TrialRun(seed=1, state="failed", address="x", error="no room")
    trial = summed("a").model_copy(update={"runs": (run,)})
    results = ExperimentResults(experiments="some", trials=(trial,)).to_json()
    sweep = cloud.FarSweep("some", str(file), {}, {})
    answer = cloud.FarSweepPlan("", "", sweep, None)
    there = FakeFar(tmp_path, plan_sweep=answer, conduct=(results, ""))
    monkeypatch.setattr("pipeline.cloud.commands.plans_here", lambda: False)
    command = commands(there, "modal_app.py::experiments", "--config", str(file))
    with pytest.raises(SystemExit, match=r"error: 1 of 1 trials failed(?s:.*)a seed 1: no room"):
        command.experiments(config=str(file), output_dir=str(tmp_path / "to"))
    # What there is of the others is shown and copied before
    assert there.copied == [("experiments/some", tmp_path / "to")]
    # Of a text that is only counted nothing was to be trained
    command.experiments(config=str(file), text_only=True)
