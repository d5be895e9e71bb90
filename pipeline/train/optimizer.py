"""AdamW over fp32 masters, whatever dtype the network computes in and the moments are kept in.

A parameter that computes in bf16 keeps the 16 bits that rounding took from its master beside it:
together they are the fp32 number, so a master costs no memory of its own. The arithmetic is torch's
fused kernel on pieces of fp32.

P elements of a piece.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..config.fit import FitConfig
from .optimizer_state import SCALE, Moment, new_moment

# Elements whose master and moments are fp32 at a time: 4 MB of workspace. A whole number of the
# blocks that share a scale in 8 bits.
PIECE = 2**18
# On a GPU, where each piece costs the start of a dozen kernels: whole matrices, and 400 MB
GPU_PIECE = 2**24
BETA1 = 0.9
EPSILON = 1e-8
FIRST = "exp_avg"
SECOND = "exp_avg_sq"


class AdamW:
    """The optimizer of a Task; matrices decay, vectors do not.

    `bf16_params` names the parameters that compute in bf16. Decoupled decay as in 1711.05101.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        opts: FitConfig,
        bf16_params: Iterable[str] = (),
        moments: str = "fp32",
    ):
        self.parameters = parameters
        self.lr = opts.rate
        self.beta2 = opts.beta2
        self.weight_decay = opts.weight_decay
        self.steps = 0
        # before the moments are made: an fp32 master goes away as its two halves come
        self.residual_bits = {name: _round_to_bf16(parameters[name]) for name in bf16_params}
        self.state: dict[str, dict[str, Moment]] = {}
        for name, parameter in parameters.items():
            self.state[name] = {
                FIRST: new_moment(moments, parameter, signed=True),
                SECOND: new_moment(moments, parameter, signed=False),
            }

    def norm(self, names: Iterable[str] | None = None) -> float:
        """Return the norm of the gradients of the named parameters, all by default, summed in
        fp32."""
        norms = []
        for name in names or self.parameters:
            if self.parameters[name].grad is not None:
                norms.append(self.norm_of(name))
        if not norms:
            return 0.0
        total = torch.linalg.vector_norm(torch.stack(norms))
        return total.item()

    def norm_of(self, name: str) -> Tensor:
        """Return a scalar, the norm of one parameter's gradient, on its device: no GPU is waited
        for."""
        grad = _grad_of(self.parameters[name])
        return torch.linalg.vector_norm(grad, dtype=torch.float32)

    def step(self, scale: float = 1.0) -> None:
        """Move every parameter by its gradient times scale, and clear the gradients; count a
        step."""
        for name in self.parameters:
            self.move(name, scale)
            _grad_of(self.parameters[name]).zero_()
        self.steps += 1

    @torch.no_grad()
    def move(self, name: str, scale: float = 1.0) -> None:
        """Move one parameter by its gradient times scale."""
        parameter = self.parameters[name]
        values = parameter.data.view(-1)
        grad = _grad_of(parameter).view(-1)
        residual_bits = self.residual_bits.get(name)
        if residual_bits is not None:
            residual_bits = residual_bits.view(-1)
        first = self.state[name][FIRST]
        second = self.state[name][SECOND]
        # the kernel corrects the moments' bias by the number of this step, the first of which is 1
        count = torch.full((), self.steps + 1.0, device=parameter.device)
        # norms and biases are vectors: decay would pull them from where they have to be
        decay = self.weight_decay if parameter.ndim >= 2 else 0.0

        for piece in _pieces(values):
            master_P = values[piece]
            if residual_bits is not None:
                master_P = merge(values[piece], residual_bits[piece])
            grad_P = grad[piece].to(master_P.dtype) * scale
            first_P = first.read(piece)
            second_P = second.read(piece)
            torch._fused_adamw_(
                [master_P],
                [grad_P],
                [first_P],
                [second_P],
                [],
                [count],
                lr=self.lr,
                beta1=BETA1,
                beta2=self.beta2,
                weight_decay=decay,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
            )
            # an fp32 master is a view of the parameter, which has moved with it
            if residual_bits is not None:
                _split(master_P, values[piece], residual_bits[piece])
            first.write(piece, first_P)
            second.write(piece, second_P)

    def checksum(self, name: str) -> int:
        """Return a number that changes when the master of a parameter does."""
        halves = [self.parameters[name].detach()]
        if name in self.residual_bits:
            halves.append(self.residual_bits[name])
        sums = b""
        for half in halves:
            sums += _checksum(half).to_bytes(4, "big")
        return zlib.crc32(sums)

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments by kind and name."""
        found = {}
        for name, state in self.state.items():
            for key, moment in state.items():
                for suffix, tensor in moment.tensors().items():
                    found[f"{key}{suffix}/{name}"] = tensor
        return found

    def load(self, kinds: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Take what `tensors` yielded, as {kind: {name: tensor}}, after that many steps, however
        moments were kept."""
        self.steps = steps
        for name, state in self.state.items():
            for key, moment in state.items():
                stored = {}
                for suffix in ("", SCALE):
                    if name in kinds.get(key + suffix, {}):
                        stored[suffix] = kinds[key + suffix][name]
                _load_moment(moment, stored, signed=key == FIRST)
        for name, residual_bits in self.residual_bits.items():
            residual_bits.copy_(kinds["residual"][name])

    @torch.no_grad()
    def restore_fp32(self) -> None:
        """Put the fp32 masters back into the parameters; no step can follow."""
        # first the moments go, whose memory the masters need
        self.state = {}
        for name in list(self.residual_bits):
            parameter = self.parameters[name]
            residual_bits = self.residual_bits.pop(name)
            master = merge(parameter.data.view(-1), residual_bits.view(-1))
            parameter.data = master.view_as(parameter)


