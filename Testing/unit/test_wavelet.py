"""The wavelet transform against PyWavelets, its gradient against finite differences, and the frequency images."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from FreqSegLib import wavelet
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.wavelet import (
    MODES,
    Bands,
    dwt2,
    frequency_images,
    high_frequency_image,
    idwt2,
    low_frequency_image,
    wavelets,
)

# wavedec2 warns that many levels are all border; small images are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Level value:UserWarning")


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def largest_difference(bands: Bands, x: torch.Tensor) -> float:
    """Largest difference from PyWavelets' coefficients in float64, relative to the largest of them (at least 1)."""
    low, *details = pywt.wavedec2(x.double().numpy(), bands.wave, bands.mode, level=bands.J)
    pairs = [(bands.yl, low)]
    for ours, theirs in zip(reversed(bands.yh), details, strict=True):
        pairs += [(ours[:, :, band], theirs[band]) for band in range(3)]
    assert all(tuple(ours.shape) == theirs.shape for ours, theirs in pairs)
    scale = max(1.0, *(np.abs(theirs).max() for _, theirs in pairs))
    return max(np.abs(ours.double().numpy() - theirs).max() for ours, theirs in pairs) / scale


def test_every_discrete_wavelet_but_the_inexact_one_is_offered() -> None:
    assert set(pywt.wavelist(kind="discrete")) - set(wavelets()) == {"dmey"}
    assert {"zero", "symmetric", "reflect", "periodization", "periodic", "constant"} == set(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_every_wavelet_equals_pywavelets_and_reconstructs_at_an_odd_size_below_its_filter(mode: str) -> None:
    x = images(1, 1, 13, 22)
    single = x.float()
    for wave in wavelets():
        bands = dwt2(x, wave, 2, mode)
        assert bands.yl.dtype == torch.float64
        assert largest_difference(bands, x) < 1e-10, wave
        assert (idwt2(bands) - x).abs().max() < 1e-9, wave
        bands = dwt2(single, wave, 2, mode)
        assert bands.yl.dtype == torch.float32
        assert largest_difference(bands, single) < 1e-5, wave
        assert (idwt2(bands) - single).abs().max() < 1e-5, wave


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (5, 9), (40, 33), (64, 64)])
@pytest.mark.parametrize("mode", MODES)
def test_sizes_and_levels_equal_pywavelets(mode: str, size: tuple[int, int]) -> None:
    x = images(2, 3, *size)
    for wave in ("haar", "db2", "sym5", "coif3", "bior2.6", "rbio4.4", "db20"):
        for J in (1, 3):
            if mode == "reflect" and (min(size) < 2 or (J > 1 and min(size) < 9)):
                continue  # a level would start from one pixel, which PyWavelets refuses too
            assert largest_difference(dwt2(x, wave, J, mode), x) < 1e-10, (wave, J)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(9, 45),
    st.integers(9, 45),
    st.sampled_from(wavelets()),
    st.sampled_from(MODES),
    st.sampled_from((1, 2, 3)),
)
def test_reconstruction_is_the_image_at_any_size(height: int, width: int, wave: str, mode: str, J: int) -> None:
    x = images(2, 2, height, width, seed=height).float()
    restored = idwt2(dwt2(x, wave, J, mode))
    assert restored.shape == x.shape
    assert (restored - x).abs().max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", ["haar", "db2", "bior2.2", "db4"])
