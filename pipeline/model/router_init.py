"""Sufficient statistics of an expert's inputs, and the gates that follow from them in closed form.

They are sums, so an expert can be added or removed, and its router fitted, without anyone's data.

B sequences, T tokens, N = B*T, D model width, E experts, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SAME_SHARE = 1e-4  # of the mean input's length: domains that differ by less are one to a gate


@dataclass
class FeatureStatistics:
    """Per layer: sum of x, sum of x x^T, and how many tokens, of a feed-forward network's input x."""

    sum_LD: torch.Tensor
    gram_LDD: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, layers: int, d_model: int) -> "FeatureStatistics":
        """Return zeros in fp64, which a billion tokens do not round away."""
        zeros = torch.zeros(layers, d_model, d_model + 1, dtype=torch.float64)
        return cls(zeros[..., 0].clone(), zeros[..., 1:].clone())

    def observe(self, ffn):
        """Return a fill that adds every input x_BTD to the sums before `fill` handles it."""

        def watched(layer, x_BTD):
            x_ND = x_BTD.detach().flatten(0, -2).float()
            with torch.autocast(
                x_ND.device.type, enabled=False
            ):  # it would round the products to bf16
                self.sum_LD[layer] += x_ND.sum(0).cpu()
                self.gram_LDD[layer] += (x_ND.T @ x_ND).cpu()
            self.tokens += x_ND.shape[0] if layer == 0 else 0
            return ffn(layer, x_BTD)

        return watched

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is stored: sum_LD and gram_LDD in fp32, the token count."""
        counts = torch.tensor([self.tokens], dtype=torch.int64)
        return {"sum": self.sum_LD.float(), "gram": self.gram_LDD.float(), "tokens": counts}

    @classmethod
    def from_tensors(cls, stored: dict[str, torch.Tensor]) -> "FeatureStatistics":
        """Return statistics from what `tensors` gave."""
        return cls(stored["sum"].double(), stored["gram"].double(), int(stored["tokens"][0]))

    @property
    def mean_LD(self) -> torch.Tensor:
        """Mean input per layer."""
        return self.sum_LD / max(1, self.tokens)


def uniform(parts: Sequence[FeatureStatistics]) -> torch.Tensor:
    """Return weight_LED of zeros: every expert equally likely."""
    layers, d_model = parts[0].sum_LD.shape
    return torch.zeros(layers, len(parts), d_model)


def random(parts: Sequence[FeatureStatistics], std: float = 0.02) -> torch.Tensor:
    """Return weight_LED drawn from N(0, std^2)."""
    return torch.randn_like(uniform(parts)) * std


def centroid(parts: Sequence[FeatureStatistics], margin: float) -> torch.Tensor:
    """Return weight_LED of each domain's mean input, less the mean over domains, scaled to
    `margin`."""
    mean_LED = torch.stack([p.mean_LD for p in parts], 1)
    centred_LED = mean_LED - mean_LED.mean(1, keepdim=True)
    return _scaled(torch.nn.functional.normalize(centred_LED, dim=-1), mean_LED, margin)


def ridge(parts: Sequence[FeatureStatistics], penalty: float, margin: float) -> torch.Tensor:
    """Return weight_LED of the ridge regression from input to domain (DUME, 2603.29765), scaled to
    `margin`.

    Every domain weighs the same whatever its tokens; rows have equal length, as in the paper.
    penalty is relative to the mean squared input.
    """
    gram_LDD = torch.stack([p.gram_LDD / max(1, p.tokens) for p in parts]).mean(0)
    mean_LED = torch.stack([p.mean_LD for p in parts], 1)
    power_L = gram_LDD.diagonal(dim1=1, dim2=2).mean(1)
    eye_DD = torch.eye(gram_LDD.shape[1], dtype=gram_LDD.dtype)
    solved_LDE = torch.linalg.solve(
        gram_LDD + penalty * power_L[:, None, None] * eye_DD, mean_LED.mT
    )
    return _scaled(torch.nn.functional.normalize(solved_LDE.mT, dim=-1), mean_LED, margin)


def _scaled(weight_LED: torch.Tensor, mean_LED: torch.Tensor, margin: float) -> torch.Tensor:
    """Scale each layer so that a domain's mean input gives its own expert `margin` nats more than
    the others.

    A layer that cannot tell the domains apart is left as it is.
    """
    score_LEE = mean_LED @ weight_LED.mT  # domain x expert
    experts = score_LEE.shape[1]
    own_L = score_LEE.diagonal(dim1=1, dim2=2).mean(1)
    others_L = (score_LEE.sum((1, 2)) / experts - own_L) / max(1, experts - 1)
    gap_L = own_L - others_L
    distinct_L = gap_L > SAME_SHARE * mean_LED.norm(dim=-1).mean(
        1
    )  # below it, scaling would amplify rounding
    scale_L = torch.where(distinct_L & (experts > 1), margin / gap_L, 1.0)
    return (weight_LED * scale_L[:, None, None]).float()
