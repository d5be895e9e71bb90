"""Where does training in parts beat the dense model, and where not? Quality, ablations, opt-out, an
added domain, routing and active experts of one longer run on labelled text.

Every number is measured by this program through the pipeline's own command line and code; nothing
is typed in. Run: python -m benchmarks.parts_vs_dense 'texts/*.jsonl' --added drama --out benchmarks
The documents need the fields text, domain and split (train, valid, test).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.runner import Runner
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.evaluator import Evaluator
from pipeline.families.ffn_moe.parts import shards_of, stored_trunk
from pipeline.families.ffn_moe.stack import assemble
from pipeline.hardware import cores, cpu_name, uses_bf16
from pipeline.model.trunk import open_dense
from pipeline.report.schema.base import Difference, Interval
from pipeline.report.schema.language import LanguageReport
from pipeline.report.schema.reading import read as read_report

CONFIG = Path(__file__).with_suffix(".yaml")
ABLATIONS = {  # name -> what differs from the run
    "as shipped (from the dummy, alone, ridge then trained, top-2)": (),
    "fresh experts, router as shipped (dummy discarded)": ("expert.init=fresh",),
    "fresh experts, random router, untrained (the prior art)": (
        "expert.init=fresh",
        "router.init=random",
        "router.steps=0",
    ),
    "coordinated, own rows, anchor kept, untrained (FlexOlmo)": (
        "expert.coordinate=true",
        "router.init=rows",
        "trunk.anchor=keep",
        "router.steps=0",
    ),
    "coordinated, own rows, anchor kept, trained": (
        "expert.coordinate=true",
        "router.init=rows",
        "trunk.anchor=keep",
    ),
    "coordinated, ridge, anchor kept, trained": ("expert.coordinate=true", "trunk.anchor=keep"),
    "anchor kept": ("trunk.anchor=keep",),
    "router uniform, then trained": ("router.init=uniform",),
    "router random, then trained": ("router.init=random",),
    "router centroid, then trained": ("router.init=centroid",),
    "router ridge, untrained": ("router.steps=0",),
    "balance: auxiliary loss 0.01": ("router.balance=aux",),
    "balance: selection bias 0.001": ("router.balance=bias", "router.balance_weight=0.001"),
    "top-1": ("router.top_k=1",),
    "top-3": ("router.top_k=3",),
    "margin 1": ("router.margin=1",),
    "margin 8": ("router.margin=8",),
}


def main() -> None:
    """Run everything and write the dated result."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    common = [f"runtime.threads={args.threads}", *args.override]
    runner = Runner(CONFIG, args.files, args.store, common, args.parallel)
    started = time.monotonic()
    runner.run("run")
    cfg = runner.config()
    folder = runner.parts(cfg).folder("evaluate")
    report = read_report((folder / "report.json").read_text("utf-8"))
    ablations = _ablations(runner, cfg)
    added = _added(runner, cfg, args.added, tuple(args.added_override))
    text = _page(args, cfg, report, ablations, added, time.monotonic() - started)
    name = f"parts_vs_dense_{cpu_name().split()[-1].lower()}_{time.strftime('%Y-%m-%d')}.md"
    path = args.out / name
    path.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {path}; the report with curves: {folder / 'report.html'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="JSONL files with text, domain, split")
    parser.add_argument(
        "--added", default="drama", help="the domain that the trunk of the addition never sees"
    )
    parser.add_argument(
        "--store", type=Path, default=Path("store"), help="where artifacts are kept"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks"), help="where the dated result goes"
    )
    parser.add_argument("--threads", type=int, default=1, help="processor threads per job")
    parser.add_argument("--parallel", type=int, default=2, help="jobs side by side")
    parser.add_argument(
        "--override", action="append", default=[], help="a.b=value, for a shorter or a longer run"
    )
    parser.add_argument(
        "--added-override",
        action="append",
        default=[],
        help="a.b=value, for the runs of the addition alone",
    )
    return parser.parse_args()


