"""Adapters of a vision-language model that somebody else trained: what PEFT saved, and what comes
back of a kit, in the place of one that is trained here; and what is refused by name.

B texts, T tokens, D width.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import local_jobs
import lora_small
import pytest
import small_tasks
import torch
from fakes import FolderParts
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_expert_package import resealed
from test_foreign_adapters import change, shaken
from transformers import Qwen3VLForConditionalGeneration
from yaml_text import yaml_text

from pipeline.__main__ import main
from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.families.adapters import peft_io
from pipeline.families.adapters.inference import Request
from pipeline.families.load import load
from pipeline.families.lora_vlm import family
from pipeline.families.lora_vlm.base import open_base
from pipeline.protocols import quiet
from pipeline.run.job import run_job
from pipeline.run.stages import address
from pipeline.store.artifacts import Store
from tests import lora_small as lora

# peft asks transformers in a way that it is leaving
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
quick = local_jobs.quick  # a fixture
GUEST = "color"
EASY = {"imported_slack": 99.0}


def stock(parts: FolderParts) -> Qwen3VLForConditionalGeneration:
    """Return the base as anybody opens it."""
    folder = parts.folder("train_shared") / "base"
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """(parts, folder) of an adapter that was trained on this base, as PEFT's save_pretrained left
    it; read it, never change it."""
    root = tmp_path_factory.mktemp("elsewhere")
    parts = lora.prepared(root / "run", loras__defaults__steps=30)
    trained = lora.train(parts, GUEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(stock(parts), trained.folder / "adapter")
        model.save_pretrained(root / "saved")
    return parts, root / "saved"


def adapted(parts: FolderParts, folder: Path, **settings) -> Path:
    """Save an adapter with numbers that show, made by PEFT alone."""
    usual = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(stock(parts), LoraConfig(**usual | settings))
        shaken(model).save_pretrained(folder)
    return folder


def importing(root: Path, source, **entry) -> FolderParts:
    """Return a run that imports the guest, whose entry says more."""
    return lora.prepared(root, loras__experts={GUEST: {"imported": str(source)} | entry})


def imported(parts: FolderParts) -> Path:
    """Import the guest; return its artifact's folder."""
    folder = parts.new("train_experts", GUEST)
    parts.metrics["train_experts", GUEST] = family.expert(parts.cfg, parts, GUEST).write(folder)
    return folder


def check_same_states(parts: FolderParts, made: Path, source: Path) -> None:
    """Hold what the adapter computes of words here against PEFT on the stock model."""
    ids_BT = torch.arange(3, 15).view(2, 6)
    base = open_base(parts.folder("train_shared"), parts.cfg.loras.base)
    own = peft_io.load(base.model, made, GUEST, base.pin)
    wanted = PeftModel.from_pretrained(stock(parts), source).eval()
    with torch.no_grad(), peft_io.active(own, GUEST):
        own_BTD = peft_io.core_of(own).base_model(input_ids=ids_BT).last_hidden_state
        wanted_BTD = wanted.get_base_model().model(input_ids=ids_BT).last_hidden_state
        plain_BTD = stock(parts).model(input_ids=ids_BT).last_hidden_state
    torch.testing.assert_close(own_BTD, wanted_BTD, rtol=0, atol=2e-5)
    assert (wanted_BTD - plain_BTD).abs().max() > 1e-2


def test_what_peft_saved_is_an_expert_and_answers_in_the_stack(taught, tmp_path):
    _, source = taught
    parts = importing(tmp_path / "run", source)
    made = imported(parts)
    kept, given = load_file(made / peft_io.TENSORS), load_file(source / "adapter_model.safetensors")
    assert kept.keys() == given.keys()
    assert all(torch.equal(kept[name], given[name]) for name in given)
    check_same_states(parts, made, source)
    metrics = parts.metrics["train_experts", GUEST]
    assert metrics["probe_nats"] < metrics["probe_base_nats"]
    assert not metrics["base_is_proven"]
    for item in ("dots", "router"):
        lora.train(parts, item)
    stack = family.assemble(parts.cfg, parts)
    (answer,) = stack.answer([Request("What colour?")], expert=GUEST)
    assert answer.expert == GUEST
    # No rate is sought for what is not trained, nor any cost told
    auto = lora.config(loras__experts={GUEST: {"imported": "x"}}, loras__defaults__lr="auto")
    assert auto.searches_experts == ("dots",)
    assert family.cost(auto, "train_experts", GUEST, {}, False) is None
    assert family.cost(auto, "train_experts", "dots", {}, False) is not None


def test_a_rank_that_is_not_served_is_filled_up_and_the_tower_needs_leave(taught, tmp_path):
    parts, _ = taught
    words = adapted(parts, tmp_path / "words", r=3, target_modules=["q_proj", "up_proj"])
    here = importing(tmp_path / "one", words, **EASY)
    made = imported(here)
    about = json.loads((made / peft_io.SETTINGS).read_text())
    assert (about["r"], about["lora_alpha"]) == (8, pytest.approx(16 / 3 * 8))
    check_same_states(here, made, words)
    tower = adapted(parts, tmp_path / "tower", target_modules=["qkv", "q_proj"])
    with pytest.raises(ConfigError, match="allow_vision: true"):
        imported(importing(tmp_path / "two", tower, **EASY))
    leave = {"overrides": {"allow_vision": True}} | EASY
    assert imported(importing(tmp_path / "three", tower, **leave))


def _other_names(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("language_model.", ""): each for name, each in tensors.items()}
    save_file(renamed, path, metadata={"format": "pt"})


