"""Two volumes of one patient: whether they lie on each other, and how to lay one on the other.

Positions are LPS millimetres, as everywhere. Both images come normalised to [0, 1] where intensities matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError
from FreqSegLib.progress import CancelCallback

if TYPE_CHECKING:
    from FreqSegLib.volume import Volume

SHIFT = 8
"""Pixels by which the MR is shifted to make pairs that are certainly not registered."""
INTENSITY_BINS = 32
HEAD_THRESHOLD = 0.06
LEAST_HEAD = 500
SINGLE_SLICE_SHARE = 0.9
SAMPLES = 25_000
"""Voxels compared in every step of a registration."""


@dataclass(frozen=True)
class RegistrationCheck:
    """Mutual information over the joint head mask, in bits: as the pair lies, and of copies that certainly do not fit.

    Attributes:
        own: of the pair.
        shifted: the MR shifted by 8 pixels up, down, left, right.
        turned: the MR turned by 180 degrees.
        slices: how many slices were looked at.
    """

    own: float
    shifted: tuple[float, float, float, float]
    turned: float
    slices: int

    @property
    def best_copy(self) -> float:
        """The best of the copies."""
        return max(*self.shifted, self.turned)

    @property
    def registered(self) -> bool:
        """The pair fits better than any of its copies.

        A single slice may fall short of that by a tenth: 10 of 149 registered slices, all near the crown of the head,
        have less than their best copy, 2 of them less than 0.9 times. Of whole volumes none had.
        """
        return self.own > self.best_copy * (SINGLE_SLICE_SHARE if self.slices == 1 else 1.0)

    @property
    def doubtful(self) -> bool:
        """Accepted, but a copy fits better."""
        return self.registered and self.own <= self.best_copy


def check_registration(
    ct: NDArray[np.float32], mr: NDArray[np.float32], *, shift: int = SHIFT
) -> RegistrationCheck | None:
    """Compare a pair with its own shifted and turned copies.

    No fixed amount of mutual information separates registered from unregistered pairs, but a pair that fits has more of
    it than the same pair displaced.

    Args:
        ct: (S, H, W) slices in [0, 1].
        mr: the same shape, on the CT's grid, 0 where there is no MR.
        shift: in pixels.

    Returns:
        None where the images are too small for the shift to make a difference.

    Raises:
        InputError: fewer than 500 pixels belong to both heads (or whatever the images show).
    """
    if min(ct.shape[1:]) < 4 * shift:
        return None
    heads = [np.stack([_head(image) for image in images]) for images in (ct, mr)]
    common = int((heads[0] & heads[1]).sum())
    if common < LEAST_HEAD:
        raise InputError(
            f"what the CT and the MR show does not overlap: {common} pixels of the compared slices belong to both "
            f"(at least {LEAST_HEAD} are needed). Check that both show the same region, or register them first"
        )

    def information(turn: bool = False, down: int = 0, right: int = 0) -> float:
        image, head = (_moved(stack[:, ::-1, ::-1] if turn else stack, down, right) for stack in (mr, heads[1]))
        return joint_information(ct, image, heads[0] & head.astype(bool))

    return RegistrationCheck(
        own=information(),
        shifted=(
            information(down=-shift),
            information(down=shift),
            information(right=-shift),
            information(right=shift),
        ),
        turned=information(turn=True),
        slices=len(ct),
    )


def joint_information(one: NDArray[Any], other: NDArray[Any], mask: NDArray[np.bool_]) -> float:
    """Mutual information in bits of two images in [0, 1] inside a mask, of 32 x 32 grey levels; 0 if it is empty."""
    levels = [np.minimum(image[mask] * INTENSITY_BINS, INTENSITY_BINS - 1).astype(np.intp) for image in (one, other)]
    counts = np.bincount(levels[0] * INTENSITY_BINS + levels[1], minlength=INTENSITY_BINS**2)
    joint = counts.reshape(INTENSITY_BINS, INTENSITY_BINS) / max(counts.sum(), 1)
    independent = np.outer(joint.sum(1), joint.sum(0))
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


@dataclass(frozen=True)
class RigidTransform:
    """Where a point of the fixed volume lies in the moving one: ``moving = matrix @ (x, y, z, 1)``.

    Attributes:
        matrix: (4, 4), LPS mm.
        metric: Mattes mutual information at the end, in nats, negative: lower is better.
        start: which starting position led there.
        seed: of the voxels sampled.
    """

    matrix: NDArray[np.float64]
    metric: float
    start: str
    seed: int

    @property
    def angle(self) -> float:
        """The whole rotation in degrees."""
        return float(np.degrees(np.arccos(np.clip((np.trace(self.matrix[:3, :3]) - 1) / 2, -1, 1))))

    def displacement(self, point: NDArray[np.float64]) -> float:
        """How far the transform moves a point of the fixed volume, in mm."""
        return float(np.linalg.norm((self.matrix @ [*point, 1.0])[:3] - point))


def register_rigidly(
    fixed: Volume, moving: Volume, *, seed: int = 0, cancel: CancelCallback | None = None
) -> RigidTransform:
    """Lay one volume on another by six numbers: Mattes mutual information (Mattes et al., 2003) in SimpleITK.

    Three starts are compared on a coarse grid (as the headers say, the centres of both grids together, the centres of
    mass together), and the best is refined in two resolutions.

    Args:
        fixed: the CT, finite.
        moving: the MR, finite.
        seed: of the voxels sampled; the same seed gives the same transform.
        cancel: asked now and then; True ends the search.

    Returns:
        The transform from the fixed volume's points to the moving one's.

    Raises:
        Cancelled: ``cancel`` said so.
        InputError: a volume is too small, or the search failed.
    """

    from FreqSegLib.errors import Cancelled

    if min(min(fixed.shape), min(moving.shape)) < 4:
        raise InputError(
            f"rigid registration needs volumes of at least 4 voxels along every axis, got {fixed.shape} and "
            f"{moving.shape}; register single slices with another program"
        )
    still, mobile = (as_simpleitk(volume, kind=np.float32) for volume in (fixed, moving))
    try:
        starts = _starts(still, mobile)
        scored = {
            name: _refined(still, mobile, start, seed, levels=(_shrink(fixed, 8.0),), steps=30, cancel=cancel)
            for name, start in starts.items()
        }
        best = min(scored, key=lambda name: scored[name][1])
        levels = tuple(_shrink(fixed, size) for size in (5.0, 2.5))
        transform, metric = _refined(still, mobile, scored[best][0], seed, levels=levels, steps=150, cancel=cancel)
    except RuntimeError as problem:
        if cancel is not None and cancel():
            raise Cancelled("The run was cancelled; nothing was written.") from problem
        reason = str(problem).strip().splitlines()[-1].strip()
        raise InputError(
            f"registering '{moving.name}' to '{fixed.name}' failed ({reason}); check that both show the same region, "
            "or register them with another program"
        ) from problem
    if cancel is not None and cancel():
        raise Cancelled("The run was cancelled; nothing was written.")
    matrix = np.eye(4)
    rotation = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = np.array(transform.GetCenter())
    matrix[:3, :3] = rotation
    matrix[:3, 3] = np.array(transform.GetTranslation()) + centre - rotation @ centre
    return RigidTransform(matrix, metric, best, seed)


def as_simpleitk(volume: Volume, *, kind: Any = None) -> Any:
    """A volume as a SimpleITK image on the same grid.

    Args:
        volume: of any type SimpleITK has; bool becomes uint8, float16 float32.
        kind: the type to convert to.
    """
    import SimpleITK as sitk

    array = volume.array
    wanted = np.dtype(kind) if kind is not None else array.dtype
    wanted = np.dtype({"bool": "uint8", "float16": "float32"}.get(wanted.name, wanted.newbyteorder("=")))
    image = sitk.GetImageFromArray(np.ascontiguousarray(array, dtype=wanted))
    image.SetSpacing([float(value) for value in volume.spacing])
    image.SetOrigin([float(value) for value in volume.origin])
    image.SetDirection([float(value) for value in volume.direction.ravel()])
    return image


class OnGrid:
    """The MR brought onto the CT's grid, a slab at a time, so that no second volume is held.

    Args:
        grid: whose grid it is.
        moving: what is resampled, linearly.
        transform: from points of the grid to points of ``moving``; the identity if left out.
    """

    def __init__(self, grid: Volume, moving: Volume, transform: RigidTransform | None = None) -> None:
        self._grid, self._moving = grid, moving
        self.resampled = transform is not None or not same_grid(grid, moving)
        if not self.resampled:
            return
        import SimpleITK as sitk

        self._image = as_simpleitk(moving)
        self._transform = sitk.AffineTransform(3)
        if transform is not None:
            self._transform.SetMatrix(transform.matrix[:3, :3].ravel().tolist())
            self._transform.SetTranslation(transform.matrix[:3, 3].tolist())

    def slab(self, axis: int, start: int, stop: int) -> NDArray[Any]:
        """Voxels ``start`` to ``stop`` of the grid along array axis ``axis``, in the grid's (k, j, i) layout.

        Returns:
            The MR's own voxels where the grids are the same, else float32, NaN where there is no MR.
        """
        where = tuple(slice(start, stop) if other == axis else slice(None) for other in range(3))
        if not self.resampled:
            return self._moving.array[where]
        import SimpleITK as sitk

        resample = sitk.ResampleImageFilter()
        size = [stop - start if 2 - axis == index else self._grid.shape[2 - index] for index in range(3)]
        corner = np.zeros(4)
        corner[2 - axis], corner[3] = start, 1
        resample.SetSize(size)
        resample.SetOutputOrigin((self._grid.affine @ corner)[:3].tolist())
        resample.SetOutputSpacing(self._grid.spacing.tolist())
        resample.SetOutputDirection(self._grid.direction.ravel().tolist())
        resample.SetOutputPixelType(sitk.sitkFloat32)
        resample.SetInterpolator(sitk.sitkLinear)
        resample.SetTransform(self._transform)
        resample.SetDefaultPixelValue(float("nan"))
        return np.asarray(sitk.GetArrayFromImage(resample.Execute(self._image)))


def same_grid(one: Volume, other: Volume, tolerance: float = 1e-3) -> bool:
    """Whether every voxel of one lies on the same voxel of the other, to a share of a voxel."""
    if one.shape != other.shape:
        return False
    corners = np.array(np.meshgrid(*[(0, count - 1) for count in one.shape[::-1]], [1])).reshape(4, -1)
    apart = np.linalg.norm((one.affine - other.affine) @ corners, axis=0).max()
    return bool(apart < tolerance * one.spacing.min())


def _head(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """What is not air, with its holes filled."""
    from scipy import ndimage

    return np.asarray(ndimage.binary_fill_holes(ndimage.binary_opening(image > HEAD_THRESHOLD)), dtype=bool)


def _moved(stack: NDArray[Any], down: int, right: int) -> NDArray[Any]:
    """Slices (S, H, W) shifted by whole pixels; what comes in is 0."""
    moved = np.zeros_like(stack)
    height, width = stack.shape[1:]
    to = (slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0)))
    source = (slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0)))
    moved[:, to[0], to[1]] = stack[:, source[0], source[1]]
    return moved


def _starts(still: Any, mobile: Any) -> dict[str, Any]:
    import SimpleITK as sitk

    initial = sitk.CenteredTransformInitializerFilter
    found = {"as placed": sitk.Euler3DTransform()}
    found["as placed"].SetCenter(
        still.TransformContinuousIndexToPhysicalPoint([(count - 1) / 2 for count in still.GetSize()])
    )
    for name, mode in (("centres of the grids", initial.GEOMETRY), ("centres of mass", initial.MOMENTS)):
        found[name] = sitk.Euler3DTransform(
            sitk.CenteredTransformInitializer(still, mobile, sitk.Euler3DTransform(), mode)
        )
    return found


def _shrink(volume: Volume, size: float) -> tuple[list[int], float]:
    """Factors that bring voxels to about ``size`` mm while some 16 are left along every axis, and the blur in mm."""
    factors = [
        int(np.clip(round(size / spacing), 1, max(1, count // 16)))
        for spacing, count in zip(volume.spacing, volume.shape[::-1], strict=True)
    ]
    return factors, size / 2


def _refined(
    still: Any,
    mobile: Any,
    start: Any,
    seed: int,
    *,
    levels: tuple[tuple[list[int], float], ...],
    steps: int,
    cancel: CancelCallback | None,
) -> tuple[Any, float]:
    """A transform improved on coarse to fine grids, and its metric."""
    import SimpleITK as sitk

    transform, metric = sitk.Euler3DTransform(start), float("inf")
    for factors, blur in levels:
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=INTENSITY_BINS)
        small = sitk.Shrink(sitk.SmoothingRecursiveGaussian(still, blur), factors)
        voxels = float(np.prod(small.GetSize()))
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(min(1.0, SAMPLES / voxels), seed=seed + 1)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=2.0, minStep=1e-3, numberOfIterations=steps, gradientMagnitudeTolerance=1e-8
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(transform, inPlace=True)
        if cancel is not None:
            method.AddCommand(sitk.sitkIterationEvent, lambda m=method: m.StopRegistration() if cancel() else None)
        try:
            method.Execute(small, sitk.SmoothingRecursiveGaussian(mobile, blur))
        except RuntimeError:
            if metric == float("inf") and len(levels) == 1:
                # a start from which nothing overlaps is no candidate
                return transform, float("inf")
            raise
        metric = float(method.GetMetricValue())
    return transform, metric
