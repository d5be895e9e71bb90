"""The pipeline on Modal: image, volume, secrets, a function per stage, the endpoint; what they do
is in pipeline/.

`modal run modal_app.py::train_experts --config config/qwen3_8b.yaml` does a stage, `::run_all` all
of them, `modal deploy modal_app.py` serves the bundle that `::deploy` made last. What is typed is
checked on this machine first; the rest is in the hands of `orchestrate`, so that with `modal run
--detach` a closed laptop stops nothing. Functions and commands come from the families' tables of
stages: a new stage needs nothing here.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import modal
from rich.console import Console

from pipeline import cloud, report
from pipeline.config.machines import MachineConfig
from pipeline.config.run import RunConfig
from pipeline.config.serving import ServeConfig
from pipeline.errors import PipelineError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import load, parse
from pipeline.report.narrow import output
from pipeline.run.advice import sentence
from pipeline.run.experiments.reading import read_experiments
from pipeline.run.stages import ROWS, RUN, STAGES, Addresses, about, has_several_jobs
from pipeline.store.artifacts import Store

HERE = Path(__file__).parent
VOLUME = os.environ.get("MOLEFORGE_VOLUME_PATH", "/store")
# until an endpoint's container has opened its bundle; Modal's own limit would be that of a request
LOADING_S = 900
UV = "0.13.9"


def _volume(name: str) -> modal.Volume:
    # Version 2 is the one that many containers may write to at once
    return modal.Volume.from_name(name, create_if_missing=True, version=2)


def _read(path: str, source: modal.Volume | None = None) -> bytes | None:
    try:
        return b"".join((source or volume).read_file(path))
    except (FileNotFoundError, modal.exception.NotFoundError):
        return None


def _asked_for() -> tuple[RunConfig, cloud.Wiring]:
    """Return the configuration that the command is about, and what is built by it; inside a
    container that is settled already."""
    if not modal.is_local():
        return FfnMoeConfig(), cloud.Wiring.told()
    edge = cloud.ModalEdge(Path(VOLUME))
    serves = cloud.deploys(sys.argv)
    note = None
    try:
        cloud.refuse_client(modal.__version__)
        cfg = cloud.announced(sys.argv, os.environ)
        edge = cloud.ModalEdge(Path(VOLUME), cfg.modal.volume)
        if serves:
            note = _read(cloud.SERVED, _volume(cfg.modal.volume))
            cfg = cloud.deployed(cfg, os.environ, note)
        prices = cloud.Prices.load(HERE / "config/prices.yaml")
        cloud.check(cfg, prices, VOLUME)
        if serves:
            sys.stdout.write(f"{cloud.endpoint_told(cfg.modal, prices)}\n")
        return cfg, cloud.Wiring.settled(cfg, note, serves)
    except PipelineError as error:
        sys.exit(f"error: {sentence(error, edge)}")
    except modal.exception.Error as error:
        sys.exit(f"error: what is to be served cannot be read from the volume: {error}")


def _secret(purpose: str, name: str) -> modal.Secret:
    """Return a secret; on the laptop it is looked up at once, before images are built."""
    keys = cloud.SECRETS[purpose]
    secret = modal.Secret.from_name(name, required_keys=keys)
    if modal.is_local() and cloud.typed(sys.argv):
        try:
            secret.hydrate()
        except modal.exception.Error as error:
            pairs = " ".join(f"{key}=..." for key in keys)
            sys.exit(
                f"error: modal.{purpose}_secret: {error}; make it with `modal secret create {name} "
                f"{pairs}`, or set modal.{purpose}_secret to null"
            )
    return secret


CFG, WIRING = _asked_for()
EDGE = cloud.ModalEdge(Path(VOLUME), WIRING.volume)
ENV = WIRING.variables | {
    # On the volume: what one container has fetched from the Hub, the next ones find
    "HF_HOME": f"{VOLUME}/hub",
    "MOLEFORGE_VOLUME_PATH": VOLUME,
}

app = modal.App(WIRING.app, tags=cloud.tags(CFG.name, sys.argv, WIRING.bundle))
volume = _volume(WIRING.volume)
# Who does what on it: a volume that many see differently can be no lock
claims = modal.Dict.from_name(f"{WIRING.volume}-claims", create_if_missing=True)
secrets = {purpose: _secret(purpose, name) for purpose, name in WIRING.secrets.items()}
image = modal.Image.debian_slim(python_version="3.12").uv_pip_install(
    requirements=[str(HERE / "requirements.lock")], extra_options="--require-hashes", uv_version=UV
)
if WIRING.packages:
    # What they ask for is not used, and would change the versions that were just installed
    image = image.uv_pip_install(*WIRING.packages, extra_options="--no-deps", uv_version=UV)
# Modal would ship the package's .py files alone, and it has a page for browsers as well
LEFT_OUT = ~modal.FilePatternMatcher("**/*.py", "serve/page/*")
image = image.add_local_python_source("pipeline", ignore=LEFT_OUT)


def _container(machine: MachineConfig, regions: tuple[str, ...], *purposes: str) -> dict:
    """Return what a decorator needs for a container of that machine in one of those regions, with
    the secrets for those purposes."""
    given = []
    for purpose in purposes:
        # A purpose without a secret: what it is for is public, or not used
        if purpose in secrets:
            given.append(secrets[purpose])
    return {
        "image": image,
        "volumes": {VOLUME: volume},
        "env": ENV,
        "secrets": given,
        "gpu": list(machine.gpu) or None,
        "cpu": machine.cpu,
        "memory": machine.memory_mb,
        "timeout": machine.timeout_s,
        "region": list(regions) or None,
    }


def _job(name: str) -> dict:
    """Return what a decorator needs for the jobs of a stage: a container for each, tried again
    after a crash or a timeout."""
    rows = list(ROWS[name].values())
    # A container is asked for before the family is known, so the families that have a stage agree
    # on its machine, and it gets the secrets of all of them
    machine = getattr(CFG.modal, rows[0].machine or name)
    purposes: dict[str, None] = {}
    for row in rows:
        purposes |= dict.fromkeys(row.secrets)
    if machine is CFG.modal.preprocess:
        at_once = CFG.modal.preprocess_jobs
    else:
        at_once = max(1, CFG.modal.max_gpus // cloud.most_gpus(machine))
    retries = modal.Retries(max_retries=machine.retries, initial_delay=1.0, backoff_coefficient=2.0)
    return _container(machine, CFG.modal.regions, *purposes) | {
        "retries": retries,
        "single_use_containers": True,
        "max_containers": at_once,
    }


def _named(function: Callable, name: str, text: str) -> Callable:
    """Return a function that this module has under that name: Modal finds it by module and name in
    the container, and takes the name of a command from it."""
    function.__name__ = name
    function.__qualname__ = name
    function.__doc__ = text
    return function


def _jobs_of(stage: str) -> Callable:
    def job(items: list, raw: dict, leases: dict | None = None) -> list[cloud.JobResult]:
        def renewing(addresses: list[str]) -> AbstractContextManager:
            told = leases or {"by": "", "token": "", "held": {}}
            return cloud.at_work(claims, told, addresses)

        return cloud.work(stage, raw, items, Path(VOLUME), volume.commit, volume.reload, renewing)

    return _named(job, f"{stage}_job", f"Do jobs of {stage}, one after another: {about(stage)}.")


JOBS: dict[str, Any] = {}
for _stage in ROWS:
    JOBS[_stage] = app.function(**_job(_stage))(_jobs_of(_stage))
    globals()[f"{_stage}_job"] = JOBS[_stage]


# Of what trains nothing and must not begin again in its middle
CONDUCTING: dict[str, Any] = {
    "image": image,
    "volumes": {VOLUME: volume},
    "env": ENV,
    "cpu": cloud.CONDUCTOR.cpu,
    "memory": cloud.CONDUCTOR.memory_mb,
    "nonpreemptible": True,
    "region": list(CFG.modal.regions) or None,
}


# Days may be more than one, and machines crash: the next attempt waits for what this one has begun.
@app.function(
    **CONDUCTING,
    timeout=CFG.modal.attempt_s,
    retries=modal.Retries(max_retries=cloud.ATTEMPTS, initial_delay=1.0, backoff_coefficient=1.0),
)
def orchestrate(
    raw: dict,
    stages: list[str],
    sequential: bool,
    command: str,
    frozen: bool,
    run: str,
    expected: cloud.Expected,
) -> list[cloud.JobResult]:
    """Look at what the run reads and hand out the jobs of stages in order; goes on to its end
    whether or not anybody listens. `run` is what all attempts are called."""
    store = Store(Path(VOLUME), publish=volume.commit, refresh=volume.reload)
    try:
        cfg = cloud.looked_at(parse(raw), store, frozen)
    except PipelineError as error:
        return cloud.not_done(parse(raw), stages, store, error)
    looked = cfg.model_dump(mode="json")
    leases = cloud.Leases(claims, cfg.name, run)

    def start(stage: str, items: list) -> cloud.Call:
        return JOBS[stage].spawn(items, raw=looked, leases=leases.told())

    find = modal.FunctionCall.from_id
    hand_out = cloud.by_calls(Addresses(cfg), run, claims, sequential, start, find)
    ledger = cloud.Ledger(store, claims, run, expected)
    hand_out = ledger.metered(cfg, hand_out, leases.give_back)
    kept = ledger.kept(command, [cfg])
    with cloud.begun(cfg, store, command, run=run) as before, leases.kept(), kept:
        results = cloud.orchestrate(cfg, stages, store, hand_out, command, leases=leases)
        results = cloud.since(before, cfg, results, store)
        cloud.serve_next(results, cfg, Path(VOLUME), volume.commit)
    return results


# As long as a sweep lasts nobody else knows what is still to do
@app.function(**CONDUCTING, timeout=CFG.modal.attempt_s)
def conduct(
    sweep: cloud.FarSweep, command: str, frozen: bool, run: str, expected: cloud.Expected
) -> tuple[str, str]:
    """Do a sweep of experiments, stage after stage over all its trials; return its results as
    JSON, and what is wrong."""

    # No leases, but a name by which what containers cost is found
    told = {"by": sweep.name, "token": run, "held": {}}

    def containers(stage: str, inputs):
        return JOBS[stage].starmap(inputs, kwargs={"leases": told}, return_exceptions=True)

    store = Store(Path(VOLUME), publish=volume.commit, refresh=volume.reload)
    ledger = cloud.Ledger(store, claims, run, expected)
    paid = ledger.metered_containers(containers)
    try:
        with ledger.kept(command, []):
            return cloud.conducted(sweep, store, paid, command, frozen).to_json(), ""
    except PipelineError as error:
        return "", sentence(error, EDGE)


@app.function(**CONDUCTING, timeout=cloud.PLAN_S)
def plan(
    raw: dict, stages: tuple[str, ...], sequential: bool, frozen: bool, prices: cloud.Prices
) -> cloud.FarPlan:
    """Plan a command for a laptop that has no torch."""
    volume.reload()
    return cloud.planned_there(raw, stages, sequential, frozen, prices, Path(VOLUME))


# One that was preempted would leave its mark, and what it has removed half.
@app.function(**CONDUCTING, timeout=cloud.REMOVAL_S)
def tend(command: str, names: list[str], flags: dict[str, bool]) -> tuple[str, str]:
    """Show the runs that the volume knows, or remove from it; return what to print, and what is
    wrong."""
    return cloud.tend(command, names, flags, EDGE, volume.commit, volume.reload)


if WIRING.entered:

    @app.cls(
        **_container(CFG.modal.endpoint, cloud.placed(CFG.modal).regions, "endpoint"),
        startup_timeout=LOADING_S,
        min_containers=CFG.modal.endpoint.min_containers,
        max_containers=CFG.modal.endpoint.max_containers,
        buffer_containers=CFG.modal.endpoint.buffer_containers,
        scaledown_window=CFG.modal.endpoint.idle_s,
        enable_memory_snapshot=WIRING.snapshots,
    )
    @modal.concurrent(
        max_inputs=CFG.modal.endpoint.max_inputs,
        target_inputs=CFG.modal.endpoint.target_inputs,
    )
    class Endpoint:
        """The bundle that was deployed last, behind an OpenAI-compatible address."""

        # What is in a snapshot all containers have in common. So not the bundle, whose files are
        # mapped and whose weights belong on a GPU that there is none of then, nor the key
        @modal.enter(snap=WIRING.snapshots)
        def prepare(self) -> None:
            """Import what serving needs, which takes as long as opening a small bundle."""
            import pipeline.serve.app  # noqa: F401

        @modal.enter()
        def load(self) -> None:
            """Open the bundle, once per container. Raises PipelineError."""
            from pipeline.serve import app as serving

            if WIRING.snapshots:
                # Every container would draw the same numbers as the others
                cloud.draw_anew()
            volume.reload()
            key = os.environ.get("MOLEFORGE_API_KEY")
            try:
                folder = cloud.served(Path(VOLUME), key, WIRING.entered, WIRING.bundle)
                wanted = ServeConfig.model_validate_json(WIRING.serve)
                access = serving.behind_a_proxy(key)
                self.served = serving.create(folder, wanted=wanted, access=access)
            except PipelineError as error:
                # The log of the container is all that anybody sees of it
                raise PipelineError(sentence(error, EDGE)) from None

        @modal.asgi_app(requires_proxy_auth=CFG.modal.endpoint_proxy_auth)
        def web(self):
            """Answer requests."""
            return self.served


def _names(folder: str) -> list[str]:
    try:
        return [Path(entry.path).name for entry in volume.listdir(folder)]
    except modal.exception.NotFoundError:
        return []


def _command(
    stages: tuple[str, ...],
    config: str,
    override: str,
    sequential: bool = False,
    frozen: bool = False,
    deploy: bool = False,
) -> None:
    """Plan, check the limit, hand over to `orchestrate`, wait, show; exit with 1 when a job failed.

    No stages: all of a run, with `deploy` its bundle too, which is then deployed.
    """
    console = output()
    prices = cloud.Prices.load(HERE / "config/prices.yaml")
    config = cloud.shipped(config)
    try:
        cfg = cloud.named(load(config, cloud.overrides(override)), os.environ)
        if deploy and not cloud.entered(cfg.modal):
            sys.exit(f"error: nobody said how the endpoint is entered: {cloud.WAYS}")
        cfg = cloud.settled(cfg, prices, console.print)
        whole = [name for name in RUN if name in cfg.stages]
        wanted = stages or (*whole, *(["deploy"] if deploy else []))
        wish = _planned(cloud.Wish(cfg, wanted, sequential, frozen), prices, console)
    except PipelineError as error:
        sys.exit(f"error: {sentence(error, EDGE)}")
    raw, typed = wish.cfg.model_dump(mode="json"), cloud.as_typed(sys.argv)
    run = uuid.uuid4().hex
    given = (raw, list(wish.stages), sequential, typed, frozen, run, wish.expected)
    results = _ended(orchestrate, typed, *given)
    cloud.show_results(results, console)
    cloud.show_report(results, _read, console)
    cloud.show_costs(run, _names, _read, prices, console)
    if any(result.error for result in results):
        sys.exit(1)
    if deploy:
        sys.exit(_deployed_anew())
    following = cloud.afterwards(cfg.modal, wish.stages, config, override, os.environ)
    if following:
        console.print(following, highlight=False, soft_wrap=True)


def _planned(wish: cloud.Wish, prices: cloud.Prices, console: Console) -> cloud.Wish:
    """Show the plan of a command; return what it comes to. Raises PipelineError."""
    if cloud.plans_here():
        with tempfile.TemporaryDirectory() as folder:
            far = cloud.FarStore(_names, _read, VOLUME, Path(folder))
            return cloud.planned_run(wish, prices, far, console)
    console.print("there is no torch here, so a container makes the plan", highlight=False)
    raw = wish.cfg.model_dump(mode="json")
    answer = plan.remote(raw, wish.stages, wish.sequential, wish.frozen, prices)
    sys.stdout.write(answer.printed)
    if answer.wrong:
        sys.exit(f"error: {answer.wrong}")
    cfg = parse(answer.raw)
    return cloud.Wish(cfg, answer.stages, wish.sequential, wish.frozen, answer.expected)


def _ended(conducting: modal.Function, typed: str, *given: Any) -> Any:
    """Return what the container that hands out jobs comes to, however long that takes; end with
    what does the rest when it is lost."""
    try:
        return conducting.spawn(*given).get()
    except modal.exception.Error as error:
        # All attempts are over, or the line is down
        sys.exit(
            f"error: {type(error).__name__}: {error}; what is finished is kept, the rest is done "
            f"by: {typed}"
        )


def _deployed_anew() -> int:
    """Deploy what the note on the volume says; return the exit code."""
    names = {"MOLEFORGE_APP": WIRING.app, "MOLEFORGE_VOLUME": WIRING.volume}
    command = [sys.executable, "-m", "modal", "deploy", str(HERE / "modal_app.py")]
    # Another process, as what an app is made of is settled while this module is imported
    return subprocess.run(command, env=os.environ | names, check=False).returncode


def _command_of(stage: str) -> Callable:
    """Return the command of a stage; only one that may have several jobs has the flag that says how
    they share containers."""
    before: dict[str, None] = {}
    for row in ROWS[stage].values():
        before |= dict.fromkeys(row.after)
    stages = (*before, stage)

    def several(
        config: str = cloud.DEFAULT,
        override: str = "",
        sequential: bool = False,
        frozen: bool = False,
    ):
        _command(stages, config, override, sequential, frozen)

    def single(config: str = cloud.DEFAULT, override: str = "", frozen: bool = False):
        _command(stages, config, override, frozen=frozen)

    text = f"Do {stage} on Modal: {about(stage)}."
    if before:
        text += f" Does {', '.join(before)} first where it is missing."
    return _named(several if has_several_jobs(stage) else single, stage, text)


for _stage in STAGES:
    globals()[_stage] = app.local_entrypoint()(_command_of(_stage))


@app.local_entrypoint()
def run_all(
    config: str = cloud.DEFAULT,
    override: str = "",
    sequential: bool = False,
    frozen: bool = False,
    deploy: bool = False,
):
    """Do every stage of a run on Modal; what is on the volume is not done again. With --deploy the
    bundle too, and deploy an endpoint for it."""
    _command((), config, override, sequential, frozen, deploy)


@app.local_entrypoint()
def experiments(
    config: str = cloud.EXPERIMENTS,
    override: str = "",
    frozen: bool = False,
    text_only: bool = False,
):
    """Do the trials of an experiments file on Modal, all jobs of a stage side by side; what is on
    the volume is not done again. With --text-only nothing is trained, and durations in epochs can
    be priced afterwards."""
    console = output()
    prices = cloud.Prices.load(HERE / "config/prices.yaml")
    try:
        cloud.refuse_planning_here()
        read = read_experiments(Path(cloud.shipped(config)), cloud.overrides(override))
        with tempfile.TemporaryDirectory() as folder:
            place = cloud.FarStore.asked_once(_names, _read, VOLUME, Path(folder))
            sweep, lines = cloud.planned(read, prices, place, console.print, text_only)
            cloud.show_estimate(CFG, lines, prices, False, console)
            cloud.refuse_above(CFG, lines, prices, False)
    except PipelineError as error:
        sys.exit(f"error: {sentence(error, EDGE)}")
    typed = cloud.as_typed(sys.argv)
    run, expected = uuid.uuid4().hex, cloud.expected(CFG, lines, prices, False)
    results, wrong = _ended(conduct, typed, sweep, typed, frozen, run, expected)
    cloud.show_costs(run, _names, _read, prices, console)
    if wrong:
        sys.exit(f"error: {wrong}")
    report.show_experiments(report.ExperimentResults.model_validate_json(results), console)
    fetch = f"modal volume get {WIRING.volume} experiments/{read.name} ."
    console.print(f"results: {fetch}", highlight=False)


def _tend(command: str, names: list[str], **flags: bool) -> None:
    """Have a container look at the volume, or remove from it; exit with 1 when something is
    wrong."""
    try:
        printed, wrong = tend.remote(command, names, flags)
    except modal.exception.Error as error:
        sys.exit(f"error: {type(error).__name__}: {error}; the same command goes on from there")
    sys.stdout.write(printed)
    if wrong:
        sys.exit(f"error: {wrong}")


# Of a configuration they want the names of app and volume, which are read while this is imported.
@app.local_entrypoint()
def runs(config: str = cloud.DEFAULT):
    """List the runs that the volume knows: name, date, size, configuration, report, cost; and what
    the volume itself costs."""
    _tend("runs", [])
    stored = sum(entry.size for entry in volume.listdir("/", recursive=True))
    prices = cloud.Prices.load(HERE / "config/prices.yaml")
    sys.stdout.write(f"the volume holds {cloud.storage_told(stored, prices)}\n")


@app.local_entrypoint()
def watch(run: str = "", once: bool = False, config: str = cloud.DEFAULT):
    """Follow a run, the one in progress where none is named: how far each job was when it last
    published, how long the rest will take, its curves. --once looks once."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            cloud.watch(run, once, Path(folder), _names, _read, output())
        except PipelineError as error:
            sys.exit(f"error: {sentence(error, EDGE)}")


