"""The report of a stack that answers requests, one expert each, and its tables."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .base import BaseReport, Difference, Interval, RateSearch, ReportPart

# A small picture inside the report. Nothing else: a page with an address in its place would tell
# whoever has that address who reads it.
Picture = Annotated[str, Field(pattern=r"^data:image/jpeg;base64,[A-Za-z0-9+/]+={0,2}$")]


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


class ShownRequest(ReportPart):
    """A test request that the report shows."""

    set: str
    own: str = Field(description="the expert that it is of, or none")
    prompt: str = Field(description="its beginning, where it is long")
    pictures: tuple[Picture, ...] = Field(description="small copies of what it came with")


class MisroutedRequest(ShownRequest):
    """One that the router sent elsewhere."""

    choice: str = Field(description="where it was sent")
    confidence: float


class GivenAnswer(ReportPart):
    """What somebody answered."""

    way: str = Field(description="stack, right expert or base")
    by: str = Field(description="who answered: an expert, or the base")
    text: str
    score: float | None


class AnsweredRequest(ShownRequest):
    """One of a task's row, so that it is known what is right."""

    right: str = Field(description="the right answer, the first where there are several")
    answers: tuple[GivenAnswer, ...]


class RequestReport(BaseReport):
    """The report of a stack that answers requests, one expert each."""

    texts: ClassVar[tuple[str, ...]] = ("misrouted", "examples")

    kind: Literal["requests"] = "requests"
    model: AdapterModelFacts | None = None
    requests: RequestCounts | None = None
    routing: RequestRouting | None = Field(None, description="where requests go")
    adapters: AdapterScores | None = Field(None, description="who can do what")
    answers: tuple[AnswerSet, ...] = ()
    rates: tuple[RateSearch, ...] = Field((), description="learning rates that were searched")
    misrouted: tuple[MisroutedRequest, ...] = Field(
        (), description="requests that went to a wrong expert"
    )
    examples: tuple[AnsweredRequest, ...] = Field((), description="requests with their answers")
