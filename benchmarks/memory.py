"""Measures what training takes of memory: under a budget, beside its peers, by number of experts,
as predicted.

python -m benchmarks.memory --modularforge ../ModularForge --out
benchmarks/memory_epyc_2026-11-20.md

Four tables: `budgets` (one expert trained under each of --budgets, and by the peers), `experts`
(peak against the number of experts: training in sequence, a fresh process each, and making a
bundle), `prediction` (what the plan promises against what was taken, over the configurations of
GRID), `pinned` (the same on a random model of SmolLM2-135M's sizes, pinned in bf16). The exit
status is 1 when a target is missed.

On a GPU a peak is what PyTorch allocated there (this path has not been run yet); bundles are made
without it:

python -m benchmarks.memory --device cuda --size 350m --budgets none 12GB 8GB
"""

import argparse
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from benchmarks.measuring import (
    SIZES,
    Contender,
    Job,
    Sizes,
    add_device,
    finish,
    job_of,
    parser,
    progress,
    ratios,
    run,
    spread,
    table,
)

from . import assemble

PEERS = ("plain", "trainer", "nanogpt", "modularforge")
FLAT, NEAR = 0.03, 0.10
TRAINED = 5  # experts of each number, from the first to the last
SLOWEST = 0.5  # share of the unbounded rate that the tightest budget must keep
GRID = (  # task, micro-batch, changes of the sizes, overrides
    ("expert", 16, {}, ()),
    ("expert", 4, {}, ()),
    ("expert", 1, {}, ()),
    ("expert", 4, {}, ("dtype=fp32",)),
    ("expert", 4, {"vocab_size": 4096}, ()),
    ("expert", 8, {"context_tokens": 256}, ()),
    ("expert", 2, {"layers": 8}, ()),
    ("expert", 2, {"d_ff": 2736}, ()),
    ("expert", 8, {}, ("expert.checkpointing=true",)),
    ("expert", 1, {}, ("runtime.memory_budget=220MB",)),
    ("expert", 1, {}, ("runtime.memory_budget=172MB",)),
    ("trunk", 16, {}, ()),
    ("trunk", 4, {}, ()),
    ("trunk", 1, {}, ()),
    ("trunk", 4, {}, ("dtype=fp32",)),
    ("trunk", 4, {"d_model": 256, "heads": 4, "d_ff": 684}, ()),
    ("router", 4, {}, ()),
    ("router", 1, {"vocab_size": 4096}, ()),
)
# A random model in a folder, and what trains on it: task, overrides
SMOLLM2 = Sizes(49_152, 256, 576, 30, 9, 1536, 2304, 4, kv_heads=3)
ON_A_PIN = (
    ("low_rank", ()),
    ("low_rank", ("expert.rank=16",)),
    ("low_rank", ("expert.layers=last:10",)),
    ("low_rank", ("dtype=fp32",)),
    ("low_rank", ("runtime.memory_budget=800MB",)),
    ("adapter", ()),
    ("adapter", ("expert.rank=16",)),
    ("expert", ()),
    ("expert", ("expert.layers=last:10",)),
)
NOTES = """Budgets: the same expert, text and steps in every row; a loss is the last step's.
"Mapped" is the part of the peak that is pages of files: kernels of the libraries first used after
the imports, and data files; "data" is the part of those, and "data by share" counts a page that n
processes map as 1/n. Peaks of ours include validation, a checkpoint and the router statistics at
the end. Experts: of each number five are trained, from the first to the last, each alone in its
process; their median counts.
"""
EPILOG = (
    "Example, two minutes: --size toy --rounds 1 --budgets none --experts 2 4 --tables budgets "
    "experts"
)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _arguments(argv)
    folder = nullcontext(args.work) if args.work else tempfile.TemporaryDirectory()
    parts, kept = [], True
    with folder as work:
        for name in args.tables:
            text, reached = TABLES[name](args, Path(work))
            parts.append(text)
            kept &= reached
    finish(args, "memory", "Memory of training", "\n".join(parts), NOTES)
    return int(not kept)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], EPILOG)
    add_device(made)
    made.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="(default: all)"
    )
    made.add_argument(
        "--budgets",
        nargs="+",
        default=["none", "350MB", "172MB"],
        metavar="BUDGET",
        help="values of runtime.memory_budget; none: unbounded (default: none 350MB 172MB)",
    )
    made.add_argument(
        "--peers", nargs="*", default=list(PEERS), metavar="NAME", help="NAME or NAME:MICRO"
    )
    made.add_argument(
        "--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="(default: 2 to 64)"
    )
    made.add_argument(
        "--steps", type=int, default=5, help="optimizer steps of a training, 2 of them skipped"
    )
    args = made.parse_args(argv)
    usable = args.modularforge and args.device == "cpu"
    args.peers = [p for p in args.peers if usable or not p.startswith("modularforge")]
    if args.rounds < 1 or args.steps < 3 or min(args.experts) < 2:
        made.error("--rounds must be at least 1, --experts at least 2, --steps at least 3")
    return args


