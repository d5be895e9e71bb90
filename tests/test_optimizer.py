"""AdamW over masters against torch's own, and the two halves of a master: no bit is lost on the
way.

P elements.
"""

import math
import sys

import pytest
import torch
from torch import nn

from pipeline.config.fit import FitConfig
from pipeline.errors import ConfigError
from pipeline.train import optimizer as optimizers
from pipeline.train import optimizer_state
from pipeline.train.memory_plan import MOST_BETA2
from pipeline.train.optimizer import AdamW, gradients_in, merge

OPTIONS = FitConfig(steps=1, lr=3e-3, weight_decay=0.3, beta2=0.9)
SIZES = {"matrix": (37, 53), "vector": (61,), "cube": (5, 7, 11)}


def drawn(dtype=torch.float32, seed=0) -> dict[str, nn.Parameter]:
    """Return parameters of several shapes; the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SIZES.items()
    }


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Return the gradients of a step, small ones and large ones."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        n: torch.randn(s, generator=generator) * 10.0 ** (step % 5 - 3) for n, s in SIZES.items()
    }


def moved(ours: AdamW, steps: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Return the masters after that many steps with the gradients above."""
    for step in range(steps):
        for name, gradient in gradients(step).items():
            parameter = ours.parameters[name]
            parameter.grad = gradient.to(parameter.dtype)
        ours.lr = OPTIONS.lr * (1 + step)
        ours.step(scale)
    ours.restore_fp32()
    return {n: p.detach() for n, p in ours.parameters.items()}


def theirs(steps: int, scale: float = 1.0, **options) -> dict[str, torch.Tensor]:
    """Return the parameters after that many steps of torch's own optimizer, with decay for matrices
    only."""
    parameters = drawn()
    groups = [
        {
            "params": [p for p in parameters.values() if p.ndim >= 2],
            "weight_decay": OPTIONS.weight_decay,
        },
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, OPTIONS.beta2), eps=1e-8, **options)
    for step in range(steps):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient * scale
        for group in adamw.param_groups:
            group["lr"] = OPTIONS.lr * (1 + step)
        adamw.step()
    return {n: p.detach() for n, p in parameters.items()}


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("piece", [2**18, 512])
def test_fp32_is_torchs_fused_adamw_bit_for_bit(monkeypatch, scale, piece):
    monkeypatch.setattr(optimizers, "PIECE", piece)
    ours, wanted = moved(AdamW(drawn(), OPTIONS), 12, scale), theirs(12, scale, fused=True)
    for name in SIZES:
        assert torch.equal(ours[name], wanted[name]), name
        assert not torch.equal(ours[name], drawn()[name])


def test_fp32_is_torchs_plain_adamw_within_rounding():
    wanted = theirs(12, foreach=False)
    for name, value in moved(AdamW(drawn(), OPTIONS), 12).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def patterns() -> torch.Tensor:
    """Return fp32 numbers of every kind, every exponent, both signs: x_P."""
    bits_P = torch.randint(
        -(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)
    ).to(torch.int32)
    high_P = torch.arange(2**16, dtype=torch.int32) << 16
    edges_P = torch.cat([high_P + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x_P = torch.cat([bits_P, edges_P]).view(torch.float32)
    named = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.17549435e-38, 3.4028235e38, -3.4028235e38, math.inf]
    )
    return torch.cat([x_P[x_P.isfinite()], named])


def test_two_halves_are_the_number_bit_for_bit():
    x_P = patterns()
    parameter = nn.Parameter(x_P.clone())
    ours = AdamW({"x": parameter}, OPTIONS, ["x"])
    assert parameter.dtype == torch.bfloat16 and ours.residual_bits["x"].dtype == torch.int16
    assert torch.equal(
        merge(parameter.data, ours.residual_bits["x"]).view(torch.int32), x_P.view(torch.int32)
    )
    ours.restore_fp32()
    assert parameter.dtype == torch.float32
    assert torch.equal(parameter.data.view(torch.int32), x_P.view(torch.int32))


