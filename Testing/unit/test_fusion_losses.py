"""Fusion losses: worked by hand, agreeing with the evaluation's metrics, with right and finite gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from FreqSegLib import weights
from FreqSegLib.errors import SettingsError, WeightsError
from FreqSegLib.evaluation import fusion_metrics as metrics
from FreqSegLib.fusion import losses
from FreqSegLib.fusion import metric_surrogates as surrogates
from FreqSegLib.fusion.filters import gradients, magnitude
from FreqSegLib.fusion.losses import BasicLoss, FusionLoss, HybridLoss, MedicalLoss, MetricLoss
from FreqSegLib.fusion.perceptual import VGG_FILE, MedicalTowerFeatures, VGG16Features, perceptual_features


def smooth(seed: int, height: int = 48, width: int = 56) -> Tensor:
    """An image with structure at several scales, on whole grey levels of [0, 1]."""
    random = np.random.default_rng(seed)
    image = sum(ndimage.gaussian_filter(random.standard_normal((height, width)), sigma) * sigma for sigma in (1, 3, 6))
    image = (image - image.min()) / (image.max() - image.min())
    return torch.from_numpy(np.rint(255 * image) / 255)[None, None]


def trio() -> tuple[Tensor, Tensor, Tensor]:
    ct, mr = smooth(1), smooth(2)
    fused = torch.round(255 * torch.maximum(0.9 * ct, mr)) / 255
    return fused, ct, mr


class Pixels(nn.Module):
    """Features that are the image itself."""

    def forward(self, image: Tensor) -> Tensor:
        return image


ALL: tuple[FusionLoss, ...] = (BasicLoss(), MedicalLoss(), HybridLoss(Pixels()), MetricLoss())


@pytest.mark.parametrize("operator", ["sobel", "prewitt"])
def test_gradients_equal_scipy(operator: str) -> None:
    image = smooth(3)
    along, down = gradients(image, operator)
    scipy_filter = getattr(ndimage, operator)
    assert np.allclose(along[0, 0], scipy_filter(image[0, 0].numpy(), axis=1, mode="nearest"), atol=1e-12)
    assert np.allclose(down[0, 0], scipy_filter(image[0, 0].numpy(), axis=0, mode="nearest"), atol=1e-12)


def test_basic_terms_of_a_step_worked_by_hand() -> None:
    """CT a step of height 1, MR black, fused half the step."""
    ct = torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    ct[..., 3:] = 1
    mr, fused = torch.zeros_like(ct), ct / 2
    terms = BasicLoss()(fused, ct, mr).terms
    assert terms["mse"].item() == pytest.approx(0.5 * 0.25)
    # Sobel / 4 of the step is 1 at the two columns beside it, of the fused half of that: 2 of 6 columns lack 0.5
    assert terms["gradient"].item() == pytest.approx(0.5 * 2 / 6)


def test_two_operator_gradient_of_a_step_worked_by_hand() -> None:
    ct = torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    ct[..., 3:] = 1
    assert losses.two_operator_error(ct / 2, ct, 0 * ct).item() == pytest.approx(0.5 * 2 / 6)


def test_the_spectrum_of_a_constant_worked_by_hand() -> None:
    """The orthonormal transform of a constant c has the one coefficient c sqrt(HW), so the mean error is small."""
    ct = torch.full((1, 1, 8, 8), 0.5)
    assert losses.spectrum_error(0 * ct, ct, 0 * ct).item() == pytest.approx(0.5 * 8 / 64)
    assert losses.spectrum_error(ct, ct, 0 * ct).item() == pytest.approx(0, abs=1e-7)


def test_hybrid_l1_and_perceptual_worked_by_hand() -> None:
    ct = torch.full((1, 1, 12, 12), 0.8)
    mr, fused = torch.full_like(ct, 0.2), torch.full_like(ct, 0.6)
    terms = HybridLoss(Pixels())(fused, ct, mr).terms
    assert terms["l1"].item() == pytest.approx(0.2 + 0.4)
    assert terms["perceptual"].item() == pytest.approx((0.04 + 0.16) / 2)


def test_surrogates_are_the_evaluations_metrics() -> None:
    fused, ct, mr = trio()
    grey = [255 * image[0, 0].numpy() for image in (fused, ct, mr)]
    table = metrics.fusion_table(*grey)
    found = {
        "SD": 255 * surrogates.standard_deviation(fused),
        "SF": 255 * surrogates.spatial_frequency(fused),
        "SCD": surrogates.correlations_of_differences(fused, ct, mr),
        "VIF_CT": surrogates.visual_information_fidelity(fused, ct),
        "VIF_MR": surrogates.visual_information_fidelity(fused, mr),
        "SSIM_CT": surrogates.structural_similarity(fused, ct),
        "SSIM_MR": surrogates.structural_similarity(fused, mr),
        "Qabf": surrogates.edge_information(fused, ct, mr),
    }
    for key, value in found.items():
        assert value.item() == pytest.approx(table[key], rel=1e-3), key
    # with a bin a grey level, pixels on whole levels are counted exactly
    assert surrogates.mutual_information(fused, ct, 256).item() == pytest.approx(table["MI_CT"], abs=1e-6)
    assert losses.edge_loss(fused, ct, mr).item() == pytest.approx(1 - table["EP"], abs=1e-6)


def test_information_is_fully_told_by_a_copy_of_equal_sources() -> None:
    image = smooth(4)
    assert losses.information_loss(image, image, image).item() == pytest.approx(0, abs=1e-6)
    flat = torch.full_like(image, 0.5)
    assert losses.information_loss(flat, image, image).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("loss", ALL[:3], ids=lambda loss: type(loss).__name__)
def test_a_copy_of_equal_sources_costs_nothing(loss: FusionLoss) -> None:
    image = smooth(5)
    result = loss(image, image, image)
    assert set(result.terms) == set(loss.defaults)
    assert result.total.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_gradients_agree_with_finite_differences(loss: FusionLoss) -> None:
    """Away from kinks: a fused image unlike both sources, off the grid of the histogram's bins."""
    ct, mr = smooth(6, 20, 22), smooth(7, 20, 22)
    fused = (0.45 * ct + 0.35 * mr + 0.1037 * smooth(8, 20, 22) + 0.0313).requires_grad_()
    loss(fused, ct, mr).total.backward()
    assert fused.grad is not None
    for direction in range(3):
        random = torch.randn(fused.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(direction))
        step = 1e-7 * random
        with torch.no_grad():
            difference = loss(fused + step, ct, mr).total - loss(fused - step, ct, mr).total
        assert difference.item() / 2e-7 == pytest.approx((fused.grad * random).sum().item(), rel=1e-3, abs=1e-6)


