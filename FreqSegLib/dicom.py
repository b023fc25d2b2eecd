"""DICOM images: the series in a folder, and one of them as a Volume.

Geometry is taken from each slice's ImagePositionPatient and ImageOrientationPatient, never from slice thickness, and
where the slices do not form a regular grid that is said with the numbers.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError
from FreqSegLib.simpleitk_image import affine_of, choose_frame, grey, open_image
from FreqSegLib.slice_positions import SlicePlane, arrange_slices

if TYPE_CHECKING:
    from FreqSegLib.volume import Volume

_DICOM_SUFFIXES = ("", ".dcm", ".dicom", ".ima")
_STORAGE = "1.2.840.10008.5.1.4.1.1."
# Objects without pixels of their own: waveforms, presentation states, raw data, registrations, segmentations,
# measurements, reports, documents, RT plans and structures.
_NO_IMAGE = ("9.", "11.", "66", "67", "68", "88.", "104.", "481.3", "481.4", "481.5", "481.6", "481.7", "481.8")
_NO_IMAGE_MODALITIES = ("SEG", "RTSTRUCT", "RTPLAN", "RTRECORD", "SR", "PR", "KO", "REG", "FID", "RWV", "DOC")
_FLAT_MODALITIES = ("CR", "DX", "MG", "US", "ES", "XA", "RF", "XC", "GM", "SM", "OP", "IO", "PX", "OT", "SC", "IVUS")
_CHARACTER_SETS = {
    "ISO_IR 100": "latin-1",
    "ISO 2022 IR 100": "latin-1",
    "ISO_IR 101": "iso8859-2",
    "ISO_IR 144": "iso8859-5",
    "ISO_IR 126": "iso8859-7",
    "ISO_IR 148": "iso8859-9",
    "ISO_IR 13": "shift_jis",
    "ISO_IR 192": "utf-8",
    "GB18030": "gb18030",
    "GBK": "gbk",
}

_PIXEL_DATA = b"\xe0\x7f\x10\x00"


@dataclass(frozen=True)
class DicomSeries:
    """One series of images, as a list for the user shows it."""

    uid: str
    number: int | None
    description: str
    modality: str
    slices: int

    def __str__(self) -> str:
        number = "-" if self.number is None else str(self.number)
        images = "1 slice" if self.slices == 1 else f"{self.slices} slices"
        return f"{number:>6}  {self.modality:<3} {images:>11}  {self.description or '(no description)'}  {self.uid}"


@dataclass(frozen=True)
class _Instance:
    """The tags of one DICOM file that place its pixels."""

    path: Path
    uid: str
    series_uid: str
    series_number: int | None
    description: str
    modality: str
    photometric: str
    number: int
    frames: int
    size: tuple[int, int]
    """(rows, columns)."""
    pixel_spacing: tuple[float, ...]
    thickness: float
    position: tuple[float, ...]
    """(3,) LPS mm, or empty."""
    orientation: tuple[float, ...]
    """(6,) cosines of a row and of a column, or empty."""
    patient: str
    """Name and ID."""
    frame_of_reference: str
    moment: tuple[float, ...]
    """What tells images at the same place apart, in the order they were made."""

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.orientation[:3], self.orientation[3:])


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its preamble, or by GDCM's judgement for files that have none."""
    with path.open("rb") as file:
        if file.read(132)[128:] == b"DICM":
            return True
    if path.suffix.lower() not in _DICOM_SUFFIXES:
        return False
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return bool(sitk.ImageFileReader.GetImageIOFromFileName(str(path)) == "GDCMImageIO")


def list_series(folder: str | Path) -> list[DicomSeries]:
    """The image series in a folder and the folders in it, by series number.

    Files that are not DICOM, and DICOM objects that are no images (segmentations, reports, structure sets), are passed
    over.

    Raises:
        InputError: the folder does not exist or holds no DICOM image.
    """
    return [_described(instances) for instances in _collect(Path(folder))[0]]


def read_series(folder: Path, *, series: str | None = None, frame: int | None = None) -> Volume:
    """One series of a folder as a Volume; see ``Volume.read``."""
    found, unreadable = _collect(folder)
    instances = _chosen(folder, found, series)
    # Without one of its slices a series would be another volume, so that is refused; other damage is only told.
    uid = instances[0].series_uid.encode("ascii", "replace")
    lost = [path for path in unreadable if uid in path.read_bytes()]
    if lost:
        raise InputError(
            f"{folder}: {len(lost)} of this series' files are damaged or incomplete ({_names(lost)}); "
            "fetch them again, or take them out of the folder to go on without them"
        )
    warnings = []
    if unreadable:
        warnings.append(f"{folder.name}: damaged DICOM files were passed over ({_names(unreadable)})")
    return _volume(instances, frame, warnings)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} others" if len(paths) > 3 else "")


