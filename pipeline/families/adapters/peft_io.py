"""Adapters on the base: made by PEFT, trained one at a time, kept in PEFT's own format, loaded only
where they belong.

Invariant: a loaded adapter has exactly the tensors that its settings call for on this base; PEFT
itself says nothing when none of an adapter's keys match, and the base would then answer in its
place.
"""

import json
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

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

from ...errors import ConfigError, DamagedArtifact, MismatchError
from ...store.artifacts import load_tensors
from .base import ModelRef

TENSORS, SETTINGS, ABOUT = (
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter.json",
)
PACKAGES = ("torch", "transformers", "peft")


def add(model: nn.Module, name: str, options, where: str = "loras.defaults") -> PeftModel:
    """Put a new adapter on a base, or on a base that has some, and return the result with only that
    one trained.

    New weights come from torch's generator, in fp32 whatever the base has. `where` is the options'
    setting. Raises ConfigError when the targets match nothing, or what must stay as it is.
    """
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    matched = targets_of(core, options.targets, options.allow_vision, where)
    settings = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets,
        task_type="CAUSAL_LM",
    )
    out = _with(model, name, settings)
    select(out, name)
    if len(own(out, name)) != 2 * len(matched):
        raise ConfigError(
            f"{where}.targets: {options.targets!r} matches modules that PEFT gives no adapter"
        )
    return out