def _ablations(runner: Runner, cfg: FfnMoeConfig) -> list[dict]:
    """Return the ablations: the stack of every variant on the same documents, against the run's
    own."""
    evaluator = Evaluator(cfg, shards_of(runner.parts(cfg), cfg.partition.names), _say)
    first = next(iter(ABLATIONS))
    out = []
    for name, overrides in ABLATIONS.items():
        runner.run("train_experts", *overrides)
        runner.run("train_router", *overrides)
        variant = runner.config(*overrides)
        stack = assemble(variant, runner.parts(variant))
        evaluator.score(name, stack.trunk, stack.mixture)
        difference, interval = evaluator.scores.difference(name, first)
        out.append(
            {
                "row": name,
                "mean": evaluator.scores.mean(name),
                "interval": evaluator.scores.interval(name),
                "difference": difference,
                "difference_interval": interval,
            }
        )
    return out


def _added(runner: Runner, cfg: FfnMoeConfig, added: str, changes: tuple[str, ...]) -> dict:
    """Return the addition: an expert added to a stack whose trunk never saw its domain, against a
    dense model trained on."""
    before = [d for d in cfg.partition.names if d != added]
    common = (*changes, f"trunk.domains={json.dumps(before)}")
    five, six = (*common, f"expert.domains={json.dumps(before)}"), common
    dense = (
        *common,
        f"expert.domains={json.dumps([added])}",
        "dense.baselines=[path]",
        "router.top_k=1",
    )
    for overrides in (five, six):
        for stage in ("train_shared", "train_experts", "train_router"):
            runner.run(stage, *overrides)
    runner.run("train_router", *six, "router.steps=0")
    runner.run("train_dense", *dense)
    evaluator = Evaluator(cfg, shards_of(runner.parts(cfg), cfg.partition.names), _say)
    trunk, dummy = stored_trunk(runner.config(*six), runner.parts(runner.config(*six)))
    evaluator.score("trunk + dummy, never saw it", trunk, dummy)
    for row, overrides in (
        ("stack before", five),
        ("stack with the added expert, router retrained", six),
        ("stack with the added expert, ridge only (nobody's data)", (*six, "router.steps=0")),
    ):
        variant = runner.config(*overrides)
        stack = assemble(variant, runner.parts(variant))
        evaluator.score(row, stack.trunk, stack.mixture)
    variant = runner.config(*dense)
    parts = runner.parts(variant)
    settings = json.loads((parts.folder("train_dense", "path") / "trunk.json").read_text("utf-8"))
    stored = parts.tensors("train_dense", "model.safetensors", "path")
    model, ffn = open_dense(settings, stored)
    evaluator.score("dense: trunk trained on with the added domain, same tokens", model, ffn)
    rows = []
    for row in evaluator.scores.nats:
        difference, interval = evaluator.scores.difference(row, "stack before")
        rows.append(
            {
                "row": row,
                "bits_per_byte": evaluator.scores.bits_per_byte(row),
                "mean": evaluator.scores.mean(row),
                "difference": difference,
                "difference_interval": interval,
            }
        )
    return {"added": added, "rows": rows, "changes": changes}


def _say(text: str, _share: float | None) -> None:
    print(text, file=sys.stderr)


def _page(
    args: argparse.Namespace,
    cfg: FfnMoeConfig,
    report: LanguageReport,
    ablations: list[dict],
    added: dict,
    seconds: float,
) -> str:
    model, data = report.model, report.data
    arithmetic = "bf16" if uses_bf16(cfg.dtype) else "fp32"
    command = (
        f"`python -m benchmarks.parts_vs_dense ... --threads {args.threads} "
        f"--parallel {args.parallel}`"
    )
    documents = [
        f"{domain} {count} ({data.test_tokens[domain]:,} tokens)"
        for domain, count in data.test_documents.items()
    ]
    head = [
        f"# Parts against dense, {time.strftime('%Y-%m-%d')}",
        "",
        f"{command}, {seconds / 60:.0f} minutes for what was not in the store already.",
        "",
        f"{cpu_name()}, {cores()} cores, {args.threads} thread(s) a job, torch "
        f"{torch.__version__.split('+')[0]}, {arithmetic}. Other work ran on the machine: read no "
        "speed from this page.",
        "",
        f"d {model.d_model}, {model.layers} layers, FFN {model.d_ff}, vocabulary "
        f"{model.vocab_size}, context {model.context_tokens}; {model.active_parameters:,} of "
        f"{model.total_parameters:,} parameters run per token. Trunk {cfg.trunk.tokens:,} tokens, "
        f"each expert {cfg.expert.tokens:,}, router {cfg.router.tokens:,}. One training seed; "
        "intervals (95 %) resample documents, paired between rows; bits per byte, lower is better.",
        "",
        f"Held-out documents per domain: {', '.join(documents)}",
        "",
    ]
    parts = [
        *head,
        *_quality(report),
        *_ablation_table(ablations),
        *_opt_out(report),
        *_addition(added),
        *_routing(report),
        *_active(report),
    ]
    return "\n".join(parts) + "\n"


