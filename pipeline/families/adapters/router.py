"""The router: an adapter that answers a request with its expert's label, read off one forward pass.

Invariant: only the labels' logits are looked at, so its answer is always an expert; how sure it is
has been fitted to requests it did not train on.

B requests, K labels, T tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel

from ...errors import DataError
from ...model.request_router import fit_temperature, nats
from ...store.reading import damaged, read_object
from .chat import Chat
from .media import Medium

CALIBRATION = "calibration.json"
# The least temperature. Never below 1: where validation has no mistake every smaller one fits
# better, down to any end, and says only that no mistake was seen. Too much confidence undoes
# thresholds, too little only asks one expert more.
LOWEST = 1.0


@dataclass(frozen=True)
class Calibration:
    """What turns label logits into a decision."""

    temperature: float
    # expert -> label, in the order of the logits; the none class last, where there is one
    labels: dict[str, str]
    instruction: str
    valid_nats: float | None = None  # before and after fitting, mean over the validation requests
    calibrated_nats: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Experts, and none, in the order of the logits."""
        return tuple(self.labels)

    def values(self) -> dict:
        """Return what calibration.json holds; labels as pairs, as their order counts and JSON's
        does not."""
        return asdict(self) | {"labels": [list(pair) for pair in self.labels.items()]}

    @classmethod
    def read(cls, folder: Path) -> "Calibration":
        """Read a router's calibration.json. Raises DamagedArtifact."""
        raw = read_object(folder / CALIBRATION)
        try:
            return cls(**raw | {"labels": dict(raw["labels"])})
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(folder / CALIBRATION, f"is no calibration ({error})") from None

    def probabilities(self, logits_BK: torch.Tensor) -> torch.Tensor:
        """Return p_BK of the labels."""
        return (logits_BK.float() / self.temperature).softmax(-1)


def routing_prompt(instruction: str, request: str) -> str:
    """Return what the router is asked about a request."""
    return f"{instruction} {request}" if instruction else request


def label_logits(
    model: PeftModel, inputs: Mapping[str, torch.Tensor], ids: Sequence[int]
) -> torch.Tensor:
    """Return logits_BK of the labels' tokens as the first of the answer; inputs are padded on the
    left."""
    with torch.no_grad():
        out = model(**inputs, logits_to_keep=1, use_cache=False)
    return out.logits[:, -1, list(ids)].float()


def ask(
    chat: Chat, instruction: str, requests: Iterable[tuple[str, Sequence[Medium]]]
) -> dict[str, torch.Tensor]:
    """Return what the router reads for (prompt, opened media) requests."""
    return chat.requests((routing_prompt(instruction, prompt), media) for prompt, media in requests)


def calibrate(
    logits_BK: torch.Tensor, targets: Sequence[int], instruction: str, labels: Mapping[str, str]
) -> Calibration:
    """Fit the temperature on validation requests; labels maps experts, and none, to labels. Raises
    DataError."""
    if not len(targets):
        raise DataError(
            "the routing set has no rows in the split valid, which the router's confidence is "
            "fitted on"
        )
    target_B = torch.tensor(targets)
    temperature = fit_temperature(logits_BK, target_B, LOWEST)
    return Calibration(
        temperature,
        dict(labels),
        instruction,
        nats(logits_BK, target_B),
        nats(logits_BK, target_B, temperature),
    )