def test_smooth_terms_pass_gradcheck() -> None:
    ct, mr = smooth(6, 12, 12), smooth(7, 12, 12)
    fused = (0.5 * ct + 0.3 * mr + 0.1).requires_grad_()
    for term in (losses.squared_error, losses.dissimilarity, losses.edge_loss, surrogates.correlations_of_differences):
        assert torch.autograd.gradcheck(lambda image, term=term: term(image, ct, mr), fused, atol=1e-5)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("size", [(16, 16), (7, 5)])
def test_black_and_constant_images_have_finite_gradients(loss: FusionLoss, size: tuple[int, int]) -> None:
    for value in (0.0, 0.5, 1.0):
        flat = torch.full((1, 1, *size), value)
        fused = flat.clone().requires_grad_()
        loss(fused, flat, torch.zeros_like(flat)).total.backward()
        assert fused.grad is not None
        assert fused.grad.isfinite().all()


def test_the_magnitude_of_no_gradient_has_no_slope() -> None:
    zero = torch.zeros(3, requires_grad=True)
    magnitude(zero, zero).sum().backward()
    assert torch.equal(zero.grad, torch.zeros(3))


def test_weights_are_changed_without_building_the_loss_anew_and_zero_skips_a_term() -> None:
    fused, ct, mr = trio()
    loss = HybridLoss(Pixels())
    before = loss(fused, ct, mr)
    loss.set_weights({"l1": 3.0, "frequency": 0.0})
    after = loss(fused, ct, mr)
    assert "frequency" not in after.terms
    expected = before.total + 2 * before.terms["l1"] - 0.3 * before.terms["frequency"]
    assert after.total.item() == pytest.approx(expected.item())
    assert HybridLoss.defaults["l1"] == 1.0
    with pytest.raises(SettingsError, match="no term 'l2'; it has l1, ssim"):
        loss.set_weights({"l2": 1.0})
    with pytest.raises(SettingsError, match="must be 0 or more, got -1"):
        loss.set_weights({"l1": -1})


def test_a_perceptual_term_without_features_is_refused_unless_it_weighs_nothing() -> None:
    fused, ct, mr = trio()
    with pytest.raises(SettingsError, match="no features"):
        HybridLoss()(fused, ct, mr)
    assert HybridLoss(weights={"perceptual": 0})(fused, ct, mr).total.isfinite()


def test_the_metric_loss_compares_with_the_best_classic() -> None:
    _, ct, mr = trio()
    loss = MetricLoss({"sd": 1, "sf": 0, "mi": 0, "scd": 0, "vif": 0, "qabf": 0, "ssim": 0})
    best = loss.best_classic(ct, mr)["sd"]
    assert best.item() >= torch.maximum(ct, mr).std(correction=0).item() - 1e-9
    for factor, expected in ((1.0, loss.margin), (0.9, 0.1 + loss.margin + 0.005), (1.1, -0.005)):
        image = (ct - ct.mean()) * (factor * best / ct.std(correction=0))
        assert loss(image, ct, mr, {"sd": best}).total.item() == pytest.approx(expected, abs=1e-6)
        assert loss(image, ct, mr).total.item() == pytest.approx(expected, abs=1e-6)


def test_vgg_is_used_where_its_weights_are_and_the_medical_tower_elsewhere(tmp_path: Path) -> None:
    from torchvision.models import vgg16

    torch.manual_seed(0)
    model = vgg16(weights=None)
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith("features")}, tmp_path / VGG_FILE)
    found = perceptual_features([tmp_path / "nowhere", tmp_path])
    assert isinstance(found, VGG16Features)
    image = smooth(1, 16, 20).float()
    layers = model.features[:16].eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        assert torch.allclose(found(image), layers((image.expand(-1, 3, -1, -1) - mean) / std), atol=1e-5)
    assert found(image).shape == (1, 256, 4, 5)
    torch.save({"other": torch.zeros(1)}, tmp_path / VGG_FILE)
    with pytest.raises(WeightsError, match="holds no VGG16"):
        perceptual_features([tmp_path])
    if weights.find("litemedsam") is None:
        pytest.skip("LiteMedSAM is not installed; run 'freqseg models get litemedsam'")
    assert isinstance(perceptual_features([]), MedicalTowerFeatures)


def test_the_medical_tower_gives_features_with_a_gradient() -> None:
    if weights.find("litemedsam") is None:
        pytest.skip("LiteMedSAM is not installed; run 'freqseg models get litemedsam'")
    image = smooth(1, 32, 32).float().requires_grad_()
    features = perceptual_features([])(image)
    assert features.shape == (1, 128, 16, 16)
    features.square().mean().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
