"""The client's side of a run elsewhere: read the command, refuse what cannot work, mirror the
store, show results.

Everything here happens before a machine is paid for, or after.
"""

import argparse
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.table import Table

from ..config.base import GGUF, PACKAGE, is_folder
from ..config.machines import MachineConfig
from ..config.run import RunConfig
from ..errors import ConfigError, DamagedArtifact, StoreError
from ..families import family
from ..families.ffn_moe.config import FfnMoeConfig
from ..families.load import load
from ..report.narrow import print_table
from ..run.dry_run import figures
from ..run.experiments.reading import base_of, read_experiments
from ..run.former import NOTE, same_job
from ..run.stages import AUTO, Addresses, is_report
from ..store.artifacts import Store
from ..store.mark import check_format, parse_format
from ..store.model_files import CONFIG, settings_from_hub
from ..store.model_sources import on_this_machine
from ..store.room import writing
from .containers import JobResult
from .looks import changed_looks
from .prices import Prices, most_gpus

# The demo on a pretrained model needs its package where the command is typed
DEFAULT = "config/demo_from_zero.yaml"
EXPERIMENTS = "config/experiments.yaml"
EXPERIMENTS_COMMAND = "::experiments"  # how that entrypoint is named
MOST_BETWEEN_SAVES_S = 300
HELP_FLAGS = {"--help", "-h"}
FLAGS_HELP = f"""What the flags below mean:
  --config FILE            the run, a YAML file on this machine (default {DEFAULT}); see config/
  --override TEXT          changes to it, one text: --override "expert.steps=200 router.top_k=1"
  --sequential             the jobs of a stage one after another in one container, each within
                           runtime.memory_budget; without it each has a container of its own, as
                           many at once as modal.max_gpus allows
  --frozen                 go on with the data that was read before, whatever has changed since
"""


def announced(argv: list[str], environ: Mapping[str, str]) -> RunConfig:
    """Return the configuration that a command line of `modal` is about: its own, $MOLEFORGE_CONFIG,
    or the defaults.

    Raises ConfigError, so that a mistake ends here and not after images have been built.
    """
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
    if of_experiments:
        return base_of(read_experiments(Path(found.config), overrides(*found.override)))
    return load(found.config, overrides(*found.override))


def explain(argv: list[str]) -> str:
    """Return what the flags of an entrypoint mean when help is asked for, which Modal itself does
    not say; else ""."""
    if "run" not in argv or HELP_FLAGS.isdisjoint(argv):
        return ""
    return FLAGS_HELP


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


def check(cfg: RunConfig, prices: Prices, mount: str) -> None:
    """Raise ConfigError with everything that cannot work on a machine elsewhere; mount is where its
    store is."""
    problems = []
    max_gpus = cfg.modal.max_gpus
    # All of them, also of stages that this command leaves out: they can be mended at once.
    for name, machine in cfg.modal:
        if not isinstance(machine, MachineConfig):
            continue
        problems += prices.problems(name, machine)
        gpus = most_gpus(machine)
        if gpus > max_gpus:
            problems.append(f"modal.{name}.gpu: {gpus} GPUs, but modal.max_gpus is {max_gpus}")
    if cfg.modal.endpoint_secret and cfg.modal.endpoint_public:
        problems.append(
            f"modal.endpoint_public: true, but modal.endpoint_secret is {cfg.modal.endpoint_secret}"
            ": an endpoint is open or wants a key, so set only one of them"
        )
    problems += _endpoint_problems(cfg)
    for name, path in cfg.paths():
        if _is_here(path, mount):
            problems.append(
                f"{name}: {path} is on this machine, where Modal does not see it: "
                "put it on the volume with `modal volume put moleforge LOCAL /inputs/` "
                f"and write {mount}/inputs/..., or name a URL"
            )
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
        lines = ["this configuration cannot run on Modal:", *problems]
        raise ConfigError("\n  ".join(lines))


def _endpoint_problems(cfg: RunConfig) -> Iterator[str]:
    """Yield what a container of the endpoint would be given and its server not take."""
    machine = cfg.modal.endpoint
    most = cfg.serve.max_batch + cfg.serve.max_waiting
    if machine.max_inputs > most:
        yield (
            f"modal.endpoint.max_inputs: {machine.max_inputs} requests at once, but a server of "
            f"serve.max_batch {cfg.serve.max_batch} and serve.max_waiting {cfg.serve.max_waiting} "
            f"refuses those over {most}, which another container could answer"
        )
    if machine.timeout_s <= cfg.serve.max_seconds:
        yield (
            f"modal.endpoint.timeout_s: Modal ends a request after {machine.timeout_s} s, before "
            f"its answer ends by itself after serve.max_seconds, {cfg.serve.max_seconds:g}"
        )


def _is_here(path: str, mount: str) -> bool:
    """Whether a path means this machine: not a URL, not on the volume, not in a package, which
    containers have too."""
    if path.startswith(PACKAGE):
        return False
    # fsspec's two ways to write a local path as a URL.
    if "://" in path and not path.startswith(("file://", "local://")):
        return False
    return not PurePosixPath(path).is_relative_to(mount)


