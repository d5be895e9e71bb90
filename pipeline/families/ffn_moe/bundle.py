"""An ffn_moe stack as an ordinary Qwen3-MoE or Mixtral checkpoint, and the same stack opened again
from it.

What is written is the stored tensors under the names that transformers gives them; nothing is
computed. L layers, E experts, D model width, I number of an expert.
"""

import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch

from ... import report
from ...data.text.shards import Shards
from ...errors import DamagedArtifact, MismatchError
from ...hardware import device
from ...model.experts import from_tensors
from ...model.router import gate_name
from ...model.trunk import open_tensors
from ...protocols import Progress
from ...store.artifacts import load_tensors
from ...store.bundle import ABOUT, FORMAT, BundleFile, about, write
from .config import FfnMoeConfig
from .parts import ANCHOR, mixture_of

TRUNK, ROUTER = (
    "model-trunk.safetensors",
    "model-router.safetensors",
)  # llama.cpp reads only names with model in front
MIXTURES = {"qwen3": "qwen3_moe", "llama": "mixtral", "mistral": "mixtral"}
CLASSES = {"qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM"}
IN_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def bundle(cfg: FfnMoeConfig, parts, folder: Path, progress: Progress) -> dict:
    """Write the stack to a folder as a checkpoint with tokenizer, report and model card; return
    metrics.

    Raises MissingArtifact or DamagedArtifact, and MismatchError for a trunk that no stock mixture
    can be built on.
    """
    settings = json.loads((parts.folder("train_shared") / "trunk.json").read_text("utf-8"))
    members, end_id = _members(cfg, parts), Shards(parts.folder("preprocess")).end_id
    stock = stock_settings(settings, len(members), cfg.router.top_k)
    described = _described(cfg, parts, members, stock, end_id)
    tables = report.read((parts.folder("evaluate") / "report.json").read_text("utf-8"))
    texts = {
        "config.json": stock,
        "generation_config.json": _generation(settings, end_id),
        ABOUT: described,
        "README.md": report.card(tables, described),
    }
    return write(folder, _pieces(parts, members, stock["model_type"]), texts, progress) | {
        "experts": len(members)
    }


def reassemble(folder: Path):
    """Build the finished stack, as `assemble` does, from a bundle alone.

    Raises MissingArtifact when the folder is no bundle, DamagedArtifact, or NewerStore.
    """
    from .stack import FfnStack

    described = about(folder)
    try:
        trunk, like = open_tensors(
            json.loads((folder / "trunk.json").read_text("utf-8")), load_tensors(folder / TRUNK)
        )
        expert_name, name_of_gate = NAMES[described["architecture"]]
        experts = []
        for number, entry in enumerate(described["experts"]):
            stored = load_tensors(folder / entry["file"])
            experts.append(
                from_tensors(
                    like, {name: stored[expert_name(name, number)] for name in like.named()}
                )
            )
        gates = load_tensors(folder / ROUTER)
        weight_LED = torch.stack([gates[name_of_gate(gate_name(i))] for i in range(len(gates))])
        mixture = mixture_of(experts, weight_LED, described["top_k"])
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        # torch names the tensors that do not fit on lines of their own
        reason = " ".join(str(error).split())
        raise DamagedArtifact(
            f"{folder} does not hold the stack that its {ABOUT} describes: {reason}"
        ) from None
    return FfnStack(trunk.to(device()), mixture, tuple(e["name"] for e in described["experts"]))


def stock_settings(settings: Mapping, experts: int, top_k: int) -> dict:
    """Return config.json of the stock mixture on a trunk with these Hugging Face config fields.

    Raises MismatchError for what the stock mixture has no place for.
    """
    from transformers import AutoConfig

    _check_fits(settings)
    kind = MIXTURES[settings["model_type"]]
    known = AutoConfig.for_model(kind).to_dict().keys() - {
        "model_type",
        "architectures",
        "transformers_version",
    }
    fields = {key: value for key, value in settings.items() if key in known}
    fields |= {"num_experts_per_tok": top_k, "num_local_experts": experts}
    if kind == "qwen3_moe":  # norm_topk_prob: an expert that trained alone keeps weight 1
        fields |= {"moe_intermediate_size": settings["intermediate_size"], "norm_topk_prob": True}
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    written = AutoConfig.for_model(kind, **fields).to_diff_dict()
    written |= {"architectures": [CLASSES[kind]], "dtype": "float32", "use_cache": True}
    written |= {
        "num_local_experts": experts,
        "num_experts": experts,
    }  # readers before transformers 5 know the latter
    return written | _rope_of_old(written.get("rope_parameters") or {})


def _rope_of_old(rope: Mapping) -> dict:
    """Return the rotary embedding as readers before transformers 5 look for it."""
    out = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return out | (
        {"rope_scaling": dict(rope)} if rope.get("rope_type", "default") != "default" else {}
    )


