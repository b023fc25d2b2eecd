"""Masks into a segmentation node as a Slicer user expects them: named, coded, placed, and undone with one click."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import geometry, subject_hierarchy, terminology
from .tasks import Work
from .trouble import Trouble
from .volume_input import require_present, require_unchanged_grid

PROMPT_TAG, PRESET_TAG, SCORE_TAG, VOLUME_TAG = "FreqSeg.Prompt", "FreqSeg.Preset", "FreqSeg.Score", "FreqSeg.Volume"
MAXIMUM_STEPS = 10
Color = tuple[float, float, float]


def binary_labelmap() -> str:
    return slicer.vtkSegmentationConverter.GetSegmentationBinaryLabelmapRepresentationName()


def closed_surface() -> str:
    return slicer.vtkSegmentationConverter.GetSegmentationClosedSurfaceRepresentationName()


@dataclass(frozen=True)
class NewSegment:
    """What becomes a segment.

    Attributes:
        name: the prompt.
        mask: (k, j, i) on the volume's grid.
        color: RGB in [0, 1]; None for that of the terminology.
        fallback_color: where neither is known.
        tags: kept with the segment.
    """

    name: str
    mask: np.ndarray
    color: Color | None = None
    fallback_color: Color | None = None
    tags: dict[str, str] = field(default_factory=dict)


def new_segmentation(volume_node):
    """A segmentation for a volume: its grid, its place, its parent transform, its branch of the subject hierarchy."""
    name = slicer.mrmlScene.GenerateUniqueName(_("{volume} segmentation").format(volume=volume_node.GetName()))
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
    node.CreateDefaultDisplayNodes()
    prepare(node, volume_node)
    return node


def target_for(volume_node, segmentation_node, before) -> tuple:
    """Where a run's result goes, made ready, and what the user should know of it.

    Args:
        volume_node: the run's volume.
        segmentation_node: chosen by the user; None for a new one.
        before: the volume's fingerprint when the run began.
    """
    notes = []
    if not require_unchanged_grid(volume_node, before):
        sentence = _("The voxels of '{volume}' changed during the run; the result is that of the earlier ones.")
        notes.append(sentence.format(volume=volume_node.GetName()))
    target = segmentation_node
    if target is None:
        target = new_segmentation(volume_node)
    require_present(target)
    prepare(target, volume_node)
    note = other_grid_note(volume_node, target)
    return target, [*notes, note] if note else notes


def prepare(segmentation_node, volume_node) -> None:
    """Make an empty segmentation belong to a volume; one that holds segments is left as it is."""
    segmentation = segmentation_node.GetSegmentation()
    if segmentation_node.GetDisplayNode() is None:
        segmentation_node.CreateDefaultDisplayNodes()
    if segmentation.GetNumberOfSegments():
        return
    segmentation.SetSourceRepresentationName(binary_labelmap())
    segmentation_node.SetReferenceImageGeometryParameterFromVolumeNode(volume_node)
    segmentation_node.SetAndObserveTransformNodeID(volume_node.GetTransformNodeID())
    subject_hierarchy.put_beside(segmentation_node, volume_node)


def reference_volume(segmentation_node):
    """The volume a segmentation was made on, or None."""
    return segmentation_node.GetNodeReference(segmentation_node.GetReferenceImageGeometryReferenceRole())


def results_of(volume_node, segmentation_node):
    """The segmentation to go on with once a volume was chosen: the same, or its own latest; None for a new one."""
    if segmentation_node is None or reference_volume(segmentation_node) in (None, volume_node):
        return segmentation_node
    mine = [
        node
        for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
        if node.GetSaveWithScene() and reference_volume(node) is volume_node
    ]
    return mine[-1] if mine else None


def reference_matrix(segmentation_node) -> np.ndarray | None:
    """(4, 4) from indices of a segmentation's reference grid to its own space; None where it has none."""
    parameter = slicer.vtkSegmentationConverter.GetReferenceImageGeometryParameterName()
    text = segmentation_node.GetSegmentation().GetConversionParameter(parameter)
    image = slicer.vtkOrientedImageData()
    if not text or not slicer.vtkSegmentationConverter.DeserializeImageGeometry(text, image, False):
        return None
    return geometry.image_matrix(image)


def volume_to_segmentation(volume_node, segmentation_node) -> np.ndarray:
    """(4, 4) from a volume's voxel indices to a segmentation's own space, through both parent transforms.

    Raises:
        Trouble: a transform between them is not linear.
    """
    matrix = geometry.ijk_to_ras_of(volume_node, segmentation_node)
    if matrix is None:
        sentence = _(
            "'{volume}' and '{segmentation}' lie under different transforms, one of them not linear. Harden it in the "
            "Transforms module, or choose a new segmentation."
        )
        raise Trouble("input", sentence.format(volume=volume_node.GetName(), segmentation=segmentation_node.GetName()))
    return matrix


