"""``slicer.app``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import slicer
from PySide6 import QtCore, QtGui, QtWidgets

from .io_manager import CoreIOManager
from .layout_manager import LayoutManager
from .module_logics import ModuleManager, Modules, build_scene
from .subject_hierarchy import keep_subject_hierarchy


class qSlicerApplication(QtWidgets.QApplication):
    """The application object: a QApplication with Slicer's managers."""

    startupCompleted = QtCore.Signal()
    mrmlSceneChanged = QtCore.Signal(object)

    applicationVersion = property(lambda self: "5.10.0-stand-in")
    majorVersion = property(lambda self: 5)
    minorVersion = property(lambda self: 10)
    mainApplicationName = property(lambda self: "Slicer")
    mainApplicationMajorVersion = property(lambda self: 5)
    mainApplicationMinorVersion = property(lambda self: 10)
    os = property(lambda self: "linux")
    arch = property(lambda self: "amd64")

    def __init__(self, folder: Path) -> None:
        super().__init__(["Slicer"])
        self._folder = folder
        for name in ("home", "temporary", "settings", "cache"):
            (folder / name).mkdir(exist_ok=True)
        _ensure_a_font()
        self.setOrganizationName("StandIn")
        self.setApplicationName("Slicer")
        ini = QtCore.QSettings.Format.IniFormat
        QtCore.QSettings.setDefaultFormat(ini)
        for scope in (QtCore.QSettings.Scope.UserScope, QtCore.QSettings.Scope.SystemScope):
            QtCore.QSettings.setPath(ini, scope, str(folder / "settings"))
        self._environment = dict(os.environ)
        self._module_manager = ModuleManager(Modules())
        self._io_manager = CoreIOManager()
        self._application_logic: Any = None
        self._layout_manager: LayoutManager | None = None

    def start_mrml(self) -> None:
        """Make the scene, the logics and the views; ``slicer.app`` and ``slicer.modules`` have to be set."""
        _, self._application_logic = build_scene(self._module_manager, self._folder / "home")
        self._application_logic.SetTemporaryPath(self.temporaryPath)
        slicer.mrmlScene.SetRootDirectory(self.temporaryPath)
        keep_subject_hierarchy(slicer.mrmlScene)
        self._layout_manager = LayoutManager(slicer.mrmlScene, self._application_logic)

    temporaryPath = property(lambda self: str(self._folder / "temporary"))
    slicerHome = property(lambda self: str(self._folder / "home"))
    cachePath = property(lambda self: str(self._folder / "cache"))
    slicerUserSettingsFilePath = property(lambda self: str(self._folder / "settings" / "Slicer.ini"))
    defaultScenePath = property(lambda self: str(self._folder / "temporary"))

    def modules(self) -> Modules:
        return self._module_manager._modules

    def moduleManager(self) -> ModuleManager:
        return self._module_manager

    def applicationLogic(self) -> Any:
        return self._application_logic

    def layoutManager(self) -> LayoutManager | None:
        return self._layout_manager

    def coreIOManager(self) -> CoreIOManager:
        return self._io_manager

    def ioManager(self) -> CoreIOManager:
        return self._io_manager

    def mrmlScene(self) -> Any:
        return slicer.mrmlScene

    def settings(self) -> QtCore.QSettings:
        return QtCore.QSettings()

    userSettings = settings
    revisionUserSettings = settings

    def testingEnabled(self) -> bool:
        return False

    def isInstalled(self) -> bool:
        return True

    def startupEnvironment(self) -> Any:
        environment = QtCore.QProcessEnvironment()
        for name, value in self._environment.items():
            environment.insert(name, value)
        return environment

    def pauseRender(self) -> None:
        self._application_logic.PauseRender()

    def resumeRender(self) -> None:
        self._application_logic.ResumeRender()

    def setRenderPaused(self, paused: bool) -> None:
        self.pauseRender() if paused else self.resumeRender()

    def pythonConsole(self) -> Any:
        return None

    def restart(self) -> None:
        raise RuntimeError("the module asked the application to restart")


def _ensure_a_font() -> None:
    # Without a system font, Qt draws boxes; matplotlib always brings DejaVu Sans.
    if QtGui.QFontDatabase.families():
        return
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"):
        QtGui.QFontDatabase.addApplicationFont(str(fonts / name))
    QtWidgets.QApplication.setFont(QtGui.QFont("DejaVu Sans", 9))
