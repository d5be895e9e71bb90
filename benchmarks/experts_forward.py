"""Compare top-k of several experts with one dense network of as many active parameters, and with
transformers' own.

python -m benchmarks.experts_forward --out benchmarks/experts_forward_epyc_2026-11-20.md

One layer's forward pass without gradients. All experts' products must be equal; then contenders
take turns, each round in another order, and the claim is the median of the rounds' ratios. The exit
status is 1 when one is above the target. The CUDA path has not been run yet.

Low-rank experts on one base have tables of their own, of the networks of a whole small model: there
the dense one is the base alone, and what a whole model's pass may take is judged elsewhere.

N tokens, D model width, F feed-forward width, E experts, K experts per token.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.measuring import device_here, finish, hardware, progress, spread, table
from pipeline.model.experts import Expert, from_tensors, mix, reinit_like
from pipeline.model.low_rank import LowRankExpert, mix_on_base

TARGET = 1.25  # times the dense network's time
OURS, DENSE = "ours", "dense"
PEERS = {"transformers, eager": "eager", "transformers, grouped_mm": "grouped_mm"}
WORDS = {OURS: "ours, sorted blocks (`experts.mix`)", DENSE: "one dense SwiGLU, width K F"}
MERGED = "merged"
OF_DELTAS = {
    DENSE: "the base alone, width F",
    OURS: "deltas on it (`low_rank.mix_on_base`)",
    MERGED: "the same merged, sorted blocks (`experts.mix`)",
}
SMALL_MODEL, LAYERS = "576x1536", 30  # of SmolLM2-135M
SCALE = 2.0  # alpha / rank, as runs have it by default
PLACES = {"cpu": "CPU", "cuda": "GPU"}
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
NEAR = {"bf16": 0.02, "fp32": 1e-5}  # of the norm, between two ways to compute the same
LOADS = ("even", "skewed")
SHAPES = {
    "cpu": ["512x1368", "1024x2816"],
    "cuda": ["512x1368", "1024x2816", "2048x5632", "4096x14336"],
}
LEAST_S = 0.05  # of a turn: shorter passes are repeated


@dataclass(frozen=True)
class Case:
    """One comparison."""

    d_model: int
    d_ff: int
    load: str = "even"
    tokens: int = 4096
    experts: int = 8
    top_k: int = 2
    device: str = "cpu"
    dtype: str = "bf16"
    rank: int = 0  # of deltas on one base; 0: experts are whole networks
    layers: int = 1

    @property
    def title(self) -> str:
        """The case for people."""
        sizes = f"{PLACES[self.device]}, D {self.d_model:,}, F {self.d_ff:,}"
        if self.rank:
            return f"{sizes}, {self.layers} layers, rank {self.rank}, {self.dtype}"
        return f"{sizes}, {self.load} load"

    @property
    def flops(self) -> float:
        """Operations of the matrix products, the same for all contenders."""
        return 2 * 3 * self.d_model * self.d_ff * self.top_k * self.tokens


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    text, reached = "", True
    for device in args.devices:
        for shape in args.shapes or SHAPES[device]:
            sizes = [int(number) for number in shape.split("x")]
            common = (args.tokens, args.experts, args.top_k, device, args.dtype)
            part, kept = compared([Case(*sizes, load, *common) for load in LOADS], args.rounds)
            text, reached = text + part, reached and kept
        sizes = [int(number) for number in args.low_rank_shape.split("x")]
        for rank in args.ranks:
            for dtype in KINDS:
                common = (args.tokens, args.experts, args.top_k, device, dtype)
                text += of_deltas(Case(*sizes, "even", *common, rank, args.layers), args.rounds)
    clock = (
        "the time of the process on the core" if args.threads == 1 else "by the clock on the wall"
    )
    ending = (
        f"{hardware(args.threads, ('torch', 'transformers'), gpu='cuda' in args.devices)}. Weights "
        f"and x in {args.dtype}, weights of the choices in fp32 for ours and in {args.dtype} for "
        f"the peers, as their routers give them. CPU milliseconds are {clock}. A load above the "
        "number of threads means that other programs used the cores and their caches meanwhile: it "
        "slows all contenders of a round, so read ratios and their spread."
    )
    finish(
        args,
        "experts_forward",
        "Experts forward beside one dense network",
        text.rstrip() + "\n",
        NOTES,
        ending,
    )
    return int(not reached)


NOTES = """Ratios are within a round: median (least-most). Choices are drawn once per table, K
different experts for each token: with equal chances (even), or as 1, 1/2, 1/3... (skewed). The
peers' experts hold the same numbers, stacked, and get the same choices; they are called without
their gate, as ours is. GFLOP/s count matrix products.
"""


def compared(cases: Sequence[Case], rounds: int) -> tuple[str, bool]:
    """Return a table and a verdict per case, and whether ours is near the dense network in all of
    them."""
    text, reached = "", True
    for case in cases:
        index_NK = choices(case)
        ways = contenders(case, index_NK)
        found = measured(case, ways, rounds)
        times = [r[OURS] / r[DENSE] for r in found]
        kept = statistics.median(times) <= TARGET
        reached &= kept
        busiest = index_NK.flatten().bincount().max().item() / index_NK.numel()
        text += (
            f"## {case.title}\n\n{case.tokens:,} tokens, top-{case.top_k} of {case.experts} "
            f"experts, {case.dtype}, {rounds} rounds; the busiest expert computes {busiest:.0%} of "
            f"the rows.\n\n{_table(case, found)}\n- {case.title}: ours takes {spread(times, 2)} "
            f"times the dense network's time; target at most {TARGET:g}: "
            f"{'reached' if kept else 'missed'}\n\n"
        )
    return text, reached


def of_deltas(case: Case, rounds: int) -> str:
    """Return a table of a case of low-rank experts."""
    found = measured(case, delta_contenders(case, choices(case)), rounds)
    times = [r[OURS] / r[DENSE] for r in found]
    rows = []
    for name, words in OF_DELTAS.items():
        milliseconds = [r[name] * 1e3 for r in found]
        ratios = [r[name] / r[DENSE] for r in found]
        rows.append([words, spread(milliseconds, 2), spread(ratios, 2)])
    return (
        f"## {case.title}\n\n{case.tokens:,} tokens, top-{case.top_k} of {case.experts} experts, "
        f"{rounds} rounds.\n\n{table(['networks', 'ms', 'times the base alone'], rows)}\n"
        f"- {case.title}: deltas take {spread(times, 2)} times the base's time; by operations "
        f"{1 + delta_share(case):.3f}\n\n"
    )


def delta_share(case: Case) -> float:
    """Return the operations of K experts' deltas as a share of the base network's."""
    delta = case.rank * (case.d_model + case.d_ff)
    return case.top_k * delta / (case.d_model * case.d_ff)


def delta_contenders(case: Case, index_NK: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what computes y_ND of each layer in turn, by contender: the base, deltas on it, and
    the same experts merged.

    Raises SystemExit where the last two differ.
    """
    torch.manual_seed(1)
    dtype = KINDS[case.dtype]
    (one,) = drawn(replace(case, experts=1))
    base = reinit_like(Expert([one.layers[0]] * case.layers)).to(case.device, dtype)
    base.requires_grad_(False)
    deltas, merged = [], []
    for _ in range(case.experts):
        expert = LowRankExpert(base, case.rank, SCALE).requires_grad_(False)
        for name, factor in expert.named().items():
            if "lora_B" in name:
                torch.nn.init.normal_(factor, std=0.02)
        deltas.append(expert.to(case.device))
        rounded = {name: whole.to(dtype) for name, whole in deltas[-1].merged_layers()}
        merged.append(from_tensors(base, rounded))
    x_ND = torch.randn(case.tokens, case.d_model).to(case.device, dtype)
    weight_NK = torch.rand(case.tokens, case.top_k).softmax(-1).to(case.device)
    every = range(case.layers)
    given = (x_ND, index_NK, weight_NK)
    ways = {
        DENSE: lambda: [base(layer, x_ND) for layer in every][-1],
        OURS: lambda: [mix_on_base(base, deltas, layer, *given) for layer in every][-1],
        MERGED: lambda: [mix(merged, layer, *given) for layer in every][-1],
    }
    with torch.no_grad():
        wanted_ND = ways[MERGED]().float()
        far = ((ways[OURS]().float() - wanted_ND).norm() / wanted_ND.norm()).item()
        apart = ((ways[DENSE]().float() - wanted_ND).norm() / wanted_ND.norm()).item()
    if not far <= NEAR[case.dtype] < apart:
        raise SystemExit(f"{case.title}: deltas are {far:.2g} of the norm away from the merged")
    return ways


