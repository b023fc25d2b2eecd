"""Language-guided frequency-domain feature interaction: the prompt suppresses what it does not speak of.

Reference:
    Yu et al., "Frequency-domain Multi-modal Fusion for Language-guided Medical Image Segmentation", FMISeg, 2025.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import InputError
from FreqSegLib.interaction.feature_normaliser import ChannelNorm
from FreqSegLib.interaction.film import FiLM


class LanguageGate(nn.Module):
    """FMISeg's language gate on maps, for one sentence vector an item::

        l   = L language tokens from the sentence
        l'  = l + attention(l, norm x, norm x)            what the image holds for each of them
        v   = norm x + attention(norm x, l', l')          what each place hears from the language
        g   = W_v v + W_s (v l'^T / sqrt(C))              its own features and its likeness to every token
        x'  = x * 2 sigmoid(g)

    The gate is doubled and W_v, W_s start at zero, so that untrained the module returns what it was given. FMISeg
    reads a token a word and has self-attention over places first; a sentence vector has one token, and places of the
    finer levels are too many for it here.

    Args:
        channels: of the maps.
        text_dim: width of the text vector.
        tokens: L.
    """

    def __init__(self, channels: int, text_dim: int, tokens: int = 4) -> None:
        super().__init__()
        self.channels, self.tokens = channels, tokens
        self.language = nn.Linear(text_dim, tokens * channels)
        self.norm = nn.LayerNorm(channels)
        self.language_norm = nn.LayerNorm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.gate = nn.Linear(channels, channels)
        self.likeness = nn.Linear(tokens, channels, bias=False)
        for layer in (self.gate, self.likeness):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Maps (B, channels, H, W) and sentences (B, text_dim) to maps of the same shape.

        Raises:
            InputError: for maps of other channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise InputError(f"the language gate takes maps (B, {self.channels}, H, W), got {tuple(x.shape)}")
        places = self.norm(x.flatten(2).transpose(1, 2))
        language = self.language(text).unflatten(1, (self.tokens, self.channels))
        language = self.language_norm(language + _attention(language, self.key(places), places))
        heard = places + _attention(self.query(places), language, self.value(language))
        likeness = heard @ language.transpose(1, 2) / math.sqrt(self.channels)
        gate = 2 * (self.gate(heard) + self.likeness(likeness)).sigmoid()
        return x * gate.transpose(1, 2).unflatten(2, x.shape[-2:])


class LFFIBlock(nn.Module):
    """One step of a decoder: gate by language, double the size, take in the encoder's map, convolve.

    Args:
        in_channels: of the coarser maps.
        skip_channels: of the encoder's maps, which are twice as large.
        out_channels: of the result.
        text_dim: width of the text vector.
        language_gate: FMISeg's gate; FiLM where False, the plain way to listen to the text.
    """

    def __init__(
        self, in_channels: int, skip_channels: int, out_channels: int, text_dim: int, language_gate: bool = True
    ) -> None:
        super().__init__()
        self.listen: LanguageGate | FiLM
        self.listen = LanguageGate(in_channels, text_dim) if language_gate else FiLM(text_dim, in_channels)
        self.reduce = nn.Conv2d(in_channels, out_channels, 1)
        self.skip = nn.Conv2d(skip_channels, out_channels, 1)
        self.mix = nn.Sequential(
            ChannelNorm(out_channels), nn.GELU(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, skip: Tensor, text: Tensor) -> Tensor:
        """(B, in_channels, h, w), (B, skip_channels, 2h, 2w), (B, text_dim) -> (B, out_channels, 2h, 2w)."""
        x = self.reduce(self.listen(x, text))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) + self.skip(skip)
        return x + self.mix(x)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weight = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]), dim=-1)
    return weight @ value
