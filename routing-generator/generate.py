"""Makes the routing set of a lora_vlm run by itself: what teaches the router which expert a request
belongs to.

It goes through pipeline.data.routing, as the stage `routing` does, so both write the same bytes.
See the README beside.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

# Run by its path, so that the folder above is not where Python looks for modules.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.config.base import NONE
from pipeline.config.files import overlay, override, read, resolve_paths, resolve_routing_paths
from pipeline.config.problems import explain
from pipeline.config.routing_set import RoutingSetConfig
from pipeline.data.routing import dataset
from pipeline.data.routing.dataset import RoutingRow, RoutingRows
from pipeline.data.routing.rows import SPLITS
from pipeline.data.tasks import prepare
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.families.load import PATHS, load
from pipeline.families.lora_vlm.config import LoraVlmConfig
from pipeline.protocols import Progress
from pipeline.report.narrow import output, plain_console
from pipeline.run.advice import CommandLine, sentence
from pipeline.run.arguments import add_store
from pipeline.run.stages import address
from pipeline.store.artifacts import Reader, Store
from pipeline.store.room import writing

# A row of the contact sheet.
PER_EXPERT_PICTURES = 4
EPILOG = """the configuration is one of
  a routing set (config/tiny_dataset.yaml): sources, counts, wordings; sources `from: jsonl` need
    nothing else, for sources `from: loras` the file names the experts by a key
    `loras: loras.json` (or give --loras)
  a whole run (config/tiny_vlm.yaml), which names both

rows of the experts come from the store where `python -m pipeline preprocess` has left them, else
they are prepared in the --work folder, once.

examples:
  python routing-generator/generate.py --config config/dataset.yaml \\
    --loras config/loras.json --output routing.jsonl
  python routing-generator/generate.py --config config/tiny_vlm.yaml --output /tmp/routing.jsonl \\
      --preview 2
  python routing-generator/generate.py --config config/dataset.yaml --loras config/loras.json \\
      --seed 1 --override short=accept --override per_expert.train=500 --contact-sheet sheet.png"""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    out = argparse.ArgumentParser(
        prog="generate.py",
        description="Merge the experts' own rows into a balanced routing set.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="routing set or run, YAML"
    )
    out.add_argument(
        "--output",
        type=Path,
        default=Path(dataset.NAME),
        metavar="FILE",
        help="JSON lines; the manifest goes beside them (default routing.jsonl)",
    )
    out.add_argument(
        "--loras",
        type=Path,
        metavar="FILE",
        help="the experts, when the configuration does not name them",
    )
    add_store(out, "where preprocess left rows")
    out.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="where other rows are prepared (default: routing-work beside the output)",
    )
    out.add_argument(
        "--seed", type=int, metavar="N", help="another seed of samples, splits and wording"
    )
    out.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="a.b=value",
        help="change one setting of the routing set, may be repeated",
    )
    out.add_argument(
        "--preview",
        type=_count,
        default=1,
        metavar="N",
        help="rows of each expert to print (default 1)",
    )
    out.add_argument(
        "--contact-sheet",
        type=Path,
        metavar="PNG",
        help="a picture of some rows of each expert, to look at",
    )
    return out


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Make a routing set; return the exit code: 0 done, 2 a person has to mend something, 130
    stopped."""
    args = parser().parse_args(arguments)
    console = output()
    # Not wrapped: a message is searched for, and paths in it are copied.
    errors = plain_console(stderr=True, soft_wrap=True)
    done = "nothing was written"
    try:
        generate(args, errors)
        done = f"{args.output} is written"
        show(RoutingRows(args.output.parent, args.output.name), args, console)
    except PipelineError as error:
        message = sentence(error, CommandLine())
        errors.print(Text.assemble(("error:", "bold red"), f" {message}"))
        return 2
    except KeyboardInterrupt:
        errors.print(f"stopped; {done}", markup=False, highlight=False)
        return 130
    return 0


