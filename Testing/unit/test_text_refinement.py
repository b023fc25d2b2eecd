"""Correcting a segment by hand: where points and boxes land, what changes, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_text_segmentation import box_volume, dice, make  # noqa: F401
from torch import Tensor

from FreqSegLib.errors import Cancelled, InputError, WeightsError
from FreqSegLib.progress import Progress
from FreqSegLib.sam.promptable import Decoded
from FreqSegLib.slices import Frame
from FreqSegLib.text_refinement import SlicePrompts, refine_one, refine_segment
from FreqSegLib.volume import Volume

SIDE = 256
FRAME = Frame.fit((SIDE, SIDE), (1.0, 1.0), SIDE)
NO_POINTS: dict[str, Any] = {"points": np.zeros((0, 3)), "labels": np.zeros(0)}


class Things:
    """A decoder for slices that hold known things: it draws those whose middle is in the box.

    Its estimate is how well the box fits them. A negative point keeps it from the thing it is in.
    """

    name, image_size, embedding_shape = "things", SIDE, (1, 64, 64)
    frame_mode = "pad"

    def __init__(self, *things: np.ndarray) -> None:
        self.things = things
        self.runs = 0
        self.masks_seen: list[np.ndarray] = []

    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        raise AssertionError("refinement encodes nothing")

    def decode(self, embedding: Tensor, *, boxes: Tensor, point_coords=None, point_labels=None, mask_input=None, **_):
        self.runs += 1
        if mask_input is not None:
            self.masks_seen += list(mask_input[:, 0].numpy())
        logits, iou = [], []
        for number, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            drawn = np.zeros((SIDE, SIDE), dtype=bool)
            for thing in self.things:
                row, column = ndimage.center_of_mass(thing)
                points = [] if point_coords is None else point_coords[number].round().long().tolist()
                labels = [] if point_labels is None else point_labels[number].tolist()
                kept = not any(thing[y, x] and label == 0 for (x, y), label in zip(points, labels, strict=True))
                if x0 <= column <= x1 and y0 <= row <= y1 and kept:
                    drawn |= thing
            around = np.zeros_like(drawn)
            around[max(0, round(y0 + 0.5)) : round(y1 + 0.5), max(0, round(x0 + 0.5)) : round(x1 + 0.5)] = True
            rows, columns = np.nonzero(drawn)
            fits = np.zeros_like(drawn)
            if len(rows):
                fits[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
            logits.append(torch.from_numpy(np.where(drawn, 5.0, -5.0)).float())
            iou.append((fits & around).sum() / (fits | around).sum())
        return Decoded(torch.stack(logits)[:, None], torch.tensor(iou).float()[:, None])


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.indices((SIDE, SIDE))
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def refined(model: Things, mask: np.ndarray, *points: tuple[float, float, int], box: Any = None) -> np.ndarray:
    given = np.array(points, dtype=float).reshape(-1, 3)
    wanted = SlicePrompts(given[:, :2], given[:, 2].astype(int), box)
    return refine_one(model, torch.zeros(1, 1, 64, 64), FRAME, mask, wanted)  # type: ignore[arg-type]


def test_a_piece_grows_to_the_thing_it_is_a_part_of() -> None:
    thing, other = disc(100, 100, 30), disc(200, 60, 20)
    half = thing & (np.indices(thing.shape)[1] < 95)
    model = Things(thing, other)
    found = refined(model, half | other, (112, 100, 1))
    assert dice(found, thing | other) > 0.99
    assert model.runs == 1


def test_a_positive_point_never_takes_anything_away() -> None:
    thing, wrong = disc(100, 100, 30), disc(100, 100, 36)
    found = refined(Things(thing), wrong, (100, 140, 1))
    assert (found & wrong).sum() == wrong.sum()
    assert found[140, 100]


def test_a_negative_point_takes_away_and_never_adds() -> None:
    thing, blob = disc(100, 100, 30), disc(138, 100, 14)
    model = Things(thing, blob)
    mask = (thing | blob) & ~disc(85, 100, 4)
    found = refined(model, mask, (142, 100, 0))
    np.testing.assert_array_equal(found, mask & thing)
    # the decoder was shown the shape it is to correct
    (shown,) = model.masks_seen
    np.testing.assert_array_equal(shown > 0, mask)


def test_a_point_on_nothing_becomes_the_thing_around_it() -> None:
    things = disc(60, 60, 9), disc(180, 150, 40)
    for thing, x, y in ((things[0], 62, 59), (things[1], 170, 160)):
        assert dice(refined(Things(*things), np.zeros_like(thing), (x, y, 1)), thing) == 1
    both = refined(Things(*things), things[0], (180, 150, 1))
    assert dice(both, things[0] | things[1]) == 1


def test_points_already_obeyed_change_nothing_and_cost_nothing() -> None:
    thing = disc(100, 100, 30)
    model = Things(disc(100, 100, 10))
    np.testing.assert_array_equal(refined(model, thing, (100, 120, 1), (20, 20, 0)), thing)
    assert model.runs == 0


@pytest.mark.parametrize("label", [0, 1])
def test_what_was_pointed_at_holds_even_where_the_decoder_sees_nothing(label: int) -> None:
    mask = disc(100, 100, 30)
    x = 110 if label == 0 else 160
    found = refined(Things(), mask, (x, 100, label))
    assert found[100, x] == bool(label)
    assert 0 < (found != mask).sum() < 20, "only a dot"


def test_a_box_draws_what_is_in_it_and_leaves_the_rest() -> None:
    things = disc(60, 60, 20), disc(180, 150, 40)
    model = Things(*things)
    wrong = disc(170, 150, 10) | disc(20, 200, 6) | things[0]
    found = refined(model, wrong, box=(139.5, 109.5, 220.5, 190.5))
    np.testing.assert_array_equal(found, things[1] | disc(20, 200, 6) | things[0])
    nothing = refined(Things(), wrong, box=(139.5, 109.5, 220.5, 190.5))
    np.testing.assert_array_equal(nothing, wrong)


OBLIQUE = np.array([[0, 0.4, -2.9, 12], [0.79, 0, 0.1, -7], [0.1, -0.69, -0.4, 30], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("axis", ["auto", "axial", "coronal", "sagittal"])
@pytest.mark.parametrize(
    "affine", [np.eye(4), np.diag([-0.8, 0.7, -3, 1.0]), OBLIQUE], ids=["plain", "flips", "oblique"]
)
def test_boxes_and_points_land_on_the_voxels_they_name(
    make: Callable[..., Any],  # noqa: F811
    affine: np.ndarray,
    axis: str,
) -> None:
    parts = make()
    volume, _ = box_volume((14, 30, 20), (slice(2, 4), slice(8, 24), slice(6, 16)), affine=affine)
    segmenter = parts.segmenter
    segmenter.settings = replace(segmenter.settings, axis=axis)
    prepared = segmenter.set_volume(volume)
    parts.refiner.embedded = 0
    box = np.array([[3, 25, 10], [15, 9, 4]], dtype=float)
    empty = np.zeros(volume.shape, dtype=bool)
    found = refine_segment(segmenter, prepared, empty, **NO_POINTS, box=box)
    truth = empty.copy()
    truth[4:11, 9:26, 3:16] = True
    # in-plane edges are drawn at the decoder's resolution; across the slices they are exact
    across = prepared.stack.order[0]
    others = tuple(one for one in range(3) if one != across)
    assert found.mask.any(others).tolist() == truth.any(others).tolist()
    assert dice(found.mask, truth) > 0.9
    expected = np.flatnonzero(prepared.stack.displayed(truth).any((1, 2)))
    assert found.slices_changed == tuple(expected)
    points = np.array([[5, 10, 6], [18, 28, 1]])
    pointed = refine_segment(segmenter, prepared, truth, points=points.astype(float), labels=np.array([0, 1]))
    assert not pointed.mask[6, 10, 5]
    assert pointed.mask[1, 28, 18]
    changed = {int(index) for index in np.flatnonzero((pointed.mask != truth).any(others))}
    assert changed == {6, 1} if across == 0 else {10, 28} if across == 1 else {5, 18}
    np.testing.assert_array_equal(truth[4:11, 9:26, 3:16], True)


def ready(make: Callable[..., Any]) -> tuple[Any, Any, np.ndarray]:  # noqa: F811
    parts = make()
    volume, truth = box_volume()
    return parts, parts.segmenter.set_volume(volume), truth


def test_without_points_the_segment_is_itself(make: Callable[..., Any]) -> None:  # noqa: F811
    parts, prepared, truth = ready(make)
    found = refine_segment(parts.segmenter, prepared, truth, **NO_POINTS)
    assert found.slices_changed == ()
    np.testing.assert_array_equal(found.mask, truth)
    assert parts.refiner.decoded == 0


def test_slices_that_were_encoded_are_not_encoded_again(make: Callable[..., Any]) -> None:  # noqa: F811
    parts, prepared, truth = ready(make)
    parts.segmenter.segment(["bright"])
    parts.refiner.embedded = 0
    box = np.array([[10, 10, 2], [20, 20, 3]], dtype=float)
    refine_segment(parts.segmenter, prepared, truth, **NO_POINTS, box=box)
    assert parts.refiner.embedded == 0
    assert parts.encoder.read == 6


def test_progress_counts_slices_and_cancel_stops_between_them(make: Callable[..., Any]) -> None:  # noqa: F811
    parts, prepared, truth = ready(make)
    seen: list[Progress] = []
    box = np.array([[10, 10, 0], [20, 20, 5]], dtype=float)
    refine_segment(parts.segmenter, prepared, truth, **NO_POINTS, box=box, progress=seen.append)
    assert [(one.stage, one.done, one.total) for one in seen] == [("Refining", done, 6) for done in range(7)]
    before = parts.refiner.decoded
    with pytest.raises(Cancelled):
        refine_segment(
            parts.segmenter, prepared, truth, **NO_POINTS, box=box, cancel=lambda: parts.refiner.decoded == before + 2
        )
    assert parts.refiner.decoded == before + 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"points": [[64, 3, 3]], "labels": [1]}, r"voxel \(64.0, 3.0, 3.0\) lies outside.*64 x 64 x 6 voxels"),
        ({"points": [[3, 3, -2]], "labels": [1]}, "lies outside"),
        ({"points": [[3, 3, 3]], "labels": [2]}, "label must be 1"),
        ({"points": [], "labels": [], "box": [[70, 3, 3], [80, 9, 3]]}, "The box lies outside"),
    ],
)
def test_what_lies_outside_is_refused(make: Callable[..., Any], given: dict[str, Any], said: str) -> None:  # noqa: F811
    parts, prepared, truth = ready(make)
    arrays = {name: np.array(value, dtype=float) for name, value in given.items()}
    arrays["points"] = arrays["points"].reshape(-1, 3)
    with pytest.raises(InputError, match=said):
        refine_segment(parts.segmenter, prepared, truth, **arrays)


def test_without_a_decoder_the_user_is_told_what_to_get(make: Callable[..., Any]) -> None:  # noqa: F811
    segmenter = make(refiner=None).segmenter
    prepared = segmenter.set_volume(Volume(box_volume()[0].array, np.eye(4)))
    with pytest.raises(WeightsError, match="freqseg models get"):
        refine_segment(segmenter, prepared, np.zeros((6, 64, 64), dtype=bool), **NO_POINTS)