def _torn(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


REFUSED = {
    "names of another base": (_other_names, "no linear layer of this base"),
    "torn": (_torn, "its tensors take"),
    "DoRA": (lambda folder: change(folder, use_dora=True), "lengths of their own (DoRA)"),
    "turned round": (lambda folder: change(folder, lora_alpha=900), "nothing proves that it was"),
    "numbers that overflow": (lambda folder: change(folder, lora_alpha=1e39), "not finite"),
}


@pytest.mark.parametrize(("spoil", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_adapter_of_this_base_is_refused_by_name(taught, tmp_path, spoil, words):
    _, source = taught
    folder = Path(shutil.copytree(source, tmp_path / "adapter"))
    spoil(folder)
    parts = importing(tmp_path / "run", folder)
    with pytest.raises(DataError) as caught:
        imported(parts)
    told = str(caught.value)
    assert told.startswith(f"loras.experts.{GUEST}.imported: {GUEST} (")
    assert words in told and "\n" not in told and len(told) < 450
    assert not list(parts.folder("train_experts", GUEST).rglob("adapter_model.safetensors"))


def test_a_plan_looks_before_anything_is_made(taught, tmp_path):
    _, source = taught
    folder = Path(shutil.copytree(source, tmp_path / "adapter"))
    own = {"loras__experts": {GUEST: {"imported": str(folder)}}}
    family.look_at_adapter(lora.config(**own), GUEST)
    small = lora.config(loras__experts={GUEST: {"imported": str(folder), "imported_bytes": 10**6}})
    padded = folder / "adapter_model.safetensors"
    os.truncate(padded, 2 * 10**6)
    with pytest.raises(DataError, match=r"over loras\.experts\.color\.imported_bytes"):
        family.look_at_adapter(small, GUEST)
    settings = [path for name, path in lora.config(**own).paths() if name.endswith("imported")]
    assert settings == [str(folder)]
    change(folder, peft_type="IA3")
    with pytest.raises(DataError, match="of the kind 'IA3'"):
        family.look_at_adapter(lora.config(**own), GUEST)


@pytest.fixture
def rows(tmp_path):
    """A file of rows that nobody else has."""
    source = small_tasks.Source(tmp_path / "private")
    found = []
    for number in range(24):
        found.append({"image": f"images/{number}.png", "prompt": "which?", "answer": "that"})
    return source(found)


def test_a_kit_goes_out_and_its_expert_comes_is_replaced_and_goes(
    tmp_path, rows, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    raw = lora_small.SETTINGS
    (tmp_path / "loras.json").write_text(json.dumps(raw["loras"], indent=1), "utf-8")
    (tmp_path / "run.yaml").write_text(yaml_text(raw | {"loras": "loras.json"}), "utf-8")
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
    where = ("--config", "run.yaml", "--store", "store")
    assert main(["train_shared", *where]) == 0
    assert main(["kit", "plates", *where, "--to", "kit"]) == 0
    assert {path.name for path in (tmp_path / "kit").iterdir()} == {
        *("README.md", "kit.json", "expert.yaml", "base"),
    }
    pack = ["kit", "--pack", "kit", "--paths", str(rows), "--store", "theirs", "--to", "package"]
    few = ["--override", "loras.defaults.steps=3", "--override", "runtime.threads=1"]
    capsys.readouterr()
    assert main([*pack, *few, "--epsilon", "8"]) == 2
    assert "have no statistics" in " ".join(capsys.readouterr().err.split())
    assert main([*pack, *few]) == 0
    assert {path.name for path in Path("package").iterdir()} == {
        *("expert.json", "expert.safetensors"),
    }
    # What the expert does not need is not made there
    made = {path.name.split("-")[0] for path in Path("theirs/artifacts").iterdir()}
    assert made == {"preprocess", "train_shared", "train_experts"}
    capsys.readouterr()
    assert main(["add", "plates", "--expert", "package", *where, "--modal"]) == 2
    assert "a finished expert comes with rows of its task" in capsys.readouterr().err
    assert (
        main(["add", "plates", "--expert", "package", "--paths", str(rows), *where, "--modal"]) == 0
    )
    cfg = load("run.yaml")
    assert cfg.imported == {"plates": str(tmp_path / "package")}
    store = Store(tmp_path / "store").open()
    for stage in ("preprocess", "train_experts"):
        run_job(stage, cfg, store, "plates", progress=quiet)
    found = store.require(address(cfg, "train_experts", "plates"))
    assert found.metrics["base_is_proven"] and found.metrics["trained_tokens"] > 0
    folder = store.folder(found.address)
    kept, packed = load_file(folder / peft_io.TENSORS), load_file("package/expert.safetensors")
    assert kept.keys() == packed.keys()
    assert all(torch.equal(kept[name], packed[name]) for name in packed)
    shutil.copytree("package", "other")
    resealed(Path("other"), trunk="0" * 64)
    assert main(["replace", "plates", "--expert", "other", *where, "--modal"]) == 0
    with pytest.raises(MismatchError, match=r"trained on another base \(pin 0000"):
        run_job("train_experts", load("run.yaml"), store, "plates", progress=quiet)
    capsys.readouterr()
    assert main(["replace", "plates", "--paths", str(rows), *where, "--modal"]) == 0
    assert "plates was imported, and is trained here" in capsys.readouterr().out
    assert load("run.yaml").imported == {}
    assert main(["remove", "plates", *where, "--modal"]) == 0
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.*")} == before
