"""Kits of adapters of a language model: an expert is trained where its text lies and joins others
in a third store, with statistics as they are or with noise; it comes, is replaced and goes.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import documents, tiny_config
from safetensors.torch import load_file
from test_expert_package import resealed

from pipeline.__main__ import main
from pipeline.config.files import parse_yaml
from pipeline.families.ffn_moe.adapter.model import stored_base
from pipeline.families.ffn_moe.adapter.packing import document_states
from pipeline.families.ffn_moe.adapter.statistics import read_layers
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run.context import StoredParts
from pipeline.run.stages import address
from pipeline.store.artifacts import Store, inventory
from tests import local_jobs, small_kits
from tests.small_kits import GUESTS, PACKAGE, done

quick = local_jobs.quick  # a fixture
FEW = {"eval_every_steps": 0, "warmup_steps": 1, "eval_tokens": 256}
SMALL = {
    "trunk": FEW | {"steps": 10, "statistics_tokens": 512},
    "expert": FEW
    | {"form": "adapter", "rank": 2, "steps": 4, "lr": 1e-2, "statistics_tokens": 512},
    "router": {"prompt_tokens": 8},
    "dense": {"baselines": []},
    "evaluate": {"continuation_tokens": 0, "tokens_per_domain": 256},
}
SHORT = ["--override", "partition.min_tokens=100", "--override", "runtime.threads=1"]


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    """(configuration, store) of a run of adapters that hands kits out, up to its experts."""
    root = tmp_path_factory.mktemp("maker")
    config = tiny_config(root / "tiny")
    # Gates' settings of a run of networks are none of a router of texts
    raw = parse_yaml(config.read_text()) | {"router": SMALL["router"]}
    for name in ("trunk", "expert", "evaluate"):
        raw[name] |= SMALL[name]
    raw["dense"] = SMALL["dense"]
    config.write_text(json.dumps(raw))
    for stage in ("tokenizer", "preprocess", "train_shared", "train_experts"):
        done(stage, "--config", config, "--store", root / "store")
    return config, root / "store"


@pytest.fixture(scope="module")
def guests(maker, tmp_path_factory):
    """Packages by name, each trained from a kit of its own in a store of its own."""
    return small_kits.guests(*maker, tmp_path_factory.mktemp("guests"), *SHORT)


def packed_again(guests, name: str, to: Path, *more) -> Path:
    """Pack a guest's expert once more, which its store has."""
    home = guests[name].parent
    where = ("--pack", home / "kit", "--to", to, "--store", home / "store")
    done("kit", *where, "--paths", home / "private" / "*.txt", *SHORT, *more)
    return to


def test_two_kits_join_in_a_third_store_and_one_is_replaced_and_goes(maker, guests, tmp_path):
    config, given = maker
    store = Path(shutil.copytree(given, tmp_path / "store"))
    joined = tmp_path / "joined.yaml"
    joined.write_text(f"extends: {config}\nname: joined\n")
    before = inventory(store / "artifacts")
    alone = load(joined)
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
    for name, path in guests.items():
        folder = Store(store).folder(address(cfg, "train_experts", name))
        kept = load_file(folder / "adapter" / "adapter_model.safetensors")
        packed = load_file(path / "expert.safetensors")
        assert kept.keys() == packed.keys()
        assert all(torch.equal(kept[key], packed[key]) for key in packed)
        sums, own = (load_file(at / "statistics.safetensors") for at in (folder, path))
        assert all(torch.equal(sums[key], own[key]) for key in own)
        # The base is the one here, whatever the one there was called
        about = json.loads((folder / "adapter.json").read_text())
        mine = Store(store).folder(address(cfg, "train_experts", "sea")) / "adapter.json"
        assert about["pin"] == json.loads(mine.read_text())["pin"]
    # Another package takes the place of one, and then it goes: what stays has its addresses
    other = packed_again(guests, "harbour", tmp_path / "other", "--description", "again")
    done("replace", "harbour", "--config", joined, "--expert", other, "--modal")
    again = load(joined)
    assert address(again, "train_experts", "harbour") != address(cfg, "train_experts", "harbour")
    assert address(again, "train_experts", "ledger") == address(cfg, "train_experts", "ledger")
    for name in GUESTS:
        done("remove", name, "--config", joined, "--modal")
    assert joined.read_text() == f"extends: {config}\nname: joined\n"
    assert address(load(joined), "evaluate") == address(alone, "evaluate")


