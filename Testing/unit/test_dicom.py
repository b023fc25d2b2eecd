"""DICOM series: made here byte by byte, so that each property of a series is known, and real ones."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from FreqSegLib.errors import InputError
from FreqSegLib.volume import Volume, list_series

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
DX_IMAGE = "1.2.840.10008.5.1.4.1.1.1.1"
US_CLIP = "1.2.840.10008.5.1.4.1.1.3.1"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
REPORT = "1.2.840.10008.5.1.4.1.1.88.22"

ROW = np.array([1.0, 0.0, 0.0])
COLUMN = np.array([0.0, 1.0, 0.0])


def element(group: int, number: int, vr: str, value: Any) -> bytes:
    """One explicit little-endian data element."""
    if isinstance(value, str):
        data = value.encode("latin1")
        data += (b"\0" if vr == "UI" else b" ") * (len(data) % 2)
    elif vr == "US":
        data = struct.pack("<H", value)
    else:
        data = bytes(value) + b"\0" * (len(value) % 2)
    head = struct.pack("<HH", group, number) + vr.encode()
    if vr in ("OB", "OW", "SQ", "UN"):
        return head + b"\0\0" + struct.pack("<I", len(data)) + data
    return head + struct.pack("<H", len(data)) + data


def numbers(values: Any) -> str:
    return "\\".join(f"{value:.6f}".rstrip("0").rstrip(".") for value in values)


def item(*elements: bytes) -> bytes:
    content = b"".join(elements)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


class Writer:
    """Writes DICOM files whose tags a test chooses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def __call__(
        self,
        pixels: np.ndarray,
        position: Any = None,
        *,
        name: str | None = None,
        orientation: Any = (*ROW, *COLUMN),
        spacing: Any = (0.5, 0.75),
        series: int = 1,
        description: str = "Axial",
        modality: str = "CT",
        sop_class: str = CT_IMAGE,
        instance: int | None = None,
        photometric: str = "MONOCHROME2",
        thickness: float | None = None,
        extra: tuple[tuple[int, int, str, Any], ...] = (),
    ) -> Path:
        self.count += 1
        uid = f"1.2.3.{series}.{self.count}"
        colour = photometric == "RGB"
        frames = pixels.shape[0] if pixels.ndim == 3 and not colour else 1
        rows, columns = pixels.shape[:2] if colour else pixels.shape[-2:]
        bits = pixels.dtype.itemsize * 8
        tags: list[tuple[int, int, str, Any]] = [
            (0x0008, 0x0016, "UI", sop_class),
            (0x0008, 0x0018, "UI", uid),
            (0x0008, 0x0060, "CS", modality),
            (0x0008, 0x103E, "LO", description),
            (0x0020, 0x000D, "UI", "1.2.3"),
            (0x0020, 0x000E, "UI", f"1.2.3.{series}"),
            (0x0020, 0x0011, "IS", str(series)),
            (0x0020, 0x0013, "IS", str(self.count if instance is None else instance)),
            (0x0028, 0x0002, "US", 3 if colour else 1),
            (0x0028, 0x0004, "CS", photometric),
            (0x0028, 0x0010, "US", rows),
            (0x0028, 0x0011, "US", columns),
            (0x0028, 0x0100, "US", bits),
            (0x0028, 0x0101, "US", bits),
            (0x0028, 0x0102, "US", bits - 1),
            (0x0028, 0x0103, "US", int(pixels.dtype.kind == "i")),
            (0x7FE0, 0x0010, "OW", pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()),
            *extra,
        ]
        if colour:
            tags.append((0x0028, 0x0006, "US", 0))
        if frames > 1:
            tags.append((0x0028, 0x0008, "IS", str(frames)))
        if spacing is not None:
            tags.append((0x0028, 0x0030, "DS", numbers(spacing)))
        if thickness is not None:
            tags.append((0x0018, 0x0050, "DS", str(thickness)))
        if position is not None:
            tags += [(0x0020, 0x0032, "DS", numbers(position)), (0x0020, 0x0037, "DS", numbers(orientation))]
        unique = {tag[:2]: tag for tag in tags}
        meta = element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", sop_class) + element(2, 3, "UI", uid)
        meta += element(2, 0x10, "UI", "1.2.840.10008.1.2.1")
        body = b"".join(element(*unique[key]) for key in sorted(unique))
        group = struct.pack("<HH", 2, 0) + b"UL" + struct.pack("<HI", 4, len(meta))
        path = self.folder / (name or f"image{self.count:03d}.dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(128) + b"DICM" + group + meta + body)
        return path


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


def slices(count: int, shape: tuple[int, int] = (4, 6), dtype: Any = np.int16) -> np.ndarray:
    return np.arange(count * shape[0] * shape[1], dtype=dtype).reshape(count, *shape)


def write_stack(write: Writer, places: Any, **tags: Any) -> np.ndarray:
    voxels = slices(len(places))
    for voxel, place in zip(voxels, places, strict=True):
        write(voxel, place, **tags)
    return voxels


# ---- geometry


def test_slices_are_ordered_by_position_whatever_their_names_and_numbers_say(write: Writer) -> None:
    voxels = slices(5)
    for index in (3, 0, 4, 1, 2):
        write(voxels[index], (10, 20, 30 + 2.5 * index), instance=9 - index, name=f"{(index * 7) % 5}.dcm")
    volume = Volume.read(write.folder)
    np.testing.assert_array_equal(volume.array, voxels)
    np.testing.assert_allclose(volume.affine, [[0.75, 0, 0, 10], [0, 0.5, 0, 20], [0, 0, 2.5, 30], [0, 0, 0, 1]])
    assert (volume.modality, volume.description, volume.name) == ("CT", "Axial", "Axial")
    assert volume.spatial_dimension == 3
    assert volume.warnings == ()


def test_an_oblique_series_lies_where_its_positions_say(write: Writer) -> None:
    """Each slice's first voxel is at its ImagePositionPatient."""
    angle = np.radians(20)
    row, column = np.array([np.cos(angle), np.sin(angle), 0]), np.array([0, 0, -1.0])
    normal = np.cross(row, column)
    places = [np.array([5, 6, 7]) + 3.0 * index * normal for index in range(4)]
    write_stack(write, places, orientation=(*row, *column), modality="MR", sop_class=MR_IMAGE)
    volume = Volume.read(write.folder)
    for index, place in enumerate(places):
        np.testing.assert_allclose(volume.affine @ [0, 0, index, 1], [*place, 1], atol=1e-5)
    np.testing.assert_allclose(volume.affine[:3, 0], row * 0.75, atol=1e-5)
    np.testing.assert_allclose(volume.affine[:3, 1], column * 0.5, atol=1e-5)
    assert volume.warnings == ()


def test_gantry_tilt_is_kept_as_a_shear_and_named(write: Writer) -> None:
    column = (0, np.cos(np.radians(18)), -np.sin(np.radians(18)))
    places = [(0, 0, 5.0 * index) for index in range(6)]
    write_stack(write, places, orientation=(*ROW, *column))
    volume = Volume.read(write.folder)
    for index, place in enumerate(places):
        np.testing.assert_allclose(volume.affine @ [0, 0, index, 1], [*place, 1], atol=1e-4)
    assert len(volume.warnings) == 1
    assert "gantry tilt of 18.0 degrees" in volume.warnings[0]


def test_uneven_gaps_are_reported_with_every_gap_and_the_largest_error(write: Writer) -> None:
    write_stack(write, [(0, 0, z) for z in (0, 2, 4, 9, 14)])
    volume = Volume.read(write.folder)
    assert volume.spacing[2] == pytest.approx(14 / 4)
    (warning,) = volume.warnings
    assert "gaps from 2.00 to 5.00 mm (2 x 2.00 mm, 2 x 5.00 mm)" in warning
    assert "mean, 3.50 mm" in warning
    assert "up to 3.0 mm from its true place" in warning  # slice 2: at 4, on the grid at 7
    assert "missing" not in warning


def test_a_lost_slice_is_called_missing(write: Writer) -> None:
    write_stack(write, [(0, 0, z) for z in (0, 3, 6, 12, 15)])
    assert "as if 1 slice was missing" in Volume.read(write.folder).warnings[0]


def test_rounded_positions_are_not_called_uneven(write: Writer) -> None:
    write_stack(write, [(0, 0, round(index * 1.2345678, 2)) for index in range(12)])
    volume = Volume.read(write.folder)
    assert volume.warnings == ()
    assert volume.spacing[2] == pytest.approx(1.2345, abs=1e-3)


def test_one_slice_takes_its_thickness_as_spacing(write: Writer) -> None:
    path = write(slices(1)[0], (0, 0, 9), thickness=4.0)
    volume = Volume.read(path)
    assert volume.shape == (1, 4, 6)
    np.testing.assert_allclose(volume.spacing, (0.75, 0.5, 4.0))
    assert "give its folder" in volume.warnings[0]
    assert Volume.read(write.folder).warnings == ()


def test_an_image_without_position_is_a_picture(write: Writer) -> None:
    path = write(slices(1)[0], None, modality="DX", sop_class=DX_IMAGE, spacing=(0.2, 0.3))
    volume = Volume.read(path)
    assert (volume.spatial_dimension, volume.modality, volume.warnings) == (2, "DX", ())
    np.testing.assert_allclose(volume.spacing, (0.3, 0.2, 1.0))


# ---- voxels


def test_rescaled_values_come_out_in_their_units(write: Writer) -> None:
    extra = ((0x0028, 0x1052, "DS", "-1024"), (0x0028, 0x1053, "DS", "1"))
    voxels = write_stack(write, [(0, 0, z) for z in range(3)], extra=extra)
    np.testing.assert_array_equal(Volume.read(write.folder).array, voxels.astype(int) - 1024)


def test_slices_with_their_own_rescale_factors_keep_their_values(write: Writer) -> None:
    """Some MR scanners write another slope for each slice; the first must not decide the type of all."""
    voxels = slices(2)
    write(voxels[0], (0, 0, 0), extra=((0x0028, 0x1052, "DS", "0"), (0x0028, 0x1053, "DS", "1")))
    write(voxels[1], (0, 0, 1), extra=((0x0028, 0x1052, "DS", "0.5"), (0x0028, 0x1053, "DS", "0.25")))
    found = Volume.read(write.folder).array
    np.testing.assert_allclose(found[0], voxels[0])
    np.testing.assert_allclose(found[1], voxels[1] * 0.25 + 0.5)


def test_white_is_zero_images_are_inverted_and_said_to_be(write: Writer) -> None:
    pixels = slices(1, dtype=np.uint16)[0] + 7
    path = write(pixels, None, modality="DX", sop_class=DX_IMAGE, photometric="MONOCHROME1")
    volume = Volume.read(path)
    assert np.unique(volume.array[0].astype(int) + pixels).size == 1
    assert volume.array.dtype == np.uint16
    assert "MONOCHROME1" in volume.warnings[0]


def test_colour_becomes_luminance_with_a_warning(write: Writer) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    volume = Volume.read(write(colour, None, modality="US", photometric="RGB", spacing=None))
    np.testing.assert_allclose(volume.array[0], colour @ [0.299, 0.587, 0.114], atol=0.5)
    assert "luminance" in volume.warnings[0]


# ---- choosing


def test_several_series_are_listed_and_chosen_by_uid_number_or_description(write: Writer) -> None:
    write_stack(write, [(0, 0, z) for z in range(3)], series=7, description="T1", modality="MR", sop_class=MR_IMAGE)
    write_stack(write, [(0, 0, z) for z in range(2)], series=9, description="FLAIR", modality="MR", sop_class=MR_IMAGE)
    with pytest.raises(InputError) as raised:
        Volume.read(write.folder)
    message = str(raised.value)
    assert "2 series" in message
    assert "--series" in message
    assert [line.split() for line in message.splitlines()[1:]] == [
        ["7", "MR", "3", "slices", "T1", "1.2.3.7"],
        ["9", "MR", "2", "slices", "FLAIR", "1.2.3.9"],
    ]
    for wanted in ("9", "1.2.3.9", "flair", " FLAIR "):
        assert Volume.read(write.folder, series=wanted).shape[0] == 2
    with pytest.raises(InputError, match=r"'T2'(.|\n)*FLAIR"):
        Volume.read(write.folder, series="T2")
    found = list_series(write.folder)
    assert [(one.uid, one.number, one.description, one.modality, one.slices) for one in found] == [
        ("1.2.3.7", 7, "T1", "MR", 3),
        ("1.2.3.9", 9, "FLAIR", "MR", 2),
    ]


def test_a_description_two_series_share_needs_the_uid(write: Writer) -> None:
    for series in (1, 2):
        write_stack(write, [(0, 0, z) for z in range(2)], series=series, description="Same")
    with pytest.raises(InputError, match=r"2 series .* match 'Same'.*UID"):
        Volume.read(write.folder, series="Same")
    assert Volume.read(write.folder, series="1.2.3.2").shape[0] == 2


def test_nested_folders_other_files_and_objects_without_an_image_are_passed_over(write: Writer) -> None:
    voxels = slices(4)
    for index in range(4):
        write(voxels[index], (0, 0, index), name=f"deep/part{index % 2}/IM{index}")
    (write.folder / "notes.txt").write_text("not an image")
    (write.folder / "deep" / "empty.dcm").touch()
    (write.folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write(slices(1)[0], None, series=5, modality="SEG", sop_class=SEGMENTATION)
    write(slices(1)[0], None, series=6, modality="SR", sop_class=REPORT)
    volume = Volume.read(write.folder)
    np.testing.assert_array_equal(volume.array, voxels)
    assert volume.warnings == ()


def test_the_same_object_in_two_folders_is_one_slice(write: Writer) -> None:
    voxels = write_stack(write, [(0, 0, z) for z in range(3)])
    (write.folder / "copy").mkdir()
    for path in list(write.folder.glob("*.dcm")):
        (write.folder / "copy" / path.name).write_bytes(path.read_bytes())
    np.testing.assert_array_equal(Volume.read(write.folder).array, voxels)


def test_time_points_are_counted_and_chosen(write: Writer) -> None:
    voxels = slices(6).reshape(2, 3, 4, 6)
    for time in range(2):
        for index in range(3):
            write(voxels[time, index], (0, 0, index), instance=10 * time + index, modality="MR", sop_class=MR_IMAGE)
    with pytest.raises(InputError, match=r"holds 2 volumes at the same place.*0 to 1"):
        Volume.read(write.folder)
    np.testing.assert_array_equal(Volume.read(write.folder, frame=1).array, voxels[1])
    with pytest.raises(InputError, match="must be 0 to 1, got 2"):
        Volume.read(write.folder, frame=2)


# ---- series that are no volume


def test_a_series_of_two_volumes_is_refused(write: Writer) -> None:
    write_stack(write, [(0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 2)])
    with pytest.raises(InputError, match="1 at 2 places, 2 at 1 places"):
        Volume.read(write.folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"orientation": (*COLUMN, 0, 0, 1)}, "turned by 90 degrees"),
        ({"spacing": (0.9, 0.9)}, "0.9 x 0.9 mm"),
    ],
)
def test_a_scout_among_the_slices_is_refused_with_what_differs(
    write: Writer, change: dict[str, Any], told: str
) -> None:
    write_stack(write, [(0, 0, z) for z in range(3)])
    write(slices(1)[0], (0, 0, 50), **change)
    with pytest.raises(InputError, match=f"do not form one volume.*3 of .*{told}"):
        Volume.read(write.folder)