def test_gradients_are_right_up_to_the_border(wave: str, mode: str) -> None:
    x = images(1, 1, 5, 4).requires_grad_()

    def coefficients(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bands = dwt2(x, wave, 1, mode)
        return (bands.yl, *bands.yh)

    assert torch.autograd.gradcheck(coefficients, x)

    bands = dwt2(images(1, 1, 3, 4), wave, 1, mode)

    def image(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return idwt2(replace(bands, yl=low, yh=[high]))

    assert torch.autograd.gradcheck(image, (bands.yl.clone().requires_grad_(), bands.yh[0].clone().requires_grad_()))


def test_gradients_pass_through_several_levels_and_the_frequency_images() -> None:
    x = images(1, 1, 6, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(frequency_images(x, "db2", 2, "symmetric")), x)


def test_details_get_their_gradient_when_the_low_band_needs_none() -> None:
    bands = dwt2(images(1, 1, 8, 8))
    high = bands.yh[0].clone().requires_grad_()
    idwt2(replace(bands, yh=[high])).square().sum().backward()
    # haar is orthonormal, so the squares of image and coefficients have the same sum and the gradient is 2 * high
    torch.testing.assert_close(high.grad, 2 * high.detach())


def test_bands_are_ordered_lh_hl_hh_and_the_finest_level_comes_first() -> None:
    rows = torch.tensor([0.0, 1.0]).repeat(4)[:, None].expand(8, 8)[None, None].double()
    horizontal_edges = dwt2(rows, "haar", 2)
    vertical_edges = dwt2(rows.mT, "haar", 2)
    assert [tuple(high.shape[-2:]) for high in horizontal_edges.yh] == [(4, 4), (2, 2)]
    assert horizontal_edges.yh[0].abs().amax(dim=(0, 1, 3, 4)).tolist() == pytest.approx([1, 0, 0])
    assert vertical_edges.yh[0].abs().amax(dim=(0, 1, 3, 4)).tolist() == pytest.approx([0, 1, 0])


@pytest.mark.parametrize("wave", ["haar", "db4", "bior3.3", "coif2", "sym10"])
def test_a_constant_image_stays_that_constant_and_has_no_high_frequency(wave: str) -> None:
    x = torch.tensor([0.3, 0.0, -1000.0, 12345.678]).reshape(4, 1, 1, 1).expand(4, 3, 21, 30)
    for mode in MODES:
        if mode == "zero":
            continue  # the image ends in a step to zero there
        for J in (1, 3):
            low, high = frequency_images(x, wave, J, mode)
            torch.testing.assert_close(low, x, rtol=1e-5, atol=0)
            assert torch.equal(high, torch.zeros_like(x)), mode


def test_rounding_noise_on_a_constant_is_not_blown_up_to_an_image() -> None:
    x = 1000 * (1 + 1e-7 * images(2, 1, 24, 24)).float()
    assert x.std() > 0
    assert torch.equal(high_frequency_image(x, "db4", 3), torch.zeros_like(x))


def enlarge_twice(band: np.ndarray) -> np.ndarray:
    """Bilinear enlargement by two along both axes, pixel centres kept, borders held."""
    for _ in range(2):
        padded = np.pad(band, ((1, 1), (0, 0)), mode="edge")
        inner = padded[1:-1]
        pairs = np.stack([0.75 * inner + 0.25 * padded[:-2], 0.75 * inner + 0.25 * padded[2:]], axis=1)
        band = pairs.reshape(-1, band.shape[1]).T
    return band


def test_the_high_image_is_fmisegs_sum_of_normalised_bands() -> None:
    x = images(1, 1, 12, 16)
    bands = pywt.dwt2(x[0, 0].numpy(), "haar", "symmetric")[1]
    expected = enlarge_twice(sum((band - band.min()) / (band.max() - band.min()) for band in bands))
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(high_frequency_image(x)[0, 0], torch.from_numpy(expected))


def test_the_low_image_is_the_mean_of_each_block_for_haar() -> None:
    x = images(1, 2, 8, 12)
    for J in (1, 2):
        means = torch.nn.functional.avg_pool2d(x, 2**J)
        torch.testing.assert_close(
            low_frequency_image(x, J=J), means.repeat_interleave(2**J, 2).repeat_interleave(2**J, 3)
        )


@pytest.mark.parametrize("wave", ["haar", "bior2.2", "bior4.4", "sym8", "coif3", "db4"])
def test_a_spot_near_a_corner_stays_where_it_was_in_both_frequency_images(wave: str) -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(63.0), indexing="ij")
    centres = torch.cartesian_prod(torch.arange(10.0, 14.0), torch.arange(12.0, 16.0)).reshape(16, 2, 1, 1, 1)
    spots = torch.exp(-((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2) / 4.5)
    for mode in ("symmetric", "periodization"):
        for image in frequency_images(spots, wave, 1, mode):
            # The mean over positions: where a spot lies on the band's coarser grid moves its centre by up to a pixel.
            weight = (image - image[..., 32:, 32:].mean(dim=(2, 3), keepdim=True)).square()
            centre = torch.stack([(weight * axis).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)) for axis in (y, x)], 1)
            assert (centre - centres[:, :, 0, 0, 0]).mean(0).abs().max() < 1, mode


