"""How the benchmarks measure: contenders in fresh processes that take turns, their memory, medians and ratios.

Invariant: a contender's numbers come from a process that did nothing else, and count from after its imports.
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.budget import Peak, cores, cpu_name

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6


@dataclass(frozen=True)
class Sizes:
    """The network that every contender trains; two-matrix networks get gelu_d_ff, so that parameters are equal."""

    vocab_size: int = 16_384
    context_tokens: int = 512
    d_model: int = 512
    layers: int = 4
    heads: int = 8
    d_ff: int = 1368  # 3 matrices: 8.405 M parameters in 4 layers
    gelu_d_ff: int = 2048  # 2 matrices: 8.389 M
    batch_sequences: int = 16

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_sequences * self.context_tokens


SIZES = {
    "prior-art": Sizes(),
    "toy": Sizes(512, 32, 32, 2, 2, 88, 128, 4),
}


@dataclass(frozen=True)
class Job:
    """What one fresh process does."""

    peer: str  # a module of benchmarks.peers
    task: str  # trunk, expert, router, bundle, open, and prepare before all of them
    sizes: Sizes
    work: str  # folder with the data and parts that `prepare` made
    steps: int = 5
    skip: int = 2  # first steps that no rate counts
    threads: int = 1
    micro: int | None = None  # sequences per forward pass; none: the peer's own choice
    compiled: bool = False
    experts: int = 2
    item: int = 0  # which expert is trained
    domains: int = 2  # in the data that `prepare` makes
    overrides: tuple[str, ...] = ()  # of our configuration
    modularforge: str | None = None  # path of its repository


@dataclass
class Watch:
    """What a contender reports to while it works; made when its imports are done."""

    skip: int = 0
    start_s: float = 0.0
    reading_s: float = 0.0  # spent on reading memory while the clock ran
    ends_s: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    extra: dict = field(default_factory=dict)
    peaks: list = field(default_factory=list)

    def __post_init__(self):
        gc.collect()
        self.before = memory()
        clear_peak()
        self.start_s = time.perf_counter()

    def step(self, nats: float | None = None) -> None:
        """Take note of the end of an optimizer step and of its loss."""
        self.ends_s.append(time.perf_counter())
        if nats is not None:
            self.nats.append(nats)

    def mark(self, name: str) -> None:
        """Keep the peak up to here under a name of its own, and what is mapped while it still is."""
        start_s = time.perf_counter()
        now = memory()
        self.extra[f"{name}_mb"] = (now["VmHWM"] - self.before["VmRSS"]) / MB
        self._keep_mapped(now)
        self.reading_s += time.perf_counter() - start_s

    def clears(self, peak) -> None:
        """Hear of a Peak of the pipeline that may start the same high-water mark again, and remembers what was."""
        self.peaks.append(peak)

    def _keep_mapped(self, now: dict[str, int]) -> None:
        for name, key in (("file_mb", "RssFile"), ("data_mb", "data"), ("data_share_mb", "data_share")):
            self.extra[name] = max(self.extra.get(name, 0.0), (now[key] - self.before[key]) / MB)

    def result(self, step_tokens: int) -> dict:
        """Return seconds, rate over the steps that count, last loss, and memory above imports in MB."""
        seconds = time.perf_counter() - self.start_s - self.reading_s
        after, steps = memory(), self.ends_s
        self._keep_mapped(after)
        out = {"seconds": seconds, "imports_mb": self.before["VmRSS"] / MB} | self.extra
        remembered = [peak.report()["host_peak_mb"] for peak in self.peaks]
        out["peak_mb"] = max((after["VmHWM"] - self.before["VmRSS"]) / MB, *remembered, 0.0)
        if len(steps) > self.skip:
            start = steps[self.skip - 1] if self.skip else self.start_s
            out["step_s"] = (steps[-1] - start) / (len(steps) - self.skip)
            out["tokens_per_s"] = step_tokens / out["step_s"]
            out["first_step_s"] = steps[0] - self.start_s
        return out | {"steps": len(steps), "nats": self.nats[-1] if self.nats else None}


def memory() -> dict[str, int]:
    """Return this process's resident set, its peak, its file pages, and those of mapped data files, in bytes.

    data_share counts a page that n processes map as 1/n; libraries are left out of both, as anyone may map them.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    out = {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0][:-1] in ("VmRSS", "VmHWM", "RssFile")}
    out |= {"data": 0, "data_share": 0}
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # a mapping begins; its path, if any, comes sixth
            path = words[5] if len(words) > 5 else ""
            counts = path.startswith("/") and not re.search(r"\.so(\.|$)|/python[0-9.]*$|/locale/", path)
        elif counts and words[0] in ("Rss:", "Pss:"):
            out["data" if words[0] == "Rss:" else "data_share"] += int(words[1]) * 1024
    return out


