"""Adapters on the base: made by PEFT, trained one at a time, kept in PEFT's own format, loaded only
where they belong.

Invariant: a loaded adapter has exactly the tensors that its settings call for on this base; PEFT
itself says nothing when none of an adapter's keys match, and the base would then answer in its
place.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import ConfigError, MismatchError
from ...store.artifacts import load_tensors, save_tensors, write_text
from ...store.reading import read_object
from .base import ModelRef

TENSORS = "adapter/adapter_model.safetensors"
SETTINGS = "adapter/adapter_config.json"
ABOUT = "adapter.json"
# of adapter_config.json: what makes the modules, and what is only told
OWN_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "task_type",
    "init_lora_weights",
    "inference_mode",
)
TOLD_SETTINGS = ("base_model_name_or_path", "revision", "peft_version")
PACKAGES = ("torch", "transformers", "peft")
_MARK = "-"
NO_ADAPTER = "__base__"  # PEFT's word for it
# for families that import no peft
Adapters = PeftModel


class LoraOptions(Protocol):
    """What of a new adapter is chosen, wherever it is written."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> str: ...


# what a family says to an adapter's modules: (their names, the options, the options' setting)
CheckTargets = Callable[[Sequence[str], Any, str], None]


def _allow_all(_modules: Sequence[str], _options: LoraOptions, _where: str) -> None: ...


def peft_name(name: str) -> str:
    """Return what PEFT calls an adapter. An adapter's own name may be that of any parameter."""
    # PEFT finds an adapter's tensors by its name in their keys and takes it out again, wherever in
    # a key it stands: `weight` or `q_proj` would find others' and lose parts of their own. No
    # module has a hyphen, and one at either end keeps `a` from being found in `ab`.
    return f"{_MARK}{name}{_MARK}"


def own_name(known: str) -> str:
    """Return the adapter that PEFT knows by what `peft_name` gave."""
    return known.removeprefix(_MARK).removesuffix(_MARK)


def core_of(model: PeftModel) -> PreTrainedModel:
    """Return the base inside a PEFT model, its layers wrapped by adapters."""
    core = model.get_base_model()
    if not isinstance(core, PreTrainedModel):
        raise TypeError(f"adapters stand on a model of transformers here, not on a {type(core)}")
    return core


def add(
    model: PreTrainedModel | PeftModel,
    name: str,
    options: LoraOptions,
    where: str = "loras.defaults",
    check: CheckTargets = _allow_all,
) -> PeftModel:
    """Put a new adapter on a base, or on a base that has some, and return the result with only that
    one trained.

    New weights come from torch's generator, in fp32 whatever the base has. `where` is the options'
    setting; `check` may refuse modules by a ConfigError. Raises ConfigError when the targets match
    nothing, or what must stay as it is.
    """
    core = core_of(model) if isinstance(model, PeftModel) else model
    matched = find_targets(core, options, where, check)
    settings = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # any number, vLLM reads one too
        lora_dropout=options.dropout,
        target_modules=options.targets,
        task_type="CAUSAL_LM",
    )
    out = _with(model, name, settings)
    select(out, name)
    # two matrices for each module, or PEFT has passed over one without a word
    if len(adapter_parameters(out, name)) != 2 * len(matched):
        raise ConfigError(
            f"{where}.targets: {options.targets!r} matches modules that PEFT gives no adapter"
        )
    return out


def put(
    model: PreTrainedModel | PeftModel,
    name: str,
    options: LoraOptions,
    tensors: Mapping[str, torch.Tensor],
    where: str,
    check: CheckTargets = _allow_all,
) -> PeftModel:
    """Put an adapter with these tensors, of any shape, on a base, frozen. Raises ConfigError as
    `add` does, MismatchError when the options call for other tensors."""
    out = add(model, name, options, where, check)
    wanted = get_peft_model_state_dict(out, adapter_name=peft_name(name))
    problem = _difference(wanted, tensors)
    if problem:
        raise MismatchError(f"{where}: {name} does not fit this base: {problem}")
    set_peft_model_state_dict(out, dict(tensors), adapter_name=peft_name(name))
    return out.requires_grad_(False).eval()


