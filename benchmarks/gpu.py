"""Everything that a GPU has to show, in one run of under 8 minutes on one card of 80 GB.

python -m benchmarks.gpu --out benchmarks

Each section has a process and a time limit of its own, so that one that fails stops no other, and
what it found is in the dated Markdown and JSON as soon as it is there. `--device cpu --small` runs
all of it with tiny shapes in about two minutes, to try the program itself.

A fresh machine needs PyTorch with CUDA, transformers, accelerate and the packages that
`--wheels FOLDER` names: it prints how to bring them to a machine that reaches no registry.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.gpu_parts import SECTIONS, Row, Section, Setup
from benchmarks.gpu_parts.aims import verdicts
from benchmarks.gpu_parts.wheels import how_to_bring
from benchmarks.measuring import ROOT, add_device, device_here, progress, spread, table

BUDGET_S = 470.0
# Times the limits on a processor, where nothing is measured but that it works
SLOWER = 5
LEAST_S = 5.0  # a section that has less is not begun
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


@dataclass
class Found:
    """What a section has found so far."""

    name: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    ended: str = "not begun"

    @property
    def section(self) -> Section:
        """Title, place and limits, by which it was started."""
        return SECTIONS[self.name]


@dataclass
class Results:
    """All sections, written anew whenever one has found something."""

    args: argparse.Namespace
    command: str
    found: list[Found] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, found: Found, row: Row) -> None:
        """Keep a row and write it."""
        with self.lock:
            found.rows.append(row)
            progress(f"{found.name}: {_told(row)}")
        self.write()

    def write(self) -> None:
        """Write both files, where a folder was named."""
        if self.args.out is None:
            return
        with self.lock:
            content = [asdict(each) for each in self.found]
            stem = f"gpu_{self.args.card}_{time.strftime('%Y-%m-%d')}"
            (self.args.out / f"{stem}.json").write_text(json.dumps(content, indent=1), "utf-8")
            (self.args.out / f"{stem}.md").write_text(self.markdown(), "utf-8")

    def markdown(self) -> str:
        """Return everything for people."""
        parts = [f"# One GPU, {time.strftime('%Y-%m-%d')}\n", f"`{self.command}`\n"]
        parts.append(f"{self.args.machine}. MFU is of {self.args.peak}.\n")
        for each in self.found:
            parts.append(f"## {each.section.title}\n")
            if each.rows:
                parts.append(_table(each.rows))
            if self.args.device == "cuda":
                parts += [f"- {line}" for line in _verdicts(each)]
            ended = f"{each.ended[0].upper()}{each.ended[1:]}, {each.seconds:.0f} s."
            said = f"{each.section.notes} {ended}"
            parts.append(f"\n{said.strip()}\n")
        return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Run the sections and return the exit status: 1 when one of them failed."""
    args = _arguments(argv)
    if args.wheels:
        print(how_to_bring(args.wheels))
        return 0
    # Asked in a process of its own: a GPU that this one had opened would be short of its memory
    args.machine, args.peak, args.card = _machine(args.device)
    results = Results(args, " ".join(["python -m benchmarks.gpu", *(argv or sys.argv[1:])]))
    budget_s = args.budget if args.device == "cuda" else SLOWER * args.budget
    end_s = time.time() + budget_s
    with tempfile.TemporaryDirectory() as work:
        together = []
        for name in args.sections:
            found = Found(name)
            results.found.append(found)
            given = (found, results, Path(work), end_s)
            thread = threading.Thread(target=_run, args=given)
            if found.section.beside:
                together.append(thread)
                continue
            thread.start()
            thread.join()
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
    results.write()
    print(results.markdown())
    return int(any(each.ended != "finished" for each in results.found))


