"""One run, in the format and of the part that somebody wants.

L layers, E experts, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .... import report
from ....errors import ConfigError, MissingArtifact
from ....model.router import gate_name
from ....model.trunk import build
from ....protocols import Progress
from ....report import LanguageReport
from ....store.artifacts import sha256, write_text
from ....store.bundle import SUMS, write_sums
from ....store.reading import read_bytes, read_object
from ....store.streamed import Streamed
from ... import ExportWish, Parts
from ..bundle import stock_settings
from ..config import FfnMoeConfig
from ..fingerprint import trunk_tensors as stored_tensors
from ..networks import SOUP, TRUNK, stack_row
from ..parts import expert_layers, stored_experts, stored_settings, stored_trunk
from ..sections import ADAPTER, ANCHOR
from ..stock import dense_settings, generation_settings, run_tokenizer, text_start
from ..trunk_sizes import trunk_settings
from .checkpoint import write_checkpoint
from .job import Job
from .tensors import (
    Tensors,
    adapted_tensors,
    all_gates,
    expert_tensors,
    mean_tensors,
    mixture_tensors,
    streamed,
    trunk_tensors,
)

# Of an expert that is an adapter, as adapters/peft_io.py has them, which imports PEFT
LORA = "adapter/adapter_model.safetensors"
LORA_SETTINGS = "adapter/adapter_config.json"


@dataclass(frozen=True)
class _Wanted:
    """A part of a run, opened."""

    tensors: Tensors  # of a dense model; of a mixture without its feed-forward networks
    experts: list[Tensors]  # of a mixture, in the order of its gates
    base: Tensors  # of a mixture: the networks of layers that have no experts
    gates: Mapping[str, Tensor]  # of a mixture, by the store's names, in layers with experts
    what: str  # for people: a noun with its article
    row: str  # of the report's quality table
    parts: dict[str, str]  # addresses by name
    slug: str  # for a file's name


def check(cfg: FfnMoeConfig, wish: ExportWish) -> None:
    """Raise ConfigError for what no run of these settings has, MismatchError for what the format
    cannot hold, as far as the trunk's settings tell on this machine."""
    if wish.rank:
        _check_compressing(cfg, wish)
        return
    known = (*cfg.experts, ANCHOR)
    if wish.format == "expert" and wish.expert is None:
        raise ConfigError(f"--format expert: name one with --expert; there are {', '.join(known)}")
    if wish.expert is not None and wish.expert not in known:
        raise ConfigError(
            f"--expert {wish.expert}: there is no such expert; there are {', '.join(known)} "
            f"({ANCHOR} is the trunk with its own network)"
        )
    takes = {"expert": ("expert", "gguf"), "dense": ("gguf",), "q8_0": ("gguf",)}
    given = {"expert": wish.expert, "dense": wish.dense, "q8_0": wish.dtype == "q8_0"}
    for name, formats in takes.items():
        if given[name] and wish.format not in formats:
            option = f"--dtype {name}" if name == "q8_0" else f"--{name}"
            raise ConfigError(f"{option} is for --format {' or '.join(formats)}, not {wish.format}")
    if wish.expert and wish.dense:
        raise ConfigError("--expert and --dense: one expert, or the mean of them; give one")
    if wish.format == "adapters" and wish.dtype:
        raise ConfigError("--dtype: adapters are kept as they are stored; leave it out")
    if cfg.expert.form == ADAPTER and wish.format != "adapters" and not wish.expert:
        raise ConfigError(
            f"--format {wish.format}: the experts of this run are adapters, each for a whole text, "
            "which no one model holds; export them with --format adapters, or merge one with "
            "--expert"
        )
    if wish.format == "adapters" and cfg.expert.form == "full":
        raise ConfigError(
            "--format adapters: the experts of this run are whole networks and no low-rank ones, "
            "which PEFT adapters are; compress makes such of them (it takes a --rank), or export "
            "with --format expert"
        )
    if wish.format == "gguf":
        _check_gguf(cfg, wish)


