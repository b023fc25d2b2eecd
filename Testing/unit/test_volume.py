"""Volumes from and to files: voxels and geometry kept exactly, damage and oddities said in words."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from FreqSegLib.errors import InputError, OutputError
from FreqSegLib.output_file import replacing
from FreqSegLib.volume import Volume

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def oblique(spacing: tuple[float, float, float] = (0.7, 0.8, 3.0), flip: bool = True) -> np.ndarray:
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [12, -20, 33], degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([1, -1 if flip else 1, 1]) * np.array(spacing)
    affine[:3, 3] = (-31.5, 12.25, 101.0)
    return affine


def example(dtype: Any = np.int16, shape: tuple[int, int, int] = (3, 4, 5)) -> Volume:
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    return Volume(values, oblique(), name="example")


def nifti(
    voxels: np.ndarray,
    sform: np.ndarray | None = None,
    qform: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    order: str = "<",
) -> bytes:
    """A single-file NIfTI of a (..., k, j, i) array; sform is RAS, qform a quaternion's b, c, d and an offset."""
    codes = {"uint8": 2, "int16": 4, "int32": 8, "float32": 16, "float64": 64, "uint16": 512, "int64": 1024}
    code = codes[voxels.dtype.name]
    bits = voxels.dtype.itemsize * 8
    dim = [voxels.ndim, *voxels.shape[::-1]] + [1] * (7 - voxels.ndim)
    pixdim = [1.0, *spacing] + [1.0] * (7 - len(spacing))
    forms = (1 if qform is not None else 0, 2 if sform is not None else 0)
    rows = (np.zeros((3, 4)) if sform is None else sform[:3]).ravel()
    quaternion = [value for part in (qform or ((0, 0, 0), (0, 0, 0))) for value in part]
    head = bytearray(352)
    struct.pack_into(order + "i", head, 0, 348)
    struct.pack_into(order + "8h", head, 40, *dim)
    struct.pack_into(order + "2h", head, 70, code, bits)
    struct.pack_into(order + "8f", head, 76, *pixdim)
    struct.pack_into(order + "3f", head, 108, 352, 1, 0)
    head[123] = 2
    struct.pack_into(order + "2h6f12f", head, 252, *forms, *quaternion, *rows)
    head[344:348] = b"n+1\0"
    return bytes(head) + voxels.astype(voxels.dtype.newbyteorder(order)).tobytes()


def nrrd(voxels: np.ndarray, *fields: str) -> bytes:
    names = {"int16": "short", "uint8": "uchar", "float32": "float"}
    sizes = " ".join(str(count) for count in voxels.shape[::-1])
    lines = ["NRRD0004", f"type: {names[voxels.dtype.name]}", f"dimension: {voxels.ndim}", f"sizes: {sizes}", *fields]
    return "\n".join([*lines, "encoding: raw", "endian: little", "", ""]).encode() + voxels.tobytes()


def meta_image(voxels: np.ndarray, spacing: str = "1 1 1") -> bytes:
    sizes = " ".join(str(count) for count in voxels.shape[::-1])
    return (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"ElementSpacing = {spacing}\nDimSize = {sizes}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    ).encode() + voxels.tobytes()


VOXELS = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


# ---- files there and back


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_voxels_type_and_geometry_survive_a_file(tmp_path: Path, suffix: str, dtype: Any) -> None:
    volume = example(dtype)
    path = volume.write(tmp_path / f"a scan{suffix}")
    again = Volume.read(path)
    assert path == tmp_path / f"a scan{suffix}"
    assert again.array.dtype == dtype
    np.testing.assert_array_equal(again.array, volume.array)
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-4)
    assert (again.name, again.spatial_dimension, again.warnings) == ("a scan", 3, ())


