"""An adapter that somebody else trained, as one of this base: its tensors are held against the
base's modules before a number of them is read, and kept as an adapter that is trained here is.

Ranks and scales that differ from module to module become one of each: what a product computes stays
the same when a rank is filled up with zeros and a scale is moved into B. R rank, I inputs of a
module, O its outputs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model.loading import check_finite
from ...store.artifacts import load_tensors
from ...store.expert_package import ABOUT, EXPERT, Package, open_expert
from ...store.foreign import ForeignFile
from ...store.package_place import ExpertSource
from ...store.saved_adapter import TENSORS, SavedAdapter
from ...store.tensor_header import FLOATS, Wanted
from .saved_settings import LoraNumbers, read_numbers

PREFIX = "base_model.model."
_PART = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
# Under an adapter of its own the head's or the embedding's own weights, which PEFT saves beside it
_UNDER = ".base_layer."
_NUMBERED = re.compile(r"(.*\.layers)\.(\d+)\.(.+)")
HEAD = "lm_head"
_OF_ENDS = (
    "an adapter of an embedding or a head, and here linear layers before the head alone have some; "
    "train it without embed_tokens and lm_head among its target_modules, or merge it"
)
_SHOWN = 3

Opened = Package | SavedAdapter


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter in the form that those have which are trained here: one rank and one scale."""

    r: int
    alpha: float
    modules: tuple[str, ...]
    tensors: dict[str, Tensor]  # by PEFT's names

    @property
    def targets(self) -> str:
        """An expression that matches the modules and no others."""
        return expression_of(self.modules)


def look(source: ExpertSource) -> Opened:
    """Look at an adapter: a package, or what PEFT saved. Its tensors are not read.

    Raises ForeignFile for what no adapter here can be; StoreError, OSError.
    """
    opened = open_expert(source)
    numbers_of(opened)
    return opened


def numbers_of(opened: Opened) -> LoraNumbers:
    """Return what an adapter's maker says of its ranks and scales. Raises ForeignFile."""
    if isinstance(opened, SavedAdapter):
        return read_numbers(opened.settings)
    facts = opened.facts
    if facts.form != "adapter":
        raise ForeignFile(
            f"it is an expert of the form {facts.form}, and the experts here are adapters"
        )
    # Not written as "at least": a scale that is no number is neither
    if not (facts.rank >= 1 and 0 < facts.scale < float("inf")):
        raise ForeignFile(f"it has the rank {facts.rank} and the scale {facts.scale}")
    return LoraNumbers(facts.rank, facts.scale * facts.rank)


def take(
    core: nn.Module, opened: Opened, folder: Path, ranks: Sequence[int] = ()
) -> ForeignAdapter:
    """Return an adapter of this base, its file copied to folder for a while and read there.

    ranks: those that there may be; another one is filled up to the next of them. Raises ForeignFile
    for tensors that are not this base's or not finite; DiskFull, OSError.
    """
    numbers = numbers_of(opened)
    name = TENSORS if isinstance(opened, SavedAdapter) else EXPERT
    found = opened.tensors() if isinstance(opened, SavedAdapter) else opened.tensors(EXPERT)
    ranks_of = _checked(core, name, found, numbers)
    copy = folder / "foreign.safetensors"
    if isinstance(opened, SavedAdapter):
        opened.take(found, copy)
    else:
        opened.take(EXPERT, found, copy)
    tensors = {}
    for key, tensor in load_tensors(copy).items():
        tensors[key] = tensor.float().clone()
    copy.unlink()
    check_finite(tensors.items())
    return _folded(tensors, ranks_of, numbers, ranks)


