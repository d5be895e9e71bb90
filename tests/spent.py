"""What a piece of work takes of the processor, where that alone tells a slip: one that takes time
by the square, or is done a million times."""

import time
from collections.abc import Callable


def is_done_in(seconds: float, act: Callable[[], object]) -> bool:
    """Whether a call takes less of the processor, and not of the clock, which others have a share
    in; at the third time at the latest, as what else this process has to clear away may fall into
    it."""
    for _ in range(3):
        start_s = time.process_time()
        act()
        if time.process_time() - start_s < seconds:
            return True
    return False
