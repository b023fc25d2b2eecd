"""The views' frames in the main window: a coloured bar with slider and position above each rendered picture."""

from __future__ import annotations

from typing import Any

from PySide6 import QtCore, QtGui, QtWidgets

from .pictures import to_image

_LAYOUTS = {
    "four-up": (("Red", 0, 0), ("1", 0, 1), ("Green", 1, 0), ("Yellow", 1, 1)),
    "red": (("Red", 0, 0),),
    "conventional": (("1", 0, 0), ("Red", 1, 0), ("Green", 1, 1), ("Yellow", 1, 2)),
}
_THREE_D_COLOR = QtGui.QColor(116, 124, 196)


def layout_names() -> tuple[str, ...]:
    return tuple(_LAYOUTS)


def _direction(slice_node: Any) -> str:
    """The letter of the side towards which a slice's offset grows."""
    normal = [slice_node.GetSliceToRAS().GetElement(axis, 2) for axis in range(3)]
    axis = max(range(3), key=lambda index: abs(normal[index]))
    return "RAS"[axis] if normal[axis] > 0 else "LPI"[axis]


class ViewFrame(QtWidgets.QWidget):
    """One view: bar and picture."""

    def __init__(self, name: str, color: QtGui.QColor) -> None:
        super().__init__()
        self._name = name
        self._bar = QtWidgets.QWidget()
        self._bar.setFixedHeight(20)
        self._bar.setStyleSheet(f"background: {color.name()}; color: black;")
        self._letter = QtWidgets.QLabel("1" if name == "1" else name[0])
        self._slider = QtWidgets.QSlider(QtCore.Qt.Orientation.Horizontal)
        self._slider.setRange(0, 1000)
        self._slider.setEnabled(False)
        self._position = QtWidgets.QLabel()
        bar_layout = QtWidgets.QHBoxLayout(self._bar)
        bar_layout.setContentsMargins(8, 0, 8, 0)
        bar_layout.addWidget(self._letter)
        bar_layout.addWidget(self._slider, 1)
        bar_layout.addWidget(self._position)
        bold = self._letter.font
        bold.setBold(True)
        self._letter.setFont(bold)
        self._picture = QtWidgets.QLabel()
        self._picture.setStyleSheet("background: black;")
        self._picture.setMinimumSize(50, 50)
        self._picture.setSizePolicy(QtWidgets.QSizePolicy.Policy.Ignored, QtWidgets.QSizePolicy.Policy.Ignored)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(self._bar)
        layout.addWidget(self._picture, 1)

    def picture_size(self) -> tuple[int, int]:
        return self._picture.width, self._picture.height

    def show_slice(self, widget: Any) -> None:
        """Render a slice view into the frame."""
        bounds = [0.0] * 6
        logic, node = widget.sliceLogic(), widget.mrmlSliceNode()
        logic.GetLowestVolumeSliceBounds(bounds)
        low, high, offset = bounds[4], bounds[5], logic.GetSliceOffset()
        with QtCore.QSignalBlocker(self._slider):
            self._slider.setValue(round(1000 * (offset - low) / (high - low)) if high > low else 0)
        self._position.setText(f"{_direction(node)}: {offset:.2f}mm")
        image = widget.sliceView().render_image(*self.picture_size(), annotated=True)
        self._picture.setPixmap(QtGui.QPixmap.fromImage(to_image(image)))

    def show_three_d(self, view: Any) -> None:
        """Render the 3D view into the frame."""
        self._slider.hide()
        image = view.render_image(*self.picture_size())
        self._picture.setPixmap(QtGui.QPixmap.fromImage(to_image(image)))


class ViewGrid(QtWidgets.QWidget):
    """The frames of one layout."""

    def __init__(self, layout_name: str, layout_manager: Any) -> None:
        super().__init__()
        self._frames: dict[str, ViewFrame] = {}
        grid = QtWidgets.QGridLayout(self)
        grid.setContentsMargins(0, 0, 0, 0)
        grid.setSpacing(3)
        for name, row, column in _LAYOUTS[layout_name]:
            color = _THREE_D_COLOR
            if name != "1":
                color = QtGui.QColor.fromRgbF(*layout_manager.sliceWidget(name).mrmlSliceNode().GetLayoutColor())
            frame = self._frames[name] = ViewFrame(name, color)
            grid.addWidget(frame, row, column, 1, 3 if layout_name == "conventional" and name == "1" else 1)

    def frames(self) -> dict[str, ViewFrame]:
        return self._frames