def settled(cfg: RunConfig, prices: Prices, tell: Callable[[str], None]) -> RunConfig:
    """Return a run with the arithmetic that `dtype: auto` means on its machines, so that all its
    containers agree on it and on its addresses; tells which it is.

    One for the whole run, as what is compared has to be alike: bf16 when every machine that trains
    has it.
    """
    if cfg.dtype != AUTO:
        return cfg
    # by name once, as a search runs on the machine of its training
    without: dict[str, None] = {}
    for name, row in cfg.stages.items():
        # A stage that reads it trains something, and one that has no jobs trains nothing here.
        if "dtype" not in row.reads or not cfg.items(name):
            continue
        if not prices.has_bf16(cfg.machine(name)):
            without[f"modal.{row.machine or name}.gpu"] = None
    dtype = "fp32" if without else "bf16"
    why = f"{', '.join(without)} need not have bf16" if without else "all GPUs that train have it"
    tell(f"dtype: auto is {dtype}, as {why}")
    return cfg.model_copy(update={"dtype": dtype})


def look_at_models(
    cfg: RunConfig, mount: str, root: Path, read: Callable[[str], bytes | None]
) -> list[str]:
    """Return what a person should know of the models that a run names; of those on the volume, at
    mount there, the settings are read into root. Raises ConfigError."""

    def find(setting: str, model: str, revision: str | None) -> Path | None:
        if model.startswith(PACKAGE):
            return on_this_machine(setting, model, revision)
        if not is_folder(model):
            return settings_from_hub(model, revision)
        path = PurePosixPath(model)
        # A .gguf file has its settings in it, and is too large to be fetched for them
        if not path.is_relative_to(mount) or path.suffix == GGUF:
            return None
        below = path.relative_to(mount)
        content = read(str(below / CONFIG))
        if content is None:
            raise ConfigError(
                f"{setting}: the volume has no {below}/{CONFIG}: put the model's folder there with "
                f"`modal volume put moleforge LOCAL /{below}`"
            )
        folder = root / "models" / below
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_bytes(content)
        return folder

    return family(cfg.family).preflight(cfg, find)


def mirror(
    cfg: RunConfig,
    root: Path,
    names: Callable[[str], Iterable[str]],
    read: Callable[[str], bytes | None],
) -> Store:
    """Return a store below root with what a plan needs of the far one: manifests and states of
    checkpoints.

    `names` lists a directory there, `read` returns a file's bytes; of what is absent nothing and
    None. Raises OldStore, NewerStore, DiskFull or StoreError.
    """
    # The volume may hold hundreds of runs, and each file read costs a request.
    reachable = set(Addresses(cfg).reachable())
    wanted = []
    whole = reachable.intersection(names("artifacts"))
    for name in whole:
        wanted.append(f"artifacts/{name}/manifest.json")
    begun = list(names("resume"))
    # What was done under other settings is told of a job that has nothing itself.
    former: dict[str, None] = {}
    for address in reachable.difference(whole, begun):
        former |= dict.fromkeys(same_job(address, begun))
    for name in (*reachable.intersection(begun), *former):
        # A checkpoint is written to the slot that the last one is not in.
        wanted.append(f"resume/{name}/a/state.json")
        wanted.append(f"resume/{name}/b/state.json")
        if name in former:
            wanted.append(f"resume/{name}/{NOTE}")
    mark = read("store.json")
    if mark is not None:
        try:
            found = parse_format(mark)
        except ValueError as error:
            raise StoreError(
                f"store.json of the volume moleforge cannot be read: {error}"
            ) from None
        check_format(found, "the volume moleforge")
    for path in (*wanted, *changed_looks(cfg, names, read)):
        content = read(path)
        if content is not None:
            copy = root / path
            with writing(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)
    return Store(root)


def show_results(results: list[JobResult], console: Console) -> None:
    """Print what every job left, or why it failed: one row each."""
    table = Table(title="results", title_justify="left", title_style="bold")
    table.add_column("artifact", overflow="fold")
    table.add_column("state", overflow="fold")
    table.add_column("MB", justify="right", overflow="fold")
    table.add_column("seconds", justify="right", overflow="fold")
    table.add_column("what came out", overflow="fold")
    for result in results:
        if result.error:
            table.add_row(result.address, result.state, "", "", result.error)
            continue
        table.add_row(
            result.address,
            result.state,
            f"{result.bytes / 1e6:.1f}",
            f"{result.seconds:.0f}",
            figures(result.metrics),
        )
    print_table(console, table)


def show_report(
    results: list[JobResult], read: Callable[[str], bytes | None], console: Console
) -> None:
    """Print the report's tables when there is a report among the results."""
    # Only here, as it takes time that no other command has to wait for.
    from .. import report

    for result in results:
        if result.error or not is_report(result.stage):
            continue
        content = read(f"artifacts/{result.address}/report.json")
        if not content:
            continue
        made = report.read(content)
        report.show(made, console)
        former = read(f"artifacts/{result.former}/report.json") if result.former else None
        if former and result.former != result.address:
            # of this run as it was: one that can no longer be read is only not compared with
            with suppress(StoreError, DamagedArtifact):
                report.show_changes(report.read(former), made, console)
