"""Bring the features of a frozen tower to one scale before anything is learned on them."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError

Normaliser = Literal["layer", "batch", "instance"]


class FeatureNormaliser(nn.Module):
    """Mean 0 and variance 1, then a learned scale and shift a channel.

    Args:
        kind: over what the mean and variance are taken: ``layer``, the channels at one place; ``instance``, the places
            of one channel of one image; ``batch``, the places of one channel of all images, from running statistics
            outside training, so that an item's result never depends on its company there.
        channels: of the maps.

    Raises:
        SettingsError: for another kind.
    """

    def __init__(self, kind: Normaliser, channels: int) -> None:
        super().__init__()
        if kind not in get_args(Normaliser):
            raise SettingsError(f"normaliser must be one of {', '.join(get_args(Normaliser))}, got {kind!r}")
        self.kind = kind
        self.norm: nn.Module
        if kind == "layer":
            self.norm = nn.LayerNorm(channels)
        elif kind == "batch":
            self.norm = nn.BatchNorm2d(channels)
        else:
            self.norm = nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same."""
        if self.kind == "layer":
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm(x)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of maps (B, C, H, W), place by place."""

    def forward(self, x: Tensor) -> Tensor:
        found = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return found.permute(0, 3, 1, 2)
