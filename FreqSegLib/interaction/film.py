"""Feature-wise linear modulation: a sentence scales and shifts channels.

Reference:
    Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
"""

from __future__ import annotations

from torch import Tensor, nn

from FreqSegLib.errors import InputError


class FiLM(nn.Module):
    """Scale and shift every channel by what the text says (Perez et al., 2018)::

        y = (1 + gamma(t)) x + beta(t)

    Both are linear in the text and start at zero: untrained, the module returns what it was given.

    Args:
        text_dim: width of the text vector.
        channels: of the features.
    """

    def __init__(self, text_dim: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.modulation = nn.Linear(text_dim, 2 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Modulate a batch, one sentence an item.

        Args:
            x: maps (B, channels, H, W) or tokens (B, N, channels).
            text: (B, text_dim).

        Returns:
            The shape of ``x``.

        Raises:
            InputError: for features of other shapes.
        """
        gamma, beta = self.modulation(text).chunk(2, dim=-1)
        if x.ndim == 4 and x.shape[1] == self.channels:
            gamma, beta = gamma[:, :, None, None], beta[:, :, None, None]
        elif x.ndim == 3 and x.shape[2] == self.channels:
            gamma, beta = gamma[:, None], beta[:, None]
        else:
            raise InputError(
                f"features must be maps (B, {self.channels}, H, W) or tokens (B, N, {self.channels}), "
                f"got {tuple(x.shape)}"
            )
        return x * (1 + gamma) + beta
