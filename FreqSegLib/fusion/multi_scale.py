"""The large fusion network: mask networks with attention at every level of one pyramid."""

from __future__ import annotations

from typing import Any

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.fusion.attention import ChannelAttention, SpatialAttention
from FreqSegLib.fusion.frequency_importance import FrequencyImportance, GlobalController
from FreqSegLib.fusion.network import SHARPNESS, Correction, FusionNetwork, exchanged
from FreqSegLib.fusion.pyramid import PairPyramid


class MultiScaleWaveletFusionNet(FusionNetwork):
    """A mask network a level, attention on its features, importance of the bands, and a controller of the levels.

    Level j's logits are importance_j (k (\\|ct\\| - \\|mr\\|) + J weight_j (f_j(ct, mr) - f_j(mr, ct))). The
    controller's weight says how much the level departs from choose-max, the importance how sharply its bands choose.

    A coarse level decides for a square of pixels at once; a pixel gate, 0 before training, lets the network return to a
    mix of single pixels, sigmoid(k (ct - mr)), where that is better: image = (1 - gate) wavelets + gate pixels.

    Args:
        wave, halo_limit: as for :class:`FusionNetwork`.
        num_scales: levels of the one pyramid.
        width: channels of the mask networks.
        reduction: of the channel attention.
        kernel_size: of the spatial attention, odd.

    Raises:
        SettingsError: a number out of range.
    """

    kind = "multi-scale"

    def __init__(
        self,
        wave: str = "db4",
        num_scales: int = 3,
        width: int = 16,
        reduction: int = 8,
        kernel_size: int = 7,
        halo_limit: int = 0,
    ) -> None:
        super().__init__(wave, num_scales, halo_limit)
        if width < 1:
            raise SettingsError(f"width must be at least 1 channel, got {width}")
        self.num_scales, self.width, self.reduction, self.kernel_size = num_scales, width, reduction, kernel_size
        self.mask_nets = nn.ModuleList(MaskNet(width, reduction, kernel_size) for _ in range(num_scales))
        self.importance = nn.ModuleList(FrequencyImportance() for _ in range(num_scales))
        self.controller = GlobalController(num_scales)
        self.pixel_gate = nn.Conv2d(width, 1, 3, padding=1)
        self.open_pixel_gate(0.0)
        self.pixel_sharpness = nn.Parameter(torch.tensor(SHARPNESS).log())

    @torch.no_grad()
    def open_pixel_gate(self, share: float) -> None:
        """Let the gate be ``share`` everywhere, whatever the images hold.

        Raises:
            SettingsError: a share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise SettingsError(f"the pixel gate's share must lie in [0, 1], got {share}")
        self.pixel_gate.weight.zero_()
        assert self.pixel_gate.bias is not None
        self.pixel_gate.bias.fill_(share)

    def config(self) -> dict[str, Any]:
        return {
            "wave": self.wave,
            "num_scales": self.num_scales,
            "width": self.width,
            "reduction": self.reduction,
            "kernel_size": self.kernel_size,
            "halo_limit": self.halo_limit,
        }

    def correction(self, pyramid: PairPyramid, ct: Tensor, mr: Tensor) -> Correction:
        levels = self.controller(pyramid.ct_low[-1], pyramid.mr_low[-1])
        learned, importance = [], []
        for level in range(self.J):
            term, features = self.mask_nets[level](_seen(pyramid, level, "ct"), _seen(pyramid, level, "mr"))
            if level == 0:
                gate = self._enlarged(_bounded(self.pixel_gate(features)), pyramid.size)
            learned.append(self.J * levels[:, level, None, None, None] * term)
            importance.append(self.importance[level](pyramid, level))
        weights = {"levels": levels, "importance": torch.stack(importance, 1), "pixel_gate": gate}
        pixel_mask = (self.pixel_sharpness.exp() * (ct - mr)).sigmoid()
        return Correction([term[:, 1:] for term in learned], learned[-1][:, :1], importance, weights, pixel_mask)

    def _enlarged(self, band: Tensor, size: tuple[int, int]) -> Tensor:
        """A map of the finest level's grid at the image's size; long filters make bands larger than half of it."""
        offset = pywt.Wavelet(self.wave).dec_len // 2 - 1
        doubled = F.interpolate(band, scale_factor=2, mode="bilinear", align_corners=False)
        return doubled[..., offset : offset + size[0], offset : offset + size[1]]


class MaskNet(nn.Module):
    """Features of a level's bands, a residual block, channel and spatial attention, and four logits (LL, LH, HL, HH).

    Attention weighs the features in front of the last convolution. On the masks themselves a factor below 1 would
    favour the MR, whatever the images hold.
    """

    def __init__(self, width: int, reduction: int, kernel_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(8, width),
            _Residual(width),
            ChannelAttention(width, reduction),
            SpatialAttention(kernel_size),
        )
        self.last = nn.Conv2d(width, 4, 3, padding=1, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, ct: Tensor, mr: Tensor) -> tuple[Tensor, Tensor]:
        """Bands of each source (B, 4, h, w) -> logits (B, 4, h, w), of opposite sign when the sources are exchanged,
        and features (B, width, h, w) that do not change then."""
        difference, mean = exchanged(self.features, ct, mr)
        return self.last(difference), mean


class _Residual(nn.Module):
    """x + f(x), rectified."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            _convolution(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.change(x)).relu()


class _Bounded(torch.autograd.Function):
    """Clamp to [0, 1] that still learns outside of it: a slope that leads back inside is passed on.

    A plain clamp has none there, so a gate that the first steps close everywhere would never open again.
    """

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> Tensor:
        (x,), (slope,) = context.saved_tensors, slopes
        stuck = ((x < 0) & (slope > 0)) | ((x > 1) & (slope < 0))
        return slope.masked_fill(stuck, 0.0)


def _bounded(x: Tensor) -> Tensor:
    return _Bounded.apply(x)


def _convolution(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def _seen(pyramid: PairPyramid, level: int, source: str) -> Tensor:
    """One source's low band and detail magnitudes, (B, 4, h, w); details are small, so they are shown enlarged."""
    low, details = (
        (pyramid.ct_low[level], pyramid.ct_details[level])
        if source == "ct"
        else (pyramid.mr_low[level], pyramid.mr_details[level])
    )
    return torch.cat([low, 4 * details.abs()], 1)
