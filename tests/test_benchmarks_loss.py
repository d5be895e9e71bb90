"""The benchmark of the loss at a toy size: all contenders compute the same, and the table says how
fast."""

import pytest
import torch

from benchmarks import loss_peers
from benchmarks.loss_peers import CONTENDERS, HEADS, Case, inputs, run_pass


@pytest.mark.parametrize("head", HEADS)
def test_all_contenders_give_the_same_loss_and_gradients(head):
    case = Case(300, 16, "fp32", head, tokens=96)
    found = {}
    for name in CONTENDERS:
        h_ND, head_VD, target_N = inputs(case)
        nats = run_pass(name, case, (h_ND, head_VD, target_N))
        found[name] = (nats, h_ND.grad, head_VD.grad)
    wanted = found.pop(loss_peers.PLAIN)
    assert (wanted[2] is None) == (head == "frozen")
    for each in found.values():
        for one, other in zip(each, wanted, strict=True):
            assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_table_has_a_row_for_each_contender(monkeypatch):
    monkeypatch.setattr(loss_peers, "_peak_mb", lambda _case, _name: 7.0)
    case = Case(300, 16, "fp32", "trained", tokens=96)
    text = loss_peers.section(case, loss_peers.measured(case, 2))
    assert "96 tokens, 2 rounds." in text
    assert all(f"| {name} | " in text for name in CONTENDERS)
