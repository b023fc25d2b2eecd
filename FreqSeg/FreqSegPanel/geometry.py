"""Where a volume's voxels are: Slicer's RAS on one side, the library's LPS on the other.

This is the only place where one becomes the other. Voxel indices are (i, j, k), arrays (k, j, i).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import product

import numpy as np
import slicer
import vtk

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
THICK_SLICE_RATIO = 2.0
Bounds = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def matrix_array(matrix: vtk.vtkMatrix4x4) -> np.ndarray:
    """A vtkMatrix4x4 as a (4, 4) array."""
    return np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def vtk_matrix(array: np.ndarray) -> vtk.vtkMatrix4x4:
    """A (4, 4) array as a vtkMatrix4x4."""
    matrix = vtk.vtkMatrix4x4()
    for row, column in product(range(4), range(4)):
        matrix.SetElement(row, column, float(array[row, column]))
    return matrix


def ijk_to_ras(volume_node) -> np.ndarray:
    """(4, 4) from voxel indices to the volume's own RAS in mm, without parent transforms."""
    matrix = vtk.vtkMatrix4x4()
    volume_node.GetIJKToRASMatrix(matrix)
    return matrix_array(matrix)


def ijk_to_lps(volume_node) -> np.ndarray:
    """(4, 4) from voxel indices to the volume's own LPS in mm, as the library wants it.

    Parent transforms are left out: they move the picture, they don't change what is in it. Results go under the same
    transforms.
    """
    return RAS_TO_LPS @ ijk_to_ras(volume_node)


def ijk_to_ras_of(volume_node, other) -> np.ndarray | None:
    """(4, 4) from voxel indices to another node's own RAS, through the parent transforms of both.

    None where what lies between them is not linear.
    """
    between = vtk.vtkMatrix4x4()
    source, target = volume_node.GetParentTransformNode(), other.GetParentTransformNode()
    if source is target:
        return ijk_to_ras(volume_node)
    if not slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(source, target, between):
        return None
    return matrix_array(between) @ ijk_to_ras(volume_node)


def boxes_meet(volume_node, other) -> bool:
    """Whether the box around one volume, as the other one's axes have it, reaches into the other one."""
    matrix = ijk_to_ras_of(volume_node, other)
    if matrix is None:
        return True
    to_other = np.linalg.inv(ijk_to_ras(other)) @ matrix
    ends = np.array(list(product(*((-0.5, count - 0.5) for count in dimensions(volume_node)))))
    corners = ends @ to_other[:3, :3].T + to_other[:3, 3]
    size = np.array(dimensions(other))
    return bool((corners.max(axis=0) > -0.5).all() and (corners.min(axis=0) < size - 0.5).all())


def dimensions(volume_node) -> tuple[int, int, int]:
    """Voxels along i, j, k; zeros without an image."""
    image = volume_node.GetImageData()
    return tuple(image.GetDimensions()) if image else (0, 0, 0)


def world_to_ijk(volume_node, points: Sequence[Sequence[float]]) -> np.ndarray:
    """World positions (n, 3) as continuous voxel indices (n, 3), through every parent transform, linear or not."""
    to_local = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(None, volume_node.GetParentTransformNode(), to_local)
    local = np.array([to_local.TransformPoint([float(x) for x in point]) for point in points]).reshape(-1, 3)
    ras_to_ijk = np.linalg.inv(ijk_to_ras(volume_node))
    return local @ ras_to_ijk[:3, :3].T + ras_to_ijk[:3, 3]


def ijk_to_world(volume_node, points: Sequence[Sequence[float]]) -> np.ndarray:
    """Voxel indices (n, 3) as world positions (n, 3)."""
    matrix = ijk_to_ras(volume_node)
    local = np.asarray(points, dtype=float).reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]
    to_world = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(volume_node.GetParentTransformNode(), None, to_world)
    return np.array([to_world.TransformPoint(list(point)) for point in local])


def roi_corners(roi_node) -> np.ndarray:
    """(8, 3) world positions of the corners of a region of interest, turned as the region is."""
    size = np.array(roi_node.GetSize())
    matrix = matrix_array(roi_node.GetObjectToNodeMatrix())
    corners = np.array([np.array(signs) * size / 2 for signs in product((-1, 1), repeat=3)])
    local = corners @ matrix[:3, :3].T + matrix[:3, 3]
    to_world = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(roi_node.GetParentTransformNode(), None, to_world)
    return np.array([to_world.TransformPoint(list(corner)) for corner in local])


def roi_bounds(roi_node, volume_node) -> Bounds | None:
    """Half-open voxel bounds of a region of interest, cut to the volume; None where the two don't meet.

    A region that is turned against the volume is taken with all voxels between its corners.
    """
    corners = world_to_ijk(volume_node, roi_corners(roi_node))
    # a voxel belongs to the region when its centre does
    first = np.ceil(corners.min(axis=0) - 1e-6).astype(int)
    last = np.floor(corners.max(axis=0) + 1e-6).astype(int) + 1
    first = np.maximum(first, 0)
    last = np.minimum(last, dimensions(volume_node))
    if (first >= last).any():
        return None
    return tuple((int(low), int(high)) for low, high in zip(first, last, strict=True))


