"""A bundle is a stock checkpoint: transformers and sha256sum read it, memory stays flat.

B sequences, T tokens, V vocabulary, D model width, E experts.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import FolderParts, flip, told, traces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.errors import DamagedArtifact, MismatchError, MissingArtifact, NewerStore
from pipeline.families.ffn_moe.bundle import bundle as ffn_bundle
from pipeline.families.ffn_moe.bundle import reassemble, stock_settings
from pipeline.families.ffn_moe.stack import assemble
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.report import LanguageReport, read
from pipeline.run import backend, dry_run, stages
from pipeline.run.job import run_job
from pipeline.store import bundle
from pipeline.store.artifacts import Store, inventory
from pipeline.store.versions import served_folder
from tests import small
from tests.test_parity import made
from tests.written import planned, weight_bytes

IDS_BT = torch.randint(40, (3, small.CONTEXT), generator=torch.Generator().manual_seed(1))


def bundle_of(cfg, parts, folder: Path, model: Tokenizer | None = None) -> Path:
    """Bundle a small run, given a tokenizer (none: one of words) and a report to go with it."""
    parts = FolderParts(cfg, parts.root)
    if model is None:
        words = {f"w{i}": i for i in range(small.VOCAB)}
        model = Tokenizer(models.WordLevel(words, unk_token="w1"))
        model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(parts.root / "tokenizer" / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0"}
    (parts.root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about))
    (parts.root / "evaluate").mkdir(exist_ok=True)
    report = LanguageReport(run=cfg.name, family=cfg.family)
    (parts.root / "evaluate" / "report.json").write_text(report.to_json())
    (parts.root / "evaluate" / "report.html").write_text("<!doctype html>")
    folder.mkdir()
    ffn_bundle(cfg, parts, folder, quiet)
    return folder


def logits_of(stack) -> torch.Tensor:
    """Return logits_BTV of our own stack."""
    with torch.no_grad():
        return stack.trunk.hidden(IDS_BT, stack.mixture) @ stack.trunk.head.T


VARIANTS = {
    "as it comes": ("qwen3", True, {}),
    "untied": ("qwen3", False, {}),
    "heads of another width": ("qwen3", True, {"trunk__head_dim": 6}),
    "anchor": ("qwen3", True, {"trunk__anchor": "keep"}),
    "top-1": ("qwen3", True, {"router__top_k": 1}),
    "all active": ("qwen3", True, {"router__top_k": 3}),
    "temperature": ("qwen3", True, {"router__temperature": {"start": 4.0, "end": 2.0}}),
    "gates alike": ("qwen3", True, {"router__init": "uniform", "router__steps": 0}),
    "coordinated": (
        "qwen3",
        True,
        {"expert__coordinate": True, "router__init": "rows", "trunk__anchor": "keep"},
    ),
    "low rank": ("qwen3", True, {"expert__form": "low_rank"}),
    "low rank, last layer, anchor": (
        "qwen3",
        True,
        {"expert__form": "low_rank", "expert__layers": "last:1", "trunk__anchor": "keep"},
    ),
    "first layer": ("qwen3", False, {"expert__layers": [0]}),
    "llama, low rank, last layer": (
        "llama",
        False,
        {"expert__form": "low_rank", "expert__layers": "last:1"},
    ),
    "llama": ("llama", False, {"trunk__anchor": "keep"}),
    "mistral": ("mistral", True, {"router__top_k": 1}),
}


@pytest.mark.parametrize(("kind", "tied", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_it_and_computes_what_the_stack_computes(kind, tied, changes, tmp_path):
    cfg, parts = made(tmp_path, kind, tied, **changes)
    folder = bundle_of(cfg, parts, tmp_path / "bundle")
    found = planned(cfg, None, small.VOCAB)
    assert weight_bytes(folder) == pytest.approx(found.written_bytes, rel=0.05)
    wanted = logits_of(assemble(cfg, parts))
    shutil.rmtree(parts.root)  # a bundle needs nobody
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == (
        "Qwen3MoeForCausalLM" if kind == "qwen3" else "MixtralForCausalLM"
    )
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS_BT).logits, wanted, rtol=0, atol=1e-5)
    # as it was assembled to the last bit, but for merged deltas, which round
    far = 1e-5 if cfg.expert.delta_rank or cfg.expert.layers != "all" else 0
    torch.testing.assert_close(logits_of(reassemble(folder)), wanted, rtol=0, atol=far)
    start = [] if cfg.trunk.init else [0]
    assert AutoTokenizer.from_pretrained(folder)("w3 w1 w4").input_ids == [*start, 3, 1, 4]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 0
    assert wanted.std() > 0.1


def test_a_misnamed_expert_would_show(tmp_path):
    """The comparison above is no formality: two experts that change places change the logits."""
    cfg, parts = made(tmp_path, "qwen3", True)
    folder = bundle_of(cfg, parts, tmp_path / "bundle")
    wanted = logits_of(reassemble(folder))
    described = bundle.about(folder)
    described["experts"] = described["experts"][::-1]
    (folder / bundle.ABOUT).write_text(json.dumps(described))
    with pytest.raises(
        DamagedArtifact, match=r"does not hold the stack that its experts\.json describes"
    ):
        reassemble(folder)  # the tensors' names say which expert they are
    index = folder / "model.safetensors.index.json"
    gates = load_file(folder / "model-router.safetensors")
    save_file(
        {n: g.flip(0) for n, g in gates.items()},
        folder / "model-router.safetensors",
        {"format": "pt"},
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(IDS_BT).logits - wanted).abs().max() > 1e-3
    assert index.exists()


def test_what_other_readers_look_for_is_there(bundled):
    cfg, folder = load(bundled[0]), bundled[2]
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["architectures"] == ["Qwen3MoeForCausalLM"] and config["model_type"] == "qwen3_moe"
    )
    assert (
        config["num_experts"] == config["num_local_experts"] == 3
        and config["num_experts_per_tok"] == 2
    )
    assert (
        config["norm_topk_prob"] is True
        and config["decoder_sparse_step"] == 1
        and config["mlp_only_layers"] == []
    )
    assert config["moe_intermediate_size"] == cfg.trunk.d_ff and config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == cfg.trunk.rope_theta
    assert "_name_or_path" not in config
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {}
    for path in folder.glob("*.safetensors"):
        held |= {name: (path.name, tensor) for name, tensor in load_file(path).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in held.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in held.values())
    assert all(
        file.startswith("model") for file in index["weight_map"].values()
    )  # llama.cpp sees no others
    assert len(held) == 2 * 3 * 3 + 2 + len(load_file(folder / "model-trunk.safetensors"))


def test_a_stretched_context_is_told_to_old_readers_too():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    from tests.test_trunk import settings as sizes

    written = stock_settings(sizes("llama", rope_parameters=rope, eos_token_id=[0, 1]), 4, 2)
    assert written["rope_scaling"]["rope_type"] == "llama3" and written["rope_theta"] == 5e5
    from transformers import AutoConfig

    again = AutoConfig.for_model(**written)
    assert (
        again.rope_parameters["factor"] == 8.0 and again.num_local_experts == again.num_experts == 4
    )


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layers that differ in attention",
        ),
    ],
)
def test_a_trunk_that_no_stock_mixture_fits_is_refused_by_what_is_in_the_way(kind, changes, named):
    from tests.test_trunk import settings as sizes

    with pytest.raises(MismatchError, match=rf"the trunk \({kind}\) has {named}.* no place for"):
        stock_settings(sizes(kind) | changes, 3, 2)


def test_sha256sum_agrees_and_sees_every_change(bundled, tmp_path):
    folder = shutil.copytree(bundled[2], tmp_path / "copy")

    def checked() -> int:
        return subprocess.run(
            ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False
        ).returncode

    assert checked() == 0
    listed = set(bundle.read_sums(folder))
    assert listed == {p.name for p in folder.iterdir()} - {
        "SHA256SUMS",
        "made.json",
        "run.json",
        "manifest.json",
    }
    bundle.verify(folder)
    for name in sorted(listed):
        before = (folder / name).read_bytes()
        flip(folder / name)
        assert checked() == 1
        with pytest.raises(DamagedArtifact, match=f"{name} is not what was bundled") as error:
            bundle.verify(folder)
        assert "`python -m pipeline deploy` again, or copy it again" in told(error.value)
        (folder / name).write_bytes(before)
    (folder / "model-trunk.safetensors").unlink()
    with pytest.raises(DamagedArtifact, match=r"model-trunk\.safetensors cannot be read"):
        bundle.verify(folder)


def test_what_is_no_bundle_is_told_apart_from_a_damaged_or_newer_one(bundled, tmp_path):
    for missing in (tmp_path, tmp_path / "nowhere", bundled[0]):
        with pytest.raises(MissingArtifact, match="is not a bundle") as error:
            bundle.about(missing)
        assert "run `python -m pipeline deploy`" in told(error.value)
    folder = shutil.copytree(bundled[2], tmp_path / "copy")
    (folder / "SHA256SUMS").write_text("0" * 64 + "  ../experts.json\n")
    with pytest.raises(DamagedArtifact, match="not a list of sha256 sums"):
        bundle.read_sums(folder)
    shutil.copy(bundled[2] / "SHA256SUMS", folder)
    (folder / "experts.json").write_text(json.dumps(bundle.about(bundled[2]) | {"format": 5}))
    with pytest.raises(NewerStore, match=r"format 5.*up to 4"):
        bundle.about(folder)
    (folder / "experts.json").write_text("[]")
    with pytest.raises(DamagedArtifact, match=r"experts\.json cannot be read"):
        bundle.about(folder)


def overwrite(path: Path) -> None:
    """Write other bytes into a file that stays where it is, as save_pretrained and cp do."""
    with path.open("r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(bytes(byte ^ 255 for byte in data[:4096]))


def test_whoever_writes_into_a_bundle_does_not_write_into_the_store(bundled, tmp_path):
    path, store_path, folder = bundled
    store = Store(shutil.copytree(store_path, tmp_path / "store"))
    shutil.rmtree(store.folder(folder.name))
    again = run_job("deploy", load(path), store, progress=quiet)
    assert again.digest == Store(store_path).manifest(folder.name).digest
    made = store.folder(again.address)
    others = [
        p for p in (store.root / "artifacts").rglob("*") if p.is_file() and made not in p.parents
    ]
    before = {p: p.read_bytes() for p in others}
    for file in made.rglob("*"):
        assert file.stat().st_nlink == 1 and file.stat().st_mode & 0o044 == 0o044
        overwrite(file)
    assert before == {p: p.read_bytes() for p in others}


@pytest.mark.parametrize(
    "stage", ["train_shared", "train_experts", "train_router", "tokenizer", "evaluate"]
)
def test_a_part_that_is_not_what_was_written_is_not_bundled(stage, bundled, tmp_path):
    path, store_path, folder = bundled
    cfg, store = load(path), Store(shutil.copytree(store_path, tmp_path / "store"))
    shutil.rmtree(store.folder(folder.name))
    names = {
        "train_shared": "trunk.safetensors",
        "train_experts": "expert.safetensors",
        "tokenizer": "tokenizer.json",
        "train_router": "router.safetensors",
        "evaluate": "report.html",
    }
    part = store.folder(stages.address(cfg, stage, cfg.items(stage)[-1])) / names[stage]
    flip(part)
    with pytest.raises(DamagedArtifact, match=f"{part.name} is not what was written"):
        run_job("deploy", cfg, store, progress=quiet)
    assert not store.has(folder.name)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__"
)
TENSORS = st.dictionaries(NAMES, st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shapes=TENSORS, half=st.booleans())
def test_a_rewritten_header_leaves_every_tensor_as_safetensors_wrote_it(
    shapes, half, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("renamed")
    tensors = {
        n: torch.randn(s, dtype=torch.bfloat16 if half else torch.float32)
        for n, s in shapes.items()
    }
    save_file(tensors, folder / "old.safetensors", {"format": "pt"})
    sums = inventory(folder)
    piece = bundle.BundleFile(
        "new.safetensors",
        folder / "old.safetensors",
        sums["old.safetensors"]["sha256"],
        "é{}".format,
    )
    placed = bundle._place(piece, folder / piece.name)
    found = load_file(folder / "new.safetensors")
    assert found.keys() == {f"é{n}" for n in tensors}
    assert all(torch.equal(found[f"é{n}"], t) for n, t in tensors.items())
    assert placed == inventory(folder)["new.safetensors"]["sha256"]


@pytest.mark.parametrize(
    "content", [b"", b"\x05", (1 << 60).to_bytes(8, "little"), b"\x02" + 7 * b"\0" + b"{}"[:1]]
)
def test_what_has_no_safetensors_header_is_said_to_have_none(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    piece = bundle.BundleFile("y.safetensors", tmp_path / "x.safetensors", "", str.upper)
    with pytest.raises(DamagedArtifact, match="no safetensors header"):
        bundle._place(piece, tmp_path / "y.safetensors")


GROWTH = """
import hashlib, json, sys
from pathlib import Path
from pipeline.store import bundle
from pipeline.store.bundle import BundleFile, write
from pipeline.train import memory_meter

