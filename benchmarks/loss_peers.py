"""Compare the loss of `pipeline/model/loss.py` with torch's own linear_cross_entropy.

python -m benchmarks.loss_peers --out benchmarks/loss_peers_epyc_2026-11-26.md

A pass is the loss of all tokens and its backward pass, with a head that is frozen (experts) or
trained (trunks). Contenders take turns in one process, each round in another order; a contender's
peak memory is that of a pass in a fresh process.

N tokens, D model width, V vocabulary.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from benchmarks.measuring import finish, hardware, progress, spread, table
from pipeline.model.chunks import chunk_of
from pipeline.model.loss import cross_entropy
from pipeline.train.memory_meter import Peak, lower_mmap_threshold

ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARIES = (2_048, 4_096, 32_768, 151_936)
WIDTHS = (128, 512)
HEADS = ("frozen", "trained")
OURS = "ours"
PLAIN = "torch, all logits"
CHUNKED = "torch, chunks"
SAME_CHUNKS = "torch, our chunks"
CONTENDERS = (OURS, PLAIN, CHUNKED, SAME_CHUNKS)
LEAST_S = 0.05  # of a turn: shorter passes are repeated
LONG_S = 5.0  # of a pass: a case with one that takes longer has one round
NOTES = """Ratios are within a round: median (least-most). Peak is the resident set of a pass above
the level at which inputs and the head's gradient were there. Far: how far the gradient of h is from
that of the same numbers in fp64, relative to its norm.
"""


@dataclass(frozen=True)
class Case:
    """One comparison."""

    vocab_size: int
    d_model: int
    dtype: str
    head: str
    tokens: int = 2_048

    @property
    def title(self) -> str:
        """The case for people."""
        return f"V {self.vocab_size:,}, D {self.d_model}, {self.dtype}, head {self.head}"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _arguments(argv)
    if args.peak:
        print(_peak_bytes(Case(**json.loads(args.peak[0])), args.peak[1]))
        return 0
    torch.set_num_threads(1)
    sections = []
    for vocab_size in args.vocabularies:
        for d_model in args.widths:
            for dtype in DTYPES:
                cases = [Case(vocab_size, d_model, dtype, head, args.tokens) for head in HEADS]
                sections += [section(case, measured(case, args.rounds)) for case in cases]
    ending = (
        f"{hardware(1, ('torch',))}. Milliseconds are the processor time of the process on its one "
        "thread, as other programs used the cores meanwhile: they slow all contenders of a round "
        "through the caches they share, so read ratios and their spread."
    )
    finish(
        args,
        "loss_peers",
        "Our chunked loss beside torch's linear_cross_entropy",
        "\n".join(sections),
        NOTES,
        ending,
    )
    return 0


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return h_ND, head_VD and target_N of a case, the same in every process."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    h_ND = torch.randn(case.tokens, case.d_model).to(dtype).requires_grad_(True)
    head_VD = (0.02 * torch.randn(case.vocab_size, case.d_model)).to(dtype)
    head_VD.requires_grad_(case.head == "trained")
    target_N = torch.randint(case.vocab_size, (case.tokens,))
    return h_ND, head_VD, target_N


def loss_of(name: str, case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a contender: from h_ND, head_VD and target_N to the summed nats."""
    if name == OURS:
        dtype = DTYPES[case.dtype]
        return lambda h_ND, head_VD, target_N: cross_entropy(h_ND, head_VD, target_N, dtype)
    options = {
        PLAIN: None,
        CHUNKED: LinearCrossEntropyOptions(),
        SAME_CHUNKS: LinearCrossEntropyOptions(batch_chunk_size=chunk_of(case.vocab_size)),
    }[name]

    def loss(h_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:
        return F.linear_cross_entropy(h_ND, head_VD, target_N, reduction="sum", options=options)

    return loss


def run_pass(name: str, case: Case, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Run one pass of a contender over (h_ND, head_VD, target_N); return the scalar nats."""
    h_ND, head_VD, target_N = tensors
    h_ND.grad = None
    if head_VD.grad is not None:
        # as in training, where gradients are summed in buffers that stay
        head_VD.grad.zero_()
    nats = loss_of(name, case)(h_ND, head_VD, target_N)
    (nats / case.tokens).backward()
    return nats.detach()


def distances(case: Case) -> dict[str, float]:
    """Return how far each contender's gradient of h is from that in fp64, relative to its norm."""
    h_ND, head_VD, target_N = inputs(case)
    exact_ND = h_ND.detach().double().requires_grad_(True)
    logits_NV = exact_ND @ head_VD.detach().double().T
    (F.cross_entropy(logits_NV, target_N, reduction="sum") / case.tokens).backward()
    found = {}
    for name in CONTENDERS:
        run_pass(name, case, (h_ND, head_VD, target_N))
        difference_ND = h_ND.grad.double() - exact_ND.grad
        found[name] = (difference_ND.norm() / exact_ND.grad.norm()).item()
    return found


def measured(case: Case, rounds: int) -> list[dict[str, float]]:
    """Return seconds of a pass by contender and round, after a round that is thrown away where
    passes are short."""
    tensors = inputs(case)
    if case.head == "trained":
        tensors[1].grad = torch.zeros_like(tensors[1])
    out = []
    calls = 1
    for turn in range(rounds + 1):
        start = turn % len(CONTENDERS)
        found = {}
        for name in CONTENDERS[start:] + CONTENDERS[:start]:
            begun_s = time.process_time()
            for _ in range(calls):
                run_pass(name, case, tensors)
            found[name] = (time.process_time() - begun_s) / calls
        if turn == 0 and max(found.values()) > LONG_S:
            # what a first pass loads is nothing beside it
            return [found]
        if turn == 0:
            calls = ceil(LEAST_S / min(found.values()))
        shown = ", ".join(f"{name} {found[name] * 1e3:.0f} ms" for name in CONTENDERS)
        progress(f"{case.title}, round {turn} of {rounds}: {shown}")
        out.append(found)
    return out[1:]


def _peak_bytes(case: Case, name: str) -> int:
    """Return the peak of a pass of a contender in this process, above its inputs."""
    torch.set_num_threads(1)
    lower_mmap_threshold()
    # a first pass loads code of the libraries, which is none of the loss's memory
    small = replace(case, vocab_size=256, tokens=64)
    run_pass(name, small, inputs(small))
    tensors = inputs(case)
    if case.head == "trained":
        # written, as pages that were never touched would count for the pass
        tensors[1].grad = torch.zeros_like(tensors[1]).add_(0)
    peak = Peak()
    run_pass(name, case, tensors)
    return peak.bytes()


def _peak_mb(case: Case, name: str) -> float:
    """Return the peak of a contender's pass in a fresh process in MB."""
    command = [sys.executable, "-m", "benchmarks.loss_peers", "--peak", json.dumps(asdict(case))]
    done = subprocess.run([*command, name], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1e6


def section(case: Case, found: list[dict[str, float]]) -> str:
    """Return the table of a case, with its peaks and distances."""
    # fp64 of all logits: too much memory for the larger vocabularies, and they round alike
    far = distances(case) if case.vocab_size <= 4_096 else {}
    rows = []
    for name in CONTENDERS:
        rows.append(
            [
                name,
                spread([each[name] * 1e3 for each in found]),
                spread([each[name] / each[OURS] for each in found], 2),
                f"{_peak_mb(case, name):,.0f}",
                f"{far[name]:.1e}" if far else "-",
            ]
        )
    head = ["contender", "ms", "times ours", "peak MB", "far"]
    return f"## {case.title}\n\n{case.tokens:,} tokens, {len(found)} rounds.\n\n{table(head, rows)}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Example, seconds: --vocabularies 512 --widths 32 --tokens 128 --rounds 2",
    )
    made.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES, metavar="V")
    made.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="D")
    made.add_argument("--tokens", type=int, default=2_048, metavar="N", help="(default: 2048)")
    made.add_argument("--rounds", type=int, default=7, help="turns of each contender (default: 7)")
    made.add_argument("--out", type=Path, metavar="FILE.md", help="also write the result here")
    made.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # for the fresh processes
    return made.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
