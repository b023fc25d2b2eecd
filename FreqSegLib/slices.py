"""A volume as a stack of 2D slices, and a slice's place in a model's square frame.

Both directions of both steps are exact: a slice is a view of the volume's array (axes permuted and flipped, nothing
resampled), and a frame maps pixel centres to pixel centres, so a mask comes back to where it was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from math import floor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from FreqSegLib.errors import InputError, SettingsError

if TYPE_CHECKING:
    import torch

    from FreqSegLib.volume import Volume

AXES = ("auto", "axial", "coronal", "sagittal")
THICK_SLICE_RATIO = 2.0

# Anatomical axes in LPS: 0 runs right -> left, 1 anterior -> posterior, 2 inferior -> superior.
# Each plane as radiologists look at it: (axis it is stacked along, axis down the rows, does that axis run backwards,
# axis along the columns). Superior and anterior are up; patient's right, or anterior, is on the left.
_PLANES: dict[str, tuple[int, int, bool, int]] = {
    "axial": (2, 1, False, 0),
    "coronal": (1, 2, True, 0),
    "sagittal": (0, 2, True, 1),
}
_PLANE_ACROSS = {across: plane for plane, (across, _, _, _) in _PLANES.items()}

Points = TypeVar("Points", bound=Any)


@dataclass(frozen=True)
class SliceStack:
    """The 2D slices of a volume in radiological display orientation.

    Slices of an oblique volume are its own planes, named after the anatomical plane that is nearest. Axial slices run
    from inferior to superior, coronal ones from anterior to posterior, sagittal ones from right to left.
    """

    volume: Volume
    axis: str
    """``axial``, ``coronal``, ``sagittal``, or ``image`` for a 2D image."""
    count: int
    slice_shape: tuple[int, int]
    """(rows, columns)."""
    pixel_spacing: tuple[float, float]
    """Distance of neighbouring rows and of neighbouring columns in mm."""
    slice_spacing: float
    """Distance of neighbouring slices in mm, along the stacking axis."""
    order: tuple[int, int, int]
    """Which array axis is the stacking axis, the rows and the columns."""
    flips: tuple[bool, bool, bool]
    """Which of the three run against the array."""

    @classmethod
    def of(cls, volume: Volume, axis: str = "auto") -> SliceStack:
        """Slices of ``volume`` along ``axis``.

        Args:
            volume: any orientation and spacing. A 2D image is one slice, exactly as it is stored.
            axis: ``axial``, ``coronal``, ``sagittal`` or ``auto``. ``auto`` takes the only axis with a single voxel if
                there is one, then the thickest axis if spacings differ by more than a factor of 2, else ``axial``.

        Raises:
            SettingsError: for another ``axis``.
        """
        if axis not in AXES:
            raise SettingsError(f"slice axis must be one of {', '.join(AXES)}, got {axis!r}")
        if volume.spatial_dimension == 2:
            return cls._arranged(volume, "image", (0, 1, 2), (False, False, False))
        anatomy, reverse = _nearest_anatomy(volume)
        plane = axis if axis != "auto" else _PLANE_ACROSS[anatomy[_thick_axis(volume, anatomy)]]
        across, down, down_reversed, along = _PLANES[plane]
        order = (anatomy.index(across), anatomy.index(down), anatomy.index(along))
        flips = (reverse[order[0]], reverse[order[1]] != down_reversed, reverse[order[2]])
        return cls._arranged(volume, plane, order, flips)

    @classmethod
    def _arranged(
        cls, volume: Volume, axis: str, order: tuple[int, int, int], flips: tuple[bool, bool, bool]
    ) -> SliceStack:
        counts = [volume.array.shape[array_axis] for array_axis in order]
        spacing = [float(volume.spacing[2 - array_axis]) for array_axis in order]
        return cls(
            volume=volume,
            axis=axis,
            count=counts[0],
            slice_shape=(counts[1], counts[2]),
            pixel_spacing=(spacing[1], spacing[2]),
            slice_spacing=spacing[0],
            order=order,
            flips=flips,
        )

    def __len__(self) -> int:
        return self.count

    def displayed(self, array: NDArray[Any]) -> NDArray[Any]:
        """A (k, j, i) array on the volume's grid as (slices, rows, columns): a view, writing to it writes through."""
        if array.shape != self.volume.array.shape:
            raise InputError(f"an array of the volume's shape {self.volume.array.shape} is needed, got {array.shape}")
        steps = tuple(slice(None, None, -1 if flip else None) for flip in self.flips)
        return array.transpose(self.order)[steps]

    def take(self, index: int) -> NDArray[Any]:
        """Slice ``index`` (0 to count - 1) as a view (h, w) of the volume's array."""
        return self.displayed(self.volume.array)[self._checked(index)]

    def empty(self, dtype: DTypeLike) -> NDArray[Any]:
        """Zeros of ``dtype`` in the volume's own (k, j, i) layout, to ``put`` slices into."""
        return np.zeros(self.volume.array.shape, dtype=dtype)

    def put(self, target: NDArray[Any], index: int, values: NDArray[Any]) -> None:
        """Write the slice ``values`` (h, w) into ``target`` (k, j, i): the exact inverse of ``take``."""
        if values.shape != self.slice_shape:
            raise InputError(f"slices here are {self.slice_shape} (rows, columns), got {values.shape}")
        self.displayed(target)[self._checked(index)] = values

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"slice index must lie in 0 to {self.count - 1}, got {index}")
        return index


