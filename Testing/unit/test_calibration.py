"""Calibration of probabilities and uncertainty on made maps whose every number is known, and against scikit-learn."""

from __future__ import annotations

import csv
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from FreqSegLib.errors import InputError
from FreqSegLib.evaluation.calibration import (
    DOUBT,
    PROBABILITY_EDGES,
    SPREAD,
    Bins,
    CaseCalibration,
    auroc,
    band_width,
    case_calibration,
    outline_band,
    rank_correlation,
    target_calibration,
)
from FreqSegLib.evaluation.report import calibration_block, markdown
from FreqSegLib.evaluation.report_csv import calibration_csv, reliability_csv


def square(size: int = 20, low: int = 5, high: int = 15) -> np.ndarray:
    mask = np.zeros((1, size, size), dtype=bool)
    mask[0, low:high, low:high] = True
    return mask


# ------------------------------------------------------------------------------------------------------- reliability


def test_a_perfectly_calibrated_probability_has_no_calibration_error() -> None:
    # of every ten voxels with probability p, exactly 10 p have the event
    probability = np.repeat(np.arange(11) / 10, 10)
    event = np.concatenate([np.arange(10) < tenth for tenth in range(11)])
    bins = Bins.of(probability, event, PROBABILITY_EDGES)
    assert bins.expected_calibration_error == pytest.approx(0, abs=1e-12)
    filled = bins.counts > 0
    assert bins.rates[filled] == pytest.approx(bins.means[filled])
    assert np.isnan(bins.rates[~filled]).all()


def test_a_probability_that_says_the_opposite_has_the_largest_calibration_error() -> None:
    event = np.arange(10) < 4
    assert Bins.of(np.where(event, 0.0, 1.0), event, PROBABILITY_EDGES).expected_calibration_error == 1
    assert Bins.of(event.astype(float), event, PROBABILITY_EDGES).expected_calibration_error == 0


