"""An ffn_moe stack as an ordinary Qwen3-MoE or Mixtral checkpoint, and the same stack opened again
from it.

What is written is the stored tensors under the names that transformers gives them; nothing is
computed but the matrices of low-rank experts, merged one after another. Their base and deltas go
along as they are, so that who serves them runs the base's products once for all of a token's
experts. L layers, E experts, D model width.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ...errors import DamagedArtifact, MismatchError
from ...hardware import device
from ...model import low_rank
from ...model.experts import Expert, common_layers, from_tensors
from ...model.router import gate_name
from ...model.trunk import open_tensors, window
from ...protocols import Progress
from ...store.artifacts import load_tensors
from ...store.bundle import (
    ABOUT,
    DENSE,
    EARLIER_FORMAT,
    FORMAT,
    UNMERGED_FORMAT,
    BundleFile,
    MadeFile,
    about,
    listed,
    start_ids,
    write,
)
from ...store.foreign import ForeignFile, check_kind, check_model_files, read_object
from .. import Parts
from ..report_files import report_files
from .config import FfnMoeConfig
from .export.tensors import Tensors, expert_tensors, mixture_tensors, streamed
from .naming import NAMINGS
from .parts import expert_layers, mixture_of, stored_experts, stored_settings, stored_trunk
from .pretrained import is_pinned, pinned_tensors
from .sections import ANCHOR
from .stack import FfnStack
from .stock import (
    dense_settings,
    generation_settings,
    old_rope,
    run_tokenizer,
    text_start,
)

# llama.cpp reads only names with model in front
TRUNK = "model-trunk.safetensors"
ROUTER = "model-router.safetensors"
BASE = "model-base.safetensors"  # the networks of layers without experts
UNMERGED = "unmerged"  # folder of a low-rank stack's base and deltas, which no index names
UNMERGED_BASE = f"{UNMERGED}/base.safetensors"
MIXTURES = {"qwen3": "qwen3_moe", "llama": "mixtral", "mistral": "mixtral"}
CLASSES = {"qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM"}
# All that a bundle holds. A library reads some other names too, wherever it finds them.
FILES = re.compile(
    r"experts\.json|made\.json|README\.md|report\.(json|html)|config\.json|trunk\.json"
    r"|generation_config\.json|tokenizer(_config)?\.json|model\.safetensors\.index\.json"
    r"|model-[^/]+\.safetensors|unmerged/[^/]+\.safetensors"
)
DENSE_WEIGHTS = "model.safetensors"
# And where it says that it holds a dense model
DENSE_FILES = re.compile(
    rf"{DENSE}/((generation_)?config\.json|tokenizer(_config)?\.json|{re.escape(DENSE_WEIGHTS)})"
)
# What a dense model has in common with the trunk: its tokens, and what is kept of each of them
LIKE_TRUNK = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)


@dataclass(frozen=True)
class _Member:
    """One expert of the stack, where it is stored and where it goes."""

    name: str
    domain: str | None  # None: the anchor, which has none of its own
    address: str
    stage: str
    item: str | None
    stored: str  # file of the artifact
    file: str  # file of the bundle

    @property
    def unmerged(self) -> str:
        """File of the bundle with its deltas, where it has any."""
        return f"{UNMERGED}/{self.file.removeprefix('model-')}"


def bundle(cfg: FfnMoeConfig, parts: Parts, folder: Path, progress: Progress) -> dict:
    """Write the stack to a folder as a checkpoint with tokenizer, report and model card; return
    metrics.

    Raises MissingArtifact or DamagedArtifact, and MismatchError for a trunk that no stock mixture
    can be built on.
    """
    settings = stored_settings(parts, "train_shared")
    members = _members(cfg, parts)
    tokenizer = run_tokenizer(parts)
    start = text_start(cfg, tokenizer)
    layers = expert_layers(cfg, settings["num_hidden_layers"])
    stock = stock_settings(settings, len(members), cfg.router.top_k, layers)
    described = _described(cfg, parts, members, stock, start)
    texts: dict[str, str | dict] = {
        "config.json": stock,
        "generation_config.json": generation_settings(settings, tokenizer.end_id, start),
        **tokenizer.stock_files(start),
        ABOUT: described,
        **report_files(cfg, parts, described),
    }
    if cfg.expert.is_whole:
        files = _files(parts, members, stock["architectures"][0], settings)
    else:
        files = _made_files(cfg, parts, members, stock, settings)
    if cfg.deploy.dense is None:
        metrics: dict[str, Any] = write(folder, files, texts, progress)
        return metrics | {"experts": len(members)}
    item = cfg.deploy.dense
    own = dense_settings(stored_settings(parts, "train_dense", item)) | {"dtype": "float32"}
    beside: dict[str, str | dict] = {
        "config.json": own,
        "generation_config.json": generation_settings(own, tokenizer.end_id, start),
        **tokenizer.stock_files(start),
    }
    texts |= {f"{DENSE}/{name}": text for name, text in beside.items()}
    weights = f"{DENSE}/{DENSE_WEIGHTS}"
    files.append(_stored(parts, weights, "train_dense", DENSE_WEIGHTS, item))
    metrics = write(folder, files, texts, progress)
    dense_bytes = sum(path.stat().st_size for path in (folder / DENSE).iterdir())
    return metrics | {"experts": len(members), "dense": item, "dense_bytes": dense_bytes}


def reassemble(folder: Path) -> FfnStack:
    """Build the finished stack, as `assemble` does, from a bundle alone.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, or NewerStore.
    """
    described = about(folder)
    try:
        settings = _checked(folder, described)
        trunk, like = open_tensors(settings, load_tensors(folder / TRUNK), dtype=torch.float32)
        naming = NAMINGS[described["architecture"]]
        count = len(like.layers)
        layers = tuple(described.get("layers") or range(count))
        if len(layers) < count:
            _fill(like, load_tensors(folder / BASE), layers)
        experts = {}
        if described.get("unmerged"):
            experts = _unmerged(folder, described, like)
            # A class that knows no layers without experts has gates there, of zeros
            layers = common_layers(list(experts.values()))
        else:
            for number, entry in enumerate(described["experts"]):
                stored = load_tensors(folder / entry["file"])
                own = {}
                for name in _names_in(like, layers):
                    own[name] = stored[naming.expert(number, name)]
                experts[entry["name"]] = from_tensors(like, own, layers)
        gates = load_tensors(folder / ROUTER)
        rows = []
        for layer in layers:
            rows.append(gates[naming.gate(gate_name(layer))])
        weight_LED = torch.stack(rows)
        mixture = mixture_of(list(experts.values()), weight_LED, described["top_k"])
    except (
        OSError,
        LookupError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
    ) as error:
        # torch names the tensors that do not fit on lines of their own
        reason = " ".join(str(error).split())
        raise DamagedArtifact(
            f"{folder} does not hold the stack that its {ABOUT} describes: {reason}"
        ) from None
    return FfnStack(trunk.to(device()), experts, mixture)


def _checked(folder: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trunk's settings of a bundle whose files are all such that nothing in them runs.

    Raises ForeignFile, DamagedArtifact, KeyError, TypeError, OSError.
    """
    names = listed(folder)
    dense = described.get("dense")
    for name in sorted(names):
        if not FILES.fullmatch(name) and not (dense and DENSE_FILES.fullmatch(name)):
            raise ForeignFile(f"{name} is no file of such a bundle")
    check_model_files(folder, names)
    check_kind(read_object(folder, "config.json"), "config.json", CLASSES)
    settings = read_object(folder, "trunk.json")
    check_kind(settings, "trunk.json", MIXTURES)
    if dense:
        _check_dense(folder, described, settings)
    for key in ("top_k", "context_tokens"):
        if type(described[key]) is not int:
            raise ForeignFile(f"{key} is {described[key]!r}")
    for token in start_ids(described):
        if type(token) is not int:
            raise ForeignFile(f"a start of texts is {token!r}")
    for entry in described["experts"]:
        for file in (entry["file"], entry.get("unmerged")):
            if file is not None and file not in names:
                raise ForeignFile(f"{file!r} is no file of it")
    return settings


