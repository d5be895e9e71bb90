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

from pipeline.config.text_data import TextRunConfig
from pipeline.data.text import tokenizer as tokenizers
from pipeline.data.text.documents import Document, documents, drop_stats
from pipeline.data.text.prepare import make_tokenizer, prepare
from pipeline.data.text.survey import survey
from pipeline.hardware import cpu_name
from pipeline.store.looking import FileSums, Looking

TARGET = 0.8  # of the rate of encode_batch_fast alone
WHOLE = "ours: whole preprocess"
WRITE = "ours: write pass"
ALONE = "encode_batch_fast alone"
MAP = "datasets.map"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 when the target is missed."""
    args = _arguments(argv)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        cfg = _pinned(_config(args), Path(scratch))
        found = list(documents(cfg, drop_stats()))
        for number in range(args.rounds + 1):
            rounds.append(_round(cfg, found, Path(scratch) / str(number), args.map))
    # The first one fills the page cache and imports what the others find imported
    rounds = rounds[1:]
    megabytes = sum(document.bytes for document in found) / 1e6
    table = _table(rounds, megabytes, len(found))
    print(table)
    if args.out:
        args.out.write_text(_report(table, args))
    share = statistics.median(seconds[ALONE] / seconds[WRITE] for seconds in rounds)
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


def _config(args: argparse.Namespace) -> TextRunConfig:
    data = {"megabytes_per_domain": args.megabytes}
    partition = {}
    if args.files:
        paths = [str(Path(file).resolve()) for file in args.files]
        data |= {
            "source": "files",
            "files": [{"paths": paths}],
            "label_field": args.label,
            "split_field": args.split,
        }
        partition = {"domains": _labels(data), "min_tokens": 1}
    raw = {"data": data, "partition": partition, "tokenizer": {"vocab_size": args.vocab}}
    return TextRunConfig.model_validate(raw)


def _labels(data: dict) -> list[str]:
    """Return every label in the files."""
    # A run that wants labels which no document has is told of the others
    raw = {"data": data, "partition": {"domains": ["none", "of-these"]}}
    return sorted(survey(TextRunConfig.model_validate(raw), Looking(FileSums())).others)


def _pinned(cfg: TextRunConfig, scratch: Path) -> TextRunConfig:
    """Return cfg with the tokenizer it trains taken as given, so that every contender only
    encodes."""
    folder = scratch / "tokenizer"
    folder.mkdir()
    make_tokenizer(cfg, survey(cfg, Looking(FileSums())), folder)
    tokenizer = cfg.tokenizer.model_copy(update={"pretrained": str(folder)})
    return cfg.model_copy(update={"tokenizer": tokenizer})


def _round(
    cfg: TextRunConfig, found: list[Document], folder: Path, with_map: bool
) -> dict[str, float]:
    """Return seconds of each contender."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    start = time.perf_counter()
    # In a folder of its own, so that every round reads the files for itself
    there = survey(cfg, Looking(FileSums(), folder=folder / "sources"))
    make_tokenizer(cfg, there, tokenizer)
    write = 0.0
    for domain in cfg.partition.names:
        of_domain = folder / domain
        of_domain.mkdir()
        metrics = prepare(cfg, there, domain, tokenizer, of_domain)
        write += metrics["seconds"]["write"]
    whole = time.perf_counter() - start
    seconds = {WHOLE: whole, WRITE: write, ALONE: _encode_alone(cfg, found)}
    if with_map:
        seconds[MAP] = _mapped(cfg, found, folder)
    return seconds


def _encode_alone(cfg: TextRunConfig, found: list[Document]) -> float:
    tokenizer = tokenizers.pretrained(cfg.tokenizer.pretrained)
    texts = [document.text for document in found]
    start = time.perf_counter()
    tokenizer.encode(texts)
    return time.perf_counter() - start


def _mapped(cfg: TextRunConfig, found: list[Document], folder: Path) -> float:
    """Time the usual recipe: a datasets.Dataset in memory, mapped in batches by a fast tokenizer,
    saved as Arrow."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    # It warns of texts over model_max_length
    logging.getLogger("transformers").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    encode = PreTrainedTokenizerFast.from_pretrained(cfg.tokenizer.pretrained)
    rows = datasets.Dataset.from_dict({"text": [document.text for document in found]})
    start = time.perf_counter()
    out = rows.map(
        lambda batch: {"ids": encode(batch["text"], return_attention_mask=False)["input_ids"]},
        batched=True,
        remove_columns=["text"],
        # A result of an earlier round must not be taken from the cache
        load_from_cache_file=False,
        new_fingerprint=f"preprocess-{folder.name}",
    )
    out.save_to_disk(str(folder / "arrow"))
    return time.perf_counter() - start


def _table(rounds: list[dict[str, float]], megabytes: float, pieces: int) -> str:
    lines = [
        f"{megabytes:.1f} MB in {pieces} documents, {len(rounds)} rounds after a warm-up.",
        "",
        "| contender | median s | least s | most s | MB/s | rate over encode alone, median of "
        "rounds |",
        "|---|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        seconds = [each[name] for each in rounds]
        median = statistics.median(seconds)
        ratio = statistics.median(each[ALONE] / each[name] for each in rounds)
        lines.append(
            f"| {name} | {median:.3f} | {min(seconds):.3f} | {max(seconds):.3f} "
            f"| {megabytes / median:.2f} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _report(table: str, args: argparse.Namespace) -> str:
    command = ["python benchmarks/preprocess.py"]
    command += [Path(file).name for file in args.files]
    for name in ("split", "megabytes"):
        value = getattr(args, name)
        if value:
            command.append(f"--{name} {value}")
    command.append(f"--rounds {args.rounds} --vocab {args.vocab}")
    packages = []
    for name in ("tokenizers", "numpy", "datasets", "transformers"):
        packages.append(f"{name} {version(name)}")
    return (
        f"# Preprocess, {time.strftime('%Y-%m-%d')}\n\n"
        f"`{' '.join(command)}`\n\n{table}\n"
        f"Target: the write pass (read, hash, encode, write) at {TARGET:.0%} or more of "
        "encode_batch_fast alone, which neither reads nor writes. "
        '"Whole preprocess" adds the survey; no contender trains a tokenizer.\n\n'
        f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; "
        f"Python {platform.python_version()}, {', '.join(packages)}.\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
