"""The scene with its application logics, and ``slicer.modules``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import slicer

from .module_share import write_share
from .scripted_module import qSlicerScriptedLoadableModule

# Module name, logic class; in an order in which none asks for a later one.
_CORE_MODULES = (
    ("Colors", "vtkSlicerColorLogic"),
    ("Units", "vtkSlicerUnitsLogic"),
    ("SubjectHierarchy", "vtkSlicerSubjectHierarchyModuleLogic"),
    ("Cameras", "vtkSlicerCamerasModuleLogic"),
    ("ViewControllers", "vtkSlicerViewControllersLogic"),
    ("Terminologies", "vtkSlicerTerminologiesModuleLogic"),
    ("Volumes", "vtkSlicerVolumesLogic"),
    ("Segmentations", "vtkSlicerSegmentationsModuleLogic"),
    ("Markups", "vtkSlicerMarkupsLogic"),
    ("Models", "vtkSlicerModelsLogic"),
    ("Transforms", "vtkSlicerTransformLogic"),
    ("Tables", "vtkSlicerTablesLogic"),
    ("Texts", "vtkSlicerTextsLogic"),
    ("Plots", "vtkSlicerPlotsLogic"),
    ("Sequences", "vtkSlicerSequencesLogic"),
    ("CropVolume", "vtkSlicerCropVolumeLogic"),
    ("VolumeRendering", "vtkSlicerVolumeRenderingLogic"),
)


class CoreModule:
    """A C++ module of the application: a name and a logic, no panel."""

    def __init__(self, name: str, logic: Any, panel: Any = None) -> None:
        self.name = self.title = name
        self.path = ""
        self._logic = logic
        self._panel = panel

    def logic(self) -> Any:
        return self._logic

    def widgetRepresentation(self) -> Any:
        return self._panel


class Modules:
    """``slicer.modules``: every loaded module under its name in lower case."""


class ModuleManager:
    """``slicer.app.moduleManager()``."""

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self._loaded: dict[str, Any] = {}

    def add(self, module: Any) -> None:
        self._loaded[module.name] = module
        setattr(self._modules, module.name.lower(), module)

    def remove(self, name: str) -> None:
        self._loaded.pop(name, None)
        for attribute in (name.lower(), f"{name}Widget"):
            self._modules.__dict__.pop(attribute, None)

    def module(self, name: str) -> Any:
        return self._loaded.get(name)

    def modulesNames(self) -> list[str]:
        return list(self._loaded)

    def factoryManager(self) -> ModuleManager:
        return self

    def loadedModuleNames(self) -> list[str]:
        return list(self._loaded)

    def scripted(self) -> list[qSlicerScriptedLoadableModule]:
        return [module for module in self._loaded.values() if isinstance(module, qSlicerScriptedLoadableModule)]

    def connect(self, signature: str, receiver: Any) -> bool:
        """Modules are never unloaded by the application here."""
        return True

    def disconnect(self, signature: str, receiver: Any) -> bool:
        return True


def build_scene(manager: ModuleManager, home: Path) -> tuple[Any, Any]:
    """Make ``slicer.mrmlScene`` and the application logic, and add the core modules to the manager.

    Args:
        manager: gets a module for every logic.
        home: the application's home folder, with share files such as terminologies below it.

    Returns:
        The scene and the application logic.
    """
    write_share(home / "share")
    scene = slicer.vtkMRMLScene()
    slicer.mrmlScene = scene
    _give_remote_io(scene, home.parent / "cache")
    application_logic = slicer.vtkSlicerApplicationLogic()
    application_logic.SetHomeDirectory(str(home))
    application_logic.SetShareDirectory("share")
    application_logic.SetMRMLScene(scene)
    for name, class_name in _CORE_MODULES:
        logic = getattr(slicer, class_name)()
        logic.SetMRMLApplicationLogic(application_logic)
        if hasattr(logic, "SetModuleShareDirectory"):
            logic.SetModuleShareDirectory(str(home / "share" / "qt-loadable-modules" / name))
        application_logic.SetModuleLogic(name, logic)
        logic.SetMRMLScene(scene)
        manager.add(CoreModule(name, logic))
    return scene, application_logic


def _give_remote_io(scene: Any, cache: Path) -> None:
    # Reading a .mrb bundle asks the scene for its cache folder.
    remote_io = slicer.vtkMRMLRemoteIOLogic()
    remote_io.SetMRMLScene(scene)
    remote_io.GetCacheManager().SetRemoteCacheDirectory(str(cache))
    remote_io.AddDataIOToScene()
    scene.remote_io = remote_io
