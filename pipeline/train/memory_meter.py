"""Peak memory of this process, and what the allocator gives back.

Linux and glibc tell and take all of this; elsewhere figures are 0 and the allocator is left alone.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

from ..hardware import device

# Numbers of mallopt's parameters, from glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8

# Larger blocks are mapped, and so go back to the system as soon as they are freed. glibc raises its
# own threshold as blocks are freed; one that was set stays.
LOW_MMAP_THRESHOLD_BYTES = 200_000


class Peak:
    """Peak memory above the level at which it was made: resident set here, what was allocated on a
    GPU."""

    def __init__(self) -> None:
        self.start_bytes = _status("VmRSS")
        self.start_mapped_bytes = _status("RssFile")
        self.start_share_bytes = _status("Pss_File", "smaps_rollup")
        self.highest_bytes = 0
        self.highest_host_bytes = 0
        self.gpu = device() == "cuda"
        # what this process reached before is not the job's
        self._restart()

    def clear(self) -> None:
        """Start the high-water mark again, where the system lets us; what was reached before stays
        in the report."""
        self.highest_bytes, self.highest_host_bytes = self.reached()
        self._restart()

    def _restart(self) -> None:
        self.since_bytes = 0
        if self.gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            # 5 resets VmHWM to what is resident now
            Path("/proc/self/clear_refs").write_text("5")

    def reached(self) -> tuple[int, int]:
        """Return the highest peak so far in bytes, and that of the resident set."""
        highest_bytes = max(self.highest_bytes, self.bytes())
        return highest_bytes, max(self.highest_host_bytes, self._host_bytes())

    def carry(self, peak_bytes: int, host_peak_bytes: int) -> None:
        """Let the report cover what an earlier attempt at the job reached, too."""
        self.highest_bytes = max(self.highest_bytes, peak_bytes)
        self.highest_host_bytes = max(self.highest_host_bytes, host_peak_bytes)

    def bytes(self) -> int:
        """Return the peak above the start since the last clear, in bytes; 0 where the system does
        not tell."""
        if self.gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return self._host_bytes()

    def _host_bytes(self) -> int:
        """Return the peak of the resident set since the last clear."""
        # the kernel may report a mark below one that it reported before
        self.since_bytes = max(self.since_bytes, _status("VmHWM") - self.start_bytes)
        return self.since_bytes

    def report(self) -> dict[str, float]:
        """Return MB for a manifest: the peak, and how much of what is resident now is mapped files,
        shared or not."""
        peak_bytes, host_peak_bytes = self.reached()
        mapped = _status("RssFile") - self.start_mapped_bytes
        share = _status("Pss_File", "smaps_rollup") - self.start_share_bytes
        return {
            "peak_mb": peak_bytes / 1e6,
            "mapped_mb": max(0, mapped) / 1e6,
            "mapped_share_mb": max(0, share) / 1e6,
            "host_peak_mb": host_peak_bytes / 1e6,
        }


def lower_mmap_threshold() -> None:
    """Let every larger block go back to the system when it is freed, and use one arena."""
    _malloc("mallopt", M_ARENA_MAX, 1)
    _malloc("mallopt", M_MMAP_THRESHOLD, LOW_MMAP_THRESHOLD_BYTES)


def set_malloc_thresholds(mmap_bytes: int, trim_bytes: int) -> None:
    """Give back what is free now, then reuse blocks of up to mmap_bytes: faster, and the heap holds
    more.

    trim_bytes: what may be free at the heap's end before it is given back.
    """
    trim_heap()
    _malloc("mallopt", M_MMAP_THRESHOLD, mmap_bytes)
    _malloc("mallopt", M_TRIM_THRESHOLD, trim_bytes)


def trim_heap() -> None:
    """Give what is free in the heap back to the system."""
    _malloc("malloc_trim", 0)


def _malloc(function: str, *numbers: int) -> None:
    """Call a function of glibc; other C libraries lack it and are left as they are."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, function):
        getattr(libc, function)(*numbers)


def _status(key: str, file: str = "status") -> int:
    """Return bytes of an entry of a file below /proc/self, which counts in kB; 0 without it."""
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
