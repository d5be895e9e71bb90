"""What one training was, as one typed object: losses, speed, experts, memory, how it ended.

Built from plain values, an artifact's metrics and the rows of its history, so it needs neither
torch nor a store. docs/metrics.md says what each field and each key of a row is, with its unit.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, Any]
VALIDATION = "valid_nats"
# Whoever writes no shares by layer writes their mean over layers
ALL_LAYERS = "mean"


@dataclass(frozen=True)
class LossParts:
    """A loss and what it is made of, nats per predicted token; None: the training does not write
    it."""

    total: float | None = None  # what is minimised: with smoothed targets, and aux times its weight
    ce: float | None = None  # cross-entropy
    aux: float | None = None  # what keeps experts in use, before its weight; 1 at an even load


@dataclass(frozen=True)
class LossPoint:
    """The losses at one validation; of a training that counts epochs, at the end of one."""

    step: int
    epoch: int | None  # from 1, the one that has ended
    tokens: int | None  # trained on so far
    train: LossParts  # means since the point before
    valid: LossParts
    temperature: float | None  # of the gates


@dataclass(frozen=True)
class LoggedStep:
    """What is written every few steps; None: the training does not write it."""

    step: int
    tokens: int | None  # trained on so far
    nats: float | None  # training loss of this step, per predicted token
    lr: float | None
    grad_norm: float | None  # before clipping
    tokens_per_s: float | None  # since the row before
    rss_mb: float | None  # memory just then, above the level at which the job began
    temperature: float | None  # of the gates


@dataclass(frozen=True)
class ExpertUse:
    """How a layer's tokens were spread over its experts, at one step."""

    step: int
    epoch: int | None
    shares: tuple[float, ...]  # of the tokens' choices, by expert
    entropy: float | None  # of the shares, nats
    dropped: float | None  # share of choices that went over an expert's capacity

    @property
    def least(self) -> tuple[int, float] | None:
        """The expert that is used least, from 0, and its share; of equal ones the first."""
        if not self.shares:
            return None
        share = min(self.shares)
        return self.shares.index(share), share

    @property
    def most(self) -> tuple[int, float] | None:
        """The expert that is used most, from 0, and its share; of equal ones the first."""
        if not self.shares:
            return None
        share = max(self.shares)
        return self.shares.index(share), share


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer over time; the layer `mean` is the mean over all of them."""

    layer: str
    points: tuple[ExpertUse, ...]


@dataclass(frozen=True)
class PhaseSeconds:
    """Where a training's time went, seconds, all attempts together."""

    start: float = 0.0
    data: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    evaluate: float = 0.0
    save: float = 0.0

    @property
    def steps(self) -> float:
        """Seconds of the steps themselves, which tokens per second are counted over."""
        return self.data + self.forward + self.backward + self.optimizer


