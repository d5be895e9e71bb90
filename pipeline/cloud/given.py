"""What a command of Modal is about, as it was typed: a configuration and what changes it."""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..families.load import family_of

ROOT = Path(__file__).parents[2]
# The demo on a pretrained model needs its package where the command is typed
DEFAULT = "config/demo_from_zero.yaml"
EXPERIMENTS = "config/experiments.yaml"
# Flags that stand for settings, which ones the family of a run says
SHORT = ("input", "checkpoint", "bucket")
SEVERAL = ("input",)  # may be of several words


@dataclass(frozen=True)
class Given:
    """The configuration of a command, its changes in one text, and flags that are changes too."""

    config: str = DEFAULT
    override: str = ""
    input: str = ""
    checkpoint: str = ""
    bucket: str = ""
    smoke: bool = False

    @classmethod
    def of(cls, words: Sequence[str], default: str = DEFAULT) -> "Given":
        """Return what words behind `modal` say of it. Raises ConfigError."""
        # Modal reads the same flags later, and its own among them, which are left over here.
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config", default=default)
        parser.add_argument("--override", action="append", default=[])
        for name in SHORT:
            parser.add_argument(f"--{name}", default="")
        found, _ = parser.parse_known_args(words)
        count = len(found.override)
        if count > 1:
            together = shlex.quote(" ".join(found.override))
            raise ConfigError(
                f"--override is given {count} times, and Modal passes on only the last: "
                f"write --override {together}"
            )
        short = {name: getattr(found, name) for name in SHORT}
        return cls(found.config, "".join(found.override), **short)

    @property
    def path(self) -> Path:
        """Where the configuration is."""
        return Path(shipped(self.config))

    def changes(self) -> tuple[str, ...]:
        """Return all that changes it, what is written out as a setting last. Raises ConfigError."""
        typed = overrides(self.override)
        wanted = [name for name in SHORT if getattr(self, name)]
        if self.smoke:
            wanted.append("smoke")
        if not wanted:
            return typed
        family = family_of(self.path, typed)
        found = []
        for name in wanted:
            if name not in family.shorthands:
                raise ConfigError(
                    f"--{name}: {self.config} says it for each task by itself, so there is no flag "
                    "for all of them"
                )
            text = "" if name == "smoke" else _as_yaml(name, getattr(self, name))
            found += [each.replace("{}", text) for each in family.shorthands[name]]
        return (*found, *typed)

    def words(self) -> list[str]:
        """Return the flags that say the same by settings alone. Raises ConfigError."""
        words = ["--config", self.config]
        changes = self.changes()
        return [*words, "--override", shlex.join(changes)] if changes else words


def _as_yaml(name: str, text: str) -> str:
    # All JSON of texts is YAML
    return json.dumps(shlex.split(text) if name in SEVERAL else text)


def shipped(config: str) -> str:
    """Return the path of a configuration; a default is found wherever the command is typed."""
    if config in (DEFAULT, EXPERIMENTS) and not Path(config).exists():
        return str(ROOT / config)
    return config


def overrides(text: str = "") -> tuple[str, ...]:
    """Return the single overrides of one text. Raises ConfigError when its quotes do not pair."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(
            f'--override {text}: {error}; write --override "section.field=value other=value"'
        ) from None
