"""What torch hands to the two passes of an autograd.Function, as a type: torch itself leaves it
open."""

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """Carries tensors from the forward to the backward pass."""

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """Whether each argument of the forward pass needs a gradient."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What `save_for_backward` was given, of whatever shapes, None included."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep inputs, outputs and what lies between for the backward pass."""