def _check_gguf(cfg: FfnMoeConfig, wish: ExportWish) -> None:
    from .gguf_file import Experts, Gguf, check_gguf

    settings = trunk_settings(cfg)
    if settings is None:
        return
    with torch.device("meta"):
        trunk, dummy = build(settings)
    networks = expert_tensors(dummy)
    experts = None
    tensors = trunk_tensors(trunk)
    if wish.expert or wish.dense:
        tensors |= networks
    else:
        gate = Streamed.of(torch.empty(len(cfg.experts), settings["hidden_size"], device="meta"))
        gates = dict.fromkeys(range(settings["num_hidden_layers"]), gate)
        experts = Experts((networks,) * len(cfg.experts), gates, cfg.router.top_k)
    check_gguf(Gguf(cfg.name, settings, tensors, experts))


def _check_compressing(cfg: FfnMoeConfig, wish: ExportWish) -> None:
    if cfg.expert.form != "full":
        raise ConfigError(
            f"--rank: the experts of this run are of rank {cfg.expert.adapter_rank} as they are "
            "(expert.form); export them with --format adapters"
        )
    if wish.expert is not None and wish.expert not in cfg.experts:
        raise ConfigError(
            f"--expert {wish.expert}: there is no such expert; there are {', '.join(cfg.experts)}"
        )


def export(
    cfg: FfnMoeConfig, parts: Parts, wish: ExportWish, folder: Path, progress: Progress
) -> None:
    """Write what is wanted to an empty folder, with a card and SHA256SUMS.

    Raises ConfigError, MissingArtifact, DamagedArtifact, or MismatchError for what the format
    cannot hold.
    """
    check(cfg, wish)
    tokenizer = run_tokenizer(parts)
    start = text_start(cfg, tokenizer)
    settings = stored_settings(parts, "train_shared")
    job = Job(cfg, wish, settings, tokenizer, start, folder, progress)
    if wish.format == "adapters":
        # Only this format needs what this imports
        from .adapters import write_adapters

        about, sums = write_adapters(job, parts)
    else:
        wanted = _opened(cfg, parts, wish)
        about, sums = _gguf(job, wanted) if wish.format == "gguf" else _stock(job, wanted)
        about |= {"parts": wanted.parts, "row": wanted.row}
    about["run"] = cfg.name
    _seal(folder, report.export_card(_report(parts), about), sums)


def _gguf(job: Job, wanted: _Wanted) -> tuple[dict[str, Any], dict[str, str]]:
    """Write a GGUF file; return what the card says of it, and sums of files by name."""
    # Only this format needs what these import
    from .gguf_file import Experts, Gguf, kept_as, write_gguf
    from .gguf_tokenizer import vocabulary

    generation = generation_settings(job.settings, job.tokenizer.end_id, job.start)
    named = generation["eos_token_id"]
    others = named if isinstance(named, list) else []
    ends = dict.fromkeys([job.tokenizer.end_id, *others])
    words = vocabulary(job.tokenizer, job.settings["vocab_size"], job.start, tuple(ends))
    dtype = job.wish.dtype
    file = "-".join(filter(None, (job.cfg.name, wanted.slug, dtype))) + ".gguf"
    experts = None
    if wanted.experts:
        # llama.cpp knows no layers without experts where others have some
        count = job.settings["num_hidden_layers"]
        filled = all_gates(wanted.gates, count, len(wanted.experts))
        gates = {}
        for layer in range(count):
            gates[layer] = Streamed.of(filled[gate_name(layer)])
        experts = Experts(tuple(wanted.experts), gates, job.cfg.router.top_k)
    model = Gguf(job.cfg.name, job.settings, wanted.tensors, experts)
    notes = write_gguf(job.folder / file, model, words, dtype, job.progress)
    about = {
        "what": f"{wanted.what}, as a GGUF file of {kept_as(dtype)}, made with MoleForge.",
        "library": "gguf",
        "tags": ["gguf"],
        "example": "gguf_example.md",
        "file": file,
        "context_tokens": job.settings["max_position_embeddings"],
        "notes": notes,
    }
    return about, {}