def other_grid_note(volume_node, segmentation_node) -> str:
    """A sentence where a segmentation with segments has another grid than the volume, else ""."""
    if segmentation_node is None or not segmentation_node.GetSegmentation().GetNumberOfSegments():
        return ""
    reference = reference_matrix(segmentation_node)
    try:
        matrix = volume_to_segmentation(volume_node, segmentation_node)
    except Trouble as trouble:
        return trouble.message
    if reference is None or geometry.same_lattice(matrix, reference):
        return ""
    sentence = _(
        "'{segmentation}' has another grid than '{volume}': the result is moved to its grid by the nearest voxel. "
        "Choose a new segmentation to keep every voxel."
    )
    return sentence.format(segmentation=segmentation_node.GetName(), volume=volume_node.GetName())


class SegmentationWriter:
    """Writes masks, and takes the last writing back."""

    def __init__(self) -> None:
        self._histories: dict[str, slicer.vtkSegmentationHistory] = {}
        self._after: dict[str, dict[str, int]] = {}

    def forget(self) -> None:
        """After a scene was closed."""
        for history in self._histories.values():
            history.SetSegmentation(None)
        self._histories.clear()
        self._after.clear()

    def begin(self, segmentation_node) -> None:
        """Everything written from here on is one step to undo."""
        self._history(segmentation_node).SaveState()

    def end(self, segmentation_node) -> None:
        """The step is complete."""
        self._after[segmentation_node.GetID()] = _stamps(segmentation_node)

    def why_no_undo(self, segmentation_node) -> str:
        """Why there is nothing to take back, as a sentence; empty when there is."""
        if segmentation_node is None or segmentation_node.GetID() not in self._after:
            return _("There is no result to take back.")
        if not self._history(segmentation_node).IsRestorePreviousStateAvailable():
            return _("There is no result to take back.")
        if self._after[segmentation_node.GetID()] != _stamps(segmentation_node):
            sentence = _("'{segmentation}' was edited since; undoing the result would lose that. Delete its segment.")
            return sentence.format(segmentation=segmentation_node.GetName())
        return ""

    def undo(self, segmentation_node) -> None:
        """Take the last step back.

        Raises:
            Trouble: there is none.
        """
        sentence = self.why_no_undo(segmentation_node)
        if sentence:
            raise Trouble("input", sentence)
        history = self._history(segmentation_node)
        history.RestorePreviousState()
        if history.IsRestorePreviousStateAvailable():
            self._after[segmentation_node.GetID()] = _stamps(segmentation_node)
        else:
            del self._after[segmentation_node.GetID()]

    def add(self, segmentation_node, volume_node, new: NewSegment) -> Work:
        """Task part: one more segment; returns its id. Others are not touched."""
        image = yield from self._image(segmentation_node, volume_node, new.mask)
        require_present(segmentation_node)
        segmentation = segmentation_node.GetSegmentation()
        segment = slicer.vtkSegment()
        segment.SetName(_unique_name(segmentation, new.name))
        entry, color = terminology.entry_and_color(new.name)
        if entry:
            segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), entry)
        shown = new.color or color or new.fallback_color
        if shown is not None:
            segment.SetColor(*shown)
        for name, value in new.tags.items():
            segment.SetTag(name, value)
        if image is not None:
            segment.AddRepresentation(binary_labelmap(), image)
        segment_id = segmentation.GenerateUniqueSegmentID(new.name)
        if image is None:
            segment.AddRepresentation(binary_labelmap(), slicer.vtkOrientedImageData())
        segmentation.AddSegment(segment, segment_id)
        return segment_id

    def replace(self, segmentation_node, volume_node, segment_id: str, mask: np.ndarray) -> Work:
        """Task part: another mask for a segment; its name, colour and codes stay."""
        image = yield from self._image(segmentation_node, volume_node, mask)
        require_present(segmentation_node)
        segmentation = segmentation_node.GetSegmentation()
        if segmentation.GetSegment(segment_id) is None:
            raise Trouble("gone", _("The segment was removed during the run. Nothing was written."))
        in_3d = segmentation.ContainsRepresentation(closed_surface())
        if image is None:
            segmentation.ClearSegment(segment_id)
            return
        if segmentation.IsSharedBinaryLabelmap(segment_id):
            segmentation.SeparateSegmentLabelmap(segment_id)
        segment = segmentation.GetSegment(segment_id)
        segment.GetRepresentation(binary_labelmap()).DeepCopy(image)
        segment.SetLabelValue(1)
        segment.GetRepresentation(binary_labelmap()).Modified()
        segmentation.InvokeEvent(slicer.vtkSegmentation.SourceRepresentationModified, segment_id)
        if in_3d and not segmentation.ContainsRepresentation(closed_surface()):
            yield None
            segmentation_node.CreateClosedSurfaceRepresentation()

    def _image(self, segmentation_node, volume_node, mask: np.ndarray) -> Work:
        """Task part: what is set of a mask, in the segmentation's grid; None for an empty one."""
        box = yield from geometry.bounding_box(mask)
        if box is None:
            return None
        (i0, i1), (j0, j1), (k0, k1) = box
        part = np.asarray(mask[k0:k1, j0:j1, i0:i1])
        yield None
        matrix = volume_to_segmentation(volume_node, segmentation_node)
        reference = reference_matrix(segmentation_node)
        start = (i0, j0, k0)
        moved = (
            reference is not None
            and segmentation_node.GetSegmentation().GetNumberOfSegments() > 0
            and not geometry.same_lattice(matrix, reference)
        )
        if moved:
            part, start = yield from geometry.resampled(part, matrix, start, reference)
            matrix = reference
            if not part.any():
                return None
        return geometry.oriented_image(part, matrix, start)

    def _history(self, segmentation_node):
        node_id = segmentation_node.GetID()
        if node_id not in self._histories:
            history = slicer.vtkSegmentationHistory()
            history.SetMaximumNumberOfStates(MAXIMUM_STEPS)
            history.SetSegmentation(segmentation_node.GetSegmentation())
            self._histories[node_id] = history
        return self._histories[node_id]


