"""Refine with clicks: points inside and outside, or a box, and the segment is redrawn at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from . import geometry, segmentation_writer
from .tasks import Task
from .trouble import Trouble

DELAY = 250
"""Milliseconds of rest after a click before the segment is redrawn."""
INSIDE, OUTSIDE, BOX = "Inside", "Outside", "RefineBox"
_COLORS = {INSIDE: (0.3, 0.9, 0.4), OUTSIDE: (0.95, 0.35, 0.3), BOX: (1.0, 0.8, 0.2)}


class RefineSection(VTKObservationMixin):
    """Watches the points; asks the decoder; writes the segment. One step to undo from the first click to "Done"."""

    def __init__(self, ui, panel) -> None:
        """Args:
        ui: the panel's widgets.
        panel: gives ``session``, ``options``, ``volume``, ``segmentation``, ``start(work, ...)`` and ``say(...)``.
        """
        VTKObservationMixin.__init__(self)
        self.ui, self.panel = ui, panel
        self.nodes: dict[str, Any] = {}
        self._segment_ids: list[str] = []
        self._base: np.ndarray | None = None
        self._base_of: tuple[str, str] | None = None
        self._task: Task | None = None
        self._again = False
        self._ready: bool | None = None
        self._timer = qt.QTimer()
        self._timer.setSingleShot(True)
        self._timer.setInterval(DELAY)
        self._timer.timeout.connect(self.redraw)
        self._buttons = {INSIDE: ui.insideButton, OUTSIDE: ui.outsideButton, BOX: ui.boxButton}
        for role, button in self._buttons.items():
            button.clicked.connect(lambda checked=False, role=role: self._place(role, bool(checked)))
        ui.clearPointsButton.clicked.connect(self.done)
        ui.refineSegmentComboBox.currentIndexChanged.connect(self._segment_chosen)

    # Segments to choose from

    def update(self) -> None:
        """After the segmentation or its segments changed."""
        combo = self.ui.refineSegmentComboBox
        node = self.panel.segmentation
        ids = list(node.GetSegmentation().GetSegmentIDs()) if node is not None else []
        chosen = self.segment_id
        names = [node.GetSegmentation().GetSegment(segment_id).GetName() for segment_id in ids]
        shown = [combo.itemText(index) for index in range(combo.count)]
        if ids != self._segment_ids or names != shown:
            combo.blockSignals(True)
            combo.clear()
            combo.addItems(names)
            self._segment_ids = ids
            if chosen in ids:
                combo.setCurrentIndex(ids.index(chosen))
            elif ids:
                combo.setCurrentIndex(len(ids) - 1)
            combo.blockSignals(False)
        ready = bool(ids) and self.panel.volume is not None
        for widget in (*self._buttons.values(), self.ui.clearPointsButton, combo):
            widget.setEnabled(ready)
        if ready != self._ready:
            self._ready = ready
            self.ui.refineLabel.text = (
                _("Click inside or outside in a slice view; the slice is redrawn at once.")
                if ready
                else _("Apply first, or choose a segmentation with segments.")
            )

    @property
    def segment_id(self) -> str | None:
        index = self.ui.refineSegmentComboBox.currentIndex
        return self._segment_ids[index] if 0 <= index < len(self._segment_ids) else None

    def choose(self, segment_id: str) -> None:
        """Choose a segment, such as the one just made."""
        self.update()
        if segment_id in self._segment_ids:
            self.ui.refineSegmentComboBox.setCurrentIndex(self._segment_ids.index(segment_id))

    def _segment_chosen(self, *ignored: Any) -> None:
        if self._base is not None:
            self.done()

    # Points

    def _place(self, role: str, on: bool) -> None:
        for other, button in self._buttons.items():
            if other != role:
                button.setChecked(False)
        interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
        selection = slicer.mrmlScene.GetNodeByID("vtkMRMLSelectionNodeSingleton")
        if on:
            sentence = segmentation_writer.why_untouchable(self.panel.segmentation, self.segment_id or "")
            if sentence:
                self._buttons[role].setChecked(False)
                self.ui.refineLabel.text = sentence
                return
            node = self.marks(role)
            if selection is not None and interaction is not None:
                selection.SetReferenceActivePlaceNodeClassName(node.GetClassName())
                selection.SetActivePlaceNodeID(node.GetID())
                interaction.SetPlaceModePersistence(0 if role == BOX else 1)
                interaction.SetCurrentInteractionMode(slicer.vtkMRMLInteractionNode.Place)
                if not self.hasObserver(interaction, _mode_changed(), self._mode_changed):
                    self.addObserver(interaction, _mode_changed(), self._mode_changed)
        elif interaction is not None:
            interaction.SetCurrentInteractionMode(slicer.vtkMRMLInteractionNode.ViewTransform)

    def _mode_changed(self, interaction: Any, event: Any) -> None:
        if interaction.GetCurrentInteractionMode() != slicer.vtkMRMLInteractionNode.Place:
            for button in self._buttons.values():
                button.setChecked(False)

    def marks(self, role: str):
        """The markups node of a role, made when it is needed first."""
        node = self.nodes.get(role)
        if node is not None and slicer.mrmlScene.IsNodePresent(node):
            return node
        kind = "vtkMRMLMarkupsROINode" if role == BOX else "vtkMRMLMarkupsFiducialNode"
        titles = {INSIDE: _("Inside"), OUTSIDE: _("Outside"), BOX: _("Box to refine in")}
        node = slicer.mrmlScene.AddNewNodeByClass(kind, titles[role])
        node.SetSaveWithScene(False)
        node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        if display is not None:
            display.SetSelectedColor(*_COLORS[role])
            display.SetColor(*_COLORS[role])
            display.SetPointLabelsVisibility(False)
        for event in (
            slicer.vtkMRMLMarkupsNode.PointPositionDefinedEvent,
            slicer.vtkMRMLMarkupsNode.PointRemovedEvent,
            slicer.vtkMRMLMarkupsNode.PointEndInteractionEvent,
        ):
            self.addObserver(node, event, self._marked)
        self.nodes[role] = node
        return node

    def _marked(self, node: Any, event: Any) -> None:
        self._timer.start()

    def points(self, volume_node) -> list[tuple[float, float, float, int]]:
        """All points as (i, j, k, label) in voxels; those outside the volume are left out."""
        found = []
        size = np.array(geometry.dimensions(volume_node))
        for role, label in ((INSIDE, 1), (OUTSIDE, 0)):
            node = self.nodes.get(role)
            if node is None or node.GetScene() is None:
                continue
            for index in range(node.GetNumberOfControlPoints()):
                if node.GetNthControlPointPositionStatus(index) != node.PositionDefined:
                    continue
                world = [0.0, 0.0, 0.0]
                node.GetNthControlPointPositionWorld(index, world)
                place = geometry.world_to_ijk(volume_node, [world])[0]
                if (place > -0.5).all() and (place < size - 0.5).all():
                    found.append((*(float(value) for value in place), label))
        return found

    def box(self, volume_node):
        """Two opposite corner voxels of the box, or None."""
        node = self.nodes.get(BOX)
        if node is None or node.GetScene() is None or not node.GetNumberOfDefinedControlPoints():
            return None
        bounds = geometry.roi_bounds(node, volume_node)
        if bounds is None:
            return None
        return [[low for low, _high in bounds], [high - 1 for _low, high in bounds]]

    # Redraw

    def redraw(self) -> None:
        """Ask the decoder for the segment as all points together want it."""
        if self._task is not None and not self._task.finished:
            self._again = True
            return
        volume, segmentation, segment_id = self._drawn_on(), self.panel.segmentation, self.segment_id
        if volume is None or segmentation is None or segment_id is None:
            return
        points, box = self.points(volume), self.box(volume)
        if not points and box is None and self._base is None:
            return
        self._again = False
        self._task = self.panel.start(
            self._work(volume, segmentation, segment_id, points, box),
            nodes=(volume, segmentation),
            on_done=self._redrawn,
            on_trouble=self._failed,
            say_progress=self._progress,
        )

    def _work(self, volume, segmentation, segment_id: str, points, box):
        sentence = segmentation_writer.why_untouchable(segmentation, segment_id)
        if sentence:
            raise Trouble("input", sentence)
        session = self.panel.session
        if self._base is None or self._base_of != (segmentation.GetID(), segment_id):
            base = yield from segmentation_writer.segment_mask(segmentation, segment_id, volume)
            session.writer.begin(segmentation)
            self._base, self._base_of = base, (segmentation.GetID(), segment_id)
        if not points and box is None:
            yield from session.writer.replace(segmentation, volume, segment_id, self._base)
            session.writer.end(segmentation)
            return [_("The segment is as it was.")]
        return (
            yield from session.refine_work(
                volume, segmentation, segment_id, self._base, points, box, self.panel.options()
            )
        )

    def _redrawn(self, sentences: list[str]) -> None:
        self.panel.result_changed()
        self.ui.refineLabel.text = "\n".join(sentences)
        if self._again:
            self._timer.start()

    def _failed(self, trouble: Trouble) -> None:
        self.panel.result_changed()
        self.ui.refineLabel.text = trouble.message

    def _progress(self, progress) -> None:
        self.ui.refineLabel.text = progress.sentence

    def _drawn_on(self):
        """The volume the segment was drawn on, where it is still there; else the one that is chosen."""
        segmentation, segment_id = self.panel.segmentation, self.segment_id
        if segmentation is not None and segment_id is not None:
            tag = vtk.reference("")
            segment = segmentation.GetSegmentation().GetSegment(segment_id)
            if segment is not None and segment.GetTag(segmentation_writer.VOLUME_TAG, tag):
                node = slicer.mrmlScene.GetNodeByID(str(tag))
                if node is not None:
                    return node
        return self.panel.volume

    def done(self, *ignored: Any) -> None:
        """Keep the segment and remove the marks."""
        interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
        if interaction is not None and any(button.checked for button in self._buttons.values()):
            interaction.SetCurrentInteractionMode(slicer.vtkMRMLInteractionNode.ViewTransform)
        for button in self._buttons.values():
            button.setChecked(False)
        self.forget()
        self.update()

    def forget(self) -> None:
        """Let go of points and the segment's earlier shape."""
        self._timer.stop()
        self.removeObservers()
        for node in self.nodes.values():
            if node.GetScene() is not None:
                slicer.mrmlScene.RemoveNode(node)
        self.nodes.clear()
        self._base, self._base_of, self._again = None, None, False


def _mode_changed() -> int:
    return slicer.vtkMRMLInteractionNode.InteractionModeChangedEvent
