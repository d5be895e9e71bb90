"""What a few seeds tell, and the tables of experiments in which recipes stand side by side."""

import pytest

from benchmarks import experiments as page
from pipeline import report
from pipeline.config.experiments import CriteriaConfig
from pipeline.metrics.seeds import interval_of_mean
from pipeline.report import recipes
from pipeline.report.markdown import experiments_tables
from pipeline.report.schema.base import JobSpeed
from pipeline.report.schema.experiments import ExperimentResults, SweepWork, TrialLosses
from pipeline.run.experiments.criteria import judged
from tests.small_experiments import summed


def trained(name, tokens):
    """Return the times of a job that trained on so many tokens."""
    phases = {"data_s": 0, "forward_s": 0, "backward_s": 0, "optimizer_s": 0}
    about = {"seconds": 1.0, "tokens": tokens, "tokens_per_s": 9.0, "peak_mb": None, "mfu": None}
    return JobSpeed(job=name, **about, **phases)


def of_parts(name, trunk, expert, **figures):
    """Return a stack whose trunk and two experts were trained on so many tokens."""
    jobs = (
        trained("train_shared", trunk),
        trained("train_experts sea", expert),
        trained("train_experts shop", expert),
        trained("train_router", 7),
    )
    made = summed(name, **figures)
    runs = []
    for run in made.runs:
        runs.append(run.model_copy(update={"timing": run.timing.model_copy(update={"jobs": jobs})}))
    return made.model_copy(update={"makes": "stack", "runs": tuple(runs)})


def seeded(name, losses, **figures):
    """Return a trial with a validation loss for each seed."""
    made = summed(name, valid=sum(losses) / len(losses), seeds=range(len(losses)), **figures)
    runs = []
    for run, valid in zip(made.runs, losses, strict=True):
        runs.append(run.model_copy(update={"losses": TrialLosses(valid=valid, train=None)}))
    return made.model_copy(update={"runs": tuple(runs)})


def results(*trials):
    return ExperimentResults(
        experiments="tried|twice",
        seeds=(0,),
        trials=trials,
        packages={"torch": "1.2", "numpy": "3.4"},
        work=SweepWork(jobs=12, seconds=3725.0),
        notes=("a | b",),
    )


DENSE = summed("dense", valid=3.0, train=2.6, speed=100.0, dense=True, bits=1.3)
KINDS = (
    DENSE,
    summed("worse_moe", valid=2.9, train=2.6, bits=1.25),
    summed("moe", valid=3.1, train=2.6, bits=1.2),
    of_parts("long", 300, 50, valid=3.0, bits=1.4),
    of_parts("short", 100, 150, valid=3.0, bits=1.5),
    of_parts("given", 0, 200, bits=0.9, tokens="others"),
)


@pytest.mark.parametrize(
    ("values", "half"),
    # of Student's t with 1, 2 and 9 degrees of freedom: 12.706, 4.303, 2.262
    [
        ([1.0, 3.0], 12.706),
        ([1.0, 2.0, 3.0], 4.303 / 3**0.5),
        ([*range(10)], 2.262 * (55 / 6 / 10) ** 0.5),
    ],
)
def test_the_interval_of_a_mean_is_students(values, half):
    low, high = interval_of_mean(values)
    mean = sum(values) / len(values)
    assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-3)


def test_one_seed_has_no_interval():
    assert interval_of_mean([2.0]) is None and interval_of_mean([]) is None


def test_a_difference_says_whether_seeds_tell_it():
    dense = seeded("dense", [3.0, 3.1, 3.2], dense=True)
    sure, unsure = seeded("sure", [2.9, 3.01, 3.1]), seeded("unsure", [2.5, 3.5, 3.0])
    _, sure, unsure = judged([dense, sure, unsure], CriteriaConfig())
    # pair by pair: -.1, -.09, -.1
    half = 4.303 * 0.01 / 3
    found = sure.criteria[0]
    assert found.interval == pytest.approx((-0.29 / 3 - half, -0.29 / 3 + half), rel=1e-3)
    assert found.passed and "do not tell" not in found.detail
    found = unsure.criteria[0]
    assert found.passed and "which these seeds do not tell from equal" in found.detail
    (alone,) = judged([DENSE, KINDS[2]], CriteriaConfig())[1:]
    assert alone.criteria[0].interval is None and "do not tell" not in alone.criteria[0].detail


