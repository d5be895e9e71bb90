"""nanoGPT's settings with a loop of our own: no code of it is here.

What it publishes: no biases, tied head, weight decay 0.1 on matrices only, betas 0.9 and 0.95,
gradients clipped at 1, learning rate 6e-4, compiled. Its bf16 autocast, which it turns off on a
CPU, is on here, to its advantage.
"""

import torch

from benchmarks.measuring import Job
from benchmarks.peers.gpt import GPT, loop, trainable
from benchmarks.watching import Watch


def train(job: Job, watch: Watch) -> None:
    """Train the whole network, or only its feed-forward networks; compiled when the job says so."""
    torch.manual_seed(0)
    model = GPT(job.sizes, bias=False).to(job.device)
    moves = trainable(model, job.task)
    matrices, vectors = [p for p in moves if p.ndim >= 2], [p for p in moves if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    fused = True if job.device == "cuda" else None  # as it does
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=6e-4, betas=(0.9, 0.95), fused=fused
    )
    loop(job, watch, torch.compile(model) if job.compiled else model, optimizer, bf16=True)
