"""The memory plan of a training: which is chosen under a budget, and that none changes what is
computed."""

import re
from dataclasses import replace

import pytest
import torch
from fakes import equal, small_task, train_io, values
from pydantic import ValidationError

from pipeline.config.fit import FitConfig
from pipeline.config.run import RuntimeConfig
from pipeline.errors import BudgetError, ConfigError
from pipeline.families.ffn_moe.sections import RouterConfig
from pipeline.train import loop
from pipeline.train.loop import fit
from pipeline.train.memory_plan import (
    FAST_TOKENS,
    LOW_MMAP_THRESHOLD_BYTES,
    MOST_BETA2,
    MemoryPlan,
    plan_memory,
    unbounded,
)

MB = 10**6


@pytest.fixture(autouse=True)
def int8(request, monkeypatch):
    """Whether the library for 8-bit moments is there: no, unless a test asks; what is computed:
    test_optimizer."""
    there = getattr(request, "param", False)
    monkeypatch.setattr("pipeline.train.memory_plan.has_int8", lambda: there)
    return there


def cost(memory_plan: MemoryPlan) -> int:
    """Return a made-up peak to which every part of a plan makes a difference of its own."""
    parts = [
        40 * memory_plan.micro_batch_sequences // (4 if memory_plan.checkpointing else 1),
        *(
            {"fp32": 300, "bf16": 150, "int8": 75}[k]
            for k in (memory_plan.moments, memory_plan.moments, memory_plan.gradients)
        ),
        60 * (not memory_plan.low_mmap_threshold) - 30 * memory_plan.trim_each_pass,
        memory_plan.chunk_logits // 2**16,
    ]
    return sum(parts) * MB


def options(**changes) -> FitConfig:
    """Return settings of a training of 16 sequences."""
    return FitConfig(**{"steps": 1, "batch_sequences": 16} | changes)


def chosen(budget_mb, opts=None, **how) -> MemoryPlan:
    """Return what is chosen under a budget for rows of 128 tokens."""
    return plan_memory(opts or options(), 128, budget_mb and budget_mb * MB, cost, **how)


