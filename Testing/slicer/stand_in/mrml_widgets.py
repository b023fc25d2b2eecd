"""Qt widgets that look into the MRML scene: node selectors, segment selector and the .ui root."""

from __future__ import annotations

from typing import Any

import slicer
import vtk
from PySide6.QtCore import Property, QSignalBlocker, Signal
from PySide6.QtWidgets import QComboBox, QHBoxLayout, QInputDialog, QVBoxLayout, QWidget

from .stored_property import stored


class qMRMLWidget(QWidget):
    """A widget that knows the scene and passes it on; the root of a module's .ui."""

    mrmlSceneChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._scene: Any = None

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        if scene is not self._scene:
            self._scene = scene
            self.mrmlSceneChanged.emit(scene)


class SceneObservingWidget(QWidget):
    """Holds the observers of the scene and of nodes, and lets them go with the scene."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._observations: list[tuple[Any, int]] = []
        # MRML may not call back into a widget that Qt has deleted.
        observations = self._observations
        self.destroyed.connect(lambda *_: _stop_observing(observations))

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        if scene is self._scene:
            return
        _stop_observing(self._observations)
        self._scene = scene
        if scene is not None:
            self._observe_scene(scene)
        self._refresh()

    def _observe_scene(self, scene: Any) -> None:
        raise NotImplementedError

    def _refresh(self) -> None:
        raise NotImplementedError

    def _observe(self, subject: Any, event: int, callback: Any) -> int:
        tag = int(subject.AddObserver(event, callback))
        self._observations.append((subject, tag))
        return tag


def _plain_name(node_class: str) -> str:
    return node_class.removeprefix("vtkMRML").removesuffix("Node")


def _stop_observing(observations: list[tuple[Any, int]]) -> None:
    for observed, tag in observations:
        observed.RemoveObserver(tag)
    observations.clear()


class qMRMLNodeComboBox(SceneObservingWidget):
    """Chooses a node of the scene, of given classes; may offer "None", "Create new", "Rename" and "Delete"."""

    currentNodeChanged = Signal((object,), (bool,))
    currentNodeIDChanged = Signal(str)
    currentNodeRenamed = Signal(str)
    nodeActivated = Signal(object)
    nodeAdded = Signal(object)
    nodeAddedByUser = Signal(object)
    nodeAboutToBeRemoved = Signal(object)
    mrmlSceneChanged = Signal(object)

    nodeTypes, setNodeTypes = stored("QStringList", "nodeTypes", [], "_refresh")
    noneEnabled, setNoneEnabled = stored(bool, "noneEnabled", False, "_refresh")
    addEnabled, setAddEnabled = stored(bool, "addEnabled", True, "_refresh")
    removeEnabled, setRemoveEnabled = stored(bool, "removeEnabled", True, "_refresh")
    editEnabled, setEditEnabled = stored(bool, "editEnabled", False, "_refresh")
    renameEnabled, setRenameEnabled = stored(bool, "renameEnabled", False, "_refresh")
    baseName, setBaseName = stored(str, "baseName", "", "_refresh")
    noneDisplay, setNoneDisplay = stored(str, "noneDisplay", "None", "_refresh")
    showHidden, setShowHidden = stored(bool, "showHidden", False, "_refresh")
    showChildNodeTypes, setShowChildNodeTypes = stored(bool, "showChildNodeTypes", True, "_refresh")
    hideChildNodeTypes, setHideChildNodeTypes = stored("QStringList", "hideChildNodeTypes", [], "_refresh")
    selectNodeUponCreation, setSelectNodeUponCreation = stored(bool, "selectNodeUponCreation", True)
    interactionNodeSingletonTag, setInteractionNodeSingletonTag = stored(str, "interactionNodeSingletonTag", "")

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._attributes: dict[tuple[str, str], str | None] = {}
        self._node_ids: list[str] = []
        self._current_id = ""
        self._renames: dict[str, int] = {}
        self._combo = QComboBox(self)
        self._combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self._combo.setMinimumContentsLength(8)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._combo)
        self._combo.activated.connect(self._item_chosen)

    # What scripts call

    def currentNode(self) -> Any:
        if self._scene is None or not self._current_id:
            return None
        return self._scene.GetNodeByID(self._current_id)

    def setCurrentNode(self, node: Any) -> None:
        self.setCurrentNodeID(node.GetID() if node is not None else "")

    def setCurrentNodeID(self, node_id: str | None) -> None:
        node_id = node_id or ""
        if node_id and node_id not in self._node_ids:
            return  # as in Slicer, a node that the filter refuses is not chosen
        if node_id == self._current_id:
            return
        self._current_id = node_id
        self._show_current()
        node = self.currentNode()
        self.currentNodeChanged[object].emit(node)
        self.currentNodeChanged[bool].emit(node is not None)
        self.currentNodeIDChanged.emit(node_id)

    currentNodeID = Property(str, lambda self: self._current_id, setCurrentNodeID)

    def setCurrentNodeIndex(self, index: int) -> None:
        self.setCurrentNodeID(self._node_ids[index] if 0 <= index < len(self._node_ids) else "")

    def nodeCount(self) -> int:
        return len(self._node_ids)

    def nodeFromIndex(self, index: int) -> Any:
        return self._scene.GetNodeByID(self._node_ids[index]) if 0 <= index < len(self._node_ids) else None

    def addAttribute(self, node_type: str, name: str, value: Any = None) -> None:
        """Only nodes with this attribute (and value) are listed."""
        self._attributes[node_type, name] = None if value is None else str(value)
        self._refresh()

    def removeAttribute(self, node_type: str, name: str) -> None:
        self._attributes.pop((node_type, name), None)
        self._refresh()

    def addNode(self, node_type: str | None = None) -> Any:
        """Add a node as "Create new" does, and choose it."""
        kind = node_type or self.nodeTypes[0]
        name = self.baseName or _plain_name(kind)
        node = self._scene.CreateNodeByClass(kind)
        node.UnRegister(None)
        node.SetName(self._scene.GenerateUniqueName(name))
        for (attribute_type, attribute), value in self._attributes.items():
            if attribute_type == kind:
                node.SetAttribute(attribute, value or "")
        self._scene.AddNode(node)
        if self.selectNodeUponCreation:
            self.setCurrentNode(node)
        self.nodeAddedByUser.emit(node)
        return node

    def removeCurrentNode(self) -> None:
        if self.currentNode() is not None:
            self._scene.RemoveNode(self.currentNode())

    def renameCurrentNode(self) -> None:
        node = self.currentNode()
        name, accepted = QInputDialog.getText(self, "Rename", "New name:", text=node.GetName())
        if accepted and name:
            node.SetName(name)
            self.currentNodeRenamed.emit(name)

    # The scene's side

    def setMRMLScene(self, scene: Any) -> None:
        changed = scene is not self._scene
        super().setMRMLScene(scene)
        if changed:
            self.mrmlSceneChanged.emit(scene)

    def _observe_scene(self, scene: Any) -> None:
        @vtk.calldata_type(vtk.VTK_OBJECT)
        def added(caller: Any, event: str, node: Any) -> None:
            if not scene.IsBatchProcessing() and self._lists(node):
                self._refresh()
                self.nodeAdded.emit(node)

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def about_to_be_removed(caller: Any, event: str, node: Any) -> None:
            if node.GetID() in self._node_ids:
                self.nodeAboutToBeRemoved.emit(node)

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def removed(caller: Any, event: str, node: Any) -> None:
            if not scene.IsBatchProcessing():
                self._refresh()

        def batch_ended(caller: Any, event: str) -> None:
            self._refresh()

        self._observe(scene, slicer.vtkMRMLScene.NodeAddedEvent, added)
        self._observe(scene, slicer.vtkMRMLScene.NodeAboutToBeRemovedEvent, about_to_be_removed)
        self._observe(scene, slicer.vtkMRMLScene.NodeRemovedEvent, removed)
        self._observe(scene, slicer.vtkMRMLScene.EndBatchProcessEvent, batch_ended)

    def _lists(self, node: Any) -> bool:
        if node is None or (node.GetHideFromEditors() and not self.showHidden):
            return False
        if any(node.IsA(hidden) for hidden in self.hideChildNodeTypes):
            return False
        for kind in self.nodeTypes:
            if not (node.IsA(kind) if self.showChildNodeTypes else node.GetClassName() == kind):
                continue
            wanted = {name: value for (of, name), value in self._attributes.items() if of == kind}
            if all(
                node.GetAttribute(name) is not None and (value is None or node.GetAttribute(name) == value)
                for name, value in wanted.items()
            ):
                return True
        return False

    def _refresh(self) -> None:
        scene = self._scene
        nodes = [] if scene is None else [scene.GetNthNode(index) for index in range(scene.GetNumberOfNodes())]
        nodes = [node for node in nodes if self._lists(node)]
        self._node_ids = [node.GetID() for node in nodes]
        self._watch_names(nodes)
        with QSignalBlocker(self._combo):
            self._combo.clear()
            if self.noneEnabled:
                self._combo.addItem(self.noneDisplay, ("choose", ""))
            for node in nodes:
                self._combo.addItem(node.GetName() or node.GetID(), ("choose", node.GetID()))
            self._add_actions()
        if self._current_id not in self._node_ids:
            # Without a "None" item, the first node is chosen, as a combo box does.
            fallback = "" if self.noneEnabled or not self._node_ids else self._node_ids[0]
            if fallback == self._current_id:
                self._show_current()
            else:
                self.setCurrentNodeID(fallback)
        else:
            self._show_current()

    def _kind_name(self) -> str:
        return _plain_name(self.nodeTypes[0]) if self.nodeTypes else ""

    def _add_actions(self) -> None:
        kind = self.baseName or self._kind_name()
        actions = []
        if self.renameEnabled and self._current_id:
            actions.append((f"Rename current {kind}...", self.renameCurrentNode))
        if self.addEnabled and self.nodeTypes:
            actions.append((f"Create new {kind}", self.addNode))
        if self.removeEnabled and self._current_id:
            actions.append((f"Delete current {kind}", self.removeCurrentNode))
        if actions and self._combo.count:
            self._combo.insertSeparator(self._combo.count)
        for text, action in actions:
            self._combo.addItem(text, ("do", action))

    def _watch_names(self, nodes: list[Any]) -> None:
        for node in nodes:
            if node.GetID() not in self._renames:
                self._renames[node.GetID()] = self._observe(node, vtk.vtkCommand.ModifiedEvent, self._node_modified)
        present = set(self._node_ids)
        for gone in [node_id for node_id in self._renames if node_id not in present]:
            tag = self._renames.pop(gone)
            for observed in [pair for pair in self._observations if pair[1] == tag and pair[0] is not self._scene]:
                observed[0].RemoveObserver(tag)
                self._observations.remove(observed)

    def _node_modified(self, node: Any, event: str) -> None:
        if self._lists(node) != (node.GetID() in self._node_ids):
            self._refresh()
            return
        for index in range(self._combo.count):
            if self._combo.itemData(index) == ("choose", node.GetID()):
                self._combo.setItemText(index, node.GetName())

    def _show_current(self) -> None:
        with QSignalBlocker(self._combo):
            current = ("choose", self._current_id)
            rows = [row for row in range(self._combo.count) if self._combo.itemData(row) == current]
            self._combo.setCurrentIndex(rows[0] if rows else -1)

    def _item_chosen(self, index: int) -> None:
        action, what = self._combo.itemData(index)
        if action == "choose":
            self.setCurrentNodeID(what)
            self.nodeActivated.emit(self.currentNode())
        else:
            self._show_current()
            what()
        self._refresh()


class qMRMLSegmentSelectorWidget(QWidget):
    """Chooses a segmentation and one of its segments."""

    currentNodeChanged = Signal(object)
    currentSegmentChanged = Signal(str)
    segmentSelectionChanged = Signal("QStringList")

    segmentationNodeSelectorVisible, setSegmentationNodeSelectorVisible = stored(
        bool, "segmentationNodeSelectorVisible", True, "_layout_changed"
    )
    noneEnabled, setNoneEnabled = stored(bool, "noneEnabled", False, "_fill")
    multiSelection, setMultiSelection = stored(bool, "multiSelection", False)
    horizontalLayout, setHorizontalLayout = stored(bool, "horizontalLayout", False)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._segmentation: Any = None
        self._observations: list[tuple[Any, int]] = []
        observations = self._observations
        self.destroyed.connect(lambda *_: _stop_observing(observations))
        self._segment_id = ""
        self._nodes = qMRMLNodeComboBox(self)
        self._nodes.setNodeTypes(["vtkMRMLSegmentationNode"])
        self._nodes.setNoneEnabled(True)
        self._nodes.setAddEnabled(False)
        self._nodes.setRemoveEnabled(False)
        self._segments = QComboBox(self)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._nodes)
        layout.addWidget(self._segments)
        self._nodes.currentNodeChanged.connect(self._node_chosen)
        self._segments.currentIndexChanged.connect(self._segment_chosen)

    def setMRMLScene(self, scene: Any) -> None:
        self._nodes.setMRMLScene(scene)

    def mrmlScene(self) -> Any:
        return self._nodes.mrmlScene()

    def segmentationNodeComboBox(self) -> qMRMLNodeComboBox:
        return self._nodes

    def currentNode(self) -> Any:
        return self._nodes.currentNode()

    def setCurrentNode(self, node: Any) -> None:
        self._nodes.setCurrentNode(node)

    def setCurrentNodeID(self, node_id: str) -> None:
        self._nodes.setCurrentNodeID(node_id)

    def currentNodeID(self) -> str:
        return str(self._nodes.currentNodeID)

    def currentSegmentID(self) -> str:
        return self._segment_id

    def setCurrentSegmentID(self, segment_id: str) -> None:
        self._segments.setCurrentIndex(self._segments.findData(segment_id))

    def _layout_changed(self) -> None:
        self._nodes.setVisible(self.segmentationNodeSelectorVisible)

    def _node_chosen(self, node: Any) -> None:
        _stop_observing(self._observations)
        self._segmentation = node.GetSegmentation() if node is not None else None
        events = (slicer.vtkSegmentation.SegmentAdded, slicer.vtkSegmentation.SegmentRemoved)
        events += (slicer.vtkSegmentation.SegmentModified, slicer.vtkSegmentation.SegmentsOrderModified)
        for event in events if self._segmentation is not None else ():
            tag = self._segmentation.AddObserver(event, lambda *_: self._fill())
            self._observations.append((self._segmentation, tag))
        self._fill()
        self.currentNodeChanged.emit(node)

    def _fill(self) -> None:
        wanted = self._segment_id
        with QSignalBlocker(self._segments):
            self._segments.clear()
            if self.noneEnabled:
                self._segments.addItem("None", "")
            if self._segmentation is not None:
                for segment_id in self._segmentation.GetSegmentIDs():
                    self._segments.addItem(self._segmentation.GetSegment(segment_id).GetName(), segment_id)
            found = self._segments.findData(wanted)
            self._segments.setCurrentIndex(found if found >= 0 else (0 if self._segments.count else -1))
        self._segment_chosen(self._segments.currentIndex)

    def _segment_chosen(self, index: int) -> None:
        segment_id = (self._segments.itemData(index) or "") if index >= 0 else ""
        if segment_id != self._segment_id:
            self._segment_id = segment_id
            self.currentSegmentChanged.emit(segment_id)
