"""Volumes from and to single files: NRRD, NIfTI, MetaImage, PNG, JPEG, TIFF, BMP."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError, OutputError
from FreqSegLib.header_checks import (
    SFORM_CODE_AT,
    NiftiHeader,
    check_meta_image,
    check_nifti,
    check_nrrd,
    check_picture,
    open_plain,
    read_nifti_header,
)
from FreqSegLib.output_file import replacing
from FreqSegLib.simpleitk_image import affine_of, choose_frame, grey, open_image

if TYPE_CHECKING:
    from FreqSegLib.volume import Volume

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
WRITABLE = (".nrrd", ".seg.nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd", ".png", ".tif", ".tiff")
KEEP_NOTES = (".nrrd", ".nhdr", ".mha", ".mhd")
"""Formats whose header keeps ``Volume.notes``."""
_NOTES = "freqseg_"
_PICTURE_TYPES = {".png": ("uint8", "uint16"), ".tif": ("uint8", "uint16", "float32")}
_PNG_GREY_ALPHA = 4
_SHEAR_TOLERANCE = 1e-4
_NO_ORIENTATION = "the file does not record its orientation; left and right may be exchanged"


def suffix_of(path: Path) -> str:
    """The extension in lower case; ``.nii.gz`` and ``.seg.nrrd`` count as one."""
    name = path.name.lower()
    return next((double for double in (".nii.gz", ".seg.nrrd") if name.endswith(double)), path.suffix.lower())


def stem_of(path: Path) -> str:
    """The file name without its extension."""
    return path.name[: len(path.name) - len(suffix_of(path))] or path.name


def read_image(path: Path, *, frame: int | None = None) -> Volume:
    """One file as a Volume; see ``Volume.read``."""
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    suffix = suffix_of(path)
    if suffix not in (*PICTURES, *WRITABLE):
        from FreqSegLib.dicom import is_dicom, read_file

        if is_dicom(path):
            return read_file(path, frame=frame)
    if suffix in (".nii", ".nii.gz"):
        return _read_nifti(path, frame)
    if suffix in (".nrrd", ".seg.nrrd", ".nhdr"):
        check_nrrd(path)
    elif suffix in (".mha", ".mhd"):
        check_meta_image(path)
    elif suffix in PICTURES:
        check_picture(path)
    image = open_image(path) if suffix not in PICTURES else _open_picture(path)
    volume = _with_shear_noted(_volume(path, image, frame))
    if "nrrd" in suffix and volume.spatial_dimension == 3 and not image.HasMetaDataKey("NRRD_space"):
        return _warned(volume, f"{path.name}: {_NO_ORIENTATION}")
    return volume


def write_image(path: Path, volume: Volume, *, overwrite: bool = False) -> Path:
    """Write a Volume, complete or not at all; see ``Volume.write``."""
    check_writable(path, volume)
    with replacing([path], overwrite=overwrite) as (temporary,):
        save(temporary, volume)
    return path


def check_writable(path: Path, volume: Volume) -> None:
    """Whether the format the extension stands for can hold the volume.

    Raises:
        OutputError: it cannot, or the extension is unknown.
    """
    suffix = suffix_of(path)
    if suffix not in WRITABLE:
        raise OutputError(f"cannot write {path}: the extension must be one of {', '.join(WRITABLE)}, got {suffix!r}")
    if suffix in PICTURES:
        kind = ".tif" if suffix == ".tiff" else suffix
        if volume.shape[0] != 1:
            raise OutputError(f"cannot write {path}: a picture holds one slice, this has {volume.shape[0]}; use .nrrd")
        if volume.array.dtype != bool and volume.array.dtype.name not in _PICTURE_TYPES[kind]:
            raise OutputError(
                f"cannot write {path}: {kind} holds {', '.join(_PICTURE_TYPES[kind])}, "
                f"the voxels are {volume.array.dtype}; use .nrrd"
            )
    elif suffix in (".nii", ".nii.gz") and _shear(volume.affine) > _SHEAR_TOLERANCE:
        raise OutputError(
            f"cannot write {path}: the slices are sheared (gantry tilt), which readers of NIfTI refuse or straighten; "
            "use .nrrd or .mha"
        )


def check_answer(path: Path, volume: Volume, kind: type[np.uint8 | np.float32]) -> None:
    """:func:`check_writable` for labels (uint8) or a map (float32) on the volume's grid, before there is one."""
    check_writable(path, volume.with_array(np.broadcast_to(kind(0), volume.shape)))


