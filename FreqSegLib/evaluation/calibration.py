"""Does the uncertainty predict error? Reliability, its calibration error, and ranks, over voxels and over cases.

Voxels are counted in two regions: the *whole* image, and the *band* around the outlines of the mask and of the truth,
where it is not obvious what belongs to the target. In the whole image most voxels are plain background, which makes
every calibration error small and every ranking easy; the band is the harder question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError
from FreqSegLib.evaluation.segmentation_metrics import RESAMPLES, Summary, dice, summarise

Region = Literal["band", "whole"]
REGIONS: tuple[Region, ...] = ("band", "whole")
BAND_SHARE, LEAST_BAND = 0.05, 2
LEAST_PAIRS, FEW_PAIRS = 5, 9
PROBABILITY_EDGES = np.linspace(0, 1, 16)
SPREAD = "spread of the views"
DOUBT = "nearness to one half"
# voxels crowd at small spreads, so that edges of equal distance would put nearly all into one bin
MEASURE_EDGES = {
    SPREAD: np.array([0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]),
    DOUBT: np.linspace(0, 1, 11),
}


@dataclass(frozen=True, eq=False)
class Bins:
    """Voxels by a value, and how many of each bin had the event.

    Attributes:
        edges: (B + 1) ascending; the last bin holds its upper edge too.
        counts: (B) voxels.
        sums: (B) of their values.
        events: (B) voxels with the event.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    events: NDArray[np.int64]

    @classmethod
    def of(cls, values: NDArray[np.floating], event: NDArray[np.bool_], edges: NDArray[np.float64]) -> Bins:
        """Count voxels; values outside the edges go to the nearest bin."""
        places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        size = len(edges) - 1
        return cls(
            edges,
            np.bincount(places, minlength=size),
            np.bincount(places, weights=values.astype(np.float64), minlength=size).astype(np.float64),
            np.bincount(places[event], minlength=size),
        )

    def __add__(self, other: Bins) -> Bins:
        return Bins(self.edges, self.counts + other.counts, self.sums + other.sums, self.events + other.events)

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean value of each bin, NaN where it is empty."""
        return _ratio(self.sums, self.counts)

    @property
    def rates(self) -> NDArray[np.float64]:
        """Share of each bin's voxels with the event, NaN where it is empty."""
        return _ratio(self.events, self.counts)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def rate(self) -> float:
        """Share of all voxels with the event; NaN without voxels."""
        return float(_ratio(self.events.sum(), self.counts.sum()))

    @property
    def expected_calibration_error(self) -> float:
        """ECE (Naeini et al., 2015): distance of each bin's mean from its rate, weighted by its voxels, in [0, 1]."""
        return float(np.abs(self.sums - self.events).sum() / self.total) if self.total else float("nan")


@dataclass(frozen=True, eq=False)
class CaseMeasure:
    """One measure of uncertainty on one case.

    Attributes:
        mean: over the mask and the band around it, which needs no truth; None where the mask is empty.
        auroc: by region, how well it ranks wrong voxels above right ones; None where all are right or all wrong.
        errors: by region, voxels by the measure, the event being that the mask differs from the truth.
    """

    mean: float | None
    auroc: Mapping[Region, float | None]
    errors: Mapping[Region, Bins]