@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 9)] * 3),
    signs=st.tuples(*[st.sampled_from((-1, 1))] * 3),
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    suffix=st.sampled_from([".nrrd", ".nii.gz", ".mha"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_orientation_survives_a_file(
    tmp_path: Path, angles: Any, spacing: Any, signs: Any, shape: Any, suffix: str
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * np.array(spacing) * np.array(signs)
    affine[:3, 3] = (4.5, -300.0, 21.0)
    volume = Volume(np.random.default_rng(0).normal(size=shape).astype(np.float32), affine)
    again = Volume.read(volume.write(tmp_path / f"any{suffix}", overwrite=True))
    np.testing.assert_array_equal(again.array, volume.array)
    np.testing.assert_allclose(again.affine, affine, atol=2e-3)


def test_simpleitk_and_we_agree_on_where_voxels_are(tmp_path: Path) -> None:
    volume = example()
    image = sitk.ReadImage(str(volume.write(tmp_path / "x.nrrd")))
    for i, j, k in itertools.product((0, 4), (0, 3), (0, 2)):
        expected = image.TransformIndexToPhysicalPoint((i, j, k))
        np.testing.assert_allclose((volume.affine @ [i, j, k, 1])[:3], expected, atol=1e-9)
        assert image.GetPixel(i, j, k) == volume.array[k, j, i]


def test_a_nifti_lies_where_its_header_says_in_ras(tmp_path: Path) -> None:
    sform = TO_RAS @ oblique()
    (tmp_path / "a.nii").write_bytes(nifti(VOXELS, sform, spacing=(0.7, 0.8, 3.0)))
    np.testing.assert_allclose(Volume.read(tmp_path / "a.nii").affine, oblique(), atol=1e-4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_of_nifti_are_read(tmp_path: Path, order: str) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(nifti(VOXELS, np.diag([1.0, 2, 3, 1]), spacing=(1, 2, 3), order=order))
    volume = Volume.read(path)
    np.testing.assert_array_equal(volume.array, VOXELS)
    np.testing.assert_allclose(volume.spacing, (1, 2, 3))
    assert volume.array.dtype == np.dtype(np.int16)


def test_nifti_2_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(struct.pack("<i", 540) + b"n+2\0\r\n\032\n" + bytes(600))
    with pytest.raises(InputError, match=r"NIfTI-2.*convert it"):
        Volume.read(tmp_path / "a.nii")


def test_a_big_endian_nrrd_is_read(tmp_path: Path) -> None:
    content = nrrd(VOXELS, "space: left-posterior-superior", "space directions: (1,0,0) (0,1,0) (0,0,1)")
    swapped = content[: -VOXELS.nbytes].replace(b"little", b"big") + VOXELS.astype(">i2").tobytes()
    (tmp_path / "a.nrrd").write_bytes(swapped)
    np.testing.assert_array_equal(Volume.read(tmp_path / "a.nrrd").array, VOXELS)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 1), (4, 1, 6)])
def test_single_voxel_axes_are_fine(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    volume = example(shape=shape)
    for suffix in (".nrrd", ".nii.gz", ".mha"):
        again = Volume.read(volume.write(tmp_path / f"thin{suffix}"))
        assert again.shape == shape
        np.testing.assert_allclose(again.affine, volume.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint8), (".tif", np.float32)]
)
def test_a_picture_survives_a_file(tmp_path: Path, suffix: str, dtype: Any) -> None:
    values = np.random.default_rng(0).integers(0, 255, (1, 6, 9)).astype(dtype)
    picture = Volume(values, np.diag([0.3, 0.4, 1, 1]), spatial_dimension=2)
    again = Volume.read(picture.write(tmp_path / f"x{suffix}"))
    np.testing.assert_array_equal(again.array, values)
    assert again.array.dtype == dtype
    assert again.spatial_dimension == 2
    np.testing.assert_allclose(again.spacing, (0.3, 0.4, 1), rtol=1e-2)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_a_picture_without_a_spacing_has_one_millimetre(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9)).save(tmp_path / f"x{suffix}")
    volume = Volume.read(tmp_path / f"x{suffix}")
    assert volume.shape == (1, 6, 9)
    np.testing.assert_array_equal(volume.affine, np.eye(4))


# ---- colour, time, numbers


@pytest.mark.parametrize(
    ("mode", "told"), [("RGB", "luminance"), ("RGBA", "transparency left out"), ("LA", "transparency")]
)
def test_colour_and_transparency_are_taken_out_with_a_warning(tmp_path: Path, mode: str, told: str) -> None:
    channels = len(mode)
    values = np.random.default_rng(0).integers(0, 256, (6, 9, channels), dtype=np.uint8)
    Image.fromarray(values, mode).save(tmp_path / "x.png")
    volume = Volume.read(tmp_path / "x.png")
    expected = values[..., 0] if mode == "LA" else values[..., :3] @ [0.299, 0.587, 0.114]
    assert volume.array.dtype == np.uint8
    np.testing.assert_allclose(volume.array[0], expected, atol=0.5)
    assert told in volume.warnings[0]


