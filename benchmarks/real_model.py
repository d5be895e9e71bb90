"""What do parts give on a real pretrained model? Forms of experts, their ranks, layers and rates,
their routers and their seeds, against dense training on the same text.

python -m benchmarks.real_model 'texts/*.jsonl' --store STORE --out benchmarks

Everything is trained by the pipeline's own command line: what is in the store is not done again,
what was scored is kept beside it, and the dated page is written anew after every row, so the same
command goes on where it was stopped. A row that fails is told as such. The documents need the
fields text, domain and split (train, valid, test). --speed measures speed and memory of rank 64
alone, in alternating rounds. The exit status is 1 when a row failed or an aim was missed.
"""

import argparse
import fnmatch
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.measuring import hardware, progress
from benchmarks.real_parts.page import Tables, body
from benchmarks.real_parts.scores import HeldOut
from benchmarks.real_parts.speed import sections
from benchmarks.real_parts.variants import OF_A_PASS, Plan, Step, Variant
from benchmarks.runner import Runner, StageFailed
from pipeline.errors import PipelineError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.stages import SEARCHES
from pipeline.hardware import cpu_name, uses_bf16

CONFIG = Path(__file__).with_suffix(".yaml")


@dataclass
class Clock:
    """How long what is left will take, told from what was done."""

    waiting: float  # tokens, as those of a training
    spent_s: float = 0.0
    done: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def took(self, tokens: float, seconds: float, was_there: bool) -> None:
        """Take note of a step; what was in the store tells nothing of how fast this machine is."""
        self.waiting -= tokens
        if not was_there:
            self.spent_s += seconds
            self.done += tokens

    def left(self) -> str:
        """Return the time left, for people."""
        if not self.done:
            return "no telling yet how long the others take"
        minutes = max(0.0, self.waiting) * self.spent_s / self.done / 60
        return f"about {minutes:.0f} minutes left"


