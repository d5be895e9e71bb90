"""Engines over random models of a few thousand parameters, without a run or a bundle: what tests
of serving need, made in a blink.

Each comes with what computes the same in another way: `alone(ids, reader)` gives logits_TV of a
plain pass over a text, without a cache, a batch or a scheduler.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.families.adapters.peft_io import peft_name
from pipeline.families.ffn_moe.adapter.model import Adapted
from pipeline.families.ffn_moe.adapter.router import TextRouter
from pipeline.families.ffn_moe.adapter.stack import RequestStack
from pipeline.model.experts import Expert, in_layers, reinit_like
from pipeline.model.language_model import LanguageModel
from pipeline.model.low_rank import LowRankExpert
from pipeline.model.request_router import RequestRouter
from pipeline.model.router import Gating, Mixture, Router
from pipeline.model.trunk import Trunk, build, open_dense
from pipeline.serve.adapters import SteadyAdapters, TextAdapters
from pipeline.serve.dense import DenseModel, SteadyDense
from pipeline.serve.engine import CompletionEngine
from pipeline.serve.generation import BASE_READER, DENSE_READER, Capacity, Stats
from pipeline.serve.networks import Network, StockMixture, UnmergedMixture
from pipeline.serve.steady.mixture import SteadyMixture

VOCAB = 97
END = 96
CONTEXT = 96
NAMES = ("ash", "birch", "cedar")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,
    "eos_token_id": END,
    "pad_token_id": END,
    "tie_word_embeddings": False,
    # each class has others by default
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
SMALL = Capacity(rows=4, waiting=64, prefill_tokens=12)


class SmallEngine(CompletionEngine):
    """An engine over a network that no bundle holds; its tokens are letters, some of several."""

    def __init__(self, network: Network, readers: tuple[str, ...], capacity: Capacity = SMALL):
        self.experts = NAMES
        self.readers = readers
        self.context_tokens = CONTEXT
        self.start_ids = []
        self.capacity = capacity
        self.stats = Stats()
        self.watcher = None
        self._serve(network)

    def _decode(self, ids: list[int]) -> str:
        return "".join(said(token) for token in ids)


def said(token: int) -> str:
    """Return what a token says: one, two or three of a few letters, so that stop strings begin and
    end within tokens."""
    return "abcde"[token % 5] + "fgh"[token % 3] * (token % 3)


@dataclass
class Small:
    """An engine and what computes the same alone."""

    engine: SmallEngine
    alone: Callable[[list[int], str | None], torch.Tensor]

    def greedy(self, ids: list[int], reader: str | None, count: int) -> list[int]:
        """Return the likeliest tokens after a text, without the one that ends it."""
        out = list(ids)
        for _ in range(count):
            token = int(self.alone(out, reader)[-1].argmax())
            if token == END:
                break
            out.append(token)
        return out[len(ids) :]


def stock(kind: str = "qwen3_moe", **changes: Any) -> Small:
    """Full experts in transformers' own class; a reader alone is its dense model."""
    torch.manual_seed(1)
    settings = SIZES | {
        "moe_intermediate_size": 48,
        "num_experts": len(NAMES),
        "num_local_experts": len(NAMES),
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    config = AutoConfig.for_model(kind, **settings | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval().requires_grad_(False)
    dense = {name: _dense(model, kind, number) for number, name in enumerate(NAMES)}

    def alone(ids: list[int], reader: str | None) -> torch.Tensor:
        network = model if reader is None else dense[reader]
        with torch.no_grad():
            return network(input_ids=torch.tensor([ids])).logits[0]

    return Small(SmallEngine(StockMixture(model, NAMES, None), NAMES), alone)


def _dense(model: Any, kind: str, number: int) -> nn.Module:
    """Return the dense model that one expert of a stock class makes with the trunk."""
    config = AutoConfig.for_model("qwen3" if kind == "qwen3_moe" else "mistral", **SIZES)
    config.sliding_window = model.config.sliding_window
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kept = {name: each for name, each in model.state_dict().items() if ".mlp." not in name}
    for at, layer in enumerate(model.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj[number].chunk(2)
        down = layer.mlp.experts.down_proj[number]
        for name, weight in (("gate", gate), ("up", up), ("down", down)):
            kept[f"model.layers.{at}.mlp.{name}_proj.weight"] = weight
    dense.load_state_dict(kept)
    return dense.eval().requires_grad_(False)


@dataclass
class _Parts:
    """A trunk, its base, experts on it and their router, all frozen."""

    trunk: Trunk
    base: Expert
    experts: dict[str, Expert]
    router: Router

    @classmethod
    def drawn(
        cls, settings: dict[str, Any], layers: tuple[int, ...] | None, full: bool
    ) -> "_Parts":
        """Return the same ones every time, with experts in all layers or in some."""
        torch.manual_seed(2)
        trunk, base = build(settings)
        experts = {}
        for name in NAMES:
            if full:
                expert = reinit_like(base)
                expert = expert if layers is None else in_layers(expert, base, layers)
            else:
                expert = LowRankExpert(base, 4, 1.5, layers)
                for parameter in expert.parameters():
                    nn.init.normal_(parameter, std=0.3)
            experts[name] = expert.requires_grad_(False).eval()
        own = layers or tuple(range(settings["num_hidden_layers"]))
        weight_LED = torch.randn(len(own), len(NAMES), settings["hidden_size"])
        router = Router(weight_LED, Gating(2), own).requires_grad_(False).eval()
        trunk.requires_grad_(False).eval()
        return cls(trunk, base.requires_grad_(False).eval(), experts, router)

    def alone(self, ids: list[int], reader: str | None) -> torch.Tensor:
        """Return logits_TV of a plain pass over a text."""
        slots = self.trunk.network.model.layers
        # whose they are where the same trunk is served
        serving = [getattr(layer.mlp, "ffn", None) for layer in slots]
        ffn: Any = Mixture(list(self.experts.values()), self.router).eval()
        if reader is not None:
            ffn = self.base if reader == BASE_READER else self.experts[reader]
        ffn = ffn.merged() if isinstance(ffn, LowRankExpert) else ffn
        with torch.no_grad():
            x_BTD = self.trunk.hidden(torch.tensor([ids]), ffn)
        for layer, kept in zip(slots, serving, strict=True):
            layer.mlp.ffn = kept
        return x_BTD[0] @ self.trunk.head.T


def unmerged(kind: str = "llama", layers: tuple[int, ...] | None = None) -> Small:
    """Low-rank experts in the slots of a trunk; a reader alone is merged."""
    parts = _Parts.drawn(SIZES | {"model_type": kind}, layers, full=False)
    network = UnmergedMixture(parts.trunk, parts.experts, parts.router)
    return Small(SmallEngine(network, (*NAMES, BASE_READER)), parts.alone)


# Of a width at which processors work as at that of real models
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}


def steady(
    kind: str = "llama",
    layers: tuple[int, ...] | None = None,
    full: bool = False,
    **changes: Any,
) -> Small:
    """The same, or full experts, in bf16; what computes the same alone does so in fp32."""
    settings = SIZES | WIDE | {"num_key_value_heads": 1, "model_type": kind} | changes
    parts = _Parts.drawn(settings, layers, full)
    network = SteadyMixture(parts.trunk, parts.experts, parts.router)
    readers = NAMES if full else (*NAMES, BASE_READER)
    return Small(SmallEngine(network, readers), _Parts.drawn(settings, layers, full).alone)


def adapters(kind: str = "qwen3") -> Small:
    """Adapters of a language model, of which the first tokens choose one."""
    return _with_adapters(TextAdapters, SIZES | {"model_type": kind})


def steady_adapters(kind: str = "qwen3") -> Small:
    """The same in bf16; what computes the same alone does so in fp32."""
    settings = SIZES | WIDE | {"num_key_value_heads": 1, "model_type": kind}
    made = _with_adapters(SteadyAdapters, settings)
    return Small(made.engine, _with_adapters(TextAdapters, settings).alone)


def _with_adapters(network_of: type[TextAdapters], settings: dict[str, Any]) -> Small:
    torch.manual_seed(3)
    network: Any = LanguageModel.of(*build(settings)).network
    network.requires_grad_(False).eval()
    # each on other projections, as an expert may be
    targets = (["q_proj", "down_proj"], ["v_proj", "o_proj", "up_proj"], ["gate_proj", "k_proj"])
    for rank, (name, modules) in enumerate(zip(NAMES, targets, strict=True), start=2):
        shape = LoraConfig(r=rank, lora_alpha=8, target_modules=modules, init_lora_weights=False)
        with warnings.catch_warnings():  # peft asks transformers in a way that it is leaving
            warnings.simplefilter("ignore", FutureWarning)
            if rank == 2:
                network = get_peft_model(network, shape, adapter_name=peft_name(name))
            else:
                network.add_adapter(peft_name(name), shape)
    adapted = Adapted(network.requires_grad_(False).eval())
    width = settings["hidden_size"]
    router = RequestRouter(torch.randn(1, len(NAMES) + 1, width), len(NAMES), 1.0, 0.3)
    stack = RequestStack(adapted, NAMES, TextRouter(router, (1,), 4))
    engine = SmallEngine(network_of(stack), stack.names)
    engine.stack = stack  # as an AdapterEngine has it

    def alone(ids: list[int], reader: str | None) -> torch.Tensor:
        if reader is None:
            raise ValueError("name who reads it: the router looks at the first tokens alone")
        model = adapted.under(None if reader == BASE_READER else reader)
        with torch.no_grad():
            return model.hidden(torch.tensor([ids]))[0] @ adapted.head.T

    return Small(engine, alone)


def beside_dense(small: Small, kind: str, model_of: type[DenseModel] = DenseModel) -> Small:
    """Put a dense model with another feed-forward width beside a stack; what computes the same
    alone is transformers' own."""
    torch.manual_seed(4)
    served = small.engine.model.config
    like = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    settings = SIZES | {key: getattr(served, key) for key in like} | {"intermediate_size": 80}
    config = AutoConfig.for_model(kind, **settings)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole.eval().requires_grad_(False)
    copied = {name: each.clone() for name, each in whole.state_dict().items()}
    model = LanguageModel.of(*open_dense(settings | {"model_type": kind}, copied))
    engine = small.engine
    engine.network.stand_beside(model_of(model.requires_grad_(False).eval()))
    engine.readers = (*engine.readers, DENSE_READER)

    def alone(ids: list[int], reader: str | None) -> torch.Tensor:
        if reader != DENSE_READER:
            return small.alone(ids, reader)
        with torch.no_grad():
            return whole(input_ids=torch.tensor([ids])).logits[0]

    return Small(engine, alone)


STEADY: dict[str, Callable[[], Small]] = {
    "low rank": steady,
    "low rank, last layer": lambda: steady("qwen3", (1,)),
    "full experts": lambda: steady("qwen3", full=True),
    "adapters": steady_adapters,
    "full experts, last layer, window": lambda: steady(
        "mistral", (1,), full=True, sliding_window=9
    ),
    # of a width at which the deltas of all experts are one product
    "low rank at once, width 100": lambda: steady(
        intermediate_size=100, hidden_size=96, initializer_range=0.2
    ),
    "full experts, dense beside": lambda: beside_dense(
        steady("qwen3", full=True), "qwen3", SteadyDense
    ),
}
KINDS: dict[str, Callable[[], Small]] = {
    "full experts": stock,
    "full experts, window": lambda: stock("mixtral", sliding_window=9),
    "low rank": unmerged,
    "low rank, last layer": lambda: unmerged("qwen3", (1,)),
    "adapters": adapters,
    "adapters, window": lambda: adapters("mistral"),
    "low rank, dense beside": lambda: beside_dense(unmerged(), "llama"),
}