def test_the_high_half_is_the_nearest_bf16():
    x_P = patterns()
    x_P = x_P[x_P.abs() < 3e38]
    parameter = nn.Parameter(x_P.clone())
    AdamW({"x": parameter}, OPTIONS, ["x"])
    ours_P, torchs_P = parameter.detach().double(), x_P.bfloat16().double()
    assert torch.equal(
        (ours_P - x_P.double()).abs(), (torchs_P - x_P.double()).abs()
    )  # ties go another way
    assert (ours_P != torchs_P).any() and (ours_P == torchs_P).float().mean() > 0.8


def test_bf16_params_follow_the_fp32_run_and_are_finer_than_bf16(monkeypatch):
    monkeypatch.setattr(optimizers, "PIECE", 100)  # pieces in the middle of rows
    plain = moved(AdamW(drawn(), OPTIONS), 12)
    bf16_params = moved(AdamW(drawn(), OPTIONS, SIZES), 12)
    for name, value in bf16_params.items():
        # the one difference is the gradient's rounding to bf16: 2**-9 of each step
        torch.testing.assert_close(value, plain[name], rtol=0, atol=12 * 12 * OPTIONS.lr * 2**-8)
        assert (value - value.bfloat16().float()).abs().max() > 0
    steps = [(bf16_params[n] - drawn()[n]).norm() for n in SIZES]
    apart = [(bf16_params[n] - plain[n]).norm() for n in SIZES]
    assert max(a / s for a, s in zip(apart, steps, strict=True)) < 0.01


def test_a_bf16_parameter_with_fp32_gradients_is_the_fp32_run_bit_for_bit():
    plain, ours = moved(AdamW(drawn(), OPTIONS), 8), AdamW(drawn(), OPTIONS, ["matrix", "vector"])
    with gradients_in(ours.parameters.values(), torch.float32, fused=False):
        for step in range(8):
            for name, gradient in gradients(step).items():
                ours.parameters[name].grad.copy_(gradient)
            ours.lr = OPTIONS.lr * (1 + step)
            ours.step()
    ours.restore_fp32()
    assert all(torch.equal(p.detach(), plain[n]) for n, p in ours.parameters.items())


def test_steps_smaller_than_bf16_are_not_lost():
    parameter = nn.Parameter(torch.ones(64))
    ours = AdamW({"x": parameter}, changed(lr=1e-5), ["x"])
    for _ in range(1000):
        parameter.grad = torch.ones_like(parameter)
        ours.step()
    assert parameter.dtype == torch.bfloat16 and parameter[0].item() == pytest.approx(
        0.99, abs=0.005
    )
    ours.restore_fp32()
    assert parameter[0].item() == pytest.approx(0.99, abs=1e-4)  # bf16 alone would still be at 1


def changed(**changes) -> FitConfig:
    """Return the options with some changed."""
    return OPTIONS.model_copy(update=changes)


def test_moments_in_bf16_are_kept_so_and_follow_the_fp32_run():
    plain, ours = moved(AdamW(drawn(), OPTIONS), 12), AdamW(drawn(), OPTIONS, moments="bf16")
    assert {t.dtype for t in ours.tensors().values()} == {torch.bfloat16}
    assert ours.tensors().keys() == {
        f"{kind}/{n}" for kind in ("exp_avg", "exp_avg_sq") for n in SIZES
    }
    rounded = moved(ours, 12)
    for name in SIZES:
        apart, step = (rounded[name] - plain[name]).norm(), (plain[name] - drawn()[name]).norm()
        assert 0 < apart < 0.02 * step


def test_moments_in_8_bits_follow_the_fp32_run():
    pytest.importorskip("bitsandbytes")
    plain, ours = moved(AdamW(drawn(), OPTIONS), 12), AdamW(drawn(), OPTIONS, moments="int8")
    kept = ours.tensors()
    assert {k: t.dtype for k, t in kept.items() if "_scale" not in k} == {
        f"{kind}/{n}": torch.uint8 for kind in ("exp_avg", "exp_avg_sq") for n in SIZES
    }
    assert (
        sum(t.nbytes for t in kept.values())
        < 2.2 * sum(p.numel() for p in ours.parameters.values()) + 100
    )
    rounded = moved(ours, 12)
    for name in SIZES:
        apart, step = (rounded[name] - plain[name]).norm(), (plain[name] - drawn()[name]).norm()
        assert 0 < apart < 0.1 * step, name