def _quality(report: LanguageReport) -> list[str]:
    rows = [
        [
            row.name + (f" ({row.axis})" if row.axis else ""),
            *(f"{row.bits_per_byte[domain]:.3f}" for domain in report.domains),
            _spread(row.mean, row.interval),
            "" if row.versus_stack is None else _against(*_pair(row.versus_stack)),
            _share(row.oracle_gain),
            f"{row.active_parameters / 1e6:.2f} M",
            f"{(row.train_tokens or 0) / 1e6:.2f} M",
        ]
        for row in report.quality
    ]
    head = ["row", *report.domains, "mean", "row - stack", "oracle gain", "active", "tokens seen"]
    return ["## Quality: one model for all domains", "", *_table(head, rows)]


def _ablation_table(ablations: list[dict]) -> list[str]:
    rows = [
        [
            each["row"],
            _spread(each["mean"], each["interval"]),
            _against(each["difference"], each["difference_interval"]),
        ]
        for each in ablations
    ]
    return ["## Ablations", "", *_table(["variant", "mean", "variant - shipped"], rows)]


def _opt_out(report: LanguageReport) -> list[str]:
    rows = [
        [row.removed, *(f"{row.ratio[domain]:.3f}" for domain in report.domains)]
        for row in report.opt_out
    ]
    return [
        "## Opt-out: perplexity without an expert over perplexity with it",
        "",
        *_table(["removed", *report.domains], rows),
    ]


def _addition(added: dict) -> list[str]:
    domains = list(added["rows"][0]["bits_per_byte"])
    rows = [
        [
            row["row"],
            *(f"{row['bits_per_byte'][domain]:.3f}" for domain in domains),
            f"{row['mean']:.3f}",
            _against(row["difference"], row["difference_interval"]),
        ]
        for row in added["rows"]
    ]
    head = ["row", *domains, "mean", "row - stack before"]
    changed = [f"These runs alone: {', '.join(added['changes'])}.", ""] if added["changes"] else []
    return [
        f"## Addition: {added['added']} is added; the trunk never saw it",
        "",
        *changed,
        *_table(head, rows),
    ]


def _routing(report: LanguageReport) -> list[str]:
    routing = report.routing
    rows = [
        [
            domain,
            *(f"{x:.0%}" for x in share),
            _share(routing.agreement_by_domain.get(domain)),
        ]
        for domain, share in routing.share.items()
    ]
    line = (
        f"Agreement {routing.agreement:.1%}; entropy {routing.entropy:.3f} of "
        f"{routing.max_entropy:.3f} nats; MaxVio {routing.max_violation:.3f}; least "
        f"{routing.least.expert} {routing.least.share:.1%}, most {routing.most.expert} "
        f"{routing.most.share:.1%}; dead: {', '.join(routing.dead) or 'none'}."
    )
    return [
        "## Routing: where tokens go",
        "",
        *_table(["domain", *report.experts, "agreement"], rows),
        line,
        "",
    ]


def _active(report: LanguageReport) -> list[str]:
    rows = [
        [
            str(row.top_k),
            _spread(row.mean, row.interval),
            f"{row.active_parameters / 1e6:.2f} M",
        ]
        for row in report.active
    ]
    return ["## Active experts, no retraining", "", *_table(["k", "mean", "active"], rows)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


def _spread(mean: float, interval: Interval | None) -> str:
    # none over too few documents
    return f"{mean:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _pair(found: Difference) -> tuple[float, Interval | None]:
    return found.difference, found.interval


def _against(difference: float, interval: Interval | None) -> str:
    return f"{difference:+.4f}" + (f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else "")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


if __name__ == "__main__":
    main()
