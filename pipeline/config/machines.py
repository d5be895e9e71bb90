"""Where stages run on Modal, and what they may cost. No address holds any of it."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .base import Name, Section


def _one_as_several(value: object) -> object:
    """Return `H100` as the one of its kind, anything else unchanged."""
    return (value,) if isinstance(value, str) else value


Several = Annotated[tuple[str, ...], BeforeValidator(_one_as_several)]


class MachineConfig(Section):
    """A container on Modal."""

    gpu: Several = Field(
        (),
        description="GPU, `H100` or `H100:2`, and what will do instead, in order of preference; "
        "[]: none",
    )
    cpu: float = Field(
        4.0,
        gt=0,
        le=64,
        description="Physical cores reserved; threads too when runtime.threads is 0",
    )
    # These limits are Modal's own: what passes here, it does not refuse later.
    memory_mb: int = Field(16_384, ge=128, le=344_064, description="Memory reserved, MiB")
    timeout_s: int = Field(
        86_400, ge=1, le=86_400, description="Longest attempt, seconds; the next goes on from there"
    )


class TrainerConfig(MachineConfig):
    """The container of a stage that trains or measures."""

    # Two, as either may be out of stock; both have bf16 and at least 40 GB.
    gpu: Several = Field(
        ("L40S", "A100-40GB"),
        description="GPU, `H100` or `H100:2`, and what will do instead, in order; []: none",
    )
    retries: int = Field(
        3, ge=0, le=10, description="Attempts after a crash or a timeout (a preemption costs none)"
    )


class WorkerConfig(MachineConfig):
    """The container of a stage that needs no GPU."""

    cpu: float = Field(
        8.0,
        gt=0,
        le=64,
        description="Physical cores reserved; threads too when runtime.threads is 0",
    )
    memory_mb: int = Field(32_768, ge=128, le=344_064, description="Memory reserved, MiB")
    retries: int = Field(
        3, ge=0, le=10, description="Attempts after a crash or a timeout (a preemption costs none)"
    )


class EndpointConfig(MachineConfig):
    """The containers that serve a bundle."""

    # Above the 120 s after which a completion ends by itself, so that its answer still gets out.
    timeout_s: int = Field(150, ge=1, le=86_400, description="Longest request, seconds")
    max_containers: int = Field(1, ge=1, le=100, description="Most containers at once")
    min_containers: int = Field(
        0, ge=0, le=100, description="Containers that are up, and paid for, without a request too"
    )
    buffer_containers: int = Field(
        0, ge=0, le=100, description="Idle containers that are kept ready beside those at work"
    )
    regions: Several = Field(
        (), description="Where they run, `eu` or `eu-west`; []: where modal.regions says"
    )
    idle_s: int = Field(
        300, ge=2, le=3600, description="Seconds without a request after which a container ends"
    )
    # Above it a container's server would refuse what another container could answer.
    max_inputs: int = Field(
        64, ge=1, le=1000, description="Most requests at once in a container, waiting ones too"
    )
    target_inputs: int = Field(
        32,
        ge=1,
        le=1000,
        description="Requests at once in a container above which Modal starts another",
    )
    memory_snapshot: bool = Field(
        False, description="Start containers from an image of memory after the imports"
    )

    @model_validator(mode="after")
    def _target_is_reached(self) -> Self:
        if self.target_inputs > self.max_inputs:
            raise ValueError(
                f"target_inputs is {self.target_inputs}, but no container gets more than "
                f"max_inputs, {self.max_inputs}"
            )
        return self

    @model_validator(mode="after")
    def _least_is_below_the_most(self) -> Self:
        # The client of Modal refuses it too, in a traceback
        if self.min_containers > self.max_containers:
            raise ValueError(
                f"min_containers is {self.min_containers}, but there are at most max_containers, "
                f"{self.max_containers}"
            )
        return self


class ModalConfig(Section):
    """What stages get on Modal, and what they may cost; no result depends on it, so no address
    does."""

    # Names of one's own keep two people in one workspace apart.
    app: Name | None = Field(None, description="App on Modal; none: $MOLEFORGE_APP, or moleforge")
    volume: Name | None = Field(
        None, description="Volume with the store; none: $MOLEFORGE_VOLUME, or moleforge"
    )

    attempt_s: int = Field(
        86_400,
        ge=1,
        le=86_400,
        description="Longest attempt of the container that hands out jobs, seconds; the next goes "
        "on from there",
    )
    regions: Several = Field(
        (),
        description="Where containers run, `eu` or `eu-west`, which Modal charges more for; []: "
        "anywhere",
    )
    max_gpus: int = Field(8, ge=1, description="Most GPUs at once over the jobs of a stage")
    max_cost_usd: float | None = Field(
        None,
        gt=0,
        description="Refuse a command whose estimate is above this, and a stage that would bring "
        "it above, US dollars; none: no limit",
    )
    max_endpoint_usd_per_hour: float | None = Field(
        None,
        gt=0,
        description="Refuse an endpoint all of whose containers together may cost more than this, "
        "US dollars an hour; none: no limit",
    )
    wandb_secret: Name | None = Field(
        None, description="Secret with WANDB_API_KEY, for runtime.wandb: online"
    )
    hub_secret: Name | None = Field(
        None, description="Secret with HF_TOKEN, for data or trunks that are not public"
    )
    storage_secret: Name | None = Field(
        None,
        description="Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for data or "
        "deploy.upload on S3",
    )
    bucket: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/]+)*/?$",
        description="Bucket with inputs, `NAME` or `NAME/FOLDER/`, which containers see read-only "
        "at /bucket; its keys are in modal.storage_secret, none: it is public",
    )
    bucket_endpoint: str | None = Field(
        None, pattern=r"^https?://\S+$", description="Where modal.bucket is; none: on S3"
    )
    endpoint_secret: Name | None = Field(
        None, description="Secret with MOLEFORGE_API_KEY, which requests must bring"
    )
    endpoint_public: bool = Field(
        False, description="Serve without a key: whoever knows the address may use the endpoint"
    )
    reevaluate: str | None = Field(
        None,
        pattern=r"^\S+( \S+){4}$",
        description="When what is served is measured again, as cron has it in UTC: `0 6 * * 1` is "
        "Mondays at six; none: never",
    )
    endpoint_proxy_auth: bool = Field(
        False,
        description="Requests must bring a proxy token of the workspace, which Modal checks before "
        "a container is started; with endpoint_secret also its key",
    )
    missing_baselines: Literal["make", "skip", "refuse"] = Field(
        "make",
        description="Dense baselines that `::evaluate` compares with and nobody has trained: make "
        "trains them first, skip reports without them, refuse says what to type",
    )
    preprocess_jobs: int = Field(
        8,
        ge=1,
        le=1000,
        description="Most containers of preprocess at once, each with a domain or a task",
    )
    # One per stage, under the stage's name: it is looked up by that.
    preprocess: WorkerConfig = Field(
        WorkerConfig(), description="Container of the tokenizer, and of each domain or task"
    )
    train_shared: TrainerConfig = Field(TrainerConfig(), description="Container of train_shared")
    train_experts: TrainerConfig = Field(TrainerConfig(), description="Container of each expert")
    routing: WorkerConfig = Field(WorkerConfig(), description="Container of routing")
    train_router: TrainerConfig = Field(TrainerConfig(), description="Container of train_router")
    train_dense: TrainerConfig = Field(
        TrainerConfig(), description="Container of each dense baseline"
    )
    evaluate: TrainerConfig = Field(TrainerConfig(), description="Container of evaluate")
    deploy: WorkerConfig = Field(WorkerConfig(), description="Container of deploy")
    endpoint: EndpointConfig = Field(EndpointConfig(), description="Containers that serve")
