"""Volume fusion on a simulated head (and on real pairs where they are): grids, checks, records, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pywt
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.device import MeasuredBatches
from FreqSegLib.errors import Cancelled, InputError, SettingsError
from FreqSegLib.fusion import Fused
from FreqSegLib.fusion.rules import Average, ChooseMax, Maximum
from FreqSegLib.progress import Progress
from FreqSegLib.registration import OnGrid, RigidTransform, as_simpleitk, check_registration, register_rigidly
from FreqSegLib.settings import FusionSettings
from FreqSegLib.volume import Volume
from FreqSegLib.volume_fusion import VolumeFuser, band_names, prepared_pair, read_record

SIDE, SLICES = 64, 9
AFFINE = np.array([[1.0, 0, 0, -32], [0, 1.0, 0, -32], [0, 0, 2.0, -9], [0, 0, 0, 1]])


def head(seed: int = 0) -> tuple[Volume, Volume]:
    """A CT in Hounsfield units and an MR of one simulated head, on one grid."""
    rng = np.random.default_rng(seed)
    k, j, i = np.mgrid[:SLICES, :SIDE, :SIDE].astype(float)
    radius = np.hypot((j - 30) / 27, (i - 33) / 21) + 0.05 * np.abs(k - 4)
    blobs = sum(
        a * np.exp(-((j - y) ** 2 + (i - x) ** 2) / s)
        for a, y, x, s in zip(
            *(rng.uniform(low, high, 14) for low, high in ((-1, 1), (12, 48), (18, 48), (6, 40))), strict=True
        )
    )
    brain, skull, skin = radius < 0.82, (radius >= 0.82) & (radius < 0.92), (radius >= 0.92) & (radius < 1)
    ct = np.select([brain, skull, skin], [36 + 12 * blobs, 1100.0, 30.0], -1000.0) + rng.normal(0, 1, k.shape)
    mr = np.select([brain, skull, skin], [500 - 250 * blobs, 60.0, 800.0], 5.0) + rng.normal(0, 4, k.shape)
    return (
        Volume(np.rint(ct).astype(np.int16), AFFINE, name="ct"),
        Volume(np.clip(np.rint(mr), 0, None).astype(np.int16), AFFINE, name="mr"),
    )


def fuser(rule: object = None, **settings: object) -> VolumeFuser:
    return VolumeFuser(rule or ChooseMax(), FusionSettings(**settings))  # type: ignore[arg-type]


def displaced(volume: Volume, right: float) -> Volume:
    """The same voxels, said to lie elsewhere."""
    affine = volume.affine.copy()
    affine[0, 3] += right
    return replace(volume, affine=affine)


def turned(volume: Volume, degrees: float, shift: tuple[float, float, float]) -> Volume:
    """The same voxels, said to lie turned around the volume's centre (about an oblique axis) and shifted, in mm."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.radians(degrees)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    centre = (volume.affine @ [*((count - 1) / 2 for count in volume.shape[::-1]), 1])[:3]
    moved = np.eye(4)
    moved[:3, :3], moved[:3, 3] = rotation, centre - rotation @ centre + shift
    return replace(volume, affine=moved @ volume.affine)


def test_a_fused_volume_is_choose_max_of_every_slice_in_the_windows_that_are_recorded() -> None:
    ct, mr = head()
    result = fuser().fuse(ct, mr)
    assert result.fused.shape == ct.shape
    assert np.array_equal(result.fused.affine, ct.affine)
    record = result.metadata
    assert (record["ct"]["low"], record["ct"]["high"]) == (0.0, 80.0)
    assert "brain" in record["ct"]["intensity"]
    low, high = record["mr"]["low"], record["mr"]["high"]
    one = np.clip(ct.array[4] / 80.0, 0, 1)
    other = np.clip((mr.array[4] - low) / (high - low), 0, 1)
    first, second = (pywt.dwt2(image, "haar", mode="symmetric") for image in (one, other))
    details = tuple(np.where(np.abs(a) >= np.abs(b), a, b) for a, b in zip(first[1], second[1], strict=True))
    expected = pywt.idwt2((np.maximum(first[0], second[0]), details), "haar", mode="symmetric")
    # the inferior slice comes first in the array too
    assert result.fused.array[4] == pytest.approx(255 * np.clip(expected, 0, 1), abs=0.01)


