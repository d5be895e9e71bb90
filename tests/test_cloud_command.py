"""A command as it was typed: names of app and volume, what its flags are without being given, which
clients know enough, what is done for dense baselines that nobody has trained, what comes next."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from test_cloud_client import RUN, far

from pipeline import cloud
from pipeline.cloud.inputs import not_on_volume
from pipeline.errors import ConfigError, DataError, MissingArtifact
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import load, parse
from pipeline.run import stages
from pipeline.store.artifacts import Store

ROOT = Path(__file__).parent.parent
PRICES = cloud.Prices.load(ROOT / "config/prices.yaml")


def names(environ: dict, **modal: str) -> tuple[str | None, str | None]:
    """Return what app and volume are called."""
    cfg = cloud.named(FfnMoeConfig(modal=modal), environ).modal
    return cfg.app, cfg.volume


def test_app_and_volume_are_called_by_the_run_the_environment_or_the_program():
    mine = {"MOLEFORGE_APP": "mine", "MOLEFORGE_VOLUME": "ours"}
    assert names({}) == ("moleforge", "moleforge")
    assert names(mine) == ("mine", "ours")
    assert names(mine, volume="theirs") == ("mine", "theirs")
    with pytest.raises(ConfigError, match=r"\$MOLEFORGE_APP: a b is no name"):
        names({"MOLEFORGE_APP": "a b"})


def test_every_message_names_the_volume_that_is_meant(tiny):
    cfg = load(tiny, ("modal.volume=mine", f"trunk.init={tiny.parent}", "dense.baselines=[]"))
    with pytest.raises(ConfigError, match="`modal volume put mine LOCAL /inputs/`"):
        cloud.check(cfg, PRICES, "/store")
    edge = cloud.ModalEdge(Path("/store"), "mine")
    assert "modal volume rm -r mine artifacts/x" in edge.remove(Path("/store/artifacts/x"))
    there = load(tiny, ("modal.volume=mine", "data.files=[{paths: [/store/x/*.txt], domain: sea}]"))
    lacking = not_on_volume(there, "tokenizer", None, "/store", lambda _folder: [])
    assert isinstance(lacking, DataError) and "modal volume put mine" in str(lacking)


def test_containers_build_what_the_laptop_has_settled():
    cfg = FfnMoeConfig(
        modal={"app": "mine", "volume": "ours", "hub_secret": "hub", "endpoint_secret": "key"}
    )
    for serves in (True, False):
        settled = cloud.Wiring.settled(
            cfg, b'{"address": "deploy-1", "sums": "0a"}', serves, PRICES
        )
        assert cloud.Wiring.told(settled.variables) == settled
        assert settled.entered == ("key" if serves else "")
        assert settled.bundle == ("deploy-1@0a" if serves else "")
    assert (settled.app, settled.volume) == ("mine", "ours")
    more = ("rich==1", "x==2")
    assert cloud.Wiring.settled(cfg, None, False, PRICES, more).packages == more
    assert cloud.Wiring.told({}) == cloud.Wiring()


def test_the_default_configuration_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cloud.announced(RUN, {}).name == "demo_from_zero"
    (tmp_path / "config").mkdir()
    (tmp_path / cloud.DEFAULT).write_text("name: own\n")
    assert cloud.announced(RUN, {}).name == "own"


def test_one_gpu_needs_no_brackets():
    assert FfnMoeConfig(modal={"evaluate": {"gpu": "H100:2"}}).modal.evaluate.gpu == ("H100:2",)
    with pytest.raises(ValueError, match="tuple"):
        FfnMoeConfig(modal={"evaluate": {"gpu": 2}})


def test_help_shows_what_every_flag_is_without_being_given():
    import modal_app

    commands = cloud.flags_of(vars(modal_app), modal_app.modal.app.LocalEntrypoint)
    for name, flags in commands.items():
        text = cloud.explain(["modal", "run", f"modal_app.py::{name}", "--help"], commands)
        shown = [line for line in text.splitlines() if line.startswith("  --")]
        told = [line.split()[0].removeprefix("--").replace("-", "_") for line in shown]
        assert told == list(flags)
        for flag, default in flags.items():
            value = str(default).lower() if isinstance(default, bool) else default
            assert default == "" or f"(default: {value})" in " ".join(text.split()), flag
        assert max(map(len, text.splitlines())) <= 100
    assert cloud.explain(RUN, commands) == ""
    everything = cloud.explain(["modal", "run", "modal_app.py", "--help"], commands)
    assert "--damaged" in everything and "--sequential" in everything


@pytest.mark.parametrize("version", ["1.2.6", "0.77.0", "1.0.0.dev3"])
def test_a_client_that_knows_too_little_is_told_what_works(version):
    with pytest.raises(ConfigError, match=rf"is {version}, and modal_app.py needs 1.3 or later"):
        cloud.refuse_client(version)
    for enough in ("1.3.0.post1", "1.6.4", "2.0.0"):
        cloud.refuse_client(enough)


@pytest.fixture
def half(finished, tmp_path):
    """(configuration's path, store) of a run whose report and one of two baselines nobody made."""
    path, store_path = finished
    store = Store(shutil.copytree(store_path, tmp_path / "store"))
    for job in (("evaluate", None), ("train_dense", "path")):
        shutil.rmtree(store.folder(stages.address(load(path), *job)))
    return path, store


def settled(half, how: str, *wanted: str):
    """Return what a command comes to by modal.missing_baselines."""
    cfg = load(half[0], (f"modal.missing_baselines={how}",))
    return cloud.with_baselines(cfg, wanted, half[1])


def test_a_report_makes_the_baselines_that_are_not_there(half):
    cfg, wanted, notes = settled(half, "make", "evaluate")
    assert wanted == ("lr_dense", "train_dense", "evaluate")
    assert "baselines path are trained first" in notes[0] and "total" not in notes[0]
    lines = cloud.estimate(cfg, wanted, half[1], PRICES)
    assert [line.stage for line in lines if line.state == "to do"] == ["train_dense", "evaluate"]
    cloud.refuse_without_inputs(cfg, wanted, half[1])


def test_a_report_leaves_them_out_where_that_is_asked_for(half, tmp_path):
    cfg, wanted, notes = settled(half, "skip", "evaluate")
    assert wanted == ("evaluate",) and cfg.dense.baselines == ("total",)
    assert "without the dense baselines path, which are not trained" in notes[0]
    cloud.refuse_without_inputs(cfg, wanted, half[1])
    # The same report that a run without them has, for its bundle too
    assert stages.address(cfg, "evaluate") == stages.address(
        load(half[0], ("dense.baselines=[total]",)), "evaluate"
    )
    assert settled(half, "skip", "deploy")[0] == cfg
    # but for the one that the bundle is to hold
    held = load(half[0], ("modal.missing_baselines=skip", "deploy.dense=path"))
    assert cloud.with_baselines(held, ("evaluate",), half[1]) == (held, ("evaluate",), [])
    mirror = cloud.mirror(cfg, tmp_path / "mirror", *far(half[1].root))
    assert cloud.with_baselines(cfg, wanted, mirror) == (cfg, wanted, [])


def test_a_report_is_refused_where_that_is_asked_for_and_a_bundle_makes_none(half):
    for how, wanted in (("refuse", "evaluate"), ("make", "deploy")):
        cfg, stages_of_it, notes = settled(half, how, wanted)
        assert (stages_of_it, notes) == ((wanted,), [])
        with pytest.raises(MissingArtifact, match="train_dense path|needs evaluate"):
            cloud.refuse_without_inputs(cfg, stages_of_it, half[1])


def test_what_trains_them_or_reports_nothing_is_left_alone(half, finished):
    for wanted in (("train_dense",), ("train_dense", "evaluate"), ("train_router",)):
        assert settled(half, "skip", *wanted)[1:] == (wanted, [])
    # Nor is a report that is there
    assert settled((half[0], Store(finished[1])), "make", "evaluate")[1:] == (("evaluate",), [])


def test_a_container_plans_what_a_laptop_would(finished, tmp_path):
    path, root = finished
    cfg = cloud.named(load(path, ("router.steps=17",)), {})
    console = Console(width=10_000, file=io.StringIO(), record=True)
    store = cloud.FarStore(*far(root), str(root), tmp_path)
    here = cloud.planned_run(cloud.Wish(cfg, stages.RUN), PRICES, store, console)
    raw = cfg.model_dump(mode="json")
    asked = (raw, stages.RUN, False, False, PRICES, root)
    there = cloud.planned_there(*asked, planning_s=cloud.not_paid_for)
    assert (there.printed, there.wrong) == (console.export_text(), "")
    assert (parse(there.raw), there.stages) == (here.cfg, here.stages)
    assert "plan of tiny on Modal" in there.printed
    # It is paid for itself
    paid = cloud.planned_there(*asked, planning_s=lambda: 100.0)
    assert "and $0.0026 for the container that made this plan" in paid.printed
    assert paid.expected.planning_s == 100.0
    other = load(path, ("trunk.steps=41",)).model_dump(mode="json")
    refused = cloud.planned_there(other, ("train_experts",), False, False, PRICES, root)
    assert "needs train_shared" in refused.wrong and "::train_shared" in refused.wrong
    assert "plan of tiny on Modal" in refused.printed
