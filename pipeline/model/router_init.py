"""Sufficient statistics of an expert's inputs, and the gates that follow from them in closed form.

They are sums, so an expert can be added or removed, and its router fitted, without anyone's data.

B sequences, T tokens, N = B*T, D model width, E experts, M domains of a mixture, L layers, R rows
of a square.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .trunk import Ffn

# Share of the mean input's length: domains whose scores differ by less are one to a gate.
SAME_SHARE = 1e-4
# Of the mean squared input: what rounding may take from a covariance's least eigenvalue. Storing
# sums in fp32 takes 6e-8 times the width at most; as much as the ridge's penalty does no harm.
ROUNDED_SHARE = 1e-2
# Of every domain's square, whose mean is taken at a time
SQUARE_ROWS = 64


@dataclass
class DomainSums:
    """Sum of x per layer and domain, and tokens per domain, of a mixture whose row g is of domain
    g mod M."""

    sum_LMD: Tensor
    tokens_M: Tensor
    rows: int = 0

    def add(self, place: int, x_BTD: Tensor) -> None:
        """Add the next rows as the layer at `place` sees them; the layers come in order."""
        sequences, tokens, _ = x_BTD.shape
        domains = len(self.tokens_M)
        number_B = torch.arange(sequences, device=x_BTD.device)
        if place == 0:
            self.rows += sequences
        of_B = (self.rows - sequences + number_B) % domains
        sum_BD = x_BTD.float().sum(1).double()
        self.sum_LMD[place].index_add_(0, of_B, sum_BD)
        if place == 0:
            self.tokens_M += tokens * of_B.bincount(minlength=domains)


@dataclass
class FeatureStatistics:
    """Per layer: sum of x, sum of x x^T, and how many tokens, of a feed-forward network's input
    x."""

    sum_LD: Tensor
    gram_LDD: Tensor
    tokens: int = 0
    by_domain: DomainSums | None = None  # of a mixture that knows its rows' domains
    gram_tokens: int | None = None  # behind gram_LDD, where it is of more text than the rest

    @classmethod
    def empty(cls, layers: int, d_model: int, domains: int = 0) -> "FeatureStatistics":
        """Return zeros in fp64, which a billion tokens do not round away; with sums by domain where
        there are domains."""
        sum_LD = torch.zeros(layers, d_model, dtype=torch.float64)
        gram_LDD = torch.zeros(layers, d_model, d_model, dtype=torch.float64)
        if not domains:
            return cls(sum_LD, gram_LDD)
        sum_LMD = torch.zeros(layers, domains, d_model, dtype=torch.float64)
        tokens_M = torch.zeros(domains, dtype=torch.int64)
        return cls(sum_LD, gram_LDD, by_domain=DomainSums(sum_LMD, tokens_M))

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor]) -> "FeatureStatistics":
        """Return statistics from what `tensors` gave.

        gram_LDD stays as it is stored, fp32 and mapped: in fp64 those of a model of 8 B parameters
        are 5 GB an expert.
        """
        sum_LD = stored["sum"].double()
        gram_LDD = stored["gram"]
        tokens = stored["tokens"].item()
        by_domain = None
        if "domain_sum" in stored:
            by_domain = DomainSums(stored["domain_sum"].double(), stored["domain_tokens"])
        return cls(sum_LD, gram_LDD, int(tokens), by_domain)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored: sum_LD and gram_LDD in fp32, the token count; sums and tokens by
        domain where there are some."""
        tokens = torch.tensor([self.tokens], dtype=torch.int64)
        stored = {
            "sum": self.sum_LD.float(),
            "gram": self.gram_LDD.float(),
            "tokens": tokens,
        }
        if self.by_domain is not None:
            stored["domain_sum"] = self.by_domain.sum_LMD.float()
            stored["domain_tokens"] = self.by_domain.tokens_M
        return stored

    def observe(self, ffn: Ffn, layers: Sequence[int] | None = None) -> Ffn:
        """Return an ffn that adds every input x_BTD to the sums before `ffn` handles it.

        layers: the numbers of those that are summed, all by default.
        """
        if layers is None:
            layers = range(len(self.sum_LD))
        place_of = {layer: place for place, layer in enumerate(layers)}

        def observed(layer: int, x_BTD: Tensor) -> Tensor:
            place = place_of.get(layer)
            if place is None:
                return ffn(layer, x_BTD)
            x_ND = x_BTD.detach().flatten(0, -2).float()
            # where the inputs are: a GPU that hands over every layer's sums waits for each
            self._move_to(x_ND.device)
            # autocast would round the products to bf16
            with torch.autocast(x_ND.device.type, enabled=False):
                self.sum_LD[place] += x_ND.sum(0)
                self.gram_LDD[place] += x_ND.T @ x_ND
            if self.by_domain is not None:
                self.by_domain.add(place, x_BTD.detach())
            # a token passes every layer and is counted in the first
            if place == 0:
                self.tokens += x_ND.shape[0]
            return ffn(layer, x_BTD)

        return observed

    def of_layers(self, layers: Sequence[int]) -> "FeatureStatistics":
        """Return the statistics of some of the layers alone; of layers in a row they are not
        copied."""
        chosen: slice | list[int] = list(layers)
        if in_a_row(layers):
            # A view, so that what is mapped stays so: all layers are this too
            chosen = slice(layers[0], layers[-1] + 1)
        by_domain = None
        if self.by_domain is not None:
            by_domain = replace(self.by_domain, sum_LMD=self.by_domain.sum_LMD[chosen])
        return replace(
            self,
            sum_LD=self.sum_LD[chosen],
            gram_LDD=self.gram_LDD[chosen],
            by_domain=by_domain,
        )

    def without(self, gone: Collection[int]) -> "FeatureStatistics":
        """Return the statistics of the mixture less the domains of those numbers.

        Sums are exact. The mean x x^T stays that of the whole mixture: it says how inputs are
        spread, not of which class they are, and is not kept by domain, as it is D times as large.
        Without sums by domain, or with nothing left, the statistics are returned as they are.
        """
        if self.by_domain is None:
            return self
        left = [m for m in range(len(self.by_domain.tokens_M)) if m not in gone]
        if not left:
            return self
        tokens = int(self.by_domain.tokens_M[left].sum())
        sum_LD = self.by_domain.sum_LMD[:, left].sum(1)
        return FeatureStatistics(sum_LD, self.gram_LDD, tokens, gram_tokens=self.tokens)

    def around(self, sum_LD: Tensor, tokens: int) -> "FeatureStatistics":
        """Return statistics of other text of which the means alone are known: spread as this text
        is, around means of its own.

        E[x x^T] = Cov + mean mean^T, and one covariance for all classes is what linear
        discriminant analysis assumes of them.
        """
        gram_LDD = torch.empty_like(self.gram_LDD)
        for place, mean_D in enumerate(sum_LD / tokens):
            own_D = self.mean_LD[place]
            spread_DD = self.mean_gram_DD(place) - torch.outer(own_D, own_D)
            gram_LDD[place] = (spread_DD + torch.outer(mean_D, mean_D)) * tokens
        return FeatureStatistics(sum_LD, gram_LDD, tokens)

    def is_possible(self) -> bool:
        """Whether there is text with these sums: inputs of which they are the mean and the mean
        product with themselves have a covariance, which is symmetric and shortens no direction
        below zero, rounding to fp32 allowed for."""
        for place, mean_D in enumerate(self.mean_LD):
            gram_DD = self.mean_gram_DD(place)
            allowed = ROUNDED_SHARE * gram_DD.diagonal().mean()
            if not (gram_DD - gram_DD.mT).abs().max() <= allowed:
                return False
            spread_DD = gram_DD - torch.outer(mean_D, mean_D)
            spread_DD.diagonal().add_(allowed)
            # What has a Cholesky factor, and nothing else, is positive definite
            if torch.linalg.cholesky_ex(spread_DD).info:
                return False
        return True

    def on_processor(self) -> "FeatureStatistics":
        """Return these statistics with their sums in main memory, where gates are made."""
        self._move_to(torch.device("cpu"))
        return self

    def _move_to(self, device: torch.device) -> None:
        self.sum_LD = self.sum_LD.to(device)
        self.gram_LDD = self.gram_LDD.to(device)
        if self.by_domain is not None:
            self.by_domain.sum_LMD = self.by_domain.sum_LMD.to(device)
            self.by_domain.tokens_M = self.by_domain.tokens_M.to(device)

    @property
    def mean_LD(self) -> Tensor:
        """Mean input per layer."""
        return self.sum_LD / max(1, self.tokens)

    def mean_gram_DD(self, place: int) -> Tensor:
        """Return the mean x x^T of one layer, in fp64."""
        mean_DD = torch.empty_like(self.gram_LDD[place], dtype=torch.float64)
        return self.mean_gram_into(place, slice(None), mean_DD)

    def mean_gram_into(self, place: int, rows: slice, mean_RD: Tensor) -> Tensor:
        """Write some rows of the mean x x^T of one layer to mean_RD, in fp64, and return it."""
        tokens = self.tokens if self.gram_tokens is None else self.gram_tokens
        return mean_RD.copy_(self.gram_LDD[place, rows]).div_(max(1, tokens))