def generate(args: argparse.Namespace, console: Console) -> None:
    """Write the routing set that the command asks for. Raises ConfigError, DataError, DiskFull."""
    settings, cfg = configured(args)
    folder = args.output.parent
    work = args.work or folder / "routing-work"
    with ProgressBar(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=1.0)

        def progress(text: str, share: float | None) -> None:
            bar.update(shown, description=escape(text), completed=share)

        with _writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tasks: dict[str, Path] = {}
            labels: dict[str, str] = {}
            if cfg is not None:
                tasks = dict(prepared(cfg, Store(args.store), work, progress))
                labels = cfg.loras.labels
            dataset.generate(settings, tasks, labels, folder, progress, args.output.name)


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Tell what the system does not let be written. Raises DiskFull, DataError."""
    try:
        with writing(folder):
            yield
    except OSError as error:
        # A file that is open already is not named.
        where = error.filename or folder
        raise DataError(
            f"{where}: {error.strerror or error}; choose another --output or --work"
        ) from None


def configured(args: argparse.Namespace) -> tuple[RoutingSetConfig, LoraVlmConfig | None]:
    """Return the settings, and the run that the experts come from if one is named. Raises
    ConfigError."""
    # `short=accept` and `dataset.short=accept` are the same: there is nothing else to change here.
    changes = [f"dataset.{change.removeprefix('dataset.')}" for change in args.override]
    if args.seed is not None:
        changes.append(f"dataset.seed={args.seed}")
    raw = read(args.config)
    if "family" in raw or "extends" in raw:
        cfg = load(args.config, tuple(changes))
        if not isinstance(cfg, LoraVlmConfig):
            raise ConfigError(
                f"{args.config} is a run of {cfg.family}, which has no routing set; only lora_vlm "
                "has one"
            )
        return cfg.dataset, cfg
    loras = raw.pop("loras", None)
    if args.loras:
        # Of the command line: it starts where the command is typed, not at the file.
        loras = str(args.loras.resolve())
    here = args.config.parent
    whole = {"dataset": resolve_routing_paths(raw, here)}
    for change in changes:
        whole = overlay(whole, *override(change, here, PATHS))
    # Without experts the file's own settings are all there is to check.
    kind: type[BaseModel] = RoutingSetConfig
    checked = whole["dataset"]
    if loras is not None:
        kind = LoraVlmConfig
        checked = resolve_paths({"family": "lora_vlm", "loras": loras, **whole}, here, PATHS)
    try:
        made = kind.model_validate(checked)
    except ValidationError as error:
        raise ConfigError(explain(error.errors(), checked, args.config, kind)) from None
    if isinstance(made, LoraVlmConfig):
        return made.dataset, made
    return _alone(made, args.config), None


def _alone(settings: RoutingSetConfig, file: Path) -> RoutingSetConfig:
    """Return settings that name no experts. Raises ConfigError when some source needs them."""
    unknown = [source.expert for source in settings.sources if source.origin != "jsonl"]
    if unknown:
        raise ConfigError(
            f"{file}: rows of {', '.join(unknown)} are the experts' own, and nothing names the "
            "experts: add the key `loras: loras.json`, or --loras loras.json, or give such "
            "sources `from: jsonl`"
        )
    return settings


def prepared(
    cfg: LoraVlmConfig,
    store: Store,
    work: Path,
    progress: Progress,
) -> Iterator[tuple[str, Path]]:
    """Yield the folders of prepared rows that sources need: the store's, or one made in work.
    Raises DataError."""
    needed = set()
    for source in cfg.dataset.sources:
        if source.origin != "jsonl" or source.expert == NONE:
            needed.add(source.expert)
    for name in sorted(needed & set(cfg.tasks)):
        here = address(cfg, "preprocess", name)
        if store.has(here):
            yield name, Reader(store).folder(here)
            continue
        folder = work / here
        # A folder without this mark is of a run that was stopped.
        done = folder / "done"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            prepare.prepare(cfg.task(name), cfg.loras.base.image, cfg.seed, folder, progress)
            done.touch()
        yield name, folder


def show(rows: RoutingRows, args: argparse.Namespace, console: Console) -> None:
    """Print the counts and some rows; draw the contact sheet where one is wanted. Raises
    DataError."""
    manifest = rows.manifest
    console.print(_counts(manifest))
    dropped = []
    for reason, count in manifest["dropped"].items():
        dropped.append(f"{count:,} {reason} ({', '.join(manifest['examples'][reason])})")
    told = "; ".join(dropped) or "nothing"
    console.print(f"dropped: {told}", highlight=False, markup=False, soft_wrap=True)
    for shortage in manifest["short"]:
        console.print(
            f"short: {shortage['expert']}, {shortage['split']}: {shortage['found']:,} of "
            f"{shortage['wanted']:,} rows"
        )
    written = f"{len(rows):,} rows of {manifest['groups']:,} groups"
    hashed = f"sha256 {manifest['sha256'][:16]}"
    console.print(f"{args.output}: {written}, {hashed}", highlight=False, soft_wrap=True)
    if args.preview:
        console.print(_preview(rows, args.preview))
    if args.contact_sheet:
        _draw(rows, args.contact_sheet)
        console.print(f"contact sheet: {args.contact_sheet}", highlight=False, soft_wrap=True)


def _counts(manifest: dict) -> Table:
    table = Table(
        title="rows (of them with a neutral prompt)",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("expert", style="cyan")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for name in manifest["experts"]:
        label = manifest["labels"].get(name)
        cells = [f"{name} ({label})" if label else name]
        for split in SPLITS:
            count = manifest["rows"][split][name]
            neutral = manifest["ambiguous"][split][name]
            cells.append(f"{count:,} ({neutral:,})" if neutral else f"{count:,}")
        table.add_row(*cells)
    return table


def _preview(rows: RoutingRows, count: int) -> Table:
    table = Table(title="some rows", title_justify="left", title_style="bold")
    for name in ("id", "split", "prompt", "images"):
        table.add_column(name, overflow="fold", max_width=48)
    for row in _some(rows, count):
        prompt = row.prompt[:200]
        if row.ambiguous:
            prompt += " (neutral)"
        names = [Path(image).name for image in row.images]
        cells = (row.id, row.split, prompt, " ".join(names))
        # A prompt may have brackets, which are markup to rich in plain strings
        table.add_row(*map(Text, cells))
    return table


def _some(rows: RoutingRows, count: int, pictured: bool = False) -> Iterator[RoutingRow]:
    """Yield up to count rows of each expert, the splits and kinds of prompt by turns; pictured:
    only with a picture."""
    # At most count rows of each kind are kept, however large the set is.
    pools: dict[tuple[str, str, bool], list[RoutingRow]] = {}
    for row in rows:
        pool = pools.setdefault((row.expert, row.split, row.ambiguous), [])
        if len(pool) < count and (row.images or not pictured):
            pool.append(row)
    for name in rows.manifest["experts"]:
        yield from islice(_by_turns(name, pools, count), count)


def _by_turns(
    name: str,
    pools: dict[tuple[str, str, bool], list[RoutingRow]],
    count: int,
) -> Iterator[RoutingRow]:
    for i, split in enumerate(SPLITS * count):
        plain = pools.get((name, split, False), [])
        neutral = pools.get((name, split, True), [])
        # One kind of prompt and the other by turns, as far as there are any.
        pool = (neutral or plain) if i % 2 else (plain or neutral)
        if pool:
            yield pool.pop(0)


def _draw(rows: RoutingRows, file: Path) -> None:
    from pipeline.data.images import contact_sheet

    cells = []
    for row in _some(rows, PER_EXPERT_PICTURES, pictured=True):
        cells.append((rows.paths(row)[0], f"{row.expert} | {row.split}", row.prompt))
    if not cells:
        raise DataError(
            f"{file}: no row has a picture, so there is nothing to show; leave --contact-sheet away"
        )
    contact_sheet.save(cells, file, most=len(cells))


if __name__ == "__main__":
    sys.exit(main())
