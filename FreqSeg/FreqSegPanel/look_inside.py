"""What a result was made of, as volumes to see: saliency, uncertainty, frequency images, masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from . import geometry, segmentation_writer, subject_hierarchy, volume_input
from .session import Finding, Options, Session
from .tasks import Ask, Work
from .trouble import Trouble

COPY_VOXELS = 2**20
SLICE_NODES = ("Red", "Yellow", "Green")
LOOK_ATTRIBUTE, LOOK_OF_ATTRIBUTE = "FreqSeg.Look", "FreqSeg.LookOf"
_COLORS = {
    # the first that this Slicer has
    "saliency": ("FileInferno.txt", "Iron"),
    "uncertainty": ("FileViridis.txt", "Ocean"),
    "low": ("Grey",),
    "high": ("Grey",),
    "share": ("FileViridis.txt", "Ocean"),
}


@dataclass(frozen=True)
class Look:
    """A volume to see, and how much of it is see-through below ``floor`` (None: nothing is)."""

    kind: str
    name: str
    values: np.ndarray
    low: float
    high: float
    floor: float | None


def saliency_work(session: Session, finding: Finding, volume_node) -> Work:
    """Where the model looked, as a volume over the picture."""
    name = _("{prompt}: where it looked").format(prompt=finding.prompt)
    values = session.client.read(finding.saliency)
    return (yield from add_work(volume_node, Look("saliency", name, values, 0.0, 1.0, 0.1), finding.segment_id))


def uncertainty_work(session: Session, finding: Finding, volume_node) -> Work:
    """How unsure it was there, as a volume over the picture."""
    if finding.uncertainty is None:
        raise Trouble(
            "input",
            _("'{prompt}' was run without uncertainty. Tick 'Uncertainty' and apply again.").format(
                prompt=finding.prompt
            ),
        )
    values = session.client.read(finding.uncertainty)
    highest = 0.0
    for layer in values:
        highest = max(highest, float(layer.max()))
        yield None
    name = _("{prompt}: how unsure it was").format(prompt=finding.prompt)
    look = Look("uncertainty", name, values, 0.0, highest or 1.0, 0.05 * highest)
    return (yield from add_work(volume_node, look, finding.segment_id))


def frequency_work(session: Session, volume_node, options: Options) -> Work:
    """The low- and high-frequency images of a volume; returns both nodes."""
    held = yield from session.set_volume_work(volume_node, options)
    values = {"volume_id": held.volume_id}
    if options.settings:
        values["settings"] = dict(options.settings)
    reply = yield Ask("frequency_images", values)
    volume_input.require_unchanged_grid(volume_node, held.fingerprint)
    nodes = []
    for kind, title in (("low", _("{volume}: low frequencies")), ("high", _("{volume}: high frequencies"))):
        array = session.client.read(reply[kind])
        low, high = yield from _range(array)
        look = Look(kind, title.format(volume=volume_node.GetName()), array, low, high, None)
        nodes.append((yield from add_work(volume_node, look, volume_node.GetID())))
    return nodes


def mask_work(segmentation_node, segment_id: str, volume_node) -> Work:
    """A segment as a label map volume."""
    mask = yield from segmentation_writer.segment_mask(segmentation_node, segment_id, volume_node)
    name = segmentation_node.GetSegmentation().GetSegment(segment_id).GetName()
    look = Look("mask", _("{segment}: mask").format(segment=name), mask, 0, 1, None)
    return (yield from add_work(volume_node, look, segment_id))


def add_work(volume_node, look: Look, of: str) -> Work:
    """A volume node on another one's grid, filled piece by piece; an earlier one of the same look is replaced."""
    volume_input.require_present(volume_node)
    image = yield from image_of(look.values)
    volume_input.require_present(volume_node)
    node = _find(look.kind, of) or _new_node(look, of)
    node.SetName(look.name)
    node.SetIJKToRASMatrix(geometry.vtk_matrix(geometry.ijk_to_ras(volume_node)))
    node.SetAndObserveTransformNodeID(volume_node.GetTransformNodeID())
    node.SetAndObserveImageData(image)
    display = node.GetDisplayNode()
    if look.kind != "mask":
        display.SetWindowLevelMinMax(look.low, look.high)
        if look.floor is not None:
            display.AutoThresholdOff()
            display.SetThreshold(look.floor, look.high * 1.001)
            display.ApplyThresholdOn()
    subject_hierarchy.put_beside(node, volume_node)
    return node


