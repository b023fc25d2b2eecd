"""From a saliency volume to a coarse mask: one threshold for the whole volume, components kept by their confidence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from FreqSegLib.settings import Threshold

HISTOGRAM_BINS = 256


def coarse_mask(
    saliency: NDArray[np.float32],
    valid: NDArray[np.bool_],
    *,
    threshold: Threshold = "otsu",
    value: float = 0.5,
    confidence_threshold: float = 0.5,
    num_contours: int = 0,
) -> NDArray[np.bool_]:
    """Threshold the slices that passed the gate.

    Args:
        saliency: (S, H, W) in [0, 1], normalised over the volume.
        valid: (S) slices that may hold the target, or (S, H, W) places; the rest stays empty.
        threshold: ``otsu``, ``kmeans`` (the middle of two cluster centres) or ``fixed``.
        value: the fixed threshold.
        confidence_threshold: 2D components whose mean saliency is lower are dropped.
        num_contours: largest components kept a slice; 0 keeps all.

    Returns:
        (S, H, W) bool. Empty input stays empty.
    """
    where = np.broadcast_to(valid.reshape(valid.shape + (1,) * (saliency.ndim - valid.ndim)), saliency.shape)
    mask = np.zeros(saliency.shape, dtype=bool)
    if not where.any():
        return mask
    values = saliency[where]
    cut = value if threshold == "fixed" else otsu(values) if threshold == "otsu" else two_means(values)
    np.greater(saliency, cut, out=mask)
    mask &= where
    for index in np.flatnonzero(mask.any((1, 2))):
        mask[index] = _kept(mask[index], saliency[index], confidence_threshold, num_contours)
    return mask


def otsu(values: NDArray[np.float32]) -> float:
    """Otsu (1979): the cut that maximises the variance between both classes, from a histogram of 256 bins."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return high
    # in float32 a narrow range cannot be cut into 256
    counts, edges = np.histogram(values.astype(np.float64), bins=HISTOGRAM_BINS, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts).astype(np.float64)
    total = np.cumsum(counts * centres)
    below, above = weight[:-1], weight[-1] - weight[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total[:-1] / below - (total[-1] - total[:-1]) / above) ** 2
    return float(edges[1 + int(np.nanargmax(between))])


def two_means(values: NDArray[np.float32], iterations: int = 100) -> float:
    """Middle between the centres of two clusters (k-means, k = 2, started at the extremes)."""
    low, high = float(values.min()), float(values.max())
    for _ in range(iterations):
        cut = (low + high) / 2
        upper = values > cut
        if upper.all() or not upper.any():
            break
        centres = float(values[~upper].mean()), float(values[upper].mean())
        if centres == (low, high):
            break
        low, high = centres
    return (low + high) / 2


def surrounding_background(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a slice (H, W) in [0, 1] is exactly black from its border inwards: air and padding hold no target."""
    labels, count = ndimage.label(image <= 0)
    if not count:
        return np.zeros(image.shape, dtype=bool)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, border[border > 0])


def largest_components_3d(mask: NDArray[np.bool_], smallest_share: float) -> NDArray[np.bool_]:
    """Drop 3D components smaller than a share of the largest one."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= smallest_share * sizes.max())[labels] & mask


def _kept(mask: NDArray[np.bool_], saliency: NDArray[np.float32], confidence: float, largest: int) -> NDArray[np.bool_]:
    labels, count = ndimage.label(mask)
    numbers = np.arange(1, count + 1)
    means = ndimage.mean(saliency, labels, numbers)
    keep = numbers[np.atleast_1d(means) >= confidence]
    if largest and len(keep) > largest:
        sizes = np.bincount(labels.ravel())[keep]
        keep = keep[np.argsort(-sizes, kind="stable")[:largest]]
    return np.isin(labels, keep)
