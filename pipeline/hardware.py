"""The machine that jobs run on: device, processor, cores, whether it computes in bf16, how fast."""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# torch is imported where it is needed: the command line asks for cores and must not wait for it

# What a driver of GPUs makes: NVIDIA's, AMD's, and that of Linux inside Windows.
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/proc/driver/nvidia/version")


# What CUDA reads when a process opens it
VISIBLE = "CUDA_VISIBLE_DEVICES"

# torch keeps the compiled kernel of each shape that a bf16 product had, in two caches of 1,024 that
# its libraries size by the environment: .6 MB a shape, so 600 MB where rows have many lengths. A
# pass has a dozen shapes, which all its layers share, that of a mixture many more: with 128 kernels
# one of 1,024 tokens took 6 % longer, with 192 no longer than with all. One is made in .6 ms.
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KEPT_KERNELS = 192


def bound_kernel_caches() -> None:
    """Keep the kernels of a processor's products few, where the environment does not say how many;
    of use before the first product of a process alone."""
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KEPT_KERNELS))


def device() -> str:
    """Return cuda when a GPU is there, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def order_sums() -> None:
    """Have a GPU add numbers up in one order each time, as a processor does, wherever torch has a
    kernel that does: a training that was interrupted goes on to the same bytes only so."""
    import torch

    if device() != "cuda":
        return
    # Read by cuBLAS when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Memory that nobody reads before it is written need not be filled
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_bf16() -> bool:
    """Whether bf16 products are native: a GPU that has them, or AVX512-BF16, AMX or Arm's BF16
    here."""
    if _may_have_gpu() and device() == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = {"avx512_bf16", "amx_bf16", "bf16"}
    return bool(native & _cpu_flags())


def uses_bf16(dtype: str) -> bool:
    """Whether a training under a run's `dtype` setting is one in bf16 on this machine.

    `auto` takes bf16 only where its products are native: emulated ones are slower than fp32.
    """
    return dtype == "bf16" or (dtype == "auto" and has_bf16())


def native_dtype() -> str:
    """Return what `dtype: auto` is on this machine. Without a GPU nothing is imported for it: it is
    asked by every command that computes an address."""
    return "bf16" if has_bf16() else "fp32"


def _may_have_gpu() -> bool:
    """Whether to ask torch for a GPU: it is imported already, or there is a driver of one."""
    if "torch" in sys.modules or platform.system() == "Windows":
        return True
    return has_driver()


def has_driver() -> bool:
    """Whether there is a driver of GPUs, for which nothing is imported and no GPU is opened."""
    return any(map(os.path.exists, DRIVERS))


@cache
def _cpu_flags() -> frozenset[str]:
    # x86 calls them flags, Arm Features
    return frozenset(_cpu_info("flags", "Features").split())


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    # outside Linux, and on Arm, it stands elsewhere or nowhere
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(*names: str) -> str:
    """Return the first entry of one of these names in Linux's list of processors, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        if line.startswith(names):
            return line.split(":")[1].strip()
    return ""


def gpu_name() -> str | None:
    """Return the name of the GPU that jobs here run on, or None."""
    import torch

    return torch.cuda.get_device_name(0) if device() == "cuda" else None


def free_bytes() -> int:
    """Return the memory that is free for jobs here: the GPU's where there is one."""
    import psutil
    import torch

    if device() == "cuda":
        free, _total = torch.cuda.mem_get_info()
        return free
    return psutil.virtual_memory().available


def gpu_bytes() -> int | None:
    """Return the memory that jobs here can have on the GPU, this one's own included; None without
    one."""
    if device() != "cuda":
        return None
    import torch

    free, _total = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def gpus() -> list[str]:
    """Return the GPUs that processes started here may use, as CUDA_VISIBLE_DEVICES names them."""
    if not has_driver():
        return []
    import torch

    # Asks the driver where it can, which opens none of them
    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    names = named.split(",") if named else [str(number) for number in range(count)]
    return names[:count]


def use_gpu(name: str) -> None:
    """Have this process, which has opened none yet, see one GPU alone."""
    os.environ[VISIBLE] = name


