"""The sections of benchmarks/gpu.py: a module each, started in a process of its own by `__main__`.

A section is a function that takes a Setup and yields rows as it finds them. A row names what it is
about under "what"; rows of the same name are rounds of the same thing.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import RANK

Row = dict[str, str | float]


def told(what: Exception | str) -> str:
    """Return an error or a reason as one cell of a table."""
    text = what if isinstance(what, str) else f"{type(what).__name__}: {what}"
    return " ".join(text.replace("|", "/").split())[:200]


@dataclass(frozen=True)
class Setup:
    """What every section is told."""

    device: str  # cuda or cpu
    small: bool  # shapes for a processor
    rounds: int
    work: str  # a folder of the section's own
    until_s: float  # of time.time(): what is not begun by then is left out

    @property
    def folder(self) -> Path:
        """Where the section may write."""
        return Path(self.work)

    def has_time_for(self, seconds: float) -> bool:
        """Whether something that takes so long can still be begun."""
        return time.time() + seconds < self.until_s


@dataclass(frozen=True)
class Section:
    """One section: where its function is, and what a reader has to know of its table."""

    title: str
    place: str  # module.function below benchmarks.gpu_parts
    seconds: float  # after which it is ended
    notes: str = ""
    beside: bool = False  # times nothing that others could disturb: all such run together


SECTIONS = {
    "agree": Section(
        "Losses on this device and on the processor",
        "agree.agree",
        60,
        "Training losses of the same steps, in nats; a form passes when the largest difference is "
        "within its limit.",
    ),
    "train-100m": Section("Training, 100 M parameters", "training.of_100m", 75),
    "train-350m": Section("Training, 350 M parameters", "training.of_350m", 100),
    "train-1b": Section(
        "Training, 1 B parameters",
        "training.of_1b",
        135,
        "Rates count the steps after the first, skipped ones. MFU: operations that the task needs, "
        "of the peak named above. Memory is the peak that PyTorch allocated; predicted is what "
        f"`plan` promises. Low rank and adapters have rank {RANK}.",
    ),
    "forward": Section(
        "One layer's forward pass: a mixture beside one dense network",
        "forward.forward",
        40,
        "Experts are as wide as the dense network, so K = 1 of full ones computes as much. Ratios "
        "are within a round.",
    ),
    "generate": Section(
        "Generation in batches from a bundle",
        "generation.generate",
        60,
        "A stack of four experts, top-2, written as a bundle and opened as the server opens it; "
        "tokens/s are of all texts of a batch together.",
    ),
    "chain-text": Section(
        "The chain of text experts, as a user runs it",
        "chains.text",
        100,
        beside=True,
    ),
    "chain-vlm": Section(
        "The chain of adapters on a vision-language model, as a user runs it",
        "chains.vision",
        100,
        beside=True,
    ),
    "killed": Section(
        "Killed with SIGKILL and run again",
        "chains.killed",
        100,
        "Files that hold seconds are not compared.",
        beside=True,
    ),
}