def _budgets(args: argparse.Namespace, work: Path) -> tuple[str, bool]:
    """Return the table of one expert trained by everyone, and whether every budget was kept fast
    enough."""
    base = job_of(args, work / args.size, task="expert", steps=args.steps, skip=2)
    entries = {
        _ours(b): Contender.of("ours", replace(base, overrides=_under(args, b)))
        for b in args.budgets
    }
    entries |= {name: Contender.of(name, base) for name in args.peers}
    for name in dict.fromkeys(
        c.job.peer for c in entries.values() if c.job.peer in ("ours", "modularforge")
    ):
        progress(f"preparing text and parts for {name}")
        Contender.of(name, replace(base, overrides=tuple(args.override))).measure(task="prepare")
    rounds = []
    for number in range(1, args.rounds + 1):
        rounds.append({})
        for name, contender in entries.items():
            found = rounds[-1][name] = contender.measure()
            progress(
                f"round {number} of {args.rounds}: {name}: {found.get('refused') or _short(found)}"
            )
    return "## One expert\n\n" + _budget_table(rounds, entries) + _kept(rounds, args), _all_kept(
        rounds, args
    )


def _ours(budget: str) -> str:
    return "ours, no budget" if budget == "none" else f"ours, memory_budget {budget}"


def _under(args: argparse.Namespace, budget: str) -> tuple[str, ...]:
    return (*args.override, *([] if budget == "none" else [f"runtime.memory_budget={budget}"]))


def _short(found: dict) -> str:
    return (
        f"peak {found['peak_mb']:,.0f} MB, {found['tokens_per_s']:,.0f} tokens/s, loss "
        f"{found['nats']:.3f}"
    )


def _budget_table(rounds: list[dict], entries: dict[str, Contender]) -> str:
    head = [
        "contender",
        "peak MB",
        "of it until trained",
        "of it mapped",
        "of that data",
        "data by share",
        "predicted MB",
        "tokens/s",
        "last loss",
    ]
    rows = []
    for name in entries:
        found = [r[name] for r in rounds]
        if "refused" in found[0]:
            rows.append(
                [
                    f"{name}: declined: {' '.join(found[0]['refused'].split())}",
                    *[""] * (len(head) - 1),
                ]
            )
            continue
        keys = (
            "peak_mb",
            "fit_mb",
            "file_mb",
            "data_mb",
            "data_share_mb",
            "predicted_mb",
            "tokens_per_s",
        )
        cells = [spread([f[key] for f in found]) if key in found[0] else "" for key in keys]
        rows.append([name, *cells, f"{found[0]['nats']:.3f}"])
    return table(head, rows) + "\n"


def _verdicts(rounds: list[dict], args: argparse.Namespace):
    """Yield (what a budget promises, whether it was kept)."""
    for budget in (b for b in args.budgets if b != "none"):
        found = [r[_ours(budget)] for r in rounds]
        if "refused" in found[0]:
            yield f"{budget}: declined", False
            continue
        peak = max(f["peak_mb"] for f in found)
        yield f"{budget}: most ever taken {peak:,.0f} MB", peak <= megabytes(budget)
    if (
        "none" in args.budgets
        and len(args.budgets) > 1
        and "refused" not in rounds[0][_ours(args.budgets[-1])]
    ):
        last, free = _ours(args.budgets[-1]), _ours("none")
        share = ratios(rounds, lambda r: r[last]["tokens_per_s"], lambda r: r[free]["tokens_per_s"])
        yield (
            f"{last} keeps {spread(share, 2)} of the unbounded rate",
            statistics.median(share) >= SLOWEST,
        )


def megabytes(text: str) -> float:
    """Return a budget in MB; KB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024."""
    units = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "KB": 1e3, "MB": 1e6, "GB": 1e9}
    unit = next((u for u in units if text.endswith(u)), None)
    return float(text.removesuffix(unit or "")) * units.get(unit, 1) / 1e6


def _kept(rounds: list[dict], args: argparse.Namespace) -> str:
    return "".join(
        f"- {text}: {'kept' if kept else 'missed'}\n" for text, kept in _verdicts(rounds, args)
    )


def _all_kept(rounds: list[dict], args: argparse.Namespace) -> bool:
    return all(kept for _, kept in _verdicts(rounds, args))


