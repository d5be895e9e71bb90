"""How the benchmarks measure: contenders in fresh processes that take turns, medians and ratios.

Invariant: a contender's numbers come from a process that did nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.hardware import cores, cpu_name
from pipeline.hardware import device as found_device
from pipeline.train.flops import Shape

# Tasks of contenders that train a few numbers beside frozen weights
FORMS = ("low_rank", "adapter")
RANK = 64  # of both
ROOT = Path(__file__).resolve().parent.parent
MB = 1e6


@dataclass(frozen=True)
class Sizes:
    """The network that every contender trains; two-matrix networks get gelu_d_ff, so that
    parameters are equal."""

    vocab_size: int = 16_384
    context_tokens: int = 512
    d_model: int = 512
    layers: int = 4
    heads: int = 8
    d_ff: int = 1368  # 3 matrices: 8.405 M parameters in 4 layers
    gelu_d_ff: int = 2048  # 2 matrices: 8.389 M
    batch_sequences: int = 16
    kv_heads: int | None = None  # none: as many as heads; peers know no other

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_sequences * self.context_tokens

    def flops_per_token(self, task: str) -> float:
        """Operations that a training needs per token, the same for every contender.

        Low-rank experts and adapters: none for the gradients of what is frozen, and their own
        products, a few percent, are left out.
        """
        width = self.d_model  # of all heads together, for keys and values too
        shape = Shape(
            self.layers, width, width, width, self.d_ff, self.vocab_size, self.context_tokens
        )
        if task in FORMS:
            return 2 * shape.forward_flops_per_token()
        return shape.train_flops_per_token({"trunk": "all", "expert": "ffn"}[task])


SIZES = {
    "prior-art": Sizes(),
    "toy": Sizes(512, 32, 32, 2, 2, 88, 128, 4),
    "100m": Sizes(32_768, 1024, 768, 12, 12, 2048, 3072, 32),  # 110 M parameters
    "350m": Sizes(32_768, 1024, 1024, 24, 16, 2816, 4224, 32),  # 342 M
    "1b": Sizes(32_768, 1024, 2048, 18, 16, 5632, 8448, 16),  # 992 M
}


@dataclass(frozen=True)
class Job:
    """What one fresh process does."""

    peer: str  # a module of benchmarks.peers
    # trunk, expert, low_rank, adapter, router, bundle, open; prepare before all of them; product:
    # the machine's own rate
    task: str
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
    device: str = "cpu"  # or cuda: the first GPU
    pinned: bool = False  # on a random model in a folder; else on a trunk of ours


def run(job: Job) -> dict:
    """Do a job in a fresh process; return what it measured, or {"refused": why} when our program
    declines it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = os.environ | dict.fromkeys(names, str(job.threads)) | {"TOKENIZERS_PARALLELISM": "false"}
    gpu = env.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    env["CUDA_VISIBLE_DEVICES"] = (
        gpu if job.device == "cuda" else ""
    )  # ours and Trainer take any that they see
    command = [sys.executable, "-m", "benchmarks.peers", json.dumps(asdict(job))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise SystemExit(
            f"{job.peer} failed at {job.task} (exit status "
            f"{done.returncode}):\n{done.stderr[-3000:]}"
        )
    return json.loads(lines[-1])


@dataclass(frozen=True)
class Contender:
    """A peer with its settings, as named on the command line: NAME or NAME:MICRO."""

    name: str
    job: Job

    @classmethod
    def of(
        cls, text: str, base: Job, compiled: Iterable[str] = ("nanogpt-compiled",)
    ) -> "Contender":
        """Return the contender that a name stands for; MICRO is sequences per forward pass."""
        name, _, micro = text.partition(":")
        raw = asdict(base) | {"peer": name.removesuffix("-compiled"), "compiled": name in compiled}
        return cls(
            text, Job(**raw | {"sizes": base.sizes, "micro": int(micro) if micro else base.micro})
        )

    def measure(self, **changes) -> dict:
        """Run once with some of the job's fields changed."""
        return run(Job(**vars(self.job) | changes))


def write_files(files: dict[str, dict], folder: Path) -> None:
    """Write what a training exports, as the stages do."""
    from pipeline.store.artifacts import save_tensors

    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_tensors(folder / name, content)
        else:
            (folder / name).write_text(json.dumps(content), "utf-8")


def progress(text: str) -> None:
    """Write a line of progress."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median, and least to most when there are several."""
    median = f"{statistics.median(values):,.{digits}f}"
    return (
        median
        if len(values) == 1
        else f"{median} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"
    )


def percentiles(values: Sequence[float], times: float = 1.0, digits: int = 0) -> str:
    """Return the median and the 95th percentile, in a unit of which one holds so many."""
    if len(values) < 2:
        return "-"
    cuts = statistics.quantiles(values, n=20)
    return f"{times * cuts[9]:.{digits}f} / {times * cuts[18]:.{digits}f}"


def ratios(
    rounds: Sequence[dict], top: Callable[[dict], float], bottom: Callable[[dict], float]
) -> list[float]:
    """Return top over bottom of each round, so that a slow minute counts for both."""
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
    made.add_argument(
        "--size", choices=SIZES, default="prior-art", help="network to train (default: %(default)s)"
    )
    made.add_argument(
        "--threads", type=int, default=1, help="processor threads of each contender (default: 1)"
    )
    made.add_argument(
        "--rounds", type=int, default=5, help="times that every contender has its turn (default: 5)"
    )
    made.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="setting of ours; repeat",
    )
    made.add_argument(
        "--modularforge", type=Path, metavar="PATH", help="its repository; none: it is left out"
    )
    made.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep the prepared data here for the next time"
    )
    made.add_argument(
        "--out", type=Path, metavar="FILE.md", help="also write the dated result here"
    )
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    """Let a program's contenders run on a GPU."""
    made.add_argument(
        "--device",
        type=device_here,
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to train (default: %(default)s)",
    )


