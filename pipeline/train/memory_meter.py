"""Peak memory of this process, and what the allocator gives back."""

import ctypes
from contextlib import suppress
from pathlib import Path

from ..hardware import device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


LOW_MMAP_THRESHOLD_BYTES = 200_000


class Peak:
    """Peak memory above the level at which it was made: resident set here, what was allocated on a
    GPU."""

    def __init__(self):
        self.start_bytes, self.start_mapped_bytes = _status("VmRSS"), _status("RssFile")
        self.start_share_bytes = _status("Pss_File", "smaps_rollup")
        self.highest_bytes = self.highest_host_bytes = 0
        self.gpu = device() == "cuda"
        self._restart()  # what this process reached before is not the job's

    def clear(self) -> None:
        """Start the high-water mark again, where the system lets us; what was reached before stays
        in the report."""
        self.highest_bytes = max(self.highest_bytes, self.bytes())
        self.highest_host_bytes = max(self.highest_host_bytes, self._above())
        self._restart()

    def _restart(self) -> None:
        self.since_bytes = 0
        if self.gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """Return the peak above the start since the last clear, in bytes; 0 where the system does
        not tell."""
        if self.gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return self._above()

    def _above(self) -> int:
        """Return the peak here since the last clear; the kernel may report a mark below one it
        reported before."""
        self.since_bytes = max(self.since_bytes, _status("VmHWM") - self.start_bytes)
        return self.since_bytes

    def report(self) -> dict[str, float]:
        """Return MB for a manifest: the peak, and how much of what is resident now is mapped files,
        shared or not."""
        mapped = max(0, _status("RssFile") - self.start_mapped_bytes)
        share = max(0, _status("Pss_File", "smaps_rollup") - self.start_share_bytes)
        return {
            "peak_mb": max(self.highest_bytes, self.bytes()) / 1e6,
            "mapped_mb": mapped / 1e6,
            "mapped_share_mb": share / 1e6,
            "host_peak_mb": max(self.highest_host_bytes, self._above()) / 1e6,
        }


def lower_mmap_threshold() -> None:
    """Let every larger block go back to the system when it is freed, and use one arena (glibc;
    nothing elsewhere)."""
    _malloc("mallopt", M_ARENA_MAX, 1)
    _malloc("mallopt", M_MMAP_THRESHOLD, LOW_MMAP_THRESHOLD_BYTES)


def set_malloc_thresholds(most_bytes: int, trim_threshold_bytes: int) -> None:
    """Give back what is free now, then reuse blocks of up to that size: faster, and the heap holds
    more.

    trim_threshold_bytes: what may be free at the heap's end before it is given back.
    """
    trim_heap()
    _malloc("mallopt", M_MMAP_THRESHOLD, most_bytes)
    _malloc("mallopt", M_TRIM_THRESHOLD, trim_threshold_bytes)


def trim_heap() -> None:
    """Give what is free in the heap back to the system (glibc; nothing elsewhere)."""
    _malloc("malloc_trim", 0)


def _malloc(function: str, *numbers: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, function):
        getattr(libc, function)(*numbers)


def _status(key: str, file: str = "status") -> int:
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)
