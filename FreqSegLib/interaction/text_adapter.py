"""A small bottleneck beside frozen features that lets the prompt decide what is passed on.

Reference:
    FreqMedCLIP, "Frequency Information for Text Guided Medical Image Segmentation", for adapters under the text's
    condition; Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, for the bottleneck.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.interaction.feature_normaliser import ChannelNorm
from FreqSegLib.interaction.film import FiLM


class TextConditionedAdapter(nn.Module):
    """x + up(gelu(FiLM(down(norm x), t))) with 1×1 convolutions.

    ``up`` starts at zero: untrained, the module returns what it was given.

    Args:
        channels: of the maps.
        text_dim: width of the text vector.
        hidden: channels of the bottleneck.
    """

    def __init__(self, channels: int, text_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.down = nn.Conv2d(channels, hidden, 1)
        self.film = FiLM(text_dim, hidden)
        self.up = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Maps (B, channels, H, W) and sentences (B, text_dim) to maps of the same shape."""
        return x + self.up(F.gelu(self.film(self.down(self.norm(x)), text)))
