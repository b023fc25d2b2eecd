"""How much of a CT and an MR a fused image carries: the metrics of the fusion literature, each defined where it stands.

Every function takes (H, W) arrays of grey levels from 0 to 255, whole or not, in the order fused, CT, MR; the order of
the two sources matters nowhere. Where a metric exists for each source, its docstring says whether both are summed or
averaged. A metric that has no value (the correlation with a constant image, the edges of a picture without any) is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from FreqSegLib.errors import InputError

Image = NDArray[np.floating]

GREY_LEVELS = 256
PEAK = 255.0
BITS_PER_NAT = 1.0 / float(np.log(2.0))
FEATURE_LEVELS = 64
VIF_NOISE = 2.0
SMALLEST_SIDE = 11


@dataclass(frozen=True)
class Metric:
    """One row of a table.

    Attributes:
        key: as in :func:`fusion_table`.
        title: in words.
        unit: ``bits``, ``dB``, ``grey levels`` or empty.
        better: 1 where more is better, -1 where less is.
        of: ``fused image alone``, or how the two sources are put together.
    """

    key: str
    title: str
    unit: str
    better: int
    of: str


METRICS: tuple[Metric, ...] = (
    Metric("EN", "entropy", "bits", 1, "fused image alone"),
    Metric("SD", "standard deviation", "grey levels", 1, "fused image alone"),
    Metric("SF", "spatial frequency", "grey levels", 1, "fused image alone"),
    Metric("AG", "average gradient", "grey levels", 1, "fused image alone"),
    Metric("MI", "mutual information", "bits", 1, "sum over CT and MR"),
    Metric("SCD", "sum of the correlations of differences", "", 1, "sum over CT and MR"),
    Metric("CC", "correlation", "", 1, "mean over CT and MR"),
    Metric("VIF", "visual information fidelity", "", 1, "sum over CT and MR"),
    Metric("Qabf", "edge information kept", "", 1, "weighted by each source's edges"),
    Metric("Nabf", "edges that are in neither source", "", -1, "weighted by each source's edges"),
    Metric("FMI", "feature mutual information", "", 1, "mean over CT and MR"),
    Metric("SSIM", "structural similarity", "", 1, "mean over CT and MR"),
    Metric("PSNR", "peak signal-to-noise ratio", "dB", 1, "of the error averaged over CT and MR"),
    Metric("EP", "edge preservation", "", 1, "against the stronger edge of CT and MR"),
)
"""What :func:`fusion_table` holds beside the values of each source, in the order of the tables."""


@dataclass(frozen=True)
class Ceiling:
    """The most (for Nabf: the least) a metric can reach on one pair; None where the pair sets no bound."""

    value: float | None
    why: str


def fusion_table(fused: Image, ct: Image, mr: Image) -> dict[str, float]:
    """Every metric of one fused image.

    Args:
        fused: (H, W), 0 to 255; at least 11 pixels a side.
        ct: the same shape and range.
        mr: the same shape and range.

    Returns:
        The keys of :data:`METRICS`, and MI, VIF, SSIM and PSNR for each source (``MI_CT``, ``MI_MR`` ...).

    Raises:
        InputError: shapes differ, a side is shorter than 11 pixels, or values are not finite or outside 0 to 255.
    """
    fused, ct, mr = _checked(fused, ct, mr)
    each: dict[str, Callable[[Image, Image], float]] = {
        "MI": mutual_information,
        "VIF": visual_information_fidelity,
        "SSIM": structural_similarity,
        "PSNR": peak_signal_to_noise,
    }
    apart = {f"{name}_{side}": score(fused, image) for name, score in each.items() for side, image in _sides(ct, mr)}
    return {
        "EN": entropy(fused),
        "SD": standard_deviation(fused),
        "SF": spatial_frequency(fused),
        "AG": average_gradient(fused),
        "MI": apart["MI_CT"] + apart["MI_MR"],
        "SCD": correlations_of_differences(fused, ct, mr),
        "CC": correlation(fused, ct, mr),
        "VIF": apart["VIF_CT"] + apart["VIF_MR"],
        "Qabf": edge_information(fused, ct, mr),
        "Nabf": fusion_artefacts(fused, ct, mr),
        "FMI": feature_mutual_information(fused, ct, mr),
        "SSIM": (apart["SSIM_CT"] + apart["SSIM_MR"]) / 2,
        "PSNR": average_peak_signal_to_noise(fused, ct, mr),
        "EP": edge_preservation(fused, ct, mr),
        **apart,
    }


def published_table(fused: Image, ct: Image, mr: Image) -> dict[str, float]:
    """The eight numbers as the evaluator of CDDFuse (Zhao et al., 2023) counts them, to stand beside published rows.

    Differs from :func:`fusion_table` in two: MI is in nats, and SSIM is the sum over both sources of the 7 x 7
    uniform-window form with a data range of 2 on 0-255 data, which leaves its two constants almost without effect.

    Returns:
        EN (bits), SD, SF, MI (nats, sum), SCD, VIF (sum), Qabf, SSIM (sum).
    """
    fused, ct, mr = _checked(fused, ct, mr)
    return {
        "EN": entropy(fused),
        "SD": standard_deviation(fused),
        "SF": spatial_frequency(fused),
        "MI": sum(mutual_information(fused, image) for image in (ct, mr)) / BITS_PER_NAT,
        "SCD": correlations_of_differences(fused, ct, mr),
        "VIF": sum(visual_information_fidelity(fused, image) for image in (ct, mr)),
        "Qabf": edge_information(fused, ct, mr),
        "SSIM": sum(structural_similarity(fused, image, data_range=2.0, uniform=True) for image in (ct, mr)),
    }


def entropy(fused: Image) -> float:
    """EN: Shannon entropy of the grey levels, in bits (1 nat = 1.4427 bits), 0 to 8.

    -sum p log2 p over the 256 whole grey levels (Roberts, van Aardt and Ahmed, 2008). More is usually taken as better,
    though noise and ringing raise it too.
    """
    return _entropy_of(np.bincount(_whole(fused).ravel(), minlength=GREY_LEVELS))


def standard_deviation(fused: Image) -> float:
    """SD: standard deviation of the grey levels over all pixels (not the sample's), 0 to 127.5 (Rao, 1997)."""
    return float(np.std(np.asarray(fused, dtype=np.float64)))


def spatial_frequency(fused: Image) -> float:
    """SF: root of the mean squared step along rows plus that along columns, in grey levels, 0 to 361.

    sqrt(RF^2 + CF^2) with the means over the existing differences (Eskicioglu and Fisher, 1995).
    """
    image = np.asarray(fused, dtype=np.float64)
    return float(np.sqrt(np.mean(np.diff(image, axis=1) ** 2) + np.mean(np.diff(image, axis=0) ** 2)))


def average_gradient(fused: Image) -> float:
    """AG: mean over pixels of sqrt((gx^2 + gy^2) / 2), in grey levels a pixel, 0 to 255 (Cui et al., 2015).

    The gradient is central inside and one-sided at the border.
    """
    down, along = np.gradient(np.asarray(fused, dtype=np.float64))
    return float(np.mean(np.sqrt((down**2 + along**2) / 2)))


def mutual_information(fused: Image, source: Image) -> float:
    """MI of the fused image and one source, in bits (1 nat = 1.4427 bits), from 0 to the smaller of their entropies.

    Of the joint histogram of whole grey levels, 256 x 256 (Qu, Zhang and Yan, 2002). Tables give the sum over both
    sources; programs built on natural logarithms give 0.693 times this.
    """
    joint = _joint(_whole(fused), _whole(source), GREY_LEVELS)
    return _information(joint)


def correlations_of_differences(fused: Image, ct: Image, mr: Image) -> float:
    """SCD: corr(CT, F - MR) + corr(MR, F - CT), a sum, -2 to 2 (Aslantas and Bendes, 2015).

    2 is reached by the plain sum of both. NaN where a difference is constant, as for a fused image that copies a source
    exactly; there the term without variation counts 0 if the other one exists.
    """
    terms = np.array([_pearson(ct, fused - mr), _pearson(mr, fused - ct)])
    return float(np.nansum(terms)) if np.isfinite(terms).any() else float("nan")


def correlation(fused: Image, ct: Image, mr: Image) -> float:
    """CC: mean of the Pearson correlations of the fused image with CT and with MR, -1 to 1 (Deshmukh, 2010)."""
    return (_pearson(fused, ct) + _pearson(fused, mr)) / 2


def visual_information_fidelity(fused: Image, source: Image) -> float:
    """VIF of the fused image against one source, 0 upwards; 1 for a copy, above 1 where contrast is raised.

    Sheikh and Bovik (2006) in the pixel domain over 4 scales (windows of 17, 9, 5 and 3 pixels), noise variance 2.
    Tables give the sum over both sources. Small images use the scales they have room for.
    """
    reference: Image = np.asarray(source, dtype=np.float64)
    distorted: Image = np.asarray(fused, dtype=np.float64)
    tiny = 1e-10
    carried = offered = 0.0
    for scale in range(1, 5):
        size = 2 ** (5 - scale) + 1
        if scale > 1 and min(reference.shape) >= size:
            reference, distorted = (_windowed(image, size)[::2, ::2] for image in (reference, distorted))
        if min(reference.shape) < size:
            continue
        mean_r, mean_d = _windowed(reference, size), _windowed(distorted, size)
        var_r = np.maximum(_windowed(reference**2, size) - mean_r**2, 0.0)
        var_d = np.maximum(_windowed(distorted**2, size) - mean_d**2, 0.0)
        gain = (_windowed(reference * distorted, size) - mean_r * mean_d) / (var_r + tiny)
        noise = var_d - gain**2 * (var_r + tiny)
        flat_r, flat_d = var_r < tiny, var_d < tiny
        gain[flat_r | flat_d] = 0.0
        noise[flat_r] = var_d[flat_r]
        noise[flat_d] = 0.0
        var_r[flat_r] = 0.0
        negative = gain < 0
        noise[negative] = var_d[negative]
        gain[negative] = 0.0
        noise = np.maximum(noise, tiny)
        carried += float(np.log10(1 + gain**2 * var_r / (noise + VIF_NOISE)).sum())
        offered += float(np.log10(1 + var_r / VIF_NOISE).sum())
    return carried / offered if offered > 0 else float("nan")


def edge_information(fused: Image, ct: Image, mr: Image) -> float:
    """Qabf: share of the sources' edge strength and orientation that the fused image keeps, 0 to 0.975.

    Xydeas and Petrovic (2000) with their constants, L = 1 and Sobel edges: each pixel's preservation, weighted by the
    strength of the source's edge there, over both sources. NaN where neither source has an edge.
    """
    kept, _, weights = _edge_terms(fused, ct, mr)
    return _ratio(kept[0] * weights[0] + kept[1] * weights[1], weights[0] + weights[1])


def fusion_artefacts(fused: Image, ct: Image, mr: Image) -> float:
    """Nabf: edge strength of the fused image that neither source has, 0 (none) to 1; less is better.

    Petrovic and Xydeas (2005): of the edge information that is not kept, the part at pixels where the fused edge is
    stronger than that of both sources. Qabf, Nabf and what is lost add up to 1. Weighted by the sources' edges, it is
    blind to ringing where both sources are flat; :func:`edge_overshoot` is not.
    """
    kept, added, weights = _edge_terms(fused, ct, mr)
    missed = (1 - kept[0]) * weights[0] + (1 - kept[1]) * weights[1]
    return _ratio(added * missed, weights[0] + weights[1])


def feature_mutual_information(fused: Image, ct: Image, mr: Image) -> float:
    """FMI: normalised mutual information of gradient images, a mean over both sources, 0 to 1.

    mean of 2 I(F; S) / (H(F) + H(S)) over S in CT, MR (Haghighat, Aghagolzadeh and Seyedarabi, 2011), of Sobel
    magnitudes in 64 levels from 0 to the largest of the three images, counted in a joint histogram over the whole
    image. Haghighat's program estimates it window by window instead, so numbers from there do not compare.
    """
    strengths = [np.hypot(*_sobel(image)) for image in (fused, ct, mr)]
    most = max(float(strength.max()) for strength in strengths)
    if most == 0:
        return float("nan")
    levels = [
        np.minimum(strength * (FEATURE_LEVELS / most), FEATURE_LEVELS - 1).astype(np.intp) for strength in strengths
    ]
    return (_shared(levels[0], levels[1]) + _shared(levels[0], levels[2])) / 2


def structural_similarity(fused: Image, source: Image, *, data_range: float = PEAK, uniform: bool = False) -> float:
    """SSIM of the fused image and one source, -1 to 1, 1 for a copy; tables give the mean over both sources.

    Wang et al. (2004): Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, averaged over the places where
    the window fits.

    Args:
        fused: (H, W).
        source: (H, W).
        data_range: of the grey levels, for the two constants.
        uniform: a flat window of 7 pixels and sample covariances instead, as scikit-image has it unless told.
    """
    return float(np.mean(np.multiply(*_similarity_parts(fused, source, data_range, uniform))))


def peak_signal_to_noise(fused: Image, source: Image) -> float:
    """PSNR of the fused image against one source in dB: 10 log10(255^2 / MSE), 0 upwards, infinite for a copy."""
    return _decibels(_error(fused, source))


def average_peak_signal_to_noise(fused: Image, ct: Image, mr: Image) -> float:
    """PSNR in dB of the mean of both sources' MSE, 0 upwards; no image beats the plain average of the two.

    The mean of two PSNRs in dB is another number that has no ceiling: a copy of one source makes it infinite, and of
    all mixes the plain average has the lowest. That is why the errors are averaged, not the decibels.
    """
    return _decibels((_error(fused, ct) + _error(fused, mr)) / 2)


def edge_preservation(fused: Image, ct: Image, mr: Image) -> float:
    """EP: Pearson correlation of the fused image's Sobel magnitude with the larger of CT's and MR's, -1 to 1."""
    target = np.maximum(np.hypot(*_sobel(ct)), np.hypot(*_sobel(mr)))
    return _pearson(np.hypot(*_sobel(fused)), target)


def edge_overshoot(fused: Image, ct: Image, mr: Image, *, reach: int = 1) -> float:
    """How far the fused image leaves the range of its sources beside the CT's bone edges, in grey levels; 0 is best.

    Bone edges are the 5 % of pixels with the strongest Sobel magnitude of the CT, and all within 4 pixels of them.
    At each the fused value is held against the lowest and the highest value of both sources within ``reach`` pixels;
    what lies outside is averaged over these pixels.

    Args:
        fused: (H, W); values outside 0 to 255 count as they are.
        ct: (H, W).
        mr: (H, W).
        reach: pixels around each that set its range.
    """
    image, bone, soft = (np.asarray(one, dtype=np.float64) for one in (fused, ct, mr))
    strength = np.hypot(*_sobel(bone))
    edge = strength > max(float(np.percentile(strength, 95)), 0.0)
    if not edge.any():
        return float("nan")
    near = ndimage.binary_dilation(edge, iterations=4)
    size = 2 * reach + 1
    low = ndimage.minimum_filter(np.minimum(bone, soft), size)
    high = ndimage.maximum_filter(np.maximum(bone, soft), size)
    outside = np.maximum(image - high, 0) + np.maximum(low - image, 0)
    return float(outside[near].mean())


def ceilings(ct: Image, mr: Image) -> dict[str, Ceiling]:
    """What the pair itself allows: no fused image of it scores above (for Nabf: below) these.

    Args:
        ct: (H, W), 0 to 255.
        mr: the same shape and range.

    Returns:
        A ceiling for each key of :data:`METRICS`.
    """
    ct, mr = _checked(ct, mr)
    levels = _whole(ct), _whole(mr)
    entropies = [_entropy_of(np.bincount(level.ravel())) for level in levels]
    shared = _information(_joint(*levels, GREY_LEVELS))
    alike = _pearson(ct, mr)
    average = (ct + mr) / 2
    return {
        "EN": Ceiling(8.0, "256 grey levels, all equally often"),
        "SD": Ceiling(PEAK / 2, "half of the pixels 0, half of them 255"),
        "SF": Ceiling(None, "the pair sets none; noise and ringing raise it"),
        "AG": Ceiling(None, "the pair sets none; noise and ringing raise it"),
        "MI": Ceiling(
            min(sum(entropies), 8.0 + shared),
            "at most both sources' entropies, and what 256 levels hold plus what both share",
        ),
        "SCD": Ceiling(2.0, "reached by the plain sum"),
        "CC": Ceiling(float(np.sqrt((1 + alike) / 2)), "reached by the sum of both, each scaled to the same spread"),
        "VIF": Ceiling(None, "1 for a copy of each source, more where contrast is raised"),
        "Qabf": Ceiling(_edge_ceiling(ct, mr), "the best edge for each pixel by itself"),
        "Nabf": Ceiling(0.0, "no edge that is in neither source"),
        "FMI": Ceiling(1.0, "gradients that tell both sources' gradients"),
        "SSIM": Ceiling(_similarity_ceiling(ct, mr), "the best window for each place by itself"),
        "PSNR": Ceiling(average_peak_signal_to_noise(average, ct, mr), "the plain average"),
        "EP": Ceiling(1.0, "every edge as strong as the stronger source's"),
    }


def _checked(*images: Image) -> tuple[NDArray[np.float64], ...]:
    found = tuple(np.asarray(image, dtype=np.float64) for image in images)
    shapes = {image.shape for image in found}
    if len(shapes) != 1 or found[0].ndim != 2:
        raise InputError(
            f"fused image, CT and MR must be (H, W) arrays of one shape, got {[image.shape for image in found]}"
        )
    if min(found[0].shape) < SMALLEST_SIDE:
        raise InputError(f"metrics need at least {SMALLEST_SIDE} pixels a side, got {found[0].shape}")
    for image in found:
        low, high = float(image.min()), float(image.max())
        if not (low >= -1e-3 and high <= PEAK + 1e-3):
            raise InputError(f"grey levels must lie in 0 to 255, got {low:g} to {high:g}; clip or rescale them")
    return found


def _sides(ct: Image, mr: Image) -> tuple[tuple[str, Image], tuple[str, Image]]:
    return ("CT", ct), ("MR", mr)


def _whole(image: Image) -> NDArray[np.intp]:
    return np.clip(np.rint(np.asarray(image)), 0, PEAK).astype(np.intp)


def _entropy_of(counts: NDArray[np.intp]) -> float:
    share = counts[counts > 0] / counts.sum()
    # + 0.0: a constant image has 0 bits, not -0
    return float(-(share * np.log2(share)).sum() + 0.0)


def _joint(one: NDArray[np.intp], other: NDArray[np.intp], levels: int) -> NDArray[np.intp]:
    return np.bincount((one * levels + other).ravel(), minlength=levels**2).reshape(levels, levels)


def _information(joint: NDArray[np.intp]) -> float:
    found = _entropy_of(joint.sum(1)) + _entropy_of(joint.sum(0)) - _entropy_of(joint.ravel())
    return max(found, 0.0)


def _shared(one: NDArray[np.intp], other: NDArray[np.intp]) -> float:
    joint = _joint(one, other, FEATURE_LEVELS)
    both = _entropy_of(joint.sum(1)) + _entropy_of(joint.sum(0))
    return 2 * _information(joint) / both if both > 0 else float("nan")


def _pearson(one: Image, other: Image) -> float:
    a, b = one - np.mean(one), other - np.mean(other)
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / spread) if spread > 1e-9 else float("nan")