def test_grey_stored_as_colour_keeps_its_values(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(tmp_path / "x.png")
    volume = Volume.read(tmp_path / "x.png")
    np.testing.assert_array_equal(volume.array[0], grey)
    assert "read as grey" in volume.warnings[0]


def test_a_palette_picture_is_read_by_its_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9) % 3, "P")
    picture.putpalette([0, 0, 0, 255, 255, 255, 255, 0, 0])
    picture.save(tmp_path / "x.png")
    assert set(np.unique(Volume.read(tmp_path / "x.png").array)) == {0, 255, 76}


def test_a_time_series_names_its_time_points_and_takes_one(tmp_path: Path) -> None:
    voxels = np.arange(7 * 60, dtype=np.int16).reshape(7, 3, 4, 5)
    path = tmp_path / "bold.nii.gz"
    path.write_bytes(gzip.compress(nifti(voxels, np.eye(4))))
    with pytest.raises(InputError, match=r"bold.nii.gz holds 7 volumes .*0 to 6"):
        Volume.read(path)
    np.testing.assert_array_equal(Volume.read(path, frame=5).array, voxels[5])
    for frame in (7, -1):
        with pytest.raises(InputError, match=f"frame must be 0 to 6, got {frame}"):
            Volume.read(path, frame=frame)


def test_a_single_time_point_is_a_volume(tmp_path: Path) -> None:
    (tmp_path / "one.nii").write_bytes(nifti(VOXELS[None], np.eye(4)))
    np.testing.assert_array_equal(Volume.read(tmp_path / "one.nii").array, VOXELS)
    np.testing.assert_array_equal(Volume.read(tmp_path / "one.nii", frame=0).array, VOXELS)


def test_a_frame_of_a_plain_volume_is_refused(tmp_path: Path) -> None:
    path = example().write(tmp_path / "x.nrrd")
    with pytest.raises(InputError, match="frame must be 0 to 0, got 2"):
        Volume.read(path, frame=2)


@pytest.mark.parametrize("kind", ["list", "vector"])
def test_several_values_a_voxel_need_a_choice(tmp_path: Path, kind: str) -> None:
    voxels = np.arange(3 * 60, dtype=np.uint8).reshape(3, 4, 5, 3)
    fields = (
        "space: left-posterior-superior",
        "space directions: none (1,0,0) (0,1,0) (0,0,1)",
        f"kinds: {kind} domain domain domain",
    )
    (tmp_path / "x.nrrd").write_bytes(nrrd(voxels, *fields))
    with pytest.raises(InputError, match="3 values for each voxel"):
        Volume.read(tmp_path / "x.nrrd")
    np.testing.assert_array_equal(Volume.read(tmp_path / "x.nrrd", frame=2).array, voxels[..., 2])


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_voxels_that_are_no_numbers_are_counted_or_filled(tmp_path: Path, ending: str, kind: type) -> None:
    values = np.ones((3, 4, 5), kind)
    values[0, 0] = [np.nan, np.inf, -np.inf, np.nan, 5]
    path = Volume(values, np.diag([1.0, 2, 3, 1])).write(tmp_path / f"holes{ending}")
    with pytest.raises(InputError, match=r"holes: 4 of 60 voxels are NaN or infinite.*--fill-nonfinite"):
        Volume.read(path)
    filled = Volume.read(path, fill_nonfinite=-7)
    np.testing.assert_array_equal(filled.array[0, 0], [-7, -7, -7, -7, 5])
    np.testing.assert_array_equal(filled.array[1:], 1)
    assert filled.warnings == ("holes: 4 voxels were NaN or infinite and are now -7",)


@pytest.mark.parametrize("as_vectors", [False, True])
def test_a_nan_in_a_nifti_of_several_volumes_spoils_the_one_it_is_in(tmp_path: Path, as_vectors: bool) -> None:
    values = np.ones((2, 3, 4, 5), np.float32)
    values[1, 2, 0, 3] = np.nan
    if as_vectors:
        image = sitk.GetImageFromArray(np.moveaxis(values, 0, -1), isVector=True)
    else:
        image = sitk.GetImageFromArray(values, isVector=False)
    sitk.WriteImage(image, str(tmp_path / "several.nii.gz"))
    assert np.isfinite(Volume.read(tmp_path / "several.nii.gz", frame=0).array).all()
    with pytest.raises(InputError, match="1 of 60 voxels are NaN"):
        Volume.read(tmp_path / "several.nii.gz", frame=1)
    filled = Volume.read(tmp_path / "several.nii.gz", frame=1, fill_nonfinite=9)
    assert np.argwhere(filled.array == 9).tolist() == [[2, 0, 3]]


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.ones((3, 4, 5), np.complex64))
    sitk.WriteImage(image, str(tmp_path / "k.nii"))
    with pytest.raises(InputError, match="complex numbers"):
        Volume.read(tmp_path / "k.nii")


