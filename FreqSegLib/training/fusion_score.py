"""One fixed number to choose a fusion network by, whatever loss it was trained with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from FreqSegLib.evaluation import fusion_metrics as metrics
from FreqSegLib.fusion.fused import FusionMethod
from FreqSegLib.fusion.rules import Average, ChooseMax, LaplacianPyramid, Maximum
from FreqSegLib.training.fusion_data import Pairs

KEYS = ("EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "SSIM")
"""The metrics that count, by the names and definitions of ``evaluation.fusion_metrics``."""

CLEAR = 0.02
"""A lead or lag of this share of the baseline's value counts as a whole win or loss."""

BASELINES: dict[str, FusionMethod] = {
    "average": Average(),
    "max": Maximum(),
    "choose-max haar": ChooseMax("haar", 1),
    "choose-max db4": ChooseMax("db4", 1),
    "laplacian": LaplacianPyramid(3),
}


def score(table: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over baselines and metrics of the lead, as a share of the baseline's value, cut at +-2 % and scaled to +-1.

    1 means a clear win in every metric against every baseline. A large lead in one metric makes up for nothing.
    """
    leads = [(table[key] - row[key]) / max(abs(row[key]), 1e-9) for row in baselines.values() for key in KEYS]
    return float(np.mean(np.clip(np.array(leads) / CLEAR, -1, 1)))


def wins(table: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """The metrics in which the mean is higher than a baseline's, by baseline."""
    return {name: [key for key in KEYS if table[key] > row[key]] for name, row in baselines.items()}


@torch.no_grad()
def table_of(method: FusionMethod, pairs: Pairs) -> dict[str, float]:
    """Means over the slices of :data:`KEYS`, of whole grey levels as they would be stored, and of two more.

    ``overshoot`` is measured before rounding and clipping (grey levels, see ``edge_overshoot``); ``SSIM_sum`` is the
    SSIM of the published tables.
    """
    rows = []
    for ct, mr in zip(pairs.ct, pairs.mr, strict=True):
        exact = 255.0 * method(ct[None], mr[None]).image[0, 0].double().numpy()
        rows.append(metrics_of(exact, 255.0 * ct[0].double().numpy(), 255.0 * mr[0].double().numpy()))
    return {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}


def metrics_of(exact: metrics.Image, ct: metrics.Image, mr: metrics.Image) -> dict[str, float]:
    """One slice's row of :func:`table_of`; ``exact`` in grey levels, as the method gave it."""
    fused = np.clip(np.rint(exact), 0, 255)
    sides = (ct, mr)
    return {
        "EN": metrics.entropy(fused),
        "SD": metrics.standard_deviation(fused),
        "SF": metrics.spatial_frequency(fused),
        "MI": sum(metrics.mutual_information(fused, side) for side in sides),
        "SCD": metrics.correlations_of_differences(fused, ct, mr),
        "VIF": sum(metrics.visual_information_fidelity(fused, side) for side in sides),
        "Qabf": metrics.edge_information(fused, ct, mr),
        "SSIM": sum(metrics.structural_similarity(fused, side) for side in sides) / 2,
        "SSIM_sum": sum(metrics.structural_similarity(fused, side, data_range=2.0, uniform=True) for side in sides),
        "overshoot": metrics.edge_overshoot(exact, ct, mr),
    }


def baseline_table(pairs: Pairs, cache: Path | None = None) -> dict[str, dict[str, float]]:
    """:func:`table_of` of every baseline; ``cache`` is a JSON file that keeps it for the next run on these slices."""
    if cache is not None and cache.is_file():
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["names"] == list(pairs.names) and set(kept["table"]) == set(BASELINES):
            return kept["table"]
    table = {name: table_of(method, pairs) for name, method in BASELINES.items()}
    if cache is not None:
        temporary = cache.with_name(cache.name + ".part")
        temporary.write_text(json.dumps({"names": list(pairs.names), "table": table}, indent=1), encoding="utf-8")
        os.replace(temporary, cache)
    return table
