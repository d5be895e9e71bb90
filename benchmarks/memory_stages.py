"""What every stage of a run on a large pinned model takes of memory, beside what `plan` says there.

python -m benchmarks.memory_stages --work FOLDER --out benchmarks/memory_stages_epyc_2026-11-27.md

A random Qwen3 of 1.5 B numbers is written in bf16 as the Hub has models (3 GB); it is pinned,
experts of rank 64 are trained two steps on random words, joined, evaluated, bundled and exported,
all by the product's own commands. Their processes are watched: what counts is the anonymous memory
of the one that has most of it, which no file holds; pages of files can be had again. The level
after imports is that at which a job's process begins. An export is removed once it is measured: the
largest takes 10 GB, the bundle of experts in all layers 22. --layers last:N makes them smaller.
What was measured is kept in --work, so the same command goes on where it was stopped. The exit
status is 1 when anything but a training takes more than 1.5 GB above its imports.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.measuring import MB, finish, hardware, progress, table
from benchmarks.runner import StageFailed
from pipeline.families import ExportWish
from pipeline.families.adapters.build import train_tokenizer
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run.arguments import parser
from pipeline.run.dry_run import Entry, plan, writings
from pipeline.run.identity import begin
from pipeline.run.stages import RUN
from pipeline.store.artifacts import Store
from pipeline.store.streamed import Streamed, write_tensors

TARGET_MB = 1500
DOMAINS = ("bridges", "gardens", "ships", "songs")
# Of a model of 1.5 B numbers, as Qwen has them, and of one for tests
SIZES = {
    "1.5b": (151_936, 1536, 8960, 28, 12, 2, 128),
    "toy": (400, 32, 64, 4, 2, 1, 16),
}
TRAININGS = ("train_experts",)
EXPORTS = {
    "adapters": ("--format", "adapters"),
    "expert": ("--format", "expert", "--expert", DOMAINS[0], "--dtype", "bf16"),
    "dense": ("--format", "dense", "--dtype", "bf16"),
    "gguf of an expert": ("--format", "gguf", "--expert", DOMAINS[0], "--dtype", "bf16"),
    "gguf of the stack, q8_0": ("--format", "gguf", "--dtype", "q8_0"),
    "gguf of the stack, bf16": ("--format", "gguf", "--dtype", "bf16"),
    "hf, bf16": ("--format", "hf", "--dtype", "bf16"),
}
LOOK_EVERY_S = 0.02


@dataclass
class Taken:
    """The most memory of any process of a command, in bytes."""

    anonymous: int = 0
    mapped: int = 0
    # Anonymous when a process was first seen, of those that began with their imports done
    imports: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Watch:
    """Looks at a command's processes, now and then; what comes and goes between two looks is
    missed."""

    def __init__(self, pid: int):
        self.taken = Taken()
        self._first = psutil.Process(pid)
        self._seen: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        # Jobs are forked from one that has the libraries, so the last ones begin with these
        self.taken.imports = [level for level in self._seen.values() if level > 100 * MB]

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            for process in self._processes():
                try:
                    found = process.memory_info()
                except psutil.Error:
                    continue  # it has ended
                anonymous = found.rss - found.shared
                self._seen.setdefault(process.pid, anonymous)
                self.taken.anonymous = max(self.taken.anonymous, anonymous)
                self.taken.mapped = max(self.taken.mapped, found.shared)

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._first, *self._first.children(recursive=True)]
        except psutil.Error:
            return []


def watched(words: Sequence[str]) -> Taken:
    """Carry out a command; return what its processes took. Raises StageFailed."""
    started = time.monotonic()
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, **pipes) as process, Watch(process.pid) as watch:
        _, told = process.communicate()
    if process.returncode:
        raise StageFailed(f"{' '.join(words)} failed: {told.decode()[-1500:]}")
    watch.taken.seconds = time.monotonic() - started
    return watch.taken


@dataclass(frozen=True)
class Row:
    """A command, what it took, and what the plan said of it."""

    name: str
    taken: Taken
    planned: int | None = None  # bytes above mapped files and imports
    file_bytes: int = 0  # of what it has written


class Chain:
    """A run from its model to its exports, by commands."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args = args
        self.store = Store(work / "store")
        self.model = work / "model"
        self.config = work / "run.yaml"
        self.target = work / "export"
        if not self.config.exists():
            write_model(self.model, args.size)
            write_texts(work)
        self.config.write_text(json.dumps(self._settings(work), indent=1), "utf-8")
        self.measured = work / "measured.json"
        self.kept: dict[str, Row] = {}
        for raw in json.loads(self.measured.read_text("utf-8")) if self.measured.exists() else ():
            self.kept[raw["name"]] = Row(**raw | {"taken": Taken(**raw["taken"])})

    def _settings(self, work: Path) -> dict:
        files = [{"paths": [str(work / f"{name}.jsonl")], "domain": name} for name in DOMAINS]
        context = self.args.context
        whole = {"eval_tokens": 4 * context, "statistics_tokens": 4 * context}
        return {
            "name": "memory_stages",
            "data": {"source": "files", "files": files, "split_field": "split"},
            "partition": {"domains": list(DOMAINS), "min_tokens": 100},
            "trunk": {"init": str(self.model), "steps": 0, "context_tokens": context} | whole,
            "expert": {
                "form": "low_rank",
                "rank": self.args.rank,
                "layers": self.args.layers,
                "steps": 2,
                "batch_sequences": 4,
                "warmup_steps": 1,
                "lr": 1e-3,
                "eval_every_steps": 0,
            }
            | whole,
            "router": {"steps": 0, "top_k": 2, "eval_tokens": 4 * context},
            "dense": {"baselines": []},
            "evaluate": {
                "rivals": "few",
                "tokens_per_domain": max(64, context),
                "continuation_tokens": 0,
                "samples": 0,
                "bootstrap": 10,
            },
            "runtime": {"threads": self.args.threads},
        }

    def rows(self) -> list[Row]:
        """Return a row for each command; those that were not measured before are carried out."""
        cfg = load(self.config, ())
        entries = plan(cfg, self.store)
        for stage in (*RUN, "deploy"):
            asked = stage in self.args.exports if stage == "deploy" else stage not in self.args.skip
            if not cfg.items(stage) or not asked:
                continue
            if stage not in self.kept:
                if stage == "deploy":
                    entries = self._writings()
                taken = self._typed(stage)
                self._keep(Row(stage, taken, _planned(entries, stage), self._bundle_bytes(stage)))
            if stage == "deploy":
                self._drop_bundle()
        for name in self.args.exports:
            row = f"export {name}"
            if name in EXPORTS and row not in self.kept:
                words = ("export", *EXPORTS[name], "--to", str(self.target))
                entries = self._writings(_wish(words))
                taken = self._typed(*words)
                self._keep(Row(row, taken, _planned(entries, "export"), _bytes_in(self.target)))
                shutil.rmtree(self.target)
        return list(self.kept.values())

    def _writings(self, *wishes: ExportWish) -> list[Entry]:
        """Return what a plan says of the bundle and of exports, once the tokenizer is there: its
        size counts."""
        cfg, _ = begin(load(self.config, ()), self.store, quiet)
        return writings(cfg, self.store, wishes)

    def _keep(self, row: Row) -> None:
        progress(f"{row.name}: {row.taken.anonymous / MB:,.0f} MB anonymous, imports included")
        self.kept[row.name] = row
        raw = [asdict(each) for each in self.kept.values()]
        self.measured.write_text(json.dumps(raw, indent=1), "utf-8")

    @property
    def imports(self) -> int:
        """Anonymous bytes of a job's process when it begins."""
        return min(level for row in self.kept.values() for level in row.taken.imports)

    def _typed(self, command: str, *words: str) -> Taken:
        progress(f"{command} {' '.join(words)}")
        place = ["--config", str(self.config), "--store", str(self.store.root)]
        return watched([sys.executable, "-m", "pipeline", command, *words, *place])

    def _bundles(self) -> list[Path]:
        return list((self.store.root / "artifacts").glob("deploy-*"))

    def _bundle_bytes(self, stage: str) -> int:
        return sum(map(_bytes_in, self._bundles())) if stage == "deploy" else 0

    def _drop_bundle(self) -> None:
        for folder in self._bundles():
            shutil.rmtree(folder)


