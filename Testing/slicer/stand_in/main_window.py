"""The application's main window: module selector, module panel, views, status bar."""

from __future__ import annotations

from typing import Any

import slicer
from PySide6 import QtCore, QtWidgets

from .ctk_basic import ctkCollapsibleButton
from .module_logics import ModuleManager
from .scripted_module import qSlicerScriptedLoadableModuleWidget
from .view_frames import ViewFrame, ViewGrid


class ModuleSelector(QtWidgets.QWidget):
    """The toolbar's list of modules."""

    moduleSelected = QtCore.Signal(str)

    def __init__(self, window: qSlicerMainWindow) -> None:
        super().__init__()
        self._window = window
        self._selected = ""
        self._shown = QtWidgets.QComboBox()
        self._shown.setMinimumWidth(180)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(6, 2, 6, 2)
        layout.addWidget(QtWidgets.QLabel("Modules:"))
        layout.addWidget(self._shown)

    def selectModule(self, name: str) -> None:
        self._window.select_module(name)
        self._selected = name
        module = slicer.app.moduleManager().module(name)
        self._shown.clear()
        if module is not None:
            icon = getattr(module, "icon", None)
            self._shown.addItem(icon, module.title) if icon is not None else self._shown.addItem(module.title)
        self.moduleSelected.emit(name)

    selectedModule = QtCore.Property(str, lambda self: self._selected)


class qSlicerMainWindow(QtWidgets.QMainWindow):
    """The main window; ``slicer.util.mainWindow()`` finds it by name."""

    def __init__(self, manager: ModuleManager) -> None:
        super().__init__()
        self.setObjectName("qSlicerMainWindow")
        self.setWindowTitle("3D Slicer")
        self._manager = manager
        self._current = ""
        for title in ("File", "Edit", "View", "Help"):
            self.menuBar().addMenu(title)
        self._selector = ModuleSelector(self)
        toolbar = self.addToolBar("Modules")
        toolbar.setMovable(False)
        toolbar.addWidget(self._selector)
        self._panel = QtWidgets.QScrollArea()
        self._panel.setObjectName("ModulePanel")
        self._panel.setWidgetResizable(True)
        self._panel.setFrameShape(QtWidgets.QFrame.Shape.NoFrame)
        self._panel.setHorizontalScrollBarPolicy(QtCore.Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._help = ctkCollapsibleButton("Help && Acknowledgement")
        self._help.setCollapsed(True)
        self._probe = ctkCollapsibleButton("Data Probe")
        self._probe.setCollapsed(True)
        self._views: ViewGrid | None = None
        central = QtWidgets.QWidget()
        self._row = QtWidgets.QHBoxLayout(central)
        self._row.setContentsMargins(3, 0, 3, 0)
        self._row.setSpacing(3)
        self._side = QtWidgets.QWidget()
        column = QtWidgets.QVBoxLayout(self._side)
        column.setContentsMargins(4, 4, 0, 4)
        for part, stretch in ((self._help, 0), (self._panel, 1), (self._probe, 0)):
            column.addWidget(part, stretch)
        self._row.addWidget(self._side)
        self.setCentralWidget(central)
        self.statusBar()

    def moduleSelector(self) -> ModuleSelector:
        return self._selector

    def pythonConsole(self) -> Any:
        return None

    def panel(self) -> QtWidgets.QScrollArea:
        """The scroll area that shows the module's widget."""
        return self._panel

    def select_module(self, name: str) -> None:
        """Leave the present module and enter another, calling exit() and enter() as the application does.

        Raises:
            ValueError: no such module.
        """
        module = self._manager.module(name)
        if module is None and name:
            raise ValueError(f"no module named {name!r}")
        self.leave_module()
        self._current = name
        representation = module.widgetRepresentation() if module is not None else None
        if isinstance(representation, qSlicerScriptedLoadableModuleWidget):
            self._panel.setWidget(representation)
            representation.show()
            representation.enter()

    def leave_module(self) -> None:
        """Leave the present module without entering another."""
        module = self._manager.module(self._current)
        representation = module.widgetRepresentation() if module is not None else None
        if isinstance(representation, qSlicerScriptedLoadableModuleWidget):
            representation.exit()
            # The scroll area would delete a widget that it is not asked to give back.
            self._panel.takeWidget()
            representation.setParent(None)
        self._current = ""

    def arrange(self, layout: str, size: tuple[int, int], panel_width: int) -> dict[str, ViewFrame]:
        """Give the window its size and frames for the views of a layout, and let Qt lay everything out."""
        if self._views is not None:
            self._row.removeWidget(self._views)
            self._views.deleteLater()
        self._views = ViewGrid(layout, slicer.app.layoutManager())
        self._row.addWidget(self._views, 1)
        shown = self._panel.widget()
        needed = shown.minimumSizeHint().width() + 30 if shown is not None else 0
        self._side.setFixedWidth(max(panel_width, needed))
        self.resize(*size)
        self.show()
        for _ in range(3):
            slicer.app.processEvents()
        return self._views.frames()