bundle.BLOCK_BYTES = 1 << 20
folder, experts, size = Path(sys.argv[1]), int(sys.argv[2]), 8 << 20
header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
source = folder / "expert.safetensors"
with source.open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + size)
with source.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
pieces = [
    BundleFile(f"e{i}.safetensors", source, digest, f"e{i}.{{}}".format) for i in range(experts)
]
(folder / "bundle").mkdir()
# the mark would be the parent's else: it outlives exec
Path("/proc/self/clear_refs").write_text("5")
before = memory_meter._status("VmRSS")
made = write(folder / "bundle", pieces, {}, lambda *_: None)
assert made["bytes"] > experts * size
print(memory_meter._status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="asks the Linux kernel")
def test_memory_does_not_grow_with_experts_nor_with_their_size(tmp_path):
    def growth_mb(experts: int) -> float:
        (tmp_path / str(experts)).mkdir()
        program = [sys.executable, "-c", GROWTH, tmp_path / str(experts), str(experts)]
        done = subprocess.run(
            program, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
        )
        return int(done.stdout) / 1e6

    few, many = growth_mb(1), growth_mb(6)
    assert few > 0.5 and many < 6, "a block or two of 1 MB, less than one expert of 8 MB"
    assert many - few < 2


def test_deploy_is_a_stage_of_its_own_and_its_upload_changes_no_address(bundled, tmp_path):
    path, store_path, folder = bundled
    cfg, target = load(path), tmp_path / "target"
    sent = load(path, (f"deploy.upload={target}",))
    assert stages.address(sent, "deploy") == stages.address(cfg, "deploy") == folder.name
    assert stages.address(load(path, ("router.top_k=1",)), "deploy") != folder.name
    assert "deploy" not in stages.RUN and folder.name in set(stages.Addresses(cfg).reachable())
    assert all("deploy" not in e.address for e in dry_run.plan(cfg, Store(store_path)))
    before = traces(store_path)
    local = backend.Local(Store(store_path).open())
    assert not target.exists()
    backend.run_stage("deploy", sent, local)  # the bundle is there, the copy is not
    bundle.verify(served_folder(target))
    backend.run_stage("deploy", cfg, local)
    assert {k: v for k, v in traces(store_path).items() if "/locks/" not in k} == {
        k: v for k, v in before.items() if "/locks/" not in k
    }


