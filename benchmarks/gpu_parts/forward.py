"""One layer's forward pass: a mixture of 8 experts, gate and all, beside one dense network.

E experts, L layers, B sequences, T tokens, D model width, F feed-forward width, K experts per
token.
"""

from collections.abc import Callable, Iterator

import torch

from benchmarks.experts_forward import DENSE, SCALE, Case, drawn, measured
from benchmarks.gpu_parts import Row, Setup
from benchmarks.measuring import RANK
from pipeline.model.experts import Expert
from pipeline.model.low_rank import LowRankExpert
from pipeline.model.router import Gating, Mixture, Router

ACTIVE = (1, 2, 4)
EXPERTS = 8
SHAPES = {True: ((64, 172),), False: ((2048, 5632), (4096, 12288))}
Way = Callable[[], torch.Tensor]


def forward(setup: Setup) -> Iterator[Row]:
    """Yield a row per shape, form of expert, K and round."""
    tokens = 256 if setup.small else 8192
    dtype = "fp32" if setup.device == "cpu" else "bf16"
    for d_model, d_ff in SHAPES[setup.small]:
        case = Case(d_model, d_ff, "even", tokens, EXPERTS, 1, setup.device, dtype)
        ways = _ways(case)
        found = measured(case, ways, 2 if setup.small else 5)
        for name in ways:
            for one in found:
                yield {
                    "what": f"D {d_model}, F {d_ff}: {name}",
                    "ms": one[name] * 1e3,
                    "times the dense network's": one[name] / one[DENSE],
                }


def _ways(case: Case) -> dict[str, Way]:
    """Return what computes y_BTD: the dense network, and mixtures of either form."""
    torch.manual_seed(1)
    full = drawn(case)
    dense = full[0].requires_grad_(False)
    dtype = next(dense.parameters()).dtype
    x_BTD = torch.randn(1, case.tokens, case.d_model).to(case.device, dtype)
    ways: dict[str, Way] = {DENSE: lambda: dense(0, x_BTD)}
    deltas = [LowRankExpert(dense, RANK, SCALE).to(case.device) for _ in range(case.experts)]
    for form, experts in (("full", full), (f"rank-{RANK}", deltas)):
        for active in ACTIVE:
            name = f"{active} of {case.experts} {form} experts"
            ways[name] = _mixture(experts, active, x_BTD)
    return ways


def _mixture(experts: list[Expert], active: int, x_BTD: torch.Tensor) -> Way:
    # Gates at random share the tokens about evenly among the experts
    weight_LED = torch.randn(1, len(experts), x_BTD.shape[-1])
    router = Router(weight_LED, Gating(active)).to(x_BTD.device)
    mixture = Mixture(experts, router).requires_grad_(False).eval()
    return lambda: mixture(0, x_BTD)
