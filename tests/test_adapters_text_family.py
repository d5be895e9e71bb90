"""A family of adapters on a text model, from its own settings, base and functions alone: what
adapters/ asks of a family, and that it knows nothing of pictures."""

import ast
import json
import re
from pathlib import Path
from typing import Literal

import pytest
import torch
from fakes import FolderParts, train_io
from lora_small import write
from pydantic import Field
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from pipeline.config.base import Section
from pipeline.families.adapters import bundle, stack
from pipeline.families.adapters.base import (
    LoadedBase,
    ModelKind,
    load_model,
    pin_base,
    pinned_files,
)
from pipeline.families.adapters.build import END, START, save_model, train_tokenizer
from pipeline.families.adapters.chat import Chat
from pipeline.families.adapters.config import AdapterRunConfig
from pipeline.families.adapters.cost import DecoderSizes, job_cost
from pipeline.families.adapters.evaluate import evaluate
from pipeline.families.adapters.inference import Request
from pipeline.families.adapters.rows import make_routing_set, prepare_task
from pipeline.families.adapters.sections import AdapterBaseConfig, AdaptersConfig
from pipeline.families.adapters.train import expert_task, router_task
from pipeline.protocols import quiet
from pipeline.store.artifacts import write_text
from pipeline.train.loop import fit

# config


class BuildConfig(Section):
    """Sizes of a random Qwen3."""

    hidden: int = 64
    layers: int = 2
    vocab_size: int = 400
    seed: int = 0


class TextBaseConfig(AdapterBaseConfig):
    """The frozen text model."""

    build: BuildConfig | None = None


class TextAdaptersConfig(AdaptersConfig):
    """A text model and the adapters over it."""

    base: TextBaseConfig


class LoraLmConfig(AdapterRunConfig):
    """A run of LoRA experts on a text model."""

    family: Literal["lora_lm"] = "lora_lm"
    loras: TextAdaptersConfig = Field()


# base

QWEN3 = ModelKind("Qwen3", "qwen3", Qwen3ForCausalLM)
TEMPLATE = (
    "{%- for turn in messages -%}<|im_start|>{{ turn.role + '\\n' + turn.content }}<|im_end|>\n"
    "{%- endfor -%}<|im_start|>assistant\n"
)


def build(base: TextBaseConfig, folder: Path, corpus: list[str]) -> None:
    """Write a random Qwen3 to folder."""
    sizes = base.build
    tokenizer = train_tokenizer(corpus, sizes.vocab_size, (START, END), TEMPLATE)
    torch.manual_seed(sizes.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.125,
    )
    save_model(Qwen3ForCausalLM(config), tokenizer, base.dtype, folder)


def open_base(folder: Path, base: TextBaseConfig) -> LoadedBase:
    """Open the base that is pinned in folder."""
    pin, where = pinned_files(folder, QWEN3)
    model = load_model(where, base, QWEN3)
    tokenizer = Qwen2Tokenizer.from_pretrained(where)
    return LoadedBase(model, Chat(tokenizer), pin, DecoderSizes.of_config(model.config.to_dict()))


# family


def shared(cfg: LoraLmConfig, folder: Path) -> dict:
    """Pin the base."""
    base = cfg.loras.base
    return pin_base(base, folder, QWEN3, lambda where: build(base, where, CORPUS))


def base_of(cfg: LoraLmConfig, parts: FolderParts) -> LoadedBase:
    """Open the run's base."""
    return open_base(parts.folder("train_shared"), cfg.loras.base)


def cost(cfg: LoraLmConfig, stage: str, item: str | None):
    """Return what a training will spend."""
    sizes = DecoderSizes(2, 64, 64, 32, 128, 400, tied=True)
    return job_cost(cfg, stage, item, {}, sizes, lambda _name: 24)


def reassemble(folder: Path) -> stack.AdapterStack:
    """Build the stack from a bundle."""
    kept = bundle.base_in(folder)
    settings = TextBaseConfig.model_construct(dtype=kept["dtype"], attn=kept["attn"])
    return bundle.reassemble(folder, open_base(folder, settings))


# a run of it

WORDS = ["red", "green", "blue", "black", "white", "yellow", "orange", "purple", "brown", "grey"]
ASK = {"opposite": "Say the word after {}.", "repeat": "Repeat {} for me."}
INSTRUCTION = "Which expert? Answer with one letter."
CORPUS = [*WORDS, *ASK.values(), INSTRUCTION, "A B"] * 3


def rows_of(name: str) -> list[dict]:
    """Return a task's rows: one repeats a word, one says the word that comes after it."""
    rows = []
    for number in range(96):
        word = WORDS[number % len(WORDS)]
        after = WORDS[(number + 1) % len(WORDS)]
        prompt = f"{ASK[name].format(word)} Number {number}."
        rows.append({"prompt": prompt, "answer": word if name == "repeat" else after})
    return rows


