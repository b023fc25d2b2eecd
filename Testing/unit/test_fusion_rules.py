"""The classic rules against PyWavelets and hand-worked numbers, and the one interface they share."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

from FreqSegLib.errors import FreqSegError, InputError, SettingsError
from FreqSegLib.fusion import METHODS, FusionMethod, fusion_method
from FreqSegLib.fusion.rules import Average, ChooseMax, LaplacianPyramid, Maximum

RULES: tuple[FusionMethod, ...] = (
    Average(),
    Maximum(),
    ChooseMax(),
    ChooseMax("db4", 3),
    LaplacianPyramid(),
    LaplacianPyramid(2, "average"),
)
SIZES = ((1, 1), (1, 7), (5, 3), (17, 31), (32, 24))


def pair(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, 1, height, width, generator=random) for _ in range(2))  # type: ignore[return-value]


def pywt_choose_max(ct: np.ndarray, mr: np.ndarray, wave: str, J: int) -> np.ndarray:
    a, b = (pywt.wavedec2(image, wave, mode="symmetric", level=J) for image in (ct, mr))
    fused = [np.maximum(a[0], b[0])]
    fused += [
        tuple(np.where(np.abs(p) > np.abs(q), p, q) for p, q in zip(one, other, strict=True))
        for one, other in zip(a[1:], b[1:], strict=True)
    ]
    return pywt.waverec2(fused, wave, mode="symmetric")[: ct.shape[0], : ct.shape[1]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_an_image_fused_with_itself_stays_itself(rule: FusionMethod, size: tuple[int, int]) -> None:
    image, _ = pair(*size)
    assert torch.allclose(rule(image, image).image, image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_exchanged_sources_give_the_same_image_and_exchanged_masks(rule: FusionMethod) -> None:
    ct, mr = pair(17, 31)
    one, other = rule(ct, mr), rule(mr, ct)
    assert torch.allclose(one.image, other.image, rtol=0, atol=1e-6)
    assert len(one.masks) == len(one.names) > 0
    for mask, opposite in zip(one.masks, other.masks, strict=True):
        assert 0 <= mask.min() <= mask.max() <= 1
        assert torch.equal(mask, 1 - opposite)


@pytest.mark.parametrize(("wave", "J"), [("haar", 1), ("db4", 1), ("db4", 3), ("bior2.2", 2)])
@pytest.mark.parametrize("size", [(40, 56), (33, 47)])
def test_choose_max_equals_the_same_rule_in_pywavelets(wave: str, J: int, size: tuple[int, int]) -> None:
    ct, mr = (image.double() for image in pair(*size))
    fused = ChooseMax(wave, J)(ct, mr).image
    for index in range(2):
        expected = pywt_choose_max(ct[index, 0].numpy(), mr[index, 0].numpy(), wave, J)
        assert np.abs(fused[index, 0].numpy() - expected).max() < 1e-9


def test_haar_choose_max_of_two_by_two_pixels_worked_by_hand() -> None:
    ct = torch.tensor([[1.0, 1.0], [0.0, 0.0]])[None, None]  # LL 1, a horizontal edge of +1
    mr = torch.tensor([[0.9, 0.5], [0.9, 0.5]])[None, None]  # LL 1.4, a vertical edge of +0.4
    # LL 1.4 from the MR, LH 1 from the CT, HL 0.4 from the MR: half of each sum or difference
    expected = torch.tensor([[1.4, 1.0], [0.4, 0.0]])[None, None]
    assert torch.allclose(ChooseMax()(ct, mr).image, expected, atol=1e-6)


def test_average_and_maximum_are_what_they_say() -> None:
    ct, mr = torch.tensor([[[[0.2, 0.8]]]]), torch.tensor([[[[0.6, 0.4]]]])
    assert torch.allclose(Average()(ct, mr).image, torch.tensor([[[[0.4, 0.6]]]]))
    fused = Maximum()(ct, mr)
    assert torch.equal(fused.image, torch.tensor([[[[0.6, 0.8]]]]))
    assert torch.equal(fused.masks[0], torch.tensor([[[[0.0, 1.0]]]]))


def test_the_laplacian_base_decides_between_two_constants() -> None:
    dark, bright = torch.full((1, 1, 9, 12), 0.2), torch.full((1, 1, 9, 12), 0.6)
    assert torch.allclose(LaplacianPyramid(3, "max")(dark, bright).image, bright, atol=1e-6)
    assert torch.allclose(LaplacianPyramid(3, "average")(dark, bright).image, torch.full_like(dark, 0.4), atol=1e-6)


def test_the_laplacian_pyramid_keeps_fine_detail_of_both_sources() -> None:
    """A grid of single pixels in one source and one at other places in the other: both show."""
    ct, mr = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    ct[..., 4:28:8, 4:28:8] = 1
    mr[..., 8:28:8, 8:28:8] = 1
    fused = LaplacianPyramid(2)(ct, mr).image
    assert fused[..., 4:28:8, 4:28:8].min() > 0.9
    assert fused[..., 8:28:8, 8:28:8].min() > 0.9


@pytest.mark.parametrize("name", [name for name in METHODS if "scale" not in name])
def test_every_rule_is_found_by_its_name(name: str) -> None:
    ct, mr = pair(12, 10)
    assert fusion_method(name)(ct, mr).image.shape == ct.shape


def test_wave_and_levels_reach_choose_max_and_the_pyramid() -> None:
    assert fusion_method("choose-max", wave="db4", levels=3) == ChooseMax("db4", 3)
    assert fusion_method("laplacian", levels=2) == LaplacianPyramid(2)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("choose_max", {}, r"no fusion method 'choose_max'; did you mean 'choose-max'"),
        ("max", {"levels": 2}, r"has no levels; leave levels=2 out"),
        ("laplacian", {"wave": "db4"}, r"has no wavelet; leave wave='db4' out"),
        ("laplacian", {"levels": 0}, r"whole number >= 1, got 0"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(name: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        fusion_method(name, **settings)  # type: ignore[arg-type]


def test_an_unknown_wavelet_is_refused_when_fusing() -> None:
    with pytest.raises(FreqSegError, match="'db99' is not offered"):
        ChooseMax("db99")(*pair(8, 8))


@pytest.mark.parametrize(
    ("ct", "mr", "words"),
    [
        (torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 9), r"one size, got \(1, 1, 8, 8\) and \(1, 1, 8, 9\)"),
        (torch.rand(8, 8), torch.rand(8, 8), r"the CT must be \(batch, 1, height, width\)"),
        (torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), r"the MR must be floating point"),
        (torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8).double(), r"share a type"),
        (torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), r"the CT must be \(batch, 1, height, width\)"),
    ],
)
@pytest.mark.parametrize("rule", RULES[:4:3], ids=repr)
def test_what_is_no_pair_is_refused(rule: FusionMethod, ct: Tensor, mr: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        rule(ct, mr)
