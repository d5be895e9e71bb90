"""One model of a run measured by itself: bits per byte of held-out documents, which are the same
for models of any tokenizer as long as text and splits are.

B sequences, T tokens, N = B*T, n documents.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...data.text.shards import Shards
from ...hardware import device, uses_bf16
from ...metrics.language import LN2, Documents
from ...model.trunk import Ffn, Trunk, open_dense
from ...protocols import Progress
from ...store.artifacts import write_text
from .. import Parts
from .config import FfnMoeConfig
from .evaluator import held_out_windows, predicted_nats
from .joint.network import opened
from .parts import EVALUATION_SEQUENCES, shards_of, stored_settings, token_losses
from .stack import assemble
from .stages import MODEL_STAGES, STACK

FILE = "score.json"


def score(cfg: FfnMoeConfig, parts: Parts, folder: Path, progress: Progress, item: str) -> dict:
    """Write what a model scores to folder; return it as metrics: `bits_per_byte`, the mean over
    domains, and of each by its name; how much text that was, and a print that is the same where
    the documents are."""
    shards = shards_of(parts, cfg.domains_read("score", item))
    documents = {}
    for domain in shards.domains:
        documents[domain] = first_documents(shards, domain, cfg.score.bytes_per_domain)
    trunk, ffn = _model(cfg, parts, item)
    bits = {}
    for number, domain in enumerate(shards.domains):
        progress(f"measuring {item} on {domain}", number / len(shards.domains))
        bits[domain] = _bits_per_byte(cfg, shards, documents[domain], trunk, ffn)
    found = {
        "bits_per_byte": sum(bits.values()) / len(bits),
        "bits_per_byte_by_domain": bits,
        "bytes": int(sum(each.bytes_n.sum() for each in documents.values())),
        "documents": sum(len(each.bytes_n) for each in documents.values()),
        "tokens": sum(each.tokens for each in documents.values()),
        "text": _print_of(documents),
    }
    write_text(folder / FILE, json.dumps(found, indent=1) + "\n")
    return found


def first_documents(shards: Shards, domain: str, most_bytes: int) -> Documents:
    """Return the first whole test documents of a domain, up to so many bytes, at least one."""
    starts_n, bytes_n = shards.documents("test", domain)
    count = max(1, int(np.searchsorted(bytes_n.cumsum(), most_bytes, side="right")))
    return Documents(domain, starts_n[: count + 1], bytes_n[:count], len(shards.lead))


def _print_of(documents: Mapping[str, Documents]) -> str:
    """Return what tells documents from others, whatever tokens they have become: their sizes."""
    sizes = {domain: each.bytes_n.tolist() for domain, each in documents.items()}
    text = json.dumps(sizes, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _bits_per_byte(
    cfg: FfnMoeConfig, shards: Shards, documents: Documents, trunk: Trunk, ffn: Ffn
) -> float:
    windows = held_out_windows(shards, documents, cfg.trunk.context_tokens)
    batches = windows.to(device()).split(EVALUATION_SEQUENCES)
    nats_N = token_losses(trunk, ffn, batches, uses_bf16(cfg.dtype))
    nats_T = predicted_nats(nats_N.cpu().numpy(), documents)
    return float(nats_T.sum() / documents.bytes_n.sum() / LN2)


def _model(cfg: FfnMoeConfig, parts: Parts, item: str) -> tuple[Trunk, Ffn]:
    """Return a model's trunk and what stands in its slots, frozen."""
    if item == STACK:
        stack = assemble(cfg, parts)
        return stack.trunk.eval(), stack.mixture
    kind, _, name = item.partition("_")
    stage = MODEL_STAGES[kind]
    settings = stored_settings(parts, stage, name)
    stored = parts.tensors(stage, "model.safetensors", name)
    if kind == "joint":
        trunk, ffn = opened(cfg, name, settings, stored)
    else:
        trunk, ffn = open_dense(settings, stored)
    return trunk.to(device()).eval(), ffn.to(device()).eval()
