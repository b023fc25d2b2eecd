"""A spectral model on labelled test images: every class of every image, on the image's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from FreqSegLib.evaluation.boundary_iou import boundary_iou
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE, overlap, summarise
from FreqSegLib.spectral_segmentation import SpectralSegmenter
from FreqSegLib.training.spectral_config import SpectralRecipe
from FreqSegLib.training.spectral_data import Pair, read_labels
from FreqSegLib.volume import Volume

METRICS = ("dsc", "nsd", "hd95", "boundary_iou")
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
    volume, label = Volume.read(pair.image), Volume.read(pair.label)
    truth = read_labels(label, recipe.data, pair.label)
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