def _check_fits(settings: Mapping) -> None:
    kind, odd = settings["model_type"], []
    windows = set(settings.get("layer_types") or ())
    if len(windows) > 1:
        odd.append(f"layers that differ in attention ({', '.join(sorted(windows))})")
    if kind != "qwen3" and settings.get("attention_bias"):
        odd.append("attention_bias")
    if settings.get("mlp_bias"):
        odd.append("mlp_bias")
    if odd:
        raise MismatchError(
            f"the trunk ({kind}) has {' and '.join(odd)}, which {CLASSES[MIXTURES[kind]]} has no place for, so the "
            "stack cannot be bundled as a stock checkpoint; choose another trunk.init. Evaluation is not affected"
        )


def _members(cfg: FfnMoeConfig, parts) -> list[dict]:
    """Return the stack's experts in order: name, domain, address, stage, item, stored file, file in
    the bundle."""
    found = (
        [(ANCHOR, None, "train_shared", None, "dummy.safetensors")]
        if cfg.trunk.anchor == "keep"
        else []
    )
    found += [(name, name, "train_experts", name, "expert.safetensors") for name in cfg.experts]
    return [
        {
            "name": name,
            "domain": domain,
            "address": parts.manifest(stage, item).address,
            "stage": stage,
            "item": item,
            "stored": stored,
            "file": f"model-expert-{i:03}-{name}.safetensors",
        }
        for i, (name, domain, stage, item, stored) in enumerate(found)
    ]


def _described(cfg: FfnMoeConfig, parts, members: list[dict], stock: dict, end_id: int) -> dict:
    """Return experts.json."""
    shown = ("name", "domain", "address", "file")
    return {
        "format": FORMAT,
        "family": cfg.family,
        "run": cfg.name,
        "architecture": stock["architectures"][0],
        "top_k": cfg.router.top_k,
        "context_tokens": stock["max_position_embeddings"],
        "start_id": end_id,
        "experts": [{key: member[key] for key in shown} for member in members],
        "trunk": {"address": parts.manifest("train_shared").address, "file": TRUNK},
        "router": {"address": parts.manifest("train_router").address, "file": ROUTER},
        "tokenizer": {"address": parts.manifest("preprocess").address},
        "report": {"address": parts.manifest("evaluate").address},
    }


def _generation(settings: Mapping, end_id: int) -> dict:
    """Return generation_config.json; a pretrained trunk's own end tokens end a text too."""
    own = settings.get("eos_token_id")
    ends = sorted({end_id, *(own if isinstance(own, list) else [own] if own is not None else [])})
    return {
        "bos_token_id": end_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": end_id,
    }


def _pieces(parts, members: list[dict], kind: str) -> list[BundleFile]:
    folder, manifest = cache(parts.folder), cache(parts.manifest)  # each reads and checks files

    def piece(
        name: str, stage: str, stored: str, item: str | None = None, rename=None
    ) -> BundleFile:
        digest = manifest(stage, item).files[stored]["sha256"]
        return BundleFile(name, folder(stage, item) / stored, digest, rename)

    expert_name, name_of_gate = NAMES[CLASSES[kind]]
    gate = name_of_gate if kind == "mixtral" else None  # as it is stored
    return [
        piece(TRUNK, "train_shared", "trunk.safetensors"),
        piece(ROUTER, "train_router", "router.safetensors", rename=gate),
        *(
            piece(m["file"], m["stage"], m["stored"], m["item"], partial(expert_name, number=i))
            for i, m in enumerate(members)
        ),
        *(piece(name, "preprocess", name) for name in ("tokenizer.json", "tokenizer_config.json")),
        piece("trunk.json", "train_shared", "trunk.json"),
        *(piece(name, "evaluate", name) for name in ("report.json", "report.html")),
    ]


def _in_qwen3_moe(name: str, number: int) -> str:
    return name.replace(".mlp.", f".mlp.experts.{number}.")


def _in_mixtral(name: str, number: int) -> str:
    head, _, tail = name.partition(".mlp.")
    projection, _, end = tail.partition(".")
    return f"{head}.block_sparse_moe.experts.{number}.{IN_MIXTRAL[projection]}.{end}"


def _gate_in_qwen3_moe(name: str) -> str:
    return name


def _gate_in_mixtral(name: str) -> str:
    return name.replace(".mlp.", ".block_sparse_moe.")


NAMES = {  # of an expert's tensor and of a gate, from what they are called in the store
    "Qwen3MoeForCausalLM": (_in_qwen3_moe, _gate_in_qwen3_moe),
    "MixtralForCausalLM": (_in_mixtral, _gate_in_mixtral),
}
