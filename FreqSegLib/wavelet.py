"""The 2D discrete wavelet transform, its inverse, and the low- and high-frequency images made from it.

Filtering is done by pytorch_wavelets (Cotter, 2019) in its ``zero`` mode, the only one whose gradient is right at the
borders; every other boundary is made by extending the image with differentiable torch operations first. Haar, whose
filters are two taps long, is sums and differences of neighbours instead: on a CPU a small share of the convolutions'
time. Coefficients equal PyWavelets' ``wavedec2`` (Lee et al., 2019) level by level.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.errors import InputError, SettingsError

MODES = ("zero", "symmetric", "reflect", "periodization", "periodic", "constant")
"""The boundary modes offered, by PyWavelets' names."""

_NUMPY_PAD: dict[str, Any] = {"symmetric": "symmetric", "reflect": "reflect", "periodic": "wrap", "constant": "edge"}
# A detail smaller than this share of the image's largest magnitude is rounding, not structure. PyWavelets' longest
# filters sum to zero only to about 1e-9, so the machine epsilon of float64 would be too strict.
_FLAT = 1e-5


@lru_cache(maxsize=1)
def wavelets() -> tuple[str, ...]:
    """Names of the wavelets offered: every discrete wavelet of PyWavelets that reconstructs perfectly.

    ``dmey`` is left out: its filters are a truncated approximation, so even PyWavelets' own inverse misses the image by
    up to a tenth of its range. ``rbio3.1`` is exact but ill-conditioned: in float32, here as in PyWavelets, it gives a
    [0, 1] image back to 1e-5 only up to three levels.
    """
    return tuple(name for name in pywt.wavelist(kind="discrete") if name != "dmey")


