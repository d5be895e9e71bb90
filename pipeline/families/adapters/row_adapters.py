"""Adapters of one base under which every row of a batch is computed by its own.

PEFT's `adapter_names` takes one adapter after another in every layer, and picks out and puts back
the rows of each: in a pass of a token for each of some texts that starts more operations than
anything multiplies. Here a layer's adapters stand side by side, two products give those of all,
and what is none of a row's own is set to nothing in between.

B rows, N rows of one adapter, T tokens, D width in, F width out, R ranks of a layer's adapters
together, A adapters of a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from .peft_io import NO_ADAPTER, own_name, peft_name

# Numbers that are multiplied while the rows of one more adapter are picked out and put back, on one
# thread: where side by side more are multiplied in vain, it is one adapter after another.
START = 1_200_000

# Adapters of a layer: PEFT's name, rank and scale of each
Layout = tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class _SideBySide:
    """The factors of a layer's adapters."""

    a_RD: Tensor
    b_FR: Tensor
    layout: Layout
    own: dict[str, slice]  # of R

    @classmethod
    def of(cls, layer: Any) -> "_SideBySide | None":
        """Put the adapters of a layer side by side, which keeps them as views of that; None for a
        layer that computes something else than a product and theirs."""
        names = list(layer.lora_A)
        kind = type(layer)
        if kind is not Linear or not names or layer.lora_variant:
            return None
        factors = [*layer.lora_A.values(), *layer.lora_B.values()]
        for factor in factors:
            # what is not finite would not be nothing times nothing, in rows of others either
            plain = type(factor) is nn.Linear and factor.bias is None
            same = plain and factor.weight.dtype == factors[0].weight.dtype
            if not same or not factor.weight.isfinite().all():
                return None
        a_RD = torch.cat([layer.lora_A[name].weight.detach() for name in names])
        b_FR = torch.cat([layer.lora_B[name].weight.detach() for name in names], 1)
        own = {}
        layout = []
        first = 0
        for name in names:
            rank = len(layer.lora_A[name].weight)
            own[name] = slice(first, first + rank)
            first += rank
            layout.append((name, rank, float(layer.scaling[name])))
            layer.lora_A[name].weight.data = a_RD[own[name]]
            layer.lora_B[name].weight.data = b_FR[:, own[name]]
        return cls(a_RD, b_FR, tuple(layout), own)


@dataclass(frozen=True)
class _Present:
    """Which adapters of a layer read some row of a pass."""

    adapters: tuple[tuple[str, float], ...]  # each with its scale
    in_vain: int  # rows times ranks of others, where all adapters read all rows
    alone: bool  # one of them reads every row


