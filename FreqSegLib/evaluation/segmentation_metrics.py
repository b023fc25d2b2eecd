"""How well a mask matches the truth: DSC, NSD and HD95 through MONAI, and their intervals over cases.

Conventions for empty masks, so that no average hides them: these numbers exist only for cases whose truth is not empty.
A case without the target counts under the share that comes out empty instead. Where the target exists and the mask is
empty, DSC and NSD are 0 and HD95 is the image's diagonal, the largest distance the grid has.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

NSD_TOLERANCE = 2.0
RESAMPLES = 2000


@dataclass(frozen=True)
class Overlap:
    """One case against its truth.

    Attributes:
        dsc: Dice similarity coefficient in [0, 1].
        nsd: normalised surface Dice in [0, 1]: share of both boundaries' voxels that lie within the tolerance of the
            other boundary (Nikolov et al., 2021).
        hd95: the larger of both directions' 95th percentile of boundary distances, in the unit of the spacing.
    """

    dsc: float
    nsd: float
    hd95: float


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of ``n`` cases with the mean's 95 % interval; NaN where there are too few."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


def overlap(
    prediction: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    spacing: Sequence[float],
    tolerance: float = NSD_TOLERANCE,
) -> Overlap:
    """DSC, NSD and HD95 of one case.

    Args:
        prediction: (k, j, i) or (j, i) mask. Axes with a single voxel are left out, so an image with k == 1 is measured
            in its plane.
        truth: the same shape, not empty.
        spacing: distance of neighbouring voxels along the array's axes, in array order (k, j, i).
        tolerance: of NSD, in the unit of ``spacing``.

    Raises:
        InputError: the truth is empty, shapes differ, or the spacing does not fit.
    """
    if prediction.shape != truth.shape:
        raise InputError(f"mask and truth must have one shape, got {prediction.shape} and {truth.shape}")
    if len(spacing) != truth.ndim or not min(spacing) > 0:
        raise InputError(f"spacing must be {truth.ndim} lengths > 0, got {tuple(spacing)}")
    if not truth.any():
        raise InputError("overlap is only defined where the target exists; count empty cases apart")
    if not prediction.any():
        return Overlap(0.0, 0.0, diagonal(truth.shape, spacing))
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    axes = [axis for axis in range(truth.ndim) if truth.shape[axis] > 1]
    if len(axes) < 2:
        axes = list(range(truth.ndim))[-2:]
    lengths = [float(spacing[axis]) for axis in axes]
    batch = [_batch(mask.reshape([mask.shape[axis] for axis in axes])) for mask in (prediction, truth)]
    with warnings.catch_warnings():
        # MONAI calls a function of its own with an argument it has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        surface = compute_surface_dice(*batch, class_thresholds=[tolerance], include_background=True, spacing=lengths)
        distance = compute_hausdorff_distance(*batch, include_background=True, percentile=95, spacing=lengths)
    return Overlap(dice(prediction, truth), float(surface), float(distance))


def dice(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """DSC of masks of any shape, the truth not empty (see :func:`overlap`)."""
    if not truth.any():
        raise InputError("DSC is only defined where the target exists; count empty cases apart")
    from monai.metrics import compute_dice

    return float(compute_dice(_batch(prediction), _batch(truth), include_background=True))


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Distance between the centres of two opposite corner voxels."""
    return float(np.linalg.norm([(count - 1) * length for count, length in zip(shape, spacing, strict=True)]))


def summarise(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Summary:
    """Mean, sample standard deviation, and the percentile bootstrap's 95 % interval of the mean over cases.

    Args:
        values: one a case.
        seed: of the resampling; the same values and seed give the same interval.
        resamples: how often cases are drawn anew, with replacement.
    """
    cases = np.asarray(values, dtype=np.float64)
    nan = float("nan")
    if not cases.size:
        return Summary(0, nan, nan, nan, nan)
    if cases.size == 1:
        return Summary(1, float(cases[0]), nan, nan, nan)
    drawn = np.random.default_rng(seed).integers(0, cases.size, (resamples, cases.size))
    low, high = np.percentile(cases[drawn].mean(1), (2.5, 97.5))
    return Summary(cases.size, float(cases.mean()), float(cases.std(ddof=1)), float(low), float(high))


def _batch(mask: NDArray[np.bool_]) -> Tensor:
    """A mask as MONAI's (batch 1, channel 1, ...) tensor."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]
