"""The learning rates of an ffn_moe run where they are `auto`: what a search does in small, and what
it found.

A search is a few trainings with the weights, rows, batches and arithmetic of the training that it
is for, on the trunk's domains mixed where there is one such training a domain.
"""

from ...config.fit import SEARCHED, FitConfig
from ...config.run import JobKey
from ...train.flops import Trains
from .. import Parts
from ..searches import found_rate
from .config import FfnMoeConfig
from .joint.section import JointConfig
from .sections import RouterConfig
from .stages import FROM_ZERO, SEARCHES

# Where a ladder begins, by what trains; it grows towards what is better
MIDDLE: dict[Trains, float] = {"all": 3e-4, "ffn": 3e-4, "gates": 1e-2}
DELTA_MIDDLE = 3e-3  # of low-rank experts and adapters, whose products start at zero
FROM_ZERO_MIDDLE = 1e-3


def trained_by(search: str) -> str:
    """Return the stage whose rate a search finds."""
    return next(stage for stage, name in SEARCHES.items() if name == search)


def search_of(cfg: FfnMoeConfig, stage: str, item: str | None) -> JobKey | None:
    """Return the job that finds a training's rate; None where the rate is a number, or nothing
    moves."""
    if stage == "train_joint":
        name, own = SEARCHES[stage], item
    elif stage == "train_dense" and item not in FROM_ZERO:
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


def with_options(cfg: FfnMoeConfig, section: str, **options: object) -> FfnMoeConfig:
    """Return cfg with other settings of one section."""
    changed = getattr(cfg, section).model_copy(update=options)
    return cfg.model_copy(update={section: changed})


def middle_of(cfg: FfnMoeConfig, search: str, trains: Trains) -> float:
    """Return the rate that a search starts around."""
    if search == SEARCHES["train_joint"]:
        return FROM_ZERO_MIDDLE
    if search == SEARCHES["train_shared"] and cfg.trunk.init is None:
        return FROM_ZERO_MIDDLE
    if search == SEARCHES["train_experts"] and cfg.expert.form != "full":
        return DELTA_MIDDLE
    return MIDDLE[trains]


def with_ramp(small: FitConfig, whole_steps: float) -> FitConfig:
    """Return a search's settings with the temperature of gates at each part of it what it is there
    in the whole training: else rates are judged at the temperature that this begins with."""
    if not isinstance(small, RouterConfig | JointConfig) or not small.steps or not whole_steps:
        return small
    ramp = small.temperature.in_small(small.steps / whole_steps)
    return small.model_copy(update={"temperature": ramp})