def save(path: Path, volume: Volume) -> None:
    """Write a Volume straight to ``path``, without the care of ``write_image``."""
    import SimpleITK as sitk

    array = volume.array
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    flat = suffix_of(path) in PICTURES
    array = np.ascontiguousarray(array[0] if flat else array, dtype=array.dtype.newbyteorder("="))
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(value) for value in volume.spacing[: image.GetDimension()]])
    if not flat:
        image.SetOrigin([float(value) for value in volume.origin])
        image.SetDirection([float(value) for value in volume.direction.ravel()])
    if suffix_of(path) in KEEP_NOTES:
        for name, text in volume.notes.items():
            image.SetMetaData(name, text)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        sitk.WriteImage(image, str(path), useCompression=not flat)
        if suffix_of(path) in (".nii", ".nii.gz"):
            _check_written(path)
    except (RuntimeError, InputError) as problem:
        free = shutil.disk_usage(path.parent).free
        if free < array.nbytes:
            raise OutputError(
                f"cannot write {path.name}: the disk is full ({free / 1e6:.1f} MB are free, "
                f"up to {array.nbytes / 1e6:.1f} MB are needed); free some space, or write elsewhere"
            ) from problem
        raise OutputError(f"cannot write {path.name}: {str(problem).strip().splitlines()[-1]}") from problem


def _check_written(path: Path) -> None:
    """ITK's NIfTI writer ends in silence where the disk is full."""
    header = read_nifti_header(path)
    if header is None:
        raise InputError("the file is incomplete")
    check_nifti(path, header)


