"""Qt properties of the stand-in's own widgets, with the setter that C++ classes have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PySide6.QtCore import Property


def stored(kind: Any, name: str, default: Any, changed: str = "") -> tuple[Any, Callable[[Any, Any], None]]:
    """A Q_PROPERTY kept in the instance, and its setter; the method named ``changed`` runs after a change.

    >>> class Widget(QWidget):
    ...     decimals, setDecimals = stored(int, "decimals", 2, "_refresh")
    """
    key = f"_{name}"

    def read(self: Any) -> Any:
        return self.__dict__.get(key, default)

    def write(self: Any, value: Any) -> None:
        if read(self) != value:
            self.__dict__[key] = value
            if changed:
                getattr(self, changed)()

    return Property(kind, read, write), write