class Pages:
    """Peaks of this process above the level at which it was made: whole, anonymous and of mapped files."""

    def __init__(self):
        self.peak, self.before = Peak(), _resident()
        self.most = dict(self.before)
        self._over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look every 20 ms; what is allocated and freed between two looks is missed, but in peak_mb."""
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.most = {key: max(value, self.most[key]) for key, value in _resident().items()}

    def report(self) -> dict[str, float]:
        """Return MB: peaks above the start, and what this process holds now."""
        smaps = Path("/proc/self/smaps_rollup").read_text().splitlines()
        now = {line.split()[0][:-1]: int(line.split()[1]) * 1024 for line in smaps if line.endswith("kB")}
        return {
            "peak_mb": self.peak.report()["host_peak_mb"],
            "anonymous_mb": (self.most["RssAnon"] - self.before["RssAnon"]) / MB,
            "mapped_mb": (self.most["RssFile"] - self.before["RssFile"]) / MB,
            "imports_mb": self.before["VmRSS"] / MB, "rss_mb": now["Rss"] / MB, "pss_mb": now["Pss"] / MB,
            "private_mb": (now["Private_Clean"] + now["Private_Dirty"]) / MB,
        }  # fmt: skip


def _resident() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {w[0][:-1]: int(w[1]) * 1024 for w in lines if w[0][:-1] in ("VmRSS", "RssAnon", "RssFile")}


def clear_peak() -> None:
    """Start the kernel's high-water mark of this process again."""
    Path("/proc/self/clear_refs").write_text("5")


def run(job: Job) -> dict:
    """Do a job in a fresh process; return what it measured, or {"refused": why} when our program declines it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = os.environ | dict.fromkeys(names, str(job.threads)) | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.peers", json.dumps(asdict(job))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise SystemExit(f"{job.peer} failed at {job.task} (exit status {done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


@dataclass(frozen=True)
class Contender:
    """A peer with its settings, as named on the command line: NAME or NAME:MICRO."""

    name: str
    job: Job

    @classmethod
    def of(cls, text: str, base: Job, compiled: Iterable[str] = ("nanogpt-compiled",)) -> "Contender":
        """Return the contender that a name stands for; MICRO is sequences per forward pass."""
        name, _, micro = text.partition(":")
        raw = asdict(base) | {"peer": name.removesuffix("-compiled"), "compiled": name in compiled}
        return cls(text, Job(**raw | {"sizes": base.sizes, "micro": int(micro) if micro else base.micro}))

    def measure(self, **changes) -> dict:
        """Run once with some of the job's fields changed."""
        return run(Job(**vars(self.job) | changes))


def write_files(files: dict[str, dict], folder: Path) -> None:
    """Write what a training exports, as the stages do."""
    from pipeline.store import save_tensors

    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_tensors(folder / name, content)
        else:
            (folder / name).write_text(json.dumps(content), "utf-8")


def say(text: str) -> None:
    """Write a line of progress."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median, and least to most when there are several."""
    median = f"{statistics.median(values):,.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def ratios(rounds: Sequence[dict], top: Callable[[dict], float], bottom: Callable[[dict], float]) -> list[float]:
    """Return top over bottom of each round, so that a slow minute of the machine counts for both."""
    return [top(r) / bottom(r) for r in rounds]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; its first column holds words, the others numbers."""
    rows = list(rows)
    assert all(len(row) == len(head) for row in rows), "a row has not as many cells as the head"
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser with what all of these programs take."""
    made = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--size", choices=SIZES, default="prior-art", help="network to train (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="processor threads of each contender (default: 1)")
    made.add_argument("--rounds", type=int, default=5, help="times that every contender has its turn (default: 5)")
    made.add_argument("--override", action="append", default=[], metavar="A.B=VALUE", help="setting of ours; repeat")
    made.add_argument("--modularforge", type=Path, metavar="PATH", help="its repository; none: it is left out")
    made.add_argument("--work", type=Path, metavar="FOLDER", help="keep the prepared data here for the next time")
    made.add_argument("--out", type=Path, metavar="FILE.md", help="also write the dated result here")
    return made


def job_of(args: argparse.Namespace, work: Path, **more) -> Job:
    """Return the job that the common arguments describe, to be varied by contender and task."""
    path = str(args.modularforge.resolve()) if args.modularforge else None
    common = dict(threads=args.threads, overrides=tuple(args.override), modularforge=path)
    first = dict(peer="ours", task="prepare", sizes=SIZES[args.size], work=str(work.resolve()))
    return Job(**first | common | more)


def finish(
    args: argparse.Namespace, program: str, title: str, text: str, notes: str = "", ending: str | None = None
) -> None:
    """Print a result, and write it with date, command, hardware, versions and conditions when a file was named.

    `ending` stands in place of the conditions of programs that compare the contenders of SIZES.
    """
    print(text)
    if not args.out:
        return
    command = " ".join(["python -m", f"benchmarks.{program}", *_shown(sys.argv[1:])])
    args.out.write_text(
        f"# {title}, {time.strftime('%Y-%m-%d')}\n\n`{command}`\n\n{text}\n{notes}\n{ending or conditions(args)}\n",
        "utf-8",
    )


def conditions(args: argparse.Namespace) -> str:
    """Return the sentence that says on what and with what a result was measured."""
    packages = ("torch", "transformers", "accelerate", "safetensors", "numpy")
    size = ", ".join(f"{k} {v}" for k, v in asdict(SIZES[args.size]).items())
    return (
        f"{hardware(args.threads, packages)}. Sizes: {size}. Each contender ran in a fresh process; memory is the "
        "peak resident set above the level after imports (VmHWM, cleared then), in MB of 10^6 bytes."
    )


def hardware(threads: int, packages: Iterable[str]) -> str:
    """Return machine, load and versions, for a sentence."""
    found = ", ".join(f"{name} {_version(name)}" for name in packages)
    return (
        f"{cpu_name()}, {cores()} of {os.cpu_count()} cores usable, {threads} threads per contender, load "
        f"{os.getloadavg()[0]:.1f} at the end; {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, {found}"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _shown(words: Sequence[str]) -> list[str]:
    """Return arguments without the folders of this machine."""
    return [Path(word).name if "/" in word else word for word in words]