def device_here(name: str) -> str:
    """Return the name of a device that is here. Raises argparse.ArgumentTypeError for a GPU that is
    not."""
    if name == "cuda" and found_device() != "cuda":
        raise argparse.ArgumentTypeError(
            f"cuda needs a GPU that PyTorch sees; torch {_version('torch')} sees none"
        )
    return name


def job_of(args: argparse.Namespace, work: Path, **more) -> Job:
    """Return the job that the common arguments describe, to be varied by contender and task."""
    path = str(args.modularforge.resolve()) if args.modularforge else None
    common = dict(threads=args.threads, overrides=tuple(args.override), modularforge=path)
    common["device"] = getattr(args, "device", "cpu")  # not every program has the choice
    first = dict(peer="ours", task="prepare", sizes=SIZES[args.size], work=str(work.resolve()))
    return Job(**first | common | more)


def finish(
    args: argparse.Namespace,
    program: str,
    title: str,
    text: str,
    notes: str = "",
    ending: str | None = None,
) -> None:
    """Print a result, and write it with date, command, hardware, versions and conditions when a
    file was named.

    `ending` stands in place of the conditions of programs that compare the contenders of SIZES.
    """
    print(text)
    if not args.out:
        return
    command = " ".join(["python -m", f"benchmarks.{program}", *_shown(sys.argv[1:])])
    args.out.write_text(
        f"# {title}, "
        f"{time.strftime('%Y-%m-%d')}\n\n`{command}`\n\n{text}\n{notes}\n"
        f"{ending or conditions(args)}\n",
        "utf-8",
    )


def conditions(args: argparse.Namespace) -> str:
    """Return the sentence that says on what and with what a result was measured."""
    packages = ("torch", "transformers", "accelerate", "safetensors", "numpy")
    size = ", ".join(f"{k} {v}" for k, v in asdict(SIZES[args.size]).items())
    gpu = getattr(args, "device", "cpu") == "cuda"
    peak = "resident set above the level after imports (VmHWM, cleared then)"
    return (
        f"{hardware(args.threads, packages, gpu)}. Sizes: {size}. Each contender ran in a "
        "fresh process; memory is the "
        f"peak {'that PyTorch allocated on the GPU (max_memory_allocated)' if gpu else peak}, "
        "in MB of 10^6 bytes."
    )


def hardware(threads: int, packages: Iterable[str], gpu: bool = False) -> str:
    """Return machine, load and versions, for a sentence; names the GPU where one was used."""
    found = ", ".join(f"{name} {_version(name)}" for name in packages)
    return (
        f"{_gpu_name() if gpu else ''}{cpu_name()}, {cores()} of {os.cpu_count()} cores "
        f"usable, {threads} threads per "
        f"contender, load {os.getloadavg()[0]:.1f} at the end; {platform.system()} "
        f"{platform.release()}, Python "
        f"{platform.python_version()}, {found}"
    )


def _gpu_name() -> str:
    import torch

    return f"{torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda}), "


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _shown(words: Sequence[str]) -> list[str]:
    """Return arguments without the folders of this machine."""
    return [Path(word).name if "/" in word else word for word in words]
