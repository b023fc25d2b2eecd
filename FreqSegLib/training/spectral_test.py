"""A spectral model on labelled test images: every class of every image, on the image's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from FreqSegLib.evaluation.boundary_iou import boundary_iou
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE, dice, overlap, summarise
from FreqSegLib.sam.coarse_mask import largest_components_3d
from FreqSegLib.spectral_segmentation import SpectralSegmenter
from FreqSegLib.training.spectral_config import SpectralRecipe
from FreqSegLib.training.spectral_data import Pair, read_pair

METRICS = ("dsc", "nsd", "hd95", "boundary_iou")
PARTS, PART_COSTS = (0.0, 0.05, 0.1, 0.3, 1.0), 0.002
DIGITS = {"dsc": 3, "nsd": 3, "hd95": 2, "boundary_iou": 3}


@dataclass(frozen=True)
class CaseScore:
    """One class of one test image, where the class is there."""

    case: str
    label: str
    dsc: float
    nsd: float
    hd95: float
    boundary_iou: float


def scored(
    segmenter: SpectralSegmenter,
    recipe: SpectralRecipe,
    pair: Pair,
    noise: float = 0.0,
    tolerance: float = NSD_TOLERANCE,
) -> list[CaseScore]:
    """Every class of a labelled image, on the image's own grid.

    Args:
        segmenter: trained for the recipe's classes.
        recipe: says how labels are read.
        pair: the image and its labels.
        noise: standard deviation of Gaussian noise added first, as a share of the image's range of grey levels.
        tolerance: of NSD, in the unit of the file's spacing.
    """
    volume, truth = read_pair(pair, recipe.data)
    if noise:
        array = volume.array.astype(np.float32)
        rng = np.random.default_rng([len(pair.name), *pair.name.encode()])
        spread = noise * float(array.max() - array.min())
        volume = volume.with_array(array + spread * rng.standard_normal(array.shape, dtype=np.float32))
    found = segmenter.segment(volume, keep_probabilities=False)
    # array order: (k, j, i)
    spacing = [float(length) for length in volume.spacing[::-1]]
    scores = []
    for number, one in enumerate(found.classes, start=1):
        real = truth == number
        if not real.any():
            continue
        values = overlap(one.mask, real, spacing, tolerance)
        rim = boundary_iou(one.mask, real)
        scores.append(CaseScore(pair.name, one.name, values.dsc, values.nsd, values.hd95, rim))
    return scores


def choose_smallest_part(
    segmenter: SpectralSegmenter, recipe: SpectralRecipe, pairs: Sequence[Pair]
) -> dict[float, float]:
    """Mean DSC over cases and their classes for every share in ``PARTS``, the best share first.

    A share has to gain ``PART_COSTS`` on keeping everything, since it is chosen on few cases.

    Args:
        segmenter: of a model that keeps everything.
        recipe, pairs: as for :func:`scored`; validation cases.
    """
    found: dict[float, list[float]] = {share: [] for share in PARTS}
    for pair in pairs:
        volume, truth = read_pair(pair, recipe.data)
        for number, one in enumerate(segmenter.segment(volume, keep_probabilities=False), start=1):
            if (truth == number).any():
                for share, values in found.items():
                    values.append(dice(largest_components_3d(one.mask, share), truth == number))
    means = {share: float(np.mean(values)) for share, values in found.items()}
    return dict(sorted(means.items(), key=lambda item: (PART_COSTS * (item[0] > 0) - item[1], item[0])))


def spread(values: Sequence[float], metric: str) -> str:
    """Mean ± standard deviation with the metric's digits."""
    summary = summarise(values)
    return f"{summary.mean:.{DIGITS[metric]}f} ± {summary.sd:.{DIGITS[metric]}f}"


def class_table(scores: Sequence[CaseScore]) -> str:
    """Markdown: a class a line, mean ± standard deviation over the images that show it."""
    lines = ["| class | images | DSC | NSD | HD95 | boundary IoU |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for label in dict.fromkeys(score.label for score in scores):
        own = [score for score in scores if score.label == label]
        cells = [spread([getattr(score, metric) for score in own], metric) for metric in METRICS]
        lines.append(f"| {label} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
