"""A whole ffn_moe run at the smallest sizes, without preprocess, store or processes: what the tests
of one family need.

Text is drawn so that each domain has its own favourite tokens; FolderParts keeps each training's
files in a folder.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import originals
from fakes import FakeRecorder, FolderParts
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.config.base import merge
from pipeline.data.text.shards import ShardWriter
from pipeline.families.ffn_moe import family
from pipeline.families.ffn_moe import train as ffn_moe
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.store.artifacts import save_tensors
from pipeline.train.loop import NoTraining, TrainIO, fit

DOMAINS = ("alpha", "beta", "gamma")
VOCAB, CONTEXT = 48, 8
FITTED = {
    "steps": 4,
    "batch_sequences": 4,
    "lr": 1e-2,
    "warmup_steps": 1,
    "eval_every_steps": 0,
    "eval_tokens": 96,
    "keep": "last",
}
SETTINGS = {
    "seed": 3,
    "dtype": "fp32",
    "partition": {"domains": DOMAINS},
    "tokenizer": {"vocab_size": 300},
    "trunk": FITTED
    | {
        "layers": 2,
        "d_model": 16,
        "heads": 2,
        "kv_heads": 1,
        "d_ff": 24,
        "context_tokens": CONTEXT,
    },
    "expert": FITTED | {"statistics_tokens": 256},
    "router": FITTED,
    "dense": {"baselines": ()},
    "joint": FITTED | {"experts": 3, "layers": (1,)},
    # no text of this run could be decoded: most tests have no tokenizer beside it
    "evaluate": {"tokens_per_domain": 200, "bootstrap": 50, "samples": 0},
}


def config(**changes) -> FfnMoeConfig:
    """Return a small configuration; changes are sections or dotted names with __
    (trunk__lr=1.0)."""
    raw = SETTINGS
    for name, value in changes.items():
        for part in reversed(name.split("__")):
            value = {part: value}
        raw = merge(raw, value)
    return FfnMoeConfig.model_validate(raw)


def write_shards(root: Path, domains=DOMAINS, vocab_size=VOCAB, documents=30) -> list[Path]:
    """Write token shards, a folder for each domain below root, in which domain i prefers the i-th
    part of the vocabulary; documents have 12 to 30 tokens. Returns the folders."""
    draw = np.random.default_rng(0)
    part = (vocab_size - 1) // len(domains)
    # Whatever tokenizer a test wants beside them
    (root / "tokenizer").mkdir(parents=True)
    folders = []
    for i, domain in enumerate(domains):
        folder = root / f"preprocess-{domain}"
        folder.mkdir(parents=True)
        writer = ShardWriter(folder, (domain,), vocab_size, end_id=0)
        for split, count in (("train", documents), ("valid", 8), ("test", 8)):
            for _ in range(count):
                length = int(draw.integers(12, 30))
                own = 1 + i * part + draw.zipf(1.5, length) % part
                ids = np.where(draw.random(length) < 0.8, own, draw.integers(1, vocab_size, length))
                writer.add(split, domain, ids.tolist(), document_bytes=3 * length)
        writer.finish()
        folders.append(folder)
    return folders


MAKERS = {
    "train_shared": ffn_moe.shared,
    "train_experts": family.expert,
    "train_router": ffn_moe.router,
    "train_dense": ffn_moe.dense,
    "train_joint": family.joint,
}


def up_to_an_expert(cfg: FfnMoeConfig, root: Path, tokenizer) -> FolderParts:
    """Train on new shards below root up to a run's first expert; its tokenizer is kept beside."""
    parts = FolderParts(cfg, root)
    write_shards(root, cfg.partition.names, vocab_size=tokenizer.vocab_size)
    tokenizer.save(parts.folder("tokenizer"))
    train(cfg, parts, "train_shared")
    train(cfg, parts, "train_experts", "alpha")
    return parts


def train(
    cfg: FfnMoeConfig, parts: FolderParts, stage: str, item: str | None = None
) -> SimpleNamespace:
    """Fit one of the family's trainings and keep its files in parts; returns task, metrics, rows,
    folder."""
    task = MAKERS[stage](cfg, parts, *(() if item is None else (item,)))
    recorder, folder = FakeRecorder(), parts.root / "-".join(filter(None, (stage, item)))
    if isinstance(task, NoTraining):
        folder.mkdir(parents=True, exist_ok=True)
        parts.metrics[stage, item] = task.write(folder)
        return SimpleNamespace(
            task=task, metrics=parts.metrics[stage, item], rows=[], folder=folder
        )
    place = TrainIO(
        parts.root / "slots" / folder.name, recorder, lambda: None, folder.name, "expert", 1e9, 1
    )
    parts.metrics[stage, item] = fit(task, place)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in task.export(parts.metrics[stage, item]["kept_step"]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content))
        else:
            save_tensors(folder / name, content)
    shutil.rmtree(place.slots)  # as the store does when an artifact is whole
    return SimpleNamespace(
        task=task, metrics=parts.metrics[stage, item], rows=recorder.rows, folder=folder
    )


def stock(parts: FolderParts) -> Qwen3ForCausalLM:
    """Return the base as transformers' own class, from its stored tensors alone."""
    settings = json.loads((parts.folder("train_shared") / "trunk.json").read_text())
    model = Qwen3ForCausalLM(Qwen3Config(**settings))
    tensors = parts.tensors("train_shared", "trunk.safetensors")
    tensors |= parts.tensors("train_shared", "dummy.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.eval()


def run(cfg: FfnMoeConfig, root: Path, baselines: bool = True) -> FolderParts:
    """Train everything a configuration asks for, in order, on new shards below root."""
    parts = FolderParts(cfg, root)
    write_shards(root, cfg.partition.names)
    train(cfg, parts, "train_shared")
    for name in cfg.experts:
        train(cfg, parts, "train_experts", name)
    train(cfg, parts, "train_router")
    for item in cfg.dense.baselines if baselines else ():
        train(cfg, parts, "train_dense", item)
    for item in cfg.joint.models:
        train(cfg, parts, "train_joint", item)
    return parts


# the first run of this process; later ones are copies, which a test may change
_TRAINED: list[FolderParts] = []


def trained(root: Path) -> FolderParts:
    """Return a whole run with every dense baseline."""
    if not _TRAINED:
        cfg = config(dense__baselines=("total", "path", "ffn", "wide", "scratch"))
        _TRAINED.append(run(cfg, originals.folder("trained")))
    first = _TRAINED[0]
    shutil.copytree(first.root, root)
    return FolderParts(first.cfg, root, dict(first.metrics))
