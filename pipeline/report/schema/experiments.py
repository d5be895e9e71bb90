"""The results of experiments: what each trial is, what came of it, and what was asked."""

from typing import Any, Literal

from pydantic import Field

from .base import SCHEMA_VERSION, Interval, JobSpeed, MachineFacts, ReportPart

# Where results lie in a store, below a folder for each experiments file
FOLDER = "experiments"
RESULTS = "experiment_results.json"
TABLES = "results.md"
State = Literal["done", "pruned", "failed", "missing"]
Asked = Literal["primary", "secondary", "tertiary"]
# Which half of the primary criterion holds
Half = Literal["loss", "gap", "both", "neither"]


class ModelSizes(ReportPart):
    """Parameters of a trial's model."""

    active: int = Field(description="parameters that run per token")
    total: int


class TrialLosses(ReportPart):
    """What a model scores, nats per token, at the state that is kept."""

    valid: float | None = Field(description="on the validation rows that all trials share")
    train: float | None = Field(description="on training text, mean of its last steps or epoch")
    steps: int | None = None
    kept_step: int | None = None
    stopped_early: bool = False

    @property
    def gap(self) -> float | None:
        """How far validation is above training."""
        if self.valid is None or self.train is None:
            return None
        return self.valid - self.train


class TrialScore(ReportPart):
    """What a model scores by itself on held-out documents, in units that any tokenizer's share."""

    bits_per_byte: float = Field(description="mean over domains")
    bits_per_byte_by_domain: dict[str, float]
    bytes: int = Field(description="of text that was read, all domains together")
    tokens: int | None = Field(None, description="of the same text, as the model reads it")
    documents: int
    text: str = Field(description="the same where the documents are the same")


class TrialExperts(ReportPart):
    """Where a model's gates send tokens."""

    least: float = Field(description="share of tokens of the expert that gets least")
    where: str = Field(description="which expert that is")
    tokens: int | None = Field(None, description="that the shares are of")
    entropy: float = Field(description="of the load, nats, mean over layers with experts")
    max_entropy: float = Field(description="of an even load")
    dropped: float | None = Field(None, description="share of tokens over an expert's capacity")


class TrialTiming(ReportPart):
    """What a model's trainings took, together; what trials share is in each of them."""

    tokens: int
    seconds: float = Field(description="wall-clock of steps, s")
    cpu_s: dict[str, float] = Field(description="processor time of steps, s, by phase")
    tokens_per_s: float | None = Field(description="tokens per second of wall-clock")
    tokens_per_cpu_s: float | None = Field(
        description="tokens per second of processor time; None where a GPU computes"
    )
    gpu: str | None = Field(None, description="what all trainings ran on, where that is one kind")
    jobs: tuple[JobSpeed, ...]


class TrialRun(ReportPart):
    """One trial with one seed."""

    seed: int
    state: State
    error: str = Field("", description="why it failed, or was ended")
    job: str = Field("", description="stage and item of the job in which the model ends")
    address: str = Field("", description="where that lies")
    tokens: str = Field("", description="the same where a token is the same")
    losses: TrialLosses | None = None
    score: TrialScore | None = None
    unmeasured: str = Field("", description="why a model that is there has no score")
    sizes: ModelSizes | None = None
    use: TrialExperts | None = None
    timing: TrialTiming | None = None
    config: dict[str, Any] = Field({}, description="the whole configuration, resolved")


class TrialCriterion(ReportPart):
    """What is asked of a trial, and its number."""

    name: Asked
    passed: bool | None = Field(description="None where it cannot be told")
    number: float | None = Field(description="what was measured")
    interval: Interval | None = Field(
        None, description="95 % interval of the number over seeds, by Student's t"
    )
    limit: float | None = Field(description="what is asked of the number")
    half: Half | None = Field(None, description="of the primary one, what holds")
    detail: str


class TrialSummary(ReportPart):
    """A trial over its seeds."""

    name: str
    makes: str
    changes: dict[str, Any] = Field(description="what it changes of the base")
    origin: str = Field("", description="the grid or search that it is of")
    runs: tuple[TrialRun, ...]
    valid: float | None = Field(None, description="validation loss, mean over seeds")
    spread: float | None = Field(None, description="standard deviation over seeds")
    valid_interval: Interval | None = Field(
        None, description="95 % interval of that mean, by Student's t"
    )
    gap: float | None = Field(None, description="validation less training, mean over seeds")
    bits_per_byte: float | None = Field(None, description="of held-out text, mean over seeds")
    bits_spread: float | None = Field(None, description="standard deviation over seeds")
    bits_interval: Interval | None = Field(
        None, description="95 % interval of that mean, by Student's t"
    )
    is_dense: bool = Field(False, description="whether others are held against it")
    criteria: tuple[TrialCriterion, ...] = ()

    @property
    def done(self) -> tuple[TrialRun, ...]:
        """The runs that have a model."""
        return tuple(run for run in self.runs if run.state == "done")

    @property
    def runs_whole(self) -> bool:
        """Whether all of a model runs for every token, so that it has nothing to spread tokens
        over."""
        sizes = [run.sizes for run in self.done if run.sizes]
        return bool(sizes) and all(each.active == each.total for each in sizes)


class SweepWork(ReportPart):
    """All that the trials of experiments are made of, each job once."""

    jobs: int
    seconds: float = Field(description="wall-clock of all jobs, one after another, s")


class ExperimentResults(ReportPart):
    """Everything in experiment_results.json."""

    schema_version: int = SCHEMA_VERSION
    experiments: str = Field(description="name of the file")
    made: str = Field("", description="time, ISO 8601")
    seeds: tuple[int, ...] = ()
    trials: tuple[TrialSummary, ...] = ()
    dense_weights: dict[str, str] = Field({}, description="by seed, the folder of the checkpoint")
    machine: MachineFacts | None = None
    packages: dict[str, str] = Field({}, description="versions that the last model was made with")
    work: SweepWork | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the text of experiment_results.json."""
        return self.model_dump_json(indent=1)