def test_the_best_of_each_kind_stand_side_by_side_in_bits_per_byte():
    table = recipes.side_by_side(results(*KINDS))
    found = {row.name: [cell.text for cell in row.cells] for row in table.rows}
    assert {name: cells[:4] for name, cells in found.items()} == {
        "joint moe": ["moe", "3", "1.2000", "−0.1000"],
        "stack": ["long", "2", "1.4000", "+0.1000"],
        "stack, other tokens": ["given", "1", "0.9000", "−0.4000"],
    }
    assert [row.name for row in table.rows if row.cells[2].best] == ["stack, other tokens"]
    # A stack on a pretrained trunk stands against that trunk trained on, where a trial is
    other = summed("continued", bits=0.95, tokens="others", dense=True)
    continued = other.model_copy(update={"makes": "dense total", "is_dense": False})
    rows = recipes.side_by_side(results(*KINDS, continued)).rows
    cells = {row.name: row.cells[3] for row in rows}
    assert (cells["stack, other tokens"].text, cells["stack, other tokens"].small) == (
        *("−0.0500", "continued"),
    )
    assert cells["dense total, other tokens"].text == "–" and cells["stack"].small == ""


def test_the_split_of_a_stacks_tokens_is_told_from_its_trainings():
    table = recipes.split(results(*KINDS))
    found = [[row.name, *(cell.text for cell in row.cells[:4])] for row in table.rows]
    assert found == [
        ["given", "0", "400", "7", "0 %"],
        ["short", "100", "300", "7", "25 %"],
        ["long", "300", "100", "7", "75 %"],
    ]
    assert not recipes.split(results(DENSE)).rows


def test_all_tables_are_in_a_file_that_can_be_committed():
    made = results(*judged(KINDS, CriteriaConfig()))
    text = report.experiments_text(made)
    assert text.startswith("# Experiments tried\\|twice\n")
    assert "torch 1.2" not in text and "numpy 3.4; 12 jobs, which took 1 h 02 min" in text
    tables = [each(made) for each in experiments_tables()]
    assert all(f"## {table.title}\n" in text for table in tables if table.rows)
    for block in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert "| **dense** |" in text and text.endswith("- a \\| b\n")


def test_the_dated_page_says_by_how_much_settings_are_smaller(tmp_path):
    small = {"joint": {"batch_sequences": 8, "lr": 2e-3, "epochs": 20}, "data": {"source": "files"}}
    (run,) = DENSE.runs
    dense = DENSE.model_copy(update={"runs": (run.model_copy(update={"config": small}),)})
    read, out = tmp_path / "experiment_results.json", tmp_path / "page.md"
    read.write_text(results(dense, *KINDS[1:]).to_json(), "utf-8")
    words = [str(read), "--date", "2026-11-27", "--note", "Of what text.", "--out", str(out)]
    assert page.main(words) == 0
    text = out.read_text("utf-8")
    assert text.startswith("# Experiments at a smaller scale, 2026-11-27\n")
    for row in (
        "| seeds | 3 | 1 |  |",
        "| data.source | installed | files |  |",
        "| joint.batch_sequences | 16 | 8 | 2 |",
        "| joint.lr | 0.0003 | 0.002 | 0.15 |",
    ):
        assert row in text
    assert "joint.epochs" not in text and "Of what text." in text
    assert "\n## Experiments tried" in text and "## The best trial of each kind of model" in text
    read.write_text(results(summed("alone")).to_json(), "utf-8")
    with pytest.raises(SystemExit, match="no trial of these results"):
        page.main(words)
