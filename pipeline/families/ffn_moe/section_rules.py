"""Whether the sections of an ffn_moe run fit together."""

from ...config.fit import FitConfig
from .run_sections import FfnMoeSectionsConfig
from .sections import ADAPTER, ANCHOR, BASE, DENSE
from .stages import FROM_ZERO


def problems_of(cfg: FfnMoeSectionsConfig) -> list[str]:
    """Return what does not fit, each in a sentence that names the setting: all at once, as whoever
    mends one should not meet the next one only then."""
    problems = [
        *_unknown_domains(cfg),
        *_durations(cfg),
        *_pretrained(cfg),
        *_expert_layers(cfg),
        *_not_for_adapters(cfg),
        *_imported(cfg),
        *_bundled(cfg),
    ]
    if cfg.router.init == "rows" and not cfg.expert.coordinate:
        problems.append(
            "router.init: rows are learned by coordinated experts; set expert.coordinate: true"
        )
    # A kept anchor is an expert too
    slots = len(cfg.experts) + (cfg.trunk.anchor == "keep")
    if cfg.router.top_k > slots:
        problems.append(
            f"router.top_k: {cfg.router.top_k} experts per token, but the stack has "
            f"{slots}; lower it, or name more in expert.domains"
        )
    return problems


def _unknown_domains(cfg: FfnMoeSectionsConfig) -> list[str]:
    known = cfg.partition.names
    given = {
        "trunk": (cfg.trunk.domains, known),
        "expert": (cfg.expert.domains, (*known, *cfg.expert.imported)),
        "dense": (cfg.dense.domains, known),
        "joint": (cfg.joint.domains, known),
    }
    out = []
    for key, (domains, allowed) in given.items():
        wanted = domains or ()
        unknown = [domain for domain in wanted if domain not in allowed]
        if unknown:
            out.append(
                f"{key}.domains: no such domain {', '.join(unknown)}; partition has "
                f"{', '.join(known)}"
            )
        if len(set(wanted)) < len(wanted):
            out.append(f"{key}.domains: a domain is named twice")
    if ANCHOR in cfg.experts:
        out.append(
            f"partition.domains: {ANCHOR} is the trunk's own network among experts; name that "
            "domain otherwise"
        )
    if BASE in cfg.experts and (cfg.expert.form == "low_rank" or cfg.trunk.anchor == "keep"):
        # Of adapters that is told with their other names
        out.append(
            f"partition.domains: {BASE} is what the bundle's trunk is asked for by; name that "
            f"domain otherwise, as partition.labels: {{{BASE}-text: [{BASE}]}}"
        )
    beside = cfg.expert.imported.keys() - set(known)
    taught = len([name for name in cfg.experts if name not in beside])
    if taught > len(known):
        out.append(f"expert.domains: {taught} experts, but the partition has {len(known)} domains")
    return out


def _expert_layers(cfg: FfnMoeSectionsConfig) -> list[str]:
    if cfg.trunk.init:
        return []  # its own config.json says how many layers it has
    out = []
    for key, section in (("expert", cfg.expert), ("joint", cfg.joint)):
        try:
            section.in_layers(cfg.trunk.layers)
        except ValueError as error:
            out.append(f"{key}.layers: {error}")
    return out


def _durations(cfg: FfnMoeSectionsConfig) -> list[str]:
    sections: dict[str, FitConfig] = {
        "trunk": cfg.trunk,
        "expert": cfg.expert,
        "router": cfg.router,
    }
    if cfg.joint.models:
        sections["joint"] = cfg.joint
    out = []
    for key, fit in sections.items():
        # FitConfig refuses two of them; that there is one is asked here, of the whole
        if fit.steps is None and fit.epochs is None and fit.tokens is None:
            out.append(f"{key}: give one of {key}.steps, {key}.epochs, {key}.tokens")
    return out


def _not_for_adapters(cfg: FfnMoeSectionsConfig) -> list[str]:
    if cfg.expert.form != ADAPTER:
        return []
    router = cfg.router
    trains = router.steps != 0
    refused = {
        "expert.coordinate: an adapter has no gate to train beside it": cfg.expert.coordinate,
        "expert.statistics_path: an adapter's text is read by the base in any case; leave it at "
        "own": cfg.expert.statistics_path != "own",
        "expert.init: an adapter starts from nothing added; leave it at trunk": (
            cfg.expert.init != "trunk"
        ),
        "trunk.anchor: the base answers beside adapters in any case; leave it at discard": (
            cfg.trunk.anchor == "keep"
        ),
        "router.steps: the router of adapters follows from statistics alone; set router.steps to "
        "0": trains,
        "router.top_k: one adapter reads a text; set it to 1": router.top_k > 1,
        "router.balance: nothing balances texts between adapters; leave it at none": (
            router.balance != "none"
        ),
    }
    out = [f"{sentence} (expert.form: adapter)" for sentence, is_so in refused.items() if is_so]
    if router.prompt_tokens > cfg.trunk.context_tokens:
        out.append(
            f"router.prompt_tokens: {router.prompt_tokens} tokens, and trunk.context_tokens is "
            f"{cfg.trunk.context_tokens}; lower it"
        )
    reserved = {BASE, "none", "default"} & set(cfg.experts)
    if reserved:
        out.append(
            f"partition.domains: {', '.join(sorted(reserved))} has a meaning of its own where "
            "experts are adapters; name that domain otherwise"
        )
    return out


def _imported(cfg: FfnMoeSectionsConfig) -> list[str]:
    own = cfg.expert
    out = []
    strange = [name for name in own.imported_text if name not in own.imported]
    if strange:
        out.append(
            f"expert.imported_text: {', '.join(strange)} is not imported; name its package under "
            "expert.imported"
        )
    if not own.imported:
        return out
    left_out = [name for name in own.imported if name not in cfg.experts]
    if left_out:
        out.append(
            f"expert.imported: {', '.join(left_out)} is not among expert.domains; name it there"
        )
    if own.coordinate:
        out.append(
            "expert.imported: a package has no gate of its own; set expert.coordinate to false"
        )
    without = [name for name in own.imported if name not in cfg.partition.names]
    if without and cfg.router.steps != 0:
        out.append(
            f"router.steps: gates would be trained away from {', '.join(without)}, which has no "
            "text here; set router.steps to 0, or name public text of it in data and "
            "partition.domains"
        )
    return out


def _bundled(cfg: FfnMoeSectionsConfig) -> list[str]:
    dense = cfg.deploy.dense
    if dense is None:
        return []
    out = []
    if dense not in cfg.dense.baselines:
        known = ", ".join(cfg.dense.baselines) or "none"
        out.append(
            f"deploy.dense: {dense} is no dense baseline of this run; dense.baselines has {known}"
        )
    if cfg.expert.form == ADAPTER:
        out.append(
            "deploy.dense: a bundle of adapters holds no dense model; leave it out "
            "(expert.form: adapter)"
        )
    if DENSE in cfg.experts:
        out.append(
            f"partition.domains: {DENSE} is what the bundle's dense model is asked for by "
            "(deploy.dense); name that domain otherwise"
        )
    return out


def _pretrained(cfg: FfnMoeSectionsConfig) -> list[str]:
    if not cfg.trunk.init:
        return []
    out = []
    for name in sorted(FROM_ZERO):
        if name in cfg.dense.baselines:
            out.append(
                f"dense.baselines: {name} trains from zero, which a pretrained trunk rules out"
            )
    if cfg.joint.models:
        out.append(
            "joint.models: they train from zero, with sizes that a pretrained trunk does not give; "
            "set trunk.init to null, or joint.models to []"
        )
    return out
