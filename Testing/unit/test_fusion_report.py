"""The comparison of a fused pair with the plain rules, its pictures, and the tables over a set of pairs."""

from __future__ import annotations

import base64
import csv
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_volume_fusion import fuser, head

from FreqSegLib.errors import Cancelled, InputError
from FreqSegLib.evaluation.fusion_comparison import (
    best_methods,
    compare,
    comparison_csv,
    grey_levels,
    mean_of,
    number,
    pair_of,
)
from FreqSegLib.evaluation.fusion_metrics import METRICS, fusion_table
from FreqSegLib.evaluation.fusion_report import best_slice, metrics_figure, pictures_figure, report_page, shown_slice
from FreqSegLib.evaluation.fusion_set import COUNTED, evaluate_pairs, markdown, slices_csv
from FreqSegLib.fusion.rules import Average, ChooseMax, Maximum
from FreqSegLib.fusion.single_scale import WaveletFusionNet
from FreqSegLib.training.fusion_data import Pairs


def pairs(count: int = 3) -> Pairs:
    ct, mr = head()
    chosen = range(2, 2 + count)
    bone = torch.from_numpy(np.clip(np.rint(ct.array[chosen] * 3.0), 0, 255).astype(np.float32) / 255)
    soft = torch.from_numpy(np.clip(np.rint(mr.array[chosen] / 4.0), 0, 255).astype(np.float32) / 255)
    return Pairs(bone[:, None], soft[:, None], tuple(f"7{index:03d}" for index in chosen))


def test_a_comparison_holds_the_means_over_the_measured_slices_for_the_result_and_every_rule() -> None:
    ct, mr = head()
    result = fuser(Maximum()).fuse(ct, mr)
    found = compare(result.pair, result.fused.array, "mine", most_slices=3)
    assert list(found.rows) == ["mine", "average", "max", "choose-max haar", "choose-max db4", "laplacian"]
    assert found.rows["mine"] == pytest.approx(found.rows["max"], abs=1e-6, nan_ok=True)
    assert len(found.slices) == 3
    values = []
    for index in found.slices:
        one, other, _ = result.pair.slices(range(index, index + 1))
        one, other = 255.0 * one[0].astype(float), 255.0 * other[0].astype(float)
        values.append(fusion_table(np.rint((one + other) / 2), one, other)["SSIM"])
    assert found.rows["average"]["SSIM"] == pytest.approx(np.mean(values), abs=1e-4)
    assert found.ceilings["PSNR"].value == pytest.approx(found.rows["average"]["PSNR"], abs=0.02)
    assert "average" in best_methods(found, "PSNR", 1)
    assert {"average", "max"} <= best_methods(found, "overshoot", -1)


def test_slices_without_a_picture_are_not_measured_and_a_comparison_can_be_stopped() -> None:
    ct, mr = head()
    dark = mr.array.copy()
    dark[5:] = dark.min()
    pair = fuser(Average(), check=False).fuse(ct, mr.with_array(dark)).pair
    grey = np.zeros(ct.shape, np.float32)
    assert max(compare(pair, grey, "x", most_slices=20).slices) == 4
    with pytest.raises(Cancelled):
        compare(pair, grey, "x", cancel=lambda: True)
    speck = mr.with_array(np.zeros_like(dark) + np.eye(64, dtype=np.int16))
    pair = fuser(Average(), check=False).fuse(ct, speck).pair
    with pytest.raises(InputError, match="no slice shows both"):
        compare(pair, grey, "x")


def test_grey_levels_from_0_to_1_are_scaled_and_others_refused() -> None:
    ct, mr = head()
    fused = fuser().fuse(ct, mr).fused
    assert np.array_equal(grey_levels(fused), fused.array)
    assert grey_levels(fused.with_array(fused.array / 255)) == pytest.approx(fused.array, abs=1e-3)
    with pytest.raises(InputError, match="values from -10"):
        grey_levels(ct)


def test_a_record_brings_back_windows_and_registration() -> None:
    ct, mr = head()
    fused = fuser(ct_window="40/400").fuse(ct, mr).fused
    pair, said = pair_of(fused, ct, mr)
    assert (pair.ct_levels.low, pair.ct_levels.high) == (-160, 240)
    assert "recorded" in said
    plain, said = pair_of(fused.with_array(fused.array), ct, mr, record={"ct": "damaged"})
    assert plain.ct_levels.high == 80
    assert "no record" in said


