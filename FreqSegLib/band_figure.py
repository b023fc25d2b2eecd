"""What the wavelet stage makes of one slice, as a picture: frequency images, every band, and where the energy lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from FreqSegLib.errors import InputError
from FreqSegLib.output_file import replacing
from FreqSegLib.wavelet import Bands, dwt2, frequency_images, idwt2

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORIENTATIONS = {"LH": "horizontal edges", "HL": "vertical edges", "HH": "diagonals"}
_WIDEST = 99.5


def band_energies(bands: Bands) -> dict[str, float]:
    """Each band's share of the energy (sum of squares) of all coefficients; they add up to 1.

    Returns:
        ``LL`` with its level, then ``LH``, ``HL`` and ``HH`` of every level, the coarsest first. An image that is zero
        everywhere has no energy, and every share is 0.
    """
    energies = {f"LL{bands.J}": float(bands.yl.double().square().sum())}
    for level in range(bands.J, 0, -1):
        for place, name in enumerate(ORIENTATIONS):
            energies[f"{name}{level}"] = float(bands.yh[level - 1][:, :, place].double().square().sum())
    total = sum(energies.values())
    return {name: value / total if total else 0.0 for name, value in energies.items()}


def band_figure(
    image: NDArray[np.float32],
    wave: str = "haar",
    J: int = 1,
    mode: str = "symmetric",
    *,
    pixel_spacing: tuple[float, float] = (1.0, 1.0),
    title: str = "",
) -> Figure:
    """Draw an image's decomposition.

    Args:
        image: (H, W) in [0, 1].
        wave, J, mode: as in :func:`FreqSegLib.wavelet.dwt2`.
        pixel_spacing: distance of rows and of columns in mm, for the right aspect.
        title: above it all.

    Raises:
        InputError: it is no (H, W) array.
        SettingsError: a wavelet, number of levels or mode that is not offered.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if image.ndim != 2:
        raise InputError(f"one slice (rows, columns) is needed, got an array of shape {image.shape}")
    x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
    bands, images = dwt2(x, wave, J, mode), frequency_images(x, wave, J, mode)
    error = float((idwt2(bands) - x).abs().max())
    aspect = pixel_spacing[0] / pixel_spacing[1]
    height, width = image.shape
    tall = min(1.6, max(0.6, height * aspect / width))
    figure = Figure(figsize=(12, (3 * tall + 0.5) * (J + 1) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{title + '    ' if title else ''}{wave}, J = {J}, {mode}    inverse differs by at most {error:.1e}",
        fontsize=13,
    )
    grid = figure.subplots(J + 1, 4, squeeze=False)
    for axes, picture, name in zip(
        grid[0],
        (x, images.low, images.high),
        ("image", "low-frequency image", "high-frequency image"),
        strict=False,
    ):
        axes.imshow(picture[0, 0].numpy(), cmap="gray", vmin=0, vmax=1, aspect=aspect)
        _bare(axes, name)
    _draw_energies(grid[0][3], band_energies(bands))
    for row, level in enumerate(range(J, 0, -1), start=1):
        details = bands.yh[level - 1][0, 0].numpy()
        # one scale a level, so that its bands compare
        most = max(float(np.percentile(np.abs(details), _WIDEST)), float(np.finfo(np.float32).tiny))
        for place, (name, what) in enumerate(ORIENTATIONS.items()):
            grid[row][place + 1].imshow(details[place], cmap="RdBu_r", vmin=-most, vmax=most, aspect=aspect)
            _bare(grid[row][place + 1], f"{name}{level}: {what}, ±{most:.2g}")
        if level == J:
            low = bands.yl[0, 0].numpy()
            grid[row][0].imshow(low, cmap="gray", aspect=aspect)
            _bare(grid[row][0], f"LL{level}: {low.min():.2g} to {low.max():.2g}")
        else:
            grid[row][0].set_axis_off()
    return figure


def write_band_figure(figure: Figure, path: Path, *, overwrite: bool = False) -> Path:
    """Write the figure as a PNG that appears complete.

    Raises:
        OutputError: the file exists and may not be replaced, or the folder cannot be written.
    """
    with replacing([path], overwrite=overwrite) as (temporary,):
        figure.savefig(temporary, format="png", dpi=100)
    return path


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_energies(axes: Axes, energies: dict[str, float]) -> None:
    """Shares as bars; on a logarithmic scale, as the low band holds nearly all."""
    names = list(energies)
    shares = [100 * energies[name] for name in names]
    bars = axes.barh(names, [max(share, 1e-4) for share in shares], color="#4477aa")
    axes.set(xscale="log", xlim=(1e-4, 1e4))
    axes.bar_label(bars, labels=[f"{share:.3g} %" for share in shares], padding=3, fontsize=8)
    axes.set_title("share of the energy", fontsize=10)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
