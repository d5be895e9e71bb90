"""LoRA experts on a vision-language model: what each of the trainings is, and how the stack is put
together.

Invariant: the base is never written to and never trained; every training starts from the same
pinned base and leaves one adapter, which knows the base that it belongs to.

B requests, K labels.
"""

from pathlib import Path

from ...data.routing import dataset as routing_set
from ...data.sources import synthetic
from ...data.tasks import prepare as tasks
from ...hardware import cores, uses_bf16
from ...protocols import Progress
from ...report import RequestReport
from ...train.loop import NoTraining, Task
from .. import Parts
from ..adapters.base import LoadedBase
from ..adapters.chat import Example
from ..adapters.config import AdapterRouterConfig
from ..adapters.peft_io import label_ids
from ..adapters.router import CALIBRATION, calibrate, routing_prompt
from ..adapters.train import Training
from .base import open_base, write
from .config import LoraVlmConfig
from .cost import cost

__all__ = [
    "assemble",
    "bundle",
    "cost",
    "expert",
    "measure",
    "prepare",
    "reassemble",
    "route_data",
    "router",
    "shared",
]

SPLITS = ("train", "valid")
CALIBRATION_ROWS = 4096  # most validation requests that the temperature is fitted on


def prepare(cfg: LoraVlmConfig, _parts: Parts, folder: Path, progress: Progress, item: str) -> dict:
    """Write one task's rows and pictures to folder; return metrics. Raises DataError."""
    threads = cfg.runtime.threads
    processes = threads if isinstance(threads, int) and threads else cores()
    return tasks.prepare(
        cfg.task(item), cfg.loras.base.image, cfg.seed, folder, progress, processes
    )


def shared(cfg: LoraVlmConfig, _parts: Parts) -> NoTraining:
    """Return how the base is pinned; one of given sizes is built. It needs no training."""
    base = cfg.loras.base
    asked = [AdapterRouterConfig.model_fields["instruction"].default]
    own = base.build.text if base.build else ()
    return NoTraining(lambda folder: write(base, [*synthetic.corpus(), *own, *asked * 3], folder))


def route_data(cfg: LoraVlmConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write the routing set from all tasks' rows to folder; return metrics. Raises ConfigError,
    DataError."""
    folders = {name: parts.folder("preprocess", name) for name in cfg.tasks}
    return routing_set.generate(cfg.dataset, folders, cfg.loras.labels, folder, progress)


def expert(cfg: LoraVlmConfig, parts: Parts, item: str) -> Task:
    """Return one expert's training: its adapter on its own task's rows, some asked in neutral
    words."""
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


def router(cfg: LoraVlmConfig, parts: Parts) -> Task:
    """Return the router's training: its adapter answers each request of the routing set with a
    label."""
    rows, entry, labels = (
        routing_set.RoutingRows(parts.folder("routing")),
        cfg.loras.router,
        cfg.loras.labels,
    )
    training = _training(cfg, parts, entry.name, cfg.section("train_router", None))
    ids = label_ids(training.chat.tokenizer, labels)
    found = {split: rows.rows(split) for split in SPLITS}
    examples = {
        split: [
            Example(
                tuple(rows.paths(row)),
                routing_prompt(entry.instruction, row.prompt),
                labels[row.expert],
            )
            for row in some
        ]
        for split, some in found.items()
    }

    def calibration() -> dict:
        logits_BK = training.logits(examples["valid"][:CALIBRATION_ROWS], list(ids.values()))
        targets = [list(ids).index(row.expert) for row in found["valid"][:CALIBRATION_ROWS]]
        return {CALIBRATION: calibrate(logits_BK, targets, entry.instruction, labels).values()}

    options = cfg.loras.options(entry.name).model_dump(mode="json")
    about = {
        "labels": [list(pair) for pair in labels.items()],
        "instruction": entry.instruction,
        "options": options,
    }
    return training.task(examples, (), about, calibration)


def assemble(cfg: LoraVlmConfig, parts: Parts):
    """Build the finished stack from its parts; see lora_stack.

    Raises MissingArtifact, DamagedArtifact, or MismatchError for parts made on another base.
    """
    from ..adapters import stack

    return stack.assemble(cfg, parts)


def measure(cfg: LoraVlmConfig, parts: Parts, progress: Progress) -> RequestReport:
    """Return the report's tables; see lora_tables."""
    from ..adapters.evaluate import tables

    return tables(cfg, parts, progress)


def bundle(cfg: LoraVlmConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write adapters, router and pin to folder; return metrics; see lora_bundle."""
    from ..adapters import bundle as lora_bundle

    return lora_bundle.bundle(cfg, parts, folder, progress)


def reassemble(folder: Path):
    """Build the finished stack from a bundle alone; see lora_bundle."""
    from ..adapters import bundle as lora_bundle

    return lora_bundle.reassemble(folder)


def _training(cfg: LoraVlmConfig, parts: Parts, name: str, where: str) -> Training:
    """Return a new adapter on the run's base, its labels checked before anything is trained for
    them."""
    opened: LoadedBase = open_base(parts.folder("train_shared"), cfg.loras.base)
    label_ids(opened.processor.tokenizer, cfg.loras.labels)
    return Training(
        opened, name, cfg, seed=cfg.seed_of(name), bf16=uses_bf16(cfg.dtype), where=where
    )
