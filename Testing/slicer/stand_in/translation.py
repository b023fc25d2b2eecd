"""``slicer.i18n``: translation marks; this application speaks English."""

from __future__ import annotations

from types import ModuleType


def tr(text: str, context: str | None = None) -> str:
    """The text in the user's language."""
    return text


def translate(context: str, text: str) -> str:
    """The text in the user's language, as used in ``context``."""
    return text


def getContext(sourceFile: str) -> str:
    """The translation context of a source file: its module's name."""
    return sourceFile.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".py")


def build_module() -> ModuleType:
    """Return the module ``slicer.i18n``."""
    module = ModuleType("slicer.i18n", __doc__)
    for function in (tr, translate, getContext):
        setattr(module, function.__name__, function)
    return module
