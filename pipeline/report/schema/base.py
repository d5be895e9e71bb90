"""What reports of both kinds are made of."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

# raised when a field is renamed, removed or comes to mean something else
SCHEMA_VERSION = 1

Interval = tuple[float, float]


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

    # the fields that hold text or pictures of the data, which stay with the run
    texts: ClassVar[tuple[str, ...]] = ()

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
