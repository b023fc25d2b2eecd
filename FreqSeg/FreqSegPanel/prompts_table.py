"""The table of prompts: what to look for, what the preset knows it as, and the segment's colour."""

from __future__ import annotations

import json
from collections.abc import Callable

import qt
from slicer.i18n import tr as _

from . import terminology
from .session import Prompt
from .vocabulary import KnownTarget, known_as

LOOK_FOR, KNOWN_AS, COLOR = range(3)
FIRST_PROMPT = "brain tumour"


class PromptsTable:
    """Rows as text in and out (:attr:`text`), so that they are kept with the scene."""

    def __init__(self, table, changed: Callable[[], None]) -> None:
        """Args:
        table: an empty QTableWidget.
        changed: called after the user changed a row.
        """
        self._table, self._changed = table, changed
        self._targets: list[KnownTarget] = []
        self._open = True
        self._combos: list = []
        self._buttons: list = []
        self._colors: list[str | None] = []
        table.setColumnCount(3)
        table.setHorizontalHeaderLabels([_("Look for"), _("Known as"), _("Colour")])
        table.verticalHeader().setVisible(False)
        table.verticalHeader().setDefaultSectionSize(28)
        table.setShowGrid(False)
        table.setWordWrap(False)
        header = table.horizontalHeader()
        header.setSectionResizeMode(LOOK_FOR, qt.QHeaderView.Stretch)
        header.setSectionResizeMode(KNOWN_AS, qt.QHeaderView.Stretch)
        header.setSectionResizeMode(COLOR, qt.QHeaderView.Fixed)
        table.setColumnWidth(COLOR, 58)

    def set_targets(self, targets: list[KnownTarget], is_open: bool) -> None:
        """What the preset knows; ``is_open`` if it takes other prompts too."""
        self._targets, self._open = targets, is_open
        for combo in self._combos:
            text = combo.currentText
            combo.blockSignals(True)
            combo.clear()
            combo.addItems([target.name for target in targets])
            combo.setEditText(text)
            combo.blockSignals(False)
        self._describe()

    @property
    def prompts(self) -> list[Prompt]:
        """Rows that are not empty."""
        found = []
        for combo, color in zip(self._combos, self._colors, strict=True):
            text = " ".join(combo.currentText.split())
            if text:
                found.append(Prompt(text, _rgb(color) if color else None))
        return found

    @property
    def text(self) -> str:
        """All rows, to be kept."""
        rows = [
            {"prompt": combo.currentText, "color": color}
            for combo, color in zip(self._combos, self._colors, strict=True)
        ]
        return json.dumps(rows)

    @text.setter
    def text(self, text: str) -> None:
        if text == self.text:
            return
        try:
            rows = [(str(row["prompt"]), row.get("color")) for row in json.loads(text)]
        except (ValueError, KeyError, TypeError, AttributeError):
            rows = []
        self._table.setRowCount(0)
        self._combos, self._buttons, self._colors = [], [], []
        for prompt, color in rows or [("", None)]:
            self._append(prompt, color)
        self._describe()

    def add(self) -> None:
        """One more row, ready to type in."""
        self._append("", None)
        self._describe()
        self._combos[-1].setFocus()
        self._changed()

    def remove(self) -> None:
        """The chosen row, or the last; one always stays."""
        row = self._table.currentRow()
        if row < 0:
            row = len(self._combos) - 1
        if len(self._combos) == 1:
            self._combos[0].setEditText("")
            return
        self._table.removeRow(row)
        for rows in (self._combos, self._buttons, self._colors):
            del rows[row]
        self._describe()
        self._changed()

    def _append(self, prompt: str, color: str | None) -> None:
        row = len(self._combos)
        self._table.insertRow(row)
        combo = qt.QComboBox()
        combo.setEditable(True)
        combo.setInsertPolicy(qt.QComboBox.NoInsert)
        combo.addItems([target.name for target in self._targets])
        combo.setEditText(prompt)
        combo.lineEdit().setPlaceholderText(_("for example {prompt}").format(prompt=FIRST_PROMPT))
        combo.toolTip = _("Choose something the preset knows, or type.")
        combo.editTextChanged.connect(self._edited)
        self._table.setCellWidget(row, LOOK_FOR, combo)
        known = qt.QTableWidgetItem("")
        known.setFlags(qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable)
        self._table.setItem(row, KNOWN_AS, known)
        button = qt.QPushButton()
        button.toolTip = _("Colour of the segment")
        button.clicked.connect(lambda *ignored: self._choose_color(self._buttons.index(button)))
        self._table.setCellWidget(row, COLOR, button)
        self._combos.append(combo)
        self._buttons.append(button)
        self._colors.append(color)

    def _edited(self, *ignored) -> None:
        self._describe()
        self._changed()

    def _choose_color(self, row: int) -> None:
        chosen = qt.QColorDialog.getColor(qt.QColor(self._shown_color(row)), self._table)
        if chosen.isValid():
            self._colors[row] = chosen.name()
            self._describe()
            self._changed()

    def _shown_color(self, row: int) -> str:
        chosen = self._colors[row]
        if chosen:
            return chosen
        target = known_as(self._combos[row].currentText, self._targets)
        rgb = terminology.entry_and_color(self._combos[row].currentText)[1] or (target.color if target else None)
        return "#{:02x}{:02x}{:02x}".format(*(round(255 * value) for value in rgb)) if rgb else "#a0a0a0"

    def _describe(self) -> None:
        for row, combo in enumerate(self._combos):
            text = " ".join(combo.currentText.split())
            target = known_as(text, self._targets)
            if not text:
                sentence = ""
            elif target is not None:
                sentence = target.name if text.lower() != target.name else target.modality_name
            else:
                sentence = _("any prompt") if self._open else _("not one of its words")
            item = self._table.item(row, KNOWN_AS)
            item.setText(sentence)
            item.setToolTip(
                _("Understood as {target}, learned on {modality}").format(
                    target=target.name, modality=target.modality_name
                )
                if target is not None
                else sentence
            )
            style = "background-color: {color}; border: 1px solid #808080; border-radius: 3px; margin: 5px 12px;"
            self._buttons[row].setStyleSheet(style.format(color=self._shown_color(row)))


def _rgb(color: str) -> tuple[float, float, float]:
    return tuple(int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
