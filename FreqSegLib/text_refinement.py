"""A segment corrected by hand: points or a box, one run of the SAM-family decoder a slice, nothing encoded again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from FreqSegLib.errors import InputError, WeightsError
from FreqSegLib.progress import CancelCallback, ProgressCallback, Stage
from FreqSegLib.sam.promptable import PromptableSegmenter
from FreqSegLib.slices import Frame, SliceStack

if TYPE_CHECKING:
    from FreqSegLib.text_segmentation import TextSegmenter
    from FreqSegLib.text_stages import PreparedVolume

MASK_LOGIT = 8.0
BRUSH = 2
"""Radius in pixels of the dot that a point leaves where the decoder did not follow it."""
# boxes tried around a piece: (beyond the point, by the point's distance from the piece; on every side, by the same)
REACHES = ((1.0, 0.0), (1.5, 0.0), (2.0, 0.0), (1.0, 1.5), (1.0, 2.0))
# boxes tried around a point that belongs to nothing: half their side, in shares of the slice's shorter side
NEW_SIZES = (0.03, 0.045, 0.065, 0.09, 0.13, 0.18, 0.25, 0.35)
SAME_PIECE = np.ones((3, 3), dtype=bool)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class RefinedSegment:
    """The whole segment (k, j, i) bool, and which slices of the stack are no longer as they were."""

    mask: NDArray[np.bool_]
    slices_changed: tuple[int, ...]
    warnings: tuple[str, ...] = ()


def refine_segment(
    segmenter: TextSegmenter,
    prepared: PreparedVolume,
    mask: NDArray[np.bool_],
    *,
    points: NDArray[np.float64],
    labels: NDArray[np.float64],
    box: NDArray[np.float64] | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelCallback | None = None,
) -> RefinedSegment:
    """Redraw the slices that carry points, and those the box spans; all others stay as they are.

    A box: what lies in it is drawn anew. A negative point in a piece of the segment: the piece only shrinks. A positive
    point outside: the nearest piece only grows towards it, or, where none is near, something new is drawn around it.
    Whatever the decoder says, a positive point ends inside the segment and a negative one outside.

    LiteMedSAM and MedSAM were trained with boxes and draw nothing from a point alone, so a positive point becomes
    several boxes, of which the decoder's own estimate of its quality chooses (Kirillov et al., 2023).

    Args:
        segmenter: its decoder and its embeddings are used.
        prepared: the volume, as ``set_volume`` gave it.
        mask: (k, j, i) the segment as it is.
        points: (N, 3) as (i, j, k) in voxels, centres at whole numbers.
        labels: (N) 1 inside, 0 outside.
        box: (2, 3) two opposite corner voxels (i, j, k), both inside the box.
        progress, cancel: see :class:`FreqSegLib.progress.Stage`.

    Raises:
        InputError: a point or the whole box lies outside the volume, or a label is neither 0 nor 1.
        WeightsError: there is no decoder.
        Cancelled: ``cancel`` answered True.
    """
    if segmenter.refiner is None:
        raise WeightsError(
            f"Points and boxes need a SAM-family model, and preset '{segmenter.preset.name}' has none here. "
            f"Run: freqseg models get {segmenter.preset.weights[-1]}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise InputError(f"A point's label must be 1 (inside) or 0 (outside), got {sorted(set(labels.tolist()))}.")
    stack = prepared.stack
    asked = _by_slice(stack, points, labels, box)
    if not asked:
        return RefinedSegment(mask, ())
    frame = prepared.frame_of(segmenter.refiner)
    found = mask.copy()
    shown = stack.displayed(found)
    changed = []
    stage = Stage("Refining", len(asked), progress, cancel)
    for done, (index, wanted) in enumerate(sorted(asked.items()), start=1):
        embedding = segmenter.embedding(prepared, index)
        drawn = refine_one(segmenter.refiner, embedding, frame, shown[index], wanted)
        if (drawn != shown[index]).any():
            changed.append(index)
            shown[index] = drawn
        stage.advance(done)
    return RefinedSegment(found, tuple(changed))


@dataclass(frozen=True)
class SlicePrompts:
    """What was pointed at on one slice, (x, y) in pixel centres.

    Attributes:
        points: (N, 2).
        labels: (N) 1 inside, 0 outside.
        box: (x0, y0, x1, y1) outer edges, or None.
    """

    points: NDArray[np.float64]
    labels: NDArray[np.int64]
    box: Box | None = None


def refine_one(
    model: PromptableSegmenter,
    embedding: torch.Tensor,
    frame: Frame,
    mask: NDArray[np.bool_],
    wanted: SlicePrompts,
) -> NDArray[np.bool_]:
    """One slice's mask (h, w) as it is after what was pointed at; the decoder runs once for each kind of prompt."""
    decoder = _Decoder(model, embedding, frame)
    found = mask.copy()
    if wanted.box is not None:
        inside = _inside_box(mask.shape, wanted.box)
        drawn = decoder.masks([wanted.box])[0][0] & inside
        # a decoder that sees nothing must not wipe out what is there
        found = (found & ~inside) | drawn if drawn.any() else found
    shrunk = _shrunk(decoder, found, wanted.points[wanted.labels == 0])
    removed = found & ~shrunk
    found = _grown(decoder, shrunk, wanted.points[wanted.labels == 1]) & ~removed
    return _obey(found, wanted)


