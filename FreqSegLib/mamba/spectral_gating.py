"""A learned filter in the frequency domain that means the same at every image size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.mamba.borders import repeat_border

# Radii in cycles a pixel at which one band ends and the next begins: octaves below the Nyquist frequency of 0.5.
BAND_EDGES = (1 / 16, 1 / 8, 1 / 4)


class SpectralGating(nn.Module):
    """Multiplies the spectrum of every channel with a learned complex filter, and radial bands with their own gain.

    As GFNet's global filter (Rao et al., 2021), but not tied to one image size. The filter is learned on a grid of
    ``filter_size`` frequencies. For an image of any size it is resampled by trigonometric interpolation: its impulse
    response, which has ``filter_size`` pixels a side, is padded with zeros to the image's size. As the response is that
    compact, padding the image by it (with its border values) keeps the two ends of the image apart exactly: what is
    computed is the linear convolution, not the circular one.

    The filter starts as the identity with a little noise. Transforms run in float32 (float64 stays) under any autocast.

    Args:
        channels: of the image.
        filter_size: frequencies along each axis; the reach of the filter is half as many pixels to each side.
        dimensions: 2 or 3.
        noise: standard deviation of the start around the identity.
    """

    def __init__(self, channels: int, filter_size: int = 16, dimensions: int = 2, noise: float = 0.02) -> None:
        super().__init__()
        if filter_size < 1 or dimensions not in (2, 3):
            raise SettingsError(
                f"filter_size must be at least 1 and dimensions 2 or 3, got {filter_size} and {dimensions}"
            )
        self.filter_size, self.dimensions = filter_size, dimensions
        grid = (filter_size,) * (dimensions - 1) + (filter_size // 2 + 1,)
        weight = torch.randn(channels, *grid, 2) * noise
        weight[..., 0] += 1
        self.complex_weight = nn.Parameter(weight)
        self.band_gain = nn.Parameter(torch.ones(channels, len(BAND_EDGES) + 1))
        self.register_buffer("bands", radial_bands(filter_size, dimensions), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *size) of any size to the same shape."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return self.convolved(x)
        size = tuple(x.shape[2:])
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            padded = self._padded(x.to(exact))
            total = tuple(padded.shape[2:])
            kernel = self.response().to(exact)
            short = [amount for side in reversed(total) for amount in (0, side - self.filter_size)]
            axes = tuple(range(-self.dimensions, 0))
            transfer = torch.fft.rfftn(F.pad(kernel, short), dim=axes)
            # where the response lies wholly inside the padded image, so nothing has come round its end
            spectrum = torch.fft.rfftn(padded, dim=axes, norm="ortho") * transfer
            filtered = torch.fft.irfftn(spectrum, s=total, dim=axes, norm="ortho")
            late = self.filter_size - 1
            for axis, side in enumerate(size, start=2):
                filtered = filtered.narrow(axis, late, side)
        return filtered.to(x.dtype)

    def convolved(self, x: Tensor) -> Tensor:
        """The same by direct convolution: for formats that lack Fourier transforms, and to compare with."""
        convolve = F.conv2d if self.dimensions == 2 else F.conv3d
        kernel = self.response().to(x.dtype).flip(tuple(range(-self.dimensions, 0)))[:, None]
        return convolve(self._padded(x), kernel, groups=x.shape[1])

    def response(self) -> Tensor:
        """(channels, filter_size, ...) impulse response; the pixel itself is at ``filter_size // 2``."""
        gain = torch.einsum("cs,s...->c...", self.band_gain, self.bands)
        weight = torch.view_as_complex(
            self.complex_weight.float() if _is_short(self.complex_weight) else self.complex_weight
        )
        axes = tuple(range(-self.dimensions, 0))
        kernel = torch.fft.irfftn(weight * gain, s=(self.filter_size,) * self.dimensions, dim=axes)
        return torch.fft.fftshift(kernel, dim=axes)

    def _padded(self, x: Tensor) -> Tensor:
        before, after = self.filter_size - 1 - self.filter_size // 2, self.filter_size // 2
        return repeat_border(x, [before] * self.dimensions, [after] * self.dimensions)

    def extra_repr(self) -> str:
        return f"channels={self.complex_weight.shape[0]}, filter_size={self.filter_size}, dimensions={self.dimensions}"


def _is_short(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def radial_bands(filter_size: int, dimensions: int) -> Tensor:
    """(bands, *half grid) weights that add up to 1 everywhere: octaves of the radius that fade into each other."""
    full = torch.fft.fftfreq(filter_size)
    half = torch.fft.rfftfreq(filter_size)
    axes = torch.meshgrid(*[full] * (dimensions - 1), half, indexing="ij")
    radius = torch.stack(axes).square().sum(0).sqrt().clamp(min=1e-6)
    # rises from 0 to 1 over an octave around each edge
    above = [
        (0.5 + 0.5 * torch.sin(math.pi * (torch.log2(radius / edge)).clamp(-0.5, 0.5))).clamp(0, 1)
        for edge in BAND_EDGES
    ]
    edges = [torch.ones_like(radius), *above, torch.zeros_like(radius)]
    return torch.stack([edges[band] - edges[band + 1] for band in range(len(BAND_EDGES) + 1)])
