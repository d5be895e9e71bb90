"""What the frozen vision tower makes of a split's pictures: computed once per picture where they
fit in memory, else per batch.

Invariant: a picture's features do not depend on which batch asked first, so a resumed run sees the
same bits: blocks of pictures go through the tower together, and which block a picture is in follows
from its place and size alone.

B rows, N pictures, P patches, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters.media import FeatureCache
from .vision import ImageFeatures, Images

KEPT_BYTES = 512 * 10**6  # most memory that kept features may take
BUDGET_PARTS = 10  # one part of the job's memory budget is for kept features
BLOCK_PATCHES = 1024  # patches that go through the tower together
POSITIONS_KEPT = 8192  # of rows that differ in what positions depend on


class CachedImages(Images):
    """Pictures whose features are kept while an adapter trains."""

    def feature_cache(
        self,
        core: PreTrainedModel,
        paths: Sequence[Path],
        tokens: Sequence[int],
        *,
        encoder_trains: bool,
        memory_budget: int | None,
    ) -> "ImageCache":
        """Return the pictures of a split, by their files and tokens, for training."""
        most_bytes = KEPT_BYTES
        if memory_budget is not None:
            most_bytes = min(KEPT_BYTES, memory_budget // BUDGET_PARTS)
        if encoder_trains:
            most_bytes = -1  # not even a split without pictures is kept, as its need of 0 would be
        return ImageCache(core, self, paths, tokens, most_bytes)


class ImageCache(FeatureCache):
    """The pictures of one split as the language model reads them, kept when that takes at most
    `most_bytes`."""

    def __init__(
        self,
        core: PreTrainedModel,
        images: Images,
        paths: Sequence[Path],
        tokens: Sequence[int],
        most_bytes: int = KEPT_BYTES,
    ):
        self.core = core
        self.images = images
        self.paths = paths
        vision = core.config.vision_config
        layers = 1 + len(vision.deepstack_visual_indexes)
        number_bytes = torch.finfo(core.dtype).bits // 8
        needed = sum(tokens) * vision.out_hidden_size * layers * number_bytes
        self.keep = needed <= most_bytes
        self.bytes = needed if self.keep else 0  # once all are kept
        self._block_of = _blocks(tokens, vision.spatial_merge_size**2)
        self._kept: dict[int, ImageFeatures] = {}  # by place
        of_model = partial(_positions_of_row, core.model)
        self._positions_of_row = lru_cache(POSITIONS_KEPT)(of_model)

    def inputs(
        self, text: Mapping[str, torch.Tensor], media: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Return what the model takes for a batch's pictures, and the positions of its tokens."""
        places = [place for row in media for place in row]
        inputs = self.pictures(places)
        if inputs:
            grids = map(tuple, inputs["image_grid_thw"].tolist())
            of_rows = []
            for row in media:
                of_rows.append(tuple(next(grids) for _ in row))
            inputs["position_ids"] = self._positions(text, of_rows)
        return inputs

    def pictures(self, places: Sequence[int]) -> dict[str, Any]:
        """Return what the model takes for the pictures at some places: features when they are kept,
        else pixels."""
        if not places:
            return {}
        if self.keep:
            features = [self._features(place) for place in places]
            return self.images.feature_inputs(features)
        paths = [self.paths[i] for i in places]
        patches_P, grid_N3 = self.images.patches_of_files(paths)
        return {"pixel_values": patches_P, "image_grid_thw": grid_N3}

    def _features(self, place: int) -> ImageFeatures:
        if place not in self._kept:
            self._encode(self._block_of[place])
        return self._kept[place]

    @torch.no_grad()
    def _encode(self, places: range) -> None:
        """Keep the features of a block of pictures."""
        paths = [self.paths[i] for i in places]
        prepared = self.images.patches_of_files(paths)
        encoded = self.images.encode(self.core, prepared)
        for place, features in zip(places, encoded, strict=True):
            # or each picture would hold the output of its whole block
            self._kept[place], _ = self.images.detached(features)

    def _positions(
        self, text: Mapping[str, torch.Tensor], grids: Sequence[tuple[tuple[int, ...], ...]]
    ) -> torch.Tensor:
        """Return position_ids [3, B, T]: the model's own, looked up by what they depend on, as it
        is slow at them."""
        types_BT = text["mm_token_type_ids"]
        lengths = text["attention_mask"].sum(1).tolist()
        out_3BT = torch.zeros(3, *types_BT.shape, dtype=torch.long)
        for i, tokens in enumerate(lengths):
            types_T = types_BT[i, :tokens]
            found_3T = self._positions_of_row(types_T.numpy().tobytes(), grids[i])
            out_3BT[:, i, :tokens] = found_3T
        return out_3BT


def _positions_of_row(
    inner: Any,
    types: bytes,
    grids: tuple[tuple[int, ...], ...],
) -> torch.Tensor:
    """Return the [3, T] positions of one row without padding; types are its mm_token_type_ids,
    int32 as bytes, which can be the key of a cache."""
    # a bytearray, as torch warns of memory that it may not write to
    types_T = torch.frombuffer(bytearray(types), dtype=torch.int32)
    types_1T = types_T.unsqueeze(0)
    grid_N3 = torch.tensor(grids) if grids else None
    # ids are asked for and only their shape is looked at
    positions_31T, _ = inner.get_rope_index(types_1T.long(), types_1T, image_grid_thw=grid_N3)
    return positions_31T[:, 0]


def _blocks(tokens: Sequence[int], patches_per_token: int) -> list[range]:
    """Return each picture's block: the places of consecutive pictures that have up to BLOCK_PATCHES
    together."""
    out: list[range] = []
    start = 0
    total = 0
    for place, count in enumerate(tokens):
        patches = count * patches_per_token
        if total and total + patches > BLOCK_PATCHES:
            # the same block for each picture in it
            out += [range(start, place)] * (place - start)
            start = place
            total = 0
        total += patches
    end = len(tokens)
    return out + [range(start, end)] * (end - start)
