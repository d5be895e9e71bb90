"""Measures how long `history list` and `history compare` take over very many runs, beside reading
all of their rows.

python -m benchmarks.history --out benchmarks/history_epyc_2026-11-27.md

The store is made up: a root, a training's manifest and a history for each run. Contenders take
turns, each in a fresh process, timed from its start to its end: what somebody waits who types it.
At the end a line is torn, and the tables are made again from nothing. Needs about a gigabyte on
disk.
"""

import argparse
import json
import random
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import ROOT, finish, hardware, progress, spread, table
from pipeline.store.artifacts import Store
from pipeline.store.history_db import FILE, SUM
from pipeline.store.manifest import Manifest
from pipeline.store.reading import sealed
from pipeline.store.roots import VERSION

# In a process of its own: what any listing costs that has no tables to look into
READ = """
import json, sys
from pathlib import Path
rows = 0
for path in sorted(Path(sys.argv[1]).glob("history/*.jsonl")):
    low = float("inf")
    for line in path.read_bytes().splitlines():
        row = json.loads(line)
        low = min(low, row.get("valid_nats", low))
        rows += 1
print(rows)
"""
PIPELINE = [sys.executable, "-m", "pipeline", "history"]
SHORT = [sys.executable, "-c", "import pipeline.__main__"]
WORDS = {
    "list": "`history list --last 0`: all runs, nothing has changed",
    "list, one new row": "the same after one history has a new row",
    "compare": "`history compare`: all runs, ranked by their training's best validation",
    "compare, six": "`history compare` of six runs side by side, with settings that differ",
    "imports": "importing the command line, which is in all of the above",
    "read": "reading every row with json, keeping each run's best validation",
}
NOTES = """Seconds are from the start of a command to its end, on the machine as it was; processor
seconds are those of the command alone, which what else runs there moves little. Ratios are those of
each round.
"""
VALID_EVERY = 50
SETTINGS = 60  # made-up settings of a run, so that a root is as large as one is


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _arguments(argv)
    folder = nullcontext(str(args.work)) if args.work else tempfile.TemporaryDirectory()
    with folder as work:
        root = Path(work) / "store"
        try:
            if not args.reuse:
                made(root, args.runs, args.rows)
            written_mb = sum(path.stat().st_size for path in root.glob("history/*.jsonl")) / 1e6
            folded = "It was folded by an earlier call" if args.reuse else first_time(root)
            index_mb = (root / FILE).stat().st_size / 1e6
            rounds = [measure(root, args.runs, number) for number in range(1, args.rounds + 1)]
            found = checked(root, args.runs)
        finally:
            if not args.keep:
                shutil.rmtree(root, ignore_errors=True)
    size = (
        f"{args.runs:,} runs of {args.rows:,} rows, {written_mb:,.0f} MB of histories; "
        f"{args.rounds} rounds. {folded}; history.db has {index_mb:.1f} MB."
    )
    text = f"{size}\n\n{_table(rounds)}\n{found}\n"
    ending = f"{hardware(1, ('rich', 'pydantic'))}, SQLite {sqlite3.sqlite_version}."
    finish(args, "history", "Listing and comparing runs", text, NOTES, ending)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--runs", type=int, default=10_000, help="(default: 10000)")
    made.add_argument("--rows", type=int, default=1_000, help="of each history (default: 1000)")
    made.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    made.add_argument("--work", type=Path, metavar="FOLDER", help="disk to measure on")
    made.add_argument("--keep", action="store_true", help="leave the store where it is")
    made.add_argument(
        "--reuse", action="store_true", help="measure the store that a call with --keep has left"
    )
    made.add_argument("--out", type=Path, metavar="FILE.md", help="also write the result here")
    return made.parse_args(argv)


def made(root: Path, runs: int, rows: int) -> None:
    """Make a store."""
    store = Store(root).open()
    for name in ("history", "artifacts", "roots"):
        (root / name).mkdir()
    draw = random.Random(0)
    for number in range(runs):
        if number % 1_000 == 0:
            progress(f"writing run {number + 1:,} of {runs:,}")
        address = f"train_router-{number:012x}"
        text = _history(rows, draw)
        store.history(address).write_text(text, "utf-8")
        _artifact(store, address, rows)
        _root(store, number, address)


def _history(rows: int, draw: random.Random) -> str:
    lines = [json.dumps({"start": 0, "every": 1, "steps": rows})]
    nats = 5.0
    for step in range(1, rows + 1):
        nats = 0.998 * nats + 0.004 + draw.gauss(0, 0.002)
        places = {"step": step, "tokens": step * 4096, "time": 1_795_000_000 + step}
        row = places | {"train_nats": round(nats, 4), "lr": 3e-4}
        lines.append(json.dumps(row, separators=(",", ":")))
        if step % VALID_EVERY == 0:
            row = places | {"valid_nats": round(nats + 0.1, 4)}
            lines.append(json.dumps(row, separators=(",", ":")))
    return "\n".join(lines) + "\n"


