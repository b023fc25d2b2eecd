"""Types of parameter-node members: annotations, validators, defaults, and how a value is stored in the node.

Follows Slicer's developer guide, "Parameter nodes": supported types, validators, defaults.
"""

from __future__ import annotations

import copy
import enum
import json
import pathlib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import slicer


class Validator:
    """Base of validators; :meth:`validate` raises for a value that is not allowed."""

    def validate(self, value: Any) -> None:
        raise NotImplementedError


class NotNone(Validator):
    def validate(self, value: Any) -> None:
        if value is None:
            raise ValueError("value must not be None")


class IsInstance(Validator):
    def __init__(self, classtype: Any) -> None:
        self.classtype = classtype

    def validate(self, value: Any) -> None:
        if value is not None and not isinstance(value, self.classtype):
            raise TypeError(f"value must be of type {self.classtype}, got {value!r} of type {type(value).__name__}")


class Minimum(Validator):
    def __init__(self, minimum: float) -> None:
        self.minimum = minimum

    def validate(self, value: Any) -> None:
        if value < self.minimum:
            raise ValueError(f"value must be >= {self.minimum}, got {value}")


class Maximum(Validator):
    def __init__(self, maximum: float) -> None:
        self.maximum = maximum

    def validate(self, value: Any) -> None:
        if value > self.maximum:
            raise ValueError(f"value must be <= {self.maximum}, got {value}")


class WithinRange(Validator):
    def __init__(self, minimum: float, maximum: float) -> None:
        self.minimum, self.maximum = minimum, maximum

    def validate(self, value: Any) -> None:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"value must be within range [{self.minimum}, {self.maximum}], got {value}")


class Choice(Validator):
    def __init__(self, choices: Iterable[Any]) -> None:
        self.choices = list(choices)

    def validate(self, value: Any) -> None:
        if value not in self.choices:
            raise ValueError(f"value must be one of {self.choices}, got {value!r}")


class Exclude(Validator):
    def __init__(self, excluded: Iterable[Any]) -> None:
        self.excluded = list(excluded)

    def validate(self, value: Any) -> None:
        if value in self.excluded:
            raise ValueError(f"value must not be one of {self.excluded}, got {value!r}")


@dataclass(frozen=True)
class Decimals:
    value: int


@dataclass(frozen=True)
class SingleStep:
    value: float


class Default:
    """A default value, or a function that makes one when it is needed."""

    def __init__(self, value: Any = None, *, generator: Callable[[], Any] | None = None) -> None:
        self._make = generator or (lambda: copy.copy(value))

    @property
    def value(self) -> Any:
        return self._make()


_BASIC = (bool, int, float, str)


