"""A GPU that is none: tensors that say they are on cuda:0, whose numbers a processor has.

Products run on the processor; what a real device refuses is refused, such as operands on two
devices, or numpy's view of its memory. So whatever takes the way of a GPU can be run, and be
compared with the processor's, where none is.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import peft  # noqa: F401 - with it comes bitsandbytes, which would look for a GPU's library
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
# They may be given tensors of both devices
BETWEEN_DEVICES = {aten.copy_.default, aten.set_.source_Tensor}
# Their index may be on the processor
INDEXED = {
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    aten._index_put_impl_.default,
}
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_backward = torch.autograd._engine_run_backward
_autocast = torch.autocast
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; `inner` has its numbers. What torch itself sees is one
    of the processor's."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CPU,
        )
        made.inner = inner
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.inner!r})"

    # torch swaps such tensors where it would else give a parameter other numbers
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, context: None, size: Any, stride: Any) -> "OnGpu":
        return OnGpu(inner["inner"])

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as torch does for a GPU's."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Moving(torch.autograd.Function):
    """From one device to another, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.inner.clone() if isinstance(x, OnGpu) else OnGpu(x.clone())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.inner.clone() if isinstance(dy, OnGpu) else OnGpu(dy.clone())


class _Moves(TorchFunctionMode):
    """Takes what moves tensors, of which torch itself sees one device alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cpu:
            return _moved(args[0], CPU)
        if func is Tensor.cuda:
            return _moved(args[0], GPU)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.tolist:
            return _moved(args[0], CPU).tolist()
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            del kwargs["device"]
            return _moved(func(*_inner(args), **kwargs), GPU)
        if func == SET_DATA and (OnGpu in map(type, args)):
            _set_data(*args)
            return None
        with _asked_by_torch(False):
            return func(*args, **kwargs)


def _is_gpu(target: Any) -> bool:
    return target is not None and torch.device(target).type == "cuda"


class _Asking(threading.local):
    """Who makes a tensor: a program, or torch itself on its way back through one."""

    torch = False


_asking = _Asking()


@contextlib.contextmanager
def _asked_by_torch(true: bool) -> Iterator[None]:
    before = _asking.torch
    _asking.torch = true
    try:
        yield
    finally:
        _asking.torch = before


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    # a mode is off while what it takes runs, which is all of the backward pass
    with _Moves(), _asked_by_torch(True):
        return _backward(*args, **kwargs)


def _set_data(given: Tensor, other: Tensor) -> None:
    """Give a tensor another's numbers, wherever they are."""
    if isinstance(given, OnGpu) and isinstance(other, OnGpu):
        with torch._C.DisableTorchFunction():
            SET_DATA(given, other)
        given.inner = other.inner
        return
    other = other.detach()
    if isinstance(given, torch.nn.Parameter):
        other = torch.nn.Parameter(other, requires_grad=given.requires_grad)
    torch.utils.swap_tensors(given, other)


def _to(given: Tensor, *how: Any, copy: bool = False, **named: Any) -> Tensor:
    """Return what Tensor.to does, whose arguments are told apart by their types."""
    target = None
    dtype = None
    for each in (*how, named.get("device"), named.get("dtype"), named.get("other")):
        if isinstance(each, Tensor):
            target, dtype = each.device, each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, str | torch.device):
            target = torch.device(each)
    if target is not None and not isinstance(given, OnGpu) and target.type != "cuda":
        with torch._C.DisableTorchFunction():
            return given.to(target, dtype, copy=copy)
    moved = given if target is None else _moved(given, target)
    with torch._C.DisableTorchFunction():
        cast = moved if dtype is None else moved.to(dtype)
    return cast.clone() if copy and cast is given else cast


def _moved(given: Tensor, target: torch.device) -> Tensor:
    if isinstance(given, OnGpu) == (target.type == "cuda"):
        return given
    with torch._C.DisableTorchFunction():
        moved: Tensor = _Moving.apply(given)
    return moved


class _Devices(TorchDispatchMode):
    """Makes tensors on the GPU that are asked for there, and looks where operands are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    to_gpu = any(isinstance(each, OnGpu) for each in given)
    device = kwargs.get("device")
    if device is not None:
        # torch's own backward passes ask for what is like a tensor where they see it to be
        to_gpu = to_gpu or _asking.torch or _is_gpu(device)
        kwargs = {**kwargs, "device": CPU}
    if to_gpu:
        _check(func, args, given)
    if func is aten.copy_.default:
        to_gpu = isinstance(args[0], OnGpu)
    if func is aten.histc.default and to_gpu and not args[0].is_floating_point():
        # a processor has it of no whole numbers
        args = (args[0].float(), *args[1:])
    result = func(*_inner(args), **_inner(kwargs))
    if not to_gpu:
        return result
    result = tree_map(lambda each: OnGpu(each) if isinstance(each, Tensor) else each, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def _inner(given: Any) -> Any:
    return tree_map(lambda each: each.inner if isinstance(each, OnGpu) else each, given)


def _check(func: Any, args: Any, given: list[Tensor]) -> None:
    """Raise RuntimeError for operands on two devices, as torch does."""
    if func in BETWEEN_DEVICES:
        return
    if func in INDEXED:
        # whatever the index is on; what is indexed and what is put there must be together
        given = [each for each in (args[0], *args[2:3]) if isinstance(each, Tensor)]
    for each in given:
        if not isinstance(each, OnGpu) and each.dim():
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func})"
            )


class _Autocast(contextlib.ContextDecorator):
    """Autocast of the GPU, which has to be the processor's too: torch looks where a tensor is."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        kinds = dict.fromkeys((device_type, "cpu"))
        self.parts = [_autocast(kind, *args, **kwargs) for kind in kinds]

    def __enter__(self) -> None:
        for part in self.parts:
            part.__enter__()

    def __exit__(self, *error: Any) -> None:
        for part in reversed(self.parts):
            part.__exit__(*error)


_run_thread = threading.Thread.run


def _in_thread(thread: threading.Thread) -> None:
    # modes are a thread's own
    with _Devices(), _Moves():
        _run_thread(thread)


CUDA = {
    "is_available": lambda: True,
    "_lazy_init": lambda: None,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "get_device_name": lambda device=None: "a pretended GPU",
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "mem_get_info": lambda device=None: (80 * 10**9, 80 * 10**9),
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "max_memory_allocated": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    # drawn by the processor's, which is kept and set beside it
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Have this process see a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in CUDA.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(threading.Thread, "run", _in_thread)
        patch.setattr(torch.autograd, "_engine_run_backward", _run_backward)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        patch.setenv(WORKSPACE, "")
        patch.delenv(WORKSPACE)
        with _Devices(), _Moves():
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(False)