def evened(maps: NDArray[np.float32], stack: SliceStack, millimetres: float) -> NDArray[np.float32]:
    """Maps averaged over neighbouring slices by a Gaussian; beyond the first and last slice these are repeated.

    Args:
        maps: (S, ...), of every slice of ``stack``.
        stack: its slice spacing says how far neighbours are; a single slice has none.
        millimetres: standard deviation; 0 leaves the maps as they are.
    """
    if not millimetres or stack.count < 2:
        return maps
    from scipy.ndimage import gaussian_filter1d

    return np.asarray(gaussian_filter1d(maps, millimetres / stack.slice_spacing, axis=0, mode="nearest", truncate=3.0))


def _nearest_anatomy(volume: Volume) -> tuple[list[int], list[bool]]:
    """For each array axis (k, j, i): the LPS axis it follows most closely, and whether it runs against it."""
    cosines = volume.direction[:, ::-1].T  # (array axis, LPS axis)
    best = max(permutations(range(3)), key=lambda p: sum(abs(cosines[axis, p[axis]]) for axis in range(3)))
    return list(best), [bool(cosines[axis, best[axis]] < 0) for axis in range(3)]


def _thick_axis(volume: Volume, anatomy: list[int]) -> int:
    """The array axis ``auto`` stacks slices along."""
    single = [axis for axis, count in enumerate(volume.array.shape) if count == 1]
    if len(single) == 1:
        return single[0]
    spacing = [float(value) for value in volume.spacing[::-1]]
    if max(spacing) > THICK_SLICE_RATIO * min(spacing):
        return spacing.index(max(spacing))
    return anatomy.index(2)


