"""The Advanced section, made from the library's settings: declared there once, worded for people here."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import qt
from slicer.i18n import tr as _

from .library import find_library

SHOWN_ELSEWHERE = ("axis", "uncertainty", "method")


def labels() -> dict[str, str]:
    """Names of the settings; one without a name here is shown by its own."""
    return {
        "intensity": _("Grey levels"),
        "frequency_branches": _("Frequency branches"),
        "wave": _("Wavelet"),
        "levels": _("Wavelet levels"),
        "wavelet_mode": _("Wavelet border"),
        "bottleneck": _("Saliency by"),
        "contrast": _("Ask by contrast"),
        "layer_idx": _("Saliency at block"),
        "beta": _("Weight of information"),
        "train_steps": _("Saliency steps"),
        "num_noise_samples": _("Noise samples a step"),
        "fusion": _("Fuse branches by"),
        "threshold": _("Threshold"),
        "threshold_value": _("Fixed threshold"),
        "confidence_threshold": _("Drop parts below"),
        "num_contours": _("Parts kept a slice"),
        "smallest_part": _("Smallest part kept"),
        "slice_smoothing": _("Even out over slices"),
        "gate": _("Leave slices without it empty"),
        "refine": _("Draw with the SAM model"),
        "prompt_kind": _("Drawn from"),
        "num_points": _("Points a part"),
        "negative_points": _("Points outside a slice"),
        "box_margin": _("Box margin"),
        "vote": _("Outline chosen by"),
        "replicas": _("Repeats for uncertainty"),
        "seed": _("Seed"),
        "experimental": _("Accept any prompt"),
        "batch_size": _("Slices at once"),
    }


class AdvancedForm:
    """One row a setting. :attr:`values` holds those that differ from the library's defaults."""

    def __init__(self, layout, changed: Callable[[], None]) -> None:
        """Args:
        layout: the QFormLayout to fill.
        changed: called after the user changed a value.
        """
        find_library()
        from FreqSegLib.settings import TextSegmentationSettings

        self._changed = changed
        self._editors: dict[str, _Editor] = {}
        hints = get_type_hints(TextSegmentationSettings)
        names = labels()
        for item in fields(TextSegmentationSettings):
            if item.name in SHOWN_ELSEWHERE:
                continue
            editor = _editor(hints[item.name], item.default, item.metadata)
            editor.widget.toolTip = item.metadata.get("help", "")
            editor.connect(self._edited)
            label = qt.QLabel(_("{name}:").format(name=names.get(item.name, item.name)))
            label.toolTip = item.metadata.get("help", "")
            layout.addRow(label, editor.widget)
            self._editors[item.name] = editor
        self.values = {}

    @property
    def values(self) -> dict[str, Any]:
        """Settings that differ from their defaults."""
        found = {name: editor.value for name, editor in self._editors.items()}
        return {name: value for name, value in found.items() if value != self._editors[name].default}

    @values.setter
    def values(self, values: dict[str, Any]) -> None:
        for name, editor in self._editors.items():
            editor.widget.blockSignals(True)
            editor.value = values.get(name, editor.default)
            editor.widget.blockSignals(False)

    @property
    def text(self) -> str:
        """The values, to be kept."""
        return json.dumps(self.values) if self.values else ""

    @text.setter
    def text(self, text: str) -> None:
        if text == self.text:
            return
        try:
            values = json.loads(text) if text else {}
        except ValueError:
            values = {}
        self.values = values if isinstance(values, dict) else {}

    def editor(self, name: str):
        """The widget of a setting."""
        return self._editors[name].widget

    def _edited(self, *ignored: Any) -> None:
        self._changed()


class _Editor(ABC):
    """One widget, and the value it stands for; ``value`` is read and set."""

    def __init__(self, widget, default: Any) -> None:
        self.widget, self.default = widget, default

    @abstractmethod
    def connect(self, function: Callable[..., None]) -> None:
        """Call ``function`` whenever the user changes the value."""

    @property
    @abstractmethod
    def value(self) -> Any:
        """What the widget stands for; None for automatic."""


class _Choice(_Editor):
    def __init__(self, choices: list[tuple[str, Any]], default: Any) -> None:
        super().__init__(qt.QComboBox(), default)
        self._values = [value for _title, value in choices]
        self.widget.addItems([title for title, _value in choices])

    def connect(self, function):
        self.widget.currentIndexChanged.connect(function)

    @property
    def value(self):
        return self._values[self.widget.currentIndex]

    @value.setter
    def value(self, value):
        self.widget.setCurrentIndex(self._values.index(value) if value in self._values else 0)


class _Number(_Editor):
    """Whole or not; the lowest position stands for "automatic" where the default is None."""

    def __init__(self, is_whole: bool, default: Any, least: float, most: float) -> None:
        widget = qt.QSpinBox() if is_whole else qt.QDoubleSpinBox()
        super().__init__(widget, default)
        self._optional = default is None
        step = 1 if is_whole else 0.05
        self._automatic = least - step
        if not is_whole:
            widget.setDecimals(2)
            widget.setSingleStep(step)
        widget.setRange(self._automatic if self._optional else least, most)
        if self._optional:
            widget.setSpecialValueText(_("Automatic"))

    def connect(self, function):
        self.widget.valueChanged.connect(function)

    @property
    def value(self):
        value = self.widget.value
        if self._optional and value <= self._automatic + 1e-9:
            return None
        return value if isinstance(value, int) else round(value, 4)

    @value.setter
    def value(self, value):
        self.widget.setValue(self._automatic if value is None else value)


class _Flag(_Editor):
    def __init__(self, default: bool) -> None:
        super().__init__(qt.QCheckBox(), default)

    def connect(self, function):
        self.widget.toggled.connect(function)

    @property
    def value(self):
        return bool(self.widget.checked)

    @value.setter
    def value(self, value):
        self.widget.setChecked(bool(value))


class _Text(_Editor):
    def __init__(self, default: str) -> None:
        super().__init__(qt.QLineEdit(), default)

    def connect(self, function):
        self.widget.editingFinished.connect(function)

    @property
    def value(self):
        return self.widget.text.strip() or self.default

    @value.setter
    def value(self, value):
        self.widget.setText(value)


def _editor(hint: Any, default: Any, limits: Any) -> _Editor:
    parts = [hint] if get_origin(hint) is Literal else [hint, *get_args(hint)]
    choices = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    if choices:
        automatic = [(_("Automatic"), None)] if default is None else []
        return _Choice([*automatic, *((_shown(choice), choice) for choice in choices)], default)
    if bool in parts:
        if default is None:
            return _Choice([(_("Automatic"), None), (_("yes"), True), (_("no"), False)], None)
        return _Flag(default)
    if int in parts or float in parts:
        return _Number(float not in parts, default, limits.get("least", 0), limits.get("most", 10**6))
    return _Text(default)


def _shown(choice: str) -> str:
    return _("Automatic") if choice == "auto" else choice.replace("_", " ")