def test_an_image_alone_gives_what_it_gives_in_a_batch() -> None:
    x = images(3, 2, 20, 17).float() * torch.tensor([1.0, 100.0, 0.01]).reshape(3, 1, 1, 1)
    together = frequency_images(x, "db3", 2)
    for index in range(3):
        alone = frequency_images(x[index : index + 1], "db3", 2)
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], many[index], rtol=1e-5, atol=1e-6)


def test_the_high_image_fills_zero_to_one_for_every_image() -> None:
    high = high_frequency_image(images(3, 1, 19, 24) * 1e-3 + 0.5, "sym4", 2)
    assert high.amin(dim=(1, 2, 3)).tolist() == [0, 0, 0]
    assert high.amax(dim=(1, 2, 3)).tolist() == [1, 1, 1]


def test_precision_follows_the_input_and_autocast_does_not_lower_it() -> None:
    x = images(1, 1, 16, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bands = dwt2(x, "db3")
        assert bands.yl.dtype == torch.float32
        assert (idwt2(bands) - x).abs().max() < 1e-5
    half = dwt2(x.half(), "db3")
    assert (half.yl.dtype, half.yh[0].dtype, idwt2(half).dtype) == (torch.float16,) * 3
    torch.testing.assert_close(half.yl.float(), bands.yl, atol=2e-3, rtol=2e-3)
    assert frequency_images(x.half()).high.dtype == torch.float16


def test_filters_made_in_inference_mode_serve_training_later() -> None:
    wavelet._build_filters.cache_clear()
    with torch.inference_mode():
        dwt2(images(1, 1, 8, 8), "db2")
    x = images(1, 1, 8, 8).requires_grad_()
    idwt2(dwt2(x, "db2")).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_filters_are_built_once() -> None:
    wavelet._build_filters.cache_clear()
    for _ in range(3):
        idwt2(dwt2(images(1, 1, 8, 8), "db2", 2))
    assert wavelet._build_filters.cache_info().misses == 1


def test_pytorch_wavelets_loads_without_pkg_resources_and_leaves_no_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("pytorch_wavelets", "pkg_resources"):
            monkeypatch.delitem(sys.modules, name)

    class NewerSetuptools:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "pkg_resources":
                raise ModuleNotFoundError("No module named 'pkg_resources'")

    monkeypatch.setattr(sys, "meta_path", [NewerSetuptools(), *sys.meta_path])
    library = wavelet._pytorch_wavelets()
    assert "pkg_resources" not in sys.modules
    x = torch.rand(1, 1, 8, 8)
    assert library.DTCWTForward(J=1)(x)[0].shape == x.shape  # reads its filters through what stood in


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wave": "har"}, "wavelet 'har' is not offered; nearest: haar"),
        ({"wave": "dbb4"}, "wavelet 'dbb4' is not offered; nearest: db4"),
        ({"wave": "mexh"}, "wavelet 'mexh' is not offered; choose for example: haar"),
        ({"wave": "dmey"}, "wavelet 'dmey' is not offered: its inverse does not give the image back"),
        ({"mode": "symetric"}, "boundary mode 'symetric' is not offered; nearest: symmetric"),
        ({"mode": "smooth"}, "boundary mode 'smooth' is not offered: .*; use 'constant'"),
        ({"J": 0}, "must be a whole number >= 1, got 0"),
        ({"J": 1.5}, "must be a whole number >= 1, got 1.5"),
    ],
)
def test_a_setting_that_does_not_exist_is_named_with_what_is_near(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dwt2(images(1, 1, 8, 8), **arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(8, 8), r"got \(8, 8\)"),
        (torch.zeros(1, 1, 0, 8), r"got \(1, 1, 0, 8\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int16), "got torch.int16"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dwt2(x)


def test_reflection_of_a_single_pixel_is_refused_at_the_level_where_it_happens() -> None:
    with pytest.raises(InputError, match=r"level 3 starts from 2 x 1: use fewer levels than J=3"):
        dwt2(images(1, 1, 8, 4), "haar", 3, "reflect")