def _run(found: Found, results: Results, work: Path, end_s: float) -> None:
    """Run a section to its end, or to that of its time."""
    start_s = time.time()
    times = 1 if results.args.device == "cuda" else SLOWER
    limit_s = min(times * found.section.seconds, end_s - start_s)
    if limit_s < LEAST_S:
        found.ended = "left out, as no time was left"
        return
    args = results.args
    # Some of it for the section itself to stop in, with what it has
    setup = Setup(
        args.device, args.small, args.rounds, str(work / found.name), start_s + 0.9 * limit_s
    )
    progress(f"{found.name}: begins, at most {limit_s:.0f} s")
    command = [sys.executable, "-m", "benchmarks.gpu_parts", found.section.place]
    errors = work / f"{found.name}.log"
    with errors.open("w") as log:
        process = subprocess.Popen(
            [*command, json.dumps(asdict(setup))],
            cwd=ROOT,
            env=_environment(args.device),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        # It, and whatever it has started
        timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        with process:
            for line in process.stdout:
                if line.startswith("{"):
                    results.add(found, json.loads(line))
        timer.cancel()
    status = process.returncode
    found.seconds = time.time() - start_s
    found.ended = "finished"
    if status == -signal.SIGKILL:
        found.ended = f"ended after {limit_s:.0f} s, its limit"
    elif status:
        said = errors.read_text("utf-8", "replace").strip().splitlines()
        found.ended = f"failed: {said[-1] if said else f'exit status {status}'}"
        progress("\n".join(said[-15:]))
    progress(f"{found.name}: {found.ended}, {found.seconds:.0f} s")
    results.write()


def _environment(device: str) -> dict[str, str]:
    """Return the variables that sections start with: one GPU, or none."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # One thread each: on a processor the sections that run together have to share it
    threads = {} if device == "cuda" else {"OMP_NUM_THREADS": "1"}
    return (
        os.environ
        | threads
        | {
            "CUDA_VISIBLE_DEVICES": seen if device == "cuda" else "",
            "PYTHONPATH": path,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
    )


def _machine(device: str) -> tuple[str, str, str]:
    """Return the machine and the rate that MFU is of, for people, and the card for a file's
    name."""
    code = (
        "import json, torch\n"
        "from benchmarks.gpu_parts.peak import words\n"
        "from benchmarks.measuring import hardware\n"
        "from pipeline.hardware import cpu_name, gpu_name\n"
        f"told = hardware(torch.get_num_threads(), {PACKAGES!r}, {device == 'cuda'})\n"
        f"print(json.dumps([told, words({device!r}), gpu_name() or cpu_name()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=_environment(device),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    machine, peak, name = json.loads(done.stdout.splitlines()[-1])
    words = name.lower().replace("nvidia", "").replace("amd", "").split()
    card = "".join(letter for letter in words[0] if letter.isalnum())
    return machine, peak, card


def merged(rows: Iterable[Row]) -> list[dict[str, list]]:
    """Return rows of the same name as one, with the values of all rounds."""
    out: dict[str, dict[str, list]] = {}
    for row in rows:
        one = out.setdefault(str(row["what"]), {})
        for key, value in row.items():
            one.setdefault(key, []).append(value)
    return list(out.values())


def _table(rows: list[Row]) -> str:
    together = merged(rows)
    head = list(dict.fromkeys(key for one in together for key in one))
    return table(head, [[_cell(one.get(key, [])) for key in head] for one in together])


def _cell(values: list) -> str:
    """Return the values of all rounds for people."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers:
        return str(values[-1]) if values else ""
    most = max(abs(number) for number in numbers)
    return spread(numbers, 0 if most >= 100 else 2 if most >= 1 else 3)


def _verdicts(found: Found) -> list[str]:
    """Return what the aims of a section came to, by the medians."""
    module, _, _ = found.section.place.partition(".")
    if module != "training":
        return []
    medians = []
    for one in merged(found.rows):
        row: Row = {}
        for key, values in one.items():
            numeric = all(isinstance(value, int | float) for value in values)
            row[key] = statistics.median(values) if numeric else values[-1]
        medians.append(row)
    return list(verdicts(medians))


def _told(row: Row) -> str:
    parts = []
    for key, value in row.items():
        parts.append(value if key == "what" else f"{key} {_cell([value])}")
    return ", ".join(map(str, parts))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="To try the program: --device cpu --small",
    )
    add_device(made)
    made.add_argument("--small", action="store_true", help="tiny shapes, to try the program")
    made.add_argument("--rounds", type=int, default=2, help="turns of each (default: 2)")
    made.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="(default: all of them)",
    )
    made.add_argument(
        "--budget", type=float, default=BUDGET_S, help="seconds for all (default: %(default)s)"
    )
    made.add_argument(
        "--out", type=Path, metavar="FOLDER", help="also write dated Markdown and JSON here"
    )
    made.add_argument(
        "--wheels", metavar="FOLDER", help="print how packages are brought in this folder"
    )
    made.set_defaults(device="cuda")
    args = made.parse_args(argv)
    if args.device == "cuda" and not args.wheels:
        try:
            device_here("cuda")
        except argparse.ArgumentTypeError as error:
            made.error(f"{error}; --device cpu --small tries the program without one")
    if args.out and not args.out.is_dir():
        made.error(f"--out: there is no folder {args.out}")
    return args


if __name__ == "__main__":
    sys.exit(main())
