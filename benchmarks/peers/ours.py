"""This project: pipeline.train.fit on the family's own tasks, and its bundle, with parts from a
plain folder.

`prepare` writes what earlier stages would have left: shards of drawn text, an untrained trunk,
random experts. E experts, D model width.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3ForCausalLM,  # noqa: F401 (imports count before)
)

from benchmarks.measuring import FORMS, MB, RANK, Job, write_files
from benchmarks.peers.tokens import DOCUMENT_TOKENS, END_ID, domain, draw, text_folder, windows
from benchmarks.watching import Watch
from pipeline import report
from pipeline.data.text import tokenizer
from pipeline.data.text.shards import ShardWriter
from pipeline.families.ffn_moe import bundle as ffn_bundle
from pipeline.families.ffn_moe import cost
from pipeline.families.ffn_moe import family as ffn_moe
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import load
from pipeline.hardware import uses_bf16
from pipeline.model.router import gate_name
from pipeline.protocols import quiet
from pipeline.store.artifacts import inventory, load_tensors, save_tensors, sha256
from pipeline.train.loop import NoTraining, TrainIO, fit
from pipeline.train.memory_meter import Peak, lower_mmap_threshold
from pipeline.train.optimizer_state import import_int8

MODEL = "model"  # the folder of a model that is pinned
STAGES = {
    "trunk": "train_shared",
    "expert": "train_experts",
    "low_rank": "train_experts",
    "adapter": "train_experts",
    "router": "train_router",
}


class Parts:
    """What a family sees of earlier stages, from the work folder of a benchmark."""

    progress = staticmethod(quiet)

    def __init__(self, root: Path, experts: int):
        self.root, self.experts = root, experts

    def folder(self, stage: str, item: str | None = None) -> Path:
        """Return the folder of a stage's files; routers are kept for each number of experts."""
        number = f"{self.experts}" if stage == "train_router" else None
        return self.root / "-".join(filter(None, (stage, item, number)))

    def manifest(self, stage: str, item: str | None = None) -> SimpleNamespace:
        """Return address, files and metrics as the store's manifest has them."""
        folder = self.folder(stage, item)
        files = json.loads((folder.with_suffix(".files.json")).read_text("utf-8"))
        return SimpleNamespace(address=f"{folder.name}-0123456789ab", files=files, metrics={})

    def file_sum(self, path: Path, _expected: str = "") -> str:
        """Return the sha256 of a file of a pinned model."""
        return sha256(path)

    def tensors(self, stage: str, name: str, item: str | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors of a file."""
        return load_tensors(self.folder(stage, item) / name)


class Rows:
    """A recorder that passes steps on to the watch."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def start(self, step: int) -> None:
        """Take note of nothing."""

    def row(self, row: dict) -> None:
        """Tell the watch of a step."""
        if "train_nats" in row:
            self.watch.step(row["train_nats"])

    def step_taken(self, step: int) -> None:
        """Take note of nothing."""

    def note(self, text: str) -> None:
        """Keep a note in the result."""
        self.watch.extra.setdefault("notes", []).append(text)


def ready(job: Job) -> None:
    """Import what a stage would import before it looks at its memory."""
    if config(job).may_keep_int8:
        import_int8()


def train(job: Job, watch: Watch) -> None:
    """Train trunk, expert or router as a stage does it, statistics at the end included."""
    peak = Peak()
    watch.clears(peak)
    lower_mmap_threshold()
    cfg, parts = config(job), Parts(Path(job.work), job.experts)
    item = domain(job.item) if STAGES[job.task] == "train_experts" else None
    watch.extra["predicted_mb"] = predicted(cfg, job.task, item) / MB
    stages = {
        "train_shared": ffn_moe.shared,
        "train_experts": ffn_moe.expert,
        "train_router": ffn_moe.router,
    }
    make = stages[STAGES[job.task]]
    task = make(cfg, parts, *([item] if item else []))
    with TemporaryDirectory(dir=job.work) as slots:
        place = TrainIO(
            Path(slots), Rows(watch), lambda: None, job.task, job.task, 1e9, 1, peak=peak
        )
        metrics = fit(task, place)
    watch.mark("fit")
    watch.extra["fit_mb"] = max(watch.extra["fit_mb"], metrics["peak_mb"])
    watch.extra["memory_plan"] = metrics["memory_plan"]
    task.export(metrics["kept_step"])


def predicted(cfg: FfnMoeConfig, task: str, item: str | None) -> int:
    """Return the peak that the plan promises for a task, in bytes."""
    return cost.cost(cfg, STAGES[task], item, None, uses_bf16(cfg.dtype)).peak_bytes


def config(job: Job) -> FfnMoeConfig:
    """Return the configuration of a job. Raises ConfigError for an override that does not fit."""
    s, names = job.sizes, [domain(i) for i in range(job.experts)]
    fitted = {
        "steps": job.steps,
        "batch_sequences": s.batch_sequences,
        "warmup_steps": 1,
        "lr": 3e-4,
        "eval_every_steps": 0,
        "eval_tokens": s.step_tokens,
        "keep": "last",
    } | ({"micro_batch_sequences": job.micro} if job.micro else {})
    trunk = {
        "layers": s.layers,
        "d_model": s.d_model,
        "heads": s.heads,
        "d_ff": s.d_ff,
        "context_tokens": s.context_tokens,
        "domains": names,
    }
    raw = {
        "dtype": "auto",
        "partition": {"domains": names},
        "tokenizer": {"vocab_size": s.vocab_size},
        "trunk": fitted | trunk,
        "expert": fitted | {"statistics_tokens": s.step_tokens},
        "router": fitted | {"top_k": min(2, job.experts)},
        "dense": {"baselines": []},
    }
    if job.pinned:
        pinned = ("domains", "context_tokens", "eval_tokens")
        raw["trunk"] = {key: raw["trunk"][key] for key in pinned}
        raw["trunk"] |= {"init": str(Path(job.work) / MODEL), "steps": 0}
        raw["trunk"]["statistics_tokens"] = s.step_tokens
    elif s.kv_heads:
        raw["trunk"]["kv_heads"] = s.kv_heads
    if job.task in FORMS:
        raw["expert"] |= {"form": job.task, "rank": RANK}
    if job.task == "adapter":
        # One for each text, chosen from statistics alone
        raw["router"] |= {"steps": 0, "top_k": 1, "prompt_tokens": min(64, s.context_tokens)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(json.dumps(raw))
        overrides = job.overrides
        if job.task == "prepare":
            # What an expert has a form for is said by the task that trains it
            overrides = tuple(each for each in overrides if not each.startswith("expert."))
        return load(path, overrides)


def prepare(job: Job) -> int:
    """Write text of all domains, the trunk and the experts that are not there yet; return how many
    experts are."""
    root = Path(job.work)
    if job.pinned and not (root / MODEL).exists():
        _write_model(job, root / MODEL)
    parts, cfg = Parts(root, job.experts), config(job)
    with _whole(root / "tokenizer") as folder:
        if folder:
            # A small one of the real kind: a bundle opens it, and its size is beside the tensors'
            tokenizer.train(job.sizes.vocab_size, ["a text"]).save(folder)
    for number in range(job.domains):
        with _whole(text_folder(job, number)) as folder:
            if folder:
                _write_text(job, number, folder)
    with _whole(parts.folder("train_shared")) as folder:
        made = ffn_moe.shared(cfg, parts) if folder else None
        if folder and isinstance(made, NoTraining):
            made.write(folder)
        elif folder:
            write_files(made.export(0), folder)
    if job.pinned:
        return 0
    like = parts.tensors("train_shared", "dummy.safetensors")
    for number in range(job.experts):
        with _whole(parts.folder("train_experts", domain(number))) as folder:
            if folder:
                _write_expert(parts, folder, like, number)
    gates = {
        gate_name(i): torch.randn(job.experts, job.sizes.d_model) for i in range(job.sizes.layers)
    }
    for stage, files in (("train_router", {"router.safetensors": gates}), ("evaluate", _EVALUATED)):
        with _whole(parts.folder(stage)) as folder:
            if folder:
                write_files(files, folder)
    return len(list(root.glob("train_experts-d??")))


def _write_model(job: Job, folder: Path) -> None:
    """Write a random model in bf16 as the Hub has it, with a tokenizer, which nobody asks here."""
    s = job.sizes
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.d_model,
        intermediate_size=s.d_ff,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads or s.heads,
        max_position_embeddings=s.context_tokens,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.train(s.vocab_size, ["a text"]).save(folder)


_EVALUATED = {
    "report.json": report.LanguageReport(run="benchmark", family="ffn_moe").model_dump(mode="json"),
    "report.html": {},
}


@contextmanager
def _whole(folder: Path) -> Iterator[Path | None]:
    """Give a new folder to fill unless it is there already; it gets its name and a list of its
    files when full."""
    if folder.exists():
        yield None
        return
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    folder.with_suffix(".files.json").write_text(json.dumps(inventory(part)))
    part.rename(folder)


def _write_expert(parts: Parts, folder: Path, like: dict[str, torch.Tensor], number: int) -> None:
    torch.manual_seed(number)
    own = {
        name: torch.randn_like(tensor, dtype=torch.float32).mul_(0.02).to(tensor.dtype)
        for name, tensor in like.items()
    }
    save_tensors(folder / "expert.safetensors", own)
    shutil.copyfile(
        parts.folder("train_shared") / "statistics.safetensors", folder / "statistics.safetensors"
    )


def _write_text(job: Job, number: int, folder: Path) -> None:
    """Write the shards of a domain."""
    s, name = job.sizes, domain(number)
    writer = ShardWriter(folder, (name,), s.vocab_size, END_ID)
    for split, count in (("train", windows(s)), ("valid", 2 * s.batch_sequences), ("test", 4)):
        ids = draw(s.vocab_size, count * s.context_tokens + 1, number).tolist()
        for at in range(0, len(ids), DOCUMENT_TOKENS):
            writer.add(
                split, name, ids[at : at + DOCUMENT_TOKENS], document_bytes=3 * DOCUMENT_TOKENS
            )
    writer.finish()


def bundle(job: Job, watch: Watch) -> None:
    """Write the bundle of the first experts."""
    folder = _bundle(job)
    folder.mkdir(parents=True)
    found = ffn_bundle.bundle(config(job), Parts(Path(job.work), job.experts), folder, quiet)
    watch.extra["bytes"] = found["bytes"]


def open_bundle(job: Job, watch: Watch) -> None:
    """Open the bundle, then ask it once: one context of tokens through the whole stack."""
    stack = ffn_bundle.reassemble(_bundle(job))
    watch.mark("opened")
    watch.extra["bytes"] = sum(path.stat().st_size for path in _bundle(job).iterdir())
    stack.token_loss(torch.ones(1, job.sizes.context_tokens, dtype=torch.long))


def _bundle(job: Job) -> Path:
    return Path(job.work) / "bundles" / f"ours-{job.experts}"