def find_targets(
    core: nn.Module,
    options: LoraOptions,
    where: str = "loras.defaults",
    check: CheckTargets = _allow_all,
) -> list[str]:
    """Return the modules of a base that the targets' pattern matches as a whole, as PEFT reads it.

    Raises ConfigError when there is none, one that `check` refuses, or one that cannot adapt.
    """
    pattern = options.targets
    matched = []
    for name, _ in core.named_modules():
        # an adapter that is there already is no target, and its base layer keeps the old name
        of_adapter = "lora_" in name or "base_layer" in name
        if not of_adapter and _matches(pattern, name, where):
            matched.append(name)
    if not matched:
        linear = {n.rpartition(".")[2] for n, m in core.named_modules() if isinstance(m, nn.Linear)}
        raise ConfigError(
            f"{where}.targets: {pattern!r} matches no module of the base; its layers end in "
            f"{sorted(linear)}"
        )
    check(matched, options, where)
    for name in matched:
        adapts = isinstance(core.get_submodule(name), nn.Linear | LoraLayer)
        if not adapts or name == "lm_head":
            raise ConfigError(
                f"{where}.targets: {pattern!r} matches {name}, which is no projection of a layer"
            )
    return matched


def _matches(pattern: str, name: str, where: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(
            f"{where}.targets: {pattern!r} is no regular expression: {error}"
        ) from None


def select(model: PeftModel, name: str) -> None:
    """Make one adapter the active and the only one with gradients."""
    model.set_adapter(peft_name(name))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(_belongs_to(key, name))


@contextmanager
def active(model: PeftModel, name: str | None) -> Iterator[None]:
    """Compute with one of a base's adapters while the context is open, or with none of them."""
    if name is None:
        with model.disable_adapter():
            yield
        return
    # frozen: what is compared or served is not trained
    model.set_adapter(peft_name(name), inference_mode=True)
    yield


def adapter_parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """Return one adapter's parameters by their names in the model."""
    return {key: p for key, p in model.named_parameters() if _belongs_to(key, name)}


def _belongs_to(key: str, name: str) -> bool:
    return f".{peft_name(name)}." in key


def files(model: PeftModel, name: str, pin: ModelRef, about: Mapping) -> dict[str, dict]:
    """Return one adapter's files by name, as PEFT and vLLM load them; `about` enters
    adapter.json."""
    settings = _plain_values(model.peft_config[peft_name(name)])
    settings["base_model_name_or_path"] = pin.model
    settings["revision"] = pin.revision
    settings["inference_mode"] = True
    tensors = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=peft_name(name)).items():
        tensors[key] = tensor.detach().cpu().contiguous()
    described = {
        "name": name,
        "pin": pin.digest,
        "model": pin.model,
        "revision": pin.revision,
        "packages": {package: version(package) for package in PACKAGES},
        **about,
    }
    return {TENSORS: tensors, SETTINGS: settings, ABOUT: described}


def write_files(folder: Path, content: Mapping[str, Mapping[str, Any]]) -> None:
    """Write an adapter's files to its artifact's folder. Raises DiskFull."""
    for name, values in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_tensors(path, dict(values))
        else:
            write_text(path, json.dumps(values, indent=1, sort_keys=True))


def lora_settings(
    rank: int,
    alpha: float,
    modules: list[str],
    layers: list[int] | None,
    base: str,
    revision: str | None,
) -> dict[str, Any]:
    """Return the adapter_config.json of an adapter that was not made here; layers None: in all."""
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number, vLLM reads one too
        target_modules=modules,
        layers_to_transform=layers,
        layers_pattern=None if layers is None else "layers",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    return _plain_values(settings)


def _plain_values(settings: Any) -> dict[str, Any]:
    """Return PEFT's settings as JSON has them."""
    values: dict[str, Any] = {}
    for key, value in settings.to_dict().items():
        # a set has no order, and the same adapter should give the same bytes
        values[key] = sorted(value) if isinstance(value, set) else value
    return values