def test_the_calibration_error_is_worked_by_hand() -> None:
    probability = np.array([0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    event = np.array([True, False, False, False, True, False])
    # four voxels say 0.1 and hold 0.25, two say 0.9 and hold 0.5
    bins = Bins.of(probability, event, PROBABILITY_EDGES)
    assert bins.expected_calibration_error == pytest.approx((4 * 0.15 + 2 * 0.4) / 6)
    assert (bins.total, bins.rate) == (6, pytest.approx(2 / 6))


def test_bins_hold_their_lower_edge_and_the_last_its_upper_too() -> None:
    edges = np.array([0, 0.5, 1.0])
    bins = Bins.of(np.array([0, 0.49, 0.5, 1.0, 1.2]), np.array([False, True, True, False, True]), edges)
    assert bins.counts.tolist() == [2, 3]
    assert bins.events.tolist() == [1, 2]
    assert (bins + bins).counts.tolist() == [4, 6]
    none = Bins.of(np.zeros(0), np.zeros(0, dtype=bool), edges)
    assert np.isnan(none.expected_calibration_error)
    assert np.isnan(none.rate)


# -------------------------------------------------------------------------------------------------------------- ranks


def test_auroc_counts_pairs_ties_half() -> None:
    values, event = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    # pairs: 0.4 > 0.1, 0.4 = 0.4, 0.8 > 0.1, 0.8 > 0.4
    assert auroc(values, event) == pytest.approx(3.5 / 4)
    assert auroc(values, np.ones(4, dtype=bool)) is None
    assert auroc(values, np.zeros(4, dtype=bool)) is None


def test_auroc_is_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    event = rng.random(3000) < 0.2
    values = np.round(rng.normal(0.4 * event, 0.5), 1).astype(np.float32)
    assert auroc(values, event) == pytest.approx(roc_auc_score(event, values))


def test_rank_correlation_is_spearmans_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(4)
    x = rng.random(40)
    y = x + 0.3 * rng.random(40)
    found, known = rank_correlation(x, y), spearmanr(x, y)
    assert (found.rho, found.p) == (pytest.approx(known.statistic), pytest.approx(known.pvalue))
    assert -1 <= found.low < found.rho < found.high <= 1
    assert rank_correlation(x, -(x**3)).rho == pytest.approx(-1)
    assert rank_correlation(x, y) == found


def test_with_few_pairs_p_counts_the_orders_that_are_as_extreme() -> None:
    a, b = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), np.array([0.2, 0.1, 0.5, 0.3, 0.6, 0.9])
    found = rank_correlation(a, b)
    everything = [abs(spearmanr(a, order).statistic) for order in permutations(b)]
    assert found.p == pytest.approx(np.mean(np.array(everything) >= abs(found.rho) - 1e-9))
    # the usual approximation calls five pairs in perfect order certain; they are two of 120 orders
    assert rank_correlation(a[:5], a[:5]).p == pytest.approx(2 / 120)
    assert rank_correlation(np.arange(8), np.arange(8)).p == pytest.approx(2 / 40320)


@pytest.mark.parametrize(
    "pairs", [([], []), ([0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.5, 0.6]), ([0.1] * 5, [0.1, 0.2, 0.3, 0.4, 0.5])]
)
def test_without_enough_to_rank_there_is_no_correlation(pairs: tuple[list[float], list[float]]) -> None:
    found = rank_correlation(*pairs, left_out=2)
    assert np.isnan(found.rho)
    assert (found.n, found.left_out) == (len(pairs[0]), 2)


# --------------------------------------------------------------------------------------------------------------- band


def test_the_band_lies_to_both_sides_of_the_outline_in_every_slice() -> None:
    mask = np.concatenate([square(), np.zeros((1, 20, 20), bool), np.ones((1, 20, 20), bool)])
    band = outline_band(mask, 2)
    expected = square(20, 3, 17) & ~square(20, 7, 13)
    assert np.array_equal(band[:1], expected)
    # nothing and everything have no outline
    assert not band[1:].any()


def test_the_band_is_five_per_cent_of_the_shorter_side() -> None:
    assert [band_width(shape) for shape in ((256, 256), (320, 266), (52, 35))] == [13, 13, 2]


# --------------------------------------------------------------------------------------------------------- one case


def test_uncertainty_that_knows_every_error_ranks_perfectly_and_one_that_is_wrong_about_all_ranks_last() -> None:
    truth, mask = square(), square(20, 5, 14)
    wrong = mask != truth
    knows = case_calibration("zero-shot", mask, truth, np.where(wrong, 0.4, 0.1))
    fooled = case_calibration("zero-shot", mask, truth, np.where(wrong, 0.1, 0.4))
    for region in ("band", "whole"):
        assert knows.measures[SPREAD].auroc[region] == 1
        assert fooled.measures[SPREAD].auroc[region] == 0
    errors = knows.measures[SPREAD].errors["whole"]
    assert errors.total == 400
    assert errors.events.sum() == wrong.sum() == 19
    assert errors.rates[errors.counts > 0].tolist() == [0, 1]
    assert knows.dsc == pytest.approx(2 * 81 / 181)
    assert knows.probability == {}
    assert list(knows.measures) == [SPREAD]


def test_the_mean_is_over_the_mask_and_the_band_around_it() -> None:
    uncertainty = np.where(square(20, 3, 17), 0.2, 0.5)
    found = case_calibration("zero-shot", square(), square(), uncertainty)
    # the band is two pixels wide: what lies further out does not count
    assert found.measures[SPREAD].mean == pytest.approx(0.2)
    assert found.measures[SPREAD].auroc == {"band": None, "whole": None}
    empty = case_calibration("zero-shot", np.zeros_like(square()), square(), uncertainty)
    assert empty.measures[SPREAD].mean is None
    assert empty.dsc == 0
    absent = case_calibration("zero-shot", square(), np.zeros_like(square()), uncertainty)
    assert absent.dsc is None


def test_a_probability_near_one_half_is_an_uncertainty_of_its_own() -> None:
    truth, mask = square(), square(20, 5, 14)
    probability = np.where(mask, 0.9, 0.0)
    probability[mask != truth] = 0.5
    found = case_calibration("trained", mask, truth, np.zeros(truth.shape), probability)
    assert found.measures[DOUBT].auroc["whole"] == 1
    assert found.measures[SPREAD].auroc["whole"] == pytest.approx(0.5)
    # 81 voxels say 0.9 and all hold; 19 say one half and all hold; the others say none
    assert found.probability["whole"].expected_calibration_error == pytest.approx((81 * 0.1 + 19 * 0.5) / 400)
    assert found.probability["band"].expected_calibration_error > found.probability["whole"].expected_calibration_error


def test_maps_of_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="one shape"):
        case_calibration("trained", square(), square(), np.zeros((1, 20, 19)))


