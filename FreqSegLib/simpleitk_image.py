"""SimpleITK's images as arrays and affines, with its failures as sentences and its console kept quiet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError

LUMINANCE = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue."""

READABLE = "NRRD, NIfTI, MetaImage, PNG, JPEG, TIFF, BMP or DICOM"


def open_image(path: Path, image_io: str = "") -> Any:
    """The SimpleITK image of a file.

    Args:
        path: an existing file.
        image_io: the ITK reader to use, or empty to let ITK find one.

    Raises:
        InputError: ITK cannot read it.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return sitk.ReadImage(str(path), imageIO=image_io)
    except RuntimeError as problem:
        raise InputError(f"{path}: {_reason(str(problem))}") from problem


def affine_of(image: Any) -> NDArray[np.float64]:
    """(4, 4) voxel (i, j, k) to LPS; a 2D image is put into the plane of its first two axes."""
    dimension = image.GetDimension()
    used = min(dimension, 3)
    direction = np.array(image.GetDirection(), dtype=np.float64).reshape(dimension, dimension)[:used, :used]
    affine = np.eye(4)
    affine[:used, :used] = direction * np.array(image.GetSpacing()[:used])
    affine[:used, 3] = image.GetOrigin()[:used]
    return affine


def grey(array: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """Colour as luminance.

    Args:
        array: (..., c) with grey and alpha, RGB, or RGB and alpha.

    Returns:
        The array without its last axis, of the same type, and what was done in words.
    """
    channels = array.shape[-1]
    alpha = " and its transparency left out" if channels in (2, 4) else ""
    if channels == 2:
        return np.ascontiguousarray(
            array[..., 0]
        ), "grey with transparency: the grey is used, the transparency left out"
    red, green, blue = (array[..., channel] for channel in range(3))
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return np.ascontiguousarray(red), f"stored as colour but all grey: read as grey{alpha}"
    luminance = sum(weight * array[..., channel] for channel, weight in enumerate(LUMINANCE))
    if np.issubdtype(array.dtype, np.integer):
        luminance = np.rint(luminance)
    return np.asarray(luminance).astype(array.dtype), f"a colour image: turned into luminance{alpha}"


def choose_frame(count: int, frame: int | None, name: str, kind: str) -> int:
    """Which of ``count`` volumes or images to take.

    Raises:
        InputError: none was chosen though there are several, or the choice is out of range.
    """
    if frame is None:
        if count == 1:
            return 0
        raise InputError(f"{name} holds {count} {kind}; choose one, 0 to {count - 1} (--frame 0)")
    if not 0 <= frame < count:
        raise InputError(f"{name} holds {count} {kind}: frame must be 0 to {count - 1}, got {frame}")
    return frame


def _reason(message: str) -> str:
    if "Unable to determine ImageIO reader" in message:
        return f"this is not an image that can be read ({READABLE}), or it is damaged"
    if "Unknown PixelType" in message:
        return "this kind of pixel is not supported; save the image as grey values or RGB"
    if "Zero-valued spacing" in message:
        return "spacing must be > 0 on every axis, and the file has 0; repair its header"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    detail = re.sub(r"^(?:ITK ERROR|sitk::ERROR|itk::ERROR): |\b\w+\(0x[0-9a-f]+\): ", "", lines[-1]) if lines else ""
    return f"the image cannot be read; the file is damaged or incomplete ({detail.strip(' .')})"
