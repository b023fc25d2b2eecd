"""Fusing a registered CT and MR: classic rules and two wavelet networks behind one call.

``fusion_method(name)`` gives a method; ``method(ct, mr)`` gives a :class:`~FreqSegLib.fusion.fused.Fused`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from FreqSegLib.fusion.fused import Fused, FusionMethod
    from FreqSegLib.fusion.methods import fusion_method

METHODS: tuple[str, ...] = ("multi-scale", "single-scale", "choose-max", "laplacian", "average", "max")
"""Names that :func:`fusion_method` takes; the first two are trained networks."""

__all__ = ["METHODS", "Fused", "FusionMethod", "fusion_method"]

# Loaded on demand, so that the names of the methods cost no torch.
_HOMES = {"Fused": "fused", "FusionMethod": "fused", "fusion_method": "methods"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
