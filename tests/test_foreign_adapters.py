"""An adapter that somebody else trained: what PEFT's save_pretrained left is an expert here with
the same logits, whatever its ranks and scales; what is none, or another base's, is refused by name.

B texts, T tokens, V vocabulary.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import documents
from fakes import FolderParts
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.config.base import merge
from pipeline.data.text.tokenizer import train as train_tokenizer
from pipeline.errors import DataError
from pipeline.families import ExportWish
from pipeline.families.adapters import foreign, peft_io
from pipeline.families.ffn_moe import family
from pipeline.families.ffn_moe.adapter.evaluate import tables
from pipeline.families.ffn_moe.adapter.stack import assemble
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.export.formats import export
from pipeline.families.ffn_moe.parts import shards_of, training_rows
from pipeline.protocols import quiet
from pipeline.run.stages import address
from pipeline.store.looking import FileSums, Looking
from tests import small
from tests.small import stock
from tests.test_expert_package import header_of, with_header

# peft asks transformers in a way that it is leaving
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
GUEST = "beta"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = {
    "expert": {"form": "adapter", "rank": 2, "alpha": 4.0, "domains": ("alpha", GUEST)},
    "dense": {"baselines": ()},
}
EASY = {"expert__imported_slack": 99.0}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**changes) -> FfnMoeConfig:
    """Return a small run of adapters; changes are dotted names with __."""
    raw = merge(small.SETTINGS, ADAPTER) | {"router": {"prompt_tokens": 4}}
    for name, value in changes.items():
        for part in reversed(name.split("__")):
            value = {part: value}
        raw = merge(raw, value)
    return FfnMoeConfig.model_validate(raw)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(300, documents("sea", 40))


def run_of(root: Path, tokenizer, **changes) -> FolderParts:
    """Return the parts of a run up to its base, and its own expert."""
    return small.up_to_an_expert(config(**changes), root, tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run of adapters with one expert of its own; read it, never change it."""
    return run_of(tmp_path_factory.mktemp("adapters") / "run", tokenizer)


def adapted(run, **settings) -> PeftModel:
    """Put an adapter on the base as somebody with PEFT alone does."""
    torch.manual_seed(1)
    usual = {"r": 4, "lora_alpha": 8, "target_modules": SEVEN, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(stock(run), LoraConfig(**usual | settings))


def saved(model: PeftModel, folder: Path) -> Path:
    """Save an adapter as PEFT does."""
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def taught(run, tmp_path_factory):
    """An adapter that was trained on the guest's text with PEFT and torch alone."""
    model = adapted(run)
    rows = training_rows(run.cfg, shards_of(run, (GUEST,)), "elsewhere", (GUEST,), how="equal")
    moving = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-2)
    for step in range(20):
        ids_BT = torch.from_numpy(rows.rows(8 * step, 8))
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return saved(model, tmp_path_factory.mktemp("saved") / "taught")


@pytest.fixture
def folder(taught, tmp_path):
    """The same, which a test may change."""
    return Path(shutil.copytree(taught, tmp_path / "adapter"))


def importing(run, source, root: Path, **changes) -> FolderParts:
    """Return a run on the same base that imports the guest."""
    shutil.copytree(run.root, root)
    cfg = config(expert__imported={GUEST: str(source)}, **changes)
    return FolderParts(cfg, root, dict(run.metrics))


def imported(parts: FolderParts) -> Path:
    """Import the guest; return its artifact's folder."""
    folder = parts.new("train_experts", GUEST)
    parts.metrics["train_experts", GUEST] = family.expert(parts.cfg, parts, GUEST).write(folder)
    return folder


def texts(run, count=6, tokens=12) -> torch.Tensor:
    """Return ids_BT."""
    draw = torch.Generator().manual_seed(0)
    vocab = len(run.tensors("train_shared", "trunk.safetensors")["model.embed_tokens.weight"])
    return torch.randint(1, vocab, (count, tokens), generator=draw)


def check_same_logits(run, parts, folder: Path) -> None:
    """Hold what the stack's adapter computes against PEFT on the stock model."""
    ids_BT = texts(run)
    stack = foreign_stack(parts)
    with torch.no_grad():
        wanted_BTV = PeftModel.from_pretrained(stock(run), folder).eval()(ids_BT).logits
        own_BTV = stack.under(GUEST).hidden(ids_BT) @ stack.head.T
        plain_BTV = stock(run)(ids_BT).logits
    torch.testing.assert_close(own_BTV, wanted_BTV, rtol=0, atol=2e-5)
    assert (wanted_BTV - plain_BTV).abs().max() > 1e-2