def load(model: PreTrainedModel | PeftModel, folder: Path, name: str, pin: ModelRef) -> PeftModel:
    """Put the adapter kept in folder on a base (or on a base that has some), frozen, under a name.

    Raises MismatchError when it was made on another base or has other keys or shapes than this base
    calls for, DamagedArtifact when a file cannot be read.
    """
    about = read_object(folder / ABOUT)
    if about.get("pin") != pin.digest:
        raise MismatchError(
            f"adapter {name} in {folder} was made on another base ({about.get('model')}, revision "
            f"{about.get('revision')}) than {pin.model}, revision {pin.revision}; train it again "
            "on this one"
        )
    kept = load_tensors(folder / TENSORS)
    settings = read_object(folder / SETTINGS)
    try:
        out = _with(model, name, _plain_config(settings))
    except (TypeError, ValueError, RuntimeError) as error:
        raise MismatchError(
            f"adapter {name} in {folder} fits no module of this base: {error}"
        ) from None
    wanted = get_peft_model_state_dict(out, adapter_name=peft_name(name))
    problem = _difference(wanted, kept)
    if problem:
        _without(out, name)
        packages = about.get("packages", {})
        raise MismatchError(
            f"adapter {name} in {folder} does not fit this base: {problem}. It was made by peft "
            f"{settings.get('peft_version')} and transformers {packages.get('transformers')}; "
            "train it again, or rename its keys to what this version calls for"
        )
    set_peft_model_state_dict(out, kept, adapter_name=peft_name(name))
    _share(out, name, kept)
    return out.requires_grad_(False).eval()


def _share(model: PeftModel, name: str, kept: Mapping[str, torch.Tensor]) -> None:
    """Let an adapter's parameters be the tensors that they were copied from, which are mapped."""
    for key, parameter in adapter_parameters(model, name).items():
        stored = kept[key.replace(f".{peft_name(name)}.", ".")]
        if (stored.dtype, stored.device) == (parameter.dtype, parameter.device):
            parameter.data = stored


def _plain_config(settings: Mapping[str, Any]) -> LoraConfig:
    """Return an adapter's settings as PEFT takes them. Raises ValueError for any that no training
    here writes: some make PEFT import or compute what the file names."""
    own: dict[str, Any] = {}
    usual = LoraConfig().to_dict()
    for key, value in settings.items():
        if key in OWN_SETTINGS:
            own[key] = value
        elif value and key not in TOLD_SETTINGS and value != usual.get(key):
            raise ValueError(f"{SETTINGS} sets {key} to {value!r}, which no adapter here has")
    # a word in its place names a way to compute the weights, which are stored
    start = own.get("init_lora_weights", True)
    if not isinstance(start, bool):
        raise ValueError(f"{SETTINGS} sets init_lora_weights to {start!r}")
    return LoraConfig(**own)


def label_ids(tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, str]) -> dict[str, int]:
    """Return the token of each expert's label. Raises ConfigError unless each is one token of its
    own."""
    out: dict[str, int] = {}
    for name, label in labels.items():
        ids = tokenizer.encode(label, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"loras: the label {label!r} of {name} is {len(ids)} tokens for this base's "
                "tokenizer; the router answers with one token, so give it a label such as a "
                "capital letter"
            )
        out[name] = ids[0]
    if len({*out.values()}) < len(out):
        raise ConfigError(f"loras: two experts have one label; labels are {dict(labels)}")
    return out


def _with(model: PreTrainedModel | PeftModel, name: str, settings: LoraConfig) -> PeftModel:
    # PEFT fills it in, and warns when it said something else
    settings.base_model_name_or_path = None
    with warnings.catch_warnings():
        # PEFT asks transformers in a way that it is leaving
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
        )
        if isinstance(model, PeftModel):
            model.add_adapter(peft_name(name), settings)
            return model
        return get_peft_model(model, settings, adapter_name=peft_name(name))


def _without(model: PeftModel, name: str) -> None:
    """Take an adapter off again; the last one goes with everything PEFT put around the base."""
    if len(model.peft_config) > 1:
        model.delete_adapter(peft_name(name))
    else:
        model.unload()


def _difference(wanted: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]) -> str:
    """Return what keeps `kept` from being `wanted`, in words; empty when nothing does."""
    missing = sorted(wanted.keys() - kept.keys())
    unexpected = sorted(kept.keys() - wanted.keys())
    if missing or unexpected:
        examples = []
        if missing:
            examples.append(f"wanted {missing[0]}")
        if unexpected:
            examples.append(f"found {unexpected[0]}")
        return (
            f"{len(missing)} tensors are missing and {len(unexpected)} unexpected "
            f"({', '.join(examples)})"
        )
    others = [key for key in sorted(wanted) if wanted[key].shape != kept[key].shape]
    if others:
        first = others[0]
        return (
            f"{len(others)} tensors have another shape, first {first} with "
            f"{tuple(kept[first].shape)} instead of {tuple(wanted[first].shape)}"
        )
    return ""
