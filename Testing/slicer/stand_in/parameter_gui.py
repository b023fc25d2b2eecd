"""Two-way binding of widgets and parameters, for the pairs that Slicer's developer guide lists."""

from __future__ import annotations

import enum
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import shiboken6
import vtk
from PySide6 import QtWidgets
from PySide6.QtCore import QSignalBlocker

from . import ctk_basic, ctk_sliders, mrml_widgets
from .parameter_types import Choice, Decimals, Maximum, Minimum, SingleStep, ValueType, WithinRange

_PROPERTY = "SlicerParameterName"


@dataclass(frozen=True)
class Binding:
    """How one kind of widget shows one kind of value."""

    signal: str
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]


def widgets_with_parameter(gui: Any) -> dict[str, Any]:
    """Parameter name -> widget, from a widget or the object that childWidgetVariables gives."""
    return {name: widget for widget in _widgets(gui) if (name := widget.property(_PROPERTY))}


def _widgets(gui: Any) -> Iterator[Any]:
    if isinstance(gui, QtWidgets.QWidget):
        yield gui
        yield from gui.findChildren(QtWidgets.QWidget)
    else:
        yield from (value for value in vars(gui).values() if isinstance(value, QtWidgets.QWidget))


# A node in the scene outlives its Python object. Were the connection collected with that object, the observer that VTK
# still holds would call into an emptied one.
_connected: list[GuiConnection] = []


class GuiConnection:
    """The bindings that one connectGui made."""

    def __init__(self, wrapper: Any, mapping: dict[str, Any]) -> None:
        self.wrapper = wrapper
        self.bound: list[tuple[str, Any, Binding, Callable[..., None]]] = []
        self._updating = False
        for name, widget in mapping.items():
            kind = wrapper.allParameters[name]
            _apply_annotations(widget, kind)
            binding = binding_for(widget, kind)
            react = self._reaction(name, widget, binding)
            binding.write(widget, wrapper.getValue(name))
            if binding.signal:
                getattr(widget, binding.signal).connect(react)
            self.bound.append((name, widget, binding, react))
        self._tag = wrapper.AddObserver(vtk.vtkCommand.ModifiedEvent, self._node_modified)
        _connected.append(self)

    def disconnect(self) -> None:
        self.wrapper.RemoveObserver(self._tag)
        if self in _connected:
            _connected.remove(self)
        for _name, widget, binding, react in self.bound:
            if binding.signal and shiboken6.isValid(widget):
                getattr(widget, binding.signal).disconnect(react)

    def _reaction(self, name: str, widget: Any, binding: Binding) -> Callable[..., None]:
        def react(*_: Any) -> None:
            if not self._updating:
                self.wrapper.setValue(name, binding.read(widget))

        return react

    def _node_modified(self, *_: Any) -> None:
        if self._updating:
            return
        self._updating = True
        try:
            for name, widget, binding, _react in self.bound:
                if not shiboken6.isValid(widget):
                    continue
                value = self.wrapper.getValue(name)
                if not binding.signal or binding.read(widget) != value:
                    binding.write(widget, value)
        finally:
            self._updating = False


def binding_for(widget: Any, kind: ValueType) -> Binding:
    """The binding of a widget and a type.

    Raises:
        ValueError: Slicer has no connector for this pair.
    """
    choices = next((item.choices for item in kind.annotations if isinstance(item, Choice)), None)
    origin = kind.origin
    if isinstance(widget, QtWidgets.QComboBox) and (choices is not None or origin is enum.Enum):
        return _choice_binding(widget, kind, choices)
    if origin is bool and isinstance(widget, QtWidgets.QCheckBox):
        return Binding("toggled", lambda w: w.checked, lambda w, value: w.setChecked(value))
    if origin is bool and isinstance(widget, QtWidgets.QPushButton):
        if not widget.checkable:
            raise ValueError(f"push button {widget.objectName!r} must be checkable to be bound to a bool")
        return Binding("toggled", lambda w: w.checked, lambda w, value: w.setChecked(value))
    if origin is int and isinstance(widget, QtWidgets.QSlider | QtWidgets.QSpinBox):
        return Binding("valueChanged", lambda w: w.value, lambda w, value: w.setValue(value))
    sliders = QtWidgets.QDoubleSpinBox | ctk_sliders.ctkSliderWidget | ctk_sliders.ctkDoubleSlider
    if origin is float and isinstance(widget, sliders):
        return Binding("valueChanged", lambda w: w.value, lambda w, value: w.setValue(value))
    if origin is str and isinstance(widget, QtWidgets.QLineEdit):
        return Binding("textChanged", lambda w: w.text, lambda w, value: w.setText(value))
    if origin is str and isinstance(widget, QtWidgets.QTextEdit | QtWidgets.QPlainTextEdit):
        return Binding("textChanged", lambda w: w.toPlainText(), lambda w, value: w.setPlainText(value))
    if origin is str and isinstance(widget, QtWidgets.QLabel):
        return Binding("", lambda w: w.text, lambda w, value: w.setText(value))
    if origin is pathlib.PurePath and isinstance(widget, ctk_basic.ctkPathLineEdit):
        make = kind.declared
        return Binding("currentPathChanged", lambda w: make(w.currentPath), lambda w, v: w.setCurrentPath(str(v)))
    if origin is pathlib.PurePath and isinstance(widget, ctk_basic.ctkDirectoryButton):
        make = kind.declared
        return Binding("directoryChanged", lambda w: make(w.directory), lambda w, v: w.setDirectory(str(v)))
    if origin == "node" and isinstance(widget, mrml_widgets.qMRMLNodeComboBox):
        return Binding("currentNodeChanged", lambda w: w.currentNode(), lambda w, value: w.setCurrentNode(value))
    raise ValueError(f"no connector from {type(widget).__name__} {widget.objectName!r} to a parameter {kind.declared}")


def _choice_binding(widget: Any, kind: ValueType, choices: list[Any] | None) -> Binding:
    values = list(choices) if choices is not None else list(kind.declared)
    with QSignalBlocker(widget):
        widget.clear()
        for value in values:
            label = getattr(value, "label", None)
            widget.addItem(label() if callable(label) else value.name if isinstance(value, enum.Enum) else str(value))
    return Binding(
        "currentIndexChanged",
        lambda w: values[w.currentIndex] if 0 <= w.currentIndex < len(values) else None,
        lambda w, value: w.setCurrentIndex(values.index(value) if value in values else -1),
    )


def _apply_annotations(widget: Any, kind: ValueType) -> None:
    for item in kind.annotations:
        if isinstance(item, WithinRange | Minimum) and hasattr(widget, "setMinimum"):
            widget.setMinimum(item.minimum)
        if isinstance(item, WithinRange | Maximum) and hasattr(widget, "setMaximum"):
            widget.setMaximum(item.maximum)
        if isinstance(item, Decimals) and hasattr(widget, "setDecimals"):
            widget.setDecimals(item.value)
        if isinstance(item, SingleStep) and hasattr(widget, "setSingleStep"):
            widget.setSingleStep(item.value)