class _RowReaders:
    """Who reads the rows of a pass."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.rows: dict[str, list[int]] = {}  # of each adapter
        for row, name in enumerate(names):
            if name != NO_ADAPTER:
                self.rows.setdefault(name, []).append(row)
        self._present: dict[Layout, _Present] = {}
        self._scales: dict[Layout, Tensor] = {}
        self._places: dict[str, Tensor] = {}

    def present(self, layout: Layout) -> _Present:
        """Return which adapters of a layer are those of a row here; most layers have the same."""
        found = self._present.get(layout)
        if found is None:
            ranks = sum(rank for _, rank, _ in layout)
            own = [each for each in layout if each[0] in self.rows]
            needed = sum(len(self.rows[name]) * rank for name, rank, _ in own)
            found = _Present(
                tuple((name, scale) for name, _, scale in own),
                len(self.names) * ranks - needed,
                bool(own) and len(self.rows[own[0][0]]) == len(self.names),
            )
            self._present[layout] = found
        return found

    def scale_B1R(self, layer: _SideBySide) -> Tensor:
        """Return what the ranks of each row are multiplied by: those of others by 0."""
        found = self._scales.get(layer.layout)
        if found is None:
            found = layer.a_RD.new_zeros(len(self.names), 1, len(layer.a_RD))
            for name, _, scale in layer.layout:
                for row in self.rows.get(name, ()):
                    found[row, :, layer.own[name]] = scale
            self._scales[layer.layout] = found
        return found

    def place_N(self, name: str, device: torch.device) -> Tensor:
        """Return the rows of an adapter."""
        if name not in self._places:
            self._places[name] = torch.tensor(self.rows[name], device=device)
        return self._places[name]


class RowAdapters:
    """Has every row of a batch computed under an adapter of its own, as PEFT's `adapter_names`
    does.

    A layer's forward is taken over once: no pass sets or removes anything, and an error leaves
    nothing behind (huggingface/peft#3475). Outside of `reading` the model is PEFT's.
    """

    def __init__(self, model: PeftModel):
        self.known = {own_name(name) for name in model.peft_config}
        self._reading: _RowReaders | None = None
        # made in the first pass that comes by, as the network may still be changed for its serving
        self._layers: WeakKeyDictionary[nn.Module, _SideBySide | None] = WeakKeyDictionary()
        for module in model.modules():
            if isinstance(module, LoraLayer):
                layer: Any = module
                # who serves the same model beside this one
                before = vars(layer).get("forward")
                # no circle of references: a model that is let go gives its memory back at once
                layer.forward = partial(self._forward, ref(layer), before)

    def _forward(
        self,
        of_layer: Callable[[], Any],
        before: Callable[..., Tensor] | None,
        x: Tensor,
        *given: Any,
        **keywords: Any,
    ) -> Tensor:
        """Return y of a layer, x of shape (B, T, D)."""
        layer = of_layer()
        reading = self._reading
        if reading is not None:
            if layer not in self._layers:
                self._layers[layer] = _SideBySide.of(layer)
            beside = self._layers[layer]
            if beside is not None:
                y_BTF: Tensor = layer.base_layer(x, *given, **keywords)
                return _add(y_BTF, x, beside, reading)
            keywords["adapter_names"] = reading.names
        forward = before or partial(type(layer).forward, layer)
        return forward(x, *given, **keywords)

    @contextmanager
    def reading(self, names: Sequence[str | None]) -> Iterator[None]:
        """Compute each row under the adapter of its name, or under none, while the context is
        open. Raises KeyError for a name that is none of the model's."""
        unknown = {name for name in names if name is not None} - self.known
        if unknown:
            # the base would answer in its place
            raise KeyError(f"there is no adapter {sorted(unknown)[0]!r}")
        known = [NO_ADAPTER if name is None else peft_name(name) for name in names]
        self._reading = _RowReaders(known)
        try:
            yield
        finally:
            self._reading = None


def _add(y_BTF: Tensor, x_BTD: Tensor, layer: _SideBySide, reading: _RowReaders) -> Tensor:
    """Add to y what the adapters of its rows make of x."""
    rows, tokens, width = x_BTD.shape
    if rows != len(reading.names):
        raise ValueError(f"{rows} rows are read by {len(reading.names)}")
    x_BTD = x_BTD.to(layer.a_RD.dtype)
    present = reading.present(layer.layout)
    if not present.adapters:
        return y_BTF
    if present.alone:
        ((name, scale),) = present.adapters
        return y_BTF.add_(_delta(x_BTD, layer, name, scale).to(y_BTF.dtype))
    widths = width + layer.b_FR.shape[0]
    if present.in_vain * tokens * widths <= START * len(present.adapters):
        low_BTR = F.linear(x_BTD, layer.a_RD).mul_(reading.scale_B1R(layer))
        return y_BTF.add_(F.linear(low_BTR, layer.b_FR).to(y_BTF.dtype))
    for name, scale in present.adapters:
        place_N = reading.place_N(name, x_BTD.device)
        y_NTF = _delta(x_BTD[place_N], layer, name, scale)
        y_BTF.index_add_(0, place_N, y_NTF.to(y_BTF.dtype))
    return y_BTF


def _delta(x_NTD: Tensor, layer: _SideBySide, name: str, scale: float) -> Tensor:
    """Return what one adapter makes of the rows that it reads."""
    own = layer.own[name]
    y_NTF = F.linear(F.linear(x_NTD, layer.a_RD[own]), layer.b_FR[:, own])
    return y_NTF.mul_(scale)
