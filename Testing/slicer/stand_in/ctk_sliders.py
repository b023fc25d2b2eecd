"""The Common Toolkit's sliders and spin boxes on floating point values."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import Property, QSignalBlocker, Qt, Signal
from PySide6.QtWidgets import QDoubleSpinBox, QHBoxLayout, QSlider, QWidget

from .stored_property import stored

_TICKS = 10000


class ctkDoubleSpinBox(QDoubleSpinBox):
    """A double spin box."""

    decimalsOption, setDecimalsOption = stored(int, "decimalsOption", 0)


class ctkDoubleSlider(QWidget):
    """A slider on floating point values."""

    valueChanged = Signal(float)
    sliderMoved = Signal(float)

    minimum, setMinimum = stored(float, "minimum", 0.0, "_refresh")
    maximum, setMaximum = stored(float, "maximum", 100.0, "_refresh")
    singleStep, setSingleStep = stored(float, "singleStep", 1.0)
    pageStep, setPageStep = stored(float, "pageStep", 10.0)
    tickInterval, setTickInterval = stored(float, "tickInterval", 0.0)
    tracking, setTracking = stored(bool, "tracking", True)
    orientation, setOrientation = stored(int, "orientation", 1)

    def __init__(self, orientation: Any = None, parent: QWidget | None = None) -> None:
        super().__init__(orientation if isinstance(orientation, QWidget) else parent)
        self._value = 0.0
        self._slider = QSlider(Qt.Orientation.Horizontal, self)
        self._slider.setRange(0, _TICKS)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._slider)
        self._slider.valueChanged.connect(self._moved)

    def setRange(self, minimum: float, maximum: float) -> None:
        self.setMinimum(minimum)
        self.setMaximum(maximum)

    def setValue(self, value: float) -> None:
        value = min(max(float(value), self.minimum), self.maximum)
        if value != self._value:
            self._value = value
            self._refresh()
            self.valueChanged.emit(value)

    value = Property(float, lambda self: self._value, setValue)

    def _moved(self, tick: int) -> None:
        value = self.minimum + (self.maximum - self.minimum) * tick / _TICKS
        self.sliderMoved.emit(value)
        self.setValue(value)

    def _refresh(self) -> None:
        span = self.maximum - self.minimum
        with QSignalBlocker(self._slider):
            self._slider.setValue(round(_TICKS * (self._value - self.minimum) / span) if span > 0 else 0)
        if not self.minimum <= self._value <= self.maximum:
            self.setValue(self._value)


class ctkSliderWidget(QWidget):
    """A slider and a spin box on one value."""

    valueChanged = Signal(float)
    valueIsChanging = Signal(float)

    tracking, setTracking = stored(bool, "tracking", True)
    tickInterval, setTickInterval = stored(float, "tickInterval", 0.0)
    tickPosition, setTickPosition = stored(int, "tickPosition", 0)
    pageStep, setPageStep = stored(float, "pageStep", 10.0)
    popupSlider, setPopupSlider = stored(bool, "popupSlider", False)
    invertedAppearance, setInvertedAppearance = stored(bool, "invertedAppearance", False)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._slider = ctkDoubleSlider(parent=self)
        self._box = ctkDoubleSpinBox(self)
        self._box.setRange(0.0, 100.0)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._slider, 1)
        layout.addWidget(self._box)
        self._slider.sliderMoved.connect(self._box.setValue)
        self._box.valueChanged.connect(self._box_changed)

    def _box_changed(self, value: float) -> None:
        self._slider.setValue(value)
        self.valueIsChanging.emit(value)
        self.valueChanged.emit(value)

    def setMinimum(self, minimum: float) -> None:
        self._slider.setMinimum(minimum)
        self._box.setMinimum(minimum)

    def setMaximum(self, maximum: float) -> None:
        self._slider.setMaximum(maximum)
        self._box.setMaximum(maximum)

    def setRange(self, minimum: float, maximum: float) -> None:
        self.setMinimum(minimum)
        self.setMaximum(maximum)

    def setValue(self, value: float) -> None:
        self._box.setValue(value)

    def setDecimals(self, decimals: int) -> None:
        self._box.setDecimals(decimals)

    def setSingleStep(self, step: float) -> None:
        self._box.setSingleStep(step)
        self._slider.setSingleStep(step)

    def setPrefix(self, prefix: str) -> None:
        self._box.setPrefix(prefix)

    def setSuffix(self, suffix: str) -> None:
        self._box.setSuffix(suffix)

    def setSpinBoxVisible(self, visible: bool) -> None:
        self._box.setVisible(visible)

    def reset(self) -> None:
        self.setValue(self._box.minimum)

    minimum = Property(float, lambda self: self._box.minimum, setMinimum)
    maximum = Property(float, lambda self: self._box.maximum, setMaximum)
    value = Property(float, lambda self: self._box.value, setValue)
    decimals = Property(int, lambda self: self._box.decimals, setDecimals)
    singleStep = Property(float, lambda self: self._box.singleStep, setSingleStep)
    prefix = Property(str, lambda self: self._box.prefix, setPrefix)
    suffix = Property(str, lambda self: self._box.suffix, setSuffix)
    spinBoxVisible = Property(bool, lambda self: not self._box.isHidden(), setSpinBoxVisible)


class ctkRangeWidget(QWidget):
    """A lower and an upper value."""

    valuesChanged = Signal(float, float)
    minimumValueChanged = Signal(float)
    maximumValueChanged = Signal(float)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._lower, self._upper = ctkDoubleSpinBox(self), ctkDoubleSpinBox(self)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._lower)
        layout.addWidget(self._upper)
        self._lower.valueChanged.connect(self._lower_changed)
        self._upper.valueChanged.connect(self._upper_changed)

    def _lower_changed(self, value: float) -> None:
        self._upper.setValue(max(value, self._upper.value))
        self.minimumValueChanged.emit(value)
        self.valuesChanged.emit(value, self._upper.value)

    def _upper_changed(self, value: float) -> None:
        self._lower.setValue(min(value, self._lower.value))
        self.maximumValueChanged.emit(value)
        self.valuesChanged.emit(self._lower.value, value)

    def setRange(self, minimum: float, maximum: float) -> None:
        for box in (self._lower, self._upper):
            box.setRange(minimum, maximum)

    def setValues(self, lower: float, upper: float) -> None:
        self._upper.setValue(upper)
        self._lower.setValue(lower)

    def setDecimals(self, decimals: int) -> None:
        for box in (self._lower, self._upper):
            box.setDecimals(decimals)

    def setSingleStep(self, step: float) -> None:
        for box in (self._lower, self._upper):
            box.setSingleStep(step)

    minimum = Property(float, lambda self: self._lower.minimum, lambda self, v: self.setRange(v, self.maximum))
    maximum = Property(float, lambda self: self._lower.maximum, lambda self, v: self.setRange(self.minimum, v))
    minimumValue = Property(float, lambda self: self._lower.value, lambda self, v: self._lower.setValue(v))
    maximumValue = Property(float, lambda self: self._upper.value, lambda self, v: self._upper.setValue(v))
    decimals = Property(int, lambda self: self._lower.decimals, setDecimals)
    singleStep = Property(float, lambda self: self._lower.singleStep, setSingleStep)


class ctkDoubleRangeSlider(ctkRangeWidget):
    """A range; here drawn as two spin boxes."""
