"""config/qwen3_8b.yaml from text to report on Modal, rehearsed: the real client and the real
containers, with a random Qwen3 of the same architecture and text of a test's own on the volume."""

import json
import random

import pytest
import torch
from rehearsal import LINUX, ROOT, heavy_modules, rehearsal
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.families.adapters.build import train_tokenizer
from pipeline.families.load import load

pytestmark = LINUX

CONFIG = ROOT / "config" / "qwen3_8b.yaml"
DOMAINS = ("law", "medicine", "science", "code", "literature")
SMALLER = {
    "data.source": "files",
    "data.min_document_bytes": 1,
    "data.valid_share": 0.1,
    "data.test_share": 0.1,
    "tokenizer.revision": None,
    "trunk.revision": None,
    "trunk.context_tokens": 16,
    "trunk.eval_tokens": 64,
    "expert.tokens": None,
    "expert.steps": 2,
    "expert.rank": 2,
    "expert.batch_sequences": 4,
    "expert.eval_tokens": 64,
    "expert.statistics_tokens": 64,
    "evaluate.tokens_per_domain": 64,
    "evaluate.bootstrap": 10,
    # of a model on the volume no sizes are known here, and so no cost
    "modal.max_cost_usd": None,
    "partition.min_tokens": 100,
    "runtime.threads": 1,
    "modal.app": "mine",
    "modal.volume": "mine",
}
# A machine that has the light requirements alone, as far as the client sees
WITHOUT = """
import sys
if sys.orig_argv[1:2] and sys.orig_argv[1].endswith("/modal"):
    sys.modules |= dict.fromkeys({names!r})
"""


def documents(domain: str) -> list[str]:
    """Return texts of words that a domain alone has."""
    draw = random.Random(domain)
    words = [f"{domain[: 2 + number % 3]}{number}" for number in range(20)]
    return [" ".join(draw.choices(words, k=30)) for _ in range(60)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder for the volume: a model of the architecture of Qwen3-8B, and text of each domain."""
    folder = tmp_path_factory.mktemp("inputs")
    everything = [text for domain in DOMAINS for text in documents(domain)]
    tokenizer = train_tokenizer(everything, 320, (), "{{ messages }}")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **sizes,
        **heads,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    for domain in DOMAINS:
        lines = [json.dumps({"text": text}) for text in documents(domain)]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def test_the_run_goes_from_text_to_report_with_a_small_model_of_that_architecture(tmp_path, inputs):
    store = tmp_path / "store"
    files = [{"paths": [f"{store}/inputs/{name}.jsonl"], "domain": name} for name in DOMAINS]
    changed = SMALLER | {
        "data.files": files,
        "trunk.init": f"{store}/inputs/model",
        "tokenizer.pretrained": f"{store}/inputs/model",
    }
    given = " ".join(f"'{name}={json.dumps(value)}'" for name, value in changed.items())
    # Typed elsewhere, into a volume of one's own, by a client without torch
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "sitecustomize.py").write_text(WITHOUT.format(names=heavy_modules()))
    place = {"MOLEFORGE_VOLUME_PATH": str(store), "PYTHONPATH": f"{ROOT}:{elsewhere}"}
    with rehearsal(tmp_path, elsewhere, HF_HUB_OFFLINE="1", **place) as modal:
        modal("volume", "create", "mine", "--version=2")
        modal("volume", "put", "mine", str(inputs), "/inputs")
        command = ("run", f"{ROOT}/modal_app.py::run_all", "--config", str(CONFIG), "--sequential")
        said = modal(*command, "--override", given)
        volume = modal.volume("mine")
        assert not modal.volume("moleforge").exists()
    assert "there is no torch here" in said
    assert f"next: modal run {ROOT}/modal_app.py::deploy --config" in said
    assert "H100 or H200" in said and "in all:" in said
    (report,) = volume.glob("artifacts/evaluate-*/report.json")
    assert json.loads(report.read_text("utf-8"))["experts"]
    trained = sorted(path.name for path in volume.glob("artifacts/train_experts-*"))
    assert [name.split("-")[1] for name in trained] == sorted(DOMAINS)


def test_the_model_and_every_set_of_text_are_pinned_by_a_commit():
    cfg = load(CONFIG)
    revisions = [cfg.trunk.revision, cfg.tokenizer.revision]
    revisions += [entry.revision for entry in cfg.data.hub]
    assert all(len(revision) == 40 and int(revision, 16) for revision in revisions)
    assert tuple(entry.domain for entry in cfg.data.hub) == cfg.partition.domains == DOMAINS