@app.local_entrypoint()
def versions(config: str = cloud.DEFAULT):
    """List the bundles that may be served, and which one is."""
    _tend("versions", [])


@app.local_entrypoint()
def rollback(to: str = "", config: str = cloud.DEFAULT):
    """Serve a former bundle again: the one before, or --to. An endpoint that is deployed is
    deployed anew, as its containers serve the bundle that it was deployed with."""
    _tend("rollback", [to] if to else [])
    try:
        modal.App.lookup(app.name)
    except modal.exception.NotFoundError:
        serving = cloud.deploying(CFG.modal, os.environ)
        sys.stdout.write(f"no endpoint is deployed; `{serving}` serves it\n")
        return
    sys.exit(_deployed_anew())


@app.local_entrypoint()
def prune(
    yes: bool = False, orphans: bool = False, damaged: bool = False, config: str = cloud.DEFAULT
):
    """List what was left half done on the volume and what no run reaches; --yes removes it."""
    _tend("prune", [], yes=yes, orphans=orphans, damaged=damaged)


@app.local_entrypoint()
def rm(run: str, yes: bool = False, config: str = cloud.DEFAULT):
    """List what the volume has of a run, or of several in one text, and of no other; --yes removes
    it."""
    _tend("rm", shlex.split(run), yes=yes)


if modal.is_local():
    sys.stdout.write(cloud.explain(sys.argv, cloud.flags_of(vars(), modal.app.LocalEntrypoint)))
