"""What a request may come with beside its text, as the code of adapters sees it.

`Media` is that of a family whose requests are text alone: nothing to open, nothing to encode. A
family whose base reads pictures or sounds derives from it; all that knows what they are stands
there.

B requests, P prepared pieces of media, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ...data.routing.dataset import RoutingRow
from ...data.tasks.rows import TaskRow
from .sections import AdapterConfig

# An opened medium, and media made ready for the base's encoder. Only the family that made one looks
# into it, so there is no type that all families share.
Medium = Any
Prepared = Any


class MediaFeatures(Protocol):
    """What the base's encoder makes of one medium, shared by every adapter that reads it."""

    @property
    def tokens(self) -> int:
        """Tokens that it takes the place of."""


class FeatureCache:
    """The media of one split in training. This one is of text alone: there are none."""

    bytes = 0  # held once all is kept
    keep = True  # whether features are computed once rather than in every batch

    def inputs(self, text: Mapping[str, torch.Tensor], media: Sequence[Sequence[int]]) -> dict:
        """Return what the model takes beside a batch's tokens.

        `text` is the batch as `Chat.tensors` makes it, `media` the places of each row's media among
        those of the split.
        """
        return {}


class Media:
    """How a family opens, counts and encodes what requests come with; here: they come with none."""

    name = "attachment"  # of one medium, in messages and in what a bundle says of its limits
    shorten_hint = ""  # how else than by max_tokens rows can be made to fit, for messages
    placeholder: str | None = None  # what stands for one medium until it is expanded
    placeholder_id: int | None = None  # its token
    # changes that should not change who answers, by the name that the report gives them
    perturbations: Mapping[str, Callable[[Medium], Medium]] = {}

    def content(self, text: str, count: int) -> str | list[dict]:
        """Return the content of a chat message with a text and so many media."""
        return text

    def paths(self, folder: Path, row: TaskRow | RoutingRow) -> tuple[Path, ...]:
        """Return where the media of a row are; folder is that of the rows."""
        return ()

    def open_row(self, folder: Path, row: TaskRow | RoutingRow) -> list[Medium]:
        """Return the media of a row, opened and checked. Raises DataError."""
        return []

    def open(self, path: Path) -> Medium:
        """Return the medium in a file that `paths` named. Raises DataError."""
        raise NotImplementedError

    def file_tokens(self, path: Path) -> int:
        """Return the tokens of the medium in a file, without reading all of it."""
        raise NotImplementedError

    def tokens(self, medium: Medium) -> int:
        """Return the tokens of an opened medium. Raises DataError for one that cannot be read."""
        raise NotImplementedError

    def thumbnail(self, medium: Medium) -> str | None:
        """Return a small copy of a medium for the report, a data: URI of a JPEG; None where it
        cannot be seen."""
        return None

    def token_inputs(self, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the model takes for each token beside its id and the mask."""
        return {}

    def raw_inputs(self, media: Sequence[Medium]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return what the model takes for media that it is to encode itself, and the tokens of
        each."""
        return {}, []

    def batches(self, media: Sequence[Medium]) -> Iterator[Prepared]:
        """Yield media, in order, in pieces that the encoder takes at once."""
        return iter(())

    def encode(self, core: PreTrainedModel, prepared: Prepared) -> Iterator[MediaFeatures]:
        """Yield the features of each medium of a piece that `batches` gave."""
        return iter(())

    def digest(self, medium: Medium) -> str:
        """Return a digest of all that the encoder sees of a medium."""
        raise NotImplementedError

    def detached(self, features: Any) -> tuple[Any, int]:
        """Return features of one medium that hold no memory of others, and their bytes."""
        raise NotImplementedError

    def feature_inputs(self, features: Sequence[Any]) -> dict:
        """Return what the model takes for media that `encode` gave the features of, one after
        another over the rows of a batch."""
        return {}

    def cut(self, features: Sequence[Any], first: int, end: int) -> list[Any]:
        """Return what some tokens of a row's media read, counted over all of them; for
        `feature_inputs` of a pass over a part of the row."""
        return []

    def positions(
        self, core: PreTrainedModel, ids: Sequence[int], features: Sequence[Any]
    ) -> torch.Tensor | None:
        """Return the position of each token of a row as the model counts them, [3, T]; None where
        they are counted one after another. What follows goes on after the largest."""
        return None

    def feature_cache(
        self,
        core: PreTrainedModel,
        paths: Sequence[Path],
        tokens: Sequence[int],
        *,
        encoder_trains: bool,
        memory_budget: int | None,
    ) -> FeatureCache:
        """Return the media of a split, by their files and tokens, for training.

        Features of an encoder that trains must not be kept, as they change; memory_budget is the
        job's, bytes.
        """
        return FeatureCache()

    def changed_by(self, core: PreTrainedModel) -> frozenset[str]:
        """Return the adapters that have weights in the encoder, so that what it makes of a medium
        depends on who asks."""
        return frozenset()

    def check_targets(self, modules: Sequence[str], options: AdapterConfig, where: str) -> None:
        """Raise ConfigError when an adapter's modules reach into the encoder and may not; `where`
        is the setting with its options."""
