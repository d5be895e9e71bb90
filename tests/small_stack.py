"""A tiny random Qwen3-VL with random adapters: what the tests of stacked inference need, made in a
second.

Nothing is trained: random adapters already answer differently from each other and from the base.
"""

import json
import random
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import originals
import torch
from fakes import FolderParts
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw

from pipeline.data.routing import dataset
from pipeline.data.tasks import prepare
from pipeline.families.adapters import peft_io
from pipeline.families.adapters.base import LoadedBase
from pipeline.families.adapters.inference import GenerationLimits, MultiAdapterModel, Request
from pipeline.families.adapters.peft_io import peft_name
from pipeline.families.adapters.router import Calibration
from pipeline.families.adapters.stack import ROUTER, AdapterStack, ExpertInfo, Policy
from pipeline.families.load import parse
from pipeline.families.lora_vlm import base as lora_base
from pipeline.families.lora_vlm import family
from pipeline.families.lora_vlm.config import LoraVlmConfig
from pipeline.protocols import quiet
from pipeline.report import RequestReport
from pipeline.store.artifacts import save_tensors

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
EXPERTS = ("color", "count", "locate")
CORPUS = [
    "what color is the shape",
    "how many dots are there",
    "locate the square",
    "red green blue A B C Z",
] * 3
SIZES = SimpleNamespace(
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vision_hidden=32,
    vision_layers=2,
    vision_heads=2,
    vision_intermediate=48,
    vocab_size=320,
    initializer_range=0.125,
    seed=1,
)
BASE = SimpleNamespace(
    build=SIZES,
    dtype="float32",
    attn="sdpa",
    model=None,
    revision=None,
    image=SimpleNamespace(min_pixels=64 * 64, max_pixels=128 * 128),
)


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Return small pictures of different sizes with a few shapes each."""
    draw, out = random.Random(seed), []
    for _ in range(count):
        image = Image.new("RGB", (draw.choice((64, 96, 128)), draw.choice((64, 96))), "white")
        for _ in range(3):
            x, y = draw.randrange(image.width - 20), draw.randrange(image.height - 20)
            colour = tuple(draw.randrange(256) for _ in range(3))
            ImageDraw.Draw(image).ellipse([x, y, x + 20, y + 20], fill=colour)
        out.append(image)
    return out


def requests(count: int, seed: int = 0) -> list[Request]:
    """Return requests with no, one or two pictures and prompts of different lengths."""
    draw, made = random.Random(seed), iter(pictures(2 * count, seed))
    prompts = (
        "what color?",
        "how many dots are there in this picture, please?",
        "locate the square",
        "red or blue?",
    )
    return [
        Request(draw.choice(prompts), tuple(next(made) for _ in range(draw.choice((0, 1, 1, 2)))))
        for _ in range(count)
    ]


def built(folder: Path) -> Path:
    """Write a random base and its pin; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lora_base.write(BASE, CORPUS, folder)
    return folder


def opened(folder: Path) -> LoadedBase:
    """Open a built base."""
    return lora_base.open_base(folder, BASE)


