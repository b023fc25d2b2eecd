"""Fusion metrics on pictures whose values can be worked by hand, and against other programs where they have them."""

from __future__ import annotations

from math import exp, isinf, isnan, log10, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import convolve2d

from FreqSegLib.errors import InputError
from FreqSegLib.evaluation import fusion_metrics as metrics

Picture = NDArray[np.float64]

BEST_EDGE = 0.9994 / (1 + exp(-15 * 0.5)) * 0.9879 / (1 + exp(-22 * 0.2))


def halves(low: float = 0.0, high: float = 255.0, side: int = 32) -> Picture:
    """Left half low, right half high."""
    picture = np.full((side, side), low)
    picture[:, side // 2 :] = high
    return picture


def pictures(seed: int = 0, side: int = 64) -> tuple[Picture, Picture]:
    """A smooth and a blocky picture of whole grey levels that share a little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    smooth = 127 + 90 * np.sin(7 * x + seed) * np.cos(5 * y) + rng.normal(0, 5, (side, side))
    blocks = np.kron(rng.uniform(0, 255, (8, 8)), np.ones((side // 8, side // 8))) * 0.8 + 0.2 * smooth
    first, second = (np.rint(np.clip(picture, 0, 255)) for picture in (smooth, blocks))
    return first, second


def test_entropy_counts_bits() -> None:
    assert metrics.entropy(np.full((16, 16), 7.0)) == 0.0
    assert metrics.entropy(halves()) == pytest.approx(1.0)
    assert metrics.entropy(np.tile(np.arange(256.0), (4, 1))) == pytest.approx(8.0)
    # 1/4, 3/4: 0.25 * 2 + 0.75 * log2(4/3)
    quarter = np.zeros((16, 16))
    quarter[:, :4] = 200
    assert metrics.entropy(quarter) == pytest.approx(0.8112781)


def test_entropy_agrees_with_scikit_image() -> None:
    measure = pytest.importorskip("skimage.measure")
    assert metrics.entropy(pictures()[0]) == pytest.approx(measure.shannon_entropy(pictures()[0]))


def test_spread_steps_and_gradient_by_hand() -> None:
    assert metrics.standard_deviation(halves()) == 127.5
    y, x = np.mgrid[:20, :20]
    board = 10.0 * ((x + y) % 2)
    assert metrics.spatial_frequency(board) == pytest.approx(sqrt(200))
    assert metrics.spatial_frequency(10.0 * (x % 2)) == pytest.approx(10)
    assert metrics.average_gradient(3.0 * x + 4.0 * y) == pytest.approx(sqrt(25 / 2))


def test_mutual_information_is_the_entropy_of_a_copy_and_zero_for_independent_pictures() -> None:
    across, down = halves(), halves().T
    assert metrics.mutual_information(across, across) == pytest.approx(1.0)
    assert metrics.mutual_information(across, 255 - across) == pytest.approx(1.0)
    assert metrics.mutual_information(across, down) == pytest.approx(0.0, abs=1e-12)
    assert metrics.fusion_table(across, across, down)["MI"] == pytest.approx(1.0)


def test_mutual_information_agrees_with_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.metrics")
    one, other = pictures()
    nats = cluster.mutual_info_score(one.ravel(), other.ravel())
    assert metrics.mutual_information(one, other) == pytest.approx(nats / np.log(2))
    assert metrics.published_table(one, one, other)["MI"] == pytest.approx(
        nats + cluster.mutual_info_score(one.ravel(), one.ravel())
    )


def test_correlations_by_hand() -> None:
    ct, mr = halves(), halves().T
    assert metrics.correlations_of_differences(ct / 2 + mr / 2, ct / 2, mr / 2) == pytest.approx(2.0)
    # a copy of CT: corr(CT, CT - MR) = 1 / sqrt(2), and CT - CT says nothing
    assert metrics.correlations_of_differences(ct, ct, mr) == pytest.approx(1 / sqrt(2))
    assert metrics.correlation(ct, ct, 255 - ct) == pytest.approx(0.0)
    assert metrics.correlation(ct, ct, mr) == pytest.approx(0.5)
    assert isnan(metrics.correlation(np.full_like(ct, 3), ct, mr))


def test_visual_information_of_a_copy_is_one_and_more_with_contrast() -> None:
    one, other = pictures()
    assert metrics.visual_information_fidelity(one, one) == pytest.approx(1.0, abs=1e-6)
    assert metrics.visual_information_fidelity((one - 127) * 1.2 + 127, one) > 1
    assert metrics.visual_information_fidelity(np.full_like(one, 90.0), one) == pytest.approx(0.0, abs=1e-9)
    assert isnan(metrics.visual_information_fidelity(one, np.full_like(one, 90.0)))
    assert metrics.fusion_table(one, one, other)["VIF"] == pytest.approx(
        1 + metrics.visual_information_fidelity(one, other), abs=1e-6
    )


def test_visual_information_agrees_with_torchmetrics() -> None:
    """Against what torchmetrics 1.9's visual_information_fidelity (float64) gave for these pictures."""
    one, other = pictures(3)
    assert metrics.visual_information_fidelity(0.7 * one + 0.3 * other, other) == pytest.approx(
        0.09834582805527971, rel=1e-6
    )
    assert metrics.visual_information_fidelity(np.maximum(one, other), one) == pytest.approx(
        0.13786967078174509, rel=1e-6
    )


def test_edge_information_of_identical_pictures_is_the_largest_the_formula_has() -> None:
    one, _ = pictures()
    assert metrics.edge_information(one, one, one) == pytest.approx(BEST_EDGE)
    assert metrics.fusion_artefacts(one, one, one) == 0
    flat = np.full_like(one, 80.0)
    assert isnan(metrics.edge_information(one, flat, flat))
    assert metrics.edge_information(flat, one, one) < 1e-3


def test_an_edge_of_twice_the_strength_is_half_kept_and_the_rest_is_artefact() -> None:
    source, doubled = halves(60, 120), halves(60, 180)
    half = 0.9994 / (1 + exp(0)) * 0.9879 / (1 + exp(-22 * 0.2))
    assert metrics.edge_information(doubled, source, source) == pytest.approx(half)
    assert metrics.fusion_artefacts(doubled, source, source) == pytest.approx(1 - half)
    # the other way round the edge is lost, not invented
    assert metrics.edge_information(source, doubled, doubled) == pytest.approx(half)
    assert metrics.fusion_artefacts(source, doubled, doubled) == 0


def test_an_edge_turned_by_a_right_angle_is_lost_and_turned_by_half_a_turn_is_kept() -> None:
    ct = halves(0, 100)
    # the weakest of each sigmoid: orientation 0 at the crossing only, elsewhere strength 0
    assert metrics.edge_information(ct.T, ct, ct) < 0.01
    assert metrics.edge_information(100 - ct, ct, ct) == pytest.approx(BEST_EDGE)


def test_edge_information_agrees_with_a_plain_loop() -> None:
    ct, mr = (picture[:16, 20:40] for picture in pictures(5))
    fused = 0.4 * ct + 0.6 * mr

    def edges(picture: Picture) -> tuple[Picture, Picture]:
        padded = np.pad(picture, 1, mode="edge")
        kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
        return convolve2d(padded, kernel, "valid"), convolve2d(padded, kernel.T, "valid")

    top = bottom = invented = 0.0
    (fx, fy), sources = edges(fused), [edges(ct), edges(mr)]
    for row in range(ct.shape[0]):
        for column in range(ct.shape[1]):
            strength = np.hypot(fx[row, column], fy[row, column])
            own = [np.hypot(sx[row, column], sy[row, column]) for sx, sy in sources]
            for (sx, sy), weight in zip(sources, own, strict=True):
                ratio = min(strength, weight) / max(strength, weight) if max(strength, weight) else 1.0
                apart = abs(np.arctan2(fy[row, column], fx[row, column]) - np.arctan2(sy[row, column], sx[row, column]))
                apart %= np.pi
                turned = abs(apart - np.pi / 2) / (np.pi / 2)
                kept = 0.9994 / (1 + exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + exp(-22 * (turned - 0.8)))
                top += kept * weight
                invented += (1 - kept) * weight * (strength > max(own))
                bottom += weight
    assert metrics.edge_information(fused, ct, mr) == pytest.approx(top / bottom, rel=1e-6)
    assert metrics.fusion_artefacts(fused, ct, mr) == pytest.approx(invented / bottom, rel=1e-6)


def test_feature_information_is_one_for_a_copy_and_small_for_a_stranger() -> None:
    one, _ = pictures()
    stranger = np.random.default_rng(1).uniform(0, 255, one.shape)
    assert metrics.feature_mutual_information(one, one, one) == pytest.approx(1.0)
    assert metrics.feature_mutual_information(stranger, one, one) < 0.4
    assert isnan(metrics.feature_mutual_information(*[np.full((16, 16), 5.0)] * 3))


def test_structural_similarity_agrees_with_scikit_image_and_monai() -> None:
    metrics_of_skimage = pytest.importorskip("skimage.metrics")
    import torch
    from monai.metrics import SSIMMetric

    one, other = pictures()
    ours = metrics.structural_similarity(one, other)
    wang = metrics_of_skimage.structural_similarity(
        one, other, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    theirs = SSIMMetric(spatial_dims=2, data_range=255)(torch.tensor(one)[None, None], torch.tensor(other)[None, None])
    assert ours == pytest.approx(wang, abs=1e-9)
    assert ours == pytest.approx(float(theirs), abs=1e-4)
    flat = metrics.structural_similarity(one, other, data_range=2, uniform=True)
    assert flat == pytest.approx(metrics_of_skimage.structural_similarity(one, other, data_range=2), abs=1e-9)
    assert metrics.structural_similarity(one, one) == pytest.approx(1.0)


def test_structural_similarity_of_two_flat_pictures_by_hand() -> None:
    c1 = 2.55**2
    expected = (2 * 100 * 50 + c1) / (100**2 + 50**2 + c1)
    assert metrics.structural_similarity(np.full((16, 16), 100.0), np.full((16, 16), 50.0)) == pytest.approx(expected)


def test_peak_signal_to_noise_by_hand_and_against_monai() -> None:
    import torch
    from monai.metrics import PSNRMetric

    one, other = pictures()
    assert metrics.peak_signal_to_noise(one, one + 10) == pytest.approx(20 * log10(25.5))
    assert isinf(metrics.peak_signal_to_noise(one, one))
    theirs = PSNRMetric(max_val=255)(torch.tensor(one)[None, None], torch.tensor(other)[None, None])
    assert metrics.peak_signal_to_noise(one, other) == pytest.approx(float(theirs), rel=1e-6)
    # errors of 10 and 0: a mean square of 50
    assert metrics.average_peak_signal_to_noise(one, one, one + 10) == pytest.approx(10 * log10(255**2 / 50))


def test_the_mean_of_two_decibels_rewards_copying_a_source() -> None:
    """Why PSNR is taken of the mean error: of all mixes the plain average has the lowest mean of decibels."""
    ct, mr = pictures()

    def mean_decibels(share: float) -> float:
        table = metrics.fusion_table(share * ct + (1 - share) * mr, ct, mr)
        return (table["PSNR_CT"] + table["PSNR_MR"]) / 2

    found = {share: mean_decibels(share) for share in (0.01, 0.2, 0.5, 0.8, 0.99)}
    assert min(found, key=found.__getitem__) == 0.5
    assert isinf(mean_decibels(1.0))


def test_edge_preservation_is_one_where_every_edge_is_the_stronger_sources() -> None:
    ct, mr = np.zeros((32, 32)), np.zeros((32, 32))
    ct[5:12, 5:12], mr[20:28, 18:28] = 200, 90
    assert metrics.edge_preservation(ct + mr, ct, mr) == pytest.approx(1.0)
    assert 0 < metrics.edge_preservation(ct, ct, mr) < 1


def test_overshoot_measures_what_leaves_the_range_of_the_sources() -> None:
    ct, mr = halves(0, 200, 64), np.full((64, 64), 50.0)
    assert metrics.edge_overshoot((ct + mr) / 2, ct, mr) == 0
    rings = ct.copy()
    rings[:, 33] += 30
    # the edge pixels are columns 31 and 32, the band reaches 4 further on each side: 10 columns
    assert metrics.edge_overshoot(rings, ct, mr) == pytest.approx(3.0)
    below = ct.copy()
    below[:, 30] -= 20
    assert metrics.edge_overshoot(below, ct, mr) == pytest.approx(2.0)
    assert isnan(metrics.edge_overshoot(mr, mr, mr))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 50),
    share=st.floats(0, 1),
    noise=st.floats(0, 60),
    kind=st.sampled_from(["mix", "larger", "stranger", "sum"]),
)
def test_no_picture_exceeds_the_ceilings_of_its_pair(seed: int, share: float, noise: float, kind: str) -> None:
    ct, mr = pictures(seed)
    rng = np.random.default_rng(seed)
    fused = {
        "mix": share * ct + (1 - share) * mr,
        "larger": np.maximum(ct, mr),
        "stranger": rng.uniform(0, 255, ct.shape),
        "sum": ct + mr - 128,
    }[kind]
    fused = np.clip(fused + rng.normal(0, noise, ct.shape), 0, 255)
    table, limits = metrics.fusion_table(fused, ct, mr), metrics.ceilings(ct, mr)
    assert set(limits) == {metric.key for metric in metrics.METRICS} <= set(table)
    for metric in metrics.METRICS:
        limit = limits[metric.key].value
        if limit is not None:
            assert metric.better * table[metric.key] <= metric.better * limit + 1e-3, metric