def test_pictures_show_every_part() -> None:
    ct, mr = head()
    result = fuser(ChooseMax("db4", 2)).fuse(ct, mr, masks=True)
    masks = {volume.name: volume.array for volume in result.masks}
    index = best_slice(result.pair, range(9))
    assert 2 <= index <= 6
    shown = shown_slice(result.pair, result.fused.array, index, masks)
    assert np.array_equal(shown.ct, 255 * result.pair.slices(range(index, index + 1))[0][0])
    figure = pictures_figure(shown, "choose-max")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:5] == ["CT", "MR", "Fused: choose-max", "Fused − CT", "Fused − MR"]
    assert titles[5] == "CT share, level 1 LH (%)"
    assert len(titles) == 5 + 7
    assert np.array_equal(figure.axes[2].images[0].get_array(), shown.fused)


def test_the_page_holds_its_pictures_and_escapes_what_it_is_told() -> None:
    ct, mr = head()
    result = fuser(Average()).fuse(ct, mr)
    found = compare(result.pair, result.fused.array, "average <b>", most_slices=2)
    shown = shown_slice(result.pair, result.fused.array, 4)
    page = report_page([shown], found, "average <b>", [("CT", "a & b")], ["Look <i>here</i>."])
    assert "average <b>" not in page
    assert "a &amp; b" in page
    assert "Look &lt;i&gt;" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [Image.open(io.BytesIO(base64.b64decode(image))).size[0] for image in images] == [1600, 1600]
    for metric in METRICS:
        assert f"<b>{metric.key}</b>" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert len(metrics_figure(found).axes) == len(METRICS) + 1


def test_the_csv_holds_numbers_in_full() -> None:
    ct, mr = head()
    result = fuser(Average()).fuse(ct, mr)
    found = compare(result.pair, result.fused.array, "mine", most_slices=2)
    rows = {row["metric"]: row for row in csv.DictReader(io.StringIO(comparison_csv(found)))}
    assert float(rows["MI_MR"]["mine"]) == found.rows["mine"]["MI_MR"]
    assert rows["MI"]["of"] == "sum over CT and MR"
    assert rows["Nabf"]["better"] == "less"
    assert rows["SF"]["ceiling"] == ""


def test_numbers_and_means_for_people() -> None:
    assert [number(value) for value in (None, float("nan"), float("inf"), 0.12345, 123.456)] == [
        "–",
        "–",
        "inf",
        "0.123",
        "123.46",
    ]
    assert mean_of([{"a": 1.0, "b": float("nan")}, {"a": 3.0, "b": 2.0}]) == {"a": 2.0, "b": 2.0}


def test_a_set_of_pairs_gives_means_wins_and_the_claims_beside_what_is_measured() -> None:
    torch.manual_seed(0)
    network = WaveletFusionNet("haar", 1).eval()
    methods = {"average": Average(), "max": Maximum(), "single-scale": network}
    result = evaluate_pairs(pairs(), methods)
    assert result.slices == 3
    expected = []
    for ct, mr in zip(pairs().ct, pairs().mr, strict=True):
        one, other = 255.0 * ct[0].double().numpy(), 255.0 * mr[0].double().numpy()
        expected.append(fusion_table(np.maximum(one, other), one, other)["Qabf"])
    assert result.mean("max", "Qabf") == pytest.approx(np.mean(expected))
    assert result.ceilings["PSNR"] == pytest.approx(result.mean("average", "PSNR"), abs=0.02)
    assert result.ceilings["SF"] is None
    won = result.wins("single-scale", "average")
    assert won == [key for key in COUNTED if result.mean("single-scale", key) > result.mean("average", key)]
    assert 0.5 < result.energy["MR"] < 1
    assert set(result.shares["single-scale"]) == {"level 1 LH", "level 1 HL", "level 1 HH", "low band"}
    assert result.parameters == {"single-scale": sum(one.numel() for one in network.parameters())}

    page = markdown(result, "Title", ["A note."])
    assert "CDDFuse, published elsewhere* | 4.880 | 79.17" in page
    assert "| single-scale (claimed) | 0.584 | 18.03 | 0.920 | 1.743 | 5.342 |" in page
    assert f"{len(won)} of 8" in page
    assert "claimed 2 million" in page
    assert "- A note." in page
    rows = list(csv.DictReader(io.StringIO(slices_csv(result))))
    assert len(rows) == 9
    assert float(rows[0]["published_MI"]) == pytest.approx(float(rows[0]["MI"]) * np.log(2))