def test_slices_of_other_sizes_are_refused(write: Writer) -> None:
    write_stack(write, [(0, 0, z) for z in range(3)])
    write(slices(1, (5, 5))[0], (0, 0, 3))
    with pytest.raises(InputError, match="1 of 5 x 5 pixels"):
        Volume.read(write.folder)


@pytest.mark.parametrize(
    ("spacing", "told"), [((0.0, 1.0), "must be > 0"), ((-1.0, 1.0), "must be > 0"), (None, "no pixel")]
)
def test_a_pixel_spacing_that_is_no_length_is_refused(write: Writer, spacing: Any, told: str) -> None:
    write_stack(write, [(0, 0, z) for z in range(2)], spacing=spacing)
    with pytest.raises(InputError, match=told):
        Volume.read(write.folder)


@pytest.mark.parametrize("lost", [1, 20, 47])
def test_a_series_with_a_damaged_slice_is_refused(write: Writer, lost: int) -> None:
    """Without it the gap would double and every slice beyond move."""
    write_stack(write, [(0, 0, z) for z in range(4)])
    path = write.folder / "image002.dcm"
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(InputError, match=r"1 of this series' files are damaged or incomplete \(image002.dcm\)"):
        Volume.read(write.folder)
    with pytest.raises(InputError, match=r"image002.dcm.*damaged or incomplete"):
        Volume.read(path)


