"""``slicer.app.layoutManager()`` on the real layout logic: slice widgets and a 3D widget without windows."""

from __future__ import annotations

from typing import Any

import slicer
from PySide6 import QtCore

from .slice_view import SliceView
from .three_d_view import ThreeDView


class SliceController:
    """The bar above a slice view."""

    def __init__(self, widget: SliceWidget) -> None:
        self._widget = widget

    def fitSliceToBackground(self) -> None:
        self._widget.fitSliceToBackground()

    def setSliceVisible(self, visible: bool) -> None:
        self._widget.mrmlSliceNode().SetSliceVisible(visible)

    def setSliceOffsetValue(self, offset: float) -> None:
        self._widget.sliceLogic().SetSliceOffset(offset)

    def sliceOffsetSlider(self) -> SliceController:
        return self

    @property
    def value(self) -> float:
        return float(self._widget.sliceLogic().GetSliceOffset())


class SliceWidget:
    """One slice view with its logic and nodes."""

    def __init__(self, name: str, logic: Any) -> None:
        self.sliceViewName = name
        self._logic = logic
        self._view = SliceView(logic)
        self._controller = SliceController(self)

    def sliceLogic(self) -> Any:
        return self._logic

    def mrmlSliceNode(self) -> Any:
        return self._logic.GetSliceNode()

    def mrmlSliceCompositeNode(self) -> Any:
        return self._logic.GetSliceCompositeNode()

    def sliceView(self) -> SliceView:
        return self._view

    def sliceController(self) -> SliceController:
        return self._controller

    def fitSliceToBackground(self) -> None:
        self._logic.FitSliceToBackground()

    def sliceOrientation(self) -> str:
        return str(self.mrmlSliceNode().GetOrientation())

    def setSliceOrientation(self, orientation: str) -> None:
        self.mrmlSliceNode().SetOrientation(orientation)


class ThreeDWidget:
    """One 3D view."""

    def __init__(self, view: ThreeDView) -> None:
        self._view = view

    def threeDView(self) -> ThreeDView:
        return self._view

    def mrmlViewNode(self) -> Any:
        return self._view.mrmlViewNode()


class LayoutManager(QtCore.QObject):
    """Which views there are."""

    layoutChanged = QtCore.Signal(int)

    def __init__(self, scene: Any, application_logic: Any) -> None:
        super().__init__()
        self._scene, self._application_logic = scene, application_logic
        self._slice_widgets: dict[str, SliceWidget] = {}
        self._three_d_widgets: list[ThreeDWidget] = []
        self._slice_logics = _collection()
        application_logic.SetSliceLogics(self._slice_logics)
        self._view_logics = _collection()
        application_logic.SetViewLogics(self._view_logics)
        self._layout_logic = slicer.vtkMRMLLayoutLogic()
        self._layout_logic.SetMRMLScene(scene)
        self._layout_node().SetViewArrangement(slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView)
        self._make_slice_widgets()

    def _make_slice_widgets(self) -> None:
        for name in self.sliceViewNames():
            self.sliceWidget(name)

    def _layout_node(self) -> Any:
        return self._layout_logic.GetLayoutNode()

    def layoutLogic(self) -> Any:
        return self._layout_logic

    def _get_layout(self) -> int:
        return int(self._layout_node().GetViewArrangement())

    def setLayout(self, layout: int) -> None:
        self._layout_node().SetViewArrangement(layout)
        self._make_slice_widgets()
        self.layoutChanged.emit(layout)

    layout = QtCore.Property(int, _get_layout, setLayout)

    def sliceViewNames(self) -> list[str]:
        nodes = slicer.util.getNodesByClass("vtkMRMLSliceNode", self._scene)
        return [node.GetLayoutName() for node in nodes if node.IsMappedInLayout()] or ["Red", "Yellow", "Green"]

    def sliceWidget(self, name: str) -> SliceWidget | None:
        if name not in self._slice_widgets:
            node = self._scene.GetSingletonNode(name, "vtkMRMLSliceNode")
            if node is None:
                return None
            node.SetInteractionNode(self._application_logic.GetInteractionNode())
            logic = slicer.vtkMRMLSliceLogic()
            logic.SetMRMLApplicationLogic(self._application_logic)
            self._slice_logics.AddItem(logic)
            logic.SetMRMLScene(self._scene)
            logic.SetSliceNode(node)
            self._slice_widgets[name] = SliceWidget(name, logic)
        return self._slice_widgets[name]

    def mrmlSliceLogics(self) -> Any:
        return self._slice_logics

    def resetSliceViews(self) -> None:
        for name in self.sliceViewNames():
            widget = self.sliceWidget(name)
            if widget is not None:
                widget.fitSliceToBackground()

    @property
    def threeDViewCount(self) -> int:
        return 1

    def threeDWidget(self, index: int | str = 0) -> ThreeDWidget:
        if not self._three_d_widgets:
            self._three_d_widgets.append(ThreeDWidget(ThreeDView(self._scene, self._application_logic)))
        return self._three_d_widgets[0]

    def resetThreeDViews(self) -> None:
        self.threeDWidget().threeDView().resetFocalPoint()

    tableViewCount = 0
    plotViewCount = 0

    def activeMRMLSliceNodeName(self) -> str:
        return "Red"

    def tear_down(self) -> None:
        """Let the views go before the scene."""
        for widget in self._slice_widgets.values():
            widget.sliceView().tear_down()
            widget.sliceLogic().SetMRMLScene(None)
        for three_d in self._three_d_widgets:
            three_d.threeDView().tear_down()
        self._slice_widgets, self._three_d_widgets = {}, []
        self._layout_logic.SetMRMLScene(None)


def _collection() -> Any:
    import vtk

    return vtk.vtkCollection()
