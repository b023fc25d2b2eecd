"""Small fixed filters as differentiable convolutions on (B, 1, H, W)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SMOOTHING = {"sobel": (1.0, 2.0, 1.0), "prewitt": (1.0, 1.0, 1.0)}


def gradients(x: Tensor, operator: str = "sobel") -> tuple[Tensor, Tensor]:
    """Steps along columns and down rows by the ``sobel`` or ``prewitt`` operator, each of x's size.

    The border repeats, so that it makes no edge. A step of height 1 gives 4 (Sobel) or 3 (Prewitt).
    """
    smooth = torch.tensor(_SMOOTHING[operator], dtype=x.dtype, device=x.device)
    step = torch.tensor((-1.0, 0.0, 1.0), dtype=x.dtype, device=x.device)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    along = F.conv2d(F.conv2d(padded, smooth.view(1, 1, 3, 1)), step.view(1, 1, 1, 3))
    down = F.conv2d(F.conv2d(padded, smooth.view(1, 1, 1, 3)), step.view(1, 1, 3, 1))
    return along, down


def magnitude(along: Tensor, down: Tensor) -> Tensor:
    """Length of the gradient; its derivative is 0, not infinite, where there is none."""
    squared = along.square() + down.square()
    flat = squared == 0
    return torch.where(flat, 0.0, torch.where(flat, 1.0, squared).sqrt())


def gaussian_means(x: Tensor, size: int, sigma: float) -> Tensor:
    """Means under a Gaussian of ``size`` pixels where it fits: (B, C, H, W) -> (B, C, H - size + 1, W - size + 1)."""
    places = torch.arange(size, dtype=x.dtype, device=x.device) - size // 2
    taps = torch.exp(-places.square() / (2 * sigma**2))
    taps = taps / taps.sum()
    channels = x.shape[1]
    x = F.conv2d(x, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
