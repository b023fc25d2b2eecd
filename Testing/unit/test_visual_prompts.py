"""Boxes and points from a coarse mask."""

from __future__ import annotations

import numpy as np
import pytest

from FreqSegLib.sam.visual_prompts import visual_prompts

NO_SALIENCY = np.zeros((20, 30), dtype=np.float32)


@pytest.fixture
def mask() -> np.ndarray:
    """Two components: rows 2-5, columns 3-9; rows 12-16, columns 20-22."""
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:6, 3:10] = True
    mask[12:17, 20:23] = True
    return mask


def test_an_empty_mask_has_no_prompts() -> None:
    for kind in ("boxes", "box", "points", "boxes+points"):
        assert visual_prompts(np.zeros((5, 5), dtype=bool), NO_SALIENCY[:5, :5], kind, negative_points=2) == []


def test_a_box_a_component_spans_its_pixels_edge_to_edge(mask: np.ndarray) -> None:
    found = visual_prompts(mask, NO_SALIENCY, "boxes")
    assert [prompt.box for prompt in found] == [(2.5, 1.5, 9.5, 5.5), (19.5, 11.5, 22.5, 16.5)]
    assert all(prompt.points.shape == (0, 2) for prompt in found)


def test_one_box_holds_all_components(mask: np.ndarray) -> None:
    (found,) = visual_prompts(mask, NO_SALIENCY, "box")
    assert found.box == (2.5, 1.5, 22.5, 16.5)


def test_the_margin_differs_by_axis_and_ends_at_the_picture(mask: np.ndarray) -> None:
    first, second = visual_prompts(mask, NO_SALIENCY, "boxes", margin=(2.0, 4.0))
    assert first.box == (-0.5, -0.5, 13.5, 7.5)
    assert second.box == (15.5, 9.5, 26.5, 18.5)
    (everything,) = visual_prompts(mask, NO_SALIENCY, "box", margin=(100.0, 100.0))
    assert everything.box == (-0.5, -0.5, 29.5, 19.5)


def test_points_lie_in_their_component_the_most_salient_first(mask: np.ndarray) -> None:
    saliency = np.random.default_rng(0).uniform(0, 0.5, mask.shape).astype(np.float32)
    saliency[3, 5], saliency[14, 21] = 0.9, 0.8
    found = visual_prompts(mask, saliency, "points", num_points=3)
    assert [prompt.box for prompt in found] == [None, None]
    assert found[0].points[0].tolist() == [5.0, 3.0]
    assert found[1].points[0].tolist() == [21.0, 14.0]
    for prompt, rows in zip(found, (slice(2, 6), slice(12, 17)), strict=True):
        assert prompt.labels.tolist() == [1, 1, 1]
        for x, y in prompt.points:
            assert mask[int(y), int(x)]
            assert rows.start <= y < rows.stop


def test_further_points_are_the_farthest_from_those_chosen() -> None:
    mask = np.zeros((5, 13), dtype=bool)
    mask[1:4, 1:12] = True  # eroded: row 2, columns 2 to 10
    saliency = np.zeros(mask.shape, dtype=np.float32)
    saliency[2, 4] = 1.0
    (found,) = visual_prompts(mask, saliency, "points", num_points=3)
    # farthest from 4 is 10; then 2 (2 away from 4) loses to 7 (3 away from both)
    assert found.points.tolist() == [[4.0, 2.0], [10.0, 2.0], [7.0, 2.0]]


def test_a_component_too_thin_to_erode_and_too_small_for_the_points_gives_what_it_has() -> None:
    mask = np.zeros((6, 6), dtype=bool)
    mask[2, 1:3] = True
    (found,) = visual_prompts(mask, NO_SALIENCY[:6, :6], "boxes+points", num_points=5)
    assert sorted(found.points.tolist()) == [[1.0, 2.0], [2.0, 2.0]]
    assert found.box == (0.5, 1.5, 2.5, 2.5)


@pytest.mark.parametrize("kind", ["boxes", "points", "boxes+points"])
def test_negative_points_lie_well_outside_where_saliency_is_low(mask: np.ndarray, kind: str) -> None:
    saliency = np.full(mask.shape, 0.4, dtype=np.float32)
    saliency[:, 15:] = 0.0
    for prompt in visual_prompts(mask, saliency, kind, num_points=2, negative_points=3):
        outside = prompt.points[prompt.labels == 0]
        assert len(outside) == 3
        assert len({tuple(point) for point in outside}) == 3
        for x, y in outside:
            assert saliency[int(y), int(x)] == 0.0
            assert not mask[max(0, int(y) - 1) : int(y) + 2, max(0, int(x) - 1) : int(x) + 2].any()
        assert (prompt.labels == 1).sum() == (2 if "points" in kind else 0)


def test_a_mask_that_fills_the_picture_leaves_no_room_for_negative_points() -> None:
    (found,) = visual_prompts(np.ones((6, 6), dtype=bool), NO_SALIENCY[:6, :6], "boxes", negative_points=2)
    assert found.points.shape == (0, 2)
    assert found.labels.shape == (0,)
