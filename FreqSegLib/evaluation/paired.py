"""Two ways to do the same cases, compared case by case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from FreqSegLib.errors import InputError
from FreqSegLib.evaluation.segmentation_metrics import Summary, summarise


@dataclass(frozen=True)
class PairedTest:
    """One way against another on the same cases.

    Attributes:
        difference: of the cases, the first way minus the second: mean, standard deviation, and the mean's 95 %
            bootstrap interval over cases.
        p: two-sided Wilcoxon signed-rank test (Wilcoxon, 1945), cases without a difference left out; 1 where no case
            differs, NaN where there are no cases.
        changed: cases that differ at all.
    """

    difference: Summary
    p: float
    changed: int


def paired_test(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> PairedTest:
    """How much better ``a`` is than ``b`` on the same cases, and whether that could be chance.

    Args:
        a: one finite value a case.
        b: the same cases in the same order.
        seed: of the bootstrap.

    Raises:
        InputError: there are not as many values in both, or one is not finite.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise InputError(f"a paired test needs one value a case in both lists, got {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("a paired test needs finite values; leave out the cases that have none in either list")
    differences = first - second
    changed = int(np.count_nonzero(differences))
    return PairedTest(summarise(differences.tolist(), seed=seed), _wilcoxon(differences, changed), changed)


def _wilcoxon(differences: np.ndarray[tuple[int, ...], np.dtype[np.float64]], changed: int) -> float:
    if not len(differences):
        return float("nan")
    if not changed:
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences[differences != 0]).pvalue)
