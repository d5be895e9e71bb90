"""okaditya84/ModularForge driven from outside, from a path to its repository: nothing of it is here
or is changed.

Its default configuration counts; ours are only sizes, durations and folders. Its assembler's
default output crashes for a tied head, so its other format is asked for.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from modularforge.assembly.assembler import StreamingAssembler
from modularforge.config import ModularForgeConfig
from modularforge.data.dataset import TextDataset
from modularforge.model.assembled_model import AssembledMoEModel
from modularforge.model.module_trainer_model import ModuleTrainerModel
from modularforge.model.shared import SharedComponents
from modularforge.training.module_trainer import ModuleTrainer
from modularforge.training.shared_trainer import SharedTrainer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from benchmarks.measuring import Job
from benchmarks.peers.tokens import stream
from benchmarks.watching import Watch


class Tokens:
    """Stands in for its tokenizer: a text is the number of its tokens, and encodes to so many of
    the drawn ones."""

    pad_id = 0  # which its loss leaves out; no drawn token but the end of text is it

    def __init__(self, job: Job):
        self.stream = stream(job)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return so many tokens, as its data set calls it."""
        return [int(i) or 1 for i in self.stream[: int(text)]]


def train(job: Job, watch: Watch) -> None:
    """Train its shared components or one expert for the job's steps, one epoch of just so much
    text."""
    cfg = config(job)
    text = str(job.steps * job.sizes.step_tokens + 1)
    hook = register_optimizer_step_post_hook(lambda *_: watch.step())
    with TemporaryDirectory(dir=job.work) as folder:
        if job.task == "trunk":
            rows = TextDataset([text], Tokens(job), cfg.model.max_seq_len)
            workers = min(cfg.training.num_workers, 4)
            loader = DataLoader(
                rows, cfg.training.batch_size, shuffle=True, num_workers=workers, drop_last=True
            )
            found = SharedTrainer(cfg).train(loader, None, folder)
        else:
            path = str(_folder(job) / "shared.pt")
            found = ModuleTrainer(cfg, path, Tokens(job)).train_all([[text]], None, folder)[0]
    hook.remove()
    watch.nats.append(found["final_train_loss"])
    watch.extra["own_memory_claim_mb"] = found["peak_memory_mb"]


def config(job: Job) -> ModularForgeConfig:
    """Return its default configuration at the sizes of a job."""
    cfg, s = (
        ModularForgeConfig.from_yaml(Path(job.modularforge) / "configs" / "default.yaml"),
        job.sizes,
    )
    bundled = job.task in ("prepare", "bundle", "open")
    sizes = {
        "d_model": s.d_model,
        "n_heads": s.heads,
        "n_layers": s.layers,
        "d_ff": s.gelu_d_ff,
        "vocab_size": s.vocab_size,
        "max_seq_len": s.context_tokens,
        "n_experts": job.experts if bundled else 1,
        "top_k": min(2, job.experts),
    }
    sizes["top_k"] = min(2, sizes["n_experts"])
    for name, value in sizes.items():
        setattr(cfg.model, name, value)
    cfg.training.batch_size = job.micro or s.batch_sequences
    cfg.training.gradient_accumulation_steps = s.batch_sequences // cfg.training.batch_size
    cfg.training.epochs_shared = cfg.training.epochs_expert = 1
    cfg.data.tokenizer_vocab_size, cfg.assembly.output_format = s.vocab_size, "pytorch"
    return cfg


def prepare(job: Job) -> int:
    """Write its shared components and experts with random weights; return how many experts there
    are now."""
    cfg, folder = config(job), _folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "expert_0.pt").exists():
        shared = SharedComponents(cfg.model)
        torch.save(shared.state_dict(), folder / "shared.pt")
        shared.freeze()
        ModuleTrainerModel(shared, cfg.model, expert_idx=0).save_expert(str(folder / "expert_0.pt"))
    for number in range(1, job.experts):
        if not (folder / f"expert_{number}.pt").exists():
            shutil.copyfile(folder / "expert_0.pt", folder / f"expert_{number}.pt")
    return len(list(folder.glob("expert_*.pt")))


def bundle(job: Job, watch: Watch) -> None:
    """Assemble the first experts with its streaming assembler."""
    folder, path = _folder(job), _assembled(job)
    experts = [str(folder / f"expert_{i}.pt") for i in range(job.experts)]
    found = StreamingAssembler(config(job)).assemble(str(folder / "shared.pt"), experts, str(path))
    watch.extra |= {"bytes": path.stat().st_size, "own_memory_claim_mb": found["peak_memory_mb"]}


def open_bundle(job: Job, watch: Watch) -> None:
    """Load what it assembled, as its evaluation does, and ask it once."""
    model = AssembledMoEModel(config(job).model)
    model.load_from_checkpoint(str(_assembled(job)))
    watch.mark("opened")
    watch.extra["bytes"] = _assembled(job).stat().st_size
    with torch.no_grad():
        model.eval()(torch.ones(1, job.sizes.context_tokens, dtype=torch.long))


def _folder(job: Job) -> Path:
    return Path(job.work) / "modularforge"


def _assembled(job: Job) -> Path:
    return Path(job.work) / "bundles" / f"modularforge-{job.experts}.pt"
