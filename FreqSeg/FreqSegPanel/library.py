"""Finds FreqSegLib: beside this module where FreqSeg is installed, one folder up in a checkout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def find_library() -> Path:
    """Make ``import FreqSegLib`` work, and return the folder it is imported from.

    Raises:
        ImportError: it is neither on Python's path nor near this module.
    """
    spec = importlib.util.find_spec("FreqSegLib")
    if spec is None:
        module_folder = Path(__file__).resolve().parents[1]
        for folder in (module_folder, module_folder.parent):
            if (folder / "FreqSegLib" / "presets.py").is_file():
                sys.path.append(str(folder))
                break
        importlib.invalidate_caches()
        spec = importlib.util.find_spec("FreqSegLib")
    if spec is None or spec.origin is None:
        raise ImportError("FreqSegLib was not found beside the FreqSeg module. Install the FreqSeg extension again.")
    return Path(spec.origin).resolve().parents[1]
