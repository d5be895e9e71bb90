"""Run the whole chain on real pictures with a small random model: five tasks, their experts, the
router, the report.

python -m benchmarks.vlm_real --data FOLDER

FOLDER has a folder per task (ocr_receipts, ocr_lines, blood_cells, caption, visual_reasoning), each
with an annotations.jsonl of {"image", "prompt", "answer"} and the pictures. The program writes a
configuration and runs `python -m pipeline run`; nothing else touches the data. Rows are divided by
picture, not as the files propose, as their own test splits are small.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measuring import ROOT, finish, hardware, progress, table

PACKAGES = ("torch", "transformers", "peft", "pillow")
TASKS = {  # name -> metric, longest answer in tokens, what it is
    "ocr_receipts": ("cer", 48, "reads a receipt"),
    "ocr_lines": ("cer", 24, "reads a line of print"),
    "blood_cells": ("count", 24, "counts blood cells"),
    "caption": ("caption", 24, "describes a photograph"),
    "visual_reasoning": ("exact", 8, "judges a sentence about shapes"),
}
NEUTRAL = ["What do you see?", "Look at the picture.", "What is it?", "Answer for this picture."]
HELD = ["What is in the picture?", "Tell me about it."]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is that of the run."""
    args = _arguments(argv)
    missing = [name for name in TASKS if not (args.data / name / "annotations.jsonl").is_file()]
    if missing:
        raise SystemExit(f"--data: {args.data} has no {missing[0]}/annotations.jsonl")
    with _folder(args.work) as work:
        raw = settings(args)
        (work / "run.yaml").write_text(json.dumps(raw, indent=1), "utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "pipeline", "run", "--config", str(work / "run.yaml")]
        start = time.perf_counter()
        progress("python -m pipeline run --config run.yaml --store store")
        done = subprocess.run([*command, "--store", str(work / "store")], cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"the run failed (exit status {done.returncode}); its error is above")
        text = reported(raw, work / "store", time.perf_counter() - start)
    ending = (
        f"{hardware(args.threads, PACKAGES)}. Intervals resample pictures with all their requests "
        "1000 times; they do not cover seeds of training. One seed was run."
    )
    finish(args, "vlm_real", "The whole chain on real pictures", text, _cannot(), ending)
    return 0


def settings(args: argparse.Namespace) -> dict:
    """Return the run: a random base, an expert per task on its own rows, half of the router's
    requests neutral."""
    build = {
        "hidden": args.hidden,
        "layers": 3,
        "heads": args.hidden // 32,
        "kv_heads": args.hidden // 64,
        "head_dim": 32,
        "intermediate": 2 * args.hidden,
        "vision_hidden": 96,
        "vision_layers": 2,
        "vision_heads": 4,
        "vision_intermediate": 192,
        "vocab_size": 1200,
        "initializer_range": args.hidden**-0.5,
        "text": _text(args.data),
    }
    fit = {
        "steps": args.steps,
        "batch_sequences": 8,
        "lr": 2e-3,
        "warmup_steps": min(20, args.steps // 2),
        "r": 16,
        "alpha": 32,
        "dropout": 0.0,
        "max_tokens": 256,
        "checkpointing": False,
        "eval_every_steps": max(1, args.steps // 2),
        "eval_tokens": 4096,
        "neutral_share": 0.3,
    }
    experts = [
        {
            "name": name,
            "label": chr(ord("A") + i),
            "metric": metric,
            "max_new_tokens": longest,
            "description": words,
            "dataset": {
                "source": "jsonl",
                "path": str((args.data / name / "annotations.jsonl").resolve()),
                "fields": {"split": ""},
                "ocr": metric == "cer",
                "test_share": 0.25,
            },
        }
        for i, (name, (metric, longest, words)) in enumerate(TASKS.items())
    ]
    return {
        "name": "real-pictures",
        "family": "lora_vlm",
        "dtype": "fp32",
        "runtime": {"threads": args.threads},
        "loras": {
            "base": {
                "build": build,
                "dtype": "float32",
                "image": {"min_pixels": 4096, "max_pixels": args.pixels},
            },
            "defaults": fit,
            "experts": experts,
            "router": {
                "steps": 2 * args.steps,
                "neutral_share": 0.0,
                "threshold": 0.6,
                "instruction": "Which expert should handle this? Answer with one letter.",
            },
        },
        "dataset": {
            "per_expert": {"train": 240, "valid": 24, "test": args.rows},
            "short": "upsample",
            "ambiguous_share": 0.5,
            "sources": [{"expert": name, "from": "loras"} for name in TASKS],
            "neutral": {"seen": NEUTRAL, "held": HELD},
        },
        "evaluate": {"rows_per_task": args.rows, "consistency_rows": 40},
    }


def _text(folder: Path) -> list[str]:
    """Return what the tokenizer is trained on: the tasks' words, as a real base knows the language
    it is asked in."""
    out = []
    for name in TASKS:
        lines = (folder / name / "annotations.jsonl").read_text("utf-8").splitlines()[::3]
        out += [f"{row['prompt']} {row['answer']}" for row in map(json.loads, lines)]
    return out


def reported(raw: Mapping, folder: Path, seconds: float) -> str:
    """Return the tables of a finished run in a store."""
    from pipeline.families.load import parse
    from pipeline.run.context import StoredParts
    from pipeline.store.artifacts import Store

    cfg = parse(dict(raw))
    parts = StoredParts(cfg, Store(folder))
    report = json.loads((parts.folder("evaluate") / "report.json").read_text("utf-8"))
    dropped = {name: parts.manifest("preprocess", name).metrics for name in cfg.experts}
    left_out = {
        name: json.loads((parts.folder("train_experts", name) / "adapter.json").read_text("utf-8"))[
            "rows"
        ]["train"]
        for name in cfg.experts
    }
    made = [
        [
            name,
            *(f"{m['rows'][split]:,}" for split in ("train", "valid", "test")),
            f"{m['pictures']:,}",
            f"{sum(m['dropped'].values()):,}",
            f"{sum(left_out[name]['dropped'].values()):,}",
        ]
        for name, m in dropped.items()
    ]
    model, image = report["model"], cfg.loras.base.image
    head = ["task", "train", "valid", "test", "pictures", "dropped", "too long to train"]
    return (
        f"A random Qwen3-VL of {model['base_parameters'] / 1e6:.1f} M parameters, pictures of at "
        f"most {image.max_pixels:,} px ({image.max_pixels // 1024} tokens); "
        f"{cfg.loras.defaults.steps} "
        f"steps of {cfg.loras.defaults.batch_sequences} rows per expert, {cfg.loras.router.steps} "
        "for the router. The whole run "
        f"took {seconds:.0f} s.\n\n"
        f"{table(head, made)}\n"
        f"{_routing(report['routing'])}\n{_tasks(report['adapters'], cfg, parts)}\n"
        f"{_answers(report['answers'])}"
    )


def _routing(routing: Mapping) -> str:
    out = ["## Router\n"]
    for each in routing["sets"]:
        rows = []
        for row in each["rows"]:
            ahead = row.get("router_ahead")
            shown = (
                f"{ahead['difference']:+.3f} {_interval(ahead['interval'], '+')}" if ahead else ""
            )
            rows.append(
                [
                    row["name"],
                    f"{row['accuracy']:.3f} {_interval(row['interval'])}",
                    f"{row['top_k_accuracy']:.3f}",
                    f"{abs(row['nats']):.3f}",
                    f"{row['ece']:.3f}",
                    shown,
                ]
            )
        head = [
            "row",
            "accuracy [95 %]",
            f"top-{routing['top_k']}",
            "nats",
            "ECE",
            "router ahead by [95 %]",
        ]
        out.append(f"{each['name']}: {each['requests']} requests.\n\n{table(head, rows)}")
    for name, count in routing["confusion"].items():
        rows = [
            [own, *map(str, counts)] for own, counts in zip(routing["choices"], count, strict=True)
        ]
        out.append(
            f"Confusion of {name} (rows: whose request it "
            f"is):\n\n{table(['', *routing['choices']], rows)}"
        )
    same = [
        [r["change"], str(r["requests"]), "" if r["same"] is None else f"{r['same']:.2f}"]
        for r in routing["consistency"]
    ]
    calibrated = ", ".join(
        f"{c['set']}: ECE {c['ece_before']:.3f} before, {c['ece_after']:.3f} after"
        for c in routing["calibration"]
    )
    out.append(
        f"Calibration (temperature {routing['temperature']:.2f}): {calibrated}. Same expert after "
        "a change:\n"
    )
    return "\n".join([*out, table(["change", "requests", "same"], same)])


def _tasks(adapters: Mapping, cfg, parts) -> str:
    """Return how each expert answers its own task, beside the base and the answer that needs no
    picture."""
    rows = []
    for task in adapters["tasks"]:
        name, scores = task["task"], task["scores"]
        others = [value or 0.0 for other, value in scores.items() if other not in (name, "base")]
        constant, count = _constant(cfg, parts, name)
        figures = ", ".join(
            f"{key} {value:.2f}" for key, value in task["figures"].items() if value is not None
        )
        rows.append(
            [
                name,
                task["metric"],
                str(task["requests"]),
                f"{scores[name]:.3f} {_interval(task['intervals'][name])}",
                f"{constant:.3f} ({count})",
                f"{scores['base']:.3f}",
                f"{max(others):.3f}",
                figures,
            ]
        )
    head = [
        "task",
        "metric",
        "rows",
        "its expert [95 %]",
        "constant (rows)",
        "base",
        "best other",
        "figures",
    ]
    return (
        f"## Experts\n\n{table(head, rows)}\nConstant: always the commonest training answer to the "
        "same prompt (to any, where the prompt is new), over all test rows; it looks at no "
        "picture.\n"
    )


def _constant(cfg, parts, name: str) -> tuple[float, int]:
    """Return the score of always giving the commonest training answer, and over how many rows."""
    from pipeline.data.tasks.prepare import TaskRows
    from pipeline.metrics.answers import judge

    rows = TaskRows(parts.folder("preprocess", name))
    train, test = rows.rows("train"), rows.rows("test")
    asked = {row.prompt: Counter(r.answer for r in train if r.prompt == row.prompt) for row in test}
    every = Counter(row.answer for row in train)
    scores = [
        judge(
            cfg.loras.entry(name).metric,
            (asked[row.prompt] or every).most_common(1)[0][0],
            [row.answer, *map(str, row.extra.get("answers") or ())],
        )["score"]
        for row in test
    ]
    return statistics.mean(scores), len(scores)


def _answers(answers: list[Mapping]) -> str:
    rows = [
        [
            each["set"],
            str(each["all"]["requests"]),
            *(
                f"{each['all'][way]['score']:.3f} {_interval(each['all'][way]['interval'])}"
                for way in ("stack", "oracle", "base")
            ),
        ]
        for each in answers
    ]
    head = ["set", "requests", "stack [95 %]", "right expert [95 %]", "base [95 %]"]
    return f"## Stack\n\n{table(head, rows)}"


def _interval(ends, sign: str = "") -> str:
    return "" if ends is None else f"[{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]"


def _cannot() -> str:
    return (
        "What this cannot show: the base is random, its vision tower never trained, and pictures "
        "are shrunk to a few tokens. Such a model cannot learn to read print, to describe a "
        "photograph or to check a "
        "sentence against shapes. An expert above the constant has learnt something crude (how "
        "full of cells a picture looks, how long "
        "a line is); one that is no better has learnt the answers' form and frequencies and "
        "nothing of the picture. The router's task is easier, as the five kinds of pictures look "
        "nothing alike (see how far a regression on "
        "the frozen random base's features comes), and its numbers say nothing of tasks that share "
        "a kind of picture. Receipts and lines come from the same shops, and shops are not kept "
        "apart. What it does show: real files go "
        "through the whole chain as they are, and every number comes with its baseline.\n"
    )


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Yield the folder to work in: the given one, which stays, or one that goes."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help=f"with {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep configuration and store here"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=150,
        help="per expert, twice for the router (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, default=40, help="judged of each task and split (default: %(default)s)"
    )
    parser.add_argument(
        "--pixels",
        type=int,
        default=32_768,
        help="largest area of a picture (default: %(default)s)",
    )
    parser.add_argument(
        "--hidden", type=int, default=192, help="width of the base, times 64 (default: %(default)s)"
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
