"""Segmentation metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from FreqSegLib.errors import InputError
from FreqSegLib.evaluation.segmentation_metrics import diagonal, dice, overlap, summarise


def square(shape: tuple[int, ...], *corners: tuple[int, int]) -> np.ndarray:
    """A mask that is True between the given (first, last + 1) of every axis."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*pair) for pair in corners)] = True
    return mask


def test_equal_masks_are_perfect() -> None:
    mask = square((8, 8), (2, 6), (1, 5))
    found = overlap(mask, mask, (1, 1))
    assert (found.dsc, found.nsd, found.hd95) == (1, 1, 0)


def test_a_square_shifted_by_one_pixel() -> None:
    # 4 x 4 squares, 3 x 4 in common: DSC = 2 * 12 / 32
    truth, shifted = square((12, 12), (3, 7), (3, 7)), square((12, 12), (4, 8), (3, 7))
    found = overlap(shifted, truth, (1, 1))
    assert found.dsc == pytest.approx(0.75)
    assert found.nsd == 1
    assert found.hd95 == 1


def test_nsd_counts_the_boundary_voxels_within_the_tolerance() -> None:
    # two columns of 1 x 10 pixels, 3 apart, all boundary; the longer one goes on for 10 pixels
    truth, found = square((30, 10), (5, 15), (2, 3)), square((30, 10), (5, 25), (5, 6))
    near = overlap(found, truth, (1, 1), tolerance=3)
    # 10 + 10 pixels lie at distance 3; the other 10 pixels are further away: 20 of 30
    assert near.nsd == pytest.approx(20 / 30)
    assert overlap(found, truth, (1, 1), tolerance=2.9).nsd == 0
    # one further pixel lies at sqrt(9 + 1) = 3.16
    assert overlap(found, truth, (1, 1), tolerance=3.2).nsd == pytest.approx(21 / 30)


def test_hd95_is_the_95th_percentile_of_the_worse_direction() -> None:
    # from the truth: 0 everywhere. From the mask: distances 0 (20 pixels) and 1 ... 20
    truth, found = square((60, 5), (5, 25), (2, 3)), square((60, 5), (5, 45), (2, 3))
    expected = np.percentile([0] * 20 + list(range(1, 21)), 95)
    assert overlap(found, truth, (1, 1)).hd95 == pytest.approx(expected)


def test_distances_use_the_spacing_of_each_axis() -> None:
    truth, found = square((6, 6, 6), (1, 2), (1, 2), (1, 2)), square((6, 6, 6), (3, 4), (1, 2), (1, 2))
    # one voxel each, two slices of 3 mm apart
    assert overlap(found, truth, (3.0, 1.0, 1.0)).hd95 == pytest.approx(6)
    assert overlap(found, truth, (3.0, 1.0, 1.0), tolerance=2).nsd == 0
    assert overlap(found, truth, (3.0, 1.0, 1.0), tolerance=6).nsd == 1
    assert overlap(found, truth, (1.0, 1.0, 1.0), tolerance=2).nsd == 1


def test_a_single_slice_is_measured_in_its_plane() -> None:
    plane_truth, plane_found = square((12, 12), (3, 9), (3, 9)), square((12, 12), (3, 9), (6, 12))
    flat = overlap(plane_found, plane_truth, (1, 1))
    assert overlap(plane_found[None], plane_truth[None], (1, 1, 1)) == flat
    # a 6 x 6 square has 20 boundary pixels; measured as a 3D object all 36 would be boundary
    assert flat.nsd < 1


def test_an_empty_mask_where_the_target_exists_has_the_worst_values() -> None:
    truth = square((1, 31, 41), (0, 1), (3, 9), (3, 9))
    found = overlap(np.zeros_like(truth), truth, (1, 1, 1))
    assert (found.dsc, found.nsd) == (0, 0)
    assert found.hd95 == pytest.approx(50)
    assert found.hd95 == diagonal((1, 31, 41), (1, 1, 1))
    far = square((1, 31, 41), (0, 1), (30, 31), (40, 41))
    assert overlap(far, square((1, 31, 41), (0, 1), (0, 1), (0, 1)), (1, 1, 1)).hd95 == pytest.approx(50)


def test_an_empty_truth_has_no_overlap() -> None:
    empty = np.zeros((5, 5), dtype=bool)
    with pytest.raises(InputError, match="only defined where the target exists"):
        overlap(empty, empty, (1, 1))
    with pytest.raises(InputError, match="only defined where the target exists"):
        dice(empty, empty)


def test_wrong_shapes_and_spacings_are_named() -> None:
    mask = square((5, 5), (1, 3), (1, 3))
    with pytest.raises(InputError, match=r"\(5, 5\) and \(4, 5\)"):
        overlap(mask, mask[:4], (1, 1))
    with pytest.raises(InputError, match=r"2 lengths > 0, got \(1, 0\)"):
        overlap(mask, mask, (1, 0))


def test_the_mean_and_deviation_of_cases() -> None:
    found = summarise([0.2, 0.4, 0.9])
    assert found.n == 3
    assert found.mean == pytest.approx(0.5)
    assert found.sd == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    assert 0.2 <= found.low < 0.5 < found.high <= 0.9


def test_the_interval_is_that_of_the_mean_and_repeats_with_its_seed() -> None:
    values = np.random.default_rng(3).normal(10, 2, 400)
    found = summarise(list(values), seed=1)
    # the central limit theorem's interval for 400 cases
    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert summarise(list(values), seed=1) == found
    assert summarise(list(values), seed=2) != found


def test_too_few_cases_have_no_interval() -> None:
    one = summarise([0.7])
    assert (one.n, one.mean) == (1, 0.7)
    assert math.isnan(one.sd)
    assert math.isnan(one.low)
    none = summarise([])
    assert none.n == 0
    assert math.isnan(none.mean)
