"""Boundary IoU on squares whose rims can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from FreqSegLib.errors import InputError
from FreqSegLib.evaluation.boundary_iou import boundary_iou


def square(first: int, last: int, side: int = 20) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    mask = np.zeros((side, side), bool)
    mask[first:last, first:last] = True
    return mask


def test_equal_masks_have_one_and_disjoint_masks_zero() -> None:
    assert boundary_iou(square(4, 12), square(4, 12)) == 1.0
    assert boundary_iou(square(0, 4), square(10, 14)) == 0.0


def test_the_rims_of_two_shifted_squares_are_counted() -> None:
    truth, found = square(4, 12), np.roll(square(4, 12), 1, axis=1)
    # rims one pixel wide: 28 pixels each; the rows at top and bottom share 7 each, no column coincides
    assert boundary_iou(found, truth, width=1) == pytest.approx(14 / (28 + 28 - 14))


def test_an_error_at_the_rim_costs_more_the_larger_the_mask_hides_it() -> None:
    truth, found = square(20, 80, 100), square(21, 79, 100)
    overlap = np.count_nonzero(truth & found) / np.count_nonzero(truth | found)
    assert boundary_iou(found, truth, width=2) < 0.55 < 0.9 < overlap


def test_the_width_is_two_percent_of_the_diagonal_and_single_slices_are_measured_in_their_plane() -> None:
    truth, found = square(20, 80, 100), square(22, 78, 100)
    assert boundary_iou(found, truth) == boundary_iou(found, truth, width=3)
    assert boundary_iou(found[None], truth[None], width=3) == boundary_iou(found, truth, width=3)


def test_a_mask_at_the_edge_of_the_image_has_a_rim_there() -> None:
    whole = np.ones((6, 6), bool)
    assert boundary_iou(whole, whole, width=1) == 1.0
    inner = np.zeros((6, 6), bool)
    inner[1:5, 1:5] = True
    assert boundary_iou(inner, whole, width=1) == 0.0


def test_an_empty_prediction_scores_zero_and_an_empty_truth_is_refused() -> None:
    assert boundary_iou(np.zeros((5, 5), bool), square(1, 3, 5)) == 0.0
    with pytest.raises(InputError, match="only defined where the target exists"):
        boundary_iou(square(1, 3, 5), np.zeros((5, 5), bool))
    with pytest.raises(InputError, match="at least 1 voxel wide, got 0"):
        boundary_iou(square(1, 3, 5), square(1, 3, 5), width=0)
    with pytest.raises(InputError, match="one shape"):
        boundary_iou(square(1, 3, 5), square(1, 3, 6))
