"""Windows and percentiles against hand-worked numbers and numpy on the whole volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from FreqSegLib import intensity
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.intensity import WINDOWS, normalise
from FreqSegLib.volume import Volume


def volume(values: Any, modality: str | None = None, dtype: Any = np.int16) -> Volume:
    array = np.asarray(values, dtype=dtype)
    return Volume(array.reshape((1,) * (3 - array.ndim) + array.shape), np.eye(4), name="case", modality=modality)


def head_ct() -> Volume:
    """Air, fat, water, brain and bone in HU."""
    return volume(np.tile([-1000, -100, 0, 40, 80, 1000], (4, 5, 1)), "CT")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("brain", [0, 0, 0, 0.5, 1, 1]),
        ("soft", [0, 60 / 400, 160 / 400, 0.5, 240 / 400, 1]),
        ("lung", [350 / 1500, 1250 / 1500, 1350 / 1500, 1390 / 1500, 1430 / 1500, 1]),
        ("bone", [0, 400 / 1800, 500 / 1800, 540 / 1800, 580 / 1800, 1500 / 1800]),
        ("40/80", [0, 0, 0, 0.5, 1, 1]),
        (" -600 / 1500 ", [350 / 1500, 1250 / 1500, 1350 / 1500, 1390 / 1500, 1430 / 1500, 1]),
        ("Brain", [0, 0, 0, 0.5, 1, 1]),
    ],
)
def test_a_window_maps_hounsfield_units_as_its_level_and_width_say(name: str, expected: list[float]) -> None:
    ct = head_ct()
    found = normalise(ct, name).apply(ct.array[0])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_every_type_gives_the_same_numbers_and_stays_untouched(dtype: Any) -> None:
    values = np.linspace(0, 120, 5 * 7 * 9).astype(dtype).reshape(5, 7, 9)
    kept = values.copy()
    normalised = normalise(Volume(values, np.eye(4)), "MR")
    found = normalised.apply(values)
    truth = np.clip((kept.astype(float) - normalised.low) / (normalised.high - normalised.low), 0, 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, truth, atol=1e-6)
    np.testing.assert_array_equal(values, kept)


def test_a_large_offset_does_not_eat_the_contrast() -> None:
    values = 1e9 + np.linspace(0, 1, 1000).reshape(10, 10, 10)
    found = normalise(Volume(values, np.eye(4)), "percentile").apply(values)
    assert np.unique(found).size > 900


@pytest.mark.parametrize(
    ("values", "modality", "dtype", "expected"),
    [
        ([-1000, 0, 60, 500], None, np.int16, "CT window soft"),
        ([-1000.0, 0.0, 60.0, 500.0], None, np.float32, "CT window soft"),
        ([-1000.5, 0.25, 60.125, 500.7], None, np.float32, "percentiles"),
        ([-100, 0, 60, 500], None, np.int16, "percentiles"),
        ([-1000, 0, 60, 500], "MR", np.int16, "percentiles"),
        ([-100, 0, 60, 500], "CT", np.int16, "CT window soft"),
        ([0, 20, 60, 255], "US", np.uint8, "percentiles"),
    ],
)
def test_auto_takes_the_modality_or_the_look_of_the_values(
    values: list[float], modality: str | None, dtype: Any, expected: str
) -> None:
    assert normalise(volume(values, modality, dtype)).label.startswith(expected)


def test_an_eight_bit_ct_keeps_its_own_range_and_says_so() -> None:
    found = normalise(volume(np.arange(256), "CT", np.uint8))
    assert found.label.startswith("percentiles")
    assert "no Hounsfield units" in found.warnings[0]


def test_a_ct_without_fat_or_air_is_suspected_to_be_shifted() -> None:
    assert "shifted" in normalise(volume([0, 900, 1064, 2000], "CT"), "0/4000").warnings[0]
    assert normalise(head_ct()).warnings == ()


def mr_head(background: float, seed: int = 0) -> tuple[Volume, np.ndarray]:
    """An MR with ``background`` of its voxels noisy air, the rest tissue of 300 to 1200."""
    rng = np.random.default_rng(seed)
    tissue = rng.random(60**3) >= background
    values = np.where(tissue, rng.uniform(300, 1200, 60**3), np.abs(rng.normal(0, 8, 60**3)))
    return volume(values.reshape(60, 60, 60).astype(np.int16), "MR"), tissue


@pytest.mark.parametrize("background", [0.0, 0.3, 0.6, 0.9, 0.97])
def test_air_does_not_move_the_bounds_of_an_mr(background: float) -> None:
    """The same tissue comes out the same however much air surrounds it."""
    mr, tissue = mr_head(background)
    found = normalise(mr)
    assert found.high == pytest.approx(1195, abs=8)
    assert found.low <= 305
    bright = found.apply(mr.array).ravel()[tissue]
    assert (bright >= 1).mean() < 0.02


def test_zeros_around_a_stripped_brain_do_not_count() -> None:
    mr, tissue = mr_head(0.9)
    stripped = volume(np.where(tissue.reshape(mr.shape), mr.array, 0), "MR")
    found = normalise(stripped)
    inside = mr.array.ravel()[tissue]
    assert found.low == pytest.approx(np.percentile(inside, 0.5), rel=0.02)
    assert found.high == pytest.approx(np.percentile(inside, 99.75), rel=0.02)


def test_a_few_wild_voxels_do_not_darken_the_rest() -> None:
    mr, _ = mr_head(0.6)
    spiked = mr.array.astype(np.float64)
    spiked.ravel()[::5000] = 1e9
    assert normalise(volume(spiked, "MR", np.float64)).high == pytest.approx(normalise(mr).high, rel=0.02)


def test_a_flat_histogram_of_a_radiograph_keeps_its_range() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (1, 200, 200))
    found = normalise(volume(grey, "CR", np.uint8))
    assert found.low <= 3
    assert found.high >= 253


def test_a_mask_like_volume_maps_to_zero_and_one() -> None:
    mask = volume([0, 0, 0, 7], None, np.uint8)
    np.testing.assert_array_equal(normalise(mask).apply(mask.array).ravel(), [0, 0, 0, 1])


def test_slices_share_the_bounds_of_the_whole_volume() -> None:
    """A dark slice stays dark: it is not stretched on its own."""
    values = np.random.default_rng(1).uniform(0, 1000, (6, 30, 30))
    values[0] *= 0.02
    case = Volume(values, np.eye(4), modality="MR")
    normalised = normalise(case)
    assert normalised.apply(values[0]).max() < 0.05
    np.testing.assert_array_equal(normalised.apply(values)[3], normalised.apply(values[3]))


@given(st.tuples(*[st.integers(1, 40)] * 3), st.integers(50, 5000))
@settings(max_examples=60, deadline=None)
def test_a_sample_of_a_huge_volume_visits_every_row_and_column(shape: tuple[int, int, int], limit: int) -> None:
    before, intensity.LARGEST_SAMPLE = intensity.LARGEST_SAMPLE, limit
    try:
        index = np.arange(np.prod(shape)).reshape(shape)
        taken = intensity._sample(index).astype(int)
        again = intensity._sample(index).astype(int)
    finally:
        intensity.LARGEST_SAMPLE = before
    np.testing.assert_array_equal(taken, again)
    assert 0 < taken.size <= limit
    for axis, places in enumerate(np.unravel_index(taken, shape)):
        if taken.size >= 32 * shape[axis]:
            assert np.unique(places).size == shape[axis]


def test_sampled_percentiles_are_close_to_the_full_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    mr, _ = mr_head(0.6)
    full = normalise(mr)
    monkeypatch.setattr(intensity, "LARGEST_SAMPLE", 20_000)
    sampled = normalise(mr)
    assert sampled.high == pytest.approx(full.high, rel=0.01)
    assert sampled.low == pytest.approx(full.low, abs=2)


def test_a_constant_volume_is_refused_with_its_value() -> None:
    with pytest.raises(InputError, match=r"case: every voxel has the value -1024"):
        normalise(volume(np.full((3, 4, 5), -1024)))


def test_voxels_that_are_no_numbers_are_counted() -> None:
    values = np.ones((3, 4, 5))
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    with pytest.raises(InputError, match="3 voxels are NaN or infinite"):
        normalise(volume(values, None, np.float64))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("abdomen", "unknown intensity setting 'abdomen'.*brain, lung, soft, bone"),
        ("40/0", "width must be > 0, got 0"),
        ("40/-80", "width must be > 0, got -80"),
        ("5000/100", r"5000/100 \(4950 to 5050\) holds none of the volume's values \(-1000 to 1000\)"),
        ("", "unknown intensity setting"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        normalise(head_ct(), setting)


def test_the_named_windows_are_the_usual_ones() -> None:
    assert WINDOWS == {"brain": (40, 80), "lung": (-600, 1500), "soft": (40, 400), "bone": (400, 1800)}


@pytest.mark.data
def test_real_volumes_are_recognised(shared_data: Path) -> None:
    labels = {
        name: normalise(Volume.read(shared_data / "volumes" / name)).label.split(":")[0]
        for name in ("body_ct_slab_3mm.nii.gz", "body_mr_slab_3mm.nii.gz", "brain_tumour_mr.nrrd")
    }
    assert labels["body_ct_slab_3mm.nii.gz"] == "CT window soft"
    assert labels["body_mr_slab_3mm.nii.gz"].startswith("percentiles")
    assert labels["brain_tumour_mr.nrrd"].startswith("percentiles")
