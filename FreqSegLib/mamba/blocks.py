"""The blocks SpectralVMUNet is built of, on channels-last images (b, h, w, c) or volumes (b, z, h, w, c)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from FreqSegLib.errors import SettingsError
from FreqSegLib.mamba.borders import repeat_border
from FreqSegLib.mamba.selective_scan import Backend
from FreqSegLib.mamba.spectral_gating import SpectralGating
from FreqSegLib.mamba.ss2d import SS2D


class DropPath(nn.Module):
    """Leaves out the whole residual of a sample with probability ``p`` in training (stochastic depth)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * kept.to(x.dtype) / (1 - self.p)


class VSSBlock(nn.Module):
    """VMamba's block: x + SS2D(norm(x)).

    Args:
        channels: of the image.
        d_state, ssm_ratio, dimensions, backend: of :class:`SS2D`.
        drop_path: see :class:`DropPath`.
        dropout: of SS2D's output.
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        dimensions: int = 2,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = SS2D(
            channels, d_state, ssm_ratio, dropout=dropout, dimensions=dimensions, backend=backend
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *size, channels) to the same shape."""
        return x + self.drop_path(self.self_attention(self.ln_1(x)))


class SpectralVSSBlock(VSSBlock):
    """A VSS block with a second path through the frequency domain, added with one learned gate a channel.

    The gates start at zero: an untrained frequency path changes nothing, and a checkpoint of plain VSS blocks keeps its
    results. The frequency path is norm, :class:`SpectralGating`, and two linear layers as in GFNet.

    Args:
        channels, d_state, ssm_ratio, drop_path, dropout, dimensions, backend: of :class:`VSSBlock`.
        filter_size: of :class:`SpectralGating`.
        mlp_ratio: width of the frequency path's hidden layer, over ``channels``.
    """

    SPECTRAL = ("ln_spectral", "spectral_gating", "spectral_mlp", "spectral_gate")
    """Names of what a plain VSS block lacks."""

    def __init__(
        self,
        channels: int,
        *,
        filter_size: int = 16,
        mlp_ratio: float = 2.0,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        dimensions: int = 2,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            channels,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            drop_path=drop_path,
            dropout=dropout,
            dimensions=dimensions,
            backend=backend,
        )
        hidden = max(1, int(channels * mlp_ratio))
        self.ln_spectral = nn.LayerNorm(channels)
        self.spectral_gating = SpectralGating(channels, filter_size, dimensions)
        self.spectral_mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, channels)
        )
        self.spectral_gate = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, *size, channels) to the same shape."""
        spatial = self.drop_path(self.self_attention(self.ln_1(x)))
        filtered = self.spectral_gating(self.ln_spectral(x).movedim(-1, 1)).movedim(1, -1)
        frequency = self.drop_path(self.spectral_gate * self.spectral_mlp(filtered))
        return x + spatial + frequency


class Stage(nn.Module):
    """Blocks at one resolution, and the step to the next one (None at the last).

    Args:
        blocks: of the stage.
        downsample: halves the resolution.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Features through the blocks, at the same resolution."""
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution, and a norm; the image is padded to whole patches.

    Args:
        in_channels: of the image.
        channels: of a patch.
        patch_size: side, or one for each axis.
        normed: with the norm, which takes from a patch how strong its features are.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: Sequence[int], normed: bool = True) -> None:
        super().__init__()
        self.patch_size: Any = tuple(patch_size)
        self.proj: nn.Module = convolution(len(self.patch_size))(
            in_channels, channels, self.patch_size, stride=self.patch_size
        )
        self.norm = nn.LayerNorm(channels) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, *size) to (b, *ceil(size / patch_size), channels)."""
        amounts = [-side % patch for side, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        x = repeat_border(x, [0] * len(amounts), amounts)
        return self.norm(self.proj(x).movedim(1, -1))


class PatchMerging(nn.Module):
    """Halves every axis: neighbours are concatenated, normed and projected to twice the channels (Swin Transformer).

    Odd sides are padded by repeating their last element.
    """

    def __init__(self, channels: int, dimensions: int = 2) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.norm = nn.LayerNorm(2**dimensions * channels)
        self.reduction = nn.Linear(2**dimensions * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *size, channels) to (b, *ceil(size / 2), 2 channels)."""
        for axis in range(1, self.dimensions + 1):
            if x.shape[axis] % 2:
                x = torch.cat([x, x.narrow(axis, x.shape[axis] - 1, 1)], axis)
        # the first spatial axis varies fastest, as in Swin's and VMamba's weights
        parts = [x]
        for axis in range(self.dimensions, 0, -1):
            parts = [part[(slice(None),) * axis + (slice(start, None, 2),)] for part in parts for start in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchExpanding(nn.Module):
    """Enlarges every axis by a linear layer whose outputs become neighbours (Swin-Unet, VM-UNet).

    Args:
        channels: in.
        out_channels: out.
        scale: of each axis.
    """

    def __init__(self, channels: int, out_channels: int, scale: Sequence[int]) -> None:
        super().__init__()
        self.scale = tuple(scale)
        self.expand = nn.Linear(channels, out_channels * math.prod(self.scale), bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(b, *n, channels) to (b, *size, out_channels): n scale, cropped to ``size``."""
        n = x.shape[1:-1]
        count = len(n)
        if any(small * scale < side for small, scale, side in zip(n, self.scale, size, strict=True)):
            raise SettingsError(f"{tuple(n)} enlarged by {self.scale} does not cover {tuple(size)}")
        x = self.expand(x).unflatten(-1, (*self.scale, -1))
        # (b, *n, *scale, c): each axis beside its scale
        pairs = [axis for i in range(count) for axis in (1 + i, 1 + count + i)]
        x = x.permute(0, *pairs, 2 * count + 1)
        for i in range(count):
            x = x.flatten(1 + i, 2 + i)
        for axis, side in enumerate(size, start=1):
            x = x.narrow(axis, 0, side)
        return self.norm(x)


def convolution(dimensions: int) -> Any:
    """The class for images (2) or volumes (3)."""
    return nn.Conv2d if dimensions == 2 else nn.Conv3d