def _check_dense(folder: Path, described: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ForeignFile, KeyError, TypeError or OSError for a dense model that is none, or that
    reads and keeps other tokens than a trunk with these settings."""
    from transformers import AutoConfig

    name = described["dense"]["name"]
    # Who asks is told of it
    if not isinstance(name, str) or not name.isidentifier():
        raise ForeignFile(f"a dense model is named {name!r}")
    if any(entry["name"] == DENSE for entry in described["experts"]):
        raise ForeignFile(f"an expert is named {DENSE}, as the dense model is")
    file = f"{DENSE}/config.json"
    own = read_object(folder, file)
    check_kind(own, file, MIXTURES)
    # Both whole: what a class has by default is left out of a stock file
    wanted = AutoConfig.for_model(**settings)
    found = AutoConfig.for_model(**own)
    for key in LIKE_TRUNK:
        if getattr(found, key, None) != getattr(wanted, key, None):
            raise ForeignFile(f"{file} has another {key} than the trunk")


def _unmerged(folder: Path, described: Mapping[str, Any], like: Expert) -> dict[str, Expert]:
    """Return a low-rank stack's experts as they were trained: deltas on one base.

    Raises OSError, KeyError, ValueError, RuntimeError.
    """
    base = from_tensors(like, load_tensors(folder / UNMERGED_BASE)).to(device())
    experts: dict[str, Expert] = {}
    for entry in described["experts"]:
        file = entry.get("unmerged")
        if file is None:
            experts[entry["name"]] = base
            continue
        tensors = load_tensors(folder / file)
        scale = float(described["unmerged"]["scale"])
        experts[entry["name"]] = low_rank.from_tensors(base, tensors, scale).to(device())
    return experts


def _names_in(like: Expert, layers: Collection[int]) -> list[str]:
    """Return the names that an expert's tensors have in a dense model, of some layers alone."""
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    return [name for name in like.named() if name.startswith(prefixes)]


def _fill(like: Expert, stored: Mapping[str, torch.Tensor], layers: Collection[int]) -> None:
    """Give an expert that is a pattern the networks of the layers that have no experts.

    Raises KeyError when one is not there.
    """
    plain = [layer for layer in range(len(like.layers)) if layer not in layers]
    for layer in plain:
        found = {}
        prefix = f"model.layers.{layer}.mlp."
        for name in _names_in(like, [layer]):
            found[name.removeprefix(prefix)] = stored[name]
        like.layers[layer].load_state_dict(found, assign=True)
    like.requires_grad_(False)


def stock_settings(
    settings: Mapping[str, Any],
    experts: int,
    top_k: int,
    layers: Collection[int] | None = None,
) -> dict[str, Any]:
    """Return config.json of the stock mixture on a trunk with these Hugging Face config fields.

    layers: those with experts, all by default; Mixtral knows no others.

    Raises MismatchError for what the stock mixture has no place for.
    """
    from transformers import AutoConfig

    _check_fits(settings)
    kind = MIXTURES[settings["model_type"]]
    # These three say which class reads the file, and here it is another one than the trunk's
    of_class = {"model_type", "architectures", "transformers_version"}
    known = AutoConfig.for_model(kind).to_dict().keys() - of_class
    fields = {key: value for key, value in settings.items() if key in known}
    fields["num_experts_per_tok"] = top_k
    fields["num_local_experts"] = experts
    fields["sliding_window"] = window(settings)
    if kind == "qwen3_moe":
        fields["moe_intermediate_size"] = settings["intermediate_size"]
        fields["use_sliding_window"] = fields["sliding_window"] is not None
        fields["norm_topk_prob"] = True  # an expert that trained alone keeps weight 1
        fields["decoder_sparse_step"] = 1
        every = range(settings["num_hidden_layers"])
        sparse = every if layers is None else layers
        fields["mlp_only_layers"] = [layer for layer in every if layer not in sparse]
    # Which the class of Qwen3's mixture reads, and its configuration has no field for
    head_dim = settings.get("head_dim")
    if head_dim and head_dim * settings["num_attention_heads"] != settings["hidden_size"]:
        fields["head_dim"] = head_dim
    written = AutoConfig.for_model(kind, **fields).to_diff_dict()
    written["architectures"] = [CLASSES[kind]]
    written["dtype"] = "float32"
    written["use_cache"] = True
    # Readers before transformers 5 know the second name only
    written["num_local_experts"] = experts
    written["num_experts"] = experts
    return written | old_rope(written.get("rope_parameters") or {})


def _check_fits(settings: Mapping[str, Any]) -> None:
    kind = settings["model_type"]
    odd = []
    attention = set(settings.get("layer_types") or ())
    if len(attention) > 1:
        odd.append(f"layers that differ in attention ({', '.join(sorted(attention))})")
    # Of the kinds whose mixture lacks them one has any, whatever the settings of others say
    if kind == "llama":
        odd += [name for name in ("attention_bias", "mlp_bias") if settings.get(name)]
    if odd:
        raise MismatchError(
            f"the trunk ({kind}) has {' and '.join(odd)}, which {CLASSES[MIXTURES[kind]]} has no "
            "place for, so the stack cannot be bundled as a stock checkpoint; choose another "
            "trunk.init. Evaluation is not affected"
        )


def _members(cfg: FfnMoeConfig, parts: Parts) -> list[_Member]:
    """Return the stack's experts in order."""
    found: list[tuple[str, str | None, str, str | None, str]] = []
    if cfg.trunk.anchor == "keep":
        found.append((ANCHOR, None, "train_shared", None, "dummy.safetensors"))
    for name in cfg.experts:
        found.append((name, name, "train_experts", name, "expert.safetensors"))
    members = []
    for number, (name, domain, stage, item, stored) in enumerate(found):
        address = parts.manifest(stage, item).address
        # Numbered, so that a listing of the folder has the stack's order
        file = f"model-expert-{number:03}-{name}.safetensors"
        members.append(_Member(name, domain, address, stage, item, stored, file))
    return members


def _described(
    cfg: FfnMoeConfig,
    parts: Parts,
    members: Sequence[_Member],
    stock: Mapping[str, Any],
    start: Sequence[int],
) -> dict[str, Any]:
    """Return experts.json."""
    experts = []
    labels = cfg.partition.shown_labels
    for member in members:
        entry: dict[str, str | None] = {
            "name": member.name,
            "domain": member.domain,
            "address": member.address,
            "file": member.file,
        }
        if cfg.expert.delta_rank and member.domain is not None:
            entry["unmerged"] = member.unmerged
        if member.domain is not None and member.domain in labels:
            entry["label"] = labels[member.domain]
        experts.append(entry)
    return _form(cfg, parts, stock) | {
        "format": _format(cfg),
        "family": cfg.family,
        "run": cfg.name,
        "architecture": stock["architectures"][0],
        "top_k": cfg.router.top_k,
        "context_tokens": stock["max_position_embeddings"],
        "start_ids": list(start),
        "experts": experts,
        "trunk": {"address": parts.manifest("train_shared").address, "file": TRUNK},
        "router": {"address": parts.manifest("train_router").address, "file": ROUTER},
        "tokenizer": {"address": parts.manifest("tokenizer").address},
        "report": {"address": parts.manifest("evaluate").address},
    }


def _format(cfg: FfnMoeConfig) -> int:
    if cfg.deploy.dense is not None:
        return FORMAT
    return UNMERGED_FORMAT if cfg.expert.delta_rank else EARLIER_FORMAT


def _form(cfg: FfnMoeConfig, parts: Parts, stock: Mapping[str, Any]) -> dict[str, Any]:
    """Return what experts.json says of experts that are no whole networks in every layer, and of a
    dense model beside them."""
    out: dict[str, Any] = {}
    if cfg.deploy.dense is not None:
        address = parts.manifest("train_dense", cfg.deploy.dense).address
        out["dense"] = {"name": cfg.deploy.dense, "address": address}
    if cfg.expert.delta_rank:
        # Merged in what is written: told, as it says what they were and how they were trained
        out["form"] = cfg.expert.form
        out["rank"] = cfg.expert.delta_rank
        out["unmerged"] = {"file": UNMERGED_BASE, "scale": cfg.expert.delta_scale}
    without = stock.get("mlp_only_layers")
    if without:
        every = range(stock["num_hidden_layers"])
        out["layers"] = [layer for layer in every if layer not in without]
    return out


def _made_files(
    cfg: FfnMoeConfig,
    parts: Parts,
    members: Sequence[_Member],
    stock: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> list[BundleFile | MadeFile]:
    """Return the files of a stack whose experts are deltas, merged, or of chosen layers."""
    _, dummy = stored_trunk(cfg, parts)
    experts: list[Tensors] = []
    unmerged = [MadeFile(UNMERGED_BASE, expert_tensors(dummy))]
    for member, (_, expert) in zip(members, stored_experts(cfg, parts, dummy), strict=True):
        experts.append(expert_tensors(expert))
        if member.domain is not None:
            unmerged.append(MadeFile(member.unmerged, streamed(expert.named())))
    gates = parts.tensors("train_router", "router.safetensors")
    made = mixture_tensors(experts, expert_tensors(dummy), gates, stock)
    out: list[BundleFile | MadeFile] = [
        _trunk_file(parts, settings),
        MadeFile(ROUTER, made.gates),
    ]
    if made.base:
        out.append(MadeFile(BASE, made.base))
    for member, tensors in zip(members, made.experts, strict=True):
        out.append(MadeFile(member.file, tensors))
    if cfg.expert.delta_rank:
        out += unmerged
    out.append(_stored(parts, "trunk.json", "train_shared", "trunk.json"))
    return out


def _stored(
    parts: Parts, name: str, stage: str, source: str, item: str | None = None
) -> BundleFile:
    digest = parts.manifest(stage, item).files[source]["sha256"]
    return BundleFile(name, parts.folder(stage, item) / source, digest)


def _trunk_file(parts: Parts, settings: Mapping[str, Any]) -> BundleFile | MadeFile:
    """Return the file of the trunk's weights; settings are the trunk's."""
    if is_pinned(parts):
        # The files of a pinned model hold the dummy too, and lie elsewhere
        trunk, _ = pinned_tensors(parts, settings)
        return MadeFile(TRUNK, streamed(trunk))
    return _stored(parts, TRUNK, "train_shared", "trunk.safetensors")


def _files(
    parts: Parts, members: Sequence[_Member], architecture: str, settings: Mapping[str, Any]
) -> list[BundleFile | MadeFile]:
    # Each reads and checks files, and most artifacts give several
    folder = cache(parts.folder)
    manifest = cache(parts.manifest)

    def stored(
        name: str,
        stage: str,
        source: str,
        item: str | None = None,
        rename: Callable[[str], str] | None = None,
    ) -> BundleFile:
        digest = manifest(stage, item).files[source]["sha256"]
        return BundleFile(name, folder(stage, item) / source, digest, rename)

    naming = NAMINGS[architecture]
    # The store has Qwen3-MoE's names of gates: that file is copied as it is
    gate = None if architecture == CLASSES["qwen3_moe"] else naming.gate
    out: list[BundleFile | MadeFile] = [
        _trunk_file(parts, settings),
        stored(ROUTER, "train_router", "router.safetensors", rename=gate),
    ]
    # A pinned model's own network is among its tensors
    dummy = pinned_tensors(parts, settings)[1] if is_pinned(parts) else {}
    for number, member in enumerate(members):
        rename = partial(naming.expert, number)
        if dummy and member.domain is None:
            renamed = {rename(name): tensor for name, tensor in dummy.items()}
            out.append(MadeFile(member.file, streamed(renamed)))
            continue
        out.append(stored(member.file, member.stage, member.stored, member.item, rename))
    out.append(stored("trunk.json", "train_shared", "trunk.json"))
    return out
