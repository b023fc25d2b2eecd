"""``slicer.parameterNodeWrapper``: typed members on a vtkMRMLScriptedModuleNode, saved with the scene.

Follows Slicer's developer guide, "Parameter nodes". Parameter packs and ``createGui`` are not offered.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import parameter_types
from .parameter_gui import GuiConnection, widgets_with_parameter
from .parameter_types import (
    Choice,
    Decimals,
    Default,
    Exclude,
    IsInstance,
    Maximum,
    Minimum,
    NotNone,
    SingleStep,
    Validator,
    ValueType,
    WithinRange,
)

__all__ = [
    "Choice",
    "Decimals",
    "Default",
    "Exclude",
    "IsInstance",
    "Maximum",
    "Minimum",
    "NotNone",
    "SingleStep",
    "Validator",
    "WithinRange",
    "parameterNodeWrapper",
]


def parameterNodeWrapper(cls: type | None = None) -> Any:
    """Class decorator: every annotated member becomes a property stored in the parameter node.

    Raises:
        TypeError: a member has a type that is not documented.
        ValueError: a member is called as one of the wrapper's own methods.
    """
    return _wrap(cls) if cls is not None else _wrap


def _wrap(cls: type) -> type:
    members: dict[str, ValueType] = {}
    defaults: dict[str, Default] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if name in vars(_WrapperMethods):
            raise ValueError(f"{name!r} is a name that parameter node wrappers use themselves")
        members[name] = ValueType.of(hint)
        defaults[name] = _default_of(cls, name, members[name])
        setattr(cls, name, _member_property(name))

    wrapper: Any = cls
    wrapper.allParameters = members
    wrapper._defaults = defaults
    for name, value in vars(_WrapperMethods).items():
        if callable(value):
            setattr(cls, name, value)
    return cls


def _default_of(cls: type, name: str, kind: ValueType) -> Default:
    if name in vars(cls):
        kind.validate(vars(cls)[name])
        return Default(vars(cls)[name])
    return Default(generator=kind.default)


def _member_property(name: str) -> property:
    return property(lambda self: self.getValue(name), lambda self, value: self.setValue(name, value))


class _WrapperMethods:
    """What every wrapper class gets."""

    allParameters: dict[str, ValueType]
    _defaults: dict[str, Default]

    def __init__(self, parameterNode: Any, prefix: str | None = None) -> None:
        self.parameterNode = parameterNode
        self._prefix = f"{prefix}." if prefix else ""
        self._cache: dict[str, Any] = {}
        self._connections: dict[int, GuiConnection] = {}
        for name, kind in self.allParameters.items():
            if not kind.holds_nodes and not parameterNode.HasParameter(self._prefix + name):
                parameterNode.SetParameter(self._prefix + name, kind.to_text(self._defaults[name].value))

    def getValue(self, name: str) -> Any:
        kind, key = self._kind(name), self._prefix + name
        node = self.parameterNode
        if kind.origin == "node":
            return node.GetNodeReference(key)
        if kind.holds_nodes:
            return [node.GetNthNodeReference(key, index) for index in range(node.GetNumberOfNodeReferences(key))]
        if name not in self._cache:
            self._cache[name] = self._observed(name, kind.from_text(node.GetParameter(key)))
        return self._cache[name]

    def setValue(self, name: str, value: Any) -> None:
        kind, key = self._kind(name), self._prefix + name
        kind.validate(value)
        node = self.parameterNode
        if kind.origin == "node":
            node.SetNodeReferenceID(key, value.GetID() if value is not None else None)
        elif kind.holds_nodes:
            node.RemoveNodeReferenceIDs(key)
            for item in value:
                node.AddNodeReferenceID(key, item.GetID())
        else:
            self._cache[name] = self._observed(name, value)
            node.SetParameter(key, kind.to_text(value))

    def default(self, name: str) -> Default:
        """The member's default; its ``value`` is the value."""
        self._kind(name)
        return self._defaults[name]

    def dataType(self, name: str) -> Any:
        return self._kind(name).declared

    def isCached(self, name: str) -> bool:
        """Whether the wrapper keeps the value, so that a change made past the wrapper goes unseen."""
        return not self._kind(name).holds_nodes

    def connectGui(self, gui: Any) -> int:
        """Bind every widget of ``gui`` that has a SlicerParameterName; the tag undoes it."""
        return self.connectParametersToGui(widgets_with_parameter(gui))

    def connectParametersToGui(self, mapping: dict[str, Any]) -> int:
        """Bind widgets to parameters, both ways; the tag undoes it."""
        for name in mapping:
            self._kind(name)
        tag = max(self._connections, default=0) + 1
        self._connections[tag] = GuiConnection(self, mapping)
        return tag

    def disconnectGui(self, tag: int | None) -> None:
        # Slicer's own template disconnects None when it enters again.
        if tag is not None:
            self._connections.pop(tag).disconnect()

    def AddObserver(self, event: Any, callback: Any, priority: float = 0.0) -> int:
        return int(self.parameterNode.AddObserver(event, callback, priority))

    def RemoveObserver(self, tag: int) -> None:
        self.parameterNode.RemoveObserver(tag)

    def StartModify(self) -> int:
        return int(self.parameterNode.StartModify())

    def EndModify(self, wasModified: int) -> int:
        return int(self.parameterNode.EndModify(wasModified))

    def Modified(self) -> None:
        self.parameterNode.Modified()

    def _kind(self, name: str) -> ValueType:
        if name not in self.allParameters:
            raise ValueError(f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(self.allParameters)}")
        return self.allParameters[name]

    def _observed(self, name: str, value: Any) -> Any:
        def write_back(changed: Any) -> None:
            self.setValue(name, type(value)(changed))

        if isinstance(value, dict):
            return ObservedDict(value, write_back)
        if isinstance(value, list):
            return ObservedList(value, write_back)
        return value


def _write_back_after(method_name: str, base: type) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        result = getattr(base, method_name)(self, *arguments, **named)
        self._write_back(base(self))
        return self if method_name.startswith("__i") else result

    return method


class ObservedList(list[Any]):
    """A list that writes itself back into the parameter node when it is changed."""

    def __init__(self, values: Any, write_back: Callable[[list[Any]], None]) -> None:
        super().__init__(values)
        self._write_back = write_back

    def __reduce__(self) -> tuple[Any, ...]:
        return (list, (list(self),))


class ObservedDict(dict[Any, Any]):
    """A dict that writes itself back into the parameter node when it is changed."""

    def __init__(self, values: Any, write_back: Callable[[dict[Any, Any]], None]) -> None:
        super().__init__(values)
        self._write_back = write_back

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, (dict(self),))


for _method in ("append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"):
    setattr(ObservedList, _method, _write_back_after(_method, list))
for _method in ("__setitem__", "__delitem__", "__iadd__", "__imul__"):
    setattr(ObservedList, _method, _write_back_after(_method, list))
for _method in ("__setitem__", "__delitem__", "update", "pop", "popitem", "clear", "setdefault", "__ior__"):
    setattr(ObservedDict, _method, _write_back_after(_method, dict))


def build_module() -> Any:
    """Return the module ``slicer.parameterNodeWrapper``."""
    module = ModuleType("slicer.parameterNodeWrapper", __doc__)
    for name in __all__:
        setattr(module, name, globals()[name])
    module.__all__ = list(__all__)
    module.validators = parameter_types
    return module
