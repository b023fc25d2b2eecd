"""The picture of a decomposition: the shares it gives, and the files it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pywt
import torch

from FreqSegLib.band_figure import band_energies, band_figure
from FreqSegLib.cli import main
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.volume import Volume
from FreqSegLib.wavelet import dwt2


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).random((24, 32), dtype=np.float32)


def test_the_shares_are_those_of_pywavelets_coefficients(image: np.ndarray) -> None:
    found = band_energies(dwt2(torch.from_numpy(image)[None, None], "db2", 2, "symmetric"))
    low, second, first = pywt.wavedec2(image.astype(np.float64), "db2", mode="symmetric", level=2)
    energies = [np.square(band).sum() for band in (low, *second, *first)]
    assert list(found) == ["LL2", "LH2", "HL2", "HH2", "LH1", "HL1", "HH1"]
    assert list(found.values()) == pytest.approx([energy / sum(energies) for energy in energies], rel=1e-5)


def test_stripes_lie_in_the_band_of_their_direction() -> None:
    across = np.tile(np.array([0, 1], np.float32), (16, 8))
    vertical = band_energies(dwt2(torch.from_numpy(across)[None, None]))
    horizontal = band_energies(dwt2(torch.from_numpy(np.ascontiguousarray(across.T))[None, None]))
    assert vertical == pytest.approx({"LL1": 0.5, "LH1": 0, "HL1": 0.5, "HH1": 0}, abs=1e-6)
    assert horizontal == pytest.approx({"LL1": 0.5, "LH1": 0.5, "HL1": 0, "HH1": 0}, abs=1e-6)
    assert set(band_energies(dwt2(torch.zeros(1, 1, 8, 8))).values()) == {0.0}


def test_every_level_has_its_row_and_the_inverse_its_error(image: np.ndarray) -> None:
    figure = band_figure(image, "haar", 3, title="here")
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 16
    for level in (1, 2, 3):
        assert sum(f"{level}: horizontal edges" in title for title in titles) == 1
    assert next(title for title in titles if title.startswith("LL")).startswith("LL3: ")
    told = figure.get_suptitle()
    assert told.startswith("here    haar, J = 3, symmetric")
    assert float(told.rsplit(" ", 1)[1]) < 1e-5


def test_what_is_no_slice_or_no_wavelet_is_refused(image: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"got an array of shape \(1, 24, 32\)"):
        band_figure(image[None])
    with pytest.raises(SettingsError, match="wavelet 'har' is not offered"):
        band_figure(image, "har")


def test_the_command_draws_the_slice_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = np.random.default_rng(0).random((5, 16, 20), dtype=np.float32)
    source, target = tmp_path / "v.nrrd", tmp_path / "new" / "bands.png"
    Volume(array, np.diag([1.0, 1, 1, 1])).write(source)
    assert main(["bands", str(source), "-o", str(target), "--slice", "2", "--levels", "2", "--wave", "db2"]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert main(["bands", str(source), "-o", str(target)]) == 1
    assert main(["bands", str(source), "-o", str(target), "--overwrite", "--slice", "6"]) == 2
    assert "has 5 slices along this axis, got slice 6" in " ".join(capsys.readouterr().err.split())
    assert main(["bands", str(source), "-o", str(tmp_path / "bands.jpg")]) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bands.png"]
