"""`history`: what its actions print and write of a store."""

import csv
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import small_histories as small
from rich.console import Console
from small_reports import language_report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from benchmarks import history as benchmark
from pipeline.__main__ import main
from pipeline.run.arguments import parser
from pipeline.run.history import listing
from pipeline.run.history.sparks import BLOCKS, spark
from pipeline.run.remove_run import remove_runs
from pipeline.store.artifacts import Store
from pipeline.store.history import numbers, read
from pipeline.store.history_db import FILE, history_db
from pipeline.store.history_schema import SCHEMA

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A filled store that nobody changes."""
    return small.filled(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture
def history(made, capsys):
    """Do an action of `history` on that store; return what it printed."""

    def done(*arguments, store=made[0], code=0):
        assert main(["history", *map(str, arguments), "--store", str(store.root)]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return done


def next_words(printed):
    """Return the action that an output ends with, which finds the store that was looked at."""
    line = printed.splitlines()[-1]
    assert line.startswith("next: python -m pipeline history "), line
    words = shlex.split(line)[4:]
    assert Path(parser().parse_args(words).store).is_dir()
    return words[1 : words.index("--store")]


def test_results_that_cannot_be_read_are_told_by_their_place(tmp_path, capsys):
    """Of several sweeps nobody knew whose they are."""
    Store(tmp_path).open()
    results = tmp_path / "experiments" / "rates" / "experiment_results.json"
    results.parent.mkdir(parents=True)
    for text in ("[", '{"schema_version": 99}'):
        results.write_text(text, "utf-8")
        assert main(["history", "list", "--store", str(tmp_path)]) == 0
        assert "experiments/rates/experiment_results.json" in capsys.readouterr().out


def test_list_has_runs_the_latest_first_and_tells_what_is_torn(history, made):
    printed = history("list")
    first, second = made[1]
    assert printed.index(second) < printed.index(first)
    row = next(line for line in printed.splitlines() if line.startswith("│ first"))
    assert "train_router, step 60 of 80" in row and "bits per byte" in row and "deployed" in row
    torn = small.address("train_router", None, 21)
    assert f"{torn}: its last line is torn" in printed
    stray = small.address("train_dense", "total", 50)
    (alone,) = [line for line in printed.splitlines() if "of no run" in line]
    assert alone.startswith(f"│ {stray}")
    assert stray in history("compare", "first", stray)
    assert "train_nats" in history("show", stray)
    assert next_words(printed) == ["show", second]
    assert "1 of 3 runs" in history("list", "--last", 1)


def test_a_run_is_shown_by_its_name_or_id_and_a_training_by_its_address(history, made):
    run = made[1][0]
    assert history("show", run) == history("show", "first")
    printed = history("show", run)
    assert next_words(printed) == ["show", small.address("train_router", None, 20)]
    expert = small.address("train_experts", "sea", 10)
    assert expert in printed and "█" in printed
    assert f"{small.address('evaluate', None, 30)}, made" in printed
    series = history("show", small.address("train_router", None, 20))
    assert "experts.layer.2.shares.0" in series and "valid_nats" in series
    assert next_words(series)[0] == "export"
    told = history("show", "nothing", code=2)
    assert "is called nothing; the runs in it are second, first" in told
    assert "evaluate, which has no history" in history("show", "first/evaluate", code=2)


def test_few_runs_stand_side_by_side_with_the_settings_they_differ_in(history):
    printed = history("compare", "first", "second")
    assert next_words(printed)[0] == "report"
    lines = printed.splitlines()
    best = next(line for line in lines if "train_experts sea: best valid" in line)
    # the second began a nat lower
    _, _, first, second, _ = (cell.strip() for cell in best.split("│"))
    assert float(first) > float(second)
    (width,) = [line for line in lines if line.startswith("│ width")]
    assert "64" in width and "65" in width
    # what is the same in both
    assert not [line for line in lines if line.startswith("│ family")]


def test_runs_are_ranked_by_the_job_that_tells_them_apart(tmp_path, history):
    store = small.new_store(tmp_path / "store")
    shared = small.address("train_shared", None, 1)
    small.write_history(store, shared, small.rows())
    for number in range(9):
        at = small.address("train_experts", "sea", 100 + number)
        small.write_history(store, at, small.rows(start=9.0 - number))
        small.leave_run(store, f"try{number}", [shared, at])
    printed = history("compare", store=store)
    assert "by the best validation of train_experts sea" in printed
    names = [line.split("-")[0][2:] for line in printed.splitlines() if line.startswith("│ try")]
    assert names == [f"try{number}" for number in reversed(range(9))]
    assert "try3-" in history("compare", "try[34]", "--job", "train_experts sea", store=store)
    told = history("compare", "try*", "--job", "train_all", store=store, code=2)
    assert "none of these runs has trained train_all; they have train_experts sea" in told


def test_a_loss_a_token_ranks_no_runs_of_other_tokens(tmp_path, history):
    store = small.new_store(tmp_path / "store")
    bits = (1.2, 1.1, 1.3)
    for number in range(3):
        at = small.address("train_router", None, number)
        report = small.address("evaluate", None, number)
        small.write_history(store, at, small.rows(start=9.0 - number))
        addresses = [small.address("tokenizer", None, number // 2), at, report]
        small.leave_run(store, f"try{number}", addresses, f"2026-11-27T0{number}:00:00Z")

    def ranked(*names):
        printed = history("compare", *names, "--job", "train_router", store=store)
        lines = [line for line in printed.splitlines() if line.startswith("│ try")]
        return " ".join(printed.split()), [line[5] for line in lines]

    # two of one tokenizer
    told, order = ranked("try0", "try1")
    assert order == ["1", "0"] and "by the best validation of train_router" in told
    told, order = ranked("try*")
    assert order == ["2", "1", "0"] and "not ranked: losses a token do not compare" in told
    assert "not all have bits per byte" in told
    for number, mean in enumerate(bits):
        one = language_report()
        quality = [
            row.model_copy(update={"mean": mean}) if row.is_stack else row for row in one.quality
        ]
        changed = one.model_copy(update={"quality": tuple(quality)})
        small.write_report(store, small.address("evaluate", None, number), changed)
    told, order = ranked("try*")
    assert order == ["1", "0", "2"] and "by bits per byte of what they serve" in told
    beside = history("compare", "try0", "try2", store=store)
    assert "losses a token do not compare, as tokenizers are others; bits per byte" in beside
    assert "do not compare" not in history("compare", "try0", "try1", store=store)


def test_very_many_runs_are_lines_whose_columns_are_aligned(tmp_path, history, monkeypatch):
    monkeypatch.setattr(listing, "MOST_IN_TABLE", 8)
    store = small.new_store(tmp_path / "store")
    for number in range(9, 21):
        small.leave_run(store, f"run{number}", ["train_router-0123456789ab"])
    lines = history("list", "--last", 0, store=store).splitlines()
    runs = [line for line in lines if line.startswith("run") and "ffn_moe" in line]
    assert len(runs) == 12
    assert len({line.index("ffn_moe") for line in runs}) == 1


def test_csv_and_json_lines_have_every_row_and_number(history, made, tmp_path):
    store = made[0]
    for name in ("csv", "jsonl"):
        assert "rows of 6 trainings" in history(
            "export", "--format", name, "--to", tmp_path / f"all.{name}"
        )
    with (tmp_path / "all.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    wanted = 0
    for path in sorted(store.root.glob("history/*.jsonl")):
        found = read(path).rows
        wanted += len(found)
        of_csv = [row for row in table if row["address"] == path.stem]
        of_lines = [line for line in lines if line["address"] == path.stem]
        for row, cells, line in zip(found, of_csv, of_lines, strict=True):
            flat = dict(numbers(row, "."))
            assert {key: float(cells[key]) for key in flat} == flat
            assert {key: line[key] for key in row} == row
    assert len(table) == len(lines) == wanted
    shared = next(row for row in table if row["stage"] == "train_shared")
    assert set(shared["runs"].split()) == set(made[1])
    assert "there is a" in history("export", "--format", "csv", "--to", tmp_path, code=2)


def test_tensorboard_reads_the_numbers_of_its_events_back(history, made, tmp_path):
    to = tmp_path / "events"
    router = small.address("train_router", None, 20)
    history("export", router, "--format", "tensorboard", "--to", to)
    events = EventAccumulator(str(to / router)).Reload()
    found = read(made[0].history(router)).rows
    for key in ("train_nats", "experts/layer/2/shares/1"):
        wanted = [(row["step"], dict(numbers(row, "/"))) for row in found]
        wanted = [(step, row[key]) for step, row in wanted if key in row]
        told = []
        for event in events.Tensors(key):
            told.append((event.step, tensor_util.make_ndarray(event.tensor_proto).item()))
        assert told == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    assert {"step", "time"}.isdisjoint(events.Tags()["tensors"])


def test_what_is_removed_is_in_no_table_any_more_nor_in_the_file(made, history, tmp_path):
    shutil.copytree(made[0].root, tmp_path / "store")
    store = small.new_store(tmp_path / "store")
    history("list", store=store)
    gone = small.address("train_experts", "sea", 11)
    assert gone.encode() in (store.root / FILE).read_bytes()
    remove_runs(["second"], {}, store, Console(file=io.StringIO()), remove=True)
    assert not store.history(gone).exists()
    assert gone.encode() not in (store.root / FILE).read_bytes()
    with history_db(store) as index:
        assert index.execute("SELECT name FROM runs").fetchall() == [("first",)]
    trunk = small.address("train_shared", None, 1)
    assert store.history(trunk).exists()


@pytest.mark.parametrize("action", ["report", "csv", "jsonl", "tensorboard"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, history, action):
    (tmp_path / "file").touch()
    words = ["report"] if action == "report" else ["export", "--format", action]
    to = tmp_path / "file" / "rows"
    kind = "folder" if action == "tensorboard" else "file"
    told = history(*words, "--to", to, code=2)
    assert f"error: --to: {to} cannot be written" in told and f"name a {kind} that" in told
    told = history(*words, "--to", tmp_path, code=2)
    assert f"error: --to: {tmp_path} is a folder" in told or f"there is a {tmp_path}" in told
    assert [each.name for each in tmp_path.parent.glob("*.part")] == []


@pytest.mark.parametrize("words", [["prune"], ["rm", "mine"], ["runs"], ["metrics"]], ids=" ".join)
def test_a_file_is_no_store(tmp_path, words, capsys):
    (tmp_path / "file").touch()
    for store in ("file", "file/store"):
        assert main([*words, "--store", str(tmp_path / store)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and str(tmp_path / store) in told


def test_a_store_without_any_run_says_so(tmp_path, history):
    empty = small.new_store(tmp_path / "empty")
    assert "no run has left anything here yet" in history("list", store=empty)
    told = main(["history", "list", "--store", str(tmp_path / "none")])
    assert told == 2


def test_the_question_in_the_documents_is_answered(made):
    text = (ROOT / "docs/history.md").read_text("utf-8")
    (question,) = re.findall(r'sqlite3 store/history.db "(.+?)"', text, re.DOTALL)
    with history_db(made[0]) as index:
        found = index.execute(question).fetchall()
        columns = {}
        for name in re.findall(r"CREATE TABLE (\w+)", SCHEMA):
            columns[name] = [row[1] for row in index.execute(f"PRAGMA table_info({name})")]
    lows = [low for _, _, low, _ in found]
    assert len(found) == 6 and lows == sorted(lows)
    # and each table stands there with its columns
    for name, told in columns.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        assert re.findall(r"`(\w+)`", line)[1:] == told


def test_a_spark_runs_from_the_lowest_to_the_highest():
    assert spark([]) == ""
    assert spark([1.0, 1.0]) == BLOCKS[0] * 2
    assert spark([0.0, 7.0, 3.5]) == BLOCKS[0] + BLOCKS[-1] + BLOCKS[4]
    assert spark(list(range(1000)), width=8) == BLOCKS


def test_the_benchmark_lists_and_compares_what_it_has_made(tmp_path, monkeypatch, capsys):
    printed = []

    def timed(command):
        # the same commands, without a process each
        if command[: len(benchmark.PIPELINE)] == benchmark.PIPELINE:
            assert main(command[len(benchmark.PIPELINE) - 1 :]) == 0
            printed.append(capsys.readouterr().out)
        return benchmark.Taken(1.5, 0.5)

    def said(command):
        timed(command)
        return printed.pop()

    monkeypatch.setattr(benchmark, "said", said)
    monkeypatch.setattr(benchmark, "timed", timed)
    options = ["--runs", "7", "--rows", "120", "--rounds", "1", "--work", str(tmp_path)]
    assert benchmark.main([*options, "--out", str(tmp_path / "out.md")]) == 0
    _, listed, ranked, beside, once_more = printed
    assert all(f"run0000{number}" in listed for number in range(7))
    assert "runs by the best validation of train_router" in ranked
    assert "settings that differ" in beside and "section0.other" in beside
    # a new row is seen
    assert "10,001" in once_more and "10,001" not in listed
    text = (tmp_path / "out.md").read_text()
    assert all(words in text for words in benchmark.WORDS.values())
    assert "7 runs of 120 rows" in text and not (tmp_path / "store").exists()
    assert "removed and made again, has the same" in text
    made_again = iter(({"runs": ["1"]}, {"runs": ["2"]}))
    monkeypatch.setattr(benchmark, "_rows_by_table", lambda _: next(made_again))
    with pytest.raises(SystemExit, match="made again is another"):
        benchmark.main(options)


@pytest.fixture
def tried(tmp_path):
    """A store with two experiments of two trials each, whose runs have histories."""
    store = small.new_store(tmp_path / "store")
    for number, name in enumerate(("small", "real")):
        losses = {}
        for trial, item in (("base", "dense"), ("mixed", "moe")):
            at = small.address("train_joint", item, 10 * number + len(losses))
            small.write_history(store, at, small.rows(start=4.0 - number))
            small.leave_run(store, f"{name}.{trial}", [at])
            losses[trial] = (3.5 - number - len(losses) / 10, 1.5 + len(losses), at)
        small.leave_experiments(store, name, losses)
    # a run that shares what a trial made, and is none
    small.leave_run(store, "other", [small.address("train_joint", "moe", 11)])
    return store


def test_experiments_are_entries_of_the_list_and_their_runs_say_whose_they_are(history, tried):
    printed = history("list", store=tried)
    table = printed[printed.index("experiments, the latest first") :]
    (row,) = (line for line in table.splitlines() if line.startswith("│ real"))
    for cell in ("2 of 2", "2.5000", "2.4000 mixed", "1.5000 base", "1 of 1"):
        assert cell in row
    rows = {line.split()[1]: line for line in printed.splitlines() if line.startswith("│")}
    of = {name.rpartition("-")[0]: line for name, line in rows.items()}
    assert "trial of small, seed 0" in of["small.base"]
    assert "trial of real, seed 0" in of["real.mixed"]
    assert "trial of" not in of["other"]


def test_experiments_are_shown_compared_drawn_and_exported_by_their_name(history, tried, tmp_path):
    shown = history("show", "real", store=tried)
    assert "Losses and sizes of every trial" in shown and "report.html" in shown
    assert next_words(shown) == ["compare", "real"]
    printed = history("compare", "small", "real", store=tried)
    assert next_words(printed) == ["report", "small", "real"]
    (row,) = (line for line in printed.splitlines() if line.startswith("│ mixed"))
    cells = [cell.strip() for cell in row.split("│")[2:-1]]
    assert cells == ["3.4000 ★", "2.5000", "0 of 1", "2.4000 ★", "2.5000", "1 of 1"]
    # Where one of their trainings is named, their runs are ranked by it
    ranked = history("compare", "small", "--job", "train_joint moe", store=tried)
    assert "by the best validation of train_joint moe" in ranked and "real." not in ranked
    file = tmp_path / "rows.jsonl"
    history("export", "small", "--format", "jsonl", "--to", file, store=tried)
    assert {json.loads(line)["address"] for line in file.read_text().splitlines()} == {
        small.address("train_joint", item, number) for number, item in enumerate(("dense", "moe"))
    }
    page = tmp_path / "page.html"
    history("report", "small", "--to", page, "--no-png", store=tried)
    text = page.read_text("utf-8")
    assert "Trials of small" in text and "Trials of real" not in text


def test_a_run_that_is_called_as_experiments_are_is_told(history, tried, tmp_path):
    run = small.leave_run(tried, "real", [small.address("train_joint", "moe", 11)])
    told = f"real is taken for the experiments; {run} is the run of that name"
    page = tmp_path / "page.html"
    for words in (["show"], ["compare"], ["report", "--no-png", "--to", page]):
        assert told in history(*words, "real", store=tried)
        assert "taken for" not in history(*words, "small", store=tried)
    assert "taken for" not in history("list", store=tried)
    shown = history("show", run, store=tried)
    assert f"{run}, ffn_moe" in shown and "taken for" not in shown


def test_losses_of_other_tokens_are_not_the_lowest(history, tmp_path):
    store = small.new_store(tmp_path / "store")
    losses = {"base": (3.0, 2.0, "a"), "given": (2.0, 1.9, "b")}
    small.leave_experiments(store, "tried", losses, tokens={"given": "others"})
    printed = history("compare", "tried", store=store)
    assert "3.0000 ★" in printed and "2.0000 ★" not in printed and "1.9000 ★" in printed
    assert "losses a token compare where tokens are the same" in printed