def _shear(affine: NDArray[np.float64]) -> float:
    """The largest cosine between two of the grid's axes: 0 where they are orthogonal."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def _volume(path: Path, image: Any, frame: int | None, nan_at: NDArray[np.int64] | None = None) -> Volume:
    """An image's chosen volume; where ``nan_at``, counted in the order of a NIfTI's voxels, it is made NaN again."""
    import SimpleITK as sitk

    from FreqSegLib.volume import Volume

    if "complex" in image.GetPixelIDTypeAsString():
        raise InputError(f"{path}: the voxels are complex numbers; save their magnitude and use that")
    if not 2 <= image.GetDimension() <= 5:
        raise InputError(f"{path}: an image of 2 or 3 dimensions is needed, this has {image.GetDimension()}")
    array = sitk.GetArrayFromImage(image)
    warnings: list[str] = []
    components = image.GetNumberOfComponentsPerPixel()
    if nan_at is not None and nan_at.size:
        # a NIfTI has one image after another where ITK has vectors
        in_file = np.moveaxis(array, -1, 0) if components > 1 else array
        in_file[np.unravel_index(nan_at, in_file.shape)] = np.nan
    if components > 1 and _is_colour(path, image, components):
        array, note = grey(array)
        warnings.append(f"{path.name}: {note}")
    elif components > 1:
        array = np.ascontiguousarray(array[..., choose_frame(components, frame, str(path), "values for each voxel")])
    elif image.GetDimension() > 3:
        array = _one_volume(path, array, frame)
    else:
        choose_frame(1, frame, str(path), "volume")
    return Volume(
        array=array[None] if array.ndim == 2 else array,
        affine=affine_of(image),
        name=stem_of(path),
        spatial_dimension=min(image.GetDimension(), 3),
        warnings=tuple(warnings),
        notes={key: image.GetMetaData(key) for key in image.GetMetaDataKeys() if key.startswith(_NOTES)},
    )


def _open_picture(path: Path) -> Any:
    """The SimpleITK image of a picture; Pillow brings in grey with transparency, which SimpleITK has no type for."""
    with path.open("rb") as file:
        head = file.read(26)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[25] != _PNG_GREY_ALPHA:
        return open_image(path)
    import SimpleITK as sitk
    from PIL import Image

    with Image.open(path) as picture:
        image = sitk.GetImageFromArray(np.asarray(picture.convert("LA")), isVector=True)
        per_inch = picture.info.get("dpi", (25.4, 25.4))
    image.SetSpacing([25.4 / float(value) if value > 0 else 1.0 for value in per_inch])
    return image


def _is_colour(path: Path, image: Any, components: int) -> bool:
    if suffix_of(path) in PICTURES:
        return components in (2, 3, 4)
    kind = image.GetMetaData("NRRD_kinds[pixel]") if image.HasMetaDataKey("NRRD_kinds[pixel]") else ""
    if kind:
        return "color" in kind.lower() and components in (3, 4)
    return components in (3, 4) and image.GetPixelIDTypeAsString() == "vector of 8-bit unsigned integer"


def _one_volume(path: Path, array: NDArray[Any], frame: int | None) -> NDArray[Any]:
    """The chosen volume of a (..., k, j, i) array."""
    extra, space = array.shape[:-3], array.shape[-3:]
    if sum(count > 1 for count in extra) > 1:
        raise InputError(f"{path}: an image of 3 dimensions and time is needed, this has {extra[::-1]} beyond 3")
    chosen = choose_frame(prod(extra), frame, str(path), "volumes (time points or channels)")
    return np.ascontiguousarray(array.reshape(-1, *space)[chosen])


def _read_nifti(path: Path, frame: int | None) -> Volume:
    header = read_nifti_header(path)
    if header is None:
        return _volume(path, open_image(path), frame)
    bad = check_nifti(path, header)
    if header.sform_code > 0 and header.qform_code <= 0 and _is_sheared(path, header):
        return _with_shear_noted(replace(_volume(path, _open_unplaced(path), frame, bad), affine=header.sform))
    volume = _volume(path, open_image(path), frame, bad)
    if volume.spatial_dimension == 3 and max(header.sform_code, header.qform_code) <= 0:
        return _warned(volume, f"{path.name}: {_NO_ORIENTATION}")
    if volume.spatial_dimension == 3 and header.sform_code > 0:
        apart = _largest_distance(volume.affine, header.sform, volume.shape)
        if apart > 0.1 * volume.spacing.min():
            return _warned(
                volume,
                f"{path.name}: the placements in its header (sform, qform, spacing) disagree by up to {apart:.2f} mm; "
                "it is placed where ITK and 3D Slicer place it, other programs may differ",
            )
    return volume


def _warned(volume: Volume, *warnings: str) -> Volume:
    return replace(volume, warnings=(*volume.warnings, *warnings))


def _with_shear_noted(volume: Volume) -> Volume:
    shear = _shear(volume.affine)
    if shear <= _SHEAR_TOLERANCE:
        return volume
    return _warned(
        volume,
        f"{volume.name}: two of its axes are {np.degrees(np.arcsin(shear)):.2f} degrees off a right angle; "
        "this is kept, but not every program shows such an image correctly",
    )


def _is_sheared(path: Path, header: NiftiHeader) -> bool:
    lengths = np.linalg.norm(header.sform[:3, :3], axis=0)
    if not np.isfinite(header.sform).all() or not lengths.min() > 0:
        raise InputError(
            f"{path}: the sform in its header is no placement (a zero or infinite axis); repair the header"
        )
    return _shear(header.sform) > _SHEAR_TOLERANCE


def _open_unplaced(path: Path) -> Any:
    """The image of a NIfTI whose placement ITK refuses: read from a copy that claims no placement."""
    with tempfile.TemporaryDirectory(prefix="freqseg-") as folder:
        copy = Path(folder) / "image.nii"
        with open_plain(path) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
            target.seek(SFORM_CODE_AT)
            target.write(b"\0\0")
        return open_image(copy)


def _largest_distance(one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, int, int]) -> float:
    """How far apart two affines put a corner of the volume, in mm."""
    corners = np.array(np.meshgrid(*[(0, count - 1) for count in shape[::-1]], [1])).reshape(4, -1)
    return float(np.linalg.norm((one - other) @ corners, axis=0).max())
