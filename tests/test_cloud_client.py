"""What happens where a command is typed: which configuration it means, what is refused, what a run
is said to cost."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config
from rich.console import Console

from pipeline import cloud
from pipeline.cloud.estimate import STARTUP_S
from pipeline.config.machines import MachineConfig, TrainerConfig, WorkerConfig
from pipeline.errors import ConfigError, MissingArtifact
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import describes_run, load
from pipeline.run import stages
from pipeline.store.artifacts import Store
from pipeline.store.manifest import INDENT
from pipeline.store.reading import sealed

ROOT = Path(__file__).parent.parent
PRICES = cloud.Prices.load(ROOT / "config/prices.yaml")
RUN = ["modal", "run", "modal_app.py::train_shared"]


def changed(**modal) -> FfnMoeConfig:
    """Return the defaults with other settings of the modal section."""
    return FfnMoeConfig.model_validate({"modal": modal})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a configuration in it, entered."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    return tmp_path


@pytest.mark.parametrize(
    "typed",
    [
        ["--config", "mine.yaml"],
        ["--config=mine.yaml"],
        ["--detach", "--config", "other.yaml", "--config", "mine.yaml"],
    ],
)
def test_a_command_names_its_configuration(here, typed):
    assert cloud.announced([*RUN, *typed], {"MOLEFORGE_CONFIG": "other.yaml"}).name == "mine"


def test_without_a_name_it_is_the_demo_from_zero(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cloud.announced(RUN, {}).name == "demo_from_zero"


def test_overrides_of_a_command(here):
    settings = "trunk.steps=9 expert.steps=7 trunk.domains='[python, manual]'"
    cfg = cloud.announced([*RUN, "--config", "mine.yaml", "--override", settings], {})
    assert cfg.expert.steps == 7
    assert cfg.trunk.domains == ("python", "manual")


def test_two_overrides_are_refused_because_modal_drops_the_first(here):
    with pytest.raises(ConfigError, match=r"--override 'seed=1 seed=2'"):
        cloud.announced(
            [*RUN, "--config", "mine.yaml", "--override", "seed=1", "--override=seed=2"], {}
        )


def test_quotes_that_do_not_pair(here):
    with pytest.raises(ConfigError, match="No closing quotation"):
        cloud.announced([*RUN, "--config", "mine.yaml", "--override", "name='x"], {})


def test_a_deployment_takes_its_configuration_from_the_environment(here):
    assert (
        cloud.announced(["modal", "deploy", "modal_app.py"], {"MOLEFORGE_CONFIG": "mine.yaml"}).name
        == "mine"
    )
    defaults = cloud.named(FfnMoeConfig(), {})
    assert cloud.announced(["modal", "deploy", "modal_app.py"], {}) == defaults
    assert cloud.announced(["pytest", "run", "--config", "absent.yaml"], {}) == defaults


def test_help_needs_no_configuration(here):
    defaults = cloud.named(FfnMoeConfig(), {})
    assert cloud.announced([*RUN, "--config", "absent.yaml", "--help"], {}) == defaults
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        cloud.announced([*RUN, "--config", "absent.yaml"], {})


def test_every_shipped_configuration_can_run(here):
    shipped = list(filter(describes_run, (ROOT / "config").glob("*.yaml")))
    assert len(shipped) >= 4
    for path in shipped:
        cloud.check(load(path), PRICES, "/store")


@pytest.mark.parametrize(
    ("gpu", "problem"),
    [
        ("H1OO", "no such GPU H1OO"),
        ("H100:9", "asks for 9 of 1 to 8"),
        ("L4:0", "asks for 0"),
        ("L4:x", "asks for 0"),
    ],
)
def test_gpus_that_modal_does_not_have(gpu, problem):
    with pytest.raises(ConfigError, match=problem):
        cloud.check(changed(train_router={"gpu": [gpu]}, max_gpus=9), PRICES, "/store")


def test_gpus_as_people_write_them():
    cfg = changed(train_router={"gpu": ["h100!", "a100-80gb:2"]})
    cloud.check(cfg, PRICES, "/store")
    assert cloud.most_gpus(cfg.modal.train_router) == 2


def test_more_gpus_than_the_limit():
    with pytest.raises(
        ConfigError, match=r"modal.train_shared.gpu: 4 GPUs, but modal.max_gpus is 2"
    ):
        cloud.check(changed(train_shared={"gpu": ["H100:4"]}, max_gpus=2), PRICES, "/store")


def test_all_problems_are_told_at_once(tmp_path):
    (tmp_path / "model").mkdir()
    cfg = FfnMoeConfig.model_validate(
        {
            "data": {
                "source": "files",
                "files": [{"paths": ["/home/a.txt", "s3://b/c.txt", "/store/inputs/d.txt"]}],
            },
            "trunk": {"init": str(tmp_path / "model"), "steps": 1},
            "tokenizer": {"pretrained": "Qwen/Qwen3-0.6B-Base"},
            "dense": {"baselines": []},
            "deploy": {"upload": "file:///bundles"},
            "runtime": {"wandb": "online", "save_every_s": 3600},
            "modal": {"evaluate": {"gpu": ["K80"]}},
        }
    )
    with pytest.raises(ConfigError) as error:
        cloud.check(cfg, PRICES, "/store")
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "modal.evaluate.gpu",
        "data.files",
        "trunk.init",
        "deploy.upload",
        "runtime.save_every_s",
        "runtime.wandb",
    ]
    assert "modal volume put moleforge" in lines[1]
    assert "modal secret create NAME WANDB_API_KEY" in lines[-1]


def test_the_price_of_a_container():
    machine = MachineConfig(gpu=("A100-40GB", "H100:2"), cpu=4, memory_mb=2048)
    usd_per_h = 3600 * PRICES.usd_per_s(machine)
    # With the dearest GPU that it may get
    assert usd_per_h == pytest.approx(2 * 3.9492 + 4 * 0.04716 + 2 * 0.007992, rel=1e-4)
    assert PRICES.usd_per_s(WorkerConfig(cpu=1, memory_mb=1024)) == pytest.approx(
        0.0000131 + 0.00000222
    )


def test_a_price_table_that_is_none(tmp_path):
    path = tmp_path / "prices.yaml"
    for text in ("gpus: {H100: {usd: 1}}", "[]", "a: b: c", "checked: today"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not a price table"):
            cloud.Prices.load(path)


def far(store: Path):
    """Return what lists and reads a store as the client does a volume."""

    def names(folder):
        return [p.name for p in (store / folder).iterdir()] if (store / folder).exists() else []

    def read(path):
        return (store / path).read_bytes() if (store / path).exists() else None

    return names, read


def test_a_mirror_holds_the_manifests_of_this_run_and_no_more(finished, tmp_path):
    path, store = finished
    cfg = load(path)
    shutil.copytree(store, tmp_path / "far")
    address = stages.address(cfg, "train_router")
    (tmp_path / f"far/artifacts/{address}/manifest.json").unlink()
    (tmp_path / f"far/resume/{address}/b").mkdir(parents=True)
    (tmp_path / f"far/resume/{address}/b/state.json").write_text(sealed({"run": {"step": 7}}))
    (tmp_path / "far/artifacts/train_router-of-another-run").mkdir()
    mirror = cloud.mirror(cfg, tmp_path / "near", *far(tmp_path / "far"))
    assert {p.name for p in mirror.root.rglob("*") if p.is_file()} == {
        "manifest.json",
        "state.json",
    }
    lines = {line.stage: line for line in cloud.estimate(cfg, stages.RUN, mirror, PRICES)}
    assert (lines["train_shared"].state, lines["train_router"].state) == ("done", "at step 7")
    assert lines["train_shared"].usd == 0.0
    assert lines["train_router"].usd > 0


def test_nothing_is_there_at_first(tmp_path):
    cfg = load(tiny_config(tmp_path / "tiny"))
    mirror = cloud.mirror(cfg, tmp_path / "near", *far(tmp_path / "absent"))
    lines = cloud.estimate(cfg, (*stages.RUN, "deploy"), mirror, PRICES)
    assert {line.state for line in lines} == {"to do"}
    assert len(lines) == len(
        [1 for stage in (*stages.RUN, "deploy") for _ in stages.jobs(cfg, stage)]
    )


def test_time_and_cost_follow_from_operations_and_price(tmp_path):
    cfg = load(
        tiny_config(tmp_path / "tiny"), ("trunk.steps=1000000", "modal.train_shared.gpu=[H100]")
    )
    [line] = cloud.estimate(cfg, ("train_shared",), Store(tmp_path / "none"), PRICES)
    other = load(
        tiny_config(tmp_path / "tiny"), ("trunk.steps=1000000", "modal.train_shared.gpu=[T4]")
    )
    [slow] = cloud.estimate(other, ("train_shared",), Store(tmp_path / "none"), PRICES)
    assert line.tokens == 1_000_000 * 8 * 32
    assert (slow.seconds - STARTUP_S) / (line.seconds - STARTUP_S) == pytest.approx(989 / 8)
    assert line.usd == pytest.approx(line.seconds * PRICES.usd_per_s(cfg.modal.train_shared))


def test_a_limit_on_the_cost_refuses_a_model_whose_sizes_nobody_knows_here(tmp_path):
    there = ("trunk.init=/store/inputs/model", "tokenizer.pretrained=/store/inputs/model")
    given = (*there, "dense.baselines=[]", "modal.max_cost_usd=1000")
    cfg = load(tiny_config(tmp_path / "tiny"), given)
    lines = cloud.estimate(cfg, stages.RUN, Store(tmp_path / "none"), PRICES)
    unknown = [line.stage for line in lines if line.unknown]
    assert unknown == ["train_shared", *["train_experts"] * len(cfg.experts), "train_router"]
    with pytest.raises(ConfigError, match=r"trunk\.init .* are not known on this machine"):
        cloud.refuse_above(cfg, lines, PRICES, False)
    without = load(tiny_config(tmp_path / "tiny"), given[:-1])
    cloud.refuse_above(without, lines, PRICES, False)


def test_finished_jobs_on_the_same_kind_of_machine_are_the_measure(finished, tmp_path):
    path, store = finished
    shutil.copytree(store, tmp_path / "store")
    cfg = load(path, ("router.steps=100000",))
    for manifest in (tmp_path / "store/artifacts").glob("*/manifest.json"):
        raw = json.loads(manifest.read_text())
        if "tokens_per_s" in raw["metrics"]:
            # each 1 TFLOP/s, at its own size
            tokens_per_s = 1e12 / raw["metrics"]["flops_per_token"]
            raw["metrics"] |= {"tokens_per_s": tokens_per_s, "training_s": 60.0}
            raw["metrics"]["first_step_s"] = 0.0
            raw["made"]["machine"] |= {"gpu": "NVIDIA L40S"}
        raw.pop("checksum")
        manifest.write_text(sealed(raw, INDENT))
    [line] = cloud.estimate(cfg, ("train_router",), Store(tmp_path / "store"), PRICES)
    on_h100 = cfg.model_copy(
        update={
            "modal": cfg.modal.model_copy(update={"train_router": TrainerConfig(gpu=("H100",))})
        }
    )
    [other] = cloud.estimate(on_h100, ("train_router",), Store(tmp_path / "store"), PRICES)
    assert (line.seconds - STARTUP_S) / (other.seconds - STARTUP_S) == pytest.approx(0.3 * 989)


def test_a_command_whose_inputs_are_not_there_is_refused_before_anything_is_rented(
    finished, tmp_path
):
    path, store = finished
    cfg, other = load(path), load(path, ("trunk.steps=41",))
    cloud.refuse_without_inputs(cfg, ("train_experts",), Store(store))
    cloud.refuse_without_inputs(other, stages.RUN, Store(tmp_path / "none"))
    with pytest.raises(
        MissingArtifact,
        match=r"needs train_shared of.*`modal run modal_app.py::train_shared` first",
    ):
        cloud.refuse_without_inputs(other, ("train_experts",), Store(store))
    with pytest.raises(
        MissingArtifact,
        match=r"train_router needs preprocess sea, preprocess shop, preprocess hall, train_shared",
    ):
        cloud.refuse_without_inputs(cfg, ("train_router",), Store(tmp_path / "none"))


def test_a_command_above_the_limit_is_refused(tmp_path):
    cfg = load(tiny_config(tmp_path / "tiny"), ("trunk.steps=10000000000", "modal.max_cost_usd=1"))
    lines = cloud.estimate(cfg, ("train_shared",), Store(tmp_path / "none"), PRICES)
    with pytest.raises(
        ConfigError,
        match=r"estimated at \$[0-9.]+, above modal.max_cost_usd 1.00.*no job was started",
    ):
        cloud.refuse_above(cfg, lines, PRICES, False)
    cloud.refuse_above(cfg, lines[:0], PRICES, False)
    free = load(tiny_config(tmp_path / "tiny"), ("trunk.steps=10000000000",))
    lines = cloud.estimate(free, ("train_shared",), Store(tmp_path / "none"), PRICES)
    cloud.refuse_above(free, lines, PRICES, False)


def test_under_a_limit_what_cannot_be_priced_is_refused(tmp_path):
    cfg = load(tiny_config(tmp_path / "tiny"), ("trunk.epochs=2", "modal.max_cost_usd=1000"))
    lines = cloud.estimate(cfg, ("train_shared",), Store(tmp_path / "none"), PRICES)
    with pytest.raises(ConfigError, match="run preprocess first"):
        cloud.refuse_above(cfg, lines, PRICES, False)


def shown(cfg, wanted, store, sequential=False) -> str:
    """Return the plan as printed."""
    console = Console(width=160, file=io.StringIO(), record=True)
    cloud.show_estimate(
        cfg, cloud.estimate(cfg, wanted, store, PRICES), PRICES, sequential, console
    )
    return console.export_text()


def test_the_plan_says_where_and_what_it_costs(tmp_path):
    cfg = load(
        tiny_config(tmp_path / "tiny"), ("expert.epochs=2", "modal.train_shared.gpu=[H100, A100]")
    )
    text = shown(cfg, stages.RUN, Store(tmp_path / "none"))
    assert "H100 or A100" in text and "8 cores" in text
    assert "after preprocess" in text and "at least $" in text
    assert "prices of 2026" in text
    [line] = cloud.estimate(cfg, ("train_shared",), Store(tmp_path / "none"), PRICES)
    assert f" {line.peak_bytes / 1e6:,.0f} MB " in text and line.peak_bytes > 0


def test_side_by_side_is_shorter_than_one_after_another(tmp_path):
    cfg = load(tiny_config(tmp_path / "tiny"), ("expert.steps=10",))
    fanned = shown(cfg, ("train_experts",), Store(tmp_path / "none"))
    assert "in all: 60 s" in fanned
    assert "in all: 3 min" in shown(
        cfg, ("train_experts",), Store(tmp_path / "none"), sequential=True
    )
    one = load(tiny_config(tmp_path / "tiny"), ("expert.steps=10", "modal.max_gpus=1"))
    assert "in all: 3 min" in shown(one, ("train_experts",), Store(tmp_path / "none"))


def test_results_are_shown_with_failures_in_place():
    results = [
        cloud.JobResult(
            "train_experts",
            "sea",
            "train_experts-sea-1",
            "found",
            "",
            2_500_000,
            61.0,
            {"steps": 9, "valid_nats": 1.25, "tokens_per_s": 1234.5, "tokens": 4},
        ),
        cloud.JobResult("train_experts", "hall", "train_experts-hall-2", "failed", "loss is nan"),
    ]
    console = Console(width=160, file=io.StringIO(), record=True)
    cloud.show_results(results, console)
    text = console.export_text()
    assert "2.5" in text and "9 steps, valid 1.250 nats" in text
    assert "failed" in text and "loss is nan" in text


def test_the_report_is_printed_from_the_far_store(finished, capsys):
    path, store = finished
    cfg = load(path)
    result = cloud.JobResult("evaluate", None, stages.address(cfg, "evaluate"), "made")
    cloud.show_report([result], far(store)[1], Console(width=120))
    assert "oracle expert" in (alone := capsys.readouterr().out) and "before" not in alone
    # Its own figures in the place of those of another run
    copied, torn = ("evaluate-0123456789ab", "evaluate-ba9876543210")
    folder = Store(store).folder(result.address)
    shutil.copytree(folder, folder.with_name(copied))
    folder.with_name(torn).mkdir()
    (folder.with_name(torn) / "report.json").write_text("{")
    try:
        for former, compared in ((copied, True), (torn, False)):
            shown = replace(result, former=former)
            cloud.show_report([shown], far(store)[1], Console(width=120))
            text = capsys.readouterr().out
            assert "oracle expert" in text and ("difference" in text) == compared
    finally:
        for name in (copied, torn):
            shutil.rmtree(folder.with_name(name))
