"""From saliency to a coarse mask."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from FreqSegLib.sam.coarse_mask import coarse_mask, largest_components_3d, otsu, surrounding_background, two_means


def best_split(values: np.ndarray) -> tuple[float, float]:
    """Otsu by trying every cut between two different values: the values on both sides of the best one."""
    ordered = np.sort(values.astype(np.float64))
    cuts = np.flatnonzero(np.diff(ordered)) + 1

    def within(cut: int) -> float:
        low, high = ordered[:cut], ordered[cut:]
        return len(low) * low.var() + len(high) * high.var()

    best = min(cuts, key=within)
    return float(ordered[best - 1]), float(ordered[best])


@pytest.mark.parametrize("seed", range(6))
def test_otsu_is_the_best_of_all_cuts_to_one_bin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres, sizes = rng.uniform(0, 1, 2), rng.integers(50, 800, 2)
    values = np.concatenate([rng.normal(c, 0.08, n) for c, n in zip(centres, sizes, strict=True)]).astype(np.float32)
    below, above = best_split(values)
    width = np.ptp(values) / 256
    assert below - width <= otsu(values) <= above + width


def test_otsu_separates_two_values_and_finds_nothing_in_one() -> None:
    two = np.array([0.2] * 90 + [0.7] * 10, dtype=np.float32)
    assert (two > otsu(two)).sum() == 10
    one = np.full(50, 0.4, dtype=np.float32)
    assert not (one > otsu(one)).any()


def test_otsu_takes_a_range_of_one_rounding_step() -> None:
    values = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(1))], dtype=np.float32)
    assert (values > otsu(values)).tolist() == [False, True]


def test_two_means_is_the_fixed_point_of_k_means() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.2, 0.05, 700), rng.normal(0.7, 0.1, 200)]).astype(np.float32)
    centres, _ = kmeans2(values[:, None].astype(np.float64), np.array([[values.min()], [values.max()]]), iter=100)
    assert two_means(values) == pytest.approx(float(centres.mean()), abs=1e-5)
    assert two_means(np.full(9, 0.3, dtype=np.float32)) == pytest.approx(0.3)


def test_the_threshold_is_one_for_the_volume_not_one_a_slice() -> None:
    saliency = np.zeros((2, 8, 8), dtype=np.float32)
    saliency[0, 2:5, 2:5] = 0.9
    saliency[1, 2:5, 2:5] = 0.1
    found = coarse_mask(saliency, np.array([True, True]), confidence_threshold=0.0)
    assert found[0].sum() == 9
    assert not found[1].any()


@pytest.mark.parametrize("threshold", ["otsu", "kmeans", "fixed"])
def test_slices_that_failed_the_gate_stay_empty_and_do_not_move_the_threshold(threshold: str) -> None:
    rng = np.random.default_rng(1)
    saliency = rng.uniform(0, 0.3, (4, 10, 10)).astype(np.float32)
    saliency[1, 3:6, 3:6] = 0.8
    kept = np.array([False, True, False, True])
    alone = coarse_mask(saliency, kept, threshold=threshold)
    assert not alone[[0, 2]].any()
    assert np.argwhere(alone[1]).tolist() == [[y, x] for y in (3, 4, 5) for x in (3, 4, 5)]
    saliency[0] = 1.0
    assert np.array_equal(coarse_mask(saliency, kept, threshold=threshold), alone)


def test_empty_stays_empty() -> None:
    saliency = np.random.default_rng(0).uniform(0, 1, (3, 6, 6)).astype(np.float32)
    assert not coarse_mask(saliency, np.zeros(3, dtype=bool)).any()
    assert not coarse_mask(np.zeros_like(saliency), np.ones(3, dtype=bool)).any()
    assert coarse_mask(saliency[:0], np.zeros(0, dtype=bool)).shape == (0, 6, 6)


def test_places_can_be_excluded_too() -> None:
    saliency = np.full((1, 6, 6), 0.9, dtype=np.float32)
    saliency[0, 3:] = 0.1
    valid = np.ones((1, 6, 6), dtype=bool)
    valid[0, 0, 0] = False
    found = coarse_mask(saliency, valid)
    assert not found[0, 0, 0]
    assert found.sum() == 17


def test_each_component_answers_for_its_own_confidence() -> None:
    saliency = np.zeros((1, 12, 12), dtype=np.float32)
    saliency[0, 1:4, 1:4] = 0.9
    saliency[0, 7:11, 7:11] = 0.45
    strict = coarse_mask(saliency, np.array([True]), threshold="fixed", value=0.3, confidence_threshold=0.5)
    assert strict.sum() == 9
    assert strict[0, 2, 2]
    lenient = coarse_mask(saliency, np.array([True]), threshold="fixed", value=0.3, confidence_threshold=0.44)
    assert lenient.sum() == 25


def test_the_mean_of_a_component_decides_not_its_peak() -> None:
    saliency = np.zeros((1, 5, 5), dtype=np.float32)
    saliency[0, 2, 1:4] = 0.4, 0.9, 0.4
    where = np.array([True])
    assert not coarse_mask(saliency, where, threshold="fixed", value=0.3, confidence_threshold=0.6).any()
    assert coarse_mask(saliency, where, threshold="fixed", value=0.3, confidence_threshold=0.55).sum() == 3


@pytest.mark.parametrize(("count", "sizes"), [(0, [9, 4, 1]), (1, [9]), (2, [9, 4]), (7, [9, 4, 1])])
def test_the_largest_components_of_a_slice_are_kept(count: int, sizes: list[int]) -> None:
    saliency = np.zeros((2, 12, 12), dtype=np.float32)
    for side, top in ((1, 0), (3, 3), (2, 8)):
        saliency[0, top : top + side, 4 : 4 + side] = 0.8
    saliency[1, 5, 5] = 0.8
    found = coarse_mask(saliency, np.array([True, True]), num_contours=count)
    assert found[0].sum() == sum(sizes)
    assert found[1].sum() == 1


def test_specks_in_3d_are_dropped_by_their_share_of_the_largest() -> None:
    mask = np.zeros((6, 10, 10), dtype=bool)
    mask[1:4, 2:6, 2:6] = True  # 48 voxels
    mask[5, 8:, 8:] = True  # 4 voxels
    assert largest_components_3d(mask, 4 / 48).sum() == 52
    assert largest_components_3d(mask, 4.1 / 48).sum() == 48
    assert not largest_components_3d(np.zeros_like(mask), 0.5).any()


def test_black_is_background_where_it_reaches_the_border() -> None:
    image = np.full((8, 9), 0.6, dtype=np.float32)
    image[0] = 0.0  # air above
    image[1:4, 4] = 0.0  # and a channel into it
    image[5:7, 6:8] = 0.0  # a ventricle: black, but enclosed
    image[7, 2] = 1e-3  # dark is not black
    found = surrounding_background(image)
    expected = np.zeros((8, 9), dtype=bool)
    expected[0] = True
    expected[1:4, 4] = True
    assert np.array_equal(found, expected)
    assert not surrounding_background(np.ones((4, 4), dtype=np.float32)).any()
    assert surrounding_background(np.zeros((4, 4), dtype=np.float32)).all()
