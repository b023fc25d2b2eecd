"""The small fusion network: masks from the low bands alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.fusion.network import Correction, FusionNetwork, exchanged
from FreqSegLib.fusion.pyramid import PairPyramid


class WaveletFusionNet(FusionNetwork):
    """Three convolutions (2 -> 16 -> 32 -> 1 + 3J) from the low bands to the masks; 6,100 weights at J = 1.

    The same convolutions read the low bands of every level, and each level has output channels of its own, so every
    mask is made at its own level's size. They run on a grid ``stride`` times coarser than the band, which makes the
    network about as fast as the wavelet transform itself; what they learn is enlarged and added to the choice between
    the coefficients, which stays as fine as the band.

    Args:
        wave, J, halo_limit: as for :class:`FusionNetwork`.
        stride: pixels of a low band, each way, that the convolutions see as one; 1 for full size.

    Raises:
        SettingsError: a number out of range.
    """

    kind = "single-scale"

    def __init__(self, wave: str = "haar", J: int = 1, halo_limit: int = 0, stride: int = 2) -> None:
        super().__init__(wave, J, halo_limit)
        if stride < 1:
            raise SettingsError(f"stride must be at least 1, got {stride}")
        self.stride = stride
        self.features = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.last = nn.Conv2d(32, 1 + 3 * J, 3, padding=1, bias=False)
        nn.init.zeros_(self.last.weight)

    def config(self) -> dict[str, Any]:
        return {"wave": self.wave, "J": self.J, "halo_limit": self.halo_limit, "stride": self.stride}

    def correction(self, pyramid: PairPyramid, ct: Tensor, mr: Tensor) -> Correction:
        details = []
        for level, (ct_low, mr_low) in enumerate(zip(pyramid.ct_low, pyramid.mr_low, strict=True)):
            difference, _ = exchanged(self.features, self._coarser(ct_low), self._coarser(mr_low))
            learned = self.last(difference)
            if self.stride > 1:
                learned = F.interpolate(learned, size=ct_low.shape[-2:], mode="bilinear", align_corners=False)
            details.append(learned[:, 1 + 3 * level : 4 + 3 * level])
        return Correction(details, learned[:, :1])

    def _coarser(self, low: Tensor) -> Tensor:
        if self.stride == 1:
            return low
        height, width = low.shape[-2:]
        return F.adaptive_avg_pool2d(low, (-(-height // self.stride), -(-width // self.stride)))
