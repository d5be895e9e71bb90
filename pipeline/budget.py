"""What a job needs: parameters, floating-point operations, memory and time, and which arithmetic the machine has.

L layers, D model width, F feed-forward width, V vocabulary, T context tokens.
"""

import ctypes
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
LEAST_REUSED_BYTES = 200_000


@dataclass(frozen=True)
class Shape:
    """The sizes that decide cost."""

    layers: int
    d_model: int
    heads_width: int  # heads * head_dim
    kv_width: int  # kv_heads * head_dim
    d_ff: int
    vocab_size: int
    context_tokens: int
    tied: bool = True

    @classmethod
    def of(cls, trunk, vocab_size: int) -> "Shape":
        """Return the shape of a new trunk from its configuration section."""
        head = trunk.head_dim or trunk.d_model // trunk.heads
        kv = (trunk.kv_heads or trunk.heads) * head
        sizes = (trunk.layers, trunk.d_model, trunk.heads * head, kv, trunk.d_ff, vocab_size, trunk.context_tokens)
        return cls(*sizes, trunk.tie_embeddings)

    @classmethod
    def of_settings(cls, hf: dict, context_tokens: int) -> "Shape":
        """Return the shape of a trunk from its Hugging Face config fields."""
        heads, width = hf["num_attention_heads"], hf["hidden_size"]
        head = hf.get("head_dim") or width // heads
        sizes = (hf["num_hidden_layers"], width, heads * head, hf["num_key_value_heads"] * head)
        return cls(*sizes, hf["intermediate_size"], hf["vocab_size"], context_tokens, hf["tie_word_embeddings"])

    @property
    def ffn_parameters(self) -> int:
        """Parameters of one SwiGLU network in every layer."""
        return self.layers * 3 * self.d_model * self.d_ff

    @property
    def attention_parameters(self) -> int:
        """Parameters of the attention projections."""
        return self.layers * 2 * self.d_model * (self.heads_width + self.kv_width)

    @property
    def trunk_parameters(self) -> int:
        """Parameters of the trunk: embedding, attention, norms (approximately), LM head."""
        tables = self.vocab_size * self.d_model * (1 if self.tied else 2)
        return tables + self.attention_parameters + (2 * self.layers + 1) * self.d_model

    def forward_flops_per_token(self, ffn_active: float = 1.0) -> float:
        """Matrix-product operations of one forward pass, causal attention counted at half."""
        weights = self.attention_parameters + ffn_active * self.ffn_parameters + self.vocab_size * self.d_model
        return 2 * weights + 2 * self.layers * self.context_tokens * self.heads_width

    def train_flops_per_token(self, trains: str) -> float:
        """Operations of forward and backward; `trains` is all, ffn or gates (frozen weights need no gradient)."""
        forward = self.forward_flops_per_token(2.0 if trains == "gates" else 1.0)
        own = {"all": forward, "ffn": 2 * self.ffn_parameters, "gates": 0}[trains]
        return 2 * forward + own

    def layer_activations(self, trains: str, active: int = 1) -> int:
        """Numbers per token that a layer keeps for its backward pass; frozen weights do not need what they multiply.

        What enters the norms and the feed-forward networks (`active` a token), queries and keys before and after,
        values, W_gate x, W_up x; of gates also what each network gives.
        """
        inputs = {"all": self.d_model + self.heads_width, "ffn": 0, "gates": (2 * active - 1) * self.d_model}[trains]
        return inputs + 3 * self.d_model + 4 * self.heads_width + self.kv_width + 2 * active * self.d_ff


@dataclass(frozen=True)
class Job:
    """What one job of a plan will need."""

    stage: str
    item: str | None
    tokens: int | None
    parameters: int
    flops: float | None
    peak_bytes: int
    words: str = ""  # how it will run