def foreign_stack(parts):
    """Return the base with every adapter of the run."""
    from pipeline.families.ffn_moe.adapter.model import stored_adapters

    return stored_adapters(parts.cfg, parts)


def test_what_peft_saved_joins_routes_and_is_measured(run, taught, tmp_path):
    parts = importing(run, taught, tmp_path / "run")
    made = imported(parts)
    assert {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} == {
        *("adapter.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        "statistics.safetensors",
    }
    kept = load_file(made / peft_io.TENSORS)
    given = load_file(taught / "adapter_model.safetensors")
    assert kept.keys() == given.keys()
    assert all(torch.equal(kept[name], given[name]) for name in given)
    check_same_logits(run, parts, taught)
    metrics = parts.metrics["train_experts", GUEST]
    assert metrics["probe_nats"] < metrics["probe_base_nats"]
    assert not metrics["base_is_proven"] and metrics["statistics"] == "of the text here"
    routed = parts.new("train_router")
    parts.metrics["train_router", None] = family.router(parts.cfg, parts).write(routed)
    assert assemble(parts.cfg, parts).names == ("alpha", GUEST, "base")
    report = tables(parts.cfg, parts, quiet)
    rows = {row.name: row for row in report.quality}
    sizes = {}
    for name in ("alpha", GUEST):
        tensors = parts.tensors("train_experts", peft_io.TENSORS, name)
        sizes[name] = sum(each.numel() for each in tensors.values())
    # Of another rank than those that are trained here, and counted as what it is
    assert sizes[GUEST] == 2 * sizes["alpha"]
    for name, size in sizes.items():
        assert rows[name].active_parameters - rows["base"].active_parameters == size
    assert report.model.total_parameters - rows["base"].active_parameters == sum(sizes.values())
    assert any(f"Nothing proves that {GUEST}" in note for note in report.notes)


# What PEFT can be told of an adapter, and what is kept of it is (rank, alpha)
VARIANTS = {
    "alphas of their own": ({"alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 20}}, (4, 20)),
    "ranks of their own": ({"rank_pattern": {"v_proj": 2, "down_proj": 6}}, (6, 24)),
    "both, by the root": (
        {"rank_pattern": {"k_proj": 9}, "alpha_pattern": {"o_proj": 1}, "use_rslora": True},
        (9, 36.0),
    ),
    "some modules": ({"target_modules": ["q_proj", "v_proj"]}, (4, 8)),
    "some layers": ({"layers_to_transform": [1]}, (4, 8)),
    "no layers, which are all": ({"layers_to_transform": []}, (4, 8)),
    "by an expression": ({"target_modules": r".*\.(q_proj|up_proj)"}, (4, 8)),
    "all that is linear": ({"target_modules": "all-linear"}, (4, 8)),
    "one name": ({"target_modules": ["layers.0.self_attn.o_proj"]}, (4, 8)),
    "of another start": ({"init_lora_weights": "gaussian"}, (4, 8)),
    "biases, of which its base has none": ({"bias": "all"}, (4, 8)),
}


def shaken(model: PeftModel) -> PeftModel:
    """Give an adapter numbers that show."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize(("settings", "kept"), VARIANTS.values(), ids=VARIANTS)
def test_whatever_its_ranks_and_scales_it_computes_what_it_did(run, tmp_path, settings, kept):
    source = saved(shaken(adapted(run, **settings)), tmp_path / "adapter")
    parts = importing(run, source, tmp_path / "run", **EASY)
    made = imported(parts)
    about = json.loads((made / peft_io.SETTINGS).read_text())
    assert (about["r"], about["lora_alpha"]) == kept
    assert not (about["rank_pattern"] or about["alpha_pattern"] or about["use_rslora"])
    check_same_logits(run, parts, source)


def test_merged_into_the_trunk_it_has_its_own_scale(run, tmp_path):
    """Of another rank and alpha than the run's own adapters, and over the rank's root."""
    source = saved(shaken(adapted(run, use_rslora=True, r=5)), tmp_path / "adapter")
    parts = importing(run, source, tmp_path / "run", **EASY)
    imported(parts)
    folder = tmp_path / "merged"
    folder.mkdir()
    export(parts.cfg, parts, ExportWish("expert", GUEST), folder, quiet)
    ids_BT = texts(run)
    with torch.no_grad():
        wanted_BTV = PeftModel.from_pretrained(stock(run), source).eval()(ids_BT).logits
        found_BTV = AutoModelForCausalLM.from_pretrained(folder)(ids_BT).logits
    torch.testing.assert_close(found_BTV, wanted_BTV, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_fewer_bits_are_taken_as_they_are(run, tmp_path, dtype):
    source = saved(shaken(adapted(run)), tmp_path / "adapter")
    path = source / "adapter_model.safetensors"
    rounded = {name: each.to(dtype) for name, each in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})
    made = imported(importing(run, source, tmp_path / "run", **EASY))
    kept = load_file(made / peft_io.TENSORS)
    assert all(torch.equal(kept[name], each.float()) for name, each in rounded.items())


def test_ranks_that_are_not_served_are_filled_up_and_names_become_one_expression(run, tmp_path):
    source = saved(shaken(adapted(run, r=3)), tmp_path / "adapter")
    opened = foreign.look(foreign.ExpertSource(str(source), 10**9))
    found = foreign.take(stock(run), opened, tmp_path, ranks=(1, 8, 16))
    assert (found.r, len(found.modules)) == (8, 14)
    names = [name for name, module in stock(run).named_modules() if isinstance(module, nn.Linear)]
    assert [name for name in names if re.fullmatch(found.targets, name)] == names[:-1]
    assert len(found.targets) < 200
    with pytest.raises(ValueError, match="rank 3, and at most 2"):
        foreign.take(stock(run), opened, tmp_path, ranks=(1, 2))
    some = ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj", "head.x", "headax"]
    assert [name for name in [*some, "head_x"] if re.fullmatch(foreign.expression_of(some), name)]
    assert not re.fullmatch(foreign.expression_of(["head.x"]), "headax")


def test_an_address_moves_with_the_content_of_both_files(run, folder, tmp_path):
    def addressed() -> str:
        cfg = config(expert__imported={GUEST: str(folder)})
        look = Looking(FileSums())
        found = cfg.look("train_experts", GUEST, look)
        identity = {"train_experts/" + GUEST: found.print}
        return address(cfg.model_copy(update={"identity": identity}), "train_experts", GUEST)

    first = addressed()
    (folder / "README.md").write_text("other words")
    assert addressed() == first
    change(folder, lora_dropout=0.5)
    second = addressed()
    flipped = folder / "adapter_model.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    assert len({first, second, addressed()}) == 3


def test_an_adapter_comes_from_a_url(run, taught, tmp_path):
    fs = fsspec.filesystem("memory")
    for name in (CONFIG, TENSORS):
        fs.pipe_file(f"/team/one/{name}", (taught / name).read_bytes())
    # Whatever else lies there is not opened
    fs.pipe_file("/team/one/training_args.bin", b"\x80\x04K\x01.")
    made = imported(importing(run, "memory://team/one", tmp_path / "run"))
    kept, given = load_file(made / peft_io.TENSORS), load_file(taught / TENSORS)
    assert all(torch.equal(kept[name], given[name]) for name in given)
    cfg = config(expert__imported={GUEST: "memory://team/one"})
    first = cfg.look("train_experts", GUEST, Looking(FileSums()))
    assert [each.name for each in first.seen] == [CONFIG, TENSORS]
    gone = config(expert__imported={GUEST: "memory://nobody/here"})
    (seen,) = gone.look("train_experts", GUEST, Looking(FileSums())).seen
    assert seen.sum == "unreachable"
    with pytest.raises(DataError, match="neither expert.json"):
        family.look_at_package(gone, GUEST)


def change(folder: Path, **settings) -> None:
    """Write other settings beside an adapter's tensors."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def with_tensors(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first_of(tensors) -> str:
    return sorted(tensors)[0]


def _nan(tensors):
    tensors[first_of(tensors)].view(-1)[1] = float("nan")


def _overflowing(tensors):
    for name in tensors:
        tensors[name] *= 1e25


def _other_sizes(tensors):
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = torch.cat([tensors[name]] * 2, 1)


def _other_layers(tensors):
    for name in sorted(tensors):
        if ".layers.1." in name:
            tensors[name.replace(".layers.1.", ".layers.7.")] = tensors.pop(name)


def _wrong_ranks(tensors):
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = tensors[name][:3].contiguous()
        else:
            tensors[name] = tensors[name][:, :3].contiguous()


def _torn_pair(tensors):
    del tensors[first_of(tensors)]


def _module_gone(tensors):
    for name in sorted(tensors):
        if "layers.1.self_attn.q_proj" in name:
            del tensors[name]


def _whole_weights(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(4, 4)


def _biases(tensors):
    module = first_of(tensors).partition(".lora_")[0]
    tensors[f"{module}.base_layer.bias"] = torch.ones(16)


def _magnitudes(tensors):
    module = first_of(tensors).partition(".lora_")[0]
    tensors[f"{module}.lora_magnitude_vector"] = torch.ones(16)


def _of_head(tensors):
    vocab = 300
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 16)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(vocab, 4)


def _of_a_norm(tensors):
    for part in "AB":
        name = f"base_model.model.model.layers.1.input_layernorm.lora_{part}.weight"
        tensors[name] = torch.zeros(4, 4)


def _under_head(tensors):
    tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(4, 16)


def _of_a_state_dict(tensors):
    for name in sorted(tensors):
        tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)


def _of_64_bits(tensors):
    for name in tensors:
        tensors[name] = tensors[name].double()


def _of_embedding(tensors):
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 16)


def _strange_name(tensors):
    tensors["a\x1b[2J\n" * 50] = torch.zeros(3)


def _integers(tensors):
    for name in tensors:
        tensors[name] = tensors[name].long()


def torn(folder):
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 9)


