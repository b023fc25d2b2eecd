"""Pictures of the application for screenshots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PySide6.QtGui import QImage

if TYPE_CHECKING:
    from .main_window import qSlicerMainWindow


def to_image(pixels: np.ndarray) -> QImage:
    """A QImage of an RGB array ``(height, width, 3)``."""
    height, width, _ = pixels.shape
    return QImage(np.ascontiguousarray(pixels).data, width, height, 3 * width, QImage.Format.Format_RGB888).copy()


def save_png(pixels: np.ndarray, path: Path) -> None:
    """Write an RGB array.

    Raises:
        OSError: the file could not be written.
    """
    if not to_image(pixels).save(str(path), "PNG"):
        raise OSError(f"could not write {path}")


def grab_window(
    window: qSlicerMainWindow,
    path: Path,
    volume: Any,
    layout: str,
    size: tuple[int, int],
    center: tuple[float, float, float] | None,
    panel_width: int,
    look_from: tuple[float, float, float],
) -> None:
    """Draw the window with rendered views; see ``Application.grab_window``."""
    import slicer

    manager = slicer.app.layoutManager()
    arrangement = slicer.vtkMRMLLayoutNode
    arrangements = {
        "four-up": arrangement.SlicerLayoutFourUpView,
        "red": arrangement.SlicerLayoutOneUpRedSliceView,
        "conventional": arrangement.SlicerLayoutConventionalView,
    }
    manager.setLayout(arrangements[layout])
    if volume is not None:
        slicer.util.setSliceViewerLayers(background=volume)
    frames = window.arrange(layout, size, panel_width)
    for name, frame in frames.items():
        if name == "1":
            view = manager.threeDWidget(0).threeDView()
            view.resize(*frame.picture_size())
            view.look_from(*look_from)
            frame.show_three_d(view)
            continue
        widget = manager.sliceWidget(name)
        widget.sliceView().resize(*frame.picture_size())
        if volume is not None:
            widget.fitSliceToBackground()
        if center is not None:
            widget.mrmlSliceNode().JumpSliceByOffsetting(*center)
        frame.show_slice(widget)
    slicer.app.processEvents()
    if not window.grab().save(str(path), "PNG"):
        raise OSError(f"could not write {path}")
