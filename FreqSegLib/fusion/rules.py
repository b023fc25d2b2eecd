"""Classic fusion rules, the baselines every network has to beat.

References:
    Choose-max: Li, Manjunath and Mitra, "Multisensor image fusion using the wavelet transform", GMIP 1995 (here by
    single coefficients). Laplacian pyramid: Burt and Adelson, IEEE Trans. Commun. 1983; its fusion by the larger
    coefficient: Burt and Kolczynski, ICCV 1993.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.errors import SettingsError
from FreqSegLib.fusion.fused import Fused, check_pair
from FreqSegLib.fusion.pyramid import blend, decompose, mask_names, mix

# The binomial filter of Burt and Adelson with a = 3/8.
_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


@dataclass(frozen=True)
class Average:
    """(ct + mr) / 2: no fusion can have a higher mean PSNR to both sources."""

    def __call__(self, ct: Tensor, mr: Tensor) -> Fused:
        check_pair(ct, mr)
        mask = torch.full_like(ct, 0.5)
        return Fused(blend(mask, ct, mr), (mask,), ("image",))


@dataclass(frozen=True)
class Maximum:
    """The brighter of the two pixels."""

    def __call__(self, ct: Tensor, mr: Tensor) -> Fused:
        check_pair(ct, mr)
        return Fused(torch.maximum(ct, mr), (_larger(ct, mr),), ("image",))


@dataclass(frozen=True)
class ChooseMax:
    """In every wavelet band the coefficient of larger magnitude; in the low band the larger one.

    Args:
        wave: a name out of :func:`FreqSegLib.wavelet.wavelets`.
        J: levels, >= 1.
        mode: boundary mode.
    """

    wave: str = "haar"
    J: int = 1
    mode: str = "symmetric"

    def __call__(self, ct: Tensor, mr: Tensor) -> Fused:
        check_pair(ct, mr)
        pyramid = decompose(ct, mr, self.wave, self.J, self.mode)
        details = zip(pyramid.ct_details, pyramid.mr_details, strict=True)
        masks = (
            *(_larger(ct_detail.abs(), mr_detail.abs()) for ct_detail, mr_detail in details),
            _larger(pyramid.ct_low[-1], pyramid.mr_low[-1]),
        )
        return Fused(mix(pyramid, masks), masks, mask_names(self.J))


@dataclass(frozen=True)
class LaplacianPyramid:
    """In every level of a Laplacian pyramid the coefficient of larger magnitude.

    Args:
        levels: band-pass levels, >= 1, above the base.
        base: what becomes of the low-pass image: the larger of the two, as choose-max does, or their average.
    """

    levels: int = 3
    base: Literal["max", "average"] = "max"

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 1:
            raise SettingsError(f"levels of the Laplacian pyramid must be a whole number >= 1, got {self.levels!r}")
        if self.base not in ("max", "average"):
            raise SettingsError(f"base must be 'max' or 'average', got {self.base!r}")

    def __call__(self, ct: Tensor, mr: Tensor) -> Fused:
        check_pair(ct, mr)
        low, count = torch.cat([ct, mr]), len(ct)
        details, masks = [], []
        for _ in range(self.levels):
            smaller = _reduce(low)
            detail = low - _expand(smaller, low.shape[-2:])
            masks.append(_larger(detail[:count].abs(), detail[count:].abs()))
            details.append(blend(masks[-1], detail[:count], detail[count:]))
            low = smaller
        base = torch.full_like(low[:count], 0.5) if self.base == "average" else _larger(low[:count], low[count:])
        image = blend(base, low[:count], low[count:])
        for detail in reversed(details):
            image = detail + _expand(image, detail.shape[-2:])
        names = (*(f"level {level}" for level in range(1, self.levels + 1)), "base")
        return Fused(image, (*masks, base), names)


def _larger(ct: Tensor, mr: Tensor) -> Tensor:
    """1 where the CT is larger, 0 where the MR is, one half where they are equal."""
    return (1 + (ct - mr).sign()) / 2


def _reduce(x: Tensor) -> Tensor:
    """Blur and take every second pixel: (B, 1, H, W) -> (B, 1, ceil(H/2), ceil(W/2))."""
    return _blur(x)[..., ::2, ::2]


def _expand(x: Tensor, size: torch.Size) -> Tensor:
    """Interpolate to ``size``: zeros between the pixels, then the blur with four times its weight."""
    # one pixel more on every side first, so that the image's border does not darken
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    spread = padded.new_zeros(*x.shape[:2], 2 * padded.shape[-2], 2 * padded.shape[-1])
    spread[..., ::2, ::2] = 4 * padded
    return _blur(spread)[..., 2 : 2 + size[0], 2 : 2 + size[1]]


def _blur(x: Tensor) -> Tensor:
    taps = torch.tensor(_BINOMIAL, dtype=x.dtype, device=x.device)
    x = F.conv2d(F.pad(x, (0, 0, 2, 2), mode="replicate"), taps.view(1, 1, 5, 1))
    return F.conv2d(F.pad(x, (2, 2, 0, 0), mode="replicate"), taps.view(1, 1, 1, 5))
