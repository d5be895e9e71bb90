"""The pipeline on Modal: image, volume, secrets, a function per stage, the endpoint; what they do
is in pipeline/.

`modal run modal_app.py::train_experts --config config/demo.yaml` does a stage, `::run_all` all of
them, `modal deploy modal_app.py` serves the bundle that `::deploy` made last. What is typed is
checked on this machine first; the rest is in the hands of `conduct`, so that with `modal run
--detach` a closed laptop stops nothing.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path

import modal
from rich.console import Console

from pipeline import cloud
from pipeline.config.machines import MachineConfig, TrainerConfig, WorkerConfig
from pipeline.config.run import RunConfig
from pipeline.errors import PipelineError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import load, parse
from pipeline.run.stages import RUN
from pipeline.store.artifacts import Store

HERE = Path(__file__).parent
VOLUME = os.environ.get("MOLEFORGE_VOLUME_PATH", "/store")
DAY_S = 86_400
# until an endpoint's container has opened its bundle; Modal's own limit would be that of a request
LOADING_S = 900
SECRETS = {  # purpose -> what it has to hold
    "wandb": ["WANDB_API_KEY"],
    "hub": ["HF_TOKEN"],
    "storage": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
    "endpoint": ["MOLEFORGE_API_KEY"],
}


def _asked_for() -> RunConfig:
    """Return the configuration that the command is about; inside a container what it says is
    settled already."""
    if not modal.is_local():
        return FfnMoeConfig()
    sys.stdout.write(cloud.explain(sys.argv))
    try:
        cfg = cloud.announced(sys.argv, os.environ)
        cloud.check(cfg, cloud.Prices.load(HERE / "config/prices.yaml"), VOLUME)
    except PipelineError as error:
        sys.exit(f"error: {error}")
    return cfg


def _secret_names() -> dict[str, str]:
    """Return {purpose: name} of the secrets to use; a container is told by a variable, to build the
    same objects."""
    if not modal.is_local():
        return dict(pair.split("=") for pair in os.environ.get("MOLEFORGE_SECRETS", "").split())
    named = {purpose: getattr(CFG.modal, f"{purpose}_secret") for purpose in SECRETS}
    return {purpose: name for purpose, name in named.items() if name}


def _secret(purpose: str, name: str) -> modal.Secret:
    """Return a secret; on the laptop it is looked up at once, before images are built."""
    secret = modal.Secret.from_name(name, required_keys=SECRETS[purpose])
    if modal.is_local() and cloud.typed(sys.argv):
        try:
            secret.hydrate()
        except modal.exception.Error as error:
            pairs = " ".join(f"{key}=..." for key in SECRETS[purpose])
            sys.exit(
                f"error: modal.{purpose}_secret: {error}; make it with `modal secret create {name} {pairs}`, or "
                f"set modal.{purpose}_secret to null"
            )
    return secret


CFG = _asked_for()
NAMES = _secret_names()
ENV = {
    "HF_HOME": f"{VOLUME}/hub",  # what one container has fetched from the Hub, the next ones find
    "MOLEFORGE_VOLUME_PATH": VOLUME,
    "MOLEFORGE_SECRETS": " ".join(f"{purpose}={name}" for purpose, name in NAMES.items()),
}

app = modal.App("moleforge")
volume = modal.Volume.from_name(
    "moleforge", create_if_missing=True, version=2
)  # 2: many containers write at once
secrets = {purpose: _secret(purpose, name) for purpose, name in NAMES.items()}
image = (
    modal.Image.debian_slim(python_version="3.12")
    .uv_pip_install(requirements=[str(HERE / "requirements.txt")], uv_version="0.9.5")
    .add_local_python_source("pipeline")
)


def _container(machine: MachineConfig, *purposes: str) -> dict:
    """Return what a decorator needs for a container of that machine with the secrets for those
    purposes."""
    return {
        "image": image,
        "volumes": {VOLUME: volume},
        "env": ENV,
        "secrets": [secrets[purpose] for purpose in purposes if purpose in secrets],
        "gpu": list(machine.gpu) or None,
        "cpu": machine.cpu,
        "memory": machine.memory_mb,
        "timeout": machine.timeout_s,
    }


def _job(machine: TrainerConfig | WorkerConfig, *purposes: str) -> dict:
    """Return what a decorator needs for a job: a container of its own, tried again after a crash or
    a timeout."""
    return _container(machine, *purposes) | {
        "retries": modal.Retries(
            max_retries=machine.retries, initial_delay=1.0, backoff_coefficient=2.0
        ),
        "single_use_containers": True,
        "max_containers": max(1, CFG.modal.max_gpus // cloud.most_gpus(machine)),
    }


def _work(stage: str, raw: dict, items: list) -> list[cloud.JobResult]:
    return cloud.work(stage, raw, items, Path(VOLUME), volume.commit, volume.reload)


@app.function(**_job(CFG.modal.preprocess, "hub", "storage"))
def preprocess_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Read the data and make what trainings read: token shards, or rows and pictures of the tasks
    named in items."""
    return _work("preprocess", raw, items)


