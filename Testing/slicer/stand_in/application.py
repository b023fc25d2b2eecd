"""The test's handle on the stand-in application."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .message_boxes import Messages
    from .packages import Packages


class Heartbeat:
    """A 5 ms timer's view of the event loop: ``worst_gap`` is the longest time it was kept waiting, in seconds."""

    interval = 0.005

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self._last = time.perf_counter()

    def beat(self) -> None:
        now = time.perf_counter()
        self.gaps.append(now - self._last)
        self._last = now

    @property
    def worst_gap(self) -> float:
        return max(self.gaps, default=0.0)


class Application:
    """One Slicer-like application; there is one a process."""

    _instance: Application | None = None

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="slicer-stand-in-")
        # Both are read when the libraries are loaded.
        os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
        os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")
        _keep_none()
        self._install()

    @classmethod
    def start(cls) -> Application:
        """The application of this process; started at the first call."""
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def _install(self) -> None:
        from .pythonqt import build_qt_module

        qt = build_qt_module()
        import slicer
        import slicer.util

        from . import ctk_module, parameter_node, sample_data, scripted_module, translation, ui_loader
        from .main_window import qSlicerMainWindow
        from .message_boxes import Messages
        from .module_logics import CoreModule
        from .packages import Packages
        from .segment_editor import SegmentEditorPanel
        from .slicer_application import qSlicerApplication

        self.messages: Messages = Messages()
        self.messages.take_over()
        self.packages: Packages = Packages()
        qt.QUiLoader = ui_loader.QUiLoader
        sys.modules["qt"] = qt
        sys.modules["ctk"] = ctk_module.build_ctk_module()
        self.exceptions: list[BaseException] = []
        self.qt_warnings: list[str] = []
        qt.qInstallMessageHandler(self._record_qt_message)
        sys.excepthook = self._record_exception
        self._slicer: Any = slicer
        self.slicer_application = qSlicerApplication(Path(self._folder.name))
        qt.QSettings().setValue("General/LongPathConversionEnabled", False)

        for name, module in (
            ("ScriptedLoadableModule", scripted_module),
            ("parameterNodeWrapper", parameter_node.build_module()),
            ("i18n", translation.build_module()),
            ("packaging", self.packages.build_module()),
        ):
            setattr(slicer, name, module)
            sys.modules[f"slicer.{name}"] = module
        sys.modules["SampleData"] = sample_data.build_module()
        for name, widget in ui_loader.CUSTOM_WIDGETS.items():
            if name.startswith("qMRML"):
                setattr(slicer, name, widget)
        self._slicer.qSlicerScriptedLoadableModule = scripted_module.qSlicerScriptedLoadableModule
        self._slicer.qSlicerScriptedLoadableModuleWidget = scripted_module.qSlicerScriptedLoadableModuleWidget
        self._slicer.app = self.slicer_application
        self._slicer.modules = self.slicer_application.modules()
        self.slicer_application.start_mrml()
        self.manager = self.slicer_application.moduleManager()
        editor = SegmentEditorPanel()
        self.manager.add(CoreModule("SegmentEditor", None, editor))
        self._slicer.modules.SegmentEditorWidget = editor
        self.main_window = qSlicerMainWindow(self.manager)

    def _record_exception(self, kind: type[BaseException], exception: BaseException, trace: Any) -> None:
        # What slots and observers raise ends here; Slicer prints it into its Python console.
        self.exceptions.append(exception)
        sys.__excepthook__(kind, exception, trace)

    def _record_qt_message(self, kind: Any, context: Any, text: str) -> None:
        if "propagateSizeHints" not in text:  # the offscreen platform says it for every window
            self.qt_warnings.append(text)
            print(f"Qt: {text}", file=sys.stderr)

    # Modules

    def load_module(self, path: str | Path, enter: bool = True) -> Any:
        """Load a scripted module from its file as the application does at its start, and open it.

        Args:
            path: the module's ``.py`` file; its class has the file's name.
            enter: also switch to the module, so that its panel is made and ``enter()`` called.

        Returns:
            The module's Python widget object (with ``.ui``, ``.logic``, ...), or None when not entered.
        """
        from .scripted_module import qSlicerScriptedLoadableModule

        path = Path(path).resolve()
        name = path.stem
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        record = qSlicerScriptedLoadableModule(name, str(path))
        self.manager.add(record)
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {path}")
        code = importlib.util.module_from_spec(spec)
        sys.modules[name] = code
        spec.loader.exec_module(code)
        record._python = getattr(code, name)(record)
        setattr(self._slicer.modules, f"{name}Instance", record._python)
        self.slicer_application.startupCompleted.emit()
        if not enter:
            return None
        self._slicer.util.selectModule(name)
        self.process()
        return record.widgetRepresentation().self()

    def unload_module(self, name: str) -> None:
        """Leave and forget a module, as at the application's end: ``exit()``, then ``cleanup()``."""
        if self._slicer.util.selectedModule() == name:
            self.main_window.leave_module()
        module = self.manager.module(name)
        if module is not None and module._widget is not None:
            module._widget.self().cleanup()
            module._widget.deleteLater()
            module._widget = None
        self.manager.remove(name)
        sys.modules.pop(name, None)
        self.process()

    # The event loop

    def process(self, seconds: float = 0.0) -> None:
        """Let the event loop run for about this long (at least once)."""
        from PySide6.QtCore import QCoreApplication, QEvent

        end = time.perf_counter() + seconds
        while True:
            self.slicer_application.processEvents()
            QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
            if time.perf_counter() >= end:
                return
            time.sleep(0.001)

    def wait_until(self, condition: Callable[[], Any], timeout: float = 10.0) -> None:
        """Run the event loop until the condition holds.

        Raises:
            TimeoutError: it does not within ``timeout`` seconds.
        """
        end = time.perf_counter() + timeout
        while not condition():
            if time.perf_counter() > end:
                raise TimeoutError(f"still waiting after {timeout} s; popups so far: {self.messages.texts()}")
            self.process()
            time.sleep(0.001)

    @contextmanager
    def heartbeat(self) -> Iterator[Heartbeat]:
        """Measure how long the event loop is kept from running inside the block."""
        from PySide6.QtCore import Qt, QTimer

        beat = Heartbeat()
        timer = QTimer()
        timer.setTimerType(Qt.TimerType.PreciseTimer)
        timer.timeout.connect(beat.beat)
        timer.start(5)
        try:
            yield beat
        finally:
            beat.beat()
            timer.stop()

    # The scene

    def clear_scene(self) -> None:
        """File > Close scene."""
        self._slicer.mrmlScene.Clear(False)
        self.process()

    def reset(self) -> None:
        """Forget modules, nodes, popups and package requests of an earlier test."""
        for module in self.manager.scripted():
            self.unload_module(module.name)
        self.messages.clear()
        self.exceptions.clear()
        self.qt_warnings.clear()
        self.packages.clear()
        self._slicer.app.userSettings().clear()
        self._slicer.app.layoutManager().setLayout(self._slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView)
        self.clear_scene()

    # Pictures

    def grab_slice(self, path: str | Path, view: str = "Red", size: tuple[int, int] = (400, 400)) -> Any:
        """Render a slice view into a PNG; returns the RGB array ``(height, width, 3)``."""
        from .pictures import save_png

        image = self._slicer.app.layoutManager().sliceWidget(view).sliceView().render_image(*size)
        save_png(image, Path(path))
        return image

    def grab_window(
        self,
        path: str | Path,
        volume: Any = None,
        layout: str = "four-up",
        size: tuple[int, int] = (1600, 1000),
        center: tuple[float, float, float] | None = None,
        panel_width: int = 480,
        look_from: tuple[float, float, float] = (-0.6, 1.0, 0.4),
    ) -> None:
        """Draw the main window, module panel left and rendered views right, into a PNG.

        Args:
            path: the file to write.
            volume: shown in all slice views, fitted to them; None leaves the views as they are.
            layout: "four-up", "conventional" or "red".
            size: of the picture, in pixels.
            center: all slice views are moved to this point (RAS, mm).
            panel_width: of the module panel, in pixels.
            look_from: the direction (RAS) from which the 3D view looks at what it shows.
        """
        from .pictures import grab_window

        grab_window(self.main_window, Path(path), volume, layout, size, center, panel_width, look_from)

    # The end

    def stop(self) -> None:
        """Leave all modules, then take views, scene and Qt down in an order that none of them crashes in."""
        for module in self.manager.scripted():
            self.unload_module(module.name)
        self.clear_scene()
        layout_manager = self.slicer_application.layoutManager()
        if layout_manager is not None:
            layout_manager.tear_down()
        self.process()
        gc.collect()
        self._folder.cleanup()


def _keep_none() -> None:
    """PySide6 6.12 does not count the None that processEvents returns; before Python 3.12 None then dies of it."""
    if sys.version_info < (3, 12):
        import ctypes

        ctypes.c_ssize_t.from_address(id(None)).value += 1 << 40
