"""Maps of one stride brought to a pyramid of several.

Reference:
    FreqMedCLIP, "Frequency Information for Text Guided Medical Image Segmentation": layers 3, 6, 9 and 12 of a plain
    ViT become strides 4, 8, 16 and 32. Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
    ECCV 2022, for how a level is reached.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.interaction.feature_normaliser import ChannelNorm

VIT_LAYERS = (3, 6, 9, 12)
"""Blocks of a 12-layer ViT whose maps feed strides 4, 8, 16 and 32."""
VIT_SCALES = (4.0, 2.0, 1.0, 0.5)
"""What brings stride 16 to strides 4, 8, 16 and 32."""


class FPNAdapter(nn.Module):
    """One learned change of size a level: transposed convolutions up, a strided convolution down.

    Args:
        in_channels: of all maps that come in.
        out_channels: of each level that goes out.
        scales: size of each level relative to its map: a power of 2 from 1/4 to 4.

    Raises:
        SettingsError: if the numbers of levels differ, or a scale is no such power.

    Example:
        >>> adapter = FPNAdapter(768, (96, 192, 384, 768), VIT_SCALES)
        >>> pyramid = adapter(encoder.features(images, VIT_LAYERS))  # strides 4, 8, 16, 32
    """

    def __init__(self, in_channels: int, out_channels: Sequence[int], scales: Sequence[float] = VIT_SCALES) -> None:
        super().__init__()
        if len(out_channels) != len(scales):
            raise SettingsError(f"a level needs a width and a scale, got {len(out_channels)} and {len(scales)}")
        self.in_channels = in_channels
        self.levels = nn.ModuleList(
            _resized(in_channels, width, scale) for width, scale in zip(out_channels, scales, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """A pyramid.

        Args:
            maps: one (B, in_channels, H, W) a level; for a pyramid out of a single map give that map as often.

        Returns:
            (B, out_channels[i], scales[i] H, scales[i] W) for each level i.

        Raises:
            InputError: for another number of maps.
        """
        if len(maps) != len(self.levels):
            raise InputError(f"the pyramid has {len(self.levels)} levels, got {len(maps)} maps")
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


def _resized(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    if scale == 1:
        parts: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 1)]
    elif scale == 2:
        parts = [nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)]
    elif scale == 4:
        parts = [
            nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2),
            ChannelNorm(in_channels // 2),
            nn.GELU(),
            nn.ConvTranspose2d(in_channels // 2, out_channels, 2, stride=2),
        ]
    elif scale in (0.5, 0.25):
        step = round(1 / scale)
        parts = [nn.Conv2d(in_channels, out_channels, step, stride=step)]
    else:
        raise SettingsError(f"a level's scale must be 4, 2, 1, 0.5 or 0.25, got {scale}")
    return nn.Sequential(*parts, ChannelNorm(out_channels))