def targets_of(
    core: nn.Module, pattern: str, allow_vision: bool, where: str = "loras.defaults"
) -> list[str]:
    """Return the modules of a base that a pattern matches as a whole, as PEFT reads it.

    Raises ConfigError when there is none, or one of the vision tower (without allow_vision), or
    none that can adapt.
    """
    try:
        names = (
            name
            for name, _ in core.named_modules()
            if "lora_" not in name and "base_layer" not in name
        )
        matched = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(
            f"{where}.targets: {pattern!r} is no regular expression: {error}"
        ) from None
    if not matched:
        linear = sorted(
            {n.rpartition(".")[2] for n, m in core.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ConfigError(
            f"{where}.targets: {pattern!r} matches no module of the base; its layers end in {linear}"
        )
    seen = [name for name in matched if "visual" in name.split(".")]
    if seen and not allow_vision:
        raise ConfigError(
            f"{where}.targets: {pattern!r} reaches into the vision tower ({len(seen)} modules, first {seen[0]}); "
            f"say `.*language_model.*` in it, or set {where}.allow_vision: true"
        )
    odd = [
        n
        for n in matched
        if not isinstance(core.get_submodule(n), nn.Linear | LoraLayer) or n == "lm_head"
    ]
    if odd:
        raise ConfigError(
            f"{where}.targets: {pattern!r} matches {odd[0]}, which is no projection of a layer"
        )
    return matched


def select(model: PeftModel, name: str) -> None:
    """Make one adapter the active and the only one with gradients."""
    model.set_adapter(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(f".{name}." in key and "lora_" in key)


def own(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """Return one adapter's parameters by their names in the model."""
    return {key: p for key, p in model.named_parameters() if "lora_" in key and f".{name}." in key}


def files(model: PeftModel, name: str, pin: ModelRef, about: Mapping) -> dict[str, dict]:
    """Return one adapter's files by name, as PEFT and vLLM load them; `about` enters adapter.json."""
    settings = model.peft_config[name].to_dict()
    settings |= {
        "base_model_name_or_path": pin.model,
        "revision": pin.revision,
        "inference_mode": True,
    }
    settings = {
        key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()
    }
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    return {
        TENSORS: {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
        SETTINGS: settings,
        ABOUT: {
            "name": name,
            "pin": pin.digest,
            "model": pin.model,
            "revision": pin.revision,
            "packages": {package: version(package) for package in PACKAGES},
            **about,
        },
    }


def load(model: nn.Module, folder: Path, name: str, pin: ModelRef) -> PeftModel:
    """Put the adapter kept in folder on a base (or on a base that has some), frozen, under a name.

    Raises MismatchError when it was made on another base or has other keys or shapes than this base
    calls for, DamagedArtifact when a file cannot be read.
    """
    about = read_json(folder / ABOUT)
    if about.get("pin") != pin.digest:
        raise MismatchError(
            f"adapter {name} in {folder} was made on another base ({about.get('model')}, revision "
            f"{about.get('revision')}) than {pin.model}, revision {pin.revision}; train it again on this one"
        )
    kept, settings = load_tensors(folder / TENSORS), read_json(folder / SETTINGS)
    try:
        out = _with(model, name, LoraConfig.from_pretrained(str((folder / SETTINGS).parent)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise MismatchError(
            f"adapter {name} in {folder} fits no module of this base: {error}"
        ) from None
    wanted = get_peft_model_state_dict(out, adapter_name=name)
    problem = _difference(wanted, kept)
    if problem:
        _without(out, name)
        raise MismatchError(
            f"adapter {name} in {folder} does not fit this base: {problem}. It was made by peft "
            f"{settings.get('peft_version')} and transformers {about.get('packages', {}).get('transformers')}; "
            "train it again, or rename its keys to what this version calls for"
        )
    set_peft_model_state_dict(out, kept, adapter_name=name)
    return out.requires_grad_(False).eval()


def label_ids(tokenizer, labels: Mapping[str, str]) -> dict[str, int]:
    """Return the token of each expert's label. Raises ConfigError unless each is one token of its
    own."""
    ids = {
        name: tokenizer.encode(label, add_special_tokens=False) for name, label in labels.items()
    }
    long = {name: len(found) for name, found in ids.items() if len(found) != 1}
    if long:
        name = next(iter(long))
        raise ConfigError(
            f"loras: the label {labels[name]!r} of {name} is {long[name]} tokens for this base's tokenizer; "
            "the router answers with one token, so give it a label such as a capital letter"
        )
    if len({found[0] for found in ids.values()}) < len(ids):
        raise ConfigError(f"loras: two experts have one label; labels are {dict(labels)}")
    return {name: found[0] for name, found in ids.items()}


def _with(model: nn.Module, name: str, settings: LoraConfig) -> PeftModel:
    # PEFT fills it in, and warns when it said something else
    settings.base_model_name_or_path = None
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
        )  # PEFT's use
        if isinstance(model, PeftModel):
            model.add_adapter(name, settings)
            return model
        return get_peft_model(model, settings, adapter_name=name)


def _without(model: PeftModel, name: str) -> None:
    """Take an adapter off again; the last one goes with everything PEFT put around the base."""
    if len(model.peft_config) > 1:
        model.delete_adapter(name)
    else:
        model.unload()


def _difference(wanted: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]) -> str:
    """Return what keeps `kept` from being `wanted`, in words; empty when nothing does."""
    missing, unexpected = sorted(wanted.keys() - kept.keys()), sorted(kept.keys() - wanted.keys())
    if missing or unexpected:
        examples = [
            f"{word} {keys[0]}"
            for word, keys in (("wanted", missing), ("found", unexpected))
            if keys
        ]
        return f"{len(missing)} tensors are missing and {len(unexpected)} unexpected ({', '.join(examples)})"
    shapes = [key for key in sorted(wanted) if wanted[key].shape != kept[key].shape]
    if shapes:
        pair = f"{tuple(kept[shapes[0]].shape)} instead of {tuple(wanted[shapes[0]].shape)}"
        return f"{len(shapes)} tensors have another shape, first {shapes[0]} with {pair}"
    return ""


def read_json(path: Path) -> dict:
    """Return the settings that a file of an adapter's artifact holds. Raises DamagedArtifact."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedArtifact(
            f"{path} cannot be read ({error}); train this adapter again"
        ) from None
    if not isinstance(found, dict):
        raise DamagedArtifact(f"{path} holds no settings; train this adapter again")
    return found