def _artifact(store: Store, address: str, rows: int) -> None:
    metrics = {"steps": rows, "tokens": rows * 4096, "valid_nats": 2.5, "tokens_per_s": 900.0}
    machine = {"cpu": "a processor", "gpu": None}
    done = {"at": "2026-11-27T08:00:00Z", "seconds": 61.5, "machine": machine}
    manifest = Manifest(address, "train_router", None, {}, {}, metrics, done)
    store.folder(address).mkdir()
    # without a flush each, which would be most of the time
    (store.folder(address) / "manifest.json").write_text(manifest.text(), "utf-8")


def _root(store: Store, number: int, address: str) -> None:
    settings = {f"section{i}": {"setting": i, "other": number % 7} for i in range(SETTINGS)}
    root = {
        "name": f"run{number:05}",
        "family": "ffn_moe",
        "at": f"2026-11-27T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}Z",
        "file": f"config/run{number:05}.yaml",
        "overrides": [f"router.lr={number % 7}e-4"],
        "addresses": [address, f"train_router-f{number:011x}"],
        "settings": settings,
        "removed": False,
    }
    text = sealed({"version": VERSION} | root, indent=1)
    (store.root / "roots" / f"run{number:05}-{number:012x}.json").write_text(text, "utf-8")


def first_time(root: Path) -> str:
    """Return in words how long the first list takes."""
    progress("folding all of it")
    for name in (FILE, SUM):
        (root / name).unlink(missing_ok=True)
    taken = timed([*PIPELINE, "list", "--last", "0", "--store", str(root)])
    return (
        f"The first `history list` folded all of it in {taken.wall_s:.1f} s "
        f"({taken.cpu_s:.1f} processor seconds)"
    )


def measure(root: Path, runs: int, number: int) -> "dict[str, Taken]":
    """Return what each contender took in one round."""
    progress(f"round {number}")
    store = ["--store", str(root)]
    six = [f"run{each * (runs // 6):05}" for each in range(6)]
    listed = [*PIPELINE, "list", "--last", "0", *store]
    found = {
        "imports": timed(SHORT),
        "list": timed(listed),
        "compare": timed([*PIPELINE, "compare", *store]),
        "compare, six": timed([*PIPELINE, "compare", *six, *store]),
    }
    row = {"step": 10_000 + number, "tokens": 1, "valid_nats": 3.0, "time": 1_795_100_000}
    with (root / "history" / f"train_router-{0:012x}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    found["list, one new row"] = timed(listed)
    found["read"] = timed([sys.executable, "-c", READ, str(root)])
    return found


def checked(root: Path, runs: int) -> str:
    """Return in words that a torn line is told beside all runs, and that tables which are made
    again are those that were brought up to date. Raises SystemExit where it is not so."""
    torn = f"train_router-{runs - 1:012x}"
    with (root / "history" / f"{torn}.jsonl").open("a") as file:
        file.write('{"step":9')
    listed = [*PIPELINE, "list", "--last", "0", "--store", str(root)]
    told = said(listed)
    if not re.search(f"{torn}: .*its last line is torn", told):
        raise SystemExit("a torn last line was not told")
    absent = [number for number in range(runs) if f"run{number:05}" not in told]
    if absent:
        raise SystemExit(f"{len(absent)} runs are not in the list beside a torn line")
    before = _rows_by_table(root)
    for name in (FILE, SUM):
        (root / name).unlink()
    progress("folding all of it once more")
    said(listed)
    if _rows_by_table(root) != before:
        raise SystemExit("history.db that was made again is another")
    rows = sum(len(each) for each in before.values())
    return (
        "A history whose last line was torn after that is told by name, and all runs are in the "
        f"list. history.db, removed and made again, has the same {rows:,} rows in {len(before)} "
        "tables as the one that was brought up to date row by row."
    )


def _rows_by_table(root: Path) -> dict[str, list[str]]:
    found = {}
    with closing(sqlite3.connect(root / FILE)) as index:
        names = index.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            rows = index.execute(f"SELECT * FROM {name}")  # noqa: S608 a name of the file's own
            found[name] = sorted(map(repr, rows))
    return found


def said(command: list[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout


@dataclass(frozen=True)
class Taken:
    """What a command took."""

    wall_s: float
    cpu_s: float


def timed(command: list[str]) -> Taken:
    """Return what a command took from its start to its end."""
    before = _spent()
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return Taken(time.perf_counter() - start, _spent() - before)


def _spent() -> float:
    """Return the processor seconds of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _table(rounds: list[dict[str, Taken]]) -> str:
    rows = []
    for name, words in WORDS.items():
        taken = [each[name] for each in rounds]
        shares = [each[name].cpu_s / each["read"].cpu_s for each in rounds]
        wall = spread([each.wall_s for each in taken], 2)
        cpu = spread([each.cpu_s for each in taken], 2)
        rows.append([words, wall, cpu, spread(shares, 3)])
    return table(["contender", "seconds", "processor seconds", "times reading all"], rows)


if __name__ == "__main__":
    sys.exit(main())
