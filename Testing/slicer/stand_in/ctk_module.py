"""The module ``ctk``."""

from __future__ import annotations

from types import ModuleType

from .ui_loader import CUSTOM_WIDGETS


def build_ctk_module() -> ModuleType:
    """Return the module that ``import ctk`` gives."""
    module = ModuleType("ctk", "The stand-in's Common Toolkit widgets.")
    for name, widget_class in CUSTOM_WIDGETS.items():
        if name.startswith("ctk"):
            setattr(module, name, widget_class)
    return module