def padded(folder):
    os.truncate(folder / "adapter_model.safetensors", 2 << 30)  # sparse: takes no room


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def sharded(folder):
    (folder / TENSORS).rename(folder / "adapter_model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


def linked(folder):
    path = folder / "adapter_model.safetensors"
    path.rename(folder.parent / "moved")
    path.symlink_to(folder.parent / "moved")


def elsewhere_in_file(folder):
    path = folder / "adapter_model.safetensors"
    header, payload = header_of(path)
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [0, 4]
    with_header(path, header, payload)


def _text(name, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def _edit(edit):
    return lambda folder: with_tensors(folder, edit)


def _set(**settings):
    return lambda folder: change(folder, **settings)


def without(name):
    return lambda folder: (folder / name).unlink()


REFUSED = {
    "NaN": (_edit(_nan), "1 tensor is not finite"),
    "numbers that overflow": (_edit(_overflowing), "not finite"),
    "a base of other sizes": (_edit(_other_sizes), "it was trained on another one"),
    "a base of other layers": (_edit(_other_layers), "no linear layer of this base"),
    "ranks that its settings do not say": (
        _edit(_wrong_ranks),
        "of rank 3, and its settings say 4",
    ),
    "one matrix of two": (_edit(_torn_pair), "has one of two matrices"),
    "a module that is gone": (_edit(_module_gone), "lacks the modules that its target_modules"),
    "modules that nobody named": (_set(target_modules=["q_proj"]), "has more than the modules"),
    "whole weights": (_edit(_whole_weights), "weights of the base itself"),
    "lengths of columns": (_edit(_magnitudes), "lengths of columns (DoRA)"),
    "an embedding": (_edit(_of_embedding), "an adapter of an embedding"),
    "an adapter of the head": (
        _edit(_of_head),
        "without embed_tokens and lm_head among its target_modules",
    ),
    "the head under one": (
        _edit(_under_head),
        "without embed_tokens and lm_head among its target_modules",
    ),
    "what is no linear layer": (
        _edit(_of_a_norm),
        "(model.layers.1.input_layernorm); train it without",
    ),
    "names of a state_dict": (_edit(_of_a_state_dict), "have save_pretrained write it"),
    "64 bits": (_edit(_of_64_bits), "adapters here are F32, F16, BF16; save it in one of these"),
    "words that move a cursor": (_edit(_strange_name), "weights of the base itself"),
    "integers": (_edit(_integers), "which is no floating-point number"),
    "torn": (torn, "it is torn; copy it again"),
    "2 GB of padding": (padded, "nothing may stand behind them"),
    "offsets that lie": (elsewhere_in_file, "lies elsewhere than it can"),
    "a pickle": (pickled, "adapter_model.bin may hold pickled objects"),
    "a pickle by another name": (_text(TENSORS, b"\x80\x04K\x01."), "torn, or no safetensors"),
    "an empty file": (_text(TENSORS, b""), "is empty"),
    "several files": (sharded, "with a larger max_shard_size"),
    "a link": (linked, "is a link"),
    "no tensors": (without(TENSORS), f"{TENSORS} is not there"),
    "no settings": (without(CONFIG), "neither expert.json, of a package, nor"),
    "settings that are no JSON": (_text(CONFIG, b"{"), "is no JSON object"),
    "settings with NaN": (_text(CONFIG, b'{"r": NaN}'), "is no JSON object"),
    "settings in no UTF-8": (_text(CONFIG, b"\xff\xfe{}"), "no text in UTF-8"),
    "2 MB of settings": (_text(CONFIG, b" " * (2 << 20)), "is over 1,048,576 bytes"),
    "another kind": (_set(peft_type="LOHA"), "is of the kind 'LOHA'"),
    "another task": (_set(task_type="SEQ_CLS"), "is of the task 'SEQ_CLS'"),
    "DoRA": (_set(use_dora=True), "columns have lengths of their own (DoRA)"),
    "modules beside it": (_set(modules_to_save=["lm_head"]), "whole modules of the base"),
    "biases": (_edit(_biases), "biases of the base"),
    "biases of its own": (_set(lora_bias=True), "its products have biases"),
    "rows of the embedding": (_set(trainable_token_indices=[1]), "rows of the embedding"),
    "layers twice": (_set(layer_replication=[[0, 1], [0, 1]]), "its base has layers twice"),
    "a base that was changed": (_set(init_lora_weights="pissa"), "were changed as it began"),
    "a start that is no word": (_set(init_lora_weights={"a": 1}), "were changed as it began"),
    "a setting of tomorrow": (_set(use_more=True), "no adapter here has that"),
    "an expression among alphas": (_set(alpha_pattern={"(a+)+$": 2}), "only names of modules"),
    "an alpha that is none": (_set(lora_alpha=-1), "which scales nothing"),
    "alphas that are none": (_set(alpha_pattern={"q_proj": "2"}), "only names of modules"),
    "a rank that is none": (_set(r=True), "which is no rank"),
    "patterns that are a list": (_set(rank_pattern=[2]), "no mapping of modules"),
    "targets that are numbers": (_set(target_modules=[1]), "no name of a module"),
    "layers that are none": (_set(layers_to_transform=["all"]), "layers_to_transform"),
}


@pytest.mark.parametrize(("spoil", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_adapter_of_this_base_is_refused_by_name(run, folder, tmp_path, spoil, words):
    spoil(folder)
    refused(importing(run, folder, tmp_path / "run", **EASY), words)


def refused(parts, words: str) -> None:
    """Check that an import is refused in one or two sentences with these words, and that nothing of
    it stays."""
    made = parts.new("train_experts", GUEST)
    with pytest.raises(DataError) as caught:
        family.expert(parts.cfg, parts, GUEST).write(made)
    told = str(caught.value)
    assert words in told, told
    assert GUEST in told and "\n" not in told and told.isprintable() and len(told) < 450
    assert not list(made.rglob("adapter_model.safetensors"))


def test_an_adapter_of_another_base_is_told_by_text_of_its_domain(run, taught, tokenizer, tmp_path):
    other = run_of(tmp_path / "other", tokenizer, seed=8)
    words = "nothing proves that it was trained on this base"
    # Made to be plain: what is learned on a few rows of a tiny base says little of any
    strong = Path(shutil.copytree(taught, tmp_path / "strong"))
    change(strong, lora_alpha=64)
    refused(importing(other, strong, tmp_path / "run"), words)
    assert imported(importing(other, strong, tmp_path / "easy", **EASY))


def test_too_large_an_adapter_is_refused_before_it_is_read_and_a_plan_looks(run, folder, tmp_path):
    padded(folder)
    parts = importing(run, folder, tmp_path / "run", expert__imported_bytes=10**9)
    with pytest.raises(DataError, match=r"over expert.imported_bytes \(1,000,000,000\)"):
        family.look_at_package(parts.cfg, GUEST)
    change(folder, use_dora=True)
    with pytest.raises(DataError, match="DoRA"):
        family.look_at_package(config(expert__imported={GUEST: str(folder)}), GUEST)
    family.look_at_package(parts.cfg, "alpha")


def test_without_text_there_is_nothing_to_fit_its_router_on(run, taught, tmp_path):
    domains = {"expert__domains": ("alpha", "guest"), "expert__imported": {"guest": str(taught)}}
    with pytest.raises(DataError, match=r"under expert\.imported_text\.guest"):
        family.look_at_package(config(**domains), "guest")
    (tmp_path / "sea.txt").write_text(" ".join(documents("sea", 60)))
    text = {"expert__imported_text": {"guest": (str(tmp_path / "sea.txt"),)}}
    shutil.copytree(run.root, tmp_path / "run")
    parts = FolderParts(config(**domains, **text, **EASY), tmp_path / "run", dict(run.metrics))
    made = parts.new("train_experts", "guest")
    metrics = family.expert(parts.cfg, parts, "guest").write(made)
    assert metrics["statistics"] == "of public text"
    parts.metrics["train_experts", "guest"] = metrics
    parts.metrics["train_router", None] = family.router(parts.cfg, parts).write(
        parts.new("train_router")
    )
    report = tables(parts.cfg, parts, quiet)
    assert report.experts == ("alpha", "guest") and set(report.domains) == set(small.DOMAINS)
    # Whose own text is not here is not asked to read a share of others'
    assert "alpha" in {each.name: each for each in report.criteria}["tertiary"].detail