@dataclass(frozen=True)
class _Decoder:
    """The SAM-family decoder on one slice."""

    model: PromptableSegmenter
    embedding: torch.Tensor
    frame: Frame

    @torch.inference_mode()
    def masks(
        self,
        boxes: list[Box],
        points: list[NDArray[np.float64]] | None = None,
        before: list[NDArray[np.bool_]] | None = None,
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Masks (P, h, w) of P boxes and the decoder's estimates (P) of their IoU.

        Args:
            boxes: outer edges on the slice.
            points: negative ones, of each box.
            before: the present shape, of each box.
        """
        frame = self.frame
        coords, labels, mask_input = None, None, None
        if points is not None:
            longest = max(len(some) for some in points)
            labels = torch.full((len(points), longest), -1)
            placed = torch.zeros(len(points), longest, 2)
            for row, some in enumerate(points):
                labels[row, : len(some)] = 0
                placed[row, : len(some)] = torch.from_numpy(some).float()
            coords = frame.points_to_frame(placed)
        if before is not None:
            shapes = torch.from_numpy(np.stack(before)).float()[:, None]
            mask_input = _as_logits(shapes, frame, 4 * self.model.embedding_shape[1])
        decoded = self.model.decode(
            self.embedding,
            boxes=frame.points_to_frame(torch.tensor(boxes, dtype=torch.float32).view(-1, 2, 2)).flatten(1),
            point_coords=coords,
            point_labels=labels,
            mask_input=mask_input,
        )
        drawn = frame.from_frame(decoded.low_res_logits.float())[:, 0] > 0
        return drawn.cpu().numpy(), decoded.iou[:, 0].float().cpu().numpy()


def _shrunk(decoder: _Decoder, mask: NDArray[np.bool_], negative: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The pieces that hold a negative point, drawn again from their box, shape and those points; they only lose."""
    pieces, _ = ndimage.label(mask, structure=SAME_PIECE)
    owner = np.array([pieces[_pixel(point, mask.shape)] for point in negative], dtype=int)
    numbers = [int(number) for number in np.unique(owner) if number]
    if not numbers:
        return mask
    before = [pieces == number for number in numbers]
    drawn, _ = decoder.masks([_box_of(one) for one in before], [negative[owner == n] for n in numbers], before)
    found = mask.copy()
    for one, new in zip(before, drawn, strict=True):
        if (one & new).any():
            found &= ~one | new
    return found


def _grown(decoder: _Decoder, mask: NDArray[np.bool_], positive: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The mask with what the positive points outside of it ask for: a piece grows, or a new one appears."""
    outside = [point for point in positive if not mask[_pixel(point, mask.shape)]]
    if not outside:
        return mask
    tries: list[list[Box]] = []
    asked: list[list[NDArray[np.float64]]] = []
    pieces, count = ndimage.label(mask, structure=SAME_PIECE)
    nearest = [_nearest(pieces, point) if count else (0, 0.0, point) for point in outside]
    for number in sorted({piece for piece, _, _ in nearest}):
        mine = [(point, found) for point, found in zip(outside, nearest, strict=True) if found[0] == number]
        asked.append([point for point, _ in mine])
        if number == 0:
            tries.append(_boxes_around(np.array(asked[-1]), mask.shape))
        else:
            steps = [(point, point - edge, distance) for point, (_, distance, edge) in mine]
            tries.append([_box_towards(pieces == number, steps, *reach) for reach in REACHES])
    drawn, iou = decoder.masks([box for some in tries for box in some])
    found, first = mask.copy(), 0
    for some, points in zip(tries, asked, strict=True):
        masks, estimates = drawn[first : first + len(some)], iou[first : first + len(some)]
        first += len(some)
        held = np.array([sum(one[_pixel(point, mask.shape)] for point in points) for one in masks])
        best = int((held / len(points) + estimates).argmax())
        if held[best] or (masks[best] & mask).any():
            found |= masks[best]
    return found


def _nearest(pieces: NDArray[np.int32], point: NDArray[np.float64]) -> tuple[int, float, NDArray[np.float64]]:
    """The piece a point outside belongs to (0: none is nearer than it is large), how far, and its nearest place."""
    rows, columns = np.nonzero(pieces)
    distances = np.hypot(columns - point[0], rows - point[1])
    at = int(distances.argmin())
    number, distance = int(pieces[rows[at], columns[at]]), float(distances[at])
    x0, y0, x1, y1 = _box_of(pieces == number)
    near = distance <= max(x1 - x0, y1 - y0)
    return (number if near else 0), distance, np.array([columns[at], rows[at]], dtype=float)


def _box_towards(
    piece: NDArray[np.bool_],
    steps: list[tuple[NDArray[np.float64], NDArray[np.float64], float]],
    beyond: float,
    around: float,
) -> Box:
    """The piece's box, made to reach beyond points outside of it, each by its step from the piece."""
    x0, y0, x1, y1 = _box_of(piece)
    margin = around * max(distance for _, _, distance in steps)
    ends = np.array([point + beyond * step for point, step, _ in steps])
    low, high = ends.min(0) - 0.5, ends.max(0) + 0.5
    return _clipped(
        (min(x0 - margin, low[0]), min(y0 - margin, low[1]), max(x1 + margin, high[0]), max(y1 + margin, high[1])),
        piece.shape,
    )


def _boxes_around(points: NDArray[np.float64], shape: tuple[int, ...]) -> list[Box]:
    """Boxes of several sizes around points that belong to nothing."""
    low, high = points.min(0), points.max(0)
    halves = [max(1.0, share * min(shape)) for share in NEW_SIZES]
    return [_clipped((low[0] - h, low[1] - h, high[0] + h, high[1] + h), shape) for h in halves]


def _as_logits(masks: torch.Tensor, frame: Frame, side: int) -> torch.Tensor:
    """Masks (P, 1, h, w) as the decoder's own low-resolution logits (P, 1, side, side); padding is outside."""
    small = Frame(frame.slice_shape, side, _scaled(frame.valid, side / frame.size))
    return (small.to_frame(masks) * 2 - 1) * MASK_LOGIT


def _scaled(valid: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(valid[0] * scale)), max(1, round(valid[1] * scale))


def _obey(mask: NDArray[np.bool_], wanted: SlicePrompts) -> NDArray[np.bool_]:
    """What the user pointed at holds: a dot where the decoder did not follow, the latest point last."""
    rows, columns = np.indices(mask.shape)
    found = mask.copy()
    for point, label in zip(wanted.points, wanted.labels, strict=True):
        row, column = _pixel(point, mask.shape)
        if found[row, column] != bool(label):
            found[(rows - row) ** 2 + (columns - column) ** 2 <= BRUSH**2] = bool(label)
    return found


def _by_slice(
    stack: SliceStack, points: NDArray[np.float64], labels: NDArray[np.float64], box: NDArray[np.float64] | None
) -> dict[int, SlicePrompts]:
    """Points and the box as (x, y) on the slices they belong to.

    Raises:
        InputError: a point, or all of the box, is outside the volume.
    """
    displayed = _displayed(stack, points)
    sides = np.array([stack.count, *stack.slice_shape])
    outside = ((displayed < -0.5) | (displayed > sides - 0.5)).any(1)
    if outside.any():
        point = tuple(round(float(part), 1) for part in points[outside][0])
        raise InputError(
            f"The point at voxel {point} lies outside what is segmented ({_by(stack)} voxels). Move it into the "
            "volume, or into the region of interest."
        )
    numbers = np.clip(np.rint(displayed[:, 0]), 0, stack.count - 1).astype(int)
    found = {
        int(index): SlicePrompts(displayed[numbers == index][:, [2, 1]], labels[numbers == index].astype(np.int64))
        for index in np.unique(numbers)
    }
    if box is None:
        return found
    corners = np.sort(_displayed(stack, box), axis=0)
    low, high = np.maximum(corners[0] - 0.5, -0.5), np.minimum(corners[1] + 0.5, sides - 0.5)
    if (low >= high).any():
        raise InputError(f"The box lies outside what is segmented ({_by(stack)} voxels). Move it into the volume.")
    nothing = SlicePrompts(np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
    edges = (float(low[2]), float(low[1]), float(high[2]), float(high[1]))
    for index in range(int(np.ceil(low[0])), int(np.floor(high[0] - 1e-9)) + 1):
        known = found.get(index, nothing)
        found[index] = SlicePrompts(known.points, known.labels, edges)
    return found


def _displayed(stack: SliceStack, voxels: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3) voxels (i, j, k) as (slice, row, column)."""
    sides = stack.volume.array.shape
    columns = []
    for axis, flip in zip(stack.order, stack.flips, strict=True):
        position = voxels[:, 2 - axis]
        columns.append(sides[axis] - 1 - position if flip else position)
    return np.stack(columns, axis=1)


def _pixel(point: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[int, int]:
    """The pixel (row, column) nearest to (x, y)."""
    column, row = np.clip(np.rint(point), 0, [shape[1] - 1, shape[0] - 1])
    return int(row), int(column)


def _box_of(piece: NDArray[np.bool_]) -> Box:
    """Outer edges (x0, y0, x1, y1)."""
    rows, columns = np.flatnonzero(piece.any(1)), np.flatnonzero(piece.any(0))
    return float(columns[0] - 0.5), float(rows[0] - 0.5), float(columns[-1] + 0.5), float(rows[-1] + 0.5)


def _clipped(box: Box, shape: tuple[int, ...]) -> Box:
    height, width = shape
    x0, y0, x1, y1 = (float(edge) for edge in box)
    return max(-0.5, x0), max(-0.5, y0), min(width - 0.5, x1), min(height - 0.5, y1)


def _inside_box(shape: tuple[int, ...], box: Box) -> NDArray[np.bool_]:
    rows, columns = np.indices(shape)
    return (columns > box[0]) & (columns < box[2]) & (rows > box[1]) & (rows < box[3])


def _by(stack: SliceStack) -> str:
    return " x ".join(str(side) for side in stack.volume.array.shape[::-1])
