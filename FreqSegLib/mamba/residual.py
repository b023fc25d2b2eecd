"""Residual convolutions at the resolutions above the first stage's: what patches of pixels cannot see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.mamba.blocks import Stage, convolution

ENCODER_BLOCKS = 2


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))) with 3 x 3 convolutions.

    After He et al., "Identity Mappings in Deep Residual Networks", 2016: the block of SegResNet (Myronenko, "3D MRI
    brain tumor segmentation using autoencoder regularization", 2018), of which MONAI has one; importing that takes
    longer than segmenting a volume.

    Args:
        channels: of the image.
        dimensions: 2 or 3.
    """

    def __init__(self, channels: int, dimensions: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = InstanceNorm(channels), InstanceNorm(channels)
        self.conv1, self.conv2 = (three_by_three(channels, channels, dimensions) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *size) to the same shape."""
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class ResidualFeatures(ResidualBlock):
    """A residual block on the channels-last features of a stage."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, *size, channels) to the same shape."""
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class ResidualStem(nn.Module):
    """Residual blocks at full resolution and at each halving above the first stage's.

    Args:
        in_channels: of the image.
        channels: at full resolution; doubled at each halving.
        strides: from each level to the next one, as :func:`halvings` has them; the last leads to the first stage and is
            not this module's.
        dropout: of single elements of the first features, as in SegResNet: noise that the network must bear.
    """

    def __init__(self, in_channels: int, channels: int, strides: Sequence[Sequence[int]], dropout: float = 0.0) -> None:
        super().__init__()
        dimensions = len(strides[0])
        self.drop = nn.Dropout(dropout)
        self.widths = [channels * 2**level for level in range(len(strides))]
        before = [in_channels, *self.widths]
        steps = [(1,) * dimensions, *strides]
        self.enter = nn.ModuleList(
            three_by_three(before[level], width, dimensions, steps[level]) for level, width in enumerate(self.widths)
        )
        self.stages = nn.ModuleList(
            Stage([ResidualBlock(width, dimensions) for _ in range(ENCODER_BLOCKS)]) for width in self.widths
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, *size) to every level's features (b, channels 2^level, *ceil(size / step)), finest first."""
        features = []
        for level, (enter, stage) in enumerate(zip(self.enter, self.stages, strict=True)):
            x = enter(x)
            x = stage(x if level else self.drop(x))
            features.append(x)
        return features


class Enlarging(nn.Module):
    """A 1 x 1 convolution, then linear interpolation, as in SegResNet: no norm, so that weak features stay weak.

    Args:
        channels: in.
        out_channels: out.
        scale: of each axis.
    """

    def __init__(self, channels: int, out_channels: int, scale: Sequence[int]) -> None:
        super().__init__()
        self.scale = tuple(float(factor) for factor in scale)
        self.project: nn.Module = convolution(len(scale))(channels, out_channels, 1, bias=False)
        self.mode = "bilinear" if len(scale) == 2 else "trilinear"

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(b, channels, *n) to (b, out_channels, *size): n scale, cropped to ``size``."""
        x = F.interpolate(self.project(x), scale_factor=self.scale, mode=self.mode, align_corners=False)
        for axis, side in enumerate(size, start=2):
            x = x.narrow(axis, 0, side)
        return x


class ResidualDecoder(nn.Module):
    """Back from the first stage to full resolution: enlarged, the stem's features added, one residual block a level.

    Args:
        channels: of the first stage.
        widths: of the stem's levels, the finest first.
        strides: as for :class:`ResidualStem`.
    """

    def __init__(self, channels: int, widths: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
        super().__init__()
        order = range(len(widths) - 1, -1, -1)
        before = [*widths[1:], channels]
        self.upsample = nn.ModuleList(Enlarging(before[level], widths[level], strides[level]) for level in order)
        self.stages = nn.ModuleList(Stage([ResidualBlock(widths[level], len(strides[0]))]) for level in order)
        self.norm = InstanceNorm(widths[0])

    def forward(self, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """(b, *n, channels), and what the stem gave, to (b, widths[0], *size)."""
        y = x.movedim(-1, 1)
        for upsample, stage, skip in zip(self.upsample, self.stages, reversed(features), strict=True):
            y = stage(upsample(y, skip.shape[2:]) + skip)
        return F.relu(self.norm(y))


def halvings(patch: Sequence[int]) -> list[tuple[int, ...]]:
    """A patch as steps that each halve some axes; an axis with a smaller patch is halved at the last ones.

    Raises:
        SettingsError: a side of the patch is no power of two, or none is above 1.
    """
    powers = [int(math.log2(side)) if side > 0 else 0 for side in patch]
    if max(powers) == 0 or any(side != 2**power for side, power in zip(patch, powers, strict=True)):
        raise SettingsError(f"a stem of convolutions needs patches of 2, 4, 8, ... pixels, got {tuple(patch)}")
    return [tuple(1 + (left <= power) for power in powers) for left in range(max(powers), 0, -1)]


class InstanceNorm(nn.GroupNorm):
    """Instance norm with a scale and a shift a channel: a group norm of one channel a group.

    torch's own refuses an image of a single pixel, whose norm is the shift.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *size) to the same shape."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def three_by_three(in_channels: int, channels: int, dimensions: int, stride: Any = 1) -> nn.Module:
    """3 x 3 (x 3) without a bias; the size is kept, or divided by ``stride`` and rounded up."""
    layer: nn.Module = convolution(dimensions)(in_channels, channels, 3, stride=stride, padding=1, bias=False)
    return layer
