"""What a training rounds by, beside its settings: the machine, its threads and the memory plan.

No address depends on it, as any of these is as good. A run that goes on with another says so and
keeps a list, because it no longer ends in the bytes of an undisturbed one.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..hardware import cpu_name, gpu_name
from .memory_plan import MemoryPlan

Rounding = dict[str, Any]  # from which step on, and what it was computed by


def rounding(plan: MemoryPlan, micro_batch: int) -> Rounding:
    """Return what this attempt rounds by; a micro-batch is a sum of its own."""
    return {
        "processor": gpu_name() or cpu_name(),
        "threads": torch.get_num_threads(),
        "moments": plan.moments,
        "gradients": plan.gradients,
        "sequences at a time": micro_batch,
        "logits at a time": plan.chunk_logits,
    }


def go_on(
    past: list[Rounding], micro_batch: int, now: Rounding, step: int, note: Callable[[str], None]
) -> None:
    """Add to what the attempts before rounded by what this one does, where it differs, and tell it;
    `micro_batch` is what the last attempt came to."""
    if not step or not past:
        # nothing was rounded by another, or nobody noted by what
        past[:] = [{"step": step} | now]
        return
    before = past[-1] | {"sequences at a time": micro_batch}
    changes = [_change(name, before, now) for name in now if before[name] != now[name]]
    if changes:
        past.append({"step": step} | now)
        note(
            f"from step {step} on with {', '.join(changes)}: it rounds otherwise from there, so "
            "the result is not that of an undisturbed run bit for bit"
        )


def _change(name: str, before: Rounding, now: Rounding) -> str:
    return f"{name} {now[name]} ({before[name]} before)"