def _error(fused: Image, source: Image) -> float:
    return float(np.mean((np.asarray(fused, dtype=np.float64) - source) ** 2))


def _decibels(error: float) -> float:
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def _ratio(part: Image, whole: Image) -> float:
    total = float(np.sum(whole))
    return float(np.sum(part)) / total if total > 0 else float("nan")


def _sobel(image: Image) -> tuple[Image, Image]:
    """Steps along columns and down rows; the border repeats, so that it makes no edge."""
    values = np.asarray(image, dtype=np.float64)
    return ndimage.sobel(values, axis=1, mode="nearest"), ndimage.sobel(values, axis=0, mode="nearest")


def _windowed(image: Image, size: int) -> Image:
    """Means under a Gaussian of ``size`` pixels and sigma ``size / 5``, where it fits."""
    places = np.arange(size) - size // 2
    weights = np.exp(-(places**2) / (2 * (size / 5) ** 2))
    return _valid(image, weights / weights.sum())


def _valid(image: Image, weights: NDArray[np.float64]) -> Image:
    margin = len(weights) // 2
    for axis in (0, 1):
        image = ndimage.correlate1d(image, weights, axis=axis, mode="nearest")
    return image[margin:-margin, margin:-margin]


# Xydeas and Petrovic (2000): of edge strength (g) and orientation (a)
_GAMMA_G, _KAPPA_G, _SIGMA_G = 0.9994, -15.0, 0.5
_GAMMA_A, _KAPPA_A, _SIGMA_A = 0.9879, -22.0, 0.8


