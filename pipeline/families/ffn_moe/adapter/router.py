"""The router of adapters: a closed form of the experts' statistics, fitted to validation text.

Nothing here is trained. The temperature is that with the least nats of the right domains; the
threshold that whose choices lose least on validation text of all domains, taught or not.

B texts, T tokens, S layers that are read, C classes, E experts, D model width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ....data.text.shards import Shards
from ....hardware import device, uses_bf16
from ....model.language_model import LanguageModel, filled, first_tokens
from ....model.request_router import RequestRouter, fit_temperature, fit_threshold, nats
from ....model.router_init import FeatureStatistics
from ....protocols import Progress
from ....store.artifacts import save_tensors, write_text
from ....store.reading import damaged, read_object
from ....train.loop import NoTraining
from ... import Parts
from ..config import FfnMoeConfig
from ..parts import gates_from, shards_of, token_loss, training_rows, validation_rows
from .model import Adapted, stored_adapters
from .statistics import read_layers, text_statistics

WEIGHTS = "router.safetensors"
SETTINGS = "router.json"
# Texts of a domain whose first tokens fit the temperature
STARTS = 64
# and how many of these are read to the end under every adapter, for the threshold
TEXTS = 8


@dataclass(frozen=True)
class TextRouter:
    """A request router with what it reads: which states, of how many first tokens."""

    router: RequestRouter
    layers: tuple[int, ...]
    prompt_tokens: int

    def features(self, base: LanguageModel, ids_BT: torch.Tensor, bf16: bool) -> torch.Tensor:
        """Return x_BSD of texts as the base reads their first tokens."""
        x_BTSD = base.states(ids_BT[:, : self.prompt_tokens], self.layers, bf16)
        return first_tokens(x_BTSD, self.prompt_tokens)

    def values(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what router.json holds: all but the rows."""
        return {
            "experts": list(names),
            "base_class": self.router.weight_SCD.shape[1] > len(names),
            "layers": list(self.layers),
            "prompt_tokens": self.prompt_tokens,
            "temperature": self.router.temperature,
            "threshold": self.router.threshold,
        }

    @classmethod
    def read(cls, settings: Path, weight_SCD: torch.Tensor, names: Sequence[str]) -> "TextRouter":
        """Return what was written; `names` are the experts that are there. Raises
        DamagedArtifact."""
        raw = read_object(settings)
        try:
            if list(raw["experts"]) != list(names):
                raise ValueError(f"it is of {raw['experts']} and the stack of {list(names)}")
            classes = len(names) + bool(raw["base_class"])
            layers = tuple(int(layer) for layer in raw["layers"])
            if weight_SCD.shape[:2] != (len(layers), classes):
                raise ValueError(f"it has rows of the shape {tuple(weight_SCD.shape)}")
            router = RequestRouter(
                weight_SCD, len(names), float(raw["temperature"]), float(raw["threshold"])
            )
            return cls(router, layers, int(raw["prompt_tokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(settings, f"is no router of this stack ({error})") from None


def router(cfg: FfnMoeConfig, parts: Parts) -> NoTraining:
    """Return how the router is made: from statistics, and fitted to validation text."""

    def write(folder: Path) -> dict[str, Any]:
        shards = shards_of(parts, cfg.domains_read("train_router", None))
        adapted = stored_adapters(cfg, parts)
        plain = untrained(cfg, parts, shards, adapted, cfg.router.init)
        fitted, metrics = calibrated(plain, ValidationTexts(cfg, shards, adapted, parts.progress))
        save_tensors(folder / WEIGHTS, {"weight": fitted.router.weight_SCD})
        values = fitted.values(cfg.experts)
        write_text(folder / SETTINGS, json.dumps(values, indent=1) + "\n")
        return metrics

    return NoTraining(write)


def general_domains(cfg: FfnMoeConfig) -> tuple[str, ...]:
    """Return the domains of general text that no expert is taught: the base's own class."""
    return tuple(domain for domain in cfg.trunk_domains if domain not in cfg.experts)


def untrained(
    cfg: FfnMoeConfig,
    parts: Parts,
    shards: Shards,
    adapted: Adapted,
    init: str,
) -> TextRouter:
    """Return the closed form, not fitted to any text."""
    statistics = []
    for name in cfg.experts:
        stored = parts.tensors("train_experts", "statistics.safetensors", name)
        statistics.append(FeatureStatistics.from_tensors(stored))
    general = general_domains(cfg)
    if general:
        rows = training_rows(cfg, shards, "statistics", general, how="equal")
        tokens = cfg.expert.statistics_tokens
        found = text_statistics(cfg, adapted, rows, tokens, parts.progress)
        statistics.append(found)
    weight_SCD = gates_from(cfg, statistics, init)
    router = RequestRouter(weight_SCD.to(device()), len(cfg.experts))
    return TextRouter(router, read_layers(adapted), cfg.router.prompt_tokens)


class ValidationTexts:
    """Held-out texts that a router is fitted to, and what the base and each adapter lose on some of
    them: read once, however many routers are fitted."""

    def __init__(self, cfg: FfnMoeConfig, shards: Shards, adapted: Adapted, progress: Progress):
        self.progress = progress
        self.cfg = cfg
        self.adapted = adapted
        self.bf16 = uses_bf16(cfg.dtype)
        # One that was trained elsewhere may have no text here
        self.domains = (*cfg.experts_with_text, *general_domains(cfg))
        self.ids = {}
        for domain in self.domains:
            ids = validation_rows(cfg, shards, domain, STARTS)
            self.ids[domain] = torch.from_numpy(ids).to(device())
        self._nats: dict[str, torch.Tensor] = {}

    def losses(self, domain: str, prompt_tokens: int) -> torch.Tensor:
        """Return loss_BE of the first texts of a domain: mean nats of what follows the tokens that
        choose, under each adapter and the base."""
        if domain not in self._nats:
            self.progress(f"what validation text of {domain} loses under each adapter", None)
            nats = []
            for name in (*self.cfg.experts, None):
                model = self.adapted.under(name)
                nats.append(token_loss(model, filled, self.ids[domain][:TEXTS], self.bf16))
            self._nats[domain] = torch.stack(nats, 1).double()
        # the last token of those that choose is the first whose successor the chosen one predicts
        return self._nats[domain][:, :, prompt_tokens - 1 :].mean(2)


def calibrated(plain: TextRouter, held_out: ValidationTexts) -> tuple[TextRouter, dict[str, Any]]:
    """Return a router with the temperature and the threshold of validation text, and metrics."""
    cfg = held_out.cfg
    router = plain.router
    features = []
    classes: list[int] = []
    losses = []
    judged = []
    for domain in held_out.domains:
        ids_BT = held_out.ids[domain]
        x_BSD = plain.features(held_out.adapted, ids_BT, held_out.bf16)
        features.append(x_BSD)
        number = cfg.experts.index(domain) if domain in cfg.experts else len(cfg.experts)
        classes += [number] * len(ids_BT)
        judged.append(x_BSD[:TEXTS])
        losses.append(held_out.losses(domain, plain.prompt_tokens))
    logit_BC = router.logits(torch.cat(features))
    class_B = torch.tensor(classes, device=logit_BC.device)
    temperature = fit_temperature(logit_BC, class_B)
    router = replace(router, temperature=temperature)
    p_BC = router.probabilities(torch.cat(judged))
    loss_BE = torch.cat(losses)
    threshold = cfg.router.threshold
    if threshold is None:
        threshold = fit_threshold(router, p_BC, loss_BE)
    router = replace(router, threshold=threshold)
    chosen_B = router.decide(p_BC)
    told = (logit_BC.argmax(-1) == class_B).double().mean().item()
    metrics = {
        "temperature": temperature,
        "threshold": threshold,
        "accuracy": told,
        "steps": 0,
        "valid_nats": nats(logit_BC, class_B, temperature),
        "base_share": (chosen_B == len(cfg.experts)).double().mean().item(),
        "routed_nats": loss_BE.gather(1, chosen_B[:, None]).mean().item(),
        "base_nats": loss_BE[:, -1].mean().item(),
    }
    return replace(plain, router=router), metrics
