"""The gate in front of the saliency."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from FreqSegLib.saliency.gate import Calibration, margins, presence

UP, RIGHT, DIAGONAL = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), F.normalize(torch.tensor([1.0, 1.0]), dim=0)


def test_the_margin_is_taken_to_the_best_null_prompt_of_each_slice() -> None:
    images = torch.stack([UP, RIGHT, DIAGONAL])
    found = margins(images, UP, torch.stack([RIGHT, -UP]))
    # up: 1 - max(0, -1); right: 0 - max(1, 0); diagonal: 0.7071 - max(0.7071, -0.7071)
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.0]))


def test_without_null_prompts_the_margin_is_the_cosine() -> None:
    found = margins(torch.stack([UP, DIAGONAL]), UP, torch.zeros(0, 2))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5**0.5]))


def test_the_probability_is_a_half_at_the_offset_and_rises_with_the_slope() -> None:
    calibration = Calibration(slope=4.0, offset=0.25)
    found = calibration.probability(torch.tensor([0.25, 0.5, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.5, 0.7310586, 0.2689414]))


def test_slices_pass_one_by_one() -> None:
    images = torch.stack([UP, RIGHT, DIAGONAL])
    found = presence(images, UP, RIGHT[None], Calibration(slope=10.0, offset=0.1))
    assert found.passed.tolist() == [True, False, False]
    assert found.score == pytest.approx(float(torch.sigmoid(torch.tensor(9.0))))


def test_a_slice_exactly_at_the_threshold_passes() -> None:
    assert presence(DIAGONAL[None], UP, RIGHT[None], Calibration(slope=10.0, offset=0.0)).passed.all()


def test_a_volume_whose_best_slice_is_doubtful_stays_empty() -> None:
    images = torch.stack([UP, DIAGONAL])
    careful = Calibration(slope=1.0, offset=0.0, slice_threshold=0.4, volume_threshold=0.8)
    found = presence(images, UP, RIGHT[None], careful)
    assert found.probability.max() < 0.8
    assert not found.passed.any()
    assert found.score == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))))
    bold = Calibration(slope=1.0, offset=0.0, slice_threshold=0.4, volume_threshold=0.7)
    assert presence(images, UP, RIGHT[None], bold).passed.all()


def test_no_slices_is_no_error() -> None:
    found = presence(torch.zeros(0, 2), UP, RIGHT[None], Calibration())
    assert found.score == 0.0
    assert found.passed.shape == (0,)
