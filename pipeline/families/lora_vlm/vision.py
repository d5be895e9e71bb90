"""Pictures as a Qwen3-VL reads them: opened, counted in tokens, and encoded by its vision tower.

N pictures, P patches, T tokens of one picture, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures as Encoded,
)

from ...data.images.images import open_checked
from ...data.routing.dataset import RoutingRow
from ...data.tasks.rows import TaskRow
from ...errors import ConfigError, DataError
from ...hardware import cores
from ..adapters.config import AdapterConfig
from ..adapters.media import Media
from .perturb import PERTURBATIONS

TOWER_PATCHES = 16_384  # that go through the vision tower together
READERS = 8  # most threads that open pictures


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower makes of one picture."""

    grid: tuple[int, int, int]  # frames, rows and columns of patches
    embed_TD: torch.Tensor
    deep: tuple[torch.Tensor, ...]  # (T, D) per layer that takes them in

    @property
    def tokens(self) -> int:
        """Tokens that the picture takes."""
        return len(self.embed_TD)


class Images(Media):
    """A processor's way from pictures to what a Qwen3-VL reads."""

    name = "image"
    shorten_hint = ", or lower loras.base.image.max_pixels"
    perturbations = PERTURBATIONS

    def __init__(self, processor: Any):
        self.processor = processor
        self.preparation = processor.image_processor
        self.placeholder_id = processor.image_token_id

    def content(self, text: str, count: int) -> list[dict]:
        """Return the content of a message: its pictures, then its text."""
        images: list[dict] = [{"type": "image"}] * count
        return [*images, {"type": "text", "text": text}]

    def paths(self, folder: Path, row: TaskRow | RoutingRow) -> tuple[Path, ...]:
        """Return where a row's pictures are."""
        return tuple(folder / name for name in row.images)

    def open_row(self, folder: Path, row: TaskRow | RoutingRow) -> list[Image.Image]:
        """Return a row's pictures, decoded and checked. Raises DataError."""
        # a task's pictures lie beside its rows; the routing set's are those of other artifacts
        root = folder if isinstance(row, TaskRow) else None
        out = []
        for name in row.images:
            out.append(open_checked(name, root=root) if root else open_checked(folder / name))
        return out

    def open(self, path: Path) -> Image.Image:
        """Return the picture in a file. Raises DataError."""
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} was there when the rows were made and cannot be read now: {error}"
            ) from None

    def file_tokens(self, path: Path) -> int:
        """Return the tokens of the picture in a file, from its header."""
        with Image.open(path) as image:
            return self.size_tokens(*image.size)

    def size_tokens(self, width: int, height: int) -> int:
        """Return the tokens of a picture of that size, px. Raises ValueError when it is too long
        and thin."""
        patches = self.preparation.get_number_of_image_patches(height, width, {})
        return patches // self.preparation.merge_size**2

    def tokens(self, medium: Image.Image) -> int:
        """Return a picture's tokens. Raises DataError when it is too long and thin."""
        try:
            return self.size_tokens(*medium.size)
        except ValueError as error:
            raise DataError(
                f"an image of {medium.width} x {medium.height} px cannot be read: {error}"
            ) from None

    def patches(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixel_values [P, values] of pictures one after another, and image_grid_thw
        [N, 3]."""
        out = self.preparation(images=list(images), return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def patches_of_files(self, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same of pictures on disk. Raises DataError."""
        if len(paths) == 1 or cores() == 1:
            return self.patches([self.open(path) for path in paths])
        # decoding and resizing leave Python's lock to others
        with ThreadPoolExecutor(min(READERS, cores())) as pool:
            parts = list(pool.map(lambda path: self.patches([self.open(path)]), paths))
        patches_P = torch.cat([patches for patches, _ in parts])
        grid_N3 = torch.cat([grid for _, grid in parts])
        return patches_P, grid_N3

    def token_inputs(self, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return mm_token_type_ids [B, T]: 1 where a picture stands."""
        return {"mm_token_type_ids": (ids_BT == self.placeholder_id).int()}

    def raw_inputs(self, media: Sequence[Image.Image]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return the pictures' patches as the model takes them, and the tokens of each."""
        if not media:
            return {}, []
        patches_P, grid_N3 = self.patches(media)
        merged = self.preparation.merge_size**2
        tokens = [int(count) // merged for count in grid_N3.prod(-1)]
        return {"pixel_values": patches_P, "image_grid_thw": grid_N3}, tokens

    def batches(self, media: Sequence[Image.Image]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (patches_P, grid_N3) of neighbours, up to TOWER_PATCHES together and at least one
        picture."""
        patches: list[torch.Tensor] = []
        grids: list[torch.Tensor] = []
        total = 0
        for image in media:
            patches_P, grid_13 = self.patches([image])
            if patches and total + len(patches_P) > TOWER_PATCHES:
                yield torch.cat(patches), torch.cat(grids)
                patches, grids, total = [], [], 0
            patches.append(patches_P)
            grids.append(grid_13)
            total += len(patches_P)
        if patches:
            yield torch.cat(patches), torch.cat(grids)

    def encode(
        self, core: PreTrainedModel, prepared: tuple[torch.Tensor, torch.Tensor]
    ) -> Iterator[ImageFeatures]:
        """Yield the vision tower's features of each picture of a batch."""
        patches_P, grid_N3 = prepared
        out = core.get_image_features(patches_P.to(core.device), grid_N3.to(core.device))
        embeds = out.pooler_output
        # a tower may be built without deepstack layers
        deep = list(zip(*out.deepstack_features, strict=True)) or [()] * len(embeds)
        for grid, embed_TD, layers in zip(grid_N3.tolist(), embeds, deep, strict=True):
            frames, rows, columns = grid
            yield ImageFeatures((frames, rows, columns), embed_TD, layers)

    def feature_inputs(self, features: Sequence[ImageFeatures]) -> dict[str, Any]:
        """Return what the model takes instead of pixels."""
        return encoded_inputs(features) | {
            "image_grid_thw": torch.tensor([each.grid for each in features])
        }

    def changed_by(self, core: PreTrainedModel) -> frozenset[str]:
        """Return the adapters that have weights in the vision tower."""
        found = set()
        for name, _ in core.model.visual.named_parameters():
            _, is_adapter, rest = name.partition(".lora_A.")
            if is_adapter:
                found.add(rest.split(".")[0])
        return frozenset(found)

    def check_targets(self, modules: Sequence[str], options: AdapterConfig, where: str) -> None:
        """Raise ConfigError when modules of the vision tower are among an adapter's, unless its
        options allow it."""
        of_tower = [name for name in modules if "visual" in name.split(".")]
        if of_tower and not options.changes_encoder:
            raise ConfigError(
                f"{where}.targets: {options.targets!r} reaches into the vision tower "
                f"({len(of_tower)} modules, first {of_tower[0]}); say `.*language_model.*` in it, "
                f"or set {where}.allow_vision: true"
            )


def encoded_inputs(features: Sequence[ImageFeatures]) -> dict[str, Any]:
    """Return pictures' features in the form in which the model takes the tower's output."""
    deep = zip(*(each.deep for each in features), strict=True)
    encoded: Mapping[str, Any] = {
        "pooler_output": tuple(each.embed_TD for each in features),
        "deepstack_features": [tuple(layer) for layer in deep],
    }
    return {"mm_encoder_outputs": {"image": Encoded(**encoded)}}
