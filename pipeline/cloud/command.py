"""A command of `modal` as it was typed: which run it is about, what it does, what its flags mean.

Modal reads the command itself, later; by then images may have been built.
"""

import argparse
import inspect
import re
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.base import NAME
from ..config.machines import ModalConfig
from ..config.run import RunConfig
from ..credentials import masked
from ..errors import ConfigError
from ..families.ffn_moe.config import FfnMoeConfig
from ..families.load import load
from ..run.experiments.reading import base_of, read_experiments
from .containers import UNNAMED
from .endpoint import entered

ROOT = Path(__file__).parents[2]
# The demo on a pretrained model needs its package where the command is typed
DEFAULT = "config/demo_from_zero.yaml"
EXPERIMENTS = "config/experiments.yaml"
EXPERIMENTS_COMMAND = "::experiments"  # how that entrypoint is named
OLDEST_CLIENT = (1, 3)
HELP_FLAGS = {"--help", "-h"}
# By name what stands behind a flag, and what it means
FLAGS = {
    "config": ("FILE", "the run, a YAML file on this machine; config/ has some"),
    "override": ("TEXT", 'changes to it, one text: --override "expert.steps=9 router.top_k=1"'),
    "sequential": (
        "",
        "the jobs of a stage one after another in one container, each within "
        "runtime.memory_budget; without it each has a container of its own, as many at once as "
        "modal.max_gpus allows",
    ),
    "text_only": ("", "train nothing, so that durations in epochs can be priced afterwards"),
    "frozen": ("", "go on with the data that was read before, whatever has changed since"),
    "deploy": ("", "make the bundle too, and deploy an endpoint for it from here"),
    "to": ("ADDRESS", "the bundle to serve again, or the start of its address; none: the former"),
    "run": ("NAME", "the run, or several in one text, as `::runs` lists them"),
    "once": ("", "look once"),
    "yes": ("", "remove what would only be listed"),
    "orphans": ("", "also what no run reaches"),
    "damaged": ("", "also what cannot be read"),
}
MEANING_AT = 21  # column in which meanings begin
WIDTH = 96


def announced(argv: list[str], environ: Mapping[str, str]) -> RunConfig:
    """Return the configuration that a command line of `modal` is about: its own, $MOLEFORGE_CONFIG,
    or the defaults; app and volume have names.

    Raises ConfigError, so that a mistake ends here and not after images have been built.
    """
    return named(_announced(argv, environ), environ)


def _announced(argv: list[str], environ: Mapping[str, str]) -> RunConfig:
    if "run" in argv:
        # With --help, or imported by a program that has a word like it, no run is meant.
        return _of_command(argv) if typed(argv) else FfnMoeConfig()
    # `modal deploy` and `modal serve` pass no flags on.
    path = environ.get("MOLEFORGE_CONFIG")
    return load(path) if path else FfnMoeConfig()


def _of_command(argv: list[str]) -> RunConfig:
    """Return the configuration of a `modal run`; of experiments the one that all their trials start
    from. Raises ConfigError."""
    of_experiments = any(word.endswith(EXPERIMENTS_COMMAND) for word in argv)
    # Modal reads the same flags later, and its own among them, which are left over here.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=EXPERIMENTS if of_experiments else DEFAULT)
    parser.add_argument("--override", action="append", default=[])
    found, _ = parser.parse_known_args(argv[1:])
    count = len(found.override)
    if count > 1:
        together = shlex.quote(" ".join(found.override))
        raise ConfigError(
            f"--override is given {count} times, and Modal passes on only the last: "
            f"write --override {together}"
        )
    config = shipped(found.config)
    if of_experiments:
        return base_of(read_experiments(Path(config), overrides(*found.override)))
    return load(config, overrides(*found.override))


def shipped(config: str) -> str:
    """Return the path of a configuration; a default is found wherever the command is typed."""
    if config in (DEFAULT, EXPERIMENTS) and not Path(config).exists():
        return str(ROOT / config)
    return config


def named(cfg: RunConfig, environ: Mapping[str, str]) -> RunConfig:
    """Return a run with the names of its app and its volume: its own, the environment's, or the
    program's. Raises ConfigError for what is no name."""
    names = {}
    for field in ("app", "volume"):
        variable = f"MOLEFORGE_{field.upper()}"
        given = environ.get(variable) or UNNAMED
        if not re.fullmatch(NAME, given):
            raise ConfigError(f"${variable}: {given} is no name: write letters, digits, . - _")
        names[field] = getattr(cfg.modal, field) or given
    return cfg.model_copy(update={"modal": cfg.modal.model_copy(update=names)})


