"""The losses of SpectralVMUNet: against PyTorch's own, Parseval, and masks whose ranking is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.mamba.losses import (
    BoundaryLoss,
    DiceLoss,
    FocalLoss,
    FrequencyLoss,
    PatchDiscriminator,
    SpectralDualLoss,
    adversarial_losses,
    boundary,
    hinge_discriminator_loss,
    hinge_generator_loss,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def square(side: int = 32, first: int = 8, last: int = 24) -> Tensor:
    """(1, side, side) labels: a square of class 1."""
    target = torch.zeros(1, side, side, dtype=torch.long)
    target[:, first:last, first:last] = 1
    return target


def sure(target: Tensor, classes: int = 2, strength: float = 20.0) -> Tensor:
    """Logits that say exactly ``target``."""
    return F.one_hot(target, classes).movedim(-1, 1).float() * strength


def logits_of(probability: Tensor) -> Tensor:
    """Two classes' logits with this probability (b, h, w) of class 1."""
    return torch.stack([torch.zeros_like(probability), torch.logit(probability)], 1)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (9, 7), (4, 5, 6), (1, 1)])
def test_without_a_weight_the_spectrum_costs_what_the_pixels_cost(size: tuple[int, ...]) -> None:
    """Parseval."""
    error = torch.randn(2, 3, *size, dtype=torch.float64)
    assert float(FrequencyLoss(0.0).of_difference(error)) == pytest.approx(float(error.square().mean()))


def test_a_blurred_edge_costs_more_than_the_same_pixel_error_spread_smoothly() -> None:
    target = square(64, 16, 48)
    truth = target.float()
    kernel = torch.ones(1, 1, 5, 5) / 25
    blurred = F.conv2d(truth[:, None], kernel, padding=2)[:, 0]
    across = torch.arange(64) * (2 * math.pi / 64)
    wave = torch.cos(across)[:, None] * torch.cos(across)
    # the same squared error in pixels
    gentle = wave * ((blurred - truth).square().sum() / wave.square().sum()).sqrt()
    assert float(gentle.square().sum()) == pytest.approx(float((blurred - truth).square().sum()), rel=1e-4)
    loss = FrequencyLoss(1.0)
    edge, spread = (loss.of_difference(error.reshape(1, 1, 64, 64)) for error in (blurred - truth, gentle))
    assert float(edge) > 3 * float(spread)
    plain = FrequencyLoss(0.0)
    assert float(plain.of_difference((blurred - truth)[None])) == pytest.approx(
        float(plain.of_difference(gentle[None, None])), rel=1e-4
    )


def test_white_noise_costs_what_it_costs_in_pixels() -> None:
    noise = torch.randn(1, 4, 128, 128)
    assert float(FrequencyLoss(1.0).of_difference(noise)) == pytest.approx(float(noise.square().mean()), rel=0.02)


def test_the_frequency_loss_compares_probabilities_with_the_truth() -> None:
    target = square()
    loss = FrequencyLoss()
    assert float(loss(sure(target), target)) < 1e-8
    half = torch.zeros(1, 2, 32, 32)
    truth = F.one_hot(target, 2).movedim(-1, 1).float()
    expected = loss.of_difference((0.5 - truth)[:, 1:])
    assert float(loss(half, target)) == pytest.approx(float(expected))
    both = FrequencyLoss(include_background=True)(half, target)
    assert float(both) == pytest.approx(float(expected), rel=1e-5)


def test_focal_without_focus_is_cross_entropy_and_with_it_easy_pixels_vanish() -> None:
    logits, target = torch.randn(2, 3, 9, 9), torch.randint(0, 3, (2, 9, 9))
    assert float(FocalLoss(0.0)(logits, target)) == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-5)
    probability = logits.softmax(1).gather(1, target[:, None])[:, 0]
    expected = (-(1 - probability).square() * probability.log()).mean()
    assert float(FocalLoss(2.0)(logits, target)) == pytest.approx(float(expected), rel=1e-4)


