"""Boundary IoU (Cheng et al., CVPR 2021): the overlap of both masks' rims, which large masks cannot hide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError

DIAGONAL_SHARE = 0.02
"""Width of the rim over the image's diagonal, as in the paper."""


def boundary_iou(prediction: NDArray[np.bool_], truth: NDArray[np.bool_], width: int | None = None) -> float:
    """Intersection over union of the parts of both masks within ``width`` voxels of their boundaries.

    Args:
        prediction: 2D or 3D mask; axes with a single voxel are left out.
        truth: the same shape, not empty.
        width: of the rim inside each mask, in voxels; 2 % of the image's diagonal, at least 1, if None.

    Returns:
        In [0, 1].

    Raises:
        InputError: the shapes differ, the truth is empty, or the width is below 1.
    """
    if prediction.shape != truth.shape:
        raise InputError(f"mask and truth must have one shape, got {prediction.shape} and {truth.shape}")
    if not truth.any():
        raise InputError("boundary IoU is only defined where the target exists; count empty cases apart")
    found, real = prediction.squeeze(), truth.squeeze()
    chosen = max(1, round(DIAGONAL_SHARE * float(np.linalg.norm(real.shape)))) if width is None else width
    if chosen < 1:
        raise InputError(f"the rim must be at least 1 voxel wide, got {chosen}")
    one, other = _rim(found, chosen), _rim(real, chosen)
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union)


def _rim(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    from scipy.ndimage import binary_erosion

    # outside the image counts as background, so a mask that touches the edge has a rim there
    return mask & ~binary_erosion(mask, np.ones((3,) * mask.ndim, bool), iterations=width)
