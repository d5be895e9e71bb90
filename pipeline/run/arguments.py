"""What can be typed: the commands, their arguments, and what `--help` says of each."""

import argparse
from pathlib import Path

from ..families import DTYPES, FORMATS
from ..store.artifacts import DEFAULT_STORE, STORE_VARIABLE, default_root
from . import kits, serve_flags, speak_flags
from .domain_words import ABOUT, add_arguments
from .history.arguments import add_history, add_watch
from .stages import STAGES, about, has_several_jobs, is_report
from .typed_numbers import positive

# What is no stage, or not one alone
OTHER_COMMANDS = {
    "export": "bring the stack, or a part of it, to a folder or URL in a format of other programs",
    "kit": "hand out one expert to be trained where its text lies (DOMAIN), or train and pack one",
    "compress": "write full experts as PEFT adapters of low rank, the nearest there are",
    "serve": "serve a bundle on this machine: /v1/completions, /v1/route, /healthz",
    "run": "all stages in order up to evaluate; what is already in the store is not done again",
    "experiments": "train variants of a run and hold them against each other; a file says which",
    "plan": "show what would run, what is already there, and an estimate of time and memory",
    "metrics": "show what trainings were: losses, speed, how experts are used, memory",
    "open": "tell where the newest report is, of a run or of all; --browser opens it",
    "runs": "list the runs that a store knows: name, date, score, size, configuration, report",
    "watch": "follow a run: how far each job is, how long all of it will take, its curves",
    "history": "what runs did: list, show, compare, export (csv, jsonl, TensorBoard), report",
    "prune": "list what was left half done and what no run reaches; --yes removes it",
    "rm": "list what a store has of a run and of no other; --yes removes it",
    "versions": "list the bundles at a folder or URL that deploy.upload named",
    "rollback": "make a former bundle there the current one",
}
# What a person has to know of a command before trying it, behind its arguments
_CHANGES = """Shows the lines that change in FILE and the jobs that are to be made, and asks
where there is a terminal; then FILE is written, what is new is made, and the
figures before and after are printed."""
MORE = {
    "add": f"""{_CHANGES}
The experts that are there keep their bytes.

  python -m pipeline add medicine --config mine.yaml --paths 'texts/medicine/*.jsonl'
  python -m pipeline add medicine --config mine.yaml --expert packages/medicine""",
    "remove": f"""{_CHANGES}
The other experts keep their bytes. Files of the removed one stay in the store
until the run that made them is removed (`runs`, `rm`); a note in the store says
what went when.

  python -m pipeline remove medicine --config mine.yaml""",
    "replace": f"""{_CHANGES}
The other experts keep their bytes, unless the text is the trunk's too
(trunk.domains). Text that was corrected where it lies needs no command: `run`
finds it.

  python -m pipeline replace medicine --config mine.yaml --paths texts/corrected.jsonl""",
    "experiments": """\
FILE names a base, trials, grids and searches over it, seeds and criteria
(docs/experiments.md). What trials share is made once, finished ones are not made
again, and one that fails does not stop the others.

  python -m pipeline experiments --config config/experiments_small.yaml
  python -m pipeline experiments --config mine.yaml --override seeds=[0] --parallel 2""",
    "export": """\
What is exported has to be trained before: the trunk and the experts, and of a
stack the router (`run` makes all of it); hf without --dtype makes the bundle too.
The card has the figures of the report where `evaluate` has made it. A target is
written whole or not at all. What a format cannot hold is folded, which the card
says, or refused by name: docs/families.md.

  python -m pipeline export --config mine.yaml --format hf --dtype bf16 --to exported/hf
  python -m pipeline export --config mine.yaml --format gguf --dtype q8_0 --to exported/gguf
  python -m pipeline export --config mine.yaml --format expert --expert law --to exported/law
  python -m pipeline export --config mine.yaml --format adapters --to s3://bucket/adapters""",
    "compress": """\
Of whole networks (expert.form: full); low-rank experts and adapters are such
adapters as they are, which `export --format adapters` writes. Told is how much
of each expert's squared change its rank keeps.

  python -m pipeline compress --config mine.yaml --rank 64 --to exported/rank64""",
    "plan": """\
Of each job: whether it is done, the tokens that it reads and the numbers that it
trains, its time and peak of memory, and how it is to run within
runtime.memory_budget, where one is set. Nothing is fetched: of a model that is not
on this machine yet nothing can be told. `deploy` stands below the jobs of a run,
exports with --export, and `compress` with --rank.

  python -m pipeline plan --config config/demo.yaml
  python -m pipeline plan --config mine.yaml --override runtime.memory_budget=900MB
  python -m pipeline plan --config mine.yaml --export gguf --dtype q8_0""",
    "kit": """\
A kit holds the trunk or its pin, the tokenizer and settings, and no text; a
package the trained expert and statistics of its text. What these tell of the
text: docs/kits.md.

  python -m pipeline kit medicine --config mine.yaml --to kit-medicine
  python -m pipeline kit --pack kit-medicine --paths 'notes/*.txt' --to package
  python -m pipeline add medicine --config mine.yaml --expert package""",
    "metrics": """\
NAME is an address or the beginning of one, or a run (by default the latest), a
stage of it and what the stage trains. docs/metrics.md says what each figure is.

  python -m pipeline metrics mine
  python -m pipeline metrics mine train_experts medicine --json""",
    "runs": """\
Every command that makes something leaves its run in the store, so that `prune`
takes nothing of it, whatever became of its configuration. "score" is of what the
run serves, in its newest report: bits per byte, mean over domains (less is
better), or the router's accuracy on the first set of requests. "MB of it alone"
is what no other run needs.""",
    "open": """\
RUN is a name, or an id as `runs` lists it, or the name of an experiments file.

  python -m pipeline open
  python -m pipeline open mine --browser""",
    "prune": """\
Without --yes nothing is removed. What a run of the store or a configuration
reaches stays, and so does what a run in progress needs. Orphans may be
somebody's work from before runs were noted: they go with --orphans --yes alone.""",
    "rollback": """\
What serves TARGET serves another bundle when it is started anew. No bundle is
removed or sent.

  python -m pipeline versions s3://bucket/demo
  python -m pipeline rollback s3://bucket/demo""",
    "rm": """\
Without --yes nothing is removed. What other runs or a configuration reach as
well stays, and a run in progress is refused.

  python -m pipeline runs
  python -m pipeline rm mine --yes""",
}
EXAMPLES = """examples:
  python -m pipeline run --config config/demo.yaml
  python -m pipeline plan --config config/wikitext103.yaml
  python -m pipeline train_experts --config config/demo.yaml --parallel 2
  python -m pipeline train_router --config config/demo.yaml --override router.top_k=1 \\
      --override router.steps=0

Results live under addresses computed from the configuration, so a stage that is already done is
skipped, changing router.* keeps trunk and experts, and an interrupted command goes on when typed
again."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Train a mixture of experts in parts and put it together as one model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Whatever the family: which one a run is of is known when its file is read
    for name in STAGES:
        sub = _add_command(commands, name, about(name))
        _add_common(sub, several_configs=False)
        if is_report(name):
            _add_smoke(sub)
        if has_several_jobs(name):
            _add_parallel(sub)
    _add_export(_add_command(commands, "export", OTHER_COMMANDS["export"]))
    _add_compress(_add_command(commands, "compress", OTHER_COMMANDS["compress"]))
    kit = _add_command(commands, "kit", OTHER_COMMANDS["kit"])
    kits.add_arguments(kit)
    _add_override(kit)
    add_store(kit)
    serve = _add_command(commands, "serve", OTHER_COMMANDS["serve"])
    serve_flags.add_arguments(serve)
    _add_frozen(serve)
    _add_override(serve)
    add_store(serve)
    for name, add in speak_flags.ADD.items():
        speak = _add_command(commands, name, speak_flags.ABOUT[name])
        add(speak)
        _add_frozen(speak)
        _add_override(speak)
        add_store(speak)
    run = _add_command(commands, "run", OTHER_COMMANDS["run"])
    _add_common(run, several_configs=False)
    _add_smoke(run)
    _add_parallel(run)
    experiments = _add_command(commands, "experiments", OTHER_COMMANDS["experiments"])
    experiments.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="where results go (default: experiments/NAME in the store)",
    )
    _add_common(experiments, several_configs=False)
    _add_parallel(experiments)
    plan = _add_command(commands, "plan", OTHER_COMMANDS["plan"])
    plan.add_argument(
        "--export",
        action="append",
        default=[],
        choices=FORMATS,
        help="what this export would take too, may be repeated",
    )
    plan.add_argument(
        "--rank", type=positive, metavar="N", help="what compress to this rank would take too"
    )
    _add_wanted(plan)
    _add_common(plan, several_configs=False)
    metrics = _add_command(commands, "metrics", OTHER_COMMANDS["metrics"])
    metrics.add_argument("name", nargs="*", metavar="NAME", help="what of which run; see below")
    metrics.add_argument("--json", action="store_true", help="all of it, as JSON")
    add_store(metrics)
    report = _add_command(commands, "open", OTHER_COMMANDS["open"])
    report.add_argument("run", nargs="*", metavar="RUN", help="whose (default: the newest of all)")
    report.add_argument("--browser", action="store_true", help="open it in a browser")
    add_store(report)
    add_store(_add_command(commands, "runs", OTHER_COMMANDS["runs"]))
    add_history(_add_command(commands, "history", OTHER_COMMANDS["history"]), add_store)
    watch = _add_command(commands, "watch", OTHER_COMMANDS["watch"])
    add_watch(watch)
    add_store(watch)
    for name, text in ABOUT.items():
        domains = _add_command(commands, name, text)
        add_arguments(domains, name)
        _add_common(domains, several_configs=False)
        _add_parallel(domains)
    prune = _add_command(commands, "prune", OTHER_COMMANDS["prune"])
    prune.add_argument(
        "--orphans", action="store_true", help="remove what no run and no configuration reaches too"
    )
    prune.add_argument(
        "--damaged", action="store_true", help="remove what was found damaged and kept aside too"
    )
    rm = _add_command(commands, "rm", OTHER_COMMANDS["rm"])
    rm.add_argument("run", nargs="+", metavar="RUN", help="name or id, as `runs` lists them")
    for name in ("versions", "rollback"):
        moved = _add_command(commands, name, OTHER_COMMANDS[name])
        moved.add_argument("target", metavar="DIR|URL", help="what deploy.upload named")
        if name == "rollback":
            moved.add_argument(
                "--to",
                metavar="VERSION",
                help="which one, as `versions` lists them (default: the one before)",
            )
    for removing in (prune, rm):
        removing.add_argument("--yes", action="store_true", help="remove what is listed")
        _add_common(removing, several_configs=True)
    return top


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    more = MORE.get(name) or speak_flags.MORE.get(name)
    if more:
        sub.epilog = more
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
    return sub


def _add_smoke(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--smoke", action="store_true", help="evaluate a few rows of everything: does it work"
    )


def _add_parallel(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--parallel",
        type=positive,
        default=1,
        metavar="N",
        help="jobs side by side, cores shared, several GPUs spread (default 1)",
    )


def _add_common(sub: argparse.ArgumentParser, several_configs: bool) -> None:
    if several_configs:
        sub.add_argument(
            "--config",
            action="extend",
            nargs="+",
            type=Path,
            metavar="FILE",
            help="configurations whose results are kept beside those of the runs that a store "
            "knows, may be repeated (default: all in config/)",
        )
    else:
        sub.add_argument(
            "--config", required=True, type=Path, metavar="FILE", help="YAML file, see config/"
        )
        _add_frozen(sub)
    _add_override(sub)
    add_store(sub)


def _add_export(sub: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    sub.add_argument("--format", required=True, choices=FORMATS, help=formats)
    _add_target(sub)
    _add_wanted(sub)
    _add_common(sub, several_configs=False)


def _add_wanted(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--expert",
        metavar="NAME",
        help="expert and gguf: this one alone; anchor: the trunk with its own network",
    )
    sub.add_argument(
        "--dense", action="store_true", help="gguf: the mean of the experts as a dense model"
    )
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what weights are rounded to, not of adapters (default: as stored, experts of low "
        "rank merged in fp32); q8_0 is for gguf",
    )


def _add_compress(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--rank", required=True, type=positive, metavar="N", help="rank of each matrix's change"
    )
    sub.add_argument("--expert", metavar="NAME", help="this expert alone (default: all)")
    _add_target(sub)
    _add_common(sub, several_configs=False)


def _add_target(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--to", required=True, metavar="DIR|URL", help="a new folder, or s3://bucket/path and such"
    )


def _add_frozen(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--frozen",
        action="store_true",
        help="go on with the data that was read before, whatever has changed or is gone since",
    )


def _add_override(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="a.b=value",
        help="change one setting, may be repeated; the README lists them all",
    )


def add_store(sub: argparse.ArgumentParser, what: str = "where results are kept") -> None:
    """Add the store that a command is about; `what` says of it what this command wants there."""
    sub.add_argument(
        "--store",
        type=Path,
        default=default_root(),
        metavar="DIR",
        help=f"{what} (default: ${STORE_VARIABLE}, else ./{DEFAULT_STORE})",
    )
