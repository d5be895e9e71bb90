"""A lora_vlm run at the smallest sizes, without store or processes: what the tests of its training
side need.

Tasks are synthetic, the base is random; everything before the trainings is made once per process
and copied.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import originals
from fakes import FolderParts, train_io

from pipeline.config.base import merge
from pipeline.families.load import parse
from pipeline.families.lora_vlm import family
from pipeline.families.lora_vlm.config import LoraVlmConfig
from pipeline.protocols import quiet
from pipeline.store.artifacts import save_tensors
from pipeline.train.loop import fit

INSTRUCTION = "Which expert should handle this request? Answer with one letter."
SETTINGS = {
    "name": "small",
    "family": "lora_vlm",
    "seed": 3,
    "dtype": "fp32",
    "runtime": {"threads": 1},
    "loras": {
        "base": {
            "build": {
                "hidden": 64,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 16,
                "intermediate": 96,
                "vision_hidden": 32,
                "vision_layers": 2,
                "vision_heads": 2,
                "vision_intermediate": 64,
                "initializer_range": 0.125,
                "text": [INSTRUCTION],
            },
            "dtype": "float32",
            "image": {"min_pixels": 4096, "max_pixels": 16384},
        },
        "defaults": {
            "steps": 6,
            "batch_sequences": 4,
            "lr": 5e-3,
            "min_lr_share": 0.05,
            "warmup_steps": 2,
            "dropout": 0.0,
            "r": 8,
            "alpha": 16,
            "max_tokens": 128,
            "checkpointing": False,
            "eval_every_steps": 3,
            "eval_tokens": 300,
            "neutral_share": 0.3,
        },
        "experts": [
            {
                "name": name,
                "label": label,
                "max_new_tokens": 8,
                "dataset": {
                    "source": "synthetic",
                    "synthetic": {"kind": kind, "train": 24, "valid": 8, "test": 8},
                },
            }
            for name, label, kind in (("color", "A", "color"), ("dots", "B", "count"))
        ],
        "router": {"instruction": INSTRUCTION, "neutral_share": 0.0, "r": 8},
    },
    "dataset": {
        "per_expert": {"train": 16, "valid": 8, "test": 4},
        "sources": [{"expert": "color", "from": "loras"}, {"expert": "dots", "from": "loras"}],
        "neutral": {"seen": ["What do you see?", "Look at the picture."], "held": ["What is it?"]},
        "short": "accept",
    },
}


def config(**changes) -> LoraVlmConfig:
    """Return a small configuration; changes are dotted names with __ (loras__defaults__lr=1.0)."""
    raw = SETTINGS
    for name, value in changes.items():
        for part in reversed(name.split("__")):
            value = {part: value}
        raw = merge(raw, value)
    return parse(raw)


_PREPARED: list[Path] = []  # the folder that others copy


def prepared(root: Path, **changes) -> FolderParts:
    """Return a run whose data and base are made below root; changes may not touch those."""
    if not _PREPARED:
        cfg, first = config(), originals.folder("prepared")
        parts = FolderParts(cfg, first)
        for name in cfg.tasks:
            family.prepare(cfg, parts, parts.new("preprocess", name), quiet, name)
        family.shared(cfg, parts).write(parts.new("train_shared"))
        family.route_data(cfg, parts, parts.new("routing"), quiet)
        _PREPARED.append(first)
    shutil.copytree(_PREPARED[0], root, dirs_exist_ok=True)
    return FolderParts(config(**changes), root)


def task_of(parts: FolderParts, item: str):
    """Return the training of an expert, or of the router."""
    return (
        family.router(parts.cfg, parts)
        if item == "router"
        else family.expert(parts.cfg, parts, item)
    )


def train(parts: FolderParts, item: str, task=None, slots: Path | None = None) -> SimpleNamespace:
    """Fit one adapter and keep its files in parts; returns task, metrics, files, folder and history
    rows."""
    task = task or task_of(parts, item)
    here = train_io(slots or parts.root / "slots" / item, save_every_s=1e9)
    metrics = fit(task, here)
    files = task.export(metrics["kept_step"])
    stage = ("train_router",) if item == "router" else ("train_experts", item)
    folder = write(files, parts.path(*stage))
    return SimpleNamespace(
        task=task, metrics=metrics, files=files, folder=folder, rows=here.recorder.rows
    )


def write(files: dict, folder: Path) -> Path:
    """Write what a task exports, as the stages do; returns the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content, sort_keys=True))
        else:
            save_tensors(folder / name, content)
    return folder