def test_without_a_budget_the_settings_and_the_fastest_micro_batch_decide():
    assert chosen(None) == MemoryPlan(FAST_TOKENS // 128) == unbounded(options(), 128, True, False)
    assert chosen(None, options(batch_sequences=4)).micro_batch_sequences == 4
    assert plan_memory(options(), 10**6, None, cost).micro_batch_sequences == 1
    assert (
        plan_memory(
            options(batch_sequences=512), 128, None, cost, divisible=False
        ).micro_batch_sequences
        == 512
    )
    given = options(
        micro_batch_sequences=3, moments="bf16", gradients="bf16", checkpointing=True, compile=True
    )
    assert chosen(None, given) == MemoryPlan(3, "bf16", "bf16", True, compile=True)
    assert chosen(None, options(micro_batch_sequences=99)).micro_batch_sequences == 16


def test_what_fits_is_chosen_with_nothing_given_up():
    assert chosen(10_000) == replace(chosen(None), budget_bytes=10_000 * MB)


@pytest.mark.parametrize("int8", [False, True], indirect=True)
def test_each_smaller_budget_gives_up_a_little_more_and_is_kept(int8):
    seen, least = [], min(cost(m) for m in every())
    for budget_mb in range(2000, least // MB - 1, -1):
        memory_plan = chosen(budget_mb)
        assert cost(memory_plan) <= budget_mb * MB == memory_plan.budget_bytes
        plain = replace(memory_plan, budget_bytes=None)
        if not seen or seen[-1] != plain:
            seen.append(plain)
    rank = {memory_plan: number for number, memory_plan in enumerate(every())}
    assert [rank[m] for m in seen] == sorted(
        rank[m] for m in seen
    )  # never back to a faster one that was too large
    assert seen[0] == MemoryPlan(16) and cost(seen[-1]) == least and len(seen) > 8
    assert {m.gradients for m in seen} == {"fp32", "bf16"}
    assert {m.moments for m in seen} == {"fp32", "bf16"} | ({"int8"} if int8 else set())
    assert (
        not seen[1].checkpointing
        and seen[-1].checkpointing
        and seen[-1].low_mmap_threshold
        and seen[-1].micro_batch_sequences == 1
    )
    assert seen[-1].chunk_logits < seen[0].chunk_logits


def every() -> list[MemoryPlan]:
    """Return all that choose tries, from the fastest on."""
    tried = []
    with pytest.raises(BudgetError):
        plan_memory(
            options(),
            128,
            1,
            lambda memory_plan: (
                tried.append(replace(memory_plan, budget_bytes=None)) or cost(memory_plan)
            ),
        )
    return list(dict.fromkeys(tried))


def test_smaller_micro_batches_come_before_rougher_numbers_and_those_before_checkpointing():
    order = every()
    first = {
        key: next(i for i, m in enumerate(order) if test(m))
        for key, test in {
            "one row": lambda m: m.micro_batch_sequences == 1,
            "moments": lambda m: m.moments == "bf16",
            "gradients": lambda m: m.gradients == "bf16",
            "low mmap threshold": lambda m: m.low_mmap_threshold,
            "again": lambda m: m.checkpointing,
        }.items()
    }
    assert sorted(first, key=first.get) == [
        "one row",
        "moments",
        "gradients",
        "low mmap threshold",
        "again",
    ]


def test_settings_that_were_given_stay():
    given = options(micro_batch_sequences=4, moments="fp32", gradients="fp32", checkpointing=False)
    with pytest.raises(BudgetError) as error:
        chosen(700, given)
    assert "4 sequences at a time" in str(error.value) and "bf16" not in str(error.value)
    kept = chosen(smallest(error), given)
    assert kept == MemoryPlan(
        4, mmap_threshold_bytes=LOW_MMAP_THRESHOLD_BYTES, budget_bytes=smallest(error) * MB
    )
    assert chosen(10_000, options(moments="bf16", checkpointing=True)).moments == "bf16"
    assert chosen(10_000, options(checkpointing=True)).checkpointing


def smallest(error) -> int:
    """Return the MB that an error names as enough."""
    return int(re.search(r"smallest that works is ([0-9]+)MB", str(error.value))[1])


@pytest.mark.parametrize("odd_bytes", [0, 1, 499_999, 500_000, 500_001, 999_999])
def test_a_budget_that_nothing_fits_names_the_smallest_that_works_and_it_does(odd_bytes):
    def predict(memory_plan):
        return 1200 * MB + cost(memory_plan) + odd_bytes

    with pytest.raises(
        BudgetError, match=r"^train_experts-a does not fit into runtime.memory_budget 100MB: "
    ) as error:
        plan_memory(options(), 128, 100 * MB, predict, name="train_experts-a")
    least = smallest(error)
    memory_plan = plan_memory(
        options(), 128, RuntimeConfig(memory_budget=f"{least}MB").memory_budget, predict
    )
    assert predict(memory_plan) <= least * MB and memory_plan.summary in str(error.value)
    with pytest.raises(BudgetError):
        plan_memory(options(), 128, (least - 1) * MB, predict)


def test_a_batch_that_cannot_be_divided_is_not():
    memory_plan = chosen(1400, divisible=False)
    assert (
        memory_plan.micro_batch_sequences == 16
        and memory_plan.whole_batch
        and memory_plan.moments == "bf16"
    )
    with pytest.raises(BudgetError, match="16 sequences at a time"):
        chosen(300, divisible=False)


def test_a_fused_step_takes_its_batch_whole():
    opts = options(fuse_optimizer=True, clip_norm=0, batch_sequences=64)
    assert unbounded(opts, 128, True, False).micro_batch_sequences == 64
    assert {m.micro_batch_sequences for m in (chosen(None, opts), chosen(3000, opts))} == {64}
    assert chosen(3000, opts).whole_batch and chosen(3000, opts).fuse_optimizer


def test_a_gpu_takes_the_whole_batch_and_a_large_chunk_of_logits():
    here, there = (unbounded(options(), 1024, True, gpu) for gpu in (False, True))
    assert (here.micro_batch_sequences, there.micro_batch_sequences) == (2, 16)
    assert there.chunk_logits == 2**5 * here.chunk_logits == 2**27


def test_without_a_budget_a_gpu_s_own_memory_bounds_what_runs_at_once():
    def on(gpu_mb, opts=None, **how):
        return chosen(None, opts or options(batch_sequences=512), gpu_bytes=gpu_mb * MB, **how)

    whole = on(10**6)
    assert (whole.micro_batch_sequences, whole.checkpointing) == (512, False)
    less = on(5000)
    assert (less.micro_batch_sequences, less.checkpointing) == (32, False)
    assert cost(less) <= 0.9 * 5000 * MB < cost(replace(less, micro_batch_sequences=64))
    again = on(3378)
    assert (again.micro_batch_sequences, again.checkpointing) == (2, True)
    assert cost(again) <= 0.9 * 3378 * MB < cost(replace(again, micro_batch_sequences=4))
    assert cost(replace(again, micro_batch_sequences=1, checkpointing=False)) > 0.9 * 3378 * MB
    # a prediction refuses nobody who has set no budget
    least = on(100)
    assert (least.micro_batch_sequences, least.checkpointing) == (1, True)
    assert least.moments == least.gradients == "fp32" and least.budget_bytes is None
    assert on(100, divisible=False).micro_batch_sequences == 512
    assert not on(100, can_checkpoint=False).checkpointing
    given = options(batch_sequences=512, micro_batch_sequences=3, checkpointing=False)
    assert (on(100, given).micro_batch_sequences, on(100, given).checkpointing) == (3, False)


def test_no_second_forward_pass_where_it_would_count_twice():
    with pytest.raises(BudgetError) as error:
        chosen(300, can_checkpoint=False)
    assert "checkpointing" not in str(error.value)
    assert not chosen(smallest(error), can_checkpoint=False).checkpointing
    assert not plan_memory(
        options(checkpointing=True), 128, None, cost, can_checkpoint=False
    ).checkpointing


def test_words_tell_what_is_not_plain():
    assert MemoryPlan(4).summary == "4 sequences at a time"
    everything = MemoryPlan(
        1, "bf16", "bf16", True, fuse_optimizer=True, compile=True, mmap_threshold_bytes=300_000
    )
    assert everything.summary == (
        "1 sequences at a time, bf16 moments, bf16 gradients, checkpointing, fused optimizer, "
        "mmap threshold (0.3 MB), compiled"
    )


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("172MB", 172 * MB),
        ("8GB", 8 * 10**9),
        (" 1.5 GB ", 1_500_000_000),
        ("64MiB", 2**26),
        ("2GiB", 2**31),
        ("900kB", 900_000),
        ("3KiB", 3072),
        (172_000_000, 172 * MB),
        (None, None),
    ],
)
def test_budgets_are_written_as_people_write_them(written, wanted):
    assert RuntimeConfig(memory_budget=written).memory_budget == wanted


