"""Two decoders, one a stream, and the head that makes one mask of their two logits.

Reference:
    FreqMedCLIP, "Frequency Information for Text Guided Medical Image Segmentation"; FMISeg (Yu et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.interaction.lffi import LFFIBlock

Fusion = Literal["mean", "adaptive"]


class StreamDecoder(nn.Module):
    """One stream's decoder: from its bottleneck at stride 16 over stride 8 to a logit at stride 4.

    Args:
        encoder_widths: channels of the stream at strides 4, 8 and 16.
        widths: channels of the decoder at strides 4 and 8.
        text_dim: width of the text vector.
        language_gate: LFFI's gate, else FiLM.
    """

    def __init__(
        self, encoder_widths: Sequence[int], widths: Sequence[int], text_dim: int, language_gate: bool
    ) -> None:
        super().__init__()
        fine, middle, deep = encoder_widths
        self.to_stride_8 = LFFIBlock(deep, middle, widths[1], text_dim, language_gate)
        self.to_stride_4 = LFFIBlock(widths[1], fine, widths[0], text_dim, language_gate)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, pyramid: Sequence[Tensor], text: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, widths[0], H/4, W/4) and logits (B, 1, H/4, W/4) from maps at strides 4, 8 and 16."""
        fine, middle, deep = pyramid
        features = self.to_stride_4(self.to_stride_8(deep, middle, text), fine, text)
        return features, self.head(features)


class FusionHead(nn.Module):
    """One logit map out of two.

    ``mean`` is their mean. ``adaptive`` weighs them place by place and may correct what both got wrong::

        W = sigmoid(conv([f_s, f_f])),    z = W z_f + (1 - W) z_s + conv([f_s, f_f])

    with features f and logits z of the semantic and the frequency decoder. Its last layer starts at zero: untrained,
    both ways give the mean.

    Args:
        method: ``mean`` or ``adaptive``.
        channels: of each decoder's features.

    Raises:
        SettingsError: for another method.
    """

    def __init__(self, method: Fusion, channels: int) -> None:
        super().__init__()
        if method not in get_args(Fusion):
            raise SettingsError(f"fusion must be one of {', '.join(get_args(Fusion))}, got {method!r}")
        self.method = method
        if method == "adaptive":
            last = nn.Conv2d(channels, 2, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
            self.conv = nn.Sequential(nn.Conv2d(2 * channels, channels, 3, padding=1), nn.GELU(), last)

    def forward(self, semantic: tuple[Tensor, Tensor], frequency: tuple[Tensor, Tensor]) -> Tensor:
        """(features, logits) of both decoders, (B, C, h, w) and (B, 1, h, w) -> logits (B, 1, h, w)."""
        if self.method == "mean":
            return (semantic[1] + frequency[1]) / 2
        weight, correction = self.conv(torch.cat([semantic[0], frequency[0]], dim=1)).chunk(2, dim=1)
        weight = weight.sigmoid()
        return weight * frequency[1] + (1 - weight) * semantic[1] + correction


class EdgeRefinement(nn.Module):
    """From stride 4 to stride 2 along the edges that the finest bands show; zero at start.

    Args:
        channels: of both decoders' features together.
        fine_channels: of the frequency stream at stride 2.
        hidden: between the convolutions.
    """

    def __init__(self, channels: int, fine_channels: int, hidden: int = 12) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels + 1, hidden, 1)
        self.fine = nn.Conv2d(fine_channels, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, logits: Tensor, fine: Tensor) -> Tensor:
        """(B, channels, h, w), (B, 1, h, w), (B, fine_channels, 2h, 2w) -> logits (B, 1, 2h, 2w)."""
        known = self.reduce(torch.cat([features, logits], dim=1))
        x = F.interpolate(known, scale_factor=2, mode="bilinear", align_corners=False) + self.fine(fine)
        x = F.gelu(self.mix(F.gelu(x)))
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False) + self.last(x)
