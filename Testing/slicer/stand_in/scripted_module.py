"""``slicer.ScriptedLoadableModule``: the base classes of a scripted module, and what owns them in the application."""

from __future__ import annotations

import logging
import os
import unittest
from typing import Any

import slicer
from PySide6 import QtCore, QtGui, QtWidgets

__all__ = [
    "ScriptedLoadableModule",
    "ScriptedLoadableModuleLogic",
    "ScriptedLoadableModuleTest",
    "ScriptedLoadableModuleWidget",
]


class qSlicerScriptedLoadableModule(QtCore.QObject):
    """The application's record of a scripted module; the module class gets it as ``parent`` and fills it in."""

    _texts = ("title", "helpText", "acknowledgementText")
    _lists = ("categories", "dependencies", "contributors", "associatedNodeTypes")

    def __init__(self, name: str, path: str) -> None:
        super().__init__()
        self._name, self._path = name, path
        self._python: Any = None
        self._widget: qSlicerScriptedLoadableModuleWidget | None = None
        self._values: dict[str, Any] = dict.fromkeys(self._texts, "") | {key: [] for key in self._lists}
        self._values |= {"hidden": False, "index": -1, "icon": QtGui.QIcon()}
        self._values["widgetRepresentationCreationEnabled"] = True

    name = property(lambda self: self._name)
    path = property(lambda self: self._path)

    def widgetRepresentation(self) -> qSlicerScriptedLoadableModuleWidget | None:
        """The module's widget; made and set up at the first call."""
        if self._widget is None and self.widgetRepresentationCreationEnabled:
            self._widget = qSlicerScriptedLoadableModuleWidget(self)
            self._widget.reload()
        return self._widget

    def createNewWidgetRepresentation(self) -> qSlicerScriptedLoadableModuleWidget:
        widget = qSlicerScriptedLoadableModuleWidget(self)
        widget.reload()
        return widget

    def logic(self) -> Any:
        """Scripted modules have a C++ logic that holds nothing."""
        return slicer.vtkSlicerScriptedLoadableModuleLogic()

    def self(self) -> Any:
        return self._python

    def pythonModule(self) -> Any:
        import sys

        return sys.modules[self._name]


def _module_value(name: str) -> property:
    def write(self: Any, value: Any) -> None:
        self._values[name] = value

    return property(lambda self: self._values[name], write)


for _name in (*qSlicerScriptedLoadableModule._texts, *qSlicerScriptedLoadableModule._lists):
    setattr(qSlicerScriptedLoadableModule, _name, _module_value(_name))
for _name in ("hidden", "index", "icon", "widgetRepresentationCreationEnabled"):
    setattr(qSlicerScriptedLoadableModule, _name, _module_value(_name))


class qSlicerScriptedLoadableModuleWidget(QtWidgets.QWidget):
    """The panel of a scripted module; the Python widget class fills it and is found by ``self()``."""

    def __init__(self, module: qSlicerScriptedLoadableModule) -> None:
        super().__init__()
        self._module = module
        self._python: Any = None
        self._entered = False
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(9, 9, 9, 9)

    def self(self) -> Any:
        return self._python

    def module(self) -> qSlicerScriptedLoadableModule:
        return self._module

    isEntered = property(lambda self: self._entered)

    def enter(self) -> None:
        self._entered = True
        self._python.enter()

    def exit(self) -> None:
        self._entered = False
        self._python.exit()

    def reload(self) -> None:
        """Make the Python widget from the module's present code and set it up."""
        widget_class = getattr(self._module.pythonModule(), f"{self._module.name}Widget")
        self._python = widget_class(self)
        setattr(slicer.modules, f"{self._module.name}Widget", self._python)
        self._python.setup()

    def setMRMLScene(self, scene: Any) -> None:
        """The scene of this application never changes."""

    def mrmlScene(self) -> Any:
        return slicer.mrmlScene


