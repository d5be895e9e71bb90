"""What the settings of a saved adapter say of its numbers, whoever trained it: what is held as it
is, what can be folded into the numbers, what is refused by name.

Invariant: nothing that a file names is run. Targets that are an expression are not matched with
anything: the tensors say which modules there are.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from ...store.foreign import ForeignFile
from ...store.saved_adapter import SETTINGS

# Those that are read below
_READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "alpha_pattern",
    "rank_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "peft_type",
    "task_type",
}
# Those that change nothing of what a trained adapter computes
_OF_TRAINING = {
    "lora_dropout",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "bias",  # what was trained is tensors beside it, which are refused; most bases have none
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "ensure_weight_tying",
}
_REFUSED = {
    "use_dora": "columns have lengths of their own (DoRA)",
    "modules_to_save": "whole modules of the base were trained beside it",
    "lora_bias": "its products have biases",
    "trainable_token_indices": "rows of the embedding were trained beside it",
    "target_parameters": "it changes parameters that are no linear layer's",
    "layer_replication": "its base has layers twice",
    "alora_invocation_tokens": "it begins at some token of a text, and here one reads all of it",
    "use_qalora": "its inputs are pooled (QA-LoRA)",
}
# How first weights are drawn without a change of the base's own
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_TASKS = (None, "CAUSAL_LM")
_PLAIN = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MOST_RANK = 1 << 16


@dataclass(frozen=True)
class LoraNumbers:
    """Ranks and scales of an adapter's modules."""

    rank: int
    alpha: float
    by_root: bool = False  # alpha counts over the rank's root (rsLoRA)
    # Of modules by the ends of their names, where they are others
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    # Ends of the names of all its modules, and their layers; None: nobody says
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    base: str = ""  # what it is said to be trained on, which proves nothing

    def rank_of(self, module: str) -> int:
        """Return the rank that a module is said to have."""
        return self.ranks.get(_end_of(module, self.ranks), self.rank)

    def scale_of(self, module: str) -> float:
        """Return what a module's product B A is multiplied by."""
        rank = self.rank_of(module)
        alpha = self.alphas.get(_end_of(module, self.alphas), self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)

    def names(self, module: str) -> bool:
        """Whether a module of the base is among the targets, where these are said."""
        if self.targets is None or not _end_of(module, self.targets):
            return False
        if self.layers is None:
            return True
        numbers = [int(part) for part in module.split(".") if part.isdecimal()]
        return any(number in self.layers for number in numbers[:1])


def _end_of(module: str, ends: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the first of some names that a module's ends in, as PEFT finds it; empty for none."""
    for end in ends:
        if module == end or module.endswith(f".{end}"):
            return end
    return ""


def read_numbers(settings: Mapping[str, Any]) -> LoraNumbers:
    """Return what settings say of an adapter's numbers. Raises ForeignFile for what no adapter here
    can hold."""
    if settings.get("peft_type") != "LORA":
        kind = ascii(settings.get("peft_type"))[:40]
        raise ForeignFile(
            f"{SETTINGS} is of the kind {kind}, and adapters here are LORA; train one"
        )
    _refuse_others(settings)
    rank = settings.get("r")
    alpha = settings.get("lora_alpha")
    if not _is_rank(rank) or rank is None:
        raise ForeignFile(f"{SETTINGS} sets r to {ascii(rank)[:40]}, which is no rank")
    if not _is_alpha(alpha) or alpha is None:
        raise ForeignFile(
            f"{SETTINGS} sets lora_alpha to {ascii(alpha)[:40]}, which scales nothing"
        )
    return LoraNumbers(
        rank=int(rank),
        alpha=float(alpha),
        by_root=bool(settings.get("use_rslora")),
        ranks=_pattern(settings, "rank_pattern", _is_rank),
        alphas=_pattern(settings, "alpha_pattern", _is_alpha),
        targets=_targets(settings),
        layers=_layers(settings),
        base=ascii(settings.get("base_model_name_or_path") or "")[:80].strip("'"),
    )


def _refuse_others(settings: Mapping[str, Any]) -> None:
    """Raise ForeignFile for settings under which numbers mean something else than here."""
    usual = LoraConfig().to_dict()
    for key, value in settings.items():
        if key in _READ or key in _OF_TRAINING or not value or value == usual.get(key):
            continue
        shown = f"{ascii(key)[:40]} to {ascii(value)[:60]}".replace("'", "")
        why = _REFUSED.get(key, "no adapter here has that")
        raise ForeignFile(f"{SETTINGS} sets {shown}: {why}; train it without, or merge it")
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ForeignFile(
            f"{SETTINGS} sets init_lora_weights to {ascii(start)[:40]}: its base's own weights "
            "were changed as it began; save it with path_initial_model_for_weight_conversion, or "
            "merge it"
        )
    task = settings.get("task_type")
    if task not in _TASKS:
        raise ForeignFile(
            f"{SETTINGS} is of the task {ascii(task)[:40]}, and adapters here are of CAUSAL_LM; "
            "train it as one of these"
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _pattern(
    settings: Mapping[str, Any], key: str, is_right: Callable[[Any], bool]
) -> dict[str, Any]:
    """Return what a setting says of some modules, by the ends of their names. Raises
    ForeignFile."""
    found = settings.get(key) or {}
    if not isinstance(found, dict):
        raise ForeignFile(f"{SETTINGS} sets {key} to no mapping of modules")
    for name, value in found.items():
        # PEFT takes the names for expressions, and one of a stranger's is not run
        if not _PLAIN.fullmatch(name) or not is_right(value):
            shown = f"{ascii(name)[:60]}: {ascii(value)[:40]}"
            raise ForeignFile(
                f"{SETTINGS} has {shown} in {key}, and only names of modules are taken there; "
                "write one of each"
            )
    return found


def _targets(settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    found = settings.get("target_modules")
    # What is left out of a list cannot be told from what is missing
    if not isinstance(found, list) or settings.get("exclude_modules"):
        return None
    if not all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in found):
        raise ForeignFile(f"{SETTINGS} has a target_modules that is no name of a module")
    return tuple(found)


def _layers(settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    found = settings.get("layers_to_transform")
    # PEFT takes none in a list for all of them
    if found is None or found == []:
        return None
    numbers = found if isinstance(found, list) else [found]
    if not all(type(number) is int for number in numbers):
        raise ForeignFile(
            f"{SETTINGS} sets layers_to_transform to {ascii(found)[:40]}, and layers have numbers"
        )
    return tuple(numbers)
