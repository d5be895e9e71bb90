"""The shared trunk: a Hugging Face causal LM whose feed-forward networks have been taken out.

What fills the open slot of each layer is passed in with every call, so one trunk serves the dummy,
an expert, a dense baseline and the whole stack. Tensors keep their Hugging Face names.

B sequences, T tokens, D model width.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from .experts import Expert
from .kernels.attention import patch_attention
from .kernels.norm import patch_norm
from .tensors import assign_parameter, copy_into

Ffn = Callable[[int, torch.Tensor], torch.Tensor]  # (layer, x_BTD) -> y_BTD
SUPPORTED = ("qwen3", "llama", "mistral")


class Trunk(nn.Module):
    """Embedding, attention, norms and LM head, with an open slot per layer."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.config = network.config

    def hidden(self, ids_BT: torch.Tensor, ffn: Ffn) -> torch.Tensor:
        """Return h_BTD after the final norm, with `fill` as each layer's feed-forward network."""
        for layer in self.network.model.layers:
            layer.mlp.ffn = ffn
        return self.network.model(input_ids=ids_BT, use_cache=False).last_hidden_state

    def unfreeze(self) -> None:
        """Make every parameter trainable, in memory of its own."""
        for parameter in self.network.parameters():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)

    def checkpoint(self) -> None:
        """Keep only what enters each layer and make the rest again in the backward pass
        (1604.06174)."""
        self.network.activation_checkpointing_enable({"use_reentrant": False})
        # without it Hugging Face models do not checkpoint; a trunk has no dropout
        self.network.train()

    @property
    def head(self) -> nn.Parameter:
        """LM head weight_VD (the embedding itself when tied)."""
        return self.network.lm_head.weight

    def named(self) -> dict[str, nn.Parameter]:
        """Return parameters by Hugging Face name; a tied head appears once, as the embedding."""
        return dict(self.network.named_parameters())


class _Slot(nn.Module):
    """Stands where a feed-forward network stood and hands its input to whatever fills it."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.ffn: list | Ffn | None = None

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name == "ffn" else super().__setattr__(name, value)

    def forward(self, x_BTD):
        return self.ffn(self.layer, x_BTD)


def build(settings: Mapping) -> tuple[Trunk, Expert]:
    """Return a new trunk and its dummy from Hugging Face config fields, drawn from torch's
    generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings)
    return extract_ffn(
        AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    )


def open_tensors(
    settings: Mapping,
    trunk: Mapping[str, torch.Tensor],
    ffn: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Trunk, Expert]:
    """Return trunk and dummy around stored tensors, which are neither copied nor cast, both frozen.

    Without `ffn` the dummy stays on the meta device: only a pattern for experts. Raises KeyError
    when names are missing or strange, ValueError when a shape differs.
    """
    with torch.device("meta"):
        made, dummy = build(settings)
    rotary = made.network.model.rotary_emb
    made.network.model.rotary_emb = type(rotary)(
        config=made.config
    )  # its buffers are computed, not stored
    assign_parameter(made.network, made.named(), trunk)
    if made.config.tie_word_embeddings:
        made.network.lm_head.weight = made.network.model.embed_tokens.weight
    if ffn is not None:
        assign_parameter(dummy, dummy.named(), ffn)
    return made.requires_grad_(False).eval(), dummy.requires_grad_(False).eval()


def pretrained(name: str | Path, revision: str | None = None) -> tuple[Trunk, Expert]:
    """Load a Qwen3, Llama or Mistral checkpoint (folder or Hub name) as trunk and dummy.

    Raises ValueError for another architecture and OSError when nothing can be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(name), revision=revision)
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{name} is a {config.model_type} model; a trunk can be one of {', '.join(SUPPORTED)}"
        )
    return extract_ffn(
        AutoModelForCausalLM.from_pretrained(
            str(name),
            revision=revision,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
        )
    )


def extract_ffn(network: nn.Module) -> tuple[Trunk, Expert]:
    """Take the feed-forward networks out of a causal LM; return it as a trunk, and them as the
    dummy."""
    taken = []
    for number, layer in enumerate(network.model.layers):
        taken.append(layer.mlp)
        layer.mlp = _Slot(number)
    patch_attention(network)
    patch_norm(network)
    return Trunk(network), Expert(taken)


def settings_of(trunk: Trunk) -> dict:
    """Return the Hugging Face config fields that `build` takes to make this trunk again, without
    where it came from."""
    return {key: value for key, value in trunk.config.to_dict().items() if key != "_name_or_path"}


def load(trunk: Trunk, tensors: Mapping[str, torch.Tensor]) -> Trunk:
    """Fill a trunk with stored tensors and freeze it.

    Raises KeyError when names are missing or strange, ValueError when a shape differs.
    """
    copy_into(trunk.named(), tensors)
    return trunk.requires_grad_(False).eval()
