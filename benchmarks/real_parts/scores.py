"""What every row loses on the held-out text, and what a run costs, read from its artifacts.

Losses of tokens are kept beside the store, so that a benchmark that goes on reads nothing twice.

T tokens of a stream, n documents.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy import ndarray

from benchmarks.real_parts.variants import Variant
from pipeline.families.ffn_moe.adapter.evaluate import RoutedTexts
from pipeline.families.ffn_moe.adapter.model import Adapted, stored_adapters
from pipeline.families.ffn_moe.adapter.stack import assemble as assemble_adapters
from pipeline.families.ffn_moe.adapter.texts import first_tokens_of, routed_nats
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.cost import stage_tokens
from pipeline.families.ffn_moe.evaluator import Evaluator
from pipeline.families.ffn_moe.networks import rival_rows
from pipeline.families.ffn_moe.parts import (
    shards_of,
    stored_experts,
    stored_trunk,
    training_tokens,
)
from pipeline.families.ffn_moe.sections import BASE
from pipeline.families.ffn_moe.stack import assemble
from pipeline.metrics.language import ByDomain, Scores
from pipeline.model.language_model import filled
from pipeline.model.trunk import Ffn, Trunk
from pipeline.protocols import Progress
from pipeline.run.context import StoredParts
from pipeline.train.flops import Shape

Network = Callable[[], tuple[Trunk, Ffn]]  # opened when the first token is asked for


@dataclass(frozen=True)
class Facts:
    """What a row cost, of one expert where it has experts."""

    tokens: int = 0  # of training, of all parts together
    lr: float | None = None
    tokens_per_s: float | None = None
    peak_mb: float | None = None
    file_bytes: int | None = None
    active_parameters: int | None = None
    valid_nats: float | None = None  # of experts on their own domains, on average
    told: str = ""  # what else there is to say of it


@dataclass(frozen=True)
class Row:
    """A variant that was scored: nats_n by domain, those of its oracle where it has one."""

    variant: Variant
    nats: ByDomain
    oracle: ByDomain | None = None
    facts: Facts = field(default_factory=Facts)


class HeldOut:
    """The held-out text and what was lost on it so far."""

    def __init__(self, cfg: FfnMoeConfig, parts: StoredParts, folder: Path, progress: Progress):
        self.cfg = cfg
        self.shards = shards_of(parts, cfg.partition.names)
        self.evaluator = Evaluator(cfg, self.shards, progress)
        self.progress = progress
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        trunk, dummy = stored_trunk(cfg, parts)
        self.shape = Shape.from_hf_config(trunk.config.to_dict(), cfg.trunk.context_tokens)
        read = [
            [parts.addresses.of("preprocess", name) for name in cfg.partition.names],
            cfg.evaluate.tokens_per_domain,
            cfg.trunk.context_tokens,
            self.evaluator.bf16,
        ]
        self.text = _short(json.dumps(read))
        self.base_key = _key(parts, "train_shared")
        self._base = trunk, dummy

    def scores(self, domains: tuple[str, ...]) -> Scores:
        """Return empty scores of some of the domains."""
        documents = {name: self.evaluator.documents[name] for name in domains}
        evaluate = self.cfg.evaluate
        return Scores(documents, evaluate.bootstrap, self.cfg.data.seed)

    def base(self) -> ByDomain:
        """Return nats_n of the base by domain."""
        return self._sums(self._base_nats)

    def row(self, variant: Variant, cfg: FfnMoeConfig, parts: StoredParts) -> Row:
        """Return what a variant scores and what it cost. Raises PipelineError."""
        if variant.kind == "dense":
            return Row(variant, self._dense(cfg, parts), None, self._dense_facts(cfg, parts))
        facts = self._facts(variant, cfg, parts)
        if variant.kind == "singles":
            return self._single(variant, cfg, parts, facts)
        if variant.kind == "expert":
            nats = self._expert(variant, cfg, parts, cfg.experts[0])
            return Row(variant, nats, None, facts)
        if variant.is_adapter:
            return self._adapters(variant, cfg, parts, facts)
        opened = cache(partial(assemble, cfg, parts))
        key = _key(parts, "train_router")

        def mixture() -> tuple[Trunk, Ffn]:
            return opened().trunk, opened().mixture

        nats = self._sums(partial(self._nats, key, mixture))
        oracle = {}
        for domain, documents in self.evaluator.documents.items():
            nats_T = self._base_nats(domain)
            if domain in cfg.experts:

                def own(name: str = domain) -> tuple[Trunk, Ffn]:
                    return opened().trunk, opened().experts[name]

                nats_T = self._nats(_key(parts, "train_experts", domain), own, domain)
            oracle[domain] = documents.sums(nats_T)
        return Row(variant, nats, oracle, facts)

    def _sums(self, of_domain: Callable[[str], ndarray]) -> ByDomain:
        out = {}
        for domain, documents in self.evaluator.documents.items():
            out[domain] = documents.sums(of_domain(domain))
        return out

    def _base_nats(self, domain: str) -> ndarray:
        return self._nats(self.base_key, lambda: self._base, domain)

    def _nats(self, key: str, network: Network, domain: str) -> ndarray:
        """Return nats_T of a network on a domain, from the last time where there was one."""

        def read() -> ndarray:
            self.progress(f"scoring {key} on {domain}", None)
            trunk, ffn = network()
            return self.evaluator.token_nats(trunk, ffn, domain).astype(np.float32)

        return self._kept(f"nats-{key}-{domain}", read).astype(np.float64)

    def _kept(self, name: str, compute: Callable[[], ndarray]) -> ndarray:
        path = self.folder / f"{self.text}-{name}.npy"
        if path.exists():
            return np.load(path)
        found = compute()
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, found)
        part.rename(path)
        return found

    def _dense(self, cfg: FfnMoeConfig, parts: StoredParts) -> ByDomain:
        (item,) = cfg.dense.baselines

        @cache
        def opened() -> tuple[Trunk, Ffn]:
            row = next(rival_rows(cfg, parts, training_tokens(self.shards)))
            return row.trunk, row.ffn

        return self._sums(partial(self._nats, _key(parts, "train_dense", item), opened))

    def _expert(
        self, variant: Variant, cfg: FfnMoeConfig, parts: StoredParts, name: str
    ) -> ByDomain:
        """Return nats_n by domain of one expert that reads everything."""

        @cache
        def opened() -> tuple[Trunk, Ffn]:
            if variant.is_adapter:
                return stored_adapters(cfg, parts).under(name), filled
            trunk, dummy = stored_trunk(cfg, parts)
            return trunk, dict(stored_experts(cfg, parts, dummy))[name]

        return self._sums(partial(self._nats, _key(parts, "train_experts", name), opened))

    def _single(self, variant: Variant, cfg: FfnMoeConfig, parts: StoredParts, facts: Facts) -> Row:
        """Return the row of the expert with the lowest mean of all domains."""
        scores = self.scores(self.shards.domains)
        for name in cfg.experts:
            scores.add(name, self._expert(variant, cfg, parts, name))
        best = min(cfg.experts, key=scores.mean)
        tokens = stage_tokens(cfg, "train_experts", best, training_tokens(self.shards))
        told = Facts(
            tokens, facts.lr, facts.tokens_per_s, facts.peak_mb, facts.file_bytes, told=best
        )
        return Row(variant, scores.nats[best], None, told)

    def _adapters(
        self, variant: Variant, cfg: FfnMoeConfig, parts: StoredParts, facts: Facts
    ) -> Row:
        """Return the row of a stack that chooses by the first tokens: an adapter runs only over
        domains some of whose documents chose it, or that are its own."""
        stack = cache(partial(assemble_adapters, cfg, parts))
        prompt = cfg.router.prompt_tokens
        texts = cache(lambda: first_tokens_of(self.evaluator, stack(), [prompt])[prompt])
        router = _key(parts, "train_router")

        def chosen(domain: str) -> ndarray:
            index_n = stack().text_router.router.choose(texts()[domain])
            return index_n.cpu().numpy()

        def under(name: str) -> tuple[Adapted, Ffn]:
            return stack().model.under(name), filled

        index = {}
        nats_of: dict[str, ByDomain] = {BASE: {}}
        for domain, documents in self.evaluator.documents.items():
            index[domain] = self._kept(f"choice-{router}-{domain}", partial(chosen, domain))
            nats_of[BASE][domain] = self._base_nats(domain)
            for number, name in enumerate(cfg.experts):
                # Nobody reads the others: a number that is none would show
                nats_T = np.full(int(documents.starts_n[-1]), np.nan)
                if name == domain or (index[domain] == number).any():
                    key = _key(parts, "train_experts", name)
                    nats_T = self._nats(key, partial(under, name), domain)
                nats_of.setdefault(name, {})[domain] = nats_T
        self.evaluator.token_nats_of = nats_of
        way = RoutedTexts(variant.name, prompt, index)
        nats = routed_nats(self.evaluator, cfg.experts, way)
        oracle = {}
        for domain, documents in self.evaluator.documents.items():
            reader = domain if domain in cfg.experts else BASE
            oracle[domain] = documents.sums(nats_of[reader][domain])
        return Row(variant, nats, oracle, facts)

    def _facts(self, variant: Variant, cfg: FfnMoeConfig, parts: StoredParts) -> Facts:
        """Return what the experts of a variant cost, each of them on average, the peak at most."""
        domain_tokens = training_tokens(self.shards)
        manifests = [parts.manifest("train_experts", name) for name in cfg.experts]
        metrics = [manifest.metrics for manifest in manifests]
        tokens = 0
        for name in cfg.experts:
            tokens += stage_tokens(cfg, "train_experts", name, domain_tokens)
        if variant.kind == "stack":
            tokens += stage_tokens(cfg, "train_router", None, domain_tokens)
        sizes = []
        for name, entry in manifests[0].files.items():
            if Path(name).name in ("expert.safetensors", "adapter_model.safetensors"):
                sizes.append(entry["bytes"])
        return Facts(
            tokens=tokens,
            lr=_rate(parts, "lr_experts", None, cfg.expert.lr),
            tokens_per_s=_mean([each["tokens_per_s"] for each in metrics]),
            peak_mb=max(each["peak_mb"] for each in metrics),
            file_bytes=sum(sizes),
            active_parameters=self._active(cfg, variant.kind),
            valid_nats=_mean([each["valid_nats"] for each in metrics]),
        )

    def _active(self, cfg: FfnMoeConfig, kind: str) -> int:
        """Return the parameters that run per token.

        One expert of any form takes the place of what it was made from (its delta can be added to
        that), so beside a dense model it costs nothing; more than one run side by side.
        """
        shape = self.shape
        more = cfg.router.top_k - 1 if kind == "stack" else 0
        layers = len(cfg.expert.in_layers(shape.layers))
        each = layers * 3 * shape.d_model * shape.d_ff
        if cfg.expert.delta_rank:
            each = layers * 3 * (shape.d_model + shape.d_ff) * cfg.expert.delta_rank
            # two deltas share the network that they change
            more = more + 1 if more else 0
        return shape.stack_parameters(1) + more * each

    def _dense_facts(self, cfg: FfnMoeConfig, parts: StoredParts) -> Facts:
        (item,) = cfg.dense.baselines
        metrics = parts.manifest("train_dense", item).metrics
        given = cfg.dense.lr or cfg.expert.lr
        return Facts(
            tokens=stage_tokens(cfg, "train_dense", item, training_tokens(self.shards)),
            lr=_rate(parts, "lr_dense", "all", given),
            tokens_per_s=metrics["tokens_per_s"],
            peak_mb=metrics["peak_mb"],
            active_parameters=self.shape.stack_parameters(1),
        )


def _rate(
    parts: StoredParts, search: str, item: str | None, given: float | str | None
) -> float | None:
    """Return a training's rate: the one that is set, or what its search found."""
    if isinstance(given, int | float):
        return float(given)
    found: Mapping[str, float] = parts.manifest(search, item).metrics
    return found["lr"]


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _key(parts: StoredParts, stage: str, item: str | None = None) -> str:
    """Return a name of an artifact as it is now: what it was asked for, and its bytes."""
    manifest = parts.manifest(stage, item)
    return f"{manifest.address}-{manifest.digest[:12]}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