def test_a_volume_fused_with_itself_comes_back() -> None:
    ct, _ = head()
    grey = ct.with_array(np.clip(ct.array + 20, 0, 255).astype(np.uint8))
    for method in (ChooseMax("db4", 3), Average(), Maximum()):
        fused = fuser(method).fuse(grey, grey).fused.array
        assert np.abs(fused - grey.array).max() < 255e-5


def test_the_orientation_of_either_array_changes_nothing() -> None:
    ct, mr = head()
    expected = fuser().fuse(ct, mr).fused.array

    flips = np.eye(4)
    flips[0, 0], flips[0, 3] = -1, SIDE - 1
    flips[2, 2], flips[2, 3] = -1, SLICES - 1
    other = replace(mr, array=mr.array[::-1, :, ::-1].copy(), affine=mr.affine @ flips)
    result = fuser().fuse(ct, other)
    assert result.record.resampled
    assert result.fused.array == pytest.approx(expected, abs=0.05)
    assert not result.warnings

    swap = np.eye(4)[[2, 1, 0, 3]]
    sideways = replace(ct, array=ct.array.transpose(2, 1, 0).copy(), affine=ct.affine @ swap)
    turned_result = fuser().fuse(sideways, mr)
    assert turned_result.record.axis == "axial"
    assert turned_result.fused.array.transpose(2, 1, 0) == pytest.approx(expected, abs=0.05)


def test_an_mr_on_another_grid_is_resampled_slab_by_slab_as_at_once() -> None:
    ct, mr = head()
    coarse = Volume(mr.array[::2, ::2, 1::2].astype(np.int16), turned(mr, 4, (1, -2, 1)).affine @ np.diag([2, 2, 2, 1]))
    transform = RigidTransform(np.linalg.inv(ct.affine) @ turned(ct, 3, (1, 1, 0)).affine, 0, "test", 0)
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(transform.matrix[:3, :3].ravel())
    affine.SetTranslation(transform.matrix[:3, 3])
    whole = sitk.GetArrayFromImage(
        sitk.Resample(as_simpleitk(coarse), as_simpleitk(ct), affine, sitk.sitkLinear, -1.0, sitk.sitkFloat32)
    )
    grid = OnGrid(ct, coarse, transform)
    for axis, (start, stop) in ((0, (2, 5)), (1, (10, 30)), (2, (60, 64))):
        slab = grid.slab(axis, start, stop)
        expected = whole.take(range(start, stop), axis)
        assert 0.01 < np.isnan(slab).mean() < 0.99
        assert np.nan_to_num(slab, nan=-1.0) == pytest.approx(expected, abs=1e-3)


def test_where_there_is_no_mr_the_ct_is_shown_alone() -> None:
    ct, mr = head()
    half = replace(mr, array=mr.array[:5])
    result = fuser(Maximum()).fuse(ct, half)
    ct_alone = 255 * np.clip(ct.array[5:] / 80.0, 0, 1)
    assert result.fused.array[5:] == pytest.approx(ct_alone, abs=0.01)
    assert (result.fused.array[:5] > 255 * np.clip(ct.array[:5] / 80.0, 0, 1) + 5).any()
    assert result.record.covered == pytest.approx(5 / 9, abs=1e-3)
    assert "56 % of the CT" in " ".join(result.warnings)