def _planned(entries: Sequence[Entry], stage: str) -> int | None:
    """Return the most that the plan said for a stage's jobs above mapped files and imports."""
    found = []
    for entry in entries:
        if entry.job is not None and entry.job.stage == stage:
            found.append(entry.job.peak_bytes - entry.job.mapped_bytes)
    return max(found, default=None)


def _wish(words: Sequence[str]) -> ExportWish:
    """Return what of a run an export by these words wants."""
    args = parser().parse_args([*words, "--config", "unread.yaml"])
    return ExportWish(args.format, args.expert, args.dense, args.dtype)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_model(folder: Path, size: str) -> None:
    """Write a random Qwen3 in bf16 with a tokenizer, never all of it in memory."""
    vocab_size, d_model, d_ff, layers, heads, kv_heads, head_dim = SIZES[size]
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = _random(tuple(parameter.shape))
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    write_tensors(folder / "model.safetensors", tensors, quiet)
    config.save_pretrained(folder)
    words = [text for domain in DOMAINS for text in documents(domain, 20)]
    train_tokenizer(words, 360, (), "{{ messages }}").save_pretrained(folder)


def _random(shape: tuple[int, ...]) -> Streamed:
    # A function of its own, as one of a loop would have the last shape
    def read() -> torch.Tensor:
        drawn = torch.empty(shape, dtype=torch.bfloat16)
        return drawn.fill_(1.0) if len(shape) == 1 else drawn.normal_(std=0.02)

    return Streamed(shape, torch.bfloat16, read)