@app.function(**_job(CFG.modal.preprocess, "hub", "storage"))
def preprocess_scan_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Read documents, make the tokenizer and domains, divide the encoding among containers."""
    return _work("preprocess_scan", raw, items)


@app.function(
    **_job(CFG.modal.preprocess, "hub", "storage") | {"max_containers": CFG.modal.preprocess_jobs}
)
def preprocess_encode_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Encode one range of the documents to token shards, which preprocess then puts together."""
    return _work("preprocess_encode", raw, items)


@app.function(**_job(CFG.modal.train_shared, "wandb", "hub"))
def train_shared_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Train the trunk, or pin the base."""
    return _work("train_shared", raw, items)


@app.function(**_job(CFG.modal.train_experts, "wandb", "hub"))
def train_experts_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Train the experts named in items, one after another."""
    return _work("train_experts", raw, items)


@app.function(**_job(CFG.modal.routing, "hub", "storage"))
def routing_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Make the routing set."""
    return _work("routing", raw, items)


@app.function(**_job(CFG.modal.train_router, "wandb", "hub"))
def train_router_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Fit and train the router."""
    return _work("train_router", raw, items)


@app.function(**_job(CFG.modal.train_dense, "wandb"))
def train_dense_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Train the dense baselines named in items, one after another."""
    return _work("train_dense", raw, items)


@app.function(**_job(CFG.modal.evaluate, "hub"))
def evaluate_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Measure the stack and write the report."""
    return _work("evaluate", raw, items)


@app.function(**_job(CFG.modal.deploy, "hub", "storage"))
def deploy_job(items: list, raw: dict) -> list[cloud.JobResult]:
    """Make the bundle."""
    return _work("deploy", raw, items)


JOBS = {
    "preprocess": preprocess_job,
    "preprocess_scan": preprocess_scan_job,
    "preprocess_encode": preprocess_encode_job,
    "train_shared": train_shared_job,
    "train_experts": train_experts_job,
    "routing": routing_job,
    "train_router": train_router_job,
    "train_dense": train_dense_job,
    "evaluate": evaluate_job,
    "deploy": deploy_job,
}


# A conductor that was preempted would hand out again what its containers are still doing.
@app.function(
    image=image,
    volumes={VOLUME: volume},
    env=ENV,
    cpu=0.5,
    memory=1024,
    timeout=DAY_S,
    nonpreemptible=True,
)
def conduct(raw: dict, stages: list[str], sequential: bool, command: str) -> list[cloud.JobResult]:
    """Hand out the jobs of stages in order; runs to its end whether or not anybody listens."""

    def do(stage: str, items: list):
        batches = [items] if sequential else [[item] for item in items]
        return zip(
            batches,
            JOBS[stage].map(batches, kwargs={"raw": raw}, return_exceptions=True),
            strict=True,
        )

    store = Store(Path(VOLUME), refresh=volume.reload)
    outcomes = cloud.orchestrate(parse(raw), tuple(stages), store, do, command)
    cloud.serve_next(outcomes, Path(VOLUME), volume.commit)
    return outcomes


