"""Who speaks each token of a text: heard while a mixture runs, and told as spans of one speaker.

B sequences, T tokens, N = B*T, E experts, K experts per token, D model width.
"""

from collections.abc import Callable, Sequence

import torch

from ...data.text.tokenizer import Tokenizer, alike
from ...model.router import Mixture
from ...report.schema.language import Span

# Who spoke each token of the pass that has just run, by row
Heard = Callable[[], list[list[str]]]


class Listener:
    """A mixture in the trunk's slot that computes the same, and hears whom its gates choose."""

    def __init__(self, mixture: Mixture, names: Sequence[str]):
        self.mixture = mixture
        self.names = tuple(names)
        self.total_BTE = torch.zeros(0)  # weight of each expert, all layers together

    def __call__(self, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
        router = self.mixture.router
        # Where there are no experts nobody is chosen
        if layer in router.place:
            if router.place[layer] == 0:
                # Another pass begins; fp64, as the endpoint adds up the weights of a token
                shape = (*x_BTD.shape[:2], len(self.names))
                self.total_BTE = torch.zeros(shape, dtype=torch.float64, device=x_BTD.device)
            index_NK, weight_NK = router.route(layer, x_BTD.flatten(0, -2))
            self.total_BTE.flatten(0, 1).scatter_add_(1, index_NK, weight_NK.double())
        return self.mixture(layer, x_BTD)

    def speakers(self) -> list[list[str]]:
        """Return of the last pass, by row and token, the expert with the most weight over all
        layers; of equal ones the first in the stack."""
        number_BT = self.total_BTE.argmax(-1)
        return [[self.names[number] for number in row] for row in number_BT.tolist()]


def spans(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    speakers: Sequence[str],
    before: Sequence[int] = (),
) -> tuple[Span, ...]:
    """Return the tokens of a text that stands after others as spans, whose texts put together are
    the text; a character that two speakers share is the last one's."""
    whole = tokenizer.decode(ids, before)
    out: list[Span] = []
    begin = 0
    told = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and speakers[end] == speakers[begin]:
            continue
        reached = len(whole)
        if end < len(ids):
            # What stands there already, without half a character and what a decoder adds at an end
            there = tokenizer.decode(ids[:end], before)
            reached = max(told, alike(there, whole))
        span = Span(speaker=speakers[begin], tokens=end - begin, text=whole[told:reached])
        out.append(span)
        begin = end
        told = reached
    return tuple(out)
