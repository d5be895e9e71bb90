"""`history report`: the page of several runs' histories, and their losses as pictures beside it."""

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from ...errors import ConfigError, PipelineError
from ...families.load import parse
from ...report import LanguageReport
from ...report import read as read_report
from ...report.format import DASH, figures, seconds
from ...report.history_page.charts import Canvas, TrainingRows, evaluated
from ...report.history_page.drawn import DrawnRun, HeatMap, HistoryPage, Listed, StageSection
from ...report.history_page.page import history_page
from ...store.address import job_of
from ...store.artifacts import Store, write_text
from ...store.history import read
from ...store.history_fold import REPORT
from ...store.reading import read_bytes
from ...store.room import writing_to
from ...store.roots import read_root, root_path
from ..stages import STAGES
from .experiments import tables as trial_tables
from .lines import SPENT, Known, PastRun, PastTraining, priced_when
from .listing import in_usd, scored

Say = Callable[[str], None]


def report(
    runs: Sequence[PastRun],
    known: Known,
    index: sqlite3.Connection,
    store: Store,
    to: Path,
    with_pictures: bool,
    say: Say,
) -> None:
    """Write the page of runs over what is at `to`, and the losses of each stage beside it. Raises
    ConfigError where there is nothing to draw, UnreadableFile, DiskFull, StoreError."""
    drawings = _drawings(runs, store)
    if not drawings:
        raise ConfigError("none of these runs has a history, so there is nothing to draw")
    if to.is_dir():
        raise ConfigError(f"--to: {to} is a folder: name the page's file, as {to / 'history.html'}")
    page = _page(runs, drawings, known, index, store)
    with writing_to(to, "file"):
        to.parent.mkdir(parents=True, exist_ok=True)
        write_text(to, history_page(page))
        say(f"{len(runs):,} runs, {len(drawings):,} trainings: {to}")
        if with_pictures:
            # with matplotlib, which takes a second
            from ...report.history_page.pictures import draw_losses

            for path in draw_losses(page, to):
                say(f"picture: {path}")


def _page(
    runs: Sequence[PastRun],
    drawings: Sequence[TrainingRows],
    known: Known,
    index: sqlite3.Connection,
    store: Store,
) -> HistoryPage:
    canvas = Canvas()
    stages: dict[str, list[TrainingRows]] = {}
    for drawing in drawings:
        stages.setdefault(drawing.stage, []).append(drawing)
    sections = [canvas.section(stage, of) for stage, of in stages.items()]
    maps = list(_evaluated(runs, store))
    if maps:
        note = "Share of the tokens of held-out text, mean over domains."
        sections.append(StageSection("experts in evaluations", note, [], maps))
    notes = [text for run in runs for text in run.wrong]
    drawn = [DrawnRun(run.id, run.family, run.begun) for run in runs]
    latest = max(run.begun for run in runs)
    meta = f"{len(runs):,} runs · {len(drawings):,} trainings · the latest begun {latest}"
    title = f"Runs in {store.root.resolve().name}"
    tables = [*trial_tables(runs, known), _scores(runs), _evaluations(runs), _deploys(runs)]
    tables += [_times(runs, index), _costs(runs, index)]
    return HistoryPage(
        title, meta, drawn, canvas.axes, sections, tables, [*dict.fromkeys(notes), *known.wrong]
    )


def _drawings(runs: Sequence[PastRun], store: Store) -> list[TrainingRows]:
    """Return the trainings of runs in the order of stages, each once. Raises UnreadableFile."""
    of: dict[str, list[int]] = {}
    trainings: dict[str, PastTraining] = {}
    for number, run in enumerate(runs):
        for training in run.trainings:
            of.setdefault(training.address, []).append(number)
            trainings[training.address] = training
    names: dict[int, tuple[str, ...]] = {}
    found = []

    def place(training: PastTraining) -> tuple[int, str, list[int]]:
        # lines of one item beside each other, in the order of the runs
        return training.place[0], training.name, of[training.address]

    for training in sorted(trainings.values(), key=place):
        numbers = tuple(of[training.address])
        first = numbers[0]
        if first not in names:
            names[first] = _experts(runs[first], store)
        rows = read(store.history(training.address)).rows
        if rows:
            # its stage stands above it
            name = job_of(training.address)[1] or training.stage
            found.append(TrainingRows(training.stage, name, numbers, rows, names[first]))
    return found