@pytest.mark.parametrize(
    "written", ["172", "lots", "8 apples", "172mb", "-8GB", "0MB", 0, -5, "1.2.3MB", "MB", ""]
)
def test_other_budgets_are_refused(written):
    with pytest.raises(ValidationError, match="memory_budget"):
        RuntimeConfig(memory_budget=written)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ("fuse_optimizer", "clip_norm 0, not 1:")),
        ({"clip_norm": 0.5}, ("fuse_optimizer", "clip_norm 0, not 0.5:")),
        (
            {"clip_norm": 0, "micro_batch_sequences": 4},
            ("fuse_optimizer", "micro_batch_sequences", "not 4"),
        ),
    ],
)
def test_a_fused_step_needs_one_pass_and_no_clipping(changes, names):
    with pytest.raises(ValidationError) as error:
        options(fuse_optimizer=True, **changes)
    assert all(name in str(error.value) for name in names)
    options(fuse_optimizer=True, clip_norm=0)
    options(fuse_optimizer=True, clip_norm=0, micro_batch_sequences=16)


def test_gates_are_not_made_twice():
    with pytest.raises(ValidationError, match="checkpointing: the gates count the tokens"):
        RouterConfig(checkpointing=True)
    RouterConfig(checkpointing=False)


def ended(folder, task, **changes) -> dict[str, torch.Tensor]:
    """Return the parameters after a task was fitted with a plan."""
    task = replace(task, memory_plan=MemoryPlan(8, **changes)) if changes else task
    fit(task, train_io(folder))
    assert all(p.dtype == torch.float32 and p.grad is None for p in task.parameters.values())
    return values(task)


