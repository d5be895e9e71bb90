"""Kills a whole run with SIGKILL, all of its processes at once, at random moments, and compares
what it leaves.

python -m benchmarks.kill --config config/demo_from_zero.yaml --kills 20

The run is done once undisturbed; then again in a new store, killed, and started again by the same
command until the kills, spread over all its jobs, are spent. Every file of every artifact must have
the same sha256, less those that hold seconds. Prints where the kills fell and writes
benchmarks/kill_<cpu>_<date>.md. Fails when one byte differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pipeline.hardware import cores, cpu_name
from pipeline.run.stages import STAGES

TIMED = {"manifest.json", "report.json", "report.html"}
LIMIT_S = 3600  # for one command


def main() -> None:
    """Do both runs and write the table."""
    parser = argparse.ArgumentParser(
        description="Kill a run at random moments and compare the result."
    )
    parser.add_argument("--config", type=Path, default=Path("config/demo_from_zero.yaml"))
    parser.add_argument(
        "--override", action="append", default=["runtime.save_every_s=1"], metavar="A.B=VALUE"
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        finish(start(args, whole))
        seconds = sum(
            json.loads(p.read_text("utf-8"))["made"]["seconds"]
            for p in whole.glob("*/*/manifest.json")
        )
        fell = kill(args, killed, aim(whole, args.kills))
        finish(start(args, killed))
        same, files = compare(whole, killed)
    text = table(args, fell, seconds, same, files)
    print(text)
    cpu = "".join(c for c in cpu_name().lower().split()[-1] if c.isalnum())
    (args.out / f"kill_{cpu}_{time.strftime('%Y-%m-%d')}.md").write_text(text, "utf-8")
    assert not same, f"files that differ: {', '.join(same)}"


def start(args: argparse.Namespace, store: Path) -> subprocess.Popen:
    """Start the command in a session of its own."""
    overrides = [part for item in args.override for part in ("--override", item)]
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "run",
        "--config",
        args.config,
        "--store",
        store,
        *overrides,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> None:
    """Wait for a command that must go well."""
    _, text = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, text


def kill(args: argparse.Namespace, store: Path, aims: list[tuple[str, float]]) -> list[str]:
    """Start, wait for the job aimed at to begin, and kill everything at a random moment of it;
    return where each fell.

    Delays count from when the job began or went on, so that none is spent on imports.
    """
    draw, fell = random.Random(args.seed), []
    for address, seconds in aims:
        process, started_ns = start(args, store), time.time_ns()
        while process.poll() is None and not begun(store, address, started_ns):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, seconds))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            fell.append(under_way(store))
        process.communicate()
    return fell


def aim(whole: Path, kills: int) -> list[tuple[str, float]]:
    """Return (address, seconds) of the jobs to kill in, in the order they are done: every job, then
    round again."""
    manifests = [json.loads(p.read_text("utf-8")) for p in whole.glob("artifacts/*/manifest.json")]
    jobs = sorted(manifests, key=lambda m: (list(STAGES).index(m["stage"]), m["made"]["at"]))
    counts = [kills // len(jobs) + (i < kills % len(jobs)) for i in range(len(jobs))]
    return [
        (m["address"], m["made"]["seconds"])
        for m, n in zip(jobs, counts, strict=True)
        for _ in range(n)
    ]


def begun(store: Path, address: str, since_ns: int) -> bool:
    """Whether a job's folder was made anew since a moment, or is finished."""
    folder = store / "artifacts" / address
    if (folder / "manifest.json").exists():
        return True
    return folder.exists() and folder.stat().st_ctime_ns > since_ns


def under_way(store: Path) -> str:
    """Return the job that a killed run was doing: the one whose artifact has no manifest yet."""
    unfinished = [
        p.name for p in (store / "artifacts").glob("*") if not (p / "manifest.json").exists()
    ]
    return " ".join(sorted(name.rpartition("-")[0] for name in unfinished)) or "between two jobs"


def compare(one: Path, other: Path) -> tuple[list[str], int]:
    """Return the files that are not the same in both stores, and how many were compared."""
    a, b = hashes(one / "artifacts"), hashes(other / "artifacts")
    return sorted(name for name in a | b if a.get(name) != b.get(name)), len(a)


def hashes(root: Path) -> dict[str, str]:
    """Return {artifact/file: sha256} less the files that hold seconds."""
    files = (p for p in root.rglob("*") if p.is_file() and p.name not in TIMED)
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def table(
    args: argparse.Namespace, fell: list[str], seconds: float, differ: list[str], files: int
) -> str:
    """Return the result as Markdown."""
    counts = Counter(fell)
    rows = "\n".join(f"| {job} | {count} |" for job, count in counts.items())
    verdict = (
        f"all {files} files have the same sha256"
        if not differ
        else f"{len(differ)} of {files} files differ"
    )
    where = (
        f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {cores()} cores, {args.config.name} with "
        f"{' '.join(args.override)}"
    )
    head = f"# {len(fell)} kills of one run\n\n{where}; {seconds:.0f} s in jobs undisturbed.\n\n"
    return f"{head}| killed while doing | kills |\n|---|---:|\n{rows}\n\nIn the end {verdict}.\n"


if __name__ == "__main__":
    main()