def in_a_row(layers: Sequence[int]) -> bool:
    """Whether layers follow one another without a gap."""
    return bool(layers) and list(layers) == list(range(layers[0], layers[-1] + 1))


def uniform(statistics: Sequence[FeatureStatistics]) -> Tensor:
    """Return weight_LED of zeros: every expert equally likely."""
    layers, d_model = statistics[0].sum_LD.shape
    return torch.zeros(layers, len(statistics), d_model)


def random(statistics: Sequence[FeatureStatistics], std: float = 0.02) -> Tensor:
    """Return weight_LED drawn from N(0, std^2)."""
    return torch.randn_like(uniform(statistics)) * std


def centroid(statistics: Sequence[FeatureStatistics], margin: float) -> Tensor:
    """Return weight_LED of each domain's mean input, less the mean over domains, scaled to
    `margin`."""
    mean_LED = torch.stack([domain.mean_LD for domain in statistics], 1)
    # what all domains share tells none of them apart, and is most of a mean input's length
    centred_LED = mean_LED - mean_LED.mean(1, keepdim=True)
    weight_LED = normalize(centred_LED, dim=-1)
    return _scale_to_margin(weight_LED, mean_LED, margin)


def ridge(statistics: Sequence[FeatureStatistics], penalty: float, margin: float) -> Tensor:
    """Return weight_LED of the ridge regression from input to domain (DUME, 2603.29765), scaled to
    `margin`.

    Every domain weighs the same whatever its tokens; rows have equal length, as in the paper.
    penalty is relative to the mean squared input.
    """
    mean_LED = torch.stack([domain.mean_LD for domain in statistics], 1)
    # What is as large as a square is made once. Anew for each layer and expert, such blocks left
    # holes in the heap that took twice what was in use.
    d_model = mean_LED.shape[-1]
    gram_DD = mean_LED.new_empty(d_model, d_model)
    # LAPACK has columns together, hence the transpose
    factors_DD = torch.empty_like(gram_DD).mT
    pivots_D = torch.empty(d_model, dtype=torch.int32)
    rows_ERD = mean_LED.new_empty(len(statistics), SQUARE_ROWS, d_model)
    solved = []
    for place, mean_ED in enumerate(mean_LED):
        _mean_over(statistics, place, rows_ERD, gram_DD)
        diagonal_D = gram_DD.diagonal()
        diagonal_D.add_(penalty * diagonal_D.mean())
        # What torch.linalg.solve does, less the square that it makes for the factors
        torch.linalg.lu_factor(gram_DD.mT, out=(factors_DD, pivots_D))
        weight_DE = torch.linalg.lu_solve(factors_DD, pivots_D, mean_ED.mT, adjoint=True)
        solved.append(weight_DE.mT)
    weight_LED = normalize(torch.stack(solved), dim=-1)
    return _scale_to_margin(weight_LED, mean_LED, margin)


