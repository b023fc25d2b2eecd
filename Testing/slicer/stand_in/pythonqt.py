"""Make PySide6 feel like PythonQt, the Qt binding inside Slicer, and offer it as the module ``qt``.

What differs between the two, as far as scripted modules notice:

* Qt properties are Python attributes (``button.text``, ``spinBox.value = 3``); the getters of the same name are hidden,
  the setters (``setText``) stay.
* ``obj.connect("clicked()", f)`` and ``obj.disconnect("clicked()", f)`` exist beside ``obj.clicked.connect(f)``.
* Assigning an attribute that a Qt class does not have is an error, so a misspelt property is found.
* Enumerators compare with plain integers; ``className()``, ``name``, ``delete()`` and class names as strings in
  ``findChild`` and ``findChildren`` work.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from PySide6 import QtCore, QtGui, QtNetwork, QtWidgets

# C++ asks Python for these virtual functions, so they have to stay callable.
_VIRTUAL_GETTERS = {"sizeHint", "minimumSizeHint"}
# Bindings that PythonQt does not offer under these names.
_PYSIDE_ONLY = {"Signal", "SignalInstance", "Slot", "Property", "ClassInfo", "QtMsgType", "SIGNAL", "SLOT"}


class QtProperty:
    """A Q_PROPERTY as an attribute of the instances; on the class it stays the C++ getter or static function."""

    def __init__(self, name: str, on_class: Any) -> None:
        self.name = name
        self.on_class = on_class

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self.on_class
        return instance.property(self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        if not instance.setProperty(self.name, value):
            kind = instance.metaObject().className()
            raise ValueError(f"{kind}.{self.name} cannot be set to {value!r}")


def build_qt_module() -> ModuleType:
    """Patch PySide6 (once a process) and return the module that ``import qt`` gives."""
    _patch_properties()
    _patch_attribute_access()
    _patch_helpers()
    _patch_enumerations()
    module = ModuleType("qt", "The stand-in's Qt: PySide6 behaving like PythonQt.")
    for source in (QtCore, QtGui, QtNetwork, QtWidgets):
        for name in dir(source):
            if not name.startswith("_") and name not in _PYSIDE_ONLY:
                setattr(module, name, getattr(source, name))
    return module


def qobject_classes() -> Iterator[type]:
    """Every class of QtCore, QtGui, QtNetwork and QtWidgets that has properties and signals."""
    for value in _every_name():
        if isinstance(value, type) and issubclass(value, QtCore.QObject):
            yield value


def _every_name() -> list[Any]:
    # PySide6 makes a class when it is first asked for, so vars() would miss most of them.
    return [getattr(source, name) for source in (QtCore, QtGui, QtNetwork, QtWidgets) for name in dir(source)]


def _patch_properties() -> None:
    for cls in list(qobject_classes()):
        meta_object = cls.staticMetaObject
        for index in range(meta_object.propertyOffset(), meta_object.propertyCount()):
            name = meta_object.property(index).name()
            present = inspect.getattr_static(cls, name, None)
            if name not in _VIRTUAL_GETTERS and not isinstance(present, QtProperty):
                setattr(cls, name, QtProperty(name, getattr(cls, name, None)))
    QtCore.QObject.name = QtProperty("objectName", None)


def _patch_attribute_access() -> None:
    if getattr(QtCore.QObject.__getattribute__, "stand_in", False):
        return
    plain_getattribute = QtCore.QObject.__getattribute__

    # PySide6 finds its own static QObject.connect before anything set on the class.
    def getattribute(self: Any, name: str) -> Any:
        if name == "connect":
            return Connector(self).connect
        if name == "disconnect":
            return Connector(self).disconnect
        return plain_getattribute(self, name)

    getattribute.stand_in = True
    QtCore.QObject.__getattribute__ = getattribute
    for cls in list(qobject_classes()):
        cls.__setattr__ = _set_attribute


def _set_attribute(self: Any, name: str, value: Any) -> None:
    cls = type(self)
    declared = inspect.getattr_static(cls, name, None)
    if isinstance(declared, QtCore.Property):
        self.setProperty(name, value)
    elif hasattr(type(declared), "__set__"):
        declared.__set__(self, value)
    elif isinstance(value, QtCore.QObject) and QtCore.QObject.objectName(value) == name:
        pass  # PySide6's .ui loader names every child on the root; Slicer's does not
    elif declared is None and not name.startswith("_") and cls.__module__.startswith(("PySide6.", "stand_in.")):
        raise AttributeError(
            f"attribute {name!r} does not exist on {cls.__name__}; Slicer refuses new attributes on Qt objects"
        )
    else:
        self.__dict__[name] = value


class Connector:
    """``connect`` and ``disconnect`` with signals named by their C++ signature."""

    def __init__(self, sender: Any) -> None:
        self.sender = sender
        self.made: list[tuple[str, Callable[..., Any], Any, Callable[..., Any]]] = sender.__dict__.setdefault(
            "_string_connections", []
        )

    def connect(self, signature: str, receiver: Callable[..., Any]) -> bool:
        """Connect; the receiver gets as many arguments as the signature names."""
        signal, count = self._find(signature)

        def call(*arguments: Any) -> None:
            receiver(*arguments[:count])

        signal.connect(call)
        self.made.append((signature, receiver, signal, call))
        return True

    def disconnect(self, signature: str, receiver: Callable[..., Any] | None = None) -> bool:
        """Undo :meth:`connect`; without a receiver, every connection of that signature."""
        undone = [made for made in self.made if made[0] == signature and receiver in (None, made[1])]
        for made in undone:
            made[2].disconnect(made[3])
            self.made.remove(made)
        return bool(undone)

    def _find(self, signature: str) -> tuple[Any, int]:
        name, _, rest = signature.partition("(")
        arguments = [argument for argument in rest.rstrip(")").split(",") if argument.strip()]
        signal = getattr(self.sender, name, None)
        if not rest.endswith(")") or not isinstance(signal, QtCore.SignalInstance):
            kind = self.sender.metaObject().className()
            raise ValueError(f"{kind} has no signal {signature!r}")
        known = [known for known in self._signatures(name) if len(known) >= len(arguments)]
        if not known:
            kind = self.sender.metaObject().className()
            raise ValueError(f"{kind}.{name} has fewer arguments than {signature!r} names")
        return signal, len(arguments)

    def _signatures(self, name: str) -> Iterator[list[bytes]]:
        meta_object = self.sender.metaObject()
        for index in range(meta_object.methodCount()):
            method = meta_object.method(index)
            if method.name().data().decode() == name and method.methodType() == QtCore.QMetaMethod.MethodType.Signal:
                yield [kind.data() for kind in method.parameterTypes()]


def _patch_helpers() -> None:
    plain_child, plain_children = QtCore.QObject.findChild, QtCore.QObject.findChildren

    def find_children(self: Any, kind: Any = QtCore.QObject, name: str = "") -> list[Any]:
        if isinstance(kind, str):
            found = [child for child in plain_children(self, QtCore.QObject) if child.inherits(kind)]
        else:
            found = list(plain_children(self, kind))
        return [child for child in found if not name or child.objectName == name]

    def find_child(self: Any, kind: Any, name: str = "") -> Any:
        if isinstance(kind, str):
            return next(iter(find_children(self, kind, name)), None)
        return plain_child(self, kind, name) if name else plain_child(self, kind)

    root: Any = QtCore.QObject
    if plain_children.__name__ != "find_children":
        root.findChild, root.findChildren = find_child, find_children
    root.className = lambda self: self.metaObject().className()
    root.delete = lambda self: self.deleteLater()
    for cls in (QtWidgets.QDialog, QtWidgets.QMenu, QtCore.QEventLoop):
        if not hasattr(cls, "exec_"):
            cls.exec_ = cls.exec


def _patch_enumerations() -> None:
    """PythonQt's enumerators are integers: ``state == qt.Qt.Checked`` holds for the 2 that a signal carries."""

    def equal(self: enum.Enum, other: object) -> bool:
        if isinstance(other, enum.Enum):
            return self is other or (type(self) is type(other) and self.value == other.value)
        return bool(self.value == other)

    for holder in _every_name():
        for value in [holder, *vars(holder).values()] if isinstance(holder, type) else []:
            if isinstance(value, type) and issubclass(value, enum.Enum) and not issubclass(value, int):
                value.__eq__ = equal
                value.__hash__ = lambda self: hash(self.value)
                value.__int__ = lambda self: self.value
                value.__index__ = lambda self: self.value