# ---- geometry that is unusual or wrong


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_spacing_that_is_no_length_is_refused_with_its_value(tmp_path: Path, bad: float) -> None:
    files = {
        "a.nii": nifti(VOXELS, np.eye(4), spacing=(1.0, bad, 1.0)),
        "a.nii.gz": gzip.compress(nifti(VOXELS, np.eye(4), spacing=(1.0, bad, 1.0))),
        "b.mha": meta_image(VOXELS, f"1 {bad} 1"),
    }
    if bad == bad:  # in an NRRD, nan marks an axis that has no spacing
        files["c.nrrd"] = nrrd(VOXELS, f"spacings: 1 {bad} 1")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: spacing must be > 0 on every axis.*\(1, {bad:g}, 1\)"):
            Volume.read(tmp_path / name)


def test_a_zero_space_direction_is_refused(tmp_path: Path) -> None:
    fields = ("space: left-posterior-superior", "space directions: (1,0,0) (0,0,0) (0,0,1)")
    (tmp_path / "x.nrrd").write_bytes(nrrd(VOXELS, *fields))
    with pytest.raises(InputError, match="spacing must be > 0"):
        Volume.read(tmp_path / "x.nrrd")


def sheared() -> np.ndarray:
    affine = oblique()
    affine[:3, 2] += 0.4 * affine[:3, 1]
    return affine


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_sheared_axes_survive_a_file_and_are_told(tmp_path: Path, suffix: str) -> None:
    volume = Volume(VOXELS, sheared())
    again = Volume.read(volume.write(tmp_path / f"x{suffix}"))
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-6)
    assert "off a right angle" in again.warnings[0]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_sheared_nifti_that_itk_refuses_is_read_exactly(tmp_path: Path, order: str, zipped: bool) -> None:
    content = nifti(VOXELS, TO_RAS @ sheared(), order=order)
    path = tmp_path / ("x.nii.gz" if zipped else "x.nii")
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(path))
    volume = Volume.read(path)
    np.testing.assert_array_equal(volume.array, VOXELS)
    np.testing.assert_allclose(volume.affine, sheared(), atol=1e-5)
    assert "off a right angle" in volume.warnings[0]
    assert volume.name == "x"


def test_shear_is_not_written_where_it_would_be_straightened(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"sheared.*use .nrrd or .mha"):
        Volume(VOXELS, sheared()).write(tmp_path / "x.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_placements_that_disagree_are_told_with_the_distance(tmp_path: Path) -> None:
    moved = np.eye(4)
    moved[0, 3] = 12.0
    (tmp_path / "x.nii").write_bytes(nifti(VOXELS, moved, qform=((0, 0, 0), (0, 0, 0))))
    volume = Volume.read(tmp_path / "x.nii")
    offset = np.linalg.norm(volume.origin - [-12, 0, 0])
    if offset > 0.1:  # which of the two ITK takes is its own choice
        assert f"disagree by up to {offset:.2f} mm" in volume.warnings[0]
    (tmp_path / "y.nii").write_bytes(nifti(VOXELS, np.diag([1.0, 1, 5, 1]), spacing=(1, 1, 1)))
    assert "disagree by up to" in Volume.read(tmp_path / "y.nii").warnings[0]


@pytest.mark.parametrize(("name", "content"), [("x.nii", nifti(VOXELS)), ("x.nrrd", nrrd(VOXELS, "spacings: 1 1 1"))])
def test_an_unrecorded_orientation_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (warning,) = Volume.read(tmp_path / name).warnings
    assert "does not record its orientation" in warning


# ---- files that are damaged or no image


@pytest.mark.parametrize(
    "suffix", [".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd", ".png", ".jpg", ".bmp", ".tif"]
)
@pytest.mark.parametrize("kept", [0.95, 0.5, 0.02])
def test_a_file_that_ends_early_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str, kept: float
) -> None:
    """And nothing is printed by the libraries below."""
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (1, 60, 50)).astype(np.uint8)
    if suffix in (".jpg", ".bmp"):
        Image.fromarray(noise[0]).save(path)
    else:
        Volume(noise, np.eye(4), spatial_dimension=2).write(path)
    cut = next(
        (other for other in tmp_path.iterdir() if other.suffix in (".raw", ".gz", ".zraw") and other != path), path
    )
    content = cut.read_bytes()
    cut.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=r"cut\."):
        Volume.read(path)
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_in_a_compressed_file_is_noticed(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(nifti(np.zeros((9, 40, 40), np.int16), np.eye(4))))
    content[-6] ^= 1
    (tmp_path / "x.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match="damaged or incomplete"):
        Volume.read(tmp_path / "x.nii.gz")


@pytest.mark.parametrize("name", ["x.nrrd", "x.nii", "x.nii.gz", "x.mha", "x.png", "x.jpg", "x.dcm", "x", "x.txt"])
@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x1f\x8b\x08 not gzip", bytes(1000), b"NRRD0004\n", b"\x89PNG\r\n"]
)
def test_what_is_no_image_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="the file is empty" if not content else r"x\b"):
        Volume.read(path)
    assert capfd.readouterr().err == ""