def test_a_kit_holds_no_text_of_its_run_and_a_package_none_of_its_own(guests):
    home = guests["ledger"].parent
    kit = {path.relative_to(home / "kit").as_posix() for path in (home / "kit").rglob("*")}
    assert kit == {
        *("README.md", "kit.json", "expert.yaml", "centre.safetensors", "tokenizer", "trunk"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *("trunk/config.json", "trunk/model.safetensors"),
    }
    assert {path.name for path in guests["ledger"].iterdir()} == PACKAGE
    about = json.loads((guests["ledger"] / "expert.json").read_text())
    assert (about["form"], about["rank"], about["licence"]) == ("adapter", 2, "CC0")
    assert "private" not in json.dumps(about)
    assert str(home) not in json.dumps(about)


def test_means_with_noise_and_without_statistics(maker, guests, tmp_path):
    found = []
    for name in ("one", "two"):
        package = packed_again(guests, "harbour", tmp_path / name, "--epsilon", 8)
        found.append(load_file(package / "statistics.safetensors"))
    # Noise is drawn anew; the spread is public text's
    assert (found[0]["sum"] != found[1]["sum"]).any()
    public = load_file(guests["harbour"].parent / "kit/centre.safetensors")
    for each in found:
        mean_D, count = each["sum"][0].double() / each["tokens"], each["tokens"].item()
        own_DD = each["gram"][0].double() / count - torch.outer(mean_D, mean_D)
        general_D = public["sum"][0].double() / public["tokens"]
        wanted_DD = public["gram"][0].double() / public["tokens"] - torch.outer(
            general_D, general_D
        )
        scale = wanted_DD.diagonal().mean()
        torch.testing.assert_close(own_DD / scale, wanted_DD / scale, rtol=0, atol=1e-3)
    config, given = maker
    store = Path(shutil.copytree(given, tmp_path / "store"))
    bare = packed_again(guests, "harbour", tmp_path / "bare", "--without-statistics")
    assert {path.name for path in bare.iterdir()} == PACKAGE - {"statistics.safetensors"}
    joined = tmp_path / "joined.yaml"
    text = tmp_path / "public.txt"
    text.write_text("\n\n".join(documents("sea", 40)))
    for source, beside, words in (
        (tmp_path / "one", {}, "brought, with noise (epsilon 8, 1e-05)"),
        (bare, {"harbour": [str(text)]}, "of public text"),
    ):
        own = {"imported": {"harbour": str(source)}, "imported_text": beside}
        joined.write_text(json.dumps({"extends": str(config), "expert": own}))
        done("train_experts", "--config", joined, "--store", store)
        made = Store(store).require(address(load(joined), "train_experts", "harbour"))
        assert made.metrics["statistics"] == words


def test_a_document_is_read_alone_and_its_first_token_left_out(maker):
    config, given = maker
    cfg = load(config)
    base = stored_base(cfg, StoredParts(cfg, Store(given).open(), quiet))
    texts = [np.arange(1, 1 + length) for length in (1, 2, 9, 40)]
    (together_BSD,) = document_states(cfg, base, texts, quiet)
    for text, mean_SD in zip(texts, together_BSD, strict=True):
        ids_BT = torch.from_numpy(text[: cfg.trunk.context_tokens])[None]
        x_BTSD = base.states(ids_BT, read_layers(base))
        first = 1 if len(text) > 1 else 0
        wanted_SD = x_BTSD[0, first:].mean(0).double()
        torch.testing.assert_close(mean_SD, wanted_SD, rtol=0, atol=1e-5)


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_another_trunk_another_form_and_a_torn_package_are_refused(maker, guests, tmp_path, capsys):
    config, given = maker
    store = Path(shutil.copytree(given, tmp_path / "store"))

    def told(package: Path) -> str:
        own = {"imported": {"harbour": str(package)}}
        joined = tmp_path / "joined.yaml"
        joined.write_text(json.dumps({"extends": str(config), "expert": own}))
        return refused(capsys, "train_experts", "--config", joined, "--store", store)

    for what in ("trunk", "tokenizer"):
        other = Path(shutil.copytree(guests["harbour"], tmp_path / what))
        resealed(other, **{what: "0" * 64})
        assert f"another {what} (fingerprint 0000" in told(other)
    torn = Path(shutil.copytree(guests["harbour"], tmp_path / "torn"))
    weights = torn / "expert.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert "expert.safetensors has" in told(torn)
    full = parse_yaml(config.read_text())
    full["expert"] = {"steps": 2, "imported": {"harbour": str(guests["harbour"])}}
    full["router"] = {"steps": 0, "top_k": 1}
    (tmp_path / "full.yaml").write_text(json.dumps(full))
    for name in ("sea", "shop", "hall"):
        shutil.copy(config.parent / f"{name}.jsonl", tmp_path)
    words = refused(capsys, "train_experts", "--config", tmp_path / "full.yaml", "--store", store)
    assert "harbour has another form, adapter, than the experts here, full" in words


def test_a_kit_is_held_to_the_kind_of_its_expert_before_that_is_trained(guests, capsys, tmp_path):
    home = guests["harbour"].parent
    store = Path(shutil.copytree(home / "store", tmp_path / "store"))
    where = ("--pack", home / "kit", "--to", tmp_path / "package", "--store", store)
    other = ("--override", "expert.form=low_rank")
    before = sorted(path.name for path in (store / "artifacts").glob("train_experts*"))
    words = refused(capsys, "kit", *where, "--paths", home / "private" / "*.txt", *SHORT, *other)
    assert "the kit is not for experts of the form low_rank" in words
    assert sorted(path.name for path in (store / "artifacts").glob("train_experts*")) == before
