"""What came of trials, read from the store: losses, sizes, where tokens go, what it took."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import PipelineError
from ...families.load import trial_models
from ...metrics.seeds import interval_of_mean
from ...report.schema.base import JobSpeed, MachineFacts
from ...report.schema.experiments import (
    ModelSizes,
    SweepWork,
    TrialExperts,
    TrialLosses,
    TrialRun,
    TrialScore,
    TrialSummary,
    TrialTiming,
)
from ...store.artifacts import Manifest, Store
from ...store.history import Row
from ..context import StoredParts
from ..stages import label
from .trials import Trial

# Rows of the gates' training over which their load is averaged: each is of one batch
LAST_ROWS = 10


def run_of(
    trial: Trial, store: Store, error: str = "", state: str = "failed", unmeasured: str = ""
) -> TrialRun:
    """Return what came of a trial; `error` says why it has no model, `state` what that is, and
    `unmeasured` why the model that it has was not measured."""
    about: dict[str, Any] = {
        "seed": trial.seed,
        "job": label(*trial.model),
        "address": trial.jobs[trial.model],
        "tokens": trial.tokens,
        "config": trial.cfg.model_dump(mode="json", exclude={"identity", "modal", "deploy"}),
    }
    if error:
        return TrialRun(state=state, error=error, **about)
    parts = StoredParts(trial.cfg, store)
    try:
        manifest = parts.manifest(*trial.model)
        rows = parts.history(*trial.model).rows
        active, total = trial_models(trial.cfg).model_sizes(trial.cfg, parts, trial.model)
        timing = _timing(trial, parts)
    except PipelineError as problem:
        return TrialRun(state="missing", error=str(problem), **about)
    score = None
    if not unmeasured:
        score, unmeasured = _score(trial, parts)
    return TrialRun(
        state="done",
        score=score,
        unmeasured=unmeasured,
        losses=_losses(manifest, rows),
        sizes=ModelSizes(active=active, total=total),
        use=_use(trial, manifest, rows),
        timing=timing,
        **about,
    )


def _score(trial: Trial, parts: StoredParts) -> tuple[TrialScore | None, str]:
    """Return what a model scores by itself, or why that is not there."""
    try:
        metrics = parts.manifest(*trial.score).metrics
    except PipelineError as problem:
        return None, str(problem)
    return TrialScore.model_validate({key: metrics[key] for key in TrialScore.model_fields}), ""


def _losses(manifest: Manifest, rows: Sequence[Row]) -> TrialLosses:
    metrics = manifest.metrics
    kept = _kept_row(manifest, rows)
    # Of an epoch its own mean is known; else that of the last steps, as the manifest has it
    train = kept.get("train_ce", metrics.get("train_nats"))
    return TrialLosses(
        valid=metrics.get("valid_nats"),
        train=train,
        steps=metrics.get("steps"),
        kept_step=metrics.get("kept_step"),
        stopped_early=metrics.get("steps", 0) < metrics.get("planned_steps", 0),
    )


def _kept_row(manifest: Manifest, rows: Sequence[Row]) -> Row:
    """Return the validation row of the state that is kept; an empty one where it is not there."""
    for row in rows:
        if "valid_nats" in row and row["step"] == manifest.metrics.get("kept_step"):
            return row
    return {}


def _use(trial: Trial, manifest: Manifest, rows: Sequence[Row]) -> TrialExperts | None:
    """Return where the gates send tokens; None for a model without, or whose gates were not
    trained."""
    kept = _kept_row(manifest, rows)
    layers = kept.get("experts", {}).get("layer", {})
    if layers:
        ends = [row["tokens"] for row in rows if "valid_nats" in row and row["step"] < kept["step"]]
        return _use_of_layers(layers, kept["tokens"] - max(ends, default=0))
    told = [row for row in rows if "load" in row][-LAST_ROWS:]
    if not told:
        return None
    mean = [statistics.fmean(shares) for shares in zip(*(row["load"] for row in told), strict=True)]
    least = min(mean)
    names = list(trial.cfg.experts)
    at = mean.index(least)
    # A kept anchor stands before the others
    at_name = at - (len(mean) - len(names))
    dropped = [row["dropped"] for row in rows if "dropped" in row][-LAST_ROWS:]
    return TrialExperts(
        least=least,
        where=names[at_name] if at_name >= 0 else "anchor",
        # each row is of one step
        tokens=round(len(told) * told[-1]["tokens"] / told[-1]["step"]),
        entropy=_entropy(mean),
        max_entropy=math.log(len(mean)),
        dropped=statistics.fmean(dropped) if dropped else None,
    )


def _use_of_layers(layers: Mapping[str, Mapping[str, Any]], tokens: int) -> TrialExperts:
    # Experts of one number in two layers have nothing to do with each other, so each counts
    least = math.inf
    where = ""
    for layer, found in layers.items():
        share = min(found["shares"])
        if share < least:
            least = share
            where = f"layer {layer} expert {list(found['shares']).index(share)}"
    counts = [len(found["shares"]) for found in layers.values()]
    return TrialExperts(
        least=least,
        where=where,
        tokens=tokens,
        entropy=statistics.fmean(found["entropy"] for found in layers.values()),
        max_entropy=math.log(max(counts)),
        dropped=statistics.fmean(found.get("dropped", 0.0) for found in layers.values()),
    )


def _entropy(shares: Iterable[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def _timing(trial: Trial, parts: StoredParts) -> TrialTiming:
    """Return what all trainings took that a model is made of. Raises MissingArtifact,
    DamagedArtifact, StaleArtifact."""
    jobs = []
    cpu_s: dict[str, float] = {}
    counted = True
    gpus = set()
    tokens = 0
    seconds = 0.0
    for job, address in trial.trainings.items():
        manifest = parts.reader.manifest(address)
        metrics = manifest.metrics
        jobs.append(JobSpeed.from_metrics(label(*job), metrics))
        tokens += metrics.get("tokens", 0)
        seconds += metrics.get("training_s", 0.0)
        if not metrics.get("tokens"):
            # Nothing was trained, as of gates in closed form
            continue
        # A GPU computes while the processor waits, whose time then says nothing
        gpu = manifest.made.get("machine", {}).get("gpu")
        gpus.add(gpu)
        counted = counted and not gpu and "cpu_s" in metrics
        for phase, spent_s in metrics.get("cpu_s", {}).items():
            cpu_s[phase] = cpu_s.get(phase, 0.0) + spent_s
    whole_s = sum(cpu_s.values())
    return TrialTiming(
        tokens=tokens,
        seconds=seconds,
        cpu_s=cpu_s,
        tokens_per_s=tokens / seconds if seconds else None,
        tokens_per_cpu_s=tokens / whole_s if counted and whole_s else None,
        gpu=gpus.pop() if len(gpus) == 1 else None,
        jobs=tuple(jobs),
    )


def summary(
    first: Trial, runs: Sequence[TrialRun], is_dense: bool, origin: str = ""
) -> TrialSummary:
    """Return a trial over its seeds; `first` is that with one of them."""
    losses = [run.losses for run in runs if run.state == "done" and run.losses is not None]
    valid = [each.valid for each in losses if each.valid is not None]
    gaps = [each.gap for each in losses if each.gap is not None]
    bits = [run.score.bits_per_byte for run in runs if run.score is not None]
    return TrialSummary(
        name=first.name,
        makes=first.makes,
        changes=dict(first.changes),
        origin=origin,
        runs=tuple(runs),
        valid=statistics.fmean(valid) if valid else None,
        spread=statistics.stdev(valid) if len(valid) > 1 else None,
        valid_interval=interval_of_mean(valid),
        gap=statistics.fmean(gaps) if gaps else None,
        bits_per_byte=statistics.fmean(bits) if bits else None,
        bits_spread=statistics.stdev(bits) if len(bits) > 1 else None,
        bits_interval=interval_of_mean(bits),
        is_dense=is_dense,
    )


def made_on(trials: Iterable[Trial], store: Store) -> tuple[MachineFacts | None, dict[str, str]]:
    """Return the machine of the last trial that has a model, and the versions it was made with."""
    machine = None
    packages: dict[str, str] = {}
    for trial in trials:
        address = trial.jobs[trial.model]
        if store.has(address):
            made = store.require(address).made
            machine = made.get("machine") or machine
            packages = made.get("packages") or packages
    return None if machine is None else MachineFacts(**machine), packages


def work_of(trials: Iterable[Trial], store: Store) -> SweepWork:
    """Return what all jobs of trials took that are done, each counted once."""
    taken = {}
    for trial in trials:
        for address in trial.measured.values():
            if address not in taken and store.has(address):
                taken[address] = float(store.require(address).made.get("seconds", 0.0))
    return SweepWork(jobs=len(taken), seconds=sum(taken.values()))
