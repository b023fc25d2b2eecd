"""From the positions of single slices to one grid, with words for what does not fit a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError
from FreqSegLib.simpleitk_image import choose_frame

POSITION_TOLERANCE = 0.01
"""mm: slices nearer than this are at the same place."""
GAP_TOLERANCE = 0.01
"""Share of the mean gap by which gaps may differ and still be called equal."""
DRIFT_TOLERANCE = 0.05
"""Pixels by which a whole stack may drift sideways and still be called straight."""


@dataclass(frozen=True, eq=False)
class SlicePlane:
    """What the slices of a stack have in common."""

    row: NDArray[np.float64]
    """(3,) LPS unit vector along a row, the direction of i."""
    column: NDArray[np.float64]
    """(3,) LPS unit vector down a column, the direction of j."""
    pixel_spacing: tuple[float, float]
    """Distance of rows and of columns in mm."""
    thickness: float = 0.0
    """mm, for a slice that has no neighbour; 0 where unknown."""

    @property
    def normal(self) -> NDArray[np.float64]:
        """(3,) unit vector the slices are stacked along."""
        normal = np.cross(self.row, self.column)
        return normal / max(float(np.linalg.norm(normal)), 1e-12)


def arrange_slices(
    positions: NDArray[np.float64],
    moments: Sequence[tuple[float, ...]],
    plane: SlicePlane,
    frame: int | None,
    name: str,
) -> tuple[list[int], NDArray[np.float64], tuple[str, ...]]:
    """Slices put in order along their normal, on one grid.

    Args:
        positions: (n, 3) LPS mm of each slice's first pixel.
        moments: n keys that order slices at the same place.
        plane: what the slices have in common.
        frame: which of several slices at each place, from 0.
        name: for messages.

    Returns:
        Indices of the slices from first to last, the affine of their grid, and what the user should know.

    Raises:
        InputError: there are several slices at each place and no frame was chosen, or not as many at every place.
    """
    depth = positions @ plane.normal
    places: list[list[int]] = []
    for index in np.argsort(depth, kind="stable"):
        if places and depth[index] - depth[places[-1][0]] < POSITION_TOLERANCE:
            places[-1].append(int(index))
        else:
            places.append([int(index)])
    counts = Counter(len(place) for place in places)
    if len(counts) > 1:
        listed = ", ".join(f"{count} at {number} places" for count, number in sorted(counts.items()))
        raise InputError(
            f"{name}: places hold different numbers of images ({listed}), so this is more than one volume; "
            "put the slices you want into a folder of their own"
        )
    kind = "volumes at the same place (time points, echoes or phases)"
    chosen = choose_frame(len(places[0]), frame, name, kind)
    order = [sorted(place, key=lambda index: moments[index])[chosen] for place in places]
    step, notes = _slice_step(positions[order], plane, name)
    affine = np.eye(4)
    affine[:3, 0] = plane.row * plane.pixel_spacing[1]
    affine[:3, 1] = plane.column * plane.pixel_spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    return order, affine, notes


def _slice_step(
    positions: NDArray[np.float64], plane: SlicePlane, name: str
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The vector (3,) from one slice to the next, and what is unusual about the slices' places.

    A stack whose slices are shifted sideways (gantry tilt) keeps that as a shear. Uneven gaps become their mean, since
    a grid has one spacing, and the warning says what they were.
    """
    count = len(positions)
    normal = plane.normal
    if count == 1:
        return normal * (plane.thickness if plane.thickness > 0 else 1.0), ()
    notes = []
    step = (positions[-1] - positions[0]) / (count - 1)
    along = float(step @ normal)
    sideways = float(np.linalg.norm(step - along * normal))
    if sideways * (count - 1) > DRIFT_TOLERANCE * min(plane.pixel_spacing):
        notes.append(
            f"{name}: the slices are shifted against each other (gantry tilt of "
            f"{np.degrees(np.arctan2(sideways, along)):.1f} degrees); "
            "the volume keeps them where they are, as a sheared grid"
        )
    else:
        step = along * normal
    gaps = np.diff(positions @ normal)
    if gaps.max() - gaps.min() > max(GAP_TOLERANCE * along, 2 * POSITION_TOLERANCE):
        off = np.linalg.norm(positions - positions[0] - np.arange(count)[:, None] * step, axis=1).max()
        notes.append(
            f"{name}: the slices are not evenly spaced: gaps from {gaps.min():.2f} to {gaps.max():.2f} mm "
            f"({_listed(gaps)}){_missing(gaps)}. The grid has their mean, {along:.2f} mm, so distances and volumes "
            f"along that axis are approximate: a slice lies up to {off:.1f} mm from its true place"
        )
    return step, tuple(notes)


def _listed(gaps: NDArray[np.float64]) -> str:
    """Each distinct gap and how often it occurs, in the order they come."""
    counts = Counter(f"{gap:.2f}" for gap in gaps)
    shown = [f"{number} x {gap} mm" for gap, number in list(counts.items())[:8]]
    return ", ".join(shown) + (f" and {len(counts) - 8} others" if len(counts) > 8 else "")


def _missing(gaps: NDArray[np.float64]) -> str:
    """Said where every gap is a multiple of the smallest, as it is when slices were lost."""
    multiples = gaps / gaps.min()
    lost = int((np.rint(multiples) - 1).sum())
    if lost == 0 or np.abs(multiples - np.rint(multiples)).max() > 0.05:
        return ""
    return f", as if {lost} slice{'s were' if lost > 1 else ' was'} missing"
