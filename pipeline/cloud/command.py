"""A command of `modal` as it was typed: which run it is about, what it does, what its flags mean.

Modal reads the command itself, later; by then images may have been built.
"""

import inspect
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.base import NAME
from ..config.run import RunConfig
from ..errors import ConfigError
from ..families.ffn_moe.config import FfnMoeConfig
from ..families.load import load
from ..run.experiments.reading import base_of, read_experiments
from .containers import UNNAMED
from .given import EXPERIMENTS, Given, overrides

EXPERIMENTS_COMMAND = "::experiments"  # how that entrypoint is named
OLDEST_CLIENT = (1, 3)
HELP_FLAGS = {"--help", "-h"}
# By name what stands behind a flag, and what it means
FLAGS = {
    "config": ("FILE", "the run, a YAML file on this machine; config/ has some"),
    "override": ("TEXT", 'changes to it, one text: --override "expert.steps=9 router.top_k=1"'),
    "input": (
        "PATHS",
        "the text, in place of data.files: paths on the volume or in the bucket, or URLs; like all "
        "changes the same for every stage of a run, so say it in each",
    ),
    "checkpoint": (
        "MODEL",
        "the pretrained model to start from, on the volume or the Hub, in place of trunk.init or "
        "loras.base.model; in each stage of a run",
    ),
    "bucket": (
        "NAME",
        "a bucket, or NAME/FOLDER/ of one, that containers see read-only at /bucket "
        "(modal.bucket); in each stage of a run",
    ),
    "output_dir": ("DIR", "a folder here that gets a copy of what comes out"),
    "last": ("N", "without --run: how many of the latest runs; 0: all"),
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
    if any(word.endswith(EXPERIMENTS_COMMAND) for word in argv):
        given = Given.of(argv[1:], EXPERIMENTS)
        return base_of(read_experiments(given.path, overrides(given.override)))
    given = Given.of(argv[1:])
    return load(given.path, given.changes())


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


def refuse_client(version: str) -> None:
    """Raise ConfigError for a client of Modal that knows less than modal_app.py asks for."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_CLIENT:
        oldest = ".".join(map(str, OLDEST_CLIENT))
        raise ConfigError(
            f"the modal client here is {version}, and modal_app.py needs {oldest} or later: "
            "`pip install -r requirements.txt` brings the one that it is tested with"
        )
