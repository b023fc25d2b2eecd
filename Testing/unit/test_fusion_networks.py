"""Both networks: exact where the images agree, convex, symmetric, a soft choose-max until trained."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from FreqSegLib.errors import InputError, SettingsError, WeightsError
from FreqSegLib.fusion import fusion_method
from FreqSegLib.fusion.attention import ChannelAttention, SpatialAttention
from FreqSegLib.fusion.frequency_importance import FrequencyImportance, GlobalController
from FreqSegLib.fusion.multi_scale import MultiScaleWaveletFusionNet
from FreqSegLib.fusion.network import SHARPNESS, WEIGHTS_FILE, FusionNetwork, _around
from FreqSegLib.fusion.pyramid import decompose
from FreqSegLib.fusion.rules import ChooseMax
from FreqSegLib.fusion.single_scale import WaveletFusionNet
from FreqSegLib.wavelet import dwt2

WAVES = ("haar", *(f"db{n}" for n in range(1, 9)), "bior2.2", "bior4.4", "coif2", "coif4")
KINDS = ("single-scale", "multi-scale")


def build(kind: str, wave: str = "haar", J: int = 1, halo_limit: int = 0) -> FusionNetwork:
    torch.manual_seed(1)
    if kind == "single-scale":
        return WaveletFusionNet(wave, J, halo_limit).eval()
    return MultiScaleWaveletFusionNet(wave, J, width=4, halo_limit=halo_limit).eval()


def stirred(network: FusionNetwork, seed: int = 2) -> FusionNetwork:
    """The network with every parameter moved, as training would, so that no term is zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=random))
    return network


def pair(height: int = 21, width: int = 34, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.rand(batch, 1, height, width, generator=random),
        torch.rand(batch, 1, height, width, generator=random),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("wave", "J"), itertools.product(WAVES, (1, 2, 3)))
def test_an_image_fused_with_itself_stays_itself(kind: str, wave: str, J: int) -> None:
    image, _ = pair(13, 18)
    network = stirred(build(kind, wave, J))
    with torch.no_grad():
        assert (network(image, image).image - image).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(height=st.integers(1, 40), width=st.integers(1, 40), J=st.integers(1, 3), wave=st.sampled_from(("haar", "db4")))
