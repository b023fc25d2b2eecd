"""Boxes and points for a SAM-family model, from a coarse mask and its saliency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from FreqSegLib.settings import PromptKind


@dataclass(frozen=True)
class VisualPrompt:
    """What the decoder is asked about one component, in pixel centres of the slice.

    Attributes:
        box: (x0, y0, x1, y1) or None.
        points: (N, 2) as (x, y).
        labels: (N) 1 inside, 0 outside.
    """

    box: tuple[float, float, float, float] | None
    points: NDArray[np.float64]
    labels: NDArray[np.int64]


def visual_prompts(
    mask: NDArray[np.bool_],
    saliency: NDArray[np.float32],
    kind: PromptKind,
    *,
    num_points: int = 3,
    negative_points: int = 0,
    margin: tuple[float, float] = (0.0, 0.0),
) -> list[VisualPrompt]:
    """One prompt a component (``box``: one for all of them).

    Args:
        mask: (H, W) coarse mask.
        saliency: (H, W) in [0, 1].
        kind: ``boxes``, ``box``, ``points`` or ``boxes+points``.
        num_points: positive points: the most salient place, then the farthest ones from those chosen.
        negative_points: places outside the mask, among the least salient quarter and far from each other.
        margin: added to every side of a box, (rows, columns) in pixels.

    Returns:
        Empty for an empty mask.
    """
    if not mask.any():
        return []
    labels, count = ndimage.label(mask)
    if kind == "box":
        labels, count = mask.astype(np.int32), 1
    outside = _negative_points(mask, saliency, negative_points)
    prompts = []
    for number in range(1, count + 1):
        component = labels == number
        box = _box(component, margin) if kind != "points" else None
        inside = _positive_points(component, saliency, num_points) if "points" in kind else np.zeros((0, 2))
        points = np.concatenate([inside, outside])
        prompts.append(VisualPrompt(box, points, np.r_[np.ones(len(inside)), np.zeros(len(outside))].astype(np.int64)))
    return prompts


def _box(component: NDArray[np.bool_], margin: tuple[float, float]) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(component.any(1)), np.flatnonzero(component.any(0))
    height, width = component.shape
    return (
        max(-0.5, columns[0] - 0.5 - margin[1]),
        max(-0.5, rows[0] - 0.5 - margin[0]),
        min(width - 0.5, columns[-1] + 0.5 + margin[1]),
        min(height - 0.5, rows[-1] + 0.5 + margin[0]),
    )


def _positive_points(component: NDArray[np.bool_], saliency: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    inner = ndimage.binary_erosion(component)
    candidates = np.argwhere(inner if inner.any() else component)
    values = saliency[candidates[:, 0], candidates[:, 1]]
    chosen = [int(values.argmax())]
    distance = np.full(len(candidates), np.inf)
    while len(chosen) < min(count, len(candidates)):
        distance = np.minimum(distance, ((candidates - candidates[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return candidates[chosen][:, ::-1].astype(np.float64)


def _negative_points(mask: NDArray[np.bool_], saliency: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    if not count:
        return np.zeros((0, 2))
    near = ndimage.binary_dilation(mask, iterations=3)
    candidates = np.argwhere(~near)
    if not len(candidates):
        return np.zeros((0, 2))
    order = np.argsort(saliency[candidates[:, 0], candidates[:, 1]], kind="stable")[: max(count, len(candidates) // 4)]
    pool = candidates[order]
    chosen = [0]
    distance = np.full(len(pool), np.inf)
    while len(chosen) < min(count, len(pool)):
        distance = np.minimum(distance, ((pool - pool[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return pool[chosen][:, ::-1].astype(np.float64)
