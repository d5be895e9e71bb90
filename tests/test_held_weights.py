"""Weights that are cast once when a bundle is opened for serving."""

import pytest
import torch
from torch import nn

from pipeline.model.kernels.frozen import FrozenLinear
from pipeline.serve import held_weights
from pipeline.serve.held_weights import cast_weights


@pytest.fixture
def tied():
    """A network whose head is its embedding, stored in bf16, and tokens for it."""
    torch.manual_seed(0)
    embedding = nn.Embedding(19, 8, dtype=torch.bfloat16)
    middle = FrozenLinear(8, 8, dtype=torch.bfloat16)
    head = FrozenLinear(8, 19, bias=False, dtype=torch.bfloat16)
    head.weight = embedding.weight
    norm = nn.LayerNorm(8, dtype=torch.bfloat16)
    network = nn.ModuleDict({"in": embedding, "norm": norm, "middle": middle, "head": head})
    return network.requires_grad_(False)


def logits(network) -> torch.Tensor:
    x_ND = network["in"](torch.arange(19)).float()
    return network["head"](network["middle"](x_ND))


def test_products_are_those_of_the_stored_weights_to_the_last_bit(tied):
    before = logits(tied)
    assert cast_weights(tied)
    assert torch.equal(logits(tied), before)
    assert tied["middle"].weight.dtype == torch.float32
    assert tied["head"].weight is tied["in"].weight
    # what is in no product stays as it is
    assert tied["norm"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("free_numbers", "fits"), [(2 * (64 + 8 + 152), True), (446, False)])
def test_they_stay_as_stored_where_memory_has_no_room(tied, monkeypatch, free_numbers, fits):
    monkeypatch.setattr(held_weights, "free_bytes", lambda: 4 * free_numbers)
    before = logits(tied)
    assert cast_weights(tied) is fits
    assert (tied["middle"].weight.dtype == torch.float32) is fits
    assert torch.equal(logits(tied), before)


def test_a_narrower_dtype_wants_room_too(tied, monkeypatch):
    """What is stored is mapped from a file, and gives nothing back."""
    tied.float()
    monkeypatch.setattr(held_weights, "free_bytes", lambda: 2 * 2 * (64 + 8 + 152) - 1)
    assert not cast_weights(tied, dtype=torch.bfloat16)
    assert tied["middle"].weight.dtype == torch.float32
    monkeypatch.undo()
    assert cast_weights(tied, dtype=torch.bfloat16)
    assert tied["middle"].weight.dtype == torch.bfloat16


def test_weights_that_have_the_dtype_are_not_copied(tied):
    tied.float()
    kept = tied["middle"].weight.data_ptr()
    assert cast_weights(tied)
    assert tied["middle"].weight.data_ptr() == kept
