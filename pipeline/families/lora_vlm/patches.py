"""Pictures cut into patches, to the last bit as their preparation cuts them, in half of its time.

The preparation computes each number of a picture in float64, and again for the mean and the
deviation, over one array after another; of each channel there are 256 different ones. They are
computed once, by itself, and looked up.

P patches, N pictures, C channels, H rows and W columns of pixels, V values of a pixel.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

# pixel_values [P, values] of pictures one after another, and image_grid_thw [N, 3]
Patches = tuple[torch.Tensor, torch.Tensor]

VALUES = 256
CHANNELS = 3


class PatchCutter:
    """Cuts pictures as one preparation does."""

    def __init__(self, preparation: Any):
        self.preparation = preparation
        self._number_CV: np.ndarray | None = None

    def __call__(self, images: Sequence[Image.Image]) -> Patches:
        """Return pictures as patches."""
        if not self._looks_up(images):
            out = self.preparation(images=list(images), return_tensors="pt")
            return out["pixel_values"], out["image_grid_thw"]
        if self._number_CV is None:
            self._number_CV = self._numbers()
        parts, grids = zip(*(self._cut(image, self._number_CV) for image in images), strict=True)
        return torch.from_numpy(np.concatenate(parts)), torch.tensor(grids)

    def _looks_up(self, images: Sequence[Image.Image]) -> bool:
        """Whether the numbers of a picture follow from each of its pixels alone."""
        own = self.preparation
        if type(own) is not Qwen2VLImageProcessorPil or not images:
            return False
        steps = own.do_resize and own.do_rescale and own.do_normalize
        # torchvision's names for a way to resize are translated by the preparation
        by_pillow = isinstance(own.resample, int)
        return bool(steps) and by_pillow and all(image.mode == "RGB" for image in images)

    def _numbers(self) -> np.ndarray:
        """Return what the preparation makes of every value of every channel."""
        own = self.preparation
        value_CV1 = np.tile(np.arange(VALUES, dtype=np.uint8)[:, None], (CHANNELS, 1, 1))
        number_CV1 = own.rescale(value_CV1, own.rescale_factor)
        number_CV1 = own.normalize(number_CV1, own.image_mean, own.image_std)
        return np.asarray(number_CV1[..., 0], np.float32)

    def _cut(
        self, image: Image.Image, number_CV: np.ndarray
    ) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Return a picture's patches, and how many frames, rows and columns of them there are."""
        own = self.preparation
        area = dict(own.size)
        height, width = smart_resize(
            image.height,
            image.width,
            factor=own.patch_size * own.merge_size,
            min_pixels=area["shortest_edge"],
            max_pixels=area["longest_edge"],
        )
        # the preparation makes an array of a picture, and a picture of it again, to resize it
        if image.size != (width, height):
            image = image.resize((width, height), own.resample)
        channels = zip(number_CV, np.moveaxis(np.asarray(image), -1, 0), strict=True)
        patches_P, rows, columns = own.patchify(
            np.stack([number_V[value_HW] for number_V, value_HW in channels]),
            patch_size=own.patch_size,
            merge_size=own.merge_size,
            temporal_patch_size=own.temporal_patch_size,
        )
        return patches_P, (1, rows, columns)