class ScriptedLoadableModule:
    """Base of the class that describes a module."""

    def __init__(self, parent: Any) -> None:
        self.parent = parent
        self.moduleName = type(self).__name__
        parent.title = ""
        parent.categories = []
        parent.dependencies = []
        parent.contributors = []
        parent.helpText = ""
        parent.acknowledgementText = ""
        icon = self.resourcePath(f"Icons/{self.moduleName}.png")
        if os.path.isfile(icon):
            parent.icon = QtGui.QIcon(icon)

    def resourcePath(self, filename: str) -> str:
        return os.path.join(os.path.dirname(slicer.util.modulePath(self.moduleName)), "Resources", filename)

    def getDefaultModuleDocumentationLink(self, docPage: str | None = None) -> str:
        return '<p>For more information see the <a href="https://slicer.org">online documentation</a>.</p>'

    def runTest(self, msec: int = 100, **kwargs: Any) -> Any:
        """Run the module's own test case class."""
        test_class = getattr(self.parent.pythonModule(), f"{self.moduleName}Test")
        test = test_class()
        test.messageDelay = msec
        return test.runTest(**kwargs)


class ScriptedLoadableModuleWidget:
    """Base of the class that makes a module's panel."""

    def __init__(self, parent: Any = None) -> None:
        self.moduleName = type(self).__name__.removesuffix("Widget")
        self.developerMode = slicer.util.settingsValue("Developer/DeveloperMode", False, converter=slicer.util.toBool)
        if parent is None:
            raise ValueError("the stand-in makes module widgets through app.load_module only")
        self.parent = parent
        self.layout = parent.layout()

    def resourcePath(self, filename: str) -> str:
        return os.path.join(os.path.dirname(slicer.util.modulePath(self.moduleName)), "Resources", filename)

    def setup(self) -> None:
        """Make the widgets; a module extends this. In developer mode, adds the reload section."""
        if self.developerMode:
            self.setupDeveloperSection()

    def setupDeveloperSection(self) -> None:
        self.reloadButton = QtWidgets.QPushButton("Reload")
        self.reloadButton.clicked.connect(lambda *_: self.onReload())
        self.layout.addWidget(self.reloadButton)

    def enter(self) -> None:
        """Called when the user opens the module."""

    def exit(self) -> None:
        """Called when the user opens another module."""

    def cleanup(self) -> None:
        """Called when the application closes or the module is reloaded."""

    def onReload(self) -> None:
        logging.debug("Reloading scripted module %s", self.moduleName)
        slicer.util.reloadScriptedModule(self.moduleName)


class ScriptedLoadableModuleLogic:
    """Base of the class that does a module's work without its panel."""

    def __init__(self, parent: Any = None) -> None:
        self.parent = parent
        self.mrmlScene: Any = None
        self.moduleName = type(self).__name__.removesuffix("Logic")
        self.isSingletonParameterNode = True

    def getParameterNode(self) -> Any:
        """The module's parameter node in the scene; made when there is none."""
        if self.isSingletonParameterNode:
            node = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
        else:
            node = next(iter(self.getAllParameterNodes()), None)
        return node if node is not None else self.createParameterNode()

    def getAllParameterNodes(self) -> list[Any]:
        nodes = slicer.util.getNodesByClass("vtkMRMLScriptedModuleNode")
        return [node for node in nodes if node.GetAttribute("ModuleName") == self.moduleName]

    def createParameterNode(self) -> Any:
        node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
        node.UnRegister(None)
        if self.isSingletonParameterNode:
            node.SetSingletonTag(self.moduleName)
        node.SetModuleName(self.moduleName)
        node.SetAttribute("ModuleName", self.moduleName)
        node.SetName(slicer.mrmlScene.GenerateUniqueName(self.moduleName))
        return slicer.mrmlScene.AddNode(node)


class ScriptedLoadableModuleTest(unittest.TestCase):
    """Base of the class that tests a module inside the application."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.delayTime = 0
        self.messageDelay = 0

    def delayDisplay(self, message: str, requestedDelay: int | None = None, msec: int | None = None) -> None:
        logging.info(message)
        slicer.app.processEvents()

    def takeScreenshot(self, name: str, description: str, type: int = -1) -> None:
        """Screenshots are taken by the stand-in's own grab_window."""

    def runTest(self) -> None:
        """Run every ``test_*`` method; modules usually override this."""
        for name in sorted(name for name in dir(self) if name.startswith("test")):
            self.setUp()
            getattr(self, name)()
            self.tearDown()
