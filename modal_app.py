"""The pipeline on Modal: image, volume, secrets, a function per stage, the endpoint; what they do
is in pipeline/.

`modal run modal_app.py::train_experts --config config/qwen3_8b.yaml` does a stage, `::run_all` all
of them, `modal deploy modal_app.py` serves the bundle that `::deploy` made last. What is typed is
checked on this machine first (modal_laptop.py); the rest is in the hands of `orchestrate`, so that
with `modal run --detach` a closed laptop stops nothing. Functions and commands come from the
families' tables of stages: a new stage needs nothing here, nor does a command, which is a method of
cloud.Commands.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import modal

import modal_laptop
from pipeline import cloud
from pipeline.config.machines import MachineConfig
from pipeline.errors import PipelineError
from pipeline.families.load import parse
from pipeline.run.advice import sentence
from pipeline.run.stages import ROWS, about
from pipeline.store.artifacts import Store

HERE = modal_laptop.HERE
VOLUME = modal_laptop.VOLUME
UV = "0.13.9"


CFG, WIRING = modal_laptop.asked_for(sys.argv, os.environ)
EDGE = cloud.ModalEdge(Path(VOLUME), WIRING.volume)
ENV = WIRING.variables | {
    # On the volume: what one container has fetched from the Hub, the next ones find
    "HF_HOME": f"{VOLUME}/hub",
    "MOLEFORGE_VOLUME_PATH": VOLUME,
}

app = modal.App(WIRING.app, tags=cloud.tags(CFG.name, sys.argv, WIRING.bundle))
volume = modal_laptop.volume_called(WIRING.volume)
# Who does what on it: a volume that many see differently can be no lock
claims = modal.Dict.from_name(f"{WIRING.volume}-claims", create_if_missing=True)
secrets = modal_laptop.secrets_called(WIRING.secrets, sys.argv)
image = modal.Image.debian_slim(python_version="3.12").uv_pip_install(
    requirements=[str(HERE / "requirements.lock")], extra_options="--require-hashes", uv_version=UV
)
if WIRING.packages:
    # What they ask for is not used, and would change the versions that were just installed
    image = image.uv_pip_install(*WIRING.packages, extra_options="--no-deps", uv_version=UV)
# Modal would ship the package's .py files alone, and it has pages for browsers as well
SHIPPED = ("py", "html", "css", "js", "svg")
LEFT_OUT = ~modal.FilePatternMatcher(*[f"**/*.{ending}" for ending in SHIPPED])
image = image.add_local_python_source("pipeline", "modal_laptop", ignore=LEFT_OUT)


# What containers have beside their image, by its place
MOUNTED: dict[str, Any] = {VOLUME: volume}
if WIRING.bucket:
    MOUNTED[cloud.BUCKET] = modal.CloudBucketMount(
        WIRING.bucket.name,
        bucket_endpoint_url=WIRING.bucket.endpoint,
        key_prefix=WIRING.bucket.prefix,
        # One that is public needs none
        secret=secrets.get("storage"),
        read_only=True,
    )


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
        "volumes": MOUNTED,
        "env": ENV,
        "secrets": given,
        "gpu": list(machine.gpu) or None,
        "cpu": machine.cpu,
        "memory": machine.memory_mb,
        "timeout": machine.timeout_s,
        # Modal's own limit would be the one above
        "startup_timeout": cloud.LONGEST_START_S,
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


def _jobs_of(stage: str) -> Callable:
    def job(items: list, raw: dict, leases: dict) -> list[cloud.JobResult]:
        def renewing(addresses: list[str]) -> AbstractContextManager[cloud.IsLost]:
            return cloud.at_work(claims, leases, addresses)

        def takes(address: str) -> bool:
            return cloud.takes(claims, leases, address, modal.current_function_call_id())

        here = (Path(VOLUME), volume.commit, volume.reload)
        return cloud.work(stage, raw, items, *here, renewing, takes)

    text = f"Do jobs of {stage}, one after another: {about(stage)}."
    return cloud.named_as(job, f"{stage}_job", text)


# Modal finds a function by module and name in the container
JOBS: dict[str, Any] = {}
for _stage in ROWS:
    JOBS[_stage] = app.function(**_job(_stage))(_jobs_of(_stage))
    globals()[f"{_stage}_job"] = JOBS[_stage]


# Of what trains nothing and must not begin again in its middle
TENDING: dict[str, Any] = {
    "image": image,
    "volumes": MOUNTED,
    "env": ENV,
    "cpu": cloud.CONDUCTOR.cpu,
    "memory": cloud.CONDUCTOR.memory_mb,
    "nonpreemptible": True,
    # One that stayed for the next input would be paid for while it waits
    "single_use_containers": True,
    "region": list(CFG.modal.regions) or None,
    "startup_timeout": cloud.LONGEST_START_S,
}
# Days may be more than one, and machines crash: the next attempt waits for what this one has begun
CONDUCTING = TENDING | {
    # It looks at what is far away, which may be private
    "secrets": [secrets[purpose] for purpose in ("hub", "storage") if purpose in secrets],
    "timeout": CFG.modal.attempt_s,
    "retries": modal.Retries(
        max_retries=cloud.ATTEMPTS, initial_delay=1.0, backoff_coefficient=1.0
    ),
}


def _store() -> Store:
    return Store(Path(VOLUME), publish=volume.commit, refresh=volume.reload)


@app.function(**CONDUCTING)
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
    store = _store()
    try:
        cfg = cloud.looked_at_once(parse(raw), store, frozen, claims, run)
    except PipelineError as error:
        return cloud.not_done(parse(raw), stages, store, error)
    looked = cfg.model_dump(mode="json")
    leases = cloud.Leases(claims, cfg.name, run)

    def start(jobs: Sequence[cloud.FarJob]) -> cloud.Call:
        items = [job.item for job in jobs]
        return JOBS[jobs[0].stage].spawn(items, raw=looked, leases=leases.told())

    hand_out = cloud.by_calls(run, claims, sequential, start, modal.FunctionCall.from_id)
    ledger = cloud.Ledger(store, claims, run, expected)
    hand_out = ledger.metered(hand_out, leases.give_back)
    kept = ledger.kept(command, [cfg])
    begun = cloud.begun(cfg, store, command, run=run)
    with leases.kept(conducts=True), begun as before, kept:
        results = cloud.orchestrate(cfg, stages, store, hand_out, command, leases=leases)
        results = cloud.since(before, cfg, results, store)
        cloud.note_bundle(results, cfg, store, leases)
    return results


if WIRING.reevaluates:

    @app.function(**CONDUCTING, schedule=modal.Cron(WIRING.reevaluates))
    def reevaluate() -> None:
        """Measure what is served once more, and say what is other than before."""
        due = cloud.due(Path(VOLUME), volume.reload, WIRING, EDGE)
        if due is None:
            return
        run = modal.current_function_call_id()
        again = ("modal deploy modal_app.py", True, run, due.expected)
        results = orchestrate.local(due.cfg.model_dump(mode="json"), ["evaluate"], False, *again)
        cloud.tell_change(results, due.former, Path(VOLUME))


@app.function(**CONDUCTING)
def conduct(
    sweep: cloud.FarSweep, command: str, frozen: bool, run: str, expected: cloud.Expected
) -> tuple[str, str]:
    """Do a sweep of experiments, stage after stage over all its trials; return its results as
    JSON, and what is wrong."""
    leases = cloud.Leases(claims, sweep.name, run)

    def start(jobs: Sequence[cloud.FarJob]) -> cloud.Call:
        first = jobs[0]
        raw = first.addresses.cfg.model_dump(mode="json")
        return JOBS[first.stage].spawn([first.item], raw=raw, leases=leases.told())

    store = _store()
    ledger = cloud.Ledger(store, claims, run, expected)
    hand_out = cloud.by_calls(run, claims, False, start, modal.FunctionCall.from_id)
    hand_out = ledger.metered(hand_out, leases.give_back)
    try:
        with leases.kept(conducts=True), ledger.kept(command, []):
            given = (sweep, store, hand_out, command, frozen, run, leases)
            price = cloud.pricing(ledger, store)
            made = cloud.conducted(*given, catch_up=ledger.catch_up, price=price)
        return made.to_json(), ""
    except PipelineError as error:
        return "", sentence(error, EDGE)


@app.function(**TENDING, timeout=cloud.PLAN_S)
def plan(
    raw: dict, stages: tuple[str, ...], sequential: bool, frozen: bool, prices: cloud.Prices
) -> cloud.FarPlan:
    """Plan a command for a laptop that has no torch."""
    volume.reload()
    return cloud.planned_there(raw, stages, sequential, frozen, prices, Path(VOLUME))


@app.function(**TENDING, timeout=cloud.PLAN_S)
def plan_sweep(sweep: cloud.FarSweep, raw: dict, prices: cloud.Prices) -> cloud.FarSweepPlan:
    """Plan experiments for a laptop that has no torch."""
    volume.reload()
    return cloud.planned_sweep_there(sweep, raw, prices, Path(VOLUME))


# One that was preempted would leave its mark, and what it has removed half.
@app.function(**TENDING, timeout=cloud.REMOVAL_S)
def tend(command: str, names: list[str], flags: dict[str, int]) -> cloud.Tended:
    """Show or draw the runs that the volume knows, or remove from it."""

    def is_alive(run: str, addresses: Sequence[str]) -> bool:
        return cloud.is_alive(claims, run, addresses)

    here = (volume.commit, volume.reload, is_alive)
    if command != "rollback":
        return cloud.tend(command, names, flags, EDGE, *here)
    with cloud.Leases(claims, command).alone(cloud.SERVED):
        return cloud.tend(command, names, flags, EDGE, *here)


if WIRING.entered:

    @app.cls(
        **_container(CFG.modal.endpoint, cloud.placed(CFG.modal).regions, "endpoint"),
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
            volume.reload()
            self.served = cloud.application(Path(VOLUME), WIRING, EDGE, os.environ)

        @modal.asgi_app(requires_proxy_auth=CFG.modal.endpoint_proxy_auth)
        def web(self):
            """Answer requests."""
            return self.served


if modal.is_local():
    _laptop = modal_laptop.Laptop(WIRING, volume, claims, globals())
    _given = (CFG, modal_laptop.PRICES, sys.argv, os.environ, modal_laptop.locked_cuda())
    _commands = cloud.Commands(_laptop, *_given)
    for _name, _command in _commands.entrypoints().items():
        globals()[_name] = app.local_entrypoint(name=_name)(_command)
    _flags = cloud.flags_of(vars(), modal.app.LocalEntrypoint)
    sys.stdout.write(cloud.explain(sys.argv, _flags))
