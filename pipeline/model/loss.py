"""Cross-entropy that never holds the full logits: each chunk's gradient is formed in the forward pass.

N tokens, D model width, V vocabulary, C tokens of a chunk.
"""

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 1024


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of nats over tokens; keeps d loss / d h and d loss / d head instead of logits_NV."""

    @staticmethod
    def forward(ctx, h_ND, head_VD, target_N, dtype, chunk_tokens):
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        cast_VD = head_VD.to(dtype)
        grad_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        grad_VD = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        for at in range(0, h_ND.shape[0], chunk_tokens):
            part = slice(at, at + chunk_tokens)
            h_CD = h_ND[part].to(dtype)
            log_CV = (h_CD @ cast_VD.T).float().log_softmax(-1)
            total += F.nll_loss(log_CV, target_N[part], reduction="sum")
            slope_CV = log_CV.exp_()
            slope_CV[torch.arange(len(h_CD)), target_N[part]] -= 1
            slope_CV = slope_CV.to(dtype)
            if grad_ND is not None:
                grad_ND[part] = slope_CV @ cast_VD
            if grad_VD is not None:
                grad_VD += slope_CV.T @ h_CD
        ctx.save_for_backward(grad_ND, grad_VD)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_ND, grad_VD = ctx.saved_tensors
        scaled = [g if g is None else g * upstream for g in (grad_ND, grad_VD)]
        return *scaled, None, None, None


def cross_entropy(
    h_ND: torch.Tensor,
    head_VD: torch.Tensor,
    target_N: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Return the summed nats of target_N; matrix products run in `dtype`, the softmax in fp32."""
    return _ChunkedCrossEntropy.apply(h_ND, head_VD, target_N, dtype, chunk_tokens)


@torch.no_grad()
def token_nats(
    h_ND: torch.Tensor, head_VD: torch.Tensor, target_N: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return nats_N, the loss of each token, for evaluation."""
    cast_VD = head_VD.to(dtype)
    chunks = zip(h_ND.split(CHUNK_TOKENS), target_N.split(CHUNK_TOKENS), strict=True)
    return torch.cat([F.cross_entropy((h.to(dtype) @ cast_VD.T).float(), t, reduction="none") for h, t in chunks])
