"""The Segment Editor's panel, as far as "Open in Segment Editor" goes: it remembers what it was given."""

from __future__ import annotations

from typing import Any

import slicer
from PySide6 import QtWidgets


class qMRMLSegmentEditorWidget(QtWidgets.QWidget):
    """The editor's settings on a real vtkMRMLSegmentEditorNode."""

    def __init__(self) -> None:
        super().__init__()
        self._node: Any = None

    def setMRMLSegmentEditorNode(self, node: Any) -> None:
        self._node = node

    def mrmlSegmentEditorNode(self) -> Any:
        if self._node is None or slicer.mrmlScene.GetNodeByID(self._node.GetID() or "") is None:
            node = slicer.mrmlScene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode")
            if node is None:
                node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLSegmentEditorNode")
                node.UnRegister(None)
                node.SetSingletonTag("SegmentEditor")
                node = slicer.mrmlScene.AddNode(node)
            self._node = node
        return self._node

    def setMRMLScene(self, scene: Any) -> None:
        """The scene of this application never changes."""

    def setSegmentationNode(self, node: Any) -> None:
        self.mrmlSegmentEditorNode().SetAndObserveSegmentationNode(node)

    def segmentationNode(self) -> Any:
        return self.mrmlSegmentEditorNode().GetSegmentationNode()

    def setSourceVolumeNode(self, node: Any) -> None:
        self.mrmlSegmentEditorNode().SetAndObserveSourceVolumeNode(node)

    def sourceVolumeNode(self) -> Any:
        return self.mrmlSegmentEditorNode().GetSourceVolumeNode()

    def setCurrentSegmentID(self, segment_id: str) -> None:
        self.mrmlSegmentEditorNode().SetSelectedSegmentID(segment_id)

    def currentSegmentID(self) -> str:
        return self.mrmlSegmentEditorNode().GetSelectedSegmentID() or ""


class SegmentEditorPanel(QtWidgets.QWidget):
    """``slicer.modules.segmenteditor.widgetRepresentation()``."""

    def __init__(self) -> None:
        super().__init__()
        self._editor = qMRMLSegmentEditorWidget()

    def self(self) -> SegmentEditorPanel:
        return self

    def _get_editor(self) -> qMRMLSegmentEditorWidget:
        return self._editor

    editor = property(_get_editor)
    parameterSetNode = property(lambda self: self._editor.mrmlSegmentEditorNode())