def _by_experts(args: argparse.Namespace, work: Path) -> tuple[str, bool]:
    """Return peaks against the number of experts, and whether ours are flat."""
    folder = work / f"{args.size}-{max(args.experts)}"
    names = ["ours", *(["modularforge"] if args.modularforge else [])]
    made = assemble.measure(
        argparse.Namespace(**vars(args) | {"rounds": 1, "device": "cpu"}), folder, names
    )[0]
    base = job_of(args, folder, task="expert", steps=1, skip=0, domains=max(args.experts))
    trained = {}
    for count in args.experts:
        items = [round(i * (count - 1) / (TRAINED - 1)) for i in range(TRAINED)]
        trained[count] = [run(replace(base, experts=count, item=i))["peak_mb"] for i in items]
        progress(f"{count} experts in sequence: peak {spread(trained[count])} MB")
    head = [
        "experts",
        "ours, training",
        *(f"{n}, {w}" for n in names for w in ("making a bundle", "opening it")),
    ]
    rows = [
        [
            str(n),
            spread(trained[n]),
            *(
                f"{made[name, does, n]['peak_mb']:,.0f}"
                for name in names
                for does in assemble.TASKS
            ),
        ]
        for n in args.experts
    ]
    flat = [assemble.flatness([[statistics.median(peaks) for peaks in trained.values()]])]
    flat.append(assemble.flatness([[made["ours", "bundle", n]["peak_mb"] for n in args.experts]]))
    verdict = (
        f"- ours grow by {flat[0]:.1%} (training) and {flat[1]:.1%} (making a bundle); target "
        f"{FLAT:.0%}\n"
    )
    return f"## Peak MB by number of experts\n\n{table(head, rows)}\n{verdict}", max(flat) <= FLAT


def _prediction(args: argparse.Namespace, work: Path) -> tuple[str, bool]:
    """Return predicted against measured peaks over GRID, and whether all are near."""
    jobs = {}
    for task, micro, changes, overrides in GRID:
        sizes = replace(SIZES[args.size], **changes if args.size != "toy" else {})
        place = work / f"{args.size}-{'-'.join(f'{k}{v}' for k, v in changes.items()) or 'plain'}"
        base = job_of(
            args, place, task=task, micro=min(micro, sizes.batch_sequences), steps=2, skip=1
        )
        job = replace(base, sizes=sizes, overrides=(*args.override, *overrides))
        what = ", ".join([f"{k} {v}" for k, v in changes.items()] + list(overrides))
        jobs[f"{task}, {job.micro} sequences per pass{', ' if what else ''}{what}"] = job
    return _compared("Predicted and measured", jobs)


def _pinned(args: argparse.Namespace, work: Path) -> tuple[str, bool]:
    """Return predicted against measured peaks of what trains on a pinned model."""
    sizes = SIZES["toy"] if args.size == "toy" else SMOLLM2
    jobs = {}
    for task, overrides in ON_A_PIN:
        if args.size == "toy" and "expert.layers=last:10" in overrides:
            continue
        base = job_of(args, work / f"{args.size}-pinned", task=task, steps=3, skip=1, pinned=True)
        job = replace(base, sizes=sizes, overrides=(*args.override, *overrides))
        jobs[", ".join((task, *overrides))] = job
    return _compared("Predicted and measured on a pinned model of SmolLM2-135M's sizes", jobs)


def _compared(title: str, jobs: dict[str, Job]) -> tuple[str, bool]:
    """Return a table of predicted against measured peaks, and whether all are near."""
    rows, ratio = [], []
    for what, job in jobs.items():
        run(replace(job, task="prepare"))
        found = run(job)
        ratio.append(found["predicted_mb"] / found["peak_mb"])
        rows.append(
            [
                what,
                f"{found['predicted_mb']:,.0f}",
                f"{found['peak_mb']:,.0f}",
                f"{found['fit_mb']:,.0f}",
                f"{ratio[-1]:.2f}",
            ]
        )
        progress(
            f"prediction {len(rows)} of {len(jobs)}: {what}: {rows[-1][1]} of {rows[-1][2]} MB"
        )
    head = [
        "configuration",
        "predicted MB",
        "measured MB",
        "of it until trained",
        "predicted over measured",
    ]
    far = [r for r in ratio if abs(r - 1) > NEAR]
    verdict = (
        f"- {len(ratio) - len(far)} of {len(ratio)} within {NEAR:.0%}, from {min(ratio):.2f} to "
        f"{max(ratio):.2f}\n"
    )
    return f"## {title}\n\n{table(head, rows)}\n{verdict}", not far


TABLES = {
    "budgets": _budgets,
    "experts": _by_experts,
    "prediction": _prediction,
    "pinned": _pinned,
}

if __name__ == "__main__":
    sys.exit(main())