def test_dice_is_taken_over_the_batch_without_the_background() -> None:
    target = torch.cat([square(), torch.zeros(1, 32, 32, dtype=torch.long)])
    probability = torch.rand(2, 32, 32)
    overlap = (probability * target).sum()
    expected = 1 - 2 * overlap / (probability.sum() + target.sum())
    assert float(DiceLoss()(logits_of(probability), target)) == pytest.approx(float(expected), rel=1e-4)


def test_dice_leaves_out_classes_that_a_batch_lacks() -> None:
    target = square()
    logits = torch.randn(1, 4, 32, 32)
    logits[:, 3] = -30.0
    probability = logits.softmax(1)[:, 1]
    overlap = (probability * target).sum()
    expected = 1 - 2 * overlap / (probability.sum() + target.sum())
    assert float(DiceLoss()(logits, target)) == pytest.approx(float(expected), rel=1e-4)
    nothing = torch.zeros_like(target)
    assert float(DiceLoss()(logits, nothing)) == 0.0


@pytest.mark.parametrize("loss", [DiceLoss(), FocalLoss(), FrequencyLoss(), BoundaryLoss(), SpectralDualLoss()])
@pytest.mark.parametrize(
    ("logits", "target", "said"),
    [
        ((2, 2, 8, 8), (1, 8, 8), r"of the shape \(2, 8, 8\), got \(1, 8, 8\)"),
        ((1, 2, 8, 8), (1, 1, 1), r"of the shape \(1, 8, 8\), got \(1, 1, 1\)"),
        ((1, 1, 8, 8), (1, 8, 8), "the background and at least one class"),
        ((0, 2, 8, 8), (0, 8, 8), "the batch is empty"),
    ],
)
def test_shapes_that_do_not_fit_are_named_by_every_loss(
    loss: nn.Module, logits: tuple[int, ...], target: tuple[int, ...], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        loss(torch.zeros(logits), torch.zeros(target, dtype=torch.long))


def test_boundaries_of_a_square_are_its_rim() -> None:
    mask = square().float()[:, None]
    rim = boundary(mask)[0, 0]
    assert int(rim.sum()) == 18 * 18 - 14 * 14
    assert rim[12, 12] == 0
    assert rim[7, 10] == rim[8, 10] == 1
    assert boundary(torch.ones(1, 1, 5, 5)).sum() == 0


def test_the_boundary_of_a_cube_is_its_shell() -> None:
    mask = torch.zeros(1, 1, 9, 10, 11)
    mask[..., 3:6, 3:6, 3:6] = 1
    shell = boundary(mask)
    assert int(shell.sum()) == 5**3 - 1
    assert shell[0, 0, 4, 4, 4] == 0


def test_every_class_counts_for_the_boundary_and_the_batch_is_one() -> None:
    """Class 1 found, class 2 missed: half the loss of missing both; pixels are counted over both images."""
    target = torch.zeros(2, 24, 24, dtype=torch.long)
    target[0, 4:10, 4:10], target[0, 12:18, 12:18], target[1, 4:20, 4:20] = 1, 2, 2
    found = F.one_hot(target, 3).movedim(-1, 1).float() * 60 - 30
    found[:, 2] = -30
    missed = torch.where(target == 2, 30.0, found[:, 0])
    logits = torch.stack([missed, found[:, 1], found[:, 2]], 1)
    real = boundary((target == 2).float()[:, None]).sum()
    # smoothed: precision is 1, recall 1 / (boundary + 1)
    recall = 1 / (real + 1)
    expected = (1 - 2 * recall / (1 + recall)) / 2
    assert float(BoundaryLoss(1)(logits, target)) == pytest.approx(float(expected), abs=1e-3)


def test_the_boundary_loss_forgives_a_pixel_but_not_more() -> None:
    target = square()
    loss = BoundaryLoss(1)
    costs = [float(loss(sure(square(32, 8 + shift, 24 + shift)), target)) for shift in (0, 1, 3, 6)]
    assert costs[0] < 1e-3
    assert costs[1] < 0.05
    assert costs[1] + 0.5 < costs[2] <= costs[3]
    assert float(loss(sure(torch.zeros_like(target)), target)) > 0.9
    assert float(BoundaryLoss(0)(sure(square(32, 9, 25)), target)) > costs[1] + 0.1


def test_a_class_that_is_nowhere_costs_no_boundary() -> None:
    nothing = torch.zeros(1, 16, 16, dtype=torch.long)
    assert float(BoundaryLoss()(sure(nothing), nothing)) < 1e-3


@pytest.mark.parametrize("size", [(12, 10), (6, 5, 7)])
def test_the_total_is_the_weighed_sum_and_lowering_it_finds_the_mask(size: tuple[int, ...]) -> None:
    target = torch.randint(0, 3, (2, *size))
    logits = torch.randn(2, 3, *size, requires_grad=True)
    loss = SpectralDualLoss(1.0, 0.1, 0.05)
    total, parts = loss(logits, target, return_components=True)
    expected = parts["dice"] + parts["focal"] + 0.1 * parts["frequency"] + 0.05 * parts["boundary"]
    assert float(total.detach()) == pytest.approx(float(expected.detach()))
    assert float(loss(logits, target).detach()) == float(total.detach())
    optimiser = torch.optim.Adam([logits], 0.3)
    for _ in range(40):
        optimiser.zero_grad()
        loss(logits, target).backward()
        optimiser.step()
    assert torch.equal(logits.argmax(1), target)


def test_switches_leave_terms_out() -> None:
    logits, target = torch.randn(1, 2, 32, 32), square()
    for given, left in (
        ({"use_dice": False}, {"focal", "frequency", "boundary"}),
        ({"use_focal": False}, {"dice", "frequency", "boundary"}),
        ({"freq_weight": 0.0, "boundary_weight": 0.0}, {"dice", "focal"}),
        ({"spatial_weight": 0.0}, {"frequency", "boundary"}),
    ):
        _, parts = SpectralDualLoss(**given)(logits, target, return_components=True)  # type: ignore[arg-type]
        assert set(parts) == left


def test_settings_and_targets_that_cannot_be_used_are_named() -> None:
    with pytest.raises(SettingsError, match="freq_weight must be at least 0, got -1"):
        SpectralDualLoss(freq_weight=-1)
    with pytest.raises(SettingsError, match="both use_dice and use_focal are off"):
        SpectralDualLoss(use_dice=False, use_focal=False)
    with pytest.raises(SettingsError, match="all weights of the loss are 0"):
        SpectralDualLoss(0, 0, 0)
    loss, logits = SpectralDualLoss(), torch.zeros(1, 2, 32, 32)
    with pytest.raises(InputError, match="labels must lie in 0 to 1"):
        loss(logits, square() * 2)
    with pytest.raises(InputError, match=r"shape \(1, 32, 32\), got \(1, 16, 16\)"):
        loss(logits, square(16, 2, 4))


def test_half_precision_logits_are_weighed_in_float32() -> None:
    logits, target = torch.randn(1, 2, 32, 32), square()
    short = logits.bfloat16()
    assert float(SpectralDualLoss()(short, target)) == pytest.approx(float(SpectralDualLoss()(short.float(), target)))


def test_the_adversaries_have_opposite_aims_and_separate_gradients() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(0.25 + 0.5)
    assert float(hinge_generator_loss(fake)) == pytest.approx(1.5)
    images, target = torch.rand(2, 1, 16, 16), torch.randint(0, 3, (2, 16, 16))
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    discriminator = PatchDiscriminator(1, 3, width=4)
    deceive, detect = adversarial_losses(discriminator, images, logits, target)
    deceive.backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) > 0
    assert all(value.grad is None for value in discriminator.parameters())
    logits.grad = None
    detect.backward()
    assert logits.grad is None
    assert all(value.grad is not None for value in discriminator.parameters())


def test_a_discriminator_learns_to_tell_noise_from_masks() -> None:
    images, target = torch.rand(1, 1, 32, 32), square()
    logits = torch.randn(1, 2, 32, 32)
    discriminator: nn.Module = PatchDiscriminator(1, 2, width=4)
    optimiser = torch.optim.Adam(discriminator.parameters(), 1e-2)
    first = None
    for _ in range(30):
        _, detect = adversarial_losses(discriminator, images, logits, target)
        optimiser.zero_grad()
        detect.backward()
        optimiser.step()
        first = detect.item() if first is None else first
    assert first is not None
    assert detect.item() < 0.7 * first