def settings(root: Path) -> dict:
    """Return the settings of a small run."""
    experts = []
    for name, label in (("opposite", "A"), ("repeat", "B")):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows_of(name))) + "\n")
        data = {"source": "jsonl", "path": str(root / f"{name}.jsonl"), "pictures": "none"}
        experts.append({"name": name, "label": label, "dataset": data, "max_new_tokens": 6})
    defaults = {"steps": 160, "batch_sequences": 8, "lr": 1e-2, "r": 16, "dropout": 0.0}
    return {
        "name": "text",
        "dtype": "fp32",
        "runtime": {"threads": 1},
        "loras": {
            "base": {"build": {}, "dtype": "float32"},
            "defaults": defaults | {"max_tokens": 64, "checkpointing": False},
            "experts": experts,
            "router": {"instruction": INSTRUCTION},
        },
        "dataset": {
            "per_expert": {"train": 40, "valid": 6, "test": 4},
            "sources": [{"expert": name, "from": "loras"} for name in ASK],
            "ambiguous_share": 0.0,
            "short": "accept",
        },
        "evaluate": {"rows_per_task": 8, "bootstrap": 20, "baseline_rows": 16},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(configuration, parts) of a run whose two experts and router are trained."""
    root = tmp_path_factory.mktemp("text")
    cfg = LoraLmConfig.model_validate(settings(root))
    parts = FolderParts(cfg, root)
    for name in cfg.experts:
        prepare_task(cfg, name, parts.new("preprocess", name), quiet)
    shared(cfg, parts.new("train_shared"))
    make_routing_set(cfg, parts, parts.new("routing"), quiet)
    for item in (*cfg.experts, None):
        base = base_of(cfg, parts)
        task = expert_task(cfg, parts, item, base) if item else router_task(cfg, parts, base)
        slots = root / "slots" / (item or "router")
        metrics = fit(task, train_io(slots, save_every_s=1e9))
        folder = parts.new("train_experts", item) if item else parts.new("train_router")
        write(task.export(metrics["kept_step"]), folder)
    return cfg, parts


def test_experts_and_router_are_trained_assembled_and_answer(trained):
    cfg, parts = trained
    whole = stack.assemble(cfg, parts, base_of(cfg, parts))
    asked = [Request(row["prompt"]) for name in ASK for row in rows_of(name)[:12]]
    wanted = [row["answer"] for name in ASK for row in rows_of(name)[:12]]
    answers = whole.answer(asked)
    assert [answer.expert for answer in answers] == ["opposite"] * 12 + ["repeat"] * 12
    right = [answer.text == text for answer, text in zip(answers, wanted, strict=True)]
    assert sum(right) / len(right) >= 0.8


def test_it_is_measured_and_bundled_as_any_other(trained, tmp_path):
    cfg, parts = trained
    whole = stack.assemble(cfg, parts, base_of(cfg, parts))
    report = evaluate(cfg, parts, quiet, whole)
    assert report.family == "lora_lm" and len(report.adapters.tasks) == 2
    # a text has nothing that could be cropped: words and order of labels are all that is changed
    assert [row.change for row in report.routing.consistency] == ["other words", "order of labels"]
    folder = parts.new("evaluate")
    write_text(folder / "report.json", report.to_json())
    write_text(folder / "report.html", "<p>report</p>")
    opening = {"dtype": "float32", "attn": "sdpa"}
    metrics = bundle.bundle(
        cfg, parts, tmp_path, quiet, kind=QWEN3, opening=opening, media_name="attachment"
    )
    assert metrics["experts"] == 2
    asked = [Request(row["prompt"]) for row in rows_of("repeat")[:4]]
    again = reassemble(tmp_path)
    assert [a.text for a in again.answer(asked)] == [a.text for a in whole.answer(asked)]


def test_its_plan_has_a_cost(trained):
    cfg, _ = trained
    job = cost(cfg, "train_experts", "repeat")
    assert job.tokens == 160 * 8 * 24 and job.parameters > 0
    assert cost(cfg, "train_shared", None) is None


PICTURES = re.compile(r"image|picture|pixel|qwen3.?vl|(?<!re)vision|visual", re.IGNORECASE)
# file names of the Hub, a class of settings that data asks for, and what the settings' key is
KNOWN = {"preprocessor_config.json", "ImageLimitsConfig", "pictures"}


def test_adapters_name_nothing_of_pictures():
    """Neither in names nor in strings that are no docstrings."""
    found = []
    for file in sorted(Path(bundle.__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            for name in ("id", "attr", "arg", "name", "value"):
                word = getattr(node, name, None)
                if isinstance(word, str) and PICTURES.search(word) and word not in KNOWN:
                    found.append(f"{file.name}:{node.lineno}: {word[:60]}")
    assert found == []