def test_deploy_without_a_run_names_the_stage_to_run(tiny, store_path):
    with pytest.raises(MissingArtifact) as error:
        run_job("deploy", load(tiny), Store(store_path).open(), progress=quiet)
    assert "run `python -m pipeline tokenizer`" in told(error.value)


def test_the_card_has_every_row_of_quality_and_an_axis_for_every_win(bundled):
    folder = bundled[2]
    card, report = (
        (folder / "README.md").read_text(),
        read((folder / "report.json").read_text()),
    )
    lines = [line for line in card.splitlines() if line.startswith("|")]
    for row in report.quality:
        (line,) = [
            x
            for x in lines
            if x.replace("**", "").startswith(f"| {row.name} ") and f"{row.mean:.3f}" in x
        ]
        assert all(f"{bits:.3f}" in line for bits in row.bits_per_byte.values())
    assert len(report.wins) >= 4
    for win in report.wins:
        assert any(f"| {win.against} | {win.axis} | {win.verdict} |" in x for x in lines)
    for name, text in (
        ("sea", "model-expert-000-sea.safetensors"),
        ("hall", "train_experts-hall-"),
    ):
        assert any(f"| {name} | {name} |" in x and text in x for x in lines)
    assert (
        card.startswith("---\nlibrary_name: transformers\n") and "pipeline serve --bundle" in card
    )
