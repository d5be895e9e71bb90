"""Attention of a served pass, row by row, each over its own text alone.

A token that is drawn sees exactly the places of its text. Tokens that are read stand in blocks of
places, whichever of them a pass reads: what is computed for a token follows from its place alone,
however a prompt was cut and whatever was read beside it.

B rows, T tokens, N = B*T, H heads of queries, M heads of keys and values, G = H/M, C places of a
block, S places that are seen, A axes that a place is counted in, K width of a head, W numbers that
become of a place.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...model.kernels.attention import attend_by
from ..networks import Batch, Chunk
from ..slot_cache import PLACES
from .products import elementwise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "moleforge_steady"
# As places of slots come in these, every block is there as a whole.
BLOCK = PLACES


def attend_alone(network: "PreTrainedModel") -> None:
    """Have a Hugging Face model attend so in passes that are given the batch as `served`."""
    attend_by(network, NAME, _forward)


def _forward(
    module: Any,
    q_BHTK: Tensor,
    k_BMSK: Tensor,
    v_BMSK: Tensor,
    mask: Tensor | None,
    *,
    served: Batch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return out_BTHK and no weights, as Hugging Face's attention functions do."""
    if served is None:
        # one that reads beside those that are served, as a router does
        return sdpa_attention_forward(
            module, q_BHTK, k_BMSK, v_BMSK, mask, scaling=scaling, **kwargs
        )
    q_BTHK = q_BHTK.transpose(1, 2).contiguous()
    # the heads of queries that share one of keys stand below each other
    q_NMGK = q_BTHK.flatten(0, 1).unflatten(1, (k_BMSK.shape[1], -1))
    # all at once, as to take a row out of a tensor costs half of what attention over it does
    takes = q_NMGK.split(served.taken)
    keys = k_BMSK.split(1)
    values = v_BMSK.split(1)
    parts = []
    for chunk, row, q_TMGK in zip(served.chunks, served.key_rows, takes, strict=True):
        attend = _drawn if chunk.is_drawn else _read
        parts.append(attend(q_TMGK, keys[row], values[row], chunk, scaling, sliding_window))
    return torch.cat(parts).view_as(q_BTHK), None


def _drawn(
    q_TMGK: Tensor,
    k_1MSK: Tensor,
    v_1MSK: Tensor,
    chunk: Chunk,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Return out_TMGK of a token that was drawn: T is 1."""
    first = 0 if window is None else max(0, chunk.end - window)
    seen = (2, first, chunk.end - first)
    return F.scaled_dot_product_attention(
        q_TMGK, k_1MSK.narrow(*seen), v_1MSK.narrow(*seen), scale=scale
    )


def _read(
    q_TMGK: Tensor,
    k_1MSK: Tensor,
    v_1MSK: Tensor,
    chunk: Chunk,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Return out_TMGK of tokens that are read, zeros of what fills their row up."""
    count, heads, group, width = q_TMGK.shape
    q_MGTK = q_TMGK.permute(1, 2, 0, 3)
    parts = []
    for start in range(chunk.start // BLOCK * BLOCK, chunk.end, BLOCK):
        end = start + BLOCK
        first, last = max(start, chunk.start), min(end, chunk.end)
        own_C = slice(first - start, last - start)
        # where nothing of this pass stands queries are zeros, and nobody asks what they find
        q_MGCK = q_MGTK.new_zeros(heads, group, BLOCK, width)
        q_MGCK[:, :, own_C] = q_MGTK[:, :, first - chunk.start : last - chunk.start]
        mask_CS = _mask(start, window, q_MGTK.device)
        out_1MRK = F.scaled_dot_product_attention(
            q_MGCK.flatten(1, 2)[None],
            k_1MSK[:, :, :end],
            v_1MSK[:, :, :end],
            attn_mask=mask_CS.repeat(group, 1),
            scale=scale,
        )
        out_MGCK = out_1MRK[0].unflatten(1, (group, BLOCK))[:, :, own_C]
        parts.append(out_MGCK.permute(2, 0, 1, 3))
    if missing := count - len(chunk.ids):
        parts.append(q_TMGK.new_zeros(missing, heads, group, width))
    return torch.cat(parts)


def _mask(start: int, window: int | None, device: torch.device) -> Tensor:
    """Return mask_CS of the block of places that begins there."""
    place_C1 = torch.arange(start, start + BLOCK, device=device).unsqueeze(1)
    at_S = torch.arange(start + BLOCK, device=device)
    sees_CS = at_S <= place_C1
    return sees_CS if window is None else sees_CS & (at_S > place_C1 - window)


class SteadyRotary(nn.Module):
    """Cosines and sines of places, of all of which they are computed in the same way."""

    def __init__(self, rotary: Any):
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of shape (B, T, K); places are (B, T), or (A, B, T) where each has
        one in time, height and width."""
        shape = position_ids.shape[-2:]
        place_NA = position_ids.reshape(-1, shape.numel()).T
        axes = place_NA.shape[1]

        def both(place_NA: Tensor) -> Tensor:
            place_AN = place_NA.T
            given = place_AN.unsqueeze(1) if axes > 1 else place_AN
            cosine_1NK, sine_1NK = self.rotary(x, given)
            return torch.cat([cosine_1NK[0], sine_1NK[0]], 1)

        # a row of places as wide as what becomes of it, so that as many run at once
        width = max(2, axes) * self.rotary.inv_freq.numel()
        wide_NW = F.pad(place_NA, (0, width - axes))
        found_NK = elementwise(lambda part_NW: both(part_NW[:, :axes]), wide_NW)
        cosine, sine = found_NK.view(*shape, -1).chunk(2, -1)
        return cosine, sine
