"""A 3D view rendered for real, without a window."""

from __future__ import annotations

from typing import Any

import numpy as np
import slicer
import vtk

from .slice_view import window_to_array

_MANAGERS = (
    "vtkMRMLCameraDisplayableManager",
    "vtkMRMLViewDisplayableManager",
    "vtkMRMLModelDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager3D",
    "vtkMRMLMarkupsDisplayableManager",
)


class ThreeDView:
    """``threeDWidget.threeDView()``. The render window is made at the first rendering."""

    def __init__(self, scene: Any, application_logic: Any) -> None:
        self._scene, self._application_logic = scene, application_logic
        self._window: Any = None
        self._renderer: Any = None
        self._group: Any = None
        self._node = scene.GetSingletonNode("1", "vtkMRMLViewNode")
        self._node.SetInteractionNode(application_logic.GetInteractionNode())

    def mrmlViewNode(self) -> Any:
        return self._node

    def renderWindow(self) -> Any:
        self._build()
        return self._window

    def resetFocalPoint(self) -> None:
        self._build()
        self._renderer.ResetCamera()

    def resetCamera(self) -> None:
        self.resetFocalPoint()

    def scheduleRender(self) -> None:
        """Nothing is on a screen; views are rendered when an image is asked for."""

    def forceRender(self) -> None:
        self.render_image(400, 400)

    def resize(self, width: int, height: int) -> None:
        """Give the view this size in pixels."""
        self._build()
        self._window.SetSize(width, height)

    def render_image(self, width: int, height: int) -> np.ndarray:
        """Render at this size: RGB ``(height, width, 3)``, uint8, first row at the top."""
        self.resize(width, height)
        self._renderer.ResetCameraClippingRange()
        self._window.Render()
        return window_to_array(self._window)

    def look_from(self, right: float, anterior: float, superior: float) -> None:
        """Point the camera at what is shown, from a direction in RAS."""
        self._build()
        self._window.Render()
        camera = self._renderer.GetActiveCamera()
        camera.SetFocalPoint(0.0, 0.0, 0.0)
        camera.SetPosition(right, anterior, superior)
        camera.SetViewUp(0.0, 0.0, 1.0)
        self._renderer.ResetCamera()

    def _build(self) -> None:
        if self._window is not None:
            return
        self._renderer = vtk.vtkRenderer()
        self._window = vtk.vtkRenderWindow()
        self._window.SetOffScreenRendering(1)
        self._window.SetMultiSamples(0)
        self._window.AddRenderer(self._renderer)
        self._window.SetSize(400, 400)
        # The displayable managers of 3D views crash in a window without one.
        self._interactor = vtk.vtkGenericRenderWindowInteractor()
        self._window.SetInteractor(self._interactor)
        factory = slicer.vtkMRMLThreeDViewDisplayableManagerFactory.GetInstance()
        factory.SetMRMLApplicationLogic(self._application_logic)
        for name in _MANAGERS:
            if not factory.IsDisplayableManagerRegistered(name):
                factory.RegisterDisplayableManager(name)
        self._group = factory.InstantiateDisplayableManagers(self._renderer)
        self._group.UnRegister(None)
        self._group.SetMRMLDisplayableNode(self.mrmlViewNode())

    def tear_down(self) -> None:
        """Let go of the scene and the graphics in an order that VTK survives."""
        if self._window is not None:
            self._renderer.RemoveAllViewProps()
            self._window.RemoveRenderer(self._renderer)
            self._window.Finalize()
        self._group = self._renderer = self._window = None
