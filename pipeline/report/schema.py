"""What report.json holds: frozen models that families build and that terminal, page and card read.

A report is one of two kinds: on text (`LanguageReport`, a loss per token) or on whole requests
(`RequestReport`, a route and an answer each). A table that a run has not made is empty or None;
inside a table every field is there, and None stands for a value that could not be measured. A float
may be NaN or infinite. Unknown fields are refused, so a name that is misspelt fails where it is
written.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import NewerStore, StoreError

# raised when a field is renamed, removed or comes to mean something else
SCHEMA_VERSION = 1

Interval = tuple[float, float]
ByDomain = dict[str, float]
# an "expert" knows one domain and the "oracle" is told which; the others serve any text
RowKind = Literal["part", "expert", "dense", "merge", "router", "oracle"]
# "undecided": too few documents for an interval
Verdict = Literal["better", "worse", "tie", "undecided"]


class ReportPart(BaseModel):
    """Base of all models here."""

    # Without "constants" JSON would turn NaN into null, and a loss that diverged into one that was
    # never measured.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Difference(ReportPart):
    """One figure less another, on the same documents or requests."""

    difference: float
    interval: Interval | None = Field(
        description="95 % interval, resampled in pairs; None over too few"
    )


class Criterion(ReportPart):
    """One thing that the configuration asked of the run."""

    name: str
    text: str = Field(description="what was asked")
    passed: bool | None = Field(description="None where too little was measured to tell")
    detail: str = Field(description="what was found")


class JobSpeed(ReportPart):
    """Time and memory of one training job, from its manifest."""

    job: str = Field(description="stage and item")
    seconds: float | None = Field(description="wall-clock, s")
    tokens: int | None = Field(description="tokens trained on")
    tokens_per_s: float | None
    data_s: float = Field(description="time in loading batches, s")
    forward_s: float = Field(description="time in forward passes, s")
    backward_s: float = Field(description="time in backward passes, s")
    optimizer_s: float = Field(description="time in optimizer steps, s")
    peak_mb: float | None = Field(description="peak memory, MB (10^6 bytes)")
    mfu: float | None = Field(description="model FLOPs utilisation, share of measured product rate")

    @classmethod
    def from_metrics(cls, job: str, metrics: Mapping[str, Any]) -> "JobSpeed":
        """Return the row of a finished training from the metrics of its manifest."""
        measured = ("seconds", "tokens", "tokens_per_s", "peak_mb", "mfu")
        # A phase that a short training never entered took no time
        phases = ("data_s", "forward_s", "backward_s", "optimizer_s")
        return cls(
            job=job,
            **{name: metrics.get(name) for name in measured},
            **{name: metrics.get(name, 0.0) for name in phases},
        )


class TriedRate(ReportPart):
    """A learning rate that a search tried."""

    lr: float
    nats: float | None = Field(description="validation loss at its end; None where it diverged")


class RateSearch(ReportPart):
    """How a learning rate that was left open was found."""

    job: str = Field(description="stage and item")
    lr: float = Field(description="the rate that was taken")
    steps: int = Field(description="training steps of each rate")
    before_nats: float = Field(description="validation loss before any step")
    tried: tuple[TriedRate, ...]


class MachineFacts(ReportPart):
    """What timings and roundings must be read with; the values of `hardware.machine`."""

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    dtype: str = Field(description="bf16 or fp32")
    system: str
    python: str
    torch: str


class BaseReport(ReportPart):
    """What both kinds of reports have."""

    # first in the file, where a reader looks for it
    schema_version: int = SCHEMA_VERSION
    run: str
    family: str
    seed: int | None = None
    made: str = Field("", description="time, ISO 8601")
    experts: tuple[str, ...] = ()
    metric: str = Field("", description="what the tables measure, in words")
    criteria: tuple[Criterion, ...] = ()
    speed: tuple[JobSpeed, ...] = ()
    machine: MachineFacts | None = None
    notes: tuple[str, ...] = Field((), description="what to know beside the figures")

    def to_json(self) -> str:
        """Return the text of report.json; `read` gives the same report back."""
        return self.model_dump_json(indent=1)


# Reports on text


class LanguageModelFacts(ReportPart):
    """Sizes of the stack."""

    layers: int
    d_model: int
    d_ff: int
    vocab_size: int
    context_tokens: int
    top_k: int = Field(description="experts that run per token")
    active_parameters: int = Field(description="parameters that run per token")
    total_parameters: int
    expert_bytes: int | None = Field(None, description="of one expert's own weights, as stored")


class TextCounts(ReportPart):
    """How much text stands behind the figures, by domain."""

    test_tokens: dict[str, int] = Field(description="tokens that are predicted")
    test_documents: dict[str, int]
    train_tokens: dict[str, int]
    too_few: tuple[str, ...] = Field((), description="domains with too few documents for a verdict")


class QualityRow(ReportPart):
    """One model, or one way of mixing models, on the held-out text."""

    name: str
    kind: RowKind
    axis: str = Field("", description="what it has in common with the stack")
    bits_per_byte: ByDomain
    mean: float = Field(description="bits per byte, mean over domains")
    interval: Interval | None = Field(
        description="95 % interval of mean, bits per byte; None where documents are too few"
    )
    perplexity: ByDomain = Field(description="per token")
    mean_perplexity: float = Field(description="exp of the mean loss over domains")
    active_parameters: int = Field(description="parameters that run per token")
    total_parameters: int
    flops_per_token: int = Field(description="forward pass")
    train_tokens: int | None = Field(description="tokens that went into it, all jobs together")
    oracle_gain: float | None = Field(
        description="share of the oracle's gain over the trunk; None where the oracle gains nothing"
    )
    versus_stack: Difference | None = Field(
        description="row less stack, bits per byte; None for the stack itself"
    )
    is_stack: bool = Field(description="whether this is what the run serves")


class OptOutRow(ReportPart):
    """The stack with one expert and its gate rows taken away."""

    removed: str
    ratio: ByDomain = Field(description="perplexity without the expert over perplexity with it")
    delta_bits: ByDomain = Field(description="bits per byte without the expert less with it")


# a pair in JSON too, and the fields have names here
class ExpertShare(NamedTuple):
    """An expert and the share of tokens that it takes."""

    expert: str
    share: float


class LayerRouting(ReportPart):
    """Where one layer sends tokens."""

    layer: int
    share: dict[str, tuple[float, ...]] = Field(
        description="by domain, share of its tokens that each expert takes, in the experts' order"
    )
    agreement: float | None = Field(description="share of tokens whose first choice is their own")
    entropy: float = Field(description="of the load, nats")
    max_violation: float = Field(description="MaxVio of arXiv 2408.15664; 0 is an even load")


class TokenRouting(ReportPart):
    """Where the router sends tokens, mean over layers; domains weigh the same."""

    layers: tuple[LayerRouting, ...]
    share: dict[str, tuple[float, ...]] = Field(description="as a layer's, mean over layers")
    agreement: float | None = Field(description="as a layer's, mean over layers")
    agreement_by_domain: ByDomain
    entropy: float = Field(description="of the load, nats")
    max_entropy: float = Field(description="of an even load, nats")
    max_violation: float
    least: ExpertShare
    most: ExpertShare
    dead: tuple[str, ...] = Field(description="experts that get next to nothing")


class PromptRow(ReportPart):
    """Texts that are routed by their first tokens, for one number of them."""

    prompt_tokens: int
    agreement: float | None = Field(
        description="share of texts of a domain with an expert that reach it, mean over domains"
    )
    base_share: float | None = Field(
        description="share of the other domains' texts that the base reads, mean over "
        "domains; None where every domain has an expert"
    )
    bits_per_byte: ByDomain
    mean: float = Field(description="bits per byte, mean over domains")
    is_served: bool


class TextRouting(ReportPart):
    """Where a router that chooses one expert for a whole text sends texts."""

    choices: tuple[str, ...] = Field(description="experts, then the base")
    prompt_tokens: int = Field(description="first tokens of a text, which choose")
    temperature: float
    threshold: float = Field(description="probability of an expert below which the base reads")
    texts: dict[str, tuple[int, ...]] = Field(description="by domain, texts that each choice reads")
    agreement_by_domain: ByDomain = Field(description="of domains with an expert")
    prompts: tuple[PromptRow, ...] = Field(description="by the number of first tokens")


class ActiveRow(ReportPart):
    """The stack with top_k experts per token, not trained again."""

    top_k: int
    bits_per_byte: ByDomain
    mean: float = Field(description="bits per byte, mean over domains")
    interval: Interval | None
    active_parameters: int


class DomainMatrix(ReportPart):
    """The trunk, each expert alone, and the stack, on every domain."""

    rows: tuple[str, ...] = Field(description="the trunk first, the stack last")
    bits_per_byte: tuple[tuple[float, ...], ...] = Field(
        description="a line per row, in the domains' order"
    )


class Win(ReportPart):
    """The stack against one rival."""

    against: str
    axis: str = Field(description="what the two have in common")
    difference: float = Field(description="rival less stack, bits per byte")
    interval: Interval | None
    verdict: Verdict = Field(description="what the stack is")


class WrittenText(NamedTuple):
    """What one network wrote."""

    row: str  # of `quality`
    text: str


class Continuation(ReportPart):
    """How one held-out text goes on, and how networks go on with it."""

    domain: str
    prompt: str = Field(description="the beginning that all were given")
    held_out: str = Field(description="what stands there")
    written: tuple[WrittenText, ...] = Field(description="greedily, by each of the same rows")


class LanguageReport(BaseReport):
    """The report of a stack that predicts text."""

    kind: Literal["language"] = "language"
    domains: tuple[str, ...] = ()
    labels: dict[str, str] = Field(
        {}, description="by domain, what its data calls it, where that is not its name"
    )
    model: LanguageModelFacts | None = None
    data: TextCounts | None = None
    quality: tuple[QualityRow, ...] = Field((), description="the stack and everything to beat")
    opt_out: tuple[OptOutRow, ...] = Field((), description="when one expert leaves")
    routing: TokenRouting | None = Field(None, description="where tokens go")
    text_routing: TextRouting | None = Field(
        None, description="where texts go, when one expert reads a whole text"
    )
    active: tuple[ActiveRow, ...] = Field((), description="one to all experts per token")
    matrix: DomainMatrix | None = Field(None, description="who is good at what")
    wins: tuple[Win, ...] = ()
    rates: tuple[RateSearch, ...] = Field((), description="learning rates that were searched")
    continuations: tuple[Continuation, ...] = Field((), description="texts, as they are written on")

    @property
    def too_few(self) -> tuple[str, ...]:
        """Domains with too few test documents for a verdict."""
        return self.data.too_few if self.data else ()

    @property
    def stack(self) -> QualityRow | None:
        """The row of what the run serves."""
        return next((row for row in self.quality if row.is_stack), None)

    @property
    def trunk(self) -> QualityRow | None:
        """The row of the shared part alone."""
        return next((row for row in self.quality if row.kind == "part"), None)


# Reports on whole requests


class AdapterModelFacts(ReportPart):
    """The base and what was trained on it."""

    base: str = Field(description="name, or how it was built")
    revision: str | None = None
    dtype: str
    base_parameters: int
    adapter_parameters: int = Field(description="all adapters together, the router's included")
    adapters: int


class RequestCounts(ReportPart):
    """How many requests stand behind the figures."""

    sets: dict[str, int]
    left_out: dict[str, int] = Field(description="by set, requests over a limit")
    trained_on: int = Field(description="requests that the router learned from")


class RouterRow(ReportPart):
    """One way of routing, on one set of requests."""

    name: str
    accuracy: float = Field(description="share of requests that reach their own expert")
    interval: Interval | None = Field(description="95 % interval, groups of requests resampled")
    top_k_accuracy: float = Field(description="share whose own expert is among the first k")
    nats: float | None = Field(description="mean negative log-likelihood of the own expert")
    ece: float | None = Field(description="expected calibration error over 15 bins")
    is_router: bool = Field(description="whether this is what the run serves")
    router_ahead: Difference | None = Field(
        None, description="the router's accuracy less this one's; None for the router itself"
    )


class RoutedSet(ReportPart):
    """Every way of routing, on the same requests."""

    name: str
    requests: int
    rows: tuple[RouterRow, ...]

    def row(self, name: str) -> RouterRow | None:
        """Return a way of routing by its name."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def router(self) -> RouterRow | None:
        """What the run serves."""
        return next((row for row in self.rows if row.is_router), None)