def image_of(array: np.ndarray) -> Work:
    """Task part: a vtkImageData of a (k, j, i) array, uint8 or else float32, filled piece by piece."""
    image = vtk.vtkImageData()
    image.SetDimensions(array.shape[2], array.shape[1], array.shape[0])
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR if array.dtype == np.uint8 else vtk.VTK_FLOAT, 1)
    into = geometry.image_array(image)
    layers = max(1, COPY_VOXELS // (array.shape[1] * array.shape[2]))
    for start in range(0, array.shape[0], layers):
        into[start : start + layers] = array[start : start + layers]
        yield None
    return image


def overlay(volume_node, node, opacity: float) -> None:
    """Show a volume over the picture in every slice view."""
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        composite.SetBackgroundVolumeID(volume_node.GetID())
        _show(composite, node, opacity)


def hide(volume_node) -> None:
    """The picture alone in every slice view."""
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        composite.SetBackgroundVolumeID(volume_node.GetID() if volume_node is not None else None)
        composite.SetForegroundVolumeID(None)
        composite.SetLabelVolumeID(None)


def set_opacity(opacity: float) -> None:
    """How much of an overlay is seen."""
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if composite.GetForegroundVolumeID():
            composite.SetForegroundOpacity(opacity)
        if composite.GetLabelVolumeID():
            composite.SetLabelOpacity(opacity)


def side_by_side(volume_node, nodes: list, opacity: float) -> None:
    """The same slice three times: the picture with its segments, then up to two looks over it; the 3D view beside."""
    layout = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")
    if layout is not None:
        layout.SetViewArrangement(slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView)
    shown: list = [None, *nodes[:2]]
    along = geometry.stack_axis(volume_node, "auto")
    matrix = geometry.ijk_to_ras(volume_node)[:3, along]
    orientation = ("Sagittal", "Coronal", "Axial")[int(np.argmax(np.abs(matrix)))]
    for index, name in enumerate(SLICE_NODES):
        slice_node = slicer.mrmlScene.GetNodeByID(f"vtkMRMLSliceNode{name}")
        composite = slicer.mrmlScene.GetNodeByID(f"vtkMRMLSliceCompositeNode{name}")
        if slice_node is None or composite is None:
            continue
        slice_node.SetOrientation(orientation)
        composite.SetLinkedControl(True)
        composite.SetBackgroundVolumeID(volume_node.GetID())
        composite.SetForegroundVolumeID(None)
        composite.SetLabelVolumeID(None)
        if index < len(shown) and shown[index] is not None:
            _show(
                composite,
                shown[index],
                1.0 if shown[index].GetAttribute(LOOK_ATTRIBUTE) in ("low", "high") else opacity,
            )
    slicer.util.resetSliceViews()


def looks_of(volume_node, finding: Finding | None) -> list:
    """Volumes to see that were made of a result and its volume, in the order to show them."""
    wanted = [("saliency", finding.segment_id), ("uncertainty", finding.segment_id)] if finding is not None else []
    wanted += [("high", volume_node.GetID()), ("low", volume_node.GetID())]
    if finding is not None:
        wanted.append(("mask", finding.segment_id))
    return [node for node in (_find(kind, of) for kind, of in wanted) if node is not None]


def _show(composite, node, opacity: float) -> None:
    if node.IsA("vtkMRMLLabelMapVolumeNode"):
        composite.SetLabelVolumeID(node.GetID())
        composite.SetLabelOpacity(opacity)
    else:
        composite.SetForegroundVolumeID(node.GetID())
        composite.SetForegroundOpacity(opacity)


def _find(kind: str, of: str):
    for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode"):
        if node.GetAttribute(LOOK_ATTRIBUTE) == kind and node.GetAttribute(LOOK_OF_ATTRIBUTE) == of:
            return node
    return None


def _new_node(look: Look, of: str):
    """Its display is set before its voxels, so that Slicer need not measure their range."""
    is_mask = look.kind == "mask"
    node = slicer.mrmlScene.AddNewNodeByClass(
        "vtkMRMLLabelMapVolumeNode" if is_mask else "vtkMRMLScalarVolumeNode", look.name
    )
    node.SetAttribute(LOOK_ATTRIBUTE, look.kind)
    node.SetAttribute(LOOK_OF_ATTRIBUTE, of)
    display = slicer.mrmlScene.AddNewNodeByClass(
        "vtkMRMLLabelMapVolumeDisplayNode" if is_mask else "vtkMRMLScalarVolumeDisplayNode"
    )
    if is_mask:
        display.SetAndObserveColorNodeID("vtkMRMLColorTableNodeFileGenericColors.txt")
    else:
        display.AutoWindowLevelOff()
        display.SetAndObserveColorNodeID(_color_node_id(_COLORS[look.kind]))
    node.SetAndObserveDisplayNodeID(display.GetID())
    return node


def _color_node_id(names: tuple[str, ...]) -> str:
    candidates = [f"vtkMRMLColorTableNode{name}" for name in names]
    there = [candidate for candidate in candidates if slicer.mrmlScene.GetNodeByID(candidate) is not None]
    return there[0] if there else "vtkMRMLColorTableNodeGrey"


def _range(array: np.ndarray) -> Work:
    """Task part: the 1st and 99th percentile of every eighth voxel."""
    parts = []
    for layer in array[:: max(1, len(array) // 16)]:
        parts.append(np.asarray(layer[::2, ::2]).ravel())
        yield None
    low, high = np.percentile(np.concatenate(parts), (1, 99))
    return float(low), float(high) if high > low else float(low) + 1.0
