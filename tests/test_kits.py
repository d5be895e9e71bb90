"""A kit goes out, an expert comes back: trained on text that nobody else sees, over the trunk that
all share, and joined with the others.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.__main__ import main
from pipeline.families.load import load
from pipeline.hardware import native_dtype
from pipeline.run.stages import address
from pipeline.store.artifacts import Store, inventory
from tests import small_kits
from tests.small_kits import GUESTS, PACKAGE, done

ROOT = Path(__file__).parent.parent

SHORT = ["--override", "expert.steps=4", "--override", "partition.min_tokens=100"]
SHORT += ["--override", "runtime.threads=1"]


@pytest.fixture(scope="module")
def maker(finished, tmp_path_factory):
    """(configuration, store) of the run that hands kits out."""
    config, store = finished
    return config, Path(shutil.copytree(store, tmp_path_factory.mktemp("maker") / "store"))


@pytest.fixture(scope="module")
def guests(maker, tmp_path_factory):
    """Packages by name, each trained from a kit of its own in a store of its own."""
    return small_kits.guests(*maker, tmp_path_factory.mktemp("guests"), *SHORT)


def test_two_kits_on_two_stores_join_in_a_third(maker, guests, tmp_path, capsys):
    config, store = maker
    joined = tmp_path / "joined.yaml"
    joined.write_text(f"extends: {config}\nrouter: {{steps: 0}}\ndense: {{baselines: []}}\n")
    before = inventory(store / "artifacts")
    # Both are in the file before anything is made
    for name, more in {"ledger": ["--modal"], "harbour": []}.items():
        done("add", name, "--config", joined, "--expert", guests[name], "--store", store, *more)
    after = inventory(store / "artifacts")
    # Nothing that was there was made again
    assert {name: after.get(name) for name in before} == before
    cfg = load(joined)
    made = {name.split("/")[0] for name in after.keys() - before.keys()}
    stages = {"train_experts": GUESTS, "train_router": [None], "evaluate": [None]}
    assert made == {address(cfg, stage, item) for stage in stages for item in stages[stage]}
    report = json.loads((Store(store).folder(address(cfg, "evaluate")) / "report.json").read_text())
    assert report["experts"] == ["sea", "shop", "hall", *GUESTS]
    assert report["domains"] == ["sea", "shop", "hall"]
    assert set(GUESTS) <= {row["name"] for row in report["quality"]}
    for name, path in guests.items():
        folder = Store(store).folder(address(cfg, "train_experts", name))
        given, packed = (load_file(at / "expert.safetensors") for at in (folder, path))
        assert all((given[key] == packed[key]).all() for key in packed)


def test_a_kit_holds_no_text_of_its_run_and_a_package_none_of_its_own(maker, guests):
    home = guests["ledger"].parent
    kit = {path.relative_to(home / "kit").as_posix() for path in (home / "kit").rglob("*")}
    assert kit == {
        *("README.md", "kit.json", "expert.yaml", "centre.safetensors", "tokenizer", "trunk"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *("trunk/config.json", "trunk/model.safetensors"),
    }
    assert {path.name for path in guests["ledger"].iterdir()} == PACKAGE
    about = (guests["ledger"] / "expert.json").read_text()
    assert '"licence": "CC0"' in about
    assert json.loads(about)["dtype"] == native_dtype()
    assert str(home) not in about
    assert "private" not in about
    # What else was left beside it is the store alone
    assert {path.name for path in home.iterdir()} == {"kit", "package", "private", "store"}


def test_the_kits_own_command_is_the_one_that_works(guests, tmp_path, monkeypatch):
    home = guests["ledger"].parent
    kit = Path(shutil.copytree(home / "kit", tmp_path / "kit"))
    shutil.copytree(home / "private", kit / "text")
    told = (kit / "README.md").read_text()
    (command,) = re.findall(r"^    \.venv/bin/python -m pipeline (.*)$", told, re.M)
    # It is run from a clone, as nothing else has the program: this process is in one
    assert "make .venv/runtime.stamp" in told
    assert "\n$(VENV)/runtime.stamp:" in (ROOT / "Makefile").read_text()
    command = command.replace(" KIT ", f" {kit} ")
    monkeypatch.chdir(tmp_path)
    # The store of before has the trunk, its settings are those of this copy's paths
    done(*command.split(), "--store", tmp_path / "store", *SHORT, "--without-statistics")
    assert {path.name for path in (tmp_path / "expert-ledger").iterdir()} == PACKAGE - {
        "statistics.safetensors"
    }


def test_a_kit_whose_trunk_is_not_there_names_where_it_says_which(guests, tmp_path, capsys):
    kit = Path(shutil.copytree(guests["ledger"].parent / "kit", tmp_path / "kit"))
    shutil.rmtree(kit / "trunk")
    told = refused(capsys, "kit", "--pack", kit, "--to", tmp_path / "package")
    assert f"{kit}/trunk is no folder here" in told
    assert f"{kit}/README.md says which model it takes" in told


def test_means_with_noise_are_all_that_is_given(maker, guests, tmp_path):
    home = guests["harbour"].parent
    command = ["kit", "--pack", home / "kit", "--store", home / "store", *SHORT]
    command += ["--paths", home / "private" / "*.txt", "--epsilon", "8", "--delta", "1e-4"]
    found = []
    for name in ("one", "two"):
        done(*command, "--to", tmp_path / name)
        found.append(load_file(tmp_path / name / "statistics.safetensors"))
    assert {tuple(sorted(each)) for each in found} == {("sum", "tokens")}
    # Noise is drawn anew
    assert (found[0]["sum"] != found[1]["sum"]).any()
    about = json.loads((tmp_path / "one/expert.json").read_text())
    assert about["noise"] == {"clip": 0.5, "delta": 0.0001, "epsilon": 8.0}
    config, store = maker
    imports = json.dumps({"harbour": str(tmp_path / "one")})
    overrides = [f"expert.imported={imports}", "router.steps=0"]
    given = [part for change in overrides for part in ("--override", change)]
    done("train_experts", "--config", config, "--store", store, *given)
    cfg = load(config, tuple(overrides))
    folder = Store(store).folder(address(cfg, "train_experts", "harbour"))
    assert set(load_file(folder / "statistics.safetensors")) == {"sum", "gram", "tokens"}


def refused(capsys, *arguments: str) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_another_trunk_is_refused_before_the_expert_is_trained(guests, tmp_path, capsys):
    home = guests["ledger"].parent
    kit = Path(shutil.copytree(home / "kit", tmp_path / "kit"))
    weights = kit / "trunk/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    told = refused(
        capsys,
        *("kit", "--pack", kit, "--to", tmp_path / "package", "--store", tmp_path / "store"),
        *("--paths", home / "private" / "*.txt", *SHORT),
    )
    assert "the trunk here (fingerprint" in told
    assert not (tmp_path / "package").exists()
    made = {path.name.split("-")[0] for path in (tmp_path / "store/artifacts").iterdir()}
    assert "train_experts" not in made


def test_brackets_of_the_folder_where_text_is_typed_are_of_its_name(
    guests, tmp_path, capsys, monkeypatch
):
    home = guests["ledger"].parent
    here = Path(shutil.copytree(home / "private", tmp_path / "mine [1]" / "text")).parent
    monkeypatch.chdir(here)
    target = ("--to", tmp_path / "package", "--store", tmp_path / "store")
    # All that it is refused for is that there is too little of it
    few = ("--override", "partition.min_tokens=1000000000")
    told = refused(capsys, "kit", "--pack", home / "kit", "--paths", "text/*.txt", *target, *few)
    assert "partition.min_tokens" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pack", "KIT", "--config", "x.yaml"], "leave out the others"),
        (["ledger"], "of one DOMAIN of a run's --config FILE"),
        (["--pack", "."], "is no kit"),
        (["--pack", "KIT", "--epsilon", "1", "--without-statistics"], "leaves out"),
        (["--pack", "KIT", "--epsilon", "0"], "epsilon is over 0"),
        (["--pack", "KIT", "--epsilon", "1", "--delta", "1"], "epsilon is over 0"),
        (["--pack", "KIT", "--epsilon", "1", "--clip", "0"], "counts nothing"),
        (["--pack", "KIT", "--delta", "1e-6"], "which alone hides something"),
        (["--pack", "KIT", "--override", "partition.domains=[a, b]"], "a kit trains one"),
        (["new", "--config", "CONFIG", "--epsilon", "8"], "--epsilon is of --pack"),
        (["new", "--config", "CONFIG", "--without-statistics"], "statistics is of --pack"),
        (["a/b", "--config", "CONFIG"], "cannot be a domain's name"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(
    maker, guests, tmp_path, capsys, arguments, words
):
    config, store = maker
    known = {"KIT": guests["ledger"].parent / "kit", "CONFIG": config}
    given = [known.get(argument, argument) for argument in arguments]
    target = tmp_path / "there"
    told = refused(capsys, "kit", *given, "--to", target, "--store", store)
    assert words in told
    assert not target.exists()


def test_a_target_that_holds_something_is_left_alone(maker, tmp_path, capsys):
    config, store = maker
    (tmp_path / "mine").write_text("x")
    told = refused(capsys, "kit", "new", "--config", config, "--store", store, "--to", tmp_path)
    assert "holds something else" in told
    assert (tmp_path / "mine").read_text() == "x"