def test_ceilings_that_a_picture_reaches() -> None:
    ct, mr = pictures()
    limits = metrics.ceilings(ct, mr)
    assert metrics.fusion_table((ct + mr) / 2, ct, mr)["PSNR"] == pytest.approx(limits["PSNR"].value)
    alike = ct / ct.std() + mr / mr.std()
    assert metrics.correlation(alike, ct, mr) == pytest.approx(limits["CC"].value)
    assert metrics.correlations_of_differences(ct + mr, ct, mr) == pytest.approx(limits["SCD"].value)
    same = metrics.ceilings(ct, ct)
    table = metrics.fusion_table(ct, ct, ct)
    for key in ("SSIM", "Qabf", "CC", "MI"):
        assert table[key] == pytest.approx(same[key].value, rel=1e-4), key


def test_swapping_the_sources_changes_no_total() -> None:
    ct, mr = pictures(2)
    fused = np.maximum(ct, mr)
    one, other = metrics.fusion_table(fused, ct, mr), metrics.fusion_table(fused, mr, ct)
    assert {m.key: one[m.key] for m in metrics.METRICS} == pytest.approx({m.key: other[m.key] for m in metrics.METRICS})
    assert one["MI_CT"] == other["MI_MR"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:, :-1], "one shape"),
        (lambda a: a[None], r"\(H, W\)"),
        (lambda a: a / 0.5, "0 to 255"),
        (lambda a: np.where(a > 100, np.nan, a), "0 to 255"),
    ],
)
def test_pictures_that_cannot_be_measured_are_refused(change: object, message: str) -> None:
    ct, mr = pictures()
    with pytest.raises(InputError, match=message):
        metrics.fusion_table(change(ct), ct, mr)  # type: ignore[operator]
    with pytest.raises(InputError, match="11 pixels"):
        metrics.ceilings(ct[:10], mr[:10])


@pytest.mark.data
def test_published_rows_of_the_plain_rules_are_met_on_the_same_kind_of_pairs(shared_data: Path) -> None:
    """On other slices of the same atlas, average and maximum land near the rows published for 21 of its pairs."""
    from FreqSegLib.volume import Volume

    folder = shared_data / "fusion" / "harvard_ct_mri"
    names = sorted(path.name for path in (folder / "CT").glob("*.png"))[::15]
    rows = []
    for name in names:
        ct, mr = (Volume.read(folder / side / name).array[0].astype(np.float64) for side in ("CT", "MRI"))
        rows.append(metrics.published_table((ct + mr) / 2, ct, mr))
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    # published for the average: SCD 0.99, VIF 0.45, Qabf 0.37, SSIM 1.31, MI 2.61 nats
    for key, published in {"SCD": 0.99, "VIF": 0.45, "Qabf": 0.37, "SSIM": 1.31, "MI": 2.61}.items():
        assert mean[key] == pytest.approx(published, rel=0.15), (key, mean)