@dataclass(frozen=True, eq=False)
class Bands:
    """A wavelet decomposition of a batch of images, with what its inverse needs to know.

    Attributes:
        yl: low band LL of the coarsest level, (B, C, h, w); PyWavelets' ``cA``.
        yh: detail bands, one tensor (B, C, 3, h_j, w_j) a level, the finest first (PyWavelets' ``wavedec2`` lists the
            coarsest first). Along the third axis: LH, low-pass along x and high-pass along y, so horizontal edges
            (``cH``); HL, vertical edges (``cV``); HH (``cD``).
        wave: the wavelet's name.
        mode: the boundary mode's name.
        size: (H, W) of the images the bands came from.
    """

    yl: Tensor
    yh: list[Tensor]
    wave: str
    mode: str
    size: tuple[int, int]

    @property
    def J(self) -> int:
        """Number of levels."""
        return len(self.yh)

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of what each level decomposed, the finest first: the image, then the low band of the level before."""
        return [self.size, *((h.shape[-2], h.shape[-1]) for h in self.yh[:-1])]


class FrequencyImages(NamedTuple):
    """Two views of a batch of images, each (B, C, H, W) like the images themselves."""

    low: Tensor
    high: Tensor


def dwt2(x: Tensor, wave: str = "haar", J: int = 1, mode: str = "symmetric") -> Bands:
    """Decompose images into wavelet bands, as PyWavelets' ``wavedec2`` does, differentiably.

    Args:
        x: images (B, C, H, W), floating point, any H and W >= 1 (``reflect`` needs 2). Half precision is computed in
            float32 and returned in half.
        wave: a name out of :func:`wavelets`; ``haar`` and ``db1`` are one wavelet.
        J: number of levels, >= 1. A level may be smaller than the filter.
        mode: how the image goes on beyond its border, one of :data:`MODES`.

    Returns:
        Bands, in the device and dtype of ``x``.

    Raises:
        SettingsError: for a wavelet, mode or J that is not offered.
        InputError: for a tensor that is no batch of floating-point images, or too small for ``reflect``.
    """
    _check_settings(wave, J, mode)
    _check_images(x)
    half_length = pywt.Wavelet(wave).dec_len // 2
    forward = _haar_forward if _is_haar(wave) else _filters(wave, x)[0]
    low, details = _computable(x), []
    with torch.autocast(x.device.type, enabled=False):
        for level in range(1, J + 1):
            height, width = low.shape[-2:]
            if mode == "reflect" and min(height, width) < 2:
                raise InputError(
                    f"mode 'reflect' needs at least 2 pixels along each axis, but level {level} starts from "
                    f"{height} x {width}: use fewer levels than J={J}, or mode 'symmetric'"
                )
            for dim in (-2, -1):
                low = _extend_for_filter(low, half_length, mode, dim)
            low, (high,) = forward(low)
            if mode != "zero" and half_length > 1:
                # The filter also ran into the zeros beyond the extension: those outputs belong to no image position.
                rows = slice(half_length - 1, half_length - 1 + _coefficients(height, half_length, mode))
                columns = slice(half_length - 1, half_length - 1 + _coefficients(width, half_length, mode))
                low, high = low[..., rows, columns], high[..., rows, columns]
            details.append(high.to(x.dtype))
    return Bands(low.to(x.dtype), details, wave, mode, (x.shape[-2], x.shape[-1]))


def idwt2(bands: Bands) -> Tensor:
    """Put images together again from their bands: ``idwt2(dwt2(x))`` is ``x``.

    Args:
        bands: what :func:`dwt2` returned, or the same with other values in ``yl`` and ``yh``.

    Returns:
        Images (B, C, H, W) of the size the bands came from.
    """
    inverse = _haar_inverse if _is_haar(bands.wave) else _filters(bands.wave, bands.yl)[1]
    half_length = pywt.Wavelet(bands.wave).rec_len // 2
    around, start = 0, 0
    if bands.mode == "periodization":
        around = half_length // 2
        start = 2 * around - half_length + 1
    low = _computable(bands.yl)
    with torch.autocast(low.device.type, enabled=False):
        for detail, (height, width) in zip(reversed(bands.yh), reversed(bands.level_sizes), strict=True):
            high = _computable(detail)
            for dim in (-2, -1):
                low = _extend(low, around, around, "periodic", dim)
                high = _extend(high, around, around, "periodic", dim)
            if high.requires_grad and not low.requires_grad:
                # pytorch_wavelets gives the details no gradient unless the low band asks for one as well.
                low = low.detach().requires_grad_()
            low = inverse((low, [high]))[..., start : start + height, start : start + width]
    return low.to(bands.yl.dtype)


def low_frequency_image(x: Tensor, wave: str = "haar", J: int = 1, mode: str = "symmetric") -> Tensor:
    """The images with every detail band taken out, at their own size and scale.

    It is the inverse transform of the low band alone, so a constant image stays that constant (except in mode ``zero``,
    where the image ends in a step to black and the step's details are missing).

    Args:
        x: images (B, C, H, W), floating point.
        wave, J, mode: as for :func:`dwt2`.

    Returns:
        (B, C, H, W) in the units of ``x``.

    Raises:
        SettingsError, InputError: as :func:`dwt2`.
    """
    return _low_image(dwt2(x, wave, J, mode))


def high_frequency_image(x: Tensor, wave: str = "haar", J: int = 1, mode: str = "symmetric") -> Tensor:
    """FMISeg's high-frequency image: the detail bands, each min-max normalised, summed, normalised again.

    The minimum and maximum are taken over one image (all of its channels). With J = 1 it is FMISeg's definition; with
    more levels, the bands of all levels are normalised, brought to full size and summed. Bands are enlarged bilinearly
    about the filter's centre, so that long filters, whose bands are larger than H/2, do not shift the image.

    Args:
        x: images (B, C, H, W), floating point.
        wave, J, mode: as for :func:`dwt2`.

    Returns:
        (B, C, H, W) in [0, 1]; zero for a constant image (one whose details stay under 1e-5 of its largest magnitude).

    Raises:
        SettingsError, InputError: as :func:`dwt2`.

    Reference:
        Yu et al., "Frequency-domain Multi-modal Fusion for Language-guided Medical Image Segmentation" (FMISeg), 2025.
    """
    return _high_image(x, dwt2(x, wave, J, mode))


def frequency_images(x: Tensor, wave: str = "haar", J: int = 1, mode: str = "symmetric") -> FrequencyImages:
    """:func:`low_frequency_image` and :func:`high_frequency_image` from one transform.

    Args:
        x: images (B, C, H, W), floating point.
        wave, J, mode: as for :func:`dwt2`.

    Returns:
        FrequencyImages(low, high), each (B, C, H, W).

    Raises:
        SettingsError, InputError: as :func:`dwt2`.
    """
    bands = dwt2(x, wave, J, mode)
    return FrequencyImages(_low_image(bands), _high_image(x, bands))


def _low_image(bands: Bands) -> Tensor:
    without_details = [torch.zeros_like(high) for high in bands.yh]
    return idwt2(Bands(bands.yl, without_details, bands.wave, bands.mode, bands.size))


def _high_image(x: Tensor, bands: Bands) -> Tensor:
    magnitude = _computable(x).abs().amax(dim=(1, 2, 3))
    offset = 0 if bands.mode == "periodization" else pywt.Wavelet(bands.wave).dec_len // 2 - 1
    total: Tensor | None = None
    for level in range(bands.J, 0, -1):
        # A level doubles the scale of what it passes on, and of the rounding errors with it.
        floor = magnitude * _FLAT * 2**level
        mixed = _unit_range(_computable(bands.yh[level - 1]), floor, dim=(1, 3, 4)).sum(dim=2)
        mixed = mixed if total is None else mixed + total
        height, width = bands.level_sizes[level - 1]
        doubled = F.interpolate(mixed, scale_factor=2, mode="bilinear", align_corners=False)
        total = doubled[..., offset : offset + height, offset : offset + width]
    assert total is not None
    return _unit_range(total, torch.full_like(magnitude, _FLAT), dim=(1, 2, 3)).to(x.dtype)


def _unit_range(x: Tensor, floor: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Min-max over ``dim``; zero where the range does not exceed ``floor`` (B,)."""
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    flat = most - least <= floor.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(flat, 0.0, (x - least) / torch.where(flat, 1.0, most - least))


def _coefficients(size: int, half_length: int, mode: str) -> int:
    """How many coefficients a level gives along an axis."""
    return math.ceil(size / 2) if mode == "periodization" else (size + 2 * half_length - 1) // 2


def _extend_for_filter(x: Tensor, half_length: int, mode: str, dim: int) -> Tensor:
    """Extend so that the transform in zero mode, cropped by half_length - 1, sees nothing of its own zeros."""
    size = x.shape[dim]
    if mode == "zero":
        return x
    if mode == "periodization":
        x = _extend(x, 0, size % 2, "constant", dim)
        return _extend(x, half_length - 1, half_length - 1, "periodic", dim)
    after = 2 * _coefficients(size, half_length, mode) - size
    return _extend(x, 2 * half_length - 2, after, mode, dim)


def _extend(x: Tensor, before: int, after: int, mode: str, dim: int) -> Tensor:
    """Continue ``x`` along one axis by PyWavelets' rule ``mode``, by any number of pixels; differentiable."""
    if before == after == 0:
        return x
    size = x.shape[dim]
    source = torch.from_numpy(np.pad(np.arange(size), (before, after), mode=_NUMPY_PAD[mode])).to(x.device)
    left, right = x.index_select(dim, source[:before]), x.index_select(dim, source[before + size :])
    return torch.cat([left, x, right], dim)


@cache
def _is_haar(wave: str) -> bool:
    """Under any of its names."""
    return bool(np.allclose(pywt.Wavelet(wave).dec_lo, 0.5**0.5)) and pywt.Wavelet(wave).dec_len == 2


def _haar_forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """As pytorch_wavelets' forward module for one level in mode zero: (B, C, h, w), [(B, C, 3, h, w)]."""
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
    top, bottom = x[..., 0::2, :], x[..., 1::2, :]
    total, difference = (top + bottom) / 2, (top - bottom) / 2
    (total_left, total_right), (left, right) = ((y[..., 0::2], y[..., 1::2]) for y in (total, difference))
    return total_left + total_right, [torch.stack([left + right, total_left - total_right, left - right], 2)]


def _haar_inverse(bands: tuple[Tensor, list[Tensor]]) -> Tensor:
    """As pytorch_wavelets' inverse module for one level: (B, C, 2 h, 2 w)."""
    low, (high,) = bands
    height, width = high.shape[-2:]
    low = low[..., :height, :width] / 2
    horizontal, vertical, diagonal = (high / 2).unbind(2)
    left, right = low + vertical, low - vertical
    slope, turn = horizontal + diagonal, horizontal - diagonal
    x = low.new_empty(*low.shape[:2], height, 2, width, 2)
    x[..., 0, :, 0], x[..., 1, :, 0] = left + slope, left - slope
    x[..., 0, :, 1], x[..., 1, :, 1] = right + turn, right - turn
    return x.flatten(-2).flatten(-3, -2)


def _filters(wave: str, x: Tensor) -> tuple[Any, Any]:
    """pytorch_wavelets' forward and inverse modules for one level, on the device and in the precision of ``x``."""
    # While a model is being traced tensors are placeholders, and a placeholder must not stay in the cache.
    build = _build_filters.__wrapped__ if torch.compiler.is_compiling() else _build_filters
    return build(wave, x.device, _computable(x[:0]).dtype)


@lru_cache(maxsize=64)
def _build_filters(wave: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    library = _pytorch_wavelets()
    taps = pywt.Wavelet(wave)
    # Tensors born in inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False):
        forward, inverse = library.DWTForward(J=1, wave=taps, mode="zero"), library.DWTInverse(wave=taps, mode="zero")
        # The library rounds the taps to the default dtype; they are set anew so that float64 stays float64.
        for module, name, values in (
            (forward, "h0", taps.dec_lo[::-1]),
            (forward, "h1", taps.dec_hi[::-1]),
            (inverse, "g0", taps.rec_lo),
            (inverse, "g1", taps.rec_hi),
        ):
            line = torch.tensor(values, dtype=torch.float64).to(device, dtype)
            setattr(module, f"{name}_col", line.reshape(1, 1, -1, 1))
            setattr(module, f"{name}_row", line.reshape(1, 1, 1, -1))
    return forward, inverse


def _pytorch_wavelets() -> Any:
    """Import pytorch_wavelets, which asks for setuptools' ``pkg_resources``: gone from setuptools 81 on.

    It wants one function, which the standard library has. The stand-in is there during the import only.
    """
    if "pkg_resources" in sys.modules:
        import pytorch_wavelets

        return pytorch_wavelets
    stand_in: Any = types.ModuleType("pkg_resources")
    stand_in.resource_stream = lambda package, name: importlib.resources.files(package).joinpath(name).open("rb")
    sys.modules["pkg_resources"] = stand_in
    try:
        import pytorch_wavelets
    finally:
        del sys.modules["pkg_resources"]
    return pytorch_wavelets


def _computable(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_settings(wave: str, J: int, mode: str) -> None:
    if wave == "dmey":
        raise SettingsError(
            "wavelet 'dmey' is not offered: its inverse does not give the image back; use a long exact one like 'sym20'"
        )
    if wave not in wavelets():
        raise SettingsError(
            f"wavelet {wave!r} is not offered; {_nearest(wave, wavelets(), ('haar', 'db2', 'sym4', 'bior2.2'))}"
        )
    if mode == "smooth":
        raise SettingsError(
            "boundary mode 'smooth' is not offered: it extrapolates lines so far beyond the border that long filters "
            "lose the image in float32; use 'constant' or 'symmetric'"
        )
    if mode not in MODES:
        raise SettingsError(f"boundary mode {mode!r} is not offered; {_nearest(mode, MODES, MODES)}")
    if isinstance(J, bool) or not isinstance(J, int) or J < 1:
        raise SettingsError(f"J, the number of wavelet levels, must be a whole number >= 1, got {J!r}")


def _nearest(name: object, offers: Sequence[str], examples: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name).lower(), offers, n=3, cutoff=0.5)
    return f"{'nearest' if close else 'choose for example'}: {', '.join(close or examples)}"


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or min(x.shape) < 1:
        raise InputError(f"images must be (batch, channels, height, width), none of them 0, got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise InputError(f"images must be floating point, got {x.dtype}: convert them, for example with .float()")