def _kept(strength: Image, orientation: Image) -> Image:
    """Preservation of an edge whose strength and orientation agree so far, each 0 to 1."""
    return (
        _GAMMA_G
        / (1 + np.exp(_KAPPA_G * (strength - _SIGMA_G)))
        * _GAMMA_A
        / (1 + np.exp(_KAPPA_A * (orientation - _SIGMA_A)))
    )


def _edges(image: Image) -> tuple[Image, Image]:
    """Strength, and orientation in (-pi/2, pi/2]."""
    along, down = _sobel(image)
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.where(along == 0, np.pi / 2, np.arctan(down / along))
    return np.hypot(along, down), angle


def _edge_terms(fused: Image, ct: Image, mr: Image) -> tuple[list[Image], NDArray[np.bool_], list[Image]]:
    """For CT and MR: what is kept at each pixel, where the fused edge exceeds both, and the weights."""
    strength, angle = _edges(fused)
    kept, weights = [], []
    for source in (ct, mr):
        own, own_angle = _edges(source)
        larger = np.maximum(strength, own)
        relative = np.divide(np.minimum(strength, own), larger, out=np.ones_like(larger), where=larger > 0)
        # an angle and the same turned by 180 degrees are one orientation
        turned = np.abs(np.abs(angle - own_angle) - np.pi / 2) / (np.pi / 2)
        kept.append(_kept(relative, turned))
        weights.append(own)
    return kept, (strength > weights[0]) & (strength > weights[1]), weights


