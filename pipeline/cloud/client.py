"""The client's side of a run elsewhere: refuse what cannot work, mirror the store, show results.

Everything here happens before a machine is paid for, or after.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.table import Table

from ..config.base import GGUF, PACKAGE, is_folder
from ..config.machines import MachineConfig
from ..config.run import RunConfig
from ..errors import ConfigError, DamagedArtifact, StoreError
from ..families import family
from ..report.narrow import print_table
from ..run.dry_run import figures
from ..run.former import NOTE, same_job
from ..run.stages import AUTO, Addresses, is_report
from ..serve.waiting_line import most_of_one
from ..store.artifacts import Store
from ..store.costs import FOLDER as COSTS
from ..store.mark import check_format, parse_format
from ..store.model_files import CONFIG, settings_from_hub
from ..store.model_sources import on_this_machine
from ..store.room import writing
from .containers import UNNAMED, JobResult
from .endpoint import placed
from .far import Names, Read
from .looks import changed_looks
from .prices import Prices, most_gpus
from .running_costs import endpoint_cost_problems
from .wiring import BUCKET

MOST_BETWEEN_SAVES_S = 300
MOST_COSTS = 5


def check(cfg: RunConfig, prices: Prices, mount: str) -> None:
    """Raise ConfigError with everything that cannot work on a machine elsewhere; mount is where its
    store is."""
    problems = []
    volume = cfg.modal.volume or UNNAMED
    max_gpus = cfg.modal.max_gpus
    # All of them, also of stages that this command leaves out: they can be mended at once.
    for name, machine in cfg.modal:
        if not isinstance(machine, MachineConfig):
            continue
        problems += prices.problems(name, machine)
        gpus = most_gpus(machine)
        if gpus > max_gpus:
            problems.append(f"modal.{name}.gpu: {gpus} GPUs, but modal.max_gpus is {max_gpus}")
    problems += prices.region_problems("modal.regions", cfg.modal.regions)
    problems += _endpoint_problems(cfg, prices)
    for name, path in cfg.paths():
        if PurePosixPath(path).is_relative_to(BUCKET):
            if not cfg.modal.bucket:
                problems.append(f"{name}: {path} is in a bucket, and modal.bucket names none")
        elif _is_here(path, mount):
            problems.append(
                f"{name}: {path} is on this machine, where Modal does not see it: "
                f"put it on the volume with `modal volume put {volume} LOCAL /inputs/` "
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


def _endpoint_problems(cfg: RunConfig, prices: Prices) -> Iterator[str]:
    """Yield how an endpoint cannot be both, what its containers would be given and their server not
    take, and what they may cost above the limit."""
    modal, machine = cfg.modal, cfg.modal.endpoint
    if modal.endpoint_public and (modal.endpoint_secret or modal.endpoint_proxy_auth):
        other = "endpoint_proxy_auth is true"
        if modal.endpoint_secret:
            other = f"endpoint_secret is {modal.endpoint_secret}"
        yield (
            f"modal.endpoint_public: true, but modal.{other}: an endpoint is open or wants "
            "something of who asks, so set only one of them"
        )
    yield from prices.region_problems("modal.endpoint.regions", machine.regions)
    # Only what is known has a price; the rest is told already
    regions = prices.region_problems("", placed(modal).regions)
    if not (regions or prices.problems("endpoint", machine)):
        yield from endpoint_cost_problems(modal, prices)
    # Where none has a key all may come as one client, as Modal's own server is in front
    most = most_of_one(cfg.serve.max_batch + cfg.serve.max_waiting)
    if machine.max_inputs > most:
        yield (
            f"modal.endpoint.max_inputs: {machine.max_inputs} requests at once, but a server of "
            f"serve.max_batch {cfg.serve.max_batch} and serve.max_waiting {cfg.serve.max_waiting} "
            f"refuses those over {most} of one client, which another container could answer"
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


def look_at_models(cfg: RunConfig, mount: str, root: Path, read: Read) -> list[str]:
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
                f"`modal volume put {cfg.modal.volume or UNNAMED} LOCAL /{below}`"
            )
        folder = root / "models" / below
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_bytes(content)
        return folder

    return family(cfg.family).preflight(cfg, find)


def mirror(
    cfg: RunConfig,
    root: Path,
    names: Names,
    read: Read,
) -> Store:
    """Return a store below root with what a plan needs of the far one: manifests, states of
    checkpoints, what the last commands have cost.

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
    volume = f"the volume {cfg.modal.volume or UNNAMED}"
    mark = read("store.json")
    if mark is not None:
        try:
            found = parse_format(mark)
        except ValueError as error:
            raise StoreError(f"store.json of {volume} cannot be read: {error}") from None
        check_format(found, volume)
    # What the last commands were paid for tells how long jobs take
    for name in sorted(names(COSTS))[-MOST_COSTS:]:
        wanted.append(f"{COSTS}/{name}")
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


def show_report(results: list[JobResult], read: Read, console: Console) -> None:
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
