"""Frequency-domain feature bidirectional interaction: each frequency stream learns from the other.

Reference:
    FFBI: Yu et al., "Frequency-domain Multi-modal Fusion for Language-guided Medical Image Segmentation", FMISeg, 2025.
    Its place in a text-guided model: FreqMedCLIP, "Frequency Information for Text Guided Medical Image Segmentation".
    The gates of EfficientFFBI: Hu, Shen and Sun, "Squeeze-and-Excitation Networks", CVPR 2018.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import InputError, SettingsError


class FFBI(nn.Module):
    """Cross-attention both ways between two token streams (FMISeg, 2025)::

        F'_LF = F_LF + MHCA(LN F_LF, LN F_HF, LN F_HF)
        F'_HF = F_HF + MHCA(LN F_HF, LN F_LF, LN F_LF)

    MHCA(query, key, value) is multi-head cross-attention, LN layer normalisation; both lines read the same inputs. Each
    attention works in the width of the stream that asks, so the widths may differ. Output projections start at zero:
    untrained, the module returns what it was given.

    Args:
        low_channels: width of the low-frequency tokens.
        high_channels: width of the high-frequency tokens.
        num_heads: attention heads; divides both widths.
        dropout: share of attention weights dropped in training, in [0, 1).

    Raises:
        SettingsError: if the heads do not divide a width, or a number is out of range.
    """

    def __init__(self, low_channels: int, high_channels: int, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        _check_positive(low_channels=low_channels, high_channels=high_channels, num_heads=num_heads)
        for stream, channels in (("low", low_channels), ("high", high_channels)):
            if channels % num_heads:
                raise SettingsError(
                    f"num_heads={num_heads} must divide {stream}_channels={channels}: choose one of "
                    f"{_common_divisors(low_channels, high_channels)}"
                )
        if not 0 <= dropout < 1:
            raise SettingsError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.low_norm = nn.LayerNorm(low_channels)
        self.high_norm = nn.LayerNorm(high_channels)
        self.low_from_high = _CrossAttention(low_channels, high_channels, num_heads, dropout)
        self.high_from_low = _CrossAttention(high_channels, low_channels, num_heads, dropout)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Let each stream attend to the other.

        Args:
            low: low-frequency tokens (B, N, low_channels).
            high: high-frequency tokens (B, M, high_channels); M may differ from N.

        Returns:
            Both streams, in the shapes they came in.

        Raises:
            InputError: for tensors of other shapes.
        """
        _check_tokens("low", low, self.low_norm.normalized_shape[0])
        _check_tokens("high", high, self.high_norm.normalized_shape[0])
        low_seen, high_seen = self.low_norm(low), self.high_norm(high)
        return low + self.low_from_high(low_seen, high_seen), high + self.high_from_low(high_seen, low_seen)