def _checked(core: nn.Module, name: str, found: Wanted, numbers: LoraNumbers) -> dict[str, int]:
    """Return the rank of each module that a header has tensors of. Raises ForeignFile unless they
    are pairs of matrices that this base has places for."""
    linear = _linear_modules(core)
    parts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for key, kept in found.items():
        match = _PART.fullmatch(key)
        if match is None:
            raise ForeignFile(f"{name} holds {_shown([key])}: {_what(key)}")
        if match[1] == HEAD:
            raise ForeignFile(f"{name} holds {_shown([key])}: {_OF_ENDS}")
        parts.setdefault(match[1], {})[match[2]] = kept
    if not parts:
        raise ForeignFile(f"{name} holds no tensor")
    strange = sorted(parts.keys() - linear.keys())
    if strange:
        there = {each for each, _ in core.named_modules()}
        alike = there.issuperset(strange)
        why = "train it without" if alike else "it was trained on another one"
        raise ForeignFile(
            f"{name} has tensors of {len(strange)} modules that are no linear layer of this base "
            f"({_shown(strange)}); {why}"
        )
    ranks = {}
    for module, pair in parts.items():
        ranks[module] = _rank(name, module, pair, linear[module])
        wanted = numbers.rank_of(module)
        if ranks[module] != wanted:
            raise ForeignFile(
                f"{name} has {module} of rank {ranks[module]}, and its settings say {wanted}"
            )
    _check_targets(name, linear, ranks, numbers)
    return ranks


def _linear_modules(core: nn.Module) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of the linear layers that an adapter may stand on, by name."""
    found = {}
    for name, module in core.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != HEAD:
            outputs, inputs = module.weight.shape
            found[name] = (outputs, inputs)
    return found


def _rank(
    name: str,
    module: str,
    pair: Mapping[str, tuple[str, tuple[int, ...]]],
    sizes: tuple[int, int],
) -> int:
    """Return the rank of a module's two matrices. Raises ForeignFile for what is no such pair."""
    if pair.keys() != {"A", "B"}:
        raise ForeignFile(f"{name} has one of two matrices of {module}; it is torn, save it again")
    outputs, inputs = sizes
    shapes = {part: shape for part, (_, shape) in pair.items()}
    rank = shapes["A"][0] if shapes["A"] else 0
    if rank < 1 or shapes != {"A": (rank, inputs), "B": (outputs, rank)}:
        raise ForeignFile(
            f"{name} has {module} as {list(shapes['A'])} and {list(shapes['B'])}, and on this base "
            f"it is [rank, {inputs}] and [{outputs}, rank]; it was trained on another one"
        )
    for dtype, _ in pair.values():
        if dtype not in FLOATS:
            raise ForeignFile(f"{name} has {module} as {dtype}, which is no floating-point number")
    return rank


def _check_targets(
    name: str, linear: Mapping[str, object], ranks: Mapping[str, int], numbers: LoraNumbers
) -> None:
    """Raise ForeignFile for other modules than the settings name: what is lacking would be left out
    without a word, and what is more be dropped."""
    if numbers.targets is None:
        return
    wanted = {module for module in linear if numbers.names(module)}
    lacking = sorted(wanted - ranks.keys())
    more = sorted(ranks.keys() - wanted)
    if lacking or more:
        which = "lacks" if lacking else "has more than"
        raise ForeignFile(
            f"{name} {which} the modules that its target_modules name ({_shown(lacking or more)})"
        )


def _folded(
    tensors: dict[str, Tensor],
    ranks: Mapping[str, int],
    numbers: LoraNumbers,
    allowed: Sequence[int],
) -> ForeignAdapter:
    """Return an adapter with one rank and one scale. Raises ForeignFile for a rank over those that
    are allowed."""
    modules = tuple(sorted(ranks))
    scales = {module: numbers.scale_of(module) for module in modules}
    most = max(ranks.values())
    rank = most
    if allowed:
        fitting = [each for each in allowed if each >= most]
        if not fitting:
            raise ForeignFile(f"it has the rank {most}, and at most {max(allowed)} is served")
        rank = min(fitting)
    scale = max(scales.values())
    for module in modules:
        a_RI = tensors[_key(module, "A")]
        b_OR = tensors[_key(module, "B")]
        lacking = rank - ranks[module]
        if lacking:
            a_RI = torch.cat([a_RI, a_RI.new_zeros(lacking, a_RI.shape[1])])
            b_OR = torch.cat([b_OR, b_OR.new_zeros(len(b_OR), lacking)], 1)
        if scales[module] != scale:
            b_OR = b_OR * (scales[module] / scale)
        tensors[_key(module, "A")] = a_RI.contiguous()
        tensors[_key(module, "B")] = b_OR.contiguous()
    alpha = scale * rank
    if rank == numbers.rank and scale == numbers.alpha / rank:
        # As it was given: a product of a quotient may round
        alpha = numbers.alpha
    return ForeignAdapter(rank, alpha, modules, tensors)


