"""Volume: voxels with their place in the patient, read from and written to the files radiology uses.

The array is (k, j, i), the geometry one affine from voxel indices to LPS millimetres, as SimpleITK and DICOM have it.
Nothing here or downstream flips anything by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.dicom import DicomSeries, list_series
from FreqSegLib.errors import InputError
from FreqSegLib.segmentation_file import Segment, write_segmentation

__all__ = ["DicomSeries", "Segment", "Volume", "list_series", "write_segmentation"]


@dataclass(frozen=True, eq=False)
class Volume:
    """A scalar image on a grid that is placed in the patient."""

    array: NDArray[Any]
    """(k, j, i) voxels in C order, of the type the file has. A 2D image has k == 1."""
    affine: NDArray[np.float64]
    """(4, 4): (i, j, k, 1) to LPS in mm. Axes may be oblique, flipped or sheared (gantry tilt)."""
    name: str = "volume"
    modality: str | None = None
    """As in DICOM: CT, MR, US, CR, DX ...; None when unknown."""
    spatial_dimension: int = 3
    """2 for an image file without a place in the patient."""
    description: str = ""
    """The DICOM series description, or empty."""
    warnings: tuple[str, ...] = ()
    """What the user should know about how the file was read."""
    patient: str = ""
    """DICOM's patient name and ID, only to tell whether two volumes are of one person; never written."""
    frame_of_reference: str = ""
    """DICOM's UID of what positions refer to; positions under different ones do not compare."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """How the volume was made, by name (``freqseg_...``): kept in the header of NRRD and MetaImage files."""

    def __post_init__(self) -> None:
        if self.array.ndim != 3 or self.array.size == 0:
            raise InputError(f"{self.name}: a volume is a (k, j, i) array with voxels, got shape {self.array.shape}")
        if self.spatial_dimension not in (2, 3):
            raise InputError(f"{self.name}: spatial_dimension must be 2 or 3, got {self.spatial_dimension}")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError(f"{self.name}: the affine must be 4 x 4 finite numbers, got\n{affine}")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if not lengths.min() > 0:
            raise InputError(f"{self.name}: spacing must be > 0 on every axis, got {_plain(lengths)} mm")
        if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
            raise InputError(f"{self.name}: two axes of the grid point the same way, so it has no volume:\n{affine}")
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (k, j, i)."""
        k, j, i = self.array.shape
        return k, j, i

    @property
    def spacing(self) -> NDArray[np.float64]:
        """(3,) distance of neighbouring voxels along i, j, k in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def origin(self) -> NDArray[np.float64]:
        """(3,) LPS position of the centre of voxel (0, 0, 0) in mm."""
        return self.affine[:3, 3].copy()

    @property
    def direction(self) -> NDArray[np.float64]:
        """(3, 3) unit vectors of the i, j, k axes as columns; not orthogonal where the grid is sheared."""
        return self.affine[:3, :3] / self.spacing

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        series: str | None = None,
        frame: int | None = None,
        fill_nonfinite: float | None = None,
    ) -> Volume:
        """Read NRRD, NIfTI, MetaImage, PNG, JPEG, TIFF, BMP, one DICOM file or a folder of DICOM files.

        Args:
            path: a file, or a folder with DICOM files at any depth.
            series: which series of a DICOM folder: its UID, number or description. Needed if there are several.
            frame: which volume of a time series or multi-channel file, counted from 0.
            fill_nonfinite: value for NaN and infinite voxels, instead of refusing them.

        Returns:
            The volume with voxels as they are stored (rescaled where the file says so); colour is turned into
            luminance. ``warnings`` says what was changed or is unusual.

        Raises:
            InputError: the file is missing, damaged or no image; it holds several series or frames and none was
                chosen; voxels are not finite; or its geometry is invalid.
        """
        source = Path(path)
        if not source.exists():
            raise InputError(f"{source}: no such file or folder")
        if source.is_dir():
            from FreqSegLib.dicom import read_series

            volume = read_series(source, series=series, frame=frame)
        elif series is not None:
            raise InputError(f"{source} is a file; a series ({series!r}) can only be chosen from a DICOM folder")
        else:
            from FreqSegLib.image_file import read_image

            volume = read_image(source, frame=frame)
        return _finite(volume, fill_nonfinite)

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write NRRD, NIfTI or MetaImage; PNG or TIFF for a single slice. The extension decides.

        The file appears complete or not at all.

        Returns:
            The path written.

        Raises:
            OutputError: the file exists and ``overwrite`` is off, the format is unknown or cannot hold the volume, the
                folder cannot be written, or the disk is full.
        """
        from FreqSegLib.image_file import write_image

        return write_image(Path(path), self, overwrite=overwrite)

    def with_array(self, array: NDArray[Any], *, name: str | None = None) -> Volume:
        """Other voxels on the same grid, of any type."""
        if array.shape != self.array.shape:
            raise InputError(f"{self.name}: an array of shape {self.array.shape} is needed, got {array.shape}")
        return replace(self, array=array, name=self.name if name is None else name)


def _finite(volume: Volume, fill: float | None) -> Volume:
    if not np.issubdtype(volume.array.dtype, np.floating):
        return volume
    bad = ~np.isfinite(volume.array)
    count = int(bad.sum())
    if count == 0:
        return volume
    if fill is None:
        raise InputError(
            f"{volume.name}: {count} of {volume.array.size} voxels are NaN or infinite; "
            "give a value to fill them with (fill_nonfinite; in a shell --fill-nonfinite 0), or repair the file"
        )
    array = volume.array.copy()
    array[bad] = fill
    warning = f"{volume.name}: {count} voxels were NaN or infinite and are now {fill:g}"
    return replace(volume, array=array, warnings=(*volume.warnings, warning))


def _plain(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
