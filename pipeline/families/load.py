"""From files and overrides to one checked run; one check reports every problem at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config.base import is_hidden
from ..config.domain_wish import DomainWish
from ..config.experiments import KINDS
from ..config.files import overlay, override, read, resolve
from ..config.paths import tree_of
from ..config.problems import cross_section_problems, explain, refuse_credentials
from ..config.run import RunConfig
from ..config.stated import Stated
from ..config.wording import holder
from ..errors import ConfigError
from . import TrialModels
from .adapters import domains as adapters_domains
from .ffn_moe import domains as ffn_moe_domains
from .ffn_moe import trials as ffn_moe_trials
from .ffn_moe.config import FfnMoeConfig
from .lora_vlm.config import LoraVlmConfig

# By the name that `family` has in files. Settings alone: importing them brings no torch.
RUN_CONFIGS: dict[str, type[RunConfig]] = {
    "ffn_moe": FfnMoeConfig,
    "lora_vlm": LoraVlmConfig,
}
# By the same names: how a run's own files are made to say that a domain comes, goes or is another.
_CHANGES: dict[str, Callable[[Any, DomainWish, Stated], list[str]]] = {
    "ffn_moe": ffn_moe_domains.change_domains,
    "lora_vlm": adapters_domains.change_domains,
}
# And how text, or rows, that are typed for a kit's one expert are put into its settings.
_GIVEN: dict[str, Callable[[str, list[str]], str]] = {
    "ffn_moe": ffn_moe_domains.given_text,
    "lora_vlm": adapters_domains.given_rows,
}
# And what trials of experiments make; of adapters there is no loss to compare before a report.
_TRIALS: dict[str, TrialModels] = {"ffn_moe": ffn_moe_trials}
# Of all of them, as the file that a file extends may be the one that names the family.
PATHS = tree_of(*RUN_CONFIGS.values())


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read path over what it extends, apply `a.b=value` overrides and check the whole.

    Raises ConfigError that lists every problem with its dotted name and line.
    """
    path = Path(path)
    return checked(_laid(path, overrides), path, overrides)


def family_of(path: Path, overrides: tuple[str, ...] = ()) -> type[RunConfig]:
    """Return the settings class of the family that a file names, whatever else is the matter with
    it. Raises ConfigError."""
    return _run_config(_laid(path, overrides))


def _laid(path: Path, overrides: tuple[str, ...]) -> dict:
    raw = resolve(path, PATHS)
    for item in overrides:
        own, resolved = override(item, path.parent, PATHS)
        raw = overlay(raw, own, resolved)
    return raw


def checked(raw: dict, path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Return the run that the resolved settings of a file describe. Raises ConfigError as `load`
    does."""
    refuse_credentials(raw, path)
    run_config = _run_config(raw)
    if not raw:
        # An empty file is a mistake far more often than a wish for hours of defaults.
        raise ConfigError(
            f"{path} states nothing; write what differs from the defaults, or `extends: FILE` over "
            "a configuration that ships with MoleForge"
        )
    for name, field in run_config.model_fields.items():
        if name in raw and is_hidden(field):
            raise ConfigError(
                f"{path}: {name} is no setting, as what a run reads is looked at when a command "
                "starts; remove it"
            )
    known = run_config.model_fields.keys()
    strange = raw.keys() - known
    if strange & KINDS:
        raise ConfigError(f"{path} describes experiments, which are many runs, and not one run")
    if strange:
        place = holder(raw, tuple(RUN_CONFIGS.values()))
        if place is not None:
            raise ConfigError(
                f"{path} is no run but what the setting {place} of a run holds: name it there, as "
                f"{place}: {path.name}"
            )
    if strange == raw.keys() and not overrides:
        keys = ", ".join(sorted(map(str, strange)))
        sections = ", ".join(name for name in known if not is_hidden(run_config.model_fields[name]))
        raise ConfigError(
            f"{path} does not describe a run: none of its keys ({keys}) is among a run's "
            f"({sections})"
        )
    try:
        return run_config.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        problems += cross_section_problems(run_config, raw, error)
        raise ConfigError(explain(problems, raw, path, run_config, overrides)) from None


def change_domains(cfg: RunConfig, wish: DomainWish, stated: Stated) -> list[str]:
    """Make a domain come, go, or be another one in what a run's own files state; return what a
    person should know of it. Raises ConfigError."""
    return _CHANGES[cfg.family](cfg, wish, stated)


def trial_models(cfg: RunConfig) -> TrialModels:
    """Return what knows the models that trials of a run make. Raises ConfigError."""
    if cfg.family not in _TRIALS:
        known = ", ".join(_TRIALS)
        raise ConfigError(f"family: {cfg.family} has no trials; those of {known} can be compared")
    return _TRIALS[cfg.family]


def given(cfg: RunConfig, domain: str, paths: list[str]) -> str:
    """Return the override that has the one expert of a run trained on what paths name, from where
    they are typed. Raises ConfigError."""
    return _GIVEN[cfg.family](domain, paths)


def parse(raw: dict[str, Any]) -> RunConfig:
    """Return the run that a mapping describes; `parse(cfg.model_dump(mode="json"))` is cfg.

    Raises ConfigError for a family that there is not, ValidationError for everything else.
    """
    return _run_config(raw).model_validate(raw)


def describes_run(path: Path) -> bool:
    """Whether a file is about a run, by its keys; so is one that cannot be read, which a load then
    says."""
    try:
        raw = read(path)
    except ConfigError:
        return True
    known = {"extends"}
    for run_config in RUN_CONFIGS.values():
        known |= run_config.model_fields.keys()
    # A routing set has a seed too.
    known.remove("seed")
    # And experiments may extend others.
    return not known.isdisjoint(raw) and KINDS.isdisjoint(raw)


def _run_config(raw: dict[str, Any]) -> type[RunConfig]:
    """Return the settings class of the family that raw names. Raises ConfigError."""
    name = raw.get("family", "ffn_moe")
    # A list or a mapping cannot be looked up in a dict, and is no name either.
    if not isinstance(name, str) or name not in RUN_CONFIGS:
        known = ", ".join(RUN_CONFIGS)
        raise ConfigError(f"family: there is no {name!r}; the families are {known}")
    return RUN_CONFIGS[name]
