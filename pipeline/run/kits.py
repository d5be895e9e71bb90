"""Kits: one expert handed out to be trained where its text lies, and what comes back of it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config.run import JobKey, RunConfig
from ..errors import ConfigError
from ..families import PackWish, family
from ..families.kit_files import README
from ..families.load import given, load
from ..model.gaussian_mechanism import least_sigma
from ..protocols import Progress
from ..store.artifacts import Store
from ..store.beside import folder_beside
from ..store.expert_package import Noise
from ..store.model_sources import on_this_machine
from ..store.room import writing, writing_to
from .backend import Local, run_stage
from .context import StoredParts
from .identity import begin
from .reach import working
from .stages import RUN

# Of a kit: what its expert needs is made by the stages up to this one
LAST = "train_experts"
SHARED = "train_shared"
CLIP = 0.5
DELTA = 1e-5
# What says nothing of a kit that goes out
OF_PACKING = (
    "paths",
    "without_statistics",
    "epsilon",
    "delta",
    "clip",
    "licence",
    "description",
)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Give the command line of `kit` its arguments; --override and --store are everybody's."""
    sub.add_argument("domain", nargs="?", metavar="DOMAIN", help="the expert that is handed out")
    sub.add_argument("--config", type=Path, metavar="FILE", help="the run that it is for")
    sub.add_argument("--to", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    pack = sub.add_argument_group("with a kit, where the text is")
    pack.add_argument("--pack", type=Path, metavar="KIT", help="train its expert and pack it")
    pack.add_argument(
        "--paths",
        nargs="+",
        metavar="GLOB",
        help="files of the text (default: text/ in the kit); of lora_vlm the file or the folder of "
        "rows (default: rows/)",
    )
    pack.add_argument(
        "--without-statistics", action="store_true", help="give away the expert alone"
    )
    pack.add_argument(
        "--epsilon", type=float, help="give means alone, with noise that hides each document"
    )
    pack.add_argument("--delta", type=float, help=f"of epsilon (default {DELTA:g})")
    pack.add_argument(
        "--clip",
        type=float,
        help=f"how far from the public mean a document counts, in spreads (default {CLIP})",
    )
    pack.add_argument("--licence", default="", metavar="TEXT", help="goes into the package")
    pack.add_argument("--description", default="", metavar="TEXT", help="goes into the package")


def kit(args: argparse.Namespace, progress: Progress) -> str:
    """Do what a command line of `kit` asks for; return a line that says what was made.

    Raises ConfigError for arguments that do not go together, and what making and packing raise.
    """
    _check_target(args.to)
    store = Store(args.store)
    if args.pack:
        if args.domain or args.config:
            raise ConfigError("--pack takes a kit, which knows its expert; leave out the others")
        return _pack(args, store, progress)
    if not args.domain or not args.config:
        raise ConfigError("a kit is of one DOMAIN of a run's --config FILE")
    for name in OF_PACKING:
        if getattr(args, name):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is of --pack, where the text is; a kit goes out without")
    overrides = tuple(args.override)
    cfg, _ = begin(load(args.config, overrides), store.open(), progress)
    with working(store, cfg, args.config, overrides):
        make_kit(cfg, store, args.domain, args.to, progress)
    return f"kit for {args.domain}: {args.to}"


def make_kit(cfg: RunConfig, store: Store, domain: str, to: Path, progress: Progress) -> None:
    """Write the kit for an expert to a folder.

    Raises ConfigError for a family that has none, MissingArtifact where the trunk is not made yet.
    """
    parts = StoredParts(cfg, store, progress)
    with _made_whole(to) as folder:
        family(cfg.family).write_kit(parts.cfg, parts, domain, folder)


def _pack(args: argparse.Namespace, store: Store, progress: Progress) -> str:
    settings = args.pack / "expert.yaml"
    if not settings.is_file():
        raise ConfigError(f"--pack: {args.pack} is no kit, as it has no {settings.name}")
    overrides = list(args.override)
    chosen = load(settings, tuple(overrides))
    if len(chosen.experts) != 1:
        names = ", ".join(chosen.experts)
        raise ConfigError(f"--pack: {settings} has the experts {names}, and a kit trains one")
    (domain,) = chosen.experts
    if args.paths:
        overrides.append(given(chosen, domain, args.paths))
    cfg = load(settings, tuple(overrides))
    statistics = not args.without_statistics
    noise = _noise(args)
    if noise and not statistics:
        raise ConfigError("--epsilon is of statistics, which --without-statistics leaves out")
    wish = PackWish(statistics, noise, args.licence, args.description)
    family(cfg.family).check_pack(cfg, wish)
    try:
        family(cfg.family).preflight(cfg, on_this_machine)
    except ConfigError as error:
        raise ConfigError(f"{error}; {args.pack / README} says which model it takes") from None
    cfg, _ = begin(cfg, store.open(), progress, makes=True)
    with working(store, cfg, settings, tuple(overrides)):
        train_and_pack(cfg, store, args.pack, args.to, wish, progress)
    return f"packed {domain}: {args.to}"


def _noise(args: argparse.Namespace) -> Noise | None:
    """Return the noise that is asked for; None where statistics go as they are."""
    if args.epsilon is None:
        if (args.delta, args.clip) != (None, None):
            # Whoever names them means to hide something
            raise ConfigError("--delta and --clip are of --epsilon, which alone hides something")
        return None
    delta = DELTA if args.delta is None else args.delta
    clip = CLIP if args.clip is None else args.clip
    try:
        least_sigma(args.epsilon, delta)
    except ValueError as error:
        raise ConfigError(
            f"--epsilon, --delta: {error}; epsilon is over 0 and 100 at most, delta between 0 and 1"
        ) from None
    if not 0 < clip < float("inf"):
        raise ConfigError(f"--clip: {clip:g} counts nothing; 0.5 is half a spread")
    return Noise(args.epsilon, delta, clip)


def train_and_pack(
    cfg: RunConfig,
    store: Store,
    source: Path,
    to: Path,
    wish: PackWish,
    progress: Progress,
) -> None:
    """Train the expert of a kit and write its package to a folder, with nothing beside.

    Raises MismatchError where trunk or tokenizer are not the kit's, before the expert is trained,
    and what the stages raise.
    """
    chosen = family(cfg.family)
    backend = Local(store)
    needed = _stages_of(cfg, (LAST, cfg.experts[0]))
    for stage in RUN:
        if stage in needed:
            run_stage(stage, cfg, backend)
        if stage == SHARED:
            chosen.check_kit(cfg, StoredParts(cfg, store, progress), source)
    # Its configuration is the one whose arithmetic is known
    parts = StoredParts(cfg, store, progress)
    with _made_whole(to) as folder:
        chosen.pack(parts.cfg, parts, cfg.experts[0], wish, folder, source)


def _stages_of(cfg: RunConfig, job: JobKey) -> set[str]:
    """Return the stages that a job needs, its own among them; of one expert each has its jobs."""
    found = {job[0]}
    for need in cfg.needs(*job):
        found |= _stages_of(cfg, need)
    return found


def _check_target(folder: Path) -> None:
    """Raise ConfigError for what is no new or empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--to: {folder} holds something else; name a new or empty folder")


@contextmanager
def _made_whole(to: Path) -> Iterator[Path]:
    """Have a folder to write in that is at its target when it is whole. Raises DiskFull,
    StoreError."""
    beside = to.absolute().parent
    with writing_to(to, "folder"), writing(beside):
        beside.mkdir(parents=True, exist_ok=True)
        with folder_beside(beside, ".kit-") as folder:
            yield folder
            if to.exists():
                to.rmdir()
            folder.rename(to)
