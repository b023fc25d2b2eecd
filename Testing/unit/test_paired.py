"""Two ways on the same cases: differences worked by hand, and every sign pattern counted for the test."""

from __future__ import annotations

from itertools import product
from math import isnan

import numpy as np
import pytest

from FreqSegLib.errors import InputError
from FreqSegLib.evaluation.paired import paired_test


def test_the_difference_is_the_mean_over_cases_of_first_minus_second() -> None:
    found = paired_test([0.9, 0.8, 0.7, 0.4], [0.8, 0.6, 0.7, 0.5])
    assert found.difference.n == 4
    assert found.difference.mean == pytest.approx(0.05)
    assert found.difference.sd == pytest.approx(np.std([0.1, 0.2, 0.0, -0.1], ddof=1))
    assert found.difference.low < 0.05 < found.difference.high
    assert found.changed == 3


def test_p_counts_the_sign_patterns_that_are_as_extreme() -> None:
    differences = np.array([0.3, -0.1, 0.5, 0.2, 0.4, 0.6])
    ranks = np.array([3, 1, 5, 2, 4, 6])
    middle = ranks.sum() / 2
    seen = abs(ranks[differences > 0].sum() - middle)
    sums = [(ranks * np.array(signs)).sum() for signs in product((0, 1), repeat=6)]
    expected = np.mean([abs(total - middle) >= seen for total in sums])
    assert paired_test(differences, np.zeros(6)).p == pytest.approx(expected)
    # a case without a difference says nothing about the direction
    assert paired_test([*differences, 1.0], [0.0] * 6 + [1.0]).p == pytest.approx(expected)


def test_swapping_the_ways_turns_the_sign_and_keeps_p() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(20), rng.random(20)
    one, other = paired_test(a, b), paired_test(b, a)
    assert one.difference.mean == pytest.approx(-other.difference.mean)
    assert one.p == pytest.approx(other.p)


def test_equal_ways_and_no_cases_have_an_answer() -> None:
    same = paired_test([0.5, 0.7], [0.5, 0.7])
    assert (same.p, same.changed, same.difference.mean) == (1.0, 0, 0.0)
    none = paired_test([], [])
    assert none.difference.n == 0
    assert isnan(none.p)


def test_lists_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2,\) and \(1,\)"):
        paired_test([0.1, 0.2], [0.3])
    with pytest.raises(InputError, match="finite"):
        paired_test([0.1, float("nan")], [0.3, 0.2])