class FusedStep:
    """Steps each parameter as soon as its gradient is there, and adds up the norm on the way."""

    def __init__(self, optimizer: AdamW):
        self.optimizer = optimizer
        self.norms: list[Tensor] = []
        self.hooks = []
        for name, parameter in optimizer.parameters.items():
            hook = parameter.register_post_accumulate_grad_hook(partial(self._move, name))
            self.hooks.append(hook)

    def close(self) -> None:
        """Let the parameters be as they were."""
        for hook in self.hooks:
            hook.remove()

    def _move(self, name: str, parameter: Tensor) -> None:
        # Read at the end of the step alone: in the backward pass a GPU would wait each time
        self.norms.append(self.optimizer.norm_of(name))
        self.optimizer.move(name)
        parameter.grad = None

    def norm(self) -> float:
        """Return the gradient norm of the step just taken, and count it."""
        square = sum(norm.item() ** 2 for norm in self.norms)
        norm = math.sqrt(square)
        self.norms = []
        self.optimizer.steps += 1
        return norm


def merge(high_P: Tensor, residual_P: Tensor) -> Tensor:
    """Return the fp32 masters of bf16 numbers and their residual bits again, bit for bit."""
    high_bits_P = high_P.view(torch.int16).to(torch.int32) << 16
    bits_P = high_bits_P + residual_P.to(torch.int32)
    return bits_P.view(torch.float32)


@contextmanager
def gradients_in(
    parameters: Iterable[nn.Parameter], dtype: torch.dtype, fused: bool
) -> Iterator[None]:
    """Let gradients be summed in that dtype, in buffers that stay: made in between, they would
    break up the heap.

    `fused`: no buffers, as each gradient goes as soon as it was used.
    """
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad_dtype = dtype
        parameter.grad = None if fused else torch.zeros_like(parameter, dtype=dtype)
    try:
        yield
    finally:
        for parameter in parameters:
            # in this order: torch refuses a grad_dtype that differs from a gradient's
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype


@torch.no_grad()
def _round_to_bf16(parameter: nn.Parameter) -> Tensor:
    """Make an fp32 parameter bf16 in place; return the int16 residual bits."""
    master = parameter.data
    high = torch.empty_like(master, dtype=torch.bfloat16)
    residual_bits = torch.empty_like(master, dtype=torch.int16)
    flat = master.view(-1)
    flat_high = high.view(-1)
    flat_residual = residual_bits.view(-1)
    # in pieces, as the shifted bits of a whole matrix would be two more of its size
    for piece in _pieces(flat):
        _split(flat[piece], flat_high[piece], flat_residual[piece])
    parameter.data = high
    return residual_bits


def _split(master_P: Tensor, high_P: Tensor, residual_P: Tensor) -> None:
    """Write the bf16 nearest to each fp32 master (halves go up), and the signed difference of their
    bits."""
    bits_P = master_P.view(torch.int32)
    # bf16 is the upper half of fp32: half a unit of its last place is added, the rest cut off
    rounded_P = (bits_P + 0x8000) >> 16
    high_P.view(torch.int16).copy_(rounded_P)
    residual_P.copy_(bits_P - (rounded_P << 16))


def _load_moment(moment: Moment, stored: Mapping[str, Tensor], signed: bool) -> None:
    """Fill a moment with what `tensors` of one gave; of another kind it is rounded once."""
    own = moment.tensors()
    if own.keys() == stored.keys():
        for suffix, tensor in own.items():
            tensor.copy_(stored[suffix])
        return
    other = new_moment("int8" if SCALE in stored else "fp32", moment.kept, signed)
    _load_moment(other, stored, signed)
    for piece in _pieces(other.kept):
        moment.write(piece, other.read(piece))


def _pieces(flat_P: Tensor) -> Iterator[slice]:
    """Yield slices that make up a flat tensor, of as many elements as suits its device."""
    size = flat_P.numel()
    most = PIECE if flat_P.device.type == "cpu" else GPU_PIECE
    for start in range(0, size, most):
        yield slice(start, min(start + most, size))


def _grad_of(parameter: nn.Parameter) -> Tensor:
    """Return a gradient that is there: `gradients_in` or the backward pass has put it there."""
    assert parameter.grad is not None, "a parameter moves after its backward pass"  # noqa: S101
    return parameter.grad


def _checksum(tensor: Tensor) -> int:
    """Return a number of 32 bits that changes when a tensor does."""
    if tensor.device.type == "cpu":
        return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    # Bringing gigabytes over for it would take longer than a step
    return sum_of_bits(tensor)


def sum_of_bits(tensor: Tensor) -> int:
    """Return the sum of all numbers of a tensor of any shape, read as integers, in 32 bits."""
    kind = torch.int32 if tensor.dtype.itemsize == 4 else torch.int16
    total = tensor.view(kind).sum(dtype=torch.int64)
    return int(total.item()) % 2**32
