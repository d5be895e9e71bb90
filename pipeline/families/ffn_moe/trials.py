"""What a trial of experiments may make of an ffn_moe run: in which job its model ends, its size,
and its weights for others."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ...config.run import JobKey
from ...errors import ConfigError
from ...protocols import Progress
from ...store.reading import read_object
from ...store.tensor_header import Wanted, found_tensors
from .. import Parts
from .config import FfnMoeConfig
from .sections import ADAPTER
from .stages import MODEL_STAGES

SETTINGS = {"joint": "joint.models", "dense": "dense.baselines"}
MODEL = "model.safetensors"
EXPERTS = ".mlp.experts."  # in the names of what not every token runs


def model_job(cfg: FfnMoeConfig, makes: str) -> JobKey:
    """Return the job in which a trial's model ends: its validation rows are the model's. Raises
    ConfigError for what is not among this run's jobs."""
    kind, _, item = makes.partition(" ")
    if kind == "stack":
        if cfg.expert.form == ADAPTER:
            raise ConfigError(
                "makes: stack of adapters has no loss before it is evaluated, as one of them reads "
                "a whole text; set expert.form to full or low_rank"
            )
        return "train_router", None
    # Each of the stage's jobs is a model, which the second word names
    stage = MODEL_STAGES[kind]
    known = cfg.items(stage)
    if item not in known:
        there = ", ".join(f"{kind} {name}" for name in known) or f"no {kind} model"
        raise ConfigError(
            f"makes: {makes}: this run has {there}; name it in {SETTINGS[kind]}, or name another"
        )
    return stage, item


def score_job(cfg: FfnMoeConfig, makes: str) -> JobKey:
    """Return the job that measures a trial's model in units that any tokenizer's share."""
    return "score", makes.replace(" ", "_")


def token_job(cfg: FfnMoeConfig) -> JobKey:
    """Return the job that decides what a token is: losses a token of two trials compare where it is
    one and the same."""
    return "tokenizer", None


def model_sizes(cfg: FfnMoeConfig, parts: Parts, job: JobKey) -> tuple[int, int]:
    """Return the parameters of a trial's model that run per token, and all of them. Raises
    MissingArtifact, DamagedArtifact."""
    if job[0] == "train_router":
        return _stack_sizes(cfg, parts)
    found = _header(parts.folder(*job) / MODEL)
    active = 0.0
    total = 0
    for name, (_, shape) in found.items():
        numbers = prod(shape)
        total += numbers
        active += numbers * _share_run(cfg, name)
    return round(active), total


def _share_run(cfg: FfnMoeConfig, name: str) -> float:
    """Return the share of a tensor of its kind that runs for a token."""
    return cfg.joint.top_k / cfg.joint.experts if EXPERTS in name else 1.0


def _stack_sizes(cfg: FfnMoeConfig, parts: Parts) -> tuple[int, int]:
    from ...train.flops import Shape
    from .cost import expert_shape

    settings: Mapping[str, Any] = read_object(parts.folder("train_shared") / "trunk.json")
    shape = Shape.from_hf_config(settings, cfg.trunk.context_tokens)
    expert = expert_shape(cfg, shape)
    sizes = []
    # A kept anchor is an expert too
    for experts in (cfg.router.top_k, len(cfg.experts) + (cfg.trunk.anchor == "keep")):
        ffns = float(experts) if expert is None else shape.ffns(experts, expert)
        sizes.append(shape.stack_parameters(ffns))
    return sizes[0], sizes[1]


def _header(path: Path) -> Wanted:
    with path.open("rb") as file:
        return found_tensors(file, path.name, path.stat().st_size)


def write_model(
    cfg: FfnMoeConfig, parts: Parts, job: JobKey, folder: Path, progress: Progress
) -> None:
    """Write a dense model of a trial to an empty folder as a checkpoint that transformers opens.
    Raises MissingArtifact, DamagedArtifact, DiskFull."""
    from .. import ExportWish
    from .export.checkpoint import write_checkpoint
    from .export.job import Job
    from .export.tensors import streamed
    from .stock import dense_settings, run_tokenizer, text_start

    settings = read_object(parts.folder(*job) / "trunk.json")
    tokenizer = run_tokenizer(parts)
    start = text_start(cfg, tokenizer)
    wish = ExportWish("dense")
    written = Job(cfg, wish, settings, tokenizer, start, folder, progress)
    tensors = streamed(parts.tensors(job[0], MODEL, job[1]))
    write_checkpoint(written, folder, dense_settings(settings), tensors)
