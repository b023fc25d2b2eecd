"""One wavelet pyramid of a pair of images, and its convex mix back into one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, cat

from FreqSegLib.wavelet import Bands, dwt2, idwt2


@dataclass(frozen=True, eq=False)
class PairPyramid:
    """The bands of both images, divided by 2 a level so that a low band stays in the images' units.

    Attributes:
        ct_low, mr_low: low band of every level, (B, 1, h_j, w_j), finest first.
        ct_details, mr_details: LH, HL, HH of every level, (B, 3, h_j, w_j), finest first.
        wave, mode, size: of the transform, and (H, W) of the images.
    """

    ct_low: tuple[Tensor, ...]
    mr_low: tuple[Tensor, ...]
    ct_details: tuple[Tensor, ...]
    mr_details: tuple[Tensor, ...]
    wave: str
    mode: str
    size: tuple[int, int]

    @property
    def J(self) -> int:
        """Number of levels."""
        return len(self.ct_low)


def decompose(ct: Tensor, mr: Tensor, wave: str, J: int, mode: str = "symmetric") -> PairPyramid:
    """Both images (B, 1, H, W) through one transform of J levels, keeping the low band of every level."""
    low, count = cat([ct, mr]), len(ct)
    lows, details = [], []
    for _ in range(J):
        bands = dwt2(low, wave, 1, mode)
        # halving at every level keeps a constant image that constant, so one sharpness fits all levels
        low = bands.yl / 2
        lows.append(low)
        details.append(bands.yh[0][:, 0] / 2)
    return PairPyramid(
        tuple(low[:count] for low in lows),
        tuple(low[count:] for low in lows),
        tuple(detail[:count] for detail in details),
        tuple(detail[count:] for detail in details),
        wave,
        mode,
        (ct.shape[-2], ct.shape[-1]),
    )


def mix(pyramid: PairPyramid, masks: Sequence[Tensor]) -> Tensor:
    """Blend every band by its mask, m ct + (1 - m) mr, and invert.

    Args:
        pyramid: of J levels.
        masks: CT shares: (B, 3, h_j, w_j) for the details of every level, finest first, then (B, 1, h_J, w_J).

    Returns:
        (B, 1, H, W).
    """
    low = blend(masks[-1], pyramid.ct_low[-1], pyramid.mr_low[-1])
    sizes = [pyramid.size, *((level.shape[-2], level.shape[-1]) for level in pyramid.ct_low[:-1])]
    for level in reversed(range(pyramid.J)):
        details = blend(masks[level], pyramid.ct_details[level], pyramid.mr_details[level])
        bands = Bands(2 * low, [2 * details[:, None]], pyramid.wave, pyramid.mode, sizes[level])
        low = idwt2(bands)
    return low


def blend(mask: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """m ct + (1 - m) mr, written so that equal inputs come back to the last bit."""
    return mr + mask * (ct - mr)


def mask_names(J: int) -> tuple[str, ...]:
    """What the masks of a pyramid of J levels are called."""
    return (*(f"level {level} LH, HL, HH" for level in range(1, J + 1)), "low band")