def test_any_size_comes_back_with_masks_between_0_and_1(kind: str, height: int, width: int, J: int, wave: str) -> None:
    ct, mr = pair(height, width, batch=1)
    network = stirred(build(kind, wave, J))
    with torch.no_grad():
        fused, alone = network(ct, mr), network(ct, ct)
    assert fused.image.shape == ct.shape
    assert fused.image.isfinite().all()
    assert (alone.image - ct).abs().max() < 1e-5
    bands = [high[:, 0].shape for high in dwt2(ct, wave, J).yh]
    pixels = [ct.shape] if kind == "multi-scale" else []
    assert [mask.shape for mask in fused.masks] == [*bands, (1, 1, *bands[-1][-2:]), *pixels]
    assert len(fused.names) == len(fused.masks)
    for mask in fused.masks:
        assert 0 <= mask.min() <= mask.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("J", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_exchanged_images_give_the_same_image_and_exchanged_masks(kind: str, J: int, training: bool) -> None:
    ct, mr = pair()
    network = stirred(build(kind, "db4", J, halo_limit=3)).train(training)
    with torch.no_grad():
        one, other = network(ct, mr), network(mr, ct)
    assert (one.image - other.image).abs().max() < 1e-5
    for mask, opposite in zip(one.masks, other.masks, strict=True):
        assert (mask - (1 - opposite)).abs().max() < 1e-5
        assert mask.std() > 0.01
    for name in one.weights:
        assert torch.allclose(one.weights[name], other.weights[name], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_given_by_hand_are_used_and_may_be_exchanged_with_the_images(kind: str) -> None:
    ct, mr = pair()
    network = stirred(build(kind, "db2", 2))
    with torch.no_grad():
        fused = network(ct, mr)
        gate = fused.weights.get("pixel_gate")
        assert torch.equal(network.fuse_with_masks(ct, mr, fused.masks, gate), fused.image)
        exchanged = network.fuse_with_masks(mr, ct, [1 - mask for mask in fused.masks], gate)
        all_ct = network.fuse_with_masks(ct, mr, [torch.ones_like(mask) for mask in fused.masks], gate)
    assert (exchanged - fused.image).abs().max() < 1e-5
    assert (all_ct - ct).abs().max() < 1e-5
    with pytest.raises(InputError, match=r"masks must lie in \[0, 1\], got 0 to 2"):
        network.fuse_with_masks(ct, mr, [2.0 * torch.ones_like(mask).triu() for mask in fused.masks], gate)
    with pytest.raises(InputError, match="the masks must be of sizes"):
        network.fuse_with_masks(ct, mr, fused.masks[:-1], gate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("wave", "J"), [("haar", 1), ("db4", 3)])
def test_untrained_masks_are_the_soft_choice_of_the_larger_coefficient(kind: str, wave: str, J: int) -> None:
    ct, mr = (image.double() for image in pair())
    with torch.no_grad():
        fused = build(kind, wave, J).double()(ct, mr)
    a, b = dwt2(ct, wave, J), dwt2(mr, wave, J)
    for level in range(J):
        scale = SHARPNESS / 2 ** (level + 1)
        expected = torch.sigmoid(scale * (a.yh[level].abs() - b.yh[level].abs()))[:, 0]
        assert torch.allclose(fused.masks[level], expected, atol=1e-6)
    assert torch.allclose(fused.masks[J], torch.sigmoid(SHARPNESS / 2**J * (a.yl - b.yl)), atol=1e-6)
    assert not fused.weights.get("pixel_gate", torch.zeros(1)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_made_sharp_an_untrained_network_is_choose_max(kind: str) -> None:
    ct, mr = pair()
    network = build(kind, "db4", 2)
    with torch.no_grad():
        network.detail_sharpness.fill_(15.0)
        network.low_sharpness.fill_(15.0)
        difference = network(ct, mr).image - ChooseMax("db4", 2)(ct, mr).image
    assert difference.abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_each_slice_of_a_batch_is_fused_as_if_alone(kind: str) -> None:
    ct, mr = pair(batch=3)
    network = stirred(build(kind, "db4", 2))
    with torch.no_grad():
        together = network(ct, mr).image
        alone = torch.cat([network(ct[i : i + 1], mr[i : i + 1]).image for i in range(3)])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_folding_batch_norms_changes_nothing_and_leaves_the_network_as_it_was(kind: str) -> None:
    network = stirred(build(kind, "db4", 2))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = network.for_inference()
    ct, mr = pair()
    with torch.no_grad():
        assert (folded(ct, mr).image - network(ct, mr).image).abs().max() < 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("shape", [(2, 1, 9, 14), (1, 1, 2, 11), (1, 1, 1, 1)])
def test_the_range_around_a_pixel_is_that_of_pooling(side: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    window = nn.MaxPool2d(side, 1, side // 2)
    assert torch.equal(_around(x, side, 1), window(x))
    assert torch.equal(_around(x, side, -1), -window(-x))


@pytest.mark.parametrize("kind", KINDS)
def test_no_fused_pixel_leaves_the_range_around_it_when_halos_are_limited(kind: str) -> None:
    """A bright bone rim in the CT beside fine texture in the MR, in a wavelet that rings."""
    ct = torch.zeros(1, 1, 48, 48)
    ct[..., 10:38, 10:12] = 1
    mr = 0.3 * pair(48, 48, batch=1)[1]
    with torch.no_grad():
        free = build(kind, "db4", 3)(ct, mr).image
        held = build(kind, "db4", 3, halo_limit=3)(ct, mr).image

    def outside(image: Tensor) -> float:
        window = nn.MaxPool2d(3, 1, 1)
        most, least = window(torch.maximum(ct, mr)), -window(-torch.minimum(ct, mr))
        return float(((image - most).relu() + (least - image).relu()).max())

    assert outside(free) > 0.02
    assert outside(held) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_after_one_step(kind: str) -> None:
    """The last layers start at zero; once they have moved, all that is in front of them has a gradient."""
    ct, mr = pair(batch=2)
    network = stirred(build(kind, "db4", 3)).train()
    (network(ct, mr).image - 0.3).square().mean().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_the_small_network_has_about_six_thousand_weights() -> None:
    assert sum(p.numel() for p in WaveletFusionNet("haar", 1).parameters()) == 6_100
    convolutions = [module for module in WaveletFusionNet("haar", 3).modules() if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(2, 16), (16, 32), (32, 10)]


def test_the_small_network_reads_its_bands_on_a_coarser_grid_only_if_asked() -> None:
    """A change of one pixel of the low band reaches 3 pixels each way at full size, and twice as far at stride 2."""
    low, other = pair(33, 33, batch=1)
    for stride, reach in ((1, 3), (2, 8)):
        torch.manual_seed(0)
        network = stirred(WaveletFusionNet("haar", 1, stride=stride).eval())
        ct = torch.nn.functional.interpolate(low, scale_factor=2)
        mr = torch.nn.functional.interpolate(other, scale_factor=2)
        touched = ct.clone()
        touched[..., 32:34, 32:34] += 0.5
        with torch.no_grad():
            moved = (network(ct, mr).masks[0] != network(touched, mr).masks[0]).any(1)[0].nonzero()
        distance = int((moved - 16).abs().max())
        assert distance == 3 if stride == 1 else 3 < distance <= reach


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_channel_attention_works_with_fewer_channels_than_its_reduction(channels: int) -> None:
    torch.manual_seed(0)
    features = torch.rand(2, channels, 5, 6)
    weighed = ChannelAttention(channels, reduction=8)(features)
    factor = weighed / features
    assert weighed.shape == features.shape
    assert torch.allclose(factor, factor[..., :1, :1].expand_as(factor), atol=1e-5)
    assert 0 < factor.min() <= factor.max() < 1


def test_spatial_attention_gives_all_channels_of_a_place_one_factor() -> None:
    torch.manual_seed(0)
    features = torch.rand(2, 3, 9, 8) + 0.1
    factor = SpatialAttention(7)(features) / features
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), atol=1e-5)
    assert factor.std() > 1e-4
    with pytest.raises(SettingsError, match="odd and positive, got 4"):
        SpatialAttention(4)


def test_frequency_importance_starts_neutral_depends_on_content_and_has_mean_one() -> None:
    pyramid = decompose(*pair(), "haar", 2)
    importance = FrequencyImportance()
    assert torch.equal(importance(pyramid, 0), torch.ones(2, 4))
    with torch.no_grad():
        importance.from_energy.weight += torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    factors = importance(pyramid, 0)
    assert torch.allclose(factors.mean(1), torch.ones(2))
    assert factors.min() > 0
    assert not torch.allclose(factors, importance(decompose(*(0.1 * image for image in pair()), "haar", 2), 0))


def test_frequency_importance_moves_the_masks_away_from_or_towards_one_half() -> None:
    ct, mr = pair()
    network = build("multi-scale", "haar", 1)
    with torch.no_grad():
        before = network(ct, mr)
        network.importance[0].offset += torch.tensor([0.0, 2.0, 0.0, 0.0])
        after = network(ct, mr)
    assert torch.equal(before.weights["importance"], torch.ones(2, 1, 4))
    decided = [[(fused.masks[0][:, band] - 0.5).abs() for band in range(3)] for fused in (before, after)]
    assert (decided[1][0] >= decided[0][0]).all()
    assert (decided[1][1] <= decided[0][1]).all()
    assert (after.masks[1] - 0.5).abs().max() < (before.masks[1] - 0.5).abs().max()


def test_the_controller_starts_even_and_weighs_how_far_a_level_departs() -> None:
    ct, mr = pair()
    even = GlobalController(3)(ct, mr)
    assert torch.allclose(even, torch.full((2, 3), 1 / 3))
    network = stirred(build("multi-scale", "haar", 2))
    with torch.no_grad():
        network.controller.weigh.bias.copy_(torch.tensor([-40.0, 40.0]))
        silenced = network(ct, mr)
        assert torch.allclose(silenced.weights["levels"], torch.tensor([[0.0, 1.0]]).expand(2, 2), atol=1e-6)
        network.mask_nets[0].last.weight.add_(1.0)
        assert torch.allclose(network(ct, mr).masks[0], silenced.masks[0], atol=1e-5)
        network.mask_nets[1].last.weight.add_(1.0)
        assert not torch.allclose(network(ct, mr).masks[1], silenced.masks[1], atol=1e-3)


def test_an_open_pixel_gate_gives_the_mix_of_pixels_and_never_opens_past_one() -> None:
    ct, mr = pair(26, 31)
    network = build("multi-scale", "db4", 2)
    with torch.no_grad():
        network.open_pixel_gate(1.0)
        network.pixel_sharpness.fill_(12.0)
        fused = network(ct, mr)
        assert torch.equal(fused.weights["pixel_gate"], torch.ones_like(ct))
        assert torch.allclose(fused.image, torch.maximum(ct, mr), atol=1e-4)
        network.pixel_gate.bias.fill_(7.0)
        assert torch.equal(network(ct, mr).image, fused.image)
    with pytest.raises(SettingsError, match=r"must lie in \[0, 1\], got 1\.5"):
        network.open_pixel_gate(1.5)


@pytest.mark.parametrize(("closed", "pull"), [(-0.3, 1.0), (1.3, -1.0)])
def test_a_gate_that_is_stuck_at_an_end_learns_to_come_back_and_no_further_out(closed: float, pull: float) -> None:
    ct, mr = pair(26, 31)
    for sign, moves in ((pull, True), (-pull, False)):
        network = build("multi-scale", "haar", 2)
        with torch.no_grad():
            network.pixel_gate.bias.fill_(closed)
        (-sign * network(ct, mr).weights["pixel_gate"].sum()).backward()
        slope = network.pixel_gate.bias.grad.item()
        assert (slope * pull < 0) if moves else slope == 0


def test_the_pixel_gate_lies_over_the_place_it_was_made_for() -> None:
    """Long filters make bands larger than half of the image; the gate must not be shifted against it."""
    network = build("multi-scale", "db4", 1)
    ct = torch.zeros(1, 1, 64, 64)
    ct[..., 40, 24] = 1
    high = dwt2(ct, "db4", 1).yh[0].square().sum((1, 2))[:, None]
    there = network._enlarged(high, (64, 64))[0, 0]
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    centre = [(place * there).sum() / there.sum() for place in (rows, columns)]
    assert abs(centre[0] - 40) < 1.5
    assert abs(centre[1] - 24) < 1.5


def test_masks_are_not_multiplied_by_attention() -> None:
    """Where both images are black the shares are even: attention on a mask itself would favour the MR there."""
    black = torch.zeros(1, 1, 16, 16)
    with torch.no_grad():
        fused = stirred(build("multi-scale", "haar", 2))(black, black)
    for mask in fused.masks:
        assert torch.allclose(mask, torch.full_like(mask, 0.5), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_come_back_with_their_settings(kind: str, tmp_path: Path) -> None:
    network = stirred(build(kind, "db2", 2, halo_limit=3))
    network.save(tmp_path / WEIGHTS_FILE, {"licence": "MIT"})
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]
    method = fusion_method(kind, weights_folder=tmp_path)
    ct, mr = pair()
    assert torch.equal(method(ct, mr).image, network(ct, mr).image)
    assert not method(ct, mr).image.requires_grad
    other = fusion_method(kind, weights_folder=tmp_path, wave="haar", levels=2)
    assert not torch.allclose(other(ct, mr).image, method(ct, mr).image)
    with pytest.raises(SettingsError, match="trained with 2 levels, not 3"):
        fusion_method(kind, weights_folder=tmp_path, levels=3)
    wrong = next(name for name in KINDS if name != kind)
    with pytest.raises(WeightsError, match=f"holds a {kind} network, not a {wrong} one"):
        fusion_method(wrong, weights_folder=tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="holds no fusion weights"):
        fusion_method("single-scale", weights_folder=tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WaveletFusionNet("haar", 0), "whole number >= 1, got 0"),
        (lambda: WaveletFusionNet("haar", 1, 2), "odd number of pixels, got 2"),
        (lambda: WaveletFusionNet("haar", 1, stride=0), "stride must be at least 1, got 0"),
        (lambda: MultiScaleWaveletFusionNet(width=0), "at least 1 channel, got 0"),
        (lambda: MultiScaleWaveletFusionNet(reduction=0), "at least 1, got 16 and 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make()  # type: ignore[operator]
