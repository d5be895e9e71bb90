"""The shared trunk: a Hugging Face causal LM whose feed-forward networks have been taken out.

What fills the open slot of each layer is passed in with every call, so one trunk serves the dummy,
an expert, a dense baseline and the whole stack. Tensors keep their Hugging Face names.

B sequences, T tokens, D model width, K numbers by which a head's places turn.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .experts import Expert
from .kernels.attention import patch_attention
from .kernels.frozen import patch_linear
from .kernels.norm import cast_norms, patch_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ffn = Callable[[int, Tensor], Tensor]  # (layer, x_BTD) -> y_BTD
SUPPORTED = ("qwen3", "llama", "mistral")
FULL = "full_attention"
SLIDING = "sliding_attention"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Trunk(nn.Module):
    """Embedding, attention, norms and LM head, with an open slot per layer."""

    network: "PreTrainedModel"

    def __init__(self, network: "PreTrainedModel"):
        super().__init__()
        self.network = network
        self.config = network.config

    def hidden(self, ids_BT: Tensor, ffn: Ffn) -> Tensor:
        """Return h_BTD after the final norm, with `ffn` as each layer's feed-forward network."""
        for layer in self.network.model.layers:
            layer.mlp.ffn = ffn
        return self.network.model(input_ids=ids_BT, use_cache=False).last_hidden_state

    def unfreeze(self) -> None:
        """Make every parameter trainable, in memory of its own and in fp32."""
        self.network.model.embed_tokens.dtype = None
        for parameter in self.network.parameters():
            # stored tensors are mapped read-only: an optimizer must not write to the file
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Have what passes from layer to layer in a dtype, whatever the stored tensors have: rows
        of the embedding are cast as they are looked up, norms once, other weights for each
        product."""
        self.network.model.embed_tokens.dtype = dtype
        cast_norms(self.network, dtype)

    def checkpoint(self) -> None:
        """Keep only what enters each layer and make the rest again in the backward pass
        (1604.06174)."""
        self.network.activation_checkpointing_enable({"use_reentrant": False})
        # Hugging Face models checkpoint in training mode only; a trunk has no dropout to wake up
        self.network.train()

    @property
    def head(self) -> nn.Parameter:
        """LM head weight_VD (the embedding itself when tied)."""
        return self.network.lm_head.weight

    def named(self) -> dict[str, nn.Parameter]:
        """Return parameters by Hugging Face name; a tied head appears once, as the embedding."""
        return dict(self.network.named_parameters())

    def load(self, tensors: Mapping[str, Tensor], assign: bool = False) -> None:
        """Copy tensors of Hugging Face names into the parameters, or make them the parameters.

        Raises RuntimeError that names every tensor that is missing, strange or of another shape.
        """
        tied = self.config.tie_word_embeddings
        if tied and EMBEDDING in tensors:
            # stored once; torch wants every name that a parameter has
            tensors = {**tensors, HEAD: tensors[EMBEDDING]}
        self.network.load_state_dict(tensors, assign=assign)
        if tied:
            # assigning made two parameters of one tensor; the head has to be the embedding itself
            self.network.lm_head.weight = self.network.model.embed_tokens.weight


class _Slot(nn.Module):
    """Stands where a feed-forward network stood and hands its input to whatever fills it."""

    ffn: Ffn  # set by Trunk.hidden before every pass

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "ffn":
            # past nn.Module, which would register an expert as a part of the trunk
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.ffn(self.layer, x_BTD)


def build(settings: Mapping[str, Any]) -> tuple[Trunk, Expert]:
    """Return a new trunk and its dummy from Hugging Face config fields, drawn from torch's
    generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings)
    network = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
    )
    return extract_ffn(network)


def open_tensors(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    ffn: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Trunk, Expert]:
    """Return trunk and dummy around stored tensors, which are neither copied nor cast, both frozen.

    With a dtype, what passes between layers has that one, whatever the tensors have; norms, which
    are small, are cast to it. Without `ffn` the dummy stays on the meta device: only a pattern for
    experts. Raises RuntimeError when names are missing or strange or a shape differs.
    """
    with torch.device("meta"):
        trunk, dummy = build(settings)
    # its buffers are computed when it is made and never stored: on the meta device they are empty
    rotary = trunk.network.model.rotary_emb
    trunk.network.model.rotary_emb = type(rotary)(config=trunk.config)
    trunk.load(tensors, assign=True)
    if dtype is not None:
        trunk.compute_in(dtype)
    if ffn is not None:
        dummy.load(ffn, assign=True)
    return trunk.requires_grad_(False).eval(), dummy.requires_grad_(False).eval()


