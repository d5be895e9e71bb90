"""What somebody with rows of their own needs to train one adapter on a run's base: the base, or
where that is to be had, settings, instructions. No row of the run goes along.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from ...config.base import ADAPTER_NAME
from ...errors import ConfigError, MismatchError
from ...store.artifacts import write_text
from ...store.room import writing
from .. import Parts
from ..kit_files import (
    README,
    SETTINGS,
    KitFacts,
    readme_text,
    settings_text,
    write_facts,
)
from .base import ModelKind, ModelRef, locate
from .config import AdapterRunConfig
from .sections import RESERVED

BASE = "base"
# Where whoever trains puts rows, unless another path is named
ROWS = "rows"
LABEL = "A"


def write_kit(
    cfg: AdapterRunConfig, parts: Parts, domain: str, folder: Path, kind: ModelKind
) -> None:
    """Write the kit for one expert to an empty folder.

    Raises ConfigError for a name that no expert may have, MissingArtifact where the base is not
    pinned yet, DataError when it cannot be found.
    """
    if not re.fullmatch(ADAPTER_NAME, domain) or domain in RESERVED:
        raise ConfigError(
            f"{domain!r} cannot be an expert's name; use small letters, digits and underscores"
        )
    of_base = parts.folder("train_shared")
    pin = ModelRef.read(of_base)
    named, words = _base(pin, locate(pin, of_base, kind), folder)
    text = settings_text(
        _settings(cfg, domain, named), "rows, how they are asked, learning rate and runtime"
    )
    write_text(folder / SETTINGS, text)
    readme = readme_text(
        domain,
        words,
        f"a file of rows (`.jsonl`, with the columns that `{SETTINGS}` names) into `{ROWS}/` "
        "beside this file",
        "`expert.safetensors` (the trained adapter) and `expert.json` (what it is of, and its sum)",
        "What it tells of your rows: an adapter may repeat what it was trained on often. There are "
        "no statistics.",
    )
    write_text(folder / README, readme)
    write_facts(folder, KitFacts(domain, pin.digest, pin.digest))


def check_kit(parts: Parts, facts: KitFacts) -> None:
    """Raise MismatchError where the base here is not the kit's, before anything is trained on
    it."""
    pin = ModelRef.read(parts.folder("train_shared"))
    if pin.digest != facts.trunk:
        raise MismatchError(
            f"the base here (pin {pin.digest[:12]}) is not the one that the kit is for "
            f"({facts.trunk[:12]}), and an expert trained on it would be refused; {README} says "
            "how to get it"
        )


def _base(pin: ModelRef, where: Path, folder: Path) -> tuple[dict[str, Any], str]:
    """Put a base that was built here into a kit; return the settings that name the base, and in
    words what is to be done to have it. Raises DiskFull."""
    if pin.source == "hub":
        named = {"model": pin.model, "revision": pin.revision}
        return named, f"The base is {pin.model} on the Hub at {pin.revision}, fetched by itself."
    named = {"model": f"./{BASE}"}
    if pin.source == "built":
        (folder / BASE).mkdir()
        for name in pin.files:
            with writing(folder / BASE / name):
                shutil.copyfile(where / name, folder / BASE / name)
        return named, f"The base is in `{BASE}/`."
    sums = "".join(f"    {digest}  {name}\n" for name, digest in sorted(pin.files.items()))
    return named, (
        f"Put the model's files into `{BASE}/`; ask whoever made the kit for them. Its files and "
        f"their sha256:\n\n{sums}"
    )


def _settings(cfg: AdapterRunConfig, domain: str, base: dict[str, Any]) -> dict[str, Any]:
    """Return expert.yaml: one expert on rows, over the kit's base."""
    loras = cfg.loras
    own: dict[str, Any] = {"name": domain, "label": LABEL}
    options = loras.defaults
    if domain in cfg.experts:
        # As it is asked and answered here
        said = loras.entry(domain).model_dump(
            mode="json",
            include={"task", "prompt", "answer", "metric", "max_new_tokens"},
            exclude_unset=True,
        )
        own |= said
        options = loras.options(domain)
    own["dataset"] = {"source": "jsonl", "path": f"./{ROWS}"}
    opened = loras.base.model_dump(
        mode="json", exclude={"model", "revision", "build"}, exclude_none=True
    )
    dataset: dict[str, Any] = {"sources": [{"expert": domain, "from": "loras"}]}
    if options.neutral_share:
        dataset["neutral"] = {"seen": list(cfg.dataset.neutral.seen)}
    # Without neutral words there are none to be ambiguous with
    dataset["ambiguous_share"] = 0.0
    return {
        "name": f"kit-{domain}",
        "family": cfg.family,
        "seed": cfg.seed,
        # Of the machine there: an expert's arithmetic is its own affair
        "dtype": "auto",
        "loras": {
            "base": {**opened, **base},
            "defaults": options.model_dump(mode="json", exclude_unset=True),
            "experts": [own],
            "router": {"top_k": 1},
        },
        "dataset": dataset,
    }