def _key(module: str, part: str) -> str:
    return f"{PREFIX}{module}.lora_{part}.weight"


def kept(opened: Opened, found: ForeignAdapter, folder: Path, seconds: float) -> dict[str, Any]:
    """Keep what a package says of itself beside its adapter; return the metrics of a job that took
    in what was trained elsewhere."""
    facts = None
    if isinstance(opened, Package):
        facts = opened.facts
        (folder / ABOUT).write_bytes(opened.about)
    return {
        "steps": 0,
        # None of it was spent here
        "tokens": 0,
        "trained_tokens": facts.tokens if facts else 0,
        "seconds": seconds,
        "parameters": sum(tensor.numel() for tensor in found.tensors.values()),
        "rank": found.r,
        "base_is_proven": facts is not None,
    }


def check_probe(
    base_nats: float, own_nats: float, slack: float, setting: str, numbers: LoraNumbers
) -> None:
    """Hold what an adapter loses on data of its own domain against what the base does without it,
    where nothing proves which base it was trained on. Raises ForeignFile where it is worse by more
    than slack, which `setting` is."""
    # Not written the other way round: what is no number passes no comparison
    if own_nats <= base_nats + slack:
        return
    told = f" ({numbers.base})" if numbers.base else ""
    raise ForeignFile(
        f"it has {own_nats:.4f} nats a token on data of its domain, and the base without it "
        f"{base_nats:.4f}: nothing proves that it was trained on this base{told}, and it does not "
        f"look like it. Raise {setting} if you know that it was"
    )


def expression_of(modules: Sequence[str]) -> str:
    """Return a regular expression of exactly these names, those of layers put together."""
    # By what stands around a layer's number
    inner: dict[tuple[str, int], list[str]] = {}
    plain = []
    for module in modules:
        match = _NUMBERED.fullmatch(module)
        if match is None:
            plain.append(re.escape(module))
        else:
            inner.setdefault((match[1], int(match[2])), []).append(match[3])
    layers: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for (above, number), names in inner.items():
        layers.setdefault((above, tuple(sorted(names))), []).append(number)
    out = []
    for (above, own), numbers in layers.items():
        chosen = "|".join(str(number) for number in sorted(numbers))
        ends = "|".join(re.escape(name) for name in own)
        out.append(rf"{re.escape(above)}\.({chosen})\.({ends})")
    return "|".join([*out, *plain])


def _what(key: str) -> str:
    """Return what a tensor is that stands for no product of two matrices."""
    if "lora_magnitude_vector" in key:
        return "lengths of columns (DoRA), which no adapter here has"
    if key.endswith(".bias") and "lora_" not in key:
        return "biases of the base, which were trained beside it; train it with bias: none"
    if "lora_embedding" in key or _UNDER in key:
        return _OF_ENDS
    if ".lora_A." in key or ".lora_B." in key:
        return "not as PEFT names it; have save_pretrained write it"
    if ".lora_" in key:
        return "a part of an adapter that none here has"
    return "weights of the base itself, as modules_to_save and resized embeddings leave them"


def _shown(names: Sequence[str]) -> str:
    # As their maker wrote them they may be anything, also what moves a terminal's cursor
    text = ", ".join(ascii(name[:80]).strip("'") for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{text} and {more} more" if more > 0 else text