class Peak:
    """Peak memory above the level at which it was made: resident set here, what was allocated on a GPU."""

    def __init__(self):
        self.start_bytes, self.start_mapped_bytes = _status("VmRSS"), _status("RssFile")
        self.start_share_bytes = _status("Pss_File", "smaps_rollup")
        self.highest_bytes = self.highest_host_bytes = 0
        self.gpu = device() == "cuda"
        self._restart()  # what this process reached before is not the job's

    def clear(self) -> None:
        """Start the high-water mark again, where the system lets us; what was reached before stays in the report."""
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
        """Return the peak above the start since the last clear, in bytes; 0 where the system does not tell."""
        if self.gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return self._above()

    def _above(self) -> int:
        """Return the peak here since the last clear; the kernel may report a mark below one it reported before."""
        self.since_bytes = max(self.since_bytes, _status("VmHWM") - self.start_bytes)
        return self.since_bytes

    def report(self) -> dict[str, float]:
        """Return MB for a manifest: the peak, and how much of what is resident now is mapped files, shared or not."""
        mapped = max(0, _status("RssFile") - self.start_mapped_bytes)
        share = max(0, _status("Pss_File", "smaps_rollup") - self.start_share_bytes)
        return {
            "peak_mb": max(self.highest_bytes, self.bytes()) / 1e6, "mapped_mb": mapped / 1e6,
            "mapped_share_mb": share / 1e6, "host_peak_mb": max(self.highest_host_bytes, self._above()) / 1e6,
        }  # fmt: skip


def give_back_at_once() -> None:
    """Let every larger block go back to the system when it is freed, and use one arena (glibc; nothing elsewhere)."""
    _malloc("mallopt", M_ARENA_MAX, 1)
    _malloc("mallopt", M_MMAP_THRESHOLD, LEAST_REUSED_BYTES)


def reuse_blocks(most_bytes: int, free_end_bytes: int) -> None:
    """Give back what is free now, then reuse blocks of up to that size: faster, and the heap holds more.

    free_end_bytes: what may be free at the heap's end before it is given back.
    """
    give_back()
    _malloc("mallopt", M_MMAP_THRESHOLD, most_bytes)
    _malloc("mallopt", M_TRIM_THRESHOLD, free_end_bytes)


def give_back() -> None:
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


def device() -> str:
    """Return cuda when a GPU is there, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bf16() -> bool:
    """Whether bf16 products are native: a GPU that has them, or AVX512-BF16, AMX or Arm's BF16 here."""
    import torch

    if device() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags())


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    names = ("flags", "Features")
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith(names)), "").split())


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Return the name of the GPU that jobs here run on, or None."""
    import torch

    return torch.cuda.get_device_name(0) if device() == "cuda" else None


def free_bytes() -> int:
    """Return the memory that is free for jobs here: the GPU's where there is one."""
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if device() == "cuda" else psutil.virtual_memory().available


def cores() -> int:
    """Return the processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def product_flops_per_s(bf16: bool) -> float:
    """Return the rate of large matrix products on this machine, measured in about 0.2 s: what MFU is relative to."""
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    size = 4096 if device() == "cuda" else 768
    a = torch.ones(size, size, dtype=dtype, device=device())
    rates = []
    stop = time.perf_counter() + 0.2
    while time.perf_counter() < stop or len(rates) < 3:
        start = time.perf_counter()
        a @ a
        if device() == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def fastest_threads(most: int) -> int:
    """Return how many threads, of 1, 2, 4... up to most, do matrix products fastest just now; takes about 0.3 s.

    On cores that others use too, waiting for the slowest thread makes several slower than one.
    """
    import torch

    if most <= 1 or device() == "cuda":
        return max(1, most)
    counts, before = sorted({most, *(2**i for i in range(most.bit_length()))}), torch.get_num_threads()
    seconds = {count: _product_seconds(count) for count in counts}
    torch.set_num_threads(before)
    return min(counts, key=lambda count: seconds[count])


def _product_seconds(threads: int) -> float:
    """Return the median time of a product with some elementwise work after it, as layers do."""
    import torch

    torch.set_num_threads(threads)
    a, times = torch.ones(512, 512), []
    stop = time.perf_counter() + 0.1
    while time.perf_counter() < stop or len(times) < 5:
        start = time.perf_counter()
        (a @ a).tanh_()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def machine(threads: int, bf16: bool) -> dict:
    """Return what a result must be read with: hardware, threads, arithmetic, versions."""
    import torch

    return {
        "cpu": cpu_name(), "cores": cores(), "threads": threads, "gpu": gpu_name(), "dtype": "bf16" if bf16 else "fp32",
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }  # fmt: skip