def _edge_ceiling(ct: Image, mr: Image) -> float:
    """Qabf of the best edge at each pixel, whatever the pixels around it."""
    (one, one_angle), (other, other_angle) = _edges(ct), _edges(mr)
    larger = np.maximum(one, other)
    relative = np.divide(np.minimum(one, other), larger, out=np.ones_like(larger), where=larger > 0)
    apart = np.abs(one_angle - other_angle)
    apart = np.minimum(apart, np.pi - apart) / (np.pi / 2)
    table = _best_edges()
    steps = len(table) - 1
    best = table[np.rint(relative * steps).astype(int), np.rint(np.clip(apart, 0, 1) * steps).astype(int)]
    return _ratio(best * (one + other), one + other)


@lru_cache(maxsize=1)
def _best_edges(steps: int = 100) -> NDArray[np.float64]:
    """The most that one fused edge can keep of two: by the ratio of their strengths, and the angle between them."""
    places = np.linspace(0, 1, steps + 1)
    ratio, apart = np.meshgrid(places, places, indexing="ij")
    best = np.zeros_like(ratio)
    for share in np.linspace(0, 1, 41):
        strength = ratio + share * (1 - ratio)
        smaller = np.divide(ratio, strength, out=np.ones_like(ratio), where=strength > 0)
        for turn in np.linspace(0, 1, 41):
            total = _kept(strength, 1 - turn * apart) + ratio * _kept(smaller, 1 - (1 - turn) * apart)
            np.maximum(best, total / (1 + ratio), out=best)
    return best


