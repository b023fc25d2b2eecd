"""FreqSeg: type what you look for in a medical image, get a segmentation.

``import FreqSegLib`` is light: it loads neither torch nor SimpleITK. The pipelines are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from FreqSegLib.errors import FreqSegError

__version__ = "0.1.0"
__all__ = ["FreqSegError", "SpectralSegmenter", "TextSegmenter", "Volume", "VolumeFuser", "__version__"]

if TYPE_CHECKING:
    from FreqSegLib.spectral_segmentation import SpectralSegmenter
    from FreqSegLib.text_segmentation import TextSegmenter
    from FreqSegLib.volume import Volume
    from FreqSegLib.volume_fusion import VolumeFuser

_LATE = {
    "SpectralSegmenter": "FreqSegLib.spectral_segmentation",
    "TextSegmenter": "FreqSegLib.text_segmentation",
    "Volume": "FreqSegLib.volume",
    "VolumeFuser": "FreqSegLib.volume_fusion",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'FreqSegLib' has no attribute '{name}'")
