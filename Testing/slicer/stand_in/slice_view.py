"""A slice view rendered for real, without a window: MRML's slice logic and displayable managers into an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

_MANAGERS = (
    "vtkMRMLVolumeGlyphSliceDisplayableManager",
    "vtkMRMLModelSliceDisplayableManager",
    "vtkMRMLCrosshairDisplayableManager",
    "vtkMRMLOrientationMarkerDisplayableManager",
    "vtkMRMLRulerDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLMarkupsDisplayableManager",
    "vtkMRMLTransformsDisplayableManager2D",
    "vtkMRMLColorLegendDisplayableManager",
)


class SliceView:
    """``sliceWidget.sliceView()``. The render window is made at the first rendering."""

    def __init__(self, slice_logic: Any) -> None:
        self._logic = slice_logic
        self._window: Any = None
        self._renderer: Any = None
        self._mapper: Any = None
        self._group: Any = None
        self._size = (400, 400)

    def mrmlSliceNode(self) -> Any:
        return self._logic.GetSliceNode()

    def renderWindow(self) -> Any:
        self._build()
        return self._window

    def scheduleRender(self) -> None:
        """Nothing is on a screen; views are rendered when an image is asked for."""

    def forceRender(self) -> None:
        self.render_image(*self._size)

    def displayableManagerByClassName(self, name: str) -> Any:
        self._build()
        return self._group.GetDisplayableManagerByClassName(name)

    def resize(self, width: int, height: int) -> None:
        """Give view and slice node this size in pixels; what is shown keeps its scale."""
        self._build()
        self._size = (width, height)
        self._window.SetSize(width, height)
        self._logic.ResizeSliceNode(width, height)

    def render_image(self, width: int, height: int, annotated: bool = False) -> np.ndarray:
        """Render at this size.

        Args:
            width: in pixels.
            height: in pixels.
            annotated: also write the volumes' names into the corner.

        Returns:
            RGB image ``(height, width, 3)``, uint8, first row at the top.
        """
        self.resize(width, height)
        self._show_image()
        self._annotation.SetVisibility(annotated)
        self._annotation.SetText(0, "\n".join(self._layer_names()))
        self._window.Render()
        return window_to_array(self._window)

    def _build(self) -> None:
        if self._window is not None:
            return
        self._renderer = vtk.vtkRenderer()
        self._renderer.SetBackground(0.0, 0.0, 0.0)
        self._window = vtk.vtkRenderWindow()
        self._window.SetOffScreenRendering(1)
        self._window.SetMultiSamples(0)
        self._window.AddRenderer(self._renderer)
        self._window.SetSize(*self._size)
        # The markups' displayable manager crashes in a window without one.
        self._interactor = vtk.vtkGenericRenderWindowInteractor()
        self._window.SetInteractor(self._interactor)
        self._mapper = vtk.vtkImageMapper()
        self._mapper.SetColorWindow(255)
        self._mapper.SetColorLevel(127.5)
        # The picture has to lie below what the displayable managers add.
        self._image_actor = vtk.vtkActor2D()
        self._image_actor.SetMapper(self._mapper)
        self._image_actor.GetProperty().SetDisplayLocationToBackground()
        self._renderer.AddActor2D(self._image_actor)
        self._annotation = vtk.vtkCornerAnnotation()
        self._annotation.SetMaximumFontSize(14)
        self._annotation.GetTextProperty().SetColor(1.0, 1.0, 1.0)
        self._annotation.GetTextProperty().ShadowOn()
        self._renderer.AddViewProp(self._annotation)
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        factory.SetMRMLApplicationLogic(self._logic.GetMRMLApplicationLogic())
        for name in _MANAGERS:
            if not factory.IsDisplayableManagerRegistered(name):
                factory.RegisterDisplayableManager(name)
        self._group = factory.InstantiateDisplayableManagers(self._renderer)
        self._group.UnRegister(None)
        self._group.SetMRMLDisplayableNode(self.mrmlSliceNode())

    def _layers(self) -> list[tuple[str, Any]]:
        composite = self._logic.GetSliceCompositeNode()
        ids = (
            ("L", composite.GetLabelVolumeID()),
            ("F", composite.GetForegroundVolumeID()),
            ("B", composite.GetBackgroundVolumeID()),
        )
        scene = self._logic.GetMRMLScene()
        return [(letter, node) for letter, node_id in ids if node_id and (node := scene.GetNodeByID(node_id))]

    def _layer_names(self) -> list[str]:
        return [f"{letter}: {node.GetName()}" for letter, node in self._layers()]

    def _show_image(self) -> None:
        connection = self._logic.GetImageDataConnection() if self._layers() else None
        self._image_actor.SetVisibility(connection is not None)
        if connection is not None:
            self._mapper.SetInputConnection(connection)

    def tear_down(self) -> None:
        """Let go of the scene and the graphics in an order that VTK survives."""
        if self._window is None:
            return
        self._mapper.RemoveAllInputs()
        self._renderer.RemoveAllViewProps()
        self._window.RemoveRenderer(self._renderer)
        self._window.Finalize()
        self._group = self._mapper = self._renderer = self._window = None


def window_to_array(window: Any) -> np.ndarray:
    """The rendered picture as an RGB array, first row at the top."""
    grabber = vtk.vtkWindowToImageFilter()
    grabber.SetInput(window)
    grabber.ReadFrontBufferOff()
    grabber.Update()
    image = grabber.GetOutput()
    columns, rows, _ = image.GetDimensions()
    pixels = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(rows, columns, -1)[::-1, :, :3]
    return np.ascontiguousarray(pixels)