class EfficientFFBI(nn.Module):
    """Squeeze-and-excitation both ways: each stream's mean sets the other's channel gains, without attention::

        F'_LF = F_LF * 2 sigmoid(W2 relu(W1 mean(F_HF)))        and the mirror

    After Hu et al. (2018), with the squeeze taken from the other stream and the gate doubled, so that W2 = 0, where
    training starts, is a gain of exactly 1. Gains lie in (0, 2).

    Args:
        low_channels: width of the low-frequency features.
        high_channels: width of the high-frequency features.
        reduction: the hidden layer has 1/reduction of the squeezed width, but never fewer than 4 units.

    Raises:
        SettingsError: for a width or reduction below 1.
    """

    def __init__(self, low_channels: int, high_channels: int, reduction: int = 8) -> None:
        super().__init__()
        _check_positive(low_channels=low_channels, high_channels=high_channels, reduction=reduction)
        self.low_channels, self.high_channels = low_channels, high_channels
        self.low_from_high = _gate(high_channels, low_channels, reduction)
        self.high_from_low = _gate(low_channels, high_channels, reduction)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale each stream's channels by what the other holds.

        Args:
            low: low-frequency features, tokens (B, N, low_channels) or maps (B, low_channels, H, W).
            high: high-frequency features, tokens (B, M, high_channels) or maps (B, high_channels, H', W').

        Returns:
            Both streams, in the shapes they came in.

        Raises:
            InputError: for tensors of other shapes.
        """
        return (
            _scaled(low, self.low_from_high(_squeezed("high", high, self.high_channels))),
            _scaled(high, self.high_from_low(_squeezed("low", low, self.low_channels))),
        )


class SaliencyInteraction(nn.Module):
    """Carry what FFBI learned into the saliency maps of the two branches.

    FFBI's tokens pass a 1×1 head, one number a token; that map, enlarged to the saliency's size, is added to the
    saliency's logit through a learned gate g that starts at zero::

        S' = S + sigmoid(logit(c) + g d) - c,   c = clamp(S, 1e-4, 1 - 1e-4),    d = head(F')

    which is sigmoid(logit(S) + g d) wherever the clamp does not act, and S itself, to the last bit, while g = 0. The
    heads do not start at zero, so the gates have a gradient from the first step, and FFBI as soon as they open.

    Args:
        low_channels, high_channels, num_heads, dropout: as for :class:`FFBI`.
        interaction: what exchanges the tokens; an FFBI of these settings when None.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        num_heads: int = 8,
        dropout: float = 0.1,
        interaction: FFBI | EfficientFFBI | None = None,
    ) -> None:
        super().__init__()
        self.interaction = interaction or FFBI(low_channels, high_channels, num_heads, dropout)
        self.low_head = nn.Linear(low_channels, 1)
        self.high_head = nn.Linear(high_channels, 1)
        self.low_gate = nn.Parameter(torch.zeros(()))
        self.high_gate = nn.Parameter(torch.zeros(()))

    @property
    def is_identity(self) -> bool:
        """Whether both gates are exactly closed, so that the saliencies need not pass here at all."""
        return self.low_gate.item() == 0 and self.high_gate.item() == 0

    def forward(
        self,
        low_tokens: Tensor,
        high_tokens: Tensor,
        low_saliency: Tensor,
        high_saliency: Tensor,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Correct both branches' saliency.

        Args:
            low_tokens: (B, N, low_channels), without a class token.
            high_tokens: (B, N, high_channels).
            low_saliency: (B, 1, H, W) in [0, 1].
            high_saliency: (B, 1, H, W) in [0, 1].
            grid: rows and columns the N tokens lie in, row by row; square when None.

        Returns:
            Both saliencies, (B, 1, H, W) in [0, 1].

        Raises:
            InputError: for tokens or maps of other shapes, or a grid that does not hold the tokens.
        """
        low, high = self.interaction(low_tokens, high_tokens)
        return (
            _corrected(low_saliency, self.low_head(low), self.low_gate, grid),
            _corrected(high_saliency, self.high_head(high), self.high_gate, grid),
        )


class _CrossAttention(nn.Module):
    """Multi-head attention from one stream to another, in the width of the first."""

    def __init__(self, channels: int, context_channels: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(context_channels, channels)
        self.value = nn.Linear(context_channels, channels)
        self.output = nn.Linear(channels, channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self._heads(self.query(x)), self._heads(self.key(context)), self._heads(self.value(context))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.output(attended.transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def _gate(squeezed_channels: int, gated_channels: int, reduction: int) -> nn.Sequential:
    # A hidden layer of one or two units is easily dead behind its ReLU, and then learns nothing any more.
    hidden = max(4, squeezed_channels // reduction)
    last = nn.Linear(hidden, gated_channels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(squeezed_channels, hidden), nn.ReLU(), last)


def _squeezed(stream: str, features: Tensor, channels: int) -> Tensor:
    if features.ndim == 4 and features.shape[1] == channels:
        return features.mean(dim=(2, 3))
    if features.ndim != 3 or features.shape[2] != channels:
        raise InputError(
            f"{stream}-frequency features must be tokens (B, N, {channels}) or maps (B, {channels}, H, W), "
            f"got {tuple(features.shape)}"
        )
    return features.mean(dim=1)


def _scaled(features: Tensor, logits: Tensor) -> Tensor:
    gain = 2 * logits.sigmoid()
    return features * (gain[:, None] if features.ndim == 3 else gain[:, :, None, None])


def _corrected(saliency: Tensor, per_token: Tensor, gate: Tensor, grid: tuple[int, int] | None) -> Tensor:
    batch, count = per_token.shape[:2]
    rows, columns = grid or (math.isqrt(count), math.isqrt(count))
    if rows * columns != count:
        raise InputError(f"{count} tokens do not fill a grid of {rows} x {columns}: pass grid=(rows, columns)")
    if saliency.ndim != 4 or saliency.shape[:2] != (batch, 1):
        raise InputError(f"a saliency must be ({batch}, 1, H, W) for {batch} items, got {tuple(saliency.shape)}")
    evidence = per_token.transpose(1, 2).reshape(batch, 1, rows, columns)
    evidence = F.interpolate(evidence, size=saliency.shape[-2:], mode="bilinear", align_corners=False)
    # Written as a difference so that a closed gate adds an exact zero and still has a gradient. Exact, if both sigmoids
    # run over the same memory layout: vectorised and scalar loops differ in the last bit.
    logit = saliency.clamp(1e-4, 1 - 1e-4).logit().contiguous()
    return (saliency + ((logit + gate * evidence.contiguous()).sigmoid() - logit.sigmoid())).clamp(0, 1)


def _check_tokens(stream: str, tokens: Tensor, channels: int) -> None:
    if tokens.ndim != 3 or tokens.shape[2] != channels:
        raise InputError(f"{stream}-frequency tokens must be (B, N, {channels}), got {tuple(tokens.shape)}")


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise SettingsError(f"{name} must be at least 1, got {value}")


def _common_divisors(first: int, second: int) -> str:
    common = math.gcd(first, second)
    return ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
