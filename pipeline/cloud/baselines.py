"""Dense baselines that a report compares with and nobody has trained: made first, left out, or
asked for, as the configuration says."""

from ..config.run import RunConfig
from ..families.load import parse
from ..run.job import done
from ..run.stages import Addresses
from ..store.artifacts import Store
from ..store.lineage import Lineage

BASELINES = "train_dense"
COMPARES = ("evaluate", "deploy")


def with_baselines(
    cfg: RunConfig, wanted: tuple[str, ...], store: Store
) -> tuple[RunConfig, tuple[str, ...], list[str]]:
    """Return a run and the stages of a command, with what modal.missing_baselines makes of the
    baselines that are not there, and what to tell of it.

    A deployment makes none: what it deploys is measured already, with them or without.
    """
    reports = [stage for stage in COMPARES if stage in wanted]
    if not reports or BASELINES in wanted:
        return cfg, wanted, []
    addresses, lineage = Addresses(cfg), Lineage(store)
    absent = []
    for item in cfg.items(BASELINES):
        if not done(addresses, BASELINES, item, lineage):
            absent.append(str(item))
    if not absent or done(addresses, "evaluate", None, lineage):
        return cfg, wanted, []
    # What the bundle is to hold is not left out of the report either
    skipped = [item for item in absent if item != cfg.deploy.dense]
    if cfg.modal.missing_baselines == "skip" and skipped:
        told = f"without the dense baselines {', '.join(skipped)}, which are not trained, as "
        return _without(cfg, skipped), wanted, [f"{told}modal.missing_baselines: skip asks for"]
    names = ", ".join(absent)
    if cfg.modal.missing_baselines == "make" and "evaluate" in wanted:
        row = cfg.stages[BASELINES]
        stages = dict.fromkeys((*row.after, BASELINES, *wanted))
        told = f"the dense baselines {names} are trained first, as nobody has"
        return cfg, tuple(stages), [f"{told} (modal.missing_baselines: skip leaves them out)"]
    return cfg, wanted, []


def _without(cfg: RunConfig, absent: list[str]) -> RunConfig:
    """Return a run that compares with fewer baselines, which is another report."""
    section, _, name = (cfg.stages[BASELINES].items or "").partition(".")
    raw = cfg.model_dump(mode="json")
    raw[section][name] = [item for item in raw[section][name] if item not in absent]
    return parse(raw)