def on(
    base: LoadedBase, targets: dict | None = None, limits: GenerationLimits | None = None
) -> MultiAdapterModel:
    """Put random adapters of different ranks on a base: one per expert and the router's; targets by
    name."""
    torch.manual_seed(0)
    model = None
    for i, name in enumerate((*EXPERTS, ROUTER)):
        shape = LoraConfig(
            r=2 + 2 * i,
            lora_alpha=16,
            target_modules=(targets or {}).get(name, TARGETS),
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        with warnings.catch_warnings():  # peft asks transformers in a way that it is leaving
            warnings.simplefilter("ignore", FutureWarning)
            if model is None:
                model = get_peft_model(base.model, shape, adapter_name=peft_name(name))
            else:
                model.add_adapter(peft_name(name), shape)
    return MultiAdapterModel(model, base.chat, limits or GenerationLimits(batch_rows=6))


def mixed(folder: Path) -> MultiAdapterModel:
    """Open a built base with random adapters."""
    return on(opened(folder))


def stack(
    mixed: MultiAdapterModel, threshold=0.0, top_k=2, fallback="base", temperature=1.0, none=True
) -> AdapterStack:
    """Return a stack on loaded adapters, with a choice for nobody's requests or without."""
    members = [
        ExpertInfo(name, "ABC"[i], name, f"answers about {name}", "exact", 4 + 2 * i)
        for i, name in enumerate(EXPERTS)
    ]
    labels = {member.name: member.label for member in members} | ({"none": "Z"} if none else {})
    calibration = Calibration(temperature, labels, "Which expert? Answer with one letter.")
    return AdapterStack(mixed, members, calibration, Policy(threshold, top_k, fallback))


DRAWN = {"color": "color", "count": "count", "locate": "locate"}
RUN = {
    "name": "small",
    "family": "lora_vlm",
    "seed": 3,
    "dtype": "fp32",
    "loras": {
        "base": {
            "build": vars(SIZES) | {"text": CORPUS},
            "dtype": "float32",
            "image": {"min_pixels": 4096, "max_pixels": 16384},
        },
        "defaults": {"steps": 1, "max_tokens": 256, "checkpointing": False},
        "experts": [
            {
                "name": name,
                "label": "ABC"[i],
                "metric": {"count": "count", "locate": "iou"}.get(name, "exact"),
                "dataset": {
                    "source": "synthetic",
                    "synthetic": {"kind": kind, "train": 24, "valid": 6, "test": 14, "size_px": 64},
                },
                "max_new_tokens": 4 + 2 * i,
            }
            for i, (name, kind) in enumerate(DRAWN.items())
        ],
        "router": {
            "none_label": "Z",
            "threshold": 0.4,
            "instruction": "Which expert? Answer with one letter.",
        },
    },
    "dataset": {
        "per_expert": {"train": 16, "valid": 4, "test": 6},
        "ambiguous_share": 0.5,
        "sources": [
            *({"expert": name, "from": "loras"} for name in EXPERTS),
            {
                "expert": "none",
                "from": "synthetic",
                "synthetic": {"kind": "pattern", "train": 24, "valid": 8, "test": 20},
            },
        ],
        "paraphrases": {
            name: {"seen": [f"{name} please", f"do {name}"], "held": [f"tell me the {name}"]}
            for name in EXPERTS
        }
        | {"none": {"seen": ["which pattern"], "held": ["what stripes"]}},
        "neutral": {"seen": ["what is it?", "look"], "held": ["what do you see?", "tell me"]},
    },
    "evaluate": {
        "rows_per_task": 8,
        "consistency_rows": 12,
        "baseline_rows": 32,
        "bootstrap": 50,
        "thresholds": [0.3, 0.6],
    },
}


_MADE: list[Path] = []  # the first run of this process; others are copies, which a test may change


def run(root: Path) -> tuple[LoraVlmConfig, FolderParts]:
    """Make every part of a small run in root, its adapters random."""
    cfg = parse(RUN)
    if not _MADE:
        first = originals.folder("stack")
        _make(cfg, first)
        _MADE.append(first)
    shutil.copytree(_MADE[0], root)
    return cfg, FolderParts(cfg, root)


def bundle(root: Path) -> Path:
    """Make a small run below root and its bundle, with a report of nothing; return the bundle."""
    cfg, parts = run(root / "parts")
    evaluated = parts.new("evaluate")
    report = RequestReport(run="small", family="lora_vlm").to_json()
    (evaluated / "report.json").write_text(report)
    (evaluated / "report.html").write_text("")
    folder = root / "bundle"
    folder.mkdir()
    family.bundle(cfg, parts, folder, quiet)
    return folder


def _make(cfg: LoraVlmConfig, root: Path) -> None:
    for name in cfg.tasks:
        (root / f"preprocess-{name}").mkdir(parents=True)
        prepare.prepare(cfg.task(name), cfg.loras.base.image, cfg.seed, root / f"preprocess-{name}")
    (root / "routing").mkdir()
    folders = {name: root / f"preprocess-{name}" for name in cfg.tasks}
    dataset.generate(cfg.dataset, folders, cfg.loras.labels, root / "routing")
    (root / "train_shared").mkdir()
    lora_base.write(cfg.loras.base, CORPUS, root / "train_shared")
    base = lora_base.open_base(root / "train_shared", cfg.loras.base)
    loaded = on(base)
    for name in (*EXPERTS, ROUTER):
        folder = root / ("train_router" if name == ROUTER else f"train_experts-{name}")
        for file, content in peft_io.files(loaded.model, name, base.pin, {}).items():
            _write(folder / file, content)
    calibration = Calibration(1.5, cfg.loras.labels, cfg.loras.router.instruction)
    _write(root / "train_router" / "calibration.json", calibration.values())


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_tensors(path, content)
    else:
        path.write_text(json.dumps(content))
