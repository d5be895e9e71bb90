"""A plain PyTorch loop: fp32, AdamW as it comes; experts joined by loading every file and saving
one."""

from pathlib import Path

import torch

from benchmarks.measuring import Job
from benchmarks.peers.gpt import GPT, loop, trainable
from benchmarks.watching import Watch


def train(job: Job, watch: Watch) -> None:
    """Train the whole network, or only its feed-forward networks."""
    torch.manual_seed(0)
    model = GPT(job.sizes, bias=True).to(job.device)
    loop(job, watch, model, torch.optim.AdamW(trainable(model, job.task), lr=3e-4), bf16=False)


def prepare(job: Job) -> int:
    """Write a trunk and experts with random weights as torch files; return how many there are."""
    folder = _folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(job.experts) if not (folder / f"expert_{i}.pt").exists()]
    for number in missing:
        torch.manual_seed(number)
        model = GPT(job.sizes, bias=False)
        own = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." in name}
        torch.save(own, folder / f"expert_{number}.pt")
        if number == 0:
            torch.save(
                {n: t for n, t in model.state_dict().items() if n not in own}, folder / "trunk.pt"
            )
    return len(list(folder.glob("expert_*.pt")))


def bundle(job: Job, watch: Watch) -> None:
    """Join trunk and experts in one dictionary and save it."""
    folder = _folder(job)
    joined = torch.load(folder / "trunk.pt", weights_only=True)
    for number in range(job.experts):
        own = torch.load(folder / f"expert_{number}.pt", weights_only=True)
        joined |= {f"expert.{number}.{name}": tensor for name, tensor in own.items()}
    path = _joined(job)
    torch.save(joined, path)
    watch.extra["bytes"] = path.stat().st_size


def open_bundle(job: Job, watch: Watch) -> None:
    """Load what bundle saved."""
    path = _joined(job)
    joined = torch.load(path, weights_only=True)
    watch.extra |= {"bytes": path.stat().st_size, "tensors": len(joined)}


def _folder(job: Job) -> Path:
    return Path(job.work) / "plain"


def _joined(job: Job) -> Path:
    return Path(job.work) / "bundles" / f"plain-{job.experts}.pt"
