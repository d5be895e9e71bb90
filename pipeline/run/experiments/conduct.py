"""A whole sweep: trials that are listed, then searches, then what came of them, held against what
was asked."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ... import report
from ...errors import ConfigError, PipelineError, StoreError
from ...families.load import trial_models
from ...protocols import Progress
from ...report.schema.experiments import FOLDER, RESULTS, TABLES, ExperimentResults, TrialSummary
from ...report.schema.reading import read_results
from ...store.artifacts import Store, now, write_text
from ...store.history import Row
from ...store.reading import read_bytes
from ...store.room import PART
from ..backend import Local
from ..context import StoredParts
from ..open_report import PAGE
from ..stages import first_few
from .criteria import judged
from .reading import Experiments
from .remaining import Remaining
from .results import made_on, summary, work_of
from .searches import Searched, outcome, searched
from .sweep import (
    Ended,
    GivesUp,
    HandOut,
    Known,
    NoLooks,
    SweepLooks,
    TrialSweep,
    Wanted,
    known_to,
    looked_at,
)
from .trials import Trial, listed_trials, trial_label

DENSE = "dense"
SEED = "seed-"  # before the seed of which dense weights are
MADE_FROM = "made_from.json"  # in them: whatever has none was not written here
WRITING = "results"  # the lock of who writes results


def results_folder(store: Store, experiments: Experiments) -> Path:
    """Where the results of an experiments file lie unless told otherwise."""
    return store.root / FOLDER / experiments.name


def refuse_others(folder: Path, experiments: Experiments) -> None:
    """Raise ConfigError for a folder in which something would be replaced that no sweep has
    written."""
    others = []
    if not (folder / RESULTS).exists():
        others = [folder / name for name in (TABLES, PAGE) if (folder / name).exists()]
    for seed in sorted({trial.seed for trial in listed_trials(experiments)}):
        place = folder / DENSE / f"{SEED}{seed}"
        # What is being written is called otherwise until all of it is there
        if place.exists() and not (place / MADE_FROM).is_file():
            others.append(place)
    if others:
        raise ConfigError(
            f"--to: {others[0]} is of no experiments and would be replaced; name another folder"
        )


def replaced(folder: Path, experiments: Experiments) -> str:
    """Return in a sentence which trials' results in a folder will be replaced by those of a file
    that has no such trials, "" where there are none."""
    try:
        former = read_results(read_bytes(folder / RESULTS)).trials
    except (StoreError, OSError):
        return ""
    known = {trial.name for trial in listed_trials(experiments)}
    lost = [
        each.name
        for each in former
        if each.name not in known and each.origin not in experiments.settings.searches
    ]
    if not lost:
        return ""
    return (
        f"{folder} has results of trials that are not in {experiments.file} ({first_few(lost)}), "
        "which will be replaced; --to DIR leaves them there"
    )


def _agreed(_trials: Sequence[Trial]) -> None: ...


def conduct(
    experiments: Experiments,
    store: Store,
    hand_out: HandOut,
    tell: Callable[[str], None],
    progress: Progress,
    *,
    frozen: bool = False,
    text_only: bool = False,
    known: Known = known_to,
    agree: Callable[[Sequence[Trial]], None] = _agreed,
    parallel: int | None = None,
    looks: SweepLooks | None = None,
) -> tuple[ExperimentResults, list[Trial]]:
    """Do what is missing of a sweep; return what came of it, and the trials that were made.

    With `text_only` nothing is trained. `known` has what trials make left alone while it lasts;
    `agree` is asked once they are looked at, before anything starts; what `looks` have of a former
    attempt is gone by. `parallel` jobs run side by side here, None: elsewhere. Raises ConfigError
    then too, StoreError, Interrupted.
    """
    settings = experiments.settings
    looks = looks or NoLooks()
    # All of them are checked before the first one starts
    trials, notes = looked_at(listed_trials(experiments), store, progress, frozen, looks)
    same = alike(trials)
    for note in (*notes, *same):
        tell(note)
    agree(trials)
    remaining = Remaining(store, parallel)
    sweep = TrialSweep(store, hand_out, tell, known, remaining, looks)
    with known(store, trials, str(experiments.file)):
        sweep.make(trials, text_only=text_only)
        if not text_only:
            sweep.measure(trials)
        summaries = _listed(sweep, trials, settings.criteria.dense)
        for name in () if text_only else settings.searches:
            made = searched(experiments, name, sweep, progress, frozen)
            summaries += [_searched(each, name) for each in made]
            trials += [each.trial for each in made if each.trial is not None]
    machine, packages = made_on(trials, store)
    results = ExperimentResults(
        experiments=experiments.name,
        made=now(),
        seeds=settings.seeds,
        trials=tuple(judged(summaries, settings.criteria)),
        machine=machine,
        packages=packages,
        work=work_of(trials, store),
        notes=(*_notes(summaries), *same),
    )
    return results, trials


def _listed(sweep: TrialSweep, trials: Sequence[Trial], dense: str) -> list[TrialSummary]:
    found = []
    for name in dict.fromkeys(trial.name for trial in trials):
        seeds = [trial for trial in trials if trial.name == name]
        runs = [outcome(trial, sweep) for trial in seeds]
        found.append(summary(seeds[0], runs, name == dense))
    return found


def alike(trials: Sequence[Trial]) -> list[str]:
    """Return in sentences which trials are one model: what they change is nothing to it."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for trial in trials:
        names[trial.jobs[trial.model]][trial.name] = None
    several = dict.fromkeys(", ".join(each) for each in names.values() if len(each) > 1)
    return [
        f"One model, as what differs between them has no part in it: trials {each}."
        for each in several
    ]