class ReliabilityBin(ReportPart):
    """Requests whose confidence falls into one bin."""

    share: float = Field(description="share of all requests")
    confidence: float = Field(description="mean")
    accuracy: float


class CalibrationRow(ReportPart):
    """What the router's confidence is worth on a set, without and with its temperature."""

    set: str
    nats_before: float | None
    nats_after: float | None
    ece_before: float | None
    ece_after: float | None
    reliability: tuple[ReliabilityBin, ...] = Field(description="with the temperature")


class CoveragePoint(ReportPart):
    """The requests that the router is sure of."""

    threshold: float = Field(description="least confidence")
    coverage: float | None = Field(description="share of requests at or above it")
    accuracy: float | None = Field(description="on those; None where there are none")


class CoverageCurve(ReportPart):
    """One set at rising confidence."""

    set: str
    points: tuple[CoveragePoint, ...]


class NoneDetection(ReportPart):
    """How well requests that belong to no expert are told from the others."""

    set: str
    requests: int = Field(description="that belong to no expert")
    auroc: float | None = Field(description="by the probability of none")
    auroc_of_confidence: float | None = Field(description="by low confidence in any expert")


class ConsistencyRow(ReportPart):
    """Requests asked again with a change that should not matter."""

    change: str
    requests: int = Field(description="0 where the change could not be tried")
    same: float | None = Field(description="share that goes where it went before")