def test_8_bits_without_their_library_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    optimizer_state._library.cache_clear()
    with pytest.raises(
        ConfigError, match="moments: int8 needs bitsandbytes.*pip install bitsandbytes"
    ):
        AdamW(drawn(), OPTIONS, moments="int8")


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_8_bit_moments_of_any_size_in_any_pieces_are_the_same(monkeypatch, size):
    pytest.importorskip("bitsandbytes")
    value_P = torch.randn(size, generator=torch.Generator().manual_seed(0))
    whole, pieces = (optimizer_state.new_moment("int8", value_P, True) for _ in range(2))
    whole.write(slice(0, size), value_P)
    for at in range(0, size, 512):
        piece = slice(at, min(at + 512, size))
        pieces.write(piece, value_P[piece])
    assert all(torch.equal(t, pieces.tensors()[key]) for key, t in whole.tensors().items())
    found_P = torch.cat([pieces.read(slice(at, min(at + 512, size))) for at in range(0, size, 512)])
    assert found_P.dtype == torch.float32 and torch.equal(found_P, whole.read(slice(0, size)))
    assert (found_P - value_P).norm() < 0.05 * value_P.norm()


def test_moments_are_those_of_torch():
    ours = AdamW(drawn(), OPTIONS)
    parameters = drawn()
    adamw = torch.optim.AdamW(
        parameters.values(), lr=OPTIONS.lr, betas=(0.9, OPTIONS.beta2), fused=True
    )
    for step in range(3):
        for name, gradient in gradients(step).items():
            parameters[name].grad, ours.parameters[name].grad = gradient, gradient.clone()
        adamw.step()
        ours.step()
    for name, parameter in parameters.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(
                ours.tensors()[f"{kind}/{name}"], adamw.state[parameter][kind].flatten()
            )


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_what_was_kept_is_taken_up_again_bit_for_bit(kind):
    if kind == "int8":
        pytest.importorskip("bitsandbytes")

    def some(ours, steps):
        for step in steps:
            for name, gradient in gradients(step).items():
                ours.parameters[name].grad = gradient.to(ours.parameters[name].dtype)
            ours.step()

    whole = AdamW(drawn(), OPTIONS, ["matrix"], kind)
    some(whole, range(3))
    kept = {"residual": {n: t.clone() for n, t in whole.residual_bits.items()}}
    for key, tensor in whole.tensors().items():
        group, _, name = key.partition("/")
        kept.setdefault(group, {})[name] = tensor.clone()
    again = AdamW(drawn(seed=1), OPTIONS, ["matrix"], kind)
    with torch.no_grad():
        for name, parameter in again.parameters.items():
            parameter.copy_(whole.parameters[name])
    again.load(kept, whole.steps)
    for ours in (whole, again):
        some(ours, range(3, 6))
        ours.restore_fp32()
    assert all(torch.equal(p, again.parameters[n]) for n, p in whole.parameters.items())


def test_a_checksum_sees_low_bits():
    ours = AdamW(drawn(), OPTIONS, ["matrix"])
    before = {n: ours.checksum(n) for n in SIZES}
    assert before == {n: ours.checksum(n) for n in SIZES}
    ours.residual_bits["matrix"][3, 3] ^= 1
    with torch.no_grad():
        ours.parameters["vector"][3] += 1e-6
    assert [ours.checksum(n) == before[n] for n in ("matrix", "vector", "cube")] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
