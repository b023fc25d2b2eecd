"""The frequency stream: wavelet bands of the image itself, each level where its size fits, through a small ConvNeXt.

Reference:
    FreqMedCLIP, "Frequency Information for Text Guided Medical Image Segmentation", for a ConvNeXt over wavelet bands;
    Liu et al., "A ConvNet for the 2020s", CVPR 2022, for its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.interaction.feature_normaliser import ChannelNorm
from FreqSegLib.wavelet import dwt2

PyramidBands = Literal["low", "high", "both"]
STRIDES = (2, 4, 8, 16)
# With this mode every level is exactly half as large as the one before, whatever the filter's length.
_MODE = "periodization"
_DETAIL_GAIN = 4.0


class FrequencyPyramid(nn.Module):
    """Bands of three wavelet levels into maps of strides 2, 4, 8 and 16.

    Args:
        bands: which of them it sees: ``low`` (LL), ``high`` (LH, HL, HH) or ``both``.
        wave: the wavelet.
        widths: channels at strides 2, 4, 8 and 16.
        depths: ConvNeXt blocks at strides 4, 8 and 16.

    Raises:
        SettingsError: for other bands, or another number of widths or depths.
    """

    def __init__(
        self,
        bands: PyramidBands = "both",
        wave: str = "haar",
        widths: Sequence[int] = (16, 40, 80, 160),
        depths: Sequence[int] = (2, 2, 3),
    ) -> None:
        super().__init__()
        if bands not in get_args(PyramidBands):
            raise SettingsError(f"bands must be one of {', '.join(get_args(PyramidBands))}, got {bands!r}")
        if len(widths) != len(STRIDES) or len(depths) != len(STRIDES) - 1:
            raise SettingsError(f"4 widths and 3 depths are needed, got {tuple(widths)} and {tuple(depths)}")
        self.bands, self.wave = bands, wave
        count = {"low": 1, "high": 3, "both": 4}[bands]
        self.stem = nn.Sequential(nn.Conv2d(count, widths[0], 3, padding=1), nn.GELU())
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        # the third level's bands join at stride 8; there is no fourth
        self.joined = nn.ModuleList(nn.Conv2d(count, width, 3, padding=1) for width in widths[1:3])
        self.norms = nn.ModuleList(ChannelNorm(width) for width in widths[1:])
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth)))
            for width, depth in zip(widths[1:], depths, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 1, H, W) in [0, 1], sides divisible by 16 -> maps at strides 2, 4, 8 and 16."""
        levels = self._decomposed(images)
        x = self.stem(levels[0])
        found = [x]
        for step, (down, norm, blocks) in enumerate(zip(self.down, self.norms, self.blocks, strict=True)):
            x = down(x)
            if step < len(self.joined):
                x = x + self.joined[step](levels[step + 1])
            x = blocks(norm(x))
            found.append(x)
        return found

    def _decomposed(self, images: Tensor) -> list[Tensor]:
        """The wanted bands of levels 1 to 3, (B, 1, 3 or 4, h, w): about [-1, 1]."""
        levels, low = [], images
        for level in range(1, 4):
            bands = dwt2(low, self.wave, 1, _MODE)
            low = bands.yl
            scale = 2.0**-level
            parts = []
            if self.bands != "high":
                parts.append(2 * scale * low - 1)
            if self.bands != "low":
                parts.append(_DETAIL_GAIN * scale * bands.yh[0][:, 0])
            levels.append(torch.cat(parts, dim=1).contiguous(memory_format=torch.channels_last))
        return levels


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7 convolution, normalisation, two 1×1 convolutions with GELU between, scaled residual.

    Args:
        channels: in and out.
        expansion: of the hidden layer.
    """

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, expansion * channels)
        self.project = nn.Linear(expansion * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)
