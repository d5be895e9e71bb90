"""Threads of a training on a machine that others come to use while it runs.

Several threads wait for the slowest of them at each product. Where others take the cores, a step
can take sixty times as long as with one thread, which waits for nobody.
"""

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

import torch

from ..hardware import fastest_threads

# A step of a training may take longer for many reasons: only much longer is looked into
SLOWER = 4.0
# Steps whose median is taken; the first of a training, which sets things up, is left out
WINDOW = 8
# Between two looks, each of which measures products for some tenths of a second
LOOK_EVERY_S = 30.0


class ThreadWatch:
    """Lowers the threads of a training when its steps have become much slower and fewer threads are
    faster on this machine now.

    `had` are the threads that the job had so far, one after another, the last those of now;
    `first_s` the seconds of a step as it began, 0 while nobody knows. `keep` is called when one of
    both changes: a job that goes on has to know them.
    """

    def __init__(
        self, had: tuple[int, ...], first_s: float, keep: Callable[[tuple[int, ...], float], None]
    ) -> None:
        self.had = had
        self.first_s = first_s
        self._keep = keep
        self._recent_s: deque[float] = deque(maxlen=WINDOW)
        self._warm = False
        self._since_look_s = LOOK_EVERY_S

    @property
    def threads(self) -> int:
        """Threads of now."""
        return self.had[-1]

    def after_step(self, seconds: float) -> str:
        """Take note of what a step took; return what to tell when there are fewer threads from now
        on, else ""."""
        if self.threads <= 1:
            return ""
        if not self._warm:
            self._warm = True
            return ""
        self._recent_s.append(seconds)
        self._since_look_s += seconds
        if len(self._recent_s) < WINDOW:
            return ""
        if not self.first_s:
            self.first_s = median(self._recent_s)
            self._keep(self.had, self.first_s)
        if self._since_look_s < LOOK_EVERY_S or not is_slow(self.first_s, self._recent_s):
            return ""
        return self._look()

    def _look(self) -> str:
        """Measure whether fewer threads are faster now."""
        before = self.threads
        times = median(self._recent_s) / self.first_s
        self._since_look_s = 0.0
        self._recent_s.clear()
        fewer = fastest_threads(before)
        if fewer >= before:
            return ""
        self.had = (*self.had, fewer)
        torch.set_num_threads(fewer)
        # With fewer threads a step may well take that much longer on an idle machine
        self.first_s *= before / fewer
        self._since_look_s = LOOK_EVERY_S
        self._keep(self.had, self.first_s)
        return (
            f"the machine is busy: a step takes {times:.0f} times as long as at first; going on "
            f"with {fewer} of {before} threads"
        )


def is_slow(first_s: float, recent_s: Sequence[float]) -> bool:
    """Whether steps take so much longer than the first ones that it is worth a look."""
    return median(recent_s) > SLOWER * first_s