@app.cls(
    **_container(CFG.modal.endpoint, "endpoint"),
    startup_timeout=LOADING_S,
    max_containers=CFG.modal.endpoint.max_containers,
    scaledown_window=CFG.modal.endpoint.idle_s,
)
@modal.concurrent(max_inputs=64)
class Endpoint:
    """The bundle that was deployed last, behind an OpenAI-compatible address."""

    @modal.enter()
    def load(self) -> None:
        """Open the bundle, once per container."""
        from pipeline.serve import app as serving

        volume.reload()
        self.served = serving.create(
            cloud.served(Path(VOLUME)), os.environ.get("MOLEFORGE_API_KEY")
        )

    @modal.asgi_app()
    def web(self):
        """Answer requests."""
        return self.served


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _names(folder: str) -> list[str]:
    try:
        return [Path(entry.path).name for entry in volume.listdir(folder)]
    except modal.exception.NotFoundError:
        return []


def _read(path: str) -> bytes | None:
    try:
        return b"".join(volume.read_file(path))
    except (FileNotFoundError, modal.exception.NotFoundError):
        return None


def _command(stages: tuple[str, ...], config: str, override: str, sequential: bool = False) -> None:
    """Plan, check the limit, hand over to `conduct`, wait, show; exit with 1 when a job failed."""
    console, prices = _console(), cloud.Prices.load(HERE / "config/prices.yaml")
    try:
        cfg = load(config, cloud.overrides(override))
        with tempfile.TemporaryDirectory() as folder:
            mirror = cloud.mirror(cfg, Path(folder), _names, _read)
            lines = cloud.estimate(cfg, stages, mirror, prices)
            cloud.show_estimate(cfg, lines, prices, sequential, console)
            cloud.refuse_without_inputs(cfg, stages, mirror)
            cloud.refuse_above(cfg, lines)
    except PipelineError as error:
        sys.exit(f"error: {error}")
    typed = f"modal {shlex.join(sys.argv[1:])}"
    try:
        outcomes = conduct.spawn(cfg.model_dump(mode="json"), list(stages), sequential, typed).get()
    except modal.exception.Error as error:  # a day is over, or the line is down
        sys.exit(
            f"error: {type(error).__name__}: {error}; what is finished is kept, the rest is done by: {typed}"
        )
    cloud.show_results(outcomes, console)
    cloud.show_report(outcomes, _read, console)
    if any(outcome.error for outcome in outcomes):
        sys.exit(1)


@app.local_entrypoint()
def preprocess(config: str = cloud.DEFAULT, override: str = "", sequential: bool = False):
    """Do preprocess on Modal; tasks side by side, or one after another in one container."""
    _command(("preprocess",), config, override, sequential)


@app.local_entrypoint()
def train_shared(config: str = cloud.DEFAULT, override: str = ""):
    """Do train_shared on Modal, and preprocess before it where it is missing: the first command of
    a run works."""
    _command(("preprocess", "train_shared"), config, override)


@app.local_entrypoint()
def train_experts(config: str = cloud.DEFAULT, override: str = "", sequential: bool = False):
    """Do train_experts on Modal, side by side, or one after another in one container."""
    _command(("train_experts",), config, override, sequential)


@app.local_entrypoint()
def routing(config: str = cloud.DEFAULT, override: str = ""):
    """Do routing on Modal."""
    _command(("routing",), config, override)


@app.local_entrypoint()
def train_router(config: str = cloud.DEFAULT, override: str = ""):
    """Do train_router on Modal."""
    _command(("train_router",), config, override)


@app.local_entrypoint()
def train_dense(config: str = cloud.DEFAULT, override: str = "", sequential: bool = False):
    """Do train_dense on Modal, side by side, or one after another in one container."""
    _command(("train_dense",), config, override, sequential)


@app.local_entrypoint()
def evaluate(config: str = cloud.DEFAULT, override: str = ""):
    """Do evaluate on Modal and print the report's tables."""
    _command(("evaluate",), config, override)


@app.local_entrypoint()
def deploy(config: str = cloud.DEFAULT, override: str = ""):
    """Make the bundle that `modal deploy modal_app.py` serves."""
    _command(("deploy",), config, override)


@app.local_entrypoint()
def run_all(config: str = cloud.DEFAULT, override: str = "", sequential: bool = False):
    """Do every stage of a run on Modal; what is on the volume is not done again."""
    _command(RUN, config, override, sequential)