@dataclass(frozen=True)
class ValueType:
    """One declared type, taken apart."""

    declared: Any
    origin: Any
    annotations: tuple[Any, ...] = ()
    arguments: tuple[ValueType, ...] = ()
    optional: bool = False
    validators: tuple[Validator, ...] = field(default=())

    @classmethod
    def of(cls, hint: Any) -> ValueType:
        """Take a type hint apart.

        Raises:
            TypeError: the hint is not among the documented types.
        """
        annotations: tuple[Any, ...] = ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extra = typing.get_args(hint)
            annotations = tuple(extra)
        optional = False
        if isinstance(hint, types.UnionType):
            raise TypeError(f"write typing.Optional or typing.Union instead of {hint}: only these are documented")
        if typing.get_origin(hint) is typing.Union:
            members = [member for member in typing.get_args(hint) if member is not type(None)]
            optional = len(members) < len(typing.get_args(hint))
            if len(members) > 1 and not all(_is_node_class(member) for member in members):
                raise TypeError(f"the stand-in knows unions of MRML nodes and Optional only, got {hint}")
            if len(members) > 1:
                return cls(tuple(members), "node", annotations, (), True, (IsInstance(tuple(members)),))
            hint = members[0]
        inner = cls._plain(hint)
        own = tuple(item for item in annotations if isinstance(item, Validator))
        return cls(hint, inner.origin, annotations, inner.arguments, optional, (*inner.validators, *own))

    @classmethod
    def _plain(cls, hint: Any) -> ValueType:
        if _is_node_class(hint):
            return cls(hint, "node", validators=(IsInstance(hint),))
        if hint is float:
            return cls(hint, float, validators=(NotNone(), IsInstance((float, int))))
        if hint in _BASIC or (isinstance(hint, type) and issubclass(hint, pathlib.PurePath)):
            kind = pathlib.PurePath if hint not in _BASIC else hint
            return cls(hint, kind, validators=(NotNone(), IsInstance(hint)))
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return cls(hint, enum.Enum, validators=(NotNone(), IsInstance(hint)))
        origin = typing.get_origin(hint)
        if origin in (list, tuple, dict):
            arguments = tuple(cls.of(argument) for argument in typing.get_args(hint))
            return cls(hint, origin, arguments=arguments, validators=(NotNone(), IsInstance(origin)))
        raise TypeError(f"{hint} is not a type that a parameter node can hold here")

    @property
    def holds_nodes(self) -> bool:
        return self.origin == "node" or (self.origin is list and self.arguments[0].origin == "node")

    def validate(self, value: Any) -> None:
        """Raise TypeError or ValueError for a value that this type does not hold."""
        if value is None and (self.optional or self.origin == "node"):
            return
        for validator in self.validators:
            validator.validate(value)
        if self.origin in (list, tuple):
            inner = self.arguments * len(value) if self.origin is list else self.arguments
            if len(inner) != len(value):
                raise ValueError(f"expected {len(inner)} values, got {len(value)}")
            for kind, item in zip(inner, value, strict=True):
                kind.validate(item)
        elif self.origin is dict:
            for key, item in value.items():
                self.arguments[0].validate(key)
                self.arguments[1].validate(item)

    def default(self) -> Any:
        """The documented default of a member without one of its own."""
        for item in self.annotations:
            if isinstance(item, Default):
                return item.value
        if self.optional or self.origin == "node":
            return None
        if self.origin is enum.Enum:
            return next(iter(self.declared))
        if self.origin is tuple:
            return tuple(argument.default() for argument in self.arguments)
        choices = [item.choices for item in self.annotations if isinstance(item, Choice)]
        implied = self.declared() if self.origin is pathlib.PurePath else self.origin()
        return choices[0][0] if choices and implied not in choices[0] else implied

    def to_text(self, value: Any) -> str:
        return str(value) if self.origin is str and not self.optional else json.dumps(self._to_plain(value))

    def from_text(self, text: str) -> Any:
        return text if self.origin is str and not self.optional else self._from_plain(json.loads(text))

    def _to_plain(self, value: Any) -> Any:
        if value is None:
            return None
        if self.origin is enum.Enum:
            return value.name
        if self.origin is pathlib.PurePath:
            return str(value)
        if self.origin is list:
            return [self.arguments[0]._to_plain(item) for item in value]
        if self.origin is tuple:
            return [kind._to_plain(item) for kind, item in zip(self.arguments, value, strict=True)]
        if self.origin is dict:
            key_kind, item_kind = self.arguments
            return [[key_kind._to_plain(key), item_kind._to_plain(item)] for key, item in value.items()]
        return value

    def _from_plain(self, plain: Any) -> Any:
        if plain is None:
            return None
        if self.origin is enum.Enum:
            return self.declared[plain]
        if self.origin is list:
            return [self.arguments[0]._from_plain(item) for item in plain]
        if self.origin is tuple:
            return tuple(kind._from_plain(item) for kind, item in zip(self.arguments, plain, strict=True))
        if self.origin is dict:
            return {self.arguments[0]._from_plain(key): self.arguments[1]._from_plain(item) for key, item in plain}
        return self.declared(plain) if self.origin is pathlib.PurePath else self.origin(plain)


def _is_node_class(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, slicer.vtkMRMLNode)