class Benchmark:
    """One run over all steps."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        common = [f"runtime.threads={args.threads}", *args.override]
        self.runner = Runner(CONFIG, args.files, args.store, common, args.parallel)
        self.taught = tuple(args.taught)
        self.cfg = self.runner.config(_experts(self.taught))
        for stage in ("tokenizer", "preprocess", "train_shared"):
            self.runner.make(stage, *self._alone())
        parts = self.runner.parts(self.cfg)
        folder = args.store.with_name(f"{args.store.name}-scores")
        self.held_out = HeldOut(self.cfg, parts, folder, _say)
        self.tables = Tables(self.held_out, self.taught)
        self.plan = self._plan()
        self.steps = [step for step in self.plan.steps() if self._wanted(step)]
        self.clock = Clock(sum(self._tokens(step) for step in self.steps))
        self.started = time.monotonic()

    def _plan(self) -> Plan:
        expert = self.cfg.expert
        context = self.cfg.trunk.context_tokens
        whole = expert.resolve_steps(context, 10**9) * expert.batch_sequences * context
        domains = self.held_out.shards.domains
        layers = self.held_out.shape.layers
        general = next((name for name in domains if name not in self.taught), domains[0])
        return Plan(
            domains,
            self.taught,
            self.args.seeds,
            whole,
            f"last:{max(1, layers // 3)}",
            self.args.general or general,
            tuple(self.args.best),
        )

    def _wanted(self, step: Step) -> bool:
        patterns = self.args.only
        return not patterns or any(fnmatch.fnmatch(step.key, pattern) for pattern in patterns)

    def _tokens(self, step: Step) -> float:
        """Return what a step costs, in tokens of training."""
        domains = len(self.held_out.shards.domains)
        read = step.passes * domains * self.cfg.evaluate.tokens_per_domain
        return step.trained * self.plan.expert_tokens + OF_A_PASS * read

    def _alone(self) -> tuple[str, ...]:
        # A stage of one job has the cores that others share between several
        return (f"runtime.threads={self.args.threads * self.args.parallel}",)

    def run(self) -> bool:
        """Do every step, write the page after each; return whether none failed."""
        for number, step in enumerate(self.steps, 1):
            began = time.monotonic()
            trained = self._do(step)
            gc.collect()
            self.clock.took(self._tokens(step), time.monotonic() - began, not trained)
            self.write(number)
            progress(f"{number} of {len(self.steps)}, {step.key}: done; {self.clock.left()}")
        return not self.tables.failed

    def _do(self, step: Step) -> bool:
        """Train and score a step; return whether anything had to be trained."""
        variant = step.make(self.tables.standings)
        if variant is None:
            self.tables.failed.append((step.key, "no form was scored that it could be made of"))
            return False
        progress(f"{variant.name}")
        try:
            overrides = (_experts(variant.taught), *variant.overrides)
            trained = self._train(variant, overrides)
            cfg = self.runner.config(*overrides)
            self.tables.add(self.held_out.row(variant, cfg, self.runner.parts(cfg)))
        except (PipelineError, StageFailed) as error:
            progress(f"{variant.name} failed: {error}")
            # The page is shown to others, and this machine's folders are not
            told = str(error).replace(str(self.runner.store.root), "the store")
            self.tables.failed.append((variant.name, told))
            return True
        return trained

    def _train(self, variant: Variant, overrides: Sequence[str]) -> bool:
        stages = ["train_shared"]
        if variant.kind == "dense":
            stages.append("train_dense")
        else:
            stages.append("train_experts")
        if variant.kind == "stack":
            stages.append("train_router")
        trained = False
        cfg = self.runner.config(*overrides)
        for stage in stages:
            # A rate that is auto is searched before what it is for
            for each in (SEARCHES.get(stage), stage):
                if each is not None:
                    threads = self._alone() if len(cfg.items(each)) == 1 else ()
                    trained |= self.runner.make(each, *overrides, *threads)
        return trained

    def write(self, done: int) -> None:
        """Write the page of what is there so far."""
        args, cfg = self.args, self.cfg
        processor = cpu_name().split()[-1].lower()
        # Some of the rows must not take the place of all of them
        part = "_part" if args.only else ""
        path = args.out / f"real_model{part}_{processor}_{time.strftime('%Y-%m-%d')}.md"
        minutes = (time.monotonic() - self.started) / 60
        unfinished = []
        if done < len(self.steps) or args.only:
            of = f"{done} of {len(self.steps)} rows so far"
            asked = " (of those that were asked for)" if args.only else ""
            unfinished = [f"**Not complete: {of}{asked}.**\n"]
        text = "\n".join(
            [
                f"# Parts on a real model, {time.strftime('%Y-%m-%d')}\n",
                *unfinished,
                f"`{_command(args)}`, {minutes:.0f} minutes for what was not there already.\n",
                self._conditions(cfg),
                body(self.tables),
            ]
        )
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def _conditions(self, cfg: FfnMoeConfig) -> str:
        documents = []
        for domain, each in self.held_out.evaluator.documents.items():
            documents.append(f"{domain} {len(each.bytes_n)} ({each.tokens:,} tokens)")
        few = self.tables.all.too_few
        told = f" Too few documents for intervals: {', '.join(few)}." if few else ""
        arithmetic = "bf16" if uses_bf16(cfg.dtype) else "fp32"
        machine = hardware(self.args.threads, ("torch", "transformers", "peft"))
        return (
            f"{machine}, {arithmetic}; a stage of one job had "
            f"{self.args.threads * self.args.parallel} threads, other stages "
            f"{self.args.parallel} jobs side by side.\n\n"
            f"Trunk {cfg.trunk.init}, not trained on; taught: {', '.join(self.taught)}; each "
            f"expert {self.plan.expert_tokens:,} tokens, context {cfg.trunk.context_tokens}, "
            f"{cfg.expert.batch_sequences} sequences a step. Rates that are auto were found on "
            "validation text by short trainings that the tokens below do not count. Intervals "
            "(95 %) resample documents, paired between rows; seeds are apart. Which form is the "
            "best, for the rows made of it, was told by this table, so the seeds that follow are "
            "the ones that it was not picked by. One expert, or the base where its class is the "
            "likeliest, reads a token but in rows of top-2. Active parameters: one expert of any "
            "form can stand in the place of what it was made from (a delta is added to it), so it "
            "adds none; two run side by side. Held-out "
            f"documents, cut at {cfg.data.max_document_bytes:,} bytes: {', '.join(documents)}."
            f"{told}\n"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, write the dated result and return the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads * args.parallel)
    if args.speed:
        return _speed(args)
    bench = Benchmark(args)
    whole = bench.run()
    print(body(bench.tables))
    reached = any(verdict.reaches for verdict in bench.tables.verdicts())
    return int(not (whole and reached))


def _speed(args: argparse.Namespace) -> int:
    """Measure rank 64 beside its rivals, write the dated result and return the exit status."""
    threads = args.threads * args.parallel
    common = [f"runtime.threads={threads}", *args.override]
    runner = Runner(CONFIG, args.files, args.store, common, 1)
    for stage in ("tokenizer", "preprocess", "train_shared"):
        runner.make(stage)
    text, reached = sections(runner, args.taught[0], args.rounds)
    date = time.strftime("%Y-%m-%d")
    processor = cpu_name().split()[-1].lower()
    path = args.out / f"real_model_speed_{processor}_{date}.md"
    ending = hardware(threads, ("torch", "transformers", "peft"))
    head = f"# Rank 64 on a real model, {date}\n\n`{_command(args)}`\n"
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\n{text}\n{ending}.\n", encoding="utf-8")
    print(text)
    return int(not reached)


def _experts(taught: Sequence[str]) -> str:
    return f"expert.domains={json.dumps(list(taught))}"


def _say(text: str, _share: float | None) -> None:
    progress(text)


def _command(args: argparse.Namespace) -> str:
    words = ["python -m benchmarks.real_model ..."]
    if args.speed:
        words += ["--speed", f"--rounds {args.rounds}"]
    words += [f"--override {change}" for change in args.override]
    if args.only:
        words.append("--only " + " ".join(f"'{pattern}'" for pattern in args.only))
    if args.best:
        words.append("--best " + " ".join(f"'{name}'" for name in args.best))
    words += [f"--seeds {args.seeds}", f"--threads {args.threads}", f"--parallel {args.parallel}"]
    return " ".join(words)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="JSONL files with text, domain, split")
    parser.add_argument(
        "--taught",
        nargs="+",
        default=["legal", "medical", "drama"],
        help="the domains that get an expert (default: %(default)s)",
    )
    parser.add_argument(
        "--general", help="the domain of general text (default: the first untaught one)"
    )
    parser.add_argument(
        "--store", type=Path, default=Path("store"), help="where artifacts are kept"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks"), help="where the dated result goes"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="rows by name or pattern, such as 'dense*' 'low rank 64' (--list shows them)",
    )
    parser.add_argument("--list", action="store_true", help="show the rows and end")
    parser.add_argument(
        "--seeds", type=int, default=3, help="of dense total and the two best forms"
    )
    parser.add_argument(
        "--best",
        nargs=2,
        default=[],
        metavar="ROW",
        help="the two forms of --seeds, where an earlier page told them: with --only '*seed*' "
        "other seeds are run without the first one's rows",
    )
    parser.add_argument("--threads", type=int, default=1, help="processor threads per job")
    parser.add_argument("--parallel", type=int, default=2, help="jobs side by side")
    parser.add_argument(
        "--override", action="append", default=[], help="a.b=value, such as another trunk.init"
    )
    parser.add_argument(
        "--speed", action="store_true", help="measure speed and memory of rank 64 alone"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    args = parser.parse_args(argv)
    best = tuple(args.best)
    plan = Plan(("", *args.taught), tuple(args.taught), args.seeds, 1, "last:1", "", best)
    try:
        steps = list(plan.steps())
    except ValueError as error:
        parser.error(f"--best: {error}")
    if args.list:
        parser.exit(message="\n".join(step.key for step in steps) + "\n")
    if not args.files:
        parser.error("files: name JSONL files with the fields text, domain and split")
    return args


if __name__ == "__main__":
    sys.exit(main())
