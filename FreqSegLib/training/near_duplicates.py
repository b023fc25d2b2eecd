"""Images that show the same thing twice must not be split between training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIDE = 32
SIMILARITY = 0.9


def near_duplicates(images: Sequence[Path], similarity: float = SIMILARITY) -> dict[Path, Path]:
    """For every image the first (by name) of those it resembles, directly or through others; itself when unique.

    Two images resemble each other when their 32 x 32 grey thumbnails correlate (Pearson) by at least ``similarity``.

    Args:
        images: image files that Pillow reads.
        similarity: in (0, 1].
    """
    from PIL import Image

    ordered = sorted(images)
    thumbnails = np.empty((len(ordered), SIDE * SIDE))
    for row, path in enumerate(ordered):
        with Image.open(path) as image:
            small = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
        centred = small.ravel() - small.mean()
        thumbnails[row] = centred / max(float(np.linalg.norm(centred)), 1e-12)
    alike = thumbnails @ thumbnails.T >= similarity
    first = list(range(len(ordered)))
    for row in range(len(ordered)):
        for other in np.flatnonzero(alike[row, :row]):
            joined = {first[row], first[int(other)]}
            first = [min(joined) if leader in joined else leader for leader in first]
    return {path: ordered[leader] for path, leader in zip(ordered, first, strict=True)}
