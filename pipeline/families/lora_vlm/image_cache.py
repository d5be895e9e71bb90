"""What the frozen vision tower makes of pictures: computed once per picture where they fit in
memory, else per batch.

Invariant: a picture's features do not depend on which batch asked first, so a resumed run sees the
same bits: blocks of pictures go through the tower together, and which block a picture is in follows
from its place and size alone.

N pictures, P patches, K tokens of one picture, D width.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures as Encoded,
)

from ...errors import DataError
from ...hardware import cores
from ..adapters.chat import Chat, TokenizedDataset

KEPT_BYTES = 512 * 10**6  # most memory that kept features may take
BLOCK_PATCHES = 1024  # patches that go through the tower together
READERS = 8  # most threads that open pictures


class Features:
    """The pictures of some lines as the language model reads them, kept when that takes at most
    `most_bytes`."""

    def __init__(self, core, lines: TokenizedDataset, most_bytes: int = KEPT_BYTES):
        self.core, self.chat, self.paths = core, lines.chat, lines.paths
        tokens = [lines.chat.image_tokens(*size) for size in lines.sizes]
        vision = core.config.vision_config
        layers = 1 + len(vision.deepstack_visual_indexes)
        needed = sum(tokens) * vision.out_hidden_size * layers * torch.finfo(core.dtype).bits // 8
        self.keep = needed <= most_bytes
        self.bytes = needed if self.keep else 0  # once all are kept
        self._block_of = _blocks(tokens, vision.spatial_merge_size**2)
        self._made: dict[int, tuple] = {}  # place -> what the language model reads

    def inputs(self, at: Sequence[int]) -> dict:
        """Return what the model takes for the pictures at some places: features when they are kept,
        else pixels."""
        if not at:
            return {}
        device = self.core.device
        if not self.keep:
            patches_P, grid_N3 = patches_of(self.chat, [self.paths[i] for i in at])
            return {"pixel_values": patches_P.to(device), "image_grid_thw": grid_N3.to(device)}
        found = [self._kept(i) for i in at]
        pooled, deep, grids = zip(*found, strict=True)
        encoded = Encoded(pooler_output=pooled, deepstack_features=list(zip(*deep, strict=True)))
        return {"mm_encoder_outputs": {"image": encoded}, "image_grid_thw": torch.stack(grids)}

    def _kept(self, place: int) -> tuple:
        if place not in self._made:
            self._made |= self._encoded(self._block_of[place])
        return self._made[place]

    @torch.no_grad()
    def _encoded(self, places: range) -> dict[int, tuple]:
        """Return place -> (features_KD, one features_KD per deepstack layer, grid)."""
        patches_P, grid_N3 = patches_of(self.chat, [self.paths[i] for i in places])
        grid_N3 = grid_N3.to(self.core.device)
        out = self.core.model.get_image_features(patches_P.to(self.core.device), grid_N3)
        deep = list(zip(*out.deepstack_features, strict=True)) or [()] * len(places)
        rows = zip(places, out.pooler_output, deep, grid_N3, strict=True)
        return {
            i: (one.clone(), tuple(d.clone() for d in layers), grid)
            for i, one, layers, grid in rows
        }


def patches_of(chat: Chat, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patches_P and grid_N3 of pictures on disk. Raises DataError."""
    if len(paths) > 1 and cores() > 1:
        with ThreadPoolExecutor(min(READERS, cores())) as pool:
            parts = list(pool.map(lambda path: chat.patches([opened_picture(path)]), paths))
        return torch.cat([p for p, _ in parts]), torch.cat([g for _, g in parts])
    return chat.patches([opened_picture(path) for path in paths])


def opened_picture(path: Path):
    """Return the picture of a row. Raises DataError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} was there when the rows were made and cannot be read now: {error}"
        ) from None


def _blocks(tokens: Sequence[int], patches_per_token: int) -> list[range]:
    """Return each picture's block: the places of consecutive pictures that have up to BLOCK_PATCHES
    together."""
    out, start, held = [], 0, 0
    for place, count in enumerate(tokens):
        patches = count * patches_per_token
        if held and held + patches > BLOCK_PATCHES:
            out += [range(start, place)] * (place - start)
            start, held = place, 0
        held += patches
    return out + [range(start, len(tokens))] * (len(tokens) - start)
