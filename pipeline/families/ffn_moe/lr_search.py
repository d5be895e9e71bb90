"""The searches of an ffn_moe run: which short trainings tell the rate of which."""

from collections.abc import Callable

from ...config.fit import FitConfig
from ...train.loop import NoTraining, Task
from ...train.lr_search import Search
from .. import Parts
from .config import FfnMoeConfig
from .cost import search_settings
from .joint.train import joint_task
from .parts import shards_of, training_tokens
from .rates import middle_of
from .sections import ADAPTER
from .train import dense_task, expert_task, router, shared

EVERY = "every_domain"  # whose seeds the expert of a search has


def lr_shared(cfg: FfnMoeConfig, parts: Parts) -> Search:
    """Return the search for the trunk's rate."""

    def task(opts: FitConfig) -> Task:
        made = shared(cfg.model_copy(update={"trunk": opts}), parts)
        if isinstance(made, NoTraining):
            raise AssertionError("a search for a trunk that is not trained")
        return made

    return _search(cfg, parts, "lr_shared", None, task)


def lr_experts(cfg: FfnMoeConfig, parts: Parts) -> Search:
    """Return the search for the rate that all experts share: one expert of their form on all of the
    trunk's domains, each as often."""
    domains = cfg.trunk_domains

    def task(opts: FitConfig) -> Task:
        searching = cfg.model_copy(update={"expert": opts})
        if cfg.expert.form != ADAPTER:
            return expert_task(searching, parts, EVERY, domains)
        # PEFT takes a second, and no other run needs it
        from .adapter.train import expert_task as adapter_task

        return adapter_task(searching, parts, EVERY, domains)

    return _search(cfg, parts, "lr_experts", None, task)


def lr_router(cfg: FfnMoeConfig, parts: Parts) -> Search:
    """Return the search for the gates' rate."""

    def task(opts: FitConfig) -> Task:
        return router(cfg.model_copy(update={"router": opts}), parts)

    return _search(cfg, parts, "lr_router", None, task)


def lr_dense(cfg: FfnMoeConfig, parts: Parts, item: str) -> Search:
    """Return the search for the rate of continued baselines that train all weights, or an ffn."""
    domains = cfg.trunk_domains

    def task(opts: FitConfig) -> Task:
        return dense_task(cfg, parts, item, opts, domains)

    return _search(cfg, parts, "lr_dense", item, task)


def lr_joint(cfg: FfnMoeConfig, parts: Parts, item: str) -> Search:
    """Return the search for the rate of one of joint.models."""

    def task(opts: FitConfig) -> Task:
        return joint_task(cfg.model_copy(update={"joint": opts}), parts, item)

    return _search(cfg, parts, "lr_joint", item, task)


def _search(
    cfg: FfnMoeConfig,
    parts: Parts,
    stage: str,
    item: str | None,
    task: Callable[[FitConfig], Task],
) -> Search:
    shards = shards_of(parts, cfg.domains_read(stage, item))
    opts, trains = search_settings(cfg, stage, item, training_tokens(shards))

    def at(rate: float) -> Task:
        return task(opts.model_copy(update={"lr": rate}))

    if opts.steps is None:
        raise AssertionError("a search without steps")
    return Search(at, middle_of(cfg, stage, trains), opts.steps)