def choices(case: Case) -> torch.Tensor:
    """Return index_NK, K different experts for each token."""
    torch.manual_seed(0)
    chance_E = (
        torch.ones(case.experts) if case.load == "even" else 1 / torch.arange(1.0, case.experts + 1)
    )
    return torch.multinomial(chance_E.expand(case.tokens, -1), case.top_k).to(case.device)


def contenders(case: Case, index_NK: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what computes y_ND, by contender; all but the dense one must give the same.

    Raises SystemExit where one gives something else.
    """
    torch.manual_seed(1)
    dtype = KINDS[case.dtype]
    experts = drawn(case)
    wide = reinit_like(experts[0], case.d_ff * case.top_k).to(case.device, dtype)
    x_ND = torch.randn(case.tokens, case.d_model).to(case.device, dtype)
    weight_NK = torch.rand(case.tokens, case.top_k).softmax(-1).to(case.device)
    ways = {DENSE: lambda: wide(0, x_ND), OURS: lambda: mix(experts, 0, x_ND, index_NK, weight_NK)}
    for name, implementation in PEERS.items():
        peer, rounded_NK = stacked(experts, implementation), weight_NK.to(dtype)
        ways[name] = lambda peer=peer, rounded_NK=rounded_NK: peer(x_ND, index_NK, rounded_NK)
    with torch.no_grad():
        wanted_ND = looped(experts, x_ND, index_NK, weight_NK)
        for name in (OURS, *PEERS):
            far = ((ways[name]().float() - wanted_ND).norm() / wanted_ND.norm()).item()
            if not far <= NEAR[case.dtype]:
                raise SystemExit(
                    f"{case.title}: {name} is {far:.2g} of the norm away from a loop over the "
                    "experts"
                )
    return ways


def drawn(case: Case) -> list[Expert]:
    """Return E random experts of one layer."""
    config = Qwen3Config(hidden_size=case.d_model, intermediate_size=case.d_ff)
    with torch.device("meta"):
        like = Expert([Qwen3MLP(config)])
    return [reinit_like(like).to(case.device, KINDS[case.dtype]) for _ in range(case.experts)]


def stacked(experts: Sequence[Expert], implementation: str) -> Qwen3MoeExperts:
    """Return transformers' experts with copies of the weights of ours."""
    nets = [expert.layers[0] for expert in experts]
    like = nets[0].config
    config = Qwen3MoeConfig(
        hidden_size=like.hidden_size,
        moe_intermediate_size=like.intermediate_size,
        num_experts=len(experts),
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        made = Qwen3MoeExperts(config)
    both = [torch.cat([net.gate_proj.weight, net.up_proj.weight]).detach() for net in nets]
    made.gate_up_proj = torch.nn.Parameter(torch.stack(both))
    made.down_proj = torch.nn.Parameter(
        torch.stack([net.down_proj.weight.detach() for net in nets])
    )
    return made


def looped(
    experts: Sequence[Expert], x_ND: torch.Tensor, index_NK: torch.Tensor, weight_NK: torch.Tensor
) -> torch.Tensor:
    """Return y_ND in fp32, every expert run on every token."""
    y_ND = torch.zeros(x_ND.shape, device=x_ND.device)
    for number, expert in enumerate(experts):
        share_N1 = (weight_NK * (index_NK == number)).sum(1, keepdim=True)
        y_ND += share_N1 * expert.layers[0](x_ND).float()
    return y_ND


def measured(
    case: Case, ways: dict[str, Callable[[], torch.Tensor]], rounds: int
) -> list[dict[str, float]]:
    """Return seconds of a pass by contender and round, after a round that is thrown away."""
    out, order, calls = [], list(ways), 1
    for turn in range(rounds + 1):
        turns = order[turn % len(order) :] + order[: turn % len(order)]
        found = {name: _seconds(ways[name], calls, case.device) for name in turns}
        calls = calls if turn else ceil(LEAST_S / min(found.values()))
        progress(
            f"{case.title}, round {turn} of {rounds}: "
            + ", ".join(f"{n} {found[n] * 1e3:.2f} ms" for n in order)
        )
        out.append(found)
    return out[1:]


@torch.no_grad()
def _seconds(way: Callable[[], torch.Tensor], calls: int, device: str) -> float:
    """Return seconds of a pass: of one processor thread its own time, which others on the core do
    not add to."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = (
        time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    )
    wait()
    start = clock()
    for _ in range(calls):
        way()
    wait()
    return (clock() - start) / calls


def _table(case: Case, rounds: list[dict[str, float]]) -> str:
    rows = [
        [
            WORDS.get(name, name),
            spread([r[name] * 1e3 for r in rounds], 2),
            spread([r[name] / r[DENSE] for r in rounds], 2),
            f"{case.flops / statistics.median(r[name] for r in rounds) / 1e9:,.0f}",
        ]
        for name in (DENSE, OURS, *PEERS)
    ]
    return table(["contender", "ms", "times the dense network's", "GFLOP/s"], rows)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Example, seconds: --shapes 64x128 --tokens 256 --rounds 3",
    )
    made.add_argument(
        "--devices",
        type=device_here,
        nargs="+",
        choices=SHAPES,
        help="(default: the processor, and a GPU that is there)",
    )
    made.add_argument(
        "--shapes",
        nargs="+",
        metavar="DxF",
        help="model and feed-forward width (default: "
        f"{', '.join(SHAPES['cpu'])}; on a GPU also {', '.join(SHAPES['cuda'][2:])})",
    )
    made.add_argument(
        "--ranks",
        type=int,
        nargs="*",
        default=[16, 64],
        help="of low-rank experts; none: leave them out (default: 16 64)",
    )
    made.add_argument(
        "--low-rank-shape",
        metavar="DxF",
        default=SMALL_MODEL,
        help="theirs (default: %(default)s)",
    )
    made.add_argument("--layers", type=int, default=LAYERS, help="of them (default: %(default)s)")
    made.add_argument("--tokens", type=int, default=4096, help="in the pass (default: %(default)s)")
    made.add_argument("--experts", type=int, default=8, help="of the layer (default: %(default)s)")
    made.add_argument(
        "--top-k", type=int, default=2, help="experts per token (default: %(default)s)"
    )
    made.add_argument(
        "--dtype", choices=KINDS, default="bf16", help="of weights and input (default: %(default)s)"
    )
    made.add_argument("--rounds", type=int, default=7, help="that count (default: %(default)s)")
    made.add_argument(
        "--threads", type=int, default=1, help="of the processor (default: %(default)s)"
    )
    made.add_argument(
        "--out", type=Path, metavar="FILE.md", help="also write the dated result here"
    )
    args = made.parse_args(argv)
    args.devices = args.devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    given = [*(args.shapes or []), args.low_rank_shape]
    strange = [shape for shape in given if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape)]
    if strange:
        made.error(f"a shape is two numbers, as 512x1368, not {strange[0]}")
    counts = [args.tokens, args.rounds, args.threads, args.layers, *args.ranks]
    if min(counts) < 1 or not 1 <= args.top_k <= args.experts:
        made.error(
            "--tokens, --rounds, --threads and such must be at least 1, --top-k from 1 to --experts"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())
