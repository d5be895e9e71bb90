"""What makes a served network of any kind a steady one: its products, attention, angles and logits.

B texts, T tokens, N tokens of all, V vocabulary, A likely tokens, D model width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..held_weights import cast_weights
from ..networks import Batch, Network
from ..slot_cache import PLACES
from .attention import SteadyRotary, attend_alone
from .products import SteadyProducts, replace_linear, silu

DTYPE = torch.bfloat16
# Of each text's logits, the likeliest.
AGAIN = 64
# Kinds of rotary embedding whose angles follow from a token's place alone.
ROTARY = ("default", "linear", "llama3", "yarn")


def text_model(network: Any) -> Any:
    """Return what of a Hugging Face model reads tokens, beside a tower for pictures if it has
    one."""
    return getattr(network.model, "language_model", network.model)


def has_steady_places(network: Any) -> bool:
    """Whether the angles of a Hugging Face model's places depend on nothing else."""
    return text_model(network).rotary_emb.rope_type in ROTARY


def can_be_steady(network: Any) -> bool:
    """Whether a Hugging Face model, with its own feed-forward networks, is one that runs so."""
    silu_alone = network.config.get_text_config().hidden_act in ("silu", "swish")
    return silu_alone and has_steady_places(network)


class SteadyNetwork(Network):
    """A network in bf16 of whose rows each is computed as it is alone; to be inherited from before
    the class that runs it in fp32."""

    dtype = "bf16"
    seen_step = PLACES
    is_held: bool  # in bf16; False: there was no room for its weights, and it is not to be run
    _products: SteadyProducts
    _head_VD: Tensor

    def make_steady(self, network: Any, *others: nn.Module) -> None:
        """Change a Hugging Face model for it, and hold its weights, and others', in bf16."""
        text = text_model(network)
        self._products = SteadyProducts()
        self.is_held = cast_weights(text, *others, dtype=DTYPE)
        self._head_VD = network.lm_head.weight.detach().to(DTYPE)
        replace_linear(text, self._products)
        text.rotary_emb = SteadyRotary(text.rotary_emb)
        attend_alone(text)

    def make_steady_silu(self, network: Any) -> None:
        """Do so with a model's own feed-forward networks."""
        for layer in text_model(network).layers:
            layer.mlp.act_fn = SteadySilu()

    def extras(self, batch: Batch) -> dict[str, Any]:
        """Return what a pass is given beside its tokens."""
        return {"served": batch}

    def logits(self, x_BD: Tensor) -> Tensor:
        """Return logit_BV, of the likeliest tokens in fp32."""
        logit_BV = self._products(x_BD, self._head_VD).float()
        # bf16 gives neighbours one number: who is first among them, and by how much, is computed
        # again, each text by itself
        likely_BA = logit_BV.topk(min(AGAIN, logit_BV.shape[1])).indices
        for row, likely_A in enumerate(likely_BA):
            head_AD = self.model.lm_head.weight[likely_A].to(x_BD.dtype)
            logit_BV[row, likely_A] = F.linear(x_BD[row : row + 1], head_AD)[0]
        return logit_BV


class SteadySilu(nn.Module):
    """x sigmoid(x), of each number computed in the same way."""

    def forward(self, x: Tensor) -> Tensor:
        """Return it, for x of any shape."""
        return silu(x.flatten(0, -2)).view_as(x)
