"""LoRA experts on a vision-language model: what each of the trainings is, and how the stack is put together.

Invariant: the base is never written to and never trained; every training starts from the same pinned base and leaves
one adapter, which knows the base that it belongs to.

B requests, K labels.
"""

import zlib
from pathlib import Path

from ..budget import cores, has_bf16
from ..config import LoraConfig
from ..config.loras import RouterEntry
from ..data import drawn, tasks
from ..data import routing as routing_set
from ..errors import PipelineError
from ..train import Given, Task
from .lora_adapters import label_ids
from .lora_base import Opened, open_base, write
from .lora_cost import cost
from .lora_router import CALIBRATION, calibrate, routing_prompt
from .lora_rows import Example
from .lora_training import Training

__all__ = [
    "assemble", "bundle", "cost", "dense", "encode", "expert", "measure", "prepare", "reassemble", "route_data",
    "router", "shared", "survey",
]  # fmt: skip

SPLITS = ("train", "valid")
CALIBRATION_ROWS = 4096  # most validation requests that the temperature is fitted on


def survey(_cfg: LoraConfig, _parts: Path, _jobs: int, _say) -> int:
    """Return 0: each task's preprocess is a job of its own, and is not split further."""
    return 0


def encode(_cfg: LoraConfig, _parts: Path, _number: int, _say) -> None:
    """Raise PipelineError: no survey of this family asks for it."""
    raise PipelineError("lora_vlm splits no preprocess: this is a fault of the stages, please report it")


def prepare(cfg: LoraConfig, folder: Path, say, _parts: Path, item: str) -> dict:
    """Write one task's rows and pictures to folder; return metrics. Raises DataError."""
    threads = cfg.runtime.threads
    processes = threads if isinstance(threads, int) and threads else cores()
    return tasks.prepare(cfg.task(item), cfg.loras.base.image, cfg.seed, folder, say, processes)


def shared(cfg: LoraConfig, _parts) -> Given:
    """Return how the base is pinned; one of given sizes is built. It needs no training."""
    base = cfg.loras.base
    asked = [RouterEntry.model_fields["instruction"].default]
    own = base.build.text if base.build else ()
    return Given(lambda folder: write(base, [*drawn.corpus(), *own, *asked * 3], folder))


def route_data(cfg: LoraConfig, parts, folder: Path, say) -> dict:
    """Write the routing set from all tasks' rows to folder; return metrics. Raises ConfigError, DataError."""
    folders = {name: parts.folder("preprocess", name) for name in cfg.tasks}
    return routing_set.generate(cfg.dataset, folders, cfg.loras.labels, folder, say)


def expert(cfg: LoraConfig, parts, item: str) -> Task:
    """Return one expert's training: its adapter on its own task's rows, some asked in neutral words."""
    rows, options = tasks.TaskRows(parts.folder("preprocess", item)), cfg.loras.options(item)
    examples = {
        split: [
            Example(tuple(rows.folder / image for image in row.images), row.prompt, row.answer)
            for row in rows.rows(split)
        ]
        for split in SPLITS
    }
    training = _training(cfg, parts, item, cfg.section("train_experts", item))
    neutral = cfg.dataset.neutral.seen if options.neutral_share else ()
    about = {"label": cfg.loras.labels[item], "options": options.model_dump(mode="json")}
    return training.task(examples, neutral, about, dict)


def router(cfg: LoraConfig, parts) -> Task:
    """Return the router's training: its adapter answers each request of the routing set with a label."""
    rows, entry, labels = routing_set.RoutingRows(parts.folder("routing")), cfg.loras.router, cfg.loras.labels
    training = _training(cfg, parts, entry.name, cfg.section("train_router", None))
    ids = label_ids(training.chat.tokenizer, labels)
    found = {split: rows.rows(split) for split in SPLITS}
    examples = {
        split: [
            Example(tuple(rows.paths(row)), routing_prompt(entry.instruction, row.prompt), labels[row.expert])
            for row in some
        ]
        for split, some in found.items()
    }

    def calibration() -> dict:
        logits_BK = training.logits(examples["valid"][:CALIBRATION_ROWS], list(ids.values()))
        targets = [list(ids).index(row.expert) for row in found["valid"][:CALIBRATION_ROWS]]
        return {CALIBRATION: calibrate(logits_BK, targets, entry.instruction, labels).values()}

    options = cfg.loras.options(entry.name).model_dump(mode="json")
    about = {"labels": [list(pair) for pair in labels.items()], "instruction": entry.instruction, "options": options}
    return training.task(examples, (), about, calibration)


def dense(_cfg: LoraConfig, _parts, _item: str) -> Task:
    """Raise PipelineError: the base is the baseline here, and `train_dense` has no job."""
    raise PipelineError("lora_vlm trains no dense baseline: this is a fault of the stages, please report it")


def assemble(cfg: LoraConfig, parts):
    """Build the finished stack from its parts; see lora_stack.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for parts made on another base.
    """
    from . import lora_stack

    return lora_stack.assemble(cfg, parts)


def measure(cfg: LoraConfig, parts, say) -> dict:
    """Return the report's tables; see lora_tables."""
    from .lora_tables import tables

    return tables(cfg, parts, say)


def bundle(cfg: LoraConfig, parts, folder: Path, say) -> dict:
    """Write adapters, router and pin to folder; return metrics; see lora_bundle."""
    from . import lora_bundle

    return lora_bundle.bundle(cfg, parts, folder, say)


def reassemble(folder: Path):
    """Build the finished stack from a bundle alone; see lora_bundle."""
    from . import lora_bundle

    return lora_bundle.reassemble(folder)


def _training(cfg: LoraConfig, parts, name: str, where: str) -> Training:
    """Return a new adapter on the run's base, its labels checked before anything is trained for them."""
    opened: Opened = open_base(parts.folder("train_shared"), cfg.loras.base)
    label_ids(opened.processor.tokenizer, cfg.loras.labels)
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and has_bf16())
    seed = zlib.crc32(f"{cfg.seed}/{name}".encode())
    return Training(opened, name, cfg, seed=seed, bf16=bf16, where=where)
