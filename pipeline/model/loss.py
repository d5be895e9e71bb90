"""Cross-entropy that never holds the full logits: each chunk's gradient is formed in the forward
pass.

N tokens, D model width, V vocabulary, C tokens of a chunk.
"""

import torch

CHUNK_LOGITS = (
    2**22
)  # of a chunk: with 16,384 entries 256 tokens, the fastest on the processor it was measured on
LEAST_CHUNK_TOKENS = 64  # below it the products slow down
# gradients that are added up in bf16: a longer sum stops growing, as what comes is rounded away
MOST_SUMS = 32


def chunk_of(vocab_size: int, chunk_logits: int = CHUNK_LOGITS) -> int:
    """Return the tokens of a chunk that holds about that many logits."""
    return max(LEAST_CHUNK_TOKENS, chunk_logits // vocab_size)


def workspace_bytes(tokens: int, vocab_size: int, chunk_logits: int, number_bytes: int) -> int:
    """Return the bytes of the two buffers of a pass over `tokens`: a chunk's logits, of numbers of
    `number_bytes`, and their softmax in fp32."""
    return min(tokens, chunk_of(vocab_size, chunk_logits)) * vocab_size * (4 + number_bytes)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of nats over tokens; keeps d loss / d h and d loss / d head instead of logits_NV."""

    @staticmethod
    def forward(ctx, h_ND, head_VD, target_N, dtype, chunk_tokens):
        cast_VD = head_VD.to(dtype)
        grad_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        sums = (
            _Sum(head_VD, long=len(h_ND) > MOST_SUMS * chunk_tokens)
            if ctx.needs_input_grad[1]
            else None
        )
        work = _Workspace(min(chunk_tokens, len(h_ND)), cast_VD)
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        for at in range(0, len(h_ND), chunk_tokens):
            part = slice(at, at + chunk_tokens)
            h_CD = h_ND[part].to(dtype)
            total += work.token_loss(h_CD, target_N[part]).sum()
            if grad_ND is None and sums is None:
                continue
            slope_CV = work.slope(target_N[part])
            if grad_ND is not None:
                grad_ND[part] = slope_CV @ cast_VD
            if sums is not None:
                sums.add(slope_CV.T, h_CD)
        ctx.save_for_backward(grad_ND, sums and sums.total())
        ctx.head_VD = head_VD
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_ND, grad_VD = ctx.saved_tensors
        d_ND = grad_ND if grad_ND is None else grad_ND * upstream.to(grad_ND.dtype)
        return d_ND, _scaled(ctx.head_VD, grad_VD, upstream), None, None, None


class _Workspace:
    """Two buffers that every chunk uses again: a chunk's logits and its softmax."""

    def __init__(self, chunk_tokens: int, head_VD: torch.Tensor):
        size = (chunk_tokens, len(head_VD))
        self.head_VD = head_VD
        self.logits_CV = torch.empty(size, dtype=head_VD.dtype, device=head_VD.device)
        fp32 = torch.promote_types(head_VD.dtype, torch.float32)
        self.softmax_CV = torch.empty(size, dtype=fp32, device=head_VD.device)

    def token_loss(self, h_CD: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
        """Return nats_C of a chunk and leave its softmax in the buffer."""
        logits_CV, softmax_CV = self.logits_CV[: len(h_CD)], self.softmax_CV[: len(h_CD)]
        torch.mm(h_CD, self.head_VD.T, out=logits_CV)
        own_C = logits_CV.gather(1, target_C[:, None]).squeeze(1).to(softmax_CV.dtype)
        top_C = logits_CV.amax(-1).to(softmax_CV.dtype)
        torch.softmax(logits_CV, -1, dtype=softmax_CV.dtype, out=softmax_CV)
        return (
            top_C - softmax_CV.amax(-1).log() - own_C
        )  # logsumexp from the largest, which never underflows

    def slope(self, target_C: torch.Tensor) -> torch.Tensor:
        """Return d nats / d logits_CV of the chunk just seen, in the products' dtype."""
        softmax_CV = self.softmax_CV[: len(target_C)]
        softmax_CV.scatter_add_(1, target_C[:, None], softmax_CV.new_full((len(target_C), 1), -1.0))
        return self.logits_CV[: len(target_C)].copy_(softmax_CV)


def _scaled(
    head_VD: torch.Tensor, grad_VD: torch.Tensor | None, upstream: torch.Tensor
) -> torch.Tensor | None:
    """Return the head's gradient, or add it to the sum that is there already: a table of the
    vocabulary less."""
    if grad_VD is None:
        return None
    if head_VD.is_leaf and head_VD.grad is not None:
        head_VD.grad.add_(grad_VD, alpha=upstream.item())
        return None
    return grad_VD * upstream.to(grad_VD.dtype)


class _Sum:
    """The head's gradient in the head's dtype; a long sum in bf16 goes over to fp32 every MOST_SUMS
    products."""

    def __init__(self, head_VD: torch.Tensor, long: bool):
        self.sum_VD, self.count = torch.zeros_like(head_VD), 0
        coarse = long and head_VD.dtype.itemsize < 4
        self.exact_VD = torch.zeros_like(head_VD, dtype=torch.float32) if coarse else None

    def add(self, a_VC: torch.Tensor, b_CD: torch.Tensor) -> None:
        """Add a @ b."""
        if self.sum_VD.dtype == b_CD.dtype:
            self.sum_VD.addmm_(a_VC, b_CD)
        else:
            self.sum_VD += a_VC @ b_CD
        self.count += 1
        if self.exact_VD is not None and self.count % MOST_SUMS == 0:
            self.exact_VD += self.sum_VD
            self.sum_VD.zero_()

    def total(self) -> torch.Tensor:
        """Return all that was added."""
        return self.sum_VD if self.exact_VD is None else self.exact_VD.add_(self.sum_VD)


def cross_entropy(
    h_ND: torch.Tensor,
    head_VD: torch.Tensor,
    target_N: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Return the summed nats of target_N; matrix products run in `dtype`, the softmax in fp32."""
    chunk_tokens = chunk_tokens or chunk_of(len(head_VD))
    return _ChunkedCrossEntropy.apply(h_ND, head_VD, target_N, dtype, chunk_tokens)


@torch.no_grad()
def chunked_token_loss(
    h_ND: torch.Tensor,
    head_VD: torch.Tensor,
    target_N: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Return nats_N, the loss of each token, for evaluation."""
    chunk_tokens = chunk_tokens or chunk_of(len(head_VD))
    work = _Workspace(min(chunk_tokens, len(h_ND)), head_VD.to(dtype))
    chunks = zip(h_ND.split(chunk_tokens), target_N.split(chunk_tokens), strict=True)
    return torch.cat([work.token_loss(h_CD.to(dtype), target_C) for h_CD, target_C in chunks])