class RequestRouting(ReportPart):
    """Where the router sends requests."""

    choices: tuple[str, ...] = Field(description="experts, then none where there is one")
    top_k: int
    temperature: float
    threshold: float = Field(description="confidence below which several experts answer")
    sets: tuple[RoutedSet, ...]
    confusion: dict[str, tuple[tuple[int, ...], ...]] = Field(
        description="by set, requests by their own choice (line) and the router's (column)"
    )
    recall: dict[str, tuple[float | None, ...]] = Field(description="by set, in the choices' order")
    calibration: tuple[CalibrationRow, ...]
    coverage: tuple[CoverageCurve, ...]
    none: tuple[NoneDetection, ...]
    consistency: tuple[ConsistencyRow, ...]


class TaskScores(ReportPart):
    """Every adapter and the base on one task's test rows."""

    task: str
    metric: str
    requests: int
    scores: dict[str, float | None] = Field(description="by adapter, 0 to 1")
    intervals: dict[str, Interval | None] = Field(description="95 %")
    figures: dict[str, float | None] = Field(
        description="the metric's other figures for the task's own expert, in their own units"
    )


class AdapterScores(ReportPart):
    """Who can do what."""

    adapters: tuple[str, ...]
    tasks: tuple[TaskScores, ...]


class AnswerScore(ReportPart):
    """What one way of answering scores."""

    score: float | None = Field(description="mean, 0 to 1")
    interval: Interval | None = Field(description="95 %")


