"""Intensities of a whole volume brought to [0, 1]: windows for CT, robust percentiles for everything else.

The two bounds are found once for the whole volume, so neighbouring slices look alike and an empty slice stays dark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError, SettingsError

if TYPE_CHECKING:
    from FreqSegLib.volume import Volume

WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (40.0, 80.0),
    "lung": (-600.0, 1500.0),
    "soft": (40.0, 400.0),
    "bone": (400.0, 1800.0),
}
"""Named CT windows: (level, width) in Hounsfield units."""

DEFAULT_CT_WINDOW = "soft"
PERCENTILES = (0.5, 99.5)
LARGEST_SAMPLE = 2_000_000

_PERCENTILE_NAMES = ("percentile", "mr", "us", "cr", "dx", "mg", "xr", "xa", "rf", "pt", "nm", "ot")
_LEVEL_WIDTH = re.compile(r"\s*([+-]?\d+(?:\.\d+)?)\s*/\s*([+-]?\d+(?:\.\d+)?)\s*")


@dataclass(frozen=True)
class Normalised:
    """How a volume's intensities map to [0, 1]: ``low`` and below to 0, ``high`` and above to 1."""

    low: float
    high: float
    label: str
    """What was done, in words."""
    warnings: tuple[str, ...] = ()

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Values of any shape and type as float32 in [0, 1]; the input is untouched."""
        exact = np.float32 if values.dtype.itemsize <= 2 or values.dtype == np.float32 else np.float64
        low, width = exact(self.low), exact(self.high - self.low)
        scaled: NDArray[np.floating[Any]] = values.astype(exact)
        return np.clip((scaled - low) / width, 0.0, 1.0).astype(np.float32, copy=False)


def normalise(volume: Volume, modality_or_window: str = "auto") -> Normalised:
    """Find how a volume's intensities map to [0, 1].

    Args:
        volume: finite scalar voxels.
        modality_or_window: ``auto``; a CT window by name (``brain``, ``lung``, ``soft``, ``bone``) or as
            ``level/width`` in HU (``40/80``); ``CT`` (the soft window); or ``percentile``, which ``MR``, ``US``, ``CR``
            and the like also mean: the 0.5th to the 99.5th percentile, blind to the background. ``auto`` takes ``CT``
            when the volume says it is CT or its voxels look like Hounsfield units, and ``percentile`` otherwise.

    Returns:
        Normalised, to ``apply`` to slices.

    Raises:
        InputError: voxels are NaN or infinite, or all have the same value.
        SettingsError: the name is unknown, or the window holds none of the volume's values.
    """
    window = _window(modality_or_window)
    low, high = float(volume.array.min()), float(volume.array.max())
    if not (isfinite(low) and isfinite(high)):
        bad = int(volume.array.size - np.isfinite(volume.array).sum())
        raise InputError(f"{volume.name}: {bad} voxels are NaN or infinite; read it with a fill value or repair it")
    if low == high:
        raise InputError(
            f"{volume.name}: every voxel has the value {low:g}, so there is nothing to see; check the file or the frame"
        )
    if window is not None:
        return _windowed(volume, *window, low, high)
    choice = modality_or_window.strip().lower()
    if choice == "ct" or (choice == "auto" and (_says_ct(volume) or _looks_like_hounsfield(volume, low))):
        if volume.array.dtype.itemsize > 1:
            return _windowed(volume, DEFAULT_CT_WINDOW, *WINDOWS[DEFAULT_CT_WINDOW], low, high)
        found = _between_percentiles(volume, low, high)
        warning = f"{volume.name}: a CT in 8 bits holds no Hounsfield units; its own grey range is used, not a window"
        return Normalised(found.low, found.high, found.label, (warning,))
    return _between_percentiles(volume, low, high)


def in_hounsfield_units(volume: Volume) -> bool:
    """Whether a volume is a CT whose window can be chosen: it says so or looks like it, in more than 8 bits."""
    if volume.array.dtype.itemsize == 1:
        return False
    return _says_ct(volume) or _looks_like_hounsfield(volume, float(volume.array.min()))


def _window(text: str) -> tuple[str, float, float] | None:
    """(name, level, width) if ``text`` is a window, None if it names a modality or ``auto``."""
    name = text.strip().lower()
    if name in WINDOWS:
        return (name, *WINDOWS[name])
    match = _LEVEL_WIDTH.fullmatch(text)
    if match:
        level, width = float(match[1]), float(match[2])
        if width <= 0:
            raise SettingsError(f"a window's width must be > 0, got {width:g} in {text!r} (level/width, like 40/80)")
        return (name, level, width)
    if name in ("auto", "ct", *_PERCENTILE_NAMES):
        return None
    raise SettingsError(
        f"unknown intensity setting {text!r}: give auto, a CT window ({', '.join(WINDOWS)}, or level/width like "
        "40/80), a modality (CT, MR, US, CR, DX) or percentile"
    )


def _windowed(volume: Volume, name: str, level: float, width: float, lowest: float, highest: float) -> Normalised:
    low, high = level - width / 2, level + width / 2
    if highest <= low or lowest >= high:
        raise SettingsError(
            f"{volume.name}: the window {name} ({low:g} to {high:g}) holds none of the volume's values "
            f"({lowest:g} to {highest:g}); choose another window, or percentile if this is not a CT in Hounsfield units"
        )
    label = f"CT window {name}: level {level:g}, width {width:g} HU"
    if lowest < 0:
        return Normalised(low, high, label)
    warning = (
        f"{volume.name}: no voxel is below {lowest:g}, where a CT in Hounsfield units has fat and air; "
        "if its values are shifted, the window shows the wrong tissue"
    )
    return Normalised(low, high, label, (warning,))


def _says_ct(volume: Volume) -> bool:
    return (volume.modality or "").upper() == "CT"


def _looks_like_hounsfield(volume: Volume, lowest: float) -> bool:
    """Air near -1000 and whole numbers: only asked when nothing else says what the volume is."""
    if volume.modality is not None or lowest > -500:
        return False
    sample = _sample(volume.array)
    return bool(np.mean(np.abs(sample - np.round(sample)) < 1e-3) > 0.99)


def _between_percentiles(volume: Volume, lowest: float, highest: float) -> Normalised:
    """Bounds that a large or padded background, or a few wild voxels, cannot move.

    Padding (the minimum, often most of the volume) is left out. The upper bound is taken among voxels above the mean,
    since air that is noisy but dark would otherwise push it down into the tissue.
    """
    sample = _sample(volume.array)
    inside = sample[sample > lowest]
    if inside.size:
        low = float(np.percentile(inside, PERCENTILES[0]))
        cut = np.minimum(inside, np.percentile(inside, 99.9)).mean()
        bright = inside[inside > cut]
        high = float(np.percentile(bright if bright.size else inside, PERCENTILES[1]))
        if high > low:
            return Normalised(low, high, f"percentiles {PERCENTILES[0]:g} to {PERCENTILES[1]:g}: {low:g} to {high:g}")
    return Normalised(lowest, highest, f"full range: {lowest:g} to {highest:g}")


def _sample(array: NDArray[Any]) -> NDArray[np.float64]:
    """At most LARGEST_SAMPLE voxels, the same ones every time, spread over all three axes."""
    step = -(-array.size // LARGEST_SAMPLE)
    # A step that shares a factor with a side of the volume would meet the same columns again and again.
    while any(gcd(step, side) > 1 for side in array.shape) and step > 1:
        step += 1
    return array.ravel(order="K")[::step].astype(np.float64)
