"""Draw FreqSeg's icon: a segmented organ with a wavelet through it.

Shapes are given on a unit square, drawn large and reduced, so the edges are smooth at every size. Writes the module's
icon (FreqSeg/Resources/Icons/FreqSeg.png, 128 pixels) and the extension's (Resources/Icons/FreqSeg.png, 256 pixels).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parents[1]
ICONS = {
    ROOT / "FreqSeg" / "Resources" / "Icons" / "FreqSeg.png": 128,
    ROOT / "Resources" / "Icons" / "FreqSeg.png": 256,
}
DRAWN = 2048

ORGAN_FROM, ORGAN_TO = (38, 198, 176), (24, 92, 170)
OUTLINE = (11, 44, 92)
WAVE = (255, 206, 74)
Points = np.ndarray
"""(n, 2), x to the right and y downwards, both in [0, 1]."""


def organ() -> Points:
    """A kidney's outline: a closed smooth curve with one hollow side."""
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    hollow = 0.30 * np.exp(-(((angle - np.pi * 1.5 + np.pi) % (2 * np.pi) - np.pi) ** 2) / 0.30)
    radius = 1 - hollow
    x, y = radius * np.cos(angle), -radius * np.sin(angle) * 1.02
    tilt = np.deg2rad(-32)
    turned = np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], axis=1)
    lowest, highest = turned.min(axis=0), turned.max(axis=0)
    return (turned - (lowest + highest) / 2) / (highest - lowest) * (0.84, 0.90) + 0.5


def wavelet() -> Points:
    """A Morlet-like wavelet along the middle: calm at both ends, quick in the organ."""
    x = np.linspace(0.07, 0.93, 2000)
    t = (x - 0.5) / 0.46
    y = 0.51 - 0.30 * np.exp(-((t / 0.40) ** 2)) * np.cos(2 * np.pi * t * 1.72)
    return np.stack([x, y], axis=1)


def filled(points: Points) -> Image.Image:
    """A mask of what the closed curve encloses."""
    mask = Image.new("L", (DRAWN, DRAWN), 0)
    ImageDraw.Draw(mask).polygon([tuple(point) for point in points * DRAWN], fill=255)
    return mask


def stroke(points: Points, width: float, *, closed: bool = False) -> Image.Image:
    """A mask of a round pen's way along a curve; the width is a share of the icon's."""
    mask = Image.new("L", (DRAWN, DRAWN), 0)
    pen = ImageDraw.Draw(mask)
    way = np.concatenate([points, points[:1]]) if closed else points
    steps = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(way, axis=0).T))])
    even = np.linspace(0, steps[-1], int(steps[-1] / (width / 24)) + 2)
    radius = width * DRAWN / 2
    for x, y in zip(np.interp(even, steps, way[:, 0]) * DRAWN, np.interp(even, steps, way[:, 1]) * DRAWN, strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def diagonal(start: tuple[int, int, int], end: tuple[int, int, int]) -> Image.Image:
    """Colours from the upper left to the lower right."""
    share = np.add.outer(np.linspace(0, 0.5, DRAWN), np.linspace(0, 0.5, DRAWN))[..., None]
    return Image.fromarray((np.array(start) * (1 - share) + np.array(end) * share).round().astype(np.uint8))


def draw(size: int) -> Image.Image:
    """The icon, RGBA on nothing, ``size`` pixels wide and high."""
    shape = organ()
    inside = filled(shape)
    picture = Image.new("RGBA", (DRAWN, DRAWN), (0, 0, 0, 0))
    picture.paste(diagonal(ORGAN_FROM, ORGAN_TO), mask=inside)

    light = Image.new("L", (DRAWN, DRAWN), 0)
    ImageDraw.Draw(light).ellipse((0.16 * DRAWN, 0.06 * DRAWN, 0.70 * DRAWN, 0.46 * DRAWN), fill=70)
    light = ImageChops.multiply(light.filter(ImageFilter.GaussianBlur(0.06 * DRAWN)), inside)
    picture.paste(Image.new("RGB", picture.size, (255, 255, 255)), mask=light)

    picture.paste(OUTLINE, mask=stroke(shape, 0.035, closed=True))
    picture.paste(OUTLINE, mask=stroke(wavelet(), 0.125))
    picture.paste(WAVE, mask=stroke(wavelet(), 0.062))
    # Colours of see-through pixels would bleed into the edge; reduced with premultiplied alpha they do not.
    return picture.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sheet", type=Path, help="also write every size on light and dark ground, to look at")
    asked = parser.parse_args()
    for path, size in ICONS.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(size).save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}: {size} pixels, {path.stat().st_size} bytes")
    if asked.sheet is not None:
        sheet().save(asked.sheet)
    return 0


def sheet() -> Image.Image:
    """The icon at 16 to 256 pixels, on a light and a dark ground, with the smallest enlarged below."""
    sizes = (16, 32, 64, 128, 256)
    wide, high = sum(sizes) + 20 * (len(sizes) + 1), 256 + 40
    whole = Image.new("RGB", (wide, 2 * high + 300), (245, 245, 245))
    for row, ground in enumerate(((245, 245, 245), (43, 43, 46))):
        whole.paste(ground, (0, row * high, wide, (row + 1) * high))
        left = 20
        for size in sizes:
            icon = draw(size)
            whole.paste(icon, (left, row * high + 20 + (256 - size) // 2), icon)
            left += size + 20
    for column, size in enumerate((16, 32)):
        icon = draw(size)
        large = icon.resize((256, 256), Image.Resampling.NEAREST)
        whole.paste(large, (20 + column * 280, 2 * high + 20), large)
    return whole


if __name__ == "__main__":
    raise SystemExit(main())
