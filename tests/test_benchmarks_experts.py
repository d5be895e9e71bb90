"""The benchmark of the experts' forward pass at a toy size: all ways compute the same, and the
table says how fast.

N tokens, D model width, E experts, K experts per token.
"""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks import experts_forward
from benchmarks.experts_forward import (
    DENSE,
    OURS,
    PEERS,
    Case,
    choices,
    contenders,
    drawn,
    looped,
    stacked,
)
from pipeline.model.experts import mix

TOY = Case(16, 24, tokens=96, dtype="fp32")


@pytest.mark.parametrize("implementation", PEERS.values())
@pytest.mark.parametrize("load", experts_forward.LOADS)
def test_ours_is_transformers_block_with_the_same_weights_and_a_plain_loop(implementation, load):
    torch.manual_seed(0)
    experts = drawn(TOY)
    config = Qwen3MoeConfig(
        hidden_size=16,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block, x_ND = Qwen3MoeSparseMoeBlock(config), torch.randn(TOY.tokens, TOY.d_model)
    block.experts = stacked(experts, implementation)
    torch.nn.init.normal_(block.gate.weight)
    if load == "skewed":
        x_ND += 3 * block.gate.weight.detach()[5]  # all tokens like the sixth expert
    _, weight_NK, index_NK = block.gate(x_ND)
    assert (index_NK == 5).any(1).float().mean() > (0.95 if load == "skewed" else 0.0)
    wanted_ND = block(x_ND[None])[0]
    torch.testing.assert_close(mix(experts, 0, x_ND, index_NK, weight_NK), wanted_ND)
    torch.testing.assert_close(looped(experts, x_ND, index_NK, weight_NK), wanted_ND)
    assert wanted_ND.abs().max() > 1e-3


def test_choices_are_different_experts_and_as_uneven_as_asked():
    for load, least, most in (("even", 0.11, 0.14), ("skewed", 0.25, 0.40)):
        index_NK = choices(Case(16, 24, load))
        assert index_NK.shape == (4096, 2) and (index_NK[:, 0] != index_NK[:, 1]).all()
        assert least < (index_NK == 0).float().mean() < most
        assert (index_NK == choices(Case(16, 24, load))).all()


def test_the_dense_network_has_the_active_parameters(monkeypatch):
    made = []
    monkeypatch.setattr(
        experts_forward,
        "reinit_like",
        lambda *a, f=experts_forward.reinit_like: made.append(f(*a)) or made[-1],
    )
    contenders(TOY, choices(TOY))
    dense, expert = made[-1], made[0]
    count = [sum(p.numel() for p in each.parameters()) for each in (dense, expert)]
    assert count[0] == 2 * count[1] == TOY.flops / 2 / TOY.tokens


def test_what_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(experts_forward, "mix", lambda *args: 1.001 * mix(*args))
    with pytest.raises(SystemExit, match="even load: ours is 0.001 of the norm away"):
        contenders(TOY, choices(TOY))


def test_short_passes_are_repeated_and_every_round_has_another_order(monkeypatch):
    seen = []

    def seconds(way, calls, _device):
        seen.append((way, calls))
        return 0.02

    monkeypatch.setattr(experts_forward, "_seconds", seconds)
    found = experts_forward.measured(TOY, {"a": "A", "b": "B"}, rounds=2)
    assert seen == [("A", 1), ("B", 1), ("B", 3), ("A", 3), ("A", 3), ("B", 3)]
    assert found == [{"a": 0.02, "b": 0.02}] * 2


@pytest.mark.parametrize(("times", "status"), [(1.2, 0), (1.3, 1)])
def test_a_result_is_dated_and_a_missed_target_fails(times, status, monkeypatch, tmp_path, capsys):
    measured = experts_forward.measured  # for real, but for what the clock says

    def timed(case, ways, rounds):
        assert set(measured(case, ways, 1)[0]) == {DENSE, OURS, *PEERS}
        return [
            {name: 0.1 * (times if name == OURS else 1) for name in ways} for _ in range(rounds)
        ]

    monkeypatch.setattr(experts_forward, "measured", timed)
    out = tmp_path / "out.md"
    command = [
        "--shapes",
        "16x24",
        "--tokens",
        "64",
        "--devices",
        "cpu",
        "--rounds",
        "2",
        "--ranks",
        "--out",
        str(out),
    ]
    assert experts_forward.main(command) == status
    written = out.read_text()
    assert (
        capsys.readouterr().out.strip() in written
        and "torch 2" in written
        and str(tmp_path) not in written
    )
    assert f"| ours, sorted blocks (`experts.mix`) | {100 * times:.2f} (" in written
    verdict = (
        f"- CPU, D 16, F 24, skewed load: ours takes {times:.2f} ({times:.2f}-{times:.2f}) times "
        "the dense"
    )
    assert verdict in written and written.count("missed" if status else "reached") == 2


def test_deltas_are_compared_with_their_base_and_the_merged_experts(monkeypatch, capsys):
    made = {}

    def timed(case, ways, rounds):
        made[case.rank, case.dtype] = {name: way() for name, way in ways.items()}
        seconds = {experts_forward.DENSE: 0.1, OURS: 0.12, experts_forward.MERGED: 0.25}
        if not case.rank:
            seconds = dict.fromkeys(ways, 0.1)
        return [seconds] * rounds

    monkeypatch.setattr(experts_forward, "measured", timed)
    small = ["--shapes", "16x24", "--low-rank-shape", "16x24", "--layers", "2", "--tokens", "64"]
    assert experts_forward.main([*small, "--devices", "cpu", "--rounds", "2", "--ranks", "2"]) == 0
    written = capsys.readouterr().out
    for dtype in ("fp32", "bf16"):
        title = f"CPU, D 16, F 24, 2 layers, rank 2, {dtype}"
        # 2 * 2 * (16 + 24) of 16 * 24
        ends = "deltas take 1.20 (1.20-1.20) times the base's time; by operations 1.417"
        assert f"- {title}: {ends}" in written
    found = made[2, "fp32"]
    torch.testing.assert_close(found[OURS], found[experts_forward.MERGED], rtol=0, atol=1e-5)
    assert (found[OURS] - found[DENSE]).abs().max() > 1e-3
    monkeypatch.setattr(
        experts_forward, "mix_on_base", lambda base, _d, layer, x, *_: base(layer, x)
    )
    case = Case(16, 24, tokens=64, dtype="fp32", rank=2)
    with pytest.raises(SystemExit, match="rank 2, fp32: deltas are .* away from the merged"):
        experts_forward.delta_contenders(case, choices(case))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--shapes", "16by24"], "two numbers, as 512x1368, not 16by24"),
        (["--top-k", "9"], "--top-k from 1 to --experts"),
        (["--rounds", "0"], "must be at least 1"),
        (["--ranks", "0"], "must be at least 1"),
        (["--low-rank-shape", "9"], "two numbers, as 512x1368, not 9"),
    ],
)
def test_options_that_make_no_sense_are_refused(command, words, capsys):
    with pytest.raises(SystemExit):
        experts_forward.main(command)
    assert words in capsys.readouterr().err
