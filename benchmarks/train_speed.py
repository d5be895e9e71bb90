"""Measures tokens/s of trunk and expert training against a plain loop, Trainer, nanoGPT's settings
and ModularForge.

python -m benchmarks.train_speed --modularforge ../ModularForge --out
benchmarks/train_speed_epyc_2026-11-20.md

Contenders take turns, each turn in a fresh process, so a busy machine slows all of them; what is
claimed is the median over rounds of the ratio within a round. The exit status is 1 when a target is
missed.

On a GPU, at 100 M to 1 B parameters (this path has not been run yet; ModularForge stays on the
processor):

python -m benchmarks.train_speed --device cuda --size 1b --steps 10 --skip 5
"""

import argparse
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from benchmarks.measuring import (
    SIZES,
    Contender,
    add_device,
    finish,
    job_of,
    parser,
    progress,
    ratios,
    spread,
    table,
)

PEERS = ("plain", "trainer", "nanogpt", "modularforge")
TARGETS = {
    "modularforge": 8.0,
    "trainer": 1.5,
    "plain": 3.0,
}  # times their rate that ours should reach
EXPERT_OVER_TRUNK = 1.6
WORDS = {
    "ours": "ours",
    "plain": "plain PyTorch loop, fp32",
    "trainer": "transformers + Trainer, bf16",
    "nanogpt": "nanoGPT's settings, own loop, bf16",
    "nanogpt-compiled": "the same with torch.compile",
    "modularforge": "ModularForge, default configuration",
}
EPILOG = """contenders: NAME or NAME:MICRO, MICRO being sequences per forward pass (else the whole
batch at once; ours: what its plan chooses). Names: ours, plain, trainer (needs the package
accelerate), nanogpt, nanogpt-compiled (needs a C++ compiler), modularforge (needs
--modularforge). A target for a peer counts against the fastest of its entries, so `--contenders
ours trainer trainer:4 trainer:1` gives Trainer its best. Example, minutes: --size toy --rounds 2"""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _arguments(argv)
    folder = nullcontext(args.work) if args.work else tempfile.TemporaryDirectory()
    with folder as work:
        base = job_of(args, Path(work) / args.size, steps=args.skip + args.steps, skip=args.skip)
        contenders = [Contender.of(text, base) for text in args.contenders]
        for name in dict.fromkeys(
            c.job.peer for c in contenders if c.job.peer in ("ours", "modularforge")
        ):
            progress(f"preparing text and parts for {name}")
            Contender.of(name, base).measure(task="prepare")
        rounds = [_round(number, contenders, args) for number in range(1, args.rounds + 1)]
    text, kept = _result(rounds, args)
    finish(args, "train_speed", "Speed of training", text, NOTES)
    return int(not kept)


