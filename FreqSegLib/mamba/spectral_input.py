"""How a volume reaches the spectral network and its answers come back: the same in training and in use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.errors import InputError
from FreqSegLib.intensity import Normalised, normalise
from FreqSegLib.mamba.model_config import InputConfig
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.volume import Volume


@dataclass(frozen=True)
class SliceInput:
    """A volume's slices, or a picture, in the network's square frame."""

    stack: SliceStack
    intensity: Normalised
    frame: Frame

    @classmethod
    def of(cls, volume: Volume, config: InputConfig) -> SliceInput:
        """Raises:
        InputError, SettingsError: the volume is constant or its window empty, or it does not fit the form.
        """
        if config.form == "image" and volume.shape[0] != 1:
            raise InputError(
                f"{volume.name}: this model takes 2D pictures, got a volume of {volume.shape} voxels; give one picture"
            )
        stack = SliceStack.of(volume, config.axis)
        frame = Frame.fit(stack.slice_shape, stack.pixel_spacing, config.side)
        return cls(stack, normalise(volume, config.intensity), frame)

    def images(self, indices: range | list[int]) -> Tensor:
        """(B, 1, side, side) in [0, 1]."""
        slices = np.stack([self.intensity.apply(self.stack.take(index)) for index in indices])
        return self.frame.to_frame(torch.from_numpy(slices)[:, None])

    def labels(self, array: NDArray[np.uint8], indices: range | list[int]) -> Tensor:
        """(B, side, side) labels, padding 0; ``array`` is on the volume's grid."""
        shown = self.stack.displayed(array)
        slices = np.stack([shown[index] for index in indices]).astype(np.float32)
        return self.frame.to_frame(torch.from_numpy(slices)[:, None], order="nearest")[:, 0].to(torch.uint8)


@dataclass(frozen=True)
class VolumeInput:
    """A whole volume as the network sees it: axial view, resampled to the model's spacing."""

    stack: SliceStack
    intensity: Normalised
    size: tuple[int, ...]
    """Voxels (z, y, x) after resampling."""

    @classmethod
    def of(cls, volume: Volume, config: InputConfig) -> VolumeInput:
        """Raises:
        InputError, SettingsError: the volume is constant or its window empty, or it is a picture.
        """
        if volume.spatial_dimension == 2 or volume.shape[0] == 1:
            raise InputError(f"{volume.name}: this model takes 3D volumes, got a picture of {volume.shape[1:]} pixels")
        stack = SliceStack.of(volume, "axial")
        shape = (stack.count, *stack.slice_shape)
        if config.spacing is None:
            size: tuple[int, ...] = shape
        else:
            spacing = (stack.slice_spacing, *stack.pixel_spacing)
            size = tuple(
                max(1, round(count * own / wanted))
                for count, own, wanted in zip(shape, spacing, config.spacing, strict=True)
            )
        return cls(stack, normalise(volume, config.intensity), size)

    def image(self) -> Tensor:
        """(1, 1, *size) in [0, 1]."""
        shown = np.ascontiguousarray(self.intensity.apply(self.stack.displayed(self.stack.volume.array)))
        return self._resampled(torch.from_numpy(shown)[None, None])

    def labels(self, array: NDArray[np.uint8]) -> Tensor:
        """(1, *size); ``array`` is on the volume's grid."""
        shown = np.ascontiguousarray(self.stack.displayed(array)).astype(np.float32)
        return F.interpolate(torch.from_numpy(shown)[None, None], self.size, mode="nearest-exact")[:, 0].to(torch.uint8)

    def returned(self, maps: Tensor) -> Tensor:
        """Maps (c, *size) brought back to the grid of the axial view, (c, z, y, x)."""
        shape = (self.stack.count, *self.stack.slice_shape)
        if tuple(maps.shape[1:]) == shape:
            return maps
        return F.interpolate(maps[None], shape, mode="trilinear", align_corners=False)[0]

    def _resampled(self, image: Tensor) -> Tensor:
        if tuple(image.shape[2:]) == self.size:
            return image
        # where it shrinks, what the coarse grid cannot show is averaged away first
        factors = [max(1, old // new) for old, new in zip(image.shape[2:], self.size, strict=True)]
        if max(factors) > 1:
            image = F.avg_pool3d(image, factors, ceil_mode=True, count_include_pad=False)
        return F.interpolate(image, self.size, mode="trilinear", align_corners=False)
