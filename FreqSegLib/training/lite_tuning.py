"""Choose the lite preset's saliency settings a target, on validation slices alone.

The cached, pooled embeddings suffice: every candidate's coarse mask is compared with the target's coverage on the
32 x 32 grid. One threshold serves all slices of a target, as it serves all slices of a volume in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.questions import apart_from_contrasts
from FreqSegLib.clip.vocabulary import Meaning, targets
from FreqSegLib.saliency.m2ib import BottleneckSettings, m2ib_information
from FreqSegLib.saliency.nib import nib_contribution
from FreqSegLib.sam.coarse_mask import coarse_mask
from FreqSegLib.settings import Threshold
from FreqSegLib.training.contrastive import TRUE, statements, truth_table
from FreqSegLib.training.lite_data import POOLED_SIDE, CachedSlices

BETAS = (0.1, 1.0, 3.0)
FIXED_THRESHOLDS = tuple(round(0.1 + 0.05 * i, 2) for i in range(17))
RULES: tuple[tuple[Threshold, float], ...] = (("otsu", 0.5), ("kmeans", 0.5), *(("fixed", v) for v in FIXED_THRESHOLDS))
CONFIDENCES = (0.0, 0.3, 0.5)
# a rule that adapts to the volume is preferred to a fixed number that is barely better on a few slices
FIXED_BONUS_NEEDED = 0.02


@dataclass(frozen=True)
class Tuned:
    """What was chosen for one target, its Dice on the 32 x 32 grid, and the slices that decided.

    Attributes:
        settings: fields of ``TextSegmentationSettings``.
        coarse_dice: mean over the slices.
        tried: Dice of the best threshold of every bottleneck.
        slices: how many.
    """

    settings: dict[str, object]
    coarse_dice: float
    tried: dict[str, float]
    slices: int


def tune(
    model: Aligner,
    data: CachedSlices,
    rows: Sequence[int],
    encode_text: Callable[[Sequence[str]], Tensor],
    slices: int,
    report: Callable[[str], None],
) -> dict[str, Tuned]:
    """Settings of every target from at most ``slices`` of the validation slices ``rows`` that show it."""
    found = {}
    total = torch.from_numpy(data.coverage[list(rows)]).float().sum((2, 3))
    table = truth_table([data.slices[i].modality for i in rows], total, total)
    names = [s.name for s in statements()]
    for target in targets():
        shown = [row for row, said in zip(rows, table[:, names.index(target.name)], strict=True) if said == TRUE]
        chosen = [shown[i] for i in np.linspace(0, len(shown) - 1, min(slices, len(shown))).round().astype(int)]
        if chosen:
            found[target.name] = _tune_one(model, data, chosen, target, encode_text)
            report(f"{target.name}: {found[target.name].settings}, coarse Dice {found[target.name].coarse_dice:.3f}")
    return found


def _tune_one(
    model: Aligner,
    data: CachedSlices,
    rows: Sequence[int],
    target: Meaning,
    encode_text: Callable[[Sequence[str]], Tensor],
) -> Tuned:
    truth = data.coverage[list(rows)].astype(np.float32)[:, list(target.channels)].sum(1) > 0.5
    tried: dict[str, float] = {}
    best: tuple[float, dict[str, object]] | None = None
    for contrast in (True, False):
        text = encode_text([target.name])[0]
        if contrast:
            text = apart_from_contrasts(text, target, encode_text)
        for bottleneck, beta in (*(("m2ib", beta) for beta in BETAS), ("nib", None)):
            saliency = _saliency(model, data, rows, text, beta)
            score, threshold = _best_threshold(saliency, truth)
            tried[f"{bottleneck}{'' if beta is None else f' beta {beta}'}{' contrast' if contrast else ''}"] = score
            settings = {"bottleneck": bottleneck, "contrast": contrast, **threshold}
            if beta is not None:
                settings["beta"] = beta
            if best is None or score > best[0]:
                best = (score, settings)
    assert best is not None
    return Tuned(best[1], best[0], tried, len(rows))


def _saliency(
    model: Aligner, data: CachedSlices, rows: Sequence[int], text: Tensor, beta: float | None
) -> NDArray[np.float32]:
    """(len(rows), 32, 32) in [0, 1] over all slices together."""
    depth, grid = model.config.depth, model.config.grid
    maps = []
    for row in rows:
        with torch.no_grad():
            tokens = model.prefix(torch.from_numpy(data.embeddings[[row]]).float(), depth)

        def suffix(z: Tensor) -> Tensor:
            return model.suffix(z, depth)

        if beta is None:
            maps.append(nib_contribution(suffix, tokens, text[None]))
        else:
            maps.append(m2ib_information(suffix, tokens, text[None], [row], BottleneckSettings(beta=beta)))
    places = torch.cat(maps).view(-1, 1, grid, grid)
    values = F.interpolate(places, size=(POOLED_SIDE, POOLED_SIDE), mode="bilinear")[:, 0].numpy()
    return (values - values.min()) / max(float(values.max() - values.min()), 1e-12)


def _best_threshold(saliency: NDArray[np.float32], truth: NDArray[np.bool_]) -> tuple[float, dict[str, object]]:
    everywhere = np.ones(len(saliency), dtype=bool)
    options: list[tuple[float, dict[str, object]]] = []
    for confidence in CONFIDENCES:
        for rule, value in RULES:
            mask = coarse_mask(
                saliency,
                everywhere,
                threshold=rule,
                value=value,
                confidence_threshold=confidence,
            )
            settings: dict[str, object] = {"threshold": rule, "confidence_threshold": confidence}
            if rule == "fixed":
                settings["threshold_value"] = value
            penalty = FIXED_BONUS_NEEDED if rule == "fixed" else 0.0
            options.append((_dice(mask, truth) - penalty, settings))
    score, settings = max(options, key=lambda option: option[0])
    return score + (FIXED_BONUS_NEEDED if settings["threshold"] == "fixed" else 0.0), settings


def _dice(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    both = 2.0 * (mask & truth).sum((1, 2))
    size = mask.sum((1, 2)) + truth.sum((1, 2))
    return float(np.mean(both / np.maximum(size, 1)))
