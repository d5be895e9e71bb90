"""Cross-entropy that never holds the full logits: each chunk's gradient is formed in the forward
pass.

N tokens, D model width, V vocabulary, C tokens of a chunk, P entries of a piece.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .autograd import Context
from .chunks import PIECE_NUMBERS, WHOLE_NUMBERS, chunk_of

# Products that are added up in bf16. A longer sum stops growing, as bf16 rounds away what comes.
MAX_BF16_SUMS = 32


def cross_entropy(
    h_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the summed nats of target_N; matrix products run in `dtype`, the softmax in fp32."""
    total, _ = smoothed_cross_entropy(h_ND, head_VD, target_N, 0.0, dtype, chunk_tokens)
    return total


def smoothed_cross_entropy(
    h_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    smoothing: float,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed nats against smoothed targets, and those of target_N, without a gradient.

    A smoothed target is 1 - smoothing at its token, and smoothing spread evenly over all entries
    (1512.00567, section 7).
    """
    chunk_tokens = chunk_tokens or chunk_of(len(head_VD))
    return _ChunkedCrossEntropy.apply(h_ND, head_VD, target_N, dtype, chunk_tokens, smoothing)


@torch.no_grad()
def chunked_token_loss(
    h_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return nats_N, the loss of each token, for evaluation."""
    chunk_tokens = chunk_tokens or chunk_of(len(head_VD))
    buffers = _ChunkBuffers(min(chunk_tokens, len(h_ND)), _Head(head_VD, dtype))
    nats_N = h_ND.new_empty(len(h_ND), dtype=buffers.softmax_CV.dtype)
    for start in range(0, len(h_ND), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        h_CD = h_ND[chunk].to(dtype)
        # A few losses kept from each chunk would break up the heap that the next one's block needs
        nats_N[chunk] = buffers.token_loss(h_CD, target_N[chunk])
    return nats_N


@torch.no_grad()
def logits(h_ND: Tensor, head_VD: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return logit_NV in `dtype`, for a few tokens; a large head is cast piece by piece."""
    head = _Head(head_VD, dtype)
    out_NV = h_ND.new_empty((len(h_ND), head.vocab_size), dtype=dtype)
    head.logits(h_ND.to(dtype), out_NV)
    return out_NV


class _LossContext(Context, Protocol):
    head_VD: Tensor

    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of nats over tokens; keeps d loss / d h and d loss / d head instead of logits_NV."""

    @staticmethod
    def forward(
        ctx: _LossContext,
        h_ND: Tensor,
        head_VD: Tensor,
        target_N: Tensor,
        dtype: torch.dtype,
        chunk_tokens: int,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        needs_h, needs_head = ctx.needs_input_grad[:2]
        head = _Head(head_VD, dtype)
        grad_ND = torch.empty_like(h_ND) if needs_h else None
        n_chunks = -(-len(h_ND) // chunk_tokens)
        head_sum = _GradientSum(head_VD, n_chunks) if needs_head else None
        buffers = _ChunkBuffers(min(chunk_tokens, len(h_ND)), head)
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        plain = torch.zeros_like(total)

        for start in range(0, len(h_ND), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            h_CD = h_ND[chunk].to(dtype)
            target_C = target_N[chunk]
            nats_C = buffers.token_loss(h_CD, target_C)
            plain += nats_C.sum()
            if smoothing:
                even_C = buffers.even_loss(nats_C, target_C)
                nats_C = (1 - smoothing) * nats_C + smoothing * even_C
            total += nats_C.sum()
            if grad_ND is None and head_sum is None:
                continue
            grad_logits_CV = buffers.grad_logits(target_C, smoothing)
            if grad_ND is not None:
                grad_ND[chunk] = head.grad_h(grad_logits_CV)
            if head_sum is not None:
                head_sum.add(grad_logits_CV.T, h_CD)

        grad_VD = head_sum.total() if head_sum is not None else None
        ctx.save_for_backward(grad_ND, grad_VD)
        # not among the saved tensors, as backward adds to its .grad and has to find the leaf itself
        ctx.head_VD = head_VD
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    def backward(
        ctx: _LossContext, upstream: Tensor, _of_plain: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_ND: Tensor | None
        grad_VD: Tensor | None
        grad_ND, grad_VD = ctx.saved_tensors
        if grad_ND is not None:
            grad_ND = grad_ND * upstream.to(grad_ND.dtype)
        if grad_VD is not None:
            grad_VD = _add_to_leaf(ctx.head_VD, grad_VD, upstream)
        return grad_ND, grad_VD, None, None, None, None


class _Head:
    """The head in its products' dtype; a large one that is stored in another is never cast as a
    whole, but piece by piece of the vocabulary."""

    def __init__(self, head_VD: Tensor, dtype: torch.dtype):
        self.vocab_size, width = head_VD.shape
        self.dtype = dtype
        self.whole = head_VD.dtype == dtype or head_VD.numel() <= WHOLE_NUMBERS
        self.stored_VD = head_VD.to(dtype) if self.whole else head_VD
        self.piece_rows = max(1, PIECE_NUMBERS // width)

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each piece's entries and its weights, cast."""
        for start in range(0, self.vocab_size, self.piece_rows):
            entries = slice(start, start + self.piece_rows)
            yield entries, self.stored_VD[entries].to(self.dtype)

    def logits(self, h_CD: Tensor, out_CV: Tensor) -> None:
        """Leave the logits of a chunk in out_CV."""
        if self.whole:
            torch.mm(h_CD, self.stored_VD.T, out=out_CV)
            return
        for entries, piece_PD in self._pieces():
            out_CV[:, entries] = h_CD @ piece_PD.T

    def grad_h(self, grad_logits_CV: Tensor) -> Tensor:
        """Return d loss / d h_CD from that of the logits."""
        if self.whole:
            return grad_logits_CV @ self.stored_VD
        size = len(grad_logits_CV), self.stored_VD.shape[1]
        # The pieces' products are of the whole sum that one product would make
        sum_dtype = torch.promote_types(self.dtype, torch.float32)
        sum_CD = grad_logits_CV.new_zeros(size, dtype=sum_dtype)
        for entries, piece_PD in self._pieces():
            sum_CD += grad_logits_CV[:, entries] @ piece_PD
        return sum_CD


class _ChunkBuffers:
    """Two buffers that every chunk uses again: a chunk's logits and its softmax."""

    def __init__(self, chunk_tokens: int, head: _Head):
        size = (chunk_tokens, head.vocab_size)
        softmax_dtype = torch.promote_types(head.dtype, torch.float32)
        self.head = head
        self.logits_CV = head.stored_VD.new_empty(size, dtype=head.dtype)
        self.softmax_CV = head.stored_VD.new_empty(size, dtype=softmax_dtype)

    def token_loss(self, h_CD: Tensor, target_C: Tensor) -> Tensor:
        """Return nats_C of a chunk and leave its softmax in the buffer."""
        # the last chunk may have fewer tokens than the buffers have rows
        logits_CV = self.logits_CV[: len(h_CD)]
        softmax_CV = self.softmax_CV[: len(h_CD)]
        self.head.logits(h_CD, logits_CV)
        dtype = softmax_CV.dtype
        target_logit_C1 = logits_CV.gather(1, target_C[:, None])
        target_logit_C = target_logit_C1.squeeze(1).to(dtype)
        top_logit_C = logits_CV.amax(-1).to(dtype)
        if logits_CV.is_cpu and logits_CV.dtype != dtype:
            # There torch casts all of its input before it begins: into the buffer it takes nothing
            torch.softmax(softmax_CV.copy_(logits_CV), -1, out=softmax_CV)
        else:
            torch.softmax(logits_CV, -1, dtype=dtype, out=softmax_CV)
        # logsumexp from the largest logit and its probability, which is at least 1/V and so never
        # underflows, as the target's own probability may
        top_probability_C = softmax_CV.amax(-1)
        return top_logit_C - top_probability_C.log() - target_logit_C

    def even_loss(self, nats_C: Tensor, target_C: Tensor) -> Tensor:
        """Return the nats of a target spread evenly over all entries, from those of target_C in
        the chunk just seen."""
        logits_CV = self.logits_CV[: len(target_C)]
        dtype = nats_C.dtype
        target_logit_C1 = logits_CV.gather(1, target_C[:, None])
        mean_logit_C = logits_CV.mean(-1, dtype=dtype)
        return nats_C + target_logit_C1.squeeze(1).to(dtype) - mean_logit_C

    def grad_logits(self, target_C: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return d nats / d logits_CV of the chunk just seen, in the products' dtype."""
        softmax_CV = self.softmax_CV[: len(target_C)]
        at_target_C1 = softmax_CV.new_full((len(target_C), 1), smoothing - 1.0)
        softmax_CV.scatter_add_(1, target_C[:, None], at_target_C1)
        if smoothing:
            softmax_CV -= smoothing / softmax_CV.shape[1]
        # the logits have done their work: their buffer takes the gradient
        return self.logits_CV[: len(target_C)].copy_(softmax_CV)


def _add_to_leaf(head_VD: Tensor, grad_VD: Tensor, upstream: Tensor) -> Tensor | None:
    """Return the head's gradient, or add it to the sum that is there already and return None."""
    if head_VD.is_leaf and head_VD.grad is not None:
        # autograd would add the scaled gradient itself, which is one more table of the vocabulary
        if upstream.device.type == "cuda" and head_VD.grad.dtype == upstream.dtype:
            # As a number the factor would have the layers' backward pass wait for the forward's end
            head_VD.grad.addcmul_(grad_VD, upstream)
        else:
            head_VD.grad.add_(grad_VD, alpha=upstream.item())
        return None
    return grad_VD * upstream.to(grad_VD.dtype)


class _GradientSum:
    """The head's gradient in the head's dtype; a long sum in bf16 goes over to fp32 every
    MAX_BF16_SUMS products."""

    def __init__(self, head_VD: Tensor, products: int):
        self.sum_VD = torch.zeros_like(head_VD)
        self.count = 0
        self.fp32_sum_VD = None
        if products > MAX_BF16_SUMS and head_VD.dtype.itemsize < 4:
            self.fp32_sum_VD = torch.zeros_like(head_VD, dtype=torch.float32)

    def add(self, a_VC: Tensor, b_CD: Tensor) -> None:
        """Add a @ b."""
        if self.sum_VD.dtype == b_CD.dtype:
            self.sum_VD.addmm_(a_VC, b_CD)
        else:
            self.sum_VD += a_VC @ b_CD
        self.count += 1
        if self.fp32_sum_VD is not None and self.count % MAX_BF16_SUMS == 0:
            self.fp32_sum_VD += self.sum_VD
            self.sum_VD.zero_()

    def total(self) -> Tensor:
        """Return all that was added."""
        if self.fp32_sum_VD is None:
            return self.sum_VD
        return self.fp32_sum_VD.add_(self.sum_VD)
