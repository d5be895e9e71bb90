"""Products of rows whose bits do not depend on the rows beside them.

A library takes another kernel for another number of rows and adds up in another order. So products
run with numbers of rows of which each, tried on this machine, gives a row the same bits in every
place: rows are filled up to such a number, and more than the largest are taken in parts.

N rows, D width in, F width out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.kernels.frozen import FrozenLinear

COUNTS = (1, 2, 4, 8, 16, 32, 64)
TRIED_ROWS = 64
TRIED_OUTPUTS = 4096  # that are drawn at once
# Below which torch works elementwise with one thread. With several each begins where it happens to
# be, and numbers at its ends go through other instructions than those in between.
SERIAL_NUMBERS = 32_768
# What torch takes at once, at most, on processors of any width: two vectors of 16 numbers in fp32.
# Those that are left over go through other instructions, number by number.
AT_ONCE = 32


@dataclass(frozen=True)
class RowCounts:
    """Numbers of rows whose products give a row the same bits, ascending; none: not known of any
    two places."""

    counts: tuple[int, ...]

    def parts(self, rows: int) -> Iterator[tuple[slice, int]]:
        """Yield the rows of each product, and how many it has to be filled up to."""
        most = self.counts[-1]
        for start in range(0, rows, most):
            own = min(most, rows - start)
            filled = next(count for count in self.counts if count >= own)
            yield slice(start, start + own), filled

    def product(self, x_ND: Tensor, weight_FD: Tensor) -> Tensor:
        """Return y_NF."""
        if not self.counts or len(x_ND) in self.counts:
            return F.linear(x_ND, weight_FD)
        y_NF = x_ND.new_empty(len(x_ND), len(weight_FD))
        for own, filled in self.parts(len(x_ND)):
            count = own.stop - own.start
            part_ND = x_ND[own]
            if count < filled:
                part_ND = x_ND.new_zeros(filled, x_ND.shape[1])
                part_ND[:count] = x_ND[own]
            y_NF[own] = F.linear(part_ND, weight_FD)[:count]
        return y_NF


def tried(weight_FD: Tensor) -> RowCounts:
    """Return the numbers of rows that go together in products with a weight of this shape."""
    x_ND, trial_FD = _telling(weight_FD)
    steady: dict[int, Tensor] = {}
    for count in COUNTS:
        y_NF = _in_parts(x_ND, trial_FD, count)
        moved_NF = _in_parts(x_ND.roll(1, 0), trial_FD, count)
        # or else it is the place in a product that decides
        if torch.equal(y_NF, moved_NF.roll(-1, 0)):
            steady[count] = y_NF
    best: tuple[int, ...] = ()
    for y_NF in steady.values():
        alike = tuple(count for count, other in steady.items() if torch.equal(y_NF, other))
        best = max(best, alike, key=lambda counts: (len(counts), counts[-1:]))
    return RowCounts(best)


def _telling(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_ND and a weight of that shape whose products show in which order they were added
    up."""
    inputs = weight_FD.shape[1]
    draw = torch.Generator().manual_seed(0)
    if weight_FD.dtype == torch.float32:
        # any sum shows it in its last bits, and a copy of a vocabulary's weight is large
        x_ND = torch.randn(TRIED_ROWS, inputs, generator=draw)
        return x_ND.to(weight_FD.device), weight_FD
    # Of bf16 the last bits are rounded away. What adds up to nothing is made of them alone: each
    # number meets its own negative somewhere else in the row
    half = -(-inputs // 2)
    place_D = torch.randperm(2 * half, generator=draw)[:inputs]
    x_ND = torch.randn(TRIED_ROWS, half, generator=draw)
    x_ND = torch.cat([x_ND, -x_ND], 1)[:, place_D]
    trial_FD = torch.empty_like(weight_FD)
    # in parts: of a large vocabulary's weight all of it in fp32 would be gigabytes
    for part_FD in trial_FD.split(TRIED_OUTPUTS):
        drawn = torch.randn(len(part_FD), half, generator=draw)
        part_FD.copy_(torch.cat([drawn, drawn], 1)[:, place_D])
    return x_ND.to(weight_FD), trial_FD


def _in_parts(x_ND: Tensor, weight_FD: Tensor, count: int) -> Tensor:
    return torch.cat([F.linear(part_ND, weight_FD) for part_ND in x_ND.split(count)])


class SteadyProducts:
    """Products of a network, whose numbers of rows are tried at the first one of each shape."""

    def __init__(self) -> None:
        self._counts: dict[Any, RowCounts] = {}

    def __call__(self, x_ND: Tensor, weight_FD: Tensor) -> Tensor:
        """Return y_NF in the weight's dtype."""
        return self.counts(weight_FD).product(x_ND.to(weight_FD.dtype), weight_FD)

    def counts(self, weight_FD: Tensor) -> RowCounts:
        """Return the numbers of rows that go together."""
        kind = (weight_FD.shape, weight_FD.dtype, weight_FD.device)
        if kind not in self._counts:
            self._counts[kind] = tried(weight_FD)
        return self._counts[kind]


class SteadyLinear(nn.Module):
    """A linear layer in the dtype of its weight; what comes and goes is of another."""

    def __init__(self, like: nn.Linear, products: SteadyProducts):
        super().__init__()
        self.weight = like.weight
        self.bias = like.bias
        self._products = products

    def forward(self, x: Tensor) -> Tensor:
        """Return y of x of any leading shape, in the dtype of x."""
        y_NF = self._products(x.flatten(0, -2), self.weight).to(x.dtype)
        if self.bias is not None:
            y_NF = y_NF + self.bias.to(x.dtype)
        return y_NF.view(*x.shape[:-1], y_NF.shape[-1])


def replace_linear(network: nn.Module, products: SteadyProducts) -> None:
    """Have the linear layers below a module run with such products, those of adapters too."""
    # a list, as the network changes on the way
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            # subclasses of others compute something else
            if isinstance(child, FrozenLinear) or type(child) is nn.Linear:
                setattr(parent, name, SteadyLinear(child, products))


def elementwise(function: Callable[[Tensor], Tensor], x_ND: Tensor) -> Tensor:
    """Return a function of each number, of all of which it is computed in the same way; no number
    is left over, as rows are filled up."""
    count, width = x_ND.shape
    step = AT_ONCE // math.gcd(AT_ONCE, width)
    rows = max(step, (SERIAL_NUMBERS - 1) // width // step * step)
    if missing := -count % step:
        x_ND = torch.cat([x_ND, x_ND.new_zeros(missing, width)])
    if len(x_ND) <= rows:
        return function(x_ND)[:count]
    return torch.cat([function(part_ND) for part_ND in x_ND.split(rows)])[:count]


def silu(x_ND: Tensor) -> Tensor:
    """Return x sigmoid(x), of each number computed in the same way."""
    width = x_ND.shape[1]
    # a copy, also where nothing is missing
    filled_ND = F.pad(x_ND, (0, -width % AT_ONCE))
    return silu_(filled_ND)[:, :width]


def silu_(x_ND: Tensor) -> Tensor:
    """Put the same in the place of the numbers of x_ND, which has no gaps; return it."""
    if x_ND.numel() % AT_ONCE:
        return x_ND.copy_(silu(x_ND))
    # by numbers and not by rows, of which a wide network's would be too many to run with one thread
    for part in x_ND.view(-1).split(SERIAL_NUMBERS - AT_ONCE):
        F.silu(part, inplace=True)
    return x_ND
