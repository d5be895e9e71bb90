"""A bundle opened by the class that any of its users would load, and held against the stack that
was measured.

T tokens, B sequences, D model width, V vocabulary.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..data.text.tokenizer import Tokenizer, unknown_ids
from ..errors import MismatchError
from ..hardware import device
from ..model.loading import quiet_library
from ..model.trunk import Ffn, Trunk

if TYPE_CHECKING:
    from transformers import GenerationConfig

PROBE_TOKENS = 64
# Of the logits' spread: fp32 rounds by a hundredth of it, another convention is off by more.
PROBE_LIMIT = 1e-4


class CausalModel(Protocol):
    """What is used of the models that AutoModelForCausalLM opens; they share no class that has
    all of it."""

    config: Any
    generation_config: "GenerationConfig"
    base_model: nn.Module  # without the head
    lm_head: nn.Linear

    def __call__(self, *, input_ids: torch.Tensor) -> Any:
        """Run the model; the result has logits of shape (B, T, V)."""


def open_model(folder: Path) -> CausalModel:
    """Return the bundle as transformers opens it, frozen, on the device."""
    from transformers import AutoModelForCausalLM

    with quiet_library():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            # As the stack computes, so that both can be compared.
            dtype=torch.float32,
            attn_implementation="sdpa",
            # Pickles could run code, and names could be looked up on the Hub.
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval().requires_grad_(False).to(device())


def probe(context_tokens: int, vocab_size: int) -> torch.Tensor:
    """Return ids_BT of one sequence spread over the vocabulary."""
    count = min(PROBE_TOKENS, context_tokens)
    place_T = torch.arange(count, device=device())
    # Steps of a prime, so that ids repeat only where the vocabulary is a multiple of it.
    ids_T = place_T * 7919 % vocab_size
    return ids_T.unsqueeze(0)


def probe_logits(trunk: Trunk, ffn: Ffn, context_tokens: int) -> torch.Tensor:
    """Return logits_TV of a trunk on the probe."""
    head_VD = trunk.head
    ids_BT = probe(context_tokens, len(head_VD))
    with torch.no_grad():
        x_BTD = trunk.hidden(ids_BT, ffn)
        return x_BTD[0].float() @ head_VD.float().T


def check_logits(
    folder: Path, model: CausalModel, expected_TV: torch.Tensor, context_tokens: int
) -> None:
    """Raise MismatchError unless the stock model gives the stack's logits on the probe."""
    ids_BT = probe(context_tokens, expected_TV.shape[1])
    with torch.no_grad():
        output = model(input_ids=ids_BT)
    logits_TV = output.logits[0].float()
    difference_TV = logits_TV - expected_TV
    worst_T = difference_TV.abs().amax(-1)
    # The median: a tie between gates may fall differently, and shows at its own token only.
    typical = worst_T.median() / expected_TV.std()
    off = typical.item()
    # Not `off > limit`, which NaN would pass.
    if not off <= PROBE_LIMIT:
        raise MismatchError(
            f"{folder} loaded by transformers gives other logits than its own stack "
            f"(typically {off:.2g} of their spread apart): transformers reads it in another "
            "way; install the version of requirements.txt"
        )


def check_tokens(folder: Path, tokenizer: Tokenizer, start_ids: list[int]) -> None:
    """Raise MismatchError unless the stock tokenizer gives a text the tokens it has here."""
    from transformers import AutoTokenizer

    drawn = [place * 7919 % tokenizer.vocab_size for place in range(PROBE_TOKENS)]
    # What stands for text without an entry is none of its text.
    without = tokenizer.special | unknown_ids(tokenizer.model)
    plain = [token for token in drawn if token not in without]
    names = [str(tokenizer.model.id_to_token(token)) for token in without]
    text = _without(tokenizer.model.decode(plain), names)
    (own,) = tokenizer.encode([text])
    with quiet_library():
        stock = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if stock(text)["input_ids"] != [*start_ids, *own.ids]:
        raise MismatchError(
            f"{folder} opened by transformers gives text other tokens than it was trained on; "
            "install the version of requirements.txt"
        )


def _without(text: str, names: Collection[str]) -> str:
    """Return a text that spells none of some tokens, as tokens together may: it would be plain
    here, and that token there."""
    while spelled := [name for name in names if name and name in text]:
        for name in spelled:
            text = text.replace(name, "")
    return text
