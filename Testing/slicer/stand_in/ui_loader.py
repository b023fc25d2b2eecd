"""Load a module's .ui as Slicer does: custom widgets by name, scene connections made, misspelt properties found."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from typing import Any

from PySide6 import QtUiTools, QtWidgets
from PySide6.QtCore import QBuffer, QByteArray, QIODevice, QObject

from . import ctk_basic, ctk_sliders, mrml_widgets
from .pythonqt import QtProperty

CUSTOM_WIDGETS: dict[str, type[QtWidgets.QWidget]] = {
    name: value
    for module in (ctk_basic, ctk_sliders, mrml_widgets)
    for name, value in vars(module).items()
    if name.startswith(("ctk", "qMRML"))
}


class QUiLoader(QtUiTools.QUiLoader):
    """``qt.QUiLoader`` that knows the ctk and qMRML widgets."""

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        for widget_class in CUSTOM_WIDGETS.values():
            self.registerCustomWidget(widget_class)

    def load(self, device: QIODevice, parent: QtWidgets.QWidget | None = None) -> Any:
        """Build the widgets of a .ui file.

        Raises:
            RuntimeError: a widget class or a property is not known, or a connection names no widget.
        """
        text = bytes(device.readAll().data()).decode("utf-8")
        tree = ElementTree.parse(io.StringIO(text))
        _check_classes(tree)
        scene_connections = _take_scene_connections(tree)
        buffer = QBuffer()
        buffer.setData(QByteArray(ElementTree.tostring(tree.getroot(), encoding="utf-8")))
        buffer.open(QIODevice.OpenModeFlag.ReadOnly)
        widget = super().load(buffer, parent)
        if widget is None:
            raise RuntimeError(f"the .ui could not be loaded: {self.errorString()}")
        _check_properties(tree, widget)
        for sender, receiver in scene_connections:
            _named(widget, sender).mrmlSceneChanged.connect(_named(widget, receiver).setMRMLScene)
        return widget


def _check_classes(tree: ElementTree.ElementTree[Any]) -> None:
    for element in tree.iter("widget"):
        name = element.get("class", "")
        if name not in CUSTOM_WIDGETS and name != "Line" and not hasattr(QtWidgets, name):
            raise RuntimeError(f"the .ui uses {name}, which Qt does not have and the stand-in does not offer")


def _take_scene_connections(tree: ElementTree.ElementTree[Any]) -> list[tuple[str, str]]:
    """Connections that carry the scene cannot be made by Qt here; take them out to make them in Python."""
    taken = []
    for connections in tree.iter("connections"):
        for connection in list(connections):
            texts = {part.tag: (part.text or "").strip() for part in connection}
            if "vtkMRMLScene*" in texts.get("signal", ""):
                taken.append((texts["sender"], texts["receiver"]))
                connections.remove(connection)
    return taken


def _check_properties(tree: ElementTree.ElementTree[Any], root: QtWidgets.QWidget) -> None:
    for element in tree.iter("widget"):
        widget = _named(root, element.get("name", ""))
        meta_object = widget.metaObject()
        for entry in element.findall("property"):
            name = entry.get("name", "")
            dynamic = entry.get("stdset") == "0"
            known = meta_object.indexOfProperty(name) >= 0 or element.get("class") == "Line"
            if not dynamic and not known:
                raise RuntimeError(f"{element.get('class')} {element.get('name')!r} has no property {name!r}")


def _named(root: QtWidgets.QWidget, name: str) -> Any:
    if QtProperty("objectName", None).__get__(root) == name:
        return root
    found = root.findChild(QObject, name)
    if found is None:
        raise RuntimeError(f"the .ui connects a widget named {name!r}, which it does not have")
    return found
