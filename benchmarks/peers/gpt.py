"""An ordinary small GPT and its loop, written here for the peers that are settings rather than
programs.

LayerNorm, learned positions, GELU with two matrices, tied head, whole logits. B sequences, T
tokens, D model width.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measuring import Job, Sizes
from benchmarks.peers.tokens import batches
from benchmarks.watching import Watch


class Block(nn.Module):
    """Attention and feed-forward network of one layer, each before a residual sum."""

    def __init__(self, sizes: Sizes, bias: bool):
        super().__init__()
        d = sizes.d_model
        self.heads = sizes.heads
        self.before_attention, self.before_mlp = (
            nn.LayerNorm(d, bias=bias),
            nn.LayerNorm(d, bias=bias),
        )
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=bias), nn.Linear(d, d, bias=bias)
        up, down = (
            nn.Linear(d, sizes.gelu_d_ff, bias=bias),
            nn.Linear(sizes.gelu_d_ff, d, bias=bias),
        )
        self.mlp = nn.Sequential(up, nn.GELU(), down)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return x_BTD after this layer."""
        b, t, d = x_BTD.shape
        qkv = self.qkv(self.before_attention(x_BTD)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x_BTD + self.mlp(self.before_mlp(x_BTD))


class GPT(nn.Module):
    """The whole network: ids_BT to logits."""

    def __init__(self, sizes: Sizes, bias: bool):
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocab_size, sizes.d_model)
        self.places = nn.Embedding(sizes.context_tokens, sizes.d_model)
        self.blocks = nn.ModuleList(Block(sizes, bias) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.d_model, bias=bias)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (B, T, vocabulary)."""
        x_BTD = self.tokens(ids_BT) + self.places(
            torch.arange(ids_BT.shape[1], device=ids_BT.device)
        )
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD) @ self.tokens.weight.T


def trainable(model: GPT, task: str) -> list[nn.Parameter]:
    """Return the parameters that a task trains, everything else frozen: all of them, or the
    feed-forward networks."""
    if task == "expert":
        model.requires_grad_(False)
        for block in model.blocks:
            block.mlp.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def loop(
    job: Job, watch: Watch, model: nn.Module, optimizer: torch.optim.Optimizer, bf16: bool
) -> None:
    """Train for the job's steps, gradients accumulated over micro-batches and clipped at norm 1."""
    batch, sequences = batches(job), job.sizes.batch_sequences
    micro = job.micro or sequences
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(job.steps):
        nats = 0.0
        for at in range(0, sequences, micro):
            ids_BT = batch(min(micro, sequences - at)).to(job.device)
            with torch.autocast(job.device, torch.bfloat16) if bf16 else nullcontext():
                logits = model(ids_BT[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()) * (
                    len(ids_BT) / sequences
                )
            loss.backward()
            nats += loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.step(nats)
