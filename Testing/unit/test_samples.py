"""The simulated head in Resources/Samples: what it shows, where it lies, and that the script makes it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

sitk = pytest.importorskip("SimpleITK")
ndimage = pytest.importorskip("scipy.ndimage")

FILES = {"ct": "simulated_ct.nrrd", "flair": "simulated_flair.nrrd", "lesion": "simulated_lesion.nrrd"}
MIRRORED_POSTERIOR = np.s_[:, ::-1, :]


@pytest.fixture(scope="module")
def folder(project_root: Path) -> Path:
    return project_root / "Resources" / "Samples"


@pytest.fixture(scope="module")
def images(folder: Path) -> dict:
    return {name: sitk.ReadImage(str(folder / file)) for name, file in FILES.items()}


@pytest.fixture(scope="module")
def arrays(images: dict) -> dict[str, np.ndarray]:
    return {name: sitk.GetArrayFromImage(image) for name, image in images.items()}


@pytest.fixture(scope="module")
def within_skull(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return _filled(arrays["ct"] > 300) & (arrays["ct"] <= 300)


@pytest.fixture(scope="module")
def script(folder: Path) -> Iterator[ModuleType]:
    pytest.importorskip("nilearn", reason="making the samples needs nilearn: pip install freqseg[samples]")
    spec = importlib.util.spec_from_file_location("make_samples", folder / "make_samples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_files_are_small_and_say_that_they_are_simulated(folder: Path, images: dict) -> None:
    assert sum((folder / file).stat().st_size for file in FILES.values()) < 2_000_000
    for image in images.values():
        assert image.GetMetaData("description").startswith("Simulated ")
    assert [image.GetMetaData("modality") for image in images.values()] == ["CT", "MR", "SEG"]


def test_the_three_volumes_share_one_axial_grid(images: dict) -> None:
    grids = {(im.GetSize(), im.GetSpacing(), im.GetOrigin(), im.GetDirection()) for im in images.values()}
    assert grids == {((208, 240, 25), (1.0, 1.0, 4.0), (-103.5, -104.5, -5.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))}


def test_the_lesion_is_one_piece_in_the_right_hemisphere(images: dict, arrays: dict, within_skull: np.ndarray) -> None:
    lesion = arrays["lesion"]
    assert set(np.unique(lesion)) == {0, 1}
    assert ndimage.label(lesion)[1] == 1
    assert np.all(within_skull[lesion == 1])
    k, j, i = (axis.mean() for axis in np.nonzero(lesion))
    left, _, up = images["lesion"].TransformContinuousIndexToPhysicalPoint((i, j, k))
    assert -45 < left < -20
    assert 20 < up < 50
    assert 30 < 2 * np.sqrt(lesion.sum(axis=(1, 2)).max() / np.pi) < 45  # mm across, where it is largest


def test_the_lesion_is_bright_on_flair_and_dark_on_ct(arrays: dict, within_skull: np.ndarray) -> None:
    lesion, elsewhere = arrays["lesion"] == 1, within_skull & (arrays["lesion"] == 0)
    assert arrays["flair"][lesion].mean() > 1.3 * np.median(arrays["flair"][elsewhere])
    assert arrays["ct"][lesion].mean() < np.median(arrays["ct"][elsewhere]) - 6


def test_the_same_fluid_is_dark_on_ct_and_on_flair(arrays: dict, within_skull: np.ndarray) -> None:
    smooth = ndimage.uniform_filter(arrays["ct"].astype(float), (0, 3, 3))  # its noise is as large as the contrast
    fluid = ndimage.binary_erosion(within_skull, np.ones((1, 3, 3)), iterations=8) & (smooth < 15)
    assert fluid.sum() > 1000
    assert arrays["flair"][fluid].mean() < 0.4 * np.median(arrays["flair"][within_skull])


def test_the_skull_encloses_the_brain_under_a_scalp_with_fat(arrays: dict, within_skull: np.ndarray) -> None:
    assert 900 < within_skull.sum() * 0.004 < 1500  # ml above the orbits
    scalp = _filled(arrays["ct"] > -500) & ~_filled(arrays["ct"] > 300)
    fat = scalp & (arrays["ct"] < -40) & (arrays["ct"] > -130)
    assert np.all(fat.sum(axis=(1, 2))[:20] > 100)
    assert np.median(arrays["flair"][fat]) > 1.8 * np.median(arrays["flair"][within_skull])


def test_ct_and_flair_show_the_same_head(arrays: dict) -> None:
    ct, flair = _filled(arrays["ct"] > -500), _filled(arrays["flair"] > 25)
    assert _dice(ct, flair) > 0.98
    assert _dice(ct, flair) > max(_dice(ct, np.roll(flair, 3, axis)) for axis in (1, 2)) + 0.005


def test_nothing_but_air_lies_outside_the_head(arrays: dict) -> None:
    outside = arrays["flair"] == 0
    assert np.all(arrays["ct"][outside & (ndimage.distance_transform_edt(outside) > 3)] == -1000)
    assert np.all(outside[:, [0, -1], :])
    assert np.all(outside[:, :, [0, -1]])


def test_the_readme_gives_the_lesion_as_it_is_and_keeps_the_notice(folder: Path, images: dict, arrays: dict) -> None:
    readme = " ".join((folder / "README.md").read_text(encoding="utf-8").replace(">", "").split())
    lesion = arrays["lesion"]
    k, j, i = np.nonzero(lesion)
    centre = images["lesion"].TransformContinuousIndexToPhysicalPoint((i.mean(), j.mean(), k.mean()))
    assert f"{lesion.sum() * 0.004:.1f} ml" in readme
    assert f"slices {k.min()} to {k.max()}" in readme
    assert f"largest in slice {np.bincount(k).argmax()}" in readme
    assert "LPS ({:.0f}, {:.0f}, {:.0f}) mm".format(*centre) in readme
    assert "Copyright (C) 1993–2004 Louis Collins, McConnell Brain Imaging Centre" in readme
    assert "Permission to use, copy, modify, and distribute" in readme


def test_the_head_faces_as_the_template_does(images: dict, arrays: dict, within_skull: np.ndarray) -> None:
    datasets = pytest.importorskip("nilearn.datasets", reason="the template comes with nilearn")
    mask = datasets.load_mni152_brain_mask(resolution=2)
    k, j, i = np.indices(within_skull.shape)
    lps = np.stack([i, j, k], axis=-1) * images["ct"].GetSpacing() + images["ct"].GetOrigin()
    template_mm = lps * (-1, -1, 1) / 0.94  # LPS -> RAS, and this head is smaller than the average
    inverse = np.linalg.inv(mask.affine)
    voxels = np.moveaxis(template_mm @ inverse[:3, :3].T + inverse[:3, 3], -1, 0)
    template = ndimage.map_coordinates(np.asarray(mask.dataobj, dtype=float), voxels, order=0) > 0
    upright = _dice(within_skull, template)
    assert upright > 0.93
    assert upright > _dice(within_skull[MIRRORED_POSTERIOR], template) + 0.02


@pytest.mark.slow
def test_the_script_makes_the_shipped_voxels_again(
    script: ModuleType, tmp_path: Path, images: dict, arrays: dict
) -> None:
    written = script.write(script.simulate(), tmp_path)
    assert [path.name for path in written] == list(FILES.values())
    for name, path in zip(FILES, written, strict=True):
        image = sitk.ReadImage(str(path))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), arrays[name])
        assert image.GetOrigin() == images[name].GetOrigin()
    assert {path.name for path in tmp_path.iterdir()} == set(FILES.values())


def _filled(mask: np.ndarray) -> np.ndarray:
    return np.stack([ndimage.binary_fill_holes(piece) for piece in mask])


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())
