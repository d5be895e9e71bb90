"""What a piece of work holds of memory, by what torch hands out: pages of mapped files are none of
it."""

import gc
from collections.abc import Callable

import numpy as np
from torch.profiler import ProfilerActivity, profile


def held_bytes(work: Callable[[], object]) -> np.ndarray:
    """Return how many bytes of tensors are held after each block that is taken or given back, in
    order; negative where what was there before goes."""
    # what earlier work left would go in the middle of this one's
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    return np.cumsum([event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())])