PLAIN = {"noisy": False, "clip_norm": 0}


@pytest.mark.parametrize(
    ("changes", "close"),
    [
        ({"moments": "bf16"}, 0.05),
        ({"gradients": "bf16"}, 0.05),
        ({"moments": "bf16", "gradients": "bf16"}, 0.05),
        ({"fuse_optimizer": True}, 0.0),
        ({"mmap_threshold_bytes": LOW_MMAP_THRESHOLD_BYTES, "trim_each_pass": True}, 0.0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_means_leaves_the_result_within_its_rounding(tmp_path, changes, close):
    start = values(small_task(**PLAIN))
    plain, other = (
        ended(tmp_path / "plain", small_task(**PLAIN)),
        ended(tmp_path / "o", small_task(**PLAIN), **changes),
    )
    apart = {n: ((other[n] - plain[n]).norm() / (plain[n] - start[n]).norm()).item() for n in plain}
    assert max(apart.values()) <= close, apart
    assert (min(apart.values()) > 0) == (close > 0)


def test_gradients_in_bf16_are_those_in_fp32_rounded(tmp_path, monkeypatch):
    seen, real = {}, loop.AdamW.step

    def step(self, scale=1.0):
        seen.setdefault(kind, {n: p.grad.clone() for n, p in self.parameters.items()})
        return real(self, scale)

    monkeypatch.setattr(loop.AdamW, "step", step)
    for kind in ("fp32", "bf16"):
        fit(
            replace(small_task(steps=1, **PLAIN), memory_plan=MemoryPlan(2, gradients=kind)),
            train_io(tmp_path / kind),
        )
    for name, exact in seen["fp32"].items():
        assert exact.dtype == torch.float32 and seen["bf16"][name].dtype == torch.bfloat16
        apart = (seen["bf16"][name].float() - exact).norm() / exact.norm()
        assert 0 < apart < 2**-7


def test_a_fused_step_leaves_no_gradients_and_no_hooks(tmp_path):
    task, grads = small_task(**PLAIN), []
    seen = replace(
        task, after_step=lambda: grads.extend(p.grad for p in task.parameters.values()) or {}
    )
    here = train_io(tmp_path)
    fit(replace(seen, memory_plan=MemoryPlan(8, fuse_optimizer=True)), here)
    assert len(grads) == 30 and set(grads) == {None}
    norms = [row["grad_norm"] for row in here.recorder.rows if "grad_norm" in row]
    other = train_io(tmp_path / "plain")
    fit(small_task(**PLAIN), other)
    assert norms == pytest.approx(
        [row["grad_norm"] for row in other.recorder.rows if "grad_norm" in row], rel=1e-6
    )
    before = values(task)
    task.loss(task.batch(0, 8)).backward()
    assert equal(values(task), before)


# compile is in test_ffn_parts.py.


def test_moments_in_bf16_are_not_for_a_beta2_that_they_cannot_follow():
    assert chosen(1400, options(beta2=MOST_BETA2), divisible=False).moments == "bf16"
    with pytest.raises(BudgetError) as error:
        chosen(300, options(beta2=0.999))
    assert "bf16 moments" not in str(error.value) and "bf16 gradients" in str(error.value)
    with pytest.raises(
        ConfigError, match="moments: bf16 with beta2 0.999 .* set beta2 to 0.99 or less"
    ):
        chosen(None, options(moments="bf16", beta2=0.999))
    assert chosen(None, options(moments="int8", beta2=0.999)).moments == "int8"