def test_pairs_that_do_not_lie_on_each_other_are_refused_with_an_offer() -> None:
    ct, mr = head()
    upside_down = mr.with_array(mr.array[:, ::-1, ::-1].copy())
    for other in (displaced(mr, 9), displaced(mr, -9), upside_down):
        with pytest.raises(InputError, match=r"(?s)do not seem to lie on each other.*--register rigid.*--no-check"):
            fuser().fuse(ct, other)
        assert fuser(check=False).fuse(ct, other).record.check is None
    with pytest.raises(InputError, match=r"do not overlap: no voxel"):
        fuser().fuse(ct, displaced(mr, 500))
    with pytest.raises(InputError, match=r"belong to both.*--register rigid"):
        fuser().fuse(ct, displaced(mr, 60))


def test_the_check_compares_with_copies_shifted_by_8_pixels_and_turned() -> None:
    ct, mr = head()
    pair = prepared_pair(ct, mr)
    one, other, _ = pair.slices(range(9))
    found = check_registration(one, other)
    assert found is not None
    assert found.registered
    assert not found.doubtful
    # one of the four shifts undoes a shift of 8
    moved = np.roll(other, 8, axis=2)
    again = check_registration(one, moved)
    assert again is not None
    assert not again.registered
    assert again.shifted[2] == pytest.approx(found.own, abs=0.02)
    assert check_registration(one[:, :30, :30], other[:, :30, :30]) is None


def test_unequal_frames_of_reference_are_refused_and_different_patients_warned_of() -> None:
    ct, mr = head()
    one = replace(ct, frame_of_reference="1.2.3", patient="Doe^Jane 7", modality="CT")
    other = replace(mr, frame_of_reference="1.2.4", patient="Roe^Rick 8", modality="MR")
    with pytest.raises(InputError, match=r"1\.2\.3 and 1\.2\.4.*--register rigid"):
        fuser().fuse(one, other)
    result = fuser(check=False).fuse(one, other)
    assert "different patients" in " ".join(result.warnings)
    assert not (result.fused.patient and result.fused.patient in result.record.as_json())
    same = fuser().fuse(one, replace(other, frame_of_reference="1.2.3", patient="Doe^Jane 7"))
    assert not same.warnings


def test_the_wrong_modality_is_warned_of() -> None:
    ct, mr = head()
    assert "two CTs" in " ".join(fuser().fuse(ct, ct).warnings)
    assert "exchanged" in " ".join(fuser(ct_window="percentile").fuse(mr, ct).warnings)
    labelled = fuser(ct_window="percentile").fuse(replace(mr, modality="PT"), replace(mr, modality="US"))
    assert "'mr', given as the CT, says it is PT." in labelled.warnings
    assert "'mr', given as the MR, says it is US." in labelled.warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mr: mr.with_array(np.where(mr.array > 700, np.nan, mr.array)), "NaN or infinite"),
        (lambda mr: mr.with_array(np.full(mr.shape, 7, np.int16)), "every voxel has the value 7"),
        (lambda mr: replace(mr, array=mr.array[:1], spatial_dimension=2), "3 dimensions and 'mr' 2"),
    ],
)
def test_an_mr_that_cannot_be_used_is_refused(change: Callable[[Volume], Volume], message: str) -> None:
    ct, mr = head()
    with pytest.raises(InputError, match=message):
        fuser().fuse(ct, change(mr))


def test_single_images_must_share_their_size_and_cannot_be_registered() -> None:
    ct, mr = (replace(volume, array=volume.array[4:5], spatial_dimension=2) for volume in head())
    assert fuser().fuse(ct, mr).fused.shape == (1, SIDE, SIDE)
    with pytest.raises(InputError, match="64 x 64 pixels, 'mr' 64 x 60"):
        fuser().fuse(ct, replace(mr, array=mr.array[:, :, :60]))
    with pytest.raises(InputError, match="no place in the patient"):
        fuser().fuse(ct, mr, register="rigid")
    with pytest.raises(InputError, match="another program"):
        fuser().fuse(ct, mr.with_array(mr.array[:, ::-1, ::-1]))


