"""Compare a batch whose rows run under different adapters with the same requests one by one, and
grouped by expert.

python -m benchmarks.vlm_mixed --config config/tiny_vlm.yaml --store STORE

Takes a finished store of a lora_vlm run, or makes what is missing of it. Every way must answer
every request with the same text; rounds take turns, and the claim is the median of the rounds'
ratios. Fails when a text differs or the mixed batch is not three times as fast as one by one.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measuring import finish, hardware, progress, spread, table
from pipeline.families.load import load
from pipeline.protocols import quiet
from pipeline.run import backend, stages
from pipeline.run.context import StoredParts
from pipeline.store.artifacts import Store

TARGET = 3.0  # times the requests per second of one by one
MIXED, GROUPED, ALONE = "one mixed batch", "a batch per expert", "one by one"
PACKAGES = ("torch", "transformers", "peft", "pillow")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 when the target is missed."""
    args = _arguments(argv)
    cfg = load(args.config, tuple(args.override))
    if cfg.family != "lora_vlm":
        raise SystemExit(
            f"{args.config} is a run of {cfg.family}; this program wants one of lora_vlm"
        )
    strange = sorted({*(args.experts or ())} - {*cfg.experts})
    if strange:
        raise SystemExit(f"no expert {strange[0]}; {args.config} has {', '.join(cfg.experts)}")
    with tempfile.TemporaryDirectory() as scratch:
        stack, asked = _ready(
            cfg, args.store or Path(scratch), args.experts or cfg.experts[:3], args.requests
        )
        import torch

        torch.set_num_threads(args.threads)
        text, reached = measured(stack, asked, args.rounds)
    sizes = sum(p.numel() for p in stack.model.core.parameters())
    ending = (
        f"{hardware(args.threads, PACKAGES)}. Base and {len(stack.model.adapters)} adapters: "
        f"{sizes:,} parameters, {next(stack.model.core.parameters()).dtype}; weights in memory, "
        "pictures opened before the clock starts. The "
        "stack's own code answers in all ways: it encodes pictures, tokenizes prompts and decodes "
        "texts in the time."
    )
    finish(args, "vlm_mixed", "Mixed-adapter batches", text, "", ending)
    return int(reached < TARGET)


def measured(stack, asked: Sequence[tuple[str, object]], rounds: int) -> tuple[str, float]:
    """Return the tables for (expert, request) pairs and the median ratio of the mixed batch over
    one by one.

    Raises SystemExit where two ways answer a request differently.
    """
    first = _rounds("experts given", ways(stack, asked), rounds)
    whole = {
        MIXED: lambda: [a.text for a in stack.answer([request for _, request in asked])],
        ALONE: lambda: [a.text for _, request in asked for a in stack.answer([request])],
    }
    second = _rounds("router and experts", whole, rounds)
    names = ", ".join(dict.fromkeys(name for name, _ in asked))
    reached = [statistics.median(_ratios(each, MIXED)) for each in (first, second)]
    text = (
        f"{len(asked)} requests, each of one of {len({n for n, _ in asked})} experts ({names}) in "
        f"turn; {rounds} "
        "rounds of all ways in turn after one that is thrown away.\n\nThe experts are given (no "
        "router):\n\n"
        f"{_table(first, len(asked))}\nThe whole stack: the router decides, then its experts "
        "answer:\n\n"
        f"{_table(second, len(asked))}\nEvery way gave every request the same text (checked in "
        f"every round). Target: at least {TARGET:g} times as fast as one by one; "
        f"{'met' if min(reached) >= TARGET else 'missed'} ({reached[0]:.2f} and "
        f"{reached[1]:.2f}).\n"
    )
    return text, min(reached)


def ways(stack, asked: Sequence[tuple[str, object]]) -> dict[str, Callable[[], list[str]]]:
    """Return the ways to get the texts of all requests from their own experts, in the order of the
    requests."""

    def texts(some: Sequence[tuple[str, object]]) -> list[str]:
        said = stack.generate([request for _, request in some], [[name] for name, _ in some])
        return [each[name].text for each, (name, _) in zip(said, some, strict=True)]

    def grouped() -> list[str]:
        out = {}
        for expert in dict.fromkeys(name for name, _ in asked):
            at = [i for i, (name, _) in enumerate(asked) if name == expert]
            out |= dict(zip(at, texts([asked[i] for i in at]), strict=True))
        return [out[i] for i in range(len(asked))]

    return {
        MIXED: lambda: texts(asked),
        GROUPED: grouped,
        ALONE: lambda: [text for each in asked for text in texts([each])],
    }


def _rounds(
    name: str, contenders: dict[str, Callable[[], list[str]]], rounds: int
) -> list[dict[str, float]]:
    """Return seconds of each way and round, each round in another order. Raises SystemExit for
    texts that differ."""
    out, wanted = [], None
    for turn in range(rounds + 1):
        seconds, order = {}, list(contenders)
        for way in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            texts = contenders[way]()
            seconds[way] = time.perf_counter() - start
            wanted = wanted or texts
            differ = [i for i, (a, b) in enumerate(zip(wanted, texts, strict=True)) if a != b]
            if differ:
                i = differ[0]
                raise SystemExit(
                    f"{name}, {way}: request {i} is answered {texts[i]!r}, otherwise {wanted[i]!r}"
                )
        progress(
            f"{name}, round {turn} of {rounds}: "
            + ", ".join(f"{way} {s:.2f} s" for way, s in seconds.items())
        )
        out.append({way: seconds[way] for way in contenders})
    return out[1:]


def _ratios(rounds: list[dict[str, float]], way: str) -> list[float]:
    return [r[ALONE] / r[way] for r in rounds]


def _table(rounds: list[dict[str, float]], count: int) -> str:
    head = [
        "way",
        "requests/s, median (least to most)",
        "ms per request",
        "times one by one, median of rounds",
    ]
    rows = [
        [
            way,
            spread([count / r[way] for r in rounds], 1),
            f"{1000 * statistics.median(r[way] for r in rounds) / count:.1f}",
            spread(_ratios(rounds, way), 2),
        ]
        for way in rounds[0]
    ]
    return table(head, rows)


def _ready(cfg, folder: Path, experts: Sequence[str], count: int) -> tuple:
    """Return the stack, made first where it is missing, and (expert, request) pairs of test rows,
    experts in turn."""
    from pipeline.families import family
    from pipeline.families.adapters.eval_data import AdapterEvaluator

    store = Store(folder).open()
    local = backend.Local(store)
    for stage in stages.RUN[: stages.RUN.index("train_router") + 1]:
        if cfg.items(stage):
            backend.run_stage(stage, cfg, local)
    parts = StoredParts(cfg, store)
    bench = AdapterEvaluator(cfg, parts, family(cfg.family).assemble(cfg, parts), quiet)
    rows = {name: bench.task(name) for name in experts}
    return bench.stack, [
        (name, rows[name][i // len(experts)].request())
        for i, name in ((i, experts[i % len(experts)]) for i in range(count))
    ]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, default=Path("config/tiny_vlm.yaml"), help="a run of lora_vlm"
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="A.B=VALUE", help="setting of it; repeat"
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="FOLDER",
        help="what is missing is made there; none: all of it",
    )
    parser.add_argument(
        "--experts", nargs="+", metavar="NAME", help="who is asked (default: the first three)"
    )
    parser.add_argument(
        "--requests", type=int, default=24, help="in a batch (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the processor (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="also write the dated result here"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.requests < 1:
        parser.error("--rounds and --requests must be at least 1")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
