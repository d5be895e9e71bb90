"""The laptop's side of a run elsewhere: read the command, refuse what cannot work, mirror the
store, show results.

Everything here happens before a machine is paid for, or after.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.table import Table

from ..config.machines import MachineConfig
from ..config.run import RunConfig
from ..errors import ConfigError
from ..families.ffn_moe.config import FfnMoeConfig
from ..families.load import load
from ..run.dry_run import figures
from ..run.stages import Addresses
from ..store.artifacts import Store, check_format
from .containers import JobResult
from .prices import Prices, most_gpus

DEFAULT = "config/demo.yaml"
MOST_BETWEEN_SAVES_S = 300
FLAGS = {
    "--config FILE": f"the run, a YAML file on this machine (default {DEFAULT}); see config/",
    "--override TEXT": 'changes to it, one text: --override "expert.steps=200 router.top_k=1"',
    "--sequential": "the jobs of a stage one after another in one container, each within runtime.memory_budget;",
    "": "without it each has a container of its own, as many at once as modal.max_gpus allows",
}


def announced(argv: list[str], environ: Mapping[str, str]) -> RunConfig:
    """Return the configuration that a command line of `modal` is about: its own, $MOLEFORGE_CONFIG,
    or the defaults.

    Raises ConfigError, so that a mistake ends here and not after images have been built.
    """
    runs = "run" in argv
    if runs and typed(argv):
        top = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        top.add_argument("--config", default=DEFAULT)
        top.add_argument("--override", action="append", default=[])
        found, _ = top.parse_known_args(argv[1:])
        if len(found.override) > 1:
            together = shlex.quote(" ".join(found.override))
            raise ConfigError(
                f"--override is given {len(found.override)} times, and Modal passes on only the last: "
                f"write --override {together}"
            )
        return load(found.config, overrides(*found.override))
    path = environ.get("MOLEFORGE_CONFIG")
    return load(path) if path and not runs else FfnMoeConfig()


def explain(argv: list[str]) -> str:
    """Return what the flags of an entrypoint mean when help is asked for, which Modal itself does
    not say; else ""."""
    if "run" not in argv or not {"--help", "-h"} & set(argv):
        return ""
    return "\n".join(
        ["What the flags below mean:", *(f"  {flag:24} {text}" for flag, text in FLAGS.items()), ""]
    )


def typed(argv: list[str]) -> bool:
    """Whether this is a command of `modal` that will do something: not an import by another
    program, not --help."""
    command = Path(argv[0])
    return "modal" in (command.stem, command.parent.name) and not {"--help", "-h"} & set(argv)


def overrides(text: str = "") -> tuple[str, ...]:
    """Return the single overrides of one text. Raises ConfigError when its quotes do not pair."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(
            f'--override {text}: {error}; write --override "section.field=value other=value"'
        ) from None


def check(cfg: RunConfig, prices: Prices, mount: str) -> None:
    """Raise ConfigError with everything that cannot work on a machine elsewhere; mount is where its
    store is."""
    machines = {name: part for name, part in cfg.modal if isinstance(part, MachineConfig)}
    problems = [
        problem for name, machine in machines.items() for problem in prices.problems(name, machine)
    ]
    for name, machine in machines.items():
        if most_gpus(machine) > cfg.modal.max_gpus:
            problems.append(
                f"modal.{name}.gpu: {most_gpus(machine)} GPUs, but modal.max_gpus is {cfg.modal.max_gpus}"
            )
    problems += [
        _not_there(name, path, mount) for name, path in cfg.paths() if _is_here(path, mount)
    ]
    if cfg.runtime.save_every_s > MOST_BETWEEN_SAVES_S:
        problems.append(
            f"runtime.save_every_s: {cfg.runtime.save_every_s:g} s is what a preemption may cost; "
            f"at most {MOST_BETWEEN_SAVES_S} on Modal, where preemptions are usual"
        )
    if cfg.runtime.wandb == "online" and not cfg.modal.wandb_secret:
        problems.append(
            "runtime.wandb: online needs modal.wandb_secret, the name of a secret made with "
            "`modal secret create NAME WANDB_API_KEY=...`"
        )
    if problems:
        raise ConfigError(
            "this configuration cannot run on Modal:\n"
            + "\n".join(f"  {line}" for line in problems)
        )


def _is_here(path: str, mount: str) -> bool:
    """Whether a path means this machine: not a URL, and not on the volume."""
    far = "://" in path and not path.startswith(("file://", "local://"))
    return not far and not PurePosixPath(path).is_relative_to(mount)


def _not_there(name: str, path: str, mount: str) -> str:
    return (
        f"{name}: {path} is on this machine, where Modal does not see it: put it on the volume with "
        f"`modal volume put moleforge LOCAL /inputs/` and write {mount}/inputs/..., or name a URL"
    )


def mirror(
    cfg: RunConfig,
    root: Path,
    names: Callable[[str], Iterable[str]],
    read: Callable[[str], bytes | None],
) -> Store:
    """Return a store below root with what a plan needs of the far one: manifests and states of
    checkpoints.

    `names` lists a directory there, `read` returns a file's bytes; of what is absent nothing and
    None. Raises OldStore or NewerStore.
    """
    reachable = set(Addresses(cfg).reachable())
    wanted = [f"artifacts/{name}/manifest.json" for name in names("artifacts") if name in reachable]
    wanted += [
        f"resume/{name}/{slot}/state.json"
        for name in names("resume")
        if name in reachable
        for slot in "ab"
    ]
    mark = read("store.json")
    if mark is not None:
        check_format(int(json.loads(mark)["format"]), "the volume moleforge")
    for path in wanted:
        content = read(path)
        if content is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    return Store(root)


def show_results(outcomes: list[JobResult], console: Console) -> None:
    """Print what every job left, or why it failed: one row each."""
    table = Table(title="results", title_justify="left", title_style="bold")
    for name in ("artifact", "state", "MB", "seconds", "what came out"):
        table.add_column(
            name, justify="right" if name in ("MB", "seconds") else "left", overflow="fold"
        )
    for each in outcomes:
        size, seconds = (
            (f"{each.bytes / 1e6:.1f}", f"{each.seconds:.0f}") if not each.error else ("", "")
        )
        table.add_row(each.address, each.state, size, seconds, each.error or figures(each.metrics))
    console.print(table)


def show_report(
    outcomes: list[JobResult], read: Callable[[str], bytes | None], console: Console
) -> None:
    """Print the report's tables when there is a report among the results."""
    from .. import report

    for each in outcomes:
        content = (
            read(f"artifacts/{each.address}/report.json")
            if each.stage == "evaluate" and not each.error
            else None
        )
        if content:
            report.show(report.read(content), console)
