"""What a joint training adds up between two validations, and what a validation adds up.

L layers with a mixture, E experts, N tokens of a pass, K experts per token.
"""

from functools import partial

import torch
from torch import Tensor

from ....model.router import Router

LOSSES = ("total", "ce", "aux")


class TrainingSums:
    """Losses and choices of every row trained on since the last validation.

    Sums stand in tensors, which a checkpoint keeps, in fp64: an epoch that was interrupted has the
    means of one that was not, to the last bit.
    """

    def __init__(self, router: Router | None, device: str):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.router = router
        self.rows = zeros(())
        self.losses = zeros(len(LOSSES))
        self.state = {"epoch_rows": self.rows, "epoch_losses": self.losses}
        if router is not None:
            layers, experts = router.count_LE.shape
            self.count_LE = zeros((layers, experts))
            self.dropped_L = zeros(layers)
            self.state |= {"epoch_count": self.count_LE, "epoch_dropped": self.dropped_L}

    def add_pass(self, rows: int, total: Tensor, ce: Tensor, aux: Tensor) -> None:
        """Add the mean losses, scalars, of a forward pass over so many rows."""
        self.rows += rows
        self.losses += rows * torch.stack([total, ce, aux]).detach().double()
        if self.router is not None:
            dropped_L = torch.stack([each.dropped for each in self.router.stats.values()])
            self.dropped_L += rows * dropped_L.double()

    def end_step(self) -> None:
        """Add the choices of the step that was just taken."""
        if self.router is not None:
            self.count_LE += self.router.count_LE.double()
            self.router.end_step(0.0)

    def told(self) -> dict:
        """Return the figures since the last validation, and begin anew; none without a row."""
        rows = self.rows.item()
        if not rows:
            return {}
        means = (self.losses / rows).tolist()
        found: dict = {f"train_{name}": mean for name, mean in zip(LOSSES, means, strict=True)}
        if self.router is not None:
            share_LE = shares(self.count_LE)
            entropy_L = entropies(share_LE)
            dropped_L = (self.dropped_L / rows).tolist()
            of_layers = {}
            for place, layer in enumerate(self.router.layers):
                of_layers[str(layer)] = {
                    "shares": share_LE[place].tolist(),
                    "entropy": entropy_L[place].item(),
                    "dropped": dropped_L[place],
                }
            found["experts"] = {"layer": of_layers}
        for sums in self.state.values():
            sums.zero_()
        return found


class ValidationSums:
    """Choices and probabilities of the tokens of a validation, which a router tells of."""

    def __init__(self, router: Router):
        self.router = router
        self.count_LE = torch.zeros_like(router.count_LE, dtype=torch.float64)
        self.probability_LE = torch.zeros_like(self.count_LE)

    def __call__(self, layer: int, logits_NE: Tensor, index_NK: Tensor) -> None:
        place = self.router.place[layer]
        experts = logits_NE.shape[1]
        self.count_LE[place] += index_NK.flatten().bincount(minlength=experts)
        self.probability_LE[place] += logits_NE.double().softmax(-1).sum(0)

    def balance_loss(self) -> float:
        """Return what Router.balance_loss is over all of the validation's tokens."""
        experts = self.count_LE.shape[1]
        probability_LE = shares(self.probability_LE)
        agreement_L = (shares(self.count_LE) * probability_LE).sum(1)
        return (experts * agreement_L).mean().item()


def shares(sum_LE: Tensor) -> Tensor:
    """Return share_LE of each layer's sum; zeros where nothing was added up."""
    total_L1 = sum_LE.sum(1, keepdim=True)
    return sum_LE / torch.where(total_L1 > 0, total_L1, 1.0)


def entropies(share_LE: Tensor) -> Tensor:
    """Return entropy_L, in nats; an expert without tokens adds nothing."""
    return -torch.xlogy(share_LE, share_LE).sum(1)
