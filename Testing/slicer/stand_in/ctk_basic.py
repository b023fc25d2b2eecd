"""The Common Toolkit's plain widgets: sections, paths, colours, combo boxes, message boxes."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import Property, QEvent, QRect, QSize, Qt, Signal
from PySide6.QtGui import QColor, QIcon, QMouseEvent, QPainter, QPaintEvent, QPixmap
from PySide6.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QLineEdit,
    QMenu,
    QMessageBox,
    QPushButton,
    QSizePolicy,
    QStyle,
    QStyleOptionButton,
    QTextBrowser,
    QToolButton,
    QWidget,
)

from .stored_property import stored


class ctkCollapsibleButton(QWidget):
    """A section with a clickable header; the contents are laid out below it."""

    toggled = Signal(bool)
    clicked = Signal(bool)
    pressed = Signal()
    contentsCollapsed = Signal(bool)

    text, setText = stored(str, "text", "", "update")
    collapsedHeight, setCollapsedHeight = stored(int, "collapsedHeight", 10)
    contentsFrameShape, setContentsFrameShape = stored(int, "contentsFrameShape", 0, "update")
    contentsFrameShadow, setContentsFrameShadow = stored(int, "contentsFrameShadow", 0, "update")
    contentsLineWidth, setContentsLineWidth = stored(int, "contentsLineWidth", 1, "update")
    buttonTextAlignment, setButtonTextAlignment = stored(int, "buttonTextAlignment", 1, "update")
    indicatorAlignment, setIndicatorAlignment = stored(int, "indicatorAlignment", 1, "update")
    flat, setFlat = stored(bool, "flat", False, "update")
    checkable, setCheckable = stored(bool, "checkable", True)

    def __init__(self, text: Any = "", parent: QWidget | None = None) -> None:
        if isinstance(text, QWidget):
            text, parent = "", text
        super().__init__(parent)
        self._is_collapsed = False
        self._hidden_by_collapse: list[QWidget] = []
        self.setText(text or "")
        self.setContentsMargins(0, self._header_height(), 0, 0)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Preferred)

    def _get_collapsed(self) -> bool:
        return self._is_collapsed

    def setCollapsed(self, collapsed: bool) -> None:
        if collapsed == self._is_collapsed:
            return
        self._is_collapsed = collapsed
        if collapsed:
            for child in self.children():
                self._hide_child(child)
        else:
            for widget in self._hidden_by_collapse:
                widget.show()
            self._hidden_by_collapse = []
        self.setMaximumHeight(self._header_height() if collapsed else 16777215)
        self.updateGeometry()
        self.update()
        self.contentsCollapsed.emit(collapsed)
        self.toggled.emit(not collapsed)

    collapsed = Property(bool, _get_collapsed, setCollapsed)
    checked = Property(bool, lambda self: not self._is_collapsed, lambda self, checked: self.setCollapsed(not checked))

    def setChecked(self, checked: bool) -> None:
        self.setCollapsed(not checked)

    def toggle(self) -> None:
        self.setCollapsed(not self._is_collapsed)

    def click(self) -> None:
        """What a click on the header does."""
        self.pressed.emit()
        self.toggle()
        self.clicked.emit(not self._is_collapsed)

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        if event.position().y() < self._header_height():
            self.click()

    def event(self, event: QEvent) -> bool:
        # A child is complete only when it is polished; in ChildAdded its constructor is still running.
        if event.type() == QEvent.Type.ChildPolished and self._is_collapsed:
            self._hide_child(event.child())
        return super().event(event)

    def _hide_child(self, child: Any) -> None:
        if isinstance(child, QWidget) and not child.isHidden():
            self._hidden_by_collapse.append(child)
            child.hide()

    def _header_height(self) -> int:
        return self.fontMetrics().height() + 10

    def minimumSizeHint(self) -> QSize:
        hint = super().minimumSizeHint()
        if self._is_collapsed:
            hint.setHeight(self._header_height())
        return QSize(max(hint.width(), self.fontMetrics().horizontalAdvance(self.text) + 40), hint.height())

    def sizeHint(self) -> QSize:
        hint = super().sizeHint().expandedTo(self.minimumSizeHint())
        if self._is_collapsed:
            hint.setHeight(self._header_height())
        return hint

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        height = self._header_height()
        header = QRect(0, 0, self.width, height)
        option = QStyleOptionButton()
        option.initFrom(self)
        option.rect = header
        option.state |= QStyle.StateFlag.State_Raised
        style = self.style()
        style.drawControl(QStyle.ControlElement.CE_PushButtonBevel, option, painter, self)
        option.rect = QRect(8, (height - 10) // 2, 10, 10)
        arrow = QStyle.PrimitiveElement.PE_IndicatorArrowRight
        if not self._is_collapsed:
            arrow = QStyle.PrimitiveElement.PE_IndicatorArrowDown
        style.drawPrimitive(arrow, option, painter, self)
        flags = int(Qt.AlignmentFlag.AlignVCenter) | int(Qt.TextFlag.TextShowMnemonic)
        painter.drawText(header.adjusted(26, 0, -6, 0), flags, self.text)


class ctkCollapsibleGroupBox(ctkCollapsibleButton):
    """A titled section; here drawn as a collapsible button."""

    title = Property(str, lambda self: self.text, lambda self, title: self.setText(title))

    def setTitle(self, title: str) -> None:
        self.setText(title)


class ctkPathLineEdit(QWidget):
    """A path with a browse button."""

    currentPathChanged = Signal(str)
    validInputChanged = Signal(bool)

    filters, setFilters = stored(int, "filters", 0)
    nameFilters, setNameFilters = stored("QStringList", "nameFilters", [])
    settingKey, setSettingKey = stored(str, "settingKey", "")
    label, setLabel = stored(str, "label", "")
    showBrowseButton, setShowBrowseButton = stored(bool, "showBrowseButton", True, "_refresh")
    showHistoryButton, setShowHistoryButton = stored(bool, "showHistoryButton", True)
    sizeAdjustPolicy, setSizeAdjustPolicy = stored(int, "sizeAdjustPolicy", 0)
    Files, Dirs, Drives, Executable, Writable, Readable, Hidden = 0x2, 0x1, 0x4, 0x40, 0x20, 0x10, 0x100

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._edit = QLineEdit(self)
        self._browse = QToolButton(self)
        self._browse.setText("…")
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._edit)
        layout.addWidget(self._browse)
        self._edit.textChanged.connect(self.currentPathChanged)
        self._browse.clicked.connect(self.browse)

    def setCurrentPath(self, path: str) -> None:
        self._edit.setText(path)

    currentPath = Property(str, lambda self: self._edit.text, setCurrentPath)

    def browse(self) -> None:
        folder = bool(self.filters & self.Dirs)
        path = QFileDialog.getExistingDirectory(self) if folder else QFileDialog.getOpenFileName(self)[0]
        if path:
            self.setCurrentPath(path)

    def addCurrentPathToHistory(self) -> None:
        """The history is not kept here."""

    def _refresh(self) -> None:
        self._browse.setVisible(self.showBrowseButton)


class ctkDirectoryButton(QPushButton):
    """A button that shows a folder and asks for another one."""

    directoryChanged = Signal(str)
    directorySelected = Signal(str)

    caption, setCaption = stored(str, "caption", "")
    displayAbsolutePath, setDisplayAbsolutePath = stored(bool, "displayAbsolutePath", True)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._directory = ""
        self.clicked.connect(self.browse)

    def setDirectory(self, directory: str) -> None:
        if directory != self._directory:
            self._directory = directory
            self.setText(directory)
            self.directoryChanged.emit(directory)

    directory = Property(str, lambda self: self._directory, setDirectory)

    def browse(self) -> None:
        folder = QFileDialog.getExistingDirectory(self, self.caption, self._directory)
        if folder:
            self.setDirectory(folder)
            self.directorySelected.emit(folder)


class ctkColorPickerButton(QPushButton):
    """A button that shows a colour."""

    colorChanged = Signal(QColor)

    displayColorName, setDisplayColorName = stored(bool, "displayColorName", True, "_refresh")
    dialogOptions, setDialogOptions = stored(int, "dialogOptions", 0)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._color = QColor("black")
        self._refresh()

    def setColor(self, color: QColor) -> None:
        if color != self._color:
            self._color = QColor(color)
            self._refresh()
            self.colorChanged.emit(self._color)

    color = Property(QColor, lambda self: self._color, setColor)

    def _refresh(self) -> None:
        swatch = QPixmap(14, 14)
        swatch.fill(self._color)
        self.setIcon(QIcon(swatch))
        self.setText(self._color.name() if self.displayColorName else "")


class ctkComboBox(QComboBox):
    """A combo box with a text for "nothing chosen"."""

    defaultText, setDefaultText = stored(str, "defaultText", "")
    scrollWheelEnabled, setScrollWheelEnabled = stored(bool, "scrollWheelEnabled", True)


class ctkCheckableComboBox(ctkComboBox):
    """A combo box whose items can be ticked."""

    checkedIndexesChanged = Signal()


class ctkCheckBox(QCheckBox):
    """A check box that may have an icon for its indicator."""


class ctkMenuButton(QPushButton):
    """A push button with a menu beside it."""

    def __init__(self, text: Any = "", parent: QWidget | None = None) -> None:
        super().__init__(text, parent) if isinstance(text, str) else super().__init__(text)
        self.setMenu(QMenu(self))


class ctkSearchBox(QLineEdit):
    """A line edit that filters something."""

    showSearchIcon, setShowSearchIcon = stored(bool, "showSearchIcon", True)


class ctkFittedTextBrowser(QTextBrowser):
    """A text browser as high as its text."""

    def setCollapsibleText(self, text: str) -> None:
        self.setHtml(text)


class ctkMessageBox(QMessageBox):
    """A message box with "don't show this again"."""

    dontShowAgainVisible, setDontShowAgainVisible = stored(bool, "dontShowAgainVisible", False)
    dontShowAgain, setDontShowAgain = stored(bool, "dontShowAgain", False)
    dontShowAgainSettingsKey, setDontShowAgainSettingsKey = stored(str, "dontShowAgainSettingsKey", "")
