"""The learning rates of an ffn_moe run where they are `auto`: what a search does in small, and what
it found.

A search is a few trainings with the weights, rows, batches and arithmetic of the training that it
is for, on all domains mixed where there is one such training a domain.
"""

from typing import TypeVar

from ...config.fit import SEARCHED, FitConfig
from ...config.run import JobKey
from ...store.reading import read_as
from ...train.flops import Trains
from ...train.lr_search import FOUND, Found
from .. import Parts
from .config import FfnMoeConfig
from .stages import FROM_ZERO, SEARCHES

# What a search is planned with: three rates, and one more where the best of them is at an end
PLANNED_RATES = 4
# Fewer tell rates apart by noise
LEAST_STEPS = 6
# Where a ladder begins, by what trains; it grows towards what is better
MIDDLE: dict[Trains, float] = {"all": 3e-4, "ffn": 3e-4, "gates": 1e-2}
DELTA_MIDDLE = 3e-3  # of low-rank experts and adapters, whose products start at zero
FROM_ZERO_MIDDLE = 1e-3

Fit = TypeVar("Fit", bound=FitConfig)


def trained_by(search: str) -> str:
    """Return the stage whose rate a search finds."""
    return next(stage for stage, name in SEARCHES.items() if name == search)


def search_of(cfg: FfnMoeConfig, stage: str, item: str | None) -> JobKey | None:
    """Return the job that finds a training's rate; None where the rate is a number, or nothing
    moves."""
    if stage == "train_dense" and item not in FROM_ZERO:
        name, own = SEARCHES[stage], cfg.own_item(SEARCHES[stage], item)
    else:
        # Baselines from zero train as the trunk does
        name, own = SEARCHES["train_shared" if stage == "train_dense" else stage], None
    return (name, own) if own in cfg.items(name) else None


def known(cfg: FfnMoeConfig, parts: Parts, stage: str, item: str | None = None) -> FfnMoeConfig:
    """Return cfg with a number for the rate of the training that a stage is about to do.

    Raises MissingArtifact, DamagedArtifact, StaleArtifact.
    """
    search = search_of(cfg, stage, item)
    section = cfg.stages[search[0] if search else stage].setting_name(item)
    lr = getattr(cfg, section).lr
    if search is not None:
        lr = found_rate(parts, *search).lr
    elif lr == SEARCHED:
        lr = FROM_ZERO_MIDDLE  # Nothing moves
    return with_options(cfg, section, lr=lr)


def found_rate(parts: Parts, search: str, item: str | None) -> Found:
    """Return what a search left. Raises MissingArtifact, DamagedArtifact, StaleArtifact."""
    return read_as(Found, parts.folder(search, item) / FOUND)


def with_options(cfg: FfnMoeConfig, section: str, **options: object) -> FfnMoeConfig:
    """Return cfg with other settings of one section."""
    changed = getattr(cfg, section).model_copy(update=options)
    return cfg.model_copy(update={section: changed})


def middle_of(cfg: FfnMoeConfig, search: str, trains: Trains) -> float:
    """Return the rate that a search starts around."""
    if search == SEARCHES["train_shared"] and cfg.trunk.init is None:
        return FROM_ZERO_MIDDLE
    if search == SEARCHES["train_experts"] and cfg.expert.form != "full":
        return DELTA_MIDDLE
    return MIDDLE[trains]


def in_small(cfg: FfnMoeConfig, opts: Fit, tokens: int, jobs: int) -> Fit:
    """Return the settings of a search's trainings, whose rate is still open.

    `tokens` are those of all trainings that the rate is for, `jobs` how many these are.
    """
    step_tokens = opts.batch_sequences * cfg.trunk.context_tokens
    whole = max(1, round(tokens / step_tokens / jobs))
    steps = cfg.lr_search.steps
    if steps is None:
        fitting = round(cfg.lr_search.share * tokens / step_tokens / PLANNED_RATES)
        steps = min(max(fitting, LEAST_STEPS), whole)
    # As much of the whole as in the training itself
    warmup_steps = round(min(opts.warmup_steps, whole) * steps / whole)
    return opts.model_copy(
        update={
            "steps": steps,
            "epochs": None,
            "tokens": None,
            "warmup_steps": warmup_steps,
            "eval_every_steps": 0,
            "patience": 0,
            "keep": "last",
        }
    )