def test_a_missing_file_and_a_misplaced_series_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.nii: no such file"):
        Volume.read(tmp_path / "absent.nii")
    with pytest.raises(InputError, match=r"'3'.*DICOM folder"):
        Volume.read(example().write(tmp_path / "x.nrrd"), series="3")


def test_a_detached_header_without_its_voxels_is_refused(tmp_path: Path) -> None:
    for suffix in (".mhd", ".nhdr"):
        path = example().write(tmp_path / f"x{suffix}")
        for other in tmp_path.iterdir():
            if other != path:
                other.unlink()
        with pytest.raises(InputError, match=f"x{suffix}"):
            Volume.read(path)
        path.unlink()


# ---- writing


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".nii.gz", ".mhd"])
def test_an_existing_file_is_only_replaced_when_asked(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    example().write(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = example().with_array(example().array[::-1].copy())
    with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
        other.write(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    other.write(path, overwrite=True)
    np.testing.assert_array_equal(Volume.read(path).array, other.array)
    assert {file.name for file in tmp_path.iterdir()} == set(before)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = example().write(tmp_path / "x.nrrd")
    before = path.read_bytes()

    def half(image: Any, name: str, **_: Any) -> None:
        Path(name).write_bytes(b"half a fi")
        raise RuntimeError("ITK ERROR: NrrdImageIO(0x1): Write: Error writing\n[nrrd] fwrite failed")

    monkeypatch.setattr(sitk, "WriteImage", half)
    with pytest.raises(OutputError, match=r"cannot write x.nrrd: .*fwrite failed"):
        example().write(path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5})())
    with pytest.raises(OutputError, match=r"the disk is full .*free some space"):
        example().write(tmp_path / "y.nrrd")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0, 100, 360])
def test_a_nifti_that_itk_leaves_unfinished_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kept: int
) -> None:
    """On a full disk ITK's NIfTI writer returns as if all were well."""
    whole = sitk.WriteImage

    def unfinished(image: Any, name: str, **options: Any) -> None:
        whole(image, name, **options)
        Path(name).write_bytes(Path(name).read_bytes()[:kept])

    monkeypatch.setattr(sitk, "WriteImage", unfinished)
    with pytest.raises(OutputError, match=r"cannot write x\.nii"):
        example(shape=(9, 20, 30)).write(tmp_path / f"x{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["ENOSPC", "EACCES"])
def test_a_folder_that_takes_nothing_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    import errno

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(getattr(errno, number), "refused")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match="no space left" if number == "ENOSPC" else "no permission"):
        example().write(tmp_path / "x.nrrd")


def test_a_file_where_the_folder_should_be_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write into"):
        example().write(tmp_path / "file" / "x.nrrd")
    (tmp_path / "folder.nrrd").mkdir()
    with pytest.raises(OutputError, match="a folder has that name"):
        example().write(tmp_path / "folder.nrrd", overwrite=True)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    assert example().write(tmp_path / "new" / "deep" / "x.nrrd").is_file()