def _stock(job: Job, wanted: _Wanted) -> tuple[dict[str, Any], dict[str, str]]:
    """Write a stock checkpoint; return what the card says of it, and sums of files by name."""
    tensors = wanted.tensors
    if wanted.experts:
        top_k = job.cfg.router.top_k
        layers = expert_layers(job.cfg, job.settings["num_hidden_layers"])
        settings = stock_settings(job.settings, len(wanted.experts), top_k, layers)
        made = mixture_tensors(wanted.experts, wanted.base, wanted.gates, settings)
        tensors |= made.gates | made.base
        for expert in made.experts:
            tensors |= expert
    else:
        settings = dense_settings(job.settings)
    sums, dtype = write_checkpoint(job, job.folder, settings, tensors)
    kind = settings["architectures"][0]
    about = {
        "what": f"{wanted.what}, as an ordinary `{kind}` in {dtype}, made with MoleForge.",
        "library": "transformers",
        "tags": ["mixture-of-experts"] if wanted.experts else [],
        "example": "transformers_example.md",
        "notes": [],
    }
    return about, sums


def _seal(folder: Path, card: str, sums: Mapping[str, str]) -> None:
    """Write the card, and last what makes the folder whole."""
    write_text(folder / "README.md", card)
    found = dict(sums)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != SUMS and name not in found:
            found[name] = sha256(path)
    write_sums(folder, found)


def _report(parts: Parts) -> LanguageReport | None:
    """Return the run's report, None where it was not evaluated."""
    try:
        found = report.read(read_bytes(parts.folder("evaluate") / "report.json"))
    except MissingArtifact:
        return None
    return found if isinstance(found, LanguageReport) else None


def _opened(cfg: FfnMoeConfig, parts: Parts, wish: ExportWish) -> _Wanted:
    """Return the part of a run that is wanted, its tensors mapped."""
    addresses = {"trunk": parts.manifest("train_shared").address}
    if wish.expert == ANCHOR:
        what = "The trunk with its own feed-forward network"
        # Opened to compute with, its norms would be in fp32
        return _dense(streamed(stored_tensors(parts)), what, TRUNK, addresses, "base")
    trunk, dummy = stored_trunk(cfg, parts)
    names = (wish.expert,) if wish.expert else cfg.experts
    for name in names:
        addresses[f"expert {name}"] = parts.manifest("train_experts", name).address
    if wish.expert and cfg.expert.form == ADAPTER:
        what = f"The trunk with the adapter of the expert {wish.expert} merged into it"
        lora = parts.tensors("train_experts", LORA, wish.expert)
        whole = trunk_tensors(trunk) | expert_tensors(dummy)
        # One that was trained elsewhere has a rank and an alpha of its own
        made = read_object(parts.folder("train_experts", wish.expert) / LORA_SETTINGS)
        merged = adapted_tensors(whole, lora, made["lora_alpha"] / made["r"])
        return _dense(merged, what, wish.expert, addresses, wish.expert)
    # Opened and hashed one by one, so those that are not wanted are left alone
    fewer = cfg.expert.model_copy(update={"domains": names})
    found = dict(stored_experts(cfg.model_copy(update={"expert": fewer}), parts, dummy))
    own = {name: expert_tensors(expert) for name, expert in found.items()}
    if wish.expert:
        what = f"The trunk with the feed-forward network of the expert {wish.expert}"
        whole = trunk_tensors(trunk) | own[wish.expert]
        return _dense(whole, what, wish.expert, addresses, wish.expert)
    if wish.format == "dense" or wish.dense:
        what = "The trunk with the mean of the experts' feed-forward networks"
        mean = mean_tensors([own[name] for name in cfg.experts])
        return _dense(trunk_tensors(trunk) | mean, what, SOUP, addresses, "dense")
    addresses["router"] = parts.manifest("train_router").address
    gates = parts.tensors("train_router", "router.safetensors")
    return _Wanted(
        tensors=trunk_tensors(trunk),
        experts=list(own.values()),
        base=expert_tensors(dummy),
        gates=gates,
        what=f"A mixture of {len(own)} experts, {cfg.router.top_k} of them active per token",
        row=stack_row(cfg),
        parts=addresses,
        slug="stack",
    )


def _dense(tensors: Tensors, what: str, row: str, parts: dict[str, str], slug: str) -> _Wanted:
    return _Wanted(
        tensors=tensors,
        experts=[],
        base={},
        gates={},
        what=what,
        row=row,
        parts=parts,
        slug=slug,
    )
