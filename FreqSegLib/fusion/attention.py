"""Channel and spatial attention on feature maps.

Reference:
    Woo, Park, Lee and Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError


class ChannelAttention(nn.Module):
    """Weigh channels by what they hold on average and at most: x sigmoid(MLP(mean x) + MLP(max x)).

    Args:
        channels: of the features, >= 1.
        reduction: the hidden layer has channels / reduction units, but never fewer than 4.

    Raises:
        SettingsError: a number below 1.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise SettingsError(f"channels and reduction must be at least 1, got {channels} and {reduction}")
        # a hidden layer of one or two units is easily dead behind its ReLU, and then learns nothing any more
        hidden = max(4, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, every channel times a number in (0, 1)."""
        weight = (self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))).sigmoid()
        return x * weight[:, :, None, None]


class SpatialAttention(nn.Module):
    """Weigh places by the mean and the largest of their channels: x sigmoid(conv([mean_c x, max_c x])).

    Args:
        kernel_size: side of the convolution, odd.

    Raises:
        SettingsError: an even or non-positive size.
    """

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise SettingsError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, every place times a number in (0, 1)."""
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.conv(summary).sigmoid()
