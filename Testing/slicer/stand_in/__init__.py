"""A small stand-in for the 3D Slicer application: real MRML (slicer-core), Qt through PySide6, no window system.

    from stand_in import Application

    app = Application.start()
    widget = app.load_module("FreqSeg/FreqSeg.py")

Nothing of Qt, VTK or Slicer is imported before :meth:`Application.start`.
"""

from __future__ import annotations

from .application import Application

__all__ = ["Application"]