@pytest.mark.parametrize(
    ("name", "volume", "message"),
    [
        ("x.xyz", example(), r"must be one of .*\.nrrd.*got '\.xyz'"),
        ("x.jpg", example(shape=(1, 4, 5)), r"got '\.jpg'"),
        ("x", example(), "got ''"),
        ("x.png", example(), "a picture holds one slice, this has 3"),
        ("x.png", example(np.float32, (1, 4, 5)), "holds uint8, uint16, the voxels are float32"),
    ],
)
def test_a_format_that_cannot_hold_the_volume_is_refused(
    tmp_path: Path, name: str, volume: Volume, message: str
) -> None:
    with pytest.raises(OutputError, match=message):
        volume.write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_masks_and_awkward_arrays_are_written(tmp_path: Path) -> None:
    mask = example().with_array(example().array > 50)
    np.testing.assert_array_equal(Volume.read(mask.write(tmp_path / "m.nii.gz")).array, mask.array)
    awkward = example().with_array(np.asfortranarray(example().array.astype(">i2"))[::-1])
    np.testing.assert_array_equal(Volume.read(awkward.write(tmp_path / "a.nrrd")).array, awkward.array)


def test_several_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]

    def write_one_and_stop() -> None:
        with replacing(paths) as temporaries:
            temporaries[0].write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_one_and_stop()
    assert list(tmp_path.iterdir()) == []
    with replacing(paths) as temporaries:
        for temporary in temporaries:
            assert temporary.parent.parent == tmp_path
            temporary.write_text("x")
        assert not any(path.exists() for path in paths)
    assert sorted(tmp_path.iterdir()) == paths


# ---- the Volume itself


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((3, 4)), np.eye(4), r"\(3, 4\)"),
        (np.zeros((0, 3, 4)), np.eye(4), r"\(0, 3, 4\)"),
        (np.zeros((3, 4, 5)), np.eye(3), "4 x 4"),
        (np.zeros((3, 4, 5)), np.diag([1, np.nan, 1, 1]), "finite"),
        (np.zeros((3, 4, 5)), np.diag([1.0, 0, 1, 1]), r"spacing must be > 0 on every axis, got \(1.0, 0.0, 1.0\)"),
        (np.zeros((3, 4, 5)), np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "the same way"),
    ],
)
def test_a_volume_that_cannot_be_is_refused(array: np.ndarray, affine: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Volume(array, affine)


def test_spacing_origin_and_direction_come_from_the_affine() -> None:
    volume = example()
    assert volume.shape == (3, 4, 5)
    np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 3.0))
    np.testing.assert_allclose(volume.origin, (-31.5, 12.25, 101.0))
    np.testing.assert_allclose(volume.direction * volume.spacing, volume.affine[:3, :3])
    np.testing.assert_allclose(volume.direction.T @ volume.direction, np.eye(3), atol=1e-12)


def test_other_voxels_on_the_same_grid() -> None:
    volume = example()
    mask = volume.with_array(volume.array > 3, name="mask")
    assert (mask.name, mask.array.dtype) == ("mask", bool)
    np.testing.assert_array_equal(mask.affine, volume.affine)
    with pytest.raises(InputError, match=r"\(3, 4, 5\) is needed, got \(3, 4, 6\)"):
        volume.with_array(np.zeros((3, 4, 6)))


def test_importing_volume_loads_neither_simpleitk_nor_torch() -> None:
    import subprocess
    import sys

    code = (
        "import FreqSegLib.volume, sys; print([m for m in ('SimpleITK', 'torch', 'PIL', 'scipy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.data
def test_real_volumes_are_read_as_simpleitk_reads_them(shared_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("brain_tumour_mr.nrrd", "stroke_t2_1mm.nii.gz", "body_ct_slab_3mm.nii.gz", "template_t1_2mm.nii.gz"):
        path = shared_data / "volumes" / name
        volume, image = Volume.read(path), sitk.ReadImage(str(path))
        truth = sitk.GetArrayFromImage(image)
        assert volume.array.dtype == truth.dtype
        np.testing.assert_array_equal(volume.array, truth)
        last = [count - 1 for count in image.GetSize()]
        np.testing.assert_allclose(
            (volume.affine @ [*last, 1])[:3], image.TransformIndexToPhysicalPoint(last), atol=1e-6
        )
        assert volume.warnings == ()
    assert capfd.readouterr().err == ""
