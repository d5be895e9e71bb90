"""Train the router on requests of text alone, the ten domains of CLINC150, and judge it beside
TF-IDF.

python -m benchmarks.routing_text --data clinc150.jsonl

Rows are {"text", "domain", "split"}; those of the split train are divided by hash into train and
valid, all others are the test. Goes the pipeline's own way: the routing set by its generator, the
router by its training, the tables by its evaluation. The base is random and was never shown a word,
so the router's number is a floor and not what Qwen3-VL would reach; TF-IDF with a logistic
regression is a strong baseline on this data.

N requests, C choices.
"""

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import finish, hardware, progress, table, write_files

PACKAGES = ("torch", "transformers", "peft", "scikit-learn", "numpy")
OUTSIDE = "out_of_scope"  # of every domain: only for what confidence tells
VALID_SHARE = 0.1


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(argv)
    rows = read(args.data, args.limit)
    with tempfile.TemporaryDirectory() as scratch:
        text = measured(rows, Path(scratch), args)
    ending = (
        f"{hardware(args.threads, PACKAGES)}. Intervals resample requests 1000 times, paired "
        "between rows; they do not "
        "cover seeds of training. One seed was run."
    )
    finish(args, "routing_text", "Routing text over ten domains", text, "", ending)
    return 0


def read(file: Path, limit: int | None = None) -> list[dict]:
    """Return the rows of a file as routing rows, at most `limit` of each domain and split. Raises
    SystemExit."""
    out, taken = [], {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"--data: {file} cannot be read: {error.strerror}") from None
    for number, raw in enumerate(map(json.loads, lines)):
        missing = {"text", "domain", "split"} - raw.keys()
        if missing:
            raise SystemExit(f"--data: line {number + 1} has no {', '.join(sorted(missing))}")
        split = _split(raw["text"]) if raw["split"] == "train" else "test"
        key = raw["domain"], split
        taken[key] = taken.get(key, 0) + 1
        if limit is None or taken[key] <= limit:
            out.append(
                {"id": str(number), "prompt": raw["text"], "expert": raw["domain"], "split": split}
            )
    return out


def _split(text: str) -> str:
    hashed = (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
    )
    return "valid" if hashed < VALID_SHARE else "train"


@dataclass(frozen=True)
class Parts:
    """What the family asks earlier stages for, from a plain folder; no task has rows of its own
    here."""

    root: Path

    def folder(self, stage: str, item: str | None = None) -> Path:
        """Return the folder of a stage's files."""
        return self.root / stage


