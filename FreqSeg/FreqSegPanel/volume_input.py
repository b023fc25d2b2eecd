"""A volume node as the worker wants it, read in pieces so that the window stays alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import geometry
from .tasks import Client, Work
from .trouble import Trouble

COPY_SECONDS = 0.012
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue (ITU-R BT.601)."""

_FITTING = {"flair": ("flair",), "t1": ("t1",), "ultrasound": ("ultrasound",), "xray": ("x-ray",)}


@dataclass(frozen=True)
class Fingerprint:
    """Tells whether a volume node still holds what was sent to the worker."""

    node_id: str
    voxels: int
    dimensions: tuple[int, int, int]
    matrix: tuple[float, ...]

    @classmethod
    def of(cls, volume_node) -> Fingerprint:
        image = volume_node.GetImageData()
        scalars = image.GetPointData().GetScalars() if image is not None else None
        return cls(
            volume_node.GetID() or "",
            max(scalars.GetMTime(), image.GetMTime()) if scalars is not None else 0,
            geometry.dimensions(volume_node),
            tuple(np.round(geometry.ijk_to_ras(volume_node), 6).ravel()),
        )

    def same_grid(self, other: Fingerprint) -> bool:
        return (self.dimensions, self.matrix) == (other.dimensions, other.matrix)


def why_not(volume_node) -> str:
    """Why a volume cannot be used, as a sentence; empty when it can."""
    if volume_node is None:
        return _("Choose a volume.")
    image = volume_node.GetImageData()
    if image is None or min(image.GetDimensions()) < 1 or image.GetPointData().GetScalars() is None:
        return _("'{volume}' holds no voxels. Choose another volume.").format(volume=volume_node.GetName())
    if image.GetNumberOfScalarComponents() not in (1, 2, 3, 4):
        sentence = _("'{volume}' has {count} values a voxel; FreqSeg reads grey and colour images.")
        return sentence.format(volume=volume_node.GetName(), count=image.GetNumberOfScalarComponents())
    if abs(np.linalg.det(geometry.ijk_to_ras(volume_node)[:3, :3])) < 1e-12:
        return _("The spacing of '{volume}' is not usable; correct it in the Volumes module.").format(
            volume=volume_node.GetName()
        )
    return ""


def voxels(volume_node, along: int | None = None, index: int | None = None) -> Work:
    """Task part: the voxels (k, j, i) as they are, colour as luminance; of one slice where one is asked for."""
    array = geometry.image_array_of_volume(volume_node)
    if along is not None:
        array = np.take(array, [index], axis=2 - along)
    if array.ndim == 3:
        return array
    channels = array.shape[-1]
    if channels < 3:
        return array[..., 0]
    grey = np.empty(array.shape[:3], dtype=array.dtype)
    for layer in range(len(array)):
        for start in range(0, array.shape[1], 256):
            part = array[layer, start : start + 256, :, :3].astype(np.float32) @ LUMINANCE
            grey[layer, start : start + 256] = np.rint(part) if np.issubdtype(array.dtype, np.integer) else part
        yield None
    return grey


def described(client: Client, volume_node, along: int | None = None, index: int | None = None) -> Work:
    """Task part: the ``volume`` of a request, its voxels copied into the client's folder piece by piece.

    Args:
        client: the worker's client.
        volume_node: the volume.
        along, index: one slice alone: its voxel axis (0 i, 1 j, 2 k) and number.
    """
    array = yield from voxels(volume_node, along, index)
    matrix = geometry.ijk_to_lps(volume_node)
    if along is not None:
        matrix = matrix.copy()
        matrix[:3, 3] += matrix[:3, along] * index
    export = client.export(array)
    while not export.step(COPY_SECONDS):
        yield None
    return {
        "array": export.described(),
        "affine": [[float(value) for value in row] for row in matrix],
        "name": volume_node.GetName() or "volume",
        "modality": dicom_value(volume_node, "0008,0060"),
        "description": dicom_value(volume_node, "0008,103e") or volume_node.GetName() or "",
        "spatial_dimension": 2 if is_picture(volume_node) else 3,
    }


def described_as_it_is(client: Client, volume_node) -> Work:
    """Task part: :func:`described`, and the fingerprint of what was copied, even if it was changed meanwhile."""
    before = Fingerprint.of(volume_node)
    volume = yield from described(client, volume_node)
    if not require_unchanged_grid(volume_node, before):
        # the copy may hold voxels of before and after
        before = Fingerprint.of(volume_node)
        volume = yield from described(client, volume_node)
    return volume, before


def is_picture(volume_node) -> bool:
    """Whether a volume is a 2D picture without a place in the patient, such as a PNG file."""
    matrix = geometry.ijk_to_lps(volume_node)[:3, :3]
    return geometry.dimensions(volume_node)[2] == 1 and np.allclose(matrix, np.eye(3), atol=1e-6)


def dicom_value(volume_node, tag: str) -> str | None:
    """A DICOM value of the series a volume was loaded from; None where it was not, or is not in the database."""
    database = getattr(slicer, "dicomDatabase", None)
    uids = (volume_node.GetAttribute("DICOM.instanceUIDs") or "").split()
    if database is None or not uids or not getattr(database, "isOpen", True):
        return None
    return database.instanceValue(uids[0], tag) or None


def contrast_of(volume_node) -> str | None:
    """The kind of picture a volume's name or series description speaks of, such as "flair"; None if neither does."""
    from FreqSegLib.contrast import contrast_in

    return contrast_in(_called(volume_node))


def other_contrast(volume_node, wanted: str | None) -> str:
    """What kind of picture a volume seems to be where that is not the wanted one, else ""."""
    from FreqSegLib.contrast import other_contrast

    return other_contrast(_called(volume_node), dicom_value(volume_node, "0008,0060"), wanted)


def _called(volume_node) -> str:
    return " ".join(filter(None, (volume_node.GetName(), dicom_value(volume_node, "0008,103e"))))


def contrast_warning(volume_node, target_modality: str, modality_name: str, target: str) -> str:
    """A sentence where the volume's name speaks of another kind of picture than a target was learned on, else ""."""
    from FreqSegLib.contrast import contrast_name

    found = contrast_of(volume_node)
    fitting = _FITTING.get(target_modality)
    if found is None or fitting is None or found in fitting:
        return ""
    sentence = _("'{volume}' seems to be {found}; '{target}' was learned on {modality}. Expect a poor result.")
    return sentence.format(
        volume=volume_node.GetName(), found=contrast_name(found), target=target, modality=modality_name
    )


def require_unchanged_grid(volume_node, before: Fingerprint) -> bool:
    """Whether the voxels are the same too.

    Raises:
        Trouble: the volume is gone from the scene, or has another grid.
    """
    require_present(volume_node)
    now = Fingerprint.of(volume_node)
    if not now.same_grid(before):
        sentence = _("The grid of '{volume}' was changed during the run, so the result fits it no more. Apply again.")
        raise Trouble("changed", sentence.format(volume=volume_node.GetName()))
    return now == before


def require_present(node: Any) -> None:
    """Raises Trouble if a node was removed from the scene."""
    sentence = gone(node)
    if sentence:
        raise Trouble("gone", sentence)


def gone(node: Any) -> str | None:
    """A sentence if a node was removed from the scene."""
    if node is None or (node.GetScene() is not None and slicer.mrmlScene.IsNodePresent(node)):
        return None
    return _("'{name}' was removed from the scene during the run. Nothing was written.").format(name=node.GetName())
