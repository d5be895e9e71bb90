"""The chunked loss against torch's own cross-entropy over full logits.

N tokens, D model width, V vocabulary.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F

from pipeline.model import loss
from pipeline.model.chunks import MIN_CHUNK_TOKENS, workspace_bytes
from pipeline.model.loss import (
    chunked_token_loss,
    cross_entropy,
    smoothed_cross_entropy,
)
from tests.held import held_bytes

D, V = 16, 37


def drawn(tokens: int, seed: int = 0):
    """Return h_ND, head_VD that ask for gradients, and target_N."""
    generator = torch.Generator().manual_seed(seed)
    h_ND = torch.randn(tokens, D, generator=generator).requires_grad_()
    head_VD = torch.randn(V, D, generator=generator).requires_grad_()
    return h_ND, head_VD, torch.randint(V, (tokens,), generator=generator)


def full(h_ND, head_VD, target_N):
    """Return the summed nats from full logits."""
    return F.cross_entropy(h_ND @ head_VD.T, target_N, reduction="sum")


@pytest.mark.parametrize(
    ("tokens", "chunk"), [(10, 1024), (10, 3), (10, 1), (12, 4), (1, 7), (50, 49)]
)
def test_value_and_both_gradients_are_those_of_full_logits(tokens, chunk):
    h_ND, head_VD, target_N = drawn(tokens)
    ours = cross_entropy(h_ND, head_VD, target_N, chunk_tokens=chunk) / tokens
    reference = full(h_ND, head_VD, target_N) / tokens
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(3 * ours, (h_ND, head_VD))  # an upstream factor other than 1
    wanted = torch.autograd.grad(3 * reference, (h_ND, head_VD))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_agree_with_finite_differences_in_double():
    h_ND, head_VD, target_N = drawn(5)
    inputs = [t.detach().double().requires_grad_() for t in (h_ND, head_VD)]
    # the sum itself is kept in fp32, so only a coarse step is above its rounding
    assert torch.autograd.gradcheck(
        lambda h, w: cross_entropy(h, w, target_N, torch.float64, 2),
        inputs,
        eps=1e-2,
        atol=2e-2,
        rtol=1e-2,
    )


def test_bf16_products_stay_within_bf16_of_the_exact_loss():
    h_ND, head_VD, target_N = drawn(300)
    exact, rounded = (
        full(h_ND, head_VD, target_N),
        cross_entropy(h_ND, head_VD, target_N, torch.bfloat16, 64),
    )
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact) / exact < 2e-3
    got, wanted = (torch.autograd.grad(loss, (h_ND, head_VD)) for loss in (rounded, exact))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 2e-2


@pytest.mark.parametrize("trained", ["hidden", "head", "neither"])
def test_only_what_asks_for_a_gradient_gets_one(trained):
    h_ND, head_VD, target_N = drawn(6)
    h_ND.requires_grad_(trained == "hidden")
    head_VD.requires_grad_(trained == "head")
    loss = cross_entropy(h_ND, head_VD, target_N, chunk_tokens=4)
    assert loss.requires_grad == (trained != "neither")
    if trained != "neither":
        loss.backward()
    assert (h_ND.grad is not None) == (trained == "hidden")
    assert (head_VD.grad is not None) == (trained == "head")


def test_a_tied_head_adds_its_gradient_to_the_embeddings():
    _, table_VD, target_N = drawn(9)
    ids_N = torch.randint(V, (9,))
    got, wanted = (
        torch.autograd.grad(
            loss(F.embedding(ids_N, table_VD).tanh(), table_VD, target_N), table_VD
        )[0]
        for loss in (cross_entropy, full)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    h_ND, head_VD, target_N = drawn(8)
    ours = cross_entropy(h_ND * 1e3, head_VD, target_N, chunk_tokens=3)
    torch.testing.assert_close(ours, full(h_ND * 1e3, head_VD, target_N))
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours, (h_ND, head_VD)))


@pytest.mark.parametrize("tokens", [1, 7, MIN_CHUNK_TOKENS + 5])
def test_token_nats_are_each_tokens_loss(tokens):
    h_ND, head_VD, target_N = drawn(tokens)
    found = chunked_token_loss(h_ND, head_VD, target_N)
    torch.testing.assert_close(found, F.cross_entropy(h_ND @ head_VD.T, target_N, reduction="none"))
    assert not found.requires_grad
    torch.testing.assert_close(found.sum(), cross_entropy(h_ND, head_VD, target_N, chunk_tokens=5))


def test_a_chunk_of_bf16_takes_its_two_buffers_and_leaves_nothing_to_the_next(monkeypatch):
    """torch's softmax casts bf16 as a whole before it begins, which was a third block; losses that
    were kept broke up the heap, and each chunk took new memory."""
    h_ND, head_VD, target_N = (each.detach() for each in drawn(50))
    head_VD = head_VD.repeat(300, 1).bfloat16()
    kept, alive, real = [], [], loss._ChunkBuffers.token_loss

    def seen(*given):
        alive.append(sum(each() is not None for each in kept))
        found = real(*given)
        kept.append(weakref.ref(found))
        return found

    monkeypatch.setattr(loss._ChunkBuffers, "token_loss", seen)
    nats = []

    def run():
        nats[:] = [chunked_token_loss(h_ND, head_VD, target_N, torch.bfloat16, 10)]

    run()
    exact = F.cross_entropy((h_ND.bfloat16() @ head_VD.T).float(), target_N, reduction="none")
    torch.testing.assert_close(nats[0], exact)
    assert alive == [0] * 5
    assert max(held_bytes(run)) < 1.1 * workspace_bytes(10, len(head_VD), 10 * len(head_VD), 2)


def test_a_long_sum_of_bf16_gradients_does_not_stop_growing():
    h_ND, head_VD, _ = drawn(3000)
    h_ND, head_VD = (h_ND.detach() + 1).bfloat16(), head_VD.detach().bfloat16()
    target_N = torch.randint(3, (3000,), generator=torch.Generator().manual_seed(1))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        head = head_VD.to(dtype).requires_grad_()
        loss = cross_entropy(h_ND, head, target_N, torch.bfloat16, 1)
        found.append(torch.autograd.grad(loss, head)[0].double())
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


@pytest.mark.parametrize("piece", [3, 8, V])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_a_stored_head_of_another_dtype_is_cast_in_pieces(monkeypatch, stored, piece):
    monkeypatch.setattr(loss, "WHOLE_NUMBERS", 0)
    monkeypatch.setattr(loss, "PIECE_NUMBERS", piece * D)
    h_ND, head_VD, target_N = drawn(20)
    stored_VD = head_VD.detach().to(stored)
    cast = []
    to = torch.Tensor.to

    def spied(tensor, *args, **kwargs):
        cast.append(tensor.numel() if tensor.dtype == stored else 0)
        return to(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", spied)
        ours = cross_entropy(h_ND, stored_VD, target_N, chunk_tokens=7)
        nats_N = chunked_token_loss(h_ND, stored_VD, target_N, chunk_tokens=7)
        logits_NV = loss.logits(h_ND, stored_VD)
    assert max(cast) == piece * D
    torch.testing.assert_close(logits_NV, h_ND @ stored_VD.float().T, rtol=1e-5, atol=1e-5)
    reference = full(h_ND, stored_VD.float(), target_N)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nats_N.sum(), reference, rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad(ours, h_ND)
    (wanted,) = torch.autograd.grad(reference, h_ND)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_smoothed_targets_are_torchs_own(smoothing, chunk):
    h_ND, head_VD, target_N = drawn(11)
    ours, plain = smoothed_cross_entropy(h_ND, head_VD, target_N, smoothing, chunk_tokens=chunk)
    logits_NV = h_ND @ head_VD.T
    reference = F.cross_entropy(logits_NV, target_N, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(plain, full(h_ND, head_VD, target_N).detach())
    assert not plain.requires_grad
    got = torch.autograd.grad(2 * ours, (h_ND, head_VD))
    wanted = torch.autograd.grad(2 * reference, (h_ND, head_VD))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
