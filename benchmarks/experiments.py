"""Makes the dated page of experiments that were made at a smaller scale than the reference set-up:
all of their tables, and by which factor each setting is smaller.

python -m pipeline experiments --config config/experiments_real.yaml
python -m benchmarks.experiments store/experiments/experiments_real/experiment_results.json \\
  --out benchmarks/experiments_epyc_2026-11-27.md

Nothing is measured here. Settings are those that trials resolved to, on either side; what a trial
changes of its base is in the tables.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, table
from pipeline import report
from pipeline.report.experiments import flat
from pipeline.report.schema.experiments import RESULTS, ExperimentResults
from pipeline.run.experiments.reading import read_experiments
from pipeline.run.experiments.trials import Trial, listed_trials

REFERENCE = ROOT / "config" / "experiments.yaml"
# Sections that say how large things are, or how long they take
SECTIONS = ("data", "tokenizer", "trunk", "joint", "expert", "router")
# How often something is looked at changes no model
BESIDE = ("eval_every_steps",)


def main(argv: list[str] | None = None) -> int:
    """Print the page, or write it, and return the exit status."""
    args = _arguments(argv)
    results = ExperimentResults.model_validate_json(args.results.read_text("utf-8"))
    trials = listed_trials(read_experiments(args.reference))
    parts = (
        f"# Experiments at a smaller scale, {args.date}\n",
        f"`{args.command}`\n" if args.command else "",
        *(f"{note}\n" for note in args.note),
        "## By how much it is smaller than the reference set-up\n",
        _factors(results, trials, args.reference.name),
        _below(report.experiments_text(results)),
    )
    page = "\n".join(filter(None, parts))
    if args.out:
        args.out.write_text(page, "utf-8")
    else:
        print(page)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("results", type=Path, metavar=RESULTS)
    made.add_argument(
        "--reference", type=Path, default=REFERENCE, help="experiments file at full scale"
    )
    made.add_argument("--command", default="", help="what was typed, less a machine's own folders")
    made.add_argument("--note", action="append", default=[], help="paragraph to add; repeat")
    made.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="(default: today)")
    made.add_argument("--out", type=Path, metavar="FILE.md", help="write it here")
    return made.parse_args(argv)


def _below(text: str) -> str:
    """Return a Markdown file to stand below a heading of another."""
    first, _, rest = text.partition("\n")
    return f"#{first}\n{rest}"


def _factors(results: ExperimentResults, trials: list[Trial], name: str) -> str:
    """Return a table of the settings whose values are others, from the first trial of both."""
    theirs = {trial.name: trial for trial in trials}
    mine = next((each for each in results.trials if each.name in theirs and each.done), None)
    if mine is None:
        raise SystemExit(f"no trial of these results that has a model is in {name}")
    full = theirs[mine.name].cfg.model_dump(mode="json")
    rows = [["seeds", str(len({trial.seed for trial in trials})), str(len(results.seeds)), ""]]
    for setting, there, here in _others(full, mine.done[0].config):
        factor = ""
        if _is_number(there) and _is_number(here) and here:
            factor = f"{there / here:.3g}"
        rows.append([setting, _word(there), _word(here), factor])
    return table(["setting", name, "here", "smaller by"], rows)


def _others(full: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield settings that are numbers or words on both sides, and others."""
    for section in SECTIONS:
        found = dict(flat(here.get(section) or {}))
        for setting, value in flat(full.get(section) or {}):
            other = found.get(setting)
            shown = all(isinstance(each, int | float | str) for each in (value, other))
            if shown and value != other and setting not in BESIDE:
                yield f"{section}.{setting}", value, other


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