def _experts(run: PastRun, store: Store) -> tuple[str, ...]:
    """Return what a run calls its experts; nothing where its settings are those of a later
    version."""
    if not run.has_root:
        return ()
    with suppress(PipelineError, ValidationError, KeyError, TypeError, AttributeError):
        return tuple(parse(read_root(root_path(store, run.id)).settings).experts)
    return ()


def _evaluated(runs: Sequence[PastRun], store: Store) -> Iterator[HeatMap]:
    """Yield who was used in which layer, as reports have it."""
    for number, run in enumerate(runs):
        if not run.evaluation:
            continue
        # one that cannot be read is among the notes already
        with suppress(PipelineError):
            found = read_report(read_bytes(store.folder(run.evaluation.address) / REPORT))
            if isinstance(found, LanguageReport) and found.routing:
                yield evaluated(found.routing, found.experts, number)


def _scores(runs: Sequence[PastRun]) -> Listed:
    """Return the figures of all reports, a column for each run."""
    of_runs = []
    for run in runs:
        found = run.evaluation.scores if run.evaluation else ()
        of_runs.append({(score.name, score.measure): score for score in found})
    names: dict[tuple[str, str], None] = {}
    for of in of_runs:
        names |= dict.fromkeys(of)
    rows = []
    for key in names:
        cells = []
        for of in of_runs:
            score = of.get(key)
            cells.append(figures(score.value) + (" *" if score.serves else "") if score else DASH)
        rows.append((f"{key[0]}, {key[1]}", *cells))
    note = "* what the run serves. Bits per byte: less is better; all else: more is."
    return Listed("Figures of evaluations", ("", *(run.id for run in runs)), rows, note)


def _evaluations(runs: Sequence[PastRun]) -> Listed:
    rows = []
    for run in runs:
        for each in run.evaluations:
            rows.append((run.id, each.made, scored(each), each.criteria or DASH, each.address))
    return Listed("Evaluations", ("run", "made", "figure", "criteria", "address"), rows)


def _deploys(runs: Sequence[PastRun]) -> Listed:
    rows = []
    for run in runs:
        for each in run.deploys:
            size = f"{each.bytes / 1e6:,.1f}"
            rows.append((run.id, each.made, size, "yes" if each.served else DASH, each.address))
    return Listed("Deploys", ("run", "made", "MB", "served on Modal", "address"), rows)


def _times(runs: Sequence[PastRun], index: sqlite3.Connection) -> Listed:
    """Return what the jobs of each stage took, a column for each run."""
    chosen = {run.id: number for number, run in enumerate(runs)}
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(runs))
    for run, stage, machine, taken in index.execute(
        "SELECT run, stage, machine, total(seconds) FROM run_addresses"
        " JOIN artifacts USING (address) GROUP BY run, stage, machine"
    ):
        if run in chosen:
            spent[stage, machine][chosen[run]] += taken
    rows = []
    for key in sorted(spent, key=_in_order):
        cells = [seconds(taken) if taken else DASH for taken in spent[key]]
        rows.append((key[0], key[1] or DASH, *cells))
    totals = [seconds(run.seconds) for run in runs]
    rows.append(("all", "", *totals))
    note = (
        "Wall-clock of the jobs, one after another, as their manifests have it; what several runs "
        "share was paid for once."
    )
    return Listed("What it took", ("stage", "machine", *(run.id for run in runs)), rows, note)


def _costs(runs: Sequence[PastRun], index: sqlite3.Connection) -> Listed:
    """Return what the containers of each stage were paid for, beside what was estimated."""
    chosen = {run.id for run in runs}
    rows = []
    for run, stage, taken, usd, estimated in index.execute(SPENT):
        if run in chosen:
            rows.append((run, stage, seconds(taken), in_usd(estimated), in_usd(usd)))
    note = (
        "Seconds of containers, those that were lost too, times the price of their machines; what "
        "several runs share was paid for once."
    )
    when = priced_when(sorted(chosen), index)
    note += f" Told {when}." if when else ""
    columns = ("run", "stage", "containers' time", "estimated, US$", "US$")
    return Listed("Costs on Modal", columns, rows, note)


def _in_order(key: tuple[str, str]) -> tuple[int, str, str]:
    stage, machine = key
    number = STAGES.index(stage) if stage in STAGES else len(STAGES)
    return number, stage, machine