def _similarity_parts(one: Image, other: Image, data_range: float, uniform: bool) -> tuple[Image, Image]:
    """SSIM's two factors at every place: of the means, and of the deviations from them."""
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if uniform:
        weights, unbiased = np.full(7, 1 / 7), 49 / 48
    else:
        places = np.arange(11) - 5
        gaussian = np.exp(-(places**2) / (2 * 1.5**2))
        weights, unbiased = gaussian / gaussian.sum(), 1.0
    mean_a, mean_b = _valid(a, weights), _valid(b, weights)
    var_a = unbiased * (_valid(a * a, weights) - mean_a**2)
    var_b = unbiased * (_valid(b * b, weights) - mean_b**2)
    both = unbiased * (_valid(a * b, weights) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (
        (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1),
        (2 * both + c2) / (var_a + var_b + c2),
    )


def _similarity_ceiling(ct: Image, mr: Image) -> float:
    """A bound on the mean of both SSIMs.

    With S1 and S2 the two factors, sqrt(2 - S1 - S2) is a distance (Brunet, Vrscay and Wang, 2012), and by the means of
    two numbers S1 S2 <= ((S1 + S2) / 2)^2. So with D the distance of the sources and x + y >= D those of the fused
    image to them, no window scores above the largest of ((1 - x^2/2)^2 + (1 - y^2/2)^2) / 2.
    """
    means, deviations = _similarity_parts(ct, mr, PEAK, uniform=False)
    distance = np.sqrt(np.maximum(2 - means - deviations, 0.0))

    def bound(x: Image) -> Image:
        return np.maximum(1 - x**2 / 2, 0.0) ** 2

    best = np.zeros_like(distance)
    for share in np.linspace(0, 0.5, 26):
        np.maximum(best, (bound(share * distance) + bound((1 - share) * distance)) / 2, out=best)
    return float(best.mean())