def explain(argv: list[str], commands: Mapping[str, Mapping[str, object]]) -> str:
    """Return what the flags of an entrypoint mean and are without being given when help is asked
    for, which Modal itself does not say; else "". `commands` has the defaults of each one's."""
    if "run" not in argv or HELP_FLAGS.isdisjoint(argv):
        return ""
    wanted: dict[str, object] = {}
    for word in argv:
        wanted |= commands.get(word.partition("::")[2], {})
    if not wanted:
        for flags in commands.values():
            wanted |= flags
    lines = ["What the flags below mean:"]
    for name, default in wanted.items():
        value, meaning = FLAGS[name]
        head = f"  --{name.replace('_', '-')} {value}".ljust(MEANING_AT)
        if default != "":
            shown = str(default).lower() if isinstance(default, bool) else default
            meaning += f" (default: {shown})"
        indent = " " * MEANING_AT
        lines.append(textwrap.fill(meaning, WIDTH, initial_indent=head, subsequent_indent=indent))
    return "\n".join(lines) + "\n"


def flags_of(names: Mapping[str, Any], kind: type) -> dict[str, dict[str, object]]:
    """Return the flags of every command among a module's names, which are of that kind, with what
    each is without being given; "" where that is nothing."""
    found: dict[str, dict[str, object]] = {}
    for name, command in names.items():
        if not isinstance(command, kind):
            continue
        found[name] = {}
        typed_in: Any = command
        for each in inspect.signature(typed_in.info.raw_f).parameters.values():
            found[name][each.name] = "" if each.default is each.empty else each.default
    return found


def typed(argv: list[str]) -> bool:
    """Whether this is a command of `modal` that will do something: not an import by another
    program, not --help."""
    # A script called modal, or the package run by `python -m modal`.
    command = Path(argv[0])
    by_modal = "modal" in (command.stem, command.parent.name)
    return by_modal and HELP_FLAGS.isdisjoint(argv)


def deploys(argv: list[str]) -> bool:
    """Whether this is a command of `modal` that makes an endpoint: a deployment, or `serve`."""
    if not typed(argv):
        return False
    # The command comes first; an option before it takes no value.
    words = [word for word in argv[1:] if not word.startswith("-")]
    return words[:1] in (["deploy"], ["serve"])


def overrides(text: str = "") -> tuple[str, ...]:
    """Return the single overrides of one text. Raises ConfigError when its quotes do not pair."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(
            f'--override {text}: {error}; write --override "section.field=value other=value"'
        ) from None


def as_typed(argv: list[str]) -> str:
    """Return a command of `modal` as a person types it again, without the credentials in it."""
    return masked(f"modal {shlex.join(argv[1:])}")


def afterwards(
    modal: ModalConfig,
    stages: tuple[str, ...],
    config: str,
    override: str,
    environ: Mapping[str, str],
) -> str:
    """Return what to type once the stages of a command are done, "" where nothing follows; `modal`
    is that section of the run that was done."""
    serving = deploying(modal, environ)
    if "deploy" in stages:
        return f"to serve it: {serving}"
    if "evaluate" not in stages:
        return ""
    words = ["modal", "run", "modal_app.py::deploy", "--config", config]
    changes = list(overrides(override))
    if not entered(modal):
        changes.append("modal.endpoint_secret=NAME")
    if changes:
        words += ["--override", " ".join(changes)]
    return f"to serve it: {shlex.join(words)}, then {serving}"


def deploying(modal: ModalConfig, environ: Mapping[str, str]) -> str:
    """Return the command that deploys an endpoint of this section; it reads no configuration, so
    variables tell it the names of app and volume where the environment has others."""
    words = []
    for field in ("app", "volume"):
        variable = f"MOLEFORGE_{field.upper()}"
        name = getattr(modal, field) or UNNAMED
        if name != (environ.get(variable) or UNNAMED):
            words.append(f"{variable}={name}")
    return " ".join([*words, "modal deploy modal_app.py"])


def refuse_client(version: str) -> None:
    """Raise ConfigError for a client of Modal that knows less than modal_app.py asks for."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_CLIENT:
        oldest = ".".join(map(str, OLDEST_CLIENT))
        raise ConfigError(
            f"the modal client here is {version}, and modal_app.py needs {oldest} or later: "
            "`pip install -r requirements.txt` brings the one that it is tested with"
        )
