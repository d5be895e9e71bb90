"""What a contender's process sees of itself: seconds of its steps, peaks of its memory.

Invariant: both count from after the imports, and what measuring itself takes is in neither.
"""

import gc
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.measuring import MB
from pipeline.train.memory_meter import Peak


@dataclass
class Watch:
    """What a contender reports to while it works; made when its imports are done."""

    skip: int = 0
    device: str = "cpu"
    start_s: float = 0.0
    reading_s: float = 0.0  # spent on reading memory while the clock ran
    ends_s: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    extra: dict = field(default_factory=dict)
    peaks: list = field(default_factory=list)
    highest_bytes: int = 0  # mark that any reading found

    def __post_init__(self):
        gc.collect()
        self.before = memory()
        clear_peak()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.start_s = time.perf_counter()

    def step(self, nats: float | None = None) -> None:
        """Take note of the end of an optimizer step and of its loss; waits for a GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends_s.append(time.perf_counter())
        if nats is not None:
            self.nats.append(nats)

    def mark(self, name: str) -> None:
        """Keep the peak up to here under a name of its own, and what is mapped at the time."""
        start_s = time.perf_counter()
        now = memory()
        self.extra[f"{name}_mb"] = self._peak_mb(now)
        self._keep_mapped(now)
        self.reading_s += time.perf_counter() - start_s

    def _peak_mb(self, now: dict[str, int]) -> float:
        """Return the peak: what was allocated on a GPU, else the resident set above the start.

        The kernel adds up pages per processor and may report a mark somewhat below one it reported
        before.
        """
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / MB
        self.highest_bytes = max(self.highest_bytes, now["VmHWM"], now["VmRSS"])
        return (self.highest_bytes - self.before["VmRSS"]) / MB

    def clears(self, peak) -> None:
        """Hear of a Peak of the pipeline that may start the same high-water mark again, and
        remembers what was."""
        self.peaks.append(peak)

    def _keep_mapped(self, now: dict[str, int]) -> None:
        for name, key in (
            ("file_mb", "RssFile"),
            ("data_mb", "data"),
            ("data_share_mb", "data_share"),
        ):
            self.extra[name] = max(self.extra.get(name, 0.0), (now[key] - self.before[key]) / MB)

    def result(self, step_tokens: int) -> dict:
        """Return seconds, rate over the steps that count, last loss, and peak memory in MB."""
        seconds = time.perf_counter() - self.start_s - self.reading_s
        after, steps = memory(), self.ends_s
        self._keep_mapped(after)
        out = {"seconds": seconds, "imports_mb": self.before["VmRSS"] / MB} | self.extra
        remembered = [peak.report()["peak_mb"] for peak in self.peaks]
        out["peak_mb"] = max(self._peak_mb(after), *remembered, 0.0)
        if len(steps) > self.skip:
            start = steps[self.skip - 1] if self.skip else self.start_s
            out["step_s"] = (steps[-1] - start) / (len(steps) - self.skip)
            out["tokens_per_s"] = step_tokens / out["step_s"]
            out["first_step_s"] = steps[0] - self.start_s
        return out | {"steps": len(steps), "nats": self.nats[-1] if self.nats else None}


def memory() -> dict[str, int]:
    """Return this process's resident set, its peak, its file pages, and those of mapped data files,
    in bytes.

    data_share counts a page that n processes map as 1/n; libraries are left out of both, as anyone
    may map them.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    out = {
        words[0][:-1]: int(words[1]) * 1024
        for words in lines
        if words[0][:-1] in ("VmRSS", "VmHWM", "RssFile")
    }
    out |= {"data": 0, "data_share": 0}
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # a mapping begins; its path, if any, comes sixth
            path = words[5] if len(words) > 5 else ""
            counts = path.startswith("/") and not re.search(
                r"\.so(\.|$)|/python[0-9.]*$|/locale/", path
            )
        elif counts and words[0] in ("Rss:", "Pss:"):
            out["data" if words[0] == "Rss:" else "data_share"] += int(words[1]) * 1024
    return out


class Pages:
    """Peaks of this process above the level at which it was made: whole, anonymous and of mapped
    files."""

    def __init__(self):
        self.peak, self.before = Peak(), _resident()
        self.most = dict(self.before)
        self._over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look every 20 ms; what is allocated and freed between two looks is missed, but in
        peak_mb."""
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.most = {key: max(value, self.most[key]) for key, value in _resident().items()}

    def report(self) -> dict[str, float]:
        """Return MB: peaks above the start, and what this process holds now."""
        smaps = Path("/proc/self/smaps_rollup").read_text().splitlines()
        now = {
            line.split()[0][:-1]: int(line.split()[1]) * 1024
            for line in smaps
            if line.endswith("kB")
        }
        return {
            "peak_mb": self.peak.report()["host_peak_mb"],
            "anonymous_mb": (self.most["RssAnon"] - self.before["RssAnon"]) / MB,
            "mapped_mb": (self.most["RssFile"] - self.before["RssFile"]) / MB,
            "imports_mb": self.before["VmRSS"] / MB,
            "rss_mb": now["Rss"] / MB,
            "pss_mb": now["Pss"] / MB,
            "private_mb": (now["Private_Clean"] + now["Private_Dirty"]) / MB,
        }


def _resident() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        w[0][:-1]: int(w[1]) * 1024 for w in lines if w[0][:-1] in ("VmRSS", "RssAnon", "RssFile")
    }


def clear_peak() -> None:
    """Start the kernel's high-water mark of this process again."""
    Path("/proc/self/clear_refs").write_text("5")