def check_kind(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a config.json of a model that no trunk can be made of."""
    kind = settings.get("model_type")
    if kind not in SUPPORTED:
        raise ValueError(f"it is a {kind} model; a trunk can be one of {', '.join(SUPPORTED)}")
    if settings.get("auto_map"):
        raise ValueError("it names code to run in its config.json (auto_map)")


def whole_settings(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's settings with all defaults, as Hugging Face config fields.

    Raises ValueError, with the field's name, for what its class would not compute as transformers
    opens the model, or not at all; and what the library raises.
    """
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    config = AutoConfig.for_model(**stated)
    settings: dict[str, Any] = config.to_dict()
    if settings["hidden_act"] not in ACT2FN:
        raise ValueError(f"hidden_act is {settings['hidden_act']!r}, which transformers has not")
    padding = settings.get("pad_token_id")
    entries = settings["vocab_size"]
    if padding is not None and not -entries <= padding < entries:
        raise ValueError(f"pad_token_id is {padding}, and vocab_size {entries}")
    _check_layers(settings)
    _check_positions(config)
    return settings


def _check_layers(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for layers that attend in another way than the class has them do."""
    kind = settings["model_type"]
    if settings.get("is_causal") is False:
        raise ValueError("is_causal is false, at which a token sees those that it is to tell")
    back = settings.get("sliding_window")
    sees = window(settings)
    if sees is not None and sees < 1:
        raise ValueError(f"sliding_window is {sees}, at which a token does not see itself")
    has = {
        "qwen3": {FULL} if back is None else {FULL, SLIDING},
        "llama": {FULL},
        # With others the library opens it as a Ministral
        "mistral": {FULL if back is None else SLIDING},
    }[kind]
    others = set(settings.get("layer_types") or ()) - has
    if others:
        raise ValueError(
            f"layer_types has {', '.join(sorted(others))}, and layers of a {kind} model with "
            f"sliding_window {back} have {' or '.join(sorted(has))}"
        )


def _check_positions(config: Any) -> None:
    """Raise ValueError for positions that turn queries and keys in a way the class has not."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters or {}
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"rope_parameters differ by kind of layer ({', '.join(nested)}), and layers of a "
            f"{config.model_type} model turn alike"
        )
    theta = rope.get("rope_theta")
    if not isinstance(theta, int | float) or not theta > 0:
        raise ValueError(f"rope_theta is {theta!r}, which is no number above 0")
    name = rope.get("rope_type", "default")
    if name == "default":
        return
    if name not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
        raise ValueError(f"rope_type is {name!r}, and transformers has {known}")
    try:
        turns_K, _ = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"))
    except Exception as error:  # the library raises what it likes at numbers that are none
        raise ValueError(f"rope_parameters of rope_type {name} do not work: {error}") from error
    if 2 * len(turns_K) != config.head_dim:
        raise ValueError(
            f"partial_rotary_factor is {rope.get('partial_rotary_factor')}, and a "
            f"{config.model_type} model turns whole heads"
        )
    if not torch.isfinite(turns_K).all():
        raise ValueError(f"rope_parameters of rope_type {name} give angles that are no numbers")
    most = config.max_position_embeddings
    if name == "longrope" and most > rope["original_max_position_embeddings"]:
        # How a text's first places are turned would follow from how long it, and those read beside
        # it, come to be
        raise ValueError(
            f"rope_type is longrope, which turns all places anew where a text grows beyond "
            f"original_max_position_embeddings ({rope['original_max_position_embeddings']} of "
            f"max_position_embeddings {most}), and texts that are served keep what they have read"
        )


def window(settings: Mapping[str, Any]) -> int | None:
    """Return how many tokens layers look back on, None where each sees a text's beginning; of
    layers that differ it is that of the shorter ones. Settings are Hugging Face config fields."""
    kind = settings["model_type"]
    kinds = settings.get("layer_types") or ()
    # A number may stand there that the class passes over, where another would go by it
    if kind == "llama" or (kind == "qwen3" and "sliding_attention" not in kinds):
        return None
    found: int | None = settings.get("sliding_window")
    return found


def extract_ffn(network: "PreTrainedModel") -> tuple[Trunk, Expert]:
    """Take the feed-forward networks out of a causal LM; return it as a trunk, and them as the
    dummy."""
    networks = []
    for number, layer in enumerate(network.model.layers):
        networks.append(layer.mlp)
        # Training mode, which checkpointing needs, would wake it up: figures would depend on memory
        layer.self_attn.attention_dropout = 0.0
        layer.mlp = _Slot(number)
    patch_attention(network)
    patch_norm(network)
    patch_linear(network)
    return Trunk(network), Expert(networks)


def open_dense(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Trunk, Expert]:
    """Return a dense model's stored tensors as the trunk and the network that it consists of here,
    as `open_tensors` does, computing in fp32. Raises what that raises."""
    in_ffn = {name: tensor for name, tensor in tensors.items() if ".mlp." in name}
    others = {name: tensor for name, tensor in tensors.items() if name not in in_ffn}
    return open_tensors(settings, others, in_ffn, torch.float32)


def settings_of(trunk: Trunk) -> dict[str, Any]:
    """Return the Hugging Face config fields that `build` takes to make this trunk again, without
    where it came from."""
    fields: dict[str, Any] = trunk.config.to_dict()
    return {key: value for key, value in fields.items() if key != "_name_or_path"}