def read_file(path: Path, *, frame: int | None = None) -> Volume:
    """One DICOM file, a slice or a multi-frame object, as a Volume; see ``Volume.read``."""
    if _holds_no_image(path):
        raise InputError(f"{path}: this DICOM object is no image (a segmentation, report or the like)")
    instance = _instance(path)
    if instance is None:
        raise InputError(f"{path}: the DICOM file is damaged or incomplete, or holds no image")
    if instance.modality in _NO_IMAGE_MODALITIES:
        raise InputError(f"{path}: this DICOM object is no image (its modality is {instance.modality})")
    warnings = []
    if instance.frames == 1 and instance.modality not in _FLAT_MODALITIES and instance.position:
        warnings.append(f"{path.name}: this is one slice; give its folder to read the whole series")
    return _volume([instance], frame, warnings)


def _collect(folder: Path) -> tuple[list[list[_Instance]], list[Path]]:
    """The image series under a folder, and the DICOM files that could not be read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    series: dict[str, dict[str, _Instance]] = {}
    unreadable = []
    for path in _files(folder):
        if not is_dicom(path) or _holds_no_image(path):
            continue
        instance = _instance(path)
        if instance is None:
            unreadable.append(path)
        elif instance.modality not in _NO_IMAGE_MODALITIES:
            # The same object may lie in two folders of an export; it is one slice.
            series.setdefault(instance.series_uid, {}).setdefault(instance.uid or str(path), instance)
    if not series:
        damaged = f"; {len(unreadable)} DICOM files in it are damaged" if unreadable else ""
        raise InputError(f"{folder}: no DICOM image in this folder{damaged}; for another format, give the file itself")
    found = [list(instances.values()) for instances in series.values()]
    found.sort(key=lambda instances: (instances[0].series_number is None, instances[0].series_number or 0))
    return found, unreadable


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if name != "DICOMDIR" and path.is_file():
                yield path


def _described(instances: Sequence[_Instance]) -> DicomSeries:
    first = instances[0]
    return DicomSeries(
        uid=first.series_uid,
        number=first.series_number,
        description=first.description,
        modality=first.modality,
        slices=sum(instance.frames for instance in instances),
    )


def _chosen(folder: Path, found: list[list[_Instance]], wanted: str | None) -> list[_Instance]:
    if wanted is None:
        if len(found) == 1:
            return found[0]
        problem = f"{folder} holds {len(found)} series; choose one by number, description or UID (--series NUMBER)"
        raise InputError(_with_list(problem, found))
    text = wanted.strip().lower()
    for matches in (
        [one for one in found if one[0].series_uid == wanted.strip()],
        [one for one in found if str(one[0].series_number) == text],
        [one for one in found if one[0].description.lower() == text],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            problem = f"{len(matches)} series in {folder} match {wanted!r}; choose one by its UID (--series UID)"
            raise InputError(_with_list(problem, matches))
    raise InputError(_with_list(f"no series in {folder} has the number, description or UID {wanted!r}", found))


def _with_list(problem: str, found: list[list[_Instance]]) -> str:
    return "\n".join([f"{problem}:", *(str(_described(instances)) for instances in found)])


def _holds_no_image(path: Path) -> bool:
    """Whether the file's meta header says it is an object without an image, or a directory of files."""
    with path.open("rb") as file:
        head = file.read(1024)
    at = head.find(b"\x02\x00\x02\x00UI")
    if at < 0:
        return False
    length = struct.unpack_from("<H", head, at + 6)[0]
    uid = head[at + 8 : at + 8 + length].rstrip(b"\0 ").decode("latin1")
    return uid == "1.2.840.10008.1.3.10" or uid.removeprefix(_STORAGE).startswith(_NO_IMAGE)


