"""From files and overrides to one checked run; one check reports every problem at once."""

from pathlib import Path

from pydantic import ValidationError

from ..config.files import overlay, override, read, resolve
from ..config.problems import cross_section_problems, explain
from ..config.run import RunConfig
from ..errors import ConfigError
from .ffn_moe.config import FfnMoeConfig
from .lora_vlm.config import LoraVlmConfig

RUN_CONFIGS: dict[str, type[RunConfig]] = {"ffn_moe": FfnMoeConfig, "lora_vlm": LoraVlmConfig}


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read path over what it extends, apply `a.b=value` overrides and check the whole.

    Raises ConfigError that lists every problem with its dotted name and line.
    """
    path = Path(path)
    raw = resolve(path)
    for item in overrides:
        raw = overlay(raw, *override(item, path.parent))
    kind = _kind(raw)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            explain(
                [*error.errors(), *cross_section_problems(kind, raw, error)], raw, path, overrides
            )
        ) from None


def parse(raw: dict) -> RunConfig:
    """Return the run that a mapping describes; `parse(cfg.model_dump(mode="json"))` is cfg.

    Raises ConfigError for a family that there is not, ValidationError for everything else.
    """
    return _kind(raw).model_validate(raw)


def describes_run(path: Path) -> bool:
    """Whether a file is about a run, by its keys; so is one that cannot be read, which a load then
    says."""
    try:
        keys = read(path).keys()
    except ConfigError:
        return True
    known = {"extends", *(name for kind in RUN_CONFIGS.values() for name in kind.model_fields)}
    return bool(keys & (known - {"seed"}))  # a routing set has a seed too


def _kind(raw: dict) -> type[RunConfig]:
    name = raw.get("family", "ffn_moe")
    if name not in RUN_CONFIGS:
        raise ConfigError(
            f"family: there is no {name!r}; the families are {', '.join(RUN_CONFIGS)}"
        )
    return RUN_CONFIGS[name]