def is_full(error: Exception) -> bool:
    """Whether an error says that a GPU's memory is full."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def is_unknown_gpu(error: Exception) -> bool:
    """Whether an error says that the torch that is installed has no code for the GPU."""
    return "no kernel image is available" in str(error)


def cores() -> int:
    """Return the processor cores this process may use."""
    # a container or `taskset` may allow fewer than there are; Linux alone tells
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def product_flops_per_s(bf16: bool) -> float:
    """Return the rate of large matrix products on this machine with the threads that torch has now,
    measured in about 0.2 s: what MFU is relative to."""
    import torch

    if device() == "cuda":
        return _best_rate(8192, bf16, torch.cuda.synchronize)
    threads = torch.get_num_threads()
    # One thread, times how many there are: where others use the cores too, several wait for the
    # slowest at each product, and a probe of 0.2 s took half a minute
    torch.set_num_threads(1)
    try:
        return threads * _best_rate(512, bf16, _nothing)
    finally:
        torch.set_num_threads(threads)


def _nothing() -> None: ...


def summed_bytes_per_s() -> float:
    """Return how many bytes this machine takes the sha256 of in a second, measured in a few
    milliseconds."""
    block = bytes(1 << 20)
    rates = []
    for _ in range(8):
        start_s = time.perf_counter()
        hashlib.sha256(block).digest()
        rates.append(len(block) / (time.perf_counter() - start_s))
    # The best one, as above
    return max(rates)


def _best_rate(size: int, bf16: bool, wait: Callable[[], None]) -> float:
    """Return the best rate of products of that size; `wait` ends when a product has."""
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    # Not of zeros or ones, with which a GPU draws less power and so is faster than with data; and
    # not drawn, as the generator is the training's
    a = torch.arange(size * size, dtype=torch.float32, device=device()).sin().to(dtype)
    a = a.view(size, size)
    rates: list[float] = []
    stop_s = time.perf_counter() + 0.2
    # The first one pays for what is set up once
    while time.perf_counter() < stop_s or len(rates) < 2:
        start_s = time.perf_counter()
        a @ a
        wait()
        rates.append(2 * size**3 / (time.perf_counter() - start_s))
    del a
    if device() == "cuda":
        # Or this process would keep the matrices' memory from its jobs
        torch.cuda.empty_cache()
    # The best one: what the machine can do, whatever else ran on it just now
    return max(rates)


def fastest_threads(most: int) -> int:
    """Return how many threads, of 1, 2, 4... up to most, do matrix products fastest just now; takes
    about 0.3 s.

    On cores that others use too, waiting for the slowest thread makes several slower than one.
    """
    import torch

    if most <= 1 or device() == "cuda":
        return max(1, most)
    powers = [2**i for i in range(most.bit_length())]
    counts = sorted({most, *powers})
    before = torch.get_num_threads()
    seconds = {count: _product_seconds(count) for count in counts}
    torch.set_num_threads(before)
    return min(counts, key=lambda count: seconds[count])


def set_fastest_threads() -> None:
    """Have torch use the threads, of those that it has now, that are fastest just now."""
    import torch

    torch.set_num_threads(fastest_threads(torch.get_num_threads()))


def _product_seconds(threads: int) -> float:
    """Return the median time of a product with some elementwise work after it, as layers do."""
    import torch

    torch.set_num_threads(threads)
    a = torch.ones(512, 512)
    times: list[float] = []
    stop_s = time.perf_counter() + 0.1
    # Where others have the cores, a single one may take seconds with several threads
    while time.perf_counter() < stop_s or len(times) < 2:
        start_s = time.perf_counter()
        (a @ a).tanh_()
        times.append(time.perf_counter() - start_s)
    return sorted(times)[len(times) // 2]


def machine(threads: int, bf16: bool) -> dict[str, Any]:
    """Return what a result must be read with: hardware, threads, arithmetic, versions."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads,
        "gpu": gpu_name(),
        "dtype": "bf16" if bf16 else "fp32",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        # without the suffix of a build, as in 2.13.0+cpu
        "torch": torch.__version__.split("+")[0],
    }