def _instance(path: Path) -> _Instance | None:
    """The tags of one file, or None if GDCM cannot make an image of it."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None

    def raw(tag: str) -> bytes:
        # SimpleITK takes all text for UTF-8; bytes that are not come as surrogates.
        value = reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else ""
        return bytes(value.encode("utf-8", "surrogateescape")).strip(b" \0")

    charset = _CHARACTER_SETS.get(raw("0008|0005").decode("ascii", "replace").split("\\")[-1].strip(), "utf-8")

    def text(tag: str) -> str:
        return raw(tag).decode(charset, "replace")

    def numbers(tag: str, count: int) -> tuple[float, ...]:
        try:
            values = tuple(float(word) for word in text(tag).split("\\"))
        except ValueError:
            return ()
        return values if len(values) == count and all(np.isfinite(values)) else ()

    def number(tag: str) -> float:
        values = numbers(tag, 1)
        return values[0] if values else 0.0

    series_number = numbers("0020|0011", 1)
    size = reader.GetSize()
    return _Instance(
        path=path,
        uid=text("0008|0018"),
        series_uid=text("0020|000e"),
        series_number=int(series_number[0]) if series_number else None,
        description=text("0008|103e"),
        modality=text("0008|0060").upper(),
        photometric=text("0028|0004").upper(),
        number=int(number("0020|0013")),
        frames=size[2] if len(size) > 2 else 1,
        size=(size[1], size[0]),
        pixel_spacing=numbers("0028|0030", 2) or numbers("0018|1164", 2),
        thickness=number("0018|0088") or number("0018|0050"),
        position=numbers("0020|0032", 3),
        orientation=numbers("0020|0037", 6),
        patient=" ".join(word for word in (text("0010|0010"), text("0010|0020")) if word),
        frame_of_reference=text("0020|0052"),
        moment=(
            number("0020|0100"),
            number("0018|0086"),
            number("0018|1060"),
            number("0008|0032"),
            number("0020|0013"),
        ),
    )


def _volume(instances: list[_Instance], frame: int | None, warnings: list[str]) -> Volume:
    from FreqSegLib.volume import Volume

    first = instances[0]
    name = first.description or _unnamed(first)
    if any(instance.frames > 1 for instance in instances):
        content = _multi_frame(instances, frame, name)
    elif all(instance.position and instance.orientation for instance in instances):
        content = _stack(instances, frame, name)
    else:
        content = _picture(instances, frame, name)
    return Volume(
        array=content.array,
        affine=content.affine,
        name=name,
        modality=first.modality or None,
        spatial_dimension=content.spatial_dimension,
        description=first.description,
        warnings=(*warnings, *content.warnings),
        patient=first.patient,
        frame_of_reference=first.frame_of_reference,
    )


def _unnamed(instance: _Instance) -> str:
    if instance.series_number is None:
        return instance.path.stem
    return f"{instance.modality or 'DICOM'} series {instance.series_number}"


@dataclass(frozen=True)
class _Content:
    array: NDArray[Any]
    affine: NDArray[np.float64]
    spatial_dimension: int
    warnings: tuple[str, ...]


def _stack(instances: list[_Instance], frame: int | None, name: str) -> _Content:
    """Single-frame slices with positions."""
    _check_one_grid(instances, name)
    first = instances[0]
    positions = np.array([instance.position for instance in instances])
    moments = [instance.moment for instance in instances]
    order, affine, notes = arrange_slices(positions, moments, _plane(first, name), frame, name)
    array, pixel_notes = _pixels([instances[index] for index in order], name)
    return _Content(array, affine, 3, (*notes, *pixel_notes))


def _picture(instances: list[_Instance], frame: int | None, name: str) -> _Content:
    """Images without a position: an X-ray, an ultrasound still."""
    ordered = sorted(instances, key=lambda instance: instance.number)
    chosen = ordered[choose_frame(len(ordered), frame, name, "separate pictures without a place in the patient")]
    array, notes = _pixels([chosen], name)
    affine = np.eye(4)
    if chosen.pixel_spacing:
        affine[0, 0], affine[1, 1] = chosen.pixel_spacing[1], chosen.pixel_spacing[0]
    else:
        affine[:2, :2] = np.diag(open_image(chosen.path, "GDCMImageIO").GetSpacing()[:2])
    return _Content(array, affine, 2, notes)


def _multi_frame(instances: list[_Instance], frame: int | None, name: str) -> _Content:
    """One object with many frames: an enhanced CT or MR, or a cine loop."""
    if len(instances) > 1:
        names = ", ".join(instance.path.name for instance in instances[:5])
        raise InputError(
            f"{name}: the series holds {len(instances)} multi-frame objects; give one of its files ({names})"
        )
    only = instances[0]
    array, notes = _pixels([only], name)
    positions = _repeated_numbers(only, b"\x20\x00\x32\x00", 3)
    orientations = _repeated_numbers(only, b"\x20\x00\x37\x00", 6)
    if len(positions) == only.frames and len(orientations) in (1, only.frames):
        if np.abs(orientations - orientations[0]).max() > 1e-3:
            raise InputError(f"{name}: its {only.frames} frames lie in different planes; export one plane as a series")
        plane = _plane(replace(only, orientation=tuple(orientations[0]), pixel_spacing=_spacing_of(only)), name)
        moments = [(float(index),) for index in range(only.frames)]
        order, affine, place_notes = arrange_slices(positions, moments, plane, frame, name)
        return _Content(np.ascontiguousarray(array[order]), affine, 3, (*place_notes, *notes))
    if only.modality in _FLAT_MODALITIES:
        chosen = choose_frame(only.frames, frame, name, "frames over time")
        affine = np.diag([*_spacing_of(only)[::-1], 1.0, 1.0])
        return _Content(np.ascontiguousarray(array[chosen : chosen + 1]), affine, 2, notes)
    affine = affine_of(open_image(only.path, "GDCMImageIO"))
    warning = f"{name}: the places of its {only.frames} frames could not be checked; even spacing is assumed"
    return _Content(array, affine, 3, (warning, *notes))


def _plane(instance: _Instance, name: str) -> SlicePlane:
    if not instance.pixel_spacing:
        raise InputError(
            f"{name}: the DICOM files record no pixel spacing, so sizes are unknown; add it or convert them"
        )
    if not min(instance.pixel_spacing) > 0:
        raise InputError(f"{name}: pixel spacing must be > 0 on both axes, the files have {instance.pixel_spacing} mm")
    return SlicePlane(
        row=np.array(instance.orientation[:3]),
        column=np.array(instance.orientation[3:]),
        pixel_spacing=(instance.pixel_spacing[0], instance.pixel_spacing[1]),
        thickness=instance.thickness,
    )


def _check_one_grid(instances: list[_Instance], name: str) -> None:
    """Refuse a series whose slices cannot share one grid: other sizes, other planes."""
    first = instances[0]
    kinds: Counter[str] = Counter()
    for instance in instances:
        turned = float(np.degrees(np.arccos(np.clip(first.normal @ instance.normal, -1, 1))))
        spacing = " x ".join(f"{value:g}" for value in instance.pixel_spacing)
        plane = "" if turned < 0.5 else f", turned by {turned:.0f} degrees"
        kinds[f"{instance.size[1]} x {instance.size[0]} pixels of {spacing} mm{plane}"] += 1
    if len(kinds) > 1:
        listed = "; ".join(f"{count} of {kind}" for kind, count in kinds.most_common(6))
        raise InputError(
            f"{name}: the images of this series do not form one volume ({listed}); "
            "put the slices you want into a folder of their own"
        )


def _pixels(instances: list[_Instance], name: str) -> tuple[NDArray[Any], tuple[str, ...]]:
    """The voxels (k, j, i) of slices or of one multi-frame object, rescaled as the files say, and remarks."""
    import SimpleITK as sitk

    slices = []
    notes: list[str] = []
    for instance in instances:
        image = open_image(instance.path, "GDCMImageIO")
        array = sitk.GetArrayFromImage(image)
        if image.GetNumberOfComponentsPerPixel() > 1:
            array, note = grey(array)
            notes.append(f"{name}: {note}")
        slices.append(array.reshape(-1, *instance.size))
    # Slices may differ in type where their rescale factors do.
    stacked = np.concatenate(slices, dtype=np.result_type(*slices))
    if instances[0].photometric == "MONOCHROME1":
        notes.append(f"{name}: stored with white as 0 (MONOCHROME1); its grey values are turned round, as viewers do")
    return stacked, tuple(dict.fromkeys(notes))


def _spacing_of(instance: _Instance) -> tuple[float, float]:
    """(row, column) distance in mm of a multi-frame object."""
    recorded = _repeated_numbers(instance, b"\x28\x00\x30\x00", 2)
    if len(recorded) and np.abs(recorded - recorded[0]).max() < 1e-6:
        return float(recorded[0][0]), float(recorded[0][1])
    spacing = open_image(instance.path, "GDCMImageIO").GetSpacing()
    return float(spacing[1]), float(spacing[0])


def _repeated_numbers(instance: _Instance, tag: bytes, count: int) -> NDArray[np.float64]:
    """All values (n, count) of a decimal-string element in a file, in their order.

    Per-frame positions lie in nested sequences that GDCM's reader in ITK does not hand out. Little-endian files have
    the element's bytes as they are, so they are found by looking; anything that does not parse yields nothing.
    """
    content = instance.path.read_bytes()
    end = content.rfind(_PIXEL_DATA)
    found = []
    at = content.find(tag, 0, end)
    while at >= 0:
        explicit = content[at + 4 : at + 6] == b"DS"
        length = struct.unpack_from("<H" if explicit else "<I", content, at + (6 if explicit else 4))[0]
        try:
            values = [float(word) for word in content[at + 8 : at + 8 + min(length, 256)].decode("ascii").split("\\")]
        except ValueError:
            values = []
        if len(values) == count:
            found.append(values)
        at = content.find(tag, at + 4, end)
    return np.array(found, dtype=np.float64).reshape(-1, count)
