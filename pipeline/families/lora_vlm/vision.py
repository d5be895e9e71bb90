"""Pictures as a Qwen3-VL reads them: opened, counted in tokens, and encoded by its vision tower.

B requests, N pictures, P patches, T tokens of one picture, D width.
"""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures as Encoded,
)

from ...data.images.images import digest, open_checked
from ...data.routing.dataset import RoutingRow
from ...data.tasks.rows import TaskRow
from ...errors import ConfigError, DataError
from ...hardware import cores
from ..adapters.media import Media
from ..adapters.peft_io import own_name
from ..adapters.sections import AdapterConfig
from .patches import PatchCutter, Patches
from .perturb import PERTURBATIONS

TOWER_PATCHES = 16_384  # that go through the vision tower together
SMALL_PX = 192  # longer side of a picture in the report
SMALL_QUALITY = 80  # of its JPEG
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
        self._cut = PatchCutter(self.preparation)
        self.image_id: int = processor.image_token_id
        self.placeholder = processor.image_token
        self.placeholder_id = self.image_id

    def content(self, text: str, count: int) -> list[dict]:
        """Return the content of a message: its pictures, then its text."""
        # in front, as the base's own chats have them
        parts: list[dict] = [{"type": "image"}] * count
        parts.append({"type": "text", "text": text})
        return parts

    def paths(self, folder: Path, row: TaskRow | RoutingRow) -> tuple[Path, ...]:
        """Return where a row's pictures are."""
        return tuple(folder / name for name in row.images)

    def open_row(self, folder: Path, row: TaskRow | RoutingRow) -> list[Image.Image]:
        """Return a row's pictures, decoded and checked. Raises DataError."""
        # a task's pictures lie beside its rows; the routing set's are those of other artifacts
        if isinstance(row, TaskRow):
            return [open_checked(name, root=folder) for name in row.images]
        return [open_checked(path) for path in self.paths(folder, row)]

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
        # the library's own count, so that it is what the preparation will make of the pixels
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

    def thumbnail(self, medium: Image.Image) -> str:
        """Return a small copy of a picture for the report, with nothing of its file but what it
        shows."""
        small = medium.convert("RGB")
        small.thumbnail((SMALL_PX, SMALL_PX))
        buffer = BytesIO()
        small.save(buffer, "JPEG", quality=SMALL_QUALITY)
        return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"

    def patches(self, images: Sequence[Image.Image]) -> Patches:
        """Return pictures as patches."""
        return self._cut(images)

    def patches_of_files(self, paths: Sequence[Path]) -> Patches:
        """Return pictures on disk as patches. Raises DataError."""
        if len(paths) == 1 or cores() == 1:
            images = [self.open(path) for path in paths]
            return self.patches(images)
        # decoding and resizing leave Python's lock to others
        with ThreadPoolExecutor(min(READERS, cores())) as pool:
            parts = list(pool.map(self._patches_of_file, paths))
        patches_P, grid_N3 = zip(*parts, strict=True)
        return torch.cat(patches_P), torch.cat(grid_N3)

    def _patches_of_file(self, path: Path) -> Patches:
        image = self.open(path)
        return self.patches([image])

    def token_inputs(self, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return mm_token_type_ids [B, T]: 1 where a picture stands."""
        is_image_BT = torch.eq(ids_BT, self.image_id)
        return {"mm_token_type_ids": is_image_BT.int()}

    def raw_inputs(self, media: Sequence[Image.Image]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return the pictures' patches as the model takes them, and the tokens of each."""
        if not media:
            return {}, []
        patches_P, grid_N3 = self.patches(media)
        merged = self.preparation.merge_size**2
        tokens_N = grid_N3.prod(-1) // merged
        inputs = {"pixel_values": patches_P, "image_grid_thw": grid_N3}
        return inputs, tokens_N.tolist()

    def batches(self, media: Sequence[Image.Image]) -> Iterator[Patches]:
        """Yield neighbours as patches, up to TOWER_PATCHES together and at least one picture."""
        patches: list[torch.Tensor] = []
        grids: list[torch.Tensor] = []
        total = 0
        for image in media:
            patches_P, grid_13 = self.patches([image])
            if patches and total + len(patches_P) > TOWER_PATCHES:
                yield torch.cat(patches), torch.cat(grids)
                patches = []
                grids = []
                total = 0
            patches.append(patches_P)
            grids.append(grid_13)
            total += len(patches_P)
        if patches:
            yield torch.cat(patches), torch.cat(grids)

    def encode(self, core: PreTrainedModel, prepared: Patches) -> Iterator[ImageFeatures]:
        """Yield the vision tower's features of each picture of a batch."""
        patches_P, grid_N3 = prepared
        device = core.device
        tower: Any = core
        out = tower.get_image_features(patches_P.to(device), grid_N3.to(device))
        for i, grid in enumerate(grid_N3.tolist()):
            # a base may be built without deepstack layers, and the list is empty then
            deep = [layer[i] for layer in out.deepstack_features]
            yield ImageFeatures(
                grid=tuple(grid),
                embed_TD=out.pooler_output[i],
                deep=tuple(deep),
            )

    def digest(self, medium: Image.Image) -> str:
        """Return the digest of a picture's size and pixels."""
        return digest(medium)

    def detached(self, features: ImageFeatures) -> tuple[ImageFeatures, int]:
        """Return features that hold nothing of the pictures that went through the tower with
        theirs, and their bytes."""
        deep = tuple(layer_TD.clone() for layer_TD in features.deep)
        own = ImageFeatures(features.grid, features.embed_TD.clone(), deep)
        return own, sum(each.nbytes for each in (own.embed_TD, *deep))

    def feature_inputs(self, features: Sequence[ImageFeatures]) -> dict[str, Any]:
        """Return what the model takes instead of pixels: the tower's output, and its grids."""
        grids = [each.grid for each in features]
        deep = [each.deep for each in features]
        by_layer = zip(*deep, strict=True)
        # the model takes tensors by picture here, where its class says one tensor
        output: dict[str, Any] = {
            "pooler_output": tuple(each.embed_TD for each in features),
            "deepstack_features": list(by_layer),
        }
        return {
            "mm_encoder_outputs": {"image": Encoded(**output)},
            "image_grid_thw": torch.tensor(grids),
        }

    def cut(self, features: Sequence[ImageFeatures], first: int, end: int) -> list[ImageFeatures]:
        """Return what some tokens of a row's pictures read, counted over all of them."""
        parts = []
        for each in features:
            own = slice(max(0, first), max(0, min(end, each.tokens)))
            if own.start < own.stop:
                deep = tuple(layer[own] for layer in each.deep)
                parts.append(ImageFeatures(each.grid, each.embed_TD[own], deep))
            first -= each.tokens
            end -= each.tokens
        return parts

    def positions(
        self, core: PreTrainedModel, ids: Sequence[int], features: Sequence[ImageFeatures]
    ) -> torch.Tensor | None:
        """Return the position of each token in time, height and width, [3, T]; None where there is
        no picture."""
        if not features:
            return None
        # as the class's own `get_rope_index`, which starts a dozen operations for each picture
        config: Any = core.config
        merged = config.vision_config.spatial_merge_size
        position_3T = np.empty((3, len(ids)), np.int64)
        at = 0  # tokens whose positions are known
        position = 0  # of the next one
        for each in features:
            first = ids.index(self.image_id, at)
            position_3T[:, at:first] = np.arange(position, position + first - at)
            position += first - at
            rows, columns = each.grid[1] // merged, each.grid[2] // merged
            at = first + rows * columns
            position_3T[0, first:at] = position
            position_3T[1, first:at] = position + np.repeat(np.arange(rows), columns)
            position_3T[2, first:at] = position + np.tile(np.arange(columns), rows)
            position += max(rows, columns)
        position_3T[:, at:] = np.arange(position, position + len(ids) - at)
        return torch.from_numpy(position_3T)

    def changed_by(self, core: PreTrainedModel) -> frozenset[str]:
        """Return the adapters that have weights in the vision tower."""
        found = set()
        for name, _ in core.model.visual.named_parameters():
            _, is_adapter, rest = name.partition(".lora_A.")
            if is_adapter:
                # an adapter's name has no dot: PEFT makes a module of it
                known = rest.partition(".")[0]
                found.add(own_name(known))
        return frozenset(found)

    def check_targets(
        self,
        modules: Sequence[str],
        options: AdapterConfig,
        where: str,
    ) -> None:
        """Raise ConfigError when modules of the vision tower are among an adapter's, unless its
        options allow it."""
        of_tower = []
        for name in modules:
            if "visual" in name.split("."):
                of_tower.append(name)
        if of_tower and not options.changes_encoder:
            raise ConfigError(
                f"{where}.targets: {options.targets!r} reaches into the vision tower "
                f"({len(of_tower)} modules, first {of_tower[0]}); say `.*language_model.*` in it, "
                f"or set {where}.allow_vision: true"
            )
