"""Combo boxes whose entries stand for values: what is shown is translated, what is kept is not."""

from __future__ import annotations

from collections.abc import Sequence


class Choices:
    """Remembers the values behind the entries of any number of combo boxes."""

    def __init__(self) -> None:
        self._values: dict[str, list[str]] = {}

    def fill(self, combo, choices: Sequence[tuple[str, str]]) -> None:
        """Replace a combo box's entries by these titles and values; nothing is signalled."""
        combo.blockSignals(True)
        combo.clear()
        combo.addItems([title for title, _value in choices])
        combo.blockSignals(False)
        self._values[combo.objectName] = [value for _title, value in choices]

    def chosen(self, combo) -> str:
        """The value of the entry that is shown; empty where there is none."""
        values = self._values[combo.objectName]
        return values[combo.currentIndex] if 0 <= combo.currentIndex < len(values) else ""

    def choose(self, combo, value: str) -> None:
        """Show the entry of a value; one that is not there changes nothing."""
        values = self._values[combo.objectName]
        if value in values and combo.currentIndex != values.index(value):
            combo.setCurrentIndex(values.index(value))
