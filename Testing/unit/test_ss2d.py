"""Directions, SS2D and the spectral gating: against plain loops, convolutions, and VMamba's parameter layout."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from FreqSegLib.errors import SettingsError
from FreqSegLib.mamba.blocks import DropPath, PatchExpanding, PatchMerging, SpectralVSSBlock, VSSBlock
from FreqSegLib.mamba.cross_scan import cross_merge, cross_scan, merge_orders, scan_orders
from FreqSegLib.mamba.selective_scan import selective_scan
from FreqSegLib.mamba.spectral_gating import SpectralGating, radial_bands
from FreqSegLib.mamba.ss2d import SS2D


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_the_four_directions_of_a_small_image() -> None:
    image = torch.tensor([[1, 2, 3], [4, 5, 6]])[None, None]
    assert cross_scan(image)[0, :, 0].tolist() == [
        [1, 2, 3, 4, 5, 6],
        [1, 4, 2, 5, 3, 6],
        [6, 5, 4, 3, 2, 1],
        [6, 3, 5, 2, 4, 1],
    ]


def test_the_six_directions_walk_each_axis_both_ways() -> None:
    volume = torch.arange(24).reshape(1, 1, 2, 3, 4)
    found = cross_scan(volume)[0, :, 0]
    assert [int(sequence[1] - sequence[0]) for sequence in found] == [1, 12, 4, -1, -12, -4]
    assert all(sorted(sequence.tolist()) == list(range(24)) for sequence in found)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=3))
@settings(max_examples=20)
def test_merging_is_the_adjoint_of_scanning(size: list[int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for scan, merge in ((cross_scan, cross_merge), (scan_orders, merge_orders)):
        y = torch.randn_like(scan(x))
        assert torch.allclose((scan(x) * y).sum(), (x * merge(y, tuple(size))).sum())
        assert torch.allclose(merge(scan(x), tuple(size)), x * scan(x).shape[1])


def test_parameters_have_vmambas_names_and_shapes() -> None:
    found = {name: tuple(value.shape) for name, value in SS2D(96).state_dict().items()}
    assert found == {
        "x_proj_weight": (4, 38, 192),
        "dt_projs_weight": (4, 192, 6),
        "dt_projs_bias": (4, 192),
        "A_logs": (768, 16),
        "Ds": (768,),
        "in_proj.weight": (384, 96),
        "conv2d.weight": (192, 1, 3, 3),
        "conv2d.bias": (192,),
        "out_norm.weight": (192,),
        "out_norm.bias": (192,),
        "out_proj.weight": (96, 192),
    }


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (3, 4, 5)])
def test_ss2d_is_a_scan_of_every_direction_added_up(size: tuple[int, ...]) -> None:
    """Written out direction by direction, with flipped copies."""
    module = SS2D(6, d_state=3, dimensions=len(size)).double()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    first, gate = module.in_proj(x).chunk(2, -1)
    first = F.silu(module.conv2d(first.movedim(-1, 1)))
    sequences, outputs = cross_scan(first), []
    for k, sequence in enumerate(sequences.unbind(1)):
        projected = module.x_proj_weight[k] @ sequence
        steps, B, C = projected.split([module.dt_rank, 3, 3], 1)
        own = slice(k * 12, (k + 1) * 12)
        outputs.append(
            selective_scan(
                sequence,
                module.dt_projs_weight[k] @ steps,
                -module.A_logs[own].exp(),
                B,
                C,
                module.Ds[own],
                module.dt_projs_bias[k],
                True,
            )
        )
    merged = cross_merge(torch.stack(outputs, 1), size).movedim(1, -1)
    truth = module.out_proj(module.out_norm(merged) * F.silu(gate))
    assert torch.allclose(module(x), truth, atol=1e-12)


def test_a_change_anywhere_reaches_everywhere() -> None:
    module = SS2D(4)
    x = torch.randn(1, 6, 6, 4)
    changed = x.clone()
    changed[0, 0, 5] += 1
    assert ((module(changed) - module(x)).abs().amax(-1) > 0).all()


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"dimensions": 1}, {"d_conv": 2}, {"d_state": 0}):
        with pytest.raises(SettingsError):
            SS2D(4, **wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="filter_size must be at least 1"):
        SpectralGating(2, 0)


@pytest.mark.parametrize("filter_size", [1, 4, 7])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (33, 20), (4, 3, 6)])
def test_gating_is_the_linear_convolution_with_its_response(filter_size: int, size: tuple[int, ...]) -> None:
    gating = SpectralGating(3, filter_size, len(size), noise=0.5).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert torch.allclose(gating(x), gating.convolved(x), atol=1e-10)


def test_gating_starts_as_the_identity_without_noise() -> None:
    x = torch.randn(1, 4, 9, 13)
    assert torch.allclose(SpectralGating(4, 16, noise=0.0)(x), x, atol=1e-5)


def test_gating_means_the_same_at_every_size() -> None:
    """Inside an image, what surrounds it beyond the filter's reach changes nothing: no size, no wrap-around."""
    gating = SpectralGating(2, 8, noise=0.5).double()
    large = torch.randn(1, 2, 40, 50, dtype=torch.float64)
    small = large[..., 8:30, 10:40]
    assert torch.allclose(gating(large)[..., 12:26, 14:36], gating(small)[..., 4:-4, 4:-4], atol=1e-10)