@dataclass(frozen=True)
class TrainingMetrics:
    """One training, whole or as far as it is."""

    address: str
    stage: str
    item: str | None
    finished: bool  # False: it runs, was interrupted, or its artifact is not here
    steps: int
    planned_steps: int | None  # None: an older history does not say before it has finished
    tokens: int | None
    epochs: int | None  # that have ended; None: the training counts none
    tokens_per_s: float | None
    seconds: float | None  # wall-clock of all attempts
    phases: PhaseSeconds
    cpu: PhaseSeconds  # processor seconds of the steps' phases, of all threads together
    train_nats: float | None  # mean over the last steps
    valid_nats: float | None  # of the state that is kept
    best_nats: float | None  # lowest validation loss
    best_step: int | None
    best_epoch: int | None
    since_best: int  # validations after the best one
    patience: int | None  # validations without a better one that end it; 0: none do
    stopped_early: bool | None  # None: it has not finished
    peak_mb: float | None
    mfu: float | None  # model FLOPs utilisation
    parameters: int | None  # that were trained
    losses: tuple[LossPoint, ...]
    logged: tuple[LoggedStep, ...]
    experts: tuple[LayerExperts, ...]
    missing: str = ""  # what of the history cannot be read, in words

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON knows it, with the least and most used expert of each point."""
        values = asdict(self)
        values["phases"]["steps"] = self.phases.steps
        for layer, said in zip(self.experts, values["experts"], strict=True):
            for use, point in zip(layer.points, said["points"], strict=True):
                point["least"] = use.least
                point["most"] = use.most
        return values


def training_metrics(
    address: str,
    stage: str,
    item: str | None,
    metrics: Mapping[str, Any] | None,
    rows: Sequence[Row],
    missing: str = "",
    *,
    planned_steps: int | None = None,
) -> TrainingMetrics:
    """Return what a training was.

    `metrics`: of its artifact's manifest, None where it has not finished; `rows`: its history in
    step order; `missing`: what of that is gone, in words; `planned_steps`: as the history has them.
    """
    made = metrics or {}
    losses = tuple(_losses(rows))
    logged = tuple(map(_logged, filter(_is_step, rows)))
    best = _best(losses)
    steps = made.get("steps", rows[-1]["step"] if rows else 0)
    planned = made.get("planned_steps", planned_steps)
    phases = _phases(made or _summed(rows))
    processor = made.get("cpu_s", {})
    cpu = _phases({f"{phase}_s": seconds for phase, seconds in processor.items()})
    tokens = made.get("tokens", _last(rows, "tokens"))
    return TrainingMetrics(
        address=address,
        stage=stage,
        item=item,
        finished=metrics is not None,
        steps=steps,
        planned_steps=planned,
        tokens=tokens,
        epochs=_epochs(losses),
        tokens_per_s=made.get("tokens_per_s", _rate(logged)),
        seconds=made.get("seconds"),
        phases=phases,
        cpu=cpu,
        train_nats=made.get("train_nats", _last(rows, "train_nats")),
        valid_nats=made.get("valid_nats", _last(rows, VALIDATION)),
        best_nats=best.valid.ce if best else None,
        best_step=best.step if best else None,
        best_epoch=best.epoch if best else None,
        since_best=len(losses) - 1 - losses.index(best) if best else 0,
        patience=made.get("patience"),
        stopped_early=steps < planned if metrics is not None and planned is not None else None,
        peak_mb=made.get("peak_mb", _peak(logged)),
        mfu=made.get("mfu"),
        parameters=made.get("parameters"),
        losses=losses,
        logged=logged,
        experts=_experts(rows),
        missing=missing,
    )


def number(value: Any) -> float | None:
    """Return a value if it is a finite number, else None; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    """Return a value if it is a whole number, else None."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def _is_step(row: Row) -> bool:
    # A validation stands in a row of its own, which says nothing of the step beside it
    return VALIDATION not in row or "train_nats" in row


def _logged(row: Row) -> LoggedStep:
    return LoggedStep(
        step=row["step"],
        tokens=_whole(row.get("tokens")),
        nats=number(row.get("train_nats")),
        lr=number(row.get("lr")),
        grad_norm=number(row.get("grad_norm")),
        tokens_per_s=number(row.get("tokens_per_s")),
        rss_mb=number(row.get("rss_mb")),
        temperature=number(row.get("temperature")),
    )


def _losses(rows: Sequence[Row]) -> Iterator[LossPoint]:
    """Yield the losses at each validation."""
    since: list[float] = []
    temperature = None
    for row in rows:
        nats = number(row.get("train_nats"))
        if nats is not None:
            since.append(nats)
        temperature = number(row.get("temperature", temperature))
        if VALIDATION not in row:
            continue
        ce = number(row.get("train_ce"))
        if ce is None and since:
            # Of the steps that were written, as the others are not known
            ce = math.fsum(since) / len(since)
        total, aux = number(row.get("train_total")), number(row.get("train_aux"))
        yield LossPoint(
            step=row["step"],
            epoch=_whole(row.get("epoch")),
            tokens=_whole(row.get("tokens")),
            train=LossParts(total, ce, aux),
            valid=LossParts(
                number(row.get("valid_total")),
                number(row[VALIDATION]),
                number(row.get("valid_aux")),
            ),
            temperature=temperature,
        )
        since = []


def _best(losses: Sequence[LossPoint]) -> LossPoint | None:
    """Return the point of the lowest validation loss, of equal ones the first, as training does."""
    best: LossPoint | None = None
    lowest = math.inf
    for point in losses:
        if point.valid.ce is not None and point.valid.ce < lowest:
            best, lowest = point, point.valid.ce
    return best


def _epochs(losses: Sequence[LossPoint]) -> int | None:
    counted = [point.epoch for point in losses if point.epoch is not None]
    return max(counted, default=None)


def _last(rows: Sequence[Row], name: str) -> Any:
    """Return the last number of that name in a history."""
    for row in reversed(rows):
        if number(row.get(name)) is not None:
            return row[name]
    return None


def _summed(rows: Sequence[Row]) -> dict[str, float]:
    """Return the seconds of the phases that rows tell of: all but starting, evaluating, saving."""
    totals: dict[str, float] = {}
    for row in rows:
        for phase in PhaseSeconds.__dataclass_fields__:
            seconds = number(row.get(f"{phase}_s"))
            if seconds is not None:
                totals[f"{phase}_s"] = totals.get(f"{phase}_s", 0.0) + seconds
    return totals


def _phases(totals: Mapping[str, Any]) -> PhaseSeconds:
    seconds = {}
    for phase in PhaseSeconds.__dataclass_fields__:
        seconds[phase] = number(totals.get(f"{phase}_s")) or 0.0
    return PhaseSeconds(**seconds)


def _rate(logged: Sequence[LoggedStep]) -> float | None:
    """Return tokens per second over all steps that rows tell of."""
    tokens = 0.0
    seconds = 0.0
    before = 0
    for each in logged:
        if each.tokens and each.tokens_per_s:
            tokens += each.tokens - before
            seconds += (each.tokens - before) / each.tokens_per_s
            before = each.tokens
    return tokens / seconds if seconds else None


def _peak(logged: Sequence[LoggedStep]) -> float | None:
    return max((each.rss_mb for each in logged if each.rss_mb is not None), default=None)


def _experts(rows: Sequence[Row]) -> tuple[LayerExperts, ...]:
    """Return each layer's experts over time, in the order in which rows name layers."""
    layers: dict[str, list[ExpertUse]] = {}
    for row in rows:
        for layer, said in _said_of_layers(row):
            use = ExpertUse(
                step=row["step"],
                epoch=_whole(row.get("epoch")),
                shares=tuple(number(share) or 0.0 for share in said["shares"]),
                entropy=number(said.get("entropy")),
                dropped=number(said.get("dropped")),
            )
            layers.setdefault(layer, []).append(use)
    return tuple(LayerExperts(layer, tuple(points)) for layer, points in layers.items())


def _said_of_layers(row: Row) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what a row says of the experts, layer by layer."""
    # A history may come from elsewhere, and then anything may stand there
    experts = row.get("experts")
    layers = experts.get("layer") if isinstance(experts, dict) else None
    for layer, said in layers.items() if isinstance(layers, dict) else ():
        if isinstance(said, dict) and isinstance(said.get("shares"), list):
            yield layer, said
    if isinstance(row.get("load"), list):
        yield ALL_LAYERS, {**row, "shares": row["load"]}