def settings(rows: list[dict], root: Path, args: argparse.Namespace) -> dict:
    """Return the run: an expert per domain, a random base whose tokenizer is trained on the
    training requests."""
    domains = sorted({row["expert"] for row in rows} - {OUTSIDE})
    build = {
        "hidden": args.hidden,
        "layers": 2,
        "heads": args.hidden // 32,
        "kv_heads": args.hidden // 64,
        "head_dim": 32,
        "intermediate": 2 * args.hidden,
        "vocab_size": args.vocab,
        "initializer_range": args.hidden**-0.5,
        "text": [row["prompt"] for row in rows if row["split"] == "train"],
    }
    fit = {
        "steps": args.steps,
        "batch_sequences": 32,
        "lr": 2e-3,
        "warmup_steps": 50,
        "dropout": 0.0,
        "r": 32,
        "alpha": 64,
        "max_tokens": 128,
        "checkpointing": False,
        "eval_every_steps": max(1, args.steps // 6),
    }
    counts = {
        split: max(
            sum(r["split"] == split and r["expert"] == name for r in rows) for name in domains
        )
        for split in ("train", "valid", "test")
    }
    unused = {"source": "synthetic", "synthetic": {"kind": "color"}}
    experts = [
        {"name": name, "label": chr(ord("A") + i), "dataset": unused}
        for i, name in enumerate(domains)
    ]
    return {
        "name": "routing-text",
        "family": "lora_vlm",
        "dtype": "fp32",
        "runtime": {"threads": args.threads},
        "loras": {
            "base": {
                "build": build,
                "dtype": "float32",
                "image": {"min_pixels": 4096, "max_pixels": 4096},
            },
            "defaults": fit,
            "experts": experts,
            "router": {"instruction": "Route this:"},
        },
        "dataset": {
            "per_expert": counts,
            "short": "accept",
            "ambiguous_share": 0.0,
            "sources": [
                {"expert": n, "from": "jsonl", "path": str(root / f"{n}.jsonl")} for n in domains
            ],
        },
        "evaluate": {"rows_per_task": None, "consistency_rows": 0},
    }


def measured(rows: list[dict], root: Path, args: argparse.Namespace) -> str:
    """Make the routing set, train the router, and return the tables."""
    import torch

    from pipeline.data.routing.dataset import generate
    from pipeline.families.adapters.eval_data import AdapterEvaluator
    from pipeline.families.adapters.routing_eval import routed_sets, routing
    from pipeline.families.load import parse
    from pipeline.families.lora_vlm import family

    torch.set_num_threads(args.threads)
    for name in {row["expert"] for row in rows}:
        own = [json.dumps(row) for row in rows if row["expert"] == name]
        (root / f"{name}.jsonl").write_text("\n".join(own) + "\n", "utf-8")
    cfg, parts = parse(settings(rows, root, args)), Parts(root)
    for stage in ("preprocess", "train_shared", "routing", "train_router"):
        parts.folder(stage).mkdir()
    (root / "preprocess" / "rows.jsonl").write_text("")
    family.shared(cfg, parts).write(parts.folder("train_shared"))
    generate(cfg.dataset, {}, cfg.loras.labels, parts.folder("routing"))
    metrics = _trained(cfg, parts)
    progress("evaluating")
    bench = AdapterEvaluator(cfg, parts, _stack(cfg, parts), lambda text, _share: None)
    tables = routing(bench, routed_sets(bench))
    return _report(cfg, tables, metrics, _outside(bench, rows))


def _trained(cfg, parts: Parts) -> dict:
    """Fit the router as its job does and keep its files; return metrics."""
    from pipeline.families.lora_vlm import family
    from pipeline.store.history import Recorder
    from pipeline.train.loop import TrainIO, fit

    start = time.perf_counter()
    task = family.router(cfg, parts)
    recorder = Recorder(parts.root / "history.jsonl", job="router", total_steps=task.steps)
    metrics = fit(
        task, TrainIO(parts.root / "slots", recorder, lambda: None, "router", "loras.router")
    )
    recorder.close()
    write_files(task.export(metrics["kept_step"]), parts.folder("train_router"))
    return metrics | {"all_s": time.perf_counter() - start, "rank": task.options.r}


def _stack(cfg, parts: Parts):
    """Return a stack whose experts are there by name alone: only its router is asked."""
    from pipeline.families.adapters import peft_io
    from pipeline.families.adapters.inference import MultiAdapterModel
    from pipeline.families.adapters.router import Calibration
    from pipeline.families.adapters.stack import (
        ROUTER,
        AdapterStack,
        ExpertInfo,
        limits_of,
        policy_of,
    )
    from pipeline.families.lora_vlm.base import open_base

    opened, router = (
        open_base(parts.folder("train_shared"), cfg.loras.base),
        parts.folder("train_router"),
    )
    model = peft_io.load(opened.model, router, ROUTER, opened.pin)
    for entry in cfg.loras.experts:
        model = peft_io.add(model, entry.name, cfg.loras.defaults.model_copy(update={"r": 1}))
    loaded = MultiAdapterModel(model.requires_grad_(False), opened.chat, limits_of(cfg))
    experts = [ExpertInfo.of(entry) for entry in cfg.loras.experts]
    return AdapterStack(loaded, experts, Calibration.read(router), policy_of(cfg))


def _outside(bench, rows: list[dict]) -> dict | None:
    """Return how well low confidence tells requests of no domain from the test's; None without."""
    import numpy as np

    from pipeline.families.adapters.inference import Request
    from pipeline.metrics.routing import auroc, softmax

    strange = [Request(row["prompt"]) for row in rows if row["expert"] == OUTSIDE]
    if not strange:
        return None
    known = bench.logits(bench.routed("test"))
    logit_NC = np.concatenate([known, bench.stack.logits(strange)])
    confidence_N = softmax(logit_NC, bench.stack.calibration.temperature).max(1)
    return {
        "requests": len(strange),
        "auroc": auroc(-confidence_N, np.arange(len(logit_NC)) >= len(known)),
    }


def _report(cfg, tables, metrics: dict, outside: dict | None) -> str:
    from pipeline.report.format import interval

    test = tables.sets[0]
    rows = []
    for row in test.rows:
        ahead = ""
        if row.router_ahead is not None:
            spread = interval(row.router_ahead.interval)
            ahead = f"{row.router_ahead.difference:+.3f} {spread}"
        rows.append(
            [
                {"text only": "TF-IDF, logistic regression"}.get(row.name, row.name),
                f"{row.accuracy:.3f} {interval(row.interval)}",
                f"{row.top_k_accuracy:.3f}",
                f"{row.nats:.3f}",
                f"{row.ece:.3f}",
                ahead,
            ]
        )
    head = [
        "router or baseline",
        "accuracy [95 %]",
        f"top-{tables.top_k}",
        "nats",
        "ECE",
        "router ahead by [95 %]",
    ]
    recall = [
        [name, f"{share:.3f}"]
        for name, share in zip(tables.choices, tables.recall[test.name], strict=True)
    ]
    calibration, build = tables.calibration[0], cfg.loras.base.build
    said = (
        f"Requests of no domain ({outside['requests']} of them, none trained with) by low "
        f"confidence: AUROC {outside['auroc']:.3f}.\n"
        if outside
        else ""
    )
    return (
        f"{test.requests:,} test requests of {len(tables.choices)} domains. Router: rank "
        f"{metrics['rank']} on a random base of width {build.hidden}, {build.layers} layers and "
        f"{build.vocab_size} tokens, {metrics['steps']:,} steps of "
        f"{cfg.loras.defaults.batch_sequences} requests, "
        f"{metrics['all_s']:.0f} s.\n\n"
        f"{table(head, rows)}\n{table(['domain', 'recall'], recall)}\n"
        f"Calibration: temperature {tables.temperature:.2f} from the validation requests; ECE "
        f"{calibration.ece_before:.3f} before and {calibration.ece_after:.3f} after, nats "
        f"{calibration.nats_before:.3f} and {calibration.nats_after:.3f}.\n{said}"
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="rows of text, domain and split",
    )
    parser.add_argument(
        "--steps", type=int, default=1200, help="of training (default: %(default)s)"
    )
    parser.add_argument(
        "--hidden", type=int, default=256, help="width of the base, times 64 (default: %(default)s)"
    )
    parser.add_argument(
        "--vocab", type=int, default=4000, help="tokens of the base (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, help="rows of each domain and split at most, to try the program out"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of the processor (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="also write the dated result here"
    )
    args = parser.parse_args(argv)
    if args.hidden < 64 or args.hidden % 64:
        parser.error("--hidden must be a multiple of 64")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
