"""AdamW over fp32 masters, whatever dtype the network computes in and the moments are kept in.

A parameter that computes in bf16 keeps the 16 bits that rounding took from its master beside it:
together they are the fp32 number, so a master costs no memory of its own. The arithmetic is torch's
fused kernel on pieces of fp32.

P elements of a piece.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .optimizer_state import KINDS, SCALE

PIECE = 2**18  # elements whose master and moments are fp32 at a time: 4 MB of workspace
BETA1, EPSILON = 0.9, 1e-8


class AdamW:
    """The optimizer of a Task; matrices decay, vectors do not.

    `halved` names the parameters that compute in bf16. Decoupled decay as in 1711.05101.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        opts,
        bf16_params: Iterable[str] = (),
        moments: str = "fp32",
    ):
        self.parameters = parameters
        self.lr, self.beta2, self.weight_decay = opts.lr, opts.beta2, opts.weight_decay
        self.steps = 0
        self.residual_bits = {name: _halve(parameters[name]) for name in bf16_params}
        kind = KINDS[moments]
        self.state = {
            n: {"exp_avg": kind(p, True), "exp_avg_sq": kind(p, False)}
            for n, p in parameters.items()
        }

    def norm(self, names: Iterable[str] | None = None) -> float:
        """Return the norm of the gradients of the named parameters, all by default, summed in fp32."""
        grads = [self.parameters[name].grad for name in names or self.parameters]
        squares = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads if g is not None]
        return torch.linalg.vector_norm(torch.stack(squares)).item() if squares else 0.0

    def step(self, scale: float = 1.0) -> None:
        """Move every parameter by its gradient times scale, and clear the gradients; count a step."""
        for name, parameter in self.parameters.items():
            self.move(name, scale)
            parameter.grad.zero_()
        self.steps += 1

    @torch.no_grad()
    def move(self, name: str, scale: float = 1.0) -> None:
        """Move one parameter by its gradient times scale."""
        parameter, residual_bits, moments = (
            self.parameters[name],
            self.residual_bits.get(name),
            self.state[name].values(),
        )
        own, grad, size = parameter.data.view(-1), parameter.grad.view(-1), parameter.numel()
        count = torch.full((), self.steps + 1.0, device=parameter.device)
        decay = self.weight_decay if parameter.ndim >= 2 else 0.0
        for at in range(0, size, PIECE):
            piece = slice(at, min(at + PIECE, size))
            master_P = (
                own[piece]
                if residual_bits is None
                else merge(own[piece], residual_bits.view(-1)[piece])
            )
            first_P, second_P = (moment.read(piece) for moment in moments)
            torch._fused_adamw_(
                [master_P],
                [grad[piece].to(master_P.dtype) * scale],
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
            if residual_bits is not None:
                _split(master_P, own[piece], residual_bits.view(-1)[piece])
            for moment, moment_P in zip(moments, (first_P, second_P), strict=True):
                moment.write(piece, moment_P)

    def checksum(self, name: str) -> int:
        """Return a number that changes when the master of a parameter does."""
        restore_fp32 = [
            self.parameters[name].detach(),
            *([self.residual_bits[name]] if name in self.residual_bits else []),
        ]
        return zlib.crc32(b"".join(zlib.crc32(_raw(t)).to_bytes(4, "big") for t in restore_fp32))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the moments by kind and name."""
        return {
            f"{key}{suffix}/{name}": tensor
            for name, state in self.state.items()
            for key, moment in state.items()
            for suffix, tensor in moment.tensors().items()
        }

    def load(self, kinds: dict[str, dict[str, torch.Tensor]], steps: int) -> None:
        """Take what `tensors` yielded, as {kind: {name: tensor}}, after that many steps, however
        moments were kept."""
        self.steps = steps
        for name, state in self.state.items():
            for key, moment in state.items():
                found = {
                    end: kinds[key + end][name]
                    for end in ("", SCALE)
                    if name in kinds.get(key + end, {})
                }
                _take(moment, found, signed=key == "exp_avg")
        for name, residual_bits in self.residual_bits.items():
            residual_bits.copy_(kinds["low"][name])

    @torch.no_grad()
    def restore_fp32(self) -> None:
        """Put the fp32 masters back into the parameters; no step can follow."""
        self.state = {}
        for name in list(self.residual_bits):
            parameter, residual_bits = self.parameters[name], self.residual_bits.pop(name)
            parameter.data = merge(parameter.data.view(-1), residual_bits.view(-1)).view_as(
                parameter
            )


@torch.no_grad()
def _halve(parameter: nn.Parameter) -> torch.Tensor:
    """Make an fp32 parameter bf16 in place; return the int16 rest."""
    master = parameter.data
    high = torch.empty_like(master, dtype=torch.bfloat16)
    residual_bits = torch.empty_like(master, dtype=torch.int16)
    for at in range(0, master.numel(), PIECE):
        piece = slice(at, at + PIECE)
        _split(master.view(-1)[piece], high.view(-1)[piece], residual_bits.view(-1)[piece])
    parameter.data = high
    return residual_bits


def _split(master_P: torch.Tensor, high_P: torch.Tensor, low_P: torch.Tensor) -> None:
    """Write the bf16 nearest to each fp32 master (halves go up), and the signed difference of their
    bits."""
    bits_P = master_P.view(torch.int32)
    half_P = (bits_P + 0x8000) >> 16
    high_P.view(torch.int16).copy_(half_P)
    low_P.copy_(bits_P - (half_P << 16))


def _take(moment, stored: Mapping[str, torch.Tensor], signed: bool) -> None:
    """Fill a moment with what `tensors` of one gave; of another kind it is rounded once."""
    own = moment.tensors()
    if own.keys() == stored.keys():
        for suffix, tensor in own.items():
            tensor.copy_(stored[suffix])
        return
    other = KINDS["int8" if SCALE in stored else "fp32"](moment.kept, signed)
    _take(other, stored, signed)
    for at in range(0, other.kept.numel(), PIECE):
        piece = slice(at, min(at + PIECE, other.kept.numel()))
        moment.write(piece, other.read(piece))


def _raw(tensor: torch.Tensor):
    """Return a tensor's bytes without copying what is in main memory."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def merge(high_P: torch.Tensor, low_P: torch.Tensor) -> torch.Tensor:
    """Return the fp32 masters again, bit for bit."""
    bits_P = (high_P.view(torch.int16).to(torch.int32) << 16) + low_P.to(torch.int32)
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
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