class AnswerRow(ReportPart):
    """The ways of answering, on the same routed requests."""

    requests: int
    stack: AnswerScore = Field(description="as served")
    choice: AnswerScore = Field(description="the router's first choice alone")
    oracle: AnswerScore = Field(description="the right expert")
    base: AnswerScore = Field(description="no adapter")
    behind_oracle: Difference | None = Field(description="oracle less stack")


class TaskAnswers(AnswerRow):
    """The requests of one task."""

    task: str


class AnswerSet(ReportPart):
    """The routed requests of one split whose right answer is known."""

    set: str
    tasks: tuple[TaskAnswers, ...]
    all: AnswerRow
    ranked_share: float = Field(description="share of requests that several experts answered")
    cut_share: float = Field(description="share of answers that ran into the limit of tokens")


class RequestReport(BaseReport):
    """The report of a stack that answers requests, one expert each."""

    kind: Literal["requests"] = "requests"
    model: AdapterModelFacts | None = None
    requests: RequestCounts | None = None
    routing: RequestRouting | None = Field(None, description="where requests go")
    adapters: AdapterScores | None = Field(None, description="who can do what")
    answers: tuple[AnswerSet, ...] = ()


Report = LanguageReport | RequestReport
# by kind and not by family: a further family of adapters writes the same report
_READER: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def read(text: str | bytes) -> Report:
    """Return the report that a report.json holds.

    Raises StoreError for a text that is no report of this schema, NewerStore for a later schema.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise StoreError(f"report.json cannot be read: {error}") from None
    except RecursionError:
        raise StoreError("report.json cannot be read: it is nested too deep") from None
    # the version comes first: what an unknown schema holds cannot be judged by this one
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise StoreError(
            "this report.json has no schema version, so an older version of MoleForge wrote it: "
            "evaluate again, or look at the report.html beside it"
        )
    if version > SCHEMA_VERSION:
        raise NewerStore(
            f"this report.json has schema version {version}, this program knows {SCHEMA_VERSION}: "
            "update MoleForge to read it"
        )
    try:
        return _READER.validate_python(values)
    except ValidationError as error:
        # one sentence: the first mistake tells enough of a file that nobody writes by hand
        first = error.errors()[0]
        # the first place in the location is the kind that the union was resolved to
        where = ".".join(str(place) for place in first["loc"][1:])
        raise StoreError(f"report.json is not as written: {where}: {first['msg']}") from None
