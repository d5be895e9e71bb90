"""A domain comes, goes, and another gets corrected text: what stays, what moves, what it costs.

python -m benchmarks.domains_come_and_go texts/*.jsonl --work FOLDER

Each file is a domain of its own name, with the fields text and split (train, valid, test). All is
done by the product's own commands: a run of all domains but --guest; `add` of that one; a dense
model trained on it alone, from the same base and with the same tokens; `remove`; then `replace` of
--corrected by its text with every number masked. After each command addresses, bytes, logits and
bits per byte are held against those before, and the dated page is written anew. What is in the
store of --work is not done again. The exit status is 1 when an aim was missed or a command failed.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.domain_parts.page import Page
from benchmarks.domain_parts.scores import ByDomainScores
from benchmarks.domain_parts.state import State
from benchmarks.measuring import hardware, progress
from benchmarks.runner import StageFailed, typed
from pipeline.config.base import merge
from pipeline.config.files import assigned
from pipeline.errors import PipelineError
from pipeline.families.ffn_moe.networks import rival_rows
from pipeline.families.ffn_moe.parts import shards_of, stored_trunk, training_tokens
from pipeline.families.ffn_moe.stages import SEARCHES
from pipeline.hardware import cores, cpu_name, uses_bf16
from pipeline.run.domain_words import ABOUT
from pipeline.store.artifacts import Store

CONFIG = Path(__file__).with_suffix(".yaml")
PACKAGES = ("torch", "transformers")
NUMBER = re.compile(r"\d+")
MASK = "#"


class Benchmark:
    """One run and what becomes of it."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args = args
        self.work = work
        self.file = work / "run.yaml"
        self.store = Store(work / "store")
        self.texts = {file.stem: file.resolve() for file in args.files}
        self.domains = tuple(name for name in self.texts if name != args.guest)
        self.page = Page(self.domains, args.guest, args.corrected)
        self.started = time.monotonic()

    def run(self) -> bool:
        """Do everything, write the page after each command; return whether every aim is reached."""
        self.file.write_text(_as_yaml(self._settings()), "utf-8")
        self._typed("run")
        before = State(self.file, self.store)
        logits = before.logits()
        seconds = self._typed("add", self.args.guest, "--paths", self._text(self.args.guest))
        after = State(self.file, self.store)
        dense = self._dense()
        scores = self._scores_added(before, after, dense)
        self.page.add_guest(before, after, dense, scores, seconds)
        self._write(after, scores)
        self._typed("remove", self.args.guest)
        back = State(self.file, self.store)
        same = _same_bits(logits, back.logits())
        self.page.remove_guest(before, back, same)
        self._write(after, scores)
        self._typed("replace", self.args.corrected, "--paths", str(self._corrected()))
        replaced = State(self.file, self.store)
        self.page.replace(back, replaced, self._scores_replaced(back, replaced, scores))
        self._write(after, scores, whole=True)
        return self.page.reached

    def _settings(self) -> dict:
        """Return what the run's file says: everything else is of the configuration it extends."""
        files = []
        for name in self.domains:
            files.append({"paths": [self._text(name)], "domain": name})
        raw: dict[str, Any] = {
            "extends": str(self.args.config.resolve()),
            "data": {"source": "files", "split_field": "split", "files": files},
            "partition": {"domains": list(self.domains)},
            "trunk": {"domains": list(self.args.general)},
            "dense": {"baselines": []},
        }
        if self.args.expert_tokens is not None:
            raw["expert"] = {"tokens": self.args.expert_tokens}
        for change in self.args.override:
            raw = merge(raw, assigned(change, "--override"))
        return raw

    def _text(self, name: str) -> str:
        return str(self.texts[name])

    def _typed(self, command: str, *words: str) -> float:
        """Carry out a command on the run; return its seconds."""
        progress(f"{command} {' '.join(words[:1])}")
        whole = [command, *words, "--config", str(self.file), "--store", str(self.store.root)]
        if command in ABOUT:
            whole.append("--yes")
        return typed([*whole, "--parallel", str(self.args.parallel)])

    def _dense(self) -> State:
        """Train a dense model on the guest alone; return the run that it is a baseline of."""
        overrides = ("dense.baselines=[total]", f"dense.domains=[{self.args.guest}]")
        cfg = State(self.file, self.store, overrides).cfg
        for stage in (SEARCHES["train_dense"], "train_dense"):
            if cfg.items(stage):
                changes = []
                for change in overrides:
                    changes += ["--override", change]
                self._typed(stage, *changes)
        return State(self.file, self.store, overrides)

    def _scores_added(self, before: State, after: State, dense: State) -> ByDomainScores:
        page, guest = self.page, self.args.guest
        scores = ByDomainScores(after, self.args.tokens)
        scores.add(page.BASE, *stored_trunk(after.cfg, after.parts))
        stack = before.stack()
        scores.add(page.without, stack.trunk, stack.mixture)
        stack = after.stack()
        scores.add(page.with_guest, stack.trunk, stack.mixture)
        scores.add(page.expert, stack.trunk, stack.experts[guest], [guest])
        shards = shards_of(dense.parts, dense.cfg.partition.names)
        (row,) = rival_rows(dense.cfg, dense.parts, training_tokens(shards))
        scores.add(page.dense, row.trunk, row.ffn)
        return scores

    def _corrected(self) -> Path:
        """Write the corrected text: every number of every document masked; return its file."""
        path = self.work / "corrected" / f"{self.args.corrected}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for line in self.texts[self.args.corrected].read_text("utf-8").splitlines():
            row = json.loads(line)
            row["text"] = NUMBER.sub(MASK, row["text"])
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        path.write_text("".join(rows), "utf-8")
        return path

    def _scores_replaced(
        self, before: State, after: State, known: ByDomainScores
    ) -> ByDomainScores:
        page, corrected = self.page, self.args.corrected
        scores = ByDomainScores(after, self.args.tokens)
        # The others' documents are the same ones, which the page checks by their addresses
        rest = [name for name in self.domains if name != corrected]
        scores.add(page.BASE, *stored_trunk(after.cfg, after.parts), [corrected])
        stack = before.stack()
        scores.add(page.former, stack.trunk, stack.mixture, [corrected])
        for row, as_known in ((page.BASE, page.BASE), (page.former, page.without)):
            scores.take(known, row, rest, as_known)
        stack = after.stack()
        scores.add(page.latter, stack.trunk, stack.mixture)
        return scores

    def _write(self, state: State, scores: ByDomainScores, whole: bool = False) -> None:
        """Write the page of what is there so far."""
        processor = cpu_name().split()[-1].lower()
        date = time.strftime("%Y-%m-%d")
        minutes = (time.monotonic() - self.started) / 60
        unfinished = "" if whole else "**Not complete: what follows is missing.**\n\n"
        text = (
            f"# Domains come and go, {date}\n\n{unfinished}`{_command(self.args)}`, "
            f"{minutes:.0f} minutes.\n\n{self._conditions(state)} {scores.told()}\n\n"
            f"{self.page.text()}"
        )
        self.args.out.mkdir(parents=True, exist_ok=True)
        path = self.args.out / f"domains_come_and_go_{processor}_{date}.md"
        path.write_text(text, encoding="utf-8")
        if whole:
            print(self.page.text())

    def _conditions(self, state: State) -> str:
        cfg = state.cfg
        tokens = state.manifest(f"train_experts {self.args.guest}").metrics["tokens"]
        form = cfg.expert.form.replace("_", " ")
        rank = f" of rank {cfg.expert.rank}" if cfg.expert.rank else ""
        trunk = cfg.trunk.init or "from zero"
        arithmetic = "bf16" if uses_bf16(cfg.dtype) else "fp32"
        return (
            f"{hardware(cores(), PACKAGES)}, {arithmetic}; {self.args.parallel} jobs side by side "
            f"where a stage has several.\n\nTrunk {trunk}, its text {', '.join(self.args.general)} "
            f"(trunk.domains); experts of {', '.join(self.domains)}, {form}{rank}, {tokens:,} "
            f"tokens each at a rate of {cfg.expert.lr}, router {cfg.router.init} top-"
            f"{cfg.router.top_k}, context {cfg.trunk.context_tokens}. One training seed. Intervals "
            "(95 %) resample documents, paired between rows."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, write the dated page and return the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(cores())
    with ExitStack() as stack:
        work = args.work
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        try:
            return int(not Benchmark(args, work.resolve()).run())
        except (PipelineError, StageFailed) as error:
            progress(str(error))
            return 1


def _as_yaml(raw: dict[str, Any], before: str = "") -> str:
    """Return settings as a person writes them: a line each, in sections."""
    lines = ""
    for key, value in raw.items():
        if isinstance(value, dict):
            lines += f"{before}{key}:\n{_as_yaml(value, before + '  ')}"
        else:
            lines += f"{before}{key}: {json.dumps(value, ensure_ascii=False)}\n"
    return lines


def _same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[int, int]:
    """Return how many logits there are, and how many of them are another number than before."""
    assert before.keys() == after.keys(), "the two stacks are of other domains"
    count = 0
    different = 0
    for name, logits in before.items():
        count += logits.numel()
        different += int((logits.view(torch.int32) != after[name].view(torch.int32)).sum())
    return count, different


def _command(args: argparse.Namespace) -> str:
    words = ["python -m benchmarks.domains_come_and_go ..."]
    if args.config != CONFIG:
        words.append(f"--config {args.config.name}")
    words += [f"--guest {args.guest}", f"--corrected {args.corrected}"]
    words += [f"--general {' '.join(args.general)}", f"--tokens {args.tokens}"]
    if args.expert_tokens is not None:
        words.append(f"--expert-tokens {args.expert_tokens}")
    words += [f"--override {change}" for change in args.override]
    words.append(f"--parallel {args.parallel}")
    return " ".join(words)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSONL files with text and split")
    parser.add_argument("--guest", default="drama", help="who comes and goes (%(default)s)")
    parser.add_argument("--corrected", default="legal", help="whose text is replaced (%(default)s)")
    parser.add_argument(
        "--general",
        nargs="+",
        default=["wiki", "math", "code"],
        help="trunk.domains: of these none can be replaced alone (default: %(default)s)",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="what the run extends")
    parser.add_argument("--expert-tokens", type=int, help="of each expert (default: the file's)")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="held-out tokens a domain (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="keep run and store here (default: nowhere)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks"), help="where the dated page goes"
    )
    parser.add_argument("--parallel", type=int, default=2, help="jobs side by side")
    parser.add_argument("--override", action="append", default=[], help="a.b=value of the run")
    args = parser.parse_args(argv)
    names = [file.stem for file in args.files]
    for name in (args.guest, args.corrected, *args.general):
        if names.count(name) != 1:
            parser.error(f"{name}: name one file that is called {name}.jsonl")
    if {args.guest, args.corrected} & set(args.general) or args.guest == args.corrected:
        parser.error("--guest, --corrected and --general: these are domains apart")
    return args


if __name__ == "__main__":
    sys.exit(main())