@dataclass(frozen=True, eq=False)
class CaseCalibration:
    """What one case says about the uncertainty of one target.

    Attributes:
        method: that answered.
        dsc: of the mask that the uncertainty belongs to; None where the target is absent.
        measures: by name.
        probability: voxels by the probability of belonging to the target, by region; empty where the method gives none.
    """

    method: str
    dsc: float | None
    measures: Mapping[str, CaseMeasure]
    probability: Mapping[Region, Bins]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of ``n`` pairs with its 95 % bootstrap interval and p; NaN where there are too few.

    ``left_out`` cases have no pair.
    """

    rho: float
    low: float
    high: float
    p: float
    n: int
    left_out: int


@dataclass(frozen=True, eq=False)
class MeasureCalibration:
    """One measure of uncertainty over the cases of a target.

    Attributes:
        correlation: of a case's mean uncertainty with its error, 1 - DSC; cases with the target whose mask is empty
            have no place to take a mean over and are left out.
        auroc: by region, over cases.
        errors: by region, voxels of all cases together.
    """

    correlation: Correlation
    auroc: Mapping[Region, Summary]
    errors: Mapping[Region, Bins]


@dataclass(frozen=True, eq=False)
class TargetCalibration:
    """A target's cases together.

    Attributes:
        target, method: what was asked for, and what answered.
        cases: how many.
        dsc: of the masks that the uncertainty belongs to.
        measures: by name.
        probability: voxels of all cases, by region; empty where the method gives none.
        pairs: of every case with the target and a mask, mean :data:`SPREAD` and 1 - DSC.
    """

    target: str
    method: str
    cases: int
    dsc: Summary
    measures: Mapping[str, MeasureCalibration]
    probability: Mapping[Region, Bins]
    pairs: tuple[tuple[float, float], ...]


def case_calibration(
    method: str,
    prediction: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    uncertainty: NDArray[np.floating],
    probability: NDArray[np.floating] | None = None,
) -> CaseCalibration:
    """Compare one answer's uncertainty with its errors.

    Args:
        method: that gave it.
        prediction, truth: (S, h, w).
        uncertainty: standard deviation over views, in [0, 0.5].
        probability: of belonging to the target, in [0, 1]; None where the method's map is not a probability.

    Raises:
        InputError: the shapes differ.
    """
    maps = [prediction, truth, uncertainty, *([] if probability is None else [probability])]
    if len({one.shape for one in maps}) > 1 or prediction.ndim != 3:
        raise InputError(f"calibration needs (S, h, w) arrays of one shape, got {[one.shape for one in maps]}")
    width = band_width(prediction.shape[1:])
    places: dict[Region, NDArray[np.bool_]] = {
        "band": outline_band(prediction, width) | outline_band(truth, width),
        "whole": np.ones(truth.shape, dtype=np.bool_),
    }
    wrong, looked_at = prediction != truth, _grown(prediction, width)
    named = {SPREAD: uncertainty}
    if probability is not None:
        named[DOUBT] = 1 - np.abs(2 * probability - 1)
    return CaseCalibration(
        method,
        dice(prediction, truth) if truth.any() else None,
        {
            name: CaseMeasure(
                float(values[looked_at].mean()) if prediction.any() else None,
                {region: auroc(values[inside], wrong[inside]) for region, inside in places.items()},
                {r: Bins.of(values[inside], wrong[inside], MEASURE_EDGES[name]) for r, inside in places.items()},
            )
            for name, values in named.items()
        },
        {}
        if probability is None
        else {r: Bins.of(probability[inside], truth[inside], PROBABILITY_EDGES) for r, inside in places.items()},
    )


def target_calibration(target: str, cases: Sequence[CaseCalibration], *, seed: int = 0) -> TargetCalibration:
    """Put the cases of a target together.

    Args:
        target: its name.
        cases: at least one, all by one method.
        seed: of the bootstraps over cases.
    """
    measures = {}
    for name in cases[0].measures:
        own = [case.measures[name] for case in cases]
        measures[name] = MeasureCalibration(
            _correlation(cases, name, seed),
            {
                region: summarise([x for one in own if (x := one.auroc[region]) is not None], seed=seed)
                for region in REGIONS
            },
            {region: _together([one.errors[region] for one in own]) for region in REGIONS},
        )
    return TargetCalibration(
        target,
        cases[0].method,
        len(cases),
        summarise([case.dsc for case in cases if case.dsc is not None], seed=seed),
        measures,
        {region: _together([case.probability[region] for case in cases]) for region in cases[0].probability},
        tuple(_pairs(cases, SPREAD)),
    )


def _pairs(cases: Sequence[CaseCalibration], measure: str) -> list[tuple[float, float]]:
    """Mean uncertainty and error of every case that has both."""
    return [
        (mean, 1 - case.dsc)
        for case in cases
        if case.dsc is not None and (mean := case.measures[measure].mean) is not None
    ]


def _correlation(cases: Sequence[CaseCalibration], measure: str, seed: int) -> Correlation:
    pairs = _pairs(cases, measure)
    left_out = sum(case.dsc is not None for case in cases) - len(pairs)
    return rank_correlation([mean for mean, _ in pairs], [error for _, error in pairs], left_out=left_out, seed=seed)


def auroc(values: NDArray[np.floating], event: NDArray[np.bool_]) -> float | None:
    """Area under the receiver operating characteristic, from ranks: how often a voxel with the event has the higher
    value than one without, ties counting half. None where one kind is missing.
    """
    positive = int(event.sum())
    negative = event.size - positive
    if not positive or not negative:
        return None
    from scipy.stats import rankdata

    ranks = float(rankdata(values)[event].sum())
    return (ranks - positive * (positive + 1) / 2) / (positive * negative)


def rank_correlation(
    first: Sequence[float], second: Sequence[float], *, left_out: int = 0, seed: int = 0, resamples: int = RESAMPLES
) -> Correlation:
    """Spearman's rho of pairs; see :class:`Correlation`. Of fewer than 9 pairs, p is from all orders they can have."""
    from scipy.stats import permutation_test, rankdata, spearmanr

    nan, n = float("nan"), len(first)
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if n < LEAST_PAIRS or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(nan, nan, nan, nan, n, left_out)
    found = spearmanr(a, b)
    p = float(found.pvalue)
    if n < FEW_PAIRS:
        orders = {"permutation_type": "pairings", "n_resamples": factorial(n), "vectorized": True}
        centred = rankdata(b) - (n + 1) / 2
        p = float(permutation_test((rankdata(a),), lambda x, axis: (x * centred).sum(axis), **orders).pvalue)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    x, y = (ranks - ranks.mean(1, keepdims=True) for ranks in (rankdata(a[drawn], axis=1), rankdata(b[drawn], axis=1)))
    # a draw in which one side is all equal has no correlation
    again = _ratio((x * y).sum(1), np.sqrt((x**2).sum(1) * (y**2).sum(1)))
    low, high = np.nanpercentile(again, (2.5, 97.5))
    return Correlation(float(found.statistic), float(low), float(high), p, n, left_out)


def band_width(slice_shape: Sequence[int]) -> int:
    """Pixels to each side of an outline: 5 % of the slice's shorter side, at least 2."""
    return max(LEAST_BAND, round(BAND_SHARE * min(slice_shape)))


def outline_band(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Where a mask's outline is at most ``width`` pixels away along rows and columns, slice by slice: (S, h, w)."""
    return _grown(mask, width) & _grown(~mask, width)


def _grown(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    from scipy.ndimage import maximum_filter1d

    found = mask.astype(np.uint8)
    for axis in (1, 2):
        found = maximum_filter1d(found, 2 * width + 1, axis=axis, mode="constant")
    return np.asarray(found, dtype=np.bool_)


def _together(bins: Sequence[Bins]) -> Bins:
    return sum(bins[1:], start=bins[0])


def _ratio(part: NDArray[np.generic], whole: NDArray[np.generic]) -> NDArray[np.float64]:
    found = np.full(np.shape(part), np.nan)
    return np.divide(part, whole, out=found, where=np.asarray(whole) > 0)