def test_what_happens_at_one_border_does_not_come_round_to_the_other() -> None:
    gating = SpectralGating(1, 16, noise=0.5).double()
    x = torch.zeros(1, 1, 24, 24, dtype=torch.float64)
    x[..., 0] = 1
    assert gating(x)[..., :8].abs().max() > 0.1
    assert gating(x)[..., 10:].abs().max() < 1e-12


def test_bands_share_all_frequencies_and_each_changes_its_own() -> None:
    bands = radial_bands(32, 2)
    assert torch.allclose(bands.sum(0), torch.ones_like(bands[0]))
    assert (bands >= 0).all()
    gating = SpectralGating(1, 32, noise=0.0)
    with torch.no_grad():
        gating.band_gain[0, -1] = 0
    across = torch.arange(64.0)
    slow, fast = (torch.cos(2 * torch.pi * f * across).expand(1, 1, 64, -1) for f in (1 / 32, 0.5))
    middle = (slice(None), slice(None), slice(16, -16), slice(16, -16))
    assert (gating(slow) - slow)[middle].abs().max() < 0.05
    assert gating(fast)[middle].abs().max() < 0.05


def test_gating_has_gradients_and_keeps_the_type() -> None:
    gating = SpectralGating(1, 4, noise=0.3).double()
    x = torch.randn(1, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gating, (x,))
    assert gating.float()(x.detach().bfloat16()).dtype == torch.bfloat16


def test_a_block_whose_gates_are_zero_is_the_plain_vss_block() -> None:
    block = SpectralVSSBlock(8, d_state=2, filter_size=4)
    plain = VSSBlock(8, d_state=2)
    plain.load_state_dict({key: block.state_dict()[key] for key in plain.state_dict()})
    x = torch.randn(1, 5, 6, 8)
    assert torch.equal(block(x), plain(x))
    with torch.no_grad():
        block.spectral_gate.fill_(0.5)
    assert not torch.allclose(block(x), plain(x))


def test_the_gates_learn_from_zero() -> None:
    block = SpectralVSSBlock(4, d_state=2, filter_size=4)
    block(torch.randn(1, 4, 4, 4)).square().sum().backward()
    assert block.spectral_gate.grad is not None
    assert (block.spectral_gate.grad != 0).all()


def test_merging_takes_neighbours_in_swins_order_and_any_size() -> None:
    merging = PatchMerging(1)
    merging.norm = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    image = torch.arange(12.0).reshape(1, 3, 4, 1)
    # the first channel of a 2 x 2 neighbourhood is its corner, the second the pixel below; odd sides repeat their end
    assert merging(image)[0, :, :, 0].tolist() == [[0, 2], [8, 10]]
    assert merging(image)[0, :, :, 1].tolist() == [[4, 6], [8, 10]]


def test_expanding_puts_outputs_beside_each_other_and_crops() -> None:
    expanding = PatchExpanding(1, 1, (2, 3))
    expanding.norm = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        expanding.expand.weight.copy_(torch.arange(6.0)[:, None])
    found = expanding(torch.ones(1, 2, 2, 1), (4, 5))
    assert found[0, :, :, 0].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4], [0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    with pytest.raises(SettingsError, match="does not cover"):
        expanding(torch.ones(1, 2, 2, 1), (5, 5))


def test_a_dropped_path_keeps_the_mean_and_is_off_in_use() -> None:
    path = DropPath(0.25)
    x = torch.ones(4000, 2)
    found = path(x)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(float(found.mean()) - 1) < 0.05
    assert torch.equal(copy.deepcopy(path).eval()(x), x)
