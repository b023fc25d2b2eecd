"""The evaluation's metrics made differentiable, for the training recipe that optimises them.

A network trained on these is trained on what it is judged by: model cards and tables say so. SD, SF, SCD, VIF, SSIM and
Qabf are the definitions of ``evaluation.fusion_metrics`` up to rounding; MI counts with triangular bins.
All take (B, 1, H, W) in [0, 1] and give one number an image, (B,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.fusion.filters import gaussian_means, gradients, magnitude

_TINY = 1e-8


def standard_deviation(fused: Tensor) -> Tensor:
    """SD over the pixels, in the units of the image."""
    return _root(fused.flatten(1).var(1, correction=0))


def spatial_frequency(fused: Tensor) -> Tensor:
    """SF: root of the mean squared steps along rows and columns, in the units of the image."""
    return _root(sum(fused.diff(dim=dim).square().mean((1, 2, 3)) for dim in (-1, -2)))


def correlations_of_differences(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """SCD (Aslantas and Bendes, 2015), -2 to 2."""
    return _correlation(fused - mr, ct) + _correlation(fused - ct, mr)


def structural_similarity(fused: Tensor, source: Tensor) -> Tensor:
    """SSIM (Wang et al., 2004), data range 1, Gaussian window of 11 pixels and sigma 1.5; a smaller odd one where the
    image is smaller."""
    size = min(11, *(side - (side + 1) % 2 for side in fused.shape[-2:]))
    count = fused.shape[1]
    stacked = torch.cat([fused, source, fused * fused, source * source, fused * source], 1)
    mean_f, mean_s, ff, ss, fs = gaussian_means(stacked, size, 1.5).split(count, 1)
    var_f, var_s, both = ff - mean_f.square(), ss - mean_s.square(), fs - mean_f * mean_s
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_f * mean_s + c1) * (2 * both + c2)
    return (similarity / ((mean_f.square() + mean_s.square() + c1) * (var_f + var_s + c2))).mean((1, 2, 3))


def visual_information_fidelity(fused: Tensor, source: Tensor) -> Tensor:
    """VIF in the pixel domain over 4 scales (Sheikh and Bovik, 2006), noise variance 2 on grey levels."""
    reference, distorted = 255 * source, 255 * fused
    carried: Tensor | float = 0.0
    offered: Tensor | float = 0.0
    for size in (17, 9, 5, 3):
        if size < 17 and min(reference.shape[-2:]) >= size:
            both = gaussian_means(torch.cat([reference, distorted], 1), size, size / 5)[..., ::2, ::2]
            reference, distorted = both[:, :1], both[:, 1:]
        if min(reference.shape[-2:]) < size:
            continue
        stacked = torch.cat([reference, distorted, reference**2, distorted**2, reference * distorted], 1)
        mean_r, mean_d, rr, dd, rd = gaussian_means(stacked, size, size / 5).split(1, 1)
        var_r, var_d = (rr - mean_r**2).clamp_min(0), (dd - mean_d**2).clamp_min(0)
        # in float32 a flat place keeps a variance of rounding errors, far below the noise
        flat = (var_r < 1e-2) | (var_d < 1e-2)
        gain = torch.where(flat, 0.0, (rd - mean_r * mean_d) / var_r.clamp_min(1e-2)).clamp_min(0)
        noise = (var_d - gain.square() * var_r).clamp_min(0)
        carried = carried + torch.log10(1 + gain.square() * var_r / (noise + 2)).sum((1, 2, 3))
        offered = offered + torch.log10(1 + var_r / 2).sum((1, 2, 3))
    return torch.as_tensor(carried) / torch.as_tensor(offered).clamp_min(_TINY)


def edge_information(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """Qabf (Xydeas and Petrovic, 2000), 0 to 0.975."""
    fused_edge = gradients(fused)
    strength = magnitude(*fused_edge)
    kept: Tensor | float = 0.0
    weights: Tensor | float = 0.0
    for source in (ct, mr):
        edge = gradients(source)
        own = magnitude(*edge)
        larger = torch.maximum(strength, own)
        relative = torch.where(larger > _TINY, torch.minimum(strength, own) / larger.clamp_min(_TINY), 1.0)
        aligned = (fused_edge[0] * edge[0] + fused_edge[1] * edge[1]).abs() / (strength * own).clamp_min(_TINY)
        # the arc cosine has no slope at 1
        turned = 1 - torch.arccos(aligned.clamp(0, 1 - 1e-6)) * (2 / torch.pi)
        quality = 0.9994 * torch.sigmoid(15 * (relative - 0.5)) * 0.9879 * torch.sigmoid(22 * (turned - 0.8))
        kept = kept + (quality * own).sum((1, 2, 3))
        weights = weights + own.sum((1, 2, 3))
    return torch.as_tensor(kept) / torch.as_tensor(weights).clamp_min(_TINY)


def mutual_information(fused: Tensor, source: Tensor, bins: int = 64) -> Tensor:
    """MI in bits: every pixel is shared between the two nearest of ``bins`` levels, in both images."""
    levels = [image.flatten(1).clamp(0, 1) * (bins - 1) for image in (fused, source)]
    joint = fused.new_zeros(len(fused), bins * bins)
    (low_f, part_f), (low_s, part_s) = ((level.detach().floor().clamp_max(bins - 2), level) for level in levels)
    for up_f in (0, 1):
        weight_f = (part_f - low_f) if up_f else 1 - (part_f - low_f)
        for up_s in (0, 1):
            weight_s = (part_s - low_s) if up_s else 1 - (part_s - low_s)
            place = ((low_f + up_f) * bins + low_s + up_s).long()
            joint = joint.scatter_add(1, place, weight_f * weight_s)
    share = joint.view(-1, bins, bins) / fused[0].numel()
    return _bits(share.sum(1)) + _bits(share.sum(2)) - _bits(share.flatten(1))


def _bits(share: Tensor) -> Tensor:
    """Entropy over the last axis."""
    return -(share * share.clamp_min(1e-12).log2()).sum(-1)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    a, b = (image.flatten(1) - image.flatten(1).mean(1, keepdim=True) for image in (one, other))
    return F.cosine_similarity(a, b, dim=1)


def _root(x: Tensor | int) -> Tensor:
    """A square root whose slope stays finite at zero."""
    return (torch.as_tensor(x) + 1e-12).sqrt()
