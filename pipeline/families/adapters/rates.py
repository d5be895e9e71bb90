"""The learning rates of a run of adapters where they are `auto`: what a search does in small, and
what it found.

Each adapter is searched for by itself, on its own rows: tasks differ, and what is said of one
expert enters the address of no other.
"""

from collections.abc import Callable

from ...config.fit import SEARCHED
from ...config.run import JobKey
from ...errors import DataError
from ...train.loop import Task
from ...train.lr_search import Search, in_small
from .. import Parts
from ..searches import found_rate
from .config import AdapterRunConfig
from .stages import SEARCHES

# Settings that a short training has otherwise than the one that it is for
_OTHERWISE = ("steps", "epochs", "tokens", "warmup_steps", "eval_every_steps", "patience", "keep")
MIDDLE = 3e-4  # where a ladder begins; it grows towards what is better

Make = Callable[[AdapterRunConfig], Task]  # the training, by the settings that are given


def search_of(cfg: AdapterRunConfig, stage: str, item: str | None) -> JobKey | None:
    """Return the job that finds a training's rate; None where the rate is a number."""
    search = SEARCHES.get(stage)
    if search is None or item not in cfg.items(search):
        return None
    return search, item


def known(
    cfg: AdapterRunConfig, parts: Parts, stage: str, item: str | None = None
) -> AdapterRunConfig:
    """Return cfg with a number for the rate of the training that a stage is about to do.

    Raises MissingArtifact, DamagedArtifact, StaleArtifact.
    """
    job = search_of(cfg, stage, item)
    if job is not None:
        return with_options(cfg, item, lr=found_rate(parts, *job).lr)
    if cfg.loras.options(item or cfg.loras.router.name).lr == SEARCHED:
        return with_options(cfg, item, lr=MIDDLE)  # Nothing moves
    return cfg


def with_options(cfg: AdapterRunConfig, item: str | None, **options: object) -> AdapterRunConfig:
    """Return cfg with other settings of one expert's adapter, or of the router's (None)."""
    loras = cfg.loras
    if item is None:
        changed = loras.router.model_copy(update=options)
        return cfg.model_copy(update={"loras": loras.model_copy(update={"router": changed})})
    experts = []
    for entry in loras.experts:
        if entry.name == item:
            overrides = entry.overrides.model_copy(update=options)
            entry = entry.model_copy(update={"overrides": overrides})
        experts.append(entry)
    return cfg.model_copy(update={"loras": loras.model_copy(update={"experts": tuple(experts)})})


def search_for(cfg: AdapterRunConfig, item: str | None, make: Make) -> Search:
    """Return the search for the rate of an expert's adapter, or of the router's (None).

    Raises DataError without validation rows, and what `make` raises.
    """
    # How long the training is, its rows tell, and these are read when it is made
    whole = make(with_options(cfg, item, lr=MIDDLE))
    if whole.validate is None:
        section = cfg.section("train_experts" if item else "train_router", item)
        raise DataError(
            f"{section}.lr: auto compares rates on validation rows, and there are none; give it a "
            "number, or the data a split valid"
        )
    opts = in_small(whole.options, cfg.lr_search, whole.steps)
    changed = {name: getattr(opts, name) for name in _OTHERWISE}

    def at(rate: float) -> Task:
        return make(with_options(cfg, item, **changed, lr=rate))

    return Search(at, MIDDLE, changed["steps"])
