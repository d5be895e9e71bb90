"""Measures making and opening a bundle of 2 to 64 experts against torch.load and save, and
ModularForge's assembler.

python -m benchmarks.assemble --modularforge ../ModularForge --out
benchmarks/assemble_epyc_2026-11-20.md

Experts have random weights at the size that --size names. Every bundle is made, opened and asked
once, each in a fresh process, and removed; contenders take turns. Needs 34 MB of disk per expert
and contender, twice, at the default size.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from benchmarks.measuring import (
    MB,
    Contender,
    finish,
    job_of,
    parser,
    progress,
    ratios,
    spread,
    table,
)

PEERS = ("plain", "modularforge")
WORDS = {
    "ours": "ours: files linked or copied, an index, sha256 of everything",
    "plain": "torch.load of every file, one torch.save",
    "modularforge": "ModularForge's streaming assembler",
}
FLAT = 0.03  # how far peaks may be apart from the fewest to the most experts
NOTES = """Bytes are those of the finished bundle. The page cache is warm: the parts were written
just before, by the same program. Ours writes, besides, the sum of every file, which the others do
not; "open" ends when the stack answered one context of tokens (the plain loop has no network and
only loads). Memory is the peak above imports; "mapped" is the part of it that is pages of files,
which the system takes back when it needs them.
"""
EPILOG = "Example, a minute: --size toy --rounds 2 --experts 2 4 8"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _arguments(argv)
    folder = nullcontext(args.work) if args.work else tempfile.TemporaryDirectory()
    with folder as work:
        names = ["ours", *(p for p in PEERS if p != "modularforge" or args.modularforge)]
        rounds = measure(args, Path(work) / f"{args.size}-{max(args.experts)}", names)
    flat = flatness([r["ours", "bundle", n]["peak_mb"] for n in args.experts] for r in rounds)
    verdict = (
        f"- ours, making: peak grows by {flat:.1%} at most between any two numbers of experts; "
        f"target {FLAT:.0%}\n"
    )
    tables = [f"## {title}\n\n{_table(rounds, names, does, args)}" for does, title in TASKS.items()]
    finish(args, "assemble", "Making and opening a bundle", "\n".join([*tables, verdict]), NOTES)
    return int(flat > FLAT)


TASKS = {"bundle": "Making it", "open": "Opening it and asking it once"}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], EPILOG)
    made.add_argument(
        "--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="(default: 2 to 64)"
    )
    args = made.parse_args(argv)
    if min(args.rounds, args.threads) < 1 or min(args.experts) < 2:
        made.error("--rounds and --threads must be at least 1, --experts at least 2")
    return args


def measure(args: argparse.Namespace, work: Path, names: list[str]) -> list[dict]:
    """Return of each round {(contender, bundle or open, experts): what it measured}."""
    most = max(args.experts)
    base = job_of(args, work, domains=most, experts=most)
    contenders = [Contender.of(name, base) for name in names]
    for contender in contenders:
        progress(f"writing {most} experts for {contender.name}")
        for count in (
            args.experts if contender.name == "ours" else [most]
        ):  # a router of its own for each number
            contender.measure(task="prepare", experts=count)
    out = []
    for number in range(1, args.rounds + 1):
        out.append({})
        for count in args.experts:
            for contender in contenders:
                for does in TASKS:
                    (work / "bundles").mkdir(parents=True, exist_ok=True)
                    found = out[-1][contender.name, does, count] = contender.measure(
                        task=does, experts=count
                    )
                    progress(
                        f"round {number} of {args.rounds}: {contender.name}, {does} {count} "
                        "experts: "
                        f"{found['seconds']:.2f} s, peak {found['peak_mb']:,.0f} MB"
                    )
                shutil.rmtree(work / "bundles")
    return out


def flatness(peaks_by_round) -> float:
    """Return by how much of the least peak the most exceeds it, medians over the rounds of each
    number of experts."""
    medians = [statistics.median(values) for values in zip(*peaks_by_round, strict=True)]
    return max(medians) / min(medians) - 1


def _table(rounds: list[dict], names: list[str], does: str, args: argparse.Namespace) -> str:
    head = [
        "contender",
        "experts",
        "seconds",
        "ours is times as fast",
        "bundle MB",
        "MB/s",
        "peak MB",
        "of it mapped",
    ]
    rows = []
    for name in names:
        for count in args.experts:
            found = [r[name, does, count] for r in rounds]
            times = ratios(rounds, _seconds(name, does, count), _seconds("ours", does, count))
            rows.append(
                [
                    WORDS[name],
                    str(count),
                    spread([f["seconds"] for f in found], 2),
                    spread(times, 2) if name != "ours" else "",
                    f"{found[0]['bytes'] / MB:,.0f}",
                    spread([f["bytes"] / MB / f["seconds"] for f in found]),
                    spread([f["peak_mb"] for f in found]),
                    spread([f["file_mb"] for f in found]),
                ]
            )
    return table(head, rows)


def _seconds(name: str, does: str, count: int):
    return lambda one: one[name, does, count]["seconds"]


if __name__ == "__main__":
    sys.exit(main())