NOTES = """Tokens per second count the steps after the first, skipped ones: data, forward,
backward, clipping and optimizer; "first step" tells what compiling and warming up cost. MFU:
operations that the task needs (of an expert: none for gradients of frozen weights), of what large
products reach on this machine in the round, in a process of their own and in bf16 where there is
bf16. Ratios are within a round: median (least-most). The feed-forward networks of all have as
many parameters within 1 %; an expert trains with all else frozen. Peaks of ours include
validation, a checkpoint and the router statistics at the end, which the peers do not make.
ModularForge trains its own fp32 network with its default settings; its data workers are processes
of their own and not in its memory.
"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], EPILOG)
    add_device(made)
    made.add_argument(
        "--tasks", nargs="+", choices=("trunk", "expert"), default=["trunk", "expert"]
    )
    made.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="default: ours and every peer at hand"
    )
    made.add_argument(
        "--steps", type=int, default=3, help="optimizer steps that count (default: 3)"
    )
    made.add_argument("--skip", type=int, default=2, help="first steps that do not (default: 2)")
    args = made.parse_args(argv)
    at_hand = [
        p for p in PEERS if p != "modularforge" or (args.modularforge and args.device == "cpu")
    ]
    args.contenders = args.contenders or ["ours", *at_hand]
    strange = [c for c in args.contenders if c.partition(":")[0] not in WORDS]
    if strange:
        made.error(f"no such contender: {', '.join(strange)}; there are {', '.join(WORDS)}")
    if any(c.startswith("modularforge") for c in args.contenders):
        if not args.modularforge:
            made.error("modularforge needs the path of its repository: --modularforge PATH")
        if args.device == "cuda":
            made.error(
                "modularforge is measured on the processor only: leave it out of "
                "--contenders, or --device cpu"
            )
    if min(args.rounds, args.steps, args.threads) < 1 or args.skip < 0:
        made.error("--rounds, --steps and --threads must be at least 1, --skip at least 0")
    return args


def _round(number: int, contenders: list[Contender], args: argparse.Namespace) -> dict:
    """Give every contender its turn at every task; return {(task, contender): what it measured, its
    MFU added}."""
    out, most = {}, contenders[0].measure(peer="ours", task="product")["flops_per_s"]
    for task in args.tasks:
        for contender in contenders:
            found = contender.measure(task=task)
            if "refused" in found:
                raise SystemExit(
                    f"{contender.name} declined to train the {task}: {found['refused']}"
                )
            found["mfu"] = found["tokens_per_s"] * SIZES[args.size].flops_per_token(task) / most
            out[task, contender.name] = found
            progress(
                f"round {number} of {args.rounds}: {task}, {contender.name}: "
                f"{found['tokens_per_s']:,.0f} tokens/s, "
                f"MFU {found['mfu']:.2f}, {found['step_s']:.2f} s a step, peak "
                f"{found['peak_mb']:,.0f} MB"
            )
    return out


def _result(rounds: list[dict], args: argparse.Namespace) -> tuple[str, bool]:
    """Return tables and targets in Markdown, and whether every target was reached."""
    parts, kept = [], True
    for task in args.tasks:
        parts += [
            f"## Training the {task}: {args.rounds} rounds\n",
            _table(rounds, task, args.contenders),
        ]
    lines = list(_verdicts(rounds, args))
    for name, values, target in lines:
        reached = statistics.median(values) >= target
        kept &= reached
        parts.append(
            f"- {name}: {spread(values, 2)} times; target {target}: "
            f"{'reached' if reached else 'missed'}"
        )
    return "\n".join(parts) + "\n", kept


def _table(rounds: list[dict], task: str, names: list[str]) -> str:
    head = [
        "contender",
        "tokens/s",
        "ours is times as fast",
        "MFU",
        "s per step",
        "first step, s",
        "peak MB",
        "last loss",
    ]
    rows = []
    for name in names:
        found = [r[task, name] for r in rounds]
        ours = _ours(names)
        times = (
            spread(ratios(rounds, _rate(task, ours), _rate(task, name)), 2)
            if ours and name != ours
            else ""
        )
        rows.append(
            [
                _words(name),
                spread([f["tokens_per_s"] for f in found]),
                times,
                spread([f["mfu"] for f in found], 2),
                spread([f["step_s"] for f in found], 2),
                spread([f["first_step_s"] for f in found], 1),
                spread([f["peak_mb"] for f in found]),
                f"{found[0]['nats']:.3f}",
            ]
        )
    return table(head, rows)


def _verdicts(rounds: list[dict], args: argparse.Namespace):
    """Yield (what is compared, ratios by round, target)."""
    ours = _ours(args.contenders)
    if not ours:
        return
    for task in args.tasks:
        for peer, target in TARGETS.items():
            entries = [c for c in args.contenders if c.partition(":")[0] == peer]
            if entries:
                best = max(
                    entries, key=lambda c, t=task: statistics.median(_rate(t, c)(r) for r in rounds)
                )
                yield (
                    f"{task}: ours over {_words(best)}",
                    ratios(rounds, _rate(task, ours), _rate(task, best)),
                    target,
                )
    if {"trunk", "expert"} <= set(args.tasks):
        yield (
            "ours: expert over trunk",
            ratios(rounds, _rate("expert", ours), _rate("trunk", ours)),
            EXPERT_OVER_TRUNK,
        )


def _ours(names: list[str]) -> str | None:
    return next((name for name in names if name.partition(":")[0] == "ours"), None)


def _rate(task: str, name: str):
    return lambda one: one[task, name]["tokens_per_s"]


def _words(name: str) -> str:
    peer, _, micro = name.partition(":")
    return WORDS[peer] + (f", {micro} sequences per pass" if micro else "")


if __name__ == "__main__":
    sys.exit(main())