@dataclass(frozen=True)
class Frame:
    """How one (h, w) slice sits in a model's ``size`` x ``size`` square.

    Coordinates are pixel centres: (0, 0) is the centre of the first pixel, x runs along columns, y down the rows.
    """

    slice_shape: tuple[int, int]
    size: int
    valid: tuple[int, int]
    """(rows, columns) of the frame, from its top left corner, that hold image; the rest is padding."""

    @classmethod
    def fit(
        cls,
        slice_shape: tuple[int, int],
        pixel_spacing: tuple[float, float],
        size: int,
        mode: Literal["pad", "stretch"] = "pad",
    ) -> Frame:
        """The frame for slices of one shape and spacing.

        Args:
            slice_shape: (rows, columns).
            pixel_spacing: (row, column) distances in mm.
            size: side of the square in pixels.
            mode: ``pad`` keeps the physical aspect (the longest side fills the frame, the rest is padded at the bottom
                or right); ``stretch`` fills the square.

        Raises:
            SettingsError: for an unknown mode or a size, shape or spacing that is not positive.
        """
        height, width = slice_shape
        if min(height, width, size) < 1:
            raise SettingsError(f"a frame needs sides of at least 1 pixel, got slice {slice_shape}, size {size}")
        if mode == "stretch":
            return cls((height, width), size, (size, size))
        if mode != "pad":
            raise SettingsError(f"frame mode must be 'pad' or 'stretch', got {mode!r}")
        if not min(pixel_spacing) > 0:
            raise SettingsError(f"pixel spacing must be > 0 on both axes, got {tuple(pixel_spacing)}")
        extent = (height * pixel_spacing[0], width * pixel_spacing[1])
        scale = size / max(extent)
        rows, columns = (min(size, max(1, round(side * scale))) for side in extent)
        return cls((height, width), size, (rows, columns))

    @property
    def scale(self) -> tuple[float, float]:
        """Frame pixels per slice pixel, down the rows and along the columns."""
        return self.valid[0] / self.slice_shape[0], self.valid[1] / self.slice_shape[1]

    def to_frame(self, images: torch.Tensor, *, order: Literal["bilinear", "nearest"] = "bilinear") -> torch.Tensor:
        """Slices brought into the frame.

        Args:
            images: (B, C, h, w) floating point.
            order: ``bilinear`` (antialiased where it shrinks) or ``nearest`` (labels keep their values).

        Returns:
            (B, C, size, size), padding is 0.
        """
        import torch.nn.functional as F

        if tuple(images.shape[-2:]) != self.slice_shape:
            raise InputError(f"this frame fits slices of {self.slice_shape}, got {tuple(images.shape[-2:])}")
        rows, columns = self.valid
        if self.valid == self.slice_shape:
            placed = images
        elif order == "nearest":
            placed = F.interpolate(images, size=self.valid, mode="nearest-exact")
        else:
            shrinks = rows < self.slice_shape[0] or columns < self.slice_shape[1]
            placed = F.interpolate(images, size=self.valid, mode="bilinear", align_corners=False, antialias=shrinks)
        return F.pad(placed, (0, self.size - columns, 0, self.size - rows))

    def from_frame(self, maps: torch.Tensor, *, order: Literal["bilinear", "nearest"] = "bilinear") -> torch.Tensor:
        """Maps of the frame brought back onto the slice.

        Padding never leaks in: cells of the map whose centre lies in the padding are not read.

        Args:
            maps: (B, C, s, s) of any side s that covers the whole frame (tokens, low-resolution logits, masks).
            order: ``bilinear`` or ``nearest``; maps are sampled at the slice's pixel centres.

        Returns:
            (B, C, h, w).
        """
        if maps.shape[-2] != maps.shape[-1]:
            raise InputError(f"maps of a frame are square, got {tuple(maps.shape[-2:])}")
        for dimension, (count, valid) in enumerate(zip(self.slice_shape, self.valid, strict=True), start=2):
            maps = self._resample(maps, dimension, count, valid, order)
        return maps

    def _resample(self, maps: torch.Tensor, dimension: int, count: int, valid: int, order: str) -> torch.Tensor:
        import torch

        cells = valid * maps.shape[dimension] / self.size
        last = max(0, floor(cells - 0.5))
        centres = torch.arange(count, dtype=torch.float64) + 0.5
        position = (centres * (cells / count) - 0.5).clamp(0, last)
        if order == "nearest":
            return maps.index_select(dimension, (position + 0.5).floor().clamp(0, last).long().to(maps.device))
        below = position.floor().long()
        above = (below + 1).clamp(max=last)
        shape = [1] * maps.dim()
        shape[dimension] = count
        weight = (position - below).to(maps.device, maps.dtype).reshape(shape)
        return torch.lerp(
            maps.index_select(dimension, below.to(maps.device)),
            maps.index_select(dimension, above.to(maps.device)),
            weight,
        )

    def points_to_frame(self, xy: Points) -> Points:
        """Slice coordinates (..., 2) as (x, y) in frame coordinates; arrays stay arrays, tensors stay tensors."""
        return self._stack_like(xy, [(xy[..., axis] + 0.5) * self.scale[1 - axis] - 0.5 for axis in (0, 1)])

    def points_from_frame(self, xy: Points) -> Points:
        """Frame coordinates (..., 2) as (x, y) in slice coordinates: the inverse of ``points_to_frame``."""
        return self._stack_like(xy, [(xy[..., axis] + 0.5) / self.scale[1 - axis] - 0.5 for axis in (0, 1)])

    @staticmethod
    def _stack_like(like: Any, columns: list[Any]) -> Any:
        if isinstance(like, np.ndarray):
            return np.stack(columns, axis=-1)
        import torch

        return torch.stack(columns, dim=-1)