def _searched(each: Searched, origin: str) -> TrialSummary:
    if each.trial is not None:
        return summary(each.trial, [each.run], False, origin)
    return TrialSummary(
        name=each.name, makes=each.makes, changes=each.changes, origin=origin, runs=(each.run,)
    )


def _notes(summaries: Sequence[TrialSummary]) -> list[str]:
    found = [
        "Losses are of the state that is kept, on validation rows in one order: they compare where "
        "trials have the same text, tokenizer, context_tokens and eval_tokens.",
        "What trials share is made once and counted in each of them.",
    ]
    done = [run for each in summaries for run in each.done]
    if len({json.dumps(run.config.get("data")) for run in done}) > 1:
        found.append("Some trials read other text than others, so their losses do not compare.")
    if len({run.tokens for run in done}) > 1:
        found.append(
            "Some trials have other tokens than others: their losses a token do not compare, and "
            "their bits per byte do."
        )
    scores = {run.score.text: run.score for run in done if run.score}
    if len(scores) == 1:
        (score,) = scores.values()
        found.append(
            f"Bits per byte are of the same {score.documents:,} held-out documents for every "
            f"model, {score.bytes:,} bytes in {len(score.bits_per_byte_by_domain)} domains."
        )
    elif scores:
        found.append(
            "Some trials were measured on other held-out documents than others, so their bits per "
            "byte do not compare."
        )
    return found


def local_hand_out(
    local: Local, sentence: Callable[[PipelineError], str], experiments: str
) -> HandOut:
    """Return what does jobs of experiments of that name on this machine; `sentence` is how an error
    is told."""

    def hand_out(stage: str, wanted: Wanted, ended: Ended, gives_up: GivesUp | None) -> None:
        def told(at: int, error: PipelineError | None) -> None:
            ended(at, "" if error is None else sentence(error))

        names = [trial_label(experiments, cfg.name, cfg.seed) for cfg, _ in wanted]
        local.run_several(stage, wanted, told, gives_up, names)

    return hand_out


def write_results(
    results: ExperimentResults,
    trials: Sequence[Trial],
    store: Store,
    folder: Path,
    progress: Progress,
) -> ExperimentResults:
    """Write results, their tables, a page and dense weights to a folder; return the results with
    where those are. Raises DiskFull, DamagedArtifact, MissingArtifact."""
    dense = next((each.name for each in results.trials if each.is_dense), None)
    weights = {}
    # Of two sweeps that end at once one's files are all there
    with store.lock(WRITING):
        folder.mkdir(parents=True, exist_ok=True)
        for trial in trials:
            address = trial.jobs[trial.model]
            is_made = any(run.address == address for each in results.trials for run in each.done)
            if trial.name == dense and is_made and not trial.makes.startswith("stack"):
                place = folder / DENSE / f"{SEED}{trial.seed}"
                _write_dense(trial, store, place, progress)
                weights[str(trial.seed)] = place.relative_to(folder).as_posix()
        told = {"dense_weights": weights, "notes": (*results.notes, *_of_others(folder, weights))}
        results = results.model_copy(update=told)
        write_text(folder / RESULTS, results.to_json())
        write_text(folder / TABLES, report.experiments_text(results))
        write_text(folder / PAGE, report.experiments_page(results, _histories(trials, store)))
    return results


def _of_others(folder: Path, weights: Mapping[str, str]) -> list[str]:
    """Return in sentences which dense weights in a folder are of no trial whose results these
    are."""
    notes = []
    for mark in sorted((folder / DENSE).glob(f"{SEED}*/{MADE_FROM}")):
        place = mark.parent.relative_to(folder).as_posix()
        if place not in weights.values() and not place.endswith(PART):
            notes.append(f"{place} beside these results is of other experiments.")
    return notes


def _write_dense(trial: Trial, store: Store, place: Path, progress: Progress) -> None:
    """Write a dense model as a checkpoint, unless the very same lies there."""
    address = trial.jobs[trial.model]
    parts = StoredParts(trial.cfg, store, progress)
    digest = parts.manifest(*trial.model).digest
    made_from = json.dumps({"address": address, "digest": digest}, indent=1) + "\n"
    mark = place / MADE_FROM
    if mark.is_file() and mark.read_text("utf-8") == made_from:
        return
    part = place.with_name(place.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    trial_models(trial.cfg).write_model(trial.cfg, parts, trial.model, part, progress)
    write_text(part / MADE_FROM, made_from)
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)


def _histories(trials: Sequence[Trial], store: Store) -> dict[str, list[Row]]:
    """Return the history of each trial's model, of one seed each; those that have none are left
    out."""
    found: dict[str, list[Row]] = {}
    for trial in trials:
        name = f"trial {trial.name}"
        if name in found:
            continue
        try:
            rows = StoredParts(trial.cfg, store).history(*trial.model).rows
        except PipelineError:
            # It failed, as the tables say
            continue
        if rows:
            found[name] = rows
    return found