# ---------------------------------------------------------------------------------------------------- cases together


def cases(sign: float) -> list[CaseCalibration]:
    """Worse cases with more uncertainty (sign 1) or less (-1), one empty mask, and one case without the target."""
    made = []
    for number, high in enumerate((14, 13, 12, 11, 10)):
        level = 0.25 + sign * 0.02 * number
        mask = square(20, 5, high)
        made.append(case_calibration("trained", mask, square(), np.full(mask.shape, level), mask.astype(float)))
    nothing = np.zeros_like(square())
    made.append(case_calibration("trained", nothing, square(), np.zeros(nothing.shape), np.zeros(nothing.shape)))
    made.append(case_calibration("trained", square(), nothing, np.full(nothing.shape, 0.5), square().astype(float)))
    return made


@pytest.mark.parametrize("sign", [1, -1])
def test_uncertainty_of_cases_follows_their_error_or_runs_against_it(sign: int) -> None:
    found = target_calibration("brain tumour", cases(sign))
    correlation = found.measures[SPREAD].correlation
    assert correlation.rho == pytest.approx(sign)
    assert (correlation.n, correlation.left_out) == (5, 1)
    assert (found.cases, found.dsc.n, found.method) == (7, 6, "trained")
    assert len(found.pairs) == 5
    assert found.pairs[0][1] == pytest.approx(1 - 2 * 81 / 181)
    assert found.probability["whole"].total == 7 * 400
    wrong = sum(100 - (high - 5) ** 2 for high in (14, 13, 12, 11, 10)) + 100 + 100
    assert found.measures[SPREAD].errors["whole"].events.sum() == wrong
    assert found.probability["whole"].expected_calibration_error == pytest.approx(wrong / 2800)


def test_tables_hold_the_numbers() -> None:
    found = target_calibration("brain tumour", cases(1))
    lines = list(csv.DictReader(calibration_csv([found]).splitlines()))
    assert [(line["measure"], line["region"]) for line in lines] == [
        (SPREAD, "band"),
        (SPREAD, "whole"),
        (DOUBT, "band"),
        (DOUBT, "whole"),
    ]
    assert float(lines[0]["spearman_rho"]) == pytest.approx(1)
    assert float(lines[1]["ece"]) == pytest.approx(found.probability["whole"].expected_calibration_error)
    assert (lines[1]["voxels"], lines[1]["spearman_left_out"]) == ("2800", "1")
    plots = list(csv.DictReader(reliability_csv([found]).splitlines()))
    whole = [line for line in plots if (line["value"], line["region"]) == ("probability", "whole")]
    assert len(whole) == 15
    assert sum(int(line["voxels"]) for line in whole) == 2800
    assert whole[7]["rate"] == ""
    block = calibration_block([found])
    assert block.rows[0][:3] == ("brain tumour", "trained", SPREAD)
    assert block.rows[0][4].startswith("+1.00 (")
    assert "n 5, 1 left out" in block.rows[0][4]
    assert "| brain tumour | trained |" in markdown(block, [])