def segment_mask(segmentation_node, segment_id: str, volume_node) -> Work:
    """Task part: a segment as a (k, j, i) uint8 mask on a volume's grid."""
    segment = segmentation_node.GetSegmentation().GetSegment(segment_id)
    width, height, depth = geometry.dimensions(volume_node)
    mask = np.zeros((depth, height, width), dtype=np.uint8)
    image = segment.GetRepresentation(binary_labelmap())
    if image is None or image.IsEmpty():
        return mask
    value = segment.GetLabelValue()
    here = np.linalg.inv(volume_to_segmentation(volume_node, segmentation_node)) @ geometry.image_matrix(image)
    extent = image.GetExtent()
    start = (extent[0], extent[2], extent[4])
    part = (geometry.image_array(image) == value).astype(np.uint8)
    yield None
    if geometry.same_lattice(here, np.eye(4)):
        start = tuple(int(value) for value in np.round(here[:3, :3] @ start + here[:3, 3]))
    else:
        part, start = yield from geometry.resampled(part, here, start, np.eye(4))
    low = np.maximum(start, 0)
    high = np.minimum(np.array(start) + part.shape[::-1], (width, height, depth))
    if (low < high).all():
        into = tuple(slice(a, b) for a, b in zip(low[::-1], high[::-1], strict=True))
        where = tuple(slice(a - s, b - s) for a, b, s in zip(low[::-1], high[::-1], start[::-1], strict=True))
        mask[into] = part[where]
    return mask


def why_untouchable(segmentation_node, segment_id: str) -> str:
    """Why a segment must not be changed: it is hidden, or marked as completed; empty when it may be."""
    segment = segmentation_node.GetSegmentation().GetSegment(segment_id)
    if segment is None:
        return _("The segment is not there any more.")
    display = segmentation_node.GetDisplayNode()
    if display is not None and not (display.GetVisibility() and display.GetSegmentVisibility(segment_id)):
        return _("'{segment}' is hidden. Show it first, so that you see what changes.").format(
            segment=segment.GetName()
        )
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    if logic.GetSegmentStatus(segment) == logic.Completed:
        sentence = _("'{segment}' is marked as completed, so it stays as it is. Change its status to refine it.")
        return sentence.format(segment=segment.GetName())
    return ""


def _unique_name(segmentation, name: str) -> str:
    taken = {segmentation.GetNthSegment(index).GetName() for index in range(segmentation.GetNumberOfSegments())}
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _stamps(segmentation_node) -> dict[str, int]:
    """When each segment's voxels were last changed."""
    segmentation = segmentation_node.GetSegmentation()
    found = {}
    for index in range(segmentation.GetNumberOfSegments()):
        image = segmentation.GetNthSegment(index).GetRepresentation(binary_labelmap())
        found[segmentation.GetNthSegmentID(index)] = image.GetMTime() if image is not None else 0
    return found


def segmentation_of(node_id: str):
    """The segmentation node of that id, or None."""
    return slicer.mrmlScene.GetNodeByID(node_id)


def gone_segment(segmentation_node, segment_id: str) -> bool:
    """Whether a segment was removed."""
    return segmentation_node.GetSegmentation().GetSegment(segment_id) is None