def stack_axis(volume_node, setting: str) -> int:
    """Which voxel axis (0 i, 1 j, 2 k) slices are stacked along, by the library's rule, for ``axis`` as set."""
    matrix = ijk_to_ras(volume_node)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    single = [axis for axis, count in enumerate(dimensions(volume_node)) if count == 1]
    if setting == "auto":
        if len(single) == 1:
            return single[0]
        if spacing.max() / spacing.min() > THICK_SLICE_RATIO:
            return int(np.argmax(spacing))
        setting = "axial"
    anatomical = {"sagittal": 0, "coronal": 1, "axial": 2}[setting]
    return int(np.argmax(np.abs(matrix[anatomical] / spacing)))


def bounding_box(mask: np.ndarray, slab: int = 16) -> Generator[None, None, Bounds | None]:
    """Returns the half-open (i, j, k) box of what is set, None if nothing is; yields between slabs of slices."""
    rows = np.zeros(mask.shape[1], dtype=bool)
    columns = np.zeros(mask.shape[2], dtype=bool)
    layers = np.zeros(mask.shape[0], dtype=bool)
    for start in range(0, mask.shape[0], slab):
        part = np.asarray(mask[start : start + slab]) != 0
        layers[start : start + slab] = part.any(axis=(1, 2))
        flat = part.any(axis=0)
        rows |= flat.any(axis=1)
        columns |= flat.any(axis=0)
        yield None
    if not layers.any():
        return None
    return tuple((int(np.flatnonzero(axis)[0]), int(np.flatnonzero(axis)[-1]) + 1) for axis in (columns, rows, layers))


def same_lattice(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether voxels of two (4, 4) index-to-space matrices fall on each other, whatever voxel they count from."""
    between = np.linalg.inv(second) @ first
    offset = between[:3, 3]
    return bool(np.allclose(between[:3, :3], np.eye(3), atol=1e-4) and np.allclose(offset, np.round(offset), atol=1e-3))


def oriented_image(array: np.ndarray, matrix: np.ndarray, start: Sequence[int] = (0, 0, 0)):
    """A vtkOrientedImageData of a (k, j, i) uint8 array whose first voxel has the (i, j, k) index ``start``."""
    from vtk.util.numpy_support import vtk_to_numpy

    image = slicer.vtkOrientedImageData()
    depth, height, width = array.shape
    i, j, k = (int(index) for index in start)
    image.SetExtent(i, i + width - 1, j, j + height - 1, k, k + depth - 1)
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
    if array.size:
        vtk_to_numpy(image.GetPointData().GetScalars()).reshape(array.shape)[:] = array
    image.SetGeometryFromImageToWorldMatrix(vtk_matrix(matrix))
    return image


def image_array(image) -> np.ndarray:
    """The voxels of a vtkImageData as a (k, j, i) view."""
    from vtk.util.numpy_support import vtk_to_numpy

    low_i, high_i, low_j, high_j, low_k, high_k = image.GetExtent()
    shape = (high_k - low_k + 1, high_j - low_j + 1, high_i - low_i + 1)
    return vtk_to_numpy(image.GetPointData().GetScalars()).reshape(shape)


def image_matrix(image) -> np.ndarray:
    """(4, 4) from a vtkOrientedImageData's voxel indices to its space."""
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    return matrix_array(matrix)


def resampled(
    array: np.ndarray, matrix: np.ndarray, start: Sequence[int], target: np.ndarray
) -> Generator[None, None, tuple[np.ndarray, tuple[int, int, int]]]:
    """A mask moved to another lattice by the nearest voxel, and its first voxel there; yields between slices.

    Args:
        array: (k, j, i) mask.
        matrix: (4, 4) from its indices to space.
        start: (i, j, k) of its first voxel.
        target: (4, 4) from the other lattice's indices to the same space.
    """
    to_source = np.linalg.inv(matrix) @ target
    depth, height, width = array.shape
    ends = np.array(start)[None] + np.array(
        list(product((-0.5, width - 0.5), (-0.5, height - 0.5), (-0.5, depth - 0.5)))
    )
    to_target = np.linalg.inv(to_source)
    corners = ends @ to_target[:3, :3].T + to_target[:3, 3]
    first = np.floor(corners.min(axis=0)).astype(int)
    last = np.ceil(corners.max(axis=0)).astype(int) + 1
    size = last - first
    out = np.zeros((size[2], size[1], size[0]), dtype=np.uint8)
    i, j = np.meshgrid(np.arange(first[0], last[0]), np.arange(first[1], last[1]))
    flat = np.stack([i, j]).reshape(2, -1)
    in_plane = to_source[:3, :2] @ flat + to_source[:3, 3:]
    shape = np.array([[width], [height], [depth]])
    offset = np.array(start)[:, None]
    for layer in range(size[2]):
        source = np.rint(in_plane + to_source[:3, 2:3] * (first[2] + layer)).astype(int) - offset
        inside = ((source >= 0) & (source < shape)).all(axis=0)
        x, y, z = source[:, inside]
        out[layer].reshape(-1)[inside] = array[z, y, x] != 0
        yield None
    return out, tuple(int(value) for value in first)


def image_array_of_volume(volume_node) -> np.ndarray:
    """The voxels of a volume node as a view: (k, j, i), or (k, j, i, channels) for more than one value a voxel."""
    from vtk.util.numpy_support import vtk_to_numpy

    image = volume_node.GetImageData()
    width, height, depth = image.GetDimensions()
    channels = image.GetNumberOfScalarComponents()
    shape = (depth, height, width) if channels == 1 else (depth, height, width, channels)
    return vtk_to_numpy(image.GetPointData().GetScalars()).reshape(shape)