def test_damage_elsewhere_in_the_folder_is_told(write: Writer) -> None:
    write_stack(write, [(0, 0, z) for z in range(3)])
    path = write(slices(1)[0], (0, 0, 0), series=2)
    path.write_bytes(path.read_bytes()[:-9])
    volume = Volume.read(write.folder)
    assert volume.shape[0] == 3
    assert "damaged DICOM files were passed over (image004.dcm)" in volume.warnings[0]


def test_folders_without_an_image_say_so(write: Writer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no DICOM image in this folder"):
        Volume.read(tmp_path)
    (tmp_path / "scan.nii").write_bytes(b"x")
    with pytest.raises(InputError, match="give the file itself"):
        Volume.read(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        list_series(tmp_path / "absent")
    path = write(slices(1)[0], None, modality="SEG", sop_class=SEGMENTATION)
    with pytest.raises(InputError, match="is no image"):
        Volume.read(path)


# ---- multi-frame


def frame_item(position: Any, orientation: Any = (*ROW, *COLUMN)) -> bytes:
    place = element(0x0020, 0x9113, "SQ", item(element(0x0020, 0x0032, "DS", numbers(position))))
    plane = element(0x0020, 0x9116, "SQ", item(element(0x0020, 0x0037, "DS", numbers(orientation))))
    return item(place + plane)


def enhanced(places: list[Any], orientations: list[Any] | None = None) -> tuple[tuple[int, int, str, Any], ...]:
    """The functional groups of an enhanced object with a frame at each place."""
    planes = orientations or [(*ROW, *COLUMN)] * len(places)
    measures = item(element(0x0028, 0x9110, "SQ", item(element(0x0028, 0x0030, "DS", "0.5\\0.75"))))
    frames = b"".join(frame_item(place, plane) for place, plane in zip(places, planes, strict=True))
    return ((0x5200, 0x9229, "SQ", measures), (0x5200, 0x9230, "SQ", frames))


def test_frames_of_an_enhanced_object_are_placed_by_their_own_positions(write: Writer) -> None:
    voxels = slices(4, dtype=np.uint16)
    heights = (6, 0, 4, 2)
    extra = enhanced([(1, 2, z) for z in heights])
    path = write(voxels, None, modality="MR", sop_class=ENHANCED_MR, spacing=None, extra=extra)
    volume = Volume.read(path)
    np.testing.assert_array_equal(volume.array, voxels[np.argsort(heights)])
    np.testing.assert_allclose(volume.affine, [[0.75, 0, 0, 1], [0, 0.5, 0, 2], [0, 0, 2, 0], [0, 0, 0, 1]])


def test_uneven_and_repeated_frames_of_an_enhanced_object_are_noticed(write: Writer) -> None:
    voxels = slices(4, dtype=np.uint16)
    tags: dict[str, Any] = {"modality": "MR", "sop_class": ENHANCED_MR, "spacing": None}
    uneven = write(voxels, None, extra=enhanced([(0, 0, z) for z in (0, 1, 2, 9)]), **tags)
    assert "gaps from 1.00 to 7.00 mm" in Volume.read(uneven).warnings[0]
    timed = write(voxels, None, extra=enhanced([(0, 0, z) for z in (0, 1, 0, 1)]), **tags)
    with pytest.raises(InputError, match="2 volumes at the same place"):
        Volume.read(timed)
    np.testing.assert_array_equal(Volume.read(timed, frame=1).array, voxels[2:])
    planes = [(*ROW, *COLUMN)] * 3 + [(*COLUMN, 0, 0, 1)]
    turned = write(voxels, None, extra=enhanced([(0, 0, z) for z in range(4)], planes), **tags)
    with pytest.raises(InputError, match="different planes"):
        Volume.read(turned)


def test_a_cine_loop_needs_a_frame(write: Writer) -> None:
    voxels = slices(5, dtype=np.uint8)
    path = write(voxels, None, modality="US", sop_class=US_CLIP, spacing=(0.1, 0.1))
    with pytest.raises(InputError, match="holds 5 frames over time"):
        Volume.read(path)
    volume = Volume.read(path, frame=3)
    assert volume.spatial_dimension == 2
    np.testing.assert_array_equal(volume.array[0], voxels[3])


# ---- real series


@pytest.fixture(scope="session")
def unpacked(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def unpack(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / name
        if not folder.exists():
            with zipfile.ZipFile(shared_data / "dicom" / f"{name}.zip") as archive:
                archive.extractall(folder)
        return folder

    return unpack


@pytest.mark.data
def test_a_real_tilted_ct_reports_tilt_and_all_its_gaps(unpacked: Callable[[str], Path]) -> None:
    volume = Volume.read(unpacked("head_ct_ge_tilted"))
    assert volume.shape == (28, 512, 512)
    tilt, gaps = volume.warnings
    assert "gantry tilt of 18.5 degrees" in tilt  # as its GantryDetectorTilt says
    assert "13 x 4.00 mm, 1 x 1.08 mm, 13 x 7.00 mm" in gaps
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [-125, -123.5404569, 5.8360586, 1])
    np.testing.assert_allclose(volume.affine @ [0, 0, 27, 1], [-125, -123.5404569, 157.7760586, 1])


@pytest.mark.data
def test_a_real_study_gives_the_grid_and_voxels_of_simpleitk(unpacked: Callable[[str], Path]) -> None:
    import SimpleITK as sitk

    folder = unpacked("brain_mr_four_series")
    assert "T1post" in [one.description for one in list_series(folder)]
    volume = Volume.read(folder, series="T1post")
    truth = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(next(folder.glob("11-*")))))
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(truth))
    for index in ((0, 0, 0), (279, 319, 21), (5, 300, 11)):
        expected = truth.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], expected, atol=1e-3)
    assert volume.modality == "MR"
    assert volume.warnings == ()


@pytest.mark.data
def test_a_real_multi_frame_ct_equals_the_same_slices_as_files(unpacked: Callable[[str], Path]) -> None:
    folder = unpacked("liver_ct_with_dicom_seg") / "24x38x3"
    frames, files = Volume.read(folder / "multiframe" / "mf.dcm"), Volume.read(folder / "image")
    np.testing.assert_array_equal(frames.array, files.array)
    np.testing.assert_allclose(frames.affine, files.affine, atol=1e-6)


@pytest.mark.data
def test_a_real_dicom_segmentation_is_no_series(unpacked: Callable[[str], Path]) -> None:
    found = list_series(unpacked("liver_ct_with_dicom_seg"))
    assert {one.modality for one in found} == {"CT"}