def test_a_volume_of_one_slice_is_fused_with_the_mr_that_crosses_it() -> None:
    ct, mr = head()
    whole = fuser().fuse(ct, mr).fused.array
    step = np.eye(4)
    step[2, 3] = 4
    alone = replace(ct, array=ct.array[4:5], affine=ct.affine @ step)
    assert fuser().fuse(alone, mr).fused.array[0] == pytest.approx(whole[4], abs=3)


def test_a_cancelled_run_stops_and_progress_counts_slices() -> None:
    ct, mr = head()
    seen: list[Progress] = []

    def cancel() -> bool:
        return any(one.stage == "Fusing" and one.done >= 3 for one in seen)

    with pytest.raises(Cancelled):
        fuser(batch_size=1).fuse(ct, mr, progress=seen.append, cancel=cancel)
    assert seen[-1].done < SLICES
    seen.clear()
    fuser(batch_size=4).fuse(ct, mr, progress=seen.append)
    assert [one.done for one in seen if one.stage == "Fusing"] == [0, 4, 8, 9]


class Greedy:
    """A method whose memory holds two slices."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, ct: Tensor, mr: Tensor) -> Fused:
        if len(ct) > 2:
            raise RuntimeError("CUDA out of memory")
        self.sizes.append(len(ct))
        return Maximum()(ct, mr)


def test_neither_the_batch_nor_a_shortage_of_memory_changes_the_result() -> None:
    ct, mr = head()
    expected = fuser(Maximum(), batch_size=1).fuse(ct, mr).fused.array
    greedy = Greedy()
    assert np.array_equal(fuser(greedy, batch_size=8).fuse(ct, mr).fused.array, expected)
    assert max(greedy.sizes) == 2
    assert np.array_equal(fuser(Maximum()).fuse(ct, mr).fused.array, expected)
    network = ChooseMax("db4", 2)
    one, many = (fuser(network, batch_size=size).fuse(ct, mr).fused.array for size in (1, 9))
    assert one == pytest.approx(many, abs=1e-3)


def test_measured_batches_grow_only_while_an_item_gets_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes_with(cost: Callable[[int], float], most: int) -> list[int]:
        clock = [0.0]
        monkeypatch.setattr("FreqSegLib.device.time.perf_counter", lambda: clock[0])
        sizes = []

        def work(indices: range) -> None:
            sizes.append(len(indices))
            clock[0] += cost(len(indices))

        done = [index for indices, _ in MeasuredBatches(most).run(60, work) for index in indices]
        assert done == list(range(60))
        return sizes

    assert max(sizes_with(lambda count: 1.0 * count, 8)) == 2
    assert sizes_with(lambda count: 1.0 * count, 8)[-1] == 1
    assert sizes_with(lambda count: 5 + 0.1 * count, 8)[-2] == 8
    # 4 is best here: 8 is tried, and left again
    best = sizes_with(lambda count: 4 + count + (20 if count > 4 else 0), 16)
    assert 8 in best
    assert best[-2] == 4


def test_a_batch_that_did_not_fit_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("FreqSegLib.device.time.perf_counter", lambda: clock[0])
    tried = []

    def work(indices: range) -> None:
        tried.append(len(indices))
        clock[0] += 1
        if len(indices) > 2:
            raise MemoryError

    list(MeasuredBatches(64).run(40, work))
    assert tried.count(4) == 1
    assert set(tried[tried.index(4) + 1 :]) == {2} | ({1} if tried[-1] == 1 else set())


def test_masks_are_the_cts_share_on_the_cts_grid() -> None:
    ct, mr = head()
    result = fuser(Maximum()).fuse(ct, mr, masks=True)
    (mask,) = result.masks
    pair = result.pair
    one, other, _ = pair.slices(range(9))
    assert mask.shape == ct.shape
    assert np.array_equal(mask.array == 100, one > other)
    assert np.array_equal(mask.array == 0, one < other)
    bands = fuser(ChooseMax("db4", 2)).fuse(ct, mr, masks=True).masks
    assert [band.name for band in bands] == [
        *("level 1 LH", "level 1 HL", "level 1 HH", "level 2 LH", "level 2 HL", "level 2 HH", "low band")
    ]
    assert not fuser().fuse(ct, mr).masks


@pytest.mark.parametrize("wave", ["haar", "db4"])
def test_masks_lie_where_their_pixels_are(wave: str) -> None:
    """Long wavelets have coefficients beyond the border, which must not push the mask aside."""
    bone, soft = (np.full((2, 72, 61), level, np.uint8) for level in (50, 100))
    bone[:, 8:32, 30:57] = 200
    ct, mr = Volume(bone, np.eye(4)), Volume(soft, np.eye(4))
    mr.array[0, 0, 0] = 0
    low = fuser(ChooseMax(wave, 2), check=False).fuse(ct, mr, masks=True).masks[-1].array[1]
    assert (low[13:27, 35:52] == 100).all()
    assert (low[40:, :] == 0).all()
    assert (low[:, :22] == 0).all()


def test_masks_of_pixels_stand_beside_those_of_bands() -> None:
    """A network may add a mask of the pixels themselves; it is shown as it is."""

    class WithPixels(ChooseMax):
        def __call__(self, ct: Tensor, mr: Tensor) -> Fused:
            found = super().__call__(ct, mr)
            return Fused(found.image, (*found.masks, (ct > mr).float()), (*found.names, "pixels"))

    ct, mr = head()
    plain = fuser(ChooseMax("db4", 2)).fuse(ct, mr, masks=True).masks
    result = fuser(WithPixels("db4", 2)).fuse(ct, mr, masks=True)
    *bands, pixels = result.masks
    one, other, _ = result.pair.slices(range(9))
    assert np.array_equal(pixels.array == 100, one > other)
    for band, expected in zip(bands, plain, strict=True):
        assert np.array_equal(band.array, expected.array)


def test_band_names() -> None:
    assert list(band_names("level 2 LH, HL, HH", 3)) == ["level 2 LH", "level 2 HL", "level 2 HH"]
    assert list(band_names("low band", 1)) == ["low band"]
    assert list(band_names("odd", 2)) == ["odd 1", "odd 2"]


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_the_file_says_how_it_was_made(tmp_path: Path, suffix: str) -> None:
    ct, mr = head()
    result = fuser(method="choose-max", ct_window="40/400").fuse(ct, mr)
    path = result.fused.write(tmp_path / f"fused{suffix}")
    again = Volume.read(path)
    record = read_record(again)
    assert record is not None
    assert record["method"] == "choose-max"
    assert (record["ct"]["low"], record["ct"]["high"]) == (-160, 240)
    assert record["check"]["own"] == pytest.approx(result.record.check.own)  # type: ignore[union-attr]
    assert np.array_equal(again.array, result.fused.array)
    assert read_record(ct) is None


def test_8_bit_images_keep_their_grey_levels() -> None:
    ct, mr = head()
    levels = ct.with_array(np.clip(ct.array + 50, 0, 200).astype(np.uint8))
    record = fuser().fuse(levels, mr).record
    assert (record.ct.low, record.ct.high) == (0, 255)
    assert record.mr.low != 0


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(SettingsError, match="method must be one of"):
        FusionSettings(method="wavelet")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="no fusion preset 'large'"):
        VolumeFuser.from_preset("large")
    with pytest.raises(SettingsError, match="method must be one of"):
        VolumeFuser.from_preset(method="waves")
    assert VolumeFuser.from_preset(method="max", device="cpu").settings.method == "max"


def test_rigid_registration_lays_a_displaced_simulated_head_back() -> None:
    ct, mr = head()
    thick = [np.repeat(volume.array, 2, axis=0) for volume in (ct, mr)]
    half = np.diag([1.0, 1, 0.5, 1])
    one, other = (
        replace(volume, array=array, affine=volume.affine @ half) for volume, array in zip((ct, mr), thick, strict=True)
    )
    result = fuser().fuse(one, displaced(other, 11), register="rigid")
    assert result.record.transform is not None
    assert result.record.transform[0][3] == pytest.approx(11, abs=1.0)
    assert result.record.check is not None
    assert result.record.check.registered


@pytest.mark.data
def test_registered_patients_pass_the_check_and_displaced_ones_do_not(shared_data: Path) -> None:
    folder = shared_data / "fusion" / "harvard_ct_mri"
    for patient in ("28", "41"):
        names = [path.name for path in sorted((folder / "CT").glob("*.png")) if path.stem[:-3] == patient][::3]
        ct, mr = (_stacked([folder / side / name for name in names]) for side in ("CT", "MRI"))
        good = check_registration(ct, mr)
        assert good is not None
        assert good.registered
        for bad in (np.roll(mr, 12, 1), np.roll(mr, (9, -9), (1, 2)), mr[:, ::-1, ::-1]):
            found = check_registration(ct, np.ascontiguousarray(bad))
            assert found is not None
            assert not found.registered


@pytest.mark.data
@pytest.mark.slow
def test_a_displaced_template_is_registered_to_where_the_undisplaced_one_is(shared_data: Path) -> None:
    """10 degrees and 15 mm: within 1 degree and 2 mm of the undisplaced pair's transform, at every corner."""
    from FreqSegLib.intensity import normalise

    def normalised(name: str) -> Volume:
        volume = Volume.read(shared_data / "volumes" / name)
        return volume.with_array(normalise(volume).apply(volume.array))

    ct, mr = normalised("template_ct_2mm.nii.gz"), normalised("template_t1_2mm.nii.gz")
    moved = turned(mr, 10, (9, -9, 7.746))
    displacement = moved.affine @ np.linalg.inv(mr.affine)
    reference, found = register_rigidly(ct, mr), register_rigidly(ct, moved)
    back = np.linalg.inv(displacement) @ found.matrix @ np.linalg.inv(reference.matrix)
    assert RigidTransform(back, 0, "", 0).angle < 1
    count = np.array(ct.shape[::-1]) - 1
    for share in np.ndindex(2, 2, 2):
        corner = (ct.affine @ [*(share * count), 1])[:3]
        assert np.linalg.norm((back @ [*corner, 1])[:3] - corner) < 2


def _stacked(paths: list[Path]) -> NDArray[np.float32]:
    return np.concatenate([Volume.read(path).array for path in paths]).astype(np.float32) / 255


def test_a_network_on_a_device_gets_its_slices_there() -> None:
    """The method sees (B, 1, H, W) float32 in [0, 1] on the fuser's device, and no gradients are kept."""
    seen = []

    def method(ct: Tensor, mr: Tensor) -> Fused:
        seen.append((ct.shape, ct.dtype, ct.device.type, float(ct.min()), float(mr.max()), torch.is_grad_enabled()))
        return Average()(ct, mr)

    fuser(method, batch_size=5).fuse(*head())
    # each thread of a CPU takes its part of a batch
    parts = [shape[0] for shape, *_ in seen]
    assert sum(parts) == 9
    assert len(parts) == sum(min(batch, torch.get_num_threads()) for batch in (5, 4))
    assert all(tuple(shape[1:]) == (1, SIDE, SIDE) for shape, *_ in seen)
    assert {rest[0] for _, *rest in seen} == {torch.float32}
    assert not any(grad for *_, grad in seen)
    assert min(low for *_, low, _, _ in seen) >= 0
    assert max(high for *_, high, _ in seen) <= 1
