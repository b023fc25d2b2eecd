"""The forms SpectralVMUNet comes in, as its settings."""

from __future__ import annotations

from typing import Any

FORMS: dict[str, dict[str, Any]] = {
    "patches": {},
    "convolutions": {"stem": "convolutions"},
    "convolutions in every stage": {"stem": "convolutions", "stage_convolutions": 1},
}