def _mean_over(
    statistics: Sequence[FeatureStatistics], place: int, rows_ERD: Tensor, gram_DD: Tensor
) -> None:
    """Write the mean over domains of a layer's mean x x^T to gram_DD, R rows of all at a time."""
    step = rows_ERD.shape[1]
    for first in range(0, len(gram_DD), step):
        rows = slice(first, first + step)
        mean_RD = gram_DD[rows]
        grams_ERD = rows_ERD[:, : len(mean_RD)]
        for domain, gram_RD in zip(statistics, grams_ERD, strict=True):
            domain.mean_gram_into(place, rows, gram_RD)
        torch.mean(grams_ERD, 0, out=mean_RD)


def _scale_to_margin(weight_LED: Tensor, mean_LED: Tensor, margin: float) -> Tensor:
    """Scale each layer so that a domain's mean input gives its own expert `margin` nats more than
    the others.

    A layer that cannot tell the domains apart is left as it is.
    """
    score_LEE = mean_LED @ weight_LED.mT  # domain x expert
    n_experts = score_LEE.shape[1]
    own_L = score_LEE.diagonal(dim1=1, dim2=2).mean(1)
    # with one expert there are no others: the division is by 1 and the scale is not used
    all_L = score_LEE.sum((1, 2)) / n_experts
    others_L = (all_L - own_L) / max(1, n_experts - 1)
    gap_L = own_L - others_L
    # a smaller gap is rounding, and scaling would amplify it
    length_L = mean_LED.norm(dim=-1).mean(1)
    distinct_L = gap_L > SAME_SHARE * length_L
    scale_L = torch.where(distinct_L & (n_experts > 1), margin / gap_L, 1.0)
    return (weight_LED * scale_L[:, None, None]).float()
