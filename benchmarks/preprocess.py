"""Measure preprocess against encode_batch_fast alone and against datasets.map, on the same text and
tokenizer.

Rounds alternate the three, so that a busy machine slows all of them; the claim is the median ratio.
Run: python benchmarks/preprocess.py [files ...] [--label domain] [--split split] [--out file.md]
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.data.text.documents import Document, Stream, documents, drop_stats
from pipeline.data.text.prepare import prepare
from pipeline.families.ffn_moe.config import FfnMoeConfig

TARGET = 0.8  # of the rate of encode_batch_fast alone
ROWS = ("ours: whole preprocess", "ours: write pass", "encode_batch_fast alone", "datasets.map")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 when the target is missed."""
    args = _arguments(argv)
    with tempfile.TemporaryDirectory() as scratch:
        cfg = _pinned(_config(args), Path(scratch))
        found = list(documents(cfg, drop_stats()))
        megabytes = sum(d.bytes for d in found) / 1e6
        rounds = [
            _round(cfg, found, Path(scratch) / str(i), args.map) for i in range(args.rounds + 1)
        ][1:]
    table = _table(rounds, megabytes, len(found))
    print(table)
    if args.out:
        args.out.write_text(_report(table, args))
    share = statistics.median(r[ROWS[2]] / r[ROWS[1]] for r in rounds)
    return int(share < TARGET)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="*", help="globs as in data.files; none: the installed corpus"
    )
    parser.add_argument("--label", default="domain", help="data.label_field")
    parser.add_argument("--split", help="data.split_field; none: by hash")
    parser.add_argument("--megabytes", type=float, help="data.megabytes_per_domain")
    parser.add_argument(
        "--vocab", type=int, default=4096, help="entries of the tokenizer trained first"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="measured rounds after one that is thrown away"
    )
    parser.add_argument("--no-map", dest="map", action="store_false", help="leave datasets.map out")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def _config(args: argparse.Namespace) -> FfnMoeConfig:
    data = {"megabytes_per_domain": args.megabytes}
    partition = {}
    if args.files:
        files = [{"paths": [str(Path(f).resolve()) for f in args.files]}]
        data |= {
            "source": "files",
            "files": files,
            "label_field": args.label,
            "split_field": args.split,
        }
        partition = {"domains": _labels(data), "min_tokens": 1}
    return FfnMoeConfig.model_validate(
        {"data": data, "partition": partition, "tokenizer": {"vocab_size": args.vocab}}
    )


def _labels(data: dict) -> list[str]:
    """Return every label in the files."""
    probe = FfnMoeConfig.model_validate(
        {"data": data, "partition": {"domains": ["none", "of-these"]}}
    )
    stream = Stream(probe, drop_stats())
    for _ in stream:
        pass
    return sorted(stream.other_labels)


def _pinned(cfg: FfnMoeConfig, scratch: Path) -> FfnMoeConfig:
    """Return cfg with the tokenizer it trains taken as given, so that every contender only encodes."""
    folder = scratch / "tokenizer"
    folder.mkdir()
    prepare(cfg, folder)
    return cfg.model_copy(
        update={"tokenizer": cfg.tokenizer.model_copy(update={"pretrained": str(folder)})}
    )


def _round(
    cfg: FfnMoeConfig, found: list[Document], folder: Path, with_map: bool
) -> dict[str, float]:
    """Return seconds of each contender."""
    folder.mkdir()
    start = time.perf_counter()
    metrics = prepare(cfg, folder)
    seconds = {ROWS[0]: time.perf_counter() - start, ROWS[1]: metrics["seconds"]["write"]}
    seconds[ROWS[2]] = _bare(cfg, found)
    if with_map:
        seconds[ROWS[3]] = _mapped(cfg, found, folder)
    return seconds


def _bare(cfg: FfnMoeConfig, found: list[Document]) -> float:
    from pipeline.data.text import tokenizer

    model, texts = tokenizer.pretrained(cfg.tokenizer.pretrained), [d.text for d in found]
    start = time.perf_counter()
    model.encode(texts)
    return time.perf_counter() - start


def _mapped(cfg: FfnMoeConfig, found: list[Document], folder: Path) -> float:
    """Time the usual recipe: a datasets.Dataset in memory, mapped in batches by a fast tokenizer,
    saved as Arrow."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    logging.getLogger("transformers").setLevel(
        logging.ERROR
    )  # it warns of texts over model_max_length
    datasets.disable_progress_bars()
    encode = PreTrainedTokenizerFast.from_pretrained(cfg.tokenizer.pretrained)
    rows = datasets.Dataset.from_dict({"text": [d.text for d in found]})
    start = time.perf_counter()
    out = rows.map(
        lambda batch: {"ids": encode(batch["text"], return_attention_mask=False)["input_ids"]},
        batched=True,
        remove_columns=["text"],
        load_from_cache_file=False,
        new_fingerprint=f"preprocess-{folder.name}",
    )
    out.save_to_disk(str(folder / "arrow"))
    return time.perf_counter() - start


def _table(rounds: list[dict[str, float]], megabytes: float, pieces: int) -> str:
    lines = [
        f"{megabytes:.1f} MB in {pieces} documents, {len(rounds)} rounds after a warm-up.",
        "",
        "| contender | median s | least s | most s | MB/s | rate over encode alone, median of rounds |",
        "|---|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        seconds = [r[name] for r in rounds]
        median = statistics.median(seconds)
        ratio = statistics.median(r[ROWS[2]] / r[name] for r in rounds)
        lines.append(
            f"| {name} | {median:.3f} | {min(seconds):.3f} | {max(seconds):.3f} "
            f"| {megabytes / median:.2f} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _report(table: str, args: argparse.Namespace) -> str:
    command = " ".join(["python benchmarks/preprocess.py", *(Path(f).name for f in args.files)])
    options = [
        f"--{name} {value}" for name in ("split", "megabytes") if (value := getattr(args, name))
    ]
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("tokenizers", "numpy", "datasets", "transformers")
    )
    return (
        f"# Preprocess, {time.strftime('%Y-%m-%d')}\n\n"
        f"`{' '.join([command, *options])} --rounds {args.rounds} --vocab {args.vocab}`\n\n{table}\n"
        f"Target: the write pass (read, hash, encode, write) at {TARGET:.0%} or more of encode_batch_fast alone, which "
        'neither reads nor writes. "Whole preprocess" adds the first pass; no contender trains a tokenizer.\n\n'
        f"{_cpu()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; "
        f"Python {platform.python_version()}, {packages}.\n"
    )


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