def documents(domain: str, count: int) -> list[str]:
    """Return texts of words that a domain alone has."""
    draw = random.Random(domain)
    words = [f"{domain[: 2 + number % 3]}{number}" for number in range(20)]
    return [" ".join(draw.choices(words, k=40)) for _ in range(count)]


def write_texts(work: Path) -> None:
    """Write every domain's documents."""
    for domain in DOMAINS:
        lines = []
        for number, text in enumerate(documents(domain, 160)):
            split = {0: "test", 1: "valid"}.get(number % 8, "train")
            lines.append(json.dumps({"text": f"{number} {text}", "split": split}) + "\n")
        (work / f"{domain}.jsonl").write_text("".join(lines), "utf-8")


def page(rows: Sequence[Row], imports: int) -> tuple[str, bool]:
    """Return the table with its verdict, and whether everything but training is below the
    target."""
    cells = []
    worst: tuple[float, str] = (0.0, "")
    for row in rows:
        own = (row.taken.anonymous - imports) / MB
        if row.name not in TRAININGS:
            worst = max(worst, (own, row.name))
        cells.append(
            [
                row.name,
                f"{own:,.0f}",
                "" if row.planned is None else f"{row.planned / MB:,.0f}",
                f"{row.taken.anonymous / MB:,.0f}",
                _shown(row.taken.mapped / MB),
                _shown(row.file_bytes / MB),
                _shown(row.taken.seconds),
            ]
        )
    head = [
        "command",
        "anonymous MB above imports",
        "planned",
        "with imports",
        "mapped MB",
        "written MB",
        "seconds",
    ]
    reached = worst[0] <= TARGET_MB
    verdict = (
        f"- at most {worst[0]:,.0f} MB above mapped files and imports but in training "
        f"({worst[1]}); target {TARGET_MB:,}: {'reached' if reached else 'missed'}\n"
    )
    return f"{table(head, cells)}\n{verdict}", reached


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chain, write the dated result and return the exit status."""
    args = _arguments(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    chain = Chain(args, args.work)
    text, reached = page(chain.rows(), chain.imports)
    vocab_size, d_model, d_ff, layers, *_ = SIZES[args.size]
    about = (
        f"A random Qwen3, vocabulary {vocab_size:,}, D {d_model:,}, F {d_ff:,}, {layers} layers, "
        f"in bf16 ({_bytes_in(chain.model) / MB:,.0f} MB), pinned; {len(DOMAINS)} experts of rank "
        f"{args.rank} in layers: {args.layers}; context {args.context}, 4 sequences a step, "
        f"{args.threads} threads. Imports take {chain.imports / MB:,.0f} MB of anonymous memory. "
        f"Of each command the process that took most counts, looked at every "
        f"{LOOK_EVERY_S * 1e3:.0f} ms.\n"
    )
    versions = hardware(args.threads, ("torch", "transformers", "gguf"))
    finish(args, "memory_stages", "Memory of every stage", text, about, f"{versions}.")
    return int(not reached)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    known = ("deploy", *EXPORTS)
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--size", choices=SIZES, default="1.5b", help="(default: %(default)s)")
    made.add_argument("--layers", default="all", help="with experts (default: %(default)s)")
    made.add_argument("--rank", type=int, default=64, help="of experts (default: %(default)s)")
    made.add_argument("--context", type=int, default=256, help="tokens (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="of a job (default: %(default)s)")
    made.add_argument(
        "--exports",
        nargs="*",
        choices=known,
        default=list(known),
        metavar="NAME",
        help=f"of {', '.join(known)} (default: all)",
    )
    made.add_argument(
        "--skip",
        nargs="*",
        choices=RUN,
        default=[],
        metavar="STAGE",
        help="to leave out",
    )
    made.add_argument("--work", type=Path, required=True, help="folder for model and store")
    made.add_argument(
        "--out", type=Path, metavar="FILE.md", help="also write the dated result here"
    )
    return made.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