def test_the_checksum_of_a_gpu_sees_low_bits(dtype):
    tensor = (100 * torch.randn(7, 5)).to(dtype)
    changed = tensor.clone()
    changed.view(torch.int32 if dtype is torch.float32 else torch.int16)[3, 3] ^= 1
    before = optimizers.sum_of_bits(tensor)
    assert 0 <= before < 2**32 and before == optimizers.sum_of_bits(tensor.clone())
    assert abs(optimizers.sum_of_bits(changed) - before) in (1, 2**32 - 1)


def test_a_gpu_moves_whole_matrices_where_a_processor_takes_pieces():
    size = 5000 * 3000
    assert [*optimizers._pieces(torch.empty(size, device="meta"))] == [slice(0, size)]
    assert len([*optimizers._pieces(torch.empty(size))]) == 58


def test_the_norm_is_that_of_all_gradients():
    ours = AdamW(drawn(), OPTIONS)
    assert ours.norm() == 0.0
    for name, gradient in gradients(4).items():
        ours.parameters[name].grad = gradient
    everything = torch.cat([g.flatten() for g in gradients(4).values()])
    assert ours.norm() == pytest.approx(everything.norm().item(), rel=1e-6)
    assert ours.norm(["vector"]) == pytest.approx(gradients(4)["vector"].norm().item(), rel=1e-6)


def test_gradient_buffers_are_of_the_dtype_stay_in_place_and_go():
    parameters = drawn(torch.bfloat16)
    matrix = parameters["matrix"]
    with gradients_in(parameters.values(), torch.float32, fused=False):
        where = matrix.grad.data_ptr()
        for _ in range(2):
            (matrix.float().square().sum() / 2).backward()
        assert matrix.grad.dtype == torch.float32 and matrix.grad.data_ptr() == where
        torch.testing.assert_close(matrix.grad, 2 * matrix.detach().float(), rtol=2**-7, atol=0)
    assert all(p.grad is None for p in parameters.values())
    with gradients_in(parameters.values(), torch.bfloat16, fused=True):
        assert all(p.grad is None for p in parameters.values())
    matrix.sum().backward()
    assert matrix.grad.dtype == torch.bfloat16


def second_moment(kind: str, beta2: float) -> float:
    """Return the mean of Adam's second moment after gradients of size 1 and then many of size
    0.1."""
    ours = AdamW({"x": nn.Parameter(torch.zeros(2000))}, changed(beta2=beta2), moments=kind)
    generator = torch.Generator().manual_seed(0)
    for step in range(1500):
        ours.parameters["x"].grad = torch.randn(2000, generator=generator) * (
            1.0 if step < 300 else 0.1
        )
        ours.step()
    return ours.state["x"]["exp_avg_sq"].read(slice(0, 2000)).mean().item()


@pytest.mark.parametrize(("beta2", "follows"), [(MOST_BETA2, True), (0.999, False)])
def test_up_to_the_allowed_beta2_moments_in_bf16_forget_as_those_in_fp32_do(beta2, follows):
    exact = second_moment("fp32", beta2)
    assert (second_moment("bf16", beta2) == pytest.approx(exact, rel=0.02)) == follows


@pytest.mark.parametrize("after", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("before", ["fp32", "bf16", "int8"])
def test_moments_of_one_kind_are_taken_up_in_another(monkeypatch, before, after):
    if "int8" in (before, after):
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(optimizers, "PIECE", 512)
    first, again = AdamW(drawn(), OPTIONS, moments=before), AdamW(drawn(), OPTIONS, moments=after)
    for step in range(3):
        for name, gradient in gradients(step).items():
            first.parameters[name].grad = gradient
        first.step()
    kept = {}
    for key, tensor in first.tensors().items():
        kind, _, name = key.partition("/")
        kept.setdefault(kind, {})[name] = tensor
    again.load(kept, first.steps)
    for name, moments_of in first.state.items():
        for kind, moment in moments_of.items():
            whole = slice(0, moment.kept.numel())
            value_P, taken_P = moment.read(whole), again.state[name][kind].read(whole)
            assert (taken_P - value_P).norm() <= 0.06 * value_P.norm() and value_P.any()
            assert before != after or torch.equal(taken_P, value_P)
